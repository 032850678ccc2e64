"""The ladder of proof: what a kernel has to pass on a machine without a GPU.

Each rung is one helper here, so that a test file of a kernel reads like its list of claims.

1. Reference: `assert_close_to_float64` bounds a kernel's error by the error of eager torch in the same dtype,
   both taken against the reference run in float64.
2. Interpreter: Triton decides when a kernel is *decorated* whether it interprets, so interpreted tests need a
   process of their own. Mark them `@pytest.mark.interpret` and let one ordinary test start them:

       def test_interpreted():
           ladder.interpret(__file__)                 # TRITON_INTERPRET=1 pytest -m interpret <file>

   Use float32 and float16 only: the interpreter multiplies bfloat16 as raw bits. It checks no bounds.
3. Sanitised: tests marked `@pytest.mark.sanitize` are written for `device="cuda"` (with `backend="triton"`:
   the tensors really lie on the CPU). `make sanitize` runs all; an ordinary test starts the small ones:

       def test_sanitised():
           ladder.sanitize(__file__, select="small")  # python -m ttsem.sanitize pytest -m sanitize -k small

   `tests/conftest.py` leaves both marks out of a plain `pytest tests`, except that sanitize tests run where
   there is a GPU. The fixture `poison` (there, for `pytest.mark.usefixtures`) wraps `poisoned_empty`.
4. Cross-compilation: `compile_for` builds a kernel for any architecture and reads registers, spills, shared
   memory and matrix instructions out of the machine code. `Compiled.problems()` is the list a test asserts to
   be empty.

`cuobjdump` and `nvdisasm` lie inside the triton wheel (triton/backends/nvidia/bin); what AMD's compiler has
to say stands in the metadata at the end of its assembly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils.deterministic

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


@dataclasses.dataclass(frozen=True)
class Arch:
    """Limits of one architecture; an SM is a compute unit on AMD, a warp a wavefront.

    `mma_flops` is the dense bf16 rate per SM and clock with fp32 accumulation (professional cards for sm86,
    sm89 and sm120; GeForce halves it), `exp_rate` the exponentials per SM and clock.
    """

    name: str
    backend: str
    capability: int | str
    warp_size: int
    shared_program: int  # bytes one program may use
    shared_sm: int  # bytes the programs on one SM share
    shared_reserved: int  # bytes the system takes from each program
    warps_sm: int
    programs_sm: int
    matrix_unit: str  # what its matrix instructions begin with
    mma_flops: int
    exp_rate: int = 16


_KB = 1024
ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm80", "cuda", 80, 32, 163 * _KB, 164 * _KB, _KB, 64, 32, "HMMA", 2048),
        Arch("sm86", "cuda", 86, 32, 99 * _KB, 100 * _KB, _KB, 48, 16, "HMMA", 1024),
        Arch("sm89", "cuda", 89, 32, 99 * _KB, 100 * _KB, _KB, 48, 24, "HMMA", 1024),
        Arch("sm90", "cuda", 90, 32, 227 * _KB, 228 * _KB, _KB, 64, 32, "HGMMA", 4096),
        Arch("sm100", "cuda", 100, 32, 227 * _KB, 228 * _KB, _KB, 64, 32, "UTCHMMA", 8192),
        Arch("sm120", "cuda", 120, 32, 99 * _KB, 100 * _KB, _KB, 48, 24, "HMMA", 1024),
        Arch("gfx942", "hip", "gfx942", 64, 64 * _KB, 64 * _KB, 0, 32, 16, "v_mfma", 2048),
        Arch("gfx950", "hip", "gfx950", 64, 160 * _KB, 160 * _KB, 0, 32, 16, "v_mfma", 4096),
    )
}

_MATRIX = re.compile(r"^(HMMA|IMMA|HGMMA|QGMMA|UTC\w*MMA|QMMA|OMMA|v_s?mfma)")


@dataclasses.dataclass
class Compiled:
    """What the machine code of one kernel, built for one architecture, says about itself."""

    arch: Arch
    num_warps: int
    num_stages: int
    registers: int  # per thread
    spill_bytes: int  # per thread: the stack frame (NVIDIA), the scratch memory (AMD)
    local_accesses: int  # loads and stores of that memory
    shared_bytes: int  # per program
    matrix_instructions: dict[str, int]  # full mnemonic -> how many stand in the code
    assembly: str = dataclasses.field(repr=False)
    ttgir: str = dataclasses.field(repr=False)

    @property
    def occupancy(self) -> int:
        """Programs that fit on one SM at a time; 0 when one does not fit."""
        arch, warps = self.arch, self.num_warps
        if self.shared_bytes > arch.shared_program:
            return 0
        per_warp = -(-self.registers // 8) * 8
        if arch.backend == "cuda":  # 64 K registers, given out to warps in units of 256
            by_registers = 65536 // (max(per_warp, 8) * 32) // warps
        else:  # 512 registers per lane on each of four SIMDs, at most 8 waves each
            by_registers = 4 * min(8, 512 // max(per_warp, 8)) // warps
        shared = -(-(self.shared_bytes + arch.shared_reserved) // 128) * 128
        by_shared = arch.shared_sm // shared if shared else arch.programs_sm
        return min(by_registers, by_shared, arch.warps_sm // warps, arch.programs_sm)

    def problems(self, *, matrix_unit: bool = True) -> list[str]:
        """List what keeps this build from being shipped.

        Args:
            matrix_unit: whether the kernel must use the architecture's own matrix instructions, and no other.

        Returns:
            One sentence per violated rule; empty for a build that spills nothing and fits.
        """
        found = []
        if self.spill_bytes or self.local_accesses:
            found.append(f"spills {self.spill_bytes} bytes, {self.local_accesses} local accesses")
        if self.shared_bytes > self.arch.shared_program:
            found.append(
                f"needs {self.shared_bytes} bytes of shared memory, {self.arch.shared_program} exist"
            )
        wrong = [name for name in self.matrix_instructions if not name.startswith(self.arch.matrix_unit)]
        if matrix_unit and (wrong or not self.matrix_instructions):
            found.append(f"uses {wrong or 'no matrix instruction'} instead of {self.arch.matrix_unit}")
        return found


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: str,
    *,
    num_warps: int = 4,
    num_stages: int | None = None,
    divisible: Iterable[str] | None = None,
    **options: Any,
) -> Compiled:
    """Compile a kernel for an architecture that need not be present.

    Args:
        kernel: the `@triton.jit` function.
        signature: argument name -> Triton type ("*bf16", "i32", "fp32", "tensordesc<bf16[64, 128]>"), for
            every argument that is no constexpr. One that the launcher would specialise on 1 or None belongs
            into `constexprs`.
        constexprs: argument name -> value.
        arch: a key of `ARCHS`.
        num_warps, num_stages: launch options (None: Triton's default); others (`maxnreg`, ...) by name.
        divisible: arguments known to be multiples of 16; by default all pointers and all called `stride*`.

    Returns:
        The static facts. Floating-point contraction is always on, or counts change with Triton's default.

    Raises:
        ValueError: for an unknown architecture, an argument without a type, or under TRITON_INTERPRET.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}: expected one of {', '.join(ARCHS)}")
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"expected a triton.JITFunction, got {type(kernel).__name__} (is TRITON_INTERPRET set?)"
        )
    missing = [n for n in kernel.arg_names if n not in signature and n not in constexprs]
    extra = [n for n in (*signature, *constexprs) if n not in kernel.arg_names]
    if missing or extra:
        raise ValueError(f"{kernel.__name__}: no type for {missing}, no such argument {extra}")
    if divisible is None:
        divisible = [n for n, t in signature.items() if t.startswith("*") or n.startswith("stride")]
    facts = ARCHS[arch]
    stages = {} if num_stages is None else {"num_stages": num_stages}
    # the order of the signature is the order of the arguments
    types = {n: "constexpr" if n in constexprs else signature[n] for n in kernel.arg_names}
    attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible if n in signature}
    built = triton.compile(
        ASTSource(kernel, signature=types, constexprs=dict(constexprs), attrs=attrs),
        target=GPUTarget(facts.backend, facts.capability, facts.warp_size),
        options={"num_warps": num_warps, "enable_fp_fusion": True, **stages, **options},
    )
    read = _read_cubin if facts.backend == "cuda" else _read_amdgcn
    registers, spill_bytes, local_accesses, assembly = read(built.asm)
    return Compiled(
        arch=facts,
        num_warps=_total_warps(built.asm["ttgir"], num_warps),
        num_stages=built.metadata.num_stages,
        registers=registers,
        spill_bytes=spill_bytes,
        local_accesses=local_accesses,
        shared_bytes=built.metadata.shared,
        matrix_instructions=dict(Counter(m for m in mnemonics(assembly) if _MATRIX.match(m))),
        assembly=assembly,
        ttgir=built.asm["ttgir"],
    )


def mnemonics(assembly: str) -> Iterator[str]:
    """Yield the mnemonic of every instruction in `nvdisasm` output or in AMD assembly."""
    for line in assembly.splitlines():
        if name := mnemonic(line):
            yield name


def mnemonic(line: str) -> str | None:
    """Return the mnemonic in a line of disassembly, without its predicate; None for a label or directive."""
    sass = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
    if sass:
        return sass.group(1)
    gcn = re.match(r"\t([a-z]+_\w+)\b", line)
    return gcn.group(1) if gcn else None


def _total_warps(ttgir: str, num_warps: int) -> int:
    total = re.search(r'"ttg.total-num-warps" = (\d+)', ttgir)  # warp specialisation adds warps
    return int(total.group(1)) if total else num_warps


def _read_cubin(asm: Mapping[str, Any]) -> tuple[int, int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _nvidia_tool("nvdisasm", "-c", file.name)
    frame = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if frame is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    local = sum(name.startswith(("LDL", "STL")) for name in mnemonics(sass))
    return int(frame.group(1)), int(frame.group(2)), local, sass


def _nvidia_tool(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [_nvidia_bin() / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout


@functools.cache
def _nvidia_bin() -> Path:
    import triton.backends.nvidia as nvidia

    return Path(nvidia.__path__[0]) / "bin"


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, int, str]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly's metadata has no {name}")
        return int(found.group(1))

    # vgpr_count includes the accumulation registers; scalar registers spill to vector registers
    scratch = max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count"))
    code = text.split("\t.amdhsa_kernel", 1)[0]
    local = sum(name.startswith(("scratch_", "buffer_store_dword_spill")) for name in mnemonics(code))
    return field("vgpr_count"), scratch, local, code


def assert_close_to_float64(
    actual: torch.Tensor,
    expected: torch.Tensor,
    eager: torch.Tensor,
    *,
    atol: float = 1e-5,
    factor: float = FORWARD_FACTOR,
    name: str = "output",
) -> tuple[float, float]:
    """Check that a kernel is about as exact as eager torch in the same dtype.

    The rule is `max|actual - expected| <= factor * max|eager - expected| + atol`, as in flash-attn's tests;
    where the reference is infinite or NaN, `actual` must be so too.

    Args:
        actual: the kernel's result, any dtype.
        expected: the reference's result, computed in float64 from the same (rounded) inputs, same shape.
        eager: the result of plain torch in the kernel's dtype, same shape.
        atol: what is allowed when eager is exact, in units of the result.
        factor: `FORWARD_FACTOR`, or `GRADIENT_FACTOR` for gradients.
        name: what to call the tensor in the message.

    Returns:
        The two errors, of the kernel and of eager.

    Raises:
        AssertionError: when the bound is exceeded, naming the worst element.
    """
    assert expected.dtype == torch.float64, (
        f"{name}: the reference must run in float64, it is {expected.dtype}"
    )
    assert actual.shape == expected.shape == eager.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(expected.shape)}, {tuple(eager.shape)} differ"
    )
    got, want, plain = (x.detach().cpu().double() for x in (actual, expected, eager))
    special = ~want.isfinite()
    same = torch.where(want.isnan(), got.isnan(), got == want)
    assert bool(same[special].all()), f"{name}: infinities or NaN differ from the reference"
    if special.all():
        return 0.0, 0.0
    error = (got - want).abs().masked_fill(special, 0.0)
    assert bool(error.isfinite().all()), f"{name}: {int((~error.isfinite()).sum())} elements are not finite"
    eager_error = float((plain - want).abs().masked_fill(special, 0.0).max())
    worst, bound = float(error.max()), factor * eager_error + atol
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= bound, (
        f"{name}: error {worst:.3g} at {at} exceeds {factor:g} x eager's {eager_error:.3g} + {atol:g}; "
        f"got {float(got[at]):.6g}, expected {float(want[at]):.6g}"
    )
    return worst, eager_error


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill every tensor that torch allocates uninitialised with NaN (integers with their maximum).

    It uses torch's own switch, which lies below `torch.empty`, `new_empty`, `empty_like` and `empty_strided`.
    """
    deterministic: Any = (
        torch.utils.deterministic
    )  # its attributes are properties that type checkers do not know
    state = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(state[0], warn_only=state[1])
        deterministic.fill_uninitialized_memory = state[2]


def patch_language_once() -> None:
    """Have Triton's interpreter prepare `triton.language` once a launch: a third less time.

    Triton 3.9 does it at every call of a device function, and finds nothing left to do.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # of another Triton

    # what the launch that runs has prepared: names of `triton.language` and `triton.language.core`
    prepared: set[str] = set()
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    @functools.cache
    def needed(function: Any) -> frozenset[str]:
        modules = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
        return frozenset(m.__name__ for m in modules if m in (language, language.core))

    def prepare_once(function: Any) -> Any:
        if needed(function) <= prepared:
            return interpreter._LangPatchScope()  # of nothing
        prepared.update(needed(function))
        return prepare(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()  # a launch takes back at its end what it prepared
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, launch_anew


def interpret(test_file: str | Path, *, select: str | None = None, timeout: float = 900) -> str:
    """Run the tests of a file that are marked `interpret` in a process with TRITON_INTERPRET=1.

    Args:
        test_file: the test file, usually `__file__`.
        select: a pytest `-k` expression.
        timeout: seconds.

    Returns:
        What pytest printed.

    Raises:
        AssertionError: when a test failed, or none ran.
    """
    return _pytest(["-m", "pytest"], test_file, "interpret", select, {"TRITON_INTERPRET": "1"}, timeout)


def sanitize(test_file: str | Path, *, select: str | None = None, timeout: float = 900) -> str:
    """Run the tests of a file that are marked `sanitize` under ttsem; arguments as for `interpret`."""
    return _pytest(
        ["-m", "ttsem.sanitize", "pytest"], test_file, "sanitize", select, {"TRITON_INTERPRET": "0"}, timeout
    )


def _pytest(
    command: list[str],
    test_file: str | Path,
    mark: str,
    select: str | None,
    variables: dict[str, str],
    timeout: float,
) -> str:
    arguments = [
        str(test_file),
        "-m",
        mark,
        "-q",
        "-p",
        "no:cacheprovider",
        *(["-k", select] if select else []),
    ]
    # a process for each run: what is set when a kernel is decorated cannot be changed afterwards
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, (
        f"{mark} run of {test_file} failed ({done.returncode}):\n{done.stdout[-6000:]}"
    )
    return done.stdout
