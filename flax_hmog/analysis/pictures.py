"""Pictures inside a page: rows as sheets of small images, and figures of matplotlib in the colours of the page."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_hmog.analysis import style
from flax_hmog.analysis.inputs import as_images
from flax_hmog.model.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 32  # pixels on the longer side of a row's picture
MOST_BYTES = 1_200_000  # of a sheet, unless the least quality takes more
COLORS = {color.lower(): f"var(--c{index})" for index, color in enumerate(style.PALETTE)} | {
    style.text_color(index): f"var(--c{index})" for index in range(len(style.PALETTE))
}
COLORS |= dict.fromkeys((style.INK, "#000000"), "var(--ink)")
COLORS |= {style.MUTED: "var(--muted)", style.FAINT: "var(--line)", "#ffffff": "var(--page)"}


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Images of one size side by side in one file.

    Attributes:
        data: the file as a data URL.
        columns: images beside each other.
        rows: images below each other.
        ratio: height of an image over its width.
    """

    data: str
    columns: int
    rows: int
    ratio: float

    def place(self, number: int) -> tuple[int, int]:
        """Column and row of an image."""
        row, column = divmod(number, self.columns)
        return column, row


def as_bytes(rows: np.ndarray, image_shape: tuple[int, ...], largest: int) -> np.ndarray:
    """Rows (n, D) as pictures (n, h, w) or (n, h, w, 3) uint8 on one scale, at most so many pixels wide and high.

    Of larger ones every second or third pixel is taken, as it fits.
    """
    images = as_images(rows, image_shape)
    step = -(-max(images.shape[1:3]) // largest)
    images = images[:, ::step, ::step]
    low, high = np.nanmin(images), np.nanmax(images)
    scaled = 255 * (np.nan_to_num(images, nan=low) - low) / ((high - low) or 1.0)
    return scaled.round().astype(np.uint8)


def sheet(images: np.ndarray) -> Sheet:
    """Images (n, h, w) or (n, h, w, 3), uint8, in one file: PNG, or JPEG of a quality that keeps it small."""
    pillow = require("PIL.Image", "report")
    count, height, width = images.shape[:3]
    columns = int(np.ceil(np.sqrt(count * height / width)))
    rows = -(-count // columns)
    filled = np.zeros((columns * rows, *images.shape[1:]), np.uint8)
    filled[:count] = images
    grid = filled.reshape(rows, columns, *images.shape[1:]).swapaxes(1, 2)
    picture = pillow.fromarray(np.ascontiguousarray(grid.reshape(rows * height, columns * width, *images.shape[3:])))
    for kind, quality in (("png", 0), ("jpeg", 80), ("jpeg", 50), ("jpeg", 25)):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({"quality": quality} if quality else {"optimize": True}))
        if buffer.tell() <= MOST_BYTES:
            break
    return Sheet(_data_url(f"image/{kind}", buffer.getvalue()), columns, rows, height / width)


def diverging(rows: np.ndarray) -> np.ndarray:
    """Numbers of any shape as colours (..., 3) uint8, 0 in white."""
    maps: Any = require("matplotlib", "plots").colormaps
    limit = float(np.abs(rows).max()) or 1.0
    colors = maps[style.DIVERGING](0.5 + rows / (2 * limit))
    return np.asarray(255 * colors[..., :3]).round().astype(np.uint8)


def svg(figure: Figure, prefix: str) -> str:
    """A figure as SVG for a page: in the page's colours and fonts, its names unique by the prefix."""
    matplotlib = require("matplotlib", "report")
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    width, height = 96 * figure.get_size_inches()
    opening = f'<svg viewBox="0 0 {0.75 * width:.2f} {0.75 * height:.2f}" aria-hidden="true" focusable="false">'
    text = opening + text[text.index(">") + 1 :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    text = re.sub(r"'(DejaVu Sans|sans-serif)'[^;\"]*", "inherit", text)
    return re.sub(r"#[0-9a-f]{6}\b", lambda color: COLORS.get(color[0], color[0]), text)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
