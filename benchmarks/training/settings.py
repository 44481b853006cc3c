"""What is measured: the shape of the model and the size of a step, in full and as a smoke run."""

from dataclasses import dataclass

from benchmarks.inference.settings import Shape


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on but the machine.

    Attributes:
        rounds: How often each step is timed; the median counts.
        warm_ups: How many steps come before that; stock's slower ways are given up there.
        memory_rounds: How often each peak is measured, in a process of its own each time.
        memory_steps: Steps of each of these.
        main: The model.
        batch: Sequences of a step.
        tokens: Tokens of each.
        wide: The model whose vocabulary is that of the released checkpoints.
        ranks: Ranks of low-rank experts.
        learning_steps: Steps before an expert's quality is measured.
    """

    rounds: int = 5
    warm_ups: int = 2
    memory_rounds: int = 2
    memory_steps: int = 2
    main: Shape = Shape(512, 1376, 8, experts=2)
    batch: int = 4
    tokens: int = 256
    wide: Shape = Shape(512, 1376, 2, experts=2, vocabulary=100_352)
    ranks: tuple[int, ...] = (8, 32, 64)
    learning_steps: int = 150


SMOKE = Settings(
    rounds=1,
    warm_ups=1,
    memory_rounds=1,
    memory_steps=1,
    main=Shape(64, 160, 2, experts=2, vocabulary=512, heads=2),
    batch=2,
    tokens=16,
    wide=Shape(16, 32, 1, experts=2, vocabulary=40_000, heads=2),
    ranks=(2, 8),
    learning_steps=2,
)
