"""What SpikeGuard refuses, by itself; with a Trainer in test_spike_guard.py."""

import pytest

from lightning_align.callbacks.spike_checks import refuse_unbuilt


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="is not there yet"):
        refuse_unbuilt("agc", 0.1)
    refuse_unbuilt("agc", None)
