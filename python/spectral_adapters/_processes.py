"""Work that all processes of a torch.distributed job need, shared out so that each piece is done
once.

Processes may call this at different times, for different work, or not all of them: an adapter is
sometimes added by the first process alone. So they meet through the job's key-value store before
any collective call, and who has waited in vain works alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

T = TypeVar("T")

#: Seconds that a process waits for the others to come to the same point.
PATIENCE = 30.0

#: Longer than any share of the work; a process that dies is noticed at once all the same.
_WORK = timedelta(days=1)


def are_several() -> bool:
    """Whether this process is one of several in a torch.distributed job."""
    return (
        dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
        and dist.is_gloo_available()
    )


def is_first() -> bool:
    """Whether this process is the one that talks to the user."""
    return not are_several() or dist.get_rank() == 0


def share_out(
    costs: Mapping[str, float],
    held: Mapping[str, T],
    work: Callable[[Sequence[str]], Mapping[str, T | Exception]],
    *,
    alone: bool = False,
) -> dict[str, T | Exception]:
    """What this process needs, each piece made by one process of the job and sent to the others.

    Args:
        costs: the pieces that are missing here, by name, and what each costs in any unit.
        held: pieces that are here already, for processes that miss them.
        work: makes pieces by name; an exception stands for a piece that cannot be made.
        alone: make everything here.

    Returns:
        A result for every name in ``costs``, the same bits in all processes.
    """
    mine = sorted(costs, key=lambda name: (-costs[name], name))
    if alone or not mine or not are_several():
        return dict(work(mine))
    if not _meet():
        warnings.warn(
            f"the other processes of this job did not come to decompose weights within {PATIENCE:g}"
            f" s: process {dist.get_rank()} decomposes its {len(mine)} matrices alone",
            RuntimeWarning,
            stacklevel=2,
        )
        # Where the others work alone too, each begins elsewhere and finds more and more on disk.
        start = len(mine) * dist.get_rank() // dist.get_world_size()
        return dict(work(mine[start:] + mine[:start]))
    group = dist.new_group(backend="gloo", timeout=_WORK)
    try:
        return _exchange(costs, held, work, group)
    finally:
        dist.destroy_process_group(group)


def _exchange(
    costs: Mapping[str, float],
    held: Mapping[str, T],
    work: Callable[[Sequence[str]], Mapping[str, T | Exception]],
    group: Any,
) -> dict[str, T | Exception]:
    offers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(offers, (dict(costs), list(held)), group=group)
    owners = assign([offer[0] for offer in offers], [offer[1] for offer in offers])
    rank = dist.get_rank()
    mine = [name for name, owner in owners.items() if owner == rank]
    made = {**held, **work([name for name in mine if name not in held])}
    results: dict[str, T | Exception] = {}
    for name, owner in owners.items():
        parcel: list[Any] = [made[name] if owner == rank else None]
        dist.broadcast_object_list(parcel, src=owner, group=group)
        if name in costs:
            results[name] = parcel[0]
    return results


def assign(missing: Sequence[Mapping[str, float]], held: Sequence[Sequence[str]]) -> dict[str, int]:
    """Who provides each missing piece: a process that has it, or the one with the least to do.

    Args:
        missing: by process, what it misses and what that costs.
        held: by process, what it has.

    Returns:
        Process by piece, costly pieces first; the same for the same arguments.
    """
    costs = {name: cost for needs in missing for name, cost in needs.items()}
    loads = [0.0] * len(missing)
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        holders = [rank for rank, names in enumerate(held) if name in names]
        able = [rank for rank, needs in enumerate(missing) if name in needs]
        owner = holders[0] if holders else min(able, key=lambda rank: loads[rank])
        loads[owner] += 0.0 if holders else costs[name]
        owners[name] = owner
    return owners


def _meet() -> bool:
    """Wait until all processes are here; False in all of them once one has waited in vain.

    Everybody goes to the first meeting that is not over. One that somebody gave up is over for all,
    so that processes find each other again whatever some of them did alone.
    """
    store = distributed_c10d._get_default_store()
    everybody = dist.get_world_size()
    names = (f"spectral_adapters/meeting {number}" for number in count())
    decision = next(name for name in names if not store.check([name]))
    if store.add(f"{decision}, arrived", 1) == everybody:
        return store.compare_set(decision, "", "together") == b"together"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if store.check([decision]):
            return store.get(decision) == b"together"
        time.sleep(0.01)
    return store.compare_set(decision, "", "alone") == b"together"
