"""Nothing is sent anywhere, also where the user has switched nothing off."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import dense_model

ROOT = Path(__file__).resolve().parents[1]

# A whole life of an expert, with every attempt to look a name up or to connect written down instead of made.
LIFE = """
import socket, sys
attempts = []
def refuse(*args, **kwargs):
    attempts.append(args)
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from flexolmo_hf import ExpertPackage, ExpertSFTConfig, ExpertSFTTrainer, FlexOlmoForCausalLM, inspect_checkpoint
from flexolmo_hf import merge_experts
tokenizer = AutoTokenizer.from_pretrained("DENSE")
trainer = ExpertSFTTrainer(
    model=FlexOlmoForCausalLM.from_dense("DENSE", expert="math"),
    args=ExpertSFTConfig(expert="math", output_dir="RUN", max_steps=1, disable_tqdm=True),
    train_dataset=Dataset.from_list([{"text": "one"}] * 4),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model("RUN")
ExpertPackage.from_model(FlexOlmoForCausalLM.from_pretrained("RUN"), "math").save_pretrained("PACKAGE")
merge_experts("DENSE", {"math": "PACKAGE"}, "MERGED")
inspect_checkpoint("MERGED")
model = AutoModelForCausalLM.from_pretrained("MERGED", active_experts=["public", "math"])
model.generate(**tokenizer("one", return_tensors="pt"), max_new_tokens=2)
model.save_pretrained("AGAIN")
print("attempts:", attempts)
"""


def test_no_step_from_a_dense_model_to_a_merged_one_tries_to_reach_the_network(tmp_path, tokenizer):
    dense_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "DENSE")
    tokenizer.save_pretrained(tmp_path / "DENSE")
    switches = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI")
    environment = {key: value for key, value in os.environ.items() if key not in switches}
    done = subprocess.run(
        [sys.executable, "-c", LIFE],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert "attempts: []" in done.stdout, done.stdout + done.stderr
