"""Model cards, filled from manifests alone: no path, text or data set name can get into one."""

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from flexolmo_hf.composition.manifest import Manifest
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.low_rank import describe_form
from flexolmo_hf.modeling.names import PUBLIC

CARD_FILE = "README.md"


def write_package_card(folder: Path, manifest: Manifest, *, parameters: int) -> None:
    """Write the card of an expert package.

    Args:
        folder: Where ``README.md`` goes.
        manifest: The package's manifest.
        parameters: How many parameters the expert adds to a model.
    """
    _write(
        folder,
        license=manifest.license,
        title=f"Expert {manifest.name} for FlexOlmo",
        summary=(
            "One expert of a FlexOlmo language model, trained alone by its owner beside a frozen public model."
            f"{_about_forms({manifest.name: manifest.form})}"
        ),
        is_package=True,
        experts=[_entry(manifest, index=1)],
        parameters=parameters,
        has_bias=manifest.router_bias,
        shared=", ".join(manifest.unfrozen),
        anchor_digest=manifest.anchor.digest,
    )


def write_model_card(
    folder: Path, config: FlexOlmoConfig, manifests: Mapping[str, Manifest], *, anchor_has_bias: bool
) -> None:
    """Write the card of a merged model.

    Args:
        folder: Where ``README.md`` goes.
        config: The merged model's configuration.
        manifests: Of the merged packages, by the name each expert has in the model.
        anchor_has_bias: Whether the experts that were there before have router biases.
    """
    experts = []
    for index, name in enumerate(config.expert_names):
        entry = {"router_bias": anchor_has_bias and name != PUBLIC}
        if name in manifests:
            entry = _entry(manifests[name], index=index)
        has_bias = config.router_bias and entry["router_bias"]
        experts.append({**entry, "name": name, "index": index, "router_bias": has_bias})
    _write(
        folder,
        license="",
        title=f"FlexOlmo with {', '.join(config.expert_names)}",
        summary=(
            f"A FlexOlmo language model of {config.num_experts} experts, put side by side without joint training. "
            f"Each can be left out by name.{_about_forms(config.expert_forms)}"
        ),
        is_package=False,
        experts=experts,
        load_example=str(config.expert_names[:2]).replace("'", '"'),
        has_bias=config.router_bias,
        has_forms=bool(config.expert_forms),
        shared="the shared weights" if config.shared_averaged else "",
        anchor_digest=next(iter(manifests.values())).anchor.digest,
    )


def _entry(manifest: Manifest, *, index: int) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "index": index,
        "owner": _cell(manifest.owner),
        "license": _cell(manifest.license),
        "router_bias": manifest.router_bias,
        "training": {_cell(key): _cell(_plain(value)) for key, value in manifest.training.items()},
        "evaluation": {_cell(key): _cell(value) for key, value in manifest.evaluation.items()},
    }


def _about_forms(forms: Mapping[str, Mapping[str, int]]) -> str:
    """Say which experts are not full; nothing if all are."""
    other = [f"{name} ({describe_form(form)})" for name, form in forms.items() if form]
    kinds = "Experts that are low-rank differences to the public one (rank) or have fewer neurons (width)"
    return f" {kinds}: {', '.join(other)}." if other else ""


def _plain(value: Any) -> Any:
    """Write a record within a record, such as that of a compression, as one line."""
    return ", ".join(f"{key}: {entry}" for key, entry in value.items()) if isinstance(value, dict) else value


def _cell(value: Any) -> str:
    """Make a table cell of what an owner wrote, so that it cannot end the cell, the row or the table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _write(folder: Path, *, license: str, **content: Any) -> None:
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["flexolmo", "flex_olmo", "mixture-of-experts"],
        license=license or None,
    )
    with as_file(files("flexolmo_hf") / "model_card_template.md") as template:
        card = ModelCard.from_template(data, template_path=str(template), **content)
    card.save(folder / CARD_FILE)
