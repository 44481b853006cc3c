"""FlexOlmo with one idea taken out: what each is worth (arXiv 2507.07024, ablations)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.rows import random_row
from flexolmo_hf.modeling.names import PUBLIC

#: Where router rows come from: an encoder's embeddings of text, the anchor's own hidden states, or chance.
ROWS = ("domain", "hidden states", "random")


@dataclass(frozen=True)
class Ablation:
    """The choices of one variant of the method; the defaults are the method itself.

    Attributes:
        rows: Where router rows come from, one of `ROWS`.
        bias: Whether routers have the negative bias.
        coordinated: Whether experts are trained beside the frozen public one. Else owners train dense models, whose
            feed-forward networks are plugged in.
        tuned: Whether whoever merges then tunes the router on proxy data. Owners train the same either way.

    Raises:
        ConfigurationError: If choices contradict each other.
    """

    rows: str = "domain"
    bias: bool = True
    coordinated: bool = True
    tuned: bool = False

    def __post_init__(self) -> None:
        """Check the choices."""
        if self.rows not in ROWS:
            raise ConfigurationError(f"rows is {self.rows!r}.", f"It is one of {', '.join(map(repr, ROWS))}.")
        if self.bias and not self.coordinated:
            raise ConfigurationError(
                "A bias is trained beside the public expert, and dense models have neither.",
                "Set bias=False with coordinated=False.",
            )

    def router_embeddings(
        self, names: list[str], embeddings: Mapping[str, Mapping[str, Any]], *, hidden_size: int, seed: int = 0
    ) -> dict[str, Any]:
        """Return the router rows of some experts, for `from_dense` and `build_no_coordination`.

        Args:
            names: Whose.
            embeddings: Rows by kind (``"domain"``, ``"hidden states"``) and expert, as `domain_embedding` returns
                them. Only the kind that is used has to be there.
            hidden_size: The model's width.
            seed: Of random rows, which depend on the expert's name alone: all owners draw the same public row.

        Raises:
            ConfigurationError: If the rows that are used are not given.
        """
        if self.rows == "random":
            return {name: random_row(name, hidden_size, seed=seed) for name in names}
        given = embeddings.get(self.rows, {})
        if missing := [name for name in names if name not in given]:
            raise ConfigurationError(f"There are no {self.rows!r} rows for {missing}.", "Make them first.")
        return {name: given[name] for name in names}

    def from_dense_arguments(
        self,
        owner: str,
        embeddings: Mapping[str, Mapping[str, Any]],
        *,
        hidden_size: int,
        seed: int = 0,
        bias_start: float | None = None,
    ) -> dict[str, Any]:
        """Return the keywords with which `FlexOlmoForCausalLM.from_dense` makes what an owner trains.

        Args:
            owner: The owner's expert.
            embeddings: As in `router_embeddings`.
            hidden_size: The model's width.
            seed: Of random rows.
            bias_start: Where the bias starts, if there is one; None for the default.

        Raises:
            ConfigurationError: If owners train dense models in this variant, or rows are missing.
        """
        if not self.coordinated:
            raise ConfigurationError(
                "Without coordination an owner trains a dense model.", "Use train_dense and build_no_coordination."
            )
        rows = self.router_embeddings([PUBLIC, owner], embeddings, hidden_size=hidden_size, seed=seed)
        biased = {"router_bias": True, "bias_start": bias_start} if self.bias else {"router_bias": False}
        return {"expert": owner, "router_embeddings": rows, **biased}


#: The variants by name; the paper's averages over 24 tasks stand behind those it has.
ABLATIONS: Mapping[str, Ablation] = MappingProxyType(
    {
        "FlexOlmo": Ablation(),  # 46.7
        "router tuning": Ablation(tuned=True),  # 47.8
        "no bias": Ablation(bias=False),  # 45.8
        "random rows": Ablation(rows="random"),
        "random rows, no bias": Ablation(rows="random", bias=False),  # 44.4
        "hidden-state rows": Ablation(rows="hidden states"),  # 43.5
        "no coordination": Ablation(bias=False, coordinated=False),  # 38.8
    }
)
