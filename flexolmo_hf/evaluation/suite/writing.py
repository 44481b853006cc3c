"""NewsG and PoemG: how well a model continues a text from its opening, as a judge rates it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from math import sqrt
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import torch
from lm_eval.api.instance import Instance
from transformers import PreTrainedTokenizerBase

from flexolmo_hf._rows import stream_texts
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.suite.judge import Judge, JudgeSettings, judge_settings
from flexolmo_hf.evaluation.suite.language_model import FlexOlmoLM
from flexolmo_hf.evaluation.suite.results import HARNESS, TaskResult


def read_openings(
    place: str, kind: str, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> tuple[list[str], int]:
    """Read how documents begin.

    Args:
        place: A ``.jsonl``, ``.parquet`` or ``.txt`` file of documents, or a folder of them.
        kind: "news" or "poem"; it says how much of a document is its opening.
        tokenizer: Counts the tokens of an opening.
        limit: Documents read at most.

    Returns:
        The openings, and how many documents were too short to have one and something after it.

    Raises:
        ConfigurationError: If no document is long enough.
    """
    length = judge_settings().opening[kind]
    with TemporaryDirectory() as cache:
        found = [_opening(text, length, tokenizer) for text in islice(stream_texts([place], cache), limit)]
    openings = [opening for opening in found if opening]
    if not openings:
        raise ConfigurationError(
            f"Of {len(found)} documents for {kind!r}, none is long enough to be continued.", "Give longer documents."
        )
    return openings, len(found) - len(openings)


def _opening(text: str, length: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> str:
    if "lines" in length:
        lines = [line for line in text.splitlines() if line.strip()]
        return "\n".join(lines[: length["lines"]]) + "\n" if len(lines) > length["lines"] else ""
    ids = tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    # The last token may be a part of a character only.
    return tokenizer.decode(ids[: length["tokens"]]).rstrip("\ufffd") if len(ids) > length["tokens"] else ""


def continue_openings(
    model: FlexOlmoLM, openings: Sequence[str], settings: JudgeSettings, *, seed: int = 0
) -> list[list[str]]:
    """Let the model continue each opening several times, all of them in the batches of its class.

    Raises:
        ConfigurationError: If the model has no room for a word after an opening.
    """
    longest = max(len(model.tok_encode(opening)) for opening in openings)
    room = min(settings.new_tokens, model.max_length - longest)
    if room < 1:
        raise ConfigurationError(
            f"The longest opening has {longest} tokens, the model reads {model.max_length}.", "Give shorter lines."
        )
    drawn = {"until": [], "do_sample": True, "temperature": settings.temperature, "max_gen_toks": room}
    requests = [
        Instance("generate_until", {}, (opening, drawn), 0, ("writing", number, settings.samples))
        for number, opening in enumerate(openings)
        for _ in range(settings.samples)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = model.generate_until(requests, disable_tqdm=True)
    return [texts[i : i + settings.samples] for i in range(0, len(texts), settings.samples)]


def rate(
    judge: Judge, kind: str, openings: Sequence[str], continuations: Sequence[Sequence[str]], *, batch_size: int = 8
) -> list[list[int | None]]:
    """Let the judge rate each continuation; None for an answer that is no rating."""
    settings = judge_settings()
    pairs = list(zip(openings, continuations, strict=True))
    prompts = [settings.ask(kind, opening, text) for opening, texts in pairs for text in texts]
    ratings = iter([settings.read(answer) for answer in judge.answers(prompts, batch_size=batch_size)])
    return [[next(ratings) for _ in texts] for texts in continuations]


def run_writing(
    model: FlexOlmoLM, judge: Judge, task: str, kind: str, place: str, *, limit: int | None = None, seed: int = 0
) -> TaskResult:
    """Measure one task with the experts in force.

    Args:
        model: The model that writes.
        judge: The model that rates.
        task: Its name in the table.
        kind: "news" or "poem".
        place: The documents to take openings from.
        limit: Documents read at most.
        seed: Decides the continuations.

    Returns:
        The mean over documents of their continuations' mean rating, as a share of the best one.
    """
    settings = judge_settings()
    openings, short = read_openings(place, kind, model.tokenizer, limit=limit)
    continuations = continue_openings(model, openings, settings, seed=seed)
    ratings = rate(judge, kind, openings, continuations)
    result = summarise(ratings, settings, task)
    return replace(result, details={**result.details, "too_short": short, "judge": judge.name})


def summarise(ratings: Sequence[Sequence[int | None]], settings: JudgeSettings, task: str) -> TaskResult:
    """Make one figure of ratings. What the judge did not rate is counted as failed and is no part of the figure."""
    span = settings.highest - settings.lowest
    given = [[rating for rating in row if rating is not None] for row in ratings]
    means = [(fmean(row) - settings.lowest) / span for row in given if row]
    count = sum(len(row) for row in given)
    return TaskResult(
        task=task,
        variant=HARNESS,
        metric="judge",
        value=fmean(means) if means else None,
        stderr=stdev(means) / sqrt(len(means)) if len(means) > 1 else None,
        count=count,
        failed=sum(len(row) for row in ratings) - count,
        details={"documents": len(ratings), "rated_documents": len(means), "samples": settings.samples},
    )
