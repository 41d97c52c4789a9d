"""The fields that every spectral PEFT method shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType

from spectral_adapters._validation import check_choice

#: dtypes of base weights that can be decomposed, by the name written into configs.
BASE_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

#: Spread of the parameters of an adapter that starts at random (``init_weights=False``).
RANDOM_STD = 0.1

_CARD_MARK = "import spectral_adapters.peft"
_CARD_NOTE = f"""
## Loading

This adapter is a PEFT method of its own package. Install `spectral-kernels[peft]` and import it
before loading, or PEFT will not know the method (`KeyError`):

```python
{_CARD_MARK}  # noqa: F401
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@dataclass
class SpectralConfig(PeftConfig):
    """Base of the configs of spectral methods.

    Args:
        target_modules: names (suffixes) of the modules to adapt, a regular expression, or
            "all-linear".
        exclude_modules: names (suffixes) or a regular expression of modules to leave alone.
        init_weights: True starts from the base model exactly; False starts at random, which is
            *not* the base model (for tests).
        modules_to_save: modules to train fully and save along.
        layers_to_transform: indices of the layers to adapt; all if None.
        layers_pattern: name of the list of layers that ``layers_to_transform`` counts in.
        fan_in_fan_out: accepted for compatibility; ``Conv1D`` of transformers is recognised by its
            type.
        save_factors: write the frozen factorisation into the checkpoint. It is then large, and
            loads on any copy of the base weight: other precisions, other devices.
        base_dtype: precision of the base weight whose factorisation is adapted ("float32",
            "float64", "float16", "bfloat16"). Recorded when the adapter is made; a wider base is
            rounded to it before it is decomposed.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    #: Name of the method in capitals, a member of ``PeftType``.
    method: ClassVar[str]

    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    init_weights: bool = field(default=True)
    modules_to_save: list[str] | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    fan_in_fan_out: bool = field(default=False)
    save_factors: bool = field(default=False)
    base_dtype: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str):
            if self.layers_to_transform is not None:
                raise ValueError(
                    "layers_to_transform must be None when target_modules is a str; "
                    f"got {self.layers_to_transform!r}"
                )
            if self.layers_pattern is not None:
                raise ValueError(
                    "layers_pattern must be None when target_modules is a str; "
                    f"got {self.layers_pattern!r}"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_to_transform must be given when layers_pattern is; got None and "
                f"{self.layers_pattern!r}"
            )
        for name in ("init_weights", "fan_in_fan_out", "save_factors"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool; got {getattr(self, name)!r}")
        if isinstance(self.base_dtype, torch.dtype):
            self.base_dtype = dtype_name(self.base_dtype)
        check_choice("base_dtype", self.base_dtype, (None, *BASE_DTYPES))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; a model card beside it learns how to load it."""
        super().save_pretrained(str(save_directory), **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            if _CARD_MARK not in text:
                card.write_text(text.rstrip("\n") + "\n" + _CARD_NOTE, encoding="utf-8")
