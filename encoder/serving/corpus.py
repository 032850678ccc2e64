"""Corpora larger than memory: a stream of texts to Parquet shards that a killed run goes on from.

Shard k holds rows k * N to (k + 1) * N - 1 of the input and is encoded from its own texts alone, so its bytes
do not depend on who encodes it or when: a rerun, and other processes (`shard=(i, n)`), write the same files.

manifest.json              settings, model digest and versions, the same for every process
part-00000.parquet         columns id and embedding, written whole or not at all
part-00000.json            rows, tokens, digests of the manifest, of the ids and texts, and of the file
input.json                 shards, rows and digest of the input, written by whoever has come to its end
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

import uncausal
from uncausal.encoder.batching import check_packed, iter_encode, release_memory
from uncausal.encoder.data.rows import DataError, read_rows, text_field
from uncausal.encoder.files import staged_file
from uncausal.encoder.inputs import check_finite, check_unicode, own_prompt, tokenizer_state

logger = logging.getLogger(__name__)
INPUT = "input.json"


@dataclass(kw_only=True)
class CorpusSettings:
    """What decides the bytes of the shards.

    Args:
        column: the field that holds the text, where rows have fields.
        id_column: the field that holds the id; without one, ids are row numbers from 0.
        rows_per_shard: N.
        dtype: of the vectors; int8 is round(127 x / max|x|), a scale of its own for each vector.
        dimension: keep so many leading numbers (Matryoshka).
        normalize: scale vectors to length 1, after they are cut.
        prompt: put before every text; attended, not pooled.
        batch_tokens: tokens a batch.
    """

    column: str = "text"
    id_column: str | None = None
    rows_per_shard: int = 10_000
    dtype: Literal["float32", "float16", "int8"] = "float32"
    dimension: int | None = None
    normalize: bool = False
    prompt: str | None = None
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {self.rows_per_shard}; it must be at least 1")
        if self.dtype not in ("float32", "float16", "int8"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be float32, float16 or int8")
        for name in ("dimension", "batch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


class CorpusResult(NamedTuple):
    """What one call did: rows encoded, rows found done, tokens encoded, seconds, shards of the input."""

    encoded: int
    found: int
    tokens: int
    seconds: float
    shards: int


def corpus_rows(source: str | Path, settings: CorpusSettings) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of every row of a source for `read_rows`, in order.

    Raises:
        DataError: a missing field or an empty text; the message has file and line.
    """
    for number, (where, row) in enumerate(read_rows(source, streaming=True)):
        text = text_field(row, settings.column, where)
        if not text.strip():
            raise DataError(
                f"{where}: the text is empty, and there is no vector of nothing; leave the row out"
            )
        if settings.id_column is not None and settings.id_column not in row:
            raise DataError(f"{where}: no field {settings.id_column!r}; there is {', '.join(map(repr, row))}")
        id = str(number) if settings.id_column is None else str(row[settings.id_column])
        try:
            check_unicode([text, id])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        yield id, text


def encode_corpus(
    encoder: SentenceTransformer,
    rows: Iterable[tuple[str, str]],
    output: str | Path,
    settings: CorpusSettings | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
    show_progress_bar: bool = False,
) -> CorpusResult:
    """Encode (id, text) rows to Parquet shards, leaving out those that are there already.

    Args:
        encoder: an `Encoder` that is packed.
        rows: in an order that does not change between runs.
        output: folder of the shards.
        settings: what decides their bytes.
        shard: (i, n): encode every n-th shard, from the i-th; n processes share the work without speaking.
        show_progress_bar: draw a bar, with tokens a second.

    Returns:
        What was done.

    Raises:
        ValueError: the folder holds shards of other settings or of another model, there are no rows, or an
            impossible argument.
        OSError: the folder cannot be written.
    """
    settings, output = settings or CorpusSettings(), Path(output)
    turn, turns = shard
    if not 0 <= turn < turns:
        raise ValueError(
            f"shard {turn}/{turns} does not exist: there are the shards 0/{turns} to {turns - 1}/{turns}"
        )
    parts = cut_into_shards(rows, settings)
    if not (first := list(islice(parts, 1))):  # what is wrong with the first rows leaves no manifest
        close_corpus(output, [], 0)
    settings, made_by = open_corpus(encoder, output, settings)
    encoded = found = tokens = shards = total = 0
    digests: list[str] = []
    start = time.perf_counter()
    batches = chain(iter(first), parts)  # an iterator, which lets go of what it has given
    del first
    with tqdm(desc="Encoding", unit="text", disable=not show_progress_bar) as bar:
        for number, batch in batches:
            if number % turns == turn:
                if is_done(output, number, batch, made_by):
                    found += len(batch)
                else:
                    tokens += encode_shard(encoder, batch, output, number, settings, made_by)
                    encoded += len(batch)
                    bar.set_postfix({"tokens/s": f"{tokens / (time.perf_counter() - start):,.0f}"})
                bar.update(len(batch))
            shards, total = number + 1, total + len(batch)
            digests.append(digest_of_rows(batch))
    close_corpus(output, digests, total)
    return CorpusResult(encoded, found, tokens, time.perf_counter() - start, shards)


def open_corpus(
    encoder: SentenceTransformer, output: Path, settings: CorpusSettings
) -> tuple[CorpusSettings, str]:
    """Write the manifest, or make sure that the one there is the same.

    Returns:
        The settings with the encoder's own prompt and dimension where they name none, as `encode` has them;
        and the manifest's digest, which every shard's note repeats: the folder may be begun anew meanwhile.
    """
    check_packed(encoder)
    kept: Any = settings.dimension or encoder.truncate_dim
    settings = replace(settings, prompt=own_prompt(encoder, settings.prompt), dimension=kept)
    width = encoder.get_embedding_dimension() or 0
    if settings.dimension is not None and settings.dimension > width:
        raise ValueError(f"dimension {settings.dimension} is more than the model has: {width}")
    # a GPU's bits are others
    made = {"model": model_digest(encoder), "device": encoder.device.type, "uncausal": uncausal.__version__}
    manifest = {**made, **asdict(settings)}
    file = output / "manifest.json"
    if not file.exists():
        with suppress(FileExistsError), staged_file(file, new=True) as out:  # another process was first
            out.write(json.dumps(manifest, indent=1).encode())
    before = _read_json(file)
    changed = [key for key in {**before, **manifest} if before.get(key) != manifest.get(key)]
    if changed:
        shown = ", ".join(f"{k} ({before.get(k)!r} there, {manifest.get(k)!r} here)" for k in changed)
        raise ValueError(
            f"{output} holds a corpus that differs in {shown}: choose another folder, or remove it"
        )
    return settings, _digest_of_json(manifest)


def digest_of_manifest(output: Path) -> str:
    """Of the manifest that is there; "" where there is none."""
    file = output / "manifest.json"
    return _digest_of_json(_read_json(file)) if file.exists() else ""


def _digest_of_json(content: dict[str, Any]) -> str:
    return _digest_of(json.dumps(content, sort_keys=True).encode())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: is damaged, and holds no JSON object: remove it and run the same again")
    return found


def cut_into_shards(
    rows: Iterable[tuple[str, str]], settings: CorpusSettings
) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Yield every shard's number and rows, in order."""
    stream = iter(rows)
    for number in count():
        if not (batch := list(islice(stream, settings.rows_per_shard))):
            return
        yield number, batch


def close_corpus(output: Path, digests: Sequence[str], rows: int) -> None:
    """Write what the input held, a digest a shard, where a process has come to its end."""
    if not rows:
        raise ValueError(f"{output}: the input holds no row, and there is nothing to encode")
    there = [file.stem.removeprefix("part-") for file in output.glob("part-*.parquet")]
    beyond = [int(number) for number in there if number.isdecimal() and int(number) >= len(digests)]
    if beyond:
        stale = _shard(output, min(beyond))
        raise ValueError(
            f"{stale}: is beyond the end of the input, which has {len(digests)} shards: remove it"
        )
    told = {"shards": len(digests), "rows": rows, "input": _digest_of("".join(digests).encode())}
    with staged_file(output / INPUT) as out:
        out.write(json.dumps(told).encode())


def read_corpus(folder: str | Path) -> pa.Table:
    """Return the ids and vectors of a finished corpus, in the order of its rows.

    Raises:
        ValueError: no run has come to the end of the input, or a shard is missing or does not hold what was
            written.
    """
    folder = Path(folder)
    if not (folder / INPUT).exists():
        raise ValueError(f"{folder}: holds no corpus that is finished; run the same again")
    tables, digests = [], []
    told, made_by = _read_json(folder / INPUT), digest_of_manifest(folder)
    for number in range(told.get("shards", 0)):
        file = _shard(folder, number)
        if not file.exists():
            raise ValueError(f"{file}: is missing; run the same again")
        note = _read_json(_note(file)) if _note(file).exists() else {}
        content = file.read_bytes()  # once: another run may be putting its own in the place
        if note.get("file") != _digest_of(content):
            raise ValueError(f"{file}: does not hold what was written; run the same again")
        if note.get("made_by", made_by) != made_by:  # earlier versions do not say
            raise ValueError(f"{file}: was made by another model or other settings; run the same again")
        digests.append(note.get("input", ""))
        tables.append(pq.read_table(pa.BufferReader(content)))
    if told.get("input") != _digest_of("".join(digests).encode()):
        raise ValueError(f"{folder}: holds shards of more than one input; run the same again")
    return pa.concat_tables(tables)


def model_digest(encoder: SentenceTransformer) -> str:
    """Return a digest of all weights, of what the modules are set to, and of how texts become tokens."""
    module: Any = encoder[0]
    config = module.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # no part of what it computes
        config.pop(name, None)
    told = [repr(encoder), config, module.tokenizer.truncation_side, encoder.max_seq_length]
    told += [module.template, tokenizer_state(module.tokenizer)]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        for part in value if isinstance(value, tuple) else [value]:  # an int8 weight comes with its bias
            if isinstance(part, torch.Tensor):
                plain = part.dequantize() if part.is_quantized else part
                digest.update(plain.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def encode_shard(
    encoder: SentenceTransformer,
    rows: list[tuple[str, str]],
    output: Path,
    number: int,
    settings: CorpusSettings,
    made_by: str,
) -> int:
    """Encode the rows of one shard and write it, with the manifest's digest; returns their tokens."""
    texts = [text for _, text in rows]
    vectors, tokens, cut = np.empty((0, 0), np.float32), 0, 0
    batches = iter_encode(encoder, texts, prompt=settings.prompt, batch_tokens=settings.batch_tokens)
    for batch in batches:
        part = batch.vectors.float().cpu().numpy()
        if not len(vectors):
            vectors = np.empty((len(texts), part.shape[1]), np.float32)
        vectors[batch.indices] = part
        tokens, cut = tokens + sum(batch.token_counts), cut + batch.num_truncated
    if cut:
        limit = encoder.max_seq_length
        told = "shard %d: %d of %d texts were longer than %s tokens and were cut"
        logger.warning(told, number, cut, len(rows), limit)
    check_finite(vectors, texts)
    columns = _columns(vectors, texts, settings)
    table, content = pa.table({"id": [id for id, _ in rows], **columns}), io.BytesIO()
    pq.write_table(table, content)
    file, written = _shard(output, number), content.getvalue()
    (output / INPUT).unlink(missing_ok=True)  # with this shard the corpus is another, until a run ends
    with staged_file(file) as out:
        out.write(written)
    # not of what is there by now: another run may have put its own in the place
    note = {"rows": len(rows), "tokens": tokens, "made_by": made_by}
    note |= {"input": digest_of_rows(rows), "file": _digest_of(written)}
    with staged_file(_note(file)) as out:
        out.write(json.dumps(note).encode())
    release_memory()
    return tokens


def _columns(vectors: np.ndarray, texts: Sequence[str], settings: CorpusSettings) -> dict[str, pa.Array]:
    """The vectors as columns of the wanted type; int8 has a column of scales, vector = scale * embedding."""
    vectors = vectors[:, : settings.dimension]
    if settings.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    columns = {}
    if settings.dtype == "int8":
        scale = np.maximum(np.abs(vectors).max(1), 1e-12) / 127
        columns["scale"] = pa.array(scale.astype(np.float32))
        vectors = np.rint(vectors / scale[:, None])
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(vectors, dtype=settings.dtype)
    check_finite(vectors, texts)  # float16 ends at 65,504
    flat = pa.array(vectors.reshape(-1))
    return {"embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]), **columns}


def is_done(output: Path, number: int, rows: list[tuple[str, str]], made_by: str) -> bool:
    """Whether the shard is whole and was made of these rows, under the manifest of this digest."""
    file = _shard(output, number)
    if not file.exists() or not _note(file).exists():
        return False
    try:
        note = _read_json(_note(file))
    except ValueError:
        return False
    wanted = {"made_by": made_by, "input": digest_of_rows(rows), "file": _digest_of(file.read_bytes())}
    return wanted.items() <= note.items()


def _shard(output: Path, number: int) -> Path:
    return output / f"part-{number:05}.parquet"


def _note(shard: Path) -> Path:
    return shard.with_suffix(".json")


def digest_of_rows(rows: Sequence[Any]) -> str:
    return _digest_of(json.dumps(rows).encode())


def _digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
