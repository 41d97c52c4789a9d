"""More than one machine: DDP and FSDP2 against one process, each other's checkpoints, and bytes.

This file is also a script: two processes train every model in both layouts, go on from checkpoints
of the other layouts, and leave the numbers for the test to compare with one process.
"""

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import TaskType
from support import randomise
from test_training import RANDOM, adapted, batches
from two_processes import SAME, Traffic, leave_together, run_together

from spectral_adapters import RotationBank, SODALinear
from spectral_adapters.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from spectral_adapters.sharding import hold_factors, is_sharded, shard_adapted

PEFT_METHODS = ("SODA", "Spectral Adapter R", "Spectral Adapter A")
MODELS = (*PEFT_METHODS, "SODALinear")
STEPS, SAVED = 6, 3
LAYOUTS = ("ddp", "fsdp2")


class Alone(nn.Module):
    """Stand-alone layers, called like a language model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = ((32, 24), (24, 24), (24, 32))
        self.blocks = nn.ModuleList(
            nn.Sequential(SODALinear.from_linear(nn.Linear(*size), plan="tokens"), nn.Tanh())
            for size in sizes
        )

    def forward(self, input_ids, labels):
        x = nn.functional.one_hot(input_ids, 32).float()
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(4 * x[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss)


def build(name, *, fresh=False):
    """A model, far from the identity unless it is fresh, and the parts that FSDP gathers."""
    if name == "SODALinear":
        model = Alone()
        for block in model.blocks:
            if not fresh:
                randomise(block[0])
        RotationBank.attach(model)
        return model, list(model.blocks)
    model = adapted(name, TaskType.CAUSAL_LM, **({} if fresh else RANDOM))
    return model, list(model.get_base_model().model.layers)


def laid_out(name, layout, *, fresh=False):
    """(what is called, what is saved, optimizer) of a model in one process or in a layout."""
    model, units = build(name, fresh=fresh)
    called = model
    if layout == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    elif layout == "fsdp2":
        shard_adapted(model, units)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Not Adam: it makes whole steps of the round-off in gradients that vanish.
    return called, model, torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def data():
    several = dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    return batches(TaskType.CAUSAL_LM, STEPS, rank, processes)


def step(called, optimizer, batch):
    optimizer.zero_grad()
    called(**batch).loss.backward()
    optimizer.step()


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def trained_numbers(model):
    return {n: whole(p) for n, p in model.named_parameters() if p.requires_grad}


def train(name, layout, checkpoints):
    """All steps, with a checkpoint on the way; the result, and what the second step exchanged."""
    called, model, optimizer = laid_out(name, layout)
    for number, batch in enumerate(data()):
        with Traffic() as traffic:
            step(called, optimizer, batch)
        if number == 1:
            second = traffic
        if number + 1 == SAVED:
            save_checkpoint(checkpoints, model, optimizer, step=SAVED)
    return trained_numbers(model), second, model


def go_on(name, layout, checkpoints):
    """From a checkpoint of any layout to the end."""
    called, model, optimizer = laid_out(name, layout, fresh=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*written by . processes and is read by.*")
        found = load_checkpoint(latest_checkpoint(checkpoints), model, optimizer)
    for batch in data()[found.step :]:
        step(called, optimizer, batch)
    return trained_numbers(model)


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def stored(model):
    """Bytes of this process's part of frozen factors, other frozen numbers and trained ones."""
    found = {"factors": 0, "frozen": 0, "trained": 0}
    for name, parameter in model.named_parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        if name.rpartition(".")[2] in ("left", "singular_values", "right") and kind == "frozen":
            kind = "factors"
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        found[kind] += size_of([local.detach()])
    return found


def worker(folder, rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in MODELS:
        place = folder / name
        for layout in LAYOUTS:
            result, traffic, model = train(name, layout, place / layout)
            note = {"calls": traffic.calls, "bytes": traffic.bytes, "stored": stored(model)}
            (place / f"{layout} {rank}.json").write_text(json.dumps(note))
            if rank == 0:
                save_file(result, place / f"{layout}.safetensors")
        for layout, source in (
            ("ddp", "single"),
            ("ddp", "fsdp2"),
            ("fsdp2", "single"),
            ("fsdp2", "ddp"),
        ):
            result = go_on(name, layout, place / source)
            if rank == 0:
                save_file(result, place / f"{layout} from {source}.safetensors")
    leave_together()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Everything is run once: one process, then two. By model: folder, start, end, model."""
    folder = tmp_path_factory.mktemp("scaling")
    references = {}
    for name in MODELS:
        start = trained_numbers(build(name)[0])
        end, traffic, model = train(name, "single", folder / name / "single")
        assert not any(call.endswith(("reduce", "gather")) for call in traffic.calls)
        references[name] = SimpleNamespace(
            folder=folder / name, start=start, end=end, model=model, traffic=traffic
        )
    run_together([[__file__, str(folder)]] * 2, folder)
    return references


def assert_end(numbers, run, what):
    assert numbers.keys() == run.end.keys()
    for name, expected in run.end.items():
        assert (expected - run.start[name]).abs().amax() >= 100 * SAME, name
        torch.testing.assert_close(
            numbers[name],
            expected,
            rtol=0,
            atol=SAME,
            msg=lambda text, name=name: f"{what}, {name}: {text}",
        )


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_are_one(name, runs):
    for layout in LAYOUTS:
        numbers = load_file(runs[name].folder / f"{layout}.safetensors")
        assert_end(numbers, runs[name], layout)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_any_layout_loads_in_any_other(name, runs):
    """Also its optimizer: what follows is what one process would have done."""
    for source in ("ddp", "fsdp2"):
        numbers = go_on(name, "single", runs[name].folder / source)
        assert_end(numbers, runs[name], f"single from {source}")
    for file in runs[name].folder.glob("* from *.safetensors"):
        assert_end(load_file(file), runs[name], file.stem)
    assert len(list(runs[name].folder.glob("* from *.safetensors"))) == 4


@pytest.fixture(scope="module")
def plan():
    """``benchmarks/scaling_plan.py``, which is no part of the package."""
    path = Path(__file__).parent.parent / "benchmarks" / "scaling_plan.py"
    spec = importlib.util.spec_from_file_location("scaling_plan", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def notes(run, layout):
    return [json.loads((run.folder / f"{layout} {rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_transform_per_process_and_step(name, layout, runs):
    rotates = name != "Spectral Adapter A"
    for note in notes(runs[name], layout):
        for call in ("cayley_fwd", "cayley_bwd"):
            assert note["calls"].get(call, 0) == rotates, (call, note["calls"])


def planned(name, model, plan):
    """(units, root) of a model as ``benchmarks/scaling_plan.py`` describes it."""
    root, units = [], {}
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        number = next((int(part) for part in parts if part.isdigit()), None)
        unit = root if number is None else units.setdefault(number, [])
        is_ours = parts[-1] in ("left", "singular_values", "right") and name == "SODALinear"
        if not (parameter.requires_grad or is_ours):
            unit.append(plan.Stored(tuple(parameter.shape), parameter.element_size(), "base"))
    for key, layer in model.named_modules():
        if hasattr(layer, "rotation_slots") or hasattr(layer, "_factors"):
            number = next(int(part) for part in key.split(".") if part.isdigit())
            options = {"basis": 4} if "SODA" in name else {"r": layer.r["default"]}
            method = name.removesuffix("Linear")
            shape = layer.out_features, layer.in_features
            units[number] += plan.adapter(method, *shape, **options)
    return list(units.values()), root


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_counts_real_bytes(name, runs, plan):
    run = runs[name]
    units, root = planned(name, run.model, plan)
    everything = [*root, *(tensor for unit in units for tensor in unit)]
    for ranks, layout in ((1, "ddp"), (2, "fsdp2")):
        note = notes(run, layout)[0]
        expected = plan.stored(everything, ranks)
        assert note["stored"]["trained"] == expected["trained"]
        assert note["stored"]["frozen"] == expected["base"]
        if layout == "fsdp2" or name == "SODALinear":
            assert note["stored"]["factors"] == expected["factors"]
    assert notes(run, "ddp")[0]["bytes"]["all_reduce"] == plan.all_reduce(everything)
    sent = notes(run, "fsdp2")[0]["bytes"]
    assert sent["all_gather"] == plan.all_gather(units, root, 2)
    assert sent["reduce_scatter"] == plan.reduce_scatter(everything, 2)


@pytest.mark.parametrize("name", MODELS)
def test_each_process_stores_its_share_of_the_bases(name, runs):
    first, second = notes(runs[name], "fsdp2")
    factors = [note["stored"]["factors"] for note in (first, second)]
    bases = [
        module.basis for module in runs[name].model.modules() if hasattr(module, "singular_values")
    ]
    whole = size_of(tensor for basis in bases for tensor in basis)
    assert sum(factors) == whole
    assert max(factors) <= 0.6 * whole


def test_the_page_shows_what_the_plan_computes(plan):
    assert plan.render() in plan.PAGE.read_text(encoding="utf-8")


def test_factors_are_held_once_and_stay_what_they_are():
    model, _ = build("SODA")
    batch = data()[0]
    expected = model(**batch).logits
    names = set(model.state_dict())
    assert hold_factors(model) == 6
    assert hold_factors(model) == 0
    assert set(model.state_dict()) == names
    assert torch.equal(model(**batch).logits, expected)
    model.bfloat16()
    held = {p.dtype for n, p in model.named_parameters() if "_held" in n}
    assert held == {torch.float32}
    with pytest.raises(ValueError, match="held in parameters cannot be replaced; load the base"):
        model.refresh_factors()
    assert not any(map(is_sharded, model.parameters()))


def test_factors_that_are_not_there_cannot_be_sharded():
    model, _ = build("SODA")
    frozen = next(layer for layer in model.modules() if hasattr(layer, "_factors"))._factors
    frozen["default"].is_stale = True
    with pytest.raises(ValueError, match="must be computed before they are sharded"):
        hold_factors(model)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got list"):
        shard_adapted([], [])


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(Path(sys.argv[1]), int(os.environ["RANK"]))
