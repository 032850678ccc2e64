"""InfoNCELoss against sentence-transformers' losses, and masked_next_token_loss against its definition."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from tiny import TEXTS, load
from torch import nn

from uncausal.encoder.training import losses
from uncausal.encoder.training.losses import InfoNCELoss, embed, masked_next_token_loss
from uncausal.kernels.latent_pooling import LatentAttentionPooling

VOCABULARY, DIM = 50, 16


class TinyEncoder(nn.Module):
    """The smallest first module with token features and dropout, so that random states matter."""

    def __init__(self, dropout: float = 0.3):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.mlp = nn.Sequential(nn.Dropout(dropout), nn.Linear(DIM, DIM), nn.GELU(), nn.Dropout(dropout))

    def forward(self, features):
        mask = features["attention_mask"][..., None].to(self.embed.weight.dtype)
        states = self.mlp(self.embed(features["input_ids"])) * mask
        features["sentence_embedding"] = states.sum(1) / mask.sum(1)
        return features

    def get_embedding_dimension(self):
        return DIM


def tiny_model(seed=0, dropout=0.3):
    torch.manual_seed(seed)
    return SentenceTransformer(modules=[TinyEncoder(dropout).double()], device="cpu")


def batch(columns=2, size=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = []
    for _ in range(columns):
        lengths = torch.randint(1, 8, (size, 1), generator=generator)
        features.append(
            {
                "input_ids": torch.randint(0, VOCABULARY, (size, 7), generator=generator),
                "attention_mask": (torch.arange(7) < lengths).long(),
            }
        )
    return features


def loss_and_gradients(model, loss, columns=2, seed=5, **kwargs):
    model.zero_grad()
    torch.manual_seed(seed)
    features = batch(columns, **kwargs)
    value = loss(features, torch.zeros(len(features[0]["input_ids"]), dtype=torch.long))
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters()]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("columns", [2, 3, 5], ids=lambda c: f"columns{c}")
@pytest.mark.parametrize("symmetric", [False, True], ids=["one-way", "symmetric"])
def test_info_nce_loss_equals_multiple_negatives_ranking(columns, symmetric):
    model = tiny_model()
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    theirs = MultipleNegativesRankingLoss(
        model, scale=20.0, directions=directions, partition_mode="per_direction" if symmetric else "joint"
    )
    ours = InfoNCELoss(model, temperature=0.05, symmetric=symmetric)
    assert_same(loss_and_gradients(model, ours, columns), loss_and_gradients(model, theirs, columns))


def test_simcse_loss_curve_equals_multiple_negatives_ranking():
    """Twenty optimiser steps on the same sentence twice under dropout: the same curve from the same seed."""
    curves = []
    for make in (lambda m: InfoNCELoss(m, 0.05), lambda m: MultipleNegativesRankingLoss(m, scale=20.0)):
        model = tiny_model(seed=3)
        loss = make(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(11)
        curve = []
        for step in range(20):
            (sentences,) = batch(1, size=16, seed=step % 4)
            value = loss([dict(sentences), dict(sentences)], None)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert sum(curves[0][-4:]) < sum(curves[0][:4])


@pytest.mark.parametrize("columns", [2, 4], ids=lambda c: f"columns{c}")
def test_cached_replays_dropout(columns):
    """Cached ours and cached theirs draw the same masks twice; a wrong replay gives other gradients."""
    model = tiny_model()
    ours = InfoNCELoss(model, 0.05, mini_batch_size=4)
    theirs = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=4)
    assert_same(loss_and_gradients(model, ours, columns), loss_and_gradients(model, theirs, columns))


@pytest.mark.parametrize(
    "limits", [{"mini_batch_size": 4}, {"mini_batch_size": 4, "mini_batch_num_tokens": 9}]
)
def test_cached_equals_uncached_without_dropout(limits):
    model = tiny_model(dropout=0.0)
    cached, plain = InfoNCELoss(model, **limits), InfoNCELoss(model)
    assert_same(loss_and_gradients(model, cached, 3), loss_and_gradients(model, plain, 3))


class TinyLatentEncoder(TinyEncoder):
    """With latent pooling in place of the mean, in mini-batches large enough to fold for."""

    def __init__(self):
        super().__init__(0.0)
        self.pool = LatentAttentionPooling(DIM, 2, 2, head_dim=8)

    def forward(self, features):
        states = self.mlp(self.embed(features["input_ids"]))
        features["sentence_embedding"] = self.pool(states, attention_mask=features["attention_mask"])
        return features


def test_cached_folds_latent_pooling_once_in_its_first_pass(monkeypatch):
    torch.manual_seed(0)
    model, folds = SentenceTransformer(modules=[TinyLatentEncoder().double()], device="cpu"), []
    fold = LatentAttentionPooling.fold
    monkeypatch.setattr(
        LatentAttentionPooling, "fold", lambda *args: (folds.append(torch.is_grad_enabled()), fold(*args))[1]
    )
    plain = loss_and_gradients(model, InfoNCELoss(model))
    folds.clear()
    assert_same(loss_and_gradients(model, InfoNCELoss(model, mini_batch_size=4)), plain)
    assert folds == [False] + [True] * 6  # two columns of three mini-batches


def test_cached_scales_with_the_outer_gradient():
    """Gradient accumulation divides the loss after the fact; the replayed backward must follow."""
    model = tiny_model(dropout=0.0)
    loss = InfoNCELoss(model, mini_batch_size=4)
    _, whole = loss_and_gradients(model, loss)
    _, quarter = loss_and_gradients(model, lambda f, labels: loss(f, labels) / 4)
    torch.testing.assert_close([g / 4 for g in whole], quarter)


def test_cached_without_gradients_evaluates():
    model = tiny_model(dropout=0.0)
    with torch.no_grad():
        cached = InfoNCELoss(model, mini_batch_size=4)(batch(), None)
        plain = InfoNCELoss(model)(batch(), None)
    assert not cached.requires_grad
    torch.testing.assert_close(cached, plain)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_composes_with_matryoshka(cached):
    model = tiny_model()
    dims, weights = [DIM, 8, 4], [1.0, 0.5, 0.25]
    size = {"mini_batch_size": 4} if cached else {}
    theirs_inner = (CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss)(
        model, **size
    )
    ours = MatryoshkaLoss(model, InfoNCELoss(model, **size), dims, weights)
    theirs = MatryoshkaLoss(model, theirs_inner, dims, weights)
    assert_same(loss_and_gradients(model, ours), loss_and_gradients(model, theirs))


@pytest.mark.parametrize("symmetric", [False, True], ids=["one-pass", "prefix-by-prefix"])
@pytest.mark.parametrize("size", [{}, {"mini_batch_size": 4}], ids=["plain", "cached"])
def test_native_matryoshka_equals_matryoshka_loss(size, symmetric):
    model = tiny_model()
    dims, weights = [4, DIM, 8], [0.25, 1.0, 0.5]
    native = InfoNCELoss(model, matryoshka_dims=dims, matryoshka_weights=weights, symmetric=symmetric, **size)
    wrapped = MatryoshkaLoss(model, InfoNCELoss(model, symmetric=symmetric, **size), dims, weights)
    assert_same(loss_and_gradients(model, native, 3), loss_and_gradients(model, wrapped, 3))


def test_one_process_takes_matryoshka_in_one_pass(monkeypatch):
    """Stages ask for all ranks' vectors, and alone they paid for every prefix apart."""
    model, passes = tiny_model(), []
    monkeypatch.setattr(losses, "info_nce_prefixes", lambda *a, **k: passes.append(a) or torch.zeros(()))
    InfoNCELoss(model, matryoshka_dims=[DIM, 4], gather_across_devices=True)(batch(), None)
    assert len(passes) == 1


def test_margin_by_hand():
    """Cosines .6 with the positive, .75 and .66 with the others: .1 above drops the .75 alone."""
    anchor = torch.tensor([[1.0, 0.0]])
    query, keys = anchor.repeat(3, 1), [0.6, 0.75, 0.66]
    key = torch.tensor([[c, (1 - c * c) ** 0.5] for c in keys])
    loss = InfoNCELoss(tiny_model(), temperature=0.1, margin=0.1)
    per_row = [(0, (0, 2)), (1, (0, 1, 2)), (2, (0, 1, 2))]
    expected = [-keys[i] / 0.1 + math.log(sum(math.exp(keys[j] / 0.1) for j in kept)) for i, kept in per_row]
    found = loss.compute_loss_from_embeddings([query, key], None)
    assert found.item() == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_own_hard_negatives_without_in_batch():
    """Each anchor contrasts with its own negatives: cross-entropy over (positive, negative 1, negative 2)."""
    model = tiny_model(dropout=0.0)

    def expected(features, labels):
        a, p, n, m = (F.normalize(model(f)["sentence_embedding"], dim=-1) for f in features)
        logits = torch.stack([(a * x).sum(-1) for x in (p, n, m)], 1) / 0.02
        return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.long))

    ours = InfoNCELoss(model, 0.02, in_batch_negatives=False)
    assert_same(loss_and_gradients(model, ours, 4), loss_and_gradients(model, expected, 4))


@pytest.mark.parametrize("hard_negatives", ["shared", "own"])
def test_labels_as_ids_drop_equal_labels(hard_negatives):
    """An in-batch positive with the anchor's label is no negative; a hard negative stays one."""
    model = tiny_model(dropout=0.0)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, -1, -1, 3])
    features = batch(3)
    a, p, n = (F.normalize(model(dict(f))["sentence_embedding"], dim=-1) for f in features)
    equal = (labels[:, None] == labels) & ~torch.eye(9, dtype=torch.bool)
    scores = (a @ p.T).masked_fill(equal, -torch.inf)
    own = (a @ n.T) if hard_negatives == "shared" else (a * n).sum(-1, keepdim=True)
    expected = F.cross_entropy(torch.cat([scores, own], 1) / 0.05, torch.arange(9))
    loss = InfoNCELoss(model, hard_negatives=hard_negatives, labels_as_ids=True)
    torch.testing.assert_close(loss(features, labels), expected)


@pytest.mark.parametrize("size", [None, 4], ids=["plain", "cached"])
def test_negative_of_the_anchors_own_label_is_none(size):
    """Another row's hard negative may belong to the anchor's class, and was a negative all the same."""
    model = tiny_model(dropout=0.0)
    labels = torch.tensor([[0, 1, 2], [1, 0, 0], [0, 2, 1], [2, 1, 0], [1, 2, 0], [0, -1, 3]])
    features = batch(4, size=6)
    a, p, n, m = (F.normalize(model(dict(f))["sentence_embedding"], dim=-1) for f in features)
    of_keys = torch.cat([labels[:, 0], labels[:, 1], labels[:, 2]])
    scores = a @ torch.cat([p, n, m]).T / 0.05
    expected = []
    for row in range(6):
        kept = [key for key in range(18) if key == row or of_keys[key] != labels[row, 0]]
        expected.append(torch.logsumexp(scores[row, kept], 0) - scores[row, row])
    loss = InfoNCELoss(model, labels_as_ids=True, mini_batch_size=size)
    torch.testing.assert_close(loss(features, labels), torch.stack(expected).mean())


def test_info_nce_loss_rejects():
    model = tiny_model()
    with pytest.raises(ValueError, match="temperature > 0"):
        InfoNCELoss(model, 0.0)
    with pytest.raises(ValueError, match="'shared' or 'own'"):
        InfoNCELoss(model, hard_negatives="other")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mini_batch_size"):
        InfoNCELoss(model, mini_batch_num_tokens=100)
    for limits in ({"mini_batch_size": 4, "mini_batch_num_tokens": 0}, {"mini_batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            InfoNCELoss(model, **limits)
    with pytest.raises(ValueError, match="at least the columns"):
        InfoNCELoss(model)(batch(1), None)
    alone = InfoNCELoss(model, in_batch_negatives=False, matryoshka_dims=[4])  # took them for all that
    with pytest.raises(ValueError, match="needs hard_negatives"):
        alone(batch(2), None)
    wide = InfoNCELoss(model, symmetric=True, matryoshka_dims=[4, DIM + 1])  # took what there was
    with pytest.raises(ValueError, match=r"matryoshka_dims from 1 to 16, got \[4, 17\]"):
        wide(batch(2), None)
    with pytest.raises(ValueError, match="one label per anchor"):
        InfoNCELoss(model, labels_as_ids=True)(batch(2), torch.zeros(3))


@pytest.mark.parametrize("prompt", ["the king ", None], ids=["prompt", "plain"])
def test_packed_columns_share_a_forward_pass(checkpoint, prompt):
    """The same loss and gradients as a pass a column, in one pass."""
    encoder = load(checkpoint)
    passes = []
    encoder.backbone.layers[0].register_forward_hook(lambda module, inputs, output: passes.append(module))
    columns = [[TEXTS[i * 3 + j] + " music" * (i % 3) for i in range(5)] for j in range(3)]

    def run(embedded):
        encoder.zero_grad()
        features = [encoder.preprocess(t, prompt=prompt if i == 0 else None) for i, t in enumerate(columns)]
        passes.clear()
        loss = InfoNCELoss(encoder).compute_loss_from_embeddings(embedded(encoder, features), None)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in encoder.parameters()], len(passes)

    merged = run(embed)
    single = run(lambda model, features: [model(column)["sentence_embedding"] for column in features])
    assert (merged[2], single[2]) == (1, 3)
    torch.testing.assert_close(merged[:2], single[:2], rtol=1e-4, atol=1e-5)


RANK_SIZES = (3, 6)


def _rank_gradients(store: str, rank: int, exchange: str, mini_batch_size: int | None) -> None:
    """One rank of test_gathered_gradients_average_to_one_process."""
    world = len(RANK_SIZES)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    start = sum(RANK_SIZES[:rank])
    mine = slice(start, start + RANK_SIZES[rank])
    model = tiny_model(dropout=0.0)
    whole = batch(3)
    _, expected = loss_and_gradients(model, InfoNCELoss(model), 3)
    features = [{name: x[mine] for name, x in column.items()} for column in whole]
    options = dict(gather_across_devices=True, exchange=exchange, mini_batch_size=mini_batch_size)
    loss = InfoNCELoss(model, **options)  # pyright: ignore[reportArgumentType]
    model.zero_grad()
    loss(features, None).backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad / world, wanted, rtol=1e-9, atol=1e-12)
    dist.destroy_process_group()


@pytest.mark.parametrize("exchange, mini_batch_size", [("all_gather", None), ("ring", 2)])
def test_gathered_gradients_average_to_one_process(exchange, mini_batch_size, tmp_path):
    """Averaged over ranks, as DistributedDataParallel does, gradients are those of the whole batch."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                str(tmp_path / "store"),
                str(rank),
                exchange,
                str(mini_batch_size or 0),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(len(RANK_SIZES))
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def mntp_inputs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.6] = -100
    weight = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64)
    return hidden.requires_grad_(), labels, weight.requires_grad_()


def shifted_cross_entropy(hidden, labels, weight, bias=None):
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(
        logits[..., :-1, :].reshape(-1, VOCABULARY), labels[..., 1:].reshape(-1), ignore_index=-100
    )


@pytest.mark.parametrize("budget", [None, 5], ids=["one-chunk", "chunked"])
@pytest.mark.parametrize("shape", [(23,), (4, 11), (1, 2)], ids=lambda s: "x".join(map(str, s)))
def test_masked_next_token_loss_predicts_from_the_position_before(shape, budget, monkeypatch):
    if budget is not None:
        monkeypatch.setattr(losses, "_LOGITS_BYTES", budget * 4 * VOCABULARY)
    hidden, labels, weight = mntp_inputs(*shape)
    labels[..., 1] = 3  # at least one
    results = []
    for f in (
        lambda: masked_next_token_loss(hidden, labels, weight),
        lambda: shifted_cross_entropy(hidden, labels, weight),
    ):
        loss = f()
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_masked_next_token_loss_never_crosses_a_boundary():
    """Packed: the loss is the token-weighted mean of the sequences' own losses, empty sequences included."""
    hidden, labels, weight = mntp_inputs(20)
    labels[[0, 5, 6, 19]] = torch.tensor([1, 2, 3, 4])  # first tokens of sequences, the single token of one
    cu_seqlens = torch.tensor([0, 5, 5, 6, 19, 20, 20], dtype=torch.int32)
    before = labels.clone()
    loss = masked_next_token_loss(hidden, labels, weight, cu_seqlens=cu_seqlens)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(labels, before)
    total, count = torch.zeros(()), 0
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        n = int((labels[start + 1 : end] != -100).sum())
        if n:
            total = total + n * shifted_cross_entropy(hidden[start:end], labels[start:end], weight)
            count += n
    torch.testing.assert_close(loss, total / count)
    (expected,) = torch.autograd.grad(total / count, hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert not gradient[[4, 5, 18, 19]].any()  # the last positions of sequences predict nothing


def test_masked_next_token_loss_bias_softcap_scale_num_items():
    hidden, labels, weight = mntp_inputs(12)
    bias = torch.randn(VOCABULARY, dtype=torch.float64)
    logits = 5 * torch.tanh(F.linear(hidden, weight, bias).float() * 0.5 / 5)
    expected = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / 40
    actual = masked_next_token_loss(
        hidden, labels, weight, lm_head_bias=bias, logit_scale=0.5, softcap=5.0, num_items=torch.tensor(40)
    )
    torch.testing.assert_close(actual, expected)


def test_masked_next_token_loss_nothing_masked():
    hidden, labels, weight = mntp_inputs(2, 6)
    labels.fill_(-100)
    labels[:, 0] = 7  # no position before it
    for count in (None, 0, torch.tensor(0)):  # a batch of special tokens alone was counted, and gave NaN
        loss = masked_next_token_loss(hidden, labels, weight, num_items=count)
        loss.backward()
        assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_masked_next_token_loss_rejects():
    hidden, labels, weight = mntp_inputs(2, 6)
    with pytest.raises(ValueError, match=r"\(2, 6, 16\)"):
        masked_next_token_loss(hidden, labels[:, :5], weight)
    with pytest.raises(ValueError, match="cu_seqlens"):
        masked_next_token_loss(hidden, labels, weight, cu_seqlens=torch.tensor([0, 12]))


if __name__ == "__main__":
    _rank_gradients(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]) or None)
