import hashlib
import subprocess
import sys

import numpy as np
import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.decontamination import Decontaminator, run_hashes

QUESTION = "A train leaves the station at noon and travels north for three hours at ninety miles each hour."
WORDS = QUESTION.rstrip(".").split()


def text_around(run):
    return f"Something before it all. {run} And something after."


def test_a_document_with_thirteen_words_in_common_is_contaminated():
    decontaminator = Decontaminator([QUESTION])

    for start in range(len(WORDS) - 12):
        assert decontaminator.is_contaminated(text_around(" ".join(WORDS[start : start + 13])))


def test_a_document_with_twelve_words_in_common_is_clean():
    decontaminator = Decontaminator([QUESTION])

    for start in range(len(WORDS) - 11):
        assert not decontaminator.is_contaminated(text_around(" ".join(WORDS[start : start + 12])))


def test_the_order_of_words_counts():
    assert not Decontaminator([QUESTION]).is_contaminated(" ".join(reversed(WORDS)))


# Thirteen words: a document is found by all of them or not at all.
RUN = " ".join(WORDS[:13])


@pytest.mark.parametrize(
    "disguised",
    [RUN.upper(), RUN.replace(" ", "\n\t"), ", ".join(WORDS[:13]), RUN.replace("station", "ｓｔａｔｉｏｎ")],
    ids=["case", "white space", "punctuation", "wide letters"],
)
def test_case_space_punctuation_and_letter_forms_hide_nothing(disguised):
    assert Decontaminator([RUN]).is_contaminated(disguised)


def test_a_short_document_is_contaminated_only_if_it_equals_an_evaluation_text():
    decontaminator = Decontaminator(["What is seven times eight?", QUESTION])

    assert decontaminator.is_contaminated("what is SEVEN times eight")
    assert not decontaminator.is_contaminated("What is seven times eighty?")
    assert not decontaminator.is_contaminated("What is seven times")
    assert not decontaminator.is_contaminated(" ".join(WORDS[:12]))


def test_a_short_evaluation_text_is_not_looked_for_inside_documents():
    assert not Decontaminator(["What is seven times eight?"]).is_contaminated(text_around("What is seven times eight?"))


def test_the_split_names_dropped_documents_by_their_sha256_alone():
    contaminated = text_around(QUESTION)

    clean, dropped = Decontaminator([QUESTION]).split(["one", contaminated, "two"])

    assert clean == ["one", "two"]
    assert dropped == [hashlib.sha256(contaminated.encode()).hexdigest()]


def test_the_length_of_a_run_is_the_callers():
    decontaminator = Decontaminator([QUESTION], words=3)

    assert decontaminator.is_contaminated("the station at")
    assert not decontaminator.is_contaminated("the station")


@pytest.mark.parametrize("texts", [[], ["", "  ...  "]], ids=["none", "without words"])
def test_nothing_is_contaminated_when_there_is_nothing_to_compare_with(texts):
    decontaminator = Decontaminator(texts)

    assert not decontaminator.is_contaminated("")
    assert not decontaminator.is_contaminated(QUESTION)


def test_many_texts_read_in_parts_are_all_remembered(monkeypatch):
    monkeypatch.setattr("flexolmo_hf.evaluation.data.decontamination._AT_ONCE", 40)
    texts = [" ".join(f"w{number}x{word}" for word in range(15)) for number in range(100)]

    decontaminator = Decontaminator(iter(texts))

    assert len(decontaminator) == 300
    assert decontaminator.split(texts)[0] == []


def test_broken_characters_are_compared_too():
    text = QUESTION.replace("noon", "\ud800")

    assert Decontaminator([text]).split([text])[0] == []


def test_hashes_are_the_same_in_another_process():
    code = (
        "from flexolmo_hf.evaluation.data.decontamination import run_hashes;"
        f"print(run_hashes({QUESTION!r}, 13).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == str(run_hashes(QUESTION, 13).tolist())


def test_texts_of_fewer_words_never_share_a_hash_with_parts_of_longer_ones():
    shorter = {run_hashes(" ".join(WORDS[:length]), 13)[0] for length in range(1, 13)}

    assert len(shorter) == 12
    assert not shorter & set(run_hashes(QUESTION, 13).tolist())
    assert run_hashes(QUESTION, 13).dtype == np.uint64


def test_the_fingerprint_tells_apart_what_drops_other_documents():
    text = "What is seven times eight?"
    first = Decontaminator([text])

    assert Decontaminator([text.upper()]).fingerprint() == first.fingerprint()
    assert Decontaminator([text.replace("eight", "nine")]).fingerprint() != first.fingerprint()
    # Its run is the same one, but longer documents are cut into other runs.
    assert Decontaminator([text], words=5).fingerprint() != first.fingerprint()


def test_one_text_in_the_place_of_many_is_refused():
    with pytest.raises(ConfigurationError, match="list of texts"):
        Decontaminator(QUESTION)


def test_runs_without_words_are_refused():
    with pytest.raises(ConfigurationError, match="words=13"):
        Decontaminator([QUESTION], words=0)
