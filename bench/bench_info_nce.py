"""In-batch InfoNCE against plain torch, sentence-transformers and the GPU libraries: time and peak memory.

Forward and backward of normalised embeddings; providers interleaved in one process, after a correctness gate.
`python -m uncausal.bench.bench_info_nce [--shape 8192x576 ...] [--device cuda --dtype bfloat16]` times;
`--memory 8192 131072` measures the memory beyond inputs and gradients at batches doubling from one to the
other, each in a process of its own, and `--plot FILE` draws it; `--cached` trains a small model with the
cached form and without.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from uncausal.kernels.info_nce import info_nce

TEMPERATURE = 0.05
Provider = Callable[[Tensor, Tensor], Tensor]


def plain_torch(query: Tensor, key: Tensor) -> Tensor:
    # The temperature on the queries, not on the logits: the fastest way to write it.
    logits = (F.normalize(query, dim=-1) / TEMPERATURE) @ F.normalize(key, dim=-1).T
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def uncausal(query: Tensor, key: Tensor) -> Tensor:
    return info_nce(query, key, temperature=TEMPERATURE)


def _sentence_transformers() -> dict[str, Provider]:
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    model = torch.nn.Sequential(torch.nn.Identity())  # only the loss stage runs
    plain = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)  # pyright: ignore[reportArgumentType]
    cached = CachedMultipleNegativesRankingLoss(
        model,  # pyright: ignore[reportArgumentType]
        scale=1 / TEMPERATURE,
        mini_batch_size=256,
    )
    none = torch.empty(0)
    return {
        "sentence-transformers": lambda q, k: plain.compute_loss_from_embeddings([q, k], none),
        "sentence-transformers cached": lambda q, k: cached.calculate_loss([[q], [k]], with_backward=True),
    }


def _inf_cl() -> dict[str, Provider]:
    from inf_cl import cal_inf_loss  # pyright: ignore[reportMissingImports]

    def loss(query: Tensor, key: Tensor) -> Tensor:
        scale = torch.tensor(1 / TEMPERATURE, device=query.device)
        return cal_inf_loss(F.normalize(query, dim=-1), F.normalize(key, dim=-1), scale=scale)

    return {"inf-cl": loss}


def _memeff() -> dict[str, Provider]:
    from memeff.infonce import InfoNCELoss  # pyright: ignore[reportMissingImports]

    loss = InfoNCELoss(temperature=TEMPERATURE)
    return {"memeff": lambda q, k: loss(F.normalize(q, dim=-1), F.normalize(k, dim=-1))}


def providers(device: str) -> dict[str, Provider | None]:
    """Name -> loss; None for a peer that is not installed."""
    found: dict[str, Provider | None] = {"torch": plain_torch, "uncausal": uncausal}
    peers = {"sentence-transformers": _sentence_transformers}
    if device == "cuda":
        peers |= {"inf-cl": _inf_cl, "memeff": _memeff}
    for name, load in peers.items():
        try:
            found |= load()
        except ImportError:
            found[name] = None
    return found


def make(batch: int, dim: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings whose positives are similar, as in training."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(batch, dim, generator=generator)
    query = torch.randn(batch, dim, generator=generator).add_(key)
    return query.to(device, dtype).requires_grad_(), key.to(device, dtype).requires_grad_()


def step(provider: Provider, query: Tensor, key: Tensor) -> float:
    query.grad = key.grad = None
    loss = provider(query, key)
    if loss.requires_grad:  # the cached loss has already gone backward
        loss.backward()
    return loss.item()


def check(provider: Provider, device: str, dtype: torch.dtype) -> None:
    """A gate, since a wrong answer has no speed."""
    query, key = make(500, 64, device, dtype)
    loss = step(provider, query, key)
    wide_query, wide_key = make(500, 64, device, torch.float64)
    expected = step(plain_torch, wide_query, wide_key)
    assert query.grad is not None and wide_query.grad is not None
    error = (query.grad.double() - wide_query.grad).norm() / wide_query.grad.norm()
    bound = {torch.float32: 1e-3}.get(dtype, 0.05)  # GPU libraries multiply in TF32
    assert abs(loss - expected) < bound * expected, f"loss {loss}, expected {expected}"
    assert error < bound, f"relative gradient error {float(error):.3g}"


def bench(batch: int, dim: int, args: argparse.Namespace) -> list[dict]:
    """Median, 20th and 80th percentile of forward and backward, in seconds."""
    query, key = make(batch, dim, args.device, args.dtype)
    chosen, records, times = {}, [], {}
    for name, provider in providers(args.device).items():
        if args.only and name not in args.only:
            continue
        if provider is None:
            print(f"{name:>30}  not installed")
            continue
        check(provider, args.device, args.dtype)
        chosen[name], times[name] = provider, []
    for _ in range(args.repeats):
        for name, provider in chosen.items():
            start = time.perf_counter()
            step(provider, query, key)  # item() waits for the device
            times[name].append(time.perf_counter() - start)
    for name, measured in times.items():
        p20, median, p80 = _quantiles(measured)
        rate = 6 * batch * batch * dim / median / 1e9
        records.append(
            dict(name=name, batch=batch, dim=dim, seconds=median, p20=p20, p80=p80, gflops=round(rate, 1))
        )
        ratio = median / statistics.median(times["torch"]) if "torch" in times else float("nan")
        print(
            f"{name:>30}  {median:8.3f} s  [{p20:.3f}, {p80:.3f}]  {rate:7.1f} GFLOP/s  {ratio:.3f} x torch"
        )
    return records


def _quantiles(measured: list[float]) -> tuple[float, float, float]:
    if len(measured) < 2:
        return measured[0], measured[0], measured[0]
    fifths = statistics.quantiles(measured, n=5, method="inclusive")
    return fifths[0], statistics.median(measured), fifths[3]


def peak_bytes(provider: Provider, batch: int, dim: int, device: str, dtype: torch.dtype) -> int:
    """Peak memory of a step beyond the inputs and their gradients. On a CPU, call it in a fresh process."""
    query, key = make(batch, dim, device, dtype)
    gradients = 2 * query.numel() * query.element_size()
    if device == "cuda":
        step(provider, *make(64, dim, device, dtype))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(provider, query, key)
        return torch.cuda.max_memory_allocated() - before - gradients
    step(provider, *make(64, dim, device, dtype))  # libraries allocate their buffers
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    step(provider, query, key)
    return _status("VmHWM") - before - gradients


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def memory(args: argparse.Namespace) -> list[dict]:
    """Peak memory at doubling batches, a process for each."""
    low, high = args.memory
    batches, records = [low], []
    while batches[-1] < high:
        batches.append(2 * batches[-1])
    for batch in batches:
        command = [sys.executable, "-m", "uncausal.bench.bench_info_nce", "--peak", f"{batch}x{args.dim}"]
        command += ["--device", args.device, "--dtype", str(args.dtype).removeprefix("torch.")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        records.append(
            dict(name="uncausal", batch=batch, dim=args.dim, extra_bytes=int(done.stdout.split()[-1]))
        )
        print(f"B={batch:>7} D={args.dim}: {records[-1]['extra_bytes'] / 2**20:8.1f} MiB", flush=True)
    return records


def plot(records: list[dict], path: str) -> None:
    """Measured memory, and what the B x B logits alone would take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = [r["batch"] for r in records]
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.loglog(batches, [r["extra_bytes"] / 2**20 for r in records], "o-", label="uncausal, measured")
    axes.loglog(batches, [b * b * 4 / 2**20 for b in batches], "--", label="one B x B matrix of logits, fp32")
    axes.set(
        xlabel="batch B", ylabel="MiB beyond inputs and gradients", title=f"InfoNCE, D = {records[0]['dim']}"
    )
    axes.set_xticks(batches, [f"{b:,}" for b in batches], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


class _SmallModel(torch.nn.Module):
    """A Llama of random weights with mean pooling: what surrounds the loss in training."""

    def __init__(self):
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        self.model = LlamaModel(config)

    def forward(self, features: dict) -> dict:
        states = self.model(features["input_ids"], attention_mask=features["attention_mask"])[0]
        return features | {"sentence_embedding": states.mean(1)}


def cached(args: argparse.Namespace) -> list[dict]:
    """Seconds of a training step of 64 pairs of 32 tokens: uncached, and cached in mini-batches of 16."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from uncausal.encoder.losses import InfoNCELoss

    torch.manual_seed(0)
    model = SentenceTransformer(modules=[_SmallModel()], device=args.device).train()
    ids = torch.randint(0, 1000, (2, 64, 32), device=args.device)
    features = [dict(input_ids=x, attention_mask=torch.ones_like(x)) for x in ids]
    losses = {
        "uncached": InfoNCELoss(model),
        "cached": InfoNCELoss(model, mini_batch_size=16),
        "sentence-transformers cached": CachedMultipleNegativesRankingLoss(model, mini_batch_size=16),
    }
    times: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(args.repeats + 1):
        for name, loss in losses.items():
            model.zero_grad()
            start = time.perf_counter()
            value = loss([dict(f) for f in features], None)  # pyright: ignore[reportArgumentType]
            value.backward()
            value.item()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    records = []
    for name, measured in times.items():
        p20, median, p80 = _quantiles(measured)
        ratio = median / statistics.median(times["uncached"])
        records.append(dict(name=name, seconds=median, p20=p20, p80=p80, ratio=round(ratio, 3)))
        print(f"{name:>30}  {median:8.3f} s  [{p20:.3f}, {p80:.3f}]  {ratio:.3f} x uncached")
    return records


def _shape(text: str) -> tuple[int, int]:
    batch, dim = text.split("x")
    return int(batch), int(dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=_shape, nargs="+", default=[(8192, 576), (32768, 256)], help="BxD")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="providers by name")
    parser.add_argument("--memory", type=int, nargs=2, metavar=("LOW", "HIGH"))
    parser.add_argument("--dim", type=int, default=256, help="of --memory")
    parser.add_argument("--cached", action="store_true", help="training steps with the cached form")
    parser.add_argument("--peak", type=_shape, help=argparse.SUPPRESS)
    parser.add_argument("--plot", help="image file, with --memory")
    parser.add_argument("--json", help="file for the records")
    args = parser.parse_args()
    if args.peak:
        batch, dim = args.peak
        print(peak_bytes(uncausal, batch, dim, args.device, args.dtype))
        return
    if args.memory:
        records = memory(args)
        if args.plot:
            plot(records, args.plot)
    elif args.cached:
        records = cached(args)
    else:
        records = [record for batch, dim in args.shape for record in bench(batch, dim, args)]
    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    )
    packages = ("torch", "triton", "sentence-transformers")
    about = dict(device=device, threads=torch.get_num_threads(), versions={p: version(p) for p in packages})
    if args.json:
        Path(args.json).write_text(json.dumps(dict(about=about, records=records), indent=1))


if __name__ == "__main__":
    main()
