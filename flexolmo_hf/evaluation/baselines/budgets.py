"""How long a comparison may train: on as many operations as FlexOlmo's whole training took, or on as much data."""

from collections.abc import Iterable, Mapping
from typing import Any

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.trainers.plan import Assumptions, ModelSizes, flops_per_token


def whole_model_flops(sizes: ModelSizes, *, experts: int, experts_per_token: int | None = None, sequence: int) -> float:
    """Count the floating-point operations of one training step of a whole mixture, by token.

    Counted as `flops_per_token` counts an expert's training, without checkpointing. A product with a weight of N
    parameters takes 6N: 2N in the forward pass, 2N for the gradient of its input, 2N for that of the weight. Weights
    that a token meets are attention, its K experts, all router rows and the head. Attention's two products with T keys
    take 4TH forward and, differentiated with respect to both inputs, 8TH backward, in each layer. Norms, activation
    functions and the embedding's look-up are left out:

        L * (6 * (attention + K * 3HI + E * H) + 12TH) + 6HV        for a mixture
        L * (6 * (attention + 3HI) + 12TH) + 6HV                    for a dense model, which has no router

    Args:
        sizes: The model's.
        experts: How many experts there are; 0 for a dense model.
        experts_per_token: How many each token uses; None for all.
        sequence: Tokens of a sequence.
    """
    used = experts if experts_per_token is None else min(experts_per_token, experts)
    matrices = sizes.attention_matrices + max(used, 1) * sizes.expert_matrices + experts * sizes.hidden
    scores = 2 * sequence * sizes.hidden
    head = sizes.vocabulary * sizes.hidden
    return float(sizes.layers * 6 * (matrices + scores) + 6 * head)


def router_tuning_flops(sizes: ModelSizes, *, experts: int, sequence: int) -> float:
    """Count the floating-point operations of one step of router tuning, by token: all experts run, rows move.

    A frozen weight takes 4N, its gradient being left out, and a row 6N. What could be saved in the first layer, below
    which nothing needs a gradient, is not taken off.

    Args:
        sizes: The model's.
        experts: How many experts there are; all of them run.
        sequence: Tokens of a sequence.
    """
    frozen = sizes.attention_matrices + experts * sizes.expert_matrices
    scores = 2 * sequence * sizes.hidden
    head = sizes.vocabulary * sizes.hidden
    return float(sizes.layers * (4 * frozen + 6 * (experts * sizes.hidden + scores)) + 4 * head)


def flexolmo_flops(config: Any, owner_tokens: Iterable[int], *, sequence: int, router_tokens: int = 0) -> float:
    """Count the operations of FlexOlmo's whole training: each owner's expert beside the public one, and router tuning.

    The public model is where every method starts, so its training counts for none.

    Args:
        config: Configuration of the anchor or of the merged model.
        owner_tokens: Tokens that each owner trained on.
        sequence: Tokens of a sequence.
        router_tokens: Tokens of router tuning, if it was done.
    """
    owners = list(owner_tokens)
    _check([*owners, router_tokens], sequence)
    sizes = ModelSizes.of(config)
    of_expert = flops_per_token(sizes, Assumptions(experts=2, sequence=sequence, checkpointing=False))
    of_router = router_tuning_flops(sizes, experts=len(owners) + 1, sequence=sequence)
    return of_expert * sum(owners) + of_router * router_tokens


def compute_matched(
    config: Any,
    owner_tokens: Mapping[str, int],
    *,
    sequence: int,
    experts_per_token: int | None = None,
    router_tokens: int = 0,
    dense: bool = False,
) -> int:
    """Return on how many tokens another model trains with the operations of FlexOlmo's whole training.

    Less than FlexOlmo's owners had together: with all experts active a token costs more here than beside one expert.

    Args:
        config: Configuration of the anchor or of the merged model.
        owner_tokens: Tokens that each owner trained on, by expert; the mixture has these experts and the public one.
        sequence: Tokens of a sequence, the same for all.
        experts_per_token: How many experts each token of the mixture uses; None for all.
        router_tokens: Tokens of FlexOlmo's router tuning, if it was done.
        dense: Whether the other model is dense rather than a mixture.

    Returns:
        Tokens, rounded down.

    Raises:
        ConfigurationError: If a number makes no sense.
    """
    spent = flexolmo_flops(config, owner_tokens.values(), sequence=sequence, router_tokens=router_tokens)
    experts = 0 if dense else len(owner_tokens) + 1
    sizes = ModelSizes.of(config)
    cost = whole_model_flops(sizes, experts=experts, experts_per_token=experts_per_token, sequence=sequence)
    return int(spent // cost)


def data_matched(owner_tokens: Mapping[str, int], *, router_tokens: int = 0, public_tokens: int = 0) -> int:
    """Return how many tokens FlexOlmo's whole training saw: another model sees the same, at whatever cost.

    Args:
        owner_tokens: Tokens that each owner trained on, by expert.
        router_tokens: Tokens of router tuning, if it was done.
        public_tokens: Further public tokens that shall be seen.

    Raises:
        ConfigurationError: If a number is negative, or nothing was seen.
    """
    _check([*owner_tokens.values(), router_tokens, public_tokens], 1)
    return sum(owner_tokens.values()) + router_tokens + public_tokens


def _check(tokens: list[int], sequence: int) -> None:
    if min(tokens) < 0 or sum(tokens) == 0 or sequence < 1:
        raise ConfigurationError(
            f"The budget is {sum(tokens)} tokens in sequences of {sequence}.", "Each number is above 0, none is below."
        )
