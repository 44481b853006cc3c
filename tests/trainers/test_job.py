"""A training run from a file: what it makes, and that a mistake in it ends before anything is left behind."""

import json
import logging as python_logging
import os
import shutil
import signal
import threading
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from transformers.utils import logging

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import (
    ConfigurationError,
    DamagedFileError,
    FlexOlmoError,
    UnknownArgumentError,
    UnknownExpertError,
)
from flexolmo_hf.trainers.data_copies import folder_of_copies
from flexolmo_hf.trainers.expert import ExpertSFTTrainer
from flexolmo_hf.trainers.job import read_job, run_job
from tests.trainers.conftest import TEXT
from tests.trainers.launching import launch
from tests.trainers.test_freezing import belongs_to, state


@pytest.fixture
def place(tmp_path, model, tokenizer, monkeypatch):
    """The working directory: `START`, a model with the expert math, and `data.jsonl`."""
    model.save_pretrained(tmp_path / "START")
    tokenizer.save_pretrained(tmp_path / "START")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(place, text=None, **changes):
    """Write a job file and read it back."""
    settings = {
        "model_path": "START",
        "data": ["data.jsonl"],
        "expert": "math",
        "output_dir": "RUN",
        "max_steps": 2,
        "max_length": 32,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    (place / "job.yaml").write_text(yaml.safe_dump(settings) if text is None else text)
    return read_job(place / "job.yaml")


def test_a_job_trains_one_expert_and_leaves_no_copy_of_the_data(place, model):
    run_job(*job(place, learning_rate=1e-2, weight_decay=0.1))
    trained = state(FlexOlmoForCausalLM.from_pretrained("RUN"))

    for key, before in state(model).items():
        assert torch.equal(trained[key], before) == (not belongs_to(key, 1) and ".mlp.gate." not in key), key
    assert not any(
        "abc abc" in file.read_text(errors="replace") for file in (place / "RUN").rglob("*") if file.is_file()
    )
    assert not [file for file in (place / "RUN").iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("kind", ["text", "prompt and completion", "parquet", "folder"])
def test_data_may_come_in_several_forms(place, kind):
    from datasets import Dataset

    if kind == "text":
        (place / "data.txt").write_text("one\ntwo\n")
    if kind == "parquet":
        Dataset.from_list(TEXT).to_parquet(str(place / "data.parquet"))
    if kind == "prompt and completion":
        (place / "pairs.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "completion": " 2"}) + "\n")
    if kind == "folder":
        (place / "folder" / "deep").mkdir(parents=True)
        (place / "data.jsonl").rename(place / "folder" / "deep" / "data.jsonl")
    files = {"text": "data.txt", "parquet": "data.parquet", "prompt and completion": "pairs.jsonl", "folder": "folder"}
    run_job(*job(place, data=[files[kind]], max_steps=1))

    assert (place / "RUN" / "expert_training.json").is_file()


def test_numbers_may_be_written_without_a_point(place):
    text = "model_path: START\ndata: [data.jsonl]\nexpert: math\noutput_dir: RUN\nuse_cpu: true\nlearning_rate: 3e-4\n"

    assert job(place, text)[1].learning_rate == 3e-4


REFUSED_FILES = {
    "no YAML": (": : :", ConfigurationError, "is not YAML"),
    "a list": ("- a\n- b\n", ConfigurationError, "It needs model_path"),
    "nothing": ("", ConfigurationError, "It needs model_path"),
}


@pytest.mark.parametrize(("text", "error", "says"), REFUSED_FILES.values(), ids=REFUSED_FILES)
def test_a_file_that_is_no_job_is_refused(place, text, error, says):
    with pytest.raises(error, match=says):
        job(place, text)


REFUSED_SETTINGS = {
    "no model": ({"model_path": None}, ConfigurationError, "It needs model_path"),
    "a misspelt key": ({"expret": "math"}, UnknownArgumentError, "Did you mean 'expert'"),
    "a word for a number": ({"learning_rate": "fast"}, ConfigurationError, "learning_rate is 'fast'"),
    "half a step": ({"max_steps": "2.5"}, ConfigurationError, "max_steps is '2.5'"),
    "a misspelt expert": ({"expert": "maht"}, UnknownExpertError, "Did you mean 'math'"),
    "no such model": ({"model_path": "./NOWHERE"}, FlexOlmoError, "NOWHERE"),
    "no such data": ({"data": ["nowhere.jsonl"]}, ConfigurationError, "no data at 'nowhere.jsonl'"),
    "data of no known kind": ({"data": ["job.yaml"]}, ConfigurationError, "no known kind"),
    "broken rows": ({"data": ["broken.jsonl"]}, DamagedFileError, "'broken.jsonl'"),
    "rows without text": ({"data": ["other.jsonl"]}, ConfigurationError, "nothing to train on"),
}


@pytest.mark.parametrize(("changes", "error", "says"), REFUSED_SETTINGS.values(), ids=REFUSED_SETTINGS)
def test_a_mistake_is_named_and_leaves_no_output_and_says_nothing_private(place, capfd, changes, error, says):
    (place / "broken.jsonl").write_text('{"text": "a secret"\nsecret')
    (place / "other.jsonl").write_text('{"words": "a secret"}\n')

    with pytest.raises(error, match=says) as caught:
        run_job(*job(place, **changes))
    said = str(caught.value) + "".join(capfd.readouterr())
    assert "secret" not in said + "".join(traceback.format_exception(caught.value))
    assert str(place) not in said
    assert not (place / "RUN").exists()


def test_what_a_killed_run_left_is_removed_when_the_next_one_starts(place, monkeypatch):
    left = place / "RUN" / ".data-abc" / "json"
    left.mkdir(parents=True)
    (left / "json-train.arrow").write_text("a secret")
    seen = []
    monkeypatch.setattr(ExpertSFTTrainer, "train", lambda *_, **__: seen.append(left.parent.exists()))
    run_job(*job(place))

    assert seen == [False]
    assert not hidden(place)


def test_the_copies_of_another_run_that_still_lives_stay(place, caplog):
    used = place / "RUN" / ".data-abc"
    used.mkdir(parents=True)
    _, args = job(place)
    logging.enable_propagation()
    caplog.set_level(python_logging.WARNING)
    try:
        with FileLock(used / "lock"), folder_of_copies(place / "RUN", args):
            pass
    finally:
        logging.disable_propagation()

    assert [folder.name for folder in hidden(place)] == [".data-abc"]
    assert "'.data-abc' belongs to another run" in caplog.text


@pytest.fixture
def guarded():
    """A handler of the test's own for SIGTERM, which would otherwise end the tests."""

    def forgotten(number, frame):
        raise AssertionError("SIGTERM came through")

    former = signal.signal(signal.SIGTERM, forgotten)
    yield forgotten
    signal.signal(signal.SIGTERM, former)


def terminate(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_a_scheduler_ends_leaves_no_copy_of_the_data(place, monkeypatch, guarded):
    during = []
    monkeypatch.setattr(ExpertSFTTrainer, "train", lambda *_, **__: (during.extend(hidden(place)), terminate()))

    with pytest.raises(SystemExit) as ended:
        run_job(*job(place))
    assert ended.value.code == 128 + signal.SIGTERM
    assert len(during) == 1
    assert not (place / "RUN").exists()
    assert signal.getsignal(signal.SIGTERM) is guarded


def test_a_second_signal_does_not_interrupt_the_removal(place, monkeypatch, guarded):
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *given, **named: (terminate(), remove(*given, **named)))
    monkeypatch.setattr(ExpertSFTTrainer, "train", terminate)

    with pytest.raises(SystemExit):
        run_job(*job(place))
    assert not (place / "RUN").exists()
    assert signal.getsignal(signal.SIGTERM) is guarded


def test_copies_can_be_held_in_a_thread_where_no_signal_can_be_handled(place):
    _, args = job(place)
    (place / "RUN").mkdir()
    found = []

    def hold():
        with folder_of_copies(place / "RUN", args) as folder:
            found.append(folder.is_dir())

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()

    assert found == [True]
    assert not hidden(place)


def test_two_processes_read_one_copy_of_the_data(place):
    (place / "RUN").mkdir()
    launch(Path(__file__).parent / "copies_worker.py", place)
    first, second = (json.loads((place / f"rank{rank}.json").read_text()) for rank in (0, 1))

    assert first == second
    assert first["copies"] == [first["file"]]
    assert first["rows"] == [row["text"] for row in TEXT]
    assert not hidden(place)


def hidden(place):
    return list((place / "RUN").glob(".*"))
