"""Unsupervised SimCSE: a sentence twice, under two draws of attention dropout (LLM2Vec, section 2.3)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import nn

from uncausal.encoder.data.texts import read_texts
from uncausal.encoder.training.stages.base import InfoNCEStage
from uncausal.encoder.training.trainer import StageTrainer


@dataclass(kw_only=True)
class SimCSE(InfoNCEStage):
    """Unsupervised contrastive learning: the same sentence twice, under two draws of attention dropout.

    Args:
        attention_dropout: on the attention probabilities, for this stage alone.
    """

    batch_size: int = 128
    learning_rate: float = 3e-5
    max_length: int = 128
    attention_dropout: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("batch_size", self.batch_size >= 2, "at least 2, for sentences to tell apart")
        self._require("attention_dropout", 0 <= self.attention_dropout < 1, "in [0, 1)")

    def prepare(self, encoder: SentenceTransformer, data: Any, loss: nn.Module | None = None) -> Dataset:
        """One column of sentences, of texts or of a source for `read_texts`."""
        texts = read_texts(data) if isinstance(data, str | Path) else data
        kept = [text for text in texts if text.strip()]
        self.check_size("the data hold", len(kept))
        return Dataset.from_dict({"text": kept})

    @contextmanager
    def conditions(self, encoder: SentenceTransformer) -> Iterator[None]:
        """As in other stages, with attention dropout."""
        backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
        with super().conditions(encoder), attention_dropout(backbone, self.attention_dropout):
            yield

    def make_trainer(
        self, encoder: SentenceTransformer, dataset: Any, run: Path, loss: nn.Module | None, **arguments: Any
    ) -> StageTrainer:
        collator = TwinCollator(encoder.preprocess)
        return super().make_trainer(encoder, dataset, run, loss, data_collator=collator, **arguments)


class TwinCollator(SentenceTransformerDataCollator):
    """SimCSE's pairs: each sentence tokenised once and used as anchor and as positive."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.preprocess_fn([row["text"] for row in features])
        return {f"{side}_{key}": value for side in ("anchor", "positive") for key, value in batch.items()}


@contextmanager
def attention_dropout(backbone: Any, p: float) -> Iterator[None]:
    """Set the dropout of the attention probabilities for a while, where every module reads it.

    Attention modules copy the configuration's value when they are built (a float in Llama, an nn.Dropout in
    GPT-2, called `dropout` in OPT); some read it at each call: both are set. Falcon ignores it: refused.

    Raises:
        ValueError: the dropout does not change what the model computes in training mode.
    """
    names = ("attention_dropout", "attn_dropout", "attn_pdrop", "attn_dropout_p")
    saved: list[tuple[Any, str, float]] = []
    for owner in (backbone.config, *backbone.modules()):
        attention = type(owner).__name__.endswith("Attention")
        for name in (*names, "dropout") if attention else names:
            value = getattr(owner, name, None)
            if isinstance(value, nn.Dropout):
                saved.append((value, "p", value.p))
            elif isinstance(value, float | int) and not isinstance(value, bool):
                saved.append((owner, name, value))
    try:
        _set(saved, p)
        if p > 0:
            _assert_dropout_acts(backbone, p, saved)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


@torch.no_grad()
def _assert_dropout_acts(backbone: Any, p: float, saved: list[tuple[Any, str, float]]) -> None:
    device = next(backbone.parameters()).device
    ids = torch.arange(16, device=device)[None] % backbone.config.get_text_config().vocab_size
    outputs = []
    training = backbone.training
    backbone.train()
    # The same seed with and without, so that another dropout of the model cannot pass for this one.
    for value in (p, 0.0):
        _set(saved, value)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            outputs.append(backbone(input_ids=ids, use_cache=False).last_hidden_state)
    backbone.train(training)
    _set(saved, p)
    if torch.equal(*outputs):
        raise ValueError(
            f"attention dropout {p} has no effect on {type(backbone).__name__} with "
            f"{backbone.config._attn_implementation!r} attention: both views of a text would be the same"
        )


def _set(places: list[tuple[Any, str, float]], p: float) -> None:
    for owner, name, _ in places:
        setattr(owner, name, p)
