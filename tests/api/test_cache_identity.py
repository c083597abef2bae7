"""What Inductor and AOTAutograd keep on disk is named after the files of our ops, for every way to a compiler."""

import shutil
from pathlib import Path

import pytest
import torch
from conformance.examine import output_of
from segments import CASE, OPTIONS, without_tensorrt

from svg2_compile import backend, cache_identity, kernels, svg2_backend
from svg2_compile.cache_identity import digest_of, named_after_ops, ops_digest

settings = torch.compiler.config


def test_the_tag_holds_the_digest_of_the_installed_ops():
    with named_after_ops():
        assert settings.cache_key_tag == f"svg2 ops {digest_of(Path(kernels.__path__[0]))}"
    assert settings.cache_key_tag == ""


def test_the_users_own_tag_stays_inside_and_is_restored():
    with settings.patch(cache_key_tag="theirs"):
        with named_after_ops():
            assert settings.cache_key_tag == f"theirs svg2 ops {ops_digest()}"
        assert settings.cache_key_tag == "theirs"
        with pytest.raises(RuntimeError), named_after_ops():
            raise RuntimeError
        assert settings.cache_key_tag == "theirs"


def test_one_byte_or_the_name_of_an_ops_file_changes_the_digest(tmp_path):
    ops = Path(kernels.__path__[0])
    digests = {ops_digest()}
    for change in ("byte", "name"):
        folder = tmp_path / change
        shutil.copytree(ops, folder, ignore=shutil.ignore_patterns("__pycache__"))
        assert digest_of(folder) == ops_digest()
        file = folder / "permute.py"
        if change == "byte":
            content = bytearray(file.read_bytes())
            content[-2] ^= 1
            file.write_bytes(content)
        else:
            file.rename(folder / "permute_tokens.py")
        digests.add(digest_of(folder))
    assert len(digests) == 3


def test_the_files_are_read_once(monkeypatch):
    ops_digest()
    monkeypatch.setattr(cache_identity, "digest_of", lambda folder: pytest.fail("read again"))
    with named_after_ops():
        pass


class Compiler:
    """Stands in for Inductor, and looks at the tag while it compiles."""

    def __init__(self) -> None:
        self.tags: list[str] = []

    def __call__(self, gm, inputs, config_patches=None):
        self.tags.append(settings.cache_key_tag)
        return gm.forward


@pytest.fixture
def compiler(monkeypatch, no_grad_and_a_fresh_start):
    found = Compiler()
    monkeypatch.setattr(backend, "compile_fx", found)
    return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_tag_is_there_while_each_variant_compiles(compiler, dynamic):
    def attend(x):
        q, k, v = (x.sin() + shift for shift in range(3))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    options = {"min_tokens": 64, "dense_steps": 1, "dense_layers": 0}
    model = torch.compile(attend, backend=svg2_backend, options=options, dynamic=None if dynamic else False)
    x = torch.randn(1, 2, 256, 16)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 2)
    model(x)
    assert compiler.tags == [f"svg2 ops {ops_digest()}"] * (2 if dynamic else 1)
    model(x)  # the sparse graph of fixed sizes is compiled now, and Dynamo has long returned
    assert compiler.tags == [f"svg2 ops {ops_digest()}"] * 2


def test_the_tag_is_there_while_inductor_compiles_beside_tensorrt(compiler, monkeypatch):
    """Of a segment that cannot be an engine, compiled at the first call."""
    from svg2_compile.tensorrt.engines import NoEngineError

    def no_engine(module, folder):
        raise NoEngineError("for a test")

    without_tensorrt(monkeypatch, no_engine)
    name = "WanTransformer3DModel"
    model = torch.compile(CASE[name].make(), backend=svg2_backend, options=OPTIONS, fullgraph=True)
    output_of(model, CASE[name].inputs())
    assert set(compiler.tags) == {f"svg2 ops {ops_digest()}"}
