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

import ctypes
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

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

#: Precision of the frozen basis: at least fp32, or that of the base weight (half the memory on a
#: half-precision base, for a rounding of the basis like the one that the base weight has seen).
BASIS_DTYPES = ("float32", "base")

#: Which singular triples: the named ones are counted from that end of the spectrum.
COLUMNS = ("top", "bottom")
ALGORITHMS = ("randomized", "full")

#: From this rank on the Gram matrix is tried, whose eigenvectors take less time than an SVD.
_GRAM_FROM = 256

#: The error of its vectors that is accepted: the rounding of fp32, in which they are kept at best.
_GRAM_ERROR = 2.0**-24

#: Extra columns and passes of the randomized SVD.
_OVERSAMPLING = 16
_ITERATIONS = 4

_SKETCH_SIZE = 16
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def decompose(weight: Tensor, decomposition: str, rotation: str | None) -> SpectralBasis:
    """Canonical factorisation of a weight, in fp32 (fp64 for an fp64 weight).

    Args:
        weight: [out, in], finite, any floating dtype; its exact bits are decomposed in float64.
        decomposition: "svd" or "qr".
        rotation: "left", "right" or None; "qr" is the LQ factorisation except with "left".

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
        left, singular_values, right = _svd(exact, weight.dtype)
        signs = canonical_signs(left)
        left, right = left * signs, right * signs[:, None]
    elif rotation != "left":
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


def in_basis_dtype(
    basis: SpectralBasis, base_dtype: torch.dtype, basis_dtype: str
) -> SpectralBasis:
    """A basis as it is kept: its matrices rounded to the base weight's dtype for "base".

    Singular values keep their precision. Products that must not lose a small change, such as
    ``U R - U``, are taken in fp32 whatever U is kept in.
    """
    check_choice("basis_dtype", basis_dtype, BASIS_DTYPES)
    if basis_dtype == "float32":
        return basis
    left, singular_values, right = basis
    return SpectralBasis(left.to(base_dtype), singular_values, right.to(base_dtype))


def select_columns(
    columns: str | Sequence[int], r: int | None, rank: int, offset: int = 0
) -> tuple[int, ...]:
    """Indices of r singular triples, counted from the largest singular value.

    Args:
        columns: "top", "bottom", or the indices themselves, in any order.
        r: how many; None is 8 for the named ones and the number of the indices for these.
        rank: how many there are, min(out, in).
        offset: leave out this many at the named end.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"offset must be an int of at least 0; got {offset!r}")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ValueError(f"r must be an int of at least 1; got {r!r}")
    if isinstance(columns, str):
        check_choice("columns", columns, COLUMNS)
        r = 8 if r is None else r
        if offset + r > rank:
            raise ValueError(
                f"r + offset must be at most the rank {rank}, min(out, in); got {r} + {offset}"
            )
        start = offset if columns == "top" else rank - offset - r
        return tuple(range(start, start + r))
    if not isinstance(columns, Iterable):
        raise TypeError(
            f"columns must be one of {', '.join(map(repr, COLUMNS))} or hold ints; got {columns!r}"
        )
    indices = tuple(columns)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"columns must hold ints; got {index!r}")
    if (
        not indices
        or len(set(indices)) < len(indices)
        or not 0 <= min(indices) <= max(indices) < rank
    ):
        raise ValueError(
            f"columns must hold different indices from 0 to {rank - 1}, the rank less one; "
            f"got {indices!r}"
        )
    if r not in (None, len(indices)):
        raise ValueError(f"r must be None or the number of columns, {len(indices)}; got {r!r}")
    if offset:
        raise ValueError(f"offset must be 0 when columns holds indices; got {offset}")
    return indices


def decompose_columns(
    weight: Tensor, columns: Sequence[int], algorithm: str = "randomized"
) -> SpectralBasis:
    """The chosen singular triples of a weight, canonical, in fp32 (fp64 for an fp64 weight).

    "randomized" is the subspace iteration of Halko, Martinsson and Tropp (SIAM Review 53, 2011,
    algorithms 4.4 and 5.1) with a fixed sketch, so that it finds the same triples everywhere.
    They approximate the leading ones, best where the spectrum falls; the columns are orthonormal
    in any case, and :func:`triple_errors` bounds how far each triple is from a true one. Where it
    would not be cheaper, the full SVD is taken.

    Args:
        weight: [out, in], finite, any floating dtype; its exact bits are decomposed in float64.
        columns: r indices, counted from the largest singular value.
        algorithm: "randomized" or "full".

    Returns:
        ``left`` [out, r], ``singular_values`` [r], ``right`` [r, in].

    Raises:
        TypeError, ValueError: not a finite floating-point matrix with data, or an unknown option.
    """
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_weight("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions; got shape {tuple(weight.shape)}")
    exact = weight.detach().double()
    chosen = list(select_columns(columns, None, min(exact.shape)))
    leading = max(chosen) + 1
    if algorithm == "randomized" and 2 * (leading + _OVERSAMPLING) < min(exact.shape):
        left, singular_values, right = _leading_svd(exact, leading)
    else:
        left, singular_values, right = _svd(exact, weight.dtype)
    left, singular_values, right = left[:, chosen], singular_values[chosen], right[chosen]
    signs = canonical_signs(left)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return SpectralBasis(
        (left * signs).to(dtype).contiguous(),
        singular_values.to(dtype),
        (right * signs[:, None]).to(dtype).contiguous(),
    )


def triple_errors(weight: Tensor, basis: SpectralBasis) -> Tensor:
    """How far approximate singular triples can be from true ones, from their residuals.

    With ``e_i = sqrt((|W v_i - s_i u_i|^2 + |W^T u_i - s_i v_i|^2) / 2)``, some singular value of W
    lies within ``e_i`` of ``s_i``; and if all others are at least ``g`` from ``s_i``, the sine of
    the angle between ``[u_i; v_i]`` and that triple is at most ``e_i / g`` (Davis and Kahan, for
    the symmetric matrix ``[[0, W], [W^T, 0]]``). Costs two thin products.

    Args:
        weight: [out, in], the matrix W that was decomposed.
        basis: left [out, r], singular_values [r] and right [r, in], as :func:`decompose_columns`
            returns them; the columns orthonormal.

    Returns:
        e [r], float64, in the units of the singular values. It includes the rounding of the basis
        to its dtype.

    Raises:
        TypeError, ValueError: the weight or the basis does not fit.
    """
    check_weight("weight", weight)
    left, values, right = basis
    if values is None or weight.shape != (left.shape[0], right.shape[1]):
        raise ValueError(
            f"basis must hold singular triples of a weight {tuple(weight.shape)}; got left "
            f"{tuple(left.shape)}, right {tuple(right.shape)} and "
            f"{'no' if values is None else len(values)} singular values"
        )
    exact, left, values, right = (t.detach().double() for t in (weight, left, values, right))
    forward = (exact @ right.mT - left * values).square().sum(dim=0)
    backward = (left.mT @ exact - values[:, None] * right).square().sum(dim=1)
    return ((forward + backward) / 2).sqrt()


def _svd(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of a float64 copy of a weight of this type.

    The eigenvectors of the smaller Gram matrix are the singular vectors of that side, and the
    others follow by a product. In float64 their error is about ``eps S_1^2 / gap``, with the
    smallest gap between the squared singular values and between the last one and 0: far below the
    rounding to fp32 for most pretrained weights. Where it is not, the weight gets LAPACK's SVD, on
    CUDA by the driver that PyTorch names for weights like these.
    """
    rows, columns = exact.shape
    if min(rows, columns) >= _GRAM_FROM and dtype != torch.float64:
        wide = exact if rows <= columns else exact.mT
        squares, vectors = torch.linalg.eigh(wide @ wide.mT)
        gap = squares.diff(prepend=squares.new_zeros(1)).min()
        if bool(torch.finfo(torch.float64).eps * squares[-1] <= _GRAM_ERROR * gap):
            left = vectors.flip(1)
            right = left.mT @ wide
            # The norms, which are more exact than the roots of the eigenvalues.
            values = right.norm(dim=1)
            right = right / values[:, None]
            return (left, values, right) if wide is exact else (right.mT, values, left.mT)
    driver = {"driver": "gesvd"} if exact.is_cuda else {}
    return torch.linalg.svd(exact, full_matrices=False, **driver)


def _leading_svd(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """About the leading ``count`` singular triples of a float64 matrix."""
    size = count + _OVERSAMPLING
    block = matrix @ random_signs(matrix.shape[1] * size, 4, matrix.device).view(-1, size)
    for _ in range(_ITERATIONS):
        block = torch.linalg.qr(block).Q
        block = matrix @ torch.linalg.qr(matrix.mT @ block).Q
    basis = torch.linalg.qr(block).Q
    left, singular_values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return (basis @ left)[:, :count], singular_values[:count], right[:count]


class Factorisation(Protocol):
    """What frozen factors of a base weight an adapter needs; equal ones can be shared."""

    #: Whether the factors are those of one weight, or the same for all of a shape.
    of_weight: bool

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the fields of the basis of a weight [rows, columns], absent ones left out."""

    def __call__(self, weight: Tensor) -> SpectralBasis:
        """The basis of a weight [out, in]."""


@dataclass(frozen=True)
class WholeFactorisation:
    """All of the weight: :func:`decompose`.

    Attributes:
        kind: "svd", "qr" or "lq".
        basis_dtype: one of :data:`BASIS_DTYPES`.
    """

    kind: str
    basis_dtype: str = "float32"

    of_weight = True

    @classmethod
    def of(
        cls, decomposition: str, rotation: str | None, basis_dtype: str = "float32"
    ) -> WholeFactorisation:
        """Rotations do not matter for an SVD; "qr" is LQ except for a left one."""
        if decomposition == "svd":
            return cls("svd", basis_dtype)
        return cls("qr" if rotation == "left" else "lq", basis_dtype)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        rank = min(rows, columns)
        middle = {"singular_values": (rank,)} if self.kind == "svd" else {}
        return {"left": (rows, rank), **middle, "right": (rank, columns)}

    def __call__(self, weight: Tensor) -> SpectralBasis:
        if self.kind == "svd":
            basis = decompose(weight, "svd", None)
        else:
            basis = decompose(weight, "qr", "right" if self.kind == "lq" else "left")
        return in_basis_dtype(basis, weight.dtype, self.basis_dtype)


@dataclass(frozen=True)
class ColumnFactorisation:
    """Some singular triples: :func:`decompose_columns`."""

    columns: tuple[int, ...]
    algorithm: str = "randomized"

    of_weight = True

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        r = len(self.columns)
        return {"left": (rows, r), "singular_values": (r,), "right": (r, columns)}

    def __call__(self, weight: Tensor) -> SpectralBasis:
        return decompose_columns(weight, self.columns, self.algorithm)


@dataclass(frozen=True)
class RandomFactorisation:
    """Orthonormal columns and rows drawn from a seed; the weight gives only its shape."""

    left: int
    right: int
    seed: int = 0

    of_weight = False

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"left": (rows, min(self.left, rows)), "right": (min(self.right, columns), columns)}

    def __call__(self, weight: Tensor) -> SpectralBasis:
        sizes = self.shapes(*weight.shape)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32

        def columns(shape: tuple[int, ...], salt: int) -> Tensor:
            values = _random_uniform(shape[0] * shape[1], salt, weight.device).view(shape)
            return _positive_qr(values)[0].to(dtype)

        salt = 5 + 2 * self.seed
        return SpectralBasis(
            columns(sizes["left"], salt).contiguous(),
            None,
            columns(sizes["right"][::-1], salt + 1).mT.contiguous(),
        )


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix, mode="reduced")
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    return q * signs, r * signs[:, None]


def canonical_signs(left: Tensor) -> Tensor:
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
    def of(
        cls, weight: Tensor, basis: SpectralBasis, weight_hash: str | None = None
    ) -> Fingerprint:
        """Fingerprint of a base ``weight`` [out, in] (in its own dtype) and its factorisation.

        ``weight_hash`` is the weight's :func:`hash_values` where that is known already.
        """
        sketch = torch.stack([_sketch(basis.left, 0), _sketch(basis.right, 1)])
        values = hash_values(weight, widened(weight.dtype)) if weight_hash is None else weight_hash
        return cls(values, weight.dtype, sketch.float().cpu())

    def after(self, trained: Iterable[Tensor], basis: SpectralBasis) -> Fingerprint:
        """Of the base that has absorbed an adapter with these parameters, whose ``basis`` it has.

        What stands for the weight is made of its own hash and of what was absorbed, so that whoever
        absorbs the same adapter has the same, while the last bits of the weight may differ.
        """
        digest = hashlib.sha256(bytes.fromhex(self.weight))
        for values in trained:
            digest.update(bytes.fromhex(hash_values(values, widened(values.dtype))))
        sketch = torch.stack([_sketch(basis.left, 0), _sketch(basis.right, 1)])
        return Fingerprint(digest.hexdigest(), self.base_dtype, sketch.float().cpu())

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


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type in which fingerprints hash weights: equal for half precision and its fp32 copy."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hash_values(weight: Tensor, dtype: torch.dtype) -> str:
    """SHA-256 of a tensor's shape and of its values as ``dtype``."""
    values = weight.detach().to("cpu", dtype).contiguous()
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    digest.update(octets(values))
    return digest.hexdigest()


def octets(values: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous tensor on the CPU, good for as long as the tensor is."""
    # Not through numpy: it has no bfloat16, and a storage that it has seen cannot be resized, which
    # FSDP2 does to gathered weights.
    return (ctypes.c_char * values.nbytes).from_address(values.data_ptr())


def _sketch(matrix: Tensor, salt: int) -> Tensor:
    """16 bilinear forms ``g^T M h`` with fixed random signs; unbiased for Frobenius distances."""
    rows, columns = matrix.shape
    wide = matrix.detach().double()
    left = _signs(rows, 2 * salt, wide.device)
    right = _signs(columns, 2 * salt + 1, wide.device)
    return ((left @ wide) * right).sum(dim=1)


def _signs(length: int, salt: int, device: torch.device) -> Tensor:
    """[16, length] of +-1, the same on every machine and version."""
    return random_signs(_SKETCH_SIZE * length, salt, device).view(_SKETCH_SIZE, length)


def random_signs(count: int, salt: int, device: torch.device) -> Tensor:
    """[count] of +-1."""
    return (2 * ((_hash(count, salt) >> 16) & 1) - 1).double().to(device)


def _random_uniform(count: int, salt: int, device: torch.device) -> Tensor:
    """[count] from -1 to 1."""
    return (_hash(count, salt).double() / 2**31 - 1).to(device)


def _hash(count: int, salt: int) -> Tensor:
    """[count] of 32 random bits from integer arithmetic, the same on every machine and version."""
    mixed = (torch.arange(count, dtype=torch.int64) + 0x9E3779B9 * (salt + 1)) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x846CA68B):
        # The product may overflow int64; wrapping around keeps the low 32 bits that are used.
        mixed = ((mixed ^ (mixed >> 16)) * multiplier) & 0xFFFFFFFF
    return mixed
