"""Layers as the extension's nodes of the graph (csrc/layer_nodes.cpp), against the Functions."""

import pytest
import torch
from peft import get_peft_model
from support import relative_error

from spectral_adapters import (
    SODALinear,
    SpectralAdapterALinear,
    SpectralAdapterRLinear,
    autograd,
    functional,
)
from spectral_adapters.functional import cayley_factors
from spectral_adapters.peft import SODAConfig, SpectralAdapterRConfig
from spectral_adapters.rotation_bank import RotationBank

pytest.importorskip("spectral_kernels._C", reason="needs the extension")

NODES = {
    "soda": lambda base: SODALinear.from_linear(base, plan="tokens"),
    "soda factored": lambda base: SODALinear.from_linear(base, plan="factored"),
    "soda recompute": lambda base: SODALinear.from_linear(base, plan="factored", recompute=True),
    "soda merged": lambda base: SODALinear.from_linear(base, plan="merged"),
    "soda merged, recompute": lambda base: SODALinear.from_linear(
        base, plan="merged", recompute=True
    ),
    "a": lambda base: SpectralAdapterALinear.from_linear(base, r=3),
    "r": lambda base: SpectralAdapterRLinear.from_linear(base, r=3),
}


def randomise(model):
    """Move what is trained away from where it starts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)


@pytest.fixture
def python_functions(monkeypatch):
    """Switches the nodes off for the rest of the test."""
    return lambda: monkeypatch.setattr(functional, "node_of", lambda *_: None)


def node_layer(name):
    torch.manual_seed(0)
    layer = NODES[name](torch.nn.Linear(12, 8))
    randomise(layer)
    return layer


def node_gradients(layer, x, trains_x=True):
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    found = [y.detach(), *(p.grad for p in trained), x.grad if trains_x else None]
    for tensor in (x, *trained):
        tensor.grad = None
    return found


@pytest.mark.parametrize("trains_bias", [False, True])
@pytest.mark.parametrize("trains_x", [False, True])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
@pytest.mark.parametrize("name", NODES)
def test_nodes_do_what_functions_do(name, shape, trains_x, trains_bias, python_functions):
    layer, x = node_layer(name), torch.randn(shape, requires_grad=trains_x)
    (layer.bias if "soda" in name else layer.base.bias).requires_grad_(trains_bias)
    assert functional.node_of("soda_linear", x) is not None
    found = node_gradients(layer, x, trains_x)
    assert "CppNode" in layer(x).grad_fn.name()
    python_functions()
    expected = node_gradients(layer, x, trains_x)
    assert "CppNode" not in layer(x).grad_fn.name()
    for value, oracle in zip(found, expected, strict=True):
        assert (value is None) == (oracle is None)
        assert value is None or torch.equal(value, oracle)


CONFIGS = [SpectralAdapterRConfig(r=3), SODAConfig(), SODAConfig(plan="merged")]


@pytest.mark.parametrize("config", CONFIGS)
def test_nodes_of_a_model_with_a_bank(config, python_functions):
    torch.manual_seed(0)
    base = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
    config.target_modules = ["0", "2"]
    model = get_peft_model(base, config)
    randomise(model)
    x = torch.randn(5, 8, requires_grad=True)
    for _ in range(2):
        assert "CppNode" in model(x).grad_fn.name()
        found = node_gradients(model, x)
    python_functions()
    for value, oracle in zip(found, node_gradients(model, x), strict=True):
        assert torch.equal(value, oracle)


def test_gradients_of_merged_weights_wait(python_functions):
    torch.manual_seed(0)
    config = SODAConfig(plan="merged", target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
    randomise(model)
    bank, batches = RotationBank.of(model), torch.randn(3, 5, 8)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        for number, x in enumerate(batches):
            with bank.accumulate(number < 2):
                model(x).square().sum().backward()
            assert bank.has_waiting_gradients == (number < 2)
            assert (trained[0].grad is None) == (number < 2)
        found = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        return found

    model(batches[0])
    assert "CppNode" in model(batches[0]).grad_fn.name()
    found = gradients()
    python_functions()
    assert all(map(torch.equal, found, gradients()))


@pytest.mark.parametrize("name", NODES)
def test_nodes_keep_the_rules_of_the_graph(name):
    layer, x = node_layer(name), torch.randn(5, 12, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    first = torch.autograd.grad(y.sum(), trained, retain_graph=True)
    again = torch.autograd.grad(y.sum(), trained)
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), trained)

    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()

    layer(x).add_(1).sum().backward()  # the output is nobody else's
    with torch.no_grad():
        assert not layer(x).requires_grad

    if name in ("soda recompute", "a") or "merged" in name:  # these keep x
        hot = x * 1
        y = layer(hot)
        hot.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", NODES)
def test_compiled_autograd_takes_nodes(name):
    layer, x = node_layer(name), torch.randn(5, 12)
    trained = [p for p in layer.parameters() if p.requires_grad]
    expected = torch.autograd.grad(layer(x).square().sum(), trained)
    loss = layer(x).square().sum()
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(trained, expected, strict=True))


@pytest.mark.parametrize("has_nodes", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_compiled_autograd_trains_a_model_with_a_bank(config, has_nodes, python_functions):
    """Layers that share a token, whose gradients it adds up."""
    config.target_modules = ["0", "1", "2"]
    if not has_nodes:
        python_functions()

    def trained(backward):
        torch.manual_seed(0)
        base = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
        model = get_peft_model(base, config)
        randomise(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for x in torch.randn(2, 5, 8):
            optimizer.zero_grad()
            backward(model(x).square().sum())
            optimizer.step()
        return parameters

    def compiled(loss):
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()

    torch._dynamo.reset()
    for found, expected in zip(trained(compiled), trained(torch.Tensor.backward), strict=True):
        assert relative_error(found, expected) <= 1e-6


def test_a_pool_that_is_not_there():
    layer = node_layer("soda")
    x, basis, token = torch.randn(5, 12), layer.basis, torch.empty(0)
    factors = [torch.eye(n) for n in layer.factor_sizes]
    with pytest.raises(ValueError, match="pool must be the number of a pool; got 123456789"):
        torch.ops.spectral_nodes.soda_linear(
            *(x, basis.singular_values, basis.left, basis.right, None, None, True, False, False),
            *(layer.delta, token, 123456789, 0, factors),
        )


class Gives(torch.autograd.Function):
    """A layer whose rotations' gradients are given."""

    @staticmethod
    def forward(ctx, token, pool, grads):
        ctx.pool, ctx.grads = pool, grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx, _):
        ctx.pool.add(0, ctx.grads, ctx.grads[0])
        return None, None, None


def test_the_node_of_a_models_rotations(monkeypatch):
    """To the bit what the Function does, in the parameters' dtypes, and as often as asked."""
    torch.manual_seed(0)
    sizes, dtypes = [3, 5, 2], [torch.float32, torch.bfloat16, torch.float32]
    packed = [torch.randn(n * (n - 1) // 2).to(d) for n, d in zip(sizes, dtypes, strict=True)]
    trained = [values.requires_grad_() for values in packed[:2]]
    with torch.no_grad():
        rotations = cayley_factors(packed, sizes)
    grads = [torch.randn(n, n) for n in sizes]
    found = []
    for name in ("SharedCayley>", "SharedCayleyFunctionBackward"):
        token, pool = autograd.share_rotations(rotations, packed)
        assert token.shape == (0,) and name in token.grad_fn.name()
        end = Gives.apply(token, pool, grads)
        found += [torch.autograd.grad(end, trained, retain_graph=True) for _ in range(2)]
        monkeypatch.setattr(autograd, "gradient_pool", autograd.GradientPool)
    for result in found:
        assert [grad.dtype for grad in result] == dtypes[:2]
        assert all(map(torch.equal, result, found[0]))
        assert all(grad.any() for grad in result)


def test_the_node_of_a_models_rotations_keeps_the_pool():
    layer = node_layer("soda")
    x, basis = torch.randn(5, 12), layer.basis
    packed = [torch.zeros(n * (n - 1) // 2, requires_grad=True) for n in layer.factor_sizes]
    factors = [torch.eye(n) for n in layer.factor_sizes]
    token, pool = autograd.share_rotations(factors, packed)
    number = pool.number
    y, *_ = torch.ops.spectral_nodes.soda_linear(
        *(x, basis.singular_values, basis.left, basis.right, None, None, True, False, False),
        *(layer.delta, token, number, 0, factors),
    )
    del pool, token
    y.sum().backward()
    assert all(values.grad.any() for values in packed)
    del y
    with pytest.raises(ValueError, match=f"pool must be the number of a pool; got {number}"):
        torch.ops.spectral_nodes.shared_cayley(number, factors, packed)


def test_bad_input_for_the_node_of_a_models_rotations():
    packed, pool = [torch.zeros(3, requires_grad=True)], autograd.gradient_pool(2)
    shared_cayley = torch.ops.spectral_nodes.shared_cayley
    with pytest.raises(ValueError, match="packed must hold one tensor for each of the 0 rotations"):
        shared_cayley(pool.number, [], [])
    with pytest.raises(ValueError, match=r"packed must hold one .* of the 2 rotations.*; got 1"):
        shared_cayley(pool.number, [torch.eye(3)] * 2, packed)
    with pytest.raises(ValueError, match=r"rotations must hold 2 tensors.*; got 1"):
        shared_cayley(pool.number, [torch.eye(3)], packed)
