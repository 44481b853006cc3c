"""The steps of a recipe that need a model: telling what kind of text it is, and writing it anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from flexolmo_hf.errors import ConfigurationError, _did_you_mean
from flexolmo_hf.evaluation.data.recipe.schema import Classify, Recipe, Rewrite


def refuse_missing_models(recipe: Recipe) -> None:
    """Refuse a recipe whose steps need a model that it does not name.

    Raises:
        ConfigurationError: With the source and the step.
    """
    for source in recipe.sources:
        for step, settings in (("classify", source.classify), ("rewrite", source.rewrite)):
            if settings is not None and settings.model is None:
                raise ConfigurationError(
                    f"The recipe asks to {step} the texts of {source.name!r} and names no model for it.",
                    f"Add `model:` to `{step}:`, with a folder or a repository; or delete `{step}:` to take the texts "
                    "as they are; or leave out the domain with only=[...].",
                )


def classifier(settings: Classify) -> Callable[[str], bool]:
    """Return a function that tells whether a text is to be kept.

    Raises:
        ConfigurationError: If the model cannot be had, or has no label of a name.
    """
    tokenizer, model = _loaded(AutoModelForSequenceClassification, str(settings.model))
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    for label in (*settings.labels, *settings.but):
        if label not in labels:
            raise ConfigurationError(
                f"The classifier has no label {label!r}.{_did_you_mean(label, labels)}", f"It has {labels}."
            )

    @torch.inference_mode()
    def keeps(text: str) -> bool:
        inputs = tokenizer(text, truncation=True, max_length=settings.max_length, return_tensors="pt")
        shares = model(**inputs.to(model.device)).logits[0].float().softmax(-1)
        best = int(shares.argmax())
        chosen = labels[best] in settings.labels if settings.labels else labels[best] not in settings.but
        return chosen and shares[best].item() >= settings.min_score

    return keeps


def rewriter(settings: Rewrite) -> Callable[[str], str]:
    """Return a function that writes a text anew: the model's likeliest answer, so that a repetition gives the same.

    Raises:
        ConfigurationError: If the model cannot be had.
    """
    tokenizer, model = _loaded(AutoModelForCausalLM, str(settings.model))

    @torch.inference_mode()
    def rewritten(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False).input_ids[: settings.max_length]
        # Not format(): prompts and texts are full of braces.
        asked = settings.prompt.replace("{text}", tokenizer.decode(ids))
        if tokenizer.chat_template:
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
            )
        inputs = tokenizer(asked, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        written = model.generate(
            **inputs.to(model.device), max_new_tokens=settings.max_new_tokens, do_sample=False, temperature=None
        )
        answer: str = tokenizer.decode(written[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return answer.strip()

    return rewritten


def _loaded(kind: Any, name: str) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = kind.from_pretrained(name, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"There is no {'classifier' if kind is AutoModelForSequenceClassification else 'language model'} "
            f"{Path(name).name!r} within reach.",
            "Name a folder or a repository with a tokenizer and a model in safetensors.",
        ) from error
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu")
