"""Building a corpus from a recipe: streamed, filtered, and resumable at the last whole shard."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexolmo_hf._extras import require
from flexolmo_hf._folder import no_space_named, refuse_nonempty
from flexolmo_hf.errors import ConfigurationError, ResumeMismatchError, _did_you_mean
from flexolmo_hf.evaluation.data.decontamination import Decontaminator
from flexolmo_hf.evaluation.data.recipe.documents import Pipeline
from flexolmo_hf.evaluation.data.recipe.models import refuse_missing_models
from flexolmo_hf.evaluation.data.recipe.reading import read_recipe
from flexolmo_hf.evaluation.data.recipe.repetition import SeenTexts
from flexolmo_hf.evaluation.data.recipe.schema import Domain, Recipe, Source
from flexolmo_hf.evaluation.data.recipe.shards import ShardWriter, read_json, read_shards, write_json
from flexolmo_hf.evaluation.data.recipe.stream import Place, ShuffledRows, files_of
from flexolmo_hf.evaluation.data.tokens import QuarterOfBytes, TokenCounter

_STATE = "state.json"
#: What a finished corpus says about itself.
REPORT = "report.json"


def build_recipe(
    path: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    limit_tokens: int | None = None,
    local: Mapping[str, Place] | None = None,
    only: Sequence[str] | None = None,
    evaluation_texts: Iterable[str] = (),
) -> dict[str, Any]:
    """Build the corpus that a recipe describes: ``<domain>/shard-00000.jsonl`` and ``report.json``.

    Until the corpus is whole it stands beside its final place under a hidden name. A build that was ended there goes on
    when it is called again in the same way, and yields the same files as one that was not.

    Args:
        path: The recipe.
        output_dir: The final place; must not exist or be empty.
        tokenizer: Counts the tokens in the place of the recipe's: a tokenizer, the name of one, or "bytes / 4".
        limit_tokens: Most tokens of a domain, where the recipe wants more.
        local: Files or folders that stand in for sources, by the sources' names. With it nothing comes from the Hub, so
            each source has to be there.
        only: Domains to build; None for all.
        evaluation_texts: Benchmarks that no document may share 13 words with, such as `evaluation_texts` reads.

    Returns:
        The report: documents, bytes and tokens of each domain and source, what was dropped and why, and which sources
        ended before their share was reached.

    Raises:
        ConfigurationError: If the recipe, or what is asked of it, does not add up, or a source's rows have another
            schema.
        OutputFolderNotEmptyError: If the final place is taken.
        ResumeMismatchError: If an unfinished build lies there that was started otherwise.
        DamagedFileError: If files cannot be read.
        NoSpaceError: If the disk is full; with room made, the build goes on.
    """
    require("train", "datasets")
    recipe = _restricted(read_recipe(path), only, limit_tokens)
    files = _local_files(recipe, local)
    refuse_missing_models(recipe)
    final = refuse_nonempty(output_dir)
    decontaminator = Decontaminator(evaluation_texts)
    counter = _counter(recipe.tokenizer if tokenizer is None else tokenizer)
    settings = {
        "recipe": recipe.fingerprint(),
        "tokens counted by": counter.name,
        "local files": sorted(files) if local is not None else None,
        "decontaminated by": decontaminator.fingerprint(),
    }
    build = _Build(recipe, final.parent / f".{final.name}.building", files, counter, decontaminator)
    with no_space_named(final), tempfile.TemporaryDirectory() as cache:
        build.begin(settings)
        for domain in recipe.domains:
            build.make(domain, Path(cache))
        report = {"name": recipe.name, **settings, "evaluation runs": len(decontaminator), "domains": build.done}
        build.finish(report, final)
    return report


def _restricted(recipe: Recipe, only: Sequence[str] | None, limit: int | None) -> Recipe:
    names = [domain.name for domain in recipe.domains]
    for name in only or []:
        if name not in names:
            raise ConfigurationError(
                f"The recipe has no domain {name!r}.{_did_you_mean(name, names)}", f"It has {names}."
            )
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit_tokens is {limit}.", "Give a number above 0.")
    domains = tuple(
        dataclasses.replace(domain, tokens=min(domain.tokens, limit or domain.tokens))
        for domain in recipe.domains
        if only is None or domain.name in only
    )
    return dataclasses.replace(recipe, domains=domains)


def _local_files(recipe: Recipe, local: Mapping[str, Place] | None) -> dict[str, list[Path]]:
    if local is None:
        return {}
    names = [source.name for source in recipe.sources]
    for name in local:
        if name not in names:
            raise ConfigurationError(
                f"Local files are given for {name!r}, which is no source of the recipe.{_did_you_mean(name, names)}",
                f"Its sources are {names}.",
            )
    missing = [name for name in names if name not in local]
    if missing:
        raise ConfigurationError(
            f"There are local files for some sources and none for {', '.join(missing)}.",
            "Give files for each, or name the domains to build with only=[...].",
        )
    return {name: files_of(place, name) for name, place in local.items()}


class _Tokenizer:
    """Counts with a transformers tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # Of a path only the last component.
        self.name = f"{Path(tokenizer.name_or_path).name or type(tokenizer).__name__}, {len(tokenizer)} entries"

    def count(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text."""
        found = self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [len(ids) for ids in found]

    def cut(self, text: str, longest: int) -> str:
        """Return the beginning of a text with at most so many tokens."""
        ids = self._tokenizer(text, add_special_tokens=False).input_ids[:longest]
        return str(self._tokenizer.decode(ids))


def _counter(tokenizer: str | PreTrainedTokenizerBase) -> TokenCounter:
    if tokenizer == QuarterOfBytes.name:
        return QuarterOfBytes()
    if not isinstance(tokenizer, str):
        return _Tokenizer(tokenizer)
    try:
        return _Tokenizer(AutoTokenizer.from_pretrained(tokenizer))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"There is no tokenizer {Path(tokenizer).name!r} within reach.",
            f"Give tokenizer= a folder, a tokenizer, or {QuarterOfBytes.name!r} to estimate.",
        ) from error


@dataclass
class _Progress:
    """How far a domain is: the part of the state that changes with every row."""

    source: int = 0
    position: dict[str, Any] | None = None
    shards: int = 0
    rows: int = 0
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    by_source: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Return what a report says of the domain."""
        shown = dataclasses.asdict(self)
        return {name: value for name, value in shown.items() if name not in ("source", "position")}


class _Build:
    """A build under way, in a hidden folder of its own."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        files: Mapping[str, list[Path]],
        counter: TokenCounter,
        decontaminator: Decontaminator,
    ):
        self.recipe, self.folder, self.files = recipe, folder, files
        self.counter, self.decontaminator = counter, decontaminator
        # A document has a token, so no more than that many come.
        most = min(recipe.documents, sum(domain.tokens for domain in recipe.domains))
        self.seen = SeenTexts(most, recipe.repetition_error)
        self.done: dict[str, dict[str, Any]] = {}
        self.current: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    def begin(self, settings: dict[str, Any]) -> None:
        """Start, or read how far an earlier call came."""
        self.settings = settings
        state = read_json(self.folder / _STATE)
        if state is None:
            # What a build that never closed a shard has left may be of another recipe.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            return
        changes = [(name, state["settings"].get(name), now) for name, now in settings.items()]
        if changes := [change for change in changes if change[1] != change[2]]:
            raise ResumeMismatchError(changes)
        self.done, self.current = state["done"], state["current"]
        # What was kept is on the disk; a memory of its own would only have to be kept in step.
        counts = {name: report["shards"] for name, report in (self.done | self.current).items()}
        for domain in self.recipe.domains:
            for text in read_shards(self.folder / domain.name, counts.get(domain.name, 0)):
                self.seen.add(text)

    def make(self, domain: Domain, cache: Path) -> None:
        """Fill a domain's shards, from where they end."""
        if domain.name in self.done:
            return
        saved = self.current.get(domain.name)
        progress = _Progress(**saved) if saved else _Progress()
        writer = ShardWriter(self.folder / domain.name, number=progress.shards, limit=self.recipe.shard_bytes)
        try:
            for index in range(progress.source, len(domain.sources)):
                if index > progress.source:
                    progress.source, progress.position = index, None
                self._draw(domain, domain.sources[index], progress, writer, cache)
        except BaseException:
            writer.abandon()
            raise
        writer.close_shard()
        progress.shards = writer.number
        self.done[domain.name] = progress.report()
        self.current = {}
        self._save()

    def _draw(self, domain: Domain, source: Source, progress: _Progress, writer: ShardWriter, cache: Path) -> None:
        wanted = round(domain.tokens * source.weight / sum(each.weight for each in domain.sources))
        taken = progress.by_source.setdefault(source.name, 0)
        if taken >= wanted:
            return
        rows = ShuffledRows(
            source,
            self.files.get(source.name),
            cache,
            seed=self.recipe.seed,
            block=self.recipe.shuffle_rows,
            position=progress.position,
        )
        pipeline = Pipeline(source, self.seen, self.decontaminator, progress.dropped, writer.drop)
        for text in pipeline.documents(rows):
            progress.rows += 1
            if text is None:
                continue
            writer.write(text)
            taken += (tokens := self.counter.count([text])[0])
            progress.documents += 1
            progress.bytes += len(text.encode())
            progress.tokens += tokens
            progress.by_source[source.name] = taken
            if writer.full:
                writer.close_shard()
                progress.shards, progress.position = writer.number, rows.position()
                self.current = {domain.name: dataclasses.asdict(progress)}
                self._save()
            if taken >= wanted:
                return
        progress.ended.append(source.name)

    def _save(self) -> None:
        write_json(self.folder / _STATE, {"settings": self.settings, "done": self.done, "current": self.current})

    def finish(self, report: dict[str, Any], final: Path) -> None:
        """Write the report and give the folder its final name."""
        write_json(self.folder / REPORT, report)
        if final.exists():
            final.rmdir()
        self.folder.replace(final)
        # Last: without it, a build that ends here would be taken for one that has not begun, and begun anew.
        (final / _STATE).unlink(missing_ok=True)
