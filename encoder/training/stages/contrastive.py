"""Supervised contrastive learning on pairs, or triplets with a hard negative, and in-batch negatives."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.training_args import BatchSamplers

from uncausal.encoder.data.pairs import read_pairs
from uncausal.encoder.training.stages.base import LossFactory, PairStage
from uncausal.encoder.training.trainer import StageTrainer


@dataclass(kw_only=True)
class Contrastive(PairStage):
    """Supervised contrastive learning on pairs, or triplets with a hard negative, and in-batch negatives.

    Args:
        no_duplicates: no text occurs twice in a batch, where it would be its own negative.
        prompts: column name -> text put before each of its texts; attended, not pooled.
    """

    batch_size: int = 512
    learning_rate: float = 2e-4
    warmup_steps: int = 300
    temperature: float = 0.02
    no_duplicates: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.no_duplicates and self.group_by_length
        self._require("no_duplicates", not both, "off with group_by_length")

    @classmethod
    def l3prune(cls, **changes: Any) -> "Contrastive":
        """The setting of L3Prune (arXiv 2410.14578), which differs in the batch."""
        return cls(**{"batch_size": 64, **changes})

    def prepare(self, encoder: SentenceTransformer, data: Any) -> Dataset | DatasetDict:
        """Columns of texts: a source for `read_pairs`, rows, columns, a Dataset, or a dict of several."""
        return _pairs(read_pairs(data) if isinstance(data, str | Path) else data)

    def make_trainer(
        self,
        encoder: SentenceTransformer,
        dataset: Any,
        run: Path,
        loss: LossFactory | None,
        **arguments: Any,
    ) -> StageTrainer:
        if self.no_duplicates:
            arguments["batch_sampler"] = BatchSamplers.NO_DUPLICATES
        return super().make_trainer(encoder, dataset, run, loss, prompts=dict(self.prompts), **arguments)


def _pairs(data: Any) -> Dataset | DatasetDict:
    if isinstance(data, Dataset | DatasetDict):
        dataset = data
    elif isinstance(data, Mapping) and data and all(isinstance(v, Mapping | Dataset) for v in data.values()):
        dataset = DatasetDict({name: _pairs(value) for name, value in data.items()})
    elif isinstance(data, Mapping):
        dataset = Dataset.from_dict({name: list(texts) for name, texts in data.items()})
    else:
        rows = [tuple(row) for row in data]
        names = ("anchor", "positive", "negative")
        columns = zip(*rows, strict=True) if rows else ()
        dataset = Dataset.from_dict({n: list(c) for n, c in zip(names, columns, strict=False)})
    for part in dataset.values() if isinstance(dataset, DatasetDict) else [dataset]:
        if len(part) < 2 or len(part.column_names) < 2:
            raise ValueError(
                f"contrastive training needs at least 2 rows of (anchor, positive); found {len(part)} rows "
                f"with the columns {part.column_names}"
            )
    return dataset
