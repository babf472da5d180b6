import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_align.callbacks.spikes.layers import (
    WEIGH_EVERY,
    LayerFigures,
    layer_of_parameters,
)
from lightning_align.spike_causes import Evidence, name_cause
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS


class Holder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def test_layers_of_a_language_model_are_in_the_order_of_its_forward():
    module = Holder(net=TINY_MODELS["llama"](), probe=nn.Linear(2, 2))
    layers = layer_of_parameters(module)
    assert list(dict.fromkeys(layers.values())) == [
        "probe",
        "net.model.embed_tokens",
        *(f"net.model.layers.{i}" for i in range(3)),
        "net.lm_head",
    ]
    assert layers["net.model.norm.weight"] == "net.lm_head"
    assert layers["net.model.layers.1.mlp.up_proj.weight"] == "net.model.layers.1"


def test_layers_of_any_other_module_are_its_parts():
    """A wrapper around all is no part, and a list has one part for each item."""
    inner = Holder(stem=nn.Linear(2, 2), body=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    inner.scale = nn.Parameter(torch.ones(1))
    layers = layer_of_parameters(Holder(net=inner))
    assert layers == {
        "net.scale": "net",
        "net.stem.weight": "net.stem",
        "net.stem.bias": "net.stem",
        "net.body.0.weight": "net.body.0",
        "net.body.0.bias": "net.body.0",
        "net.body.1.weight": "net.body.1",
        "net.body.1.bias": "net.body.1",
    }
    assert set(layer_of_parameters(nn.Sequential(nn.Linear(1, 1))).values()) == {"0"}


def two_layers():
    torch.manual_seed(0)
    return Holder(a=nn.Linear(4, 3), b=nn.Linear(3, 2))


def give_gradients(module, scale=1.0):
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) * scale


def test_norms_and_updates_are_those_of_all_elements_where_the_sample_is_all():
    module = two_layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    figures = LayerFigures(module, sample=1000)
    give_gradients(module)
    figures.before_step([optimizer])
    gradient = torch.cat([p.grad.flatten() for p in module.a.parameters()])
    weights = torch.cat([p.detach().flatten() for p in module.a.parameters()])
    optimizer.step()
    figures.after_step()
    found = figures.histories()
    assert found["grad_norms"]["a"] == pytest.approx([float(gradient.norm())])
    assert found["weight_norms"]["a"] == pytest.approx([float(weights.norm())])
    # An update is lr * g for SGD.
    assert found["updates"]["a"] == pytest.approx([0.1 * float(gradient.norm() / weights.norm())])
    assert found["gradient_ratios"] == {} == found["outside"]


def test_figures_of_parts_are_those_of_the_whole_on_every_rank():
    """The last rank has no part of the vectors with two elements, and all have the same ring."""

    def figures_of(module, **options):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        figures = LayerFigures(module, sample=1000, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    continue
                whole = torch.randn(parameter.shape, generator=generator)
                is_part = isinstance(parameter, DTensor)
                parameter.grad = (
                    distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                    if is_part
                    else whole
                )
            figures.before_step([optimizer], is_alarm=True)
            optimizer.step()
            figures.after_step()
        return figures.histories()

    def on_a_rank(rank):
        module = two_layers()
        module.elsewhere = nn.Linear(2, 2).requires_grad_(False)  # whole on each: not looked at
        for part in (module.a, module.b):
            fully_shard(part, mesh=init_device_mesh("cpu", (3,)))

        def total(tensor):
            torch.distributed.all_reduce(tensor)
            return tensor

        return figures_of(module, total=total, ranks=3)

    ours = run_ranks(on_a_rank, world_size=3)
    expected = figures_of(two_layers())
    assert ours[0] == ours[1] == ours[2]
    for figure, by_layer in expected.items():
        assert by_layer.keys() == ours[0][figure].keys() == {"a", "b"}
        for layer, history in by_layer.items():
            # fp32 sums in another order
            assert ours[0][figure][layer] == pytest.approx(history, rel=1e-5, nan_ok=True)


def test_the_ratio_is_that_of_stable_adamw():
    """RMS_t = sqrt(mean(g^2 / u_t)), arXiv:2304.13013, Algorithm 2, over all of a layer."""
    module = two_layers()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, betas=(0.9, 0.95))
    figures = LayerFigures(module, sample=1000)
    for scale in (1.0, 1.0, 10.0):
        give_gradients(module, scale)
        figures.before_step([optimizer])
        second, steps = {}, {}
        for p in module.parameters():
            state = optimizer.state.get(p, {})
            steps[p] = float(state.get("step", 0)) + 1
            second[p] = 0.95 * state.get("exp_avg_sq", torch.zeros_like(p)) + 0.05 * p.grad**2
        optimizer.step()
    squares = [p.grad**2 / (second[p] / (1 - 0.95 ** steps[p])) for p in module.a.parameters()]
    expected = torch.cat([each.flatten() for each in squares]).mean().sqrt()
    ours = figures.histories()["gradient_ratios"]["a"]
    assert len(ours) == 2, "no second moment before the first step"
    assert ours[-1] == pytest.approx(float(expected), rel=1e-5)
    assert ours[-1] > 1.3 * ours[0]


def test_what_writes_to_weights_between_steps_is_seen_in_its_layer():
    module = two_layers()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    figures = LayerFigures(module, sample=1000)
    for corrupt in (False, True):
        if corrupt:
            module.b.weight.data.mul_(3)
        give_gradients(module)
        figures.before_step([optimizer])
        optimizer.step()
        figures.after_step()
    outside = figures.histories()["outside"]
    assert outside["a"] == [0.0]
    assert 1 < outside["b"][-1] <= 2


def steps_of(module, count, alarm_at, before=None):
    """Figures of so many steps of SGD; ``before`` is called with the number of each."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    figures = LayerFigures(module, sample=1)
    for step in range(count):
        if before is not None:
            before(step, figures)
        give_gradients(module)
        figures.before_step([optimizer], is_alarm=step == alarm_at)
        if step < count - 1:
            optimizer.step()
            figures.after_step()
    return figures.histories()


def test_weights_are_weighed_in_every_eighth_step_and_at_an_alarm():
    module = two_layers()
    norms = []
    found = steps_of(module, 12, 11, lambda *_: norms.append(module.a.weight.norm().item()))
    assert WEIGH_EVERY == 8
    biased = [math.hypot(norms[11], float(module.a.bias.norm()))]
    assert found["weight_norms"]["a"][2:] == pytest.approx(biased)
    assert len(found["weight_norms"]["a"]) == 3  # of steps 0, 8 and 11
    updates = found["updates"]["a"]
    assert len(found["grad_norms"]["a"]) == len(updates) == 12
    sums = [0.0, sum(updates[:8]), sum(updates[8:11])]
    assert found["moved"]["a"] == pytest.approx(sums, rel=1e-5)  # of fp32, in another order


@pytest.mark.parametrize("at", [9, 11])
def test_one_weight_that_is_in_no_sample_shows_until_the_next_weighing(at):
    module = two_layers()

    def corrupt(step, figures):
        if step == at:
            module.b.weight.data[1, 2] = 50.0

    found = steps_of(module, 12, 11, corrupt)
    cause = name_cause(Evidence(losses=[2.0] * 11 + [6.0], reference=(2.0, 6.0), **found))
    assert (cause.kind, cause.layer) == ("numerics", "b")


@pytest.mark.parametrize(("at", "weighed"), [(9, [0, 8, 9, 11]), (11, [0, 8, 11])])
def test_a_rewind_writes_to_weights_and_is_no_cause(at, weighed):
    module = two_layers()

    def restore(step, figures):
        if step == at:
            module.b.weight.data[1, 2] = 50.0
            figures.forget_weights()

    found = steps_of(module, 12, 11, restore)
    assert len(found["weight_norms"]["b"]) == len(weighed)
    cause = name_cause(Evidence(losses=[2.0] * 11 + [6.0], reference=(2.0, 6.0), **found))
    assert cause.kind != "numerics"


def test_a_restored_model_is_nobodys_change():
    module = two_layers()
    figures = LayerFigures(module)
    give_gradients(module)
    figures.before_step([])
    figures.after_step()
    module.b.weight.data.mul_(3)
    figures.forget_weights()
    figures.before_step([])
    assert figures.histories()["outside"] == {}


def test_wide_numbers_are_looked_at_and_complex_sparse_and_lazy_ones_left_alone():
    module = two_layers()
    module.a.double()
    module.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    module.table = nn.Embedding(3, 1, sparse=True)
    module.lazy = nn.LazyLinear(1)
    figures = LayerFigures(module)
    give_gradients(Holder(a=module.a, b=module.b))
    module.table(torch.tensor([1, 1])).sum().backward()
    optimizer = torch.optim.Adam([*module.a.parameters(), *module.b.parameters()])
    for _ in range(2):
        figures.before_step([optimizer])
        optimizer.step()
        figures.after_step()
    found = figures.histories()
    assert set(found["grad_norms"]) == set(found["gradient_ratios"]) == {"a", "b"}
    assert set(found["weight_norms"]) == {"a", "b", "table"}
    norm = math.hypot(*(float(p.grad.norm()) for p in module.a.parameters()))
    assert found["grad_norms"]["a"][0] == pytest.approx(norm, rel=1e-6)


def test_frozen_layers_have_no_gradient_and_other_ranks_layers_nothing():
    module = two_layers()
    module.c = nn.Linear(2, 2, device="meta")
    figures = LayerFigures(module)
    give_gradients(Holder(b=module.b))
    figures.before_step([])
    found = figures.histories()
    assert list(found["grad_norms"]) == ["b"]
    assert list(found["weight_norms"]) == ["a", "b"]
    assert figures.layers == ["a", "b", "c"]


def test_a_module_without_a_parameter_has_no_figures():
    figures = LayerFigures(nn.Module())
    figures.before_step([])
    figures.after_step()
    assert all(found == {} for found in figures.histories().values())


def test_only_the_window_is_remembered_and_non_finite_values_stay_in_their_layer():
    module = two_layers()
    figures = LayerFigures(module, window=4)
    for step in range(6):
        give_gradients(module, 10**step)
        if step == 5:
            module.b.weight.grad[0, 0] = math.nan
        figures.before_step([])
        figures.after_step()
    norms = figures.histories()["grad_norms"]
    assert len(norms["a"]) == 4 == len(norms["b"])
    assert math.isfinite(norms["a"][-1])
    assert math.isnan(norms["b"][-1])
    assert norms["a"] == sorted(norms["a"])


def test_looking_changes_nothing():
    def run(look):
        torch.manual_seed(1)
        module = two_layers()
        optimizer = torch.optim.AdamW(module.parameters())
        figures = LayerFigures(module, sample=2)
        for _ in range(3):
            give_gradients(module)
            if look:
                figures.before_step([optimizer])
            optimizer.step()
            if look:
                figures.after_step()
        return [p.detach().clone() for p in module.parameters()], torch.rand(1)

    (ours, ours_draw), (plain, plain_draw) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert torch.equal(ours_draw, plain_draw)
