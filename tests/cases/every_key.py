"""Tests that the kernels have in common which walk the keys of every cluster for a tile of mean queries."""

import dataclasses
import importlib
import math

import pytest
import torch
from triton_interpreter import DEVICE, INTERPRETED, runs_kernels

# The interpreter has no bf16 products.
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.float16, torch.bfloat16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_device(case):
    """Return a case whose tensors are where kernels run."""
    return type(case)(*(each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in case.arguments()))


def token_major(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def column_major(x):
    return x.mT.contiguous().mT


class OfEveryKey:
    """Inherit, and say which op: a kernel whose results depend on every visible key and on nothing else."""

    op: str
    """Its kernel is the function ``{op}_triton`` of the module of that name."""

    tile = "_tile"
    """The function of the module that chooses its tile."""

    giants: dict = {}  # noqa: RUF012 (read only)
    """What a case with giant clusters is made with besides."""

    def random_case(self, **shape):
        """Return arguments of the op."""
        raise NotImplementedError

    def assert_right(self, case, results):
        """Assert that results are exact but for rounding."""
        raise NotImplementedError

    def assert_all_written(self, results):
        """Assert that nothing is what new memory held."""
        assert not results.isnan().any()

    @property
    def module(self):
        return importlib.import_module(f"svg2_compile.kernels.{self.op}_triton")

    def results(self, case):
        return getattr(self.module, f"{self.op}_triton")(*on_device(case).arguments()).cpu()

    def check(self, case):
        self.assert_right(case, self.results(case))

    @runs_kernels
    @every_dtype
    @pytest.mark.parametrize("sharpness", [0.0, 1.0, 60.0])
    @pytest.mark.parametrize("clusters", [(1, 1), (5, 7), (3, 40)])
    def test_they_are_those_of_every_key(self, clusters, sharpness, dtype):
        self.check(self.random_case(clusters=clusters, sharpness=sharpness, dtype=dtype, tokens=90, dim=24, batch=1))

    @runs_kernels
    @every_dtype
    @pytest.mark.parametrize("dim", [4, 64, 80, 128, 256])
    def test_any_head_dimension(self, dim, dtype):
        self.check(self.random_case(dim=dim, batch=1, groups=1, clusters=(70, 5), dtype=dtype))

    @runs_kernels
    @pytest.mark.parametrize("q_clusters", [1, 16, 129, 300])
    def test_any_number_of_mean_queries(self, q_clusters):
        self.check(self.random_case(tokens=70, batch=1, groups=1, clusters=(q_clusters, 9), dtype=torch.float16))

    @runs_kernels
    @every_dtype
    def test_giants_between_empty_clusters_and_clusters_of_one(self, dtype):
        case = self.random_case(tokens=700, batch=1, repeats=1, clusters=(5, 8), dtype=dtype, **self.giants)
        sizes = torch.tensor([[0, 1, 1, 500, 0, 1, 197, 0], [700, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
        self.check(dataclasses.replace(case, k_sizes=sizes.view(1, 2, 8)))

    @runs_kernels
    @every_dtype
    def test_what_is_hidden_is_not_even_read(self, dtype):
        case = self.random_case(tokens=90, hidden=40, repeats=1, clusters=(5, 9), dtype=dtype)
        self.check(case)
        assert torch.equal(self.results(case.with_hidden(math.nan)), self.results(case))

    @runs_kernels
    @pytest.mark.parametrize(("tile", "clusters"), [((16, 16), 1), ((64, 32), 3), ((128, 128), 64)], ids=str)
    def test_any_tile_and_any_share_of_the_clusters(self, monkeypatch, tile, clusters):
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        monkeypatch.setattr(self.module, self.tile, lambda *_: dict(zip(names, (*tile, 4, 2))))
        monkeypatch.setattr("svg2_compile.kernels.walk_clusters.CLUSTERS", clusters)
        self.check(self.random_case(tokens=300, batch=1, groups=1, clusters=(33, 14), dtype=torch.float16))

    @runs_kernels
    def test_more_clusters_than_sizes_are_added_at_a_time(self):
        shape = {"tokens": 400, "batch": 1, "groups": 1, "repeats": 1, "clusters": (3, 150)}
        self.check(self.random_case(**shape, dtype=torch.float16))

    @runs_kernels
    def test_any_strides_and_every_time_the_same_bits(self):
        case = self.random_case(dim=24, clusters=(5, 4))
        first = self.results(case)
        tensors = {
            field.name: x
            for field in dataclasses.fields(case)
            if isinstance(x := getattr(case, field.name), torch.Tensor) and x.is_floating_point()
        }
        changes = [
            {name: layout(x) for name, x in tensors.items()} for layout in (lambda x: x, token_major, column_major)
        ]
        changes += [{name: column_major(x)} for name, x in tensors.items()]
        changes.append({"k_sizes": torch.stack((case.k_sizes, case.k_sizes), -1)[..., 0]})
        for change in changes:
            assert torch.equal(self.results(dataclasses.replace(case, **change)), first)

    @runs_kernels
    def test_every_element_is_written(self, monkeypatch):
        real = torch.empty

        def filled(*size, dtype, **options):
            return real(*size, dtype=dtype, **options).fill_(math.nan if dtype.is_floating_point else 10**6)

        monkeypatch.setattr(torch, "empty", filled)
        self.assert_all_written(self.results(self.random_case(clusters=(9, 33), used=0.5)))
