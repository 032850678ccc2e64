"""What `train` changes in Hugging Face's Trainer, for every stage.

It saves only what is trained and finite, swaps checkpoints in whole, counts real tokens, and keeps the
processes of a run in step.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from peft import PeftModel
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from uncausal.encoder import attention as packed_attention
from uncausal.encoder.batching import release_memory
from uncausal.encoder.files import flush_tree
from uncausal.encoder.layers import decoder_layers
from uncausal.encoder.training.checkpoints import UNWANTED, checkpoints
from uncausal.encoder.training.lora import load_trainable, save_trainable
from uncausal.encoder.training.ranks import anywhere, together, total
from uncausal.encoder.training.samplers import AllSteps

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2


class StageTrainer(Trainer):
    """A Trainer whose checkpoints hold the trained tensors alone and appear whole or not at all."""

    adapter: PeftModel | None = None
    trained: nn.Module  # the module whose trained tensors are saved
    stage_loss: nn.Module | None = None  # whose own weights are saved with them
    schedule_steps: int | None = None
    tokens = 0  # of this process
    _since: tuple[int, float] | None = None
    _staging: Path | None = None
    _broken: Tensor | bool = False

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(self.schedule_steps or num_training_steps, optimizer)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._since is None:
            self._since = (self.tokens, time.perf_counter())
        self.tokens += count_tokens(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        value = loss[0] if isinstance(loss, tuple) else loss
        self._broken = self._broken | ~value.detach().isfinite()  # a tensor: looked at when saving
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        release_memory()
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower the learning rate"
                )
            if self._since is not None:
                tokens, start = self._since
                logs["tokens_per_second"] = total(self.tokens - tokens) / (time.perf_counter() - start)
                self._since = None
        super().log(logs, *args, **kwargs)

    def check_finite(self) -> None:
        """Raise, in all processes, if the loss of a step so far or a trained weight is not finite."""
        finite = all(bool(p.isfinite().all()) for p in self.trained.parameters() if p.requires_grad)
        if anywhere(bool(self._broken) or not finite):
            raise FloatingPointError(
                f"the loss or a weight is not finite at step {self.state.global_step}, which is not saved: "
                "lower the learning rate"
            )

    def leave_out(self, seconds: float) -> None:
        """Take time that was no training out of the throughput."""
        if self._since is not None:
            tokens, start = self._since
            self._since = (tokens, start + seconds)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        save_trainable(self.trained, self.adapter, folder, self.stage_loss)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trainable(self.trained, self.adapter, Path(resume_from_checkpoint), self.stage_loss)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_finite()
        run, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        # One name for all processes of the run, each of which writes its random state there.
        staging = self._staging = run / f"{UNWANTED}{self.state.global_step}"
        try:
            with together():
                super()._save_checkpoint(model, trial)
            with together():  # one process moves what all have written, and the others wait for it
                if self.args.should_save:
                    flush_tree(staging / name)
                    shutil.rmtree(run / name, ignore_errors=True)
                    (staging / name).rename(run / name)
                    for old in checkpoints(run)[:-KEPT_CHECKPOINTS]:
                        shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = [str(path) for path in checkpoints(run)[-1:]] or ["there is none yet"]
            raise OSError(
                f"could not write a checkpoint in {run} ({error}). Make room and run the same again: it goes "
                f"on from the last whole checkpoint ({kept[0]})."
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self._staging = None


def count_tokens(inputs: dict[str, Any]) -> int:
    """Real tokens of a batch: what the masks admit, or every id where no mask stands beside the ids."""
    total = 0
    for name, value in inputs.items():
        if name.endswith("input_ids"):
            mask = inputs.get(name.removesuffix("input_ids") + "attention_mask")
            total += int(mask.sum()) if mask is not None else value.numel()
    return total


@contextmanager
def autocast_forward(backbone: Any, enabled: bool) -> Iterator[None]:
    """Run the backbone's matrix products in bfloat16 for a while; pooling and loss stay in float32."""
    if not enabled:
        yield
        return
    original, attend = backbone.forward, packed_attention.uncausal_attention
    device = next(backbone.parameters()).device.type

    def attend_in_bf16(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # Rotary embedding leaves queries and keys in float32; torch casts other attentions itself. Inside,
        # autocast would take the softmax out of the float32 that the operator asks for.
        with torch.autocast(device, enabled=False):
            return attend(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), *args, **kwargs)

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return original(*args, **kwargs)

    backbone.forward = forward
    ALL_ATTENTION_FUNCTIONS[packed_attention.NAME] = attend_in_bf16
    try:
        yield
    finally:
        del backbone.forward
        del ALL_ATTENTION_FUNCTIONS[packed_attention.NAME]  # uncovers the registered function


@contextmanager
def autocast_latents(pooling: nn.Module, enabled: bool) -> Iterator[None]:
    """Multiply in bfloat16 in latent pooling too, for a while: its kernels on a GPU are of half precision.

    What leaves it is float32 again, of numbers rounded to bfloat16.
    """
    layer: Any = getattr(pooling, "latent_attention_model", None)
    if not enabled or layer is None:
        yield
        return
    original, device = layer.forward, next(layer.parameters()).device.type

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return original(*args, **kwargs).float()

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def compiled_layers(backbone: Any, enabled: bool) -> Iterator[None]:
    """Compile the decoder layers for a while, on a CPU: a few programs serve all layers and every batch.

    Dropout is drawn as it is without, and in its order: GradCache draws it again in another program. On a
    GPU the tile maps of a batch are part of its layers, and each would be compiled anew.
    """
    layers = decoder_layers(backbone) if enabled else []
    device = next(backbone.parameters()).device.type
    if enabled and (device != "cpu" or not can_compile()):
        why = "no C++ compiler or no Python headers" if device == "cpu" else f"the model is on {device}"
        logger.warning("compile_layers: %s; training goes on without", why)
        layers = []
    kept = [(layer, layer._compiled_call_impl) for layer in layers]
    orders = ("fallback_random", True), ("reorder_for_locality", False), ("reorder_for_peak_memory", False)
    try:
        with torch._dynamo.config.patch(recompile_limit=64):  # stages, precisions and modes add up
            for layer in layers:
                layer.compile(dynamic=True, options=dict(orders))
            yield
    finally:
        for layer, call in kept:
            layer._compiled_call_impl = call


@cache
def can_compile() -> bool:
    """Whether torch's compiler can build something for the CPU."""
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.zeros(64))
    except Exception as error:
        logger.info("torch.compile: %s", error)
        return False
    return True


class Evaluate(TrainerCallback):
    """Evaluates during training, without touching its random state or its throughput."""

    def __init__(self, trainer: StageTrainer, encoder: Any, function: Callable[[Any], Any], every: int):
        self.trainer, self.encoder, self.function, self.every = trainer, encoder, function, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        started = time.perf_counter()
        self.encoder.eval()
        with torch.random.fork_rng():
            metrics = self.function(self.encoder)
        self.encoder.train()
        self.trainer.leave_out(time.perf_counter() - started)
        should_log = control.should_log
        self.trainer.log({f"eval_{name}": float(value) for name, value in metrics.items()})
        control.should_log = should_log  # logging clears it, and this step may have a loss to log


class PairTrainer(StageTrainer, SentenceTransformerTrainer):  # type: ignore[misc]
    """sentence-transformers' trainer with this package's checkpoints and order of batches."""

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        sampler = super().get_batch_sampler(dataset, *args, **kwargs)
        several = isinstance(self.train_dataset, DatasetDict)
        return sampler if several else AllSteps(sampler, self.args.max_steps)

    def get_multi_dataset_batch_sampler(self, *args: Any, **kwargs: Any) -> AllSteps:
        return AllSteps(super().get_multi_dataset_batch_sampler(*args, **kwargs), self.args.max_steps)
