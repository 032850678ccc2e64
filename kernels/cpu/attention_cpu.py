"""Packed attention on a CPU, compiled: builds attention_cpu.c once with the system's C compiler, calls it.

Where there is no compiler (`CC`, cc, gcc or clang, with OpenMP) the torch operations of attention_torch.py
serve instead. Shared objects are kept below XDG_CACHE_HOME (default ~/.cache).
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from uncausal.kernels.attention_dropout import dropout_threshold

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
# What torch found the processor to have; without a name here, what every processor of its kind has.
TARGETS = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mfma"]}


class Rows(ctypes.Structure):
    """The C struct of a (T, H, D) tensor whose rows of D elements have no gaps."""

    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class Call(ctypes.Structure):
    """The C struct of one call."""

    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "dlse", "cu_q", "cu_k", "sequences")),
        *((name, ctypes.c_int64) for name in ("count", "total", "key_heads", "group", "dim", "longest_k")),
        *((name, ctypes.c_int64) for name in ("threads", "bf16", "left", "right", "threshold")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "keep_scale")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernels, compiling them on first use; None where that is not possible."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        logger.info("no C compiler: attention on the CPU runs as torch operations")
        return None
    flags = ["-O3", *TARGETS.get(torch.backends.cpu.get_cpu_capability(), []), "-fopenmp", "-shared", "-fPIC"]
    identity = [SOURCE.read_bytes().decode(), platform.platform(), os.path.realpath(compiler), *flags]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uncausal"
    built = folder / f"{SOURCE.stem}-{digest}.so"
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # other processes may build it too
                target = Path(scratch) / built.name
                command = [compiler, *flags, str(SOURCE), "-o", str(target), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True)
                target.rename(built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.info("attention on the CPU runs as torch operations, since compiling failed: %s", reason)
        return None


def attention_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, batch, opts) -> None:
    """Write out (T, H, D) and lse (H, T) of some sequences of a batch.

    Args:
        q: (T, H, D), k, v: (Tk, HK, D), all fp32 or all bf16.
        batch: the `Compiled` part of a plan.
        opts: the options of the call.
    """
    _run("attention_forward", batch, opts, lse, None, q=q, k=k, v=v, out=out)


def attention_backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, batch, opts) -> None:
    """Write the gradients dq (T, H, D), dk and dv (Tk, HK, D) of some sequences of a batch."""
    dlse = None if dlse is None else dlse.float().contiguous()
    _run("attention_backward", batch, opts, lse, dlse, q=q, k=k, v=v, out=out, dout=dout, dq=dq, dk=dk, dv=dv)


def _run(name: str, batch, opts, lse: Tensor, dlse: Tensor | None, **tensors: Tensor) -> None:
    q, k = tensors["q"], tensors["k"]
    tensors = {key: x if x.stride(-1) == 1 else x.contiguous() for key, x in tensors.items()}  # kept alive
    call = Call(
        **{key: Rows(x.data_ptr(), *x.stride()[:2]) for key, x in tensors.items()},
        lse=lse.data_ptr(),
        dlse=None if dlse is None else dlse.data_ptr(),
        cu_q=batch.cu_q.data_ptr(),
        cu_k=batch.cu_k.data_ptr(),
        sequences=batch.sequences.data_ptr(),
        count=len(batch.sequences),
        total=q.shape[0],
        key_heads=k.shape[1],
        group=q.shape[1] // k.shape[1],
        dim=q.shape[2],
        longest_k=batch.longest_k,
        threads=torch.get_num_threads(),
        bf16=q.dtype == torch.bfloat16,
        left=opts.left,
        right=opts.right,
        threshold=dropout_threshold(opts.dropout_p),
        seed=opts.seed & 0xFFFFFFFFFFFFFFFF,
        scale=opts.scale,
        softcap=opts.softcap,
        keep_scale=65536 / (65536 - dropout_threshold(opts.dropout_p)),
    )
    compiled = library()
    assert compiled is not None
    if getattr(compiled, name)(ctypes.byref(call)):
        raise MemoryError(f"no memory for attention's scratch ({call.threads} threads)")
