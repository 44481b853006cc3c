"""Intervals are what drawing documents anew gives, and paired ones leave out what both measurements share."""

import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte
from flexolmo_hf.evaluation.intervals import Interval, bootstrap, bootstrap_change


def documents(*bits, size=10):
    return [BitsPerByte(bits_of_one, size, 1) for bits_of_one in bits]


def test_two_documents_are_drawn_in_the_four_ways_there_are():
    # Twice the one, both (in two of four ways), twice the other: 1, 2 or 3 bits per byte.
    found = documents(10.0, 30.0)

    assert bootstrap(found) == Interval(1.0, 3.0)
    assert bootstrap(found, level=0.4) == Interval(2.0, 2.0)


def test_a_draw_is_total_bits_over_total_bytes():
    found = [BitsPerByte(8.0, 1, 1), BitsPerByte(2.0, 9, 1)]

    assert bootstrap(found, level=0.4) == Interval(1.0, 1.0)
    assert bootstrap(found) == Interval(2 / 9, 8.0)


def test_one_document_has_no_width():
    assert bootstrap(documents(15.0)) == Interval(1.5, 1.5)
    assert bootstrap_change(documents(15.0), documents(10.0)) == Interval(0.5, 0.5)


def test_a_change_is_relative_and_drawn_as_pairs():
    # Of the two documents one doubles: a change of 0, a half or 1.
    after, before = documents(10.0, 20.0), documents(10.0, 10.0)

    assert bootstrap_change(after, before) == Interval(0.0, 1.0)
    assert bootstrap_change(after, before, level=0.4) == Interval(0.5, 0.5)


def test_what_makes_a_document_hard_for_both_cancels_out():
    before = documents(*(float(2**power) for power in range(12)))
    after = documents(*(1.1 * document.bits for document in before))
    alone, change = bootstrap(before), bootstrap_change(after, before)

    assert alone.high > 2 * alone.low
    assert (change.low, change.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_more_documents_make_a_narrower_interval_and_a_higher_level_a_wider_one():
    few, many = documents(10.0, 30.0), documents(*[10.0, 30.0] * 50)
    intervals = {"few": bootstrap(few), "many": bootstrap(many), "sure": bootstrap(many, level=0.999)}
    width = {name: interval.high - interval.low for name, interval in intervals.items()}

    assert width["many"] < width["sure"] < width["few"]
    # A standard error of 1 / sqrt(100), twice 1.96 times.
    assert width["many"] == pytest.approx(0.392, abs=0.04)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    found = documents(*(float(number * number) for number in range(1, 30)))

    assert bootstrap(found, seed=3) == bootstrap(found, seed=3)
    assert bootstrap(found, seed=3) != bootstrap(found, seed=4)
    before = documents(*[10.0] * len(found))
    assert bootstrap_change(found, before, seed=3) == bootstrap_change(found, before, seed=3)
    assert bootstrap_change(found, before, seed=3) != bootstrap_change(found, before, seed=4)


def test_both_ends_belong_to_an_interval():
    interval = Interval(-0.5, 1.0)

    assert -0.5 in interval and 1.0 in interval and 0 in interval
    assert -0.51 not in interval and 1.01 not in interval and float("nan") not in interval


@pytest.mark.parametrize(
    "before", [documents(10.0), documents(10.0, 10.0)[::-1] + documents(1.0), documents(10.0, 10.0, size=9)]
)
def test_measurements_of_other_documents_are_refused(before):
    with pytest.raises(ConfigurationError, match="not of the same documents"):
        bootstrap_change(documents(10.0, 20.0), before)


def test_no_document_is_refused():
    for measure in (lambda: bootstrap([]), lambda: bootstrap_change([], [])):
        with pytest.raises(ConfigurationError, match="no document"):
            measure()


@pytest.mark.parametrize("settings", [{"samples": 0}, {"level": 0.0}, {"level": 1.0}, {"level": 95.0}], ids=str)
def test_settings_that_make_no_interval_are_refused(settings):
    with pytest.raises(ConfigurationError, match="make no interval"):
        bootstrap(documents(10.0), **settings)
    with pytest.raises(ConfigurationError, match="make no interval"):
        bootstrap_change(documents(10.0), documents(10.0), **settings)
