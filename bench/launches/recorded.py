"""Triton launches recorded instead of run: what calls would ask of a GPU, on a machine that has none."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from uncausal.bench import ladder

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One recorded launch: what `ladder.compile_for` needs to build the same machine code."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def compile(self, arch: str) -> ladder.Compiled:
        return ladder.compile_for(
            self.kernel,
            dict(self.signature),
            dict(self.constexprs),
            arch,
            divisible=self.divisible,
            **dict(self.options),
        )


@contextlib.contextmanager
def replaced_launches(arch: str, run: Callable[..., None]) -> Iterator[None]:
    """Call `run(kernel, *args, grid, warmup, **kwargs)` for a launch, on what passes for a GPU of `arch`."""
    from triton import JITFunction

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        for path in sorted((ROOT / "kernels").rglob("*.py")):  # all of them: some import others late
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(f"uncausal.{name}")
            if hasattr(module, "architecture"):
                stack.enter_context(mock.patch.object(module, "architecture", lambda device: arch))
            if hasattr(module, "resolve_backend"):
                stack.enter_context(mock.patch.object(module, "resolve_backend", lambda *_: "triton"))
        yield


@contextlib.contextmanager
def recorded_launches(arch: str) -> Iterator[list[Launch]]:
    """Record Triton launches instead of running them.

    Yields:
        A list that receives every distinct launch. The tensors a launch would have written stay as they were.
    """
    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launch = _launch(kernel, args, kwargs)
        if launch not in launches:
            launches.append(launch)

    with replaced_launches(arch, record):
        yield launches


def _launch(kernel, args: tuple, kwargs: dict[str, Any]) -> Launch:
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constexprs, divisible = {}, {}, []
    for parameter in kernel.params:
        value = bound.pop(parameter.name, parameter.default)
        kind = _type_of(value)
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or kind is None or one:
            constexprs[parameter.name] = value
            continue
        signature[parameter.name] = kind
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(number, int) and number % 16 == 0 and not parameter.do_not_specialize:
            divisible.append(parameter.name)
    options = tuple(bound.items())
    return Launch(kernel, tuple(signature.items()), tuple(constexprs.items()), tuple(divisible), options)


def _type_of(value: Any) -> str | None:
    """Triton's name of the type that a launcher gives to an argument; None for what it makes a constant."""
    if isinstance(value, torch.Tensor):
        return "*" + _DTYPES[value.dtype]
    if hasattr(value, "block_shape"):  # a host-side tensor descriptor
        return f"tensordesc<{_DTYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else None


_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
