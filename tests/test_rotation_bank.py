"""The rotation bank: one transform per direction, the same numbers, nothing stale, nothing lost."""

import copy
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spectral_adapters import (
    SODALinear,
    SpectralAdapterRLinear,
    StiefelSGD,
    autograd,
    functional,
    planner,
    rotation_bank,
)
from spectral_adapters.planner import DEFAULT_RATES
from spectral_adapters.rotation_bank import RotationBank

pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad=True. Gradients will be None")


class Calls(TorchDispatchMode):
    """Counts the raw ops of this package, and how often SODA layers rotate their basis."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __enter__(self):
        # Without the extension layers call references, which no dispatcher sees.
        call = autograd._fused

        def counted(op, reference, x, arguments):
            is_seen = autograd._is_compiled_for(x.device.type)
            if op is torch.ops.spectral.soda_linear_fwd and not is_seen:
                self.count_basis(arguments)
            return call(op, reference, x, arguments)

        self.patch = mock.patch.object(autograd, "_fused", counted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.stop()
        return super().__exit__(*exception)

    def count_basis(self, arguments):
        *_, rotated, on_tokens, _ = arguments
        self.count["basis rotated"] += rotated is None and not on_tokens

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.spectral.soda_linear_fwd.default:
            self.count_basis(args)
        if func.namespace == "spectral":
            self.count[func._schema.name.removeprefix("spectral::")] += 1
        return func(*args, **(kwargs or {}))


class Model(nn.Module):
    """Layers of several kinds, one of them called twice, each possibly in a checkpoint."""

    def __init__(self, plan="auto", reentrant=None, **options):
        super().__init__()
        torch.manual_seed(0)
        layers = [
            SODALinear.from_linear(nn.Linear(12, 12), plan=plan, factors=factors, **options)
            for factors in (None, (2, 6), (12,))
        ]
        self.layers = nn.ModuleList([*layers, SpectralAdapterRLinear(12, 12, r=4)])
        self.reentrant = reentrant
        with torch.no_grad():
            for parameter in trained(self):
                parameter.normal_(0, 0.2)

    def forward(self, x):
        for layer in [*self.layers, self.layers[0]]:
            if self.reentrant is None:
                x = x + layer(x).tanh()
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant).tanh()
        return x


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tokens(seed=0, rows=30):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 12, generator=generator).requires_grad_()


def gradients(model, passes=1, contexts=()):
    model.zero_grad()
    for index in range(passes):
        context = contexts[index] if contexts else torch.enable_grad()
        with context:
            model(tokens(index)).square().sum().backward()
    return [parameter.grad.clone() for parameter in trained(model)]


@pytest.fixture
def calls_are_free(monkeypatch):
    """The planner chooses for these tiny layers as for large ones."""
    rates = replace(DEFAULT_RATES["cpu"], call=1.0)
    monkeypatch.setattr(planner, "_chosen", {("cpu", torch.float32, False): rates})


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("plan", ["tokens", "factored", "merged"])
def test_the_same_gradients_with_one_transform(plan, reentrant, recompute):
    expected = gradients(Model(plan), passes=2)
    model = Model(plan, reentrant, recompute=recompute)
    bank = RotationBank.attach(model)
    with Calls() as calls:
        found = gradients(model, passes=2)
    assert_same(found, expected)
    assert calls.count["cayley_fwd"] == 1
    # A reentrant checkpoint runs a backward pass of its own for every segment.
    assert calls.count["cayley_bwd"] == (10 if reentrant else 2)
    bank.detach(model)
    with Calls() as calls:
        assert_same(gradients(model, passes=2), expected)
    assert calls.count["cayley_fwd"] > 1


def test_a_kept_basis_is_built_once():
    model = Model("factored")
    bank = RotationBank.attach(model)
    with Calls() as calls:
        gradients(model, passes=3)
    assert calls.count["basis rotated"] == 3  # once per SODA layer, of twelve calls
    bank.keep = False
    with Calls() as calls:
        gradients(model, passes=3)
    assert calls.count["basis rotated"] == 12


def test_a_merged_weight_is_built_once_and_contracted_once():
    model = Model("merged")
    bank = RotationBank.attach(model)
    expected = gradients(model, passes=3)
    bank.invalidate()
    with Calls() as calls:
        found = gradients(
            model, 3, [bank.accumulate(), bank.accumulate(), bank.accumulate(enabled=False)]
        )
    assert_same(found, expected)
    assert calls.count["kron_rotate"] == 3
    # Three layers; of the one that is called twice in the last pass, both calls are contracted.
    assert calls.count["kron_gram"] == 4


def test_gradients_that_were_never_contracted_are_not_lost_in_silence():
    model = Model("merged")
    bank = RotationBank.attach(model)
    with bank.accumulate():
        model(tokens()).sum().backward()
    assert trained(model)[0].grad is None
    with torch.no_grad():
        trained(model)[0].add_(1)
    with pytest.raises(RuntimeError, match="gradients of 3 merged weights were accumulated"):
        model(tokens())
    changed = model(tokens())
    bank.detach(model)
    assert relative_error(changed, model(tokens())) < 1e-5


def test_a_last_smaller_batch_takes_what_waits(calls_are_free):
    """Its own plan would be another; the gradients that wait decide."""
    expected = Model()
    total = 0
    for rows, seed in ((500, 0), (3, 1)):
        total = total + expected(tokens(seed, rows)).square().sum()
    total.backward()
    model = Model()
    bank = RotationBank.attach(model)
    assert model.layers[0].plan_for(500).name == "merged"
    assert model.layers[0].plan_for(3).name != "merged"
    with bank.accumulate():
        model(tokens(0, 500)).square().sum().backward()
    model(tokens(1, 3)).square().sum().backward()
    assert_same([p.grad for p in trained(model)], [p.grad for p in trained(expected)])


@pytest.mark.parametrize("write", ["in place", "data", "new data", "load"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("plan", ["factored", "merged"])
def test_nothing_is_stale_after_a_change(plan, write, grad):
    model = Model(plan)
    RotationBank.attach(model)
    with torch.set_grad_enabled(grad):
        before = [model(tokens()).detach() for _ in range(3)][-1]
        changed = {k: v * 1.5 for k, v in model.state_dict().items() if "delta" in k or "rot" in k}
        if write == "load":
            model.load_state_dict(changed, strict=False)
        else:
            for name, parameter in model.named_parameters():
                if name not in changed:
                    continue
                if write == "in place":
                    with torch.no_grad():
                        parameter.copy_(changed[name])
                elif write == "data":
                    parameter.data.copy_(changed[name])  # no version counter sees this
                else:
                    parameter.data = changed[name]
        after = model(tokens()).detach()
        RotationBank.of(model).detach(model)
        assert relative_error(after, model(tokens())) < 1e-5
    assert relative_error(before, after) > 1e-2


def test_optimizers_step_as_without():
    models = [Model(), Model()]
    RotationBank.attach(models[1])
    for model in models:
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for step in range(5):
            optimizer.zero_grad()
            model(tokens(step)).square().mean().backward()
            optimizer.step()
    assert_same(trained(models[1]), trained(models[0]))


def test_stiefel_factors_keep_their_basis_too():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(SODALinear(12, 12, parametrization="stiefel", plan="factored"))

    models = [model(), model()]
    RotationBank.attach(models[1])
    for each in models:
        optimizer = StiefelSGD(list(each[0].rotation), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                each(tokens(2 * step + part)).square().mean().backward()
            optimizer.step()
    assert_same(list(models[1][0].rotation), list(models[0][0].rotation))
    models[1].zero_grad()
    with Calls() as calls:
        gradients(models[1], passes=2)
    assert calls.count["basis rotated"] == 1 and not calls.count["cayley_fwd"]


@pytest.mark.parametrize("plan", ["auto", "tokens", "factored", "merged"])
def test_inference_builds_once_and_gives_equal_bits(plan, calls_are_free):
    model = Model(plan)
    RotationBank.attach(model)
    expected = Model()(tokens())
    with torch.no_grad(), Calls() as calls:
        outputs = [model(tokens()) for _ in range(5)]
    assert relative_error(outputs[0], expected) < 1e-5
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert calls.count["cayley_fwd"] == 1
    if plan == "merged":
        assert calls.count["kron_rotate"] == 3 and not calls.count["basis rotated"]
    if plan == "factored":
        assert calls.count["basis rotated"] == 3


def test_what_inference_mode_made_serves_training():
    model = Model("merged")
    RotationBank.attach(model)
    with torch.inference_mode():
        model(tokens().detach())
        model(tokens().detach())
    assert_same(gradients(model), gradients(Model("merged")))


def _soda_entries(model):
    entries = RotationBank.of(model)._entries.values()
    return [entry for entry in entries if entry.slot.others]


def test_calls_outside_the_root_go_their_own_way():
    model = Model()
    RotationBank.attach(model)
    model(tokens()).sum().backward()
    layer = model.layers[0]
    with Calls() as calls:
        layer(tokens()).sum().backward()
    assert calls.count["cayley_fwd"] == calls.count["cayley_bwd"] == 1
    assert relative_error(layer(tokens()), Model().layers[0](tokens())) < 1e-5


def test_frozen_and_unfrozen_parameters():
    model = Model("factored")
    RotationBank.attach(model)
    gradients(model)
    model.layers[1].rotation[0].requires_grad_(False)
    model.zero_grad()
    model(tokens()).square().sum().backward()
    assert model.layers[1].rotation[0].grad is None
    model.layers[1].rotation[0].requires_grad_(True)
    assert_same(gradients(model), gradients(Model("factored")))


def test_parts_of_a_model_that_are_not_used_get_no_gradient():
    class Half(Model):
        def forward(self, x):
            return self.layers[0](x)

    model = Half()
    RotationBank.attach(model)
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None for p in trained(model.layers[0]))
    assert all(p.grad is None for p in trained(model.layers[1]))


def test_copies_and_pickles_have_a_bank_of_their_own():
    model = Model()
    bank = RotationBank.attach(model, keep=False, accumulation_steps=3)
    expected = gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = RotationBank.of(copied)
        assert own is not bank and (own.keep, own.accumulation_steps) == (False, 3)
        with torch.no_grad():
            trained(model)[0].mul_(1.0)
        with Calls() as calls:
            assert_same(gradients(copied), expected)
        assert calls.count["cayley_fwd"] == 1
        assert copied.layers[0]._rotation_bank is own
    assert copy.deepcopy(model.layers[0])(tokens()).isfinite().all()


def test_layers_that_come_and_go_are_found():
    model = Model()
    bank = RotationBank.attach(model)
    gradients(model)
    model.layers[1] = copy.deepcopy(model.layers[1])
    gradients(model)
    assert_same(gradients(model), gradients(Model()))
    with Calls() as calls:
        gradients(model)
    assert calls.count["cayley_bwd"] == 1
    assert "7 factors of 4 layers" in repr(bank)


def test_an_interrupted_forward_is_forgotten():
    model = Model()
    RotationBank.attach(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens())
    handle.remove()
    with torch.no_grad():
        for parameter in trained(model):
            parameter.mul_(1.1)
    # Also before the next forward of the whole model.
    alone = model.layers[0](tokens()), model.layers[0].get_delta_weight()
    found = gradients(model)
    RotationBank.of(model).detach(model)
    assert_same(found, gradients(model))
    assert_same(alone, (model.layers[0](tokens()), model.layers[0].get_delta_weight()))


def test_several_live_forwards():
    model, plain = Model(), Model()
    RotationBank.attach(model)
    for each in (model, plain):
        (each(tokens(1)).sum() + each(tokens(2)).square().sum()).backward()
    assert_same([p.grad for p in trained(model)], [p.grad for p in trained(plain)])


def test_half_precision_parameters_get_gradients_of_their_type():
    model = Model()
    for parameter in trained(model):
        parameter.data = parameter.data.bfloat16()
    expected = gradients(copy.deepcopy(model))
    RotationBank.attach(model)
    found = gradients(model)
    assert all(grad.dtype == torch.bfloat16 for grad in found)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a.float(), b.float()) < 1e-2


def test_parameters_of_several_types_and_a_change_of_type():
    model = Model()
    RotationBank.attach(model)
    gradients(model)
    turning = [p for layer in model.layers[:3] for p in layer.rotation]
    for count in (1, len(turning)):
        for parameter in turning[:count]:
            parameter.data = parameter.data.double()
            parameter.grad = None
        found = gradients(model)
        assert [grad.dtype for grad in found] == [p.dtype for p in trained(model)]
        assert_same([grad.float() for grad in found], gradients(Model()))


def test_a_graph_under_capture_keeps_nothing(monkeypatch):
    """Replays of a CUDA graph see other parameters than the recording did."""
    model = Model("factored")
    RotationBank.attach(model)
    gradients(model)
    monkeypatch.setattr(rotation_bank, "_is_capturing", lambda: True)
    with Calls() as calls:
        gradients(model, passes=2)
    assert calls.count["cayley_fwd"] == 2 and calls.count["basis rotated"] == 6
    monkeypatch.undo()
    with Calls() as calls:
        gradients(model)
    assert calls.count["cayley_fwd"] == 1


@pytest.mark.parametrize("plan", ["tokens", "factored", "merged"])
def test_compiled_as_a_whole(plan):
    model = Model(plan)
    expected = gradients(copy.deepcopy(model))
    RotationBank.attach(model)
    nodes = []

    def backend(graph, inputs):
        nodes.extend(graph.graph.nodes)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    compiled(tokens()).square().sum().backward()
    assert_same([p.grad for p in trained(model)], expected)
    # One Function for all rotations, one for each of the four products of SODA layers, the rest
    # by autograd's own nodes.
    functions = [node for node in nodes if "autograd_function_apply" in str(node.target)]
    with torch.no_grad():
        for parameter in trained(model):
            parameter.mul_(1.2)
    bank = RotationBank.of(model)
    assert not any(entry.traced for entry in bank._entries.values())
    assert relative_error(compiled(tokens()), model(tokens())) < 1e-5
    assert len(functions) >= 5


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got int"):
        RotationBank.attach(3)
    with pytest.raises(TypeError, match="keep must be True or False; got 1"):
        RotationBank(keep=1)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"accumulation_steps must be at least 1; got {wrong}"):
            RotationBank(accumulation_steps=wrong)
    with pytest.raises(TypeError, match="accumulation_steps must be an int; got True"):
        RotationBank(accumulation_steps=True)
    model = Model()
    bank = RotationBank.attach(model)
    assert RotationBank.attach(model, keep=False) is bank and bank.keep is False
    with pytest.raises(TypeError, match="recompute must be True or False; got 'x'"):
        SODALinear(4, 4, recompute="x")
    with pytest.raises(ValueError, match="recompute must be False except for"):
        SODALinear(4, 4, rotation="right", recompute=True)


class Saved:
    """What autograd saves for backward beyond parameters and the layer's frozen basis."""

    def __init__(self, layer):
        self.known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        self.shapes, self.storages = [], set()

    def _pack(self, tensor):
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self.known and storage not in self.storages:
            self.storages.add(storage)
            self.shapes.append(tuple(tensor.shape))
        return tensor

    def __enter__(self):
        self.context = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.context.__enter__()
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("rotation", ["left", "right"])
@pytest.mark.parametrize("decomposition", ["svd", "qr"])
@pytest.mark.parametrize("plan", ["tokens", "factored"])
def test_these_plans_keep_nothing_of_the_weights_size(plan, decomposition, rotation, rows):
    layer = SODALinear(12, 12, decomposition=decomposition, rotation=rotation, plan=plan)
    with Saved(layer) as saved:
        y = layer(tokens(rows=rows))
    large = [shape for shape in saved.shapes if shape == (12, 12)]
    if (decomposition, rotation) != ("qr", "left"):
        assert len(large) <= 1  # a factor of a prime dimension may be that large; here none is
    assert not large
    y.sum().backward()


def test_layers_with_one_input_share_it_when_they_recompute():
    x = tokens(rows=50)
    kept = {}
    for recompute in (False, True):
        layers = nn.ModuleList(
            SODALinear(12, 12, bias=False, plan="factored", recompute=recompute) for _ in range(3)
        )
        with Saved(layers) as saved:
            total = sum(layer(x) for layer in layers)
        kept[recompute] = [shape for shape in saved.shapes if shape == (50, 12)]
        total.sum().backward()
    assert len(kept[False]) == 3 and len(kept[True]) == 1


peft = pytest.importorskip("peft")


def _peft_model(config, inject=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8))
    if inject:
        return peft.inject_adapter_in_model(config, model)
    return peft.get_peft_model(model, config)


def _peft_config(method, **options):
    from spectral_adapters.peft import SODAConfig, SpectralAdapterRConfig

    config = {"soda": SODAConfig, "r": SpectralAdapterRConfig}[method]
    return config(target_modules=["0", "2"], init_weights=False, **options)


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("method", ["soda", "r"])
def test_peft_models_have_a_bank(method, inject):
    model = _peft_model(_peft_config(method), inject)
    for seed in (0, 1):
        with Calls() as calls:
            y = model(tokens(seed))
            y.square().sum().backward()
        assert calls.count["cayley_bwd"] == 1 and calls.count["cayley_fwd"] == (seed == 0)
    found = [parameter.grad.clone() for parameter in trained(model)]
    for module in model.modules():
        bank = RotationBank.of(module)
        if bank is not None:
            bank.detach(module)
    model.zero_grad()
    for seed in (0, 1):
        model(tokens(seed)).square().sum().backward()
    assert_same(found, [parameter.grad for parameter in trained(model)])


@pytest.mark.parametrize("method", ["soda", "r"])
def test_peft_adapters_are_switched_disabled_merged_and_deleted(method):
    model = _peft_model(_peft_config(method))
    model.add_adapter("other", _peft_config(method))
    x, outputs = tokens(), {}
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        for _ in range(2):
            y = model(x)
            y.sum().backward()
            assert relative_error(y, outputs.setdefault(name, y.detach())) < 1e-6
    assert relative_error(outputs["default"], outputs["other"]) > 1e-3
    with model.disable_adapter():
        base = model(x)
    assert relative_error(base, outputs["other"]) > 1e-3
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter(["default", "other"])
    assert relative_error(model(x), both) < 1e-5
    model.unmerge_adapter()
    model.delete_adapter("other")
    model.set_adapter("default")
    assert relative_error(model(x), outputs["default"]) < 1e-6


def test_a_rotation_alone_uses_the_weight_itself():
    model = _peft_model(_peft_config("soda", rotation="right", plan="tokens"))
    for name, parameter in model.named_parameters():
        if "delta" in name:
            parameter.requires_grad_(False)
    layer = model.base_model.model[0]
    expected = model(tokens())
    assert all(entry.folded.weight is not None for entry in _soda_entries(model.base_model))
    expected.square().sum().backward()
    found = [parameter.grad.clone() for parameter in trained(model)]
    for plan in ("factored", "merged"):
        layer.configs["default"].plan = plan
        model.zero_grad()
        y = model(tokens())
        assert relative_error(y, expected) < 1e-5
        y.square().sum().backward()
        assert_same([parameter.grad for parameter in trained(model)], found)
    # A spectrum that is changed by hand makes another weight.
    layer.configs["default"].plan = "tokens"
    layer.soda_delta["default"].data.add_(0.5)
    changed = model(tokens())
    layer.configs["default"].plan = "merged"
    assert relative_error(changed, model(tokens())) < 1e-5
    assert relative_error(changed, expected) > 1e-2


def test_convolutions_and_embeddings_are_built_once_for_inference():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6), nn.Conv1d(5, 4, 3), nn.Conv1d(4, 4, 1, groups=2))
    from spectral_adapters.peft import SODAConfig

    config = SODAConfig(target_modules=["0", "1", "2"], init_weights=False)
    model = peft.get_peft_model(model, config)
    x = torch.arange(15).reshape(3, 5) % 10
    expected = model(x).detach()
    with torch.no_grad(), Calls() as calls:
        for _ in range(4):
            assert relative_error(model(x), expected) < 1e-5
    assert calls.count["kron_rotate"] == 3
    with torch.no_grad():
        model.base_model.model[1].soda_delta["default"].data.add_(0.1)
        assert relative_error(model(x), expected) > 1e-3
        changed = model(x)
    assert relative_error(changed, model(x)) < 1e-5


@lru_cache(maxsize=1)
def _template():
    return Model()


STEPS = (
    "train",
    "train twice",
    "two forwards",
    "evaluate",
    "inference mode",
    "step",
    "write data",
    "write in place",
    "replace data",
    "load",
    "freeze",
    "unfreeze",
    "checkpoint",
    "reentrant",
    "no checkpoint",
    "plan",
    "recompute",
    "keep",
    "call a layer",
    "fail",
    "copy",
    "replace a layer",
    "deferred",
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 11)), min_size=3, max_size=25))
def test_any_life_of_a_model_is_that_of_one_without_a_bank(life):
    with_bank, plain = copy.deepcopy(_template()), copy.deepcopy(_template())
    RotationBank.attach(with_bank)
    for step, number in life:
        if step == "keep":
            RotationBank.of(with_bank).keep = number % 2 == 0
        elif step == "copy":  # without the gradients
            with_bank, plain = copy.deepcopy(with_bank), copy.deepcopy(plain)
        if step == "deferred":
            with RotationBank.of(with_bank).accumulate():
                with_bank(tokens(number)).square().sum().backward()
            plain(tokens(number)).square().sum().backward()
            step = "train"
        for model in (with_bank, plain):
            _live(model, step, number)
        found = [p.grad for p in trained(with_bank)]
        expected = [p.grad for p in trained(plain)]
        assert [grad is None for grad in found] == [grad is None for grad in expected]
        largest = max([float(grad.abs().max()) for grad in expected if grad is not None] or [0.0])
        for a, b in zip(found, expected, strict=True):
            # Some gradients are sums in which all but a little cancels.
            assert a is None or float((a - b).abs().max()) <= 1e-5 * largest, step
    assert relative_error(with_bank(tokens(1)), plain(tokens(1))) < 1e-4


def _live(model, step, number):
    """One thing that happens to a model; ``number`` says which part of it."""
    layer, x = model.layers[number % 3], tokens(number)
    parameters = trained(model)
    parameter = parameters[number % len(parameters)] if parameters else None
    if step in ("train", "train twice"):
        for _ in range(2 if "twice" in step else 1):
            model(x).square().sum().backward()
    elif step == "two forwards":
        (model(x).sum() + model(tokens(number + 1)).square().sum()).backward()
    elif step == "evaluate":
        with torch.no_grad():
            model(x)
    elif step == "inference mode":
        with torch.inference_mode():
            model(x.detach())
    elif step == "step":
        torch.optim.SGD(parameters, lr=1e-4).step()
        model.zero_grad()
    elif step == "write data":
        parameter.data.add_(0.01)
    elif step == "write in place":
        with torch.no_grad():
            parameter.mul_(0.9)
    elif step == "replace data":
        parameter.data = parameter.data * 1.1
    elif step == "load":
        state = {key: value * 0.9 for key, value in model.state_dict().items() if "delta" in key}
        model.load_state_dict(state, strict=False)
    elif step in ("freeze", "unfreeze"):
        layer.delta.requires_grad_(step == "unfreeze")
        layer.rotation[0].requires_grad_(step == "unfreeze")
    elif step in ("checkpoint", "reentrant", "no checkpoint"):
        model.reentrant = {"checkpoint": False, "reentrant": True, "no checkpoint": None}[step]
    elif step == "plan":
        layer.plan = ("tokens", "factored", "merged", "auto")[number % 4]
    elif step == "recompute":
        layer.recompute = number % 2 == 0
    elif step == "call a layer":
        layer(x).square().sum().backward()
    elif step == "fail":
        with pytest.raises(ValueError):
            model(torch.randn(3, 5))
    elif step == "replace a layer":
        model.layers[number % 3] = copy.deepcopy(layer)


class Interrupts(torch.autograd.Function):
    """Raises in the backward pass when told to."""

    raises = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if Interrupts.raises:
            raise KeyboardInterrupt
        return grad


@pytest.mark.parametrize("plan", ["tokens", "merged"])
def test_an_interrupted_backward_leaves_nothing_to_the_next(plan):
    model = Model(plan)
    RotationBank.attach(model)
    expected = gradients(Model(plan))

    def run():
        # The last layers' nodes have run when the first raises.
        model(Interrupts.apply(tokens())).square().sum().backward()

    model.zero_grad()
    Interrupts.raises = True
    with pytest.raises(KeyboardInterrupt):
        run()
    Interrupts.raises = False
    model.zero_grad()
    run()
    assert_same([p.grad for p in trained(model)], expected)


@pytest.mark.parametrize("plan", ["tokens", "factored", "merged"])
def test_two_sets_of_parameters_in_one_backward(plan):
    models = [Model(plan), Model(plan)]
    RotationBank.attach(models[1])
    for model in models:
        first = model(tokens(0)).square().sum()
        with torch.no_grad():
            for parameter in trained(model):
                # Without a version counter, which would forbid the first graph's backward.
                parameter.data = parameter.data + 0.1
        (first + model(tokens(1)).square().sum()).backward()
    assert_same(*([p.grad for p in trained(model)] for model in models))


def test_a_graph_run_backward_twice_gives_its_gradients_twice():
    model = Model()
    RotationBank.attach(model)
    once = gradients(model)
    model.zero_grad()
    loss = model(tokens()).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same([p.grad for p in trained(model)], [2 * grad for grad in once])


def test_gradients_of_a_few_inputs_alone():
    """Nothing is computed for, or left in the pool by, what was not asked for."""
    model, reference = Model(), Model()
    RotationBank.attach(model)
    for pick in (lambda m, x: [x], lambda m, x: [m.layers[1].rotation[0]], lambda m, x: trained(m)):
        found = []
        for each in (model, reference):
            x = tokens()
            found.append(torch.autograd.grad(each(x).square().sum(), pick(each, x)))
        assert_same(*found)


def test_one_edge_stands_for_all_factors_of_a_layer():
    """The short way is taken: no node adds a spectrum, none hands out single rotations."""
    model = Model("tokens")
    RotationBank.attach(model)
    names, pending = Counter(), [model(tokens()).sum().grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # "SODALinearFunctionBackward", or the extension's "...CppNode<spectral::SODALinear>"
        known = [name for name in ("SODALinear", "SharedCayley") if name in node.name()]
        names[known[0] if known else node.name()] += 1
        pending += [parent for parent, _ in node.next_functions]
    assert names["SharedCayley"] == 1
    assert names["SODALinear"] == 4  # one of three layers is called twice
    assert names["LayerRotationsFunctionBackward"] == 0


def test_a_layer_that_came_before_gradients_wait_is_no_reason_to_refuse():
    model = Model("merged")
    bank = RotationBank.attach(model)
    expected = gradients(model, passes=3)
    model.layers[0] = copy.deepcopy(model.layers[0])
    contexts = [bank.accumulate(), bank.accumulate(), bank.accumulate(enabled=False)]
    assert_same(gradients(model, 3, contexts), expected)


@pytest.mark.parametrize("has_nodes", [True, False])
@pytest.mark.parametrize("plan", ["tokens", "factored", "merged"])
def test_a_layer_inside_and_outside_of_a_checkpoint(plan, has_nodes, monkeypatch):
    """A reentrant checkpoint's backward runs inside another and leaves it its gradients."""
    if not has_nodes:
        monkeypatch.setattr(autograd, "gradient_pool", autograd.GradientPool)
    found = []
    for in_checkpoint in (False, True):
        model = Model(plan)
        RotationBank.attach(model)

        def forward(model, x, in_checkpoint=in_checkpoint):
            first, *others = model.layers
            x = first(x).tanh()  # without a gradient, a reentrant checkpoint would have none
            for layer in others:
                x = checkpoint(layer, x, use_reentrant=True) if in_checkpoint else layer(x)
                x = layer(x.tanh())
            return x

        monkeypatch.setattr(Model, "forward", forward)
        model(tokens()).square().sum().backward()
        found.append([p.grad for p in trained(model)])
    assert_same(*found)


@pytest.mark.parametrize("has_nodes", [True, False])
def test_backward_passes_in_threads(has_nodes, monkeypatch):
    if not has_nodes:
        monkeypatch.setattr(autograd, "gradient_pool", autograd.GradientPool)
    model, count = Model("tokens"), 4
    RotationBank.attach(model)
    expected = [count * grad for grad in gradients(model)]
    for _ in range(5):
        model.zero_grad()
        losses = [model(tokens()).square().sum() for _ in range(count)]
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(torch.Tensor.backward, losses))
        assert_same([p.grad for p in trained(model)], expected)


@pytest.mark.parametrize("has_nodes", [True, False])
def test_gradients_that_nobody_takes_are_not_kept(has_nodes, monkeypatch):
    if not has_nodes:
        monkeypatch.setattr(functional, "node_of", lambda *_: None)
        monkeypatch.setattr(autograd, "gradient_pool", autograd.GradientPool)
    pools = []
    monkeypatch.setattr(
        autograd,
        "gradient_pool",
        lambda count, make=autograd.gradient_pool: pools.append(make(count)) or pools[-1],
    )
    model, x = Model("tokens"), tokens()
    RotationBank.attach(model)
    loss = model(x).square().sum()
    for _ in range(2):
        torch.autograd.grad(loss, x, retain_graph=True)
    (pool,) = pools
    if not has_nodes:
        assert pool._passes == {}
    loss.backward()
    assert_same([p.grad for p in trained(model)], gradients(Model("tokens")))


@pytest.mark.parametrize("has_nodes", [True, False])
@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("plan", ["tokens", "factored", "merged"])
def test_a_penalty_on_rotations_gradients_is_refused(plan, bank, has_nodes, monkeypatch):
    """Once differentiable: never a second derivative of zero in silence."""
    if not has_nodes:
        monkeypatch.setattr(functional, "node_of", lambda *_: None)
        monkeypatch.setattr(autograd, "gradient_pool", autograd.GradientPool)
    model = Model(plan)
    if bank:
        RotationBank.attach(model)
    for layer in (model.layers[0], model.layers[3]):
        rotation = list(layer.rotation_slots()[0].rotation)
        loss = model(tokens()).square().sum()
        grads = torch.autograd.grad(loss, rotation, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("write", ["in place", "new data", "new parameter", "data twice"])
@pytest.mark.parametrize("name", ["singular_values", "left"])
@pytest.mark.parametrize("plan", ["factored", "merged"])
def test_nothing_is_stale_after_a_change_of_the_basis(plan, name, write, grad):
    model = nn.Sequential(SODALinear.from_linear(nn.Linear(64, 64), plan=plan))
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(0, 0.2)
    RotationBank.attach(model)
    x = torch.randn(5, 64)
    with torch.set_grad_enabled(grad):
        before = model(x).detach()
        frozen = getattr(model[0], name)
        if write == "in place":
            with torch.no_grad():
                frozen.mul_(1.1)
        elif write == "new parameter":
            setattr(model[0], name, nn.Parameter(frozen.detach() * 1.1, requires_grad=False))
        else:
            frozen.data = frozen.data * 1.1
            if write == "data twice":  # comes to lie where the first one was
                frozen.data = frozen.data * 1.1
        after = model(x).detach()
        assert relative_error(after, copy.deepcopy(model)[0](x)) < 1e-6
    assert relative_error(before, after) > 1e-2


def test_what_no_counter_sees_is_seen_when_it_is_told():
    """In-place edits of frozen numbers through ``.data`` need :meth:`RotationBank.invalidate`."""
    model = nn.Sequential(SODALinear.from_linear(nn.Linear(12, 12), plan="merged"))
    bank, x = RotationBank.attach(model), torch.randn(5, 12)
    with torch.no_grad():
        model(x)
        model[0].left.data.mul_(1.1)
        bank.invalidate()
        assert relative_error(model(x), copy.deepcopy(model)[0](x)) < 1e-6


@pytest.mark.parametrize("grad", [False, True])
def test_what_a_call_returns_does_not_depend_on_earlier_ones(grad, monkeypatch):
    """On an accelerator the factored plan keeps U R in half precision; the merged one must not
    take it."""
    monkeypatch.setattr(functional, "basis_dtypes", lambda x, basis, on: (x.dtype, x.dtype))
    layer = SODALinear.from_linear(nn.Linear(64, 64))
    with torch.no_grad():
        for parameter in trained(layer):
            parameter.normal_(0, 1e-2)
    x, found = torch.randn(5, 64).bfloat16(), []
    for plans in (["merged"], ["factored", "merged"], ["factored"], ["merged", "factored"]):
        model = nn.Sequential(copy.deepcopy(layer))
        RotationBank.attach(model)
        for plan in plans:
            model[0].plan = plan
            with torch.set_grad_enabled(grad):
                y = model(x)
        found.append(y.detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])


def test_a_transform_over_parameters_leaves_the_bank_as_it_was():
    model, x = Model("tokens"), tokens().detach()
    RotationBank.attach(model)
    expected = gradients(model)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    stacked = {name: torch.stack([p, p]) for name, p in values.items()}
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda each: torch.func.functional_call(model, each, (x,)))(stacked)
    assert_same(gradients(model), expected)
    found = torch.func.grad(
        lambda each: torch.func.functional_call(model, each, (x,)).square().sum()
    )(values)
    assert_same([found[name] for name in values], expected)


@pytest.mark.parametrize("plan", ["auto", "tokens"])
def test_compiled_for_any_number_of_rows(plan):
    model = nn.Sequential(nn.Linear(12, 12), *Model(plan).layers)
    for bank in (False, True):
        if bank:
            RotationBank.attach(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for rows in (5, 7, 9, 400):
            x = torch.randn(rows, 12)
            assert relative_error(compiled(x), model(x)) < 1e-5


def test_the_plan_that_is_told_is_the_plan_that_is_taken(calls_are_free):
    model = nn.Sequential(SODALinear.from_linear(nn.Linear(256, 256)))
    layer = model[0]
    alone = layer.plan_for(128).name
    bank = RotationBank.attach(model, accumulation_steps=64)
    assert alone != "merged" and layer.plan_for(128).name == "merged"
    model(torch.randn(128, 256))
    (entry,) = bank._entries.values()
    assert entry.folded.weight is not None
    bank.keep = False
    assert layer.plan_for(128).name == alone


def test_a_number_that_is_none_is_no_change():
    model = Model("merged")
    bank = RotationBank.attach(model)
    with torch.no_grad():
        model.layers[1].delta[0] = torch.nan
    expected = gradients(copy.deepcopy(model), passes=2)
    found = gradients(model, 2, [bank.accumulate(), bank.accumulate(enabled=False)])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
