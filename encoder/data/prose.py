"""Pairs from running text: a title and a paragraph, a sentence and the rest of its paragraph."""

import random
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, get_args

from uncausal.encoder.data.duplicates import NearDuplicates
from uncausal.encoder.data.texts import sentences

ProseKind = Literal["title", "cloze"]


def prose_pairs(
    documents: Iterable[tuple[str, str]],
    kinds: Collection[ProseKind] = ("title", "cloze"),
    *,
    min_words: int = 20,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Make pairs of each document's paragraphs, one of each kind, no paragraph much like an earlier one.

    "title" pairs the document's title with the paragraph; "cloze" one of its sentences, drawn at random, with
    the other sentences (the inverse cloze task: Lee, Chang and Toutanova 2019).

    Args:
        documents: title and text; paragraphs are separated by blank lines, or are lines if there is none.
        kinds: which pairs to make; a document without a title makes no title pair.
        min_words: a shorter paragraph is left out.
        seed: of the draws.

    Returns:
        Rows of anchor, positive and name (the title).
    """
    if unknown := set(kinds) - set(get_args(ProseKind)):
        raise ValueError(f"kinds {sorted(unknown)} are unknown: choose from {', '.join(get_args(ProseKind))}")
    known, draw = NearDuplicates(), random.Random(seed)
    for title, text in documents:
        for paragraph in re.split(r"\n\s*\n" if re.search(r"\S\s*\n\s*\n\s*\S", text) else r"\n", text):
            paragraph = " ".join(paragraph.split())
            if len(paragraph.split()) < min_words or known.seen(paragraph):
                continue
            if "title" in kinds and title.strip():
                yield {"anchor": title.strip(), "positive": paragraph, "name": title}
            found = list(sentences(paragraph)) if "cloze" in kinds else []
            if len(found) > 1:
                anchor = found.pop(draw.randrange(len(found)))
                yield {"anchor": anchor, "positive": " ".join(found), "name": title}
