"""A public model, owners who each trained one expert beside it, and their packages."""

import copy
import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM
from flexolmo_hf.composition.manifest import Manifest
from flexolmo_hf.composition.verification import WEIGHTS_FILE
from tests.conftest import as_one_file, dense_model, tree  # noqa: F401 (the tests here take it from this file)

#: Architectures that every promise about merging is tried on.
VARIANTS = {
    "plain": {},
    "router bias": {"router_bias": ["math", "code", "news"]},
    "tied embeddings": {"tie_word_embeddings": True},
    "grouped queries": {"num_key_value_heads": 1},
    "attention bias": {"attention_bias": True},
}

#: What the operating system says when a disk is full.
FULL = os.strerror(errno.ENOSPC)


@dataclass
class Consortium:
    """A public model on disk, the two-expert models as their owners trained them, and the packages of those."""

    folder: Path
    anchor: Path
    models: dict[str, FlexOlmoForCausalLM]
    packages: dict[str, Path]


def consortium(folder, names=("math", "code"), *, router_bias=(), **settings):
    """Let each owner train an expert beside one public model; `router_bias` names the experts that have one."""
    place, models = _trained_once(tuple(names), tuple(router_bias), tuple(settings.items()))
    shutil.copytree(place.name, folder, dirs_exist_ok=True)
    packages = {name: folder / f"package-{name}" for name in names}
    return Consortium(folder, folder / "anchor", copy.deepcopy(models), packages)


@cache
def _trained_once(names, router_bias, settings):
    """Make what tests get copies of: a temporary folder with the anchor and the packages, and the models by name."""
    torch.manual_seed(0)
    place, models = TemporaryDirectory(), {}
    dense = dense_model(**dict(settings))
    dense.save_pretrained(Path(place.name, "anchor"))
    public_row = torch.randn(dense.config.num_hidden_layers, dense.config.hidden_size)
    for name in names:
        rows = {"public": public_row, name: torch.randn_like(public_row)}
        options = {"router_embeddings": rows, "router_bias": name in router_bias}
        models[name] = move_expert(FlexOlmoForCausalLM.from_dense(dense, expert=name, **options), name)
        pack(models[name], name, Path(place.name, f"package-{name}"))
    return place, models


def move_expert(model, name):
    """Move what training moves: the expert's matrices, and its bias where the model has biases."""
    with torch.no_grad():
        for module in model.expert_modules(name):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for mixture in model.mixtures:
            if mixture.gate.bias is not None:
                mixture.gate.bias[model.expert_position(name)] = -torch.rand(())
    return model


def pack(model, name, folder, **about):
    """Write the package of one expert."""
    ExpertPackage.from_model(model, name, **about).save_pretrained(folder)
    return folder


def logits(model, input_ids):
    """Compute logits without gradients."""
    with torch.no_grad():
        return model.eval()(input_ids).logits


def one_ulp_up(tensor):
    """Return a copy whose first number is the next one that the dtype can hold."""
    changed = tensor.clone()
    changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(torch.inf, dtype=tensor.dtype))
    return changed


def edit_weights(file, change):
    """Rewrite a weight file after `change` has worked on its tensors."""
    if file.name == "model.safetensors":
        as_one_file(file.parent)
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file, change):
    """Rewrite a JSON file after `change` has worked on its content."""
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


def forged(package, change=lambda tensors: None, **manifest):
    """Copy a package and change it so that its manifest, hash included, agrees with its weights."""
    folder = package.with_name(f"forged-{len(list(package.parent.iterdir()))}")
    shutil.copytree(package, folder)
    weights = folder / WEIGHTS_FILE
    edit_weights(weights, change)
    listed = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in load_file(weights).items()}
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    replace(Manifest.read(folder), tensors=listed, sha256=sha256, **manifest).write(folder)
    return folder


def disk_with(free):
    """Stand in for `shutil.disk_usage` on a disk with so many bytes free."""
    return lambda path: SimpleNamespace(free=free)


@pytest.fixture
def two_owners(tmp_path):
    """Owners of math and code, with their packages."""
    return consortium(tmp_path)


@pytest.fixture
def one_owner(tmp_path):
    """The owner of math, with its package."""
    return consortium(tmp_path, ["math"])
