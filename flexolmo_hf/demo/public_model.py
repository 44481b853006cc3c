"""The public model: a tiny dense OLMo-2, trained on the public text in its own process.

Run as ``python -m flexolmo_hf.demo.public_model``; the folder it writes is all that the owners ever get.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from flexolmo_hf.demo.settings import FULL, QUICK, DemoSettings
from flexolmo_hf.demo.training import training_fields
from flexolmo_hf.evaluation.data.documents import read_documents


def new_model(tokenizer: PreTrainedTokenizerBase, settings: DemoSettings) -> Olmo2ForCausalLM:
    """Make an untrained model that reads `tokenizer`'s tokens."""
    torch.manual_seed(settings.seed)
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=2 * settings.sequence,
            rms_norm_eps=1e-6,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            tie_word_embeddings=False,
        )
    )


def train_public_model(data: Path, folder: Path, settings: DemoSettings) -> None:
    """Train the public model.

    Args:
        data: The public text, as JSON lines.
        folder: Holds the tokenizer; the trained model is written into it.
        settings: Sizes and learning rate.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fields = training_fields(folder, settings, rate=settings.public_rate, epochs=1)
    trainer = SFTTrainer(
        model=new_model(tokenizer, settings),
        args=SFTConfig(**fields),
        train_dataset=Dataset.from_dict({"text": read_documents(data)}),
        processing_class=tokenizer,
    )
    trainer.train()
    # Not trainer.save_model(), which adds the training arguments with the paths of this machine.
    trainer.model.save_pretrained(folder)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m flexolmo_hf.demo.public_model", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the public text, as JSON lines")
    parser.add_argument("--folder", type=Path, required=True, help="holds the tokenizer, receives the model")
    parser.add_argument("--quick", action="store_true", help="the small sizes")
    given = parser.parse_args()
    train_public_model(given.data, given.folder, QUICK if given.quick else FULL)


if __name__ == "__main__":
    main()
