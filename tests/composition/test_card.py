"""Model cards: plain Markdown that says who made what and how to load it, and nothing private."""

import ast
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from flexolmo_hf import AnchorMismatchError, FlexOlmoForCausalLM, merge_experts  # noqa: F401
from tests.composition.conftest import consortium, pack

ABOUT = {
    "math": {
        "owner": "Ann & Söhne",
        "license": "apache-2.0",
        "training": {"steps": 200, "learning rate": 9e-4},
        "evaluation": {"held-out bits per byte": 1.25},
    },
    "code": {"owner": "Bob", "license": "mit", "training": {"steps": 300}},
}


def cards_of(owners, about=ABOUT):
    """Pack each owner's expert with what is said of it, merge them, and return all cards by name."""
    packages = {
        name: pack(model, name, owners.folder / f"about-{name}", **about.get(name, {}))
        for name, model in owners.models.items()
    }
    merged = merge_experts(owners.anchor, packages, owners.folder / "merged")
    return {name: folder / "README.md" for name, folder in {**packages, "merged": merged}.items()}


@pytest.fixture
def cards(two_owners):
    return {name: file.read_text("utf-8") for name, file in cards_of(two_owners).items()}


def table_rows(text, first_header):
    """Return the cells of each table whose first column is called so, header and rule left out."""
    found = re.findall(rf"^\| {first_header} \|.*\n\|[-|]+\|\n((?:\|.*\|\n)*)", text, flags=re.MULTILINE)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()] for table in found]


EVERY_CARD = pytest.mark.parametrize("name", ["math", "code", "merged"])


@EVERY_CARD
def test_the_header_is_yaml_that_the_hub_reads(two_owners, name):
    card = ModelCard.load(cards_of(two_owners)[name])

    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "flexolmo" in card.data.tags
    assert card.data.license == {"math": "apache-2.0", "code": "mit", "merged": None}[name]


@EVERY_CARD
def test_no_template_is_left_over_and_nothing_is_printed_as_python(cards, name):
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\bNone\b|Undefined|<.* object", cards[name])


@EVERY_CARD
def test_a_table_has_no_blank_line_and_the_same_columns_in_every_row(cards, name):
    blocks = [block for block in re.split(r"\n\s*\n", cards[name]) if "|" in block]

    assert blocks
    for block in blocks:
        lines = block.strip().splitlines()
        assert re.fullmatch(r"\|(-+\|)+", lines[1]), block
        assert len(lines) > 2, block
        assert {line.count("|") for line in lines} == {lines[0].count("|")}, block


@EVERY_CARD
def test_headings_lists_and_fences_stand_apart_from_text(cards, name):
    for heading in re.findall(r"(.*\n)(#+ .*\n)(.*\n)", cards[name]):
        assert heading[0].strip() == heading[2].strip() == "", heading
    assert cards[name].count("```") % 2 == 0
    assert "\n\n\n\n" not in cards[name]


def test_a_packages_card_says_what_it_holds(cards):
    assert "# Expert math for FlexOlmo\n" in cards["math"]
    assert table_rows(cards["math"], "expert") == [[["math", "1", "Ann & Söhne", "apache-2.0", "no"]]]
    assert table_rows(cards["math"], "setting") == [[["steps", "200"], ["learning rate", "0.0009"]]]
    assert table_rows(cards["math"], "measure") == [[["held-out bits per byte", "1.25"]]]
    assert "adds 18,560 parameters" in cards["math"]


def test_a_merged_models_card_says_what_each_expert_is(cards):
    assert table_rows(cards["merged"], "expert") == [
        [
            ["public", "0", "not stated", "not stated", "no"],
            ["math", "1", "Ann & Söhne", "apache-2.0", "no"],
            ["code", "2", "Bob", "mit", "no"],
        ]
    ]
    settings = [dict(table) for table in table_rows(cards["merged"], "setting")]
    assert settings == [{"steps": "200", "learning rate": "0.0009"}, {"steps": "300"}]
    assert table_rows(cards["merged"], "measure") == [[["held-out bits per byte", "1.25"]]]


def test_an_expert_of_which_nothing_is_said_still_has_a_card(two_owners):
    text = cards_of(two_owners, about={})["math"].read_text()

    assert "No training settings are recorded." in text
    assert "No evaluation results are recorded." in text
    assert "not stated" in text


def test_the_call_that_a_merged_models_card_shows_loads_the_model(two_owners):
    file = cards_of(two_owners)["merged"]
    (code,) = re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.DOTALL)
    scope = {}
    exec(code.replace("THIS_FOLDER", str(file.parent)), scope)

    assert scope["model"].expert_names == ["public", "math"]


def test_the_commands_that_a_packages_card_shows_name_its_expert(cards):
    assert "--package code=THIS_FOLDER" in cards["code"]
    (code,) = re.findall(r"```python\n(.*?)```", cards["code"], flags=re.DOTALL)
    ast.parse(code)
    assert 'active_experts=["public", "code"]' in code


def test_the_anchors_fingerprint_is_the_same_on_all_cards(cards):
    digests = {name: re.findall(r"^    ([0-9a-f]{64})$", text, flags=re.MULTILINE) for name, text in cards.items()}

    assert len(digests["math"]) == 1
    assert digests["math"] == digests["code"] == digests["merged"]


def test_no_path_is_on_a_card(cards, tmp_path):
    for text in cards.values():
        assert str(tmp_path) not in text
        assert not re.search(r"(?<![\w.])/(tmp|home|root|Users|work|var|mnt)\b", text)


def test_biases_are_told_with_what_they_mean_for_stock_transformers(tmp_path):
    owners = consortium(tmp_path, router_bias=["math"])
    text = cards_of(owners)["merged"].read_text()

    assert [row[-1] for row in table_rows(text, "expert")[0]] == ["no", "yes", "no"]
    assert "which stock Transformers does not read" in text
    assert "stock Transformers loads the same files" not in text


def test_the_bias_of_an_expert_that_the_anchor_already_held_is_told(tmp_path):
    owners = consortium(tmp_path, router_bias=["math"])
    owners.models["math"].save_pretrained(tmp_path / "with math")
    merge_experts(tmp_path / "with math", {"code": owners.packages["code"]}, tmp_path / "merged")

    rows = table_rows((tmp_path / "merged" / "README.md").read_text(), "expert")[0]
    assert [row[-1] for row in rows] == ["no", "yes", "no"]


def test_merged_without_biases_a_card_tells_of_none(tmp_path):
    owners = consortium(tmp_path, router_bias=["math"])
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged", router_bias=False)
    text = (tmp_path / "merged" / "README.md").read_text()

    assert {row[-1] for row in table_rows(text, "expert")[0]} == {"no"}
    assert "stock Transformers loads the same files" in text


def test_an_expert_is_on_the_card_under_the_name_it_was_merged_under(one_owner, tmp_path):
    package = pack(one_owner.models["math"], "math", tmp_path / "package", training={"steps": 2})
    merge_experts(one_owner.anchor, {"algebra": package}, tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()

    assert [row[0] for row in table_rows(text, "expert")[0]] == ["public", "algebra"]
    assert "Expert `algebra`, trained alone" in text
    assert "`math`" not in text


HOSTILE = {
    "owner": "Ann | Bob\n\n# Fake heading",
    "license": "mit | other\nlicense: gpl",
    "training": {"steps | x": "2 | 3\n4", "template": "{{ 7 * 7 }}"},
    "evaluation": {"a\nb": "<script>"},
}


def test_what_an_owner_wrote_cannot_break_the_card(one_owner):
    file = cards_of(one_owner, about={"math": HOSTILE})["merged"]
    text = file.read_text()

    assert "\n# Fake heading" not in text
    assert "{{ 7 * 7 }}" in text
    for block in (block for block in re.split(r"\n\s*\n", text) if "|" in block):
        lines = block.strip().splitlines()
        # An escaped bar is part of a cell.
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(columns) == 1, block


def test_what_an_owner_wrote_cannot_break_the_header(one_owner):
    text = cards_of(one_owner, about={"math": HOSTILE})["math"].read_text()

    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == HOSTILE["license"]
