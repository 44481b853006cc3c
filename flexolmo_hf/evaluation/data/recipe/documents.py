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
    """Turns rows into documents: filters, classifier, rewriting, contamination, repetitions, in this order.

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
    text = _joined(row, source.thread, source) if source.thread else _text(row, str(source.text), source)
    # Half a surrogate pair cannot be written.
    return text.encode("utf8", "replace").decode()


def _joined(row: Mapping[str, Any], thread: Thread, source: Source) -> str:
    answers = _of_kind(field_of(row, thread.answers), list, thread.answers, source)
    answers = [answer for answer in answers if _text(answer, thread.answer, source)]
    if thread.score is not None:
        # Stable, so that equal scores keep the order of the row.
        answers.sort(key=lambda answer: -_number(field_of(answer, str(thread.score)), str(thread.score), source))
    parts = [_text(row, thread.title, source), _text(row, thread.body, source)]
    parts += [_text(answer, thread.answer, source) for answer in answers[: thread.most]]
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _text(row: Mapping[str, Any], path: str, source: Source) -> str:
    text: str = _of_kind(field_of(row, path), str, path, source)
    return text


def _number(found: Any, path: str, source: Source) -> float:
    try:
        return float(found or 0)
    except (TypeError, ValueError):
        # Python's own message would quote the row.
        raise _other_kind(found, "a number", path, source) from None


def _of_kind(found: Any, kind: type, path: str, source: Source) -> Any:
    if found is None:
        return kind()
    if not isinstance(found, kind):
        raise _other_kind(found, "text" if kind is str else "a list", path, source)
    return found


def _other_kind(found: Any, wanted: str, path: str, source: Source) -> ConfigurationError:
    return ConfigurationError(
        f"The field {path!r} of the source {source.name!r} holds {type(found).__name__}, not {wanted}.",
        "Correct the recipe.",
    )
