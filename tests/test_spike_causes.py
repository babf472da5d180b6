"""Worked cases of ``name_cause``: a run of 40 calm steps, and what is different at the alarm.

Calm is: loss 2 with a noise of 1 %, learning rate 1e-3, and for each of three layers gradient norm
1, RMS(g / sqrt(v)) 1, updates of 1e-3 of the weights, nothing from outside, weights of norm 10.
"""

import math

import pytest

from lightning_align.spike_causes import (
    Cause,
    Evidence,
    first_to_leave,
    left_since,
    loss_excess,
    name_cause,
    scores,
)

LAYERS = ("embed", "block", "head")
STEPS = 40


def noisy(value, count=STEPS):
    """Up and down by 1 %."""
    return [value * (1 + 0.01 * (-1) ** i) for i in range(count)]


def evidence(**changed):
    def calm(value):
        return {layer: noisy(value) for layer in LAYERS}

    values = {
        "losses": noisy(2.0),
        "lrs": [1e-3] * STEPS,
        "grad_norms": calm(1.0),
        "gradient_ratios": calm(1.0),
        "updates": {layer: [*noisy(1e-3)[:-1], math.nan] for layer in LAYERS},
        "outside": {layer: [0.0] * STEPS for layer in LAYERS},
        "weight_norms": {layer: [10.0] * STEPS for layer in LAYERS},
        "moved": calm(1e-3),
        "reference": (2.0, 2.0),
    }
    return Evidence(**(values | changed))


def ending(history, *values):
    """A history whose last values are others."""
    return [*history[: -len(values)], *values]


def of_layer(histories, layer, *values):
    return histories | {layer: ending(histories[layer], *values)}


LOUD = [*noisy(2.0)[:-1], 6.0]  # the alarm's loss
CALM = evidence()


def kind_and_layer(found):
    cause = name_cause(found)
    return cause.kind, cause.layer


def test_a_loud_batch_beside_a_healthy_one_that_is_still_healthy_is_data():
    cause = name_cause(evidence(losses=LOUD, reference=(2.0, 2.01), batch_losses=[2.0, 10.0]))
    assert cause.kind == "data"
    assert cause.figures["worst_batch"] == 1
    assert cause.figures["usual_loss"] == pytest.approx(2.0, rel=0.01)
    assert cause.figures["healthy_loss_now"] == 2.01
    assert cause.text == (
        "The loss of this window is 6 where 2 is usual, and the batch before it still has 2.01 (was"
        " 2)."
    )


def test_a_batch_may_be_too_easy():
    assert kind_and_layer(evidence(losses=[*noisy(2.0)[:-1], 0.1])) == ("data", None)


def test_without_a_healthy_batch_it_is_data_if_nothing_happened_to_the_weights():
    assert kind_and_layer(evidence(losses=LOUD, reference=None)) == ("data", None)


def test_a_jump_of_the_learning_rate_before_weights_got_worse():
    """Also by the alarm's own rate nothing has moved yet, so that one is no cause."""
    jump = {"losses": LOUD, "reference": (2.0, 5.5)}
    lrs = [1e-3] * (STEPS - 2) + [1e-2] * 2
    cause = name_cause(evidence(lrs=lrs, **jump))
    assert (cause.kind, cause.layer) == ("learning rate", None)
    assert (cause.figures["lr_before"], cause.figures["lr_after"]) == (1e-3, 1e-2)
    assert kind_and_layer(evidence(lrs=[*lrs[:-2], 1e-3, 1e-2], **jump)) == ("unknown", None)


def test_a_jump_of_the_learning_rate_is_no_cause_while_weights_are_well():
    lrs = [1e-3] * (STEPS - 2) + [1e-2] * 2
    assert kind_and_layer(evidence(lrs=lrs, losses=LOUD)) == ("data", None)


def test_a_warmup_is_no_jump():
    lrs = [1e-5 * (i + 10) for i in range(STEPS)]
    assert kind_and_layer(evidence(lrs=lrs, losses=LOUD, reference=(2, 5))) == ("unknown", None)


def test_large_gradients_over_a_small_second_moment_with_a_usual_loss():
    ratios = of_layer(CALM.gradient_ratios, "block", 9.0)
    cause = name_cause(evidence(gradient_ratios=ratios))
    assert (cause.kind, cause.layer) == ("stale second moment", "block")
    assert cause.figures["ratio"] == 9.0
    assert cause.figures["usual_ratio"] == pytest.approx(1.0, rel=0.02)


def test_a_loud_loss_with_such_gradients_is_data_all_the_same():
    """Any gradient that is large at once is large against the second moment."""
    ratios = of_layer(CALM.gradient_ratios, "block", 9.0)
    assert kind_and_layer(evidence(gradient_ratios=ratios, losses=LOUD)) == ("data", None)


def test_such_gradients_before_weights_got_worse():
    ratios = of_layer(CALM.gradient_ratios, "block", 9.0, 1.0, 1.0)
    found = evidence(gradient_ratios=ratios, losses=LOUD, reference=(2.0, 5.0))
    assert kind_and_layer(found) == ("stale second moment", "block")


def test_weights_that_changed_without_a_step_name_their_layer():
    outside = of_layer(CALM.outside, "block", 0.5)
    found = evidence(outside=outside, losses=LOUD, reference=(2.0, 6.0))
    assert kind_and_layer(found) == ("numerics", "block")
    assert kind_and_layer(evidence(outside=outside)) == ("unknown", None), "it hurt nobody"


def test_one_weight_of_many_shows_in_the_norm_only():
    """10 -> 11 is a change of sqrt(11^2 - 10^2) / 10 = 0.46; a step of 1e-3 explains 0.045."""
    norms = of_layer(CALM.weight_norms, "head", 11.0)
    found = evidence(weight_norms=norms, losses=LOUD, reference=(2.0, 6.0))
    assert kind_and_layer(found) == ("numerics", "head")
    explained = of_layer(CALM.weight_norms, "head", 10.01)  # 0.0447, by a step along the weights
    found = evidence(weight_norms=explained, losses=LOUD, reference=(2.0, 6.0))
    assert kind_and_layer(found) == ("unknown", None)


def test_what_writes_to_weights_in_every_step_is_usual():
    outside = {layer: noisy(0.1) for layer in LAYERS}
    assert kind_and_layer(evidence(outside=outside, losses=LOUD)) == ("data", None)


def test_weights_that_are_not_finite_come_first():
    norms = of_layer(CALM.weight_norms, "block", math.nan)
    norms = of_layer(norms, "head", math.inf)
    found = evidence(weight_norms=norms, losses=[*noisy(2.0)[:-1], math.nan])
    assert kind_and_layer(found) == ("numerics", "block")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"broken_data": True, "broken_layer": "block"}, ("data", None)),
        ({"broken_layer": "block"}, ("numerics", "block")),
        ({}, ("numerics", None)),
    ],
    ids=["batch", "output", "unknown"],
)
def test_a_loss_that_is_not_finite(changed, expected):
    grads = {layer: ending(h, math.nan) for layer, h in CALM.grad_norms.items()}
    found = evidence(losses=[*noisy(2.0)[:-1], math.nan], grad_norms=grads, **changed)
    assert kind_and_layer(found) == expected


def test_a_backward_breaks_where_gradients_are_finite_behind_and_not_before():
    """It comes from the head: the layer nearest to it with a broken gradient broke it."""
    grads = of_layer(of_layer(CALM.grad_norms, "embed", math.inf), "block", math.inf)
    assert kind_and_layer(evidence(grad_norms=grads)) == ("numerics", "block")


def test_a_learning_rate_that_jumped_is_why_a_layer_is_not_finite():
    grads = {layer: ending(h, math.nan) for layer, h in CALM.grad_norms.items()}
    found = evidence(
        losses=[*noisy(2.0)[:-1], math.nan],
        grad_norms=grads,
        lrs=[1e-3] * (STEPS - 3) + [1.0] * 3,
        reference=(2.0, math.nan),
        broken_layer="block",
    )
    assert kind_and_layer(found) == ("learning rate", None)


def test_weights_that_are_still_worse_have_the_cause_of_before():
    previous = Cause("data", None, "So it was.")
    cause = name_cause(evidence(losses=LOUD, reference=(2.0, 5.0), previous=previous))
    assert cause.kind == "data"
    assert cause.text.endswith("So it was.")
    assert kind_and_layer(evidence(losses=LOUD, previous=Cause("numerics"))) == ("data", None)


def test_nothing_that_stands_out_is_unknown():
    assert kind_and_layer(CALM) == ("unknown", None)
    assert kind_and_layer(Evidence()) == ("unknown", None)


def test_the_excess_is_over_the_median_and_the_scale_is_of_differences():
    """Noise of +-1 %: neighbours differ by 0.04, and a trend of 0.001 a step adds 0.001."""
    losses = [loss - 0.001 * i for i, loss in enumerate(noisy(2.0))]
    excess, scale = loss_excess([*losses, 3.0])
    assert excess == pytest.approx(3 - 1.977, abs=0.03)
    assert scale == pytest.approx(0.04 / 0.954, rel=0.05)


def test_scores_are_in_robust_standard_deviations_of_the_log():
    """log(e^0.5) = 0.5 above the median, over the least deviation of 0.05."""
    history = [1.0] * 20 + [math.exp(0.5)]
    assert scores(history)[-1] == pytest.approx(10.0)
    assert scores([1.0] * 20 + [math.nan])[-1] == math.inf
    assert scores([1.0, 2.0]) == [0.0, 0.0], "too little to judge by"


def test_the_layer_that_left_its_history_first_is_named():
    """Three steps ago, in the step before, and not at all; a peak that was over is none."""
    calm = [1.0] * 20
    histories = {
        "late": [*calm, 1.0, 1.0, 3.0, 3.0],
        "first": [*calm, 1.0, 2.0, 2.0, 2.0],
        "larger": [*calm, 1.0, 5.0, 5.0, 5.0],
        "over": [*calm, 9.0, 9.0, 9.0, 1.0],
    }
    assert first_to_leave(histories) == ["larger", "first"]
    assert [left_since(history) for history in histories.values()] == [1, 2, 2, None]
    assert first_to_leave({"calm": calm}) == []
