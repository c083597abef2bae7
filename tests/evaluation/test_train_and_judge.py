"""The one command: stages in their order, a call that ends in time, and results that come back in pieces."""

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"))
command = importlib.import_module("train_and_judge")
card = importlib.import_module("write_card")
STAGES = ["judge_subject.py", "learned_attention.py", "write_card.py"]


def options(out, *arguments):
    return command.parse_arguments(["--out", str(out), *map(str, arguments)])


@pytest.fixture
def scripts(monkeypatch):
    """Record the scripts that are run, instead of running them; ``codes`` says what they return."""
    ran, codes = [], {}

    def run(parts):
        ran.append((Path(parts[0]).name, *parts[1:]))
        return codes.get(ran[-1][0], 0)

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "STARTED", command.time.monotonic())
    return ran, codes


def test_all_scripts_that_are_run_are_in_the_repository(tmp_path):
    assert [Path(stage.command[0]).name for stage in command.stages(options(tmp_path))] == STAGES
    assert all((command.ROOT / stage.command[0]).is_file() for stage in command.stages(options(tmp_path)))
    assert (command.ROOT / "examples/tiny_wan/train_subject.py").is_file()


def test_stages_follow_training_in_their_order(scripts, tmp_path):
    ran, _ = scripts
    assert command.work(options(tmp_path)) == 0
    assert [each[0] for each in ran] == ["train_subject.py", *STAGES]
    assert "--stop-after" not in ran[0]


def test_nothing_is_judged_before_training_is_done(scripts, tmp_path):
    ran, codes = scripts
    codes["train_subject.py"] = command.NOT_DONE
    assert command.work(options(tmp_path, "--minutes-per-call", 9)) == command.NOT_DONE
    assert [each[0] for each in ran] == ["train_subject.py"]
    stop_after = float(ran[0][ran[0].index("--stop-after") + 1])
    assert 7.5 < stop_after <= 8


def test_what_is_done_is_not_done_again(scripts, tmp_path):
    ran, _ = scripts
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "judged.json").write_text("{}")
    assert command.work(options(tmp_path)) == 0
    assert [each[0] for each in ran] == ["train_subject.py", *STAGES[1:]]


def test_a_stage_that_does_not_fit_into_the_call_is_left_for_the_next(scripts, tmp_path):
    ran, _ = scripts
    assert command.work(options(tmp_path, "--minutes-per-call", 2.2)) == command.NOT_DONE
    assert [each[0] for each in ran] == ["train_subject.py", "judge_subject.py"]


def test_a_stage_that_fails_ends_the_work_with_its_code(scripts, tmp_path):
    ran, codes = scripts
    codes["judge_subject.py"] = 7
    assert command.work(options(tmp_path)) == 7
    assert [each[0] for each in ran] == ["train_subject.py", "judge_subject.py"]


def test_what_is_packed_is_unpacked_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PIECE_BYTES", 100)
    out, packed, into = tmp_path / "out", tmp_path / "packed", tmp_path / "into"
    files = {
        "model/config.json": b"{}", "model/README.md": b"card", "model/" + command.WEIGHTS: bytes(range(256)),
        "judged/judged.json": b"1", "attention/learned_attention.json": b"2", "loss.jsonl": b"3", "state.json": b"4",
    }  # fmt: skip
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    command.pack(out, packed)
    assert {path.name for path in packed.iterdir()} == {"figures.tar", "weights-0", "weights-1", "weights-2"}
    command.unpack(packed, into)
    found = {f"model/{p.name}": p.read_bytes() for p in into.iterdir()}
    beside = tmp_path / "into_figures"
    found |= {str(p.relative_to(beside)): p.read_bytes() for p in beside.rglob("*") if p.is_file()}
    assert found == files


def test_weights_of_too_many_pieces_stay_where_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "PIECE_BYTES", 10)
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / command.WEIGHTS).write_bytes(bytes(31))
    command.pack(tmp_path / "out", tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["figures.tar"]
    assert "are not packed" in capsys.readouterr().out


def test_a_folder_without_pieces_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"must hold figures\.tar and weights-0"):
        command.unpack(tmp_path, tmp_path / "into")


def test_unpack_needs_somewhere_to_put_it(capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments(["--unpack", "x"])
    assert "go together" in capsys.readouterr().err


def test_a_card_is_not_written_before_everything_is_measured(tmp_path):
    with pytest.raises(SystemExit, match=r"judged.json, .*learned_attention.json missing"):
        card.gather(tmp_path, tmp_path)


def spread(mean):
    return {"mean": mean, "deviation": 0.5, "values": [mean]}


def test_the_card_says_what_was_measured_and_what_a_person_must_add(tmp_path):
    run, folder = tmp_path, tmp_path / "model"
    judged = {
        "video": [16, 128, 256], "videos": 24, "noise_levels": [0.9],
        "denoised_psnr_db": {"new": {"all": {"0.9": spread(21.25)}}, "constant colour": {"all": {"1": spread(12.34)}}},
        "listening": {"camera": {"right": 0.875, "margin": 0.031, "videos": 24}},
        "samples": {
            "steps": 24, "guidance_scale": 2.0, "prompts": ["sea, cat"],
            "change_between_frames": {"made": [0.04], "sampled": [0.05]},
        },
    }  # fmt: skip
    masses = {name: {"0.9": share} for name, share in (("untrained", 0.63), ("trained", 0.31))}
    length = {"tokens": 8192, "prompts": ["a", "b"], "share_of_keys": [], "mean_share_of_keys": masses}
    environment = {"device": "a device", "torch": "2.0"}
    attention = {"masses": [0.9], "environment": environment, "lengths": [length | {"median_share_of_keys": masses}]}
    training = {
        "parameters": 9_704_960, "started_from": {"progressed": {"steps": 4321}}, "configuration": "shipped",
        "whitening": 0.5, "flow_shift": 3.0, "learning_rate": 5e-4,
        "warmup_steps": 500, "ema_decay": 0.999, "batch_tokens": 65536, "environment": environment,
        "sizes": [{"frames": 8, "height": 128, "width": 256}],
        "progressed": {"steps": 12345, "videos": 99, "tokens": 1_500_000_000, "seconds": 1140.0, "runs": 3},
        "final_loss": {"all": 0.4321, "by_noise_level": {"0.0-0.2": 0.9}},
    }  # fmt: skip
    config = {"num_layers": 8, "num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 1152}
    files = {
        run / "judged" / "judged.json": judged,
        run / "attention" / "learned_attention.json": attention,
        folder / "training.json": training,
        folder / "config.json": config,
        folder / "subject.json": {"examples": ["sea, cat"]},
    }
    for path, record in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    catalogue = json.loads((card.PHOTOGRAPHS / "catalogue.json").read_text("utf-8"))
    gathered = card.gather(run, folder)
    page = card.page_of(gathered, catalogue)
    for figure in (
        "9,704,960 parameters", "| new | all | 21.2 ± 0.5 |", "has 12.3 dB", "| camera | 24 | 88% | 3.1% |",
        "| 8,192 | 63.0% / 63.0% | 31.0% / 31.0% |", "12,345 steps", "1.50 billion tokens, 19.0 minutes in 3 runs",
        "0.432", "1. sea, cat", "an earlier run of 4,321 steps", "| pagoda | danielbuechele (Flickr) | CC BY 2.0 |",
    ):  # fmt: skip
        assert figure in page
    assert page.count(card.TO_BE_WRITTEN) == 1
    assert "$" not in page
    assert "values" not in json.dumps(gathered)
