"""What quantising costs and saves, per layer: frozen bases of SODA, and the base weight itself.

Every row is compared with the same method in fp32 on the weight that its base layer stands for, and
on the fp32 weight, with equal trained numbers, in one process and one thread. Weights are those of
a text encoder and of the emoji base model, and a synthetic one whose singular values fall as the
inverse square root of their number; inputs are Gaussian.

    python benchmarks/quantized.py                # results/quantized-<machine>-<date>.json
    python benchmarks/quantized.py --write-docs   # docs/quantization.md, from the newest of them
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import report
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from spectral_adapters import SODALinear
from spectral_adapters.peft import SODAConfig, SpectralAdapterAConfig, SpectralAdapterRConfig
from spectral_adapters.personalize.pipelines import TEXT_ENCODER_PACKAGE

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "quantization.md"
START = "<!-- measured: python benchmarks/quantized.py --write-docs -->"
END = "<!-- end of what is measured -->"
UNET = HERE.parent / "examples/emoji_base/model/unet/diffusion_pytorch_model.safetensors"

RANK = 8
TOKENS = 256
WARM_UP = 3
#: Adam's in the fit, and its steps.
RATE, STEPS = 5e-3, 300


def minilm(name: str) -> Tensor:
    from importlib.util import find_spec

    spec = find_spec(TEXT_ENCODER_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"this benchmark needs the package {TEXT_ENCODER_PACKAGE}")
    with safe_open(Path(spec.origin).parent / "model" / "model.safetensors", "pt") as file:
        return file.get_tensor(f"encoder.layer.3.{name}.weight").float()


def emoji(name: str) -> Tensor:
    prefix = "mid_block.attentions.0.transformer_blocks.0"
    with safe_open(UNET, "pt") as file:
        return file.get_tensor(f"{prefix}.{name}.weight").float()


def synthetic(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    return (left * torch.arange(1, n + 1).rsqrt() @ right).float()


#: Name -> (weight, whether the fit is run on it).
LAYERS: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "MiniLM query 384 x 384": (lambda: minilm("attention.self.query"), True),
    "MiniLM MLP 1536 x 384": (lambda: minilm("intermediate.dense"), False),
    "emoji UNet feed-forward 896 x 112": (lambda: emoji("ff.net.0.proj"), True),
    "synthetic 1280 x 1280": (lambda: synthetic(1280), False),
}


@dataclass(frozen=True)
class Row:
    """One way to adapt a layer.

    Attributes:
        method: what is adapted how.
        base: format of the base weight, or "none" where the basis is all that is left of it.
        basis: format of U and V, or "" where they are not quantised.
    """

    method: str
    base: str
    basis: str = ""

    def build(self, weight: Tensor) -> nn.Module:
        if self.base == "none":
            dtype = torch.bfloat16 if self.basis == "bf16" else torch.float32
            choice = {"fp32": "float32", "bf16": "base"}.get(self.basis, self.basis)
            return SODALinear.from_linear(plain(weight).to(dtype), basis_dtype=choice)
        choice = {"fp32": "float32", "bf16": "base"}.get(self.basis, self.basis)
        config = {
            "SODA": lambda: SODAConfig(target_modules=["0"], basis_dtype=choice),
            "A": lambda: SpectralAdapterAConfig(target_modules=["0"], r=RANK),
            "R": lambda: SpectralAdapterRConfig(target_modules=["0"], r=RANK),
            "LoRA": lambda: LoraConfig(target_modules=["0"], r=RANK, lora_alpha=RANK),
        }[self.method]()
        return get_peft_model(base_of(weight, self.base), config)

    @property
    def in_fp32(self) -> Row:
        """The same method with nothing rounded."""
        return Row(self.method, "none" if self.base == "none" else "fp32", self.basis and "fp32")


ROWS = [
    *[Row("SODA alone", "none", basis) for basis in ("fp32", "bf16", "int8", "float8", "nf4")],
    *[Row("SODA", "fp32", basis) for basis in ("fp32", "int8", "float8", "nf4")],
    Row("SODA", "bf16", "bf16"),
    Row("SODA", "int8", "int8"),
    Row("SODA", "nf4", "int8"),
    Row("SODA", "nf4", "nf4"),
    *[
        Row(method, base)
        for method in ("A", "R", "LoRA")
        for base in ("fp32", "int8", "float8", "nf4")
    ],
]


def plain(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def base_of(weight: Tensor, kind: str) -> nn.Sequential:
    layer = plain(weight)
    model = nn.Sequential(layer)
    if kind == "bf16":
        model.bfloat16()
    elif kind in ("int8", "float8"):
        from torchao import quantization

        config = getattr(quantization, f"{kind.capitalize()}WeightOnlyConfig")
        quantization.quantize_(model, config(set_inductor_config=False))
        model.hf_quantizer = SimpleNamespace(
            quantization_config=SimpleNamespace(get_apply_tensor_subclass=config)
        )
    elif kind == "nf4":
        import bitsandbytes as bnb

        quantised = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32,
            quant_type="nf4",
        )  # fmt: skip
        quantised.load_state_dict(layer.state_dict())
        model[0] = quantised.to("cpu")
    return model


def kept_weight(weight: Tensor, row: Row) -> Tensor:
    """What the base weight of a row stands for, in fp32."""
    if row.base == "none":
        return weight.bfloat16().float() if row.basis == "bf16" else weight
    layer = base_of(weight, row.base)[0]
    if row.base == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    quantised = row.base in ("int8", "float8")
    return (layer.weight.dequantize() if quantised else layer.weight).detach().float()


def bytes_of(model: nn.Module, row: Row) -> dict[str, int]:
    """What a layer keeps: the base weight, frozen factors (fp32, bf16 or quantised), what is
    trained."""
    found = {"base": 0, "basis": 0, "trained": 0}
    found["trained"] = sum(p.nbytes for p in trained(model))
    if row.base == "none":
        quantised = model.quantized_basis
        kept = model.basis if quantised is None else quantised
        found["basis"] = sum(part.nbytes for part in kept)
        return found
    (adapted,) = (module for module in model.modules() if hasattr(module, "base_layer"))
    weight = adapted.base_layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        parts = [weight, state.absmax, state.code, *nested]
    elif hasattr(weight, "__tensor_flatten__"):
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    else:
        parts = [weight]
    found["base"] = sum(part.nbytes for part in parts)
    for name in ("soda", "spectral_adapter_a", "spectral_adapter_r"):
        factors = getattr(adapted, f"{name}_factors", None)
        if factors is not None:
            found["basis"] = sum(part.nbytes for part in factors["default"].basis)
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def turn(model: nn.Module, row: Row, scale: float) -> None:
    """Trained numbers that depend on nothing but their place and shape, times what makes changes of
    a like size."""
    generator = torch.Generator().manual_seed(1)
    for index, parameter in enumerate(trained(model)):
        values = torch.randn(parameter.shape, generator=generator)
        if row.method.startswith("SODA"):
            # Of the singular values, then packed rotations.
            parameter.copy_(values * scale * (0.5 if index else 0.1))
        elif row.method == "LoRA":
            parameter.copy_(values * (scale if index else 0.3))
        else:
            parameter.copy_(values * scale)


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def response(
    model: nn.Module, row: Row, x: Tensor, rows: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output at the start, what trained numbers change of it, and gradients there for a fixed
    gradient of the output. The model is left as it was."""
    before = [p.detach().clone() for p in trained(model)]
    with torch.no_grad():
        start = model(x).float()
    turn(model, row, 0.1)
    outer = torch.randn(len(x), rows, generator=torch.Generator().manual_seed(2))
    changed = model(x).float()
    gradients = list(torch.autograd.grad((changed * outer).sum(), trained(model)))
    with torch.no_grad():
        for parameter, values in zip(trained(model), before, strict=True):
            parameter.copy_(values)
    return start, changed.detach() - start, gradients


def accuracy(model: nn.Module, row: Row, weight: Tensor, x: Tensor) -> dict[str, float]:
    """Errors of a row, relative to fp32."""
    y = x @ weight.mT
    start, change, gradients = response(model, row, x, len(weight))
    same = row.in_fp32.build(kept_weight(weight, row))
    _, same_change, same_gradients = response(same, row, x, len(weight))
    whole = row.in_fp32.build(weight)
    figures = {
        "start rms": relative(start, y),
        "start max": float((start - y).abs().max() / y.abs().max()),
        "size of the change": float(change.norm() / y.norm()),
        "change": relative(change, same_change),
        "change to fp32 base": relative(change, response(whole, row, x, len(weight))[1]),
    }
    first = 1 if row.method.startswith("SODA") else 0
    flat = [torch.cat([g.flatten() for g in gs[first:]]) for gs in (gradients, same_gradients)]
    figures["gradient"] = relative(*flat)
    if first:
        figures["gradient of delta"] = relative(gradients[0], same_gradients[0])
    return figures


def orthogonality(model: nn.Module, row: Row) -> float | None:
    """Largest entry of ``U^T U - I`` and ``V^T V - I`` of the basis that is kept."""
    if not row.basis:
        return None
    if row.base == "none":
        basis = model.basis
    else:
        (adapted,) = (module for module in model.modules() if hasattr(module, "base_layer"))
        basis = adapted.soda_factors["default"].on(torch.device("cpu"))
    left, right = basis.left.double(), basis.right.double()
    identity = torch.eye(left.shape[1], dtype=torch.float64)
    products = (left.mT @ left, right @ right.mT)
    return max(float((product - identity).abs().max()) for product in products)


def fit(model: nn.Module, row: Row, weight: Tensor) -> float:
    """Loss on unseen inputs after training, relative to that of the base layer.

    The target is the weight that the base layer stands for, with the spectrum and the singular
    basis of that turned by fixed numbers: SODA could reach it if nothing were rounded.
    """
    kept = kept_weight(weight, row)
    rotated = SODALinear.from_linear(plain(kept))
    turn(rotated, ROWS[0], 0.2)
    target = rotated.merged_weight().detach()
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(trained(model), RATE)
    for _ in range(STEPS):
        x = torch.randn(TOKENS, weight.shape[1], generator=generator)
        loss = (model(x) - x @ target.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(4 * TOKENS, weight.shape[1], generator=generator)
    with torch.no_grad():
        loss = (model(x) - x @ target.mT).square().mean()
        return float(loss / (x @ (kept - target).mT).square().mean())


def seconds(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Median of a forward and backward pass, all taking turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    shuffle = random.Random(0).shuffle
    for _ in range(WARM_UP + rounds):
        shuffle(order)
        for name in order:
            for parameter in trained(models[name]):
                parameter.grad = None
                # What is kept between steps without a change of parameters is no training step.
                parameter.data.add_(1e-6)
            start = time.perf_counter()
            models[name](x).sum().backward()
            times[name].append(time.perf_counter() - start)
    return {name: median(found[WARM_UP:]) for name, found in times.items()}


def measure(name: str, rounds: int) -> dict[str, Any]:
    make, with_fit = LAYERS[name]
    weight = make()
    x = torch.randn(TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    models: dict[str, nn.Module] = {"frozen": plain(weight)}
    for index, row in enumerate(ROWS):
        model = row.build(weight)
        found: dict[str, Any] = {**vars(row), "bytes": bytes_of(model, row)}
        found |= accuracy(model, row, weight, x)
        found["orthogonality"] = orthogonality(model, row)
        if with_fit:
            found["fit"] = fit(row.build(weight), row, weight)
        models[str(index)] = model
        rows.append(found)
        print(name, found, flush=True)
    times = seconds(models, x.requires_grad_(), rounds)
    for index, found in enumerate(rows):
        found["seconds"] = times[str(index)]
        found["ratio"] = times[str(index)] / times["frozen"]
    return {"shape": list(weight.shape), "frozen seconds": times["frozen"], "rows": rows}


def table(layer: dict[str, Any]) -> str:
    """A layer's rows as Markdown."""

    def small(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.2g}" if value == 0 or value >= 0.1 else f"{value:.1e}".replace("e-0", "e-")

    head = ["method", "W0", "U, V", "kB: W0", "U, V, S", "trained", "start rms", "max", "change",
            "∂R", "∂δ", "to fp32 W0", "UᵀU − I", "fit", "time"]  # fmt: skip
    body = [
        [
            row["method"],
            row["base"],
            row["basis"],
            *(f"{row['bytes'][part] / 1e3:.1f}" for part in ("base", "basis", "trained")),
            *(small(row[name]) for name in ("start rms", "start max", "change", "gradient")),
            small(row.get("gradient of delta")),
            small(row["change to fp32 base"]),
            small(row["orthogonality"]),
            small(row.get("fit")),
            f"{row['ratio']:.2f}",
        ]
        for row in layer["rows"]
    ]
    return report.markdown(head, body)


def render(document: dict[str, Any]) -> str:
    lines = []
    for name, layer in document["layers"].items():
        lines.append(f"**{name}**, fp32 base alone {1e3 * layer['frozen seconds']:.2f} ms")
        lines.append(table(layer))
    return "\n\n".join(lines)


def write_docs() -> None:
    """Put the newest figures between the markers of the page."""
    paths = (HERE / "results").glob("quantized-*.json")
    documents = sorted((json.loads(path.read_text()) for path in paths), key=lambda d: d["date"])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{render(documents[-1])}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    if options.write_docs:
        write_docs()
        return
    torch.set_num_threads(1)
    layers = {name: measure(name, options.rounds) for name in options.layers}
    date = report.now()
    setting = {"tokens": TOKENS, "rank": RANK, "steps": STEPS, "rate": RATE, "threads": 1}
    document = {"date": date, **report.conditions(), **setting, "layers": layers}
    facts = document["machine"]
    device = report.slug(str(facts.get("gpu", facts["cpu"])))
    path = options.results / f"quantized-{device}-{date[:10]}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(render(document))


if __name__ == "__main__":
    main()
