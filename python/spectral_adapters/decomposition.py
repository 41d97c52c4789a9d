"""Canonical factorisations of frozen weights, and the fingerprint that recognises them again.

Singular vectors are not unique: signs flip between drivers and devices, close singular values mix.
An adapter that rotates them means something only together with the basis it was trained on, so

* the decomposition runs in float64 on the exact bits of the weight;
* signs are canonical: the first entry of largest magnitude of each left vector is positive (SVD),
  the diagonal of the triangular factor is not negative (QR, LQ);
* a fingerprint of the weight's bits and of the basis travels with the adapter and is compared on
  load.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_adapters._validation import check_choice, check_weight
from spectral_adapters.functional import DECOMPOSITIONS, ROTATIONS, SpectralBasis

#: Two entries of a singular vector within this relative distance count as equally large, so that
#: round-off cannot decide which of them fixes the sign.
_SIGN_TIE = 1e-4

#: Bases whose sketches differ by less than this (relative) give the same adapted weight to about
#: the same relative error of the change it makes.
BASIS_TOLERANCE = 1e-3

_SKETCH_SIZE = 16
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def decompose(weight: Tensor, decomposition: str, rotation: str | None) -> SpectralBasis:
    """Canonical factorisation of a weight, in fp32 (fp64 for an fp64 weight).

    Args:
        weight: [out, in], finite, any floating dtype; its exact bits are decomposed in float64.
        decomposition: "svd" or "qr".
        rotation: "left", "right" or None; "qr" with "right" is the LQ factorisation.

    Raises:
        TypeError, ValueError: not a finite floating-point matrix with data, or an unknown option.
    """
    check_choice("decomposition", decomposition, DECOMPOSITIONS)
    check_choice("rotation", rotation, ROTATIONS)
    check_weight("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions; got shape {tuple(weight.shape)}")
    exact = weight.detach().double()
    singular_values = None
    if decomposition == "svd":
        left, singular_values, right = torch.linalg.svd(exact, full_matrices=False)
        signs = _canonical_signs(left)
        left, right = left * signs, right * signs[:, None]
    elif rotation == "right":
        q, r = _positive_qr(exact.mT)
        left, right = r.mT, q.mT
    else:
        left, right = _positive_qr(exact)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return SpectralBasis(
        left.to(dtype).contiguous(),
        None if singular_values is None else singular_values.to(dtype),
        right.to(dtype).contiguous(),
    )


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix, mode="reduced")
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return q * signs, r * signs[:, None]


def _canonical_signs(left: Tensor) -> Tensor:
    """+1 or -1 per column [k]: makes the first entry of (nearly) largest magnitude positive."""
    magnitude = left.abs()
    is_largest = magnitude >= (1 - _SIGN_TIE) * magnitude.amax(dim=0)
    first = is_largest.to(torch.uint8).argmax(dim=0, keepdim=True)
    return torch.where(left.gather(0, first)[0] < 0, -1.0, 1.0).to(left.dtype)


@dataclass(frozen=True)
class Fingerprint:
    """What an adapter remembers of the base it was trained on.

    Attributes:
        weight: SHA-256 of the weight's exact values.
        base_dtype: dtype of the base weight at training time.
        basis: [2, 16] float32 random projections of the left and right basis. The squared distance
            of two sketches estimates the squared Frobenius distance of the bases.
    """

    weight: str
    base_dtype: torch.dtype
    basis: Tensor

    @classmethod
    def of(cls, weight: Tensor, basis: SpectralBasis) -> Fingerprint:
        """Fingerprint of a base ``weight`` [out, in] (in its own dtype) and its factorisation."""
        sketch = torch.stack([_sketch(basis.left, 0), _sketch(basis.right, 1)])
        return cls(_hash_values(weight), weight.dtype, sketch.float().cpu())

    def to_tensor(self) -> Tensor:
        """Pack into one uint8 tensor [161], for state dicts and safetensors."""
        head = bytes.fromhex(self.weight) + bytes([_DTYPES.index(self.base_dtype)])
        return torch.frombuffer(
            bytearray(head + self.basis.contiguous().numpy().tobytes()), dtype=torch.uint8
        )

    @classmethod
    def from_tensor(cls, packed: Tensor) -> Fingerprint:
        """Inverse of :meth:`to_tensor`; ``ValueError`` if the tensor is no fingerprint."""
        size = 33 + 2 * _SKETCH_SIZE * 4
        if (
            packed.dtype != torch.uint8
            or packed.shape != (size,)
            or int(packed[32]) >= len(_DTYPES)
        ):
            raise ValueError(
                f"fingerprint must be a uint8 tensor [{size}] written by this package; "
                f"got {packed.dtype} {tuple(packed.shape)}"
            )
        data = bytes(packed.cpu().tolist())
        basis = torch.frombuffer(bytearray(data[33:]), dtype=torch.float32)
        return cls(data[:32].hex(), _DTYPES[data[32]], basis.view(2, _SKETCH_SIZE).clone())

    def mismatch(self, other: Fingerprint) -> str | None:
        """Why an adapter trained on ``self`` must not be loaded on ``other``; None if it may.

        The sentence names the remedy.
        """
        if self.weight != other.weight:
            if self.base_dtype != other.base_dtype:
                name = str(self.base_dtype).removeprefix("torch.")
                return (
                    f"it was trained on a {self.base_dtype} base and this base is "
                    f"{other.base_dtype}: build the layer with base_dtype=torch.{name}, or save "
                    "the adapter with save_factors=True"
                )
            return (
                "it was trained on another base weight (the SHA-256 of the values differs): load "
                "it on the base it was trained on, or save the adapter with save_factors=True"
            )
        scale = self.basis.norm(dim=1).clamp_min(1e-30)
        distance = float(((self.basis - other.basis).norm(dim=1) / scale).max())
        if not distance <= BASIS_TOLERANCE:
            return (
                f"the base weight is the same but its factorisation came out differently here "
                f"(relative distance {distance:.1e}, tolerance {BASIS_TOLERANCE:.0e}; equal or "
                "vanishing singular values have no unique vectors): save the adapter "
                "with save_factors=True"
            )
        return None


def round_to_dtype(weight: Tensor, base_dtype: torch.dtype | None) -> Tensor:
    """The base weight as it was in ``base_dtype``: rounds a wider copy, leaves None alone."""
    if base_dtype is None:
        return weight
    if base_dtype not in _DTYPES:
        raise ValueError(f"base_dtype must be one of {_DTYPES}; got {base_dtype!r}")
    return weight.to(base_dtype)


def _hash_values(weight: Tensor) -> str:
    """SHA-256 of shape and values; equal for a half-precision tensor and its fp32 copy."""
    exact = weight if weight.dtype == torch.float64 else weight.float()
    wide = exact.detach().cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(wide.shape)).encode())
    digest.update(wide.numpy().tobytes())
    return digest.hexdigest()


def _sketch(matrix: Tensor, salt: int) -> Tensor:
    """16 bilinear forms ``g^T M h`` with fixed random signs; unbiased for Frobenius distances."""
    rows, columns = matrix.shape
    wide = matrix.detach().double()
    left = _signs(rows, 2 * salt, wide.device)
    right = _signs(columns, 2 * salt + 1, wide.device)
    return ((left @ wide) * right).sum(dim=1)


def _signs(length: int, salt: int, device: torch.device) -> Tensor:
    """[16, length] of +-1 from integer arithmetic, the same on every machine and version."""
    count = torch.arange(_SKETCH_SIZE * length, dtype=torch.int64)
    mixed = (count + 0x9E3779B9 * (salt + 1)) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x846CA68B):
        # The product may overflow int64; wrapping around keeps the low 32 bits that are used.
        mixed = ((mixed ^ (mixed >> 16)) * multiplier) & 0xFFFFFFFF
    bits = (mixed >> 16) & 1
    return (2 * bits - 1).double().view(_SKETCH_SIZE, length).to(device)
