"""The table of several seeds' runs."""

import json
import sys

import pytest

from uncausal.bench.trials.seeds import main, t_interval, table


def run(name: str, score: float, other: str = "peer") -> dict:
    scores = {"families": {"sts": [score, score - 2, score + 3], "mean": [score, score - 1, score + 1]}}
    model = {"model": name, "tasks": {"stsbenchmark": [score + 5, 0.0, 99.0]}, **scores}
    peer = {"model": other, "tasks": {}, "families": {}}
    differences = [{"model": name, "other": other, "families": {"mean": [score - 80, -9.0, -1.0]}}]
    return {"models": [model, peer], "differences": differences}


def test_runs_have_intervals_by_seeds_and_by_texts():
    """Student's t of 3 values, by hand: 4.3027 * 1 / sqrt(3) = 2.484."""
    lines = table([run("a", 70), run("b", 72), run("c", 71)]).splitlines()
    assert lines[0] == "|  | run 1 | run 2 | run 3 | mean | by seeds | by texts |"
    assert lines[2] == "| STS-B | 75.0 | 77.0 | 76.0 | 76.0 | 73.5 to 78.5 | 0.0 to 99.0 |"
    assert lines[3] == "| sts | 70.0 | 72.0 | 71.0 | 71.0 | 68.5 to 73.5 | 69.0 to 74.0 |"
    assert lines[5] == "| mean, less peer's | -10.0 | -8.0 | -9.0 | -9.0 | -11.5 to -6.5 | -9.0 to -1.0 |"
    assert t_interval([1.0, 1.0]) == (1.0, 1.0)


def test_one_run_has_no_interval_by_seeds():
    assert table([run("a", 70)]).splitlines()[2] == "| STS-B | 75.0 | 75.0 |  | 0.0 to 99.0 |"


def test_runs_that_cannot_be_compared_are_refused():
    other = run("b", 72)
    other["models"][0]["tasks"]["semeval"] = [1.0, 1.0, 1.0]
    for second in (other, run("b", 72, other="another")):
        with pytest.raises(ValueError, match="of the same tasks and beside the same models"):
            table([run("a", 70), second])
    with pytest.raises(ValueError, match="two of the files hold the same run"):
        table([run("a", 70), run("a", 70)])


def test_a_file_of_something_else_is_named(tmp_path, monkeypatch, capsys):
    """Runs are read from files, in their order; one that holds no evaluation is told by its name."""
    for name, score in (("a", 70), ("b", 72)):
        (tmp_path / name).write_text(json.dumps(run(name, score)))
    monkeypatch.setattr(sys, "argv", ["seeds", str(tmp_path / "b"), str(tmp_path / "a")])
    main()
    assert "| sts | 72.0 | 70.0 | 71.0 |" in capsys.readouterr().out
    bare = {"model": "a", "families": {}, "tasks": {}}
    scoreless = [{"models": [{**bare, "families": families}]} for families in ({}, {"sts": 70.0})]
    for content in ("[1]", "{}", "no JSON", '{"models": []}', *map(json.dumps, scoreless)):
        (tmp_path / "a").write_text(content)
        with pytest.raises(SystemExit):
            main()
        assert (
            f"{tmp_path / 'a'}: not what `uncausal eval --suite mini --out` wrote" in capsys.readouterr().err
        )
    (tmp_path / "a").unlink()
    with pytest.raises(SystemExit):
        main()
    assert "No such file" in capsys.readouterr().err
