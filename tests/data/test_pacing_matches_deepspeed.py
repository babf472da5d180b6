"""Pacing against DeepSpeed's own, over all its types of schedule."""

import importlib.util
import json
import os
import random
import subprocess
import sys
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


# Run in a process of its own: DeepSpeed, once imported, changes what other libraries find.
THEIRS = """
import json, sys
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

found = []
for config, steps in json.load(open(sys.argv[1])):
    scheduler = CurriculumScheduler(config)
    if config["schedule_type"] == "custom":
        scheduler.set_custom_get_difficulty(lambda step: min(90, 10 + step // 7))
    found.append([scheduler.get_difficulty(step) for step in steps])
json.dump(found, open(sys.argv[2], "w"))
"""


def of_deepspeed(folder, questions):
    """DeepSpeed's difficulties at the steps of each configuration."""
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps(questions))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", THEIRS, str(asked), str(answered)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    return json.loads(answered.read_text())


def test_pacing_matches_deepspeed(tmp_path):
    """60 random configurations, 50 random steps each: no number differs."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("could not import 'deepspeed'")
    generator = random.Random(0)
    configs = []
    while len(configs) < 60:
        if not is_one_difficulty(config := draw(generator)):
            configs.append(config)
    assert len({config["schedule_type"] for config in configs}) == 4
    questions = [
        (config, [0, 1, *(generator.randint(0, 900) for _ in range(48))]) for config in configs
    ]
    theirs = of_deepspeed(tmp_path, questions)
    assert len(theirs) == 60
    for (config, steps), expected in zip(questions, theirs, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = CurriculumScheduler(config)
        if config["schedule_type"] == "custom":
            ours.set_custom_get_difficulty(lambda step: min(90, 10 + step // 7))
        assert [ours.get_difficulty(step) for step in steps] == expected, config
