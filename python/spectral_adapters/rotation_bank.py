"""One Cayley transform for all rotations of a model, and what may be kept between two of them.

A bank is attached to a model's root. At the root's forward it looks whether any of the layers'
trained numbers have changed, by value, since optimizers and averages often write past autograd's
version counters. If so, one call computes all rotations; if not, everything made from them is
still good: gradient accumulation, checkpoint recomputation, several calls of one layer and
inference build a rotated basis or merged weight once. The rotations are one node of the autograd
graph, so one call computes all their gradients in a backward pass.

A layer goes its own way, with the same numbers, wherever the bank cannot know its rotations: called
outside the root's forward, with other parameters than the bank saw (``functional_call``'s, those
that FSDP gathers for a part of the model; see ``sharding``), or in compiled parts of a model that
is not compiled as a whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectral_adapters.autograd import (
    Deferral,
    LayerRotationsFunction,
    SharedRotations,
    apply,
    kept_gradient,
    share_rotations,
)
from spectral_adapters.functional import (
    FoldedBasis,
    SODATerms,
    SpectralBasis,
    cayley_factors,
    shift_together,
)

__all__ = ["BankedRotation", "RotatedLayer", "RotationBank", "RotationSlot"]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RotationSlot(NamedTuple):
    """One rotation of a layer.

    Attributes:
        key: names the rotation within its layer (the adapter's name, say).
        rotation: parameters of the factors: packed skew matrices [n(n-1)/2], or with ``sizes`` None
            the orthogonal factors [n, n] themselves.
        sizes: n of each factor, or None.
        others: parameters that are no rotation but that the adapted weight depends on.
    """

    key: str
    rotation: tuple[nn.Parameter, ...]
    sizes: tuple[int, ...] | None
    others: tuple[nn.Parameter, ...] = ()

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All of them."""
        return self.rotation + self.others if self.others else self.rotation


class BankedRotation(NamedTuple):
    """What a bank has for a slot.

    Attributes:
        values: the orthogonal factors [n, n]; with ``shared`` they are constants to autograd.
        shared: how their gradients reach the packed parameters, or None: through the values
            themselves, as far as they have any.
        folded: where to keep what the rotation is folded into, or None where nothing may be kept.
    """

    values: tuple[Tensor, ...]
    shared: SharedRotations | None
    folded: FoldedBasis | None

    def with_gradients(self) -> tuple[Tensor, ...]:
        """The factors as tensors that pass their gradients on."""
        if self.shared is None:
            return self.values
        return apply(LayerRotationsFunction, self.shared.token, self.shared, *self.values)


class RotatedLayer:
    """Mixin of the layers that have rotations, which a bank may compute for them."""

    _rotation_bank: RotationBank | None = None

    def rotation_slots(self) -> list[RotationSlot]:
        """The rotations that the layer's forward uses now."""
        raise NotImplementedError

    def _banked(self, slot: RotationSlot) -> BankedRotation | None:
        """What the model's bank has for a slot; None where it does not know the rotation."""
        bank = self._rotation_bank
        return None if bank is None else bank.lookup(self, slot)

    def _rotations(self, slot: RotationSlot) -> tuple[tuple[Tensor, ...], FoldedBasis | None]:
        """Orthogonal factors [n, n] of a slot, in fp32 or better, and where to keep their products.

        From the model's bank where it knows them, else computed here.
        """
        banked = self._banked(slot)
        if banked is not None:
            return banked.with_gradients(), banked.folded
        return self._own_rotations(slot), None

    def _shared_terms(
        self, slot: RotationSlot, basis: SpectralBasis, offset: nn.Parameter
    ) -> SODATerms | None:
        """Terms of an svd-left layer with ``s = S + offset`` whose gradients take the short way.

        No node of the graph adds the spectrum, and one edge stands for all factors. None where
        there is no gradient, others trace or transform, or basis and rotation lie apart.
        """
        banked = self._banked(slot) or _alone(slot)
        if banked is None or banked.shared is None:
            return None
        singular_values, folded = basis.singular_values, banked.folded
        assert singular_values is not None
        device = singular_values.device
        if offset.device != device or banked.values[0].device != device:
            return None
        if folded is None:
            with torch.no_grad():
                spectrum = singular_values + offset.to(singular_values.dtype)
        else:
            spectrum = folded.shifted(singular_values, offset)
        return SODATerms(basis, spectrum, banked.values, folded, offset, banked.shared)

    def _rotations_for_product(
        self, slot: RotationSlot, device: torch.device, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, ...], SharedRotations | None]:
        """Orthogonal factors [n, n] of a slot, and where their gradients go, plain numbers then;
        else tensors that pass them on, and None."""
        banked = self._banked(slot) or _alone(slot)
        if banked is None:
            turns = self._own_rotations(slot)
        else:
            first = banked.values[0]
            if banked.shared is not None and (first.device, first.dtype) == (device, dtype):
                return banked.values, banked.shared
            turns = banked.with_gradients()
        return tuple([turn.to(device, dtype) for turn in turns]), None

    def _own_rotations(self, slot: RotationSlot) -> tuple[Tensor, ...]:
        """Orthogonal factors [n, n] of a slot, in fp32 or better, computed here."""
        if slot.sizes is None:
            return slot.rotation
        return cayley_factors(slot.rotation, slot.sizes)

    def _rotations_from(self) -> str:
        """Who computes the rotations in a forward pass, for ``repr``."""
        return "own" if self._rotation_bank is None else "bank"


class _Entry:
    """A slot of a layer, and what the bank has for it."""

    def __init__(self, slot: RotationSlot, deferral: Deferral) -> None:
        self.slot = slot
        self.parameters = slot.parameters
        self.values: tuple[Tensor, ...] = ()
        self.shared: SharedRotations | None = None
        self.folded = FoldedBasis(kept_gradient(deferral))
        #: Since the root's last forward began: asked for, and asked for with a gradient.
        self.was_seen = self.was_used = False
        self.traced: tuple[Tensor, ...] = ()
        self.versions: list[int] = []

    def current_versions(self) -> list[int]:
        """What autograd knows of changes of the slot's parameters."""
        return [parameter._version for parameter in self.parameters]


class RotationBank:
    """The rotations of all layers of a model, computed together.

    ``RotationBank.attach(model)`` makes one; the PEFT methods of this package do that themselves.

    Args:
        keep: keep rotated bases and merged weights between forward passes as long as no parameter
            changes. One matrix of the weight's size per layer (two in the merged plan), less
            work.
        accumulation_steps: forward passes per optimizer step; the planner counts on them when it
            weighs what a build costs. At least 1.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    #: All tracked numbers as they were when the rotations were computed; None: none, or too old.
    _copies: list[Tensor] | None

    def __init__(self, *, keep: bool = True, accumulation_steps: int = 1) -> None:
        self._bases_stay = True
        self.keep = keep
        self.accumulation_steps = accumulation_steps
        self._forget()

    @property
    def keep(self) -> bool:
        """Whether rotated bases and merged weights are kept between forward passes."""
        return self._keep

    @keep.setter
    def keep(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"keep must be True or False; got {value!r}")
        if value and not self._bases_stay:
            raise ValueError(
                "keep must be False for a model whose frozen bases are sharded: they are there "
                "only while their layer runs"
            )
        self._keep = value

    def expect_sharded_bases(self) -> None:
        """Keep nothing that is made of frozen bases, from now on: FSDP frees them after each use.

        Look for the layers again at the next forward, since FSDP replaces parameters.
        """
        self.keep = self._bases_stay = False
        self.invalidate()

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per optimizer step that the planner counts on."""
        return self._accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"accumulation_steps must be an int; got {value!r}")
        if value < 1:
            raise ValueError(f"accumulation_steps must be at least 1; got {value!r}")
        self._accumulation_steps = value

    @classmethod
    def attach(cls, model: nn.Module, *wrappers: nn.Module, **options: Any) -> RotationBank:
        """Give a model a bank; one that it or a part of it has already is kept, with these options.

        Args:
            model: its ``forward`` is what a bank works during.
            wrappers: modules around the model, during whose ``forward`` it works too.
            options: of :class:`RotationBank`.

        Raises:
            TypeError: ``model`` is no module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        bank = cls.of(model)
        if bank is None:
            bank = cls(**options)
        else:
            now = {"keep": bank.keep, "accumulation_steps": bank.accumulation_steps}
            fresh = cls(**{**now, **options})
            bank.accumulation_steps, bank.keep = fresh.accumulation_steps, fresh.keep
        bank.add_roots(model, *wrappers)
        return bank

    @staticmethod
    def of(model: nn.Module) -> RotationBank | None:
        """The bank of a model, or else of the first of its parts that has one; None without."""
        for module in model.modules():
            bank = _bank_at(module)
            if bank is not None:
                return bank
        return None

    def add_roots(self, *models: nn.Module) -> None:
        """Work during the forward of these too, which hold layers of this bank."""
        for model in models:
            if _bank_at(model) is not self:
                model.register_forward_pre_hook(self._before)
                model.register_forward_hook(self._after, always_call=True)
                self._roots.append(weakref.ref(model))
        self._scan()

    def detach(self, model: nn.Module) -> None:
        """Take the bank off a model and its parts; its layers compute their own rotations then."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) is self:
                        del hooks[key]
                        module._forward_hooks_always_called.pop(key, None)
        for layer in _rotated_layers(model):
            if layer._rotation_bank is self:
                layer._rotation_bank = None
        self._forget()

    def invalidate(self) -> None:
        """Look for the layers again, and compute everything anew, at the next forward."""
        self._copies, self._must_scan = None, True

    @property
    def has_waiting_gradients(self) -> bool:
        """Whether gradients of merged weights wait for their contraction (:meth:`accumulate`)."""
        return any(entry.folded.gradient.is_waiting for entry in self._entries.values())

    @contextmanager
    def accumulate(self, enabled: bool = True) -> Iterator[None]:
        """Backward passes in here leave the gradients of merged weights uncontracted.

        The first backward pass outside contracts their sum with the bases, once for all of them;
        until then the adapters' own gradients lack that part. The counterpart of DDP's
        ``no_sync``: for every micro-batch of a step but the last.

        Args:
            enabled: False changes nothing, for loops that decide by a flag.
        """
        before = self._deferral.is_on
        self._deferral.is_on = enabled or before
        try:
            yield
        finally:
            self._deferral.is_on = before

    def lookup(self, layer: RotatedLayer, slot: RotationSlot) -> BankedRotation | None:
        """What the bank has for a slot.

        None if the bank does not know these parameters, or not what they are now.
        """
        entry = self._entries.get((id(layer), slot.key))
        if torch.compiler.is_compiling():
            if entry is None or not entry.traced:
                return None
            return BankedRotation(entry.traced, None, None)
        recomputing = torch._C._current_graph_task_id() != -1
        if not (recomputing or self._outermost) or torch._C._are_functorch_transforms_active():
            return None
        if entry is None or not _same(entry, slot):
            self._must_scan = True
            return None
        if self._copies is None or (recomputing and not entry.values):
            return None
        if not recomputing and entry.versions != entry.current_versions():
            # A forward that was interrupted never ended, and parameters were changed since.
            return None
        if not self._is_computed:
            self._compute()
        entry.was_seen = True
        training = torch.is_grad_enabled()
        folded = entry.folded if self.keep else None
        if folded is not None:
            # Never by what was called before: equal calls give equal bits.
            folded.uses = self._accumulation_steps if training else 1
        if not training or not any(p.requires_grad for p in slot.rotation):
            return BankedRotation(entry.values, None, folded)
        if slot.sizes is None:
            return BankedRotation(slot.rotation, None, folded)
        if recomputing and not entry.was_used:
            # A reentrant checkpoint ran without gradients, and has a graph of its own per segment.
            return BankedRotation(entry.values, _shared([entry])[0], folded)
        entry.was_used = True
        if entry.shared is None:
            for group in _by_device(self._entries.values()):
                for member, shared in zip(group, _shared(group), strict=True):
                    member.shared = shared
        return BankedRotation(entry.values, entry.shared, folded)

    def __repr__(self) -> str:
        count = sum(len(entry.slot.rotation) for entry in self._entries.values())
        return (
            f"RotationBank({count} factors of {len(self._entries)} layers, keep={self.keep}, "
            f"accumulation_steps={self.accumulation_steps})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RotationBank:
        """A bank for a copied model: the same options, and nothing of the original's."""
        copied = RotationBank(keep=self.keep, accumulation_steps=self.accumulation_steps)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.keep, self.accumulation_steps)

    def _forget(self) -> None:
        self._roots: list[weakref.ref[nn.Module]] = []
        self._entries: dict[tuple[int, str], _Entry] = {}
        self._deferral = Deferral()
        self._outermost: int | None = None
        self._must_scan = True
        self._unseen: set[tuple[int, str]] = set()
        self._tracked: list[nn.Parameter] = []
        self._hints: list[list[Any]] = []
        self._copies = None
        self._is_computed = self._was_capturing = False

    def _before(self, root: nn.Module, args: Any) -> None:
        """Bring the rotations up to date at the start of a root's forward."""
        if getattr(root, "_is_replica", False):
            return  # of DataParallel, whose replicas have parameters of their own
        if torch.compiler.is_compiling():
            self._trace()
            return
        if torch._C._are_functorch_transforms_active():
            return  # the layers compute their own, of what stands in for their parameters
        is_nested = self._outermost is not None and self._outermost != id(root)
        if not is_nested:
            self._outermost = id(root)
        if all(known() is not root for known in self._roots):
            self._roots.append(weakref.ref(root))
            self._must_scan = True
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpoint recomputes the whole root: with what it had
        if self._must_scan or not all(p.numel() for p in self._tracked):
            self._scan()
        self._refresh()
        if not is_nested:
            for entry in self._entries.values():
                entry.was_seen = entry.was_used = False

    def _after(self, root: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            for entry in self._entries.values():
                entry.traced = ()
        elif self._outermost == id(root):
            self._outermost = None
            # A layer that others stand in for now is not called any more.
            unseen = {key for key, entry in self._entries.items() if not entry.was_seen}
            if unseen != self._unseen:
                self._unseen, self._must_scan = unseen, True
            if self._must_scan and not self.has_waiting_gradients:
                # Before this pass leaves gradients that wait, and the next one would find others.
                self._scan()
                self._refresh()

    def _scan(self) -> None:
        """Find the layers below the roots and the slots that they use now."""
        found: dict[tuple[int, str], _Entry] = {}
        self._roots = [root for root in self._roots if root() is not None]
        for layer in {
            id(layer): layer for root in self._roots for layer in _rotated_layers(root())
        }.values():
            layer._rotation_bank = self
            for slot in layer.rotation_slots():
                if not slot.rotation or not all(map(_is_plain, slot.parameters)):
                    continue
                key = (id(layer), slot.key)
                known = self._entries.get(key)
                if known is None or not _same(known, slot):
                    known = _Entry(slot, self._deferral)
                found[key] = known
        if found != self._entries:
            self._refuse_pending()
            self._entries = found
            slots = [entry.slot for entry in found.values()]
            self._tracked = [p for slot in slots for p in slot.parameters]
            self._copies = None
        self._must_scan = False

    def _refresh(self) -> None:
        """Have all rotations computed anew unless every number is what it was."""
        tracked = self._tracked
        hints: list[list[Any]] = [[p._version for p in tracked], [p.requires_grad for p in tracked]]
        with torch.inference_mode(False), torch.no_grad():
            copies = _flat_copies(tracked)
            is_capturing = _is_capturing()
            if (
                self._copies is not None
                and hints == self._hints
                # A CUDA graph is replayed with other numbers, which nobody compares then.
                and not (is_capturing or self._was_capturing)
                and _are_equal(copies, self._copies)
            ):
                return
            self._refuse_pending()
            self._copies, self._hints, self._was_capturing = copies, hints, is_capturing
            self._is_computed = False
            for entry in self._entries.values():
                entry.versions = entry.current_versions()
                entry.values, entry.shared = (), None
                entry.folded.forget()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _compute(self) -> None:
        """Compute the rotations: when the first of them is asked for."""
        for group in _by_device(self._entries.values()):
            packed = [p.detach() for entry in group for p in entry.slot.rotation]
            sizes = [n for entry in group for n in entry.slot.sizes or ()]
            packed = [p if p.dtype == torch.float64 else p.float() for p in packed]
            values = iter(torch.ops.spectral.cayley_fwd([p.contiguous() for p in packed], sizes))
            for entry in group:
                entry.values = tuple([next(values) for _ in entry.slot.rotation])
        for entry in self._entries.values():
            if entry.slot.sizes is None:
                entry.values = tuple([factor.detach() for factor in entry.slot.rotation])
        shift_together(entry.folded for entry in self._entries.values())
        self._is_computed = True

    def _trace(self) -> None:
        """One Cayley transform in a graph that is being compiled."""
        for group in _by_device(self._entries.values()):
            packed = [p for entry in group for p in entry.slot.rotation]
            sizes = [n for entry in group for n in entry.slot.sizes or ()]
            rotations = cayley_factors(packed, sizes)
            start = 0
            for entry in group:
                entry.traced = rotations[start : start + len(entry.slot.rotation)]
                start += len(entry.slot.rotation)

    def _refuse_pending(self) -> None:
        """Raise if parameters changed while gradients were waiting for their contraction."""
        waiting = [e for e in self._entries.values() if e.folded.gradient.is_waiting]
        if waiting:
            for entry in waiting:
                entry.folded.gradient.sum = None
            raise RuntimeError(
                f"the gradients of {len(waiting)} merged weights were accumulated and never "
                "contracted: the last backward pass before an optimizer step must run outside of "
                "RotationBank.accumulate()"
            )


def _restored(keep: bool, accumulation_steps: int) -> RotationBank:
    return RotationBank(keep=keep, accumulation_steps=accumulation_steps)


def _bank_at(module: nn.Module) -> RotationBank | None:
    """The bank whose hook a module has."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return next((owner for owner in owners if isinstance(owner, RotationBank)), None)


def _rotated_layers(root: nn.Module | None) -> list[Any]:
    return [] if root is None else [m for m in root.modules() if isinstance(m, RotatedLayer)]


def _is_plain(parameter: Tensor) -> bool:
    """Whether a parameter's numbers can be read here and now; ZeRO-3 leaves empty ones."""
    return parameter.numel() > 0 and not (
        parameter.is_meta or parameter.is_inference() or hasattr(parameter, "full_tensor")
    )


def _shared(entries: list[_Entry]) -> list[SharedRotations]:
    """One node of the graph for the rotations of these entries, and each entry's place in it."""
    packed = [p for entry in entries for p in entry.slot.rotation]
    values = [value for entry in entries for value in entry.values]
    token, pool = share_rotations(values, packed)
    firsts = accumulate((len(entry.values) for entry in entries), initial=0)
    return [SharedRotations(token, pool, first) for _, first in zip(entries, firsts, strict=False)]


def _alone(slot: RotationSlot) -> BankedRotation | None:
    """What a bank would have for a slot that has none, for this call."""
    packed = slot.rotation
    if (
        slot.sizes is None
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not torch.is_grad_enabled()
        or not any(p.requires_grad for p in packed)
        or not all(map(_is_plain, packed))
    ):
        return None
    with torch.no_grad():
        values = tuple(cayley_factors(packed, slot.sizes))
    token, pool = share_rotations(values, packed)
    return BankedRotation(values, SharedRotations(token, pool, 0), None)


def _same(known: _Entry, slot: RotationSlot) -> bool:
    """Whether a slot has the very parameters that are known of it."""
    old, new = known.parameters, slot.parameters
    return len(old) == len(new) and all(map(is_, old, new))


def _by_device(entries: Iterable[_Entry]) -> list[list[_Entry]]:
    """Entries with packed parameters, by the device of these."""
    groups: dict[torch.device, list[_Entry]] = {}
    for entry in entries:
        if entry.slot.sizes is not None:
            groups.setdefault(entry.slot.rotation[0].device, []).append(entry)
    return list(groups.values())


def _flat_copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    """All numbers of the parameters, in one tensor per device and dtype."""
    flat = [p if p.dim() == 1 else p.reshape(-1) for p in parameters]
    if len({p.device for p in flat}) <= 1 and len({p.dtype for p in flat}) <= 1:
        return [torch.cat(flat)] if flat else []
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for values in flat:
        groups.setdefault((values.device, values.dtype), []).append(values)
    return [torch.cat(group) for group in groups.values()]


def _are_equal(copies: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two results of :func:`_flat_copies` hold the same bits in the same places: NaN, too,
    is what it was."""
    return len(copies) == len(others) and all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        for a, b in zip(copies, others, strict=True)
    )


def _bits(numbers: Tensor) -> Tensor:
    return numbers.view(_INTEGERS[numbers.itemsize])


def _is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
