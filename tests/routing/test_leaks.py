"""Nearness to private documents: the cosine is the nearest one's, words are found however they are written."""

import numpy as np
import pytest

from flexolmo_hf.routing.embedded import Batch
from flexolmo_hf.routing.leaks import LeakLimits, NearestPrivate, sequence_hashes

WORDS = [f"word{number}" for number in range(60)]


def text(start, stop):
    return " ".join(WORDS[start:stop])


def units(*rows):
    matrix = np.array(rows, np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def compared(texts, private, unit_BW=None):
    nearness = NearestPrivate(Batch(list(range(len(texts))), texts, units(*[[1, 0]] * len(texts))))
    assert list(nearness.comparing_words(enumerate(private))) == list(enumerate(private))
    if unit_BW is not None:
        nearness.compare_embeddings(unit_BW)
    return nearness


def test_a_sequence_is_thirteen_words():
    assert len(sequence_hashes(text(0, 20))) == 8
    assert np.intersect1d(sequence_hashes(text(0, 20)), sequence_hashes(text(7, 30))).size == 1
    assert np.intersect1d(sequence_hashes(text(0, 20)), sequence_hashes(text(8, 30))).size == 0


def test_the_same_words_in_another_order_are_another_sequence():
    turned = " ".join(reversed(WORDS[:13]))

    assert np.intersect1d(sequence_hashes(text(0, 13)), sequence_hashes(turned)).size == 0


@pytest.mark.parametrize(
    "same",
    [
        text(0, 20).upper(),
        text(0, 20).replace(" ", ",\n\t"),
        f"- {text(0, 20)} !",
        text(0, 20).replace("word", "ｗｏｒｄ"),
    ],
)
def test_case_punctuation_white_space_and_letter_forms_hide_nothing(same):
    assert np.array_equal(sequence_hashes(same), sequence_hashes(text(0, 20)))


def test_a_script_without_spaces_is_compared_by_its_characters():
    private = "".join(chr(0x4E00 + number) for number in range(40))

    assert compared([private[5:30]], [private]).overlap_M.tolist() == [1.0]


def test_a_short_document_is_found_if_it_is_the_same_but_not_as_the_beginning_of_another():
    assert compared([text(0, 5)], [text(0, 5)]).overlap_M.tolist() == [1.0]
    assert compared([text(0, 5)], [text(0, 6), text(0, 30)]).overlap_M.tolist() == [0.0]


def test_a_document_without_words_overlaps_with_nothing():
    assert compared(["--- !!!", ""], ["--- !!!", ""]).overlap_M.tolist() == [0.0, 0.0]


def test_the_overlap_counts_a_sequence_once_however_many_private_documents_hold_it():
    # 28 sequences, of which 8 are in the private documents, some of them twice.
    nearness = compared([text(0, 40), text(40, 60)], [text(0, 18), text(2, 20), text(0, 18)])

    assert nearness.overlap_M.tolist() == [8 / 28, 0.0]


def test_the_cosine_is_that_of_the_nearest_private_document_of_all_batches():
    nearness = NearestPrivate(Batch([0, 1], ["a", "b"], units([1, 0, 0], [0, 1, 0])))
    private = np.random.default_rng(0).normal(size=(700, 3)).astype(np.float32)
    private /= np.linalg.norm(private, axis=1, keepdims=True)
    for part in (private[:600], private[600:]):
        nearness.compare_embeddings(part)

    assert np.array_equal(nearness.cosine_M, private[:, :2].max(axis=0))


def test_near_duplicates_are_told_by_either_measure_and_counted_once():
    texts = [text(0, 20), text(20, 40), text(0, 40), text(40, 60)]
    nearness = NearestPrivate(Batch([0, 1, 2, 3], texts, units([1, 0], [1, 0.1], [0, 1], [0.5, 1])))
    list(nearness.comparing_words(enumerate([text(0, 20)])))
    nearness.compare_embeddings(units([1, 0]))
    limits = LeakLimits(nearness, cosine=0.95, overlap=0.5)
    report = limits.report([2, 3])

    assert limits.allowed() == [2, 3]
    assert (report.removed, report.removed_by_cosine, report.removed_by_overlap) == (2, 2, 1)
    assert (report.candidates, report.private_documents, report.sharing) == (4, 1, 1)
    assert report.distance["100%"] == pytest.approx(1.0)
    assert report.distance["0%"] == pytest.approx(1 - 0.5 / np.sqrt(1.25))
    assert report.overlap["100%"] == pytest.approx(8 / 28)


def test_a_report_on_nothing_chosen_has_no_quantiles():
    report = LeakLimits(compared([text(0, 20)], [text(0, 20)]), cosine=0.9, overlap=0.5).report([])

    assert (report.removed, report.distance, report.overlap, report.sharing) == (1, {}, {}, 0)
