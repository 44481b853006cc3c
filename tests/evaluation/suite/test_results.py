"""Results: what was measured comes back from disk as it was, means say what they are of, failures are no zeros."""

import json

import pytest

from flexolmo_hf.errors import ConfigurationError, DamagedFileError, OutputFolderNotEmptyError
from flexolmo_hf.evaluation.suite.results import SetResult, SuiteResult, TaskResult
from flexolmo_hf.evaluation.suite.table import markdown


def task(name, value, variant="harness", metric="acc", **more):
    return TaskResult(name, variant, metric, value, **more)


def of_sets(**tasks):
    sets = [SetResult(name.replace("_", "+"), (name,), f"key-{name}", tuple(t), 1.0) for name, t in tasks.items()]
    return SuiteResult("model", "flex_olmo", "f" * 64, tuple(sets), {"limit": 5, "versions": {"torch": "2"}})


@pytest.fixture
def result():
    return of_sets(
        public=[task("gsm8k", 0.2, stderr=0.01, count=10), task("math", 0.4), task("boolq", 0.6)],
        public_math=[task("gsm8k", 0.5), task("math", 0.7), task("boolq", 0.5)],
    )


def test_a_category_is_the_mean_of_its_tasks_and_the_average_that_of_the_categories(result):
    public = result.sets[0]
    means = public.category_means("harness")

    assert {name: (round(mean.value, 9), mean.of, mean.out_of) for name, mean in means.items()} == {
        "mc9": (0.6, 1, 9),
        "math2": (0.3, 2, 2),
    }
    # Not the mean of the three tasks, which is 0.4.
    assert public.average("harness").value == pytest.approx(0.45)
    assert (public.average("harness").of, public.average("harness").out_of) == (2, 10)


def test_what_could_not_be_scored_is_left_out_of_the_means_and_shown_as_failed():
    found = of_sets(
        public=[task("newsg", None, metric="judge", failed=7), task("poemg", 0.4, metric="judge", failed=1)]
    )
    mean = found.sets[0].category_means("harness")["writing2"]

    assert (mean.value, mean.of) == (0.4, 1)
    assert "| newsg | judge | failed |" in markdown(found)
    assert "| poemg | judge | 40.0 (1 failed) |" in markdown(found)


def test_bits_per_byte_and_shares_are_never_averaged_together():
    mixed = [task("boolq", 0.5, "x"), task("piqa", 1.5, "x", "bits_per_byte"), task("gsm8k", 0.5, "x")]
    one = of_sets(public=mixed).sets[0]

    assert list(one.category_means("x")) == ["math2"]
    assert one.average("x") is None


def test_results_come_back_from_a_folder_as_they_were(tmp_path, result):
    result.save(tmp_path / "out")

    assert SuiteResult.load(tmp_path / "out") == result
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["results.json", "results.md", "results.png"]
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    means = json.loads((tmp_path / "out" / "results.json").read_text())["sets"][1]["means"]["harness"]
    assert means["average"] == {"value": pytest.approx(0.55), "of": 2, "out_of": 10}


def test_a_folder_that_holds_something_is_refused(tmp_path, refused, result):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")

    with refused(OutputFolderNotEmptyError, "out"):
        result.save(tmp_path / "out")


def test_a_failure_while_writing_leaves_no_folder(tmp_path, monkeypatch, result):
    def fail(*arguments):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("flexolmo_hf.evaluation.suite.plot.plot_results", fail)
    with pytest.raises(RuntimeError):
        result.save(tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_results_is_refused(tmp_path, refused):
    with refused(ConfigurationError, "results.json"):
        SuiteResult.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', '{"format": "flexolmo-suite-results/1"}'])
def test_a_file_of_another_kind_is_refused(tmp_path, refused, text):
    (tmp_path / "results.json").write_text(text)
    with refused(DamagedFileError, "results.json"):
        SuiteResult.load(tmp_path)


def test_the_table_has_a_column_for_each_set_and_a_row_for_each_mean(result):
    lines = markdown(result).splitlines()

    assert "| task | metric | public | public+math |" in lines
    assert "| gsm8k | acc | 20.0 ± 1.0 | 50.0 |" in lines
    assert "| **math2, mean** | 2 of 2 tasks | **30.0** | **60.0** |" in lines
    assert "| **average** | 2 of 10 categories | **45.0** | **55.0** |" in lines


def test_means_of_different_numbers_of_tasks_are_never_shown_as_if_alike():
    found = of_sets(public=[task("gsm8k", 0.2), task("math", None)], math=[task("gsm8k", 0.4), task("math", 0.8)])

    assert "| **math2, mean** | of 2 tasks | **20.0** of 1 | **60.0** of 2 |" in markdown(found)


def test_each_variant_has_its_own_table():
    found = of_sets(public=[task("boolq", 0.5, "mc"), task("boolq", 1.25, "bpb", "bits_per_byte")])
    page = markdown(found)

    assert page.index("## mc") < page.index("| boolq | acc | 50.0 |") < page.index("## bpb")
    assert "| boolq | bits_per_byte | 1.250 |" in page
    assert "| **mc9, mean** | 1 of 9 tasks | **1.250** |" in page
    assert "| **average** | 1 of 10 categories | **1.250** |" in page
