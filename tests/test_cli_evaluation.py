"""The command eval: an STS file, the suite, MTEB and words."""

import importlib.util
import json

import pytest
from commands import SCORED, run
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from uncausal.encoder.data.sources import HELD_OUT_DEV
from uncausal.encoder.evaluation import code, suite, words
from uncausal.encoder.evaluation.compare import INSTRUCT, evaluate_models
from uncausal.encoder.evaluation.sts import ScoredPair
from uncausal.encoder.evaluation.tasks import STS, Retrieval
from uncausal.encoder.evaluation.words import TaggedSentence, WordTask

TAGGED = [TaggedSentence(["a", "dog", "runs"], ["DET", "NOUN", "VERB"])] * 4
SPANS = [TaggedSentence(["a", "dog", "runs"], ["O", "B-x", "O"])] * 4


def small_suite():
    names = [f"text {number}" for number in range(6)]
    return [
        STS(name="sts-one", family="sts", parts={"": [ScoredPair(*row) for row in SCORED]}),
        Retrieval(
            name="find",
            family="retrieval",
            queries={name: f"where is {name}" for name in names},
            documents={name: f"{name} is here" for name in names},
            relevant={name: {name} for name in names},
            instruction="find the text",
        ),
    ]


@pytest.fixture
def asked(monkeypatch):
    """The small suite in the place of the mini suite; returns what was asked of it."""
    asked = []

    def mini_suite(data_dir, split):
        asked.append((str(data_dir), split))
        return small_suite()

    monkeypatch.setattr(suite, "mini_suite", mini_suite)
    return asked


def test_eval_reports_spearman_and_speed(cli_folder, capsys):
    """Regression: the figure passed with its sign turned."""
    facts = json.loads(
        run(capsys, "eval", cli_folder / "encoder", cli_folder, "--dtype", "float32", "--json")
    )
    plain = SentenceTransformer(str(cli_folder / "encoder"), device="cpu")
    first, second = (plain.encode([row[i] for row in SCORED], normalize_embeddings=True) for i in (0, 1))
    expected = 100 * spearmanr((first * second).sum(1), [row[2] for row in SCORED]).statistic
    assert abs(expected) > 20
    assert facts["spearman"] == pytest.approx(expected, abs=0.01)
    assert facts["pairs"] == len(SCORED) and facts["tokens_per_second"] > 0


def test_eval_searches_code(cli_folder, tmp_path, capsys, monkeypatch):
    real = code.code_search_set
    monkeypatch.setattr(code, "code_search_set", lambda packages: real(packages[-1:], 12))
    file = tmp_path / "code.json"
    command = ["eval", cli_folder / "encoder", "--code", "--dtype", "float32", "--dimensions", "8", "32"]
    rows = json.loads(run(capsys, *command, "--out", file, "--json"))
    assert rows == json.loads(file.read_text()) and rows[0]["model"] == "BM25"
    encoder = SentenceTransformer(str(cli_folder / "encoder"), device="cpu")
    [expected, *_] = code.evaluate_sizes(encoder, real(HELD_OUT_DEV[-1:], 12), dimensions=[8])
    del expected["ms"], rows[1]["ms"]
    assert rows[1] == {"model": str(cli_folder / "encoder"), **expected} and len(rows) == 5
    printed = run(capsys, *command[:5], "--split", "test")
    assert len(printed.splitlines()) == 3 and "32 fp32" in printed
    assert "dev and test" in run(capsys, *command[:5], "--split", "train", status=1)
    assert "--dimensions goes with --code" in run(capsys, *command[:2], cli_folder, *command[5:], status=1)


def test_eval_names_a_malformed_line(cli_folder, tmp_path, capsys):
    (tmp_path / "sts.csv").write_text("a\tb\n")
    said = run(capsys, "eval", cli_folder / "encoder", tmp_path / "sts.csv", status=1)
    assert "sts.csv:1: not an STS Benchmark line" in said


def test_eval_on_a_suite_compares_models(cli_folder, byte_llama, tmp_path, capsys, monkeypatch, asked):
    models = [str(cli_folder / "encoder"), str(byte_llama)]
    files = ["--out", tmp_path / "scores.json", "--plot", tmp_path / "scores.png"]
    options = ["--dtype", "float32", "--device", "cpu", "--instruct", "--pooling", "weighted_mean"]
    options += ["--tasks", "find"]
    monkeypatch.setenv("UNCAUSAL_DATA", "somewhere")
    printed = run(capsys, "eval", *models, "--suite", "mini", *options, *files, "--json")
    assert asked == [("somewhere", "dev")]
    load = {"dtype": "float32", "device": "cpu", "pooling": "weighted_mean"}
    expected = evaluate_models(models, small_suite()[1:], instruct=INSTRUCT, load_options=load).to_json()
    got = json.loads(printed)
    assert got == json.loads((tmp_path / "scores.json").read_text())
    for evaluation in (expected, got):
        for scores in evaluation["models"]:
            assert scores.pop("seconds") > 0
    assert got == expected and len(got["differences"]) == 1
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_eval_on_chosen_tasks_prints_a_table(cli_folder, capsys, asked):
    options = ["--suite", "mini", "--tasks", "find", "--split", "test", "--data-dir", "sets"]
    lines = run(capsys, "eval", cli_folder / "encoder", *options).splitlines()
    assert asked == [("sets", "test")]
    assert [line.split()[0] for line in lines[1:]] == ["retrieval", "mean", "texts", "seconds"]


def test_eval_of_words(cli_folder, tmp_path, capsys, monkeypatch):
    def word_tasks(data_dir, split, limit):
        assert (str(data_dir), split, limit) == ("sets", "dev", 3)
        return [WordTask("pos", TAGGED[:limit], TAGGED), WordTask("ner", SPANS[:limit], SPANS)]

    monkeypatch.setattr(words, "word_tasks", word_tasks)
    options = ["--words", "--limit", 3, "--data-dir", "sets", "--cache-dir", tmp_path, "--shift", "--json"]
    [scores] = json.loads(run(capsys, "eval", cli_folder / "encoder", *options))["models"]
    assert scores["families"].keys() == {"pos", "ner", "mean"} and scores["texts"] == 14
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_eval_by_mteb(cli_folder, capsys, asked):
    pytest.importorskip("mteb", reason="mteb is not installed: pip install 'uncausal[mteb]'")
    model = str(cli_folder / "encoder")
    load, options = ["--dtype", "float32"], ["--mteb", "sts-one", "--data-dir", "sets"]
    scores = json.loads(run(capsys, "eval", model, *options, *load, "--json"))
    [by_suite] = evaluate_models(model, small_suite()[:1], load_options={"dtype": "float32"}).models
    assert scores[model]["sts-one"] == pytest.approx(by_suite.tasks["sts-one"].value, abs=0.01)
    said = run(capsys, "eval", model, "--mteb", "NoSuchTask", "--data-dir", "sets", status=1)
    assert "--mteb: 'NoSuchTask' not found" in said
    said = run(capsys, "eval", model, "--mteb", "STS12", "--split", "dev", status=1)
    assert "STS12: MTEB has no dev split of it to score, only test" in said
    run(capsys, "eval", model, *options, "--split", "test", *load)
    assert asked == [("sets", "dev"), ("sets", "dev"), ("sets", "test")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m"], "takes MODEL STS_FILE, or MODEL ... with --suite mini"),
        (["m", "a", "b"], "takes MODEL STS_FILE, or MODEL ... with --suite mini"),
        (["--suite", "mini"], "name a model"),
        (["m", "--suite", "mini"], "the data are missing: --data-dir (or UNCAUSAL_DATA)"),
        (["m", "--words"], "the data are missing: --data-dir (or UNCAUSAL_DATA)"),
        (["m", "--suite", "mini", "--data-dir", "/nowhere"], "no folder '/nowhere'"),
        (["m", "--suite", "mini", "--data-dir", ".", "--split", "train"], "the splits are dev and test"),
        (["m", "--suite", "mini", "--words"], "give one of --suite and --words at a time"),
        (["m", "--words", "--tasks", "x"], "--tasks goes with --suite"),
        (["m", "sts.csv", "--plot", "x.png"], "--plot goes with --suite or --words"),
        (["m", "--mteb", "x", "--limit", "3"], "--limit goes with --words"),
        (["m", "./nowhere", "--suite", "mini"], "no model at './nowhere'"),
        (["m", "nowhere/", "--suite", "mini"], "no model at 'nowhere/'"),
        (["m", "package:no_such_one/m", "--suite", "mini"], "pip install --no-deps no-such-one"),
        (["m", "--suite", "mini", "--out", "/dev/null", "--data-dir", "."], "/dev/null: is no regular file"),
        (["m", "nowhere.json", "--split", "test"], "nowhere.json: is one file, and has no split 'test'"),
        (["m", "--suite", "mini", "--plot", "a.txt", "--data-dir", "."], "suffix is its format, one of "),
        (["m", "--suite", "mini", "--out", "nowhere.json/x/y", "--data-dir", "."], "cannot be written"),
    ],
)
def test_eval_refuses(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNCAUSAL_DATA", raising=False)
    (tmp_path / "nowhere.json").write_text("")
    assert message in run(capsys, "eval", *arguments, status=1)


def test_eval_names_a_task_that_is_not_there(cli_folder, capsys, asked):
    options = ["--suite", "mini", "--data-dir", "sets", "--tasks", "sst2"]
    said = run(capsys, "eval", cli_folder / "encoder", *options, status=1)
    assert "no task 'sst2' in the dev split: there are sts-one, find" in said


def test_eval_names_the_package_that_mteb_is(cli_folder, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name != "mteb" and find(name, *rest) or None
    )
    said = run(capsys, "eval", cli_folder / "encoder", "--mteb", "x", status=1)
    assert "pip install 'uncausal[mteb]'" in said
