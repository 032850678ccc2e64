"""Turns a decoder-only model bidirectional, and proves by probing that every layer of it is.

transformers honours `config.is_causal = False`, which also survives saving, but not everywhere: some layers
read only their own `is_causal`, some masks ignore both, and convolutions and state spaces know one direction
only. So no flag is believed. Each part of each layer gets four rows that differ in one token, and its output
is what counts:

    row 0  the sequence as it is
    row 1  one real token replaced: earlier positions must move
    row 2  row 0 again: any difference to row 0 is numerical noise
    row 3  one padding token replaced: no real position may move

The rows are set anew before every part, so a finding belongs to that part and to no layer below it, and one
forward pass is enough for all of them.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from uncausal.encoder.layers import decoder_layers, find_decoder

LENGTH, PADDING = 10, 2  # tokens of a probe, and how many of them are padding


class NotBidirectionalError(ValueError):
    """A probe failed; `layer` names the part of the model at fault, when one is."""

    def __init__(self, message: str, layer: str | None = None):
        super().__init__(message)
        self.layer = layer


@dataclass(frozen=True)
class BidirectionalReport:
    """What the probes of a model showed.

    Attributes:
        attention: the attention implementation under which the model was probed.
        layers: number of decoder layers, all of them bidirectional.
        windows: layers that see a neighbourhood only, with the number of tokens they see on either side.
        packed: True when packed documents were shown not to see each other; None where that was not probed.
    """

    attention: str
    layers: int
    windows: dict[str, int] = field(default_factory=dict)
    packed: bool | None = None


def make_bidirectional(model: nn.Module) -> nn.Module:
    """Lets every token of a decoder-only model attend to every other (LLM2Vec, arXiv 2404.05961, section 2).

    Sets `is_causal` to false in the model's configs, which `save_pretrained` keeps, and in the attention
    layers, some of which look nowhere else. Sliding windows stay, on both sides of a token. Call
    `assert_bidirectional` afterwards.

    Args:
        model: a decoder-only transformers model, with or without a head or peft adapters; changed in place.

    Returns:
        The same model.

    Raises:
        NotBidirectionalError: the model is an encoder-decoder, or has ALiBi.
    """
    _refuse_alibi(model)
    return set_causal(model, False)


def make_causal(model: nn.Module) -> nn.Module:
    """Undoes `make_bidirectional`."""
    return set_causal(model, True)


def set_causal(model: nn.Module, is_causal: bool) -> nn.Module:
    """Set the switch in the configurations and layers of a model, whatever follows."""
    pretrained, decoder = find_decoder(model)
    configs: list[Any] = [pretrained.config, pretrained.config.get_text_config(decoder=True), decoder.config]
    for layer in _named_layers(model).values():
        for module in layer.modules():
            if isinstance(getattr(module, "is_causal", None), bool):
                module.is_causal = is_causal  # type: ignore[assignment]
            configs.append(getattr(module, "config", None))
    for config in configs:
        if config is not None:
            config.is_causal = is_causal
    return model


def _refuse_alibi(model: nn.Module) -> None:
    """Refuse a penalty on distance that is a key's place alone: without a mask it favours what comes last."""
    config: Any = find_decoder(model)[1].config
    own = getattr(config, "alibi", config.model_type == "bloom")
    if own or getattr(getattr(config, "attn_config", None), "alibi", False):
        raise NotBidirectionalError("ALiBi is right under a causal mask alone: bidirectional=False")


def _named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers by their full names, from the first to the last."""
    if getattr(find_decoder(model)[0].config, "is_encoder_decoder", False):
        raise NotBidirectionalError(f"{type(model).__name__} is an encoder-decoder: use its encoder")
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: layer for layer in decoder_layers(model)}


def assert_bidirectional(model: nn.Module, *, quick: bool = False) -> BidirectionalReport:
    """Proves by probing that a model is bidirectional in every layer, whatever its flags say.

    Without padding and with padding on either side: every part that mixes tokens carries a change to the
    positions before it, the last token reaches the first position, and padding moves nothing. Under the
    attention "uncausal", packed documents do not see each other. Costs eleven forward passes over a few
    tokens and leaves no trace.

    Args:
        model: a decoder-only transformers model, with or without a head or peft adapters.
        quick: one pass over ten tokens without padding, which every part of every layer must let through;
            for a model that was proven when it was converted.

    Returns:
        The windows that were found, and what was proven.

    Raises:
        NotBidirectionalError: naming the layer at fault, where one is.
    """
    layers = _named_layers(model)
    for name, layer in layers.items():
        _refuse_convolutions(name, layer)
    _, decoder = find_decoder(model)
    attention = str(decoder.config._attn_implementation)
    if attention == "uncausal" and not decoder._can_set_attn_implementation():
        raise NotBidirectionalError(
            f"{type(decoder).__name__} cannot use uncausal attention: take eager or sdpa"
        )
    windows: dict[str, int] = {}
    with _undisturbed(model), _in_float32(decoder, list(layers.values())) as dtype:
        probe = _Probe(decoder, dtype)
        for side in (None,) if quick else (None, "left", "right"):
            windows |= _probe_layers(probe, layers, side)
        for i, (name, layer) in enumerate(layers.items()):
            declared = _declared_window(layer, decoder.config, i)
            if declared is not None:
                windows[name] = declared
        packed = None
        if not quick:
            _probe_ends(probe, all_local=len(windows) == len(layers))
            packed = _probe_packing(probe) if attention == "uncausal" else None
    return BidirectionalReport(attention, len(layers), windows, packed)


@contextmanager
def _undisturbed(model: PreTrainedModel | nn.Module) -> Iterator[None]:
    """Inference mode of every kind, with dropout modes and random state as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _in_float32(decoder: PreTrainedModel, layers: list[nn.Module]) -> Iterator[torch.dtype]:
    """Computes in float32, widening the weights of one layer at a time; yields the dtype computed in.

    The first token of a real model carries activations so massive that bf16 rounds away what else moves it.
    """
    embeddings = decoder.get_input_embeddings()
    dtype = next(embeddings.parameters()).dtype
    rest = [m for m in decoder.children() if m is not embeddings and not isinstance(m, nn.ModuleList)]
    modules = [m for m in (*layers, *rest) if all(t.is_floating_point() for t in m.parameters())]
    if dtype not in (torch.float16, torch.bfloat16) or not set(layers) <= set(modules):
        yield dtype
        return
    narrowed: list[tuple[Tensor, torch.dtype]] = []

    def wide(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x

    def widen(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                narrowed.append((tensor, tensor.dtype))
                tensor.data = tensor.data.float()
        return tree_map(wide, (args, kwargs))

    def narrow(*_: Any) -> None:
        while narrowed:
            tensor, kept = narrowed.pop()
            tensor.data = tensor.data.to(kept)

    handles = [m.register_forward_pre_hook(widen, with_kwargs=True) for m in modules]
    handles += [m.register_forward_hook(narrow) for m in modules]
    try:
        yield torch.float32
    finally:
        narrow()
        for handle in handles:
            handle.remove()


class _Probe:
    """Runs the decoder on short made-up inputs."""

    def __init__(self, decoder: PreTrainedModel, dtype: torch.dtype):
        self.decoder, self.config = decoder, decoder.config
        weight = next(decoder.get_input_embeddings().parameters())
        self.device = weight.device
        self.eps = torch.finfo(dtype).eps
        self.generator = torch.Generator().manual_seed(0)
        self.parameters = inspect.signature(decoder.forward).parameters
        special = {v for k, v in vars(self.config).items() if k.endswith(("token_id", "token_index"))}
        self.vocabulary = [i for i in range(min(len(weight), 1000)) if i not in special]

    def tokens(self, *shape: int) -> Tensor:
        choice = torch.randint(len(self.vocabulary), shape, generator=self.generator)
        return torch.tensor(self.vocabulary)[choice].to(self.device)

    def other(self, tokens: Tensor) -> Tensor:
        """Tokens that differ from the given ones everywhere."""
        index = torch.tensor([self.vocabulary.index(i) + 1 for i in tokens.tolist()], dtype=torch.long)
        return torch.tensor(self.vocabulary)[index % len(self.vocabulary)].to(self.device)

    def run(self, input_ids: Tensor, mask: Tensor | None = None, **kwargs) -> Tensor:
        """(B, L) -> (B, L, d)"""
        if mask is not None and "position_ids" in self.parameters:
            kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        for name, value in (("use_cache", False), ("return_dict", True)):
            if name in self.parameters:
                kwargs[name] = value
        return self.decoder(input_ids=input_ids, attention_mask=mask, **kwargs).last_hidden_state

    def distance(self, a: Tensor, b: Tensor) -> float:
        """The greatest relative distance of two token states: (L, d), (L, d)."""
        a, b = a.double(), b.double()
        return ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-12)).max().item()


def _real_tokens(side: str | None) -> slice:
    starts = {None: (0, LENGTH), "left": (PADDING, LENGTH), "right": (0, LENGTH - PADDING)}
    return slice(*starts[side])


def _mask(rows: int, side: str | None, device: torch.device) -> Tensor | None:
    if side is None:
        return None  # the library's fast paths are taken without a mask, so this case is one of its own
    mask = torch.zeros(rows, LENGTH, dtype=torch.long, device=device)
    mask[:, _real_tokens(side)] = 1
    return mask


class _Part:
    """Hooks on one module: sets the four rows before it runs and compares them afterwards."""

    def __init__(self, name: str, module: nn.Module, probe: _Probe, side: str | None):
        self.name, self.module, self.probe = name, module, probe
        self.real = _real_tokens(side)
        self.middle = (self.real.start + self.real.stop) // 2
        self.padding = {None: None, "left": 0, "right": LENGTH - 1}[side]
        self.moved = torch.zeros(LENGTH, dtype=torch.bool)  # by the real token in the middle
        self.leaked = torch.zeros(LENGTH, dtype=torch.bool)  # by the padding token
        self.seen = False
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after),
        ]

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        keys = ["hidden_states", *range(len(args)), *kwargs]
        key = next((k for k in keys if _is_states(kwargs.get(k) if isinstance(k, str) else args[k])), None)
        self.armed = key is not None
        if key is None:
            return None
        x = kwargs[key] if isinstance(key, str) else args[key]
        x = x[:1].repeat(4, *[1] * (x.ndim - 1))
        noise = torch.randn(x.shape[2:], generator=self.probe.generator).to(x)
        noise = noise * x[0].float().square().mean().sqrt().to(x.dtype)
        x[1, self.middle] = noise
        if self.padding is not None:
            x[3, self.padding] = noise
        if isinstance(key, str):
            return args, {**kwargs, key: x}
        return (*args[:key], x, *args[key + 1 :]), kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        states = next((x for x in outputs if _is_states(x)), None)
        if states is None or not self.armed:
            return
        self.seen = True
        clean, changed, again, padded = states.double().cpu().flatten(2)
        # Experts multiply other groups of tokens when one token moves, and round otherwise.
        rounding = (32 if self.probe.eps < 1e-5 else 2) * self.probe.eps
        noise = 10 * (again - clean).abs().max() + rounding * clean.abs().amax(1, keepdim=True)
        self.moved |= ((changed - clean).abs() > noise).any(1)
        self.leaked |= ((padded - clean).abs() > noise).any(1)

    @property
    def reach(self) -> tuple[int, int]:
        """How far a token's influence goes to the left and to the right."""
        moved = self.moved.nonzero().flatten().tolist()
        moved = [i for i in moved if self.real.start <= i < self.real.stop] or [self.middle]
        return max(self.middle - moved[0], 0), max(moved[-1] - self.middle, 0)

    def check(self) -> None:
        left, right = self.reach
        padding = "without padding" if self.padding is None else "in a padded batch"
        if right and not left:
            raise _stays_causal(self.name, self.module, padding)
        if self.leaked[self.real].any():
            raise NotBidirectionalError(
                f"{self.name} ({type(self.module).__name__}) attends padding: it moves real positions",
                self.name,
            )


def _is_states(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim >= 3 and x.shape[:2] == (4, LENGTH) and x.is_floating_point()


def _kind(module: nn.Module) -> str:
    names = " ".join(type(m).__name__ for m in module.modules())
    if re.search(r"Recurrent|RgLru|Delta|Rwkv|Lightning|LSTM|Linear\w*Attention", names):
        return "recurrence or linear attention"
    if re.search(r"Mamba|SSM", names) or any(n.endswith("A_log") for n, _ in module.named_parameters()):
        return "state space"
    return "convolution" if any(isinstance(m, nn.Conv1d) for m in module.modules()) else "attention"


def _refuse_convolutions(name: str, layer: nn.Module) -> None:
    """Refuses what probes can't see: a causal convolution inside a part that also attends."""
    for child, part in layer.named_children():
        for module in part.modules():
            if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
                raise _stays_causal(f"{name}.{child}", part, "in its convolution")


def _stays_causal(name: str, module: nn.Module, where: str) -> NotBidirectionalError:
    kind = f"{type(module).__name__}: {_kind(module)}"
    message = f"{name} ({kind}) stays causal {where}: a token does not reach the positions before it"
    return NotBidirectionalError(message, name)


def _probe_layers(probe: _Probe, layers: dict[str, nn.Module], side: str | None) -> dict[str, int]:
    """Probes every layer and its direct parts in one forward pass; returns the windows that showed."""
    parts: dict[str, list[_Part]] = {}
    try:
        for name, layer in layers.items():
            children = ((f"{name}.{child}", module) for child, module in layer.named_children())
            parts[name] = [_Part(*x, probe, side) for x in ((name, layer), *children)]
        probe.run(probe.tokens(1, LENGTH).repeat(4, 1), _mask(4, side, probe.device))
    finally:
        for part in sum(parts.values(), []):
            for handle in part.handles:
                handle.remove()
    windows = {}
    for name, (whole, *children) in parts.items():
        seen = [part for part in (*children, whole) if part.seen]
        if not seen:
            raise NotBidirectionalError(f"{name} could not be probed: it takes no (B, L, d) states", name)
        for part in seen:
            part.check()
        left, right = (max(x) for x in zip(*(part.reach for part in seen), strict=True))
        room = whole.middle - whole.real.start, whole.real.stop - 1 - whole.middle
        if 0 < left < room[0] or 0 < right < room[1]:
            windows[name] = max(left, right)
    return windows


def _declared_window(layer: nn.Module, config: Any, index: int) -> int | None:
    """The sliding window of a layer by its own word: it may be longer than a probe."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and index < len(kinds) and kinds[index] == "full_attention":
        return None
    if kinds is not None and index < len(kinds) and "sliding" in kinds[index]:
        return getattr(config, "sliding_window", None)
    windows = [getattr(module, "sliding_window", None) for module in layer.modules()]
    return next((w for w in windows if isinstance(w, int) and w > 0), None)


def _probe_ends(probe: _Probe, all_local: bool) -> None:
    """Probes the model as a whole: what the last token and padding do to the output."""
    tokens = probe.tokens(LENGTH - PADDING)
    plain = None
    for side in (None, "left", "right"):
        real = _real_tokens(side)
        size = real.stop - real.start
        rows = probe.tokens(1, LENGTH).repeat(3, 1)
        rows[:, real] = tokens[:size] if side else probe.tokens(size)
        rows[1, real.stop - 1] = probe.other(rows[1, real.stop - 1 : real.stop])
        padding = [i for i in range(LENGTH) if not real.start <= i < real.stop]
        rows[2, padding] = probe.other(rows[2, padding])
        states = probe.run(rows, _mask(3, side, probe.device))[:, real]
        where = f"with padding on the {side}" if side else "without padding"
        first = -2 if all_local else 0  # through windows alone the first position may be out of reach
        if probe.distance(states[1, first, None], states[0, first, None]) <= 32 * probe.eps:
            raise NotBidirectionalError(f"the last token does not reach the first position {where}")
        strict, loose = (1e-5, 1e-3) if probe.eps < 1e-5 else (0.05, 0.1)
        if probe.distance(states[2], states[0]) > strict:
            raise NotBidirectionalError(f"the content of padding on the {side} moves real positions")
        if side is None:
            plain = probe.run(tokens[None])[0]
        elif plain is not None and probe.distance(states[0], plain) > loose:
            raise NotBidirectionalError(f"padding on the {side} moves real positions")


def _probe_packing(probe: _Probe) -> bool:
    """Probes two packed documents: a change in one must leave the other where it was."""
    lengths = (LENGTH // 2 + 1, LENGTH // 2 - 1)
    cu_seqlens = torch.tensor([0, lengths[0], LENGTH], dtype=torch.int32, device=probe.device)
    kwargs: dict[str, Any] = dict(
        cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=lengths[0], max_length_k=lengths[0]
    )
    if "position_ids" in probe.parameters:
        kwargs["position_ids"] = torch.cat([torch.arange(n, device=probe.device) for n in lengths])[None]
    first, second = slice(0, lengths[0]), slice(lengths[0], LENGTH)
    tokens = probe.tokens(LENGTH)
    states = probe.run(tokens[None], **kwargs)[0]
    strict = 1e-5 if probe.eps < 1e-5 else 0.05
    for changed, kept in ((first, second), (second, first)):
        other = tokens.clone()
        other[changed] = probe.other(tokens[changed])
        if probe.distance(probe.run(other[None], **kwargs)[0, kept], states[kept]) > strict:
            raise NotBidirectionalError("packed documents see each other")
    return True
