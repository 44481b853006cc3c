"""Reading a recipe from YAML: names, kinds and contradictions are told before anything is fetched."""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flexolmo_hf.errors import ConfigurationError, DamagedFileError, _did_you_mean
from flexolmo_hf.evaluation.data.recipe.filters import Filter, filter_from
from flexolmo_hf.evaluation.data.recipe.schema import Domain, Recipe, Source

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; of a name that comes twice it would silently forget the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"The recipe says {str(name)!r} twice in one place.", "Say it once.")
        return super().construct_mapping(node, deep)


def read_recipe(path: str | os.PathLike) -> Recipe:
    """Read a recipe from YAML.

    Raises:
        ConfigurationError: If it is not there, a name is unknown, something is missing or of the wrong kind, or
            settings contradict each other.
        DamagedFileError: If the file is not YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"There is no recipe {path.name!r}.", "Give a YAML file, such as a copy of FLEXMIX.")
    try:
        said = yaml.load(path.read_text("utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DamagedFileError(path.name, "it is not YAML") from error
    recipe: Recipe = _read(Recipe, said, "the recipe")
    _check(recipe)
    return recipe


def _read(kind: type, said: Any, place: str) -> Any:
    """Make a dataclass of a mapping, and of what it holds."""
    said = _mapping(said, place)
    hints = typing.get_type_hints(kind)
    for name in said:
        if name not in hints:
            raise ConfigurationError(
                f"{place} says {name!r}, which nothing reads.{_did_you_mean(str(name), hints)}",
                f"It may say {', '.join(hints)}.",
            )
    missing = [
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and item.name not in said
    ]
    if missing:
        raise ConfigurationError(f"{place} does not say {', '.join(missing)}.", "Add it.")
    return kind(**{name: _value(hints[name], value, f"{place}, {name}") for name, value in said.items()})


def _value(hint: Any, said: Any, place: str) -> Any:
    if isinstance(hint, types.UnionType):
        return None if said is None else _value(typing.get_args(hint)[0], said, place)
    if typing.get_origin(hint) is tuple:
        return _values(typing.get_args(hint)[0], said, place)
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast(type, hint), said, place)
    # YAML reads 1e9 as text and 2 as an int where 2.0 is meant.
    wanted = (int, float) if hint is float else hint
    if not isinstance(said, wanted) or (isinstance(said, bool) and hint is not bool):
        raise ConfigurationError(
            f"{place} is {type(said).__name__}, not {hint.__name__}.", "Write numbers as 1000000 or 1.0e+6."
        )
    return said


def _values(hint: Any, said: Any, place: str) -> tuple[Any, ...]:
    if hint in (Domain, Source) and isinstance(said, Mapping):
        # Names stand before what they name.
        return tuple(
            _read(hint, {"name": str(name), **_mapping(value, f"{place}, {name}")}, f"{place}, {name}")
            for name, value in said.items()
        )
    if not isinstance(said, Sequence) or isinstance(said, str):
        raise ConfigurationError(f"{place} is {type(said).__name__}, not a list.", "Write one `- ` line for each.")
    if hint is Filter:
        return tuple(filter_from(value, place) for value in said)
    return tuple(_value(hint, value, place) for value in said)


def _mapping(said: Any, place: str) -> dict[str, Any]:
    if not isinstance(said, Mapping):
        raise ConfigurationError(f"{place} is {type(said).__name__}, not a mapping of names.", "Write `name: value`.")
    return dict(said)


def _check(recipe: Recipe) -> None:
    names = [domain.name for domain in recipe.domains] + [source.name for source in recipe.sources]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} cannot be a name.", "Names become folders: use letters, digits, - and _."
            )
    repeated = {source.name for source in recipe.sources if [s.name for s in recipe.sources].count(source.name) > 1}
    if repeated:
        raise ConfigurationError(f"Several sources are called {sorted(repeated)[0]!r}.", "Name each once.")
    _check_numbers(recipe)
    if not recipe.domains:
        raise ConfigurationError("The recipe has no domains.", "Give it at least one.")
    for domain in recipe.domains:
        if not domain.sources:
            raise ConfigurationError(f"The domain {domain.name!r} has no sources.", "Give it one, or leave it out.")
    for source in recipe.sources:
        _check_source(source)


def _check_numbers(recipe: Recipe) -> None:
    positive = {
        "shuffle_rows": recipe.shuffle_rows,
        "shard_bytes": recipe.shard_bytes,
        "documents": recipe.documents,
        **{f"tokens of {domain.name}": domain.tokens for domain in recipe.domains},
        **{f"weight of {source.name}": source.weight for source in recipe.sources},
    }
    for name, number in positive.items():
        if number <= 0:
            raise ConfigurationError(f"{name} is {number}.", "Give a number above 0.")
    if not 0 < recipe.repetition_error < 1:
        raise ConfigurationError(f"repetition_error is {recipe.repetition_error}.", "Give a share between 0 and 1.")


def _check_source(source: Source) -> None:
    if (source.text is None) == (source.thread is None):
        raise ConfigurationError(
            f"The source {source.name!r} says {'neither' if source.text is None else 'both'} text and thread.",
            "Say which field holds the text, or how a discussion becomes one.",
        )
    if source.reader not in (None, "json", "parquet") or (source.reader and not source.data_files):
        raise ConfigurationError(
            f"The source {source.name!r} is read as {source.reader!r}, without a kind or without files to read.",
            "Give reader: json or parquet, and data_files; or neither reader.",
        )
    if source.classify and bool(source.classify.labels) == bool(source.classify.but):
        raise ConfigurationError(
            f"The classifier of {source.name!r} is to keep certain labels and all but certain labels.",
            "Give either labels or but.",
        )
    if source.rewrite and "{text}" not in source.rewrite.prompt:
        raise ConfigurationError(
            f"The prompt by which {source.name!r} is rewritten has no place for the text.", "Write {text} into it."
        )
