import subprocess
import sys

import pytest

from flexolmo_hf.evaluation.data.copies import SeenText


def words(first, count):
    return " ".join(f"word{n}" for n in range(first, first + count))


def test_copy_is_known_and_new_text_is_not():
    seen = SeenText()

    assert seen.add_unless_copy(words(0, 50))
    assert not seen.add_unless_copy(words(0, 50))
    assert seen.add_unless_copy(words(50, 50))


def test_share_of_known_runs_decides():
    def added(most_shared):
        seen = SeenText()
        seen.add_unless_copy(words(0, 107))
        # Of 100 runs 40 are known.
        return seen.add_unless_copy(words(60, 107), most_shared=most_shared)

    assert added(0.41) and not added(0.39)


@pytest.mark.parametrize(("known", "new"), [("one {}", "other {}"), ("{} one", "{} other")], ids=["first", "last"])
def test_a_run_with_another_first_or_last_word_is_another_run(known, new):
    seen = SeenText()
    seen.add_unless_copy(known.format(words(0, 8)))

    # Of its two runs one is known, which is no more than half.
    assert seen.add_unless_copy(new.format(words(0, 8)))


def test_the_order_of_words_counts():
    seen = SeenText()
    seen.add_unless_copy(words(0, 60))

    assert seen.add_unless_copy(" ".join(reversed(words(0, 60).split())))


def test_refused_copy_adds_nothing():
    seen = SeenText()
    seen.add_unless_copy(words(0, 60))

    assert not seen.add_unless_copy(words(10, 60))
    assert seen.add_unless_copy(words(55, 60))


def test_short_documents_are_copies_only_when_they_are_equal():
    seen = SeenText()

    assert seen.add_unless_copy("one two three")
    assert seen.add_unless_copy("one two")
    assert not seen.add_unless_copy("one  two\nthree")


def test_hardly_any_new_text_is_taken_for_known():
    seen = SeenText()
    for place in range(200):
        seen.add_unless_copy(words(1_000 * place, 1_000))

    # Documents of two runs: the shortest that chance could hit.
    assert all(seen.add_unless_copy(words(1_000_000 + 9 * place, 9)) for place in range(3_000))


def test_every_process_finds_the_same_copies():
    code = "from flexolmo_hf.evaluation.data.copies import _places; print(_places(list('abcdefghij')).tolist())"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]

    assert found[0] == found[1] != ""
