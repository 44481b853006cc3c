"""Settings of prompt-based routing, as a checkpoint's ``config.json`` holds them."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.names import check_distinct, check_expert_name


@strict
class PromptRoutedConfig(PreTrainedConfig):
    """Settings of prompt-based routing. What tokens mean is as in the answering models.

    Args:
        model_names: Names of the dense models that answer, or the one name of the mixture.
        labels: The label set, as `LabelSet.record` returns it.
        decision: How the chat model chooses, one of `prompt_router.DECISIONS`.
        prefix: How many tokens of a text that is scored are the query. They are scored by the public expert.
        longest: How many of its own tokens of a query the chat model is shown, the last ones.
    """

    model_type = "flexolmo_prompt_routed"

    model_names: list[str] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)
    decision: str = "likelihood"
    prefix: int = 64
    longest: int = 256
    vocab_size: int = 0
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the names and the prefix.

        Raises:
            FlexOlmoError: The kind that fits.
        """
        for name in self.model_names:
            check_expert_name(name)
        check_distinct(self.model_names)
        if self.prefix < 1:
            raise ConfigurationError(f"prefix is {self.prefix}.", "A query has at least one token.")
        super().__post_init__(**kwargs)
