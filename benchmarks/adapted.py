"""Adapted models that share one frozen base, so that many can be measured turn by turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from providers import LORA_ALPHA, LORA_RANK, OFT_BLOCK, SODAForward, Unavailable, naive_forward
from torch import Tensor, nn

from spectral_adapters import spectra
from spectral_adapters.decomposition import Factorisation, WholeFactorisation
from spectral_adapters.factors import balanced_factors
from spectral_adapters.functional import SpectralBasis
from spectral_adapters.spectra import Decomposed, Request

#: The projections of the attention layers of diffusers' models.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

Adapt = Callable[["Base"], nn.Module]


class Base:
    """A frozen model, and the decompositions of its adapted layers.

    Adapted layers of one shape get equal weights, whose values no timing depends on, so that one
    decomposition per shape will do. Each layer has a copy of its own, as in earnest; models that
    are adapted on the same layer share it.

    Args:
        model: any module; its parameters are frozen.
        targets: names or suffixes of names of the linear layers to adapt.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str]) -> None:
        self.model = model.requires_grad_(False)
        self.targets = list(targets)
        self._decomposed: dict[tuple[object, ...], Decomposed] = {}
        first: dict[torch.Size, Tensor] = {}
        for _, layer in self.layers(model):
            layer.weight.copy_(first.setdefault(layer.weight.shape, layer.weight))

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Linear]]:
        """The layers to adapt in ``model``, which was not adapted yet."""
        return [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and any(name == t or name.endswith(f".{t}") for t in self.targets)
        ]

    def twin(self) -> nn.Module:
        """The model once more, on the same parameters and buffers."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})

    def decompose(self, weight: Tensor, factorisation: Factorisation) -> Decomposed:
        """As ``spectral_adapters.spectra.factorise``, once per shape and without its cache."""
        of_layer = (factorisation, weight.data_ptr())
        if of_layer not in self._decomposed:
            of_shape = (factorisation, weight.shape)
            if of_shape not in self._decomposed:
                basis = factorisation(weight)
                fingerprint = spectra.fingerprint_of(weight, factorisation, basis)
                self._decomposed[of_shape] = Decomposed(basis, fingerprint)
            (left, singular_values, right), fingerprint = self._decomposed[of_shape]
            spectrum = None if singular_values is None else singular_values.clone()
            own = SpectralBasis(left.clone(), spectrum, right.clone())
            self._decomposed[of_layer] = Decomposed(own, fingerprint)
        return self._decomposed[of_layer]

    def decompose_all(self, requests: Sequence[Request], **_: object) -> list[Decomposed]:
        """As ``spectral_adapters.spectra.factorise_all``, by :meth:`decompose`."""
        return [self.decompose(weight(), factorisation) for weight, factorisation in requests]

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Adapters made in this context take their decompositions from here."""
        with (
            mock.patch.object(spectra, "factorise", self.decompose),
            mock.patch.object(spectra, "factorise_all", self.decompose_all),
        ):
            yield


class PlainSODALinear(nn.Module):
    """A layer [out, in] that computes SODA-SVD, left, in plain PyTorch through autograd.

    Trained: ``delta`` [k] and ``squares``, the rotation's strictly upper triangular [n_i, n_i].
    """

    def __init__(self, linear: nn.Linear, basis: SpectralBasis, forward: SODAForward) -> None:
        super().__init__()
        self.compute = forward
        self.bias = linear.bias
        self.left, self.spectrum, self.right = (t.to(linear.weight.dtype) for t in basis)
        options = {"device": linear.weight.device, "dtype": torch.float32}
        rank = len(self.spectrum)
        self.delta = nn.Parameter(torch.zeros(rank, **options))
        self.squares = nn.ParameterList(
            nn.Parameter(torch.zeros(n, n, **options)) for n in balanced_factors(rank)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        basis = (self.left, self.spectrum, self.right)
        y = self.compute(rows, *basis, self.delta, list(self.squares))
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def with_peft(config: str, **options: object) -> Adapt:
    """A method of PEFT, or of this package in PEFT, with its defaults but for ``options``."""

    def adapt(base: Base) -> nn.Module:
        try:
            import peft

            import spectral_adapters.peft as ours
        except ImportError as error:
            raise Unavailable("peft is not installed") from error
        config_cls = getattr(ours, config, None) or getattr(peft, config)
        model = base.twin()
        with base.remembered():
            peft.inject_adapter_in_model(config_cls(target_modules=base.targets, **options), model)
        return model

    return adapt


def with_plain(forward: SODAForward) -> Adapt:
    """Every adapted layer computes SODA with a plain PyTorch forward."""

    def adapt(base: Base) -> nn.Module:
        model = base.twin()
        for name, layer in base.layers(model):
            parent, _, attribute = name.rpartition(".")
            basis = base.decompose(layer.weight, WholeFactorisation("svd", "base")).basis
            plain = PlainSODALinear(layer, basis, forward)
            setattr(model.get_submodule(parent), attribute, plain)
        return model

    return adapt


METHODS: dict[str, Adapt] = {
    "PEFT LoRA r=8": with_peft("LoraConfig", r=LORA_RANK, lora_alpha=LORA_ALPHA),
    "PEFT OFT b=32": with_peft("OFTConfig", oft_block_size=OFT_BLOCK),
    "SODA": with_peft("SODAConfig"),
    "SVDiff": with_peft("SVDiffConfig"),
    "A r=8": with_peft("SpectralAdapterAConfig", r=LORA_RANK),
    "R r=8": with_peft("SpectralAdapterRConfig", r=LORA_RANK),
    "naive SODA": with_plain(naive_forward),
}


def held_bytes(model: nn.Module, base: Base) -> int:
    """What an adapted model keeps between steps and the base does not: parameters and factors."""
    known = {t.untyped_storage().data_ptr() for t in _tensors(base.model)}
    new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(size for address, size in new.items() if address not in known)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        values: list[object] = [*module._parameters.values(), *module._buffers.values()]
        for value in vars(module).values():
            values += value if isinstance(value, tuple) else [value]
        yield from (value for value in values if isinstance(value, Tensor))
