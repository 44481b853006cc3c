"""Errors travel between processes unchanged, are ValueErrors of one family, and say what to do."""

import copy
import pickle

import pytest

from flexolmo_hf import errors
from flexolmo_hf.errors import FlexOlmoError

KNOWN = ["public", "math", "code"]

SAMPLES = [
    errors.UnknownExpertError("maht", KNOWN),
    errors.ExpertNotLoadedError("code", KNOWN[:2]),
    errors.DuplicateExpertError("math", ["math", "Math"]),
    errors.EmptyExpertSetError(KNOWN),
    errors.ExpertTypeError(1, KNOWN),
    errors.ExpertTypeError(True, KNOWN),
    errors.ExpertTypeError(None, []),
    errors.InvalidExpertNameError("a/b"),
    errors.InvalidExpertNameError(3),
    errors.ConfigurationError("The sky is green.", "Make it blue."),
    errors.UnknownArgumentError(["active_expert"], ["active_experts", "dtype"]),
    errors.NotFlexOlmoError("olmo2"),
    errors.NotFlexOlmoError(None),
    errors.NotOlmo2Error("llama"),
    errors.NotOlmo2Error(None),
    errors.CheckpointNotFoundError("nowhere", ""),
    errors.CheckpointNotFoundError("owner/name", "401 Client Error."),
    errors.OutputPlaceError("out", "it is a link"),
    errors.IncompleteCheckpointError(["a", "b", "c", "d", "e"], ["f"]),
    errors.IncompleteCheckpointError([], ["f"]),
    errors.UnexpectedTensorError(["a"]),
    errors.DamagedFileError("model.safetensors", "it is truncated"),
    errors.NonFiniteTensorError("layers.0.router.row", "expert 'math'"),
    errors.NotAPackageError("folder", "there is no manifest.json"),
    errors.AnchorMismatchError("math", ["rms_norm_eps 1e-05 instead of 1e-06"], ["lm_head.weight"]),
    errors.AnchorMismatchError("math", [], ["lm_head.weight"]),
    errors.RouterProjectionError("math", "code", [("seed", 0, 1), ("encoder_width", 384, 512)]),
    errors.AmbiguousExpertError(["math"], [1, 2]),
    errors.AmbiguousExpertError(["math", "code"], [1]),
    errors.ExpertRowsError("2 sets of experts for 3 rows", "give one set per row"),
    errors.ExpertsChangedError(["public+math", "public"]),
    errors.CacheExpertSetError([["public"]], [["public", "math"], ["public"]]),
    errors.ForeignCacheError((2, 1, 32), (2, 2, 32), marked=False),
    errors.OutputFolderNotEmptyError("out"),
    errors.NoSpaceError(2 * 10**9, 10**9),
    errors.NoSpaceError(None, 0),
    errors.DownloadError("some-data==1.0", "no such version", "python -m pip download --dest FOLDER some-data==1.0"),
    errors.LockMismatchError(["math/test", "math/train"]),
    errors.StageFailedError("train", "train.log"),
    errors.SharedWeightsError({"math": ["embeddings", "lm_head"]}),
    errors.FrozenMovedError(["model.embed_tokens.weight"]),
    errors.NonFiniteLossError(3, 12, "checkpoint-2"),
    errors.NonFiniteLossError(1, 1, None),
    errors.NonFiniteLossError(2, 5, "checkpoint-1", "gradient"),
    errors.NoCheckpointError("run", ["checkpoint-3"]),
    errors.ResumeMismatchError([("learning_rate", 1e-3, 2e-3)]),
    errors.MissingExtraError("train", ["trl"]),
    errors.TooFewDocumentsError("private", 3, 20, 1, 0),
    errors.TooFewDocumentsError("public", 0, 20, 0, 30, 2),
    errors.UnknownTaskError("mc8", ["mc9", "gen5", "mmlu"]),
    errors.SandboxError("the kernel has no Landlock, or it is switched off"),
]
every_sample = pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)


def kinds(base=FlexOlmoError):
    return {kind for child in base.__subclasses__() for kind in (child, *kinds(child))}


def test_every_kind_of_error_has_a_sample_here():
    defined_here = {kind for kind in kinds() if kind.__module__ == errors.__name__}

    assert {type(error) for error in SAMPLES} == defined_here


@every_sample
def test_an_error_is_the_same_after_a_journey_to_another_process(error):
    arrived = pickle.loads(pickle.dumps(error))

    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


@every_sample
def test_an_error_can_be_copied(error):
    assert str(copy.deepcopy(error)) == str(error)


@every_sample
def test_an_error_is_a_value_error_of_the_one_family(error):
    assert isinstance(error, FlexOlmoError)
    assert isinstance(error, ValueError)


@every_sample
def test_an_error_is_written_as_sentences_in_one_line(error):
    message = str(error)

    assert "\n" not in message
    assert "  " not in message
    assert message[-1] in ".?'"
    assert len(message) > 40 or isinstance(error, errors.ConfigurationError)


@pytest.mark.parametrize(
    ("error", "parent"),
    [
        (errors.UnknownArgumentError(["a"], ["b"]), TypeError),
        (errors.NoSpaceError(None, 0), OSError),
        (errors.MissingExtraError("train", ["trl"]), ImportError),
    ],
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
def test_an_error_is_also_what_python_calls_its_kind(error, parent):
    assert isinstance(error, parent)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (errors.UnknownExpertError("maht", KNOWN), "Did you mean 'math'?"),
        (errors.ExpertTypeError(1, KNOWN), "Expert 1 is called 'math'."),
        (errors.ExpertNotLoadedError("code", ["public"]), "active_experts=['public', 'code']"),
        (errors.UnknownArgumentError(["active_expert"], ["active_experts"]), "Did you mean 'active_experts'?"),
        (errors.NotFlexOlmoError("olmo2"), "from_dense"),
        (errors.MissingExtraError("train", ["trl"]), "pip install 'flexolmo-hf[train]'"),
    ],
)
def test_an_error_says_what_to_do(error, hint):
    assert hint in str(error)


@pytest.mark.parametrize("index", [-1, 3, True])
def test_only_an_index_that_exists_is_translated_into_a_name(index):
    assert "is called" not in str(errors.ExpertTypeError(index, KNOWN))


def test_a_long_list_is_cut_short_with_its_count():
    message = str(errors.UnexpectedTensorError([f"tensor {number}" for number in range(100)]))

    assert "100 expert or router tensor(s)" in message
    assert "tensor 3 and 96 more" in message
    assert "tensor 4" not in message


def test_an_unknown_name_unlike_any_other_brings_no_hint():
    assert "Did you mean" not in str(errors.UnknownExpertError("xyz", KNOWN))
