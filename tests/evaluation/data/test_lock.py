import copy

import pytest

from flexolmo_hf.errors import LockMismatchError
from flexolmo_hf.evaluation.data.lock import compare_with_lock, read_lock
from flexolmo_hf.evaluation.data.mini import DOMAINS, OWNERS, Budgets

LOCK = read_lock()


def test_build_that_is_the_locked_one_is_compared_in_every_domain():
    assert compare_with_lock(copy.deepcopy(LOCK)) == DOMAINS


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (("splits", "test", "sha256"), "math/test"),
        (("splits", "train", "tokens"), "math/train"),
        (("copies_dropped",), "math/copies_dropped"),
    ],
)
def test_build_that_differs_is_refused_with_the_place(place, says):
    record = copy.deepcopy(LOCK)
    row = record["domains"]["math"]
    for key in place[:-1]:
        row = row[key]
    row[place[-1]] = "other"

    with pytest.raises(LockMismatchError, match=says):
        compare_with_lock(record)


@pytest.mark.parametrize(("key", "value"), [("python", "3.99.0"), ("library", "other")])
def test_code_of_another_interpreter_is_not_compared(key, value):
    record = copy.deepcopy(LOCK)
    record["domains"]["code"] |= {key: value}
    record["domains"]["code"]["splits"]["test"]["sha256"] = "other"

    assert compare_with_lock(record) == tuple(domain for domain in DOMAINS if domain != "code")


@pytest.mark.parametrize("change", [{"seed": 1}, {"tokens": "bytes / 4"}, {"domains": ["math"]}])
def test_build_with_other_settings_is_not_compared(change):
    record = copy.deepcopy(LOCK)
    record["settings"] |= change
    record["domains"]["math"]["splits"]["test"]["sha256"] = "other"

    assert compare_with_lock(record) == ()


def test_build_of_other_packages_is_not_compared():
    record = copy.deepcopy(LOCK)
    record["packages"][next(iter(record["packages"]))] = "other"
    record["domains"]["math"]["splits"]["test"]["sha256"] = "other"

    assert compare_with_lock(record) == ()


def test_lock_file_holds_equal_budgets_and_every_count():
    budgets = Budgets()

    for domain in DOMAINS:
        splits = LOCK["domains"][domain]["splits"]
        for split, tokens in budgets.of(domain).items():
            assert tokens - 3 <= splits[split]["tokens"] <= tokens
            assert splits[split]["documents"] > 0 and len(splits[split]["sha256"]) == 64
    assert [list(LOCK["domains"][owner]["splits"]) for owner in OWNERS] == [["test", "validation", "web", "train"]] * 7


def test_lock_file_holds_no_text():
    def values(item):
        return [each for part in item.values() for each in values(part)] if isinstance(item, dict) else [item]

    assert all(len(str(value)) < 90 for value in values(LOCK["domains"]))
