"""Training a whole model, which no owner could do alone: what FlexOlmo is compared with moves everything.

The losses, the schedule and what is written down are those of expert training, so that nothing but the method differs.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2ForCausalLM
from transformers.models.flex_olmo.modeling_flex_olmo import load_balancing_loss_func
from trl import SFTConfig, SFTTrainer

from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError
from flexolmo_hf.evaluation.baselines.training import TrainingSettings
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.files.locate import model_type_of, named_errors
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.trainers.config import TextSettings
from flexolmo_hf.trainers.freezing import project_biases, unfreeze
from flexolmo_hf.trainers.part import OutputZLoss, PartTrainerMixin
from flexolmo_hf.trainers.router_freezing import freeze_all_but_routers
from flexolmo_hf.trainers.router_progress import RouterProgress
from flexolmo_hf.trainers.rows import refuse_lacking, refuse_too_short, text_columns

#: What may move: all parameters, the feed-forward networks with the router, or the router alone.
TRAINS = ("everything", "feed_forward", "router")


@dataclass
class WholeModelSFTConfig(TextSettings, SFTConfig):
    """Differs from TRL's `SFTConfig` in two fields, those of `TextSettings`, and the paper's values as defaults.

    Args:
        trains: What moves, one of `TRAINS`.
        load_balancing_coef: Weight of upstream's load-balancing loss, for a mixture whose tokens use fewer experts than
            there are; 0, as FlexOlmo has it, switches it off.
    """

    trains: str = field(default="everything", metadata={"help": f"What moves: {', '.join(TRAINS)}."})
    load_balancing_coef: float = field(default=0.0, metadata={"help": "Weight of the load-balancing loss."})

    def __post_init__(self) -> None:
        """Check what can be known without the model.

        Raises:
            ConfigurationError: If a value makes no sense, or as `PartSettings`.
        """
        super().__post_init__()
        if self.trains not in TRAINS:
            raise ConfigurationError(f"trains is {self.trains!r}.", f"It is one of {', '.join(map(repr, TRAINS))}.")
        if self.load_balancing_coef < 0:
            raise ConfigurationError(f"load_balancing_coef is {self.load_balancing_coef}.", "It is 0 or more.")


class WholeModelSFTTrainer(OutputZLoss, PartTrainerMixin, SFTTrainer):
    """Differs from TRL's `SFTTrainer` in the method's losses, and in that a part of the model may be left unmoved.

    Args:
        model: A `FlexOlmoForCausalLM` with all experts in force, or an `Olmo2ForCausalLM`.
        args: The settings.
        **kwargs: As `SFTTrainer`.

    Raises:
        ConfigurationError: If `args` is no `WholeModelSFTConfig`, what shall move is not there, or the data hold
            nothing to train on.
        NotFlexOlmoError: If the model is of another architecture.
    """

    settings_class = WholeModelSFTConfig
    _tag_names = ["trl", "sft"]

    def __init__(self, model: Any, args: WholeModelSFTConfig, **kwargs: Any):
        refuse_lacking(kwargs.get("train_dataset"), text_columns(args.dataset_text_field))
        super().__init__(model, args=args, **kwargs)
        refuse_too_short(self.train_dataset)

    def _prepared(self, model: Any, args: Any) -> Any:
        if isinstance(model, Olmo2ForCausalLM):
            free_dense(model, args.trains)
            return model
        model = super()._prepared(model, args)
        free_mixture(model, args.trains)
        return model

    def _new_progress(self) -> Any:
        return RouterProgress(self.model) if isinstance(self.model, ExpertSets) else _Speed()

    def _added_losses(self, heard: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor | float:
        if not heard.router_logits:
            return self._lm_z_term(heard, inputs, num_items_in_batch)
        added = super()._added_losses(heard, inputs, num_items_in_batch)
        if not self.args.load_balancing_coef:
            return added
        config = self.model.config
        balance = load_balancing_loss_func(
            tuple(heard.router_logits), config.num_experts, config.num_experts_per_tok, self._token_mask(inputs)
        )
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return added + self.args.load_balancing_coef * balance / steps

    def _decisive_settings(self) -> dict[str, Any]:
        chosen = {"trains": self.args.trains, "load_balancing_coef": self.args.load_balancing_coef}
        return {**super()._decisive_settings(), **chosen}


def free_dense(model: Olmo2ForCausalLM, trains: str) -> None:
    """Let the chosen part of a dense model move and freeze the rest.

    Raises:
        ConfigurationError: If it has no such part.
    """
    if trains == "router":
        raise ConfigurationError("A dense model has no router to train.", "Train everything, or feed_forward.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains == "everything" or ".mlp." in name)


def free_mixture(model: ExpertSets, trains: str) -> None:
    """Let the chosen part of a mixture move and freeze the rest. The public bias stays 0, whoever trains.

    Raises:
        ExpertNotLoadedError, ConfigurationError: If an expert is not in force, or there is no router to train.
    """
    if model.active_experts != model.config.expert_names:
        raise ConfigurationError(
            f"Only {model.active_experts} of {model.config.expert_names} are in force, so the others would not learn.",
            "Load all of them and switch them on.",
        )
    if trains == "router":
        freeze_all_but_routers(model)
        return
    unfreeze(model)
    for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
        parameter.requires_grad_(trains == "everything" or ".mlp." in name)
    public = model.expert_position(PUBLIC)
    for mixture in model.mixtures:
        if mixture.gate.bias is not None:
            mixture.gate.split_row(public)
            mixture.gate.trained_bias.requires_grad_(False)
    project_biases(model)  # type: ignore[arg-type]


def train_whole(
    path: str | Path,
    texts: Sequence[str],
    output_dir: str | Path,
    settings: TrainingSettings,
    *,
    tokenizer: Any = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    **choices: Any,
) -> Path:
    """Continue the pretraining of a whole model on texts, and write it when it is done.

    Args:
        path: A dense OLMo-2 checkpoint or a FlexOlmo one; loaded in float32, with all its experts.
        texts: Documents.
        output_dir: A folder that does not exist yet or is empty; appears when training has ended.
        settings: How to train.
        tokenizer: The tokenizer; default the one beside the model.
        run_dir: Where checkpoints go if `settings` ask for them; default a folder that is removed at the end.
        resume: Whether to go on from the last whole checkpoint in `run_dir`.
        **choices: Further fields of `WholeModelSFTConfig`.

    Returns:
        `output_dir` as a path: weights, configuration and tokenizer.

    Raises:
        OutputFolderNotEmptyError: If the folder is taken.
        ConfigurationError: If there is nothing to train on, or a run is to be resumed that has no folder.
        NoCheckpointError, ResumeMismatchError: If the run cannot be resumed.
        NonFiniteLossError: If training diverges. NotFlexOlmoError: If the model is of another architecture.
    """
    refuse_nonempty(output_dir)
    if resume and run_dir is None:
        raise ConfigurationError("A run without a folder cannot be resumed.", "Give run_dir, the folder of the run.")
    model = load_whole(path)
    tokenizer = AutoTokenizer.from_pretrained(path) if tokenizer is None else tokenizer
    with ExitStack() as stack:
        run = stack.enter_context(tempfile.TemporaryDirectory()) if run_dir is None else run_dir
        trainer = WholeModelSFTTrainer(
            model=model,
            args=WholeModelSFTConfig(**{**settings.as_fields(run), **choices}),
            train_dataset=Dataset.from_dict({"text": list(texts)}),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume or None)
    if isinstance(model, ExpertSets):
        unfreeze(model)
    with new_folder(output_dir) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return Path(output_dir)


def load_whole(path: str | Path) -> Any:
    """Load a dense OLMo-2 or a FlexOlmo model in float32, with all its experts.

    Raises:
        NotFlexOlmoError: If it is of another architecture.
    """
    kind = model_type_of(path)
    if kind not in (None, FlexOlmoConfig.model_type, "olmo2"):
        raise NotFlexOlmoError(kind)
    everyone: Mapping[str, Any] = {"active_experts": None} if kind == FlexOlmoConfig.model_type else {}
    with named_errors(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True, **everyone)


class _Speed:
    """Collects what a run of a dense model shows: tokens per second."""

    def __init__(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def count(self, tokens: int, router_logits: Sequence[torch.Tensor]) -> None:
        """Take in one forward pass."""
        self._tokens += tokens

    def figures(self) -> dict[str, float]:
        """Return ``tokens_per_second`` of this process since the last call."""
        now = time.perf_counter()
        found = {"tokens_per_second": round(self._tokens / (now - self._since), 1)}
        self._tokens, self._since = 0, now
        return found
