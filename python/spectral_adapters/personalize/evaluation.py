"""Drawing with and without the adapter, and comparing with the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_adapters.diffusers import adapted_components, load_adapter
from spectral_adapters.peft import merge_changes
from spectral_adapters.personalize import similarity
from spectral_adapters.personalize.trainer import Conditions, encode_captions, seeded


@dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    Attributes:
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        batch_size: images drawn together.
        size: height and width.
        seed: image ``i`` starts from noise that depends on (seed, i) alone, so that drawings before
            and after training differ by the adapter.
    """

    steps: int
    guidance_scale: float
    batch_size: int
    size: tuple[int, int]
    seed: int


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    label: str = "",
    output_type: str = "pt",
) -> Tensor:
    """Return float32 ``[len(prompts), 3, height, width]`` in ``[0, 1]`` on the CPU.

    With ``label``, a progress bar shows it; with ``output_type="latent"`` it is the latents.
    """
    from tqdm.auto import tqdm

    pipe.set_progress_bar_config(disable=True)
    height, width = sampling.size
    images = []
    with tqdm(total=len(prompts), unit="image", desc=label, disable=not label, leave=False) as bar:
        for start in range(0, len(prompts), sampling.batch_size):
            batch = list(prompts[start : start + sampling.batch_size])
            drawn = pipe(
                prompt=batch,
                generator=[seeded(sampling.seed, "sample", start + i) for i in range(len(batch))],
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                height=height,
                width=width,
                output_type=output_type,
            ).images
            images.append(drawn.float().cpu())
            bar.update(len(batch))
    return torch.cat(images) if images else torch.zeros(0, 3, height, width)


def draw_each(
    pipe: Any, adapters: Mapping[str, str | Path], prompts: Sequence[str], sampling: Sampling
) -> dict[str, Tensor]:
    """:func:`draw` with one adapter after the other, at weight 1.

    Args:
        pipe: a pipeline without adapters; has none afterwards.
        adapters: by title, folders of adapters on ``pipe``.
        prompts, sampling: the same for all, and so is the noise.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as ``load_adapter`` of
            ``spectral_adapters.diffusers``.
    """
    columns = {}
    for title, folder in adapters.items():
        load_adapter(pipe, folder)
        columns[title] = draw(pipe, prompts, sampling, label=title)
        for module in adapted_components(pipe).values():
            merge_changes(module, {})
    return columns


@torch.no_grad()
def draw_prior(pipe: Any, prompts: Sequence[str], sampling: Sampling) -> Conditions:
    """Let the base model draw what training is to keep, as training data."""
    latents = draw(pipe, prompts, sampling, label="prior", output_type="latent")
    mean = latents[:, None].to(pipe.vae.device)
    states, added = encode_captions(pipe, [*prompts, ""], sampling.size)
    return Conditions(mean, torch.zeros_like(mean), states, added)


@torch.no_grad()
def reconstruct(pipe: Any, images: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return what the autoencoder makes of ``images``: the best that any adapter could draw."""
    vae = pipe.vae
    found = []
    for batch in images.split(batch_size):
        latents = vae.encode((batch * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean
        found.append((vae.decode(latents).sample.float().cpu() * 0.5 + 0.5).clamp(0, 1))
    return torch.cat(found)


@contextmanager
def without_adapter(component: Any) -> Iterator[None]:
    """Within this context ``component`` computes what the base model computes."""
    component.disable_adapters()
    try:
        yield
    finally:
        component.enable_adapters()


@dataclass(frozen=True)
class Score:
    """Similarity of drawings to their truths.

    Attributes:
        mean: average cosine similarity of image features.
        margin: half the width of its 95 % interval over the names.
        own_truth: share of drawings whose nearest truth, of all, is their own.
        values: per drawing ``[N]``.
    """

    mean: float
    margin: float
    own_truth: float
    values: Tensor


def score(features: Tensor, truths: Tensor) -> Score:
    """Compare unit-length features ``[N, D]`` of drawings with those of their truths ``[N, D]``."""
    table = features @ truths.T
    own = table.diagonal()
    nearest = (table.argmax(1) == torch.arange(len(table))).float().mean()
    return Score(float(own.mean()), interval(own), float(nearest), own)


def interval(values: Tensor) -> float:
    """Return half the width of the normal 95 % interval of the mean of ``values`` [N], N >= 2."""
    return float(1.96 * values.std() / len(values) ** 0.5)


def score_columns(columns: dict[str, Tensor], truths: Tensor) -> dict[str, Score]:
    """Score each column of drawings ``[N, 3, H, W]`` against the truths."""
    wanted = similarity.image_features(truths)
    return {
        title: score(similarity.image_features(images), wanted) for title, images in columns.items()
    }
