"""The memory wall, measured: single operations, the parts of a Llama step, and what changes them.

    python benchmarks/planner/memory_wall.py             # about three minutes of one core
    python benchmarks/planner/memory_wall.py --report    # tables and picture of what has been run
    python benchmarks/planner/memory_wall.py --smoke     # small sizes; kept elsewhere

Each operation stands with its FLOPs a byte by formula and as ``analyze_step`` counts them, and with
the FLOP/s that it reaches, under the roofline of the machine as measured. Formulas count a kernel's
inputs and outputs once. Times are CPU time of one thread in fp32, medians; operands take turns, so
that they are not in caches. Memory that was freed is used again, as GPUs' caching allocators do it:
glibc gives large blocks back, and the kernel then hands out and clears each page anew; what that
costs is measured, too. Parts that were run are kept under benchmarks/cache/memory_wall.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typing_extensions import override

sys.path.append(str(Path(__file__).parents[1]))

from hardware import hardware

from lightning_align import MachineBalance, ModelSpec, Muon, analyze_step
from lightning_align.layers import checkpoint_blocks, find_layers
from lightning_align.planner import predict_generation
from lightning_align.planner.measure import in_turns, timed
from lightning_align.planner.module_scopes import OPTIMIZER
from lightning_align.planner.op_flops import ATTENTION, PRODUCT, QUERY, VIEW, describe
from lightning_align.planner.records import Record
from lightning_align.planner.step_time import StepTime

CACHE = Path(__file__).parents[1] / "cache/memory_wall"
PICTURE = Path(__file__).parents[2] / "docs/images/memory_wall.png"
DEVICE = torch.device("cpu")
Found = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is run: elements of vectors, sides of matrices, tokens, and a Llama."""

    vector: int = 4_194_304
    side: int = 1024
    tokens: int = 1024
    width: int = 512
    blocks: int = 12
    rows: int = 4
    row_tokens: int = 128


SMOKE = Sizes(65_536, 64, 64, 64, 2, 1, 16)


@dataclass(frozen=True)
class Operation:
    """One that is measured.

    Attributes:
        name: As in the table.
        formula: Of its FLOPs a byte.
        intensity: What that comes to.
        run: What is timed.
        inputs: Its arguments, in turns.
    """

    name: str
    formula: str
    intensity: float
    run: Callable[..., object]
    inputs: list[Any]


def llama(sizes: Sizes) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 43 // 16,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def turns(*shapes: tuple[int, ...]) -> list[Any]:
    return in_turns(*shapes, device=DEVICE, dtype=torch.float32)


def operations(sizes: Sizes) -> list[Operation]:
    n, s, d = sizes.side, sizes.tokens, 64
    flat = (sizes.vector // 1024, 1024)
    gain = torch.ones(1024)
    square = (n, n)
    heads = (1, 8, s, d)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.transpose(-2, -1) / math.sqrt(d)).softmax(-1) @ value

    def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    product = torch.matmul
    many = sizes.tokens * 8
    cached, two = (1, 8, many, d), (1, 2, many, d)
    return [
        Operation("vector sum", "1 / 12", 1 / 12, torch.add, turns(flat, flat)),
        Operation("softmax", "5 / 8", 5 / 8, lambda x: x.softmax(-1), turns(flat)),
        Operation(
            "layer norm", "7 / 8", 7 / 8, lambda x: F.layer_norm(x, (1024,), gain), turns(flat)
        ),
        Operation("GELU", "8 / 8", 1.0, F.gelu, turns(flat)),
        Operation("matrix product", "n / 6", n / 6, product, turns(square, square)),
        *(
            Operation(
                f"product, {rows} row{'s' * (rows > 1)}",
                f"{rows} n / (2 (n + {2 * rows}))".removeprefix("1 "),
                rows * n / (2 * (n + 2 * rows)),
                product,
                turns((rows, n), (n, n)),
            )
            for rows in (16, 4, 2, 1)
        ),
        Operation("attention, fused", "s / 4", s / 4, attend, turns(*[heads] * 3)),
        Operation(
            "attention, unfused",
            "(4 d + 6) s / (16 d + 24 s)",
            (4 * d + 6) * s / (16 * d + 24 * s),
            unfused,
            turns(*[heads] * 3),
        ),
        Operation("attention, decoding", "1 / 2", 0.5, attend, turns((1, 8, 1, d), cached, cached)),
        Operation("decoding, 8 of 2 heads", "4 / 2", 2.0, grouped, turns((1, 8, 1, d), two, two)),
    ]


def optimizers(sizes: Sizes) -> list[Operation]:
    """Of vectors of parameters, and of one square matrix."""
    n = sizes.side
    vectors = [torch.randn(sizes.vector // 4) for _ in range(4)]
    found = []
    for name, options, formula, intensity in (
        ("AdamW, fused", {"fused": True}, "15 / 28", 15 / 28),
        ("AdamW", {"foreach": True}, "", math.nan),
    ):
        parameters = [nn.Parameter(vector.clone()) for vector in vectors]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        adamw = torch.optim.AdamW(parameters, lr=1e-3, **options)
        adamw.step()
        found.append(Operation(name, formula, intensity, adamw.step, [()]))
    matrix = nn.Parameter(torch.randn(n, n))
    matrix.grad = torch.randn(n, n)
    muon = Muon([{"params": [matrix], "use_muon": True}], lr=1e-3, backend="newton_schulz")
    muon.step()
    # 15 products over 35 n^2 elements that they read and write; momentum and update besides.
    found.append(Operation("Muon", "3 n / 14, at most", 3 * n / 14, muon.step, [()]))
    return found


def row_of(operation: Operation) -> Found:
    def once() -> None:
        operation.run(*operation.inputs[0])

    with torch.no_grad():
        report = analyze_step(nn.Identity(), once)
        timing = timed(operation.run, time.thread_time, operation.inputs)
    flops = report.total_flops + report.pointwise_flops
    return {
        "name": operation.name,
        "formula": operation.formula,
        "by_formula": operation.intensity,
        "counted": flops / report.bytes,
        "flops_s": flops / timing.seconds,
        "bytes_s": report.bytes / timing.seconds,
        "least": report.least_bytes / report.bytes,
    }


def single(sizes: Sizes) -> list[Found]:
    found = []
    for make in (operations, optimizers):
        for operation in make(sizes):
            found.append(row_of(operation))
            print(found[-1]["name"], flush=True)
    return found


def decoding(sizes: Sizes) -> list[Found]:
    """A step of decoding of a small Llama, whose formula is ``predict_generation``'s."""
    model, prompt, steps = llama(sizes).eval(), sizes.row_tokens * 2, 8
    spec = ModelSpec.from_config(model.config, seq_len=prompt)
    found = []
    with torch.no_grad():
        for batch in (1, 16):
            cache, seconds = DynamicCache(config=model.config), []
            ids = torch.zeros(batch, prompt, dtype=torch.long)
            model(ids, past_key_values=cache, logits_to_keep=1)
            for _ in range(steps):
                start = time.thread_time()
                model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
                seconds.append(time.thread_time() - start)
            report = analyze_step(
                model,
                lambda ids=ids, cache=cache: model(ids[:, :1], past_key_values=cache) and None,
            )
            flops = report.total_flops + report.pointwise_flops
            by_formula = predict_generation(
                spec, "cpu", batch_size=batch, new_tokens=2 * steps, precision="32-true"
            )
            found.append(
                {
                    "name": f"decoding a Llama, batch {batch}",
                    "formula": "`predict_generation`",
                    "by_formula": by_formula.decode.intensity,
                    "counted": flops / report.bytes,
                    "flops_s": flops / median(seconds),
                    "bytes_s": report.bytes / median(seconds),
                    "least": report.least_bytes / report.bytes,
                }
            )
    return found


class Timed(TorchDispatchMode):
    """Seconds of each operation that computes or moves anything, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[tuple[str, float]] = []

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        start = time.thread_time()
        out = func(*args, **(kwargs or {}))
        op = describe(func)
        if op.kind not in (VIEW, QUERY):
            self.seconds.append((op.name, time.thread_time() - start))
        return out


def part_of(record: Record) -> str:
    """Of a step, what an operation is for."""
    inner = record.scope[-1] if record.scope else ""
    if record.phase == OPTIMIZER:
        return "AdamW"
    if record.kind == PRODUCT:
        return "products with weights"
    if record.kind == ATTENTION:
        return "attention"
    if "norm" in inner:
        return "norms"
    if inner.endswith((".mlp", ".act_fn")):
        return "activation"
    if "attn" in inner or "rotary" in inner:
        return "rotary positions"
    return "residuals, loss, sums of gradients"


def training(sizes: Sizes) -> tuple[Any, Callable[[], None]]:
    model = llama(sizes).train()
    ids = torch.randint(0, 4096, (sizes.rows, sizes.row_tokens))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        adamw.zero_grad()
        model(ids, labels=ids).loss.backward()
        adamw.step()

    step()
    return model, step


def parts(sizes: Sizes, of: MachineBalance) -> list[Found]:
    """Parts of a training step: what they compute and move, and how long they really take."""
    model, step = training(sizes)
    report = analyze_step(model, step)
    times = StepTime(report, of).op_times
    repeats = []
    for _ in range(3):
        with Timed() as clock:
            step()
        repeats.append(clock.seconds)
    names = [record.name for record in report.trace.records]
    if any([name for name, _ in seconds] != names for seconds in repeats):
        raise RuntimeError("the steps ran other operations than the one that was analysed")
    summed: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    for place, record in enumerate(report.trace.records):
        into = summed[part_of(record)]
        real = median(seconds[place][1] for seconds in repeats)
        more = (record.flops + record.pointwise_flops, record.bytes, real, times[place].seconds, 1)
        for number, value in enumerate(more):
            into[number] += value
    keys = ("flops", "bytes", "measured_s", "predicted_s", "operations")
    return [{"name": name, **dict(zip(keys, f, strict=True))} for name, f in summed.items()]


def seconds_of(run: Callable[[], object], repeats: int = 3) -> float:
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        run()
        found.append(time.thread_time() - start)
    return median(found)


def batch(sizes: Sizes) -> list[Found]:
    """A training step by rows of 32 tokens: seconds a token, FLOPs a byte."""
    model = llama(sizes).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)
    found = []
    for rows in (1, 2, 4, 8, 16):
        ids = torch.randint(0, 4096, (rows, 32))

        def step(ids: Tensor = ids) -> None:
            adamw.zero_grad()
            model(ids, labels=ids).loss.backward()
            adamw.step()

        step()
        report = analyze_step(model, step)
        a_token = seconds_of(step) / (32 * rows)
        found.append({"rows": rows, "intensity": report.intensity, "s_a_token": a_token})
    return found


def compared(name: str, **runs: tuple[nn.Module, Callable[[], Tensor | None]]) -> list[Found]:
    """Ways to do the same: what each moves, keeps and takes."""
    found = []
    for way, (model, run) in runs.items():

        def whole(run: Callable[[], Tensor | None] = run) -> None:
            loss = run()
            if loss is not None:
                loss.backward()

        whole()
        report = analyze_step(model, run)
        found.append(
            {
                "change": name,
                "way": way.replace("_", " "),
                "flops": report.total_flops,
                "bytes": report.bytes,
                "saved": report.saved_bytes,
                "peak": report.peak_bytes,
                "seconds": seconds_of(whole),
            }
        )
    return found


def fusion(sizes: Sizes) -> list[Found]:
    s, d = sizes.tokens, 64
    query = torch.randn(1, 8, s, d, requires_grad=True)
    x = torch.randn(sizes.vector // 1024, 1024, requires_grad=True)
    gain = nn.Parameter(torch.ones(1024))
    rms = transformers.models.llama.modeling_llama.LlamaRMSNorm(1024)
    module = nn.Identity()

    def attention(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, query, query, is_causal=True).sum()

    flash, math_ = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
    return [
        *compared(
            "attention, forward and backward",
            unfused=(module, lambda: attention(math_)),
            fused=(module, lambda: attention(flash)),
        ),
        *compared(
            "norm, forward and backward",
            RMSNorm_in_pieces=(rms, lambda: rms(x).sum()),
            LayerNorm_in_one_kernel=(module, lambda: F.layer_norm(x, (1024,), gain).sum()),
        ),
    ]


def recomputation(sizes: Sizes) -> list[Found]:
    found = []
    for way in ("all kept", "blocks computed again"):
        model = llama(sizes).train()
        ids = torch.randint(0, 4096, (sizes.rows, sizes.row_tokens))
        if way != "all kept":
            checkpoint_blocks(find_layers(model))
        run = lambda model=model, ids=ids: model(ids, labels=ids).loss  # noqa: E731
        found += compared("recomputation", **{way.replace(" ", "_"): (model, run)})
    return found


def precision(sizes: Sizes) -> list[Found]:
    found = []
    shape, side = (sizes.vector // 1024, 1024), min(sizes.side, 256)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            known = {"device": DEVICE, "dtype": dtype}
            for name, run, shapes in (
                ("vector sum", torch.add, (shape, shape)),
                ("GELU", F.gelu, (shape,)),
                ("matrix product", torch.matmul, ((side, side), (side, side))),
            ):
                inputs = in_turns(*shapes, **known)
                seconds = timed(run, time.thread_time, inputs).seconds
                found.append({"name": name, "dtype": str(dtype)[6:], "seconds": seconds})
    return found


def keep_pages(keep: bool) -> None:
    """Whether memory that was freed stays with the process; glibc's, others do as they do."""
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
    options = (
        {trim_threshold: 2**31 - 1, mmap_max: 0}
        if keep
        else {trim_threshold: 1 << 17, mmap_threshold: 1 << 17, mmap_max: 1 << 16}
    )
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    for option, value in options.items():
        mallopt(option, value)


def pages(sizes: Sizes) -> list[Found]:
    """A sum of vectors into memory that is there, and into pages that the kernel clears first."""
    inputs, found = turns(*[(sizes.vector // 1024, 1024)] * 2), []
    for keep in (False, True):
        keep_pages(keep)
        seconds = timed(torch.add, time.thread_time, inputs).seconds
        found.append({"keep": keep, "bytes_s": 12 * sizes.vector / seconds})
    return found


# Tables


def show(results: dict[str, Any], of: MachineBalance) -> None:
    print(
        f"{of.peak_flops / 1e9:.1f} GFLOP/s, {of.mem_bandwidth / 1e9:.1f} GB/s: ridge "
        f"{of.ridge_point:.2f} FLOPs a byte\n"
    )
    print(
        "| operation | FLOP/B by formula | | counted | GFLOP/s | GB/s | of its roof | bytes if "
        "fused |\n|---|---|---:|---:|---:|---:|---:|---:|"
    )
    for row in [*results["single"], *results["decoding"]]:
        share = row["flops_s"] / of.attainable_flops(row["counted"])
        formula = "" if math.isnan(row["by_formula"]) else f"{row['by_formula']:.3g}"
        print(
            f"| {row['name']} | {row['formula']} | {formula} | {row['counted']:.3g} | "
            f"{row['flops_s'] / 1e9:.3g} | {row['bytes_s'] / 1e9:.3g} | {share:.0%} | "
            f"{row['least']:.0%} |"
        )
    total = {key: sum(r[key] for r in results["parts"]) for key in ("flops", "measured_s", "bytes")}
    predicted = sum(row["predicted_s"] for row in results["parts"])
    print(
        "\n| part of a step | of FLOPs | of bytes | FLOP/B | side | of time, measured | "
        "predicted | operations |\n|---|---:|---:|---:|---|---:|---:|---:|"
    )
    for row in sorted(results["parts"], key=lambda row: -row["measured_s"]):
        intensity = row["flops"] / row["bytes"]
        side = "compute" if intensity > of.ridge_point else "memory"
        print(
            f"| {row['name']} | {row['flops'] / total['flops']:.1%} | "
            f"{row['bytes'] / total['bytes']:.1%} | {intensity:.3g} | {side} | "
            f"{row['measured_s'] / total['measured_s']:.1%} | "
            f"{row['predicted_s'] / predicted:.1%} | {row['operations']:.0f} |"
        )
    print("\n| rows of 32 tokens | FLOP/B | us a token |\n|---:|---:|---:|")
    for row in results["batch"]:
        print(f"| {row['rows']} | {row['intensity']:.3g} | {1e6 * row['s_a_token']:.0f} |")
    print(
        "\n| change | way | GFLOP | MB moved | MB kept | MB at the peak | ms |\n|---|---|---:|---:|"
        "---:|---:|---:|"
    )
    for row in [*results["fusion"], *results["recomputation"]]:
        mega = " | ".join(f"{row[key] / 1e6:.1f}" for key in ("bytes", "saved", "peak"))
        print(
            f"| {row['change']} | {row['way']} | {row['flops'] / 1e9:.2f} | {mega} | "
            f"{1e3 * row['seconds']:.1f} |"
        )
    print("\n| operation | float32 ms | bfloat16 ms | ratio |\n|---|---:|---:|---:|")
    for name in dict.fromkeys(row["name"] for row in results["precision"]):
        wide, half = (row["seconds"] for row in results["precision"] if row["name"] == name)
        print(f"| {name} | {1e3 * wide:.3f} | {1e3 * half:.3f} | {half / wide:.2f} |")
    anew, there = (row["bytes_s"] / 1e9 for row in results["pages"])
    print(
        f"\na sum of vectors: {there:.1f} GB/s into memory that is there, {anew:.1f} into new pages"
    )


def draw(results: dict[str, Any], of: MachineBalance) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    ends = [0.04, of.ridge_point, 600]
    axes.plot(ends, [of.attainable_flops(end) for end in ends], color="black", lw=1.2)
    axes.axvline(of.ridge_point, color="#999999", lw=0.8, ls=":")
    labels: list[tuple[float, float]] = []
    for row in [*results["single"], *results["decoding"]]:
        side = "#0072b2" if row["counted"] > of.ridge_point else "#d55e00"
        axes.scatter(row["counted"], row["flops_s"], color=side, s=28)
        place = (row["counted"], row["flops_s"])
        at = (math.log10(place[0]), math.log10(place[1]))
        near = [x for x, y in labels if abs(at[0] - x) < 0.35 and abs(at[1] - y) < 0.045]
        labels.append(at)
        offset, side = ((-4, 3 if at[0] < near[0] else -8), "right") if near else ((4, 3), "left")
        options = {"textcoords": "offset points", "fontsize": 7, "ha": side}
        axes.annotate(row["name"], place, offset, **options)
    for side, color in (("memory", "#d55e00"), ("arithmetic", "#0072b2")):
        axes.scatter([], [], color=color, label=f"bound by {side}")
    axes.set_xlim(0.02, 1500)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="FLOP/s, measured")
    axes.set_title(
        f"one thread, fp32: {of.peak_flops / 1e9:.0f} GFLOP/s, {of.mem_bandwidth / 1e9:.0f} GB/s, "
        f"ridge at {of.ridge_point:.1f} FLOPs a byte",
        fontsize=10,
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(PICTURE)


def machine(folder: Path) -> MachineBalance:
    """Measured once for all parts."""
    path = folder / "machine.json"
    if not path.exists():
        found = asdict(MachineBalance.measure())
        found["overheads"] = list(found["overheads"].items())
        path.write_text(json.dumps(found))
    known = json.loads(path.read_text())
    return MachineBalance(**{**known, "overheads": dict(known["overheads"])})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="tables of what has been run")
    parser.add_argument("--smoke", action="store_true", help="small sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_pages(True)
    warnings.simplefilter("ignore")
    sizes = SMOKE if arguments.smoke else Sizes()
    folder = CACHE / ("smoke" if arguments.smoke else "full")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    every: dict[str, Callable[[], list[Found]]] = {
        "pages": lambda: pages(sizes),  # while there is no free memory yet
        "single": lambda: single(sizes),
        "decoding": lambda: decoding(sizes),
        "parts": lambda: parts(sizes, machine(folder)),
        "batch": lambda: batch(sizes),
        "fusion": lambda: fusion(sizes),
        "recomputation": lambda: recomputation(sizes),
        "precision": lambda: precision(sizes),
    }
    for name, run in every.items():
        if name not in results and not arguments.report:
            results[name] = run()
            path.write_text(json.dumps(results))
            print(f"{name}: done", flush=True)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {hardware()}")
    print(time.strftime("%F"))
    show(results, machine(folder))
    if not arguments.smoke:
        draw(results, machine(folder))


if __name__ == "__main__":
    main()
