"""The package as a user installs it: names, import time, the traps of its layout."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uncausal

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", uncausal.__all__)
def test_public_name_resolves(name):
    assert getattr(uncausal, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = uncausal.nothing


def test_import_is_fast_and_light():
    code = (
        "import sys, time; start = time.process_time(); import uncausal; "
        "print(time.process_time() - start, 'torch' in sys.modules)"
    )
    seconds, torch = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert float(seconds) < 0.3 and torch == "False"


def test_folder_kernels_shadows_nothing():
    """Regression: kernels/__init__.py would shadow the package that transformers imports, from the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util as u; s = u.find_spec('kernels'); "
        "assert s is None or s.origin is None or 'site-packages' in s.origin, s; "
        "from transformers import LlamaModel"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


LAYERS = [
    {"kernels"},
    {f"encoder.{stem}" for stem in ("data", *(p.stem for p in (ROOT / "encoder").glob("*.py")))},
    {"encoder.training", "encoder.evaluation", "encoder.serving"},
    {"encoder.cli"},
    {"bench", "tests"},
]


def imported_modules(source: str, home: dict[str, str]) -> list[str]:
    """The modules that a file imports, names taken through the package's front door included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            found.append(module)
            if module == "uncausal":
                found += [f"uncausal.{home.get(alias.name, alias.name)}" for alias in node.names]
            elif module.startswith("uncausal."):
                found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def wrong_imports(path: Path, source: str) -> list[str]:
    """The imports of a file that run against the order of LAYERS, or out of what its layer may use."""
    place = ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def level(name: str) -> int | None:
        inside = [i for i, parts in enumerate(LAYERS) for p in parts if f"{name}.".startswith(f"{p}.")]
        return max(inside, default=None)

    own, wrong = level(place), []
    assert own is not None, f"{place} stands in no layer"
    for module in imported_modules(source, uncausal._HOME):
        theirs = level(module.removeprefix("uncausal.")) if module.startswith("uncausal.") else None
        if module == "uncausal" and own == 0 or theirs is not None and theirs > own:
            wrong.append(module)
        outside = module.split(".")[0]
        if own == 0 and outside not in {*sys.stdlib_module_names, "uncausal", "torch", "triton"}:
            wrong.append(module)
    return wrong


FILES = sorted(p for folder in ("kernels", "encoder", "bench") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """bench, tests -> cli -> serving, evaluation, training -> the model layer -> kernels -> torch, triton."""
    assert not wrong_imports(path, path.read_text())


@pytest.mark.parametrize(
    "file, line",
    [
        ("kernels/launch.py", "from uncausal import Encoder"),
        ("kernels/launch.py", "def f():\n    from uncausal import (\n        Encoder)"),
        ("kernels/launch.py", "import transformers"),
        ("kernels/launch.py", "import uncausal.encoder.model as m"),
        ("encoder/model.py", "from uncausal import train"),
        ("encoder/data/rows.py", "from uncausal.encoder.training import run"),
        ("encoder/training/run.py", "from uncausal.encoder.cli.main import main"),
        ("encoder/evaluation/sts.py", "from uncausal.bench import measure"),
    ],
)
def test_imports_against_the_way_are_seen(file, line):
    """Regression: `from uncausal import Encoder` inside kernels/ passed, and so did an import in brackets."""
    assert wrong_imports(ROOT / file, line)


def test_folders_are_rooms():
    """No folder of code holds many more than ten files."""
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in {path.parent for path in FILES}
        if (count := len(list(folder.glob("*.py")))) > 14
    }
    assert not crowded


def test_wheel_and_sdist_hold_the_sources(tmp_path):
    """A wheel built from the sdist carries the linked folders as real files, and the type marker."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("the package build is not installed")
    import tarfile
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True
    )
    [wheel] = tmp_path.glob("*.whl")
    [sdist] = tmp_path.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        "py.typed",
        "__init__.py",
        "kernels/attention.py",
        "encoder/training/stages/mntp.py",
        "bench/ladder.py",
        "recipes/llm2vec.toml",
    }
    assert {f"uncausal/{name}" for name in wanted} <= names
    assert not any(name.startswith(("kernels/", "encoder/")) for name in names)
    assert any(name.endswith("kernels/attention.py") for name in tarfile.open(sdist).getnames())


def test_every_promise_of_security_has_its_test():
    promised = re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    defined = {
        name
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(promised) > 12 and set(promised) <= {*defined, "test_any"}
