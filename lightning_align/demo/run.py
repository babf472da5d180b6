"""The whole job on one novel: pretrain, make preference pairs, align, compare before and after.

Both training stages are ordinary YAML files, run by the same command line that a user has.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_align import recipes
from lightning_align.data import PackedDataset, PreferenceDataset
from lightning_align.data.token_cache import TokenSplit
from lightning_align.demo import ngram
from lightning_align.demo.pairs import (
    SPARE_TOKENS,
    Tokens,
    continue_without_end,
    make_pairs,
    write_jsonl,
)
from lightning_align.demo.report import before_after_table, sample_block
from lightning_align.layers import find_layers
from lightning_align.losses import completion_logps, kl_from_sums, kl_sums, sequence_logps
from lightning_align.models.build import build_model
from lightning_align.modules.dpo import DPOModule
from lightning_align.modules.preference_data import PreferenceDataModule
from lightning_align.modules.pretrain import PretrainModule
from lightning_align.modules.text_data import TextDataModule

Table = dict[str, tuple[float | None, float]]  # metric -> (before, after)
Rule = Callable[[list[dict[str, str]]], float]  # preference pairs -> accuracy
Fit = Callable[[Sequence[str]], LightningCLI]  # the command line as a function of its arguments

PROMPT_TOKENS = 32
COMPLETION_TOKENS = 96 - SPARE_TOKENS  # with those, the 128 tokens that the model has learned
SAMPLED_PROMPTS = 64  # held-out prompts that the KL divergence is estimated on


@dataclass(frozen=True)
class Report:
    """The numbers of the demo, and the yardsticks on the same data."""

    table: Table
    perplexities: dict[str, float]
    accuracies: dict[str, tuple[float, float]]  # rule -> (training pairs, held-out pairs)

    def text(self) -> str:
        """Three aligned tables."""
        table = [(name, *values) for name, values in self.table.items()]
        accuracies = [(name, *values) for name, values in self.accuracies.items()]
        rules = before_after_table(accuracies, ("accuracy of a rule", "training", "held-out"))
        perplexities = list(self.perplexities.items())
        models = before_after_table(perplexities, ("held-out chapters", "perplexity"))
        return "\n".join([before_after_table(table), models, rules])


@dataclass(frozen=True)
class Size:
    """How much of everything; the full demo takes minutes, the fast one seconds."""

    train_pairs: int
    val_pairs: int
    overrides: dict[str, list[str]]  # stage -> arguments of ``lightning-align fit``


FULL = Size(train_pairs=1024, val_pairs=256, overrides={"pretrain": [], "dpo": []})
FAST = Size(
    train_pairs=64,
    val_pairs=32,
    overrides={
        "pretrain": [
            "--trainer.max_steps=60",
            "--model.init_args.lr_scheduler.init_args.total_steps=60",
            "--trainer.limit_val_batches=4",
        ],
        "dpo": ["--trainer.max_epochs=1"],
    },
)


def run_demo(fit: Fit, *, fast: bool, output: Path, seed: int) -> Report:
    """Run the three stages, print the report, and write it to ``report.json``.

    Raises:
        ImportError: If a library that draws or logs is missing.
    """
    size = FAST if fast else FULL
    missing = [name for name in ("matplotlib", "PIL", "wandb") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"lightning-align demo: needs {', '.join(missing)}. Run: pip install"
            " 'lightning-align[demo]'"
        )
    _say("1/3  Pretraining on whole chapters; others are held out")
    pretrained = _stage("pretrain", fit, size, output, seed)
    text = pretrained.datamodule
    assert isinstance(text, TextDataModule)
    before = build_model(str(output / "pretrain/model"), where="demo")

    _say("2/3  Preference pairs: the author's continuation over the model's own sample")
    splits = {"train": token_split(text.train_dataset), "val": token_split(text.val_dataset)}
    wanted = {"train": size.train_pairs, "val": size.val_pairs}
    pairs = {}
    for offset, (name, split) in enumerate(splits.items()):
        pairs[name] = make_pairs(
            before,
            text.tokenizer,
            documents(split),
            num_pairs=wanted[name],
            prompt_tokens=PROMPT_TOKENS,
            completion_tokens=COMPLETION_TOKENS,
            seed=2 * seed + offset,
        )
        write_jsonl(pairs[name], output / f"pairs/{name}.jsonl")

    _say("3/3  Aligning with DPO")
    module = _stage("dpo", fit, size, output, seed).model
    assert isinstance(module, DPOModule)
    after = build_model(str(output / "dpo/model"), where="demo")  # what a user would load

    _say("Report")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    aligned = DPOModule(after, ref_model=before, **asdict(module.options))
    table = _compare(before, aligned, text, output)
    perplexities, accuracies = _yardsticks(before, text, pairs, seed)
    report = Report(table, perplexities, accuracies)
    (output / "report.json").write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    print(report.text())  # noqa: T201
    prompt = text.tokenizer.encode(pairs["val"][0]["prompt"])
    print(_samples(before, after, text.tokenizer, prompt, seed))  # noqa: T201
    print(_whereabouts(output))  # noqa: T201
    return report


def token_split(dataset: object) -> TokenSplit:
    """The tokens behind a dataset of a ``TextDataModule``."""
    assert isinstance(dataset, PackedDataset)
    return dataset.split


def documents(split: TokenSplit) -> list[Tokens]:
    """The documents of a split as arrays of token ids."""
    bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [split.tokens[begin:end] for begin, end in bounds]


def _stage(name: str, fit: Fit, size: Size, output: Path, seed: int) -> LightningCLI:
    """Run one YAML with the command line, its outputs moved to ``output``."""
    recipe = recipes.text(name)
    config = output / f"{name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(recipe.replace("outputs/", f"{output.as_posix()}/"), encoding="utf-8")
    seeds = [f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    cli = fit(["fit", "--config", str(config), *seeds, *size.overrides[name]])
    for logger in cli.trainer.loggers:
        # Weights & Biases would write the next stage into the run that is still open.
        finish = getattr(getattr(logger, "experiment", None), "finish", None)
        if callable(finish):
            finish()
    return cli


def _compare(before: nn.Module, aligned: DPOModule, text: TextDataModule, run: Path) -> Table:
    """Both models on held-out text, and the aligned one on the pairs of both splits."""
    accuracies, margins = {}, {}
    for split in ("train", "val"):
        train, val = (str(run / f"pairs/{name}.jsonl") for name in ("train", split))
        length = PROMPT_TOKENS + COMPLETION_TOKENS
        pairs = PreferenceDataModule(
            train, text.tokenizer, val_paths=val, batch_size=32, max_length=length, append_eos=False
        )
        metrics = _validate(aligned, pairs)
        accuracies[split] = metrics["val_rewards/accuracies"]
        margins[split] = metrics["val_rewards/margins"]
    assert isinstance(pairs.val_dataset, PreferenceDataset)  # the held-out pairs: they came last
    prompts = np.stack([pair.prompt for pair in pairs.val_dataset.pairs[:SAMPLED_PROMPTS]])
    kl = kl_divergence(aligned.model, before, text.tokenizer, torch.tensor(prompts), text.seed)
    perplexity_before, perplexity_after = (
        _validate(PretrainModule(model), text)["val_perplexity"]
        for model in (before, aligned.model)
    )
    return {
        "validation perplexity": (perplexity_before, perplexity_after),
        "preference accuracy, training pairs": (None, accuracies["train"]),
        "preference accuracy, held-out chapters": (None, accuracies["val"]),
        "reward margin, training pairs": (0.0, margins["train"]),
        "reward margin, held-out chapters": (0.0, margins["val"]),
        "KL to the reference, nats per token": (0.0, kl),
    }


def _validate(module: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
    trainer = pl.Trainer(logger=False, enable_model_summary=False, enable_checkpointing=False)
    return dict(trainer.validate(module, data, verbose=False)[0])


def kl_divergence(
    policy: nn.Module, reference: nn.Module, tokenizer: Any, prompts_BT: torch.Tensor, seed: int
) -> float:
    """KL(policy || reference) in nats per token, estimated on the policy's own samples."""
    torch.manual_seed(seed)
    written = continue_without_end(policy.eval(), tokenizer, prompts_BT.tolist(), COMPLETION_TOKENS)
    rows, completion = written["input_ids"], written["completion_mask"]
    with torch.no_grad():
        layers = [find_layers(model.eval()) for model in (policy, reference)]
        ours, theirs = (
            completion_logps(of.hidden_states(rows), of.head, rows, completion).token_logps_BT
            for of in layers
        )
    return kl_from_sums(kl_sums(ours, theirs, completion[:, 1:])).per_token


def _yardsticks(
    before: nn.Module, text: TextDataModule, pairs: dict[str, list[dict[str, str]]], seed: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """What counting achieves on the same text, and simple rules on the same pairs."""
    tokens = token_split(text.train_dataset).tokens, token_split(text.val_dataset).tokens
    size = len(text.tokenizer)
    perplexities = {
        "unigram": ngram.unigram_perplexity(*tokens, size),
        "interpolated trigram, tuned": ngram.interpolated_trigram_perplexity(*tokens, size),
        "Kneser-Ney trigram": ngram.kneser_ney_perplexity(*tokens, size),
    }
    torch.manual_seed(seed)
    untrained = build_model(before.config, where="demo")  # type: ignore[arg-type]
    rules: dict[str, Rule] = {
        "the longer text": longer_text_accuracy,
        "likelier to an untrained model": partial(likelihood_accuracy, untrained, text.tokenizer),
        "likelier to the pretrained model": partial(likelihood_accuracy, before, text.tokenizer),
    }
    accuracies = {name: (rule(pairs["train"]), rule(pairs["val"])) for name, rule in rules.items()}
    return perplexities, accuracies


def longer_text_accuracy(pairs: Sequence[dict[str, str]]) -> float:
    """How often the longer text (in characters) is the chosen one; a tie counts one half."""
    differences = np.array([len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs])
    return float(((np.sign(differences) + 1) / 2).mean())


def likelihood_accuracy(model: nn.Module, tokenizer: Any, pairs: Sequence[dict[str, str]]) -> float:
    """How often a model finds the chosen continuation more likely than the rejected one."""
    prompts, chosen, rejected = (
        torch.tensor([tokenizer.encode(pair[column]) for pair in pairs])
        for column in ("prompt", "chosen", "rejected")
    )
    logps = []
    for side in (chosen, rejected):
        rows, completion = _completed(prompts, side)
        with torch.no_grad():
            logps.append(sequence_logps(model.eval(), rows, torch.ones_like(rows), completion))
    return float((logps[0] > logps[1]).float().mean())


def _completed(
    prompts_BT: torch.Tensor, completions_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their completions, and the completion mask of the rows."""
    parts = [torch.zeros_like(prompts_BT), torch.ones_like(completions_BT)]
    return torch.cat([prompts_BT, completions_BT], dim=1), torch.cat(parts, dim=1)


def _samples(
    before: nn.Module, after: nn.Module, tokenizer: Any, prompt: list[int], seed: int
) -> str:
    texts = []
    for title, model in (("before", before), ("after", after)):
        torch.manual_seed(seed)
        rows = continue_without_end(model.eval(), tokenizer, [prompt], COMPLETION_TOKENS)
        texts.append((title, tokenizer.decode(rows["input_ids"][0, len(prompt) :])))
    return sample_block(tokenizer.decode(prompt), texts)


def _whereabouts(output: Path) -> str:
    places = {
        "pretrained model": "pretrain/model",
        "aligned model": "dpo/model",
        "preference pairs": "pairs",
        "metrics, curves": "pretrain/csv, dpo/csv",
        "Weights & Biases": "pretrain/wandb, dpo/wandb (offline; `wandb sync` uploads them)",
        "configurations": "pretrain.yaml, dpo.yaml",
    }
    return "\n".join([f"Everything is in {output}/:", *(f"  {n:18}{p}" for n, p in places.items())])


def _say(headline: str) -> None:
    print(f"\n== {headline}", flush=True)  # noqa: T201
