r"""Whether two LaTeX formulas are written alike, after what changes only their looks is taken away."""

import re

_FINAL = re.compile(r"final answer is:?\s*\$?(.+?)\$?(?:\.\s|\.$|\s*I hope|$)", re.IGNORECASE | re.DOTALL)
# Looks: spacing, size of brackets, units, punctuation around the whole.
_GONE = re.compile(
    r"\\left|\\right|\\[!,;: ]|\\quad|\\qquad|\\displaystyle|\\\$|\$|\\%|%|\^\{?\\circ\}?|\\degree"
    r"|\\(?:text|mathrm|mbox)\{\s*(?:and|or|degrees?|units?|inches|inch|feet|cm|cents?|dollars?|square\s\w+)\s*\}|\s"
)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|mathbf)\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(\d|[a-z])(\d|[a-z])")
_SLASH = re.compile(r"^(-?\w+)/(\w+)$")


def boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{}``, or else behind "final answer is"; None if there is neither."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        found = _FINAL.findall(text)
        return found[-1] if found else None
    depth, begin = 0, start + len(r"\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[begin + 1 : position]
    return None


def same_formula(given: str | None, right: str) -> bool:
    """Compare two formulas; what is equal but written otherwise, as 1/2 and 0.5, is not the same."""
    return given is not None and _plain(given) == _plain(right)


def _plain(formula: str) -> str:
    plain = re.sub(r"\\[dt]frac", r"\\frac", formula)
    plain = _WORDS.sub(r"\1", _GONE.sub("", plain))
    plain = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", plain)
    plain = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", plain)
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain).rstrip(".")
    plain = plain.rpartition("=")[2] if plain.count("=") == 1 and len(plain.partition("=")[0]) <= 2 else plain
    if whole := _SLASH.match(plain):
        plain = rf"\frac{{{whole[1]}}}{{{whole[2]}}}"
    return re.sub(r"^0(?=\.)", "", plain)
