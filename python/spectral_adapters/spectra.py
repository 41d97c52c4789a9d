"""Factorisations of frozen weights, computed once: in a model, in a job of several processes, and
on a machine, where they are kept on disk.

A kept factorisation is one safetensors file, named by a hash of the weight's exact values and of
all that determines the result. Finding it again costs that hash, which is a fast keyed one; the
SHA-256 of the weight, which adapters remember, is in the file. Its tensors are mapped into memory,
not copied; they are checked once after every change of the file, which a note beside it tells. What
cannot be read is computed anew with a warning, and where nothing can be written work goes on
without.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spectral_adapters import _processes
from spectral_adapters.decomposition import (
    Factorisation,
    Fingerprint,
    hash_values,
    octets,
    widened,
)
from spectral_adapters.functional import SpectralBasis
from spectral_adapters.planner import calibration_file

T = TypeVar("T")
R = TypeVar("R")

#: Raised whenever a factorisation gives another result for equal arguments than it did before.
VERSION = 1

#: Bytes of the cache if nothing else was said: SODA on five models of SDXL's size in bf16.
DEFAULT_LIMIT = 20 * 10**9

#: The environment variable that sets the limit, in bytes; "2e10" will do.
LIMIT_VARIABLE = "SPECTRAL_KERNELS_CACHE_LIMIT"

#: Work (rows x columns x triples) that is not worth a file.
_SMALLEST = 96**3

#: Bytes of weights that are kept from being looked up to being decomposed. What a quantised layer
#: gives is a copy: asking again takes time, keeping all takes the memory that quantising saved.
_HELD_WEIGHTS = 2**30

#: Seconds after which a temporary file is taken to be that of a process that was killed.
_ABANDONED = 86400.0

#: Seconds after which a change of a file gets a later time: a tick of Linux's slowest clock.
_TICK = 0.01

_limit: int | None = None

_secret_lock = threading.Lock()


class Decomposed(NamedTuple):
    """A factorisation and what recognises it again."""

    basis: SpectralBasis
    fingerprint: Fingerprint


class Request(NamedTuple):
    """A weight to decompose.

    Attributes:
        weight: gives the weight [out, in], the same values whenever and in whatever thread it is
            called, so that not all weights need be in memory at once.
        factorisation: what to compute.
    """

    weight: Callable[[], Tensor]
    factorisation: Factorisation


class _Identity(NamedTuple):
    """What names a factorisation.

    Attributes:
        key: SHA-256, in hexadecimal; the same on all machines.
        weight_hash: SHA-256 of the weight's values in their own dtype.
        about: the weight and the factorisation, for people.
        work: rows x columns x triples.
        path: the file in the cache; None if the factorisation is not worth one, or the cache off.
    """

    key: str
    weight_hash: str
    about: dict[str, str]
    work: float
    path: Path | None


class _LookedUp(NamedTuple):
    """What is known of a request after its weight was seen once.

    Attributes:
        found: what the cache had.
        weight: the weight, if it was kept for being decomposed.
    """

    identity: _Identity | None
    device: torch.device
    found: Decomposed | None
    weight: Tensor | None

    @property
    def work(self) -> float:
        return 0.0 if self.identity is None else self.identity.work


@torch.no_grad()
def factorise(weight: Tensor, factorisation: Factorisation) -> Decomposed:
    """The factorisation of a weight and its fingerprint, from the cache if it is there.

    The tensors are on the weight's device. On the CPU they may be mapped from a file of the cache,
    privately: writing to them changes neither the file nor what others have mapped.

    Args:
        weight: [out, in], finite, any floating dtype.
        factorisation: what to compute.

    Raises:
        TypeError, ValueError: as the factorisation does.
    """
    # Tensors made in inference mode could never be used for training later.
    with torch.inference_mode(False):
        identity, found = _look_up(weight, factorisation)
        if found is not None:
            return _moved(found, weight.device)
        return _provide(weight, factorisation, identity, time.time())


@torch.no_grad()
def factorise_all(
    requests: Sequence[Request],
    *,
    over_processes: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> list[Decomposed]:
    """The factorisations of many weights; equal weights are decomposed once and share the result.

    Several matrices on the CPU are decomposed at a time, on one thread each if there are enough.

    Args:
        requests: the weights, and what to compute of each.
        over_processes: in a torch.distributed job, share the work out over its processes, which are
            expected to call this too.
        progress: makes a progress bar for a number of matrices, as ``tqdm`` does. It is called in
            the first process only, and only if there is something to decompose.

    Returns:
        One result per request, as :func:`factorise` gives it. What was shared out is the same to
        the last bit in all processes.

    Raises:
        TypeError, ValueError: as the factorisation does.
    """
    started = time.time()
    with torch.inference_mode(False):
        kept = 0

        @torch.no_grad()
        def look_up(request: Request) -> _LookedUp:
            nonlocal kept
            weight = request.weight()
            identity, found = _look_up(weight, request.factorisation)
            keep = found is None and kept + weight.nbytes <= _HELD_WEIGHTS
            kept += weight.nbytes if keep else 0
            return _LookedUp(identity, weight.device, found, weight if keep else None)

        looked_up = _in_threads(look_up, requests)
        missing: dict[str, int] = {}
        held: dict[str, Decomposed] = {}
        for index, (identity, _, found, _) in enumerate(looked_up):
            if identity is None:
                continue
            if found is None:
                missing.setdefault(identity.key, index)
            else:
                held.setdefault(identity.key, found)

        def make(index: int) -> Decomposed:
            request, (identity, _, _, weight) = requests[index], looked_up[index]
            weight = request.weight() if weight is None else weight
            return _provide(weight, request.factorisation, identity, started)

        def work(keys: Sequence[str]) -> dict[str, Decomposed | Exception]:
            bar = progress(len(keys)) if progress and keys and _processes.is_first() else None

            def attempt(key: str) -> Decomposed | Exception:
                try:
                    return _moved(make(missing[key]), torch.device("cpu"))
                except Exception as error:
                    return error
                finally:
                    if bar is not None:
                        bar.update(1)

            on_cpu = all(looked_up[missing[key]].device.type == "cpu" for key in keys)
            with contextlib.nullcontext() if bar is None else contextlib.closing(bar):
                made = _in_threads(attempt, keys) if on_cpu else [attempt(key) for key in keys]
            return dict(zip(keys, made, strict=True))

        costs = {key: looked_up[index].work for key, index in missing.items()}
        made = _processes.share_out(costs, held, work, alone=not over_processes)
        results = []
        for index, (identity, device, found, _) in enumerate(looked_up):
            result: Decomposed | Exception
            if identity is None:
                result = make(index)
            else:
                result = made[identity.key] if found is None else found
            if isinstance(result, Exception):
                raise result
            results.append(_moved(result, device))
        return results


def _look_up(
    weight: Tensor, factorisation: Factorisation
) -> tuple[_Identity | None, Decomposed | None]:
    """What names a factorisation, and the factorisation itself if it is in the cache.

    Nothing names it if it is not of the weight, or the weight is no good.
    """
    if not factorisation.of_weight or weight.is_meta or weight.dim() != 2 or weight.numel() == 0:
        return None, None
    about = {
        "weight": f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}",
        "factorisation": repr(factorisation),
    }
    rows, columns = weight.shape
    work = float(rows * columns * factorisation.shapes(rows, columns)["left"][1])
    path, entry = None, None
    if work >= _SMALLEST and cache_limit() > 0:
        path = cache_folder() / f"{_name(weight, about)}.safetensors"
        entry = _read(path)
    weight_hash = hash_values(weight, weight.dtype) if entry is None else entry.weight_hash
    key = hashlib.sha256(repr((VERSION, weight_hash, about)).encode()).hexdigest()
    identity = _Identity(key, weight_hash, about, work, path)
    return identity, None if entry is None else entry.decomposed


def _name(weight: Tensor, about: dict[str, str]) -> str:
    """Of an entry: a keyed XXH3 of the weight's values, hashed with all else that determines it."""
    values = weight.detach().cpu().contiguous()
    state = xxhash.xxh3_128(seed=_secret())
    state.update(octets(values))
    text = repr((VERSION, state.hexdigest(), about))
    return hashlib.sha256(text.encode()).hexdigest()


def _secret() -> int:
    """The key of the entries' names, drawn when the folder of the cache is first used.

    XXH3 is seven times as fast as SHA-256, but who knows its key can make two weights of one hash.
    """
    path = cache_folder() / "secret"
    with _secret_lock:
        try:
            return int(path.read_text(), 16) % 2**64
        except (OSError, ValueError):
            secret = secrets.randbits(64)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, f"{secret:016x}".encode())
        return secret


@torch.no_grad()
def _provide(
    weight: Tensor, factorisation: Factorisation, identity: _Identity | None, since: float
) -> Decomposed:
    """Read the factorisation, which another process may have made by now, or make and keep it."""
    entry = None if identity is None or identity.path is None else _read(identity.path)
    if entry is not None:
        return _moved(entry.decomposed, weight.device)
    basis = factorisation(weight)
    if identity is None:
        return Decomposed(basis, fingerprint_of(weight, factorisation, basis))
    weight_hash = identity.weight_hash if weight.dtype == widened(weight.dtype) else None
    made = Decomposed(basis, fingerprint_of(weight, factorisation, basis, weight_hash))
    _keep(identity, made, since)
    return made


def fingerprint_of(
    weight: Tensor,
    factorisation: Factorisation,
    basis: SpectralBasis,
    weight_hash: str | None = None,
) -> Fingerprint:
    """Fingerprint of a weight [out, in] and a basis that the factorisation could have given."""
    if factorisation.of_weight:
        return Fingerprint.of(weight, basis, weight_hash)
    # Nothing of the weight but its shape, so that any of this shape will do.
    return Fingerprint.of(torch.zeros((), dtype=torch.float32), basis)


def _moved(decomposed: Decomposed, device: torch.device) -> Decomposed:
    left, values, right = decomposed.basis
    values = None if values is None else values.to(device)
    return decomposed._replace(basis=SpectralBasis(left.to(device), values, right.to(device)))


def _in_threads(fn: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``fn`` of every item, several at a time, on no more threads in all than torch would use.

    LAPACK on several threads gains little on one matrix; as many matrices on one thread each do.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if workers < 2:
        return [fn(item) for item in items]
    limit = partial(torch.set_num_threads, threads // workers)
    try:
        with ThreadPoolExecutor(workers, initializer=limit) as pool:
            return list(pool.map(fn, items))
    finally:
        # What one thread sets is the number for all that torch has not seen yet.
        torch.set_num_threads(threads)


# ---- the cache on disk


@dataclass(frozen=True)
class CacheEntry:
    """A factorisation on disk.

    Attributes:
        path: its file.
        size: in bytes.
        last_use: when it was last written or read, in seconds since the epoch.
    """

    path: Path
    size: int
    last_use: float

    def remove(self) -> None:
        """Remove the file; whoever has it mapped keeps it."""
        self.path.unlink(missing_ok=True)
        _note_of(self.path).unlink(missing_ok=True)

    def about(self) -> dict[str, str]:
        """``weight`` (dtype and shape) and ``factorisation``; empty if the file is damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.metadata()[name] for name in ("weight", "factorisation")}
        except _UNREADABLE:
            return {}


#: What a file that is not as we left it raises.
_UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError)


def cache_folder() -> Path:
    """Where factorisations are kept: beside the planner's calibration."""
    return calibration_file().parent / "spectra"


def cache_limit() -> int:
    """Bytes that the cache may take; 0 if it is off.

    Set by :func:`set_cache_limit`, else by the environment variable
    ``SPECTRAL_KERNELS_CACHE_LIMIT``, else 20 GB.

    Raises:
        ValueError: the variable holds no number of bytes.
    """
    if _limit is not None:
        return _limit
    value = os.environ.get(LIMIT_VARIABLE, "")
    if not value:
        return DEFAULT_LIMIT
    try:
        limit = int(float(value))
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ValueError(f"{LIMIT_VARIABLE} must be a number of bytes of at least 0; got {value!r}")
    return limit


def set_cache_limit(limit: int | None) -> None:
    """Let the cache take ``limit`` bytes in this process; 0 switches it off, None undoes this.

    Raises:
        ValueError: not an int of at least 0.
    """
    global _limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise ValueError(f"limit must be None or an int of at least 0; got {limit!r}")
    _limit = limit


def cache_entries() -> list[CacheEntry]:
    """What is in the cache, least recently used first."""
    return sorted(_files(".safetensors"), key=lambda entry: entry.last_use)


def clear_cache(unused_days: float = 0.0) -> list[CacheEntry]:
    """Remove what was not used for this many days, by default everything; what was removed.

    Whoever has an entry mapped keeps it.

    Raises:
        ValueError: a negative number of days.
        OSError: a file cannot be removed.
    """
    if not unused_days >= 0:
        raise ValueError(f"unused_days must be at least 0; got {unused_days!r}")
    newest = time.time() - 86400 * unused_days
    removed = [entry for entry in cache_entries() if unused_days == 0 or entry.last_use <= newest]
    for entry in removed:
        entry.remove()
    _sweep()
    return removed


def _files(suffix: str) -> Iterator[CacheEntry]:
    for path in cache_folder().glob(f"*{suffix}"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            last_use = status.st_mtime
            with contextlib.suppress(OSError):
                last_use = max(last_use, _note_of(path).stat().st_mtime)
            yield CacheEntry(path, status.st_size, last_use)


class _Entry(NamedTuple):
    """What a file of the cache holds.

    Attributes:
        weight_hash: SHA-256 of the weight's values in their own dtype.
        decomposed: the factorisation, on the CPU.
    """

    weight_hash: str
    decomposed: Decomposed


def _read(path: Path) -> _Entry | None:
    """An entry from its file; None if there is none that is as it was."""
    try:
        status = path.stat()
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # An open file is no dict, and has no other way to be gone through.
            factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weight_hash, fingerprint = metadata["weight_sha256"], metadata["fingerprint"]
        if not _is_noted(path, status):
            if metadata["seal"] != _seal(path, weight_hash, fingerprint, factors):
                raise ValueError("its content is not what was written")
            _note(path, status)
        packed = torch.frombuffer(bytearray.fromhex(fingerprint), dtype=torch.uint8)
        basis = SpectralBasis(factors["left"], factors.get("singular_values"), factors["right"])
        entry = _Entry(weight_hash, Decomposed(basis, Fingerprint.from_tensor(packed)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _UNREADABLE as error:
        warnings.warn(
            f"{path} cannot be used, the weight is decomposed again: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        _mark_used(_note_of(path))
    return entry


def _keep(identity: _Identity, made: Decomposed, since: float) -> None:
    """Write a factorisation to its file, or warn; entries used after ``since`` are not removed."""
    if identity.path is None:
        return
    factors = {
        name: factor.cpu() for name, factor in made.basis._asdict().items() if factor is not None
    }
    fingerprint = bytes(made.fingerprint.to_tensor().tolist()).hex()
    metadata = {
        **identity.about,
        "weight_sha256": identity.weight_hash,
        "fingerprint": fingerprint,
        "seal": _seal(identity.path, identity.weight_hash, fingerprint, factors),
    }
    data = save(factors, metadata)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = _make_room(len(data), since)
        if reason is None:
            _replace(identity.path, data)
            _note(identity.path, identity.path.stat())
    except OSError as error:
        reason = f"{error.strerror or error}"
    if reason is not None:
        warnings.warn(
            f"factorisations are not kept in {folder} for the next start: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def _replace(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file; whoever reads it sees the old file or the whole new one.

    ``durable``: even after the power fails in between.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        _mark_used(name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _mark_used(path: Path | str) -> None:
    # By our clock, with which it will be compared; that of the file system is coarser.
    now = time.time()
    os.utime(path, (now, now))


def _make_room(size: int, since: float) -> str | None:
    """Remove the least recently used entries for a new one; None, or why there is no room.

    The limit is never more than half of what the disk has for the cache. Entries used after
    ``since`` stay: a model that does not fit as a whole would push out its own first layers, and
    find nothing the next time.
    """
    _sweep()
    entries = cache_entries()
    held = sum(entry.size for entry in entries)
    limit = min(cache_limit(), (held + shutil.disk_usage(cache_folder()).free) // 2)
    excess = held + size - limit
    for entry in entries:
        if excess <= 0 or entry.last_use >= since:
            break
        entry.remove()
        excess -= entry.size
    if excess <= 0:
        return None
    return (
        f"the limit of {limit / 1e9:.3g} GB is reached; set {LIMIT_VARIABLE}, in bytes, free space "
        "on the disk, or run spectral-adapters cache clear"
    )


def _sweep() -> None:
    """Remove the temporary files of processes that were killed, and notes on nothing."""
    for entry in _files(".tmp"):
        if entry.last_use < time.time() - _ABANDONED:
            entry.path.unlink(missing_ok=True)
    for note in cache_folder().glob("*.checked"):
        if not note.with_suffix(".safetensors").exists():
            note.unlink(missing_ok=True)


def _note_of(path: Path) -> Path:
    return path.with_suffix(".checked")


def _moment(status: os.stat_result) -> str:
    """What changes whenever a file is written to, moved or replaced."""
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"


def _is_noted(path: Path, status: os.stat_result) -> bool:
    """Whether an entry is untouched since it was found whole."""
    try:
        return _note_of(path).read_text() == _moment(status)
    except (OSError, ValueError):
        return False


def _note(path: Path, status: os.stat_result) -> None:
    """Note that an entry is whole, as of its ``status``; nothing happens where that cannot be.

    Waits until whatever happens to the file afterwards gives it another time.
    """
    time.sleep(min(max(0.0, status.st_ctime + _TICK - time.time()), _TICK))
    with contextlib.suppress(OSError):
        _replace(_note_of(path), _moment(status).encode(), durable=False)


def _seal(path: Path, weight_hash: str, fingerprint: str, factors: dict[str, Tensor]) -> str:
    """What tells a damaged or foreign file: a hash of its name and of sums over the tensors' words.

    Reading the words is all that it costs, ten times less than a hash of them.
    """
    sums = []
    for name in sorted(factors):
        factor = factors[name]
        content = factor.reshape(-1).view(torch.uint8)
        whole = len(content) // 8 * 8
        words, rest = content[:whole].view(torch.int64), content[whole:]
        sums.append((name, str(factor.dtype), list(factor.shape), int(words.sum() + rest.sum())))
    text = repr((path.name, weight_hash, fingerprint, sums))
    return hashlib.sha256(text.encode()).hexdigest()
