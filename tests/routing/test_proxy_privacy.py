"""Of the private documents nothing leaves but numbers, in what is given back, printed, logged or written."""

import gc
import json
import logging as python_logging
import stat

import numpy as np
import pytest
from transformers.utils import logging

from flexolmo_hf import ProxySelection, ProxySettings, select_proxy
from flexolmo_hf.errors import OutputFolderNotEmptyError
from flexolmo_hf.routing.classifier import LogisticClassifier
from tests.routing.proxy_corpora import documents, encode, public_corpus

pytest.importorskip("sklearn")

PUBLIC, ABOUT = public_corpus()
# Each private document has words that occur nowhere else.
PRIVATE = [f"{text} secret{number}" for number, text in enumerate(documents("algebra", 60, seed=1))]


def choose(public=PUBLIC, private=PRIVATE, *, n=20, encoder=encode, diverse=False, **settings):
    return select_proxy(public, private, n=n, encoder=encoder, diverse=diverse, settings=ProxySettings(**settings))


def everything_in(value):
    """All objects that can be reached from one, types and modules aside."""
    seen, waiting = {}, [value]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type) or type(thing).__name__ in ("module", "function"):
            continue
        seen[id(thing)] = thing
        waiting.extend(gc.get_referents(thing))
        if isinstance(thing, np.ndarray) and thing.base is not None:
            waiting.append(thing.base)
    return list(seen.values())


@pytest.mark.parametrize("diverse", [False, True], ids=["best", "diverse"])
def test_no_private_text_is_in_what_is_given_back_printed_logged_or_written(tmp_path, caplog, capfd, diverse):
    logging.enable_propagation()
    caplog.set_level(python_logging.DEBUG)
    try:
        chosen = choose(diverse=diverse)
        chosen.save(tmp_path / "OUT")
    finally:
        logging.disable_propagation()
    reachable = [thing for thing in everything_in(chosen) if isinstance(thing, (str, bytes))]
    written = [file.read_text("utf8") for file in (tmp_path / "OUT").rglob("*") if file.is_file()]
    said = [repr(chosen), str(chosen), caplog.text, *capfd.readouterr(), json.dumps(chosen.report())]

    assert any(text in PUBLIC for text in reachable)
    assert not [text for text in [*map(str, reachable), *written, *said] if "secret" in text]


def test_no_embedding_and_no_classifier_is_in_what_is_given_back():
    kinds = {type(thing) for thing in everything_in(choose())}

    assert np.ndarray not in kinds
    assert not [kind for kind in kinds if kind.__module__.startswith("sklearn")]


def test_the_files_are_the_choice_and_numbers(tmp_path):
    chosen = choose()
    chosen.save(tmp_path / "OUT")
    report = json.loads((tmp_path / "OUT" / "owner" / "report.json").read_text("utf8"))

    assert sorted(file.name for file in (tmp_path / "OUT").iterdir()) == ["owner", "proxy.jsonl"]
    assert sorted(file.name for file in (tmp_path / "OUT" / "owner").iterdir()) == [
        "report.json",
        "report.md",
        "scores.jsonl",
    ]
    assert strings_in(report) == {"LogisticClassifier"}
    assert f"{chosen.classifier.accuracy:.3f}" in (tmp_path / "OUT" / "owner" / "report.md").read_text("utf8")


def test_what_is_passed_on_is_public_text_and_its_place_in_the_order_of_the_corpus(tmp_path):
    chosen = choose()
    chosen.save(tmp_path / "OUT")

    assert chosen.indices != sorted(chosen.indices)
    assert rows_of(tmp_path / "OUT" / "proxy.jsonl") == [
        {"text": PUBLIC[index], "index": index} for index in sorted(chosen.indices)
    ]


def test_scores_and_reports_can_be_opened_by_the_owner_alone(tmp_path):
    chosen = choose()
    chosen.save(tmp_path / "OUT")
    owner = tmp_path / "OUT" / "owner"

    assert rows_of(owner / "scores.jsonl") == [
        {"index": index, "score": score} for index, score in zip(chosen.indices, chosen.scores, strict=True)
    ]
    assert stat.S_IMODE(owner.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in owner.iterdir()} == {0o600}


def test_the_classifier_follows_from_the_scores_and_not_from_the_numbers_that_are_passed_on(tmp_path):
    corpus, about = public_corpus(about=200)
    judge = LogisticClassifier()
    chosen = select_proxy(corpus, PRIVATE, n=120, encoder=encode, classifier=judge)
    chosen.save(tmp_path / "OUT")
    rows = rows_of(tmp_path / "OUT" / "proxy.jsonl")
    # Of documents that are all about the private matter; the others are told by what they are about.
    others = [corpus[index] for index in sorted(about - set(chosen.indices))]
    answers = judge.log_odds(others, unit(others))

    def with_constant(texts):
        return np.c_[unit(texts), np.ones(len(texts))]

    def told(texts, numbers):
        """How well numbers beside texts, taken for the classifier's answers, tell its answers to other texts."""
        weights, *_ = np.linalg.lstsq(with_constant(texts), numbers, rcond=None)
        return abs(np.corrcoef(with_constant(others) @ weights, answers)[0, 1])

    texts = [row["text"] for row in rows]
    numbers = {key: [row[key] for row in rows] for key in rows[0] if key != "text"} | {"line": range(len(rows))}
    scores = np.array(chosen.scores)
    assert told(chosen.texts, np.log(scores / (1 - scores))) > 0.999
    assert told(chosen.texts, range(len(chosen))) > 0.9
    assert numbers.keys() == {"index", "line"}
    assert {key: told(texts, column) < 0.5 for key, column in numbers.items()} == dict.fromkeys(numbers, True)


def rows_of(file):
    return [json.loads(line) for line in file.read_text("utf8").splitlines()]


def strings_in(value):
    if isinstance(value, dict):
        return set().union(*map(strings_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(strings_in, value), set())
    return {value} if isinstance(value, str) else set()


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "mine").touch()

    with pytest.raises(OutputFolderNotEmptyError):
        choose().save(tmp_path / "OUT")
    assert [file.name for file in (tmp_path / "OUT").iterdir()] == ["mine"]


def test_the_shown_form_is_a_line_without_documents():
    shown = repr(choose())

    assert shown.startswith(f"{ProxySelection.__name__}(20 of {len(PUBLIC)} public documents, held-out accuracy ")
    assert not any(text in shown for text in PUBLIC)


COPIES = {
    "word for word": lambda text: text,
    "in capitals": str.upper,
    "with a line of its own before it": lambda text: f"Found elsewhere:\n{text}",
    "with one word less": lambda text: text.rsplit(" ", 2)[0],
    "its words in another order": lambda text: " ".join(reversed(text.split())),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("sampled", [60, 20], ids=["all are sampled", "a few are sampled"])
def test_a_copy_of_any_private_document_is_not_chosen(copy, sampled):
    copies = [copy(text) for text in PRIVATE]
    chosen = choose(copies + PUBLIC, n=10, candidates=20, train_private=sampled)

    assert min(chosen.indices) >= len(copies)
    assert chosen.leaks.removed >= len(copies)
    assert chosen.leaks.private_documents == len(PRIVATE)


def test_a_copy_of_a_private_document_that_has_no_embedding_is_not_chosen():
    def refuses_some(texts):
        counts = encode(texts)
        counts[[text.endswith("secret7") for text in texts]] = np.nan
        return counts

    copied = f"{PRIVATE[7]} and more"
    chosen = choose([copied, *PUBLIC], encoder=refuses_some)

    assert chosen.private.unusable == 1
    assert chosen.leaks.removed_by_overlap == 1
    assert copied not in chosen.texts


def test_a_diverse_choice_leaves_copies_out_as_well():
    chosen = choose(PRIVATE + PUBLIC, n=10, candidates=20, diverse=True)

    assert min(chosen.indices) >= len(PRIVATE)


def test_a_choice_that_becomes_too_small_is_warned_of(caplog):
    logging.enable_propagation()
    try:
        chosen = choose(PRIVATE + PUBLIC, n=15, candidates=1, cosine_limit=0.999)
    finally:
        logging.disable_propagation()

    assert len(chosen) < 15
    assert "the other candidates are near-duplicates" in caplog.text
    assert len(chosen) + chosen.leaks.removed == 15


def test_the_report_counts_what_was_chosen_near_private_documents():
    found = choose(cosine_limit=1.0, overlap_limit=1.0)
    report, (chosen_NW, private_BW) = found.leaks, map(unit, (found.texts, PRIVATE))
    distances = [1 - max(private_BW @ row) for row in chosen_NW]

    assert report.distance["50%"] == pytest.approx(np.median(distances), abs=1e-6)
    assert report.distance["0%"] == pytest.approx(min(distances), abs=1e-6)


def unit(texts):
    rows = encode(texts)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
