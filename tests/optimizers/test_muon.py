import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_align.optimizers.muon import Muon, adjusted_lr, muon_direction
from lightning_align.optimizers.orthogonalize import orthogonalize

SHAPES = [(12, 20), (20, 12), (16, 16), (12, 20)]


def parameters_of(shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype) * 0.1) for s in shapes]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(optimizer: Any, parameters: list[nn.Parameter], steps: range) -> list[Tensor]:
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def in_groups(matrices: list[Any], others: list[Any], **settings: Any) -> list[dict[str, Any]]:
    return [
        {"params": matrices, "use_muon": True},
        {"params": others, "use_muon": False, **settings},
    ]


@pytest.fixture
def torch_muon_in_fp32(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.optim.Muon without its cast to bf16."""
    from torch.optim import _muon

    theirs = _muon._zeropower_via_newtonschulz

    class StaysWide(torch.Tensor):
        def bfloat16(self) -> Tensor:  # type: ignore[override]
            return torch.Tensor(self).clone()

    def in_fp32(gradient: Tensor, *arguments: Any) -> Tensor:
        wide: Any = gradient.as_subclass(StaysWide)
        return torch.Tensor(theirs(wide, *arguments))

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", in_fp32)
    return torch.optim.Muon


@pytest.mark.parametrize("backend", ["newton_schulz", "eigh", "auto"])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_matches_torch_muon(
    torch_muon_in_fp32: Any, adjust_lr_fn: Any, nesterov: bool, backend: Any
) -> None:
    settings: dict[str, Any] = {"lr": 0.02, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    start, ours, theirs = parameters_of(), parameters_of(), parameters_of()
    train(Muon(ours, backend=backend, **settings), ours, range(10))
    train(torch_muon_in_fp32(theirs, **settings), theirs, range(10))
    for our, their, begin in zip(ours, theirs, start, strict=True):
        moved = (their - begin).norm()
        # Newton-Schulz in fp32 rounds to about 1e-6; eigh to 1e-4 at most (see orthogonalize)
        assert (our - their).norm() < (1e-3 if backend == "eigh" else 2e-5) * moved


def test_muon_of_a_large_matrix_matches_torch_muon(torch_muon_in_fp32: Any) -> None:
    """Large enough for auto to take eigh."""
    start, ours, theirs = (parameters_of([(192, 200)]) for _ in range(3))
    train(Muon(ours, lr=0.02), ours, range(10))
    train(torch_muon_in_fp32(theirs, lr=0.02), theirs, range(10))
    moved = (theirs[0] - start[0]).norm()
    assert 0 < (ours[0] - theirs[0]).norm() < 1e-3 * moved


def test_one_step_in_closed_form() -> None:
    """One polynomial step 1.5 s - 0.5 s^3 of an orthogonal gradient.

    G = 5 * rotation in 2 x 2 has norm 5 sqrt(2), so both singular values are s = 1/sqrt(2), and
    1.5 s - 0.5 s^3 = 1.25 s. Nesterov and momentum scale G only, which the norm takes out. Hence
    W = (1 - lr wd) W0 - lr 1.25 / sqrt(2) * rotation.
    """
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    parameter = nn.Parameter(torch.eye(2))
    parameter.grad = 5 * rotation
    Muon([parameter], lr=0.1, weight_decay=0.5, ns_coefficients=(1.5, -0.5, 0.0), ns_steps=1).step()
    expected = 0.95 * torch.eye(2) - 0.1 * 1.25 / math.sqrt(2) * rotation
    torch.testing.assert_close(parameter.detach(), expected)


def test_momentum_in_closed_form() -> None:
    """B = 0.1 g1 after one step, 0.09 g1 + 0.1 g2 after two; Nesterov: 0.1 g2 + 0.9 B."""
    first, second, buffer = torch.ones(1, 2), 3 * torch.ones(1, 2), torch.zeros(1, 2)
    muon_direction(first, buffer, momentum=0.9, nesterov=True)
    plain = muon_direction(second, buffer.clone(), momentum=0.9, nesterov=False)
    ahead = muon_direction(second, buffer, momentum=0.9, nesterov=True)
    torch.testing.assert_close(plain, torch.full((1, 2), 0.39))
    torch.testing.assert_close(ahead, torch.full((1, 2), 0.1 * 3 + 0.9 * 0.39))


def test_adjusted_lr_in_closed_form() -> None:
    assert adjusted_lr(0.1, None, 16, 4) == pytest.approx(0.2)  # sqrt(16 / 4)
    assert adjusted_lr(0.1, "original", 4, 16) == pytest.approx(0.1)
    assert adjusted_lr(0.1, "match_rms_adamw", 4, 25) == pytest.approx(0.1)  # 0.2 * sqrt(25)
    assert adjusted_lr(0.1, "match_rms_adamw", 25, 4) == pytest.approx(0.1)
    assert adjusted_lr(0.1, "identity", 16, 4) == 0.1


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw", "identity"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_matrix_stored_in_out_takes_the_same_step(shape: Any, adjust_lr_fn: Any) -> None:
    """GPT-2's Conv1D holds the transposed weight of an nn.Linear, and learns the same."""
    linear = parameters_of([shape])
    conv1d = [nn.Parameter(linear[0].detach().T.clone())]
    settings: dict[str, Any] = {"lr": 0.02, "adjust_lr_fn": adjust_lr_fn}
    first = Muon([{"params": linear, "use_muon": True}], **settings)
    second = Muon([{"params": conv1d, "use_muon": True, "transposed": True}], **settings)
    for step in range(3):
        set_gradients(linear, step)
        assert linear[0].grad is not None
        conv1d[0].grad = linear[0].grad.T.clone()
        first.step()
        second.step()
    torch.testing.assert_close(conv1d[0].detach().T, linear[0].detach())


def test_groups_without_use_muon_are_adamw() -> None:
    ours, theirs = parameters_of([(4, 6), (5,), (6, 4)]), parameters_of([(4, 6), (5,), (6, 4)])
    groups = in_groups(ours[2:], ours[:2], lr=3e-3, weight_decay=0.01)
    train(Muon(groups, lr=0.02, betas=(0.8, 0.9), adamw_eps=1e-6), ours, range(5))
    adamw = torch.optim.AdamW(
        theirs[:2], lr=3e-3, weight_decay=0.01, betas=(0.8, 0.9), eps=1e-6, fused=True
    )
    train(adamw, theirs, range(5))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_adamw_lr_is_for_groups_that_name_none() -> None:
    matrix, vector, other = parameters_of([(4, 6), (5,), (3,)])
    groups = [*in_groups([matrix], [vector]), {"params": [other], "use_muon": False, "lr": 0.5}]
    assert [g["lr"] for g in Muon(groups, lr=0.02, adamw_lr=3e-3).param_groups] == [0.02, 3e-3, 0.5]
    assert [g["lr"] for g in Muon(groups[:2], lr=0.02).param_groups] == [0.02, 0.02]


def test_an_empty_group_is_added_as_torchs_optimizers_do() -> None:
    """It was dropped, so that whoever counts groups counted wrongly."""
    optimizer = Muon(parameters_of())
    optimizer.add_param_group({"params": []})
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(SHAPES), 0]
    train(optimizer, optimizer.param_groups[0]["params"], range(1))


def test_a_group_may_name_an_adamw_lr_of_its_own() -> None:
    """It was dropped without a word."""
    matrix, vector = parameters_of([(4, 6), (5,)])
    groups = in_groups([matrix], [vector], adamw_lr=0.5)
    assert [g["lr"] for g in Muon(groups, lr=0.02, adamw_lr=3e-3).param_groups] == [0.02, 0.5]


def test_plain_matrices_are_all_muons_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Muon(parameters_of(), lr=0.02)
    assert [group["use_muon"] for group in optimizer.param_groups] == [True]


def test_plain_parameters_are_sorted_by_dimensions_with_a_warning() -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6))
    with pytest.warns(UserWarning, match=r"build_param_groups\(module\).*OptimizerSwap"):
        optimizer = Muon(module.named_parameters(), lr=0.02, adamw_lr=1e-3)
    names = [(g["use_muon"], g["lr"], g["param_names"]) for g in optimizer.param_groups]
    assert names == [(True, 0.02, ["0.weight", "1.weight"]), (False, 1e-3, ["1.bias"])]


def test_a_step_of_one_parameter_is_its_part_of_the_whole_step() -> None:
    shapes = [(12, 20), (12, 20), (5,), (3,)]
    ours, theirs = parameters_of(shapes), parameters_of(shapes)
    first = Muon(in_groups(ours[:2], ours[2:]))
    second = Muon(in_groups(theirs[:2], theirs[2:]))
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        first.step()
        for parameter in reversed(theirs):
            second.step_param(parameter)
            parameter.grad = None
    assert all(map(torch.equal, ours, theirs))


def test_bf16_parameters_keep_their_decay_and_an_fp32_momentum() -> None:
    """0.1 * 0.001 is below half of a bf16 step, so that decay alone would round to nothing."""
    narrow = parameters_of([(12, 20)], torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer, expected = Muon(narrow, lr=1e-3), Muon(wide, lr=1e-3)
    train(optimizer, narrow, range(1))
    wide[0].grad = narrow[0].grad.float()  # type: ignore[union-attr]
    expected.step()
    assert torch.equal(narrow[0], wide[0].bfloat16())
    assert optimizer.state[narrow[0]]["momentum_buffer"].dtype == torch.float32


def test_same_shapes_are_orthogonalized_together_on_a_gpu() -> None:
    from lightning_align.optimizers.muon import _batches

    on_cpu = parameters_of([(12, 20), (20, 12), (12, 20)])
    assert [len(batch) for batch in _batches(list(on_cpu))] == [1, 1, 1]
    elsewhere: list[Tensor] = [torch.zeros(p.shape, device="meta") for p in on_cpu]
    assert [len(batch) for batch in _batches(elsewhere)] == [2, 1]


def test_a_batch_steps_as_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_align.optimizers import muon

    alone, together = parameters_of(), parameters_of()
    train(Muon(alone, lr=0.02), alone, range(3))
    monkeypatch.setattr(muon, "_batches", lambda p: [[p[0], p[3]], [p[1]], [p[2]]])
    train(Muon(together, lr=0.02), together, range(3))
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_all_zero_gradients_leave_only_the_decay() -> None:
    parameters = parameters_of([(4, 6)])
    before = parameters[0].detach().clone()
    parameters[0].grad = torch.zeros(4, 6)
    Muon(parameters, lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameters[0].detach(), 0.95 * before)


def test_polar_express_and_lists_of_coefficients_step_as_their_polynomial() -> None:
    for coefficients in ("polar_express", [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]):
        parameters = parameters_of([(6, 9)])
        before = parameters[0].detach().clone()
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.0, ns_coefficients=coefficients)  # type: ignore[arg-type]
        train(optimizer, parameters, range(1))
        gradient = parameters[0].grad
        assert gradient is not None
        update = orthogonalize(gradient, coefficients=coefficients)  # type: ignore[arg-type]
        torch.testing.assert_close(parameters[0].detach(), before - 0.1 * update)


def test_closure_computes_loss_and_gradients() -> None:
    parameters = parameters_of([(4, 6)])
    optimizer = Muon(parameters)

    def closure() -> Tensor:
        loss = parameters[0].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    before = parameters[0].detach().clone()
    assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
    assert not torch.equal(parameters[0], before)


# Faults


@pytest.mark.parametrize("bad", [0, 1])
def test_non_finite_gradient_skips_both_kinds_and_is_counted(bad: int) -> None:
    parameters = parameters_of([(4, 6), (5,)])
    optimizer = Muon(in_groups([("w", parameters[0])], [("b", parameters[1])]))
    before = train(optimizer, parameters, range(1))
    state = copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(parameters, 1)
    parameters[bad].grad.view(-1)[3] = float("nan")  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=f"gradient of parameter '{'wb'[bad]}' is not finite"):
        optimizer.step()
    assert all(map(torch.equal, parameters, before))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][n], v) for i in state for n, v in state[i].items())
    assert optimizer.skipped_steps == 1
    other = Muon(in_groups([("w", parameters[0])], [("b", parameters[1])]))
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 1


def test_state_of_torch_muon_goes_on_here(torch_muon_in_fp32: Any) -> None:
    theirs, ours = parameters_of(), parameters_of()
    optimizer = torch_muon_in_fp32(theirs, lr=0.02)
    train(optimizer, theirs, range(3))
    for parameter, value in zip(ours, theirs, strict=True):
        parameter.data.copy_(value.data)
    resumed = Muon(ours, backend="newton_schulz")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.02
    train(resumed, ours, range(3, 6))
    train(optimizer, theirs, range(3, 6))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_resume_is_bit_identical_with_weights_only() -> None:
    shapes = [(12, 20), (192, 200), (5,), (3, 4)]

    def build() -> tuple[list[nn.Parameter], Muon]:
        parameters = parameters_of(shapes, torch.bfloat16)
        return parameters, Muon(in_groups(parameters[:2], parameters[2:]), lr=0.02)

    parameters, optimizer = build()
    expected = train(optimizer, parameters, range(4))
    parameters, optimizer = build()
    train(optimizer, parameters, range(2))
    file = io.BytesIO()
    torch.save({"w": [p.data for p in parameters], "o": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    parameters, optimizer = build()
    for parameter, value in zip(parameters, saved["w"], strict=True):
        parameter.data.copy_(value)
    optimizer.load_state_dict(saved["o"])
    assert all(map(torch.equal, train(optimizer, parameters, range(2, 4)), expected))


def test_deepcopy_goes_on_alike() -> None:
    parameters = parameters_of([(4, 6), (5,)])
    optimizer = Muon(in_groups(parameters[:1], parameters[1:]), adamw_lr=0.5)
    train(optimizer, parameters, range(1))
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "use_muon": False})
    assert copied.param_groups[-1]["lr"] == 0.5


def test_state_of_other_groups_is_refused() -> None:
    matrix = parameters_of([(4, 6)])
    as_adamw = Muon([{"params": [("w", matrix[0])], "use_muon": False}])
    train(as_adamw, matrix, range(1))
    as_muon = Muon([{"params": [("w", matrix[0])], "use_muon": True}])
    with pytest.raises(ValueError, match=r"state of parameter 'w' must hold.*momentum_buffer"):
        as_muon.load_state_dict(as_adamw.state_dict())


# Bad input


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"lr": -1.0}, r"Muon\(lr=-1.0\): must be a number of at least 0, below 1e\+19"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1.*at least 0"),
        ({"momentum": 1.0}, "momentum=1.0.*below 1"),
        ({"eps": -1e-7}, "eps=-1e-07"),
        ({"adamw_eps": "small"}, "adamw_eps='small'"),
        ({"adamw_lr": -1e-3}, "adamw_lr=-0.001"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\).*two numbers"),
        ({"ns_steps": 0}, "ns_steps=0.*1 to 99"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients=.*'polar_express'"),
        (
            {"adjust_lr_fn": "none"},
            "adjust_lr_fn='none'.*'original', 'match_rms_adamw'(,| or) 'identity'",
        ),
        ({"backend": "svd"}, "backend='svd'.*'auto', 'newton_schulz'(,| or) 'eigh'"),
        ({"ns_dtype": "float16"}, "ns_dtype='float16'.*'auto', 'float32'(,| or) 'bfloat16'"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Muon(parameters_of(), **settings)
    if "adamw_lr" not in settings:  # a group may say otherwise
        with pytest.raises(ValueError, match=rule):
            Muon([{"params": parameters_of(), **settings}])


def test_a_vector_among_matrices_is_refused_by_name() -> None:
    matrix, vector = parameters_of([(4, 6), (5,)])
    with pytest.raises(ValueError, match=r"must hold matrices, and 'b' has the shape \(5,\)"):
        Muon([{"params": [("w", matrix), ("b", vector)], "use_muon": True}])


@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 3, 3, 3)])
def test_more_than_two_dimensions_are_refused_unless_a_group_says_that_they_are_adamws(
    shape: Any,
) -> None:
    """torch's Muon refuses them, too; ours stepped the experts of a mixture by AdamW, unasked."""
    experts, matrix = parameters_of([shape, (4, 6)])
    rule = "'experts'.*more than two dimensions.*use_muon=False"
    for named in ([("w", matrix), ("experts", experts)], [{"params": [("experts", experts)]}]):
        with pytest.raises(ValueError, match=rule):
            Muon(named)
    with pytest.raises(ValueError, match=r"of shape \(.*more than two dimensions"):
        Muon([experts])
    Muon(in_groups([matrix], [experts]))


def test_a_matrix_that_was_flattened_later_is_refused_by_name() -> None:
    """As DeepSpeed does, with pieces of all parameters in the place of the first."""
    optimizer = Muon([{"params": [("w", parameters_of([(4, 6)])[0])], "use_muon": True}])
    (flat,) = optimizer.param_groups[0]["params"] = parameters_of([(24,)])
    flat.grad = torch.ones(24)
    with pytest.raises(ValueError, match=r"must hold matrices, and 'w' has the shape \(24,\)"):
        optimizer.step()


def test_one_parameter_twice_is_refused() -> None:
    matrix = parameters_of([(4, 6)])[0]
    with (
        pytest.warns(UserWarning, match="duplicate"),
        pytest.raises(ValueError, match=r"must be given once.*build_"),
    ):
        Muon([matrix, matrix])  # the warning is torch's own, which would go on
    for named, told in (([("w", matrix)], "'w'"), ([matrix], "number 0 of its group")):
        with pytest.raises(ValueError, match=rf"{told}.*must be in one group, and is in two"):
            Muon(in_groups(named, named))


def test_complex_parameters_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="real floating-point"):
        Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    parameters = parameters_of([(4, 6)])
    optimizer = Muon([("w", parameters[0])])
    parameters[0].grad = torch.ones(4, 6).to_sparse()
    with pytest.raises(ValueError, match=r"'w'.*its gradient is sparse"):
        optimizer.step()
