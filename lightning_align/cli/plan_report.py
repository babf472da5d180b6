"""What ``lightning-align plan`` says of plans: tables, bars, prices, and what one change gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_align.cli.plan_yaml import unrunnable
from lightning_align.planner import ModelSpec, ParallelSpec, Plan, Planner
from lightning_align.planner.failures import Reliability, TimeToTrain
from lightning_align.planner.quantities import shown, shown_time
from lightning_align.planner.step_cost import all_passes

BAR = 40  # characters of the longest bar
DAY = 86400  # seconds
MOST_REASONS = 3  # why splits are impossible


def told_model(spec: ModelSpec) -> str:
    """A model in a line."""
    sizes = f"{spec.num_layers} blocks of width {spec.hidden_size}, rows of {spec.seq_len} tokens"
    return f"{shown(spec.parameters, '')} parameters: {sizes}"


def report(
    planner: Planner,
    fitting: Sequence[Plan],
    everything: Sequence[Plan],
    refused: Counter[str],
    top_k: int,
    train_tokens: float | None,
    reliability: Reliability | None = None,
) -> list[str]:
    """All that is said of one kind of hardware.

    Args:
        planner: Who predicted.
        fitting: Plans that fit, the fastest first.
        everything: These and all others.
        refused: Why others are impossible, and how many.
        top_k: Lines of the table.
        train_tokens: Tokens of the whole run, if it is to be priced.
        reliability: How often devices fail, if they do.
    """
    winner = fitting[0]
    rows = [["#", "split", "s a step", "tokens/s", "MFU", "memory", "bound by", "runs here"]]
    for number, each in enumerate(fitting[:top_k], start=1):
        rows.append(
            [
                str(number),
                split_of(each.parallel),
                f"{each.step_time:.3g}",
                f"{each.tokens_per_second:,.0f}",
                f"{each.mfu:.1%}",
                shown(each.memory_per_device),
                each.bound,
                "no" if unrunnable(each) else "yes",
            ]
        )
    low, high = winner.interval
    return [
        "",
        f"{planner.hw.devices} x {planner.hw.name}",
        *columns(rows),
        f"the first takes {low:.3g} to {high:.3g} s a step, nine times in ten",
        *_others(fitting, everything, top_k),
        *_impossible(refused),
        "",
        f"memory of a device ({shown(planner.hw.memory)})",
        *_bars(winner.memory_breakdown, shown),
        "",
        "time of a step",
        *_bars(winner.breakdown, lambda seconds: f"{seconds:.3g} s"),
        *_whole_run(winner, train_tokens, reliability),
        "",
        "roofline of a block",
        *columns(roofline(winner)),
        "",
        "what if",
        *columns(what_if(planner, winner)),
    ]


def split_of(parallel: ParallelSpec) -> str:
    """A split in a few words."""
    words = [f"dp {parallel.replicas}"]
    if parallel.tensor_parallel > 1:
        words.append(f"tp {parallel.tensor_parallel}")
    if parallel.pipeline_parallel > 1:
        chunks = f" x {parallel.chunks}" if parallel.chunks > 1 else ""
        known = parallel.schedule in ("1F1B", "Interleaved1F1B")  # by their chunks
        order = "" if known else f" {parallel.schedule}"
        words.append(f"pp {parallel.pipeline_parallel}{chunks}{order}")
    words.append(f"micro-batch {parallel.micro_batch_size}")
    if parallel.zero_stage:
        words.append(f"ZeRO {parallel.zero_stage}")
    for what, tier in (
        ("parameters", parallel.offload_param),
        ("states", parallel.offload_optimizer),
        ("activations", parallel.offload_activations),
    ):
        if tier != "none":
            words.append(f"{what} on {tier}")
    if parallel.activation_checkpointing != "none":
        words.append(f"{parallel.activation_checkpointing} recomputation")
    return ", ".join(words)


def _others(fitting: Sequence[Plan], everything: Sequence[Plan], top_k: int) -> list[str]:
    """Why the rest is not in the table."""
    lines = []
    slower = fitting[top_k:]
    if slower:
        factors = [each.step_time / fitting[0].step_time for each in slower]
        lines.append(
            f"{len(slower)} others fit and take {min(factors):.2f} to {max(factors):.2f} times as "
            "long"
        )
    large = [each for each in everything if not each.fits]
    if large:
        nearest = min(large, key=lambda each: each.missing_bytes)
        faster = min(large, key=lambda each: each.step_time)
        told = f"{split_of(nearest.parallel)} lacks {shown(nearest.missing_bytes)}"
        lines.append(f"{len(large)} do not fit; nearest is {told}")
        if faster.step_time < fitting[0].step_time:
            lacks = f"{faster.step_time:.3g} s, and lacks {shown(faster.missing_bytes)}"
            lines.append(f"the fastest of them would take {lacks}: {split_of(faster.parallel)}")
    return lines


def _impossible(refused: Counter[str]) -> list[str]:
    if not refused:
        return []
    told = "; ".join(f"{why} ({many})" for why, many in refused.most_common(MOST_REASONS))
    return [f"{refused.total()} are impossible: {told}"]


def _bars(parts: Mapping[str, float], text: Callable[[float], str]) -> list[str]:
    largest = max(parts.values())
    rows = [
        [name, text(value), "#" * round(BAR * value / largest)]
        for name, value in parts.items()
        if value > 0.001 * largest
    ]
    return columns(rows)


def roofline(winner: Plan) -> list[list[str]]:
    """The pieces of a block that take longest, by FLOPs a byte, and which side of the ridge.

    Args:
        winner: Whose blocks they are.
    """
    hardware = winner.hardware
    peak = hardware.product_flops(winner.parallel.is_half)
    ridge = peak / hardware.mem_bandwidth
    pieces = [p for work in all_passes(winner.model, winner.parallel)[0] for p in work.pieces]
    summed: dict[str, tuple[float, float, float]] = {}
    for piece in pieces:
        seconds = max(piece.flops / peak, piece.bytes / hardware.mem_bandwidth)
        before = summed.get(piece.name, (0.0, 0.0, 0.0))
        summed[piece.name] = tuple(  # type: ignore[assignment]
            old + new for old, new in zip(before, (seconds, piece.flops, piece.bytes), strict=True)
        )
    whole = sum(seconds for seconds, _, _ in summed.values())
    rows = [["piece", "FLOP/B", f"ridge {ridge:.0f}", "of a block"]]
    for name, (seconds, flops, nbytes) in sorted(summed.items(), key=lambda item: -item[1][0])[:6]:
        side = "compute" if flops / nbytes >= ridge else "memory"
        rows.append([name, f"{flops / nbytes:.3g}", side, f"{seconds / whole:.0%}"])
    return rows


def _whole_run(
    winner: Plan, train_tokens: float | None, reliability: Reliability | None
) -> list[str]:
    lines = []
    price = winner.hardware.price_per_hour
    if price is not None:
        lines.append(f"{price_of(winner, 1e9):,.2f} for a billion tokens")
    if train_tokens is not None:
        days = _days(winner, train_tokens, reliability)
        hours = 24 * days * winner.parallel.devices
        cost = "" if price is None else f", {hours * price:,.0f} in all"
        lines.append(f"{days:,.3g} days for {train_tokens:.3g} tokens{cost}")
        if reliability is not None:
            lines += _failures(run_of(winner, train_tokens, reliability), winner.parallel.devices)
    return ["", *lines] if lines else []


def run_of(plan: Plan, tokens: float, reliability: Reliability) -> TimeToTrain:
    """Time of a whole run, with failures.

    Args:
        plan: How it is trained.
        tokens: Of the run.
        reliability: How often devices fail.
    """
    work_s = tokens / plan.tokens_per_second
    return reliability.time_to_train(work_s, devices=plan.parallel.devices)


def _days(plan: Plan, tokens: float, reliability: Reliability | None) -> float:
    if reliability is None:
        return tokens / plan.tokens_per_second / DAY
    return run_of(plan, tokens, reliability).seconds / DAY


def _failures(run: TimeToTrain, devices: int) -> list[str]:
    """What fails, how often to save, and what both take of the run."""
    parts = {
        "work that stays": run.work_s,
        "checkpoints": run.checkpoints_s,
        "work lost": run.lost_s,
        "restarts": run.restarts_s,
    }
    each = shown_time(run.seconds / run.failures)
    every = shown_time(run.interval_s)
    return [
        f"one of {devices} devices fails every {each}; a checkpoint every {every}",
        *_bars(parts, lambda seconds: f"{seconds / run.seconds:.1%}"),
    ]


def price_of(plan: Plan, tokens: float) -> float:
    """Of some tokens, in the currency of the price of an hour."""
    hours = tokens / plan.tokens_per_second / 3600
    return hours * plan.parallel.devices * (plan.hardware.price_per_hour or 0.0)


def what_if(planner: Planner, winner: Plan) -> list[list[str]]:
    """What one change of the winner would give."""
    parallel, model = winner.parallel, winner.model
    wider = {"micro_batch_size": 2 * parallel.micro_batch_size}
    if parallel.num_microbatches % 2:
        wider["global_batch_size"] = 2 * parallel.batch_size
    changes: list[tuple[str, ModelSpec, dict[str, Any]]] = [
        ("twice the batch", model, {"global_batch_size": 2 * parallel.batch_size}),
        ("twice the micro-batch", model, wider),
        ("rows half as long", model.with_seq_len(max(1, model.seq_len // 2)), {}),
        ("bf16-true", model, {"precision": "bf16-true"}),
        ("Muon", model, {"optimizer": "muon", "rank": None}),
        ("no recomputation", model, {"activation_checkpointing": "none"}),
        ("full recomputation", model, {"activation_checkpointing": "full"}),
    ]
    if parallel.objective == "dpo" and not parallel.shared_prefix:
        changes.append(("prompts of half a row, shared", model, {"shared_prefix": 0.5}))
    if parallel.pipeline_parallel == parallel.tensor_parallel == 1:
        near = {"zero_stage": 3, "offload_param": "cpu", "offload_optimizer": "cpu"}
        far = dict.fromkeys(("offload_param", "offload_optimizer"), "nvme")
        changes.append(("everything in host memory", model, near))
        changes.append(("everything on NVMe", model, {"zero_stage": 3, **far}))
    rows = [["change", "tokens/s", "memory", ""]]
    for name, other, change in changes:
        if all(getattr(parallel, key) == value for key, value in change.items()) and change:
            continue
        try:
            found = planner.predict(other, replace(parallel, **change))
        except ValueError as error:
            rows.append([name, "", "", f"impossible: {_rule(error)}"])
            continue
        ratio = found.tokens_per_second / winner.tokens_per_second - 1
        lacks = "" if found.fits else f"does not fit: lacks {shown(found.missing_bytes)}"
        rows.append([name, f"{ratio:+.1%}", shown(found.memory_per_device), lacks])
    return rows


def _rule(error: ValueError) -> str:
    return str(error).split("): ", 1)[-1].split(". ", 1)[0].rstrip(".")


def side_by_side(
    best: Sequence[Plan], train_tokens: float | None, reliability: Reliability | None = None
) -> list[str]:
    """The best plan of each kind of hardware, a line each.

    Args:
        best: These plans.
        train_tokens: Tokens of the whole run, for its days.
        reliability: How often devices fail, if they do.
    """
    rows = [["hardware", "split", "tokens/s", "MFU", "a billion tokens", "days"]]
    for each in best:
        priced = each.hardware.price_per_hour is not None
        days = _days(each, train_tokens, reliability) if train_tokens else None
        rows.append(
            [
                f"{each.parallel.devices} x {each.hardware.name}",
                split_of(each.parallel),
                f"{each.tokens_per_second:,.0f}",
                f"{each.mfu:.1%}",
                f"{price_of(each, 1e9):,.2f}" if priced else "-",
                "-" if days is None else f"{days:,.3g}",
            ]
        )
    return columns(rows)


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, each column as wide as its widest cell.

    Args:
        rows: Of cells.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
