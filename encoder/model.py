"""The text encoder: a decoder-only language model as a `SentenceTransformer`, bidirectional, packed, pruned.

`Encoder` adds three things to the library's class: conversion and pruning when a causal checkpoint is loaded,
packed execution (no padding token is ever computed) and saving that cannot leave a half-written model. All
else, prompts, evaluators, multi-process encoding, the trainer, the hub, is sentence-transformers' own.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer import modules as library
from sentence_transformers.sentence_transformer.modules import Normalize
from sentence_transformers.util import is_sentence_transformer_model, truncate_embeddings
from tqdm.auto import tqdm

from uncausal.encoder import attention as packed_attention
from uncausal.encoder.adapters import load_adapter, merge_attached
from uncausal.encoder.batching import iter_encode
from uncausal.encoder.conversion import (
    NotBidirectionalError,
    assert_bidirectional,
    make_bidirectional,
    set_causal,
)
from uncausal.encoder.files import staged
from uncausal.encoder.inputs import (
    PackedTransformer,
    chat_template,
    check_not_empty,
    find_empty,
    plain_text,
    spell_control_tokens,
)
from uncausal.encoder.layers import decoder_layers
from uncausal.encoder.linear import quantize_linear
from uncausal.encoder.loading import (
    EncoderSpec,
    adapter_chain,
    adapter_folder,
    check_vocabulary,
    hub_only,
    lacks_attention,
    local_path,
    located,
    resolve_dtype,
)
from uncausal.encoder.pooling import (
    POOLING_MODES,
    LatentPooling,
    Pooling,
    PoolingName,
    TokenWeights,
    make_pooling,
    pooling_name,
)
from uncausal.encoder.pruning import prune_layers
from uncausal.encoder.whitening import LinearMap, Whitening, append_linear

logger = logging.getLogger(__name__)

TEXT_ONLY: Any = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# Families whose layers do not read `is_causal` from the configuration (bench/FAMILIES.md).
CAUSAL_ELSEWHERE = ("stablelm", "nemotron")
LIBRARY_BATCH_SIZE = 32  # sentence-transformers' default, which nobody asked for
CONFIGS = ("config.json", "modules.json", "adapter_config.json")  # every saved model has one of them
OF_AN_EARLIER_SAVE = (  # weights, and what only some tokenizers have
    r"(model|pytorch_model|adapter_model)\b.*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
    r"|chat_template\.jinja"
)


def is_generated_card(card: Path) -> bool:
    """Whether a README.md is a model card of sentence-transformers', which another may replace."""
    head, text = "---", card.read_text(encoding="utf8", errors="replace") if card.is_file() else ""
    return (
        text.startswith(head) and "sentence-transformers" in text.removeprefix(head).partition(f"\n{head}")[0]
    )


def _of_an_earlier_save(folder: Path) -> set[str]:
    """The names of what a model that was saved in a folder left there and another may not replace."""
    if not any((folder / name).is_file() for name in CONFIGS):
        return set()
    found = {entry.name for entry in folder.iterdir() if re.fullmatch(OF_AN_EARLIER_SAVE, entry.name)}
    with suppress(OSError, ValueError, TypeError, KeyError):  # the folders of modules, "1_Pooling"
        modules = json.loads((folder / "modules.json").read_text())
        found |= {module["path"] for module in modules if re.fullmatch(r"\d+_\w+", module["path"])}
    return found


def _name(module: type) -> str:
    return f"{module.__module__}.{module.__name__}"


# What modules are saved as, so that a saved encoder needs nothing from here.
SAVED_NAMES = {
    _name(PackedTransformer): _name(Transformer),
    _name(Pooling): _name(library.Pooling),
    _name(TokenWeights): _name(library.WordWeights),
    _name(LinearMap): _name(Dense),
}


class Encoder(SentenceTransformer):
    """A decoder-only language model as a text encoder; see `Encoder.from_pretrained`.

    `Encoder(path)` loads a saved encoder as `SentenceTransformer(path)` does.

    Attributes:
        spec: how `from_pretrained` loaded it, for a worker process to do the same; None where it was built
            otherwise.
    """

    spec: EncoderSpec | None = None
    _quantized = False
    _saved_template: str | None = None
    _saved_ended = False
    _saved_frozen: Sequence[int] = ()
    _module_classes = {
        _name(Transformer): PackedTransformer,
        _name(library.Pooling): Pooling,
        _name(library.WordWeights): TokenWeights,
        _name(LatentPooling): LatentPooling,
        _name(Dense): LinearMap,
    }

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        pooling: PoolingName | None = None,
        bidirectional: bool | None = None,
        num_layers: int | None = None,
        attention: Literal["auto", "uncausal", "sdpa", "eager"] | str = "auto",
        adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        template: str | None = None,
        end_token: bool | None = None,
        gguf_file: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        normalize: bool = False,
        max_seq_length: int | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        use_safetensors: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Encoder:
        """Load a causal checkpoint, an adapter of one, or a saved encoder, as an encoder.

        Args:
            name_or_path: Hugging Face id, a model folder, or a folder or file of GGUF weights; a file that an
                installed package carries is "package:NAME/FILE". A PEFT adapter's loads its base model and
                merges the adapter.
            pooling: "mean" (default), "weighted_mean" (weights 1..n), "last_token" (of texts that end with
                the end token) or "latent" (NV-Embed). A saved encoder keeps its own unless told otherwise.
            bidirectional: True (default) lets every token see every other and proves it on the loaded model;
                False keeps causal attention. A saved encoder keeps its own mode, which is proved again.
            num_layers: keep only the first so many decoder layers (see `uncausal.l3prune`).
            attention: "uncausal" is this package's packed attention, "sdpa" and "eager" are torch's; "auto"
                is "uncausal", or with a warning one of torch's for a model that has no packed form.
            adapter: folders or ids of PEFT adapters, merged one after another.
            template: "chat" is the tokenizer's chat template for a user's message, as LLM2Vec encodes with
                instruct models; or a text with "{text}" in it. It is saved with the encoder. What stands
                before the text is attended and not pooled; plain sentence-transformers pools it too, save
                with "last_token".
            end_token: whether an end token follows every text; by default with "last_token". False pools a
                template's own last token, as PromptEOL does (arXiv 2307.16645).
            gguf_file: name of the GGUF file inside the folder `name_or_path`; its weights are dequantised.
            dtype: "auto" is bfloat16 where the hardware multiplies it, else float32.
            device: as in torch; default: the best available one.
            normalize: append a layer that scales vectors to length 1.
            max_seq_length: limit in tokens; longer texts are cut, with a warning that counts them.
            revision, token, trust_remote_code, cache_dir, local_files_only: as in transformers, for all
                files alike.
            use_safetensors: False also reads pickled weights, which can run code.
            model_kwargs: more for transformers as the weights are loaded.

        Raises:
            FileNotFoundError: no model of that name.
            ValueError: the model stays causal (the message names the layer), or an argument is wrong.
        """
        adapters = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter or [])
        spec = EncoderSpec(
            name_or_path=str(name_or_path),
            pooling=pooling,
            bidirectional=bidirectional,
            num_layers=num_layers,
            attention=attention,
            adapter=tuple(str(one) for one in adapters) or None,
            template=template,
            end_token=end_token,
            gguf_file=gguf_file,
            dtype=dtype,
            device=device,
            normalize=normalize,
            max_seq_length=max_seq_length,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            cache_dir=None if cache_dir is None else str(cache_dir),
            local_files_only=local_files_only,
            use_safetensors=use_safetensors,
            model_kwargs=model_kwargs,
        )
        if pooling is not None and pooling not in (*POOLING_MODES, "latent"):
            raise ValueError(f"pooling {pooling!r} is unknown: choose one of {[*POOLING_MODES, 'latent']}")
        if max_seq_length is not None and max_seq_length < 1:
            raise ValueError(f"max_seq_length is {max_seq_length}; it must be at least 1")
        names = ("uncausal", "sdpa", "eager") if attention == "auto" else (str(attention),)
        for name in names:
            try:
                encoder, saved = cls._load(spec, name)
                break
            except (KeyError, NotImplementedError, ValueError) as error:
                if name == names[-1] or not lacks_attention(error):
                    raise
                if name == names[0]:
                    logger.warning("%s is encoded padded, with torch's attention: %s", name_or_path, error)
        encoder.spec = spec
        if num_layers is not None:
            encoder.prune(num_layers)
        if template is not None:
            template = chat_template(encoder.tokenizer) if template == "chat" else template
            encoder.transformer.frame(template, end=encoder.transformer.ended)
        if pooling is not None or not saved:
            encoder.set_pooling(pooling or "mean")
        if end_token is not None:
            encoder.transformer.frame(encoder.transformer.template, end=end_token)
        if normalize and not isinstance(encoder._last_module(), Normalize):
            encoder.append(Normalize())
        if max_seq_length is not None:
            encoder.max_seq_length = max_seq_length
        return encoder

    @classmethod
    def _load(cls, spec: EncoderSpec, attention: str) -> tuple[Encoder, bool]:
        """Load the weights, merge the adapters, prove the mode; tells too whether it was a saved encoder."""
        path, gguf_file = local_path(spec.name_or_path), spec.gguf_file
        if path.is_file() and path.suffix == ".gguf":
            path, gguf_file = path.parent, path.name
        options = {
            "dtype": resolve_dtype(spec.dtype, spec.device),
            "attn_implementation": attention,
            "use_safetensors": spec.use_safetensors or None,
            **(spec.model_kwargs or {}),
        }
        with located(path if path.exists() else spec.name_or_path, gguf_file, **spec.hub) as source:
            where = {
                "cache_folder" if name == "cache_dir" else name: x for name, x in hub_only(spec.hub).items()
            }
            saved = gguf_file is None and is_sentence_transformer_model(source, **where)
            if saved:
                where["trust_remote_code"] = spec.trust_remote_code
                encoder = cls(source, device=spec.device, model_kwargs=options, **where)
            else:
                base, adapters, hub = adapter_chain(source, spec.hub)
                transformer = PackedTransformer(
                    base,
                    model_kwargs={**options, **hub},
                    processor_kwargs=dict(hub),
                    config_kwargs=dict(hub),
                    modality_config=TEXT_ONLY,
                    module_output_name="token_embeddings",
                )
                spell_control_tokens(transformer.tokenizer)
                for folder in adapters:
                    load_adapter(transformer.model, folder, headless=False)
                transformer.config._name_or_path = base if adapters else spec.name_or_path
                pooling = make_pooling("mean", transformer.get_embedding_dimension())
                encoder = cls(modules=[transformer, pooling], device=spec.device)
        encoder.merge(*(spec.adapter or ()), **{**spec.hub, "revision": None})
        model = encoder.backbone
        if attention == packed_attention.NAME:
            packed_attention.assert_packs(model)
        if spec.bidirectional or (spec.bidirectional is None and not saved):
            make_bidirectional(model)
            assert_bidirectional(model)
        elif spec.bidirectional is False and getattr(model.config, "is_causal", None) is False:
            raise ValueError(f"{spec.name_or_path} was saved bidirectional and cannot be made causal again")
        return encoder, saved

    def _post_init(self) -> None:
        """Prove a saved encoder's mode anew: some models, and adapters saved alone, come back causal."""
        super()._post_init()
        transformer = self[0]
        if not isinstance(transformer, PackedTransformer):
            return
        check_vocabulary(transformer.tokenizer, transformer.model)
        if self._saved_template is not None or self._saved_ended:
            transformer.carries(self._saved_template, self._saved_ended)
        for place, module in enumerate(self):
            if isinstance(module, LinearMap) and place in self._saved_frozen:
                module.requires_grad_(False)
        if getattr(transformer.config, "is_causal", None) is False:
            try:
                make_bidirectional(transformer.model)
            except NotBidirectionalError as error:  # what an earlier version has converted and trained
                logger.warning("%s; this one was saved so, and is loaded as it was", error)
                set_causal(transformer.model, False)
            assert_bidirectional(transformer.model, quick=True)

    def _parse_model_config(self, model_config: dict[str, Any]) -> None:
        super()._parse_model_config(model_config)
        self._saved_template = model_config.get("template")
        self._saved_ended = model_config.get("end_token") is True
        frozen = model_config.get("frozen_maps")
        self._saved_frozen = frozen if isinstance(frozen, list) else ()

    def _get_model_config(self) -> dict[str, Any]:
        config, transformer = super()._get_model_config(), self.transformer
        if getattr(transformer, "template", None) is not None:
            config["template"] = transformer.template
        if getattr(transformer, "ended", False):
            config["end_token"] = True
        if frozen := [i for i, one in enumerate(self) if isinstance(one, LinearMap) and one.frozen]:
            config["frozen_maps"] = frozen
        return config

    @property
    def transformer(self) -> Any:
        """The first module, a `PackedTransformer`."""
        return self[0]

    @property
    def backbone(self) -> Any:
        """The headless Hugging Face model."""
        return self.transformer.model

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(decoder_layers(self.backbone))

    @property
    def packed(self) -> bool:
        """Whether batches run without padding."""
        return isinstance(self.transformer, PackedTransformer) and self.transformer.can_flatten_inputs

    @property
    def pooling(self) -> str:
        """The name of the pooling, as given to `from_pretrained`, or "sif" after `weigh_tokens`."""
        return pooling_name(self[1])

    def set_pooling(self, pooling: PoolingName) -> None:
        """Replace the pooling. Prompt tokens are never pooled; "last_token" ends texts with an end token."""
        made = make_pooling(pooling, self.transformer.get_embedding_dimension()).to(self.device)
        by_last, before = pooling == "last_token", self.pooling
        if pooling != before:
            self._model_card_text = None  # that of what it was
        if before == "sif":
            del self[1]
        self[1] = made
        if isinstance(self.transformer, PackedTransformer) and by_last != (before == "last_token"):
            self.transformer.frame(self.transformer.template, end=by_last)

    def weigh_tokens(self, texts: Sequence[str], a: float = 1e-4) -> None:
        """Pool the mean of all tokens' states, the frequent weighing less: a / (a + their share of `texts`).

        SIF (Arora, Liang and Ma, ICLR 2017). The weights are a module of the saved encoder, and are not
        trained; `set_pooling` removes them.

        Raises:
            ValueError: a is not above 0.
        """
        weights = TokenWeights.sif(self.tokenizer, texts, a).to(self.device)
        self.set_pooling("mean")
        self.insert(1, weights)

    def merge(self, *adapters: str | os.PathLike[str], **hub: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Merge adapters into the weights: those that `load_adapter` attached, then the given ones.

        (The library's own `merge` averages models: `SentenceTransformer.merge`.)

        Args:
            *adapters: folders or ids of PEFT adapters, merged one after another, as LLM2Vec's stages are.
            **hub: where ids are looked for: revision, token, cache_dir, local_files_only.

        Raises:
            FileNotFoundError: no adapter in safetensors of that name.
            ValueError: it was trained on another model.
        """
        if merge_attached(self.backbone) or adapters:
            self._model_card_text = None
        for adapter in adapters:
            load_adapter(self.backbone, adapter_folder(str(adapter), hub), headless=False)

    def prune(self, num_layers: int) -> None:
        """Keep the first `num_layers` decoder layers (L3Prune's manual mode)."""
        prune_layers(self.backbone, num_layers)
        self._model_card_text = None

    def whiten(self, texts: Sequence[str], **settings: Any) -> None:
        """Append the whitening of these texts' vectors (arXiv 2103.15316), `Whitening(**settings)`.

        The map is one module of the saved encoder; a second call renews it. Stages do not train it, also
        after a reload, unless its `requires_grad_()` is called before.

        Raises:
            ValueError: fewer texts than the vectors have dimensions, or an empty one.
        """
        whitening, modules = Whitening(**settings), self._modules.copy()
        ended = getattr(self.transformer, "ended", None)
        try:
            whitening.weigh(self, texts)
            append_linear(self, whitening.fit(self, texts))
        except BaseException:
            self._modules = modules
            if ended != getattr(self.transformer, "ended", None):
                self.transformer.frame(self.transformer.template, end=bool(ended))
            raise

    def quantize(self) -> None:
        """Turn most of the backbone's weights to int8 for serving on a CPU; the rest becomes float32.

        What it gains in speed and costs in quality is in `bench/RESULTS.md`. The texts of a batch share the
        scale of their activations, so that a vector depends, by about a percent, on its neighbours. The
        encoder can no longer be trained or saved.

        Raises:
            ValueError: the encoder is not on a CPU, or this build of torch has no int8 products.
        """
        quantize_linear(self.float().backbone, self.backbone.config.hidden_size)
        self.requires_grad_(False)
        self._quantized = True

    def get_model_kwargs(self) -> list[str]:
        return [*super().get_model_kwargs(), "batch_tokens", "on_empty"]

    @contextmanager
    def padded(self) -> Iterator[None]:
        """Run batches padded for a while, as the library does."""
        transformer = self.transformer
        packed, transformer.can_flatten_inputs = transformer.can_flatten_inputs, False
        try:
            yield
        finally:
            transformer.can_flatten_inputs = packed

    def _multi_process(self, inputs: Sequence[Any], *args: Any, **options: Any) -> Any:
        inputs = [plain_text(text) for text in inputs]
        if options.get("on_empty", "raise") == "raise":
            check_not_empty(inputs)  # a worker would count within its chunk
        return super()._multi_process(inputs, *args, **options)

    @torch.inference_mode()
    def _inference(
        self, inputs: list, *, on_empty: Literal["raise", "zero", "skip"] = "raise", **options: Any
    ) -> Any:
        """Encode texts; the options are those of `encode`.

        Args:
            inputs: texts, or what else the library's modules take.
            on_empty: an empty text raises ValueError with its index; has the vector zero; or has none.
            batch_tokens: tokens a batch at most, without padding; 1024 by default on a CPU, 16384 elsewhere.
            batch_size: texts a batch at most. The library's default, 32, cannot be told from no wish and
                sets no limit on packed batches.
        """
        inputs = [plain_text(text) for text in inputs]
        if on_empty not in ("raise", "zero", "skip"):
            raise ValueError(f"on_empty is 'raise', 'zero' or 'skip', got {on_empty!r}")
        empty = set(find_empty(inputs))
        if not empty or on_empty == "raise":
            check_not_empty(inputs)
            return self._encode(inputs, **options)
        kept = [index for index in range(len(inputs)) if index not in empty]
        rows = self._encode([inputs[index] for index in kept], **options)
        if on_empty == "skip":
            return rows
        if options["output_value"] != "sentence_embedding":
            raise ValueError("on_empty='zero' is for vectors of texts: take 'skip'")
        width = options["truncate_dim"] or self.get_embedding_dimension()
        if not kept:
            rows = rows.new_zeros(
                0, width, dtype=self.dtype, device="cpu" if options["save_to_cpu"] else None
            )
        vectors = rows.new_zeros(len(inputs), rows.shape[1])
        vectors[torch.tensor(kept, dtype=torch.long)] = rows
        return vectors

    def _encode(self, inputs: list, *, batch_tokens: int | None = None, **options: Any) -> Any:
        texts_only = all(isinstance(text, str) for text in inputs) and not options.get("processing_kwargs")
        if not self.packed or not texts_only or options["output_value"] != "sentence_embedding":
            with self.padded():
                return super()._inference(inputs, **options)
        device = self._resolve_inference_device(options.get("device"))
        vectors: list[torch.Tensor] = [torch.empty(0)] * len(inputs)
        cut = 0
        bar = tqdm(total=len(inputs), desc="Encoding", unit="text", disable=not options["show_progress_bar"])
        size = options["batch_size"]
        batches = iter_encode(
            self,
            inputs,
            prompt=options["prompt"],
            batch_tokens=batch_tokens,
            batch_size=None if size == LIBRARY_BATCH_SIZE else size,
            device=device,
        )
        with bar:
            for batch in batches:
                embeddings = batch.vectors
                if options["truncate_dim"] is not None:
                    embeddings = truncate_embeddings(embeddings, options["truncate_dim"])
                if options["normalize_embeddings"]:
                    embeddings = F.normalize(embeddings, dim=1)
                if options["save_to_cpu"]:
                    embeddings = embeddings.cpu()
                for index, vector in zip(batch.indices, embeddings, strict=True):
                    vectors[index] = vector
                cut += batch.num_truncated
                bar.update(len(batch.indices))
        if cut:
            logger.warning(
                "%d of %d texts were longer than %d tokens and were cut",
                cut,
                len(inputs),
                self.max_seq_length,
            )
        return torch.stack(vectors) if vectors else torch.tensor([], device=device)

    def save(
        self, path: str | os.PathLike[str], model_name: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Save so that plain `SentenceTransformer(path)` loads it (latent pooling needs this package).

        The folder is written beside `path` and takes its place when it is complete: a full disk or Ctrl-C
        leaves an earlier save as it was. A warning tells where plain sentence-transformers would pool other
        tokens.

        Raises:
            ValueError: the weights are int8.
        """
        if self._quantized:
            raise ValueError("int8 weights are not saved: save before quantize(), and quantize when serving")
        if getattr(self.backbone, "_hf_peft_config_loaded", False):  # training may go on with it
            merged = self._copied_to_cpu()
            merged.merge()  # an adapter saved alone would come back causal
            merged.save(path, model_name, *args, **kwargs)
            return
        with staged(Path(path), _of_an_earlier_save(Path(path))) as staging:
            super().save(str(staging), model_name, *args, **kwargs)
            modules = json.loads((staging / "modules.json").read_text())
            for module in modules:
                module["type"] = SAVED_NAMES.get(module["type"], module["type"])
            (staging / "modules.json").write_text(json.dumps(modules, indent=2))
            card = staging / "README.md"
            if (Path(path) / card.name).exists() and not is_generated_card(Path(path) / card.name):
                card.unlink(missing_ok=True)  # what was there stays
            if model_name and card.exists():
                text = card.read_text(encoding="utf8")
                card.write_text(
                    text.replace(self._model_card_model_id_placeholder, model_name), encoding="utf8"
                )
        self._warn_of_plain_reload()

    def _copied_to_cpu(self) -> Encoder:
        """A copy that takes no memory of the device, which may have none left."""
        memo = {}
        for tensor in (*self.parameters(), *self.buffers()):
            copied = tensor.detach().to("cpu", copy=True)
            known = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(copied, tensor.requires_grad) if known else copied
        return copy.deepcopy(self, memo)

    def _warn_of_plain_reload(self) -> None:
        """Say where plain sentence-transformers attends otherwise than this package, or pools others."""
        config: Any = self.backbone.config
        if config.model_type in CAUSAL_ELSEWHERE and not getattr(config, "is_causal", True):
            logger.warning(
                "loaded by plain sentence-transformers, %s attends causally where nothing is padded: its "
                "layers do not read is_causal; load it with this package",
                config.model_type,
            )
        rows = self.backbone.get_input_embeddings().num_embeddings
        if (self.tokenizer.pad_token_id or 0) >= rows:
            logger.warning(
                "loaded by plain sentence-transformers, batches fail: the pad token has no embedding; set "
                "tokenizer.pad_token to another"
            )
        weighed = self.pooling == "sif"
        if weighed and self.dtype != torch.float32:
            logger.warning(
                "loaded by plain sentence-transformers, token weights need the encoder in float32: "
                "model_kwargs={'dtype': 'float32'}"
            )
        if self.pooling == "last_token" or getattr(self[2 if weighed else 1], "include_prompt", True):
            return
        if weighed and any(self.prompts.values()):
            logger.warning(
                "loaded by plain sentence-transformers, this encoder's vectors of texts with a prompt are "
                "shorter: of token weights it adds up the prompt's too"
            )
        if self.transformer.template is not None:
            logger.warning(
                "loaded by plain sentence-transformers, this encoder also pools its template's tokens"
            )
        for name, prompt in self.prompts.items():
            if prompt and self.transformer.prompt_joins_text(prompt):
                logger.warning(
                    "the end of prompt %r (%r) is one token with the text behind it: loaded by plain "
                    "sentence-transformers, the encoder leaves the text's first word out of pooling. "
                    "End the prompt with a newline or a special token.",
                    name,
                    prompt,
                )
