"""Commands that use an encoder: encode, search."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tyro.conf import Positional

from uncausal.encoder.cli.options import Json, Loading, check_writable


def encode(
    model: Positional[str],
    input: Positional[str],
    output: Positional[Path],
    /,
    *,
    column: str = "text",
    prompt: str | None = None,
    batch_tokens: int | None = None,
    int8: bool = False,
    loading: Loading = Loading(),
) -> None:
    """Write one vector per text.

    Args:
        model: encoder folder, or anything `convert` takes.
        input: text, JSONL, CSV, TSV or Parquet file; - is stdin.
        output: file to write: .npy, or .parquet with the texts beside them.
        column: field that holds the text.
        prompt: instruction put before every text; attended, not pooled.
        batch_tokens: tokens a batch; by default as many as suit the device.
        int8: int8 weights, on a CPU: faster, less exact.
    """
    if output.suffix not in (".npy", ".parquet"):
        raise ValueError(f"{output}: the output is .npy or .parquet, not {output.suffix!r}")
    check_writable(output)
    import numpy as np

    from uncausal.encoder.files import staged_file

    texts = read(input, column)
    encoder = loading.load(model)
    if int8:
        encoder.quantize()
    vectors = encoder.encode(
        texts, prompt=prompt, batch_tokens=batch_tokens, show_progress_bar=sys.stderr.isatty()
    )
    with staged_file(output) as file:
        if output.suffix == ".npy":
            np.save(file, vectors)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            pq.write_table(pa.table({"text": texts, "embedding": embedding}), file)
    print(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers", file=sys.stderr)


def search(
    model: Positional[str],
    corpus: Positional[str],
    query: Positional[tuple[str, ...]],
    /,
    *,
    column: str = "text",
    prompt: str | None = None,
    top_k: int = 5,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Find the texts nearest to a query.

    Args:
        model: encoder folder, or anything `convert` takes.
        corpus: text, JSONL, CSV, TSV or Parquet file; - is stdin.
        query: one or more queries.
        column: field that holds the text.
        prompt: instruction put before the queries.
        top_k: hits a query.
    """
    if not query:
        raise ValueError('give one or more queries after the corpus: uncausal search MODEL CORPUS "QUERY"')
    from sentence_transformers.util import semantic_search

    texts = read(corpus, column)
    encoder = loading.load(model)
    vectors = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=sys.stderr.isatty())
    queries = encoder.encode(list(query), prompt=prompt, convert_to_tensor=True, show_progress_bar=False)
    found = semantic_search(queries, vectors, top_k=top_k)
    results = [
        {
            "query": q,
            "hits": [{"score": round(h["score"], 4), "text": texts[int(h["corpus_id"])]} for h in hits],
        }
        for q, hits in zip(query, found, strict=True)
    ]
    if as_json:
        print(json.dumps(results))
        return
    for result in results:
        print(result["query"])
        for hit in result["hits"]:
            print(f"  {hit['score']:.3f}  {hit['text']}")


def read(source: str, column: str) -> list[str]:
    """Read the texts of a source, which must hold one at least."""
    from uncausal.encoder.data.texts import read_texts

    texts = list(read_texts(source, column))
    if not texts:
        raise ValueError(f"{source}: holds no text")
    return texts
