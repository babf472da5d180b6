"""LISA: what trains when, to the last bit; what is given back; two ranks; bad input.

tests/laws/test_lisa.py does the same over all models and optimizers.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_align import LISA, DPOModule, ExactResume
from lightning_align.callbacks import lisa as lisa_file
from lightning_align.callbacks.lisa import held_bytes
from lightning_align.callbacks.lisa_layers import draw_blocks
from lightning_align.strategies.pipeline.strategy import PipelineStrategy
from tests.helpers.lisa import (
    ADAMW,
    BATCHES,
    BLOCKS,
    CONFIGS,
    Layered,
    SaveAt,
    Watch,
    blocks_of,
    build,
    check_frozen_part,
    check_moves,
    check_replay,
    check_two_ranks,
    names_of_blocks,
    train,
    watched,
)
from tests.modules.test_dpo import pairs
from tests.modules.test_pretrain import weights


def test_schedule_is_what_is_drawn_and_changes_with_the_interval() -> None:
    callback = LISA(2, interval_steps=3, seed=5)
    module = build("gpt2")
    watch = watched(module, callback)
    assert watch.active == [callback.schedule(step) for step in range(12)]
    assert watch.active == [draw_blocks(5, step // 3, 2, [1.0] * BLOCKS) for step in range(12)]
    assert [step for step, _ in callback.history] == [0, 3, 6, 9]
    assert len(set(watch.active)) > 1


def test_schedule_before_setup_says_so() -> None:
    with pytest.raises(ValueError, match=r"number of blocks is not known yet\. Ask from setup on"):
        LISA().schedule(0)


def test_weight_norm_draws_in_proportion_to_the_norms() -> None:
    module = build("gpt2")
    with torch.no_grad():
        for block in blocks_of(module)[:2]:
            for parameter in block.parameters():
                parameter.mul_(1e-6)
    callback = LISA(2, interval_steps=1, sampling="weight_norm")
    watch = watched(module, callback)
    # Norms are 1e-6 : 1, and a block that never trains stays there.
    assert watch.active == [(2, 3)] * len(BATCHES)


def test_a_list_of_weights_is_followed() -> None:
    watch = watched(build("gpt2"), LISA(1, 1, sampling=[1.0, 0.0, 0.0, 1.0]))
    assert set(watch.active) == {(0,), (3,)}


@pytest.mark.parametrize(("name", "accumulate"), [("gpt2", 2), ("hand-written", 1)])
def test_every_active_block_moves_and_every_frozen_one_is_bit_equal(
    name: str, accumulate: int
) -> None:
    check_moves(name, accumulate)


@pytest.mark.parametrize("name", ["gpt2", "hand-written"])
def test_weights_match_a_replay_of_lmflow_bit_for_bit(name: str) -> None:
    check_replay(name, "keep", accumulate=2)


@pytest.mark.parametrize(("state", "accumulate"), [("drop", 2), ("keep", 1)])
def test_gradients_and_optimizer_state_are_given_back(accumulate: int, state: str) -> None:
    module, callback = build("llama"), LISA(2, interval_steps=2, optimizer_state=state)
    watch = watched(module, callback, accumulate_grad_batches=accumulate)
    names = names_of_blocks(module)
    seen: set[int] = set()
    for batch in range(len(BATCHES)):
        opens_window = batch % accumulate == 0
        assert (watch.gradients_in_forward[batch] == 0) is opens_window
        if (batch + 1) % accumulate:
            continue
        active = watch.active[batch]
        seen |= set(active)
        for block in range(BLOCKS):
            has_state = bool(names[block] & watch.states[batch])
            assert has_state is (block in (active if state == "drop" else seen))
        trained = sum(
            parameter.nbytes
            for name, parameter in watch.weights[0].items()
            if name in watch.states[batch]
        )
        # Two moments of the weights' size, and a number of steps for each tensor.
        steps = 4 * len(watch.states[batch])
        assert watch.optimizer_bytes[batch] == 2 * trained + steps


class Stale(pl.Callback):
    """Leaves gradients behind at the end of a step, as code of a user's own might."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.grad = torch.ones_like(parameter)


class SetsToZero(Layered):
    """Trap: AdamW moves a weight whose gradient is zero, by its decay and its momentum."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("kind", [Layered, SetsToZero])
@pytest.mark.parametrize("state", ["drop", "keep"])
def test_a_stale_gradient_does_not_move_a_frozen_block(kind: Any, state: str) -> None:
    module, callback = kind(), LISA(2, interval_steps=2, optimizer_state=state)
    watch = Watch(callback)
    train(module, callback, watch, Stale())
    names = names_of_blocks(module)
    for batch, (before, after) in enumerate(pairwise(watch.weights)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        for block in range(BLOCKS):
            assert bool(moved & names[block]) is (block in watch.active[batch])


def test_the_two_policies_differ() -> None:
    kept, dropped = build("hand-written"), build("hand-written")
    watched(kept, LISA(2, interval_steps=2, optimizer_state="keep"))
    watched(dropped, LISA(2, interval_steps=2, optimizer_state="drop"))
    assert not torch.equal(weights(kept), weights(dropped))


@pytest.mark.parametrize("name", ["gpt2", "hand-written"])
def test_resumes_in_mid_interval_and_mid_accumulation(name: str, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        return {"accumulate_grad_batches": 2}

    more = [] if name == "gpt2" else [ExactResume()]
    whole, second = build(name), build(name)
    saved = tmp_path / "middle.ckpt"
    arguments: dict[str, Any] = {"interval_steps": 2, "sampling": "weight_norm"}
    callback = LISA(2, **arguments)
    train(whole, callback, *more, SaveAt(6, saved), **options())  # 3 steps and half a window
    resumed = LISA(2, **arguments)
    more = [] if name == "gpt2" else [ExactResume()]
    watch = Watch(resumed)
    train(second, resumed, *more, watch, ckpt_path=saved, **options())
    assert watch.gradients_in_forward[0] > 0
    assert torch.equal(weights(second), weights(whole))
    assert resumed.history == callback.history


def test_a_drawn_set_is_restored_and_not_drawn_again(tmp_path: Path) -> None:
    """With weight_norm a second draw in mid-interval would be by other weights."""
    arguments: dict[str, Any] = {"interval_steps": 4, "sampling": "weight_norm"}
    train(build("gpt2"), LISA(2, **arguments), SaveAt(1, tmp_path / "two.ckpt"), max_steps=3)
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)
    (mine,) = (s for name, s in state["callbacks"].items() if name.startswith("LISA"))
    other = [block for block in range(BLOCKS) if block not in mine["history"][0][1]]
    mine["history"] = [[0, other]]
    torch.save(state, tmp_path / "two.ckpt")
    resumed = LISA(2, **arguments)
    watch = Watch(resumed)
    train(build("gpt2"), resumed, watch, ckpt_path=tmp_path / "two.ckpt", max_steps=4)
    assert watch.active == [tuple(other)] * 2


@pytest.mark.parametrize("part", ["train_embeddings", "train_head"])
def test_embedding_and_head_can_be_frozen(part: str) -> None:
    check_frozen_part(part, "gpt2")


@pytest.mark.parametrize("part", ["train_embeddings", "train_head"])
def test_a_tied_embedding_trains_or_does_not(part: str) -> None:
    with pytest.raises(ValueError, match="are one weight, which trains or does not"):
        train(build("gpt2"), LISA(2, **{part: False}))
    module = build("gpt2")
    before = module.model.transformer.wte.weight.detach().clone()
    train(module, LISA(2, train_embeddings=False, train_head=False))
    assert torch.equal(before, module.model.transformer.wte.weight)
    train(module, LISA(2))
    assert not torch.equal(before, module.model.transformer.wte.weight)


def test_a_parameter_of_a_block_that_the_head_shares_is_not_switched_with_the_block() -> None:
    module = build("hand-written")
    module.blocks[1][0].weight = module.blocks[0][0].weight  # two blocks share one
    module.blocks[3][0].bias = nn.Parameter(torch.zeros(16))
    module.norm_bias = module.blocks[3][0].bias  # and something outside another
    callback = LISA(1, 1, sampling=[1.0, 1.0, 1.0, 0.0])
    watch = watched(module, callback)
    for batch, (before, after) in enumerate(pairwise(watch.weights)):
        (active,) = watch.active[batch]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert ("blocks.0.0.weight" in moved) is (active in (0, 1))
        assert "norm_bias" in moved
        assert "blocks.3.0.weight" not in moved


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes that autograd saves, each storage once."""
    held: dict[int, torch.Tensor] = {}
    total: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(tensor.untyped_storage().nbytes() for tensor in held.values()))


class Activations(pl.Callback):
    """Bytes that the forward of each batch saves, but for the weights."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        step = pl_module.training_step
        own = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}
        assert own

        def measured(batch: Any, batch_idx: int) -> Any:
            with saved_bytes() as total:
                loss = step(batch, batch_idx)
            self.found.append(total[0])
            return loss

        vars(pl_module)["training_step"] = measured


def forward_bytes(active: list[float], **options: Any) -> int:
    module = build("llama", activation_checkpointing=options.pop("checkpointing", False))
    activations = Activations()
    number = sum(weight > 0 for weight in active)
    train(module, LISA(number, sampling=active, **options), activations, batches=BATCHES[:1])
    return activations.found[0]


def test_nothing_is_saved_below_the_lowest_block_that_trains_if_embeddings_are_frozen() -> None:
    # Each block saves as much as any other; what is above all of them is the same everywhere.
    tops = [
        forward_bytes([0.0] * block + [1.0] + [0.0] * (BLOCKS - 1 - block), train_embeddings=False)
        for block in range(BLOCKS)
    ]
    steps = [lower - upper for lower, upper in pairwise(tops)]
    assert len(set(steps)) == 1
    assert steps[0] > 0
    # A trained embedding needs the way down through all of them.
    assert forward_bytes([0.0, 0.0, 0.0, 1.0]) > tops[0]
    frozen = [forward_bytes([0.0, 0.0, 1.0, 1.0], train_embeddings=e) for e in (True, False)]
    assert frozen[1] < 0.62 * frozen[0]


def test_a_frozen_block_saves_less_than_one_that_trains() -> None:
    assert forward_bytes([1.0, 1.0, 0.0, 0.0]) < forward_bytes([1.0, 1.0, 1.0, 1.0])


def test_a_block_that_comes_back_moves_by_a_growing_part_of_its_step() -> None:
    """Gradients of an SGD step do not depend on history: the step of a block in its k-th step
    after it came back is k / (W + 1) of the full one, its decay included."""
    sgd = partial(torch.optim.SGD, lr=0.5, weight_decay=0.1)
    arguments: dict[str, Any] = {"interval_steps": 4, "seed": 2}
    warm, warmup = LISA(2, **arguments, reactivation_warmup_steps=2), 2
    module = build("hand-written", sgd)
    watch = watched(module, warm)
    names = names_of_blocks(module)
    returned_at_all = False
    for step, (before, after) in enumerate(pairwise(watch.weights)):
        cold = build("hand-written", sgd)
        cold.load_state_dict(before)
        alone = LISA(2, sampling=[float(b in watch.active[step]) for b in range(BLOCKS)])
        train(cold, alone, batches=BATCHES[step : step + 1])
        full = dict(cold.named_parameters())
        for block in watch.active[step]:
            returned = step >= 4 and block not in watch.active[step - step % 4 - 1]
            returned_at_all |= returned
            share = min(1.0, (step % 4 + 1) / (warmup + 1)) if returned else 1.0
            for parameter in names[block]:
                expected = share * (full[parameter] - before[parameter])
                moved = after[parameter] - before[parameter]
                # The difference of two fp32 weights of about 1 has an error of 1e-7.
                torch.testing.assert_close(moved, expected, rtol=0, atol=3e-7)
    assert returned_at_all


def test_two_ranks_equal_one_process_and_send_the_gradients_of_active_blocks_only(
    tmp_path: Path,
) -> None:
    check_two_ranks("gpt2", 2, tmp_path)


def test_dpo_trains_the_policy_by_blocks_and_leaves_the_reference_alone() -> None:
    pl.seed_everything(1, verbose=False)
    module = DPOModule(CONFIGS["llama"], optimizer=ADAMW)
    reference = copy.deepcopy(module.reference_layers.model.state_dict())
    callback = LISA(1, 2)
    watch = Watch(callback)
    train(module, callback, watch, batches=[pairs(i, i + 1) for i in range(8)])
    names = names_of_blocks(module)
    assert len(set(watch.active)) > 1
    for batch, (before, after) in enumerate(pairwise(watch.weights)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        if batch:  # of the first pair, chosen and rejected pull alike at some weights
            assert [bool(moved & names[block]) for block in range(BLOCKS)] == [
                block in watch.active[batch] for block in range(BLOCKS)
            ]
    for name, value in module.reference_layers.model.state_dict().items():
        assert torch.equal(value, reference[name])
    assert not any(p.requires_grad for p in module.reference_layers.model.parameters())


def test_logs_active_blocks_and_held_bytes(tmp_path: Path) -> None:
    module = build("llama")
    trainer = train(module, LISA(2, 4), logger=CSVLogger(tmp_path), max_steps=6)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("lisa/")}
    every = {name: parameter.nbytes for name, parameter in module.named_parameters()}
    active = [int(logged[f"lisa/active_{i}"]) for i in range(2)]
    names = names_of_blocks(module)
    frozen = set().union(*(names[block] for block in range(BLOCKS) if block not in active))
    trained = sum(size for name, size in every.items() if name not in frozen)
    assert logged["lisa/weights_bytes"] == sum(every.values())
    assert logged["lisa/gradients_bytes"] == trained
    tensors = len(every) - len(frozen)
    assert logged["lisa/optimizer_bytes"] == 2 * trained + 4 * tensors
    rows_of_file = (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert "lisa/active_0" in rows_of_file[0]
    assert len(rows_of_file) == 7


def test_what_other_code_keeps_in_the_state_is_no_moment() -> None:
    module = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    before = held_bytes(module, optimizer)
    optimizer.state["a hook's"] = ["no", "dict"]
    assert held_bytes(module, optimizer) == before


def test_picture_is_written_at_the_end(tmp_path: Path) -> None:
    train(build("gpt2"), LISA(2, 3, filename="when.png"), folder=tmp_path)
    assert Image.open(tmp_path / "when.png").size[0] > 500
    train(build("gpt2"), LISA(2, 3, filename="dry.png"), folder=tmp_path, fast_dev_run=True)
    assert not (tmp_path / "dry.png").exists()


def test_without_matplotlib_it_trains_and_says_that_it_will_not_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("Drawing needs matplotlib. Run: pip install lightning-align[plot]")

    monkeypatch.setattr(lisa_file, "new_figure", missing)
    callback = LISA(2, 3)
    with pytest.warns(UserWarning, match=r"draws no picture.*pip install lightning-align\[plot\]"):
        train(build("gpt2"), callback, folder=tmp_path, max_steps=2)
    assert callback.history
    assert not (tmp_path / "lisa.png").exists()


def test_everything_trains_again_afterwards() -> None:
    module = build("gpt2")
    train(module, LISA(1, train_embeddings=False, train_head=False), max_steps=2)
    assert all(parameter.requires_grad for parameter in module.parameters())
    before = weights(module)
    train(module, None, max_steps=2)
    assert (weights(module) != before).float().mean() > 0.9


def test_everything_trains_again_after_an_error() -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("out of memory")

    module = build("gpt2")
    with pytest.raises(RuntimeError, match="out of memory"):
        train(module, LISA(1), Fails())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_second_run_draws_anew_and_one_that_goes_on_does_not() -> None:
    callback = LISA(2, 3)
    module = build("gpt2")
    trainer = train(module, callback, max_steps=6)
    assert [step for step, _ in callback.history] == [0, 3]
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(BATCHES, batch_size=None))
    assert [step for step, _ in callback.history] == [0, 3, 6]
    train(build("gpt2"), callback, max_steps=3)
    assert [step for step, _ in callback.history] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activated_layers": 0}, r"LISA\(activated_layers=0\): must be at least 1"),
        ({"interval_steps": 0}, r"LISA\(interval_steps=0\): must be at least 1"),
        ({"sampling": "random"}, "must be 'uniform', 'weight_norm' or a list of weights"),
        ({"sampling": [1.0, 10**309]}, "weights must be finite and not negative"),
        ({"sampling": [1.0, -1.0]}, "weights must be finite and not negative"),
        ({"sampling": [1.0, float("nan")]}, "weights must be finite and not negative"),
        ({"sampling": [0.0, 0.0]}, "sum of the weights must be above 0"),
        ({"sampling": [1.0, 0.0]}, "at least activated_layers=2 weights must be above 0"),
        ({"optimizer_state": "offload"}, r"optimizer_state='offload'\): must be 'drop' or 'keep'"),
        ({"reactivation_warmup_steps": 20}, r"must lie in \[0, interval_steps=20\)"),
        ({"reactivation_warmup_steps": -1}, r"must lie in \[0, interval_steps=20\)"),
        ({"seed": -1}, "must not be negative"),
        ({"filename": "lisa.svg"}, "must end in '.png'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LISA(**arguments)


class Manual(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Layered):
    """Lightning itself refuses it where it does not optimize manually."""

    def configure_optimizers(self) -> Any:
        return [self.optimizer(part.parameters()) for part in (self.blocks, self.head)]


class NoOptimizer(Layered):
    def configure_optimizers(self) -> Any:
        return None


class Filtered(Layered):
    """Trap: frozen first, then given to the optimizer, so that the frozen blocks never train."""

    def configure_optimizers(self) -> Any:
        named = [p for n, p in self.named_parameters() if not n.startswith("blocks.2")]
        return self.optimizer(named)


class FrozenBlocks(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            Layered,
            {"activated_layers": 5},
            r"activated_layers=5\): the model has 4 blocks in 'blocks'. Lower it, or set layers_at",
        ),
        (
            Layered,
            {"layers_attribute": "layers"},
            r"layers_attribute='layers'\): must name a list of blocks.*candidates.*'blocks' \(4\)",
        ),
        (Layered, {"sampling": [1.0] * 3}, "must have a weight for each of the 4 blocks"),
        (Manual, {}, r"model='Manual'\): it optimizes manually"),
        (TwoOptimizers, {}, "multiple optimizers is only supported with manual optimization"),
        (
            NoOptimizer,
            {},
            r"its optimizer knows nothing of 11 parameter\(s\), first 'embedding.weight'",
        ),
        (
            Filtered,
            {},
            r"its optimizer knows nothing of 2 parameter\(s\), first 'blocks.2.0.weight', which",
        ),
        (FrozenBlocks, {}, "its block 'blocks.1' has no parameter that requires a gradient"),
    ],
)
def test_bad_input_is_refused_before_training(
    module: Any, arguments: dict[str, Any], message: str
) -> None:
    ours = module()
    before = weights(ours)
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(ours, LISA(**arguments))
    assert torch.equal(weights(ours), before)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, PipelineStrategy])
def test_strategies_that_cannot_follow_are_refused_at_setup(strategy: Any) -> None:
    trainer: Any = SimpleNamespace(strategy=object.__new__(strategy))
    message = rf"LISA\(strategy='{strategy.__name__}'\): it does not follow.*strategy='ddp'"
    with pytest.raises(ValueError, match=message):
        LISA().setup(trainer, Layered(), "fit")


def test_a_stateful_communication_hook_is_refused_at_setup() -> None:
    trainer: Any = SimpleNamespace(strategy=DDPStrategy(ddp_comm_state=object()))
    with pytest.raises(ValueError, match=r"state of its communication hook.*Leave ddp_comm_state"):
        LISA().setup(trainer, Layered(), "fit")


@pytest.mark.peer
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter"])
def test_peft_is_refused(how: str) -> None:
    from peft import LoraConfig, get_peft_model

    class Adapted(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
            config = LoraConfig(target_modules=["q_proj"])
            if how == "add_adapter":
                model.add_adapter(config)
            self.model = get_peft_model(model, config) if how == "get_peft_model" else model

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"adapters of PEFT \('.*q_proj'\).*merge_and_unload"):
            train(Adapted(), LISA())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, r"LISA\(seed=1\): the checkpoint was written with 0. Continue"),
        ({"activated_layers": 1}, r"activated_layers=1\): the checkpoint was written with 2"),
        ({"interval_steps": 5}, r"interval_steps=5\): the checkpoint was written with 3"),
        (
            {"sampling": "weight_norm"},
            r"'weight_norm'\): the checkpoint was written with 'uniform'",
        ),
    ],
    ids=str,
)
def test_another_schedule_is_refused_at_resume(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"activated_layers": 2, "interval_steps": 3}
    trainer = train(build("gpt2"), LISA(**arguments), max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=message):
        train(build("gpt2"), LISA(**{**arguments, **changed}), ckpt_path=tmp_path / "two.ckpt")


def test_another_number_of_blocks_is_refused_at_resume(tmp_path: Path) -> None:
    trainer = train(build("hand-written"), LISA(1), max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)
    smaller = Layered(blocks=3)
    kept = {name: v for name, v in state["state_dict"].items() if "blocks.3" not in name}
    state["state_dict"] = kept
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="it leads to 3 blocks, and to 4 in the checkpoint"):
        train(smaller, LISA(1), ckpt_path=tmp_path / "two.ckpt")


def test_weights_that_are_not_finite_are_named_by_weight_norm() -> None:
    module = build("gpt2")
    with torch.no_grad():
        blocks_of(module)[2].ln_1.weight.fill_(float("nan"))
    callback = LISA(2, sampling="weight_norm")
    callback._layers = module.layers
    with pytest.raises(ValueError, match=r"weights of 'transformer.h.2' are not finite"):
        callback.schedule(0)


def test_it_can_join_a_run_that_began_without_it(tmp_path: Path) -> None:
    train(build("gpt2"), None, SaveAt(4, tmp_path / "five.ckpt"), max_steps=6)
    callback = LISA(2, 3)
    module = build("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(module, callback, ckpt_path=tmp_path / "five.ckpt", max_steps=8)
    assert [step for step, _ in callback.history] == [5, 6]
