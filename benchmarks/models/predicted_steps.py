"""Set what ``svg2 explain`` predicts beside the denoising steps measured on a GPU; needs no GPU and no weights.

    python -P benchmarks/models/predicted_steps.py --measured docs/images/denoising_steps_h200.json --gpu h200

The models are those of ``denoising_step.py`` at their full depth, with the cluster counts of the measured runs.
"""

import argparse
import json
import tempfile
from pathlib import Path

from svg2_compile.environment import describe_environment
from svg2_compile.explaining.explanation import ExplainSettings, explain_model

WAN = ("WanPipeline", "WanTransformer3DModel", "UniPCMultistepScheduler", ("text_encoder", "tokenizer", "vae"))
HUNYUAN = (
    "HunyuanVideoPipeline",
    "HunyuanVideoTransformer3DModel",
    "FlowMatchEulerDiscreteScheduler",
    ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"),
)
MODELS = {
    "wan-14b-720p": (WAN, {}, (81, 720, 1280)),
    "hunyuan-720p": (HUNYUAN, {"guidance_embeds": True}, (129, 720, 1280)),
    "wan-1.3b-480p": (WAN, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, (81, 480, 832)),
}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--gpu", default="h200")
    args = parser.parse_args()
    measured = json.loads(args.measured.read_text(encoding="utf-8"))
    print(", ".join(f"{name} {value}" for name, value in describe_environment().items()))
    print("| model | | dense, s | speed-up at density |\n| --- | --- | --- | --- |")
    for run in measured["runs"]:
        if run["whole"] or run["cuda_graphs"] or run["layers"] is not None:
            continue
        q_clusters, k_clusters = run["clusters"]
        options = {"dense_layers": 0, "q_clusters": q_clusters, "k_clusters": k_clusters}
        kinds, config, size = MODELS[run["model"]]
        with tempfile.TemporaryDirectory() as folder:
            write_pipeline(Path(folder), *kinds, config)
            prediction = explain_model(ExplainSettings(folder, *size, gpu=args.gpu, options=options)).prediction
        densities = {float(density): each["speedup"] for density, each in run["sparse"].items()}
        rows = {
            f"measured, {measured['environment']['device']}": (run["dense"]["ms"] / 1e3, densities),
            "predicted": (prediction.dense_step, {each: prediction.speedup(each) for each in densities}),
        }
        for name, (seconds, speedups) in rows.items():
            cells = ", ".join(f"{density:.0%}: {speedup:.2f}" for density, speedup in speedups.items())
            print(f"| {run['model']} | {name} | {seconds:.2f} | {cells} |")


def write_pipeline(
    folder: Path, pipeline: str, model: str, scheduler: str, absent: tuple[str, ...], config: dict
) -> None:
    """Write the configuration files of a pipeline; what is not in ``config`` is the default of the model's class."""
    parts = {"transformer": ["diffusers", model], "scheduler": ["diffusers", scheduler]}
    parts |= {name: [None, None] for name in absent}
    files = {
        "model_index.json": {"_class_name": pipeline, **parts},
        "transformer/config.json": {"_class_name": model, **config},
        "scheduler/scheduler_config.json": {"_class_name": scheduler},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
