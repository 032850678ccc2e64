"""Supervised contrastive learning on pairs, or triplets with hard negatives, and in-batch negatives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

from datasets import Dataset, DatasetDict, concatenate_datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS
from sentence_transformers.base.training_args import BatchSamplers
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import nn

from uncausal.encoder.data.pairs import (
    DOCUMENT_INSTRUCTION,
    INSTRUCTION,
    INSTRUCTIONS,
    LABEL,
    NEGATIVE_LABELS,
    read_pairs,
    text_columns,
)
from uncausal.encoder.data.rows import DataError
from uncausal.encoder.training.losses import InfoNCELoss
from uncausal.encoder.training.samplers import Blended, WeightedSets
from uncausal.encoder.training.stages.base import InfoNCEStage
from uncausal.encoder.training.trainer import StageTrainer


@dataclass(kw_only=True)
class Contrastive(InfoNCEStage):
    """Supervised contrastive learning on pairs, or triplets with hard negatives, and in-batch negatives.

    Args:
        columns: fields that hold the texts, anchor first; by default those of the usual names.
        negatives: take the first so many negatives of every row.
        min_score: take the rows whose score is at least this.
        weights: set name -> how many times its rows come per pass over all sets; 1 where not named.
        blend: batches of all sets together. False draws each batch from one set, so that what tells sets
            apart never tells a positive from the negatives.
        no_duplicates: no text occurs twice in a batch, where it would be its own negative.
        prompts: column name -> text put before each of its texts; attended, not pooled.
        instruction_template: makes the prompt of the texts that have an instruction: a row's `instruction` is
            of its anchor, its `document_instruction` of the others.
        hard_negatives: "shared" are negatives of every anchor in the batch, "own" of their row's alone.
        in_batch_negatives: False contrasts each anchor with its own negatives alone.
    """

    batch_size: int = 512
    learning_rate: float = 2e-4
    warmup_steps: int = 300
    temperature: float = 0.02
    columns: Sequence[str] | None = None
    negatives: int | None = None
    min_score: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    blend: bool = False
    no_duplicates: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    instruction_template: str = "Instruct: {instruction}\nQuery: "
    hard_negatives: Literal["shared", "own"] = "shared"
    in_batch_negatives: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.no_duplicates and (self.group_by_length or self.blend)
        self._require("no_duplicates", not both, "off with group_by_length or blend")
        self._require("blend", not (self.blend and self.group_by_length), "off with group_by_length")
        self._require("hard_negatives", self.hard_negatives in ("shared", "own"), "shared or own")
        paired = self.in_batch_negatives or not self.symmetric
        self._require(
            "symmetric", paired, "off without in_batch_negatives: a positive has no negatives of its own"
        )
        self._require("weights", all(w > 0 for w in self.weights.values()), "above 0 for every set")
        place = "{instruction}"
        self._require("instruction_template", place in self.instruction_template, f"with a place for {place}")

    @classmethod
    def l3prune(cls, **changes: Any) -> "Contrastive":
        """The setting of L3Prune (arXiv 2410.14578), which differs in the batch."""
        return cls(**{"batch_size": 64, **changes})

    def prepare(
        self, encoder: SentenceTransformer, data: Any, loss: nn.Module | None = None
    ) -> Dataset | DatasetDict:
        """The Dataset of a source for `read_pairs`, or a DatasetDict of several sets, checked.

        Raises:
            DataError: a row that is no pair, rows for less than a batch, a weight or prompt of nothing there.
        """
        dataset = read_pairs(
            data,
            columns=self.columns,
            negatives=self.negatives,
            min_score=self.min_score,
            # InfoNCE takes every pair for a positive, whatever its score.
            scored=loss is not None and not any(isinstance(part, InfoNCELoss) for part in loss.modules()),
            seed=self.seed,
        )
        sets: dict[Any, Dataset] = dict(dataset) if isinstance(dataset, DatasetDict) else {}
        for name in self.weights:
            if name not in sets:
                raise DataError(f"weights name the set {name!r}; there is {', '.join(sets) or 'no name'}")
        columns = {name for part in sets.values() or [dataset] for name in part.column_names}
        for name in self.prompts:
            if name not in columns:
                raise DataError(f"prompts name the column {name!r}; there is {', '.join(sorted(columns))}")
        if self.blend:
            self.check_size("the sets together hold", sum(map(len, sets.values())) or len(dataset))
            _check_alike(sets)
        else:
            for name, part in sets.items() or [("the data", dataset)]:
                self.check_size(f"the set {name!r} holds" if sets else "the data hold", len(part))
        return DatasetDict(_ids_apart(sets)) if sets else dataset

    def make_loss(self, encoder: SentenceTransformer, dataset: Any = None, **options: Any) -> nn.Module:
        """InfoNCE over the batch; rows of equal id or label are no negatives of each other.

        Nor is a negative of another row's whose class is the anchor's.
        """
        part = next(iter(dataset.values())) if isinstance(dataset, DatasetDict) else dataset
        return super().make_loss(
            encoder,
            hard_negatives=self.hard_negatives,
            in_batch_negatives=self.in_batch_negatives,
            gather_across_devices=self.in_batch_negatives,
            labels_as_ids=self.in_batch_negatives and part is not None and LABEL in part.column_names,
            **options,
        )

    def make_trainer(
        self, encoder: SentenceTransformer, dataset: Any, run: Path, loss: Any, **arguments: Any
    ) -> StageTrainer:
        if self.no_duplicates:
            arguments["batch_sampler"] = BatchSamplers.NO_DUPLICATES
        sets = dict(dataset) if isinstance(dataset, DatasetDict) else {"": dataset}
        prompts, sets = self._prompts(sets)
        if isinstance(dataset, DatasetDict):
            weights = [self.weights.get(str(name), 1.0) for name in sets]
            sizes = [len(part) for part in sets.values()]
            if self.blend:
                dataset = concatenate_datasets(list(sets.values()))
                arguments["batch_sampler"] = partial(Blended, sizes=sizes, weights=weights)
            else:
                dataset = DatasetDict(sets)
                if self.weights:
                    arguments["multi_dataset_batch_sampler"] = partial(WeightedSets, weights=weights)
        else:
            dataset = sets[""]
        collator = InstructedCollator(encoder.preprocess, prompts=dict(self.prompts), of_rows=prompts)
        return super().make_trainer(encoder, dataset, run, loss, data_collator=collator, **arguments)

    def _prompts(self, sets: dict[Any, Dataset]) -> tuple[list[str], dict[Any, Dataset]]:
        """The prompts, and the sets with a prompt's number in the place of each instruction."""
        told = {
            (name, side): part[side]
            for name, part in sets.items()
            for side in INSTRUCTIONS
            if side in part.column_names
        }
        if not told:
            return [], sets
        numbers = {text: i for i, text in enumerate(dict.fromkeys(["", *chain(*told.values())]))}
        numbered = {}
        for name, part in sets.items():
            bare = part.remove_columns([side for side in INSTRUCTIONS if (name, side) in told])
            for side in INSTRUCTIONS:
                of_rows = [numbers[text] for text in told.get((name, side), [""] * len(part))]
                bare = bare.add_column(side, of_rows)  # pyright: ignore[reportCallIssue]
            numbered[name] = bare
        made = [self.instruction_template.replace("{instruction}", text) if text else "" for text in numbers]
        return made, numbered


@dataclass
class InstructedCollator(SentenceTransformerDataCollator):
    """Puts before every text the prompt of its row's instruction, and behind its label those of negatives.

    Args:
        of_rows: the prompts that a row's instructions number; one for a column in `prompts` goes instead.
    """

    # what the library takes for a label it neither tokenises nor takes for a duplicate in a batch
    valid_label_columns: list[str] = field(
        default_factory=lambda: [*DEFAULT_LABEL_COLUMNS, *INSTRUCTIONS, NEGATIVE_LABELS]
    )
    of_rows: list[str] = field(default_factory=list)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        if features and NEGATIVE_LABELS in features[0]:
            features = [_labels_joined(row) for row in features]
        if not self.of_rows:
            return super().__call__(features)
        rows = [{name: row[name] for name in row if name not in INSTRUCTIONS} for row in features]
        prompts: dict[str, Any] = {}
        for name in rows[0]:
            side = INSTRUCTION if name == "anchor" else DOCUMENT_INSTRUCTION
            before = [self.of_rows[row[side]] for row in features]
            if any(before):
                prompts[name] = before[0] if len({*before}) == 1 else before
        return replace(self, prompts={**prompts, **cast(dict, self.prompts)}, of_rows=[])(rows)


def _labels_joined(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose label is a list: its own, and those of its negatives."""
    others = {name: value for name, value in row.items() if name != NEGATIVE_LABELS}
    return {**others, LABEL: [row[LABEL], *row[NEGATIVE_LABELS]]}


def _ids_apart(sets: dict[Any, Dataset]) -> dict[Any, Dataset]:
    """Give ids of different sets different numbers, and a number of its own to every row that has none."""
    there = {column for part in sets.values() for column in part.column_names}
    if LABEL not in there:
        return sets
    start, apart = 0, {}
    for name, part in sets.items():
        ids = part[LABEL] if LABEL in part.column_names else range(len(part))
        columns: dict[str, list[Any]] = {LABEL: [start + number for number in ids]}
        if NEGATIVE_LABELS in part.column_names:
            columns[NEGATIVE_LABELS] = [[start + n for n in numbers] for numbers in part[NEGATIVE_LABELS]]
        elif NEGATIVE_LABELS in there:  # of no class that is known
            columns[NEGATIVE_LABELS] = [[-1] * (len(text_columns(part)) - 2)] * len(part)
        start = max(columns[LABEL]) + 1
        rest = part.remove_columns([column for column in part.column_names if column in columns])
        for column, values in columns.items():
            rest = rest.add_column(column, values)  # pyright: ignore[reportCallIssue]
        apart[name] = rest
    return apart


def _check_alike(sets: dict[Any, Dataset]) -> None:
    """Refuse to blend sets of which one batch could not be made."""
    first = next(iter(sets), "")
    for name, part in sets.items():
        wanted, there = (set(text_columns(p)) for p in (sets[first], part))
        if wanted != there:
            odd = sorted(wanted ^ there)[0]
            raise DataError(f"blend: the sets {first!r} and {name!r} differ in the column {odd!r}")
