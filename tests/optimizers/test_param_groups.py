import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_align.layers import find_layers
from lightning_align.optimizers.muon import Muon
from lightning_align.optimizers.param_groups import (
    build_param_groups,
    learning_rates,
    warn_of_lost_ratios,
)
from tests.helpers.tiny_models import TINY_MODELS, PlainDecoder, TiedDecoder
from tests.laws.members import HandWritten


def names_of(groups: Any) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_parameter_of_every_family_is_in_one_group(name: str) -> None:
    model = TINY_MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = build_param_groups(model)
    grouped = [parameter for group in groups for _, parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    layers = find_layers(model)
    block_names = tuple(f"{block}." for block in layers.block_names)
    for group in groups:
        for full_name, parameter in group["params"]:
            in_block = full_name.startswith(block_names)
            # Mixtral: experts are one parameter of three dimensions, the router is no nn.Linear
            is_matrix = in_block and parameter.ndim == 2 and ".gate." not in full_name
            assert group["use_muon"] is is_matrix, full_name
            decays = parameter.ndim > 1 and (in_block or full_name == f"{layers.head_name}.weight")
            decays = decays and parameter is not layers.embedding.weight
            assert ("weight_decay" not in group) is decays, full_name


def test_matrices_of_gpt2_are_marked_as_stored_in_out() -> None:
    groups = {group["name"]: group for group in build_param_groups(TINY_MODELS["gpt2"]())}
    assert list(groups) == ["matrices_transposed", "embeddings", "norms_biases"]
    assert groups["matrices_transposed"]["transposed"] is True
    shapes = {name: tuple(p.shape) for name, p in groups["matrices_transposed"]["params"]}
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (32, 128)  # 32 features in, 128 out


def test_tied_weights_come_once_as_embeddings() -> None:
    groups = names_of(build_param_groups(TiedDecoder()))
    assert groups["embeddings"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert "head" not in groups


def test_a_matrix_of_two_blocks_comes_once() -> None:
    model = PlainDecoder()
    model.layers[1].out = model.layers[0].out
    groups = names_of(build_param_groups(model))
    assert "layers.0.out.weight" in groups["matrices"]
    assert "layers.1.out.weight" not in groups["matrices"]


def test_models_inside_a_module_are_found() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.extra = TINY_MODELS["llama"](), nn.Linear(3, 101)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = names_of(build_param_groups(Wrapped()))
    assert groups["head"] == ["net.lm_head.weight"]
    assert "extra.weight" in groups["matrices"]


def test_frozen_parameters_are_left_out() -> None:
    model = PlainDecoder()
    model.layers[0].requires_grad_(False)
    names = [name for group in names_of(build_param_groups(model)).values() for name in group]
    assert not any(name.startswith("layers.0.") for name in names)
    assert "layers.1.qkv.weight" in names


def test_rates_and_decay_go_to_their_groups() -> None:
    groups = build_param_groups(PlainDecoder(), lr=0.02, adamw_lr=1e-3, weight_decay=0.3)
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert found == {
        "matrices": (0.02, 0.3),
        "head": (1e-3, 0.3),
        "embeddings": (1e-3, 0.0),
        "norms_biases": (1e-3, 0.0),
    }


def test_patterns_move_parameters() -> None:
    groups = names_of(
        build_param_groups(
            PlainDecoder(), adamw_patterns=["layers.0.*"], matrix_patterns=["to_logits.weight"]
        )
    )
    assert groups["others"] == [
        f"layers.0.{name}.weight" for name in ("qkv", "out", "mlp.0", "mlp.2")
    ]
    assert "layers.0.qkv.bias" in groups["norms_biases"]
    assert "to_logits.weight" in groups["matrices"]


def test_attention_of_torch_and_parameters_of_unknown_modules() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.norm = nn.LayerNorm((4, 8))
            self.table = nn.Parameter(torch.zeros(4, 8))
            self.filter = nn.Conv1d(2, 3, 4)

    groups = names_of(build_param_groups(Model(), adamw_patterns=["table"]))
    assert groups["matrices"] == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert groups["others"] == ["table", "filter.weight"]
    assert "norm.weight" in groups["norms_biases"]


def test_flattened_weights_stay_matrices_which_muon_refuses() -> None:
    """FSDP1 hands out flat shards; by their dimensions all would be AdamW's, without a word."""
    model = PlainDecoder()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().flatten())
    groups = build_param_groups(model, layers=find_layers(PlainDecoder()))
    assert "layers.0.qkv.weight" in names_of(groups)["matrices"]
    with pytest.raises(ValueError, match=r"'layers.0.qkv.weight' has the shape \(3072,\)"):
        Muon(groups)


def test_a_module_that_is_no_decoder_is_sorted_by_types_and_warned_of() -> None:
    match = r"\['head.weight'\] is taken for the head, because find_layers.*list holds its blocks"
    with pytest.warns(UserWarning, match=match):
        groups = names_of(build_param_groups(HandWritten()))
    assert groups == {
        "matrices": ["body.0.weight"],
        "head": ["head.weight"],
        "embeddings": ["embedding.weight"],
        "norms_biases": ["body.0.bias", "head.bias"],
    }
    with pytest.warns(UserWarning, match="no head is told apart"):
        build_param_groups(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_param_groups(HandWritten(), adamw_patterns=["head.*"])


@pytest.mark.filterwarnings("ignore:build_param_groups")
def test_a_tied_weight_of_a_module_that_is_no_decoder_is_an_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 9)
            self.head.weight = self.embedding.weight

    groups = names_of(build_param_groups(Tied()))
    assert groups["embeddings"] == ["embedding.weight"]
    assert groups["matrices"] == ["body.weight"]

    class TiedBefore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table = nn.Linear(4, 9), nn.Embedding(9, 4)
            self.table.weight = self.first.weight

    assert names_of(build_param_groups(TiedBefore()))["embeddings"] == ["first.weight"]


def test_layers_attribute_names_the_blocks() -> None:
    class TwoLists(PlainDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    with pytest.warns(UserWarning, match="Name it with layers_attribute"):
        build_param_groups(TwoLists())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_param_groups(TwoLists(), layers_attribute="layers")


def test_layers_attribute_may_be_a_path_from_the_module() -> None:
    module = nn.ModuleDict({"net": TINY_MODELS["llama"]()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = build_param_groups(module, layers_attribute="net.model.layers")
    assert names_of(ours) == names_of(build_param_groups(module))


def test_the_table_says_what_went_where() -> None:
    table = str(build_param_groups(PlainDecoder(), lr=0.02, weight_decay=0.1))
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][:6] == ["group", "use_muon", "tensors", "elements", "lr", "weight_decay"]
    assert lines[1] == ["matrices", "yes", "12", "30,720", "0.02", "0.1", "layers.0.qkv.weight"]
    assert lines[2] == ["head", "no", "1", "3,232", "default", "0.1", "to_logits.weight"]
    assert lines[3] == ["embeddings", "no", "2", "9,696", "default", "0", "positions.weight"]


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.NAdam, Muon],
)
@pytest.mark.parametrize("fused", [False, True])
def test_any_optimizer_takes_the_groups(optimizer: Any, fused: bool) -> None:
    options = {"fused": True} if fused and optimizer in (torch.optim.AdamW, torch.optim.SGD) else {}
    model = TINY_MODELS["gpt2"]()
    built = optimizer(build_param_groups(model), lr=0.1, **options)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    assert not any(map(torch.equal, before, model.parameters()))
    assert built.param_groups[0]["param_names"][0] == "transformer.h.0.attn.c_attn.weight"
    state = built.state_dict()
    built.load_state_dict(state)
    built.step()


# Bad input


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (
            {"adamw_patterns": ["*.router.*"]},
            r"adamw_patterns='\*.router.\*'\): matches no parameter. Names are like 'positions.wei",
        ),
        ({"matrix_patterns": ["head"]}, "matrix_patterns='head'.*matches no parameter"),
        (
            {"adamw_patterns": ["layers.0.*"], "matrix_patterns": ["*.out.weight"]},
            r"matrix_patterns=.*must not match 'layers.0.out.weight', as adamw_patterns do",
        ),
        (
            {"matrix_patterns": ["layers.0.out.*"]},
            r"matrix_patterns=.*'layers.0.out.bias' must have 2 dimensions.*\(32,\)",
        ),
    ],
)
def test_bad_patterns_are_refused(options: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        build_param_groups(PlainDecoder(), **options)


def test_a_module_without_anything_to_train_is_refused() -> None:
    model = PlainDecoder().requires_grad_(False)
    with pytest.raises(ValueError, match=r"'PlainDecoder'.*must have a parameter that re"):
        build_param_groups(model)


# Learning rates


def two_rates() -> torch.optim.Optimizer:
    first, second = (nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": [second], "lr": 3e-4}])


KEEP: list[Any] = [
    lambda o: LambdaLR(o, lambda step: min(1, step / 10)),
    lambda o: LambdaLR(o, [lambda _: 0.5, lambda _: 0.1]),  # as the user says
    lambda o: CosineAnnealingLR(o, 10),
    lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 10)], milestones=[5]),
    lambda o: ReduceLROnPlateau(o),
]
LOSE: list[Any] = [
    (lambda o: CosineAnnealingLR(o, 10, eta_min=1e-4), r"CosineAnnealingLR\(eta_min=0.0001\)"),
    (lambda o: OneCycleLR(o, max_lr=0.02, total_steps=10), "OneCycleLR sets the same"),
    (lambda o: ReduceLROnPlateau(o, min_lr=1e-4), r"ReduceLROnPlateau\(min_lrs="),
    (
        lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 9, 1e-4)], milestones=[5]),
        "eta_min",
    ),
    (lambda o: ChainedScheduler([LinearLR(o), CosineAnnealingLR(o, 9, 1e-4)]), "eta_min"),
]


@pytest.mark.parametrize("build", KEEP)
def test_schedulers_that_keep_the_ratio(build: Any) -> None:
    optimizer = two_rates()
    before = learning_rates(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost_ratios(before, optimizer, build(optimizer))


@pytest.mark.parametrize(("build", "culprit"), LOSE)
def test_schedulers_that_lose_the_ratio(build: Any, culprit: str) -> None:
    optimizer = two_rates()
    before = learning_rates(optimizer)
    scheduler = build(optimizer)
    with pytest.warns(UserWarning, match=rf"rates of \[0.02, 0.0003\], and {culprit}|{culprit}"):
        warn_of_lost_ratios(before, optimizer, scheduler)


@pytest.mark.parametrize("build", [build for build, _ in LOSE])
def test_one_learning_rate_has_no_ratio(build: Any) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.02)
    before = learning_rates(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost_ratios(before, optimizer, build(optimizer))
