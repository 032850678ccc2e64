"""What a training run shows, a bar on a terminal and sparse lines elsewhere, and how Ctrl-C stops it."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from uncausal.encoder.training.ranks import anywhere

SECONDS_BETWEEN_LINES = 15.0


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a checkpoint was written; the message says how to resume."""


class Progress(TrainerCallback):
    """Shows step, loss, tokens per second and time left: as a bar on a terminal, else as sparse lines."""

    def __init__(self, name: str, stream: Any = None):
        self.name = name
        self.stream = stream or sys.stderr
        self.terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        self.figures: dict[str, str] = {}
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.started = state.global_step, time.monotonic()
        self.shown = -SECONDS_BETWEEN_LINES
        if self.terminal and state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.name,
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.figures["loss"] = f"{logs['loss']:.4f}"
        if "tokens_per_second" in logs:
            self.figures["tokens/s"] = f"{logs['tokens_per_second']:,.0f}"
        scores = {k.removeprefix("eval_"): f"{v:.4g}" for k, v in logs.items() if k.startswith("eval_")}
        self.figures.update(scores)
        if self.bar is not None:
            self.bar.set_postfix(self.figures)
            return
        now = time.monotonic()
        last = state.global_step >= state.max_steps
        if "loss" in logs and (last or now - self.shown >= SECONDS_BETWEEN_LINES) or scores:
            self.shown = now
            rate = (now - self.started) / max(state.global_step - self.first_step, 1)
            left = _clock(rate * (state.max_steps - state.global_step))
            figures = ", ".join(f"{k} {v}" for k, v in self.figures.items())
            print(
                f"{self.name}: step {state.global_step}/{state.max_steps}, {figures}, {left} left",
                file=self.stream,
                flush=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands, also when training ended with an error."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopOnSignal(TrainerCallback):
    """At the end of the step in which a signal came: write a checkpoint, then stop."""

    def __init__(self) -> None:
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Every process must stop after the same step, whichever of them had the signal, or the others hang.
        agreed = anywhere(self.stopped)
        self.stopped = self.stopped or agreed  # a signal may have come meanwhile, for the next step
        if agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over Ctrl-C and SIGTERM; a second one ends the run at once, without a checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            print("\nstopping after this step (again: at once)", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
