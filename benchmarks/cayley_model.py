"""All rotations of an adapter of SDXL: many small matrices of few sizes, forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from adapted import Base
from providers import (
    Candidate,
    Tensors,
    Unavailable,
    _exact_cayley,
    _leaves,
    _pack,
    _unpack,
    inverse_batched,
)
from torch import Tensor, nn
from unet_providers import adapted_shapes

from spectral_adapters.autograd import (
    GradientPool,
    apply,
    share_rotations,
)
from spectral_adapters.factors import PUBLISHED_FACTORS, balanced_factors
from spectral_adapters.functional import cayley, cayley_factors
from spectral_kernels import backend_report

#: hidden size, layers, heads and feed-forward size of SDXL's two text encoders.
TEXT_ENCODERS = ((768, 12, 12, 3072), (1280, 32, 20, 5120))
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@lru_cache
def sdxl_shapes() -> tuple[tuple[int, int], ...]:
    """Shape (out, in) of every attention projection of SDXL: UNet and both text encoders, 736."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError as error:
        raise Unavailable("transformers is not installed") from error
    shapes = list(adapted_shapes("sdxl"))
    for hidden, layers, heads, wide in TEXT_ENCODERS:
        config = CLIPTextConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=wide,
        )
        with torch.device("meta"):
            encoder: nn.Module = CLIPTextModel(config)
        found = Base(encoder, TEXT_TARGETS).layers(encoder)
        shapes += [(layer.out_features, layer.in_features) for _, layer in found]
    return tuple(shapes)


def factor_counts(preset: str) -> dict[int, int]:
    """How many factors there are of each size.

    Args:
        preset: "published", the three factors per layer of the published code, which rotate the
            input; "balanced", this project's default, two factors that rotate the spectrum; "toy".
    """
    if preset == "toy":
        return {4: 3, 6: 2}
    counts: Counter[int] = Counter()
    for rows, columns in sdxl_shapes():
        counts.update(
            PUBLISHED_FACTORS[columns]
            if preset == "published"
            else balanced_factors(min(rows, columns))
        )
    return dict(sorted(counts.items()))


@dataclass(frozen=True)
class CayleyModelCase:
    """All rotations of an SDXL adapter from packed skew parameters, forward and backward, fp32."""

    preset: str
    device: str

    def __str__(self) -> str:
        return f"sdxl-{self.preset}-{self.device}"

    def build(self) -> CayleyModelProblem:
        return CayleyModelProblem(self)

    def note(self) -> str:
        """How many there are, and where they are computed."""
        counts = factor_counts(self.preset)
        sizes = ", ".join(f"{count} of {n}" for n, count in counts.items())
        where = backend_report()["cayley_fwd"].implementation
        return f"{where}; {sum(counts.values()):,} matrices: {sizes}"


class CayleyModelProblem:
    """Packed parameters [count, n(n-1)/2] per size, and gradients of the rotations."""

    def __init__(self, case: CayleyModelCase) -> None:
        self.case = case
        self.counts = factor_counts(case.preset)
        generator = torch.Generator().manual_seed(0)
        packed = [
            torch.randn(count, n * (n - 1) // 2, generator=generator) * 0.2
            for n, count in self.counts.items()
        ]
        grads = [torch.randn(count, n, n, generator=generator) for n, count in self.counts.items()]
        self.packed = [p.to(case.device) for p in packed]
        self.grads = [g.to(case.device) for g in grads]

    @property
    def sizes(self) -> list[int]:
        return list(self.counts)

    @property
    def sizes_one_by_one(self) -> list[int]:
        return [n for n, count in self.counts.items() for _ in range(count)]

    @cached_property
    def expected(self) -> Tensors:
        """All R [count, n, n] and all packed dP [count, n(n-1)/2], in float64."""
        packed = _leaves(self.packed, torch.float64)
        rotations = [_exact_cayley(_unpack(p, n)) for p, n in zip(packed, self.sizes, strict=True)]
        return _finish(rotations, packed, [grad.double() for grad in self.grads])

    def one_by_one(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The matrices of all batches as tensors of their own."""
        return [matrix.clone() for batch in batches for matrix in batch]

    def batched(self, outputs: Tensors) -> Tensors:
        """The other way round; rotations first, then gradients."""
        parts = torch.utils._pytree.tree_leaves(list(outputs))
        counts = [*self.counts.values()] * 2
        return [torch.stack(part) for part in _split(parts, counts)]


def _split(items: Sequence[Tensor], counts: Sequence[int]) -> list[tuple[Tensor, ...]]:
    remaining = iter(items)
    return [tuple(next(remaining) for _ in range(count)) for count in counts]


def _finish(rotations: Tensors, leaves: Tensors, grads: Tensors) -> Tensors:
    return [
        *(rotation.detach() for rotation in rotations),
        *torch.autograd.grad(rotations, leaves, grads),
    ]


def ours_batched(problem: CayleyModelProblem) -> Candidate:
    """One call; the parameters are stored batched, one tensor per size."""
    packed, sizes = _leaves(problem.packed, torch.float32), problem.sizes

    def step() -> Tensors:
        return _finish(cayley(packed, sizes), packed, problem.grads)

    return Candidate(step, lambda: problem.expected)


def ours_one_by_one(problem: CayleyModelProblem) -> Candidate:
    """One call; every factor is a parameter of its own and a tensor of its own to autograd."""
    packed = _leaves(problem.one_by_one(problem.packed), torch.float32)
    grads, sizes = problem.one_by_one(problem.grads), problem.sizes_one_by_one

    def step() -> Tensors:
        return _finish(cayley_factors(packed, sizes), packed, grads)

    return Candidate(step, lambda: problem.expected, problem.batched)


class _Gradients(torch.autograd.Function):
    """Stands for the layers of a model with a rotation bank: its backward finds these gradients."""

    @staticmethod
    def forward(token: Tensor, pool: GradientPool, grads: Tensors) -> Tensor:
        return token.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.pool, ctx.grads = inputs

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        ctx.pool.add(0, ctx.grads, ctx.grads[0])
        return None, None, None


def ours_in_a_model(problem: CayleyModelProblem) -> Candidate:
    """As a model with a rotation bank does it: every factor is a parameter of its own, and a pool
    takes the gradients to the one node of the graph."""
    packed = _leaves(problem.one_by_one(problem.packed), torch.float32)
    grads, sizes = problem.one_by_one(problem.grads), problem.sizes_one_by_one

    def step() -> Tensors:
        with torch.no_grad():
            rotations = torch.ops.spectral.cayley_fwd([p.detach() for p in packed], sizes)
        token, pool = share_rotations(rotations, packed)
        end = apply(_Gradients, token, pool, grads)
        return [*rotations, *torch.autograd.grad(end, packed)]

    return Candidate(step, lambda: problem.expected, problem.batched)


def ours_in_a_graph(problem: CayleyModelProblem) -> Candidate:
    """The batched call as a CUDA graph: what the kernels take without the calls from Python."""
    if problem.case.device != "cuda":
        raise Unavailable("needs a CUDA device")
    step = ours_batched(problem).step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> Tensors:
        graph.replay()
        return outputs

    return Candidate(replay, lambda: problem.expected)


def solve_loop(problem: CayleyModelProblem) -> Candidate:
    """Every layer for itself, by solving."""
    squares = _squares(problem.one_by_one(problem.packed), problem.sizes_one_by_one)
    grads = problem.one_by_one(problem.grads)

    def step() -> Tensors:
        return _finish([_solve(square) for square in squares], squares, grads)

    return Candidate(step, lambda: problem.expected, partial(_packed_batches, problem))


def _solve(square: Tensor) -> Tensor:
    upper = square.triu(1) * 0.5
    skew = upper - upper.mT
    identity = torch.eye(len(square), device=square.device)
    return torch.linalg.solve(identity - skew, identity + skew)


def _invert(square: Tensor) -> Tensor:
    upper = square.triu(1) * 0.5
    identity = torch.eye(square.shape[-1], device=square.device)
    return inverse_batched(upper - upper.mT, identity)


def _squares(packed: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    squares = [_unpack(p, n) for p, n in zip(packed, sizes, strict=True)]
    return [square.requires_grad_() for square in squares]


def _packed_batches(problem: CayleyModelProblem, outputs: Tensors) -> Tensors:
    batches = problem.batched(outputs)
    half = len(batches) // 2
    return [*batches[:half], *map(_pack, batches[half:])]


def _invert_all(*squares: Tensor) -> tuple[Tensor, ...]:
    return tuple(_invert(square) for square in squares)


def inverse(transform: Callable[..., Tensors]) -> Callable[[CayleyModelProblem], Candidate]:
    """One batched inverse per size; the parameters are stored batched."""

    def provider(problem: CayleyModelProblem) -> Candidate:
        squares = _squares(problem.packed, problem.sizes)

        def step() -> Tensors:
            return _finish(transform(*squares), squares, problem.grads)

        def comparable(outputs: Tensors) -> Tensors:
            half = len(outputs) // 2
            return [*outputs[:half], *map(_pack, outputs[half:])]

        return Candidate(step, lambda: problem.expected, comparable)

    return provider


def inverse_stacked(problem: CayleyModelProblem) -> Candidate:
    """One batched inverse per size; every factor is a parameter of its own, stacked each step."""
    squares = _squares(problem.one_by_one(problem.packed), problem.sizes_one_by_one)
    grads = problem.one_by_one(problem.grads)
    counts = list(problem.counts.values())

    def step() -> Tensors:
        stacks = [torch.stack(group) for group in _split(squares, counts)]
        rotations = [r for batch in _invert_all(*stacks) for r in batch.unbind()]
        return _finish(rotations, squares, grads)

    return Candidate(step, lambda: problem.expected, partial(_packed_batches, problem))


def products(problem: CayleyModelProblem) -> Candidate:
    """Batched products with the operations of the formulas: one for an inverse, three backward."""

    def step() -> Tensors:
        return [grad @ grad for grad in problem.grads for _ in range(4)]

    def oracle() -> Tensors:
        return [g @ g for g in (grad.double() for grad in problem.grads) for _ in range(4)]

    return Candidate(step, oracle)


CAYLEY_MODEL_PROVIDERS: dict[str, Callable[[CayleyModelProblem], Candidate]] = {
    "ours": ours_batched,
    "ours, own parameters": ours_in_a_model,
    "ours, own tensors": ours_one_by_one,
    "solve loop": solve_loop,
    "inv_ex": inverse(_invert_all),
    "inv_ex, own parameters": inverse_stacked,
    "inv_ex, compiled": inverse(torch.compile(_invert_all, dynamic=False)),
    "GEMMs": products,
    "ours, CUDA graph": ours_in_a_graph,
}
