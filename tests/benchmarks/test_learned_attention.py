"""How many keys carry the attention: the count itself, and the script on a minute model whose prompts are words."""

import importlib
import json
import sys
from pathlib import Path

import minute_wan
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    for folder in ("benchmarks", "benchmarks/method", "examples/tiny_wan"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("learned_attention")


def test_uniform_attention_needs_the_mass_itself_and_a_single_heavy_key_needs_one(script):
    key = torch.zeros(1, 2, 200, 4)
    key[:, 1, 17] = 50.0
    query = torch.ones(1, 2, 3, 4)
    shares = script.share_of_keys(query, key, 1.0, (0.5, 0.9))
    assert shares.shape == (2, 2)
    assert shares[:, 0].tolist() == pytest.approx([0.5, 0.9], abs=0.006)
    assert shares[:, 1].tolist() == pytest.approx([1 / 200, 1 / 200])


def test_the_script_measures_made_videos_at_several_lengths(script, tmp_path, monkeypatch, capsys):
    made = importlib.import_module("made_video")
    minute_wan.write_model_of_words(tmp_path, made.Pictures.load().vocabulary, ["sea"], [128, 256])
    arguments = ("--folder", tmp_path, "--out", tmp_path, "--name", "found", "--frames", 1, 2, "--videos", 2)
    monkeypatch.setattr(
        sys, "argv", ["x", *map(str, arguments), "--rows", "8", "--noise-levels", "0.5", "--device", "cpu"]
    )
    script.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert [length["tokens"] for length in found["lengths"]] == [512, 1024]
    for length in found["lengths"]:
        shares = torch.tensor(length["share_of_keys"]["trained"])
        assert shares.shape == (2, 1, 2, 1, 2)
        assert (shares[0] <= shares[1]).all()
        assert 0 < shares.min() <= shares.max() <= 1
        assert length["mean_share_of_keys"]["trained"]["0.9"] == pytest.approx(shares[0].mean().item())
        assert len(set(length["prompts"])) == 2
    assert (tmp_path / "found.png").stat().st_size > 0


def test_clips_are_not_asked_for_more_than_they_have(script, tmp_path):
    capture = importlib.import_module("capture")
    frames_file = tmp_path / "frames.npz"
    clips = importlib.import_module("svg2_compile.tiny_wan.clips")
    clips.save_scenes(
        {scene.name: torch.zeros(5, 128, 256, 3, dtype=torch.uint8) for scene in clips.SCENES}, frames_file
    )
    assert [v.latents.shape for v in capture.real_videos(2, 4, frames_file=frames_file)] == [(1, 64, 4, 32, 64)] * 2
    with pytest.raises(SystemExit, match="ask for less"):
        capture.real_videos(2, 6, frames_file=frames_file)
