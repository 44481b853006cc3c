from flexolmo_hf.evaluation.data.documents import read_documents, write_documents


def test_documents_come_back_as_they_were(tmp_path):
    texts = ["two\nlines\r\n", "a line separator \u2028 and \x85 inside", '"quotes" and \\frac{1}{2}', "∑ 🙂", ""]

    write_documents(tmp_path / "new" / "texts.jsonl", texts)

    assert read_documents(tmp_path / "new" / "texts.jsonl") == texts
