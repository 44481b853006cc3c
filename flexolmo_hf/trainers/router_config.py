"""Settings of router tuning: TRL's, and what the method adds (arXiv 2507.07024)."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from flexolmo_hf.errors import ConfigurationError


@dataclass
class RouterSFTConfig(SFTConfig):
    """Differs from TRL's `SFTConfig` in four fields and in the paper's values as defaults.

    The paper tunes on 5 B tokens with a learning rate of 2e-3 and 100 warm-up steps (arXiv 2507.07024).

    Args:
        train_public_row: Whether the public row moves too. Without, the anchor stays what it is, and packages trained
            beside it can still be merged onto the tuned model.
        router_z_loss_coef: Weight of the router z-loss; the paper's value. 0 switches it off.
        lm_z_loss_coef: Weight of the z-loss on the output distribution; the paper's value. 0 switches it off.
        telemetry: Whether TRL may report the run's kind to Hugging Face. Off unless you turn it on.
    """

    train_public_row: bool = field(default=True, metadata={"help": "Whether the public expert's row is tuned too."})
    router_z_loss_coef: float = field(
        default=1e-3, metadata={"help": "Weight of the router z-loss; 0 switches it off."}
    )
    lm_z_loss_coef: float = field(default=1e-5, metadata={"help": "Weight of the output z-loss; 0 switches it off."})
    telemetry: bool = field(default=False, metadata={"help": "Whether TRL may report the run's kind to Hugging Face."})

    # The paper's values where TRL's differ.
    learning_rate: float = field(default=2e-3, metadata={"help": "The peak learning rate."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = field(default=100, metadata={"help": "Warm-up, in steps or (below 1) as a share of the run."})
    max_length: int | None = field(default=4096, metadata={"help": "Tokens per sequence."})
    # Mixed precision where the accelerator has it; TRL's default is bf16 wherever it runs, which other machines refuse.
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; default where the accelerator has it."})
    # TRL would switch a mixture's load-balancing loss on: FlexOlmo's experts are used as the text asks for them.
    router_aux_loss_coef: float | None = field(default=0.0, metadata={"help": "Must be 0: no load is to be balanced."})

    def __post_init__(self) -> None:
        """Check what can be known without the model.

        Raises:
            ConfigurationError: If a weight is negative, or a setting contradicts the method.
        """
        if self.bf16 is None:
            self.bf16 = not self.fp16 and is_torch_bf16_gpu_available()
        super().__post_init__()
        if self.router_aux_loss_coef:
            raise ConfigurationError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, but the method balances no load.",
                "Leave it at 0.0.",
            )
        for name in ("router_z_loss_coef", "lm_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}.", "It is 0 or more.")
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ConfigurationError(
                "skip_prepare_dataset would leave the data of the experts unmixed.",
                "Leave it out; rows that hold input_ids and labels are taken as they are.",
            )
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigurationError(
                "Reentrant gradient checkpointing gives no gradient behind frozen embeddings.",
                'Leave gradient_checkpointing_kwargs out or set {"use_reentrant": False}.',
            )
