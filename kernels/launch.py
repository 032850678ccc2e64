"""Where and how kernels run: the choice of backend, and launch configurations per architecture."""

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:
    from triton import knobs
except ImportError:  # Triton exists on Linux alone; the torch paths need none
    knobs = None

ARCHS = ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx942", "gfx950")


class Tile(NamedTuple):
    """What one program computes, and with what."""

    block_m: int  # rows
    block_n: int  # columns; 0 where they are all of the operand's
    num_warps: int
    num_stages: int
    block_k: int = 0  # step along the dimension that products sum over; 0 for all of it at once


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """Return "triton" or "torch": which implementation runs on this tensor.

    Args:
        backend: "auto" (Triton on a HIP tensor, or a CUDA one of Ampere or newer, if it is installed; else
            torch), "triton" or "torch".
        tensor: any tensor of the call.

    Raises:
        ValueError: for an unknown backend, Triton where it is not installed, or on a CPU tensor outside
            Triton's interpreter.
    """
    if backend == "auto":
        return "triton" if tensor.is_cuda and knobs is not None and not too_old(tensor.device) else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if backend == "triton" and knobs is None:
        raise ValueError("backend='triton' needs Triton, which is not installed: pip install triton")
    if backend == "triton" and not tensor.is_cuda and not interpreted():
        raise ValueError(f"backend='triton' needs a CUDA or HIP tensor, got one on {tensor.device}")
    return backend


def too_old(device: torch.device) -> bool:
    """Tell whether a GPU is older than Ampere: Triton does not support it, and no tile was made for it."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_properties(device).major < 8


def interpreted() -> bool:
    """Tell whether Triton interprets kernels on the host (TRITON_INTERPRET=1)."""
    return knobs is not None and bool(knobs.runtime.interpret)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Make a tensor's GPU the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return what autocast casts to on a kind of device, None where it is off."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


_MODES = torch._C._TorchDispatchModeKey


def traced() -> bool:
    """Tell whether operations go into a graph, or are those of a transform, and tensors stand for others."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    if not is_in_torch_dispatch_mode():
        return False
    mode = torch._C._get_dispatch_mode
    return mode(_MODES.FAKE) is not None or mode(_MODES.PROXY) is not None


def unobserved(*tensors: Tensor) -> bool:
    """Tell whether nothing but autograd would see an op: no graph, mode, transform, or kind of tensor."""
    observed = traced() or is_in_torch_dispatch_mode()
    return not observed and all(type(x) in (Tensor, Parameter) for x in tensors)


def precision(dtype: torch.dtype) -> str:
    """Return Triton's `input_precision`: fp32 products are exact unless torch's switch allows TF32."""
    # not `allow_tf32`, which raises once fp32_precision has been set
    switch = torch.backends.cuda.matmul.fp32_precision if torch.version.hip is None else "ieee"
    return "tf32" if dtype == torch.float32 and switch == "tf32" else "ieee"


# Every launch contracts multiplications and additions, as what was compiled and counted here does. Triton's
# own default is about to change.
FUSED = {"enable_fp_fusion": True}


@functools.cache
def architecture(device: torch.device) -> str:
    """Name a device's architecture as in ARCHS, the nearest older one for a newer; sm80 without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm80"
    if torch.version.hip:
        return "gfx950" if "gfx950" in torch.cuda.get_device_properties(device).gcnArchName else "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm80" if minor == 0 else "sm86"
    return {9: "sm90", 10: "sm100"}.get(major, "sm120" if major > 10 else "sm80")


@functools.cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors or compute units; 8 without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


# Attention: tiles by kernel, architecture, bytes per element and the head dimension up to which they hold.
# The static report picked them: no spills, then the best modelled bound. "sm86" stands for sm120 too, which
# has as little shared memory.

_Tables = dict[str, dict[tuple[str, int], dict[int, Tile]]]

# Where short sequences share tiles, blocks need more registers, as dropout and softcap do; and smaller tiles
# waste less of a block.
_ATTENTION: _Tables = {
    "fwd": {
        ("cuda", 2): {128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 8, 2)},
        ("sm100", 2): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(64, 32, 8, 2)},
        ("hip", 2): {128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2)},
        ("cuda", 4): {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 8, 1)},
        ("sm86", 4): {128: Tile(32, 32, 8, 1)},
        ("hip", 4): {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1)},
    },
    "dq": {
        ("cuda", 2): {128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 8, 2)},
        ("sm90", 2): {
            128: Tile(64, 32, 4, 2),
            256: Tile(32, 32, 4, 2),
        },  # 64 rows, as HGMMA needs, would spill
        ("sm100", 2): {128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 8, 2)},
        ("hip", 2): {128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2)},
        ("cuda", 4): {128: Tile(32, 32, 8, 1)},
        ("hip", 4): {128: Tile(32, 32, 4, 1)},
    },
    "dkv": {
        ("cuda", 2): {64: Tile(16, 64, 4, 2), 128: Tile(16, 64, 8, 1), 256: Tile(32, 64, 8, 1)},
        ("sm86", 2): {64: Tile(16, 64, 8, 2), 128: Tile(16, 64, 8, 1), 256: Tile(32, 64, 8, 1)},
        ("sm90", 2): {64: Tile(16, 64, 4, 2), 128: Tile(16, 64, 4, 1), 256: Tile(16, 128, 8, 1)},
        ("sm100", 2): {64: Tile(16, 64, 4, 2), 128: Tile(16, 64, 4, 1), 256: Tile(16, 64, 8, 1)},
        ("hip", 2): {128: Tile(16, 64, 4, 2), 256: Tile(16, 64, 4, 1)},
        ("cuda", 4): {128: Tile(16, 64, 8, 2)},
        ("hip", 4): {128: Tile(16, 64, 4, 1)},
    },
}

# Larger ones for sequences that share no tile, but for backward with dropout; without an entry the above.
_ATTENTION_LARGE: _Tables = {
    "fwd": {
        ("cuda", 2): {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
        ("sm86", 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
        # descriptors, which take powers of two, save the registers of pointers
        ("sm90", 2): {
            64: Tile(128, 128, 8, 2),
            127: Tile(128, 64, 8, 2),
            128: Tile(128, 128, 8, 2),
            256: Tile(128, 32, 8, 2),
        },
        ("hip", 2): {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 2)},
    },
    "dq": {
        ("cuda", 2): {
            32: Tile(64, 32, 4, 2),
            64: Tile(64, 64, 4, 2),
            128: Tile(64, 32, 4, 2),
            256: Tile(32, 32, 4, 2),
        },
        ("sm90", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(128, 32, 8, 2)},
        ("sm100", 2): {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(64, 32, 4, 2)},
        ("hip", 2): {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    },
    "dkv": {
        ("cuda", 2): {64: Tile(32, 64, 4, 2), 128: Tile(16, 128, 8, 2), 256: Tile(32, 64, 8, 1)},
        ("sm90", 2): {64: Tile(64, 64, 4, 2), 128: Tile(32, 128, 8, 2), 256: Tile(16, 128, 8, 1)},
    },
}


# Tokens from which on a sequence fills a tile of every kernel: where all do, none shares one.
OWN_TILE_TOKENS = max(
    tile.block_n if kernel == "dkv" else tile.block_m
    for tables in (_ATTENTION, _ATTENTION_LARGE)
    for kernel, table in tables.items()
    for tiles in table.values()
    for tile in tiles.values()
)


_EDGE_BLOCK = 32  # as many as one draw of dropout serves


# Whose fp32 tiles are known to hold TF32 without spills; dK/dV would spill 24 bytes on sm86.
ATTENTION_TF32 = ("sm80", "sm90")


def attention_config(kernel: str, d: int, itemsize: int, arch: str, large: bool = False) -> dict[str, Any]:
    """Launch configuration of an attention kernel.

    Args:
        kernel: "fwd", "dq" or "dkv".
        d: head dimension, at most 256; at most 128 for 4 bytes.
        itemsize: bytes per element, 2 or 4.
        arch: one of ARCHS.
        large: whether no sequence shares a tile, and if scores are dropped it is the forward.

    Returns:
        Tiles, warps and stages; EDGE_BLOCK, what is walked at a time where some row sees but a part; TMA, in
        "fwd" and "dq", whether keys may come through tensor descriptors.

    Raises:
        ValueError: for a head dimension that no tile holds.
    """
    kin = "sm86" if arch == "sm120" else arch
    vendor = "hip" if arch.startswith("gfx") else "cuda"
    for tables in (_ATTENTION_LARGE, _ATTENTION) if large else (_ATTENTION,):
        table = tables[kernel].get((kin, itemsize)) or tables[kernel].get((vendor, itemsize)) or {}
        for most, tile in table.items():
            if d <= most:
                config = dict(
                    BLOCK_M=tile.block_m,
                    BLOCK_N=tile.block_n,
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                )
                if kernel == "dkv":
                    return config | dict(EDGE_BLOCK=min(tile.block_m, _EDGE_BLOCK))
                tma = arch in ("sm90", "sm100") and itemsize == 2
                return config | dict(EDGE_BLOCK=min(tile.block_n, _EDGE_BLOCK), TMA=tma)
    raise ValueError(f"no tile of attention holds a head dimension of {d} with {itemsize} bytes per element")


# InfoNCE: tiles by kernel, architecture and bytes per element. "lse" and "weight" walk D in steps of block_k;
# "grad" holds all of D, its key says up to which.
# All compile without spills with every option on.

_INFO_NCE = {
    ("lse", "cuda", 2): Tile(128, 128, 8, 3, 64),
    ("lse", "sm120", 2): Tile(128, 64, 8, 3, 64),
    ("lse", "hip", 2): Tile(128, 128, 8, 3, 64),
    ("lse", "cuda", 4): Tile(64, 64, 4, 2, 16),
    ("lse", "hip", 4): Tile(64, 64, 4, 2, 16),
    ("weight", "cuda", 2): Tile(128, 64, 8, 3, 64),
    ("weight", "sm100", 2): Tile(64, 64, 8, 3, 64),
    ("weight", "hip", 2): Tile(128, 128, 8, 3, 64),
    ("weight", "cuda", 4): Tile(64, 64, 4, 2, 16),
    ("weight", "sm100", 4): Tile(32, 64, 4, 2, 32),
    ("weight", "hip", 4): Tile(64, 64, 4, 2, 16),
}
_INFO_NCE_GRAD = {
    ("cuda", 2): {64: Tile(64, 64, 4, 3, 64), 128: Tile(128, 64, 8, 3, 128), 256: Tile(64, 64, 8, 2, 256)},
    ("sm80", 2): {64: Tile(64, 64, 4, 3, 64), 128: Tile(128, 64, 8, 2, 128), 256: Tile(64, 64, 8, 2, 256)},
    ("sm100", 2): {64: Tile(64, 64, 4, 3, 64), 128: Tile(128, 64, 8, 3, 128), 256: Tile(64, 32, 8, 2, 256)},
    ("hip", 2): {64: Tile(64, 32, 4, 2, 64), 128: Tile(64, 32, 4, 2, 128), 256: Tile(64, 32, 4, 2, 256)},
    ("cuda", 4): {64: Tile(64, 32, 8, 2, 64), 128: Tile(32, 32, 8, 2, 128), 256: Tile(32, 32, 8, 1, 256)},
    ("hip", 4): {64: Tile(64, 32, 4, 2, 64), 128: Tile(32, 32, 4, 2, 128), 256: Tile(32, 16, 8, 1, 256)},
}


def info_nce_config(kernel: str, d: int, itemsize: int, arch: str) -> dict[str, int]:
    """Launch configuration of an InfoNCE kernel.

    Args:
        kernel: "lse", "grad" (D <= 256) or "weight".
        d: embedding dimension.
        itemsize: bytes per element, 2 or 4.
        arch: one of ARCHS.
    """
    vendor = "hip" if arch.startswith("gfx") else "cuda"
    fits = max(16, 1 << (d - 1).bit_length())
    if kernel == "grad":
        table = _INFO_NCE_GRAD.get((arch, itemsize)) or _INFO_NCE_GRAD[vendor, itemsize]
        tile, block_d = table[max(fits, 64)], fits
    else:
        tile = _INFO_NCE.get((kernel, arch, itemsize)) or _INFO_NCE[kernel, vendor, itemsize]
        block_d = min(tile.block_k, fits)
    return dict(
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
