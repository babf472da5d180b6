"""Constants of hardware: physical from the start."""

from lightning_align.planner.efficiencies import PRIORS, Efficiencies, efficiencies_of


def test_every_constant_has_bounds_that_hold_it() -> None:
    told = Efficiencies().told()
    assert set(told) == set(PRIORS)
    for name, prior in PRIORS.items():
        assert 0 < prior.low < told[name] < prior.high
        assert prior.factor > 1


def test_no_share_of_a_peak_is_above_all_of_it() -> None:
    assert all(PRIORS[name].high <= 1 for name in ("matmul", "memory", "link"))


def test_a_processor_adds_what_a_device_overlaps() -> None:
    assert efficiencies_of(1e-6, False).overlap == 1
    assert efficiencies_of(1e-6, True) == Efficiencies(launch_s=1e-6)
