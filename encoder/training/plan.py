"""What a recipe will cost on this machine: every stage timed for a step, before anything is trained."""

import copy
import logging
import platform
import random
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import torch
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm

from uncausal.encoder.data.pairs import DOCUMENT_INSTRUCTION, INSTRUCTION, read_pairs, text_columns
from uncausal.encoder.model import Encoder
from uncausal.encoder.pruning import Pruning
from uncausal.encoder.training.follow import CHOICE, OF_LOADING, asked_of, kept_choice, set_pooling
from uncausal.encoder.training.progress import TrainingInterrupted
from uncausal.encoder.training.recipes import RECIPE, Recipe, Step, load_recipe
from uncausal.encoder.training.run import restore_modules, train
from uncausal.encoder.training.stages.base import Stage
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.distill import Distill
from uncausal.encoder.training.stages.mntp import MNTP
from uncausal.encoder.training.stages.simcse import SimCSE
from uncausal.encoder.whitening import Whitening

logger = logging.getLogger(__name__)
SAMPLE = 500  # texts or rows of the data whose tokens are counted
MEASURED = 8192  # tokens of the timed batch at most; the rate of a larger one is taken to be the same
GIB = 1 << 30


def plan_recipe(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    model: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Estimate what `run_recipe` with the same arguments takes; every stage is timed at its own depth.

    Tokens of a stage are its steps times its batch times the mean tokens of a sample of its data, cut as the
    stage cuts them. Its rate is that of its second step, of the stage's own batch, or of one of about
    `MEASURED` tokens if that is less; a stage that embeds twice, by GradCache, does so in that step too.
    Memory is what the step took, scaled to what the stage has in memory at once. Layers are not compiled for
    it. A prune stage reads its curve, or takes the choice that `output` holds.

    Returns:
        The device, and a dict a stage with kind, layers, steps, tokens, tokens_per_second, memory_gib, hours;
        the stages of a recipe that teaches stand before the one that it teaches.
    """
    steps = recipe.with_data(data, data_dir)
    encoder = Encoder.from_pretrained(str(model or recipe.model), **recipe.loading(options))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(tqdm(steps, desc="Measuring stages", unit="stage", disable=None), 1):
            set_pooling(encoder, step)
            if isinstance(step.settings, Pruning):
                file = Path(output or folder) / "stages" / f"{number}-{step.kind}" / CHOICE
                choice = kept_choice(file, asked_of(step, str(model or recipe.model), data_dir))
                if choice is None:
                    triplets = step.read(data_dir) if step.needs_data else None
                    choice = step.settings.choose(encoder, triplets, show_progress_bar=False)
                encoder.prune(choice.kept)
                rows.append({"kind": step.kind, "layers": encoder.num_layers})
                continue
            if isinstance(step.settings, Whitening):
                rows.append({"kind": step.kind, "layers": encoder.num_layers})
                continue
            for name in getattr(step.settings, "teachers", ()):
                if name.startswith(RECIPE):  # which is made first
                    taught = load_recipe(name.removeprefix(RECIPE))
                    loading = {key: options[key] for key in OF_LOADING if key in options}
                    made = plan_recipe(taught, model=model, data_dir=data_dir, **loading)["stages"]
                    rows += [{**row, "kind": f"{taught.name}: {row['kind']}"} for row in made]
            figures = measure(encoder, step, Path(folder) / str(number), data_dir)
            rows.append({"kind": step.kind, "layers": encoder.num_layers, **figures})
    gpu = torch.cuda.get_device_name(encoder.device) if encoder.device.type == "cuda" else None
    device = gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"recipe": recipe.name, "variant": recipe.variant, "device": device, "stages": rows}


def measure(encoder: Encoder, step: Step, folder: Path, data_dir: Any) -> dict[str, Any]:
    """Train two steps, give the encoder its weights back, and scale what was seen to the whole stage."""
    stage: Any = step.settings
    data = step.read(data_dir)
    tokens, longest = tokens_of_row(encoder, stage, data)
    whole = stage.batch_size * tokens
    at_once = stage.mini_batch_size or stage.batch_size  # what GradCache or accumulation holds in memory
    if getattr(stage, "mini_batch_num_tokens", None):
        at_once = max(min(round(stage.mini_batch_num_tokens / longest), stage.batch_size), 1)
    batch = max(min(stage.batch_size, round(MEASURED / tokens)), 2)
    small = min(at_once, batch // 2 if stage.embeds_twice else batch)
    batch -= batch % small
    changes: dict[str, Any] = {"max_steps": 2, "batch_size": batch, "mini_batch_size": small}
    if hasattr(stage, "mini_batch_num_tokens"):
        changes["mini_batch_num_tokens"] = None
    if hasattr(stage, "lens_steps"):
        changes["lens_steps"] = min(stage.lens_steps, 2)
    changes["compile_layers"] = False  # the compiler's memory would count as the step's
    changes |= {"logging_steps": 1, "schedule_steps": None, "warmup_steps": 0, "report_to": "none"}
    if isinstance(stage, Distill):  # the vectors of a teacher cost what they cost only once
        changes |= {"teacher": None, "vectors": str(_random_vectors(encoder, data, folder))}
    before = copy.deepcopy(encoder.state_dict())
    modules = dict(encoder._modules)
    try:
        with memory(encoder.device) as peak:
            result = train(encoder, replace(stage, **changes), data, folder, resume=False, progress=False)
    except TrainingInterrupted:
        raise KeyboardInterrupt from None  # nothing of a plan is kept
    restore_modules(encoder, modules)
    encoder.load_state_dict(before)
    rate = [line["tokens_per_second"] for line in result.history if "tokens_per_second" in line][-1]
    resting = sum(p.numel() * p.element_size() for p in encoder.parameters())
    needed = resting + peak["bytes"] * max(at_once / small, 1)
    return {
        "steps": stage.max_steps,
        "tokens": round(stage.max_steps * whole),
        "tokens_per_second": round(rate, 1),
        "memory_gib": round(needed / GIB, 2),
        "hours": round(stage.max_steps * whole / rate / 3600, 3),
    }


def tokens_of_row(encoder: Encoder, stage: Stage, data: Any) -> tuple[float, float]:
    """The mean tokens of a row (a chunk, a text, or all texts of a pair), and of the longest of its texts."""
    if isinstance(stage, MNTP):
        return stage.chunk_tokens, stage.chunk_tokens
    limit = min(getattr(stage, "max_length", 512), encoder.max_seq_length or 512)
    weights = [1.0]
    if isinstance(stage, Contrastive):
        pairs = read_pairs(data, columns=stage.columns, negatives=stage.negatives, min_score=stage.min_score)
        sets: dict[Any, Dataset] = dict(pairs) if isinstance(pairs, DatasetDict) else {"": pairs}
        weights = [stage.weights.get(name, 1.0) * len(part) for name, part in sets.items()]
        columns = [_columns(part, stage.instruction_template) for part in sets.values()]
    else:
        # sets stand one after another
        sample = random.Random(0).sample(data, min(SAMPLE, len(data)))
        columns = [[sample] * (2 if isinstance(stage, SimCSE) else 1)]
    means = [[mean(_lengths(encoder, texts, limit)) for texts in part] for part in columns]
    tokens = sum(w * sum(m) for w, m in zip(weights, means, strict=True)) / sum(weights)
    return tokens, max(map(max, means))


def _columns(part: Dataset, template: str) -> list[list[str]]:
    """Some texts of every column, behind their instructions."""
    rows = random.Random(0).sample(range(len(part)), min(SAMPLE, len(part)))
    sample = part.select(rows)
    columns = []
    for name in text_columns(part):
        side = INSTRUCTION if name == "anchor" else DOCUMENT_INSTRUCTION
        told = sample[side] if side in part.column_names else [""] * len(sample)
        prompts = (template.replace("{instruction}", text) if text else "" for text in told)
        columns.append([prompt + text for prompt, text in zip(prompts, sample[name], strict=True)])
    return columns


def _lengths(encoder: Encoder, texts: list[str], limit: int) -> list[int]:
    ids = encoder.tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)
    return [len(one) for one in ids["input_ids"]]


def _random_vectors(encoder: Encoder, texts: list[str], folder: Path) -> Path:
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    width = encoder.get_embedding_dimension() or 1
    np.save(folder / "any.npy", np.random.default_rng(0).normal(size=(len(texts), width)).astype("float32"))
    return folder / "any.npy"


@contextmanager
def memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Yield a dict that holds afterwards, in `bytes`, how much memory the block added at its peak.

    On a GPU by torch's own count; elsewhere it is the growth of this process, looked at every 10 ms.
    """
    found = {"bytes": 0}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated(device) - start
        return
    process, stop = psutil.Process(), threading.Event()
    start, highest = process.memory_info().rss, [0]

    def watch() -> None:
        while not stop.wait(0.01):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
        found["bytes"] = max(highest[0] - start, 0)


def plan_table(plan: Mapping[str, Any]) -> str:
    """Lay a plan out for a terminal."""
    variant = f" ({plan['variant']})" if plan["variant"] else ""
    lines = [f"{plan['recipe']}{variant} on {plan['device']}", ""]
    lines += [f"{'stage':20}{'layers':>7}{'steps':>8}{'tokens':>14}{'tokens/s':>10}{'GiB':>7}{'hours':>8}"]
    for row in plan["stages"]:
        line = f"{row['kind']:20}{row['layers']:7}"
        if "steps" in row:
            line += f"{row['steps']:8}{row['tokens']:14,}{row['tokens_per_second']:10,.0f}"
            line += f"{row['memory_gib']:7.1f}{row['hours']:8.2f}"
        lines.append(line)
    hours = sum(row.get("hours", 0) for row in plan["stages"])
    return "\n".join(
        [
            *lines,
            "",
            f"{hours:.2f} hours in all at the measured rates, less reading, saving and teachers' vectors;",
            "less where a stage compiles layers, which were not for this",
        ]
    )
