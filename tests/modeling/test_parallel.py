"""A model split over two processes computes what it computes in one, and opting out holds in both."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.modeling import parallel_worker
from tests.modeling.test_expert_sets import named_model
from tests.trainers.launching import launch


@pytest.fixture(scope="module", params=[4, 2], ids=["all of 4", "2 of 4"])
def split(request, tmp_path_factory):
    """What two processes computed, and what one did with the same checkpoint."""
    folder = tmp_path_factory.mktemp("split")
    torch.manual_seed(0)
    model = named_model(request.param, router_bias=True)
    model.save_pretrained(folder / "MODEL")
    launch(Path(parallel_worker.__file__), folder)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)], parallel_worker.logits_of(model)


@pytest.mark.parametrize("name", [*parallel_worker.SETS, "per row"])
def test_two_processes_compute_the_logits_of_one(split, name):
    both, one = split

    assert both[0][name].isfinite().all()
    for found in both:
        torch.testing.assert_close(found[name], one[name], atol=1e-5, rtol=0)


def test_two_processes_generate_what_one_does(split):
    both, one = split

    assert all(torch.equal(found["generated"], one["generated"]) for found in both)


def test_each_process_holds_half_of_each_expert(split):
    for found in split[0]:
        here, everywhere = found["elements"].tolist()
        assert here * 2 == everywhere


def test_what_is_switched_off_or_left_out_at_load_cannot_be_told_from_what_was_never_there(split):
    for found in split[0]:
        assert found["poisoned two"].isfinite().all()
        assert torch.equal(found["poisoned two"], found["two"])
        assert torch.equal(found["loaded two"], found["two"])


def test_the_poison_would_show(split):
    assert all(found["poisoned all"].isnan().any() for found in split[0])
