"""What is timed, as data: problems, the providers that solve them, and the float64 oracles.

A provider is a function from a problem to a :class:`Candidate`: a step to time, and what the step
must return according to a float64 oracle. A step is one forward and backward through autograd
(unless it says otherwise) and returns all that it computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spectral_adapters import SODALinear, SpectralAdapterALinear, SpectralAdapterRLinear
from spectral_adapters.factors import balanced_factors
from spectral_adapters.functional import cayley
from spectral_adapters.planner import choose_plan
from spectral_kernels import backend_report

Tensors = Sequence[Tensor]
Step = Callable[[], Tensors]

LORA_RANK, LORA_ALPHA = 8, 16
OFT_BLOCK = 32

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MARKS = {"float32": "", "bfloat16": "-bf16"}

#: Largest error of any output, relative to that output's largest entry: fp32 sums of 4,096 terms,
#: and a handful of roundings to 8 bits one after the other.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


def _itself(outputs: Tensors) -> Tensors:
    return outputs


@dataclass(frozen=True)
class Candidate:
    """One provider on one problem.

    Attributes:
        step: what is timed; returns the value and every gradient.
        oracle: the same tensors in float64.
        comparable: brings the step's tensors into the oracle's form, outside the timing.
        tolerance: largest error of any output, relative to that output's largest entry.
        held_bytes: what it keeps between steps beside the inputs, where that is of interest.
        reset: goes back to where the oracle starts, for steps that change what they start from.
    """

    step: Step
    oracle: Step
    comparable: Callable[[Tensors], Tensors] = _itself
    tolerance: float = TOLERANCES["float32"]
    held_bytes: int = 0
    reset: Callable[[], None] | None = None


class Unavailable(Exception):
    """A provider whose library is not installed here."""


IN_GRAPH = ", CUDA graph"


def in_cuda_graph(provider: Callable[[Any], Candidate]) -> Callable[[Any], Candidate]:
    """The same step recorded once and replayed: what the device takes, without calls from Python.

    The graphs of one problem share their memory: each replay writes all that it reads.
    """

    def recorded(problem: Any) -> Candidate:
        if problem.case.device != "cuda":
            raise Unavailable("needs a CUDA device")
        candidate = provider(problem)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                candidate.step()
        torch.cuda.current_stream().wait_stream(stream)
        if not hasattr(problem, "graph_pool"):
            problem.graph_pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=problem.graph_pool):
            outputs = candidate.step()
        if candidate.reset is not None:
            candidate.reset()

        def replay(_: Step = candidate.step) -> Tensors:  # with all that the recording reads
            graph.replay()
            return outputs

        return replace(candidate, step=replay)

    return recorded


def in_cuda_graphs(
    providers: Mapping[str, Callable[[Any], Candidate]],
) -> dict[str, Callable[[Any], Candidate]]:
    """Each provider as a CUDA graph, under its name and ``IN_GRAPH``."""
    return {name + IN_GRAPH: in_cuda_graph(provider) for name, provider in providers.items()}


def _step(value: Tensor, leaves: Tensors, grad: Tensor) -> Tensors:
    return [value.detach(), *torch.autograd.grad(value, leaves, grad)]


def _leaves(tensors: Tensors, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def _unpack(packed: Tensor, n: int) -> Tensor:
    """[..., n(n-1)/2] to strictly upper triangular [..., n, n]."""
    rows, columns = torch.triu_indices(n, n, 1)
    square = packed.new_zeros(*packed.shape[:-1], n, n)
    square[..., rows, columns] = packed
    return square


def _pack(square: Tensor) -> Tensor:
    """The strict upper triangle of [..., n, n], row by row."""
    n = square.shape[-1]
    rows, columns = torch.triu_indices(n, n, 1)
    return square[..., rows, columns]


def _exact_cayley(upper: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 with Q = (P - P^T)/2 for strictly upper triangular P [..., n, n]."""
    skew = (upper - upper.mT) / 2
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve(identity - skew, identity + skew)


@dataclass(frozen=True)
class SODACase:
    """A square SODALinear [n, n] and a batch of M tokens; what is trained is fp32."""

    n: int
    tokens: int
    device: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"n{self.n}-M{self.tokens}{_MARKS[self.dtype]}-{self.device}"

    def build(self) -> SODAProblem:
        return SODAProblem(self)

    def note(self) -> str:
        """The plan that "auto" takes here."""
        sizes = balanced_factors(self.n)
        choice = choose_plan(
            self.tokens, self.n, self.n, sizes, decomposition="svd", rotation="left"
        )
        return choice.name


class SODAProblem:
    """A layer away from the identity, tokens x [M, n] and the gradient of its output [M, n]."""

    def __init__(self, case: SODACase) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.n + case.tokens)
        shape, options = (case.tokens, case.n), (case.device, DTYPES[case.dtype])
        self.x = torch.randn(shape, generator=generator).to(*options).requires_grad_()
        self.grad = torch.randn(shape, generator=generator).to(*options)
        self.layer = _soda_layer(case.n, *options)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.layer.factor_sizes

    @property
    def weight(self) -> Tensor:
        """The base weight [n, n]."""
        spectrum = self.layer.singular_values
        return (self.layer.left * spectrum) @ self.layer.right.to(spectrum.dtype)

    @property
    def basis(self) -> list[Tensor]:
        """U, S and V^T in the dtype of the tokens."""
        return [factor.detach().to(self.x.dtype) for factor in self.layer.basis]

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.case.dtype]

    def squares(self) -> list[Tensor]:
        """The trained rotation as strictly upper triangular [n_i, n_i] leaves."""
        return [
            _unpack(packed.detach(), n).requires_grad_()
            for packed, n in zip(self.layer.rotation, self.sizes, strict=True)
        ]

    @cached_property
    def expected(self) -> Tensors:
        """y, dx, d delta and the packed dP_i from ``W' = (U R) diag(s) V^T`` built in float64."""
        left, spectrum, right = [t.detach().double() for t in self.layer.basis]
        x, delta = _leaves([self.x, self.layer.delta], torch.float64)
        packed = _leaves(self.layer.rotation, torch.float64)
        rotations = [_exact_cayley(_unpack(p, n)) for p, n in zip(packed, self.sizes, strict=True)]
        weight = left @ reduce(torch.kron, rotations) @ torch.diag(spectrum + delta) @ right
        return _step(x @ weight.mT, [x, delta, *packed], self.grad.double())


@lru_cache(maxsize=1)
def _soda_layer(n: int, device: str, dtype: torch.dtype) -> SODALinear:
    """The layer of all batch sizes: its decomposition takes longer than its timing."""
    torch.manual_seed(n)
    # Decomposed where it is used: on a GPU in a fraction of the time.
    base = nn.Linear(n, n, bias=False).to(device, dtype)
    layer = SODALinear.from_linear(base, basis_dtype="base")
    assert layer.factor_sizes == balanced_factors(n)
    with torch.no_grad():
        layer.delta.normal_(0, 0.1)
        for packed in layer.rotation:
            packed.normal_(0, 0.2)
    return layer


def ours(plan: str) -> Callable[[SODAProblem], Candidate]:
    """This project's layer with a plan."""

    def provider(problem: SODAProblem) -> Candidate:
        layer = problem.layer
        trained = [problem.x, layer.delta, *layer.rotation]

        def step() -> Tensors:
            layer.plan = plan
            return _step(layer(problem.x), trained, problem.grad)

        return Candidate(step, lambda: problem.expected, tolerance=problem.tolerance)

    return provider


def _rotations_by_solve(squares: Tensors, dtype: torch.dtype) -> list[Tensor]:
    """The rotations [n_i, n_i], computed in the squares' dtype and used in ``dtype``."""
    rotations = []
    for square in squares:
        upper = square.triu(1) * 0.5
        skew = upper - upper.mT
        identity = torch.eye(len(square), dtype=square.dtype, device=square.device)
        # Without a look at the result, for which a GPU would have to be waited for.
        solution, _ = torch.linalg.solve_ex(identity - skew, identity + skew)
        rotations.append(solution.to(dtype))
    return rotations


def _rotate_rows(rows: Tensor, rotations: Tensors) -> Tensor:
    """rows [m, k] times the Kronecker product, axis by axis; the fastest plain way we know."""
    m, after = len(rows), rows.shape[1]
    y = rows
    for matrix in rotations:
        n = len(matrix)
        after //= n
        if after == 1:
            y = y.reshape(-1, n) @ matrix
        else:
            y = y.reshape(-1, n, after)
            y = torch.bmm(matrix.mT.expand(len(y), n, n), y)
    return y.reshape(m, -1)


SODAForward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensors], Tensor]


def naive_forward(
    x: Tensor, left: Tensor, spectrum: Tensor, right: Tensor, delta: Tensor, squares: Tensors
) -> Tensor:
    """What the published method does at every step: everything dense, all through autograd."""
    rotation = reduce(torch.kron, _rotations_by_solve(squares, x.dtype))
    scale = (spectrum + delta).to(x.dtype)
    return linear(x, left @ rotation @ torch.diag(scale) @ right)


def plain_tokens(
    x: Tensor, left: Tensor, spectrum: Tensor, right: Tensor, delta: Tensor, squares: Tensors
) -> Tensor:
    """Four products over the tokens, which are rotated themselves."""
    t = linear(x, right) * (spectrum + delta).to(x.dtype)
    back = [rotation.mT for rotation in _rotations_by_solve(squares, x.dtype)]
    return linear(_rotate_rows(t, back), left)


def plain_factored(
    x: Tensor, left: Tensor, spectrum: Tensor, right: Tensor, delta: Tensor, squares: Tensors
) -> Tensor:
    """The basis is rotated, not the tokens."""
    rotated = _rotate_rows(left, _rotations_by_solve(squares, x.dtype))
    return linear(linear(x, right) * (spectrum + delta).to(x.dtype), rotated)


def plain_merged(
    x: Tensor, left: Tensor, spectrum: Tensor, right: Tensor, delta: Tensor, squares: Tensors
) -> Tensor:
    """W' from the rotated basis, then an ordinary linear layer."""
    rotated = _rotate_rows(left, _rotations_by_solve(squares, x.dtype))
    return linear(x, (rotated * (spectrum + delta).to(x.dtype)) @ right)


PLAIN: dict[str, SODAForward] = {
    "plain tokens": plain_tokens,
    "plain factored": plain_factored,
    "plain merged": plain_merged,
}


def through_autograd(forward: SODAForward) -> Callable[[SODAProblem], Candidate]:
    """A plain PyTorch forward, differentiated by autograd."""

    def provider(problem: SODAProblem) -> Candidate:
        layer, squares = problem.layer, problem.squares()
        left, spectrum, right = problem.basis
        delta = layer.delta.detach().clone().requires_grad_()

        def step() -> Tensors:
            y = forward(problem.x, left, spectrum, right, delta, squares)
            return _step(y, [problem.x, delta, *squares], problem.grad)

        def comparable(outputs: Tensors) -> Tensors:
            y, dx, d_delta, *d_squares = outputs
            return [y, dx, d_delta, *map(_pack, d_squares)]

        return Candidate(step, lambda: problem.expected, comparable, problem.tolerance)

    return provider


def compiled_plain(problem: SODAProblem) -> Candidate:
    """The plain version that is fastest on this problem, under ``torch.compile``."""

    def seconds(forward: SODAForward) -> float:
        step = through_autograd(forward)(problem).step
        step()
        start = time.perf_counter()
        for _ in range(3):
            step()[0].sum().item()  # waits for an accelerator
        return time.perf_counter() - start

    fastest = min(PLAIN.values(), key=seconds)
    # Else the seventh shape would reach Dynamo's limit and run uncompiled.
    torch._dynamo.reset()
    return through_autograd(torch.compile(fastest, fullgraph=True, dynamic=False))(problem)


def lora(problem: SODAProblem | LowRankProblem) -> Candidate:
    """PEFT's LoRA of rank 8 on the same weight."""
    layer = _peft_layer(problem, "LoraConfig", r=LORA_RANK, lora_alpha=LORA_ALPHA)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up, 0, 0.02)
    trained = [problem.x, down, up]

    def oracle() -> Tensors:
        x, a, b, weight = _leaves([*trained, problem.weight], torch.float64)
        y = x @ weight.mT + LORA_ALPHA / LORA_RANK * (x @ a.mT) @ b.mT
        return _step(y, [x, a, b], problem.grad.double())

    return _trained_layer(problem, layer, trained, oracle)


def oft(problem: SODAProblem) -> Candidate:
    """PEFT's OFT with its defaults: blocks of 32 and a truncated Cayley series."""
    layer = _peft_layer(problem, "OFTConfig", oft_block_size=OFT_BLOCK)
    packed = layer.oft_R["default"].weight
    nn.init.normal_(packed, 0, 1e-3)  # near zero, where the truncated series is as good as exact
    trained = [problem.x, packed]

    def oracle() -> Tensors:
        x, p, weight = _leaves([*trained, problem.weight], torch.float64)
        blocks = [_exact_cayley(2 * _unpack(block, OFT_BLOCK)) for block in p]
        return _step(x @ torch.block_diag(*blocks) @ weight.mT, [x, p], problem.grad.double())

    return _trained_layer(problem, layer, trained, oracle)


def _trained_layer(
    problem: SODAProblem | LowRankProblem, layer: nn.Module, trained: Tensors, oracle: Step
) -> Candidate:
    def step() -> Tensors:
        return _step(layer(problem.x), trained, problem.grad)

    return Candidate(step, oracle, tolerance=problem.tolerance)


def _peft_layer(problem: SODAProblem | LowRankProblem, config: str, **options: object) -> nn.Module:
    try:
        import peft

        import spectral_adapters.peft as ours
    except ImportError as error:
        raise Unavailable("peft is not installed") from error
    config_cls = getattr(ours, config, None) or getattr(peft, config)
    model = nn.Sequential(nn.Linear(problem.case.n, problem.case.n, bias=False))
    model.to(problem.x.device, problem.x.dtype)
    with torch.no_grad():
        model[0].weight.copy_(problem.weight)
    peft.inject_adapter_in_model(config_cls(target_modules=["0"], **options), model)
    return model[0]


def gemms_factored(problem: SODAProblem) -> Candidate:
    """The four products over the tokens that the factored plan cannot do without."""
    left, _, right = problem.basis

    def products(x: Tensor, left: Tensor, right: Tensor, grad: Tensor) -> Tensors:
        z, h = x @ right.mT, grad @ left
        return [z, h, z @ left.mT, h @ right]

    return _products(products, [problem.x, left, right, problem.grad], problem.tolerance)


def gemms_merged(problem: SODAProblem) -> Candidate:
    """The three products over the tokens and the two of the weight that the merged plan needs."""
    left, _, right = problem.basis

    def products(x: Tensor, left: Tensor, right: Tensor, grad: Tensor) -> Tensors:
        weight, grad_weight = left @ right, grad.mT @ x
        return [weight, grad_weight, x @ weight.mT, grad @ weight, grad_weight @ right.mT]

    return _products(products, [problem.x, left, right, problem.grad], problem.tolerance)


def gemms_frozen(problem: SODAProblem | LowRankProblem) -> Candidate:
    """A frozen linear layer: what any adapter pays, whatever it trains."""
    return _products(
        lambda x, weight, grad: [x @ weight.mT, grad @ weight],
        [problem.x, problem.weight.to(problem.x.dtype), problem.grad],
        problem.tolerance,
    )


def _products(
    products: Callable[..., Tensors], inputs: Tensors, tolerance: float = TOLERANCES["float32"]
) -> Candidate:
    frozen = [tensor.detach() for tensor in inputs]

    def oracle() -> Tensors:
        return products(*(tensor.double() for tensor in frozen))

    return Candidate(lambda: products(*frozen), oracle, tolerance=tolerance)


SODA_PROVIDERS: dict[str, Callable[[SODAProblem], Candidate]] = {
    "ours auto": ours("auto"),
    "ours factored": ours("factored"),
    "ours merged": ours("merged"),
    "ours tokens": ours("tokens"),
    "naive": through_autograd(naive_forward),
    **{name: through_autograd(forward) for name, forward in PLAIN.items()},
    "plain compiled": compiled_plain,
    "PEFT LoRA r=8": lora,
    "PEFT OFT b=32": oft,
    "GEMMs factored": gemms_factored,
    "GEMMs merged": gemms_merged,
    "frozen linear": gemms_frozen,
}


@dataclass(frozen=True)
class LowRankCase:
    """A square linear layer [n, n] with an adapter of rank 8 and a batch of M tokens."""

    n: int
    tokens: int
    device: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"n{self.n}-M{self.tokens}{_MARKS[self.dtype]}-{self.device}"

    def build(self) -> LowRankProblem:
        return LowRankProblem(self)

    def note(self) -> str:
        """What every provider here adds to the frozen product."""
        return f"r={LORA_RANK}"


class LowRankProblem:
    """A frozen weight [n, n], tokens x [M, n] and the gradient of the output [M, n]."""

    def __init__(self, case: LowRankCase) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.n + case.tokens)
        shape, options = (case.tokens, case.n), (case.device, DTYPES[case.dtype])
        self.x = torch.randn(shape, generator=generator).to(*options).requires_grad_()
        self.grad = torch.randn(shape, generator=generator).to(*options)
        weight = torch.randn(case.n, case.n, generator=generator) / case.n**0.5
        self.weight = weight.to(*options)

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.case.dtype]


def spectral_adapter(kind: str, *, peft: bool) -> Callable[[LowRankProblem], Candidate]:
    """Spectral Adapter "a" or "r" of this project, as a layer of its own or in PEFT."""

    def provider(problem: LowRankProblem) -> Candidate:
        if peft:
            layer: nn.Module = _peft_layer(problem, f"SpectralAdapter{kind.upper()}Config", r=8)
            basis = layer._basis("default", problem.x.device)
        else:
            cls = SpectralAdapterALinear if kind == "a" else SpectralAdapterRLinear
            linear_layer = nn.Linear(problem.case.n, problem.case.n, bias=False)
            linear_layer.weight = nn.Parameter(problem.weight)
            layer = cls.from_linear(linear_layer, r=LORA_RANK)
            basis = layer.basis
        parameters = [p for p in layer.parameters() if p.requires_grad]
        for parameter in parameters:
            nn.init.normal_(parameter, 0, 0.02)
        trained = [problem.x, *parameters]

        def oracle() -> Tensors:
            x, first, second = _leaves(trained, torch.float64)
            u, s, vt = (factor.double() for factor in basis)
            if kind == "a":
                changed = ((u + first) * s) @ (vt + second.mT)
            else:
                turns = [_exact_cayley(_unpack(p, LORA_RANK)) for p in (first, second)]
                changed = u @ turns[0] @ torch.diag(s) @ turns[1].mT @ vt
            weight = problem.weight.double() + changed - (u * s) @ vt
            return _step(x @ weight.mT, [x, first, second], problem.grad.double())

        return _trained_layer(problem, layer, trained, oracle)

    return provider


LOW_RANK_PROVIDERS: dict[str, Callable[[LowRankProblem], Candidate]] = {
    "A": spectral_adapter("a", peft=False),
    "R": spectral_adapter("r", peft=False),
    "PEFT A": spectral_adapter("a", peft=True),
    "PEFT R": spectral_adapter("r", peft=True),
    "PEFT LoRA r=8": lora,
    "frozen linear": gemms_frozen,
}


@dataclass(frozen=True)
class CayleyCase:
    """A batch of rotations from packed skew matrices, forward alone or with backward, fp32."""

    count: int
    n: int
    backward: bool
    device: str

    def __str__(self) -> str:
        what = "step" if self.backward else "forward"
        return f"{self.count}x{self.n}x{self.n}-{what}-{self.device}"

    def build(self) -> CayleyProblem:
        return CayleyProblem(self)

    def note(self) -> str:
        """Where the rotations are computed."""
        return backend_report()["cayley_fwd"].implementation


class CayleyProblem:
    """Packed parameters [count, n(n-1)/2] and the gradient of the rotations [count, n, n]."""

    def __init__(self, case: CayleyCase) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.n)
        count, n, device = case.count, case.n, case.device
        packed = torch.randn(count, n * (n - 1) // 2, generator=generator) * 0.2
        self.packed = packed.to(device).requires_grad_(case.backward)
        self.grad = torch.randn(count, n, n, generator=generator).to(device)

    @cached_property
    def expected(self) -> Tensors:
        """R and, with backward, the packed dP, in float64."""
        (packed,) = _leaves([self.packed], torch.float64)
        rotation = _exact_cayley(_unpack(packed, self.case.n))
        if not self.case.backward:
            return [rotation.detach()]
        return _step(rotation, [packed], self.grad.double())

    def finish(self, rotation: Tensor, leaf: Tensor) -> Tensors:
        return _step(rotation, [leaf], self.grad) if self.case.backward else [rotation]


def ours_cayley(problem: CayleyProblem) -> Candidate:
    """This project's batched Cayley transform."""
    n = problem.case.n
    packed = problem.packed
    return Candidate(lambda: problem.finish(cayley(packed, n), packed), lambda: problem.expected)


def cayley_by(
    transform: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[CayleyProblem], Candidate]:
    """A plain transform of Q [count, n, n] and I, through autograd, from the upper triangle."""

    def provider(problem: CayleyProblem) -> Candidate:
        squares = _unpack(problem.packed.detach(), problem.case.n)
        squares.requires_grad_(problem.case.backward)
        identity = torch.eye(problem.case.n, device=squares.device)

        def step() -> Tensors:
            upper = squares.triu(1) * 0.5
            return problem.finish(transform(upper - upper.mT, identity), squares)

        def comparable(outputs: Tensors) -> Tensors:
            rotation, *d_squares = outputs
            return [rotation, *map(_pack, d_squares)]

        return Candidate(step, lambda: problem.expected, comparable)

    return provider


def solve_loop(skew: Tensor, identity: Tensor) -> Tensor:
    return torch.stack([torch.linalg.solve(identity - q, identity + q) for q in skew])


def solve_batched(skew: Tensor, identity: Tensor) -> Tensor:
    return torch.linalg.solve(identity - skew, identity + skew)


def inverse_batched(skew: Tensor, identity: Tensor) -> Tensor:
    inverse, _ = torch.linalg.inv_ex(identity - skew)
    return 2 * inverse - identity


def cayley_products(problem: CayleyProblem) -> Candidate:
    """Batched products with the operations of the formulas: one for an inverse, three backward."""
    count = 4 if problem.case.backward else 1
    return _products(lambda matrices: [matrices @ matrices for _ in range(count)], [problem.grad])


CAYLEY_PROVIDERS: dict[str, Callable[[CayleyProblem], Candidate]] = {
    "ours": ours_cayley,
    "solve loop": cayley_by(solve_loop),
    "solve batched": cayley_by(solve_batched),
    "inverse batched": cayley_by(inverse_batched),
    "inverse batched, compiled": cayley_by(torch.compile(inverse_batched, dynamic=False)),
    "GEMMs": cayley_products,
}
