"""The report of a run: ``report.json``, ``report.md`` and picture sheets."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spectral_adapters.personalize.evaluation import Score, interval

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 128
MARGIN = 6
HEADER = 30
LABEL = 130
FONT_SIZE = 17
SHEET_BYTES = 300_000
PAPER, INK = "#ffffff", "#202020"


@dataclass
class Report:
    """Figures of one run, as measured.

    Attributes:
        method: one line.
        trained_parameters, base_parameters: numbers of the denoiser.
        adapter_bytes: size of the adapter's weights file.
        images, steps, batch_size: what was trained on, for how long.
        loss: average over the last steps.
        seconds_per_step: training alone.
        setup_seconds: by stage: "load", "encode", "adapter".
        total_seconds: from start to report.
        peak_memory_bytes: up to the end of training.
        orthogonality_error: max|X^T X - I| of rotations that are trained as such, else None.
        held_out: what the drawings are compared on, such as "100 names of the test split".
        scores: by column title, the adapted one last.
        references: by title, what the numbers can be compared with.
    """

    method: str
    trained_parameters: int
    base_parameters: int
    adapter_bytes: int
    images: int
    steps: int
    batch_size: int
    loss: float | None
    seconds_per_step: float
    setup_seconds: dict[str, float]
    total_seconds: float
    peak_memory_bytes: int
    orthogonality_error: float | None = None
    held_out: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    references: Mapping[str, Score] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return what ``report.json`` holds."""
        plain = {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("scores", "references")
        }
        for name in ("scores", "references"):
            plain[name] = {
                title: {
                    "similarity": round(score.mean, 4),
                    "margin_95": round(score.margin, 4),
                    "own_truth_nearest": round(score.own_truth, 4),
                }
                for title, score in getattr(self, name).items()
            }
        plain["gains"] = {
            title: {"similarity": round(gain, 4), "margin_95": round(margin, 4)}
            for title, (gain, margin) in self.gains().items()
        }
        return plain

    def gains(self) -> dict[str, tuple[float, float]]:
        """Return mean and margin of the adapted drawings' gain over each other column, by name."""
        if len(self.scores) < 2:
            return {}
        *before, (_, after) = self.scores.items()
        differences = {title: after.values - score.values for title, score in before}
        return {title: (float(d.mean()), interval(d)) for title, d in differences.items()}

    def as_markdown(self) -> str:
        """Return the tables of ``report.md``."""
        share = self.trained_parameters / self.base_parameters
        setup = sum(self.setup_seconds.values())
        stages = ", ".join(f"{name} {value:.1f}" for name, value in self.setup_seconds.items())
        rows = [
            ("adapter", self.method),
            (
                "trained parameters",
                f"{self.trained_parameters:,} of {self.base_parameters:,} ({share:.2%})",
            ),
            ("adapter file", f"{self.adapter_bytes / 1000:,.1f} kB"),
            (
                "training",
                f"{self.images} images, {self.steps} steps of {self.batch_size}",
            ),
            ("seconds per step", f"{self.seconds_per_step:.3f}"),
            ("set-up", f"{setup:.1f} s ({stages})"),
            ("peak memory", f"{self.peak_memory_bytes / 1e9:.2f} GB"),
            ("total time", f"{self.total_seconds:.0f} s"),
        ]
        text = _table(("", ""), rows)
        if self.scores:
            scored = [
                (title, f"{s.mean:.3f} ± {s.margin:.3f}", f"{s.own_truth:.0%}")
                for title, s in [*self.scores.items(), *self.references.items()]
            ]
            head = (self.held_out or "", "similarity to the true drawing", "own truth is nearest")
            text += "\n" + _table(head, scored)
            *_, last = self.scores
            for title, (gain, margin) in self.gains().items():
                text += f"\nGain of {last} over {title}: {gain:+.3f} ± {margin:.3f}.\n"
        return text

    def save(self, folder: Path) -> None:
        """Write ``report.json`` and ``report.md``."""
        record = json.dumps(self.as_dict(), indent=2) + "\n"
        (folder / "report.json").write_text(record, encoding="utf-8")
        (folder / "report.md").write_text(self.as_markdown(), encoding="utf-8")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def sheet(names: Sequence[str], columns: Mapping[str, Tensor], *, blocks: int = 2) -> Image:
    """Draw a labelled table of pictures: a row per name, a column per title.

    Args:
        names: row labels.
        columns: by title, images ``[len(names), 3, H, W]`` in ``[0, 1]``, of any size.
        blocks: rows are laid out side by side in this many blocks.
    """
    from PIL import Image, ImageDraw, ImageFont

    blocks = min(blocks, len(names))
    rows = -(-len(names) // blocks)
    pitch = CELL + MARGIN
    block = LABEL + len(columns) * pitch + MARGIN
    page = Image.new("RGB", (blocks * block, HEADER + rows * pitch + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(FONT_SIZE)
    for index, name in enumerate(names):
        number, row = divmod(index, rows)
        left, top = number * block, HEADER + row * pitch
        label = "\n".join(textwrap.wrap(name, 13)[:5])
        place = (left + LABEL - MARGIN, top + CELL // 2)
        pen.multiline_text(place, label, INK, font, anchor="rm", align="right")
        for position, (title, images) in enumerate(columns.items()):
            x = left + LABEL + position * pitch
            if row == 0:
                pen.text((x + CELL // 2, HEADER // 2), title, INK, font, anchor="mm")
            page.paste(picture(images[index]), (x, top))
    return page


def picture(image: Tensor) -> Image:
    """Return an image ``[3, H, W]`` in ``[0, 1]`` at the size of a cell."""
    from PIL import Image, ImageOps

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return ImageOps.pad(
        Image.fromarray(pixels), (CELL, CELL), Image.Resampling.BICUBIC, color=PAPER
    )


def save_png(page: Image, path: Path) -> None:
    """Write a PNG; with fewer colours if it were larger than :data:`SHEET_BYTES`."""
    from PIL import Image

    page.save(path, optimize=True)
    for colours in (256, 128, 64, 32):
        if path.stat().st_size <= SHEET_BYTES:
            return
        page.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
