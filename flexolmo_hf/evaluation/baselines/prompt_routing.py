"""Prompt-based routing: a chat model reads the query, and one expert answers all of it (arXiv 2507.07024).

Shape letters: B batch, T tokens, V vocabulary.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from flexolmo_hf.errors import ConfigurationError, EmptyExpertSetError
from flexolmo_hf.evaluation.baselines.answerers import MIXTURE, Answerers, size_of
from flexolmo_hf.evaluation.baselines.costs import RoutingCost
from flexolmo_hf.evaluation.baselines.label_sets import LabelSet
from flexolmo_hf.evaluation.baselines.loading import Folder, Member, common_settings, loaded, refuse_other_parts
from flexolmo_hf.evaluation.baselines.prompt_routed_config import PromptRoutedConfig
from flexolmo_hf.evaluation.baselines.prompt_router import Choice, PromptRouter, load_router
from flexolmo_hf.evaluation.baselines.queries import query_lengths, real_tokens
from flexolmo_hf.evaluation.baselines.settled_by_prompt import SettledByPrompt
from flexolmo_hf.modeling.arguments import known_arguments, refuse_leftovers, refuse_unknown
from flexolmo_hf.modeling.names import PUBLIC

# Choices that are remembered: the continuations of one question ask for the same.
_REMEMBERED = 4096


class PromptRoutedForCausalLM(PreTrainedModel, GenerationMixin, SettledByPrompt):
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
    prompt_argument = "query_tokens"
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
        self.answerers = Answerers(answerers, config.model_names)
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
        experts: Mapping[str, Member] | Member,
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
            EmptyExpertSetError: If there is no expert.
            NotFlexOlmoError: If a single model is given that has no experts.
        """
        named = experts if isinstance(experts, Mapping) else {MIXTURE: experts}
        if not named:
            raise EmptyExpertSetError(["a model"])
        models = loaded(named)
        chat_model, chat_tokenizer = chat if isinstance(chat, tuple) else load_router(chat)
        config = cls.config_class(
            model_names=list(named),
            labels=(labels if isinstance(labels, LabelSet) else LabelSet.read(labels)).record(),
            **common_settings(models),
            **settings,
        )
        return cls(config, models, tokenizer, chat_model, chat_tokenizer)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the models from their subfolders; keywords beside settings are handed to each one's loading.

        Raises:
            ConfigurationError: If upstream's loading report is asked for, or pickled weights.
        """
        folder = Folder(cls.config_class, path, config, kwargs)
        answerers = [folder.model(f"model-{name}") for name in folder.config.model_names]
        model = cls(folder.config, answerers, folder.tokenizer(), folder.model("chat"), folder.tokenizer("chat"))
        model.name_or_path = str(path)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save each model into a subfolder, and last of all the settings: without them nothing loads.

        Raises:
            ConfigurationError: If the folder holds other models.
        """
        folder = Path(save_directory)
        refuse_other_parts(folder, [f"model-{name}" for name in self.config.model_names], "model-")
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
        return self.answerers.experts

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
        chat, answering = size_of(self.chat), self.answerers.parameters_per_token()
        return RoutingCost(chat + size_of(self.answerers), chat, answering, self.router.tokens_per_question())

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
        real_BT = real_tokens(input_ids, attention_mask)
        limit_B = query_lengths(self.config.prefix if query_tokens is None else query_tokens, input_ids)
        read_BT = real_BT.cumsum(1)
        asked_BT = real_BT & (read_BT <= limit_B.unsqueeze(1))
        experts = self._experts_of(input_ids, asked_BT, read_BT[:, -1] >= limit_B)
        positions = None if position_ids is None else position_ids.expand(input_ids.shape)
        inputs = {"attention_mask": attention_mask, "position_ids": positions}
        logits_BTV = self.answerers.logits(input_ids, inputs, experts)
        before_BT = read_BT < limit_B.unsqueeze(1)
        if elsewhere := [row for row, name in enumerate(experts) if name != PUBLIC]:
            rows = torch.tensor(elsewhere, device=input_ids.device)
            end = int(before_BT[rows].any(0).nonzero().max()) + 1 if before_BT[rows].any() else 0
            if end:
                part = {key: None if x is None else x[rows, :end] for key, x in inputs.items()}
                public = self.answerers.logits(input_ids[rows, :end], part, [PUBLIC] * len(rows))
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
        real_BT = real_tokens(input_ids, mask)
        experts = self._experts_of(input_ids, real_BT, real_BT.any(1))
        options = {**kwargs, "generation_config": kwargs.get("generation_config") or self.generation_config}
        return self.answerers.generate(input_ids, mask, experts, options)

    def _experts_of(self, input_ids: torch.Tensor, asked_BT: torch.Tensor, chooses_B: torch.Tensor) -> list[str]:
        """Return who answers each row: the public expert where there is nothing to choose."""
        rows = [row for row, chooses in enumerate(chooses_B.tolist()) if chooses]
        texts = [self.tokenizer.decode(input_ids[row][asked_BT[row]], skip_special_tokens=True) for row in rows]
        chosen = dict(zip(rows, self.choose(texts), strict=True))
        return [chosen[row].expert if row in chosen else PUBLIC for row in range(len(input_ids))]


_KNOWN = known_arguments(PromptRoutedForCausalLM.forward)
