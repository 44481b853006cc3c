"""What models that are made of several models take, in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a model of several members needs. Attention to earlier tokens and sampling are not counted.

    Attributes:
        parameters: Parameters held.
        parameters_per_token: Parameters that each token passes through, once the weights of the members are settled.
        passes_per_token: Forward passes of a member, or of an average of them, for each such token.
        passes_per_weight_token: The same for the tokens that settle the weights.
        parameters_averaged: Parameters read to build the average of a row's own: once for a row alone, in a batch once
            per row and call.
    """

    parameters: int
    parameters_per_token: int
    passes_per_token: int
    passes_per_weight_token: int
    parameters_averaged: int = 0


@dataclass(frozen=True)
class RoutingCost:
    """What answering takes.

    Attributes:
        parameters: Parameters held, the chat model's included.
        chat_parameters: Those of the chat model.
        parameters_per_token: Parameters that each token of the text passes through in the largest answering set.
        chat_tokens_per_query: Tokens that pass the chat model for each query, beyond the query itself.
    """

    parameters: int
    chat_parameters: int
    parameters_per_token: int
    chat_tokens_per_query: int
