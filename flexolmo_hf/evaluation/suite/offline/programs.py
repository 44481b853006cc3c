"""Programs out of what a model wrote: with the prompt before it and the task's own tests behind it."""

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.suite.offline.questions import OpenQuestion
from flexolmo_hf.evaluation.suite.sandbox import Outcome, run_python


def run_program(kind: str, question: OpenQuestion, text: str) -> Outcome:
    """Run what a model wrote, confined, with its tests.

    Args:
        kind: "humaneval": the text continues a function; "mbpp": it is a program of its own.
        question: Its document holds the tests.
        text: What the model wrote.

    Raises:
        ConfigurationError: If there is no such kind. SandboxError: If programs cannot be confined here.
    """
    return run_python(build_program(kind, question, text))


def build_program(kind: str, question: OpenQuestion, text: str) -> str:
    """Put prompt, text and tests together; arguments as of `run_program`."""
    doc = question.doc
    if kind == "humaneval":
        return f"{doc['prompt']}{text}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"
    if kind == "mbpp":
        return "\n".join([doc.get("test_setup_code") or "", text, *doc["test_list"]])
    raise ConfigurationError(f"There are no programs of kind {kind!r}.", "There are 'humaneval' and 'mbpp'.")
