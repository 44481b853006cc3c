"""The command line: each command does what the function of that name does, and a misuse ends in one clear sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from flexolmo_hf import (
    DomainEmbedding,
    ExpertPackage,
    FlexOlmoForCausalLM,
    export_checkpoint,
    inspect_checkpoint,
    merge_experts,
)
from flexolmo_hf.cli import app
from flexolmo_hf.modeling.files.sidecar import read_expert_names
from tests.composition.conftest import consortium, edit_json, logits, tree
from tests.conftest import as_one_file, dense_model

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory: `anchor`, `package-math`, `package-code`, and `math`, in which math was trained."""
    owners = consortium(tmp_path)
    owners.models["math"].save_pretrained(tmp_path / "math")
    as_one_file(tmp_path / "math")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def load(folder):
    return FlexOlmoForCausalLM.from_pretrained(folder)


# What the commands do.


def test_init_makes_what_from_dense_makes(place, input_ids):
    said = succeed("init", "anchor", "out", "--expert", "news", "--router-bias")
    made = load("out")

    assert said == "Wrote out: experts ['public', 'news'].\n"
    assert made.expert_names == ["public", "news"]
    assert made.config.router_bias
    expected = FlexOlmoForCausalLM.from_dense("anchor", expert="news", router_bias=True)
    assert torch.equal(logits(made, input_ids), logits(expected, input_ids))


def test_init_without_an_expert_makes_the_public_model(place):
    succeed("init", "anchor", "out")

    assert load("out").expert_names == ["public"]
    assert not load("out").config.router_bias


def test_init_takes_the_tokenizer_along(place, tokenizer):
    tokenizer.save_pretrained("anchor")
    succeed("init", "anchor", "out", "--expert", "news")

    assert AutoTokenizer.from_pretrained("out")("tea")["input_ids"] == tokenizer("tea")["input_ids"]


def test_pack_writes_what_the_package_writes(place):
    said = succeed("pack", "math", "out", "--expert", "math", "--owner", "Ann", "--license", "mit")
    manifest = ExpertPackage.from_pretrained("out").manifest

    assert said == "Wrote out: expert 'math', 18,560 parameters.\n"
    assert (manifest.owner, manifest.license) == ("Ann", "mit")
    assert (place / "out/expert.safetensors").read_bytes() == (place / "package-math/expert.safetensors").read_bytes()


def test_pack_takes_the_training_record_along(place):
    record = {"training": {"steps": 200}, "evaluation": {"loss": 1.5}}
    (place / "math/expert_training.json").write_text(json.dumps(record))
    succeed("pack", "math", "out", "--expert", "math")

    manifest = ExpertPackage.from_pretrained("out").manifest
    assert (manifest.training, manifest.evaluation) == ({"steps": 200}, {"loss": 1.5})


def test_merge_writes_what_merge_experts_writes(place):
    said = succeed("merge", "anchor", "out", "--package", "math=package-math", "--package", "code=package-code")
    merge_experts("anchor", {"math": "package-math", "code": "package-code"}, "expected")

    assert said == "Wrote out: experts ['public', 'math', 'code'].\n"
    assert tree(place / "out") == tree(place / "expected")


def test_merge_says_which_experts_the_model_has_in_the_end(place):
    said = succeed("merge", "math", "out", "--package", "code=package-code")

    assert said == f"Wrote out: experts {load('out').expert_names}.\n"


def test_inspect_shows_every_expert_of_a_model(place):
    succeed("merge", "anchor", "out", "--package", "math=package-math")
    said = succeed("inspect", "out")

    for word in ("expert", "index", "parameters", "size", "file", "bias", "active"):
        assert word in said
    for expert in inspect_checkpoint("out").experts:
        row = next(line for line in said.splitlines() if f" {expert.name} " in line)
        assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
            expert.name, str(expert.index), "full", "18,560", "0.07 MB", expert.files[0], "none", "yes"
        ]  # fmt: skip


def test_inspect_shows_a_package_and_its_anchor(place):
    said = succeed("inspect", "package-math")

    assert "expert package" in said
    assert " math " in said
    assert inspect_checkpoint("package-math").anchor_digest in said


def test_export_writes_what_export_checkpoint_writes(place):
    succeed("merge", "anchor", "all", "--package", "math=package-math", "--package", "code=package-code")
    said = succeed("export", "all", "out", "--active-experts", "public,code")
    export_checkpoint("all", "expected", active_experts=["public", "code"])

    assert said == "Wrote out: experts ['public', 'code'].\n"
    assert tree(place / "out") == tree(place / "expected")


def test_export_drops_biases_when_told_to(place):
    succeed("init", "anchor", "biased", "--expert", "news", "--router-bias")
    succeed("export", "biased", "out", "--drop-bias")

    assert not load("out").config.router_bias


@pytest.fixture
def nameless(place):
    """A merged checkpoint whose configuration does not name its experts."""
    merge_experts("anchor", {"code": "package-code", "math": "package-math"}, "nameless")
    edit_json(place / "nameless/config.json", lambda settings: settings.pop("expert_names"))
    return place


def test_identify_shows_every_expert_and_writes_the_names_beside_the_checkpoint(nameless):
    said = succeed("identify", "nameless", "package-math", "public=anchor").splitlines()

    assert [line.split() for line in said[:4]] == [
        ["index", "name", "match", "distance"],
        ["0", "public", "identical", "0.00e+00"],
        ["1", "expert_1", "none", "-"],
        ["2", "math", "identical", "0.00e+00"],
    ]
    assert said[4:] == ["Wrote expert_names.json in nameless: experts ['public', 'expert_1', 'math']."]
    assert read_expert_names("nameless", 3) == ["public", "expert_1", "math"]


def test_identify_only_looks_when_told_to(nameless):
    before = tree(nameless)
    said = succeed("identify", "nameless", "algebra=package-math", "--no-write")

    assert "algebra" in said
    assert "Wrote" not in said
    assert tree(nameless) == before


def test_help_names_every_command():
    commands = ("init", "train", "pack", "merge", "export", "identify", "inspect", "demo")
    assert [word for word in commands if word not in succeed("--help")] == []


def test_the_program_ends_a_misuse_with_code_2_and_no_traceback(place):
    command = [sys.executable, "-m", "flexolmo_hf.cli", "merge", "anchor", "math", "--package", "math=package-math"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("Error: The output folder 'math' is not empty.")
    assert "Traceback" not in ended.stderr


# What they refuse.

MISUSES = {
    "init a folder that does not exist": (["init", "nowhere", "out"], "'nowhere'"),
    "init another architecture": (["init", "llama", "out"], "'llama'"),
    "init a FlexOlmo model": (["init", "math", "out"], "'flex_olmo'"),
    "init a model whose settings are no JSON": (["init", "broken", "out"], "config.json"),
    "init a truncated model": (["init", "cut-dense", "out"], WEIGHTS),
    "init a model without weights": (["init", "weightless-dense", "out"], WEIGHTS),
    "init onto a folder that is not empty": (["init", "anchor", "math"], "not empty"),
    "init onto a file": (["init", "anchor", "file"], "'file'"),
    "init below a file": (["init", "anchor", "file/out"], "'file'"),
    "init a name with a separator": (["init", "anchor", "out", "--expert", "a/b"], "'a/b'"),
    "init a hidden name": (["init", "anchor", "out", "--expert", ".a"], "'.a'"),
    "init a second public expert": (["init", "anchor", "out", "--expert", "Public"], "'Public'"),
    "pack a folder that does not exist": (["pack", "nowhere", "out", "--expert", "math"], "'nowhere'"),
    "pack an unknown expert": (["pack", "math", "out", "--expert", "maht"], "Did you mean 'math'?"),
    "pack the public expert": (["pack", "math", "out", "--expert", "public"], "Choose another expert than 'public'"),
    "pack from a dense model": (["pack", "anchor", "out", "--expert", "math"], "flexolmo init"),
    "pack from a truncated model": (["pack", "cut", "out", "--expert", "math"], WEIGHTS),
    "pack from a model without weights": (["pack", "weightless", "out", "--expert", "math"], WEIGHTS),
    "pack from a model that lost a file": (["pack", "lost", "out", "--expert", "math"], "lost.safetensors"),
    "pack from a package": (["pack", "package-math", "out", "--expert", "math"], "config.json"),
    "pack onto a folder that is not empty": (["pack", "math", "anchor", "--expert", "math"], "not empty"),
    "pack a damaged training record": (["pack", "record", "out", "--expert", "math"], "expert_training.json"),
    "merge onto an anchor that does not exist": (
        ["merge", "nowhere", "out", "--package", "a=package-math"],
        "'nowhere'",
    ),
    "merge a package that does not exist": (["merge", "anchor", "out", "--package", "math=nowhere"], "'nowhere'"),
    "merge a model in place of a package": (["merge", "anchor", "out", "--package", "math=math"], "manifest.json"),
    "merge without a name": (["merge", "anchor", "out", "--package", "package-math"], "NAME=FOLDER"),
    "merge an empty name": (["merge", "anchor", "out", "--package", "=package-math"], "''"),
    "merge a name that is no identifier": (["merge", "anchor", "out", "--package", "a b=package-math"], "'a b'"),
    "merge one name twice": (["merge", "anchor", "out", *["--package", "a=package-math"] * 2], "'a' appears twice"),
    "merge beside another anchor": (
        ["merge", "other-owners/anchor", "out", "--package", "math=package-math"],
        "another anchor",
    ),
    "merge onto a folder that is not empty": (["merge", "anchor", "math", "--package", "a=package-math"], "not empty"),
    "export an unknown expert": (["export", "math", "out", "--active-experts", "public,maht"], "'maht'"),
    "export a dense model": (["export", "anchor", "out"], "'olmo2'"),
    "export into a full folder": (["export", "math", "math"], "'math'"),
    "identify by a reference that does not exist": (["identify", "math", "nowhere/at/all"], "'all'"),
    "identify a repository and write": (["identify", "owner/name", "package-math", "--write"], "'owner/name'"),
    "identify against names of its own": (["identify", "math", "algebra=package-math"], "'algebra'"),
    "inspect a folder that does not exist": (["inspect", "nowhere"], "'nowhere'"),
    "inspect a file": (["inspect", "file"], "'file'"),
    "inspect another architecture": (["inspect", "llama"], "'llama'"),
    "inspect a truncated model": (["inspect", "cut"], WEIGHTS),
    "inspect a model without weights": (["inspect", "weightless"], WEIGHTS),
    "inspect a package that is no package": (["inspect", "not-a-package"], "manifest.json"),
}


@pytest.fixture
def wreckage(place):
    """What people give by mistake, beside what they should give."""
    for copied, names in {
        "anchor": ["llama", "broken", "cut-dense", "weightless-dense"],
        "math": ["cut", "weightless", "record", "lost"],
    }.items():
        for name in names:
            shutil.copytree(place / copied, place / name)
    for name in ("cut", "cut-dense"):
        (place / name / WEIGHTS).write_bytes((place / name / WEIGHTS).read_bytes()[:-9])
    for name in ("weightless", "weightless-dense"):
        (place / name / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(load(place / "math").state_dict(), "lost.safetensors")}
    (place / "lost/model.safetensors.index.json").write_text(json.dumps(index))
    (place / "lost" / WEIGHTS).unlink()
    edit_json(place / "llama/config.json", lambda config: config.update(model_type="llama"))
    (place / "broken/config.json").write_text("{")
    (place / "record/expert_training.json").write_text("{")
    (place / "not-a-package").mkdir()
    (place / "not-a-package/manifest.json").write_text("{}")
    (place / "file").write_text("mine")
    consortium(place / "other-owners", ["news"], rms_norm_eps=1e-3)
    return place


@pytest.mark.parametrize(("arguments", "says"), MISUSES.values(), ids=MISUSES)
def test_a_misuse_ends_with_code_2_and_one_sentence_and_writes_nothing(wreckage, arguments, says):
    before = tree(wreckage)
    result = run(*arguments)

    assert result.exit_code == 2, repr(result.exception)
    assert result.stdout == ""
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert says in message
    assert "Traceback" not in result.output
    assert str(wreckage) not in result.output
    assert tree(wreckage) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Usage"),
        (["init", "anchor"], "Missing argument"),
        (["pack", "math", "out"], "Missing option"),
        (["merge", "anchor", "out"], "Missing option"),
        (["export", "math"], "Missing argument"),
        (["identify", "math"], "Missing argument"),
        (["inspect"], "Missing argument"),
        (["init", "anchor", "out", "--expret", "math"], "No such option"),
        (["inspekt", "anchor"], "No such command"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_code_2_and_says_what_is_missing(place, arguments, says):
    result = run(*arguments)

    assert result.exit_code == 2
    assert says in result.output
    assert not (place / "out").exists()


def test_a_row_that_was_embedded_is_where_a_new_expert_starts(tmp_path, tokenizer):
    dense = dense_model(vocab_size=len(tokenizer))
    dense.save_pretrained(tmp_path / "dense")
    rows = {"public": torch.full((64,), 0.25), "math": torch.arange(64.0)}
    for name, values in rows.items():
        DomainEmbedding(values).save(tmp_path / f"{name}.npy")
    given = [part for name in rows for part in ("--row", f"{name}={tmp_path / name}.npy")]
    done = run("init", str(tmp_path / "dense"), str(tmp_path / "start"), "--expert", "math", *given)
    assert done.exit_code == 0, done.output
    model = FlexOlmoForCausalLM.from_pretrained(tmp_path / "start")
    for mixture in model.mixtures:
        assert torch.equal(mixture.gate.weight, torch.stack([rows["public"], rows["math"]]))
    refused = run("init", str(tmp_path / "start"), str(tmp_path / "next"), "--expert", "code", *given)
    assert refused.exit_code == 2
    assert "keep theirs" in " ".join(refused.output.split())
