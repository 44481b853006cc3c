"""How large each part of the demo is: one instance for the real run, one for a quick look."""

from dataclasses import dataclass

# The owners' domains, in the order in which they join the model. `public` is the anchor's.
OWNERS = ("math", "code")
DOMAINS = ("public", *OWNERS)


@dataclass(frozen=True)
class DemoSettings:
    """The demo's sizes. Budgets are bytes of text, which no tokenizer can change.

    Attributes:
        heldout_bytes: Held-out text per domain.
        wikipedia_bytes: Wikipedia text in the public corpus.
        public_share: Text of each owner's domain in the public corpus, as a share of the Wikipedia text. A web crawl
            holds some of everything; without it the frozen embeddings would never have seen the tokens an expert needs.
        owner_bytes: Text of each owner.
        sequence: Tokens per training sequence and per evaluation window.
        batch: Sequences per training step.
    """

    heldout_bytes: int
    wikipedia_bytes: int
    public_share: float
    owner_bytes: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    public_rate: float
    expert_rate: float
    owner_epochs: float
    sequence: int = 256
    batch: int = 4
    seed: int = 0


FULL = DemoSettings(
    heldout_bytes=100_000,
    wikipedia_bytes=3_000_000,
    public_share=0.04,
    owner_bytes=700_000,
    vocabulary=4096,
    hidden=192,
    intermediate=576,
    layers=4,
    heads=6,
    public_rate=3e-3,
    expert_rate=2e-3,
    owner_epochs=1,
)
QUICK = DemoSettings(
    heldout_bytes=30_000,
    wikipedia_bytes=450_000,
    public_share=0.06,
    owner_bytes=200_000,
    vocabulary=1024,
    hidden=64,
    intermediate=192,
    layers=2,
    heads=2,
    public_rate=5e-3,
    expert_rate=5e-3,
    owner_epochs=1,
    sequence=128,
)
