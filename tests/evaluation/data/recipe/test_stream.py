import json

import pytest

from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.evaluation.data.recipe import FLEXMIX, read_recipe
from flexolmo_hf.evaluation.data.recipe.schema import Source
from flexolmo_hf.evaluation.data.recipe.stream import ShuffledRows, files_of, open_rows
from tests.evaluation.data.recipe.conftest import write_rows

SOURCE = Source("numbers", "owner/numbers", "MIT", text="text")


@pytest.fixture
def files(tmp_path):
    return [
        write_rows(tmp_path / f"{part}.jsonl", [{"n": 10 * part + index} for index in range(10)]) for part in range(3)
    ]


@pytest.fixture
def rows(files, tmp_path):
    def opened(**changes):
        return ShuffledRows(SOURCE, files, tmp_path / "cache", **{"seed": 0, "block": 7, **changes})

    return opened


def numbers(rows):
    return [row["n"] for row in rows]


def test_every_row_comes_once_and_in_another_order(rows):
    read = numbers(rows())

    assert sorted(read) == list(range(30))
    assert read != list(range(30))


def test_the_seed_decides_the_order(rows):
    assert numbers(rows()) == numbers(rows())
    assert numbers(rows()) != numbers(rows(seed=1))


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 8, 13, 14, 29, 30])
def test_a_resumed_stream_yields_exactly_the_rest(rows, taken):
    whole = numbers(rows())
    first = rows()
    remaining = iter(first)
    before = [next(remaining)["n"] for _ in range(taken)]
    # What a state file does to it.
    position = json.loads(json.dumps(first.position()))

    assert before + numbers(rows(position=position)) == whole


def test_a_stream_can_be_resumed_again_and_again(rows):
    whole, read, position = numbers(rows()), [], None
    for _ in range(30):
        stream = rows(position=position)
        read.append(next(iter(stream))["n"])
        position = stream.position()

    assert read == whole


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_packed_files_are_read(tmp_path, name):
    file = write_rows(tmp_path / name, [{"n": 1}])

    assert numbers(open_rows(SOURCE, files_of(tmp_path, "numbers"), tmp_path / "cache")) == [1]
    assert files_of([file], "numbers") == [file]


def test_parquet_files_are_read(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"n": n} for n in range(5)]).to_parquet(tmp_path / "a.parquet")

    assert numbers(open_rows(SOURCE, files_of(tmp_path, "numbers"), tmp_path / "cache")) == list(range(5))


def test_a_place_without_readable_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")

    with pytest.raises(ConfigurationError, match="0 readable files"):
        files_of(tmp_path, "numbers")


def test_files_of_two_kinds_are_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"n": 1}])
    (tmp_path / "b.parquet").write_bytes(b"")

    with pytest.raises(ConfigurationError, match="several"):
        files_of(tmp_path, "numbers")


def test_a_torn_file_is_refused_without_its_path_or_content(tmp_path, caplog):
    (tmp_path / "torn.jsonl").write_text('{"text": "secret')

    with pytest.raises(DamagedFileError, match=r"torn\.jsonl") as refused:
        list(ShuffledRows(SOURCE, [tmp_path / "torn.jsonl"], tmp_path / "cache", seed=0, block=7))

    assert "secret" not in str(refused.value) + caplog.text
    assert str(tmp_path) not in str(refused.value) + caplog.text
    # A traceback shows a cause as well.
    assert refused.value.__cause__ is None and refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        (
            {"config": "en", "data_files": ("a/*",)},
            {"path": "owner/numbers", "name": "en", "data_files": ["a/*"], "revision": "main", "split": "train"},
        ),
        (
            {"reader": "json", "data_files": ("v2/*.json.gz",), "revision": "abc"},
            {"path": "json", "data_files": ["hf://datasets/owner/numbers@abc/v2/*.json.gz"], "split": "train"},
        ),
    ],
    ids=["repository", "files of a repository with a script"],
)
def test_the_hub_is_asked_for_what_the_recipe_says(monkeypatch, tmp_path, changes, asked):
    calls = {}
    monkeypatch.setattr("datasets.load_dataset", lambda **given: calls.update(given) or [])

    open_rows(Source("numbers", "owner/numbers", "MIT", text="text", **changes), None, tmp_path)

    assert asked.items() <= calls.items()
    assert calls["streaming"] is True


@pytest.mark.parametrize(
    ("source", "files", "others"),
    [
        (
            "starcoder",
            [f"{folder}/train-0.parquet" for folder in ("ada", "glsl", "go", "java", "json", "julia", "zig")],
            ["git-commits-cleaned/train-0.parquet", "github-issues-filtered-structured/train-0.parquet"]
            + ["jupyter-scripts-dedup-filtered/train-0.parquet", "jupyter-structured-clean-dedup/train-0.parquet"],
        ),
        (
            "pes2o",
            ["data/v2/train-00010-of-00020.json.gz", "data/v2/train-00019-of-00020.json.gz"],
            ["data/v2/train-00009-of-00020.json.gz", "data/v1/train-00010-of-00020.json.gz"],
        ),
    ],
    ids=["code of every language but no issues", "full papers but no abstracts"],
)
def test_the_committed_recipe_names_the_files_with_the_fields_and_texts_it_wants(tmp_path, source, files, others):
    from datasets.data_files import resolve_pattern

    for name in files + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    [named] = [each.data_files for each in read_recipe(FLEXMIX).sources if each.name == source]

    assert sorted(file for pattern in named for file in resolve_pattern(pattern, str(tmp_path))) == sorted(
        str(tmp_path / name) for name in files
    )


def test_a_source_out_of_reach_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match="owner/numbers.*local files"):
        open_rows(SOURCE, None, tmp_path)
