import json
import os

import pytest

from flexolmo_hf.demo import stages
from flexolmo_hf.demo.stages import Stage, StageRunner
from flexolmo_hf.errors import StageFailedError

SECRET = "a sentence of an owner"


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Make a stage that runs the given lines of Python."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name, *lines):
        (tmp_path / f"{name}_program.py").write_text("\n".join(lines))
        return Stage(name, f"{name}_program", ["given"], tmp_path / "out" / f"{name}.log", tmp_path / "caches" / name)

    return make


@pytest.fixture
def runner(tmp_path):
    with StageRunner(tmp_path / "out") as runner:
        yield runner


def test_stages_run_in_order_and_are_timed(stage, runner, tmp_path):
    say = f"open({str(tmp_path / 'said')!r}, 'a').write(sys.argv[1] + ' to %s,')"

    runner.run(stage("first", "import sys", say % "first"), stage("second", "import sys", say % "second"))

    assert (tmp_path / "said").read_text() == "given to first,given to second,"
    assert list(runner.seconds) == ["first", "second"]


def test_failure_names_stage_and_log_and_keeps_the_text_off_the_terminal(stage, runner, tmp_path, capfd):
    broken = stage("broken", "import sys", f"print({SECRET!r})", f"sys.exit({SECRET!r})")
    never = stage("never", f"open({str(tmp_path / 'never')!r}, 'w')")

    with pytest.raises(StageFailedError) as refusal:
        runner.run(broken, never)

    assert "'broken'" in str(refusal.value) and "'broken.log'" in str(refusal.value)
    assert not (tmp_path / "never").exists()
    runner._progress.stop()
    shown = capfd.readouterr()
    assert "broken" in shown.err and "failed" in shown.err
    assert SECRET not in shown.out + shown.err + str(refusal.value)
    assert broken.log.read_text().count(SECRET) == 2


def test_progress_bars_of_the_child_are_followed_and_left_out_of_its_log(stage, runner):
    bars = stage(
        "bars",
        "import sys, time",
        "from tqdm import tqdm",
        "print('before')",
        "bar = tqdm(total=8, desc='Tokenizing', mininterval=0)",
        "for _ in range(5): bar.update()",
        "time.sleep(0.2)",
        "sys.exit('over')",
    )

    with pytest.raises(StageFailedError):
        runner.run(bars)

    [task] = runner._progress.tasks
    assert (task.completed, task.total) == (5, 8)
    assert set(bars.log.read_text().split()) == {"before", "over"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("  1%|▏         | 7/742 [00:05<08:10,  1.50it/s]", (None, "7", "742")),
        (
            "Tokenizing train dataset: 100%|████| 99/99 [00:02<00:00, 40 examples/s]",
            ("Tokenizing train dataset", "99", "99"),
        ),
        ("100%|##########| 3/3 [00:00<00:00]", (None, "3", "3")),
    ],
)
def test_progress_bars_are_recognised(line, found):
    assert stages._BAR.match(line).group("what", "done", "total") == found


@pytest.mark.parametrize("line", ["{'loss': '5.03', 'epoch': '0.82'}", "Generating 5/8 [", "100% done", ""])
def test_other_lines_are_not_taken_for_progress(line):
    assert not stages._BAR.match(line)


def test_sequences_run_at_the_same_time(stage, runner, tmp_path):
    # Each waits for the other's file: one after the other, they would wait for ever.
    meet = "import pathlib, time\npathlib.Path({mine!r}).touch()\n"
    meet += "while not pathlib.Path({other!r}).exists(): time.sleep(.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    runner.run_side_by_side([[stage("a", meet.format(mine=a, other=b))], [stage("b", meet.format(mine=b, other=a))]])

    assert set(runner.seconds) == {"a", "b"}


def test_failure_of_one_sequence_ends_the_others(stage, runner, tmp_path):
    ticking = stage("ticking", "import time", "while True: print('tick', flush=True); time.sleep(.01)")
    after = stage("after", f"open({str(tmp_path / 'after')!r}, 'w')")

    with pytest.raises(StageFailedError, match="'broken'"):
        runner.run_side_by_side([[ticking, after], [stage("broken", "raise SystemExit(1)")]])

    assert not (tmp_path / "after").exists()


def test_children_stay_off_the_network_and_keep_their_caches_apart(stage, runner, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    first, second = stage("first", show), stage("second", show)

    runner.run(first, second, threads=1)

    seen = [json.loads(each.log.read_text()) for each in (first, second)]
    for environment, name in zip(seen, ("first", "second"), strict=True):
        assert environment["HF_HUB_OFFLINE"] == environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")
        for cache in ("HF_HOME", "HF_DATASETS_CACHE"):
            assert environment[cache].startswith(str(tmp_path / "caches" / name))
    assert os.environ["HF_HUB_OFFLINE"] == "0"
