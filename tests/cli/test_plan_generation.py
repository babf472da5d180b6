"""What is said of generation."""

import pytest

from lightning_align.cli.plan_generation import BATCHES, generation_of, generation_report
from lightning_align.planner import HardwareSpec, ModelSpec

MODEL = ModelSpec(32, 4096, 32, 8, 14336, vocab_size=128256, seq_len=512, num_positions=0)


def test_a_line_for_each_batch_and_where_the_wall_ends() -> None:
    lines = generation_report(
        generation_of(MODEL, HardwareSpec.from_name("h100"), 128, "bf16-mixed")
    )
    assert lines[1] == "1 x h100-sxm, bf16-true: 128 new tokens for prompts of 512"
    assert lines[2].endswith("131 kB of cache for each token of a row")
    assert [line.split()[0] for line in lines[3:-2]] == ["batch", *map(str, BATCHES)]
    assert "memory" in lines[4]
    assert lines[-1].startswith("decoding leaves the memory wall at a batch of ")


def test_a_long_context_has_no_batch_that_does() -> None:
    long = MODEL.with_seq_len(65536)
    lines = generation_report(
        generation_of(long, HardwareSpec.from_name("rtx-4090"), 128, "bf16-true")
    )
    assert "at a batch of none (each row reads a cache of its own); its products" in lines[-1]
    assert "does not fit" in lines[-3]


def test_devices_divide_the_model_in_one_node() -> None:
    lines = generation_report(generation_of(MODEL, HardwareSpec.from_name("8xh100"), 16, "32-true"))
    assert lines[1].startswith("8 x h100-sxm, 32-true")
    with pytest.raises(ValueError, match=r"hardware='16xh100-sxm'.*in a node, which has 8"):
        generation_of(MODEL, HardwareSpec.from_name("16xh100"), 16, "bf16-true")
