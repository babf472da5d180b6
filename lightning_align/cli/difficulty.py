"""``lightning-align difficulty``: how difficult each training sample is, and how many are so."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from yaml import YAMLError

from lightning_align import modules
from lightning_align._errors import argument_error, check_choice
from lightning_align.cli.commands import CommandParser
from lightning_align.cli.given import options_with_values, read_layer
from lightning_align.cli.mistakes import did_you_mean
from lightning_align.data.deepspeed_index import open_index
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.difficulty_map import DifficultyAnalyzer
from lightning_align.data.difficulty_metrics import (
    CompressionRatio,
    Metric,
    VocabularyRarity,
    count_tokens,
    length,
)
from lightning_align.modules.positioned import PositionedDataModule
from lightning_align.reports.difficulty import describe_difficulty, draw_difficulty

CONFIG = ("-c", "--config")
STEPS = ("all", "map", "reduce")
REFERENCE_METRICS = ("reference_loss", "reference_margin")

MetricMaker = Callable[[PositionedDataModule], Metric]


class OneByOne:
    """Samples of a dataset of ours, which gives batches: each is a batch of one.

    Args:
        dataset: Indexed with a list of indices.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Sample ``index``."""
        return self.dataset[[index]]


def difficulty(
    data: PositionedDataModule,
    out: str | Path,
    *,
    metrics: str | Sequence[str] = "length",
    reference: str | None = None,
    device: str | None = None,
    num_workers: int = 1,
    worker_id: int = 0,
    step: str = "all",
    png: str | Path | None = None,
) -> str:
    """Compute the difficulty of every training sample, and build an index of each metric.

    Args:
        data: Whose training samples.
        out: Folder for what is computed; the index of a metric is the folder of its name in it.
        metrics: Names with commas between: length, vocabulary_rarity, compression_ratio,
            reference_loss, reference_margin, or module.function of a sample.
        reference: Checkpoint, folder or hub name of the model for reference_loss and
            reference_margin.
        device: Of that model: cpu, cuda, mps ...; left out, an accelerator if there is one.
        num_workers: How many commands share the work, each with a worker_id of its own.
        worker_id: Which of them this is, counted from 0.
        step: map computes this worker's part, reduce builds the indices when all have finished,
            all does both.
        png: Picture of the histograms to write; .svg and .pdf too (extra: plot).

    Raises:
        ValueError: If a metric is not known or fails, or a part is missing.
    """
    check_choice("difficulty", "step", step, STEPS)
    if step == "all" and num_workers > 1:
        rule = "one of several workers cannot do all"
        raise argument_error("difficulty", "step", step, rule, "Give map, and reduce at the end")
    names = metrics.split(",") if isinstance(metrics, str) else list(metrics)
    # Before the data are read, which may take long.
    makers = {name.rpartition(".")[2]: _metric(name, reference, device) for name in names}
    if len(makers) < len(names):
        raise argument_error("difficulty", "metrics", metrics, "two would have one name")
    data.prepare_data()
    data.setup("fit")
    analyzer = DifficultyAnalyzer(
        OneByOne(data.train_dataset),
        {name: make(data) for name, make in makers.items()},
        out,
        fingerprint=data.fingerprint,
        num_workers=num_workers,
        worker_id=worker_id,
    )
    lines = []
    if step != "reduce":
        done = analyzer.map()
        lines.append(f"{done.computed:,} difficulties computed, {done.reused:,} were there")
    if step != "map":
        lines.append(show(list(analyzer.reduce().values()), png))
    return "\n".join(lines)


def show(indices: Sequence[DifficultyIndex], png: str | Path | None = None) -> str:
    """Indices as text, and as a picture if ``png`` names a file for it.

    Raises:
        ValueError: If it cannot be written.
    """
    lines = [line for index in indices for line in describe_difficulty(index)]
    lines += [f"  {index.folder}" for index in indices if index.folder is not None]
    if png is not None:
        try:
            draw_difficulty(indices).savefig(str(png))
        except (OSError, ValueError, ImportError) as error:
            rule = f"cannot be written: {str(error).rstrip('.')}"
            raise argument_error("difficulty", "png", str(png), rule) from error
        lines.append(f"wrote {png}")
    return "\n".join(lines)


def _metric(name: str, reference: str | None, device: str | None) -> MetricMaker:
    """What makes the metric of a name, once the data are there."""
    if name in PLAIN_METRICS:
        return PLAIN_METRICS[name]
    if name in REFERENCE_METRICS:
        if reference is None:
            rule = f"{name} needs a model"
            raise argument_error("difficulty", "reference", reference, rule)
        return partial(_reference_metric, name, reference, device)
    module, dot, function = name.rpartition(".")
    try:
        found: Metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = [*PLAIN_METRICS, *REFERENCE_METRICS]
        rule = f"must be one of {', '.join(known)}, or module.function"
        way_out = str(error).capitalize() if dot else did_you_mean(name, known).strip()
        raise argument_error("difficulty", "metrics", name, rule, way_out) from error
    return lambda _: found


def _vocabulary_rarity(data: PositionedDataModule) -> Metric:
    samples = OneByOne(data.train_dataset)
    return VocabularyRarity(count_tokens(map(samples.__getitem__, range(len(samples)))))


def _reference_metric(
    name: str, reference: str, device: str | None, data: PositionedDataModule
) -> Metric:
    import torch

    from lightning_align.losses.difficulty import ReferenceLoss, ReferenceMargin
    from lightning_align.models.trained import load_trained
    from lightning_align.modules.reference import fingerprint

    try:
        trained = load_trained(reference, where="difficulty", dtype="float32")
    except ValueError as error:
        rule = str(error).removeprefix(f"difficulty(ckpt={reference!r}): ").rstrip(".")
        raise argument_error("difficulty", "reference", reference, rule) from None
    known = trained.tokenizer.get_vocab() if trained.tokenizer is not None else {}
    others = [token for token, i in data.tokenizer.get_vocab().items() if known.get(token, i) != i]
    if others:
        rule = f"reads other tokens than those of the data: {len(others)}, such as {others[0]!r}"
        way_out = "Give the data the tokenizer of the model, or another model"
        raise argument_error("difficulty", "reference", reference, rule, way_out)
    key = json.dumps(fingerprint(trained.model))
    found = torch.accelerator.current_accelerator(check_available=True)
    place = torch.device(device or found or "cpu")
    model: Any = trained.model.to(place)  # type: ignore[arg-type]
    return ReferenceLoss(model, key) if name == "reference_loss" else ReferenceMargin(model, key)


PLAIN_METRICS: dict[str, MetricMaker] = {
    "length": lambda _: length,
    "vocabulary_rarity": _vocabulary_rarity,
    "compression_ratio": lambda data: CompressionRatio(data.tokenizer.decode),
}


def parser() -> CommandParser:
    """Options of ``lightning-align difficulty``."""
    about = "Compute how difficult each training sample is, or show an index of that."
    parser = CommandParser("lightning-align difficulty", about)
    help_index = "Index to show: its folder, or DeepSpeed's <save_path>/<metric>/<metric>."
    parser.add_argument("index", nargs="?", type=str, help=help_index)
    help_config = "Configuration of the run; its data are taken, and nothing else."
    parser.add_argument("-c", "--config", type=str, help=help_config)
    for name in modules.__all__:
        getattr(modules, name)  # a class is found by its short name once it is imported
    parser.add_subclass_arguments(PositionedDataModule, "data", required=False)
    parser.add_function_arguments(difficulty, as_group=False, skip={"data", "out"})
    help_out = "Folder for what is computed; the index of a metric is the folder of its name in it."
    parser.add_argument("--out", type=str, default="outputs/difficulty", help=help_out)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align difficulty``."""
    # The data of a configuration come first, so that options are laid over them.
    configs = [path for option, path in options_with_values(arguments) if option in CONFIG]
    given = [word for path in configs for word in ("--data", json.dumps(_data_of(path)))]
    commands = parser()
    options = commands.parse_args([*given, *arguments])
    options.pop("config")
    index = options.pop("index")
    if index is not None:
        print(show([open_index(index, where="difficulty", argument="index")], options.png))  # noqa: T201
    elif options.get("data") is None:
        commands.error("give an index, or --config or --data to build one")
    else:
        print(difficulty(**vars(commands.instantiate_classes(options))))  # noqa: T201


def _data_of(path: str) -> Any:
    """What a configuration says of the data."""
    try:
        layer = read_layer(path)
    except (OSError, ValueError, ImportError, YAMLError) as error:
        raise argument_error("difficulty", "config", path, f"cannot be read: {error}") from error
    if not isinstance(layer, dict) or "data" not in layer:
        raise argument_error("difficulty", "config", path, "has no data")
    return layer["data"]
