"""Block size and threads: given ones are taken, others measured once for a drive."""

import json
import time

import pytest

from lightning_align.offload import tuning
from lightning_align.offload.tuning import IOSettings, measured, tuned


def test_what_is_given_is_taken_and_nothing_measured(tmp_path):
    assert tuned(tmp_path, tmp_path, 8192, 3) == IOSettings(8192, 3)
    assert not list(tmp_path.iterdir())


def test_the_fastest_is_measured_and_remembered(tmp_path, monkeypatch):
    """Trials take what we say: one thread with pieces of 1 MiB is the fastest."""
    tried = []

    def seconds(path, memory, settings, direct_io):
        tried.append(settings)
        time.sleep(0.001)  # the clock must go on, whatever it is like
        return 0.1 if settings == (1 << 20, 1) else 0.2

    monkeypatch.setattr(tuning, "_seconds_of", seconds)
    monkeypatch.setattr(tuning, "SECONDS", 0.05)
    found = tuned(tmp_path, tmp_path, None, None)
    assert (found.block_size, found.thread_count) == (1 << 20, 1)
    assert len(set(tried)) == 9
    tried.clear()
    assert tuned(tmp_path, tmp_path, None, None) == found
    assert not tried
    assert tuned(tmp_path, tmp_path, 8192, None).block_size == 8192  # remembered by itself
    assert {settings[0] for settings in tried} == {8192}
    assert len(json.loads((tmp_path / tuning.FILE).read_text())) == 2


def test_little_more_than_the_usual_speed_is_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tuning, "_seconds_of", lambda path, memory, settings, _: 0.1 - 0.005 * (settings[1] == 4)
    )
    found = measured(tmp_path, [(4096, 2), (4096, 4)], seconds=0.01)
    assert found.thread_count == 2


@pytest.mark.parametrize("content", ["", "[]", '{"1:None:None": {"speed": 3}}', "{", "3"])
def test_a_file_that_cannot_be_read_is_measured_anew(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    (tmp_path / tuning.FILE).write_text(content)
    found = tuned(tmp_path, tmp_path, None, 1)
    assert found.thread_count == 1
    assert tuned(tmp_path, tmp_path, None, 1) == found


@pytest.mark.parametrize("seconds", [0.05, 1e-9], ids=["some trials", "no time for one"])
def test_a_drive_is_really_measured_and_nothing_is_left(tmp_path, seconds):
    found = measured(tmp_path, [(4 << 20, 2), (1 << 20, 1)], seconds=seconds)
    assert found.bandwidth > 0
    assert not list(tmp_path.iterdir())
