"""Documents are read from files one after the other, and what is no document is refused without showing it."""

import json

import pytest

from flexolmo_hf.errors import FlexOlmoError
from flexolmo_hf.routing.texts import read_texts

SECRET = "a very private sentence"


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "one\ntwo"}, {"text": "ü", "id": 3}])
    file.write_text(file.read_text() + "\n", "utf-8")

    assert list(read_texts([file])) == ["one\ntwo", "ü"]


def test_the_text_may_have_another_key(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"body": "one"}])

    assert list(read_texts([file], field="body")) == ["one"]


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", "utf-8")

    assert list(read_texts([str(tmp_path / "a.txt")])) == ["one\n\ntwo"]


def test_a_folder_gives_all_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("three")
    (tmp_path / "b.txt").write_text("two")
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "notes.md").write_text("no document")

    assert list(read_texts([tmp_path])) == ["one", "two", "three"]


def test_files_are_read_one_line_at_a_time(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, "no object"])

    assert next(read_texts([file])) == "one"


REFUSED = {
    "not there": (None, "There is no file or folder 'a.jsonl'"),
    "not JSON": (b'{"text": "one"}\n' + SECRET.encode(), "line 2 is not JSON"),
    "no object": (json.dumps([SECRET]).encode(), "Line 1 of 'a.jsonl' has no text under 'text'"),
    "no text": (json.dumps({"body": SECRET}).encode(), "has no text under 'text'"),
    "text no string": (b'{"text": 3}', "has no text under 'text'"),
    "not UTF-8": (b"\xff" + SECRET.encode(), "it is not UTF-8"),
}


@pytest.mark.parametrize(("content", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_document_is_refused_without_showing_it(tmp_path, content, says):
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)

    with pytest.raises(FlexOlmoError) as caught:
        list(read_texts([tmp_path / "a.jsonl"]))
    assert says in str(caught.value)
    # Python prints the cause of an error too, which would hold a piece of the text.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert SECRET not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", ["empty", "a.csv"])
def test_a_folder_without_documents_and_another_kind_of_file_are_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("text")

    with pytest.raises(FlexOlmoError, match=name):
        list(read_texts([tmp_path / name]))
