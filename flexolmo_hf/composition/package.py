"""An expert package: one expert as a folder that can be shared, without the public model it was trained beside."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import save_file

from flexolmo_hf._folder import new_folder
from flexolmo_hf.composition.card import CARD_FILE, write_package_card
from flexolmo_hf.composition.fingerprint import fingerprint_anchor
from flexolmo_hf.composition.manifest import MANIFEST_FILE, Manifest
from flexolmo_hf.composition.reader import open_safetensors
from flexolmo_hf.composition.router_base import refuse_tuned_row
from flexolmo_hf.composition.shared_weights import PREFIX, is_shared
from flexolmo_hf.composition.training_record import PostTraining
from flexolmo_hf.composition.verification import (
    WEIGHTS_FILE,
    describe,
    refuse_non_finite,
    refuse_other_than_one_expert,
    sha256_of,
)
from flexolmo_hf.errors import ConfigurationError, DamagedFileError, NotAPackageError
from flexolmo_hf.modeling.embedded_row import RouterProjection
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.low_rank import tensor_shapes
from flexolmo_hf.modeling.names import PUBLIC

FILES = [WEIGHTS_FILE, MANIFEST_FILE, CARD_FILE]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ExpertPackage:
    """One expert's feed-forward networks, router rows and biases, with a manifest.

    The tensors are called ``layers.N.{gate,up,down}_proj.weight`` as in the model (``layers.N.up_proj.A.weight`` and
    ``.B.weight`` for the factors of a low-rank expert), ``layers.N.router.row`` ``(H,)``,
    ``layers.N.router.bias`` ``(1,)`` where the model has biases, and ``layers.N.router.public_row`` ``(H,)``: the
    frozen row it was trained against, which belongs to the anchor and lets a dense OLMo-2 checkpoint serve as one.

    Attributes:
        manifest: What the package holds and which anchor it fits.
        tensors: The tensors by name; mapped from the file for a package that was read.
    """

    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]

    @property
    def name(self) -> str:
        """The expert's name."""
        return self.manifest.name

    @classmethod
    def from_model(
        cls,
        model: ExpertSets,
        name: str,
        *,
        training: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
        post_training: PostTraining | None = None,
        owner: str = "",
        license: str = "",
    ) -> "ExpertPackage":
        """Take one expert out of a model.

        Args:
            model: A model that holds the expert and the public one.
            name: Which expert.
            training: How it was trained, for the manifest and the card: numbers and choices, nothing private.
            evaluation: Measured results for the card.
            post_training: Which shared weights were trained too, and the anchor they started from, as the trainer's
                `post_training` returns it. They go into the package.
            owner: Who answers for the expert.
            license: Licence of the weights.

        Raises:
            UnknownExpertError: If the model has no such expert.
            ExpertNotLoadedError: If the expert or the public one was left out at load time.
            ConfigurationError: If it is the public expert, the public expert is not the checkpoint's first, the weights
                are offloaded, or the router was tuned: roll it back first.
            NonFiniteTensorError: If a weight is NaN or infinite.
        """
        position, public = model.expert_position(name), model.expert_position(PUBLIC)
        if name == PUBLIC or model.config.expert_names[0] != PUBLIC:
            raise ConfigurationError(
                "A package holds an expert that was trained beside the public one, which the anchor has as its first.",
                f"Choose another expert than {PUBLIC!r} from a checkpoint whose first expert is {PUBLIC!r}.",
            )
        if any(parameter.is_meta for module in model.expert_modules(name) for parameter in module.parameters()):
            raise ConfigurationError(
                f"The weights of {name!r} are offloaded, so they cannot be read from the model.",
                "Load the model without a device_map that offloads; leave out experts to save memory.",
            )
        refuse_tuned_row(model, (name, PUBLIC))
        config, tensors, public_rows = model.config, {}, {}
        form = dict(config.expert_forms.get(name, {}))
        names = tensor_shapes(config.hidden_size, config.intermediate_size, form)
        for layer, (mixture, expert) in enumerate(zip(model.mixtures, model.expert_modules(name), strict=True)):
            weight, bias = mixture.gate.rows()
            at = f"layers.{layer}"
            for tensor in names:
                tensors[f"{at}.{tensor}"] = expert.get_parameter(tensor).detach()
            tensors[f"{at}.router.row"] = weight[position].detach().clone()
            if bias is not None:
                tensors[f"{at}.router.bias"] = bias[position : position + 1].detach().clone()
            public_rows[layer] = tensors[f"{at}.router.public_row"] = weight[public].detach().clone()
        state = model.state_dict()  # type: ignore[attr-defined]
        anchor = fingerprint_anchor(model.config, state, state.__getitem__, public_rows)
        if post_training is not None:
            anchor = post_training.anchor
            moved = [key for key in anchor.tensors if is_shared(key, post_training.unfrozen)]
            tensors |= {f"{PREFIX}{key}": state[key].detach().clone() for key in moved}
        refuse_non_finite(tensors, name)
        manifest = Manifest(
            name=name,
            anchor=anchor,
            tensors=describe(tensors),
            sha256="",
            router_bias=model.config.router_bias,
            router_projection=RouterProjection.read(model.config.router_projection),
            form=form,
            unfrozen=[] if post_training is None else list(post_training.unfrozen),
            owner=owner,
            license=license,
            training=dict(training or {}),
            evaluation=dict(evaluation or {}),
        )
        return cls(manifest, tensors)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the package: ``expert.safetensors``, ``manifest.json`` and ``README.md``.

        Raises:
            OutputFolderNotEmptyError: If the folder holds anything.
            NoSpaceError: If the disk is too small.
            NonFiniteTensorError: If a weight has become NaN or infinite.
        """
        # The tensors may be a live model's, and may have moved since they were taken.
        refuse_non_finite(self.tensors, self.name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        with new_folder(folder, needed_bytes=size) as partial:
            contiguous = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
            save_file(contiguous, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            manifest = replace(self.manifest, sha256=sha256_of(partial / WEIGHTS_FILE))
            manifest.write(partial)
            write_package_card(partial, manifest, parameters=self.parameters)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Publish the package as a model repository on the Hub: its three files and nothing else.

        Args:
            repo_id: The repository, made if it does not exist.
            private: Whether a new repository is private; making it public is a step of its own.
            token: As in `huggingface_hub`.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "package")
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=Path(scratch) / "package",
                allow_patterns=FILES,
                commit_message=f"Upload expert {self.name}",
            )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "ExpertPackage":
        """Read a package and check that it is whole: hash, names, shapes, dtypes and finite values.

        Args:
            folder: A folder; or, if there is none of that name, a Hub repository ``owner/name``.

        Raises:
            NotAPackageError: If the folder is no package.
            DamagedFileError: If the weight file is truncated or not the one the manifest speaks of.
            NonFiniteTensorError: If a weight is NaN or infinite.
        """
        path = _local_package(folder)
        manifest = Manifest.read(path)
        with open_safetensors(path / WEIGHTS_FILE) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        if sha256_of(path / WEIGHTS_FILE) != manifest.sha256:
            raise DamagedFileError(WEIGHTS_FILE, "its content is not what the manifest describes (sha256 differs)")
        found = describe(tensors)
        if found != manifest.tensors:
            raise DamagedFileError(WEIGHTS_FILE, "its tensors are not those the manifest lists")
        refuse_other_than_one_expert(found, manifest, path.name)
        refuse_non_finite(tensors, manifest.name)
        return cls(manifest, tensors)

    def compress(
        self, rank: int | None = None, *, energy: float | None = None, anchor: str | os.PathLike
    ) -> "ExpertPackage":
        """Return the expert as a low-rank difference to the public one; see `composition.compress.compress`."""
        from flexolmo_hf.composition.compress import compress

        return compress(self, anchor=anchor, rank=rank, energy=energy)

    def narrow(self, width: int) -> "ExpertPackage":
        """Return the expert with fewer neurons; see `composition.compress.narrow`."""
        from flexolmo_hf.composition.compress import narrow

        return narrow(self, width)

    def materialise(self, anchor: str | os.PathLike | None = None) -> "ExpertPackage":
        """Return the expert with full matrices, whatever its form; see `composition.compress.materialise`."""
        from flexolmo_hf.composition.compress import materialise

        return materialise(self, anchor)

    @property
    def parameters(self) -> int:
        """How many numbers the expert adds to a model: matrices, rows and biases."""
        shared = (f"{PREFIX}", "public_row")
        own = {key: t for key, t in self.tensors.items() if not (key.startswith(shared[0]) or key.endswith(shared[1]))}
        return sum(tensor.numel() for tensor in own.values())

    def public_rows(self) -> dict[int, torch.Tensor]:
        """Return the public router row ``(H,)`` by layer."""
        return dict(self._router_tensors("public_row"))

    def rows(self) -> dict[int, torch.Tensor]:
        """Return the expert's router row ``(H,)`` by layer."""
        return dict(self._router_tensors("row"))

    def biases(self) -> dict[int, torch.Tensor]:
        """Return the expert's router bias ``(1,)`` by layer; empty without biases."""
        return dict(self._router_tensors("bias"))

    def _router_tensors(self, kind: str) -> Iterator[tuple[int, torch.Tensor]]:
        for key, tensor in self.tensors.items():
            if key.endswith(f".router.{kind}"):
                yield int(key.split(".")[1]), tensor


def _local_package(folder: str | os.PathLike) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if not _REPOSITORY.fullmatch(str(folder)):
        raise NotAPackageError(path.name, "there is no such folder")
    try:
        return Path(snapshot_download(str(folder), allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise NotAPackageError(path.name, "there is neither such a folder nor a Hub repository within reach") from error
