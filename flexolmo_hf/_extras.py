"""Say which extra to install when an optional library is missing."""

from importlib.util import find_spec

from flexolmo_hf.errors import MissingExtraError


def require(extra: str, *modules: str) -> None:
    """Raise unless the modules of an extra can be imported.

    Raises:
        MissingExtraError: With the line that installs them.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(extra, missing)
