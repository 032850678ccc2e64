"""Commands that use an encoder: encode, search."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from uncausal.encoder.cli.options import Json, Loading, check_writable, require

if TYPE_CHECKING:
    from uncausal.encoder.model import Encoder


def encode(
    model: Positional[str],
    input: Positional[str],
    output: Positional[str],
    /,
    *,
    column: str = "text",
    prompt: str | None = None,
    batch_tokens: int | None = None,
    dimension: int | None = None,
    normalize: bool = False,
    id_column: str | None = None,
    rows_per_shard: int | None = None,
    vector_dtype: Literal["float32", "float16", "int8"] | None = None,
    shard: Annotated[str | None, arg(metavar="I/N")] = None,
    engine: Literal["local", "ray"] = "local",
    workers: int = 1,
    gpus: float = 0,
    int8: bool = False,
    loading: Loading = Loading(),
) -> None:
    """Write one vector per text.

    Args:
        model: encoder folder, or anything `convert` takes.
        input: text, JSONL, CSV, TSV or Parquet file, a pattern of them in quotes ("parts/*.jsonl.gz"), or a
            dataset of the hub; - is stdin.
        output: file to write: .npy, or .parquet with the texts beside them; or a folder, for a corpus larger
            than memory, of Parquet shards that an interrupted run goes on from.
        column: field that holds the text.
        prompt: instruction put before every text; attended, not pooled.
        batch_tokens: tokens a batch; by default as many as suit the device.
        dimension: keep the first so many numbers of a vector (Matryoshka).
        normalize: scale vectors to length 1.
        id_column: into a folder: field that holds the id; by default ids are row numbers.
        rows_per_shard: into a folder: rows a shard, 10000 by default.
        vector_dtype: into a folder: type of the numbers, float32 by default; int8 has a scale a vector.
        shard: into a folder: encode every N-th shard, from the I-th, so that N processes share the work.
        engine: into a folder: ray takes Ray Data, on the cluster of RAY_ADDRESS or on this machine.
        workers: with ray: models at work at a time.
        gpus: with ray: GPUs of each worker.
        int8: int8 weights, on a CPU: faster, less exact.
    """
    file, suffix = Path(output), Path(output).suffix
    into_folder = output.endswith("/") or not suffix
    if not into_folder and suffix not in (".npy", ".parquet"):
        raise ValueError(f"{output}: the output is .npy, .parquet or a folder, not {suffix!r}")
    given: dict[str, Any] = {"id_column": id_column, "rows_per_shard": rows_per_shard}
    given |= {"dtype": vector_dtype, "shard": shard, "engine": None if engine == "local" else engine}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not into_folder:
        name = "vector_dtype" if next(iter(given)) == "dtype" else next(iter(given))
        raise ValueError(f"--{name.replace('_', '-')} is for a folder of shards: end the output in /")
    turn = shard_of(given.pop("shard", "0/1"))
    if given.pop("engine", None):
        if turn != (0, 1):
            raise ValueError("--shard is for --engine local: Ray shares the work out by itself")
        if input == "-":
            raise ValueError(
                "--engine ray reads files: a reader that Ray starts anew cannot go back in stdin"
            )
    if engine == "local" and (workers, gpus) != (1, 0):
        raise ValueError("--workers and --gpus are for --engine ray; --shard I/N shares the work by itself")
    check_writable(file, folder=into_folder)
    shown = sys.stderr.isatty()
    if into_folder:
        from uncausal.encoder.serving.corpus import CorpusSettings, corpus_rows, encode_corpus

        same = {
            "dimension": dimension,
            "normalize": normalize,
            "prompt": prompt,
            "batch_tokens": batch_tokens,
        }
        settings = CorpusSettings(column=column, **same, **given)  # pyright: ignore[reportArgumentType]
        read_again, load_again = partial(corpus_rows, input, settings), partial(load, model, loading, int8)
        if engine == "ray":
            require("ray", "ray", "--engine ray")
            from uncausal.encoder.serving.ray import encode_corpus_on_ray

            pool: Any = {"workers": workers, "gpus": gpus, "show_progress_bar": shown}
            done = encode_corpus_on_ray(load_again, read_again, file, settings, **pool)
        else:
            encoder, rows = load_again(), read_again()
            done = encode_corpus(encoder, rows, file, settings, shard=turn, show_progress_bar=shown)
        print(
            f"{output}: {done.encoded} vectors written, {done.found} found done, {done.shards} shards in all",
            file=sys.stderr,
        )
        return
    from uncausal.encoder.inputs import check_finite

    texts = read(input, column, skip_empty=False)
    encoder = load(model, loading, int8)
    width = encoder.get_embedding_dimension() or 0
    if dimension is not None and not 1 <= dimension <= width:
        raise ValueError(f"--dimension is {dimension}; {model} has the dimensions 1 to {width}")
    vectors = encoder.encode(
        texts,
        prompt=prompt,
        batch_tokens=batch_tokens,
        truncate_dim=dimension,
        normalize_embeddings=normalize,
        show_progress_bar=shown,
    )
    check_finite(vectors, texts)
    write_vectors(file, texts, vectors)
    print(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers", file=sys.stderr)


def shard_of(text: str) -> tuple[int, int]:
    """Read I/N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise ValueError(f"--shard takes I/N, for example 0/4, not {text!r}")
    return int(found[1]), int(found[2])


def load(model: str, loading: Loading, int8: bool) -> Encoder:
    encoder = loading.load(model)
    if int8:
        encoder.quantize()
    return encoder


def write_vectors(output: Path, texts: list[str], vectors: Any) -> None:
    """Write the vectors, whole or not at all."""
    import numpy as np

    from uncausal.encoder.files import staged_file

    with staged_file(output) as file:
        if output.suffix == ".npy":
            np.save(file, vectors)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            pq.write_table(pa.table({"text": texts, "embedding": embedding}), file)


def search(
    target: Positional[str],
    rest: Positional[tuple[str, ...]],
    /,
    *,
    model: str | None = None,
    within: str | None = None,
    column: str = "text",
    prompt: str | None = None,
    top_k: int = 5,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Find the texts, or passages of an index, nearest to a query.

    Args:
        target: index that `uncausal index` wrote; or a model, to search the texts of a file.
        rest: one or more queries; after a model, first the file that holds the texts (- is stdin).
        model: of an index: what encodes the queries, by default the model that the index was made with,
            loaded as it was then.
        within: of an index: only files whose path fits this pattern, for example "*.md".
        column: of a file: field that holds the text.
        prompt: instruction put before the queries.
        top_k: hits a query.
    """
    if top_k < 1:
        raise ValueError(f"--top-k is {top_k}; it must be at least 1")
    from uncausal.encoder.serving.index import is_index

    if is_index(target):
        if column != "text":
            raise ValueError(f"--column is for the texts of a file, and {target} is an index")
        results = search_index(target, rest, model, within, prompt, top_k, loading)
    else:
        for name, given in (("model", model), ("within", within)):
            if given is not None:
                raise ValueError(f"--{name} is for an index, and {target} is none")
        results = search_file(target, rest, column, prompt, top_k, loading)
    if as_json:
        print(json.dumps(results))
        return
    for result in results:
        print(result["query"])
        for hit in result["hits"]:
            text = hit["text"]
            if "path" in hit:
                text = f"{hit['path']}:{hit['line']}-{hit['end_line']}  {hit['name']}".rstrip()
            print(f"  {hit['score']:.3f}  {text}")


def search_file(
    model: str, rest: tuple[str, ...], column: str, prompt: str | None, top_k: int, loading: Loading
) -> list[dict[str, Any]]:
    """Search the texts of a file, of which nothing is kept."""
    if Path(model).is_file() and not model.endswith(".gguf"):
        raise ValueError(f"{model}: is neither an index, which `uncausal index` writes, nor a model")
    if len(rest) < 2:
        usage = (
            'give one or more queries: uncausal search MODEL CORPUS "QUERY", or uncausal search INDEX "QUERY"'
        )
        if Path(model).exists():
            raise ValueError(usage)
        raise ValueError(f"no index at {model}: `uncausal index DIR --out {model}` makes one; or {usage}")
    from sentence_transformers.util import semantic_search

    from uncausal.encoder.inputs import check_finite

    corpus, *queries = rest
    texts = read(corpus, column)
    encoder = loading.load(model)
    vectors = encoder.encode_document(texts, convert_to_tensor=True, show_progress_bar=sys.stderr.isatty())
    asked = encoder.encode_query(queries, prompt=prompt, convert_to_tensor=True, show_progress_bar=False)
    check_finite(vectors.float().cpu().numpy(), texts)
    check_finite(asked.float().cpu().numpy(), queries)
    found = semantic_search(asked, vectors, top_k=top_k)
    return [
        {
            "query": query,
            "hits": [{"score": round(h["score"], 4), "text": texts[int(h["corpus_id"])]} for h in hits],
        }
        for query, hits in zip(queries, found, strict=True)
    ]


def search_index(
    path: str,
    queries: tuple[str, ...],
    model: str | None,
    within: str | None,
    prompt: str | None,
    top_k: int,
    loading: Loading,
) -> list[dict[str, Any]]:
    """Search the passages of an index."""
    if not queries:
        raise ValueError('give one or more queries after the index: uncausal search INDEX "QUERY"')
    from uncausal.encoder.serving.index import Index

    index = Index(path)
    if not (model or index.model):
        raise ValueError(f"{path}: does not say which model made it: give --model")
    encoder = loading.load_as(index.made, Path(path), model)
    found = index.search(encoder, list(queries), top_k=top_k, within=within, prompt=prompt)
    return [
        {"query": query, "hits": [{**hit._asdict(), "score": round(hit.score, 4)} for hit in hits]}
        for query, hits in zip(queries, found, strict=True)
    ]


def read(source: str, column: str, *, skip_empty: bool = True) -> list[str]:
    """Read the texts of a source, which must hold one at least."""
    from uncausal.encoder.data.texts import read_texts

    texts = list(read_texts(source, column, skip_empty=skip_empty))
    if not texts:
        raise ValueError(f"{source}: holds no text")
    return texts
