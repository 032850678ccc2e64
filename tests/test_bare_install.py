"""What `pip install --no-deps uncausal` beside torch, with or without Triton, must still run."""

import subprocess
import sys

import pytest

# What torch itself requires, and may import.
TORCH = "torch functorch torchgen typing_extensions sympy mpmath networkx jinja2 markupsafe filelock fsspec"

BARE = """
import sys
from importlib import import_module
from pathlib import Path

allowed = set(sys.argv[1:]) | set(sys.stdlib_module_names) | {"uncausal"}

class Allowed:  # finds what the other finders find, as if the rest were not installed
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top.startswith("_sysconfigdata"):  # whose name tells the platform
            specs = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in specs if spec is not None), None)


for name in [name for name in sys.modules if name.partition(".")[0] not in allowed | {"__main__"}]:
    del sys.modules[name]  # what a .pth file of this environment imported
sys.meta_path[:] = [Allowed()]

import uncausal

folder = Path(uncausal.__file__).parent / "kernels"
for file in folder.rglob("*.py"):
    if "triton" in allowed or file.parent.name != "gpu":
        name = ".".join(file.relative_to(folder).with_suffix("").parts)
        import_module(f"uncausal.kernels.{name}")

import torch

for absent in ("numpy", "transformers", "sentence_transformers", "peft", "accelerate", "datasets", "tqdm"):
    assert absent not in sys.modules, absent


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def step(*outputs):
    sum(x.square().sum() for x in outputs).backward()
    print(*(tuple(x.shape) for x in outputs))


q, k, v = leaf(2, 9, 4, 16), leaf(2, 9, 2, 16), leaf(2, 9, 2, 16)
step(uncausal.flash_attn_func(q, k, v))
mask = torch.arange(9) < torch.tensor([[9], [4]])
layout = uncausal.pack(q, mask)[1]
q, k, v = (uncausal.pack(x.detach(), layout)[0].requires_grad_() for x in (q, k, v))
cu = layout.cu_seqlens
for options in ({}, dict(dropout_p=0.1, causal=True, softcap=5.0, window_size=(3, 0))):
    step(uncausal.unpack(uncausal.flash_attn_varlen_func(q, k, v, cu, cu, **options), layout))
query, key = leaf(8, 16), leaf(8, 16)
step(uncausal.info_nce(query, key, leaf(8, 2, 16)))
step(uncausal.InfoNCE(symmetric=True)(query, key))
step(uncausal.info_nce_prefixes(query, key, [8, 16]))
layer = uncausal.LatentAttentionPooling(16, num_latents=16, num_heads=2)
hidden = leaf(13, 16)
step(layer(hidden, cu), uncausal.latent_attention_pool(hidden, cu, layer.fold()))
try:
    uncausal.flash_attn_varlen_func(q, k, v, cu, cu, backend="triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("triton", ["triton", ""], ids=["triton", "no-triton"])
def test_kernels_need_nothing_but_torch(triton):
    """Regression: without Triton, attention could not be imported; nor may any kernel's file want more."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, *TORCH.split(), *triton.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "(2, 9, 4, 16)",
        "(2, 9, 4, 16)",
        "(2, 9, 4, 16)",
        "()",
        "()",
        "()",
        "(2, 16) (2, 16)",
        "backend='triton' needs a CUDA or HIP tensor, got one on cpu"
        if triton
        else "backend='triton' needs Triton, which is not installed: pip install triton",
    ]
