"""Next-token prediction: pretraining, and supervised fine-tuning by masking labels."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.layers.sharding import is_sharded
from lightning_align.losses import linear_cross_entropy
from lightning_align.models.adapter_config import plain_config
from lightning_align.modules.causal_lm import CausalLMModule, with_whole_weights
from lightning_align.modules.continued import save_plain_hyperparameters
from lightning_align.modules.window import Sums, perplexity
from lightning_align.run.protocols import separates_documents
from lightning_align.run.replicas import is_spread


@declared
class PretrainModule(CausalLMModule):
    """Next-token loss on packed text; with masked labels (-100) it is supervised fine-tuning.

    A batch is ``input_ids`` and ``labels`` of shape (B, T + 1), labels aligned with the inputs as
    in Hugging Face (the module shifts), and optionally ``attention_mask`` or ``position_ids``. The
    head and the cross-entropy run in chunks: no (B, T, V) tensor is ever built. The gradient is the
    mean over all target tokens of the accumulation window on all ranks, however unequally they are
    spread over its batches.

    Logs ``train_loss`` (nats per token, without the regularisers), ``train_perplexity``,
    ``val_loss``, ``val_perplexity``, ``tokens_seen``, ``tokens_per_second``, ``grad_norm`` (before
    clipping) and ``lr``.

    Args:
        model: A module, a Hugging Face name or folder, or a transformers configuration for random
            weights.
        optimizer: Builds the optimizer from named parameter groups, or its name; default
            AdamW(lr=3e-4, betas=(0.9, 0.95)).
        lr_scheduler: Builds a scheduler from the optimizer; it steps after every optimizer step,
            ReduceLROnPlateau after every epoch, by ``val_loss`` or what it monitors.
        z_loss: Weight of the squared log-partition, 1e-4 in PaLM (arXiv:2204.02311, section 5).
        label_smoothing: Probability mass spread evenly over the vocabulary, from 0 up to but below
            1.
        chunk_size: Rows of logits computed at a time; None picks about 24 MB worth on a CPU.
        activation_checkpointing: Whether blocks recompute their activations in backward.
        dtype: Data type of the parameters when the model is loaded or built here.
        attn_implementation: Attention kernel by transformers' name; None leaves the choice to
            transformers.
        revision: Branch, tag or commit when the model is a hub name.
        trust_remote_code: Whether code that comes with the model may run.
        peft_config: Adapters of PEFT that alone train, such as peft.LoraConfig(r=16), or in YAML
            its class_path and init_args; None trains the model itself.

    Raises:
        ValueError: If a value is out of its range, or the model cannot be loaded or read, or cannot
            have such adapters.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=2)
        >>> module = PretrainModule(config)
    """

    def __init__(
        self,
        model: nn.Module | str | PretrainedConfig,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        chunk_size: int | None = None,
        activation_checkpointing: bool = False,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        peft_config: dict[str, Any] | Any | None = None,
    ) -> None:
        if z_loss < 0:
            raise argument_error("PretrainModule", "z_loss", z_loss, "must not be negative")
        if not 0 <= label_smoothing < 1:
            rule = "must lie in [0, 1)"
            raise argument_error("PretrainModule", "label_smoothing", label_smoothing, rule)
        peft_config = plain_config(peft_config, "PretrainModule")
        super().__init__(
            model,
            optimizer,
            lr_scheduler,
            activation_checkpointing,
            chunk_size,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
            peft_config=peft_config,
        )
        save_plain_hyperparameters(self, model=model)
        self.z_loss = z_loss
        self.label_smoothing = label_smoothing

    @property
    @override
    def batch_keys(self) -> tuple[str, ...]:
        return ("input_ids", "labels")

    @property
    @override
    def batch_source(self) -> str:
        return "Give it TextDataModule or ConversationDataModule, or batches like theirs"

    @override
    def model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        names = ("input_ids", "position_ids", "attention_mask")
        return {name: batch[name][:, :-1] for name in names if name in batch}

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        runs = not is_spread(self) and not is_sharded(self.model)
        if separates_documents(self.trainer) and runs:
            self.layers.probe_documents()

    @override
    def loss_from_hidden(self, hidden_BTD: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Sums]:
        loss, nll, count = linear_cross_entropy(
            hidden_BTD,
            self.layers.head,
            batch["labels"][:, 1:],
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            chunk_size=self.chunk_size,
        )
        sums = {"loss": (nll, count), "tokens": (count, torch.ones_like(count))}
        if self.z_loss or self.label_smoothing:
            sums["objective"] = (loss, count)
        return loss, sums

    @override
    def derived_metrics(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"perplexity": perplexity(means["loss"])}

    @override
    @with_whole_weights
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood (nats per token) of each row, (B,)."""
        batch = self.prepared(batch)
        hidden_BTD = self.forward_hidden(**self.model_inputs(batch))
        rows = zip(hidden_BTD, batch["labels"][:, 1:], strict=True)
        results = [linear_cross_entropy(hidden, self.layers.head, y) for hidden, y in rows]
        return torch.stack([nll / count.clamp(min=1) for _, nll, count in results])
