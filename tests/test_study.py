"""The study: its table, a cell from the model to the file, what goes on after an interruption, the page."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from uncausal.bench.trials import study, study_cells, study_report
from uncausal.bench.trials.study_report import FAILS, HOLDS, MISSING, OPEN, render, verdict
from uncausal.bench.trials.study_results import Results, Settings, drawn
from uncausal.encoder.data.local import local_rows
from uncausal.encoder.evaluation.compare import Measured, compare
from uncausal.encoder.evaluation.sts import ScoredPair
from uncausal.encoder.evaluation.tasks import STS, Clustering, Measurement
from uncausal.encoder.model import Encoder
from uncausal.encoder.training.recipes import Step
from uncausal.encoder.training.stages.instruction import Instruction

PARAGRAPH = "Plants make energy from sunlight. The process takes place in the leaves of the plant."
TEXTS = [
    f"{subject} {verb}" for subject in ("a cat", "a dog", "the king") for verb in ("sees", "runs", "eats")
]
TABLE = (11, (3, 11, 30))


@pytest.mark.parametrize(
    "differences, margin, expected",
    [
        ([[2.0, 0.5, 3.5]], 0, HOLDS),
        ([[2.0, -0.5, 4.5]], 0, OPEN),
        ([[-2.0, -3.5, -0.5]], 0, FAILS),
        ([[2.0, 0.5, 3.5], [1.0, 0.2, 1.8]], 0, HOLDS),
        ([[2.0, 0.5, 3.5], [0.1, -0.7, 0.9]], 0, OPEN),
        ([[0.1, -0.7, 0.9], [-1.0, -1.8, -0.2]], 0, FAILS),  # one pair the wrong way round is enough
        ([[-0.4, -0.9, 0.1]], 1, HOLDS),  # costs at most a point, by the whole interval
        ([[-0.6, -1.2, 0.0]], 1, OPEN),
        ([[-2.0, -2.9, -1.1]], 1, FAILS),
        ([[2.0, 0.5, 3.5], None], 0, MISSING),
    ],
)
def test_verdict(differences, margin, expected):
    assert verdict(differences, margin) == expected


def test_every_name_in_the_table_is_there():
    models, cells, claims = study_cells.models(*TABLE), study_cells.cells(*TABLE), study_cells.claims(*TABLE)
    seen = set()
    for name, model in models.items():
        assert model.base is None or model.base in seen, f"{name} comes before its base"
        seen.add(name)
    for name, cell in cells.items():
        assert cell.model in models and cell.baseline in cells, name
    for claim in claims:
        for cell in (cell for pair in claim.pairs for cell in pair):
            name, _, size = cell.partition(":")
            assert name in cells and (not size or int(size) in cells[name].sizes), claim.text


def test_jobs_train_a_model_once_and_before_its_cells(tmp_path):
    results = Results(tmp_path, Settings(seeds=2))
    jobs = study.jobs(results, ["mntp.mean", "mntp+simcse.mean", "bidirectional.mean"])
    assert [(job.kind, job.name, job.seed) for job in jobs] == [
        ("train", "language-model", 0),
        ("train", "mntp", 0),
        ("score", "mntp.mean", 0),
        ("train", "mntp", 1),
        ("score", "mntp.mean", 1),
        ("train", "mntp+simcse", 0),
        ("score", "mntp+simcse.mean", 0),
        ("train", "mntp+simcse", 1),
        ("score", "mntp+simcse.mean", 1),
        ("train", "bidirectional", 0),
        ("score", "bidirectional.mean", 0),  # nothing in it is drawn
    ]


def measurement(values):
    return Measurement(len(values), lambda rows: float(values[rows].mean()))


def test_cells_scored_apart_are_compared_by_pairs(tmp_path):
    """The interval is that of `compare`, which measures both models at once."""
    draw = np.random.default_rng(0)
    hard = 30 * draw.normal(size=200)  # for both
    a, b = (50 + hard + draw.normal(size=200) for _ in range(2))
    results = Results(tmp_path, Settings())
    for name, values in (("mntp.mean", a), ("bidirectional.mean", b)):
        study.write(results.file(name, 0), {"draws": drawn({"one": measurement(values)}, {"one": "sts"})})
    values = {"a": a, "b": b}
    models = {name: Encoder.__new__(Encoder) for name in values}
    numbers = {id(model): values[name] for name, model in models.items()}
    together = compare(
        models, lambda model: Measured({"one": measurement(numbers[id(model)])}, 1, 1.0), {"one": "sts"}
    )
    apart = results.difference("mntp.mean", "bidirectional.mean")
    assert apart == pytest.approx(together.differences[0].families["sts"], abs=0.006)
    assert apart[2] - apart[1] < 1  # not paired, it is about eleven points


def test_scores_are_means_over_seeds(tmp_path):
    results = Results(tmp_path, Settings(seeds=2))
    assert results.folder("mntp", 0) != results.folder("mntp", 1)
    assert results.folder("bidirectional", 0) == results.folder("bidirectional", 1)  # it is not trained
    study.write(results.file("mntp.mean", 0), {"draws": {"sts": [50.0, 48.0, 52.0]}})
    assert results.draws("mntp.mean") is None  # until both are there
    study.write(results.file("mntp.mean", 1), {"draws": {"sts": [60.0, 56.0, 64.0]}})
    assert results.draws("mntp.mean")["sts"].tolist() == [55.0, 52.0, 58.0]


def test_steps_follow_from_the_tokens_and_rows_get_their_instruction(byte_llama, tmp_path):
    (tmp_path / "clinc150").mkdir()
    rows = [[f"{label} {number:02}", label] for label in ("book", "read") for number in range(10)]
    with gzip.open(tmp_path / "clinc150" / "data_full.json.gz", "wt") as file:
        json.dump({"train": rows}, file)
    step = Step("instruction", Instruction(batch_size=2, warmup_steps=10), {"clinc": "local:clinc"})
    model = study_cells.Model("", (step,), {"instruction": 0.5}, instructions={"clinc": "Find the intent"})
    found = study.budgeted(step, model, str(byte_llama), 5000, 3, tmp_path)
    # anchor, positive and negative have seven bytes each and, being of a set of classes, an instruction; half
    # of the tokens are for this stage
    told = len("Instruct: Find the intent\nQuery: ")
    assert found.settings.max_steps == round(5000 / 2 / (2 * 3 * (told + 7))) == 10
    assert found.settings.warmup_steps == 2 and found.settings.seed == 42 + 3
    wanted = [{**row, "instruction": "Find the intent"} for row in local_rows("local:clinc", tmp_path)]
    assert found.data == {"clinc": wanted}


@pytest.fixture
def tiny(byte_llama, tmp_path, monkeypatch):
    """Two layers of a random model, MNTP on a page of text, and a suite of two tasks; runs the command."""
    (tmp_path / "data" / "wiki_paragraphs").mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "wiki_paragraphs" / "train-00.tsv.gz", "wt") as file:
        file.write("".join(f"{number}\t{number} {PARAGRAPH}\n" for number in range(40)))
    pairs = [ScoredPair(a, b, float(i)) for i, (a, b) in enumerate(zip(TEXTS, TEXTS[1:], strict=False))]
    tasks = [
        STS(name="stsbenchmark", family="sts", parts={"": pairs}),
        Clustering(
            name="clinc150", family="clustering", documents=TEXTS, labels=[t.split()[1] for t in TEXTS]
        ),
    ]
    monkeypatch.setattr(study, "mini_suite", lambda data: tasks)
    monkeypatch.setattr(study, "word_tasks", lambda data, limit: [])
    command = [
        "study",
        str(tmp_path / "out"),
        "--data-dir",
        str(tmp_path / "data"),
        "--model",
        str(byte_llama),
    ]
    command += ["--depth", "2", "--depths", "1", "4", "--tokens", "2048", "--only", "mntp.mean"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        study.main()
        return json.loads((tmp_path / "out" / "study.json").read_text())

    return run


def test_a_cell_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # trained, and not yet merged
        patch.setattr("uncausal.encoder.training.run.merge_lora", stop)
        with pytest.raises(KeyboardInterrupt):
            tiny()
    record = tmp_path / "out" / "models" / "mntp" / "stages" / "1-mntp" / "adapter" / "training.json"
    trained = record.read_bytes()
    assert len(json.loads(trained)["history"]) and json.loads(trained)["run"]["max_steps"] == 2
    with monkeypatch.context() as patch:  # merged and saved, and not yet scored
        patch.setattr(study, "score", stop)
        with pytest.raises(KeyboardInterrupt):
            tiny()
    assert record.read_bytes() == trained
    monkeypatch.setattr(study, "run_recipe", stop)
    capsys.readouterr()
    found = tiny()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and printed[0].startswith("1/1 score mntp.mean: ")
    cell = found["cells"]["mntp.mean"]
    assert cell["layers"] == 2 and cell["pooling"] == "mean" and cell["texts"] == len(TEXTS)
    assert list(cell["scores"]) == ["sts", "clustering", "mean"]
    assert found["models"]["mntp"]["stages"][0]["tokens"] == 2048
    monkeypatch.setattr(study, "score", stop)
    assert tiny() == found  # nothing is left to do


def test_another_budget_is_another_folder(tiny, capsys):
    tiny()
    with pytest.raises(SystemExit):
        tiny("--tokens", "4096")
    assert "holds a study with tokens 2048, not 4096" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tiny("--only", "nothing")
    assert "no cell or group 'nothing'" in capsys.readouterr().err


def summary(value, **changes):
    interval = [value, value - 1, value + 1]
    plain = {
        "groups": "A",
        "baseline": "causal-11.mean",
        "pooling": "mean",
        "instruct": False,
        "words": False,
    }
    plain |= {"shift": False, "tasks": [], "layers": 11, "texts": 9, "tokens": 4000, "seconds": 9.0}
    plain |= {"core_seconds": 2.0}
    plain |= {"scores": {"sts": interval, "mean": interval}, "seeds": [value], "sizes": {}}
    return {**plain, "difference": [-3.25, -4.0, -2.5], **changes}


@pytest.fixture
def found():
    """A study.json of a few cells."""
    trained = {"kind": "simcse", "data": "local:wiki_sentences", "pooling": "mean", "loss": 0.25}
    trained |= {"settings": {"max_steps": 20, "batch_size": 32}, "tokens": 3000, "minutes": 1.5}
    words = {"pos": [80.0, 79.0, 81.0], "ner": [20.0, 18.0, 22.0], "mean": [50.0, 49.0, 51.0]}
    families = {name: [60.0, 59.0, 61.0] for name in ("banking77", "polarity", "clustering", "mean")}
    pair = {"better": "causal-11.mean", "worse": "bidirectional.mean", "value": [3.25, 2.5, 4.0]}
    claim = {
        "paper": "LLM2Vec",
        "text": "it hurts",
        "families": ["mean"],
        "margin": 0.0,
        "differences": [pair],
    }
    return {
        "settings": {"model": "m", "tokens": 3000, "depth": 11, "depths": [3, 11], "seeds": 1},
        "device": "a processor",
        "versions": {"torch": "2"},
        "models": {"simcse": {"base": "bidirectional", "stages": [trained]}},
        "cells": {
            "causal-11.mean": summary(50.0, model="causal-11"),
            "bidirectional.mean": summary(46.75, model="bidirectional"),
            "bidirectional.last_token": summary(40.0, model="bidirectional", pooling="last_token"),
            "fusion": summary(55.0, model="fusion", groups="C", sizes={"64": [50, 49, 51]}, scores=families),
            "causal-3.weighted_mean": summary(48.0, model="causal-3", groups="B", pooling="weighted_mean"),
            "mntp.words": summary(0, model="mntp", groups="D", words=True, shift=True, scores=words),
        },
        "claims": [claim],
    }


def test_page_has_the_figures(found):
    page = render(found)
    for line in (
        "| LLM2Vec | it hurts | **holds** | `causal-11.mean` - `bidirectional.mean` +3.2 (+2.5 to +4.0) |",
        "| bidirectional | 46.8 (45.8 to 47.8) |  | 40.0 (39.0 to 41.0) |  |",
        "| 3 | 2,000 | 48.0 (47.0 to 49.0) |  |  |",
        "| fusion | 50.0 (49.0 to 51.0) | 60.0 (59.0 to 61.0) |",
        "| mntp, shifted | 80.0 (79.0 to 81.0) | 20.0 (18.0 to 22.0) | -3.2 (-4.0 to -2.5) |",
        "| simcse | bidirectional | simcse | wiki_sentences | 20 x 32 | 3,000 | 1.5 | 0.250 |",
    ):
        assert line in page.splitlines(), line


def test_page_and_plots_are_written_beside_the_file(found, tmp_path, monkeypatch):
    (tmp_path / "study.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["study_report", str(tmp_path / "study.json")])
    study_report.main()
    assert (tmp_path / "STUDY.md").read_text() == render(found)
    for name in ("study_pooling.png", "study_depth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and name in render(found)


def test_the_page_is_what_its_file_says():
    folder = Path(study.__file__).parent.parent
    assert (folder / "STUDY.md").read_text() == render(json.loads((folder / "study.json").read_text()))
