"""What may be given as an encoder: a name, a sentence-transformers model, a function, or the anchor itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flexolmo_hf._extras import require
from flexolmo_hf.errors import CheckpointNotFoundError, ConfigurationError
from flexolmo_hf.modeling.files.locate import looks_like_a_repository, named_errors
from flexolmo_hf.routing.hidden_states import HiddenStates

#: Name of the encoder that is the anchor itself.
SELF = "self"

#: Texts in, one embedding per text out: ``(B, W)``, or ``(B, L, H)`` from hidden states per layer.
Encode = Callable[[Sequence[str]], Any]


@runtime_checkable
class SentenceEncoder(Protocol):
    """What sentence-transformers models have in common."""

    def encode(self, sentences: Any, **options: Any) -> Any:
        """Embed texts."""


def open_encoder(encoder: Any, *, model: Any = None, tokenizer: Any = None, per_layer: bool = False) -> Encode:
    """Make a function of what was given as an encoder.

    Args:
        encoder: ``"self"``; the folder or Hub repository of a sentence-transformers model; such a model; or a function.
        model: The anchor, for ``"self"``.
        tokenizer: Its tokenizer.
        per_layer: For ``"self"``: an embedding for each layer instead of their mean.

    Returns:
        The function from texts to embeddings.

    Raises:
        ConfigurationError: If it is none of these, or the last three are given to another encoder, which has no use for
            them.
        CheckpointNotFoundError: If there is no such folder or repository.
        MissingExtraError: If sentence-transformers is needed and not installed.
    """
    if isinstance(encoder, str) and encoder == SELF:
        return HiddenStates(model, tokenizer, per_layer=per_layer)
    if model is not None or tokenizer is not None or per_layer:
        raise ConfigurationError(
            "model, tokenizer and per_layer are for encoder='self', and another encoder is given.",
            "Leave them out, or take the anchor as the encoder.",
        )
    if isinstance(encoder, (str, Path)):
        encoder = _load(str(encoder))
    if isinstance(encoder, SentenceEncoder):
        loaded = encoder
        return lambda texts: loaded.encode(list(texts), batch_size=len(texts), show_progress_bar=False)
    if callable(encoder):
        return encoder
    raise ConfigurationError(
        f"A {type(encoder).__name__} is no encoder.",
        "Give a sentence-transformers model, its folder or repository, a function from texts to an array, or 'self'.",
    )


def _load(name: str) -> Any:
    if not Path(name).is_dir() and not looks_like_a_repository(name):
        raise CheckpointNotFoundError(Path(name).name, "")
    require("routing", "sentence_transformers")
    from sentence_transformers import SentenceTransformer

    with named_errors(name):
        try:
            return SentenceTransformer(name, model_kwargs={"use_safetensors": True})
        except ValueError as error:
            # A folder that is there and holds something else.
            raise ConfigurationError(
                f"{Path(name).name!r} holds no encoder.",
                "Name the folder or repository of a sentence-transformers model.",
            ) from error
