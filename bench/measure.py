"""What the benchmarks share: providers timed in turn, peak memory, the machine's ceilings, a record for each.

A benchmark is a function `bench_*` over cases and providers. It makes a `Contest`: the same work, once for
each provider. All providers of a contest run in turn, round after round, since only such times compare on a
machine that others use as well; pytest-benchmark then receives each provider's times and keeps the records.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

OURS = "uncausal"
PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "flash-attn", "llama-cpp-python")


class Settings(NamedTuple):
    """Where and how much to measure.

    Attributes:
        device: "cpu" or "cuda".
        dry: tiny shapes, one round: proves that every benchmark still runs.
        full: adds the long cases.
        rounds: 0 leaves it to the benchmark.
    """

    device: str = "cpu"
    dry: bool = False
    full: bool = False
    rounds: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


@dataclass
class Contest:
    """Providers that do the same work.

    Attributes:
        runs: one call does the work once; one that returns a float has timed itself, in seconds.
        missing: why a provider cannot take part.
        work: what one run does, in any of "flops", "bytes" and "tokens".
        facts: further figures by provider.
        rounds: timed rounds, after one that warms up.
        peak: measures a run's peak memory in bytes; None leaves it out.
        warm_up: whether an untimed round comes first.
        derive: further figures by provider, from all providers' seconds.
    """

    runs: Mapping[str, Callable[..., object]]
    missing: Mapping[str, str] = field(default_factory=dict)
    work: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    rounds: int = 5
    peak: Callable[[Callable[[], object], str], int] | None = None
    warm_up: bool = True
    derive: Callable[[dict[str, list[float]]], dict[str, dict[str, Any]]] = lambda seconds: {}


class Unable(Exception):
    """Why a provider cannot take part; the text is printed beside its name."""


def load(module: str) -> Any:
    """Import a peer, or say that it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unable("not installed") from error


def gather(builders: dict[str, Callable[..., Any]], *args: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Call every provider's builder; return those that work, and why the others don't."""
    ready, missing = {}, {}
    for name, build in builders.items():
        try:
            ready[name] = build(*args)
        except Unable as reason:
            missing[name] = str(reason)
    return ready, missing


def take_turns(contest: Contest, settings: Settings) -> dict[str, list[float]]:
    """Return the seconds of each provider's rounds."""
    times: dict[str, list[float]] = {name: [] for name in contest.runs}
    rounds = 1 if settings.dry else settings.rounds or contest.rounds
    for index in range(-1 if contest.warm_up and not settings.dry else 0, rounds):
        for name, run in contest.runs.items():
            _synchronise(settings.device)
            start = time.perf_counter()
            own = run(max(index, 0)) if _takes_round(run) else run()
            _synchronise(settings.device)
            if index >= 0:
                times[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return times


def _takes_round(run: Callable[..., object]) -> bool:
    return getattr(run, "takes_round", False)


def each_round(run: Callable[[int], object]) -> Callable[[int], object]:
    """Mark a run that wants the number of its round, from 0."""
    run.takes_round = True  # type: ignore[attr-defined]
    return run


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def allocated_bytes(run: Callable[[], object], device: str) -> int:
    """Most bytes that torch had allocated at a time during a run, above what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as trace:
        run()
    events: Any = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for _, nbytes in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += nbytes
        peak = max(peak, now)
    return peak


def resident_bytes(run: Callable[[], object], device: str) -> int:
    """Growth of the process's resident memory at its highest during a run; on a GPU what torch allocated."""
    if device == "cuda":
        return allocated_bytes(run, device)
    ctypes.CDLL(None).malloc_trim(0)  # hand back what earlier runs freed
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@functools.cache
def ceilings(device: str, dtype: torch.dtype, size: int = 2048) -> dict[str, float]:
    """What this machine reaches: bytes a second in a copy, FLOP a second in a square product; median of 5."""

    def median(run: Callable[[], object]) -> float:
        times = take_turns(Contest({"": run}), Settings(device))
        return statistics.median(times[""])

    source = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return {
        "copy_bytes": 2 * source.numel() / median(lambda: target.copy_(source)),
        "gemm_flops": 2 * size**3 / median(lambda: a @ b),
    }


def environment(device: str) -> dict[str, Any]:
    """Name the device, the threads and the versions, for every record."""
    if device == "cuda":
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
        return {"device": torch.cuda.get_device_name(), "driver": driver, "versions": _versions()}
    threads, model = torch.get_num_threads(), platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": f"{model}, {capability}, {threads} threads", "versions": _versions()}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie, interpolated."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), share))


def summary(contest: Contest, name: str, times: dict[str, list[float]], settings: Settings) -> dict[str, Any]:
    """One provider's record: median, p20, p80, rates and their shares of the ceilings, peak memory, facts."""
    seconds = times[name]
    median = statistics.median(seconds)
    record = {"median_s": median, "p20_s": quantile(seconds, 0.2), "p80_s": quantile(seconds, 0.8)}
    top = ceilings(settings.device, settings.dtype, 64 if settings.dry else 2048)
    limits = {"flops": top["gemm_flops"], "bytes": top["copy_bytes"]}
    for kind, amount in contest.work.items():
        record[f"{kind}_per_s"] = amount / median
        if kind in limits:
            record[f"share_of_{'gemm' if kind == 'flops' else 'copy'}"] = amount / median / limits[kind]
    if contest.peak is not None:
        run = contest.runs[name]
        record["peak_bytes"] = contest.peak(lambda: run(0) if _takes_round(run) else run(), settings.device)
    return record | contest.facts.get(name, {}) | contest.derive(times).get(name, {})


def main(file: str, arguments: Sequence[str]) -> int:
    """Run one file of benchmarks by itself: `python -m uncausal.bench.bench_attention [--dry] [-k short]`."""
    import pytest

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return int(pytest.main([file, "-o", "python_functions=bench_*", "-p", "no:cacheprovider", *arguments]))
