"""What tuning a router changed, and taking it back.

Tuning moves all rows together: each tuned row depends on the proxies of every owner, so the part of one cannot be taken
out of it. The rows of before are kept beside the tuned ones, and go back into their place all at once.

Shape letters: H hidden, L layers, E experts.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity
from transformers import Olmo2Config

from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.composition.card import CARD_FILE
from flexolmo_hf.composition.reader import CheckpointReader, non_weight_files
from flexolmo_hf.errors import ConfigurationError, DamagedFileError, NotFlexOlmoError, UnknownExpertError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.files.layout import write_weights
from flexolmo_hf.modeling.files.router_base import (
    BASE_RECORD,
    BASE_WEIGHTS,
    RouterBase,
    current_router,
    read_router_base,
)


@dataclass(frozen=True)
class TunedExpert:
    """One expert's part of the router, before and after tuning.

    Attributes:
        name: The expert.
        cosine: Between the row before and after, a mean over layers; None if it was not tuned.
        bias: The bias ``min(b, 0)`` now, a mean over layers; None without biases.
        base_bias: The same before tuning; None without biases, or if it was not tuned.
        proxies: Whether its owner's proxies were used.
    """

    name: str
    cosine: float | None = None
    bias: float | None = None
    base_bias: float | None = None
    proxies: bool = False


@dataclass(frozen=True)
class RouterSummary:
    """A checkpoint's router.

    Attributes:
        experts: One entry per expert, in checkpoint order.
        tuned: Whether the checkpoint has the rows of before tuning beside it.
        proxies: The experts whose owners' proxies were used, whether they are in the checkpoint or not.
        steps: Steps of tuning.
        tokens: Tokens of tuning.
    """

    experts: list[TunedExpert]
    tuned: bool = False
    proxies: list[str] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0


def complete_base(model: ExpertSets) -> RouterBase:
    """Return the router of a model as it was before any tuning.

    A model that was tuned before keeps the rows of before the first time; experts that came since add theirs.
    """
    now, former = current_router(model), model.router_base
    return now if former is None else replace(former, rows=now.rows, biases=now.biases).joined_with(former)


def refuse_tuned_row(model: ExpertSets, names: Iterable[str]) -> None:
    """Refuse to hand on router rows in which the proxies of several owners are mixed.

    Args:
        model: The model they are in.
        names: Whose rows.

    Raises:
        ConfigurationError: If one of them was tuned.
    """
    base = model.router_base
    if base is None:
        return
    now = current_router(model)
    for name in names:
        tuned = name in base.rows and not torch.equal(base.rows[name], now.rows[name])
        if tuned or (name in base.biases and not torch.equal(base.biases[name], now.biases[name])):
            raise ConfigurationError(
                f"The router row of {name!r} was tuned together with all others, on proxies for {base.proxies}: "
                "it fits this mixture alone, and carries what belongs to others.",
                "Roll the router back first: rollback_router(...) or `flexolmo router CHECKPOINT OUT --rollback`.",
            )


def copy_router_base(source: Path, target: Path) -> None:
    """Copy the rows of before tuning from one checkpoint to another that has its rows, where there are any."""
    for name in (BASE_WEIGHTS, BASE_RECORD):
        if (source / BASE_RECORD).is_file():
            shutil.copyfile(source / name, target / name)


def describe_router(checkpoint: str | os.PathLike) -> RouterSummary:
    """Describe a checkpoint's router, and what tuning did to it.

    Args:
        checkpoint: A FlexOlmo checkpoint: folder or Hub repository.

    Raises:
        NotFlexOlmoError: If it is of another architecture, a dense OLMo-2 model included.
        DamagedFileError, IncompleteCheckpointError, UnexpectedTensorError: If its files cannot be trusted.
    """
    reader = _opened(checkpoint)
    base = _checked_base(reader)
    rows_LEH, biases_LE = _stacked(reader)
    experts = []
    for index, name in enumerate(reader.config.expert_names):
        entry = TunedExpert(name, bias=None if biases_LE is None else _mean_bias(biases_LE[:, index]))
        if base is not None and name in base.rows:
            cosines_L = cosine_similarity(base.rows[name].float(), rows_LEH[:, index].float(), dim=-1)
            entry = replace(
                entry,
                cosine=cosines_L.mean().item(),
                base_bias=_mean_bias(base.biases[name]) if name in base.biases else None,
                proxies=name in base.proxies,
            )
        experts.append(entry)
    if base is None:
        return RouterSummary(experts)
    return RouterSummary(experts, True, list(base.proxies), base.steps, base.tokens)


def rollback_router(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    owner: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a checkpoint whose router is what it was before tuning, bit for bit.

    All rows and biases go back, also where one owner asks for it: each tuned row depends on the proxies of all. To
    leave an owner out for good, roll back, and tune again without their proxies.

    Args:
        checkpoint: A tuned FlexOlmo checkpoint: folder or Hub repository.
        output_dir: A folder that does not exist yet or is empty.
        owner: The expert whose owner's proxies shall have no influence; None whoever's.
        max_shard_size: Largest weight file; each expert has files of its own.

    Returns:
        `output_dir` as a path. Everything but the router is the checkpoint's; nothing of the tuned rows is left.

    Raises:
        ConfigurationError: If the router was never tuned, or not on proxies of this owner.
        UnknownExpertError: If `owner` is neither an expert nor among those whose proxies were used.
        NotFlexOlmoError: If the checkpoint is of another architecture, a dense OLMo-2 model included.
        DamagedFileError, IncompleteCheckpointError, UnexpectedTensorError, NonFiniteTensorError: If its files cannot be
            trusted.
        OutputFolderNotEmptyError, OutputPlaceError, NoSpaceError: If the output has no place.
    """
    refuse_nonempty(output_dir)
    reader = _opened(checkpoint)
    base = _checked_base(reader)
    if base is None:
        raise ConfigurationError(
            "There is nothing to roll back: no router from before a tuning lies beside this checkpoint.",
            f"A tuned checkpoint has {BASE_WEIGHTS} and {BASE_RECORD}; give the one the tuning wrote.",
        )
    if owner is not None:
        _refuse_uninvolved(owner, base, reader)
    tensors = {name: reader.tensor(name) for name in reader.file_of}
    tensors.update(_former_router(reader, base))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_folder(output_dir, needed_bytes=size) as partial:
        write_weights(partial, tensors, reader.config.expert_names, max_shard_size, whose="the checkpoint")
        active = reader.active_experts
        reader.config.active_experts = None if active == reader.config.expert_names else active
        reader.config.save_pretrained(partial)
        card = reader.folder / CARD_FILE
        for file in [*non_weight_files(reader.folder), *([card] if card.is_file() else [])]:
            shutil.copyfile(file, partial / file.name)
    return Path(output_dir)


def _opened(checkpoint: str | os.PathLike) -> CheckpointReader:
    reader = CheckpointReader(checkpoint)
    if reader.is_dense:
        raise NotFlexOlmoError(Olmo2Config.model_type)
    return reader


def _checked_base(reader: CheckpointReader) -> RouterBase | None:
    base, config = read_router_base(reader.folder), reader.config
    if base is None:
        return None
    shape = (config.num_hidden_layers, config.hidden_size)
    fits = all(tuple(row.shape) == shape for row in base.rows.values())
    fits &= all(tuple(bias.shape) == shape[:1] for bias in base.biases.values())
    if not fits or not set(base.rows) <= set(config.expert_names):
        raise DamagedFileError(BASE_WEIGHTS, "it does not fit the router of the checkpoint beside it")
    return base


def _refuse_uninvolved(owner: str, base: RouterBase, reader: CheckpointReader) -> None:
    if owner in base.proxies:
        return
    if owner not in reader.config.expert_names:
        raise UnknownExpertError(owner, sorted({*reader.config.expert_names, *base.proxies}))
    raise ConfigurationError(
        f"No proxies for {owner!r} were used, so the tuned rows hold nothing of that owner: "
        f"they were tuned on proxies for {base.proxies}.",
        "Leave the owner out to roll the tuning back all the same.",
    )


def _former_router(reader: CheckpointReader, base: RouterBase) -> Iterator[tuple[str, torch.Tensor]]:
    names = reader.config.expert_names
    for layer in range(reader.config.num_hidden_layers):
        gate = f"model.layers.{layer}.mlp.gate"
        for kind, former in (("weight", base.rows), ("bias", base.biases)):
            # Merged since, a checkpoint may have left its biases behind.
            if kind == "bias" and not reader.config.router_bias:
                continue
            tensor = reader.tensor(f"{gate}.{kind}").clone()
            for name, values in former.items():
                tensor[names.index(name)] = values[layer].to(tensor.dtype)
            yield f"{gate}.{kind}", tensor


def _stacked(reader: CheckpointReader) -> tuple[torch.Tensor, torch.Tensor | None]:
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(reader.config.num_hidden_layers)]
    rows_LEH = torch.stack([reader.tensor(f"{gate}.weight") for gate in gates])
    if not reader.config.router_bias:
        return rows_LEH, None
    return rows_LEH, torch.stack([reader.tensor(f"{gate}.bias") for gate in gates])


def _mean_bias(biases_L: torch.Tensor) -> float:
    return biases_L.float().clamp(max=0).mean().item()
