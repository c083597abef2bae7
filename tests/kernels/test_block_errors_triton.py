"""``svg2::block_errors`` in Triton: the reference's errors, up to rounding, the same bits every time."""

from errors_cases import random_case
from every_key import OfEveryKey
from triton_interpreter import assert_passes_under_the_interpreter, starts_the_interpreter


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


class TestErrors(OfEveryKey):
    op = "block_errors"
    tile = "tile_beside_means"
    giants = {"alike": 30.0}  # noqa: RUF012 (read only)

    def random_case(self, **shape):
        return random_case(**shape)

    def assert_right(self, case, results):
        case.assert_right(results)
