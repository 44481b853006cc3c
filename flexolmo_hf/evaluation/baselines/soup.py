"""Model soup: one model whose weights are the average of several (arXiv 2507.07024, baselines).

Tensors are read from the members' files and averaged when the output's file is written: the memory needed is that of
one output file and, in float64, of one tensor; not that of a model.
"""

import copy
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.composition.reader import CheckpointReader, non_weight_files
from flexolmo_hf.errors import ConfigurationError, EmptyExpertSetError, NonFiniteTensorError
from flexolmo_hf.evaluation.baselines.loading import Member, tokenizers_differ
from flexolmo_hf.modeling.files.layout import Deferred, bytes_of, write_weights
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM

# What may differ between models of one architecture.
_INCIDENTAL = {
    "_name_or_path",
    "_attn_implementation",
    "_experts_implementation",
    "active_experts",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class _Source:
    """A member, on disk or in memory: its settings, and its tensors one at a time."""

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    tensor: Callable[[str], torch.Tensor]
    expert_names: Sequence[str]
    folder: Path | None = None


def average_models(
    members: Mapping[str, Member] | Sequence[Member],
    output_dir: str | os.PathLike | None = None,
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    max_shard_size: int | str = "1GB",
) -> Any:
    """Average the weights of models of one architecture.

    The average is taken in float64 as the first member plus the weighted differences from it, so the average of a model
    with itself is that model, bit for bit.

    Args:
        members: Folders of dense OLMo-2 or FlexOlmo checkpoints, or models in memory; by name or in a row.
        output_dir: A folder that does not exist yet or is empty; None returns the model instead.
        weights: How much each counts, in the form of `members`; they are divided by their sum. None for equal weights.
        max_shard_size: Largest weight file, and so the memory that writing needs.

    Returns:
        `output_dir` as a path, which holds the average with the settings and the tokenizer of the first member; or the
        model itself, in evaluation mode.

    Raises:
        EmptyExpertSetError: If there is no member.
        ConfigurationError: If settings, tensors or tokenizers differ, or the weights are no weights.
        NotFlexOlmoError: If a checkpoint is of another architecture.
        CheckpointNotFoundError, DamagedFileError, IncompleteCheckpointError: If a member's files are not there or not
        whole. NonFiniteTensorError: If the average holds NaN or infinity.
        OutputFolderNotEmptyError, NoSpaceError: If the output has no place.
    """
    named = members if isinstance(members, Mapping) else dict(enumerate(members))
    if not named:
        raise EmptyExpertSetError(["a model"])
    if output_dir is not None:
        refuse_nonempty(output_dir)
    shares = _shares(named, weights)
    sources = {name: _in_memory(m) if isinstance(m, PreTrainedModel) else _on_disk(m) for name, m in named.items()}
    _refuse_differences(sources)
    first, *others = sources.values()

    def mean(name: str) -> torch.Tensor:
        return weighted_mean(first.tensor(name), [other.tensor(name) for other in others], shares[1:])

    if output_dir is None:
        return _built(first, {name: mean(name) for name in first.shapes})
    planned = {
        name: Deferred(torch.empty(shape, dtype=first.tensor(name).dtype, device="meta"), partial(mean, name))
        for name, shape in first.shapes.items()
    }
    with new_folder(output_dir, needed_bytes=bytes_of(planned)) as unfinished:
        write_weights(unfinished, planned, first.expert_names, max_shard_size, whose="the average")
        first.config.save_pretrained(unfinished)
        for file in [] if first.folder is None else non_weight_files(first.folder):
            shutil.copyfile(file, unfinished / file.name)
    return Path(output_dir)


def weighted_mean(
    first: torch.Tensor,
    others: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    within: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the weighted mean of tensors in the dtype of the first.

    Args:
        first: A tensor; its weight is what the others' leave of 1.
        others: Tensors of its shape.
        weights: One for each of the others; with the first's they add up to 1.
        within: The dtype to compute in.
    """
    start = first.detach().to(within)
    total = start.clone()
    for other, weight in zip(others, weights, strict=True):
        total.add_(other.detach().to(start) - start, alpha=weight)
    return total.to(first.dtype)


def differing_settings(first: Any, other: Any) -> list[str]:
    """Return, by name and with both values, the settings of two models that would have to agree to average them."""
    mine, theirs = ({**config.to_dict(), "model_type": config.model_type} for config in (first, other))
    keys = sorted((mine.keys() | theirs.keys()) - _INCIDENTAL)
    return [f"{k} ({mine.get(k)!r}, {theirs.get(k)!r})" for k in keys if mine.get(k) != theirs.get(k)]


def _shares(named: Mapping[Any, Any], weights: Mapping[str, float] | Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1 / len(named)] * len(named)
    keyed = weights if isinstance(weights, Mapping) else dict(enumerate(weights))
    if isinstance(weights, Mapping) and set(keyed) != set(named):
        raise ConfigurationError(
            f"Weights were given for {sorted(map(str, keyed))}, and members are {sorted(map(str, named))}.",
            "Give one weight for each member.",
        )
    values = [float(keyed[name]) for name in named] if isinstance(weights, Mapping) else [float(v) for v in weights]
    if len(values) != len(named) or not all(0 <= value < math.inf for value in values) or not sum(values):
        raise ConfigurationError(
            f"weights={values} do not weigh {len(named)} members.",
            "Give each member a finite weight of at least 0, and one of them more.",
        )
    return [value / sum(values) for value in values]


def _on_disk(path: str | os.PathLike) -> _Source:
    reader = CheckpointReader(path)
    experts = [] if reader.is_dense else list(reader.config.expert_names)

    def own(name: str) -> str:
        return name.replace(".mlp.experts.0.", ".mlp.") if reader.is_dense else name

    names = {own(name): name for name in reader.file_of}
    return _Source(
        config=AutoConfig.from_pretrained(reader.folder),
        shapes={mine: reader.shape_and_size(name)[0] for mine, name in names.items()},
        tensor=lambda name: reader.tensor(names[name]),
        expert_names=experts,
        folder=reader.folder,
    )


def _in_memory(model: PreTrainedModel) -> _Source:
    if isinstance(model, FlexOlmoForCausalLM) and model.expert_names != model.config.expert_names:
        raise ConfigurationError(
            f"The model in memory has {model.expert_names} of {model.config.expert_names}.",
            "Average whole models: load it with all its experts, or save it first.",
        )
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return _Source(
        config=model.config,
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        tensor=state.__getitem__,
        expert_names=getattr(model.config, "expert_names", []),
    )


def _refuse_differences(sources: Mapping[Any, _Source]) -> None:
    (first_name, first), *others = sources.items()
    for name, other in others:
        differences = differing_settings(first.config, other.config)
        tensors = sorted(key for key in first.shapes.keys() | other.shapes if _other(first, other, key))
        if tensors:
            differences.append(f"{len(tensors)} tensor(s) such as {tensors[0]}")
        if tokenizers_differ(first.folder, other.folder):
            differences.append("the tokenizer")
        if differences:
            raise ConfigurationError(
                f"Members {first_name!r} and {name!r} cannot be averaged; they differ in {'; '.join(differences[:4])}.",
                "Average models that were trained from the same one, with the same tokenizer.",
            )


def _other(first: _Source, other: _Source, key: str) -> bool:
    if first.shapes.get(key) != other.shapes.get(key):
        return True
    return first.tensor(key).dtype != other.tensor(key).dtype


def _built(first: _Source, state: dict[str, torch.Tensor]) -> Any:
    config = copy.deepcopy(first.config)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteTensorError(name, "the average")
    dtype = next(iter(state.values())).dtype
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
