"""Hard negatives that a teacher finds for pairs, without the positives that nobody labelled.

The search is sentence-transformers' `mine_hard_negatives`; here stand NV-Retriever's rules (arXiv 2407.15831)
as its arguments, BM25 as a teacher, texts that differ in case and spaces alone taken as one, and a bound on
memory.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives
from torch import Tensor
from transformers import set_seed

from uncausal.encoder.data.pairs import LABEL

logger = logging.getLogger(__name__)

SCORES_BYTES = 256 << 20  # scores of a chunk of queries against the whole corpus


@dataclass(kw_only=True)
class Mining:
    """Which candidates count as negatives, and how many of them are taken. Defaults are NV-Retriever's best.

    Args:
        num_negatives: a row gets so many; rows for which fewer are left are dropped, and counted.
        top_k: candidates considered, best first, once the positives are out.
        rank_shift: candidates skipped at the top.
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
            pairs: with the columns `anchor` and `positive`; an anchor may have several rows. Other columns
                stay.
            teacher: any sentence-transformers model or the name of one, or "bm25".
            corpus: documents beside the positives.

        Returns:
            The rows for which enough negatives were found.

        Raises:
            ValueError: no pair, no row with enough negatives, or several positives of one id or class.
        """
        rows = pairs.to_list()
        if not rows:
            raise ValueError("no pairs to mine negatives for")
        first_of: dict[str, str] = {}
        for row in rows:
            row["positive"] = first_of.setdefault(_folded(row["positive"]), row["positive"])
        documents = list(dict.fromkeys([first_of.setdefault(_folded(text), text) for text in corpus]))
        documents = [text for text in documents if text.strip()]
        model: Any = teacher
        if isinstance(teacher, str):
            model = BM25() if teacher.lower() == "bm25" else SentenceTransformer(teacher)
        check_ids(rows)
        size = len({*documents, *(row["positive"] for row in rows)})
        set_seed(self.seed)
        mined = mine_hard_negatives(
            Dataset.from_list([{"anchor": row["anchor"], "positive": row["positive"]} for row in rows]),
            model,
            anchor_column_name="anchor",
            positive_column_name="positive",
            corpus=documents or None,
            range_min=self.rank_shift,
            range_max=min(self.rank_shift + self.top_k, max(size - 1, 1)),
            relative_margin=self.relative_margin,
            absolute_margin=self.absolute_margin,
            max_score=self.max_score,
            num_negatives=self.num_negatives,
            sampling_strategy=self.sampling,
            query_prompt=self.query_prompt,
            corpus_prompt=self.document_prompt,
            output_format="n-tuple",
            faiss_batch_size=max(SCORES_BYTES // (4 * size), 1),
            verbose=False,
        )
        if self.num_negatives == 1:
            mined = mined.rename_column("negative_1", "negative")
        found = {(row["anchor"], row["positive"]): row for row in mined.to_list()}
        kept = [{**row, **found[key]} for row in rows if (key := (row["anchor"], row["positive"])) in found]
        logger.info("mined %d of %d rows; the others have fewer negatives", len(kept), len(rows))
        if not kept:
            raise ValueError(
                f"no row has {self.num_negatives} negatives among {size} documents: ask for fewer, raise "
                "top_k or lower the margin"
            )
        return Dataset.from_list(kept)


class BM25:
    """BM25 as a teacher for `mine_hard_negatives`: its "vectors" are row numbers of sparse matrices.

    The usual form (Robertson and Zaragoza 2009, equation 3.15), on lower-cased words.

    Args:
        k1: saturation of a word's count. b: share of the length normalisation.
    """

    device = torch.device("cpu")

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
        return np.arange(len(texts))[:, None]

    def encode_query(self, texts: list[str], **options: Any) -> np.ndarray:
        self.queries = (self.words.transform(texts) > 0).astype(np.float32).tocsr()
        return np.arange(len(texts))[:, None]

    def similarity(self, queries: Any, documents: Any) -> Tensor:
        """Scores (Q, N) of queries and documents given by their row numbers (Q, 1), (N, 1)."""
        chosen, among = (np.asarray(rows)[:, 0] for rows in (queries, documents))
        return torch.from_numpy((self.queries[chosen] @ self.documents[among].T).toarray())

    def similarity_pairwise(self, queries: Any, documents: Any) -> Tensor:
        """Scores (N,) of the pairs of queries (N, 1) and documents (N, 1)."""
        chosen, among = (np.asarray(rows)[:, 0] for rows in (queries, documents))
        products = self.queries[chosen].multiply(self.documents[among])
        return torch.from_numpy(np.asarray(products.sum(1), dtype=np.float32)[:, 0])


def check_ids(rows: list[dict[str, Any]]) -> None:
    """Refuse rows whose ids say that one's positive is right for another: it would be mined as a negative."""
    positive: dict[Any, tuple[str, str]] = {}
    for row in rows:
        this = row["anchor"], row["positive"]
        anchor, known = positive.setdefault(row.get(LABEL, row["anchor"]), this)
        if known != row["positive"] and anchor != row["anchor"]:
            raise ValueError(
                f"{anchor!r} and {row['anchor']!r} have one id or class and two positives, each of which "
                "would be mined as a negative of the other: leave the ids out, or train on the classes as "
                "they are, whose negatives are of other classes"
            )


def _folded(text: str) -> str:
    """Texts that agree in this are one document."""
    return " ".join(text.casefold().split())
