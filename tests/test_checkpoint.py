"""Checkpoints: whole or absent whenever the process dies, and no pickles.

This file is also a script: training in two processes, one of which may die.
"""

import contextlib
import copy
import errno
import faulthandler
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from spectral_adapters import RotationBank, SODALinear, StiefelAdam, StiefelSGD
from spectral_adapters.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from spectral_adapters.optim import stiefel_param_groups

TIMEOUT = 60
STEPS = 8
ACCUMULATION = 2

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def _one_thread():
    """Bits depend on the number of threads, and a fork keeps but one of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- training that is watched


def base_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))


def adapted_model(parametrization="cayley"):
    pytest.importorskip("peft")
    from peft import get_peft_model

    from spectral_adapters.peft import SODAConfig

    config = SODAConfig(target_modules=["0", "3"], parametrization=parametrization)
    return get_peft_model(base_model(), config)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS = {
    "AdamW": ("cayley", lambda m: torch.optim.AdamW(trained(m), lr=0.05, weight_decay=0.1)),
    "amsgrad": ("cayley", lambda m: torch.optim.Adam(trained(m), lr=0.05, amsgrad=True)),
    "SGD": ("cayley", lambda m: torch.optim.SGD(trained(m), lr=0.1, momentum=0.9, nesterov=True)),
    "RMSprop": ("cayley", lambda m: torch.optim.RMSprop(trained(m), lr=0.01, momentum=0.5)),
    "StiefelAdam": (
        "stiefel",
        lambda m: StiefelAdam(stiefel_param_groups(m, lr=0.02), lr=0.05, reproject_every=2),
    ),
    "StiefelSGD": (
        "stiefel",
        lambda m: StiefelSGD(stiefel_param_groups(m), lr=0.1, momentum=0.9, reproject_every=3),
    ),
}


def warm_up_then_cosine(optimizer):
    schedulers = torch.optim.lr_scheduler
    parts = [
        schedulers.LinearLR(optimizer, 0.2, total_iters=2),
        schedulers.CosineAnnealingLR(optimizer, 4),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


class Run:
    """A training loop in which everything random matters, step by micro-step."""

    def __init__(self, name):
        parametrization, build = OPTIMIZERS[name]
        self.model = adapted_model(parametrization)
        self.optimizer = build(self.model)
        self.scheduler = warm_up_then_cosine(self.optimizer)
        self.noise = torch.Generator().manual_seed(5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.micro = 0
        self.losses = []
        torch.manual_seed(11)
        np.random.seed(12)  # noqa: NPY002
        random.seed(13)

    def parts(self):
        return (self.model, self.optimizer, self.scheduler)

    def stateful(self):
        return {"noise": self.noise, "scaler": self.scaler}

    def train(self, until, folder=None):
        while self.micro < until:
            epoch, position = divmod(self.micro, 3)
            order = torch.randperm(3, generator=torch.Generator().manual_seed(epoch))
            x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(9))[order[position]]
            x = x + 0.1 * torch.randn(x.shape, generator=self.noise)
            x = x * (1 + 0.1 * random.gauss(0, 1)) + 0.1 * np.random.randn()  # noqa: NPY002
            loss = (self.model(x) - x[:, :4].sin()).square().mean()
            self.scaler.scale(loss).backward()
            self.losses.append(loss.item())
            self.micro += 1
            if self.micro % ACCUMULATION == 0:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.scheduler.step()
            if folder is not None:
                self.save(folder)

    def save(self, folder, **options):
        options = {"stateful": self.stateful(), "keep": 100, **options}
        return save_checkpoint(folder, *self.parts(), step=self.micro, **options)

    def load(self, path):
        found = load_checkpoint(path, *self.parts(), stateful=self.stateful())
        self.micro = found.step

    def numbers(self):
        """Everything that a further step depends on, flat."""
        states = self.optimizer.state_dict()["state"].values()
        return {
            **{name: p.detach() for name, p in self.model.named_parameters()},
            **{f"{i}.{k}": v for i, state in enumerate(states) for k, v in state.items()},
            "rates": torch.tensor([g["lr"] for g in self.optimizer.param_groups]).double(),
            "scale": torch.tensor(self.scaler.get_scale()),
            "torch": torch.get_rng_state(),
            "noise": self.noise.get_state(),
            "others": torch.tensor([random.random(), np.random.rand()]).double(),  # noqa: NPY002
        }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_is_uninterrupted_to_the_bit(name, tmp_path):
    """From every micro-step, between two of one optimizer step too."""
    straight = Run(name)
    start = straight.numbers()
    straight.train(STEPS, tmp_path)
    expected = straight.numbers()
    for key in ("torch", "noise", "others", "scale", "rates"):
        assert not torch.equal(expected[key], start[key]), key
    for micro in range(1, STEPS):
        resumed = Run(name)
        torch.manual_seed(99 + micro)
        resumed.load(tmp_path / f"step-{micro:08d}")
        assert resumed.micro == micro
        resumed.train(STEPS)
        assert resumed.losses == straight.losses[micro:]
        assert_same(expected, resumed.numbers())


def test_steps_of_the_schedule_survive(tmp_path):
    """Re-projection comes at the step that it would have come at."""
    run = Run("StiefelAdam")
    run.train(6, tmp_path)
    group = run.optimizer.param_groups[0]
    assert (group["manifold"], group["steps"], group["reproject_every"]) == (True, 3, 2)
    other = Run("StiefelAdam")
    other.load(latest_checkpoint(tmp_path))
    assert other.optimizer.param_groups[0]["steps"] == 3


def test_a_checkpoint_is_a_loadable_adapter(tmp_path):
    from peft import PeftModel

    run = Run("AdamW")
    run.train(4, tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), latest_checkpoint(tmp_path)).eval()
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), run.model.eval()(x))
    assert not torch.equal(loaded(x), base_model().eval()(x))


def test_everything_trained_is_saved(tmp_path):
    """A second adapter and an unfrozen base parameter, which the first adapter's file lacks."""
    from spectral_adapters.peft import SODAConfig

    def build():
        model = adapted_model()
        model.add_adapter("second", SODAConfig(target_modules=["0"]))
        for name, parameter in model.named_parameters():
            if ".second" in name or name.endswith("0.base_layer.bias"):
                parameter.requires_grad_(True)
        return model

    model = build()
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn_like(parameter))
    path = save_checkpoint(tmp_path, model, torch.optim.SGD(trained(model), 0.1), step=1)
    other = build()
    load_checkpoint(path, other, torch.optim.SGD(trained(other), 0.1))
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


def test_prepared_objects_are_taken_as_they_are(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def prepared():
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = adapted_model("stiefel")
        optimizer = StiefelAdam(stiefel_param_groups(model), lr=0.05)
        return accelerator, accelerator.prepare(model, optimizer, warm_up_then_cosine(optimizer))

    def train(accelerator, parts, steps):
        model, optimizer, scheduler = parts
        for _ in range(steps):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(5, 6)).square().mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    accelerator, parts = prepared()
    train(accelerator, parts, 4)
    path = save_checkpoint(tmp_path, *parts, step=4)
    train(accelerator, parts, 4)
    again, resumed = prepared()
    assert load_checkpoint(path, *resumed).step == 4
    train(again, resumed, 4)
    assert_same(dict(parts[0].named_parameters()), dict(resumed[0].named_parameters()))
    assert parts[2].get_last_lr() == resumed[2].get_last_lr()


def plain_model(scale=0.0):
    torch.manual_seed(4)
    layer = SODALinear.from_linear(nn.Linear(6, 6), parametrization="stiefel")
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), layer)
    model.append(nn.Linear(6, 6)).append(nn.Linear(6, 6))
    model[4].weight = model[3].weight
    with torch.no_grad():
        model[0].weight.add_(scale)
    return model


def test_models_without_an_adapter_are_saved_whole(tmp_path):
    """Buffers, tied weights, components by name, through torch.compile's wrapper."""
    model = plain_model(0.5)
    model(torch.randn(9, 6))
    path = save_checkpoint(tmp_path, {"a": torch.compile(model), "b": nn.Linear(2, 2)}, step=0)
    other = plain_model()
    load_checkpoint(path, {"a": other, "b": nn.Linear(2, 2)})
    assert_same(model.state_dict(), other.state_dict())
    assert (path / "a" / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="does not fit model"):
        load_checkpoint(path, {"a": nn.Linear(6, 6), "b": nn.Linear(2, 2)})


class Odd:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_states_whose_paths_read_the_same_survive(tmp_path):
    state = {"a.b": 1, "a": {"b": 2, "c": [3]}, "a.c.0": 4, 1: 5, "1": 6}

    def tensors(value):
        if isinstance(value, dict):
            return {key: tensors(entry) for key, entry in value.items()}
        return [tensors(v) for v in value] if isinstance(value, list) else torch.tensor(value)

    stateful = {"x": Odd(tensors(state)), "x.a": Odd({"b": torch.tensor(7)})}
    path = save_checkpoint(tmp_path, nn.Linear(1, 1), step=1, stateful=stateful)
    found = {name: Odd(None) for name in stateful}
    load_checkpoint(path, nn.Linear(1, 1), stateful=found)
    assert found["x"].state == tensors(state)
    assert found["x.a"].state == {"b": torch.tensor(7)}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("argument", ["scheduler", "stateful"])
def test_a_scheduler_gets_its_milestones_back_as_they_were(nested, argument, tmp_path):
    schedulers = torch.optim.lr_scheduler

    def build():
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = schedulers.MultiStepLR(optimizer, [2, 4, 4, 6])
        if nested:
            first = schedulers.LinearLR(optimizer, 0.2, total_iters=2)
            scheduler = schedulers.SequentialLR(optimizer, [first, scheduler], milestones=[1])
        given = {argument: scheduler if argument == "scheduler" else {"s": scheduler}}
        return scheduler, {"model": model, "optimizer": optimizer, **given}

    scheduler, given = build()
    path = save_checkpoint(tmp_path, step=1, **given)
    resumed, given = build()
    load_checkpoint(path, **given)
    inner = resumed._schedulers[1] if nested else resumed
    assert type(inner.milestones) is Counter and inner.milestones == Counter([2, 4, 4, 6])
    with warnings.catch_warnings():
        # Steps by number are deprecated, and there are no steps of the optimizer.
        warnings.simplefilter("ignore")
        for other in (scheduler, resumed):
            other._schedulers[1].step(5) if nested else other.step(5)
    assert resumed.state_dict().keys() == scheduler.state_dict().keys()
    assert resumed.optimizer.param_groups[0]["lr"] == scheduler.optimizer.param_groups[0]["lr"]


def test_states_of_unusual_shape_survive(tmp_path):
    state = {
        1: (1, [2.5, None], {"x": True}),
        "inf": math.inf,
        "half": torch.randn(3).half(),
        "empty": torch.empty(0, 4),
        "view": torch.arange(6).view(2, 3).T,
    }
    path = save_checkpoint(
        tmp_path, nn.Linear(1, 1), step=3, stateful={"odd": Odd(state)}, extra={"a": [1, "é"]}
    )
    odd = Odd(None)
    found = load_checkpoint(path, nn.Linear(1, 1), stateful={"odd": odd})
    assert (found.step, found.extra, found.processes) == (3, {"a": [1, "é"]}, 1)
    assert list(odd.state) == list(state)
    for name, value in state.items():
        same = torch.equal(odd.state[name], value) if torch.is_tensor(value) else None
        assert odd.state[name] == value if same is None else same, name


def test_the_newest_are_kept(tmp_path):
    model = nn.Linear(2, 2)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, step=step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    # The same step again, and an earlier one than a whole and than a broken one.
    with torch.no_grad():
        model.weight.zero_()
    save_checkpoint(tmp_path, model, step=3)
    save_checkpoint(tmp_path, model, step=9, keep=9)
    (tmp_path / "step-00000009" / "state.json").write_text("{}")
    save_checkpoint(tmp_path, model, step=2, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    latest = latest_checkpoint(tmp_path)
    assert latest == tmp_path / "step-00000003"
    assert not load_file(latest / "model.safetensors")["weight"].any()
    assert latest_checkpoint(tmp_path / "nowhere") is None


# ---- death


def in_a_child(action):
    """Run ``action`` in a fork of this process; the wait status."""
    child = os.fork()
    if child == 0:
        # No handlers, no flushing: nothing of the test runner may run twice.
        code = 1
        with contextlib.suppress(BaseException):
            action()
            code = 0
        os._exit(code)
    return os.waitpid(child, 0)[1]


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def die_at_change(folder, number):
    """Have this process killed right before the ``number``-th change of files in a folder."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in CHANGES and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def saved_weight(folder):
    latest = latest_checkpoint(folder)
    model = adapted_model()
    load_checkpoint(latest, model, torch.optim.AdamW(trained(model)))
    return trained(model)[0]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step"])
def test_a_kill_at_any_change_leaves_a_checkpoint(step, tmp_path):
    model = adapted_model()
    optimizer = torch.optim.AdamW(trained(model))
    model(torch.randn(5, 6)).sum().backward()
    optimizer.step()
    before = trained(model)[0].detach().clone()
    save_checkpoint(tmp_path / "start", model, optimizer, step=1)
    with torch.no_grad():
        trained(model)[0].add_(1.0)
    after = trained(model)[0].detach().clone()
    outcomes = []
    for number in range(1, 500):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "start", folder)

        def save(folder=folder, number=number):
            die_at_change(folder, number)
            save_checkpoint(folder, model, optimizer, step=step, keep=1)

        status = in_a_child(save)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = saved_weight(folder)
        assert torch.equal(found, before) or torch.equal(found, after), number
        outcomes.append(torch.equal(found, after))
        # And the next save leaves nothing of it behind.
        save_checkpoint(folder, model, optimizer, step=step + 1, keep=1)
        assert [path.name for path in folder.iterdir()] == [f"step-{step + 1:08d}"], number
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0
    assert len(outcomes) > 20
    # From some point on the new one is there, and stays.
    assert outcomes == sorted(outcomes) and outcomes[-1] and not outcomes[0]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_within_a_file_leaves_a_checkpoint(tmp_path):
    """The kernel kills a process that writes a file beyond its limit, at that byte."""
    model = adapted_model()
    optimizer = torch.optim.AdamW(trained(model))
    first = save_checkpoint(tmp_path, model, optimizer, step=1)
    largest = max(path.stat().st_size for path in first.rglob("*"))
    killed = 0
    for limit in range(1, largest + 1100, 1021):

        def save(limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save_checkpoint(tmp_path, model, optimizer, step=2)

        status = in_a_child(save)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGXFSZ
        assert latest_checkpoint(tmp_path) == first
        killed += 1
    assert status == 0 and killed > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_while_saving_an_adapter_leaves_one(tmp_path):
    from spectral_adapters.diffusers import save_adapter

    def numbers(folder):
        return load_file(folder / "unet" / "adapter_model.safetensors")

    model = adapted_model()
    save_adapter({"unet": model}, tmp_path)
    before = numbers(tmp_path)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(1.0)
    outcomes = []
    for number in range(1, 100):

        def save(number=number):
            die_at_change(tmp_path, number)
            save_adapter({"unet": model}, tmp_path)

        status = in_a_child(save)
        found = numbers(tmp_path)
        name = next(name for name in found if "soda_delta" in name)
        outcomes.append(not torch.equal(found[name], before[name]))
        json.loads((tmp_path / "unet" / "adapter_config.json").read_text())
        if status == 0:
            break
    assert status == 0 and len(outcomes) > 5
    assert outcomes == sorted(outcomes) and outcomes[-1] and not outcomes[0]
    assert len(list((tmp_path / "unet").iterdir())) == 2


# ---- a full disk


def test_a_failing_write_of_any_file_loses_nothing(tmp_path, monkeypatch):
    model = adapted_model()
    optimizer = torch.optim.AdamW(trained(model))
    first = save_checkpoint(tmp_path, model, optimizer, step=1)
    count = sum(path.is_file() for path in first.rglob("*"))
    failed = []
    sync = os.fsync
    for number in range(1, count + 1):
        calls = 0

        def full(descriptor, number=number):
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            save_checkpoint(tmp_path, model, optimizer, step=2)
        failed.append(caught.value.errno)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        verify_checkpoint(first)
    assert failed == [errno.ENOSPC] * count


FULL_DISK = """
import errno, os, sys
from pathlib import Path
import torch
from torch import nn
from spectral_adapters.checkpoint import latest_checkpoint, save_checkpoint

folder = Path(sys.argv[1])
torch.set_num_threads(1)
model = nn.Linear(40, 40)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(3, 40)).sum().backward()
optimizer.step()
first = save_checkpoint(folder / "c", model, optimizer, step=1)
total = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
page, failures = 4096, 0
for free in range(0, total + page, page):
    with open(folder / "filler", "wb") as filler:
        filler.write(bytes(max(0, total - free)))
    try:
        save_checkpoint(folder / "c", model, optimizer, step=2)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        failures += 1
        assert [path.name for path in (folder / "c").iterdir()] == ["step-00000001"]
        assert latest_checkpoint(folder / "c") == first
    else:
        break
    finally:
        (folder / "filler").unlink()
else:
    raise AssertionError("never enough room")
assert latest_checkpoint(folder / "c").name == "step-00000002"
print("failures", failures)
"""


def test_a_file_system_that_is_full(tmp_path):
    """A small one, in a mount namespace of its own, filled to every page."""
    mount = f"mount -t tmpfs -o size=256k none {tmp_path} || exit 77\n"
    command = ["unshare", "-rm", "sh", "-c", mount + '"$0" -P -c "$1" "$2"']
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    done = subprocess.run(
        [*command, sys.executable, FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 8


# ---- files that were changed


@pytest.fixture
def two(tmp_path):
    """A folder of two checkpoints, and the run that wrote them."""
    run = Run("AdamW")
    run.train(4)
    run.save(tmp_path)
    run.train(5)
    run.save(tmp_path)
    return tmp_path, run


DAMAGES = {
    "emptied": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "longer": lambda data: data + b" ",
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle byte": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "removed": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_previous_one_taken(damage, two):
    folder, run = two
    newest, previous = folder / "step-00000005", folder / "step-00000004"
    files = [file for file in newest.rglob("*") if file.is_file()]
    assert len(files) == 6
    for file in files:
        before = file.read_bytes()
        if damage == "longer" and file.name == "manifest.json":
            # A blank after the end is the same JSON.
            continue
        if DAMAGES[damage] is None:
            file.unlink()
        else:
            file.write_bytes(DAMAGES[damage](before))
        with pytest.raises(CheckpointError, match=file.name):
            run.load(newest)
        with pytest.warns(UserWarning, match=rf"{file.name}.*Going back to .*step-00000004"):
            assert latest_checkpoint(folder) == previous
        file.write_bytes(before)
    verify_checkpoint(newest)


def test_any_changed_byte_of_the_manifest_is_noticed(two):
    folder, _ = two
    manifest = folder / "step-00000005" / "manifest.json"
    data = manifest.read_bytes()
    for place in range(len(data)):
        manifest.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError):
            verify_checkpoint(manifest.parent)


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(two):
    folder, _ = two
    for file in folder.glob("*/state.json"):
        file.write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.*state\.json"):
        latest_checkpoint(folder)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickles_are_refused_unread(tmp_path):
    from spectral_adapters.peft import SODAConfig, load_adapter, save_adapter

    mark = tmp_path / "unpickled"
    trap = pickle.dumps(Trap(mark))
    model = nn.Linear(2, 2)
    single, folder, inside = tmp_path / "c.pt", tmp_path / "theirs", tmp_path / "a"
    single.write_bytes(trap)
    with pytest.raises(CheckpointError, match=r"c\.pt is a pickle.*only safetensors.*convert"):
        load_checkpoint(single, model)
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(trap)
    with pytest.raises(CheckpointError, match=r"no manifest\.json: .*pytorch_model\.bin is a pick"):
        load_checkpoint(folder, model)

    from peft import inject_adapter_in_model

    adapted = inject_adapter_in_model(SODAConfig(target_modules=["0"]), base_model())
    save_adapter(adapted, inside)
    weights = inside / "adapter_model.safetensors"
    whole = weights.read_bytes()
    torch.save({"x": torch.ones(1)}, tmp_path / "zip")
    for content, message in (
        (trap, "is a pickle, which can run any code"),
        ((tmp_path / "zip").read_bytes(), "is a pickle, which can run any code"),
        (whole[:-5], "is no whole safetensors file .*take another copy"),
        (b"hello", "is no whole safetensors file"),
    ):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_adapter(base_model(), inside)
    weights.rename(inside / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"does not exist; .*adapter_model\.bin is a pick"):
        load_adapter(base_model(), inside)
    assert not mark.exists()


def test_nothing_in_the_package_reads_pickles():
    import spectral_adapters

    readers = {
        path.name
        for path in Path(spectral_adapters.__file__).parent.rglob("*.py")
        if any(
            word in path.read_text()
            for word in ("torch.load(path", "import pickle", "load_state(", "pickle.load")
        )
    }
    # The network of the image similarity, whose SHA-256 is compared first.
    assert readers == {"similarity.py"}


def test_another_model_or_optimizer_is_refused_before_anything_changes(two):
    folder, _ = two
    path = latest_checkpoint(folder)
    other = Run("AdamW")
    before = {name: p.detach().clone() for name, p in other.model.named_parameters()}

    def load(model=other.model, optimizer=other.optimizer, **options):
        options = {"stateful": other.stateful(), **options}
        load_checkpoint(path, model, optimizer, other.scheduler, **options)

    for message, options in {
        r"stateful must be .*\['noise', 'scaler'\]; got \['noise'\]": {
            "stateful": {"noise": other.noise}
        },
        r"arguments must be .*\['optimizer', 'scheduler'\]; got \['scheduler'\]": {
            "optimizer": None
        },
        r"parameter groups.*without": {"optimizer": torch.optim.AdamW(trained(other.model)[1:])},
        r"optimizer must be of the class .*, AdamW; got SGD": {
            "optimizer": torch.optim.SGD(trained(other.model), 1.0)
        },
        r"must have an adapter": {"model": base_model(), "optimizer": None},
    }.items():
        with pytest.raises(CheckpointError, match=message):
            if options.get("model") is not None:
                bare = save_checkpoint(folder / "bare", adapted_model(), step=0)
                load_checkpoint(bare, options["model"])
            else:
                load(**options)
    assert_same(before, dict(other.model.named_parameters()))
    assert not other.optimizer.state


def test_one_refused_component_leaves_all_as_they_were(tmp_path):
    """The last of several: of another shape, with other parameters, on another base weight."""
    from spectral_adapters.peft import refresh_factors

    def moved(model):
        with torch.no_grad():
            for parameter in trained(model):
                parameter.add_(torch.rand_like(parameter))
        return model

    def plain(**last):
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(**{"in_features": 3, **last}))

    other_base = adapted_model()
    with torch.no_grad():
        other_base.get_base_model()[3].base_layer.weight.add_(1.0)
    refresh_factors(other_base)
    cases = {
        "shape": (plain(out_features=3), plain(out_features=4), CheckpointError),
        "keys": (plain(out_features=3), plain(out_features=3, bias=False), CheckpointError),
        "config": (adapted_model(), adapted_model("stiefel"), CheckpointError),
        "base": (moved(adapted_model()), moved(other_base), RuntimeError),
    }

    def models(last):
        return {"a": moved(adapted_model()), "b": nn.Linear(2, 2), "c": last}

    for name, (saved, here, error) in cases.items():
        path = save_checkpoint(tmp_path / name, models(saved), step=1)
        parts = models(here)
        before = {part: copy.deepcopy(model.state_dict()) for part, model in parts.items()}
        with pytest.raises(error):
            load_checkpoint(path, parts)
        for part, model in parts.items():
            assert_same(before[part], model.state_dict())


def test_other_classes_and_models_are_refused(tmp_path):
    """Also by a checkpoint from before they were named, and shapes of what is trained outside."""

    def build(bias=False):
        model = adapted_model()
        model.get_base_model()[0].base_layer.bias.requires_grad_(bias)
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    path = save_checkpoint(tmp_path / "new", *build(), step=1)
    model, optimizer, _ = build()
    with pytest.raises(CheckpointError, match=r"scheduler must be .*, StepLR; got ExponentialLR"):
        load_checkpoint(
            path, model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        )
    adam = torch.optim.AdamW(trained(model))
    step = torch.optim.lr_scheduler.StepLR(adam, 2)
    with pytest.raises(CheckpointError, match=r"optimizer must be .*, SGD; got AdamW"):
        load_checkpoint(path, model, adam, step)
    edit_state(path, lambda state: [state.pop(name) for name in ("classes", "components")])
    with pytest.raises(CheckpointError, match=r"has no \['amsgrad', 'betas'.*got AdamW"):
        load_checkpoint(path, model, adam, step)
    assert load_checkpoint(path, *build()).step == 1

    two = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    path = save_checkpoint(tmp_path / "two", two, step=1)
    with pytest.raises(CheckpointError, match=r"models must be .*\['a', 'b'\]; got \['a'\]"):
        load_checkpoint(path, {"a": two["a"]})

    path = save_checkpoint(tmp_path / "outside", *build(bias=True), step=1)
    model, optimizer, scheduler = build(bias=True)
    model.get_base_model()[0].base_layer.bias.data = torch.zeros(9)
    with pytest.raises(CheckpointError, match=r"bias must have shape \(8,\) and has \(9,\)"):
        load_checkpoint(path, model, optimizer, scheduler)


def edit_state(path, edit):
    """Change what a checkpoint says, and its manifest with it."""
    file, manifest = path / "state.json", json.loads((path / "manifest.json").read_text())
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"]["state.json"] = {"bytes": file.stat().st_size, "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must be at least 0; got -1"),
        ({"step": 1.0}, TypeError, r"step must be an int; got 1\.0"),
        ({"keep": 0}, ValueError, "keep must be at least 1; got 0"),
        ({"extra": {"x": {1, 2}}}, TypeError, "extra must be made of"),
        ({"extra": {1: 2}}, TypeError, "extra must be made of"),
        ({"extra": [1]}, TypeError, r"extra must be made of .*got \[1\]"),
        ({"stateful": {"x": 3}}, TypeError, r"stateful\['x'\] must be a torch\.Generator"),
        ({"stateful": [1]}, TypeError, r"stateful must be a dict with strings for keys; got \[1\]"),
        ({"stateful": {1: torch.Generator()}}, TypeError, "stateful must be a dict with strings"),
        ({"optimizer": "adam"}, TypeError, r"optimizer must be a torch\.optim\.Optimizer; got str"),
        ({"scheduler": "cosine"}, TypeError, "scheduler must .*state_dict; got str"),
        ({"model": {}}, TypeError, "model must be a module, or a dict"),
        ({"model": {"../x": nn.Linear(1, 1)}}, ValueError, r"got '\.\./x'"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1)},
            ValueError,
            r"optimizer must train parameters of model; group 0 has one of shape \(3,\)",
        ),
    ],
)
def test_bad_arguments_are_named(options, error, message, tmp_path):
    options = {"model": nn.Linear(2, 2), "step": 1, **options}
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path, **options)
    assert not list(tmp_path.iterdir())
    if error is TypeError and options.keys() & {"stateful", "optimizer", "scheduler"}:
        path = save_checkpoint(tmp_path, nn.Linear(2, 2), step=options.pop("step"))
        with pytest.raises(error, match=message):
            load_checkpoint(path, **options)


def test_a_folder_that_is_no_checkpoint_says_what_to_do(two):
    folder, run = two
    with pytest.raises(CheckpointError, match="take latest_checkpoint"):
        run.load(folder)
    with pytest.raises(FileNotFoundError, match="is not there"):
        run.load(folder / "nowhere")
    manifest = folder / "step-00000005" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("checkpoint/1", "checkpoint/2"))
    with pytest.raises(CheckpointError, match=r"has format 'spectral_adapters\.checkpoint/2'"):
        run.load(manifest.parent)


def test_adapter_of_another_base_is_refused(two, tmp_path):
    folder, _ = two
    run = Run("AdamW")
    with torch.no_grad():
        run.model.get_base_model()[0].base_layer.weight.add_(1.0)
    from spectral_adapters.peft import refresh_factors

    refresh_factors(run.model)
    with pytest.raises(RuntimeError, match="base"):
        run.load(folder / "step-00000005")


# ---- two processes, one of which dies

TOGETHER = 5


@contextlib.contextmanager
def full_disk(full):
    """A disk that is full, or not."""

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patched:
        if full:
            patched.setattr(os, "fsync", no_space)
        yield


def small_model():
    return nn.Sequential(nn.Dropout(0.2), plain_model()[2], nn.Linear(6, 3))


def worker(folder, rank, dying, point):
    """Train with DDP and dropout; process ``dying`` is killed at ``point``, "train" or "save"."""
    signal.alarm(TIMEOUT)
    faulthandler.dump_traceback_later(TIMEOUT - 5)
    store = f"file://{folder}/store {point}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(small_model())
    torch.manual_seed(rank)
    optimizer = StiefelAdam(stiefel_param_groups(model.module), lr=0.05)
    latest = latest_checkpoint(folder / "checkpoints")
    step = 0
    if latest is not None:
        step = load_checkpoint(latest, model, optimizer).step
    while step < TOGETHER:
        loss = model(torch.randn(4, 6)).square().mean()
        if step == 2 and rank == dying and point == "train":
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step == 4 and rank == dying and point == "save":
            # Amid the files of the checkpoint.
            die_at_change(folder / "checkpoints", 9)
        with full_disk(point == "full" and rank == dying and step == 3):
            try:
                save_checkpoint(folder / "checkpoints", model, optimizer, step=step, keep=2)
            except OSError as error:
                (folder / f"told {rank}").write_text(f"{step} {errno.errorcode[error.errno]}")
    if rank == 0:
        tensors = {name: p.detach() for name, p in model.module.named_parameters()}
        save_file(tensors, folder / "result.safetensors")
    # The process ends here, which takes the group down without waiting for the other one.
    dist.barrier()


def together(folder, dying=-1, point="never"):
    """Fork two processes; their exit codes, minus a signal's number. All must end by themselves."""
    folder.mkdir(exist_ok=True)
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                worker(folder, rank, dying, point)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def killed_twice(folder):
    """All launches of the test below, by one process that has imported everything."""
    torch.set_num_threads(1)
    broken = folder / "broken"
    found = {"straight": together(folder / "straight")}
    for rank, point in ((1, "train"), (0, "save")):
        found[point] = together(broken, rank, point)
        shutil.copytree(broken, folder / f"after {point}")
    found["never"] = together(broken)
    found["full"] = together(folder / "full", 0, "full")
    (folder / "codes.json").write_text(json.dumps(found))


@needs_fork
def test_a_process_that_dies_ends_the_job_and_loses_nothing(tmp_path):
    """Killed in training, resumed, killed in saving, resumed: as if nothing had been."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads((tmp_path / "codes.json").read_text())
    # 1: the other process was told by an exception, and did not wait for its alarm.
    killed = -signal.SIGKILL
    assert codes == {
        "straight": [0, 0],
        "train": [1, killed],
        "save": [killed, 1],
        "never": [0, 0],
        "full": [0, 0],
    }, done.stderr
    # A full disk of the first process is told to both, and nothing else becomes of it.
    for rank in range(2):
        assert (tmp_path / "full" / f"told {rank}").read_text() == "3 ENOSPC"
    for point, last in (("train", 2), ("save", 3)):
        place = tmp_path / f"after {point}"
        assert latest_checkpoint(place / "checkpoints").name == f"step-{last:08d}"
        assert not (place / "result.safetensors").exists()
    assert (tmp_path / "after save" / "checkpoints" / ".step-00000004.part").is_dir()
    broken = tmp_path / "broken"
    expected = load_file(tmp_path / "straight" / "result.safetensors")
    for place in (broken, tmp_path / "full"):
        assert_same(expected, load_file(place / "result.safetensors"))
    names = sorted(path.name for path in (broken / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]
    with pytest.warns(UserWarning, match="written by 2 processes and is read by 1"):
        model = small_model()
        optimizer = StiefelAdam(stiefel_param_groups(model))
        load_checkpoint(latest_checkpoint(broken / "checkpoints"), model, optimizer)


def test_gradients_that_wait_cannot_be_saved(tmp_path):
    model = nn.Sequential(SODALinear(6, 6, plan="merged"))
    bank = RotationBank.attach(model)
    with bank.accumulate():
        model(torch.randn(3, 6)).sum().backward()
    with pytest.raises(ValueError, match=r"model must have no gradients that wait.*accumulate\(\)"):
        save_checkpoint(tmp_path, model, step=1)
    assert not list(tmp_path.iterdir())
    model(torch.randn(3, 6)).sum().backward()
    save_checkpoint(tmp_path, model, step=1)


if __name__ == "__main__":
    killed_twice(Path(sys.argv[1]))
