"""Ratio r and overlap of a vision model in training, finetuned against from scratch (table 1, figures 1 and 2).

    python benchmarks/vision_files.py --data DATA --out vision
    python benchmarks/vision_gradients.py --data vision --out gradients.json

AdamW on CIFAR-10, batch 128, by the loop of the forgetting front; r of every convolution of at least 1,000 weights, in
training mode, on the batch of that step. From scratch: weights as transformers draws them, at a rate of their own.
--shuffled 200 adds what both would be if gradients fell anywhere: random ones in their place, so many times, on the
weights of the first seed before training; with --seeds 0 nothing is trained, and a CPU is enough.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from nanoadam import analysis, baselines
from nanoadam.analysis.gradients import tensors
from nanoadam.finetuning import folders, norms
from nanoadam.paper import forgetting, vision

STEPS = (0, 10, 30, 100, 300, 780)
LEAST = 1000


def model_of(folder: Path, scratch: bool, seed: int, device: torch.device):
    from transformers import AutoConfig, AutoModelForImageClassification

    torch.manual_seed(seed)
    if scratch:
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):  # transformers' 0.02 is too little for depthwise convolutions
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        model = AutoModelForImageClassification.from_pretrained(folder)
    norms.set_momentum(model, 0.1)
    model.to(device).train()
    forgetting.put_head(model, forgetting.new_head(model, 10, seed))
    return model


def measured(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, (p, role) in tensors(model).items() if role == "matrix" and p.numel() >= LEAST}


def kind(weight: torch.Tensor) -> str:
    return "pointwise" if weight.shape[-1] == 1 else "depthwise"


def shuffled(folder: Path, repeats: int) -> dict:
    """Mean r and overlap of gradients that fall anywhere: over all tensors, and over those of a kind."""
    found = {"repeats": repeats, "kinds": {}, "independent": {}}
    for scratch in (False, True):
        generator, drawn = torch.Generator().manual_seed(0), []
        wide = {name: p.detach() for name, p in measured(model_of(folder, scratch, 0, torch.device("cpu"))).items()}
        for _ in range(repeats):
            gradients = {name: torch.rand(p.shape, generator=generator) for name, p in wide.items()}
            drawn.append({name: analysis.relation(p, gradients[name]) for name, p in wide.items()})
        kinds = {name: kind(p) for name, p in wide.items()}
        groups = {"all": list(wide)} | {key: [n for n in wide if kinds[n] == key] for key in set(kinds.values())}
        start = "scratch" if scratch else "pretrained"
        found[start] = {
            group: {key: [statistics.mean(d[n][key] for n in names) for d in drawn] for key in ("ratio", "overlap")}
            for group, names in groups.items()
        }
        found["kinds"] |= kinds
        found["independent"][start] = {name: analysis.independent_ratio(p) for name, p in wide.items()}
    return found


def one(arguments, train, test, scale, scratch: bool, seed: int) -> dict:
    model = model_of(arguments.data / "mobilenet", scratch, seed, train.labels.device)
    wide = measured(model)
    drawn = list(wide)[-1]

    def measure(weight, gradient):
        value = dict(analysis.relation(weight, gradient))
        if weight.data_ptr() == wide[drawn].data_ptr():
            value["points"] = analysis.scatter(weight, gradient, points=600)
        return value

    before = {name: p.detach().clone() for name, p in wide.items()}
    recorder = analysis.GradientRecorder(model, STEPS, measure)
    optimizer = baselines.make("adamw", model, arguments.scratch_lr if scratch else arguments.lr)
    optimizer.register_step_post_hook(lambda *_: recorder.advance())
    vision.fit(model, optimizer, train, scale, epochs=arguments.epochs, batch_size=128, seed=seed, shift=8)
    recorder.close()
    moved = sum((analysis.shift(old, wide[name].detach()) for name, old in before.items()), analysis.Shift())
    records = [record for record in recorder.records if record["name"] in wide]
    found = {
        "from": "scratch" if scratch else "pretrained",
        "seed": seed,
        "accuracy": vision.accuracy(model, test, scale),
    }
    steps = sorted({record["step"] for record in records})
    for key in ("ratio", "independent", "overlap"):
        found[key] = {s: statistics.mean(r["value"][key] for r in records if r["step"] == s) for s in steps}
    found["tensors"] = {s: {r["name"]: r["value"]["ratio"] for r in records if r["step"] == s} for s in steps}
    found["points"] = {r["step"]: {"name": drawn, **r["value"]["points"]} for r in records if r["name"] == drawn}
    return {**found, "shift": moved.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that vision_files.py made")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--scratch-lr", type=float, default=1e-3)
    parser.add_argument("--shuffled", type=int, default=0, help="how often random gradients are drawn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    result = {**folders.environment(device=str(device)), "settings": settings, "runs": []}
    if arguments.shuffled:
        result["shuffled"] = shuffled(arguments.data / "mobilenet", arguments.shuffled)
        arguments.out.write_text(json.dumps(result) + "\n")
    if not arguments.seeds:
        return
    train = vision.load(arguments.data / "cifar10-train.npz", arguments.side, device, rows=arguments.rows)
    test = vision.load(arguments.data / "cifar10-test.npz", arguments.side, device, rows=5000)
    scale = vision.read_scale(arguments.data / "mobilenet")
    for seed in range(arguments.seeds):
        for scratch in (False, True):
            row = one(arguments, train, test, scale, scratch, seed)
            result["runs"].append(row)
            cells = [f"{key}[{s}] {v:.3f}" for key in ("ratio", "independent", "overlap") for s, v in row[key].items()]
            print(row["from"], seed, f"accuracy {row['accuracy']:.3f}", *cells, flush=True)
            arguments.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
