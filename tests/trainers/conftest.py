"""A two-expert model and settings for a few steps on the CPU."""

import pytest

from flexolmo_hf import ExpertSFTConfig, ExpertSFTTrainer, FlexOlmoForCausalLM
from tests.conftest import dense_model

#: Settings of a short run; what it lacks is the output folder.
SHORT_RUN = {
    "expert": "math",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "weight_decay": 0.1,
    "max_length": 32,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
}


def two_experts(tokenizer):
    dense = dense_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    return FlexOlmoForCausalLM.from_dense(dense, expert="math", router_bias=True)


@pytest.fixture
def model(tokenizer):
    return two_experts(tokenizer)


@pytest.fixture
def settings(tmp_path):
    """Settings of a short run, changed by keyword."""

    def make(**changes):
        return ExpertSFTConfig(**{**SHORT_RUN, "output_dir": str(tmp_path / "run"), **changes})

    return make


@pytest.fixture
def trainer(model, settings, tokenizer):
    """A trainer on rows of any kind, settings changed by keyword."""

    def make(rows, *, eval_rows=None, using=None, **changes):
        from datasets import Dataset

        return ExpertSFTTrainer(
            model=model if using is None else using,
            args=settings(**changes),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
            processing_class=tokenizer,
        )

    return make


TEXT = [{"text": f"row {number} " + "abc " * (number % 7)} for number in range(24)]
