"""The order of the batches."""

from collections.abc import Iterator
from typing import Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler


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
