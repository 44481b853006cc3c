"""What one owner does: start from the public model, train an expert on text nobody else sees, pack it to share it.

These are the commands that any owner runs, each in its own process. They name the owner's folder and the public model,
nothing else.
"""

from pathlib import Path

import yaml

from flexolmo_hf.demo.settings import DemoSettings
from flexolmo_hf.demo.stages import Stage
from flexolmo_hf.demo.training import training_fields


def owner_stages(name: str, folder: Path, public_model: Path, settings: DemoSettings) -> list[Stage]:
    """Write the owner's training configuration and list the owner's commands.

    Args:
        name: The owner's expert.
        folder: The owner's folder, which holds ``data``; it receives ``start``, ``run`` and ``package``.
        public_model: The public checkpoint.
        settings: Learning rate, epochs and sizes.

    Returns:
        The stages, in order.
    """
    start, run, package, config = folder / "start", folder / "run", folder / "package", folder / "train.yaml"
    fields = training_fields(run, settings, rate=settings.expert_rate, epochs=settings.owner_epochs)
    plan = {"model_path": str(start), "data": [str(folder / "data")], "expert": name, **fields}
    config.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf8")
    commands = {
        "init": [str(public_model), str(start), "--expert", name],
        "train": ["--config", str(config)],
        "pack": [str(run), str(package), "--expert", name],
    }
    return [
        Stage(f"{name}: {verb}", "flexolmo_hf.cli", [verb, *given], folder / "logs" / f"{verb}.log", folder / "cache")
        for verb, given in commands.items()
    ]
