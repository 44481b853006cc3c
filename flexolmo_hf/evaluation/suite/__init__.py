"""The suite of 31 tasks: what is asked, who runs it, and what it came to."""

from flexolmo_hf.evaluation.suite.categories import CATEGORIES, TASKS
from flexolmo_hf.evaluation.suite.results import SetResult, SuiteResult, TaskResult
from flexolmo_hf.evaluation.suite.run import run_suite
from flexolmo_hf.evaluation.suite.settings import SuiteSettings

__all__ = ["CATEGORIES", "TASKS", "SetResult", "SuiteResult", "SuiteSettings", "TaskResult", "run_suite"]
