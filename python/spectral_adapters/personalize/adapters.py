"""Which adapter a run trains: PEFT configs from the options of the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from spectral_adapters.personalize.settings import (
    METHOD_OPTIONS,
    METHODS,
    TARGET_PRESETS,
    Settings,
    UsageError,
)

if TYPE_CHECKING:
    from peft import PeftConfig

# Keys and values of the text: what a word looks like, and nothing else (Kumari et al., "Custom
# Diffusion", CVPR 2023).
TEXT = ("attn2.to_k", "attn2.to_v")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "net.0.proj", "net.2", "proj_in", "proj_out")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "conv")
PRESETS = {
    "text": TEXT,
    "attention": ATTENTION,
    "transformer": TRANSFORMER,
    "convolution": CONVOLUTION,
    "all": (*TRANSFORMER, *CONVOLUTION, "time_emb_proj"),
}
assert tuple(PRESETS) == TARGET_PRESETS


#: Columns that Spectral Adapter R turns: r^2 - r numbers per layer, so that 48 are about as many as
#: the other methods train in layers of a few hundred inputs (docs/personalize.md).
R_COLUMNS = 48

#: Columns of Spectral Adapter A: ahead of the top ones in the comparison's style task, by 0.017 +-
#: 0.005 on 300 names, and level or ahead elsewhere (docs/results.md).
A_COLUMNS = "random"


def make_config(settings: Settings, unet: nn.Module) -> PeftConfig:
    """Return the PEFT config of a run on ``unet``, a ``UNet2DConditionModel``.

    Raises:
        UsageError: an option out of range, or target modules that are not in the denoiser.
    """
    targets = target_modules(settings.target_modules, unet)
    options = {
        name: getattr(settings, name)
        for name in METHOD_OPTIONS[settings.method]
        if getattr(settings, name) is not None
    }
    options.pop("spectrum_learning_rate", None)
    if "factors" in options:
        options["factors"] = factor_sizes(options["factors"])
        rotated = rotated_dimensions(targets, unet, settings.rotation)
        for dimension in options["factors"]:
            if dimension not in rotated:
                # No error: one list of factors may serve several models.
                print(
                    f"--factors {dimension}=... changes nothing: the adapted layers rotate "
                    f"{', '.join(map(str, rotated))} dimensions",
                    file=sys.stderr,
                )
    if settings.method == "spectral-r":
        options.setdefault("rank", min(R_COLUMNS, smallest_rank(targets, unet)))
    try:
        return _CONFIGS[settings.method](targets, options)
    except ValueError as error:
        raise UsageError(f"--method {settings.method}: {error}") from error


def _lora(targets: list[str], options: dict[str, Any]) -> PeftConfig:
    from peft import LoraConfig

    rank = options.get("rank", 4)
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)


def _soda(targets: list[str], options: dict[str, Any]) -> PeftConfig:
    from spectral_adapters.peft import SODAConfig

    if options.get("rotation") == "none":
        options["rotation"] = None
    return SODAConfig(target_modules=targets, **options)


def _svdiff(targets: list[str], options: dict[str, Any]) -> PeftConfig:
    from spectral_adapters.peft import SVDiffConfig

    return SVDiffConfig(target_modules=targets, **options)


def _spectral_a(targets: list[str], options: dict[str, Any]) -> PeftConfig:
    from spectral_adapters.peft import SpectralAdapterAConfig

    options = {"rank": 4, "columns": A_COLUMNS, **options}
    return SpectralAdapterAConfig(target_modules=targets, r=options.pop("rank"), **options)


def _spectral_r(targets: list[str], options: dict[str, Any]) -> PeftConfig:
    from spectral_adapters.peft import SpectralAdapterRConfig

    return SpectralAdapterRConfig(target_modules=targets, r=options.pop("rank"), **options)


def _lidb(targets: list[str], options: dict[str, Any]) -> PeftConfig:
    from spectral_adapters.peft import LiDBConfig

    return LiDBConfig(target_modules=targets, r=options.pop("rank", 1))


_CONFIGS: dict[str, Callable[[list[str], dict[str, Any]], PeftConfig]] = {
    "soda": _soda,
    "svdiff": _svdiff,
    "spectral-a": _spectral_a,
    "spectral-r": _spectral_r,
    "lidb": _lidb,
    "lora": _lora,
}
assert tuple(_CONFIGS) == METHODS


def target_modules(names: tuple[str, ...], unet: nn.Module) -> list[str]:
    """Return the endings of module names that presets and ``names`` stand for and ``unet`` has.

    Raises:
        UsageError: an ending that matches no linear layer or convolution of the denoiser.
    """
    adaptable = [
        path for path, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]

    def matched(ending: str) -> bool:
        return any(path == ending or path.endswith(f".{ending}") for path in adaptable)

    found: list[str] = []
    for name in names:
        if name not in PRESETS and not matched(name):
            raise UsageError(
                f"--target-modules: {name!r} is none of {', '.join(PRESETS)}, and no linear layer "
                "or convolution of the denoiser ends in it"
            )
        found += [ending for ending in PRESETS.get(name, (name,)) if matched(ending)]
    if not found:
        raise UsageError(f"--target-modules {' '.join(names)}: the denoiser has no such modules")
    return sorted(set(found))


def smallest_rank(targets: list[str], unet: nn.Module) -> int:
    """The fewest singular values that a weight has of those whose names end in ``targets``."""
    return min(min(shape) for shape in _matrix_shapes(targets, unet))


def rotated_dimensions(targets: list[str], unet: nn.Module, side: str | None) -> list[int]:
    """What SODA rotates in the weights whose names end in ``targets``: their ranks, or inputs."""
    shapes = _matrix_shapes(targets, unet)
    return sorted({shape[1] if side == "right" else min(shape) for shape in shapes})


def _matrix_shapes(targets: list[str], unet: nn.Module) -> list[tuple[int, int]]:
    return [
        (module.weight.shape[0], module.weight[0].numel())
        for path, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and any(path == ending or path.endswith(f".{ending}") for ending in targets)
    ]


def factor_sizes(tokens: tuple[str, ...]) -> dict[int, tuple[int, ...]]:
    """``("640=8x8x10",)`` -> ``{640: (8, 8, 10)}``."""
    sizes = {}
    for token in tokens:
        if not re.fullmatch(r"\d+=\d+(x\d+)*", token):
            raise UsageError(f"--factors must be like 640=8x8x10; got {token!r}")
        dimension, _, product = token.partition("=")
        sizes[int(dimension)] = tuple(int(size) for size in product.split("x"))
    return sizes


def describe(config: Any) -> str:
    """Return one line for the report."""
    kind = str(config.peft_type.value)
    if kind == "LORA":
        return f"LoRA, rank {config.r}"
    if kind == "SODA":
        parts = [config.decomposition, f"rotation {config.rotation or 'none'}"]
        if config.rotation is not None:
            parts.append(config.parametrization)
        if config.spectrum_activation != "identity":
            parts.append(config.spectrum_activation)
        return f"SODA ({', '.join(parts)})"
    if kind == "SVDIFF":
        return f"SVDiff ({config.spectrum_activation})"
    if kind == "LIDB":
        return f"LiDB, rank {config.r} in {config.a} x {config.b}"
    return f"Spectral Adapter {kind[-1]}, {config.columns} {config.r} columns"
