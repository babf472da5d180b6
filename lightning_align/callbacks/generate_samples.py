"""Read what the model writes while it learns: a few prompts continued every so many steps."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least
from lightning_align.data.tokenizer import encode, load_tokenizer, pad_token_id
from lightning_align.layers.find import find_held_model
from lightning_align.layers.surgery import evaluating
from lightning_align.models.sampling import continue_prompts
from lightning_align.reports.texts import log_rows
from lightning_align.run.protocols import (
    all_ranks_run_model,
    one_rank_runs_model,
    tokenizer_of,
)
from lightning_align.run.rng import reseed


@declared
class GenerateSamples(Callback):
    """Continue prompts during training and send the texts to the loggers.

    Rank zero generates, every ``every_n_train_steps`` optimizer steps and when training ends. A
    logger with ``log_table`` (W&B) or ``experiment.add_text`` (TensorBoard) gets step, prompt and
    text; without such a logger they are appended to ``samples.jsonl`` in
    ``trainer.default_root_dir``. Training is the same to the last bit: weights, modes and random
    states are as they were. It costs the time of ``len(prompts) * max_new_tokens`` forward passes.
    Where ranks hold parts of the model all of them generate the same, and rank zero writes.

    Args:
        prompts: Texts to continue.
        every_n_train_steps: Number of optimizer steps between samples.
        max_new_tokens: Tokens to generate for each prompt, at most.
        do_sample: Whether to draw tokens; otherwise the likeliest is taken.
        temperature: Divisor of the logits when drawing.
        top_p: Probability mass of the likeliest tokens that are drawn from.
        tokenizer: A folder, hub name or transformers tokenizer; default the datamodule's.
        seed: Seed of the draws, which differ from step to step.
        at_start: Whether to generate before the first step of a new run, too.

    Raises:
        ValueError: If a value is out of its range; at ``setup``, if there is no tokenizer, the
            module holds no model with ``generate``, a prompt does not fit, or neither rank zero
            can run the model nor all ranks together.

    Example:
        >>> callback = GenerateSamples(["It is a truth"], every_n_train_steps=500)

    Note: for a module without a Hugging Face model override ``generate``. While rank zero
    generates, the other ranks wait; or take part, and then an error ends the run.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        every_n_train_steps: int = 1000,
        max_new_tokens: int = 64,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_p: float = 1.0,
        tokenizer: str | Any | None = None,
        seed: int = 0,
        at_start: bool = True,
    ) -> None:
        if isinstance(prompts, str) or not prompts or not all(prompts):
            rule = "must be a list of texts, none of them empty"
            way_out = "A prompt that means nothing is the tokenizer's end-of-text token"
            raise argument_error("GenerateSamples", "prompts", prompts, rule, way_out)
        check_least("GenerateSamples", 1, every_n_train_steps=every_n_train_steps)
        check_least("GenerateSamples", 1, max_new_tokens=max_new_tokens)
        check_least("GenerateSamples", 0, seed=seed)
        if not temperature > 0:
            rule, way_out = "must be above 0", "For the likeliest tokens set do_sample=False"
            raise argument_error("GenerateSamples", "temperature", temperature, rule, way_out)
        if not 0 < top_p <= 1:
            raise argument_error("GenerateSamples", "top_p", top_p, "must be in (0, 1]")
        for argument, number in {"temperature": temperature, "top_p": top_p}.items():
            if not do_sample and number != 1:
                rule = "only changes draws, and do_sample is False"
                raise argument_error("GenerateSamples", argument, number, rule, "Leave it out")
        self.prompts = list(prompts)
        self.every_n_train_steps = every_n_train_steps
        self.max_new_tokens = max_new_tokens
        self.options = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p}
        self.tokenizer = tokenizer
        self.seed = seed
        self.at_start = at_start
        self._tokenizer: Any = None
        self._last_step = 0
        self._together = False  # whether all ranks generate, as they hold parts of the model

    def generate(self, pl_module: LightningModule, prompt: str) -> str:
        """The text with which the model continues ``prompt``; override it for a model of your own.

        Called on rank zero in eval mode, without gradients and with seeded generators. Where ranks
        hold parts of the model, on all of them: each must call it equally often.
        """
        ids = encode(self._tokenizer, [prompt], add_special_tokens=True)[0]
        rows = continue_prompts(
            _find_model(pl_module),
            [ids],
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=pad_token_id(self._tokenizer),
            together=self._together,
            top_k=0,  # transformers would keep the 50 likeliest
            **self.options,
        )
        written = rows["input_ids"][0, len(ids) :]
        return str(self._tokenizer.decode(written, skip_special_tokens=True))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        self._together = all_ranks_run_model(strategy)
        if not self._together and not one_rank_runs_model(strategy):
            rule = f"under {type(strategy).__name__} rank zero may not hold the whole model"
            way_out = "Use one device or DDP, or generate from a checkpoint"
            raise argument_error("GenerateSamples", "prompts", self.prompts, rule, way_out)
        source = self.tokenizer if self.tokenizer is not None else tokenizer_of(trainer)
        self._tokenizer = load_tokenizer("GenerateSamples", source) if source is not None else None
        if type(self).generate is GenerateSamples.generate:  # an override has needs of its own
            self._check(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        if self.at_start and trainer.global_step == 0:
            self._sample(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not "== 0": with several optimizers the global step may jump over a multiple.
        every = self.every_n_train_steps
        if trainer.global_step // every > self._last_step // every:
            self._sample(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._last_step:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self._last_step = trainer.global_step
        if not self._together and not trainer.is_global_zero:
            return
        rows: list[dict[str, Any]] = []
        on_cuda = pl_module.device.type == "cuda"
        with isolate_rng(include_cuda=on_cuda), evaluating(pl_module), torch.no_grad():
            for i, prompt in enumerate(self.prompts):
                reseed(self.seed, step, i, "generate")
                try:
                    with trainer.precision_plugin.forward_context():
                        text = self.generate(pl_module, prompt)
                except RuntimeError as error:  # NaN weights, no memory left: the run's own business
                    if self._together:  # whoever goes on may leave the others in mid-model
                        raise
                    rank_zero_warn(f"GenerateSamples: no sample at step {step}: {error}")
                    break
                rows.append({"step": step, "prompt": prompt, "text": text})
        if rows and trainer.is_global_zero:
            log_rows(trainer, "samples", rows, filename="samples.jsonl")

    def _check(self, pl_module: LightningModule) -> None:
        """Refuse before training what could not be generated during it.

        Raises:
            ValueError: If tokenizer or model are missing, or a prompt does not fit them.
        """
        where = "GenerateSamples"
        if self._tokenizer is None:
            rule = "the datamodule has no tokenizer"
            way_out = "Pass a folder, a hub name or a transformers tokenizer"
            raise argument_error(where, "tokenizer", None, rule, way_out)
        model = _find_model(pl_module)
        config: Any = getattr(model, "config", None)
        positions = getattr(config, "max_position_embeddings", None)
        vocab_size = getattr(config, "vocab_size", None)
        for prompt in self.prompts:
            ids = encode(self._tokenizer, [prompt], add_special_tokens=True)[0]
            if positions is not None and len(ids) + self.max_new_tokens > positions:
                rule = (
                    f"has {len(ids)} tokens, and with max_new_tokens={self.max_new_tokens} that is"
                    f" more than the model's {positions} positions"
                )
                raise argument_error(where, "prompts", prompt, rule, "Shorten one of them")
            if vocab_size is not None and max(ids) >= vocab_size:
                rule = f"has token {max(ids)}, and the model's vocabulary ends at {vocab_size - 1}"
                way_out = "Pass the tokenizer that the model is trained with"
                raise argument_error(where, "prompts", prompt, rule, way_out)


def _find_model(pl_module: LightningModule) -> nn.Module:
    """The Hugging Face model that a module holds.

    Raises:
        ValueError: If there is none.
    """
    way_out = "Use a Hugging Face model, or override generate(pl_module, prompt) in a subclass"
    return find_held_model(pl_module, "generate", where="GenerateSamples", way_out=way_out)[1]
