"""What Inductor makes of the sparse graph: nothing is copied that the ops can read where it lies."""

import ast
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

BATCH, TEXT, VIDEO, HEADS, DIM = 2, 9, 100, 4, 16
OPTIONS = {"min_tokens": 64, "dense_steps": 0, "dense_layers": 0, "q_clusters": 4, "k_clusters": 8}
STATE_WRITERS = {"cluster_tokens_": (3, 4, 5, 6), "select_blocks": (7,)}


class Attention(torch.nn.Module):
    """Self-attention as diffusers writes it: projections seen as heads, heads merged, one projection out."""

    def __init__(self, joint):
        super().__init__()
        self.joint = joint
        self.q, self.k, self.v, self.out = (torch.nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(4))

    def forward(self, video, text, timestep):
        tokens = torch.cat((text, video), dim=1) if self.joint else video
        q, k, v = (each(tokens).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for each in (self.q, self.k, self.v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module", params=[False, True], ids=["video", "text and video"])
def code(request):
    """The body of the compiled sparse graph."""
    torch.manual_seed(0)
    model = torch.compile(Attention(request.param), backend="svg2", options=OPTIONS, fullgraph=True)
    video, text = torch.randn(BATCH, VIDEO, HEADS * DIM), torch.randn(BATCH, TEXT, HEADS * DIM)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(model, video, text, torch.tensor(1.0))
    assert len(codes) == 1
    return codes[0].split("def call(")[1].split("return (")[0]


def calls(code, op):
    """The arguments of every call of one of our ops, as text."""
    lines = re.findall(rf"torch\.ops\.svg2\.{op}\.default\(.*\)\n", code)
    return [[ast.unparse(argument) for argument in ast.parse(line).body[0].value.args] for line in lines]


def test_every_op_is_called_as_often_as_the_method_says(code):
    names = re.findall(r"torch\.ops\.svg2\.(\w+)\.default\(", code)
    counts = {name: names.count(name) for name in set(names)}
    context = {"context_attention": 1} if "context_attention" in counts else {}
    assert counts == {"cluster_tokens_": 1, "select_blocks": 1, "block_sparse_attention": 1, **context}


def test_queries_keys_and_values_arrive_as_views_of_their_projections(code):
    (clustered,), (attended,) = calls(code, "cluster_tokens_"), calls(code, "block_sparse_attention")
    read = [*clustered[:3], attended[0]]
    sources = {re.fullmatch(r"reinterpret_tensor\((buf\d+), .*\)", argument)[1] for argument in read}
    projections = re.findall(r"extern_kernels\.addmm\(.*, out=(buf\d+)\)", code)
    assert sources == set(projections[:3])


def test_state_is_updated_where_it_is(code):
    inputs = set(re.findall(r"arg\d+_1", code.split("= args")[0]))
    for op, positions in STATE_WRITERS.items():
        for arguments in calls(code, op):
            assert all(arguments[position] in inputs for position in positions), arguments


def test_only_joining_text_and_video_copies_anything(code):
    kernels = re.findall(r"^\s+(?:cpp|triton)_fused_(\w+)\(", code, re.MULTILINE)
    assert all(re.fullmatch(r"cat\w*", name) for name in kernels), kernels
    assert "copy_(" not in code and "clone" not in code
