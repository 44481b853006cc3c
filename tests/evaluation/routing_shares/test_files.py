"""The command measures what the function measures, writes one folder or nothing, and keeps text out of it."""

import json

import pytest
from typer.testing import CliRunner

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.cli import app
from flexolmo_hf.errors import (
    ConfigurationError,
    DamagedFileError,
    OutputFolderNotEmptyError,
    UnknownExpertError,
)
from flexolmo_hf.evaluation.routing_shares import RoutingShares, routing_shares
from flexolmo_hf.evaluation.routing_shares.files import shares_of_files
from tests.conftest import dense_model

WRITTEN = {"routing_shares.json", "routing_shares.md", "heat_maps.png", "domains.png", "depth.png", "position.png"}
DATA = {"math": "math.jsonl", "code": "code"}


@pytest.fixture
def place(model, tokenizer, tmp_path, monkeypatch):
    """The working directory: a checkpoint, documents of two domains and a text."""
    model.save_pretrained(tmp_path / "MODEL")
    tokenizer.save_pretrained(tmp_path / "MODEL")
    (tmp_path / "math.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("mmmc", "mp")))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.txt").write_text("ccpm")
    (tmp_path / "text.txt").write_text("secret mcp")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    data = [word for name, where in DATA.items() for word in ("--data", f"{name}={where}")]
    return CliRunner().invoke(app, ["routing", "MODEL", *data, *arguments], env={"COLUMNS": "200"})


def test_the_command_writes_what_the_function_measures(place, model, tokenizer):
    done = run("--output", "OUT", "--top-k", "1")
    expected = routing_shares(model, tokenizer, {"math": ["mmmc", "mp"], "code": ["ccpm"]}, top_k=1)

    assert done.exit_code == 0, done.output
    assert {file.name for file in (place / "OUT").iterdir()} == WRITTEN
    assert RoutingShares.open(place / "OUT" / "routing_shares.json").to_dict() == expected.to_dict()
    assert "Wrote OUT: tables and figures, which hold no text." in done.stdout
    assert "code" in done.stdout


def test_without_an_output_folder_nothing_is_written(place):
    before = sorted(place.rglob("*"))
    done = run("--limit", "1", "--active-experts", "public+code")

    assert done.exit_code == 0, done.output
    assert sorted(place.rglob("*")) == before
    assert "math" in done.stdout


def test_the_text_is_in_the_page_and_nowhere_else(place):
    done = run("--output", "OUT", "--html-text", "text.txt")

    assert done.exit_code == 0, done.output
    assert {file.name for file in (place / "OUT").iterdir()} == {*WRITTEN, "text.html"}
    holding = [file.name for file in (place / "OUT").iterdir() if b'>s</span><span class="t' in file.read_bytes()]
    assert holding == ["text.html"]
    assert "text.html there shows the text itself" in done.stdout
    assert "secret" not in done.output


def test_the_set_is_loaded_and_no_other_expert_is_read(place):
    (place / "MODEL" / "model-expert-math-00001-of-00001.safetensors").unlink()
    found = shares_of_files("MODEL", DATA, active_experts=["code", "public"])

    assert found.experts == ["public", "code"]


def test_a_limit_is_of_documents_per_domain(place):
    assert shares_of_files("MODEL", DATA, limit=1).documents == [1, 1]
    assert shares_of_files("MODEL", DATA).documents == [2, 1]


def test_text_is_read_from_the_field_that_is_asked_for(place):
    (place / "math.jsonl").write_text('{"said": "mmmc", "text": "p"}\n')

    assert shares_of_files("MODEL", DATA, field="said").tokens == [4, 4]


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ({"data": {"math": "math.jsonl", "code": "nowhere.txt"}}, ConfigurationError, "'nowhere.txt'"),
        ({"data": {"math": "math.jsonl", "code": "empty.jsonl"}}, ConfigurationError, "'code' has no text"),
        ({"html_text": "text.txt"}, ConfigurationError, "no place"),
        ({"html_text": "nowhere.txt", "output": "OUT"}, ConfigurationError, "'nowhere.txt' cannot be read"),
        ({"html_text": "bytes.txt", "output": "OUT"}, DamagedFileError, "not UTF-8"),
        ({"html_text": "long.txt", "output": "OUT"}, ConfigurationError, "1 to 2000"),
        ({"output": "code"}, OutputFolderNotEmptyError, "'code'"),
        ({"limit": 0}, ConfigurationError, "limit is 0"),
        ({"dtype": "int8"}, ConfigurationError, "'int8'"),
        ({"device": "nowhere"}, ConfigurationError, "'nowhere'"),
        ({"active_experts": ["maht"]}, UnknownExpertError, "'math'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_is_measured(place, refused, monkeypatch, given, kind, says):
    (place / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (place / "long.txt").write_text("m" * 2001)
    (place / "empty.jsonl").write_text('{"text": ""}\n')
    monkeypatch.setattr("flexolmo_hf.evaluation.routing_shares.files.routing_shares", None)
    with refused(kind, says):
        shares_of_files("MODEL", **{"data": DATA, **given})


def test_a_failure_leaves_no_folder_behind(place, monkeypatch):
    def fail(*_):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr("flexolmo_hf.evaluation.routing_shares.files.write_report", fail)
    before = sorted(place.rglob("*"))
    with pytest.raises(RuntimeError):
        shares_of_files("MODEL", DATA, "OUT")

    assert sorted(place.rglob("*")) == before


def test_a_misuse_ends_in_one_sentence(place):
    for arguments, says in (
        (["--html-text", "text.txt"], "output folder"),
        (["--data", "math=math.jsonl"], "'math' appears twice"),
        (["--data", "math.jsonl"], "NAME=PLACE"),
    ):
        done = run(*arguments)

        assert done.exit_code == 2
        assert done.stderr.startswith("Error: ")
        assert says in done.stderr


def test_a_dense_checkpoint_is_refused(place, tokenizer):
    dense_model(vocab_size=len(tokenizer)).save_pretrained(place / "DENSE")
    done = CliRunner().invoke(app, ["routing", "DENSE", "--data", "math=math.jsonl"])

    assert done.exit_code == 2
    assert "olmo2" in done.stderr


def test_the_page_is_of_the_experts_that_were_loaded(place):
    shares_of_files("MODEL", DATA, "OUT", html_text="text.txt", active_experts=["public", "math"])
    page = (place / "OUT" / "text.html").read_text("utf8")

    assert '"experts":["public","math"]' in page
    assert FlexOlmoForCausalLM.from_pretrained("MODEL").expert_names == ["public", "math", "code"]
