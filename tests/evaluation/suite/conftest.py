"""A tiny checkpoint with four named experts, and tasks whose data lies beside them."""

import json

import pytest

from tests.modeling.test_expert_sets import named_model

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a kind of soup"], "answer": 0},
    {"question": "Two and two make", "choices": ["a green hat", "four"], "answer": 1},
    {"question": "Fish live in", "choices": ["water", "clocks"], "answer": 0},
    {"question": "Snow is", "choices": ["hot", "cold", "loud"], "answer": 1},
    {"question": "A cat says", "choices": ["moo", "meow"], "answer": 1},
]

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{file}", test: "{file}"}}, cache_dir: "{cache}"}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Save experts public, math, code and news, with a byte tokenizer."""
    from tests.conftest import byte_tokenizer

    folder = tmp_path_factory.mktemp("models") / "four-experts"
    tokenizer = byte_tokenizer()
    named_model(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own_tasks(tmp_path):
    """Make a folder of tasks: `colours`, which no table knows, and `piqa`, which takes the place of the real one."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name in ("colours", "piqa"):
        text = CHOICE.format(name=name, file=data, cache=tmp_path / "cache")
        (folder / f"{name}.yaml").write_text(text)
    return folder
