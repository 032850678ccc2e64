"""Distillation: the encoder learns the vectors that a teacher gives its texts (LEAF, arXiv 2509.12539)."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn
from tqdm.auto import tqdm

from uncausal.encoder.data.rows import DataError
from uncausal.encoder.data.texts import read_texts
from uncausal.encoder.files import staged_file
from uncausal.encoder.loading import load_model, local_path
from uncausal.encoder.training.ranks import together
from uncausal.encoder.training.stages.base import PairStage, trained_width
from uncausal.encoder.whitening import LinearMap, append_linear, unnormalized
from uncausal.kernels.latent_pooling import kept_folds

logger = logging.getLogger(__name__)

FITTED = 4096  # texts that the map's start is fitted to
CHUNK, PARTS = 1024, ".parts"  # texts whose vectors are written at a time, and where, until all are there


@dataclass(kw_only=True)
class Distill(PairStage):
    """Plain L2 between unit vectors, in small batches, without negatives: LEAF's recipe.

    A linear map, appended to the encoder, trained along and saved with it, takes the student's vectors to the
    teacher's space. It starts as the ridge regression between the two, which is worth many steps.
    To let an encoder teach its own pruned self, save it before pruning and name that folder as teacher.

    Args:
        teacher: any sentence-transformers model, by name or folder; "package:NAME/FOLDER" is one that an
            installed package carries. A decoder's is packed, in bf16 where the hardware multiplies it. Of
            several the unit vectors are put side by side: their cosines are averaged.
        vectors: .npy file of the teacher's vectors, a row a text. Written if it is not there; it must be
            where no teacher is named.
        teacher_prompt: put before every text for the teacher alone.
        teacher_max_length: tokens of a text that the teacher reads; its own limit by default.
        linear_map: whether to append the map (one that the encoder ends with is absorbed); by default where
            the dimensions differ.
    """

    teacher: str | Sequence[str] | None = None
    vectors: str | None = None
    teacher_prompt: str | None = None
    teacher_max_length: int | None = None
    linear_map: bool | None = None
    batch_size: int = 32
    learning_rate: float = 1e-4
    max_length: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is not None and not isinstance(self.teacher, str):
            several = isinstance(self.teacher, list | tuple) and self.teacher
            named = bool(several) and all(isinstance(name, str) for name in self.teacher)
            self._require("teacher", named, "a model's name or folder, or a list of them")
            self.teacher = list(self.teacher)
        known = bool(self.teacher) or self.vectors is not None
        self._require("teacher", known, "a model's name or folder, or vectors=FILE.npy must be given")
        length = self.teacher_max_length
        self._require("teacher_max_length", length is None or length > 0, "above 0")

    def prepare(self, encoder: SentenceTransformer, data: Any, loss: nn.Module | None = None) -> Dataset:
        """Texts, or a source for `read_texts`, beside the teacher's unit vectors; may append the map."""
        given = read_texts(data) if isinstance(data, str | Path) else data
        texts = [text for text in given if text.strip()]
        if not texts:
            raise DataError("Distill needs texts; found none")
        self.check_size("the data hold", len(texts))
        targets = self.targets(texts, str(encoder.device))
        width, wanted = trained_width(encoder), targets.shape[1]
        mapped = width != wanted if self.linear_map is None else self.linear_map
        if width != wanted and not mapped:
            raise ValueError(
                f"linear_map=False, but the encoder has {width} dimensions, the teacher {wanted}"
            )
        if mapped:
            logger.info("fitting a linear map from %d to the teacher's %d features", width, wanted)
            append_linear(encoder, self._fitted_map(encoder, texts, targets))
        return Dataset.from_dict({"text": texts, "label": list(targets)})

    def _fitted_map(self, encoder: SentenceTransformer, texts: list[str], targets: np.ndarray) -> LinearMap:
        """The linear map from the untrained student's vectors to the targets, by ridge regression."""
        chosen = np.random.default_rng(self.seed).permutation(len(texts))[:FITTED]
        with self.conditions(encoder), unnormalized(encoder):
            encoder.eval()
            vectors = encoder.encode([texts[i] for i in chosen], convert_to_numpy=True)
        scale = vectors.std(axis=0).mean()
        ridge = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(vectors / scale, targets[chosen])
        added = LinearMap.empty(vectors.shape[1], targets.shape[1])
        added.linear.weight.data.copy_(torch.from_numpy(ridge.coef_ / scale))
        added.linear.bias.data.copy_(torch.from_numpy(np.asarray(ridge.intercept_)))
        return added

    def targets(self, texts: list[str], device: str) -> np.ndarray:
        """The teacher's unit vectors (n, D) float32, from the file where it holds those of these texts."""
        vectors = self._taught(texts, device) if self.vectors is None else self._kept(texts, device)
        norms = np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            bad = int(np.flatnonzero(~(norms[:, 0] > 0) | ~np.isfinite(norms[:, 0]))[0])
            raise DataError(f"the teacher's vector of text {bad} is zero or not finite: {texts[bad][:60]!r}")
        return vectors.astype(np.float32) / norms

    def _kept(self, texts: list[str], device: str) -> np.ndarray:
        """What the file of vectors holds; the first process writes it where there is none."""
        file, digest = Path(str(self.vectors)), text_digest(texts)
        with together():
            if PartialState().is_main_process and not file.exists():
                if self.teacher is None:
                    raise FileNotFoundError(f"no such file of vectors: {file}; name a teacher to write it")
                note = json.dumps({**self._teacher(), "texts": digest}).encode()
                parts = file.with_name(f".{file.name}.{hashlib.sha256(note).hexdigest()[:16]}{PARTS}")
                vectors = self._taught(texts, device, parts)
                with staged_file(_note(file)) as out:  # first: vectors without a note would be anyone's
                    out.write(note)
                with staged_file(file) as out:
                    np.save(out, vectors)
                for parts in file.parent.glob(f".{escape(file.name)}.*{PARTS}"):
                    shutil.rmtree(parts)
        try:
            vectors = np.load(file)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file}: not a .npy file of vectors ({error})") from None
        if vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise ValueError(f"{file}: expected a row of floats a text, got {vectors.dtype} {vectors.shape}")
        note = _note(file)
        written_for = json.loads(note.read_text()).get("texts") if note.exists() else digest
        if self.teacher is not None and note.exists() and not self.wrote(file):
            raise ValueError(
                f"{file}: holds the vectors of another teacher than {self.teacher!r}, or with another "
                "prompt; name another file or remove it"
            )
        if len(vectors) != len(texts) or written_for != digest:
            raise ValueError(
                f"{file}: holds the vectors of {len(vectors)} other texts, not of these {len(texts)}; "
                "name another file or remove it"
            )
        return vectors

    def wrote(self, file: Path) -> bool:
        """Whether a file holds vectors of this stage's teacher."""
        note = _note(file)
        if not (file.exists() and note.exists()):
            return False
        known, wanted = json.loads(note.read_text()), self._teacher()
        weights = [told.pop("weights", None) for told in (known, wanted)]
        if {name: known.get(name) for name in wanted} != wanted:
            return False
        if len(self.teachers) == 1:
            weights = [[each] for each in weights]
        # of a teacher whose files are not here its name has to do
        return all(a == b for a, b in zip(*(each or [] for each in weights), strict=False) if a and b)

    def _teacher(self) -> dict[str, Any]:
        """Whose vectors these are."""
        weights: Any = [_weights_of(name) for name in self.teachers]
        read = {"prompt": self.teacher_prompt, "max_length": self.teacher_max_length}
        several = len(self.teachers) > 1
        return {"teacher": self.teacher, "weights": weights if several else (weights or [None])[0], **read}

    @property
    def teachers(self) -> list[str]:
        """The names of all teachers."""
        named = self.teacher or []
        return [named] if isinstance(named, str) else list(named)

    def _taught(self, texts: list[str], device: str, parts: Path | None = None) -> np.ndarray:
        """The teacher's vectors as it gives them, or the unit vectors of several side by side; float32.

        An interrupted call goes on with what it has written in the folder `parts`.
        """
        taught = []
        with tqdm(total=len(texts) * len(self.teachers), desc="Teacher's vectors", unit="text") as bar:
            for number, name in enumerate(self.teachers):
                teacher, vectors = None, []
                for start in range(0, len(texts), CHUNK):
                    chunk = texts[start : start + CHUNK]
                    part = parts and parts / f"{number}-{start}-{len(chunk)}.npy"
                    if part is None or not part.exists():
                        teacher = self._loaded(name, device) if teacher is None else teacher
                        vectors.append(self._encoded(teacher, chunk))
                        if part is not None:
                            with staged_file(part) as out:
                                np.save(out, vectors[-1])
                    else:
                        vectors.append(np.load(part))
                    bar.update(len(chunk))
                taught.append(np.concatenate(vectors))
        if len(taught) == 1:
            return taught[0]
        return np.concatenate([each / np.linalg.norm(each, axis=1, keepdims=True) for each in taught], axis=1)

    def _loaded(self, name: str, device: str) -> SentenceTransformer:
        teacher, limit = load_model(name, device=device), self.teacher_max_length
        if limit is not None:
            teacher.max_seq_length = min(limit, teacher.max_seq_length or limit)
        return teacher

    def _encoded(self, teacher: SentenceTransformer, texts: list[str]) -> np.ndarray:
        options: Any = {"convert_to_numpy": True, "show_progress_bar": False}
        return teacher.encode(texts, prompt=self.teacher_prompt, **options).astype(np.float32)

    def make_loss(self, encoder: SentenceTransformer, dataset: Any = None) -> nn.Module:
        return UnitDistance(encoder, self.mini_batch_size if self.embeds_twice else None)


class UnitDistance(CachedLossMixin, nn.Module):
    """The squared distance of unit vectors, 2 - 2 cos, between the encoder's and its targets.

    Args:
        model: the encoder.
        mini_batch_size: texts embedded at a time, by GradCache; all at once by default.
    """

    def __init__(self, model: SentenceTransformer, mini_batch_size: int | None = None):
        super().__init__()
        self.model = model
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size or 0, None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the mean over the batch; labels are (B, D) unit vectors."""
        if self.mini_batch_size:
            with kept_folds(self.model):  # in its first pass
                return self.forward_cached(sentence_features, labels)
        [features] = sentence_features
        return self._distance(self.model(features)["sentence_embedding"], labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of cached embeddings, one column of mini-batches."""
        loss = self._distance(torch.cat(reps[0]), labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _distance(self, vectors: Tensor, labels: Tensor) -> Tensor:
        vectors = F.normalize(vectors.float(), dim=1)
        return (vectors - labels.to(vectors)).square().sum(1).mean()


def text_digest(texts: Iterable[str]) -> str:
    """Return a digest of texts and their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:16]


def _weights_of(teacher: str) -> Any:
    """What tells a teacher's weights from others; beside a folder that a recipe saved it is written."""
    written = Path(f"{teacher}.json")
    if written.is_file():
        return written.read_text()
    try:
        place = local_path(teacher)
    except FileNotFoundError:  # a package that is no longer installed
        return []
    files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))  # none of a name of the hub
    return [[str(f.relative_to(place)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _note(file: Path) -> Path:
    """What stands beside a file of vectors: whose they are."""
    return file.with_name(f"{file.name}.json")
