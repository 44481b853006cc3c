"""Loading whatever is to be measured: FlexOlmo checkpoints, dense models and the baselines."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import flexolmo_hf  # noqa: F401  (registers the architecture with the Auto classes)
from flexolmo_hf.errors import ConfigurationError


def load_for_evaluation(
    path: str | Path,
    *,
    active_experts: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        path: Folder or repository of a FlexOlmo checkpoint, a dense model or a baseline.
        active_experts: The experts to load; None for all. Only for FlexOlmo checkpoints.
        dtype: Of the weights; None for float32.
        device: Where to put the model; None for the CPU.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ConfigurationError: If experts are chosen in a model that has none.
    """
    # Their model types are registered by the import.
    import flexolmo_hf.evaluation.baselines  # noqa: F401

    chosen = {}
    if active_experts is not None:
        if AutoConfig.from_pretrained(path).model_type != "flex_olmo":
            raise ConfigurationError(
                f"active_experts={list(active_experts)} was given for a model that has no experts.",
                "Only FlexOlmo checkpoints can be loaded with some of their experts.",
            )
        chosen = {"active_experts": list(active_experts)}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32, **chosen)
    return model.to(device or "cpu").eval(), AutoTokenizer.from_pretrained(path)
