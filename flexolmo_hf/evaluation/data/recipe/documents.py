"""From a source's rows to its documents, with a count of what was dropped and why."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.decontamination import Decontaminator, document_hash
from flexolmo_hf.evaluation.data.recipe.filters import field_of
from flexolmo_hf.evaluation.data.recipe.models import classifier, rewriter
from flexolmo_hf.evaluation.data.recipe.repetition import SeenTexts
from flexolmo_hf.evaluation.data.recipe.schema import Source, Thread


@dataclass
class Pipeline:
    """Turns rows into documents: filters, classifier, rewriting, repetitions, contamination, in this order.

    Args:
        source: Whose rows they are.
        seen: What was kept so far, in all domains.
        decontaminator: What must not be kept.
        dropped: Counts of what is dropped, by reason; added to.
        contaminated: Told the sha256 of each document that is dropped as contaminated.
    """

    source: Source
    seen: SeenTexts
    decontaminator: Decontaminator
    dropped: dict[str, int]
    contaminated: Callable[[str], None]
    _keeps: Callable[[str], bool] | None = field(init=False)
    _rewrite: Callable[[str], str] | None = field(init=False)

    def __post_init__(self) -> None:
        """Load the models that the source needs."""
        self._keeps = classifier(self.source.classify) if self.source.classify else None
        self._rewrite = rewriter(self.source.rewrite) if self.source.rewrite else None

    def documents(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[str | None]:
        """Yield the document that each row becomes, or None for a row that is dropped."""
        for row in rows:
            text = text_of(row, self.source)
            yield self._checked(row, text)

    def _checked(self, row: Mapping[str, Any], text: str) -> str | None:
        reason = self._filtered(row, text)
        if reason is None and self._rewrite is not None:
            text = self._rewrite(text)
        if reason is None and not text.strip():
            reason = "empty"
        # Before the memory: what is dropped elsewhere for contamination was not kept.
        if reason is None and self.decontaminator.is_contaminated(text):
            reason = "contaminated"
            self.contaminated(document_hash(text))
        if reason is None and not self.seen.add(text):
            reason = "repeated"
        if reason is not None:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
            return None
        return text

    def _filtered(self, row: Mapping[str, Any], text: str) -> str | None:
        if not text.strip():
            return "empty"
        for each in self.source.filters:
            if not each.keeps(row, text):
                return each.name
        if self._keeps is not None and not self._keeps(text):
            return "classify"
        return None


def text_of(row: Mapping[str, Any], source: Source) -> str:
    """Return the text of a row.

    Raises:
        ConfigurationError: If the row lacks a field, or the field holds something else.
    """
    text = _joined(row, source.thread) if source.thread else field_of(row, str(source.text))
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ConfigurationError(
            f"The field {source.text!r} of the source {source.name!r} holds {type(text).__name__}, not text.",
            "Correct the recipe.",
        )
    # Half a surrogate pair cannot be written.
    return text.encode("utf8", "replace").decode()


def _joined(row: Mapping[str, Any], thread: Thread) -> str:
    answers = [answer for answer in field_of(row, thread.answers) or [] if field_of(answer, thread.answer)]
    if thread.score is not None:
        # Stable, so that equal scores keep the order of the row.
        answers.sort(key=lambda answer: -float(field_of(answer, thread.score or "") or 0))
    parts = [field_of(row, thread.title), field_of(row, thread.body)]
    parts += [field_of(answer, thread.answer) for answer in answers[: thread.most]]
    return "\n\n".join(part.strip() for part in parts if part and part.strip())
