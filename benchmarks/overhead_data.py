"""How fast the datamodules yield batches: against a plain DataLoader, and against training.

    python benchmarks/overhead_data.py     # two minutes

Plain is what torch offers: a dataset of single samples in memory, the random sampler, a collate
function. The samples are the same. With workers only wall time counts what they do; without, CPU
time is shown as well. Training speed is that of the bare loop of overhead.py at a 100 ms step; DPO
needs more for a token. Finished rounds are kept under benchmarks/cache/overhead; --fresh forgets
them.
"""

import json
import lzma
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from overhead import SHAPES, BareLoop, Figures, arguments, remembered, spread, text_data
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_align import PreferenceDataModule
from lightning_align.data.corpora import embedded_path

SHAPE = SHAPES["100 ms"]
WARMUP, BATCHES = 16, 100
WORDS, NUM_PAIRS, PAIRS_IN_BATCH = 40, 2000, 8

Loader = Iterable[dict[str, Tensor]]


def text_loaders(num_workers: int) -> dict[str, Loader]:
    data = text_data(SHAPE, num_workers)
    data.setup()
    whole = data.train_dataset[range(len(data.train_dataset))]
    blocks = [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]
    options = {"batch_size": SHAPE.batch_size, "shuffle": True, "num_workers": num_workers}
    return {"TextDataModule": data.train_dataloader(), "plain": DataLoader(blocks, **options)}


def collate(pairs: list[Any]) -> dict[str, Tensor]:
    """As one writes it with pad_sequence: rows [chosen; rejected], padded with 0."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    rows += [(pair.prompt, pair.rejected) for pair in pairs]
    ids = [torch.tensor([*prompt, *completion]) for prompt, completion in rows]
    completion = [torch.arange(len(row)) >= len(prompt) for row, (prompt, _) in zip(ids, rows)]  # noqa: B905
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "completion_mask": pad_sequence(completion, batch_first=True).long(),
    }


def pair_loaders(num_workers: int) -> dict[str, Loader]:
    text = text_data(SHAPE)
    text.setup()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.jsonl")
        path.write_text("\n".join(json.dumps(pair) for pair in islice(pairs(), NUM_PAIRS)))
        data = PreferenceDataModule(
            path, text.tokenizer, batch_size=PAIRS_IN_BATCH, num_workers=num_workers
        )
        data.setup()
    options = {"batch_size": PAIRS_IN_BATCH, "shuffle": True, "num_workers": num_workers}
    plain = DataLoader(data.train_dataset.pairs, collate_fn=collate, **options)
    return {"PreferenceDataModule": data.train_dataloader(), "plain": plain}


def pairs() -> Iterator[dict[str, str]]:
    """Of the novel's words: the next ones are chosen, those after them rejected."""
    with lzma.open(embedded_path("pride_and_prejudice"), "rt", encoding="utf-8") as text:
        words = text.read().split()
    for begin in range(0, len(words) - 3 * WORDS, WORDS):
        parts = (words[begin + n * WORDS : begin + (n + 1) * WORDS] for n in range(3))
        prompt, chosen, rejected = (" ".join(part) for part in parts)
        yield {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def tokens_per_s(loader: Loader) -> Figures:
    batches = iter(loader)
    list(islice(batches, WARMUP))
    cpu_s, wall_s = -time.process_time(), -time.perf_counter()
    loaded = list(islice(batches, BATCHES))
    cpu_s, wall_s = cpu_s + time.process_time(), wall_s + time.perf_counter()
    assert len(loaded) == BATCHES
    attended = [
        batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in loaded
    ]
    tokens = sum(int(mask.sum()) for mask in attended)
    rows = sum(len(batch["input_ids"]) for batch in loaded)
    return {"cpu": tokens / cpu_s, "wall": tokens / wall_s, "rows": rows / tokens}


def training_speed() -> Figures:
    loop, batches = BareLoop(SHAPE), list(islice(text_loaders(0)["plain"], 20))
    for batch in batches[:5]:
        loop.step(batch)
    cpu_s = -time.process_time()
    for batch in batches[5:]:
        loop.step(batch)
    return {"cpu": SHAPE.tokens * len(batches[5:]) / (cpu_s + time.process_time())}


def report(
    kind: str, num_workers: int, rounds: int, loaders: Callable[[int], dict[str, Loader]]
) -> None:
    runs: dict[str, list[Figures]] = {}
    for number in range(rounds):
        for side, loader in loaders(num_workers).items():
            key = f"data {kind} {num_workers} {side} {number}"
            runs.setdefault(side, []).append(remembered(key, lambda it=loader: tokens_per_s(it)))
    train = [remembered(f"data training {n}", training_speed)["cpu"] for n in range(rounds)]
    ours, plain = runs.values()
    cells = [spread([run["wall"] for run in side]) for side in (ours, plain)]
    if kind == "pairs":  # two rows are a pair
        cells[0] += f"; pairs/s {spread([run['wall'] * run['rows'] / 2 for run in ours])}"
    clocks = ("cpu", "wall") if num_workers == 0 else ("wall",)
    cells.append(spread([run[clocks[0]] / speed for run, speed in zip(ours, train, strict=True)]))
    ratios = {
        clock: [a[clock] / b[clock] for a, b in zip(ours, plain, strict=True)] for clock in clocks
    }
    cells.append("; ".join(f"{clock} {spread(values, 2)}" for clock, values in ratios.items()))
    print(f"| {next(iter(runs))}, {num_workers} workers | {' | '.join(cells)} |", flush=True)


def main() -> None:
    options = arguments(__doc__)
    print(f"\n{SHAPE}; {PAIRS_IN_BATCH} pairs a batch, {BATCHES} batches a round")
    print("| datamodule | tokens/s wall | plain, tokens/s wall | x training | ratio |")
    print("|---|---|---|---|---|")
    for kind, loaders in (("text", text_loaders), ("pairs", pair_loaders)):
        for num_workers in (0, 2):
            report(kind, num_workers, options.rounds, loaders)


if __name__ == "__main__":
    main()
