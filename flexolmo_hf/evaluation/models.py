"""Loading whatever is to be measured: FlexOlmo checkpoints, dense models and the baselines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import flexolmo_hf  # noqa: F401  (registers the architecture with the Auto classes)
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.files.locate import model_type_of, named_errors
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM


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
        dtype: Of the weights; None for float32, "auto" for the checkpoint's.
        device: Where to put the model; None for the CPU.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ConfigurationError: If experts are chosen in a model that has none, there is no tokenizer, or no such dtype or
            device.
        CheckpointNotFoundError, DamagedFileError: If there is no checkpoint.
    """
    # Their model types are registered by the import.
    import flexolmo_hf.evaluation.baselines  # noqa: F401

    weights, place = read_dtype(dtype), read_device(device)
    model_type_of(path)
    with named_errors(path):
        config = AutoConfig.from_pretrained(path)
    chosen = {}
    if active_experts is not None:
        if config.model_type != "flex_olmo":
            raise ConfigurationError(
                f"active_experts={list(active_experts)} was given for a model that has no experts.",
                "Only FlexOlmo checkpoints can be loaded with some of their experts.",
            )
        chosen = {"active_experts": list(active_experts)}
    # What is read faster is read first.
    tokenizer = _tokenizer(path)
    with named_errors(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=weights, **chosen)
    return model.to(place).eval(), tokenizer


def load_mixture(
    path: str | Path,
    *,
    active_experts: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
) -> tuple[FlexOlmoForCausalLM, PreTrainedTokenizerBase]:
    """Load a FlexOlmo checkpoint and its tokenizer, for what only a model with named experts can be asked.

    Takes and returns the same as `load_for_evaluation`.

    Raises:
        NotFlexOlmoError: If it is a model of another kind.
        ConfigurationError: If there is no tokenizer, or no such dtype or device.
        FlexOlmoError: As `FlexOlmoForCausalLM.from_pretrained` refuses checkpoints and names.
    """
    weights, place = read_dtype(dtype), read_device(device)
    chosen: dict[str, Any] = {} if active_experts is None else {"active_experts": list(active_experts)}
    model = FlexOlmoForCausalLM.from_pretrained(path, dtype=weights, **chosen)
    return model.to(place).eval(), _tokenizer(path)


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    """Return the dtype of a name such as "bfloat16"; None is float32, and "auto" stays.

    Raises:
        ConfigurationError: If no weights can be of it.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if dtype == "auto":
        return "auto"
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigurationError(f"There is no dtype {dtype!r}.", "Give auto, float32, bfloat16 or float16.")
    return found


def read_device(device: str | None) -> torch.device:
    """Return the device of a name such as "cuda:0"; None is the CPU.

    Raises:
        ConfigurationError: If there is none of the name on this machine.
    """
    try:
        return torch.empty(0, device=device or "cpu").device
    # torch raises AssertionError where it was built without the device's kind.
    except (RuntimeError, AssertionError):
        raise ConfigurationError(
            f"There is no device {device!r} on this machine.", "Give one that torch finds here, such as cpu or cuda:0."
        ) from None


def _tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{Path(path).name!r} holds no tokenizer that can be read.",
            "Save the model's beside the weights: tokenizer.save_pretrained(folder).",
        ) from error
