"""A pipeline trains what one process trains: twenty steps, loss by loss, on every rank."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from lightning_align import Muon
from tests.helpers.pipelines import Run, one_process, pipeline

GPIPE = {"schedule": "GPipe", "num_microbatches": 4}
ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
INTERLEAVED = {"schedule": "Interleaved1F1B", "num_microbatches": 4}
SCHEDULES = [GPIPE, ONE_F_ONE_B, INTERLEAVED]
MUON = partial(Muon, lr=3e-3, adjust_lr_fn="match_rms_adamw")

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate": 2},
    "clipping": {"clip": 0.05, "accumulate": 2},
    "tied": {},
    "varying length": {"data": {"varying": True}},
    "ragged": {"data": {"ragged": True}},
    "muon": {"optimizer": MUON},
}
MODELS = ["llama", "gemma2", "gpt2", "chain"]


def run_of(schedule: dict[str, Any], feature: str, model: str) -> Run:
    options = dict(FEATURES[feature])
    if feature == "tied":
        tie = "tied" if model == "chain" else "tie_word_embeddings"
        options["overrides"] = {tie: True}
        options["clip"] = 0.05
    if model == "chain":
        # The mean of its loss weighs micro-batches alike.
        options["data"] = {"masked": False, **options.get("data", {})}
    return Run(model=model, strategy=schedule, **options)


def train_losses(outcome: dict[str, Any]) -> list[float]:
    """Nats a token. Our modules' own losses are sums over the tokens of a batch."""
    return [logged.get("train_loss", 0.0) for logged in outcome["logged"]]


def drift(run: Run, theirs: dict[str, Any]) -> float:
    """Largest change of a loss in one process when micro-batches are summed in another order."""
    backwards = one_process(replace(run, data={**run.data, "backwards": 4}))
    pairs = zip(train_losses(backwards), train_losses(theirs), strict=True)
    return max(abs(one - other) for one, other in pairs)


def check(run: Run) -> None:
    theirs = one_process(run)
    ours = pipeline(run)
    assert len(theirs["losses"]) == run.steps
    tolerance = 2e-5  # 160 roundings of fp32 sums; a fault moves a loss by percents
    if run.optimizer is MUON:  # it may amplify rounding, as it does in one process
        tolerance = 3 * drift(run, theirs)
        assert 0 < tolerance < 1e-3
    assert train_losses(ours[0]) == pytest.approx(train_losses(theirs), rel=0, abs=tolerance)
    assert ours[0]["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours[0]["losses"] == ours[1]["losses"]
    for name in ("train_loss", "val_loss"):
        assert ours[0]["metrics"][name] == pytest.approx(theirs["metrics"][name], abs=2e-5)
        assert ours[1]["metrics"][name] == ours[0]["metrics"][name]
    if run.model != "chain":
        expected = [logged.get("grad_norm", 0.0) for logged in theirs["logged"]]
        norms = [logged.get("grad_norm", 0.0) for logged in ours[1]["logged"]]
        assert norms == pytest.approx(expected, rel=1e-3)


COVER = [
    (INTERLEAVED, "accumulation", "gemma2"),
    (ONE_F_ONE_B, "tied", "gpt2"),
    (ONE_F_ONE_B, "muon", "chain"),
    (INTERLEAVED, "clipping", "chain"),
    (GPIPE, "varying length", "chain"),
    (ONE_F_ONE_B, "ragged", "chain"),
]


def name_of(value: Any) -> str:
    return value["schedule"] if isinstance(value, dict) else value


@pytest.mark.parametrize(("schedule", "feature", "model"), COVER, ids=name_of)
def test_pipeline_matches_one_process(schedule: dict[str, Any], feature: str, model: str) -> None:
    check(run_of(schedule, feature, model))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_every_combination_matches_one_process(
    schedule: dict[str, Any], feature: str, model: str
) -> None:
    if (schedule, feature, model) not in COVER:
        check(run_of(schedule, feature, model))
