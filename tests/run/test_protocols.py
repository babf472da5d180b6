"""What rooms ask each other: our classes answer, others have a default, nobody asks by spelling."""

import ast
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from typing_extensions import get_protocol_members, is_protocol

import lightning_align as la
from lightning_align.layers.find import KeepsLayers, kept_layers
from lightning_align.optimizers.safety import AgreesOnSteps
from lightning_align.run import protocols
from tests.helpers.answers import Answers, Everything, dpo, text
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.curriculum import by_length

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = {
    name: kind
    for name, kind in vars(protocols).items()
    if isinstance(kind, type)
    and is_protocol(kind)
    and kind.__module__.startswith(f"{protocols.__name__}.")
}
ASKED_OF_SAMPLERS = "Began"  # by its type alone


ANSWER: dict[str, Callable[[], Any]] = {
    "SumsOverWindow": dpo,
    "NumbersCompletions": lambda: la.PreferenceDataModule("x.jsonl", ByteTokenizer()),
    "CountsTokens": dpo,
    "ComputesBatchLoss": dpo,
    "CountsMargins": dpo,
    "ScoresPairs": dpo,
    "AsksReference": dpo,
    "HasFrozenModules": dpo,
    "FillsFrozenModules": dpo,
    "MeasuresSteps": dpo,
    "DeclaresReduction": dpo,
    "KnowsGradientFactor": dpo,
    "RefusesPipeline": dpo,
    "ArrangesBatches": dpo,
    "NamesLayers": Everything,
    "NamesInputs": Everything,
    "WeighsMicrobatches": Everything,
    "HasTokenizer": text,
    "HasHeldOutPrompts": lambda: la.PreferenceDataModule(["x.jsonl"], ByteTokenizer()),
    "HasSeed": text,
    "SeparatesDocuments": text,
    "HasPosition": text,
    "SkipsBatches": text,
    "TellsStream": text,
    "RefusesLength": text,
    "FollowsCurriculum": text,
    "TellsSampleTokens": text,
    "TellsBatchKeys": text,
    "SpreadsModel": la.PipelineStrategy,
    "HoldsGradients": la.ZeROInfinityStrategy,
    "GathersParameters": la.ZeROInfinityStrategy,
    "GathersState": la.PipelineStrategy,
    "SnapshotsOwnPart": la.PipelineStrategy,
    "SaysWhatStateTakes": la.ZeROInfinityStrategy,
    "SaysWhoSaves": la.PipelineStrategy,
    "SaysWhoRuns": Answers,
    "RunsModelTogether": la.ZeROInfinityStrategy,
    "LetsGo": la.ZeROInfinityStrategy,
    "SaysHowParametersLie": Answers,
    "FollowsFreezing": Answers,
    "TellsCommits": la.ZeROInfinityStrategy,
    "TellsWaits": la.ZeROInfinityStrategy,
    "TellsBackward": la.PipelineStrategy,
    "HasStorageOptions": la.AsyncCheckpoint,
    "WithdrawsCheckpoints": la.AsyncCheckpoint,
    "PlansChanges": la.LISA,
    "CutsBatches": by_length,
    "ForgetsWindow": lambda: la.TokenSchedule(10),
}


@pytest.mark.parametrize("name", ANSWER)
def test_whoever_answers_is_known_by_what_it_has(name: str) -> None:
    assert isinstance(ANSWER[name](), PROTOCOLS[name])


def test_each_protocol_has_someone_who_answers() -> None:
    assert ANSWER.keys() | {ASKED_OF_SAMPLERS} == PROTOCOLS.keys()


@pytest.mark.parametrize("kind", ["module", "datamodule", "strategy", "callback"])
def test_lightnings_own_answer_nothing(kind: str) -> None:
    theirs: dict[str, Any] = {
        "module": pl.LightningModule(),
        "datamodule": pl.LightningDataModule(),
        "strategy": SingleDeviceStrategy(),
        "callback": ModelCheckpoint(),
    }
    known = [name for name in ANSWER if isinstance(theirs[kind], PROTOCOLS[name])]
    assert known == []


@pytest.mark.parametrize("optimizer", [la.Muon, la.StableAdamW, la.GaLoreAdamW])
def test_our_optimizers_agree_on_steps(optimizer: Any) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    assert isinstance(optimizer([weight], lr=0.1), AgreesOnSteps)
    assert not isinstance(torch.optim.SGD([weight], lr=0.1), AgreesOnSteps)


def test_our_modules_keep_their_layers() -> None:
    module: Any = dpo()
    assert isinstance(module, KeepsLayers)
    assert kept_layers(module) is module.layers
    other: Any = pl.LightningModule()
    assert kept_layers(other) is None
    other.layers = nn.ModuleList()
    assert kept_layers(other) is None


def asked_by_spelling(code: str, names: Collection[str]) -> list[str]:
    """The names that a module asks for in a string: of getattr, hasattr, vars, setattr."""
    calls = [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Call, ast.Subscript))
    ]
    found = []
    for node in calls:
        if isinstance(node, ast.Subscript):
            of_vars = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "vars"
            words = [node.slice] if of_vars else []
        else:
            asks = ast.unparse(node.func) in ("getattr", "hasattr", "setattr")
            words = node.args[1:2] if asks else []
        found += [word.value for word in words if isinstance(word, ast.Constant)]
    return [name for name in found if name in names]


MEMBERS = {
    name
    for kind in [*PROTOCOLS.values(), AgreesOnSteps, KeepsLayers]
    for name in get_protocol_members(kind)
}


def test_nobody_asks_by_spelling() -> None:
    files = sorted((ROOT / "lightning_align").rglob("*.py"))
    asked = {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := asked_by_spelling(file.read_text(), {*MEMBERS, "datamodule"}))
    }
    assert asked == {"lightning_align/run/protocols/datamodules.py": ["datamodule"]}


def test_the_docs_list_what_is_asked() -> None:
    page = (ROOT / "docs" / "contract.md").read_text()
    section = page.partition("## What your classes may offer")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+)", section, re.MULTILINE)
    rows = [name for cell in cells for name in re.findall(r"`([a-z_]+)", cell)]
    assert sorted(rows) == sorted(
        MEMBERS - {"start"}
    )  # a sampler's, which the row of its loader names
