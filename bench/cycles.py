"""Cycles per tile of a kernel's main loop, counted in its disassembly.

A loop is a natural loop of the control flow graph, so waiting loops that the compiler moved behind the
kernel's end count into the loop they return to. The main loops are the innermost ones with matrix
instructions. For one iteration by all warps of a program, on one SM:

    mma    FLOPs of the matrix instructions / the architecture's dense rate
    exp    MUFU instructions x 32 lanes / 16 per clock (AMD: transcendentals x 64 lanes / 16 or 32 per clock)
    issue  all instructions / 4 per clock (AMD: cycles of the vector units, transcendentals included)
    bound  useful mma / (mma + max(exp, issue)): the share of the matrix unit's peak if nothing overlaps; rows
           that a layout computes twice, as more warps than row tiles do, are not useful

Every instruction of the loop counts once for every warp, also those under a branch. The bound ranks
variants of one kernel, and peers compiled the same way. It knows nothing of latency, memory or overlap: it
is not a speed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from uncausal.bench.ladder import Arch, Compiled, mnemonic

_MATRIX = re.compile(r"HMMA|HGMMA|UTC\w*MMA|v_s?mfma")
_AMD_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f")
_TARGET = re.compile(r"`\((\.L\w+)\)|\s(\.LBB\w+)")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of one iteration of a main loop, per program and SM."""

    mma: float
    exp: float
    issue: float
    useful: float  # share of mma

    @property
    def bound(self) -> float:
        return self.mma * self.useful / (self.mma + max(self.exp, self.issue))


def main_loop(built: Compiled) -> Cost | None:
    """Count the steady-state loop: of several main loops the one with the best bound, edges run the others.

    Returns:
        The cost, or None for a kernel without a loop that holds matrix instructions.
    """
    return max(
        (_cost(built, loop) for loop in main_loops(built.assembly)), key=lambda c: c.bound, default=None
    )


def products(ttgir: str) -> list[int]:
    """Count the matrix products in each innermost loop of Triton's IR that multiplies."""
    loops = [len(_dots(loop)) for loop in _ttgir_loops(ttgir) if len(list(_ttgir_loops(loop))) == 1]
    return [count for count in loops if count]


def main_loops(assembly: str) -> list[list[str]]:
    """List the mnemonics of each innermost loop that holds matrix instructions, in the order of the code."""
    blocks, successors = _control_flow(assembly)
    with_mma = []
    for body in _natural_loops(successors):
        names = [name for i in sorted(body) for name in blocks[i]]
        if any(_MATRIX.match(name) for name in names):
            with_mma.append((body, names))
    return [names for body, names in with_mma if not any(other < body for other, _ in with_mma)]


def _cost(built: Compiled, loop: list[str]) -> Cost:
    arch, warps = built.arch, built.num_warps
    useful = _useful_share(built.ttgir)
    mma = sum(_matrix_cycles(name, arch, warps) for name in loop)
    if arch.matrix_unit == "UTCHMMA":
        mma += _tensor_memory_flops(
            built.ttgir, sum(name.startswith("UTC") and "MMA" in name for name in loop)
        )
        mma /= arch.mma_flops
    if arch.backend == "cuda":
        exp = sum(name.startswith("MUFU") for name in loop) * warps * 32 / arch.exp_rate
        return Cost(mma, exp, len(loop) * warps / 4, useful)
    special = sum(bool(_AMD_TRANSCENDENTAL.match(name)) for name in loop)
    vector = sum(name.startswith("v_") and not _MATRIX.match(name) for name in loop) - special
    exp = special * warps * 64 / arch.exp_rate
    return Cost(mma, exp, exp + vector * warps, useful)  # 64 lanes on 16 wide units, four of them


def _matrix_cycles(name: str, arch: Arch, warps: int) -> float:
    """Cycles of one matrix instruction issued by every warp; 0 for others, and for UTCHMMA (shape hidden)."""
    if found := re.match(r"HMMA\.(16)(8)(8|16)\.", name):
        m, n, k = (int(x) for x in found.groups())
    elif found := re.match(r"HGMMA\.(64)x(\d+)x(\d+)\.", name):
        m, n, k = (int(x) for x in found.groups())
        warps //= 4  # one instruction of a group of four warps
    elif found := re.match(r"v_s?mfma_\w+?_(\d+)x(\d+)x(\d+)", name):
        m, n, k = (int(x) for x in found.groups())
    else:
        return 0.0
    rate = arch.mma_flops / (2 if re.search("TF32|xf32", name) else 1)
    return 2 * m * n * k * warps / rate


def _tensor_memory_flops(ttgir: str, instructions: int) -> int:
    """FLOPs of the loop that holds so many UTCHMMA: their shapes stand only in Triton's own IR.

    A loop without an exact match may be one that the assembler unrolled.
    """
    loops = []
    for loop in _ttgir_loops(ttgir):
        shapes = [(m, n, k) for m, n, k, _ in _dots(loop)]
        count = sum(-(-m // 128) * -(-n // 256) * -(-k // 16) for m, n, k in shapes)
        loops.append((count, sum(2 * m * n * k for m, n, k in shapes)))
    candidates = {flops for count, flops in loops if count == instructions}
    candidates = candidates or {
        flops * instructions // count for count, flops in loops if count and instructions % count == 0
    }
    if len(candidates) != 1:
        raise ValueError(f"{len(candidates)} loops of the IR match {instructions} UTCHMMA instructions")
    return candidates.pop()


def _useful_share(ttgir: str) -> float:
    """Share of the multiplied rows and columns that are distinct, over all products of the kernel."""
    layouts = re.findall(
        r"^#(\w+) = #ttg\.\w+<.*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)", ttgir, re.M
    )
    tiles = {name: (int(wm) * int(im), int(wn) * int(jn)) for name, wm, wn, im, jn in layouts}
    useful = done = 0
    for m, n, k, layout in _dots(ttgir):
        rows, columns = tiles.get(layout, (1, 1))
        useful += m * n * k
        done += max(m, rows) * max(n, columns) * k
    return useful / done if done else 1.0


def _dots(ttgir: str) -> list[tuple[int, int, int, str]]:
    """List (M, N, K, name of the result's layout) of the matrix products in Triton's IR."""
    found = []
    for line in ttgir.splitlines():
        if re.search(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ", line):
            (m, k), (_, n), *_ = re.findall(r"<(\d+)x(\d+)x", line)
            layout = re.findall(r"#(\w+)>", line.split(" loc(")[0])
            found.append((int(m), int(n), int(k), layout[-1] if layout else ""))
    return found


def _ttgir_loops(ttgir: str) -> Iterator[str]:
    """Yield the text of every scf.for and scf.while, nested ones once more alone."""
    lines = ttgir.splitlines()
    for start, line in enumerate(lines):
        if "scf.for" in line or "scf.while" in line:
            indent = len(line) - len(line.lstrip())
            ends = (i for i in range(start + 1, len(lines)) if re.match(rf" {{{indent}}}}}(?! do)", lines[i]))
            yield "\n".join(lines[start : next(ends, len(lines))])


def _control_flow(assembly: str) -> tuple[list[list[str]], list[set[int]]]:
    """Split disassembly into basic blocks (lists of mnemonics) and the set of successors of each."""
    blocks: list[list[str]] = [[]]
    jumps: list[list[str]] = [[]]
    falls = [True]
    labels: dict[str, int] = {}

    def begin() -> None:
        if blocks[-1]:
            blocks.append([])
            jumps.append([])
            falls.append(True)

    for line in assembly.splitlines():
        if found := re.match(r"(\.L\w+):", line):
            begin()
            labels[found.group(1)] = len(blocks) - 1
            continue
        name = mnemonic(line)
        if name is None:
            continue
        blocks[-1].append(name)
        targets = [a or b for a, b in _TARGET.findall(line)]
        if name.startswith("BSSY"):  # names the place where threads meet again, and does not go there
            targets = []
        if ends := _ends_path(name, line):
            falls[-1] = False
        if targets or ends:
            jumps[-1] = targets
            begin()
    successors = [{labels[t] for t in jump if t in labels} for jump in jumps]
    for i, fall in enumerate(falls[:-1]):
        if fall:
            successors[i].add(i + 1)
    return blocks, successors


def _ends_path(name: str, line: str) -> bool:
    if re.search(r"@!?U?P\w", line):
        return False
    if name.startswith("BRA"):
        return not re.search(r"BRA\S*\s+!?U?P\d", line)
    return name.split(".")[0] in ("EXIT", "RET", "BRX", "JMP", "JMX", "s_branch", "s_endpgm", "s_setpc_b64")


def _natural_loops(successors: list[set[int]]) -> list[set[int]]:
    """Find the natural loops: for each header, the blocks that reach a back edge to it without passing it."""
    size = len(successors)
    predecessors: list[set[int]] = [set() for _ in range(size)]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].add(i)
    reachable, stack = {0}, [0]
    while stack:
        for j in successors[stack.pop()] - reachable:
            reachable.add(j)
            stack.append(j)
    everything = (1 << size) - 1
    dominators = [1] + [everything] * (size - 1)  # bit sets
    changed = True
    while changed:
        changed = False
        for i in sorted(reachable - {0}):
            common = everything
            for p in predecessors[i] & reachable:
                common &= dominators[p]
            common |= 1 << i
            if common != dominators[i]:
                dominators[i], changed = common, True
    bodies: dict[int, set[int]] = {}
    for i in sorted(reachable):
        for header in successors[i]:
            if dominators[i] >> header & 1:
                body = bodies.setdefault(header, {header})
                stack = [i]
                while stack:
                    j = stack.pop()
                    if j not in body:
                        body.add(j)
                        stack.extend(predecessors[j] & reachable)
    return [bodies[header] for header in sorted(bodies)]
