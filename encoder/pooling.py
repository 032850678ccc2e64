"""Pooling of packed hidden states: mean, weighted mean, last token, and NV-Embed's latent attention layer."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from sentence_transformers.base.modules.module import Module
from sentence_transformers.sentence_transformer import modules as library
from torch import Tensor
from torch.nn.functional import pad

from uncausal.kernels.latent_pooling import LatentAttentionPooling
from uncausal.kernels.packing import PackedLayout

POOLING_MODES: dict[str, Any] = {"mean": "mean", "weighted_mean": "weightedmean", "last_token": "lasttoken"}
PoolingName = Literal["mean", "weighted_mean", "last_token", "latent"]
PACKED_MODES = tuple(POOLING_MODES.values())


def make_pooling(name: str, width: int) -> "Pooling | LatentPooling":
    """Return the pooling module of that name for token states of `width` features.

    Prompt tokens are attended but never pooled.

    Raises:
        ValueError: no pooling of that name.
    """
    if name == "latent":
        return LatentPooling(width, include_prompt=False)
    if name not in POOLING_MODES:
        raise ValueError(f"pooling {name!r} is unknown: choose one of {[*POOLING_MODES, 'latent']}")
    return Pooling(width, POOLING_MODES[name], include_prompt=False)


def pooling_name(module: Any) -> str:
    """Return the name that `make_pooling` knows a pooling module by, or the library's own name for it.

    Of token weights it is "sif": the mean that follows them is weighed by them.
    """
    if isinstance(module, LatentPooling | TokenWeights):
        return "latent" if isinstance(module, LatentPooling) else "sif"
    mode = getattr(module, "pooling_mode", None)
    return next((name for name, library in POOLING_MODES.items() if library == mode), str(mode))


def pool_packed(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str = "mean",
    prompt_lengths: int | Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Pool packed token states into one vector a sequence, as sentence-transformers does on padded ones.

    Its `Pooling` also reads packed states, but knows one prompt length for the whole batch and answers a
    sequence without tokens with zeros or with its neighbour's last token.

    Args:
        hidden: (T, d) floating, the tokens of all sequences in order; half precision is summed in fp32.
        cu_seqlens: (B + 1,) integer, cumulative lengths from 0 to T; kept on the CPU they cost no
            synchronisation.
        mode: "mean", "weightedmean" (SGPT, arXiv 2202.08904: weights 1, 2, ... by position) or "lasttoken".
        prompt_lengths: leading tokens of each sequence to leave out, one number or (B,); positions still
            count from the sequence's own start.
        weights: (T,) floating, further weights of the tokens in a mean; positive.

    Returns:
        (B, d) in the dtype of `hidden`.

    Raises:
        ValueError: for an unknown mode, lengths that do not add up, or a sequence with no token to pool.
    """
    if mode not in PACKED_MODES:
        raise ValueError(f"mode must be one of {PACKED_MODES}, got {mode!r}")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (tokens, features), got {tuple(hidden.shape)}")
    lengths, skipped = checked_lengths(cu_seqlens, hidden.shape[0], prompt_lengths)
    if mode == "lasttoken":
        return hidden[(cu_seqlens[1:] - 1).to(hidden.device)]

    dtype = torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else hidden.dtype
    counted = token_weights(cu_seqlens, hidden.shape[0], skipped, mode).to(hidden.device, dtype)
    weights = counted if weights is None else counted * weights.to(dtype)
    lengths = lengths.to(hidden.device)
    # segment_reduce adds in the order of the tokens on every device; index_add would use atomics on a GPU.
    # lengths were checked above, and need not be once more on the device
    total = torch.segment_reduce(hidden * weights[:, None], "sum", lengths=lengths, axis=0, unsafe=True)
    weight = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
    return (total / weight[:, None]).to(hidden.dtype)


def checked_lengths(
    cu_seqlens: Tensor, tokens: int, prompt_lengths: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turn cumulative lengths into lengths, and make sure that every sequence keeps a token to pool.

    Args:
        cu_seqlens: (B + 1,) integer, cumulative lengths.
        tokens: T, which the last entry must equal.
        prompt_lengths: leading tokens left out, one number or (B,).

    Returns:
        Lengths (B,) and prompt lengths (B,), both int64 on the device of `cu_seqlens`.

    Raises:
        ValueError: naming the sequence that has no token, or none behind its prompt.
    """
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    skipped = (
        torch.as_tensor(0 if prompt_lengths is None else prompt_lengths).to(cu_seqlens).expand_as(lengths)
    )
    ends_right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)
    if not bool(ends_right & (lengths > skipped).all()):
        if not bool(ends_right):
            raise ValueError(f"cu_seqlens must run from 0 to {tokens}, got {cu_seqlens.tolist()}")
        row = int((lengths <= skipped).nonzero()[0])
        counts = f"{int(lengths[row])} tokens, {int(skipped[row])} of them prompt"
        raise ValueError(f"sequence {row} has no token to pool: {counts}")
    return lengths, skipped


def token_weights(cu_seqlens: Tensor, tokens: int, skipped: Tensor, mode: str = "mean") -> Tensor:
    """Give each packed token its weight in the mean: 0 in the prompt, else 1 or its position counted from 1.

    Args:
        cu_seqlens: (B + 1,) integer, cumulative lengths.
        tokens: T.
        skipped: (B,) leading tokens of each sequence without weight.
        mode: "mean" or "weightedmean".

    Returns:
        (T,) int64.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    repeat = lambda values: torch.repeat_interleave(values, lengths, output_size=tokens)  # noqa: E731
    position = torch.arange(tokens, device=cu_seqlens.device) - repeat(starts)
    weights = position + 1 if mode == "weightedmean" else torch.ones_like(position)
    return weights * (position >= repeat(skipped))


class Pooling(library.Pooling):
    """sentence-transformers' Pooling, where every text may have a prompt of its own length.

    It reads `prompt_mask`, true at the tokens left out, beside the library's features, and is saved under the
    library's name.
    """

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        """Write `sentence_embedding` (B, d) into the features.

        Raises:
            ValueError: for a sequence with no token, or none behind its prompt.
            NotImplementedError: prompts of several lengths for a mode that has no packed form ("cls", "max").
        """
        weights: Tensor | None = features.get("token_weights")
        lengths = None if self.include_prompt else prompt_lengths(features)
        if weights is None and (lengths is None or "prompt_mask" not in features):
            return super().forward(features, **kwargs)
        if self.pooling_mode not in PACKED_MODES:
            assert lengths is not None
            if bool((lengths != lengths[0]).any()):
                raise NotImplementedError(f"pooling {self.pooling_mode!r} takes one length of prompt a batch")
            return super().forward({**features, "prompt_length": int(lengths[0])}, **kwargs)
        if weights is not None:
            weights, _ = _packed({**features, "token_embeddings": weights[..., None]})
            weights = weights[:, 0]
        hidden, cu_seqlens = _packed(features)
        features["sentence_embedding"] = pool_packed(
            hidden, cu_seqlens, str(self.pooling_mode), lengths, weights
        )
        return features


class TokenWeights(library.WordWeights):
    """A weight for every token of the vocabulary, by which the mean behind it weighs the token's state.

    It writes `token_weights`, of the shape of `input_ids`, into the features. It is saved under the name of
    the library's module, which weighs padded states in the same way.
    """

    def __init__(self, vocab: list[str], word_weights: dict[str, float], unknown_word_weight: float = 1):
        super().__init__(vocab, word_weights, unknown_word_weight)
        self.requires_grad_(False)

    @classmethod
    def sif(cls, tokenizer: Any, texts: Sequence[str], a: float = 1e-4) -> "TokenWeights":
        """Weights a / (a + p), where p is a token's share of all tokens of `texts`.

        That is smooth inverse frequency (SIF; Arora, Liang and Ma, ICLR 2017, section 3). A token that the
        texts lack counts as half a one; those that the tokenizer adds to a text count as they are pooled.

        Raises:
            ValueError: a is not above 0.
        """
        if not a > 0:
            raise ValueError(f"SIF's a is {a!r}; it must be above 0")
        counts: Counter[int] = Counter()
        for start in range(0, len(texts), 1000):
            for ids in tokenizer(list(texts[start : start + 1000]))["input_ids"]:
                counts.update(ids)
        named = {index: token for token, index in tokenizer.get_vocab().items()}
        vocab = [named.get(i, f"<no token {i}>") for i in range(max(named) + 1)]
        total = max(sum(counts.values()), 1)
        return cls(vocab, {v: a / (a + (counts[i] or 0.5) / total) for i, v in enumerate(vocab)})

    def __repr__(self) -> str:
        return f"TokenWeights({len(self.vocab)} tokens)"  # the library prints them all, in the model card too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TokenWeights":
        """Stay float32, as what is saved is, whatever the encoder is cast to."""
        return super()._apply(_never_rounded(fn), recurse)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["token_weights"] = self.emb_layer(features["input_ids"]).squeeze(-1)
        return features


def prompt_lengths(features: dict[str, Any]) -> Tensor | None:
    """Return how many leading tokens of each text are its prompt's, (B,), or one number for all, or None."""
    mask = features.get("prompt_mask")
    if mask is None:
        return None if "prompt_length" not in features else torch.as_tensor(features["prompt_length"])
    if "cu_seq_lens_q" not in features:
        return mask.sum(1)
    return pad(mask.flatten().cumsum(0), (1, 0))[features["cu_seq_lens_q"].long()].diff()


class LatentPooling(Module):
    """NV-Embed's latent attention layer as a sentence-transformers module, in the place of `Pooling`.

    It reads `token_embeddings` with `attention_mask`, or packed with `cu_seq_lens_q`, and writes
    `sentence_embedding`. Its parameters stay in fp32 under a half-precision transformer. Prompt tokens that
    are left out are not computed either.

    Args:
        embedding_dimension: d, of the tokens and of the result.
        pooling_mode: "mean" or "weightedmean" of what the layer makes of each token.
        include_prompt: False leaves out the prompt's tokens, as NV-Embed trains and runs.
        released_prompt_mask: with `include_prompt=False`, pool the prompt's last token all the same; the
            released code counts the instruction without the begin token that stands before it.
        layer: further arguments of `uncausal.kernels.latent_pooling.LatentAttentionPooling`.
    """

    config_keys = ["embedding_dimension", "pooling_mode", "include_prompt", "released_prompt_mask", "layer"]

    def __init__(
        self,
        embedding_dimension: int,
        pooling_mode: str = "mean",
        include_prompt: bool = True,
        released_prompt_mask: bool = False,
        layer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pooling_mode not in ("mean", "weightedmean"):
            raise ValueError(f"pooling_mode must be 'mean' or 'weightedmean', got {pooling_mode!r}")
        self.embedding_dimension, self.pooling_mode = embedding_dimension, pooling_mode
        self.include_prompt, self.released_prompt_mask = include_prompt, released_prompt_mask
        self.layer = dict(layer or {})
        self.latent_attention_model = LatentAttentionPooling(embedding_dimension, **self.layer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LatentPooling":
        """Follow the encoder from device to device, but not into half precision, where the library casts it.

        The layer multiplies by products of its parameters, which are rounded once; of rounded ones they are
        others.
        """
        return super()._apply(_never_rounded(fn), recurse)

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        """Write `sentence_embedding` (B, d) into the features.

        Raises:
            ValueError: for a sequence with no token, or none behind its prompt.
        """
        hidden, cu_seqlens = _packed(features)
        skipped = self._prompt_lengths(features)
        lengths, skipped = checked_lengths(cu_seqlens, hidden.shape[0], skipped)
        weights = token_weights(cu_seqlens, hidden.shape[0], skipped, self.pooling_mode)
        if bool(skipped.any()):  # tokens do not see each other here: what is not pooled need not be computed
            kept = weights > 0
            hidden, weights = hidden[kept.to(hidden.device)], weights[kept]
            cu_seqlens = torch.cat([cu_seqlens[:1], (lengths - skipped).cumsum(0).to(cu_seqlens.dtype)])
        equal = self.pooling_mode == "mean"
        features["sentence_embedding"] = self.latent_attention_model(
            hidden, cu_seqlens.to(hidden.device), token_weights=None if equal else weights.to(hidden.device)
        )
        return features

    def _prompt_lengths(self, features: dict[str, Any]) -> int | Tensor | None:
        lengths = None if self.include_prompt else prompt_lengths(features)
        return (lengths - 1).clamp(min=0) if lengths is not None and self.released_prompt_mask else lengths

    def get_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def save(self, output_path: str, *args, safe_serialization: bool = True, **kwargs) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **kwargs,
    ) -> "LatentPooling":
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        module = cls(**cls.load_config(model_name_or_path, **where))
        if cls.load_file_path(model_name_or_path, filename="model.safetensors", **where) is None:
            raise ValueError(
                f"no model.safetensors in {model_name_or_path}/{subfolder}: nothing is unpickled"
            )
        cls.load_torch_weights(model_name_or_path, model=module, **where)
        return module


def _never_rounded(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves a tensor as `fn` does, but not into half precision."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if result.dtype in (torch.float16, torch.bfloat16) else result

    return moved


def _packed(features: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token states (T, d) and their cumulative lengths, from packed or from padded features."""
    hidden, mask = features["token_embeddings"], features.get("attention_mask")
    if "cu_seq_lens_q" in features:
        return hidden.flatten(0, -2), features["cu_seq_lens_q"]
    if mask is None or mask.shape[-1] != hidden.shape[1]:
        mask = torch.ones(hidden.shape[:-1], device=hidden.device, dtype=torch.bool)
    layout = PackedLayout.from_mask(mask)
    return hidden.flatten(0, 1)[layout.indices], layout.cu_seqlens
