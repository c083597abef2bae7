"""``svg2 demo`` end to end at a small size, and what it says to bad input."""

import json

import pytest
from typer.testing import CliRunner

from svg2_compile.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["demo", *arguments])


@pytest.mark.slow
def test_demo_writes_videos_pictures_and_a_report(tmp_path):
    size = ("--frames", "8", "--height", "128", "--width", "128")
    done = run(*size, "--steps", "2", "--dense-steps", "0.5", "--out", str(tmp_path / "demo"))
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert written == {"dense.mp4", "sparse.mp4", "contact_sheet.png", "density.png", "report.json"}
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["tokens"] == 2048
    assert 0 < report["density"] < 1
    assert 0 < report["clustering_share"] < 1
    assert report["noise_floor_psnr_db"] > 60
    assert 10 < report["psnr_db"] < report["noise_floor_psnr_db"]
    assert len(report["density_by_layer_and_step"]) == 6
    assert all(first is None and 0 < second < 1 for first, second in report["density_by_layer_and_step"].values())
    assert "step speed-up" in done.output
    (ratio,) = report["step_speedups"]
    assert ratio == report["step_speedup"]
    said = " ".join(done.output.split())
    assert ("The machine is busy" in said) == report["machine_is_busy"] == (report["dense_step_spread"] > 0.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--top-p", "1.5"), "top_p must be in (0, 1], got 1.5"),
        (("--height", "100"), "height must be a multiple of 8 pixels, got 100"),
        (("--frames", "0"), "frames must be at least 1, got 0"),
        (("--steps", "1", "--dense-steps", "1.0"), "at least one step must be sparse"),
        (("--device", "tpu"), "device must be auto, cpu or cuda, got 'tpu'"),
        (("--prompt", "a cat", "--frames", "8", "--width", "128"), "got 'a cat'"),
    ],
)
def test_bad_input_is_refused_with_a_clear_message(tmp_path, arguments, message):
    done = run(*arguments, "--out", str(tmp_path))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
