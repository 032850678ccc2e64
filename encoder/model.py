"""The text encoder: a decoder-only language model as a `SentenceTransformer`, bidirectional, packed, pruned.

`Encoder` adds three things to the library's class: conversion and pruning when a causal checkpoint is loaded,
packed execution (no padding token is ever computed) and saving that cannot leave a half-written model. All
else, prompts, evaluators, multi-process encoding, the trainer, the hub, is sentence-transformers' own.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import is_sentence_transformer_model, truncate_embeddings
from tqdm.auto import tqdm

from uncausal.encoder import attention as packed_attention
from uncausal.encoder.batching import iter_encode
from uncausal.encoder.conversion import assert_bidirectional, make_bidirectional
from uncausal.encoder.files import staged
from uncausal.encoder.inputs import PackedTransformer
from uncausal.encoder.layers import decoder_layers
from uncausal.encoder.linear import quantize_linear
from uncausal.encoder.loading import located, resolve_dtype
from uncausal.encoder.pooling import POOLING_MODES, LatentPooling, PoolingName, make_pooling, pooling_name
from uncausal.encoder.pruning import prune_layers

logger = logging.getLogger(__name__)

TEXT_ONLY: Any = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
LIBRARY_TRANSFORMER = f"{Transformer.__module__}.{Transformer.__name__}"


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
        with located(path if path.exists() else str(name_or_path), gguf_file) as source:
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
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(decoder_layers(self.backbone))

    @property
    def packed(self) -> bool:
        """Whether batches run without padding."""
        return isinstance(self.transformer, PackedTransformer) and self.transformer.can_flatten_inputs

    @property
    def pooling(self) -> str:
        """The name of the pooling, as given to `from_pretrained`."""
        return pooling_name(self[1])

    def set_pooling(self, pooling: PoolingName) -> None:
        """Replace the pooling. Prompt tokens are attended but never pooled."""
        self[1] = make_pooling(pooling, self.transformer.get_embedding_dimension()).to(self.device)

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
        vectors: list[torch.Tensor] = [torch.empty(0)] * len(inputs)
        cut = 0
        bar = tqdm(total=len(inputs), desc="Encoding", unit="text", disable=not options["show_progress_bar"])
        batches = iter_encode(
            self, inputs, prompt=options["prompt"], batch_tokens=batch_tokens, device=device
        )
        with bar:
            for batch in batches:
                embeddings = batch.vectors
                if options["truncate_dim"] is not None:
                    embeddings = truncate_embeddings(embeddings, options["truncate_dim"])
                if options["normalize_embeddings"]:
                    embeddings = F.normalize(embeddings, dim=1)
                if options["save_to_cpu"]:
                    embeddings = embeddings.cpu()
                for index, vector in zip(batch.indices, embeddings, strict=True):
                    vectors[index] = vector
                cut += batch.num_truncated
                bar.update(len(batch.indices))
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
