"""Text to pretrain on, as a Lightning datamodule."""

from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least
from lightning_align.data import tokenizer as tokenizing
from lightning_align.data.bucket_sampler import BucketSampler
from lightning_align.data.buckets import BucketedDataset
from lightning_align.data.mixture import Mixture, check_weight, largest_remainder
from lightning_align.data.packing import PackedDataset
from lightning_align.data.sampler import PositionSampler
from lightning_align.data.text import check_pattern, find_sources
from lightning_align.data.token_cache import (
    TokenSplit,
    default_cache_dir,
    open_token_cache,
    prepare_token_cache,
)
from lightning_align.data.tokenize_corpus import Corpus
from lightning_align.modules.positioned import Paths, PositionedDataModule, plain_paths


@declared
class TextDataModule(PositionedDataModule):
    """Packed blocks of text for next-token prediction.

    Documents (a record of a table, a .txt file or its parts, a chapter of an embedded novel) are
    closed by an end-of-text token, tokenised once into a memory-mapped cache, and cut into blocks.
    The corpus may be larger than the memory.

    A batch is ``input_ids`` and ``labels`` of shape (B, T + 1), labels aligned with the inputs, and
    with ``separate_documents`` also ``position_ids``, which start again at 0 wherever a document
    begins: token i may look at token j <= i if no 0 lies in between.

    Args:
        paths: Embedded corpus ("pride_and_prejudice"), file (.txt, .jsonl, .json, .csv, also
            compressed as .gz, .xz or .bz2, or .parquet; local or at any fsspec URL), glob, folder
            of Parquet or that datasets wrote with save_to_disk, dataset on the hub
            (owner/name:split), a list of these, or a mapping from these to the weights of a
            mixture.
        tokenizer: Folder or hub name of a tokenizer, or a transformers tokenizer; None trains a
            byte-level BPE on the training documents.
        vocab_size: Largest number of tokens of a trained tokenizer; unused if one is given.
        block_size: Tokens predicted per sample.
        batch_size: Samples per batch and rank.
        val_paths: What to validate on, named as in paths but without weights; None holds out part
            of the documents.
        val_fraction: Part of the documents held out if there are no val_paths, of a single one
            its last paragraphs; 0 for no validation.
        document_pattern: Regular expression before whose matches a .txt file is split into
            documents, with ^ and $ matching at lines.
        text_column: Column of a table that holds the text.
        separate_documents: Whether positions start again at each document and no token sees another
            document; a document's first token is then not predicted.
        seed: Seed of the order of the samples and of the choice of held-out documents.
        num_workers: Processes that load batches; 0 loads them in the training process.
        cache_dir: Local folder of token caches; None takes $LIGHTNING_ALIGN_CACHE, or else
            ~/.cache/lightning_align.

    Attributes:
        tokenizer: The transformers tokenizer, after ``setup``.

    Raises:
        ValueError: If a number or a weight is out of its range or ``document_pattern`` is no
            regular expression.

    Example:
        >>> data = TextDataModule("pride_and_prejudice", block_size=256)
    """

    def __init__(
        self,
        paths: Paths | dict[str, float] = "pride_and_prejudice",
        tokenizer: str | Any | None = None,
        *,
        vocab_size: int = 4096,
        block_size: int = 512,
        batch_size: int = 8,
        val_paths: Paths | None = None,
        val_fraction: float = 0.1,
        document_pattern: str | None = None,
        text_column: str = "text",
        separate_documents: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, seed, num_workers, val_fraction)
        check_pattern(self._name, document_pattern)
        check_least(self._name, 1, block_size=block_size)
        least = tokenizing.MIN_VOCAB_SIZE
        if tokenizer is None and vocab_size < least:
            rule = f"must be at least {least}: every byte, and the end-of-text token"
            raise argument_error(self._name, "vocab_size", vocab_size, rule)
        if "://" in str(cache_dir):
            rule = "must be a local folder, because the tokens are memory-mapped"
            raise argument_error(self._name, "cache_dir", cache_dir, rule)
        # Plain text and numbers only: a checkpoint loads with weights_only=True.
        if isinstance(paths, dict):
            paths = self._weights(paths)
        else:
            paths = plain_paths(self._name, "paths", paths)
        val_paths = plain_paths(self._name, "val_paths", val_paths or [])
        if not paths:
            raise argument_error(self._name, "paths", paths, "must name at least one file")
        cache_dir = cache_dir and str(cache_dir)
        tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        given = tokenizer is not None and not isinstance(tokenizer, str)
        self.save_hyperparameters(ignore=["tokenizer"] if given else [], logger=False)
        self.paths: list[str] = list(paths)
        self.weights: list[float] | None = list(paths.values()) if isinstance(paths, dict) else None
        self.val_paths: list[str] = val_paths
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.document_pattern = document_pattern
        self.text_column = text_column
        self.separate_documents = separate_documents
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.tokenizer: Any = tokenizer if given else None
        self._tokenizer_argument = tokenizer
        # Name of the token cache, and how many files each of the paths is.
        self._prepared: tuple[str, list[int]] | None = None

    @property
    @override
    def sample_tokens(self) -> int:
        return self.block_size

    @property
    @override
    def corpora(self) -> dict[str, int]:
        sizes = self.train_mixture.sizes if self.train_mixture is not None else []
        return dict(zip(self.paths, sizes, strict=False))

    _cuts_documents = True

    @property
    @override
    def batch_keys(self) -> frozenset[str]:
        assert self.train_dataset is not None, "setup() comes first"
        return frozenset(self.train_dataset[[0]])  # of two pieces each may be of another length

    @override
    def follow_curriculum(self, **options: Any) -> PositionSampler:
        if (buckets := options.get("buckets")) is not None:
            self._decompose(**buckets)
        return super().follow_curriculum(**options)

    def _decompose(self, least: int = 8, **_: Any) -> None:
        """Let training samples be pieces of documents, until the next set-up.

        Raises:
            ValueError: If documents are not separate, or corpora have weights.
        """
        where = ("Curriculum", "length.mode", "bucket")
        if not self.separate_documents:
            rule = f"cuts documents apart, and {self._name} joins them to blocks"
            raise argument_error(*where, rule, "Set separate_documents=True")
        if self.train_mixture is not None:
            rule = f"{self._name} mixes corpora by weight, and a batch is of one length"
            raise argument_error(*where, rule, "Give paths without weights")
        assert isinstance(self.train_dataset, PackedDataset)
        split, pad = self.train_dataset.split, self.train_dataset.pad_token_id
        self.train_dataset = BucketedDataset(split, self.block_size, pad, least=least)
        self.fingerprint += f", pieces of {least} tokens or more"
        pieces = self.train_dataset.pieces
        counts = zip(pieces.lengths.tolist(), pieces.sizes.tolist(), strict=True)
        named = ", ".join(f"{number} of {length}" for length, number in counts)
        rank_zero_info(
            f"{self._name}: documents are cut into {named} tokens; {pieces.filled_up} of"
            f" {int(pieces.lengths @ pieces.sizes)} are padding."
        )

    @override
    def _train_sampler(self, **follow: Any) -> PositionSampler:
        plan = self._options.get("buckets")
        if plan is None:
            return super()._train_sampler(**follow)
        assert isinstance(self.train_dataset, BucketedDataset)
        pieces = self.train_dataset.pieces
        lengths, sizes = pieces.lengths.tolist(), pieces.sizes.tolist()
        batch_size = self.batch_size * self.block_size // lengths[-1]
        options = {name: plan[name] for name in ("odds", "cycles") if name in plan}
        options["num_replicas"], options["rank"] = self._replicas
        return BucketSampler(sizes, lengths, batch_size, self.seed, **options, **follow)

    @override
    def prepare_data(self) -> None:
        """Read, check and tokenise the files (one process of each node)."""
        if self._tokenizer_argument is not None:
            self.tokenizer = tokenizing.load_tokenizer(self._name, self._tokenizer_argument)
        options = (self.document_pattern, self.text_column)
        train = [find_sources(self._name, "paths", path, *options) for path in self.paths]
        val = []
        if self.val_paths:
            val = find_sources(self._name, "val_paths", self.val_paths, *options)
        corpus = Corpus(
            where=self._name,
            train=tuple(source for sources in train for source in sources),
            val=tuple(val),
            val_fraction=self.val_fraction,
            seed=self.seed,
            tokenizer=self.tokenizer if self._tokenizer_argument is not None else None,
            vocab_size=self.vocab_size,
        )
        key = prepare_token_cache(corpus, self.cache_dir)
        self._prepared = (key, [len(sources) for sources in train])

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open the token cache (every process).

        Raises:
            ValueError: If ``block_size`` does not fit into the training or the validation tokens,
                or a corpus is too small for its weight.
        """
        if self.trainer is not None:  # only the process that read the files knows
            self._prepared = self.trainer.strategy.broadcast(self._prepared)
        if self._prepared is None:
            self.prepare_data()
        assert self._prepared is not None
        key, num_files = self._prepared
        cache = open_token_cache(self._name, self.cache_dir, key)
        if cache.tokenizer_rules is not None:
            self.tokenizer = tokenizing.trained_tokenizer(cache.tokenizer_rules)
        elif self.tokenizer is None:
            self.tokenizer = tokenizing.load_tokenizer(self._name, self._tokenizer_argument)
        if cache.ending is not None and stage in ("fit", None):
            held_out = f"the text is one document, of which {cache.ending} are held out"
            rank_zero_info(f"{self._name}(val_fraction={self.val_fraction}): {held_out}.")
        self.val_dataset = self._packed(cache.val) if cache.val is not None else None
        self.fingerprint = f"tokens {cache.train.content}, block_size {self.block_size}"
        if self.separate_documents:
            self.fingerprint += ", separate documents"
        if self.weights is None:
            self.train_dataset = self._packed(cache.train)
        else:
            self._mix(cache.train, num_files)

    def _mix(self, split: TokenSplit, num_files: list[int]) -> None:
        """Make blocks of each corpus for itself, and the mixture of them."""
        assert self.weights is not None
        files = iter(split.source_tokens)
        corpora = [sum(islice(files, number)) for number in num_files]
        for path, num_tokens in zip(self.paths, corpora, strict=True):
            if num_tokens <= self.block_size:
                rule = f"has {num_tokens} training tokens, and a block needs {self.block_size + 1}"
                way_out = "Lower block_size, give more text, or name val_paths"
                raise argument_error(self._name, "paths", path, rule, way_out)
        train = self._packed(split, corpora)
        shares = largest_remainder(len(train), self.weights)
        for path, weight, share in zip(self.paths, self.weights, shares, strict=True):
            if share == 0:
                rule = f"gives it not one of the {len(train)} blocks of an epoch"
                raise argument_error(self._name, f"paths[{path!r}]", weight, rule, "Raise it")
        self.train_dataset = train
        self.train_mixture = Mixture(train.sizes, self.weights)
        self.fingerprint += f", weights {self.weights} of {train.sizes} blocks"

    def _packed(self, split: TokenSplit, corpora: list[int] | None = None) -> PackedDataset:
        # What is validated on may be less than a block, whose rest is filled up and not counted.
        if split.num_tokens <= (self.block_size if split.split == "train" else 1):
            rule = (
                f"the {split.split} split has {split.num_tokens} tokens, and a block needs one more"
            )
            way_out = "Lower block_size, or give more text"
            raise argument_error(self._name, "block_size", self.block_size, rule, way_out)
        pad = tokenizing.pad_token_id(self.tokenizer)
        apart = self.separate_documents
        return PackedDataset(split, self.block_size, pad, separate_documents=apart, corpora=corpora)

    def _weights(self, paths: dict[str, float]) -> dict[str, float]:
        """The weights by path, as plain numbers."""
        for path, weight in paths.items():
            check_weight(self._name, f"paths[{path!r}]", weight)
        return {str(path): float(weight) for path, weight in paths.items()}
