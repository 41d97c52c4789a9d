"""Spectral Adapters A and R: the top singular vectors are shifted, or rotated among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from spectral_adapters._validation import check_last_dimension, check_tensor
from spectral_adapters.absorption import absorbed_columns
from spectral_adapters.autograd import (
    SharedRotations,
    SpectralALinearFunction,
    SpectralRLinearFunction,
)
from spectral_adapters.decomposition import (
    ColumnFactorisation,
    Fingerprint,
    round_to_dtype,
    select_columns,
)
from spectral_adapters.functional import adapted_linear, low_rank_factors
from spectral_adapters.modules._base import SpectralModule, computes_as_written
from spectral_adapters.rotation_bank import RotatedLayer, RotationSlot
from spectral_adapters.spectra import Decomposed, factorise


class SpectralAdapterLinear(SpectralModule):
    """What the layers of A and R share: the base layer, r columns of its SVD, and the product.

    Attributes:
        base: the base layer, an ``nn.Linear`` that shares its frozen weight and bias with the
            layer this one was made from.
        left, singular_values, right: the chosen columns U1 [out, r], S1 [r], V1^T [r, in].
        columns: their indices, counted from the largest singular value.
    """

    _FROZEN = (*SpectralModule._FROZEN, "base.weight", "base.bias")
    _CASTABLE = ("base",)

    #: Adds the change to the base product; takes the basis and what ``_trained`` returns.
    _function: ClassVar[type[torch.autograd.Function]]

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
        self._build(base, **options)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int | None = None,
        columns: str | Sequence[int] = "top",
        offset: int = 0,
        algorithm: str = "randomized",
        save_factors: bool = True,
        base_dtype: torch.dtype | None = None,
    ) -> Self:
        """An adapted layer that computes what ``linear`` computes; ``linear`` stays as it is."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear; got {type(linear).__name__}")
        layer = cls.__new__(cls)
        layer._build(
            linear,
            r=r,
            columns=columns,
            offset=offset,
            algorithm=algorithm,
            save_factors=save_factors,
            base_dtype=base_dtype,
        )
        layer.train(linear.training)
        return layer

    def _build(
        self,
        linear: nn.Linear,
        *,
        r: int | None = None,
        columns: str | Sequence[int] = "top",
        offset: int = 0,
        algorithm: str = "randomized",
        save_factors: bool = True,
        base_dtype: torch.dtype | None = None,
    ) -> None:
        SpectralModule.__init__(self, save_factors=save_factors)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = round_to_dtype(linear.weight.detach(), base_dtype)
        self.columns = select_columns(columns, r, min(weight.shape), offset)
        decomposed = factorise(weight, ColumnFactorisation(self.columns, algorithm))
        self.base_dtype = weight.dtype
        self.base = nn.Linear(
            self.in_features, self.out_features, linear.bias is not None, device="meta"
        )
        # No copy: the parameters are new, their memory is that of the given layer.
        self.base.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        if linear.bias is not None:
            self.base.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self._set_basis(decomposed)
        self._add_parameters({"dtype": decomposed.basis.left.dtype, "device": weight.device})

    def _add_parameters(self, options: dict[str, Any]) -> None:
        """Register the trained parameters, at the identity."""
        raise NotImplementedError

    def _trained(self) -> tuple[tuple[Tensor, ...], SharedRotations | None]:
        """The shifts, or the rotations and where their gradients go if not through them."""
        raise NotImplementedError

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(down [q, in], up [out, q]) with ``W' - W0 = up @ down``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        check_tensor("x", x)
        check_last_dimension("x", x, self.in_features, "the layer's in_features")
        base = self.base
        assert self.singular_values is not None
        trained, shared = self._trained()
        factors = (self.left, self.singular_values, self.right, *trained)
        start: dict[str, Any] = {"weight": base.weight, "bias": base.bias}
        if type(base) is not nn.Linear or not computes_as_written(base, x):
            start = {"base": base(x)}
        return adapted_linear(self._function, x, factors, shared=shared, **start)

    def get_delta_weight(self) -> Tensor:
        """``W' - W0`` [out, in]; exactly zero for an untrained layer."""
        down, up = self._factors()
        return up @ down

    def merged_weight(self) -> Tensor:
        """The dense adapted weight ``W'`` [out, in], differentiable."""
        return self.base.weight + self.get_delta_weight()

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the merged weight, in the base weight's dtype."""
        weight = self.base.weight
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.base.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        linear.weight.copy_(self.merged_weight())
        if self.base.bias is not None:
            linear.bias.copy_(self.base.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        first, last = min(self.columns), max(self.columns)
        is_block = last - first + 1 == len(self.columns)
        shown = f"{first}-{last}" if is_block else ",".join(map(str, self.columns))
        return (
            f"weight={self.out_features}x{self.in_features}, bias={self.base.bias is not None}, "
            f"r={len(self.columns)}, columns={shown}, trained={trained:,}"
        )


class SpectralAdapterALinear(SpectralAdapterLinear):
    """``W' = W0 + (U1 + A_U) S1 (V1 + A_V)^T - U1 S1 V1^T``: chosen singular vectors are shifted.

    Spectral Adapter A (Zhang and Pilanci, NeurIPS 2024). Trained are ``shift_left`` A_U [out, r]
    and ``shift_right`` A_V [in, r], zero at the start; as many numbers as a LoRA of rank r, and a
    change of rank 2r. Nothing of the size of W is built in a step.

    Args (also of :meth:`from_linear`):
        r: number of columns; None is 8, or the number of indices in ``columns``.
        columns: "top", "bottom" or a list of indices, counted from the largest singular value.
        offset: leave out this many at the named end.
        algorithm: of the SVD, "randomized" or "full"
            (:func:`spectral_adapters.decomposition.decompose_columns`).
        save_factors: whether ``state_dict`` holds the chosen columns.
        base_dtype: round the base weight to this dtype before it is decomposed.

    Shapes: x [..., in_features] -> [..., out_features], in the dtype of x.

    Raises:
        TypeError, ValueError: not a linear layer, a weight that is empty, on the meta device, not
            floating-point or not finite, columns that it does not have, or an unknown option.
    """

    _function = SpectralALinearFunction

    def _add_parameters(self, options: dict[str, Any]) -> None:
        r = len(self.columns)
        self.shift_left = nn.Parameter(torch.zeros(self.out_features, r, **options))
        self.shift_right = nn.Parameter(torch.zeros(self.in_features, r, **options))

    def _trained(self) -> tuple[tuple[Tensor, ...], None]:
        return (self.shift_left, self.shift_right), None

    def _factors(self) -> tuple[Tensor, Tensor]:
        return low_rank_factors(self.basis, shifts=(self.shift_left, self.shift_right))


class SpectralAdapterRLinear(SpectralAdapterLinear, RotatedLayer):
    """``W' = W0 + U1 (R_U S1 R_V^T - S1) V1^T``: chosen singular vectors are rotated.

    Spectral Adapter R (Zhang and Pilanci, NeurIPS 2024) with exact rotations: trained are
    ``rotation_left`` and ``rotation_right``, the packed skew parameters [r(r-1)/2] of the Cayley
    transform, zero at the start. The fewest trained numbers of the family; a change of rank r.

    Arguments, shapes and errors: as :class:`SpectralAdapterALinear`.
    """

    _function = SpectralRLinearFunction

    def _add_parameters(self, options: dict[str, Any]) -> None:
        r = len(self.columns)
        self.rotation_left = nn.Parameter(torch.zeros(r * (r - 1) // 2, **options))
        self.rotation_right = nn.Parameter(torch.zeros(r * (r - 1) // 2, **options))

    def rotations(self) -> tuple[Tensor, Tensor]:
        """R_U and R_V, orthogonal [r, r]."""
        (left, right), _ = self._rotations(*self.rotation_slots())
        return left, right

    def rotation_slots(self) -> list[RotationSlot]:
        """Both rotations, for a :class:`spectral_adapters.rotation_bank.RotationBank`."""
        r = len(self.columns)
        return [RotationSlot("", (self.rotation_left, self.rotation_right), (r, r))]

    @torch.no_grad()
    def absorb(self) -> Self:
        """Make the adapted weight the base weight, and start again at the identity.

        The rotated columns are singular vectors of the adapted weight
        (:func:`spectral_adapters.absorption.absorbed_columns`), so nothing is decomposed. The
        linear layer that this one was made from keeps its weight. An optimizer's state belongs to
        the old parameters and should be made anew.

        Returns:
            The layer itself.
        """
        weight = self.merged_weight().to(self.base.weight.dtype)
        basis = absorbed_columns(self.basis, self.rotations())
        trained = (self.rotation_left, self.rotation_right)
        before = Fingerprint.from_tensor(self.fingerprint)
        self._set_basis(Decomposed(basis, before.after(trained, basis)))
        self.base.weight = nn.Parameter(weight, requires_grad=False)
        for packed in trained:
            packed.zero_()
        return self

    def _trained(self) -> tuple[tuple[Tensor, ...], SharedRotations | None]:
        (slot,) = self.rotation_slots()
        return self._rotations_for_product(slot, self.left.device, self.left.dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return low_rank_factors(self.basis, rotations=self.rotations())
