"""Training losses: in-batch contrast for sentence-transformers, and masked next token prediction."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uncausal.kernels.info_nce import info_nce
from uncausal.kernels.info_nce_prefixes import info_nce_prefixes
from uncausal.kernels.latent_pooling import kept_folds

_IGNORE = -100
_LOGITS_BYTES = 256 << 20  # vocabulary logits in memory at a time


class InfoNCELoss(CachedLossMixin, nn.Module):
    """In-batch contrastive loss of the columns (anchor, positive, negative_1, ...), without the B x B logits.

    With its defaults it equals sentence-transformers' MultipleNegativesRankingLoss (scale = 1 / temperature),
    and it goes inside a MatryoshkaLoss like that one.

    Args:
        model: the encoder.
        temperature: divides the scores.
        hard_negatives: "shared", the negative columns are negatives of every anchor in the batch (as in
            sentence-transformers); "own", of their own anchor only (and in its symmetric form likewise).
        in_batch_negatives: False contrasts each anchor with its own negatives only (NV-Embed's second stage,
            arXiv 2405.17428, section 4.2).
        symmetric: average with the loss of each positive against all anchors.
        margin: drops negatives whose score exceeds the positive's by more than this.
        labels_as_ids: examples of equal label are never each other's negatives. Labels are (B,), or
            (B, 1 + negatives): of the anchor and of each of its negatives, which is then no negative of
            anchors of its label either.
        normalize: scores are cosines; False takes the inner product.
        mini_batch_size: texts embedded at a time, for batches larger than memory (GradCache, arXiv
            2101.06983): two forward passes and one backward, the second forward with the random state of
            the first. None embeds all at once.
        mini_batch_num_tokens: with `mini_batch_size`, bounds a mini-batch by its tokens instead.
        gather_across_devices: contrast against all ranks. Every rank's loss is then that of the concatenated
            batch, and its gradient is scaled so that DistributedDataParallel's mean over ranks is exact.
        exchange: how ranks exchange embeddings, "all_gather" or "ring".
        matryoshka_dims: also contrast these prefixes of the embeddings (arXiv 2205.13147). Equal to a
            MatryoshkaLoss around this loss, but on a CPU one pass over the largest prefix serves all.
        matryoshka_weights: one per prefix, 1 by default.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.05,
        *,
        hard_negatives: Literal["shared", "own"] = "shared",
        in_batch_negatives: bool = True,
        symmetric: bool = False,
        margin: float | None = None,
        labels_as_ids: bool = False,
        normalize: bool = True,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        exchange: Literal["all_gather", "ring"] = "all_gather",
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"expected temperature > 0, got {temperature}")
        if hard_negatives not in ("shared", "own"):
            raise ValueError(f"expected hard_negatives 'shared' or 'own', got {hard_negatives!r}")
        if mini_batch_num_tokens is not None and mini_batch_size is None:
            raise ValueError("mini_batch_num_tokens belongs to the cached form: give mini_batch_size too")
        for name, value in (("size", mini_batch_size), ("num_tokens", mini_batch_num_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"expected mini_batch_{name} of at least 1, got {value}")
        self.model = model
        self.temperature = temperature
        self.hard_negatives = hard_negatives
        self.in_batch_negatives = in_batch_negatives
        self.symmetric = symmetric
        self.margin = margin
        self.labels_as_ids = labels_as_ids
        self.normalize = normalize
        # MatryoshkaLoss asks for uses_gradient_cache: it then wraps calculate_loss, and the model otherwise.
        self.uses_gradient_cache = mini_batch_size is not None
        self.mini_batch_size = mini_batch_size or 0
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.gather_across_devices = gather_across_devices
        self.exchange = exchange
        self.matryoshka_dims = list(matryoshka_dims or [])
        self.matryoshka_weights = list(matryoshka_weights or [1.0] * len(self.matryoshka_dims))
        if len(self.matryoshka_weights) != len(self.matryoshka_dims):
            raise ValueError(
                f"expected a weight per prefix, got {self.matryoshka_dims} and {self.matryoshka_weights}"
            )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        if self.uses_gradient_cache:
            with kept_folds(self.model):  # in its first pass
                return self.forward_cached(sentence_features, labels)
        return self.compute_loss_from_embeddings(embed(self.model, list(sentence_features)), labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of cached embeddings, column by column and mini-batch by mini-batch."""
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of one (B, D) embedding per column."""
        if len(embeddings) < 2:
            raise ValueError(
                f"expected at least the columns anchor and positive, got {len(embeddings)} column"
            )
        query, key, *negatives = embeddings
        ids, of_negatives = None, []
        if self.labels_as_ids:
            if labels is None or labels.shape not in ((len(query),), (len(query), 1 + len(negatives))):
                found = None if labels is None else tuple(labels.shape)
                raise ValueError(
                    f"labels_as_ids needs one label per anchor ({len(query)},), or one more per negative "
                    f"({len(query)}, {1 + len(negatives)}); got {found}"
                )
            ids, *of_negatives = labels.to(key.device).long().reshape(len(query), -1).unbind(1)
        hard = None
        if negatives and self.hard_negatives == "shared" and self.in_batch_negatives:
            key = torch.cat([key, *negatives])
            if ids is not None:  # a negative of no label gets one that no anchor has
                unknown = torch.full_like(ids, torch.iinfo(torch.long).min)
                ids = torch.cat([ids, *(of_negatives or [unknown] * len(negatives))])
        elif negatives:
            hard = torch.stack(negatives, 1)
        if not self.matryoshka_dims:
            return self._info_nce(query, key, hard, ids)
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if not all(1 <= d <= query.shape[1] for d in dims):
            raise ValueError(f"expected matryoshka_dims from 1 to {query.shape[1]}, got {dims}")
        plain = hard is None and not self.symmetric and self.margin is None and self.normalize
        plain &= self.in_batch_negatives
        if plain and not self._gathers and key.device.type == "cpu" and torch.is_grad_enabled():
            return info_nce_prefixes(query, key, dims, weights=weights, temperature=self.temperature, ids=ids)
        terms = [
            weight * self._info_nce(query[:, :d], key[:, :d], None if hard is None else hard[..., :d], ids)
            for d, weight in zip(dims, weights, strict=True)
        ]
        return torch.stack(terms).sum()

    @property
    def _gathers(self) -> bool:
        return self.gather_across_devices and dist.is_initialized()

    def _info_nce(self, query: Tensor, key: Tensor, hard: Tensor | None, ids: Tensor | None) -> Tensor:
        options: dict[str, Any] = {}
        if self._gathers:
            options = {"group": dist.group.WORLD, "exchange": self.exchange}
        loss = info_nce(
            query,
            key,
            hard,
            temperature=self.temperature,
            ids=ids,
            margin=self.margin,
            symmetric=self.symmetric,
            in_batch_negatives=self.in_batch_negatives,
            normalize=self.normalize,
            **options,
        )
        if options:  # every rank holds the whole loss, and DistributedDataParallel will average over ranks
            world = dist.get_world_size()
            loss = world * loss - (world - 1) * loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card shows."""
        names = (
            "temperature",
            "hard_negatives",
            "in_batch_negatives",
            "symmetric",
            "margin",
            "labels_as_ids",
        )
        more = (
            "normalize",
            "mini_batch_num_tokens",
            "matryoshka_weights",
            "gather_across_devices",
            "exchange",
            "matryoshka_dims",
        )
        return {n: getattr(self, n) for n in (*names, *more)} | {
            "mini_batch_size": self.mini_batch_size or None
        }


def embed(model: nn.Module, columns: list[dict[str, Any]]) -> list[Tensor]:
    """Embed the columns of a batch, packed ones in one forward pass.

    The library merges padded columns, all but the first, which may be of another width. Packed there is no
    width.

    Returns:
        One (B, D) embedding per column.
    """
    if len(columns) < 2 or not all("cu_seq_lens_q" in column for column in columns):
        return embed_columns(model, columns)
    joined = dict(columns[0])
    for name in ("input_ids", "position_ids"):
        joined[name] = torch.cat([column[name] for column in columns], 1)
    if any("prompt_mask" in column for column in columns):
        masks = [c.get("prompt_mask", torch.zeros_like(c["input_ids"], dtype=torch.bool)) for c in columns]
        joined["prompt_mask"] = torch.cat(masks, 1)
    ends, tokens = [columns[0]["cu_seq_lens_q"]], 0
    for before, column in pairwise(columns):
        tokens += before["input_ids"].shape[1]
        ends.append(column["cu_seq_lens_q"][1:] + tokens)
    joined["cu_seq_lens_q"] = joined["cu_seq_lens_k"] = torch.cat(ends)
    joined["max_length_q"] = joined["max_length_k"] = max(column["max_length_q"] for column in columns)
    counts = [len(column["cu_seq_lens_q"]) - 1 for column in columns]
    joined["lengths"] = tuple(n for column in columns for n in column.get("lengths", ()))
    return list(model(joined)["sentence_embedding"].split(counts))


def masked_next_token_loss(
    hidden_states: Tensor,
    labels: Tensor,
    lm_head_weight: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each masked token, predicted from the position before it (LLM2Vec, arXiv 2404.05961).

    The head runs on the positions before masked tokens alone, and on so many at a time as memory allows.

    Args:
        hidden_states: (T, d) packed, or (B, L, d) padded; the last hidden states, after the final norm.
        labels: (T,) or (B, L) integers: the original token where one was masked, -100 elsewhere.
        lm_head_weight: (V, d).
        lm_head_bias: (V,).
        cu_seqlens: (S + 1,) boundaries of packed sequences. A sequence's first token has no position before
            it, so a label there is left out; without boundaries, (T, d) counts as one sequence.
        logit_scale: multiplies the logits (Cohere; 1 / logits_scaling of Granite).
        softcap: c * tanh(logits / c) (Gemma 2).
        num_items: divides the sum; by default the number of tokens predicted.

    Returns:
        The mean loss in fp32, (); 0 with zero gradients when nothing is masked.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if hidden_states.ndim not in (2, 3) or hidden_states.shape[:-1] != labels.shape:
        raise ValueError(
            "expected hidden_states (T, d) or (B, L, d) and labels without d, got "
            f"{tuple(hidden_states.shape)} and {tuple(labels.shape)}"
        )
    if hidden_states.ndim == 3 and cu_seqlens is not None:
        raise ValueError("cu_seqlens goes with packed hidden_states (T, d), got (B, L, d)")
    labels = labels.clone()
    if cu_seqlens is None:
        labels[..., :1] = _IGNORE
    else:
        starts = cu_seqlens[:-1].long()
        labels[starts[starts < len(labels)]] = _IGNORE  # an empty last sequence starts behind the end
    labels = labels.flatten()
    masked = (labels != _IGNORE).nonzero().squeeze(1)
    rows = hidden_states.flatten(0, -2)[masked - 1]  # (masked, d)
    targets = labels[masked]

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(rows, lm_head_weight, lm_head_bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets, reduction="sum")

    step = max(_LOGITS_BYTES // (4 * len(lm_head_weight)), 1)
    if len(masked) <= step:
        total = chunk_loss(rows, targets)
    else:
        parts = zip(rows.split(step), targets.split(step), strict=True)
        total = torch.stack([checkpoint(chunk_loss, r, t, use_reentrant=False) for r, t in parts]).sum()
    items = torch.as_tensor(len(masked) if num_items is None else num_items)
    return total / items.clamp(min=1)
