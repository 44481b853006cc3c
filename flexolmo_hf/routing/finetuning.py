"""The paper's classifier: a small encoder with a classification head, fine-tuned on the documents themselves.

Shapes: B documents in a batch, N documents, T tokens.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding
from transformers.utils import logging

from flexolmo_hf.errors import IncompleteCheckpointError, NonFiniteLossError


@dataclass
class FineTunedClassifier:
    """Fine-tune an encoder to tell private documents from public ones.

    What is learned stays in memory and goes when the object does; nothing is written.

    Args:
        model: Folder or repository of an encoder; sentence-transformers' folders will do.
        learning_rate: Of AdamW, constant; the paper's value, meant for hundreds of thousands of documents.
        epochs: How often each document is seen.
        batch_size: Documents in a step.
        max_length: Tokens read of a document, no more than its tokenizer says it takes.
        device: Where to compute; the accelerator if there is one.
    """

    model: str | os.PathLike
    learning_rate: float = 3e-6
    epochs: int = 1
    batch_size: int = 32
    max_length: int = 512
    device: str | None = None

    def fit(self, texts: Sequence[str], unit_NW: np.ndarray, private_N: np.ndarray, *, seed: int) -> None:
        """Learn from texts; the embeddings are not looked at.

        Raises:
            IncompleteCheckpointError: If weights of the encoder itself are not in its files.
            NonFiniteLossError: If the loss of a step is NaN or infinite.
        """
        # The head's first values and dropout draw from torch's own state, which is given back as it was.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._load()
            self._train(texts, torch.from_numpy(private_N.astype(np.float32)))

    def log_odds(self, texts: Sequence[str], unit_NW: np.ndarray) -> np.ndarray:
        """Judge texts; the embeddings are not looked at."""
        # Texts of similar length share a batch, which saves padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found_N = np.empty(len(texts))
        self._network.eval()
        with torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                found_N[part] = self._network(**self._tokens([texts[i] for i in part])).logits[:, 0].float().cpu()
        return found_N

    def _load(self) -> None:
        level = logging.get_verbosity()
        # It would report that the head is new, with the folder's path. What may be missing is checked below.
        logging.set_verbosity_error()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.model)
            self._network, found = AutoModelForSequenceClassification.from_pretrained(
                self.model, num_labels=1, output_loading_info=True
            )
        finally:
            logging.set_verbosity(level)
        body = self._network.base_model_prefix + "."
        missing = sorted(key for key in found["missing_keys"] if key.startswith(body) and ".pooler." not in key)
        if missing:
            raise IncompleteCheckpointError(missing)
        self._network.to(self.device or _accelerator())

    def _train(self, texts: Sequence[str], private_N: torch.Tensor) -> None:
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=self.learning_rate, weight_decay=0.0)
        # Both kinds weigh the same in sum.
        share = private_N.mean()
        weight_N = torch.where(private_N > 0, 0.5 / share, 0.5 / (1 - share))
        self._network.train()
        step = 0
        for _ in range(self.epochs):
            for part in torch.randperm(len(texts)).split(self.batch_size):
                logits_B = self._network(**self._tokens([texts[i] for i in part.tolist()])).logits[:, 0].float()
                loss = binary_cross_entropy_with_logits(
                    logits_B, private_N[part].to(logits_B.device), weight_N[part].to(logits_B.device)
                )
                step += 1
                if not loss.isfinite():
                    raise NonFiniteLossError(step, step, None)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    def _tokens(self, texts: list[str]) -> BatchEncoding:
        options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
        length = min(self.max_length, self._tokenizer.model_max_length)
        return self._tokenizer(texts, max_length=length, **options).to(self._network.device)


def _accelerator() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
