"""Preference pairs to align with, as a Lightning datamodule."""

from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_choice
from lightning_align.data import preference, unpaired
from lightning_align.data.columns import named_columns
from lightning_align.data.files import InputFile
from lightning_align.data.paths import find_files
from lightning_align.data.samples import Ids
from lightning_align.data.tokenizer import load_tokenizer
from lightning_align.data.truncation import TRUNCATION_MODES
from lightning_align.modules.positioned import Paths, PositionedDataModule, plain_paths


@declared
class PreferenceDataModule(PositionedDataModule):
    """Preference pairs from files with the columns prompt, chosen and rejected.

    All are text, or all are messages; without a prompt, chosen and rejected begin with it. A batch
    is {input_ids, attention_mask, completion_mask}, the chosen completions in its first half of
    rows and the rejected ones in its second; and the ``number`` of each pair among all of the run.
    Pairs that can teach nothing are dropped with a warning.

    Files with the columns prompt, completion and label hold unpaired records, for the losses kto
    and apo_zero_unpaired. A batch then has one row a record and its ``label``, and as KL_input_ids,
    KL_attention_mask and KL_completion_mask each prompt with the completion of another record.

    Args:
        paths: File (.jsonl, .json, .csv, also compressed as .gz, .xz or .bz2, or .parquet; local or
            at any fsspec URL), glob, folder of Parquet or that datasets wrote with save_to_disk,
            dataset on the hub (owner/name:split), or a list of these.
        tokenizer: Folder or hub name of a tokenizer, or a transformers tokenizer.
        batch_size: Pairs per batch and rank, or unpaired records.
        max_length: Tokens that a prompt and a completion may have together; longer ones are cut.
        truncation_mode: What is left of them, keep_start (a completion loses its end) or keep_end
            (the prompt loses its beginning).
        val_paths: Files to validate on, named as in paths; None holds out part of the prompts.
        val_fraction: Part of the prompts held out if there are no val_paths; 0 for no validation.
        chat_template: Jinja text, or path of a .jinja file, that turns messages into text and is
            saved with the tokenizer; None takes the tokenizer's own.
        append_eos: Whether to close each completion that is text with the end-of-text token;
            messages are closed by the chat template.
        prompt_column: Column of the prompt; None if chosen and rejected begin with it.
        chosen_column: Column of the completion that was chosen.
        rejected_column: Column of the completion that was rejected.
        completion_column: Column of the completion of an unpaired record.
        label_column: Column that says whether an unpaired record is good.
        seed: Seed of the order of the pairs and of the choice of held-out prompts.
        num_workers: Processes that load batches; 0 loads them in the training process.

    Attributes:
        tokenizer: The transformers tokenizer, after ``setup``.

    Raises:
        ValueError: If a number is out of its range; in ``setup`` if unpaired records to train on
            have all the same label.

    Example:
        >>> data = PreferenceDataModule("pairs.jsonl", "path/of/a/tokenizer", max_length=512)
    """

    length_refusal = "its rows end with what is learned, the answers, and they would be cut off"

    def __init__(
        self,
        paths: Paths,
        tokenizer: str | Any,
        *,
        batch_size: int = 8,
        max_length: int = 1024,
        truncation_mode: str = "keep_start",
        val_paths: Paths | None = None,
        val_fraction: float = 0.0,
        chat_template: str | Path | None = None,
        append_eos: bool = True,
        prompt_column: str | None = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        completion_column: str = "completion",
        label_column: str = "label",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, val_fraction)
        if max_length < 2:
            rule = "must be at least 2: a token of the prompt and one of a completion"
            raise argument_error(self._name, "max_length", max_length, rule)
        check_choice(self._name, "truncation_mode", truncation_mode, TRUNCATION_MODES)
        self.columns = named_columns(
            self._name,
            prompt=prompt_column,
            chosen=chosen_column,
            rejected=rejected_column,
            completion=completion_column,
            label=label_column,
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
        self.truncation_mode = truncation_mode
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
        """Read and tokenise the pairs (every process, once)."""
        if self.train_dataset is not None:
            return
        self.tokenizer = load_tokenizer(self._name, self._tokenizer_argument, self.chat_template)
        files = self._files("paths", self.paths)
        kind: Any = unpaired if unpaired.holds_unpaired(files) else preference
        train, val = self._read(kind, files), []
        if self.val_paths:
            val = self._read(kind, self._files("val_paths", self.val_paths))
        else:
            train, val = kind.hold_out_prompts(self._name, train, self.val_fraction, self.seed)
        if kind is unpaired:
            unpaired.check_labels(files[0], train)
        self.train_dataset = self._dataset(train)
        self.val_dataset = self._dataset(val, len(train)) if val else None
        what = "records" if kind is unpaired else "pairs"
        self.fingerprint = f"{what} {self.train_dataset.content}"

    @property
    def held_out_prompts(self) -> list[list[int]]:
        """Tokens of the prompts that are validated on, each once, in the order of the files."""
        held_out: Any = self.val_dataset
        samples = [] if held_out is None else getattr(held_out, "pairs", None) or held_out.records
        return [list(ids) for ids in dict.fromkeys(tuple(s.prompt.tolist()) for s in samples)]

    def _files(self, argument: str, paths: list[str]) -> list[InputFile]:
        return find_files(self._name, argument, paths, self.columns)

    def _read(self, kind: Any, files: list[InputFile]) -> list[Any]:
        read = unpaired.read_unpaired if kind is unpaired else preference.read_pairs
        options: dict[str, Any] = {"max_length": self.max_length, "append_eos": self.append_eos}
        options["truncation_mode"] = self.truncation_mode
        return list(read(files, self.tokenizer, **options))

    def _dataset(
        self, samples: list[Any], first_number: int = 0
    ) -> preference.PreferenceDataset | unpaired.UnpairedDataset:
        if isinstance(samples[0], unpaired.Labelled):
            rest = self.tokenizer, self.max_length, first_number
            return unpaired.unpaired_dataset(samples, *rest, truncation_mode=self.truncation_mode)
        return preference.pair_dataset(samples, self.tokenizer, self.max_length, first_number)

    def completions(self) -> list[tuple[tuple[Ids, Ids], ...]]:
        """Prompt and completion of each row of each sample, by the ``number`` in a batch.

        Those to learn from come first, then those held out.
        """
        datasets: Any = self.train_dataset, self.val_dataset
        return [sample for dataset in datasets if dataset for sample in dataset.completions()]
