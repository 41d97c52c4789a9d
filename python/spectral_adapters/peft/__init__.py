"""PEFT methods of this project. Importing this module makes PEFT know them.

    from spectral_adapters.peft import SODAConfig
    model = peft.get_peft_model(model, SODAConfig(target_modules=["q_proj", "v_proj"]))

The import is needed before loading an adapter as well.
"""

from spectral_adapters.peft._absorb import absorb
from spectral_adapters.peft._columns import adapter_columns, saved_columns
from spectral_adapters.peft._export import LoRAExport, export_lora, merge_and_unload, to_lora
from spectral_adapters.peft._folder import load_adapter, restore_adapter, save_adapter
from spectral_adapters.peft._fusion import (
    FUSION_METHODS,
    adapter_moments,
    changes_to_lora,
    fuse,
    fuse_and_unload,
    init_orthogonal_lora,
    merge_changes,
    weight_changes,
)
from spectral_adapters.peft._model import refresh_factors
from spectral_adapters.peft._rename import rename_adapter
from spectral_adapters.peft.lidb import LiDBConfig
from spectral_adapters.peft.soda import SODAConfig
from spectral_adapters.peft.spectral_adapter_a import SpectralAdapterAConfig
from spectral_adapters.peft.spectral_adapter_r import SpectralAdapterRConfig
from spectral_adapters.peft.svdiff import SVDiffConfig

__all__ = [
    "FUSION_METHODS",
    "LiDBConfig",
    "LoRAExport",
    "SODAConfig",
    "SVDiffConfig",
    "SpectralAdapterAConfig",
    "SpectralAdapterRConfig",
    "absorb",
    "adapter_columns",
    "adapter_moments",
    "changes_to_lora",
    "export_lora",
    "fuse",
    "fuse_and_unload",
    "init_orthogonal_lora",
    "load_adapter",
    "merge_and_unload",
    "merge_changes",
    "refresh_factors",
    "rename_adapter",
    "restore_adapter",
    "save_adapter",
    "saved_columns",
    "to_lora",
    "weight_changes",
]
