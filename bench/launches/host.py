"""The host path of attention: what a call asks of Python and torch before its kernels are launched.

`python -m uncausal.bench.static --host`. Launches are left out, on either side: a GPU that waits for the host
waits for what is counted here. Operations are counted on tensors of the meta device, which hold no data, so
that nothing passes that would wait for a value; microseconds are taken on a CPU's tensors.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode

from uncausal.bench.launches.recorded import replaced_launches

COLUMNS = ("call", "by", "aten operations", "launches", "synchronisations", "us a call")
_PYTHON = f"Python {sys.version_info.major}.{sys.version_info.minor}, one core."
LENGTHS = {"long": [512] * 8, "short": [34] * 64, "mixed": [512] * 4 + [34] * 32}
HEADS, DIM = (9, 3), 64


class Row(NamedTuple):
    """What one call costs the host."""

    call: str
    by: str
    operations: int  # of aten, those inside custom operators included
    launches: int
    waits: list[str]  # what synchronises
    microseconds: float  # the median of rounds


class HostPath(TorchDispatchMode):
    """Count aten operations, also those inside custom operators, and refuse what waits for the device.

    Raises:
        RuntimeError: an operation reads a value, or has a shape that depends on values, or copies between
            devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        body = _maybe_get_opdef(func)
        if body is not None:
            with self:
                return body._init_fn(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        if reason := _waits(func, args, kwargs or {}):
            raise RuntimeError(f"{func} waits for the device: {reason}")
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Why an operation synchronises, or None."""
    aten = torch.ops.aten
    if torch.Tag.data_dependent_output in func.tags:
        return "it reads a value"
    if func in (aten.index.Tensor, aten.index_put_.default):  # tagged, but for masks alone
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        return "its shape is read" if masks else None
    if torch.Tag.dynamic_output_shape in func.tags:
        return "its shape is read"
    if func is aten._to_copy.default:
        target = kwargs.get("device")
        return "it copies between devices" if target not in (None, args[0].device) else None
    if func is aten.copy_.default:
        return "it copies between devices" if args[0].device != args[1].device else None
    return None


def operations(call: Callable[[], Any]) -> Counter[str]:
    """Count what a call asks of aten.

    Raises:
        RuntimeError: see `HostPath`.
    """
    with HostPath() as path:
        call()
    return path.counts


def functions(call: Callable[[], Any]) -> int:
    """Count the functions that a call runs, of Python's and of C: its time without the machine's noise."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def microseconds(call: Callable[[], Any], rounds: int = 15, calls: int = 100) -> float:
    """Time a call, the median of rounds."""
    taken = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(taken[1:])


class Inputs:
    """Tensors of one packed batch, and what may be done with them."""

    def __init__(self, functions: Any, lengths: list[int], device: str, ours: bool):
        from uncausal.kernels.packing import PackedLayout

        self.functions, self.longest = functions, max(lengths)
        self.own = dict(backend="triton") if ours else {}
        self.layout = PackedLayout.from_lengths(lengths, device)
        self.cu = self.layout.cu_seqlens.clone()
        shapes = [(self.layout.total, h, DIM) for h in (HEADS[0], HEADS[1], HEADS[1])]
        self.qkv = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        self.dense = [x.unflatten(0, (len(lengths), -1)) for x in self.qkv] if len(set(lengths)) == 1 else []
        self.leaves = [x.detach().requires_grad_() for x in self.qkv]
        self.dout = torch.empty_like(self.qkv[0])

    def varlen(self, tensors: list[Tensor] | None = None, **options: Any) -> Tensor:
        bounds = self.cu, self.cu, self.longest, self.longest
        return self.functions.flash_attn_varlen_func(*(tensors or self.qkv), *bounds, **options, **self.own)

    def packed(self, tensors: list[Tensor] | None = None, **options: Any) -> Tensor:
        """With the layout of the batch, as an encoder's layers call it."""
        return self.varlen(tensors, layout=self.layout, **options)

    def batch(self) -> Tensor:
        return self.functions.flash_attn_func(*self.dense, **self.own)


def calls(functions: Any, device: str, ours: bool) -> dict[str, Callable[[], Any]]:
    """What is counted, each with its maps made already."""
    long, short, mixed = (Inputs(functions, LENGTHS[x], device, ours) for x in ("long", "short", "mixed"))
    outs: list[Any] = []
    own: dict[str, Any] = dict(layout=long.layout) if ours else {}

    def backward() -> None:  # as autograd's engine calls it
        if not outs:
            outs.append(long.varlen(long.leaves, **own))
        with torch.no_grad():
            outs[0].grad_fn.apply(long.dout, None)

    drop_in = {
        "varlen, offsets alone": long.varlen,
        "dense": long.batch,
        "varlen, gradients recorded": lambda: long.varlen(long.leaves),
        "varlen, backward": backward,
        "varlen, dropout": lambda: long.varlen(dropout_p=0.1),
    }
    layouts = {
        "packed, long sequences": long.packed,
        "packed, short ones that share tiles": short.packed,
        "packed, long and short": mixed.packed,
        "packed, long sequences, gradients recorded": lambda: long.packed(long.leaves),
        "packed, long and short, gradients recorded": lambda: mixed.packed(mixed.leaves),
    }
    return drop_in | (layouts if ours else {})


def measure(arch: str = "sm90") -> list[Row]:
    """Count and time every call, also by flash-attn where its Python is installed."""
    from uncausal.kernels import attention

    rows = []
    launched = 0

    def launch(*args: Any, **kwargs: Any) -> None:
        nonlocal launched
        launched += 1

    providers: dict[str, Any] = {"uncausal": attention}
    if (peer := flash_attn(launch)) is not None:
        providers["flash-attn"] = peer
    with replaced_launches(arch, launch):
        made = {
            by: [calls(functions, device, by == "uncausal") for device in ("meta", "cpu")]
            for by, functions in providers.items()
        }
        for name in made["uncausal"][0]:
            for by, (on_meta, on_cpu) in made.items():
                if name in on_meta:
                    on_meta[name]()
                    launched, waits, counts = 0, [], Counter()
                    try:
                        counts = operations(on_meta[name])
                    except RuntimeError as error:
                        waits = [str(error)]
                    found = counts.total(), launched, waits
                    rows.append(Row(name, by, *found, microseconds(on_cpu[name])))
    return rows


def table(rows: list[Row]) -> str:
    """A Markdown table, and what its columns leave out."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [row.call, row.by, row.operations, row.launches, len(row.waits), f"{row.microseconds:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    peer = any(row.by == "flash-attn" for row in rows)
    note = "flash-attn's launches are calls of its compiled part" if peer else "flash-attn is not installed"
    return "\n".join([*lines, "", f"Maps of a batch are made before; {note}. {_PYTHON}"])


def flash_attn(launch: Callable[..., None]) -> ModuleType | None:
    """Import flash-attn's Python, if it is there, without its compiled part: torch allocates in its place."""
    spec = importlib.util.find_spec("flash_attn")
    if spec is None:
        return None
    compiled: Any = ModuleType("flash_attn_2_cuda")

    def statistics_of(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens is None else (q.shape[1], q.shape[0])
        return q.new_empty(shape, dtype=torch.float32)

    def forward(q, *args, cu_seqlens=None):
        launch()
        out, lse = torch.empty_like(q), statistics_of(q, cu_seqlens)
        return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64, device=q.device)

    def backward(dout, q, k, v, out, lse, dq, dk, dv, *args, cu_seqlens=None):
        launch()
        return dq, dk, dv, statistics_of(q, cu_seqlens)

    compiled.fwd, compiled.bwd = forward, backward
    compiled.varlen_fwd = lambda q, k, v, out, cu, *args: forward(q, cu_seqlens=cu)
    compiled.varlen_bwd = lambda *args: backward(*args[:9], cu_seqlens=args[9])
    package = ModuleType("flash_attn")  # its own __init__ imports more than the interface
    package.__path__ = list(spec.submodule_search_locations or [])
    with mock.patch.dict(sys.modules, {"flash_attn_2_cuda": compiled, "flash_attn": package}):
        interface = importlib.import_module("flash_attn.flash_attn_interface")
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        operator = getattr(interface, f"_flash_attn_{name}")
        operator.register_kernel("cpu", operator._init_fn)
    return interface
