"""What the host knows of counters on the device: then kernels that would find nothing to do need no launch.

How many iterations k-means needs is decided on the device, because a CUDA graph replays without the host. Whoever owns
the state and knows that it has been clustered says so here; nobody else can, and nobody has to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from svg2_compile.kernels.launch import is_capturing

_clustered: ContextVar[frozenset[int]] = ContextVar("clustered", default=frozenset())


@contextmanager
def known_as_clustered(addresses: frozenset[int]) -> Iterator[None]:
    """Vouch for state while a graph runs: the counters at these addresses are not zero, nor will they be set to it."""
    token = _clustered.set(addresses)
    try:
        yield
    finally:
        _clustered.reset(token)


def is_known_as_clustered(*calls: Tensor) -> bool:
    """Return whether somebody vouches for these counters; never while a CUDA graph records, which others replay."""
    known = _clustered.get()
    return bool(known) and all(each.data_ptr() in known for each in calls) and not is_capturing()
