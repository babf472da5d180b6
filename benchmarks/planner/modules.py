"""Predicted against measured time of the modules of a step, forward and backward together.

    python benchmarks/planner/modules.py            # two minutes on one core
    python benchmarks/planner/modules.py --smoke    # seconds; the figures then mean nothing

The steps are those of ``step_time.py``'s test set, but for the one whose blocks are recomputed: a
hook cannot tell its second forward from backward. Modules are timed by hooks of their inputs and
outputs, those of one depth in a run, so that none has another's hooks inside: forward from call to
return, backward from the gradient of the output to that of the input. Times are CPU time of one
thread, medians of interleaved repeats. Counted are modules that take 2 % of the measured step;
those without a gradient of their input (the embedding) or whose output is no tensor are not timed.
Beside it the share of a step by parameters: what is had without any analysis. Then blocks once more
as ``PipelineStrategy`` times them, each by itself, to cut a model into stages.
"""

import argparse
import os
import platform
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl
import torch
from step_time import Case, cpu_seconds, drawn, step_of
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from lightning_align import MachineBalance, PipelineStrategy, predict_step_time
from lightning_align.strategies.pipeline import layer_costs

LEAST_SHARE = 0.02


class Watch:
    """Seconds of modules, added up while steps run."""

    def __init__(self) -> None:
        self.forward: dict[str, float] = defaultdict(float)
        self.backward: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        handles = []
        for name, module in modules.items():
            begun: dict[str, float] = {}
            before, after = self._hooks(name, begun)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str, begun: dict[str, float]) -> tuple[Any, Any]:
        def ends(_: Tensor) -> None:
            if "backward" in begun:
                self.backward[name] += time.thread_time() - begun.pop("backward")

        def begins(_: Tensor) -> None:
            begun["backward"] = time.thread_time()

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            given = tree_map_only(Tensor, lambda each: _aliased(each, ends), (args, kwargs))
            begun["forward"] = time.thread_time()
            return given

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            self.forward[name] += time.thread_time() - begun.pop("forward")
            return tree_map_only(Tensor, lambda each: _aliased(each, begins), output)

        return before, after


def _aliased(tensor: Tensor, hook: Callable[[Tensor], None]) -> Tensor:
    """The same values behind a node of their own: others that read them have no part in it."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    alias = tensor.view_as(tensor)
    alias.register_hook(hook)
    return alias


def by_depth(model: nn.Module) -> list[dict[str, nn.Module]]:
    found: dict[int, dict[str, nn.Module]] = defaultdict(dict)
    for name, module in model.named_modules():
        if name:
            found[name.count(".")][name] = module
    return list(found.values())


def measured(
    module: nn.Module, step: Callable[[], None], repeats: int
) -> tuple[dict[str, float], float]:
    """Seconds of each module that can be timed, and of the step without hooks."""
    samples: dict[str, list[float]] = defaultdict(list)
    plain = []
    for _ in range(repeats):
        plain.append(cpu_seconds(step))
        for modules in by_depth(module):
            watch = Watch()
            with watch.of(modules):
                step()
            for name, seconds in watch.backward.items():
                samples[name].append(watch.forward[name] + seconds)
    return {name: median(each) for name, each in samples.items()}, median(plain)


def compared(case: Case, hardware: MachineBalance, repeats: int) -> list[tuple[str, float, float]]:
    """Name, and predicted and by parameters over measured, of each module that counts."""
    module, step = step_of(case)
    step()
    step()
    predicted = predict_step_time(module, step, hardware)
    seconds, whole = measured(module, step, repeats)
    size = sum(p.numel() for p in module.parameters())
    found = []
    for name, took in seconds.items():
        if took >= LEAST_SHARE * whole:
            own = sum(p.numel() for p in module.get_submodule(name).parameters())
            naive = whole * own / size / took
            found.append((name, predicted.modules[name].seconds / took, naive))
    return found


def against_pipeline(case: Case, hardware: MachineBalance, folder: str) -> float:
    """Predicted over measured time of a block, as ``PipelineStrategy`` times it to cut the model.

    It times one of a kind. Its clock is the thread's here, so that what else runs is not in it.
    """
    module, _ = step_of(case)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    ids = torch.randint(1, case.vocabulary, (case.rows, case.tokens))
    batch = {"input_ids": ids, "labels": ids}
    predicted = predict_step_time(module, lambda: module.training_step(batch, 0), hardware)
    found: list[layer_costs.LayerCosts] = []
    theirs, clock = layer_costs.time_layers, layer_costs._Timing._now

    def kept(*args: Any) -> layer_costs.LayerCosts:
        found.append(theirs(*args))
        return found[-1]

    layer_costs.time_layers = kept
    layer_costs._Timing._now = lambda _: time.thread_time()
    try:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            strategy=PipelineStrategy(  # two stages: with one there would be nothing to cut
                "Interleaved1F1B", num_microbatches=1, partition_method="profile"
            ),
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([batch], batch_size=None))
    finally:
        layer_costs.time_layers, layer_costs._Timing._now = theirs, clock
    blocks = [cost.seconds for cost in predicted.blocks.values()]
    return 1e3 * blocks[1] / found[0].layers[1]


def named(case: Case) -> str:
    return f"{case.kind}, {case.blocks} x {case.width}, {case.rows} x {case.tokens}"


def report(case: Case, found: list[tuple[str, float, float]]) -> None:
    worst = max(found, key=lambda row: abs(row[1] - 1))
    ours, naive = (100 * mean(abs(row[place] - 1) for row in found) for place in (1, 2))
    print(
        f"| {named(case)} | {len(found)} | {ours:.1f} % | {worst[0].removeprefix('model.')}, "
        f"{worst[1]:.2f} | {naive:.0f} % |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=19, help="of the cases; 19 is the test set")
    parser.add_argument("--smoke", action="store_true", help="one step, few repeats")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # or Lightning sets another number
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {platform.machine()}, 1 thread")
    start = time.process_time()
    hardware = MachineBalance.measure()
    print(f"the machine is measured in {time.process_time() - start:.1f} s of CPU (bar 15)\n")
    cases = [case for case in drawn(arguments.seed) if case.kind != "checkpointed"]
    print("| step | modules | MAPE | worst, predicted / measured | by parameters |")
    print("|---|---:|---:|---|---:|")
    everything = []
    for case in cases[: 1 if arguments.smoke else None]:
        found = compared(case, hardware, 2 if arguments.smoke else 5)
        report(case, found)
        everything += found
    ours, naive = (100 * mean(abs(row[place] - 1) for row in everything) for place in (1, 2))
    print(f"\n{len(everything)} modules: MAPE {ours:.1f} % (bar 25, aim 15); ", end="")
    print(f"by parameters {naive:.0f} %\n")
    print("blocks, predicted / as PipelineStrategy times them:")
    with tempfile.TemporaryDirectory() as folder:
        for case in [case for case in cases if case.kind in ("gpt", "llama")]:
            print(f"- {named(case)}: {against_pipeline(case, hardware, folder):.2f}", flush=True)
            if arguments.smoke:
                break


if __name__ == "__main__":
    main()
