"""A long life: changing models, sizes, threads, branches and interruptions, with memory flat.

``SVG2_SOAK=10000`` runs as many forwards; a few hundred are part of every run.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import weakref

import pytest
import torch
from loop_cases import CHANNELS, OPTIONS, Dit, through_blocks

import svg2_compile
from svg2_compile.clock import current_clock
from svg2_compile.state import store

FORWARDS = int(os.environ.get("SVG2_SOAK", "200"))
SIZES = (96, 128)
OWNERS: weakref.WeakKeyDictionary[Dit, dict[tuple[int, str], torch.Tensor]] = weakref.WeakKeyDictionary()
"""The prompt of each generation and branch of a model; another model keeps its own centroids within it."""


def compiled(way: str) -> Dit:
    model = Dit().eval()
    if way == "whole":
        model.compile(backend="svg2", options=OPTIONS, dynamic=False)
    else:
        for block in model.blocks:
            block.compile(backend="svg2", options=OPTIONS, dynamic=False)
    return model


def generate(model: Dit, way: str, draw: random.Random) -> int:
    """Run one video with a guided loop, perhaps cut short, and check what was told; return the forwards."""
    tokens, steps, branches = draw.choice(SIZES), draw.randint(2, 6), draw.randint(1, 3)
    prompts = torch.randn(branches, 1, 1, CHANNELS).unbind()
    cut, count = draw.choice((steps, draw.randint(1, steps))), 0
    for step in range(cut):
        x, level = torch.randn(1, tokens, CHANNELS), torch.tensor([1000.0 - 1000 * step / steps])
        for text in prompts:
            if way == "function":
                through_blocks(model, x, level, text)
            else:
                model(x, level, text)
            count += 1
            now = current_clock().now
            assert now is not None
            assert now.step == step
            prompt_of = OWNERS.setdefault(model, {}).setdefault((now.run, now.stream), text)
            assert prompt_of is text, "centroids of another prompt"
    return count


@pytest.fixture
def nothing_of_other_tests():
    """Neither count nor look through what they left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    # as it was: what imports made is not looked through either
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("no_grad_and_a_fresh_start", "nothing_of_other_tests")
def test_memory_stays_flat_and_no_branch_is_wrong():
    draw = random.Random(0)
    models = {way: compiled(way) for way in ("whole", "blocks", "function")}
    done, states, objects = 0, [], []
    while done < FORWARDS:
        way = draw.choice(sorted(models))
        if draw.random() < 0.02:
            models[way] = compiled(way)  # as a pipeline that is loaded again
        if draw.random() < 0.2:
            failed: list[BaseException] = []

            def work(way: str = way) -> None:
                with torch.no_grad():
                    try:
                        generate(models[way], way, random.Random(1))
                    except BaseException as error:
                        failed.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert not failed, failed
        done += generate(models[way], way, draw)
        gc.collect()
        states.append(sum(svg2_compile.report(model).state_mib for model in models.values()))
        objects.append(len(gc.get_objects()))
    half = len(states) // 2
    assert max(states[half:]) <= 1.5 * max(states[:half])
    assert len(store.owners()) <= 16
    assert max(objects[half:]) <= 1.3 * max(objects[:half])
