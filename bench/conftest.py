"""pytest-benchmark for contests: every provider's rounds are measured in turn and then handed to it."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from uncausal.bench import measure
from uncausal.bench.measure import Contest, Settings


class Replay:
    """A clock for pytest-benchmark, which measures one function at a time, that tells times taken before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Replay()
_measured: dict[tuple[Any, ...], tuple[Contest, dict[str, list[float]]]] = {}


def pytest_addoption(parser):
    group = parser.getgroup("uncausal")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--dry", action="store_true", help="tiny shapes, one round")
    group.addoption("--full", action="store_true", help="the long cases as well")
    group.addoption("--rounds", type=int, default=0, help="instead of the benchmark's own number")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=False))


def pytest_sessionfinish():
    _measured.clear()  # peers free their memory while Python still stands


@pytest.fixture(scope="session")
def settings(request) -> Settings:
    option = request.config.getoption
    return Settings(option("device"), option("dry"), option("full"), option("rounds"))


@pytest.fixture
def record(benchmark, settings, request) -> Callable[..., None]:
    """Record one provider of a contest; the first of them to come runs the contest."""
    flags = [f"--device {settings.device}"] * (settings.device != "cpu")
    flags += [f"--{name}" for name in ("dry", "full") if getattr(settings, name)]
    command = " ".join(["python -m", f"uncausal.bench.{request.path.stem}", *flags])

    def replay(make: Callable[..., Contest], provider: str, *case: Any) -> None:
        key = (make, *case)
        if key not in _measured:
            _measured.clear()  # one contest's tensors at a time
            contest = make(settings, *case)
            _measured[key] = contest, measure.take_turns(contest, settings)
        contest, times = _measured[key]
        if provider not in times:
            pytest.skip(f"{provider}: {contest.missing.get(provider, 'has no such case')}")
        benchmark.extra_info.update(measure.summary(contest, provider, times, settings))
        benchmark.extra_info["provider"], benchmark.extra_info["missing"] = provider, dict(contest.missing)
        benchmark.extra_info["environment"] = measure.environment(settings.device)
        benchmark.extra_info["command"] = command
        rounds = itertools.cycle(times[provider])
        benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), rounds=len(times[provider]))

    return replay
