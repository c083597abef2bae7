"""SVOO's profile and its two rules."""

import math

import pytest
import torch
from torch import Tensor

from svg2_compile.calibration.svoo import by_codes_rule, by_papers_rule, profile

SCALE = 0.5


def by_hand(q: Tensor, k: Tensor, visible: Tensor, context: Tensor | None, shown: Tensor | None) -> list[float]:
    """Return the profile in fp64, key by key; the masks are bool [B, N_k] and [B, M]."""
    batch, heads, tokens, _ = q.shape
    repeats = heads // k.shape[1]
    shares = torch.zeros(heads, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // repeats][visible[b]].double()
            around = torch.zeros(0, q.shape[3], dtype=torch.float64)
            if context is not None:
                around = context[b, h // repeats][shown[b]].double()
            for row in q[b, h].double():
                weights = (torch.cat((around, keys)) @ row * SCALE).exp()
                weights /= weights.sum()
                held, count = float(weights[: len(around)].sum()), 0
                for weight in weights[len(around) :].sort(descending=True).values.tolist():
                    if held >= 0.95:
                        break
                    held += weight
                    count += 1
                shares[h] += count / len(keys) / tokens / batch
    return shares.tolist()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("hides", [False, True])
def test_the_profile_is_the_smallest_share_of_keys_with_its_mass(groups, context, hides):
    generator = torch.Generator().manual_seed(context)
    q, k = (2 * torch.randn(2, n, 23, 8, generator=generator) for n in (4, groups))
    around = 2 * torch.randn(2, groups, context, 8, generator=generator) if context else None
    visible, shown = torch.ones(2, 23, dtype=torch.bool), torch.ones(2, max(1, context), dtype=torch.bool)
    if hides:
        visible[1, 5:9] = False
        shown[1, -1:] = context <= 1
    masks = (visible.view(2, 1, 1, -1), shown.view(2, 1, 1, -1) if context else None) if hides else (None, None)
    found = profile(q, k, masks[0], around, masks[1], SCALE)
    assert found.tolist() == pytest.approx(by_hand(q, k, visible, around, shown), abs=1e-6)


def test_fewer_rows_are_spread_over_the_queries():
    q = torch.zeros(1, 1, 100, 4)
    q[:, :, 50:, 0] = 100.0  # half of the queries look at one key
    k = torch.zeros(1, 1, 40, 4)
    k[:, :, 7, 0] = 1.0
    wide, narrow = math.ceil(0.95 * 40 - 1e-9) / 40, 1 / 40
    assert profile(q, k, None, None, None, 1.0, rows=10).item() == pytest.approx((wide + narrow) / 2)


def test_where_the_context_has_the_mass_no_video_key_is_needed():
    q, k = torch.ones(1, 1, 5, 4), torch.zeros(1, 1, 9, 4)
    assert profile(q, k, None, torch.full((1, 1, 1, 4), 10.0), None, 1.0).item() == 0


def test_the_papers_rule_caps_wide_heads_and_lifts_narrow_ones():
    floors, caps = by_papers_rule([[0.05, 0.1, 0.3, 1.0]])
    assert floors == [0.05, 0.1, 0.0, 0.0] and caps == [1.0, 1.0, 0.3, 1.0]
    floors, caps = by_papers_rule([[0.2, 0.04], [0.4, 0.06]])
    spread = 0.2 / math.sqrt(2)  # of two runs
    assert caps == [pytest.approx(0.3 + 1.6448536 * spread), 1.0]
    assert floors == [0.0, pytest.approx(0.05 + 1.6448536 * spread / 10)]
    assert by_papers_rule([[0.9], [1.0]])[1] == [1.0]


def test_the_codes_rule_is_the_largest_profile_in_a_band():
    assert by_codes_rule([[0.05, 0.17, 0.1], [0.01, 0.16, 0.6]], (0.15, 0.2)) == [0.15, 0.17, 0.2]
