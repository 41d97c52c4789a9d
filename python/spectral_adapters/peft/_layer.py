"""PEFT layers of spectral methods: everything but the method.

A method is a subclass of :class:`SpectralLayer` that owns its trained parameters and its change of
the weight; :class:`SpectralLinear`, :class:`SpectralConv` and :class:`SpectralEmbedding` say how a
weight is used. A concrete layer inherits from one of each, in the order ``class
Linear(SpectralLinear, MethodLayer)``; PEFT wants "Linear" in the name of linear ones.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakSet

import torch
from huggingface_hub.utils import tqdm
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, embedding, linear
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from spectral_adapters import spectra
from spectral_adapters.autograd import LowRankLinearFunction, SharedRotations
from spectral_adapters.decomposition import Factorisation, Fingerprint
from spectral_adapters.functional import (
    SpectralBasis,
    adapted_linear,
    product_dtypes,
    without_autocast,
)
from spectral_adapters.modules._base import computes_as_written, is_hooked
from spectral_adapters.modules.soda import reset_rotation
from spectral_adapters.peft._config import BASE_DTYPES, SpectralConfig, dtype_name
from spectral_adapters.peft._factors import (
    Fingerprints,
    FrozenFactors,
    is_at_least,
    keep_precision,
)
from spectral_adapters.sharding import is_sharded

_FINGERPRINT_SIZE = 161

#: Bytes of factors that are dense at a time before they are quantised.
_DENSE_FACTORS = 2**30

#: The layers that have merged adapters into a weight, which tied layers have in common.
_MERGED: MutableMapping[nn.Parameter, WeakSet[SpectralLayer]] = WeakIdKeyDictionary()


class LinearChange(NamedTuple):
    """A change of low rank as :func:`spectral_adapters.functional.adapted_linear` takes it."""

    function: type[torch.autograd.Function]
    factors: tuple[Tensor, ...]
    shared: SharedRotations | None = None


class SpectralLayer(nn.Module, BaseTunerLayer):
    """What the layers of all spectral methods share.

    Adapter state hangs directly on the layer, in containers keyed by adapter name: the trained
    parameters (``adapter_layer_names``), ``<prefix>fingerprint`` (what an adapter remembers of its
    base, uint8 [161]) and ``<prefix>factors`` (:class:`FrozenFactors`, one object for all adapters
    that agree on it).

    A method sets ``prefix`` and ``adapter_layer_names`` and defines ``_add_parameters`` and
    ``_factorisation``, and ``_new_containers`` and ``_changes_nothing`` if the defaults do not fit.
    A change of low rank is given by ``_low_rank``, with ``_linear_change`` as its fast path on
    linear layers, any other one by ``_delta_matrix``, with ``_replace_base`` as its fast path. A
    kind of base layer sets ``_ORDINARY`` and defines ``_features``, ``_as_matrix``, ``_as_weight``,
    ``_product`` and ``_low_rank_product``.

    Args:
        base_layer: the layer to adapt; it keeps its weight.
        name: its name in the model, for error messages.
        adapter_name: name of the first adapter.
        config: config of the first adapter.
        quantization: how to read and write the weight of a quantised base layer; None for others.
    """

    #: Prefix of the method's attributes: its name in lower case and an underscore.
    prefix: ClassVar[str]

    #: Exactly these types of base layers compute what their weight and bias say.
    _ORDINARY: ClassVar[tuple[type[nn.Module], ...]]

    #: Whether the change of the weight has a low rank and is added to what the base layer gives, so
    #: that the base's weight is not needed at every step and may be quantised.
    is_low_rank: ClassVar[bool] = False

    #: Whether the method knows the factorisation of the weight that it makes.
    _can_absorb: ClassVar[bool] = False

    @classmethod
    def takes_quantized_base(cls, config: Any) -> bool:
        """Whether an adapter with this config may sit on a quantised base layer."""
        return cls.is_low_rank

    #: The configs by adapter name, of the method's own type.
    configs: dict[str, Any]

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        adapter_name: str,
        config: SpectralConfig,
        quantization: QuantizationBackend | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization
        self.name = name
        self.in_features, self.out_features = self._features()
        self.configs = {}
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        containers = {
            **self._new_containers(),
            f"{self.prefix}fingerprint": Fingerprints(),
            f"{self.prefix}factors": nn.ModuleDict(),
        }
        for container, empty in containers.items():
            setattr(self, container, empty)
        others = [
            container for container in containers if container not in self.adapter_layer_names
        ]
        self.other_param_names = (*others, "configs", "scaling", "r")
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Any = None
        self._disable_adapters = False
        # PEFT and diffusers switch this off and on; no input is cast here in either case.
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def _new_containers(self) -> dict[str, Any]:
        """Empty containers for all that the method keeps per adapter, by attribute name."""
        return {name: nn.ParameterDict() for name in self.adapter_layer_names}

    def _add_parameters(self, adapter: str, config: Any) -> None:
        """Fill the containers with the parameters of a new adapter."""
        raise NotImplementedError

    def _factorisation(self, config: Any) -> Factorisation:
        """The frozen factors that an adapter needs."""
        raise NotImplementedError

    def _quantization(self, config: Any) -> str | None:
        """What the frozen factors are quantised to, or None."""
        return None

    def _changes_nothing(self, trained: Sequence[Tensor]) -> bool:
        """Whether an adapter with these parameters is the identity on every base weight."""
        return not any(bool(values.any()) for values in trained)

    def _low_rank(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """(down [q, in], up [out, q]) with ``W' - W0 = up @ down`` at scale 1."""
        raise NotImplementedError

    def _linear_change(self, adapter: str, device: torch.device) -> LinearChange:
        """What adds the change to a linear layer's product."""
        return LinearChange(LowRankLinearFunction, self._low_rank(adapter, device))

    def _delta_matrix(self, adapter: str, device: torch.device) -> Tensor:
        """``W' - W0`` [out, in] at scale 1."""
        down, up = self._low_rank(adapter, device)
        return up @ down

    def _replace_base(self, x: Tensor, adapter: str) -> Tensor | None:
        """What the adapted layer gives for x at scale 1, from the factors; None if it cannot.

        Called only where the factors are those of the base weight as it is.
        """
        return None

    def _features(self) -> tuple[int, int]:
        """(in_features, out_features), or channels."""
        raise NotImplementedError

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """A weight in the base layer's layout as [out, in]."""
        raise NotImplementedError

    def _as_weight(self, matrix: Tensor) -> Tensor:
        """[out, in] in the layout of the base layer's weight."""
        raise NotImplementedError

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the base layer does, with another weight in its layout."""
        raise NotImplementedError

    def _low_rank_product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """What the base layer does, with the weight ``up @ down`` and no bias."""
        raise NotImplementedError

    # Looked up at every forward pass, and so past nn.Module.__getattr__, which takes long.
    @property
    def _fingerprints(self) -> Fingerprints:
        return cast(Fingerprints, self._modules[self.prefix + "fingerprint"])

    @property
    def _factors(self) -> MutableMapping[str, FrozenFactors]:
        return cast(Any, self._modules[self.prefix + "factors"])

    @property
    def _base_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.get_base_layer().weight)

    def update_layer(self, adapter_name: str, config: SpectralConfig) -> None:
        """Add an adapter; its factors are computed by :func:`prepare`, or at first use.

        Raises:
            ValueError: adapters are merged, the base weight is sharded, or the config does not fit
                this layer.
        """
        if self.merged:
            raise ValueError(
                f"{self.name}: an adapter cannot be added while {self.merged_adapters} are merged; "
                "unmerge them first"
            )
        if is_sharded(self._base_weight):
            raise ValueError(
                f"{self.name}: an adapter cannot be added to a sharded weight; inject all adapters "
                "first and shard afterwards"
            )
        matrix = self._base_matrix()
        self._add_parameters(adapter_name, config)
        self.configs[adapter_name] = config
        self.scaling[adapter_name] = 1.0
        self.r[adapter_name] = self._rank(adapter_name)
        self._fingerprints[adapter_name] = torch.zeros(
            _FINGERPRINT_SIZE, dtype=torch.uint8, device=self._new_device()
        )
        base_dtype = matrix.dtype
        if config.base_dtype is not None:
            chosen = BASE_DTYPES[config.base_dtype]
            base_dtype = chosen if is_at_least(base_dtype, chosen) else base_dtype
        self._assign_factors(adapter_name, base_dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _rank(self, adapter: str) -> int:
        """What ``r`` says of an adapter: the number of spectral columns that it works on."""
        return min(self._matrix_shape())

    def _matrix_shape(self) -> tuple[int, int]:
        """Shape [out, in] of the base weight; costs nothing where that is quantised."""
        if self.quantization_backend is not None:
            return self.out_features, self.in_features
        rows, columns = self._as_matrix(self._base_weight).shape
        return rows, columns

    def _new_device(self) -> torch.device:
        """Where new tensors go: beside the base weight, or on the CPU while that has no data."""
        device = self._base_weight.device
        return torch.device("cpu") if device.type == "meta" else device

    def _new_options(self) -> dict[str, Any]:
        """Device and dtype of new trained parameters: fp32, or fp64 on an fp64 base."""
        double = self._base_weight.dtype == torch.float64
        return {"dtype": torch.float64 if double else torch.float32, "device": self._new_device()}

    def _base_matrix(self) -> Tensor:
        """The base weight [out, in] without any adapter; gathered if it is sharded."""
        if self.quantization_backend is not None:
            return self._dequantized().detach()
        if self._unmerged_weight is not None:
            return self._as_matrix(self._unmerged_weight)
        weight: Any = self._base_weight.detach()
        return self._as_matrix(weight.full_tensor() if is_sharded(weight) else weight)

    def _dequantized(self) -> Tensor:
        """The weight of a quantised base layer as it was before merging, dense [out, in]."""
        backend, base = self.quantization_backend, cast(Any, self.get_base_layer())
        assert backend is not None
        if self._unmerged_weight is None:
            return _dequantize(backend, base)
        merged = _quantized_state(base)
        try:
            _set_quantized_state(base, self._unmerged_weight)
            return _dequantize(backend, base)
        finally:
            _set_quantized_state(base, merged)

    def _assign_factors(self, adapter: str, base_dtype: torch.dtype) -> FrozenFactors:
        """Give an adapter factors of the base weight in ``base_dtype``, shared where possible."""
        config = self.configs[adapter]
        factorisation = self._factorisation(config)
        frozen = FrozenFactors(
            self._matrix_shape(),
            factorisation,
            base_dtype if factorisation.of_weight else torch.float32,
            in_checkpoint=config.save_factors,
            quantization=self._quantization(config),
        )
        if not config.save_factors:
            for other in self._factors.values():
                if not other.in_checkpoint and other.kind == frozen.kind:
                    frozen = other
        self._factors[adapter] = frozen
        return frozen

    def _basis(self, adapter: str, device: torch.device) -> SpectralBasis:
        """The frozen factorisation of an adapter, computed and verified at first use."""
        return self._frozen(adapter).on(device)

    def _frozen(self, adapter: str) -> FrozenFactors:
        """The frozen factors of an adapter, computed and verified at first use."""
        frozen = self._factors[adapter]
        if frozen.basis is None or adapter in self._fingerprints.unverified:
            self._prepare(adapter)
            frozen = self._factors[adapter]
        return frozen

    def _prepare(self, adapter: str) -> None:
        """Compute the factors and compare them with what the adapter remembers.

        An adapter that was not trained yet takes the base weight as it finds it; a trained one must
        find the base that it was trained on.

        Raises:
            ValueError: the base weight is not there, or not the one the adapter was trained on.
        """
        packed = self._fingerprints[adapter]
        recorded = Fingerprint.from_tensor(packed) if bool(packed.any()) else None
        frozen = self._factors[adapter]
        if recorded is None and frozen.fingerprint is not None and not frozen.is_stale:
            self._record(adapter, frozen.fingerprint)
            return
        weight = self._base_matrix()
        if weight.is_meta:
            raise ValueError(
                f"{self.name}: the base weight is on the meta device and cannot be decomposed; "
                "load the base weights first, and offload them afterwards"
            )
        if frozen.are_loaded:
            frozen.compare(weight, recorded)
        else:
            reason = None if recorded is None else self._refusal(adapter, recorded, weight)
            if reason is not None:
                if not self._changes_nothing(self._trained(adapter)):
                    raise ValueError(self._refused(adapter, reason))
                self._assign_factors(adapter, weight.dtype)
            if recorded is None or reason is not None:
                self._record(adapter, self._factors[adapter].compute(weight))
        self._fingerprints.unverified.discard(adapter)

    def _record(self, adapter: str, fingerprint: Fingerprint) -> None:
        """Let an adapter remember the base weight that it is on."""
        # One made in inference mode could not be overwritten later.
        with torch.inference_mode(False):
            self._fingerprints[adapter] = fingerprint.to_tensor().to(self._new_device())
        self._fingerprints.unverified.discard(adapter)

    def _refusal(self, adapter: str, recorded: Fingerprint, weight: Tensor) -> str | None:
        """Why an adapter with this fingerprint must not be used on a weight; None if it may."""
        frozen = self._factors[adapter]
        if recorded.base_dtype != frozen.base_dtype:
            if not is_at_least(weight.dtype, recorded.base_dtype):
                here, there = dtype_name(weight.dtype), dtype_name(recorded.base_dtype)
                return (
                    f"it was trained on a {there} base and this base is {here}: load the base in "
                    f"{there}, or save the adapter with save_factors=True"
                )
            frozen = self._assign_factors(adapter, recorded.base_dtype)
        reason = recorded.mismatch(frozen.compute(weight))
        if reason is not None and not frozen.factorisation.of_weight:
            return (
                f"it was trained on a weight of another shape than {frozen.shape}, or with another "
                f"seed or size of its frozen matrices than {frozen.factorisation}"
            )
        return reason

    def _refused(self, adapter: str, reason: str) -> str:
        return f"{self.name}: the adapter {adapter!r} is refused, {reason}"

    def refresh_factors(self) -> None:
        """Decompose the base weight anew, after it was changed by hand.

        Raises:
            ValueError: adapters are merged, or a trained adapter belongs to another base weight.
        """
        if self.merged:
            raise ValueError(
                f"{self.name}: factors cannot be refreshed while {self.merged_adapters} are "
                "merged; unmerge them first"
            )
        self._mark_stale()
        for adapter in self.configs:
            self._prepare(adapter)

    def _mark_stale(self) -> None:
        for adapter, frozen in self._factors.items():
            frozen.is_stale = True
            self._fingerprints.unverified.add(adapter)

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
        """Refuse adapters of another base weight; notice when the base weight is replaced."""
        incoming = state_dict.get(f"{prefix}base_layer.weight")
        if incoming is not None and not self._holds(incoming):
            self._mark_stale()
        for adapter in self.configs:
            if f"{prefix}{self.prefix}fingerprint.{adapter}" in state_dict:
                self._admit(adapter, state_dict, prefix, error_msgs)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _admit(
        self, adapter: str, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]
    ) -> None:
        """Decide whether an adapter in a state dict may be loaded, and take it out if not."""
        frozen = self._factors[adapter]
        brings_factors = f"{prefix}{self.prefix}factors.{adapter}.left" in state_dict
        if (
            self._base_weight.is_meta
            or frozen.is_stale
            or (brings_factors and frozen.in_checkpoint)
        ):
            # The base weight comes later, or the factors do: decided at first use.
            self._fingerprints.unverified.add(adapter)
            return
        fingerprint = f"{prefix}{self.prefix}fingerprint.{adapter}"
        packed = state_dict[fingerprint]
        if not frozen.are_loaded:
            reason = self._refusal(adapter, Fingerprint.from_tensor(packed), self._base_matrix())
        elif torch.equal(packed.cpu(), self._fingerprints[adapter].cpu()):
            reason = None
        else:
            reason = "the adapter here came with its factors and the one to load has none"
        if reason is None:
            return
        names = [f"{prefix}{name}.{adapter}" for name in self.adapter_layer_names]
        keys = [k for k in state_dict for n in names if k == n or k.startswith(f"{n}.")]
        if self._changes_nothing([state_dict[key] for key in keys]):
            # Nothing was trained on the other base, so the adapter may belong to this one.
            here = self._factors[adapter].compute(self._base_matrix())
            state_dict[fingerprint] = here.to_tensor()
            return
        error_msgs.append(self._refused(adapter, reason))
        for key in (fingerprint, *keys):
            del state_dict[key]

    def _holds(self, incoming: Tensor) -> bool:
        """Whether a base weight from a checkpoint is the one that is already here."""
        weight = cast(Tensor, self.base_layer.weight)
        if weight.is_meta or incoming.is_meta or weight.shape != incoming.shape:
            return False
        return torch.equal(incoming.to(weight.device, weight.dtype), weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpectralLayer:
        """The base layer is cast as asked; what is trained or frozen here keeps its precision."""
        if recurse:
            for child in self.children():
                child._apply(fn if child is self.base_layer else keep_precision(fn))
        return self

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move one adapter beside the base weight; unlike PEFT's own, without a cast."""
        target = self._new_device() if device is None else torch.device(device)
        for parameter in self._trained(adapter_name):
            if not parameter.is_meta:
                parameter.data = parameter.data.to(target)
        if adapter_name in self._fingerprints:
            self._fingerprints[adapter_name] = self._fingerprints[adapter_name].to(target)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast the trained parameters of one adapter."""
        for parameter in self._trained(adapter_name):
            parameter.data = parameter.data.to(dtype)

    def _trained(self, adapter: str) -> list[nn.Parameter]:
        """The trained parameters of one adapter."""
        parameters: list[nn.Parameter] = []
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter in container:
                entry = container[adapter]
                parameters += [entry] if isinstance(entry, nn.Parameter) else entry.parameters()
        return parameters

    def combine(self, terms: Sequence[tuple[float, str]], adapter: str) -> None:
        """Make an adapter the weighted sum of others, where the method allows it."""
        raise NotImplementedError

    def set_scale(self, adapter: str, scale: float) -> None:
        """``W' = W0 + scale * dW`` for this adapter; unknown ones are ignored, as in PEFT."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of the active adapters."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of the active adapters, or reset it to 1 if ``scale`` is None."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale

    def get_delta_weight(self, adapter: str, device: torch.device | None = None) -> Tensor:
        """``scale * (W' - W0)`` in the base weight's layout; exactly zero if untrained.

        On the base weight's device unless another is given.
        """
        device = self._new_device() if device is None else device
        with without_autocast(device):
            return self.scaling[adapter] * self._as_weight(self._delta_matrix(adapter, device))

    def _absorbed(self, adapter: str, device: torch.device) -> SpectralBasis:
        """The frozen factorisation of the adapted weight; called if ``_can_absorb``."""
        raise NotImplementedError

    def check_absorbable(self, adapter: str) -> None:
        """Raise what :meth:`absorb` would, and change nothing."""
        frozen = self._frozen(adapter)
        if not self._can_absorb:
            raise TypeError(
                f"{self.name}: a {self.configs[adapter].method} adapter cannot be absorbed, since "
                "the factorisation of its adapted weight is not known; merge the adapter instead"
            )
        if self.merged:
            problem = f"{self.merged_adapters} are merged; unmerge them first"
        elif len(self.configs) > 1:
            others = sorted(name for name in self.configs if name != adapter)
            problem = f"{others} belong to the base weight as it is; delete them first"
        elif self.scaling[adapter] != 1:
            problem = f"its scale is {self.scaling[adapter]}, not 1"
        elif self.quantization_backend is not None:
            problem = "the base weight is quantised and cannot hold the adapted one"
        elif is_sharded(self._base_weight):
            problem = "the base weight is sharded"
        elif not frozen.is_exact or frozen.fingerprint is None:
            problem = "its factors are not those of the base weight as it is here"
        else:
            return
        raise ValueError(f"{self.name}: the adapter {adapter!r} cannot be absorbed: {problem}")

    @torch.no_grad()
    def absorb(self, adapter: str) -> None:
        """Make the adapted weight the base weight and start the adapter again at the identity.

        See :func:`spectral_adapters.peft.absorb`.

        Raises:
            TypeError: the method does not know the adapted weight's factorisation.
            ValueError: adapters are merged, there are others beside this one, its scale is not 1,
                the base weight is sharded or quantised, or not what its factors are of.
        """
        self.check_absorbable(adapter)
        frozen, weight = self._factors[adapter], self._base_weight
        assert frozen.fingerprint is not None
        basis, trained = self._absorbed(adapter, weight.device), self._trained(adapter)
        after = frozen.fingerprint.after(trained, basis)
        adapted = (weight + self.get_delta_weight(adapter)).to(weight.dtype)
        # A new parameter: what the old one is tied to, such as an output layer, is not adapted.
        base = cast(Any, self.get_base_layer())
        base.weight = nn.Parameter(adapted, requires_grad=weight.requires_grad)
        frozen.absorb(basis, after)
        self._fingerprints[adapter] = after.to_tensor().to(weight.device)
        for parameter in trained:
            reset_rotation(parameter)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' changes to the base weight, and keep the weight as it was.

        Args:
            safe_merge: raise instead of merging NaN or infinity.
            adapter_names: the adapters to merge, by default the active ones.

        Raises:
            ValueError: the base weight is sharded or offloaded, or the merged weight would not be
                finite (with ``safe_merge``).
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.configs]
        if not names:
            return
        weight = self._base_weight
        if is_sharded(weight):
            raise ValueError(
                f"{self.name}: adapters cannot be merged into a sharded weight; save the adapter, "
                "load it on an unsharded base and merge there"
            )
        self._check_onloaded()
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"{self.name}: adapters cannot be merged into a weight quantised by "
                f"{backend.backend_name}"
            )
        merged: Tensor = weight if backend is None else _dequantize(backend, self.base_layer)
        plain = merged.dtype
        for name in names:
            # In the wider dtype of the two: a half-precision weight is rounded once.
            merged = merged + self.get_delta_weight(name)
            if safe_merge and not bool(torch.isfinite(merged.to(plain)).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        if backend is not None:
            if self._unmerged_weight is None:
                self._unmerged_weight = _quantized_state(self.get_base_layer())
            backend.set_base_weight(self, merged.to(plain))
        else:
            if self._unmerged_weight is None:
                kept = [layer._unmerged_weight for layer in _merged_into(weight)]
                self._unmerged_weight = kept[0] if kept else weight.detach().clone()
            _MERGED.setdefault(weight, WeakSet()).add(self)
            weight.data.copy_(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before merging, to the last bit.

        What other layers have merged into the same weight stays merged.
        """
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._check_onloaded()
        weight, unmerged = self._base_weight, self._unmerged_weight
        self.forget_merged()
        if self.quantization_backend is not None:
            _set_quantized_state(self.get_base_layer(), unmerged)
            return
        weight.data.copy_(unmerged)
        for layer in _merged_into(weight):
            changed: Tensor = weight
            for name in layer.merged_adapters:
                changed = changed + layer.get_delta_weight(name)
            weight.data.copy_(changed)

    def forget_merged(self) -> None:
        """Take the base weight as it is now for the unmerged one."""
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def _check_onloaded(self) -> None:
        """Raise ``ValueError`` if the base weight is offloaded and cannot be written."""
        if self._base_weight.is_meta:
            raise ValueError(
                f"{self.name}: the base weight is on the meta device, as offloading leaves it; "
                "merge and unmerge with the methods of the PEFT model, which load it, or remove "
                "the hooks of accelerate first"
            )

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """The adapted layer; ``adapter_names`` gives every row of x an adapter of its own."""
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, args, kwargs)
        if self.disable_adapters:
            if self.merged:
                self._unmerge_tied()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = self.active_adapters
        self._check_trained(x, active)
        return self._adapted_forward(x, active, args, kwargs)

    def _unmerge_tied(self) -> None:
        """Unmerge this layer and all others that are merged into its weight."""
        for layer in {self, *_merged_into(self._base_weight)}:
            with onload_layer(layer):
                layer.unmerge()

    def _check_trained(self, x: Tensor, adapters: Sequence[str]) -> None:
        """Raise ``ValueError`` if what was trained of an adapter is offloaded."""
        trained = cast(Any, self._modules[self.adapter_layer_names[0]])._parameters
        for name in adapters:
            values = trained.get(name)
            if values is not None and values.is_meta and not x.is_meta:
                raise ValueError(
                    f"{self.name}: the trained parameters of {name!r} are on the meta device; if "
                    "the whole model was offloaded, offload its base layers alone, or all of an "
                    f'adapted layer at once (preload_module_classes=["{type(self).__name__}"])'
                )

    def _adapted_forward(
        self, x: Tensor, adapters: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        active = [name for name in adapters if name in self.configs]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if self.is_low_rank:
            return self._add_low_rank(x, active, args, kwargs)
        if args or kwargs or not self._base_is_ordinary():
            y = self.base_layer(x, *args, **kwargs)
            return y + self._use(x, self._total_delta(active, y.device), None).to(y.dtype)
        base: Any = self.base_layer
        weight, bias = base.weight, getattr(base, "bias", None)
        if (
            len(active) == 1
            and self.scaling[active[0]] == 1
            # The factors give the base weight no gradient and do not follow it.
            and not (weight.requires_grad or (bias is not None and bias.requires_grad))
            and self._frozen(active[0]).replaces(weight)
        ):
            replaced = self._replace_base(x, active[0])
            if replaced is not None:
                return replaced
        return self._use(x, weight + self._total_delta(active, x.device), bias)

    def _add_low_rank(
        self, x: Tensor, active: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        y = self._base_product(x, args, kwargs)
        for name in active:
            change = self._low_rank_product(x, *self._low_rank(name, y.device))
            if self.scaling[name] != 1:
                change = self.scaling[name] * change
            y = y + change.to(y.dtype)
        return y

    def _base_product(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        return y

    def _mixed_forward(
        self,
        x: Tensor,
        adapter_names: Sequence[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names must hold one name for each of the {len(x)} inputs; "
                f"got {len(adapter_names)}"
            )
        if self.merged:
            raise ValueError(
                f"adapter_names cannot be used while {self.merged_adapters} are merged; "
                "unmerge them first"
            )
        if not adapter_names:
            return self.base_layer(x, *args, **kwargs)
        self._check_trained(x, adapter_names)
        parts = []
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            index = torch.tensor(rows, device=x.device)
            parts.append((index, self._adapted_forward(x[index], [name], args, kwargs)))
        first = parts[0][1]
        result = first.new_empty(len(x), *first.shape[1:])
        for index, part in parts:
            result[index] = part
        return result

    def _base_is_ordinary(self) -> bool:
        """Whether the base layer may be replaced: nothing hooks into it or overrides it."""
        base = self.base_layer
        return type(base) in self._ORDINARY and not is_hooked(base)

    def _total_delta(self, adapters: Sequence[str], device: torch.device) -> Tensor:
        total = self.get_delta_weight(adapters[0], device)
        for name in adapters[1:]:
            total = total + self.get_delta_weight(name, device)
        return total

    def _use(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's product with another weight, in the dtype of x or of autocast."""
        result, work = product_dtypes(x, weight)
        with without_autocast(x.device):
            y = self._product(x.to(work), weight.to(work), None if bias is None else bias.to(work))
        return y.to(result)

    def __repr__(self) -> str:
        return self.prefix.removesuffix("_") + "." + super().__repr__()


def _merged_into(weight: nn.Parameter) -> list[SpectralLayer]:
    """The layers that have adapters merged into a weight, of tied ones several."""
    layers = _MERGED.get(weight, ())
    return [layer for layer in layers if layer.merged and layer._base_weight is weight]


def _dequantize(backend: QuantizationBackend, base: Any) -> Tensor:
    """The dense weight [out, in] of a quantised layer.

    In evaluation mode bitsandbytes packs 4-bit weights anew for its CPU kernel, with scales rounded
    to bf16; its own dequantisation takes them as they were.
    """
    state: Any = getattr(base.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return backend.get_base_weight(base)
    from bitsandbytes import functional

    state = copy.copy(state)
    scales = state.absmax.T.reshape(-1).float()
    # The inverse would quantise nested scales again, and leaves others transposed.
    state.original_nested = False
    values, state = functional._convert_weight_packed_for_cpu_inverse(base.weight.data, state)
    state.absmax = scales
    return functional.dequantize_4bit(values, state)


def _quantized_state(base: Any) -> tuple[Any, Any]:
    """The weight of a quantised layer, and what 8-bit layers of bitsandbytes keep beside it."""
    return base.weight, copy.copy(getattr(base, "state", None))


def _set_quantized_state(base: Any, state: tuple[Any, Any]) -> None:
    base.weight = state[0]
    if state[1] is not None:
        base.state = copy.copy(state[1])


def prepare(layers: Sequence[SpectralLayer], adapter: str) -> None:
    """Compute the factors of a new adapter on many layers in one go.

    Left for their first use are those whose base weight is not there yet. Factors that are
    quantised are made a part at a time, so that those of a whole model are never dense at once.

    Raises:
        ValueError: a base weight is not finite.
    """

    def can_be_prepared(layer: SpectralLayer) -> bool:
        config = layer.configs[adapter]
        # An adapter that is about to be loaded with its factors does not need them computed.
        awaits_factors = config.save_factors and config.inference_mode
        return not layer._base_weight.is_meta and not awaits_factors

    ready = [layer for layer in layers if can_be_prepared(layer)]
    due = [layer for layer in ready if layer._factors[adapter].are_due]
    for part in _parts(due, adapter):
        found = spectra.factorise_all(
            [layer._factors[adapter].request(layer._base_matrix) for layer in part],
            over_processes=True,
            progress=_progress_bar,
        )
        for layer, decomposed in zip(part, found, strict=True):
            layer._factors[adapter].adopt(decomposed)
    for layer in ready:
        layer._prepare(adapter)


def _parts(layers: Sequence[SpectralLayer], adapter: str) -> list[list[SpectralLayer]]:
    """Layers whose dense factors may be in memory at once; all of them unless quantised."""
    parts: list[list[SpectralLayer]] = [[]]
    size = 0
    for layer in layers:
        frozen = layer._factors[adapter]
        shapes = frozen.factorisation.shapes(*frozen.shape).values()
        nbytes = 4 * sum(math.prod(shape) for shape in shapes)
        if parts[-1] and frozen.quantization is not None and size + nbytes > _DENSE_FACTORS:
            parts.append([])
            size = 0
        parts[-1].append(layer)
        size += nbytes
    return parts


def _progress_bar(total: int) -> Any:
    """A bar for what takes more than a second, on a terminal, where the libraries show theirs."""
    return tqdm(
        total=total, desc="Decomposing weights", unit="matrix", delay=1, disable=None, leave=False
    )


class SpectralLinear(SpectralLayer):
    """For ``nn.Linear``, the ``Conv1D`` of transformers, whose weight is [in, out], and quantised
    linear layers."""

    _ORDINARY = (nn.Linear, Conv1D)

    def _features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        if isinstance(base, Conv1D):
            in_features, out_features = base.weight.shape
            return in_features, out_features
        return cast(int, base.in_features), cast(int, base.out_features)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        base = self.base_layer
        if type(base) is nn.Linear:
            return weight  # at every forward pass
        return weight.mT if isinstance(self.get_base_layer(), Conv1D) else weight

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return self._as_matrix(matrix)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, self._as_matrix(weight), bias)

    def _add_low_rank(
        self, x: Tensor, active: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        base: Any = self.base_layer
        if (
            type(base) is nn.Linear
            and not (args or kwargs or len(active) > 1)
            and computes_as_written(base, x)
        ):
            function, factors, shared = self._linear_change(active[0], x.device)
            return adapted_linear(
                function,
                x,
                factors,
                scaling=self.scaling[active[0]],
                weight=base.weight,
                bias=base.bias,
                shared=shared,
            )
        y = self._base_product(x, args, kwargs)
        for name in active:
            function, factors, shared = self._linear_change(name, y.device)
            scaling = self.scaling[name]
            y = adapted_linear(function, x, factors, scaling=scaling, base=y, shared=shared)
        return y

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may approximate the adapter by a LoRA: it adds to the weight, so yes."""
        return True


class SpectralConv(SpectralLayer):
    """For ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

    The weight [out, in/groups, ...] is adapted in its flattened form [out, in/groups * ...].
    """

    _ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @property
    def _conv(self) -> Any:
        return self.get_base_layer()

    def _features(self) -> tuple[int, int]:
        return self._conv.in_channels, self._conv.out_channels

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self._base_weight.shape)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv._conv_forward(x, weight, bias)

    def _low_rank_product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if self._conv.groups > 1:
            # Each group sees its own channels: the rows of down belong to no group.
            return self._use(x, self._as_weight(up @ down), None)
        kernel = down.view(-1, *self._base_weight.shape[1:])
        result, work = product_dtypes(x, down)
        pointwise = {3: conv1d, 4: conv2d, 5: conv3d}[kernel.dim()]
        with without_autocast(x.device):
            z = self._product(x.to(work), kernel.to(work), None)
            y = pointwise(z, up.to(work).view(*up.shape, *[1] * (kernel.dim() - 2)))
        return y.to(result)


class SpectralEmbedding(SpectralLayer):
    """For ``nn.Embedding``: the table [num_embeddings, embedding_dim] is adapted as it is."""

    _ORDINARY = (nn.Embedding,)

    @property
    def _table(self) -> nn.Embedding:
        return cast(nn.Embedding, self.get_base_layer())

    def _features(self) -> tuple[int, int]:
        return self._table.num_embeddings, self._table.embedding_dim

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def _use(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base = self._table
        return (self._scale() * embedding(x, weight, base.padding_idx)).to(base.weight.dtype)

    def _low_rank_product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return self._scale() * (embedding(x, up, self._table.padding_idx) @ down)

    def _scale(self) -> Any:
        """What models with a scaled embedding multiply its output with, else 1."""
        return getattr(self._table, "embed_scale", 1)
