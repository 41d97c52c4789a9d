"""Training an adapter of a Stable-Diffusion-type denoiser, with accelerate.

Everything random in step ``t`` (which images, latents, noise, timesteps) is drawn from generators
seeded by (seed, t), on the CPU. So a resumed run draws what the uninterrupted run would have drawn,
and a GPU trains on the same noise as a CPU.
"""

from __future__ import annotations

import hashlib
import math
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from spectral_adapters.diffusers import save_adapter
from spectral_adapters.optim import StiefelAdam
from spectral_adapters.personalize.data import Pictures
from spectral_adapters.personalize.settings import LEARNING_RATES, Settings, UsageError
from spectral_adapters.rotation_bank import RotationBank

STATE = "state"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SUPPORTED = (
    "supported are Stable-Diffusion-type pipelines: StableDiffusionPipeline, "
    "StableDiffusionXLPipeline and others with a UNet2DConditionModel, an AutoencoderKL and "
    "encode_prompt"
)


def check_pipeline(pipe: Any) -> None:
    """Refuse what :class:`Trainer` cannot train.

    Raises:
        UsageError: saying what the pipeline has and what is supported.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = type(pipe).__name__
    if not (
        isinstance(getattr(pipe, "unet", None), UNet2DConditionModel)
        and isinstance(getattr(pipe, "vae", None), AutoencoderKL)
        and hasattr(pipe, "encode_prompt")
    ):
        raise UsageError(f"{kind} cannot be personalized: {SUPPORTED}")
    unet, vae = pipe.unet, pipe.vae
    if unet.config.in_channels != vae.config.latent_channels:
        raise UsageError(
            f"{kind} cannot be personalized: its denoiser takes {unet.config.in_channels} channels "
            f"and its autoencoder gives {vae.config.latent_channels} (inpainting and other "
            "image-conditioned models are not supported)"
        )
    for name, allowed in {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
    }.items():
        if unet.config.get(name) not in allowed:
            raise UsageError(
                f"{kind} cannot be personalized: its denoiser is conditioned by "
                f"{name}={unet.config[name]!r}; {SUPPORTED}"
            )
    schedule = pipe.scheduler.config
    if (
        not hasattr(pipe.scheduler, "alphas_cumprod")
        or schedule.get("prediction_type", "epsilon") not in PREDICTION_TYPES
    ):
        raise UsageError(
            f"{kind} cannot be personalized: its scheduler, {type(pipe.scheduler).__name__} with "
            f"prediction type {schedule.get('prediction_type')!r}, is not of the DDPM family with "
            f"one of {', '.join(PREDICTION_TYPES)}"
        )


@dataclass(frozen=True)
class Conditions:
    """What the autoencoder and the text encoders say about the training data, computed once.

    Attributes:
        mean, std: moments of the latents, fp32 ``[N, V, C, h, w]``; V is 2 with mirrored images.
        states: text states, ``[N + 1, T, D]``; the last are those of the empty caption.
        added: pooled text states ``[N + 1, P]`` and size conditions ``[6]`` of SDXL, else None.
    """

    mean: Tensor
    std: Tensor
    states: Tensor
    added: tuple[Tensor, Tensor] | None


@torch.no_grad()
def encode_captions(
    pipe: Any, captions: Sequence[str], size: tuple[int, int]
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return text states ``[N, T, D]`` and, for SDXL, pooled states and size conditions."""
    encoded = pipe.encode_prompt(
        prompt=list(captions),
        device=pipe.vae.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    states = encoded[0]
    if pipe.unet.config.addition_embed_type != "text_time":
        return states, None
    pooled = encoded[2]
    if pipe.config.get("force_zeros_for_empty_prompt"):
        empty = torch.tensor([caption == "" for caption in captions], device=states.device)
        states = states.masked_fill(empty[:, None, None], 0)
        pooled = pooled.masked_fill(empty[:, None], 0)
    sizes = torch.tensor([*size, 0, 0, *size])
    return states, (pooled, sizes.to(pooled))


@torch.no_grad()
def encode(pipe: Any, pictures: Pictures, *, flip: bool = False) -> Conditions:
    """Run the autoencoder and the text encoders over the training data."""
    vae = pipe.vae
    # The autoencoder of SDXL overflows in fp16 and says so.
    dtype = torch.float32 if vae.config.get("force_upcast") else vae.dtype
    before = vae.dtype
    if dtype != before:
        vae.to(dtype)
    moments = []
    for image in pictures.images:
        views = torch.stack([image, image.flip(2)] if flip else [image])
        posterior = vae.encode((views * 2 - 1).to(vae.device, dtype)).latent_dist
        moments.append(torch.stack([posterior.mean, posterior.std]).float())
    if dtype != before:
        vae.to(before)
    mean, std = torch.stack(moments, 1)
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor

    height, width = pictures.images.shape[-2:]
    states, added = encode_captions(pipe, [*pictures.captions, ""], (height, width))
    return Conditions((mean - shift) * scale, std * scale, states, added)


class Denoiser(nn.Module):
    """The UNet behind a forward of tensors only.

    accelerate replaces the ``forward`` of what it prepares; so the UNet itself, which the pipeline
    samples with, stays as it is.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, noisy: Tensor, timesteps: Tensor, states: Tensor, added: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        conditions = None
        if added is not None:
            conditions = {"text_embeds": added[0], "time_ids": added[1]}
        return self.unet(
            noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=conditions
        ).sample


def seeded(*parts: object) -> torch.Generator:
    """Return a CPU generator for a purpose; the generator takes 32 bits of seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def picks(count: int, start: int, length: int, seed: int) -> Tensor:
    """Return items ``start`` to ``start + length`` of endless shuffled epochs, int64 [length]."""
    epochs = range(start // count, (start + length - 1) // count + 1)
    order = torch.cat(
        [torch.randperm(count, generator=seeded(seed, "epoch", epoch)) for epoch in epochs]
    )
    return order[start % count :][:length]


class StopRequest:
    """Within this context the first SIGINT or SIGTERM is remembered, a second SIGINT interrupts.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Progress:
    """How far a run has come; saved and restored by accelerate."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = 0.0
        self.loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def record(self, loss: float, seconds: float) -> None:
        """Count a step; the loss is averaged over about 50 steps."""
        self.step += 1
        self.seconds += seconds
        weight = max(0.02, 1 / self.step)
        self.loss = loss if self.loss is None else self.loss + weight * (loss - self.loss)


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        reason: "finished", "interrupted" or "diverged".
        step: steps taken by the adapter that was saved.
        loss: average over about the last 50 steps; None before the first.
        seconds_per_step: average over all steps, sampling and saving left out.
        peak_memory: bytes; of the process, or of the GPU's allocator.
    """

    reason: str
    step: int
    loss: float | None
    seconds_per_step: float
    peak_memory: int


class Trainer:
    """Trains the adapter that ``pipe.unet`` has.

    Args:
        pipe: a pipeline that passes :func:`check_pipeline`, on the accelerator's device, with one
            trainable adapter.
        conditions: from :func:`encode`.
        prior: what the base model drew itself, to be kept: each micro-batch holds as many of these
            as of the training images (prior preservation, Ruiz et al., "DreamBooth", CVPR 2023).
        settings: see :class:`Settings`.
        output: the adapter goes to ``output/unet``, the state for resuming to ``output/state``.
        accelerator: ``accelerate.Accelerator``, made by :func:`make_accelerator`.
    """

    def __init__(
        self,
        pipe: Any,
        conditions: Conditions,
        settings: Settings,
        output: Path,
        accelerator: Any,
        prior: Conditions | None = None,
    ) -> None:
        from diffusers import DDPMScheduler

        self.pipe = pipe
        self.conditions = conditions
        self.prior = prior
        self.settings = settings
        self.output = output
        self.accelerator = accelerator
        self.progress = Progress()
        # Of the scheduler, training needs only the noise levels and what is predicted.
        self.noise: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        self.trained = {
            name: values for name, values in pipe.unet.named_parameters() if values.requires_grad
        }
        groups = parameter_groups(self.trained, settings)
        kind = StiefelAdam if settings.parametrization == "stiefel" else torch.optim.AdamW
        optimizer = kind(groups, weight_decay=settings.weight_decay)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        if settings.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        self.denoiser, self.optimizer = accelerator.prepare(Denoiser(pipe.unet), optimizer)
        self.bank = RotationBank.of(pipe.unet)
        if self.bank is not None:
            self.bank.accumulation_steps = settings.gradient_accumulation
        accelerator.register_for_checkpointing(self.progress)
        accelerator.register_save_state_pre_hook(self._save_trained)
        accelerator.register_load_state_pre_hook(self._load_trained)

    def resume(self) -> None:
        """Return to the last saved state.

        Raises:
            UsageError: there is none.
        """
        folder = self.output / STATE
        if not folder.is_dir():
            # Between the two renamings of _save.
            folder = self.output / f"{STATE}.old"
        if not folder.is_dir():
            raise UsageError(f"nothing to resume: {self.output / STATE} does not exist")
        self.accelerator.load_state(str(folder))

    def run(self, sample: Callable[[int], None] | None = None) -> Outcome:
        """Train to ``settings.steps``, to the first SIGINT or SIGTERM, or to a loss not finite.

        Adapter and state are saved every ``checkpoint_every`` steps and at the end. Where the loss
        is not finite, the last adapter with a finite loss is saved, and the state on disk stays.

        Args:
            sample: called with the step count every ``sample_every`` steps, in evaluation mode.
        """
        from tqdm.auto import tqdm

        settings, progress = self.settings, self.progress
        bar = tqdm(
            total=settings.steps,
            initial=progress.step,
            unit="step",
            desc="training",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )
        images = settings.batch_size * settings.gradient_accumulation
        images *= self.accelerator.num_processes
        good = [values.detach().clone() for values in self.trained.values()]
        good_step = saved = progress.step
        reason = "finished"
        self.denoiser.train()
        with bar, StopRequest() as stop:
            while progress.step < settings.steps:
                began = time.perf_counter()
                loss = self._gradients(progress.step)
                if not math.isfinite(loss):
                    reason = "diverged"
                    break
                torch._foreach_copy_(good, [values.detach() for values in self.trained.values()])
                good_step = progress.step
                self._step(progress.step)
                seconds = time.perf_counter() - began
                progress.record(loss, seconds)
                bar.set_postfix(
                    {"loss": f"{progress.loss:.4f}", "images/s": f"{images / seconds:.1f}"},
                    refresh=False,
                )
                bar.update()
                if self._stopped(stop):
                    reason = "interrupted"
                    break
                if progress.step % settings.checkpoint_every == 0:
                    if not self._is_finite():
                        reason = "diverged"
                        break
                    self._save()
                    saved = progress.step
                every = settings.sample_every
                if sample is not None and every and progress.step % every == 0:
                    self.denoiser.eval()
                    sample(progress.step)
                    self.denoiser.train()
            if reason != "diverged" and not self._is_finite():
                reason = "diverged"
            self.denoiser.eval()
            if reason == "diverged":
                with torch.no_grad():
                    torch._foreach_copy_(list(self.trained.values()), good)
                if self.accelerator.is_main_process:
                    save_adapter(self.pipe, self.output)
            elif saved < progress.step or not (self.output / STATE).is_dir():
                self._save()
        return Outcome(
            reason,
            good_step if reason == "diverged" else progress.step,
            progress.loss,
            progress.seconds / max(progress.step, 1),
            peak_memory(self.accelerator.device),
        )

    def _gradients(self, step: int) -> float:
        """Accumulate the gradients of one step; return its loss, averaged over processes."""
        total = 0.0
        parts = self.settings.gradient_accumulation
        for micro in range(parts):
            with self.accelerator.accumulate(self.denoiser), self._deferring(micro < parts - 1):
                loss = self._loss(step, micro)
                self.accelerator.backward(loss)
                gathered = self.accelerator.gather(loss.detach().reshape(1))
                total += float(gathered.mean()) / self.settings.gradient_accumulation
        return total

    def _deferring(self, enabled: bool) -> AbstractContextManager[None]:
        """Contract the gradients of merged weights once per step, where there are any."""
        return nullcontext() if self.bank is None else self.bank.accumulate(enabled)

    def _step(self, step: int) -> None:
        if self.settings.max_grad_norm:
            self.accelerator.clip_grad_norm_(
                list(self.trained.values()), self.settings.max_grad_norm
            )
        factor = rate_factor(step, self.settings)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, step: int, micro: int) -> Tensor:
        """The denoising loss of one micro-batch, a scalar."""
        settings = self.settings
        examples = [self._examples(self.conditions, "batch", step, micro)]
        if self.prior is not None:
            examples.append(self._examples(self.prior, "prior", step, micro))
        clean, noise, timesteps, states = (
            torch.cat(parts) for parts in zip(*(tensors[:4] for tensors in examples), strict=True)
        )
        kind = self.noise.config.prediction_type
        if kind == "v_prediction":
            target = self.noise.get_velocity(clean, noise, timesteps)
        else:
            target = noise if kind == "epsilon" else clean
        noisy = self.noise.add_noise(clean, noise, timesteps).to(states.dtype)
        added = None
        if self.conditions.added is not None:
            pooled = torch.cat([tensors[4] for tensors in examples if tensors[4] is not None])
            added = (pooled, self.conditions.added[1].expand(len(states), -1))
        output = self.denoiser(noisy, timesteps, states, added)
        errors = (output.float() - target.float()).square().flatten(1).mean(1)
        size = settings.batch_size
        loss = errors[:size].mean()
        if self.prior is None:
            return loss
        weight = 1.0 if settings.prior_weight is None else settings.prior_weight
        return loss + weight * errors[size:].mean()

    def _examples(
        self, data: Conditions, purpose: str, step: int, micro: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Latents, noise, timesteps, text states and pooled states of one micro-batch."""
        settings, device = self.settings, self.accelerator.device
        size, processes = settings.batch_size, self.accelerator.num_processes
        rank = self.accelerator.process_index
        batch = step * settings.gradient_accumulation + micro
        chosen = picks(len(data.mean), (batch * processes + rank) * size, size, settings.seed)
        draw = seeded(settings.seed, purpose, batch, rank)
        view = torch.randint(data.mean.shape[1], (size,), generator=draw)
        levels = self.noise.config.num_train_timesteps
        timesteps = torch.randint(levels, (size,), generator=draw).to(device)
        latent_noise, noise = torch.randn(2, size, *data.mean.shape[2:], generator=draw).to(device)
        empty = torch.rand(size, generator=draw) < settings.caption_dropout
        captions = torch.where(empty, len(data.states) - 1, chosen)
        clean = data.mean[chosen, view] + data.std[chosen, view] * latent_noise
        pooled = None if data.added is None else data.added[0][captions]
        return clean, noise, timesteps, data.states[captions], pooled

    def _stopped(self, stop: StopRequest) -> bool:
        """Whether any process was asked to stop: all of them must leave the loop together."""
        if self.accelerator.num_processes == 1:
            return stop.signal is not None
        flag = torch.tensor([stop.signal is not None], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(values).all()) for values in self.trained.values())

    def _save(self) -> None:
        """Save adapter and state; a state folder on disk is always whole."""
        part, old = self.output / f"{STATE}.part", self.output / f"{STATE}.old"
        place = self.output / STATE
        if self.accelerator.is_main_process:
            save_adapter(self.pipe, self.output)
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(old, ignore_errors=True)
            if place.is_dir():
                place.replace(old)
            part.replace(place)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save_trained(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        """Of the model, the state holds what is trained: the base is in its own folder."""
        from safetensors.torch import save_file

        weights.clear()
        if self.accelerator.is_main_process:
            tensors = {
                name: values.detach().cpu().contiguous() for name, values in self.trained.items()
            }
            save_file(tensors, Path(folder) / "trained.safetensors")

    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        from safetensors.torch import load_file

        models.clear()
        found = load_file(Path(folder) / "trained.safetensors")
        if found.keys() != self.trained.keys():
            raise UsageError(f"{folder} is the state of another adapter")
        with torch.no_grad():
            for name, values in self.trained.items():
                values.copy_(found[name])


def make_accelerator(settings: Settings) -> Any:
    """Return the ``accelerate.Accelerator`` of a run."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    try:
        return Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.gradient_accumulation,
            cpu=settings.cpu,
            # Frozen factors of spectral adapters are buffers, and equal in all processes.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except ValueError as error:
        raise UsageError(f"--mixed-precision {settings.mixed_precision}: {error}") from error


def parameter_groups(trained: dict[str, Tensor], settings: Settings) -> list[dict[str, Any]]:
    """Return the optimizer's groups: rotations, and everything else."""
    rate = settings.learning_rate or LEARNING_RATES[settings.method]
    rotations = [values for name, values in trained.items() if ".soda_rotation." in name]
    others = [values for name, values in trained.items() if ".soda_rotation." not in name]
    groups: list[dict[str, Any]] = [
        {"params": rotations, "lr": rate},
        {"params": others, "lr": settings.spectrum_learning_rate or rate},
    ]
    if settings.parametrization == "stiefel":
        for group, manifold in zip(groups, (True, False), strict=True):
            group["manifold"] = manifold
    return [group for group in groups if group["params"]]


def rate_factor(step: int, settings: Settings) -> float:
    """Return the learning rate of a step as a share of the largest."""
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (settings.steps - warmup)))


def peak_memory(device: torch.device) -> int:
    """Return the most memory used so far in bytes, by the process or on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
