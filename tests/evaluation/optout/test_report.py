"""The report shows what was measured, in three forms, and no more."""

import io
import json

import pytest
from rich.console import Console

from flexolmo_hf.errors import OutputFolderNotEmptyError
from flexolmo_hf.evaluation.optout import ALL, Contract, Terms
from flexolmo_hf.evaluation.optout.report import as_dict, markdown, save, table
from tests.evaluation.optout.made import made


def printed(matrix):
    console = Console(file=io.StringIO(), width=160)
    console.print(table(matrix))
    return console.file.getvalue()


def test_the_table_shows_bits_first_and_then_changes_and_which_may_be_none():
    lines = printed(made(spread=2)).splitlines()
    (first,) = [line for line in lines if ALL in line]
    (row,) = [line for line in lines if "without math" in line]

    assert first.count("2.000") == 3
    assert row.index("(-0.2)") < row.index(" +12.0") < row.index("(+0.4)")


def test_a_table_of_eight_domains_fits_a_terminal_of_a_hundred_columns_whole():
    names = ["public", "news", "forum", "code", "academic", "howto", "creative", "math"]
    rows = {label: dict.fromkeys(names, 0 if label == ALL else -12.5) for label in made().sets}
    console = Console(file=io.StringIO(), width=100)
    console.print(table(made(rows)))

    shown = console.file.getvalue()
    assert "…" not in shown
    assert shown.count("-12.5") == 3 * 8
    assert all(name in shown for name in [*names, *rows])


def test_markdown_has_every_row_and_marks_own_data():
    page = markdown(made())
    rows = [line for line in page.splitlines() if line.startswith("| ")]

    assert [row.split(" |")[0] for row in rows] == [
        "| experts",
        "| all experts",
        "| without public",
        "| without math",
        "| without code",
    ]
    assert "**+12.0 % (+12.0 to +12.0)**" in rows[3]
    assert page.count("**") == 6
    assert "Documents: public 10, math 10, code 10. Windows of 64 tokens." in page


def test_json_has_the_figures_the_fingerprints_and_the_contract():
    matrix = made(spread=2)
    clauses = Contract(each=Terms(own_loses=20)).check(matrix)
    found = json.loads(json.dumps(as_dict(matrix, clauses)))

    math = found["sets"]["without math"]
    assert (math["experts"], math["fingerprint"]) == (["public", "code"], "key of without math")
    change = matrix.change("without math", "math")
    assert math["data"]["math"] == {
        "bits_per_byte": matrix.bits("without math", "math"),
        "interval": vars(matrix.interval("without math", "math")),
        "change": change.value,
        "change_interval": vars(change.interval),
        "own": True,
    }
    assert found["data"]["math"] == {"documents": 10, "bytes": 1000, "tokens": 300}
    assert [(c["data"], c["limit"], c["verdict"]) for c in found["contract"]] == [
        ("math", 20, "broken"),
        ("code", 20, "broken"),
    ]


def test_a_report_is_a_new_folder_of_three_files(tmp_path):
    save(made(), tmp_path / "report")

    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [
        "opt_out.json",
        "opt_out.md",
        "opt_out.png",
    ]
    with pytest.raises(OutputFolderNotEmptyError):
        save(made(), tmp_path / "report")


def test_json_of_a_broken_model_is_strict_and_has_nulls(tmp_path):
    save(made({"without math": {"public": 0, "math": float("nan"), "code": 0}}), tmp_path / "report")

    def refuse(word):
        raise AssertionError(word)

    written = (tmp_path / "report" / "opt_out.json").read_text("utf-8")
    found = json.loads(written, parse_constant=refuse)["sets"]["without math"]["data"]
    assert found["math"]["bits_per_byte"] is None
    assert found["math"]["change_interval"] == {"low": None, "high": None}
    assert found["code"]["change"] == 0


def test_a_data_name_is_no_markup():
    name = "[red]|x"
    rows = {label: {name: 1} for label in made().sets}

    assert name in printed(made(rows))
    assert "| experts | [red]\\|x |" in markdown(made(rows))
