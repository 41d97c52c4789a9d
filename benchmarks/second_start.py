"""How long adding an adapter to a whole UNet takes when its weights were decomposed before.

Every adapted layer has weights of its own. So that filling the cache takes minutes and not an hour,
those of one shape are one random matrix with its rows rotated by some places and some of its
columns negated: each has other values, hence another file, and its SVD is known from the first
one's to the last bit. The times are those of fresh processes in which ``torch.linalg.svd`` and
``eigh`` raise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import lru_cache

import torch
from adapted import TARGETS
from torch import Tensor, nn
from unet_providers import CONFIGS, unet

from spectral_adapters import spectra
from spectral_adapters.decomposition import WholeFactorisation, decompose, in_basis_dtype
from spectral_adapters.functional import SpectralBasis

FACTORISATION = WholeFactorisation("svd", "base")


def model_of(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[tuple[nn.Linear, int]]]:
    """A UNet, and its adapted layers with their numbers; the other weights are not filled in."""
    with torch.device("meta"):
        model = unet(name)
    model = model.to(dtype).to_empty(device="cpu").requires_grad_(False)
    layers = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(path.endswith(f".{t}") for t in TARGETS)
    ]
    for number, layer in enumerate(layers):
        layer.weight.copy_(_varied(_first(layer.weight.shape, dtype), number))
    return model, list(zip(layers, range(len(layers)), strict=True))


@lru_cache
def _first(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    rows, columns = shape
    generator = torch.Generator().manual_seed(10000 * rows + columns)
    return (torch.randn(shape, generator=generator) / columns**0.5).to(dtype)


def _varied(matrix: Tensor, number: int) -> Tensor:
    matrix = matrix.roll(number % len(matrix), 0)
    matrix[:, :: number % 7 + 2] *= -1
    return matrix


def fill(name: str, dtype: torch.dtype) -> None:
    """Decompose one matrix of each shape and keep the factors of all."""
    _, layers = model_of(name, dtype)
    first: dict[torch.Size, SpectralBasis] = {}
    for layer, number in layers:
        shape = layer.weight.shape
        if shape not in first:
            first[shape] = decompose(_first(shape, dtype), "svd", None)
        left, values, right = first[shape]
        # The signs stay canonical but for entries that are equally large, which do not occur here.
        right = right.clone()
        right[:, :: number % 7 + 2] *= -1
        basis = SpectralBasis(left.roll(number % len(left), 0), values, right)
        basis = in_basis_dtype(basis, dtype, "base")
        fingerprint = spectra.fingerprint_of(layer.weight, FACTORISATION, basis)
        identity, _ = spectra._look_up(layer.weight, FACTORISATION)
        spectra._keep(identity, spectra.Decomposed(basis, fingerprint), time.time())


def add_adapter(name: str, dtype: torch.dtype, config: str) -> None:
    """Print the seconds that injecting takes."""
    import peft

    import spectral_adapters.peft as ours

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a weight is decomposed")

    model, _ = model_of(name, dtype)
    torch.linalg.svd = torch.linalg.eigh = refuse
    config_cls = getattr(ours, config, None) or getattr(peft, config)
    start, busy = time.perf_counter(), time.process_time()
    peft.inject_adapter_in_model(config_cls(target_modules=list(TARGETS)), model)
    print(time.perf_counter() - start, time.process_time() - busy)


def forget_pages() -> None:
    """Have the cache's files read from the disk again."""
    for entry in spectra.cache_entries():
        descriptor = os.open(entry.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="sdxl")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", help="of the filled cache, to be kept; default: a temporary one"
    )
    parser.add_argument("--add", metavar="CONFIG", help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.add:
        add_adapter(options.model, dtype, options.add)
        return
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = options.folder or temporary
        if not spectra.cache_entries():
            with torch.no_grad():
                fill(options.model, dtype)
        size = sum(entry.size for entry in spectra.cache_entries())
        print(
            f"{options.model}, {options.dtype}: {len(spectra.cache_entries())} entries, {size:,} B"
        )
        command = [sys.executable, __file__, "--model", options.model, "--dtype", options.dtype]
        for config, cold in (("SODAConfig", False), ("LoraConfig", False), ("SODAConfig", True)):
            times = []
            for _ in range(options.repeats):
                if cold:
                    forget_pages()
                done = subprocess.run(
                    [*command, "--add", config], check=True, stdout=subprocess.PIPE, text=True
                )
                times.append([float(word) for word in done.stdout.split()[-2:]])
            seconds, busy = (sorted(column) for column in zip(*times, strict=True))
            middle = len(times) // 2
            print(
                f"  {config}{', files not in memory' if cold else ''}: {seconds[middle]:.2f} s "
                f"({seconds[0]:.2f} to {seconds[-1]:.2f}), processor {busy[middle]:.2f} s, "
                f"{torch.get_num_threads()} threads"
            )


if __name__ == "__main__":
    main()
