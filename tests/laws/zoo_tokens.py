"""Members of the zoo that read tokens, by models of Hugging Face and of one's own."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from tests.laws.zoo import BATCH_SIZE, ROWS

VOCABULARY, WIDTH, LENGTH = 31, 8, 7


class Tokens(list[dict[str, Tensor]]):
    """Sequences with labels, of which some do not count."""

    def __init__(self, count: int, masked: bool) -> None:
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
        labels = ids.clone()
        if masked:
            labels[torch.rand(count, LENGTH, generator=generator) < 0.4] = -100
        super().__init__({"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True))


class Block(nn.Module):
    """A residual layer that looks at earlier positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        before = self.norm(hidden).cumsum(1) / hidden.shape[1]
        return hidden + scale * torch.tanh(self.linear(before))


class Decoder(nn.Module):
    """Embedding, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.first(self.embedding(ids), scale=scale)
        return self.head(self.second(hidden, scale=scale))


class CallsModel(pl.LightningModule):
    """Its step calls ``self.model``, not ``self``."""

    masked = False

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = self.build()

    def build(self) -> Any:
        return Decoder()

    def pipeline_layers(self) -> Any:
        return list(self.model.children())

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.model(batch["input_ids"]), batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self) -> Any:
        return DataLoader(Tokens(ROWS, self.masked), batch_size=BATCH_SIZE)

    def val_dataloader(self) -> Any:
        return DataLoader(Tokens(12, self.masked), batch_size=BATCH_SIZE)


def cross_entropy(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class CallsSelf(CallsModel):
    """Its step calls ``self``, which calls the model."""

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch["input_ids"])

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch), batch)


class Keywords(CallsModel):
    """Calls its model by keywords."""

    def loss(self, batch: Any) -> Tensor:
        return cross_entropy(self.model(ids=batch["input_ids"], scale=0.5), batch)


class LabelledRows(CallsModel):
    """Its loss is a mean over the positions that have a label."""

    masked = True


class WeighedRows(LabelledRows):
    """The same, and it says how many there are."""

    def pipeline_microbatch_weight(self, batch: Any) -> Tensor:
        return (batch["labels"][:, 1:] != -100).sum()


class TiedByHand(CallsModel):
    """Its logits are products with the weight of its embedding."""

    def build(self) -> Any:
        model = Decoder()
        model.head = nn.LayerNorm(WIDTH)  # type: ignore[assignment]
        return model

    def loss(self, batch: Any) -> Tensor:
        hidden = self.model(batch["input_ids"])
        return cross_entropy(F.linear(hidden, self.model.embedding.weight), batch)


class TiedHead(CallsModel):
    """Its head holds the weight of its embedding."""

    def build(self) -> Any:
        model = Decoder()
        model.head.weight = model.embedding.weight
        return model


class CodeBetween(Decoder):
    """Adds positions between the layers that have names."""

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        hidden = torch.relu(self.first(self.embedding(ids)))
        return self.head(self.second(hidden))


class CodeBetweenLayers(CallsModel):
    """Something happens between the layers that it names."""

    def build(self) -> Any:
        return CodeBetween()


class AuxiliaryLoss(CallsModel):
    """Adds a loss on what an early layer gives."""

    def loss(self, batch: Any) -> Tensor:
        early = self.model.first(self.model.embedding(batch["input_ids"]))
        logits = self.model.head(self.model.second(early))
        return cross_entropy(logits, batch) + 0.1 * early.square().mean()


class TuplesModel(Decoder):
    """Its layers hand on tuples: hidden states, and what they add up on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Start()  # type: ignore[assignment]
        self.first, self.second = Adds(), Adds()  # type: ignore[assignment]
        self.head = End()  # type: ignore[assignment]

    def forward(self, ids: Tensor, scale: float = 1.0) -> Any:
        return self.head(*self.second(*self.first(*self.embedding(ids))))


class Start(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, ids: Tensor) -> Any:
        return self.embedding(ids), ids.new_zeros(len(ids), dtype=torch.float32)


class Adds(Block):
    def forward(self, hidden: Tensor, total: Tensor) -> Any:  # type: ignore[override]
        hidden = super().forward(hidden)
        return hidden, total + hidden.square().mean((1, 2))


class End(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, hidden: Tensor, total: Tensor) -> Any:
        return self.linear(hidden), total


class Tuples(CallsModel):
    """Its layers hand on tuples, and their last part is a part of the loss."""

    def build(self) -> Any:
        return TuplesModel()

    def loss(self, batch: Any) -> Tensor:
        logits, total = self.model(batch["input_ids"])
        return cross_entropy(logits, batch) + 0.1 * total.mean()


class HuggingFace(CallsModel):
    """A transformers model that computes its loss from ``labels=``."""

    pipeline_layers = None  # type: ignore[assignment]

    def build(self) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(
            vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes, **dropout
        )
        return GPT2LMHeadModel(config)

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss


class HuggingFaceMasked(HuggingFace):
    """The same, and many labels do not count."""

    masked = True


class HuggingFaceLogits(HuggingFace):
    """A Llama whose logits the step takes, with a mask."""

    def build(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes, **heads
        )
        return LlamaForCausalLM(config)

    def loss(self, batch: Any) -> Tensor:
        mask = (batch["input_ids"] != 0).long()
        output = self.model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        return cross_entropy(output.logits, batch)
