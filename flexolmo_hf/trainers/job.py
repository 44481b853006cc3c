"""A training run described by a file, as the command line takes it."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import AutoTokenizer, HfArgumentParser

from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.trainers.config import ExpertSFTConfig
from flexolmo_hf.trainers.expert import ExpertSFTTrainer

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class TrainingInputs:
    """What an expert is trained from.

    Args:
        model_path: A FlexOlmo checkpoint that holds the expert, as `flexolmo init` makes it.
        data: Files, or folders of files: ``.jsonl``, ``.json`` or ``.parquet`` rows, or ``.txt`` documents.
        eval_data: The same, to evaluate on.
    """

    model_path: str = field(metadata={"help": "A FlexOlmo checkpoint that holds the expert."})
    data: list[str] = field(metadata={"help": "Files, or folders of files, to train on."})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "Files, or folders of files, to evaluate on."})


def read_job(path: str | Path) -> tuple[TrainingInputs, ExpertSFTConfig]:
    """Read a YAML file with the fields of `TrainingInputs` and `ExpertSFTConfig`.

    Raises:
        ConfigurationError: If the file cannot be read, a key is unknown, or a required one is missing.
        FlexOlmoError: The kind that fits, if a value is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path.name!r}.", "Give a YAML file, see `flexolmo train --help`.")
    parser = HfArgumentParser([TrainingInputs, ExpertSFTConfig])
    try:
        inputs, args = parser.parse_yaml_file(str(path))
    except (TypeError, KeyError) as error:
        raise ConfigurationError(
            f"{path.name!r} is no training job: {error}.", "It needs model_path, data and expert."
        ) from error
    except ValueError as error:
        if "not used by the" not in str(error):
            raise
        raise ConfigurationError(
            f"{path.name!r}: {error}.", "Check their spelling against `flexolmo train --help`."
        ) from error
    return inputs, args


def run_job(inputs: TrainingInputs, args: ExpertSFTConfig) -> Path:
    """Train an expert and leave the model, its tokenizer and the training record in ``args.output_dir``.

    Copies of the data that the readers need lie in a temporary folder inside the output folder, which is removed at the
    end: no text goes to a shared cache.

    Raises:
        FlexOlmoError: The kind that fits, if the model, the data or the settings are refused.
    """
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if args.disable_tqdm:
        disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_path)
    with tempfile.TemporaryDirectory(prefix=".data-", dir=output) as cache:
        trainer = ExpertSFTTrainer(
            model=inputs.model_path,
            args=args,
            train_dataset=read_rows(inputs.data, cache),
            eval_dataset=read_rows(inputs.eval_data, cache) if inputs.eval_data else None,
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(str(output))
    return output


def read_rows(places: list[str], cache: str) -> Dataset:
    """Read rows from files, or from all readable files of folders.

    Raises:
        ConfigurationError: If a place does not exist, holds nothing readable, or kinds are mixed.
        DamagedFileError: If the rows cannot be parsed.
    """
    files = [file for place in places for file in _files_of(Path(place))]
    kinds = {_READERS[file.suffix] for file in files}
    if len(kinds) != 1:
        raise ConfigurationError(
            f"The data are {len(files)} readable files of {len(kinds)} kinds.",
            f"Give files of one kind: {', '.join(_READERS)}.",
        )
    (kind,) = kinds
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    names = [str(file) for file in files]
    try:
        return load_dataset(kind, data_files=names, split="train", cache_dir=cache, **options)
    except Exception as error:
        # The reader's own message quotes the text it stumbled over.
        raise DamagedFileError(", ".join(file.name for file in files[:3]), f"its rows are not {kind}") from error


def _files_of(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix in _READERS)
    if not place.is_file():
        raise ConfigurationError(f"There is no data at {place.name!r}.", "Give files or folders that exist.")
    if place.suffix not in _READERS:
        raise ConfigurationError(f"{place.name!r} is of no known kind.", f"Give {', '.join(_READERS)}.")
    return [place]
