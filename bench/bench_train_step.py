"""A SimCSE training step, packed by this package and padded by sentence-transformers' trainer.

SmolLM2-135M's first 7 layers, LoRA on all projections, batches of 64 Wikipedia sentences of whatever length
they have, attention dropout 0.3. Times are of whole steps, optimiser included, from the trainers' callbacks.
`python -m uncausal.bench.bench_train_step [--full] [--dry]`; `--full` adds bfloat16.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers import TrainerCallback

from uncausal.bench import measure
from uncausal.bench.inputs import checkpoint, sentences
from uncausal.bench.measure import OURS, Contest, Settings, resident_bytes

LAYERS, BATCH, STEPS, DROPOUT = 7, 64, 2, 0.3  # LAYERS, BATCH and STEPS are smaller in a dry run


class StepClock(TrainerCallback):
    """Collects the seconds and the loss of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def ours(settings: Settings, texts: list[str], bf16: bool) -> Callable[[], StepClock]:
    from uncausal import Encoder, SimCSE, train

    layers = 1 if settings.dry else LAYERS
    encoder = Encoder.from_pretrained(
        checkpoint(settings), num_layers=layers, dtype="float32", device=settings.device
    )
    batch = 4 if settings.dry else BATCH
    stage = SimCSE(
        max_steps=len(texts) // batch, batch_size=batch, attention_dropout=DROPOUT, bf16=bf16, logging_steps=1
    )

    def run() -> StepClock:
        clock = StepClock()
        with tempfile.TemporaryDirectory() as folder:
            train(encoder, stage, texts, folder, callbacks=[clock], progress=False)
        return clock

    return run


def sentence_transformers(settings: Settings, texts: list[str], bf16: bool) -> Callable[[], StepClock]:
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from uncausal.encoder.training.lora import LORA_TARGETS
    from uncausal.encoder.training.stages.simcse import attention_dropout

    options = {"dtype": "float32", "attn_implementation": "sdpa"}
    model = SentenceTransformer(checkpoint(settings), device=settings.device, model_kwargs=options)
    backbone: Any = model[0].auto_model  # type: ignore[union-attr]
    backbone.layers = backbone.layers[: 1 if settings.dry else LAYERS]
    model.max_seq_length = 128
    model.add_adapter(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=list(LORA_TARGETS)))
    pairs = Dataset.from_dict({"anchor": texts, "positive": texts})
    batch = 4 if settings.dry else BATCH

    def run() -> StepClock:
        clock = StepClock()
        with tempfile.TemporaryDirectory() as folder, attention_dropout(backbone, DROPOUT):
            arguments = SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=len(texts) // batch,
                per_device_train_batch_size=batch,
                learning_rate=3e-5,
                bf16=bf16,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=settings.device == "cpu",
                dataloader_pin_memory=settings.device == "cuda",
            )
            loss = MultipleNegativesRankingLoss(model, scale=20.0)
            trainer = SentenceTransformerTrainer(
                model, arguments, train_dataset=pairs, loss=loss, callbacks=[clock]
            )
            trainer.train()
        return clock

    return run


PROVIDERS: dict[str, Callable[..., Callable[[], StepClock]]] = {
    OURS: ours,
    "sentence-transformers": sentence_transformers,
}


def simcse(settings: Settings, bf16: bool) -> Contest:
    """The same sentences through both trainers; the first step of every training warms up, its loss is kept.

    Memory is what the process grew by from before a training to its highest point.
    """
    if bf16 and not settings.full:
        pytest.skip("with --full")
    steps = 2 if settings.dry else STEPS
    texts = sentences(steps * (4 if settings.dry else BATCH))
    runs = {name: build(settings, texts, bf16) for name, build in PROVIDERS.items()}
    facts: dict[str, dict[str, Any]] = {}

    def seconds(name: str) -> float:
        clocks: list[StepClock] = []
        peak = resident_bytes(lambda: clocks.append(runs[name]()), settings.device)
        facts[name] = {"loss": clocks[0].losses[0], "peak_bytes": peak}
        return statistics.median(clocks[0].seconds[1:])

    from transformers import AutoTokenizer

    tokens = 2 * sum(map(len, AutoTokenizer.from_pretrained(checkpoint(settings))(texts)["input_ids"]))
    return Contest(
        {name: functools.partial(seconds, name) for name in runs},
        work={"tokens": tokens / steps},
        rounds=3 if settings.full else 1,
        warm_up=False,
        derive=lambda times: facts,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def bench_simcse(record, bf16, provider):
    record(simcse, provider, bf16)


if __name__ == "__main__":
    sys.exit(measure.main(__file__, sys.argv[1:]))
