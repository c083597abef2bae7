"""Compile every Triton kernel ahead of time, without a GPU, and report what it takes of one.

``python -P benchmarks/kernels/kernel_resources.py --arch 80 90`` prints a table; ``--json PATH`` also writes it as
JSON, and ``--write PATH`` replaces the table between the markers of a Markdown file. Needs triton alone, no device.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from marked_table import write_between

from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.ahead_of_time import AotVariant, kernel_modules, variants_of
from svg2_compile.kernels.tuning import AttentionTiles, attention_candidates

MAX_CANDIDATES = 4
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Shared memory that one program may use, in bytes, where it is less than what the larger chips have.
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TOOLS = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes."""

    module: str
    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    """Local memory: where registers spill to, and where functions that are called find arguments."""
    spilled_bytes: int
    """The same if the kernel loads any of it again, else 0."""
    shared_bytes: int
    shared_limit_bytes: int
    serialized: bool
    """Whether the asynchronous matrix instructions of Hopper wait for each other one by one."""
    overwritten_operands: int
    """Matrix instructions of Hopper with an operand in registers that are overwritten while it may still read them."""
    overlapped_loops: int
    """Loops in which the exponentials of a tile stand between the issue of a product and the wait for it, unspilled."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=ARCHITECTURES)
    parser.add_argument("--modules", nargs="+", help="such as work_list_triton; default: every module with kernels")
    parser.add_argument("--candidates", action="store_true", help="what autotuning would time, and not what is in use")
    parser.add_argument("--match", default="", help="only kernels whose name contains this regular expression")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    rows = [
        measure(module, variant, arch)
        for module, arch, variant in chosen_variants(args.modules, args.arch, args.match, args.candidates)
    ]
    table = markdown(rows)
    print(table)
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}))
    if args.write:
        write_between(args.write, "kernel resources", table)


def chosen_variants(
    modules: list[str] | None, archs: list[int], match: str, candidates: bool = False
) -> Iterator[tuple[str, int, AotVariant]]:
    """Yield module, architecture and kernel of all that are asked for."""
    for module in modules or kernel_modules():
        for arch in archs:
            for variant in (candidates_of if candidates else variants_of)(module, arch):
                if re.search(match, variant.name):
                    yield module, arch, variant


def candidates_of(name: str, arch: int) -> list[AotVariant]:
    """Return the kernels of a module with the tiles that autotuning would time besides those in use."""
    module = importlib.import_module(f"svg2_compile.kernels.{name}")
    if not hasattr(module, "attention_tiles"):
        return []
    in_use, lookup = module.aot_variants(arch), module.attention_tiles
    found = []
    try:
        for place in range(1, MAX_CANDIDATES):
            module.attention_tiles = partial(candidate_at, place)
            variants = [variant for variant in module.aot_variants(arch) if variant not in in_use]
            found += [replace(variant, name=f"{variant.name}, candidate {place}") for variant in variants]
    finally:
        module.attention_tiles = lookup
    return found


def candidate_at(place: int, *question: Any, **more: Any) -> AttentionTiles:
    """Return one of the candidates, or the tiles in use where there are not so many."""
    candidates = attention_candidates(*question, **more)
    return candidates[place if place < len(candidates) else 0]


def measure(module: str, variant: AotVariant, arch: int) -> Resources:
    """Compile one kernel and read its resources from the machine code."""
    source = GluonASTSource if variant.fn.is_gluon() else ASTSource
    kernel = triton.compile(
        source(**variant.source_arguments()),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.max_registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "-res-usage", cubin.name)
        stack_bytes = int(re.findall(r"STACK:(\d+)", usage)[-1])
        code = tool("nvdisasm", "-c", cubin.name) if arch == 90 or stack_bytes else ""
    return Resources(
        module=label_of(module),
        kernel=variant.name,
        arch=arch,
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        stack_bytes=stack_bytes,
        spilled_bytes=stack_bytes if is_stack_read(code) else 0,
        shared_bytes=kernel.metadata.shared,
        shared_limit_bytes=SHARED_LIMITS[arch],
        serialized=is_serialized(code),
        overwritten_operands=count_overwritten_operands(code),
        overlapped_loops=count_overlapped_loops(code),
    )


def label_of(module: str) -> str:
    """Return how the table names a module."""
    return module.removesuffix("_triton")


def is_stack_read(code: str) -> bool:
    """Return whether a kernel loads what it has stored on its stack, as it must whatever it spills.

    The assembler's own count is no help: it leaves out what is stored and loaded by functions that it does not inline.
    """
    return re.search(r"\bLDL\b", code) is not None


def is_serialized(code: str) -> bool:
    """Return whether nearly every matrix instruction of Hopper is followed by a wait of its own."""
    products = len(re.findall(r"\bHGMMA\b|HGMMA\.", code))
    return products > 0 and len(re.findall(r"WARPGROUP\.DEPBAR", code)) > products / 2


def count_overlapped_loops(machine_code: str) -> int:
    """Return how often most exponentials of a tile are computed while a product is in flight.

    Either two products were issued and one waited for, and the other is waited for after the exponentials; or the last
    one was issued after every wait, and is waited for after the branch back. Nothing may be spilled on the way: then
    the tensor cores work on the values of one tile while the exponentials of the next are computed.
    """
    kinds = {"HGMMA": "p", "MUFU.EX2": "e", "WARPGROUP.DEPBAR": "w", "STL": "s", "LDL": "s"}
    found = re.findall(r"\b(HGMMA|MUFU\.EX2|WARPGROUP\.DEPBAR|STL|LDL)\b", machine_code)
    code = "".join(kinds[name] for name in found)
    waited_later = [stretch for stretch in re.findall(r"w(p[pe]+)", code) if stretch.count("e") >= 40]
    return len(re.findall(r"p{12,}we{40,}w", code)) + len(waited_later)


def count_overwritten_operands(machine_code: str) -> int:
    """Return how many matrix instructions of Hopper have a register of their first operand overwritten before a wait.

    They read it while they run. Destinations of later matrix instructions, which run after them, do not count.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in machine_code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    return sum(
        is_overwritten(instructions, labels, place, range(int(product[1]), int(product[1]) + 4))
        for place, text in enumerate(instructions)
        if (product := re.match(r"HGMMA\S* R\d+, R(\d+),", text))
    )


def is_overwritten(instructions: list[str], labels: dict[str, int], start: int, operand: range) -> bool:
    """Return whether a path from ``start`` to a wait writes to one of the registers."""
    places: list[int] = [start + 1]
    seen: set[int] = set()
    while places:
        place = places.pop()
        if place in seen or place >= len(instructions) or "WARPGROUP.DEPBAR" in instructions[place]:
            continue
        seen.add(place)
        text = re.sub(r"^@!?U?P\w+\s+", "", instructions[place])
        if written_registers(text) & set(operand):
            return True
        branch = re.match(r"BRA\S* (!?U?P\w+, )?.*?(\.L_x_\d+)", text)
        if branch:
            places.append(labels[branch[2]])
        is_certain = text == instructions[place] and (branch is None or branch[1] is None)
        if not (is_certain and text.startswith(("BRA", "EXIT"))):
            places.append(place + 1)
    return False


def written_registers(text: str) -> set[int]:
    """Return the general registers that an instruction, without its predicate, writes to."""
    found = re.match(r"(\S+)\s+R(\d+)(\.64)?\b", text)
    if found is None or re.match(r"HGMMA|ST|RED|LDGSTS|UTM|SYNCS", found[1]):
        return set()
    wide = 4 if ".128" in found[1] or found[1].startswith("LDSM") else 2
    count = wide if re.search(r"\.128|\.64|WIDE|LDSM", found[1]) or found[3] else 1
    return set(range(int(found[2]), int(found[2]) + count))


def tool(name: str, *arguments: str) -> str:
    """Return what one of the CUDA tools in Triton's package prints."""
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def markdown(rows: list[Resources]) -> str:
    """Return the rows as a table, one line per kernel and one column per architecture."""
    archs = sorted({row.arch for row in rows})
    lines = [
        f"Triton {triton.__version__}. Registers per thread / shared memory in KiB / spilled bytes.",
        "",
        "| kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "| --- |" + " --- |" * len(archs),
    ]
    by_kernel: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        cell = f"{row.registers} / {row.shared_bytes / 1024:.0f} / {row.spilled_bytes}"
        by_kernel.setdefault((row.module, row.kernel), {})[row.arch] = cell + (" serialized" if row.serialized else "")
    for (module, kernel), cells in by_kernel.items():
        lines.append(f"| {module}: {kernel} | " + " | ".join(cells.get(arch, "") for arch in archs) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
