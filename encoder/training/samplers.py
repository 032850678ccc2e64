"""The order of the batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, count, islice
from typing import Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler


class LengthGrouped(DefaultBatchSampler):
    """Batches of texts of similar length, in random order: less padding where batches are padded."""

    WINDOW = 50  # batches sorted together

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any):
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last, **kwargs)
        columns = [dataset[name] for name in dataset.column_names if isinstance(dataset[0][name], str)]
        self.lengths = [sum(map(len, row)) for row in zip(*columns, strict=True)]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        if self.generator is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        size, batches = self.batch_size, []
        for start in range(0, len(order), self.WINDOW * size):
            window = sorted(order[start : start + self.WINDOW * size], key=self.lengths.__getitem__)
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == size]
        for index in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[index]


class WeightedSets(MultiDatasetDefaultBatchSampler):
    """Batches of one set each, in random order; a pass has `weight` times the batches of each set."""

    def __init__(self, *args: Any, weights: Sequence[float], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.counts = [
            max(round(weight * len(sampler)), 1)  # type: ignore[arg-type]
            for weight, sampler in zip(weights, self.batch_samplers, strict=True)
        ]

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[int]]:
        parts: Any = self.dataset.datasets
        sizes = list(map(len, parts))
        starts = [0, *accumulate(sizes)]
        schedule = torch.tensor([i for i, count in enumerate(self.counts) for _ in range(count)])
        order = torch.randperm(len(schedule), generator=self.generator)
        batches = [_passes(partial(self._one_pass, sampler)) for sampler in self.batch_samplers]
        for index in schedule[order].tolist():
            yield [starts[index] + row for row in next(batches[index])]

    def _one_pass(self, sampler: Any, number: int) -> Iterator[list[int]]:
        # Some samplers draw from their epoch alone: every pass of one epoch needs an epoch of its own.
        sampler.set_epoch(self.epoch + (number << 20))
        return iter(sampler)


class Blended(DefaultBatchSampler):
    """Batches of several sets that stand one after another; a pass has `weight` times the rows of each."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        *,
        sizes: Sequence[int],
        weights: Sequence[float],
        **kwargs: Any,
    ):
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last, **kwargs)
        self.sizes = sizes
        self.counts = [max(round(weight * size), 1) for weight, size in zip(weights, sizes, strict=True)]
        if sum(self.counts) < batch_size:
            raise ValueError(f"weights leave {sum(self.counts)} rows, fewer than a batch of {batch_size}")

    def __len__(self) -> int:
        return sum(self.counts) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        rows = []
        start = 0
        for size, wanted in zip(self.sizes, self.counts, strict=True):
            passes = [torch.randperm(size, generator=self.generator) for _ in range(-(-wanted // size))]
            rows.append(start + torch.cat(passes)[:wanted])
            start += size
        joined = torch.cat(rows)
        joined = joined[torch.randperm(len(joined), generator=self.generator)]
        yield from joined[: len(self) * self.batch_size].view(-1, self.batch_size).tolist()


class AllSteps(BatchSampler):
    """The batches of a whole run, pass after pass; the order of a pass follows from the seed and its number.

    A resumed run counts off the batches it has had; accelerate gives each process its part of every batch.
    """

    def __init__(self, passes: Any, steps: int):
        super().__init__(range(len(passes)), passes.batch_size, drop_last=True)  # pyright: ignore
        self.passes, self.steps = passes, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        return islice(_passes(self._one_pass), self.steps)

    def _one_pass(self, number: int) -> Iterator[list[int]]:
        self.passes.set_epoch(number)
        if self.passes.generator is not None:
            self.passes.generator.manual_seed(self.passes.seed + number)
        return iter(self.passes)


def _passes(one: Callable[[int], Iterator[list[int]]]) -> Iterator[list[int]]:
    """Batches without end: those of one(0), one(1), ..."""
    for number in count():
        batch = None
        for batch in one(number):
            yield batch
        if batch is None:
            raise ValueError("no batch can be drawn: too few rows without duplicates; lower batch_size")
