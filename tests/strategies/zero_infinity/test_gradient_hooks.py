"""Code of a user that looks at gradients, or decides what becomes of them, sees all of them."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import StableAdamW
from lightning_align.modules import PretrainModule
from tests.helpers.covers import cover
from tests.helpers.offloaded import ADAMW, Regression, compare, fit, points, small, text
from tests.helpers.tiny_models import TINY_MODELS
from tests.strategies.zero_infinity.test_ranks import compare as compare_ranks

SLOW = pytest.mark.slow


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


class Looks(Regression):
    """Notes all gradients wherever Lightning says that they can be inspected."""

    def __init__(self, build=ADAMW):
        super().__init__(build)
        self.seen = []

    def on_after_backward(self):
        self.seen.append(("after backward", gradients(self)))

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.seen.append(("before step", gradients(self)))

    def on_before_zero_grad(self, optimizer):
        self.seen.append(("before zero", gradients(self)))

    def on_train_batch_end(self, *_):
        self.seen.append(("end", gradients(self)))


class Clips(Regression):
    def on_before_optimizer_step(self, optimizer):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.05)


class ClipsByLightning(Regression):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, *_, **__):
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


class Replaces(Regression):
    def on_after_backward(self):
        for parameter in self.parameters():
            parameter.grad = parameter.grad.sign()


class LooksInStep(Regression):
    """Calls the closure itself, and steps with every other batch only."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        if sum(p.grad.norm() for p in self.parameters()) > 0 and batch_idx % 2:
            optimizer.step()


class NeverEmpties(Regression):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 3 == 0:
            optimizer.zero_grad(set_to_none=False)


class BackwardTwice(Regression):
    def backward(self, loss):
        loss.backward(retain_graph=True)
        loss.backward()


KINDS = [Clips, ClipsByLightning, Replaces, LooksInStep, NeverEmpties, BackwardTwice]


@cover(kind=KINDS, window=[2, 1])
def test_a_module_that_handles_gradients_trains_as_in_memory(tmp_path, kind, window):
    data = points()
    compare(tmp_path, lambda: kind(ADAMW), data, accumulate_grad_batches=window)


@cover(
    build={"adamw": ADAMW, "stable": partial(StableAdamW, lr=1e-2)},
    options={"plain": {}, "clipped": {"gradient_clip_val": 0.05}},
)
def test_hooks_see_what_they_see_in_memory(tmp_path, build, options):
    data = points()
    modules = []

    def module():
        modules.append(Looks(build))
        return modules[-1]

    compare(tmp_path, module, data, accumulate_grad_batches=2, **options)
    theirs, ours = (module.seen for module in modules)
    assert [hook for hook, _ in ours] == [hook for hook, _ in theirs]
    assert len({hook for hook, _ in ours}) == 4
    for (_, found), (_, expected) in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class Weaken(pl.Callback):
    """A user's own, which looks at gradients before our module has divided them."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms = [float(p.grad.norm()) for p in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.grad /= 3


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_callback_that_edits_sums_over_tokens_does_what_it_does_in_memory(tmp_path, clip):
    data = text()
    weaken = Weaken()
    norms = []

    def module():
        norms.append(getattr(weaken, "norms", None))
        return PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": clip}
    compare(tmp_path, module, data, callbacks=[weaken], **options)
    assert weaken.norms == norms[1]


def test_what_it_costs_is_told_and_counted(tmp_path):
    data = points()
    with pytest.warns(UserWarning, match=r"stay in memory .* as Looks\.on_after_backward, Looks"):
        fit(tmp_path, Looks(), data, small()).strategy.close()
    with pytest.raises(ValueError, match=r"memory_limit='60KB'.*bytes of gradients, for the hooks"):
        fit(tmp_path, Looks(), data, small(memory_limit="60KB", overwrite=True))
    with pytest.raises(ValueError, match=r"update_in_backward=True\).*looks at all gradients"):
        fit(tmp_path, Looks(), data, small(update_in_backward=True, overwrite=True))


@pytest.mark.parametrize(
    "kind", [Clips, pytest.param(ClipsByLightning, marks=SLOW), pytest.param(Replaces, marks=SLOW)]
)
@pytest.mark.parametrize("window", [pytest.param(1, marks=SLOW), 2])
def test_two_ranks_that_handle_gradients_train_as_under_ddp(tmp_path, kind, window):
    options = {"accumulate_grad_batches": window}
    compare_ranks(tmp_path, lambda: kind(ADAMW), partial(points, 4), **options)


class Notes(Looks):
    """Shows in its loss what hooks have seen, so that ranks can be compared by it."""

    def training_step(self, batch, batch_idx):
        sums = [value.sum() for _, found in self.seen for value in found.values()]
        self.log("seen", torch.stack(sums).sum() if sums else torch.zeros(()))
        return super().training_step(batch, batch_idx)


def test_hooks_of_two_ranks_see_what_ddp_shows(tmp_path):
    options = {"accumulate_grad_batches": 2}
    compare_ranks(tmp_path, Notes, partial(points, 4), **options)
