"""``lightning-align plan``: what fits, how fast, at what price, and what would change it."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_align._errors import argument_error, finite_number
from lightning_align.cli.commands import CommandParser

# The help needs no torch: what does is imported where it is used.
if TYPE_CHECKING:
    from lightning_align.planner import HardwareSpec, ModelSpec, ParallelSpec, Plan
    from lightning_align.planner.failures import TimeToTrain


def plan(
    model: str,
    hardware: list[str],
    *,
    tokens_per_batch: int | None = None,
    seq_len: int | None = None,
    optimizer: str | None = None,
    rank: int | None = None,
    lisa_layers: int | None = None,
    objective: str | None = None,
    reference: str | None = None,
    shared_prefix: float = 0.0,
    precision: str | None = None,
    memory_limit: str | None = None,
    top_k: int = 5,
    train_tokens: float | None = None,
    mtbf: str | None = None,
    checkpoint_time: str = "1min",
    restart_time: str = "10min",
    checkpoint_interval: str | None = None,
    new_tokens: int | None = None,
    runnable: bool = False,
    output: str | Path | None = None,
    json_file: str | Path | None = None,
    png: str | Path | None = None,
) -> Iterator[str]:
    """Rank the ways to train a model on given hardware; yields lines of text.

    Args:
        model: Hugging Face name, folder, or the YAML of a run.
        hardware: Number and name of devices, such as 8xh100-sxm, and the price of an hour of one,
            8xh100-sxm@2.5, in any currency; may be given several times. 2xhere is two of this
            machine, which is measured in ten seconds; of a CPU each is a core.
        tokens_per_batch: Tokens of a step, over all devices, of which whole rows are taken; default
            a row on each.
        seq_len: Tokens of a row; default what the model or its file says, at most 4096.
        optimizer: adamw, stable_adamw, muon, galore_adamw or sgd; default what the file of a run
            says, else adamw.
        rank: Rank of GaLore's projections; default the file's, else 128.
        lisa_layers: Blocks that LISA trains at a time; default the file's, else all.
        objective: pretrain or dpo, whose rows are pairs; default the file's, else pretrain.
        reference: Of dpo, model, precomputed or none; default the file's, else model.
        shared_prefix: Of dpo, share of a row that both of a pair have in common, their prompt;
            it is computed once where DPOModule shares prefixes.
        precision: 32-true, bf16-mixed, 16-mixed, bf16-true, bf16-master or 16-master; default the
            file's, else bf16-mixed.
        memory_limit: Memory of a device that may be used, such as 40GB.
        top_k: Lines of the table.
        train_tokens: Tokens of the whole run, for its days and its price.
        mtbf: Mean time between failures of one device, such as 5y, for the days that they take;
            default nothing fails.
        checkpoint_time: Time that a checkpoint stops training.
        restart_time: Time from a failure until training goes on.
        checkpoint_interval: Time between checkpoints, such as 1h; default the best.
        new_tokens: Tokens to generate for prompts of seq_len tokens: generation is planned by batch
            in place of training, on the devices of a node as ranks of tensor parallelism.
        runnable: Whether to rank only what this suite and Lightning run.
        output: YAML to write for the best plan, which fit takes.
        json_file: File to write all figures to.
        png: Picture to write of the memory and the time of each plan (extra: plot).

    Raises:
        ValueError: If a value is out of its range, nothing fits, or a file cannot be written.
    """
    _check_together(dict(locals()))
    from lightning_align.cli import plan_given, plan_yaml
    from lightning_align.cli.plan_generation import generation_of, generation_report
    from lightning_align.cli.plan_report import report, run_of, side_by_side, told_model
    from lightning_align.planner import ModelSpec, Planner, Reliability
    from lightning_align.planner.search import ranked

    if top_k < 1:
        raise argument_error("plan", "top_k", top_k, "must be at least 1")
    if train_tokens is not None and (finite_number(train_tokens) or 0) <= 0:
        raise argument_error("plan", "train_tokens", train_tokens, "must be positive and finite")
    spec = ModelSpec.from_config(model, seq_len=seq_len)
    if new_tokens is not None:
        yield told_model(spec)
        precision = precision or plan_given.DEFAULTS["precision"]
        found = []
        for name in hardware:
            found.append(generation_of(spec, _hardware(name), new_tokens, precision))
            yield from generation_report(found[-1])
        yield from _figures([each.to_dict() for each in found], json_file)
        return
    times = (checkpoint_time, restart_time, checkpoint_interval)
    reliability = None if mtbf is None else Reliability(mtbf, *times)
    asked = {
        "optimizer": optimizer,
        "rank": rank,
        "lisa_layers": lisa_layers,
        "objective": objective,
        "reference": reference,
        "shared_prefix": shared_prefix,
        "precision": precision,
    }
    chosen, of_file = plan_given.chosen(model, asked)
    yield told_model(spec)
    if of_file:
        yield "as its file has it: " + ", ".join(f"{n} {value}" for n, value in of_file.items())
    rows, rounded = _rows(spec, tokens_per_batch, chosen["objective"])
    yield from rounded
    best: list[Plan] = []
    for name in hardware:
        planner = Planner(_hardware(name)).limited_to(memory_limit)
        base = _base(planner.hw, rows, chosen)
        refused: Counter[str] = Counter()
        everything = ranked(planner, spec, base, refused)
        if runnable:
            everything = [p for p in everything if not plan_yaml.unrunnable(p)]
        fitting = [each for each in everything if each.fits]
        if not fitting:
            planner.recommend(spec, base=base)  # says what is nearest
            rule = "nothing that this suite or Lightning runs fits"
            raise argument_error("plan", "runnable", True, rule, "Leave it out to see what does")
        best.append(fitting[0])
        told = (planner, fitting, everything, refused, top_k, train_tokens, reliability)
        yield from report(*told)
    if len(best) > 1:
        yield from ["", *side_by_side(best, train_tokens, reliability)]
    runs = [run_of(each, train_tokens or 0.0, reliability) for each in best] if reliability else []
    yield from _written(model, best, runs, output, json_file, png)


_OF_FAILURES = ("checkpoint_time", "restart_time", "checkpoint_interval")
_OF_GENERATION = ("model", "hardware", "seq_len", "precision", "new_tokens", "json_file")


def _check_together(given: Mapping[str, Any]) -> None:
    """Refuse arguments that would do nothing beside the others."""
    parameters = inspect.signature(plan).parameters
    changed = [name for name in parameters if given[name] != parameters[name].default]
    rules = {}
    if given["new_tokens"] is not None:
        rule = "is about training, and new_tokens plans generation in its place"
        rules = {name: rule for name in changed if name not in _OF_GENERATION}
    elif given["mtbf"] is None:
        rules = {name: "says nothing without mtbf" for name in changed if name in _OF_FAILURES}
    elif given["train_tokens"] is None:
        rules = {"mtbf": "says how long a run takes, whose tokens are not given in train_tokens"}
    for name, rule in rules.items():
        raise argument_error("plan", name, given[name], rule)


def _hardware(text: str) -> HardwareSpec:
    """Hardware by its name, with the price after an @."""
    import torch

    from lightning_align.planner import HardwareSpec

    name, _, price = text.partition("@")
    here = re.fullmatch(r"(?:([1-9]\d*)x)?here", name)
    try:
        changes = {"price_per_hour": float(price)} if price else {}
        if here:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return HardwareSpec.measure(device, disk=".", devices=int(here[1] or 1), **changes)
        return HardwareSpec.from_name(name, **changes)
    except ValueError as error:
        if "could not convert" not in str(error):
            raise
        rule = "what is after @ must be the price of an hour of one device"
        raise argument_error("plan", "hardware", text, rule, "Such as 8xh100-sxm@2.5") from error


def _rows(spec: ModelSpec, tokens: int | None, objective: str) -> tuple[int | None, list[str]]:
    """Rows, or pairs, of a step; None for one on each device; and what was rounded."""
    if tokens is None:
        return None, []
    what, a_row = ("pair", 2 * spec.seq_len) if objective == "dpo" else ("row", spec.seq_len)
    rows, over = divmod(tokens, a_row)
    if rows < 1:
        rule = f"must hold at least one row of {a_row} tokens"
        raise argument_error("plan", "tokens_per_batch", tokens, rule)
    told = f"a batch has {rows:,} {what}s of {a_row:,} tokens, {rows * a_row:,} of the {tokens:,}"
    return rows, [f"{told} in tokens_per_batch"] * bool(over)


def _base(hw: HardwareSpec, rows: int | None, chosen: dict[str, Any]) -> ParallelSpec:
    from lightning_align.planner import ParallelSpec

    rows = rows or hw.devices
    if rows % hw.devices:  # only splits with fewer replicas can take them
        chosen = {**chosen, "pipeline_parallel": hw.devices}
    return ParallelSpec(devices=hw.devices, global_batch_size=rows, **chosen)


def _written(
    model: str,
    best: Sequence[Plan],
    runs: Sequence[TimeToTrain],
    output: str | Path | None,
    json_file: str | Path | None,
    png: str | Path | None,
) -> Iterator[str]:
    from lightning_align.cli import plan_yaml
    from lightning_align.cli.plan_report import split_of
    from lightning_align.cli.plan_run import run_for
    from lightning_align.planner.plan_plot import draw_plans

    if output is not None:
        winner = max(best, key=lambda each: each.tokens_per_second)
        run, changed = run_for(model, winner.parallel.objective)
        yield from changed
        content = plan_yaml.configuration(winner, run)
        told = f"{winner.step_time:.3g} s a step on {winner.parallel.devices} x"
        head = f"Planned: {split_of(winner.parallel)}; {told} {winner.hardware.name}.\n"
        plan_yaml.write(output, content, f"{head}  lightning-align fit -c {Path(output).name}")
        refused = plan_yaml.checked(output)
        if refused:
            raise argument_error("plan", "output", str(output), f"fit does not take it: {refused}")
        yield f"wrote {output}"
    if json_file is not None:
        more = [{"time_to_train": {**asdict(run), "seconds": run.seconds}} for run in runs]
        every = zip(best, more or [{}] * len(best), strict=True)
        yield from _figures([each.to_dict() | added for each, added in every], json_file)
    if png is not None:
        yield _save("png", png, lambda path: draw_plans(path, best))


def _figures(content: list[dict[str, Any]], json_file: str | Path | None) -> Iterator[str]:
    if json_file is not None:
        text = json.dumps(content, indent=1)
        yield _save("json_file", json_file, lambda path: path.write_text(text))


def _save(argument: str, path: str | Path, write: Any) -> str:
    try:
        write(Path(path))
    except (OSError, ValueError, ImportError) as error:
        rule = f"cannot be written: {str(error).rstrip('.')}"
        raise argument_error("plan", argument, str(path), rule) from error
    return f"wrote {path}"


def parser() -> CommandParser:
    """Options of ``lightning-align plan``."""
    about = "Rank the ways to train a model on given hardware: what fits, how fast, and why."
    made = CommandParser("lightning-align plan", about)
    types: dict[str, Any] = dict.fromkeys(
        ("tokens_per_batch", "seq_len", "rank", "lisa_layers", "top_k", "new_tokens"), int
    )
    types |= {"train_tokens": float, "shared_prefix": float, "runnable": bool}
    described = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(plan) or "", re.M)
    texts = {name: " ".join(text.split()) for name, text in described}
    for name, parameter in inspect.signature(plan).parameters.items():
        more: dict[str, Any] = {"type": types.get(name, str), "help": texts[name]}
        if name == "hardware":
            more["action"] = "append"
        if parameter.default is inspect.Parameter.empty:
            more["required"] = True
        else:
            more["default"] = parameter.default
        made.add_argument(f"--{name}", **more)
    return made


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align plan``."""
    for line in plan(**parser().parse_args(list(arguments)).as_dict()):
        print(line)  # noqa: T201
