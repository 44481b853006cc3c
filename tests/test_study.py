"""The mini study runs through at its smallest size, goes on where it was interrupted, and writes its page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[1]


def run(output, *more):
    # The data packages of `make data` lie in the repository's cache unless the environment says otherwise.
    cache = os.environ.get("FLEXOLMO_CACHE") or str(ROOT / ".cache" / "flexolmo" / "wheels")
    command = [sys.executable, "-m", "benchmarks.flexmix_mini", "--output", str(output), "--smoke", "--cache", cache]
    return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    output = tmp_path_factory.mktemp("study") / "out"
    done = run(output)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


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
    results = study / "results"
    kept, lost = results / "dense-math-0.json", results / "score-t2-0-soup.json"
    before, score = kept.stat().st_mtime_ns, json.loads(lost.read_text("utf8"))["found"]
    lost.unlink()

    done = run(study)

    assert done.returncode == 0, done.stderr[-3000:]
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text("utf8"))["found"] == score
