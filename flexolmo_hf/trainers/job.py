"""A training run described by a file, as the command line takes it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import disable_progress_bars
from transformers import AutoTokenizer, HfArgumentParser

from flexolmo_hf._rows import read_rows
from flexolmo_hf.errors import ConfigurationError, UnknownArgumentError
from flexolmo_hf.trainers.config import ExpertSFTConfig
from flexolmo_hf.trainers.data_copies import folder_of_copies
from flexolmo_hf.trainers.expert import ExpertSFTTrainer
from flexolmo_hf.trainers.part import load_to_train


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
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path.name!r} is not YAML.", "Write one `key: value` per line.") from error
    needed = ("model_path", "data", "expert", "output_dir")
    if not isinstance(settings, dict) or any(key not in settings for key in needed):
        raise ConfigurationError(f"{path.name!r} is no training job.", f"It needs {', '.join(needed)}.")
    known = {field.name for kind in (TrainingInputs, ExpertSFTConfig) for field in fields(kind)}
    if unknown := sorted(set(settings) - known):
        raise UnknownArgumentError(unknown, sorted(known))
    numbers = {name: _number(name, value) for name, value in settings.items() if name in _NUMBERS}
    return HfArgumentParser([TrainingInputs, ExpertSFTConfig]).parse_dict({**settings, **numbers})


_NUMBERS = {
    field.name: field.type for field in fields(ExpertSFTConfig) if field.type in (float, int, float | None, int | None)
}


def _number(name: str, value: Any) -> Any:
    """Read a number as people write it: YAML takes ``1e-3``, which has no point, for a text."""
    kind = float if _NUMBERS[name] in (float, float | None) else int
    if value is None or isinstance(value, (int, float)):
        return value
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{name} is {value!r}.", "It is a number.") from error


def run_job(inputs: TrainingInputs, args: ExpertSFTConfig) -> Path:
    """Train an expert and leave the model, its tokenizer and the training record in ``args.output_dir``.

    Copies of the data that the readers need lie in a temporary folder inside the output folder, which is removed at the
    end, also when SIGTERM ends the run: no text goes to a shared cache. A process that is killed outright leaves them;
    the next run into the same output folder removes them.

    Raises:
        FlexOlmoError: The kind that fits, if the model, the data or the settings are refused.
    """
    output = Path(args.output_dir)
    if args.disable_tqdm:
        disable_progress_bars()
    model = load_to_train(inputs.model_path, args)
    # Before the data are read, which may take long.
    model.expert_position(args.expert)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_path)
    output.mkdir(parents=True, exist_ok=True)
    with _removed_if_left_empty(output), folder_of_copies(output, args) as cache:
        # One process of a machine copies; the others find its copies there.
        with args.main_process_first():
            train_dataset = read_rows(inputs.data, str(cache))
            eval_dataset = read_rows(inputs.eval_data, str(cache)) if inputs.eval_data else None
        trainer = ExpertSFTTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(str(output))
    return output


@contextmanager
def _removed_if_left_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        # It is not empty, or another process of the run has removed it.
        with suppress(OSError):
            folder.rmdir()
