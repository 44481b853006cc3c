"""A domain embedding comes back from its file as it went in, and a file that was altered is refused."""

import json

import numpy as np
import pytest
import torch

from flexolmo_hf import DomainEmbedding, load_embedding
from flexolmo_hf.errors import ConfigurationError, DamagedFileError, OutputPlaceError
from flexolmo_hf.modeling.embedded_row import RouterProjection

KINDS = pytest.mark.parametrize("file", ["math.npy", "math.safetensors"])


def embedding(*shape):
    return DomainEmbedding(torch.randn(shape or (5,)), RouterProjection(384, 3, "owner/name"), 0.5, 90, 2, 1)


def parts(made):
    return made.projection, made.scale, made.documents, made.empty, made.non_finite


@KINDS
@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_an_embedding_comes_back_as_it_was(tmp_path, file, shape):
    made = embedding(*shape)
    made.save(tmp_path / file)
    found = load_embedding(tmp_path / file)

    assert torch.equal(found.vector, made.vector)
    assert parts(found) == parts(made)


@KINDS
def test_what_is_not_known_stays_unknown(tmp_path, file):
    DomainEmbedding(torch.randn(5)).save(tmp_path / file)

    assert parts(load_embedding(tmp_path / file)) == (None, None, 0, 0, 0)


def test_numpy_reads_the_vector_and_nothing_else_lies_beside_but_the_record(tmp_path):
    made = embedding()
    made.save(tmp_path / "math.npy")

    assert np.array_equal(np.load(tmp_path / "math.npy", allow_pickle=False), made.vector.numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["math.json", "math.npy"]
    assert json.loads((tmp_path / "math.json").read_text())["projection"] == made.projection.record()


def test_an_array_of_another_program_is_a_plain_vector(tmp_path):
    np.save(tmp_path / "math.npy", np.arange(4.0))
    found = load_embedding(tmp_path / "math.npy")

    assert torch.equal(found.vector, torch.arange(4.0))
    assert found.projection is None


@KINDS
def test_nothing_is_overwritten(tmp_path, file):
    embedding().save(tmp_path / file)
    before = (tmp_path / file).read_bytes()

    with pytest.raises(OutputPlaceError, match="there already"):
        embedding().save(tmp_path / file)
    assert (tmp_path / file).read_bytes() == before


def test_a_record_that_is_there_already_is_not_overwritten(tmp_path):
    (tmp_path / "math.json").write_text("mine")

    with pytest.raises(OutputPlaceError, match=r"'math\.json'"):
        embedding().save(tmp_path / "math.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["math.json"]


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OutputPlaceError, match="'math.npy'"):
        embedding().save(tmp_path / "nowhere" / "math.npy")


@pytest.mark.parametrize("file", ["math.pt", "math", "math.pkl"])
def test_another_kind_of_file_is_refused(tmp_path, file):
    with pytest.raises(ConfigurationError, match=r"\.npy or \.safetensors"):
        embedding().save(tmp_path / file)
    with pytest.raises(ConfigurationError, match=r"\.npy or \.safetensors"):
        load_embedding(tmp_path / file)


def edit(change):
    def damage(folder):
        record = json.loads((folder / "math.json").read_text())
        change(record)
        (folder / "math.json").write_text(json.dumps(record))

    return damage


def save_array(array):
    def damage(folder):
        np.save(folder / "math.npy", array, allow_pickle=array.dtype == object)
        (folder / "math.json").unlink()

    return damage


DAMAGE = {
    "missing": lambda folder: (folder / "math.npy").unlink(),
    "truncated": lambda folder: (folder / "math.npy").write_bytes((folder / "math.npy").read_bytes()[:-3]),
    "empty": lambda folder: (folder / "math.npy").write_bytes(b""),
    "text": lambda folder: (folder / "math.npy").write_text("numbers"),
    "pickled": save_array(np.array([{"a": 1}], dtype=object)),
    "words": save_array(np.array(["a", "b"])),
    "complex": save_array(np.array([1j, 2.0])),
    "a scalar": save_array(np.array(1.0)),
    "no numbers": save_array(np.zeros(0)),
    "three dimensions": save_array(np.zeros((2, 2, 2))),
    "NaN": save_array(np.array([1.0, np.nan])),
    "another vector": lambda folder: np.save(folder / "math.npy", np.ones(5, np.float32)),
    "record no JSON": lambda folder: (folder / "math.json").write_text("{"),
    "record no UTF-8": lambda folder: (folder / "math.json").write_bytes(b"\xff\xfe{}"),
    "record a list": lambda folder: (folder / "math.json").write_text("[]"),
    "record of another format": edit(lambda record: record.update(format="other")),
    "record without counts": edit(lambda record: record.pop("documents")),
    "record with a negative seed": edit(lambda record: record["projection"].update(seed=-1)),
    "record with something else": edit(lambda record: record["projection"].update(more=1)),
    "record with a scale of zero": edit(lambda record: record.update(scale=0)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_by_its_name_alone(tmp_path, damage):
    embedding().save(tmp_path / "math.npy")
    damage(tmp_path)

    with pytest.raises(DamagedFileError, match=r"'math\.(npy|json)'") as caught:
        load_embedding(tmp_path / "math.npy")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"numbers"])
def test_a_damaged_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "math.safetensors").write_bytes(content)

    with pytest.raises(DamagedFileError):
        load_embedding(tmp_path / "math.safetensors")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "math.safetensors")
    with pytest.raises(DamagedFileError):
        load_embedding(tmp_path / "math.safetensors")
