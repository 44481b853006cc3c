"""Whole models that a baseline is made of: how they are loaded, and what has to be the same in all of them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from flexolmo_hf.errors import ConfigurationError, DamagedFileError

Member: TypeAlias = PreTrainedModel | str | os.PathLike

# What a model of several says of itself is what its first one says.
_FROM_FIRST = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
# What says which files of a repository are meant, for tokenizers as for models.
_WHICH_FILES = ("cache_dir", "force_download", "local_files_only", "revision", "token")

# What a tokenizer's file says beside it (truncation, padding) is how it was last used.
_OF_TOKENIZER = ("model", "added_tokens", "normalizer", "pre_tokenizer")


def loaded(models: Mapping[str, Member]) -> list[PreTrainedModel]:
    """Return models in their order; paths are loaded, from safetensors alone.

    Raises:
        ConfigurationError: If their vocabularies differ in size.
    """
    found = [
        model
        if isinstance(model, PreTrainedModel)
        else AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
        for model in models.values()
    ]
    sizes = {name: model.config.vocab_size for name, model in zip(models, found, strict=True)}
    if len(set(sizes.values())) > 1:
        raise ConfigurationError(
            f"The models' vocabularies differ in size: {sizes}.",
            "Distributions can only be combined over one vocabulary: give models with the same tokenizer.",
        )
    return found


def common_settings(models: Sequence[PreTrainedModel]) -> dict[str, Any]:
    """Return what tokens mean in the first of several models and how long texts all can read, as a configuration's."""
    found = {key: getattr(models[0].config, key, None) for key in _FROM_FIRST}
    positions = [getattr(model.config, "max_position_embeddings", None) for model in models]
    found["max_position_embeddings"] = min((length for length in positions if length is not None), default=None)
    return {key: value for key, value in found.items() if value is not None}


def refuse_other_parts(folder: Path, parts: Sequence[str], prefix: str) -> None:
    """Refuse to save into a folder that holds models beside those to be saved: nobody would look for them there.

    Args:
        folder: Where.
        parts: Names of the subfolders that will be written.
        prefix: What the names of such subfolders begin with.

    Raises:
        ConfigurationError: If there are others, such as a member that was left out.
    """
    if others := sorted({path.name for path in folder.glob(f"{prefix}*")} - set(parts)):
        raise ConfigurationError(
            f"The folder holds {others}, which the model that is saved does not have.",
            "Save into a new folder, or remove them first.",
        )


def tokenizers_differ(first: Path | None, second: Path | None) -> bool:
    """Tell whether two checkpoints' tokenizers give tokens another meaning; one without a tokenizer agrees with all.

    Args:
        first: A folder, or None for a model in memory.
        second: Another.
    """
    meanings = [folder and _meaning_of_tokens(folder / "tokenizer.json") for folder in (first, second)]
    return None not in meanings and meanings[0] != meanings[1]


def _meaning_of_tokens(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        # The cause would quote the file.
        raise DamagedFileError(file.name, "it is not JSON") from None
    return {key: content.get(key) for key in _OF_TOKENIZER}


class Folder:
    """A checkpoint of several models: its settings, and the models and tokenizers in its subfolders.

    Attributes:
        config: The settings.
    """

    def __init__(self, config_class: type[PreTrainedConfig], path: Any, config: Any, keywords: dict[str, Any]):
        """Read the settings, unless they are given.

        Args:
            config_class: Of the settings.
            path: Folder or repository.
            config: The settings, or where they are; None for `path`.
            keywords: What `from_pretrained` was given beside; those that are no settings go to each model's loading.

        Raises:
            ConfigurationError: If upstream's loading report is asked for, or pickled weights.
        """
        keywords = dict(keywords)
        if keywords.pop("output_loading_info", False) or keywords.pop("use_safetensors", True) is False:
            raise ConfigurationError(
                "output_loading_info and use_safetensors=False are not for models made of several.",
                "Load one by itself, from its subfolder, to get its report; weights are always safetensors.",
            )
        # The configuration's loading uses these up, and the models' needs them as well.
        self._which = {key: keywords[key] for key in _WHICH_FILES if key in keywords}
        self._path, self._inside = path, Path(keywords.get("subfolder", ""))
        if not isinstance(config, PreTrainedConfig):
            config, keywords = config_class.from_pretrained(config or path, return_unused_kwargs=True, **keywords)
        self.config: Any = config
        self._keywords = {**keywords, **self._which, "use_safetensors": True}

    def model(self, name: str) -> Any:
        """Load the model in a subfolder."""
        return AutoModelForCausalLM.from_pretrained(
            self._path, **{**self._keywords, "subfolder": str(self._inside / name)}
        )

    def tokenizer(self, name: str = "") -> Any:
        """Load the tokenizer in a subfolder."""
        return AutoTokenizer.from_pretrained(self._path, **{**self._which, "subfolder": str(self._inside / name)})
