"""Training stages on tiny random models: what they learn, what they leave behind, how they stop and go on."""

import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from uncausal.encoder import adapters
from uncausal.encoder.data.texts import chunk_texts
from uncausal.encoder.model import Encoder
from uncausal.encoder.training.lora import attach_lora
from uncausal.encoder.training.masking import mask_tokens
from uncausal.encoder.training.progress import TrainingInterrupted
from uncausal.encoder.training.run import train
from uncausal.encoder.training.samplers import LengthGrouped
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.mntp import MNTP, MaskedNextToken
from uncausal.encoder.training.stages.simcse import SimCSE, attention_dropout
from uncausal.encoder.training.trainer import count_tokens

SUBJECTS = ("the cat", "a dog", "my friend", "the old man", "one bird", "his sister", "the king", "a child")
VERBS = ("sees", "likes", "follows", "paints", "forgets", "remembers")
OBJECTS = ("the river", "a red house", "the moon", "two apples", "music", "the long road home", "an idea")
TEXTS = [f"{s} {v} {o}" for s in SUBJECTS for v in VERBS for o in OBJECTS]
PAIRS = [(f"{s} {v} {o}", f"{o} {v} {s}") for s in SUBJECTS for v in VERBS for o in OBJECTS]
FAST = {
    "lora_r": 4,
    "bf16": False,
    "logging_steps": 1,
    "learning_rate": 5e-3,
    "warmup_steps": 0,
    "save_steps": 1000,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A causal Llama of four layers with an untied head, and a word-level tokenizer."""
    return save_checkpoint(tmp_path_factory.mktemp("causal"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied_checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def save_checkpoint(path: Path, **changes) -> Path:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [*TEXTS, "_"], trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "</s>"])
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=64,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
        **changes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def load(path: Path, attention: str = "sdpa", **options) -> Encoder:
    return Encoder.from_pretrained(path, attention=attention, dtype="float32", device="cpu", **options)


def losses(result) -> list[float]:
    return [line["loss"] for line in result.history if "loss" in line]


class Signal(TrainerCallback):
    """Sends Ctrl-C to this process within a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


# ---- what the stages compute


def test_mask_tokens_shares_and_never_the_first():
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (64, 256))
    ids[:, 10] = 2
    masked, labels = mask_tokens(
        ids,
        probability=0.2,
        mask_share=0.8,
        random_share=0.1,
        mask_id=0,
        vocab_size=1000,
        special_ids=torch.tensor([1, 2]),
    )
    chosen = labels != -100
    assert not chosen[:, 0].any() and not chosen[:, 10].any()
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    share = chosen.float().sum() / (64 * 254)
    assert abs(share - 0.2) < 0.02
    assert abs((masked == 0)[chosen].float().mean() - 0.8) < 0.03
    assert abs((masked == ids)[chosen].float().mean() - 0.1) < 0.03


def test_mask_tokens_mistral_masks_all_it_chooses():
    ids = torch.randint(3, 1000, (8, 64))
    settings = {k: getattr(MNTP.mistral(), k) for k in ("mask_share", "random_share")}
    masked, labels = mask_tokens(
        ids, probability=0.8, **settings, mask_id=0, vocab_size=1000, special_ids=torch.tensor([])
    )
    assert torch.equal(masked == 0, labels != -100)


def test_mask_tokens_always_leaves_something_to_predict():
    ids = torch.arange(3, 7)[None]
    for seed in range(20):
        torch.manual_seed(seed)
        _, labels = mask_tokens(
            ids,
            probability=1e-6,
            mask_share=1,
            random_share=0,
            mask_id=0,
            vocab_size=9,
            special_ids=torch.tensor([]),
        )
        assert (labels != -100).sum() == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager", "uncausal"])
def test_masked_next_token_shift_and_isolation(checkpoint, attention):
    """The loss is that of position i-1 under the frozen head; chunks of a batch do not mix."""
    encoder = load(checkpoint, attention)
    head = torch.randn(len(encoder.tokenizer), 32)
    model = MaskedNextToken(encoder.backbone, head)
    ids = torch.randint(3, len(encoder.tokenizer), (3, 11))
    labels = torch.full_like(ids, -100)
    labels[0, 4], labels[2, 1], labels[2, 10] = 7, 8, 9
    with torch.no_grad():
        hidden = torch.cat([encoder.backbone(input_ids=row[None]).last_hidden_state for row in ids])
        logits = torch.stack([hidden[0, 3], hidden[2, 0], hidden[2, 9]]) @ head.T
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8, 9]))
        torch.testing.assert_close(model(ids, labels)["loss"], expected, rtol=1e-4, atol=1e-5)


def test_chunk_texts_loses_no_token_and_pads_none(checkpoint):
    tokenizer = load(checkpoint).tokenizer
    chunks = chunk_texts(iter(TEXTS[:40]), tokenizer, 7)
    flat = [i for ids in tokenizer(TEXTS[:40])["input_ids"] for i in ids]
    assert chunks.flatten().tolist() == flat[: len(flat) // 7 * 7]
    assert len(chunk_texts(TEXTS, tokenizer, 7, limit=3)) == 3
    assert not torch.equal(chunk_texts(TEXTS, tokenizer, 7, seed=1), chunk_texts(TEXTS, tokenizer, 7, seed=2))
    with pytest.raises(ValueError, match=r"holds \d+ tokens, less than one chunk of 512"):
        chunk_texts(TEXTS[:3], tokenizer, 512)


@pytest.mark.parametrize("attention", ["sdpa", "uncausal"])
@pytest.mark.parametrize(
    ("stage", "data"),
    [
        (MNTP(max_steps=40, batch_size=16, chunk_tokens=16, **FAST), TEXTS),
        (SimCSE(max_steps=40, batch_size=16, **FAST), TEXTS),
        (Contrastive(max_steps=40, batch_size=16, temperature=0.05, **FAST), PAIRS),
    ],
    ids=["mntp", "simcse", "contrastive"],
)
def test_train_learns(checkpoint, tmp_path, stage, data, attention):
    encoder = load(checkpoint, attention)
    embeddings = encoder.backbone.get_input_embeddings().weight.clone()
    result = train(encoder, stage, data, tmp_path / "run", progress=False)
    curve = losses(result)
    assert len(curve) == 40 and result.steps == 40
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
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


@pytest.mark.parametrize("attention", ["sdpa", "eager", "uncausal"])
def test_attention_dropout_acts_and_is_restored(checkpoint, attention):
    encoder = load(checkpoint, attention)
    encoder.train()
    features = encoder.preprocess(TEXTS[:3])

    def passes():
        return [encoder(dict(features))["sentence_embedding"].detach() for _ in range(2)]

    assert torch.equal(*passes())
    with attention_dropout(encoder.backbone, 0.3):
        first, second = passes()
        assert all((a != b).any() for a, b in zip(first, second, strict=True))  # in every text of the batch
        encoder.eval()
        assert torch.equal(*passes())
        encoder.train()
    assert torch.equal(*passes()) and encoder.backbone.config.attention_dropout == 0.0


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_attention_dropout_other_families(family):
    """OPT calls it `dropout`, GPT-2 keeps an nn.Dropout."""
    from transformers import AutoConfig, AutoModel

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = AutoConfig.for_model(family, **sizes, **({"word_embed_proj_dim": 32} if family == "opt" else {}))
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModel.from_config(config).train()
    ids = torch.arange(20)[None]
    with attention_dropout(model, 0.3):
        first, second = (model(ids).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(model(ids).last_hidden_state for _ in range(2)))


def test_attention_dropout_without_effect_is_refused():
    """The library's Falcon has the setting and ignores it; its hidden dropout must not pass for it."""
    from transformers import FalconConfig, FalconModel

    model = FalconModel(
        FalconConfig(
            vocab_size=50, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, hidden_dropout=0.1
        )
    )
    with pytest.raises(ValueError, match=r"attention dropout 0\.3 has no effect on FalconModel with 'sdpa'"):
        with attention_dropout(model, 0.3):
            pass


# ---- adapters


def test_lora_only_upper_layers_stops_the_backward_pass(checkpoint):
    encoder = load(checkpoint)
    view = attach_lora(encoder.backbone, r=4, alpha=8, dropout=0.0, trainable_layers=[2, 3])
    trained = {name.split(".layers.")[1][0] for name, p in view.named_parameters() if p.requires_grad}
    assert trained == {"2", "3"}
    seen = {}
    for index, layer in enumerate(encoder.backbone.layers):
        layer.register_forward_hook(lambda m, a, out, i=index: seen.update({i: out.requires_grad}))
    encoder.backbone(torch.arange(3, 9)[None]).last_hidden_state.sum().backward()
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert not encoder.backbone.get_input_embeddings().weight.requires_grad


def test_attach_lora_refuses_what_the_model_does_not_have(checkpoint):
    backbone = load(checkpoint).backbone
    with pytest.raises(ValueError, match=r"no linear layer \['qkv'\]"):
        attach_lora(backbone, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "qkv"])
    with pytest.raises(ValueError, match=r"layers \[4\] do not exist: the model has the layers 0 to 3"):
        attach_lora(backbone, r=4, alpha=8, dropout=0.0, trainable_layers=[1, 4])


def test_attach_lora_finds_the_linear_layers_of_another_family():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50))
    view = attach_lora(model, r=2, alpha=4, dropout=0.0, trainable_layers=[1])
    trained = {
        name.split("h.1.")[1].split(".lora")[0] for name, p in view.named_parameters() if p.requires_grad
    }
    assert trained == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


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


def test_adapter_of_a_model_with_a_head_is_refused(checkpoint, tmp_path):
    """Such an adapter has another prefix; peft would load none of it and only warn."""
    causal = AutoModelForCausalLM.from_pretrained(checkpoint)
    get_peft_model(causal, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    encoder = load(checkpoint)
    with pytest.raises(
        ValueError, match=r"start with 'base_model\.model\.model\.', those of a headless LlamaModel"
    ):
        adapters.load_adapter(encoder.backbone, tmp_path)
    assert not any("lora" in name for name, _ in encoder.named_parameters())


def test_adapter_damaged_missing_or_of_another_model(checkpoint, tmp_path):
    backbone = load(checkpoint).backbone
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        adapters.load_adapter(backbone, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="not readable as safetensors"):
        adapters.load_adapter(backbone, tmp_path)
    from transformers import GPT2Config, GPT2Model

    other = GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50))
    get_peft_model(other, LoraConfig(r=2, target_modules=["c_attn"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fits no module of LlamaModel"):
        adapters.load_adapter(backbone, tmp_path)


def test_merge_reports_what_bfloat16_rounds_away(checkpoint, caplog):
    """An update below half a unit in the last place of a bfloat16 weight vanishes in the merge."""
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        backbone = load(checkpoint).backbone.to(dtype)
        view = attach_lora(backbone, r=4, alpha=8, dropout=0.0)
        torch.manual_seed(0)
        for name, parameter in view.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-4)
        shares[dtype] = adapters.merge_lora(view)
    assert shares[torch.float32] < 1e-3 and shares[torch.bfloat16] > 0.5
    assert "bfloat16 weights rounded away" in caplog.text


# ---- the head of MNTP


def test_mntp_head_tied_and_untied(checkpoint, tied_checkpoint, tmp_path):
    from uncausal.encoder.training.lm_head import find_head

    tied = load(tied_checkpoint).backbone
    assert find_head(tied)[0] is tied.get_input_embeddings().weight
    untied = load(checkpoint)
    weight = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    assert torch.equal(find_head(untied.backbone)[0], weight)
    untied.save_pretrained(str(tmp_path / "encoder"))
    headless = load(tmp_path / "encoder").backbone
    with pytest.raises(ValueError, match=r"no language-model head for MNTP in .*MNTP\(head="):
        find_head(headless)
    assert torch.equal(find_head(headless, str(checkpoint))[0], weight)


# ---- reproducing, stopping, resuming


@pytest.mark.parametrize("attention", ["sdpa", "uncausal"])
@pytest.mark.parametrize(
    ("stage", "data"),
    [
        (MNTP(max_steps=9, batch_size=4, chunk_tokens=16, **FAST), TEXTS[:60]),
        (SimCSE(max_steps=9, batch_size=16, **FAST), TEXTS[:60]),
        (Contrastive(max_steps=9, batch_size=16, group_by_length=True, **FAST), PAIRS[:60]),
    ],
    ids=["mntp", "simcse", "contrastive"],
)
def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    checkpoint, tmp_path, capsys, stage, data, attention
):
    """Same losses as an uninterrupted run with the same seed, over an epoch's end, with every dropout on."""
    whole = train(load(checkpoint, attention), stage, data, tmp_path / "whole", progress=False)
    again = train(load(checkpoint, attention), stage, data, tmp_path / "again", progress=False)
    assert losses(again) == losses(whole)

    encoder = load(checkpoint, attention)
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="stopped at step 5 of 9: the same call or command resumes"):
        train(encoder, stage, data, tmp_path / "cut", callbacks=[Signal(5)], progress=False)
    assert "stopped at step 5 of 9" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert encoder.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    adapters.load_adapter(load(checkpoint).backbone, tmp_path / "cut" / "checkpoint-5")

    resumed = train(encoder, stage, data, tmp_path / "cut", progress=False)
    assert resumed.steps == 4
    assert losses(resumed) == losses(whole)
    final = [load_file(tmp_path / run / "adapter" / adapters.ADAPTER_FILE) for run in ("whole", "cut")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])

    merged = load(checkpoint, attention)
    found = train(merged, stage, data, tmp_path / "cut", progress=False)
    assert found.steps == 0 and losses(found) == losses(whole)
    torch.testing.assert_close(merged.encode(TEXTS[:3]), encoder.encode(TEXTS[:3]), rtol=0, atol=0)


def test_train_seed_matters(checkpoint, tmp_path):
    stage = {"max_steps": 2, "batch_size": 8, **FAST}
    curves = [
        losses(train(load(checkpoint), SimCSE(seed=s, **stage), TEXTS, tmp_path / str(s))) for s in (1, 2)
    ]
    assert curves[0] != curves[1]


def test_train_refuses_a_folder_of_another_run(checkpoint, tmp_path):
    stage = SimCSE(max_steps=2, batch_size=8, **FAST)
    train(load(checkpoint), stage, TEXTS, tmp_path, progress=False)
    changed = SimCSE(max_steps=2, batch_size=8, **{**FAST, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"differs in learning_rate \(0\.005 there, 0\.001 here\)"):
        train(load(checkpoint), changed, TEXTS, tmp_path)
    with pytest.raises(ValueError, match="differs in data"):
        train(load(checkpoint), stage, TEXTS[1:], tmp_path)
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


def test_failed_run_leaves_the_encoder_as_it_was(checkpoint, tmp_path):
    """Also without adapters, where training changes the weights themselves."""
    encoder = load(checkpoint)
    before = encoder.encode(TEXTS[:3])
    limit = encoder.max_seq_length
    stage = SimCSE(max_steps=5, batch_size=8, max_length=9, **{**FAST, "lora_r": 0})
    with pytest.raises(TrainingInterrupted):
        train(encoder, stage, TEXTS, tmp_path, callbacks=[Signal(2)], progress=False)
    assert (encoder.encode(TEXTS[:3]) == before).all() and encoder.max_seq_length == limit


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


# ---- options


def test_train_whole_layers_without_lora(checkpoint, tmp_path):
    encoder = load(checkpoint)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    stage = SimCSE(max_steps=3, batch_size=8, trainable_layers=[3], **{**FAST, "lora_r": 0})
    result = train(encoder, stage, TEXTS, tmp_path, progress=False)
    changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".layers.3." in name for name in changed)
    again = load(checkpoint)
    train(again, stage, TEXTS, tmp_path, progress=False)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in again.state_dict().items())
    assert result.lost_in_merge == 0.0


@pytest.mark.parametrize("kind", ["mntp", "simcse"])
def test_gradient_checkpointing_and_mini_batch_sizees_change_no_loss(checkpoint, tmp_path, kind):
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


def test_prompts_are_attended_but_not_pooled_in_training(checkpoint, tmp_path):
    """The loss with a prompt differs from the one without, and from the one that pools the prompt too."""
    options = {"max_steps": 1, "batch_size": 8, **FAST, "lora_dropout": 0.0}
    prompted = Contrastive(prompts={"anchor": "the king likes "}, **options)
    curves = []
    for name, stage, pooled in (
        ("a", Contrastive(**options), False),
        ("b", prompted, False),
        ("c", prompted, True),
    ):
        encoder = load(checkpoint, "uncausal")
        setattr(encoder[1], "include_prompt", pooled)  # noqa: B010 (pyright)
        curves.append(losses(train(encoder, stage, PAIRS[:8], tmp_path / name, progress=False))[0])
    assert len({round(value, 4) for value in curves}) == 3


def test_batches_are_of_one_dataset(checkpoint, tmp_path):
    columns = {"anchor": [a for a, _ in PAIRS], "positive": [b for _, b in PAIRS]}
    data = {"one": {k: ["one " + t for t in v] for k, v in columns.items()}, "two": columns}
    kinds = []

    class Record(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.one = encoder, encoder.tokenizer("one")["input_ids"][0]

        def forward(self, features, labels):
            starts = features[0]["input_ids"][:, 0]
            kinds.append(float((starts == self.one).float().mean()))
            return self.encoder(features[0])["sentence_embedding"].sum() * 0.0

    subset = [not text.startswith("one") for text in columns["anchor"]]
    data["two"] = {k: [t for t, keep in zip(v, subset, strict=True) if keep] for k, v in columns.items()}
    stage = Contrastive(max_steps=8, batch_size=8, **FAST)
    train(load(checkpoint), stage, data, tmp_path, loss=Record, progress=False)
    assert set(kinds) == {0.0, 1.0}


def test_length_grouped_batches():
    from datasets import Dataset

    data = Dataset.from_dict({"text": ["x" * (1 + i * 7 % 100) for i in range(1000)]})
    sampler = LengthGrouped(data, 10, False, generator=torch.Generator(), seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 100 and sorted(sum(batches, [])) == list(range(1000))
    spreads = [max(len(data[i]["text"]) for i in b) - min(len(data[i]["text"]) for i in b) for b in batches]
    assert sum(spreads) / len(spreads) < 10  # 100 lengths: random batches of ten spread over about 82
    sampler.set_epoch(1)
    assert list(sampler) != batches


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MNTP(max_steps=0), r"MNTP\.max_steps is 0; it must be at least 1"),
        (lambda: MNTP(mask_probability=1.5), r"mask_probability is 1\.5; it must be in \(0, 1\]"),
        (lambda: MNTP(mask_share=0.95), r"random_share is 0\.1; it must be in \[0, 0\.05\]"),
        (
            lambda: SimCSE(lr_scheduler_type="steep"),
            r"lr_scheduler_type is 'steep'; it must be one of linear, cosine",
        ),
        (
            lambda: Contrastive(mini_batch_size=100),
            r"mini_batch_size is 100; it must be a divisor of the batch size, 512",
        ),
    ],
)
def test_stage_refuses_impossible_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_stage_defaults_are_the_published_values():
    mntp, simcse, pairs = MNTP(), SimCSE(), Contrastive()
    assert (mntp.max_steps, mntp.batch_size, mntp.learning_rate, mntp.chunk_tokens) == (1000, 32, 5e-5, 512)
    assert (mntp.mask_probability, mntp.mask_share, mntp.random_share) == (0.2, 0.8, 0.1)
    assert mntp.gradient_checkpointing and mntp.warmup_steps == 0
    assert (simcse.batch_size, simcse.learning_rate, simcse.max_length) == (128, 3e-5, 128)
    assert (simcse.temperature, simcse.attention_dropout) == (0.05, 0.3)
    assert (pairs.batch_size, pairs.learning_rate, pairs.warmup_steps) == (512, 2e-4, 300)
    assert (pairs.max_length, pairs.temperature) == (512, 0.02)
    assert all((s.lora_r, s.lora_alpha, s.lora_dropout) == (16, 32, 0.05) for s in (mntp, simcse, pairs))


@pytest.mark.parametrize(
    ("stage", "data", "message"),
    [
        (SimCSE(), ["one", " "], "at least 2 sentences"),
        (Contrastive(), [("one", "two")], r"at least 2 rows of \(anchor, positive\); found 1 rows"),
        (Contrastive(), {"anchor": ["one", "two"]}, r"with the columns \['anchor'\]"),
    ],
)
def test_train_needs_enough_data(checkpoint, tmp_path, stage, data, message):
    with pytest.raises(ValueError, match=message):
        train(load(checkpoint), stage, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_record_is_readable(checkpoint, tmp_path):
    train(load(checkpoint), SimCSE(max_steps=2, batch_size=8, **FAST), TEXTS, tmp_path, progress=False)
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert record["steps"] == 2 and record["tokens"] > 0 and record["seconds"] > 0
