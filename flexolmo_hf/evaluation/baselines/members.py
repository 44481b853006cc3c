"""What baselines made of several whole models have in common: how the members are held, loaded, saved and counted.

A checkpoint is a folder with ``config.json`` and, for each member, a complete checkpoint in ``member-NAME/``.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

from flexolmo_hf.errors import ConfigurationError, EmptyExpertSetError
from flexolmo_hf.evaluation.baselines.loading import Folder, Member, common_settings, loaded, refuse_other_parts
from flexolmo_hf.evaluation.baselines.settled_by_prompt import SettledByPrompt
from flexolmo_hf.modeling.arguments import refuse_leftovers
from flexolmo_hf.modeling.names import check_distinct, check_expert_name


@strict
class MembersConfig(PreTrainedConfig):
    """Settings of a model of several members. What tokens mean is as in the first member.

    Args:
        member_names: One name per member, in their order.
        vocab_size: Tokens of the tokenizer that all members share.
        max_position_embeddings: Longest text.
        bos_token_id: Token that begins a text, if there is one.
        eos_token_id: Token that ends a text.
        pad_token_id: Token that stands in padding.
        use_cache: Whether generation keeps the members' keys and values.

    Raises:
        FlexOlmoError: If a name is unusable, repeated or missing.
    """

    member_names: list[str] = field(default_factory=list)
    vocab_size: int = 0
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the names."""
        for name in self.member_names:
            check_expert_name(name)
        check_distinct(self.member_names)
        super().__post_init__(**kwargs)


class _NotFromSettings(GenerationConfig):
    """Differs from upstream's in that the temperature and top-k of an ensemble are not taken for those of sampling."""

    @classmethod
    def from_model_config(cls, model_config: Any) -> "GenerationConfig":
        return GenerationConfig()


class MembersForCausalLM(PreTrainedModel, GenerationMixin, SettledByPrompt):
    """Differs from other models in what it is made of: whole models with the same tokenizer, each under a name.

    Attributes:
        members: The models, in the order of ``config.member_names``.
    """

    config_class = MembersConfig
    config: MembersConfig
    #: The kind of cache that holds what the members remember; made from them, and `is_empty` before the first token.
    cache_class: type[Any]
    base_model_prefix = ""
    main_input_name = "input_ids"
    generation_config_class = _NotFromSettings
    # The members choose their own implementation; nothing of this model attends.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: MembersConfig, members: Sequence[PreTrainedModel] = (), **unknown: Any):
        refuse_leftovers(unknown)
        super().__init__(config)
        if not members or len(members) != len(config.member_names):
            raise ConfigurationError(
                f"{type(self).__name__} was given {len(members)} models for {len(config.member_names)} names.",
                "Make it with from_members({name: model, ...}) or from_pretrained(folder).",
            )
        self.members = nn.ModuleList(members)
        self.generation_config = copy.deepcopy(members[0].generation_config)
        # Not `post_init`: it would prepare random weights, and the members bring theirs.
        self.eval()

    @classmethod
    def from_members(cls, members: Mapping[str, Member], **settings: Any) -> Any:
        """Make a model of models.

        Args:
            members: A model or the folder of one by its name. Models are held, not copied.
            **settings: Settings of the configuration beside the names.

        Raises:
            EmptyExpertSetError: If there is no member.
            ConfigurationError: If the members' vocabularies differ in size, or a setting is out of range.
            InvalidExpertNameError, DuplicateExpertError: If a name is unusable or taken.
        """
        if not members:
            raise EmptyExpertSetError(["a model"])
        models = loaded(members)
        return cls(cls.config_class(member_names=list(members), **{**common_settings(models), **settings}), models)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the members from their subfolders; keywords beside settings are handed to each member's loading.

        Raises:
            ConfigurationError: If upstream's loading report is asked for, or pickled weights.
        """
        folder = Folder(cls.config_class, path, config, kwargs)
        model = cls(folder.config, [folder.model(f"member-{name}") for name in folder.config.member_names])
        model.name_or_path = str(path)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save each member into a subfolder, and last of all the settings: without them nothing loads.

        Args:
            save_directory: The folder to write.
            **kwargs: As upstream, for each member.

        Raises:
            ConfigurationError: If the folder holds other members.
        """
        folder = Path(save_directory)
        refuse_other_parts(folder, [f"member-{name}" for name in self.config.member_names], "member-")
        for name, member in self.named_members():
            member.save_pretrained(folder / f"member-{name}", **kwargs)
        self.config.architectures = [type(self).__name__]
        self.generation_config.save_pretrained(folder)
        self.config.save_pretrained(folder)

    def named_members(self) -> list[tuple[str, Any]]:
        """Return the members with their names."""
        return list(zip(self.config.member_names, self.members, strict=True))

    @property
    def settles_by_prefix(self) -> bool:
        """Whether the members' weights are settled by the first tokens of a text."""
        return True

    @property
    def prompt_argument(self) -> str | None:
        """``"weight_tokens"`` where the first tokens of a text settle the weights."""
        return "weight_tokens" if self.settles_by_prefix else None

    def _own_cache(self, cache: Any) -> Any:
        if cache is not None and not isinstance(cache, self.cache_class):
            raise ConfigurationError(
                f"past_key_values is a {type(cache).__name__}, which holds the keys and values of one model.",
                "Give the cache that this model returned, or leave it out.",
            )
        return cache

    def _settle(self, cache: Any, weight_tokens: Any, input_ids: torch.Tensor) -> None:
        """Write down in an empty cache how many tokens settle the weights of each row."""
        if weight_tokens is not None and not (self.settles_by_prefix and cache.is_empty):
            raise ConfigurationError(
                "weight_tokens was given, but no prefix settles the weights, or one already has.",
                "Give it with the first tokens of a text, and only where the weights come from the prefix.",
            )
        if self.settles_by_prefix and cache.is_empty:
            told = cache.weight_tokens_B if weight_tokens is None else weight_tokens
            cache.weight_tokens_B = one_per_row(
                "weight_tokens", self.config.prefix if told is None else told, input_ids
            )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> None:
        # Here, where rows are expanded and the mask is known, whatever the decoding mode.
        cache = self._own_cache(model_kwargs.get("past_key_values"))
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigurationError(
                f"cache_implementation={generation_config.cache_implementation!r} is one model's cache.",
                "Leave it out: what the members remember grows with the text.",
            )
        begins = cache is None or cache.is_empty
        if cache is None and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = self.cache_class(self.members)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        if self.settles_by_prefix and begins:
            settling = self._weight_tokens_of_prompt(model_kwargs)
            if cache is None:
                model_kwargs["weight_tokens"] = settling
            else:
                # Not among the keywords: an assistant model would be handed them too.
                cache.weight_tokens_B = settling

    @staticmethod
    def _weight_tokens_of_prompt(model_kwargs: dict[str, Any]) -> torch.Tensor:
        """Take out what the caller said of `weight_tokens`; else count the tokens of each prompt."""
        if (told := model_kwargs.pop("weight_tokens", None)) is not None:
            return torch.as_tensor(told)
        mask = model_kwargs.get("attention_mask")
        # Without padding there is no mask here, and each token of the prompts has a position.
        return torch.as_tensor(model_kwargs["position_ids"].shape[-1]) if mask is None else mask.sum(-1)

    def get_input_embeddings(self) -> nn.Module:
        """Return the first member's: there is none of all."""
        return self.members[0].get_input_embeddings()  # type: ignore[operator]

    def member_parameters(self) -> list[int]:
        """Return the number of parameters of each member."""
        return [sum(parameter.numel() for parameter in member.parameters()) for member in self.members]


def mask_of(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return which of the tokens given are real, bool and of the shape of `input_ids`.

    Args:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, C + T)`` with the cached tokens first; None if all are real.

    Raises:
        ConfigurationError: If the mask has another form; what is padding could not be told.
    """
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
        raise ConfigurationError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for tokens of shape {tuple(input_ids.shape)}.",
            "Give one value per token and row, those of cached tokens included.",
        )
    return attention_mask[:, -input_ids.shape[1] :].bool()


def one_per_row(what: str, value: int | torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Return a number of tokens for each row, ``(B,)``.

    Args:
        what: What the number is called, for the error.
        value: One number, or ``(B,)``.
        input_ids: ``(B, T)``.

    Raises:
        ConfigurationError: If it has another shape.
    """
    number = torch.as_tensor(value, device=input_ids.device)
    if number.dim() > 1 or number.numel() not in (1, len(input_ids)):
        raise ConfigurationError(
            f"{what} has shape {tuple(number.shape)} for {len(input_ids)} rows.",
            "Give one number, or one for each row.",
        )
    return number.expand(len(input_ids))
