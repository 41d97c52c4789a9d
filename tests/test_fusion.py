"""Fusing adapters: every identity against dense float64, columns, folders, and the command line."""

import json
import multiprocessing
from itertools import pairwise

import pytest
import torch
from support import assert_near, random_rotation
from torch import nn

Image = pytest.importorskip("PIL.Image")
peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_pipelines import tiny_pipeline  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from spectral_adapters import cli, columns  # noqa: E402
from spectral_adapters.columns import (  # noqa: E402
    ColumnAllocator,
    check_disjoint,
    collision_probability,
    column_overlap,
    columns_for,
)
from spectral_adapters.diffusers import fuse_adapters, load_adapter, save_adapter  # noqa: E402
from spectral_adapters.functional import cayley  # noqa: E402
from spectral_adapters.fusion import (  # noqa: E402
    crosstalk,
    fuse_changes,
    gradient_fusion,
    mix_packed_rotations,
    mix_rotations,
    orthonormal_rows,
    report_fusion,
    rotation_log,
    second_moments,
)
from spectral_adapters.peft import (  # noqa: E402
    FUSION_METHODS,
    LiDBConfig,
    SODAConfig,
    SpectralAdapterAConfig,
    SpectralAdapterRConfig,
    SVDiffConfig,
    adapter_columns,
    adapter_moments,
    changes_to_lora,
    fuse,
    fuse_and_unload,
    init_orthogonal_lora,
    merge_changes,
    saved_columns,
    weight_changes,
)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh())
    return model.append(nn.Linear(8, 3)).to(dtype)


def layered():
    """A convolution, a transposed weight, and nested names that end alike."""
    torch.manual_seed(0)
    inner = nn.Sequential(Conv1D(9, 6), nn.Linear(9, 5))
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), inner)


def images():
    return torch.randn(3, 4, 2, 3)


def config(cls, **options):
    return cls(**{"target_modules": ["0", "2"], "init_weights": False, **options})


def held(configs, build=mlp):
    """A PEFT model with adapters of these configs by name."""
    first, *rest = configs
    torch.manual_seed(5)
    model = get_peft_model(build(), configs[first], adapter_name=first)
    for name in rest:
        model.add_adapter(name, configs[name])
    return model.eval()


def soda_pair(**options):
    return {name: config(SODAConfig, **options) for name in ("subject", "style")}


# Columns.


def test_columns_are_the_same_everywhere():
    assert columns_for("cat", 320, 8) == list(range(80, 88))
    assert columns_for("dog", 320, 8) == list(range(176, 184))
    assert columns_for(3, 64, 8) == list(range(8, 16))
    assert columns_for("cat", 320, 8, bias="none") == list(range(144, 152))
    assert columns_for("cat", 8, 8) == list(range(8))
    # The 3 columns of 11 that make up no block of 4 are never drawn.
    assert {max(columns_for(task, 11, 4)) for task in range(99)} == {3, 7}


def test_random_columns_are_the_same_everywhere_and_drawn_evenly():
    assert columns.random_columns("unet.to_q", 320, 4) == [41, 100, 255, 286]
    assert columns.random_columns("unet.to_q", 320, 4, seed=1) == [12, 65, 220, 266]
    assert columns.random_columns("unet.to_k", 320, 4) != [41, 100, 255, 286]
    assert columns.random_columns("a", 7, 7) == list(range(7))
    draws = [columns.random_columns(str(number), 10, 3) for number in range(4000)]
    assert all(len(set(draw)) == 3 and draw == sorted(draw) for draw in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=10)
    # Each of ten is drawn with probability 0.3: all counts within five standard deviations.
    assert ((counts - 1200).abs() < 5 * (4000 * 0.3 * 0.7) ** 0.5).all()
    assert len({tuple(draw) for draw in draws}) == 120  # all that there are


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, 10, 2), TypeError, "name must be a str; got 3"),
        (("a", 10, 11), ValueError, "r must be at most the rank 10; got 11"),
        (("a", 10, 0), ValueError, "r must be at least 1; got 0"),
    ],
)
def test_bad_input_for_random_columns(arguments, error, message):
    with pytest.raises(error, match=message):
        columns.random_columns(*arguments)
    with pytest.raises(ValueError, match="seed must be an int of at least 0; got -1"):
        columns.random_columns("a", 10, 2, seed=-1)


@pytest.mark.parametrize("bias", columns.BIASES)
def test_collisions_are_as_probable_as_stated(bias):
    blocks = [columns_for(task, 80, 8, bias=bias)[0] // 8 for task in range(6000)]
    counts = torch.bincount(torch.tensor(blocks), minlength=10)
    weights = torch.arange(10, 0, -1.0) if bias == "top" else torch.ones(10)
    expected = 6000 * weights / weights.sum()
    # Pearson's statistic with 9 degrees of freedom exceeds 27.9 once in a thousand.
    assert float(((counts - expected).square() / expected).sum()) < 27.9
    for tasks in (2, 3):
        groups = [blocks[i : i + tasks] for i in range(0, 6000, tasks)]
        found = sum(len(set(group)) < tasks for group in groups) / len(groups)
        stated = collision_probability(80, 8, tasks, bias=bias)
        assert abs(found - stated) < 4 * (stated * (1 - stated) / len(groups)) ** 0.5
    share = weights / weights.sum()
    assert collision_probability(80, 8, bias=bias) == pytest.approx(float(share.square().sum()))
    assert collision_probability(80, 8, 11, bias=bias) == pytest.approx(1)
    assert collision_probability(80, 8, 1, bias=bias) == pytest.approx(0, abs=1e-12)


def test_allocator_hands_out_blocks_from_the_top(tmp_path):
    registry = tmp_path / "columns.json"
    allocator = ColumnAllocator(10, 3, registry=registry)
    assert allocator.allocate("a") == [0, 1, 2]
    assert ColumnAllocator(10, registry=registry).allocate("b", 4) == [3, 4, 5, 6]
    assert allocator.allocate("a") == [0, 1, 2]
    with pytest.raises(ValueError, match=r"r must be 3, which 'a' has already; got 2"):
        allocator.allocate("a", 2)
    with pytest.raises(ValueError, match="number of free columns, 3 of 10; got 4 for 'c'"):
        allocator.allocate("c", 4)
    allocator.release("a")
    assert allocator.allocate("d", 4) == [0, 1, 2, 7]
    assert allocator.tasks == {"b": [3, 4, 5, 6], "d": [0, 1, 2, 7]}
    assert json.loads(registry.read_text())["tasks"] == allocator.tasks
    with pytest.raises(ValueError, match="rank must be 10, that of"):
        ColumnAllocator(11, registry=registry)
    with pytest.raises(ValueError, match="task must be one of"):
        allocator.release("nobody")
    registry.write_text("[]")
    with pytest.raises(ValueError, match="registry must be a file that this class wrote"):
        allocator.allocate("e")


def _allocate(registry, task):
    ColumnAllocator(400, 4, registry=registry).allocate(task)


def test_concurrent_writers_of_one_registry(tmp_path):
    registry = tmp_path / "columns.json"
    # Forked: what is tested is the file, and the imports take seconds.
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_allocate, args=(registry, f"t{i}")) for i in range(40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    given = ColumnAllocator(400, registry=registry).tasks
    assert len(given) == 40
    assert sorted(c for block in given.values() for c in block) == list(range(160))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"columns.json", "columns.json.lock"}


def test_overlap_report():
    found = {"a": {"x": [0, 1], "y": [4]}, "b": {"x": [1, 2]}, "c": {"y": [4], "x": [1]}}
    overlap = column_overlap(found)
    assert overlap.shared == {"x": {1: ["a", "b", "c"]}, "y": {4: ["a", "c"]}}
    assert overlap.fraction == pytest.approx(2 / 4)
    assert "50.0%" in str(overlap)
    with pytest.raises(ValueError, match=r"x: columns \[1\] of a and b and c; y: columns \[4\]"):
        check_disjoint(found)
    check_disjoint({"a": {"x": [0]}, "b": {"x": [1], "y": [0]}})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: columns_for(1.5, 8, 2), "task must be a str or an int; got 1.5"),
        (lambda: columns_for("a", 8, 9), "r must be at most the rank 8; got 9"),
        (lambda: columns_for("a", 8, 0), "r must be at least 1; got 0"),
        (lambda: columns_for("a", 8, 2, bias="up"), "bias must be one of"),
        (lambda: collision_probability(8, 2, "3"), "tasks must be an int; got '3'"),
        (lambda: ColumnAllocator(8).allocate(""), "task must be a non-empty str"),
        (lambda: ColumnAllocator(0), "rank must be at least 1"),
    ],
)
def test_bad_columns(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_columns_of_single_modules():
    own = {"2": [5, 1]}
    model = held({"first": config(SpectralAdapterAConfig, columns=[3, 0], columns_pattern=own)})
    assert adapter_columns(model, "first") == {"0": (3, 0), "2": (5, 1)}
    assert model.peft_config["first"].columns_pattern == own
    with pytest.raises(ValueError, match=r"2: columns must hold different indices from 0 to 7"):
        held({"first": config(SpectralAdapterAConfig, columns_pattern={"2": [9]})})
    for bad in ({"2": [1, 1]}, {"2": "top"}, {"2": [1.0]}, {"2": []}, [1]):
        with pytest.raises((TypeError, ValueError), match="columns_pattern"):
            config(SpectralAdapterAConfig, columns_pattern=bad)
    with pytest.warns(RuntimeWarning, match="columns_pattern has the key 'nowhere'"):
        held({"first": config(SpectralAdapterAConfig, columns_pattern={"nowhere": [1]})})


def test_saved_columns_are_those_of_the_model(tmp_path):
    options = {"columns": "bottom", "r": 2, "offset": 1, "rank_pattern": {"2": 3}}
    adapters = {
        "first": config(SpectralAdapterAConfig, **options),
        "second": config(SpectralAdapterAConfig, r=2, columns_pattern={"2": [7, 0]}),
    }
    model = held(adapters)
    model.save_pretrained(tmp_path)
    for name in adapters:
        assert saved_columns(tmp_path / name) == adapter_columns(model, name)
    with pytest.raises(ValueError, match="adapter_name must be an adapter of Spectral Adapter A"):
        adapter_columns(model, "third")
    held({"other": config(SpectralAdapterRConfig, r=2)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has one of SPECTRAL_ADAPTER_R"):
        saved_columns(tmp_path / "other")


# Rotations.


def test_logarithm_of_a_rotation():
    for n in (1, 2, 3, 6):
        skew = torch.randn(n, n, dtype=torch.float64)
        skew = skew - skew.mT
        skew *= 3.0 / max(float(torch.linalg.matrix_norm(skew, 2)), 1)
        rotation = torch.matrix_exp(skew)
        assert float((rotation_log(rotation) - skew).abs().max()) < 1e-11
    # Angles that coincide have no eigenvectors of their own.
    turn = torch.matrix_exp(torch.tensor([[0.0, 2.5], [-2.5, 0.0]], dtype=torch.float64))
    twice = torch.block_diag(turn, turn, torch.eye(2))
    assert_near(torch.matrix_exp(rotation_log(twice)), twice)
    assert torch.equal(rotation_log(torch.eye(4)), torch.zeros(4, 4, dtype=torch.float64))
    half = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    for bad, message in (
        (half, "no angle of half a turn"),
        (torch.diag(torch.tensor([-1.0, 1.0])), "no angle of half a turn"),
        (2 * torch.eye(2), "must be orthogonal"),
        (torch.full((2, 2), float("nan")), "must be orthogonal"),
        (torch.zeros(2, 3), "must be square"),
    ):
        with pytest.raises(ValueError, match=message):
            rotation_log(bad)


def test_mixtures_of_rotations():
    first, second = random_rotation(5), random_rotation(5, scale=2.0)
    for weights in ((1, 0), (0, 1)):
        assert torch.equal(mix_rotations([first, second], weights), (first, second)[weights[1]])
    middle = mix_rotations([first, second], [0.3, 0.7])
    assert_near(middle.mT @ middle, torch.eye(5, dtype=torch.float64))
    assert_near(torch.linalg.det(middle), torch.tensor(1.0, dtype=torch.float64))
    # Along one rotation, parts of a turn add up; the ends are limits.
    assert_near(mix_rotations([first], [0.5]) @ mix_rotations([first], [0.5]), first)
    near = mix_rotations([first, second], [1, 1e-9])
    assert 0 < float((near - first).abs().max()) < 1e-7


def test_packed_mixtures_are_those_of_their_rotations():
    packed = [torch.randn(10, dtype=torch.float64) * scale for scale in (0.5, 3.0)]
    rotations = [cayley(p[None], 5)[0] for p in packed]
    for weights in ((0.4, 0.6), (0.5, -0.25), (1.5, 0.0)):
        mixed = cayley(mix_packed_rotations(packed, weights)[None], 5)[0]
        assert_near(mixed, mix_rotations(rotations, weights), factor=10)
    assert torch.equal(mix_packed_rotations(packed, [0, 1]), packed[1])
    # Two quarters of a turn: P = 2 tan(pi / 4).
    quarter = torch.tensor([2.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="rotates by half a turn"):
        mix_packed_rotations([quarter, quarter], [1, 1])
    # Three are one quarter the other way.
    assert_near(mix_packed_rotations([quarter, quarter], [1, 2]), -quarter)


# Changes of weights.


def concept(count, size, rows):
    """Inputs [size, count] in a few orthogonal directions of their own."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return [basis[:, part] @ torch.randn(len(part), count, dtype=torch.float64) for part in rows]


def test_gradient_fusion_is_the_least_squares_solution():
    base = torch.randn(4, 6, dtype=torch.float64)
    changes = [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    inputs = [torch.randn(6, count, dtype=torch.float64) for count in (5, 9, 4)]
    moments = [x @ x.mT for x in inputs]
    weights = [1.0, 0.5, 2.0]
    stacked = torch.cat([w**0.5 * x for w, x in zip(weights, inputs, strict=True)], 1)
    wanted = torch.cat(
        [w**0.5 * (base + c) @ x for w, c, x in zip(weights, changes, inputs, strict=True)], 1
    )
    solution = torch.linalg.lstsq(stacked.mT, wanted.mT).solution.mT
    found = gradient_fusion(changes, moments, weights, regularization=0)
    assert_near(base + found, solution, factor=100)
    # Regularised: the same with mu (W - W0) as further equations.
    total = sum(w * m for w, m in zip(weights, moments, strict=True))
    mu = 0.1 * float(total.diagonal().mean())
    stacked = torch.cat([stacked, mu**0.5 * torch.eye(6, dtype=torch.float64)], 1)
    wanted = torch.cat([wanted, mu**0.5 * base], 1)
    solution = torch.linalg.lstsq(stacked.mT, wanted.mT).solution.mT
    assert_near(base + gradient_fusion(changes, moments, weights, regularization=0.1), solution)


@pytest.mark.parametrize(("regularization", "limit"), [(0, 1e-12), (1e-6, 1e-4)])
def test_gradient_fusion_recovers_concepts_with_orthogonal_inputs(regularization, limit):
    changes = [torch.randn(4, 8, dtype=torch.float64) for _ in range(2)]
    first, second, unseen = concept(9, 8, [[0, 1, 2], [3, 4], [5, 6, 7]])
    moments = [x @ x.mT for x in (first, second)]
    fused = gradient_fusion(changes, moments, regularization=regularization)
    for change, x in zip(changes, (first, second), strict=True):
        assert float((fused @ x - change @ x).norm() / (change @ x).norm()) < limit
        assert float((sum(changes) @ x - change @ x).norm() / (change @ x).norm()) > 0.1
    # What no concept has seen stays as it was.
    assert float((fused @ unseen).norm()) < 1e-9


def test_sums_and_averages():
    layers = [{"x": torch.randn(3, 4), "y": torch.randn(2, 2)}, {"x": torch.randn(3, 4).double()}]
    fused = fuse_changes(layers, [0.5, 2], method="delta")
    assert fused["x"].dtype == torch.float64
    assert_near(fused["x"], 0.5 * layers[0]["x"] + 2 * layers[1]["x"])
    assert_near(fused["y"], 0.5 * layers[0]["y"])
    average = fuse_changes(layers, [1, 3], method="fedavg")
    assert_near(average["x"], 0.25 * layers[0]["x"] + 0.75 * layers[1]["x"])
    assert_near(average["y"], 0.25 * layers[0]["y"])
    assert_near(fuse_changes(layers, method="fedavg")["y"], 0.5 * layers[0]["y"])


def test_orthogonal_rows_and_crosstalk():
    rows = orthonormal_rows(12, list(range(12)))
    assert_near(rows @ rows.mT, torch.eye(12, dtype=torch.float64))
    assert_near(orthonormal_rows(12, [7, 0]), rows[[7, 0]])
    assert not torch.equal(rows.sign(), orthonormal_rows(12, list(range(12)), seed=1).sign())
    assert float(rows.abs().max()) < 0.5
    changes = [torch.randn(5, 2).double() @ rows[part] for part in ([0, 5], [3, 9], [5, 9])]
    assert crosstalk(changes[0], changes[1]) < 1e-14
    assert crosstalk(changes[0], changes[2]) > 0.05
    assert crosstalk(changes[0], torch.zeros(5, 12)) == 0
    one = torch.outer(torch.randn(5), torch.randn(12))
    assert crosstalk(one, -3 * one) == pytest.approx(1)
    apart = [{"x": change} for change in changes]
    fused = fuse_changes(apart[:2], method="orthogonal")
    assert_near(fused["x"], changes[0] + changes[1])
    with pytest.raises(ValueError, match=r"x has .* between 0 and 2; use method 'delta'"):
        fuse_changes(apart, method="orthogonal")
    report = report_fusion({"a": apart[0], "b": apart[2]}, fused)
    assert report.norms["fused"] == pytest.approx(float(fused["x"].norm()))
    assert report.crosstalk["a", "b"][1] == pytest.approx(crosstalk(changes[0], changes[2]))
    assert "crosstalk of a and b: mean" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "method must be one of 'delta'"),
        ({"method": "delta", "weights": [1]}, "weights must hold one finite number for each of 2"),
        ({"method": "delta", "weights": [1, float("nan")]}, "weights must hold one finite number"),
        ({"method": "delta", "moments": []}, "moments must be given"),
        ({"method": "gradient"}, "moments must be given"),
        ({"method": "gradient", "moments": [{"x": torch.eye(4)}, {}]}, r"moments\[1\] must have"),
        ({"method": "gradient", "moments": [{"x": torch.eye(3)}] * 2}, "changes and moments must"),
        ({"method": "gradient", "moments": [{"x": torch.eye(4)}]}, "one matrix for each of 2"),
        (
            {"method": "gradient", "moments": [{"x": torch.eye(4)}] * 2, "regularization": -1},
            "must not be negative",
        ),
        ({"method": "fedavg", "weights": [1, -1]}, "weights must be shares"),
        ({"method": "delta", "weights": 1.0}, "weights must hold one finite number.* got 1.0"),
        ({"method": "delta", "weights": ["x", 1]}, "weights must hold one finite number"),
        ({"method": "delta", "weights": "11"}, "weights must hold one finite number"),
    ],
)
def test_bad_changes(options, message):
    changes = [{"x": torch.ones(3, 4)}, {"x": torch.ones(3, 4)}]
    with pytest.raises(ValueError, match=message):
        fuse_changes(changes, **options)


def test_second_moments_of_a_running_model():
    conv = nn.Conv2d(3, 5, (3, 2), stride=2, padding=(1, 0), padding_mode="reflect", bias=False)
    linear, half = nn.Linear(5, 4, bias=False), Conv1D(2, 4)
    x = [torch.randn(2, 3, 7, 6) for _ in range(2)]
    layers = {"conv": conv, "linear": linear, "half": half}
    inputs = []
    with second_moments(layers) as moments, torch.autocast("cpu", torch.bfloat16):
        for batch in x:
            y = conv(batch).flatten(2).mT
            inputs.append(y.flatten(0, 1).double())
            half(linear(y))
    assert {name: m.shape[0] for name, m in moments.items()} == {"conv": 18, "linear": 5, "half": 4}
    rows = torch.cat(inputs)
    assert_near(moments["linear"], rows.mT @ rows)
    # |conv(x)|^2 summed up is tr(W C W^T).
    weight = conv.weight.detach().flatten(1).double()
    exact = sum(float(conv(batch).detach().double().square().sum()) for batch in x)
    assert float((weight @ moments["conv"] @ weight.mT).trace()) == pytest.approx(exact, rel=1e-5)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    for bad in (nn.Embedding(3, 4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv1d(2, 2, 1), nn.Tanh()):
        with pytest.raises(ValueError, match="layers must be linear or ungrouped Conv2d; it is a"):
            second_moments({"it": bad}).__enter__()
    with pytest.raises(ValueError, match="dtype must be one of"):
        second_moments({}, dtype=torch.float16).__enter__()


# Models.


def dense_spectral(model, adapters, weights, name):
    """``(U + sum of weight * A_U) S (V + sum of weight * A_V)^T - W0`` in float64."""
    layer = dict(model.get_base_model().named_modules())[name]
    base = layer.get_base_layer().weight.double()
    left, values, right = torch.linalg.svd(base, full_matrices=False)
    start = (left * values) @ right
    right = right.mT.clone()
    for adapter, weight in zip(adapters, weights, strict=True):
        mine = layer._basis(adapter, base.device)
        chosen = torch.tensor(layer._columns(layer.configs[adapter]))
        # The signs of the basis that the adapter was trained on.
        signs = (left[:, chosen] * mine.left).sum(0).sign() if adapter else None
        left_shift = layer.spectral_adapter_a_left[adapter].double() * signs
        right_shift = layer.spectral_adapter_a_right[adapter].double() * signs
        left = left.index_add(1, chosen, weight * left_shift)
        right = right.index_add(1, chosen, weight * right_shift)
    return (left * values) @ right.mT - start


def test_spectral_fusion_of_disjoint_blocks_is_the_sum_of_the_changes():
    blocks = {
        "first": config(SpectralAdapterAConfig, r=2),
        "second": config(SpectralAdapterAConfig, r=3, offset=2),
        "third": config(SpectralAdapterAConfig, r=1, columns="bottom", target_modules=["2"]),
    }
    model = held(blocks, lambda: mlp(torch.float64))
    changes = [weight_changes(model, name) for name in blocks]
    fuse(model, list(blocks), method="spectral")
    fused = weight_changes(model, "fused")
    total = fuse_changes(changes, method="delta")
    for name in ("0", "2"):
        assert_near(fused[name], total[name])
    assert adapter_columns(model, "fused") == {"0": (0, 1, 2, 3, 4), "2": (0, 1, 2, 3, 4, 7)}
    assert model.active_adapters == ["fused"]


@pytest.mark.parametrize("second", [{"offset": 2}, {"offset": 1}], ids=["disjoint", "overlap"])
def test_spectral_fusion_with_weights(second):
    blocks = {
        "first": config(SpectralAdapterAConfig, r=2),
        "second": config(SpectralAdapterAConfig, r=2, **second),
    }
    model = held(blocks, lambda: mlp(torch.float64))
    weights, allow = [0.5, -2.0], second["offset"] == 1
    if allow:
        with pytest.raises(
            ValueError, match=r"0: columns \[1\] of first and second; 2: columns \[1\]"
        ):
            fuse(model, ["first", "second"], weights, method="spectral")
        assert list(model.peft_config) == ["first", "second"]
    fuse(model, ["first", "second"], weights, method="spectral", allow_overlap=allow)
    for name, change in weight_changes(model, "fused").items():
        shifts = [(n, w) for n, w in zip(("first", "second"), weights, strict=True)]
        assert_near(change, dense_spectral(model, *zip(*shifts, strict=True), name), factor=10)
    for name, end in (("first", [1, 0]), ("second", [0, 1])):
        fuse(
            model,
            ["first", "second"],
            end,
            method="spectral",
            adapter_name=f"{name}_",
            allow_overlap=allow,
        )
        for layer, change in weight_changes(model, f"{name}_").items():
            assert_near(change, weight_changes(model, name)[layer])


def test_spectral_fusion_keeps_the_columns_that_were_trained_on(tmp_path):
    """Randomized decompositions of a block and of the union differ where the spectrum is flat."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(160, 160))

    blocks = {
        "first": config(SpectralAdapterAConfig, r=2, target_modules=["0"]),
        "second": config(SpectralAdapterAConfig, r=4, offset=20, target_modules=["0"]),
    }
    model = held(blocks, build)
    union = held(
        {"u": config(SpectralAdapterAConfig, columns=[0, 1, *range(20, 24)], target_modules="0")},
        build,
    )
    layer, other = model.get_base_model()[0], union.get_base_model()[0]
    fuse(model, ["first", "second"], method="spectral")
    own = layer._basis("first", torch.device("cpu")).left
    assert not torch.allclose(other._basis("u", torch.device("cpu")).left[:, :2], own, atol=1e-3)
    total = fuse_changes([weight_changes(model, n) for n in blocks], method="delta")
    assert_near(weight_changes(model, "fused")["0"], total["0"])
    model.save_pretrained(tmp_path, selected_adapters=["fused"])
    loaded = PeftModel.from_pretrained(build(), tmp_path / "fused")
    x = torch.randn(3, 160)
    assert_near(loaded(x), model(x))


@pytest.mark.parametrize("parametrization", ["cayley", "stiefel"])
@pytest.mark.parametrize(
    "options",
    [{}, {"rotation": "right"}, {"decomposition": "qr"}, {"factors": {12: [12], 8: [2, 4]}}],
    ids=str,
)
def test_geodesic_fusion(options, parametrization):
    model = held(soda_pair(parametrization=parametrization, **options), lambda: mlp(torch.float64))
    adapters = ["subject", "style"]
    for name, end in (("first", [1, 0]), ("second", [0, 1])):
        fuse(model, adapters, end, method="geodesic", adapter_name=name)
        for layer, change in weight_changes(model, name).items():
            assert torch.equal(change, weight_changes(model, adapters[end[1]])[layer])
    fuse(model, adapters, [0.25, 0.5], method="geodesic")
    for layer in model.get_base_model()[0], model.get_base_model()[2]:
        deltas = [layer.soda_delta[name] for name in adapters]
        assert_near(layer.soda_delta["fused"].data, 0.25 * deltas[0] + 0.5 * deltas[1])
        device = torch.device("cpu")
        parts = [layer._rotation_factors(name, device)[0] for name in (*adapters, "fused")]
        for first, second, fused in zip(*parts, strict=True):
            exact = torch.matrix_exp(0.25 * rotation_log(first) + 0.5 * rotation_log(second))
            assert_near(fused, exact, factor=10)


def test_geodesic_fusion_is_refused_where_rotations_do_not_compare():
    adapters = {"first": config(SODAConfig), "second": config(SODAConfig, rotation="right")}
    model = held(adapters)
    with pytest.raises(ValueError, match=r"adapters must have equal rotation .*'first': 'left'"):
        fuse(model, ["first", "second"], method="geodesic")
    with pytest.raises(ValueError, match="a weighted sum of SODA adapters is no SODA adapter"):
        fuse(model, ["first", "second"], method="delta")
    with pytest.raises(ValueError, match="combination_type must be 'geodesic'"):
        fuse(model, ["first", "second"], method="spectral")
    model = held(soda_pair(factors={12: [2, 6], 8: [2, 4]}))
    layer = model.get_base_model()[2]
    for name in ("subject", "style"):
        layer.soda_rotation[name][0].data.fill_(2.0)
    with pytest.raises(ValueError, match="2, factor 0: the mixture rotates by half a turn"):
        fuse(model, ["subject", "style"], method="geodesic")
    # A refused adapter leaves no trace.
    assert list(model.peft_config) == ["subject", "style"]
    assert all("fused" not in name for name, _ in model.named_parameters())
    fuse(model, ["subject", "style"], [0.5, 0.25], method="geodesic")


@pytest.mark.parametrize("injected", [False, True])
def test_adapters_are_fused_wherever_they_are(injected, tmp_path):
    """In PEFT models and in models with injected adapters, saved apart and reloaded."""
    blocks = {
        "first": config(SpectralAdapterAConfig, r=2, columns_pattern={"2": [7, 3]}),
        "second": config(SpectralAdapterAConfig, r=2, offset=2, target_modules=["2"]),
    }
    for name, chosen in blocks.items():
        torch.manual_seed(len(name))
        get_peft_model(mlp(), chosen, adapter_name=name).save_pretrained(tmp_path)
    from spectral_adapters.peft import load_adapter as load_component

    x = torch.randn(3, 12)
    with pytest.raises(ValueError, match=r"2: columns \[3\] of first and second"):
        check_disjoint({name: saved_columns(tmp_path / name) for name in blocks})
    model = mlp()
    if injected:
        load_component(model, tmp_path / "first", "first")
        load_component(model, tmp_path / "second", "second")
    else:
        model = PeftModel.from_pretrained(model, tmp_path / "first", "first")
        model.load_adapter(tmp_path / "second", "second")
    changes = [weight_changes(model, name) for name in ("first", "second")]
    options = {"method": "spectral", "allow_overlap": True}
    fuse(model, ["first", "second"], [1, 0], **options)
    base, first = mlp(), mlp()
    merge_changes(first, changes[0])
    assert_near(model(x), first(x))
    plain = fuse_and_unload(model, ["first", "second"], [0, 1], **options)
    merge_changes(base, changes[1])
    assert_near(plain(x), base(x))
    assert not any("spectral" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("method", ["delta", "fedavg"])
@pytest.mark.parametrize(
    "adapter",
    [
        config(SODAConfig, target_modules=["0", "2.1"]),
        config(SpectralAdapterRConfig, r=3, target_modules=["0", "2.0", "2.1"]),
        LoraConfig(target_modules=["0", "2.1"], init_lora_weights=False, lora_alpha=3),
    ],
    ids=lambda value: value.peft_type.value,
)
def test_merged_sums_of_any_adapters(adapter, method):
    model = held({"first": adapter, "second": adapter}, layered)
    x, outputs = images(), {}
    base = {n: p.detach().clone() for n, p in layered().named_parameters()}
    for name in ("first", "second"):
        model.set_adapter(name)
        outputs[name] = model(x)
    changes = [weight_changes(model, name) for name in ("first", "second")]
    assert outputs["first"].shape == outputs["second"].shape
    for name in ("first", "second"):
        once = layered()
        merge_changes(once, changes[name == "second"])
        assert_near(once(x), outputs[name], factor=5)
    plain = fuse_and_unload(model, ["first", "second"], [3, 1], method=method)
    shares = (0.75, 0.25) if method == "fedavg" else (3, 1)
    for name, parameter in plain.named_parameters():
        change = sum(
            share * found.get(name.removesuffix(".weight"), torch.zeros(1))
            for share, found in zip(shares, changes, strict=True)
        )
        if change.dim() == 2 and isinstance(plain.get_submodule(name[:-7]), Conv1D):
            change = change.mT
        expected = base[name] + (change.reshape(base[name].shape) if change.dim() == 2 else 0)
        assert_near(parameter, expected)


def test_sums_that_are_adapters_again():
    pair = {n: config(SVDiffConfig, spectrum_activation="identity") for n in ("first", "second")}
    loras = {
        n: LoraConfig(target_modules=["0"], r=r, init_lora_weights=False)
        for n, r in (("first", 2), ("second", 3))
    }
    for adapters in (pair, loras, {n: config(LiDBConfig, a=5, b=4) for n in ("first", "second")}):
        model = held(adapters)
        fuse(model, ["first", "second"], [0.5, -1], method="delta")
        total = fuse_changes(
            [weight_changes(model, n) for n in ("first", "second")], [0.5, -1], method="delta"
        )
        for name, change in weight_changes(model, "fused").items():
            assert_near(change, total[name])
    model = held(pair)
    for layer in (model.get_base_model()[0], model.get_base_model()[2]):
        layer.set_scale("first", 3.0)
    scaled = weight_changes(model, "first")
    fuse(model, ["first", "second"], [1, 0], method="delta")
    for name, change in weight_changes(model, "fused").items():
        assert_near(change, scaled[name])
    model = held(
        {
            n: config(SpectralAdapterAConfig, r=1, offset=i)
            for i, n in enumerate(("first", "second"))
        }
    )
    model.get_base_model()[0].set_scale("second", 0.5)
    with pytest.raises(ValueError, match=r"must have scale 1 to be combined; \['second'\]"):
        fuse(model, ["first", "second"], method="spectral")


def test_gradient_fusion_of_a_model():
    pair = {n: config(SpectralAdapterAConfig, r=4) for n in ("cat", "dog")}
    model = held(pair, lambda: mlp(torch.float64))
    data = dict(zip(pair, concept(40, 12, [[0, 1, 2], [3, 4, 5]]), strict=True))
    moments, outputs = [], {}
    for name, x in data.items():
        model.set_adapter(name)
        with adapter_moments(model, list(pair)) as found:
            outputs[name] = model(x.mT)
        moments.append(found)
    changes = [weight_changes(model, name) for name in pair]
    added = mlp(torch.float64)
    merge_changes(added, fuse_changes(changes, method="delta"))
    options = {"method": "gradient", "moments": moments}
    plain = fuse_and_unload(model, list(pair), regularization=1e-9, **options)
    for name, x in data.items():
        target = changes[list(pair).index(name)]["0"] @ x
        base = mlp(torch.float64)[0].weight
        assert_near((plain[0].weight - base) @ x, target, factor=1e6)
        error = (plain(x.mT) - outputs[name]).norm()
        assert float(error) < 0.7 * float((added(x.mT) - outputs[name]).norm())


def test_orthogonal_adaptation():
    rows = {"first": [0, 5], "second": columns_for("dog", 12, 2, bias="none")}
    assert not set(rows["first"]) & set(rows["second"])
    model = held({n: LoraConfig(target_modules=["0"], r=2) for n in rows})
    for name, chosen in rows.items():
        model.set_adapter(name)
        init_orthogonal_lora(model, {"0": chosen}, name)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 1 and f"lora_B.{name}" in trained.pop()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        x = torch.randn(9, 12)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    changes = [weight_changes(model, name) for name in rows]
    assert crosstalk(changes[0]["0"], changes[1]["0"]) < 1e-6
    # Inputs of one concept are answered as if it were alone.
    x = orthonormal_rows(12, rows["first"]).float()
    plain = fuse_and_unload(model, list(rows), method="orthogonal")
    alone = merge_changes(mlp(), changes[0])
    assert float((plain[0](x) - alone[0](x)).abs().max()) < 1e-6
    model = held({"first": LoraConfig(target_modules=["0"], r=2)})
    with pytest.raises(ValueError, match="rows must hold as many indices as the LoRA's rank"):
        init_orthogonal_lora(model, [1, 2, 3], "first")
    conv = get_peft_model(layered(), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="must be a LoRA of linear layers; 0 is a Conv2d"):
        init_orthogonal_lora(conv, range(8))


def test_changes_as_lora(tmp_path):
    pair = {
        "first": config(SpectralAdapterRConfig, r=2, target_modules=["0", "2.0"]),
        "second": config(SpectralAdapterRConfig, r=2, offset=2, target_modules=["0"]),
    }
    model = held(pair, layered)
    fused = fuse_changes([weight_changes(model, n) for n in pair], method="delta")
    one = {"0": weight_changes(model, "first")["0"]}
    lora = changes_to_lora(model, one)
    assert lora.rank == 2
    x = images()
    exact = merge_changes(layered(), one)(x)
    loaded = inject_adapter_in_model(lora.config, layered())
    peft.set_peft_model_state_dict(loaded, lora.state_dict)
    assert_near(loaded(x), exact, factor=5)
    assert changes_to_lora(model, fused, rank=1).errors["0"] > 0.1
    with pytest.raises(ValueError, match="the change of 0 has full rank"):
        changes_to_lora(layered(), {"0": torch.randn(6, 36)})
    with pytest.raises(ValueError, match="changes must not be empty"):
        changes_to_lora(layered(), {})


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize(
    ("adapters", "options", "error", "message"),
    [
        (None, {}, TypeError, "adapters must be a list of names of adapters; got None"),
        ("first", {}, TypeError, "adapters must be a list of names of adapters; got 'first'"),
        ([], {}, ValueError, r"adapters must name adapters .* got \[\]"),
        ([["first"]], {}, ValueError, "adapters must name adapters"),
        (["first"], {"weights": 1.0}, ValueError, "weights must hold one finite number"),
        (["first"], {"weights": [float("nan")]}, ValueError, "weights must hold one finite"),
        (["first"], {"allow_overlap": True}, ValueError, "allow_overlap is for method"),
    ],
)
def test_bad_arguments_of_fusions(adapters, options, error, message, injected):
    model = mlp()
    chosen = config(SVDiffConfig, spectrum_activation="identity")
    if injected:
        inject_adapter_in_model(chosen, model, "first")
    else:
        model = get_peft_model(model, chosen, "first")
    for function in (fuse, fuse_and_unload):
        with pytest.raises(error, match=message):
            function(model, adapters, method="delta", **options)
    for name in ("", "a.b", None):
        with pytest.raises(ValueError, match="adapter_name must be a non-empty str without a dot"):
            fuse(model, ["first"], method="delta", adapter_name=name)
    assert list(model.peft_config) == ["first"]


def test_bad_regularization():
    changes, moments = [{"x": torch.ones(3, 4)}], [{"x": torch.eye(4)}]
    with pytest.raises(TypeError, match="regularization must be a number; got 'x'"):
        fuse_changes(changes, method="gradient", moments=moments, regularization="x")


def test_rows_that_do_not_fit_change_nothing():
    model = held({"first": LoraConfig(target_modules=["0", "2"], r=2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for rows, error, message in (
        ({"0": [0, 1]}, ValueError, "rows must have every layer of the LoRA; got none for 2"),
        ({"0": [0, 1], "2": [0, 99]}, ValueError, "different indices from 0 to 19"),
        (3, TypeError, "rows must be a list of ints or a dict of such lists; got 3"),
    ):
        with pytest.raises(error, match=message):
            init_orthogonal_lora(model, rows, "first")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], r"tasks is \[\] in .*columns.json"),
        ({"cat": "xyz"}, r"'cat' has 'xyz' in .*columns.json"),
        ({"cat": [0, 1.5]}, r"'cat' has \[0, 1.5\]"),
    ],
)
def test_registries_of_another_kind_are_refused(tasks, message, tmp_path):
    path = tmp_path / "columns.json"
    path.write_text(json.dumps({"rank": 8, "tasks": tasks}))
    with pytest.raises(ValueError, match=message):
        ColumnAllocator(8, 2, registry=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1": torch.ones(2, 2)}, "1 is none"),
        ({"nowhere": torch.ones(2, 2)}, "nowhere is none"),
        ({"0": torch.ones(12, 20)}, r"for 0 of shape \(20, 12\)"),
        ({"2": torch.ones(8, 20), "0": torch.full((20, 12), float("inf"))}, "must be finite"),
        ({"2": torch.ones(8, 20), "0": [1]}, r"changes\['0'\] must be a torch.Tensor; got list"),
        ([torch.ones(20, 12)], "changes must be a dict from layers to tensors"),
    ],
)
def test_changes_that_do_not_fit_change_nothing(changes, message):
    model = mlp()
    inject_adapter_in_model(config(SODAConfig), model)
    with pytest.raises((TypeError, ValueError), match=message):
        merge_changes(model, changes)
    with pytest.raises(ValueError, match=r"of layers with a matrix.*; 0 is none"):
        merge_changes(nn.Sequential(nn.LayerNorm(4)), {"0": torch.zeros(4, 1)})
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model[2].get_base_layer().weight, mlp()[2].weight)


def test_adapters_that_do_more_than_change_weights_are_refused():
    whole = {"first": config(SVDiffConfig, modules_to_save=["4"])}
    lora = {"target_modules": ["0"], "init_lora_weights": False}
    for adapters, message in (
        (whole, r"its modules_to_save is \['4'\]"),
        ({"first": LoraConfig(bias="all", **lora)}, "its bias is 'all'"),
        ({"first": LoraConfig(use_dora=True, **lora)}, "0 is a DoraLinearVariant"),
        (
            {"first": peft.OFTConfig(target_modules=["0"], oft_block_size=4)},
            "must be of a method of",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            weight_changes(held(adapters), "first")
    model = held({"first": config(SVDiffConfig)})
    with pytest.raises(ValueError, match="adapters must name adapters of this model, each once"):
        fuse(model, ["first", "first"], method="delta")
    with pytest.raises(ValueError, match=r"adapters must name adapters .* got \['second'\]"):
        fuse_and_unload(model, ["second"], method="delta")
    with pytest.raises(ValueError, match="method must be one of"):
        fuse(model, ["first"], method="gradient")
    with pytest.raises(ValueError, match="allow_overlap is for method"):
        fuse(model, ["first"], method="delta", allow_overlap=True)


# Pipelines and the command line.

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A base pipeline and adapters that were made on it one by one."""
    root = tmp_path_factory.mktemp("shelf")
    base = tiny_pipeline(root / "tokenizer")
    base.save_pretrained(root / "base")
    base = root / "base"
    made = {
        "a0": SpectralAdapterAConfig(target_modules=TARGETS, r=2, init_weights=False),
        "a1": SpectralAdapterAConfig(target_modules=TARGETS, r=2, offset=2, init_weights=False),
        "soda0": SODAConfig(target_modules=TARGETS, init_weights=False),
        "soda1": SODAConfig(target_modules=TARGETS, init_weights=False),
        "svdiff": SVDiffConfig(
            target_modules=TARGETS, spectrum_activation="identity", init_weights=False
        ),
    }
    for index, (name, chosen) in enumerate(made.items()):
        pipe = opened(base)
        torch.manual_seed(index)
        pipe.unet.add_adapter(chosen)
        if name == "a1":
            pipe.text_encoder.add_adapter(
                SpectralAdapterAConfig(target_modules=["q_proj"], r=2, init_weights=False)
            )
        save_adapter(pipe, root / name)
    return root


def opened(base):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


def weights_of(pipe):
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}


def sum_of(shelf, names, weights):
    """The merged weights of a sum, one adapter after the other, by the library's other way."""
    start = weights_of(opened(shelf / "base"))
    total = {key: value.double() for key, value in start.items()}
    for name, weight in zip(names, weights, strict=True):
        pipe = opened(shelf / "base")
        load_adapter(pipe, shelf / name)
        for part in ("unet", "text_encoder"):
            module = getattr(pipe, part)
            for key, layer in module.named_modules():
                if "default" in getattr(layer, "configs", {}):
                    total[f"{part}.{key}.weight"] += weight * layer.get_delta_weight("default")
    return total


def run(shelf, output, *words, moments=()):
    adapters = [str(shelf / word) if "--" not in word else word for word in words]
    options = ["--base", str(shelf / "base"), "--output", str(output)]
    return cli.main(["fuse", *adapters, *options, *(["--moments", *moments] if moments else [])])


def check_merged(folder, expected):
    for key, value in weights_of(opened(folder)).items():
        assert_near(value, expected[key].float(), factor=5)


def test_command_line_writes_a_fused_adapter(shelf, tmp_path, capsys):
    assert run(shelf, tmp_path / "fused", "a0", "a1", "--method=spectral") == 0
    output = capsys.readouterr().out
    assert "no column is changed by several adapters" in output
    assert "crosstalk of a0 and a1" in output and "written:" in output and "adapter" in output
    expected = sum_of(shelf, ["a0", "a1"], [1, 1])
    pipe = opened(shelf / "base")
    load_adapter(pipe, tmp_path / "fused")
    from spectral_adapters.diffusers import export_merged

    export_merged(pipe, tmp_path / "merged")
    check_merged(tmp_path / "merged", expected)
    assert run(shelf, tmp_path / "both", "a0", "a1=1", "--method=spectral", "--merged") == 0
    check_merged(tmp_path / "both", expected)
    assert run(shelf, tmp_path / "end", "soda0=0", "soda1=1", "--method=geodesic") == 0
    kept = load_file(tmp_path / "end" / "unet" / "adapter_model.safetensors")
    for key, value in load_file(shelf / "soda1" / "unet" / "adapter_model.safetensors").items():
        assert torch.equal(kept[key], value), key
    assert run(shelf, tmp_path / "svdiff", "svdiff=0.5", "--method=delta") == 0
    assert "adapter" in capsys.readouterr().out.splitlines()[-1]


def test_command_line_merges_and_cuts(shelf, tmp_path, capsys):
    words = ["soda0=0.5", "a1=2", "--method=delta"]
    assert run(shelf, tmp_path / "merged", *words, "--merged") == 0
    check_merged(tmp_path / "merged", sum_of(shelf, ["soda0", "a1"], [0.5, 2]))
    assert "soda0" in capsys.readouterr().out
    assert run(shelf, tmp_path / "cut", *words, "--rank=2") == 0
    assert "relative error of the change" in capsys.readouterr().out
    assert run(shelf, tmp_path / "average", "a0", "a0=3", "--method=fedavg") == 0
    assert "layers, exact" in capsys.readouterr().out
    pipe = opened(shelf / "base")
    pipe.load_lora_weights(tmp_path / "average")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = sum_of(shelf, ["a0"], [1])
    for key, value in weights_of(pipe).items():
        assert_near(value, expected[key].float(), factor=50)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    files = []
    pipe = opened(shelf / "base")
    load_adapter(pipe, shelf / "a0")
    size = {f"unet.{name}": change.shape[1] for name, change in weight_changes(pipe.unet).items()}
    for index in range(2):
        # Concept 0 has even inputs, concept 1 odd ones.
        moments = {}
        for name, n in size.items():
            moments[name] = torch.diag((torch.arange(n) % 2 == index).double()).contiguous()
        files.append(str(tmp_path / f"{index}.safetensors"))
        save_file(moments, files[-1])
    words = ["a0", "soda1", "--method=gradient", "--merged"]
    assert run(shelf, tmp_path / "gradient", *words, moments=files) == 0
    found = weights_of(opened(tmp_path / "gradient"))[f"{layer}.weight"]
    for index, name in enumerate(("a0", "soda1")):
        alone = sum_of(shelf, [name], [1])[f"{layer}.weight"]
        assert_near(found[:, index::2], alone[:, index::2].float(), factor=5)


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        (["a0", "a1", "--method=spectral"], [1, 1]),
        (["a0", "a1", "--method=spectral", "--merged"], [1, 1]),
        (["soda0=0.5", "a1=2", "--method=delta", "--merged"], [0.5, 2]),
        (["a0", "a0=3", "--method=fedavg"], [0.25, 0.75]),
    ],
)
def test_command_line_draws_a_sheet(words, weights, shelf, tmp_path, monkeypatch):
    from spectral_adapters.personalize import evaluation, report

    pages = []
    monkeypatch.setattr(report, "sheet", lambda *args: pages.append(args) or Image.new("1", (1, 1)))
    prompts = ["a cat", "a cat and a dog"]
    options = ["--sample-steps=2", "--guidance-scale=3", "--seed=5"]
    paths = [word if "--" in word else str(shelf / word) for word in words]
    where = ["--base", str(shelf / "base"), "--output", str(tmp_path / "out")]
    assert cli.main(["fuse", *paths, *where, "--sheet", *prompts, *options]) == 0
    assert (tmp_path / "out" / "sheet.png").is_file()
    ((names, columns),) = pages
    adapters = [word.split("=")[0] for word in words[:2]]
    titles = [adapters[0], adapters[1] + "_1" * (adapters[1] == adapters[0])]
    assert names == prompts and list(columns) == ["base model", *titles, "fused"]

    sampling = evaluation.Sampling(2, 3.0, 4, (16, 16), 5)
    for title, factors in zip(columns, ([0, 0], [1, 0], [0, 1], weights), strict=True):
        pipe = opened(shelf / "base")
        total = sum_of(shelf, adapters, factors)
        for part in ("unet", "text_encoder"):
            module = getattr(pipe, part)
            state = {key: total[f"{part}.{key}"].float() for key in module.state_dict()}
            module.load_state_dict(state)
        expected = evaluation.draw(pipe, prompts, sampling)
        assert_near(columns[title], expected, factor=100)
        if title != "base model":
            assert not torch.allclose(columns[title], columns["base model"], atol=1e-3)


def test_files_of_moments_are_checked(shelf, tmp_path, capsys):
    words = ["a0", "--method=gradient", "--merged"]
    (tmp_path / "text").write_text("nothing")
    assert run(shelf, tmp_path / "out", *words, moments=[str(tmp_path / "text")]) == cli.USAGE_ERROR
    assert "moments must be safetensors files" in capsys.readouterr().err
    save_file({"unet.conv_in": torch.eye(2)}, tmp_path / "few")
    assert run(shelf, tmp_path / "out", *words, moments=[str(tmp_path / "few")]) == cli.USAGE_ERROR
    assert "moments[0] must have every changed layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a0", "a0", "--method=spectral"], "columns [0, 1] of a0 and a0_1"),
        (["a0", "soda0", "--method=spectral"], "adapters must be of one method for 'spectral'"),
        (["a0=x", "--method=delta"], "the weight must be a number; got 'x'"),
        (["nowhere", "--method=delta"], "nowhere cannot be loaded: folder must hold an adapter"),
        (["soda0", "--method=delta"], "has full rank"),
        (["a0", "--method=gradient"], "--moments is for --method gradient"),
        (["a0", "a1", "--method=gradient", "--moments=--x"], "one file for each of 2 adapters"),
        (["a0", "--method=delta", "--merged", "--rank=3"], "--rank is for LoRAs"),
        (["a0", "--method=spectral", "--rank=3"], "rank must be None"),
        (["a0", "--method=fedavg", "--allow-overlap"], "--allow-overlap is for --method spectral"),
        (["a0", "a0", "--method=orthogonal"], "changes must be orthogonal"),
        (["a0", "--method=delta", "--seed=1"], "--seed is for --sheet"),
        (["a0", "--method=delta", "--sheet= "], "--sheet must hold prompts that are not empty"),
        (
            ["a0", "--method=delta", "--sheet=x", "--sample-steps=0"],
            "--sample-steps must be at least 1; got 0",
        ),
    ],
)
def test_command_line_refuses(words, message, shelf, tmp_path, capsys):
    assert run(shelf, tmp_path / "out", *words) == cli.USAGE_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_base_are_refused(shelf, tmp_path, capsys):
    other = opened(shelf / "base")
    with torch.no_grad():
        other.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight += 1
    other.unet.add_adapter(SpectralAdapterAConfig(target_modules=TARGETS, r=2, init_weights=False))
    save_adapter(other, tmp_path / "stranger")
    with pytest.raises(ValueError, match=r"stranger cannot be loaded: .* another base weight"):
        fuse_adapters(
            opened(shelf / "base"),
            tmp_path / "out",
            [shelf / "a0", tmp_path / "stranger"],
            method="delta",
        )


def test_the_command_line_knows_the_methods():
    assert set(cli.FUSION_METHODS) == set(FUSION_METHODS)
    assert all(a != b for a, b in pairwise(sorted(FUSION_METHODS)))
