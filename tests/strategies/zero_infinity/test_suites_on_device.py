"""Tests of training in host memory once more, with a CPU that stands in for a device."""

import pytest

from tests.helpers.stand_in_device import stand_in_device
from tests.modules import test_precomputed_on_ranks as precomputed
from tests.strategies.zero_infinity import test_checkpoints as checkpoints
from tests.strategies.zero_infinity import test_devices as devices
from tests.strategies.zero_infinity import test_going_back_on_ranks as back_on_ranks
from tests.strategies.zero_infinity import test_gradient_hooks as hooks
from tests.strategies.zero_infinity import test_precision as precision
from tests.strategies.zero_infinity import test_ranks as ranks
from tests.strategies.zero_infinity import test_reference as reference
from tests.strategies.zero_infinity import test_strategy as strategy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*has not been run yet")]


@pytest.fixture(autouse=True)
def copies(monkeypatch):
    with stand_in_device(monkeypatch):
        yield


pairs = precomputed.pairs
test_cached_references = precomputed.test_one_rank_asks_its_blocks_alone
test_blocks_let_go = precomputed.test_blocks_of_a_reference_that_is_released_take_no_memory
test_places = devices.test_wherever_it_lies_it_trains_as_in_memory
test_bf16_true = devices.test_bf16_true_has_its_masters_wherever_state_lies
test_validation_first_and_fit_twice = devices.test_validation_comes_first_and_fit_twice
test_hooks_on_gradients = hooks.test_hooks_see_what_they_see_in_memory
test_bf16 = precision.test_a_module_written_by_hand_trains_as_in_memory
test_references = reference.test_wherever_it_lies_training_is_that_of_memory
test_optimizers = strategy.test_each_optimizer_steps_as_in_memory
test_lisa = strategy.test_lisa_trains_as_in_memory
test_checkpoints = checkpoints.test_checkpoints_are_read_by_either_side
test_going_back = checkpoints.test_a_run_goes_back_in_mid_fit_as_in_memory
test_going_back_on_two_ranks = back_on_ranks.test_a_state_is_taken_and_gone_back_to
test_edits = checkpoints.test_edits_are_stored
test_two_ranks = ranks.test_a_module_written_by_hand_trains_as_under_ddp
test_clipping_on_two_ranks = ranks.test_clipping_is_that_of_ddp
