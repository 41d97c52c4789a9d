"""Checkpoints: training that was stopped goes on as if it had not been.

A checkpoint is one folder, ``step-00000100``, in a folder of checkpoints:

* the adapter, as ``save_adapter`` writes it, so that a checkpoint is a loadable adapter; of models
  without one ``model.safetensors``, their whole state dict;
* ``state.json`` and ``state.safetensors``: optimizer, scheduler, whatever else has a state dict,
  gradients that wait for a step, parameters trained outside of the adapter;
* ``random-0.safetensors``, one per process: the states of Python's, NumPy's and torch's generators;
* ``manifest.json``, written last: size and SHA-256 of every other file.

The folder is written under a hidden name and renamed when it is whole and on the disk; older ones
are removed after that. So a process that is killed at any moment leaves the previous checkpoint,
and a checkpoint without a matching manifest is none. Nothing is pickled, and no pickle is read.

What FSDP2 has sharded is saved whole. So a checkpoint knows nothing of how many processes there
were and what each of them held, and loads into any other layout.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import random
import re
import shutil
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor, nn

from spectral_adapters._files import (
    PICKLE_SUFFIXES,
    load_tensors,
    refusal,
    save_tensors,
    sync,
    tensor_bytes,
)
from spectral_adapters.rotation_bank import RotationBank
from spectral_adapters.sharding import gathered, is_sharded, reshard, spread_like

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
]

FORMAT = "spectral_adapters.checkpoint/1"
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "state.safetensors"
MODEL = "model.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
#: A folder that is being written, or removed.
_HIDDEN = re.compile(r"\.(step-\d{8,})\.(part|old)")


class CheckpointError(ValueError):
    """A checkpoint that is not whole, is something else, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` found.

    Attributes:
        path: of its folder.
        step: steps that were taken.
        processes: that wrote it together.
        extra: what :func:`save_checkpoint` was given.
    """

    path: Path
    step: int
    processes: int
    extra: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: str | Path,
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    *,
    step: int,
    stateful: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    keep: int = 2,
) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep`` up to this step.

    With torch.distributed (DDP, FSDP2, accelerate) all processes call it together; the first one
    writes, and what goes wrong there is raised in all of them.

    Args:
        folder: of the checkpoints; made if it is not there.
        model: a ``PeftModel``, a model with an injected adapter, any other module (saved whole), or
            a dict of such by the name of their component, such as ``{"unet": unet}``. May be
            wrapped by DDP, ``accelerator.prepare`` or ``torch.compile``, or sharded by FSDP2.
        optimizer: any ``torch.optim.Optimizer`` of the model's parameters, bare or prepared.
        scheduler: a learning rate scheduler, bare or prepared.
        step: steps taken, at least 0; the folder's name.
        stateful: other things with ``state_dict`` and ``load_state_dict``, or a
            ``torch.Generator``, by name: a GradScaler, an averaged model, a data loader.
        extra: anything else made of dicts with string keys, lists, numbers, strings and None:
            settings, epoch, position.
        adapter_name: of models with an adapter.
        keep: number of checkpoints, at least 1.

    Returns:
        The folder of the checkpoint.

    Raises:
        TypeError, ValueError: an argument that cannot be saved so that training goes on from it:
            an optimizer of parameters that are not the model's, a state made of other things than
            tensors, numbers and strings.
        OSError: it could not be written, for want of space say. What was written of it is removed,
            and the checkpoints that were there are whole.
    """
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int; got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    components = _components(model)
    _check_objects(optimizer, scheduler, stateful)
    for name, module in components.items():
        bank = RotationBank.of(module)
        if bank is not None and bank.has_waiting_gradients:
            raise ValueError(
                f"{name or 'model'} must have no gradients that wait for their contraction: save "
                "after a backward pass outside of RotationBank.accumulate()"
            )
    tensors: dict[str, Tensor] = {}
    state = {
        "step": step,
        "extra": _checked_extra(extra),
        "versions": {"torch": torch.__version__, "spectral-kernels": _own_version()},
        "components": list(components),
        "classes": _classes(optimizer, scheduler),
        "optimizer": _pack_optimizer(optimizer, components, tensors),
        "scheduler": None if scheduler is None else _pack_object("scheduler", scheduler, tensors),
        "stateful": {
            name: _pack_object(f"stateful[{name!r}]", value, tensors)
            for name, value in (stateful or {}).items()
        },
        "gradients": {
            name: _pack(parameter.grad, f"gradients.{name}", tensors)
            for name, parameter in _named_parameters(components).items()
            if parameter.grad is not None
        },
    }
    contents = {name: _module_tensors(module, adapter_name) for name, module in components.items()}
    state["outside"] = {
        full: _pack(parameter, f"outside.{full}", tensors)
        for name, module in components.items()
        for key, parameter in _trained_outside(module, adapter_name).items()
        for full in (f"{name}.{key}" if name else key,)
    }
    randoms = _from_all(tensor_bytes(_random_states()))
    state["processes"] = len(randoms)
    place = Path(folder) / f"step-{step:08d}"
    failure: OSError | None = None
    if _rank() == 0:
        try:
            _recover(Path(folder))
            part = _hidden(place, "part")
            try:
                part.mkdir(parents=True)
                _write(part, components, adapter_name, contents, state, tensors, randoms)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
            _replace(part, place)
            _prune(Path(folder), step, keep)
        except OSError as error:
            failure = error
    _raise_everywhere(failure, place)
    return place


def load_checkpoint(
    path: str | Path,
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    *,
    stateful: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
) -> Checkpoint:
    """Put model, optimizer, scheduler and random states back to where a checkpoint was written.

    Everything that was saved must be given, made as it was then: models with adapters of the same
    config on the same base weights, optimizers and schedulers of the same classes with the same
    groups. All files are compared with the manifest and all else with what is given before anything
    is changed; models of which one is refused all keep what they have. The adapter alone is loaded
    like any other.

    Args:
        path: the folder of one checkpoint, as :func:`latest_checkpoint` returns it.
        model, optimizer, scheduler, stateful, adapter_name: as for :func:`save_checkpoint`.

    Raises:
        FileNotFoundError: there is no such folder.
        TypeError: an argument is none of what :func:`save_checkpoint` takes.
        CheckpointError: it is no checkpoint, is not whole, was changed, or belongs to another
            model, optimizer, scheduler or adapter. The message names the file and what to do.
        RuntimeError: the adapter was trained on other base weights.

    Warns:
        UserWarning: it was written by another number of processes, whose random states are not
            these.
    """
    folder = Path(path)
    components = _components(model)
    _check_objects(optimizer, scheduler, stateful)
    verify_checkpoint(folder)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    tensors = load_tensors(folder / TENSORS)
    given = {"optimizer": optimizer, "scheduler": scheduler}
    saved = {name: state[name] for name in given if state[name] is not None}
    given = {name: value for name, value in given.items() if value is not None}
    for what, expected, came in (
        ("arguments", saved, given),
        ("stateful", state["stateful"], stateful or {}),
        # Older checkpoints do not say.
        ("models", state.get("components", components), components),
    ):
        if set(expected) != set(came):
            raise CheckpointError(
                f"{what} must be those that were saved in {folder}, {sorted(expected)}; "
                f"got {sorted(came)}"
            )
    _check_classes(folder, state, optimizer, scheduler)
    optimizer_state = None
    if optimizer is not None:
        optimizer_state = _optimizer_state(folder, state["optimizer"], optimizer, components)
    parameters = _named_parameters(components)
    outside = state["outside"]
    strangers = sorted((outside.keys() | state["gradients"].keys()) - parameters.keys())
    if strangers:
        raise CheckpointError(
            f"model must have the parameters of {folder}; it lacks {strangers[:3]}"
        )
    for name, packed in (*outside.items(), *state["gradients"].items()):
        saved_shape, shape = tensors[packed["tensor"]].shape, parameters[name].shape
        if saved_shape != shape:
            raise CheckpointError(
                f"model must have the parameters of {folder}; {name} must have shape "
                f"{tuple(saved_shape)} and has {tuple(shape)}"
            )

    _restore_modules(folder, components, adapter_name)
    with torch.no_grad():
        for name, packed in outside.items():
            parameters[name].copy_(spread_like(_unpack(packed, tensors), parameters[name]))
        for name, parameter in parameters.items():
            packed = state["gradients"].get(name)
            parameter.grad = None
            if packed is not None:
                gradient = _unpack(packed, tensors).to(parameter.device)
                parameter.grad = spread_like(gradient, parameter)
    if optimizer_state is not None:
        unpacked = _unpack(optimizer_state, tensors)
        _spread_state(unpacked["state"], optimizer)
        optimizer.load_state_dict(unpacked)
    if scheduler is not None:
        scheduler.load_state_dict(
            _typed(_unpack(state["scheduler"], tensors), _unprepared(scheduler))
        )
    for name, packed in state["stateful"].items():
        value, unpacked = (stateful or {})[name], _unpack(packed, tensors)
        if isinstance(value, torch.Generator):
            value.set_state(unpacked)
        else:
            value.load_state_dict(_typed(unpacked, _unprepared(value)))
    _restore_random_states(folder, state["processes"])
    return Checkpoint(folder, state["step"], state["processes"], state["extra"])


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint in a folder, by its steps; None if there never was one.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.

    Warns:
        UserWarning: a newer one is not whole, and why.
    """
    broken: list[str] = []
    for place in _candidates(Path(folder)):
        try:
            verify_checkpoint(place)
        except CheckpointError as error:
            # What is hidden was never finished, or is on its way out.
            if not place.name.startswith("."):
                broken.append(str(error))
            continue
        for message in broken:
            warnings.warn(f"{message}. Going back to {place}", stacklevel=2)
        return place
    if broken:
        raise CheckpointError(f"no checkpoint in {folder} is whole: " + "; ".join(broken))
    return None


def verify_checkpoint(path: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: naming the file and what to do.
    """
    folder = Path(path)
    remedy = "take another copy of the checkpoint, or an earlier one"
    if folder.is_file():
        if folder.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(refusal(folder))
        raise CheckpointError(f"path must be the folder of a checkpoint; {folder} is a file")
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be the folder of a checkpoint; {folder} is not there")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        known = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        found = manifest["format"]
    except FileNotFoundError:
        hint = "it was never finished, or is another folder"
        if _candidates(folder):
            hint = "it is a folder of checkpoints: take latest_checkpoint(folder)"
        elif pickles := [file for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES]:
            hint = refusal(sorted(pickles)[0])
        raise CheckpointError(f"{folder} is no checkpoint, it has no {MANIFEST}: {hint}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} was cut off or changed; {remedy}") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST} has format {found!r}, and this version reads {FORMAT!r}"
        )
    for name, (size, digest) in known.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {remedy}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes instead of {size}; {remedy}"
            )
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} was changed, its SHA-256 is another; {remedy}")


def _write(
    part: Path,
    components: dict[str, nn.Module],
    adapter_name: str,
    contents: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    randoms: list[bytes],
) -> None:
    """Fill the folder of a checkpoint, the manifest last, and have it all on the disk."""
    for name, module in components.items():
        _save_module(part / name, module, adapter_name, contents[name])
    save_tensors(part / TENSORS, tensors)
    for rank, content in enumerate(randoms):
        (part / f"random-{rank}.safetensors").write_bytes(content)
    (part / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = sorted(path for path in part.rglob("*") if path.is_file())
    for file in files:
        sync(file)
    manifest = {
        "format": FORMAT,
        "files": {
            file.relative_to(part).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": _sha256(file),
            }
            for file in files
        },
    }
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(part / MANIFEST)
    for place in (*(path for path in part.rglob("*") if path.is_dir()), part):
        sync(place)


def _replace(part: Path, place: Path) -> None:
    """Rename a whole checkpoint into its place; one that was there goes."""
    if place.exists():
        # From here to the next renaming, the hidden name is the checkpoint: see _candidates.
        shutil.rmtree(_hidden(place, "old"), ignore_errors=True)
        os.replace(place, _hidden(place, "old"))
    os.replace(part, place)
    sync(place.parent)
    shutil.rmtree(_hidden(place, "old"), ignore_errors=True)


def _recover(folder: Path) -> None:
    """Finish or remove what an earlier process left behind half-done."""
    if not folder.is_dir():
        return
    for left in sorted(folder.iterdir(), reverse=True):
        match = _HIDDEN.fullmatch(left.name)
        if match is None:
            continue
        place = folder / match[1]
        if not place.exists() and _is_whole(left):
            os.replace(left, place)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest checkpoints up to a step, and later ones that are whole."""
    visible = [place for place in _candidates(folder) if not place.name.startswith(".")]
    until = [place for place in visible if _step_of(place) <= step]
    later = [place for place in visible if _step_of(place) > step]
    for place in (*until[keep:], *(place for place in later if not _is_whole(place))):
        old = _hidden(place, "old")
        # Renamed first: a checkpoint that is half removed would look like a broken one.
        os.replace(place, old)
        shutil.rmtree(old, ignore_errors=True)


def _candidates(folder: Path) -> list[Path]:
    """Folders that may be checkpoints, the newest first.

    Among them those with a hidden name, which a process that was killed between two renamings has
    left whole; of one step, the visible one comes first.
    """
    if not folder.is_dir():
        return []
    named = [
        place
        for place in folder.iterdir()
        if place.is_dir() and (_NAME.fullmatch(place.name) or _HIDDEN.fullmatch(place.name))
    ]
    return sorted(
        named,
        key=lambda place: (_step_of(place), not place.name.startswith("."), place.name),
        reverse=True,
    )


def _step_of(place: Path) -> int:
    match = _NAME.search(place.name)
    assert match is not None
    return int(match[1])


def _hidden(place: Path, suffix: str) -> Path:
    return place.with_name(f".{place.name}.{suffix}")


def _is_whole(place: Path) -> bool:
    try:
        verify_checkpoint(place)
    except CheckpointError:
        return False
    return True


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("spectral-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def _components(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Bare modules by the name of their sub-folder, "" for a single one."""
    modules = {"": model} if isinstance(model, nn.Module) else model
    if not isinstance(modules, Mapping) or not modules:
        raise TypeError(
            f"model must be a module, or a dict of them by name; got {type(model).__name__}"
        )
    bare = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"model[{name!r}] must be a module; got {type(module).__name__}")
        if name and not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"model must have names of components for keys; got {name!r}")
        bare[name] = _bare(module)
        reshard(bare[name])
    return bare


def _bare(module: nn.Module) -> nn.Module:
    """The module inside of what DDP, accelerate and torch.compile make of it."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _named_parameters(components: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in components.items()
        for key, parameter in module.named_parameters()
    }


def _module_tensors(module: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of a module's adapter, or all of them, for the process that writes them."""
    if hasattr(module, "peft_config"):
        from spectral_adapters.peft._folder import adapter_tensors, check_adapter_name

        configs: Any = module.peft_config
        check_adapter_name(module, adapter_name, configs)
        state = adapter_tensors(module, adapter_name)
    else:
        state = module.state_dict()
    return {name: _for_writer(tensor) for name, tensor in state.items()}


def _trained_outside(module: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The trained parameters that :func:`_module_tensors` leaves out."""
    if not hasattr(module, "peft_config"):
        return {}
    from spectral_adapters.peft._folder import trained_outside

    return trained_outside(module, adapter_name)


def _for_writer(tensor: Tensor) -> Tensor:
    """A tensor, whole in the first process; of a sharded one the others keep nothing."""
    if not is_sharded(tensor):
        return tensor
    whole = gathered(tensor)
    return whole.cpu() if _rank() == 0 else whole.new_empty(0)


def _save_module(
    folder: Path, module: nn.Module, adapter_name: str, tensors: dict[str, Tensor]
) -> None:
    """Write a module's adapter, or all of it."""
    folder.mkdir(exist_ok=True)
    if not hasattr(module, "peft_config"):
        save_tensors(folder / MODEL, tensors)
        return
    from spectral_adapters.peft._folder import write_adapter

    write_adapter(module, folder, adapter_name, tensors)


def _restore_modules(folder: Path, components: dict[str, nn.Module], adapter_name: str) -> None:
    """Load every component; one that is refused leaves all of them as they were."""
    whole = {name: c for name, c in components.items() if (folder / name / MODEL).is_file()}
    adapted = {name: c for name, c in components.items() if name not in whole}
    for name, module in adapted.items():
        if not hasattr(module, "peft_config"):
            raise CheckpointError(
                f"model must have an adapter, like the one in {folder / name}; got a "
                f"{type(module).__name__} without"
            )
    with _unchanged_if_refused(whole.values()):
        for name, module in whole.items():
            file = folder / name / MODEL
            try:
                here = module.state_dict()
                saved = load_tensors(file)
                module.load_state_dict(
                    {key: spread_like(value, here.get(key, value)) for key, value in saved.items()}
                )
            except RuntimeError as error:
                raise CheckpointError(f"{file} does not fit model: {error}") from error
        if adapted:
            _restore_adapters(folder, adapted, adapter_name)


def _restore_adapters(folder: Path, adapted: dict[str, nn.Module], adapter_name: str) -> None:
    from spectral_adapters.peft import restore_adapter
    from spectral_adapters.peft._folder import unchanged_if_refused

    with unchanged_if_refused(adapted.values(), adapter_name):
        for name, module in adapted.items():
            try:
                restore_adapter(module, folder / name, adapter_name)
            except (FileNotFoundError, ValueError) as error:
                raise CheckpointError(f"{folder / name} does not fit model: {error}") from error


@contextmanager
def _unchanged_if_refused(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give all numbers of modules back if what is done to them raises."""
    numbers = [
        (value, value.detach().clone())
        for module in modules
        for value in module.state_dict().values()
        if isinstance(value, Tensor)
    ]
    try:
        yield
    except BaseException:
        for value, before in numbers:
            value.detach().copy_(before)
        raise


def _check_objects(optimizer: Any, scheduler: Any, stateful: Any) -> None:
    """Raise ``TypeError`` unless these are what can be saved and loaded."""
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}"
        )
    stateful = {} if stateful is None else stateful
    if not isinstance(stateful, Mapping) or not all(isinstance(name, str) for name in stateful):
        raise TypeError(f"stateful must be a dict with strings for keys; got {stateful!r}")
    objects = {f"stateful[{name!r}]": value for name, value in stateful.items()}
    if scheduler is not None:
        objects["scheduler"] = scheduler
    for argument, value in objects.items():
        if isinstance(value, torch.Generator):
            continue
        if not hasattr(value, "state_dict") or not hasattr(value, "load_state_dict"):
            raise TypeError(
                f"{argument} must be a torch.Generator or have state_dict and load_state_dict; "
                f"got {type(value).__name__}"
            )


def _unprepared(value: Any) -> Any:
    """An optimizer or a scheduler without what accelerate has put around it."""
    for name in ("optimizer", "scheduler"):
        if type(value).__name__ == f"Accelerated{name.capitalize()}":
            return getattr(value, name)
    return value


def _classes(optimizer: Any, scheduler: Any) -> dict[str, str]:
    """The names of their classes, of what is given."""
    given = {"optimizer": optimizer, "scheduler": scheduler}
    return {name: type(_unprepared(v)).__name__ for name, v in given.items() if v is not None}


def _check_classes(folder: Path, state: dict[str, Any], optimizer: Any, scheduler: Any) -> None:
    """Raise ``CheckpointError`` unless a saved state is one of these classes."""
    saved = state.get("classes")
    for name, here in _classes(optimizer, scheduler).items():
        if saved is not None and saved[name] != here:
            raise CheckpointError(
                f"{name} must be of the class that was saved in {folder}, {saved[name]}; got {here}"
            )
    if saved is None and optimizer is not None and state["versions"]["torch"] == torch.__version__:
        # An older checkpoint, which names no classes. Other versions of torch have other options.
        groups = dict(state["optimizer"]["dict"])["param_groups"]
        lacking = set(optimizer.defaults) - {key for group in groups for key, _ in group["dict"]}
        if lacking:
            raise CheckpointError(
                f"optimizer must be of the class that was saved in {folder}, which has no "
                f"{sorted(lacking)}; got {type(_unprepared(optimizer)).__name__}"
            )


def _pack_optimizer(
    optimizer: Any, components: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> Any:
    """An optimizer's state with its parameters by name instead of by number."""
    if optimizer is None:
        return None
    names = _optimizer_names(optimizer, components)
    state = optimizer.state_dict()
    groups = [
        {**group, "params": [names[index] for index in group["params"]]}
        for group in state["param_groups"]
    ]
    by_name = {names[index]: values for index, values in state["state"].items()}
    rest = {key: v for key, v in state.items() if key not in ("state", "param_groups")}
    return _pack({**rest, "state": by_name, "param_groups": groups}, "optimizer", tensors)


def _optimizer_names(optimizer: Any, components: dict[str, nn.Module]) -> list[str]:
    """Names of an optimizer's parameters, in the order of its state dict's numbers."""
    known = {id(p): name for name, p in _named_parameters(components).items()}
    names = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ValueError(
                    f"optimizer must train parameters of model; group {number} has one of shape "
                    f"{tuple(parameter.shape)} that is not among its {len(known)}"
                )
            names.append(known[id(parameter)])
    return names


def _optimizer_state(
    folder: Path, packed: Any, optimizer: Any, components: dict[str, nn.Module]
) -> Any:
    """A saved optimizer state, packed, with the numbers that its parameters have now."""
    state = dict(packed["dict"])
    now = optimizer.state_dict()
    names = _optimizer_names(optimizer, components)
    saved = [dict(group["dict"])["params"] for group in state["param_groups"]]
    current = [[names[index] for index in group["params"]] for group in now["param_groups"]]
    if [sorted(group) for group in saved] != [sorted(group) for group in current]:
        lacking = sorted({name for group in saved for name in group} - set(names))
        extra = sorted(set(names) - {name for group in saved for name in group})
        raise CheckpointError(
            f"optimizer must have the parameter groups of {folder}, of {list(map(len, saved))} "
            f"parameters; got {list(map(len, current))}, without {lacking[:3]} and with "
            f"{extra[:3]} besides"
        )
    number = {name: index for index, name in enumerate(names)}
    groups = [
        {"dict": [*(i for i in group["dict"] if i[0] != "params"), ["params", numbers["params"]]]}
        for group, numbers in zip(state["param_groups"], now["param_groups"], strict=True)
    ]
    by_number = {"dict": [[number[name], values] for name, values in state["state"]["dict"]]}
    return {"dict": list({**state, "state": by_number, "param_groups": groups}.items())}


def _spread_state(state: dict[int, dict[str, Any]], optimizer: Any) -> None:
    """Shard whole moments, in place, as the parameters are that they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in state.items():
        parameter = parameters[number]
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = spread_like(value, parameter)


def _pack_object(argument: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    state = value.get_state() if isinstance(value, torch.Generator) else value.state_dict()
    return _pack(state, argument, tensors)


def _typed(state: Any, owner: Any) -> Any:
    """A loaded state with dicts of the types that their owner has them in, a ``Counter`` say."""
    if isinstance(state, list) and isinstance(owner, list):
        return [_typed(*pair) for pair in itertools.zip_longest(state, owner[: len(state)])]
    if not isinstance(state, dict):
        return state
    parts = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
    items = {key: _typed(value, parts.get(key)) for key, value in state.items()}
    if not isinstance(owner, (Counter, OrderedDict, defaultdict)):
        return items
    typed = copy.copy(owner)
    typed.clear()
    typed.update(items)
    return typed


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON, with its tensors put into ``tensors``, numbered, under their path in it."""
    if isinstance(value, Tensor):
        value = _for_writer(value)
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise TypeError(
                f"{path} must be a dense, whole tensor to be saved; got {type(value).__name__} "
                f"of layout {value.layout} (of sharded models, save the full state dict)"
            )
        # Two paths may read the same: of "a.b" and of "b" in "a".
        name = f"{len(tensors)} {path}"
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        items = [[key, _pack(entry, f"{path}.{key}", tensors)] for key, entry in value.items()]
        for key, _ in items:
            if not isinstance(key, (int, str)):
                raise TypeError(f"{path} must have strings or ints for keys; got {key!r}")
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        entries = [_pack(entry, f"{path}.{i}", tensors) for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"tuple": entries}
    raise TypeError(
        f"{path} must be made of tensors, numbers, strings, None, dicts, lists and tuples to be "
        f"saved; got {type(value).__name__}"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(entry, tensors) for entry in content)
    return {key: _unpack(entry, tensors) for key, entry in content}


def _checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    found = {} if extra is None else extra
    try:
        if isinstance(found, Mapping) and json.loads(json.dumps(dict(found))) == found:
            return dict(found)
    except (TypeError, ValueError):
        pass
    raise TypeError(
        "extra must be made of dicts with string keys, lists, numbers, strings and None, which "
        f"JSON gives back as they are; got {found!r}"
    )


def _random_states() -> dict[str, Tensor]:
    """The states of the generators of this process, as tensors."""
    version, words, gauss = random.getstate()
    # The global generator, from which data loaders draw; a tuple with legacy=True.
    numpy_state: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    kind, key, position, has_gauss, cached = numpy_state
    if kind != "MT19937":
        raise ValueError(f"numpy's global generator must be MT19937 to be saved; got {kind}")
    states = {
        "python.version": torch.tensor(version),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.words": torch.from_numpy(key.astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss]),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda.{index}"] = state
    return states


def _restore_random_states(folder: Path, processes: int) -> None:
    now = dist.get_world_size() if dist.is_initialized() else 1
    if now != processes:
        warnings.warn(
            f"{folder} was written by {processes} processes and is read by {now}: training goes "
            "on, but with other random numbers than without the interruption",
            stacklevel=3,
        )
    file = folder / f"random-{_rank()}.safetensors"
    if not file.is_file():
        return
    states = load(file.read_bytes())
    gauss = states["python.gauss"].tolist()
    words = tuple(states["python.words"].tolist())
    random.setstate((int(states["python.version"]), words, gauss[0] if gauss else None))
    position, has_gauss = states["numpy.position"].tolist()
    key = states["numpy.words"].numpy().astype(np.uint32)
    cached = float(states["numpy.gauss"])
    np.random.set_state(("MT19937", key, position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in states:
                torch.cuda.set_rng_state(states[f"cuda.{index}"], index)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _device() -> torch.device:
    """Where the process group exchanges tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _from_all(content: bytes) -> list[bytes]:
    """What every process gives, in all processes."""
    if not dist.is_initialized():
        return [content]
    device = _device()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(content)], device=device))
    longest = int(max(int(size) for size in sizes))
    padded = torch.frombuffer(bytearray(content.ljust(longest, b"\0")), dtype=torch.uint8)
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, padded.to(device))
    return [
        part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)
    ]


def _raise_everywhere(failure: OSError | None, place: Path) -> None:
    """Raise in all processes what went wrong in the first; none goes on before it has written."""
    if dist.is_initialized():
        code = 0 if failure is None else failure.errno or errno.EIO
        shared = torch.tensor([code], device=_device())
        dist.broadcast(shared, 0)
        if failure is None and int(shared):
            failure = OSError(int(shared), os.strerror(int(shared)), str(place))
    if failure is not None:
        raise failure
