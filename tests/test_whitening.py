"""Whitening: what the map does to vectors, where it stands in an encoder, and what keeps it."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from tiny import FAST, PAIRS, TEXTS, load, save_checkpoint

from uncausal import Contrastive, run_recipe, train
from uncausal.encoder.data.rows import DataError
from uncausal.encoder.training.recipes import RecipeError, load_recipe
from uncausal.encoder.whitening import LinearMap, Whitening, append_linear, whitening_map

RECIPE = """
[model]
name = "mine"
[[stage]]
kind = "whiten"
data = "texts.txt"
max_texts = 200
[[stage]]
kind = "contrastive"
data = "pairs.jsonl"
max_steps = 2
batch_size = 16
lora_r = 4
lora_dropout = 0.0
bf16 = false
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("causal"))


def sample(count=500, width=6):
    """Correlated vectors far from the origin."""
    draw = np.random.default_rng(0)
    spread = draw.normal(size=(width, width)) * np.array([5.0, 3.0, 1.0, 1.0, 1.0, 0.5])
    return (draw.normal(size=(count, width)) @ spread.T + 7).astype(np.float32)


def mapped(module, vectors):
    with torch.no_grad():
        return module.linear(torch.from_numpy(vectors)).double().numpy()


def test_full_whitening_has_no_mean_and_no_main_direction():
    out = mapped(whitening_map(sample()), sample())
    assert np.abs(out.mean(0)).max() < 1e-4
    assert np.allclose(np.cov(out.T), np.eye(6), atol=1e-3)


def test_half_way_takes_the_root_of_every_spread():
    """power 0.5 leaves variance ** 0.5, of mean 1; power 0 only centres and turns."""
    vectors = sample()
    variances = np.linalg.eigvalsh(np.cov(vectors.T.astype(float)))[::-1]
    wanted = np.sqrt(variances) / np.sqrt(variances).mean()
    spread = np.cov(mapped(whitening_map(vectors, power=0.5), vectors).T)
    assert np.allclose(spread, np.diag(wanted), atol=1e-3)
    turned, centred = mapped(whitening_map(vectors, power=0.0), vectors), vectors - vectors.mean(0)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (turned, centred)]
    assert np.allclose(unit[0] @ unit[0].T, unit[1] @ unit[1].T, atol=1e-3)


def test_fewer_dimensions_are_those_of_most_variance():
    vectors = sample()
    few, all_of_them = whitening_map(vectors, power=0.5, dim=2), whitening_map(vectors, power=0.5)
    found, wanted = mapped(few, vectors), mapped(all_of_them, vectors)[:, :2]
    assert found.shape == (500, 2)
    assert np.allclose(found / np.abs(found).max(), wanted / np.abs(wanted).max(), atol=1e-5)


def test_directions_of_no_variance_are_not_blown_up():
    vectors = np.concatenate([sample(), np.zeros((500, 1), np.float32)], axis=1)
    out = mapped(whitening_map(vectors), vectors)
    assert np.isfinite(out).all() and np.abs(out).max() < 10


@pytest.mark.parametrize("normalize", [False, True])
def test_encoder_keeps_one_map_and_loads_elsewhere(checkpoint, tmp_path, normalize):
    """Called twice, after the pooling and before a normalisation; plain sentence-transformers reads it."""
    encoder = load(checkpoint, normalize=normalize)
    encoder.whiten(TEXTS)
    once = encoder.encode(TEXTS, normalize_embeddings=True)
    encoder.whiten(TEXTS, power=0.5, max_texts=100)
    assert [type(m) for m in encoder][2:] == [LinearMap] + [Normalize] * normalize
    encoder.whiten(TEXTS)
    again = encoder.encode(TEXTS, normalize_embeddings=True)
    assert np.allclose(again @ again.T, once @ once.T, atol=5e-3)
    encoder.save_pretrained(str(tmp_path / "saved"))
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.allclose(plain.encode(TEXTS[:9]), encoder.encode(TEXTS[:9]), atol=1e-5)
    assert load(tmp_path / "saved").get_embedding_dimension() == 32


def test_half_precision_encoder_is_whitened_and_reloaded(checkpoint, tmp_path):
    """The map has the model's dtype, as sentence-transformers gives it on loading."""
    encoder = load(checkpoint, dtype="bfloat16")
    encoder.whiten(TEXTS)
    encoder.save_pretrained(str(tmp_path / "saved"))
    vectors = encoder.encode(TEXTS[:9])
    assert np.array_equal(load(tmp_path / "saved", dtype="bfloat16").encode(TEXTS[:9]), vectors)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS[:9])
    cosines = (plain * vectors).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() > 0.98


def test_another_linear_layer_keeps_its_activation(checkpoint, tmp_path):
    """Every linear layer of a saved encoder loads as ours: with the settings it was saved with."""
    encoder = load(checkpoint)
    encoder.append(LinearMap(32, 8, activation_function=torch.nn.Tanh()))
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert np.array_equal(again.encode(TEXTS[:9]), encoder.encode(TEXTS[:9]))
    again.whiten(TEXTS)
    assert [type(module) for module in again][2:] == [LinearMap, LinearMap]  # not joined over the activation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whitened_encoder_trains_in_bf16(checkpoint, tmp_path, dtype):
    encoder = load(checkpoint, dtype=dtype)
    encoder.whiten(TEXTS)
    stage = Contrastive(max_steps=2, batch_size=16, **{**FAST, "bf16": True})
    assert np.isfinite(train(encoder, stage, PAIRS, tmp_path, progress=False).history[0]["loss"])


def test_map_stays_as_it_is_in_training(checkpoint, tmp_path):
    encoder = load(checkpoint)
    encoder.whiten(TEXTS)
    before = encoder[2].linear.weight.clone()
    words = encoder.encode(TEXTS[:3])
    train(encoder, Contrastive(max_steps=3, batch_size=16, **FAST), PAIRS, tmp_path, progress=False)
    assert torch.equal(encoder[2].linear.weight, before)
    assert not np.allclose(encoder.encode(TEXTS[:3]), words, atol=1e-3)


@pytest.mark.parametrize("asked", [False, True])
def test_map_of_a_saved_encoder_is_trained_only_if_asked_for(checkpoint, tmp_path, asked):
    """After a reload it was trained along, and the same stages gave another encoder than in one run."""
    encoder = load(checkpoint)
    encoder.whiten(TEXTS)
    encoder.save_pretrained(str(tmp_path / "once"))
    load(tmp_path / "once").save_pretrained(str(tmp_path / "twice"))
    again = load(tmp_path / "twice")
    if asked:
        again[2].requires_grad_()
    train(again, Contrastive(max_steps=3, batch_size=16, **FAST), PAIRS, tmp_path / "run", progress=False)
    assert torch.equal(again[2].linear.weight, encoder[2].linear.weight) is not asked
    again.save_pretrained(str(tmp_path / "trained"))
    assert load(tmp_path / "trained")[2].frozen is not asked


def test_map_that_was_not_frozen_itself_is_not_saved_as_frozen(checkpoint, tmp_path):
    """Nor by a save in the middle of a stage, which freezes parameters for its time."""
    encoder = load(checkpoint)
    append_linear(encoder, LinearMap.empty(32, 16))
    encoder.requires_grad_(False)
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert not again[2].frozen and again[2].linear.weight.requires_grad


@pytest.mark.parametrize("saved", [None, 5, ["1"], [99], [1]])
def test_what_is_no_map_is_not_frozen(checkpoint, tmp_path, saved):
    encoder = load(checkpoint)
    encoder.whiten(TEXTS)
    encoder.save_pretrained(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "frozen_maps": saved}))
    assert not load(tmp_path / "saved")[2].frozen


def test_trained_map_of_distillation_is_trained_on_after_a_reload(checkpoint, tmp_path):
    """What is frozen is the whitening alone."""
    encoder = load(checkpoint)
    append_linear(encoder, LinearMap.empty(32, 16))
    encoder.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    train(again, Contrastive(max_steps=3, batch_size=16, **FAST), PAIRS, tmp_path / "run", progress=False)
    assert not torch.equal(again[2].linear.weight, encoder[2].linear.weight)


def test_recipe_fits_once_and_goes_on_with_the_same_map(checkpoint, tmp_path, monkeypatch):
    """A rerun takes the map that is there: made again, it may differ in its last bits."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    pairs = ({"anchor": a, "positive": p} for a, p in PAIRS)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "r.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    fits = []
    real = Whitening.fit
    monkeypatch.setattr(Whitening, "fit", lambda *a, **k: fits.append(1) or real(*a, **k))
    options = {"model": str(checkpoint), "device": "cpu", "dtype": "float32", "progress": False}
    first = run_recipe(load_recipe("r.toml"), "out", **options)
    again = run_recipe(load_recipe("r.toml"), "out", **options)
    assert fits == [1] and np.array_equal(first.encode(TEXTS), again.encode(TEXTS))
    run_recipe(load_recipe("r.toml"), "out", resume=False, **options)
    assert fits == [1, 1]
    # Regression: a map fitted to other texts or to another pooling was taken for this one's.
    shutil.rmtree(tmp_path / "out" / "stages" / "2-contrastive")
    run_recipe(load_recipe("r.toml"), "out", **options, **{"pooling": "last_token"})
    assert fits == [1] * 3
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[::-1] + TEXTS[:1]))
    shutil.rmtree(tmp_path / "out" / "stages" / "2-contrastive")
    run_recipe(load_recipe("r.toml"), "out", **options, **{"pooling": "last_token"})
    assert fits == [1] * 4
    assert json.loads((tmp_path / "out/recipe.json").read_text())["stages"][0]["kind"] == "whiten"


def test_recipe_without_data_whitens_the_texts_of_the_next_pairs(checkpoint, tmp_path):
    """Of every set and column alike, as many as asked for."""
    (tmp_path / "r.toml").write_text(
        RECIPE.replace('data = "texts.txt"', "").replace('data = "pairs.jsonl"', "")
    )
    seen = []
    real = Whitening.fit

    def watched(self, encoder, texts, **options):
        seen.extend(texts)
        return real(self, encoder, texts, **options)

    few = [(f"{a} anew", f"{p} anew") for a, p in PAIRS[:100]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Whitening, "fit", watched)
        options = {"model": str(checkpoint), "device": "cpu", "dtype": "float32", "progress": False}
        run_recipe(
            load_recipe(tmp_path / "r.toml"),
            tmp_path / "out",
            data={"contrastive": {"many": PAIRS, "few": few}},
            **options,
        )
    assert len(seen) == 200 and sum(text.endswith("anew") for text in seen) == 100
    assert sum(text in {a for a, _ in PAIRS} for text in seen) == 50


def test_borrowed_pairs_are_read_as_the_lending_stage_reads_them(checkpoint, tmp_path):
    """Its columns and its least score; whitening has no such settings of its own."""
    rows = [{"ask": a, "answer": p, "score": i % 2} for i, (a, p) in enumerate(PAIRS)]
    recipe = RECIPE.replace('data = "texts.txt"', "").replace('data = "pairs.jsonl"', "")
    (tmp_path / "r.toml").write_text(recipe.replace("max_texts = 200", "max_texts = 9999"))
    seen, real = [], Whitening.fit

    def watched(self, encoder, texts, **options):
        seen.extend(texts)
        return real(self, encoder, texts, **options)

    loaded = load_recipe(tmp_path / "r.toml")
    vars(loaded.steps[-1].settings).update(columns=("ask", "answer"), min_score=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Whitening, "fit", watched)
        options = {"model": str(checkpoint), "device": "cpu", "dtype": "float32", "progress": False}
        run_recipe(loaded, tmp_path / "out", data={"contrastive": rows}, **options)
    assert sorted(seen) == sorted(text for pair in PAIRS[1::2] for text in pair)


def test_tokens_are_weighed_before_the_map_is_fitted(checkpoint, tmp_path):
    """By the call and by a recipe, whose rerun goes on with the same vectors."""
    encoder = load(checkpoint)
    encoder.whiten(TEXTS, sif=0.01, max_texts=200)
    assert encoder.pooling == "sif" and isinstance(encoder[3], LinearMap)
    expected = load(checkpoint)
    expected.weigh_tokens(TEXTS, 0.01)
    expected.whiten(TEXTS, max_texts=200)
    assert np.array_equal(encoder.encode(TEXTS), expected.encode(TEXTS))
    (tmp_path / "r.toml").write_text(RECIPE.replace("max_texts = 200", "max_texts = 200\nsif = 0.01"))
    options = {"model": str(checkpoint), "device": "cpu", "dtype": "float32", "progress": False}
    data = {"whiten": TEXTS, "contrastive": PAIRS}
    recipe = load_recipe(tmp_path / "r.toml")
    first, again = (run_recipe(recipe, tmp_path / "out", data=data, **options) for _ in range(2))
    assert first.pooling == "sif" and np.array_equal(first.encode(TEXTS), again.encode(TEXTS))
    whitened = load(tmp_path / "out")
    assert np.array_equal(whitened.encode(TEXTS), first.encode(TEXTS))
    with pytest.raises(ValueError, match="Whitening.sif is 0"):
        Whitening(sif=0)
    plain = load(checkpoint, pooling="latent")
    before = plain.encode(TEXTS[:9])
    with pytest.raises(ValueError, match="at least as many texts; there are 9"):
        plain.whiten(TEXTS[:9], sif=0.01)
    assert plain.pooling == "latent" and np.array_equal(plain.encode(TEXTS[:9]), before)
    ending = load(checkpoint, pooling="last_token")  # whose tokenizer ends every text
    before = ending.encode(TEXTS[:9])
    with pytest.raises(ValueError, match="at least as many texts; there are 9"):
        ending.whiten(TEXTS[:9], sif=0.01)
    assert ending.pooling == "last_token" and np.array_equal(ending.encode(TEXTS[:9]), before)


def test_a_truncated_encoder_is_whitened_whole(checkpoint, tmp_path):
    """Regression: the map was fitted to the cut vectors, and got whole ones."""
    encoder = load(checkpoint)
    encoder.whiten(TEXTS)
    cut = load(checkpoint)
    cut.truncate_dim = 8
    cut.whiten(TEXTS)
    assert cut.encode("the cat").shape == (8,)
    np.testing.assert_array_equal(cut.encode(TEXTS, truncate_dim=32), encoder.encode(TEXTS))


def test_what_cannot_be_is_told(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="needs at least as many texts; there are 9"):
        load(checkpoint).whiten(TEXTS[:9])
    with pytest.raises(ValueError, match="dim is 33; the vectors have 32"):
        load(checkpoint).whiten(TEXTS, dim=33)
    with pytest.raises(ValueError, match=r"text 50 is empty"):  # by its place in the caller's list
        load(checkpoint).whiten([*TEXTS[:50], " ", *TEXTS[50:]])
    with pytest.raises(ValueError, match=r"Whitening.power is 2; it must be in \[0, 1\]"):
        Whitening(power=2)
    with pytest.raises(ValueError, match="Whitening.dim is 0"):
        Whitening(dim=0)
    (tmp_path / "r.toml").write_text(RECIPE.replace("max_texts = 200", "power = 3"))
    with pytest.raises(RecipeError, match=r"stage 1 \(whiten\): Whitening.power"):
        load_recipe(tmp_path / "r.toml")


def test_texts_that_are_all_alike_are_refused():
    """Regression: the map was NaN, and every vector with it."""
    with pytest.raises(DataError, match="whitening needs texts that differ"):
        whitening_map(np.ones((40, 4), np.float32))
