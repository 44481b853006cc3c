"""Load time and peak memory: one load and one forward pass, in a process of its own."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.inference.processes import command_and_place
from benchmarks.inference.turns import say

SUBSET = ["public", "expert_3"]
CONTESTANTS: dict[str, list[str] | None] = {"stock": None, "ours": None, "subset": SUBSET}


def resident(kind: str) -> int:
    """Return bytes of this process's resident memory, mapped files included, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {kind} in /proc/self/status")


def measure_here(who: str, folder: str, warm_up: str) -> dict[str, float]:
    """Load and run a model once in this process, after a tiny one that pays for imports."""
    import torch

    from benchmarks.inference.worker import Bench

    transformers_quiet()
    bench, active = Bench("stock" if who == "stock" else "ours"), CONTESTANTS[who]
    bench.load(warm_up, per_token=7, active=active)
    tokens_BT = torch.arange(2, 10).unsqueeze(0)
    with torch.no_grad():
        bench.model(tokens_BT)
        before = resident("VmRSS")
        # The collector looks through all that the libraries hold, which is no part of loading.
        bench.clear()
        begin = time.perf_counter()
        bench.load(folder, per_token=7, active=active)
        loaded = time.perf_counter()
        bench.model(tokens_BT)
        ran = time.perf_counter()
    peak = resident("VmHWM")
    return {"load_s": loaded - begin, "ready_s": ran - begin, "peak": peak, "growth": peak - before}


def transformers_quiet() -> None:
    """Keep progress bars out of what this process prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def measure(folder: Path, warm_up: Path, rounds: int) -> dict[str, Any]:
    """Return the medians of stock, ours, and ours with 2 of 7 experts, which take turns.

    Each runs twice a round: with the files in the cache, and read from the disk, of which the times are kept under
    ``disk_load_s`` and ``disk_ready_s``.
    """
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in CONTESTANTS}
    for number in range(rounds):
        for who in CONTESTANTS:
            cached = _in_a_process(who, folder, warm_up)
            forget_files(folder)
            read = _in_a_process(who, folder, warm_up)
            runs[who].append(cached | {f"disk_{key}": read[key] for key in ("load_s", "ready_s")})
            times = ", ".join(f"{run['load_s']:.2f} s ({run['ready_s']:.2f} s with a pass)" for run in (cached, read))
            say(f"load, run {number + 1} of {rounds}, {who}, cached and from disk: {times}")
    medians = {who: {key: statistics.median(run[key] for run in of) for key in of[0]} for who, of in runs.items()}
    return {"medians": medians, "runs": runs}


def _in_a_process(who: str, folder: Path, warm_up: Path) -> dict[str, float]:
    place = command_and_place("memory", who, str(folder), str(warm_up))
    done = subprocess.run(**place, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def forget_files(folder: Path) -> None:
    """Drop a checkpoint's weights from the system's file cache, so that the next process reads the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            # What is not on the disk yet would stay.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    print(json.dumps(measure_here(*sys.argv[1:])))
