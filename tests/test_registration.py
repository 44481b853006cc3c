"""Importing registers, and can be undone."""

import subprocess
import sys

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.flex_olmo import FlexOlmoConfig as StockConfig
from transformers.models.flex_olmo import FlexOlmoForCausalLM as StockModel

import flexolmo_hf
from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from tests.conftest import stock_model


def test_unregistering_gives_the_type_back_and_registering_takes_it_again(tmp_path):
    stock_model().save_pretrained(tmp_path)
    try:
        flexolmo_hf.unregister()
        assert type(AutoConfig.from_pretrained(tmp_path)) is StockConfig
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is StockModel
    finally:
        flexolmo_hf.register()
    assert type(AutoConfig.from_pretrained(tmp_path)) is FlexOlmoConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is FlexOlmoForCausalLM


def test_importing_is_light():
    heavy = ["trl", "peft", "datasets", "opacus", "gradio"]
    code = f"import sys, flexolmo_hf; print([name for name in {heavy} if name in sys.modules])"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_public_names_are_sorted_documented_and_importable():
    assert flexolmo_hf.__all__ == sorted(flexolmo_hf.__all__)
    for name in flexolmo_hf.__all__:
        assert getattr(flexolmo_hf, name).__doc__, name
