"""Merging is whole or not there: errors, full disks and killed processes leave nothing, and memory stays small."""

import ctypes
import errno
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flexolmo_hf import FlexOlmoForCausalLM, inspect_checkpoint, merge_experts
from flexolmo_hf import _folder as folders
from flexolmo_hf.composition import merge
from flexolmo_hf.errors import NoSpaceError
from flexolmo_hf.modeling.files import layout
from tests.composition.conftest import FULL, disk_with, pack, tree
from tests.conftest import dense_model

ROOT = Path(__file__).parents[2]


def fail_at_the_third_file(error):
    """Stand in for `save_file`: two files are written, the third is begun and then fails."""
    calls = []

    def write(tensors, path, **kwargs):
        calls.append(path)
        if len(calls) < 3:
            return save_file(tensors, path, **kwargs)
        Path(path).write_bytes(b"the beginning of")
        raise error

    return write


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
def test_an_error_while_writing_leaves_nothing(two_owners, tmp_path, monkeypatch, error):
    monkeypatch.setattr(layout, "save_file", fail_at_the_third_file(error))
    before = tree(tmp_path)

    with pytest.raises(type(error)):
        merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "merged")
    assert tree(tmp_path) == before


def test_an_error_after_the_weights_leaves_nothing(two_owners, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(merge, "write_model_card", fail)
    before = tree(tmp_path)

    with pytest.raises(RuntimeError, match="boom"):
        merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "merged")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, FULL), SafetensorError(f"I/O error: {FULL} (os error {errno.ENOSPC})")],
    ids=["as the system says it", "as safetensors says it"],
)
def test_a_disk_that_fills_up_is_named_and_leaves_nothing(two_owners, tmp_path, monkeypatch, refused, error):
    monkeypatch.setattr(layout, "save_file", fail_at_the_third_file(error))

    with refused(NoSpaceError, "needed", "free on the output disk"):
        merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "merged")


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(two_owners, tmp_path, monkeypatch, refused):
    merged = merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "merged")
    needed = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    monkeypatch.setattr(layout, "save_file", None)
    monkeypatch.setattr(folders.shutil, "disk_usage", disk_with(free=needed // 2))

    with refused(NoSpaceError, "MB are free"):
        merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "again")


KILLED = """
import os, signal, sys
from flexolmo_hf import merge_experts
from flexolmo_hf.modeling.files import layout

anchor, package, output = sys.argv[1:]
write = layout.save_file

def write_and_die(tensors, path, **kwargs):
    write(tensors, path, **kwargs)
    if "expert-public" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

layout.save_file = write_and_die
merge_experts(anchor, {"math": package}, output)
"""


def test_a_killed_merge_leaves_nothing_under_the_final_name_and_can_be_repeated(one_owner, tmp_path):
    arguments = [one_owner.anchor, one_owner.packages["math"], tmp_path / "merged"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )

    assert killed.returncode == -signal.SIGKILL
    assert any(".partial" in str(path) for path in tree(tmp_path)), "it was not killed in the middle"
    assert not (tmp_path / "merged").exists()
    merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")
    assert [expert.name for expert in inspect_checkpoint(tmp_path / "merged").experts] == ["public", "math"]


class AnonymousMemory:
    """The most memory of this process, beyond what mapped files take, that was seen during a block."""

    def __enter__(self):
        self.before = self.peak = self._now()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *exception):
        self._done.set()
        self._watcher.join()

    @property
    def growth(self):
        return self.peak - self.before

    def _watch(self):
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.fixture
def one_thread():
    """Spare the many small operations the wait for a second core that others may be using."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs /proc and malloc_trim")
def test_merging_needs_the_memory_of_a_few_tensors_and_not_of_the_model(tmp_path):
    dense = dense_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    dense.save_pretrained(tmp_path / "anchor")
    for name in ("math", "code"):
        pack(FlexOlmoForCausalLM.from_dense(dense, expert=name), name, tmp_path / name)
    del dense
    # What the models above have left free would hide what merging takes.
    ctypes.CDLL(None).malloc_trim(0)
    with AnonymousMemory() as memory:
        merge_experts(tmp_path / "anchor", {name: tmp_path / name for name in ("math", "code")}, tmp_path / "merged")

    model = sum(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors"))
    assert model > 80e6
    assert memory.growth < model / 5
