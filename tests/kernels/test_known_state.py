"""What the host may take for granted about counters on the device."""

import pytest
import torch

from svg2_compile.kernels.known_state import is_known_as_clustered, known_as_clustered


@pytest.fixture
def counters() -> list[torch.Tensor]:
    return [torch.zeros(1, dtype=torch.int32) for _ in range(3)]


def test_only_the_counters_that_are_vouched_for_are_known_and_only_meanwhile(counters):
    first, second, third = counters
    assert not is_known_as_clustered(first)
    with known_as_clustered(frozenset([first.data_ptr(), second.data_ptr()])):
        assert is_known_as_clustered(first) and is_known_as_clustered(first, second)
        assert not is_known_as_clustered(third) and not is_known_as_clustered(first, third)
        assert not is_known_as_clustered(first.clone())
        with known_as_clustered(frozenset()):
            assert not is_known_as_clustered(first)
        assert is_known_as_clustered(first)
    assert not is_known_as_clustered(first)


def test_nothing_is_known_after_an_error(counters):
    with pytest.raises(RuntimeError), known_as_clustered(frozenset([counters[0].data_ptr()])):
        raise RuntimeError
    assert not is_known_as_clustered(counters[0])


def test_nothing_is_known_while_a_cuda_graph_records(counters, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with known_as_clustered(frozenset([counters[0].data_ptr()])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert not is_known_as_clustered(counters[0])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert is_known_as_clustered(counters[0])
