"""Where the parts of a model lie, and what of a run that changes."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_align import LISA, ExactResume, Muon
from lightning_align._compat import glibc_memory
from lightning_align.modules import PretrainModule
from lightning_align.strategies import ZeROInfinityStrategy
from lightning_align.strategies.zero_infinity import strategy as strategy_module
from lightning_align.strategies.zero_infinity.devices import spread
from tests.helpers.covers import cover
from tests.helpers.offloaded import (
    ADAMW,
    STEPS,
    Regression,
    assert_same,
    compare,
    fit,
    points,
    small,
    text,
    trainer_of,
)
from tests.helpers.tiny_models import TINY_MODELS


@given(st.lists(st.integers(1, 1000), max_size=40), st.floats(0, 1))
def test_a_share_is_chosen_and_spread(sizes, share):
    chosen = list(spread(sizes, share))
    assert len(chosen) == len(sizes)
    for end in range(1, len(sizes) + 1):
        taken = sum(s for s, c in zip(sizes[:end], chosen, strict=False) if c)
        assert abs(taken - share * sum(sizes[:end])) <= max(sizes[:end])
    if share in (0, 1):
        assert set(chosen) <= {bool(share)}


def test_a_half_is_every_second():
    assert list(spread([10] * 6, 0.5)) == [True, False, True, False, True, False]


def clone(state):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


HOST = {"offload_params_device": "cpu", "offload_optimizer_device": "none"}
PLACES = {
    "cpu": HOST,
    "parameters on the drive": {"offload_optimizer_device": "cpu"},
    "state on the drive": {"offload_params_device": "cpu"},
    "half": {"offload_fraction": 0.5},
    "half of the state": {"offload_fraction": 0.5, "offload_params_device": "cpu"},
    "stage 2": {"stage": 2},
    "stage 1": {"stage": 1},
    "stage 1, half": {"stage": 1, "offload_fraction": 0.5},
}
RUNS = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulated": {"accumulate_grad_batches": 2},
}


@cover(arguments=PLACES, options=RUNS)
def test_wherever_it_lies_it_trains_as_in_memory(tmp_path, arguments, options):
    data = points()
    module = partial(Regression, schedule=True)
    compare(tmp_path, module, data, small(**arguments), **options)
    committed = tmp_path / "zero_infinity" / "rank00000" / "committed"
    assert committed.exists() == ("stage" in arguments and len(arguments) == 1)


BUILDS = {
    "AdamW": ADAMW,
    "Muon": partial(Muon, lr=1e-2),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
}


@cover(
    arguments={name: PLACES[name] for name in ("cpu", "half", "stage 2")},
    clip={"in backward": None, "clipped": 0.5},
    build=BUILDS,
)
def test_language_models_and_optimizers(tmp_path, arguments, clip, build):
    """Sums over tokens, which are scaled within backward where blocks are updated there."""
    data = text()
    module = lambda: PretrainModule(TINY_MODELS["llama_tied"](), optimizer=build)  # noqa: E731
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": clip}
    compare(tmp_path, module, data, small(**arguments), **options)


@pytest.mark.parametrize("arguments", [HOST, {"offload_fraction": 0.5}, {"stage": 2}], ids=str)
def test_tiles(tmp_path, arguments):
    """The order of a sum differs, which six steps amplify: in doubles it is far below 1e-12."""
    found = []
    build = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    for strategy in ("auto", small(tile_numel=200, **arguments)):
        data = DataLoader([(x.double(), y.double()) for x, y in points().dataset], batch_size=8)
        trainer = fit(tmp_path, Regression(build), data, strategy, precision="64-true")
        found.append(trainer.strategy.lightning_module_state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("arguments", [HOST, {"offload_fraction": 0.5}, {"stage": 2}], ids=str)
def test_bf16_true_has_its_masters_wherever_state_lies(tmp_path, arguments):
    found = []
    for strategy in (small(), small(overwrite=True, **arguments)):
        data = text()
        module = PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)
        trainer = fit(tmp_path, module, data, strategy, precision="bf16-true")
        states = strategy.optimizer_state(trainer.optimizers[0])["state"]
        found.append((strategy.lightning_module_state_dict(), states))
        assert sum("master" in key for key in states[0]) == 1
        strategy.close()
    assert_same(found[1], found[0])


@pytest.mark.parametrize("offload_activations", ["cpu", "nvme"])
def test_activations_may_be_on_a_drive_where_nothing_else_is(tmp_path, offload_activations):
    data = points()
    strategy = small(offload_activations=offload_activations, **HOST)
    compare(tmp_path, Regression, data, strategy)


@cover(state=["drop", "keep"], arguments={"cpu": HOST, "half": {"offload_fraction": 0.5}})
def test_lisa_in_host_memory(tmp_path, arguments, state):
    found = []
    for strategy in ("auto", small(**arguments)):
        lisa = LISA(1, interval_steps=2, optimizer_state=state, filename=None)
        module = PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)
        trainer = fit(tmp_path, module, text(), strategy, None, callbacks=[lisa])
        found.append((lisa.history, trainer.strategy.lightning_module_state_dict()))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("arguments", [HOST, {"offload_fraction": 0.5}, {"stage": 2}], ids=str)
def test_validation_comes_first_and_fit_twice(tmp_path, arguments):
    data = points()
    modules, found = (Regression(), Regression()), []
    for module, strategy in zip(modules, ("auto", small(**arguments)), strict=True):
        trainer = trainer_of(tmp_path, strategy)
        trainer.validate(module, data, verbose=False)
        found.append(float(trainer.callback_metrics["val_loss"]))
        trainer.fit(module, data)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data)
        trainer.validate(module, data, verbose=False)
        found.append(float(trainer.callback_metrics["val_loss"]))
    assert found[:2] == found[2:]
    assert_same(trainer.strategy.lightning_module_state_dict(), modules[0].state_dict())
    trainer.strategy.close()


@cover(saves_links=[True, False], arguments=[HOST, {"offload_fraction": 0.5}, {"stage": 2}])
def test_checkpoints_are_of_their_moment_and_read_by_either_side(tmp_path, arguments, saves_links):
    """Written in mid-window, while training goes on."""
    data, options = points(), {"accumulate_grad_batches": 2}
    save = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )
    strategy = small(save_distributed_checkpoint=saves_links, **arguments)
    callbacks = [ExactResume(), save]
    saving = {"enable_checkpointing": True, "callbacks": callbacks, **options}
    whole = fit(tmp_path, Regression(), data, strategy, **saving)
    expected = clone(strategy.lightning_module_state_dict())
    states = clone(strategy.optimizer_state(whole.optimizers[0]))
    strategy.close()
    for after in ("auto", small(overwrite=True, **arguments)):
        path = tmp_path / "step=2.ckpt"
        trainer = fit(
            tmp_path, Regression(), data, after, path, callbacks=[ExactResume()], **options
        )
        assert_same(trainer.strategy.lightning_module_state_dict(), expected)
        assert_same(trainer.strategy.optimizer_state(trainer.optimizers[0]), states)


def test_in_host_memory_there_is_no_folder_and_nothing_goes_away(tmp_path):
    strategy = small(**HOST)
    module = Regression()
    trainer = fit(tmp_path, module, points(), strategy)
    assert not (tmp_path / "zero_infinity").exists()
    assert not any(p.isnan().any() for p in module.parameters())
    engine = strategy._engine
    assert engine.pool.allocated_bytes == 0  # no block was ever copied
    assert (engine.threads.traffic.read, engine.threads.traffic.written) == (0, 0)
    memories = [block.memory.untyped_storage().data_ptr() for block in engine.blocks]
    assert {p.untyped_storage().data_ptr() for p in module.parameters()} == set(memories)
    trainer.strategy.close()


@pytest.mark.parametrize("arguments", [HOST, {"offload_fraction": 0.5}], ids=["cpu", "half"])
def test_in_host_memory_allocations_are_left_to_malloc(tmp_path, monkeypatch, arguments):
    """To map gradients and activations anew at every step took a fourth of its time."""
    mapped = []
    for module in (glibc_memory, strategy_module):
        monkeypatch.setattr(module, "map_large_allocations", lambda: mapped.append(True))
    fit(tmp_path, Regression(), points(), small(**arguments))
    assert bool(mapped) == (arguments is not HOST)


def test_stage_2_keeps_parameters_and_writes_what_a_commit_needs(tmp_path):
    data, strategy, module = points(), small(stage=2), Regression()
    fit(tmp_path, module, data, strategy, max_steps=1)
    assert not any(p.isnan().any() for p in module.parameters())
    assert strategy._engine.threads.traffic.read == 0  # there are no moments yet
    strategy.close()
    trainer = fit(tmp_path, Regression(), data, small(stage=2), "last")
    whole = Regression()
    fit(tmp_path, whole, data)
    assert_same(trainer.strategy.lightning_module_state_dict(), whole.state_dict())


@pytest.mark.parametrize("arguments", [HOST, {"offload_fraction": 0.5}], ids=["cpu", "half"])
def test_last_is_a_callbacks_checkpoint_and_says_so(tmp_path, arguments):
    data = points()
    save = lambda: ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=2)  # noqa: E731
    saving = {"enable_checkpointing": True}
    strategy = small(**arguments)
    with pytest.warns(UserWarning, match="no step is committed"):
        fit(
            tmp_path,
            Regression(),
            data,
            strategy,
            "last",
            max_steps=3,
            callbacks=[save()],
            **saving,
        )
    strategy.close()
    strategy = small(**arguments)
    trainer = fit(tmp_path, Regression(), data, strategy, "last", callbacks=[save()], **saving)
    assert trainer.global_step == STEPS
    whole = Regression()
    fit(tmp_path, whole, data)
    assert_same(strategy.lightning_module_state_dict(), whole.state_dict())


def test_a_committed_step_is_not_overwritten_by_what_commits_nothing(tmp_path):
    data = points()
    strategy = small()
    fit(tmp_path, Regression(), data, strategy, max_steps=3)
    strategy.close()
    with pytest.raises(ValueError, match="holds step 3 of an earlier run"):
        fit(tmp_path, Regression(), data, small(offload_fraction=0.5), "last")
    fit(tmp_path, Regression(), data, small(**HOST)).strategy.close()  # touches no folder
    trainer = fit(tmp_path, Regression(), data, small(), "last")
    assert trainer.global_step == STEPS


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"stage": 4}, r"stage=4\): must be 1, 2 or 3"),
        ({"offload_params_device": "disk"}, "offload_params_device='disk'"),
        ({"offload_optimizer_device": "gpu"}, "offload_optimizer_device='gpu'"),
        ({"offload_fraction": 1.5}, "offload_fraction=1.5.*between 0 and 1"),
        ({"offload_fraction": 0.5, **HOST}, "nothing is on a drive"),
        ({"nvme_path": []}, "at least one folder"),
        ({"optimizer_buffer_count": 0}, "optimizer_buffer_count=0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        ZeROInfinityStrategy(**arguments)
