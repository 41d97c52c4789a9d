"""One place where a raw op becomes known to PyTorch's dispatcher.

An op is a schema, a fake and a plain-PyTorch reference. The reference is registered for every
device (``CompositeExplicitAutograd``); C++ and Triton override it for one dispatch key each, so
which code runs is the dispatcher's decision and nobody else's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "spectral"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class OpSpec:
    """What the registry knows of one op: its name, its reference and who may differentiate it."""

    name: str
    schema: str
    reference: Callable[..., Any]
    public_function: str

    @property
    def qualified_name(self) -> str:
        return f"{NAMESPACE}::{self.name}"


OPS: dict[str, OpSpec] = {}


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    public_function: str,
) -> None:
    """Declare ``spectral::<schema>`` with its reference and its fake.

    The version counters of arguments that the schema says are written to are counted up, as those
    of PyTorch's own in-place ops are: autograd and caches rely on them.

    Args:
        schema: the op's schema without the namespace, e.g. ``"f(Tensor x) -> Tensor"``.
        reference: plain PyTorch implementation with the schema's signature.
        fake: shape and dtype propagation with the schema's signature.
        public_function: the differentiable function to name when someone asks autograd to see
            through the raw op.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, _autograd_guard(name, public_function), "Autograd", with_keyset=True)
    if _written(name):
        LIBRARY.impl(name, _version_counter(name), "ADInplaceOrView", with_keyset=True)
    OPS[name] = OpSpec(name, schema, reference, public_function)


def _overload(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _written(name: str) -> list[int]:
    """Positions of the arguments that the op writes to."""
    return [
        index
        for index, argument in enumerate(_overload(name)._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _requires_grad(argument: Any) -> bool:
    """Whether an argument is a tensor with a gradient or a list with one in it."""
    if isinstance(argument, (list, tuple)):  # of thousands of tensors, with a model's factors
        return any(isinstance(item, torch.Tensor) and item.requires_grad for item in argument)
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def _autograd_guard(name: str, public_function: str) -> Callable[..., Any]:
    op = _overload(name)
    # Without a detour over the next key: thousands of tensors take a while to pass through.
    below = _version_counter(name) if _written(name) else None

    def guard(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(map(_requires_grad, args)):
            raise RuntimeError(
                f"torch.ops.{NAMESPACE}.{name} is a raw op without a derivative; "
                f"call {public_function}, which has one"
            )
        if below is not None:
            return below(keyset, *args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return guard


def _version_counter(name: str) -> Callable[..., Any]:
    op, written = _overload(name), _written(name)

    def count(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        for index in written:
            torch.autograd.graph.increment_version(args[index])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return count
