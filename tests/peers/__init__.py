"""Libraries that work on a model of named experts: adapters, quantisation, offloading."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peers.md"


def run_section(title, **known):
    """Run the Python blocks of one section of the page."""
    text = PAGE.read_text("utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), known)
    return known
