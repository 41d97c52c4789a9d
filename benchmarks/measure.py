"""Check every provider of a case against its oracle, then time the right ones turn by turn."""

from __future__ import annotations

import gc
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import quantiles
from typing import Any, Protocol

import pytest
import torch
from providers import TOLERANCES, Candidate, Step, Unavailable
from torch import Tensor

#: Of a candidate that does not say otherwise.
TOLERANCE = TOLERANCES["float32"]

#: How the problem of a provider begins that should have worked.
WRONG = ("wrong: ", "failed: ")

FEWEST_ROUNDS, MOST_ROUNDS = 7, 400


class Case(Protocol):
    """Where and on what to measure; ``str`` names it."""

    device: str

    def build(self) -> Any: ...

    def note(self) -> str: ...


@dataclass
class Result:
    """One provider on one case: seconds per step, or why there are none."""

    error: float = 0.0
    problem: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    held_bytes: int = 0

    @property
    def is_wrong(self) -> bool:
        """Whether it failed or disagrees with its oracle, not merely is not installed."""
        return self.problem.startswith(WRONG)

    def percentiles(self) -> dict[str, float]:
        """Seconds at the minimum and the 20th, 50th and 80th percentile."""
        fifths = quantiles(self.seconds, n=10, method="inclusive")
        return {
            "min": min(self.seconds),
            "20": fifths[1],
            "50": fifths[4],
            "80": fifths[7],
        }


def measure(
    case: Case, providers: Mapping[str, Callable[[Any], Candidate]], seconds: float
) -> dict[str, Result]:
    """Results of all providers on ``case``, timed for about ``seconds`` in all.

    Providers take turns in an order shuffled anew each round, so that a machine that slows down or
    speeds up does so for all of them. A provider that disagrees with its oracle is not timed.
    """
    problem = case.build()
    results: dict[str, Result] = {}
    steps: dict[str, Step] = {}
    for name, provider in providers.items():
        results[name] = Result()
        try:
            candidate = provider(problem)
            results[name].error = error_of(candidate)
        except Unavailable as reason:
            results[name].problem = str(reason)
            continue
        except Exception as error:
            # The others are still worth measuring.
            traceback.print_exc()
            results[name].problem = f"failed: {type(error).__name__}: {error}"
            continue
        results[name].held_bytes = candidate.held_bytes
        if results[name].error <= candidate.tolerance:
            steps[name] = candidate.step
        else:
            results[name].problem = f"wrong: relative error {results[name].error:.1e}"

    for name, step in steps.items():
        results[name].peak_bytes = peak_memory(step, case.device)
    one_round = sum(duration(step, case.device) for step in steps.values())
    rounds = int(min(max(seconds / one_round, FEWEST_ROUNDS), MOST_ROUNDS))
    order = list(steps)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                results[name].seconds.append(duration(steps[name], case.device))
    finally:
        gc.enable()
    return results


def error_of(candidate: Candidate) -> float:
    """Largest relative error of any output; infinite for NaN or a wrong shape."""
    actual, expected = candidate.comparable(candidate.step()), candidate.oracle()
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return float("inf")
    errors = [_relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    return max(errors)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).abs().amax()
    error = float(difference / expected.abs().amax().clamp_min(1e-30))
    return error if error == error else float("inf")


def duration(step: Step, device: str) -> float:
    """Seconds of one step: by the clock on the CPU, by events on a GPU with a cold cache."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler().zero_()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@lru_cache(maxsize=1)
def _cache_filler() -> Tensor:
    """Twice the GPU's last cache: writing it leaves nothing of a step's inputs there.

    It keeps the GPU busy for about as long as Python needs to prepare the first kernel, too.
    """
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device="cuda")


def peak_memory(step: Step, device: str) -> int:
    """Largest number of bytes that one step holds beyond what was there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class RecordedClock:
    """A clock that moves by recorded durations only.

    pytest-benchmark times one provider after the other; with this timer it does its statistics,
    tables and files on durations that were measured turn by turn.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: Iterator[float]) -> None:
        self._now += next(seconds)


CLOCK = RecordedClock()


def deliver(benchmark: Any, group: str, result: Result) -> None:
    """Hand a result to a ``benchmark`` fixture that has the timer ``CLOCK.now``."""
    if result.is_wrong:
        pytest.fail(result.problem)
    if not result.seconds:
        pytest.skip(result.problem)
    benchmark.group = group
    benchmark.pedantic(CLOCK.advance, (iter(result.seconds),), rounds=len(result.seconds))
