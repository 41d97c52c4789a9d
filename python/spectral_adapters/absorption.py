"""Trained rotations and spectra folded into the frozen basis, without a new decomposition.

``(U R) diag(s) V^T`` with an orthogonal R is a singular value decomposition already, up to the
order and the signs of s (Zhang and Pilanci, "Spectral Adapter", NeurIPS 2024, Lemma 4.1, for
rotations of the leading vectors; Kronecker rotations of all of them are no different). The next
task starts from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_adapters.decomposition import canonical_signs
from spectral_adapters.functional import SpectralBasis, kron_rotate
from spectral_kernels.ops.kron import accumulation_dtype

__all__ = ["absorbed_basis", "absorbed_columns"]


@torch.no_grad()
def absorbed_basis(
    basis: SpectralBasis,
    spectrum: Tensor,
    factors: Sequence[Tensor] | None,
    *,
    decomposition: str,
    rotation: str | None,
) -> SpectralBasis:
    """The factorisation of a SODA layer's adapted weight, in the canonical form of
    :func:`spectral_adapters.decomposition.decompose`.

    Singular values not negative and descending, the first largest entry of each left vector
    positive; for "qr" no negative number on the diagonal. Computed in float64; orthogonal to
    rounding after any number of generations, because the deviation left by the last one is taken
    out by a Newton-Schulz step ``X (3 I - X^T X) / 2``.

    Args:
        basis: factorisation of the base weight, as in ``functional.soda_linear``.
        spectrum: s [k] for "svd", the offset of the diagonal [k] for "qr".
        factors: orthogonal [n_i, n_i], or None without a rotation.
        decomposition, rotation: as in ``functional.soda_linear``.

    Returns:
        In fp32 (fp64 for an fp64 basis), whatever the basis was kept in.
    """
    left, right = (m.to(torch.float64, copy=True) for m in (basis.left, basis.right))
    spectrum = spectrum.double()
    turns = [_orthonormal(factor.double()) for factor in factors or ()]
    if rotation == "left":
        left = kron_rotate(left, turns)
    elif rotation == "right":
        right = kron_rotate(right, turns, transpose=True)
    singular_values = None
    if decomposition == "svd":
        order = torch.argsort(spectrum.abs(), descending=True, stable=True)
        singular_values = spectrum.abs()[order]
        left = _orthonormal(left * torch.where(spectrum < 0, -1.0, 1.0))[:, order]
        right = _orthonormal(right.mT).mT[order]
        signs = canonical_signs(left)
        left, right = left * signs, right * signs[:, None]
    else:
        triangular, is_left = (left, True) if rotation != "left" else (right, False)
        triangular.diagonal().add_(spectrum)
        signs = torch.where(triangular.diagonal() < 0, -1.0, 1.0)
        left, right = left * signs, right * signs[:, None]
        if is_left:
            right = _orthonormal(right.mT).mT
        else:
            left = _orthonormal(left)
    return _stored(SpectralBasis(left, singular_values, right), basis.left.dtype)


@torch.no_grad()
def absorbed_columns(basis: SpectralBasis, rotations: tuple[Tensor, Tensor]) -> SpectralBasis:
    """Singular triples of the weight that Spectral Adapter R makes: ``U1 R_U, S1, (V1 R_V)^T``.

    Args:
        basis: chosen columns U1 [out, r], S1 [r], V1^T [r, in].
        rotations: orthogonal R_U and R_V [r, r].

    Returns:
        With canonical signs, in fp32 (fp64 for an fp64 basis).
    """
    turn_left, turn_right = [_orthonormal(turn.double()) for turn in rotations]
    left = _orthonormal(basis.left.double() @ turn_left)
    right = _orthonormal(basis.right.double().mT @ turn_right).mT
    signs = canonical_signs(left)
    assert basis.singular_values is not None
    turned = SpectralBasis(left * signs, basis.singular_values.double(), right * signs[:, None])
    return _stored(turned, basis.left.dtype)


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns to second order, for one that nearly has them."""
    gram = matrix.mT @ matrix
    return matrix @ (
        1.5 * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device) - gram / 2
    )


def _stored(basis: SpectralBasis, dtype: torch.dtype) -> SpectralBasis:
    dtype = accumulation_dtype(dtype)
    left, singular_values, right = basis
    return SpectralBasis(
        left.to(dtype).contiguous(),
        None if singular_values is None else singular_values.to(dtype),
        right.to(dtype).contiguous(),
    )
