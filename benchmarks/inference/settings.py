"""What is measured: the shapes of the models and the sizes of the cases, in full and as a quick run."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """The shape of a random model; its experts are called public, expert_1, ..."""

    hidden: int
    inner: int
    layers: int
    experts: int = 7
    vocabulary: int = 8192
    heads: int = 8

    def with_hidden(self, hidden: int) -> "Shape":
        """Return the shape at another width, the feed-forward width in proportion."""
        return replace(self, hidden=hidden, inner=self.inner * hidden // self.hidden)


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on but the machine.

    Attributes:
        rounds: How often each case is timed; the median counts.
        warm_ups: How often each case runs before that.
        main: The model of all figures but growth.
        per_token: Experts per token, one column of the comparison each.
        batches: Batch sizes for decoding.
        prompt: Tokens in the cache when decoding starts.
        prefill: Tokens of the prompt whose prefill is timed.
        new_tokens: Decoded tokens per run.
        small: The model whose growth is followed.
        experts: Numbers of experts, all used by every token.
        prompts: Lengths of the prompt.
        widths: Hidden sizes.
        buffer: Bytes read to measure the memory's bandwidth; far beyond the cache.
    """

    rounds: int = 15
    warm_ups: int = 2
    main: Shape = Shape(1024, 2752, 8)
    per_token: tuple[int, ...] = (4, 7)
    batches: tuple[int, ...] = (1, 4)
    prompt: int = 64
    prefill: int = 512
    new_tokens: int = 16
    small: Shape = Shape(512, 1376, 4)
    experts: tuple[int, ...] = (2, 4, 8, 16)
    prompts: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    widths: tuple[int, ...] = (256, 512, 768, 1024)
    buffer: int = 1_200_000_000


QUICK = Settings(
    rounds=1,
    warm_ups=1,
    main=Shape(64, 172, 2, vocabulary=512, heads=2),
    prompt=8,
    prefill=16,
    new_tokens=2,
    small=Shape(32, 88, 2, vocabulary=512, heads=2),
    experts=(2, 4),
    prompts=(8, 16),
    widths=(32, 64),
    buffer=8_000_000,
)
