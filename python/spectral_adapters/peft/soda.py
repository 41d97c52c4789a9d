"""SODA as a PEFT method: trained singular values and a trained Kronecker rotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from spectral_adapters._validation import check_choice
from spectral_adapters.absorption import absorbed_basis
from spectral_adapters.activations import SPECTRUM_ACTIVATIONS, spectrum_activation
from spectral_adapters.decomposition import BASIS_DTYPES, WholeFactorisation
from spectral_adapters.factors import resolve_factors
from spectral_adapters.functional import (
    DECOMPOSITIONS,
    ROTATIONS,
    FoldedBasis,
    SODATerms,
    SpectralBasis,
    adapted_product,
    cayley_factors,
    check_recompute,
    soda_delta_weight,
)
from spectral_adapters.fusion import mix_packed_rotations, mix_rotations
from spectral_adapters.modules.soda import PARAMETRIZATIONS
from spectral_adapters.peft._config import RANDOM_STD, SpectralConfig
from spectral_adapters.peft._layer import (
    SpectralConv,
    SpectralEmbedding,
    SpectralLayer,
    SpectralLinear,
)
from spectral_adapters.peft._model import SpectralModel, check_patterns, pattern_value
from spectral_adapters.peft._registration import register
from spectral_adapters.planner import PLANS, rates_for
from spectral_adapters.quantization import (
    QUANTIZED_DTYPES,
    check_basis_dtype,
    quantized_product,
    require_library,
)
from spectral_adapters.rotation_bank import RotatedLayer, RotationSlot
from spectral_kernels.ops.kron import accumulation_dtype

Sizes = tuple[int, ...]

#: What adapters must have in common for their rotations to be of the same thing.
_SHARED_OPTIONS = (
    "decomposition",
    "rotation",
    "factors",
    "factors_pattern",
    "parametrization",
    "spectrum_activation",
    "basis_dtype",
    "base_dtype",
)


@dataclass
class SODAConfig(SpectralConfig):
    """SODA: ``W' = (U R) diag(s) V^T``, s trained, R a trained orthogonal Kronecker product.

    Args:
        decomposition: "svd" or "qr".
        rotation: "left" (of the spectral basis), "right" (of the input coordinates) or None.
        factors: sizes of the Kronecker factors. None balances them; a tuple is used for every
            adapted layer and must multiply up there; a dict maps rotated dimensions to sizes, and
            dimensions that are not in it are balanced
            (``spectral_adapters.factors.PUBLISHED_FACTORS`` is such a dict).
        factors_pattern: sizes for single modules, by name or regular expression as in PEFT's
            ``rank_pattern``; goes before ``factors``.
        parametrization: "cayley" for any optimizer; "stiefel" for StiefelSGD and StiefelAdam.
        spectrum_activation: "identity", "relu" or "softplus".
        plan: "auto", "factored", "merged" or "tokens", for linear layers; equal values at different
            cost. A convolution is always one convolution with the adapted weight.
        recompute: for linear layers with ``decomposition="svd"`` and ``rotation="left"``: keep
            their input for the backward instead of its projection and of anything of the weight's
            size; one more product, less memory where layers share their input (query, key, value).
        basis_dtype: "base" keeps U and V (or Q and T) in the base weight's dtype, "float32" in at
            least fp32. On a half-precision base "base" is half the memory; what is trained, the
            singular values and every difference from the base weight are in fp32 either way.
            "int8", "float8" (torchao) and "nf4" (bitsandbytes) keep them quantised and add
            ``(U R diag(s) - U diag(S)) V^T x`` to what the base layer gives, which may then be
            quantised itself (docs/quantization.md). For linear layers, svd left or without
            rotation, ``plan`` "auto" or "tokens", and not with ``save_factors``.

    Further arguments: :class:`SpectralConfig`.
    """

    method: ClassVar[str] = "SODA"

    decomposition: str = field(default="svd")
    rotation: str | None = field(default="left")
    factors: Sizes | dict[int, Sizes] | None = field(default=None)
    factors_pattern: dict[str, Sizes] | None = field(default=None)
    parametrization: str = field(default="cayley")
    spectrum_activation: str = field(default="identity")
    plan: str = field(default="auto")
    recompute: bool = field(default=False)
    basis_dtype: str = field(default="base")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("decomposition", self.decomposition, DECOMPOSITIONS)
        check_choice("rotation", self.rotation, ROTATIONS)
        check_choice("parametrization", self.parametrization, PARAMETRIZATIONS)
        check_choice("spectrum_activation", self.spectrum_activation, SPECTRUM_ACTIVATIONS)
        check_choice("plan", self.plan, ("auto", *PLANS))
        check_recompute(self.recompute, self.decomposition, self.rotation)
        is_quantized = check_basis_dtype(
            self.basis_dtype,
            decomposition=self.decomposition,
            rotation=self.rotation,
            plan=self.plan,
            recompute=self.recompute,
        )
        if is_quantized and self.save_factors:
            raise ValueError(
                f"save_factors must be False with basis_dtype={self.basis_dtype!r}, whose factors "
                "are quantised anew from the base weight; got True"
            )
        if isinstance(self.factors, Mapping):
            # Keys come back from JSON as strings.
            self.factors = {
                _dimension("factors", key): _sizes(f"factors[{key}]", value)
                for key, value in self.factors.items()
            }
        elif self.factors is not None:
            self.factors = _sizes("factors", self.factors)
        if self.factors_pattern is not None:
            if not isinstance(self.factors_pattern, Mapping):
                raise TypeError(
                    "factors_pattern must be a dict from module names to sizes; "
                    f"got {self.factors_pattern!r}"
                )
            check_patterns("factors_pattern", self.factors_pattern)
            self.factors_pattern = {
                key: _sizes(f"factors_pattern[{key!r}]", value)
                for key, value in self.factors_pattern.items()
            }
        if self.rotation is None and (self.factors or self.factors_pattern):
            raise ValueError(
                "factors and factors_pattern must be None when rotation is None; "
                f"got {self.factors!r} and {self.factors_pattern!r}"
            )

    def factors_for(self, name: str, dimension: int) -> Sizes | None:
        """Sizes for the module ``name`` and its rotated dimension; None: to be balanced."""
        chosen = self.factors
        default = chosen.get(dimension) if isinstance(chosen, dict) else chosen
        return pattern_value(self.factors_pattern, name, default)


def _dimension(argument: str, key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise TypeError(
            f"{argument} must have rotated dimensions (ints) for keys; got {key!r}"
        ) from None


def _sizes(argument: str, value: Any) -> Sizes:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{argument} must be a tuple of ints; got {value!r}")
    for size in value:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{argument} must hold ints; got {size!r} in {value!r}")
        if size < 1:
            raise ValueError(f"{argument} must hold positive ints; got {value!r}")
    if not value:
        raise ValueError(f"{argument} must hold at least one size; got {value!r}")
    return tuple(value)


class SODALayer(SpectralLayer, RotatedLayer):
    """Trained: ``soda_delta`` [k] and ``soda_rotation``, one parameter per Kronecker factor.

    The rotation's parameters are packed skew matrices [n(n-1)/2] ("cayley") or the orthogonal
    factors [n, n] themselves ("stiefel"), as in the stand-alone modules. A factor of size 1 has
    nothing to train and no parameter.
    """

    prefix = "soda_"
    adapter_layer_names = ("soda_delta", "soda_rotation")
    _can_absorb = True

    soda_delta: nn.ParameterDict
    soda_rotation: nn.ModuleDict
    factor_sizes: dict[str, Sizes]
    #: Of the factors that have packed parameters; None for orthogonal factors.
    _trained_sizes: dict[str, Sizes | None]

    def _new_containers(self) -> dict[str, Any]:
        return {
            "soda_delta": nn.ParameterDict(),
            "soda_rotation": nn.ModuleDict(),
            "factor_sizes": {},
            "_trained_sizes": {},
        }

    def _resolve_factors(self, config: SODAConfig) -> Sizes:
        if config.rotation is None:
            return ()
        rows, columns = self._matrix_shape()
        dimension, meaning = (
            (min(rows, columns), "the rank, min(out, in)")
            if config.rotation == "left"
            else (columns, "the flattened input dimension")
        )
        chosen = config.factors_for(self.name, dimension)
        try:
            return resolve_factors(chosen, dimension, meaning)
        except ValueError as error:
            raise ValueError(
                f"{self.name}: {error}; use factors_pattern, or a dict from dimensions to sizes"
            ) from None

    @classmethod
    def takes_quantized_base(cls, config: SODAConfig) -> bool:
        """Only with a quantised basis, whose change is added to what the base layer gives."""
        return config.basis_dtype in QUANTIZED_DTYPES

    def _add_parameters(self, adapter: str, config: SODAConfig) -> None:
        if self._quantization(config) is not None:
            if not isinstance(self, SpectralLinear):
                expected = " or ".join(repr(choice) for choice in BASIS_DTYPES)
                raise ValueError(
                    f"{self.name}: basis_dtype must be {expected} for a "
                    f"{type(self.get_base_layer()).__name__}; got {config.basis_dtype!r}"
                )
            require_library(config.basis_dtype, self._base_weight.dtype)
        self.factor_sizes[adapter] = self._resolve_factors(config)
        rates_for(self._new_device(), self._new_options()["dtype"])  # before anything is traced
        sizes = [n for n in self.factor_sizes[adapter] if n > 1]
        options = self._new_options()
        delta = torch.zeros(min(self._matrix_shape()), **options)
        packed = [torch.zeros(n * (n - 1) // 2, **options) for n in sizes]
        if not config.init_weights:
            for values in (delta, *packed):
                nn.init.normal_(values, std=RANDOM_STD)
        if config.parametrization == "stiefel":
            packed = list(cayley_factors(packed, sizes))
        self._trained_sizes[adapter] = tuple(sizes) if config.parametrization == "cayley" else None
        self.soda_delta[adapter] = nn.Parameter(delta)
        self.soda_rotation[adapter] = nn.ParameterList(nn.Parameter(values) for values in packed)

    def _factorisation(self, config: SODAConfig) -> WholeFactorisation:
        # A basis that is quantised is computed, and recognised again, as that in fp32.
        basis_dtype = "float32" if self._quantization(config) else config.basis_dtype
        return WholeFactorisation.of(config.decomposition, config.rotation, basis_dtype)

    def _quantization(self, config: SODAConfig) -> str | None:
        return config.basis_dtype if config.basis_dtype in QUANTIZED_DTYPES else None

    def _changes_nothing(self, trained: Sequence[Tensor]) -> bool:
        starts = [
            torch.eye(values.shape[0], dtype=values.dtype, device=values.device)
            if values.dim() == 2
            else torch.zeros_like(values)
            for values in trained
        ]
        return all(torch.equal(*pair) for pair in zip(trained, starts, strict=True))

    @torch.no_grad()
    def combine(self, terms: Sequence[tuple[float, str]], adapter: str) -> None:
        """``delta = sum of weight * delta_i``, ``R = exp(sum of weight * log R_i)`` per factor."""
        weights, names = zip(*terms, strict=True)
        delta = self.soda_delta[adapter]
        total = torch.zeros_like(delta)
        for weight, name in terms:
            total += weight * self.soda_delta[name].to(total)
        delta.copy_(total)
        packed = self._trained_sizes[adapter] is not None
        mix = mix_packed_rotations if packed else mix_rotations
        rotations = cast(Any, self.soda_rotation)
        for i, factor in enumerate(rotations[adapter]):
            try:
                factor.copy_(mix([rotations[name][i] for name in names], weights))
            except ValueError as error:
                raise ValueError(f"{self.name}, factor {i}: {error}") from None

    def _terms(self, adapter: str, device: torch.device) -> SODATerms:
        """What the adapted weight is made of, as tensors that pass their gradients on."""
        config = self.configs[adapter]
        basis = self._basis(adapter, device)
        delta = self.soda_delta[adapter].to(device, accumulation_dtype(basis.left.dtype))
        term = delta
        if basis.singular_values is not None:
            term = spectrum_activation(config.spectrum_activation, basis.singular_values, delta)
        elif config.spectrum_activation != "identity":
            triangular = basis.right if config.rotation == "left" else basis.left
            diagonal = triangular.diagonal().to(delta.dtype)
            term = spectrum_activation(config.spectrum_activation, diagonal, delta) - diagonal
        factors, folded = self._rotation_factors(adapter, device)
        return SODATerms(basis, term, factors, folded)

    def _product_terms(self, adapter: str, device: torch.device) -> SODATerms:
        """The terms for a product, whose gradients may take a shorter way."""
        config, terms = self.configs[adapter], None
        if (
            config.spectrum_activation == "identity"
            and config.rotation == "left"
            and config.decomposition == "svd"
        ):
            slot, basis = self._slot(adapter), self._basis(adapter, device)
            terms = self._shared_terms(slot, basis, slot.others[0])
        return self._terms(adapter, device) if terms is None else terms

    def _method(self, adapter: str) -> dict[str, Any]:
        config = self.configs[adapter]
        return {"decomposition": config.decomposition, "rotation": config.rotation}

    def rotation_slots(self) -> list[RotationSlot]:
        """The rotations of the active adapters."""
        return [self._slot(name) for name in self.active_adapters if self.factor_sizes.get(name)]

    def _slot(self, adapter: str) -> RotationSlot:
        # At every forward pass, and so past nn.Module.__getattr__ and ParameterDict's own lookup.
        deltas, rotations = self._modules["soda_delta"], self._modules["soda_rotation"]
        parameters = cast(Any, rotations)._modules[adapter]._parameters
        delta = cast(Any, deltas)._parameters[adapter]
        sizes = self._trained_sizes[adapter]
        return RotationSlot(adapter, tuple(parameters.values()), sizes, (delta,))

    def _rotation_factors(
        self, adapter: str, device: torch.device
    ) -> tuple[tuple[Tensor, ...] | None, FoldedBasis | None]:
        """Orthogonal factors [n_i, n_i], in fp32 or better, and where their products may be kept;
        None without a rotation."""
        sizes = self.factor_sizes[adapter]
        if not sizes:
            return None, None
        turned, folded = self._rotations(self._slot(adapter))
        trained = iter([r.to(device) for r in turned])
        rotations = [next(trained) if n > 1 else torch.ones(1, 1, device=device) for n in sizes]
        return tuple([r if r.dtype == torch.float64 else r.float() for r in rotations]), folded

    def _delta_matrix(self, adapter: str, device: torch.device) -> Tensor:
        basis, term, factors, *_ = self._terms(adapter, device)
        return soda_delta_weight(basis, term, factors, **self._method(adapter))

    def _absorbed(self, adapter: str, device: torch.device) -> SpectralBasis:
        terms = self._terms(adapter, device)
        return absorbed_basis(*terms[:3], **self._method(adapter))

    def _with_kept_weight(self, x: Tensor, adapter: str) -> Tensor | None:
        """The adapted layer without gradients, by a weight that serves several forward passes."""
        if torch.is_grad_enabled():
            return None
        basis, term, factors, folded, *_ = self._terms(adapter, x.device)
        if folded is None:
            return None
        base = self._base_weight
        folded.adopt(basis, base)
        if folded.weight is None:
            delta = soda_delta_weight(basis, term, factors, **self._method(adapter))
            folded.weight = base + self._as_weight(delta)
        return self._use(x, folded.weight, getattr(self.base_layer, "bias", None))


class Linear(SpectralLinear, SODALayer):
    """SODA on ``nn.Linear`` and ``Conv1D``, with a quantised basis also on quantised layers."""

    def _adapted_forward(
        self, x: Tensor, adapters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        configs = self.configs
        active = [name for name in adapters if name in configs]
        if not active or not all(configs[n].basis_dtype in QUANTIZED_DTYPES for n in active):
            return super()._adapted_forward(x, adapters, args, kwargs)
        y = self._base_product(x, args, kwargs)
        for name in active:
            change = self._quantized_change(x, name)
            if self.scaling[name] != 1:
                change = self.scaling[name] * change
            y = y + change.to(y.dtype)
        return y

    def _quantized_change(self, x: Tensor, adapter: str) -> Tensor:
        """What an adapter adds to the output, by its quantised basis, at scale 1."""
        basis = self._frozen(adapter).quantized_on(x.device)
        values = basis.singular_values
        delta = self.soda_delta[adapter].to(x.device, accumulation_dtype(values.dtype))
        term = spectrum_activation(self.configs[adapter].spectrum_activation, values, delta)
        factors, _ = self._rotation_factors(adapter, x.device)
        return quantized_product(x, basis, term, factors, change=True)

    def _replace_base(self, x: Tensor, adapter: str) -> Tensor | None:
        base: Any = self.base_layer
        config = self.configs[adapter]
        return adapted_product(
            x,
            self._product_terms(adapter, x.device),
            base.bias,
            decomposition=config.decomposition,
            rotation=config.rotation,
            plan=config.plan,
            base_weight=self._as_matrix(base.weight),
            recompute=config.recompute,
        )


class Conv(SpectralConv, SODALayer):
    """SODA on ``nn.Conv1d``, ``2d`` and ``3d``, grouped ones included."""

    _replace_base = SODALayer._with_kept_weight


class Embedding(SpectralEmbedding, SODALayer):
    """SODA on ``nn.Embedding``."""

    _replace_base = SODALayer._with_kept_weight


class SODAModel(SpectralModel):
    """The PEFT model of SODA; see :class:`SODAConfig`."""

    prefix = SODALayer.prefix
    tuner_layer_cls = SODALayer
    linear_cls = Linear
    conv_cls = Conv
    embedding_cls = Embedding
    pattern_options = ("factors_pattern",)
    combination = "geodesic"

    @classmethod
    def _combined_config(cls, model: nn.Module, configs: Mapping[str, SODAConfig]) -> SODAConfig:
        first = next(iter(configs.values()))
        for option in _SHARED_OPTIONS:
            values = {name: getattr(config, option) for name, config in configs.items()}
            if any(value != getattr(first, option) for value in values.values()):
                raise ValueError(
                    f"adapters must have equal {option} for their rotations to be mixed; "
                    f"got {values}"
                )
        return replace(first, init_weights=True)


register("soda", SODAConfig, SODAModel)
