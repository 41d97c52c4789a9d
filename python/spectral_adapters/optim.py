"""Momentum optimizers on the orthogonal group, for square factors that are trained directly.

The method of Kong, Wang and Tao (ICLR 2023) for square factors (DESIGN section 3, "Stiefel"). With
``A = X^T G`` and the skew gradient ``g = (1 - b)/2 (A - A^T)``:

* SGD: ``Y <- mu Y - g``, ``xi = lr Y``;
* Adam: ``Y <- beta1 Y - (1 - beta1) g``, ``p <- beta2 p + (1 - beta2) g*g``,
  ``xi = lr/(1 - beta1^t) Y / (sqrt(p/(1 - beta2^t)) + eps)``;

then ``X <- polar(X (I + xi))``. The momentum lives in the body frame, so it needs no transport, and
``I + xi`` has determinant above zero, so a rotation stays a rotation. All factors of one size in a
parameter group step together; nothing in a step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

__all__ = ["StiefelAdam", "StiefelSGD", "stiefel_param_groups"]

#: A starting point further from orthogonal than this, max|X^T X - I|, is refused.
START_TOLERANCE = 1e-3

#: Longer steps are shortened to this norm. It turns a plane by arctan(1000), 89.94 degrees, and no
#: step however long turns one by 90.
LONGEST_STEP = 1e3

#: Keeps 0/0 out of the shortening when the learning rate is zero.
SHORTEST_BOUND = 1e-6


class _StiefelOptimizer(Optimizer):
    """Everything but the rule that turns a skew gradient into a step ``xi``."""

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
            for parameter in trained:
                if parameter.grad.layout != torch.strided or parameter.grad.is_complex():
                    raise ValueError(
                        "gradients must be dense and real; got layout "
                        f"{parameter.grad.layout}, dtype {parameter.grad.dtype}"
                    )
            if not group["manifold"]:
                if trained:
                    self._step_plain(group, trained)
                continue
            for factors in _by_size(trained):
                with _full_precision(factors[0].device.type):
                    self._step_factors(group, factors)
        return loss

    def _step_factors(self, group: dict[str, Any], factors: list[Tensor]) -> None:
        """Step equal-sized factors, [n, n] or [B, n, n], as one batch [N, n, n]."""
        x = _stack(factors)
        pull = x.mT @ _stack([_gradient(factor) for factor in factors])
        skew = (pull - pull.mT).mul_(0.5 * (1.0 - group["metric"]))
        xi, bound = self._direction(group, factors, skew)
        _unstack(_retract(x, xi, min(max(bound, SHORTEST_BOUND), LONGEST_STEP)), factors)

    def _check_options(self, group: dict[str, Any]) -> None:
        _check_number("lr", group["lr"], at_least=0.0)
        _check_number("weight_decay", group["weight_decay"], at_least=0.0)
        _check_number("metric", group["metric"], below=1.0)

    def _direction(
        self, group: dict[str, Any], factors: list[Tensor], skew: Tensor
    ) -> tuple[Tensor, float]:
        """``xi`` [N, n, n] from the skew gradient, and a bound on its norm known beforehand."""
        raise NotImplementedError

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
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

    State per parameter: ``momentum_buffer`` in the parameter's shape and dtype.

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
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "metric": metric,
            "weight_decay": weight_decay,
            "manifold": True,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        _check_number("momentum", group["momentum"], at_least=0.0)

    def _direction(
        self, group: dict[str, Any], factors: list[Tensor], skew: Tensor
    ) -> tuple[Tensor, float]:
        if group["momentum"] == 0:
            velocity = -skew
        else:
            buffers = [_zeros_once(self.state[p], "momentum_buffer", p) for p in factors]
            velocity = _stack(buffers).mul_(group["momentum"]).sub_(skew)
            _unstack(velocity, buffers)
        # Gradients have no bound, so neither has the step.
        return velocity * group["lr"], math.inf

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        sgd(
            params,
            [_gradient(p) for p in params],
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if group["momentum"] != 0:
            for parameter, buffer in zip(params, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer


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

    State per parameter: ``step`` (fp32 scalar), ``exp_avg`` and ``exp_avg_sq`` in the parameter's
    shape and dtype. In a manifold group ``exp_avg`` is Y, the velocity, which points downhill.

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
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "metric": metric,
            "weight_decay": weight_decay,
            "manifold": True,
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

    def _direction(
        self, group: dict[str, Any], factors: list[Tensor], skew: Tensor
    ) -> tuple[Tensor, float]:
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in factors]
        averages = [_zeros_once(self.state[p], "exp_avg", p) for p in factors]
        squares = [_zeros_once(self.state[p], "exp_avg_sq", p) for p in factors]
        steps = [_steps_taken(state, p) for state, p in zip(states, factors, strict=True)]
        torch._foreach_add_(steps, 1.0)

        velocity = _stack(averages).mul_(beta1).sub_(skew, alpha=1.0 - beta1)
        square = _stack(squares).mul_(beta2).addcmul_(skew, skew, value=1.0 - beta2)
        _unstack(velocity, averages)
        _unstack(square, squares)

        # One count per matrix: factors that were skipped for want of a gradient lag behind.
        per_matrix = [step.expand(_matrices(p)) for step, p in zip(steps, factors, strict=True)]
        count = torch.cat(per_matrix).to(skew.dtype)[:, None, None]
        ratio = (velocity / _unbias(beta1, count)) / (
            (square / _unbias(beta2, count)).sqrt_().add_(group["eps"])
        )
        n = skew.shape[-1]
        return ratio.mul_(group["lr"]), group["lr"] * _largest_ratio(beta1, beta2) * (n - 1)

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in params:
            # On the CPU, as in torch's own AdamW: the count enters as a Python number.
            self.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32))
        adamw(
            params,
            [_gradient(p) for p in params],
            [_zeros_once(self.state[p], "exp_avg", p) for p in params],
            [_zeros_once(self.state[p], "exp_avg_sq", p) for p in params],
            [],
            [self.state[p]["step"] for p in params],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
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
    on_manifold = {
        id(factor)
        for module in model.modules()
        if getattr(module, "parametrization", None) == "stiefel"
        and isinstance(module.rotation, nn.Module)
        for factor in module.rotation.parameters()
    }
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


def _group(params: list[nn.Parameter], manifold: bool, lr: float | None) -> dict[str, Any]:
    group: dict[str, Any] = {"params": params, "manifold": manifold}
    return group if lr is None else {**group, "lr": lr}


def _retract(x: Tensor, xi: Tensor, longest: float) -> Tensor:
    """``polar(X (I + xi))`` for orthogonal X and skew xi, all [N, n, n].

    A xi longer than ``longest`` is shortened to it, and ``longest`` alone fixes the number of
    products. Where xi has a singular value sigma, ``I + xi`` has ``sqrt(1 + sigma^2)``: they lie in
    [1, sqrt(1 + longest^2)], and the Newton-Schulz iteration is scaled for that interval. Its last
    scale is all but 1, so that it also takes out what rounding has added to X.
    """
    reach = xi.abs().sum(-1).amax(-1)  # the largest row sum, never below the spectral norm
    xi = xi * (longest / reach.clamp_min(longest))[:, None, None]
    y = torch.baddbmm(x, x, xi)
    for scale in _newton_schulz_scales(math.hypot(1.0, longest), torch.finfo(x.dtype).eps):
        y = torch.baddbmm(y, y, y.mT @ y, beta=1.5 * scale, alpha=-0.5 * scale**3)
    return y


def _newton_schulz_scales(largest: float, tolerance: float) -> list[float]:
    """Scales of ``y <- scale y (3 - (scale y)^2) / 2`` that bring all of [1, largest] to 1.

    The best scale makes both ends of the interval [low, high] meet:
    ``scale^2 = 3 / (low^2 + low high + high^2)``; the interval becomes [their image, 1].
    """
    low, high = 1.0, largest
    scales: list[float] = []
    while not scales or 1.0 - low > tolerance:
        scale = math.sqrt(3.0 / (low * low + low * high + high * high))
        scales.append(scale)
        low, high = 0.5 * scale * low * (3.0 - (scale * low) ** 2), 1.0
    return scales


def _largest_ratio(beta1: float, beta2: float) -> float:
    """Largest |m|/sqrt(v) of Adam's moments over all gradients, by Cauchy and Schwarz.

    1e30 where no bound holds: infinity times zero, of a 1 x 1 factor or a learning rate, is no
    bound.
    """
    spread = (1.0 - beta2) * (1.0 - beta1 * beta1 / beta2) if beta2 > 0 else 0.0
    return (1.0 - beta1) / math.sqrt(spread) if spread > 0 else 1e30


def _unbias(beta: float, count: Tensor) -> Tensor:
    """``1 - beta^count`` without cancellation."""
    return -torch.expm1(count * (math.log(beta) if beta > 0 else -math.inf))


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Products in true fp32: with TF32, bf16 or autocast each step would leave the manifold."""
    backends: list[Any] = [
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    ]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _by_size(factors: list[Tensor]) -> list[list[Tensor]]:
    """Factors that can be stacked, together: the same n, dtype and device."""
    batches: dict[tuple[Any, ...], list[Tensor]] = {}
    for factor in factors:
        key = (factor.shape[-1], factor.dtype, factor.device)
        batches.setdefault(key, []).append(factor)
    return list(batches.values())


def _matrices(factor: Tensor) -> int:
    return factor.shape[0] if factor.dim() == 3 else 1


def _stack(tensors: list[Tensor]) -> Tensor:
    """[n, n] and [B, n, n] tensors to a new [N, n, n]."""
    n = tensors[0].shape[-1]
    return torch.cat([tensor.reshape(-1, n, n) for tensor in tensors])


def _unstack(stacked: Tensor, tensors: list[Tensor]) -> None:
    """Copy [N, n, n] back into the tensors it was stacked from."""
    parts = stacked.split([_matrices(tensor) for tensor in tensors])
    torch._foreach_copy_(
        tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    )


def _zeros_once(state: dict[str, Any], name: str, parameter: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return state[name]


def _steps_taken(state: dict[str, Any], factor: Tensor) -> Tensor:
    """The factor's step count, kept beside it: to read one the host would wait for the device.

    ``load_state_dict`` leaves a state named "step" on the device that it was saved from.
    """
    step = state.get("step")
    if step is None:
        step = torch.zeros((), dtype=torch.float32, device=factor.device)
    state["step"] = step.to(factor.device)
    return state["step"]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _leave_out_frozen(group: dict[str, Any]) -> None:
    kept = [i for i, parameter in enumerate(group["params"]) if parameter.requires_grad]
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [group[key][i] for i in kept]


def _check_factor(name: str, factor: Tensor) -> None:
    shape = tuple(factor.shape)
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
    matrices = factor.detach()
    with _full_precision(factor.device.type):
        gram = matrices.mT @ matrices
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    error = float(gram.abs().amax())
    if not error <= START_TOLERANCE:
        raise ValueError(
            f"{name} must start orthogonal, max|X^T X - I| <= {START_TOLERANCE}; got {error:.3g} "
            f"for shape {shape}: orthogonalise it, or put it into a group with manifold=False"
        )


def _check_number(
    name: str, value: Any, *, at_least: float = -math.inf, below: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not at_least <= value < below:
        ends = [f"at least {at_least:g}"] if at_least > -math.inf else []
        ends += [f"below {below:g}"] if below < math.inf else ["finite"]
        raise ValueError(f"{name} must be {' and '.join(ends)}; got {value!r}")
