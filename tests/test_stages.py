"""What each stage computes, and the settings it refuses."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import FAST, PAIRS, TEXTS, load, losses, save_checkpoint
from transformers import TrainerCallback

from uncausal.encoder.data.rows import DataError
from uncausal.encoder.data.texts import chunk_texts
from uncausal.encoder.training.lora import attach_lora
from uncausal.encoder.training.run import train
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.distill import Distill
from uncausal.encoder.training.stages.mntp import MNTP, MaskedChunks, MaskedNextToken
from uncausal.encoder.training.stages.registry import STAGES
from uncausal.encoder.training.stages.simcse import SimCSE, attention_dropout


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


def test_mntp_reads_running_text_without_the_template(checkpoint):
    """Regression: an encoder with a template put the user's turn round every article of its training text."""
    plain, framed = (load(checkpoint, template=template) for template in (None, "</s> {text} </s>"))
    stage = MNTP(max_steps=2, batch_size=2, chunk_tokens=8)
    assert torch.equal(stage.prepare(plain, TEXTS), stage.prepare(framed, TEXTS))


def test_chunk_texts_loses_no_token_and_pads_none(checkpoint):
    tokenizer = load(checkpoint).tokenizer
    chunks = chunk_texts(iter(TEXTS[:40]), tokenizer, 7)
    flat = [i for ids in tokenizer(TEXTS[:40])["input_ids"] for i in ids]
    assert chunks.flatten().tolist() == flat[: len(flat) // 7 * 7]
    assert len(chunk_texts(TEXTS, tokenizer, 7, limit=3)) == 3
    assert not torch.equal(chunk_texts(TEXTS, tokenizer, 7, seed=1), chunk_texts(TEXTS, tokenizer, 7, seed=2))
    with pytest.raises(ValueError, match=r"holds \d+ tokens, less than one chunk of 512"):
        chunk_texts(TEXTS[:3], tokenizer, 512)


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
    with pytest.raises(ZeroDivisionError), attention_dropout(encoder.backbone, 0.3):
        raise ZeroDivisionError
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


def test_mntp_head_tied_and_untied(checkpoint, tmp_path):
    from uncausal.encoder.training.lm_head import find_head

    tied = load(save_checkpoint(tmp_path / "tied", tie_word_embeddings=True)).backbone
    assert find_head(tied)[0] is tied.get_input_embeddings().weight
    untied = load(checkpoint)
    weight = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    assert torch.equal(find_head(untied.backbone)[0], weight)
    untied.save_pretrained(str(tmp_path / "encoder"))
    headless = load(tmp_path / "encoder").backbone
    with pytest.raises(ValueError, match=r"no language-model head for MNTP in .*MNTP\(head="):
        find_head(headless)
    assert torch.equal(find_head(headless, str(checkpoint))[0], weight)


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
        *(
            (
                partial(SimCSE, compile_layers=True, trainer_arguments={option: value}),
                f"compile_layers is True; it must be off with {option}$",
            )
            for option, value in (
                *(("torch_compile", True), ("torch_compile_backend", "eager")),
                *(("torch_compile_mode", "default"), ("activation_checkpointing", True)),
                ("gradient_checkpointing", True),
            )
        ),
        (
            lambda: SimCSE(compile_layers=True, gradient_checkpointing=True),
            "compile_layers is True; it must be off with gradient_checkpointing",
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


def test_options_of_the_loss_reach_it(checkpoint):
    encoder = load(checkpoint)
    options = {
        "temperature": 0.1,
        "margin": 0.2,
        "matryoshka_dims": [32, 8],
        "matryoshka_weights": [1.0, 0.5],
    }
    options |= {"symmetric": True, "mini_batch_size": 4, "mini_batch_num_tokens": 64, "exchange": "ring"}
    for stage in (
        SimCSE(batch_size=8, **options),
        Contrastive(batch_size=8, hard_negatives="own", **options),
    ):
        loss = stage.make_loss(encoder)
        assert {name: getattr(loss, name) for name in options} == options
        assert loss.hard_negatives == getattr(stage, "hard_negatives", "shared")
    assert not Contrastive(in_batch_negatives=False).make_loss(encoder).in_batch_negatives
    with pytest.raises(
        ValueError, match=r"matryoshka_dims is \[64, 8\]; it must be at most the encoder's 32"
    ):
        SimCSE(matryoshka_dims=[64, 8]).make_loss(encoder)
    encoder.truncate_dim = 8  # of `encode` alone
    assert SimCSE(matryoshka_dims=[32, 8]).make_loss(encoder)


def test_matryoshka_trains_every_prefix(checkpoint, tmp_path):
    """The loss of the first step is the weighted sum of those of the prefixes, each trained for alone."""
    first = {}
    for dims, weights in [([32], [1.0]), ([8], [1.0]), ([32, 8], [1.0, 0.5])]:
        stage = Contrastive(
            max_steps=1, batch_size=8, matryoshka_dims=dims, matryoshka_weights=weights, **FAST
        )
        stage.lora_dropout = 0.0
        result = train(load(checkpoint), stage, PAIRS, tmp_path / str(dims), progress=False)
        first[tuple(dims)] = losses(result)[0]
    assert first[32, 8] == pytest.approx(first[32,] + 0.5 * first[8,], abs=1e-3)


@pytest.mark.parametrize(("stage", "data"), [(MNTP, TEXTS), (Contrastive, PAIRS)])
def test_options_of_the_trainer_reach_it(checkpoint, tmp_path, stage, data):
    more = {"adam_beta2": 0.98, "torch_compile_backend": "eager"}
    settings = {"optim": "adafactor", "dataloader_num_workers": 1, "report_to": "tensorboard"}
    stage = stage(batch_size=8, max_steps=2, trainer_arguments=more, **settings)
    vars(stage).update({"chunk_tokens": 8} if isinstance(stage, MNTP) else {})
    encoder = load(checkpoint)
    options = stage.trainer_options(encoder.backbone, tmp_path)
    assert {**options, **settings, **more} == options
    stage.report_to = "none"
    trainer = stage.make_trainer(encoder, stage.prepare(encoder, data), tmp_path, stage.make_loss(encoder))
    assert trainer.args.optim == "adafactor" and trainer.args.adam_beta2 == 0.98
    stage.trainer_arguments = {"seed": 3}
    with pytest.raises(ValueError, match="trainer_arguments: seed is the stage's to set"):
        stage.trainer_options(encoder.backbone, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        ({"fsdp": "full_shard"}, {}, "FSDP"),
        ({"fsdp": True}, {}, "FSDP"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"deepspeed": "3.json"}, {}, "DeepSpeed's ZeRO-3"),
        ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed's ZeRO-3"),
        ({"deepspeed": '{"zero_optimization": {"stage": 3}}'}, {}, "DeepSpeed's ZeRO-3"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, {}, "DeepSpeed's ZeRO-3"),
        ({}, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "3.json"}, "DeepSpeed's ZeRO-3"),
        ({"deepspeed": "2.json"}, {}, None),
        ({"deepspeed": "missing.json"}, {"ACCELERATE_USE_FSDP": "false"}, None),
        ({"deepspeed": "none.json"}, {}, None),
    ],
)
def test_sharded_weights_are_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, arguments, environment, named
):
    """Checkpoints and the adapter would have held the first process's part of every weight."""
    monkeypatch.chdir(tmp_path)
    for stage in (2, 3):
        (tmp_path / f"{stage}.json").write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
    (tmp_path / "none.json").write_text("{}")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for kind in STAGES.values():
        options = {"trainer_arguments": arguments} | ({"vectors": "any"} if kind is Distill else {})
        if named is None:
            assert kind(**options).trainer_arguments == arguments
            continue
        with pytest.raises(ValueError, match=f"{kind.__name__}: {named} gives every process a part"):
            kind(**options)


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(checkpoint):
    for rslora, scale in ((False, 32 / 16), (True, 32 / 4)):
        adapter = attach_lora(load(checkpoint).backbone, r=16, alpha=32, dropout=0.0, rslora=rslora)
        found = {m.scaling["default"] for m in adapter.modules() if hasattr(m, "lora_A")}
        assert found == {scale}


@pytest.mark.parametrize(
    ("stage", "data", "message"),
    [
        (SimCSE(), ["one", " "], "the data hold 1 rows, fewer than a batch of 128"),
        (Contrastive(), [("one", "two")], "the data hold 1 rows, fewer than a batch of 512"),
        (Contrastive(), {"anchor": ["one", "two"]}, r"row 1: no pair among the fields \['anchor'\]"),
        (Contrastive(), [], "the list holds no rows"),
        (Contrastive(batch_size=2, weights={"c": 2}), {"a": PAIRS, "b": PAIRS}, "the set 'c'; there is a, b"),
        (Contrastive(batch_size=9), {"a": PAIRS, "b": PAIRS[:8]}, "the set 'b' holds 8 rows, fewer than a"),
        (
            Contrastive(batch_size=2, prompts={"query": "x"}),
            PAIRS,
            "the column 'query'; there is anchor, pos",
        ),
        (
            Contrastive(batch_size=2, blend=True),
            {"a": PAIRS, "b": [(*row, "x") for row in PAIRS]},
            "the sets 'a' and 'b' differ in the column 'negative'",
        ),
        (MNTP(chunk_tokens=8), TEXTS[:9], r"in chunks of 8 tokens, \d rows, fewer than a batch of 32"),
    ],
)
def test_train_needs_enough_data(checkpoint, tmp_path, stage, data, message):
    """Refused before the folder is made; a batch of one dataset used to be as small as the dataset was."""
    with pytest.raises(DataError, match=message):
        train(load(checkpoint), stage, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def prompted_loss(encoder, rows, prompts, temperature):
    """InfoNCE by hand: every text alone, its prompt's tokens counted and left out of the mean."""
    columns = []
    for texts, of_column in zip(zip(*rows, strict=True), prompts, strict=True):
        vectors = []
        of_rows = [of_column] * len(texts) if isinstance(of_column, str) else of_column
        for text, prompt in zip(texts, of_rows, strict=True):
            ids = encoder.tokenizer(prompt + text, return_tensors="pt")["input_ids"]
            skipped = len(encoder.tokenizer(prompt)["input_ids"]) if prompt else 0
            vectors.append(encoder.backbone(input_ids=ids).last_hidden_state[0, skipped:].mean(0))
        columns.append(F.normalize(torch.stack(vectors), dim=1))
    return F.cross_entropy(columns[0] @ columns[1].T / temperature, torch.arange(len(rows)))


@pytest.mark.parametrize("attention", ["sdpa", "uncausal"])
@pytest.mark.parametrize("where", ["prompts", "instruction", "rows", "documents"])
def test_prompts_are_attended_but_not_pooled_in_training(checkpoint, tmp_path, attention, where):
    """The first loss is that of a computation by hand; a mask off by two passed the earlier test."""
    options = {"max_steps": 1, "batch_size": 8, "temperature": 0.5, **FAST, "lora_dropout": 0.0}
    rows, prompt = PAIRS[:8], "the king likes "
    data, stage, of_documents = rows, Contrastive(prompts={"anchor": prompt}, **options), ""
    if where == "instruction":
        data = [{"anchor": a, "positive": p, "instruction": "king"} for a, p in rows]
        # an instruction makes no text a duplicate
        stage = Contrastive(instruction_template="the {instruction} likes ", no_duplicates=True, **options)
    if where == "rows":  # tasks within one batch
        told = ["king", "dog", None, "king"]
        data = [
            {"anchor": a, "positive": p, "instruction": i} for (a, p), i in zip(rows[:4], told, strict=True)
        ]
        data = {"told": data, "plain": rows[4:]}
        template = "the {instruction} likes "
        stage = Contrastive(instruction_template=template, blend=True, **options)
        prompt = [template.format(instruction=i) if i else "" for i in [*told, *[None] * 4]]
    if where == "documents":  # a task whose sides are of one kind, and one whose are not
        data = {
            "one": [
                {"anchor": a, "positive": p, "instruction": "king", "document_instruction": "king"}
                for a, p in rows[:4]
            ],
            "two": [{"anchor": a, "positive": p, "instruction": "dog"} for a, p in rows[4:]],
        }
        stage = Contrastive(instruction_template="the {instruction} likes ", blend=True, **options)
        prompt = ["the king likes "] * 4 + ["the dog likes "] * 4
        of_documents = ["the king likes "] * 4 + [""] * 4
    with torch.no_grad():
        expected = prompted_loss(load(checkpoint, attention), rows, (prompt, of_documents), 0.5)
    found = losses(train(load(checkpoint, attention), stage, data, tmp_path, progress=False))
    assert found == pytest.approx([expected.item()], abs=2e-4)


def test_batches_are_of_one_dataset(checkpoint, tmp_path):
    columns = {"anchor": [a for a, _ in PAIRS], "positive": [b for _, b in PAIRS]}
    data = {"one": {k: ["one " + t for t in v] for k, v in columns.items()}, "two": columns}
    kinds = []

    class Record(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.one = encoder, encoder.tokenizer("one")["input_ids"][0]

        def forward(self, features, labels):
            starts = features[0]["input_ids"][0, features[0]["cu_seq_lens_q"][:-1]]
            assert len(starts) == 8
            kinds.append(float((starts == self.one).float().mean()))
            return self.encoder(features[0])["sentence_embedding"].sum() * 0.0

    subset = [not text.startswith("one") for text in columns["anchor"]]
    data["two"] = {k: [t for t, keep in zip(v, subset, strict=True) if keep] for k, v in columns.items()}
    stage = Contrastive(max_steps=8, batch_size=8, **FAST)
    train(load(checkpoint), stage, data, tmp_path, loss=Record, progress=False)
    assert set(kinds) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"lr_scheduler_type": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"lr_scheduler_type": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"lr_scheduler_type": "linear", "schedule_steps": 40}, [1.0, 0.975, 0.95, 0.925]),
        ({"lr_scheduler_type": "linear", "schedule_steps": 6, "warmup_steps": 2}, [0.0, 0.5, 1.0, 0.75]),
    ],
    ids=["constant", "linear", "horizon", "warmup"],
)
def test_learning_rate_follows_its_schedule(checkpoint, tmp_path, settings, rates):
    """Any schedule passed for linear; and a run stopped early had to let its rate decay to 0."""
    stage = SimCSE(max_steps=4, batch_size=4, **{**FAST, **settings, "learning_rate": 1e-3})
    result = train(load(checkpoint), stage, TEXTS[:8], tmp_path, progress=False)
    found = [line["learning_rate"] for line in result.history if "loss" in line]
    assert found == pytest.approx([1e-3 * rate for rate in rates])


def test_optimizer_has_the_stages_settings(checkpoint, tmp_path):
    found = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, *, optimizer, **kwargs):
            found.append((max(group["weight_decay"] for group in optimizer.param_groups), args.max_grad_norm))

    stage = SimCSE(max_steps=1, batch_size=4, weight_decay=0.25, max_grad_norm=0.5, **FAST)
    train(load(checkpoint), stage, TEXTS[:8], tmp_path, callbacks=[Look()], progress=False)
    assert found == [(0.25, 0.5)]


def test_ids_of_different_sets_are_different(checkpoint):
    """Ids of one set hide its rows from each other, never from those of another set."""
    encoder, stage = load(checkpoint), Contrastive(batch_size=2, blend=True)
    rows = [{"anchor": a, "positive": b, "id": i // 2} for i, (a, b) in enumerate(PAIRS[:4])]
    dataset = stage.prepare(encoder, {"one": rows, "none": PAIRS[4:6], "two": rows})
    assert [part["label"][:] for part in dataset.values()] == [[0, 0, 1, 1], [2, 3], [4, 4, 5, 5]]
    assert stage.make_loss(encoder, dataset).labels_as_ids
    assert not stage.make_loss(encoder, stage.prepare(encoder, PAIRS)).labels_as_ids


@pytest.mark.parametrize("sets", ["classes", "blended"])
def test_first_loss_of_a_set_of_classes_by_hand(checkpoint, tmp_path, sets):
    """A shared hard negative of another row was a negative of anchors of its own class (NV-Embed's rule)."""
    class_of = {text: text.split()[-1] for text in TEXTS if text.endswith(("river", "moon", "music"))}
    data = [{"text": text, "label": class_of[text]} for text in [*class_of][::8]]
    stage = Contrastive(max_steps=1, batch_size=len(data), negatives=2, temperature=0.5, **FAST)
    if sets == "blended":  # with a set whose negatives are of no class
        data = {"classes": data, "plain": [(a, p, *TEXTS[i : i + 2]) for i, (a, p) in enumerate(PAIRS[:5])]}
        stage = replace(stage, batch_size=len(data["classes"]) + 5, blend=True)
    stage.lora_dropout = 0.0
    encoder = load(checkpoint)
    dataset = stage.prepare(encoder, data)
    parts = dataset if sets == "blended" else {"classes": dataset}
    rows = [(name, row) for name, part in parts.items() for row in part]
    vectors, classes = [], []  # column by column
    for column in ("anchor", "positive", "negative_1", "negative_2"):
        texts = [row[column] for _, row in rows]
        vectors.append(torch.tensor(encoder.encode(texts, normalize_embeddings=True)))
        named = zip(texts, rows, strict=True)
        classes.append([class_of[text] if name == "classes" else None for text, (name, _) in named])
    scores = vectors[0] @ torch.cat(vectors[1:]).T / 0.5
    of_keys, expected = sum(classes[1:], []), []
    for i, mine in enumerate(classes[0]):
        kept = [j for j, of in enumerate(of_keys) if j == i or mine is None or of != mine]
        expected.append(torch.logsumexp(scores[i, kept], 0) - scores[i, i])
    found = losses(train(encoder, stage, data, tmp_path, progress=False))
    assert found == pytest.approx([torch.stack(expected).mean().item()], abs=2e-4)


@pytest.mark.parametrize(
    ("limits", "caches"),
    [
        ({"mini_batch_size": 8}, False),
        ({"mini_batch_size": 4}, True),
        ({"mini_batch_size": 8, "mini_batch_num_tokens": 20}, True),
        ({}, False),
    ],
)
def test_a_mini_batch_of_the_whole_batch_is_not_embedded_twice(checkpoint, limits, caches):
    loss = Contrastive(batch_size=8, **limits).make_loss(load(checkpoint))
    assert loss.uses_gradient_cache is caches


def test_mntp_never_masks_special_tokens(checkpoint):
    encoder = load(checkpoint)
    found = MNTP(mask_token="king").mask_settings(encoder.tokenizer, encoder.backbone)
    assert found["special_ids"].tolist() == [0, 1, 2] and found["vocab_size"] == len(encoder.tokenizer)
    assert found["mask_id"] == encoder.tokenizer("king")["input_ids"][0]
    with pytest.raises(ValueError, match="no token 'nothing' to mask with"):
        MNTP(mask_token="nothing").mask_settings(encoder.tokenizer, encoder.backbone)


def test_mntp_micro_batches_divide_by_the_batchs_masked_tokens(checkpoint, tmp_path):
    """A mean of means weighs a token by how few are masked in its micro-batch (4.364 against 4.281)."""
    options = {"max_steps": 2, "batch_size": 8, "chunk_tokens": 8, **FAST, "lora_dropout": 0.0}
    curves = [
        losses(train(load(checkpoint), MNTP(mini_batch_size=m, **options), TEXTS, tmp_path / str(m)))
        for m in (8, 2, 1)
    ]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)


def test_a_lens_is_tuned_before_the_model_and_leaves_it_as_it_is(checkpoint):
    """The first loss is lower by what the map learnt; a resumed run, which tunes it again, has its bits."""
    encoder = load(checkpoint)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    rows = torch.randint(3, len(encoder.tokenizer), (6, 8))
    rows[:, ::2] = 5  # something to learn
    chunks = MaskedChunks(
        rows, 40, 1, MNTP(mask_share=1, random_share=0).mask_settings(encoder.tokenizer, encoder.backbone)
    )
    models = [MaskedNextToken(encoder.backbone, torch.randn(len(encoder.tokenizer), 32) / 6) for _ in "123"]
    models[1]._head = models[2]._head = models[0]._head
    seen, forward = [], models[2].hidden_states
    models[2].hidden_states = lambda ids: (seen.append((len(ids), encoder.backbone.training)), forward(ids))[
        1
    ]
    encoder.train()
    models[1].tune_lens(chunks, 4)
    models[2].tune_lens(chunks, 4, mini_batch_size=2)
    assert {*seen} == {(2, False)} and encoder.backbone.training
    encoder.eval()
    batch = {name: torch.stack([chunks[i][name] for i in range(6)]) for name in chunks[0]}
    untuned, tuned, again = (model(**batch)["loss"].item() for model in models)
    assert tuned == pytest.approx(again, abs=1e-5) and tuned < untuned - 0.02
    assert not any(parameter.requires_grad for parameter in models[1].lens.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_mntp_with_a_lens_trains_and_saves_none(checkpoint, tmp_path):
    options = {"max_steps": 4, "batch_size": 4, "chunk_tokens": 8, "lora_dropout": 0.0, **FAST}
    plain, tuned = (
        losses(train(load(checkpoint), MNTP(lens_steps=n, **options), TEXTS, tmp_path / str(n)))
        for n in (0, 30)
    )
    assert tuned[0] < plain[0] and len(tuned) == 4
    saved = [path.name for path in (tmp_path / "30" / "adapter").iterdir()]
    assert sorted(saved) == sorted(path.name for path in (tmp_path / "0" / "adapter").iterdir())


def test_masked_chunks_depend_on_their_number_alone():
    """Masks came from the process's random state, which is the same on all ranks."""
    mask = {"probability": 0.5, "mask_share": 1.0, "random_share": 0.0, "mask_id": 0, "vocab_size": 99}
    chunks = torch.arange(1, 97).view(6, 16)
    rows = MaskedChunks(chunks, 14, 3, {**mask, "special_ids": torch.tensor([])})
    first = [rows[i] for i in range(14)]
    torch.manual_seed(7)
    again = MaskedChunks(chunks, 14, 3, {**mask, "special_ids": torch.tensor([])})
    for i in (13, 0, 7):
        assert all(torch.equal(again[i][name], first[i][name]) for name in first[i])
    other = MaskedChunks(chunks, 14, 4, {**mask, "special_ids": torch.tensor([])})
    assert [(other[i]["labels"] != -100).tolist() for i in range(3)] != [
        (first[i]["labels"] != -100).tolist() for i in range(3)
    ]
    places = {tuple((row["labels"] != -100).tolist()) for row in first}
    assert len(places) == 14
    whole = [torch.where(row["labels"] != -100, row["labels"], row["input_ids"]) for row in first]
    for start in (0, 6):  # every pass has every chunk once, in an order of its own
        assert sorted(int(row[0]) for row in whole[start : start + 6]) == chunks[:, 0].tolist()
    assert [int(row[0]) for row in whole[:6]] != [int(row[0]) for row in whole[6:12]]


def test_mntp_shuffles_a_file_as_it_does_a_list(checkpoint, tmp_path):
    """A file's first chunks were taken in its order, a list's were shuffled."""
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    stage = MNTP(max_steps=2, batch_size=4, chunk_tokens=8)
    encoder = load(checkpoint)
    assert torch.equal(stage.prepare(encoder, tmp_path / "a.txt"), stage.prepare(encoder, TEXTS))
    assert not torch.equal(
        stage.prepare(encoder, TEXTS), chunk_texts(iter(TEXTS), encoder.tokenizer, 8, limit=8)
    )
