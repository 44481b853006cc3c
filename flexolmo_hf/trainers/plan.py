"""What training one expert costs: memory on each GPU, floating-point operations, and time.

Everything here is arithmetic on stated assumptions; no model is built.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError

GIGABYTE = 1e9
SECONDS_PER_DAY = 86_400
STRATEGIES = ("ddp", "fsdp")
# Norms compute in fp32 whatever their input is.
_NORM_BYTES = 4


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of an OLMo-2 model, from which all parameter counts follow.

    Args:
        hidden: Width of the residual stream.
        intermediate: Width of a feed-forward network.
        layers: How many decoder layers.
        heads: Attention heads.
        key_value_heads: Heads of keys and values.
        vocabulary: Entries of the embedding and of the head.
        tied: Whether the head is the embedding.
        router_bias: Whether the router has a bias per expert.
    """

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    key_value_heads: int = 32
    vocabulary: int = 100_352
    tied: bool = False
    router_bias: bool = False

    @classmethod
    def of(cls, config: Any) -> "ModelSizes":
        """Read the sizes off a configuration, of this architecture or of OLMo-2."""
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
            router_bias=getattr(config, "router_bias", False),
        )

    @property
    def key_value_width(self) -> int:
        """Width of keys and of values."""
        return self.hidden // self.heads * self.key_value_heads

    @property
    def attention_matrices(self) -> int:
        """Parameters of one layer's four attention matrices."""
        return 2 * self.hidden * (self.hidden + self.key_value_width)

    @property
    def expert_matrices(self) -> int:
        """Parameters of one expert in one layer."""
        return 3 * self.hidden * self.intermediate

    @property
    def router_row(self) -> int:
        """Parameters of one expert's row, and bias, in one layer."""
        return self.hidden + self.router_bias

    @property
    def expert(self) -> int:
        """Parameters of one expert with its rows, in all layers."""
        return self.layers * (self.expert_matrices + self.router_row)

    @property
    def shared(self) -> int:
        """Parameters of everything but the experts."""
        norms = 3 * self.hidden + self.key_value_width
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.attention_matrices + norms) + embeddings + self.hidden

    def total(self, experts: int) -> int:
        """Parameters of a model with so many experts."""
        return self.shared + experts * self.expert


#: Sizes that have a name: those of OLMo-2's released models (7B is FlexOlmo's).
MODELS = {
    "1B": ModelSizes(hidden=2048, intermediate=8192, layers=16, heads=16, key_value_heads=16),
    "7B": ModelSizes(),
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; every field can be changed.

    Args:
        gpus: How many GPUs.
        gpu_memory_gb: Memory of each, in 10^9 bytes.
        peak_flops: Operations per second of each at its best, dense bf16. 989e12 is an H100's (SXM).
        utilisation: Share of the peak that training reaches.
        strategy: ``"ddp"``, each GPU holds everything; ``"fsdp"``, each holds its share.
        experts: Experts in memory while one is trained. The method uses two, the public one and the new one.
        sequence: Tokens of a sequence.
        micro_batch: Sequences on each GPU at a time.
        lora: Rank of the expert's low-rank form; 0 trains all of it.
        checkpointing: Whether each layer's activations are computed again in the backward pass instead of kept.
        frozen_bytes: Bytes of a frozen parameter: 4 in fp32, as the trainers load a model; 2 in bf16.
        trained_bytes: Bytes of a trained parameter: 4 in fp32, which also serves as the optimizer's copy.
        gradient_bytes: Bytes of its gradient.
        optimizer_bytes: Bytes of its optimizer state: 8 for AdamW's two moments in fp32, 2 for an 8-bit AdamW.
        activation_bytes: Bytes of an activation: 2 in bf16.
        overhead_gb: What the CUDA context, libraries and fragmentation take on each GPU.
        tokens: How many tokens to train on; the paper's 50 B per expert (arXiv 2507.07024).

    Raises:
        ConfigurationError: If a value makes no sense.
    """

    gpus: int = 8
    gpu_memory_gb: float = 80.0
    peak_flops: float = 989e12
    utilisation: float = 0.40
    strategy: str = "fsdp"
    experts: int = 2
    sequence: int = 4096
    micro_batch: int = 1
    lora: int = 0
    checkpointing: bool = True
    frozen_bytes: float = 4
    trained_bytes: float = 4
    gradient_bytes: float = 4
    optimizer_bytes: float = 8
    activation_bytes: float = 2
    overhead_gb: float = 4.0
    tokens: float = 50e9

    def __post_init__(self) -> None:
        """Check the values."""
        if self.strategy not in STRATEGIES:
            raise ConfigurationError(
                f"The strategy is {self.strategy!r}.", f"It is one of {', '.join(map(repr, STRATEGIES))}."
            )
        if self.experts < 2:
            raise ConfigurationError(
                f"The plan has {self.experts} experts, but one is trained beside the public one.",
                "Plan with 2 or more.",
            )
        for item in fields(self):
            least = 0 if item.name in ("lora", "overhead_gb") else None
            value = getattr(self, item.name)
            if item.type in (int, float) and (value < 0 or (value == 0 and least is None)):
                raise ConfigurationError(f"{item.name} is {value}.", "It must be above 0.")
        if self.utilisation > 1:
            raise ConfigurationError(f"utilisation is {self.utilisation}.", "It is a share of the peak, at most 1.")


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        frozen: Parameters that do not move.
        trained: Parameters that do.
        gradients: Their gradients.
        optimizer: Their optimizer state.
        activations: What the backward pass needs, and one layer's work.
        working: What is computed with: casts of trained weights, or the layers that sharding brings together.
        overhead: What the libraries take.
    """

    frozen: float
    trained: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    overhead: float

    @property
    def total(self) -> float:
        """The sum, in bytes."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class TrainingPlan:
    """What training one expert costs.

    Attributes:
        sizes: The model.
        assumptions: What was taken for granted.
        trained: How many parameters move.
        frozen: How many do not.
        memory: Bytes on each GPU.
        flops_per_token: Floating-point operations of one training step, by token.
    """

    sizes: ModelSizes
    assumptions: Assumptions
    trained: int = field(init=False)
    frozen: int = field(init=False)
    memory: Memory = field(init=False)
    flops_per_token: float = field(init=False)

    def __post_init__(self) -> None:
        """Compute everything once."""
        for name, value in {
            "trained": trained_parameters(self.sizes, self.assumptions),
            "frozen": frozen_parameters(self.sizes, self.assumptions),
            "memory": memory_per_gpu(self.sizes, self.assumptions),
            "flops_per_token": flops_per_token(self.sizes, self.assumptions),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def fits(self) -> bool:
        """Whether the memory of a GPU suffices."""
        return self.memory.total <= self.assumptions.gpu_memory_gb * GIGABYTE

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together."""
        flops = self.assumptions.gpus * self.assumptions.peak_flops * self.assumptions.utilisation
        return flops / self.flops_per_token

    @property
    def tokens_per_day(self) -> float:
        """Tokens per day of all GPUs together."""
        return self.tokens_per_second * SECONDS_PER_DAY

    @property
    def days(self) -> float:
        """Days for all tokens."""
        return self.assumptions.tokens / self.tokens_per_day

    @property
    def communication(self) -> tuple[float, str]:
        """Bytes each GPU receives per optimizer step, without accumulation, and what they are."""
        among = self.assumptions
        share = (among.gpus - 1) / among.gpus
        gradients = self.trained * among.gradient_bytes
        if among.gpus == 1:
            return 0.0, "nothing: one GPU"
        if among.strategy == "ddp":
            return 2 * share * gradients, "the trained parameters' gradients, summed over all GPUs"
        # Gathered as what is computed with, bf16, in the forward pass and again in the backward pass.
        gathered = 2 * (self.frozen + self.trained) * among.activation_bytes
        return share * (gathered + gradients), "all parameters, gathered twice, and the trained ones' gradients"

    def remedies(self) -> list[tuple[str, float]]:
        """Return changes that would make it fit, each alone, with the bytes per GPU it then takes.

        Returns:
            As command-line options; nothing if the plan fits, and of more GPUs only the smallest number.
        """
        if self.fits:
            return []
        found = []
        for text, changes in _possible_changes(self.assumptions):
            plan = TrainingPlan(self.sizes, replace(self.assumptions, **changes))
            if plan.fits:
                found.append((text, plan.memory.total))
                if "gpus" in changes:
                    break
        return found


def _possible_changes(now: Assumptions) -> list[tuple[str, dict[str, Any]]]:
    changes: list[tuple[str, dict[str, Any]]] = []
    if not now.checkpointing:
        changes.append(("--checkpointing", {"checkpointing": True}))
    if now.micro_batch > 1:
        changes.append(("--micro-batch 1", {"micro_batch": 1}))
    if now.strategy == "ddp" and now.gpus > 1:
        changes.append(("--strategy fsdp", {"strategy": "fsdp"}))
    if now.optimizer_bytes > 2:
        changes.append(("--optimizer-bytes 2 (an 8-bit AdamW)", {"optimizer_bytes": 2}))
    if not now.lora:
        changes.append(("--lora 64", {"lora": 64}))
    more = [now.gpus * 2**power for power in range(1, 7)]
    changes.extend((f"--gpus {gpus} --strategy fsdp", {"gpus": gpus, "strategy": "fsdp"}) for gpus in more)
    return changes


def trained_parameters(sizes: ModelSizes, assumptions: Assumptions) -> int:
    """Count what moves: one expert, or its low-rank factors, and its router rows."""
    if not assumptions.lora:
        return sizes.expert
    factors = 3 * assumptions.lora * (sizes.hidden + sizes.intermediate)
    return sizes.layers * (factors + sizes.router_row)


def frozen_parameters(sizes: ModelSizes, assumptions: Assumptions) -> int:
    """Count what does not move; a low-rank expert has no matrices of its own beside the public one's."""
    return sizes.shared + (assumptions.experts - 1) * sizes.expert


def flops_per_token(sizes: ModelSizes, assumptions: Assumptions) -> float:
    """Count the floating-point operations of one training step, by token.

    A product with a weight of N parameters takes 2N in the forward pass, 2N for the gradient of its input, and 2N for
    the gradient of the weight, the last only where the weight is trained. Nothing needs a gradient below the first
    layer's mixture: its attention runs forward only, and of its experts and router no input gradient is asked for.
    Checkpointing adds a forward pass of the layers, and the first layer's input gradients. Norms and activation
    functions are left out.

    Args:
        sizes: The model.
        assumptions: Experts, sequence, rank and checkpointing count.
    """
    lora = 3 * assumptions.lora * (sizes.hidden + sizes.intermediate)
    experts = assumptions.experts * sizes.expert_matrices + lora
    router = assumptions.experts * sizes.hidden
    # Scores and weighted values: a product of T keys with H numbers each.
    scores = 2 * assumptions.sequence * sizes.hidden
    head = sizes.vocabulary * sizes.hidden
    layer = sizes.attention_matrices + scores + experts + router
    forward = 2 * (sizes.layers * layer + head)
    again = 2 * sizes.layers * layer if assumptions.checkpointing else 0
    # Both products of attention are differentiated with respect to two inputs each.
    whole = layer + scores
    # In the first layer the trained expert alone: back through its down projection to its inner activations, and with
    # low-rank factors through the second factor of gate and up to the first.
    first = sizes.hidden * sizes.intermediate + lora // 3 + 2 * assumptions.lora * sizes.intermediate
    if assumptions.checkpointing:
        # transformers then asks for the gradient of the embeddings' output.
        first = whole
    inputs = 2 * ((sizes.layers - 1) * whole + first + head)
    # The router's matrix is one product, of which the trained row takes its part.
    weights = 2 * sizes.layers * ((lora or sizes.expert_matrices) + router)
    return float(forward + again + inputs + weights)


def memory_per_gpu(sizes: ModelSizes, assumptions: Assumptions) -> Memory:
    """Add up what lies in the memory of each GPU."""
    trained = trained_parameters(sizes, assumptions)
    frozen = frozen_parameters(sizes, assumptions)
    sharded = assumptions.strategy == "fsdp" and assumptions.gpus > 1
    parts = assumptions.gpus if sharded else 1
    # A trained fp32 weight is cast to what is computed with; autocast keeps all these copies through the forward pass.
    working = (
        trained * assumptions.activation_bytes if assumptions.trained_bytes > assumptions.activation_bytes else 0.0
    )
    if sharded:
        layer = (sizes.attention_matrices + assumptions.experts * sizes.expert_matrices) * assumptions.activation_bytes
        head = sizes.vocabulary * sizes.hidden * assumptions.activation_bytes
        # The layer at work and the next one, which is fetched meanwhile, or embedding and head; and a layer's gradients
        # before each GPU keeps its share.
        working = 2 * max(layer, head) + trained / sizes.layers * assumptions.gradient_bytes
    return Memory(
        frozen=frozen * assumptions.frozen_bytes / parts,
        trained=trained * assumptions.trained_bytes / parts,
        gradients=trained * assumptions.gradient_bytes / parts,
        optimizer=trained * assumptions.optimizer_bytes / parts,
        activations=activation_bytes(sizes, assumptions),
        working=working,
        overhead=assumptions.overhead_gb * GIGABYTE,
    )


def activation_bytes(sizes: ModelSizes, assumptions: Assumptions) -> float:
    """Add up the activations that one micro-batch keeps on a GPU.

    A checkpointed run keeps each layer's input, and all of the one layer at work. The head's logits are made in pieces
    by the fused loss, small enough to count among the overhead.

    Returns:
        Bytes.
    """
    of_layer = layer_activation_bytes(sizes, assumptions)
    tokens = assumptions.sequence * assumptions.micro_batch
    last = tokens * sizes.hidden * _NORM_BYTES
    if not assumptions.checkpointing:
        return sizes.layers * of_layer + last
    return sizes.layers * tokens * sizes.hidden * assumptions.activation_bytes + of_layer + last


def layer_activation_bytes(sizes: ModelSizes, assumptions: Assumptions) -> float:
    """Add up what the backward pass reads of one layer.

    The inputs of the four norms, in fp32; queries, keys, values and output of attention (flash kernels keep no scores);
    the mixture's input; of each expert gate, up and output, and of the trained one the product of the former two as
    well.

    Returns:
        Bytes.
    """
    norms = 3 * sizes.hidden + sizes.key_value_width
    attention = 2 * sizes.hidden + 2 * sizes.key_value_width
    experts = assumptions.experts * (2 * sizes.intermediate + sizes.hidden) + sizes.intermediate
    others = attention + sizes.hidden + experts
    tokens = assumptions.sequence * assumptions.micro_batch
    return tokens * (norms * _NORM_BYTES + others * assumptions.activation_bytes)


def plan_training(model: str = "7B", **assumptions: Any) -> TrainingPlan:
    """Work out what training one expert of a model costs; nothing is loaded but a configuration.

    Args:
        model: A name of `MODELS`, or a checkpoint folder, or a ``config.json``; FlexOlmo or OLMo-2.
        **assumptions: Fields of `Assumptions` that differ from their defaults.

    Raises:
        ConfigurationError: If there is no such model, or an assumption makes no sense.
        NotFlexOlmoError: If the configuration is of another architecture.
    """
    return TrainingPlan(_sizes_of(model), Assumptions(**assumptions))


def _sizes_of(model: str) -> ModelSizes:
    if model in MODELS:
        return MODELS[model]
    if not (Path(model).is_file() or (Path(model) / CONFIG_NAME).is_file()):
        raise ConfigurationError(
            f"There is no model {Path(model).name!r}.",
            f"Give {', '.join(MODELS)}, or a folder with a {CONFIG_NAME}.",
        )
    config = AutoConfig.from_pretrained(model)
    if config.model_type not in ("flex_olmo", "olmo2"):
        raise NotFlexOlmoError(config.model_type)
    return ModelSizes.of(config)
