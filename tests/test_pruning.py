"""L3Prune: losses of all layers in one pass, the two depths, slicing, the plot."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    AutoModel,
    BioGptConfig,
    BioGptModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2Model,
    OPTConfig,
    OPTModel,
    Qwen2Config,
    Qwen2Model,
)

from uncausal.bench.families import FAMILIES, tiny_model
from uncausal.encoder import pruning
from uncausal.encoder.layers import decoder_layers, final_norm
from uncausal.encoder.model import Encoder
from uncausal.encoder.pruning import (
    Pruning,
    depth_from_fraction,
    l3prune,
    layer_losses,
    plot_layer_losses,
    prune_layers,
)

TRIPLETS = [
    ("A man is playing a guitar.", "Someone plays the guitar.", "A man is eating."),
    ("A child rides a horse.", "A young child is riding a horse.", "A horse is in the barn."),
    ("The dog runs on the beach.", "A dog is running along the sea.", "The cat sleeps."),
    ("Two women are dancing.", "A pair of women dance.", "Two women are talking."),
]


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
@pytest.mark.parametrize("columns", [2, 3])
def test_layer_losses_equal_the_loss_of_each_pruned_model(smollm2, pooling, columns):
    """One pass over all layers gives what cutting the model at each layer and encoding would."""
    options = {"bidirectional": False, "pooling": pooling, "dtype": "float32", "device": "cpu"}
    rows = [row[:columns] for row in TRIPLETS]
    losses = layer_losses(Encoder.from_pretrained(smollm2, **options), rows, show_progress_bar=False)
    assert len(losses) == 6 and len(set(losses)) == 6
    encoder = Encoder.from_pretrained(smollm2, **options)
    for depth in (6, 4, 1):
        encoder.prune(depth)
        texts = [text for column in zip(*rows, strict=True) for text in column]
        vectors = normalize(encoder.encode(texts, convert_to_tensor=True), dim=-1)
        logits = vectors[:4] @ vectors[4:].T / 0.02
        assert losses[depth - 1] == pytest.approx(cross_entropy(logits, torch.arange(4)).item(), abs=1e-4)


def test_layer_losses_cut_texts(smollm2):
    encoder = Encoder.from_pretrained(smollm2, num_layers=2, dtype="float32", device="cpu", max_seq_length=40)
    cut = layer_losses(encoder, TRIPLETS, max_length=4, show_progress_bar=False)
    assert encoder.max_seq_length == 40 and cut != layer_losses(encoder, TRIPLETS, show_progress_bar=False)
    encoder.max_seq_length = 4
    assert cut == layer_losses(encoder, TRIPLETS, max_length=9, show_progress_bar=False)


def test_rows_of_a_choice_are_drawn_from_all_of_a_set(monkeypatch, tiny_checkpoint):
    """Regression: they were the first, of a file that is often sorted by its source."""
    seen = []
    monkeypatch.setattr(
        pruning, "layer_losses", lambda encoder, rows, **options: seen.append(rows) or [2.0, 1.0]
    )
    encoder = Encoder.from_pretrained(tiny_checkpoint, device="cpu")
    pairs = [(f"anchor {i}", f"positive {i}") for i in range(100)]
    for _ in range(2):
        Pruning(triplets=20).choose(encoder, pairs)
    assert seen[0] == seen[1] and len(set(seen[0])) == 20
    assert len({int(anchor.split()[1]) // 25 for anchor, _ in seen[0]}) == 4


def test_layer_losses_average_over_batches(smollm2):
    encoder = Encoder.from_pretrained(smollm2, dtype="float32", device="cpu")
    whole = [layer_losses(encoder, TRIPLETS[i : i + 2], show_progress_bar=False) for i in (0, 2)]
    batched = layer_losses(encoder, TRIPLETS, batch_size=2, show_progress_bar=False)
    np.testing.assert_allclose(batched, np.mean(whole, axis=0), atol=1e-5)


def test_layer_losses_need_data(smollm2):
    with pytest.raises(ValueError, match="at least one"):
        layer_losses(Encoder.from_pretrained(smollm2, num_layers=1), [])


@pytest.mark.parametrize(
    ("losses", "depths"),
    [
        ([3.0, 1.0, 2.0, 2.5, 0.5, 4.0], (2, 5)),
        ([1.0, 2.0, 3.0, 4.0], (1, 3)),
        ([4.0, 3.0, 2.0, 2.0, 1.0], (2, 5)),  # an odd depth: the middle layer is in the upper half
        ([1.0, 1.0, 1.0, 1.0], (1, 3)),  # ties go to the shallower layer
        ([2.0, 1.0], (1, 2)),
    ],
)
def test_l3prune_takes_the_least_loss_of_either_half(losses, depths):
    assert l3prune(losses) == depths


def test_l3prune_needs_two_layers_and_their_losses():
    with pytest.raises(ValueError, match="at least two"):
        l3prune([1.0])
    with pytest.raises(ValueError, match="the loss after layer 3 is nan"):  # which nothing is below
        l3prune([2.0, 1.0, math.nan, 0.5])


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0},
        {"keep": -1},
        {"keep": "half"},
        {"drop": 1.0},
        {"temperature": 0.0},
        {"triplets": 0},
        {"max_length": 0},
    ],
)
def test_impossible_pruning_is_refused_before_anything_is_trained(settings):
    with pytest.raises(ValueError, match=f"Pruning.{next(iter(settings))} is"):
        Pruning(**settings)


@pytest.mark.parametrize(
    ("layers", "fraction", "kept"), [(32, 0.22, 24), (30, 0.0, 30), (10, 0.3, 7), (3, 0.99, 1)]
)
def test_depth_from_fraction(layers, fraction, kept):
    assert depth_from_fraction(layers, fraction) == kept


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 30])
def test_depth_from_fraction_refuses(fraction):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        depth_from_fraction(30, fraction)


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
MODELS = {
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SMALL, num_hidden_layers=6, intermediate_size=32)),
    "gemma3": lambda: Gemma3TextModel(
        Gemma3TextConfig(**SMALL, num_hidden_layers=6, intermediate_size=32, head_dim=8, sliding_window=4)
    ),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=6, n_head=2)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("depth", [1, 4])
def test_pruned_model_saves_and_loads(name, depth, tmp_path):
    """Regression: `layer_types` kept its old length, and the configuration could not be saved."""
    model = MODELS[name]().eval()
    ids = torch.tensor([[3, 7, 11, 2]])
    layers = decoder_layers(model)
    states = []
    handle = layers[depth - 1].register_forward_hook(
        lambda _m, _i, out: states.append(out if torch.is_tensor(out) else out[0])
    )
    with torch.inference_mode():
        model(ids)
        expected = final_norm(model)(states[0])
    handle.remove()
    prune_layers(model, depth)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).last_hidden_state, expected)
    assert again.config.num_hidden_layers == depth
    assert len(getattr(again.config, "layer_types", None) or range(depth)) == depth


@pytest.mark.parametrize("depth", [0, 7, -1])
def test_prune_layers_refuses_an_impossible_depth(depth):
    with pytest.raises(ValueError, match="the model has 6"):
        prune_layers(MODELS["qwen2"](), depth)


def test_one_pair_decides_no_depth(byte_llama):
    """Regression: its loss is 0 after every layer, and the model was cut to half without a word."""
    encoder = Encoder.from_pretrained(byte_llama, dtype="float32", device="cpu")
    for pairs, size in (([("a cat", "the cat")], 64), ([("a cat", "the cat"), ("a dog", "the dog")], 1)):
        with pytest.raises(ValueError, match="a batch of one pair has no negative"):
            layer_losses(encoder, pairs, batch_size=size, show_progress_bar=False)
    assert min(layer_losses(encoder, [("a cat", "the cat", "a road")], show_progress_bar=False)) > 0


def test_plot_shows_both_choices(tmp_path):
    losses = [3.0, 1.0, 2.0, 2.5, 0.5, 4.0]
    plot_layer_losses(losses, l3prune(losses), tmp_path / "curve.png", kept=3)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("family", ["minicpm3", "gpt_neo"])
def test_depth_that_the_configuration_counts_otherwise(family, tmp_path):
    """Regression: a pruned MiniCPM3 came back with other residuals, and a GPT-Neo not at all."""
    known = {"attention_types": [[["global", "local"], 2]]} if family == "gpt_neo" else {}
    model = tiny_model(family, **{**FAMILIES.get(family, {}), "num_hidden_layers": 4, **known})
    ids = torch.tensor([[3, 7, 11, 2]])
    prune_layers(model, 3)
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
        torch.testing.assert_close(again(input_ids=ids).last_hidden_state, expected)
    assert len(decoder_layers(again)) == 3


def test_layers_that_share_a_matrix_are_not_cut():
    model = tiny_model("gemma3n_text", **FAMILIES["gemma3n_text"])
    depth = len(decoder_layers(model))
    prune_layers(model, depth)
    with pytest.raises(ValueError, match="has embeddings of every layer in one matrix"):
        prune_layers(model, depth - 1)
    assert len(decoder_layers(model)) == depth


def test_final_norm_by_another_name_and_without_one():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    bio = BioGptModel(BioGptConfig(**sizes, intermediate_size=32))
    assert final_norm(bio) is bio.layer_norm
    opt = OPTModel(OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16, do_layer_norm_before=False))
    assert opt.decoder.final_layer_norm is None and isinstance(final_norm(opt), torch.nn.Identity)
