"""Settings of router tuning: TRL's, and what the method adds (arXiv 2507.07024)."""

from dataclasses import dataclass, field

from trl import SFTConfig

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.trainers.config import TextSettings


@dataclass
class RouterSFTConfig(TextSettings, SFTConfig):
    """Differs from TRL's `SFTConfig` in one field, those of `TextSettings`, and the paper's values as defaults.

    The paper tunes on 5 B tokens with a learning rate of 2e-3 and 100 warm-up steps (arXiv 2507.07024).

    Args:
        train_public_row: Whether the public row moves too. Without, the anchor stays what it is, and packages trained
            beside it can still be merged onto the tuned model.
    """

    train_public_row: bool = field(default=True, metadata={"help": "Whether the public expert's row is tuned too."})

    learning_rate: float = field(default=2e-3, metadata={"help": "The peak learning rate."})
    warmup_steps: float = field(default=100, metadata={"help": "Warm-up, in steps or (below 1) as a share of the run."})

    def __post_init__(self) -> None:
        """Check what can be known without the model.

        Raises:
            ConfigurationError: If a setting contradicts the method, or as `PartSettings`.
        """
        super().__post_init__()
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ConfigurationError(
                "skip_prepare_dataset would leave the data of the experts unmixed.",
                "Leave it out; rows that hold input_ids and labels are taken as they are.",
            )
