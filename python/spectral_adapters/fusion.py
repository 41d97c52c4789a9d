"""Fusing adapters that were trained apart: the arithmetic, on plain tensors.

What a method of PEFT adds to this, layers and adapters by name, is in ``spectral_adapters.peft``.
Changes are ``W' - W0`` [out, in]; a model's are a dict from layers to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from spectral_adapters._validation import check_choice, check_square_factors, check_tensor
from spectral_adapters.decomposition import random_signs, select_columns
from spectral_adapters.functional import without_autocast

#: How :func:`fuse_changes` combines changes of weights.
CHANGE_METHODS = ("delta", "fedavg", "orthogonal", "gradient")

#: Largest tan(angle / 2) that a Cayley transform is asked for; 2e-6 from half a turn.
_LARGEST_TANGENT = 1e6

#: Crosstalk up to which adapters count as orthogonal: the rounding of half-precision factors.
ORTHOGONAL_TOLERANCE = 1e-3

Changes = Mapping[str, Tensor]


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite number per adapter, 1 if None.

    Raises:
        ValueError: another number of them, or one that is not finite.
    """
    try:
        found = [1.0] * count if weights is None else [_number(weight) for weight in weights]
    except (TypeError, ValueError):
        found = []
    if len(found) != count or not all(isfinite(weight) for weight in found):
        raise ValueError(
            f"weights must hold one finite number for each of {count} adapters; got {weights!r}"
        )
    return found


def _number(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError
    return float(value)


def _of_angles(skew: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A skew matrix [..., n, n] with its eigenvalues ``i a`` replaced by ``i function(a)``, odd."""
    angles, vectors = torch.linalg.eigh(-1j * skew)
    changed = ((vectors * (1j * function(angles))[..., None, :]) @ vectors.mH).real
    return (changed - changed.mT) / 2


def rotation_log(rotation: Tensor) -> Tensor:
    """The real logarithm of a rotation, skew, with angles inside (-pi, pi); in float64.

    By way of the inverse Cayley transform ``Q = (R - I)(R + I)^-1``: an angle a of R is
    tan(a / 2) in Q, and Q is a normal matrix whose eigenvectors are orthogonal also where angles
    coincide. ``R = exp(log R)``.

    Args:
        rotation: [n, n], orthogonal to rounding.

    Raises:
        ValueError: not square; not orthogonal to 1e-3; or an angle of half a turn, where the
            logarithm is not unique (within 2e-6; determinant -1 is such a case).
    """
    (matrix,) = check_square_factors("rotation", [rotation])
    exact = matrix.detach().double()
    identity = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
    if not float((exact.mT @ exact - identity).abs().amax()) <= 1e-3:
        raise ValueError("rotation must be orthogonal; R^T R differs from the identity")
    # Half a turn is a singular value 0 of R + I, which is 2 cos(angle / 2) otherwise.
    if float(torch.linalg.svdvals(exact + identity)[-1]) < 2 / _LARGEST_TANGENT:
        raise ValueError(
            "rotation must have no angle of half a turn, where the logarithm is not unique"
        )
    skew = torch.linalg.solve(exact + identity, exact - identity)
    return _of_angles((skew - skew.mT) / 2, lambda tangent: 2 * torch.atan(tangent))


def mix_rotations(rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``exp(sum of weight * log R)``: a rotation again, which the sum of rotations is not.

    The geodesic from the identity for one rotation, and between any that commute; for others the
    log-Euclidean mean (Arsigny et al., 2007). Weights (1, 0) and (0, 1) give the ends back.

    Args:
        rotations: [n, n] each.
        weights: one per rotation.

    Returns:
        [n, n] in the dtype of the first.

    Raises:
        ValueError: as :func:`rotation_log`.
    """
    alone = _alone(rotations, weights)
    if alone is not None:
        return alone.clone()
    logs = [weight * rotation_log(r) for r, weight in zip(rotations, weights, strict=True)]
    return torch.matrix_exp(sum(logs[1:], logs[0])).to(rotations[0])


def mix_packed_rotations(packed: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """:func:`mix_rotations` of rotations by their Cayley parameters, to the same.

    ``R = (I + Q)(I - Q)^-1`` has no angle of half a turn, so its logarithm always exists:
    ``log R = 2 artanh Q``, that is 2 arctan of the numbers in Q's eigenvalues. The mixture has a Q
    again unless one of its angles is half a turn.

    Args:
        packed: [n(n-1)/2] each, the strict upper triangle of P row by row, ``Q = (P - P^T) / 2``.
        weights: one per rotation.

    Returns:
        [n(n-1)/2] in the dtype of the first.

    Raises:
        ValueError: the mixture has an angle of half a turn.
    """
    alone = _alone(packed, weights)
    if alone is not None:
        return alone.clone()
    length = packed[0].shape[0]
    n = round((1 + sqrt(1 + 8 * length)) / 2)
    rows, columns = torch.triu_indices(n, n, 1, device=packed[0].device)
    total = torch.zeros(n, n, dtype=torch.float64, device=packed[0].device)
    for parameters, weight in zip(packed, weights, strict=True):
        skew = torch.zeros_like(total)
        skew[rows, columns] = parameters.detach().double() / 2
        total += weight * _of_angles(skew - skew.mT, lambda tangent: 2 * torch.atan(tangent))
    return 2 * _of_angles(total, _half_tangent)[rows, columns].to(packed[0])


def _half_tangent(angles: Tensor) -> Tensor:
    tangent = torch.tan(angles / 2)
    if float(tangent.abs().amax()) > _LARGEST_TANGENT:
        raise ValueError(
            "the mixture rotates by half a turn, which no Cayley transform does; use other "
            "weights, or merge the sum of the changes (method 'delta')"
        )
    return tangent


def _alone(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
    """The only value that counts, if it does so with weight 1: ends are exact to the last bit."""
    used = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    return used[0][0] if len(used) == 1 and used[0][1] == 1 else None


def gradient_fusion(
    changes: Sequence[Tensor],
    moments: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    regularization: float = 1e-6,
) -> Tensor:
    """The change that does to every concept's inputs most nearly what its own change does.

    Gu et al., "Mix-of-Show", NeurIPS 2023: ``argmin_W sum_i |(W0 + dW_i) X_i - W X_i|_F^2``, there
    by L-BFGS from W0. The minimum nearest to W0, which that descent approaches, is
    ``W0 + (sum dW_i C_i)(sum C_i)^+`` with the second moments ``C_i = X_i X_i^T``: inputs that no
    concept has are left alone. Added here is ``mu |W - W0|_F^2``, so ``(sum C_i + mu I)^-1``.

    Args:
        changes: dW_i [out, in].
        moments: C_i [in, in], from :func:`second_moments`.
        weights: how much each concept's errors count, 1 by default.
        regularization: mu in units of the mean of the diagonal of ``sum C_i``; 0 takes the
            pseudo-inverse (eigenvalues below 1e-12 of the largest count as 0).

    Returns:
        [out, in], float64.

    Raises:
        ValueError: a shape does not fit, or a negative number.
    """
    weights = check_weights(weights, len(changes))
    if len(moments) != len(changes) or not changes:
        raise ValueError(
            f"moments must hold one matrix for each of {len(changes)} changes; got {len(moments)}"
        )
    if isinstance(regularization, bool) or not isinstance(regularization, (int, float)):
        raise TypeError(f"regularization must be a number; got {regularization!r}")
    if not (isfinite(regularization) and regularization >= 0) or min(weights) < 0:
        raise ValueError(
            "regularization and weights must not be negative; "
            f"got {regularization!r} and {weights!r}"
        )
    size = changes[0].shape[1]
    target = torch.zeros(changes[0].shape, dtype=torch.float64, device=changes[0].device)
    total = torch.zeros(size, size, dtype=torch.float64, device=target.device)
    for change, moment, weight in zip(changes, moments, weights, strict=True):
        check_tensor("moments", moment)
        if moment.shape != total.shape or change.shape != target.shape:
            raise ValueError(
                f"changes and moments must be {tuple(target.shape)} and {tuple(total.shape)}; "
                f"got {tuple(change.shape)} and {tuple(moment.shape)}"
            )
        second = weight * moment.to(total)
        target += change.to(target) @ second
        total += second
    values, vectors = torch.linalg.eigh(total)
    shift = regularization * float(values.clamp_min(0).mean())
    kept = values > 1e-12 * values[-1].clamp_min(0)
    inverse = torch.where(kept, 1 / (values + shift), torch.zeros_like(values))
    return (target @ vectors * inverse) @ vectors.mT


def fuse_changes(
    changes: Sequence[Changes],
    weights: Sequence[float] | None = None,
    *,
    method: str,
    moments: Sequence[Changes] | None = None,
    regularization: float = 1e-6,
) -> dict[str, Tensor]:
    """The fused change of every layer that any adapter changes.

    * "delta": ``sum of weight * dW``, weights 1 by default.
    * "fedavg": ``sum of p * dW`` with ``p = weight / sum of weights``, the average of the models
      (McMahan et al., AISTATS 2017); of the changes, not of their factors.
    * "orthogonal": the sum, after a check that the adapters' inputs are orthogonal (Po et al.,
      "Orthogonal Adaptation", CVPR 2024).
    * "gradient": :func:`gradient_fusion`; weights say how much a concept counts.

    A layer that an adapter does not have is one that it changes by zero.

    Args:
        changes: one dict per adapter, from layers to ``W' - W0`` [out, in].
        weights: one number per adapter.
        method: one of :data:`CHANGE_METHODS`.
        moments: for "gradient": one dict per adapter, from layers to second moments [in, in].
        regularization: for "gradient".

    Returns:
        From layers to changes [out, in], in the widest dtype of the adapters'.

    Raises:
        ValueError: naming the argument; for "orthogonal", the crosstalk that is too large.
    """
    check_choice("method", method, CHANGE_METHODS)
    factors = check_weights(weights, len(changes))
    if (moments is not None) != (method == "gradient"):
        raise ValueError(
            'moments must be given for method "gradient", and for no other; '
            f"got {type(moments).__name__} for {method!r}"
        )
    if method == "fedavg":
        if min(factors) < 0 or sum(factors) <= 0:
            raise ValueError(f"weights must be shares, with a positive sum; got {factors}")
        factors = [factor / sum(factors) for factor in factors]
    if method == "orthogonal":
        _check_orthogonal(changes)
    fused = {}
    for layer in dict.fromkeys(layer for found in changes for layer in found):
        some = next(found[layer] for found in changes if layer in found)
        parts = [found.get(layer, torch.zeros_like(some)) for found in changes]
        if any(part.shape != some.shape for part in parts):
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"changes must have one shape per layer; {layer} has {shapes}")
        dtype = some.dtype
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        if moments is None:
            scaled = [factor * part.to(dtype) for factor, part in zip(factors, parts, strict=True)]
            fused[layer] = sum(scaled[1:], scaled[0])
            continue
        for index, found in enumerate(moments):
            if layer not in found:
                raise ValueError(f"moments[{index}] must have every changed layer; {layer} is not")
        seen = [found[layer] for found in moments]
        fused[layer] = gradient_fusion(parts, seen, factors, regularization=regularization).to(
            dtype
        )
    return fused


def _check_orthogonal(changes: Sequence[Changes]) -> None:
    for (i, first), (j, second) in combinations(enumerate(changes), 2):
        for layer in first.keys() & second.keys():
            value = crosstalk(first[layer], second[layer])
            if not value <= ORTHOGONAL_TOLERANCE:
                raise ValueError(
                    f"changes must be orthogonal, crosstalk {ORTHOGONAL_TOLERANCE} at most; "
                    f"{layer} has {value:.2g} between {i} and {j}; use method 'delta' to add "
                    "them all the same"
                )


def crosstalk(first: Tensor, second: Tensor) -> float:
    """How much two changes [out, in] of a layer answer to the same inputs, from 0 to 1.

    ``|dW_1 dW_2^T|_F / (|dW_1|_F |dW_2|_F)``; 0 exactly if the rows of one are orthogonal to those
    of the other, so that each does nothing to the inputs that the other was trained to change
    (the condition B_i^T B_j = 0 of Orthogonal Adaptation).
    """
    norms = first.norm() * second.norm()
    return float((first @ second.mT.to(first)).norm() / norms) if norms > 0 else 0.0


@dataclass(frozen=True)
class FusionReport:
    """What was fused.

    Attributes:
        layers: number of changed layers, by adapter, and of the fused change.
        norms: Frobenius norm of the change over all layers, likewise.
        crosstalk: (mean, largest) :func:`crosstalk` over the layers that two adapters share.
    """

    layers: dict[str, int]
    norms: dict[str, float]
    crosstalk: dict[tuple[str, str], tuple[float, float]]

    def __str__(self) -> str:
        width = max(map(len, self.norms))
        lines = [
            f"{name:{width}}  {self.layers[name]:4d} layers, norm of the change {norm:.4g}"
            for name, norm in self.norms.items()
        ]
        lines += [
            f"crosstalk of {first} and {second}: mean {mean:.3g}, largest {largest:.3g}"
            for (first, second), (mean, largest) in self.crosstalk.items()
        ]
        return "\n".join(lines)


def report_fusion(changes: Mapping[str, Changes], fused: Changes) -> FusionReport:
    """Norms and crosstalk of adapters' changes and of what came of them."""
    everything = {**changes, "fused": fused}
    talk = {}
    for first, second in combinations(changes, 2):
        shared = changes[first].keys() & changes[second].keys()
        values = [crosstalk(changes[first][n], changes[second][n]) for n in sorted(shared)]
        if values:
            talk[first, second] = (sum(values) / len(values), max(values))
    norms = {
        name: sqrt(sum(float(change.double().square().sum()) for change in found.values()))
        for name, found in everything.items()
    }
    return FusionReport({name: len(found) for name, found in everything.items()}, norms, talk)


@contextmanager
def second_moments(
    layers: Mapping[str, nn.Module], *, dtype: torch.dtype = torch.float64
) -> Iterator[dict[str, Tensor]]:
    """Sum up ``X X^T`` of the inputs of layers while the model runs.

        with second_moments(layers) as moments:
            model(inputs)

    Args:
        layers: by name; linear layers and ungrouped ``nn.Conv2d``, or PEFT's layers around them.
        dtype: of the sums, float64 or float32.

    Yields:
        A dict from names to [in, in], [in * kh * kw] squared for convolutions, zero at first.

    Raises:
        ValueError: a layer of another kind, or another dtype.
    """
    check_choice("dtype", dtype, (torch.float64, torch.float32))
    moments: dict[str, Tensor] = {}
    handles = []

    def record(name: str, layer: nn.Module) -> None:
        base = getattr(layer, "get_base_layer", lambda: layer)()
        check_dense(name, base)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            with torch.no_grad(), without_autocast(args[0].device):
                rows = input_rows(base, args[0].detach().to(dtype))
                found = rows.mT @ rows
                moments[name] = moments[name].to(found.device) + found

        handles.append(layer.register_forward_pre_hook(hook))
        size = _input_size(base)
        moments[name] = torch.zeros(size, size, dtype=dtype)

    try:
        for name, layer in layers.items():
            record(name, layer)
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def check_dense(name: str, layer: Any) -> None:
    """Raise unless a layer multiplies rows of inputs with its weight."""
    is_linear = hasattr(layer, "weight") and layer.weight.dim() == 2
    if isinstance(layer, nn.Conv2d):
        is_linear = layer.groups == 1
    if not is_linear or isinstance(layer, nn.Embedding):
        raise ValueError(
            f"layers must be linear or ungrouped Conv2d; {name} is a {type(layer).__name__}"
        )


def _input_size(layer: Any) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.weight[0].numel()
    # The weight of transformers' Conv1D is [in, out].
    return layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0]


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a layer as the rows [tokens, in] that its weight [out, in] is multiplied with.

    For ``nn.Conv2d`` the patches [batch * positions, in * kh * kw].
    """
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches = unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return patches.mT.flatten(0, 1)


def orthonormal_rows(size: int, rows: Sequence[int], *, seed: int = 0) -> Tensor:
    """Some rows [r, size] of one orthogonal matrix that everybody has, in float64.

    The cosine basis (DCT-II) with random signs of the columns. Orthogonal Adaptation takes a random
    orthogonal matrix; what it needs is that different rows are orthogonal and none is aligned with
    single inputs. A row costs O(size), where a random matrix would cost O(size^3) to make.

    Args:
        size: of the matrix.
        rows: different indices, 0 to size - 1.
        seed: of the signs; adapters that are to be orthogonal need the same.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an int of at least 0; got {seed!r}")
    chosen = torch.tensor(select_columns(list(rows), None, size), dtype=torch.float64)
    places = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(torch.pi / size * chosen[:, None] * (places + 0.5)) * sqrt(2 / size)
    waves[chosen == 0] /= sqrt(2)
    return waves * random_signs(size, seed, waves.device)
