"""The PEFT model of spectral methods: which modules get which layer, and mixed batches."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
)
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    Bnb8bitBackend,
    QuantizationBackend,
    TorchaoBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectral_adapters._validation import check_choice
from spectral_adapters.fusion import check_weights
from spectral_adapters.peft._config import BASE_DTYPES, SpectralConfig, dtype_name
from spectral_adapters.peft._layer import SpectralLayer, prepare
from spectral_adapters.rotation_bank import RotatedLayer, RotationBank
from spectral_adapters.sharding import is_sharded

#: How ``add_weighted_adapter`` can combine adapters.
COMBINATIONS = ("sum", "spectral", "geodesic")


class SpectralModel(BaseTuner):
    """Base of the models of spectral methods.

    A method sets ``prefix``, ``tuner_layer_cls`` and the layers that it has: ``linear_cls`` for
    ``nn.Linear``, ``Conv1D`` and quantised linear layers, ``conv_cls`` for ``nn.Conv1d``, ``2d``
    and ``3d``, ``embedding_cls`` for ``nn.Embedding``.
    """

    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    linear_cls: ClassVar[type[SpectralLayer] | None] = None
    conv_cls: ClassVar[type[SpectralLayer] | None] = None
    embedding_cls: ClassVar[type[SpectralLayer] | None] = None
    #: Options of the config that map patterns of module names to values for single modules.
    pattern_options: ClassVar[tuple[str, ...]] = ()
    #: What ``combine`` of the layers computes, if the method has it.
    combination: ClassVar[str] = "sum"
    #: What ``_combined_config`` takes beside the adapters.
    combination_options: ClassVar[tuple[str, ...]] = ()

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        for option in ("target_modules", "exclude_modules"):
            value = getattr(config, option)
            if value is not None and not isinstance(value, (str, list, set, tuple)):
                raise TypeError(f"{option} must be a str or hold names of modules; got {value!r}")
        super()._check_new_adapter_config(config)
        for layer in spectral_layers(self.model):
            if layer.merged:
                raise ValueError(
                    f"an adapter cannot be added while {layer.merged_adapters} are merged; "
                    "unmerge them first"
                )

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter to the matching modules and record the precision of their weights.

        Warns of patterns in the config that match none of them.
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = adapted_layers(model, adapter_name)
        prepare(layers, adapter_name)
        if any(isinstance(layer, RotatedLayer) for layer in layers):
            # PEFT's own wrapper calls the model's forward past its hooks.
            RotationBank.attach(model, self)
        config: Any = self.peft_config[adapter_name]
        for option in self.pattern_options:
            warn_of_unused_patterns(option, getattr(config, option), model, adapter_name)
        dtypes = {
            layer._base_weight.dtype for layer in layers if layer.quantization_backend is None
        }
        # Where layers differ, each knows its own precision from the fingerprint.
        if config.base_dtype is None and len(dtypes) == 1:
            # The caller's object may be for other models too.
            config = self.peft_config[adapter_name] = copy.copy(config)
            config.base_dtype = dtype_name(dtypes.pop())
            for layer in layers:
                layer.configs[adapter_name] = config

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own, after which nothing of this package is left."""
        layers = spectral_layers(self.model)
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        for layer in layers:
            layer.forget_merged()
        detach_unused_bank(self.model)
        return unloaded

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SpectralLayer):
            if isinstance(target, self.tuner_layer_cls):
                if target.quantization_backend is not None:
                    subject = f"{peft_config.method} cannot adapt {current_key!r}"
                    self._quantized_class(peft_config, subject, target.quantization_backend)
                target.update_layer(adapter_name, peft_config)
                return
            methods = sorted({config.method for config in target.configs.values()})
            raise ValueError(
                f"{current_key}: a {peft_config.method} adapter cannot be added beside those of "
                f"{methods}; one layer takes adapters of one method: merge or delete the others, "
                "or choose other target_modules"
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = resolve_quantization_backend(base, **get_quantization_kwargs(self.model))
        layer_cls = self._layer_class(peft_config, base, parent, current_key, quantization)
        layer = layer_cls(target, current_key, adapter_name, peft_config, quantization)
        if adapter_name not in self.active_adapters:
            # An additional adapter is not trained before it is activated.
            layer.requires_grad_(False)
        # Not PEFT's _replace_module: the layer is on its device, and must not follow a meta base.
        setattr(parent, target_name, layer)

    def _layer_class(
        self,
        config: SpectralConfig,
        base: nn.Module,
        parent: nn.Module,
        name: str,
        quantization: QuantizationBackend | None,
    ) -> type[SpectralLayer]:
        """The layer for a module; ``ValueError`` if there is none."""
        kinds: dict[str, tuple[type[nn.Module], type[SpectralLayer] | None]] = {
            "torch.nn.Linear": (nn.Linear, self.linear_cls),
            "transformers.pytorch_utils.Conv1D": (Conv1D, self.linear_cls),
            "torch.nn.Conv1d": (nn.Conv1d, self.conv_cls),
            "torch.nn.Conv2d": (nn.Conv2d, self.conv_cls),
            "torch.nn.Conv3d": (nn.Conv3d, self.conv_cls),
            "torch.nn.Embedding": (nn.Embedding, self.embedding_cls),
        }
        subject = f"{config.method} cannot adapt {name!r}, a {type(base).__name__}"
        if quantization is not None:
            return self._quantized_class(config, subject, quantization)
        found = [cls for kind, cls in kinds.values() if cls is not None and isinstance(base, kind)]
        if not found:
            supported = ", ".join(kind for kind, (_, cls) in kinds.items() if cls is not None)
            raise ValueError(
                f"{subject}: it supports {supported}; change target_modules or exclude_modules"
            )
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{subject}: torch.nn.MultiheadAttention uses its weight without calling it; "
                "change target_modules or exclude_modules"
            )
        if isinstance(base, nn.Embedding) and base.max_norm is not None:
            raise ValueError(
                f"{subject}: with max_norm it changes its own weight; change target_modules or "
                "exclude_modules"
            )
        weight = base._parameters.get("weight")
        if is_sharded(weight):
            raise ValueError(
                f"{subject}: its weight is sharded, and parameters that are added now would not be "
                "synchronised; inject the adapter first and shard afterwards"
            )
        if (
            type(weight) is not nn.Parameter
            or weight.dtype not in BASE_DTYPES.values()
            or weight.numel() == 0
        ):
            kind = "none" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
            raise ValueError(
                f"{subject}: its weight must be a plain, non-empty parameter of dtype "
                f"{', '.join(BASE_DTYPES)}, and is {kind}; sharded, parametrized and unknown "
                "quantised weights are not supported"
            )
        if config.fan_in_fan_out and isinstance(base, nn.Linear):
            warnings.warn(
                f"fan_in_fan_out is True but {name!r} is a torch.nn.Linear, whose weight is "
                "[out, in]; it is treated as such",
                stacklevel=2,
            )
        return found[0]

    def _quantized_class(
        self, config: SpectralConfig, subject: str, quantization: QuantizationBackend
    ) -> type[SpectralLayer]:
        layer_cls = self.linear_cls
        if layer_cls is None or not layer_cls.takes_quantized_base(config):
            raise ValueError(
                f"{subject} quantised by {quantization.backend_name}: the method needs the dense "
                "weight at every step; use a low-rank one (Spectral Adapter A or R, LiDB), SODA "
                "with a quantised basis_dtype, or a base that is not quantised"
            )
        if not isinstance(quantization, (Bnb8bitBackend, Bnb4bitBackend, TorchaoBackend)):
            raise ValueError(
                f"{subject} quantised by {quantization.backend_name}: it supports bitsandbytes (8 "
                "and 4 bits) and torchao; change target_modules or exclude_modules"
            )
        return layer_cls

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Parameters are fp32 or better from the start; False asks for the base's precision."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in spectral_layers(self.model):
                if layer.quantization_backend is None:
                    layer.cast_adapter(adapter_name, layer._base_weight.dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """PEFT's own, after a check that every adapted layer says which base it belongs to."""
        mark = f".{cls.prefix}"
        for name in sorted({key.rpartition(mark)[0] for key in state_dict if mark in key}):
            if f"{name}{mark}fingerprint" not in state_dict:
                raise ValueError(
                    f"{name}: the checkpoint has no {cls.prefix}fingerprint, so nothing says which "
                    "base weight it belongs to; save adapters with save_pretrained or "
                    "get_peft_model_state_dict"
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None,
        adapter_name: str,
        combination_type: str = "sum",
        **options: Any,
    ) -> None:
        """Add an adapter that combines others, where the result is an adapter of the method again.

        * ``"sum"``: its change of the weights is the weighted sum of the others' changes; SVDiff
          with ``spectrum_activation="identity"``, and LiDB with equal seeds and subspaces.
        * ``"spectral"``: Spectral Adapters A on disjoint columns, shifts times weights; with
          ``allow_overlap=True`` shifts of the same column are added up.
        * ``"geodesic"``: SODA with equal settings, rotations mixed by their logarithms.

        Modules in ``modules_to_save`` have no sum: each is copied from the one adapter that has it.
        Weights are 1 if None.

        Raises:
            TypeError, ValueError: the combination is no adapter of this method, or an argument does
                not fit.
        """
        inject = partial(self.inject_adapter, self.model)
        combine_adapters(
            self.model, adapters, weights, adapter_name, combination_type, inject, **options
        )

    @classmethod
    def _combined_config(cls, model: nn.Module, configs: Mapping[str, Any]) -> Any:
        """The config of a combination; ``ValueError`` if that is no adapter of this method."""
        raise _no_sum(next(iter(configs.values())))

    def refresh_factors(self) -> None:
        """The function of the same name, for this model."""
        refresh_factors(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` of a mixed batch to every layer for the time of one forward."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names must be None in training mode; call eval() first")
        known = {name for layer in spectral_layers(self.model) for name in layer.configs}
        unknown = sorted(set(names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"adapter_names must name adapters of this model; got {unknown}")
        # Beam search repeats every row, but not what the encoder of an encoder-decoder model reads.
        repeated = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else self.model
        encoding = set() if encoder is self.model else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_add_names, names=names if module in encoding else repeated),
                with_kwargs=True,
            )
            for module in self.model.modules()
            if isinstance(module, (SpectralLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _add_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def spectral_layers(model: nn.Module) -> list[SpectralLayer]:
    """All layers of spectral methods in a model."""
    return [module for module in model.modules() if isinstance(module, SpectralLayer)]


def adapted_layers(model: nn.Module, adapter_name: str) -> list[SpectralLayer]:
    """The layers of spectral methods that have an adapter of this name."""
    return [layer for layer in spectral_layers(model) if adapter_name in layer.configs]


def detach_unused_bank(model: nn.Module) -> None:
    """Take the rotation bank off a model that has no layer for it any more."""
    bank = RotationBank.of(model)
    if bank is not None and not any(isinstance(m, RotatedLayer) for m in model.modules()):
        bank.detach(model)


def combine_adapters(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    combination_type: str,
    inject: Callable[[str], Any],
    **options: Any,
) -> None:
    """:meth:`SpectralModel.add_weighted_adapter` for any model with injected adapters.

    ``inject`` adds the adapter of this name to the model by its entry in ``model.peft_config``.
    """
    configs: Any = getattr(model, "peft_config", {})
    adapters = check_adapters(adapters, configs)
    numbers = check_weights(weights, len(adapters))
    check_new_name(adapter_name, configs)
    config = configs[adapters[0]]
    method: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    kinds = sorted({configs[name].peft_type.value for name in adapters})
    if len(kinds) > 1 or not issubclass(method, SpectralModel):
        raise ValueError(
            f"adapters must be of one method of this package to be combined; got {kinds}"
        )
    check_choice("combination_type", combination_type, COMBINATIONS)
    if combination_type != method.combination:
        if combination_type == "sum":
            raise _no_sum(config)
        raise ValueError(
            f"combination_type must be {method.combination!r} for {config.method} adapters; "
            f"got {combination_type!r}"
        )
    unknown = sorted(set(options) - set(method.combination_options))
    if unknown:
        raise TypeError(f"a combination of {config.method} adapters has no options {unknown}")
    changed = {layer for name in adapters for layer in adapted_layers(model, name)}
    scaled = [n for n in adapters if any(layer.scaling.get(n, 1) != 1 for layer in changed)]
    if scaled and combination_type != "sum":
        raise ValueError(f"adapters must have scale 1 to be combined; {scaled} have another")
    saved = _saved_modules(model, adapters)
    chosen = {name: configs[name] for name in adapters}
    combined = method._combined_config(model, chosen, **options)
    names = {name for other in adapters for name in configs[other].modules_to_save or ()}
    combined.modules_to_save = sorted(names) or None
    if changed != set(adapted_layers(model, adapters[0])):
        # No rule of one of the adapters selects the layers of all.
        combined.target_modules = "|".join(sorted(re.escape(layer.name) for layer in changed))
        combined.exclude_modules = combined.layers_to_transform = combined.layers_pattern = None
    configs[adapter_name] = combined
    try:
        inject(adapter_name)
        for wrapper, owner in saved:
            copies = wrapper.modules_to_save
            copies[adapter_name].load_state_dict(copies[owner].state_dict())
        for layer in adapted_layers(model, adapter_name):
            terms = [
                (weight * layer.scaling[name], name)
                for weight, name in zip(numbers, adapters, strict=True)
                if name in layer.configs
            ]
            layer.combine(terms, adapter_name)
    except Exception:
        # A refused adapter leaves no trace.
        del configs[adapter_name]
        delete_adapter(model, adapter_name, method.prefix)
        raise


def check_adapters(adapters: Any, known: Mapping[str, Any]) -> list[str]:
    """``adapters`` as a list; raise unless it names adapters of the model, each once."""
    if isinstance(adapters, str) or not isinstance(adapters, Iterable):
        raise TypeError(f"adapters must be a list of names of adapters; got {adapters!r}")
    names = list(adapters)
    if not names or any(name not in list(known) or names.count(name) > 1 for name in names):
        raise ValueError(f"adapters must name adapters of this model, each once; got {names!r}")
    return names


def check_new_name(adapter_name: Any, known: Mapping[str, Any]) -> None:
    """Raise unless ``adapter_name`` can be the name of one more adapter."""
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(
            f"adapter_name must be a non-empty str without a dot; got {adapter_name!r}"
        )
    if adapter_name in known:
        raise ValueError(f"adapter_name must be new; the model already has {adapter_name!r}")


def _saved_modules(
    model: nn.Module, adapters: Sequence[str]
) -> list[tuple[ModulesToSaveWrapper, str]]:
    """The modules that adapters save, and whose they are; ``ValueError`` if of several."""
    saved = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            owners = [other for other in adapters if other in module.modules_to_save]
            if len(owners) > 1:
                raise ValueError(
                    f"adapters must have different modules_to_save; {name} is one of {owners}"
                )
            saved += [(module, owner) for owner in owners]
    return saved


def _no_sum(config: SpectralConfig) -> ValueError:
    return ValueError(
        f"a weighted sum of {config.method} adapters is no {config.method} adapter: activate "
        "several at once (set_adapter), merge their sum (fuse_and_unload), or export them as LoRAs "
        "and combine those"
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a module's name matches a pattern, by the rule of PEFT's ``rank_pattern``."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def check_patterns(argument: str, patterns: Mapping[Any, Any]) -> None:
    """Raise unless the keys are names or regular expressions."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must have names of modules for keys; got {pattern!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{argument} must have names or regular expressions for keys; got {pattern!r} "
                f"({error})"
            ) from None


def check_rank_pattern(value: Any) -> None:
    """Raise unless ``value`` is None or maps patterns of names to ranks."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"rank_pattern must be a dict from module names to ints; got {value!r}")
    check_patterns("rank_pattern", value)
    for pattern, r in value.items():
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"rank_pattern[{pattern!r}] must be an int of at least 1; got {r!r}")


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the module ``name``, else the default."""
    for pattern, value in (patterns or {}).items():
        if matches(pattern, name):
            return value
    return default


def warn_of_unused_patterns(
    argument: str, patterns: Mapping[str, Any] | None, model: nn.Module, adapter_name: str
) -> None:
    """Warn of patterns of a config that match none of the adapted modules."""
    if not patterns:
        return
    names = [layer.name for layer in adapted_layers(model, adapter_name)]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            warnings.warn(
                f"{argument} has the key {pattern!r}, which matches no adapted module",
                RuntimeWarning,
                stacklevel=3,
            )


def refresh_factors(model: nn.Module) -> None:
    """Decompose the base weights of a model anew, after they were changed by hand.

    ``load_state_dict`` is noticed without this. Untrained adapters take the new weights as their
    base.

    Raises:
        TypeError: the model has no adapters of this package.
        ValueError: adapters are merged, or a trained adapter belongs to another base weight.
    """
    layers = spectral_layers(model)
    if not layers:
        raise TypeError(f"model must have spectral adapters; this {type(model).__name__} has none")
    for layer in layers:
        layer.refresh_factors()
