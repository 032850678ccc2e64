"""Which model families become bidirectional, found by probing a tiny random model of each.

`python -m uncausal.bench.families` writes the result to FAMILIES.md beside this file; the tests assert the
same result. A family counts as verified when all probes hold under all three attention
implementations and their outputs agree.
"""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

import uncausal.encoder.attention  # noqa: F401  registers "uncausal"
from uncausal.encoder.conversion import NotBidirectionalError, assert_bidirectional, make_bidirectional

IMPLEMENTATIONS = ("eager", "sdpa", "uncausal")
PAGE = Path(__file__).with_name("FAMILIES.md")
_PREFACE = """\
# Model families

`python -m uncausal.bench.families` wrote this page: each family was built small with random weights,
converted, and probed under three attention implementations: does the last token reach the first
position, does padding on either side move anything, do packed documents see each other (packed
attention alone). "plain reload" says whether a saved encoder stays bidirectional where this package is
not installed."""

# Sizes under all the names that configs give them; a config takes those that it knows.
_TINY: dict[str, Any] = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
    n_embd=32, n_head=4, n_layer=2, n_positions=64, n_inner=48, ffn_dim=48, word_embed_proj_dim=32,
    rotary_dim=4, num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, moe_k=2, moe_topk=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    n_group=1, topk_group=1, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
_LOCAL_GLOBAL = dict(layer_types=["sliding_attention", "full_attention"])
_LATENT = dict(num_key_value_heads=4)  # multi-head latent attention: a key head for every query head

# model type -> what its tiny config needs beyond _TINY
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "mixtral": {}, "ministral": {}, "ministral3": {}, "qwen2": {},
    "qwen2_moe": {}, "qwen3": {}, "qwen3_moe": {}, "gemma": {}, "gemma2": {}, "gemma3_text": _LOCAL_GLOBAL,
    "gemma3n_text": dict(
        num_kv_shared_layers=0, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8
    ),
    "phi": {}, "phi3": {}, "phimoe": {}, "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": {}, "flex_olmo": {},
    "granite": {}, "granitemoe": {}, "smollm3": {}, "stablelm": {}, "nemotron": {}, "gpt2": {},
    "gpt_bigcode": {}, "gpt_neox": {}, "gpt_oss": {}, "gptj": {}, "opt": {}, "bloom": {}, "falcon": {},
    "cohere": {}, "cohere2": {}, "glm": {}, "glm4": {}, "glm4_moe": {}, "exaone4": {}, "starcoder2": {},
    "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "minicpm3": _LATENT, "ernie4_5": {}, "ernie4_5_moe": {},
    "hunyuan_v1_dense": {}, "minimax_m2": {}, "dots1": {}, "seed_oss": {}, "apertus": {}, "arcee": {},
    "helium": {}, "jetmoe": {}, "nanochat": {}, "persimmon": {}, "biogpt": {}, "bitnet": {}, "diffllama": {},
    "afmoe": {},
}  # fmt: skip

# model type -> what its tiny config needs, and the part that stays causal whatever one sets
CAUSAL_BY_NATURE: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, "layers.0.mixer"),
    "bamba": (dict(mamba_n_heads=4, mamba_d_head=16), "layers.0.mamba"),
    "jamba": ({}, "layers.0.mamba"),
    "recurrent_gemma": ({}, "layers.0.temporal_block"),
    "lfm2": (dict(layer_types=["full_attention", "conv"]), "layers.1.conv"),
    "qwen3_next": ({}, "layers.0.linear_attn"),
    "minimax": (dict(layer_types=["full_attention", "linear_attention"]), "layers.1.self_attn"),
    "rwkv": ({}, "blocks.0.attention"),
    "llama4_text": (dict(attention_chunk_size=32), "layers.0.self_attn"),
}


@dataclass
class Family:
    """What the probes of one family showed.

    Attributes:
        model_type: the library's name of the family.
        architecture: class of the headless model.
        verdicts: per attention implementation "yes", or why not.
        disagreement: greatest difference between the outputs of two implementations, or of two ways of
            padding, relative to the largest output.
        by_config: whether `is_causal: false` in config.json is enough where this package is not installed.
        windowed: number of layers with a sliding window, and of all layers.
    """

    model_type: str
    architecture: str
    verdicts: dict[str, str] = field(default_factory=dict)
    disagreement: float = 0.0
    by_config: bool = True
    windowed: tuple[int, int] = (0, 0)

    @property
    def verified(self) -> bool:
        return all(self.verdicts.get(name) == "yes" for name in IMPLEMENTATIONS)


def tiny_model(model_type: str, attn_implementation: str = "eager", **overrides: Any) -> PreTrainedModel:
    """Builds a headless random model of two layers, with weights large enough that attention matters."""
    kind = type(AutoConfig.for_model(model_type))
    known = set(vars(kind())) | set(kind.attribute_map)
    config = kind(**{k: v for k, v in _TINY.items() if k in known} | overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation=attn_implementation)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("sinks"):
                parameter.data.normal_(0, 0.2)
    return model.eval()


def probe_family(model_type: str, **overrides: Any) -> Family:
    """Converts a tiny model under every attention implementation, probes it, and compares the outputs."""
    family = Family(model_type, "")
    outputs: list[Tensor] = []
    for name in IMPLEMENTATIONS:
        try:
            model = tiny_model(model_type, name, **copy.deepcopy(overrides))
            family.architecture = type(model).__name__
            if name == "uncausal" and not model._can_set_attn_implementation():
                family.verdicts[name] = "not in the library"
                continue
            report = assert_bidirectional(make_bidirectional(model))
        except NotBidirectionalError as error:
            family.verdicts[name] = str(error)
            continue
        except (ValueError, KeyError, NotImplementedError) as error:
            if "does not support" not in str(error) and not isinstance(error, KeyError):
                raise
            family.verdicts[name] = "not in the library"
            continue
        family.verdicts[name] = "yes"
        family.windowed = (len(report.windows), report.layers)
        outputs += _outputs(model)
        if name != "uncausal":
            family.by_config &= _bidirectional_by_config(model_type, name, overrides)
    for states in outputs[1:]:
        difference = (states - outputs[0]).abs().max() / outputs[0].abs().max()
        family.disagreement = max(family.disagreement, float(difference))
    return family


def _bidirectional_by_config(model_type: str, attn_implementation: str, overrides: dict) -> bool:
    """Whether the config's switch alone is enough, which is all that a saved model carries."""
    model = tiny_model(model_type, attn_implementation, **copy.deepcopy(overrides))
    model.config.is_causal = False
    try:
        assert_bidirectional(model)
    except NotBidirectionalError:
        return False
    return True


def _outputs(model: PreTrainedModel) -> list[Tensor]:
    """The states of three documents, padded on the left, on the right, and packed where that exists."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 128, (n,), generator=generator) for n in (14, 9, 3)]
    placed = "position_ids" in inspect.signature(model.forward).parameters
    longest = len(documents[0])
    batches: list[tuple[dict[str, Any], Tensor]] = []
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
        for row, document in enumerate(documents):
            place = slice(longest - len(document), None) if side == "left" else slice(len(document))
            ids[row, place], mask[row, place] = document, 1
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if placed else {}
        batches.append(({"input_ids": ids, "attention_mask": mask, **positions}, mask.bool()))
    if model.config._attn_implementation == "uncausal":
        cu_seqlens = torch.tensor([0, *(len(x) for x in documents)]).cumsum(0, dtype=torch.int32)
        packed = dict(
            cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest
        )
        positions = (
            {"position_ids": torch.cat([torch.arange(len(x)) for x in documents])[None]} if placed else {}
        )
        ids = torch.cat(documents)[None]
        batches.append(({"input_ids": ids, **packed, **positions}, torch.ones_like(ids, dtype=torch.bool)))
    with torch.no_grad():
        return [model(**inputs, use_cache=False).last_hidden_state[real] for inputs, real in batches]


def probe_all() -> list[Family]:
    """Probes every family of the table."""
    return [probe_family(model_type, **overrides) for model_type, overrides in FAMILIES.items()]


def table(families: Iterable[Family]) -> str:
    """Formats probed families as Markdown."""
    families = list(families)
    verified = sum(family.verified for family in families)
    lines = [
        f"{verified} of {len(families)} families verified under all three attention implementations, with "
        f"transformers {transformers.__version__}.",
        "",
        "| family | eager | sdpa | uncausal | sliding window | plain reload |",
        "|---|---|---|---|---|---|",
    ]
    for family in families:
        verdicts = " | ".join(family.verdicts[name] for name in IMPLEMENTATIONS)
        windowed, layers = family.windowed
        window = "no" if not windowed else "all layers" if windowed == layers else "some layers"
        reload = "yes" if family.by_config else "needs uncausal"
        lines.append(f"| {family.architecture.removesuffix('Model')} | {verdicts} | {window} | {reload} |")
    return "\n".join(lines)


def main() -> None:
    PAGE.write_text(f"{_PREFACE}\n\n{table(probe_all())}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
