"""NV-Embed's second stage: own negatives alone."""

import pytest
import torch

from uncausal import Encoder
from uncausal.encoder.training.stages.instruction import Instruction

ROWS = [("the cat", "a cat", "the king"), ("the dog", "a dog", "the river"), ("music", "the music", "home")]


def test_only_own_negatives_count(tiny_checkpoint):
    """By hand: with cosines c+ and c- the loss of a row is log(1 + exp((c- - c+) / T))."""
    encoder = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    stage = Instruction(temperature=0.1)
    columns = [
        torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(i)), dim=1)
        for i in range(3)
    ]
    loss = stage.make_loss(encoder).compute_loss_from_embeddings(columns, None)  # type: ignore[operator]
    right, wrong = ((columns[0] * other).sum(1) for other in columns[1:])
    torch.testing.assert_close(loss, torch.log1p(torch.exp((wrong - right) / 0.1)).mean())


def test_rows_without_negatives_are_refused(tiny_checkpoint):
    encoder = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    stage = Instruction(batch_size=2)
    assert "negative" in stage.prepare(encoder, ROWS).column_names
    with pytest.raises(ValueError, match="no column `negative`"):
        stage.prepare(encoder, [row[:2] for row in ROWS])


def test_defaults_are_nv_embeds():
    stage = Instruction()
    assert (stage.max_steps, stage.batch_size, stage.learning_rate, stage.warmup_steps) == (
        18000,
        128,
        1.5e-5,
        500,
    )
    assert (stage.weight_decay, stage.lora_r, stage.lora_alpha, stage.lora_dropout) == (0.03, 16, 32, 0.1)


def test_sets_are_blended_by_default(tiny_checkpoint, tmp_path):
    """Regression: each batch held one set, where NV-Embed's second stage mixes tasks within a batch."""
    encoder = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    stage = Instruction(batch_size=4, max_steps=6)
    sets = stage.prepare(encoder, {"a": ROWS * 4, "b": [(p, a, n) for a, p, n in ROWS] * 4})
    trainer = stage.make_trainer(encoder, sets, tmp_path, stage.make_loss(encoder, sets))
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert sum(min(batch) < 12 <= max(batch) for batch in batches) >= 3
