"""DPO: the reference's blocks are read and never written or saved; all else is as in memory."""

from __future__ import annotations

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DogeConfig, MixtralConfig

from lightning_align.modules import DPOModule
from lightning_align.offload.away import Away
from lightning_align.offload.record import read_record
from tests.helpers.offloaded import ADAMW, assert_same, small, trainer_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE
from tests.strategies.zero_infinity.test_ranks import trainer_of as ranks_of

BUILDS = {
    "a copy": lambda name: DPOModule(TINY_MODELS[name]().config, optimizer=ADAMW),
    "another": lambda name: DPOModule(
        TINY_MODELS[name]().config, TINY_MODELS[name](hidden_size=48).config, optimizer=ADAMW
    ),
}


SILENT = "gives no router logits"
GIVEN = {"router_aux_loss_coef": 0.1}
REFUSED = pytest.raises(ValueError, match=SILENT)


def mixture_of_experts():
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)


def pairs():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB_SIZE, (6, 4, 12), generator=generator)
    completion = torch.zeros_like(ids)
    completion[..., 5:] = 1
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "completion_mask": c}
        for i, c in zip(ids, completion, strict=True)
    ]


def ends(trainer, module, ckpt_path=None):
    trainer.fit(module, DataLoader(pairs(), batch_size=None), ckpt_path=ckpt_path)
    found = trainer.strategy.lightning_module_state_dict()
    states = trainer.strategy.optimizer_state(trainer.optimizers[0])
    logged = {k: v for k, v in trainer.callback_metrics.items() if "per_second" not in k}
    logged["fingerprint"] = module._reference.fingerprint
    return copy.deepcopy(found), copy.deepcopy(states), logged


def built(trainer, build, empty=False):
    torch.manual_seed(7)
    with trainer.init_module(empty_init=empty):
        return build()


@pytest.mark.parametrize(
    ("kind", "name", "clip"),
    [("a copy", "gpt2", None), ("a copy", "llama_tied", 0.1), ("another", "llama_tied", None)],
)
def test_training_is_that_of_memory(tmp_path, kind, name, clip):
    found = []
    for strategy in (None, small(nvme_path=str(tmp_path / "nvme"))):
        trainer = trainer_of(tmp_path, strategy, gradient_clip_val=clip)
        module = built(trainer, partial(BUILDS[kind], name))
        found.append(ends(trainer, module))
    assert_same(found[1], found[0])
    engine = strategy._engine
    frozen = [block for block in engine.blocks if block.name.startswith("reference.")]
    assert len(frozen) == len(engine.blocks) / 2
    assert all(isinstance(p, Away) for b in frozen if not b.kept for p in b.parameters.values())
    strategy.close()


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", ["simpo", "sft"]])
def test_a_router_is_trained_as_in_memory(tmp_path, loss_type):
    """By a loss of its own, which is on in each step."""
    found = []
    build = partial(DPOModule, mixture_of_experts(), loss_type=loss_type, optimizer=ADAMW)
    for strategy in (None, small(nvme_path=str(tmp_path / "nvme"))):
        trainer = trainer_of(tmp_path, strategy)
        module = built(trainer, partial(build, router_aux_loss_coef=0.5))
        found.append(ends(trainer, module))
    assert found[0][2]["aux_loss"] > 0
    assert_same(found[1], found[0])
    strategy.close()


@pytest.mark.slow
def test_a_router_that_says_nothing_is_named(tmp_path):
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = DogeConfig(**sizes, **heads, pad_token_id=0)
    for options, told in (({}, pytest.warns(UserWarning, match=SILENT)), (GIVEN, REFUSED)):
        strategy = small(nvme_path=str(tmp_path / f"nvme{len(options)}"))
        trainer = trainer_of(tmp_path, strategy, max_steps=2)
        module = built(trainer, partial(DPOModule, config, **options), empty=True)
        with told:
            _, _, logged = ends(trainer, module)
            assert "aux_loss" not in logged
        strategy.close()


HOST = {"offload_params_device": "cpu", "offload_optimizer_device": "cpu"}


@pytest.mark.parametrize("place", [HOST, {"offload_fraction": 0.5}, {"stage": 2}], ids=str)
def test_wherever_it_lies_training_is_that_of_memory(tmp_path, place):
    found = []
    for strategy in (None, small(nvme_path=str(tmp_path / "nvme"), **place)):
        trainer = trainer_of(tmp_path, strategy)
        found.append(ends(trainer, built(trainer, partial(BUILDS["a copy"], "llama_tied"))))
    assert_same(found[1], found[0])
    strategy.close()


def test_the_reference_has_one_file_which_no_step_touches(tmp_path):
    trainer = trainer_of(tmp_path, small(nvme_path=str(tmp_path / "nvme")), max_steps=1)
    module = built(trainer, partial(BUILDS["another"], "llama"))
    ends(trainer, module)
    folder = tmp_path / "nvme" / "rank00000"
    numbers = [n for n, b in enumerate(trainer.strategy._engine.blocks) if b.read_only]
    files = [*folder.glob("*.block")]
    own = [file for file in files if int(file.name[:5]) in numbers]
    assert sorted(file.name for file in own) == [f"{n:05d}.0.block" for n in numbers]
    values = sum(p.numel() * 4 for p in module.reference_layers.model.parameters())
    assert values <= sum(file.stat().st_size for file in own) <= values + 8192 * len(own)
    before = {file: file.read_bytes() for file in own}
    trainer.fit_loop.epoch_loop.max_steps = 4
    ends(trainer, module)
    assert {file: file.read_bytes() for file in own} == before
    trainer.strategy.close()


@pytest.mark.parametrize("empty", [True, False])
def test_a_committed_step_has_its_reference(tmp_path, empty):
    (path := tmp_path / "nvme").mkdir()
    found = []
    build = partial(BUILDS["a copy"], "llama_tied")
    for number, limits in enumerate([(-1,), (3, -1)]):
        for steps in limits:
            strategy = small(nvme_path=str(path / str(number)))
            trainer = trainer_of(tmp_path, strategy, max_steps=steps)
            result = ends(trainer, built(trainer, build, empty), "last")
            strategy.close()
        found.append(result)
    assert_same(found[1], found[0])
    record = read_record(path / "1" / "rank00000")
    assert record.step == trainer.global_step == 6


def test_on_two_ranks_each_reads_its_part_of_the_reference(tmp_path):
    def run(rank):
        found = []
        for strategy in ("ddp", small()):
            trainer = ranks_of(tmp_path, rank, strategy)
            module = built(trainer, partial(BUILDS["another"], "llama_tied"))
            found.append(ends(trainer, module)[:2])
        files = (tmp_path / "zero_infinity" / f"rank{rank:05d}").glob("*.block")
        numbers = [n for n, b in enumerate(strategy._engine.blocks) if b.read_only]
        sizes = sum(f.stat().st_size for f in files if int(f.name[:5]) in numbers)
        whole = sum(p.numel() * 4 for p in module.reference_layers.model.parameters())
        strategy.close()
        return found, sizes / whole

    results = run_ranks(run, 2, timeout_s=120)
    assert_same(results[0][0][1], results[0][0][0])
    assert all(0.45 < share < 0.7 for _, share in results)


def test_another_reference_is_refused(tmp_path):
    for seed in (7, 8):
        strategy = small(nvme_path=str(tmp_path / "nvme"))
        trainer = trainer_of(tmp_path, strategy, max_steps=2 * seed)
        torch.manual_seed(seed)
        for empty in (True, False)[: seed - 6]:
            with trainer.init_module(empty_init=empty):
                module = BUILDS["a copy"]("llama_tied")
            if seed == 7:
                ends(trainer, module, "last")
            else:
                with pytest.raises(ValueError, match="differs in its weights"):
                    ends(trainer, module, "last")
        strategy.close()


class Both(pl.Callback):
    """Values of the model and of its reference, before the first step."""

    def on_fit_start(self, trainer, pl_module):
        reference = pl_module.reference_layers.model
        with trainer.strategy.gathered([*pl_module.parameters(), *reference.parameters()]):
            states = pl_module.model.state_dict(), reference.state_dict()
            self.model, self.reference = copy.deepcopy(states)


@pytest.mark.parametrize("kind", ["folder", "config"])
def test_a_reference_that_is_built_empty_gets_the_values_of_its_model(tmp_path, kind):
    whole = TINY_MODELS["llama_tied"]()
    whole.save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model") if kind == "folder" else whole.config
    trainer = trainer_of(tmp_path, small(), max_steps=1, callbacks=[values := Both()])
    module = built(trainer, lambda: DPOModule(source, optimizer=ADAMW), empty=True)
    assert module._reference.fingerprint == {}
    ends(trainer, module)
    assert_same(values.reference, values.model)
    assert not any(value.isnan().any() for value in values.model.values())
    if kind == "folder":
        assert_same(dict(values.model), dict(whole.state_dict()))
    assert module._reference.fingerprint
    trainer.strategy.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"loss_type": ["simpo", "sft"]}),
        ("llama", {"loss_type": ["aot", "hinge"], "ld_alpha": 0.5}),
        ("mixtral", {"router_aux_loss_coef": 0.5}),
    ],
    ids=["no reference", "a list", "experts"],
)
def test_other_objectives_are_those_of_memory(tmp_path, name, options):
    """Without a reference no blocks are of one; a router is heard from blocks that come and go."""
    found = []
    for strategy in (None, small(nvme_path=str(tmp_path / "nvme"))):
        trainer = trainer_of(tmp_path, strategy)
        build = partial(DPOModule, TINY_MODELS[name]().config, optimizer=ADAMW, **options)
        found.append(ends(trainer, built(trainer, build)))
    assert_same(found[1], found[0])
    frozen = [b for b in strategy._engine.blocks if b.name.startswith("reference.")]
    assert bool(frozen) == (name == "mixtral" or "ld_alpha" in options)
    assert ("aux_loss" in found[0][2]) == (name == "mixtral")
    strategy.close()
