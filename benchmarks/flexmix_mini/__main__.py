"""Run the study: ``python -m benchmarks.flexmix_mini --output FOLDER``; ``--smoke`` for a quick look.

An interrupted study goes on where it ended when it is run again with the same folder, which takes no other settings.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.report import write_page
from benchmarks.flexmix_mini.running import Step, run_steps
from benchmarks.flexmix_mini.settings import FULL, SMOKE
from benchmarks.flexmix_mini.steps import all_steps
from flexolmo_hf.errors import ConfigurationError

PAGE = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    """Read the command line and run the study."""
    # Before torch is imported by the workers, which inherit it: threads that wait actively take the cores of others.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flexmix_mini", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the study; kept for going on")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, in a few minutes")
    parser.add_argument("--encoder", help="folder of a sentence-transformers model, for the rows of one variant")
    parser.add_argument("--cache", help="folder of the data packages")
    parser.add_argument("--workers", type=int, help="processes; default as many as cores")
    parser.add_argument("--report", action="store_true", help="write the page from what is done so far")
    parser.add_argument("--only", help="do only the steps whose name begins so, and what they need")
    given = parser.parse_args()
    settings = SMOKE if given.smoke else FULL
    place = Place(given.output, settings)
    steps = all_steps(settings, cache=given.cache, encoder=given.encoder)
    if given.only:
        steps = needed_for(steps, given.only)
    if not given.report:
        try:
            with place.alone():
                place.keep_settings()
                run_steps(place, steps, workers=given.workers)
        except ConfigurationError as error:
            sys.exit(str(error))
    if not given.only:
        page = given.output / "study.md" if given.smoke else PAGE / "study.md"
        missing = [step.name for step in steps if not place.is_done(step.name)]
        write_page(place, page, page.with_suffix(""), missing)


def needed_for(steps: list[Step], beginning: str) -> list[Step]:
    """Return the steps whose name begins so and all that they need, in order."""
    wanted = {step.name for step in steps if step.name.startswith(beginning)}
    for step in reversed(steps):
        if step.name in wanted:
            wanted |= set(step.needs)
    return [step for step in steps if step.name in wanted]


if __name__ == "__main__":
    main()
