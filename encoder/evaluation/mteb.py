"""Through the `mteb` package (extra `mteb`): its tasks by name, and the mini suite's sets as tasks of its.

The local tasks need no network. On STS, retrieval, reranking and pair classification they give the scores of
the suite itself; on classification and clustering MTEB's probe and k-means are others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb import AbsTask, TaskMetadata
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.results import ModelResult
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from uncausal.encoder.evaluation.compare import no_prompt
from uncausal.encoder.evaluation.sts import ScoredPair
from uncausal.encoder.evaluation.tasks import (
    QUERY,
    STS,
    Classification,
    Clustering,
    PairClassification,
    Reranking,
    Retrieval,
    Task,
)
from uncausal.encoder.model import Encoder

SPLIT = "test"  # the only split that a local task has, whichever of the suite it was made of
NAMES = {"dev": ("dev", "validation")}  # what MTEB's tasks call a split, where not by its name


class InstructedEncoder(SentenceTransformerEncoderWrapper):
    """A model under MTEB's encoder protocol; instructions go before queries, never before documents.

    Args:
        model: any sentence-transformers model.
        instruct: template such as `compare.INSTRUCT`; None leaves prompts to the model's own.
    """

    def __init__(self, model: SentenceTransformer, instruct: str | None = None) -> None:
        super().__init__(model)
        self.instruct = instruct

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode the texts of MTEB's data loader, in one call."""
        if self.instruct is None:
            where = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            return super().encode(inputs, **where, prompt_type=prompt_type, **kwargs)
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type == PromptType.document:
            return self.model.encode(texts, prompt=no_prompt(self.model), **kwargs)
        instruction = self.get_instruction(task_metadata, prompt_type)
        return self.model.encode(texts, prompt=self.instruct.format(instruction=instruction), **kwargs)


def evaluate_mteb(
    model: SentenceTransformer,
    names: Sequence[str],
    local: Sequence[Task] = (),
    *,
    split: str | None = None,
    instruct: str | None = None,
    **encode_options: Any,
) -> ModelResult:
    """Run MTEB tasks on a model, without MTEB's cache of results.

    Args:
        model: any sentence-transformers model.
        names: of MTEB's tasks, which are fetched from the hub, or of tasks in `local`.
        local: tasks such as `mini_suite(data_dir)`.
        split: of MTEB's tasks, as `find_task` takes it.
        instruct: template such as `compare.INSTRUCT`, put before queries.
        **encode_options: of `encode`, such as batch_size.

    Returns:
        MTEB's result; `main_scores` reads it.

    Raises:
        KeyError, ValueError: as `find_task`.
    """
    own = {task.name: task for task in local}
    tasks = [local_task(own[name]) if name in own else find_task(name, split) for name in names]
    encoder: Any = InstructedEncoder(model, instruct)
    options: Any = {"batch_size": 32, "show_progress_bar": False, **encode_options}
    if isinstance(model, Encoder):  # some of MTEB's corpora have empty documents
        options = {"on_empty": "zero", **options}
    return mteb.evaluate(encoder, tasks, cache=None, encode_kwargs=options, show_progress_bar=False)


def find_task(name: str, split: str | None = None) -> AbsTask:
    """Return one of MTEB's tasks, to be scored on a split: "train", "dev" or "test"; None is all that it has.

    Raises:
        KeyError: no task of that name.
        ValueError: MTEB scores it on other splits.
    """
    task = mteb.get_task(name)
    if split is None:
        return task
    scored = task.metadata.eval_splits
    found = [one for one in NAMES.get(split, (split,)) if one in scored]
    if not found:
        raise ValueError(
            f"{name}: MTEB has no {split} split of it to score, only {', '.join(scored)}: choose another, or "
            "none for all"
        )
    return task.filter_eval_splits(found)


def main_scores(result: ModelResult) -> dict[str, float]:
    """Return the main score of every task in points, subsets averaged."""
    return {task.task_name: 100 * float(task.get_score()) for task in result.task_results}


def local_task(task: Task) -> AbsTask:
    """Return a task of the mini suite as one of MTEB's, its data already loaded."""
    for kind, make in _MAKERS.items():
        if isinstance(task, kind):
            return make(task)
    raise TypeError(f"MTEB has no kind of task for {type(task).__name__}")


class LocalSTS(AbsTaskSTS):
    """STS; the parts of the set are MTEB's subsets."""

    def __init__(self, task: STS) -> None:
        subsets = {part or "default": _pair_columns(pairs, "score") for part, pairs in task.parts.items()}
        self.dataset = {part: DatasetDict({SPLIT: Dataset.from_dict(rows)}) for part, rows in subsets.items()}
        self.metadata = _metadata(task, "STS", "cosine_spearman", subsets=list(subsets))
        self.data_loaded = True
        super().__init__()


class LocalPairClassification(AbsTaskPairClassification):
    """Pair classification."""

    def __init__(self, task: PairClassification) -> None:
        rows = _pair_columns(task.pairs, "labels")
        rows["labels"] = [int(label) for label in rows["labels"]]
        self.dataset = {"default": DatasetDict({SPLIT: Dataset.from_dict(rows)})}
        self.metadata = _metadata(task, "PairClassification", "cosine_ap")
        self.data_loaded = True
        super().__init__()


class LocalRetrieval(AbsTaskRetrieval):
    """Retrieval; and reranking, where every query has its own candidates."""

    def __init__(self, task: Retrieval | Reranking) -> None:
        if isinstance(task, Retrieval):
            self.metadata = _metadata(task, "Retrieval", "ndcg_at_10")
            queries, documents, relevant, candidates = task.queries, task.documents, task.relevant, None
        else:
            self.metadata = _metadata(task, "Reranking", "map_at_1000")
            queries, documents, relevant, candidates = {}, {}, {}, {}
            for number, sample in enumerate(task.samples):
                query = f"q{number}"
                queries[query] = sample["query"]
                texts = [*sample["positive"], *sample["negative"]]
                candidates[query] = [f"{query}.{place}" for place in range(len(texts))]
                documents.update(zip(candidates[query], texts, strict=True))
                relevant[query] = candidates[query][: len(sample["positive"])]
        data: Any = {
            "queries": Dataset.from_list([{"id": id, "text": text} for id, text in queries.items()]),
            "corpus": Dataset.from_list([{"id": id, "text": text} for id, text in documents.items()]),
            "relevant_docs": {query: dict.fromkeys(ids, 1) for query, ids in relevant.items()},
            "top_ranked": candidates,
        }
        self.dataset = {"default": {SPLIT: data}}
        self.data_loaded = True
        super().__init__()


class LocalClassification(AbsTaskClassification):
    """Classification on a few examples a label, by MTEB's own probe."""

    def __init__(self, task: Classification) -> None:
        labels = sorted({label for _, label in task.test})
        splits: dict[Any, Dataset] = {
            split: Dataset.from_dict(
                {"text": [text for text, _ in rows], "label": [labels.index(label) for _, label in rows]}
            )
            for split, rows in (("train", task.train), (SPLIT, task.test))
        }
        self.samples_per_label, self.n_experiments = task.shots, task.draws
        self.dataset = {"default": DatasetDict(splits)}
        self.metadata = _metadata(task, "Classification", "accuracy")
        self.data_loaded = True
        super().__init__()


class LocalClustering(AbsTaskClustering):
    """Clustering, by MTEB's own k-means over draws of the texts."""

    max_fraction_of_documents_to_embed = None

    def __init__(self, task: Clustering) -> None:
        rows = {"sentences": list(task.documents), "labels": list(task.labels)}
        self.dataset = {"default": DatasetDict({SPLIT: Dataset.from_dict(rows)})}
        self.metadata = _metadata(task, "Clustering", "v_measure")
        self.data_loaded = True
        super().__init__()


_MAKERS: Mapping[type[Task], Any] = {
    STS: LocalSTS,
    PairClassification: LocalPairClassification,
    Retrieval: LocalRetrieval,
    Reranking: LocalRetrieval,
    Classification: LocalClassification,
    Clustering: LocalClustering,
}


def _pair_columns(pairs: Sequence[ScoredPair], score: str) -> dict[str, list[Any]]:
    return {
        "sentence1": [pair.first for pair in pairs],
        "sentence2": [pair.second for pair in pairs],
        score: [pair.score for pair in pairs],
    }


def _metadata(task: Task, kind: Any, main_score: str, subsets: Sequence[str] = ("default",)) -> TaskMetadata:
    one_sided = list(task.texts()) == [QUERY]
    prompt: Any = task.instruction if one_sided else {"query": task.instruction}
    return TaskMetadata(
        name=task.name,
        description=f"{task.name} of uncausal's mini suite",
        type=kind,
        dataset={"path": f"local/{task.name}", "revision": "local"},
        prompt=prompt or None,
        eval_splits=[SPLIT],
        eval_langs={part: ["eng-Latn"] for part in subsets} if len(subsets) > 1 else ["eng-Latn"],
        main_score=main_score,
    )
