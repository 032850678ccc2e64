"""What the tests of the commands share: texts, and a way to run a command."""

from uncausal.encoder.cli.main import main

TEXTS = ["A man is playing a guitar.", "Plants make energy from sunlight.", "The dog runs on the beach."]
PAIRS = [
    ("A man plays guitar.", "Someone is playing a guitar."),
    ("A dog runs.", "The dog is running outside."),
] * 4
SCORED = [
    (TEXTS[0], TEXTS[0], 5.0),
    (TEXTS[1], TEXTS[1] + " Yes", 3.5),
    (TEXTS[2], "12345", 1.0),
    ("x", "Plants", 0),
]


def run(capsys, *arguments, status=0):
    """Run a command; return what it printed, or the one line of its error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    if status:
        assert captured.err.startswith("uncausal: ") and captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err
    return captured.out if status == 0 else captured.err
