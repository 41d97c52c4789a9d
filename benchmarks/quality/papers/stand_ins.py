"""Tiny models of the papers' architectures with random weights, and made-up data, all offline."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import torch

WORDS = ("red", "blue", "good", "bad", "fast", "slow", "cat", "dog", "runs", "sleeps")


def deberta(folder: Path) -> None:
    """Write a DeBERTa-v2 encoder, 2 layers of width 64, and a tokenizer of whole words."""
    from transformers import DebertaV2Config, DebertaV2Model, DebertaV2Tokenizer

    pieces = [(piece, 0.0) for piece in ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")]
    pieces += [(f"▁{word}", -1.0) for word in WORDS]
    tokenizer = DebertaV2Tokenizer(vocab=pieces, unk_id=3)
    torch.manual_seed(0)
    config = DebertaV2Config(
        **DEBERTA_ATTENTION,
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        pooler_hidden_size=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    DebertaV2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


#: How DeBERTaV3 attends, at any size.
DEBERTA_ATTENTION = {
    "relative_attention": True,
    "position_buckets": 256,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
}


def sentences(count: int, seed: int) -> list[str]:
    """Four random words each."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=4)) for _ in range(count)]


def mistral(folder: Path) -> None:
    """Write a Mistral with grouped-query attention, 2 layers of width 64, on bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sums(count: int, seed: int) -> list[dict[str, str]]:
    """Return problems as GSM8K writes them."""
    draw = random.Random(seed)
    pairs = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(count)]
    return [
        {"question": f"What is {a} + {b}?", "answer": f"It is <<{a}+{b}={a + b}>>\n#### {a + b}"}
        for a, b in pairs
    ]


def sdxl(folder: Path) -> None:
    """Write the tiny Stable Diffusion XL pipeline of the tests."""
    folder.mkdir(parents=True)
    pipelines = _module("tests", "tiny_pipelines")
    pipelines.tiny_xl_pipeline(folder / "vocabulary").save_pretrained(folder)


def sdxl_unet() -> Any:
    """Return SDXL's real UNet, with random weights."""
    return _module("benchmarks", "unet_providers").unet("sdxl")


def _module(folder: str, name: str) -> Any:
    """Import a module of a folder of the repository, with its neighbours."""
    path = str(Path(__file__).parents[3] / folder)
    if path not in sys.path:
        sys.path.append(path)
    return importlib.import_module(name)


def clip(folder: Path) -> None:
    """Write a CLIP of two towers, 1 layer of width 16 each."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True)
    tokenizer = _module("tests", "tiny_pipelines").clip_tokenizer(folder / "vocabulary")
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **size,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    vision = {**size, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dino(folder: Path) -> None:
    """Write a DINOv2, 1 layer of width 16."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=1,
        image_size=16,
        patch_size=8,
    )
    Dinov2Model(config).save_pretrained(folder)


def photographs(folder: Path, count: int) -> None:
    """Write pictures of one colour each."""
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (24, 20), (200, 40 * index, 30)).save(folder / f"{index}.png")
