"""FSDP2 for adapted models: frozen bases are sharded, rotations are gathered once for the bank.

``fully_shard`` shards parameters only, and gathers those of a unit (a transformer block, say) when
that unit runs. Frozen bases of PEFT layers are no parameters, and rotations that come unit by unit
cannot be transformed together. So the bases become frozen parameters here, and the few numbers that
a :class:`RotationBank` works on belong to the root: FSDP gathers them at the start of the root's
forward by one collective call, and reduces their gradients by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from spectral_adapters.rotation_bank import RotatedLayer, RotationBank

__all__ = ["hold_factors", "shard_adapted"]


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is spread over processes, as FSDP2 does: a DTensor."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """A tensor with all its numbers; of a sharded one, all processes must ask together."""
    whole: Any = tensor.detach()
    return whole.full_tensor() if is_sharded(whole) else whole


def spread_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A tensor that all processes have, sharded as ``target`` is, if that is; nothing is sent."""
    if not is_sharded(target) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    like: Any = target
    value = tensor.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put its shards back in place of what a forward pass has gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def hold_factors(model: nn.Module) -> int:
    """Hold the frozen factors of PEFT layers in parameters without gradient, so that FSDP shards
    them; ``state_dict`` holds them no more than before.

    To be called before ``fully_shard`` or ``accelerator.prepare``, with all adapters in place and
    the base weights loaded. Stand-alone layers hold their factors in parameters anyway.

    Returns:
        The number of factorisations that were moved.

    Raises:
        ValueError: a factorisation is not computed yet.
    """
    moved = 0
    for module in list(model.modules()):
        hold = getattr(module, "hold_in_parameters", None)
        if hold is not None:
            moved += hold()
    return moved


def shard_adapted(
    model: nn.Module, units: Iterable[nn.Module], *, mesh: Any = None, **options: Any
) -> RotationBank | None:
    """Apply FSDP2 to a model with adapters, in place, with one rotation bank on each rank.

    As ``for unit in units: fully_shard(unit)`` and ``fully_shard(model)``, but for two things: see
    :func:`hold_factors`, and the parameters of all rotations belong to the root.

    Args:
        model: the root: its ``forward`` is called in training. All adapters are in place.
        units: parts that are gathered one at a time, the inner ones first: the transformer blocks,
            large embeddings, the output layer. What is in none of them belongs to the root.
        mesh, options: of ``torch.distributed.fsdp.fully_shard``, for the root and all units.

    Returns:
        The bank, which keeps nothing between passes; None for a model without rotations.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a part is sharded already, or a factorisation is not computed yet.
    """
    from torch.distributed.fsdp import fully_shard

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    sharded = [name for name, p in model.named_parameters() if is_sharded(p)]
    if sharded:
        raise ValueError(f"model must not be sharded yet; {sharded[0]} is")
    units = list(units)
    hold_factors(model)
    rotations = _rotation_parameters(model)
    inside = {parameter for unit in units for parameter in unit.parameters()}
    # The root first: parts that are sharded already would not be looked into.
    fully_shard(model, mesh=mesh, ignored_params=inside - rotations, **options)
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=_rotation_parameters(model), **options)
    if not rotations:
        return None
    bank = RotationBank.attach(model)
    bank.expect_sharded_bases()
    return bank


def _rotation_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What a bank needs to know, of all layers."""
    return {
        parameter
        for layer in model.modules()
        if isinstance(layer, RotatedLayer)
        for slot in layer.rotation_slots()
        for parameter in slot.parameters
    }
