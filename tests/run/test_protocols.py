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
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from typing_extensions import get_protocol_members, is_protocol

import lightning_align as la
from lightning_align.callbacks.generate_samples import GenerateSamples
from lightning_align.layers.find import KeepsLayers, kept_layers
from lightning_align.optimizers.safety import AgreesOnSteps
from lightning_align.run import protocols
from lightning_align.run.protocols import (
    began_elsewhere,
    follow_freezing,
    frozen_modules,
    keeps_shapes,
    loss_is_sum,
    may_freeze,
    misspelt,
    one_rank_runs_model,
    saves_whole_state,
    seed_of,
    separates_documents,
    tokenizer_of,
    whole_state_dict,
    window_sums,
)
from lightning_align.strategies.pipeline.checks import check_module
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.curriculum import by_length
from tests.helpers.lisa import Layered, train
from tests.helpers.pipelines import Chained
from tests.helpers.tiny_models import TINY_MODELS

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = {
    name: kind
    for name, kind in vars(protocols).items()
    if isinstance(kind, type) and is_protocol(kind) and kind.__module__ == protocols.__name__
}
ASKED_OF_SAMPLERS = "Began"  # by its type alone


class Everything(Chained):
    """A module of one's own that answers all questions of a pipeline."""

    loss_reduction = "sum"
    pipeline_refusal = ""

    def pipeline_inputs(self, batch: Any) -> Any:
        return batch["input_ids"]

    def pipeline_microbatch_weight(self, batch: Any) -> Tensor:
        return torch.tensor(len(batch))


class Answers(SingleDeviceStrategy):
    """A strategy that is not Lightning's and says how it is."""

    one_rank_runs_model = False
    keeps_shapes = False
    saves_whole_state = False

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[Collection[nn.Parameter]] = []

    def total_grad_norm(self) -> Tensor:
        return torch.tensor(7.0)

    def whole_state_dict(self) -> dict[str, Any]:
        return {"weight": 1}

    def follow_freezing(self, dropped: Collection[nn.Parameter]) -> None:
        self.dropped.append(dropped)


def dpo() -> pl.LightningModule:
    return la.DPOModule(TINY_MODELS["llama"]())


def text() -> pl.LightningDataModule:
    return la.TextDataModule(["x.txt"], ByteTokenizer(), block_size=8)


ANSWER: dict[str, Callable[[], Any]] = {
    "SumsOverWindow": dpo,
    "NumbersCompletions": lambda: la.PreferenceDataModule("x.jsonl", ByteTokenizer()),
    "CountsTokens": dpo,
    "ComputesBatchLoss": dpo,
    "HasFrozenModules": dpo,
    "FillsFrozenModules": dpo,
    "MeasuresSteps": dpo,
    "DeclaresReduction": dpo,
    "KnowsGradientFactor": dpo,
    "RefusesPipeline": dpo,
    "NamesLayers": Everything,
    "NamesInputs": Everything,
    "WeighsMicrobatches": Everything,
    "HasTokenizer": text,
    "HasSeed": text,
    "SeparatesDocuments": text,
    "HasPosition": text,
    "SkipsBatches": text,
    "TellsStream": text,
    "RefusesLength": text,
    "FollowsCurriculum": text,
    "TellsSampleTokens": text,
    "SpreadsModel": la.PipelineStrategy,
    "HoldsGradients": la.ZeROInfinityStrategy,
    "GathersParameters": la.ZeROInfinityStrategy,
    "GathersState": la.PipelineStrategy,
    "SnapshotsOwnPart": la.PipelineStrategy,
    "SaysWhatStateTakes": la.ZeROInfinityStrategy,
    "SaysWhoSaves": la.PipelineStrategy,
    "SaysWhoRuns": Answers,
    "SaysHowParametersLie": Answers,
    "FollowsFreezing": Answers,
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
    assert asked == {"lightning_align/run/protocols.py": ["datamodule"]}


def test_the_docs_list_what_is_asked() -> None:
    page = (ROOT / "docs" / "contract.md").read_text()
    section = page.partition("## What your classes may offer")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+)", section, re.MULTILINE)
    rows = [name for cell in cells for name in re.findall(r"`([a-z_]+)", cell)]
    assert sorted(rows) == sorted(
        MEMBERS - {"start"}
    )  # a sampler's, which the row of its loader names


# Questions and their default answers


def trainer_of(strategy: Strategy | None = None, datamodule: Any = None) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        strategy=strategy or "auto",
    )
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    return trainer


def test_a_module_that_knows_nothing_of_us() -> None:
    module = pl.LightningModule()
    assert window_sums(module) == {}
    assert frozen_modules(module) == {}
    assert not loss_is_sum(module)
    module.accumulated = 3  # type: ignore[assignment]  # of its own, and none of these sums
    assert window_sums(module) == {}


def test_a_module_of_ours() -> None:
    module: Any = dpo()
    module.accumulated["loss"] = torch.ones(2)
    assert window_sums(module) is module.accumulated
    assert frozen_modules(module) == {"reference": module.reference_layers.model}
    assert loss_is_sum(module)


def test_a_run_without_a_datamodule_and_one_that_knows_nothing() -> None:
    for trainer in (trainer_of(), trainer_of(datamodule=pl.LightningDataModule())):
        assert tokenizer_of(trainer) is None
        assert seed_of(trainer) is None
        assert not separates_documents(trainer)
        assert not began_elsewhere(trainer)
    assert tokenizer_of(None) is None


def test_a_run_with_a_datamodule_of_ours() -> None:
    data: Any = text()
    trainer = trainer_of(datamodule=data)
    assert tokenizer_of(trainer) is data.tokenizer
    assert seed_of(trainer) == data.seed == 0
    assert not separates_documents(trainer)
    data.separate_documents = True
    assert separates_documents(trainer)
    assert not began_elsewhere(trainer)  # there is no loader yet
    data.train_sampler = la.data.PositionSampler(4, 1, position=lambda: data.position)
    assert not began_elsewhere(trainer)  # it was not begun
    iter(data.train_sampler)
    assert not began_elsewhere(trainer)
    data.skipped = 2
    assert began_elsewhere(trainer)


ONE, DDP = SingleDeviceStrategy, DDPStrategy
# Strategy -> may rank 0 run the model, are shapes kept, may blocks freeze, does rank 0 save all
DEFAULTS: list[tuple[Callable[[], Any], tuple[bool, bool, bool, bool]]] = [
    (SingleDeviceStrategy, (True, True, True, True)),
    (DDPStrategy, (True, True, True, True)),
    (lambda: DeepSpeedStrategy.__new__(DeepSpeedStrategy), (False, False, False, False)),
    (FSDPStrategy, (False, False, False, False)),
    (ModelParallelStrategy, (False, True, False, False)),
    (la.PipelineStrategy, (False, True, False, True)),
    (Answers, (False, False, True, False)),
]


@pytest.mark.parametrize(("make", "expected"), DEFAULTS)
def test_what_strategies_are_like(
    make: Callable[[], Any], expected: tuple[bool, bool, bool, bool]
) -> None:
    questions = (one_rank_runs_model, keeps_shapes, may_freeze, saves_whole_state)
    assert tuple(question(make()) for question in questions) == expected


def test_a_strategy_puts_the_state_together_or_has_it() -> None:
    assert whole_state_dict(SingleDeviceStrategy()) is None
    assert whole_state_dict(Answers()) == {"weight": 1}


def test_states_are_dropped_by_the_strategy_or_from_the_optimizer() -> None:
    kept, dropped = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    for strategy in (SingleDeviceStrategy(), Answers()):
        optimizer = torch.optim.AdamW([kept, dropped])
        (kept + dropped).backward()
        optimizer.step()
        trainer = trainer_of(strategy)
        trainer.strategy.optimizers = [optimizer]
        follow_freezing(trainer, [dropped])
        if isinstance(strategy, Answers):
            assert strategy.dropped == [[dropped]]
            assert optimizer.state.keys() == {kept, dropped}
        else:
            assert optimizer.state.keys() == {kept}


# A strategy of one's own, asked by our callbacks


@pytest.mark.parametrize(
    ("callback", "answer", "message"),
    [
        (
            lambda: GenerateSamples(["a"], max_new_tokens=4),
            "one_rank_runs_model",
            r"under Answers rank zero may not",
        ),
        (lambda: la.OptimizerSwap(torch.optim.SGD), "keeps_shapes", r"Answers flattens parameters"),
        (
            lambda: la.AsyncCheckpoint("x"),
            "saves_whole_state",
            r"its ranks save parts of the state",
        ),
    ],
)
def test_callbacks_refuse_by_what_a_strategy_says(
    callback: Callable[[], Any], answer: str, message: str
) -> None:
    class Says(Answers):
        pass

    Says.__name__ = "Answers"
    trainer = trainer_of(Says())
    module = la.PretrainModule(TINY_MODELS["llama"]())
    with pytest.raises(ValueError, match=message):
        callback().setup(trainer, module, "fit")
    setattr(Says, answer, True)
    trainer.datamodule = text()
    callback().setup(trainer, module, "validate")
    if answer != "saves_whole_state":  # which would open its folder
        callback().setup(trainer, module, "fit")


class Follows(SingleDeviceStrategy):
    """Takes up by itself what LISA freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[set[str], set[str]]] = []

    def follow_freezing(self, dropped: Collection[nn.Parameter]) -> None:
        named = list(self.lightning_module.named_parameters())
        for parameter in dropped:
            self.optimizers[0].state.pop(parameter, None)
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        self.calls.append((frozen, {name for name, p in named if p in set(dropped)}))


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_lisa_tells_a_strategy_of_ones_own_what_is_frozen(state: Any) -> None:
    def weights_under(strategy: Strategy) -> tuple[Tensor, la.LISA]:
        module = Layered()
        train(
            module,
            callback := la.LISA(2, interval_steps=3, optimizer_state=state),
            strategy=strategy,
        )
        return nn.utils.parameters_to_vector(module.parameters()), callback

    torch.manual_seed(0)
    ours, callback = weights_under(strategy := Follows())
    torch.manual_seed(0)
    theirs, _ = weights_under(SingleDeviceStrategy())
    assert torch.equal(ours, theirs)
    assert len(strategy.calls) == len(callback.history) == 4
    for (frozen, dropped), (_, active) in zip(strategy.calls, callback.history, strict=True):
        assert {name.split(".")[1] for name in frozen} == {
            str(i) for i in range(4) if i not in active
        }
        assert dropped == (frozen if state == "drop" else set())


# Misspelt names


class Misspelt(Chained):
    pipeline_layer_costs = 3  # another word

    def pipeline_microbatch_weigth(self, batch: Any) -> int:
        return len(batch)


def test_a_misspelt_name_is_noticed() -> None:
    assert misspelt(Chained()) == {}
    module = Misspelt()
    assert misspelt(module) == {"pipeline_microbatch_weigth": "pipeline_microbatch_weight"}
    module.pipeline_refusl = "no"
    assert misspelt(module)["pipeline_refusl"] == "pipeline_refusal"


def test_a_pipeline_warns_of_a_misspelt_name() -> None:
    expected = r"Misspelt.pipeline_microbatch_weigth is not asked for\. Is it meant as pipeline_mic"
    with pytest.warns(UserWarning, match=expected):
        check_module(trainer_of(), Misspelt())
