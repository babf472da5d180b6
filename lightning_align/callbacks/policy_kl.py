"""KL of policy and reference on the policy's own completions of prompts, in the middle of a run."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import GenerationConfig

from lightning_align._errors import argument_error
from lightning_align.data.tokenizer import pad_token_id
from lightning_align.layers.find import find_held_model
from lightning_align.layers.sharding import as_forward
from lightning_align.layers.surgery import evaluating, replaced
from lightning_align.losses import KLEstimate, kl_from_sums, kl_sums
from lightning_align.losses.sampled_kl import NUM_SUMS
from lightning_align.losses.sequence_logps import model_completion_logps
from lightning_align.models.sampling import continue_prompts
from lightning_align.run.protocols import AsksReference, all_ranks_run_model
from lightning_align.run.replicas import of_every_rank
from lightning_align.run.rng import reseed, undrawn

BATCH_SIZE = 16  # prompts continued at a time; which stand together decides the draws
WHERE = "PreferenceDiagnostics"


def sampled_policy(pl_module: pl.LightningModule) -> nn.Module:
    """The model of a module that generates, and has a reference to be compared with.

    Raises:
        ValueError: If there is none, or the reference cannot be asked.
    """
    asked, name = "kl_every_n_train_steps", type(pl_module).__name__
    rule: str | None = "it does not say what its reference is"
    if isinstance(pl_module, AsksReference):
        rule = pl_module.reference_refusal
    if rule is not None:
        way_out = f"Leave {asked} out, or train with a reference that stays at hand"
        raise argument_error(WHERE, "pl_module", name, rule, way_out)
    way_out = f"Use a model of transformers, or leave {asked} out"
    return find_held_model(pl_module, "generate", where=WHERE, way_out=way_out)[1]


def prompts_that_fit(
    prompts: Sequence[Sequence[int]], model: nn.Module, num_prompts: int, max_new_tokens: int
) -> list[Sequence[int]]:
    """So many of the prompts, evenly out of all that leave room for a completion.

    Raises:
        ValueError: If there are fewer than two.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    fitting = [p for p in prompts if positions is None or len(p) + max_new_tokens <= positions]
    if len(fitting) < 2:
        rule = f"needs two held-out prompts or more, and of {len(prompts)} there are {len(fitting)}"
        rule += f" that leave room for {max_new_tokens} tokens"
        way_out = "Set val_fraction or val_paths of PreferenceDataModule, or pass kl_prompts"
        raise argument_error(WHERE, "kl_every_n_train_steps", "...", rule, way_out)
    count = min(num_prompts, len(fitting))
    return [fitting[i * len(fitting) // count] for i in range(count)]


def estimate_policy_kl(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
) -> KLEstimate | None:
    """The estimate at this step, over all ranks, which share the prompts; None if one failed.

    Collective. Draws follow from seed, step and prompt, however many ranks there are. Generators,
    modes and gradients are as they were. Ranks that hold parts of the model continue all prompts,
    each the same ones, and an error is raised.
    """
    sums, problem = torch.zeros(NUM_SUMS, dtype=torch.float64), None
    together = all_ranks_run_model(trainer.strategy)
    first, ranks = (0, 1) if together else (trainer.global_rank, trainer.world_size)
    mine = range(first, -(-len(prompts) // BATCH_SIZE), ranks)
    with undrawn(pl_module.device), evaluating(pl_module), torch.no_grad():
        for number in mine:
            reseed(seed, trainer.global_step, number, "policy_kl")
            batch = prompts[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
            try:  # the others wait for this rank: it tells them instead of raising
                with trainer.precision_plugin.forward_context():
                    given = pl_module, tokenizer, batch, max_new_tokens
                    sums += _sums_of(*given, together=together)
            except RuntimeError as error:  # NaN weights, no memory left: the run's own business
                if together:  # whoever goes on may leave the others in mid-model
                    raise
                problem = str(error)
                break
    everyone = of_every_rank(trainer, (sums, problem))
    problems = [told for _, told in everyone if told]
    if problems:
        rank_zero_warn(f"{WHERE}: no KL at step {trainer.global_step}: {problems[0]}")
        return None
    parts = everyone[:1] if together else everyone
    return kl_from_sums(torch.stack([each for each, _ in parts]).sum(0))


def _sums_of(
    pl_module: pl.LightningModule,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    together: bool,
) -> Tensor:
    assert isinstance(pl_module, AsksReference)
    policy = sampled_policy(pl_module)
    # What a folder says of penalties and temperatures would be sampled from, and is not the policy.
    plain = GenerationConfig()  # type: ignore[no-untyped-call]
    with replaced(policy, "generation_config", plain):
        rows = continue_prompts(
            policy,
            prompts,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_token_id(tokenizer),
            together=together,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
    tensors = [rows[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    sampled = as_forward(policy, partial(model_completion_logps, policy, *tensors))
    with pl_module.as_reference() as reference:
        frozen = as_forward(reference, partial(model_completion_logps, reference, *tensors))
    logps = sampled.token_logps_BT.cpu(), frozen.token_logps_BT.cpu()
    return kl_sums(*logps, tensors[2][:, 1:].cpu())
