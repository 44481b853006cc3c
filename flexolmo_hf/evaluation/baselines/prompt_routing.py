"""Prompt-based routing: a chat model reads the query, and one expert answers all of it (arXiv 2507.07024).

Shape letters: B batch, T tokens, V vocabulary.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError
from flexolmo_hf.evaluation.baselines.label_sets import LabelSet
from flexolmo_hf.evaluation.baselines.prompt_router import Choice, PromptRouter, load_router
from flexolmo_hf.modeling.arguments import known_arguments, refuse_leftovers, refuse_unknown
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.names import PUBLIC, check_distinct, check_expert_name

Model: TypeAlias = PreTrainedModel | str | os.PathLike

# The name under which a FlexOlmo model is held, whose sets of experts answer.
_MIXTURE = "mixture"
_FROM_ANSWERER = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
# Choices that are remembered: the continuations of one question ask for the same.
_REMEMBERED = 4096


@strict
class PromptRoutedConfig(PreTrainedConfig):
    """Settings of prompt-based routing. What tokens mean is as in the answering models.

    Args:
        model_names: Names of the dense models that answer, or the one name of the mixture.
        labels: The label set, as `LabelSet.record` returns it.
        decision: How the chat model chooses, one of `prompt_router.DECISIONS`.
        prefix: How many tokens of a text that is scored are the query. They are scored by the public expert.
        longest: How many of its own tokens of a query the chat model is shown.
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


@dataclass(frozen=True)
class RoutingCost:
    """What answering takes.

    Attributes:
        parameters: Parameters held, the chat model's included.
        chat_parameters: Those of the chat model.
        parameters_per_token: Parameters that each token of the text passes through in the largest answering set.
        chat_tokens_per_query: Tokens that the chat model reads for each query, beyond the query itself.
    """

    parameters: int
    chat_parameters: int
    parameters_per_token: int
    chat_tokens_per_query: int


class PromptRoutedForCausalLM(PreTrainedModel, GenerationMixin):
    """Differs from a model in that a chat model chooses, for each row, which expert computes the logits.

    A checkpoint is a folder with ``config.json``, the answering models' tokenizer, the chat model in ``chat/``, and
    each answering model in ``model-NAME/``.

    Attributes:
        chat: The chat model.
        answerers: The dense models, or the one FlexOlmo model, in the order of ``config.model_names``.
        tokenizer: The answering models' tokenizer, with which queries become text again.
        choices: What was chosen since the start, by expert.
        not_understood: How many of these answers were none of the labels.

    Example:
        >>> model = PromptRoutedForCausalLM.from_models(MERGED, tokenizer, labels="four", chat="owner/chat-model")
        >>> model.generate(**tokenizer("Prove that", return_tensors="pt"))
    """

    config_class = PromptRoutedConfig
    config: PromptRoutedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    # The answering models choose their own implementation; nothing of this model attends.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(
        self,
        config: PromptRoutedConfig,
        answerers: Sequence[PreTrainedModel] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat: PreTrainedModel | None = None,
        chat_tokenizer: PreTrainedTokenizerBase | None = None,
        **unknown: Any,
    ):
        refuse_leftovers(unknown)
        super().__init__(config)
        if not answerers or tokenizer is None or chat is None or chat_tokenizer is None:
            raise ConfigurationError(
                f"{type(self).__name__} was given no models.", "Make it with from_models or from_pretrained."
            )
        if config.model_names == [_MIXTURE] and not isinstance(answerers[0], ExpertSets):
            raise NotFlexOlmoError(answerers[0].config.model_type)
        self.answerers = nn.ModuleList(answerers)
        self.chat, self.tokenizer = chat, tokenizer
        labels = LabelSet.from_record(config.labels).only(self.experts)
        self.router = PromptRouter(chat, chat_tokenizer, labels, decision=config.decision, longest=config.longest)
        self.generation_config = copy.deepcopy(answerers[0].generation_config)
        self.choices: dict[str, int] = dict.fromkeys(self.experts, 0)
        self.not_understood = 0
        self._known: dict[str, Choice] = {}
        # Not `post_init`: it would prepare random weights, and the models bring theirs.
        self.eval()

    @classmethod
    def from_models(
        cls,
        experts: Mapping[str, Model] | Model,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: str | os.PathLike | LabelSet,
        chat: Any = None,
        **settings: Any,
    ) -> "PromptRoutedForCausalLM":
        """Put a chat model before experts.

        Args:
            experts: Dense models with one tokenizer by name, ``"public"`` among them; or a FlexOlmo model, of which the
                public expert and the chosen one answer. Models are held, not copied; paths are loaded.
            tokenizer: The experts' tokenizer.
            labels: One of `LABEL_SETS`, a YAML file, or a label set. Labels of experts that are not there are left out.
            chat: A chat model by name or folder; a pair of model and tokenizer, such as `load_router` returns; None for
                the packaged one.
            **settings: ``decision``, ``prefix`` and ``longest`` of `PromptRoutedConfig`.

        Raises:
            ConfigurationError: If an expert has no label, there is no public one, or vocabularies differ in size.
            NotFlexOlmoError: If a single model is given that has no experts.
        """
        named = experts if isinstance(experts, Mapping) else {_MIXTURE: experts}
        models = [
            model
            if isinstance(model, PreTrainedModel)
            else AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
            for model in named.values()
        ]
        sizes = {name: model.config.vocab_size for name, model in zip(named, models, strict=True)}
        if len(set(sizes.values())) > 1:
            raise ConfigurationError(
                f"The models' vocabularies differ in size: {sizes}.", "Give models with one tokenizer."
            )
        chat_model, chat_tokenizer = chat if isinstance(chat, tuple) else load_router(chat)
        known = {key: getattr(models[0].config, key, None) for key in _FROM_ANSWERER}
        config = cls.config_class(
            model_names=list(named),
            labels=(labels if isinstance(labels, LabelSet) else LabelSet.read(labels)).record(),
            **{key: value for key, value in known.items() if value is not None},
            **settings,
        )
        return cls(config, models, tokenizer, chat_model, chat_tokenizer)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the models from their subfolders; keywords beside settings are handed to each one's loading."""
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
        inside = Path(kwargs.pop("subfolder", ""))
        kwargs["use_safetensors"] = True

        def load(name: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(path, subfolder=str(inside / name), **kwargs)

        answerers = [load(f"model-{name}") for name in config.model_names]
        own, chat = (AutoTokenizer.from_pretrained(path, subfolder=str(inside / name)) for name in ("", "chat"))
        model = cls(config, answerers, own, load("chat"), chat)
        model.name_or_path = str(path)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save each model into a subfolder, and last of all the settings: without them nothing loads."""
        folder = Path(save_directory)
        for name, model in zip(self.config.model_names, self.answerers, strict=True):
            model.save_pretrained(folder / f"model-{name}", **kwargs)  # type: ignore[operator]
        self.chat.save_pretrained(folder / "chat", **kwargs)
        self.router.tokenizer.save_pretrained(folder / "chat")
        self.tokenizer.save_pretrained(folder)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)

    @property
    def experts(self) -> list[str]:
        """Names of the experts that may answer.

        Raises:
            ConfigurationError: If the public one is not among them.
        """
        mixture: Any = self.answerers[0]
        names = list(mixture.active_experts) if self._is_mixture else list(self.config.model_names)
        if PUBLIC not in names:
            raise ConfigurationError(f"There is no {PUBLIC!r} among {names}.", "It scores queries: name one model so.")
        return names

    @property
    def _is_mixture(self) -> bool:
        return self.config.model_names == [_MIXTURE]

    def get_input_embeddings(self) -> nn.Module:
        """Return the first answering model's."""
        return self.answerers[0].get_input_embeddings()  # type: ignore[operator]

    def train(self, mode: bool = True) -> "PromptRoutedForCausalLM":
        """Switch the answering models between training and evaluation; the chat model only ever evaluates."""
        super().train(mode)
        self.chat.eval()
        return self

    def cost(self) -> RoutingCost:
        """Return what answering takes. A text that is scored passes through the public expert for its prefix too."""
        chat, sizes = _size(self.chat), [_size(model) for model in self.answerers]
        largest = max(sizes)
        mixture: Any = self.answerers[0]
        if self._is_mixture:
            own = {name: sum(_size(module) for module in mixture.expert_modules(name)) for name in mixture.expert_names}
            others = [size for name, size in own.items() if name != PUBLIC]
            largest = sizes[0] - sum(own.values()) + own[PUBLIC] + max(others, default=0)
        return RoutingCost(chat + sum(sizes), chat, largest, self.router.tokens_per_question())

    def choose(self, queries: Sequence[str]) -> list[Choice]:
        """Let the chat model choose who continues each query. Equal queries are asked about once."""
        found = []
        for query in queries:
            if query not in self._known:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[query] = self.router.choose(query)
            choice = self._known[query]
            self.choices[choice.expert] += 1
            self.not_understood += not choice.understood
            found.append(choice)
        return found

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        query_tokens: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Score texts: the public expert the query with which each begins, the chosen one what follows.

        No token takes part in the choice of who predicts it. A text that is shorter than the query is the public
        expert's alone.

        Args:
            input_ids: Tokens ``(B, T)``.
            attention_mask: ``(B, T)``, 0 for padding, on either side; None if there is none.
            position_ids: As upstream.
            past_key_values: Must be None: `generate` hands each row to one expert, which keeps a cache of its own.
            labels: As upstream.
            use_cache: No cache is returned, whatever it says.
            logits_to_keep: As upstream.
            query_tokens: How many tokens of each row are the query, one number or ``(B,)``; default ``config.prefix``.
            **kwargs: What hosts pass along; anything else is refused.

        Returns:
            Logits ``(B, T, V)`` and the loss.

        Raises:
            ConfigurationError: If a cache is given, or mask or queries do not fit the tokens.
            UnknownArgumentError: If nothing reads a keyword.
        """
        refuse_unknown(kwargs, _KNOWN)
        if past_key_values is not None:
            raise ConfigurationError(
                "past_key_values was given, but who answers is chosen once per text.",
                "Use generate(), which hands each row to one expert.",
            )
        real_BT = _real(input_ids, attention_mask)
        limit_B = self._limits(query_tokens, input_ids)
        read_BT = real_BT.cumsum(1)
        asked_BT = real_BT & (read_BT <= limit_B.unsqueeze(1))
        experts = self._experts_of(input_ids, asked_BT, read_BT[:, -1] >= limit_B)
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        logits_BTV = self._answered(input_ids, inputs, experts)
        before_BT = read_BT < limit_B.unsqueeze(1)
        if elsewhere := [row for row, name in enumerate(experts) if name != PUBLIC]:
            rows = torch.tensor(elsewhere, device=input_ids.device)
            end = int(before_BT[rows].any(0).nonzero().max()) + 1 if before_BT[rows].any() else 0
            if end:
                part = {key: None if x is None else x[..., :end].index_select(0, rows) for key, x in inputs.items()}
                public = self._answered(input_ids[rows, :end], part, [PUBLIC] * len(rows))
                logits_BTV[rows, :end] = public.where(before_BT[rows, :end].unsqueeze(-1), logits_BTV[rows, :end])
        if isinstance(logits_to_keep, torch.Tensor):
            logits_BTV = logits_BTV[:, logits_to_keep]
        elif logits_to_keep:
            logits_BTV = logits_BTV[:, -logits_to_keep:]
        loss = None if labels is None else self.loss_function(logits_BTV, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as upstream does, each row by the expert that the chat model chooses for the whole prompt.

        Args:
            inputs: The prompts ``(B, T)``, or as the keyword ``input_ids``.
            **kwargs: As upstream.

        Returns:
            As the chosen expert. Where dense models of several rows differ, their sequences in the order of the
            prompts, padded on the right.

        Raises:
            ConfigurationError: If there are no prompts, or several models answer and more than sequences is asked for.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            raise ConfigurationError("There is no prompt.", "Give input_ids: the chat model reads them.")
        mask = kwargs.pop("attention_mask", None)
        real_BT = _real(input_ids, mask)
        experts = self._experts_of(input_ids, real_BT, real_BT.any(1))
        given = {} if mask is None else {"attention_mask": mask}
        if self._is_mixture:
            sets = [_set_of(name) for name in experts]
            mixture: Any = self.answerers[0]
            return mixture.generate(input_ids, active_experts=sets, **given, **kwargs)
        if len(set(experts)) == 1:
            return self._model(experts[0]).generate(input_ids, **given, **kwargs)
        if kwargs.get("return_dict_in_generate") or kwargs.get("streamer") is not None:
            raise ConfigurationError(
                f"Several models answer this batch ({sorted(set(experts))}), which gives sequences and nothing else.",
                "Generate row by row, without return_dict_in_generate and streamer.",
            )
        return self._by_several(input_ids, mask, experts, kwargs)

    def _by_several(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, experts: list[str], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        sequences: dict[int, torch.Tensor] = {}
        for name in dict.fromkeys(experts):
            rows = [row for row, expert in enumerate(experts) if expert == name]
            given = {} if mask is None else {"attention_mask": mask[rows]}
            made = self._model(name).generate(input_ids[rows], **given, **kwargs)
            # Several sequences of a prompt are neighbours.
            sequences |= dict(zip(rows, made.view(len(rows), -1, made.shape[-1]), strict=True))
        longest = max(rows.shape[-1] for rows in sequences.values())
        pad = self._padding(kwargs)
        padded = [
            nn.functional.pad(rows, (0, longest - rows.shape[-1]), value=pad) for _, rows in sorted(sequences.items())
        ]
        return torch.cat(padded)

    def _padding(self, kwargs: Mapping[str, Any]) -> int:
        chosen = kwargs.get("generation_config") or self.generation_config
        ends = chosen.eos_token_id if chosen.eos_token_id is not None else self.config.eos_token_id
        first_end = ends[0] if isinstance(ends, list) else ends
        for token in (kwargs.get("pad_token_id"), chosen.pad_token_id, self.config.pad_token_id, first_end):
            if token is not None:
                return int(token)
        return 0

    def _experts_of(self, input_ids: torch.Tensor, asked_BT: torch.Tensor, chooses_B: torch.Tensor) -> list[str]:
        """Return who answers each row: the public expert where there is nothing to choose."""
        rows = [row for row, chooses in enumerate(chooses_B.tolist()) if chooses]
        texts = [self.tokenizer.decode(input_ids[row][asked_BT[row]], skip_special_tokens=True) for row in rows]
        chosen = dict(zip(rows, self.choose(texts), strict=True))
        return [chosen[row].expert if row in chosen else PUBLIC for row in range(len(input_ids))]

    def _answered(self, input_ids: torch.Tensor, inputs: Mapping[str, Any], experts: list[str]) -> torch.Tensor:
        """Return the logits ``(B, T, V)`` of each row's expert."""
        options = {**inputs, "use_cache": False}
        if self._is_mixture:
            sets = [_set_of(name) for name in experts]
            return self.answerers[0](input_ids, active_experts=sets, **options).logits
        made: list[Any] = [None] * len(experts)
        for name in dict.fromkeys(experts):
            rows = [row for row, expert in enumerate(experts) if expert == name]
            part = {key: x[rows] if isinstance(x, torch.Tensor) and len(x) > 1 else x for key, x in options.items()}
            for row, logits_TV in zip(rows, self._model(name)(input_ids[rows], **part).logits, strict=True):
                made[row] = logits_TV
        return torch.stack(made)

    def _model(self, name: str) -> Any:
        return self.answerers[self.config.model_names.index(name)]

    def _limits(self, query_tokens: int | torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
        value = self.config.prefix if query_tokens is None else query_tokens
        limit = torch.as_tensor(value, device=input_ids.device)
        if limit.dim() > 1 or limit.numel() not in (1, len(input_ids)) or (limit < 1).any():
            raise ConfigurationError(
                f"query_tokens has shape {tuple(limit.shape)} for {len(input_ids)} rows, or is below 1.",
                "Give one number, or one for each row, of at least 1.",
            )
        return limit.expand(len(input_ids))


def _set_of(name: str) -> list[str]:
    return [PUBLIC] if name == PUBLIC else [PUBLIC, name]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _real(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ConfigurationError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for tokens of shape {tuple(input_ids.shape)}.",
            "Give one value per token and row.",
        )
    return attention_mask.bool()


_KNOWN = known_arguments(PromptRoutedForCausalLM.forward)
