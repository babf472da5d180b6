"""Tables and picture of the study: how near the frontier each method ends, and how surely.

A share is a gain over the reference, over the gain of the optimum: of reward less beta times KL, or
of reward at the KL of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import EVERY
from numpy.typing import NDArray

from tests.helpers.enumerable_world import World

PICTURE = Path(__file__).parents[2] / "docs/images/dpo_frontier.png"
# Okabe and Ito's palette, and grey: one for each method.
COLOURS = "#0072B2", "#56B4E9", "#999999", "#D55E00", "#E69F00", "#CC79A7", "#000000", "#009E73"
NEAR = 0.05  # of the best learning rate's share
Array = NDArray[np.float64]


class Runs:
    """Curves of the runs of a batch, with what tells them apart.

    Attributes:
        beta, lr, seed: Of each run.
        reward, kl: (runs, measurements).
        objective_share: Of the optimum's gain in reward less beta times KL, (runs, measurements).
        reward_share: Of the best gain in reward at the same KL, at the end, (runs,).
    """

    def __init__(self, world: World, batch: dict[str, Any]) -> None:
        self.beta, self.lr, self.seed = np.array(batch["settings"][0]).T
        self.reward, self.kl = np.array(batch["rewards"]), np.array(batch["kls"])
        self.start = float(world.reward(world.ref_logps))
        best = {beta: beta * float(world.optimum(beta)[1].mean()) for beta in set(self.beta)}
        most = np.array([best[beta] for beta in self.beta])[:, None]
        objective = self.reward - self.beta[:, None] * self.kl
        self.objective_share = (objective - self.start) / (most - self.start)
        kl, reward = frontier(world)
        at_same_kl = np.interp(self.kl[:, -1], kl, reward) - self.start
        self.reward_share = (self.reward[:, -1] - self.start) / at_same_kl

    @property
    def betas(self) -> list[float]:
        return sorted(set(self.beta))


def frontier(world: World) -> tuple[Array, Array]:
    """KL and reward of the optima, by rising KL."""
    betas = torch.logspace(2, -2, 400, dtype=torch.float64)
    kl, reward = world.frontier(betas)
    return kl.numpy(), reward.numpy()


def report(world: World, taus: dict[float, float], results: dict[str, Any]) -> None:
    """Print what is there, and draw it."""
    models = results["reward model"]
    if models is None:
        print("Nothing is finished.")
        return
    losses = ", ".join(f"{loss:.4f}" for loss in models["losses"])
    print(f"reward models on new pairs, by learning rate: {losses}; best {models['best']:g}")
    least = float(least_loss(world))
    print(f"least loss that is possible there: {least:.4f}")
    print(f"IPO's tau: {', '.join(f'{beta:g}: {tau:.4f}' for beta, tau in taus.items())}\n")
    methods = results["methods"]
    if not methods:
        return
    sweeps = {method: Runs(world, one["sweep"]) for method, one in methods.items()}
    finals = {method: Runs(world, one["final"]) for method, one in methods.items()}
    table("reward / KL", finals, plane, optimum_of=world)
    table("% of the best gain in reward at this KL", finals, at_the_same_kl)
    table("% of the gain in reward less beta KL", finals, of_the_objective)
    table("largest less smallest of five seeds, points of that", finals, seed_spread)
    table("points lost since the best measurement", finals, lost)
    table("learning rate", finals, lambda runs, beta: f"{runs.lr[runs.beta == beta][0]:g}")
    table(f"learning rates within {NEAR * 100:.0f} points of the best", sweeps, near_best)
    table("sweep: runs below the reference or not finite", sweeps, diverged)
    table("steps to 90 % of its own best", finals, own_steps)
    leading = best_of_all(finals)
    table(
        "steps to 90 % of the best of any method",
        finals,
        lambda runs, beta: steps_to(runs, beta, 0.9 * leading[beta]),
    )
    print("CPU seconds of a run, its steps alone, in the batch of the sweep:")
    for method, one in methods.items():
        print(f"  {method}: {one['sweep']['cpu_s'] / len(sweeps[method].beta):.2f}")
    draw(world, sweeps, finals)


def least_loss(world: World) -> torch.Tensor:
    """Entropy of a preference between two responses of the reference, in nats."""
    total = torch.zeros((), dtype=torch.float64)
    for rewards, logps in zip(world.rewards, world.ref_logps, strict=True):
        p = torch.sigmoid(rewards.unsqueeze(1) - rewards)
        entropy = -(p * p.log() + (1 - p) * (1 - p).log())
        total += logps.exp() @ entropy @ logps.exp() / len(world.rewards)
    return total


def table(
    title: str,
    methods: dict[str, Runs],
    cell: Callable[[Runs, float], str],
    *,
    optimum_of: World | None = None,
) -> None:
    betas = next(iter(methods.values())).betas
    print(f"| {title} | " + " | ".join(f"beta {beta:g}" for beta in betas) + " |")
    print("|---|" + "---:|" * len(betas))
    if optimum_of is not None:
        optima = [optimum_of.optimum(beta)[0] for beta in betas]
        cells = [f"{optimum_of.reward(o):.2f} / {optimum_of.kl(o):.2f}" for o in optima]
        print(f"| the optimum | {' | '.join(cells)} |")
    for method, runs in methods.items():
        print(f"| {method} | " + " | ".join(cell(runs, beta) for beta in betas) + " |")
    print()


def median_and_ends(values: Array) -> str:
    low, middle, high = np.quantile(100 * values, [0, 0.5, 1])
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def plane(runs: Runs, beta: float) -> str:
    these = runs.beta == beta
    return f"{np.median(runs.reward[these, -1]):.2f} / {np.median(runs.kl[these, -1]):.2f}"


def at_the_same_kl(runs: Runs, beta: float) -> str:
    return median_and_ends(runs.reward_share[runs.beta == beta])


def of_the_objective(runs: Runs, beta: float) -> str:
    return median_and_ends(runs.objective_share[runs.beta == beta, -1])


def seed_spread(runs: Runs, beta: float) -> str:
    return f"{100 * np.ptp(runs.objective_share[runs.beta == beta, -1]):.1f}"


def lost(runs: Runs, beta: float) -> str:
    shares = runs.objective_share[runs.beta == beta]
    return f"{100 * np.median(shares.max(1) - shares[:, -1]):.1f}"


def of_rates(runs: Runs, beta: float) -> tuple[Array, Array]:
    """Learning rates of the sweep, and the last share of each on average over tuning seeds."""
    lrs = np.unique(runs.lr)
    shares = [runs.objective_share[(runs.beta == beta) & (runs.lr == lr), -1].mean() for lr in lrs]
    return lrs, np.array(shares)


def near_best(runs: Runs, beta: float) -> str:
    lrs, shares = of_rates(runs, beta)
    return f"{(shares >= np.nanmax(shares) - NEAR).sum()} of {len(lrs)}"


def diverged(runs: Runs, beta: float) -> str:
    last = runs.objective_share[runs.beta == beta, -1]
    return f"{(~(last > 0)).sum()} of {len(last)}"


def steps_to(runs: Runs, beta: float, wanted: float | Array) -> str:
    """Median over seeds of the first measured step at which a share is reached."""
    shares = runs.objective_share[runs.beta == beta]
    there = shares >= np.asarray(wanted).reshape(-1, 1)
    steps = np.where(there.any(1), (there.argmax(1) + 1) * float(EVERY), np.inf)
    middle = np.median(steps)
    return f"{middle:.0f}" if np.isfinite(middle) else "never"


def own_steps(runs: Runs, beta: float) -> str:
    return steps_to(runs, beta, 0.9 * runs.objective_share[runs.beta == beta].max(1))


def best_of_all(finals: dict[str, Runs]) -> dict[float, float]:
    """For each beta the highest median over seeds that a method ends at."""
    betas = next(iter(finals.values())).betas
    return {
        beta: max(float(np.median(r.objective_share[r.beta == beta, -1])) for r in finals.values())
        for beta in betas
    }


def draw(world: World, sweeps: dict[str, Runs], finals: dict[str, Runs]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
    plane_axes, rate_axes, step_axes = figure.subplots(1, 3)
    kl, reward = frontier(world)
    plane_axes.plot(kl, reward, color="black", linewidth=1, label="exact frontier")
    beta = 0.3
    for number, (method, final) in enumerate(finals.items()):
        colour, marker = COLOURS[number], "osD^v*Px"[number]
        plane_axes.scatter(
            final.kl[:, -1], final.reward[:, -1], 16, colour, marker, label=method, alpha=0.8
        )
        lrs, shares = of_rates(sweeps[method], beta)
        rate_axes.plot(lrs, shares, color=colour, marker=marker, markersize=4, linewidth=1)
        steps = EVERY * (1 + np.arange(final.reward.shape[1]))
        for curve in final.objective_share[final.beta == beta]:
            step_axes.plot(steps, curve, color=colour, linewidth=0.7)
    plane_axes.set(xlabel="KL to the reference (nats)", ylabel="expected true reward")
    plane_axes.legend(frameon=False, fontsize="x-small")
    rate_axes.set(xlabel=f"peak learning rate (tuning seeds, beta {beta:g})", xscale="log")
    rate_axes.set(ylabel="share of the optimum's reward less beta KL", ylim=(-0.25, 1.03))
    step_axes.set(xlabel=f"optimizer steps (five seeds, beta {beta:g})", ylim=(-0.25, 1.03))
    for axes in (plane_axes, rate_axes, step_axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)
