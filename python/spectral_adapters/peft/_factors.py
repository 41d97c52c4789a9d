"""Frozen factorisations of base weights inside PEFT layers.

They are neither parameters nor buffers: DDP does not broadcast them at every step,
``low_cpu_mem_usage`` does not put them on the meta device, and checkpoints do not hold them unless
asked to. FSDP shards them once ``sharding.hold_factors`` has made them parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from spectral_adapters import spectra
from spectral_adapters.decomposition import Factorisation, Fingerprint, round_to_dtype
from spectral_adapters.functional import SpectralBasis
from spectral_adapters.quantization import QuantizedBasis


def is_at_least(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of type ``other`` is one of type ``dtype``."""
    return torch.promote_types(dtype, other) == dtype


def keep_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``nn.Module._apply`` without its casts to a lower precision."""

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if not tensor.is_floating_point() or is_at_least(moved.dtype, tensor.dtype):
            return moved
        return tensor.to(moved.device)

    return apply


class Fingerprints(BufferDict):
    """Packed fingerprints [161] by adapter name, saved with the adapter.

    Attributes:
        unverified: adapters whose fingerprint came from outside and was not compared with the base
            yet. Entries assigned as attributes are noticed: some loaders (that of transformers) do
            this instead of calling ``load_state_dict``.
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self.unverified: set[str] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self.unverified.add(name)

    def __delitem__(self, adapter: str) -> None:
        super().__delitem__(adapter)
        self.unverified.discard(adapter)


class _Held(nn.Module):
    """A factorisation in parameters without gradient, which are in no state dict."""

    def __init__(self, basis: SpectralBasis) -> None:
        super().__init__()
        for name, value in zip(SpectralBasis._fields, basis, strict=True):
            held = None if value is None else nn.Parameter(value, requires_grad=False)
            self.register_parameter(name, held)

    @property
    def basis(self) -> SpectralBasis:
        return SpectralBasis(**cast(Any, self._parameters))

    def _save_to_state_dict(self, *args: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class FrozenFactors(nn.Module):
    """The factorisation of one base weight, shared by the adapters that were made on it.

    The factors can be read and assigned as ``left``, ``singular_values`` and ``right``, as loaders
    do that bypass ``load_state_dict``; they are used once all of them are there.

    Attributes:
        shape: of the base weight, (out, in).
        factorisation: what is computed from it.
        base_dtype: precision that the base weight is rounded to before it is decomposed.
        in_checkpoint: whether ``state_dict`` holds the factors.
        quantization: what the factors are kept in if they are quantised, or None.
        fingerprint: of the weight that was decomposed here; None for factors from a checkpoint.
        is_exact: the basis is that of the base weight itself, not of a rounded or other one.
        is_stale: the base weight was replaced since the factors were computed.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        factorisation: Factorisation,
        base_dtype: torch.dtype,
        *,
        in_checkpoint: bool,
        quantization: str | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self._arriving: dict[str, Tensor] = {}
        self.factorisation = factorisation
        self.base_dtype = base_dtype
        self.in_checkpoint = in_checkpoint
        self.quantization = quantization
        self._held: _Held | None = None
        self.basis = None
        self._precision = base_dtype
        self.fingerprint: Fingerprint | None = None
        self.is_exact = False
        self.is_stale = False

    @property
    def basis(self) -> SpectralBasis | QuantizedBasis | None:
        """The factorisation, or None before it was computed or loaded."""
        held = self._modules.get("_held")
        return self._basis if held is None else cast(_Held, held).basis

    @basis.setter
    def basis(self, basis: SpectralBasis | QuantizedBasis | None) -> None:
        if self._modules.get("_held") is not None:
            raise ValueError(
                "factors that are held in parameters cannot be replaced; load the base weights and "
                "the factors first, and shard afterwards"
            )
        self._basis = basis

    def hold_in_parameters(self) -> bool:
        """Move the factorisation into frozen parameters; whether it was not there yet.

        Raises:
            ValueError: there is none yet, or it is of a base weight that was replaced, or it is
                quantised.
        """
        if self._held is not None:
            return False
        if self.quantization is not None:
            raise ValueError(
                f"factors must be dense to be sharded; these are kept in {self.quantization}; "
                "use basis_dtype='base'"
            )
        if self.basis is None or self.is_stale:
            raise ValueError(
                "factors must be computed before they are sharded; load the base weights first, "
                "and call the model or refresh_factors"
            )
        self._held, self._basis = _Held(cast(SpectralBasis, self.basis)), None
        return True

    @property
    def kind(self) -> tuple[Factorisation, torch.dtype, str | None]:
        """What two adapters must have in common to share factors."""
        return self.factorisation, self.base_dtype, self.quantization

    @property
    def are_loaded(self) -> bool:
        """Whether the factors came from a checkpoint instead of from the base weight here."""
        return self.basis is not None and self.fingerprint is None

    def replaces(self, weight: Tensor) -> bool:
        """Whether the basis multiplies up to the base weight, up to the rounding of its dtype."""
        wanted = weight.dtype
        return (
            self.is_exact
            and self.quantization is None
            and (self._precision == wanted or is_at_least(self._precision, wanted))
        )

    @property
    def are_due(self) -> bool:
        """Whether the factors are to be computed from the base weight."""
        return self.basis is None or (self.fingerprint is not None and self.is_stale)

    def request(self, weight: Callable[[], Tensor]) -> spectra.Request:
        """What to compute, for a function that gives the base weight [out, in]."""
        return spectra.Request(lambda: self._rounded(weight()), self.factorisation)

    def compute(self, weight: Tensor) -> Fingerprint:
        """Decompose the base weight [out, in] unless that is done; its fingerprint."""
        if self.fingerprint is not None and not self.is_stale:
            return self.fingerprint
        return self.adopt(spectra.factorise(self._rounded(weight), self.factorisation))

    def adopt(self, decomposed: spectra.Decomposed) -> Fingerprint:
        """Take what :meth:`request` asked for; its fingerprint."""
        self._keep(decomposed.basis)
        self.fingerprint = decomposed.fingerprint
        self.is_stale = False
        return self.fingerprint

    def _keep(self, basis: SpectralBasis) -> None:
        self._precision = basis.left.dtype
        kind = self.quantization
        self.basis = basis if kind is None else QuantizedBasis.of(basis, kind)

    def absorb(self, basis: SpectralBasis, fingerprint: Fingerprint) -> None:
        """Be the factorisation of the weight that the base weight was just made, unless that is
        replaced again."""
        self._keep(basis)
        self.fingerprint = fingerprint
        self.is_exact, self.is_stale = True, False

    @torch.no_grad()
    def _rounded(self, weight: Tensor) -> Tensor:
        """What is decomposed of a base weight."""
        rounded = round_to_dtype(weight, self.base_dtype)
        self.is_exact = rounded is weight or torch.equal(rounded.to(weight.dtype), weight)
        return rounded

    @torch.no_grad()
    def compare(self, weight: Tensor, recorded: Fingerprint | None) -> None:
        """Find out whether factors from a checkpoint are those of the base weight [out, in]."""
        here = spectra.fingerprint_of(weight, self.factorisation, self.on(weight.device))
        self.is_exact = recorded is not None and recorded.mismatch(here) is None
        self.is_stale = False

    def on(self, device: torch.device) -> SpectralBasis:
        """The factorisation on ``device``; it stays there. Made dense if it is quantised.

        Raises:
            ValueError: ``device`` is the meta device, where the factors would be lost.
        """
        if self.quantization is not None:
            return self.quantized_on(device).dequantized()
        basis = self.basis
        assert isinstance(basis, SpectralBasis)
        if basis.left.device != device:
            _check_device(device)
            self.basis = basis = _map(lambda factor: factor.to(device), basis)
        return basis

    def quantized_on(self, device: torch.device) -> QuantizedBasis:
        """The quantised factorisation on ``device``; it stays there."""
        assert isinstance(self.basis, QuantizedBasis)
        if self.basis.left.device != device:
            _check_device(device)
            self.basis = self.basis.to(device)
        return self.basis

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenFactors:
        """Follow the device and casts to a higher precision.

        ``fn`` is tried on an empty tensor: the values survive whatever it does, such as
        ``to_empty``.
        """
        if isinstance(self.basis, QuantizedBasis):
            device = fn(torch.empty(0, device=self.basis.left.device)).device
            if device.type != "meta":
                self.quantized_on(device)
        elif self._held is not None:
            self._held._apply(keep_precision(fn))
        elif self.basis is not None:
            left = self.basis.left
            probe = keep_precision(fn)(left.new_empty(0))
            if not probe.is_meta and (probe.device, probe.dtype) != (left.device, left.dtype):

                def follow(factor: Tensor) -> Tensor:
                    # Singular values may have more digits than the vectors.
                    dtype = torch.promote_types(factor.dtype, probe.dtype)
                    return factor.to(probe.device, dtype)

                self.basis = _map(follow, self.basis)
        return self

    def _state(self) -> dict[str, Any]:
        """The factors by name, or empty ones of the right shape as long as there are none."""
        basis: SpectralBasis | QuantizedBasis | None = self.basis
        if basis is None:
            shapes = self.factorisation.shapes(*self.shape)
            empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            basis = SpectralBasis(empty["left"], empty.get("singular_values"), empty["right"])
        named = zip(SpectralBasis._fields, basis, strict=True)
        return {name: factor for name, factor in named if factor is not None}

    def __getattr__(self, name: str) -> Any:
        if name in SpectralBasis._fields:
            return self._state().get(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in SpectralBasis._fields:
            super().__setattr__(name, value)
            return
        self._arriving[name] = value
        if self._arriving.keys() == self._state().keys():
            self._take(self._arriving)
            self._arriving = {}

    def _take(self, factors: Mapping[str, Tensor]) -> None:
        """Use factors from a checkpoint."""
        loaded = SpectralBasis(factors["left"], factors.get("singular_values"), factors["right"])
        self.basis = _map(lambda factor: factor.detach().clone(), loaded)
        self._precision = loaded.left.dtype
        self.fingerprint = None
        self.is_exact = self.is_stale = False

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.in_checkpoint:
            for name, factor in self._state().items():
                destination[prefix + name] = factor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not self.in_checkpoint:
            return
        names = list(self._state())
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        self._take({name: state_dict[prefix + name] for name in names})


def _check_device(device: torch.device) -> None:
    if device.type == "meta":
        raise ValueError(
            "factors cannot be moved to the meta device, where they would be lost; if the base "
            "weight is there because of offloading, load it first (remove accelerate's hooks)"
        )


@torch.no_grad()
def _map(fn: Callable[[Tensor], Tensor], basis: SpectralBasis) -> SpectralBasis:
    # Tensors made in inference mode could never be used for training later.
    with torch.inference_mode(False):
        left, singular_values, right = basis
        return SpectralBasis(
            fn(left), None if singular_values is None else fn(singular_values), fn(right)
        )
