"""Rows of data files: what a reader says about a row it cannot read goes no further."""

import traceback

import pytest

from flexolmo_hf.errors import DamagedFileError

pytest.importorskip("datasets")


@pytest.mark.parametrize("way", ["read_rows", "stream_texts"])
def test_a_traceback_does_not_quote_what_the_reader_stumbled_over(tmp_path, monkeypatch, way):
    from flexolmo_hf import _rows

    def stumbles(*_, **__):
        raise ValueError("could not convert string to float: 'a secret'")

    monkeypatch.setattr(_rows, "load_dataset", stumbles)
    (tmp_path / "data.jsonl").write_text("{}")

    with pytest.raises(DamagedFileError, match="its rows are not json") as caught:
        list(getattr(_rows, way)([str(tmp_path / "data.jsonl")], str(tmp_path)))
    shown = "".join(traceback.format_exception(caught.value))
    # The lines of this file, which a traceback shows, are not what is looked for.
    assert "ValueError" not in shown
