"""Keyword arguments that nothing reads are refused: one of them might have been an opt-out with a typing error."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from transformers.utils import TransformersKwargs

from flexolmo_hf.errors import UnknownArgumentError

# What upstream's generation loop, loss and trainers hand to `forward` beside its named parameters.
_PASSED_BY_HOSTS = {
    *TransformersKwargs.__optional_keys__,
    "return_dict",
    "shift_labels",
    "ignore_index",
    "cache_position",
    # Continuous batching.
    "block_table",
    "cache",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "logits_indices",
    "logits_processor_args",
    "max_length_k",
    "max_length_q",
    "read_index",
    "write_index",
}


def known_arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Return the keywords that `function` names or that hosts may pass along."""
    named = {name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
    return frozenset((named | _PASSED_BY_HOSTS) - {"self"})


def refuse_unknown(given: Iterable[str], known: frozenset[str]) -> None:
    """Raise unless every given keyword is known.

    Raises:
        UnknownArgumentError: Naming the unknown ones and the closest known ones.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UnknownArgumentError(unknown, sorted(known))


# Upstream's `from_pretrained` hides its own keywords in **kwargs, so the usual ones are named here for the hint.
_LOAD_KEYWORDS = (
    "active_experts",
    "attn_implementation",
    "cache_dir",
    "config",
    "device_map",
    "dtype",
    "force_download",
    "local_files_only",
    "offload_folder",
    "output_loading_info",
    "quantization_config",
    "revision",
    "subfolder",
    "token",
)


def refuse_leftovers(keywords: Iterable[str]) -> None:
    """Raise if `from_pretrained` has keywords left that no one has read: they arrive at the model's constructor.

    Raises:
        UnknownArgumentError: Naming them and the closest known ones.
    """
    if keywords:
        raise UnknownArgumentError(list(keywords), _LOAD_KEYWORDS)
