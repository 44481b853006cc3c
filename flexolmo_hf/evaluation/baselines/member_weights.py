"""How much each member of an ensemble counts: by how well it predicted what it has read so far.

Shape letters: B batch, T tokens, M members, V vocabulary.
"""

import math

import torch

from flexolmo_hf.errors import ConfigurationError

LOSSES = ("mean", "sum")


def log_weights(
    log_likelihood_BTM: torch.Tensor, scored_BT: torch.Tensor, *, temperature: float, loss: str, top_k: int | None
) -> torch.Tensor:
    """Return the logarithms of the weights ``w = softmax(-L / temperature)`` (arXiv 2507.07024, on BTM).

    With `top_k`, all but the best members weigh nothing and the others' weights add up to 1; of equals, the first
    counts as better. Where nothing has been scored there is nothing to rank by: all members weigh the same, `top_k`
    or not.

    Args:
        log_likelihood_BTM: What each member gave the tokens read so far, nats.
        scored_BT: How many tokens that were; the first token of a text is predicted by nothing and not among them.
        temperature: Above 0; small values leave the best member alone.
        loss: L is the "mean" per token or the "sum" over all, which grows with the text.
        top_k: How many members count; None for all.

    Returns:
        Of the shape of `log_likelihood_BTM`; minus infinity for weight zero.
    """
    members = log_likelihood_BTM.shape[-1]
    score_BTM = log_likelihood_BTM / temperature
    if loss == "mean":
        score_BTM = score_BTM / scored_BT.clamp(min=1).unsqueeze(-1)
    if top_k is not None and top_k < members:
        best_first_BTM = score_BTM.argsort(dim=-1, descending=True, stable=True)
        score_BTM = score_BTM.scatter(-1, best_first_BTM[..., top_k:], -math.inf)
    known_BTM = (scored_BT > 0).unsqueeze(-1)
    return torch.where(known_BTM, score_BTM.log_softmax(-1), -math.log(members))


def check_weighting(*, temperature: float, loss: str, top_k: int | None, prefix: int) -> None:
    """Refuse settings that give no weights.

    Raises:
        ConfigurationError: Naming the setting and its range.
    """
    rules = [
        (0 < temperature < math.inf, f"temperature={temperature}", "Choose a finite number above 0."),
        (loss in LOSSES, f"loss={loss!r}", f"Choose one of {', '.join(map(repr, LOSSES))}."),
        (top_k is None or top_k >= 1, f"top_k={top_k}", "Choose at least 1, or None for all members."),
        (prefix >= 2, f"prefix={prefix}", "Choose at least 2: the first token is not predicted."),
    ]
    for holds, setting, remedy in rules:
        if not holds:
            raise ConfigurationError(f"{setting} gives no weights.", remedy)


def last_real_column(mask_BT: torch.Tensor) -> torch.Tensor:
    """Return for each column the last one up to it that holds a real token; -1 if there is none. ``(B, T)``, int64."""
    columns_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, columns_T, -1).cummax(dim=1).values


def token_log_likelihood(
    logits_BTV: torch.Tensor, total_BT: torch.Tensor, input_ids_BT: torch.Tensor, predicted_by_BT: torch.Tensor
) -> torch.Tensor:
    """Return what one member gave each token, nats, float32.

    Args:
        logits_BTV: The member's logits.
        total_BT: Their log-sum-exp.
        input_ids_BT: The tokens.
        predicted_by_BT: The column whose logits predict each token; where it is -1, the value means nothing.
    """
    column_BT = predicted_by_BT.clamp(min=0)
    row_B1 = torch.arange(len(logits_BTV), device=logits_BTV.device).unsqueeze(1)
    return logits_BTV[row_B1, column_BT, input_ids_BT].float() - total_BT.gather(1, column_BT)


def predicted_by(real_BT: torch.Tensor) -> torch.Tensor:
    """Return the column whose logits predict each token: the last real one before it; -1 if there is none."""
    return torch.nn.functional.pad(last_real_column(real_BT)[:, :-1], (1, 0), value=-1)


def precise(device: torch.device) -> torch.dtype:
    """Return the widest float of a device: log-likelihoods of long texts are compared with each other."""
    return torch.float32 if device.type == "mps" else torch.float64
