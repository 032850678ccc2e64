"""What the commands share: options that load a model, where output may go, and how facts are printed."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Suppress, arg

if TYPE_CHECKING:
    from uncausal.encoder.model import Encoder
    from uncausal.encoder.serving.index import MadeWith

Json = Annotated[bool, arg(name="json", help="print JSON and nothing else on standard output")]


@dataclass(frozen=True)
class Loading:
    """How the model is loaded.

    Args:
        pooling: of token vectors into one; by default the saved encoder's own, else mean.
        causal: keep causal attention.
        num_layers: keep the first so many layers.
        attention: auto is the packed attention; sdpa and eager are torch's.
        gguf_file: GGUF file inside the model's folder.
        dtype: of the weights; auto is bfloat16 where the hardware multiplies it, else float32.
        device: cpu, cuda, cuda:1, ...; by default the best there is.
        max_seq_length: cut texts after so many tokens.
    """

    pooling: Literal["mean", "weighted_mean", "last_token", "latent"] | None = None
    causal: bool = False
    num_layers: int | None = None
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    max_seq_length: int | None = None

    def load(self, model: str) -> Encoder:
        """Load the model, with an error that names the option at fault."""
        options = self.options(model)
        from uncausal.encoder.model import Encoder

        return Encoder.from_pretrained(model, **options)

    def load_as(self, made: MadeWith, index: Path, model: str | None) -> Encoder:
        """Load a model as the one was loaded that an index was made with: by default that one.

        Whether it is the same, by another name or an option that the index does not tell, its vectors show.

        Raises:
            ValueError: an option says otherwise; where numbers are computed, and how finely, is free.
        """
        from uncausal.encoder.model import Encoder

        source, loading = model or made.model, made.loading or {}
        given = {name: value for name, value in self.options(source).items() if value != "auto"}
        for name in (given.keys() & loading.keys()) - {"device", "dtype", "attention"}:
            if loading[name] != given[name]:
                raise ValueError(
                    f"{index}: was made with {name}={loading[name]!r}, not {given[name]!r}: leave that "
                    "option out, or index into another file"
                )
        return Encoder.from_pretrained(source, **{**loading, **given})

    def options(self, *models: str) -> dict[str, Any]:
        """The options of `Encoder.from_pretrained` for these models, once the device and GGUF are checked."""
        import torch

        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"--device {self.device}: {reason}; leave it out, or use cpu") from None
        for model in models:
            if self.gguf_file or model.endswith(".gguf"):
                require("gguf", "gguf", f"{model}: GGUF is read by a package")
        given = {name: value for name, value in vars(self).items() if name != "causal" and value is not None}
        return {**given, "bidirectional": False} if self.causal else given


@dataclass(frozen=True)
class LoadingWhole(Loading):
    """How the model is loaded, at its full depth."""

    num_layers: Suppress[None] = None


def require(package: str, extra: str, what: str) -> None:
    """Raise if a package is missing that comes with an extra of this one."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what}: pip install 'uncausal[{extra}]'")


def check_writable(output: Path, folder: bool = False) -> None:
    """Raise before any work is done if the output could not be written at its end."""
    target = output.resolve()  # what a link leads to is written
    if target.exists() and not (target.is_dir() if folder else target.is_file()):
        kind = "a file" if folder else "a folder" if target.is_dir() else "no regular file"
        raise ValueError(f"{output}: is {kind}; choose another output")
    place = target if folder else target.parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{output}: cannot be written ({error.strerror}); choose another output") from None


def facts(encoder: Any, output: Path) -> dict[str, Any]:
    """What the commands that write an encoder say of it."""
    config = encoder.backbone.config
    return {
        "saved": str(output),
        "layers": encoder.num_layers,
        "attention": "causal" if getattr(config, "is_causal", True) else "bidirectional",
        "pooling": encoder.pooling,
        "dimension": encoder.get_embedding_dimension(),
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }


def report(figures: Mapping[str, Any], as_json: bool) -> None:
    """Print facts, as lines or as one JSON object."""
    if as_json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in figures.items()))
