from flexolmo_hf.evaluation.data.sources import creative

NOVEL = [
    "EMMA",
    "",
    "VOLUME I",
    "",
    "CHAPTER I",
    "",
    "She was.",
    "",
    "Chapter 2.",
    "It rained",
    "all day.",
    "",
    "He came.",
]


def test_novel_is_cut_before_its_chapters_and_its_title_page_left_out():
    assert creative.chapters(NOVEL) == [NOVEL[4:8], NOVEL[8:]]


def test_mention_of_a_chapter_is_no_heading():
    assert len(creative.chapters(["CHAPTER I", "chapters are long", "A chapter 3 of hers"])) == 1


def test_pieces_of_a_chapter_stay_together(monkeypatch, tmp_path):
    long = ["CHAPTER I", *(line for n in range(60) for line in (f"Paragraph {n} " + "of many words " * 5, ""))]
    monkeypatch.setattr(creative, "read_members", lambda package, *names: [b"", b""])
    monkeypatch.setattr(creative, "read_database", lambda index, data: {"b": ["CHAPTER I", "", "Short."], "a": long})

    first, second = creative.novels(tmp_path / "austen.deb")

    assert second == ["CHAPTER I\n\nShort."]
    assert len(first) > 2 and all(len(piece) <= 2_000 for piece in first)
    assert "\n\n".join(first).split() == " ".join(long).split()
