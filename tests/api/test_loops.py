"""Kinds of loops, and what is told of each without a word from it: the rows of docs/loops.md.

python -P tests/api/test_loops.py docs/loops.md
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "cases"))

import pytest
import torch
from loop_cases import CHANNELS, LOOPS, TOKENS, WAYS, Dit, compiled, run

from svg2_compile.clock import current_clock

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loops.md"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
@pytest.mark.usefixtures("no_grad_and_a_fresh_start")
def test_a_loop_is_told(loop, way):
    seen = run(loop, way)
    assert seen.calls == loop.expected, seen.calls
    assert bool(seen.guesses) is loop.is_guess, seen.guesses


def page() -> str:
    """Return docs/loops.md."""
    rows = "\n".join(
        f"| {loop.name} | {loop.told} | {'yes' if loop.is_guess else ''} | {loop.advice} |" for loop in LOOPS
    )
    return f"""# Loops

Which step, which branch, which generation: what is told of a loop that announces nothing. Each row is a test in
`tests/api/test_loops.py`, with the whole model compiled, its blocks one by one, or its blocks run by a function; the
tests write this page:

    python -P tests/api/test_loops.py docs/loops.md

`svg2_compile.report(model)` says for each model how its steps, branches and total were told, and what was a guess.

| loop | told | a guess, in the report | what to call where that is not enough |
|---|---|---|---|
{rows}

## What cannot be told apart without a word

- A generation of one step after another at the same noise level looks like a CFG branch more. It gets centroids of its
  own; after three such calls none are kept.
- A generation that begins below the level at which the last one was left, with prompts made anew for each call, looks
  like its next step. Keep the prompts' tensors, use a scheduler of diffusers, or announce.
- Requests that take turns within one thread look like one loop. Announce them, each branch with a name of its own:

```python
with svg2_compile.denoise_step(step, total, stream=f"{{request}} cond"):
    model(latents, timestep, prompt)
```

- Without a noise level, a pipeline or a scheduler, each call is a step, and nothing begins anew.
"""


@pytest.mark.usefixtures("no_grad_and_a_fresh_start")
@pytest.mark.parametrize("way", WAYS[:2])
def test_models_called_from_here_and_there_go_on(way):
    models, text = [compiled(way) for _ in range(2)], torch.randn(1, 1, CHANNELS)

    def forward(model: Dit, *args: object) -> None:
        model(*args)

    def through_another(model: Dit, *args: object) -> None:
        forward(model, *args)

    told: dict[int, list[int]] = {0: [], 1: []}
    for number, level in enumerate((900.0, 700.0, 500.0, 300.0, 100.0)):
        x = torch.randn(1, TOKENS, CHANNELS)
        for place, model in enumerate(models):
            (forward if (number + place) % 3 else through_another)(model, x, torch.tensor([level]), text)
            now = current_clock().now
            assert now is not None
            told[place].append(now.step)
    assert told == {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3, 4]}


@pytest.mark.usefixtures("no_grad_and_a_fresh_start")
def test_arguments_of_the_function_that_holds_the_loop_are_no_noise_level():
    told: list[int] = []

    def generate(model: Dit, tokens: int, steps: int) -> None:
        text = torch.randn(1, 1, CHANNELS)
        for step in range(steps):
            model(torch.randn(1, tokens, CHANNELS), torch.tensor([900.0 - 100 * step]), text)
            now = current_clock().now
            assert now is not None
            told.append(now.step)

    model = compiled("whole")
    for tokens, steps in ((96, 2), (96, 3), (128, 2), (128, 4)):
        generate(model, tokens, steps)
    assert told == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 3]


def test_the_page_says_what_the_loops_show():
    assert PAGE.read_text(encoding="utf-8") == page(), f"run python -P tests/api/test_loops.py {PAGE}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
