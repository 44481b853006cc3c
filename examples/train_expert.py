"""Train one expert beside a frozen OLMo-2 model and pack it.

Run: python examples/train_expert.py DENSE DATA.jsonl PACKAGE math
"""

import sys
import tempfile

from datasets import load_dataset
from transformers import AutoTokenizer

from flexolmo_hf import ExpertPackage, ExpertSFTConfig, ExpertSFTTrainer, FlexOlmoForCausalLM


def main(dense: str, data: str, package: str, expert: str, steps: int = 1000) -> None:
    """Train on the rows of a JSON lines file and write a package."""
    model = FlexOlmoForCausalLM.from_dense(dense, expert=expert, router_bias=True)
    with tempfile.TemporaryDirectory() as scratch:
        # The cache of the data goes away with the run; by default it would stay in the home folder.
        rows = load_dataset("json", data_files=data, split="train", cache_dir=scratch)
        trainer = ExpertSFTTrainer(
            model=model,
            args=ExpertSFTConfig(expert=expert, output_dir=f"{scratch}/run", max_steps=steps, save_strategy="no"),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(dense),
        )
        trainer.train()
    ExpertPackage.from_model(model, expert, training=trainer.training_record()).save_pretrained(package)


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:]))
