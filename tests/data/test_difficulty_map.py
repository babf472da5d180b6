import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from tqdm import tqdm

from lightning_align.data.content_hash import data_fingerprint
from lightning_align.data.difficulty_map import DifficultyAnalyzer, Shard
from lightning_align.data.difficulty_metrics import CompressionRatio, length
from lightning_align.data.whole_folder import FileWriter
from tests.helpers.children import fork
from tests.helpers.faulty_files import flip

TEXTS = ["word " * (i % 37) + str(i) for i in range(300)]


def analyzer(folder, texts=TEXTS, metrics=None, **options):
    metrics = metrics or {"length": length}
    return DifficultyAnalyzer(texts, metrics, folder, **{"shard_samples": 32, **options})


def built(folder, texts=TEXTS, **options):
    analyzer(folder, texts, **options).map()
    return analyzer(folder, texts, **options).reduce()


def test_several_metrics_by_several_workers(tmp_path):
    metrics = {"length": length, "zip": CompressionRatio()}
    done = [
        analyzer(tmp_path, metrics=metrics, num_workers=3, worker_id=worker).map()
        for worker in (2, 0, 1)
    ]
    assert sum(each.computed for each in done) == 2 * len(TEXTS)
    indices = analyzer(tmp_path, metrics=metrics).reduce()
    assert indices["length"].values.tolist() == [len(text) for text in TEXTS]
    ratios = np.array([CompressionRatio()(text) for text in TEXTS], np.float32)
    np.testing.assert_array_equal(indices["zip"].values, ratios)
    assert indices["zip"].fingerprint == data_fingerprint(TEXTS)


def test_what_is_there_is_not_computed_again(tmp_path):
    built(tmp_path)
    assert analyzer(tmp_path).map() == (0, 300)
    more = {"length": length, "words": lambda text: text.count(" ")}
    assert analyzer(tmp_path, metrics=more).map() == (300, 300), "a metric was added"
    shorter = {"length": lambda text: len(text) // 2}
    assert analyzer(tmp_path, metrics=shorter).map() == (300, 0), "a metric has changed"


def test_appended_data_cost_what_they_are(tmp_path):
    """300 samples are 9 shards of 32 and one of 12, which is another one now."""
    built(tmp_path)
    longer = [*TEXTS, *TEXTS[:50]]
    with pytest.raises(ValueError, match=r"the samples 0 to 32 is of other data.*Run map"):
        analyzer(tmp_path, longer).reduce()
    assert analyzer(tmp_path, longer).map() == (350 - 9 * 32, 9 * 32)
    index = analyzer(tmp_path, longer).reduce()["length"]
    assert index.values.tolist() == [len(text) for text in longer]


def test_data_that_changed_are_seen(tmp_path):
    """Also where the fingerprint, of a few samples, is the same."""
    texts = TEXTS * 4
    built(tmp_path, texts)
    changed = list(texts)
    changed[1] = "another"
    assert data_fingerprint(changed) == data_fingerprint(texts)
    assert analyzer(tmp_path, changed).map() == (32, 1168)


def test_a_given_fingerprint_spares_reading(tmp_path):
    built(tmp_path, fingerprint="these")

    class Unread(list):
        def __getitem__(self, index):
            raise AssertionError("it was read")

    assert analyzer(tmp_path, Unread(TEXTS), fingerprint="these").map() == (0, 300)
    assert analyzer(tmp_path, fingerprint="those").map() == (0, 300), "the samples are the same"
    with pytest.raises(ValueError, match="is of other data"):
        analyzer(tmp_path, fingerprint="these").reduce()


def test_a_worker_that_has_not_finished_is_missed(tmp_path):
    analyzer(tmp_path, num_workers=2, worker_id=0).map()
    with pytest.raises(ValueError, match=r"for the samples 160 to 192 is missing or damaged"):
        analyzer(tmp_path).reduce()
    assert not (tmp_path / "length").exists()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_shard_is_computed_again(tmp_path, damage):
    built(tmp_path)
    shard = tmp_path / "shards/length/000000000032.shard"
    if damage == "flip":
        flip(shard, -20)
    else:
        os.truncate(shard, 10)
    assert Shard.read(shard) is None
    with pytest.raises(ValueError, match="samples 32 to 64 is missing or damaged"):
        analyzer(tmp_path).reduce()
    assert analyzer(tmp_path).map() == (32, 268)


@pytest.mark.parametrize(
    ("metric", "rule"),
    [
        (lambda text: 1 / (len(text) - 7), r"failed on sample 38 \(ZeroDivisionError"),
        (lambda text: float("nan") if text.endswith("7") else 1, "is nan for sample 7"),
        (lambda text: float("inf"), "is inf for sample 0"),
        (lambda text: 10**400, "must be a finite number"),
        (lambda text: 2**63, "must be a finite number"),
        (lambda text: text, "must be a finite number"),
        (lambda text: torch.ones(2), r"is tensor\(.* for sample 0, and must be"),
    ],
)
def test_a_metric_that_fails_names_the_sample(tmp_path, metric, rule):
    with pytest.raises(ValueError, match=rf"metrics='mine'\): .*{rule}"):
        analyzer(tmp_path, metrics={"length": length, "mine": metric}).map()


def test_bad_arguments(tmp_path):
    for options, rule in (
        ({"num_workers": 0}, "num_workers=0"),
        ({"num_workers": 2, "worker_id": 2}, r"worker_id=2\): must be from 0 to"),
        ({"shard_samples": 0}, "shard_samples=0"),
        ({"texts": []}, "a metric and a sample at least"),
        ({"metrics": {"a/b": length}}, "the name of a metric"),
        ({"metrics": {"shards": length}}, "not 'shards'"),
    ):
        with pytest.raises(ValueError, match=rule):
            analyzer(tmp_path, **options)
    with pytest.raises(ValueError, match="must be a local folder"):
        analyzer("s3://bucket/difficulty")


def test_two_workers_of_one_number_are_refused(tmp_path):
    reached, go_on = threading.Event(), threading.Event()

    def slow(text):
        reached.set()
        assert go_on.wait(30)
        return len(text)

    slow.key = "slow"
    first = threading.Thread(target=analyzer(tmp_path, metrics={"length": slow}).map)
    first.start()
    try:
        assert reached.wait(30)
        with pytest.raises(RuntimeError, match=r"worker 0 of 1.*worker_id of its own"):
            analyzer(tmp_path).map()
    finally:
        go_on.set()
        first.join()
    analyzer(tmp_path).map()


def test_a_full_disk_keeps_whole_shards_alone(tmp_path, monkeypatch):
    written = []
    close = FileWriter.close

    def full(self):
        written.append(self)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return close(self)

    monkeypatch.setattr(FileWriter, "close", full)
    with pytest.raises(OSError, match=r"the disk is full.*before sample 96 are intact"):
        analyzer(tmp_path).map()
    shards = sorted(path.name for path in (tmp_path / "shards/length").iterdir())
    assert shards == [f"{first:012d}.shard" for first in (0, 32, 64)]
    assert analyzer(tmp_path).map() == (204, 96)


def test_samples_whose_content_is_not_known_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dataset=.*holds a object, whose content is not known"):
        analyzer(tmp_path, [object()], {"x": id}).map()


class Together:
    """A metric of several samples, that counts how many at once."""

    key = "together"

    def __init__(self):
        self.sizes = []

    def __call__(self, text):
        return self.many([text])[0]

    def many(self, texts):
        self.sizes.append(len(texts))
        assert "word " * 3 + "40" not in texts
        return [torch.tensor(len(text)) for text in texts]


def test_a_metric_that_takes_several_samples_is_given_them(tmp_path):
    metric = Together()
    texts = TEXTS[:40] * 5
    built = analyzer(tmp_path, texts, {"x": metric}, shard_samples=100)
    assert built.map().computed == 200
    assert metric.sizes == [64, 36] * 2
    assert built.reduce()["x"].values.tolist() == [len(text) for text in texts]


def test_the_sample_that_several_fail_on_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics='x'\): failed on sample 40 \(AssertionError"):
        analyzer(tmp_path, metrics={"x": Together()}).map()
    few = Together()
    few.many = lambda texts: [1, 2] if len(texts) > 1 else [1]
    with pytest.raises(ValueError, match=r"failed on the samples 0 to 32 together"):
        analyzer(tmp_path / "few", metrics={"x": few}).map()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_moment_costs_no_more_than_a_shard(tmp_path, seed):
    """SIGKILL again and again, in map and in reduce, until both have ended; then it is right."""
    random = np.random.default_rng(seed)
    log = tmp_path / "log"

    def counted(text):
        with log.open("a") as stream:
            stream.write("x")
        return len(text)

    counted.key = "counted"

    def work():
        # Processes share tqdm's lock with their children: one that is killed would keep it.
        tqdm.set_lock(threading.RLock())
        metrics = {"length": counted}
        analyzer(tmp_path / "out", metrics=metrics).map()
        for _ in range(50):
            analyzer(tmp_path / "out", metrics=metrics).reduce()

    kills = 0
    while True:
        child = fork(work)
        time.sleep(random.uniform(0.001, 0.06))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) or kills == 25:
            break
    metrics = {"length": counted}
    analyzer(tmp_path / "out", metrics=metrics).map()
    index = analyzer(tmp_path / "out", metrics=metrics).reduce()["length"]
    assert index.values.tolist() == [len(text) for text in TEXTS]
    assert len(log.read_text()) <= 300 + 33 * kills
    assert not list((tmp_path / "out").rglob("*.tmp"))
