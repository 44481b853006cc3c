"""Settings of expert training: TRL's `SFTConfig`, the expert's name, and the paper's losses and defaults."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.names import check_expert_name


@dataclass
class ExpertSFTConfig(SFTConfig):
    """Differs from TRL's `SFTConfig` in the fields below and in the paper's values as defaults.

    The paper trains 50 B tokens per expert with AdamW (betas 0.9 and 0.95, no weight decay), gradient clipping at 1.0,
    a cosine schedule, a learning rate of about 9e-4, 2000 warm-up steps and sequences of 4096 tokens (arXiv
    2507.07024). The warm-up is given here as a share of the run, since 2000 steps are more than most runs have.

    Args:
        expert: Name of the expert to train; required.
        train_router: Whether its router row and bias are trained too.
        router_z_loss_coef: Weight of the router z-loss; the paper's value. 0 switches it off.
        lm_z_loss_coef: Weight of the z-loss on the output distribution; the paper's value. 0 switches it off.
        telemetry: Whether TRL may report the run's kind to Hugging Face. Off unless you turn it on.
    """

    expert: str = field(default="", metadata={"help": "Name of the expert to train."})
    train_router: bool = field(
        default=True, metadata={"help": "Whether the expert's router row and bias are trained too."}
    )
    router_z_loss_coef: float = field(
        default=1e-3, metadata={"help": "Weight of the router z-loss; 0 switches it off."}
    )
    lm_z_loss_coef: float = field(default=1e-5, metadata={"help": "Weight of the output z-loss; 0 switches it off."})
    telemetry: bool = field(default=False, metadata={"help": "Whether TRL may report the run's kind to Hugging Face."})

    # The paper's values where TRL's differ.
    learning_rate: float = field(default=9e-4, metadata={"help": "The peak learning rate."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up, in steps or (below 1) as a share of the run."}
    )
    max_length: int | None = field(default=4096, metadata={"help": "Tokens per sequence."})
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; default where the accelerator has it."})
    # TRL would switch a mixture's load-balancing loss on; experts that are trained alone have no load to balance.
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Must be 0: there is no load to balance."}
    )

    def __post_init__(self) -> None:
        """Check what can be known without the model.

        Raises:
            ConfigurationError: If no expert is named, a weight is negative, or two settings exclude each other.
            InvalidExpertNameError: If `expert` cannot be a name.
        """
        if self.bf16 is None:
            # TRL's default is bf16 wherever it runs, which a machine without a bf16 accelerator refuses.
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()
        super().__post_init__()
        if not self.expert:
            raise ConfigurationError(
                "No expert is named.", 'Say which one is trained: ExpertSFTConfig(expert="math", ...).'
            )
        check_expert_name(self.expert)
        if self.router_aux_loss_coef:
            raise ConfigurationError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, but one expert alone has no load to balance.",
                "Leave it at 0.0.",
            )
        for name in ("router_z_loss_coef", "lm_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}.", "It is a weight: 0 or more.")
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigurationError(
                "Reentrant gradient checkpointing gives no gradient behind frozen embeddings.",
                'Leave gradient_checkpointing_kwargs out or set {"use_reentrant": False}.',
            )
