"""Put expert packages side by side with their public model.

Run: python examples/merge_experts.py DENSE MERGED math=MATH_PACKAGE code=CODE_PACKAGE
"""

import sys

from flexolmo_hf import inspect_checkpoint, merge_experts


def main(anchor: str, merged: str, *packages: str) -> None:
    """Merge and list the experts of the result."""
    merge_experts(anchor, dict(package.split("=", 1) for package in packages), merged)
    for expert in inspect_checkpoint(merged).experts:
        print(f"{expert.index} {expert.name}: {expert.parameters:,} parameters in {', '.join(expert.files)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
