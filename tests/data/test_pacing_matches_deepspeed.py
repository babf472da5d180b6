"""Pacing against DeepSpeed's own, over all its types of schedule."""

import os
import random
import warnings

import pytest

from lightning_align.data.pacing import CurriculumScheduler

pytestmark = pytest.mark.peer


def draw(generator):
    """A configuration of any type; its numbers are odd ones as well."""
    kind = generator.choice(["fixed_linear", "fixed_root", "fixed_discrete", "custom"])
    low = generator.randint(1, 100)
    high = low + generator.randint(0, 400)
    schedule = {}
    if kind == "fixed_discrete":
        number = generator.randint(1, 6)
        schedule["max_step"] = sorted(generator.randint(1, 300) for _ in range(number))
        schedule["difficulty"] = [generator.randint(low, high) for _ in range(number + 1)]
    elif kind != "custom":
        schedule["total_curriculum_step"] = generator.randint(1, 400)
        schedule["difficulty_step"] = generator.choice([1, 3, 8, 16, 17])
        if kind == "fixed_root":
            schedule["root_degree"] = generator.choice([0.5, 1, 2, 3, 2.5])
    return {
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": kind,
        "schedule_config": schedule,
    }


def is_one_difficulty(config):
    """What we refuse: a multiple that leaves no curriculum."""
    low, high = config["min_difficulty"], config["max_difficulty"]
    multiple = config["schedule_config"].get("difficulty_step", 1)
    return low < high and high - low < multiple and -(-low // multiple) * multiple >= high


def test_pacing_matches_deepspeed(monkeypatch):
    """60 random configurations, 50 random steps each: no number differs."""
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    name = "deepspeed.runtime.data_pipeline.curriculum_scheduler"
    theirs_module = pytest.importorskip(name)
    generator = random.Random(0)
    configs, kinds = [], set()
    while len(configs) < 60:
        if not is_one_difficulty(config := draw(generator)):
            configs.append(config)
    compared = 0
    for config in configs:
        kinds.add(config["schedule_type"])
        theirs = theirs_module.CurriculumScheduler(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = CurriculumScheduler(config)
        if config["schedule_type"] == "custom":
            for scheduler in (ours, theirs):
                scheduler.set_custom_get_difficulty(lambda step: min(90, 10 + step // 7))
        for step in [0, 1, *(generator.randint(0, 900) for _ in range(48))]:
            assert ours.get_difficulty(step) == theirs.get_difficulty(step), (config, step)
            compared += 1
    assert compared == 3000
    assert len(kinds) == 4
