"""The static GPU report: what the compiled kernels say about themselves, without a GPU.

`python -m uncausal.bench.static` calls every public function with its launches recorded instead of run,
once per architecture, compiles each launch for that architecture with exactly the types, flags and tiles
that the launcher chose, and counts registers, spills, shared memory and the cycles of the main loop
(`bench/cycles.py`). Peers that are installed go through the same steps.

Three parts of it stand alone: `--trace` lists what calls of attention launch, and how much of it is of use;
`--host` counts what a call asks of the host; `--products` counts matrix products.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from uncausal.bench import ladder
from uncausal.bench.cycles import main_loop
from uncausal.bench.launches.recorded import Launch, recorded_launches
from uncausal.bench.report import write_section

BENCH = Path(__file__).resolve().parent
BUDGET = BENCH.parent / "tests" / "static_budget.json"
HEAD_DIMS = (64, 128)


def _cu_seqlens(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


LONG, SHORT = (300, 512), (34,) * 24
EVERYTHING: dict[str, Any] = dict(dropout_p=0.1, window_size=(100, 100), softcap=20.0)


def _attention(
    lengths: tuple[int, ...],
    dims: tuple[int, ...] = HEAD_DIMS,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> None:
    """The host knows the lengths, so that sequences longer than a tile never share one."""
    from uncausal.kernels.attention import flash_attn_varlen_func
    from uncausal.kernels.packing import PackedLayout

    layout = PackedLayout.from_lengths(lengths)
    cu = layout.cu_seqlens
    for d in dims:
        q, k, v = (torch.randn(layout.total, h, d, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
        out, lse, _ = flash_attn_varlen_func(
            q, k, v, cu, cu, return_attn_probs=True, layout=layout, backend="triton", **options
        )
        (out.sum() + lse.sum() if options else out.sum()).backward()


def _info_nce() -> None:
    from uncausal.kernels.info_nce import info_nce

    for d in (128, 256, 768):
        query, key = (torch.randn(512, d, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        info_nce(query, key, symmetric=True, backend="triton").backward()


def _latent_pooling() -> None:
    from uncausal.kernels.latent_pooling import LatentAttentionPooling, latent_attention_pool

    layer = LatentAttentionPooling(1024, num_latents=512, num_heads=8).bfloat16()
    hidden = torch.randn(812, 1024, dtype=torch.bfloat16, requires_grad=True)
    latent_attention_pool(hidden, _cu_seqlens(300, 512), layer.fold(), backend="triton").sum().backward()


def _flash_linear_attention(arch: str) -> None:
    """The packed softmax attention of flash-linear-attention (causal), with the tiles it picks itself."""
    from fla.ops.attn import parallel  # pyright: ignore[reportMissingImports]

    def shared_memory(name: str = "", *_: Any) -> bool:
        return ladder.ARCHS[arch].shared_program >= {"hopper": 232448, "ampere": 166912}.get(name, 0)

    cu_seqlens = _cu_seqlens(300, 512).long()
    chunks = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [1, 3]])
    with mock.patch.object(parallel, "check_shared_mem", shared_memory):
        for d in HEAD_DIMS:
            q, k, v = (torch.randn(1, 812, h, d, dtype=torch.bfloat16) for h in (4, 2, 2))
            lse = torch.randn(1, 812, 4)
            packed = dict(scale=d**-0.5, cu_seqlens=cu_seqlens, chunk_indices=chunks)
            parallel.parallel_attn_fwd(q, k, v, None, None, **packed)
            backward = getattr(parallel.parallel_attn_bwd, "__wrapped__", parallel.parallel_attn_bwd)
            backward(q, k, v, q, None, lse, q, **packed)


KERNELS: dict[str, Callable[[], None]] = {
    "attention": partial(_attention, LONG),
    "attention_short": partial(_attention, SHORT),
    # where sequences share tiles, every option at once takes the most registers; 80 is like 96, 160 like 192
    "attention_options": partial(_attention, SHORT, (64, 128, 256), **EVERYTHING),
    "attention_window": partial(_attention, LONG, (64, 128, 256), window_size=(100, 100), softcap=20.0),
    "attention_long_options": partial(_attention, LONG, (64, 128, 256), **EVERYTHING),
    "attention_dims": partial(_attention, LONG, (32, 96, 192, 256)),
    "attention_fp32": partial(_attention, SHORT, (64, 128), torch.float32, **EVERYTHING),
    "info_nce": _info_nce,
    "latent_pooling": _latent_pooling,
}
PEERS: dict[str, tuple[str, Callable[[str], None], tuple[str, ...]]] = {
    # name: distribution, driver, the architectures it has tiles for
    "flash-linear-attention": ("flash-linear-attention", _flash_linear_attention, ("sm80", "sm90")),
}


def launches(kernel: str, arch: str) -> list[Launch]:
    """List what a kernel of `KERNELS`, or a peer, launches on an architecture."""
    if kernel in KERNELS:
        with recorded_launches(arch) as found:
            KERNELS[kernel]()
    else:
        with recorded_launches(arch) as found:
            if arch in PEERS[kernel][2]:
                PEERS[kernel][1](arch)
    return found


def row(kernel: str, arch: str, launch: Launch) -> dict[str, Any]:
    """Compile one launch and return its line of the report."""
    built = launch.compile(arch)
    try:
        cost = main_loop(built)
    except ValueError as reason:  # tensor-memory products that no loop of the IR explains
        print(f"{kernel}, {launch.kernel.__name__}, {arch}: cycles not counted ({reason})")
        cost = None
    dtype = next((t[1:] for _, t in launch.signature if t in ("*bf16", "*fp16", "*fp32")), "?")
    multiplies = cost is not None or " tt.dot " in built.ttgir
    tiles = {k: v for k, v in launch.constexprs if isinstance(v, int) and not isinstance(v, bool)}
    return {
        "kernel": kernel,
        "function": launch.kernel.__name__,
        "arch": arch,
        "dtype": dtype,
        "constants": tiles,
        "flags": [name for name, value in launch.constexprs if value is True],
        "warps": built.num_warps,
        "stages": built.num_stages,
        "registers": built.registers,
        "spill_bytes": built.spill_bytes,
        "shared_bytes": built.shared_bytes,
        "occupancy": built.occupancy,
        "matrix_instructions": built.matrix_instructions,
        "problems": built.problems(matrix_unit=multiplies and dtype != "fp32"),
        **({} if cost is None else dataclasses.asdict(cost) | {"bound": cost.bound}),
    }


def report(kernels: Iterable[str], archs: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield a line for each kernel, peer, architecture and distinct launch; peers only where installed."""
    archs = list(archs)
    for kernel in kernels:
        if kernel in PEERS and not _installed(PEERS[kernel][0]):
            print(f"{kernel}: not installed")
            continue
        for arch in archs:
            for launch in launches(kernel, arch):
                yield row(kernel, arch, launch)


def budget_key(line: dict[str, Any]) -> str:
    """Name a line of the report by what users choose, not by the tiles that the tables choose."""
    sizes = [f"{k}{v}" for k, v in line["constants"].items() if k in ("D", "W", "K")]
    return "-".join([line["kernel"], line["function"].strip("_"), line["arch"], line["dtype"], *sizes])


def budget(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Reduce report lines to what the budget test holds them to; of equal keys the worst counts."""
    found: dict[str, dict[str, float]] = {}
    for line in rows:
        entry = found.setdefault(budget_key(line), {"registers": 0, "bound": 1.0})
        entry["registers"] = max(entry["registers"], line["registers"])
        entry["bound"] = min(entry["bound"], round(line.get("bound", 0.0), 3))
    return found


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def cells(r: dict[str, Any]) -> dict[str, str]:
    """One report line as it is written to static.csv."""
    constants = r["constants"]
    size = constants.get("D", constants.get("K", ""))
    tile = "x".join(str(v) for k, v in constants.items() if k.startswith("BLOCK") or k in ("BT", "BS"))
    units = " ".join(sorted({name.split(".")[0] for name in r["matrix_instructions"]})) or "none"
    line = {
        "kernel": r["kernel"],
        "function": r["function"].strip("_"),
        "arch": r["arch"],
        "dtype": r["dtype"],
        "size": size,
        "tile": tile,
        "flags": " ".join(r["flags"]),
        "warps": r["warps"],
        "stages": r["stages"],
        "registers": r["registers"],
        "spill_bytes": r["spill_bytes"],
        "shared_bytes": r["shared_bytes"],
        "programs_per_sm": r["occupancy"],
        "matrix_instructions": units,
        **{unit: f"{r[unit]:.0f}" if "mma" in r else "" for unit in ("mma", "exp", "issue")},
        "bound": f"{r['bound']:.3f}" if "bound" in r else "",
    }
    return {name: str(value) for name, value in line.items()}


def summary(lines: list[dict[str, str]]) -> str:
    """A Markdown table of the lines of static.csv: a row a kernel, a column an architecture.

    A cell is the lowest and the highest bound among the launches that multiply matrices.
    """
    archs = list(dict.fromkeys(line["arch"] for line in lines))
    rows = [f"| kernel | launches | {' | '.join(archs)} |", "|---" * (2 + len(archs)) + "|"]
    for kernel in dict.fromkeys(line["kernel"] for line in lines):
        row = [kernel, str(sum(line["kernel"] == kernel for line in lines))]
        for arch in archs:
            chosen = [x for x in lines if (x["kernel"], x["arch"]) == (kernel, arch) and x["bound"]]
            bounds = [100 * float(line["bound"]) for line in chosen]
            row.append(f"{min(bounds):.0f} to {max(bounds):.0f} %" if bounds else "")
        rows.append(f"| {' | '.join(row)} |")
    spilling = [line for line in lines if line["spill_bytes"] != "0"]
    where = sorted({f"{line['kernel']} {line['function']} on {line['arch']}" for line in spilling})
    text = f"{len(lines) - len(spilling)} of {len(lines)} launches spill no register"
    rows += ["", text + (f"; the others: {', '.join(where)}." if where else ".")]
    return "\n".join(rows)


_PROVES = """\
What it proves: these launches compile for these architectures, fit their shared memory, and use the
matrix instructions shown; spills are counted, not guessed. What it ranks: cycles of one iteration
of the main loop on one SM (matrix unit / exponentials / issue slots; AMD: vector units), and
`bound`, the share of the matrix unit's peak if nothing overlapped. What it does not prove: any
speed. Latency, memory traffic, overlap between warps and programs, clocks and the grid are left
out; only a run on the device tells. Cells show the lowest and the highest `bound`. A kernel that
walks D in an inner loop (InfoNCE's lse and weight, latent pooling) is counted in that product loop
alone, without its exponentials. flash-linear-attention is causal only."""


def render(rows: list[dict[str, Any]], folder: Path = BENCH) -> None:
    """Write every line to static.csv, and its summary into RESULTS.md beside it."""
    lines = [cells(row) for row in rows]
    with open(folder / "static.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    how = f"`python -m uncausal.bench.static`, {_versions()}. A line of [static.csv](static.csv) is a launch."
    write_section("static report", f"{how}\n\n{_PROVES}\n\n{summary(lines)}", folder / "RESULTS.md")


def _versions() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "triton"))


def part(option: str, arch: str) -> tuple[str, str]:
    """Return the title and the table of a part of the report."""
    from uncausal.bench.launches import host, products, trace

    if option == "trace":
        return "attention, its launches", trace.table(trace.trace(arch))
    if option == "host":
        return "attention, its host path", host.table(host.measure(arch))
    return "attention, its products", products.table(products.count(arch))


def main() -> None:
    names = [*KERNELS, *PEERS]
    parser = argparse.ArgumentParser(prog="python -m uncausal.bench.static", description=__doc__)
    parser.add_argument("--json", type=Path, default=BENCH / "results" / "static.json")
    parser.add_argument("--arch", nargs="+", choices=list(ladder.ARCHS), help="default: every shipped one")
    parser.add_argument("--kernel", nargs="+", choices=names)
    parser.add_argument("--write-budget", action="store_true", help="accept the figures of our own kernels")
    parser.add_argument("--trace", action="store_true", help="the tiles that calls launch, and their use")
    parser.add_argument("--host", action="store_true", help="what a call costs before its launches")
    parser.add_argument("--products", action="store_true", help="the matrix products of a block of scores")
    options = parser.parse_args()
    parts = [name for name in ("trace", "host", "products") if getattr(options, name)]
    for name in parts:
        for arch in options.arch or ("sm90",):
            title, body = part(name, arch)
            body = f"`python -m uncausal.bench.static --{name}`, {arch}, {_versions()}\n\n{body}"
            print(f"{title}\n\n{body}\n")
            if options.arch is None:
                write_section(title, body, BENCH / "RESULTS.md")
    if parts:
        return
    from uncausal.kernels.launch import ARCHS

    rows = list(report(options.kernel or names, options.arch or ARCHS))
    print(summary([cells(line) for line in rows]))
    if options.write_budget:
        old = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
        built = {(line["kernel"], line["arch"]) for line in rows}
        kept = {
            key: entry for key, entry in old.items() if (key.split("-")[0], key.split("-")[2]) not in built
        }
        new = kept | budget(line for line in rows if line["kernel"] in KERNELS)
        BUDGET.write_text(json.dumps(dict(sorted(new.items())), indent=1) + "\n")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.arch is None and options.kernel is None:  # a part of the report does not replace the whole
        render(rows)


if __name__ == "__main__":
    main()
