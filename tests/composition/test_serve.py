"""Stock servers run an exported checkpoint, in processes that know nothing of this package, and write the same tokens.

The suite itself opens no socket: server and client are processes of their own and use the loopback only.
"""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from transformers.utils.import_utils import is_serve_available

from flexolmo_hf import export_checkpoint
from tests.modeling.test_expert_sets import named_model

PROMPT = "Tea is"
KEPT = ["public", "news"]
NEW_TOKENS = 12
#: Without the working directory on the path, and without anything said to anyone.
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

# vLLM has requirements of its own, so it lives in an environment of its own.
VLLM_PYTHON = os.environ.get("FLEXOLMO_VLLM_PYTHON")

POST = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""

VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, gpu_memory_utilization=0.3)
    greedy = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3]), ignore_eos=True, detokenize=False)
    (answer,) = model.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], greedy, use_tqdm=False)
    print(json.dumps(list(answer.outputs[0].token_ids)))
"""


@pytest.fixture
def place(tmp_path, tokenizer):
    """An exported checkpoint `out` with its tokenizer; the tokens of the prompt, and those our model writes."""
    model = named_model(per_token=1, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "all")
    tokenizer.save_pretrained(tmp_path / "all")
    out = export_checkpoint(tmp_path / "all", tmp_path / "out", active_experts=KEPT)
    model.set_active_experts(KEPT)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False)
    written = answer[0, prompt.shape[1] :]
    # An end token would be treated by each server in its own way.
    assert len(written) == NEW_TOKENS
    return out, prompt[0].tolist(), written.tolist()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(folder, log):
    """Run `transformers serve` on a checkpoint until the block ends; yield its address."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=ENVIRONMENT, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            if "Uvicorn running" in log.read_text():
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def python(code, *arguments, interpreter=sys.executable):
    done = subprocess.run(
        [interpreter, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # vLLM's processes write their farewells to the same stream.
    return json.loads([line for line in done.stdout.splitlines() if line.startswith(("[", "{"))][-1])


@pytest.mark.slow
@pytest.mark.skipif(not is_serve_available(), reason="needs pip install 'transformers[serving]'")
def test_transformers_serve_completes_a_prompt_as_this_package_does(place, tmp_path, tokenizer):
    out, _, written = place
    question = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0.0}
    with serving(out, tmp_path / "serve.log") as address:
        answer = python(POST, f"{address}/v1/completions", json.dumps(question))

    assert answer["usage"]["completion_tokens"] == NEW_TOKENS
    assert answer["choices"][0]["text"] == tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.vllm
@pytest.mark.skipif(VLLM_PYTHON is None, reason="needs FLEXOLMO_VLLM_PYTHON, a Python that has vLLM")
def test_vllm_writes_the_tokens_that_this_package_writes(place, tmp_path):
    out, prompt, written = place
    script = tmp_path / "run_vllm.py"
    script.write_text(VLLM)
    code = f"import runpy, sys; runpy.run_path({str(script)!r}, run_name='__main__')"

    assert python(code, str(out), json.dumps(prompt), str(NEW_TOKENS), interpreter=VLLM_PYTHON) == written
