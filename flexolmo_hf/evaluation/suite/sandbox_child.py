"""What runs a program in the sandbox: it gives up all rights, and only then turns to the program.

It stands alone: `sandbox` starts it in an isolated interpreter. The first three lines of its input are the word that
opens its answer, megabytes and seconds; the rest is the program. The order below matters: limits, capabilities, files,
system calls.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig

_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_NEW_PRIVILEGES, _SECCOMP, _DEATH_SIGNAL = 38, 22, 1
_CAPABILITIES = 0x20080522
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

# Landlock's rights to files, by the version that brought them, and the two that reading takes.
_RIGHTS = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 5: 2**16 - 1}
_READ = 1 << 2 | 1 << 3

# By machine: the kernel's name of it, and the calls that reach the network, other processes or the system, or change
# what Landlock does not watch: owners, modes, times. Shared memory outlives its process, escapes its limits, and may be
# another's. Last come clone and fcntl, whose arguments decide.
_MACHINES = {
    "x86_64": (
        0xC000003E,
        # socket, socketpair; fork, vfork, execve, execveat
        [41, 53, 57, 58, 59, 322]
        # kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo; ptrace, process_vm_*, kcmp
        + [62, 200, 234, 129, 297, 101, 310, 311, 312]
        # prlimit64, prctl; setpriority, ioprio_set, sched_set*, migrate_pages, move_pages: of any process
        + [302, 157, 141, 251, 142, 144, 203, 314, 256, 279]
        # unshare, setns, mount, bpf, add_key, request_key, keyctl, userfaultfd, perf_event_open
        + [272, 308, 165, 321, 248, 249, 250, 323, 298]
        # shm*, sem*, msg*, mq_open, mq_unlink, memfd_create
        + [29, 30, 31, *range(64, 72), 220, 240, 241, 319]
        # inotify_init, inotify_init1, fanotify_init, name_to_handle_at, open_by_handle_at
        + [253, 294, 300, 303, 304]
        # chmod, chown, utime, setxattr, removexattr and their kin; truncate
        + [90, 91, 268, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199, 76],
        56,
        72,
    ),
    "aarch64": (
        0xC00000B7,
        [198, 199, 221, 281]
        + [129, 130, 131, 138, 240, 117, 270, 271, 272]
        + [261, 167, 140, 30, 118, 119, 122, 274, 238, 239]
        + [97, 268, 40, 280, 217, 218, 219, 282, 241]
        + [*range(186, 198), 180, 181, 279]
        + [26, 262, 264, 265]
        + [52, 53, 54, 55, 88, 5, 6, 7, 14, 15, 16, 45],
        220,
        25,
    ),
}
# From here on the numbers are those of younger calls, the same on all machines (io_uring, pidfd, mounts, clone3); from
# 2^30 on, of another way to make the old ones. Libraries do without any of them.
_YOUNGER = 424
_THREAD = 0x10000
# F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY: by these a file sends signals, to any process.
_SIGNALLING = (8, 10, 15, 1024, 1026)
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _HAS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


class _Unconfined(Exception):
    """The kernel does not offer what it takes."""


def _confine(megabytes: int, seconds: int) -> None:
    _limit(megabytes, seconds)
    if _LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise _Unconfined("privileges cannot be given up")
    # Of an administrator, whom the kernel would let load modules, set clocks and change the root folder.
    if _LIBC.capset(struct.pack("=Ii", _CAPABILITIES, 0), bytes(24)):
        raise _Unconfined("capabilities cannot be given up")
    _close_files()
    _close_calls()


def _limit(megabytes: int, seconds: int) -> None:
    size = megabytes * 2**20
    limits = {
        resource.RLIMIT_AS: size,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
        # Counts all that the user runs, not the program's threads alone.
        resource.RLIMIT_NPROC: 4096,
    }
    for kind, value in limits.items():
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))
    # Whoever started this may be killed in the meantime.
    _LIBC.prctl(_DEATH_SIGNAL, 9, 0, 0, 0)


def _close_files() -> None:
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise _Unconfined("the kernel has no Landlock, or it is switched off")
    rights = ctypes.c_uint64(_RIGHTS[max(known for known in _RIGHTS if known <= version)])
    rules = _LIBC.syscall(_CREATE_RULESET, ctypes.byref(rights), ctypes.c_size_t(8), 0)
    if rules < 0:
        raise _Unconfined("Landlock gives no rules")
    for folder in _readable():
        place = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", _READ, place), 12)
        if _LIBC.syscall(_ADD_RULE, rules, 1, rule, 0):
            raise _Unconfined("Landlock refuses a rule")
        os.close(place)
    if _LIBC.syscall(_RESTRICT_SELF, rules, 0):
        raise _Unconfined("Landlock cannot be entered")
    os.close(rules)


def _readable() -> list[str]:
    own = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    # What the standard library's own extensions load: compression, hashes, numbers.
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    return [folder for folder in dict.fromkeys([*own, *system]) if os.path.isdir(folder)]


def _close_calls() -> None:
    machine = platform.machine()
    if machine not in _MACHINES or struct.calcsize("P") != 8:
        raise _Unconfined(f"the system calls of {machine} are not known")
    steps = _steps(*_MACHINES[machine])
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))

    class _Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_void_p)]

    program = _Program(len(steps), ctypes.addressof(code))
    if _LIBC.prctl(_SECCOMP, 2, ctypes.byref(program), 0, 0):
        raise _Unconfined("the kernel has no seccomp filters")


def _steps(kind: int, refused: list[int], clone: int, fcntl: int) -> list[tuple[int, int, int, int]]:
    # Each step: what to do, how many to skip if it holds, and if not, and with what.
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, kind), (_RETURN, 0, 0, _KILL)]
    steps += [(_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, _YOUNGER), (_RETURN, 0, 0, _REFUSE | _ENOSYS)]
    for number in refused:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | _EPERM)]
    # It may only make threads.
    steps += [(_EQUAL, 0, 4, clone), (_LOAD, 0, 0, 16), (_HAS, 1, 0, _THREAD), (_RETURN, 0, 0, _REFUSE | _EPERM)]
    steps += [(_RETURN, 0, 0, _ALLOW)]
    signalling = [
        step for command in _SIGNALLING for step in ((_EQUAL, 0, 1, command), (_RETURN, 0, 0, _REFUSE | _EPERM))
    ]
    steps += [(_EQUAL, 0, 1 + len(signalling), fcntl), (_LOAD, 0, 0, 24), *signalling]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def _ending(program: str) -> str:
    if hasattr(sys, "set_int_max_str_digits"):
        # Tests hold longer numbers than Python reads by default.
        sys.set_int_max_str_digits(0)
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})  # noqa: S102
    except AssertionError:
        return "wrong"
    except MemoryError:
        return "memory"
    except SystemExit:
        return "stopped"
    except BaseException:
        return "error"
    return "passed"


def _main() -> None:
    word, megabytes, seconds, program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").split("\n", 3)
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    try:
        _confine(int(megabytes), int(seconds))
    except _Unconfined as refusal:
        os.write(answer, f"{word} {refusal}".encode())
    else:
        # Said before the program can say anything, so that it cannot deny it.
        os.write(answer, f"{word} confined\n".encode())
        os.write(answer, f"{word} {_ending(program)}".encode())
    # Threads of the program and what it has asked to be done at the end do not matter any more.
    os._exit(0)


if __name__ == "__main__":
    _main()
