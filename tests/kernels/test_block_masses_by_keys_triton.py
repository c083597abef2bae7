"""``svg2::block_masses_by_keys`` in Triton: the reference's masses, up to rounding, the same bits every time."""

import dataclasses

import pytest
import torch
from every_key import OfEveryKey, on_device
from masses_by_keys_cases import random_case
from triton_interpreter import assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

from svg2_compile.kernels.block_masses_by_keys import block_masses_by_keys_reference


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


class TestMasses(OfEveryKey):
    op = "block_masses_by_keys"

    def random_case(self, **shape):
        return random_case(**shape)

    def assert_right(self, case, results):
        torch.testing.assert_close(results.double(), case.exact(), rtol=0, atol=case.tolerance())

    def assert_all_written(self, results):
        assert results.isfinite().all()

    @runs_kernels
    def test_an_empty_key_cluster_has_none_where_all_scores_are_very_low(self):
        case = random_case(clusters=(3, 7), used=0.6, dtype=torch.float16)
        case = dataclasses.replace(case, q_centroids=case.q_centroids.abs() + 9, k=-case.k.abs() - 9)
        assert (case.k_sizes == 0).any()
        self.check(case)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_the_op_takes_it_at_the_size_of_a_video(self):
        case = on_device(
            random_case(batch=1, groups=4, repeats=1, tokens=9000, dim=128, clusters=(100, 60), dtype=torch.bfloat16)
        )
        got = torch.ops.svg2.block_masses_by_keys(*case.arguments()).cpu()
        assert torch.equal(got, self.results(case))
        exact = block_masses_by_keys_reference(
            *(each.cpu() if isinstance(each, torch.Tensor) else each for each in case.arguments())
        )
        torch.testing.assert_close(got, exact, rtol=0, atol=case.tolerance())
