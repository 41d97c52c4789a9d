"""SODA layers: trained singular values and a trained Kronecker rotation of the singular basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, unfold

from spectral_adapters._validation import check_choice, check_last_dimension, check_tensor
from spectral_adapters.absorption import absorbed_basis
from spectral_adapters.activations import SPECTRUM_ACTIVATIONS, spectrum_activation
from spectral_adapters.decomposition import (
    BASIS_DTYPES,
    Fingerprint,
    WholeFactorisation,
    round_to_dtype,
)
from spectral_adapters.factors import resolve_factors
from spectral_adapters.functional import (
    DECOMPOSITIONS,
    ROTATIONS,
    FoldedBasis,
    SODATerms,
    SpectralBasis,
    adapted_product,
    autocast_is_on,
    basis_dtypes,
    check_recompute,
    keeps_builds,
    soda_delta_weight,
    soda_weight,
    spectral_output,
    without_autocast,
)
from spectral_adapters.modules._base import SpectralModule
from spectral_adapters.planner import PLANS, PlanChoice, choose_plan, rates_for
from spectral_adapters.quantization import (
    QuantizedBasis,
    check_basis_dtype,
    quantized_product,
    require_library,
)
from spectral_adapters.rotation_bank import RotatedLayer, RotationSlot
from spectral_adapters.spectra import Decomposed, factorise
from spectral_kernels.ops.kron import accumulation_dtype

PARAMETRIZATIONS = ("cayley", "stiefel")


def reset_rotation(parameter: Tensor) -> None:
    """The identity: a skew matrix of zeros, packed, or an orthogonal factor [n, n]."""
    parameter.zero_()
    if parameter.dim() == 2:
        parameter.fill_diagonal_(1)


class SODAModule(SpectralModule, RotatedLayer):
    """What the linear and the convolutional SODA layer share: everything but how the weight is
    used.

    Attributes:
        delta: trained offset of the spectrum [k], starts at 0.
        rotation: trained rotation, one entry per factor: packed skew matrices [n(n-1)/2] for
            "cayley", the square factors [n, n] themselves for "stiefel"; empty without a rotation.
        bias: the base layer's bias [out], frozen, or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        decomposition: str = "svd",
        rotation: str | None = "left",
        factors: tuple[int, ...] | None = None,
        parametrization: str = "cayley",
        spectrum_activation: str = "identity",
        plan: str = "auto",
        save_factors: bool = True,
        base_dtype: torch.dtype | None = None,
        basis_dtype: str = "float32",
        recompute: bool = False,
    ) -> None:
        super().__init__(save_factors=save_factors)
        check_choice("decomposition", decomposition, DECOMPOSITIONS)
        check_choice("rotation", rotation, ROTATIONS)
        check_choice("parametrization", parametrization, PARAMETRIZATIONS)
        check_choice("spectrum_activation", spectrum_activation, SPECTRUM_ACTIVATIONS)
        check_choice("plan", plan, ("auto", *PLANS))
        check_recompute(recompute, decomposition, rotation)
        is_quantized = check_basis_dtype(
            basis_dtype,
            decomposition=decomposition,
            rotation=rotation,
            plan=plan,
            recompute=recompute,
        )
        weight = round_to_dtype(weight, base_dtype)
        if is_quantized:
            if weight.dim() > 2:
                expected = " or ".join(repr(choice) for choice in BASIS_DTYPES)
                raise ValueError(
                    f"basis_dtype must be {expected} for a convolution; got {basis_dtype!r}"
                )
            require_library(basis_dtype, weight.dtype)
        matrix = weight.detach().reshape(weight.shape[0], -1)
        # A basis that is quantised is computed, and recognised again, as that in fp32.
        factorisation = WholeFactorisation.of(
            decomposition, rotation, "float32" if is_quantized else basis_dtype
        )
        decomposed = factorise(matrix, factorisation)
        basis = decomposed.basis
        rank = basis.right.shape[0]
        self._quantization = basis_dtype if is_quantized else None

        self.decomposition = decomposition
        self.rotation_side = rotation
        self.parametrization = parametrization
        self.spectrum_activation = spectrum_activation
        self.plan = plan
        self.recompute = recompute
        self.base_dtype = weight.dtype
        if rotation is None:
            if factors is not None:
                raise ValueError(f"factors must be None when rotation is None; got {factors!r}")
            self.factor_sizes: tuple[int, ...] = ()
        else:
            width, meaning = (
                (rank, "the rank, min(out, in)")
                if rotation == "left"
                else (matrix.shape[1], "the flattened input dimension")
            )
            self.factor_sizes = resolve_factors(factors, width, meaning)

        self._set_basis(decomposed)
        dtype = accumulation_dtype(basis.left.dtype)
        rates_for(basis.left.device, dtype)  # read before anything is traced
        options: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        self.delta = nn.Parameter(torch.zeros(rank, **options))
        self.rotation = nn.ParameterList(
            torch.eye(n, **options)
            if parametrization == "stiefel"
            else torch.zeros(n * (n - 1) // 2, **options)
            for n in self.factor_sizes
        )
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        )

    def spectrum(self) -> Tensor:
        """Adapted spectrum [k]: the singular values s, or the adapted diagonal for "qr"."""
        return spectrum_activation(self.spectrum_activation, self._base_spectrum(), self.delta)

    def rotation_factors(self) -> tuple[Tensor, ...]:
        """Orthogonal factors of the rotation, [n_i, n_i] each; empty without a rotation."""
        return self._factors()[0]

    def rotation_slots(self) -> list[RotationSlot]:
        """The layer's rotation, for a :class:`spectral_adapters.rotation_bank.RotationBank`."""
        return [self._slot()] if self.factor_sizes else []

    def _slot(self) -> RotationSlot:
        # At every forward pass, and so past nn.Module.__getattr__.
        delta = self._parameters.get("delta")
        rotation = tuple(cast(Any, self._modules["rotation"])._parameters.values())
        if delta is None or len(rotation) != len(self.factor_sizes):
            delta, rotation = self.delta, tuple(self.rotation)  # parametrised by somebody
        sizes = None if self.parametrization == "stiefel" else self.factor_sizes
        return RotationSlot("", rotation, sizes, (delta,))

    def _factors(self) -> tuple[tuple[Tensor, ...], FoldedBasis | None]:
        """The orthogonal factors, and where products of theirs may be kept."""
        for slot in self.rotation_slots():
            return self._rotations(slot)
        return (), None

    def get_delta_weight(self) -> Tensor:
        """``W' - W0`` in the base weight's shape; exactly zero for an untrained layer."""
        return soda_delta_weight(*self._terms()[:3], **self._method()).reshape(self._weight_shape())

    def merged_weight(self) -> Tensor:
        """The dense adapted weight ``W'`` in the base weight's shape, differentiable."""
        return soda_weight(*self._terms()[:3], **self._method()).reshape(self._weight_shape())

    def _register_basis(self, basis: SpectralBasis) -> None:
        if self._quantization is None:
            super()._register_basis(basis)
            return
        quantized = QuantizedBasis.of(basis, self._quantization)
        self.register_module("left", quantized.left)
        self.singular_values = nn.Parameter(quantized.singular_values, requires_grad=False)
        self.register_module("right", quantized.right)

    @property
    def quantized_basis(self) -> QuantizedBasis | None:
        """The frozen factorisation as it is kept, if it is quantised; ``basis`` is then dense, what
        this one stands for, and made anew whenever it is asked for."""
        if self._quantization is None:
            return None
        left, values, right = cast(Any, (self.left, self.singular_values, self.right))
        return QuantizedBasis(left, values, right)

    @property
    def basis(self) -> SpectralBasis:
        """The frozen factorisation of the base weight."""
        quantized = self.quantized_basis
        if quantized is not None:
            return quantized.dequantized()
        # Not by super(), which torch.compile cannot follow here.
        return SpectralBasis(self.left, self.singular_values, self.right)

    @torch.no_grad()
    def absorb(self) -> Self:
        """Make the adapted weight the base weight, and start again at the identity.

        The rotation and the spectrum go into the frozen basis, without a decomposition
        (:func:`spectral_adapters.absorption.absorbed_basis`); the layer computes what it did. An
        optimizer's state belongs to the old parameters and should be made anew. Without its factors
        a state dict of what is trained from here loads onto a layer that has absorbed the same. The
        basis is in fp32 or better from here on; a quantised one is quantised again, and the layer
        computes what it did up to that.

        Returns:
            The layer itself.
        """
        terms = self._terms()
        basis = absorbed_basis(*terms[:3], **self._method())
        trained = [self.delta, *self.rotation]
        before = Fingerprint.from_tensor(self.fingerprint)
        self._set_basis(Decomposed(basis, before.after(trained, basis)))
        self.delta.zero_()
        for parameter in self.rotation:
            reset_rotation(parameter)
        return self

    def plan_for(self, tokens: int) -> PlanChoice:
        """The plan that a training step over ``tokens`` rows would take, with the cost of each."""
        device = self.left.device
        # Activations have the base weight's type; the CPU's products are in at least fp32.
        dtype = self.base_dtype if device.type != "cpu" else accumulation_dtype(self.base_dtype)
        return choose_plan(
            tokens,
            self.left.shape[0],
            self.right.shape[1],
            self.factor_sizes or None,
            plan=self.plan if self._quantization is None else "tokens",
            uses=self._sharing_a_build(),
            rates=rates_for(device, dtype, self.factor_sizes),
            **self._method(),
        )

    def _sharing_a_build(self) -> int:
        """Forward passes of a training step that share one build of the adapted weight."""
        bank = self._rotation_bank
        keeps = keeps_builds(self.decomposition, self.rotation_side, self.recompute)
        return 1 if bank is None or not (bank.keep and keeps) else bank.accumulation_steps

    def extra_repr(self) -> str:
        shape = "x".join(str(size) for size in self._weight_shape())
        sizes = "x".join(str(size) for size in self.factor_sizes) or "none"
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return (
            f"weight={shape}, bias={self.bias is not None}, {self.decomposition}, "
            f"rotation={self.rotation_side} ({self.parametrization}, factors {sizes}), "
            f"spectrum={self.spectrum_activation}, plan={self.plan}, "
            f"rotations={self._rotations_from()}, trained={trained:,}"
            + ("" if self._quantization is None else f", basis={self._quantization}")
        )

    def _weight_shape(self) -> tuple[int, ...]:
        raise TypeError(f"{type(self).__name__} must say the shape of its weight")

    def _method(self) -> dict[str, Any]:
        return {"decomposition": self.decomposition, "rotation": self.rotation_side}

    def _terms(self) -> SODATerms:
        """What the adapted weight is made of, as tensors that pass their gradients on."""
        if self.decomposition == "svd":
            term = self.spectrum()
        elif self.spectrum_activation == "identity":
            term = self.delta
        else:
            term = self.spectrum() - self._base_spectrum()
        factors, folded = self._factors()
        return SODATerms(self.basis, term, factors or None, folded)

    def _product_terms(self) -> SODATerms:
        """The terms for a product, whose gradients may take a shorter way."""
        terms = None
        if (self.decomposition, self.rotation_side) == ("svd", "left") and (
            self.spectrum_activation == "identity"
        ):
            slot = self._slot()
            terms = self._shared_terms(slot, self.basis, slot.others[0])
        return self._terms() if terms is None else terms

    def _base_spectrum(self) -> Tensor:
        if self.singular_values is not None:
            return self.singular_values
        triangular = self.right if self.rotation_side == "left" else self.left
        return triangular.diagonal().to(self.delta.dtype)


class SODALinear(SODAModule):
    """A linear layer ``y = x W'^T + b`` with a SODA-adapted weight, made from an ``nn.Linear``.

    The base weight is replaced by its frozen factorisation; trained are ``delta`` [k] and the
    factors of the rotation, k(k-1)/2-like small (``extra_repr`` counts them). A fresh layer is the
    base layer.

    Args (also of :meth:`from_linear`):
        decomposition: "svd" or "qr".
        rotation: "left" (of the spectral basis, k indices), "right" (of the input coordinates) or
            None.
        factors: sizes of the Kronecker factors, with product k (left) or in_features (right); None
            balances them (:func:`spectral_adapters.factors.balanced_factors`).
        parametrization: "cayley" (packed skew parameters, any optimizer) or "stiefel" (the
            orthogonal factors themselves, for StiefelSGD/StiefelAdam).
        spectrum_activation: "identity", "relu" or "softplus".
        plan: "auto", "factored", "merged" or "tokens"; equal values at different cost.
        save_factors: whether ``state_dict`` holds the frozen basis (see :class:`SpectralModule`).
        base_dtype: round the base weight to this dtype first: for loading an adapter that was
            trained on a half-precision base onto a wider copy of it.
        basis_dtype: "float32" (or better), or "base" to keep the frozen basis in the base weight's
            dtype, which on a half-precision base is half the memory. The basis is all that is left
            of the base weight here, which then comes back up to rounding only. "int8", "float8" and
            "nf4" keep it quantised and compute by the plan "tokens" (docs/quantization.md); svd
            left or without rotation, and linear layers only.
        recompute: svd left only: keep x for the backward instead of ``x V`` and of anything of the
            weight's size; one more product, less memory where layers share their input.

    Shapes: x [..., in_features] -> [..., out_features], in the dtype of x.

    Raises:
        TypeError, ValueError: not a linear layer, a weight that is empty, on the meta device, not
            floating-point or not finite, factors that do not multiply up, or an unknown option.
        ImportError: the package of a quantised basis is missing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        super().__init__(base.weight, base.bias, **options)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        decomposition: str = "svd",
        rotation: str | None = "left",
        factors: tuple[int, ...] | None = None,
        parametrization: str = "cayley",
        spectrum_activation: str = "identity",
        plan: str = "auto",
        save_factors: bool = True,
        base_dtype: torch.dtype | None = None,
        basis_dtype: str = "float32",
        recompute: bool = False,
    ) -> SODALinear:
        """A SODA layer that computes what ``linear`` computes; ``linear`` is left as it is."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear; got {type(linear).__name__}")
        layer = cls.__new__(cls)
        SODAModule.__init__(
            layer,
            linear.weight,
            linear.bias,
            decomposition=decomposition,
            rotation=rotation,
            factors=factors,
            parametrization=parametrization,
            spectrum_activation=spectrum_activation,
            plan=plan,
            save_factors=save_factors,
            base_dtype=base_dtype,
            basis_dtype=basis_dtype,
            recompute=recompute,
        )
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        check_tensor("x", x)
        check_last_dimension("x", x, self.in_features, "the layer's in_features")
        quantized = self.quantized_basis
        if quantized is not None:
            factors = self._factors()[0]
            y = quantized_product(x, quantized, self.spectrum(), factors, change=False)
            return y if self.bias is None else y + self.bias.to(y.dtype)
        return adapted_product(
            x,
            self._product_terms(),
            self.bias,
            plan=self.plan,
            recompute=self.recompute,
            **self._method(),
        )

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the merged weight, in the base weight's dtype."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.left.device,
            dtype=self.base_dtype,
        )
        _fill(linear, self)
        return linear

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)


class SODAConv2d(SODAModule):
    """A 2-d convolution with a SODA-adapted weight, made from an ``nn.Conv2d``.

    The weight [out, in/groups, kh, kw] is adapted in its flattened form [out, in/groups * kh *
    kw]. Options as in :class:`SODALinear`; grouped convolutions have the merged plan only.

    Shapes: x [B, in, H, W] (or [in, H, W]) -> [B, out, H', W'], in the dtype of x.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        base = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        super().__init__(base.weight, base.bias, **options)
        self._copy_geometry(base)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        *,
        decomposition: str = "svd",
        rotation: str | None = "left",
        factors: tuple[int, ...] | None = None,
        parametrization: str = "cayley",
        spectrum_activation: str = "identity",
        plan: str = "auto",
        save_factors: bool = True,
        base_dtype: torch.dtype | None = None,
        basis_dtype: str = "float32",
    ) -> SODAConv2d:
        """A SODA layer that computes what ``conv`` computes; ``conv`` is left as it is."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d; got {type(conv).__name__}")
        layer = cls.__new__(cls)
        SODAModule.__init__(
            layer,
            conv.weight,
            conv.bias,
            decomposition=decomposition,
            rotation=rotation,
            factors=factors,
            parametrization=parametrization,
            spectrum_activation=spectrum_activation,
            plan=plan,
            save_factors=save_factors,
            base_dtype=base_dtype,
            basis_dtype=basis_dtype,
        )
        layer._copy_geometry(conv)
        layer.train(conv.training)
        return layer

    def _copy_geometry(self, conv: nn.Conv2d) -> None:
        if conv.groups > 1 and self.plan not in ("auto", "merged"):
            raise ValueError(
                f"plan must be 'auto' or 'merged' for a convolution with {conv.groups} groups; "
                f"got {self.plan!r}"
            )
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.dilation, self.groups = conv.dilation, conv.groups
        self._edges = tuple(conv._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] or [in, H, W] -> [B, out, H', W'] or [out, H', W']."""
        check_tensor("x", x)
        if x.dim() not in (3, 4):
            raise ValueError(f"x must have 3 or 4 dimensions; got shape {tuple(x.shape)}")
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0))[0]
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have {self.in_channels} channels (the layer's in_channels); "
                f"got shape {tuple(x.shape)}"
            )
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        given = tuple(x.shape)
        x = pad(x, self._edges, mode=mode) if any(self._edges) else x
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if x.shape[2] < reach[0] or x.shape[3] < reach[1]:
            raise ValueError(
                f"x must reach, with its padding, over the kernel's {reach[0]}x{reach[1]}; "
                f"got shape {given}"
            )
        basis, term, factors, *_ = self._terms()
        result, work = basis_dtypes(x, basis, autocast_is_on(x.device.type))
        with without_autocast(x.device):
            y = self._convolve(x.to(work), basis, term, factors)
        return y.to(result)

    def _convolve(
        self, x: Tensor, basis: SpectralBasis, term: Tensor, factors: Sequence[Tensor] | None
    ) -> Tensor:
        """[B, in, H, W], already padded, in the working dtype -> [B, out, H', W']."""
        height, width = (
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, dilation, kernel, stride in zip(
                x.shape[-2:], self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        plan = "merged" if self.groups > 1 else self.plan_for(x.shape[0] * height * width).name
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if plan == "merged":
            return self._conv(x, self.merged_weight().to(x.dtype), bias)
        if self.decomposition == "svd" and self.rotation_side != "right":
            kernel = basis.right.view(-1, self.in_channels, *self.kernel_size).to(x.dtype)
            z = self._conv(x, kernel, None).movedim(1, -1)
            return spectral_output(
                z, basis, term, factors, bias, on_tokens=plan == "tokens"
            ).movedim(-1, 1)
        # The other methods act on the coordinates of the patches themselves.
        patches = unfold(x, self.kernel_size, self.dilation, 0, self.stride).mT
        terms = SODATerms(basis, term, factors)
        y = adapted_product(patches, terms, bias, plan=plan, **self._method())
        return y.mT.reshape(x.shape[0], self.out_channels, height, width)

    def _sharing_a_build(self) -> int:
        return 1  # nothing is kept

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def to_conv2d(self) -> nn.Conv2d:
        """A plain ``nn.Conv2d`` with the merged weight, in the base weight's dtype."""
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        geometry: dict[str, Any] = {name: getattr(self, name) for name in names}
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            bias=self.bias is not None,
            device=self.left.device,
            dtype=self.base_dtype,
            **geometry,
        )
        _fill(conv, self)
        return conv

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)


def _fill(base: nn.Linear | nn.Conv2d, layer: SODAModule) -> None:
    """Copy the merged weight and the bias of ``layer`` into a fresh base layer."""
    with torch.no_grad():
        base.weight.copy_(layer.merged_weight())
        if layer.bias is not None and base.bias is not None:
            base.bias.copy_(layer.bias)
    base.train(layer.training)
