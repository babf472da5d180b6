"""LISA: blocks that it has frozen cost the disk nothing but the reading of their weights."""

from pathlib import Path

import lightning.pytorch as pl

from lightning_align import LISA
from lightning_align.modules import PretrainModule
from lightning_align.offload.files import DirectFile
from tests.helpers.covers import cover
from tests.helpers.offloaded import ADAMW, fit, small, text
from tests.helpers.tiny_models import TINY_MODELS


class Steps(pl.Callback):
    """What was moved in each step, and where states lie behind it."""

    def __init__(self, monkeypatch):
        self.moved, self.states, self.now = [], [], []
        for what in ("read", "write"):
            move = getattr(DirectFile, what)

            def counted(file, memory, offset, move=move, what=what):
                self.now.append((what, Path(file.path).name, offset))
                return move(file, memory, offset)

            monkeypatch.setattr(DirectFile, what, counted)

    def on_train_batch_start(self, *_):
        self.now.clear()

    def on_train_batch_end(self, trainer, *_):
        trainer.strategy._engine.finish_updates()  # which would wait for the next batch
        store = trainer.strategy._engine.store
        numbers = {name: number for number, name in enumerate(store.blocks)}
        self.blocks = {n: b for b in store.blocks.values() for n in [numbers[b.name]]}
        self.moved.append(list(self.now))
        self.states.append(
            {
                numbers[name]: any(p.tensors for p in ps.values())
                for name, ps in store.states.items()
            }
        )


@cover(state=["drop", "keep"], clip={"early": None, "waits": 0.5})
def test_a_frozen_block_is_only_read_for_its_weights(tmp_path, monkeypatch, state, clip):
    steps = Steps(monkeypatch)
    lisa = LISA(1, interval_steps=3, optimizer_state=state, filename=None)
    module = PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)
    data = text()
    options = {"callbacks": [lisa, steps], "gradient_clip_val": clip}
    trainer = fit(tmp_path, module, data, small(), **options)
    trainer.strategy.close()
    active = {step: set(blocks) for step, blocks in lisa.history}
    assert len({min(blocks) for blocks in active.values()}) > 1, "it must have changed"
    count = len(module.layers.blocks)
    for step, moved in enumerate(steps.moved):
        now = active[max(begin for begin in active if begin <= step)]
        for frozen in set(range(count)) - now:
            files = {f"{frozen:05d}.{slot}.block" for slot in (0, 1)}
            mine = [(what, offset) for what, name, offset in moved if name in files]
            assert {what for what, _ in mine} <= {"read"}
            assert all(offset < steps.blocks[frozen].nbytes for _, offset in mine)
            assert len({name for _, name, _ in moved if name in files}) <= 1  # one slot, no copy
            if state == "drop":
                assert not steps.states[step][frozen]
        for trained in now:
            assert steps.states[step][trained]
            assert any(
                what == "write" and name.startswith(f"{trained:05d}") for what, name, _ in moved
            )
