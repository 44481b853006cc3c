"""Whether an expert's tensors are what they should be: all there, of the anchor's sizes, finite, unaltered."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from flexolmo_hf.composition.manifest import Manifest
from flexolmo_hf.composition.shared_weights import PREFIX, SHARED, is_shared
from flexolmo_hf.errors import ConfigurationError, DamagedFileError, NonFiniteTensorError, NotAPackageError
from flexolmo_hf.modeling.configuration import check_expert_form
from flexolmo_hf.modeling.low_rank import tensor_shapes

WEIGHTS_FILE = "expert.safetensors"


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, list]:
    """List shape and dtype of each tensor, as a manifest does."""
    return {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for key, tensor in sorted(tensors.items())
    }


def refuse_other_than_one_expert(found: Mapping[str, list], manifest: Manifest, folder: str) -> None:
    """Refuse tensors that are not one expert's of the manifest's anchor, though the manifest lists them.

    Args:
        found: Shape and dtype of each tensor, as from `describe`.
        manifest: With the anchor's sizes.
        folder: The package's name, for the error.

    Raises:
        DamagedFileError: If a tensor is missing, too many, or of another shape or dtype.
        NotAPackageError: If the anchor has no sizes, or the expert a form that there is not.
    """
    settings = manifest.anchor.settings
    try:
        layers, hidden, inner = (
            int(settings[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NotAPackageError(folder, "its anchor has no sizes") from error
    if manifest.form:
        try:
            check_expert_form(manifest.name, manifest.form, hidden, inner)
        except ConfigurationError as error:
            raise NotAPackageError(folder, f"its form is {manifest.form}") from error
    one_layer: dict[str, list[int]] = {
        **{name: list(shape) for name, shape in tensor_shapes(hidden, inner, manifest.form).items()},
        "router.row": [hidden],
        "router.public_row": [hidden],
        **({"router.bias": [1]} if manifest.router_bias else {}),
    }
    expected = {f"layers.{layer}.{name}": shape for layer in range(layers) for name, shape in one_layer.items()}
    shapes = {name: shape for name, (shape, _) in found.items()}
    if unknown := sorted(set(manifest.unfrozen) - SHARED.keys()):
        raise NotAPackageError(folder, f"its manifest speaks of shared weights called {unknown}")
    # Their shapes are the anchor's, with which a merge compares them.
    shared = [f"{PREFIX}{key}" for key in manifest.anchor.tensors if is_shared(key, manifest.unfrozen)]
    expected |= {name: shapes.get(name, []) for name in shared}
    missing = [name for name in shared if name not in shapes]
    if wrong := sorted(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name)) + missing:
        raise DamagedFileError(WEIGHTS_FILE, f"it does not hold one expert of its anchor; see {', '.join(wrong[:4])}")
    if len({dtype for _, dtype in found.values()}) != 1:
        raise DamagedFileError(WEIGHTS_FILE, "its tensors are of several dtypes")


def refuse_non_finite(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteTensorError: Naming the first tensor that holds any.
    """
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteTensorError(key, f"expert {name!r}")


def sha256_of(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
