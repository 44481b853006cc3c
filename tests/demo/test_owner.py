from pathlib import Path

import pytest
import yaml

from flexolmo_hf.demo.owner import owner_stages
from flexolmo_hf.demo.settings import QUICK


@pytest.fixture
def plan(tmp_path):
    """One owner's stages and training configuration, among other folders an owner must not hear of."""
    folder = tmp_path / "owners" / "math"
    folder.mkdir(parents=True)
    stages = owner_stages("math", folder, tmp_path / "public_model", QUICK)
    return stages, yaml.safe_load((folder / "train.yaml").read_text())


def test_owner_initialises_trains_and_packs(plan):
    stages, _ = plan

    assert [stage.name for stage in stages] == ["math: init", "math: train", "math: pack"]
    assert [stage.arguments[0] for stage in stages] == ["init", "train", "pack"]


def test_owner_is_told_of_its_own_folder_and_the_public_model_only(plan, tmp_path):
    stages, config = plan
    given = [argument for stage in stages for argument in stage.arguments]
    given += [str(path) for stage in stages for path in (stage.log, stage.caches)]
    given += [str(value) for item in config.values() for value in (item if isinstance(item, list) else [item])]

    paths = [Path(text) for text in given if text.startswith(str(tmp_path))]

    assert len(paths) >= 14
    for path in paths:
        assert path.is_relative_to(tmp_path / "owners" / "math") or path == tmp_path / "public_model"


def test_numbers_stay_numbers_in_the_configuration(plan):
    _, config = plan

    assert config["learning_rate"] == QUICK.expert_rate
    assert isinstance(config["learning_rate"], float)
    assert config["expert"] == "math"
    assert config["use_cpu"] is True and config["report_to"] == "none"
