"""A tracker that the user turns on gets every figure and the settings, no text, and sends nothing if told so."""

import os
import socket
import subprocess
import sys

import pytest

from tests.trainers.launching import ROOT

FIGURES = ["loss", "tokens_per_second", "routing_share", "router_bias", "row_distance"]
# A run of its own process: a tracker starts threads and processes, and keeps them.
RUN = """
import sys
from datasets import Dataset
from flexolmo_hf import ExpertSFTConfig, ExpertSFTTrainer, FlexOlmoForCausalLM
from tests.conftest import byte_tokenizer, dense_model
tokenizer = byte_tokenizer()
dense = dense_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
args = ExpertSFTConfig(
    expert="math", output_dir="FOLDER_OF_THE_RUN", max_steps=3, logging_steps=1, max_length=32, save_strategy="no",
    bf16=False, use_cpu=True, report_to=[sys.argv[1]],
)
ExpertSFTTrainer(
    model=FlexOlmoForCausalLM.from_dense(dense, expert="math", router_bias=True),
    args=args,
    train_dataset=Dataset.from_list([{"text": "a very private sentence"}] * 24),
    processing_class=tokenizer,
).train()
"""


@pytest.fixture
def server():
    """Where trackers would send to; who connects waits there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def environment(place, server):
    """Return settings under which a tracker writes into a folder, and would send to the server."""
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    switches = ("HF_HUB_OFFLINE", "HF_TOKEN", "WANDB_API_KEY", "SPACE_ID")
    return {
        **{key: value for key, value in os.environ.items() if key not in switches},
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(place),
        "HF_ENDPOINT": address,
        "WANDB_MODE": "offline",
        "WANDB_BASE_URL": address,
        "WANDB_DIR": str(place / "STORED"),
        "TRACKIO_DIR": str(place / "STORED"),
    }


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_gets_the_figures_and_the_settings_but_no_text_and_sends_nothing(tmp_path, server, tracker):
    pytest.importorskip(tracker, reason=f"{tracker} is optional")
    (tmp_path / "STORED").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUN, tracker],
        cwd=tmp_path,
        env=environment(tmp_path, server),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    stored = b"".join(file.read_bytes() for file in (tmp_path / "STORED").rglob("*") if file.is_file())
    assert [name for name in FIGURES if f"train/{name}".encode() not in stored] == []
    assert b"FOLDER_OF_THE_RUN" in stored
    assert b"private" not in stored.replace(b"hub_private_repo", b"")
    with pytest.raises(BlockingIOError):
        server.accept()
