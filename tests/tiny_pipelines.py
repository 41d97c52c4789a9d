"""Diffusion pipelines with random weights, made from configs in a moment."""

import json

import torch


def clip_tokenizer(folder):
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=16)


def text_config(tokenizer, projection):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def unet(**options):
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**config, **options})


def autoencoder(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        **options,
    )


def tiny_pipeline(folder, prediction_type="epsilon"):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionPipeline(
        vae=autoencoder(),
        unet=unet(),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_xl_pipeline(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        unet=unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
        text_encoder=CLIPTextModel(text_config(tokenizer, 12)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 12)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(),
    )


def tiny_sd3_pipeline(folder):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from tokenizers import Tokenizer, models
    from transformers import (
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(piece, -1.0) for letter in letters for piece in (letter, "\u2581" + letter)]
    t5_tokenizer = T5TokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=2)), extra_ids=0
    )
    # Loading adds to it what no argument does.
    t5_tokenizer.save_pretrained(folder / "t5")
    t5_tokenizer = T5TokenizerFast.from_pretrained(folder / "t5")
    vae = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06)
    t5 = T5Config(
        vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer, 12)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 12)),
        text_encoder_3=T5EncoderModel(t5).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
