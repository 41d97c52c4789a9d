"""Momentum optimizers on the orthogonal group, for square factors that are trained directly.

The method of Kong, Wang and Tao (ICLR 2023) for square factors (DESIGN section 3, "Stiefel"). With
``A = X^T G`` and the skew gradient ``g = (1 - b)/2 (A - A^T)``:

* SGD: ``Y <- mu Y - g``, ``xi = lr Y``;
* Adam: ``Y <- beta1 Y - (1 - beta1) g``, ``p <- beta2 p + (1 - beta2) g*g``,
  ``xi = lr/(1 - beta1^t) Y / (sqrt(p/(1 - beta2^t)) + eps)``;

then ``X <- polar(X (I + xi))``. The momentum lives in the body frame, so it needs no transport, and
``I + xi`` has determinant above zero, so a rotation stays a rotation. All factors of a parameter
group step in one call of ``torch.ops.spectral.stiefel_sgd_`` or ``stiefel_adam_``; nothing in a
step waits for the device.

The retraction of every step takes out what rounding added before it, so errors do not add up;
:func:`reproject` in float64, on a schedule, does not depend on that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from spectral_adapters.rotation_bank import RotatedLayer
from spectral_kernels.ops.stiefel import full_precision

__all__ = [
    "ORTHOGONALITY_LIMIT",
    "StiefelAdam",
    "StiefelSGD",
    "orthogonality_error",
    "reproject",
    "stiefel_param_groups",
]

#: A starting point further from orthogonal than this, max|X^T X - I|, is refused.
START_TOLERANCE = 1e-3

#: What fp32 factors up to 128 x 128 never exceed in training, max|X^T X - I|.
ORTHOGONALITY_LIMIT = 5e-6

#: Newton-Schulz iterations of a re-projection: 1e-2 -> 8e-5 -> 4e-9 -> 1e-17.
PROJECTION_ITERATIONS = 3


class _StiefelOptimizer(Optimizer):
    """Everything but the rules of the two optimizers."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the factors of a manifold group are looked at once, here, for orthogonality.

        Parameters of a manifold group that do not require a gradient now, such as the frozen basis
        of a layer, are left out and are never stepped.

        Raises:
            TypeError, ValueError: an option out of range, or a trained parameter of a manifold
                group that is not square, not fp32 or fp64, or not orthogonal to 1e-3.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if not isinstance(group["manifold"], bool):
                raise TypeError(f"manifold must be True or False; got {group['manifold']!r}")
            self._check_options(group)
            if group["manifold"]:
                _leave_out_frozen(group)
                count = len(group["params"])
                names = group.get("param_names") or [f"params[{i}]" for i in range(count)]
                for name, factor in zip(names, group["params"], strict=True):
                    _check_factor(name, factor)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group; a ``closure`` is evaluated first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.requires_grad and p.grad is not None]
            for batch in _by_device(trained):
                grads = [_gradient(parameter) for parameter in batch]
                for grad in grads:
                    if grad.layout != torch.strided or grad.is_complex():
                        raise ValueError(
                            "gradients must be dense and real; got layout "
                            f"{grad.layout}, dtype {grad.dtype}"
                        )
                if group["manifold"]:
                    self._step_factors(group, batch, grads)
                else:
                    self._step_plain(group, batch, grads)
            if group["manifold"]:
                group["steps"] += 1
                every = group["reproject_every"]
                if every and group["steps"] % every == 0:
                    reproject(trained)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """``load_state_dict`` leaves a state named "step" on the device that it was saved from."""
        super().__setstate__(state)
        for group in self.param_groups:
            # States from before there was a schedule.
            group.setdefault("reproject_every", self.defaults["reproject_every"])
            group.setdefault("steps", 0)
            for parameter in group["params"]:
                own = self.state.get(parameter, {})
                if "step" in own:
                    device = _counter_device(parameter, group["manifold"])
                    own["step"] = own["step"].to(device)

    def _check_options(self, group: dict[str, Any]) -> None:
        _check_number("lr", group["lr"], at_least=0.0)
        _check_number("weight_decay", group["weight_decay"], at_least=0.0)
        _check_number("metric", group["metric"], below=1.0)
        every = group["reproject_every"]
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"reproject_every must be an int; got {every!r}")
        if every < 0:
            raise ValueError(f"reproject_every must be at least 0, which is never; got {every}")

    def _step_factors(
        self, group: dict[str, Any], factors: list[Tensor], grads: list[Tensor]
    ) -> None:
        """Step factors [n, n] or [B, n, n] of one device on their manifold."""
        raise NotImplementedError

    def _step_plain(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """The Euclidean counterpart, for ``manifold=False``."""
        raise NotImplementedError


class StiefelSGD(_StiefelOptimizer):
    """SGD with momentum on the orthogonal group; plain SGD for groups with ``manifold=False``.

    Args:
        params: parameters or groups; in a manifold group (the default) every trained parameter is
            an orthogonal factor [n, n] or a batch of them [B, n, n], fp32 or fp64.
        lr: learning rate, at least 0.
        momentum: mu, at least 0.
        metric: b of the canonical-type metrics, below 1: -1 is the canonical metric, 0 the
            Euclidean one. For square factors it scales the gradient by (1 - b)/2.
        weight_decay: of groups with ``manifold=False``; a factor has nothing to decay to.
        reproject_every: steps between re-projections of the factors in float64, each at the price
            of some ten steps; 0 for none.

    State per parameter: ``momentum_buffer`` in the parameter's shape and dtype. Per group:
    ``steps``.

    Raises:
        TypeError, ValueError: see :meth:`add_param_group`.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        *,
        metric: float = -1.0,
        weight_decay: float = 0.0,
        reproject_every: int = 1000,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "metric": metric,
            "weight_decay": weight_decay,
            "manifold": True,
            "reproject_every": reproject_every,
            "steps": 0,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        _check_number("momentum", group["momentum"], at_least=0.0)

    def _step_factors(
        self, group: dict[str, Any], factors: list[Tensor], grads: list[Tensor]
    ) -> None:
        velocities = self._velocities(factors) if group["momentum"] != 0 else []
        torch.ops.spectral.stiefel_sgd_(
            factors, grads, velocities, group["lr"], group["momentum"], group["metric"]
        )

    def _step_plain(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        momentum = group["momentum"]
        buffers: list[Tensor | None] = [None] * len(params)
        if momentum != 0:
            buffers[:] = self._velocities(params)
        sgd(
            params,
            grads,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            fused=True if all(map(_can_fuse, params)) else None,
        )

    def _velocities(self, params: list[Tensor]) -> list[Tensor]:
        """Momentum starts at zero, where torch's SGD starts it at the first gradient: the same."""
        name = "momentum_buffer"
        return [_zeros_once(self.state[parameter], name, parameter) for parameter in params]


class StiefelAdam(_StiefelOptimizer):
    """Adam on the orthogonal group; AdamW for groups with ``manifold=False``.

    Args:
        params: parameters or groups; in a manifold group (the default) every trained parameter is
            an orthogonal factor [n, n] or a batch of them [B, n, n], fp32 or fp64.
        lr: learning rate, at least 0.
        betas: decay of the first and second moment, in [0, 1).
        eps: added to the root of the second moment; above 0, since the diagonal of a skew gradient,
            and so of its second moment, is always zero.
        metric: b of the canonical-type metrics, below 1: -1 is the canonical metric, 0 the
            Euclidean one. For square factors it scales the gradient by (1 - b)/2, which Adam all
            but undoes.
        weight_decay: decoupled, of groups with ``manifold=False`` (AdamW's default); a factor has
            nothing to decay to.
        reproject_every: steps between re-projections of the factors in float64, each at the price
            of some ten steps; 0 for none.

    State per parameter: ``step`` (fp32 scalar), ``exp_avg`` and ``exp_avg_sq`` in the parameter's
    shape and dtype. In a manifold group ``exp_avg`` is Y, the velocity, which points downhill.
    Per group: ``steps``.

    Raises:
        TypeError, ValueError: see :meth:`add_param_group`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        *,
        metric: float = -1.0,
        weight_decay: float = 1e-2,
        reproject_every: int = 1000,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "metric": metric,
            "weight_decay": weight_decay,
            "manifold": True,
            "reproject_every": reproject_every,
            "steps": 0,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise TypeError(f"betas must be a pair of numbers; got {group['betas']!r}")
        for i, beta in enumerate(group["betas"]):
            _check_number(f"betas[{i}]", beta, at_least=0.0, below=1.0)
        _check_number("eps", group["eps"], at_least=0.0)
        if group["manifold"] and group["eps"] == 0:
            raise ValueError(f"eps must be above 0 in a manifold group; got {group['eps']!r}")

    def _step_factors(
        self, group: dict[str, Any], factors: list[Tensor], grads: list[Tensor]
    ) -> None:
        torch.ops.spectral.stiefel_adam_(
            factors,
            grads,
            *self._moments(factors, True),
            group["lr"],
            *group["betas"],
            group["eps"],
            group["metric"],
        )

    def _step_plain(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        averages, squares, steps = self._moments(params, False)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            averages,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            fused=True if all(map(_can_fuse, params)) else None,
        )

    def _moments(
        self, params: list[Tensor], manifold: bool
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """``exp_avg``, ``exp_avg_sq`` and ``step`` of every parameter; zero where it has none."""
        states = [self.state[parameter] for parameter in params]
        for parameter, state in zip(params, states, strict=True):
            if "exp_avg_sq" not in state:
                # Beside the parameter, where a kernel reads it: for the host to read it, it would
                # have to wait for the device.
                device = _counter_device(parameter, manifold)
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=device))
                _zeros_once(state, "exp_avg", parameter)
                _zeros_once(state, "exp_avg_sq", parameter)
        return (
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
        )


def stiefel_param_groups(
    model: nn.Module, *, rotation_lr: float | None = None, lr: float | None = None
) -> list[dict[str, Any]]:
    """A model's trained parameters as groups for :class:`StiefelSGD` or :class:`StiefelAdam`.

    Args:
        model: holds SODA layers with ``parametrization="stiefel"``.
        rotation_lr: learning rate of their rotation factors; None takes the optimizer's.
        lr: learning rate of everything else that requires a gradient (spectra, other layers); None
            takes the optimizer's.

    Returns:
        A manifold group with the rotation factors, and a ``manifold=False`` group with everything
        else, left out if there is nothing else.

    Raises:
        ValueError: the model trains no Stiefel-parametrised rotation.
    """
    on_manifold = {id(factor) for factor in _orthogonal_factors(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    factors = [p for p in trained if id(p) in on_manifold]
    others = [p for p in trained if id(p) not in on_manifold]
    if not factors:
        raise ValueError(
            "model must train the rotation of a layer with parametrization='stiefel'; "
            f"got {type(model).__name__} with none among its {len(trained)} trained parameters"
        )
    groups = [_group(factors, True, rotation_lr)]
    return [*groups, _group(others, False, lr)] if others else groups


@torch.no_grad()
def orthogonality_error(factors: nn.Module | Tensor | Iterable[Tensor]) -> float:
    """How far orthogonal factors are from orthogonal: the largest |X^T X - I|, taken in float64.

    Args:
        factors: factors [n, n] or batches of them [B, n, n]; or a model, for the rotations of its
            layers (of active adapters, in PEFT) with ``parametrization="stiefel"``.

    Returns:
        The largest over all factors; NaN if one of them holds NaN; 0 for empty ones.

    Raises:
        ValueError: a tensor that is not square, or no factor at all.
    """
    if isinstance(factors, nn.Module):
        factors = _orthogonal_factors(factors)
    matrices = [factors] if isinstance(factors, Tensor) else list(factors)
    if not matrices:
        raise ValueError(
            "factors must hold at least one orthogonal factor; got none (a model needs a layer "
            "with parametrization='stiefel')"
        )
    errors = [_distance(f"factors[{i}]", matrix.double()) for i, matrix in enumerate(matrices)]
    return float(torch.stack([error.cpu() for error in errors]).amax())


@torch.no_grad()
def reproject(factors: Tensor | Iterable[Tensor]) -> None:
    """Move factors [n, n] or [B, n, n] to the nearest orthogonal matrices, in place.

    The polar factor by Newton-Schulz iterations in float64, for factors that are orthogonal to 1e-2
    or better, as those of the optimizers always are; deterministic, and nothing waits for the
    device. Rounded to fp32, max|X^T X - I| is then about 1e-7.

    Raises:
        ValueError: a factor that is not square.
    """
    matrices = [factors] if isinstance(factors, Tensor) else list(factors)
    for i, factor in enumerate(matrices):
        _check_square(f"factors[{i}]", factor)
    for factor in matrices:
        with full_precision(factor.device.type):
            exact = factor.double()
            for _ in range(PROJECTION_ITERATIONS):
                exact = 1.5 * exact - 0.5 * exact @ (exact.mT @ exact)
            factor.copy_(exact)


def _orthogonal_factors(model: nn.Module) -> list[nn.Parameter]:
    """The rotation factors of a model's layers that are orthogonal matrices themselves."""
    return [
        factor
        for layer in model.modules()
        if isinstance(layer, RotatedLayer)
        for slot in layer.rotation_slots()
        if slot.sizes is None
        for factor in slot.rotation
    ]


def _group(params: list[nn.Parameter], manifold: bool, lr: float | None) -> dict[str, Any]:
    group: dict[str, Any] = {"params": params, "manifold": manifold}
    return group if lr is None else {**group, "lr": lr}


def _by_device(params: list[Tensor]) -> list[list[Tensor]]:
    if len({parameter.device for parameter in params}) == 1:
        return [params]
    batches: dict[torch.device, list[Tensor]] = {}
    for parameter in params:
        batches.setdefault(parameter.device, []).append(parameter)
    return list(batches.values())


def _zeros_once(state: dict[str, Any], name: str, parameter: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return state[name]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _can_fuse(parameter: Tensor) -> bool:
    """Whether torch's fused SGD and AdamW take this parameter."""
    return (
        type(parameter) in (Tensor, nn.Parameter)
        and parameter.is_floating_point()
        and parameter.device.type in ("cpu", "cuda")
    )


def _counter_device(parameter: Tensor, manifold: bool) -> torch.device:
    """Where a parameter's step count is read: by the kernel, or in torch's AdamW by the host."""
    return parameter.device if manifold or _can_fuse(parameter) else torch.device("cpu")


def _leave_out_frozen(group: dict[str, Any]) -> None:
    kept = [i for i, parameter in enumerate(group["params"]) if parameter.requires_grad]
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [group[key][i] for i in kept]


def _check_factor(name: str, factor: Tensor) -> None:
    shape = tuple(factor.shape)
    if hasattr(factor, "full_tensor"):
        raise ValueError(
            f"{name} must be whole to step on its manifold; got a sharded tensor of shape {shape}: "
            "keep it out of sharding (ignored_params of fully_shard)"
        )
    if factor.dim() not in (2, 3) or shape[-1] != shape[-2]:
        raise ValueError(
            f"{name} must be square, [n, n] or [B, n, n], to step on its manifold; "
            f"got shape {shape}: put it into a parameter group with manifold=False"
        )
    if factor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64 to stay orthogonal; got {factor.dtype}"
        )
    if factor.numel() == 0:
        return
    error = float(_distance(name, factor.detach()))
    if not error <= START_TOLERANCE:
        raise ValueError(
            f"{name} must start orthogonal, max|X^T X - I| <= {START_TOLERANCE}; got {error:.3g} "
            f"for shape {shape}: orthogonalise it, or put it into a group with manifold=False"
        )


def _check_square(name: str, factor: Tensor) -> None:
    if factor.dim() not in (2, 3) or factor.shape[-1] != factor.shape[-2]:
        raise ValueError(
            f"{name} must be square, [n, n] or [B, n, n]; got shape {tuple(factor.shape)}"
        )


def _distance(name: str, factor: Tensor) -> Tensor:
    """max|X^T X - I| of [n, n] or [B, n, n] in its own dtype, a scalar on its device."""
    _check_square(name, factor)
    if factor.numel() == 0:
        return factor.new_zeros(())
    with full_precision(factor.device.type):
        gram = factor.mT @ factor
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return gram.abs().amax()


def _check_number(
    name: str, value: Any, *, at_least: float = -math.inf, below: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not at_least <= value < below:
        ends = [f"at least {at_least:g}"] if at_least > -math.inf else []
        ends += [f"below {below:g}"] if below < math.inf else ["finite"]
        raise ValueError(f"{name} must be {' and '.join(ends)}; got {value!r}")
