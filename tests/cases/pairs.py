"""Parameters whose every two values meet in a case: for tests of kernels, whose whole product takes minutes.

Where there is a GPU, tests run the whole product.
"""

import itertools

import pytest
from triton_interpreter import DEVICE


def every_two(**axes):
    """Return a mark that gives a test some combinations of ``axes``, such that any two values of two axes meet."""
    cases = list(itertools.product(*axes.values())) if DEVICE == "cuda" else covering(list(axes.values()))
    return pytest.mark.parametrize(tuple(axes), cases)


def covering(axes):
    """Return combinations that cover all pairs; each is the one that covers the most of those left."""
    combinations = list(itertools.product(*axes))
    left = {pair for each in combinations for pair in pairs_of(each)}
    chosen = []
    while left:
        best = max(combinations, key=lambda each: len(left & pairs_of(each)))
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


def pairs_of(combination):
    """Return every two values of a combination, with the places of their axes."""
    return set(itertools.combinations(enumerate(map(str, combination)), 2))
