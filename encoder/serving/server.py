"""An encoder behind HTTP: OpenAI's /v1/embeddings, text-embeddings-inference's /embed and friends, /metrics.

Every vector is what `Encoder.encode` returns for the text, but for int8, whose inputs share a scale a batch,
and mixtures of experts, in the last digits.
Here stand the routes; what a request passes before them is in guard.py, the work is done in service.py and
batcher.py.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Route

import uncausal
from uncausal.encoder.inputs import check_unicode
from uncausal.encoder.serving.guard import Guard, refusal_of
from uncausal.encoder.serving.service import Encoded, Limits, Refused, Service

# Without `fail_fast` every item of a long list would be an error of every kind of input. The event loop
# checks them: no more than it does in a moment. A list of token ids is one text.
MOST_ITEMS, MOST_TOKENS_TOLD = 65_536, 65_536
Texts = Annotated[list[StrictStr], Field(fail_fast=True, max_length=MOST_ITEMS)]
Tokens = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Input = StrictStr | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True, max_length=MOST_ITEMS)]


class EmbeddingsRequest(BaseModel):
    """OpenAI's."""

    input: Input
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: StrictInt | None = None


class EmbedRequest(BaseModel):
    """text-embeddings-inference's."""

    inputs: Input
    truncate: StrictBool | None = None
    truncation_direction: StrictStr | None = None
    normalize: StrictBool = True
    prompt_name: StrictStr | None = None
    dimensions: StrictInt | None = None


class SimilarityInputs(BaseModel):
    source_sentence: StrictStr
    sentences: Annotated[Texts, Field(min_length=1)]


class SimilarityRequest(BaseModel):
    """text-embeddings-inference's."""

    inputs: SimilarityInputs


class TokenizeRequest(BaseModel):
    """text-embeddings-inference's."""

    inputs: StrictStr | Texts
    add_special_tokens: StrictBool = True


def cut_vectors(vectors: np.ndarray, dimensions: int | None, normalize: bool = False) -> np.ndarray:
    """Keep the first dimensions; cut vectors, and all if asked, are scaled to length 1."""
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    if normalize or dimensions is not None:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def answer(content: Any, encoded: Encoded | None = None) -> Response:
    headers = {"X-Truncated-Texts": str(encoded.truncated)} if encoded and encoded.truncated else None
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json", headers=headers)


def make_app(load: Callable[[], Any], name: str, limits: Limits | None = None) -> FastAPI:
    """Return the ASGI application.

    Args:
        load: returns the `Encoder` to serve; called once, in a thread.
        name: the model's, in answers.
        limits: what is taken.
    """
    limits = limits or Limits()
    service = Service(load, name, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=service.start, name="loader", daemon=True).start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="uncausal", version=uncausal.__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service

    @app.exception_handler(Refused)
    async def refused(request: Request, refusal: Refused) -> Response:
        return refusal_of(refusal)

    @app.exception_handler(StarletteHTTPException)
    async def unknown(request: Request, error: StarletteHTTPException) -> Response:
        return refusal_of(Refused(error.status_code, str(error.detail)), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return refusal_of(Refused(422, f"{where}: {first['msg']}" if where else first["msg"]))

    @app.post("/embeddings")  # text-embeddings-inference's own name
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        service.ready()
        dimensions = service.checked_dimensions(body.dimensions)
        encoded = await service.embed(request, body.input)
        vectors = cut_vectors(encoded.vectors, dimensions)
        as_text = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(v.astype("<f4").tobytes()).decode() if as_text else v,
            }
            for i, v in enumerate(vectors)
        ]
        usage = {"prompt_tokens": encoded.tokens, "total_tokens": encoded.tokens}
        return answer({"object": "list", "data": data, "model": name, "usage": usage}, encoded)

    @app.post("/")  # where Hugging Face's InferenceClient sends to
    @app.post("/embed")
    async def embed(body: EmbedRequest, request: Request) -> Response:
        service.ready()
        side = service.encoder.tokenizer.truncation_side
        if (body.truncation_direction or side).lower() != side:
            raise Refused(422, f"texts are cut on the {side}, not on the {body.truncation_direction}")
        dimensions = service.checked_dimensions(body.dimensions)
        prompt = None
        if body.prompt_name is not None:
            prompts = service.encoder.prompts
            if body.prompt_name not in prompts:
                raise Refused(422, f"no prompt {body.prompt_name!r}; there is {sorted(prompts)}")
            if not isinstance(body.inputs, str) and not isinstance(next(iter(body.inputs), ""), str):
                raise Refused(422, "prompt_name stands before texts; token arrays are taken as they are")
            prompt = prompts[body.prompt_name] or ""  # None would be the encoder's own
        encoded = await service.embed(request, body.inputs, prompt=prompt, truncate=body.truncate)
        return answer(cut_vectors(encoded.vectors, dimensions, body.normalize), encoded)

    @app.post("/similarity")
    async def similarity(body: SimilarityRequest, request: Request) -> Response:
        encoded = await service.embed(request, [body.inputs.source_sentence, *body.inputs.sentences])
        unit = cut_vectors(encoded.vectors, None, normalize=True)
        return answer(unit[1:] @ unit[0], encoded)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.ready()
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        if not texts:
            raise Refused(400, "the input is empty")
        try:
            check_unicode(texts)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        if len(texts) > limits.most_texts:
            raise Refused(413, f"{len(texts)} texts in a request; at most {limits.most_texts} are taken")
        special = body.add_special_tokens
        told = await service.in_tokenizer(len(texts), _tokens, service.encoder.tokenizer, texts, special)
        return Response(told, media_type="application/json")

    @app.get("/info")
    async def info() -> Response:
        batcher = service.ready()
        return answer(
            {
                "model_id": name,
                "model_dtype": str(service.encoder.backbone.dtype).removeprefix("torch."),
                "model_type": {"embedding": {"pooling": service.encoder.pooling}},
                "dimension": service.encoder.get_embedding_dimension(),
                "dimensions": sorted(limits.dimensions),
                "max_input_length": service.encoder.max_seq_length,
                "max_batch_tokens": batcher.batch_tokens,
                "max_client_batch_size": limits.most_texts,
                "auto_truncate": limits.auto_truncate,
                "version": uncausal.__version__,
            }
        )

    @app.get("/v1/models")
    async def models() -> Response:
        return answer({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "uncausal"}]})

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        service.ready()
        return answer({"status": "ok"})

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    methods = {route.path: route.methods or set() for route in app.routes if isinstance(route, Route)}
    app.add_middleware(Guard, service=service, methods=methods)
    return app


def _tokens(tokenizer: Any, texts: Sequence[str], special_tokens: bool) -> bytes:
    """What /tokenize answers; it holds no event loop, and is bounded, as nothing is cut here."""
    if not tokenizer.is_fast:
        raise Refused(422, "this model's tokenizer does not tell where in the text its tokens are")
    told = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    encoded = tokenizer(list(texts), add_special_tokens=special_tokens, **told)
    total = sum(map(len, encoded["input_ids"]))
    if total > MOST_TOKENS_TOLD:
        raise Refused(413, f"{total} tokens in a request; at most {MOST_TOKENS_TOLD} are told")
    columns = ("input_ids", "offset_mapping", "special_tokens_mask")
    return orjson.dumps(
        [
            [
                {"id": i, "text": text[a:b], "special": bool(special), "start": a, "stop": b}
                for i, (a, b), special in zip(*row, strict=True)
            ]
            for text, *row in zip(texts, *(encoded[name] for name in columns), strict=True)
        ]
    )
