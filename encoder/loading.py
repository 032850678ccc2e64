"""From a name to weights: a model of the hub, a folder, a GGUF file, or a saved encoder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, GgufConfig


def resolve_dtype(dtype: str | torch.dtype, device: str | None = None) -> torch.dtype:
    """Return the torch dtype of a name; "auto" is bfloat16 where the hardware multiplies it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if torch.cuda.is_available() and device != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


@contextmanager
def located(source: str | Path, gguf_file: str | None) -> Iterator[str]:
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
