"""Label sets: the words with which a language model says what kind of text it read, and the expert behind each."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.names import PUBLIC

#: The label sets that come along: the domains of the paper's two comparisons, and those of the small corpus.
LABEL_SETS = ("four", "eight", "mini")

_FOLDER = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Label:
    """One answer.

    Attributes:
        word: What the language model answers with.
        expert: Who then continues the text.
        description: What the word stands for, as the language model is told.
    """

    word: str
    expert: str
    description: str


@dataclass(frozen=True)
class LabelSet:
    """A question to a language model, and its possible answers.

    Attributes:
        name: What the set is called.
        question: The prompt, with ``{text}`` and ``{labels}`` where they belong.
        labels: The answers; one of them stands for the public expert.

    Raises:
        ConfigurationError: If an answer could be taken for another, or a part is missing.
    """

    name: str
    question: str
    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        """Check that an answer can be told from the others."""
        for part in ("{text}", "{labels}"):
            if self.question.count(part) != 1:
                raise ConfigurationError(
                    f"The question of the label set {self.name!r} has {part} {self.question.count(part)} times.",
                    "It stands in it once.",
                )
        words = [label.word.casefold() for label in self.labels]
        for at, word in enumerate(words):
            if not word.strip() or any(other.startswith(word) for place, other in enumerate(words) if place != at):
                raise ConfigurationError(
                    f"The label {self.labels[at].word!r} is empty or begins another label.",
                    "Choose words of which none begins another: what is more likely could not be told.",
                )
        if PUBLIC not in self.experts:
            raise ConfigurationError(
                f"No label of {self.name!r} stands for {PUBLIC!r}.", "Give one for texts of no special kind."
            )

    @property
    def experts(self) -> list[str]:
        """The experts the labels stand for, in order, each once."""
        return list(dict.fromkeys(label.expert for label in self.labels))

    def prompt(self, text: str) -> str:
        """Return the question about a text. What the text holds is never taken for a place to fill."""
        labels = "\n".join(f"- {label.word}: {label.description}" for label in self.labels)
        before, after = (part.replace("{labels}", labels) for part in self.question.split("{text}"))
        return f"{before}{text}{after}"

    def only(self, experts: Iterable[str]) -> "LabelSet":
        """Return the set without the labels of experts that are not there.

        Raises:
            ConfigurationError: If an expert has no label, and could never be chosen.
        """
        there = list(experts)
        if without := [name for name in there if name not in self.experts]:
            raise ConfigurationError(
                f"The label set {self.name!r} has no label for {without}.",
                f"It has labels for {self.experts}. Write a label set that has one for each expert.",
            )
        return replace(self, labels=tuple(label for label in self.labels if label.expert in there))

    def record(self) -> dict[str, Any]:
        """Return the set as JSON and YAML hold it."""
        return {**asdict(self), "labels": [asdict(label) for label in self.labels]}

    @classmethod
    def from_record(cls, record: Any) -> "LabelSet":
        """Read what `record` returned.

        Raises:
            ConfigurationError: If it is something else.
        """
        try:
            labels = tuple(Label(**{key: str(value) for key, value in label.items()}) for label in record["labels"])
            return cls(str(record["name"]), str(record["question"]), labels)
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(
                "The label set cannot be read.",
                "It has name, question and labels; each label has word, expert and description.",
            ) from error

    @classmethod
    def read(cls, name: str | os.PathLike) -> "LabelSet":
        """Read a label set.

        Args:
            name: One of `LABEL_SETS`, or a YAML file of that form.

        Raises:
            ConfigurationError: If there is none, or it is of another form.
        """
        path = _FOLDER / f"{name}.yaml" if name in LABEL_SETS else Path(name)
        if not path.is_file():
            raise ConfigurationError(
                f"There is no label set {Path(name).name!r}.", f"Give a YAML file, or one of {', '.join(LABEL_SETS)}."
            )
        try:
            return cls.from_record(yaml.safe_load(path.read_text("utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigurationError("The label set is not YAML.", "Write it as the ones that come along.") from error
