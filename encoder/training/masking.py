"""The masks of masked next token prediction."""

import torch
from torch import Tensor


def mask_tokens(
    input_ids: Tensor,
    *,
    probability: float,
    mask_share: float,
    random_share: float,
    mask_id: int,
    vocab_size: int,
    special_ids: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose tokens and replace them (LLM2Vec, section 2.2; shares as in BERT).

    Args:
        input_ids: (B, L) int64 on the CPU.
        probability: that a token is chosen. The first of a row never is: nothing before it could predict it.
        mask_share, random_share: of the chosen tokens become the mask, a random token; the rest stay.
        special_ids: ids that are never chosen.
        generator: of the draws; torch's own by default.

    Returns:
        input_ids: (B, L) with replacements. labels: (B, L) the true id of the chosen tokens, -100 elsewhere.
    """
    eligible = ~torch.isin(input_ids, special_ids)
    eligible[:, 0] = False
    chosen = (torch.rand(input_ids.shape, generator=generator) < probability) & eligible
    if not chosen.any():  # a mean over no token is no number
        first = eligible.flatten().nonzero()[:1]
        chosen.view(-1)[first] = True
    fate = torch.rand(input_ids.shape, generator=generator)
    random = torch.randint(vocab_size, input_ids.shape, generator=generator)
    replacement = torch.where(
        fate < mask_share, mask_id, torch.where(fate < mask_share + random_share, random, input_ids)
    )
    return torch.where(chosen, replacement, input_ids), input_ids.masked_fill(~chosen, -100)
