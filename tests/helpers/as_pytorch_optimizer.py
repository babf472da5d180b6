"""A plugin of pytest for pytorch-optimizer's own test suite: one of our classes in place of theirs.

It runs where their ``tests`` are: ``pytest -p as_pytorch_optimizer``. OURS names the class, which
is registered under its name in their registry and as "adamw", so that their wrappers
(Lookahead, TRAC, SAM, PCGrad, ...) wrap it. Of their tests those remain that such a name leads to.
REPORT is the file for what became of them.
"""

import inspect
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pytorch_optimizer import optimizer as theirs
from pytorch_optimizer.base.exception import NegativeLRError, NoSparseGradientError
from pytorch_optimizer.optimizer.muon import utils as their_muon

import lightning_align

OURS = getattr(lightning_align, os.environ["OURS"])
NAME = {"Muon": "muon", "GaLoreAdamW": "galore", "StableAdamW": "stableadamw"}[OURS.__name__]

# Part of a test's name -> why it does not hold here. Whatever else fails is a defect of ours.
DESELECTED = {
    "test_complex_not_supported": "complex parameters are refused, and at construction",
    "complex64": "complex parameters are refused, and at construction",
    "test_maximize": "maximize is refused",
    "'weight_decouple': False": "decay that is added to the gradient is refused",
    "cautious": "updates are not masked",
    "test_muon_high_dimensions": "more than two dimensions are refused",
    "test_sharded_updates": "more than two dimensions are refused",
    "test_muon_use_muon_param": "a group may leave use_muon out",
    "test_tensor_lr[True-adamw": "it is about the foreach kernel of torch's AdamW",
    "test_cpu_offload_optimizer": "it needs a GPU",
}

# Our words for theirs. foreach and capturable say how to compute the same.
RENAMED = {
    "adamw_betas": "betas",
    "ns_coeffs": "ns_coefficients",
    "ns_method": "backend",
    "projection_type": "proj_type",
}
DROPPED = ("foreach", "capturable", "adamw_wd", "use_adjusted_lr")
THEIR_DEFAULTS = {
    "muon": {"ns_dtype": "bfloat16", "backend": "newton_schulz", "weight_decay": 0.0},
}


def in_our_words(options: dict[str, Any]) -> dict[str, Any]:
    ours = {RENAMED.get(name, name): value for name, value in options.items()}
    if ours.get("use_adjusted_lr"):
        ours["adjust_lr_fn"] = "match_rms_adamw"
    if ours.get("proj_type") == "random":
        ours["projection"] = ours.pop("proj_type")
    return {name: value for name, value in ours.items() if name not in DROPPED}


def in_their_words(error: ValueError) -> Exception:
    message = str(error).replace("backend=", "ns_method=")
    if "(lr=" in message:
        return NegativeLRError(-1.0, message)
    if "its gradient is sparse" in message:
        return NoSparseGradientError(NAME, message)
    return ValueError(message)


class Adapted(OURS):  # type: ignore[misc, valid-type]
    """Ours, called with their words, and raising their exceptions."""

    def __init__(self, params: Any, *arguments: Any, **options: Any) -> None:
        options = {**THEIR_DEFAULTS.get(NAME, {}), **in_our_words(options)}
        if isinstance(params, list):
            params = [in_our_words(group) if isinstance(group, dict) else group for group in params]
        try:
            super().__init__(params, *arguments, **options)
        except ValueError as error:
            raise in_their_words(error) from error

    def step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except ValueError as error:
            raise in_their_words(error) from error


Adapted.__name__ = Adapted.__qualname__ = OURS.__name__
Adapted.__signature__ = inspect.signature(OURS)  # type: ignore[attr-defined]


def pytest_configure() -> None:
    # Their lists of what each of their classes can do are made first: what ours cannot do then
    # stays in the suite, and is deselected by name.
    from tests import optimizer_cases, recipes  # noqa: F401

    theirs.OPTIMIZERS.update({NAME: Adapted, "adamw": Adapted})
    if NAME == "muon":
        their_muon.Muon = Adapted


def is_about_ours(item: Any) -> bool:
    """Whether a test is given a name that is now ours or, given none, has one in its code."""
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    parts = [part for value in given for part in (value if isinstance(value, tuple) else (value,))]
    named = {part.lower() for part in parts if isinstance(part, str)} & {*theirs.OPTIMIZERS}
    return bool({NAME, "adamw"} & (named or {*item.function.__code__.co_consts}))


OUTCOMES: Counter[str] = Counter()
REASONS: Counter[str] = Counter()
FAILED: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chosen = []
    for item in filter(is_about_ours, items):
        reasons = [why for part, why in DESELECTED.items() if part in item.name]
        if reasons:
            REASONS[reasons[0]] += 1
        else:
            chosen.append(item)
    items[:] = chosen


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.outcome] += 1
        if report.failed:
            FAILED.append(report.nodeid)


def pytest_sessionfinish() -> None:
    found = {"outcomes": OUTCOMES, "deselected": REASONS, "failed": FAILED}
    Path(os.environ["REPORT"]).write_text(json.dumps(found))
