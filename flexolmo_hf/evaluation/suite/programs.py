"""Counting programs: what the model wrote is executed with the task's tests, in a confined process of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

# The tests of MBPP+ and HumanEval+ compare numbers by numpy, which the sandbox has not: this is what they use of it.
_NUMPY = """
import math, sys, types

def assert_allclose(actual, desired, rtol=1e-07, atol=0):
    if isinstance(actual, (list, tuple)) or isinstance(desired, (list, tuple)):
        assert len(actual) == len(desired)
        for pair in zip(actual, desired):
            assert_allclose(*pair, rtol, atol)
    elif actual != desired and not (math.isnan(actual) and math.isnan(desired)):
        assert abs(actual - desired) <= atol + rtol * abs(desired)

numpy, testing = types.ModuleType("numpy"), types.ModuleType("numpy.testing")
testing.assert_allclose = assert_allclose
numpy.testing, numpy.inf, numpy.nan = testing, math.inf, math.nan
numpy.ndarray, numpy.float64, numpy.float32 = (type(name, (), {}) for name in ("ndarray", "float64", "float32"))
sys.modules |= {"numpy": numpy, "numpy.testing": testing}
"""


def score_mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Run a program for MBPP or MBPP+, whose longer tests stand in ``test``."""
    imports = "\n".join(doc.get("test_imports") or [])
    setup = doc.get("test_setup_code") or ""
    tests = doc.get("test") or "\n".join(doc["test_list"])
    return _passes("\n".join([imports, setup, results[0], tests]))


def score_humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Run a function for HumanEval or HumanEval+."""
    return _passes(f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n")


def _passes(program: str) -> dict[str, float]:
    from flexolmo_hf.evaluation.suite.sandbox import run_python

    stand_in = f"exec({_NUMPY!r}, {{}})\n" if "import numpy" in program else ""
    return {"pass_at_1": float(run_python(stand_in + program).passed)}


#: What executes programs in the sandbox and nowhere else.
SANDBOXED = (score_mbpp, score_humaneval)


def mbpp_examples() -> list[dict[str, Any]]:
    """Give the three programs that show a model the form of MBPP; they are in no data set."""
    return [
        _example(
            "Write a function that counts the vowels in a word.",
            "def count_vowels(word):\n    return sum(letter in 'aeiou' for letter in word.lower())",
            [
                "assert count_vowels('onion') == 3",
                "assert count_vowels('Sky') == 0",
                "assert count_vowels('EAU') == 3",
            ],
        ),
        _example(
            "Write a function that gives the difference of the largest and the smallest number in a list.",
            "def spread(numbers):\n    return max(numbers) - min(numbers)",
            ["assert spread([3, 9, 4]) == 6", "assert spread([5]) == 0", "assert spread([-2, 2]) == 4"],
        ),
        _example(
            "Write a function that keeps every second element of a tuple, beginning with the first.",
            "def every_second(items):\n    return items[::2]",
            [
                "assert every_second((1, 2, 3)) == (1, 3)",
                "assert every_second(()) == ()",
                "assert every_second(('a', 'b')) == ('a',)",
            ],
        ),
    ]


def _example(text: str, code: str, tests: list[str]) -> dict[str, Any]:
    # MBPP calls the task `text`, MBPP+ `prompt`.
    return {"text": text, "prompt": text, "code": code, "test_list": tests}
