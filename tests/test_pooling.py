"""Packed pooling against sentence-transformers' own on padded states, and the latent attention module."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as library
from tiny import TEXTS, load, save_checkpoint
from transformers import LlamaConfig, LlamaModel

from uncausal import layer_losses
from uncausal.encoder.pooling import LatentPooling, Pooling, TokenWeights, pool_packed
from uncausal.encoder.training.checkpoints import describe_encoder
from uncausal.kernels.latent_pooling import LatentAttentionPooling

LENGTHS = [[7], [1, 64, 5], [31, 2, 1, 129]]
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def packed_and_padded(lengths, dtype, side="right"):
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randn(n, 24, generator=generator, dtype=torch.float64).to(dtype) for n in lengths]
    padded = torch.full((len(rows), max(lengths), 24), 7.0, dtype=dtype)  # padding that would show in any sum
    mask = torch.zeros(padded.shape[:2], dtype=torch.long)
    for row, (values, n) in enumerate(zip(rows, lengths, strict=True)):
        span = slice(0, n) if side == "right" else slice(max(lengths) - n, None)
        padded[row, span], mask[row, span] = values, 1
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat(rows), cu_seqlens, padded, mask


@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pool_packed_equals_padded(mode, dtype, side, lengths):
    hidden, cu_seqlens, padded, mask = packed_and_padded(lengths, dtype, side)
    features = {"token_embeddings": padded, "attention_mask": mask}
    expected = library.Pooling(24, mode)(features)["sentence_embedding"]
    actual = pool_packed(hidden, cu_seqlens, mode)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=BOUND[dtype], atol=BOUND[dtype])


@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken"])
def test_pool_packed_without_prompt(mode):
    hidden, cu_seqlens, padded, mask = packed_and_padded([9, 4, 30], torch.float64)
    features = {"token_embeddings": padded, "attention_mask": mask, "prompt_length": 3}
    expected = library.Pooling(24, mode, include_prompt=False)(features)["sentence_embedding"]
    torch.testing.assert_close(pool_packed(hidden, cu_seqlens, mode, 3), expected)
    each = pool_packed(hidden, cu_seqlens, mode, torch.tensor([0, 3, 29]))
    torch.testing.assert_close(each[1], expected[1])
    torch.testing.assert_close(each[2], hidden[-1])


def test_pool_packed_gradient():
    hidden, cu_seqlens, _, _ = packed_and_padded([3, 1, 5], torch.float64)
    hidden.requires_grad_()
    for mode in ("mean", "weightedmean", "lasttoken"):
        assert torch.autograd.gradcheck(lambda h, mode=mode: pool_packed(h, cu_seqlens, mode, 0), hidden)


def test_pool_packed_names_the_empty_sequence():
    hidden = torch.randn(5, 4)
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        pool_packed(hidden, torch.tensor([0, 3, 3, 5]), "lasttoken")
    with pytest.raises(ValueError, match="sequence 1 has no token.*2 tokens, 2 of them prompt"):
        pool_packed(hidden, torch.tensor([0, 3, 5]), "mean", 2)
    with pytest.raises(ValueError, match="from 0 to 5"):
        pool_packed(hidden, torch.tensor([0, 3]), "mean")
    with pytest.raises(ValueError, match="mode"):
        pool_packed(hidden, torch.tensor([0, 5]), "middle")


@pytest.mark.parametrize("form", ["packed", "right", "left"])
@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken", "cls", "max"])
def test_pooling_with_a_prompt_of_its_own_for_every_text(form, mode):
    """sentence-transformers' Pooling took the first text's prompt length for all."""
    hidden, cu_seqlens, padded, mask = packed_and_padded([9, 4, 30], torch.float64, form)
    prompts = [3, 0, 29] if mode in ("mean", "weightedmean", "lasttoken") else [3, 3, 3]
    rows = [hidden[i:j] for i, j in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    position = torch.cat([torch.arange(len(row)) for row in rows])
    lengths = torch.tensor(prompts).repeat_interleave(cu_seqlens.diff())
    pooling = Pooling(24, mode, include_prompt=False)
    if form == "packed":
        features = {"token_embeddings": hidden[None], "cu_seq_lens_q": cu_seqlens}
        features["prompt_mask"] = (position < lengths)[None]
    else:
        features = {"token_embeddings": padded, "attention_mask": mask}
        before = (mask.cumsum(1) - 1) < torch.tensor(prompts)[:, None]
        features["prompt_mask"] = before & mask.bool()
    got = pooling(features)["sentence_embedding"]
    for row, skipped, vector in zip(rows, prompts, got, strict=True):
        alone = {"token_embeddings": row[None], "attention_mask": torch.ones(1, len(row))}
        expected = library.Pooling(24, mode, include_prompt=False)({**alone, "prompt_length": skipped})
        torch.testing.assert_close(vector, expected["sentence_embedding"][0])
    kept = Pooling(24, mode)(dict(features))["sentence_embedding"]
    assert mode == "lasttoken" or not torch.allclose(kept, got), "include_prompt=True pools the prompt"


def test_pooling_of_prompts_that_has_no_packed_form():
    hidden, cu_seqlens, _, _ = packed_and_padded([9, 4], torch.float64)
    mask = torch.zeros(1, 13, dtype=torch.bool)
    mask[0, :2] = True
    features = {"token_embeddings": hidden[None], "cu_seq_lens_q": cu_seqlens, "prompt_mask": mask}
    with pytest.raises(NotImplementedError, match="'max' takes one length of prompt"):
        Pooling(24, "max", include_prompt=False)(features)


SMALL: Any = {"num_latents": 8, "num_heads": 2, "mlp_ratio": 2}


def tiny_llama() -> Any:
    torch.manual_seed(0)
    sizes: Any = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaModel(LlamaConfig(vocab_size=100, **sizes)).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", ["mean", "weightedmean"])
def test_latent_pooling_reads_packed_and_padded(side, mode):
    pooling = LatentPooling(24, mode, include_prompt=False, layer=SMALL).double().eval()
    hidden, cu_seqlens, padded, mask = packed_and_padded([5, 4, 30], torch.float64, side)
    rows = [hidden[i:j] for i, j in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    layer = pooling.latent_attention_model
    for prompt in (0, 3):
        position = [torch.arange(prompt, len(r)) + 1.0 if mode == "weightedmean" else None for r in rows]
        want = [
            layer(row[prompt:], torch.tensor([0, len(row) - prompt]), token_weights=weight)
            for row, weight in zip(rows, position, strict=True)
        ]
        extra: Any = {"prompt_length": torch.tensor([prompt])} if prompt else {}
        for states in (hidden, hidden[None]):
            features = {"token_embeddings": states, "cu_seq_lens_q": cu_seqlens, **extra}
            torch.testing.assert_close(pooling(features)["sentence_embedding"], torch.cat(want))
        features = {"token_embeddings": padded, "attention_mask": mask, **extra}
        torch.testing.assert_close(pooling(features)["sentence_embedding"], torch.cat(want))


def test_latent_pooling_released_prompt_mask():
    """The released mask forgets the begin token, so that the prompt's last token is pooled."""
    hidden, cu_seqlens, _, _ = packed_and_padded([9, 4], torch.float64)
    exact = LatentPooling(24, include_prompt=False, layer=SMALL).double()
    released = LatentPooling(24, include_prompt=False, released_prompt_mask=True, layer=SMALL).double()
    released.load_state_dict(exact.state_dict())
    features = {"token_embeddings": hidden, "cu_seq_lens_q": cu_seqlens}
    want = exact({**features, "prompt_length": 2})["sentence_embedding"]
    torch.testing.assert_close(released({**features, "prompt_length": 3})["sentence_embedding"], want)


def test_latent_pooling_names_the_sequence_that_is_all_prompt():
    pooling = LatentPooling(24, include_prompt=False, layer=SMALL)
    hidden, cu_seqlens, _, _ = packed_and_padded([9, 3], torch.float32)
    with pytest.raises(ValueError, match="sequence 1 has no token.*3 of them prompt"):
        pooling({"token_embeddings": hidden, "cu_seq_lens_q": cu_seqlens, "prompt_length": 3})


def test_latent_pooling_saves_and_loads(tmp_path):
    pooling = LatentPooling(24, "weightedmean", include_prompt=False, layer={**SMALL, "activation": "gelu"})
    pooling.save(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = LatentPooling.load(str(tmp_path))
    hidden, cu_seqlens, _, _ = packed_and_padded([9, 3], torch.float32)
    features = {"token_embeddings": hidden, "cu_seq_lens_q": cu_seqlens, "prompt_length": 1}
    got = again(dict(features))["sentence_embedding"]
    torch.testing.assert_close(got, pooling(dict(features))["sentence_embedding"], rtol=0, atol=0)
    (tmp_path / "model.safetensors").unlink()
    torch.save(pooling.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing is unpickled"):
        LatentPooling.load(str(tmp_path))


def test_five_lines_on_any_transformers_model():
    ids, mask = torch.randint(0, 100, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, 5:] = 0
    model = tiny_llama()
    pooling = LatentAttentionPooling(model.config.hidden_size, num_latents=16, num_heads=2)
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    vectors = F.normalize(pooling(hidden, attention_mask=mask), dim=-1)
    vectors.square().sum().backward()

    ids[0, 5:] = 0  # what is masked plays no part
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(F.normalize(pooling(hidden, attention_mask=mask), dim=-1), vectors)
    assert pooling.latents.grad is not None and model.embed_tokens.weight.grad is not None


def test_latent_pooling_trains_under_lora():
    """A bf16 backbone with adapters learns together with a layer whose latents stay in fp32."""
    backbone = get_peft_model(
        tiny_llama().to(torch.bfloat16), LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    pooling = LatentPooling(24, layer=SMALL)
    trained = [p for p in [*backbone.parameters(), *pooling.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(0, 100, (4, 10), generator=torch.Generator().manual_seed(0))
    target, losses, latents = F.normalize(torch.randn(4, 24), dim=-1), [], pooling.state_dict()
    before = {name: value.clone() for name, value in latents.items()}
    for _ in range(20):
        features = {"token_embeddings": backbone(input_ids=ids).last_hidden_state, "attention_mask": ids >= 0}
        vectors = F.normalize(pooling(features)["sentence_embedding"].float(), dim=-1)
        loss = (vectors - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.dtype == torch.float32 for p in pooling.parameters())
    moved = [name for name, value in pooling.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == list(before)
    assert any(p.abs().sum() > 0 for n, p in backbone.named_parameters() if "lora_B" in n)


WORDS = ["the cat sat on the mat", "the dog", "a cat and the dog and the bird", "one"]


def test_sif_weighs_a_token_by_its_share_of_the_texts(tmp_path):
    encoder = load(save_checkpoint(tmp_path))
    encoder.transformer.frame("{text} _", end=True)  # what is added to a text is pooled, and counts
    ids = [encoder.tokenizer(text)["input_ids"] for text in WORDS]
    assert encoder.tokenizer.convert_ids_to_tokens(ids[0][-2:]) == ["_", "</s>"]
    flat = [token for row in ids for token in row]
    module = TokenWeights.sif(encoder.tokenizer, WORDS, a=0.01)
    weights = module({"input_ids": torch.arange(len(encoder.tokenizer))})["token_weights"]
    for token in (*set(flat), *(set(range(len(encoder.tokenizer))) - set(flat))):
        share = (flat.count(token) or 0.5) / len(flat)
        assert weights[token].item() == pytest.approx(0.01 / (0.01 + share))
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_sif_pooling_is_the_weighed_mean_packed_padded_and_saved(tmp_path):
    """A prompt is left out, and plain sentence-transformers makes the same vectors of the saved encoder."""
    encoder = load(save_checkpoint(tmp_path / "causal"))
    with encoder.padded():
        states = encoder.encode(WORDS, output_value="token_embeddings")
    before = encoder.encode(WORDS)
    encoder.weigh_tokens(WORDS, a=0.01)
    assert encoder.pooling == "sif"
    rows = [torch.tensor(encoder.tokenizer(text)["input_ids"]) for text in WORDS]
    weights = [encoder[1]({"input_ids": row})["token_weights"] for row in rows]
    expected = torch.stack([(w[:, None] * s).sum(0) / w.sum() for w, s in zip(weights, states, strict=True)])
    vectors = encoder.encode(WORDS)
    assert not np.allclose(vectors, before, atol=1e-3)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    with encoder.padded():
        np.testing.assert_allclose(encoder.encode(WORDS), vectors, atol=1e-5)
        told = encoder.encode(WORDS, prompt="say: ")
    np.testing.assert_allclose(encoder.encode(WORDS, prompt="say: "), told, atol=1e-5)
    encoder.save_pretrained(str(tmp_path / "saved"))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "saved")).encode(WORDS), vectors, atol=1e-5)
    again = load(tmp_path / "saved")
    assert again.pooling == "sif" and np.array_equal(again.encode(WORDS), vectors)
    with pytest.raises(ValueError, match="pooling 'typo' is unknown"):
        again.set_pooling("typo")
    assert again.pooling == "sif"
    again.set_pooling("mean")
    assert [type(module) for module in list(again)[1:]] == [Pooling] and np.array_equal(
        again.encode(WORDS), before
    )


def test_sif_in_half_precision_is_saved_and_said(tmp_path, caplog):
    """The weights stay float32, a reload has the same bits, and plain sentence-transformers needs float32."""
    encoder = load(save_checkpoint(tmp_path / "causal"), dtype="bfloat16")
    encoder.whiten([f"{a} {b}" for a in WORDS for b in TEXTS[:30]], sif=0.01)
    assert encoder[1].emb_layer.weight.dtype == torch.float32
    vectors = encoder.encode(WORDS)
    encoder.prompts["query"] = "say: "
    encoder.save_pretrained(str(tmp_path / "saved"))
    assert (
        "token weights need the encoder in float32" in caplog.text and "a prompt are shorter" in caplog.text
    )
    assert np.array_equal(load(tmp_path / "saved", dtype="bfloat16").encode(WORDS), vectors)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu", model_kwargs={"dtype": "float32"})
    exact = load(tmp_path / "saved").encode(WORDS)
    np.testing.assert_allclose(plain.encode(WORDS), exact, atol=1e-4)
    assert len((tmp_path / "saved" / "README.md").read_text()) < 20_000 and "TokenWeights(" in repr(encoder)
    assert '"bird"' not in json.dumps(describe_encoder(encoder)["modules"])
    with pytest.raises(ValueError, match="SIF's a is 0; it must be above 0"):
        encoder.weigh_tokens(WORDS, a=0)


def test_layer_losses_weigh_tokens_too(tmp_path):
    """The last layer's loss is that of the encoder's own vectors."""
    encoder = load(save_checkpoint(tmp_path))
    pairs = [(a, f"{a} again") for a in WORDS]
    plain = layer_losses(encoder, pairs, show_progress_bar=False)
    encoder.weigh_tokens(WORDS, a=0.01)
    a, b = (F.normalize(torch.from_numpy(encoder.encode(list(x))), dim=1) for x in zip(*pairs, strict=True))
    expected = F.cross_entropy(a @ b.T / 0.02, torch.arange(len(pairs)))
    losses = layer_losses(encoder, pairs, show_progress_bar=False)
    assert losses[-1] == pytest.approx(float(expected), abs=1e-3) and losses != plain
