"""Activations and rotary tables whose bits on a CPU depend on each number alone, on any number of threads.

torch computes exp, cos and the like by whole vectors, and what is left at the end of a thread's share one by
one, by another routine that may differ in the last bit. Where shares end depends on how many numbers there
are: a text's vector would depend on its company, and a corpus on the machine. Here all shares are of whole
vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.activations import ACT2FN

SHARE = 32768  # numbers that torch leaves to one thread (at::internal::GRAIN_SIZE)
GELU_ALONE = 16384  # of which F.gelu leaves the work to one thread; it shares more among all
LANES = 64  # two vectors of bf16 in 512 bits: the longest step of torch's loops, a multiple of the others
ACTIVATIONS = {
    type(ACT2FN[name])
    for name in ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu")
}
OF_GELU = {type(ACT2FN[name]) for name in ("gelu", "gelu_pytorch_tanh")}
CACHED = "max_seq_len_cached"  # the library's name for the length that dynamic RoPE's frequencies are for
ROPES = {"default", "linear", "llama3", "yarn"}  # the others look at how long a batch's texts are


def by_whole_vectors(function: Callable[[Tensor], Tensor], x: Tensor, gelu: bool = False) -> Tensor:
    """function(x) of each number, in calls of which every thread gets a multiple of LANES.

    Args:
        function: torch's, of each number alone.
        x: of any shape.
        gelu: the function is `F.gelu`, which has a rule of its own for how many threads work.
    """
    flat, threads = x.reshape(-1), torch.get_num_threads()
    count = flat.numel() // LANES * LANES
    all_work = count > GELU_ALONE + LANES * threads if gelu else count >= SHARE * threads
    step = LANES * threads if all_work else GELU_ALONE if gelu else SHARE
    shared = count // step * step
    pieces = [flat[:shared]] if all_work or not gelu else flat[:shared].split(step)
    found = [function(part) for part in (*pieces, flat[shared:count]) if len(part)]
    if rest := flat.numel() - count:
        found.append(function(pad(flat[count:], (0, LANES - rest)))[:rest])
    return (found[0] if len(found) == 1 else torch.cat(found)).view(x.shape)


def _on_its_own(x: Tensor) -> bool:
    """Whether torch computes at once, on a CPU, and nobody asks for gradients; a graph has other kernels."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Whole(nn.Module):
    """Stands before another class, of which a module was before."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, kind = type(self).__bases__
        return _new, (mixin, kind), self.__dict__


class _Activation(_Whole):
    def forward(self, input: Tensor) -> Tensor:
        if not _on_its_own(input) or not input.numel():
            return super().forward(input)
        return by_whole_vectors(super().forward, input, type(self).__bases__[1] in OF_GELU)


class _Rotary(_Whole):
    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        packed = position_ids.dim() == 2 and len(position_ids) == 1
        if not _on_its_own(x) or not packed:
            return super().forward(x, position_ids, *args, **kwargs)
        length, width = position_ids.shape[1], 2 * max(map(len, _frequencies(self)))
        rows = max(SHARE // (width * LANES), 1) * LANES  # whole vectors, and one thread's, whatever the width
        parts = pad(position_ids, (0, -length % LANES)).split(rows, 1)
        tables = [super(_Rotary, self).forward(x, part, *args, **kwargs) for part in parts]
        if isinstance(tables[0], Tensor):  # of complex numbers
            return torch.cat(tables, 1)[:, :length]
        return tuple(torch.cat(table, 1)[:, :length] for table in zip(*tables, strict=True))


def _frequencies(module: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")]


def _fixed(rope_type: Any) -> bool:
    """Whether tables depend on positions alone; some models have one type for each type of layer."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return all(isinstance(kind, str) and kind in ROPES for kind in kinds)


def alone_beyond(config: Any) -> int | None:
    """The length beyond which a text has to stand alone, as all of a batch turn with its longest, or None.

    So do LongRoPE and dynamic RoPE beyond the length that the model first knew.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # one a type of layer
    varying = [kind for kind in kinds if kind.get("rope_type") in ("longrope", "dynamic")]
    known = "original_max_position_embeddings"
    return min((kind.get(known) or config.max_position_embeddings for kind in varying), default=None)


def restore_rope(model: nn.Module) -> None:
    """Give dynamic RoPE the frequencies that it began with; the library keeps those of a longer text."""
    for module in model.modules():
        known = getattr(module, "original_max_seq_len", None)
        if known is None:
            continue
        kinds: Any = getattr(module, "rope_type", None)  # of several, one a type of layer
        prefixes = [f"{kind}_" for kind in kinds] if isinstance(kinds, dict) else [""]
        for prefix in prefixes:
            first, cached = (getattr(module, prefix + name, None) for name in ("original_inv_freq", CACHED))
            if first is not None and cached is not None and cached != known:
                now = getattr(module, f"{prefix}inv_freq")
                module.register_buffer(f"{prefix}inv_freq", first.to(now.device), persistent=False)
                setattr(module, prefix + CACHED, known)


@functools.cache
def _whole(mixin: type, kind: type) -> type:
    return type(kind.__name__, (mixin, kind), {})


def _new(mixin: type, kind: type) -> Any:
    return object.__new__(_whole(mixin, kind))


def use_whole_vectors(model: nn.Module) -> None:
    """Let a model's activations and rotary tables compute so, in place, where gradients are off."""
    for module in model.modules():
        kind = type(module)
        if kind in ACTIVATIONS:
            module.__class__ = _whole(_Activation, kind)
        elif (
            kind.__name__.endswith("RotaryEmbedding")
            and _fixed(getattr(module, "rope_type", None))
            and _frequencies(module)
        ):
            module.__class__ = _whole(_Rotary, kind)
