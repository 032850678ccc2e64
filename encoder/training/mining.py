"""Hard negatives that a teacher finds for pairs, without the positives that nobody labelled.

The rules are NV-Retriever's (arXiv 2407.15831), and the negatives those of sentence-transformers'
`mine_hard_negatives` with a window of all documents, in memory bounded by the vectors and one chunk of
scores: what cannot be a negative is out before the `top_k` of a query are taken, where theirs takes a window
first. BM25 is a teacher too, and texts that differ in case and spaces alone are one.
"""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from uncausal.encoder.data.pairs import LABEL, NEGATIVE
from uncausal.encoder.loading import load_model

logger = logging.getLogger(__name__)

SCORES_BYTES = 256 << 20  # scores of a chunk of queries against the whole corpus


@dataclass(kw_only=True)
class Mining:
    """Which candidates count as negatives, and how many of them are taken. Defaults are NV-Retriever's best.

    Args:
        num_negatives: a row gets so many; rows for which fewer are left are dropped, and counted.
        top_k: candidates considered, best first, of those that may be negatives.
        rank_shift: so many of them skipped at the top.
        relative_margin: TopK-PercPos: a negative scores at most (1 - this) of the positive; 0.05 is "95 %".
            None, where nothing else is set, is naive top-k.
        absolute_margin: TopK-MarginPos: at least this much below the positive.
        max_score: TopK-Abs: at most this.
        sampling: "random" draws from the candidates, "top" takes the best.
        query_prompt, document_prompt: put before the texts, for the teacher alone.
        seed: of the draw.
    """

    num_negatives: int = 4
    top_k: int = 10
    rank_shift: int = 0
    relative_margin: float | None = 0.05
    absolute_margin: float | None = None
    max_score: float | None = None
    sampling: Literal["random", "top"] = "random"
    query_prompt: str | None = None
    document_prompt: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.num_negatives < 1 or self.top_k < self.num_negatives or self.rank_shift < 0:
            raise ValueError(
                f"cannot take {self.num_negatives} negatives out of the top {self.top_k} "
                f"after {self.rank_shift}"
            )

    def mine(
        self, pairs: Dataset, teacher: "SentenceTransformer | BM25 | str", corpus: Iterable[str] = ()
    ) -> Dataset:
        """Add the columns `negative_1` to `negative_K` (`negative` where K is 1) to pairs.

        Args:
            pairs: with the columns `anchor` and `positive`; an anchor may have several rows, which get the
                same negatives. Other columns stay, but for negatives.
            teacher: any sentence-transformers model or the name of one, or "bm25".
            corpus: documents beside the positives.

        Returns:
            The rows for which enough negatives were found.

        Raises:
            ValueError: no pair, no row with enough negatives, several positives of one id or class, or a
                teacher's vector that is not finite.
        """
        if not len(pairs):
            raise ValueError("no pairs to mine negatives for")
        pairs = pairs.with_format(None)
        numbers: dict[str, int] = {}
        documents: list[str] = []

        def number_of(text: str) -> int:
            found = numbers.setdefault(_folded(text), len(documents))
            if found == len(documents):
                documents.append(text)
            return found

        right = np.array([number_of(text) for text in pairs["positive"]])
        for text in corpus:
            if text.strip():
                number_of(text)
        numbers.clear()
        anchors = list(pairs["anchor"])
        check_ids(pairs[LABEL] if LABEL in pairs.column_names else anchors, anchors, right)
        queries = {text: number for number, text in enumerate(dict.fromkeys(anchors))}
        asked = np.array([queries[text] for text in anchors])
        model: Any = teacher
        if isinstance(teacher, str):
            model = BM25() if teacher.lower() == "bm25" else load_model(teacher)
        chosen = self._chosen(model, list(queries), documents, asked, right)
        kept = np.flatnonzero(chosen[asked, 0] >= 0)
        logger.info("mined %d of %d rows; the others have fewer negatives", len(kept), len(pairs))
        if not len(kept):
            raise ValueError(
                f"no row has {self.num_negatives} negatives among {len(documents)} documents: ask for fewer, "
                "or lower the margin or rank_shift"
            )
        rest = pairs.select(kept)
        columns = {name: rest[name][:] for name in rest.column_names if not NEGATIVE.fullmatch(name)}
        for place, found in enumerate(chosen[asked[kept]].T, 1):
            name = "negative" if self.num_negatives == 1 else f"negative_{place}"
            columns[name] = [documents[i] for i in found]
        return Dataset.from_dict(columns)

    def _chosen(
        self, teacher: Any, queries: list[str], documents: list[str], asked: np.ndarray, right: np.ndarray
    ) -> np.ndarray:
        """The documents' numbers (Q, num_negatives), best first; -1 throughout where there are fewer.

        `asked` and `right` (R,) are the numbers of each row's query and positive.
        """
        device, show = getattr(teacher, "device", "cpu"), sys.stderr.isatty()
        options = {"normalize_embeddings": True, "convert_to_numpy": True, "show_progress_bar": show}

        def vectors(encode: Any, texts: list[str], prompt: str | None) -> Tensor:
            found = torch.as_tensor(encode(texts, prompt=prompt, **options))
            if not found.is_floating_point():  # BM25's
                return found
            found = normalize(found.float())  # in half precision they are not quite unit vectors
            bad = found.isfinite().all(1).logical_not().nonzero()
            if len(bad):
                raise ValueError(f"the teacher's vector is not finite: {texts[int(bad[0])][:60]!r}")
            return found

        of_documents = vectors(teacher.encode_document, documents, self.document_prompt).to(device)
        of_queries = vectors(teacher.encode_query, queries, self.query_prompt)
        highest = self._highest(teacher, of_queries, of_documents, asked, right)
        by_query = np.argsort(asked, kind="stable")
        of_rows = asked[by_query]
        chosen = np.full((len(queries), self.num_negatives), -1)
        width = min(self.rank_shift + self.top_k, len(documents))
        if width < self.num_negatives:
            return chosen
        a_query = (getattr(teacher, "bytes_a_score", 4) + 1) * len(
            documents
        ) + 40 * width  # and its candidates
        step = max(SCORES_BYTES // a_query, 1)
        draw = np.random.default_rng(self.seed)
        for start in tqdm(range(0, len(queries), step), desc="Mining", disable=not show):
            end = min(start + step, len(queries))
            scores = _scores(teacher, of_queries[start:end].to(device), of_documents)
            rows = by_query[np.searchsorted(of_rows, start) : np.searchsorted(of_rows, end)]
            scores[torch.from_numpy(asked[rows] - start), torch.from_numpy(right[rows])] = -torch.inf
            limits = torch.from_numpy(highest[start:end, None]).to(device)
            scores.masked_fill_(scores > limits, -torch.inf)
            best, places = (found.cpu().numpy() for found in scores.topk(width, dim=1))
            del scores  # before the next ones are there
            fits = best > -np.inf
            fits &= fits.cumsum(1) > self.rank_shift
            order = draw.random(fits.shape) if self.sampling == "random" else np.arange(width)
            first = np.where(fits, order, np.inf).argsort(1, kind="stable")[:, : self.num_negatives]
            enough = fits.sum(1) >= self.num_negatives
            chosen[start:end][enough] = np.take_along_axis(places, np.sort(first, 1), 1)[enough]
        return chosen

    def _highest(
        self, teacher: Any, of_queries: Tensor, of_documents: Tensor, asked: np.ndarray, right: np.ndarray
    ) -> np.ndarray:
        """The score (Q,) that no negative of a query may exceed; the least of its positives' counts."""
        least = np.full(len(of_queries), np.inf, dtype=np.float32)
        for start in range(0, len(asked), 8192):
            rows = slice(start, start + 8192)
            of_rows = of_queries[asked[rows]].to(of_documents.device)
            scores = teacher.similarity_pairwise(of_rows, of_documents[right[rows]])
            np.minimum.at(least, asked[rows], torch.as_tensor(scores).float().cpu().numpy())
        limits: list[Any] = [np.full_like(least, np.inf if self.max_score is None else self.max_score)]
        if self.relative_margin is not None:
            limits.append(least - np.abs(least) * self.relative_margin)
        if self.absolute_margin is not None:
            limits.append(least - self.absolute_margin)
        return np.minimum.reduce(limits)


def _scores(teacher: Any, queries: Tensor, documents: Tensor) -> Tensor:
    """Scores (Q, N); of unit vectors a cosine is an inner product, and needs no scaled copy of them all."""
    if getattr(teacher, "similarity_fn_name", None) in ("cosine", "dot"):
        return queries @ documents.T
    return torch.as_tensor(teacher.similarity(queries, documents))


class BM25:
    """BM25 as a teacher: its "vectors" are row numbers of sparse matrices.

    The usual form (Robertson and Zaragoza 2009, equation 3.15), on lower-cased words.

    Args:
        k1: saturation of a word's count. b: share of the length normalisation.
    """

    device = torch.device("cpu")
    bytes_a_score = 16  # the sparse product and the dense one

    def __init__(self, k1: float = 1.2, b: float = 0.75):
        self.k1, self.b = k1, b

    def encode_document(self, texts: list[str], **options: Any) -> np.ndarray:
        from sklearn.feature_extraction.text import CountVectorizer

        whole_words = {"token_pattern": r"(?u)\b\w+\b"}
        self.words: Any = CountVectorizer(dtype=np.float32, **whole_words)  # type: ignore[arg-type]
        counts: Any = self.words.fit_transform(texts).tocoo()
        lengths = np.bincount(counts.row, counts.data, minlength=len(texts))
        frequency = np.bincount(counts.col, minlength=counts.shape[1])
        idf = np.log1p((len(texts) - frequency + 0.5) / (frequency + 0.5))
        pull = self.k1 * (1 - self.b + self.b * lengths / max(lengths.mean(), 1))
        counts.data *= (idf[counts.col] * (self.k1 + 1) / (counts.data + pull[counts.row])).astype(np.float32)
        self.documents = counts.tocsr()
        self.by_word = self.documents.T.tocsr()
        return np.arange(len(texts))[:, None]

    def encode_query(self, texts: list[str], **options: Any) -> np.ndarray:
        self.queries = (self.words.transform(texts) > 0).astype(np.float32).tocsr()
        return np.arange(len(texts))[:, None]

    def similarity(self, queries: Any, documents: Any) -> Tensor:
        """Scores (Q, N) of queries and documents given by their row numbers (Q, 1), (N, 1)."""
        chosen, among = (np.asarray(rows)[:, 0] for rows in (queries, documents))
        every = np.array_equal(among, np.arange(self.documents.shape[0]))
        by_word = self.by_word if every else self.documents[among].T
        return torch.from_numpy((self.queries[chosen] @ by_word).toarray())

    def similarity_pairwise(self, queries: Any, documents: Any) -> Tensor:
        """Scores (N,) of the pairs of queries (N, 1) and documents (N, 1)."""
        chosen, among = (np.asarray(rows)[:, 0] for rows in (queries, documents))
        products = self.queries[chosen].multiply(self.documents[among])
        return torch.from_numpy(np.asarray(products.sum(1), dtype=np.float32)[:, 0])


def check_ids(ids: Iterable[Any], anchors: Sequence[str], positives: Iterable[int]) -> None:
    """Refuse rows whose ids say that one's positive is right for another: it would be mined as a negative."""
    found: dict[Any, dict[str, set[int]]] = {}
    for this, anchor, positive in zip(ids, anchors, positives, strict=True):
        found.setdefault(this, {}).setdefault(anchor, set()).add(positive)
    for of_anchors in found.values():
        (first, known), *others = of_anchors.items()
        differing = [anchor for anchor, right in others if right != known]
        if differing:
            raise ValueError(
                f"{first!r} and {differing[0]!r} have one id or class and other positives, each of which "
                "would be mined as a negative of the other: leave the ids out, or train on the classes as "
                "they are, whose negatives are of other classes"
            )


def _folded(text: str) -> str:
    """Texts that agree in this are one document."""
    return " ".join(text.casefold().split())
