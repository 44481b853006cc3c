import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2ForCausalLM

from flexolmo_hf import ExpertPackage
from flexolmo_hf.demo import run_demo
from flexolmo_hf.demo.settings import DOMAINS, OWNERS
from flexolmo_hf.errors import OutputFolderNotEmptyError
from flexolmo_hf.evaluation import bits_per_byte
from flexolmo_hf.evaluation.data.documents import read_documents

# The first test waits for a whole demo, which a busy machine draws out.
pytestmark = pytest.mark.timeout(900)

# Imported by every Python process that has its folder on the path: writes down which files the process opens.
WITNESS = """
import os, sys

def witness(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and not witness.busy:
        witness.busy = True
        with open(os.environ["WITNESS"], "a") as file:
            file.write(f"{os.getpid()}\\t{os.path.abspath(os.fsdecode(args[0]))}\\n")
        witness.busy = False

witness.busy = False
sys.addaudithook(witness)
"""


@pytest.fixture(scope="module")
def demo(wheels, tmp_path_factory):
    """One quick run as a user starts it, with a witness to the files its processes open."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "sitecustomize.py").write_text(WITNESS)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = ["demo", "--quick", "--output", str(folder / "out"), "--cache", str(wheels)]
    done = subprocess.run(
        [sys.executable, "-m", "flexolmo_hf.cli", *command],
        env=os.environ | {"PYTHONPATH": path, "WITNESS": str(folder / "opened")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


@pytest.fixture(scope="module")
def table(demo):
    return json.loads((demo[0] / "report.json").read_text())["bits_per_byte"]


@pytest.mark.parametrize("domain", OWNERS)
def test_expert_lowers_the_bits_per_byte_of_its_own_domain(table, domain):
    assert table[f"public+{domain}"][domain] < table["public"][domain] - 0.05


@pytest.mark.parametrize(("domain", "other"), [OWNERS, OWNERS[::-1]])
def test_expert_does_more_for_its_own_domain_than_for_the_other(table, domain, other):
    gains = {d: table["public"][d] - table[f"public+{domain}"][d] for d in (domain, other)}

    assert gains[domain] > gains[other] + 0.05


def test_merged_model_with_both_experts_is_better_on_both_domains(table):
    for domain in OWNERS:
        assert table["public+math+code"][domain] < table["public"][domain]


def test_public_expert_alone_is_the_dense_public_model(demo, table):
    out, _ = demo
    tokenizer = AutoTokenizer.from_pretrained(out / "public_model")
    dense = Olmo2ForCausalLM.from_pretrained(out / "public_model")

    for domain in DOMAINS:
        texts = read_documents(out / "heldout" / f"{domain}.jsonl")
        value = bits_per_byte(dense, tokenizer, texts, max_length=128)
        assert value == pytest.approx(table["public"][domain], rel=1e-5)


def test_every_artefact_loads(demo):
    out, _ = demo
    ids = torch.tensor([[5, 6, 7]])

    for name in OWNERS:
        trained = AutoModelForCausalLM.from_pretrained(out / "owners" / name / "run")
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", active_experts=["public", name])
        assert ExpertPackage.from_pretrained(out / "owners" / name / "package").name == name
        assert trained.expert_names == merged.active_experts == ["public", name]
        assert torch.equal(trained(ids).logits, merged(ids).logits)


def test_final_words_show_the_table_and_load_the_model(demo, table):
    out, shown = demo
    lines = shown[shown.index("import flexolmo_hf") :]
    found = {}

    exec(lines, found)

    assert found["model"].active_experts == ["public", "math"]
    assert f"{table['public+math']['math']:.3f}" in shown
    assert f"{table['public+math']['math']:.3f}" in (out / "report.md").read_text()


def test_owners_open_no_file_of_the_other_owner_and_no_held_out_text(demo):
    out, _ = demo
    opened: dict[str, set[Path]] = {}
    for line in (out.parent / "opened").read_text().splitlines():
        process, path = line.split("\t")
        if Path(path).is_relative_to(out):
            opened.setdefault(process, set()).add(Path(path).relative_to(out))
    children = [paths for paths in opened.values() if Path("report.json") not in paths]

    for name in OWNERS:
        private = {Path("owners", name, part) for part in ("data", "start", "run", "train.yaml")}
        workers = [paths for paths in children if any(private & {path, *path.parents} for path in paths)]
        assert any(Path("owners", name, "data", "train.jsonl") in paths for paths in workers)
        assert {path.parts[:2] for paths in workers for path in paths if path.parts[0] != "public_model"} == {
            ("owners", name)
        }


def test_folder_that_holds_something_is_refused_before_anything_is_done(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("precious")
    monkeypatch.setattr("flexolmo_hf.demo.pipeline.fetch_wheels", lambda _: pytest.fail("something was done"))

    with pytest.raises(OutputFolderNotEmptyError):
        run_demo(tmp_path, quick=True)

    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
