"""The package as a user installs it: names, import time, the traps of its layout."""

import importlib.util
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
        "import sys, time; start = time.perf_counter(); import uncausal; "
        "print(time.perf_counter() - start, 'torch' in sys.modules)"
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


def test_imports_run_one_way():
    """bench, tests -> encoder -> kernels -> torch and triton."""
    allowed = {"kernels": {"kernels"}, "encoder": {"kernels", "encoder"}}
    for folder, targets in allowed.items():
        for file in (ROOT / folder).glob("*.py"):
            for line in file.read_text().splitlines():
                words = line.split()
                if words[:1] in (["from"], ["import"]) and words[1].startswith("uncausal."):
                    assert words[1].split(".")[1] in targets, f"{file.name}: {line}"
                if folder == "kernels" and words[:1] in (["from"], ["import"]):
                    assert words[1].split(".")[0] not in ("transformers", "sentence_transformers", "peft")


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
    wanted = {"py.typed", "__init__.py", "kernels/attention.py", "encoder/model.py", "bench/ladder.py"}
    assert {f"uncausal/{name}" for name in wanted} <= names
    assert not any(name.startswith(("kernels/", "encoder/")) for name in names)
    assert any(name.endswith("kernels/attention.py") for name in tarfile.open(sdist).getnames())
