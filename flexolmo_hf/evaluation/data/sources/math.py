"""Mathematics: the problems of the test split of MATH with their solutions (MIT), less the benchmark MATH-500."""

import zipfile
from pathlib import Path

from flexolmo_hf.evaluation.data.sources.olmes import requested_documents

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def math_problems(wheel: Path) -> list[str]:
    """Read the problems of MATH with their solutions, without those of the benchmark MATH-500."""
    with zipfile.ZipFile(wheel) as archive:
        benchmark = {problem["problem"].strip() for problem in _problems(archive, "500")}
        problems = [problem for subject in MATH_SUBJECTS for problem in _problems(archive, subject)]
    return [
        f"{problem['problem'].strip()}\n{problem['solution'].strip()}"
        for problem in problems
        if problem["problem"].strip() not in benchmark
    ]


def _problems(archive: zipfile.ZipFile, subject: str) -> list[dict[str, str]]:
    return list(requested_documents(archive, f"minerva_math_{subject}/gold_bpb_0shot"))
