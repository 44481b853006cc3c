"""Code: the running interpreter's own standard library (PSF licence). It depends on the interpreter and its builder."""

import sysconfig
from pathlib import Path

# Tests are not written to be read, the others are tables of data or (`_sysconfigdata`) describe the machine.
_NOT_A_MODULE = (
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
)
_LONGEST_MODULE = 12_000


def standard_library(root: Path | None = None) -> list[str]:
    """Read the opening of every module of the running interpreter's standard library.

    Args:
        root: Folder of the library; None for the running interpreter's.

    Returns:
        One document per module: its first lines, up to 12,000 characters, so that a few long modules do not fill the
        budget.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in sorted(root.rglob("*.py")) if _is_module(path.relative_to(root))]
    texts = (path.read_text("utf8", errors="replace") for path in modules)
    return [_opening(text, _LONGEST_MODULE) for text in texts if text.strip()]


def _is_module(path: Path) -> bool:
    return not set(path.parts) & set(_NOT_A_MODULE) and not path.name.startswith("_sysconfigdata")


def _opening(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return text[: text.rindex("\n", 0, longest) + 1] if "\n" in text[:longest] else text[:longest]
