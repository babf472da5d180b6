"""DeepSpeed's files, written here byte by byte as its builder does, and by itself (peer)."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from lightning_align.data.deepspeed_index import DTYPES, open_index, read_deepspeed_index
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.difficulty_reduce import build_index

CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}


def write_items(path, lists, dtype):
    sizes = np.array([len(each) for each in lists], np.int32)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * np.dtype(dtype).itemsize
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[np.dtype(dtype)], len(lists), 2)
    documents = np.array([0, len(lists)], np.int64)
    path.with_name(f"{path.name}.idx").write_bytes(
        head + sizes.tobytes() + pointers.tobytes() + documents.tobytes()
    )
    path.with_name(f"{path.name}.bin").write_bytes(np.concatenate(lists).astype(dtype).tobytes())


VALUES = np.array([300, 5, 7, 5, 300, 5, 9])


@pytest.fixture
def prefix(tmp_path):
    folder = tmp_path / "seqlen"
    folder.mkdir()
    ours = DifficultyIndex.of_values(VALUES)
    lists = [ours.samples(level) for level in range(len(ours.levels))]
    write_items(folder / "seqlen_index_to_sample", lists, np.uint8)
    write_items(folder / "seqlen_index_to_metric", ours.levels[:, None], np.uint16)
    write_items(folder / "seqlen_sample_to_metric", VALUES[:, None], np.uint16)
    return folder / "seqlen"


def check_same(index, values):
    ours = DifficultyIndex.of_values(values)
    for name in ("values", "levels", "offsets", "order"):
        np.testing.assert_array_equal(getattr(index, name), getattr(ours, name))


def test_files_are_read_where_they_are(prefix):
    index = read_deepspeed_index(prefix)
    check_same(index, VALUES)
    assert isinstance(index.order, np.memmap)
    assert isinstance(index.values, np.memmap)
    assert index.name == "seqlen"


def test_either_kind_is_opened_by_its_path(prefix, tmp_path):
    check_same(open_index(prefix), VALUES)
    build_index(tmp_path / "ours", "ours", lambda: [VALUES])
    assert open_index(tmp_path / "ours").name == "ours"
    with pytest.raises(ValueError, match=r"Curriculum\(order='.*nothing'\): is no usable"):
        open_index(tmp_path / "nothing", where="Curriculum", argument="order")


def test_difficulties_in_another_order_are_those_of_the_lists(prefix):
    write_items(prefix.parent / "seqlen_sample_to_metric", VALUES[::-1, None], np.uint16)
    check_same(read_deepspeed_index(prefix), VALUES)
    (prefix.parent / "seqlen_sample_to_metric.idx").unlink()
    check_same(read_deepspeed_index(prefix), VALUES)


def rewrite(part, lists):
    return lambda path: write_items(path.with_name(f"seqlen_{part}"), lists, np.uint8)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda path: os.truncate(f"{path}_index_to_sample.bin", 3), "one of them was cut short"),
        (lambda path: os.truncate(f"{path}_index_to_sample.idx", 36), "one of them was cut short"),
        (lambda path: os.truncate(f"{path}_index_to_sample.idx", 5), "is no index of DeepSpeed's"),
        (lambda path: os.unlink(f"{path}_index_to_metric.idx"), "cannot be read"),
        (rewrite("index_to_sample", [[0, 1]] * 4), "each sample once"),
        (rewrite("index_to_metric", [[5], [5], [7], [9]]), "in rising order"),
    ],
)
def test_files_that_do_not_fit_are_refused(prefix, damage, rule):
    damage(prefix)
    with pytest.raises(ValueError, match=rf"Curriculum\(order='.*seqlen'\): .*{rule}"):
        read_deepspeed_index(prefix, where="Curriculum", argument="order")


ANALYZE = """
import json, sys, torch
from deepspeed.runtime.data_pipeline.data_sampling.data_analyzer import DataAnalyzer
values = json.loads(sys.argv[2])
analyzer = DataAnalyzer(values, num_workers=1, batch_size=64, metric_names=["m"],
    metric_functions=[lambda batch: batch], metric_types=["single_value_per_sample"],
    metric_dtypes=[torch.int64], save_path=sys.argv[1])
analyzer.run_map()
analyzer.run_reduce()
"""


def analyze(folder, values):
    """Let DeepSpeed write an index of a metric ``m``."""
    command = [sys.executable, "-c", ANALYZE, str(folder), json.dumps(values)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)


@pytest.mark.peer
def test_an_index_matches_deepspeed(tmp_path):
    pytest.importorskip("deepspeed")
    values = [(7 * i) % 61 + 300 * (i % 2) for i in range(1000)]
    analyze(tmp_path, values)
    check_same(read_deepspeed_index(tmp_path / "m" / "m"), np.array(values))
