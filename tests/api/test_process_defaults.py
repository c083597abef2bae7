"""Settings that scripts make for the whole process change no bit."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import svg2_compile

WIDTH = 32
BASE = {"top_p": 0.4, "dense_steps": 1, "dense_layers": 0, "min_tokens": 64}
POLICIES = {
    "plain": {"lowering": "eager"},
    "inductor": {"lowering": "inductor"},
    "by queries": {"lowering": "eager", "estimate_by": "queries"},
    "by keys": {"lowering": "eager", "estimate_by": "keys"},
    "guarded": {"lowering": "eager", "recall_rows": 16, "min_recall": 0.35, "recall_interval": 2},
}


class DiT(nn.Module):
    """Takes a mask of the text, and no call that Dynamo breaks the graph at under a default device."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, text, x, timestep, mask):
        joined = torch.cat([text, x], 1) + timestep[:, None, None] / 1000
        q, k, v = self.qkv(joined).view(1, -1, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        shown = torch.cat([mask, mask.new_ones(1, x.shape[1])], 1)[:, None, None]
        attended = F.scaled_dot_product_attention(4 * q, 4 * k, v, attn_mask=shown)
        return self.out(attended.transpose(1, 2).flatten(2))[:, text.shape[1] :]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: default_device("meta"),
    "within the device meta": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
}


def run(model):
    torch._dynamo.reset()
    svg2_compile.reset()
    random = torch.Generator(device="cpu").manual_seed(0)
    text, x = (torch.randn(1, n, WIDTH, generator=random, dtype=torch.float32, device="cpu") for n in (40, 512))
    mask = torch.ones(1, 40, dtype=torch.bool, device="cpu")
    mask[:, 30:] = False
    with torch.no_grad():
        for step in range(3):
            x = x - 0.1 * model(text, x, torch.tensor([900.0 - step], dtype=torch.float32, device="cpu"), mask)
    (site,) = svg2_compile.report(model).sparse_sites
    return x, site


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiT().eval()


@pytest.mark.parametrize("policy", POLICIES)
def test_defaults_of_the_process_change_no_bit_and_no_statistic(model, policy):
    model.compile(backend="svg2", options=BASE | POLICIES[policy])
    wanted, site = run(model)
    assert site.sparse_calls == 2 and 0 < site.density < 1
    # Inductor compiles for each of them, which takes long
    names = ("default dtype bfloat16", "default device meta") if policy == "inductor" else SETTINGS
    for name in names:
        with SETTINGS[name]():
            got, measured = run(model)
        assert torch.equal(got, wanted), name
        assert measured == site, name
