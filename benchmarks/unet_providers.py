"""A whole training step of Stable Diffusion's UNets with random weights, adapted by each method.

A step is zero_grad, forward, backward and AdamW. The oracle is the frozen model: a fresh adapter
must give its loss, and the step must find gradients for what it trains that are finite and not all
zero. That the gradients of each layer are right is checked in ``providers.py`` and in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from adapted import METHODS, TARGETS, Adapt, Base, held_bytes
from providers import Candidate, Tensors, Unavailable
from torch import Tensor, nn
from torch.nn.functional import mse_loss

CONTEXT_TOKENS = 77
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_SD15 = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

#: Arguments of ``UNet2DConditionModel``. "sd15" and "sdxl" are the published models; "-cut" ones
#: have the same widths in fewer blocks, so that a CPU finishes a step in seconds.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "sd15-cut": {
        **_SD15,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 1,
    },
    "sdxl": {**_SDXL, "transformer_layers_per_block": (1, 2, 10)},
    "sdxl-cut": {
        **_SDXL,
        "transformer_layers_per_block": (1, 1, 2),
        "layers_per_block": 1,
    },
    "toy": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
}


def unet(name: str) -> nn.Module:
    """A UNet with random weights; :class:`Unavailable` without diffusers."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise Unavailable("diffusers is not installed") from error
    return UNet2DConditionModel(**CONFIGS[name])


@lru_cache
def adapted_shapes(name: str) -> tuple[tuple[int, int], ...]:
    """Shape (out, in) of every attention projection of a UNet."""
    with torch.device("meta"):
        model = unet(name)
    layers = Base(model, TARGETS).layers(model)
    return tuple((layer.out_features, layer.in_features) for _, layer in layers)


@dataclass(frozen=True)
class UNetCase:
    """One training step of a UNet on latents [batch, 4, size, size]."""

    model: str
    size: int
    device: str
    dtype: str = "float32"
    batch: int = 1

    def __str__(self) -> str:
        kind = {"float32": "", "bfloat16": "-bf16"}[self.dtype]
        return f"{self.model}-{self.batch}x{self.size}x{self.size}{kind}-{self.device}"

    def build(self) -> UNetProblem:
        return UNetProblem(self)

    def note(self) -> str:
        """How much is adapted."""
        return f"{len(adapted_shapes(self.model))} layers"

    def facts(self) -> dict[str, float]:
        """``adapted_mib``: one copy of the adapted weights."""
        numbers = sum(rows * columns for rows, columns in adapted_shapes(self.model))
        return {"adapted_mib": numbers * _DTYPES[self.dtype].itemsize / 2**20}


class UNetProblem:
    """A frozen UNet, one batch of latents and captions, and what to predict."""

    def __init__(self, case: UNetCase) -> None:
        self.case = case
        torch.manual_seed(0)
        dtype, device = _DTYPES[case.dtype], case.device
        with torch.device(device):
            model = unet(case.model)
        # Not model.to: diffusers warns of every cast.
        self.base = Base(nn.Module.to(model, device, dtype), TARGETS)
        options = {"device": device, "dtype": dtype}
        shape = (case.batch, model.config.in_channels, case.size, case.size)
        self.sample = torch.randn(shape, **options)
        self.target = torch.randn(shape, **options)
        width = model.config.cross_attention_dim
        self.inputs: dict[str, Any] = {
            "timestep": torch.full((case.batch,), 500, device=device),
            "encoder_hidden_states": torch.randn(case.batch, CONTEXT_TOKENS, width, **options),
        }
        if model.config.addition_embed_type:
            # Pooled caption, and original size, crop and target size of the picture.
            self.inputs["added_cond_kwargs"] = {
                "text_embeds": torch.randn(case.batch, 1280, **options),
                "time_ids": torch.full((case.batch, 6), 1024.0, **options),
            }

    def loss(self, model: nn.Module, sample: Tensor) -> Tensor:
        return mse_loss(model(sample, **self.inputs).sample.float(), self.target.float())

    @cached_property
    def expected(self) -> Tensors:
        """The loss of the frozen model, and that gradients are as they should be."""
        with torch.no_grad():
            loss = self.loss(self.base.model, self.sample)
        return [loss[None], torch.ones(1)]

    def candidate(self, step: Callable[[], Tensors], held: int) -> Candidate:
        tolerance = 1e-4 if self.case.dtype == "float32" else 2e-2
        return Candidate(step, lambda: self.expected, _loss_and_health, tolerance, held)


def _loss_and_health(outputs: Tensors) -> Tensors:
    loss, *gradients = outputs
    finite = all(bool(g.isfinite().all()) for g in gradients)
    return [loss[None], torch.tensor([float(finite and any(bool(g.any()) for g in gradients))])]


def frozen(problem: UNetProblem) -> Candidate:
    """Forward and backward of the frozen model to its input: what every method pays."""
    sample = problem.sample.clone().requires_grad_()

    def step() -> Tensors:
        loss = problem.loss(problem.base.model, sample)
        return [loss.detach(), *torch.autograd.grad(loss, [sample])]

    return problem.candidate(step, 0)


def trained(
    adapt: Adapt, *, checkpointing: bool = False, capturable: bool = False
) -> Callable[[UNetProblem], Candidate]:
    """A training step of an adapted model; ``capturable`` if a CUDA graph is to record it."""

    def provider(problem: UNetProblem) -> Candidate:
        model = adapt(problem.base)
        if checkpointing:
            model.train()
            model.enable_gradient_checkpointing()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, capturable=capturable)

        def step() -> Tensors:
            optimizer.zero_grad()
            loss = problem.loss(model, problem.sample)
            loss.backward()
            optimizer.step()
            return [loss.detach(), *(p.grad for p in parameters if p.grad is not None)]

        return problem.candidate(step, held_bytes(model, problem.base))

    return provider


UNET_PROVIDERS: dict[str, Callable[[UNetProblem], Candidate]] = {
    "frozen": frozen,
    **{name: trained(adapt) for name, adapt in METHODS.items()},
    **{
        f"{name}, checkpointing": trained(METHODS[name], checkpointing=True)
        for name in ("PEFT LoRA r=8", "SODA")
    },
}

#: What is recorded as CUDA graphs.
UNET_GRAPHS: dict[str, Callable[[UNetProblem], Candidate]] = {
    "frozen": frozen,
    **{
        name: trained(adapt, capturable=True)
        for name, adapt in METHODS.items()
        if name != "naive SODA"  # its solves wait for the device
    },
}
