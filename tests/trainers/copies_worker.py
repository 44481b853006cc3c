"""Reads data as a job does, in each of several processes; writes down where the copies lie."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from flexolmo_hf import ExpertSFTConfig
from flexolmo_hf._rows import read_rows
from flexolmo_hf.trainers.data_copies import folder_of_copies


def main(place):
    args = ExpertSFTConfig(expert="math", output_dir=str(place / "RUN"), use_cpu=True, bf16=False, report_to="none")
    with folder_of_copies(place / "RUN", args) as folder:
        with args.main_process_first():
            rows = read_rows([str(place / "data.jsonl")], str(folder))
        read = {"rows": list(rows["text"]), "file": rows.cache_files[0]["filename"]}
        dist.barrier()
        read["copies"] = [str(file) for file in (place / "RUN").rglob("*.arrow")]
        dist.barrier()
    (place / f"rank{args.process_index}.json").write_text(json.dumps(read))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
