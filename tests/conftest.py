"""Tiny models built in code, and the rule that no test opens a socket."""

import hashlib
import os
import socket
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast
from transformers.models.flex_olmo import FlexOlmoConfig as StockConfig
from transformers.models.flex_olmo import FlexOlmoForCausalLM as StockModel
from transformers.utils import logging

import flexolmo_hf  # noqa: F401 (registers the architecture)
from flexolmo_hf.errors import FlexOlmoError

logging.disable_progress_bar()

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, request):
    """Refuse every connection but those inside this process's own machine that torch's process groups need."""

    def refuse(self, address, *args):
        raise AssertionError("a test tried to open a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shaken(model):
    """Give every parameter, norms included, values of its own: equal ones would hide a mix-up."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def as_one_file(folder):
    """Rewrite a checkpoint of several files as the one file that stock transformers writes; return that file."""
    file, tensors = folder / "model.safetensors", {}
    if not file.exists():
        for part in sorted(folder.glob("model-*.safetensors")):
            tensors |= {key: tensor.clone() for key, tensor in load_file(part).items()}
            part.unlink()
        (folder / "model.safetensors.index.json").unlink()
        save_file(tensors, file, metadata={"format": "pt"})
    return file


def stock_model(**changes):
    """A stock FlexOlmo model with four experts, two per token unless told otherwise."""
    settings = {**TINY, "num_experts": 4, "num_experts_per_tok": 4, **changes}
    return shaken(StockModel(StockConfig(**settings)))


def dense_model(**changes):
    """A dense OLMo-2 model."""
    return shaken(Olmo2ForCausalLM(Olmo2Config(**{**TINY, **changes})))


@pytest.fixture
def input_ids():
    return torch.randint(2, TINY["vocab_size"], (3, 11))


def byte_tokenizer():
    """A byte tokenizer without merges: 256 bytes, an end and a padding token."""
    vocab = {"<pad>": 0, "<eos>": 1}
    vocab |= {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=2)}
    tokens = Tokenizer(models.BPE(vocab, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def tree(folder):
    """Return everything under a folder, hidden or not, with the hash of each file."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*")}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None for name, p in paths.items()}


@pytest.fixture
def refused(tmp_path):
    """Expect an error of a kind that says certain things in one line, names no path, and leaves the disk as it was."""

    @contextmanager
    def expect(kind, *says):
        before = tree(tmp_path)
        with pytest.raises(kind) as caught:
            yield
        message = str(caught.value)
        assert isinstance(caught.value, FlexOlmoError), message
        assert [part for part in says if part not in message] == [], message
        assert str(tmp_path) not in message
        assert "\n" not in message
        assert tree(tmp_path) == before

    return expect
