"""Programs: the text that is executed, and that it counts only if the tests pass."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from flexolmo_hf.errors import SandboxError
from flexolmo_hf.evaluation.suite.programs import mbpp_examples, score_humaneval, score_mbpp
from flexolmo_hf.evaluation.suite.sandbox import check_confinement

HUMANEVAL = {
    "prompt": "def double(x):\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    "entry_point": "double",
}
MBPP = {"text": "Double it.", "test_list": ["assert double(4) == 8", "assert double(0) == 0"]}


@pytest.fixture
def executed(monkeypatch):
    """Execute programs in this process instead of the sandbox; they are the tests' own."""
    programs = []

    def run_python(program):
        programs.append(program)
        try:
            exec(program, {})
        except Exception as error:
            return SimpleNamespace(passed=False, reason=type(error).__name__)
        return SimpleNamespace(passed=True, reason="")

    module = ModuleType("sandbox")
    module.run_python = run_python
    monkeypatch.setitem(sys.modules, "flexolmo_hf.evaluation.suite.sandbox", module)
    return programs


@pytest.mark.parametrize(("body", "passed"), [("    return x * 2", 1.0), ("    return x", 0.0), ("    retur", 0.0)])
def test_a_function_of_humaneval_passes_if_its_check_does(executed, body, passed):
    assert score_humaneval(HUMANEVAL, [body]) == {"pass_at_1": passed}


@pytest.mark.parametrize(("operation", "passed"), [("x * 2", 1.0), ("x + 4", 0.0), ("2 ** x - 8", 0.0)])
def test_a_program_of_mbpp_has_to_pass_all_of_its_tests(executed, operation, passed):
    assert score_mbpp(MBPP, [f"def double(x):\n    return {operation}\n"]) == {"pass_at_1": passed}


def test_a_program_of_mbpp_plus_has_to_pass_the_longer_tests(executed):
    longer = {**MBPP, "test_imports": ["import math"], "test": "assert double(math.inf) == math.inf\nassert False"}

    assert score_mbpp(longer, ["def double(x):\n    return x * 2\n"]) == {"pass_at_1": 0.0}


def test_what_the_tests_of_mbpp_need_stands_before_them(executed):
    needing = {
        "test_imports": ["import math"],
        "test_setup_code": "four = 4",
        "test_list": ["assert f(four) == math.inf"],
    }

    assert score_mbpp(needing, ["def f(x):\n    return math.inf * x\n"]) == {"pass_at_1": 1.0}


def test_the_challenging_tests_of_mbpp_do_not_count(executed):
    harder = {**MBPP, "challenge_test_list": ["assert False"]}

    assert score_mbpp(harder, ["def double(x):\n    return x * 2\n"]) == {"pass_at_1": 1.0}


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("[x / 3, (x, x)]", 1.0),
        ("[x / 3 + 1e-9, (x, x)]", 1.0),
        ("[x / 3 + 1e-3, (x, x)]", 0.0),
        ("[x / 3]", 0.0),
        ("None", 0.0),
    ],
)
def test_tests_that_compare_by_numpy_run_in_the_sandbox_which_has_none(answer, passed):
    try:
        check_confinement()
    except SandboxError as error:
        pytest.skip(str(error))
    test = """import numpy as np

def check(candidate):
    assert not isinstance(candidate(1), np.ndarray)
    out = candidate(1)
    if out != [0.3333333333333333, (1, 1)]:
        np.testing.assert_allclose(out, [0.3333333333333333, (1, 1)], rtol=1e-07, atol=1e-06)
"""
    doc = {"prompt": "def third(x):\n", "test": test, "entry_point": "third"}

    assert score_humaneval(doc, [f"    return {answer}"]) == {"pass_at_1": passed}


def test_the_programs_shown_as_examples_pass_their_own_tests(executed):
    assert all(score_mbpp(one, [one["code"]]) == {"pass_at_1": 1.0} for one in mbpp_examples())
    assert len(executed) == 3
