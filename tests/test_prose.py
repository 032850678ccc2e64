"""Pairs from running text."""

import pytest

from uncausal.encoder.data.prose import prose_pairs

FIRST = (
    "The heart pumps blood. It has four chambers. Each chamber fills and empties in turn, all day and night."
)
SECOND = (
    "A river carries water to the sea, and on its way it carries sand, which settles where the water slows."
)


def test_prose_pairs():
    documents = [("Organs", f"{FIRST}\n\nShort.\n\n{SECOND}"), ("", FIRST), ("Again", SECOND)]
    rows = list(prose_pairs(documents, min_words=15))
    titles = [(row["anchor"], row["positive"]) for row in rows if row["anchor"] == "Organs"]
    assert titles == [("Organs", FIRST), ("Organs", SECOND)]
    [cloze] = [row for row in rows if row["anchor"] != "Organs"]
    whole = [f"{s}." for s in FIRST.rstrip(".").split(". ")]
    assert cloze["anchor"] in whole
    assert cloze["positive"] == " ".join(s for s in whole if s != cloze["anchor"])
    assert (
        len({next(iter(prose_pairs(documents, ["cloze"], seed=s, min_words=9)))["anchor"] for s in range(9)})
        == 3
    )


def test_prose_pairs_lines_are_paragraphs_where_no_blank_line_is():
    rows = list(prose_pairs([("T", f"{FIRST}\n{SECOND}\n")], ["title"], min_words=15))
    assert [row["positive"] for row in rows] == [FIRST, SECOND]
    with pytest.raises(ValueError, match="'words'.*title, cloze"):
        list(prose_pairs([], ["words"]))  # pyright: ignore[reportArgumentType]
