"""The masks of masked next token prediction: shares, and what is never masked."""

import torch

from uncausal.encoder.training.masking import mask_tokens
from uncausal.encoder.training.stages.mntp import MNTP


def test_mask_tokens_shares_and_never_the_first():
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (64, 256))
    ids[:, 10] = 2
    masked, labels = mask_tokens(
        ids,
        probability=0.2,
        mask_share=0.8,
        random_share=0.1,
        mask_id=0,
        vocab_size=1000,
        special_ids=torch.tensor([1, 2]),
    )
    chosen = labels != -100
    assert not chosen[:, 0].any() and not chosen[:, 10].any()
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    share = chosen.float().sum() / (64 * 254)
    assert abs(share - 0.2) < 0.02
    assert abs((masked == 0)[chosen].float().mean() - 0.8) < 0.03
    assert abs((masked == ids)[chosen].float().mean() - 0.1) < 0.03


def test_mask_tokens_mistral_masks_all_it_chooses():
    ids = torch.randint(3, 1000, (8, 64))
    settings = {k: getattr(MNTP.mistral(), k) for k in ("mask_share", "random_share")}
    masked, labels = mask_tokens(
        ids, probability=0.8, **settings, mask_id=0, vocab_size=1000, special_ids=torch.tensor([])
    )
    assert torch.equal(masked == 0, labels != -100)


def test_mask_tokens_always_leaves_something_to_predict():
    ids = torch.arange(3, 7)[None]
    for seed in range(20):
        torch.manual_seed(seed)
        _, labels = mask_tokens(
            ids,
            probability=1e-6,
            mask_share=1,
            random_share=0,
            mask_id=0,
            vocab_size=9,
            special_ids=torch.tensor([]),
        )
        assert (labels != -100).sum() == 1
