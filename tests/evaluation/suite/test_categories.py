"""The table: 31 tasks in 10 categories, every name finds its tasks, and the harness's groups say what it says."""

import pytest

from flexolmo_hf.errors import ConfigurationError, UnknownTaskError
from flexolmo_hf.evaluation.suite.categories import CATEGORIES, TASKS, category_of, resolve

SHOTS_OF_THEIR_OWN = ("coqa", "agieval")


def test_there_are_31_tasks_in_10_categories_and_no_name_comes_twice():
    names = [task.name for category in CATEGORIES for task in category.members]

    assert len(CATEGORIES) == 10
    assert len(names) == len(set(names)) == 31


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_a_category_with_a_number_in_its_name_has_that_many_tasks(category):
    number = category.name[-1]

    assert len(category.tasks) == (int(number) if number.isdigit() else 1)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["math2"], ["gsm8k", "math"]),
        (["math2,boolq", "gsm8k"], ["boolq", "gsm8k", "math"]),
        (["MMLU-Pro"], ["mmlu_pro"]),
        (["mmlu"], ["mmlu"]),
        (["Writing2"], ["newsg", "poemg"]),
        (["all"], list(TASKS)),
        (["mine", "piqa"], ["piqa", "mine"]),
    ],
)
def test_names_of_suites_and_tasks_find_their_tasks_once_and_in_the_order_of_the_table(names, found):
    assert resolve(names, ["mine"]) == found


def test_an_unknown_name_brings_the_closest_ones(refused):
    with refused(UnknownTaskError, "'hellaswagg'", "The closest are 'hellaswag'"):
        resolve(["mc9", "hellaswagg"])


def test_a_users_own_task_is_among_the_closest_names(refused):
    with refused(UnknownTaskError, "'colors'", "'colours'"):
        resolve(["colors"], ["colours"])


def test_no_name_at_all_is_refused(refused):
    with refused(ConfigurationError, "mc9"):
        resolve([" , "])


def test_a_task_beyond_the_table_has_a_category_of_its_own():
    assert category_of("colours") == "own"
    assert category_of("gsm8k") == "math2"


# The harness's groups.


@pytest.fixture(scope="module")
def index():
    pytest.importorskip("lm_eval")
    from flexolmo_hf.evaluation.suite.harness import task_manager

    return task_manager().task_index


def leaves(index, name):
    """List the tasks below a group or tag; a task is its own only leaf."""
    entry = index[name]
    members = entry.tags if entry.cfg is None else entry.cfg["task"] if "group" in entry.cfg else None
    if members is None:
        return [entry]
    names = [one if isinstance(one, str) else one.get("group") or one["task"] for one in members]
    return [leaf for one in names for leaf in leaves(index, one)]


HARNESS_CATEGORIES = [category for category in CATEGORIES if category.members[0].harness]
each_category = pytest.mark.parametrize("category", HARNESS_CATEGORIES, ids=lambda category: category.name)
each_task = pytest.mark.parametrize(
    "task", [task for category in HARNESS_CATEGORIES for task in category.members], ids=lambda task: task.name
)


@each_category
def test_the_group_of_a_category_has_its_tasks_with_its_shots(index, category):
    members = {one.get("task") or one["group"]: one["num_fewshot"] for one in index[category.group].cfg["task"]}

    assert members == {task.harness: task.shots for task in category.members}


@each_category
def test_the_figure_of_a_group_is_of_the_metric_of_its_tasks(index, category):
    for aggregate in index[category.group].cfg.get("aggregate_metric_list", []):
        metrics = {task.metric.removesuffix("_norm") for task in category.members}

        assert {aggregate["metric"]} == metrics
        assert aggregate.get("filter_list", "none") == category.members[0].filter


@each_task
def test_a_task_counts_the_metric_that_the_table_names_and_writes_if_the_table_says_so(index, task):
    for leaf in leaves(index, task.harness):
        metrics = [metric["metric"] for metric in leaf.cfg["metric_list"]]
        filters = [one["name"] for one in leaf.cfg.get("filter_list", [])]
        writes = leaf.cfg.get("output_type", "generate_until") == "generate_until"

        assert task.metric in metrics
        assert task.filter == "none" or task.filter in filters
        # AGIEval is multiple choice but for its part of mathematics.
        assert writes == task.generates or leaf.name == "agieval_math"
        assert leaf.cfg.get("unsafe_code", False) == task.runs_code


@each_task
def test_the_examples_in_a_prompt_can_be_drawn_from_somewhere(index, task):
    if not task.shots:
        return
    for leaf in leaves(index, task.harness):
        splits = [leaf.cfg.get(key) for key in ("fewshot_split", "training_split", "validation_split")]
        samples = (leaf.cfg.get("fewshot_config") or {}).get("samples")

        assert any(splits) or samples


@pytest.mark.parametrize("name", ["mmlu", "agieval", "bbh", "math", "mmlu_pro"])
def test_a_task_of_many_parts_has_all_of_them(index, name):
    parts = {"mmlu": 57, "agieval": 10, "bbh": 27, "math": 7, "mmlu_pro": 14}

    assert len(leaves(index, TASKS[name].harness)) == parts[name]


def test_every_function_that_the_projects_own_tasks_name_exists():
    pytest.importorskip("lm_eval")
    from lm_eval.tasks._yaml_loader import load_yaml

    from flexolmo_hf.evaluation.suite.harness import GROUPS

    loaded = [load_yaml(file, resolve_func=True) for file in sorted(GROUPS.rglob("*.yaml"))]

    scored = [one["process_results"] for one in loaded if "group" not in one]
    assert len(scored) == 13
    assert all(callable(function) for function in scored)
