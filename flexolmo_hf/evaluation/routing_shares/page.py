"""A page that shows one text, each token in the colour of the expert that worked on it most, layer by layer.

The page is one file that fetches nothing. It holds the text.

Shape letters: T tokens, L layers, E experts.
"""

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError, NonFiniteTensorError
from flexolmo_hf.evaluation.figures import COLOURS
from flexolmo_hf.evaluation.routing_shares.one_set import one_set
from flexolmo_hf.evaluation.windows import start_token

#: More tokens than this make a page that browsers are slow to show.
MAX_TOKENS = 2000

# Beside its colour, an expert has a letter and a line under its tokens: for print in grey and for the colour-blind.
_LINES = ("solid", "dotted", "dashed", "double", "wavy")


def text_page(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    active_experts: Any = None,
    max_tokens: int = MAX_TOKENS,
) -> str:
    """Make a page of a text whose tokens are coloured by their strongest expert, with a choice of layers.

    The page is self-contained and its own policy forbids it any connection. It shows the text: give it to those who may
    read that.

    Args:
        model: A FlexOlmo model.
        tokenizer: Its tokenizer, one of the fast kind.
        text: What to show, read in one piece.
        active_experts: One set, as in `forward`; None for the set in force.
        max_tokens: Refuse texts with more tokens.

    Returns:
        HTML.

    Raises:
        ConfigurationError: If the text is empty or too long, or the tokenizer does not tell where tokens stand.
        NonFiniteTensorError: If the model computes something that is no number.
        FlexOlmoError: As `one_set` does.
    """
    selection = one_set(model, active_experts)
    ids, pieces = _pieces(tokenizer, text, max_tokens)
    given = torch.tensor([[start_token(tokenizer), *ids]], device=model.device)
    weights_TLE = model.attribution(given, active_experts=selection).weights[0, 1:].double().numpy()
    shares_TLE = weights_TLE / weights_TLE.sum(axis=-1, keepdims=True)
    if not np.isfinite(shares_TLE).all():
        raise NonFiniteTensorError("routing weights", "this text")
    return _page(list(selection.names[0]), pieces, shares_TLE)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> tuple[list[int], list[tuple[str, str]]]:
    """Return the tokens, and for each the text that no token covers before it and the text it covers."""
    if not text:
        raise ConfigurationError("There is no text to show.", "Give one that is not empty.")
    if not tokenizer.is_fast:
        raise ConfigurationError(
            "This tokenizer does not tell where in the text a token stands.", "Use one with a tokenizer.json."
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = found["input_ids"]
    if not 0 < len(ids) <= max_tokens:
        raise ConfigurationError(
            f"The text has {len(ids)} tokens.", f"A page shows 1 to {max_tokens}: give a piece of it."
        )
    pieces, shown = [], 0
    for start, end in found["offset_mapping"]:
        # Tokens that are bytes of one character all span it: the first shows it.
        pieces.append((text[shown:start], text[max(shown, start) : end]))
        shown = max(shown, end)
    pieces.append((text[shown:], ""))
    return ids, pieces


def _page(experts: list[str], pieces: list[tuple[str, str]], shares_TLE: np.ndarray) -> str:
    letters = _letters(experts)
    mean_TE = shares_TLE.mean(axis=1)
    data = {
        "experts": experts,
        "letters": letters,
        # In thousandths: a page of figures nobody can tell apart would be ten times as large.
        "layers": (shares_TLE.transpose(1, 0, 2) * 1000).round().astype(int).tolist(),
    }
    choices = [f'<option value="{layer}">layer {layer}</option>' for layer in range(shares_TLE.shape[1])]
    legend = [
        f'<li><span class="t e{at}" style="--w:1" data-l="{escape(letter)}">{escape(name)}</span></li>'
        for at, (name, letter) in enumerate(zip(experts, letters, strict=True))
    ]
    return Template((Path(__file__).parent / "page.html").read_text("utf8")).substitute(
        styles="\n".join(_style(at) for at in range(len(experts))),
        legend="".join(legend),
        choices="".join(choices),
        text=_marked(experts, letters, pieces, mean_TE),
        # Inside a script element, only "<" could end it.
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _marked(experts: list[str], letters: list[str], pieces: list[tuple[str, str]], shares_TE: np.ndarray) -> str:
    """Write the tokens as they look for all layers, which is what is seen where scripts are off."""
    parts, before = [], -1
    for (gap, piece), shares_E in zip(pieces, shares_TE, strict=False):
        top = int(shares_E.argmax())
        changes = f' data-l="{escape(letters[top])}"' if top != before else ""
        tip = ", ".join(f"{experts[at]} {shares_E[at]:.1%}" for at in np.argsort(-shares_E, kind="stable"))
        # A token without text of its own is a further part of the character before it.
        part = "" if piece else " part"
        parts.append(
            f'{_escaped(gap)}<span class="t e{top}{part}" style="--w:{shares_E[top]:.3f}"{changes} '
            f'title="{escape(tip)}">{_escaped(piece)}</span>'
        )
        before = top
    return "".join(parts) + _escaped(pieces[-1][0])


def _escaped(text: str) -> str:
    # A browser would read a carriage return as a line feed, and drops the null character.
    return escape(text).replace("\r", "&#13;").replace("\0", "\ufffd")


def _letters(experts: list[str]) -> list[str]:
    """Give each expert the first letter of its name that is free, or else its number."""
    taken: list[str] = []
    for at, name in enumerate(experts):
        free = (letter for letter in name.upper() if letter.isalpha() and letter not in taken)
        taken.append(next(free, str(at)))
    return taken


def _style(at: int) -> str:
    red, green, blue = (int(COLOURS[at % len(COLOURS)][i : i + 2], 16) for i in (1, 3, 5))
    # Black is a background only when it is light.
    strength = 0.3 if (red, green, blue) == (0, 0, 0) else 0.6
    line = _LINES[at % len(_LINES)]
    return (
        f".e{at} {{ background: rgb({red} {green} {blue} / calc(0.05 + {strength} * var(--w))); "
        f"text-decoration: underline {line} rgb({red} {green} {blue}) 2px; }}"
    )
