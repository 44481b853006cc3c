"""What the documents show is what runs: their commands and code blocks, and the examples, are executed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from datasets import Dataset

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM, merge_experts
from flexolmo_hf.cli import app
from flexolmo_hf.evaluation.data.packages import cache_folder
from tests.composition.conftest import move_expert
from tests.conftest import dense_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*/*.md") if "benchmarks" not in str(p)),
]


def blocks(page, language):
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, tokenizer, monkeypatch):
    """A folder in which everything the documents speak of exists under the name they use."""
    dense = dense_model(vocab_size=len(tokenizer))
    for name in ("DENSE", "a/dense-olmo2-model"):
        dense.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, folder in {"code": "OTHER", "math": "PACKAGE_OF_MATH"}.items():
        model = move_expert(FlexOlmoForCausalLM.from_dense(dense, expert=name), name)
        ExpertPackage.from_model(model, name).save_pretrained(tmp_path / folder)
    packages = {"math": tmp_path / "PACKAGE_OF_MATH", "code": tmp_path / "OTHER"}
    merge_experts(tmp_path / "DENSE", packages, tmp_path / "path" / "or" / "repo")
    (tmp_path / "my_texts.jsonl").write_text("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(8)))
    yaml = blocks("README.md", "yaml")[0].replace("max_steps: 1000", "max_steps: 2")
    (tmp_path / "math.yaml").write_text(yaml + "use_cpu: true\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, cwd):
    # The data packages of `make data` lie in the repository's cache unless the environment says otherwise.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLEXOLMO_CACHE": str(ROOT / cache_folder())}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flexolmo(line, cwd):
    """Run a `flexolmo` command line as the documents write it."""
    words = shlex.split(line, comments=True)
    assert words[0] == "flexolmo"
    return run([sys.executable, "-m", "flexolmo_hf.cli", *words[1:]], cwd)


def commands(page, *languages):
    """Return a page's command lines. Of pages in docs, those in ``bash`` blocks need more than tests have."""
    shown = [block for language in languages or ("sh", "bash") for block in blocks(page, language)]
    return [line for block in shown for line in block.splitlines() if line.startswith("flexolmo ")]


MEASURING = ("data", "eval", "optout", "routing")


def test_the_commands_of_the_readme_make_a_merged_model_in_the_order_shown(workplace):
    making = [line for line in commands("README.md") if line.split()[1] not in MEASURING]
    outputs = {line.split()[1]: flexolmo(line, workplace) for line in making}

    assert list(outputs) == ["init", "train", "pack", "merge", "inspect", "export"]
    assert re.search(r"math .* 1 ", outputs["inspect"])
    assert re.search(r"code .* 2 ", outputs["inspect"])


def test_the_commands_of_the_readme_measure_the_merged_model(workplace):
    pytest.importorskip("matplotlib")
    pytest.importorskip("lm_eval")
    merge_experts("DENSE", {"math": "PACKAGE_OF_MATH", "code": "OTHER"}, "MERGED")
    measuring = [line for line in commands("README.md") if line.split()[1] in MEASURING]
    outputs = {line.split()[1]: flexolmo(line, workplace) for line in measuring}

    assert tuple(outputs) == MEASURING
    assert "arc_easy" in outputs["eval"]
    assert "without code" in outputs["optout"]
    for written in ("CORPUS/corpus.json", "SCORES/results.md", "OPT_OUT/opt_out.png", "SHARES/heat_maps.png"):
        assert (workplace / written).is_file(), written


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "sh")])
def test_the_commands_of_a_page_run_in_the_order_shown(workplace, page):
    merge_experts("DENSE", {"math": "PACKAGE_OF_MATH"}, "MERGED")

    for line in commands(page, "sh"):
        flexolmo(line, workplace)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_is_spelled_as_the_command_line_reads_it(page):
    for line in commands(page):
        command, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        # Parsed and not run; an option that is unknown or missing ends the test with its name.
        command.make_context(command.name, words)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(workplace, tokenizer, page):
    # What the commands of the README would have made.
    FlexOlmoForCausalLM.from_dense("DENSE", expert="math").save_pretrained("RUN")
    merge_experts("DENSE", {"math": "PACKAGE_OF_MATH"}, "MERGED")
    known = {
        "dataset": Dataset.from_list([{"text": f"line {n}"} for n in range(8)]),
        "tokenizer": tokenizer,
        "input_ids": tokenizer("a", return_tensors="pt").input_ids,
    }
    found = blocks(page, "python")
    for block in found:
        exec(compile(block, page, "exec"), known)

    assert found


def test_the_examples_run_one_after_the_other(workplace):
    def example(name, *arguments):
        return run([sys.executable, str(ROOT / "examples" / name), *arguments], workplace)

    example("train_expert.py", "DENSE", "my_texts.jsonl", "MATH", "math", "2")
    # The other expert was made without biases; both kinds merge.
    listed = example("merge_experts.py", "DENSE", "BOTH", "math=MATH", "code=OTHER")
    printed = example("choose_experts.py", "BOTH", "one", "public", "public+math")

    shared = example("rights_per_row.py", "BOTH", "public:one", "public+math:two three")

    assert re.search(r"^\[public\] one.*\(public 100%\)$", shared, re.MULTILINE | re.DOTALL)
    assert re.search(r"^\[public\+math\] two three.*\(public \d+%, math \d+%\)$", shared, re.MULTILINE | re.DOTALL)
    assert "1 math:" in listed
    assert "[public+math] one" in printed


def test_every_page_that_is_linked_exists():
    for page in ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text("utf-8")):
            assert ((ROOT / page).parent / target).exists(), (page, target)
