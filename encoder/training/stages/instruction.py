"""NV-Embed's second stage: instruction tuning on blended tasks, each anchor against its own negatives alone.

Retrieval, classification, clustering and STS sets are mixed within a batch, so a batch's other positives may
be right answers: in-batch negatives are off (arXiv 2405.17428, section 4.2). Instructions stand before the
texts, are attended and never pooled.
"""

from dataclasses import dataclass
from typing import Any, Literal

from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from torch import nn

from uncausal.encoder.data.rows import DataError
from uncausal.encoder.training.stages.contrastive import Contrastive


@dataclass(kw_only=True)
class Instruction(Contrastive):
    """Contrast with each anchor's own hard negatives, over tasks blended within a batch.

    Every row needs at least one negative. Sets are blended by default (`blend`), so they need the same
    columns. Defaults are NV-Embed's second stage.
    """

    max_steps: int = 18000
    batch_size: int = 128
    learning_rate: float = 1.5e-5
    warmup_steps: int = 500
    weight_decay: float = 0.03
    lora_dropout: float = 0.1
    blend: bool = True
    hard_negatives: Literal["shared", "own"] = "own"
    in_batch_negatives: bool = False

    def prepare(self, encoder: SentenceTransformer, data: Any, loss: nn.Module | None = None) -> Any:
        dataset = super().prepare(encoder, data, loss)
        for name, part in dataset.items() if isinstance(dataset, DatasetDict) else [("", dataset)]:
            if not any(column.startswith("negative") for column in part.column_names):
                raise DataError(
                    f"{name}{': ' if name else ''}the instruction stage contrasts with each row's own "
                    f"negatives, and there is no column `negative` among {part.column_names}: mine some, or "
                    "use the contrastive stage"
                )
        return dataset
