"""How large the study is: one instance for the real run, one for a quick look."""

from dataclasses import dataclass, field

from flexolmo_hf.evaluation.data.mini import Budgets

#: The owners of the paper's table 1 (math, educational, code), by what they are here.
TABLE_1 = ("math", "howto", "code")


@dataclass(frozen=True)
class Levers:
    """What the method leaves open; chosen on validation text, see `benchmarks/flexmix_mini/levers.py`.

    Attributes:
        expert_rate: Peak learning rate of experts.
        dense_rate: Peak learning rate of the dense models of soup, BTM and BTX.
        joint_rate: Peak learning rate of BTX and of the unrestricted mixtures.
        router_scale: Learning rate of the router's row and bias over that of the expert.
        rows: Where router rows come from: ``"contrast"``, ``"hidden states"`` or ``"encoder"``.
        bias_start: Where the negative bias starts.
        tuning_rate: Peak learning rate of router tuning.
        tuning_tokens: Tokens of router tuning.
        btm_temperature: Of BTM's softmax over the members' losses.
        btm_loss: Whether BTM weighs by the mean or the sum of the losses.
    """

    expert_rate: float = 5e-3
    dense_rate: float = 5e-3
    joint_rate: float = 2.5e-3
    router_scale: float = 0.2
    rows: str = "contrast"
    bias_start: float = -1.0
    tuning_rate: float = 1e-2
    tuning_tokens: int = 200_000
    btm_temperature: float = 0.1
    btm_loss: str = "mean"


@dataclass(frozen=True)
class StudySettings:
    """The study's sizes. Token budgets of training are counted by the study's own tokenizer.

    Attributes:
        owners: All owners of the study of the paper's table 2.
        table_1: The owners of the study of the paper's table 1.
        seeds: Seeds of table 1. The first is table 2's too.
        budgets: Text of the corpus, in tokens of the corpus' own count.
        two_packages: Whether to build the corpus from two packages alone; see `build_mini`.
        public_tokens: Training of the public model.
        owner_tokens: Training of each owner's expert, and of each owner's dense model.
        sequence: Tokens per sequence and per evaluation window.
        test_bytes: Text per domain that every model is measured on; documents are taken whole until it is reached.
        mixed_bytes: The same for each kind of mixed documents.
        questions: Questions per benchmark; 0 leaves the benchmarks out.
        proxy_bytes: Proxy documents per owner.
        prompt_routing: Whether to measure prompt routing, if the package of its chat model is installed. It is slow: a
            chat model thirty times as large reads every text.
        embedded: Documents that a router row is the mean of.
    """

    owners: tuple[str, ...]
    table_1: tuple[str, ...]
    seeds: tuple[int, ...]
    budgets: Budgets
    two_packages: bool
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    public_tokens: int
    public_rate: float
    owner_tokens: int
    sequence: int
    batch: int
    test_bytes: int
    mixed_bytes: int
    questions: int
    proxy_bytes: int
    prompt_routing: bool
    embedded: int = 200
    levers: Levers = field(default_factory=Levers)


FULL = StudySettings(
    owners=("news", "forum", "code", "academic", "howto", "creative", "math"),
    table_1=TABLE_1,
    seeds=(0, 1, 2),
    budgets=Budgets(),
    two_packages=False,
    vocabulary=512,
    hidden=128,
    intermediate=1024,
    layers=4,
    heads=4,
    public_tokens=2_600_000,
    public_rate=4e-3,
    owner_tokens=300_000,
    sequence=256,
    batch=4,
    test_bytes=40_000,
    mixed_bytes=40_000,
    questions=40,
    proxy_bytes=120_000,
    prompt_routing=True,
)

SMOKE = StudySettings(
    owners=("math", "code", "academic"),
    table_1=("math", "code"),
    seeds=(0, 1),
    budgets=Budgets(train=25_000, web=3_000, validation=3_000, test=4_000, public_train=40_000),
    two_packages=True,
    vocabulary=512,
    hidden=32,
    intermediate=64,
    layers=2,
    heads=2,
    public_tokens=16_384,
    public_rate=5e-3,
    owner_tokens=8_192,
    sequence=128,
    batch=8,
    test_bytes=4_000,
    mixed_bytes=3_000,
    questions=4,
    proxy_bytes=6_000,
    prompt_routing=False,
    embedded=20,
    levers=Levers(tuning_tokens=4_096),
)
