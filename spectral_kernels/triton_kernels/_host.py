"""What both host functions need: shape checks before raw pointers are handed out, device choice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse a tensor a kernel would read out of bounds."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be ``x``'s."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
