"""Adapters of diffusers pipelines: one folder per adapted component, each in PEFT's own format.

``FOLDER/unet/adapter_config.json`` and ``FOLDER/unet/adapter_model.safetensors`` are what
``peft.PeftModel.from_pretrained(pipe.unet, "FOLDER/unet")`` reads as well, for any PEFT method.

:func:`export_lora` and :func:`export_merged` write what tools without this package read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn

from spectral_adapters._files import load_tensors, save_tensors, staged
from spectral_adapters._validation import check_choice
from spectral_adapters.columns import ColumnOverlap, column_overlap
from spectral_adapters.fusion import FusionReport, check_weights, fuse_changes, report_fusion
from spectral_adapters.peft import (
    FUSION_METHODS,
    LoRAExport,
    adapter_columns,
    changes_to_lora,
    fuse,
    merge_and_unload,
    merge_changes,
    restore_adapter,
    to_lora,
    weight_changes,
)
from spectral_adapters.peft import load_adapter as load_component
from spectral_adapters.peft._folder import unchanged_if_refused, write_adapter
from spectral_adapters.peft._fusion import several_adapters

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "LORA_FORMATS",
    "PipelineFusion",
    "adapted_components",
    "export_lora",
    "export_merged",
    "fuse_adapters",
    "load_adapter",
    "register_checkpoint_hooks",
    "save_adapter",
    "save_lora",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: Layouts of LoRA files: of ``load_lora_weights``, and of the tools that use kohya's keys.
LORA_FORMATS = ("diffusers", "kohya")
#: Name of the adapter that fusing makes.
FUSED = "fused"


def save_adapter(pipe: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Write one adapter of every component that has it.

    All files are written beside their places and then moved there, one right after the other:
    whenever the process is killed, each folder holds the adapter that was there or the new one.

    Args:
        pipe: a diffusers pipeline, or a dict from names of components to modules, such as
            ``{"unet": unet}``.
        folder: gets one sub-folder per adapted component; made if it is not there.
        adapter_name: the adapter to save.

    Raises:
        ValueError: no component has this adapter.
    """
    modules = _require_adapter(pipe, adapter_name)
    with staged(*(Path(folder) / name for name in modules)) as parts:
        for module, part in zip(modules.values(), parts, strict=True):
            write_adapter(module, part, adapter_name)


def load_adapter(
    pipe: Any,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> None:
    """Add what :func:`save_adapter` wrote to the components of ``pipe``, in place, and activate it.

    Args:
        pipe: a diffusers pipeline with the same base weights, or a dict as for
            :func:`save_adapter`.
        folder: from :func:`save_adapter`.
        adapter_name: the name the adapter gets here.
        is_trainable: whether its parameters require a gradient.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: it holds one for a component that the pipeline lacks, or that does not fit it.
        RuntimeError: the adapter was trained on other base weights.

    If one component refuses its adapter, all are left as they were.
    """
    places = sorted(path.parent for path in Path(folder).glob(f"*/{ADAPTER_CONFIG}"))
    places = [place for place in places if not place.name.startswith(".")]
    if not places:
        raise FileNotFoundError(
            f"folder must hold an adapter, COMPONENT/{ADAPTER_CONFIG}; {folder} holds none"
        )
    modules: dict[Path, Any] = {}
    for place in places:
        module = modules[place] = _components(pipe).get(place.name)
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"folder must hold adapters of the pipeline's components; {folder} has one for "
                f"{place.name!r}, which {type(pipe).__name__} lacks"
            )
    with unchanged_if_refused(modules.values(), adapter_name):
        for place, module in modules.items():
            load_component(module, place, adapter_name, is_trainable=is_trainable)


def register_checkpoint_hooks(
    accelerator: Any, components: Mapping[str, nn.Module], adapter_name: str = "default"
) -> None:
    """Let ``accelerator.save_state`` and ``load_state`` keep one adapter instead of whole models.

    One line in place of the two hooks of diffusers' example scripts. A checkpoint then holds
    ``unet/adapter_model.safetensors`` and so on, beside what accelerate keeps of the optimizer,
    which it pickles; :mod:`spectral_adapters.checkpoint` needs no pickle.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        components: models by the name of their component, as ``{"unet": unet, "text_encoder":
            text_encoder}``; those without the adapter are left alone.
        adapter_name: the adapter in training.

    Raises:
        ValueError: no component has the adapter; or, when a state is saved or loaded, the
            accelerator prepared a model that is not among the adapted components.
    """
    modules = _require_adapter(
        {name: accelerator.unwrap_model(module) for name, module in components.items()},
        adapter_name,
    )

    def check(models: list[nn.Module]) -> None:
        for model in models:
            plain = accelerator.unwrap_model(model)
            if not any(plain is module for module in modules.values()):
                raise ValueError(
                    f"components must hold every prepared model, with adapter {adapter_name!r}; "
                    f"got {sorted(modules)} and a prepared {type(plain).__name__}"
                )

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        check(models)
        if accelerator.is_main_process:
            save_adapter(modules, folder, adapter_name)
        # What is left in these lists accelerate would save and load itself, whole.
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        check(models)
        with unchanged_if_refused(modules.values(), adapter_name):
            for name, module in modules.items():
                restore_adapter(module, Path(folder) / name, adapter_name)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _components(pipe: Any) -> Mapping[str, Any]:
    return pipe if isinstance(pipe, Mapping) else pipe.components


def adapted_components(pipe: Any, adapter_name: str = "default") -> dict[str, nn.Module]:
    """Return the components of ``pipe`` that have the adapter, by name."""
    return {
        name: module
        for name, module in _components(pipe).items()
        if isinstance(module, nn.Module) and adapter_name in getattr(module, "peft_config", {})
    }


def export_lora(
    pipe: Any,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    file_format: str = "diffusers",
) -> dict[str, dict[str, float]]:
    """Write one adapter as a LoRA file, ``FOLDER/pytorch_lora_weights.safetensors``.

    ``pipe.load_lora_weights(folder)`` reads both formats, without this package. Spectral Adapters A
    and R and LiDB are exact; SODA and SVDiff are cut to ``rank``.

    Args:
        pipe: a diffusers pipeline with the adapter, at the scale to export.
        folder: made if it is not there.
        adapter_name: the adapter to export.
        rank: of the LoRA; None for the exact one.
        file_format: "diffusers", or "kohya" with the ranks as alphas. Diffusers itself reads text
            encoders in kohya's layout only if their ``out_proj`` is adapted too.

    Returns:
        By component and module: the Frobenius norm of what is left out, relative to the change.

    Raises:
        ValueError: no such adapter, a missing rank, or a layer that no LoRA file describes.
    """
    check_choice("file_format", file_format, LORA_FORMATS)
    exports = {
        name: to_lora(module, adapter_name, rank=rank)
        for name, module in _require_adapter(pipe, adapter_name).items()
    }
    save_lora(pipe, folder, exports, file_format=file_format)
    return {name: lora.errors for name, lora in exports.items()}


def save_lora(
    pipe: Any,
    folder: str | Path,
    exports: Mapping[str, LoRAExport],
    *,
    file_format: str = "diffusers",
) -> None:
    """Write LoRAs of components of ``pipe``, by name, as one file; see :func:`export_lora`."""
    check_choice("file_format", file_format, LORA_FORMATS)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if file_format == "kohya":
        _save_kohya(exports, Path(folder))
    else:
        layers = {f"{name}_lora_layers": lora.state_dict for name, lora in exports.items()}
        type(pipe).save_lora_weights(save_directory=str(folder), **layers)


def _save_kohya(exports: Mapping[str, LoRAExport], folder: Path) -> None:
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
    from diffusers.utils import convert_state_dict_to_kohya

    tensors = {}
    for name, lora in exports.items():
        # Kohya's keys are those of CLIPTextModel as it was before transformers flattened it.
        inner = "text_model." if name.startswith("text_encoder") else ""
        for key, value in lora.state_dict.items():
            tensors[f"{name}.{inner}{key.removeprefix(inner)}"] = value
    save_tensors(folder / LORA_WEIGHT_NAME_SAFE, convert_state_dict_to_kohya(tensors))


def export_merged(pipe: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Merge one adapter into the weights of ``pipe``, in place, and write the whole pipeline.

    Raises:
        ValueError: no component has this adapter, or the merged weights would not be finite.
    """
    for module in _require_adapter(pipe, adapter_name).values():
        merge_and_unload(module, adapter_name, safe_merge=True)
    pipe.save_pretrained(str(folder))


@dataclass(frozen=True)
class PipelineFusion:
    """What :func:`fuse_adapters` made.

    Attributes:
        kind: "adapter", "LoRA" or "merged pipeline".
        report: norms and crosstalk of what went in and came out.
        overlap: of the columns, for method "spectral".
        errors: of a LoRA, by component and layer, as of :func:`export_lora`; empty otherwise.
    """

    kind: str
    report: FusionReport
    overlap: ColumnOverlap | None
    errors: dict[str, dict[str, float]]


def fuse_adapters(
    pipe: Any,
    folder: str | Path,
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    method: str,
    merged: bool = False,
    rank: int | None = None,
    moments: Sequence[str | Path] | None = None,
    regularization: float = 1e-6,
    allow_overlap: bool = False,
) -> PipelineFusion:
    """Fuse adapters that were trained apart on ``pipe``, and write what comes of them.

    An adapter of the same kind where there is one: "spectral", "geodesic", and "delta" of SVDiff
    or LiDB without ``rank``. Otherwise a LoRA file, or with ``merged`` the merged pipeline.
    ``pipe`` is changed.

    Args:
        pipe: a diffusers pipeline without adapters.
        folder: to write; made if it is not there.
        adapters: folders from :func:`save_adapter`; of different methods if ``method`` allows it.
        weights: one number per adapter, 1 by default.
        method: as for ``spectral_adapters.peft.fuse_and_unload``.
        merged: write the merged pipeline.
        rank: of the LoRA; None for an exact one.
        moments: for "gradient", one safetensors file per adapter, from ``COMPONENT.LAYER`` to
            second moments [in, in].
        regularization, allow_overlap: as for ``spectral_adapters.peft.fuse_and_unload``.

    Raises:
        ValueError: naming the argument, or the adapter that cannot be loaded.
    """
    check_choice("method", method, FUSION_METHODS)
    numbers = check_weights(weights, len(adapters))
    folders = dict(zip(_names(adapters), adapters, strict=True))
    kinds = {_kind(path) for path in folders.values()}
    keeps_kind = method in ("spectral", "geodesic") or (
        method == "delta"
        and not merged
        and rank is None
        and len(kinds) == 1
        and kinds <= {"SVDIFF", "LIDB"}
    )
    if keeps_kind and len(kinds) > 1:
        raise ValueError(f"adapters must be of one method for {method!r}; got {sorted(kinds)}")
    if keeps_kind and rank is not None:
        raise ValueError(f"rank must be None: {method!r} makes an adapter; got {rank}")
    changes: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, path in folders.items():
        try:
            with several_adapters():
                load_adapter(pipe, path, name)
        except (RuntimeError, ValueError, OSError) as error:
            # A RuntimeError says that it was trained on other base weights.
            raise ValueError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
        found = adapted_components(pipe, name)
        changes[name] = {part: weight_changes(module, name) for part, module in found.items()}
        if not keeps_kind:
            # The next may be of another method.
            for module in found.values():
                merge_changes(module, {})
    errors: dict[str, dict[str, float]] = {}
    overlap = None
    parts = dict.fromkeys(part for found in changes.values() for part in found)
    fused: dict[str, dict[str, Tensor]] = {}
    if keeps_kind:
        columns: dict[str, dict[str, Sequence[int]]] = {name: {} for name in folders}
        for part in parts:
            module = _components(pipe)[part]
            chosen = [name for name in folders if part in changes[name]]
            if method == "spectral":
                for name in chosen:
                    for layer, indices in adapter_columns(module, name).items():
                        columns[name][f"{part}.{layer}"] = indices
            fuse(
                module,
                chosen,
                [n for n, name in zip(numbers, folders, strict=True) if name in chosen],
                method=method,
                adapter_name=FUSED,
                allow_overlap=allow_overlap,
            )
            fused[part] = weight_changes(module, FUSED)
        overlap = column_overlap(columns) if method == "spectral" else None
        if merged:
            export_merged(pipe, folder, FUSED)
        else:
            save_adapter(pipe, folder, FUSED)
    else:
        seen = None if moments is None else [_load_moments(path) for path in moments]
        for part in parts:
            fused[part] = fuse_changes(
                [found.get(part, {}) for found in changes.values()],
                numbers,
                method=method,
                moments=None if seen is None else [_of_component(part, file) for file in seen],
                regularization=regularization,
            )
        if merged:
            for part, change in fused.items():
                merge_changes(_components(pipe)[part], change)
            pipe.save_pretrained(str(folder))
        else:
            exports = {
                part: changes_to_lora(_components(pipe)[part], change, rank=rank)
                for part, change in fused.items()
            }
            save_lora(pipe, folder, exports)
            errors = {part: lora.errors for part, lora in exports.items()}
    kind = "merged pipeline" if merged else "adapter" if keeps_kind else "LoRA"
    flat = {name: _flat(found) for name, found in changes.items()}
    return PipelineFusion(kind, report_fusion(flat, _flat(fused)), overlap, errors)


def _names(folders: Sequence[str | Path]) -> list[str]:
    """Different names for adapters, without dots, made of those of their folders."""
    names: list[str] = []
    for folder in folders:
        name = re.sub(r"\W+", "_", Path(folder).resolve().name) or "adapter"
        # PEFT mistakes a name that is part of its keys' prefixes for such a prefix.
        clashes = any(name in prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values())
        if clashes or name in (*names, FUSED):
            name = f"{name}_{len(names)}"
        names.append(name)
    return names


def _kind(folder: str | Path) -> str:
    """The PEFT type of a saved adapter; those of its components in case they differ."""
    kinds = set()
    for file in Path(folder).glob(f"[!.]*/{ADAPTER_CONFIG}"):
        kinds.add(json.loads(file.read_text(encoding="utf-8"))["peft_type"])
    return "+".join(sorted(kinds))


def _load_moments(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_tensors(Path(path))
    except ValueError as error:
        raise ValueError(f"moments must be safetensors files; {error}") from error


def _of_component(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mark = f"{part}."
    return {key.removeprefix(mark): t for key, t in tensors.items() if key.startswith(mark)}


def _flat(changes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{name}": c for part, found in changes.items() for name, c in found.items()}


def _require_adapter(pipe: Any, adapter_name: str) -> dict[str, nn.Module]:
    found = adapted_components(pipe, adapter_name)
    if not found:
        raise ValueError(
            f"adapter_name must be an adapter of a component; no component has {adapter_name!r}"
        )
    return found
