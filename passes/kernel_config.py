"""The options that can only change the time."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from svg2_compile.kernels.why_not import ATTENTIONS
from svg2_compile.kernels.work_list import PIECES
from svg2_compile.passes.config import check_choice, check_integer
from svg2_compile.passes.errors import ConfigError

# From the smallest side of a matrix product to the largest that a program could hold.
BLOCKS = (16, 256)
MAX_WARPS = 16
MAX_STAGES = 8
TILES = ("block_m", "block_n", "num_warps", "num_stages")
"""The fields that say how a kernel is cut up, in the order in which the op takes them."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Which attention kernel runs on a GPU, and how it is cut up. No field changes a result by more than rounding."""

    attention: Literal["auto", "gluon", "descriptor", "pointer"] = "auto"
    """The attention kernel: ``auto`` takes the fastest that can run; one that is named and cannot run is an error."""

    block_m: int | None = None
    """Query rows of a tile, a power of two from 16 to 256; ``None`` takes the tuned value."""

    block_n: int | None = None
    """Keys of a tile, a power of two from 16 to 256, with descriptors 16, 64 or 128; ``None`` takes the tuned value."""

    num_warps: int | None = None
    """Warps of a program, a power of two from 1 to 16; ``None`` takes the tuned value."""

    num_stages: int | None = None
    """Stages of the software pipeline, from 1 to 8; ``None`` takes the tuned value."""

    autotune: bool = False
    """Time the few candidate tiles at the first call of every kind and keep the fastest, in the process."""

    self_check: bool = True
    """Compare each kernel with its reference before its first use in the process; a wrong one is replaced, loudly."""

    engine_folder: str | None = None
    """Where ``lowering="tensorrt"`` keeps its engines; ``None`` takes a folder beside Inductor's caches."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            ConfigError: naming the option, its range, and the value given.
        """
        check_choice("attention", self.attention, ("auto", *ATTENTIONS))
        _check_power_of_two("block_m", self.block_m, *BLOCKS)
        _check_power_of_two("block_n", self.block_n, *BLOCKS)
        _check_power_of_two("num_warps", self.num_warps, 1, MAX_WARPS)
        if self.num_stages is not None:
            check_integer("num_stages", self.num_stages, 1, MAX_STAGES, "None takes the tuned value")
        for name in ("autotune", "self_check"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.engine_folder is not None and not (isinstance(self.engine_folder, str) and self.engine_folder):
            raise ConfigError(f"engine_folder must be a path as text or None, got {self.engine_folder!r}")
        given = self.given_tiles
        if not given:
            return
        values = ", ".join(f"{name}={value}" for name, value in given.items())
        if self.attention == "auto":
            raise ConfigError(
                f'{values} must come with a named attention, got attention="auto"; tiles that suit one kernel may not '
                'fit another: add attention="pointer" or "descriptor"'
            )
        if self.attention == "gluon":
            raise ConfigError(
                f'{values} must be left out with attention="gluon", whose tiles are part of its code; '
                'use "pointer" or "descriptor" to choose tiles'
            )
        if self.attention == "descriptor" and self.block_n is not None and self.block_n not in PIECES:
            raise ConfigError(
                f'block_n must be one of {", ".join(map(str, PIECES))} with attention="descriptor", whose tiles are '
                f"pieces of one run of keys, got {self.block_n}"
            )
        if self.autotune:
            raise ConfigError(f"{values} must be left out with autotune=True, which chooses the tiles")

    @property
    def given_tiles(self) -> dict[str, int]:
        """The tile fields that are not left to the tuned values."""
        values = ((name, getattr(self, name)) for name in TILES)
        return {name: value for name, value in values if value is not None}


def _check_power_of_two(name: str, value: Any, low: int, high: int) -> None:
    """Raise ConfigError unless the option is None or a power of two in the range."""
    if value is None:
        return
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not (is_number and low <= value <= high and value & (value - 1) == 0):
        raise ConfigError(
            f"{name} must be a power of two in [{low}, {high}], got {value!r}; None takes the tuned value"
        )


FIELD_NAMES = tuple(field.name for field in fields(KernelConfig))
