"""Run a model whose experts are spread over two processes; started by torchrun."""

import copy
import sys
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from flexolmo_hf import ExpertPackage, opt_out_matrix
from flexolmo_hf.composition.fingerprint import fingerprint_of
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.trainers.freezing import freeze_except
from tests.conftest import byte_tokenizer
from tests.modeling.parallel_worker import ROWS, inputs, logits_of

WHOLE = {"tp_size": 2, "ep_size": 2, "tp_plan": {}}
SLICED = {"tp_size": 2, "ep_size": 2}
THREE = ["public", "code", "news"]
LIVE = ["math", "news"]
TEXTS = {"math": ["1+1=2", "2+2=4,_3+3=6"], "public": ["abcdef"]}
#: A third of the vocabulary: what is drawn decides when a text ends.
ENDS = list(range(1, 97, 3))


def load(folder, sizes=WHOLE, kind=AutoModelForCausalLM, **options):
    """Load this process's own copy of a checkpoint."""
    path = folder / str(dist.get_rank())
    return kind.from_pretrained(path, distributed_config=DistributedConfig(**sizes), **options)


def bytes_of(model):
    """Return what the parameters take here."""
    return torch.tensor(sum(parameter.nbytes for parameter in model.parameters()))


def poison(model, names):
    """Fill these experts and their router rows with NaN."""
    for name in names:
        position = model.expert_position(name)
        for mixture in model.mixtures:
            mixture.gate.weight.data[position] = float("nan")
            for parameter in list(mixture.experts.values())[position].parameters():
                parameter.data.fill_(float("nan"))


def sums_in(call):
    """Return how many sums over the processes a call takes."""
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as summed:
        call()
    return torch.tensor(summed.call_count)


def sampled(model):
    """Return what is generated from drawn tokens."""
    return model.generate(inputs(), max_new_tokens=20, do_sample=True, eos_token_id=ENDS)


def bits_of(model):
    """Return the bits of every set and data set, document by document."""
    matrix = opt_out_matrix(model, byte_tokenizer(), TEXTS, max_length=8)
    documents = [documents for row in matrix.documents.values() for documents in row.values()]
    return torch.tensor([document.bits for of_data in documents for document in of_data])


def refusals(model, three, folder):
    """Return what a spread model refuses, by name."""
    rank = dist.get_rank()
    mask = torch.ones_like(inputs())
    mask[0, 0] = rank

    def learn(name):
        for parameter in (parameter for key, parameter in model.named_parameters() if name in key):
            parameter.requires_grad_(True)
        try:
            model(inputs())
        finally:
            model.requires_grad_(False)

    asked = {
        "save": lambda: model.save_pretrained(folder / "SAVED"),
        "train": model.train,
        "freeze": lambda: freeze_except(model, "math"),
        "learn": lambda: learn("layers.0.mlp.gate"),
        # One process alone has this expert.
        "learn one": lambda: learn("layers.1.mlp.experts.1.down_proj"),
        "add": lambda: model.add_expert(folder / "PACKAGE", "other"),
        "new": lambda: model.new_expert("other"),
        "load": lambda: three.load_expert("math"),
        "package": lambda: ExpertPackage.from_model(model, "math"),
        "key": model.expert_set_key,
        "pack": model.pack_experts,
        "fingerprint": lambda: fingerprint_of(model),
        "inputs": lambda: model.generate(inputs() + rank, max_new_tokens=2),
        "masks": lambda: model.generate(inputs(), attention_mask=mask, max_new_tokens=2),
        "sets": lambda: model.generate(inputs(), active_experts=THREE[rank], max_new_tokens=2),
    }
    found = {}
    for name, ask in asked.items():
        try:
            ask()
        except ConfigurationError as error:
            found[name] = torch.tensor("ep_size" in str(error) or "work on one batch" in str(error))
    return found


def main(folder):
    # A process that waits for one that does not come fails soon.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for per_token in (4, 2):
        model = load(folder / f"MODEL{per_token}")
        found |= {f"{per_token} {name}": tensor for name, tensor in logits_of(model).items()}
        # Without `torch.no_grad` on purpose.
        with model.use_experts(*LIVE):
            found[f"{per_token} live"] = model(inputs()).logits
        found[f"{per_token} sliced"] = load(folder / f"MODEL{per_token}", SLICED)(inputs()).logits
        three = load(folder / f"THREE{per_token}", active_experts=THREE)
        found[f"{per_token} backbone"] = load(folder / f"MODEL{per_token}", kind=AutoModel)(inputs()).last_hidden_state
        for name in ("dense", "eager", "grouped_mm"):
            model.set_experts_implementation(name)
            found[f"{per_token} {name}"] = model(inputs(), active_experts=ROWS).logits
        model.set_experts_implementation("auto")
        poisoned = copy.deepcopy(model)
        poison(poisoned, ["code", "news"])
        for name, names in {"two": ["public", "math"], "per row": ROWS}.items():
            found[f"{per_token} {name} poisoned"] = poisoned(inputs(), active_experts=names).logits
        found[f"{per_token} three"] = three(inputs()).logits
        found[f"{per_token} three generated"] = three.generate(inputs(), max_new_tokens=5, do_sample=False)
        torch.manual_seed(dist.get_rank())
        found[f"{per_token} sampled"] = sampled(model)
        found[f"{per_token} bits"] = bits_of(model)
        found[f"{per_token} one file"] = load(folder / f"ONE{per_token}")(inputs()).logits
    found["sums"] = sums_in(torch.no_grad()(lambda: model(inputs())))
    found["bytes of four"], found["bytes of three"] = bytes_of(model), bytes_of(three)
    found |= {f"refused {name}": refused for name, refused in refusals(model, three, folder).items()}
    model.remove_expert("math")
    found["removed"] = model(inputs()).logits
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()}, folder / f"rank{dist.get_rank()}.safetensors"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
