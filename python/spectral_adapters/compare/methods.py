"""The methods that are compared, each with every size that it comes in.

A *budget* is a number of trained numbers. :func:`fit_budget` chooses the size of a method in every
layer so that the whole comes within 2 % of the budget, with about as much in each layer as its
share of inputs and outputs, and says what it came to where the method cannot get there.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    inject_adapter_in_model,
)
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.vera import VeraModel
from torch import Tensor, nn

from spectral_adapters.factors import packed_size
from spectral_adapters.optim import StiefelAdam
from spectral_adapters.peft import (
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
)

#: How far from the budget "equal" may be.
TOLERANCE = 0.02

Shape = tuple[int, int]

#: A size of a method in one layer: what its config wants, and how many numbers it trains.
Level = tuple[Any, int]

#: Sums of sizes are told apart to this share of the budget when layers are given sizes.
_RESOLUTION = TOLERANCE / 16


@dataclass(frozen=True)
class Method:
    """A way to adapt the linear layers of a model.

    Attributes:
        label: name in tables.
        levels: sizes for a layer ``[out, in]`` under a setting of the whole adapter.
        config: PEFT's config, from the chosen size of every adapted layer (by name) and the
            setting.
        settings: of the whole adapter; the best one for the budget is taken.
        per_layer: whether layers may have different sizes.
        frozen: parameters with this in their names are not trained.
        stiefel: trained by StiefelAdam.
        spectrum_rate: learning rate of SODA's spectrum, times that of everything else.
        nominal: its trained numbers are not its parameters one by one; ``levels`` counts them.
        note: what a reader of the results must know.
    """

    label: str
    levels: Callable[[Shape, Any], Iterable[Level]]
    config: Callable[[Mapping[str, Any], Any, Schedule], Any]
    settings: Sequence[Any] = (None,)
    per_layer: bool = True
    frozen: str | None = None
    stiefel: bool = False
    spectrum_rate: float = 1.0
    nominal: bool = False
    note: str = ""


@dataclass(frozen=True)
class Schedule:
    """What some configs must know of the training: its length, and the seed of random choices."""

    steps: int
    seed: int


@dataclass(frozen=True)
class Sizes:
    """How a method spends a budget.

    Attributes:
        setting: of the whole adapter.
        layers: the size in every adapted layer; layers that got nothing are left out.
        trained: how many numbers that trains.
    """

    setting: Any
    layers: dict[str, Any]
    trained: int

    def matches(self, budget: int) -> bool:
        """Whether it is within 2 % of the budget."""
        return abs(self.trained - budget) <= TOLERANCE * budget


def fit_budget(method: Method, shapes: Mapping[str, Shape], budget: int) -> Sizes | None:
    """Choose sizes for the layers ``shapes``, [out, in] by name; None if nothing fits at all.

    Nothing fits where the smallest adapter trains over twice, or the largest under half the budget.
    """
    found = []
    for setting in method.settings:
        levels = {
            name: _distinct(method.levels(shape, setting), 2 * budget)
            for name, shape in shapes.items()
        }
        choose = _mixed if method.per_layer else _uniform
        found += [
            Sizes(setting, layers, trained) for layers, trained in choose(levels, shapes, budget)
        ]

    def rank(sizes: Sizes) -> tuple[bool, float, float]:
        """Equal to the budget on half of the layers or more; else a compromise of the two."""
        missing = 1 - len(sizes.layers) / len(shapes)
        excess = abs(sizes.trained / budget - 1)
        equal = sizes.matches(budget) and missing <= 0.5
        return not equal, missing + (0 if equal else 5 * max(0.0, excess - TOLERANCE)), excess

    best = min(found, key=rank, default=None)
    if best is None or not budget / 2 <= best.trained <= 2 * budget:
        return None
    return best


def _distinct(levels: Iterable[Level], most: int) -> list[Level]:
    """One level per number of trained numbers, ascending, up to ``most``."""
    by_size: dict[int, Any] = {}
    for option, size in levels:
        if 0 < size <= most:
            by_size.setdefault(size, option)
    return [(option, size) for size, option in sorted(by_size.items())]


def _uniform(
    levels: Mapping[str, list[Level]], shapes: Mapping[str, Shape], budget: int
) -> Iterable[tuple[dict[str, Any], int]]:
    """One option for all layers, as many of them (evenly spaced) as come closest."""
    names = list(levels)
    by_option: dict[Any, dict[str, int]] = {}
    for name in names:
        for option, size in levels[name]:
            by_option.setdefault(option, {})[name] = size
    for option, sizes in by_option.items():
        for count in range(1, len(sizes) + 1):
            here = list(sizes)
            chosen = [here[index * len(here) // count] for index in range(count)]
            yield dict.fromkeys(chosen, option), sum(sizes[name] for name in chosen)


def _mixed(
    levels: Mapping[str, list[Level]], shapes: Mapping[str, Shape], budget: int
) -> Iterable[tuple[dict[str, Any], int]]:
    """Sizes of their own, near each layer's share of the budget, with a sum near the budget."""
    total = sum(sum(shape) for shape in shapes.values())
    unit = max(1, round(budget * _RESOLUTION))
    # By the sum so far: how uneven the sizes are, the sum itself, and the sizes.
    best: dict[int, tuple[float, int, tuple[Level | None, ...]]] = {0: (0.0, 0, ())}
    left = total
    for name, found in levels.items():
        share = budget * sum(shapes[name]) / total
        near = sorted(found, key=lambda level: abs(math.log(level[1] / share)))[:24]
        left -= sum(shapes[name])
        following: dict[int, tuple[float, int, tuple[Level | None, ...]]] = {}
        for uneven, spent, chosen in best.values():
            for level in (*near, None):
                size = 0 if level is None else level[1]
                sum_ = spent + size
                if sum_ > 1.05 * budget:
                    continue
                # Leaving a layer out is worse than any size that is at hand.
                cost = 50.0 if level is None else math.log(size / share) ** 2
                entry = (uneven + cost, sum_, (*chosen, level))
                key = sum_ // unit
                if key not in following or entry[:2] < following[key][:2]:
                    following[key] = entry
        best = following
    for _, sum_, chosen in best.values():
        layers = {
            name: level[0] for name, level in zip(levels, chosen, strict=True) if level is not None
        }
        if layers:
            yield layers, sum_


def _named(sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most common size, and the others by a pattern that matches one module."""
    common = Counter(sizes.values()).most_common(1)[0][0]
    return common, {re.escape(name): r for name, r in sizes.items() if r != common}


def _up_to(most: Callable[[Shape], int], numbers: Callable[[Shape, int], int]) -> Any:
    """Levels r = 1, 2, ... ``most(shape)`` with ``numbers(shape, r)`` trained numbers."""

    def levels(shape: Shape, setting: Any) -> Iterable[Level]:
        return [(r, numbers(shape, r)) for r in range(1, most(shape) + 1)]

    return levels


def _rank(shape: Shape) -> int:
    return min(shape)


def factor_choices(dimension: int) -> list[tuple[int, ...]]:
    """The ways to write a dimension as a product of at most three ascending factors above 1."""
    divisors = [n for n in range(2, dimension + 1) if dimension % n == 0]
    found: set[tuple[int, ...]] = {(dimension,)}
    for a in divisors:
        rest = dimension // a
        found.update({(a, rest)} if a <= rest else ())
        found.update((a, b, rest // b) for b in divisors if a <= b and rest % b == 0 <= rest // b)
    return sorted(sizes for sizes in found if 1 not in sizes and list(sizes) == sorted(sizes))


def _soda_levels(side: str, spectrum: bool = True) -> Any:
    def levels(shape: Shape, setting: Any) -> Iterable[Level]:
        k = min(shape)
        dimension = k if side == "left" else shape[1]
        for sizes in factor_choices(dimension):
            yield sizes, packed_size(sizes) + (k if spectrum else 0)

    return levels


def _soda(**options: Any) -> Callable[..., Any]:
    def config(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> SODAConfig:
        pattern = {re.escape(name): sizes for name, sizes in layers.items()}
        return SODAConfig(target_modules=list(layers), factors_pattern=pattern, **options)

    return config


def _spectrum_only(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> SODAConfig:
    return SODAConfig(target_modules=list(layers), rotation=None)


def _columns(kind: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def config(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> Any:
        r, others = _named(layers)
        return kind(target_modules=list(layers), r=r, rank_pattern=others or None, **options)

    return config


def _r_levels(shape: Shape, setting: Any) -> Iterable[Level]:
    return [(r, r * (r - 1)) for r in range(2, min(shape) + 1)]


def _random_columns(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> Any:
    """Columns drawn evenly from all, for each layer anew."""
    generator = torch.Generator().manual_seed(schedule.seed)
    pattern = {
        re.escape(name): sorted(torch.randperm(rank, generator=generator)[:r].tolist())
        for name, (r, rank) in layers.items()
    }
    some = next(iter(layers.values()))[0]
    return SpectralAdapterAConfig(target_modules=list(layers), r=some, columns_pattern=pattern)


def _random_columns_of_r(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> Any:
    options = {"columns": "random", "seed": schedule.seed}
    return _columns(SpectralAdapterRConfig, **options)(layers, setting, schedule)


def _svdiff(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> SVDiffConfig:
    return SVDiffConfig(target_modules=list(layers))


def _lidb(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> LiDBConfig:
    r, others = _named(layers)
    return LiDBConfig(
        target_modules=list(layers), r=r, rank_pattern=others or None, seed=schedule.seed
    )


def _lora(**options: Any) -> Callable[..., Any]:
    def config(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> LoraConfig:
        r, others = _named(layers)
        return LoraConfig(
            target_modules=list(layers),
            r=r,
            lora_alpha=r,
            rank_pattern=others,
            alpha_pattern=dict(others),
            **options,
        )

    return config


def _adalora(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> AdaLoraConfig:
    r = next(iter(layers.values()))
    first = math.ceil(1.5 * r)
    return AdaLoraConfig(
        target_modules=list(layers),
        target_r=r,
        init_r=first,
        lora_alpha=first,
        tinit=schedule.steps // 5,
        tfinal=schedule.steps // 3,
        deltaT=max(1, schedule.steps // 50),
        total_step=schedule.steps,
    )


def _oft_levels(shape: Shape, setting: Any) -> Iterable[Level]:
    columns = shape[1]
    for block in range(2, columns + 1):
        if columns % block == 0:
            blocks = 1 if setting == "shared" else columns // block
            yield block, blocks * (block * (block - 1) // 2)


def _oft(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> OFTConfig:
    return OFTConfig(
        target_modules=list(layers),
        r=0,
        oft_block_size=next(iter(layers.values())),
        block_share=setting == "shared",
        use_cayley_neumann=False,
    )


def _boft_levels(shape: Shape, setting: Any) -> Iterable[Level]:
    rows, columns = shape
    return [(b, columns * b + rows) for b in range(2, columns + 1) if columns % b == 0]


def _boft(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> BOFTConfig:
    return BOFTConfig(target_modules=list(layers), boft_block_size=next(iter(layers.values())))


def _vera_levels(shape: Shape, setting: Any) -> Iterable[Level]:
    return [(r, r + shape[0]) for r in range(1, 4 * max(shape))]


def _vera(layers: Mapping[str, Any], setting: Any, schedule: Schedule) -> VeraConfig:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B")
        return VeraConfig(
            target_modules=list(layers),
            r=next(iter(layers.values())),
            projection_prng_key=schedule.seed,
            save_projection=False,  # the seed gives it; it is no part of the adapter's file
        )


def _lokr_levels(shape: Shape, setting: int) -> Iterable[Level]:
    from peft.tuners.lokr.layer import factorization

    (a, b), (c, d) = (factorization(n, setting) for n in shape)
    for r in range(1, max(b, d) // 2 + 1):
        # PEFT trains the second matrix whole where r is half its side or more.
        yield r, a * c + (r * (b + d) if r < max(b, d) / 2 else b * d)


def _lokr(layers: Mapping[str, Any], setting: int, schedule: Schedule) -> LoKrConfig:
    r, others = _named(layers)
    return LoKrConfig(
        target_modules=list(layers),
        r=r,
        alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        decompose_factor=setting,
    )


def _low_rank(shape: Shape, r: int) -> int:
    return r * sum(shape)


METHODS: dict[str, Method] = {
    "soda": Method("SODA", _soda_levels("left"), _soda()),
    "soda-right": Method("SODA, right", _soda_levels("right"), _soda(rotation="right")),
    "soda-qr": Method("SODA, QR", _soda_levels("left"), _soda(decomposition="qr")),
    "soda-stiefel": Method(
        "SODA, Stiefel",
        _soda_levels("left"),
        _soda(parametrization="stiefel"),
        stiefel=True,
        nominal=True,
        note="StiefelAdam on orthogonal factors; n(n-1)/2 free numbers are counted for each n x n "
        "factor",
    ),
    "soda-two-rates": Method(
        "SODA, two rates",
        _soda_levels("left"),
        _soda(),
        spectrum_rate=10.0,
        note="the spectrum is trained at ten times the rate of the rotation",
    ),
    "soda-spectrum": Method(
        "SODA, spectrum only",
        lambda shape, setting: [(None, min(shape))],
        _spectrum_only,
        per_layer=False,
    ),
    "soda-rotation": Method(
        "SODA, rotation only", _soda_levels("left", spectrum=False), _soda(), frozen="soda_delta"
    ),
    "spectral-a": Method(
        "Spectral Adapter A", _up_to(_rank, _low_rank), _columns(SpectralAdapterAConfig)
    ),
    "spectral-a-bottom": Method(
        "Spectral Adapter A, bottom",
        _up_to(_rank, _low_rank),
        _columns(SpectralAdapterAConfig, columns="bottom", algorithm="full"),
    ),
    "spectral-a-random": Method(
        "Spectral Adapter A, random",
        lambda shape, setting: [
            ((r, min(shape)), r * sum(shape)) for r in range(1, min(shape) + 1)
        ],
        _random_columns,
    ),
    "spectral-r": Method("Spectral Adapter R", _r_levels, _columns(SpectralAdapterRConfig)),
    "spectral-r-random": Method("Spectral Adapter R, random", _r_levels, _random_columns_of_r),
    "svdiff": Method(
        "SVDiff", lambda shape, setting: [(None, min(shape))], _svdiff, per_layer=False
    ),
    "lidb": Method(
        "LiDB",
        _up_to(lambda shape: 50, lambda shape, r: r * (min(50, shape[0]) + min(100, shape[1]))),
        _lidb,
    ),
    "lora": Method("LoRA", _up_to(_rank, _low_rank), _lora()),
    "dora": Method(
        "DoRA", _up_to(_rank, lambda shape, r: r * sum(shape) + shape[0]), _lora(use_dora=True)
    ),
    "adalora": Method(
        "AdaLoRA",
        _up_to(lambda shape: 2 * min(shape) // 3, lambda shape, r: r * (sum(shape) + 1)),
        _adalora,
        per_layer=False,
        nominal=True,
        note="counted at its final average rank; it starts with 1.5 times that",
    ),
    "oft": Method(
        "OFT", _oft_levels, _oft, settings=("own", "shared"), per_layer=False, note="exact Cayley"
    ),
    "boft": Method(
        "BOFT",
        _boft_levels,
        _boft,
        per_layer=False,
        note="one butterfly factor, more need PEFT's CUDA extension; whole b x b blocks are "
        "trained, of which the skew part, b(b-1)/2 of b^2, has an effect",
    ),
    "vera": Method("VeRA", _vera_levels, _vera, per_layer=False),
    "lokr": Method("LoKr", _lokr_levels, _lokr, settings=(-1, 2, 4, 8)),
}

#: The whole model is trained; it has no budget.
FULL = "full"

#: Nothing is trained.
BASE = "base"

LABELS = {name: method.label for name, method in METHODS.items()} | {
    FULL: "full fine-tuning",
    BASE: "base model",
}


@dataclass
class Tuned:
    """A model with something to train.

    Attributes:
        model: the model, changed in place.
        trained: the parameters that count, by name.
        sizes: how the budget was spent; None for full fine-tuning.
        method: None for full fine-tuning.
        after_step: to be called with the number of steps taken, after each.
        penalty: to be added to the loss.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter]
    sizes: Sizes | None
    method: Method | None
    after_step: Callable[[int], None] | None = None
    penalty: Callable[[], Tensor] | None = None

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        if self.sizes is not None and self.method is not None and self.method.nominal:
            return self.sizes.trained
        return sum(values.numel() for values in self.trained.values())

    def optimizer(self, rate: float, others: Iterable[Tensor] = (), other_rate: float = 0.0) -> Any:
        """AdamW without weight decay, or StiefelAdam, and ``others`` at a rate of their own."""
        stiefel = self.method is not None and self.method.stiefel
        spectrum_rate = 1.0 if self.method is None else self.method.spectrum_rate
        spectra = [v for n, v in self.trained.items() if ".soda_delta." in n]
        rest = [v for n, v in self.trained.items() if ".soda_delta." not in n]
        groups: list[dict[str, Any]] = [{"params": list(self.trained.values()), "lr": rate}]
        if stiefel or spectrum_rate != 1:
            groups = [
                {"params": rest, "lr": rate},
                {"params": spectra, "lr": rate * spectrum_rate},
            ]
        if stiefel:
            groups[0]["manifold"], groups[1]["manifold"] = True, False
        extra = list(others)
        if extra:
            groups.append({"params": extra, "lr": other_rate})
            if stiefel:
                groups[-1]["manifold"] = False
        return StiefelAdam(groups) if stiefel else torch.optim.AdamW(groups, weight_decay=0.0)


def orthogonality(trained: Mapping[str, Tensor], weight: float) -> Tensor:
    """AdaLoRA's penalty as PEFT has it, which adds it in models that return their loss themselves.

    ``weight`` times the mean of ``|A A^T - I|`` and ``|B^T B - I|`` (Frobenius) over all A
    [r, in] and B [out, r] (Zhang et al. 2023, equation 4, has squares and a sum).
    """
    products = [
        values @ values.mT if "lora_A" in name else values.mT @ values
        for name, values in trained.items()
        if "lora_A" in name or "lora_B" in name
    ]
    norms = [torch.linalg.norm(p - torch.eye(len(p), device=p.device)) for p in products]
    return weight * torch.stack(norms).mean()


#: Methods that PEFT does not inject without their model class: it keeps state that layers share.
_TUNERS: dict[str, Callable[..., Any]] = {"adalora": AdaLoraModel, "vera": VeraModel}


def tune(
    model: nn.Module, name: str, shapes: Mapping[str, Shape], budget: int, schedule: Schedule
) -> Tuned | None:
    """Put an adapter of method ``name`` on ``model``, which is changed; None if nothing fits.

    Raises:
        RuntimeError: the adapter does not train as many numbers as it was chosen for.
    """
    model.requires_grad_(False)
    if name == FULL:
        model.requires_grad_(True)
        return Tuned(model, dict(model.named_parameters()), None, None)
    method = METHODS[name]
    sizes = fit_budget(method, shapes, budget)
    if sizes is None:
        return None
    torch.manual_seed(schedule.seed)
    config = method.config(sizes.layers, sizes.setting, schedule)
    after_step = None
    if name in _TUNERS:
        tuner = _TUNERS[name](model, config, "default")
        after_step = getattr(tuner, "update_and_allocate", None)
    else:
        inject_adapter_in_model(config, model)
    # Where PEFT looks for the config of an injected adapter.
    bare: Any = model
    bare.peft_config = {"default": config}
    for key, values in model.named_parameters():
        if method.frozen is not None and method.frozen in key:
            values.requires_grad_(False)
        elif values.requires_grad:
            values.data = values.data.float()
    trained = {key: values for key, values in model.named_parameters() if values.requires_grad}
    penalty = partial(orthogonality, trained, config.orth_reg_weight) if name == "adalora" else None
    tuned = Tuned(model, trained, sizes, method, after_step, penalty)
    if tuned.count != sizes.trained:
        raise RuntimeError(f"{name}: {sizes.trained} numbers were to be trained; {tuned.count} are")
    return tuned
