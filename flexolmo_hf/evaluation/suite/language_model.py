"""A FlexOlmo model, a dense one or a baseline, as lm-evaluation-harness knows models.

Importing this file registers it there as "flexolmo".
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from flexolmo_hf.errors import ConfigurationError, UnknownArgumentError

# Importing it also registers the baselines' types with the Auto classes.
from flexolmo_hf.evaluation.baselines import PromptRoutedForCausalLM
from flexolmo_hf.evaluation.suite.expert_sets import read_set
from flexolmo_hf.evaluation.suite.offline.encoding import Request
from flexolmo_hf.evaluation.suite.offline.scoring import can_share_prefixes, score
from flexolmo_hf.modeling.expert_sets import ExpertSets

# What HFLM's constructor reads and this class hands on. The rest is about other ways of loading or of scoring.
_KNOWN = (
    "pretrained",
    "active_experts",
    "attn_implementation",
    "batch_size",
    "batch_tokens",
    "device",
    "dtype",
    "experts_implementation",
    "max_batch_size",
    "max_length",
    "revision",
    "tokenizer",
)
_OF_THE_MODEL = ("attn_implementation", "experts_implementation")


@register_model("flexolmo")
class FlexOlmoLM(HFLM):
    """The harness's class for transformers models, with `active_experts` and a scoring that reads each prompt once.

    What it does not know it refuses.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        active_experts: Any = None,
        batch_tokens: int = 4096,
        **settings: Any,
    ) -> None:
        """Load a model, or take one.

        Args:
            pretrained: Folder or repository of a model of any kind that `load_for_evaluation` knows, or the model.
            active_experts: The experts in use: names, or one text as ``public+math``, since the harness cuts its
                arguments at commas. Of a folder or repository, only these are loaded.
            batch_tokens: Tokens the model reads at once where it scores given answers.
            **settings: Of the harness: ``batch_size``, ``device``, ``dtype``, ``max_length``, ``revision``,
                ``tokenizer`` and so on.

        Raises:
            UnknownArgumentError: If nothing reads a setting.
            ConfigurationError: If experts are named for a model that has none.
            FlexOlmoError: If a name is no expert's, or as loading refuses a model.
        """
        unknown = sorted(set(settings) - set(_KNOWN))
        if unknown:
            raise UnknownArgumentError(unknown, _KNOWN)
        self._batch_tokens = int(batch_tokens)
        self._experts = read_set(active_experts)
        self._of_the_model = {name: settings.pop(name) for name in _OF_THE_MODEL if name in settings}
        settings.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        # Every model here is a causal one; the harness does not know all their types.
        super().__init__(pretrained, backend="causal", **settings)
        if not isinstance(pretrained, str) and self._experts is not None:
            self.choose(self._experts)

    def _create_model(self, pretrained: str, revision: str = "main", dtype: Any = "auto", **others: Any) -> None:
        # Upstream's passes on a dozen more keywords, which a baseline's loading does not know.
        chosen: dict[str, Any] = dict(self._of_the_model)
        if self._experts is not None:
            if self.config.model_type != "flex_olmo":
                raise _no_experts(self._experts)
            chosen["active_experts"] = list(self._experts)
        loaded = self.AUTO_MODEL_CLASS.from_pretrained(pretrained, revision=revision, dtype=get_dtype(dtype), **chosen)
        self._model = loaded.to(self.device)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations. Unlike upstream's, a beginning that many requests share is read once."""
        found = score(
            self.model,
            self.tokenizer,
            [Request(*request.args) for request in requests],
            batch_tokens=self._batch_tokens,
            max_length=self.max_length,
            share_prefixes=can_share_prefixes(self.model),
        )
        answers = [(one.logprob, one.greedy) for one in found]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        # Upstream's stops remember as many rows as were given, so that these cannot be handed out to several models.
        write = super()._model_generate
        if not isinstance(self.model, PromptRoutedForCausalLM) or len(self.model.answerers) == 1:
            written: torch.Tensor = write(context, max_length, stop, **options)
            return written
        mask_BT = options.pop("attention_mask")
        rows = [
            write(ids_1T, max_length, stop, attention_mask=mask_1T, **options)[0]
            for ids_1T, mask_1T in zip(context.split(1), mask_BT.split(1), strict=True)
        ]
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def choose(self, names: Sequence[str] | None) -> None:
        """Put a set of experts in force; None for all that are loaded.

        Raises:
            ConfigurationError: If experts are named for a model that has none.
            FlexOlmoError: As `set_active_experts` refuses names.
        """
        if isinstance(self.model, ExpertSets):
            self.model.set_active_experts(None if names is None else list(names))
        elif names is not None:
            raise _no_experts(names)

    @contextmanager
    def using(self, names: Sequence[str] | None) -> Iterator[tuple[str, ...]]:
        """Use a set of experts for the length of a block, as `choose` does.

        Yields:
            The experts in force; none for a model that has none.
        """
        before = self.model.active_experts if isinstance(self.model, ExpertSets) else None
        try:
            self.choose(names)
            yield tuple(self.model.active_experts) if isinstance(self.model, ExpertSets) else ()
        finally:
            self.choose(before)


def _no_experts(names: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(
        f"The experts {'+'.join(names)} were asked for in a model that has no experts.",
        "Leave active_experts out, or name a FlexOlmo model.",
    )
