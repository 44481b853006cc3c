"""`flexolmo optout` measures what the function measures, and ends with 1 if a contract is broken."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.cli import app
from flexolmo_hf.evaluation.optout import ALL, opt_out_matrix
from tests.conftest import byte_tokenizer, dense_model
from tests.evaluation.optout.models import TEXTS, specialist

SIZES = ("--max-length", "24", "--batch-size", "3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint whose math expert helps with numbers, and each data set as a file."""
    place = tmp_path_factory.mktemp("optout")
    torch.manual_seed(0)
    specialist("math").save_pretrained(place / "MODEL")
    byte_tokenizer().save_pretrained(place / "MODEL")
    for name, texts in TEXTS.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in ["", *texts])
        (place / f"{name}.jsonl").write_text(lines)
    return place


@pytest.fixture
def place(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in checkpoint.iterdir():
        (tmp_path / source.name).symlink_to(source)
    return tmp_path


def run(*arguments, names=tuple(TEXTS)):
    data = [part for name in names for part in ("--data", f"{name}={name}.jsonl")]
    return CliRunner().invoke(app, ["optout", "MODEL", *data, *SIZES, *arguments], env={"COLUMNS": "200"})


def test_the_command_reports_what_the_function_measures(place):
    result = run("--set", "public+math", "--out", "report")
    assert result.exit_code == 0, result.output
    found = json.loads((place / "report" / "opt_out.json").read_text())
    model = FlexOlmoForCausalLM.from_pretrained("MODEL")
    expected = opt_out_matrix(model, byte_tokenizer(), TEXTS, subsets=["public+math"], max_length=24, batch_size=3)

    assert list(found["sets"]) == list(expected.sets)
    assert [of_set["fingerprint"] for of_set in found["sets"].values()] == list(expected.keys.values())
    for label, of_set in found["sets"].items():
        assert {name: cell["bits_per_byte"] for name, cell in of_set["data"].items()} == {
            name: expected.bits(label, name) for name in TEXTS
        }
    assert all(row in result.stdout for row in expected.sets)


def test_without_a_length_the_report_says_how_many_tokens_the_windows_had(place):
    arguments = ["optout", "MODEL", "--data", "math=math.jsonl", "--output", "report"]
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    assert json.loads((place / "report" / "opt_out.json").read_text())["max_length"] == 128
    assert "Windows of 128 tokens." in (place / "report" / "opt_out.md").read_text()


def test_the_field_and_the_dtype_are_those_that_are_asked_for(place):
    (place / "said.jsonl").write_text("".join(json.dumps({"said": text}) + "\n" for text in TEXTS["math"]))
    result = run("--data", "math=said.jsonl", "--field", "said", "--dtype", "bfloat16", "--out", "report", names=())
    assert result.exit_code == 0, result.output
    found = json.loads((place / "report" / "opt_out.json").read_text())["sets"][ALL]["data"]["math"]["bits_per_byte"]
    model = FlexOlmoForCausalLM.from_pretrained("MODEL", dtype=torch.bfloat16)
    matrix = opt_out_matrix(model, byte_tokenizer(), {"math": TEXTS["math"]}, max_length=24, batch_size=3)

    assert found == matrix.bits(ALL, "math")


def test_a_contract_written_from_the_measurement_is_kept_and_a_stricter_one_fails_the_build(place):
    assert run("--write-contract", "contract.yaml").exit_code == 0
    kept = run("--contract", "contract.yaml")
    assert kept.exit_code == 0, kept.output
    assert "Contract: 15 of 15 clauses kept." in kept.stdout

    said = yaml.safe_load((place / "contract.yaml").read_text())
    said["experts"]["math"]["own_loses"] = 1000.0
    (place / "strict.yaml").write_text(yaml.safe_dump(said))
    broken = run("--contract", "strict.yaml", "--out", "report")

    assert broken.exit_code == 1
    (line,) = [line for line in broken.stdout.splitlines() if line.startswith("broken: ")]
    assert line.startswith("broken: math changes by +")
    assert line.endswith("agreed: worse by at least 1000 %")
    # What has been measured is there to be looked at.
    assert "broken: math" in (place / "report" / "opt_out.md").read_text()


def test_sets_that_a_contract_speaks_of_are_measured(place):
    (place / "contract.yaml").write_text("bits_per_byte: {public+math: {math: 100}, without code: {math: 100}}")
    result = run("--contract", "contract.yaml")

    assert result.exit_code == 0, result.output
    assert "public+math" in result.stdout
    assert "2 of 2 clauses kept" in result.stdout


def test_only_the_experts_that_are_asked_for_take_part(place):
    result = run("--active-experts", "public,math+code", "--output", "report", "--limit", "2")
    found = json.loads((place / "report" / "opt_out.json").read_text())

    assert result.exit_code == 0, result.output
    assert found["sets"][ALL]["experts"] == ["public", "math", "code"]
    assert found["data"]["math"]["documents"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--write-contract", "public.jsonl"], "there already"),
        (["--out", "MODEL"], "link"),
        (["--contract", "none.yaml"], "no contract"),
        (["--data", "news"], "has no '='"),
        (["--data", "news=none.jsonl"], "'none.jsonl'"),
        (["--set", "maht"], "Did you mean 'math'"),
        (["--limit", "0"], "limit is 0"),
        (["--data", "news="], "has nothing behind '='"),
        (["--data", "=public.jsonl"], "has the name ''"),
        (["--data", "math=public.jsonl"], "'math' appears twice"),
        (["--data", "news=empty.jsonl"], "nothing to score in ['news']"),
        (["--write-contract", "new.yaml", "--margin", "-3"], "margin is -3"),
        (["--dtype", "int8"], "'int8'"),
        (["--device", "nowhere"], "'nowhere'"),
        (["--experts", "public,maht"], "Did you mean 'math'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_done_ends_in_one_sentence(place, arguments, says):
    (place / "empty.jsonl").write_text("")
    result = run(*arguments)

    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stdout == ""


def test_a_contract_that_does_not_fit_is_refused_before_anything_is_measured(place, monkeypatch):
    (place / "contract.yaml").write_text("each: {own_loses: 1}")
    monkeypatch.setattr("flexolmo_hf.evaluation.optout.files.opt_out_matrix", None)
    result = run("--contract", "contract.yaml")

    assert result.exit_code == 2
    assert "data 'code'" in result.stderr


def test_a_dense_model_is_refused_with_a_contract_too(place):
    dense_model(vocab_size=len(byte_tokenizer())).save_pretrained(place / "DENSE")
    (place / "contract.yaml").write_text("each: {own_loses: 1}")
    arguments = ["optout", "DENSE", "--data", "math=math.jsonl", "--contract", "contract.yaml"]
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 2
    assert "'olmo2'" in result.stderr


def test_neither_text_nor_path_is_in_what_is_shown_or_written(place):
    result = run("--out", "report")
    written = result.output + "".join((place / "report" / f"opt_out.{kind}").read_text() for kind in ("md", "json"))
    written += (place / "report" / "opt_out.png").read_bytes().decode("latin-1")

    assert [text for texts in TEXTS.values() for text in texts if len(text) > 6 and text in written] == []
    assert str(place) not in written
    assert "jsonl" not in written
