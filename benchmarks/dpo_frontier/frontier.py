"""Reward against KL: DPO, IPO, SFT, PPO and REINFORCE where the frontier is known exactly.

    python benchmarks/dpo_frontier/frontier.py             # 3 minutes on one core; resumable
    python benchmarks/dpo_frontier/frontier.py --report    # tables and picture of what is finished

8 prompts, 1296 responses of 4 symbols each: expected reward, KL to the reference and the best
reward at any KL are sums. The policy is a small autoregressive network, which begins as the
reference; that has learned a made-up language of its own. True rewards have a standard deviation
of 1 over all responses, and label 8192 pairs of the reference for each seed (Bradley-Terry).

1. Reward models are swept over LRS on the tuning seeds, and judged by their loss on new pairs.
2. Every method is swept over LRS at each beta on the tuning seeds; the rate is best whose last step
   has the highest mean of reward less beta times KL.
3. With it each beta is run on the five seeds that are reported, which had no part in any choice.

Every method has as many runs, optimizer steps and completions a step, warm-up and decay, and is
measured at its last step: none is stopped where it was best. IPO's tau is the one at which its own
optimum has the KL of the optimum at beta. All runs of a method are trained as one batch.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # hardware
from methods import EVERY, METHODS, PAIRS, STEPS, Study, draw_pairs, reward_models, run
from networks import CONTEXTS, Adam, Weights, initial, outputs, policy_table
from report import report
from torch import Tensor

from tests.helpers.enumerable_world import PLACES, PROMPTS, SYMBOLS, World, random_reward

BETAS = (0.1, 0.3, 1.0, 3.0)
LRS = tuple(5e-4 * 2**k for k in range(8))  # to 0.064
TUNING_SEEDS, SEEDS = (100, 101), (0, 1, 2, 3, 4)
CACHE = Path(__file__).parents[1] / "cache/dpo_frontier"


@cache
def reference() -> tuple[World, Weights]:
    """The world, and the weights of its reference, which has learned a language by heart."""
    generator = torch.Generator().manual_seed(7)
    rewards = random_reward(generator)
    # What the language says next depends on the prompt and the place, and on what was said last.
    of_place = torch.randn(PROMPTS, PLACES, SYMBOLS, generator=generator)
    of_last = torch.randn(SYMBOLS + 1, SYMBOLS, generator=generator)
    prompt, last_of, place = CONTEXTS.split([PROMPTS, (PLACES - 1) * SYMBOLS, PLACES], 1)
    number = place.argmax(1)
    symbols = last_of.view(-1, PLACES - 1, SYMBOLS)[torch.arange(len(place)), number - 1].argmax(1)
    last = torch.where(number == 0, SYMBOLS, symbols)
    target = (of_place[prompt.argmax(1), number] + of_last[last]).softmax(-1)
    weights = initial(CONTEXTS.shape[1], SYMBOLS, [generator])
    adam = Adam(weights, torch.tensor([1e-2]), 400)
    frequency = (float(SYMBOLS) ** -number).unsqueeze(1)  # all lengths alike
    for _ in range(400):
        logps = outputs(weights, CONTEXTS.unsqueeze(0))[0].log_softmax(-1)
        adam.step(-(frequency * target * logps).sum() / PLACES / PROMPTS)
    weights = [weight.detach() for weight in weights]
    return World(rewards, policy_table(weights)[0]), weights


@cache
def taus() -> dict[float, float]:
    """For each beta the tau at which IPO's optimum has the same KL, by bisection."""
    world, _ = reference()
    found = {}
    for beta in BETAS:
        wanted = world.kl(world.optimum(beta)[0])
        low, high = 1e-4, 10.0
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (
                (middle, high) if world.kl(world.ipo_optimum(middle)) > wanted else (low, middle)
            )
        found[beta] = middle
    return found


def study(settings: list[tuple[float, float, int]], rm_lr: float, steps: int = STEPS) -> Study:
    """Of runs, each (beta, learning rate, seed)."""
    world, weights = reference()
    betas, lrs, seeds = zip(*settings, strict=True)
    of_runs = torch.tensor(betas, dtype=torch.float64), torch.tensor(lrs), list(seeds)
    return Study(world, weights, *of_runs, rm_lr, taus(), steps)


def kept(name: str, settings: list[Any], compute: Any, *, allowed: bool) -> dict[str, Any] | None:
    """What the batch of this name found with these settings; it is run if it has not been."""
    path = CACHE / f"{name}.json"
    settings = json.loads(json.dumps(settings))
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if found.get("settings") == settings:
        return found
    if not allowed:
        return None
    from tests.helpers.learning_runs import keep  # imports Lightning, which a report does without

    start = time.process_time()
    found = {"settings": settings, **compute()}
    found["total_cpu_s"] = time.process_time() - start
    keep(found, path)
    print(f"{name}: {found['total_cpu_s']:.0f} s of CPU", file=sys.stderr, flush=True)
    return found


def tune_reward_model() -> dict[str, Any]:
    """Loss of reward models on pairs that they have not seen, of each learning rate."""
    world, _ = reference()
    losses = []
    for lr in LRS:
        these = study([(1.0, lr, seed) for seed in TUNING_SEEDS], lr)
        table = reward_models(these, these.lrs, these.generators(2))
        losses.append(held_out_loss(table, draw_pairs(world, PAIRS, these.generators(5))))
    return {"losses": losses, "best": LRS[losses.index(min(losses))]}


def held_out_loss(rewards_GXY: Tensor, pairs_G3N: Tensor) -> float:
    groups = torch.arange(len(rewards_GXY)).unsqueeze(1)
    prompts, chosen, rejected = pairs_G3N.transpose(0, 1)
    margins = rewards_GXY[groups, prompts, chosen] - rewards_GXY[groups, prompts, rejected]
    return float(-torch.nn.functional.logsigmoid(margins).mean())


def best_lrs(sweep: dict[str, Any]) -> dict[float, float]:
    """Of each beta the learning rate with the highest last objective, on average over seeds."""
    last: dict[tuple[float, float], list[float]] = {}
    for (beta, lr, _), rewards, kls in zip(
        sweep["settings"][0], sweep["rewards"], sweep["kls"], strict=True
    ):
        objective = rewards[-1] - beta * kls[-1]
        last.setdefault((beta, lr), []).append(objective if objective == objective else -1e9)
    return {
        beta: max((lr for b, lr in last if b == beta), key=lambda lr: sum(last[beta, lr]))
        for beta in BETAS
    }


def results(methods: Iterable[str], *, allowed: bool) -> dict[str, Any]:
    """What is finished of these methods, and with ``allowed`` all of it."""
    constants = [STEPS, EVERY, PAIRS]
    models = kept("reward-model", [LRS, *constants], tune_reward_model, allowed=allowed)
    found: dict[str, Any] = {"reward model": models, "methods": {}}
    if models is None:
        return found
    for method in methods:
        name = method.lower().replace(", ", "-").replace(" ", "-")
        grid = [(beta, lr, seed) for beta in BETAS for lr in LRS for seed in TUNING_SEEDS]

        def train(settings: Any, method: str = method) -> Any:
            return lambda: run(method, study(settings, models["best"]))

        sweep = kept(f"{name}-sweep", [grid, *constants], train(grid), allowed=allowed)
        if sweep is None:
            continue
        lrs = best_lrs(sweep)
        runs = [(beta, lrs[beta], seed) for beta in BETAS for seed in SEEDS]
        final = kept(name, [runs, *constants], train(runs), allowed=allowed)
        if final is not None:
            found["methods"][method] = {"sweep": sweep, "final": final}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from hardware import hardware

    print(f"{hardware()}; Python {platform.python_version()}, torch {torch.__version__}")
    found = results(arguments.methods, allowed=not arguments.report)
    report(reference()[0], taus(), found)


if __name__ == "__main__":
    main()
