"""Proxy data are the public documents of the private matter, found in a stream that need not fit into memory."""

import weakref
from itertools import islice

import numpy as np
import pytest

from flexolmo_hf import ProxySettings, select_proxy
from tests.routing.proxy_corpora import documents, encode, public_corpus

pytest.importorskip("sklearn")

PRIVATE = documents("algebra", 60, seed=1)
PUBLIC, ABOUT = public_corpus()


def choose(public=PUBLIC, private=PRIVATE, *, n=20, encoder=encode, classifier="logistic", diverse=False, **settings):
    return select_proxy(
        public,
        private,
        n=n,
        encoder=encoder,
        classifier=classifier,
        diverse=diverse,
        settings=ProxySettings(**settings),
    )


def outcome(selection):
    return selection.texts, selection.indices, selection.scores, selection.report()


def test_what_is_chosen_is_about_the_private_matter():
    assert set(choose().indices) <= ABOUT
    assert set(choose(diverse=True).indices) <= ABOUT


def test_every_chosen_text_is_the_public_document_at_its_index():
    chosen = choose()

    assert chosen.texts == [PUBLIC[index] for index in chosen.indices]
    assert len(chosen) == len(set(chosen.indices)) == 20


def test_scores_are_probabilities_from_the_best_down():
    chosen = choose()

    assert chosen.scores == sorted(chosen.scores, reverse=True)
    assert 0.5 < chosen.scores[-1] <= chosen.scores[0] <= 1


def test_every_document_that_was_not_chosen_is_scored_lower():
    few, all_of_them = choose(n=20), choose(n=len(PUBLIC) - 1, candidates=1)

    assert all_of_them.indices[:20] == few.indices
    assert all_of_them.scores[:20] == few.scores


FORMS = {
    "functions": lambda texts: lambda: iter(texts),
    "iterators": iter,
    "tuples": tuple,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("diverse", [False, True], ids=["best", "diverse"])
def test_the_choice_is_the_same_whatever_form_the_texts_come_in(form, diverse):
    expected = outcome(choose(diverse=diverse))

    assert outcome(choose(form(PUBLIC), form(PRIVATE), diverse=diverse)) == expected


def test_the_size_of_a_batch_does_not_matter():
    assert outcome(choose(batch_size=7))[:2] == outcome(choose(batch_size=500))[:2]


def test_the_same_seed_gives_the_same_choice_and_another_seed_other_samples():
    first, again, other = (outcome(choose(train_public=100, train_private=40, seed=seed)) for seed in (0, 0, 1))

    assert first == again
    assert first[2] != other[2]


class Document(str):
    """A text that can be counted while it is alive."""


@pytest.mark.parametrize("diverse", [False, True], ids=["best", "diverse"])
def test_memory_holds_the_sample_the_candidates_and_a_batch_of_a_stream(diverse):
    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for number in range(3000):
            document = Document(f"{PUBLIC[number % len(PUBLIC)]} {number}")
            document_id = Held(document, alive)
            most = max(most, len(alive))
            yield document_id.text
            del document, document_id

    chosen = choose(stream, n=10, candidates=2, train_public=100, batch_size=16, diverse=diverse)

    assert chosen.public.read == 3000
    assert most <= 100 + 10 * 2 + 2 * 16 + 4


class Held:
    """Put a text among those alive; equal texts count apart, which a set of strings would not do."""

    def __init__(self, text, alive):
        self.text = text
        text.life = life = Life()
        alive.add(life)


class Life:
    """Lives as long as the text it belongs to."""


def test_a_stream_that_can_be_read_once_is_sampled_from_its_whole_length():
    # The beginning is about one matter only: a classifier that saw nothing else would take kitchens for algebra.
    ordered = documents("garden", 300) + documents("kitchen", 300) + documents("algebra", 30)
    chosen = choose(iter(ordered), train_public=100)

    assert min(chosen.indices) >= 600


def test_repeated_public_documents_are_chosen_once():
    chosen = choose(PUBLIC * 3, n=30)

    assert len(set(chosen.texts)) == 30
    assert chosen.repeated >= 30


def test_empty_documents_and_documents_without_a_usable_embedding_are_left_out_and_counted():
    def sometimes(texts):
        counts = encode(texts)
        for row, text in enumerate(texts):
            counts[row] *= np.nan if text.startswith("NaN") else 0 if text.startswith("zero") else 1
        return counts

    spoilt = ["", " \n", *(f"NaN {text}" for text in documents("algebra", 3, seed=2)), f"zero {PUBLIC[0]}"]
    chosen = choose(spoilt + PUBLIC, [*PRIVATE, "", "NaN"], encoder=sometimes)

    assert (chosen.public.read, chosen.public.empty, chosen.public.unusable) == (len(PUBLIC) + 6, 2, 4)
    assert (chosen.private.read, chosen.private.empty, chosen.private.unusable) == (62, 1, 1)
    assert not any(text.startswith(("NaN", "zero")) for text in chosen)


def test_a_torch_encoder_and_a_numpy_encoder_give_the_same():
    torch = pytest.importorskip("torch")

    def on_torch(texts):
        return torch.from_numpy(encode(texts)).float().requires_grad_()

    assert outcome(choose(encoder=on_torch)) == outcome(choose())


def test_a_diverse_choice_is_less_like_itself_and_as_much_about_the_matter():
    # Each algebra document twice more, with its words turned around: the same embedding, another text.
    crowded = [*PUBLIC, *(" ".join(reversed(PUBLIC[place].split())) for place in sorted(ABOUT))]
    best, diverse = (choose(crowded, n=15, diverse=diverse) for diverse in (False, True))

    def different(chosen):
        return len({tuple(sorted(text.split())) for text in chosen.texts})

    assert different(best) < 15
    assert different(diverse) == 15
    assert all(index in ABOUT or index >= len(PUBLIC) for index in diverse.indices)


def test_a_classifier_of_ones_own_can_be_given():
    class Longest:
        def fit(self, texts, unit_NW, private_N, *, seed):
            assert len(texts) == len(unit_NW) == len(private_N)

        def log_odds(self, texts, unit_NW):
            return np.array([len(text) - 1000.0 for text in texts])

    longest = f"{PUBLIC[5]} " + "moss " * 200

    assert choose([*PUBLIC, longest], n=1, classifier=Longest()).indices == [len(PUBLIC)]


def test_of_a_dataset_column_the_texts_are_taken():
    datasets = pytest.importorskip("datasets")
    column = datasets.Dataset.from_dict({"text": PUBLIC})["text"]

    assert outcome(choose(column)) == outcome(choose())


def test_the_classifier_is_measured_on_documents_it_has_not_seen():
    seen, judged = [], []

    class Spy:
        def fit(self, texts, unit_NW, private_N, *, seed):
            seen.extend(texts)

        def log_odds(self, texts, unit_NW):
            judged.append(list(texts))
            return np.linspace(-1, 1, len(texts))

    report = choose(classifier=Spy()).classifier

    assert not set(judged[0]) & set(seen)
    assert set(judged[0]) | set(seen) == set(PUBLIC) | set(PRIVATE)
    assert (report.trained_private, report.held_out_private) == (48, 12)
    assert report.trained_public + report.held_out_public == len(PUBLIC)


def test_the_held_out_accuracy_is_high_where_the_matters_differ():
    report = choose(public_corpus(about=1)[0]).classifier

    assert report.accuracy > 0.95
    assert report.auc > 0.95
    assert report.calibration_error < 0.1
    assert sum(b.count for b in report.calibration) == report.held_out_public + report.held_out_private


def test_a_classifier_that_tells_nothing_is_warned_of(caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        choose(documents("algebra", 300, seed=5))
    finally:
        logging.disable_propagation()

    assert "hardly tells private documents from public ones" in caplog.text


def test_the_first_n_of_more_are_the_choice_of_n():
    assert list(islice(choose(n=25), 10)) == choose(n=10, candidates=10).texts
