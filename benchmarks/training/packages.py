"""What smaller forms of an expert cost: bytes of the package, and the loss on text that was not trained on.

The texts are those of two made-up languages in which a token depends on the one before it: one for the public model,
one for the expert. They are small enough to be learned in seconds.

Shape letters: B batch, T tokens, V vocabulary.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from benchmarks.inference.settings import Shape
from benchmarks.inference.turns import say
from benchmarks.training.settings import Settings

#: One expert of a small model; the languages need no more.
SMALL = Shape(128, 352, 4, experts=2, vocabulary=256, heads=4)
RATE, BATCH, LENGTH = 2e-3, 8, 64
NAME = "domain"


class Language:
    """A language in which each token is followed by one of few others, with probabilities of their own."""

    def __init__(self, seed: int, followers: int = 8):
        self._generator = torch.Generator().manual_seed(seed)
        logits_VV = torch.randn(SMALL.vocabulary, SMALL.vocabulary, generator=self._generator)
        least_V1 = logits_VV.topk(followers).values[:, -1:]
        self._next_VV = logits_VV.masked_fill(logits_VV < least_V1, float("-inf")).mul(2).softmax(-1)

    def text(self, rows: int) -> torch.Tensor:
        """Return new texts, ``(B, T)``."""
        found = [torch.randint(SMALL.vocabulary, (rows,), generator=self._generator)]
        for _ in range(LENGTH - 1):
            found.append(torch.multinomial(self._next_VV[found[-1]], 1, generator=self._generator)[:, 0])
        return torch.stack(found, dim=1)


def learn(model: Any, language: Language, steps: int) -> None:
    """Train what is not frozen, as a bare loop."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for _ in range(steps):
        ids_BT = language.text(BATCH)
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out(model: Any, texts_BT: torch.Tensor) -> float:
    """Return the loss on texts that nothing was trained on, in nats per token."""
    return float(model(texts_BT, labels=texts_BT, use_cache=False).loss)


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Train an expert in full and in low-rank form, compress the full one, and weigh them all.

    Returns:
        For each form, what it is called (``form``), the ``bytes`` of the package's weights (None for the public model
        alone, which has none), and ``loss``.
    """
    import flexolmo_hf

    torch.manual_seed(0)
    public, domain = Language(seed=1), Language(seed=2)
    texts_BT = domain.text(64)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        anchor = _anchor(public, settings.learning_steps, scratch / "anchor")
        found = [{"form": "public model alone", "bytes": None, "loss": held_out(anchor, texts_BT)}]

        def weigh(form: str, package: Any) -> None:
            folder = scratch / form.replace(" ", "_").replace(",", "")
            package.save_pretrained(folder)
            merged = flexolmo_hf.merge_experts(scratch / "anchor", {NAME: folder}, folder.with_suffix(".merged"))
            model = flexolmo_hf.FlexOlmoForCausalLM.from_pretrained(merged)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            found.append({"form": form, "bytes": size, "loss": held_out(model, texts_BT)})
            say(f"package, {form}: {size:,} bytes, held-out loss {found[-1]['loss']:.3f}")

        full = _trained(anchor, domain, settings.learning_steps)
        weigh("full", full)
        for rank in settings.ranks:
            weigh(f"compressed, rank {rank}", full.compress(anchor=scratch / "anchor", rank=rank))
        for rank in settings.ranks:
            weigh(f"trained, rank {rank}", _trained(anchor, domain, settings.learning_steps, rank))
    return found


def _anchor(language: Language, steps: int, folder: Path) -> Any:
    shape = SMALL
    config = Olmo2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        pad_token_id=None,
        eos_token_id=1,
    )
    model = Olmo2ForCausalLM(config)
    learn(model, language, steps)
    model.save_pretrained(folder)
    return model


def _trained(anchor: Any, language: Language, steps: int, rank: int = 0) -> Any:
    import flexolmo_hf
    from flexolmo_hf.composition.compress import to_low_rank

    model = flexolmo_hf.FlexOlmoForCausalLM.from_dense(anchor, expert=NAME)
    if rank:
        to_low_rank(model, NAME, rank)
    flexolmo_hf.freeze_except(model, NAME)
    learn(model, language, steps)
    return flexolmo_hf.ExpertPackage.from_model(model, NAME)
