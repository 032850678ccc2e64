"""Distillation: what the student learns, and which vectors are refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from tiny import Signal

from uncausal import Encoder, train
from uncausal.encoder.data.rows import DataError
from uncausal.encoder.loading import load_model
from uncausal.encoder.training.progress import TrainingInterrupted
from uncausal.encoder.training.stages import distill as distill_module
from uncausal.encoder.training.stages.distill import Distill, UnitDistance

WORDS = "the a cat dog king sees likes paints river music two apples long road home".split()
TEXTS = [" ".join(WORDS[(i * k) % 15] for k in range(1, 4 + i % 3)) for i in range(120)]
FAST = {"batch_size": 16, "lora_r": 4, "bf16": False, "learning_rate": 5e-3, "logging_steps": 5}


def bag_of_words(width):
    """A teacher's vectors, which the words of a text add up to."""
    words = dict(zip(WORDS, np.random.default_rng(0).normal(size=(15, width)), strict=True))
    return np.float32([sum(words[word] for word in text.split()) for text in TEXTS])


def load(path):
    return Encoder.from_pretrained(path, device="cpu", dtype="float32")


def test_student_learns_the_teachers_space(tiny_checkpoint, tmp_path):
    """A teacher of 16 dimensions teaches an encoder of 32: the appended map is trained, saved and loaded."""
    np.save(tmp_path / "vectors.npy", bag_of_words(16))
    encoder = load(tiny_checkpoint)
    stage = Distill(vectors=str(tmp_path / "vectors.npy"), max_steps=60, **FAST)
    before = UnitDistance(encoder)
    result = train(encoder, stage, TEXTS, tmp_path / "run", progress=False)
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    unit = bag_of_words(16) / np.linalg.norm(bag_of_words(16), axis=1, keepdims=True)
    found = encoder.encode(TEXTS, normalize_embeddings=True)
    assert found.shape == (120, 16) and (found * unit).sum(1).mean() > 0.8
    encoder.save_pretrained(str(tmp_path / "saved"))
    assert np.allclose(
        SentenceTransformer(str(tmp_path / "saved")).encode(TEXTS[:9]), encoder.encode(TEXTS[:9]), atol=1e-5
    )
    assert before.model is encoder


def test_the_map_starts_at_the_least_squares_solution(tiny_checkpoint, tmp_path):
    """Vectors that are a linear map of the untrained student's are learnt before the first step."""
    encoder = load(tiny_checkpoint)
    plain = encoder.encode(TEXTS)
    vectors = plain @ np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32) + 0.1
    np.save(tmp_path / "vectors.npy", vectors)
    Distill(vectors=str(tmp_path / "vectors.npy"), **FAST).prepare(encoder, TEXTS)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (encoder.encode(TEXTS, normalize_embeddings=True) * unit).sum(1).min() > 0.99


def test_the_map_is_fitted_to_what_it_gets(tiny_checkpoint, tmp_path):
    """The map goes before the encoder's normalisation, and was fitted to what comes after it."""
    encoder = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", normalize=True)
    vectors = load(tiny_checkpoint).encode(TEXTS) @ np.random.default_rng(1).normal(size=(32, 16)) + 0.5
    np.save(tmp_path / "vectors.npy", vectors.astype(np.float32))
    Distill(vectors=str(tmp_path / "vectors.npy"), **FAST).prepare(encoder, TEXTS)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (encoder.encode(TEXTS) * unit).sum(1).min() > 0.99


def test_the_pruned_may_have_a_map_of_its_own(tiny_checkpoint, tmp_path):
    """A whitened teacher's map was made for its last layer: the student's may start anew, and is trained."""
    teacher = load(tiny_checkpoint)
    teacher.whiten(TEXTS)
    teacher.save_pretrained(str(tmp_path / "teacher"))
    errors = []
    for wanted in (None, True):
        student = load(tmp_path / "teacher")
        student.prune(1)
        stage = Distill(teacher=str(tmp_path / "teacher"), linear_map=wanted, **FAST)
        [targets] = [stage.prepare(student, TEXTS)["label"]]
        assert len(student) == 3
        errors.append(
            ((student.encode(TEXTS, normalize_embeddings=True) - np.array(targets)) ** 2).sum(1).mean()
        )
        assert student[2].linear.weight.requires_grad == bool(wanted)
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(
        ValueError, match="linear_map=False, but the encoder has 32 dimensions, the teacher 16"
    ):
        np.save(tmp_path / "vectors.npy", bag_of_words(16))
        Distill(vectors=str(tmp_path / "vectors.npy"), linear_map=False, **FAST).prepare(student, TEXTS)


def test_resumed_run_ends_where_a_whole_one_does(tiny_checkpoint, tmp_path):
    """The appended map is part of the checkpoint: its start depends on the seed, its end on all steps."""
    np.save(tmp_path / "vectors.npy", bag_of_words(16))
    stage = Distill(vectors=str(tmp_path / "vectors.npy"), max_steps=8, save_steps=4, **FAST)
    ends = []
    for run in ("whole", "again"):
        encoder = load(tiny_checkpoint)
        train(encoder, stage, TEXTS, tmp_path / run, progress=False)
        if run == "again":
            for path in (tmp_path / run / "adapter", tmp_path / run / "checkpoint-8"):
                path.rename(tmp_path / path.name)
            encoder = load(tiny_checkpoint)
            assert train(encoder, stage, TEXTS, tmp_path / run, progress=False).steps == 4
        ends.append(encoder.encode(TEXTS[:20]))
    assert np.array_equal(*ends)


def test_a_teacher_goes_on_where_it_was_interrupted(tiny_checkpoint, tmp_path, monkeypatch):
    """Regression: an hour of a deep teacher's work was lost with the process."""
    monkeypatch.setattr(distill_module, "CHUNK", 20)
    asked, real = [], Encoder.encode

    def watched(self, texts, **options):
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(len(texts))
        return real(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", watched)
    file, texts = tmp_path / "vectors.npy", TEXTS[:50]
    stage = Distill(teacher=str(tiny_checkpoint), vectors=str(file))
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        stage.targets(texts, "cpu")
    assert asked == [20, 20] and not file.exists()
    stop = 3
    with pytest.raises(KeyboardInterrupt):  # other texts have parts of their own
        stage.targets(texts[::-1], "cpu")
    stop = None
    stage.targets(texts, "cpu")
    assert asked == [20, 20, 20, 10]
    assert np.array_equal(np.load(file), real(load_model(str(tiny_checkpoint), device="cpu"), texts))
    assert {path.name for path in tmp_path.iterdir()} == {"vectors.npy", "vectors.npy.json"}


def test_own_full_depth_teaches_the_pruned(tiny_checkpoint, tmp_path):
    """No map where dimensions agree; the teacher is packed as elsewhere, and its vectors written once."""
    load(tiny_checkpoint).save_pretrained(str(tmp_path / "teacher"))
    student = load(tiny_checkpoint)
    student.prune(1)
    file = tmp_path / "vectors.npy"
    stage = Distill(teacher=str(tmp_path / "teacher"), vectors=str(file), max_steps=2, **FAST)
    train(student, stage, TEXTS, tmp_path / "run", progress=False)
    assert len(student) == 2 and student.get_embedding_dimension() == 32
    assert np.array_equal(np.load(file), Encoder.from_pretrained(tmp_path / "teacher").encode(TEXTS))
    assert json.loads(Path(f"{file}.json").read_text())["teacher"] == str(tmp_path / "teacher")
    kept = Distill(vectors=str(file))
    assert np.allclose(np.linalg.norm(kept.targets(TEXTS, "cpu"), axis=1), 1)
    for changed in (replace(stage, teacher="another"), replace(stage, teacher_prompt="query: ")):
        with pytest.raises(ValueError, match="vectors of another teacher than .*, or with another prompt"):
            changed.targets(TEXTS, "cpu")


def test_a_teacher_reads_no_more_than_it_may(tiny_checkpoint, tmp_path):
    load(tiny_checkpoint).save_pretrained(str(tmp_path / "teacher"))
    long = [f"{text} {' '.join(WORDS)}" for text in TEXTS]
    whole, cut = (
        Distill(teacher=str(tmp_path / "teacher"), teacher_max_length=n, vectors=str(tmp_path / f"{n}.npy"))
        for n in (None, 5)
    )
    found = [stage.targets(given, "cpu") for stage, given in ((whole, long), (cut, long))]
    assert not np.allclose(*found, atol=0.1)
    short = [" ".join(text.split()[:5]) for text in long]
    np.testing.assert_allclose(
        Distill(teacher=str(tmp_path / "teacher")).targets(short, "cpu"), found[1], atol=0.02
    )
    assert not replace(cut, teacher_max_length=6).wrote(tmp_path / "5.npy")
    with pytest.raises(ValueError, match="teacher_max_length is 0; it must be above 0"):
        Distill(teacher="a", teacher_max_length=0)


def test_a_teacher_trained_further_in_its_folder_is_another(tiny_checkpoint, tmp_path):
    """Regression: it was known by its name alone, and its old vectors were taken."""
    teacher = load(tiny_checkpoint)
    teacher.save_pretrained(str(tmp_path / "teacher"))
    stage = Distill(teacher=str(tmp_path / "teacher"), vectors=str(tmp_path / "vectors.npy"), **FAST)
    stage.targets(TEXTS, "cpu")
    assert stage.wrote(tmp_path / "vectors.npy")
    with torch.no_grad():
        teacher.backbone.layers[0].mlp.down_proj.weight.mul_(-2)
    teacher.save_pretrained(str(tmp_path / "teacher"))
    assert not stage.wrote(tmp_path / "vectors.npy")


def test_of_several_teachers_each_is_known_by_its_weights(tiny_checkpoint, tmp_path):
    """Regression: one whose files are not here, as the hub's, let every other one pass."""
    stage = Distill(teacher=[str(tiny_checkpoint), "nobody/model"], vectors=str(tmp_path / "v.npy"))
    np.save(tmp_path / "v.npy", np.ones((2, 2)))
    note = {**stage._teacher(), "texts": "any"}
    for changed, same in ((note["weights"], True), ([["other"], []], False), ([[], ["of now"]], True)):
        (tmp_path / "v.npy.json").write_text(json.dumps({**note, "weights": changed}))
        assert stage.wrote(tmp_path / "v.npy") == same
    alone = Distill(teacher=str(tiny_checkpoint), vectors=str(tmp_path / "v.npy"))
    note = {**alone._teacher(), "texts": "any"}
    assert note["weights"]
    for changed, same in ((note["weights"], True), ([*note["weights"], "more"], False), (None, True)):
        (tmp_path / "v.npy.json").write_text(json.dumps({**note, "weights": changed}))
        assert alone.wrote(tmp_path / "v.npy") == same


def test_whole_vectors_are_trained_whatever_encode_cuts_them_to(tiny_checkpoint, tmp_path):
    """Regression: the dimension was taken for that of `truncate_dim`, and the first step failed."""
    encoder = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    encoder.truncate_dim = 8
    np.save(tmp_path / "vectors.npy", bag_of_words(8))
    train(encoder, Distill(vectors=str(tmp_path / "vectors.npy"), max_steps=1, **FAST), TEXTS, tmp_path / "r")
    assert encoder[2].linear.out_features == 8


def test_an_interrupted_run_puts_the_map_back_as_it_was(tiny_checkpoint, tmp_path):
    """Regression: the one it replaced was turned to float32, and the same call was refused."""
    np.save(tmp_path / "vectors.npy", bag_of_words(16))
    stage = Distill(vectors=str(tmp_path / "vectors.npy"), max_steps=3, **FAST)
    encoder = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    encoder.whiten(TEXTS)
    before = encoder.encode(TEXTS[:5])
    with pytest.raises(TrainingInterrupted):
        train(encoder, stage, TEXTS, tmp_path / "run", callbacks=[Signal(1)], progress=False)
    assert encoder[2].linear.weight.dtype == torch.bfloat16
    assert np.array_equal(encoder.encode(TEXTS[:5]), before)
    moved = train(encoder, stage, TEXTS, tmp_path / "run", progress=False)
    assert moved.steps == 2 and encoder[2].linear.weight.dtype == torch.bfloat16


def test_map_does_not_depend_on_who_wrote_the_vectors(tiny_checkpoint, tmp_path):
    """Loading the teacher drew random numbers, the map began elsewhere, and no run could be resumed."""
    teacher = load(tiny_checkpoint)
    teacher.append(Dense(32, 16))
    teacher.save_pretrained(str(tmp_path / "teacher"))
    stage = Distill(
        teacher=str(tmp_path / "teacher"), vectors=str(tmp_path / "vectors.npy"), max_steps=4, **FAST
    )
    with pytest.raises(TrainingInterrupted):
        train(load(tiny_checkpoint), stage, TEXTS, tmp_path / "run", callbacks=[Signal(2)], progress=False)
    resumed = train(load(tiny_checkpoint), stage, TEXTS, tmp_path / "run", progress=False)
    assert resumed.steps == 2
    whole, again = load(tiny_checkpoint), load(tiny_checkpoint)
    train(whole, stage, TEXTS, tmp_path / "whole", progress=False)
    train(again, stage, TEXTS, tmp_path / "run", progress=False)
    assert np.array_equal(whole.encode(TEXTS[:9]), again.encode(TEXTS[:9]))


@pytest.mark.parametrize("normalize", [False, True])
def test_refused_run_leaves_no_map_behind(tiny_checkpoint, tmp_path, normalize):
    """The encoder had a random map after a call that did nothing but raise, or lost its normalisation."""

    def load(path):
        return Encoder.from_pretrained(path, device="cpu", dtype="float32", normalize=normalize)

    np.save(tmp_path / "vectors.npy", bag_of_words(16))
    stage = {"vectors": str(tmp_path / "vectors.npy"), "max_steps": 1, **FAST}
    train(load(tiny_checkpoint), Distill(**stage), TEXTS, tmp_path / "run", progress=False)
    encoder = load(tiny_checkpoint)
    modules = list(encoder)
    with pytest.raises(ValueError, match="differs in seed"):
        train(encoder, Distill(seed=1, **stage), TEXTS, tmp_path / "run", progress=False)
    assert list(encoder) == modules and encoder.get_embedding_dimension() == 32
    with pytest.raises(DataError, match="the data hold 9 rows, fewer than a batch of 16"):
        Distill(**stage).prepare(encoder, TEXTS[:9])


def test_loss_is_two_minus_two_cosines():
    class Fixed(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": torch.tensor([[3.0, 0.0], [0.0, 2.0]])}

    labels = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert UnitDistance(Fixed())([{}], labels).item() == pytest.approx((2 + 0) / 2)  # type: ignore[arg-type]


def test_mini_batches_change_no_loss(tiny_checkpoint, tmp_path):
    """The setting was ignored, and all texts of a batch were in memory at once."""
    np.save(tmp_path / "vectors.npy", bag_of_words(16))
    curves, rows = [], []

    def in_training(module, _, out):
        if module.training:
            rows.append(len(out["sentence_embedding"]))

    for size in (None, 4):
        encoder = load(tiny_checkpoint)
        encoder[1].register_forward_hook(in_training)
        options = {**FAST, "logging_steps": 1, "max_steps": 3, "lora_dropout": 0.0, "mini_batch_size": size}
        stage = Distill(vectors=str(tmp_path / "vectors.npy"), **options)
        result = train(encoder, stage, TEXTS, tmp_path / str(size), progress=False)
        curves.append([line["loss"] for line in result.history if "loss" in line])
    assert curves[1] == pytest.approx(curves[0], abs=1e-5) and curves[0][0] != curves[0][2]
    assert set(rows) == {16, 4} and rows.count(16) == 3


def test_wrong_vectors_are_refused(tiny_checkpoint, tmp_path):
    encoder, file = load(tiny_checkpoint), tmp_path / "vectors.npy"
    with pytest.raises(ValueError, match=r"Distill.teacher is None; it must be a model's name"):
        Distill()
    for wrong in (3, [], ["a", 3], True, {"a": "b"}):
        with pytest.raises(ValueError, match=r"it must be a model's name or folder, or a list of them"):
            Distill(teacher=wrong)
    stage = Distill(vectors=str(file))
    with pytest.raises(FileNotFoundError, match="no such file of vectors: .*vectors.npy"):
        stage.prepare(encoder, TEXTS)
    file.write_text("no array")
    with pytest.raises(ValueError, match=r"vectors.npy: not a .npy file of vectors"):
        stage.prepare(encoder, TEXTS)
    np.save(file, np.arange(120.0))
    with pytest.raises(
        ValueError, match=r"vectors.npy: expected a row of floats a text, got float64 \(120,\)"
    ):
        stage.prepare(encoder, TEXTS)
    np.save(file, bag_of_words(16)[:7])
    with pytest.raises(ValueError, match="vectors of 7 other texts, not of these 120"):
        stage.prepare(encoder, TEXTS)
    np.save(file, bag_of_words(16))
    Path(f"{file}.json").write_text('{"texts": "others"}')
    with pytest.raises(ValueError, match="other texts"):
        stage.prepare(encoder, TEXTS)
    Path(f"{file}.json").unlink()
    np.save(file, np.where(np.arange(120)[:, None] == 5, 0, bag_of_words(16)))
    with pytest.raises(ValueError, match="vector of text 5 is zero or not finite"):
        stage.prepare(encoder, TEXTS)
