"""Word level: a linear probe on a frozen encoder's token states, as in LLM2Vec (section 4.1).

A word is the mean of its sub-tokens' states; the probe (dropout 0.1, AdamW at 5e-4 falling to 0, batches of 8
sentences, 1500 steps) tags words. Part of speech on UD English EWT is scored by accuracy, entities of WNUT-17
by F1 of whole spans. States are computed once for a model and cached on disk by what they are made of.
"""

from __future__ import annotations

import gzip
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from uncausal.encoder.batching import token_batches
from uncausal.encoder.data.rows import readable
from uncausal.encoder.elementwise import alone_beyond
from uncausal.encoder.evaluation.compare import Evaluation, Measured, Models, compare
from uncausal.encoder.evaluation.tasks import Measurement
from uncausal.encoder.files import staged_file
from uncausal.encoder.model import Encoder

Tagger = Literal["pos", "ner"]


class TaggedSentence(NamedTuple):
    """The words of a sentence and a tag for each."""

    words: list[str]
    tags: list[str]


class WordTask(NamedTuple):
    """Sentences to train the probe on and others to score it on, and how: "pos" accuracy, "ner" span F1."""

    name: Tagger
    train: list[TaggedSentence]
    test: list[TaggedSentence]


def evaluate_words(
    models: Models,
    tasks: Sequence[WordTask],
    *,
    shift: bool = False,
    cache_dir: str | Path | None = None,
    resamples: int = 1000,
    load_options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score models on tagging words, such as `word_tasks(data_dir)`; intervals are over sentences.

    Args:
        models, resamples, load_options: as in `compare.evaluate_models`.
        tasks: the tasks.
        shift: take a token's state from the position before it, where an MNTP model predicts it.
        cache_dir: folder for states; None keeps none.
    """

    def measure(model: SentenceTransformer) -> Measured:
        return measure_words(model, tasks, shift=shift, cache_dir=cache_dir)

    return compare(
        models, measure, {t.name: t.name for t in tasks}, resamples=resamples, load_options=load_options
    )


def measure_words(
    model: SentenceTransformer,
    tasks: Sequence[WordTask],
    *,
    shift: bool = False,
    cache_dir: str | Path | None = None,
) -> Measured:
    """Train a probe for each task on a model's states and measure it, the units being sentences.

    Args:
        model, tasks, shift, cache_dir: as in `evaluate_words`.
    """
    start, measurements = time.perf_counter(), {}
    for task in tasks:
        train, test = (
            word_states(model, [s.words for s in sentences], shift=shift, cache_dir=cache_dir)
            for sentences in (task.train, task.test)
        )
        predicted = probe(train, [s.tags for s in task.train], test)
        counts = np.array(
            [COUNTS[task.name](s.tags, tags) for s, tags in zip(task.test, predicted, strict=True)]
        )
        measurements[task.name] = Measurement(len(counts), _f1_of(counts))
    sentences = sum(len(task.train) + len(task.test) for task in tasks)
    return Measured(measurements, sentences, time.perf_counter() - start)


def word_tasks(
    data_dir: str | Path, split: Literal["dev", "test"] = "test", limit: int = 4000
) -> list[WordTask]:
    """Read UD English EWT and WNUT-17; the probe learns on at most `limit` sentences of train.

    Raises:
        FileNotFoundError: a set is missing.
    """
    ud, wnut = Path(data_dir) / "ud_english_ewt", Path(data_dir) / "wnut17"
    wnut_file = {"dev": "emerging.dev.conll", "test": "emerging.test.annotated"}[split]
    return [
        WordTask(
            "pos",
            read_tagged(ud / "en_ewt-ud-train.conllu.gz", 1, 3)[:limit],
            read_tagged(ud / f"en_ewt-ud-{split}.conllu.gz", 1, 3),
        ),
        WordTask(
            "ner",
            read_tagged(wnut / "wnut17train.conll", 0, 1)[:limit],
            read_tagged(wnut / wnut_file, 0, 1),
        ),
    ]


def read_tagged(path: Path, word_column: int, tag_column: int) -> list[TaggedSentence]:
    """Read a CoNLL file, plain or gzipped: a word a line, fields between tabs, blank lines between sentences.

    Lines of comments, of CoNLL-U's ranges (1-2) and of its empty nodes (1.1) are skipped.

    Raises:
        ValueError: a line has too few fields; the message gives its number.
    """
    with readable(str(path)):
        return _read_tagged(path, word_column, tag_column)


def _read_tagged(path: Path, word_column: int, tag_column: int) -> list[TaggedSentence]:
    sentences, words, tags = [], [], []
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf8") as file:
        for number, line in enumerate([*file, ""], start=1):
            if not line.strip():
                if words:
                    sentences.append(TaggedSentence(words, tags))
                words, tags = [], []
                continue
            fields = line.rstrip("\n").split("\t")
            if word_column > 0 and (line.startswith("#") or not fields[0].isdecimal()):
                continue
            try:
                word, tag = fields[word_column], fields[tag_column].strip()
            except IndexError as error:
                raise ValueError(f"{path}:{number}: no field {tag_column + 1} in {line!r}") from error
            words.append(word)
            tags.append(tag)
    return sentences


def word_states(
    model: SentenceTransformer,
    sentences: Sequence[Sequence[str]],
    *,
    shift: bool = False,
    cache_dir: str | Path | None = None,
    batch_tokens: int = 1024,
) -> list[np.ndarray]:
    """Return the words' states, (words, d) in float32 for every sentence: the mean of their sub-tokens'.

    Words are joined by spaces. One that has no token of its own (some control characters) takes the state of
    the token before it.

    Args:
        model: a model whose first module gives token states.
        sentences: words of each sentence.
        shift: as in `evaluate_words`; the first token keeps its own state.
        cache_dir: where the states of these tokens in this model are looked for first, and put.
        batch_tokens: tokens a batch at most.
    """
    tokens = [_tokenize(model.tokenizer, words) for words in sentences]
    path, flat = None, None
    if cache_dir is not None:
        path = Path(cache_dir) / f"{_address(model, tokens, shift)}.npy"
        flat = np.load(path) if path.exists() else None
    computed = flat is None or not np.isfinite(flat).all()
    if flat is None or computed:
        flat = np.concatenate(_compute(model, tokens, shift, batch_tokens))
    states = np.split(flat, np.cumsum([len(words) for words in sentences])[:-1])
    for index, found in enumerate(states):
        if not np.isfinite(found).all():
            raise ValueError(f"sentence {index}: the model's states are not finite")
    if path is not None and computed:
        with staged_file(path) as file:
            np.save(file, flat)
    return states


class _Tokens(NamedTuple):
    ids: list[int]
    spans: list[tuple[int, int]]  # the tokens first .. last + 1 of each word


def _tokenize(tokenizer: Any, words: Sequence[str]) -> _Tokens:
    text, starts = " ".join(words), np.cumsum([0, *(len(word) + 1 for word in words)])
    encoded = tokenizer(text, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    spans, first = [], 0
    for start, word in zip(starts, words, strict=False):
        end = start + len(word)
        own = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        first = own[0] if own else min(first, len(offsets) - 1)
        spans.append((first, own[-1] + 1 if own else first + 1))
    return _Tokens(encoded["input_ids"], spans)


@torch.inference_mode()
def _compute(
    model: SentenceTransformer, tokens: Sequence[_Tokens], shift: bool, batch_tokens: int
) -> list[np.ndarray]:
    model.eval()
    result: list[np.ndarray] = [np.empty(0)] * len(tokens)
    alone = alone_beyond(model[0].config)  # type: ignore[union-attr]
    batches = token_batches([len(sentence.ids) for sentence in tokens], batch_tokens, alone=alone)
    for batch in tqdm(list(batches), desc="Word states", unit="batch", disable=None):
        for index, states in zip(batch, _states(model, [tokens[i].ids for i in batch]), strict=True):
            if shift:
                states = torch.cat([states[:1], states[:-1]])
            result[index] = torch.stack([states[a:b].mean(0) for a, b in tokens[index].spans]).numpy()
    return result


def _states(model: SentenceTransformer, ids: list[list[int]]) -> Iterable[torch.Tensor]:
    """The states (tokens, d) of every text, packed where the model packs, else padded on the right."""
    transformer: Any = model[0]
    lengths = [len(row) for row in ids]
    if isinstance(model, Encoder) and model.packed:
        features = batch_to_device(transformer.collate(ids), model.device)
        states = transformer(features)["token_embeddings"].float().cpu()
        return states.reshape(sum(lengths), -1).split(lengths)
    width = max(lengths)
    features = {
        "input_ids": torch.tensor([row + [row[-1]] * (width - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in lengths]),
    }
    states = transformer(batch_to_device(features, model.device))["token_embeddings"].float().cpu()
    return [row[:n] for row, n in zip(states, lengths, strict=True)]


def _address(model: SentenceTransformer, tokens: Sequence[_Tokens], shift: bool) -> str:
    """A hash of all that the states follow from: weights, configuration, batches, tokens, words and shift."""
    digest = hashlib.blake2b(digest_size=16)
    transformer: Any = model[0]
    config = sorted(transformer.config.to_dict().items())
    config = [item for item in config if item[0] != "transformers_version" and not item[0].startswith("_")]
    digest.update(repr((config, shift, alone_beyond(transformer.config))).encode())
    for name, tensor in transformer.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(repr([tuple(sentence) for sentence in tokens]).encode())
    return digest.hexdigest()


def probe(
    train: Sequence[np.ndarray],
    train_tags: Sequence[Sequence[str]],
    test: Sequence[np.ndarray],
    *,
    steps: int = 1500,
    batch_size: int = 8,
    learning_rate: float = 5e-4,
    dropout: float = 0.1,
) -> list[list[str]]:
    """Train a linear layer to tag words and return its tags of other sentences; settings are LLM2Vec's.

    States are scaled by one number, so that the root of their mean square is 1 whatever the model.

    Args:
        train, test: states (words, d) of every sentence.
        train_tags: tags of the words of `train`.
        steps, batch_size, learning_rate, dropout: of the training; a batch is of sentences.
    """
    labels = sorted({tag for tags in train_tags for tag in tags})
    number = {label: index for index, label in enumerate(labels)}
    scale = float(np.sqrt(np.mean([np.square(states).mean() for states in train])))
    layer = nn.Linear(train[0].shape[1], len(labels))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_(0, 0.02, generator=generator)
        layer.bias.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order: list[int] = []
    for _ in tqdm(range(steps), desc="Probe", unit="step", disable=None):
        while len(order) < batch_size:
            order += torch.randperm(len(train), generator=generator).tolist()
        batch, order = order[:batch_size], order[batch_size:]
        states = torch.from_numpy(np.concatenate([train[i] for i in batch])) / scale
        keep = torch.rand(states.shape, generator=generator) >= dropout
        gold = torch.tensor([number[tag] for i in batch for tag in train_tags[i]])
        loss = cross_entropy(layer(states * keep / (1 - dropout)), gold)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return [[labels[i] for i in layer(torch.from_numpy(s) / scale).argmax(1).tolist()] for s in test]


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return (first word, last word + 1, type) of every span of BIO tags; an I without its B begins one."""
    found, start, kind = set(), 0, ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and not (prefix == "I" and name == kind):
            found.add((start, index, kind))
            kind = ""
        if prefix in ("B", "I") and not kind:
            start, kind = index, name
    return found


def _tag_counts(gold: Sequence[str], predicted: Sequence[str]) -> tuple[int, int, int]:
    right = sum(a == b for a, b in zip(gold, predicted, strict=True))
    return right, len(gold), len(gold)


def _span_counts(gold: Sequence[str], predicted: Sequence[str]) -> tuple[int, int, int]:
    theirs, ours = spans(gold), spans(predicted)
    return len(theirs & ours), len(theirs), len(ours)


# Right, gold and predicted of a sentence; with as many predicted as gold, F1 is accuracy.
COUNTS: dict[Tagger, Callable[[Sequence[str], Sequence[str]], tuple[int, int, int]]] = {
    "pos": _tag_counts,
    "ner": _span_counts,
}


def _f1_of(counts: np.ndarray) -> Callable[[np.ndarray], float]:
    def score(rows: np.ndarray) -> float:
        right, gold, predicted = counts[rows].sum(0)
        return 200 * right / (gold + predicted) if gold + predicted else 0.0

    return score
