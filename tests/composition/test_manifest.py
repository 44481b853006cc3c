"""The manifest: read back as it was written, and refused when it was altered."""

import pytest

from flexolmo_hf.composition.fingerprint import AnchorFingerprint
from flexolmo_hf.composition.manifest import MANIFEST_FILE, Manifest
from flexolmo_hf.errors import InvalidExpertNameError, NotAPackageError
from tests.composition.conftest import edit_json

MANIFEST = Manifest(
    name="math",
    anchor=AnchorFingerprint(
        {"hidden_size": 64, "rope_parameters": {"rope_theta": 10000.0}}, {"lm_head.weight": "abc"}
    ),
    tensors={"layers.0.router.row": [[64], "float32"]},
    sha256="0" * 64,
    router_bias=True,
    owner="Änne & Söhne",
    license="apache-2.0",
    training={"steps": 2, "learning rate": 9e-4},
    evaluation={"bits per byte": 1.25},
)


@pytest.fixture
def folder(tmp_path):
    MANIFEST.write(tmp_path)
    return tmp_path


def test_a_manifest_is_read_back_as_it_was_written(folder):
    assert Manifest.read(folder) == MANIFEST


def test_writing_is_reproducible(folder, tmp_path):
    before = (folder / MANIFEST_FILE).read_bytes()
    Manifest.read(folder).write(tmp_path)

    assert (folder / MANIFEST_FILE).read_bytes() == before


def test_a_missing_manifest_is_named(tmp_path, refused):
    with refused(NotAPackageError, repr(tmp_path.name), "there is no manifest.json"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": }', b"\xff\xfe\x00", b"\x80\x04."], ids=repr)
def test_what_is_not_json_is_refused(folder, refused, content):
    (folder / MANIFEST_FILE).write_bytes(content)

    with refused(NotAPackageError, "is not JSON"):
        Manifest.read(folder)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"format": "something-else", "version": 1}'])
def test_what_does_not_describe_an_expert_is_refused(folder, refused, content):
    (folder / MANIFEST_FILE).write_text(content)

    with refused(NotAPackageError, "does not describe an expert"):
        Manifest.read(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused_and_both_are_named(folder, refused, version):
    edit_json(folder / MANIFEST_FILE, lambda manifest: manifest.update(version=version))

    with refused(NotAPackageError, f"version {version}", "reads version 1"):
        Manifest.read(folder)


@pytest.mark.parametrize("key", ["name", "anchor", "tensors", "sha256"])
def test_a_missing_entry_is_refused(folder, refused, key):
    edit_json(folder / MANIFEST_FILE, lambda manifest: manifest.pop(key))

    with refused(NotAPackageError, "incomplete"):
        Manifest.read(folder)


@pytest.mark.parametrize("key", ["digest", "settings", "tensors"])
def test_a_missing_part_of_the_anchor_is_refused(folder, refused, key):
    edit_json(folder / MANIFEST_FILE, lambda manifest: manifest["anchor"].pop(key))

    with refused(NotAPackageError, "incomplete"):
        Manifest.read(folder)


def test_an_entry_that_does_not_belong_is_refused(folder, refused):
    edit_json(folder / MANIFEST_FILE, lambda manifest: manifest.update(surprise=1))

    with refused(NotAPackageError, "entries it should not"):
        Manifest.read(folder)


@pytest.mark.parametrize(
    "alter",
    [
        lambda anchor: anchor["settings"].update(hidden_size=65),
        lambda anchor: anchor["tensors"].update({"lm_head.weight": "abd"}),
        lambda anchor: anchor["tensors"].clear(),
        lambda anchor: anchor.update(digest="0" * 64),
    ],
)
def test_an_altered_anchor_is_noticed(folder, refused, alter):
    edit_json(folder / MANIFEST_FILE, lambda manifest: alter(manifest["anchor"]))

    with refused(NotAPackageError, "altered"):
        Manifest.read(folder)


@pytest.mark.parametrize("name", ["../../etc", ".hidden", "", "a" * 65, 7, None, ["math"]])
def test_a_name_that_cannot_be_a_file_name_is_refused(folder, refused, name):
    edit_json(folder / MANIFEST_FILE, lambda manifest: manifest.update(name=name))

    with refused(InvalidExpertNameError, repr(name)):
        Manifest.read(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("anchor", "abc"),
        ("tensors", 3),
        ("sha256", None),
        ("router_bias", "no"),
        ("owner", 3),
        ("license", ["mit"]),
        ("training", "long ago"),
        ("evaluation", [1]),
    ],
)
def test_an_entry_of_another_type_is_refused(folder, refused, key, value):
    edit_json(folder / MANIFEST_FILE, lambda manifest: manifest.update({key: value}))

    with refused(NotAPackageError):
        Manifest.read(folder)
