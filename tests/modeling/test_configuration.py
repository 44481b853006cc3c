"""Settings that contradict each other are refused when they are written down."""

import pytest
from transformers import AutoConfig

from flexolmo_hf import FlexOlmoConfig
from flexolmo_hf.errors import ConfigurationError, DuplicateExpertError, InvalidExpertNameError, UnknownExpertError
from tests.conftest import TINY


def test_every_expert_is_used_per_token_unless_told_otherwise():
    assert FlexOlmoConfig(num_experts=3).num_experts_per_tok == 3
    assert FlexOlmoConfig(num_experts=3, num_experts_per_tok=1).num_experts_per_tok == 1


def test_auto_config_gives_this_class(tmp_path):
    FlexOlmoConfig(**TINY, num_experts=2, expert_names=["public", "math"]).save_pretrained(tmp_path)

    config = AutoConfig.from_pretrained(tmp_path, active_experts=["math"])
    assert type(config) is FlexOlmoConfig
    assert config.active_experts == ["math"]
    assert config.loaded_indices == [1]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_experts": 3, "expert_names": ["public", "math"]}, ConfigurationError),
        ({"num_experts": 2, "num_experts_per_tok": -1}, ConfigurationError),
        ({"num_experts": 2, "expert_names": ["public", "Public"]}, DuplicateExpertError),
        ({"num_experts": 2, "expert_names": ["public", "a/b"]}, InvalidExpertNameError),
        ({"num_experts": 2, "active_experts": ["math"]}, UnknownExpertError),
    ],
)
def test_contradictions_are_refused(settings, error):
    with pytest.raises(error):
        FlexOlmoConfig(**TINY, **settings)


def test_the_tensor_parallel_plan_names_modules_that_exist():
    plan = FlexOlmoConfig.base_model_tp_plan

    assert {key.rsplit(".", 1)[1] for key in plan if ".mlp." in key} == {"gate_proj", "up_proj", "down_proj"}
