"""How long it takes to load a checkpoint of seven experts, and how much memory, against stock transformers.

Each measurement is a process of its own, so that none finds the memory another has left; the three contestants take
turns, so that a machine whose speed drifts is as fast for one as for the other. The file cache is warm for all of them.
Results go to docs/benchmarks/loading.md and loading.json.

Run: python benchmarks/bench_loading.py [--runs 7] [--quick]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
CONTESTANTS = ("stock", "ours", "ours, 2 of 7")
MEASURES = {
    "load_s": "load (s)",
    "first_s": "load and first forward (s)",
    "anonymous_mb": "peak extra memory while loading (MB)",
    "resident_mb": "resident after the first forward (MB)",
}


def make_checkpoint(folder: Path, *, quick: bool) -> None:
    """Write a random checkpoint: about 1.1 GB in fp32, or 5 MB if quick."""
    import flexolmo_hf

    width = 64 if quick else 1024
    config = flexolmo_hf.FlexOlmoConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_experts=7,
        pad_token_id=0,
        eos_token_id=1,
    )
    flexolmo_hf.FlexOlmoForCausalLM(config).save_pretrained(folder)


def memory(kind: str) -> float:
    """Return this process's memory of one kind in MB, as Linux counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {kind} in /proc/self/status")


class PeakAnonymous:
    """Watch the memory that belongs to this process alone; pages mapped from files are the system's to take back."""

    def __enter__(self) -> "PeakAnonymous":
        self.start = self.peak = memory("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, memory("RssAnon"))

    @property
    def growth(self) -> float:
        """Peak above the start, in MB."""
        return self.peak - self.start


def measure(contestant: str, folder: str, warm_up: str) -> dict[str, float]:
    """Load once in this process, after a tiny load that pays for imports."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if contestant == "stock":
        model_class, options = transformers.FlexOlmoForCausalLM, {}
    else:
        import flexolmo_hf

        model_class = flexolmo_hf.FlexOlmoForCausalLM
        options = {"active_experts": ["public", "expert_3"]} if "2 of 7" in contestant else {}
    model_class.from_pretrained(warm_up, **options)
    tokens = torch.arange(8).unsqueeze(0)
    with PeakAnonymous() as watch:
        begin = time.perf_counter()
        model = model_class.from_pretrained(folder, **options)
        loaded = time.perf_counter()
    with torch.no_grad():
        again = time.perf_counter()
        model(tokens)
        first = time.perf_counter() - again
    return {
        "load_s": loaded - begin,
        "first_s": loaded - begin + first,
        "anonymous_mb": watch.growth,
        "resident_mb": memory("VmRSS"),
    }


def run_once(contestant: str, folder: Path, warm_up: Path) -> dict[str, float]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--child", contestant, str(folder), str(warm_up)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def ratio(stock: float, other: float) -> str:
    """Write how many times stock's figure is another's."""
    times = stock / other
    return "over 1000x" if times > 1000 else f"{times:.1f}x"


def report(medians: dict[str, dict[str, float]], runs: int, size: float, versions: str) -> str:
    """Write the page."""
    lines = [
        "# Loading",
        "",
        f"A random checkpoint of seven experts, {size:.2f} GB in fp32, on 2 cores; medians of {runs} runs, each in a",
        "process of its own, taking turns; the file cache is warm. Written by `make bench`.",
        "",
        f"| | {' | '.join(CONTESTANTS)} | stock / ours | stock / ours, 2 of 7 |",
        "|---|---|---|---|---|---|",
    ]
    for key, title in MEASURES.items():
        values = [medians[contestant][key] for contestant in CONTESTANTS]
        cells = [f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in values]
        cells += [ratio(values[0], value) for value in values[1:]]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "Stock fuses the experts of a layer into 3-D tensors and copies each of them on the way. Here the file's",
        "layout is the memory's, so weights are mapped and nothing is copied. A mapped page is read when it is first",
        "used, which the second line counts too. Extra memory is what belongs to the process alone (anonymous pages);",
        "pages mapped from the file are the system's to take back, and are in the last line. Experts that are left out",
        "are never read.",
        "",
        f"Versions: {versions}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint, to see that it works; writes nothing")
    parser.add_argument("--child", nargs=3, metavar=("WHO", "FOLDER", "WARM_UP"))
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    import safetensors
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        folder, warm_up = Path(scratch, "checkpoint"), Path(scratch, "warm_up")
        make_checkpoint(folder, quick=arguments.quick)
        make_checkpoint(warm_up, quick=True)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
        results: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in CONTESTANTS}
        for number in range(arguments.runs):
            for contestant in CONTESTANTS:
                results[contestant].append(run_once(contestant, folder, warm_up))
                print(f"run {number + 1}, {contestant}: {results[contestant][-1]}", flush=True)
    medians = {
        who: {key: statistics.median(run[key] for run in runs) for key in MEASURES} for who, runs in results.items()
    }
    versions = ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in (torch, transformers, safetensors))
    page = report(medians, arguments.runs, size, versions)
    print(page)
    if not arguments.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "loading.md").write_text(page, encoding="utf-8")
        content = {"size_gb": size, "versions": versions, "medians": medians, "runs": results}
        (RESULTS / "loading.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
