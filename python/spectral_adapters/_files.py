"""Files that appear whole or not at all; tensors read from safetensors and from nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is the old one or the new one whenever the process is killed."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def staged(*places: Path) -> Iterator[list[Path]]:
    """Folders to write into, whose files then move to ``places``, one right after the other.

    If writing fails, what was in ``places`` stays and what was written is removed.
    """
    # Inside: what is beside a folder may be another file system.
    parts = [place / ".part" for place in places]
    try:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        yield parts
        files = [sorted(part.iterdir()) for part in parts]
        for file in (file for group in files for file in group):
            sync(file)
        for place, group in zip(places, files, strict=True):
            for file in group:
                os.replace(file, place / file.name)
            sync(place)
    finally:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write dense tensors of any device as a safetensors file.

    Raises:
        OSError: as for any file; safetensors' own writer reports a full disk as a format error.
    """
    path.write_bytes(tensor_bytes(tensors, metadata))


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file."""
    owned, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        # Tied weights, which safetensors refuses.
        owned[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return save(owned, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        FileNotFoundError: there is none; pickles beside it are named.
        ValueError: it is something else, or was cut off; the message says what to do.
    """
    if not path.is_file():
        others = []
        if path.parent.is_dir():
            others = [file for file in path.parent.iterdir() if file.suffix in PICKLE_SUFFIXES]
        beside = f"; {refusal(sorted(others)[0])}" if others else ""
        raise FileNotFoundError(f"{path} does not exist{beside}")
    content = path.read_bytes()
    if path.suffix in PICKLE_SUFFIXES:
        raise ValueError(refusal(path))
    try:
        return load(content)
    except SafetensorError as error:
        # An archive of torch.save, or a bare pickle.
        is_pickle = content[:1] == b"\x80" and content[-1:] == b"."
        if is_pickle or content.startswith(b"PK\x03\x04"):
            raise ValueError(refusal(path)) from error
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): it was cut off, changed, or is "
            "something else; take another copy of it, or an earlier checkpoint"
        ) from error


def refusal(path: Path) -> str:
    """Why a pickle is not read, and what to do."""
    return (
        f"{path} is a pickle, which can run any code when it is read; only safetensors are read. "
        "If you trust it, convert it: safetensors.torch.save_file(torch.load(file), "
        f"{path.with_suffix('.safetensors').name!r})"
    )
