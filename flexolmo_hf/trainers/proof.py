"""The proof that nothing frozen moved: hashes of every frozen tensor before and after."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from flexolmo_hf.errors import FrozenMovedError
from flexolmo_hf.modeling.files.hashing import hash_tensor
from flexolmo_hf.modeling.router import FlexOlmoRouter

PROOF_FILE = "frozen.json"


class FrozenProof:
    """Remembers every frozen tensor of a model by its hash.

    Args:
        model: The model, frozen as it will be trained.
    """

    def __init__(self, model: nn.Module):
        self.hashes = hash_tensors(frozen_tensors(model))
        self.fingerprint = fingerprint(self.hashes)
        self.sharded = False

    def check(self, model: nn.Module, *, together: bool = False) -> dict[str, Any]:
        """Compare with the model as it is now.

        Args:
            model: The model.
            together: Whether every process calls this: each compares what it holds, and all learn what all found.

        Returns:
            What ``frozen.json`` says: the fingerprint of the start, that of now, and how many tensors it is of. Of a
            sharded model, that of now is one of the processes' parts, in a field of its own.

        Raises:
            FrozenMovedError: If a frozen tensor is no longer what it was, bit for bit; in every process that calls.
        """
        now = hash_tensors({name: tensor for name, tensor in _all_tensors(model).items() if name in self.hashes})
        moved = [name for name in self.hashes if now.get(name) != self.hashes[name]]
        found = [(moved, fingerprint(self.hashes), fingerprint(now))]
        if together and dist.is_available() and dist.is_initialized():
            found = found * dist.get_world_size()
            dist.all_gather_object(found, found[0])
        if moved := sorted({name for names, _, _ in found for name in names}):
            raise FrozenMovedError(moved)
        count = {"frozen tensors": len(self.hashes)}
        if not self.sharded:
            return {"fingerprint before": self.fingerprint, "fingerprint after": fingerprint(now), **count}
        # A fingerprint of whole tensors would need them gathered.
        parts = {
            "processes": len(found),
            "before": _digest(start for _, start, _ in found),
            "after": _digest(current for _, _, current in found),
        }
        return {"fingerprint before": self.fingerprint, "compared shard by shard": parts, **count}

    def follow_sharding(self, model: nn.Module) -> None:
        """Take the parts that are here for the start once the model is sharded, before it trains or loads a checkpoint.

        The fingerprint stays that of the whole tensors.
        """
        if self.sharded:
            return
        tensors = frozen_tensors(model)
        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            self.hashes, self.sharded = hash_tensors(tensors), True


def write_proof(folder: str | os.PathLike, found: Mapping[str, Any], step: int) -> None:
    """Write ``frozen.json`` into a folder: nothing but counts and fingerprints.

    Args:
        folder: An existing folder.
        found: From `FrozenProof.check`.
        step: How many steps were taken.
    """
    partial = Path(folder) / f".{PROOF_FILE}"
    partial.write_text(json.dumps({**found, "step": step}, indent=2) + "\n", encoding="utf-8")
    partial.replace(Path(folder) / PROOF_FILE)


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that require no gradient, by name, and the buffers that are saved."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in _all_tensors(model).items() if name not in trained}


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the sha256 of each tensor's dtype, shape and bytes; of a sharded tensor, of the part that is here."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))


def fingerprint(hashes: Mapping[str, str]) -> str:
    """Return one hash for all."""
    return _digest(f"{name} {hashes[name]}" for name in sorted(hashes))


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    saved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in saved})
    for prefix, module in model.named_modules():
        if isinstance(module, FlexOlmoRouter) and (at := module.trained_position) is not None:
            # In the matrix, the place of the row that is trained on its own holds nothing of meaning meanwhile.
            for name in {f"{prefix}.weight", f"{prefix}.bias"} & tensors.keys():
                tensors[name] = _without_row(tensors[name], at)
    return tensors


def _without_row(tensor: torch.Tensor, at: int) -> torch.Tensor:
    """Take a row out; of a sharded tensor, out of the part that is here."""
    if isinstance(tensor, DTensor):
        (here,) = tensor.__create_chunk_list__()
        tensor, at = tensor.to_local(), at - here.offsets[0]
    return torch.cat([tensor[:at], tensor[at + 1 :]]) if 0 <= at < len(tensor) else tensor


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hash(tensor: torch.Tensor) -> str:
    return hash_tensor(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
