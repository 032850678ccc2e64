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
from commands import TEXTS, run

from uncausal.encoder.cli.training import scorer
from uncausal.encoder.evaluation.sts import evaluate_sts, read_sts
from uncausal.encoder.model import Encoder

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


def test_run_takes_a_recipe_of_the_package_by_name(byte_llama, cli_folder, tmp_path, capsys, monkeypatch):
    from uncausal.encoder.training import recipes

    listed = dict(line.split(": ") for line in run(capsys, "run", "--list").splitlines())
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
    facts = json.loads(run(capsys, "run", "llm2vec", tmp_path / "out", *options).splitlines()[-1])
    assert facts["attention"] == "bidirectional" and (tmp_path / "out" / "stages" / "2-simcse").is_dir()
    stages = json.loads((tmp_path / "out" / "recipe.json").read_text())["stages"]
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
