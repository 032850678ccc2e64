"""The folder of a run: what resumes what, and what is never saved."""

import json
import math
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from tiny import FAST, TEXTS, Signal, load, losses
from transformers import TrainerCallback

from uncausal.encoder import adapters
from uncausal.encoder.training.checkpoints import describe, digest, weights_digest
from uncausal.encoder.training.losses import InfoNCELoss
from uncausal.encoder.training.progress import TrainingInterrupted
from uncausal.encoder.training.ranks import process_state
from uncausal.encoder.training.run import train
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.simcse import SimCSE


def test_train_refuses_a_folder_of_another_run(checkpoint, tmp_path):
    stage = SimCSE(max_steps=2, batch_size=8, **FAST)
    train(load(checkpoint), stage, TEXTS, tmp_path, progress=False)
    changed = SimCSE(max_steps=2, batch_size=8, **{**FAST, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"differs in learning_rate \(0\.005 there, 0\.001 here\)"):
        train(load(checkpoint), changed, TEXTS, tmp_path)
    with pytest.raises(ValueError, match="differs in data"):
        train(load(checkpoint), stage, TEXTS[1:], tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert "gradient_checkpointing" not in record  # but in an earlier version's
    for file in (tmp_path / "run.json", tmp_path / "adapter" / "training.json"):
        old = json.loads(file.read_text())
        old.get("run", old)["gradient_checkpointing"] = False
        file.write_text(json.dumps(old))
    kept = replace(stage, gradient_checkpointing=True)
    assert train(load(checkpoint), kept, TEXTS, tmp_path, progress=False).steps == 0
    assert train(load(checkpoint), changed, TEXTS, tmp_path, resume=False, progress=False).steps == 2


def test_checkpoints_hold_only_what_is_trained(checkpoint, tmp_path):
    stage = SimCSE(max_steps=6, batch_size=8, **{**FAST, "save_steps": 2})
    train(load(checkpoint), stage, TEXTS, tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter",
        "checkpoint-4",
        "checkpoint-6",
        "run.json",
    ]
    files = {p.name for p in (tmp_path / "checkpoint-6").iterdir()}
    assert adapters.ADAPTER_FILE in files and not files & {
        "model.safetensors",
        "training_args.bin",
        "README.md",
    }


@pytest.mark.parametrize("place", ["checkpoint", "adapter"])
def test_full_disk_leaves_the_last_whole_save(checkpoint, tmp_path, place):
    """A limit on file size stands in for a full disk: nothing half-written, and the run goes on later."""
    stage = SimCSE(max_steps=6, batch_size=8, **{**FAST, "save_steps": 2, "lora_dropout": 0.0})
    whole = train(load(checkpoint), stage, TEXTS, tmp_path / "whole", progress=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if place == "checkpoint" and state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))

        def on_train_end(self, args, state, control, **kwargs):
            if place == "adapter":
                resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))

    run = tmp_path / "full"
    try:
        with pytest.raises(OSError, match=r"could not write .*goes on\s+from the last"):
            train(load(checkpoint), stage, TEXTS, run, callbacks=[Fill()], progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = {"checkpoint": ["checkpoint-2"], "adapter": ["checkpoint-4", "checkpoint-6"]}[place]
    assert sorted(p.name for p in run.iterdir()) == [*kept, "run.json"]
    resumed = train(load(checkpoint), stage, TEXTS, run, progress=False)
    assert losses(resumed) == losses(whole)


def test_unwritable_folder(checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write in .*file/run: Not a directory"):
        train(load(checkpoint), SimCSE(max_steps=1), TEXTS, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


def test_loss_that_is_not_finite_stops_the_run(checkpoint, tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, features, labels):
            return torch.tensor(math.nan, requires_grad=True)

    with pytest.raises(FloatingPointError, match="the loss is nan at step 1: lower the learning rate"):
        train(
            load(checkpoint),
            SimCSE(max_steps=3, batch_size=8, **FAST),
            TEXTS,
            tmp_path,
            loss=lambda _: Broken(),
            progress=False,
        )


def test_training_record_is_readable(checkpoint, tmp_path):
    train(load(checkpoint), SimCSE(max_steps=2, batch_size=8, **FAST), TEXTS, tmp_path, progress=False)
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert record["steps"] == 2 and record["tokens"] > 0 and record["seconds"] > 0


class Poison(TrainerCallback):
    """Makes a trained weight infinite within a step."""

    def __init__(self, encoder, step: int):
        self.encoder, self.step = encoder, step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            next(p for p in self.encoder.parameters() if p.requires_grad).grad.fill_(math.nan)


def test_weights_that_are_not_finite_are_never_saved(checkpoint, tmp_path):
    """A save between two logs, where nobody looked at the loss, kept NaN, and a resume went on from it."""
    stage = SimCSE(max_steps=4, batch_size=8, **{**FAST, "logging_steps": 100, "save_steps": 1})
    encoder = load(checkpoint)
    whole = train(load(checkpoint), stage, TEXTS, tmp_path / "whole", progress=False)
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError, match="not finite at step 3, which is not saved"):
        train(encoder, stage, TEXTS, run, callbacks=[Poison(encoder, 3)], progress=False)
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(bool(p.isfinite().all()) for p in encoder.parameters())
    resumed = train(encoder, stage, TEXTS, run, progress=False)
    assert resumed.steps == 2
    final = [load_file(path / adapters.ADAPTER_FILE) for path in (whole.adapter, resumed.adapter)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_resume_skips_a_checkpoint_that_is_not_finite(checkpoint, tmp_path):
    """One that an earlier version, or a failing disk, left behind."""
    stage = SimCSE(max_steps=4, batch_size=8, **{**FAST, "save_steps": 1})
    with pytest.raises(TrainingInterrupted):
        train(load(checkpoint), stage, TEXTS, tmp_path, callbacks=[Signal(2)], progress=False)
    file = tmp_path / "checkpoint-2" / adapters.ADAPTER_FILE
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = math.nan
    save_file(tensors, file)
    assert train(load(checkpoint), stage, TEXTS, tmp_path, progress=False).steps == 3


def test_record_of_a_run_that_failed_at_its_start_is_replaced(checkpoint, tmp_path):
    """The folder held a record and nothing else, and refused the corrected run."""
    stage = {"max_steps": 2, "batch_size": 8, **FAST}
    with pytest.raises(ValueError, match="no linear layer"):
        train(load(checkpoint), SimCSE(lora_targets=["nothing"], **stage), TEXTS, tmp_path, progress=False)
    assert train(load(checkpoint), SimCSE(**stage), TEXTS, tmp_path, progress=False).steps == 2


def test_run_killed_while_it_removes_the_old_one_leaves_nothing_half(checkpoint, tmp_path, monkeypatch):
    """A checkpoint that had lost its adapter passed for one whose tensors are finite."""
    stage = SimCSE(max_steps=2, batch_size=8, **{**FAST, "save_steps": 1})
    whole = train(load(checkpoint), stage, TEXTS, tmp_path, progress=False)

    def killed(path, *args, **kwargs):
        (path / adapters.ADAPTER_FILE).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        (tmp_path / "adapter").rename(tmp_path / "aside")  # the first to go is a checkpoint
        patch.setattr(shutil, "rmtree", killed)
        train(load(checkpoint), stage, TEXTS, tmp_path, resume=False, progress=False)
    shutil.rmtree(tmp_path / "checkpoint-2")
    again = train(load(checkpoint), stage, TEXTS, tmp_path, progress=False)
    assert again.steps == 2 and losses(again) == losses(whole)
    assert not list(tmp_path.glob(".saving-*"))


def test_adapter_of_another_run_is_never_merged(checkpoint, tmp_path):
    """With its record gone, or another folder's adapter moved in, it was merged without a word."""
    stage = {"max_steps": 1, "batch_size": 8, **FAST}
    for seed in (1, 2):
        train(load(checkpoint), SimCSE(seed=seed, **stage), TEXTS, tmp_path / str(seed), progress=False)
    (tmp_path / "1" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"differs in seed \(1 there, 2 here\)"):
        train(load(checkpoint), SimCSE(seed=2, **stage), TEXTS, tmp_path / "1", progress=False)
    assert train(load(checkpoint), SimCSE(seed=1, **stage), TEXTS, tmp_path / "1", progress=False).steps == 0
    shutil.rmtree(tmp_path / "2" / "adapter")
    shutil.copytree(tmp_path / "1" / "adapter", tmp_path / "2" / "adapter")
    with pytest.raises(ValueError, match=r"differs in seed \(1 there, 2 here\)"):
        train(load(checkpoint), SimCSE(seed=2, **stage), TEXTS, tmp_path / "2", progress=False)
    shutil.rmtree(tmp_path / "2" / "checkpoint-1")
    (tmp_path / "2" / "adapter").rename(tmp_path / "2" / "checkpoint-1")
    (tmp_path / "2" / "run.json").unlink()
    with pytest.raises(ValueError, match="holds a run of unknown settings"):
        train(load(checkpoint), SimCSE(seed=2, **stage), TEXTS, tmp_path / "2", progress=False)


class Scaled(torch.nn.Module):
    """A loss that tells nothing of itself."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale


class TwiceInfoNCE(InfoNCELoss):
    """Another loss."""


def test_run_is_told_apart_by_all_that_shapes_it(checkpoint):
    """Pooling, attention, loss, templates, any weight and any row; the first 64 weights and two rows were."""
    data = DatasetDict(one=Dataset.from_dict({"anchor": ["a", "b", "c"], "positive": ["d", "e", "f"]}))
    stage = Contrastive()

    def told(encoder, dataset=data, loss=None):
        process_state(encoder.device)
        made = loss or stage.make_loss(encoder, None)
        return describe(encoder, stage, dataset, made, weights_digest(encoder))

    def changes(**other):
        encoder, after = load(checkpoint), told(**other)
        before = told(encoder)
        return {key for key in before if before[key] != after[key]}

    def changed(change, **options):
        encoder = load(checkpoint, **options)
        change(encoder)
        return changes(encoder=encoder)

    assert not changes(encoder=load(checkpoint))
    assert changed(lambda e: e.set_pooling("weighted_mean")) == {"modules"}
    assert changed(lambda e: None, attention="sdpa") == {"attention"}
    assert "attention" in changed(lambda e: None, bidirectional=False)
    assert changed(lambda e: e.prompts.update(query="q: ")) == {"encoder_prompts"}
    assert changed(lambda e: setattr(e.tokenizer, "chat_template", "{{ x }}")) == {"tokenizer"}
    assert changed(lambda e: setattr(e, "max_seq_length", 7)) == {"max_seq_length"}
    assert changed(lambda e: e.backbone.layers[1].mlp.down_proj.weight.data[-1, -1].add_(1)) == {"model"}
    encoder = load(checkpoint)
    assert changes(encoder=encoder, loss=TwiceInfoNCE(encoder)) == {"loss"}
    told_of = [
        told(encoder, loss=make(temperature))["loss"]
        for temperature in (0.05, 0.1)
        for make in (lambda t: Scaled(t), lambda t: MatryoshkaLoss(encoder, InfoNCELoss(encoder, t), [32, 8]))
    ]
    assert all(told_of.count(one) == 1 for one in told_of)  # an inner loss, and one's own, told its name only
    rows = {"anchor": ["a", "B", "c"], "positive": ["d", "e", "f"]}
    assert changes(encoder=encoder, dataset=DatasetDict(one=Dataset.from_dict(rows))) == {"data"}
    assert digest(data) != digest(DatasetDict(two=data["one"]))
    used = load(checkpoint)
    used.encode(TEXTS[:3])  # leaves the tokenizer's truncation and padding set
    assert not changes(encoder=used)
