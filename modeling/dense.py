"""Products with a layer's matrix, on CPUs by the library that is quickest for the number of tokens."""

import platform

import torch
from torch import nn
from torch.nn import functional as F

FEW, MANY = 14, 32
"""oneDNN is quicker than PyTorch's default up to so many tokens, and from so many on; between them it is slower."""
DEEP = 1280
"""Up to so many sums a product MKL is quicker than oneDNN for a thin matrix; measured from 768 to 3,072."""
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear(x, weight, bias)` where no gradient is wanted: `[..., in]` -> `[..., out]`.

    In single precision on an x86 CPU PyTorch takes MKL, which for a step of decoding needs two to four times as long
    as oneDNN. What is taken depends on the shape alone, so that rows keep their bits whatever their route is.
    """
    if not x.is_cpu or not IS_X86 or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    tokens = x.numel() // x.shape[-1]
    if tokens == 0 or FEW < tokens < MANY or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def thin(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As [`dense`] for an adapter's matrix: `[tokens, in]` -> `[tokens, out]`, perhaps a transposed view.

    Where tokens are few and the matrix is not `DEEP`, what a call of oneDNN costs by itself is as much as the product.
    MKL costs less, and with the matrix first half as much as with the tokens first.
    """
    few = x.shape[0] < MANY and x.is_cpu and x.dtype == weight.dtype == torch.float32
    if not few or x.shape[1] > DEEP or not IS_X86 or torch.compiler.is_compiling():
        return dense(x, weight)
    return torch.mm(weight, x.t()).t()


def plain_weight(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The weight of a layer that does what PyTorch's own linear one does, in the dtype and on the device of `x`."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    weight = layer.weight
    plain = type(weight) in (nn.Parameter, torch.Tensor) and not hasattr(weight, "ds_id")
    return weight if plain and weight.dtype == x.dtype and weight.device == x.device else None
