"""Settings of expert training: TRL's configs, the expert's name, and what the method adds (arXiv 2507.07024)."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, GRPOConfig, SFTConfig

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.names import check_expert_name

#: What the reference of preference and reinforcement learning may be; see `ExpertDPOConfig`.
REFERENCES = ("auto", "anchor", "start")


@dataclass
class PartSettings:
    """The fields that every trainer here adds to TRL's.

    Args:
        router_z_loss_coef: Weight of the router z-loss; the paper's value. 0 switches it off.
        telemetry: Whether TRL may report the run's kind to Hugging Face. Off unless you turn it on.
    """

    router_z_loss_coef: float = field(
        default=1e-3, metadata={"help": "Weight of the router z-loss; 0 switches it off."}
    )
    telemetry: bool = field(default=False, metadata={"help": "Whether TRL may report the run's kind to Hugging Face."})

    # Mixed precision where the accelerator has it; TRL's default is bf16 wherever it runs, which other machines refuse.
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; default where the accelerator has it."})
    # TRL would switch a mixture's load-balancing loss on; FlexOlmo's experts are used as the text asks for them.
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Must be 0: there is no load to balance."}
    )

    def __post_init__(self) -> None:
        """Check what can be known without the model.

        Raises:
            ConfigurationError: If a weight is negative, or two settings exclude each other.
        """
        if self.bf16 is None:
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()  # type: ignore[attr-defined]
        super().__post_init__()  # type: ignore[misc]
        if self.router_aux_loss_coef:
            raise ConfigurationError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, but there is no load to balance.",
                "Leave it at 0.0.",
            )
        for name in ("router_z_loss_coef", "lm_z_loss_coef", "lora_r", "router_lr_scale"):
            if getattr(self, name, 0) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}.", "It is 0 or more.")
        # The host renames these settings; either name may carry them.
        kwargs = [getattr(self, f"{kind}_checkpointing_kwargs", None) or {} for kind in ("gradient", "activation")]
        on = any(getattr(self, f"{kind}_checkpointing", False) for kind in ("gradient", "activation"))
        if on and any(given.get("use_reentrant") for given in kwargs):
            raise ConfigurationError(
                "Reentrant gradient checkpointing gives no gradient behind frozen embeddings.",
                'Leave gradient_checkpointing_kwargs out or set {"use_reentrant": False}.',
            )


@dataclass
class TextSettings(PartSettings):
    """The fields of trainers of next tokens, with the paper's values.

    Args:
        lm_z_loss_coef: Weight of the z-loss on the output distribution; the paper's value. 0 switches it off.
    """

    lm_z_loss_coef: float = field(default=1e-5, metadata={"help": "Weight of the output z-loss; 0 switches it off."})

    # The paper's values where TRL's differ.
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    max_length: int | None = field(default=4096, metadata={"help": "Tokens per sequence."})

    def __post_init__(self) -> None:
        """Check what can be known without the model.

        Raises:
            ConfigurationError: If labels are smoothed beside the output z-loss, or as the other settings.
        """
        super().__post_init__()
        smoothing: float = self.label_smoothing_factor  # type: ignore[attr-defined]
        if self.lm_z_loss_coef and smoothing:
            raise ConfigurationError(
                f"label_smoothing_factor is {smoothing}, but the output z-loss is computed from the labels' "
                "log-probabilities, which label smoothing does not make.",
                "Set lm_z_loss_coef=0, or leave label_smoothing_factor at 0.",
            )


@dataclass
class ExpertSettings(PartSettings):
    """The fields that every trainer of one expert adds.

    Args:
        expert: Name of the expert to train; required.
        train_router: Whether its router row and bias are trained too.
        lora_r: Rank of the low-rank form in which the expert is trained; 0 trains the whole expert.
        unfreeze: Shared weights that move too, of ``embeddings``, ``lm_head``, ``attention``, ``norms``: post-training
            in the way of BAR (arXiv 2604.18473). Leaving an expert out of a model merged from such packages is no
            longer exact.
        allow_training_anchor: Whether `expert` may be the public one.
        recompute_frozen: Whether the frozen experts' activations are computed again in the backward pass instead of
            kept: less memory for more time.
        router_lr_scale: Learning rate of the router row and bias over that of the expert's matrices.
    """

    expert: str = field(default="", metadata={"help": "Name of the expert to train."})
    train_router: bool = field(
        default=True, metadata={"help": "Whether the expert's router row and bias are trained too."}
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of the expert's low-rank form; 0 trains all of it."})
    unfreeze: list[str] = field(
        default_factory=list, metadata={"help": "Shared weights that move too; opting out is then no longer exact."}
    )
    allow_training_anchor: bool = field(
        default=False, metadata={"help": "Whether the expert may be the public one, from which all owners start."}
    )
    recompute_frozen: bool = field(
        default=False, metadata={"help": "Whether frozen experts are computed again in the backward pass."}
    )
    router_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning rate of router row and bias over that of the expert's matrices."}
    )

    def __post_init__(self) -> None:
        """Check what can be known without the model.

        Raises:
            ConfigurationError: If no expert is named, or as `PartSettings`.
            InvalidExpertNameError: If `expert` cannot be a name.
        """
        super().__post_init__()
        if not self.expert:
            raise ConfigurationError(
                "No expert is named.", f'Say which one is trained: {type(self).__name__}(expert="math", ...).'
            )
        check_expert_name(self.expert)


@dataclass
class ExpertSFTConfig(TextSettings, ExpertSettings, SFTConfig):
    """Differs from TRL's `SFTConfig` in the fields of `ExpertSettings`, one loss, and the paper's values as defaults.

    The paper trains 50 B tokens per expert with AdamW (betas 0.9 and 0.95, no weight decay), gradient clipping at 1.0,
    a cosine schedule, a learning rate of about 9e-4, 2000 warm-up steps and sequences of 4096 tokens (arXiv
    2507.07024). The warm-up is given here as a share of the run, since 2000 steps are more than most runs have.
    """

    learning_rate: float = field(default=9e-4, metadata={"help": "The peak learning rate."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up, in steps or (below 1) as a share of the run."}
    )


@dataclass
class WithReference:
    """What the trainers that compare the policy with a reference add.

    Args:
        reference: What the policy is held against, without a second model in memory. ``"anchor"``: this model without
            the expert, which is right while the expert started as a copy of the public one. ``"start"``: this model
            with the expert as it was at the start, which takes memory for one more expert. ``"auto"``: the anchor where
            the two are the same function, else the start.
    """

    reference: str = field(default="auto", metadata={"help": f"What the policy is held against: {REFERENCES}."})

    def __post_init__(self) -> None:
        """Check the reference.

        Raises:
            ConfigurationError: If it is none that there is, or TRL is to move a reference that has no weights.
        """
        super().__post_init__()  # type: ignore[misc]
        if self.reference not in REFERENCES:
            raise ConfigurationError(
                f"reference is {self.reference!r}.", f"It is one of {', '.join(map(repr, REFERENCES))}."
            )
        if getattr(self, "sync_ref_model", False):
            raise ConfigurationError(
                "sync_ref_model moves the weights of a reference model, and here the reference has none of its own.",
                "Leave sync_ref_model out.",
            )


@dataclass
class ExpertDPOConfig(WithReference, ExpertSettings, DPOConfig):
    """Differs from TRL's `DPOConfig` in the fields of `ExpertSettings` and `WithReference`."""


@dataclass
class ExpertGRPOConfig(WithReference, ExpertSettings, GRPOConfig):
    """Differs from TRL's `GRPOConfig` in the fields of `ExpertSettings` and `WithReference`."""
