"""The commands that train: stages, recipes, and what Ctrl-C leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from commands import PAIRS, TEXTS, run
from sentence_transformers import SentenceTransformer

from uncausal.encoder.cli.training import scorer
from uncausal.encoder.evaluation.sts import evaluate_sts, read_sts
from uncausal.encoder.model import Encoder
from uncausal.encoder.training.recipes import KINDS
from uncausal.encoder.training.stages.registry import STAGES

RUN = [sys.executable, "-c", "import sys; from uncausal.encoder.cli.main import main; sys.exit(main())"]


def test_train_changes_the_encoder_and_can_be_repeated(cli_folder, tmp_path, capsys):
    options = ["--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-2, "--bf16", "False", "--json"]
    paths = cli_folder / "encoder", cli_folder / "pairs.jsonl", tmp_path / "out"
    arguments = ["train", "contrastive", *paths, *options, "--warmup-steps", 0]
    facts = json.loads(run(capsys, *arguments).splitlines()[-1])
    trained = Encoder.from_pretrained(facts["saved"], dtype="float32").encode(TEXTS)
    before = Encoder.from_pretrained(cli_folder / "encoder", dtype="float32").encode(TEXTS)
    assert np.abs(trained - before).max() > 1e-4
    run(capsys, *arguments)
    again = Encoder.from_pretrained(facts["saved"], dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(again, trained, atol=1e-5)


ROW = '{"anchor": "a dog", "positive": "the dog", "negative": "a cat"}'
LABELLED = ['{"text": "one", "label": 1}', '{"text": "two", "label": 2}', '{"text": "three", "label": 2}']


@pytest.mark.parametrize(
    ("kind", "lines", "message"),
    [
        ("contrastive", [ROW, ROW[:-1]], "data.jsonl:2: malformed JSON at column 63"),
        ("contrastive", [ROW, "[1, 2]"], "data.jsonl:2: expected a JSON object, found list"),
        ("contrastive", [ROW, LABELLED[0]], "data.jsonl:2: no field 'anchor'; there is 'text', 'label'"),
        ("contrastive", [LABELLED[1], ROW], "data.jsonl:2: no field 'text'; there is 'anchor', 'positive'"),
        (
            "contrastive",
            [ROW, ROW.replace("negative", "other")],
            "data.jsonl:2: no field 'negative', and other",
        ),
        (
            "contrastive",
            [ROW, ROW.replace('"the dog"', "7")],
            "data.jsonl:2: the field 'positive' holds int 7",
        ),
        ("contrastive", [], "data.jsonl holds no rows"),
        ("contrastive", LABELLED, "data.jsonl:1: the label 1 has one example only"),
        (
            "contrastive",
            [ROW, ROW.replace("a cat", "the dog")],
            "data.jsonl:2: the field 'negative' equals the",
        ),
        ("contrastive", [ROW], "data.jsonl: the data hold 1 rows, fewer than a batch of 2"),
        (
            "contrastive",
            [ROW, ROW, "--weights", "b", "2"],
            "data.jsonl: weights name the set 'b'; there is no name",
        ),
        (
            "instruction",
            [ROW.split(', "neg')[0] + "}"] * 2,
            "data.jsonl: the instruction stage contrasts with each",
        ),
        ("simcse", [], "data.jsonl: holds no text"),
        (
            "contrastive",
            [ROW, "--column", "q"],
            "--column is the field of texts; the fields of pairs are --columns",
        ),
        ("simcse", ['{"text": "one"}'], "data.jsonl: the data hold 1 rows, fewer than a batch of 2"),
        ("simcse", ['{"text": "one"}', ROW], "data.jsonl:2: no field 'text'; there is 'anchor', 'positive'"),
        ("mntp", ['{"text": "one"}'], "data.jsonl: the text holds 3 tokens, less than one chunk of 512"),
        (
            "distill",
            ['{"text": "one"}', "--vectors", "no.npy"],
            "data.jsonl: the data hold 1 rows, fewer than",
        ),
        ("distill", ['{"text": "one"}'] * 2 + ["--vectors", "no.npy"], "no such file of vectors: no.npy"),
        (
            "distill",
            ['{"text": "one"}'] * 2 + ["--vectors", "wide.npy"],
            "wide.npy: expected a row of floats a text",
        ),
        (
            "distill",
            ['{"text": "one"}'] * 2 + ["--vectors", "many.npy"],
            "many.npy: holds the vectors of 3 other",
        ),
    ],
)
def test_bad_training_data_are_told_by_file_and_row(
    cli_folder, tmp_path, capsys, monkeypatch, kind, lines, message
):
    """One line, before the first step and before anything is written."""
    monkeypatch.chdir(tmp_path)
    rows = [line for line in lines if line.startswith(("{", "["))]
    (tmp_path / "data.jsonl").write_text("".join(f"{row}\n" for row in rows))
    np.save("wide.npy", np.ones((2, 3, 4)))
    np.save("many.npy", np.ones((3, 4)))
    options = ["--batch-size", 2, "--max-steps", 1, *lines[len(rows) :]]
    paths = cli_folder / "encoder", "data.jsonl", "out"
    assert message in run(capsys, "train", kind, *paths, *options, status=1)
    assert not (tmp_path / "out").exists()


def test_stage_of_a_recipe_is_named_where_its_data_are_wrong(byte_llama, tmp_path, capsys, monkeypatch):
    """Of five stages, which one had too few rows?"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("one\n")
    (tmp_path / "r.toml").write_text('[model]\nname = "x"\n[[stage]]\nkind = "simcse"\ndata = "data.txt"\n')
    said = run(capsys, "run", "r.toml", "out", "--model", byte_llama, "--data-dir", tmp_path, status=1)
    assert "stage 1 (simcse): the data hold 1 rows, fewer than a batch of 128" in said


def test_run_takes_a_recipe_of_the_package_by_name(byte_llama, cli_folder, tmp_path, capsys, monkeypatch):
    from uncausal.encoder.training import recipes

    listed = dict(line.split(": ") for line in run(capsys, "run", "--list").splitlines())
    assert json.loads(run(capsys, "run", "--list", "--json")).keys() == listed.keys()
    assert "mistral" in listed["llm2vec"].split(", ") and "qwen2" in listed["l3prune"].split(", ")
    short = {"max_steps": 1, "batch_size": 2, "chunk_tokens": 16}
    load = recipes.load_recipe

    def shortened(name, variant):
        recipe = load(name, variant)
        for step in recipe.steps:
            vars(step.settings).update({k: v for k, v in short.items() if hasattr(step.settings, k)})
        return recipe

    monkeypatch.setattr("uncausal.encoder.cli.training.load_recipe", shortened)
    texts = ["--data", f"simcse={cli_folder / 'texts.txt'}", "--data", f"mntp={cli_folder / 'texts.txt'}"]
    options = ["--variant", "mistral", "--model", byte_llama, *texts, "--sts", cli_folder, "--json"]
    options += ["--seed", 7]
    facts = json.loads(run(capsys, "run", "llm2vec", tmp_path / "out", *options).splitlines()[-1])
    assert facts["attention"] == "bidirectional" and (tmp_path / "out" / "stages" / "2-simcse").is_dir()
    stages = json.loads((tmp_path / "out" / "recipe.json").read_text())["stages"]
    assert [stage["settings"]["seed"] for stage in stages] == [7, 7]
    scores = [stage["outcome"]["metrics"]["sts_dev_spearman"] for stage in stages]
    found = evaluate_sts(Encoder.from_pretrained(tmp_path / "out"), read_sts(cli_folder, "dev")).spearman
    assert len(scores) == 2 and scores[-1] == pytest.approx(found, abs=0.01)
    assert str(scores[-1]) in (tmp_path / "out" / "README.md").read_text()


def test_run_scores_on_the_data_directory_where_it_can(tmp_path, cli_folder, monkeypatch):
    monkeypatch.delenv("UNCAUSAL_DATA", raising=False)
    assert scorer(None, None) is None and scorer(None, tmp_path) is None
    (tmp_path / "stsbenchmark").symlink_to(cli_folder)
    monkeypatch.setenv("UNCAUSAL_DATA", str(tmp_path))
    encoder = Encoder.from_pretrained(cli_folder / "encoder")
    assert scorer(None, tmp_path)(encoder) == scorer(None, None)(encoder) == scorer(cli_folder, None)(encoder)


TRAINED = ["--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-2, "--logging-steps", 1]
TRAINED += ["--bf16", "False", "--num-layers", 2, "--dtype", "float32", "--json"]
KIND = {  # the words of a command line for every kind of step, between the command and its options
    "mntp": ["train", "mntp", "MODEL", "texts.txt", "out", *TRAINED, "--chunk-tokens", 16],
    "simcse": ["train", "simcse", "MODEL", "texts.txt", "out", *TRAINED],
    "contrastive": ["train", "contrastive", "MODEL", "pairs.jsonl", "out", *TRAINED, "--warmup-steps", 0],
    "instruction": ["train", "instruction", "MODEL", "pairs.jsonl", "out", *TRAINED, "--warmup-steps", 0],
    "distill": ["train", "distill", "MODEL", "texts.txt", "out", *TRAINED, "--teacher", "MODEL"],
    "prune": [
        "prune",
        "MODEL",
        "out",
        "--pairs",
        "pairs.jsonl",
        "--limit",
        8,
        "--dtype",
        "float32",
        "--json",
    ],
    "whiten": ["run", "whiten.toml", "out", "--model", "MODEL", "--json"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_on_the_real_model(smollm2, tmp_path, capsys, monkeypatch, kind):
    """From the command line to an encoder that the library loads, and that is another than before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNCAUSAL_DATA", raising=False)
    texts = [f"{text} Number {i}." for i, text in enumerate(TEXTS * 200)]
    (tmp_path / "texts.txt").write_text("\n".join(texts[:20]))
    (tmp_path / "many.txt").write_text("\n".join(texts))  # more than the vectors have features
    rows = [(*PAIRS[i], TEXTS[i % 3], "Find the same") for i in range(len(PAIRS))]
    names = ("anchor", "positive", "negative", "instruction")
    lines = (json.dumps(dict(zip(names, row, strict=True))) for row in rows)
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    model = '[model]\nname = "x"\nnum_layers = 1\ndtype = "float32"\n'
    (tmp_path / "whiten.toml").write_text(f'{model}[[stage]]\nkind = "whiten"\ndata = "many.txt"\n')
    words = [smollm2 if word == "MODEL" else word for word in KIND[kind]]
    facts = json.loads(run(capsys, *words).splitlines()[-1])
    trained = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": "float32"})
    before = Encoder.from_pretrained(smollm2, num_layers=facts["layers"], dtype="float32", device="cpu")
    found = trained.encode(TEXTS)
    assert np.isfinite(found).all() and found.shape == (3, 576)
    same = np.allclose(found, before.encode(TEXTS), atol=1e-4)
    assert same is (kind == "prune") and facts["attention"] == "bidirectional"
    if kind in STAGES:
        record = json.loads((tmp_path / "out" / "training" / "adapter" / "training.json").read_text())
        losses = [line["loss"] for line in record["history"] if "loss" in line]
        assert record["steps"] == 2 and len(losses) == 2 and np.isfinite(losses).all()


def interrupted(arguments, shown, *, cwd):
    """Start the command, send Ctrl-C when it has shown something, and return its status and screen."""
    process = subprocess.Popen(
        [*RUN, *arguments], cwd=cwd, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lines, killer = [], threading.Timer(300, process.kill)
    killer.start()
    for line in process.stderr:
        lines.append(line)
        if shown in line and len([one for one in lines if shown in one]) == 1:
            process.send_signal(signal.SIGINT)
    killer.cancel()
    process.stdout.close()
    return process.wait(), "".join(lines)


def test_interrupt_is_not_a_traceback(cli_folder, tmp_path):
    """Regression: the message came twice, once from the trainer and once from the command."""
    options = ["--max-steps", "100000", "--batch-size", "2", "--logging-steps", "1", "--save-steps", "100000"]
    arguments = [
        "train",
        "contrastive",
        str(cli_folder / "encoder"),
        "pairs.jsonl",
        str(tmp_path / "out"),
        *options,
    ]
    status, said = interrupted(arguments, "step 1/100000", cwd=cli_folder)
    assert status == 130, said
    assert "Traceback" not in said and said.count("stopped at step") == 1, said
    assert re.search(
        r"^uncausal: contrastive stopped at step \d+ of 100000: the same call or command resumes ", said, re.M
    )


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_screen_shows_no_bars_of_the_libraries(cli_folder, tmp_path):
    """Regression: loading, saving and the model card each drew a bar of their library's."""
    import fcntl
    import struct
    import termios

    main_end, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    options = ["--max-steps", "2", "--batch-size", "2", "--num-layers", "1"]
    arguments = ["train", "contrastive", "encoder", "pairs.jsonl", str(tmp_path / "out"), *options]
    process = subprocess.Popen([*RUN, *arguments], cwd=cli_folder, stderr=terminal, stdout=terminal)
    os.close(terminal)
    screen, deadline = b"", time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            screen += os.read(main_end, 4096)
        except OSError:  # the other end is closed: the command is done
            break
    assert process.wait(30) == 0, screen.decode()
    os.close(main_end)
    bars = set(re.findall(r"^\s*([A-Za-z][\w ]*?)[ :.]*\s*\d+%\|", screen.decode().replace("\r", "\n"), re.M))
    assert bars == {"contrastive"}, screen.decode()
