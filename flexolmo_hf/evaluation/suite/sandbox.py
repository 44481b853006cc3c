"""Programs that a model has written, run in a process that can do nothing but compute.

The process has no network, cannot start others, can read nothing but libraries, and can write nothing at
all; its time and memory are limited. The kernel sees to it (seccomp, Landlock, resource limits): what the program does
to the interpreter changes nothing. Where the kernel cannot, programs are not run. See `sandbox_child`.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from flexolmo_hf.errors import ConfigurationError, SandboxError

_CHILD = Path(__file__).with_name("sandbox_child.py")

# The child says that it is confined and then how the program ended, or why it could not be confined. Whatever else
# comes is not read to its end, and an ending that is none of these is the program's own invention.
_LONGEST_WORD = 512
_ENDINGS = ("passed", "wrong", "error", "memory", "stopped")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: Whether it ran to its end, tests included.
        reason: "passed"; "wrong", a test did not hold; "error", another exception, a syntax error among them; "memory";
            "time"; "stopped", it ended before its end.
    """

    passed: bool
    reason: str


def run_python(program: str, *, seconds: float = 10, megabytes: int = 512) -> Outcome:
    """Run a Python program that nobody has read.

    Args:
        program: Its text. The standard library is all it can import.
        seconds: Time it may take, the start of the interpreter included.
        megabytes: Memory it may reserve.

    Returns:
        How it ended. What it printed is thrown away.

    Raises:
        SandboxError: If it cannot be confined on this system; it has not been run then.
        ConfigurationError: If a limit leaves nothing.
    """
    if seconds <= 0 or megabytes < 64:
        raise ConfigurationError(
            f"seconds={seconds} and megabytes={megabytes} leave no room for a program.",
            "An interpreter takes a part of a second and some 64 MB.",
        )
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"{sys.platform} has neither seccomp nor Landlock")
    # Only who knows this word can report, and the program is told nothing.
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="flexolmo-") as empty, tempfile.TemporaryFile() as script:
        script.write(f"{word}\n{megabytes}\n{int(seconds) + 1}\n".encode())
        script.write(program.encode("utf-8", "surrogatepass"))
        script.seek(0)
        said, late = _run(script, empty, seconds)
    return _outcome(said, word, late)


@cache
def check_confinement() -> None:
    """Make sure that programs can be confined here, before any is written.

    Raises:
        SandboxError: If they cannot.
    """
    outcome = run_python("import heapq, json, math, random, re")
    if not outcome.passed:
        raise SandboxError(f"a program of imports alone ended with {outcome.reason!r}")


def _run(script: IO[bytes], folder: str, seconds: float) -> tuple[str, bool]:
    # Isolated from the environment, the user's packages and the current folder; a group of its own, to be killed whole.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CHILD)],
        stdin=script,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd=folder,
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    try:
        said = process.stdout.read(_LONGEST_WORD)
        # A program may close what it reports through, and go on.
        if len(said) < _LONGEST_WORD:
            process.wait()
    finally:
        timer.cancel()
        _kill(process)
        process.wait()
        process.stdout.close()
    return said.decode("ascii", "replace"), late.is_set()


def _kill(process: subprocess.Popen) -> None:
    # Not yet waited for, so its number is still its own.
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _outcome(said: str, word: str, late: bool) -> Outcome:
    confined = f"{word} confined\n"
    if not said.startswith(confined) and not late:
        refusal = said.removeprefix(word).strip() if said.startswith(word) else ""
        raise SandboxError(refusal or "the process ended before it was confined")
    ending = said.removeprefix(confined)
    reason = ending.removeprefix(word).strip()
    if not ending.startswith(word) or reason not in _ENDINGS:
        return Outcome(False, "time" if late else "stopped")
    return Outcome(reason == "passed", reason)
