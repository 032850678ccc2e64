"""Batches by token budget and size, and the loop that encodes them: same vectors, empty texts, order."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from uncausal.encoder import batching
from uncausal.encoder.batching import alone_beyond, iter_encode, token_batches
from uncausal.encoder.model import Encoder
from uncausal.encoder.whitening import LinearMap, append_linear

TEXTS = [f"the quick brown fox {'jumps over ' * (i % 5)}{i}" for i in range(40)]
GAPS = [*TEXTS[:3], "", TEXTS[3], " \n"]


@pytest.fixture(scope="module")
def encoder(tiny_llama):
    return Encoder.from_pretrained(tiny_llama, dtype="float32", device="cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "dtype, end, count",
    [
        ("float32", "mean", 1),
        ("bfloat16", "mean", 1),
        ("float32", "mapped", 2),
        ("float32", "latent", 2),
        ("bfloat16", "latent", 1),
    ],
)
def test_a_text_has_the_same_bits_in_any_company(smollm2, dtype, end, count, threads):
    """The real model's shapes: alone, in batches of any size, in any order."""
    threads(count)
    pooling = "latent" if end == "latent" else "mean"
    encoder = Encoder.from_pretrained(smollm2, num_layers=2, dtype=dtype, device="cpu", pooling=pooling)
    if end == "mapped":
        append_linear(encoder, LinearMap.empty(576, 384))
    texts = [*TEXTS[:9], "fox " * 150, "jumps " * 70, "a"]
    together = encoder.encode(texts)
    assert np.array_equal(np.stack([encoder.encode(text) for text in texts]), together)
    order = np.random.default_rng(0).permutation(len(texts))
    for budget in (40, 200):
        found = encoder.encode([texts[i] for i in order], batch_tokens=budget)
        assert np.array_equal(found, together[order]), budget


def test_token_batches_respect_the_budget():
    lengths = [5, 1, 9, 3, 3, 20]
    batches = token_batches(lengths, 10)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(sum(lengths[i] for i in batch) <= 10 or len(batch) == 1 for batch in batches)
    assert len(batches) == 4


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 2048),
        ({"rope_type": "longrope", "original_max_position_embeddings": 99, "rope_theta": 1e4}, 99),
    ],
)
def test_texts_beyond_a_varying_rope_stand_alone(rope, limit):
    """Regression: one long text turned the positions of all short ones beside it."""
    config = LlamaConfig()
    config.rope_parameters = rope
    assert alone_beyond(config) == limit
    lengths = [3, 120, 99, 100, 1]
    batches = token_batches(lengths, 1000, alone=99)
    assert [sorted(lengths[i] for i in batch) for batch in batches] == [[120], [100], [1, 3, 99]]
    assert token_batches(lengths, 1000) == [[1, 3, 2, 0, 4]]


def test_token_batches_respect_the_size():
    batches = token_batches([1] * 10, 100, 4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [len(batch) for batch in token_batches([3] * 6, 6, 4)] == [2, 2, 2], "the smaller of both bounds"


def sizes_of(encoder, monkeypatch, **options):
    sizes = []
    forward = nn.Sequential.forward
    collate = type(encoder[0]).collate
    monkeypatch.setattr(
        type(encoder[0]), "collate", lambda self, ids, *a: sizes.append(len(ids)) or collate(self, ids, *a)
    )
    encoder.encode(TEXTS, **options)
    assert forward is nn.Sequential.forward
    return sizes


@pytest.mark.parametrize(
    "options, largest",
    [({}, 40), ({"batch_size": 32}, 40), ({"batch_size": 7}, 7), ({"batch_size": 7, "batch_tokens": 60}, 6)],
    ids=str,
)
def test_batch_size_bounds_a_batch(encoder, monkeypatch, options, largest):
    """Regression: batch_size was ignored. The library's default, 32, is nobody's wish and bounds nothing."""
    sizes = sizes_of(encoder, monkeypatch, **options)
    assert sum(sizes) == len(TEXTS)
    assert max(sizes) == largest if largest != 6 else max(sizes) <= 7 and len(sizes) > 6


def test_iter_encode_gives_every_text_once(encoder, monkeypatch):
    monkeypatch.setattr(batching, "WINDOW", 16)  # windows are tokenised ahead and must not mix
    prompts = ["Query: " if i % 2 else "the lazy dog\n" for i in range(len(TEXTS))]
    vectors = torch.zeros(len(TEXTS), 32)
    seen = []
    for batch in iter_encode(encoder, TEXTS, prompt=prompts, batch_tokens=64):
        seen += batch.indices
        vectors[batch.indices] = batch.vectors
        for index, count in zip(batch.indices, batch.token_counts, strict=True):
            assert count == len(encoder.tokenizer(prompts[index] + TEXTS[index])["input_ids"])
    assert sorted(seen) == list(range(len(TEXTS)))
    expected = [encoder.encode(text, prompt=prompt) for text, prompt in zip(TEXTS, prompts, strict=True)]
    np.testing.assert_allclose(vectors.numpy(), np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_empty_texts_by_wish(encoder, packed, monkeypatch):
    monkeypatch.setattr(encoder[0], "can_flatten_inputs", packed)
    expected = encoder.encode(TEXTS[:4])
    zero = encoder.encode(GAPS, on_empty="zero")
    np.testing.assert_allclose(zero[[0, 1, 2, 4]], expected, atol=1e-6)
    assert zero.shape == (6, 32) and not zero[[3, 5]].any()
    np.testing.assert_allclose(encoder.encode(GAPS, on_empty="skip"), expected, atol=1e-6)
    cut = encoder.encode(["", ""], on_empty="zero", truncate_dim=8, convert_to_tensor=True)
    assert cut.shape == (2, 8) and not cut.any()
    assert len(encoder.encode([""], on_empty="skip")) == 0
    with pytest.raises(ValueError, match="'raise', 'zero' or 'skip', got 'drop'"):
        encoder.encode(GAPS, on_empty="drop")
    with pytest.raises(ValueError, match="take 'skip'"):
        encoder.encode(GAPS, on_empty="zero", output_value="token_embeddings")
    assert len(encoder.encode(GAPS, on_empty="skip", output_value="token_embeddings")) == 4


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_empty_text_is_named_before_anything_is_encoded(encoder, packed, monkeypatch):
    """Regression: the index was that of a window or a sorted batch, and the work before it lost."""
    monkeypatch.setattr(encoder[0], "can_flatten_inputs", packed)
    monkeypatch.setattr(batching, "WINDOW", 4)
    monkeypatch.setattr(Encoder, "forward", lambda *_, **__: pytest.fail("encoded first"))
    with pytest.raises(ValueError, match=re.escape("text 11 is empty ('  ')")):
        encoder.encode([*TEXTS[:11], "  ", *TEXTS])
    with pytest.raises(ValueError, match="text 5 is empty" if packed else "need the packed attention"):
        next(iter_encode(encoder, [*TEXTS[:5], ""]))


def test_empty_text_is_named_before_processes_are_started(encoder, monkeypatch):
    monkeypatch.setattr(Encoder, "start_multi_process_pool", lambda *_: pytest.fail("started"))
    with pytest.raises(ValueError, match="text 5 is empty"):
        encoder.encode([*TEXTS[:5], ""], device=["cpu", "cpu"])


@pytest.mark.parametrize("limit", [0, -1])
def test_impossible_limits_are_refused(byte_llama, limit):
    """Regression: max_seq_length=-1 cut the last token of every text, and 0 of anything was no limit."""
    with pytest.raises(ValueError, match=f"max_seq_length is {limit}"):
        Encoder.from_pretrained(byte_llama, device="cpu", max_seq_length=limit)
    with pytest.raises(ValueError, match=f"batch_tokens is {limit}"):
        Encoder.from_pretrained(byte_llama, device="cpu").encode(["hello"], batch_tokens=limit)
