"""The judge of the subject: it knows a perfect one from a deaf one, and exchanges one word at a time."""

import importlib
import json
import sys
from pathlib import Path

import minute_wan
import pytest
import torch

from svg2_compile.tiny_wan.transform import BlockTransform

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"))
judge = importlib.import_module("judge_subject")
made = importlib.import_module("made_video")
SHAPE = made.Shape(2, 32, 64)


@pytest.fixture(scope="module")
def pictures():
    return made.Pictures.load()


@pytest.fixture(scope="module")
def truth(pictures):
    return judge.held_out(pictures, 6, SHAPE)


class KnowsAll:
    """A subject whose velocity is the true one, with an error for each wrong word if it listens."""

    def __init__(self, truth, listens=True):
        self.transform = BlockTransform()
        self.truth, self.listens = truth, listens

    def velocity(self, latents, noise, level, words):
        own = [next(p.words for p, v in zip(self.truth.plans, self.truth.pixels) if self._is(v, z)) for z in latents]
        wrong = torch.tensor([float(said != true) for said, true in zip(words, own)])
        return (
            noise - latents + (0.1 * (1 + wrong) if self.listens else torch.full_like(wrong, 0.1)).view(-1, 1, 1, 1, 1)
        )

    def _is(self, video, latents):
        return torch.equal(self.transform.encode(video[None])[0], latents)


def test_a_perfect_guess_is_near_the_truth_and_a_worse_one_further(truth):
    found = judge.denoised({"new": KnowsAll(truth)}, truth, (0.9, 0.1))
    assert found["new"]["all"]["0.1"]["mean"] > found["new"]["all"]["0.9"]["mean"] > 20
    assert len(found["new"]["all"]["0.9"]["values"]) == 6
    assert found["new"]["background"]["0.1"]["deviation"] >= 0
    assert 5 < found[judge.CONSTANT]["all"]["1"]["mean"] < 25


def test_the_linear_guess_is_better_than_no_guess_and_than_a_constant(truth):
    transform = BlockTransform()
    clean = transform.encode(truth.pixels)
    noise = judge.noise_of(6, clean)
    mixed = torch.lerp(clean, noise, 0.5)
    errors = [(guess - clean).square().mean() for guess in (judge.linear_guess(clean, mixed, 0.5), mixed, clean.mean())]
    assert errors[0] < min(errors[1:])


def test_noise_is_the_same_for_every_subject(truth):
    like = truth.pixels
    assert torch.equal(judge.noise_of(3, like), judge.noise_of(6, like)[:3])


def test_a_subject_that_listens_prefers_the_true_prompt_and_a_deaf_one_does_not(pictures, truth):
    listens = judge.listening(KnowsAll(truth), truth, pictures.vocabulary, (0.5,))
    deaf = judge.listening(KnowsAll(truth, listens=False), truth, pictures.vocabulary, (0.5,))
    assert set(listens) == set(judge.EXCHANGED)
    assert all(found["right"] == 1 and found["margin"] > 0 for found in listens.values())
    assert all(found["right"] == 0 and found["margin"] == pytest.approx(0, abs=1e-5) for found in deaf.values())
    with_objects = sum(bool(plan.objects) for plan in truth.plans)
    assert listens["object"]["videos"] == with_objects
    assert listens["camera"]["videos"] == 6


@pytest.mark.parametrize("kind", judge.EXCHANGED)
def test_one_word_is_exchanged_and_no_other(pictures, kind):
    vectors = judge.tiny_wan.model.WordVectors.drawn(pictures.vocabulary, 4)
    for seed in range(40):
        words = made.draw_plan(seed, pictures.vocabulary).words
        other = judge.exchanged(words, kind, pictures.vocabulary, seed)
        if other is None:
            assert not words.objects
            continue
        differ = [a != b for a, b in zip(vectors.numbers(words), vectors.numbers(other))]
        assert sum(differ) == 1


def test_change_between_frames_is_none_for_a_still_and_one_for_black_and_white():
    still = torch.ones(1, 3, 4, 2, 2)
    flicker = torch.tensor([-1.0, 1.0, -1.0]).view(1, 1, 3, 1, 1).expand(1, 3, 3, 2, 2)
    assert judge.frame_changes(still) == [0.0]
    assert judge.frame_changes(flicker) == [1.0]


def test_the_judge_writes_figures_and_samples_of_a_model_folder(pictures, tmp_path, monkeypatch, capsys):
    minute_wan.write_model_of_words(tmp_path, pictures.vocabulary, ["meadow"], [32, 64])
    size = ("--frames", 2, "--height", 32, "--width", 64, "--videos", 2, "--samples", 2, "--sample-steps", 1)
    arguments = ("--folder", tmp_path, "--old", tmp_path, "--out", tmp_path / "judged", *size, "--noise-levels", 0.8)
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments), "--device", "cpu"])
    judge.main()
    found = json.loads((tmp_path / "judged" / "judged.json").read_text())
    psnr = found["denoised_psnr_db"]
    assert psnr["new"] == psnr["old"]
    assert psnr["new, linear"]["all"]["0.8"]["mean"] > psnr["new"]["all"]["0.8"]["mean"]
    assert found["samples"]["prompts"] == (tmp_path / "judged" / "prompts.txt").read_text().splitlines()
    assert len(found["samples"]["change_between_frames"]["sampled"]) == 2
    with made.Image.open(tmp_path / "judged" / "samples.png") as sheet:
        assert sheet.size == (2 * 64, 2 * 2 * 32)
    assert "does it listen?" in capsys.readouterr().out


def test_too_few_videos_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--folder", "f", "--out", "o", "--videos", "4"])
    with pytest.raises(SystemExit):
        judge.main()
    assert "at least --samples, got 4" in capsys.readouterr().err
