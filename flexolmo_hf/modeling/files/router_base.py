"""The router as it was before it was tuned, in two files beside the checkpoint, so that tuning can be taken back.

Upstream's loaders ignore both: weights are read from the files that the index lists.

Shape letters: H hidden, L layers.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flexolmo_hf.errors import DamagedFileError
from flexolmo_hf.modeling.expert_sets import ExpertSets

BASE_WEIGHTS, BASE_RECORD = "router_base.safetensors", "router_base.json"
FORMAT, VERSION = "flexolmo-router-base", 1


@dataclass(frozen=True)
class RouterBase:
    """Rows and biases as they were before tuning, and what tuned them since.

    Attributes:
        rows: The router rows ``(L, H)`` by expert name.
        biases: The biases ``(L,)`` by expert name; empty without biases.
        proxies: The experts whose owners' proxy data was used; names of experts, none of data.
        steps: Optimizer steps since.
        tokens: Tokens trained on since.
        training: How the router was tuned: numbers and choices.
    """

    rows: Mapping[str, torch.Tensor]
    biases: Mapping[str, torch.Tensor]
    proxies: list[str] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    training: dict[str, Any] = field(default_factory=dict)

    def without(self, name: str) -> "RouterBase":
        """Forget an expert whose name may now mean other weights."""
        kept = [{key: value for key, value in part.items() if key != name} for part in (self.rows, self.biases)]
        return replace(self, rows=kept[0], biases=kept[1])

    def joined_with(self, other: "RouterBase | None") -> "RouterBase":
        """Add what another part of the same router knows."""
        if other is None:
            return self
        return replace(self, rows={**self.rows, **other.rows}, biases={**self.biases, **other.biases})


def current_router(model: ExpertSets) -> RouterBase:
    """Copy rows and biases of the experts in memory, as they are stored."""
    with torch.no_grad():
        states = [mixture.gate.state_dict() for mixture in model.mixtures]
    weight_LEH = torch.stack([state["weight"].detach().cpu() for state in states])
    names = model.expert_names
    rows = {name: weight_LEH[:, at].clone() for at, name in enumerate(names)}
    if not model.config.router_bias:
        return RouterBase(rows, {})
    bias_LE = torch.stack([state["bias"].detach().cpu() for state in states])
    return RouterBase(rows, {name: bias_LE[:, at].clone() for at, name in enumerate(names)})


def write_router_base(folder: str | os.PathLike, base: RouterBase, experts: Iterable[str]) -> None:
    """Write what is known of some experts; of files that are there already, nothing is left.

    Args:
        folder: The checkpoint's folder.
        base: The router before it was tuned.
        experts: The experts of the checkpoint.
    """
    kept = [name for name in experts if name in base.rows]
    tensors = {f"{name}.rows": base.rows[name].contiguous() for name in kept}
    tensors |= {f"{name}.biases": base.biases[name].contiguous() for name in kept if name in base.biases}
    place = Path(folder)
    # The record goes first and comes last: without it, the weights count for nothing.
    remove_router_base(place)
    save_file(tensors, place / BASE_WEIGHTS, metadata={"format": "pt"})
    record = {
        "format": FORMAT,
        "version": VERSION,
        "experts": kept,
        "proxies": list(base.proxies),
        "steps": base.steps,
        "tokens": base.tokens,
        "training": base.training,
        "sha256": hashlib.sha256((place / BASE_WEIGHTS).read_bytes()).hexdigest(),
    }
    partial = place / f".{BASE_RECORD}"
    partial.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    partial.replace(place / BASE_RECORD)


def remove_router_base(folder: str | os.PathLike) -> None:
    """Remove both files; where there are none, do nothing."""
    for name in (BASE_RECORD, BASE_WEIGHTS):
        (Path(folder) / name).unlink(missing_ok=True)


def read_router_base(folder: str | os.PathLike, experts: Iterable[str] | None = None) -> RouterBase | None:
    """Read what lies beside a checkpoint.

    Args:
        folder: The checkpoint's folder.
        experts: Whose rows to read; None for all. Those of others are not read from the file.

    Returns:
        The router before it was tuned; None if it never was.

    Raises:
        DamagedFileError: If a file is missing, of another format or version, or not the one the record speaks of.
    """
    place = Path(folder)
    if not (place / BASE_RECORD).is_file():
        return None
    record = _read_record(place / BASE_RECORD)
    names = record["experts"] if experts is None else [name for name in experts if name in record["experts"]]
    try:
        # Only whoever reads all of it compares the hash, which takes every byte.
        if experts is None and hashlib.sha256((place / BASE_WEIGHTS).read_bytes()).hexdigest() != record["sha256"]:
            raise DamagedFileError(BASE_WEIGHTS, "its content is not what the record beside it describes")
        with safe_open(place / BASE_WEIGHTS, framework="pt") as file:
            keys = set(file.keys())
            rows = {name: file.get_tensor(f"{name}.rows") for name in names}
            biases = {name: file.get_tensor(f"{name}.biases") for name in names if f"{name}.biases" in keys}
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(BASE_WEIGHTS, f"it is missing, truncated or not what {BASE_RECORD} describes") from error
    return RouterBase(rows, biases, record["proxies"], record["steps"], record["tokens"], record["training"])


def _read_record(file: Path) -> dict[str, Any]:
    kinds = {"experts": list, "proxies": list, "steps": int, "tokens": int, "training": dict, "sha256": str}
    try:
        record = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(BASE_RECORD, "it is not JSON") from error
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise DamagedFileError(BASE_RECORD, f"it is no {FORMAT!r} of version {VERSION}")
    if wrong := [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]:
        raise DamagedFileError(BASE_RECORD, f"it does not tell {', '.join(wrong)}")
    return record
