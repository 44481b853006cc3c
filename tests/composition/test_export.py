"""An exported checkpoint is what stock transformers computes, and the experts left out are nowhere in it."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig
from transformers.models.flex_olmo import FlexOlmoConfig as StockConfig
from transformers.models.flex_olmo import FlexOlmoForCausalLM as StockModel

from flexolmo_hf import FlexOlmoForCausalLM, export_checkpoint
from flexolmo_hf.errors import (
    ConfigurationError,
    DuplicateExpertError,
    EmptyExpertSetError,
    ExpertTypeError,
    NonFiniteTensorError,
    NoSpaceError,
    NotFlexOlmoError,
    OutputFolderNotEmptyError,
    UnknownExpertError,
)
from tests.composition.conftest import disk_with, logits, tree
from tests.conftest import as_one_file, dense_model
from tests.modeling.test_expert_sets import NAMES, named_model, poison

EVERY_PATH = pytest.mark.parametrize("per_token", [4, 2, 1], ids=["all of 4", "2 of 4", "1 of 4"])
SETS = pytest.mark.parametrize("kept", [["public"], ["public", "math"], ["math", "news"], NAMES], ids="+".join)
#: A number that no weight has by chance, to be found again in files.
MARK = 1234.5678


def saved(folder, per_token=4, **changes):
    model = named_model(per_token, **changes)
    model.save_pretrained(folder / "all")
    return model


def stock(folder):
    """Load as stock software does, and refuse gaps that it would fill with random numbers."""
    model, report = StockModel.from_pretrained(folder, output_loading_info=True)
    assert [report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [set(), set(), set()]
    return model


@SETS
@EVERY_PATH
def test_stock_transformers_computes_what_this_package_computes_with_the_same_set(tmp_path, input_ids, per_token, kept):
    model = saved(tmp_path, per_token)
    exported = stock(export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=kept))
    model.set_active_experts(kept)

    assert exported.config.num_experts == len(kept)
    assert exported.config.num_experts_per_tok == min(per_token, len(kept))
    torch.testing.assert_close(logits(exported, input_ids), logits(model, input_ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"tie_word_embeddings": True}, {"norm_topk_prob": True}, {"num_key_value_heads": 1}, {"rms_norm_eps": 1e-2}],
    ids=str,
)
def test_settings_go_along(tmp_path, input_ids, settings):
    kept = ["public", "code", "news"]
    model = saved(tmp_path, per_token=2, **settings)
    exported = stock(export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=kept))
    model.set_active_experts(kept)

    torch.testing.assert_close(logits(exported, input_ids), logits(model, input_ids), rtol=0, atol=1e-5)


@SETS
@EVERY_PATH
def test_stock_transformers_writes_the_same_tokens(tmp_path, input_ids, per_token, kept):
    model = saved(tmp_path, per_token)
    exported = stock(export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=kept))
    model.set_active_experts(kept)
    tokens = [m.generate(input_ids, max_new_tokens=8, do_sample=False) for m in (exported, model)]

    assert torch.equal(*tokens)


def test_each_set_gives_another_model(tmp_path, input_ids):
    saved(tmp_path)
    sets = [["public"], ["public", "math"], ["math", "news"], NAMES]
    results = [
        logits(stock(export_checkpoint(tmp_path / "all", tmp_path / "+".join(kept), active_experts=kept)), input_ids)
        for kept in sets
    ]

    assert all((one - other).abs().max() > 1e-2 for i, one in enumerate(results) for other in results[:i])


def test_of_an_expert_left_out_no_number_and_no_name_is_in_any_file(tmp_path):
    model = named_model()
    with torch.no_grad():
        for mixture, expert in zip(model.mixtures, model.expert_modules("code"), strict=True):
            mixture.gate.weight[2] = MARK
            for parameter in expert.parameters():
                parameter.fill_(MARK)
    model.save_pretrained(tmp_path / "all")
    export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=["public", "math", "news"])
    mark = struct.pack("<f", MARK)

    assert mark in as_one_file(tmp_path / "all").read_bytes()
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert [name for name, content in written.items() if mark in content or b"code" in content] == []


def test_a_ruined_expert_can_be_left_out_but_not_kept(tmp_path, refused):
    model = named_model()
    poison(model, ["code"])
    model.save_pretrained(tmp_path / "all")

    with refused(NonFiniteTensorError, "NaN"):
        export_checkpoint(tmp_path / "all", tmp_path / "out")
    out = export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts="public,math,news")
    assert all(t.isfinite().all() for file in out.glob("*.safetensors") for t in load_file(file).values())


def test_the_files_hold_the_tensors_of_the_checkpoint_bit_for_bit(tmp_path):
    model = saved(tmp_path).bfloat16()
    model.save_pretrained(tmp_path / "half")
    out = export_checkpoint(tmp_path / "half", tmp_path / "out", active_experts=["math", "news"])
    written = {key: t for file in out.glob("*.safetensors") for key, t in load_file(file).items()}
    state = FlexOlmoForCausalLM.from_pretrained(tmp_path / "half", active_experts=["math", "news"]).state_dict()
    expected = {
        key.replace("experts.1.", "experts.0.").replace("experts.3.", "experts.1."): state[key] for key in state
    }

    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) and written[key].dtype == torch.bfloat16 for key in written)


def test_the_configuration_is_a_stock_one_with_the_names_kept(tmp_path):
    saved(tmp_path)
    out = export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts="news+public")
    settings = json.loads((out / "config.json").read_text())

    assert settings.keys() - StockConfig().to_dict().keys() == {"expert_names"}
    assert settings["architectures"] == ["FlexOlmoForCausalLM"]
    assert settings["dtype"] == "float32"
    assert FlexOlmoForCausalLM.from_pretrained(out).expert_names == ["public", "news"]


def test_an_exported_checkpoint_can_be_loaded_in_part_again(tmp_path, input_ids):
    model = saved(tmp_path)
    out = export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=["public", "code", "news"])
    model.set_active_experts(["public", "news"])
    again = FlexOlmoForCausalLM.from_pretrained(out, active_experts=["public", "news"])

    assert torch.equal(logits(again, input_ids), logits(model, input_ids))


@pytest.mark.parametrize(
    "chosen", ["public,math", "public+math", " math , public", ["math", "public"], ("public", "math")], ids=repr
)
def test_a_set_may_be_written_in_any_way_and_order(tmp_path, chosen):
    saved(tmp_path)
    out = export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=chosen)

    assert StockConfig.from_pretrained(out).expert_names == ["public", "math"]


def test_without_a_choice_an_expert_that_was_switched_off_does_not_come_back(tmp_path):
    model = named_model()
    model.set_active_experts(["public", "news"])
    model.save_pretrained(tmp_path / "all")

    out = export_checkpoint(tmp_path / "all", tmp_path / "default")
    assert StockConfig.from_pretrained(out).expert_names == ["public", "news"]
    out = export_checkpoint(tmp_path / "all", tmp_path / "chosen", active_experts="public,math")
    assert StockConfig.from_pretrained(out).expert_names == ["public", "math"]


def test_without_biases_stock_transformers_computes_the_model_with_biases_of_zero(tmp_path, input_ids):
    model = named_model(router_bias=True)
    for mixture in model.mixtures:
        mixture.gate.bias.data[1:] = -2.0
    model.save_pretrained(tmp_path / "all")
    before = logits(model, input_ids)
    out = export_checkpoint(tmp_path / "all", tmp_path / "out", drop_bias=True)
    with torch.no_grad():
        for mixture in model.mixtures:
            mixture.gate.bias.zero_()

    torch.testing.assert_close(logits(stock(out), input_ids), logits(model, input_ids), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(stock(out), input_ids), before, atol=1e-3)


def test_biases_are_dropped_only_knowingly(tmp_path, refused):
    model = named_model(router_bias=True)
    for mixture in model.mixtures:
        mixture.gate.bias.data[:] = torch.tensor([0.0, -1.5, 0.25, -0.5])
    model.save_pretrained(tmp_path / "all")

    said = ["public 0.000, math -1.500, code 0.000", "outputs change", "drop_bias=True (--drop-bias)"]
    with refused(ConfigurationError, *said):
        export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=["public", "math", "code"])


def test_the_tokenizer_and_generation_settings_go_along(tmp_path, tokenizer):
    saved(tmp_path)
    tokenizer.save_pretrained(tmp_path / "all")
    GenerationConfig(max_new_tokens=7).save_pretrained(tmp_path / "all")
    (tmp_path / "all/notes.txt").write_text("mine")
    out = export_checkpoint(tmp_path / "all", tmp_path / "out")

    assert AutoTokenizer.from_pretrained(out)("tea")["input_ids"] == tokenizer("tea")["input_ids"]
    assert GenerationConfig.from_pretrained(out).max_new_tokens == 7
    assert not (out / "notes.txt").exists()


def test_large_experts_are_split_into_files_of_the_size_asked_for(tmp_path, input_ids):
    model = saved(tmp_path)
    out = export_checkpoint(tmp_path / "all", tmp_path / "out", max_shard_size="20KB")

    assert len(list(out.glob("model-expert-math-*-of-00006.safetensors"))) == 6
    torch.testing.assert_close(logits(stock(out), input_ids), logits(model, input_ids), rtol=0, atol=1e-5)


def test_the_checkpoint_itself_stays_as_it_was(tmp_path):
    saved(tmp_path)
    before = tree(tmp_path / "all")
    export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=["public"])

    assert tree(tmp_path / "all") == before


REFUSED = {
    "unknown": ("public,maht", UnknownExpertError, "Did you mean 'math'"),
    "duplicate": ("public,math,math", DuplicateExpertError, "appears twice"),
    "empty": ([], EmptyExpertSetError, "needs at least one"),
    "empty text": (" ", EmptyExpertSetError, "needs at least one"),
    "a stray comma": ("public,", UnknownExpertError, "Unknown expert ''"),
    "an index": ([1], ExpertTypeError, "Expert 1 is called 'math'"),
}


@pytest.mark.parametrize(("chosen", "kind", "says"), REFUSED.values(), ids=REFUSED)
def test_a_set_that_makes_no_sense_is_refused(tmp_path, refused, chosen, kind, says):
    saved(tmp_path)

    with refused(kind, says):
        export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=chosen)


def test_a_dense_model_is_refused_since_stock_software_reads_it_as_it_is(tmp_path, refused):
    dense_model().save_pretrained(tmp_path / "dense")

    with refused(NotFlexOlmoError, "'olmo2'"):
        export_checkpoint(tmp_path / "dense", tmp_path / "out")


def test_nothing_is_overwritten(tmp_path, refused):
    saved(tmp_path)

    with refused(OutputFolderNotEmptyError, "'all'"):
        export_checkpoint(tmp_path / "all", tmp_path / "all", active_experts=["public"])


def test_a_disk_that_is_too_small_for_the_experts_kept_is_noticed_before_writing(tmp_path, refused, monkeypatch):
    saved(tmp_path)
    size = as_one_file(tmp_path / "all").stat().st_size
    monkeypatch.setattr("flexolmo_hf._folder.shutil.disk_usage", disk_with(size * 3 // 4))

    with refused(NoSpaceError, "MB are needed"):
        export_checkpoint(tmp_path / "all", tmp_path / "out")
    export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=["public"])
