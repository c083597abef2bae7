"""Plant plausible bugs, one at a time, in a copy of the sources, and see that the tests notice.

    python tests/mutation/run_mutations.py [--rooms kernels passes] [--only WORDS ...] [--new] [--page FILE]

Prints each mutant and the first test that failed; exits with 1 if any survives. Not collected by pytest. The page keeps
the verdicts of what is not tried this time; ``--new`` tries what it has no verdict of. It is written after each one, so
a run that is broken off loses nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutant import Mutant, all_mutants

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "passes", "svg2_compile")
TIMEOUT_SECONDS = 600
SURVIVED = "**survived**"
NOT_TRIED = "not tried yet"
PAGE = ROOT / "docs" / "mutations.md"
ROW = re.compile(r"^\| (\S+) \| (.+) \| (.+) \|$")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the tests said about one mutant."""

    mutant: Mutant
    verdict: str
    """The first failing test, or why there is none."""

    killed: bool


@contextmanager
def copy_of_the_sources() -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a folder holding the tests and, under ``site``, the package; and an environment that imports from it."""
    with tempfile.TemporaryDirectory(prefix="svg2_mutant_") as name:
        folder = Path(name)
        package = folder / "site" / "svg2_compile"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "svg2_compile", package, ignore=ignore)
        for room in ("passes", "kernels"):
            shutil.copytree(ROOT / room, package / room, ignore=ignore)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        environment = os.environ | {
            "PYTHONPATH": str(folder / "site"),  # found before the finder of an editable install
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        yield folder, environment


def path_in(folder: Path, file: str) -> Path:
    """Return where the copy keeps ``file``."""
    room, rest = file.split("/", 1)
    package = folder / "site" / "svg2_compile"
    return package / rest if room == "svg2_compile" else package / room / rest


def check_imports(folder: Path, environment: dict[str, str]) -> None:
    """Raise unless Python imports the copy."""
    code = "import svg2_compile.passes, svg2_compile.kernels as k; print(svg2_compile.__file__); print(k.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)
    if not done.stdout or any(not line.startswith(str(folder)) for line in done.stdout.split()):
        raise RuntimeError(f"expected to import from {folder}, got {done.stdout or done.stderr}")


def pytest(
    folder: Path, environment: dict[str, str], tests: tuple[str, ...], *options: str
) -> subprocess.CompletedProcess[str]:
    """Run ``tests`` of the copy; the examples that Hypothesis draws are the same each time."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile=ci"]
    command += [*options, *tests]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


def try_mutant(mutant: Mutant, left_out: list[str]) -> Outcome:
    """Plant one bug and run its tests up to the first failure."""
    missing = [test for test in mutant.tests if not (ROOT / test).exists()]
    if missing:
        return Outcome(mutant, f"no such file: {', '.join(missing)}", killed=False)
    with copy_of_the_sources() as (folder, environment):
        path = path_in(folder, mutant.file)
        source = path.read_text(encoding="utf-8")
        if (count := source.count(mutant.original)) != 1:
            return Outcome(mutant, f"stale: the original occurs {count} times in {mutant.file}", killed=False)
        path.write_text(source.replace(mutant.original, mutant.replacement), encoding="utf-8")
        check_imports(folder, environment)
        try:
            done = pytest(folder, environment, mutant.tests, "-x", *deselect(left_out))
        except subprocess.TimeoutExpired:
            return Outcome(mutant, f"no end within {TIMEOUT_SECONDS} s; try it again", killed=False)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?\.py)(?:::(\w+))?", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return Outcome(mutant, f"tests/{failed[1]}: {failed[2]}", killed=True)
    if done.returncode < 0:
        return Outcome(mutant, f"the interpreter dies of signal {-done.returncode}", killed=True)
    if done.returncode == 0:
        return Outcome(mutant, SURVIVED, killed=False)
    said = " ".join((done.stdout + done.stderr).split())
    return Outcome(mutant, f"the tests did not run: {said[-300:]}", killed=False)


def deselect(left_out: list[str]) -> list[str]:
    """Return the options that leave tests out."""
    return [f"--deselect={test}" for test in left_out]


def check_that_tests_pass(test: str, left_out: list[str]) -> None:
    """Raise unless the copy without a bug is green: a red test notices anything."""
    with copy_of_the_sources() as (folder, environment):
        check_imports(folder, environment)
        done = pytest(folder, environment, (test,), *deselect(left_out))
    if done.returncode != 0:
        raise RuntimeError(f"{test} fails without a mutant; mend it first:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def verdicts_of(page: Path) -> dict[tuple[str, str], str]:
    """Return the verdicts that a page has, by file and bug, less those on what was not tried."""
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    rows = [row for line in lines if (row := ROW.match(line)) is not None and row[3] != NOT_TRIED]
    return {(row[1], row[2]): row[3] for row in rows}


def table(verdicts: dict[tuple[str, str], str], left_out: list[str]) -> str:
    """Return the verdicts on all mutants as a markdown page."""
    rows = {key: verdicts.get(key, NOT_TRIED) for each in all_mutants() for key in [(each.file, each.bug)]}
    not_tried, survivors = (list(rows.values()).count(verdict) for verdict in (NOT_TRIED, SURVIVED))
    lines = [
        "# Mutations",
        "",
        f"{len(rows) - not_tried - survivors} of {len(rows)} planted bugs are noticed, {survivors} survive, "
        f"{not_tried} are not tried yet. Written by `tests/mutation/run_mutations.py`.",
        "",
        "| file | bug | first failing test |",
        "|---|---|---|",
    ]
    if left_out:
        lines.insert(3, f"Left out, for they fail without a mutant: {', '.join(f'`{each}`' for each in left_out)}.")
    lines += [f"| {file} | {bug} | {verdict} |" for (file, bug), verdict in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Try the chosen mutants; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS), help="rooms to plant bugs in")
    parser.add_argument("--only", nargs="+", default=[""], help="plant bugs whose description contains one of these")
    parser.add_argument("--new", action="store_true", help="plant bugs that the page has no verdict of")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants tried at a time")
    parser.add_argument("--deselect", nargs="+", default=[], help="tests to leave out, as pytest names them")
    parser.add_argument("--page", type=Path, default=PAGE, help="file that keeps the verdicts")
    options = parser.parse_args()
    verdicts = verdicts_of(options.page)
    chosen = [
        each
        for each in all_mutants()
        if each.room in options.rooms
        and any(words in each.bug for words in options.only)
        and not (options.new and (each.file, each.bug) in verdicts)
    ]
    existing = {test for each in chosen for test in each.tests if (ROOT / test).exists()}
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(functools.partial(check_that_tests_pass, left_out=options.deselect), sorted(existing)))
        for outcome in pool.map(functools.partial(try_mutant, left_out=options.deselect), chosen):
            mutant = outcome.mutant
            print(f"{mutant.bug}: {outcome.verdict}", flush=True)
            outcomes.append(outcome)
            verdicts[mutant.file, mutant.bug] = outcome.verdict
            options.page.write_text(table(verdicts, options.deselect), encoding="utf-8")
    print(f"{sum(each.killed for each in outcomes)} of {len(outcomes)} noticed, {time.perf_counter() - started:.0f} s")
    return 0 if all(outcome.killed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
