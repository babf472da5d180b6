from lightning_align.spike_causes import Cause


def test_a_cause_may_have_no_layer():
    assert Cause("unknown").layer is None
