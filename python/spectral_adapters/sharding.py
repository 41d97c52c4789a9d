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

from torch import nn
from torch.distributed.fsdp import fully_shard

from spectral_adapters.rotation_bank import RotatedLayer, RotationBank

__all__ = ["hold_factors", "shard_adapted"]


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "full_tensor")]
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
