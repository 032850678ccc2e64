"""Whitening (arXiv 2103.15316): the map under which a sample's vectors have no mean and no main direction.

The averaged states of a language model share a few large directions, which drown what tells texts apart.
Without any training the map brings it out; before training it spares the steps that would undo them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn

from uncausal.encoder.data.rows import DataError
from uncausal.encoder.inputs import check_not_empty
from uncausal.encoder.linear import use_onednn

FLOOR = 1e-4  # of the largest variance: directions below it are noise, and are not amplified further


class LinearMap(Dense):
    """The library's linear layer, for vectors of any dtype.

    Attributes:
        frozen: whether stages leave it as it is, also after a reload; its own `requires_grad_` says so.
    """

    frozen = False

    @wraps(Dense.__init__)  # whose parameters tell the library what a saved one holds
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        use_onednn(self)  # whose products of few rows are those of many, bit by bit

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors = features[self.module_input_name]
        return super().forward({**features, self.module_input_name: vectors.to(self.linear.weight.dtype)})

    def requires_grad_(self, requires_grad: bool = True) -> "LinearMap":
        self.frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    @classmethod
    def empty(cls, in_features: int, out_features: int) -> "LinearMap":
        """One without activation, whose weights are still to be set."""
        return cls(in_features, out_features, activation_function=nn.Identity())  # pyright: ignore[reportArgumentType]


@dataclass(kw_only=True)
class Whitening:
    """The map as a step of a recipe.

    Args:
        max_texts: how many of the step's texts it is fitted to, drawn by `seed`.
        power: 1 whitens, 0 only centres, between them a part of the way.
        dim: keep so many directions, those of most variance; all by default.
        max_length: tokens; longer texts are cut.
        sif: first weigh tokens by how rare they are in the texts: a of `Encoder.weigh_tokens`, 1e-4 say.
    """

    max_texts: int = 6000
    power: float = 1.0
    dim: int | None = None
    sif: float | None = None
    max_length: int = 64
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise ValueError(f"Whitening.power is {self.power!r}; it must be in [0, 1]")
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"Whitening.dim is {self.dim!r}; it must be at least 1")
        if self.sif is not None and not self.sif > 0:
            raise ValueError(f"Whitening.sif is {self.sif!r}; it must be above 0")

    def weigh(self, encoder: Any, texts: Sequence[str]) -> None:
        """Weigh the encoder's tokens, where `sif` asks for it."""
        if self.sif is not None:
            encoder.weigh_tokens(texts, self.sif)

    def fit(self, encoder: SentenceTransformer, texts: Sequence[str], *, progress: bool = False) -> LinearMap:
        """Return the map of the encoder's vectors of `texts`, before they are normalised.

        Raises:
            ValueError: fewer texts than the vectors have dimensions, `dim` above those, or an empty text.
        """
        check_not_empty(texts)
        limit = encoder.max_seq_length
        encoder.max_seq_length = min(self.max_length, limit or self.max_length)
        drawn = np.random.default_rng(self.seed).permutation(len(texts))[: self.max_texts]
        try:
            with unnormalized(encoder):
                vectors = encoder.encode([texts[i] for i in drawn], show_progress_bar=progress)
        finally:
            encoder.max_seq_length = limit
        return whitening_map(vectors, self.power, self.dim)


@contextmanager
def unnormalized(encoder: SentenceTransformer) -> Iterator[None]:
    """The whole vectors without the normalisation at the encoder's end: what a map put before it gets."""
    last = encoder.pop(-1) if isinstance(encoder[-1], Normalize) else None
    try:
        with encoder.truncate_embeddings(None):
            yield
    finally:
        if last is not None:
            encoder.append(last)


def whitening_map(vectors: np.ndarray, power: float = 1.0, dim: int | None = None) -> LinearMap:
    """Fit the map to vectors (n, D), n at least D.

    Returns:
        A linear module D -> `dim` (default D), directions of most variance first; its outputs have a mean
        variance of 1 over the sample. Its weights ask for no gradient, and an encoder saves and loads it so:
        stages train what stands before it.
    """
    count, width = vectors.shape
    if count < width:
        raise DataError(f"whitening {width} dimensions needs at least as many texts; there are {count}")
    if (dim or 1) > width:
        raise ValueError(f"whitening: dim is {dim}; the vectors have {width} dimensions")
    mean = vectors.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(np.cov(vectors.T.astype(np.float64)))
    kept = slice(None, None, -1) if dim is None else slice(-1, -dim - 1, -1)
    variances, directions = variances[kept], directions[:, kept]
    if not variances[0] > 0:
        raise DataError("whitening needs texts that differ: all vectors are alike")
    scales = np.maximum(variances, FLOOR * variances[0]) ** (-power / 2)
    scales /= np.sqrt((variances * scales**2).mean())
    weight = (directions * scales).T
    module = LinearMap.empty(width, len(weight))
    module.linear.weight.data.copy_(torch.from_numpy(weight))
    module.linear.bias.data.copy_(torch.from_numpy(-weight @ mean))
    return module.requires_grad_(False)


def append_linear(encoder: SentenceTransformer, module: LinearMap) -> None:
    """Put a linear map at the encoder's end, before a normalisation; joined with one that stands there."""
    encoder._model_card_text = None  # that of what it was
    place = len(encoder) - isinstance(encoder[-1], Normalize)
    before = encoder[place - 1]
    if isinstance(before, Dense) and isinstance(before.activation_function, nn.Identity):
        inner, outer = deepcopy(before.linear), module.linear  # a failed stage puts the one before back
        joined = LinearMap.empty(inner.in_features, outer.out_features)
        weight, inner = outer.weight.data, inner.float().cpu()
        bias = torch.zeros(len(inner.weight)) if inner.bias is None else inner.bias.data
        joined.linear.weight.data = weight @ inner.weight.data
        joined.linear.bias.data = weight @ bias + outer.bias.data
        joined.requires_grad_(outer.weight.requires_grad)
        del encoder[place - 1]
        place, module = place - 1, joined
    encoder.insert(place, module.to(encoder.device, encoder.dtype))
