"""The server as its clients meet it: a real socket, the openai client, and answers equal to encode's bits."""

import asyncio
import base64
import contextlib
import gc
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs `pip install uncausal[serve]`")
from huggingface_hub import InferenceClient
from pydantic import ValidationError
from served import TEXTS, Server, small_encoder, small_server, wait_for

from uncausal.encoder.inputs import added_tokens
from uncausal.encoder.serving import server as server_module
from uncausal.encoder.serving.server import EmbeddingsRequest, EmbedRequest, TokenizeRequest
from uncausal.encoder.serving.service import Limits, Refused, Service


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return small_encoder(tiny_checkpoint)


@pytest.fixture(scope="module")
def server(encoder):
    with small_server(encoder) as server:
        yield server.ready()


def test_openai_client_gets_the_bits_of_encode(server, encoder):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.port}/v1")
    expected = encoder.encode(TEXTS)
    for encoding in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
        found = client.embeddings.create(model="tiny", input=TEXTS, **encoding)
        assert np.array_equal(np.float32([row.embedding for row in found.data]), expected)
    assert found.usage.prompt_tokens == sum(map(len, encoder.tokenizer(TEXTS)["input_ids"]))
    one = client.embeddings.create(model="tiny", input=TEXTS[0]).data[0].embedding
    assert np.array_equal(np.float32(one), encoder.encode(TEXTS[0]))
    cut = np.float32(client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=8).data[0].embedding)
    np.testing.assert_allclose(cut, expected[0, :8] / np.linalg.norm(expected[0, :8]), rtol=1e-5)


def test_an_encoders_own_prompt_and_dimension_hold_for_the_server(tiny_checkpoint):
    from uncausal import Encoder

    own = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    own.prompts, own.default_prompt_name, own.truncate_dim = {"all": "the king "}, "all", 8
    with Server(lambda: own) as server:
        body = server.ready().call("POST", "/v1/embeddings", {"input": TEXTS})[2]
        found = np.float32([row["embedding"] for row in body["data"]])
        assert found.shape == (4, 8) and np.array_equal(found, own.encode(TEXTS))


@pytest.mark.parametrize("dimension", [8, 32])
def test_mtebs_client_gets_the_vectors_of_encode(server, encoder, monkeypatch, dimension):
    """The wrapper that leaderboards score endpoints with; its tokenizer, which only cuts, is downloaded."""
    openai = pytest.importorskip("openai")
    wrappers = pytest.importorskip("mteb.models.model_implementations.openai_models")
    letters = SimpleNamespace(encode=list, decode="".join)
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=lambda name: letters))
    client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.port}/v1", max_retries=0)
    model = wrappers.OpenAIModel("tiny", max_tokens=100, embed_dim=dimension, client=client)
    batches = [{"text": TEXTS[:2]}, {"text": [" ", *TEXTS[2:]]}]
    found = model.encode(batches, task_metadata=None, hf_split="test", hf_subset="default")
    expected = encoder.encode(TEXTS)[:, :dimension]
    if dimension < 32:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert not found[2].any()  # of blanks, without asking
    np.testing.assert_allclose(np.delete(found, 2, axis=0), expected, rtol=1e-5)


def test_token_arrays_equal_texts(server, encoder):
    ids = encoder.tokenizer(TEXTS)["input_ids"]
    for given, expected in ((ids, encoder.encode(TEXTS)), (ids[2], encoder.encode(TEXTS[2:3]))):
        status, _, body = server.call("POST", "/v1/embeddings", {"input": given, "encoding_format": "base64"})
        found = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in body["data"]]
        assert status == 200 and np.array_equal(np.stack(found), expected)


def test_embed_similarity_tokenize_info(server, encoder):
    unit = encoder.encode(TEXTS, normalize_embeddings=True)
    _, _, found = server.call("POST", "/embed", {"inputs": TEXTS})
    np.testing.assert_allclose(found, unit, atol=1e-6)
    _, _, found = server.call("POST", "/embed", {"inputs": TEXTS, "normalize": False, "prompt_name": "query"})
    assert np.array_equal(np.float32(found), encoder.encode(TEXTS, prompt_name="query"))
    query = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    _, _, found = server.call("POST", "/similarity", {"inputs": query})
    np.testing.assert_allclose(found, unit[1:] @ unit[0], atol=1e-6)
    _, _, [tokens] = server.call("POST", "/tokenize", {"inputs": TEXTS[0]})
    assert [token["id"] for token in tokens] == encoder.tokenizer(TEXTS[0])["input_ids"]
    assert [TEXTS[0][t["start"] : t["stop"]] for t in tokens if not t["special"]] == TEXTS[0].split()
    assert server.call("GET", "/info")[2]["dimension"] == encoder.get_embedding_dimension()


def test_what_clients_of_others_send(server, encoder):
    """LiteLLM's null, Hugging Face's client that asks the root, and fields of text-embeddings-inference."""
    for path in ("/v1/embeddings", "/embeddings"):
        status, _, found = server.call("POST", path, {"input": TEXTS[0], "encoding_format": None})
        assert status == 200 and np.array_equal(
            np.float32(found["data"][0]["embedding"]), encoder.encode(TEXTS[0])
        )
    client = InferenceClient(f"http://127.0.0.1:{server.port}")
    unit = encoder.encode(TEXTS[0], normalize_embeddings=True)
    options = {"normalize": True, "truncate": True, "truncation_direction": "right"}
    np.testing.assert_allclose(client.feature_extraction(TEXTS[0], **options)[0], unit, atol=1e-6)
    status, _, answer = server.call("POST", "/embed", {"inputs": "a", "truncation_direction": "Left"})
    assert status == 422 and "texts are cut on the right, not on the Left" in answer["error"]["message"]


def test_tokenize_without_special_tokens(tiny_checkpoint):
    framed = small_encoder(tiny_checkpoint)
    framed.set_pooling("last_token")  # whose tokenizer ends every text
    with Server(lambda: framed) as server:
        asked = [{"inputs": TEXTS[0]}, {"inputs": TEXTS[0], "add_special_tokens": False}]
        [[ended], [bare]] = [server.ready().call("POST", "/tokenize", body)[2] for body in asked]
    assert ended[:-1] == bare and ended[-1]["special"] and not any(token["special"] for token in bare)


@pytest.mark.parametrize(
    "path, body, status, message",
    [
        ("/v1/embeddings", {"input": []}, 400, "empty"),
        ("/v1/embeddings", {"input": ["a", " "]}, 400, "text 1 is empty"),
        ("/v1/embeddings", {"input": "the cat", "dimensions": 9}, 400, r"dimensions 9 is none of [8]"),
        ("/v1/embeddings", {"input": "the cat", "encoding_format": "hex"}, 422, "encoding_format"),
        ("/v1/embeddings", {"input": {"text": "a"}}, 422, "input"),
        ("/v1/embeddings", {"input": [1, 2, "three"]}, 422, "input"),
        ("/v1/embeddings", {"input": [[1, 10**9]]}, 422, "token 1000000000"),
        ("/v1/embeddings", {"input": [[18]]}, 422, "token 18 is not below 18"),
        ("/v1/embeddings", {"input": [[-1]]}, 422, "input"),
        ("/v1/embeddings", {"input": ["music"] * 21}, 413, "21 texts"),
        ("/v1/embeddings", {"input": "music " * 40}, 422, "longer than 32 tokens"),
        ("/v1/embeddings", b"{", 422, "JSON"),
        ("/v1/embeddings", b"\xff\xfe", 422, ""),
        ("/v1/embeddings", {"input": "x" * 30_000}, 413, "20000 bytes"),
        ("/embed", {"inputs": "a", "prompt_name": "none"}, 422, "there is ['query'"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 422, "sentences"),
        ("/tokenize", {"inputs": []}, 400, "empty"),
        ("/tokenize", b'{"inputs": "a\\ud800"}', 422, "text 0 is not Unicode"),
    ],
)
def test_bad_requests_are_told_why(server, path, body, status, message):
    found, _, answer = server.call("POST", path, body)
    assert (found, message in answer["error"]["message"]) == (status, True), answer


def test_truncation_is_said(server, encoder):
    long = " ".join(["music"] * 40)
    status, headers, found = server.call(
        "POST", "/embed", {"inputs": [long], "truncate": True, "normalize": False}
    )
    assert status == 200 and headers["X-Truncated-Texts"] == "1"
    assert np.array_equal(np.float32(found), encoder.encode([long]))


def test_metrics_count(server):
    before = server.call("GET", "/metrics")[2]
    server.call("POST", "/embed", {"inputs": TEXTS})
    server.call("POST", "/embed", {"inputs": [" "]})
    after = server.call("GET", "/metrics")[2]

    def value(text, name):
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " "))

    assert value(after, "uncausal_queue_size") == 0
    for name, more in (
        ('uncausal_requests_total{route="/embed",status="200"}', 1),
        ("uncausal_tokenization_seconds_count", 1),
        ('uncausal_requests_total{route="/embed",status="400"}', 1),
        ("uncausal_batch_texts_sum", 4),
    ):
        assert value(after, name) - value(before, name) == more, name


def test_concurrent_clients_get_the_bits_of_encode(server, encoder):
    texts = [" ".join(TEXTS[i % 4].split()[: 1 + i % 5]) for i in range(48)]
    expected, found = encoder.encode(texts), {}

    def ask(i):
        status, _, body = server.call("POST", "/embed", {"inputs": texts[i], "normalize": False})
        found[i] = (status, np.float32(body[0]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(48)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(found[i][0] == 200 and np.array_equal(found[i][1], expected[i]) for i in range(48))


def test_what_has_no_room_is_refused_before_it_is_tokenised(encoder):
    """And a model that is no Matryoshka model is not cut, and a model that has stopped is not healthy."""
    with Server(lambda: encoder, max_waiting=2) as server:
        server.ready()
        service = server.app.state.service
        status, _, answer = server.call("POST", "/embed", {"inputs": TEXTS})  # which will never have room
        assert (status, answer["error"]["message"]) == (413, "4 texts in a request; at most 2 are taken")
        tokenize, service.tokenize, service.untokenized = service.tokenize, None, 1
        for path in ("/embed", "/tokenize"):
            status, headers, answer = server.call("POST", path, {"inputs": TEXTS[:2]})
            assert (status, headers["Retry-After"]) == (429, "1") and "full" in answer["error"]["message"]
        service.tokenize, service.untokenized = tokenize, 0
        assert server.call("POST", "/embed", {"inputs": TEXTS[:2]})[0] == 200 and service.untokenized == 0
        status, _, answer = server.call("POST", "/v1/embeddings", {"input": "two apples", "dimensions": 8})
        assert (status, "no Matryoshka model" in answer["error"]["message"]) == (400, True)
        service.batcher.close()
        for method, path, body in (("GET", "/health", None), ("POST", "/embed", {"inputs": "music"})):
            assert server.call(method, path, body)[0] == 503


def test_both_routes_cut_to_a_dimension(server, encoder):
    expected = encoder.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    for path, field in (("/embed", "inputs"), ("/v1/embeddings", "input")):
        answer = server.call("POST", path, {field: TEXTS, "dimensions": 8})[2]
        found = answer if field == "inputs" else [row["embedding"] for row in answer["data"]]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_tokenize_tells_no_more_than_it_says(server, monkeypatch):
    monkeypatch.setattr(server_module, "MOST_TOKENS_TOLD", 30)
    status, _, answer = server.call("POST", "/tokenize", {"inputs": ["river " * 16] * 2})
    assert (status, "at most 30 are told" in answer["error"]["message"]) == (413, True)
    assert server.call("POST", "/tokenize", {"inputs": "river " * 12})[0] == 200


def test_what_a_leaver_sent_is_forgotten(encoder):
    """Regression: the tokenizer's thread kept the texts of clients that had left until it came to them."""

    async def leave(service):
        texts = Texts(["river"])
        found.append(weakref.ref(texts))
        work = asyncio.ensure_future(service.in_tokenizer(1, len, texts))
        del texts
        await asyncio.sleep(0)
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    class Texts(list):
        pass

    held, found = threading.Event(), []
    service = Service(lambda: encoder, "tiny", Limits())
    service.start()
    service.tokenizing.submit(held.wait, 20)
    asyncio.run(leave(service))
    gc.collect()
    assert found[0]() is None and service.untokenized == 0
    held.set()
    service.stop()


def test_a_long_list_of_wrong_items_is_one_error():
    """Regression: two megabytes of `[]` were two million errors, gigabytes, and seconds of the event loop."""
    for model, field in ((EmbedRequest, "inputs"), (EmbeddingsRequest, "input"), (TokenizeRequest, "inputs")):
        for item in ([], [-1], {}, None):
            with pytest.raises(ValidationError) as failure:
                model.model_validate({field: [item] * 1000})
            assert failure.value.error_count() < 10
        assert getattr(model.model_validate({field: TEXTS}), field) == TEXTS
    assert EmbedRequest.model_validate({"inputs": [[1], [2, 3]]}).inputs == [[1], [2, 3]]


def test_an_empty_prompt_by_name_is_none(tiny_checkpoint):
    """Regression: the encoder's own prompt stood in its place."""
    from uncausal import Encoder

    own = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    own.prompts, own.default_prompt_name = {"all": "the king ", "document": ""}, "all"
    with Server(lambda: own) as server:
        for name in ("all", "document"):
            body = {"inputs": TEXTS, "prompt_name": name, "normalize": False}
            found = np.float32(server.ready().call("POST", "/embed", body)[2])
            assert np.array_equal(found, own.encode(TEXTS, prompt_name=name))
        status, _, answer = server.call("POST", "/embed", {"inputs": [[1, 2]], "prompt_name": "all"})
        assert status == 422 and "token arrays" in answer["error"]["message"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_arrays_are_framed_and_cut_as_texts(tiny_checkpoint, side):
    from uncausal import Encoder

    framed = Encoder.from_pretrained(
        tiny_checkpoint, device="cpu", dtype="float32", template="the king {text} home", max_seq_length=6
    )
    framed.tokenizer.truncation_side = side
    arrays = framed.tokenizer(TEXTS)["input_ids"]
    assert max(map(len, arrays)) > 6
    head, _ = added_tokens(framed.tokenizer)
    with Server(lambda: framed, auto_truncate=True) as server:
        status, _, answer = server.ready().call("POST", "/embed", {"inputs": [head]})
        assert status == 422 and "text 0 is left to pool" in answer["error"]["message"]
        assert "limit" not in answer["error"]["message"]
        found = [
            server.ready().call("POST", "/embed", {"inputs": given, "normalize": False})[2]
            for given in (TEXTS, arrays)
        ]
    assert found[0] == found[1] and np.array_equal(np.float32(found[0]), framed.encode(TEXTS))


@pytest.mark.parametrize("stage", ["tokenizer", "model"])
def test_a_client_that_leaves_frees_what_waits(encoder, stage):
    """Its texts are cancelled wherever they are, and nothing of it is told."""
    told, left = [], asyncio.Event()

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    async def leave(service, futures):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: told.append(context))
        work = asyncio.ensure_future(service.embed(SimpleNamespace(receive=receive), TEXTS))
        await asyncio.sleep(0.1)
        left.set()
        with pytest.raises(Refused) as refusal:
            await work
        assert refusal.value.status == 499 and service.untokenized == 0
        assert all(future.cancelled() for future in futures)
        del work
        gc.collect()
        await asyncio.sleep(0)

    held, futures = threading.Event(), []
    service = Service(lambda: encoder, "tiny", Limits())
    service.start()
    if stage == "tokenizer":
        service.tokenizing.submit(held.wait, 20)
    else:
        submit = service.batcher.submit
        service.batcher._vectors = lambda jobs: (held.wait(20), np.zeros((len(jobs), 2)))[1]
        service.batcher.submit([[1]])
        wait_for(lambda: service.batcher.waiting == 0)
        service.batcher.submit = lambda *a: (futures.extend(submit(*a)), futures)[1]
    asyncio.run(leave(service, futures))
    assert told == [] and len(futures) == (0 if stage == "tokenizer" else 4)
    held.set()
    service.stop()


def test_more_texts_than_may_wait_are_never_too_many_now(encoder):
    """Regression: /tokenize said to try again, and /info that so many are taken."""
    with Server(lambda: encoder, max_waiting=3) as server:
        assert server.ready().call("GET", "/info")[2]["max_client_batch_size"] == 3
        for path in ("/embed", "/tokenize"):
            status, _, answer = server.call("POST", path, {"inputs": TEXTS})
            assert status == 413 and "at most 3 are taken" in answer["error"]["message"]


def test_limits_are_checked(encoder):
    names = ("batch_tokens", "max_waiting", "max_texts", "max_bytes", "max_waiting_bytes", "body_seconds")
    for name in names:
        with pytest.raises(ValueError, match=f"{name.replace('_', ' ')} is 0; it must be above 0"):
            Limits(**{name: 0})
    with pytest.raises(ValueError, match="max waiting bytes is 9; it must not be below max bytes, 10"):
        Limits(max_bytes=10, max_waiting_bytes=9)
    for dimension in (0, -1, 4096):
        with pytest.raises(ValueError, match=f"dimension {dimension} is none that tiny has: 1 to"):
            Limits(dimensions=(dimension,)).check(encoder, "tiny")


def test_answers_503_while_loading_and_after_a_failure(encoder):
    go = threading.Event()

    def load():
        go.wait(20)
        raise OSError("no such model")

    with Server(load) as server:
        status, headers, _ = server.call("POST", "/embed", {"inputs": "music"})
        assert (status, headers["Retry-After"]) == (503, "1")
        go.set()
        wait_for(lambda: "no such model" in str(server.call("GET", "/health")[2]))
        assert server.call("GET", "/health")[0] == 503
