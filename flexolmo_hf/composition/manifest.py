"""The manifest of an expert package: what it holds, which anchor it fits, how it was trained."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexolmo_hf.composition.fingerprint import AnchorFingerprint
from flexolmo_hf.errors import FlexOlmoError, NotAPackageError
from flexolmo_hf.modeling.embedded_row import RouterProjection
from flexolmo_hf.modeling.names import check_expert_name

MANIFEST_FILE = "manifest.json"
FORMAT, VERSION = "flexolmo-expert", 1


@dataclass(frozen=True)
class Manifest:
    """What stands in ``manifest.json``.

    Attributes:
        name: The expert's name.
        anchor: The public model it was trained beside.
        tensors: Shape and dtype of each tensor in the weight file, ``{"layers.0.up_proj.weight": [[128, 32],
            "float32"]}``.
        sha256: Hash of the weight file.
        router_bias: Whether the package carries router biases.
        router_projection: How the rows it was trained with were made from text; None if they were not, or nobody said.
        form: What the matrices are, as in `FlexOlmoConfig.expert_forms`; empty for full ones.
        unfrozen: Shared weights that were trained too, of `composition.shared_weights.SHARED`; empty if nothing shared
            moved, as the method wants it.
        owner: Who answers for the expert, as they wish to be named; empty if not said.
        license: Licence of the weights, as an SPDX identifier or a name; empty if not said.
        training: How it was trained: numbers and choices, never texts, paths or names of data sets.
        evaluation: Measured results to show on the card: ``{"held-out bits per byte": 1.9}``.
    """

    name: str
    anchor: AnchorFingerprint
    tensors: dict[str, list]
    sha256: str
    router_bias: bool = False
    router_projection: RouterProjection | None = None
    form: dict[str, int] = field(default_factory=dict)
    unfrozen: list[str] = field(default_factory=list)
    owner: str = ""
    license: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into a folder."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["anchor"] = {"digest": self.anchor.digest, **content["anchor"]}
        for later in ("form", "unfrozen"):
            if not content[later]:
                # Programs that do not know them yet read the packages that have none.
                del content[later]
        text = json.dumps(content, indent=2, sort_keys=True)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read ``manifest.json`` from a folder.

        Raises:
            NotAPackageError: If it is missing, of another format or version, or incomplete.
            ConfigurationError: If the projection it speaks of is none.
        """
        try:
            content = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
        except FileNotFoundError as error:
            raise NotAPackageError(folder.name, f"there is no {MANIFEST_FILE}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise NotAPackageError(folder.name, f"{MANIFEST_FILE} is not JSON") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise NotAPackageError(folder.name, f"{MANIFEST_FILE} does not describe an expert")
        if (version := content.pop("version", None)) != VERSION:
            raise NotAPackageError(
                folder.name, f"its format is version {version}, and this program reads version {VERSION}"
            )
        try:
            anchor = content.pop("anchor")
            digest = anchor.pop("digest")
            content["router_projection"] = RouterProjection.read(content.get("router_projection"))
            manifest = cls(anchor=AnchorFingerprint(**anchor), **content)
            check_expert_name(manifest.name)
            _check_types(manifest)
            consistent = manifest.anchor.digest == digest
        except FlexOlmoError:
            raise
        except (KeyError, TypeError, AttributeError) as error:
            raise NotAPackageError(
                folder.name, f"{MANIFEST_FILE} is incomplete or has entries it should not"
            ) from error
        if not consistent:
            raise NotAPackageError(
                folder.name, f"{MANIFEST_FILE} was altered: its anchor does not match its own digest"
            )
        return manifest


def _check_types(manifest: Manifest) -> None:
    kinds: dict[type, tuple[str, ...]] = {str: ("sha256", "owner", "license"), bool: ("router_bias",)}
    kinds |= {dict: ("tensors", "form", "training", "evaluation"), list: ("unfrozen",)}
    for kind, names in kinds.items():
        for name in names:
            if not isinstance(getattr(manifest, name), kind):
                raise TypeError(name)
    if not (isinstance(manifest.anchor.settings, dict) and isinstance(manifest.anchor.tensors, dict)):
        raise TypeError("anchor")
