"""Partial download: of a repository on the Hub, only the files that hold something wanted.

Upstream downloads every file its index lists. Here the index is read first, the files that hold nothing but experts
that were left out are passed over, and upstream is given the folder of the cache in which the others lie.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, find_adapter_config_file, is_peft_available
from transformers.utils.hub import DownloadKwargs, cached_files

from flexolmo_hf.errors import DamagedFileError, NotFlexOlmoError
from flexolmo_hf.modeling.arguments import refuse_unknown
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.files.locate import CONFIG_FILE, looks_like_a_repository, model_type_of, named_errors
from flexolmo_hf.modeling.files.needed_files import (
    absent_experts,
    files_needed,
    read_weight_map,
    weight_files,
)

_HUB_KEYWORDS = frozenset(DownloadKwargs.__annotations__)


@dataclass(frozen=True)
class LocalPart:
    """What upstream is given in place of the name of a repository.

    Attributes:
        path: The folder to load from; or what was given, where nothing is to be downloaded here.
        keywords: The keywords to load with.
        config: The settings, with the experts that are wanted; None where upstream reads another format.
        repository: The name the model shall bear (see `name_after`) if the folder is one of the cache, else None.
    """

    path: Any
    keywords: dict[str, Any]
    config: FlexOlmoConfig | None = None
    repository: str | None = None


def local_part(path: Any, keywords: Mapping[str, Any]) -> LocalPart:
    """Replace the name of a repository by the folder its needed files were downloaded to.

    The keywords that say where and how to look on the Hub stay: for a folder upstream reads only ``subfolder``, and an
    adapter or a configuration of another name still needs them.

    Args:
        path: As `from_pretrained` takes it; a folder stays what it is.
        keywords: As `from_pretrained` takes them; ``config`` has `active_experts` already put into it.

    Raises:
        FlexOlmoError: As `fetch_part`.
    """
    keywords = dict(keywords)
    # A GGUF file is one file, and which one it is, the keyword says.
    if path is None or keywords.get("gguf_file") is not None:
        return LocalPart(path, keywords)
    hub = {name: keywords[name] for name in sorted(_HUB_KEYWORDS & keywords.keys())}
    chosen = {"active_experts": keywords["active_experts"]} if "active_experts" in keywords else {}
    repository = None
    if looks_like_a_repository(path):
        path, keywords = _model_of_adapter(str(path), keywords, hub)
    config = _given_settings(keywords.get("config"), {**_for_settings(hub), **chosen})
    if looks_like_a_repository(path):
        repository = path
        parallel = keywords.get("distributed_config")
        variant = keywords.get("variant")
        path = fetch_part(repository, config=config, variant=variant, distributed_config=parallel, **chosen, **hub)
    if config is None:
        subfolder = keywords.get("subfolder") or ""
        with named_errors(path, subfolder):
            config = FlexOlmoConfig.from_pretrained(path, subfolder=subfolder, **chosen)
    return LocalPart(path, keywords, config, repository)


def fetch_part(
    repository: str,
    *,
    config: FlexOlmoConfig | None = None,
    variant: str | None = None,
    distributed_config: Any = None,
    **options: Any,
) -> Path:
    """Download what is needed of a repository, unless the cache has it, and nothing else.

    That is the settings, the index, and the weight files with at least one tensor of the shared part or of an expert
    that is wanted. ``HF_HUB_OFFLINE`` and ``local_files_only`` are heeded. All files come from one commit.

    Args:
        repository: ``owner/name`` on the Hub.
        config: Settings that say which experts are wanted; default the repository's own.
        variant: As upstream: the infix of weight files of another dtype.
        distributed_config: As `from_pretrained` takes it: it can leave experts to other processes.
        **options: ``active_experts``, to override what the repository's settings say, and what upstream's
            `from_pretrained` takes to find a file: ``revision``, ``subfolder``, ``token``, ``cache_dir``,
            ``local_files_only``, ``force_download``, ``proxies``, ``tqdm_class``.

    Returns:
        The folder of the commit in the cache, whose name is the commit; ``subfolder`` counts from there.

    Raises:
        CheckpointNotFoundError: If the repository, the revision or a file in it is out of reach.
        NotFlexOlmoError: If the checkpoint is of another architecture.
        DamagedFileError: If the settings or the index cannot be read, or the index names no plain files.
        FlexOlmoError: The kind of `flexolmo_hf.modeling.names` that fits, if the experts wanted make no sense; before
            any weight is downloaded.
        UnknownArgumentError: If nothing reads an option.
    """
    refuse_unknown(options, _HUB_KEYWORDS | {"active_experts"})
    chosen = {name: options.pop(name) for name in ("active_experts",) if name in options}
    subfolder = options["subfolder"] = options.get("subfolder") or ""
    with named_errors(repository):
        folder = _fetch_settings(repository, options)
        # The commit instead of the branch: no file may come from a later state of the repository.
        options["revision"] = folder.name
        if (found := model_type_of(folder, subfolder)) != FlexOlmoConfig.model_type:
            raise NotFlexOlmoError(found)
        config = config or FlexOlmoConfig.from_pretrained(folder, subfolder=subfolder, **chosen)
        _fetch_weights(repository, config, variant, absent_experts(config, distributed_config), options)
        cached_file(repository, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **options)
    return folder


def name_after(model: Any, repository: str | os.PathLike) -> None:
    """Call a model, its parts and their settings by the repository instead of by the folder of the cache.

    Model cards and adapters name their base model so, and the folder would tell where this machine keeps things.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = module.config.name_or_path = str(repository)


def _fetch_settings(repository: str, options: Mapping[str, Any]) -> Path:
    file = cached_file(repository, CONFIG_FILE, **options)
    if file is None:
        raise DamagedFileError(CONFIG_FILE, f"it is missing in {repository!r}")
    return Path(file).parents[len(PurePosixPath(options["subfolder"]).parts)]


def _fetch_weights(
    repository: str, config: FlexOlmoConfig, variant: str | None, absent: set[str], options: Mapping[str, Any]
) -> None:
    single, index = weight_files(config, variant)
    if single is not None:
        found = cached_file(repository, single, _raise_exceptions_for_missing_entries=index is None, **options)
        if found is not None or index is None:
            return
    weight_map = read_weight_map(Path(cached_file(repository, index, **options)))
    cached_files(repository, sorted(files_needed(weight_map, absent)), **options)


def _given_settings(given: Any, options: Mapping[str, Any]) -> FlexOlmoConfig | None:
    if isinstance(given, str | os.PathLike):
        with named_errors(given):
            return FlexOlmoConfig.from_pretrained(given, **options)
    return given if isinstance(given, FlexOlmoConfig) else None


def _model_of_adapter(repository: str, keywords: dict[str, Any], hub: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    # Upstream's Auto classes have already done this; the class itself would only after the files are chosen.
    adapter = dict(keywords.get("adapter_kwargs") or {})
    if not is_peft_available() or "_adapter_model_path" in adapter:
        return repository, keywords
    with named_errors(repository):
        file = find_adapter_config_file(repository, **{**_for_settings(hub), **adapter})
    if file is None:
        return repository, keywords
    base = json.loads(Path(file).read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise DamagedFileError(Path(file).name, "it does not say which model the adapter belongs to")
    return base, {**keywords, "adapter_kwargs": {**adapter, "_adapter_model_path": repository}}


def _for_settings(hub: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hub.items() if name != "tqdm_class"}
