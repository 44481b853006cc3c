"""Which way of running the experts is allowed: this package's, and the kernels of transformers' experts interface."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.mixture import AUTO, DENSE, EAGER


class ExpertsImplementation:
    """``experts_implementation`` as upstream has it, with this package's names beside upstream's."""

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Return the implementation to use; ``"auto"`` if none is asked for.

        Raises:
            ConfigurationError: If there is none of that name.
        """
        allowed = [AUTO, DENSE, EAGER, *sorted(ALL_EXPERTS_FUNCTIONS.keys())]
        if requested_experts is None:
            return AUTO
        if requested_experts not in allowed:
            raise ConfigurationError(
                f"experts_implementation={requested_experts!r} does not exist.",
                f"Choose one of {', '.join(allowed)}; 'auto' picks the fastest that fits.",
            )
        return requested_experts

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Upstream looks for its own decorator in the source text of the class's module.
        return True

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        # While decoding, upstream trades grouped products for ones that copy each token's experts: sensible for small
        # experts, but an expert here is as large as a dense model's feed-forward network.
        yield
