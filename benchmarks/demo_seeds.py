"""The demo on three seeds: perplexity against n-grams, preference accuracy against simple rules.

    python benchmarks/demo_seeds.py            about four minutes a seed on two cores

Each seed draws its own held-out chapters, weights, order and pairs. Finished seeds are kept under
benchmarks/cache and not run again.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

import lightning
import torch
import transformers

CACHE = Path(__file__).parent / "cache/demo"
TRIGRAM, KNESER_NEY = "interpolated trigram, tuned", "Kneser-Ney trigram"
TRAINING, HELD_OUT = (
    f"preference accuracy, {part}" for part in ("training pairs", "held-out chapters")
)


def report_of(seed: int) -> dict:
    path = CACHE / str(seed) / "report.json"
    if not path.exists():
        arguments = ["demo", f"--seed={seed}", f"--output={path.parent}"]
        subprocess.run([sys.executable, "-m", "lightning_align", *arguments], check=True)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
    print(f"{versions}, transformers {transformers.__version__}, {platform.machine()}")
    reports = {seed: report_of(seed) for seed in seeds}
    ratios: dict[str, list[float]] = {}
    for report in reports.values():
        before, after = report["table"]["validation perplexity"]
        grams = report["perplexities"]
        figures = {
            "perplexity": before,
            "/ unigram (<= 0.2)": before / grams["unigram"],
            "/ trigram (<= 0.95)": before / grams[TRIGRAM],
            "/ Kneser-Ney (< 1)": before / grams[KNESER_NEY],
            "after / before (<= 1.10)": after / before,
            "accuracy, training (> 0.9)": report["table"][TRAINING][1],
            "accuracy, held-out": report["table"][HELD_OUT][1],
            "longer text, training": report["accuracies"]["the longer text"][0],
            "untrained, training": report["accuracies"]["likelier to an untrained model"][0],
            "pretrained, training": report["accuracies"]["likelier to the pretrained model"][0],
        }
        for name, value in figures.items():
            ratios.setdefault(name, []).append(value)
    print("| figure | " + " | ".join(f"seed {seed}" for seed in seeds) + " | median |")
    print("|---|" + "---:|" * (len(seeds) + 1))
    for name, values in ratios.items():
        cells = [f"{value:.3f}" for value in [*values, median(values)]]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
