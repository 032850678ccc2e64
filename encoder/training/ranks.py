"""What the processes of a run tell one another; with one process nothing is exchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import PartialState


def process_state(device: torch.device) -> PartialState:
    """Return accelerate's state of this process, made for the device that the model is on.

    Without `cpu=True` accelerate takes every process of a torchrun without GPUs for the only one.
    """
    on_cpu = device.type == "cpu"
    if PartialState(cpu=on_cpu).num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        PartialState._reset_state()  # something before us made it without `cpu`
    return PartialState(cpu=on_cpu)


def total(value: float) -> float:
    """The sum of a number over all processes; none goes on before all have given theirs."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    # Doubles where the backend has them: counts of tokens are exact to 2^53.
    number = torch.tensor(value, dtype=torch.float64, device=state.device)
    dist.all_reduce(number)
    return number.item()


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; the answer is the same in all."""
    return total(float(flag)) > 0


@contextmanager
def together() -> Iterator[None]:
    """Leave the block in all processes, or raise in all of them where it failed in one.

    One process that raises alone leaves the others waiting for it in the next exchange.
    """
    error = None
    try:
        yield
    except Exception as failure:
        error = failure
    if anywhere(error is not None):
        raise error or RuntimeError("another process of this run failed; its own message says why")
