"""FLOPs of real steps against closed forms and torch's counter; what an analysis leaves behind."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_align.layers import checkpoint_blocks, find_layers
from lightning_align.optimizers import Muon
from lightning_align.planner import analyze_step, op_flops
from lightning_align.planner.analyze import tensors_there
from tests.helpers.ranks import run_ranks
from tests.helpers.step_models import CLOSED_FORMS, closed_form, gpt, llama, loss_of
from tests.helpers.tiny_models import TINY_MODELS


def counted_by_torch(loss: Callable[[], Tensor]) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_flops_match_the_closed_form(name: str) -> None:
    model = CLOSED_FORMS[name][0]()
    forward, backward = closed_form(name)
    report = analyze_step(model, loss_of(model))
    assert report.forward_flops == forward
    assert report.total_flops == forward + backward
    assert not report.uncounted


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_on_meta_everything_is_the_same(name: str) -> None:
    model = CLOSED_FORMS[name][0]()
    real = analyze_step(model, loss_of(model)).to_dict()
    with torch.device("meta"):  # moved there, a model would not be tied any longer
        meta = CLOSED_FORMS[name][0]()
    assert analyze_step(meta, loss_of(meta)).to_dict() == real


def test_under_fake_tensors_everything_is_the_same() -> None:
    model = gpt()
    real = analyze_step(model, loss_of(model)).to_dict()
    with FakeTensorMode():
        fake = gpt()
        ours = analyze_step(fake, loss_of(fake)).to_dict()
    assert ours == real


def test_without_a_formula_for_the_backward_of_attention_flops_would_be_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch's counter does today: its total is lower by all of attention."""
    model = gpt()
    theirs = counted_by_torch(loss_of(model)).get_total_flops()
    forward, backward = closed_form("gpt")
    monkeypatch.setattr(op_flops, "OURS", {})
    op_flops.describe.cache_clear()
    without = analyze_step(model, loss_of(model))
    monkeypatch.undo()
    op_flops.describe.cache_clear()
    assert without.total_flops == theirs < 0.97 * (forward + backward)
    assert set(without.uncounted) == {
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    }


def test_model_flops_do_not_depend_on_the_kernel_of_attention() -> None:
    """Fused attention computes the scores again in backward: 5 products for 4, no more work."""
    model = gpt()
    fused = analyze_step(model, loss_of(model))
    with sdpa_kernel(SDPBackend.MATH):
        plain = analyze_step(model, loss_of(model))
    assert plain.total_flops == plain.model_flops == fused.model_flops < fused.total_flops


@pytest.mark.parametrize("build", [gpt, llama])
def test_every_linear_matches_flop_counter_mode(build: Callable[[], Any]) -> None:
    """Each layer by itself: in a model torch's counter gives one of several that share an input
    the backward of the others, too."""
    model = build()
    linears = {n: part for n, part in model.named_modules() if isinstance(part, nn.Linear)}
    inputs: dict[str, Tensor] = {}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]}))
    ours = analyze_step(model, loss_of(model)).modules
    for name, linear in linears.items():
        given = torch.ones(inputs[name].shape, requires_grad=True)
        theirs = counted_by_torch(lambda: linear(given).sum())  # noqa: B023
        assert ours[name].flops == theirs.get_total_flops()
    assert len(linears) > 10


@pytest.mark.parametrize(("use_reentrant", "runs"), [(False, (1, 1, 1, 0)), (True, (1, 1, 1, 1))])
def test_recomputation_is_counted_as_it_runs(use_reentrant: bool, runs: tuple[int, ...]) -> None:
    """Without reentrance, what comes after the last tensor that backward needs is not computed
    again: the last product has made no such tensor."""
    layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
    model = nn.ModuleDict({"first": nn.Linear(32, 32), "layers": layers})

    def block(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x).tanh()
        return layers[0](x * 2)

    def loss() -> Tensor:
        x = model["first"](torch.ones(8, 32))
        return checkpoint(block, x, use_reentrant=use_reentrant).sum()

    product = 2 * 8 * 32 * 32
    report = analyze_step(model, loss)
    assert counted_by_torch(loss).get_total_flops() == report.total_flops
    assert report.phases["recompute"].flops == product * sum(runs)
    assert report.forward_flops == 5 * product
    assert report.model_flops == (5 + 4 * 2 + 1) * product  # the input needs no gradient
    again = [runs[0] + runs[3], runs[1], runs[2]]
    for number, uses in enumerate([2, 1, 1]):
        assert report.modules[f"layers.{number}"].flops == product * (3 * uses + again[number])


def test_recomputation_belongs_to_the_modules_that_compute_again() -> None:
    model = gpt()
    plain = analyze_step(model, loss_of(model))
    checkpoint_blocks(find_layers(model))
    report = analyze_step(model, loss_of(model))
    qkv, out, last = (f"layers.1.{name}" for name in ("qkv", "out", "mlp.2"))
    assert report.modules[qkv].flops == plain.modules[qkv].flops * 4 / 3
    assert report.modules[out].flops == plain.modules[out].flops * 4 / 3
    assert report.modules[last].flops == plain.modules[last].flops  # nothing needs its result
    assert report.model_flops == plain.model_flops
    again = report.phases["recompute"].flops
    assert report.total_flops == plain.total_flops + again
    blocks = sum(cost.flops for cost in report.blocks.values())
    assert blocks == report.total_flops - report.modules["to_logits"].flops
    assert report.saved_bytes < plain.saved_bytes / 2


def test_a_step_of_its_own_has_its_optimizer_counted() -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    before = model.to_logits.weight.clone()

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model)().backward()
        optimizer.step()

    report = analyze_step(model, step)
    assert not torch.equal(before, model.to_logits.weight)  # it is the caller's step
    size = sum(parameter.nbytes for parameter in model.parameters())
    records = [r for r in report.trace.records if r.phase == "optimizer"]
    update = report.phases["optimizer"]
    assert update.flops == 0 < update.pointwise_flops
    assert report.least_bytes < report.bytes
    assert update.bytes > 7 * size
    assert {record.scope for record in records} == {()}


def test_a_closure_given_to_the_optimizer_is_forward() -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)()
        loss.backward()
        return loss

    report = analyze_step(model, lambda: optimizer.step(closure) and None)
    forward, backward = closed_form("gpt")
    assert report.forward_flops == forward
    assert report.phases["backward"].flops == backward


def test_products_of_an_optimizer_are_counted_and_are_none_of_the_models() -> None:
    model = gpt()
    report = analyze_step(model, loss_of(model), optimizer=Muon(model.named_parameters()))
    forward, backward = closed_form("gpt")
    assert report.phases["optimizer"].flops > 0
    assert report.total_flops == forward + backward + report.phases["optimizer"].flops
    attention = backward - 2 * (forward - report.ops[FLASH].flops)
    assert report.model_flops == forward + backward - attention / 5


FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"


def test_frozen_weights_have_no_gradient_products() -> None:
    model = gpt()
    for block in model.layers:
        block.qkv.weight.requires_grad_(False)
    plain, frozen = gpt(), model
    ours = analyze_step(frozen, loss_of(frozen)).modules["layers.1.qkv"].flops
    theirs = analyze_step(plain, loss_of(plain)).modules["layers.1.qkv"].flops
    assert ours == theirs * 2 / 3


def test_a_mixture_of_experts_counts_the_experts_that_a_token_has() -> None:
    """Two of four experts, each with three matrices; the router has one."""
    model = TINY_MODELS["mixtral"]()
    report = analyze_step(model, loss_of(model))
    experts = report.modules["model.layers.0.mlp.experts"].flops
    assert experts == 3 * 2 * (2 * 48) * 2 * 3 * 32 * 48
    assert not report.uncounted


def test_a_sliding_window_counts_all_pairs() -> None:
    """Kernels that skip what a window hides are none of the processor's; masks take nothing off."""
    models = [TINY_MODELS["mistral"](sliding_window=size) for size in (8, None)]
    window, whole = (analyze_step(model, loss_of(model)).to_dict() for model in models)
    assert window["ops"][FLASH]["flops"] == whole["ops"][FLASH]["flops"] > 0
    assert window["total_flops"] == whole["total_flops"]


def test_what_has_no_formula_is_listed() -> None:
    @torch.library.custom_op("lightning_align_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    model = nn.Linear(4, 4)
    report = analyze_step(model, lambda: model(twice(torch.ones(2, 4))).sum())
    assert report.uncounted == {"lightning_align_tests.twice": 1}
    assert report.ops["lightning_align_tests.twice"].bytes == 2 * 32
    assert "twice (1)" in report.to_table()


def test_modules_called_by_name_or_twice_have_their_own_backward() -> None:
    """No hook on inputs or outputs would do: the input needs no gradient, one layer runs twice."""
    model = nn.ModuleDict({"shared": nn.Linear(8, 8, bias=False), "other": nn.Linear(8, 8)})

    def loss() -> Tensor:
        x = model["shared"](torch.ones(4, 8))
        return model["shared"](model["other"](x)).sum()

    product = 2 * 4 * 8 * 8
    report = analyze_step(model, loss)
    assert report.modules["shared"].flops == (2 + 2 + 1) * product
    assert report.modules["other"].flops == 3 * product
    assert report.modules[""].flops == report.total_flops == 8 * product


def test_forward_alone_is_analysed_without_gradients() -> None:
    model = gpt()
    with torch.no_grad():
        report = analyze_step(model, lambda: loss_of(model)() and None)
    assert report.total_flops == report.forward_flops == closed_form("gpt")[0]
    assert report.saved_bytes == 0


def test_in_inference_mode_too() -> None:
    model = gpt()
    with torch.inference_mode(), torch.no_grad():
        report = analyze_step(model, lambda: loss_of(model)() and None)
    assert report.total_flops == closed_form("gpt")[0]


def test_a_compiled_model_is_analysed_as_it_was_written() -> None:
    """Compiling would take seconds; that it takes none shows that nothing is compiled."""
    model = gpt()
    compiled: Any = torch.compile(model)
    report = analyze_step(compiled, loss_of(compiled))
    assert report.total_flops == sum(closed_form("gpt"))
    assert report.modules["_orig_mod.to_logits"].flops > 0
    model.compile()
    assert analyze_step(model, loss_of(model)).total_flops == sum(closed_form("gpt"))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        torch.set_grad_enabled(False)
        F.dropout(x), np.random.rand(), random.random()
        raise RuntimeError("out of luck")


def _state(model: nn.Module) -> Any:
    return (
        [p.grad.clone() for p in model.parameters() if p.grad is not None],
        [buffer.clone() for buffer in model.buffers()],
        [module.training for module in model.modules()],
        torch.get_rng_state(),
        torch.tensor(random.getstate()[1], dtype=torch.long),
        torch.tensor(np.random.get_state()[1].astype(np.int64)),
    )


def _hooks() -> list[int]:
    from torch.nn.modules import module
    from torch.optim import optimizer

    places = [module._global_forward_hooks, module._global_forward_pre_hooks]
    places += [optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks]
    return [len(place) for place in places]


def test_after_an_exception_everything_is_as_before() -> None:
    model = Failing()
    model.norm(model.linear(torch.ones(2, 4))).sum().backward()
    gradient = model.linear.weight.grad
    before, hooks = _state(model), _hooks()

    def fails() -> None:
        x = model.norm(model.linear(torch.ones(2, 4)))
        x.sum().backward()
        model(x)

    with pytest.raises(RuntimeError, match="out of luck"):
        analyze_step(model, fails)
    torch.testing.assert_close(_state(model), before, rtol=0, atol=0)
    assert model.linear.weight.grad is gradient
    assert _hooks() == hooks
    assert torch.is_grad_enabled()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    good = nn.Linear(2, 2)
    assert analyze_step(good, lambda: good(torch.ones(1, 2)).sum()).total_flops == 2 * 2 * 4


def test_an_analysis_is_no_step() -> None:
    """A loss was returned: neither weights, moments, gradients nor running means have moved."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    optimizer = torch.optim.AdamW(model.parameters())
    loss = lambda: model(torch.randn(3, 4)).square().sum()  # noqa: E731
    loss().backward()
    optimizer.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    before = _state(model)
    analyze_step(model, loss, optimizer=optimizer)
    torch.testing.assert_close(_state(model), before, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    torch.testing.assert_close(states, moments, rtol=0, atol=0)


MODEL = nn.Linear(2, 2)
BAD = {
    "no tensor": (lambda: 1.0, "must return a scalar loss"),
    "a dictionary": (lambda: {"loss": MODEL(torch.ones(2)).sum()}, "returned dict"),
    "not a scalar": (lambda: MODEL(torch.ones(3, 2)), r"it returned \(3, 2\)"),
    "no gradient": (lambda: torch.ones(()), "without a gradient"),
    "nothing at all": (lambda: None, "ran no backward"),
    "another analysis": (
        lambda: analyze_step(MODEL, lambda: MODEL(torch.ones(2)).sum()),
        "inside of another one",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_step_is_refused(name: str) -> None:
    fn, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        analyze_step(MODEL, fn)
    assert analyze_step(MODEL, lambda: MODEL(torch.ones(2)).sum()).total_flops > 0


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    fn = lambda: MODEL(torch.ones(2)).sum()  # noqa: E731
    with pytest.raises(ValueError, match="model=3"):
        analyze_step(3, fn)
    with pytest.raises(ValueError, match="fn=None"):
        analyze_step(MODEL, None)
    with pytest.raises(ValueError, match="optimizer='adam'"):
        analyze_step(MODEL, fn, optimizer="adam")
    with pytest.raises(ValueError, match=r"model='DataParallel'.*Pass model\.module"):
        analyze_step(nn.DataParallel(MODEL), fn)


def test_models_that_are_spread_over_ranks_are_refused() -> None:
    def refusals(_: int) -> list[str]:
        found = []
        for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
            model = wrap(nn.Linear(2, 2))
            with pytest.raises(ValueError, match="analyze_step") as caught:
                analyze_step(model, lambda: model(torch.ones(2)).sum())  # noqa: B023
            found.append(str(caught.value))
        return found

    ((wrapped, sharded),) = run_ranks(refusals, world_size=1)
    assert "model='DistributedDataParallel'" in wrapped
    assert "Pass model.module" in wrapped
    assert "has parameters that are sharded" in sharded


def test_our_chunked_head_counts_what_the_plain_one_does() -> None:
    """Its gradients are made in forward, by products in place."""
    from lightning_align import PretrainModule

    model = llama()
    plain = analyze_step(model, loss_of(model))
    module = PretrainModule(model, chunk_size=16)
    ids = torch.zeros(2, 49, dtype=torch.long)
    report = analyze_step(
        module, lambda: module.training_step({"input_ids": ids, "labels": ids}, 0)
    )
    blocks = sum(cost.flops for cost in report.blocks.values())
    assert blocks == sum(cost.flops for cost in plain.blocks.values())
    assert report.total_flops - blocks == 3 * 2 * (2 * 48) * 64 * 211
    assert not report.uncounted


def test_a_reference_model_has_its_forward_counted() -> None:
    from lightning_align import DPOModule

    ids = torch.ones(4, 20, dtype=torch.long)
    completion = torch.zeros_like(ids)
    completion[:, 10:] = 1
    batch = {"input_ids": ids, "attention_mask": ids, "completion_mask": completion}

    module = DPOModule(llama())
    report = analyze_step(module, lambda: module.training_step(batch, 0))
    matrices = 2 * (4 * 20) * 3 * (64 * (64 + 2 * 16 + 64) + 3 * 64 * 176)
    attention, head = 3 * 4 * 2 * 20 * 20 * 64, 2 * (4 * 10) * 64 * 211
    assert report.total_flops == 4 * matrices + (2 + 5 + 2) * attention + 4 * head
    assert report.model_flops == report.total_flops - attention
    policy = sum(cost.flops for cost in report.blocks.values())
    assert policy == 3 * matrices + (2 + 5) * attention
    assert not report.uncounted


def test_what_an_optimizer_keeps_beside_its_parameters_states_is_passed_over() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["steps"] = 3
    assert len(tensors_there(model, optimizer)) == 2
