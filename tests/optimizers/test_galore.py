import copy
import io
import math
import pickle
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from transformers import GPT2Config

from lightning_align import PretrainModule
from lightning_align.optimizers.galore import GaLoreAdamW
from lightning_align.optimizers.param_groups import build_param_groups
from lightning_align.optimizers.projection import REFRESHES, Basis, project, project_back
from tests.laws.members import VOCABULARY, HandWritten

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
SHAPES = ((12, 8), (8, 12), (8, 8), (9,))


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def named(weights):
    return [(f"weight{number}", weight) for number, weight in enumerate(weights)]


def give_gradients(weights, number):
    generator = torch.Generator().manual_seed(100 + number)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def train(weights, optimizer, numbers):
    for number in numbers:
        give_gradients(weights, number)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def basis_of(optimizer, weight):
    state = optimizer.state[weight]
    return Basis(state.get("basis_left"), state.get("basis_right"))


# The step


def test_the_first_step_goes_down_the_leading_direction_by_lr_times_scale():
    """diag(3, 2), rank 1: the gradient is seen as (3, 0), and Adam's first step is its sign."""
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = GaLoreAdamW([weight], lr=0.1, rank=1, scale=0.5, projection="eigh")
    weight.grad = torch.diag(torch.tensor([3.0, 2.0]))
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.diag(torch.tensor([-0.05, 0.0])))


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_a_run_is_algorithm_2_of_the_paper_written_out(proj_type):
    """arXiv:2403.03507, Algorithm 2, with the bases that the optimizer chose."""
    (weight,) = parameters([(12, 8)])
    options = {"rank": 3, "update_proj_gap": 4, "proj_type": proj_type}
    optimizer = GaLoreAdamW([weight], lr=0.1, eps=1e-3, weight_decay=0.2, **options)
    expected = weight.detach().clone()
    first = second = 0
    for number in range(10):
        train([weight], optimizer, [number])
        basis = basis_of(optimizer, weight)
        low = project(weight.grad, basis)
        first = 0.9 * first + 0.1 * low
        second = 0.999 * second + 0.001 * low**2
        corrections = 1 - 0.9 ** (number + 1), math.sqrt(1 - 0.999 ** (number + 1))
        direction = first / (second.sqrt() + 1e-3) * corrections[1] / corrections[0]
        expected = (expected - 0.1 * 0.25 * project_back(direction, basis)) * (1 - 0.1 * 0.2)
        torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_projected_is_adamw_with_eps_before_the_correction_and_decay_after():
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.01, "betas": (0.8, 0.9)}
    with pytest.warns(UserWarning, match="plain AdamW"):
        optimizer = GaLoreAdamW(
            [{"params": ours, "rank": None}], eps=0.1, weight_decay=0.2, **options
        )
    torchs = torch.optim.AdamW(theirs, eps=0.1, weight_decay=0.0, **options)
    for number in range(5):
        train(ours, optimizer, [number])
        torchs.param_groups[0]["eps"] = 0.1 / math.sqrt(1 - 0.9 ** (number + 1))
        train(theirs, torchs, [number])
        for weight in theirs:
            weight.data.mul_(1 - 0.01 * 0.2)
    for weight, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(weight, expected)


def test_parameters_that_started_late_are_corrected_by_their_own_number_of_steps():
    late, alone = parameters([(9,), (9,)]), parameters([(9,), (9,)])
    with pytest.warns(UserWarning, match="plain AdamW"):
        optimizers = GaLoreAdamW(late, lr=0.1), GaLoreAdamW(alone[1:], lr=0.1)
    train(late[:1], optimizers[0], range(3))
    late[0].grad = None
    for number in range(3):
        give_gradients(alone[1:], number)
        late[1].grad = alone[1].grad.clone()
        give_gradients(late[:1], number)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(late[1], alone[1])


@pytest.mark.parametrize("projection", REFRESHES)
def test_it_finds_the_minimum_of_a_quadratic(projection):
    (target,) = parameters([(16, 12)])
    weight = nn.Parameter(torch.zeros(16, 12))
    optimizer = GaLoreAdamW([weight], lr=0.1, rank=4, update_proj_gap=20, projection=projection)
    for _ in range(400):
        optimizer.zero_grad()
        (weight - target.detach()).square().sum().backward()
        optimizer.step()
    assert (weight - target).square().mean() < 0.05 * target.square().mean()


def test_a_learning_rate_may_be_a_tensor_and_betas_a_list():
    ours, theirs = parameters(), parameters()
    first = GaLoreAdamW(ours, lr=torch.tensor(0.1), betas=[0.8, 0.9], rank=3)
    second = GaLoreAdamW(theirs, lr=0.1, betas=(0.8, 0.9), rank=3)
    assert first.param_groups[0]["betas"] == (0.8, 0.9)
    for weight, expected in zip(
        train(ours, first, range(3)), train(theirs, second, range(3)), strict=True
    ):
        torch.testing.assert_close(weight, expected)


def test_a_closure_is_called_with_gradients_enabled_and_its_loss_returned():
    (weight,) = parameters([(8, 6)])
    optimizer = GaLoreAdamW([weight], rank=2)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    expected = weight.square().sum().item()
    assert optimizer.step(closure).item() == expected
    assert weight.square().sum() < expected


def test_one_parameter_alone_steps_as_it_does_among_all():
    together, alone = parameters(), parameters()
    made = [
        GaLoreAdamW(weights, lr=0.1, rank=3, update_proj_gap=3) for weights in (together, alone)
    ]
    for number in range(5):
        train(together, made[0], [number])
        give_gradients(alone, number)
        for weight in reversed(alone):
            made[1].step_param(weight)
    assert all(map(torch.equal, together, alone))


def test_bf16_weights_are_rounded_once_and_keep_fp32_state():
    """A step of 1e-4 with decay, from fp32 moments: equal to fp32's, rounded."""
    half, single = parameters(dtype=torch.bfloat16), parameters()
    for weight, rounded in zip(single, half, strict=True):
        weight.data.copy_(rounded)
    for weights in (half, single):
        optimizer = GaLoreAdamW(weights, lr=0.1, rank=3, weight_decay=0.1)
        give_gradients(half, 0)
        for weight, rounded in zip(weights, half, strict=True):
            weight.grad = rounded.grad.to(weight.dtype)
        optimizer.step()
        for state in optimizer.state.values():
            assert {v.dtype for v in state.values() if isinstance(v, torch.Tensor)} == {
                torch.float32
            }
    for weight, rounded in zip(single, half, strict=True):
        assert torch.equal(rounded, weight.to(torch.bfloat16))


# Refreshes


def refresh_steps(optimizer, weights, numbers):
    """For each weight the steps at which its basis changed."""
    found = [[] for _ in weights]
    for number in numbers:
        before = [basis_of(optimizer, weight) for weight in weights]
        train(weights, optimizer, [number])
        for steps, weight, old in zip(found, weights, before, strict=True):
            if basis_of(optimizer, weight).right is not old.right:
                steps.append(number)
    return found


def test_refreshes_are_spread_over_the_gap_and_each_comes_once_in_it():
    weights = parameters([(12, 8)] * 5)
    optimizer = GaLoreAdamW(weights, rank=2, update_proj_gap=10)
    found = refresh_steps(optimizer, weights, range(31))
    # At its first step; then one matrix each second step.
    assert found == [
        [0, 10, 20, 30],
        [0, 8, 18, 28],
        [0, 6, 16, 26],
        [0, 4, 14, 24],
        [0, 2, 12, 22],
    ]


def test_without_stagger_all_refresh_together_as_in_galore_torch():
    weights = parameters([(12, 8)] * 3)
    optimizer = GaLoreAdamW(weights, rank=2, update_proj_gap=4, stagger=False)
    assert refresh_steps(optimizer, weights, range(10)) == [[0, 4, 8]] * 3


def test_refreshes_are_spread_by_size():
    """A matrix of three quarters of all elements has three quarters of the gap for itself."""
    weights = parameters([(24, 8), (8, 8)])
    optimizer = GaLoreAdamW(weights, rank=2, update_proj_gap=8)
    assert refresh_steps(optimizer, weights, range(9)) == [[0, 8], [0, 2]]


def test_a_weight_whose_gradient_comes_late_has_its_first_refresh_then():
    weights = parameters([(12, 8)] * 2)
    optimizer = GaLoreAdamW(weights, rank=2, update_proj_gap=4)
    train(weights[:1], optimizer, range(3))
    assert weights[1] not in optimizer.state
    assert refresh_steps(optimizer, weights, range(3, 6))[1] == [3, 5]
    assert optimizer.state[weights[1]]["step"] == 3


def test_a_gradient_of_zeros_keeps_the_basis_and_makes_none():
    weight, other = parameters([(12, 8)] * 2)
    optimizer = GaLoreAdamW([weight, other], lr=0.1, weight_decay=0.5, rank=2, update_proj_gap=1)
    train([other], optimizer, [0])
    old = basis_of(optimizer, other)
    before = weight.detach().clone()
    weight.grad, other.grad = torch.zeros_like(weight), torch.zeros_like(other)
    optimizer.step()
    assert basis_of(optimizer, other) is not old
    assert basis_of(optimizer, other).right is old.right
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5))
    assert not optimizer.state[weight]
    give_gradients([weight, other], 1)
    optimizer.step()
    assert basis_of(optimizer, weight).rank == 2


def test_a_failed_decomposition_is_counted_warned_of_once_and_leaves_the_basis(monkeypatch):
    weights = parameters([(12, 8)] * 2)
    optimizer = GaLoreAdamW(named(weights), rank=2, update_proj_gap=1, projection="eigh")
    train(weights, optimizer, [0])
    old = basis_of(optimizer, weights[0])

    def fail(*arguments):
        raise torch.linalg.LinAlgError

    monkeypatch.setitem(REFRESHES, "eigh", fail)
    with pytest.warns(UserWarning, match="'weight0' failed.*The old projection stays"):
        train(weights, optimizer, [1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(weights, optimizer, [2])
    assert optimizer.failed_refreshes == 4
    assert basis_of(optimizer, weights[0]).right is old.right
    assert all(weight.isfinite().all() for weight in weights)


def test_draws_follow_the_seed_and_no_two_matrices_or_refreshes_draw_the_same():
    bases = []
    for seed in (0, 0, 1):
        weights = parameters([(12, 8)] * 2)
        options = {"rank": 2, "update_proj_gap": 1, "projection": "random", "seed": seed}
        optimizer = GaLoreAdamW(weights, **options)
        for number in range(2):
            train(weights, optimizer, [number])
            bases += [basis_of(optimizer, weight).right for weight in weights]
    first, again, other = bases[:4], bases[4:8], bases[8:]
    assert all(map(torch.equal, first, again))
    different = [*first, *other]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


# Moments in a new basis


def test_rotating_moments_is_an_option_that_changes_the_run_after_a_refresh():
    runs = []
    for rotate in (False, True):
        weights = parameters([(12, 8)])
        options = {"rank": 3, "update_proj_gap": 3, "projection": "svd", "rotate_moments": rotate}
        optimizer = GaLoreAdamW(weights, lr=0.1, **options)
        runs.append([train(weights, optimizer, [number])[0] for number in range(4)])
    assert all(map(torch.equal, runs[0][:3], runs[1][:3]))
    assert not torch.allclose(runs[0][3], runs[1][3])


# Memory


def kept_bytes(state):
    """Bytes of the distinct storages that a state keeps alive."""
    tensors = [v for each in state.values() for v in each.values() if isinstance(v, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("projection", REFRESHES)
def test_state_is_what_the_formula_says_and_065_less_than_adamw_at_the_shapes_of_7b(projection):
    """The 7B Llama over 16: width 256, inner 688, two layers of 32, their share of 2000 rows."""
    attention, mlp, rank = [(256, 256)] * 4, [(688, 256)] * 2 + [(256, 688)], 64
    weights = parameters((attention + mlp) * 2)
    embedding_and_head = parameters([(125, 256)] * 2)
    groups = [{"params": weights, "rank": rank}, {"params": embedding_and_head}]
    optimizer = GaLoreAdamW(groups, projection=projection, update_proj_gap=1)
    train(weights + embedding_and_head, optimizer, range(2))
    rest = 8 * sum(weight.numel() for weight in embedding_and_head)
    formula = 4 * sum(rank * min(w.shape) + 2 * rank * max(w.shape) for w in weights)  # rows 4-5
    adamw = 8 * sum(weight.numel() for weight in weights) + rest
    kept = kept_bytes(optimizer.state)
    assert formula + rest < kept <= 1.02 * (formula + rest)
    assert 1 - kept / adamw >= 0.65


@pytest.mark.parametrize(
    ("proj_type", "elements"),
    [
        ("std", 3 * 8 + 2 * 3 * 12),
        ("reverse_std", 3 * 12 + 2 * 3 * 8),
        ("full", 3 * 20 + 2 * 9),
    ],
)
def test_state_of_each_kind_of_projection(proj_type, elements):
    weights = parameters([(12, 8)])
    optimizer = GaLoreAdamW(weights, rank=3, proj_type=proj_type)
    train(weights, optimizer, range(2))
    assert kept_bytes(optimizer.state) == 4 * (elements + 1)  # and the number of steps


# Saving and loading


def saved(optimizer):
    """The state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(weights):
    return [nn.Parameter(weight.detach().clone()) for weight in weights]


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("projection", REFRESHES)
def test_a_run_that_resumes_in_mid_gap_is_bit_identical(projection, proj_type):
    weights = parameters()
    options = {"rank": 3, "update_proj_gap": 4, "projection": projection, "proj_type": proj_type}
    make = partial(GaLoreAdamW, lr=0.1, rotate_moments=True, **options)
    optimizer = make(weights)
    train(weights, optimizer, range(6))
    again = copies(weights)
    resumed = make(again)
    resumed.load_state_dict(saved(optimizer))
    ours, theirs = train(weights, optimizer, range(6, 15)), train(again, resumed, range(6, 15))
    assert all(map(torch.equal, ours, theirs))


def test_bf16_weights_resume_with_fp32_state():
    weights = parameters(dtype=torch.bfloat16)
    optimizer = GaLoreAdamW(weights, lr=0.1, rank=3, update_proj_gap=3)
    train(weights, optimizer, range(4))
    again = copies(weights)
    resumed = GaLoreAdamW(again, lr=0.1, rank=3, update_proj_gap=3)
    resumed.load_state_dict(saved(optimizer))
    ours, theirs = train(weights, optimizer, range(4, 8)), train(again, resumed, range(4, 8))
    assert all(map(torch.equal, ours, theirs))


def trained_with_rank(rank, **options):
    weights = parameters([(12, 8), (8, 12), (9,)])
    optimizer = GaLoreAdamW(named(weights), lr=0.1, rank=rank, **options)
    train(weights, optimizer, range(5))
    return weights, optimizer


def test_a_state_of_another_rank_is_refused():
    weights, optimizer = trained_with_rank(3)
    other = GaLoreAdamW(named(copies(weights)), rank=5)
    with pytest.raises(
        ValueError, match=r"load_state_dict\(rank=5\): .*rank 3.*on_rank_change='reproject'"
    ):
        other.load_state_dict(saved(optimizer))
    assert not other.state


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_a_state_of_another_rank_is_reprojected_on_request(rank, proj_type):
    weights, optimizer = trained_with_rank(3, proj_type=proj_type, update_proj_gap=100)
    again = copies(weights)
    options = {"proj_type": proj_type, "update_proj_gap": 100, "on_rank_change": "reproject"}
    other = GaLoreAdamW(named(again), lr=0.1, rank=rank, **options)
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["rank"] == rank
    old_basis = basis_of(optimizer, weights[0])
    old = project_back(optimizer.state[weights[0]]["exp_avg"].clone(), old_basis)
    train(again, other, [5])
    basis = basis_of(other, again[0])
    assert basis.rank == rank
    state = other.state[again[0]]
    expected = 0.9 * project(old, basis) + 0.1 * project(again[0].grad, basis)
    torch.testing.assert_close(state["exp_avg"], expected)  # the old mean, where it can be seen
    assert state["step"] == 6
    assert kept_bytes({0: state}) == 4 * sum(
        value.numel() for value in state.values() if isinstance(value, torch.Tensor)
    )
    train(again, other, range(6, 9))
    assert basis_of(other, again[0]).right is basis.right  # once, not at every step
    assert all(weight.isfinite().all() for weight in again)


def test_a_state_of_another_side_is_refused_even_then():
    weights, optimizer = trained_with_rank(3)
    other = GaLoreAdamW(
        named(copies(weights)), rank=3, proj_type="reverse_std", on_rank_change="reproject"
    )
    with pytest.raises(ValueError, match="the state of parameter 'weight0' must hold"):
        other.load_state_dict(saved(optimizer))


def test_options_of_the_whole_object_survive_a_copy_and_a_pickle():
    _, optimizer = trained_with_rank(3, on_nonfinite="raise", seed=5)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = twin.param_groups[0]["params"]
        give_gradients(theirs, 5)
        twin.step()
        theirs[0].grad.fill_(torch.nan)
        with pytest.raises(FloatingPointError):
            twin.step()


# Gradients that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_gradient_skips_the_step_of_all_groups_and_is_counted(value):
    weights = parameters()
    optimizer = GaLoreAdamW(named(weights), lr=0.1, rank=3, update_proj_gap=1)
    before = train(weights, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict()["state"])
    give_gradients(weights, 2)
    weights[1].grad[0, 0] = value
    with pytest.warns(UserWarning, match="gradient of parameter 'weight1' is not finite"):
        optimizer.step()
    assert all(map(torch.equal, before, weights))
    for key, values in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(torch.as_tensor(values[n]), torch.as_tensor(v))
            for n, v in state[key].items()
        )
    assert optimizer.skipped_steps == 1


def test_a_bad_gradient_raises_on_request():
    weights = parameters()
    optimizer = GaLoreAdamW(named(weights), rank=3, on_nonfinite="raise")
    before = train(weights, optimizer, range(1))
    weights[3].grad[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"at step 2 .*weight3.*Nothing was changed"):
        optimizer.step()
    assert all(map(torch.equal, before, weights))


# Groups


def projected_names(optimizer):
    return {
        name
        for group in optimizer.param_groups
        for name, weight in zip(group["param_names"], group["params"], strict=True)
        if any("basis" in key for key in optimizer.state[weight])
    }


def test_of_plain_parameters_the_matrices_larger_than_the_rank_are_projected():
    weights = parameters([(12, 8), (8, 12), (4, 12), (3, 12), (9,), (2, 5, 6), ()])
    optimizer = GaLoreAdamW(named(weights), rank=3)
    train(weights, optimizer, [0])
    assert projected_names(optimizer) == {"weight0", "weight1", "weight2"}


def test_where_a_group_names_a_rank_the_others_are_adamws_as_in_galore_torch():
    weights = named(parameters([(12, 8)] * 4))
    groups = [
        {"params": weights[:1]},
        {"params": weights[1:2], "rank": 2},
        {"params": weights[2:3], "rank": 4, "proj_type": "left", "scale": 1.0},
        {"params": weights[3:], "rank": None},
    ]
    optimizer = GaLoreAdamW(groups, rank=3)
    train([weight for _, weight in weights], optimizer, [0])
    assert projected_names(optimizer) == {"weight1", "weight2"}
    ranks = [optimizer.state[w].get("basis_left", torch.empty(0)).shape for _, w in weights]
    assert ranks == [(0,), (0,), (12, 4), (0,)]


def gpt2(**options):
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return PretrainModule(config, **options)


def fit(module, batch, steps):
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch] * steps, batch_size=None))
    return trainer.optimizers[0]


def text_batch(vocabulary):
    tokens = torch.randint(vocabulary, (4, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "labels": tokens}


def test_in_gpt2_its_conv1d_matrices_are_projected_and_nothing_else():
    module = gpt2(optimizer=partial(GaLoreAdamW, lr=0.01, rank=4, update_proj_gap=3))
    before = module.model(**text_batch(50)).loss.item()
    optimizer = fit(module, text_batch(50), 30)
    blocks = [f"model.transformer.h.{number}" for number in range(2)]
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = {f"{block}.{layer}.weight" for block in blocks for layer in layers}
    assert projected_names(optimizer) == expected
    fused = module.get_parameter("model.transformer.h.0.attn.c_attn.weight")  # (in, out): (8, 24)
    assert optimizer.state[fused]["basis_left"].shape == (8, 4)
    assert module.model(**text_batch(50)).loss.item() < 0.8 * before


def test_in_a_hand_written_module_plain_parameters_do():
    module = HandWritten(partial(GaLoreAdamW, lr=0.03, rank=4, update_proj_gap=3), dropout=0.0)
    before = module.loss(text_batch(VOCABULARY)).item()
    optimizer = fit(module, text_batch(VOCABULARY), 30)
    names = {id(weight): name for name, weight in module.named_parameters()}
    projected = {
        names[id(weight)]
        for weight, state in optimizer.state.items()
        if "step" in state and len(state) > 3
    }
    assert projected == {"embedding.weight", "body.0.weight", "head.weight"}
    assert module.loss(text_batch(VOCABULARY)).item() < 0.8 * before


def test_in_a_hand_written_module_groups_can_be_built():
    module = HandWritten(dropout=0.0)
    optimizer = GaLoreAdamW(build_param_groups(module), rank=4)
    module.loss(text_batch(VOCABULARY)).backward()
    optimizer.step()
    assert projected_names(optimizer) == {"body.0.weight"}


# Bad input


def made(*shapes, dtype=torch.float32, **options):
    return GaLoreAdamW(named(parameters(shapes or SHAPES, dtype)), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank=0\): must be an integer of at least 1"),
        ({"update_proj_gap": 0}, r"update_proj_gap=0\): must be an integer of at least 1"),
        ({"scale": 0.0}, r"scale=0.0\): must be a number above 0"),
        (
            {"proj_type": "diag"},
            r"proj_type='diag'\): must be one of 'std', 'reverse_std', 'left', 'right', 'full'",
        ),
        (
            {"projection": "qr"},
            r"projection='qr'\): must be one of 'subspace', 'eigh', 'randomized', 'svd', 'random'",
        ),
        ({"on_rank_change": "ignore"}, r"on_rank_change='ignore'\): must be 'raise' or 'rep"),
        ({"on_nonfinite": "ignore"}, r"on_nonfinite='ignore'\): must be 'skip' or 'raise'"),
        ({"seed": -1}, r"seed=-1\): must be an integer of at least 0"),
        ({"lr": math.nan}, r"lr=nan\): must be"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)\): must be"),
        ({"eps": -1e-8}, r"eps=-1e-08\): must be"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1\): must be"),
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_named(options, message):
    rank = {} if "rank" in options else {"rank": 3}
    with pytest.raises(ValueError, match=r"GaLoreAdamW\(" + message):
        made(**options, **rank)
    if not {"on_rank_change", "on_nonfinite", "seed"} & {*options}:  # they are of all groups
        with pytest.raises(ValueError, match=r"GaLoreAdamW\(" + message):
            GaLoreAdamW([{"params": named(parameters([(12, 8)])), **rank, **options}])


@pytest.mark.parametrize("told", [{"rank": 3}, {"use_muon": True}])
def test_what_is_no_matrix_in_a_group_with_a_rank_is_named(told):
    weights = named(parameters())
    with pytest.raises(ValueError, match=r"params=\"?'weight3'\"?\): has 1 dimensions.*rank=None"):
        GaLoreAdamW([{"params": weights, **told}])


def test_a_rank_above_the_shorter_side_is_cut_and_warned_of():
    weights = parameters([(12, 8), (4, 12)])
    with pytest.warns(UserWarning, match=r"rank=6\): more than the shorter side of 'weight1'"):
        optimizer = GaLoreAdamW([{"params": named(weights), "rank": 6}])
    train(weights, optimizer, range(3))
    assert [basis_of(optimizer, weight).rank for weight in weights] == [6, 4]


def test_a_rank_that_no_matrix_reaches_is_warned_of():
    with pytest.warns(UserWarning, match=r"rank=128\): no parameter is projected"):
        made()


def test_a_parameter_that_comes_twice_is_named():
    (weight,) = parameters([(12, 8)])
    with pytest.raises(ValueError, match=r"params=\"?'b'\"?\): must be given once"):
        GaLoreAdamW([("a", weight), ("b", weight)], rank=3)
    groups = [{"params": [("a", weight)], "rank": 3}, {"params": [("b", weight)], "rank": None}]
    with pytest.raises(ValueError, match=r"params=\"?'b'\"?\): must be in one group"):
        GaLoreAdamW(groups)


def test_a_group_that_is_refused_is_not_added():
    optimizer = made(rank=3)
    with pytest.raises(ValueError, match="has 1 dimensions"):
        optimizer.add_param_group({"params": [("bias", nn.Parameter(torch.zeros(3)))], "rank": 2})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_named():
    with pytest.raises(ValueError, match=r"params=\"?'weight0'\"?\).*complex64"):
        made((12, 8), dtype=torch.complex64, rank=3)


def test_a_sparse_gradient_is_named():
    (weight,) = parameters([(12, 8)])
    optimizer = GaLoreAdamW([("embedding", weight)], rank=3)
    weight.grad = torch.eye(12, 8).to_sparse()
    with pytest.raises(ValueError, match=r"'embedding'.*sparse"):
        optimizer.step()


def test_what_is_no_parameter_is_answered_by_torch():
    with pytest.raises(TypeError):
        GaLoreAdamW(torch.zeros(3, 3))
    with pytest.raises(TypeError):
        GaLoreAdamW([{"params": {nn.Parameter(torch.zeros(3, 3))}}])
    with pytest.raises(TypeError):
        GaLoreAdamW([{"params": ["weight"]}])
    with pytest.raises(ValueError, match="empty"):
        GaLoreAdamW([])
