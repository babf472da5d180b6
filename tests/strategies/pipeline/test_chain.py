"""Modules that know nothing of a pipeline train in one as in one process, or are refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from lightning_align import PretrainModule
from tests.helpers.linear_chain import LINEAR, SGD, WIDTH, Foreign, InPlace, rows, tokens
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS


class Nested(InPlace):
    """The only nn.Sequential is inside of another module."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

        def forward(self, inputs: Tensor, *, scale: float) -> Tensor:
            return self.layers(inputs * scale).tanh()  # type: ignore[no-any-return]

    def make(self) -> None:
        self.model = self.Inner()

    def output(self, inputs: Tensor) -> Any:
        return self.model(inputs, scale=0.5)


class Gated(nn.Module):
    """Takes a tuple, keywords and what the step makes, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, skip: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(hidden * mask) + skip, hidden


class KeywordsAndTuples(Foreign):
    def make(self) -> None:
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Gated() for _ in range(3))

    def pipeline_layers(self) -> list[nn.Module]:
        return [self.embed, *self.blocks]

    def output(self, inputs: Tensor) -> Any:
        mask = (inputs > 0).float()
        hidden = self.embed(input=inputs)
        hidden, skip = self.blocks[0](hidden, hidden, mask=mask)
        hidden, skip = self.blocks[1](hidden, skip, mask=1 - mask)
        return self.blocks[2](hidden=hidden, skip=skip, mask=mask)[0]


class ListedTwice(Foreign):
    def pipeline_layers(self) -> list[nn.Module]:
        return [self.model.first, self.model.second, self.model.first, self.model.last]

    def output(self, inputs: Tensor) -> Any:
        return self.model.last(self.model.first(self.model.second(self.model.first(inputs))))

    def make(self) -> None:
        super().make()
        del self.model.third


class OutsideTheChain(Foreign):
    """Parameters and modules in no layer: before the chain, in its middle, after it, nowhere."""

    def make(self) -> None:
        super().make()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.both = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.unused = nn.Parameter(torch.ones(3))

    def output(self, inputs: Tensor) -> Any:
        embedded = self.before(inputs) * self.both
        return self.after(self.model(embedded)) * self.both + embedded


class Frozen(Foreign):
    def make(self) -> None:
        super().make()
        self.model.second.requires_grad_(False)
        self.model.last.bias.requires_grad_(False)


class FrozenFirst(Foreign):
    """Stage 0 has nothing to learn, and its layers run without a graph."""

    def make(self) -> None:
        super().make()
        for layer in (self.model.first, self.model.second):
            layer.requires_grad_(False)

    def output(self, inputs: Tensor) -> Any:
        with torch.no_grad():
            hidden = self.model.second(self.model.first(inputs))
        return self.model.last(self.model.third(hidden))


class FrozenStage(FrozenFirst):
    """The same, with a graph for nobody."""

    def output(self, inputs: Tensor) -> Any:
        return self.model(inputs)


class Mixing(nn.Module):
    """Takes and returns a dict with a tensor of floats, one of integers, one of bools, and None."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        hidden = self.linear(state["hidden"]).masked_fill(state["mask"], 0.0)
        count = state["counts"][0] + 1
        return {**state, "hidden": hidden * count / 16, "counts": (count, None)}


class Dicts(Foreign):
    def make(self) -> None:
        self.blocks = nn.ModuleList(Mixing() for _ in range(4))

    def pipeline_layers(self) -> list[nn.Module]:
        return [*self.blocks]

    def output(self, inputs: Tensor) -> Any:
        counts = torch.arange(WIDTH).expand(len(inputs), -1)
        state = {"hidden": inputs, "mask": inputs > 1, "counts": (counts, None)}
        for block in self.blocks:
            state = block(state)
        return state["hidden"]


class PenaltyOfTheLast(Foreign):
    """Of weights of the last stage, which runs the step to its end."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.1 * self.model.last.weight.square().sum()


class Checkpointed(Foreign):
    """The step itself has a layer recomputed."""

    def output(self, inputs: Tensor) -> Any:
        hidden = self.model.second(self.model.first(inputs))
        return self.model.last(checkpoint(self.model.third, hidden, use_reentrant=False))


class ContextsAroundCalls(Foreign):
    """The step is left in the middle of them."""

    closed = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            yield

    def output(self, inputs: Tensor) -> Any:
        try:
            with self.counting(), torch.autocast("cpu", enabled=False):
                return self.model(inputs)
        except Exception as error:
            raise AssertionError from error


class Spectral(Foreign):
    """A hook computes the weight; of a stage that is elsewhere it must not run."""

    def make(self) -> None:
        super().make()
        for layer in self.model.children():
            layer.register_forward_pre_hook(self.hook)
            layer.register_forward_hook(lambda _layer, _args, output: output * 1.5)

    @staticmethod
    def hook(layer: nn.Module, args: Any) -> Any:
        return (args[0] + layer.weight.mean(),)


class DetachesInside(Foreign):
    """No gradient comes to the first layers, which weight decay then leaves alone."""

    class Detaching(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden.detach())

    def make(self) -> None:
        super().make()
        self.model.third = self.Detaching(WIDTH, WIDTH)
        self.before = nn.Linear(WIDTH, WIDTH)

    def output(self, inputs: Tensor) -> Any:
        return self.model(self.before(inputs))


class LanguageModel(pl.LightningModule):
    """The commonest module of all: around a model of transformers, which computes the loss."""

    loader = staticmethod(tokens)

    def __init__(self, name: str, recompute: str = "", **options: Any) -> None:
        super().__init__()
        blocks = "n_layer" if name == "gpt2" else "num_hidden_layers"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = TINY_MODELS[name](**{blocks: 4, **options})
        self.model.train()
        if recompute:
            arguments = {"use_reentrant": recompute == "reentrant"}
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)

    def loss(self, batch: dict[str, Tensor]) -> Any:
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits: Tensor = self.model(input_ids=batch["input_ids"]).logits
        return logits

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())


class HiddenStates(LanguageModel):
    """Asks for what hooks collect; of it only the last state is used."""

    def loss(self, batch: dict[str, Tensor]) -> Any:
        out = self.model(batch["input_ids"], labels=batch["labels"], output_hidden_states=True)
        hooks = len(self.model.model.layers[-1]._forward_hooks)
        assert hooks <= 2, hooks
        return out.loss + 0.01 * out.hidden_states[-1].square().mean()


class Subclassed(PretrainModule):
    """Of our own module, with a step that calls the model for its loss."""

    loader = staticmethod(tokens)
    loss_reduction = "mean"

    def __init__(self) -> None:
        super().__init__(TINY_MODELS["llama"](num_hidden_layers=4), optimizer=SGD)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        self.log("val_loss", loss)

    def on_before_optimizer_step(self, optimizer: Any) -> None: ...

    def on_validation_epoch_end(self) -> None: ...

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits: Tensor = self.model(input_ids=batch["input_ids"]).logits
        return logits


HUGGING_FACE = {
    f"{name} {recompute}".strip(): partial(LanguageModel, name, recompute)
    for name in ("llama", "gpt2")
    for recompute in ("", "again", "reentrant")
}
HERE = [kind for kind in Foreign.__subclasses__() if kind.__module__ == __name__]
TRAINED: dict[str, Callable[[], Any]] = {
    **{kind.__name__: kind for kind in [Foreign, InPlace, *HERE, Nested, FrozenStage]},
    "Subclassed": Subclassed,
    **HUGGING_FACE,
    "hidden states": partial(HiddenStates, "llama"),
    "tied llama": partial(LanguageModel, "llama", tie_word_embeddings=True),
    "gemma2": partial(LanguageModel, "gemma2"),
}


def results(make: Callable[[], Any], rank: int | None, **strategy: Any) -> Any:
    """Fit, validate and predict: what came of it."""
    run = replace(LINEAR, strategy={**LINEAR.strategy, **strategy})  # type: ignore[dict-item]
    with run.setting(rank) as (trainer, seen):
        module = make()
        trainer.fit(module, module.loader(), module.loader())
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        weights = {name: p for name, p in module.named_parameters() if not p.is_meta}
        predicted = trainer.predict(module, module.loader())
    weights = {name: p.detach().numpy().copy() for name, p in weights.items()}
    return seen.losses, seen.logged, values, weights, torch.cat(predicted).numpy()


def assert_same(ours: Any, theirs: Any) -> None:
    losses, logged, values, weights, predicted = ours
    assert losses == pytest.approx(theirs[0], rel=2e-5, abs=2e-6)
    assert [entry.get("train_loss", 0.0) for entry in logged] == pytest.approx(
        [entry.get("train_loss", 0.0) for entry in theirs[1]], rel=2e-5, abs=2e-6
    )
    assert values.get("val_loss") == pytest.approx(theirs[2].get("val_loss"), rel=2e-5, abs=2e-6)
    assert predicted == pytest.approx(theirs[4], abs=2e-5)
    for name, value in weights.items():
        assert value == pytest.approx(theirs[3][name], rel=2e-5, abs=2e-6), name


def check_trains_alike(case: str, **strategy: Any) -> None:
    theirs = results(TRAINED[case], None)
    ours = run_ranks(lambda rank: results(TRAINED[case], rank, **strategy))
    for here in ours:
        assert_same(here, theirs)
    assert ours[0][0] == ours[1][0]
    assert ours[0][3].keys() | ours[1][3].keys() == theirs[3].keys()


SLOW = pytest.mark.slow  # `make test-laws` runs them
RARE = "again", "reent", "llama", "gemma2", "Subclassed"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=SLOW if any(word in case for word in RARE) else ())
        for case in TRAINED
    ],
)
def test_trains_as_in_one_process(case: str) -> None:
    check_trains_alike(case)


@SLOW
@pytest.mark.parametrize("case", TRAINED)
def test_trains_with_stages_in_the_middle(case: str) -> None:
    check_trains_alike(case, schedule="Interleaved1F1B")


def test_a_model_from_a_folder_keeps_its_weights_where_no_rank_holds_them_all(
    tmp_path: Path,
) -> None:
    """Without values at first; they were drawn anew, in place of the folder's."""
    TINY_MODELS["llama"](num_hidden_layers=4).save_pretrained(tmp_path)

    class FromFolder(LanguageModel):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)
            self.model = AutoModelForCausalLM.from_pretrained(tmp_path).train()

    def losses(rank: int | None) -> Any:
        with LINEAR.setting(rank) as (trainer, seen):
            with trainer.init_module(empty_init=rank is not None):
                module = FromFolder()
            assert all(parameter.is_meta is (rank is not None) for parameter in module.parameters())
            trainer.fit(module, tokens())
        return seen.losses

    assert run_ranks(losses)[0] == pytest.approx(losses(None), abs=2e-6)


class CallsTheModelInAHook(Foreign):
    def on_train_epoch_end(self) -> None:
        self.model(torch.zeros(1, WIDTH))


def test_a_hook_that_calls_the_model_is_told_so() -> None:
    def fails(rank: int) -> None:
        told = r"Linear of another stage is called outside of a step, and this rank has no weights"
        with LINEAR.setting(rank) as (trainer, _), pytest.raises(ValueError, match=told):
            trainer.fit(CallsTheModelInAHook(), rows())

    run_ranks(fails)
