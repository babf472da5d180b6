"""The reference of a preference objective: a frozen model beside the module tree, or what one said.

It has no keys in checkpoints. Two hashes in them tell whether a run goes on with the same one.
"""

from __future__ import annotations

import copy
import gc
import json
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_align._compat.peft_layers import switched_off
from lightning_align._errors import argument_error
from lightning_align.data.reference_cache import Values
from lightning_align.data.token_cache import default_cache_dir
from lightning_align.layers import ModelLayers
from lightning_align.layers.sharding import (
    as_forward,
    is_sharded,
    load_whole_state,
    own_part,
    put_parts,
    whole_state,
)
from lightning_align.layers.surgery import evaluating
from lightning_align.losses import PreferenceOptions
from lightning_align.losses.reference import reference_layers
from lightning_align.models.adapters import check_reference, has_adapters, own_modules
from lightning_align.models.build import Loading, build_model
from lightning_align.modules.precomputed import PrecomputedReference, Row, score_rows
from lightning_align.modules.reference import fingerprint, fingerprint_until_0_1
from lightning_align.modules.reference_sync import ReferenceSync, sync_of
from lightning_align.offload.away import Away
from lightning_align.run.own_parts import is_own_state
from lightning_align.run.protocols import (
    NumbersCompletions,
    SpreadsModel,
    all_ranks_run_model,
    datamodule_of,
    gathered,
    has_replicas,
    leaves_sharding,
    let_go,
    one_rank_runs_model,
)
from lightning_align.run.replicas import is_spread, of_every_rank

if TYPE_CHECKING:
    from lightning_align.modules.dpo import DPOModule


class FrozenReference:
    """A reference, and what is known of it.

    Args:
        where: Class the user called.
        cached: Has what the reference says, which is then asked before training and let go; None
            for one that runs in every step.
        sync: How it follows the policy, which puts it into checkpoints; None for one that is fixed.

    Attributes:
        layers: The model; None where there is none, it was let go, or it is the policy.
        lacks_adapters: Whether it is the policy without its adapters, which is always at hand.
        is_copy: Whether it began as a copy of the policy.
        is_policy: Whether it is the policy itself, as long as that has not learned.
        fingerprint: Hashes of its weights and configuration; none without values.
    """

    def __init__(
        self,
        where: str,
        cached: PrecomputedReference | None = None,
        sync: ReferenceSync | None = None,
    ) -> None:
        self.where, self.cached, self.sync = where, cached, sync
        self.layers: ModelLayers | None = None
        self.is_copy = self.is_policy = self.lacks_adapters = False
        self.fingerprint: dict[str, str] = {}
        self._dtypes: set[torch.dtype] = set()
        self._saved: dict[str, str] = {}  # by a checkpoint

    def adopt(self, model: nn.Module, policy: ModelLayers, *, is_copy: bool = False) -> None:
        """Take a model as the reference.

        Raises:
            ValueError: If it is the policy, shares what learns, or has another vocabulary.
        """
        layers = reference_layers(self.where, policy, model)  # before anything is changed
        turn_off_dropout(model)
        model.eval().requires_grad_(False)
        if self.sync is not None:
            self.sync.check(layers, policy)
        self.layers, self.is_copy = layers, is_copy
        self.know(model)

    def adopt_policy(self, policy: nn.Module) -> None:
        """Take what the policy is now as the reference, without a second model."""
        self.is_policy = True
        self.know(policy)

    def adopt_without_adapters(self, policy: ModelLayers) -> None:
        """Take what the policy is without its adapters as the reference.

        Raises:
            ValueError: If that is another model than training begins with.
        """
        check_reference(policy, self.where)
        self.lacks_adapters = True
        self.layers = policy if self.cached is None else None
        self.know(policy.model)

    def asked(self, policy: nn.Module) -> AbstractContextManager[None]:
        """Around a run of the reference."""
        return switched_off(policy) if self.lacks_adapters else nullcontext()

    def know(self, model: nn.Module) -> None:
        """Take the fingerprint of the reference.

        Raises:
            ValueError: If it is not that of the checkpoint that training goes on from.
        """
        # Before a strategy casts it: a checkpoint tells whether the reference is the same.
        self.fingerprint = fingerprint(model, without_adapters=self.lacks_adapters)
        self._dtypes = {parameter.dtype for parameter in model.parameters()}
        self._check_saved()

    # In a run

    def probe(self) -> None:
        """See that its hidden states are what its head gets."""
        if self.layers is None or self.lacks_adapters:  # else it is probed as the policy
            return
        model = self.layers.model
        if not is_spread(model) and not is_sharded(model):  # else it has been probed
            self.layers.probe()

    def set_up(self, module: DPOModule) -> None:
        """Check that it can be asked in this run, where nobody learns yet; collective.

        Raises:
            ValueError: If it cannot.
        """
        strategy = module.trainer.strategy
        if self.sync is not None and not (has_replicas(strategy) or leaves_sharding(strategy)):
            rule = f"under {type(strategy).__name__} the weights of a reference do not change"
            way_out = "Use one device, DDP or ModelParallelStrategy, or leave sync_ref_model out"
            raise argument_error(self.where, "sync_ref_model", True, rule, way_out)
        ranks = of_every_rank(module.trainer, self.fingerprint)
        if len({json.dumps(each) for each in ranks}) > 1:  # a strategy makes policies alike alone
            rule = "the ranks hold different references, as random weights without a seed are"
            way_out = "Call seed_everything before the models are built"
            raise argument_error(self.where, "ref_model", None, rule, way_out)
        if self.cached is None:
            self.probe()
            return
        where, argument = self.where, "precompute_ref_log_probs"
        if not isinstance(datamodule_of(module.trainer), NumbersCompletions):
            rule = (
                "needs to know all data before training, and the number of each sample in a batch"
            )
            way_out = (
                "Give trainer.fit a datamodule: PreferenceDataModule, or one with completions()"
            )
            raise argument_error(where, argument, True, rule, way_out)
        sharded = (DeepSpeedStrategy, FSDPStrategy)
        if isinstance(strategy, sharded):
            rule = f"does not go with {type(strategy).__name__}, which spreads the models"
            raise argument_error(where, argument, True, rule, "Use DDP, or leave the argument out")
        if not self.fingerprint:
            rule = "must know the reference by its weights, and it is built without them"
            raise argument_error(where, argument, True, rule, "Build the models without empty_init")
        if self.is_policy:  # also where weights were loaded since
            reading = partial(_in_memory, strategy)
            self.is_policy = fingerprint(module.model, reading=reading) == self.fingerprint
        self.cached.forget_data()
        if not _can_ask(strategy):  # it need not run, if all values are there
            self.precompute(module)

    def precompute(self, module: DPOModule) -> None:
        """Have its values of this run's data, and let it go; collective.

        Raises:
            ValueError: If values are lacking and it cannot be asked, or one is not finite.
        """
        values, data = self.cached, datamodule_of(module._trainer)
        if values is None or values.is_of(data):
            return
        about = {**self.fingerprint, "precision": str(module.trainer.precision)}

        def score(rows: Sequence[Row], calls: int) -> list[Values]:
            return self._asked(module, rows, calls)

        together = all_ranks_run_model(module.trainer.strategy)
        values.fill(module.trainer, data, about, self.probe, score, together=together)
        if self.layers is not None:
            if _can_ask(module.trainer.strategy):  # and has set it up
                let_go(module.trainer.strategy, list(self.layers.model.parameters()))
            self.layers = None
            gc.collect()  # a sharded model is part of cycles

    def _asked(self, module: DPOModule, rows: Sequence[Row], calls: int) -> list[Values]:
        assert self.cached is not None
        if not _can_ask(module.trainer.strategy):
            rule = (
                f"{self.cached.url} lacks values, and the reference cannot be asked for them under"
                f" {type(module.trainer.strategy).__name__}, which spreads the models"
            )
            way_out = "Fill the cache on one device or with DDP, with the same data and precision"
            raise argument_error(self.where, "precompute_ref_log_probs", True, rule, way_out)
        is_policy = self.is_policy or self.lacks_adapters
        layers = self.layers or (module.layers if is_policy else None)
        if layers is None:
            rule = (
                f"{self.cached.url} lacks values of the reference (precision"
                f" {module.trainer.precision!r}), which is no longer at hand: it was released, or"
                " was the policy, which has moved on"
            )
            way_out = (
                "Pass the model that training began with as ref_model, bring the cache back, or run"
                " with the data and the precision that it was filled with"
            )
            raise argument_error(self.where, "ref_model", None, rule, way_out)
        precision = module.trainer.strategy.precision_plugin
        batch_size = 2 * getattr(datamodule_of(module.trainer), "batch_size", 4)
        off = self.asked(module.model)
        scored = partial(
            score_rows,
            layers,
            rows,
            calls=calls,
            batch_size=batch_size,
            chunk_size=module.chunk_size,
            device=module.device,
            where=self.where,
        )
        with torch.no_grad(), evaluating(layers.model), precision.forward_context(), off:
            values: list[Values] = as_forward(layers.model, scored)
        return values

    def follow(self, policy: nn.Module, number: int) -> None:
        """After the optimizer step of this number: take on some of the policy, if it is time."""
        if self.sync is not None and self.layers is not None:
            self.sync.after_step(number, self.layers.model, policy)

    # In checkpoints

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put into a checkpoint which one it is, and its weights if they follow the policy.

        Collective, where ranks hold parts of them: a checkpoint has the whole, which rank 0 gathers
        in host memory, and a state to go back to in mid-fit each rank's parts.
        """
        checkpoint["reference"] = self.fingerprint
        if self.sync is None or self.layers is None:
            return
        model = self.layers.model
        if not is_sharded(model):
            checkpoint["reference_state"] = model.state_dict()
        elif is_own_state(checkpoint):
            parts = {name: own_part(value) for name, value in model.state_dict().items()}
            checkpoint["reference_parts"] = parts
        else:
            checkpoint["reference_state"] = whole_state(model)

    def load(self, checkpoint: dict[str, Any], policy: nn.Module) -> None:
        """Compare with the reference of a checkpoint.

        Args:
            checkpoint: Its ``reference`` is a fingerprint.
            policy: The model in training, with the values that it was built with.

        Raises:
            ValueError: If it is another one.
        """
        saved = checkpoint.get("reference")
        if self._load_state(checkpoint):
            return
        layers = self.layers
        model = policy if self.is_policy else None if layers is None else layers.model
        self.is_policy &= not checkpoint.get("global_step", 0)
        if self.lacks_adapters and self.cached is None:  # the checkpoint holds it
            self.fingerprint = saved or self.fingerprint
            return
        if isinstance(saved, str):
            self._check_older(saved, model)
        else:
            self._saved = saved or {}
            self._check_saved()

    def _load_state(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a checkpoint holds the reference itself, which this one then is."""
        parts: dict[str, Any] | None = checkpoint.get("reference_parts")  # of this rank
        state: dict[str, Any] | None = checkpoint.get("reference_state", parts)
        if state is None:
            return False
        if self.sync is None or self.layers is None:
            rule = "the reference of the checkpoint has followed its model"
            way_out = "Set it to True, or train against a ref_model of its own from other weights"
            raise argument_error(self.where, "sync_ref_model", False, rule, way_out)
        model = self.layers.model
        if parts is not None:
            put_parts(model, parts)
        elif is_sharded(model):
            load_whole_state(model, state)
        else:
            model.load_state_dict(state)
        self.fingerprint = checkpoint["reference"]  # of what it began as
        return True

    def _check_saved(self) -> None:
        """Refuse a reference that is not the checkpoint's, as soon as both are known."""
        saved, ours = self._saved, self.fingerprint
        if saved and ours and saved != ours:
            what = " and ".join(name for name in ours if saved.get(name) != ours[name])
            raise self._error(f"another reference, which differs in its {what}")

    def _check_older(self, saved: str, model: nn.Module | None) -> None:
        """An older version's hash tells most other weights apart, unless these were cast since."""
        if model is not None:
            is_cast = {parameter.dtype for parameter in model.parameters()} != self._dtypes
            if saved and not is_cast and saved != fingerprint_until_0_1(model):
                raise self._error("another reference")
        warnings.warn(
            "the checkpoint is of an older version, which knew little of its reference: whether"
            " this is the model that training began with cannot be told for certain",
            stacklevel=2,
        )

    def _error(self, what: str) -> ValueError:
        rule = f"the checkpoint was trained against {what}"
        way_out = "Pass the model that training began with as ref_model"
        name = None if self.layers is None else type(self.layers.model).__name__
        return argument_error(self.where, "ref_model", name, rule, way_out)


def _in_memory(strategy: Strategy, tensor: Tensor) -> AbstractContextManager[None]:
    """Around code that reads a tensor, which may be a parameter that is away."""
    is_away = isinstance(tensor, Away)
    return gathered(strategy, [cast(nn.Parameter, tensor)]) if is_away else nullcontext()


def _can_ask(strategy: Strategy) -> bool:
    """Whether ranks can run a model that the strategy has set up, alone or all together."""
    spreads = isinstance(strategy, SpreadsModel)
    return not spreads or one_rank_runs_model(strategy) or all_ranks_run_model(strategy)


def build_reference(
    where: str,
    policy: ModelLayers,
    ref_model: nn.Module | str | PretrainedConfig | None,
    loading: Loading,
    *,
    needs_reference: bool,
    precompute: bool,
    cache_dir: str | None,
    sync: tuple[bool, float, int],
) -> FrozenReference:
    """The reference that a module's arguments ask for, of a policy that has not learned yet.

    Args:
        where: Class the user called.
        policy: The model in training.
        ref_model: What it is to be; None for what the policy is now.
        loading: How it is loaded or built, if it is not given as a module.
        needs_reference: Whether the loss asks for one.
        precompute: Whether it runs before training alone.
        cache_dir: Where what it then says is kept; None for a folder of the user's.
        sync: Whether it follows the policy, with which weight and how often.

    Raises:
        ValueError: If it cannot be loaded, cannot follow, or is none for this policy.
    """
    cached: PrecomputedReference | None = None
    if precompute:
        cached = PrecomputedReference(where, cache_dir or str(default_cache_dir() / "reference"))
    adapters = has_adapters(policy.model)
    asked = {"needs_reference": needs_reference, "precomputed": precompute, "adapters": adapters}
    reference = FrozenReference(where, cached, sync_of(*sync, where=where, **asked))
    if ref_model is not None:
        built = build_model(ref_model, where=where, argument="ref_model", **loading)
        reference.adopt(built, policy)
    elif needs_reference and adapters:
        reference.adopt_without_adapters(policy)
    elif cached is not None:
        reference.adopt_policy(policy.model)
    elif needs_reference:
        reference.adopt(copy.deepcopy(policy.model), policy, is_copy=True)
    return reference


def check_reference_arguments(
    where: str, options: PreferenceOptions, ref_model: object, precompute: bool, url: str | None
) -> None:
    """Refuse arguments about a reference that would do nothing, or cannot be had together.

    Raises:
        ValueError: If there is one.
    """
    argument = "precompute_ref_log_probs"
    if url is not None and not precompute:
        raise argument_error(where, "ref_cache_dir", url, f"serves {argument}=True alone")
    if not options.needs_reference:
        free = f"loss_type={options.loss_type!r}, which needs none"
        free = "reference_free=True" if options.reference_free else free
        if precompute:
            raise argument_error(where, argument, True, f"does nothing with {free}")
        if ref_model is not None:
            rule = f"must be None with {free}"
            raise argument_error(where, "ref_model", type(ref_model).__name__, rule)
    if precompute and "kto" in options.loss_types:
        rule = (
            "does not go with 'kto', whose KL is estimated from completions that are drawn"
            " anew for each batch"
        )
        raise argument_error(where, argument, True, rule, "Use 'apo_zero_unpaired'")


def revision_of(
    where: str, ref_model: object, revision: str | None, model: object, of_model: str
) -> str:
    """At which branch, tag or commit a reference is read that is a name on the hub.

    Args:
        where: Class the user called.
        ref_model: As the user gave it.
        revision: The same; None for the model's own where both have one name, and else main.
        model: The policy, as the user gave it.
        of_model: Its revision.

    Raises:
        ValueError: If there is one, and no name.
    """
    if revision is not None and not isinstance(ref_model, str):
        rule = f"serves a name on the hub alone, and ref_model is {type(ref_model).__name__}"
        raise argument_error(where, "ref_model_revision", revision, rule)
    is_same = isinstance(ref_model, str) and ref_model == model
    return revision or (of_model if is_same else "main")


def turn_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, also those that attention kernels are called with.

    Adapters keep theirs, which is asked for by name and is off with them in the reference.
    """
    adapters = own_modules(model)
    for module in model.modules():
        if module in adapters:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
