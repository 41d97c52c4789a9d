"""StiefelSGD and StiefelAdam against a per-matrix float64 reference written from the formulas."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from support import random_rotation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_adapters import SODALinear, StiefelAdam, StiefelSGD
from spectral_adapters.optim import orthogonality_error as measured_error
from spectral_adapters.optim import reproject, stiefel_param_groups
from spectral_kernels.ops.stiefel import stiefel_adam_reference, stiefel_sgd_reference

OPTIMIZERS = pytest.mark.parametrize("optimizer", [StiefelSGD, StiefelAdam])


def rotations(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """A parameter of random rotations, [n, n] or [B, n, n]."""
    *batch, n, _ = shape
    matrices = torch.empty(batch[0] if batch else 1, n, n, dtype=dtype)
    for matrix in matrices:
        matrix.copy_(random_rotation(n))
    return nn.Parameter(matrices if batch else matrices[0])


def orthogonality_error(x: Tensor) -> float:
    """max|X^T X - I| in float64; NaN counts as infinite."""
    matrices = x.detach().double()
    error = (matrices.mT @ matrices - torch.eye(x.shape[-1], dtype=torch.float64)).abs().amax()
    return float(error.nan_to_num(nan=float("inf")))


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def reference_sgd(
    x: Tensor, grads: list[Tensor], lr: float, momentum: float, metric: float
) -> Tensor:
    velocity = torch.zeros_like(x)
    for grad in grads:
        a = x.mT @ grad
        velocity = momentum * velocity - 0.5 * (1 - metric) * (a - a.mT)
        x = polar(x @ (torch.eye(len(x), dtype=x.dtype) + lr * velocity))
    return x


def reference_adam(
    x: Tensor, grads: list[Tensor], lr: float, betas: tuple[float, float], eps: float
) -> Tensor:
    velocity, square = torch.zeros_like(x), torch.zeros_like(x)
    for t, grad in enumerate(grads, start=1):
        a = x.mT @ grad
        g = a - a.mT
        velocity = betas[0] * velocity - (1 - betas[0]) * g
        square = betas[1] * square + (1 - betas[1]) * g * g
        root = (square / (1 - betas[1] ** t)).sqrt()
        xi = lr / (1 - betas[0] ** t) * velocity / (root + eps)
        x = polar(x @ (torch.eye(len(x), dtype=x.dtype) + xi))
    return x


def run_steps(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[list[Tensor]]):
    for step_grads in grads:
        for parameter, grad in zip(params, step_grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


def random_grads(params: list[Tensor], steps: int, scale: float = 1.0) -> list[list[Tensor]]:
    return [[torch.randn_like(p) * scale for p in params] for _ in range(steps)]


@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("metric", [-1.0, 0.0])
def test_sgd_equals_the_formula(n: int, lr: float, metric: float) -> None:
    x = rotations(n, n)
    start, grads = x.detach().clone(), random_grads([x], 6)
    run_steps(StiefelSGD([x], lr, 0.8, metric=metric), [x], grads)
    expected = reference_sgd(start, [g[0] for g in grads], lr, 0.8, metric)
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.9), (0.99, 0.9), (0.5, 0.25)])
def test_adam_equals_the_formula(n: int, lr: float, betas: tuple[float, float]) -> None:
    x = rotations(n, n)
    start, grads = x.detach().clone(), random_grads([x], 6)
    run_steps(StiefelAdam([x], lr, betas, 1e-8), [x], grads)
    expected = reference_adam(start, [g[0] for g in grads], lr, betas, 1e-8)
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-10)


def test_fp32_follows_fp64() -> None:
    exact = rotations(24, 24)
    single = nn.Parameter(exact.detach().float())
    grads = random_grads([exact], 20)
    run_steps(StiefelAdam([exact], 1e-2), [exact], grads)
    run_steps(StiefelAdam([single], 1e-2), [single], [[g[0].float()] for g in grads])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.detach().double(), exact.detach(), rtol=0, atol=1e-5)


@OPTIMIZERS
def test_a_batch_is_a_loop(optimizer: Callable[..., Any]) -> None:
    """Factors of mixed sizes and shapes in one group step as they would each alone."""
    params = [
        rotations(*shape) for shape in [(5, 5), (3, 4, 4), (5, 5), (4, 4), (1, 5, 5), (0, 4, 4)]
    ]
    alone = copy.deepcopy(params)
    grads = random_grads(params, 5)
    run_steps(optimizer(params, lr=0.05), params, grads)
    for i, parameter in enumerate(alone):
        if parameter.dim() == 2:
            run_steps(optimizer([parameter], lr=0.05), [parameter], [[g[i]] for g in grads])
            continue
        for j in range(len(parameter)):
            factor = nn.Parameter(parameter[j].detach().clone())
            run_steps(optimizer([factor], lr=0.05), [factor], [[g[i][j]] for g in grads])
            with torch.no_grad():
                parameter[j] = factor
    for together, one in zip(params, alone, strict=True):
        torch.testing.assert_close(together, one, rtol=0, atol=1e-13)


class Count(TorchDispatchMode):
    """Counts calls of some operators."""

    def __init__(self, *packets: Any) -> None:
        super().__init__()
        self.packets, self.calls = packets, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket in self.packets
        return func(*args, **(kwargs or {}))


@OPTIMIZERS
def test_a_group_is_one_call(optimizer: Callable[..., Any]) -> None:
    """Whatever sizes, shapes and dtypes it mixes."""
    ops = torch.ops.spectral
    shapes = [(6, 6), (3, 6, 6), (5, 5), (0, 4, 4)]
    params = [rotations(*s, dtype=t) for s in shapes for t in (torch.float32, torch.float64)]
    opt = optimizer(params, lr=1e-3)
    for p in params:
        p.grad = torch.randn_like(p)
    with Count(ops.stiefel_sgd_, ops.stiefel_adam_) as count:
        opt.step()
    assert count.calls == 1


@OPTIMIZERS
def test_equal_sizes_take_one_set_of_products(optimizer: Callable[..., Any]) -> None:
    """In the reference the number of products does not grow with the number of equal factors."""
    reference = {StiefelSGD: stiefel_sgd_reference, StiefelAdam: stiefel_adam_reference}[optimizer]
    states, options = {
        StiefelSGD: (1, (1e-3, 0.9, -1.0)),
        StiefelAdam: (2, (1e-3, 0.9, 0.99, 1e-8, -1.0)),
    }[optimizer]
    counts = []
    for number in (1, 7):
        factors = [rotations(6, 6).detach() for _ in range(number)]
        lists = [[torch.zeros_like(f) for f in factors] for _ in range(1 + states)]
        if states == 2:
            lists.append([torch.zeros(()) for _ in factors])
        with Count(torch.ops.aten.bmm, torch.ops.aten.baddbmm) as count:
            reference(factors, *lists, *options)
        counts.append(count.calls)
    assert counts[0] == counts[1] > 0


@OPTIMIZERS
def test_a_step_counts_versions_up(optimizer: Callable[..., Any]) -> None:
    """As in-place operators do: what was derived from a factor can tell that it is stale."""
    x = rotations(3, 3)
    opt = optimizer([x], lr=0.1)
    stale = (x * x).sum()
    before = x._version
    run_steps(opt, [x], random_grads([x], 1))
    assert x._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@OPTIMIZERS
@pytest.mark.parametrize("lr", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("scale", [1.0, 1e12])
def test_stays_on_the_manifold(optimizer: Callable[..., Any], lr: float, scale: float) -> None:
    sizes = [2, 9, 40]
    params = [rotations(n, n, dtype=torch.float32) for n in sizes]
    run_steps(optimizer(params, lr=lr), params, random_grads(params, 2000, scale))
    for p in params:
        assert orthogonality_error(p) <= 5e-6
        assert abs(torch.linalg.det(p.detach().double()).item() - 1.0) <= 1e-4


@OPTIMIZERS
@pytest.mark.parametrize("n", [20, 128])
def test_heavy_tailed_gradients(optimizer: Callable[..., Any], n: int) -> None:
    """Gradients over twenty orders of magnitude, zero ones among them."""
    x = rotations(n, n, dtype=torch.float32)
    opt = optimizer([x], lr=0.1)
    for step in range(60):
        exponent = torch.empty(n, n).uniform_(-10, 10)
        x.grad = torch.randn(n, n) * 10**exponent * (step % 7 > 0)
        opt.step()
        assert orthogonality_error(x) <= 5e-6
    assert torch.linalg.det(x.detach().double()) > 0


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4])
def test_small_steps_from_the_identity(lr: float) -> None:
    """One entry of 1 per column, and many whose squares an fp32 sum loses beside it: n 2^-24."""
    n = 128
    x = nn.Parameter(torch.eye(n))
    opt = StiefelAdam([x], lr=lr, reproject_every=0)
    gradient, worst = torch.randn(n, n), 0.0
    for _ in range(300):
        x.grad = gradient
        opt.step()
        worst = max(worst, measured_error(x))
    assert worst <= 2e-6


@OPTIMIZERS
def test_re_projection_is_scheduled(optimizer: Callable[..., Any]) -> None:
    """After every second step the factors are those of float64, rounded; plain groups stay."""
    params, _ = mixed_setup(optimizer)
    groups = [{"params": params[:2], "reproject_every": 2}, {"params": params[2:3]}]
    groups.append({"params": params[3:], "manifold": False})
    opt = optimizer(groups, lr=0.1, reproject_every=0)
    for step in range(1, 6):
        plain = [p.detach().clone() for p in params[3:]]
        with torch.no_grad():
            for p in params[:3]:
                p.add_(1e-4 * torch.randn_like(p))
        for p in params:
            p.grad = torch.zeros_like(p)
        for group in opt.param_groups:
            group["lr"] = 0.0
        before = [p.detach().clone() for p in params[:2]]
        opt.step()
        assert [group["steps"] for group in opt.param_groups] == [step, step, 0]
        if step % 2 == 0:
            expected = [polar(b.double()).float() for b in before]
            for p, exact in zip(params[:2], expected, strict=True):
                torch.testing.assert_close(p.detach(), exact, rtol=0, atol=3e-7)
        for p, q in zip(params[3:], plain, strict=True):
            assert torch.equal(p, q)


def test_reproject_is_the_nearest_orthogonal_matrix() -> None:
    for dtype, limit in ((torch.float32, 3e-7), (torch.float64, 1e-14)):
        x = rotations(3, 17, 17).detach()
        x = (x + 1e-3 * torch.randn_like(x)).to(dtype)
        exact = polar(x.double())
        again = x.clone()
        reproject([x, torch.empty(0, 0)])
        reproject([again])
        assert torch.equal(x, again)
        assert (x.double() - exact).abs().max() <= limit
        assert measured_error(x) <= limit
    alone = torch.eye(3) + 1e-3
    reproject(alone)
    assert measured_error(alone) <= 3e-7
    with pytest.raises(ValueError, match=r"factors\[1\] must be square.*got shape \(3, 4\)"):
        reproject([torch.eye(3), torch.zeros(3, 4)])


def test_orthogonality_error_of_models_and_tensors() -> None:
    layers = [
        SODALinear.from_linear(nn.Linear(6, 6), parametrization=kind)
        for kind in ("stiefel", "cayley")
    ]
    model = nn.Sequential(*layers)
    assert measured_error(model) == 0.0
    with torch.no_grad():
        layers[0].rotation[1][0, 0] = 1.5
    assert measured_error(model) == pytest.approx(1.25)
    assert measured_error([torch.eye(3), 2 * torch.eye(2)[None]]) == 3.0
    assert measured_error(torch.full((2, 2), math.nan)) != measured_error(torch.eye(2))
    with pytest.raises(ValueError, match="at least one orthogonal factor"):
        measured_error(layers[1])
    with pytest.raises(ValueError, match=r"factors\[1\] must be square.*shape \(2, 3\)"):
        measured_error([torch.eye(2), torch.ones(2, 3)])


def test_param_groups_and_error_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    from spectral_adapters.peft import SODAConfig

    config = SODAConfig(target_modules=["0"], parametrization="stiefel")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), config)
    rotation, rest = stiefel_param_groups(model)
    assert all(p.dim() == 2 for p in rotation["params"]) and len(rotation["params"]) == 2
    assert rest["params"][0].shape == (6,)
    assert measured_error(model) == 0.0


@OPTIMIZERS
def test_states_without_a_schedule_load(optimizer: Callable[..., Any]) -> None:
    params, opt = mixed_setup(optimizer)
    run_steps(opt, params, random_grads(params, 1))
    state = opt.state_dict()
    for group in state["param_groups"]:
        del group["steps"], group["reproject_every"]
    opt.load_state_dict(state)
    run_steps(opt, params, random_grads(params, 1))
    assert opt.param_groups[0]["steps"] == 1


@pytest.mark.slow
@OPTIMIZERS
@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_ten_thousand_steps(optimizer: Callable[..., Any], lr: float) -> None:
    params = [rotations(4, n, n, dtype=torch.float32) for n in (16, 20)]
    if optimizer is StiefelAdam:
        params.append(rotations(128, 128, dtype=torch.float32))
    opt = optimizer(params, lr=lr)
    for _ in range(10_000):
        run_steps(opt, params, random_grads(params, 1))
    assert max(orthogonality_error(p) for p in params) <= 5e-6


@OPTIMIZERS
@pytest.mark.parametrize("n", [2, 12])
def test_solves_procrustes(optimizer: Callable[..., Any], n: int) -> None:
    """min ||X A - B|| over rotations, B = X* A: from a start away from X* to X* itself."""
    target, a = random_rotation(n, scale=0.1), torch.randn(n, 2 * n, dtype=torch.float64)
    x = nn.Parameter(torch.eye(n, dtype=torch.float64))
    opt = optimizer([x], lr=0.05)
    decay = torch.optim.lr_scheduler.ExponentialLR(opt, 0.98)
    first = None
    for _ in range(400):
        opt.zero_grad()
        loss = ((x - target) @ a).square().sum() / (2 * n)
        loss.backward()
        first = loss.item() if first is None else first
        opt.step()
        decay.step()
    assert loss.item() <= 1e-8 * first
    assert (x - target).abs().max() <= 1e-3


@OPTIMIZERS
def test_descends_from_the_start(optimizer: Callable[..., Any]) -> None:
    x, target = rotations(6, 6), random_rotation(6)
    opt = optimizer([x], lr=1e-3)
    losses = []
    for _ in range(3):
        opt.zero_grad()
        losses.append((x - target).square().sum())
        losses[-1].backward()
        opt.step()
    assert losses[0] > losses[1] > losses[2]


def mixed_setup(optimizer: Callable[..., Any]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = [
        rotations(5, 5, dtype=torch.float32),
        rotations(2, 5, 5, dtype=torch.float32),
        rotations(3, 3),
        nn.Parameter(torch.randn(7)),
        nn.Parameter(torch.randn(4, 4)),
    ]
    groups = [
        {"params": params[:3], "lr": 3e-2},
        {"params": params[3:], "manifold": False, "weight_decay": 0.1},
    ]
    return params, optimizer(groups, lr=1e-2)


@OPTIMIZERS
@pytest.mark.parametrize("carrier", ["memory", "torch.save", "safetensors"])
def test_resume_to_the_bit(optimizer: Callable[..., Any], carrier: str) -> None:
    params, opt = mixed_setup(optimizer)
    first, second = random_grads(params, 7), random_grads(params, 7)
    run_steps(opt, params, first)

    saved_params, saved = [p.detach().clone() for p in params], opt.state_dict()
    if carrier == "torch.save":
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    elif carrier == "safetensors":
        flat = {f"{i}.{k}": v for i, s in saved["state"].items() for k, v in s.items()}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load(save(flat)).items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        saved = {"state": state, "param_groups": copy.deepcopy(saved["param_groups"])}
    else:
        saved = copy.deepcopy(saved)
    run_steps(opt, params, second)

    resumed, other = mixed_setup(optimizer)
    with torch.no_grad():
        for p, value in zip(resumed, saved_params, strict=True):
            p.copy_(value)
    other.load_state_dict(saved)
    run_steps(other, resumed, second)
    for p, q in zip(params, resumed, strict=True):
        assert torch.equal(p, q)
    for p, q in zip(params, resumed, strict=True):
        assert opt.state[p].keys() == other.state[q].keys()
        for name, value in opt.state[p].items():
            assert torch.equal(value, other.state[q][name]), name


@OPTIMIZERS
def test_deep_copies(optimizer: Callable[..., Any]) -> None:
    """A copy steps its own parameters, to the bit as the original steps its."""
    params, opt = mixed_setup(optimizer)
    run_steps(opt, params, random_grads(params, 2))
    copied = copy.deepcopy(opt)
    others = [p for group in copied.param_groups for p in group["params"]]
    grads = random_grads(params, 2)
    run_steps(opt, params, grads)
    run_steps(copied, others, grads)
    assert not {id(p) for p in params} & {id(p) for p in others}
    assert all(map(torch.equal, params, others))


@OPTIMIZERS
def test_state_is_per_parameter(optimizer: Callable[..., Any]) -> None:
    params, opt = mixed_setup(optimizer)
    run_steps(opt, params, random_grads(params, 1))
    names = {"momentum_buffer"} if optimizer is StiefelSGD else {"step", "exp_avg", "exp_avg_sq"}
    for p in params:
        assert opt.state[p].keys() == names
        for name, value in opt.state[p].items():
            assert value.shape == (torch.Size([]) if name == "step" else p.shape)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_plain_group_is_sgd(momentum: float) -> None:
    """To the bit as torch's fused SGD, and to rounding as its loop."""
    ours, fused, looped = (nn.Parameter(torch.ones(3, 5)) for _ in range(3))
    grads = random_grads([ours], 5)
    group = {"params": [ours], "manifold": False, "weight_decay": 0.05}
    run_steps(StiefelSGD([group], 0.1, momentum), [ours], grads)
    for theirs in (fused, looped):
        options = {"weight_decay": 0.05, "fused": theirs is fused}
        run_steps(torch.optim.SGD([theirs], 0.1, momentum, **options), [theirs], grads)
    assert torch.equal(ours, fused)
    torch.testing.assert_close(ours, looped)


def test_plain_group_is_adamw() -> None:
    """To the bit as torch's fused AdamW, and to rounding as its loop."""
    ours, fused, looped = (nn.Parameter(torch.ones(3, 5)) for _ in range(3))
    grads = random_grads([ours], 5)
    run_steps(StiefelAdam([{"params": [ours], "manifold": False}], 0.1), [ours], grads)
    for theirs in (fused, looped):
        options = {"betas": (0.9, 0.99), "fused": theirs is fused}
        run_steps(torch.optim.AdamW([theirs], 0.1, **options), [theirs], grads)
    assert torch.equal(ours, fused)
    torch.testing.assert_close(ours, looped)


def test_trains_a_soda_layer() -> None:
    """Rotation on the manifold and spectrum by AdamW in one optimizer; the frozen basis stays."""
    base, goal = nn.Linear(12, 8), nn.Linear(12, 8)
    layer = SODALinear.from_linear(base, parametrization="stiefel", factors=(2, 4))
    model = nn.Sequential(nn.Linear(12, 12), layer)
    groups = stiefel_param_groups(model, rotation_lr=3e-2, lr=1e-2)
    assert [len(g["params"]) for g in groups] == [2, 3]
    assert [(g["manifold"], g["lr"]) for g in groups] == [(True, 3e-2), (False, 1e-2)]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in layer.rotation}

    opt = StiefelAdam(groups)
    frozen = [p.detach().clone() for p in (layer.left, layer.singular_values, layer.right)]
    x = torch.randn(256, 12)
    losses = []
    for _ in range(200):
        opt.zero_grad()
        loss = (model(x) - goal(x).detach()).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert max(orthogonality_error(p) for p in layer.rotation) <= 5e-6
    assert all((p - torch.eye(len(p))).abs().max() > 1e-2 for p in layer.rotation)
    for before, p in zip(frozen, (layer.left, layer.singular_values, layer.right), strict=True):
        assert torch.equal(before, p)


def test_param_groups_of_a_model_without_rotations() -> None:
    with pytest.raises(ValueError, match=r"parametrization='stiefel'.*Linear"):
        stiefel_param_groups(nn.Linear(3, 3))
    layer = SODALinear.from_linear(nn.Linear(4, 4), parametrization="cayley")
    with pytest.raises(ValueError, match="stiefel"):
        stiefel_param_groups(layer)
    layer = SODALinear.from_linear(nn.Linear(4, 4), parametrization="stiefel")
    layer.delta.requires_grad_(False)
    (group,) = stiefel_param_groups(layer)
    assert group.keys() == {"params", "manifold"}


@OPTIMIZERS
def test_frozen_parameters_are_never_stepped(optimizer: Callable[..., Any]) -> None:
    trained, basis = rotations(4, 4), rotations(4, 4).requires_grad_(False)
    odd = nn.Parameter(torch.randn(3), requires_grad=False)
    opt = optimizer([("trained", trained), ("basis", basis), ("odd", odd)], lr=0.1)
    before = [p.detach().clone() for p in (trained, basis, odd)]
    for p in (trained, basis, odd):
        p.grad = torch.randn_like(p)
    basis.requires_grad_(True)
    opt.step()
    assert not torch.equal(trained, before[0])
    assert torch.equal(basis, before[1]) and torch.equal(odd, before[2])
    assert opt.param_groups[0]["param_names"] == ["trained"]


@OPTIMIZERS
def test_factors_without_a_gradient_wait(optimizer: Callable[..., Any]) -> None:
    """A factor that was skipped catches up with its own step count, not its neighbours'."""
    late, steady, alone = rotations(4, 4), rotations(4, 4), rotations(4, 4)
    with torch.no_grad():
        alone.copy_(late)
    opt, single = optimizer([late, steady], lr=0.1), optimizer([alone], lr=0.1)
    grads = random_grads([late], 3)
    for i, grad in enumerate(grads):
        steady.grad = torch.randn_like(steady)
        late.grad = None if i == 0 else grad[0]
        alone.grad = None if i == 0 else grad[0]
        opt.step()
        single.step()
    torch.testing.assert_close(late, alone, rtol=0, atol=1e-13)
    run_steps(opt, [], [[]])  # no gradients at all is no error


@OPTIMIZERS
def test_scheduler_closure_and_added_group(optimizer: Callable[..., Any]) -> None:
    x, y = rotations(4, 4), rotations(4, 4)
    opt = optimizer([x], lr=0.1)
    opt.add_param_group({"params": [y], "lr": 0.0})
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, [lambda _: 0.0, lambda _: 1.0])
    assert opt.param_groups[0]["lr"] == 0.0
    before = [x.detach().clone(), y.detach().clone()]

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (x.square() * torch.arange(16).reshape(4, 4)).sum() + y.sum()
        loss.backward()
        return loss

    loss = opt.step(closure)
    schedule.step()
    assert loss.requires_grad
    for p, value in zip((x, y), before, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-14)
    opt.param_groups[1]["lr"] = 0.1
    opt.step(closure)
    assert (y - before[1]).abs().max() > 1e-3
    assert orthogonality_error(y) <= 1e-13


@OPTIMIZERS
def test_non_contiguous_factors(optimizer: Callable[..., Any]) -> None:
    x = rotations(5, 5)
    transposed = nn.Parameter(x.detach().mT.contiguous().mT)
    assert not transposed.is_contiguous()
    grads = random_grads([x], 3)
    run_steps(optimizer([x], lr=0.1), [x], grads)
    run_steps(optimizer([transposed], lr=0.1), [transposed], grads)
    assert torch.equal(x, transposed)


@OPTIMIZERS
def test_size_one_stays(optimizer: Callable[..., Any]) -> None:
    x = nn.Parameter(torch.tensor([[[1.0]], [[-1.0]]]))
    run_steps(optimizer([x], lr=0.1), [x], random_grads([x], 5))
    torch.testing.assert_close(x.flatten().tolist(), [1.0, -1.0], rtol=0, atol=1e-6)


@OPTIMIZERS
def test_precision_settings_do_not_reach_the_step(optimizer: Callable[..., Any]) -> None:
    """Autocast and reduced precision outside; exact inside, and left as they were found."""
    x = rotations(32, 32, dtype=torch.float32)
    same = nn.Parameter(x.detach().clone())
    grads = random_grads([x], 20)
    run_steps(optimizer([same], lr=0.05), [same], grads)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            run_steps(optimizer([x], lr=0.05), [x], grads)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(x, same)


class NoHostReads(TorchDispatchMode):
    """Fails on every operator whose result the host must wait for."""

    WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"aten::{name} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


@OPTIMIZERS
def test_no_host_synchronisation(optimizer: Callable[..., Any]) -> None:
    params = [rotations(4, 4), rotations(3, 4, 4), rotations(7, 7, dtype=torch.float32)]
    opt = optimizer(params, lr=1e-2)
    for p in params:
        p.grad = torch.randn_like(p)
    with NoHostReads():
        opt.step()
        opt.step()
        with pytest.raises(AssertionError, match="makes the host wait"):
            params[0].sum().item()


@OPTIMIZERS
@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 4, 6), (2, 2, 3, 3)])
def test_refuses_what_is_not_square(optimizer: Callable[..., Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weird.*square.*manifold=False") as error:
        optimizer([("weird", nn.Parameter(torch.zeros(shape)))], lr=0.1)
    assert str(shape) in str(error.value)


@OPTIMIZERS
def test_refuses_what_is_not_orthogonal(optimizer: Callable[..., Any]) -> None:
    for matrix in (torch.eye(3) * 1.001, torch.zeros(3, 3), torch.full((3, 3), float("nan"))):
        with pytest.raises(ValueError, match=r"params\[1\] must start orthogonal"):
            optimizer([nn.Parameter(torch.eye(3)), nn.Parameter(matrix)], lr=0.1)
    optimizer([nn.Parameter(torch.eye(3) * 1.0004)], lr=0.1)
    with pytest.raises(ValueError, match=r"float32 or float64.*bfloat16"):
        optimizer([nn.Parameter(torch.eye(3, dtype=torch.bfloat16))], lr=0.1)


@OPTIMIZERS
def test_a_refused_group_leaves_no_trace(optimizer: Callable[..., Any]) -> None:
    opt = optimizer([rotations(3, 3)], lr=0.1)
    with pytest.raises(ValueError, match="square"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="lr must be"):
        opt.add_param_group({"params": [rotations(3, 3)], "lr": -1.0})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("optimizer", "options", "error"),
    [
        (StiefelSGD, {"lr": -0.1}, ValueError),
        (StiefelSGD, {"lr": float("nan")}, ValueError),
        (StiefelSGD, {"lr": float("inf")}, ValueError),
        (StiefelSGD, {"lr": "fast"}, TypeError),
        (StiefelSGD, {"lr": torch.tensor(0.1)}, TypeError),
        (StiefelSGD, {"lr": 0.1, "momentum": -0.1}, ValueError),
        (StiefelSGD, {"lr": 0.1, "metric": 1.0}, ValueError),
        (StiefelSGD, {"lr": 0.1, "reproject_every": -1}, ValueError),
        (StiefelAdam, {"reproject_every": 1.5}, TypeError),
        (StiefelSGD, {"lr": 0.1, "weight_decay": -1}, ValueError),
        (StiefelAdam, {"lr": -0.1}, ValueError),
        (StiefelAdam, {"betas": (1.0, 0.9)}, ValueError),
        (StiefelAdam, {"betas": (0.9, -0.1)}, ValueError),
        (StiefelAdam, {"betas": 0.9}, TypeError),
        (StiefelAdam, {"eps": 0.0}, ValueError),
        (StiefelAdam, {"eps": -1e-8}, ValueError),
        (StiefelAdam, {"weight_decay": -1}, ValueError),
    ],
)
def test_refuses_bad_options(
    optimizer: Callable[..., Any], options: dict[str, Any], error: type[Exception]
) -> None:
    *_, wrong = options
    with pytest.raises(error, match=wrong):
        optimizer([rotations(3, 3)], **options)


def test_refuses_a_manifold_flag_that_is_not_one() -> None:
    with pytest.raises(TypeError, match="manifold must be True or False"):
        StiefelSGD([{"params": [rotations(3, 3)], "manifold": "no"}], 0.1)


@OPTIMIZERS
@pytest.mark.parametrize("manifold", [True, False])
def test_refuses_sparse_gradients(optimizer: Callable[..., Any], manifold: bool) -> None:
    x = nn.Parameter(torch.eye(3))
    opt = optimizer([{"params": [x], "manifold": manifold}], lr=0.1)
    x.grad = torch.eye(3).to_sparse()
    with pytest.raises(ValueError, match="dense and real"):
        opt.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@OPTIMIZERS
def test_no_synchronisation_on_a_gpu(optimizer: Callable[..., Any]) -> None:
    """CUDA's own check, and TF32 outside does not reach the step."""
    params = [
        nn.Parameter(rotations(4, n, n, dtype=torch.float32).detach().cuda()) for n in (8, 20)
    ]
    opt = optimizer(params, lr=1e-2)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for _ in range(20):
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.allow_tf32 = False
    assert max(orthogonality_error(p.cpu()) for p in params) <= 5e-6


def test_sharded_factors_are_refused():
    factor = nn.Parameter(torch.eye(4))
    factor.full_tensor = lambda: factor
    with pytest.raises(ValueError, match=r"params\[0\] must be whole .*ignored_params"):
        StiefelAdam([factor])
    StiefelAdam([{"params": [factor], "manifold": False}])
