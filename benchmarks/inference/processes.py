"""The workers as the driver sees them: processes that answer requests."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def command_and_place(module: str, *arguments: str, package: str = "benchmarks.inference") -> dict[str, Any]:
    """Return what `subprocess` needs to run a module of a benchmark's package, without network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {
        "args": [sys.executable, "-m", f"{package}.{module}", *arguments],
        "cwd": ROOT,
        "env": environment,
        "text": True,
    }


class Worker:
    """A long-lived process with a model of its own; ends with the ``with`` block."""

    package = "benchmarks.inference"

    def __init__(self, who: str):
        self.who = who
        self._process: subprocess.Popen[str] = subprocess.Popen(
            **command_and_place("worker", who, package=self.package), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, do: str, **details: Any) -> Any:
        """Have one thing done and wait for its result.

        Raises:
            RuntimeError: If the process has ended; standard error says why.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **details}), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise RuntimeError(f"The process of {self.who} ended during {do!r}; its error is above.")
        return json.loads(reply)["value"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
