"""Training stages on a tiny random model: what they learn, what they leave, how they stop and go on."""

import contextlib
import resource
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny import FAST, PAIRS, TEXTS, Signal, load, losses, save_checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, TrainerControl, TrainerState

from uncausal import Encoder
from uncausal.encoder import adapters
from uncausal.encoder.files import held
from uncausal.encoder.training import progress, trainer
from uncausal.encoder.training.lora import EXTRA_FILE
from uncausal.encoder.training.progress import StopOnSignal, TrainingInterrupted
from uncausal.encoder.training.run import train
from uncausal.encoder.training.stages import base
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.distill import Distill
from uncausal.encoder.training.stages.mntp import MNTP
from uncausal.encoder.training.stages.simcse import SimCSE
from uncausal.encoder.training.trainer import count_tokens


@pytest.mark.parametrize(
    ("stage", "data", "attention"),
    [
        (MNTP(max_steps=20, batch_size=16, chunk_tokens=16, **FAST), TEXTS, "uncausal"),
        (SimCSE(max_steps=20, batch_size=16, **FAST), TEXTS, "sdpa"),
        (Contrastive(max_steps=20, batch_size=16, temperature=0.05, **FAST), PAIRS, "uncausal"),
    ],
    ids=["mntp", "simcse", "contrastive"],
)
def test_train_learns(checkpoint, tmp_path, stage, data, attention):
    encoder = load(checkpoint, attention)
    embeddings = encoder.backbone.get_input_embeddings().weight.clone()
    result = train(encoder, stage, data, tmp_path / "run", progress=False)
    curve = losses(result)
    assert len(curve) == 20 and result.steps == 20
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    assert all(line["tokens_per_second"] > 0 for line in result.history if "loss" in line)
    assert not encoder.training and not any("lora" in name for name, _ in encoder.named_parameters())
    assert torch.equal(embeddings, encoder.backbone.get_input_embeddings().weight)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_train_counts_real_tokens(checkpoint, tmp_path):
    """Padding is not throughput: padded and packed runs over the same texts count the same tokens."""
    stage = SimCSE(max_steps=3, batch_size=8, **FAST)
    counts = {a: train(load(checkpoint, a), stage, TEXTS, tmp_path / a).tokens for a in ("sdpa", "uncausal")}
    assert counts["sdpa"] == counts["uncausal"] > 2 * 3 * 8 * 4
    ids, mask = torch.ones(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert count_tokens({"a_input_ids": ids, "a_attention_mask": mask, "b_input_ids": ids}) == 18


def test_adapter_hand_over_between_stages(checkpoint, tmp_path):
    """Stage two starts from what stage one learned; both adapters on the original give the same encoder."""
    encoder = load(checkpoint)
    before = encoder.encode(TEXTS[:5])
    stages = [
        MNTP(max_steps=5, batch_size=8, chunk_tokens=16, **FAST),
        SimCSE(max_steps=5, batch_size=8, **FAST),
    ]
    after, folders = [], []
    for stage in stages:
        folders.append(train(encoder, stage, TEXTS, tmp_path / stage.name, progress=False).adapter)
        after.append(encoder.encode(TEXTS[:5]))
    assert abs(before - after[0]).max() > 1e-3 < abs(after[0] - after[1]).max()
    fresh = load(checkpoint)
    for folder, expected in zip(folders, after, strict=True):
        adapters.load_adapter(fresh.backbone, folder)
        torch.testing.assert_close(torch.tensor(fresh.encode(TEXTS[:5])), torch.tensor(expected))
    encoder.save_pretrained(str(tmp_path / "encoder"))
    plain = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    torch.testing.assert_close(
        torch.tensor(plain.encode(TEXTS[:5])), torch.tensor(after[1]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("stage", "data", "attention"),
    [
        (MNTP(max_steps=5, batch_size=4, chunk_tokens=16, **FAST), TEXTS[:60], "uncausal"),
        (SimCSE(max_steps=5, batch_size=8, **FAST), TEXTS[:16], "uncausal"),
        (Contrastive(max_steps=5, batch_size=8, group_by_length=True, **FAST), PAIRS[:16], "sdpa"),
        (
            Contrastive(max_steps=5, batch_size=8, weights={"b": 2}, **FAST),
            {"a": PAIRS[:16], "b": PAIRS[16:24]},
            "uncausal",
        ),
        (
            Contrastive(max_steps=5, batch_size=8, blend=True, weights={"b": 2}, **FAST),
            {"a": PAIRS[:6], "b": PAIRS[16:20]},
            "uncausal",
        ),
    ],
    ids=["mntp", "simcse", "by_length", "weighted", "blended"],
)
def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    checkpoint, tmp_path, capsys, stage, data, attention
):
    """Same losses as an uninterrupted run with the same seed, over an epoch's end, with every dropout on."""
    whole = train(load(checkpoint, attention), stage, data, tmp_path / "whole", progress=False)
    encoder = load(checkpoint, attention)
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="stopped at step 3 of 5: the same call or command resumes"):
        train(encoder, stage, data, tmp_path / "cut", callbacks=[Signal(3)], progress=False)
    assert "stopped at step 3" not in capsys.readouterr().err  # the exception says it, once
    assert signal.getsignal(signal.SIGINT) is handler
    assert encoder.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    adapters.load_adapter(load(checkpoint).backbone, tmp_path / "cut" / "checkpoint-3")

    resumed = train(encoder, stage, data, tmp_path / "cut", progress=False)
    assert resumed.steps == 2
    assert losses(resumed) == losses(whole)
    final = [load_file(tmp_path / run / "adapter" / adapters.ADAPTER_FILE) for run in ("whole", "cut")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])

    merged = load(checkpoint, attention)
    found = train(merged, stage, data, tmp_path / "cut", progress=False)
    assert found.steps == 0 and losses(found) == losses(whole)
    torch.testing.assert_close(merged.encode(TEXTS[:3]), encoder.encode(TEXTS[:3]), rtol=0, atol=0)


def test_a_signal_while_processes_agree_is_not_lost(monkeypatch):
    """Regression: their answer, no, took the place of what had come in the meantime."""
    stop = StopOnSignal()

    def exchange(flag):
        stop.stopped = True  # by the handler
        return flag

    monkeypatch.setattr(progress, "anywhere", exchange)
    state, control = TrainerState(global_step=1, max_steps=9), TrainerControl()
    stop.on_step_end(None, state, control)
    assert not control.should_training_stop and stop.stopped  # others know nothing of it yet
    stop.on_step_end(None, state, control)
    assert control.should_training_stop and control.should_save


def test_a_signal_in_the_last_step_stops_what_follows(checkpoint, tmp_path):
    """Regression: the stage ended as if nothing had come, and a recipe went on with the next one."""
    stage = SimCSE(max_steps=2, batch_size=4, lora_r=2, bf16=False)
    encoder = load(checkpoint)
    with pytest.raises(TrainingInterrupted, match="simcse ended: the same call or command goes on behind it"):
        train(encoder, stage, TEXTS, tmp_path, callbacks=[Signal(2)], progress=False)
    assert train(encoder, stage, TEXTS, tmp_path, progress=False).steps == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_train_without_autocast(checkpoint, tmp_path, dtype):
    """Regression: the adapter is float32, and got what the layer computes in."""
    encoder = Encoder.from_pretrained(checkpoint, device="cpu", dtype=dtype)
    stage = SimCSE(max_steps=2, batch_size=4, lora_r=2, bf16=False)
    assert train(encoder, stage, TEXTS, tmp_path, progress=False).steps == 2


def test_an_evaluation_that_fails_leaves_the_encoder_trained(checkpoint, tmp_path):
    """Regression: the weights were merged, and the modules taken back."""
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(len(TEXTS), 8)))
    stage = Distill(vectors=str(tmp_path / "vectors.npy"), max_steps=1, batch_size=4, lora_r=2, bf16=False)
    encoder, whole = load(checkpoint), load(checkpoint)
    with pytest.raises(ZeroDivisionError):
        train(encoder, stage, TEXTS, tmp_path / "run", eval=lambda encoder: {"x": 1 / 0}, progress=False)
    train(whole, stage, TEXTS, tmp_path / "run", progress=False)
    np.testing.assert_array_equal(encoder.encode(TEXTS[:3]), whole.encode(TEXTS[:3]))


def test_an_unreadable_checkpoint_is_passed_over(checkpoint, tmp_path):
    stage = SimCSE(max_steps=6, batch_size=4, lora_r=2, bf16=False, save_steps=1)
    with pytest.raises(TrainingInterrupted):
        train(load(checkpoint), stage, TEXTS, tmp_path, callbacks=[Signal(4)], progress=False)
    (tmp_path / "checkpoint-4" / adapters.ADAPTER_FILE).write_bytes(b"")
    assert train(load(checkpoint), stage, TEXTS, tmp_path, progress=False).steps == 3


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_training_gives_memory_back_at_every_log(checkpoint, tmp_path):
    """Regression: glibc kept the holes between what lives, and a long run on a CPU grew to twice its size."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    pieces = [torch.zeros(4096) for _ in range(20_000)]  # 320 MB
    kept = pieces[::100]  # holes all over
    del pieces
    before = resident()
    stage = SimCSE(max_steps=1, batch_size=8, **FAST)
    train(load(checkpoint), stage, TEXTS, tmp_path, progress=False)
    assert len(kept) == 200 and resident() < before - (200 << 20)


def test_two_runs_do_not_share_a_folder(checkpoint, tmp_path):
    """Regression: both wrote their checkpoints there, and each went on from the other's."""
    encoder, stage = load(checkpoint), SimCSE(**FAST)
    with held(tmp_path), pytest.raises(ValueError, match="another process is at work in"):
        train(encoder, stage, TEXTS, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert train(encoder, stage, TEXTS, tmp_path).steps == stage.max_steps


def test_train_seed_matters(checkpoint, tmp_path):
    stage = {"max_steps": 2, "batch_size": 8, **FAST}
    curves = [
        losses(train(load(checkpoint), SimCSE(seed=s, **stage), TEXTS, tmp_path / str(s))) for s in (1, 2)
    ]
    assert curves[0] != curves[1]


def test_failed_run_leaves_the_encoder_as_it_was(checkpoint, tmp_path):
    """Also without adapters, where training changes the weights themselves."""
    encoder = load(checkpoint)
    before = encoder.encode(TEXTS[:3])
    limit = encoder.max_seq_length
    stage = SimCSE(max_steps=5, batch_size=8, max_length=9, **{**FAST, "lora_r": 0})
    with pytest.raises(TrainingInterrupted):
        train(encoder, stage, TEXTS, tmp_path, callbacks=[Signal(2)], progress=False)
    assert (encoder.encode(TEXTS[:3]) == before).all() and encoder.max_seq_length == limit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_targets": ["nothing"]}, "has no linear layer"),
        (
            {"lora_r": 0, "trainable_layers": [2]},
            r"layers \[2\] do not exist: the model has the layers 0 to 1",
        ),
        ({"lora_r": 0, "trainable_layers": [-1]}, r"layers \[-1\] do not exist"),
    ],
)
def test_refused_settings_leave_what_was_trainable(checkpoint, tmp_path, changes, message):
    """All stayed frozen, and the corrected call left the pooling layer untrained without a word."""
    encoder = load(checkpoint)
    with pytest.raises(ValueError, match=message):
        train(encoder, SimCSE(batch_size=8, **{**FAST, **changes}), TEXTS, tmp_path, progress=False)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_train_whole_layers_without_lora(checkpoint, tmp_path):
    encoder = load(checkpoint)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    stage = SimCSE(max_steps=3, batch_size=8, trainable_layers=[1], **{**FAST, "lora_r": 0})
    result = train(encoder, stage, TEXTS, tmp_path, progress=False)
    changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".layers.1." in name for name in changed)
    again = load(checkpoint)
    train(again, stage, TEXTS, tmp_path, progress=False)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in again.state_dict().items())
    assert result.lost_in_merge == 0.0


def test_train_the_token_embeddings(checkpoint, tmp_path):
    encoder = load(checkpoint)
    table = encoder.backbone.get_input_embeddings().weight
    before = table.detach().clone()
    settings = {**FAST, "lora_r": 0, "train_embeddings": True}
    train(encoder, SimCSE(max_steps=3, batch_size=8, **settings), TEXTS, tmp_path, progress=False)
    after = table.detach().clone()
    assert not torch.equal(after, before)
    again = load(checkpoint)  # the finished run's weights hold the table
    train(again, SimCSE(max_steps=3, batch_size=8, **settings), TEXTS, tmp_path, progress=False)
    assert torch.equal(again.backbone.get_input_embeddings().weight, after)
    with pytest.raises(ValueError, match="train_embeddings is True; it must be False with an adapter"):
        SimCSE(lora_r=4, train_embeddings=True)


@pytest.mark.parametrize("kind", ["mntp", "simcse"])
def test_gradient_checkpointing_and_mini_batches_change_no_loss(checkpoint, tmp_path, kind):
    """GradCache and checkpointing repeat the forward pass under the same dropout; accumulation needs none."""
    common = {"max_steps": 3, "batch_size": 8, **FAST, "lora_dropout": 0.0}
    mask = {"mask_probability": 1.0, "mask_share": 1.0, "random_share": 0.0}  # nothing left to chance

    def curve(name: str, **changes) -> list[float]:
        if kind == "mntp":
            stage = MNTP(chunk_tokens=8, **{"gradient_checkpointing": False, **common, **mask, **changes})
        else:
            stage = SimCSE(
                **{**common, **changes, "attention_dropout": changes.get("attention_dropout", 0.3)}
            )
        return losses(train(load(checkpoint), stage, TEXTS, tmp_path / name, progress=False))

    assert curve("plain") == pytest.approx(curve("checkpointed", gradient_checkpointing=True), abs=1e-4)
    still = {} if kind == "mntp" else {"attention_dropout": 0.0}
    assert curve("still", **still) == pytest.approx(curve("micro", mini_batch_size=2, **still), abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable_layers": [2, 3]},
        {"bf16": True},
        {"lora_dropout": 0.2, "attention_dropout": 0.3, "mini_batch_size": 4},
    ],
    ids=["fp32", "bf16", "gradcache"],
)
def test_compiled_layers_train_alike(tmp_path, changes):
    """Few programs serve all layers and batches, draw the same dropout, and are gone when the stage ends."""
    model = save_checkpoint(tmp_path / "model", num_hidden_layers=6)
    settings = {**FAST, "lora_dropout": 0.0, "attention_dropout": 0.0, **changes}
    stage, texts = SimCSE(max_steps=4, batch_size=8, **settings), [t + " so" * (len(t) % 5) for t in TEXTS]
    plain = losses(train(load(model), stage, texts, tmp_path / "plain", progress=False))
    torch._dynamo.reset()
    encoder, counted = load(model), torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    fused = train(encoder, replace(stage, compile_layers=True), texts, tmp_path / "fused", progress=False)
    assert 1 <= counted["unique_graphs"] - before < 6
    assert losses(fused) == pytest.approx(plain, abs=0.05 if stage.bf16 else 1e-4)
    assert not any(layer._compiled_call_impl for layer in encoder.backbone.layers)


def test_layers_of_another_linear_kind_compile(tmp_path):
    """Regression: the product of GPT-2's layers, without gradients in fp32, is one the compiler refuses."""
    model = save_checkpoint(tmp_path / "model")
    size = len(load(model).tokenizer)
    gpt2 = GPT2Config(vocab_size=size, n_embd=32, n_head=4, n_layer=2, n_positions=64, pad_token_id=1)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(model)
    stage = SimCSE(max_steps=2, batch_size=8, mini_batch_size=4, compile_layers=True, **FAST)
    curve = losses(train(load(model), stage, TEXTS, tmp_path / "run", progress=False))
    stage = replace(stage, compile_layers=False)
    assert curve == pytest.approx(losses(train(load(model), stage, TEXTS, tmp_path / "plain")), abs=1e-4)


def test_layers_are_not_compiled_without_a_compiler(checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trainer, "can_compile", lambda: False)
    stage = SimCSE(max_steps=1, batch_size=8, compile_layers=True, **FAST)
    assert train(load(checkpoint), stage, TEXTS, tmp_path, progress=False).steps == 1
    assert "no C++ compiler" in caplog.text


def test_a_stage_leaves_no_model_card_of_what_was_before(checkpoint, tmp_path):
    """Regression: MNTP, which has no trainer of the library's, kept the old encoder's card."""
    encoder = load(checkpoint)
    encoder._model_card_text = "what it was"
    train(encoder, MNTP(max_steps=1, batch_size=4, chunk_tokens=8, **FAST), TEXTS, tmp_path, progress=False)
    assert encoder._model_card_text is None


def test_a_missing_compiler_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        assert not trainer.can_compile.__wrapped__()
    torch._dynamo.reset()
    assert trainer.can_compile.__wrapped__()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "uncausal"])
def test_bf16_products_keep_weights_and_pooling_in_float32(checkpoint, tmp_path, attention):
    """Under autocast queries are float32, after rotary, and values bfloat16: the packed path failed."""
    encoder = load(checkpoint, attention)
    before = encoder.encode(TEXTS[:3])
    seen = set()
    encoder[1].register_forward_hook(lambda m, a, out: seen.add(out["sentence_embedding"].dtype))
    options = {"max_steps": 3, "batch_size": 8, **FAST, "learning_rate": 1e-9}
    exact = losses(train(load(checkpoint, attention), SimCSE(**options), TEXTS, tmp_path / "32"))
    rounded = losses(
        train(encoder, SimCSE(**{**options, "bf16": True}), TEXTS, tmp_path / "16", progress=False)
    )
    assert exact != rounded and exact == pytest.approx(rounded, abs=0.1)
    assert seen == {torch.float32} == {p.dtype for p in encoder.parameters()}
    torch.testing.assert_close(
        encoder.encode(TEXTS[:3]), before, rtol=1e-5, atol=1e-5
    )  # no trace of bf16 stays


def test_a_run_started_anew_says_how_to_go_on(checkpoint, tmp_path):
    """Regression: the same call, which it named, would have started anew once more."""
    stage = SimCSE(max_steps=5, batch_size=8, **FAST)
    with pytest.raises(TrainingInterrupted, match="stopped at step 2 of 5: .* without --no-resume"):
        train(load(checkpoint), stage, TEXTS, tmp_path, resume=False, callbacks=[Signal(2)], progress=False)
    assert train(load(checkpoint), stage, TEXTS, tmp_path, progress=False).steps == 3


def test_latent_pooling_in_bf16_gives_float32(checkpoint):
    """As stages train it on a GPU, where in float32 its kernels would not run."""
    encoder = Encoder.from_pretrained(checkpoint, pooling="latent", dtype="float32", device="cpu")
    features = encoder[0](encoder.preprocess(TEXTS[:3]))
    exact = encoder[1](dict(features))["sentence_embedding"]
    with trainer.autocast_latents(encoder[1], True):
        rounded = encoder[1](dict(features))["sentence_embedding"]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)
    rounded.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder[1].parameters())
    asked = []

    @contextlib.contextmanager
    def noted(pooling, enabled):
        asked.append((pooling, enabled))
        yield

    stage = SimCSE(**{**FAST, "bf16": True})
    for device in ("cpu", "cuda"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "autocast_latents", noted)
            patch.setattr(type(encoder.backbone), "device", torch.device(device))
            with stage.conditions(encoder):
                pass
    assert asked == [(encoder[1], False), (encoder[1], True)]
    for pooling, enabled in ((encoder[1], False), (load(checkpoint)[1], True)):  # off, and no such layer
        with trainer.autocast_latents(pooling, enabled):
            assert torch.equal(encoder[1](dict(features))["sentence_embedding"], exact)


def test_evaluation_during_and_after(checkpoint, tmp_path, capsys):
    calls = []

    def evaluate(encoder):
        calls.append(encoder.training)
        torch.rand(10)  # must not disturb the run
        return {"score": len(calls)}

    options = {"max_steps": 4, "batch_size": 8, **FAST}
    plain = train(load(checkpoint), SimCSE(**options), TEXTS, tmp_path / "a", progress=False)
    seen = train(load(checkpoint), SimCSE(eval_steps=2, **options), TEXTS, tmp_path / "b", eval=evaluate)
    assert calls == [False, False] and seen.metrics == {"score": 2.0}
    assert [line["eval_score"] for line in seen.history if "eval_score" in line] == [1.0]
    assert losses(seen) == losses(plain)
    shown = capsys.readouterr().err
    assert "simcse: step 4/4, loss" in shown and "tokens/s" in shown and "0:00 left" in shown


def test_full_fine_tuning_keeps_float32_masters_of_bfloat16_weights(checkpoint, tmp_path):
    """Steps smaller than the last place of a bfloat16 weight were rounded away: 3 % of the weights moved."""
    stage = SimCSE(max_steps=3, batch_size=8, **{**FAST, "lora_r": 0, "learning_rate": 2e-5})
    half = load(checkpoint, "sdpa", dtype="bfloat16")
    exact = load(checkpoint, "sdpa", dtype="bfloat16").float()
    for encoder, name in ((half, "half"), (exact, "exact")):
        train(encoder, stage, TEXTS, tmp_path / name, progress=False)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for mine, wanted in zip(half.parameters(), exact.parameters(), strict=True):
        assert torch.equal(mine, wanted.bfloat16())
    again = load(checkpoint, "sdpa", dtype="bfloat16")
    assert train(again, stage, TEXTS, tmp_path / "half", progress=False).steps == 0
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), half.parameters(), strict=True))


def test_a_loss_with_weights_of_its_own_goes_on_with_them(checkpoint, tmp_path):
    """Regression: a resumed run began with a new classifier, and the old one's optimiser state."""

    class Classified(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.head = encoder, torch.nn.Linear(2 * 32, 1)
            made.append(self.head)

        def forward(self, features, labels):
            sides = [self.encoder(dict(side))["sentence_embedding"] for side in features]
            return self.head(torch.cat(sides, dim=1)).square().mean()

    made, found = [], []
    stage = Contrastive(max_steps=4, batch_size=8, **FAST)
    for name, callbacks in (("whole", []), ("cut", [Signal(2)])):
        encoder, options = load(checkpoint), {"loss": Classified, "progress": False}
        if callbacks:
            with pytest.raises(TrainingInterrupted):
                train(encoder, stage, PAIRS[:16], tmp_path / name, callbacks=callbacks, **options)
        found.append(train(encoder, stage, PAIRS[:16], tmp_path / name, **options))
    assert losses(found[0]) == losses(found[1])
    whole, before, resumed = made
    assert torch.equal(whole.weight, resumed.weight) and not torch.equal(before.weight, resumed.weight)


def test_a_model_that_guides_a_loss_is_not_saved(checkpoint, tmp_path):
    class Guided(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.guide, self.scale = encoder, guide, torch.nn.Parameter(torch.ones(()))

        def forward(self, features, labels):
            return self.scale * self.encoder(dict(features[0]))["sentence_embedding"].square().mean()

    guide = load(checkpoint)
    stage = Contrastive(max_steps=2, batch_size=8, **{**FAST, "save_steps": 1})
    train(load(checkpoint), stage, PAIRS[:16], tmp_path, loss=Guided, progress=False)
    assert list(load_file(tmp_path / "checkpoint-2" / EXTRA_FILE)) == ["loss.scale"]


def test_what_half_precision_rounds_away_of_whole_weights_is_told(checkpoint, tmp_path, caplog):
    stage = SimCSE(max_steps=2, batch_size=8, **{**FAST, "lora_r": 0, "learning_rate": 1e-5})
    half = train(load(checkpoint, "sdpa", dtype="bfloat16"), stage, TEXTS, tmp_path / "half", progress=False)
    assert 0.5 < half.lost_in_merge <= 1.0 and "bfloat16 weights rounded away" in caplog.text
