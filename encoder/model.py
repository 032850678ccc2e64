"""The text encoder: a decoder-only language model as a `SentenceTransformer`, bidirectional, packed, pruned.

`Encoder` adds three things to the library's class: conversion and pruning when a causal checkpoint is loaded,
packed execution (no padding token is ever computed) and saving that cannot leave a half-written model. All
else, prompts, evaluators, multi-process encoding, the trainer, the hub, is sentence-transformers' own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import batch_to_device, is_sentence_transformer_model, truncate_embeddings
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, GgufConfig

from uncausal.encoder import attention as packed_attention
from uncausal.encoder.conversion import assert_bidirectional, make_bidirectional
from uncausal.encoder.files import staged
from uncausal.encoder.linear import quantize_linear, use_onednn
from uncausal.encoder.pooling import LatentPooling
from uncausal.encoder.pruning import prune_layers

logger = logging.getLogger(__name__)

POOLING_MODES: dict[str, Any] = {"mean": "mean", "weighted_mean": "weightedmean", "last_token": "lasttoken"}
PoolingName = Literal["mean", "weighted_mean", "last_token", "latent"]
TEXT_ONLY: Any = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
LIBRARY_TRANSFORMER = f"{Transformer.__module__}.{Transformer.__name__}"
WINDOW = 8192  # texts tokenised ahead of the model


class PackedTransformer(Transformer):
    """sentence-transformers' Transformer whose text batches run as one row of T tokens without padding.

    It packs whenever the backbone uses this package's attention; with any other attention it is the library's
    module unchanged. It is saved under the library's name, so that a saved encoder needs nothing from here.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        use_onednn(self.model)

    def _can_flatten_inputs(self) -> bool:
        return (
            self.backend == "torch"
            and self.model.config._attn_implementation == packed_attention.NAME
            and list(self.modality_config) == ["text"]
        )

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Tokenise texts into model features: packed (1, T) with `cu_seq_lens_q`, or padded (B, L).

        Raises:
            ValueError: a text is empty, or nothing is left to pool once the prompt is excluded.
        """
        if not all(isinstance(text, str) for text in inputs):
            return super().preprocess(inputs, prompt=prompt, **kwargs)
        if not self.can_flatten_inputs or kwargs.get("processing_kwargs"):
            check_not_empty(inputs)
            return super().preprocess(inputs, prompt=prompt, **kwargs)
        ids, _ = self.tokenize_texts(inputs, prompt, kwargs.get("max_length"))
        return self.collate(ids, self._get_prompt_length(prompt) if prompt else None)

    def tokenize_texts(
        self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None
    ) -> tuple[list[list[int]], int]:
        """Return the token ids of every text, cut to the length limit, and how many texts were cut."""
        check_not_empty(texts)
        assert self.tokenizer is not None
        prompted = [prompt + text for text in texts] if prompt else list(texts)
        limit = max_length or self.max_seq_length or sys.maxsize
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
        ids = self.tokenizer(prompted, truncation=True, max_length=limit, **options)["input_ids"]
        at_limit = [text for text, tokens in zip(prompted, ids, strict=True) if len(tokens) == limit]
        full = self.tokenizer(at_limit, verbose=False, **options)["input_ids"] if at_limit else []
        prompt_length = (self._get_prompt_length(prompt) or 0) if prompt else 0
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) <= prompt_length:
                raise ValueError(
                    f"no token of {text!r} is left to pool: {len(tokens)} tokens, {prompt_length} of them "
                    f"the prompt's, limit {limit}. Raise max_seq_length or shorten the prompt."
                )
        return ids, sum(len(tokens) > limit for tokens in full)

    def collate(self, ids: Sequence[Sequence[int]], prompt_length: int | None = None) -> dict[str, Any]:
        """Lay B token lists end to end: `input_ids` and `position_ids` (1, T), `cu_seq_lens_q` (B + 1,)."""
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        ends = lengths.cumsum()
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        cu_seqlens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in ids]))[
                None
            ],
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
            "modality": "text",
        }
        if prompt_length is not None:
            features["prompt_length"] = prompt_length
        return features


class Encoder(SentenceTransformer):
    """A decoder-only language model as a text encoder; see `Encoder.from_pretrained`.

    `Encoder(path)` loads a saved encoder as `SentenceTransformer(path)` does.
    """

    _quantized = False
    _module_classes = {
        LIBRARY_TRANSFORMER: PackedTransformer,
        f"{LatentPooling.__module__}.{LatentPooling.__name__}": LatentPooling,
    }

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        pooling: PoolingName | None = None,
        bidirectional: bool | None = None,
        num_layers: int | None = None,
        attention: Literal["auto", "uncausal", "sdpa", "eager"] | str = "auto",
        gguf_file: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        normalize: bool = False,
        max_seq_length: int | None = None,
        **kwargs: Any,
    ) -> Encoder:
        """Load a causal checkpoint, or a saved encoder, as an encoder.

        Args:
            name_or_path: Hugging Face id, a model folder, or a folder or file of GGUF weights.
            pooling: "mean" (default), "weighted_mean" (weights 1..n), "last_token" or "latent" (NV-Embed). A
                saved encoder keeps its own unless told otherwise.
            bidirectional: True (default) lets every token see every other and proves it on the loaded model;
                False keeps causal attention. A saved encoder keeps its own mode.
            num_layers: keep only the first so many decoder layers (see `uncausal.l3prune`).
            attention: "auto" and "uncausal" are this package's packed attention, "sdpa" and "eager" torch's.
            gguf_file: name of the GGUF file inside the folder `name_or_path`; its weights are dequantised.
            dtype: "auto" is bfloat16 where the hardware multiplies it, else float32.
            device: as in torch; default: the best available one.
            normalize: append a layer that scales vectors to length 1.
            max_seq_length: limit in tokens; longer texts are cut, with a warning that counts them.
            **kwargs: passed to transformers as the weights are loaded (revision, token, trust_remote_code).

        Raises:
            FileNotFoundError: no model of that name.
            ValueError: the model stays causal (the message names the layer), or an argument is wrong.
        """
        if pooling is not None and pooling not in (*POOLING_MODES, "latent"):
            raise ValueError(f"pooling {pooling!r} is unknown: choose one of {[*POOLING_MODES, 'latent']}")
        path = Path(name_or_path)
        if path.is_file() and path.suffix == ".gguf":
            path, gguf_file = path.parent, path.name
        kwargs["dtype"] = resolve_dtype(dtype, device)
        kwargs["attn_implementation"] = packed_attention.NAME if attention == "auto" else attention
        with _located(path if path.exists() else str(name_or_path), gguf_file) as source:
            saved = gguf_file is None and is_sentence_transformer_model(source)
            if saved:
                encoder = cls(source, device=device, model_kwargs=kwargs)
            else:
                transformer = PackedTransformer(
                    source,
                    model_kwargs=kwargs,
                    modality_config=TEXT_ONLY,
                    module_output_name="token_embeddings",
                )
                transformer.config._name_or_path = str(name_or_path)
                encoder = cls(
                    modules=[transformer, Pooling(transformer.get_embedding_dimension())], device=device
                )
        model = encoder.backbone
        if bidirectional or (bidirectional is None and not saved):
            make_bidirectional(model)
            assert_bidirectional(model)
        elif bidirectional is False and getattr(model.config, "is_causal", None) is False:
            raise ValueError(f"{name_or_path} was saved bidirectional and cannot be made causal again")
        if num_layers is not None:
            encoder.prune(num_layers)
        if pooling is not None or not saved:
            encoder.set_pooling(pooling or "mean")
        if normalize and not isinstance(encoder._last_module(), Normalize):
            encoder.append(Normalize())
        if max_seq_length is not None:
            encoder.max_seq_length = max_seq_length
        return encoder

    @property
    def transformer(self) -> Any:
        """The first module, a `PackedTransformer`."""
        return self[0]

    @property
    def backbone(self) -> Any:
        """The headless Hugging Face model."""
        return self.transformer.model

    @property
    def packed(self) -> bool:
        """Whether batches run without padding."""
        return isinstance(self.transformer, PackedTransformer) and self.transformer.can_flatten_inputs

    @property
    def pooling(self) -> str:
        """The name of the pooling, as given to `from_pretrained`."""
        if isinstance(self[1], LatentPooling):
            return "latent"
        mode = getattr(self[1], "pooling_mode", None)
        return next((name for name, library in POOLING_MODES.items() if library == mode), str(mode))

    def set_pooling(self, pooling: PoolingName) -> None:
        """Replace the pooling. Prompt tokens are attended but never pooled."""
        width = self.transformer.get_embedding_dimension()
        if pooling == "latent":
            module = LatentPooling(width, include_prompt=False)
        else:
            module = Pooling(width, POOLING_MODES[pooling], include_prompt=False)
        self[1] = module.to(self.device)

    def prune(self, num_layers: int) -> None:
        """Keep the first `num_layers` decoder layers (L3Prune's manual mode)."""
        prune_layers(self.backbone, num_layers)

    def quantize(self) -> None:
        """Turn most of the backbone's weights to int8 for serving on a CPU; the rest becomes float32.

        What it gains in speed and costs in quality is in `bench/RESULTS.md`. The encoder can no longer be
        trained or saved.

        Raises:
            ValueError: the encoder is not on a CPU, or this build of torch has no int8 products.
        """
        quantize_linear(self.float().backbone, self.backbone.config.hidden_size)
        self.requires_grad_(False)
        self._quantized = True

    def get_model_kwargs(self) -> list[str]:
        return [*super().get_model_kwargs(), "batch_tokens"]

    @contextmanager
    def padded(self) -> Iterator[None]:
        """Run batches padded for a while, as the library does."""
        transformer = self.transformer
        packed, transformer.can_flatten_inputs = transformer.can_flatten_inputs, False
        try:
            yield
        finally:
            transformer.can_flatten_inputs = packed

    @torch.inference_mode()
    def _inference(self, inputs: list, *, batch_tokens: int | None = None, **options: Any) -> Any:
        """Encode texts sorted by length in batches of at most `batch_tokens` tokens, without padding."""
        texts_only = all(isinstance(text, str) for text in inputs) and not options.get("processing_kwargs")
        if not self.packed or not texts_only or options["output_value"] != "sentence_embedding":
            if not self.packed:
                return super()._inference(inputs, **options)
            with self.padded():
                return super()._inference(inputs, **options)
        device = self._resolve_inference_device(options.get("device"))
        prompt, transformer = options["prompt"], self.transformer
        prompt_length = transformer._get_prompt_length(prompt) if prompt else None
        budget = batch_tokens or (1024 if device.type == "cpu" else 16384)
        self.eval()
        vectors: list[torch.Tensor] = [torch.empty(0)] * len(inputs)
        cut = 0
        windows = range(0, len(inputs), WINDOW)
        progress = tqdm(
            total=len(inputs), desc="Encoding", unit="text", disable=not options["show_progress_bar"]
        )
        with progress, ThreadPoolExecutor(max_workers=1) as ahead:
            pending = [
                ahead.submit(transformer.tokenize_texts, inputs[s : s + WINDOW], prompt) for s in windows[:1]
            ]
            for start in windows:
                ids, cut_here = pending.pop().result()
                cut += cut_here
                following = inputs[start + WINDOW : start + 2 * WINDOW]
                if following:
                    pending.append(ahead.submit(transformer.tokenize_texts, following, prompt))
                for batch in token_batches([len(row) for row in ids], budget):
                    features = transformer.collate([ids[i] for i in batch], prompt_length)
                    embeddings = self(batch_to_device(features, device))["sentence_embedding"]
                    if options["truncate_dim"] is not None:
                        embeddings = truncate_embeddings(embeddings, options["truncate_dim"])
                    if options["normalize_embeddings"]:
                        embeddings = F.normalize(embeddings, dim=1)
                    if options["save_to_cpu"]:
                        embeddings = embeddings.cpu()
                    for i, vector in zip(batch, embeddings, strict=True):
                        vectors[start + i] = vector
                    progress.update(len(batch))
        if cut:
            logger.warning(
                "%d of %d texts were longer than %d tokens and were cut",
                cut,
                len(inputs),
                self.max_seq_length,
            )
        return torch.stack(vectors) if vectors else torch.tensor([], device=device)

    def save(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save so that plain `SentenceTransformer(path)` loads it (latent pooling needs this package).

        Files are written beside `path` and moved in when all are complete: a full disk or Ctrl-C leaves an
        earlier save as it was.

        Raises:
            ValueError: the weights are int8.
        """
        if self._quantized:
            raise ValueError("int8 weights are not saved: save before quantize(), and quantize when serving")
        with staged(Path(path)) as staging:
            super().save(str(staging), *args, **kwargs)
            modules = json.loads((staging / "modules.json").read_text())
            modules[0]["type"] = LIBRARY_TRANSFORMER
            (staging / "modules.json").write_text(json.dumps(modules, indent=2))


def resolve_dtype(dtype: str | torch.dtype, device: str | None = None) -> torch.dtype:
    """Return the torch dtype of a name; "auto" is bfloat16 where the hardware multiplies it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if torch.cuda.is_available() and device != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def check_not_empty(texts: Sequence[str]) -> None:
    """Raise ValueError naming the first text that has nothing to encode."""
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(
                f"text {index} is empty ({text!r}): there is no token to pool; remove it or fill it in"
            )


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices, longest first, into batches of at most `budget` tokens (a longer text stands alone)."""
    batches: list[list[int]] = []
    room = -1
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches


@contextmanager
def _located(source: str | Path, gguf_file: str | None) -> Iterator[str]:
    """Yield a model id or folder that transformers loads; GGUF weights are first written as a folder."""
    if isinstance(source, str) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"no model at {source!r}: give a folder, a .gguf file or a Hugging Face id")
    if gguf_file is None:
        try:
            yield str(source)
        except OSError as error:
            if isinstance(source, Path):
                raise
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"no model {source!r}: not a folder here, and {reason}") from error
        return
    try:
        config = GgufConfig(dequantize=True)
        model = AutoModel.from_pretrained(
            source, gguf_file=gguf_file, quantization_config=config, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{gguf_file}: transformers cannot read this GGUF ({error})") from error
    # save_pretrained refuses a model that still claims to be quantised.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        yield folder
