"""The page shows exactly the text, tells the routing as it is, and reaches nobody."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexolmo_hf.errors import ConfigurationError, ExpertRowsError, NonFiniteTensorError, NotFlexOlmoError
from flexolmo_hf.evaluation.routing_shares.page import _letters, _page, text_page
from tests.conftest import dense_model
from tests.evaluation.routing_shares.conftest import known_model
from tests.modeling.test_expert_sets import named_model, poison

NASTY = '<script>alert("p")</script> & é😀\r\n\tmc</main>\'"--> $text ${data}'


class Read(HTMLParser):
    """Reads the text and the tokens of the page's main part, and everything that could leave the page."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tokens, self.elements, self.data, self.inside = "", [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.inside.append((tag, dict(attrs)))
        if tag == "span" and ("main", {"id": "text"}) in self.inside:
            self.tokens.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, data):
        if ("main", {"id": "text"}) in self.inside:
            self.text += data
        if self.inside and self.inside[-1][1].get("id") == "data":
            self.data += data


def test_the_page_shows_exactly_the_text(model, tokenizer):
    page = Read(text_page(model, tokenizer, NASTY))

    assert page.text == NASTY
    assert len(page.tokens) == len(tokenizer(NASTY)["input_ids"])
    # "é" is two tokens and the other sign four: the first of each shows it, the rest say that they are parts.
    assert sum("part" in token["class"].split() for token in page.tokens) == 1 + 3
    assert page.inside == []


@pytest.fixture
def words():
    """A tokenizer of words, which leaves the space between them out."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def test_text_that_no_token_covers_is_shown_too(model, words):
    text = f"  {NASTY} <b> \t"
    page = Read(text_page(model, words, text))

    assert page.text == text
    assert len(page.tokens) == len(text.split())


def test_carriage_returns_survive_a_browser(model, tokenizer):
    # A browser reads a bare one as a line feed.
    assert "\r" not in text_page(model, tokenizer, "m\r\nc")


def test_names_cannot_end_the_script():
    name = "</script><b>"
    page = _page([name], [("", "m"), ("", "")], np.ones((1, 1, 1)))

    assert json.loads(Read(page).data)["experts"] == [name]
    assert "<b>" not in page


def test_the_text_adds_no_element(model, words):
    plain, nasty = (Read(text_page(model, words, text)) for text in ("p", NASTY))

    def kinds(page):
        return [tag for tag, _ in page.elements if tag != "span"]

    assert kinds(nasty) == kinds(plain)
    assert kinds(plain).count("script") == 2


def test_nothing_is_fetched(model, tokenizer):
    page = text_page(model, tokenizer, "mc")

    assert not [attrs for _, attrs in Read(page).elements if {"src", "href", "action", "srcset", "data"} & set(attrs)]
    assert not re.search(r"https?:|//\w|url\(|@import|fetch|XMLHttp|WebSocket", page)
    assert "default-src 'none'" in page


def test_tokens_carry_their_strongest_expert_and_all_shares(model, tokenizer):
    # Both layers together: of "m", math and code have 0.75 + 0.125 each.
    tokens = Read(text_page(model, tokenizer, "ppc", active_experts=["public", "code"])).tokens

    assert [token["class"] for token in tokens] == ["t e0", "t e0", "t e1"]
    # The letter stands where the expert changes.
    assert [token.get("data-l") for token in tokens] == ["P", None, "C"]
    of_c = (0.625 / 0.875 + 0.125 / 0.375) / 2
    assert tokens[2]["title"] == f"code {of_c:.1%}, public {1 - of_c:.1%}"
    assert tokens[2]["style"] == f"--w:{of_c:.3f}"


def test_each_layer_has_the_shares_of_its_own(model, tokenizer):
    data = json.loads(Read(text_page(model, tokenizer, "mc")).data)

    assert data["experts"] == ["public", "math", "code"]
    assert data["letters"] == ["P", "M", "C"]
    assert data["layers"] == [[[125, 750, 125], [250, 125, 625]], [[125, 125, 750], [250, 625, 125]]]


def test_the_text_is_read_behind_the_token_that_stands_before_a_document(tokenizer):
    model = named_model(vocab_size=len(tokenizer))
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("mcp")["input_ids"]]])
    expected_TLE = model.attribution(ids).weights[0, 1:]
    layers = json.loads(Read(text_page(model, tokenizer, "mcp")).data)["layers"]

    np.testing.assert_allclose(layers, 1000 * expected_TLE.transpose(0, 1), atol=0.51)


def test_the_experts_that_are_used_share_the_whole(tokenizer):
    layers = json.loads(Read(text_page(known_model(per_token=2), tokenizer, "c")).data)["layers"]

    assert layers == [[[286, 0, 714]], [[286, 714, 0]]]


def test_experts_with_the_same_initial_get_other_letters():
    assert _letters(["public", "pub", "p", "math"]) == ["P", "U", "2", "M"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_choosing_a_layer_colours_the_tokens_anew(model, tokenizer):
    page = text_page(model, tokenizer, "mcp")
    script = page.rsplit("<script>", 1)[1].split("</script>")[0]
    # Just as much of a browser as the script uses.
    browser = """
        const tokens = ["m", "c", "p"].map((textContent) => ({
          textContent, dataset: {}, style: {setProperty(name, value) { this[name] = value; }},
        }));
        const parts = {
          data: {textContent: DATA}, shown: {}, chooser: {hidden: true},
          layer: {value: "", selectedOptions: [{textContent: "layer 1"}], addEventListener(_, f) { this.change = f; }},
        };
        globalThis.document = {getElementById: (id) => parts[id], querySelectorAll: () => tokens};
    """.replace("DATA", json.dumps(Read(page).data))
    asked = """
        const seen = (value) => {
          parts.layer.value = value;
          parts.layer.change();
          return tokens.map((t) => [t.className, t.dataset.l ?? null, t.style["--w"], t.title]);
        };
        console.log(JSON.stringify({seen: [seen("1"), seen("")], hidden: parts.chooser.hidden, shown: parts.shown}));
    """
    done = subprocess.run(["node", "-e", browser + script + asked], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)

    assert found["hidden"] is False
    assert found["shown"] == {"textContent": "layer 1"}
    assert found["seen"][0] == [
        ["t e2", "C", 0.75, "code 75.0%, public 12.5%, math 12.5%"],
        ["t e1", "M", 0.625, "math 62.5%, public 25.0%, code 12.5%"],
        ["t e0", "P", 0.5, "public 50.0%, math 25.0%, code 25.0%"],
    ]
    assert [token[0] for token in found["seen"][1]] == ["t e1", "t e1", "t e0"]
    assert [token[1] for token in found["seen"][1]] == ["M", None, "P"]


def test_experts_differ_by_more_than_colour(model, tokenizer):
    styles = re.findall(r"underline (\w+) rgb", text_page(model, tokenizer, "mc"))

    assert len(set(styles)) == len(styles) == 3


def test_a_text_of_the_limit_is_shown_and_a_longer_one_is_refused_with_the_limit(model, tokenizer):
    assert Read(text_page(model, tokenizer, "m" * 12, max_tokens=12)).text == "m" * 12
    with pytest.raises(ConfigurationError, match="13 tokens.*1 to 12") as caught:
        text_page(model, tokenizer, "m" * 13, max_tokens=12)
    assert "mmm" not in str(caught.value)


def test_what_cannot_be_shown_is_refused(model, tokenizer):
    with pytest.raises(ConfigurationError, match="no text"):
        text_page(model, tokenizer, "")
    with pytest.raises(ExpertRowsError, match="one set"):
        text_page(model, tokenizer, "m", active_experts=[["public"], ["math"]])
    with pytest.raises(NotFlexOlmoError):
        text_page(dense_model(), tokenizer, "m")
    poison(model, ["code"])
    with pytest.raises(NonFiniteTensorError, match="this text"):
        text_page(model, tokenizer, "m")
