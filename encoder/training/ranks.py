"""What the processes of a run tell one another; with one process nothing is exchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from uncausal.encoder.files import held


def process_state(device: torch.device) -> PartialState:
    """Return accelerate's state of this process, made for the device that the model is on.

    Without `cpu=True` accelerate takes every process of a torchrun without GPUs for the only one.
    """
    on_cpu = device.type == "cpu"
    if PartialState(cpu=on_cpu).num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        PartialState._reset_state()  # something before us made it without `cpu`
    return PartialState(cpu=on_cpu)


def sharded_by(arguments: Mapping[str, Any]) -> str | None:
    """Name what would leave every process with a part of the weights alone, or None.

    It is asked for in the Trainer's arguments, or of `accelerate launch`, which tells it in the environment.
    """

    def told(name: str) -> str:
        return os.environ.get(f"ACCELERATE_{name}", "")

    if arguments.get("fsdp") or told("USE_FSDP").lower() == "true":
        return "FSDP"
    stage, config = told("DEEPSPEED_ZERO_STAGE"), arguments.get("deepspeed") or told("DEEPSPEED_CONFIG_FILE")
    with suppress(OSError, ValueError, KeyError, TypeError):  # what is wrong with it, DeepSpeed will say
        if isinstance(config, str) and not config.lstrip().startswith("{"):
            config = Path(config).read_text()
        config = json.loads(config) if isinstance(config, str) else config
        stage = config["zero_optimization"]["stage"]
    return "DeepSpeed's ZeRO-3" if str(stage) == "3" else None


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


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """For the block, hold a folder against other runs; the main process does it for all of this one.

    Raises:
        ValueError: another run holds it. OSError: it cannot be written.
    """
    with ExitStack() as stack:
        with together():
            if PartialState().is_main_process:
                try:
                    stack.enter_context(held(folder))
                except OSError as error:
                    raise OSError(f"cannot write in {folder}: {error.strerror or error}") from error
        yield
