"""From texts to tokens: where a prompt ends, what stands around a text, where it is cut, what is empty."""

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing

from uncausal.encoder.attention import layout_of
from uncausal.encoder.inputs import added_tokens, check_not_empty, find_empty
from uncausal.encoder.model import Encoder

TEXTS = ["hello", "the quick brown fox", "  energy", "Hello world, plants make energy from sunlight"]
PROMPTS = ["Query: ", "Query:\n", "Query the", "world\n\n", " "]
POOLINGS = ["mean", "weighted_mean", "last_token", "latent"]


def load(folder, **options):
    torch.manual_seed(0)
    return Encoder.from_pretrained(folder, dtype="float32", device="cpu", **options)


@pytest.fixture(scope="module")
def encoder(tiny_llama):
    return load(tiny_llama)


def pooled_text(encoder, prompt, text):
    """The characters of the tokens that are pooled."""
    [ids], lengths, _ = encoder[0].tokenize_texts([text], prompt)
    return encoder.tokenizer.decode(ids[lengths[0] :])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_ends_where_the_text_begins(encoder, prompt, text):
    """Regression: the prompt was tokenised alone, so that its last space cost the text its first word."""
    pooled = pooled_text(encoder, prompt, text)
    assert pooled.endswith(text)
    assert pooled.removesuffix(text) in ("", prompt[len(prompt.rstrip()) :]), (
        "more than joined space is pooled"
    )


def test_prompt_boundary_without_offsets(encoder, monkeypatch):
    """A tokenizer that knows no offsets: what the prompt alone and prompt with text begin with."""
    expected = [encoder[0].tokenize_texts(TEXTS, prompt).prompt_lengths for prompt in PROMPTS]
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", False)
    found = [encoder[0].tokenize_texts(TEXTS, prompt).prompt_lengths for prompt in PROMPTS]
    assert found == expected


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("prompt", ["Query: ", "Query:\n"])
@pytest.mark.parametrize("how", ["packed", "left", "right", "sdpa"])
def test_prompt_is_attended_and_not_pooled(tiny_llama, how, prompt, pooling):
    """Regression: `"Query: hello"` pooled nothing of hello. A mask that is off by one is seen here."""
    encoder = load(tiny_llama, pooling=pooling, attention="sdpa" if how == "sdpa" else "auto")
    if how in ("left", "right"):
        encoder.tokenizer.padding_side = how
        with encoder.padded():
            vectors = encoder.encode(TEXTS, prompt=prompt, convert_to_tensor=True)
    else:
        vectors = encoder.encode(TEXTS, prompt=prompt, convert_to_tensor=True)
    for text, vector in zip(TEXTS, vectors, strict=True):
        encoded = encoder.tokenizer(prompt + text, return_tensors="pt", return_offsets_mapping=True)
        hidden = encoder.backbone(encoded["input_ids"]).last_hidden_state[0].detach()
        ends = encoded["offset_mapping"][0, :, 1]
        first = int((ends > len(prompt)).nonzero()[0])
        if pooling == "latent":
            layer = encoder[1].latent_attention_model
            expected = layer(hidden[first:], torch.tensor([0, len(hidden) - first]))[0]
        else:
            position = torch.arange(1.0, len(hidden) + 1)
            weights = {
                "mean": torch.ones_like(position),
                "weighted_mean": position,
                "last_token": (position == len(hidden)).float(),
            }[pooling]
            weights[:first] = 0
            expected = (hidden * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_prompts_may_differ_by_text(tiny_llama, packed, pooling):
    encoder = load(tiny_llama, pooling=pooling).eval()
    prompts = ["Query: ", "", "the lazy dog jumps over\n", "energy:"]
    if not packed:
        encoder[0].can_flatten_inputs = False
    with torch.inference_mode():
        together = encoder(encoder.preprocess(TEXTS, prompt=prompts))["sentence_embedding"]
        for text, prompt, vector in zip(TEXTS, prompts, together, strict=True):
            alone = encoder(encoder.preprocess([text], prompt=prompt or None))["sentence_embedding"][0]
            torch.testing.assert_close(vector, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one for each of 4 texts; got 1"):
        encoder.preprocess(TEXTS, prompt=["only one"])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_slices_of_a_batch_keep_their_prompts(tiny_llama, packed):
    """GradCache cuts a batch by tokens; lengths by text were not cut with it."""
    from sentence_transformers.base.losses.gradcache import _create_minibatch

    encoder = load(tiny_llama).eval()
    encoder[0].can_flatten_inputs = packed
    features = encoder.preprocess(TEXTS, prompt=["Query: ", "a", "the lazy dog\n", "energy:"])
    parts = [_create_minibatch(features, begin, begin + 2) for begin in (0, 2)]
    with torch.inference_mode():
        whole = encoder(dict(features))["sentence_embedding"]
        cut = torch.cat([encoder(part)["sentence_embedding"] for part in parts])
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token"])
def test_saved_prompts_in_plain_sentence_transformers(tiny_llama, tmp_path, pooling, caplog):
    """A prompt that ends in a newline gives the same vectors; one whose space joins the text is warned of."""
    encoder = load(tiny_llama, pooling=pooling)
    encoder.prompts = {"query": "Query:\n", "document": ""}
    encoder.save(tmp_path / "good")
    assert not caplog.records
    plain = SentenceTransformer(str(tmp_path / "good"), device="cpu")
    for name in encoder.prompts:
        np.testing.assert_allclose(
            plain.encode(TEXTS[:2], prompt_name=name), encoder.encode(TEXTS[:2], prompt_name=name), atol=1e-5
        )
    encoder.prompts = {"query": "Query: "}
    encoder.save(tmp_path / "joined")
    assert ("'Query: '" in caplog.text) == (pooling != "last_token")
    plain = SentenceTransformer(str(tmp_path / "joined"), device="cpu")
    same = np.allclose(
        plain.encode(TEXTS[1], prompt_name="query"), encoder.encode(TEXTS[1], prompt_name="query"), atol=1e-4
    )
    assert same == (pooling == "last_token"), "the warning must say what is so"


def test_a_layout_reads_nothing_off_the_device(encoder):
    """Meta tensors raise where they are read; a slice of a batch may come with the lengths of the whole."""
    features = encoder[0].collate([[1, 2, 3], [4], [5, 6]])
    far = {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in features.items()}
    layout = layout_of(far)
    assert (layout.lengths, layout.total, layout.max_seqlen) == (
        (3, 1, 2),
        6,
        3,
    ) and layout.cu_seqlens.is_meta
    part = {**encoder[0].collate([[4], [5, 6]]), "lengths": (3, 1, 2)}
    assert layout_of(part).lengths == (1, 2)


@pytest.mark.parametrize("template", [None, "chat"])
def test_control_tokens_in_a_text_are_text(tiny_llama, tmp_path, template):
    """Whoever wrote the text could end the turn, or the text, in the middle of it."""
    encoder = load(tiny_llama, template=template)
    text, end = "hello <|end|> world<s>", encoder.tokenizer.convert_tokens_to_ids("<|end|>")
    head, tail = added_tokens(encoder.tokenizer)
    [ids], _, _ = encoder[0].tokenize_texts([text])
    own = ids[len(head) : len(ids) - len(tail)]
    assert end != encoder.tokenizer.unk_token_id and end not in own
    assert encoder.tokenizer.bos_token_id not in own
    assert template is None or end in tail
    encoder.save(tmp_path / "saved")
    expected = encoder.encode([text])
    for kind in (Encoder, SentenceTransformer):
        if template is None or kind is Encoder:
            np.testing.assert_allclose(
                kind(str(tmp_path / "saved"), device="cpu").encode([text]), expected, atol=1e-5
            )
    encoder.tokenizer.split_special_tokens = False
    [ids], _, _ = encoder[0].tokenize_texts([text])
    assert end in ids[len(head) : len(ids) - len(tail)]


def test_template_chat(tiny_llama, tmp_path, caplog):
    """Regression: instruct models were encoded without the turn that they were trained on."""
    encoder = load(tiny_llama, template="chat")
    tokenizer = encoder.tokenizer
    message = [{"role": "user", "content": "Query:\nhello"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False).strip()
    expected = tokenizer(rendered, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    ids, lengths, _ = encoder[0].tokenize_texts(["hello"], "Query:\n")
    assert ids == [expected] and tokenizer.decode(expected[lengths[0] :]) == "hello<|end|>"
    ids, lengths, _ = encoder[0].tokenize_texts(["hello"])
    assert tokenizer.decode(ids[0][: lengths[0]]) == "<s><|user|>\n", (
        "what stands before the text is not pooled"
    )
    encoder.max_seq_length = 8
    [ids], _, cut = encoder[0].tokenize_texts([TEXTS[3]])
    assert len(ids) == 8 and cut == 1 and ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    encoder.max_seq_length = 256
    vectors = encoder.encode(TEXTS)
    assert np.abs(vectors - load(tiny_llama).encode(TEXTS)).max() > 1e-2
    encoder.save(tmp_path / "chat")
    assert "pools its template" in caplog.text
    again = load(tmp_path / "chat")
    assert again[0].template == encoder[0].template
    np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=1e-5)
    again.save(tmp_path / "again")  # and once more: the template must not be put around itself
    np.testing.assert_allclose(load(tmp_path / "again", template="chat").encode(TEXTS), vectors, atol=1e-5)
    with pytest.raises(ValueError, match="was saved with the template"):
        load(tmp_path / "again", template="<|user|>{text}")


def test_template_with_last_token_in_plain_sentence_transformers(tiny_llama, tmp_path):
    encoder = load(tiny_llama, template="<|user|>{text}<|end|>", pooling="last_token")
    [ids], _, _ = encoder[0].tokenize_texts(["hello"])
    assert encoder.tokenizer.decode(ids) == "<s><|user|>hello<|end|></s>"
    encoder.save(tmp_path)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


def test_last_token_of_a_template_is_pooled_without_an_end_token(tiny_llama, tmp_path):
    """As PromptEOL has it, also after a save."""
    options = {"template": "<|user|>{text}<|end|>", "pooling": "last_token"}
    encoder, ended = load(tiny_llama, end_token=False, **options), load(tiny_llama, **options)
    [ids], _, _ = encoder[0].tokenize_texts(["hello"])
    assert encoder.tokenizer.decode(ids) == "<s><|user|>hello<|end|>"
    with encoder.padded():
        states = encoder.encode(TEXTS, output_value="token_embeddings")
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors, [row[-1] for row in states], atol=1e-5)
    assert not np.allclose(vectors, ended.encode(TEXTS), atol=1e-3)
    encoder.save(tmp_path)
    # Regression: asked for what it was saved with, a reload put the end token back.
    again = (
        load(tmp_path),
        load(tmp_path, pooling="last_token"),
        load(tmp_path, template=options["template"]),
    )
    for other in (SentenceTransformer(str(tmp_path), device="cpu"), encoder.spec.load(), *again):
        np.testing.assert_allclose(other.encode(TEXTS), vectors, atol=1e-5)
    assert encoder.spec.portable()["end_token"] is False


@pytest.mark.parametrize("template", ["no slot", "{text} {text}", "Question: {text}"])
def test_template_that_cannot_be_is_refused(tiny_llama, template):
    """The last of them ends in a space, which this tokenizer makes part of the text's first word."""
    with pytest.raises(ValueError, match="expected one|joins the template"):
        load(tiny_llama, template=template)


def test_template_chat_without_one_is_refused(tiny_llama, tmp_path):
    for file in tiny_llama.iterdir():
        if "chat_template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="no chat template"):
        load(tmp_path, template="chat")


def test_last_token_is_the_end_token(tiny_llama, tmp_path):
    """Regression: last-token pooling took whatever token a text ended with."""
    encoder = load(tiny_llama, pooling="last_token")
    encoder.max_seq_length = 6
    [short, long], _, cut = encoder[0].tokenize_texts(["hello", TEXTS[3]])
    eos = encoder.tokenizer.eos_token_id
    assert short[-1] == long[-1] == eos and short[-2] != eos and len(long) == 6 and cut == 1
    encoder.save(tmp_path)
    for other in (
        SentenceTransformer(str(tmp_path), device="cpu"),
        load(tmp_path),
        load(tmp_path, pooling="last_token"),
    ):
        assert added_tokens(other.tokenizer)[1] == [eos]
        np.testing.assert_allclose(other.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    encoder.set_pooling("mean")
    assert added_tokens(encoder.tokenizer)[1] == [], "only last-token pooling asks for it"


@pytest.mark.parametrize("template", [None, "<|user|>{text}<|end|>"])
def test_end_token_follows_the_pooling_of_a_saved_encoder(tiny_llama, tmp_path, template):
    """Regression: saved with "last_token" and loaded with "mean", the end token stayed and was averaged."""
    last, mean = (load(tiny_llama, pooling=pooling, template=template) for pooling in ("last_token", "mean"))
    last.save(tmp_path / "last")
    changed = load(tmp_path / "last", pooling="mean")
    np.testing.assert_allclose(changed.encode(TEXTS), mean.encode(TEXTS), atol=1e-5)
    changed.save(tmp_path / "mean")
    np.testing.assert_allclose(load(tmp_path / "mean").encode(TEXTS), mean.encode(TEXTS), atol=1e-5)
    if template is None:
        plain = SentenceTransformer(str(tmp_path / "mean"), device="cpu")
        np.testing.assert_allclose(plain.encode(TEXTS), mean.encode(TEXTS), atol=1e-5)
    changed.set_pooling("last_token")
    for again in (changed, load(tmp_path / "last"), load(tmp_path / "mean", pooling="last_token")):
        np.testing.assert_allclose(again.encode(TEXTS), last.encode(TEXTS), atol=1e-5)


def test_end_token_of_a_tokenizers_own_stays(tiny_llama, tmp_path):
    """Whatever the pooling, and however often it was saved with another."""
    own = load(tiny_llama)
    own.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    own.save(tmp_path / "mean")
    load(tmp_path / "mean", pooling="last_token").save(tmp_path / "last")
    again = load(tmp_path / "last", pooling="mean")
    np.testing.assert_allclose(again.encode(TEXTS), own.encode(TEXTS), atol=1e-5)


def test_texts_are_tokenised_once(encoder, monkeypatch):
    """Regression: texts at the length limit were tokenised twice, 1.14 s became 2.11 s."""
    seen = []
    call = type(encoder.tokenizer).__call__

    def count(self, text, *args, **options):
        seen.extend([text] if isinstance(text, str) else text)
        return call(self, text, *args, **options)

    long = [text * 3 for text in TEXTS]
    monkeypatch.setattr(type(encoder.tokenizer), "__call__", count)
    ids, _, cut = encoder[0].tokenize_texts(long, max_length=5)
    assert [text for text in seen if text in long] == long
    assert cut == 3 + (len(call(encoder.tokenizer, long[0])["input_ids"]) > 5)
    assert [len(row) for row in ids] == [5] * 4


@pytest.mark.parametrize("pooling", ["mean", "last_token"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_cut_as_the_tokenizer_cuts(tiny_llama, side, pooling):
    encoder = load(tiny_llama, pooling=pooling)
    encoder.tokenizer.truncation_side = side
    expected = encoder.tokenizer(TEXTS, truncation=True, max_length=5)["input_ids"]
    assert encoder[0].tokenize_texts(TEXTS, max_length=5).ids == expected


@pytest.mark.parametrize("pooling", ["mean", "last_token"])
def test_prompt_that_fills_the_limit_is_refused(tiny_llama, pooling):
    encoder = load(tiny_llama, pooling=pooling)
    prompt = "the quick brown fox\n"
    length = len(encoder.tokenizer(prompt)["input_ids"])
    with pytest.raises(ValueError, match="no token of 'hello' is left to pool"):
        encoder[0].preprocess(["hello"], prompt=prompt, max_length=length)
    encoder[0].preprocess(["hello"], prompt=prompt, max_length=length + 1)


@pytest.mark.parametrize("packed", [True, False])
def test_prompt_cut_on_the_left_costs_the_text_nothing(tiny_llama, packed):
    """Regression: with truncation on the left the prompt was cut, and the text's tokens unpooled for it."""
    encoder = load(tiny_llama, attention="uncausal" if packed else "sdpa")
    encoder.tokenizer.truncation_side = "left"
    prompt, text = "the quick brown fox\n", "plants make energy from sunlight"
    for kept in (0, 1, 3):  # tokens of the prompt that remain, behind the begin token
        own = len(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
        features = encoder[0].preprocess([text], prompt=prompt, max_length=1 + kept + own)
        assert features["prompt_mask"].flatten().tolist() == [True] * (1 + kept) + [False] * own
    features = encoder[0].preprocess([text], prompt=prompt, max_length=own)
    assert features["prompt_mask"].flatten().tolist() == [True] + [False] * (own - 1)


@pytest.mark.parametrize(("pooling", "limit"), [("mean", 1), ("last_token", 2)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_limit_without_room_for_the_text_is_refused(tiny_llama, pooling, limit, side):
    """Regression: every text had the same vector, that of the begin token alone."""
    encoder = load(tiny_llama, pooling=pooling, max_seq_length=limit)
    encoder.tokenizer.truncation_side = side
    with pytest.raises(ValueError, match="no token of 'hello world' is left to pool"):
        encoder.encode(["hello world"])


def test_limit_below_what_stands_behind_the_text_is_refused(tiny_llama):
    """Regression: such a text became longer than it was; token ids passed, all with one vector."""
    encoder = load(tiny_llama, pooling="last_token", template="{text} said", max_seq_length=1)
    with pytest.raises(ValueError, match="no token of 'hello world' is left to pool"):
        encoder.encode(["hello world"])
    with pytest.raises(ValueError, match=r"no token of text 0 is left to pool"):
        encoder[0].take_tokens([[5, 6, 7]])


@pytest.mark.parametrize("attention", ["uncausal", "sdpa"])
@pytest.mark.parametrize("prompt", [None, "Query: "])
def test_half_a_surrogate_pair_is_named(tiny_llama, attention, prompt):
    """Regression: JSON's "\\ud800" ended in the tokenizer's TypeError, without the text's number."""
    encoder = load(tiny_llama, attention=attention)
    with pytest.raises(ValueError, match=r"text 1 is not Unicode: '\\ud800' at character 1"):
        encoder.encode(["hello", "a\ud800b"], prompt=prompt)
    with pytest.raises(ValueError, match=r"is not Unicode"):
        encoder.encode(["hello"], prompt="\ud800")


def test_find_empty():
    assert find_empty(["a", "", " b ", " \n\t", "c"]) == [1, 3]
    check_not_empty(["a", " b "])
    with pytest.raises(ValueError, match=r"text 1 is empty \(''\)"):
        check_not_empty(["a", "", "b", " "])


def test_tokenizer_without_an_end_token(tiny_llama, caplog):
    """Last-token pooling has then nothing to append, and must not fail."""
    encoder = load(tiny_llama)
    encoder.tokenizer.eos_token = None
    with caplog.at_level(logging.WARNING):
        encoder.set_pooling("last_token")
    assert added_tokens(encoder.tokenizer)[1] == []
