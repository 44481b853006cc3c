"""A program of a model's computes, and can do nothing else."""

import os
import platform
import time
from pathlib import Path

import pytest

from flexolmo_hf.errors import ConfigurationError, SandboxError
from flexolmo_hf.evaluation.suite import sandbox
from flexolmo_hf.evaluation.suite.sandbox import Outcome, check_confinement, run_python


@pytest.fixture(autouse=True)
def confined():
    try:
        check_confinement()
    except SandboxError as error:
        pytest.skip(str(error))


def test_a_program_that_holds_its_tests_passes():
    program = (
        "import math, json, re, heapq, hashlib, random, collections\nprint('x' * 100000)\nassert math.gcd(6, 4) == 2"
    )

    assert run_python(program) == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "wrong"),
        ("1 / 0", "error"),
        ("def", "error"),
        ("x = bytearray(2**31)", "memory"),
        ("import sys; sys.exit(0)", "stopped"),
        ("import os; os._exit(0)", "stopped"),
        ("import os; os.write(3, b'passed'); os._exit(0)", "stopped"),
    ],
)
def test_a_program_that_does_not_reach_its_end_has_failed(program, reason):
    assert run_python(program) == Outcome(False, reason)


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(99)", "import os, time; os.closerange(0, 64); time.sleep(99)"],
)
def test_a_program_that_takes_too_long_is_killed(program):
    start = time.monotonic()

    assert run_python(program, seconds=1) == Outcome(False, "time")
    assert time.monotonic() - start < 20


def test_the_memory_is_what_was_said():
    program = "x = bytearray(200 * 2**20)"

    assert run_python(program, megabytes=512) == Outcome(True, "passed")
    assert run_python(program, megabytes=128) == Outcome(False, "memory")


def test_no_more_than_a_few_files_are_open_at_a_time():
    program = "import os\nfor _ in range({}):\n    os.open(os.__file__, os.O_RDONLY)"

    assert run_python(program.format(30)) == Outcome(True, "passed")
    assert run_python(program.format(100)) == Outcome(False, "error")


def test_a_flood_of_output_is_not_read():
    flood = """
import os
for place in range(3, 20):
    try:
        while True:
            os.write(place, b"x" * 65536)
    except OSError:
        pass
"""

    assert not run_python(flood, seconds=5).passed


HERE = Path(__file__).as_posix()


@pytest.mark.parametrize(
    "deed",
    [
        "import socket; socket.socket()",
        "import socket; socket.socketpair()",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.kill(os.getppid(), 0)",
        f"open({HERE!r})",
        f"import os; os.listdir({os.path.dirname(HERE)!r})",
        f"import os; os.chmod({HERE!r}, 0o600)",
        f"import os; os.utime({HERE!r})",
        "open('/proc/self/environ')",
        "open('file', 'w')",
        "open('/dev/shm/file', 'w')",
        "import os; os.memfd_create('memory')",
        "import os; os.execv('/bin/true', ['true'])",
        "import resource; resource.prlimit(resource.RLIMIT_AS and 0, resource.RLIMIT_AS, (-1, -1))",
        "import os; os.sched_setaffinity(os.getppid(), [0])",
        "import os; os.chroot('/usr/lib')",
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], 8, os.getppid())",
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], 10, 9)",
    ],
)
def test_the_kernel_refuses(deed):
    assert run_python(f"try:\n    {deed}\nexcept PermissionError:\n    pass\nelse:\n    raise RuntimeError").passed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of calls are those of x86_64")
@pytest.mark.parametrize(
    "call",
    [
        "129, os.getppid(), 0, b'x' * 128",  # rt_sigqueueinfo
        "297, os.getppid(), os.getppid(), 0, b'x' * 128",  # rt_tgsigqueueinfo
        "30, 0, None, 0",  # shmat
        "31, 0, 13, b' ' * 128",  # shmctl
        "157, 1, 0",  # prctl: outlive whoever started it
        "170, b'x', 1",  # sethostname
        "175, b'', 0, b''",  # init_module
        "294, 0",  # inotify_init1
        "425, 1, b' ' * 128",  # io_uring_setup
        "435, b' ' * 64, 64",  # clone3
        "(1 << 30) + 39",  # getpid, of the other numbering
    ],
)
def test_the_kernel_refuses_what_python_has_no_name_for(call):
    refused = "ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)"
    program = f"import ctypes, errno, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.syscall({call}) == -1"

    assert run_python(f"{program}\nassert {refused}, ctypes.get_errno()") == Outcome(True, "passed")


@pytest.mark.parametrize("ending", ["a text of its own", "unconfined", "confined"])
def test_a_program_that_finds_the_word_cannot_invent_an_ending(ending):
    program = f"""
import os, sys
frame = sys._getframe()
while "word" not in frame.f_locals:
    frame = frame.f_back
os.write(frame.f_locals["answer"], (frame.f_locals["word"] + " {ending}").encode())
os._exit(0)
"""

    assert run_python(program) == Outcome(False, "stopped")


def test_numbers_of_any_length_may_stand_in_tests():
    assert run_python(f"assert {'9' * 5000} > 0").passed


def test_the_environment_is_empty_and_packages_are_out_of_reach(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")

    assert run_python("import os\nassert not set(os.environ) - {'LC_CTYPE'}").passed
    assert run_python("try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    raise RuntimeError").passed


def test_threads_are_allowed():
    assert run_python("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").passed


def test_a_program_is_not_run_where_it_cannot_be_confined(monkeypatch, tmp_path):
    child = sandbox._CHILD.read_text()
    weak = tmp_path / "child.py"
    weak.write_text(child.replace("_RESTRICT_SELF = 444", "_RESTRICT_SELF = 9999"))
    monkeypatch.setattr(sandbox, "_CHILD", weak)

    with pytest.raises(SandboxError, match="Landlock"):
        run_python("pass")


def test_a_system_without_these_means_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")

    with pytest.raises(SandboxError, match="darwin"):
        run_python("pass")


def test_limits_that_leave_nothing_are_refused(refused):
    with refused(ConfigurationError, "megabytes=1"):
        run_python("pass", megabytes=1)
    with refused(ConfigurationError, "seconds=0"):
        run_python("pass", seconds=0)
