"""Making PEFT know a method that it does not ship, without a fork.

``register_peft_method`` accepts only names that are members of PEFT's closed ``PeftType`` enum, and
PEFT has no plug-in discovery. So the enum is extended in memory, once per process, at import.
"""

from __future__ import annotations

from typing import Any

import peft
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

_OWNER = "spectral_adapters"


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a PEFT method under ``name``, in lower case; idempotent.

    Raises:
        RuntimeError: PEFT itself, or another package, already has a method of this name.
    """
    value = name.upper()
    member = PeftType.__members__.get(value)
    if member is None:
        member = _extend_enum(value)
    elif getattr(member, "owner", None) != _OWNER:
        raise RuntimeError(
            f"PEFT {peft.__version__} already has a method named {value}, and it is not the one of "
            f"{_OWNER}: install versions of the two packages that fit together"
        )
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:
        # A second import of this package, such as importlib.reload, brings new classes.
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
    else:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


def _extend_enum(value: str) -> PeftType:
    """Add a member to ``PeftType`` as the enum machinery of Python 3.11 to 3.13 would have done."""
    member: Any = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    member.owner = _OWNER
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    # EnumType forbids setting a member; the metaclass's own __setattr__ is bypassed.
    type.__setattr__(PeftType, value, member)
    return member
