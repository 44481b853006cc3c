"""What the demo found, as data, as Markdown and on the terminal."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flexolmo_hf.demo.settings import DOMAINS


@dataclass(frozen=True)
class DemoReport:
    """The result of one run.

    Attributes:
        output_dir: Where every artefact lies.
        settings: The sizes used, by name.
        corpus: Documents and bytes, by file.
        bits_per_byte: Held-out bits per byte, by set of experts ("public+math") and domain. Lower is better.
        samples: What each set writes after a prompt from each domain.
        seconds: How long each stage took.
    """

    output_dir: Path
    settings: dict[str, int | float]
    corpus: dict[str, dict[str, int]]
    bits_per_byte: dict[str, dict[str, float]]
    samples: dict[str, dict[str, str]]
    seconds: dict[str, float]

    @property
    def how_to_load(self) -> str:
        """The lines of Python that load the result."""
        merged = json.dumps((self.output_dir / "merged").as_posix(), ensure_ascii=False)
        return (
            "import flexolmo_hf\n"
            "from transformers import AutoModelForCausalLM\n"
            f'model = AutoModelForCausalLM.from_pretrained({merged}, active_experts=["public", "math"])'
        )

    def save(self) -> None:
        """Write ``report.json`` and ``report.md`` into the output folder."""
        # A report that is passed on says nothing about the machine it was made on.
        found = {key: value for key, value in asdict(self).items() if key != "output_dir"}
        (self.output_dir / "report.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf8")
        (self.output_dir / "report.md").write_text(self.markdown(), encoding="utf8")

    def markdown(self) -> str:
        """Write the report as a Markdown page."""
        rows = [
            f"| {name} | " + " | ".join(f"{row[domain]:.3f}" for domain in DOMAINS) + " |"
            for name, row in self.bits_per_byte.items()
        ]
        samples = [
            f"### {name}, prompt from {domain}\n\n```text\n{text}\n```\n"
            for name, texts in self.samples.items()
            for domain, text in texts.items()
        ]
        return "\n".join(
            [
                "# Demo: held-out bits per byte by set of experts",
                "",
                "Lower is better. Each row is the merged model loaded with the experts named.",
                "",
                "| active experts | " + " | ".join(DOMAINS) + " |",
                "|---" * (len(DOMAINS) + 1) + "|",
                *rows,
                "",
                "## Samples",
                "",
                *samples,
                "## Time",
                "",
                *(f"- {stage}: {seconds:.0f} s" for stage, seconds in self.seconds.items()),
                "",
            ]
        )

    def show(self, console: Console) -> None:
        """Print the table, what each set of experts writes, and how to load the model."""
        table = Table("active experts", title="Held-out bits per byte (lower is better)", title_justify="left")
        for domain in DOMAINS:
            table.add_column(domain, justify="right")
        for name, row in self.bits_per_byte.items():
            table.add_row(name, *(f"{row[domain]:.3f}" for domain in DOMAINS))
        console.print(table)
        for name, texts in self.samples.items():
            console.print(f"\n{name} writes:", style="bold")
            for text in texts.values():
                # Generated text may look like markup.
                console.print(
                    "  " + " ".join(text.split()), markup=False, highlight=False, no_wrap=True, overflow="ellipsis"
                )
        console.print(
            "\nEverything is in the output folder; report.md has it all. To load the model:\n", highlight=False
        )
        console.print(self.how_to_load, markup=False, soft_wrap=True)
