"""From files to modules and back: which tensors are read, what is refused, and what a partial model saves.

The memory layout is the checkpoint's: ``model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight`` and
``model.layers.N.mlp.gate.weight`` are both the file's keys and the module's. Two things remain to be done. The router's
matrix holds a row for every expert of the checkpoint, of which a partial model takes its own; and a partial model is
saved as a smaller checkpoint, its experts numbered anew.
"""

import copy
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import logging

from flexolmo_hf.errors import ConfigurationError, IncompleteCheckpointError, NotFlexOlmoError, UnexpectedTensorError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.expert_parallel import ExpertParallel, is_spread, refuse_spread
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.files.download import LocalPart, local_part, name_after
from flexolmo_hf.modeling.files.layout import files_by_expert, remove_single_file
from flexolmo_hf.modeling.files.locate import model_type_of, named_errors
from flexolmo_hf.modeling.files.needed_files import absent_experts, only_needed_files
from flexolmo_hf.modeling.files.router_base import (
    read_router_base,
    remove_router_base,
    write_router_base,
)
from flexolmo_hf.modeling.live import CheckpointSource
from flexolmo_hf.modeling.names import PUBLIC, parse_expert_set

logger = logging.get_logger(__name__)

_EXPERT_KEY = re.compile(r"(?P<before>.*\.mlp\.experts\.)(?P<index>\d+)(?P<after>\..*)")


class TakeLoadedRows(ConversionOps):
    """Take the rows of the experts in memory from a router tensor that holds all of the checkpoint's."""

    def convert(self, input_dict: Mapping[str, Any], *, config: FlexOlmoConfig, **_: Any) -> dict[str, torch.Tensor]:
        """Select rows of the one tensor given.

        Raises:
            ValueError: If the tensor does not hold one row per expert of the checkpoint.
        """
        ((key, tensors),) = input_dict.items()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        indices = config.loaded_indices
        if tensor.shape[0] != config.num_experts:
            raise ValueError(f"{tensor.shape[0]} router rows for {config.num_experts} experts")
        # All rows: hand the mapped file through, uncopied.
        return {key: tensor if len(indices) == config.num_experts else tensor[indices]}

    @property
    def reverse_op(self) -> ConversionOps:
        """What a model saves is what it holds."""
        return _AsItIs()


class _AsItIs(ConversionOps):
    def convert(self, input_dict: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        return dict(input_dict)

    @property
    def reverse_op(self) -> ConversionOps:
        return TakeLoadedRows()


def register_weight_mapping(class_name: str) -> None:
    """Tell transformers how files become modules, for the backbone's class name and no other.

    Under the name of the type, or of a class that exists upstream too, the stock classes would stop loading.
    """
    converters = [
        WeightConverter(source_patterns=key, target_patterns=key, operations=[TakeLoadedRows()])
        for key in ("mlp.gate.weight", "mlp.gate.bias")
    ]
    register_checkpoint_conversion_mapping(class_name, converters, overwrite=True)


def renumber(state_dict: Mapping[str, torch.Tensor], indices: list[int]) -> dict[str, torch.Tensor]:
    """Rename the experts of a state dict from checkpoint indices to 0, 1, ... in the same order."""
    new = {str(index): str(position) for position, index in enumerate(indices)}

    def renamed(key: str) -> str:
        match = _EXPERT_KEY.fullmatch(key)
        return match["before"] + new[match["index"]] + match["after"] if match else key

    return {renamed(key): tensor for key, tensor in state_dict.items()}


class NamedExpertCheckpoint(ExpertParallel, ExpertSets):
    """`from_pretrained` and `save_pretrained` for named experts; differs from upstream in what is refused."""

    config: FlexOlmoConfig

    @classmethod
    def from_pretrained(cls, path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint, or the part of it that `active_experts` names.

        Args:
            path: A folder or a Hub repository.
            *model_args: As upstream.
            output_loading_info: Whether to return upstream's report of keys beside the model.
            **kwargs: As upstream, and ``active_experts``: only these experts are created and read.

        Returns:
            The model in evaluation mode; with `output_loading_info`, the model and the report.

        Raises:
            NotFlexOlmoError: If the checkpoint is of another architecture.
            IncompleteCheckpointError: If a tensor is missing or has another shape; upstream would put random weights
                there.
            UnexpectedTensorError: If there are expert or router tensors the configuration does not know.
            CheckpointNotFoundError: If there is no such folder or repository.
            DamagedFileError: If a file is missing, truncated or of another format.
            UnknownArgumentError: If nothing reads a keyword.
        """
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ConfigurationError(
                "use_safetensors=False asks for pickled weights, which can run code.",
                "Convert the checkpoint to safetensors and leave the argument out.",
            )
        if "active_experts" in kwargs and isinstance(kwargs.get("config"), FlexOlmoConfig):
            # With a configuration given, upstream hands keywords to the constructor instead of to it.
            config = kwargs["config"] = copy.deepcopy(kwargs["config"])
            config.active_experts = parse_expert_set(kwargs.pop("active_experts"), config.expert_names)
        subfolder = kwargs.get("subfolder", "")
        found = None if path is None else model_type_of(path, subfolder)
        if found not in (None, FlexOlmoConfig.model_type):
            raise NotFlexOlmoError(found)
        part = local_part(path, kwargs)
        absent = set() if part.config is None else absent_experts(part.config, kwargs.get("distributed_config"))
        options = {"output_loading_info": True, **part.keywords}
        with named_errors(part.path, subfolder), only_needed_files(absent):
            model, report = super().from_pretrained(part.path, *model_args, **options)  # type: ignore[misc]
        if part.repository is not None:
            name_after(model, part.repository)
        model.source = _source_of(part)
        refuse_gaps(report)
        model._check_public_bias()
        # While the model was made its tensors had no place, and neither had what was resolved for its set in force.
        model._experts_in_memory_changed(model.active_experts)
        if is_spread(model.mixtures):
            # Nothing can learn there, so a call outside `torch.no_grad` is not to ask for gradients.
            model.requires_grad_(False)
        if part.path is not None:
            model.router_base = read_router_base(Path(part.path) / subfolder, model.expert_names)
        return (model, report) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, expected_keys: Any = None
    ) -> Any:
        if load_config.disk_offload_folder is not None:
            # Router rows go there under their keys: those of another set of experts would take their place.
            os.makedirs(load_config.disk_offload_folder, exist_ok=True)
            own = tempfile.mkdtemp(prefix="experts-", dir=load_config.disk_offload_folder)
            load_config = replace(load_config, disk_offload_folder=own)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Save the experts in memory as a checkpoint of their own, each in files of its own.

        A model loaded with some of the experts is saved as a checkpoint that has only these. The set in force is saved
        too: an expert that was switched off stays off when the checkpoint is loaded, until it is asked for.

        Args:
            save_directory: The folder to write.
            state_dict: As upstream: what to save instead of the model's own state.
            **kwargs: As upstream.

        Raises:
            ConfigurationError: If the experts are spread over processes, or the configuration's set was changed by
                hand.
        """
        refuse_spread(self.mixtures, "be saved")
        self.refuse_set_by_hand()
        if self.config.router_bias:
            logger.warning_once(
                "This checkpoint carries router biases, which stock transformers and vLLM do not read. "
                "It loads as it is meant only with flexolmo_hf."
            )
        if any(name in self.config.expert_forms for name in self.expert_names):
            logger.warning_once(
                "This checkpoint has low-rank or narrow experts, which stock transformers and vLLM do not know. "
                "It loads only with flexolmo_hf; `flexolmo export` writes the full matrices."
            )
        if self._hf_peft_config_loaded:  # type: ignore[attr-defined]
            # Upstream saves the adapter alone, whose targets are written with the checkpoint's indices.
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)  # type: ignore[misc]
            return
        if state_dict is not None:
            state_dict = renumber(state_dict, self.expert_indices)
        with self._numbered_anew(), files_by_expert(self.expert_names):
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)  # type: ignore[misc]
        remove_single_file(Path(save_directory), kwargs.get("variant"))
        if kwargs.get("is_main_process", True):
            self._save_router_base(save_directory)

    def _save_router_base(self, folder: str | os.PathLike) -> None:
        if self.router_base is None:
            remove_router_base(folder)
        else:
            write_router_base(folder, self.router_base, self.expert_names)

    @contextmanager
    def _numbered_anew(self) -> Iterator[None]:
        # The modules are renamed, not only a state dict: quantisers make their own, and weights on disk are fetched by
        # the names of the modules that hold them.
        config, experts = self.config, [mixture.experts for mixture in self.mixtures]
        self.config = self._config_to_save(self.expert_indices)
        try:
            for mixture in self.mixtures:
                modules = enumerate(mixture.experts.values())
                mixture.experts = nn.ModuleDict({str(position): module for position, module in modules})
            yield
        finally:
            self.config = config
            for mixture, kept in zip(self.mixtures, experts, strict=True):
                mixture.experts = kept

    def _config_to_save(self, indices: list[int]) -> FlexOlmoConfig:
        config = copy.deepcopy(self.config)
        names, active = self.expert_names, self.active_experts
        config.num_experts = len(indices)
        config.num_experts_per_tok = min(config.num_experts_per_tok, len(indices))
        config.expert_names = names
        config.expert_forms = {name: form for name, form in config.expert_forms.items() if name in names}
        config.active_experts = None if active == names else active
        return config

    def _expect_absent_experts(self, distributed_config: Any = None) -> None:
        """Let loading pass over the tensors of experts that this model was told to leave out, here or everywhere."""
        if absent := absent_experts(self.config, distributed_config):
            self._keys_to_ignore_on_load_unexpected = absent

    def _check_public_bias(self) -> None:
        if not self.config.router_bias or PUBLIC not in self.expert_names:
            return
        at = self.expert_names.index(PUBLIC)
        biases = [mixture.gate.bias[at] for mixture in self.mixtures]
        # Weights that were offloaded to disk stand as shapes only.
        if any(not bias.is_meta and bool(bias != 0) for bias in biases):
            raise ConfigurationError(
                "The checkpoint gives the public expert a router bias.",
                "The public expert has none (arXiv 2507.07024): set it to 0 in every layer.",
            )


def _source_of(part: LocalPart) -> CheckpointSource | None:
    if part.path is None:
        return None
    options = part.keywords
    where = {key: options[key] for key in ("subfolder", "variant") if options.get(key)}
    if part.repository is None:
        return CheckpointSource(os.path.abspath(part.path), **where)
    cache = {key: options[key] for key in ("cache_dir", "local_files_only") if options.get(key)}
    # The folder of the cache is named after the commit.
    return CheckpointSource(part.repository, Path(part.path).name, **where, **cache)


def refuse_gaps(report: Mapping[str, Any]) -> None:
    """Refuse a model whose weights did not all come from its files, or not all went into it.

    Args:
        report: Upstream's report of keys.

    Raises:
        IncompleteCheckpointError: If a tensor is missing or has another shape.
        UnexpectedTensorError: If there are expert or router tensors the configuration does not know.
    """
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    missing = sorted(report["missing_keys"])
    if missing or mismatched:
        raise IncompleteCheckpointError(missing, mismatched)
    unexpected = sorted(key for key in report["unexpected_keys"] if ".mlp." in key)
    if unexpected:
        raise UnexpectedTensorError(unexpected)
