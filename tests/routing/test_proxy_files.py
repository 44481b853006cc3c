"""`flexolmo proxy`: what the function chooses, from files to files, and nothing private beside them."""

import json
import os
import tempfile

import pytest
from typer.testing import CliRunner

from flexolmo_hf import ProxySettings, select_proxy
from flexolmo_hf.cli import app
from tests.routing.proxy_corpora import documents, encode, public_corpus

pytest.importorskip("sklearn")
datasets = pytest.importorskip("datasets")

PUBLIC, _ = public_corpus()
PRIVATE = [f"{text} secret{number}" for number, text in enumerate(documents("algebra", 60, seed=1))]


def write(texts, place, kind, field="text"):
    if kind == "jsonl":
        place.with_suffix(".jsonl").write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    if kind == "parquet":
        datasets.Dataset.from_dict({field: texts}).to_parquet(str(place.with_suffix(".parquet")))
    if kind == "txt":
        place.mkdir()
        for number, text in enumerate(texts):
            (place / f"{number:04}.txt").write_text(text)
        return place.name
    return f"{place.name}.{kind}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with the encoder of the tests under the name ENCODER."""
    monkeypatch.setattr("flexolmo_hf.routing.proxy.open_encoder", {"ENCODER": encode}.__getitem__)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flexolmo(*arguments):
    return CliRunner().invoke(app, ["proxy", *arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_the_command_writes_what_the_function_chooses(place, kind):
    files = write(PUBLIC, place / "public", kind), write(PRIVATE, place / "private", kind)
    done = flexolmo(*files, "-o", "OUT", "-n", "20", "--encoder", "ENCODER", "--diverse", "--seed", "3")
    rows = [json.loads(line) for line in (place / "OUT" / "proxy.jsonl").read_text().splitlines()]
    expected = select_proxy(PUBLIC, PRIVATE, n=20, encoder="ENCODER", diverse=True, settings=ProxySettings(seed=3))

    assert done.exit_code == 0, done.output
    assert "20 of 330 public documents" in done.stdout
    assert "Pass on proxy.jsonl; the scores and reports in owner/ stay with you." in done.stdout
    assert [row["text"] for row in rows] == [PUBLIC[index] for index in sorted(expected.indices)]
    assert json.loads((place / "OUT" / "owner" / "report.json").read_text()) == json.loads(
        json.dumps(expected.report())
    )


def test_private_text_is_nowhere_but_in_the_owner_s_file(place):
    done = flexolmo(
        write(PUBLIC, place / "public", "jsonl"),
        write(PRIVATE, place / "private", "jsonl"),
        *("-o", "OUT", "-n", "20", "--encoder", "ENCODER"),
    )
    holding = [file.name for file in place.rglob("*") if file.is_file() and b"secret" in file.read_bytes()]

    assert done.exit_code == 0
    assert "secret" not in done.output
    assert holding == ["private.jsonl"]
    assert os.listdir(place / "temporary") == []


def test_the_text_may_stand_under_another_key(place):
    files = write(PUBLIC, place / "public", "jsonl", "body"), write(PRIVATE, place / "private", "jsonl", "body")
    done = flexolmo(*files, "-o", "OUT", "-n", "20", "--encoder", "ENCODER", "--field", "body")

    assert done.exit_code == 0, done.output


REFUSED = {
    "no such file": ("nowhere.jsonl", "no data at 'nowhere.jsonl'"),
    "no known kind": ("notes.doc", "no known kind"),
    "no folder with texts": ("hollow", "0 readable files"),
    "broken rows": ("broken.jsonl", "'broken.jsonl' cannot be used"),
    "rows without text": ("other.jsonl", "no text named 'text'"),
    "few documents": ("few.jsonl", "2 private documents can be used"),
}


@pytest.mark.parametrize(("private", "says"), REFUSED.values(), ids=REFUSED)
def test_a_misuse_ends_in_one_sentence_and_leaves_nothing(place, private, says, capfd):
    public = write(PUBLIC, place / "public", "jsonl")
    (place / "notes.doc").write_text("a secret")
    (place / "hollow").mkdir()
    (place / "broken.jsonl").write_text('{"text": "a secret"\nsecret')
    (place / "other.jsonl").write_text('{"words": "a secret"}\n')
    (place / "few.jsonl").write_text('{"text": "a secret"}\n' * 2)
    done = flexolmo(public, private, "-o", "OUT", "-n", "20", "--encoder", "ENCODER")
    said = done.output + "".join(capfd.readouterr())

    assert done.exit_code == 2
    assert says in said
    assert "secret" not in said
    assert str(place) not in said
    assert "Traceback" not in said
    assert not (place / "OUT").exists()
    assert os.listdir(place / "temporary") == []


def test_an_output_folder_in_use_is_refused_before_anything_is_read(place):
    (place / "OUT").mkdir()
    (place / "OUT" / "mine").touch()
    done = flexolmo("nowhere", "nowhere", "-o", "OUT", "-n", "20", "--encoder", "ENCODER")

    assert done.exit_code == 2
    assert "'OUT' is not empty" in done.output
