"""Where and how kernels run: the choice of backend, and launch configurations per architecture."""

from torch import Tensor

ARCHS = ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx942", "gfx950")


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """Return "triton" or "torch": which implementation runs on this tensor.

    Args:
        backend: "auto" (Triton on a CUDA or HIP tensor, torch elsewhere), "triton" or "torch".
        tensor: any tensor of the call.

    Raises:
        ValueError: for an unknown backend, or Triton on a CPU tensor outside Triton's interpreter.
    """
    if backend == "auto":
        return "triton" if tensor.is_cuda else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if backend == "triton" and not tensor.is_cuda and not interpreted():
        raise ValueError(f"backend='triton' needs a CUDA or HIP tensor, got one on {tensor.device}")
    return backend


def interpreted() -> bool:
    """Tell whether Triton interprets kernels on the host (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
