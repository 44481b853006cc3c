"""What a recipe says: domains, their sources, the filters of each, and how many tokens are wanted."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from flexolmo_hf.evaluation.data.recipe.filters import Filter

#: The committed recipe of the full corpus.
FLEXMIX = Path(__file__).with_name("flexmix.yaml")


@dataclass(frozen=True)
class Thread:
    """How a discussion lies in a row: a question and a list of answers, to be joined into one text.

    Attributes:
        title: Field of the question's title.
        body: Field of what follows the title.
        answers: Field of the list of answers.
        answer: Field of an answer that holds its text.
        score: Field of an answer by which the best come first; None to keep their order.
        most: How many answers are kept.
    """

    title: str
    body: str
    answers: str
    answer: str = "body"
    score: str | None = None
    most: int = 3


@dataclass(frozen=True)
class Classify:
    """Keep what a text classifier calls by certain labels.

    Attributes:
        model: Folder or repository of a sequence classification model that transformers has the code of.
        labels: Labels to keep; empty for all but `but`.
        but: Labels to drop; empty unless `labels` is.
        min_score: Lowest probability of the label.
        max_length: Tokens of a text that are read.
    """

    model: str | None = None
    labels: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    min_score: float = 0.0
    max_length: int = 512


@dataclass(frozen=True)
class Rewrite:
    """Let a language model write each text anew.

    Attributes:
        model: Folder or repository of a causal language model.
        prompt: What it is asked, with ``{text}`` where the text goes.
        max_new_tokens: Longest answer.
        max_length: Longest text that is rewritten, in tokens; longer ones are cut.
    """

    prompt: str
    model: str | None = None
    max_new_tokens: int = 1024
    max_length: int = 2048


@dataclass(frozen=True)
class Source:
    """A data set, and what is kept of it.

    Attributes:
        name: Its name in this recipe.
        repository: The data set on the Hub.
        licence: The licence it states.
        text: Field that holds the text; dots lead into nested fields. Or `thread`.
        thread: How a discussion becomes a text, in the place of `text`.
        config: Its configuration (subset).
        data_dir: A folder of it.
        data_files: File patterns of it.
        reader: "json" or "parquet", to read `data_files` as they are where the repository holds a loading script.
        split: Its split.
        revision: Its branch, tag or commit.
        weight: Share of the domain's tokens, beside the other sources' weights.
        filters: Tests a row has to pass, in order.
        classify: A classifier's test, after those.
        rewrite: A language model's rewriting, after that.
    """

    name: str
    repository: str
    licence: str
    text: str | None = None
    thread: Thread | None = None
    config: str | None = None
    data_dir: str | None = None
    data_files: tuple[str, ...] = ()
    reader: str | None = None
    split: str = "train"
    revision: str = "main"
    weight: float = 1.0
    filters: tuple[Filter, ...] = ()
    classify: Classify | None = None
    rewrite: Rewrite | None = None


@dataclass(frozen=True)
class Domain:
    """One owner's, or the public's, share of the corpus.

    Attributes:
        name: The domain.
        tokens: How many tokens are wanted.
        sources: Where they come from.
    """

    name: str
    tokens: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Recipe:
    """A corpus.

    Attributes:
        name: Its name.
        tokenizer: Repository or folder of the tokenizer that counts, or "bytes / 4".
        domains: Its parts, in the order in which they are built: a text goes to the first domain that takes it.
        seed: Decides the order of the rows.
        shuffle_rows: Rows that are shuffled at a time.
        shard_bytes: Size from which on a file is closed and the next one opened.
        documents: How many documents the memory for repetitions is made for.
        repetition_error: Share of documents that are taken for a repetition by mistake once it is full.
    """

    name: str
    tokenizer: str
    domains: tuple[Domain, ...]
    seed: int = 0
    shuffle_rows: int = 10_000
    shard_bytes: int = 1_000_000_000
    documents: int = 100_000_000
    repetition_error: float = 1e-4

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources, in order."""
        return tuple(source for domain in self.domains for source in domain.sources)

    def fingerprint(self) -> str:
        """Return the sha256 of everything the recipe says."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
