"""The spike detector: its formulas, what it flags, what it lets pass and what it remembers."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.stability import (
    NORMAL,
    NORMAL_LOWER,
    PRIOR,
    SpikeDetector,
    Tail,
    forecast,
    median,
    normal_quantile,
    times_further,
)


def noisy(steps, level=2.0, scale=0.02, seed=0):
    draw = random.Random(seed)
    return [level * math.exp(draw.gauss(0, scale)) for _ in range(steps)]


def run(losses, norms=None, detector=None):
    """Verdicts of all steps."""
    detector = detector or SpikeDetector()
    norms = [None] * len(losses) if norms is None else norms
    return [
        detector.update(step, *pair) for step, pair in enumerate(zip(losses, norms, strict=True))
    ]


def alarms(verdicts):
    return [verdict.step for verdict in verdicts if verdict.is_spike]


# Formulas


def test_median_of_odd_and_even_counts():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


@pytest.mark.parametrize("count", [16, 17, 64])
def test_forecast_follows_a_straight_line_down(count):
    expected, widening = forecast([5 - 0.25 * step for step in range(count)])
    assert expected == pytest.approx(5 - 0.25 * count)
    assert widening == pytest.approx(math.sqrt(1 + 2.5 * math.pi / count))


def test_forecast_does_not_follow_a_line_up_nor_a_few_values():
    """The median of the newer half, 8 to 15, and of all five."""
    assert forecast([float(step) for step in range(16)])[0] == 11.5
    assert forecast([5.0, 4.0, 3.0, 2.0, 1.0]) == (3.0, math.sqrt(1 + math.pi / 10))


def test_forecast_is_not_moved_by_a_third_of_outliers():
    values = [2.0] * 48
    values[3:11] = [100.0] * 8
    values[30:38] = [100.0] * 8
    assert forecast(values)[0] == 2.0


def student_t(degrees):
    """Scores on a grid, in robust standard deviations (MAD), and the share beyond each above."""
    x = np.concatenate([np.linspace(0, 10, 20_000), np.geomspace(10, 1e5, 20_000)[1:]])
    density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    areas = 0.5 * (density[1:] + density[:-1]) * np.diff(x)
    beyond = np.append(np.cumsum(areas[::-1])[::-1], 0) / areas.sum() / 2
    return x / (1.4826 * np.interp(-0.25, -beyond, x)), beyond


def tail_of(scores, beyond, start):
    """Share beyond the start, and the mean of log(score / start): the integral of P / score."""
    far = scores > start
    share = float(np.interp(start, scores, beyond))
    return Tail(start, share, float(np.trapezoid(beyond[far] / scores[far], scores[far])) / share)


def quantile(scores, beyond, probability):
    tail = slice(-2, 0, -1)  # from far out to the middle: the share grows
    return math.exp(np.interp(math.log(probability), np.log(beyond[tail]), np.log(scores[tail])))


def test_constants_of_normal_noise():
    """Student's t of a million degrees is the normal distribution."""
    scores, beyond = student_t(1e6)
    one, lower = tail_of(scores, beyond, NORMAL.start), tail_of(scores, beyond**2, 1.5)
    assert one._replace(share=2 * one.share) == pytest.approx(NORMAL, rel=2e-3)
    assert lower == pytest.approx(NORMAL_LOWER, rel=2e-3)
    assert normal_quantile(0.05) == pytest.approx(1.6449, rel=1e-4)


@pytest.mark.parametrize("degrees", [4, 6, 10, 30])
@pytest.mark.parametrize("probability", [1e-5, 2e-3])
def test_threshold_of_one_signal_matches_the_quantile_of_student_t(degrees, probability):
    scores, beyond = student_t(degrees)
    tail = tail_of(scores, beyond, NORMAL.start)._replace(share=NORMAL.share)
    ours = normal_quantile(probability) * times_further(tail, NORMAL, probability)
    assert ours == pytest.approx(quantile(scores, beyond, probability), rel=0.07)


@pytest.mark.parametrize("degrees", [4, 6, 10, 30])
def test_threshold_of_both_matches_the_quantile_of_the_lower_of_two(degrees):
    scores, beyond = student_t(degrees)
    tail = tail_of(scores, beyond**2, NORMAL_LOWER.start)
    ours = normal_quantile(math.sqrt(2e-5)) * times_further(tail, NORMAL_LOWER, 2e-5)
    assert ours == pytest.approx(quantile(scores, beyond**2, 2e-5), rel=0.07)


def test_a_tail_of_few_scores_has_the_quantile_of_the_next_one():
    """After n exponential values of mean m the next is beyond t with (1 + t / (n m))^-n (Lomax)."""
    rng = np.random.default_rng(0)
    count, mean, probability = 20, 0.25, 0.01
    values = rng.exponential(mean, (200_000, count + 1))
    few = Tail(1.0, 1.0, mean, count)
    further = times_further(few, Tail(1.0, 1.0, 0.0), probability)  # quantile over the start
    factor = math.log(further) / mean  # of the mean of the n
    beyond = np.mean(values[:, -1] > factor * values[:, :-1].mean(1))
    assert beyond == pytest.approx(probability, rel=0.1)
    assert factor == pytest.approx(count * (probability ** (-1 / count) - 1))
    many = times_further(few._replace(scores=1e9), NORMAL, probability)
    assert many == pytest.approx(times_further(few._replace(scores=math.inf), NORMAL, probability))


def test_lighter_tails_than_the_normal_one_count_as_normal_and_the_heaviest_are_bounded():
    light, heavy = NORMAL._replace(excess=0.0), NORMAL._replace(excess=9.0)
    assert times_further(NORMAL, NORMAL, 1e-5) == times_further(light, NORMAL, 1e-5) == 1.0
    assert times_further(heavy, NORMAL, 1e-5) < 9


def test_scores_are_errors_in_robust_standard_deviations():
    """Losses exp(+-0.1) by turns: median 1, every error 0.1 in the log, so a std of 0.148."""
    detector = SpikeDetector(window=64)
    run([math.exp(0.1 * (-1) ** step) for step in range(200)], detector=detector)
    verdict = detector.update(200, math.exp(0.5))
    assert verdict.loss_expected == pytest.approx(1.0)
    assert verdict.loss_score == pytest.approx(0.5 / 0.14826, rel=1e-6)  # widenings cancel
    limit = math.exp(verdict.loss_threshold * 0.14826)
    assert verdict.loss_limit == pytest.approx(limit, rel=1e-6)


# What is a spike


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_spike_from_the_first_step_on_and_leaves_no_trace(value):
    detector = SpikeDetector()
    before = detector.state_dict()
    for step in range(100):
        assert detector.update(step, value).reason == "loss is not finite"
        assert detector.update(step, 1.0, abs(value)).reason == "gradient norm is not finite"
    assert detector.state_dict() == before


def test_either_signal_alone_is_a_spike():
    detector = SpikeDetector()
    assert alarms(run(noisy(200), noisy(200, 0.5, 0.1, seed=1), detector)) == []
    assert detector.update(200, 4.0, 0.5).reason == "loss"
    assert detector.update(201, 2.0, 3.0).reason == "gradient norm"
    assert not detector.update(202, 2.0, 0.5).is_spike


def test_both_a_little_less_are_a_spike_and_each_of_them_is_none():
    losses, norms = noisy(300, scale=0.05), noisy(300, 0.5, 0.1, seed=1)
    reasons = []
    for loss, norm in [(2.65, 0.5), (2.0, 0.92), (2.65, 0.92)]:
        detector = SpikeDetector()
        run(losses, norms, detector)
        reasons.append(detector.update(300, loss, norm).reason)
    assert reasons == ["", "", "loss and gradient norm"]


@pytest.mark.parametrize("signal", ["loss", "gradient norm"])
def test_two_steps_in_a_row_are_a_spike_and_each_of_them_is_none(signal):
    """A loss 14 % too high at a noise of 2 %, a norm of twice its level at one of 10 %."""
    pair = (2.28, 0.5) if signal == "loss" else (2.0, 1.0)
    detector = SpikeDetector()
    run(noisy(300), noisy(300, 0.5, 0.1, seed=1), detector)
    reasons = [detector.update(300 + number, *pair).reason for number in range(3)]
    assert reasons == ["", *[f"{signal}, two steps in a row"] * 2]
    detector.update(303, 2.0, 0.5)
    assert detector.update(304, *pair).reason == ""


def test_two_in_a_row_must_stand_out_from_the_steps_before_them():
    """A drift of 0.8 % a step: the forecast lags behind, and many steps are high."""
    losses = noisy(300)
    for step in range(200, 300):
        losses[step] *= math.exp(0.008 * (step - 199))
    verdicts = run(losses)
    assert sum(verdict.loss_score > 4.5 for verdict in verdicts[200:]) > 10
    assert alarms(verdicts) == []


def test_high_steps_in_a_row_raise_the_threshold_of_two():
    """An AR(1) noise of 0.9: two steps as high as that of independent noise are no alarm."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal(2000)
    for step in range(1, 2000):
        draws[step] = 0.9 * draws[step - 1] + math.sqrt(1 - 0.9**2) * draws[step]
    apart, alike = SpikeDetector(), SpikeDetector()
    run(np.exp(0.05 * rng.standard_normal(2000)).tolist(), detector=apart)
    run(np.exp(0.05 * draws).tolist(), detector=alike)
    independent, correlated = (
        one.state_dict()["loss"]["lasting_tail"]["share"] for one in (apart, alike)
    )
    assert correlated > 1.5 * independent
    assert alarms(run(np.exp(0.05 * draws).tolist())) == []


def test_a_norm_that_is_missing_or_zero_is_not_judged():
    detector = SpikeDetector()
    losses, norms = noisy(200), noisy(200, 0.5, 0.1, seed=1)
    norms[50:150:2] = [None] * 50
    assert alarms(run(losses, norms, detector)) == []
    assert detector.update(200, 2.0, 0.0).norm_score is None
    assert detector.update(201, 4.0).reason == "loss"
    assert detector.update(202, 2.0, 5.0).reason == "gradient norm"


def test_only_rises_are_spikes():
    detector = SpikeDetector()
    run(noisy(200), noisy(200, 0.5, 0.1, seed=1), detector)
    verdict = detector.update(200, 0.5, 0.01)
    assert not verdict.is_spike
    assert max(verdict.loss_score, verdict.norm_score) < -10


def test_a_slow_rise_is_found_before_it_is_at_its_height():
    """20 steps up to 1.5 times at a noise of 2 %: found within 8."""
    losses = noisy(300)
    for step in range(280, 300):
        losses[step] *= 1.5 ** ((step - 279) / 20)
    found = alarms(run(losses))
    assert 280 <= found[0] <= 288
    assert found[-1] == 299


def test_losses_that_are_negative_are_judged_as_they_are():
    draw = random.Random(0)
    losses = [draw.gauss(-3, 0.05) for _ in range(300)]
    losses[200] = -2.0
    assert alarms(run(losses)) == [200]


def test_the_first_loss_that_is_not_positive_changes_units_not_verdicts():
    """DPO's loss below zero: from 0.5 the log is left, and what was learned is kept."""
    draw = random.Random(0)
    losses = [0.5 - 0.002 * step + draw.gauss(0, 0.02) for step in range(500)]
    assert losses.index(next(loss for loss in losses if loss <= 0)) > 200
    verdicts = run(losses)
    assert alarms(verdicts) == []
    assert all(verdict.loss_score is not None for verdict in verdicts[65:])
    detector = SpikeDetector()
    run(losses, detector=detector)
    assert detector.update(500, 0.1).is_spike


# What is none


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.01, 0.05])
@pytest.mark.parametrize(
    "shape",
    {
        "constant": lambda step: (2.0, 0.5),
        "warm-up that falls tenfold": lambda step: (1 + 9 * math.exp(-step / 60), 0.3),
        "power law": lambda step: (10 * (1 + step) ** -0.35, 5 * (1 + step) ** -0.3),
        "norm that rises with the warm-up": lambda step: (
            3 + 7 * math.exp(-step / 60),
            0.3 + 1.5 * min(1, step / 100),
        ),
        "halved lr": lambda step: (
            3 - 0.3 * (1 - math.exp(-max(step - 300, 0) / 30)),
            0.5 if step < 300 else 0.6,
        ),
        "easier data": lambda step: (3.0 if step < 300 else 1.8, 0.5 if step < 300 else 0.3),
    }.items(),
    ids=lambda shape: shape[0],
)
def test_no_alarm_in_an_ordinary_run(shape, noise):
    losses, norms = zip(*map(shape[1], range(500)), strict=True)
    if noise:
        losses = [a * b for a, b in zip(losses, noisy(500, 1.0, noise), strict=True)]
        norms = [a * b for a, b in zip(norms, noisy(500, 1.0, 2 * noise, seed=1), strict=True)]
    assert alarms(run(losses, norms)) == []


def test_nothing_is_judged_during_the_warm_up():
    verdicts = run([2.0] * 20 + [50.0] * 3 + [2.0] * 20, detector=SpikeDetector(warmup=32))
    assert alarms(verdicts) == []
    assert verdicts[30].loss_score is None
    assert verdicts[42].loss_score is not None
    assert [one.step for one in run([2.0] * 80) if one.loss_score is None] == list(range(65))


def test_a_level_that_stays_is_accepted_after_a_while():
    detector = SpikeDetector(accept_after=10)
    calm, risen = noisy(200), noisy(100, 3.5, seed=1)
    verdicts = run(calm + risen, detector=detector)
    assert alarms(verdicts) == list(range(200, 209))
    assert [verdict.step for verdict in verdicts if verdict.accepted] == [209]
    assert verdicts[209].reason == "accepted as the new level: loss"
    assert detector.update(300, 7.0).is_spike


def test_what_goes_up_and_down_is_no_level_and_is_not_accepted_soon():
    """30 steps up to 8 times and back: never 10 in a row that are alike."""
    hill = [2.0 * 8 ** (1 - abs(step - 15) / 15) for step in range(1, 30)]
    verdicts = run(noisy(200) + hill + noisy(100, seed=1), detector=SpikeDetector(accept_after=10))
    assert not any(verdict.accepted for verdict in verdicts)
    assert set(alarms(verdicts)) <= set(range(200, 229))
    assert len(alarms(verdicts)) > 20


def test_what_never_settles_is_accepted_in_the_end():
    detector = SpikeDetector(accept_after=4)
    verdicts = run(noisy(200) + [4.0 * 1.5**step for step in range(40)], detector=detector)
    assert next(verdict.step for verdict in verdicts if verdict.accepted) == 215  # 4 times 4


def test_a_planned_change_is_learned_in_a_few_steps_and_then_judged():
    detector = SpikeDetector()
    run(noisy(100), noisy(100, 0.5, 0.1, seed=1), detector)
    detector.planned_change("other layers are trained")
    risen = noisy(20, 5.0, 0.1, seed=2)
    assert alarms(run(noisy(20, seed=3), risen, detector)) == []
    assert detector.update(120, 2.0, 40.0).reason == "gradient norm"
    detector.planned_change("a spike of two steps is not one")
    assert [detector.update(step, 2.0, 5.0).norm_score for step in range(4)] == [None] * 4
    assert detector.update(4, 2.0, 5.0).norm_score is not None
    assert detector.update(5, math.nan, 5.0).is_spike


def test_changes_that_are_planned_every_20_steps_leave_the_detector_awake():
    detector, found = SpikeDetector(), []
    draw = random.Random(0)
    for step in range(400):
        if step % 20 == 0:
            detector.planned_change("the next layers")
            level = draw.uniform(0.2, 2)
        norm = level * math.exp(draw.gauss(0, 0.1)) * (8 if step in (210, 330) else 1)
        found += [step] if detector.update(step, 2.0, norm).is_spike else []
    assert found == [210, 330]


def test_a_step_of_the_old_level_is_no_first_of_two_in_a_row_at_the_new_one():
    """A little less than a spike before a planned change, and again behind it."""
    detector = SpikeDetector()
    run(noisy(200), noisy(200, 0.5, 0.02, seed=1), detector)
    assert not detector.update(200, 2.25).is_spike
    detector.planned_change("other layers are trained")
    assert alarms(run(noisy(4, seed=2), detector=detector)) == []
    assert not detector.update(204, 2.25).is_spike
    assert detector.update(205, 2.25).reason == "loss, two steps in a row"


def test_accept_level_takes_the_last_alarms_for_normal():
    detector = SpikeDetector()
    run(noisy(200) + [3.0] * 5, detector=detector)
    detector.accept_level()
    assert alarms(run([3.0] * 50, detector=detector)) == []
    assert detector.update(50, 4.5).is_spike


# What is remembered


def test_flagged_values_stay_out_of_the_statistics():
    losses, norms = noisy(200), noisy(200, 0.5, 0.1, seed=1)
    with_spikes, without = SpikeDetector(), SpikeDetector()
    for step, pair in enumerate(zip(losses, norms, strict=True)):
        with_spikes.update(step, *pair)
        without.update(step, *pair)
        if step > 100 and step % 10 == 0:
            assert with_spikes.update(step, 9.0, 9.0).is_spike
    ours, theirs = with_spikes.state_dict(), without.state_dict()
    for name in ("loss", "norm"):
        assert ours[name]["values"] == theirs[name]["values"]
        assert ours[name]["errors"] == theirs[name]["errors"]
    # Around an alarm the tails learn nothing at all.
    assert ours["norm"]["tail"]["count"] < theirs["norm"]["tail"]["count"]
    assert ours["norm"]["tail"]["steps"] < theirs["norm"]["tail"]["steps"]


def test_heavy_tails_raise_the_thresholds_and_light_ones_lower_them():
    rng = np.random.default_rng(0)
    light, heavy = SpikeDetector(), SpikeDetector()
    light = run(np.exp(0.05 * rng.standard_normal(2000)).tolist(), detector=light)[-1]
    heavy = run(np.exp(0.05 * rng.standard_t(3, 2000)).tolist(), detector=heavy)[-1]
    first = run(noisy(80))[-1]
    assert light.loss_threshold < first.loss_threshold < heavy.loss_threshold
    assert light.loss_threshold < 7
    assert heavy.loss_threshold > 12


def test_signals_that_are_high_together_raise_the_threshold_of_both():
    """Half of the noise is common to both: what both were together was no alarm any more."""
    rng = np.random.default_rng(0)
    own, common = rng.standard_normal((2, 2000)), rng.standard_normal(2000)
    apart, alike = SpikeDetector(), SpikeDetector()
    run(*np.exp(0.1 * own).tolist(), apart)
    run(*np.exp(0.1 * (own + 2 * common) / 5**0.5).tolist(), alike)
    reasons = [each.update(2000, 1.7, 1.7).reason for each in (apart, alike)]
    assert reasons == ["loss and gradient norm", ""]


def test_changes_that_are_planned_do_not_keep_the_tails_from_learning():
    detector = SpikeDetector()
    for step, value in enumerate(noisy(2000, scale=0.05)):
        if step % 20 == 0:
            detector.planned_change("the next layers")
        detector.update(step, value, 0.5)
    assert detector.state_dict()["loss"]["tail"]["excess"] < 0.9 * PRIOR.excess


def test_few_false_alarms_in_heavy_tails():
    """5000 steps of t with 4 degrees: at the thresholds of normal noise some 50."""
    rng = np.random.default_rng(1)
    values = np.exp(0.05 * rng.standard_t(4, (2, 5000)))
    assert len(alarms(run(*values.tolist()))) <= 3


def test_a_level_far_below_is_learned_in_four_steps():
    detector = SpikeDetector()
    run(noisy(200), detector=detector)
    run(noisy(4, 1.0, seed=1), detector=detector)
    verdict = detector.update(204, 1.3)
    assert verdict.loss_expected == pytest.approx(1.0, rel=0.05)
    assert verdict.is_spike


def test_a_level_is_learned_in_four_steps_that_two_in_a_row_so_far_above_would_be_a_spike():
    """Seven times the noise below, less than a spike of one step."""
    detector = SpikeDetector()
    run(noisy(200), detector=detector)
    fall = run(noisy(4, 1.74, scale=0.002, seed=1), detector=detector)
    assert all(abs(verdict.loss_score) < verdict.loss_threshold for verdict in fall)
    assert detector.update(204, 1.74).loss_expected == pytest.approx(1.74, rel=0.01)


series = st.lists(
    st.tuples(st.floats(-0.3, 0.3), st.floats(-0.5, 0.5), st.sampled_from([1.0] * 9 + [6.0])),
    min_size=60,
    max_size=120,
)


@settings(max_examples=15, deadline=None)
@given(series, st.floats(1e-6, 1e6))
def test_units_of_both_signals_do_not_matter(steps, unit):
    losses = [2 * math.exp(loss) * factor for loss, _, factor in steps]
    norms = [math.exp(norm) * factor for _, norm, factor in steps]
    ours = run(losses, norms, SpikeDetector(window=16, warmup=8))
    scaled = [[value * unit for value in values] for values in (losses, norms)]
    theirs = run(*scaled, SpikeDetector(window=16, warmup=8))
    for name in ("loss_score", "norm_score"):
        mine, yours = ([getattr(one, name) or 0.0 for one in all_] for all_ in (ours, theirs))
        assert mine == pytest.approx(yours, rel=1e-9, abs=1e-9)  # logarithms are rounded at 1e-15
    assert [one.is_spike for one in ours] == [other.is_spike for other in theirs]


@settings(max_examples=15, deadline=None)
@given(series, st.data())
def test_a_state_as_json_goes_on_with_the_same_verdicts(steps, data):
    """Wherever it is saved: in the warm-up, among alarms, below zero, in a settling level."""
    cut = data.draw(st.integers(0, len(steps)))
    pairs = [(math.exp(loss) * factor - 0.8, math.exp(norm)) for loss, norm, factor in steps]
    whole, first, second = (SpikeDetector(window=16, warmup=8, accept_after=3) for _ in range(3))
    expected = [whole.update(step, *pair) for step, pair in enumerate(pairs)]
    for step in range(cut):
        first.update(step, *pairs[step])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == first.state_dict()
    rest = [second.update(step, *pairs[step]) for step in range(cut, len(pairs))]
    assert rest == expected[cut:]
    assert second.state_dict() == whole.state_dict()


def test_the_tails_are_part_of_the_state():
    first, second = SpikeDetector(), SpikeDetector()
    run(noisy(200), noisy(200, 0.5, 0.2, seed=1), first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for tails in ((one._lower, one._loss.tail, one._norm.tail) for one in (first, second)):
        assert [tail.steps > 222 for tail in tails[1:]] == [True, True]  # 220 are the prior's
    assert vars(first._lower) == vars(second._lower)
    assert vars(first._norm.tail) == vars(second._norm.tail)


def test_the_tails_rest_after_an_alarm():
    """16 scores go by, 16 more wait, and only then one is learned from."""
    detector = SpikeDetector()
    run(noisy(100), noisy(100, 0.5, 0.1, seed=1), detector)
    assert detector.update(100, 9.0, 9.0).is_spike

    def shares():
        tails = (detector._lower, detector._norm.tail, detector._norm.lasting_tail)
        return [tail.share for tail in tails]

    learned = shares()
    run(noisy(32, seed=2), noisy(32, 0.5, 0.1, seed=3), detector)
    assert shares() == learned
    run(noisy(1, seed=4), noisy(1, 0.5, 0.1, seed=5), detector)
    assert all(now != before for now, before in zip(shares(), learned, strict=True))


def test_a_state_of_another_window_starts_anew_and_says_so():
    saved, other = SpikeDetector(window=64), SpikeDetector(window=32)
    run(noisy(100), detector=saved)
    run(noisy(50), detector=other)
    with pytest.warns(
        UserWarning, match=r"window=32.*window of 64 steps\. The statistics start anew"
    ):
        other.load_state_dict(saved.state_dict())
    assert other.state_dict() == SpikeDetector(window=32).state_dict()


# Arguments


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"window": 7}, "window=7.*at least 8"),
        ({"warmup": 3}, "warmup=3.*at least 4"),
        ({"window": 16, "warmup": 17}, "at most window=16"),
        ({"false_alarms": 0.0}, "between 0 and 0.1"),
        ({"false_alarms": math.nan}, "between 0 and 0.1"),
        ({"accept_after": 1}, "at least 2"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        SpikeDetector(**arguments)


def test_a_negative_norm_is_refused():
    with pytest.raises(ValueError, match=r"grad_norm=-1\.0.*must not be < 0"):
        SpikeDetector().update(0, 1.0, -1.0)


def test_extreme_values_do_not_overflow():
    """Limits of a run that is all over the place are huge, not errors."""
    draw = random.Random(0)
    losses = [10.0 ** draw.uniform(-300, 300) for _ in range(200)]
    assert all(
        verdict.loss_limit is None or verdict.loss_limit > 0 for verdict in run(losses, losses)
    )
