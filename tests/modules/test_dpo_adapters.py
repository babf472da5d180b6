"""DPO with adapters: the reference is the model without them, and the model is there once."""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_align import (
    DPOModule,
    GaLoreAdamW,
    Muon,
    PipelineStrategy,
    PretrainModule,
    SavePretrained,
    StableAdamW,
    ZeROInfinityStrategy,
)
from lightning_align._compat.peft_layers import peft_layers
from lightning_align.cli.export import export
from lightning_align.models.adapter_folder import WEIGHTS_FILE
from lightning_align.models.build import build_model, save_pretrained
from lightning_align.models.trained import load_trained
from lightning_align.optimizers import build_param_groups
from tests.helpers.pipelines import Seen
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.modules import test_precomputed as precomputed
from tests.modules.test_dpo import CONFIGS, module, pairs, step
from tests.modules.test_pretrain import fit, llama, rows

peft = pytest.importorskip("peft")

LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}
GPT2_LORA = peft.LoraConfig(r=2, fan_in_fan_out=True)
FAMILIES = {"llama": LORA, "gpt2": GPT2_LORA}


def adapted(family: str = "llama", **options: Any) -> DPOModule:
    return module(CONFIGS[family], peft_config=FAMILIES[family], **options)


def learned(ours: DPOModule) -> DPOModule:
    """The same, its adapters a little away from nothing."""
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return ours


def beside(ours: DPOModule, **options: Any) -> DPOModule:
    """The same policy against the same reference, which is a second model."""
    plain = build_model(ours.model.config, where="T")
    state = {
        name.replace(".base_layer", ""): value
        for name, value in ours.model.state_dict().items()
        if "lora_" not in name
    }
    plain.load_state_dict(state)
    return DPOModule(copy.deepcopy(ours.model), plain, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_a_step_is_that_against_a_second_model(family: str, prefix_sharing: bool) -> None:
    options = {"prefix_sharing": prefix_sharing, "loss_type": ["sigmoid", "ipo"]}
    ours = learned(adapted(family, **options))
    theirs = beside(ours, **options)
    assert ours.frozen_modules() == {}
    assert list(theirs.frozen_modules()) == ["reference"]
    gradients = []
    for each in (ours, theirs):
        loss, _ = step(each, pairs(0, 1, 2))
        loss.backward()
        trained = {name: p for name, p in each.named_parameters() if p.requires_grad}
        gradients.append((loss, {name: p.grad for name, p in trained.items()}))
    (loss, ours_grads), (their_loss, their_grads) = gradients
    assert torch.equal(loss, their_loss)
    assert float(loss) / 3 != pytest.approx(0.6931, rel=1e-3)
    assert ours_grads.keys() == their_grads.keys()
    assert all(torch.equal(ours_grads[name], their_grads[name]) for name in ours_grads)


def test_who_asks_the_reference_gets_the_model_without_adapters() -> None:
    ours = adapted().eval()
    before = logits(ours.model)
    after = logits(learned(ours).model)
    with ours.as_reference() as reference:
        assert torch.equal(logits(reference), before)
    assert torch.equal(logits(ours.model), after)
    assert not torch.equal(before, after)


def bytes_held(ours: DPOModule) -> int:
    modules = [ours, *ours.frozen_modules().values()]
    held = {p.untyped_storage().data_ptr(): p.nbytes for m in modules for p in m.parameters()}
    return sum(held.values())


def test_the_weights_are_held_once() -> None:
    wide = llama(hidden_size=64, intermediate_size=128, vocab_size=500)
    theirs = bytes_held(module(wide))
    ours = bytes_held(module(wide, peft_config=LORA))
    assert ours <= 0.55 * theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_first_loss_is_log_two_though_adapters_drop(family: str) -> None:
    """Adapters begin as nothing, whatever they drop, and the reference has none."""
    config = peft.LoraConfig(r=2, lora_dropout=0.5, fan_in_fan_out=family == "gpt2")
    ours = module(CONFIGS[family], peft_config=config).train()
    loss, _ = step(ours, pairs(0, 1))
    assert float(loss) / 2 == pytest.approx(0.6931471805599453, rel=1e-6)
    learned(ours)
    batch = ours.prepared(pairs(0, 1))
    scores = [ours.score(ours.forward_hidden(**ours.model_inputs(batch)), batch) for _ in "ab"]
    (policy, reference), (again, same) = scores
    assert not torch.equal(policy.logps_B, again.logps_B)
    assert torch.equal(reference.logps_B, same.logps_B)
    expected = [each.disable_adapters for each in peft_layers(ours.model).values()]
    assert not any(expected)


def test_a_run_moves_adapters_alone_and_its_checkpoint_goes_on(tmp_path: Path) -> None:
    batches = [pairs(0, 1), pairs(2), pairs(3, 4)]
    ours = adapted()
    before = copy.deepcopy(ours.state_dict())
    trainer = fit(ours, batches)
    moved_names = {n for n, value in ours.state_dict().items() if not torch.equal(value, before[n])}
    assert moved_names
    assert all("lora_" in name for name in moved_names)
    assert {n for n, p in ours.named_parameters() if p.grad is not None} <= moved_names
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = DPOModule.load_from_checkpoint(
        tmp_path / "a.ckpt", model=CONFIGS["llama"], optimizer=partial(torch.optim.SGD, lr=0.5)
    )
    assert again.hparams["peft_config"] == LORA
    assert_same(again, ours)
    fit(again, batches, ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    whole = adapted()
    fit(whole, batches, max_epochs=2)
    assert_same(again, whole)


def test_a_checkpoint_does_not_go_on_with_another_scaling() -> None:
    """Names and shapes are the same, and the model is not."""
    ours = adapted()
    checkpoint: dict[str, Any] = {"state_dict": ours.state_dict()}
    ours.on_save_checkpoint(checkpoint)
    adapted().on_load_checkpoint(checkpoint)
    scaled = {**LORA, "init_args": {"r": 2, "lora_alpha": 64}}
    other = module(CONFIGS["llama"], peft_config=scaled)
    with pytest.raises(ValueError, match=r"DPOModule\(peft_config.lora_alpha=64\): the adapter of"):
        other.on_load_checkpoint(checkpoint)


def assert_same(ours: DPOModule, theirs: DPOModule) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_wrapped_model_trains_against_itself_without_its_adapters() -> None:
    wrapper = peft.get_peft_model(build_model(CONFIGS["llama"], where="T"), peft.LoraConfig(r=2))
    ours = DPOModule(wrapper)
    assert ours.frozen_modules() == {}
    loss, _ = step(ours, pairs(0))
    assert float(loss) == pytest.approx(0.6931471805599453, rel=1e-6)


def test_a_wrapped_model_that_has_learned_needs_a_reference_that_is_named() -> None:
    wrapper = peft.get_peft_model(build_model(CONFIGS["llama"], where="T"), peft.LoraConfig(r=2))
    for name, parameter in wrapper.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    with pytest.raises(ValueError, match=r"another one than the model that training begins with"):
        DPOModule(wrapper)
    ours = DPOModule(wrapper, copy.deepcopy(wrapper).get_base_model())
    loss, _ = step(ours, pairs(0))
    assert float(loss) == pytest.approx(0.6931471805599453, rel=1e-6)
    assert list(ours.frozen_modules()) == ["reference"]
    assert DPOModule(wrapper, loss_type="simpo").reference_layers is None


def test_a_reference_of_the_same_weights_is_refused() -> None:
    base = build_model(CONFIGS["llama"], where="T")
    with pytest.raises(ValueError, match="must be another object than model"):
        DPOModule(base, base, peft_config=LORA)


@pytest.mark.parametrize("kind", [DPOModule, PretrainModule])
def test_bad_configurations_are_refused_by_name(kind: Any) -> None:
    wrong = {"class_path": "peft.LoraConfig", "init_args": {"rank": 2}}
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(peft_config=.*no argument 'rank'"):
        kind(CONFIGS["llama"], peft_config=wrong)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_pretrained(build_model(llama(), where="T"), tmp_path / "base")


TOKENS = torch.arange(1, 13)[None]


def logits(of: Any) -> torch.Tensor:
    with torch.no_grad():
        return of.eval()(TOKENS).logits


@pytest.mark.parametrize(
    ("kind", "wrapped"),
    [
        (DPOModule, False),
        pytest.param(DPOModule, True, marks=pytest.mark.slow),
        pytest.param(PretrainModule, False, marks=pytest.mark.slow),
        pytest.param(PretrainModule, True, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_becomes_a_folder(
    kind: Any, wrapped: bool, base: Path, tmp_path: Path
) -> None:
    if wrapped:
        model = AutoModelForCausalLM.from_pretrained(base)
        ours = kind(peft.get_peft_model(model, peft.LoraConfig(r=2)))
    else:
        ours = kind(str(base), peft_config=LORA)
    batch = pairs(0, 1) if kind is DPOModule else rows(0, 1)
    trainer = fit(learned(ours), [batch], callbacks=[SavePretrained(str(tmp_path / "kept"))])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    options = {"model": str(base)} if wrapped else {}
    expected = logits(ours.model)
    loaded = load_trained(tmp_path / "a.ckpt", where="generate", **options)
    torch.testing.assert_close(logits(loaded.model), expected, rtol=0, atol=1e-5)
    folder = export(tmp_path / "a.ckpt", tmp_path / "out", **options)
    ours.save_pretrained(str(tmp_path / "saved"))
    for place in (folder, tmp_path / "kept", tmp_path / "saved"):
        assert not (place / "config.json").exists()
        plain = AutoModelForCausalLM.from_pretrained(base)
        theirs = peft.PeftModel.from_pretrained(plain, place)
        torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    merged = export(tmp_path / "a.ckpt", tmp_path / "merged", merge=True, **options)
    theirs = AutoModelForCausalLM.from_pretrained(merged)
    # in fp32 the products are rounded once more
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    again = export(folder, tmp_path / "merged", merge=True, overwrite=True)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(again)), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"export\(merge=True\): it has no adapters"):
        export(merged, tmp_path / "none", merge=True)


@pytest.mark.slow
def test_a_module_of_ones_own_that_holds_the_model_inside_leaves_adapters(
    base: Path, tmp_path: Path
) -> None:
    class Own(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            model = AutoModelForCausalLM.from_pretrained(base)
            self.net = peft.get_peft_model(model, peft.LoraConfig(r=2)).get_base_model()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            ids = batch["input_ids"]
            return self.net(ids, labels=ids).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)

    ours = Own()
    fit(ours, [rows(0, 1)], callbacks=[SavePretrained(str(tmp_path / "out"))])
    assert sorted(os.listdir(tmp_path / "out")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = load_trained(tmp_path / "out", where="generate")
    torch.testing.assert_close(logits(loaded.model), logits(ours.net), rtol=0, atol=1e-5)


OPTIMIZERS = {
    "Muon": partial(Muon, lr=0.02),
    "GaLoreAdamW": partial(GaLoreAdamW, lr=0.01, rank=1, update_proj_gap=2),
    "StableAdamW": partial(StableAdamW, lr=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_step_as_in_a_loop_by_hand(optimizer: Any) -> None:
    """Ten steps of PEFT's own model, with the loss written out."""
    batches = [rows(i, i + 1) for i in range(10)]
    torch.manual_seed(0)
    model = build_model(llama(), where="T")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2))
    ours = PretrainModule(model, optimizer=optimizer, peft_config=LORA)
    theirs.get_base_model().load_state_dict(ours.model.state_dict())
    fit(ours, batches)
    stepper = optimizer(build_param_groups(theirs.get_base_model()))
    for batch in batches:
        ids, labels = batch["input_ids"], batch["labels"][:, 1:]
        found = theirs(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), labels.flatten())
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    # fp32 sums in chunks of rows, through ten steps
    for name, value in theirs.get_base_model().state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_in_bf16_policy_and_reference_begin_alike(precision: str) -> None:
    ours = adapted()
    trainer = fit(ours, [pairs(0, 1)], precision=precision)
    assert float(trainer.logged_metrics["train_loss"]) == pytest.approx(0.6931, abs=1e-4)


def test_activation_checkpointing_changes_nothing() -> None:
    losses = []
    for option in (False, True):
        ours = learned(adapted(activation_checkpointing=option)).train()
        loss, _ = step(ours, pairs(0, 1))
        loss.backward()
        grads = [p.grad for p in ours.parameters() if p.requires_grad]
        losses.append((loss, grads))
    (plain, grads), (checkpointed, others) = losses
    assert torch.equal(plain, checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def on_pairs(ours: DPOModule, path: Path, **options: Any) -> dict[str, float]:
    """Losses and metrics of a run over a file of pairs."""
    trainer = precomputed.fit(ours, precomputed.data(path), **options)
    names = trainer.callback_metrics.keys() - {"tokens_per_second"}
    return {name: float(trainer.callback_metrics[name]) for name in names}


@pytest.mark.slow
def test_a_cache_is_that_of_the_model_without_adapters(tmp_path: Path) -> None:
    """So a full run and one with adapters share it, and training is that with the switch."""
    path, cache = precomputed.write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "cache"
    expected = on_pairs(precomputed.module(peft_config=LORA), path)
    for options, asked in (({"peft_config": LORA}, 20), ({}, 0), ({"peft_config": LORA}, 0)):
        with precomputed.counted() as counts:
            ours = precomputed.module(cache, **options)
            found = on_pairs(ours, path)
        assert sum(counts) == asked
        if options:
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    more = precomputed.write_pairs(tmp_path / "more.jsonl", number=14)
    with precomputed.counted() as counts:  # though the policy has learned since
        on_pairs(ours, more)
    assert sum(counts) == 8


def one_of_two(path: Path, rank: int | None, **options: Any) -> list[float]:
    """Losses of 6 steps of PretrainModule with adapters; in a pipeline of two ranks, if any."""
    ranks: dict[str, Any] = {"devices": 1}
    if rank is not None:
        ranks = {"devices": 2, "strategy": PipelineStrategy("1F1B")}
        ranks["plugins"] = [ForkedRanks(rank, 2)]
    torch.manual_seed(0)
    model = build_model(llama(num_hidden_layers=4), where="T")
    optimizer = partial(torch.optim.AdamW, lr=3e-2)
    ours = PretrainModule(model, optimizer=optimizer, peft_config=LORA)
    seen = Seen()
    batches = [rows(i, i + 1, i + 2, i + 3) for i in range(6)]
    fit(ours, batches, callbacks=[seen, SavePretrained(str(path))], **ranks)
    return seen.losses


@pytest.mark.slow
def test_a_pipeline_cuts_a_model_with_adapters(tmp_path: Path) -> None:
    theirs = one_of_two(tmp_path / "one", None)
    for losses in run_ranks(partial(one_of_two, tmp_path / "two"), timeout_s=90):
        torch.testing.assert_close(losses, theirs, rtol=2e-5, atol=2e-5)
    ours, expected = (load_file(tmp_path / n / WEIGHTS_FILE) for n in ("two", "one"))
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["nvme", "cpu"])
def test_zero_infinity_leaves_the_folder_of_one_process(device: str, tmp_path: Path) -> None:
    def run(place: Path, **options: Any) -> None:
        callback = SavePretrained(str(place))
        fit(adapted(), [pairs(0, 1), pairs(2, 3)], callbacks=[callback], **options)

    run(tmp_path / "one")
    offloads = dict.fromkeys(("offload_params_device", "offload_optimizer_device"), device)
    place = {"nvme_path": str(tmp_path / "drive")} if device == "nvme" else {}
    run(tmp_path / "two", strategy=ZeROInfinityStrategy(sub_group_size=1000, **place, **offloads))
    ours, expected = (load_file(tmp_path / n / WEIGHTS_FILE) for n in ("two", "one"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_pipeline_refuses_a_reference_that_would_have_to_run() -> None:
    assert "its reference would have to run beside it" in str(adapted().pipeline_refusal)
    assert adapted(loss_type="simpo").pipeline_refusal is None
    assert adapted(precompute_ref_log_probs=True).pipeline_refusal is None
