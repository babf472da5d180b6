"""LISA over all models and optimizers, killed and resumed, and from the command line."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_align import LISA
from lightning_align.cli.app import AlignCLI
from tests.helpers.lisa import (
    BLOCKS,
    MODELS,
    OPTIMIZERS,
    SaveAt,
    build,
    check_frozen_part,
    check_moves,
    check_replay,
    check_two_ranks,
    names_of_blocks,
    train,
    watched,
)
from tests.laws.members import CALLBACKS, STRATEGIES, VOCABULARY, Member, spec
from tests.laws.members import OPTIMIZERS as LAWFUL_OPTIMIZERS
from tests.laws.runs import Outcome, Run, on_its_data
from tests.laws.test_resume import resumes
from tests.laws.test_strategies import equals_one_process
from tests.modules.test_pretrain import weights

pytestmark = pytest.mark.slow  # `make test-laws` runs them


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_active_block_moves_and_every_frozen_one_is_bit_equal(
    name: str, accumulate: int
) -> None:
    check_moves(name, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("state", ["keep", "drop"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_match_a_replay_of_lmflow_bit_for_bit(
    name: str, state: str, accumulate: int
) -> None:
    check_replay(name, state, accumulate)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["train_embeddings", "train_head"])
def test_embedding_and_head_can_be_frozen(part: str, name: str) -> None:
    check_frozen_part(part, name)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "hand-written"])
def test_two_ranks_equal_one_process_and_send_the_gradients_of_active_blocks_only(
    name: str, accumulate: int, tmp_path: Path
) -> None:
    check_two_ranks(name, accumulate, tmp_path)


# The hand-written module of the laws has no list of blocks, and is refused.
LAYERED = Member(
    "hand-written, with blocks",
    spec("tests.helpers.lisa.Layered", vocabulary=VOCABULARY),
    sums=False,
)
(MEMBER,) = [member for member in CALLBACKS if member.name == "LISA"]


@pytest.mark.parametrize("optimizer", LAWFUL_OPTIMIZERS, ids=str)
def test_a_hand_written_module_resumes_after_a_kill(
    optimizer: Member, tmp_path: Path, material: Path, reference: Callable[[Run], Outcome]
) -> None:
    run = replace(on_its_data(LAYERED), callbacks=(MEMBER,), optimizer=optimizer, accumulate=2)
    resumes(run, tmp_path, material, reference(run), position=5)


def test_a_hand_written_module_on_two_ranks_equals_one_process(
    tmp_path: Path, material: Path, reference: Callable[[Run], Outcome]
) -> None:
    (ddp,) = [strategy for strategy in STRATEGIES if strategy.name == "ddp"]
    run = replace(on_its_data(LAYERED), callbacks=(MEMBER,))
    equals_one_process(run, ddp, tmp_path, material, reference)


@pytest.mark.parametrize("state", ["keep", "drop"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_a_frozen_block(optimizer: str, state: str) -> None:
    module = build("gpt2", OPTIMIZERS[optimizer])
    callback = LISA(2, interval_steps=2, optimizer_state=state, reactivation_warmup_steps=1)
    watch = watched(module, callback)
    names = names_of_blocks(module)
    for batch, (before, after) in enumerate(pairwise(watch.weights)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        for block in range(BLOCKS):
            assert bool(moved & names[block]) is (block in watch.active[batch])
    if state == "drop":
        last = set(watch.active[-1])
        assert all(
            bool(names[block] & watch.states[-1]) is (block in last) for block in range(BLOCKS)
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumes_in_mid_interval_with_any_optimizer(optimizer: str, tmp_path: Path) -> None:
    whole, second = (build("gpt2", OPTIMIZERS[optimizer]) for _ in range(2))
    arguments: dict[str, Any] = {"interval_steps": 3, "reactivation_warmup_steps": 2}
    saved = tmp_path / "four.ckpt"
    train(whole, LISA(2, **arguments), SaveAt(3, saved), max_steps=9)
    state = torch.load(saved, weights_only=True)["optimizer_states"][0]["state"]
    assert 0 < len(state) < len(list(whole.parameters()))
    resumed = LISA(2, **arguments)
    train(second, resumed, ckpt_path=saved, max_steps=9)
    assert torch.equal(weights(second), weights(whole))
    assert [step for step, _ in resumed.history] == [0, 3, 6]


@pytest.mark.parametrize("train_embeddings", [True, False])
def test_activation_checkpointing_gives_the_same_bits(train_embeddings: bool) -> None:
    def options() -> dict[str, Any]:
        return {"train_embeddings": train_embeddings, "interval_steps": 2}

    plain = build("llama")
    recomputed = build("llama", activation_checkpointing=True)
    train(plain, LISA(2, **options()))
    train(recomputed, LISA(2, **options()))
    assert torch.equal(weights(plain), weights(recomputed))


YAML = """
seed_everything: 1
model:
  class_path: PretrainModule
  init_args:
    model:
      class_path: transformers.GPT2Config
      init_args: {vocab_size: 300, n_positions: 32, n_embd: 16, n_layer: 4, n_head: 2}
data:
  class_path: TextDataModule
  init_args: {vocab_size: 300, block_size: 16, batch_size: 4, cache_dir: CACHE}
trainer:
  max_steps: 6
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  default_root_dir: FOLDER
  callbacks:
    - class_path: LISA
      init_args: {activated_layers: 2, interval_steps: 2, sampling: SAMPLING}
"""


@pytest.mark.parametrize("sampling", ["weight_norm", "[1, 1, 2, 0.5]"])
def test_command_line_trains_with_it(sampling: str, tmp_path: Path) -> None:
    text = YAML.replace("CACHE", str(tmp_path / "cache")).replace("FOLDER", str(tmp_path))
    (tmp_path / "lisa.yaml").write_text(text.replace("SAMPLING", sampling))
    cli = AlignCLI(args=["fit", "-c", str(tmp_path / "lisa.yaml")])
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, LISA)]  # type: ignore[attr-defined]
    assert [step for step, _ in callback.history] == [0, 2, 4]
    assert isinstance(callback.sampling, list) is sampling.startswith("[")
    assert (tmp_path / "lisa.png").exists()


def test_warmup_changes_the_first_steps_of_any_optimizer_and_no_other_block() -> None:
    plain, warm = build("gpt2", OPTIMIZERS["Muon"]), build("gpt2", OPTIMIZERS["Muon"])
    first = watched(plain, LISA(2, 4))
    second = watched(warm, LISA(2, 4, reactivation_warmup_steps=3))
    assert all(torch.equal(first.weights[4][n], second.weights[4][n]) for n in first.weights[4])
    different = {
        name
        for name in first.weights[5]
        if not torch.equal(first.weights[5][name], second.weights[5][name])
    }
    names = names_of_blocks(warm)
    came_back = set(second.active[4]) - set(second.active[3])
    assert came_back
    assert different <= set().union(*(names[block] for block in came_back))
    assert all(different & names[block] for block in came_back)
