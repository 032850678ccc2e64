"""The benchmarks: they run through on a CPU, and what they record is what they measured."""

import json
import os
import subprocess
import sys
import time

import pytest

from uncausal.bench import inputs, measure, report
from uncausal.bench.measure import Contest, Settings

# pytest-benchmark measures nothing within pytest-xdist, whose workers their children take themselves for
OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def test_dry_run_of_everything():
    """`make bench-gpu DRY=1`: every suite, every case, tiny shapes, and the tables."""
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "uncausal.bench.run", "--gpu", "--dry"],
        capture_output=True,
        text=True,
        env=OUTSIDE,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for name in ("by_distribution", "latent_pooling", "by_batch", "mixed", "simcse"):  # one of each suite
        assert f"bench_{name}[" in done.stdout, done.stdout
    assert "not installed" in done.stdout  # a peer that is missing is named


def test_take_turns_interleaves():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.take_turns(Contest(runs, rounds=2), Settings())
    assert order == ["a", "b"] * 3  # one round warms up
    assert [len(taken) for taken in times.values()] == [2, 2]


def test_a_run_may_time_itself():
    def run() -> float:
        time.sleep(0.01)
        return 0.5

    assert measure.take_turns(Contest({"a": run}, rounds=1), Settings()) == {"a": [0.5]}


def test_each_round_tells_the_round():
    seen = []
    run = measure.each_round(lambda index: seen.append(index))
    measure.take_turns(Contest({"a": run}, rounds=3, warm_up=False), Settings())
    assert seen == [0, 1, 2]


def test_peaks_see_memory_that_was_freed():
    import torch

    def run() -> None:
        torch.ones(8 << 20)  # 32 MB

    for peak in (measure.allocated_bytes, measure.resident_bytes):
        assert 30e6 < peak(run, "cpu") < 60e6, peak


def test_records_reach_the_table(tmp_path):
    """A provider's own seconds, in turn measured, go through pytest-benchmark into RESULTS.md."""
    (tmp_path / "bench_sleep.py").write_text(
        "import time, pytest\n"
        "from uncausal.bench.measure import Contest\n"
        "def contest(settings, case):\n"
        "    runs = {'uncausal': lambda: time.sleep(0.01), 'peer': lambda: time.sleep(0.03)}\n"
        "    return Contest(runs, {'other': 'not installed'}, {'tokens': 100.0}, rounds=3)\n"
        "@pytest.mark.parametrize('provider', ['uncausal', 'peer', 'other'])\n"
        "@pytest.mark.parametrize('case', ['naps'])\n"
        "def bench_sleep(record, case, provider):\n"
        "    record(contest, provider, case)\n"
    )
    (tmp_path / "conftest.py").write_text((report.BENCH / "conftest.py").read_text())
    (tmp_path / "results").mkdir()
    out = tmp_path / "results" / "sleep-cpu.json"
    options = ["-o", "python_functions=bench_*", "-p", "no:cacheprovider", "--dry", f"--benchmark-json={out}"]
    command = [sys.executable, "-m", "pytest", str(tmp_path / "bench_sleep.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=OUTSIDE)
    assert done.returncode == 0, done.stdout
    measured = {
        b["extra_info"]["provider"]: b["stats"]["median"] for b in json.loads(out.read_text())["benchmarks"]
    }
    assert 0.01 <= measured["uncausal"] < 0.025 and 0.03 <= measured["peer"] < 0.06
    report.render(tmp_path / "results", tmp_path / "RESULTS.md")
    rows = [line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if line.startswith("| naps")]
    assert len(rows) == 2
    ratio = float(rows[1].split("|")[5])
    assert ratio == pytest.approx(measured["peer"] / measured["uncausal"], abs=0.01)
    assert "Not run: other (not installed)." in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize("tokens, longest", [(6141, 512), (65536, 2048), (96, 32)])
def test_length_distributions(tokens, longest):
    for name, sizes in inputs.batches(tokens, longest).items():
        assert 0.8 * tokens <= sum(sizes) <= 1.2 * tokens, name
        assert 1 <= min(sizes) and max(sizes) <= longest, name


def test_write_section_replaces_its_own_and_keeps_the_others(tmp_path):
    path = tmp_path / "RESULTS.md"
    report.write_section("attention, CPU", "first \\1", path)
    report.write_section("InfoNCE, CPU", "second", path)
    report.write_section("attention, CPU", "third \\g<0>", path)
    text = path.read_text()
    assert text.startswith("# Results\n")
    assert "first" not in text and text.count("third \\g<0>") == 1 and text.count("second") == 1
    assert text.index("third") < text.index("second")
