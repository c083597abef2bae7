"""``svg2::log_dropped_weights`` in Triton: the reference's weights, up to rounding, the same bits every time."""

from every_key import OfEveryKey
from triton_interpreter import assert_passes_under_the_interpreter, starts_the_interpreter
from weights_cases import random_case


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


class TestWeights(OfEveryKey):
    op = "log_dropped_weights"
    tile = "tile_beside_means"

    def random_case(self, **shape):
        return random_case(**shape)

    def assert_right(self, case, results):
        case.assert_right(results)
