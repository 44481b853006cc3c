"""A domain embedding made of files and written to a file, as the command line does it."""

import os
from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, AutoTokenizer, Olmo2Config, Olmo2ForCausalLM

from flexolmo_hf.errors import ConfigurationError, NotOlmo2Error
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.embedded_row import RouterProjection, common_projection
from flexolmo_hf.modeling.files.locate import model_type_of, named_errors
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.routing.domain_embedding import DomainEmbedding, domain_embedding
from flexolmo_hf.routing.embedding_file import refuse_place
from flexolmo_hf.routing.encoders import SELF
from flexolmo_hf.routing.texts import read_texts


def embed_files(
    texts: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    encoder: str,
    anchor: str | os.PathLike | None = None,
    hidden_size: int | None = None,
    seed: int | None = None,
    field: str = "text",
    **options: Any,
) -> DomainEmbedding:
    """Embed the documents of files and write the embedding.

    Args:
        texts: ``.jsonl`` or ``.txt`` files, or folders of them, as `read_texts` takes them.
        out: ``NAME.npy`` or ``NAME.safetensors``.
        encoder: As in `domain_embedding`: a folder, a repository, or ``"self"`` for the anchor.
        anchor: The public model, dense OLMo-2 or FlexOlmo: it gives the hidden size, and the seed if it has one.
        hidden_size: Without an anchor: the model's.
        seed: As in `domain_embedding`; default the anchor's, else 0.
        field: The key of the text in ``.jsonl`` objects.
        **options: As `domain_embedding`.

    Raises:
        ConfigurationError: If the hidden size is not known, or a file or setting is refused.
        RouterProjectionError: If the anchor's rows were made in another way.
        DamagedFileError, CheckpointNotFoundError, NotOlmo2Error, OutputPlaceError: If a file or model cannot be used.
    """
    refuse_place(out)
    if (anchor is None) == (hidden_size is None):
        raise ConfigurationError(
            f"anchor is {'not ' if anchor is None else ''}given, and hidden_size is {hidden_size}.",
            "Give one of them, --anchor or --hidden-size: it says how long a router row is.",
        )
    wanted = None
    if anchor is not None:
        config = _config(anchor)
        hidden_size = config.hidden_size
        wanted = RouterProjection.read(getattr(config, "router_projection", None))
    if seed is None:
        seed = (wanted.seed if wanted else None) or 0
    if encoder == SELF:
        options |= _model_and_tokenizer(anchor)
    embedding = domain_embedding(
        read_texts(texts, field=field), encoder=encoder, hidden_size=hidden_size, seed=seed, **options
    )
    common_projection({"the anchor": wanted, "these texts": embedding.projection})
    embedding.save(out)
    return embedding


def _config(anchor: str | os.PathLike) -> Any:
    model_type_of(anchor)
    with named_errors(anchor):
        config = AutoConfig.from_pretrained(anchor)
    if config.model_type not in (Olmo2Config.model_type, FlexOlmoConfig.model_type):
        raise NotOlmo2Error(config.model_type)
    return config


def _model_and_tokenizer(anchor: str | os.PathLike | None) -> dict[str, Any]:
    if anchor is None:
        raise ConfigurationError("The anchor is the encoder, and none is given.", "Give it with --anchor.")
    config = _config(anchor)
    with named_errors(anchor):
        if config.model_type == FlexOlmoConfig.model_type:
            model = FlexOlmoForCausalLM.from_pretrained(anchor, active_experts=[PUBLIC])
        else:
            model = Olmo2ForCausalLM.from_pretrained(anchor, use_safetensors=True)
        return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(anchor)}
