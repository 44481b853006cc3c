"""The benchmark of training compares like with like, counts what is there, and shows what it missed."""

import copy
import json

import pytest
import torch

from benchmarks.inference.checkpoints import write_checkpoint
from benchmarks.training import __main__ as program
from benchmarks.training import contestants, memory, operations
from benchmarks.training.goals import goals
from benchmarks.training.page import page
from benchmarks.training.settings import SMOKE, Settings
from benchmarks.training.speed import check_agreement
from benchmarks.training.worker import Bench
from tests.test_benchmarks import Inside, one_thread, run  # noqa: F401 (one_thread is a fixture)


class Contestant(Bench):
    """A worker in this process."""

    ask, __enter__, __exit__ = Inside.ask, Inside.__enter__, Inside.__exit__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, SMOKE.main)
    return folder


@pytest.fixture(scope="module")
def measured():
    """All figures of a smoke run, but those that need a process of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "measure", lambda *_, **__: {"medians": dict.fromkeys(memory.CONTESTANTS, 1.0)})
        patch.setattr(memory, "largest", lambda **_: {"elements": 1, "shape": [1]})
        return program.measure(SMOKE, start=Contestant)


@pytest.fixture
def met(measured):
    """Results that meet every goal, each of them barely."""
    results = copy.deepcopy(measured)
    results["speed"].update(stock=1.26, ours=1.0, trainer=1.149, products=0.701)
    results["operations"].update(planned=1.0, counted=1.019, products=1.0)
    results["memory"]["medians"].update(stock=1.0, ours=0.699)
    settings = results["settings"]
    logits = settings["batch"] * (settings["tokens"] - 1) * settings["wide"]["vocabulary"]
    results["wide"].update(elements=logits - 1)
    return results


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("freeze", [False, True], ids=["masked", "frozen"])
def test_stock_moves_what_ours_moves_and_nothing_else(folder, implementation, freeze):
    ids_BT = contestants.tokens(2, 16, SMOKE.main.vocabulary)
    model, optimizer = contestants.stock(str(folder), implementation, freeze=freeze)
    before = copy.deepcopy(model.state_dict())
    ours = contestants.ours(str(folder))
    losses = [[contestants.bare_step(*pair, ids_BT) for pair in ((model, optimizer), ours)] for _ in range(3)]

    for stock_loss, our_loss in losses:
        assert stock_loss == pytest.approx(our_loss, abs=1e-5)
    for name, tensor in model.state_dict().items():
        if contestants._mask(name, tensor) is None:
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor[0], before[name][0]), name
            assert not torch.equal(tensor[1], before[name][1]), name


def test_a_request_to_the_trainer_is_one_step(folder):
    worker = Contestant("trainer")
    worker.ask("load", folder=str(folder), batch=2, length=16)
    steps = []
    for _ in range(3):
        assert worker.ask("step") > 0
        steps.append(worker._stepped.trainer.state.global_step)
    worker.ask("close")

    assert steps == [1, 2, 3]


def test_an_error_in_training_reaches_who_asked(folder, monkeypatch):
    worker = Contestant("trainer")
    worker.ask("load", folder=str(folder), batch=2, length=16)
    monkeypatch.setattr(worker._stepped.trainer, "compute_loss", lambda *_, **__: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        worker.ask("step")


def test_different_losses_are_not_compared():
    with pytest.raises(RuntimeError, match="losses differ"):
        check_agreement({"ours": 1.0, "stock": 1.1})


def test_the_products_are_all_of_a_step_but_attentions_scores(folder):
    model, _ = contestants.ours(str(folder))
    batch, length, shape = 2, 16, SMOKE.main
    counted = operations.counted(model, contestants.tokens(batch, length, shape.vocabulary))
    alone = operations.operations(operations.products(shape, batch * length))
    # Two products forward in each layer and four backward in all but the first, 2 T H each; and the router.
    scores = batch * length * 2 * length * shape.hidden * (2 * shape.layers + 4 * (shape.layers - 1))
    router = 2 * 2 * shape.hidden * batch * length * (3 * shape.layers - 1)

    assert counted == operations.planned(shape, batch * length, length)
    assert alone == pytest.approx(counted - scores - router, rel=1e-3)


def test_the_products_are_done_in_their_shapes():
    found = operations.products(SMOKE.main, 32)
    ready = operations.Products(found)

    assert ready.run() > 0
    for (rows, width, columns, _), (left, right, out) in ready._operands.items():
        assert (left.shape, right.shape, out.shape) == ((rows, width), (width, columns), (rows, columns))


def test_the_trained_parameters_are_those_of_the_shape(folder, measured):
    model, _ = contestants.ours(str(folder))

    assert measured["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert measured["state"]["ours"]["parameters"] == measured["state"]["trainer"]["parameters"] == measured["trained"]


def test_stocks_optimizer_is_given_everything(folder, measured):
    model, _ = contestants.stock(str(folder), "eager", freeze=False)

    assert measured["state"]["stock"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_low_rank_packages_are_smaller_and_compared_on_the_same_texts(measured):
    sizes = {of["form"]: of["bytes"] for of in measured["packages"]}

    assert sizes["compressed, rank 2"] == sizes["trained, rank 2"] < sizes["compressed, rank 8"] < sizes["full"]
    assert all(of["loss"] > 0 for of in measured["packages"])


def test_all_goals_can_be_met(met):
    assert [goal.title for goal in goals(met) if not goal.met] == []
    assert "All goals are met." in page(met)


SPOILT = {
    "speed": lambda results: results["speed"].update(stock=1.24),
    "peak": lambda results: results["memory"]["medians"].update(ours=0.701),
    "moments": lambda results: results["state"]["trainer"].update(moments=results["state"]["trainer"]["moments"] + 4),
    "logits": lambda results: results["wide"].update(elements=results["wide"]["elements"] + 1),
    "count": lambda results: results["operations"].update(counted=1.03),
    "rate": lambda results: results["speed"].update(products=0.69),
    "overhead": lambda results: results["speed"].update(trainer=1.16),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_goal_that_is_missed_says_so_on_the_page(met, spoil):
    spoil(met)

    assert sum(not goal.met for goal in goals(met)) == 1
    assert f"1 of {len(goals(met))} goals are missed." in page(met)
    assert page(met).count("**no**") == 1


def test_a_run_gives_a_page_a_plot_and_its_figures(measured, tmp_path):
    program.write(measured, tmp_path)

    assert "## Smaller experts" in (tmp_path / "training.md").read_text("utf-8")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "training.json").read_text("utf-8"))["speed"] == measured["speed"]


def test_the_full_size_is_the_one_that_is_promised():
    settings = Settings()

    assert (settings.main.hidden, settings.main.inner, settings.main.layers, settings.main.experts) == (512, 1376, 8, 2)
    assert (settings.main.vocabulary, settings.batch, settings.tokens) == (8192, 4, 256)
    assert settings.wide.vocabulary == 100_352


@pytest.mark.slow
def test_the_program_runs_from_the_command_line(tmp_path):
    printed = run("-m", "benchmarks.training", "--smoke", "--output", str(tmp_path))

    assert {file.name for file in tmp_path.iterdir()} == {"training.md", "training.json", "training.png"}
    assert (tmp_path / "training.md").read_text("utf-8") in printed
