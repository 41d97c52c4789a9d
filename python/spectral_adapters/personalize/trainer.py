"""Training an adapter of a Stable-Diffusion-type denoiser, with accelerate.

Everything random in step ``t`` (which images, latents, noise, timesteps) is drawn from generators
seeded by (seed, t), on the CPU. So a resumed run draws what the uninterrupted run would have drawn,
and a GPU trains on the same noise as a CPU.
"""

from __future__ import annotations

import hashlib
import math
import resource
import signal
import sys
import tempfile
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
from torch.nn.utils import get_total_norm

from spectral_adapters.checkpoint import load_checkpoint, save_checkpoint
from spectral_adapters.diffusers import save_adapter
from spectral_adapters.optim import ORTHOGONALITY_LIMIT, StiefelAdam, orthogonality_error
from spectral_adapters.personalize.data import Pictures
from spectral_adapters.personalize.settings import LEARNING_RATES, Settings, UsageError
from spectral_adapters.rotation_bank import RotationBank

CHECKPOINTS = "checkpoints"
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
    """How far a run has come."""

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
        reason: "finished", "interrupted", "diverged", or "unsaved" where training came to its end
            or was interrupted and the checkpoint could not be written.
        step: steps taken by the adapter that was saved.
        loss: average over about the last 50 steps; None before the first.
        seconds_per_step: average over all steps, sampling and saving left out.
        peak_memory: bytes; of the process, or of the GPU's allocator.
        place: the folder with the adapter; None if it could be saved nowhere.
        trouble: what was not finite, and at which step.
        signal: that interrupted training, or 0.
        orthogonality_error: max|X^T X - I| of the rotations, where they are trained as such.
    """

    reason: str
    step: int
    loss: float | None
    seconds_per_step: float
    peak_memory: int
    place: Path | None
    trouble: str | None = None
    signal: int = 0
    orthogonality_error: float | None = None


class Diverged(Exception):
    """Numbers that training cannot go on with: what they are, and at which step."""


class Trainer:
    """Trains the adapter that ``pipe.unet`` has.

    Args:
        pipe: a pipeline that passes :func:`check_pipeline`, on the accelerator's device, with one
            trainable adapter.
        conditions: from :func:`encode`.
        prior: what the base model drew itself, to be kept: each micro-batch holds as many of these
            as of the training images (prior preservation, Ruiz et al., "DreamBooth", CVPR 2023).
        settings: see :class:`Settings`.
        output: the adapter goes to ``output/unet``, checkpoints to ``output/checkpoints``.
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
        self._adapted = {"unet": pipe.unet}
        scaler = accelerator.scaler
        self._stateful = {} if scaler is None else {"scaler": scaler}

    def resume(self, checkpoint: Path) -> None:
        """Return to where a checkpoint was saved.

        Raises:
            CheckpointError: it is not whole, or of another run.
        """
        found = load_checkpoint(checkpoint, self._adapted, self.optimizer, stateful=self._stateful)
        self.progress.load_state_dict(found.extra["progress"])

    def run(self, sample: Callable[[int], None] | None = None) -> Outcome:
        """Train to ``settings.steps``, to the first SIGINT or SIGTERM, or to what is not finite.

        A checkpoint is saved every ``checkpoint_every`` steps and at the end. Where loss, gradients
        or parameters are not finite, the last adapter with a finite loss is saved, and the
        checkpoints stay. What cannot be written, for want of space say, is told and stops nothing.

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
        good_step = progress.step
        saved = None
        reason, trouble, number = "finished", None, 0
        self.denoiser.train()
        with bar, StopRequest() as stop:
            try:
                while progress.step < settings.steps:
                    began = time.perf_counter()
                    loss = self._gradients(progress.step)
                    if not math.isfinite(loss):
                        raise Diverged(f"step {progress.step + 1}: the loss is no longer finite")
                    torch._foreach_copy_(good, [v.detach() for v in self.trained.values()])
                    good_step = progress.step
                    self._step(progress.step)
                    seconds = time.perf_counter() - began
                    progress.record(loss, seconds)
                    bar.set_postfix(
                        {"loss": f"{progress.loss:.4f}", "images/s": f"{images / seconds:.1f}"},
                        refresh=False,
                    )
                    bar.update()
                    number = self._stopped(stop)
                    if number:
                        reason = "interrupted"
                        break
                    if progress.step % settings.checkpoint_every == 0:
                        self._check_trained()
                        if self._save():
                            saved = progress.step
                    every = settings.sample_every
                    if sample is not None and every and progress.step % every == 0:
                        self.denoiser.eval()
                        try:
                            sample(progress.step)
                        except Exception as error:  # whatever it is, training is worth more
                            self._say(f"step {progress.step}: no samples could be made: {error}")
                        self.denoiser.train()
                self._check_trained()
            except Diverged as error:
                reason, trouble = "diverged", str(error)
            self.denoiser.eval()
            place: Path | None = self.output
            if reason == "diverged":
                with torch.no_grad():
                    torch._foreach_copy_(list(self.trained.values()), good)
                try:
                    if self.accelerator.is_main_process:
                        save_adapter(self._adapted, self.output)
                except OSError as error:
                    self._say(f"the adapter could not be saved in {self.output}: {error}")
                    place = self._rescue()
            elif saved != progress.step and not self._save():
                reason, place = "unsaved", self._rescue()
        return Outcome(
            reason,
            good_step if reason == "diverged" else progress.step,
            progress.loss,
            progress.seconds / max(progress.step, 1),
            peak_memory(self.accelerator.device),
            place,
            trouble,
            number,
            self._orthogonality_error(),
        )

    def _gradients(self, step: int) -> float:
        """Accumulate the gradients of one step; return its loss, averaged over processes."""
        total = 0.0
        parts = self.settings.gradient_accumulation
        for micro in range(parts):
            with self.accelerator.accumulate(self.denoiser), self._deferring(micro < parts - 1):
                loss = self.loss(step, micro)
                self.accelerator.backward(loss)
                gathered = self.accelerator.gather(loss.detach().reshape(1))
                total += float(gathered.mean()) / self.settings.gradient_accumulation
        return total

    def _deferring(self, enabled: bool) -> AbstractContextManager[None]:
        """Contract the gradients of merged weights once per step, where there are any."""
        return nullcontext() if self.bank is None else self.bank.accumulate(enabled)

    def _step(self, step: int) -> None:
        trained = list(self.trained.values())
        if self.settings.max_grad_norm:
            norm = self.accelerator.clip_grad_norm_(trained, self.settings.max_grad_norm)
        else:
            norm = get_total_norm([v.grad for v in trained if v.grad is not None])
        # With a scaler, overflow is part of the method: it skips the step and scales less.
        if self.accelerator.scaler is None and not bool(torch.isfinite(norm)):
            raise Diverged(f"step {step + 1}: the gradients are no longer finite")
        factor = rate_factor(step, self.settings)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, step: int, micro: int = 0) -> Tensor:
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

    def _stopped(self, stop: StopRequest) -> int:
        """The signal by which any process was asked to stop, or 0: all must leave together."""
        number = stop.signal or 0
        if self.accelerator.num_processes == 1:
            return number
        flag = torch.tensor([number], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).amax())

    def _check_trained(self) -> None:
        """Refuse to save what is no adapter any more."""
        step = self.progress.step
        if not all(bool(torch.isfinite(values).all()) for values in self.trained.values()):
            raise Diverged(f"step {step}: the parameters are no longer finite")
        error = self._orthogonality_error()
        if error is not None and not error <= ORTHOGONALITY_LIMIT:
            raise Diverged(
                f"step {step}: the rotations are no longer orthogonal, max|X^T X - I| is "
                f"{error:.2g} and may be {ORTHOGONALITY_LIMIT:.0e}"
            )

    def _orthogonality_error(self) -> float | None:
        if self.settings.parametrization != "stiefel" or self.settings.rotation == "none":
            return None
        return orthogonality_error(self.pipe.unet)

    def _save(self) -> bool:
        """Save a checkpoint and, beside it, its adapter; whether the checkpoint was saved.

        A disk that is full now may not be at the next checkpoint, so training goes on.
        """
        step = self.progress.step
        try:
            checkpoint = save_checkpoint(
                self.output / CHECKPOINTS,
                self._adapted,
                self.optimizer,
                step=step,
                stateful=self._stateful,
                extra={"progress": self.progress.state_dict()},
                keep=self.settings.keep_checkpoints,
            )
        except OSError as error:
            self._say(f"step {step}: no checkpoint could be saved, the earlier ones stay: {error}")
            return False
        if self.accelerator.is_main_process:
            try:
                save_adapter(self._adapted, self.output)
            except OSError as error:
                self._say(f"step {step}: the adapter is in {checkpoint} alone: {error}")
        return True

    def _rescue(self) -> Path | None:
        """Save the adapter where there is room, if there is any."""
        if not self.accelerator.is_main_process:
            return None
        try:
            folder = Path(tempfile.mkdtemp(prefix="spectral-adapters-"))
            save_adapter(self._adapted, folder)
        except OSError as error:
            self._say(f"nor could the adapter be saved in {tempfile.gettempdir()}: {error}")
            return None
        return folder

    def _say(self, text: str) -> None:
        """Tell the user, beside the progress bar."""
        from tqdm.auto import tqdm

        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)


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
