"""Images with captions: from a folder, or of a built-in emoji style."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectral_adapters.personalize import emoji
from spectral_adapters.personalize.settings import UsageError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
METADATA = "metadata.jsonl"
#: Files that are beside images and are no images.
CAPTION_SUFFIXES = (".csv", ".jsonl", ".txt")


@dataclass(frozen=True)
class Pictures:
    """Captioned images.

    Attributes:
        names: a short label of each image.
        captions: what a text-to-image model is asked for.
        images: float32 ``[N, 3, H, W]`` in ``[0, 1]``.
        digest: of a folder's files and captions; tells whether they changed.
    """

    names: tuple[str, ...]
    captions: tuple[str, ...]
    images: Tensor
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.names)


def load_folder(
    folder: str | Path,
    size: tuple[int, int],
    *,
    caption: str | None = None,
    otherwise: str | None = None,
) -> Pictures:
    """Read a folder of captioned images.

    Captions come from ``caption``, else from ``metadata.jsonl`` (one JSON object per line with
    ``file_name`` and ``text``, the convention of Hugging Face's image folders; it then also says
    which images count), else from a text file beside each image, ``dog.txt`` for ``dog.png``.
    Files that are left out are told of on standard error.

    Args:
        folder: where the images are.
        size: height and width; images are scaled to cover it and cropped at the centre.
        caption: one caption for all images.
        otherwise: caption of the images that have none of their own.

    Raises:
        UsageError: naming the folder, or the file and line.
    """
    captions = _captions(Path(folder), caption, otherwise)
    images = torch.stack([_read_image(path, size) for path in captions])
    names = tuple(path.stem for path in captions)
    return Pictures(names, tuple(captions.values()), images, _digest(captions))


def openmoji(
    names: Iterable[str] | None, size: tuple[int, int], *, style: str = emoji.TARGET_STYLE
) -> Pictures:
    """Return OpenMoji drawings by name, character or code points; the demo's five if None.

    Raises:
        UsageError: an unknown name, a size that is not square, or a missing package.
    """
    if names is None:
        return emoji_pictures(emoji.split("train"), size, style)
    wanted = tuple(names)
    if not wanted:
        raise UsageError("--names must hold at least one emoji; got none")
    try:
        found = emoji.get(wanted)
    except ValueError as error:
        raise UsageError(f"--names: {error}") from error
    return emoji_pictures(found, size, style)


def held_out(split: str, count: int, size: tuple[int, int], training: Pictures) -> Pictures:
    """Return ``count`` evenly spaced drawings of a fixed split, none of them among ``training``."""
    known = set(training.names)
    items = [item for item in emoji.split(split) if item.name not in known]
    count = min(count, len(items))
    chosen = [items[index * len(items) // count] for index in range(count)]
    return emoji_pictures(chosen, size, emoji.TARGET_STYLE)


def emoji_pictures(items: Iterable[emoji.Emoji], size: tuple[int, int], style: str) -> Pictures:
    """Return the drawings of catalogue entries, captioned in their style."""
    if size[0] != size[1]:
        raise UsageError(f"emoji are square; the pipeline draws {size[0]}x{size[1]}")
    chosen = tuple(items)
    names = tuple(item.name for item in chosen)
    images = emoji.load_images(chosen, style, size[0])
    return Pictures(names, tuple(emoji.caption(name, style) for name in names), images)


def _captions(root: Path, caption: str | None, otherwise: str | None) -> dict[Path, str]:
    """The captions of a folder's images by file, as :func:`load_folder` finds them."""
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise UsageError(f"image folder {root} {state}")
    files = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if caption is None and (root / METADATA).is_file():
        captions = _read_metadata(root)
    elif caption is None:
        captions = {path: _read_sidecar(path, otherwise) for path in images}
    else:
        captions = dict.fromkeys(images, caption)
    ignored = Counter(
        f"not in {METADATA}" if path in images else path.suffix.lower() or path.name
        for path in files
        if path.is_file() and path.suffix not in CAPTION_SUFFIXES and path not in captions
    )
    listed = ", ".join(f"{count} {what}" for what, count in sorted(ignored.items()))
    told = f"; files ignored: {listed}" if ignored else ""
    if not captions:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise UsageError(f"image folder {root} holds no images ({kinds}){told}")
    if told:
        print(f"{root}: {len(captions)} images{told}", file=sys.stderr)
    return captions


def _digest(captions: Mapping[Path, str]) -> str:
    digest = hashlib.sha256()
    for path, caption in captions.items():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(json.dumps([path.name, caption, content]).encode())
    return digest.hexdigest()


def _read_metadata(root: Path) -> dict[Path, str]:
    """Map image paths to captions, in the order of the file."""
    captions: dict[Path, str] = {}
    text = _read_text(root / METADATA)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        place = f"{root / METADATA}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{place}: not JSON ({error})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise UsageError(f'{place}: must be an object with "file_name" and "text"')
        if not isinstance(entry.get("text"), str) or not entry["text"].strip():
            raise UsageError(f'{place}: no caption, "text" is missing for {entry["file_name"]}')
        captions[root / entry["file_name"]] = entry["text"].strip()
    return captions


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without the mark that some editors put first."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} must be UTF-8; {error}") from error


def _read_sidecar(image: Path, otherwise: str | None) -> str:
    path = image.with_suffix(".txt")
    text = _read_text(path).strip() if path.is_file() else ""
    if not text and otherwise is not None:
        return otherwise
    if not text:
        raise UsageError(
            f"no caption for {image}: add it to {image.parent / METADATA} or write it into "
            f"{path.name}, or give one --caption for all images"
        )
    return text


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """Return float32 ``[3, height, width]`` in ``[0, 1]``, transparency over white."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):
                # 16 bits of grey, which Pillow would cut at 255 instead of scaling.
                grey = np.asarray(picture).astype(np.int64) >> 8
                picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            picture = picture.convert("RGBA")
    except FileNotFoundError as error:
        raise UsageError(f"image {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UsageError(f"image {path} cannot be read: {error}") from error
    paper = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(paper, picture).convert("RGB")
    height, width = size
    fitted = ImageOps.fit(flat, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float().div_(255.0)
