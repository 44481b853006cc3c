"""`flexolmo embed` makes of files what `domain_embedding` makes of texts, for the anchor that is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flexolmo_hf import FlexOlmoForCausalLM, domain_embedding, load_embedding
from flexolmo_hf.cli import app
from flexolmo_hf.modeling.embedded_row import EmbeddedRow, RouterProjection
from tests.composition.conftest import tree
from tests.conftest import TINY, dense_model
from tests.routing.test_encoders import sentence_model  # noqa: F401 (a fixture)

TEXTS = ["one two", "two three three", "", "one"]


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """A working directory with texts, a dense anchor, and FlexOlmo anchors with a projection of their own."""
    dense = dense_model(vocab_size=len(tokenizer))
    dense.save_pretrained(tmp_path / "DENSE")
    row = torch.randn(TINY["hidden_size"])
    for name, projection in {"SEED5": RouterProjection(8, 5), "WIDE": RouterProjection(384, 5)}.items():
        made = FlexOlmoForCausalLM.from_dense(dense, router_embeddings={"public": EmbeddedRow(row, projection)})
        made.save_pretrained(tmp_path / name)
    for name in ("DENSE", "SEED5", "WIDE"):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "LLAMA").mkdir()
    (tmp_path / "LLAMA" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "taken.npy").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def encoder(place, sentence_model):  # noqa: F811
    sentence_model.save_pretrained("ENCODER")
    return sentence_model


def run(*arguments):
    return CliRunner().invoke(app, ["embed", *arguments], env={"COLUMNS": "200"})


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_writes_what_the_function_gives(encoder):
    said = succeed("texts.jsonl", "-o", "math.npy", "--encoder", "ENCODER", "--anchor", "DENSE")
    expected = domain_embedding(TEXTS, encoder=encoder, hidden_size=TINY["hidden_size"])

    assert np.allclose(np.load("math.npy", allow_pickle=False), expected.vector.numpy(), atol=1e-6)
    assert load_embedding("math.npy").projection == expected.projection == RouterProjection(8, 0)
    assert said.splitlines() == [
        "Wrote math.npy: 64 numbers from 3 documents; dropped 1 (1 empty, 0 not finite).",
        "Projected from width 8 with seed 0.",
    ]


def test_every_option_reaches_the_function(encoder):
    options = ["--sample", "2", "--seed", "9", "--scale", "0.7", "--encoder-name", "owner/name", "--hidden-size", "10"]
    succeed("texts.jsonl", "-o", "math.safetensors", "--encoder", "ENCODER", *options)
    expected = domain_embedding(
        TEXTS, encoder=encoder, hidden_size=10, sample=2, seed=9, scale=0.7, encoder_name="owner/name"
    )
    found = load_embedding("math.safetensors")

    assert torch.allclose(found.vector, expected.vector, atol=1e-6)
    assert (found.projection, found.scale, found.documents) == (expected.projection, 0.7, 2)


@pytest.mark.parametrize("anchor", ["DENSE", "SELF"])
def test_the_anchor_itself_can_be_the_encoder(place, tokenizer, anchor):
    dense = FlexOlmoForCausalLM.from_dense("DENSE")
    dense.save_pretrained("SELF")
    tokenizer.save_pretrained("SELF")
    succeed("texts.jsonl", "-o", "math.npy", "--encoder", "self", "--anchor", anchor, "--per-layer")
    expected = domain_embedding(TEXTS, encoder="self", model=dense, tokenizer=tokenizer, per_layer=True)

    assert torch.allclose(load_embedding("math.npy").vector, expected.vector, atol=1e-5)
    assert load_embedding("math.npy").projection.encoder == "self"


def test_the_seed_of_the_anchor_is_the_default(encoder):
    succeed("texts.jsonl", "-o", "math.npy", "--encoder", "ENCODER", "--anchor", "SEED5")

    assert load_embedding("math.npy").projection.seed == 5


MISUSES = {
    "nothing but texts": ([], "--anchor or --hidden-size"),
    "no length": (["--encoder", "ENCODER"], "--anchor or --hidden-size"),
    "two lengths": (["--encoder", "ENCODER", "--anchor", "DENSE", "--hidden-size", "64"], "--anchor or --hidden-size"),
    "another seed than the anchor's": (
        ["--encoder", "ENCODER", "--anchor", "SEED5", "--seed", "6"],
        "'the anchor' and 'these texts' were made in different ways: seed is 5 and 6",
    ),
    "another width than the anchor's": (["--encoder", "ENCODER", "--anchor", "WIDE"], "encoder_width is 384 and 8"),
    "an anchor that is not there": (["--encoder", "ENCODER", "--anchor", "no/where/at"], "'at'"),
    "another architecture": (["--encoder", "ENCODER", "--anchor", "LLAMA"], "'llama'"),
    "the anchor as the encoder without one": (["--encoder", "self", "--hidden-size", "64"], "--anchor"),
    "layers of another encoder": (["--encoder", "ENCODER", "--anchor", "DENSE", "--per-layer"], "encoder='self'"),
    "an encoder that is not there": (["--encoder", "no/where/at", "--anchor", "DENSE"], "'at'"),
    "a file that is there": (["--encoder", "ENCODER", "--anchor", "DENSE", "--out", "taken.npy"], "'taken.npy'"),
    "a pickle": (["--encoder", "ENCODER", "--anchor", "DENSE", "--out", "math.pkl"], "'.pkl'"),
    "another field": (["--encoder", "ENCODER", "--anchor", "DENSE", "--field", "body"], "'body'"),
}


@pytest.mark.parametrize(("arguments", "says"), MISUSES.values(), ids=MISUSES)
def test_a_misuse_ends_with_code_2_and_one_sentence_and_writes_nothing(encoder, place, arguments, says):
    before = tree(place)
    arguments = arguments if "--out" in arguments else [*arguments, "--out", "math.npy"]
    result = run("texts.jsonl", *arguments)

    assert result.exit_code == 2, repr(result.exception)
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert says in message
    assert str(place) not in result.output
    assert tree(place) == before


def test_without_an_encoder_the_anchor_is_it(place):
    succeed("texts.jsonl", "-o", "math.npy", "--anchor", "DENSE")

    assert load_embedding("math.npy").projection.encoder == "self"


def test_the_example_starts_a_model_from_the_rows_of_two_domains(place):
    (place / "public.txt").write_text("The river runs through the town.")
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "examples" / "domain_embedding.py")]
    done = subprocess.run(
        [*command, "DENSE", "public.txt", "texts.jsonl", "math", "OUT"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "math: 3 documents, 1 dropped" in done.stdout
    model = FlexOlmoForCausalLM.from_pretrained("OUT")
    assert model.config.router_projection == {"encoder_width": 64, "seed": None, "encoder": "self"}
    assert model.mixtures[0].gate.weight.norm(dim=1).tolist() == pytest.approx([0.5, 0.5])
