"""Conversations for supervised fine-tuning, as a Lightning datamodule."""

from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.data.columns import named_columns
from lightning_align.data.conversation import (
    ConversationDataset,
    conversation_dataset,
    hold_out_conversations,
    read_conversations,
)
from lightning_align.data.conversation_formats import Example
from lightning_align.data.conversation_packing import PackedConversations, packed_conversations
from lightning_align.data.paths import find_files
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.modules.positioned import Paths, PositionedDataModule, plain_paths


@declared
class ConversationDataModule(PositionedDataModule):
    """Conversations for supervised fine-tuning with PretrainModule.

    A record is a list of messages (multi-turn, also with tools), or a prompt and a completion, both
    text or both messages; files in the forms of ShareGPT and Alpaca are understood. A batch is
    {input_ids, labels, attention_mask}; labels are -100 where the assistant does not speak.
    Conversations of which nothing is learned are dropped with a warning.

    With ``packing`` a row is several whole conversations, none of which sees another. A batch then
    has, in the place of the attention mask, ``position_ids`` that start again at 0 at each of them.

    Args:
        paths: File (.jsonl, .json, .csv, also compressed as .gz, .xz or .bz2, or .parquet; local or
            at any fsspec URL), glob, folder of Parquet or that datasets wrote with save_to_disk,
            dataset on the hub (owner/name:split), or a list of these.
        tokenizer: Folder or hub name of a tokenizer, or a transformers tokenizer.
        batch_size: Conversations per batch and rank, or with ``packing`` rows of several.
        max_length: Tokens that a conversation may have; the end of longer ones is cut.
        val_paths: Files to validate on, named as in paths; None holds out part of the prompts.
        val_fraction: Part of the prompts held out if there are no val_paths; 0 for no validation.
        packing: Whether a row is several conversations, of ``max_length`` tokens together at most.
        assistant_only_loss: Whether to learn the assistant's tokens (or the completion) alone, or
            all tokens of a conversation.
        chat_template: Jinja text, or path of a .jinja file, that turns messages into text and is
            saved with the tokenizer; None takes the tokenizer's own.
        append_eos: Whether to close each completion that is text with the end-of-text token;
            messages are closed by the chat template.
        messages_column: Column of the messages; None passes it over.
        prompt_column: Column of the prompt, where there are no messages.
        completion_column: Column of the completion, where there are no messages.
        seed: Seed of the order of the conversations and of the choice of held-out prompts.
        num_workers: Processes that load batches; 0 loads them in the training process.

    Attributes:
        tokenizer: The transformers tokenizer, with the chat template, after ``setup``.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = ConversationDataModule("chats.jsonl", "path/of/a/tokenizer", max_length=2048)
    """

    length_refusal = "its rows end with what is learned, the answers, and they would be cut off"

    def __init__(
        self,
        paths: Paths,
        tokenizer: str | Any,
        *,
        batch_size: int = 8,
        max_length: int = 1024,
        packing: bool = False,
        val_paths: Paths | None = None,
        val_fraction: float = 0.0,
        assistant_only_loss: bool = True,
        chat_template: str | Path | None = None,
        append_eos: bool = True,
        messages_column: str | None = "messages",
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, val_fraction)
        if max_length < 2:
            rule = "must be at least 2: a token to read and one to predict"
            raise argument_error(self._name, "max_length", max_length, rule)
        self.columns = named_columns(
            self._name,
            messages=messages_column,
            prompt=prompt_column,
            completion=completion_column,
        )
        # Plain text and numbers only: a checkpoint loads with weights_only=True.
        paths = plain_paths(self._name, "paths", paths)
        val_paths = plain_paths(self._name, "val_paths", val_paths or [])
        tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        chat_template = None if chat_template is None else str(chat_template)
        given = not isinstance(tokenizer, str)
        self.save_hyperparameters(ignore=["tokenizer"] if given else [], logger=False)
        self.paths: list[str] = paths
        self.val_paths: list[str] = val_paths
        self.max_length = max_length
        self.packing = packing
        self.assistant_only_loss = assistant_only_loss
        self.chat_template = chat_template
        self.append_eos = append_eos
        self.tokenizer: Any = tokenizer if given else None
        self._tokenizer_argument = tokenizer

    @override
    def prepare_data(self) -> None:
        """Load the tokenizer (one process of each node), so that it is in the cache for all."""
        self.tokenizer = load_tokenizer(self._name, self._tokenizer_argument, self.chat_template)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the conversations (every process, once)."""
        if self.train_dataset is not None:
            return
        self.tokenizer = load_tokenizer(self._name, self._tokenizer_argument, self.chat_template)
        train, val = self._read("paths", self.paths), []
        if self.val_paths:
            val = self._read("val_paths", self.val_paths)
        else:
            train, val = hold_out_conversations(self._name, train, self.val_fraction, self.seed)
        self.train_dataset = self._dataset(train)
        self.val_dataset = self._dataset(val) if val else None
        self.fingerprint = f"conversations {self.train_dataset.content}"

    @property
    def separate_documents(self) -> bool:
        """Whether conversations share a row: the model must then keep them apart."""
        return self.packing

    def _dataset(self, examples: list[Example]) -> ConversationDataset | PackedConversations:
        if self.packing:
            return packed_conversations(examples, self.tokenizer, self.max_length)
        return conversation_dataset(examples, self.tokenizer)

    def _read(self, argument: str, paths: list[str]) -> list[Example]:
        return read_conversations(
            find_files(self._name, argument, paths, self.columns),
            self.tokenizer,
            max_length=self.max_length,
            assistant_only_loss=self.assistant_only_loss,
            append_eos=self.append_eos,
        )
