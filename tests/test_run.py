"""The runner of the benchmarks."""

from uncausal.bench.run import write_section


def test_write_section_replaces_its_own_and_keeps_the_others(tmp_path):
    path = tmp_path / "RESULTS.md"
    write_section("attention, CPU", "first \\1", path)
    write_section("InfoNCE, CPU", "second", path)
    write_section("attention, CPU", "third \\g<0>", path)
    text = path.read_text()
    assert text.startswith("# Results\n")
    assert "first" not in text and text.count("third \\g<0>") == 1 and text.count("second") == 1
    assert text.index("third") < text.index("second")
