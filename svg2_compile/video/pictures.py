"""Videos, strips of frames, heat maps and curves as files or bytes; made by matplotlib and PyAV."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FRAMES_PER_SECOND = 12
GAIN = 5
"""Differences are shown this much larger."""

Table = Mapping[str, Sequence[float | None]]
"""Rows by name; ``None`` is left blank."""


def to_bytes(figure: Any, dpi: int = 110) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def to_uint8(pixels: Tensor) -> Tensor:
    """Return float pixels [F, 3, H, W] in [0, 1] as ``uint8`` [F, H, W, 3] on the CPU."""
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def write_video(target: Path | io.BytesIO, pixels: Tensor, fps: int = FRAMES_PER_SECOND) -> None:
    """Write float pixels [F, 3, H, W] as MP4, cut to even sizes as H.264 wants."""
    import imageio.v3 as iio

    height, width = (size // 2 * 2 for size in pixels.shape[2:])
    frames = to_uint8(pixels[:, :, :height, :width]).numpy()
    iio.imwrite(target, frames, plugin="pyav", extension=".mp4", codec="libx264", fps=fps)


def frame_strip(dense: Tensor, others: Mapping[str, Tensor], title: str = "", columns: int = 4) -> Any:
    """Return a figure: a row of frames of the dense video, and two for each other one: frames and difference."""
    from matplotlib.figure import Figure

    rows = {"dense": dense}
    for name, video in others.items():
        difference = f"{GAIN} × |difference|" if len(others) == 1 else f"{name}, {GAIN} × |difference|"
        rows |= {name: video, difference: GAIN * (video - dense).abs()}
    frames, _, height, width = dense.shape
    columns = min(columns, frames)
    chosen = [round(index * (frames - 1) / max(columns - 1, 1)) for index in range(columns)]
    each = 3.2 * min(1.0, width / height)
    figure = Figure(figsize=(each * columns, (each * height / width + 0.28) * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, video) in zip(axes, rows.items()):
        for axis, frame in zip(row, chosen):
            axis.imshow(video[frame].clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(shortened(name if frames == 1 else f"{name}, frame {frame}", 46), fontsize=9)
    if title:
        figure.suptitle(title)
    return figure


def shortened(name: str, length: int) -> str:
    """Return a name that fits: its beginning and its end."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length - length // 2 - 1) :]}"


def heat_map(table: Table, label: str, x_label: str, lowest: float = 0.0, width: float | None = None) -> Any:
    """Return a figure of shares in per cent, with the numbers in the cells where there is room.

    Args:
        table: shares in [0, 1].
        label: what is shown.
        x_label: what the columns are.
        lowest: share at the dark end of the colours.
        width: of the figure in inches; by default as the columns need.
    """
    from matplotlib.figure import Figure

    columns = max(map(len, table.values()), default=1)
    size = (width or 1.5 + 0.6 * columns, 1.2 + (0.4 if len(table) <= 16 else 0.22) * len(table))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    values = [
        [float("nan") if each is None else 100 * each for each in [*row, *[None] * (columns - len(row))]]
        for row in table.values()
    ]
    image = axis.imshow(values, vmin=100 * lowest, vmax=100, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(table)), list(table), fontsize=9 if len(table) <= 16 else 7)
    axis.set_xlabel(x_label)
    if columns <= 16:
        axis.set_xticks(range(columns))
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                if value == value:
                    colour = "white" if value < 40 * lowest + 60 else "black"
                    axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, label=label)
    return figure
