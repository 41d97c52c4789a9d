"""Runs of two processes on the CPU, and what they send each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import ClassVar

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Two processes against one: sums in another order, in fp32.
SAME = 1e-6
TIMEOUT = 120


def run_together(commands, folder):
    """Run commands, each with a ``RANK``, until all are through; what they said."""
    running = []
    for rank, command in enumerate(commands):
        with open(folder / f"{rank}.log", "w") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    deadline = time.monotonic() + TIMEOUT
    codes = [process.poll() for process in running]
    # The others may wait for one that failed.
    while None in codes and set(codes) <= {None, 0} and time.monotonic() < deadline:
        time.sleep(0.1)
        codes = [process.poll() for process in running]
    for process in running:
        if process.poll() is None:
            # The whole group: a launcher has children.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = "\n".join((folder / f"{rank}.log").read_text() for rank in range(len(commands)))
    assert set(codes) == {0}, f"exit codes {codes} (None: killed, {TIMEOUT} s at most)\n{said}"
    return said


def leave_together():
    """End a process of a group when all are through.

    Not by the interpreter's end: a thread of the group's that still runs there has aborted a
    process whose work was done.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Traffic(TorchDispatchMode):
    """Counts the collective calls in a block, and the Cayley transforms.

    Attributes:
        calls: number of calls by name.
        bytes: by name, of the whole tensor that is exchanged: what a gather gives, what a reduction
            takes.
    """

    #: c10d's operators, by their names in torch.distributed.
    NAMES: ClassVar[dict[str, str]] = {
        "c10d::allreduce_": "all_reduce",
        "c10d::_allgather_base_": "all_gather",
        "c10d::_reduce_scatter_base_": "reduce_scatter",
        "c10d::broadcast_": "broadcast",
        "spectral::cayley_fwd": "cayley_fwd",
        "spectral::cayley_bwd": "cayley_bwd",
    }

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        full = function._schema.name
        if full in self.NAMES or full.startswith("c10d"):
            name = self.NAMES.get(full, full)
            # (output, input, ...): the whole is the larger one.
            sizes = [
                sum(t.numel() * t.element_size() for t in tree_leaves(group) if hasattr(t, "numel"))
                for group in args[:2]
            ]
            self.calls[name] += 1
            self.bytes[name] += max(sizes)
        return function(*args, **(kwargs or {}))
