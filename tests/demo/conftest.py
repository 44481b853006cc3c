from pathlib import Path

import pytest

from flexolmo_hf.evaluation.data.packages import WHEELS, cache_folder


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The folder of the data packages, which are fetched beforehand: tests open no connection."""
    folder = Path(__file__).parents[2] / cache_folder()
    missing = [wheel.file for wheel in WHEELS if not (folder / wheel.file).exists()]
    if missing:
        pytest.fail(f"Data packages are missing ({', '.join(missing)}). Run `make data` once, or `make test`.")
    return folder
