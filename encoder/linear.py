"""The backbone's linear layers on a CPU: oneDNN's product in fp32, and int8 weights for serving."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if need_x else None,
            rows.t() @ x.flatten(0, -2) if need_weight else None,  # MKL is the faster one here
            rows.sum(0) if need_bias else None,
        )


class OneDNNLinear(nn.Linear):
    """An `nn.Linear` that multiplies through oneDNN where the BLAS behind torch.mm is slower: fp32 on a CPU.

    Forward and the gradient of the input took 1.2 times as long with MKL on an AMD processor
    (bench/NOTES.md).
    Parameters, checkpoints and adapters are those of `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = input, self.weight, self.bias
        if x.device.type == "cpu" and x.shape[:-1].numel() == 1:
            # A single row takes another routine, and other bits: a text's vector would depend on its company.
            return self.forward(x.reshape(1, -1).expand(2, -1))[:1].reshape(*x.shape[:-1], -1)
        plain = x.dtype != torch.float32 or weight.dtype != x.dtype or x.device.type != "cpu" or not x.numel()
        if plain or x.dim() < 2 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return F.linear(
                x, weight, bias
            )  # torch's compiler takes oneDNN's only of weights it packed itself
        trained = (x, weight) if bias is None else (x, weight, bias)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained):
            return _OneDNNLinear.apply(x, weight, bias)  # type: ignore[return-value]
        return _product(x, weight, bias)


class OneDNNConv1D(Conv1D):
    """GPT-2's linear layer, whose weight lies the other way: of a few rows too the bits are those of many."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dtype != torch.float32 or self.weight.dtype != x.dtype or x.device.type != "cpu"
        if plain or not x.numel() or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        product = _product(rows.expand(max(len(rows), 2), -1), self.weight.t(), self.bias)
        return product[: len(rows)].reshape(*x.shape[:-1], -1)


def use_onednn(model: nn.Module) -> None:
    """Let a model's linear layers multiply through oneDNN, in place, where this build of torch has it."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) in (nn.Linear, Conv1D):
                own: Any = OneDNNLinear if type(module) is nn.Linear else OneDNNConv1D
                module.__class__ = own


def quantize_linear(model: nn.Module, width: int) -> int:
    """Replace a model's linear layers by torch's int8 ones, in place; returns how many.

    Weights have one scale an output, inputs one a call, taken as they come ("dynamic" quantisation). Layers
    with more than `width` inputs, an MLP's way back, stay as they are: a few inputs there are thousands of
    times the others (Sun et al., Massive activations in large language models, 2024), and one scale can't
    hold both.

    Raises:
        ValueError: the model is not on a CPU, or torch was built without int8 products for it.
    """
    from torch.ao.nn.quantized.dynamic import Linear as Int8Linear
    from torch.ao.quantization import per_channel_dynamic_qconfig

    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"int8 weights are for a CPU, the model is on {device}")
    engines = torch.backends.quantized.supported_engines
    engine = next((name for name in ("onednn", "x86", "qnnpack") if name in engines), None)
    if engine is None:
        raise ValueError("this build of torch has no int8 products for this CPU")
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    count = 0
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and child.in_features <= width:
                    float_layer = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                    float_layer.load_state_dict({k: v.float() for k, v in child.state_dict().items()})
                    float_layer.qconfig = per_channel_dynamic_qconfig  # type: ignore[assignment]
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        setattr(parent, name, Int8Linear.from_float(float_layer))
                    count += 1
    finally:
        torch.backends.quantized.engine = before
    return count
