"""The order of the batches."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import ConcatDataset, RandomSampler

from uncausal.encoder.training.samplers import AllSteps, Blended, LengthGrouped, WeightedSets


def test_length_grouped_batches():

    data = Dataset.from_dict({"text": ["x" * (1 + i * 7 % 100) for i in range(1000)]})
    sampler = LengthGrouped(data, 10, False, generator=torch.Generator(), seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 100 and sorted(sum(batches, [])) == list(range(1000))
    spreads = [max(len(data[i]["text"]) for i in b) - min(len(data[i]["text"]) for i in b) for b in batches]
    assert sum(spreads) / len(spreads) < 10  # 100 lengths: random batches of ten spread over about 82
    sampler.set_epoch(1)
    assert list(sampler) != batches


def weighted(seed=0):
    """Three sets of 12, 4 and 6 rows in batches of two, with weights 1, 2 and 0.5."""
    sets = [range(12), range(4), range(6)]
    generator = torch.Generator()
    inner = [
        DefaultBatchSampler(RandomSampler(part, generator=generator), batch_size=2, drop_last=True)
        for part in sets
    ]
    whole = ConcatDataset(sets)  # pyright: ignore[reportArgumentType]
    return WeightedSets(whole, inner, generator, seed, weights=[1, 2, 0.5])


def test_weighted_sets_by_hand():
    """6, 2 x 2 and 3 / 2 batches a pass, each of one set; a set without a weight has every row once."""
    batches = list(AllSteps(weighted(), 12))
    kinds = [{(row >= 12) + (row >= 16) for row in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert [sum(kind == {k} for kind in kinds) for k in range(3)] == [6, 4, 2]
    rows = sorted(row for batch in batches for row in batch)
    assert [rows.count(row) for row in range(16)] == [1] * 12 + [2] * 4
    assert kinds != sorted(kinds, key=min)


def test_a_set_of_weight_two_is_batched_anew():
    """A sampler that draws from its epoch's number gave the same batches again."""
    rows = Dataset.from_dict({"text": ["x" * (1 + i % 4) for i in range(64)]})
    generator = torch.Generator()
    inner = LengthGrouped(rows, 2, True, generator=generator)
    sampler = WeightedSets(ConcatDataset([rows]), [inner], generator, 0, weights=[2])  # pyright: ignore
    batches = [frozenset(batch) for batch in AllSteps(sampler, 128)]
    assert len(set(batches)) > 100 and sorted(sum(map(list, batches[:64]), [])) == sorted([*range(64)] * 2)


def blended(seed=0):
    options = {"sizes": [12, 4, 6], "weights": [1, 2, 0.5], "generator": torch.Generator(), "seed": seed}
    return Blended(range(22), 4, True, **options)


def test_blended_by_hand():
    """12, 2 x 4 and 6 / 2 rows a pass, 23 in five batches of four; batches mix the sets."""
    batches = list(AllSteps(blended(), 5))
    rows = [row for batch in batches for row in batch]
    assert all(len(batch) == 4 for batch in batches) and len(rows) == 20
    assert all(rows.count(row) <= 1 for row in (*range(12), *range(16, 22)))
    assert all(rows.count(row) <= 2 for row in range(12, 16)) and sum(row >= 16 for row in rows) <= 3
    assert any(len({(row >= 12) + (row >= 16) for row in batch}) > 1 for batch in batches)
    one = Blended(range(22), 1, True, sizes=[12, 4, 6], weights=[1, 2, 0.5], generator=torch.Generator())
    rows = [row for (row,) in one]
    assert [rows.count(row) for row in range(16)] == [1] * 12 + [2] * 4 and len(rows) == 23
    with pytest.raises(ValueError, match="weights leave 2 rows, fewer than a batch of 4"):
        Blended(range(4), 4, True, sizes=[4], weights=[0.5])


@pytest.mark.parametrize("make", [weighted, blended])
def test_order_follows_from_the_seed_and_the_number_of_the_batch(make):
    """Whatever was drawn before; and another pass, like another seed, has another order."""
    first = list(AllSteps(make(), 24))
    sampler = AllSteps(make(), 24)
    next(iter(sampler))
    assert list(sampler) == first == list(AllSteps(make(), 24))
    half = len(make())
    assert first[:half] != first[half : 2 * half] and first != list(AllSteps(make(seed=1), 24))


def test_sampler_that_can_draw_no_batch_is_refused():
    """It drew empty passes without end."""
    empty = DefaultBatchSampler(RandomSampler(range(3)), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="no batch can be drawn"):
        next(iter(AllSteps(empty, 1)))
