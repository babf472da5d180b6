"""How a model is trained: on how many devices, split how, with which techniques."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from lightning_align._errors import argument_error, check_choice, finite_number
from lightning_align.pipelining.schedule import SCHEDULES, check_numbers
from lightning_align.planner.model_spec import ModelSpec

WHERE = "ParallelSpec"
OPTIMIZERS = ("adamw", "stable_adamw", "muon", "galore_adamw", "sgd")
CHECKPOINTING = ("none", "selective", "full")
TIERS = ("none", "cpu", "nvme")
OBJECTIVES = ("pretrain", "dpo")
REFERENCES = ("model", "precomputed", "none")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "bf16-master", "16-master")
_COUNTS = (
    *("devices", "pipeline_parallel", "tensor_parallel", "num_model_chunks"),
    *("micro_batch_size", "data_parallel", "global_batch_size", "rank", "lisa_layers"),
)
_OPTIONAL = ("data_parallel", "global_batch_size", "rank", "lisa_layers")


@dataclass(frozen=True)
class ParallelSpec:
    """How a model is trained.

    Args:
        devices: How many there are.
        data_parallel: Copies of the model; None takes what the other two leave.
        pipeline_parallel: Ranks of a pipeline.
        tensor_parallel: Ranks that each matrix is divided among.
        sequence_parallel: Whether these divide norms and dropout by tokens, too.
        num_model_chunks: Stages on each rank of a pipeline.
        micro_batch_size: Rows (pairs, for DPO) that go through the model at a time on a replica.
        global_batch_size: Rows of a step; None has one micro-batch on each replica.
        schedule: Of the pipeline, by its name in torch.
        zero_stage: What data-parallel ranks divide: 1 optimizer state, 2 gradients, 3 parameters.
        offload_param: Where parameters lie: ``"none"``, ``"cpu"`` or ``"nvme"``.
        offload_optimizer: Where optimizer state lies, and with it gradients from stage 2 on.
        optimizer: ``"adamw"``, ``"stable_adamw"``, ``"muon"``, ``"galore_adamw"`` or ``"sgd"``.
        rank: Of GaLore's projection; None is 128.
        lisa_layers: Blocks that train at a time; None trains all.
        activation_checkpointing: What is computed again: ``"none"``, ``"selective"`` attention's
            scores, ``"full"`` blocks.
        offload_activations: Where saved activations wait.
        precision: As Lightning has it; ``"bf16-master"`` and ``"16-master"`` have 16-bit weights
            and gradients, and fp32 weights in the optimizer, as Megatron-LM.
        objective: ``"pretrain"`` or ``"dpo"``, whose micro-batch is of pairs.
        reference: Of DPO: a ``"model"`` beside the policy, ``"precomputed"``, or ``"none"``.
        chunked_loss: Whether head and loss run in chunks, as this suite's modules do.
        overlap_grad_reduce: Whether gradients are summed over replicas while backward goes on.
        shared_prefix: Share of a row that both of a pair have in common and that is computed once.

    Raises:
        ValueError: If a value is out of its range, or the split does not fit the devices.

    Example:
        >>> ParallelSpec(devices=8, tensor_parallel=2, pipeline_parallel=2).replicas
        2
    """

    devices: int = 1
    data_parallel: int | None = None
    pipeline_parallel: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    num_model_chunks: int = 1
    micro_batch_size: int = 1
    global_batch_size: int | None = None
    schedule: str = "1F1B"
    zero_stage: int = 0
    offload_param: str = "none"
    offload_optimizer: str = "none"
    optimizer: str = "adamw"
    rank: int | None = None
    lisa_layers: int | None = None
    activation_checkpointing: str = "none"
    offload_activations: str = "none"
    precision: str = "bf16-mixed"
    objective: str = "pretrain"
    reference: str = "model"
    chunked_loss: bool = True
    overlap_grad_reduce: bool = True
    shared_prefix: float = 0.0

    def __post_init__(self) -> None:
        for argument in _COUNTS:
            value = getattr(self, argument)
            if (value is None and argument in _OPTIONAL) or (type(value) is int and value >= 1):
                continue
            raise argument_error(WHERE, argument, value, "must be a whole number of at least 1")
        for argument, choices in (
            ("zero_stage", (0, 1, 2, 3)),
            ("offload_param", TIERS),
            ("offload_optimizer", TIERS),
            ("offload_activations", TIERS),
            ("optimizer", OPTIMIZERS),
            ("activation_checkpointing", CHECKPOINTING),
            ("precision", PRECISIONS),
            ("objective", OBJECTIVES),
            ("reference", REFERENCES),
            ("schedule", tuple(SCHEDULES)),
        ):
            check_choice(WHERE, argument, getattr(self, argument), choices)
        for argument in ("sequence_parallel", "chunked_loss", "overlap_grad_reduce"):
            if not isinstance(getattr(self, argument), bool):
                raise argument_error(WHERE, argument, getattr(self, argument), "must be a bool")
        share = finite_number(self.shared_prefix)
        if share is None or not 0 <= share < 1:
            rule = "must be a share of a row, from 0 to below 1"
            raise argument_error(WHERE, "shared_prefix", self.shared_prefix, rule)
        self._check_split()
        self._check_techniques()

    def _check_split(self) -> None:
        parts = self.tensor_parallel * self.pipeline_parallel
        if self.devices % parts:
            rule = f"must be a multiple of tensor_parallel * pipeline_parallel = {parts}"
            raise argument_error(WHERE, "devices", self.devices, rule)
        if self.data_parallel is not None and self.data_parallel * parts != self.devices:
            given = f"{self.data_parallel} * {self.pipeline_parallel} * {self.tensor_parallel}"
            rule = f"data_parallel * pipeline_parallel * tensor_parallel = {given} must be devices"
            way_out = f"Leave it out, which is {self.devices // parts}"
            raise argument_error(WHERE, "data_parallel", self.data_parallel, rule, way_out)
        batch = self.micro_batch_size * self.replicas
        if self.batch_size % batch:
            given = f"{self.micro_batch_size} * {self.replicas}"
            rule = f"must be a multiple of micro_batch_size * data_parallel = {given}"
            way_out = f"Use {max(batch, self.batch_size - self.batch_size % batch)}"
            raise argument_error(WHERE, "global_batch_size", self.batch_size, rule, way_out)

    def _check_techniques(self) -> None:
        stages = self.num_model_chunks
        single = self.schedule in ("GPipe", "1F1B")
        if self.pipeline_parallel > 1 and single and stages > 1:
            rule, way_out = "1F1B and GPipe have one stage on each rank", "Use Interleaved1F1B"
            raise argument_error(WHERE, "num_model_chunks", stages, rule, way_out)
        if self.pipeline_parallel == 1 and stages > 1:
            rule = "counts in a pipeline only"
            raise argument_error(WHERE, "num_model_chunks", stages, rule)
        if self.pipeline_parallel > 1:
            numbers = (self.pipeline_parallel, self.num_microbatches, self.chunks)
            check_numbers(self.schedule, *numbers, WHERE)
        if self.sequence_parallel and self.tensor_parallel == 1:
            rule = "divides tokens among the ranks of tensor_parallel, which is 1"
            raise argument_error(WHERE, "sequence_parallel", True, rule)
        if self.rank is not None and self.optimizer != "galore_adamw":
            rule = f"is GaLore's, and the optimizer is {self.optimizer!r}"
            raise argument_error(WHERE, "rank", self.rank, rule)
        if self.zero_stage > 1 and self.pipeline_parallel > 1:
            rule = "would gather or reduce once for each micro-batch of a pipeline"
            raise argument_error(WHERE, "zero_stage", self.zero_stage, rule, "Use at most 1")
        offloads = (self.offload_param, self.offload_optimizer, self.offload_activations)
        if self.pipeline_parallel > 1 and offloads != ("none",) * 3:
            rule = "is for ranks that hold all layers, and a pipeline's do not"
            argument = ("offload_param", "offload_optimizer", "offload_activations")[
                next(n for n, tier in enumerate(offloads) if tier != "none")
            ]
            raise argument_error(WHERE, argument, getattr(self, argument), rule)
        if self.offload_param != "none" and self.zero_stage < 3:
            rule = "needs zero_stage=3, which fetches parameters block by block"
            raise argument_error(WHERE, "offload_param", self.offload_param, rule)
        if self.offload_optimizer != "none" and self.zero_stage < 1:
            rule = "needs zero_stage of at least 1"
            raise argument_error(WHERE, "offload_optimizer", self.offload_optimizer, rule)
        if self.objective != "dpo":
            for argument, plain in (("shared_prefix", 0.0), ("reference", "model")):
                value = getattr(self, argument)
                if value != plain:
                    rule = f"is of the pairs of 'dpo', and the objective is {self.objective!r}"
                    raise argument_error(WHERE, argument, value, rule)

    def check_model(self, model: ModelSpec) -> None:
        """Refuse a model that cannot be split so.

        Args:
            model: Which one.

        Raises:
            ValueError: If there are fewer layers than stages, or heads cannot be divided.
        """
        if self.stages > model.num_layers:
            rule = f"{self.stages} stages need a layer each, and the model has {model.num_layers}"
            raise argument_error(WHERE, "pipeline_parallel", self.pipeline_parallel, rule)
        for what, value in (
            ("num_heads", model.num_heads),
            ("num_kv_heads", model.kv_heads),
            ("ffn_hidden_size", model.ffn_width),
        ):
            if value % self.tensor_parallel:
                rule = f"must divide the model's {what}={value}"
                raise argument_error(WHERE, "tensor_parallel", self.tensor_parallel, rule)
        if self.sequence_parallel and model.seq_len % self.tensor_parallel:
            rule = f"must divide seq_len={model.seq_len}"
            raise argument_error(WHERE, "tensor_parallel", self.tensor_parallel, rule)
        if self.lisa_layers is not None and self.lisa_layers > model.num_layers:
            rule = f"the model has {model.num_layers} blocks"
            raise argument_error(WHERE, "lisa_layers", self.lisa_layers, rule)

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.devices // (self.tensor_parallel * self.pipeline_parallel)

    @property
    def batch_size(self) -> int:
        """Rows of a step."""
        if self.global_batch_size is None:
            return self.micro_batch_size * self.replicas
        return self.global_batch_size

    @property
    def num_microbatches(self) -> int:
        """Of a step, on each replica."""
        return self.batch_size // (self.micro_batch_size * self.replicas)

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all its ranks."""
        return self.pipeline_parallel * self._chunks

    @cached_property
    def _chunks(self) -> int:
        if self.pipeline_parallel == 1:
            return 1
        is_single = self.schedule in ("GPipe", "1F1B")
        return 1 if is_single else max(2, self.num_model_chunks)

    @property
    def chunks(self) -> int:
        """Stages on each rank."""
        return self._chunks

    @property
    def rows(self) -> float:
        """Rows of a micro-batch as the model computes them: two a pair, less what they share."""
        pairs = self.objective == "dpo"
        return self.micro_batch_size * ((2 - self.shared_prefix) if pairs else 1)

    @property
    def predicted_rows(self) -> float:
        """Rows of a micro-batch whose tokens are predicted: of pairs, what they do not share."""
        pairs = self.objective == "dpo"
        return self.micro_batch_size * (2 * (1 - self.shared_prefix) if pairs else 1)

    @property
    def has_reference(self) -> bool:
        """Whether a reference model is in memory and runs."""
        return self.objective == "dpo" and self.reference == "model"

    @property
    def galore_rank(self) -> int:
        """Rank of GaLore's projection."""
        return 128 if self.rank is None else self.rank

    @property
    def is_half(self) -> bool:
        """Whether products have 16-bit inputs."""
        return self.precision != "32-true"

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer has fp32 weights beside 16-bit ones, as ZeRO-Infinity's has."""
        has_own = self.precision == "bf16-true" and self.zero_stage > 0
        return has_own or self.precision.endswith("master")

    @property
    def weight_bytes(self) -> int:
        """Bytes of a parameter as the model has it."""
        return 2 if self.precision in ("bf16-true", "bf16-master", "16-master") else 4

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of activations."""
        return 2 if self.is_half else 4

    def told(self) -> dict[str, Any]:
        """Arguments that differ from their defaults, and the number of devices."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        changed = {name: value for name, value in given.items() if value != defaults[name]}
        return {"devices": self.devices, **changed}
