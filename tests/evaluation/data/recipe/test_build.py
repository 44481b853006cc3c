import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from flexolmo_hf.errors import ConfigurationError, NoSpaceError, OutputFolderNotEmptyError, ResumeMismatchError
from flexolmo_hf.evaluation.data.decontamination import document_hash
from flexolmo_hf.evaluation.data.recipe import FLEXMIX, build, build_recipe
from tests.conftest import tree
from tests.evaluation.data.recipe.conftest import documents, sentence, write_rows
from tests.evaluation.data.recipe.test_models import labelling, writing  # noqa: F401 (fixtures)


@pytest.fixture
def files(tmp_path):
    """Forty problems in four files, with two repetitions and two that are too short."""
    texts = [sentence("math", number) for number in range(40)] + [sentence("math", 3), sentence("math", 4), "x", "y"]
    return [
        write_rows(tmp_path / "files" / f"{part}.jsonl", [{"text": text} for text in texts[part::4]])
        for part in range(4)
    ]


FILTERS = [{"words": {"min": 5}}]


def test_every_document_is_kept_once_and_the_report_accounts_for_every_row(recipe, files, tmp_path):
    report = build_recipe(recipe(filters=FILTERS), tmp_path / "OUT", local={"problems": files})

    kept = documents(tmp_path / "OUT", "math")
    assert sorted(kept) == sorted(sentence("math", number) for number in range(40))
    math = report["domains"]["math"]
    assert math["dropped"] == {"repeated": 2, "words": 2}
    assert math["rows"] == math["documents"] + 4 == 44
    assert math["bytes"] == sum(len(text) for text in kept)
    assert math["tokens"] == math["by_source"]["problems"] == sum(-(-len(text) // 4) for text in kept)
    assert math["ended"] == ["problems"]
    assert json.loads((tmp_path / "OUT/report.json").read_text()) == report


def test_shards_close_once_they_reach_their_size(recipe, files, tmp_path):
    build_recipe(recipe(), tmp_path / "OUT", local={"problems": files})

    sizes = [shard.stat().st_size for shard in sorted((tmp_path / "OUT/math").glob("shard-*.jsonl"))]
    assert len(sizes) > 5
    assert all(2000 <= size < 4000 for size in sizes[:-1])


def test_the_budget_ends_a_domain(recipe, files, tmp_path):
    report = build_recipe(recipe(), tmp_path / "OUT", local={"problems": files}, limit_tokens=1000)

    math = report["domains"]["math"]
    longest = max(len(text) for text in documents(tmp_path / "OUT", "math"))
    assert 1000 <= math["tokens"] < 1000 + longest
    assert math["ended"] == []


def test_sources_share_a_budget_by_weight(recipe, tmp_path):
    sources = {
        name: {"repository": f"owner/{name}", "licence": "MIT", "text": "text", "weight": weight}
        for name, weight in {"light": 1, "heavy": 3}.items()
    }
    local = {
        name: write_rows(tmp_path / f"{name}.jsonl", [{"text": sentence(name, n)} for n in range(90)])
        for name in sources
    }
    path = recipe({"domains": {"math": {"tokens": 8000, "sources": {"problems": {}, **sources}}}})
    said = yaml.safe_load(path.read_text())
    del said["domains"]["math"]["sources"]["problems"]
    path.write_text(yaml.safe_dump(said))

    found = build_recipe(path, tmp_path / "OUT", local=local)["domains"]["math"]["by_source"]

    assert found["heavy"] / found["light"] == pytest.approx(3, rel=0.1)


def test_a_text_goes_to_the_first_domain_that_takes_it(recipe, tmp_path):
    domains = {
        name: {"tokens": 9000, "sources": {name: {"repository": "o/r", "licence": "MIT", "text": "text"}}}
        for name in ("news", "public")
    }
    rows = [{"text": sentence("both", number)} for number in range(5)]
    local = {
        "news": write_rows(tmp_path / "n.jsonl", rows[:3]),
        "public": write_rows(tmp_path / "p.jsonl", rows),
    }

    path = recipe()
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "domains": domains}))
    build_recipe(path, tmp_path / "OUT", local=local)

    assert len(documents(tmp_path / "OUT", "news")) == 3
    assert sorted(documents(tmp_path / "OUT", "public")) == [rows[3]["text"], rows[4]["text"]]


def test_contaminated_documents_are_listed_by_their_sha256_and_nothing_else(recipe, files, tmp_path):
    asked = sentence("math", 7)
    report = build_recipe(recipe(), tmp_path / "OUT", local={"problems": files}, evaluation_texts=[asked])

    listed = "".join(file.read_text() for file in (tmp_path / "OUT/math").glob("contaminated-*.txt"))
    assert listed == document_hash(asked) + "\n"
    assert asked not in documents(tmp_path / "OUT", "math")
    assert report["domains"]["math"]["dropped"]["contaminated"] == 1
    assert report["evaluation runs"] > 0


class Stopped(BaseException):
    """What a process that is told to end raises."""


@pytest.mark.parametrize("rows", [1, 17, 18, 43])
def test_a_build_that_was_stopped_goes_on_and_yields_the_same_files(recipe, files, tmp_path, monkeypatch, rows):
    path, texts = recipe(filters=FILTERS), [sentence("math", 7)]

    def built(name):
        return build_recipe(path, tmp_path / name, local={"problems": files}, evaluation_texts=texts)

    built("WHOLE")
    original, left = build.Pipeline.documents, rows

    def stopping(self, source_rows):
        nonlocal left
        for document in original(self, source_rows):
            left -= 1
            if left < 0:
                raise Stopped
            yield document

    monkeypatch.setattr(build.Pipeline, "documents", stopping)
    with pytest.raises(Stopped):
        built("OUT")
    assert not (tmp_path / "OUT").exists()
    monkeypatch.undo()
    built("OUT")

    assert tree(tmp_path / "OUT") == tree(tmp_path / "WHOLE")
    assert not (tmp_path / ".OUT.building").exists()


def test_a_resumed_build_reads_no_row_of_a_whole_shard_twice(recipe, files, tmp_path, monkeypatch):
    path = recipe()
    original, rows_seen, left = build.Pipeline.documents, [], 30

    def counting(self, source_rows):
        nonlocal left
        for document in original(self, source_rows):
            left -= 1
            if left < 0:
                raise Stopped
            rows_seen.append(document)
            yield document

    monkeypatch.setattr(build.Pipeline, "documents", counting)
    with pytest.raises(Stopped):
        build_recipe(path, tmp_path / "OUT", local={"problems": files})
    in_shards = len(documents(tmp_path / ".OUT.building", "math"))
    left = 1000
    build_recipe(path, tmp_path / "OUT", local={"problems": files})

    # At most the rows of one shard, which holds three documents, are read again.
    assert in_shards > 20
    assert len(rows_seen) - 44 <= 5


def test_a_killed_build_leaves_nothing_under_the_final_name_and_goes_on(recipe, files, tmp_path):
    path = recipe(filters=FILTERS)
    code = f"""
import os, signal
from flexolmo_hf.evaluation.data.recipe import build, build_recipe
original = build.write_json
def killing(place, content):
    original(place, content)
    if content.get("current", {{}}).get("math", {{}}).get("shards") == 4:
        os.kill(os.getpid(), signal.SIGKILL)
build.write_json = killing
build_recipe({str(path)!r}, {str(tmp_path / "OUT")!r}, local={{"problems": {[str(file) for file in files]!r}}})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "OUT").exists()
    assert len(list((tmp_path / ".OUT.building/math").glob("shard-*.jsonl"))) == 4

    build_recipe(path, tmp_path / "OUT", local={"problems": files})
    build_recipe(path, tmp_path / "WHOLE", local={"problems": files})

    assert tree(tmp_path / "OUT") == tree(tmp_path / "WHOLE")


def stopped_after_a_shard(monkeypatch, *arguments, **options):
    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(build._Build, "finish", stop)
        with pytest.raises(Stopped):
            build_recipe(*arguments, **options)


def test_a_build_that_ends_while_it_is_given_its_name_is_not_begun_anew(recipe, files, tmp_path, monkeypatch):
    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(build.Path, "replace", stop)
        with pytest.raises(Stopped):
            build_recipe(recipe(), tmp_path / "OUT", local={"problems": files})
    monkeypatch.setattr(build.Pipeline, "documents", lambda *_: pytest.fail("a row was read again"))
    build_recipe(recipe(), tmp_path / "OUT", local={"problems": files})

    assert len(documents(tmp_path / "OUT", "math")) == 42
    assert not list((tmp_path / "OUT").glob("state*"))


def test_a_disk_that_fills_up_is_told_and_the_build_goes_on_once_there_is_room(recipe, files, tmp_path, monkeypatch):
    original, left = build.ShardWriter.write, 20

    def full(self, text):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        original(self, text)

    with monkeypatch.context() as patched:
        patched.setattr(build.ShardWriter, "write", full)
        with pytest.raises(NoSpaceError):
            build_recipe(recipe(), tmp_path / "OUT", local={"problems": files})
    build_recipe(recipe(), tmp_path / "OUT", local={"problems": files})
    build_recipe(recipe(), tmp_path / "WHOLE", local={"problems": files})

    assert tree(tmp_path / "OUT") == tree(tmp_path / "WHOLE")


def test_an_unfinished_build_of_another_recipe_is_refused(recipe, files, tmp_path, monkeypatch):
    stopped_after_a_shard(monkeypatch, recipe(), tmp_path / "OUT", local={"problems": files})

    with pytest.raises(ResumeMismatchError, match="recipe was"):
        build_recipe(recipe({"seed": 1}), tmp_path / "OUT", local={"problems": files})


def test_an_unfinished_build_with_other_benchmarks_is_refused(recipe, files, tmp_path, monkeypatch):
    stopped_after_a_shard(monkeypatch, recipe(), tmp_path / "OUT", local={"problems": files})

    with pytest.raises(ResumeMismatchError, match="decontaminated by"):
        build_recipe(recipe(), tmp_path / "OUT", local={"problems": files}, evaluation_texts=["some text"])


def test_what_a_build_without_a_whole_shard_left_is_not_mixed_with_another(recipe, files, tmp_path):
    left = write_rows(tmp_path / ".OUT.building/old/shard-00000.jsonl", [{"text": "of another recipe"}])

    build_recipe(recipe(), tmp_path / "OUT", local={"problems": files})

    assert left.name not in [file.name for file in (tmp_path / "OUT").rglob("old/*")]


def test_nothing_is_overwritten(recipe, files, tmp_path):
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT/mine").write_text("mine")

    with pytest.raises(OutputFolderNotEmptyError):
        build_recipe(recipe(), tmp_path / "OUT", local={"problems": files})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"local": {"problms": "x"}}, "Did you mean 'problems'"),
        ({"local": {}}, "none for problems"),
        ({"only": ["maths"]}, "Did you mean 'math'"),
        ({"limit_tokens": 0}, "limit_tokens is 0"),
        ({"tokenizer": "no/such/folder"}, "no tokenizer 'folder'"),
    ],
    ids=str,
)
def test_what_does_not_add_up_is_refused_before_anything_is_written(recipe, files, tmp_path, options, says):
    path = recipe()
    before = tree(tmp_path)

    with pytest.raises(ConfigurationError, match=says):
        build_recipe(path, tmp_path / "OUT", **{"local": {"problems": files}, **options})

    assert tree(tmp_path) == before


def test_files_of_another_schema_are_refused_by_their_fields(recipe, files, tmp_path):
    with pytest.raises(ConfigurationError, match="no field 'content'.*It has text"):
        build_recipe(recipe(text="content"), tmp_path / "OUT", local={"problems": files})

    assert not (tmp_path / "OUT").exists()


def test_tokens_are_counted_by_the_tokenizer_that_is_given(recipe, files, tmp_path, tokenizer):
    report = build_recipe(recipe(), tmp_path / "OUT", local={"problems": files}, tokenizer=tokenizer)

    # It has a token for each byte.
    assert report["domains"]["math"]["tokens"] == report["domains"]["math"]["bytes"]
    assert report["tokens counted by"] != "bytes / 4"


# One row that each source of the committed recipe keeps, in the source's schema, and changes that it does not.
PROSE = " ".join(f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(600))
WEB = {
    "text": PROSE,
    "url": "https://example.org",
    "language_id_whole_page_fasttext": {"en": 0.9},
    "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.1,
}
WEB_DROPPED = {
    "language_score": {"language_id_whole_page_fasttext": {"en": 0.2}},
    "words": {"text": "few words"},
    "repeated_lines": {"text": "\n".join([PROSE[:400]] * 3)},
}
SCHEMAS = {
    "dclm-news": (WEB, WEB_DROPPED),
    "dclm-creative": (WEB, WEB_DROPPED),
    "dclm": (WEB, WEB_DROPPED),
    "dolmino-math": ({"text": PROSE, "id": "1", "source": "math"}, {"length": {"text": "2"}}),
    "finemath-4plus": (
        {"text": PROSE, "score": 4.2, "int_score": 4, "language": "en"},
        {"language": {"language": "de"}, "math_score": {"int_score": 3}},
    ),
    "starcoder": (
        {"content": PROSE.replace(" ", "\n"), "max_stars_count": 5, "max_stars_repo_name": "a/b", "id": "1"},
        {
            "stars": {"max_stars_count": 1},
            "code_lines": {"content": PROSE},
            "alphabetic_share": {"content": "12\n34\n" * 9},
            "handwritten": {"content": "# auto-generated\n" + PROSE.replace(" ", "\n")},
            "frequent_words": {"content": "word\n" * 9 + "other\nnext\n"},
        },
    ),
    "pes2o": (
        {"text": PROSE, "id": "1", "source": "s2orc", "version": "v2", "added": "a", "created": "c"},
        {"words": {"text": PROSE[:900]}, "alphabetic_share": {"text": " ".join(map(str, range(600)))}},
    ),
    "finepdfs-edu": (
        {"text": PROSE, "id": "1", "language": "eng_Latn", "token_count": 600},
        {
            "words": {"text": "few words"},
            "alphabetic_share": {"text": " ".join(map(str, range(600)))},
            "repeated_lines": {"text": "\n".join([PROSE[:900]] * 3)},
        },
    ),
    "reddit-threads": (
        {"title": "Why?", "body": PROSE[:900], "answers": [{"body": "Because.", "score": 5}]},
        {"words": {"body": "few words"}},
    ),
}


@pytest.fixture
def committed(tmp_path, labelling, writing):  # noqa: F811
    """The committed recipe with tiny models: a classifier that calls everything news, and a writer."""
    said = yaml.safe_load(FLEXMIX.read_text("utf8"))
    said["documents"] = 1000
    for domain in said["domains"].values():
        for source in domain["sources"].values():
            if "classify" in source:
                # What is not news is told by another of its labels.
                source["classify"] = {"model": labelling, "but": ["Listicle"], "min_score": 0.5}
            if "rewrite" in source:
                source["rewrite"] |= {"model": writing, "max_new_tokens": 4, "max_length": 8}
                source["rewrite"]["prompt"] = "Again: {text}"
    (tmp_path / "flexmix.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return tmp_path / "flexmix.yaml"


def test_every_source_of_the_committed_recipe_has_a_schema_here():
    assert set(SCHEMAS) == {source.name for source in build.read_recipe(FLEXMIX).sources}


def test_the_committed_recipe_builds_from_local_files_of_every_schema(committed, tmp_path):
    local = {}
    for name, (row, changes) in SCHEMAS.items():
        # Each source has its own text, since a repetition would be dropped.
        mine = json.loads(json.dumps(row).replace("worda", f"word{name.replace('-', '')}"))
        rows = [mine, *({**mine, **change} for change in changes.values())]
        local[name] = write_rows(tmp_path / "local" / f"{name}.jsonl", rows)

    report = build_recipe(committed, tmp_path / "OUT", local=local, tokenizer="bytes / 4")

    assert list(report["domains"]) == [domain.name for domain in build.read_recipe(FLEXMIX).domains]
    for domain in build.read_recipe(FLEXMIX).domains:
        expected = {}
        for source in domain.sources:
            for reason in SCHEMAS[source.name][1]:
                expected[reason] = expected.get(reason, 0) + 1
        found = report["domains"][domain.name]
        assert found["dropped"] == expected, domain.name
        assert found["documents"] == len(domain.sources)
    assert "Because." not in "".join(documents(tmp_path / "OUT", "reddit"))


def test_the_committed_recipe_asks_for_a_model_to_rewrite_with_and_does_without_on_demand(tmp_path):
    row = write_rows(tmp_path / "code.jsonl", [SCHEMAS["starcoder"][0]])

    with pytest.raises(ConfigurationError, match="rewrite the texts of 'reddit-threads' and names no model"):
        build_recipe(FLEXMIX, tmp_path / "OUT", tokenizer="bytes / 4")
    report = build_recipe(
        FLEXMIX, tmp_path / "OUT", only=["code"], local={"starcoder": row}, tokenizer="bytes / 4", limit_tokens=10_000
    )

    assert report["domains"]["code"]["documents"] == 1
