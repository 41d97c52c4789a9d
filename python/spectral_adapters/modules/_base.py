"""What stand-alone spectral modules share: dtype keeping, a state dict that cannot lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectral_adapters.decomposition import Fingerprint
from spectral_adapters.functional import SpectralBasis, autocast_is_on
from spectral_adapters.spectra import Decomposed


class SpectralModule(nn.Module):
    """A module whose frozen basis and trained numbers stay in fp32 or better.

    The frozen basis is held in parameters without gradient: they follow the device, are copied and
    pickled, are sharded by FSDP, and are not broadcast by DDP at every step as buffers would be.

    Attributes:
        left, singular_values, right: the frozen :class:`SpectralBasis`, whose matrices a layer may
            keep quantised (:class:`spectral_adapters.quantization.QuantizedMatrix`).
        fingerprint: uint8 [161], of the base weight and the basis (buffer).
        save_factors: whether ``state_dict`` holds the frozen basis. With it a state dict is
            self-contained; without it, it holds only what was trained and the fingerprint, and
            loads only onto a layer made from the same base weight.
    """

    left: Tensor
    singular_values: Tensor | None
    right: Tensor
    fingerprint: Tensor

    #: What ``save_factors`` decides on, by name.
    _FROZEN: ClassVar[tuple[str, ...]] = SpectralBasis._fields
    #: Children that are cast as asked, like any layer.
    _CASTABLE: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, save_factors: bool) -> None:
        super().__init__()
        if not isinstance(save_factors, bool):
            raise TypeError(f"save_factors must be True or False; got {save_factors!r}")
        self.save_factors = save_factors
        self.register_state_dict_post_hook(_leave_out_frozen)

    def _set_basis(self, decomposed: Decomposed) -> None:
        basis, fingerprint = decomposed
        self._register_basis(basis)
        self.register_buffer("fingerprint", fingerprint.to_tensor().to(basis.left.device))

    def _register_basis(self, basis: SpectralBasis) -> None:
        for name, value in zip(SpectralBasis._fields, basis, strict=True):
            frozen = None if value is None else nn.Parameter(value, requires_grad=False)
            self.register_parameter(name, frozen)

    @property
    def basis(self) -> SpectralBasis:
        """The frozen factorisation of the base weight."""
        return SpectralBasis(self.left, self.singular_values, self.right)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the device, never lose precision: narrowing casts are not carried out."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == tensor.dtype:
                return moved
            if torch.promote_types(moved.dtype, tensor.dtype) == moved.dtype:
                return moved
            return tensor.to(moved.device)

        if recurse:
            for name, child in self.named_children():
                child._apply(fn if name in self._CASTABLE else keep_precision)
        return super()._apply(keep_precision, recurse=False)

    def _frozen(self) -> dict[str, Tensor]:
        """The frozen tensors of ``_FROZEN`` that are here, parts of quantised ones included."""
        return {
            name: tensor.detach()
            for name, tensor in self.named_parameters()
            if any(name == frozen or name.startswith(f"{frozen}.") for frozen in self._FROZEN)
        }

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
        """Accept a state dict without factors only on the base weight that it was trained on."""
        packed = state_dict.get(prefix + "fingerprint")
        if packed is not None and not any(prefix + name in state_dict for name in self._frozen()):
            here = Fingerprint.from_tensor(self.fingerprint)
            reason = Fingerprint.from_tensor(packed).mismatch(here)
            if reason is not None:
                layer = prefix.rstrip(".") or type(self).__name__
                error_msgs.append(f"{layer}: this adapter is refused, {reason}")
                # Modules below this one, which load after it, must keep what they have, too.
                for name, own in (*self.named_parameters(), *self.named_buffers()):
                    if prefix + name in state_dict:
                        state_dict[prefix + name] = own.detach()
                return
            for name, own in self._frozen().items():
                state_dict[prefix + name] = own
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def computes_as_written(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer with a plain weight does to x what its class says, in the dtype of x.

    That is, nothing hooks into it or replaces its forward, its weight is neither quantised nor
    sharded, and neither autocast nor a wrong dtype has a say in its product.
    """
    weight: Any = layer.weight
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype == x.dtype
        and not autocast_is_on(x.device.type)
        and not is_hooked(layer)
    )


def is_hooked(layer: nn.Module) -> bool:
    """Whether something watches or replaces what a layer computes."""
    return bool(
        "forward" in layer.__dict__
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
    )


def _leave_out_frozen(
    module: SpectralModule, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    if not module.save_factors:
        for name in module._frozen():
            state_dict.pop(prefix + name, None)
