"""Every tensor that we make says of which dtype it is and where it lives.

Inference scripts call ``torch.set_default_dtype(torch.bfloat16)`` or ``torch.set_default_device("cuda")``, which decide
for whatever says nothing.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for room in ("kernels", "passes", "svg2_compile") for path in (ROOT / room).rglob("*.py"))
BOTH = ("dtype", "device")
SAID = {
    **dict.fromkeys(("zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace"), BOTH),
    **dict.fromkeys(("rand", "randn", "randint", "randperm", "empty_strided", "tensor", "scalar_tensor"), BOTH),
    **dict.fromkeys(("as_tensor", "Generator"), ("device",)),
}
"""What each function of torch that makes a tensor has to be told; an array has its dtype, a generator has none."""


def unsaid(source: str) -> list[str]:
    """Return every call in a file that leaves something to the defaults of the process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_torch = ast.unparse(node.func.value) == "torch"
            said = {keyword.arg for keyword in node.keywords}
            missing = [each for each in SAID.get(node.func.attr, ()) if each not in said and None not in said]
            if is_torch and missing:
                found.append(f"line {node.lineno}: {ast.unparse(node)} says no {' and no '.join(missing)}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_tensor_is_of_the_default_kind(path):
    assert not unsaid(path.read_text())


def test_what_says_nothing_is_found():
    assert unsaid("torch.zeros(2, device=x.device)") and unsaid("torch.arange(3, dtype=torch.int64)")
    assert unsaid("x = torch.randn(2, generator=torch.Generator())")
    assert not unsaid("torch.full((2,), 1.0, dtype=x.dtype, device=x.device)\nx.new_zeros(2)\ntorch.zeros_like(x)")
    assert not unsaid('torch.as_tensor(array, device="cpu")\ntorch.ones(2, **like)')
