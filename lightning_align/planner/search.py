"""Ways to train a model on given devices, and which are worth a look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from lightning_align.planner.model_spec import ModelSpec
from lightning_align.planner.parallel_spec import ParallelSpec

if TYPE_CHECKING:
    from lightning_align.planner.hardware_spec import HardwareSpec
    from lightning_align.planner.planner import Plan, Planner

MOST_MICROBATCH = 64
MOST_PIPELINE = 64
TOLD = 1.005  # factor from which on one plan is said to be faster: steps vary by as much
INFINITE = float("inf")
# Schedules beside 1F1B and Interleaved1F1B, and their stages on each rank. They are tried on the
# fastest pipelines, and of orders that take no longer to be built and simulated than all others.
_SCHEDULES = (("GPipe", 1), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2))
MOST_TRIED, MOST_ACTIONS = 6, 4096  # pipelines; their ranks x micro-batches
# Where parameters and optimizer state lie, with ZeRO's stage: what is near comes first.
_TIERS = (
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "none", "none"),
    (3, "none", "none"),
    (2, "none", "cpu"),
    (3, "cpu", "cpu"),
    (2, "none", "nvme"),
    (3, "cpu", "nvme"),
    (3, "nvme", "nvme"),
)


def candidates(
    model: ModelSpec,
    base: ParallelSpec,
    hardware: HardwareSpec,
    refused: Counter[str] | None = None,
) -> Iterator[ParallelSpec]:
    """Every split that the numbers allow, with what the user chose kept.

    Tensor parallelism stays in a node; micro-batches are powers of two up to ``MOST_MICROBATCH``;
    with one device nothing is divided, and state may lie elsewhere. What other schedules give, and
    what fits with activations elsewhere, is up to ``ranked``.

    Args:
        model: What is trained.
        base: Devices, batch, objective, optimizer, precision.
        hardware: On what.
        refused: Gets why other splits are impossible, and how many are by that.
    """
    refused = Counter() if refused is None else refused
    tensor = [t for t in _powers(hardware.devices_per_node) if base.devices % t == 0]
    pipeline = [p for p in _divisors(base.devices) if p <= min(MOST_PIPELINE, model.num_layers)]
    checkpointing = (
        ("none", "full") if model.attention == "fused" else ("none", "selective", "full")
    )
    for t, p, recompute, tier in product(tensor, pipeline, checkpointing, _TIERS):
        if base.devices % (t * p):
            continue
        replicas = base.devices // (t * p)
        if not _is_sensible(tier, p, t, replicas, hardware):
            continue
        schedules = [("1F1B", 1)]
        if p > 1 and model.num_layers >= 2 * p:
            schedules.append(("Interleaved1F1B", 2))
        for micro, (schedule, chunks) in product(_powers(MOST_MICROBATCH), schedules):
            if base.batch_size % (micro * replicas):
                rule = "must be a multiple of micro_batch_size * data_parallel"
                refused[f"global_batch_size={base.batch_size} {rule}"] += 1
                continue
            yield from _made(
                model,
                base,
                refused,
                data_parallel=None,
                tensor_parallel=t,
                sequence_parallel=t > 1 and model.seq_len % t == 0,
                pipeline_parallel=p,
                schedule=schedule,
                num_model_chunks=chunks,
                micro_batch_size=micro,
                global_batch_size=base.batch_size,
                activation_checkpointing=recompute,
                zero_stage=tier[0],
                offload_param=tier[1],
                offload_optimizer=tier[2],
            )


def _is_sensible(
    tier: tuple[int, str, str], p: int, t: int, replicas: int, hardware: HardwareSpec
) -> bool:
    stage, *places = tier
    away = [place for place in places if place != "none"]
    if p > 1 and (stage > 1 or away):
        return False
    if away and t > 1:  # nobody runs both
        return False
    if stage and not away and replicas == 1:
        return False
    no_drives = not hardware.nvme_read_bandwidth
    return not ("nvme" in away and no_drives)


def _made(
    model: ModelSpec, base: ParallelSpec, refused: Counter[str], **changes: object
) -> Iterator[ParallelSpec]:
    """The split, if model and schedule allow it."""
    try:
        made = replace(base, **changes)  # type: ignore[arg-type]
        made.check_model(model)
    except ValueError as error:
        given, _, rule = str(error).partition("): ")
        refused[f"{given.partition('(')[2]} {rule.partition('. ')[0].rstrip('.')}"] += 1
        return
    yield made


def ranked(
    planner: Planner, model: ModelSpec, base: ParallelSpec, refused: Counter[str] | None = None
) -> list[Plan]:
    """All candidates: those that fit by their time, then the others by what is missing.

    Args:
        planner: Who predicts.
        model: What is trained.
        base: Devices, batch, objective, optimizer, precision.
        refused: Gets why other splits are impossible, and how many are by that.

    Raises:
        ValueError: If no split is possible at all.
    """
    plans = [planner.predict(model, each) for each in candidates(model, base, planner.hw, refused)]
    if not plans:
        return [planner.predict(model, base)]  # raises, if it is impossible, with the reason
    plans.sort(key=_rank)
    if plans[0].fits:
        plans += [*_other_schedules(planner, model, plans)]
    else:
        plans += [*_activations_away(planner, plans)]
    return _worth_it(sorted(plans, key=_rank))


def _other_schedules(planner: Planner, model: ModelSpec, plans: list[Plan]) -> Iterator[Plan]:
    """The fastest pipelines in other orders, where these are faster and there is room for them."""
    found = [plan for plan in plans if plan.fits and plan.parallel.pipeline_parallel > 1]
    for plan in found[:MOST_TRIED]:
        split = plan.parallel
        if split.pipeline_parallel * split.num_microbatches > MOST_ACTIONS:
            continue
        for schedule, chunks in _SCHEDULES:
            changes = {"schedule": schedule, "num_model_chunks": chunks}
            for made in _made(model, split, Counter(), **changes):
                other = planner.predict(model, made)
                if other.fits and other.step_time * TOLD < plan.step_time:
                    yield other


def _activations_away(planner: Planner, plans: list[Plan]) -> Iterator[Plan]:
    """Splits whose states are away already, with what forward saves away as well."""
    for plan in plans:
        split = plan.parallel
        if split.offload_optimizer == "none" or split.tensor_parallel > 1:
            continue
        for place in ("cpu", "nvme")[: 2 if planner.hw.nvme_read_bandwidth else 1]:
            yield planner.predict(plan.model, replace(split, offload_activations=place))


def _worth_it(plans: list[Plan]) -> list[Plan]:
    """Those that fit, but for tiers and stages of ZeRO that gain nothing; and all others.

    A gain of less than ``TOLD`` is none.
    """
    near: dict[str, Any] = {"zero_stage": 0, "offload_param": "none", "offload_optimizer": "none"}
    plain = {plan.parallel: plan.step_time for plan in plans if plan.fits}
    seen = set()
    found = []
    for plan in plans:
        split = replace(plan.parallel, **near)
        same = (split, f"{plan.step_time:.3g}")
        is_split = plan.parallel != split and plan.step_time * TOLD > plain.get(split, INFINITE)
        if plan.fits and (same in seen or is_split):
            continue
        seen.add(same)
        found.append(plan)
    return found


def _rank(plan: Plan) -> tuple[float, float, int, float]:
    """What is missing, seconds to three digits, how many tiers take part, bytes."""
    spec = plan.parallel
    places = (spec.offload_param, spec.offload_optimizer, spec.offload_activations)
    away = sum(place != "none" for place in places)
    seconds = float(f"{plan.step_time:.3g}")
    return plan.missing_bytes, seconds, away, plan.memory_per_device


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
