import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flexolmo_hf.demo.report import DemoReport


@pytest.fixture
def report(tmp_path):
    return DemoReport(
        output_dir=tmp_path / "private_place",
        settings={"layers": 2},
        corpus={"heldout/math.jsonl": {"documents": 3, "bytes": 300}},
        bits_per_byte={
            "public": {"public": 2.0, "math": 2.6004, "code": 2.8},
            "public+math": {"public": 2.1, "math": 2.2, "code": 2.9},
        },
        samples={"public": {"math": "Find [bold]$x$\n\nin"}, "public+math": {"math": "Find $x$: [/] 3"}},
        seconds={"merge": 1.4},
    )


def test_saved_report_holds_everything_but_the_machines_folders(report):
    report.output_dir.mkdir()
    report.save()

    found = json.loads((report.output_dir / "report.json").read_text())
    assert found["bits_per_byte"] == report.bits_per_byte
    assert set(found) == {"settings", "corpus", "bits_per_byte", "samples", "seconds"}
    for name in ("report.json", "report.md"):
        assert "private_place" not in (report.output_dir / name).read_text()


def test_markdown_table_has_a_row_per_set_and_a_column_per_domain(report):
    lines = report.markdown().splitlines()

    start = lines.index("| active experts | public | math | code |")
    assert lines[start + 1 : start + 4] == [
        "|---|---|---|---|",
        "| public | 2.000 | 2.600 | 2.800 |",
        "| public+math | 2.100 | 2.200 | 2.900 |",
    ]


def test_terminal_shows_table_samples_as_written_and_how_to_load(report):
    console = Console(file=StringIO(), width=200)

    report.show(console)

    shown = console.file.getvalue()
    assert "2.600" in shown and "2.900" in shown
    assert "Find [bold]$x$ in" in shown and "Find $x$: [/] 3" in shown
    assert report.how_to_load in shown


def test_lines_that_load_the_model_are_python_and_name_the_merged_model(report):
    compile(report.how_to_load, "report", "exec")
    assert f'"{report.output_dir.as_posix()}/merged"' in report.how_to_load
    assert report.how_to_load.count("\n") == 2


def test_folder_that_needs_quoting_is_quoted(report):
    object.__setattr__(report, "output_dir", Path('a "quoted" folder'))

    compile(report.how_to_load, "report", "exec")
