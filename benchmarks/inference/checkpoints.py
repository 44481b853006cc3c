"""Random checkpoints, and how many of their bytes a forward pass has to read."""

import os
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from benchmarks.inference.settings import Shape

FLOAT32 = 4


@dataclass(frozen=True)
class Weights:
    """Bytes of a checkpoint by what becomes of them.

    Attributes:
        always: Read by every forward pass: attention, norms, routers, head.
        expert: One expert in all layers.
        embedding: Of which a forward pass reads one row per token.
        experts: The number of experts.
    """

    always: int
    expert: int
    embedding: int
    experts: int

    @property
    def total(self) -> int:
        """Return the bytes of the whole checkpoint."""
        return self.always + self.embedding + self.experts * self.expert

    def read_by(self, used: int) -> int:
        """Return the bytes that a decoded token reads if it uses so many experts, its embedding left out."""
        return self.always + used * self.expert

    def as_dict(self) -> dict[str, int]:
        """Return all figures by name."""
        return {**asdict(self), "total": self.total}


def write_checkpoint(folder: Path, shape: Shape) -> Weights:
    """Write a random model of this shape in fp32, readable by stock transformers too, and weigh it."""
    import flexolmo_hf

    config = flexolmo_hf.FlexOlmoConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_experts=shape.experts,
        pad_token_id=0,
        eos_token_id=1,
    )
    flexolmo_hf.FlexOlmoForCausalLM(config).save_pretrained(folder)
    # What is measured next shall not wait for the disk.
    os.sync()
    return weigh(folder, shape.experts)


def weigh(folder: Path, experts: int) -> Weights:
    """Sum up the tensors of an fp32 checkpoint by what becomes of them, from the headers of its files."""
    of_experts = always = embedding = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dictionary)
                size = prod(opened.get_slice(key).get_shape()) * FLOAT32
                if ".mlp.experts." in key:
                    of_experts += size
                elif key.endswith("embed_tokens.weight"):
                    embedding += size
                else:
                    always += size
    return Weights(always, of_experts // experts, embedding, experts)
