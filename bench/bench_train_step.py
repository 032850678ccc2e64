"""Training steps, packed here and padded by sentence-transformers' trainer; what options cost a step.

SmolLM2-135M's first 7 layers, LoRA on all projections, batches of 64 Wikipedia sentences of whatever length
they have, attention dropout 0.3 (SimCSE); 11 layers, 64 triplets of such sentences (supervised; that trainer
leaves out padding only with FlashAttention, on a GPU). Times are of whole steps, optimiser included, from the
trainers' callbacks.
The options are those of a contrastive step of 64 triplets of such sentences: instructions and own negatives
(the instruction stage), Matryoshka prefixes, GradCache, and with it a batch of 4,096; compiled layers, in
bfloat16. The short texts have 20 to 30 tokens: 11 layers train on them and encode them with compiled
attention, and without a compiler.
`python -m uncausal.bench.bench_train_step [--full] [--dry]`; `--full` adds bfloat16 and the large batch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from transformers import TrainerCallback

from uncausal.bench import measure
from uncausal.bench.inputs import checkpoint, sentences
from uncausal.bench.measure import OURS, Contest, Settings, resident_bytes

LAYERS, BATCH, STEPS, DROPOUT = 7, 64, 2, 0.3  # LAYERS, BATCH and STEPS are smaller in a dry run
SHORT_LAYERS = 11
LARGE, WIDTHS = 4096, (576, 256, 128, 64)
TOLD = ("Find the sentence that follows", "Find a sentence on the same subject", "")
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {  # the second of a case against the first
    "instruction": {OURS: {}, "instruction stage": {"hard_negatives": "own", "in_batch_negatives": False}},
    "matryoshka": {OURS: {}, "four widths": {"matryoshka_dims": WIDTHS}},
    "gradcache": {OURS: {}, "mini-batches of 16": {"mini_batch_size": 16}},
    "compiled": {OURS: {"bf16": True}, "compiled layers": {"bf16": True, "compile_layers": True}},
    "large": {OURS: {}, "4096 by 64": {"batch_size": LARGE, "mini_batch_size": 64}},
}


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


def ours(settings: Settings, data: list[Any], bf16: bool) -> Callable[[], StepClock]:
    from uncausal import Contrastive, Encoder, SimCSE, train

    supervised = isinstance(data[0], dict)
    encoder = Encoder.from_pretrained(
        checkpoint(settings), num_layers=depth(settings, data), dtype="float32", device=settings.device
    )
    batch = 4 if settings.dry else BATCH
    common: dict[str, Any] = {"batch_size": batch, "bf16": bf16, "logging_steps": 1}
    common |= {"max_steps": len(data) // batch, "max_length": 128}
    stage = (
        Contrastive(**common, temperature=0.05) if supervised else SimCSE(**common, attention_dropout=DROPOUT)
    )

    def run() -> StepClock:
        clock = StepClock()
        with tempfile.TemporaryDirectory() as folder:
            train(encoder, stage, data, folder, callbacks=[clock], progress=False)
        return clock

    return run


def depth(settings: Settings, data: list[Any]) -> int:
    """Layers that train on texts, or on triplets."""
    if settings.dry:
        return 1
    return SHORT_LAYERS if isinstance(data[0], dict) else LAYERS


def sentence_transformers(settings: Settings, data: list[Any], bf16: bool) -> Callable[[], StepClock]:
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
    backbone.layers = backbone.layers[: depth(settings, data)]
    model.max_seq_length = 128
    model.add_adapter(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=list(LORA_TARGETS)))
    supervised = isinstance(data[0], dict)
    rows = Dataset.from_list(data if supervised else [{"anchor": x, "positive": x} for x in data])
    dropout = 0.0 if supervised else DROPOUT
    batch = 4 if settings.dry else BATCH

    def run() -> StepClock:
        clock = StepClock()
        with tempfile.TemporaryDirectory() as folder, attention_dropout(backbone, dropout):
            arguments = SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=len(data) // batch,
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
                model, arguments, train_dataset=rows, loss=loss, callbacks=[clock]
            )
            trainer.train()
        return clock

    return run


PROVIDERS: dict[str, Callable[..., Callable[[], StepClock]]] = {
    OURS: ours,
    "sentence-transformers": sentence_transformers,
}


def beside_peer(settings: Settings, bf16: bool, supervised: bool) -> Contest:
    """The same sentences through both trainers; the first step of every training warms up, its loss is kept.

    Memory is what the process grew by from before a training to its highest point.
    """
    if bf16 and not settings.full:
        pytest.skip("with --full")
    steps = 2 if settings.dry else STEPS
    count = steps * (4 if settings.dry else BATCH)
    data: list[Any] = triplets(count, told=False) if supervised else sentences(count)
    runs = {name: build(settings, data, bf16) for name, build in PROVIDERS.items()}
    facts: dict[str, dict[str, Any]] = {}

    def seconds(name: str) -> float:
        clocks: list[StepClock] = []
        peak = resident_bytes(lambda: clocks.append(runs[name]()), settings.device)
        facts[name] = {"loss": clocks[0].losses[0], "peak_bytes": peak}
        return statistics.median(clocks[0].seconds[1:])

    from transformers import AutoTokenizer

    texts = [text for row in data for text in row.values()] if supervised else 2 * data
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(settings))
    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=128)["input_ids"]))
    return Contest(
        {name: functools.partial(seconds, name) for name in runs},
        work={"tokens": tokens / steps},
        rounds=3 if settings.full else 1,
        warm_up=False,
        derive=lambda times: facts,
    )


def triplets(count: int, told: bool) -> list[dict[str, str]]:
    """So many rows of three sentences each, with an instruction if told."""
    found = itertools.cycle(sentences(3 * count))
    columns = ("anchor", "positive", "negative")
    rows: list[dict[str, str]] = [
        dict(zip(columns, itertools.islice(found, 3), strict=True)) for _ in range(count)
    ]
    return [{**row, "instruction": TOLD[i % 3]} for i, row in enumerate(rows)] if told else rows


def options(settings: Settings, case: str) -> Contest:
    """A contrastive step without an option and with it; tokens a second are of the real tokens of either."""
    from uncausal import Contrastive, Encoder, train

    if case == "large" and not settings.full:
        pytest.skip("with --full")
    layers = 1 if settings.dry else LAYERS
    batch, steps = (4, 2) if settings.dry else (BATCH, STEPS)
    common: dict[str, Any] = {"max_steps": steps, "batch_size": batch, "max_length": 128, "bf16": False}
    common |= {"temperature": 0.05, "warmup_steps": 0, "logging_steps": 1}
    facts: dict[str, dict[str, Any]] = {}

    def seconds(name: str) -> float:
        encoder = Encoder.from_pretrained(
            checkpoint(settings), num_layers=layers, dtype="float32", device=settings.device
        )
        changes = OPTIONS[case][name]
        if settings.dry:
            changes = {key: {"batch_size": 8, "mini_batch_size": 2}.get(key, x) for key, x in changes.items()}
        stage = Contrastive(**{**common, **changes})
        rows = triplets(stage.batch_size, told=case == "instruction" and bool(changes))
        clock, results = StepClock(), []
        with tempfile.TemporaryDirectory() as folder:

            def run() -> None:
                results.append(train(encoder, stage, rows, folder, callbacks=[clock], progress=False))

            peak = resident_bytes(run, settings.device)
        taken = statistics.median(clock.seconds[1:])
        tokens = results[0].tokens / stage.max_steps
        facts[name] = {"loss": clock.losses[0], "peak_bytes": peak, "tokens_per_s": tokens / taken}
        return taken

    return Contest(
        {name: functools.partial(seconds, name) for name in OPTIONS[case]},
        rounds=3 if settings.full and case != "large" else 1,
        warm_up=False,
        derive=lambda times: facts,
    )


@functools.cache
def short_texts(settings: Settings, count: int) -> list[str]:
    """Sentences of 20 to 30 tokens, their median 25."""
    from transformers import AutoTokenizer

    found = sentences(30 * count)
    lengths = map(len, AutoTokenizer.from_pretrained(checkpoint(settings))(found)["input_ids"])
    return [text for text, n in zip(found, lengths, strict=True) if 20 <= n <= 30][:count]


def short(settings: Settings, case: str, bf16: bool) -> Contest:
    """A step of SimCSE or of triplets, or `encode`: attention compiled, and by torch's operations."""
    from uncausal import Contrastive, Encoder, SimCSE, train
    from uncausal.kernels.cpu import attention_cpu

    if bf16 and not settings.full or settings.device != "cpu":
        pytest.skip("with --full, on a CPU")
    batch, steps, layers = (4, 2, 1) if settings.dry else (BATCH, STEPS + 1, SHORT_LAYERS)
    texts = short_texts(settings, 3 * batch * steps)
    columns = ("anchor", "positive", "negative")
    rows = [dict(zip(columns, texts[i : i + 3], strict=True)) for i in range(0, len(texts) - 2, 3)]
    common: dict[str, Any] = {"max_steps": steps, "batch_size": batch, "bf16": bf16, "warmup_steps": 0}
    dtype = "bfloat16" if bf16 and case == "encode" else "float32"
    encoder = Encoder.from_pretrained(checkpoint(settings), num_layers=layers, dtype=dtype, device="cpu")

    def seconds(compiled: bool) -> float:
        clock = StepClock()
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            if not compiled:
                stack.enter_context(mock.patch.object(attention_cpu, "library", lambda: None))
            quiet: dict[str, Any] = {"callbacks": [clock], "progress": False}
            if case == "simcse":
                stage = SimCSE(**common, attention_dropout=DROPOUT)
                train(encoder, stage, texts[: batch * steps], folder, **quiet)
            elif case == "nli":
                stage = Contrastive(**common, temperature=0.05, max_length=128)
                train(encoder, stage, rows, folder, **quiet)
            else:
                for _ in range(2):
                    start = time.perf_counter()
                    encoder.encode(texts)
                    clock.seconds.append(time.perf_counter() - start)
        return statistics.median(clock.seconds[1:])

    return Contest(
        {OURS: functools.partial(seconds, True), "torch's operations": functools.partial(seconds, False)},
        rounds=5 if settings.full else 1,
        warm_up=False,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def bench_simcse(record, bf16, provider):
    record(beside_peer, provider, bf16, False)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def bench_supervised(record, bf16, provider):
    record(beside_peer, provider, bf16, True)


CASES = [(case, provider) for case, providers in OPTIONS.items() for provider in providers]


@pytest.mark.parametrize("case, provider", CASES, ids=["-".join(pair) for pair in CASES])
def bench_options(record, case, provider):
    record(options, provider, case)


@pytest.mark.parametrize("provider", [OURS, "torch's operations"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ["simcse", "nli", "encode"])
def bench_short(record, case, bf16, provider):
    record(short, provider, case, bf16)


if __name__ == "__main__":
    sys.exit(measure.main(__file__, sys.argv[1:]))
