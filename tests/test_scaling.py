"""More than one machine: DDP and FSDP2 against one process, each other's checkpoints, and bytes.

This file is also a script: two processes train every model in both layouts, go on from checkpoints
of the other layouts, and leave the numbers for the test to compare with one process.
"""

import json
import os
import sys
import warnings
from collections.abc import Mapping
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
from two_processes import SAME, Traffic, run_together

from spectral_adapters import RotationBank, SODALinear
from spectral_adapters.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from spectral_adapters.peft import SODAConfig
from spectral_adapters.sharding import hold_factors, shard_adapted

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
    dist.barrier()
    dist.destroy_process_group()


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


def notes(run, layout):
    return [json.loads((run.folder / f"{layout} {rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_transform_per_process_and_step(name, layout, runs):
    rotates = name != "Spectral Adapter A"
    for note in notes(runs[name], layout):
        for call in ("cayley_fwd", "cayley_bwd"):
            assert note["calls"].get(call, 0) == rotates, (call, note["calls"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(Path(sys.argv[1]), int(os.environ["RANK"]))
