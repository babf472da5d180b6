from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align import DPOModule
from lightning_align.layers import find_layers
from lightning_align.modules import causal_lm, frozen_reference
from lightning_align.modules.frozen_reference import FrozenReference
from tests.helpers.tiny_models import TINY_MODELS


def test_a_policy_that_has_learned_is_its_own_reference_no_more() -> None:
    model = TINY_MODELS["llama"]()
    for step, expected in ((0, True), (1, False)):
        reference = FrozenReference("Test")
        reference.adopt_policy(model)
        checkpoint = {"reference": reference.fingerprint, "global_step": step}
        reference.load(checkpoint, model)
        assert reference.is_policy is expected


def test_another_reference_than_a_checkpoint_s_is_refused() -> None:
    policy = find_layers(TINY_MODELS["llama"]())
    ours, theirs = FrozenReference("Test"), FrozenReference("Test")
    ours.adopt(TINY_MODELS["llama"](), policy)
    other = TINY_MODELS["llama"]()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    theirs.adopt(other, policy)
    with pytest.raises(ValueError, match=r"Test\(ref_model='Llama.*differs in its weights\. Pass"):
        ours.load({"reference": theirs.fingerprint, "global_step": 1}, policy.model)
    with pytest.raises(ValueError, match="must be another object than model"):
        ours.adopt(policy.model, policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_cache_dir": "x"}, "serves precompute_ref_log_probs=True alone"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "does nothing with loss_type="),
        ({"loss_type": "simpo", "ref_model": TINY_MODELS["llama"]()}, "must be None with loss_ty"),
        ({"loss_type": "kto", "precompute_ref_log_probs": True}, "drawn anew for each batch"),
    ],
    ids=str,
)
def test_arguments_that_do_nothing_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        DPOModule(TINY_MODELS["llama"](), **options)


@pytest.mark.parametrize(
    ("ref_model", "asked", "expected"),
    [
        ("a/policy", None, "v2"),
        ("a/policy", "v1", "v1"),
        ("a/reference", None, "main"),
        ("a/reference", "v1", "v1"),
    ],
)
def test_a_reference_of_the_hub_is_read_at_its_own_revision(
    ref_model: str, asked: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []

    def build(name: str, *, revision: str = "main", **_: Any) -> torch.nn.Module:
        read.append((name, revision))
        return TINY_MODELS["llama"]()

    for module in (causal_lm, frozen_reference):
        monkeypatch.setattr(module, "build_model", build)
    DPOModule("a/policy", ref_model, revision="v2", ref_model_revision=asked)
    assert read == [("a/policy", "v2"), (ref_model, expected)]


def test_a_revision_without_a_name_is_refused() -> None:
    rule = r"ref_model_revision='v1'\): serves a name on the hub alone, and ref_model is NoneType"
    with pytest.raises(ValueError, match=rule):
        DPOModule(TINY_MODELS["llama"](), ref_model_revision="v1")
