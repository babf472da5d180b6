"""Prevention: what keeps a spiking run calm, each remedy alone and some together.

    python benchmarks/spikes/prevention.py             # some 600 runs of 1.5 s; resumable
    python benchmarks/spikes/prevention.py --report    # tables of what is finished

A Llama of 2 blocks and width 32 learns six novels byte by byte for 400 steps with AdamW as torch
has it, at a peak learning rate of 0.03 with 20 steps of warm-up and linear decay. At steps 100, 200
and 300 come five batches of one letter each. Every run has a twin without them: same weights, same
other batches. A spike is a loss 10 % above the twin's at the same batch, and ends within 5 % of it;
excess loss is the mean difference to the twin on batches of text, in nats.

Tables have median [min, max] of the seeds. Every remedy is run with its usual value, and with the
one of its grid whose planted runs end best on two design seeds; tables are of five others. The
largest stable learning rate is the largest of a ladder with which the planted runs end within 10 %
of the best that the plain run reaches without plants, in the median of two design seeds.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

sys.path.append(str(Path(__file__).parents[1]))

from runs import Runs, arguments, or_inf, read_novels

from lightning_align import StableAdamW
from lightning_align.optimizers.clipping import ZClip, clip_units_, units

SEEDS, DESIGN_SEEDS = range(5), (100, 101)
STEPS, EVERY, BURST = 400, 100, 5  # steps
ROWS, LENGTH = 8, 32
ABOVE, BELOW = 1.1, 1.05  # of the twin's loss: a spike begins and ends
LADDER = (0.01, 0.03, 0.1, 0.3)
REFERENCE = (0.001, 0.003, 0.01, 0.03)  # learning rates of the plain run without plants
STABLE = 1.1  # of the best loss


@dataclass(frozen=True)
class Settings:
    """Of a run: torch's AdamW, and nothing else."""

    lr: float = 0.03
    warmup: int = 20
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    stable: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    z_thres: float | None = None
    agc: float | None = None
    z_loss: float = 0.0
    qk_norm: bool = False


@dataclass(frozen=True)
class Remedy:
    """What is changed, to what, and what else may be tried.

    Attributes:
        setting: Which of ``Settings`` has the value.
        usual: As papers or libraries have it.
        grid: What it is tuned over, besides.
        also: Settings that come with it.
    """

    setting: str
    usual: Any
    grid: tuple[Any, ...] = ()
    also: dict[str, Any] = field(default_factory=dict)

    def settings(self, value: Any) -> Settings:
        return replace(Settings(), **{**self.also, self.setting: value})


TOGETHER = {"beta2": 0.95, "weight_decay": 0.1, "z_loss": 1e-4, "qk_norm": True, "warmup": 40}
REMEDIES = {
    "none": Remedy("lr", 0.03),
    "clip by norm": Remedy("clip_norm", 1.0, (0.1, 0.3, 3.0)),
    "clip by value": Remedy("clip_value", 0.5, (0.003, 0.01, 0.1)),
    "ZClip": Remedy("z_thres", 2.5, (1.5, 4.0, 6.0)),
    "AGC": Remedy("agc", 0.01, (0.003, 0.03, 0.1)),
    "weight decay": Remedy("weight_decay", 0.1, (0.0, 0.3, 1.0)),
    "beta1": Remedy("beta1", 0.95, (0.5, 0.8, 0.98)),
    "beta2": Remedy("beta2", 0.95, (0.9, 0.98, 0.99)),
    "eps": Remedy("eps", 1e-5, (1e-6, 1e-4, 1e-3)),
    "peak lr": Remedy("lr", 0.003, (0.001, 0.01, 0.1)),
    "warm-up": Remedy("warmup", 40, (10, 80, 160)),
    "StableAdamW": Remedy("beta2", 0.99, (0.9, 0.95, 0.999), {"stable": True}),
    "z-loss": Remedy("z_loss", 1e-4, (1e-5, 1e-3, 1e-2)),
    "QK-norm": Remedy("qk_norm", True),
    "together": Remedy("clip_norm", 1.0, (0.1, 0.3, 3.0), TOGETHER),
}


# A run


def batches(seed: int, *, planted: bool) -> list[Tensor]:
    tokens, generator = read_novels(), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH, (STEPS, ROWS, 1), generator=generator)
    letters = torch.randint(97, 123, (STEPS // EVERY,), generator=generator).tolist()
    rows = list(tokens[starts + torch.arange(LENGTH + 1)])
    if planted:
        for step in filter(is_planted, range(STEPS)):
            rows[step] = torch.full_like(rows[step], letters[step // EVERY])
    return rows


def is_planted(step: int) -> bool:
    return step >= EVERY and step % EVERY < BURST


def model_of(settings: Settings) -> nn.Module:
    """A Llama, or the same with the norms of queries and keys that Qwen3 has."""
    make = Qwen3Config if settings.qk_norm else LlamaConfig
    config = make(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


class Clipping:
    """What a run's settings do to gradients before the step."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings, self.parameters = settings, list(model.parameters())
        self.limits = ZClip(z_thres=settings.z_thres or 2.5)
        self.units = units(model)

    def clip_(self) -> None:
        if self.settings.clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters, self.settings.clip_value)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        if self.settings.z_thres is not None:
            norm = float(nn.utils.get_total_norm([p.grad for p in self.parameters]))
            nn.utils.clip_grad_norm_(self.parameters, self.limits.update(norm))
        if self.settings.agc is not None:
            clip_units_(self.units.items(), self.settings.agc)


def factor(step: int, warmup: int) -> float:
    return min((step + 1) / warmup, (STEPS - step) / (STEPS - warmup), 1.0)


def train(settings: Settings, seed: int, *, planted: bool) -> dict[str, Any]:
    """Loss of each step, and of held-out text at the end."""
    torch.manual_seed(seed)
    model = model_of(settings)
    make: Any = StableAdamW if settings.stable else partial(torch.optim.AdamW, fused=True)
    optimizer = make(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    clipping, losses = Clipping(model, settings), []
    for step, ids in enumerate(batches(seed, planted=planted)):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor(step, settings.warmup)
        loss, logits = loss_of(model, ids)
        losses.append(round(float(loss), 4))
        if settings.z_loss:  # PaLM, arXiv:2204.02311, section 5
            loss = loss + settings.z_loss * logits.logsumexp(-1).square().mean()
        loss.backward()
        clipping.clip_()
        optimizer.step()
        optimizer.zero_grad()
    held_out = torch.cat(batches(10**6, planted=False)[:32])
    with torch.no_grad():
        return {"final": round(float(loss_of(model, held_out)[0]), 4), "losses": losses}


def loss_of(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), logits


# What is run: a name says all of it


def name_of(remedy: str, value: Any, lr: float | None, data: str, seed: int) -> str:
    return f"{remedy}={value}/{'' if lr is None else f'lr {lr:g}'}/{data}/{seed}"


def run(name: str) -> dict[str, Any]:
    change, lr, data, seed = name.split("/")
    remedy, text = change.split("=")
    values = (REMEDIES[remedy].usual, *REMEDIES[remedy].grid)
    value = next(value for value in values if str(value) == text)
    settings = REMEDIES[remedy].settings(value)
    if lr:
        settings = replace(settings, lr=float(lr.split()[1]))
    found = train(settings, int(seed), planted=data == "planted")
    if int(seed) in DESIGN_SEEDS:
        found.pop("losses")
    return found


def usual_names(remedy: str, value: Any) -> list[str]:
    twins = ("planted", "clean")
    return [name_of(remedy, value, None, data, seed) for seed in SEEDS for data in twins]


def tuning_names(remedy: str) -> list[str]:
    values = (REMEDIES[remedy].usual, *REMEDIES[remedy].grid)
    return [name_of(remedy, value, None, "planted", s) for value in values for s in DESIGN_SEEDS]


def ladder_names(remedy: str, value: Any) -> list[str]:
    return [name_of(remedy, value, lr, "planted", seed) for lr in LADDER for seed in DESIGN_SEEDS]


def reference_names() -> list[str]:
    value = REMEDIES["none"].usual
    return [name_of("none", value, lr, "clean", seed) for lr in REFERENCE for seed in DESIGN_SEEDS]


def tuned(runs: Runs, remedy: str) -> Any | None:
    """The best value on the design seeds; None while some are missing."""
    finals: dict[Any, float] = {}
    for value in (REMEDIES[remedy].usual, *REMEDIES[remedy].grid):
        names = [name_of(remedy, value, None, "planted", seed) for seed in DESIGN_SEEDS]
        if not all(name in runs.found for name in names):
            return None
        finals[value] = median(runs.found[name]["final"] for name in names)
    return min(finals, key=lambda value: or_inf(finals[value]))


# Tables


def spikes(losses: list[float], twin: list[float]) -> int:
    count, inside = 0, False
    for step, (loss, usual) in enumerate(zip(losses, twin, strict=True)):
        if is_planted(step):
            continue
        if not inside and not loss <= ABOVE * usual:
            count, inside = count + 1, True
        elif inside and loss < BELOW * usual:
            inside = False
    return count


def excess(losses: list[float], twin: list[float]) -> float:
    pairs = zip(losses, twin, strict=True)
    differences = [a - b for step, (a, b) in enumerate(pairs) if not is_planted(step)]
    return sum(differences) / len(differences)


def row(runs: Runs, remedy: str, value: Any, best: float | None) -> None:
    found = []
    for seed in SEEDS:
        names = [name_of(remedy, value, None, data, seed) for data in ("planted", "clean")]
        if all(name in runs.found for name in names):
            found.append([runs.found[name] for name in names])
    if not found:
        return
    rate = spread([1000 / STEPS * spikes(a["losses"], b["losses"]) for a, b in found], 1)
    area = spread([excess(a["losses"], b["losses"]) for a, b in found])
    final = spread([a["final"] for a, _ in found])
    clean = f"{median(b['final'] for _, b in found):.3f}"
    lr = largest_lr(runs, remedy, value, best)
    print(f"| {remedy}, {value} ({len(found)}) | {rate} | {area} | {final} | {clean} | {lr} |")


def spread(values: list[float], digits: int = 3) -> str:
    numbers = [or_inf(value) for value in values]
    low, middle, high = (f"{f(numbers):.{digits}f}" for f in (min, median, max))
    return f"{middle} [{low}, {high}]"


def best_clean(runs: Runs) -> float | None:
    names = reference_names()
    if not all(name in runs.found for name in names):
        return None
    finals = [runs.found[name]["final"] for name in names]
    pairs = zip(*[iter(finals)] * len(DESIGN_SEEDS), strict=True)  # those of a learning rate
    return min(median(map(or_inf, pair)) for pair in pairs)


def largest_lr(runs: Runs, remedy: str, value: Any, best: float | None) -> str:
    names = ladder_names(remedy, value)
    if best is None or not all(name in runs.found for name in names):
        return ""
    stable = [
        lr
        for lr in LADDER
        if median(
            or_inf(runs.found[name_of(remedy, value, lr, "planted", seed)]["final"])
            for seed in DESIGN_SEEDS
        )
        <= STABLE * best
    ]
    return f"{max(stable):g}" if stable else "none"


def report(runs: Runs) -> None:
    best = best_clean(runs)
    if best is not None:
        print(f"\nbest final loss of the plain run without plants, design seeds: {best:.3f}")
    for title in ("usual value", "tuned"):
        print(f"\n| {title} (seeds) | spikes per 1000 steps | excess loss | final loss", end="")
        print(" | final, nothing planted | largest stable lr |\n|---|---:|---:|---:|---:|---:|")
        for remedy, each in REMEDIES.items():
            value = each.usual if title == "usual value" else tuned(runs, remedy)
            if value is not None and (title == "usual value" or each.grid):
                row(runs, remedy, value, best)


def main() -> None:
    given = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}")
    runs = Runs(given.runs / "prevention.jsonl")
    left = given.limit

    def finish(names: list[str]) -> None:
        nonlocal left
        before = len(runs.found)
        runs.finish(names, run, left)
        left = None if left is None else left - (len(runs.found) - before)

    for remedy, each in REMEDIES.items():
        finish(usual_names(remedy, each.usual))
    for remedy in REMEDIES:
        finish(tuning_names(remedy))
        if (value := tuned(runs, remedy)) is not None:
            finish(usual_names(remedy, value))
    finish(reference_names())
    for remedy, each in REMEDIES.items():
        finish(ladder_names(remedy, each.usual))
        if (value := tuned(runs, remedy)) is not None:
            finish(ladder_names(remedy, value))
    report(runs)


if __name__ == "__main__":
    main()
