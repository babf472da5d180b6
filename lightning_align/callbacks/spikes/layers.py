"""What each layer does, step by step: a few figures in a ring on the device, read at an incident.

Nothing here waits for the device, or writes to what training uses. Where each rank has a part of
every parameter, the sums behind the figures of layers are added up over the ranks, some numbers for
each layer, so that all of them have the same ring. Norms of gradients and weights
are over all elements, one fused pass each: of gradients in every step, since which layer left its
history first is told by the step; of weights in few, since nothing but a step should write to them.
What needs the weights of two moments, or the second moment, is estimated from a fixed sample of
each parameter, so no copy of a model is made.

Shapes: P parameters, S sampled elements of all parameters, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_align.layers.find import find_language_models, find_layers, kept_layers
from lightning_align.layers.map import ModelLayers
from lightning_align.layers.parts import find_parts
from lightning_align.layers.sharding import is_cut_for_all, own_part
from lightning_align.spike_causes import Histories

ABSENT = -1.0  # in the ring: there is none, as of a layer that is frozen
FIGURES = ("grad_norms", "gradient_ratios", "updates", "outside", "weight_norms", "moved")
GRAD_NORM, RATIO, UPDATE, OUTSIDE, WEIGHT_NORM, MOVED = range(6)
WEIGH_EVERY = 8  # steps between norms of weights: what steps add up to meanwhile is still small


class LayerFigures:
    """Figures of every layer for the latest steps.

    Args:
        module: Whose parameters they are of; those on meta are other ranks'. What is complex or not
            initialized is not looked at, nor is a gradient that is sparse.
        window: Steps that are remembered.
        sample: Elements of each parameter that stand for all; of its part on each rank.
        total: Adds a tensor up over so many ranks, which have parts of parameters; what is whole on
            each is then not looked at. Collective, as the methods are then, too.
        ranks: How many.

    Attributes:
        layers: Names in the order of the forward, other ranks' layers included.
        parameters: Those that are looked at.
    """

    def __init__(
        self,
        module: nn.Module,
        window: int = 128,
        sample: int = 256,
        *,
        total: Callable[[Tensor], Tensor] | None = None,
        ranks: int = 1,
    ) -> None:
        names = layer_of_parameters(module)
        self.layers = list(dict.fromkeys(names.values()))
        numbers = {layer: number for number, layer in enumerate(self.layers)}
        here = {n: p for n, p in module.named_parameters() if _is_looked_at(p)}
        if total is not None:
            here = {name: p for name, p in here.items() if is_cut_for_all(p, ranks)}
        device = next((p.device for p in here.values()), torch.device("cpu"))
        here = {name: p for name, p in here.items() if p.device == device}
        self.parameters: list[Tensor] = list(here.values())
        self._sample, self._window, self._device, self._total = sample, window, device, total
        # In fp32 whatever is narrower; what is wider is not narrowed in the kernel.
        wide = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        self._norm_dtype = None if wide else torch.float32
        self._layer_P = torch.tensor([numbers[names[n]] for n in here], device=device).long()
        self._layer_S = self._layer_P[self._owners(self.parameters)]
        self.ring = torch.full((window, len(FIGURES), len(self.layers)), ABSENT, device=device)
        self.steps = 0
        self._weights_S: Tensor | None = None  # as the latest step left them
        self._moved_L = torch.zeros(len(self.layers), device=device)  # since they were weighed
        self._unweighed = WEIGH_EVERY  # steps since then
        self._ratio_places: tuple[list[int], Tensor, Tensor] | None = None

    @torch.no_grad()
    def before_step(self, optimizers: Iterable[Optimizer], *, is_alarm: bool = False) -> None:
        """Note gradients and weights just before a step, at an alarm all of both."""
        row = self.ring[self.steps % self._window].fill_(ABSENT)
        self.steps += 1
        if not self.parameters:
            return
        weights_S = self._samples(self.parameters)
        if self._weights_S is not None:
            row[OUTSIDE] = self._change(weights_S)
        self._weights_S = weights_S
        self._unweighed += 1
        if is_alarm or self._unweighed >= WEIGH_EVERY:
            row[WEIGHT_NORM] = self._norms(self.parameters, self._layer_P)
            is_elsewhere = row[WEIGHT_NORM] == ABSENT  # another rank says how far it has moved
            row[MOVED] = torch.where(is_elsewhere, ABSENT, self._moved_L)
            self._moved_L.zero_()
            self._unweighed = 0
        learning = [i for i, p in enumerate(self.parameters) if _has_gradient(p)]
        if learning:
            gradients = [self.parameters[i].grad for i in learning]
            row[GRAD_NORM] = self._norms(gradients, self._layer_P[learning])
            row[RATIO] = self._ratios(optimizers)

    @torch.no_grad()
    def after_step(self) -> None:
        """Note how far the step has moved the weights that ``before_step`` has seen."""
        if self._weights_S is not None:
            weights_S = self._samples(self.parameters)
            change_L = self._change(weights_S)
            self.ring[(self.steps - 1) % self._window, UPDATE] = change_L
            self._moved_L += change_L.clamp(min=0)  # ABSENT is below
            self._weights_S = weights_S

    def forget_weights(self) -> None:
        """Other weights have taken the place of these, which is nobody's step."""
        self._weights_S = None
        self._unweighed = WEIGH_EVERY  # the norms of before are of other weights

    def histories(self) -> dict[str, Histories]:
        """By figure and layer, the oldest step first and the latest last; waits for the device.

        A layer that has no figure in the latest step is left out, but of weights, whose norms are
        of some steps. An update of the latest step, which is yet to be taken, is NaN.
        """
        count = min(self.steps, self._window)
        order = [(self.steps - count + i) % self._window for i in range(count)]
        values = self.ring.cpu()[order].double().numpy()
        found: dict[str, Histories] = {figure: {} for figure in FIGURES}
        for at, figure in enumerate(FIGURES):
            for number, layer in enumerate(self.layers):
                history = values[:, at, number].tolist()
                is_here = (values[:, WEIGHT_NORM, number] != ABSENT).any()
                if is_here and at == UPDATE and history[-1] == ABSENT:
                    history[-1] = nan
                known = [value for value in history if value != ABSENT]
                if known and (at in (WEIGHT_NORM, MOVED) or history[-1] != ABSENT):
                    found[figure][layer] = known
        return found

    def _ratios(self, optimizers: Iterable[Optimizer]) -> Tensor:
        """RMS of g / sqrt(u) by layer, u the second moment with this gradient in it.

        u_t = beta2 * u + (1 - beta2) * g^2, bias corrected    (arXiv:2304.13013, Algorithm 2)
        """
        known = {id(p): i for i, p in enumerate(self.parameters) if _has_gradient(p)}
        adams = [each for each in _adam_states(optimizers) if id(each[0]) in known]
        if not adams:
            return self.ring.new_tensor(ABSENT)
        parameters, seconds, steps, betas = zip(*adams, strict=True)
        numbers = [known[id(parameter)] for parameter in parameters]
        if self._ratio_places is None or self._ratio_places[0] != numbers:
            owner_S = self._owners(parameters)
            layer_S = self._layer_P[self._to_device(torch.tensor(numbers))][owner_S]
            self._ratio_places = numbers, owner_S, layer_S
        _, owner_S, layer_S = self._ratio_places
        beta_S = self._to_device(torch.tensor(betas))[owner_S]
        steps_S = torch.stack([self._to_device(step) for step in steps])[owner_S]
        squares_S = self._samples([parameter.grad for parameter in parameters]).square()
        second_S = torch.lerp(squares_S, self._samples(seconds), beta_S)
        second_S = second_S / (1 - beta_S ** (steps_S + 1))
        return self._roots(squares_S / second_S.clamp(min=1e-30), layer_S, mean=True)

    def _norms(self, tensors: Iterable[Any], layer_P: Tensor) -> Tensor:
        norms: Any = torch._foreach_norm([own_part(each) for each in tensors], 2, self._norm_dtype)
        if self._norm_dtype is None:
            norms = [norm.float() for norm in norms]
        return self._roots(torch.stack(norms).square(), layer_P)

    def _change(self, weights_S: Tensor) -> Tensor:
        """RMS of the change since the latest sample over that of the weights, by layer."""
        assert self._weights_S is not None
        change_L = self._roots((weights_S - self._weights_S).square(), self._layer_S)
        size_L = self._roots(self._weights_S.square(), self._layer_S)
        return torch.where(size_L == ABSENT, ABSENT, change_L / size_L.clamp(min=1e-12))

    def _roots(self, squares: Tensor, layer: Tensor, mean: bool = False) -> Tensor:
        """Root of the sum, or mean, of the squares of each layer; ABSENT where it has none."""
        zeros_L = squares.new_zeros(len(self.layers))
        count_L = zeros_L.index_add(0, layer, torch.ones_like(squares))
        total_L = zeros_L.index_add(0, layer, squares)
        if self._total is not None:
            count_L, total_L = self._total(torch.stack([count_L, total_L]))
        total_L = total_L / count_L if mean else total_L
        return torch.where(count_L > 0, total_L.sqrt(), ABSENT)

    def _view(self, tensor: Tensor) -> Tensor:
        """Elements of a tensor at a fixed stride, without a copy where it is contiguous."""
        own: Tensor = own_part(tensor.detach())
        stride = max(1, -(-own.numel() // self._sample))  # a rank's part may be empty
        return own.reshape(-1)[::stride]

    def _samples(self, tensors: Iterable[Any]) -> Tensor:
        return torch.cat([self._view(tensor).float() for tensor in tensors])

    def _owners(self, tensors: Iterable[Any]) -> Tensor:
        """Of each sampled element the number of its tensor."""
        counts = torch.tensor([len(self._view(tensor)) for tensor in tensors]).long()
        return self._to_device(torch.repeat_interleave(counts))

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)


def _is_looked_at(parameter: nn.Parameter) -> bool:
    if is_lazy(parameter) or parameter.is_meta:
        return False
    return parameter.is_floating_point() and parameter.numel() > 0


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and not parameter.grad.is_sparse


def layer_of_parameters(module: nn.Module) -> dict[str, str]:
    """Parameter -> layer, both by name, the layers in the order of the forward.

    Layers are embedding, blocks and head of the language model that a module holds or is. What is
    in no language model goes by the parts of the module, of which lists give one for each item.
    """
    model = _language_model(module)
    names = {name: "" for name, _ in module.named_parameters()}
    if model is not None:
        names |= _parts_of(model, module)
    rest = [name for name, layer in names.items() if not layer]
    names |= {name: _part(module, name, rest) for name in rest}
    if model is None:
        return names
    order = [model.embedding_name, *model.block_names, model.head_name]
    prefix = _name_of(model.model, module)
    rank = {f"{prefix}{name}": number for number, name in enumerate(order)}
    # What is in no layer of the model is before it: towers of images, embeddings of one's own.
    return dict(sorted(names.items(), key=lambda pair: rank.get(pair[1], -1)))


def _language_model(module: nn.Module) -> ModelLayers | None:
    """The map of the one language model in a module, None where there is none to be read."""
    if (kept := kept_layers(module)) is not None:
        return kept
    models = list(find_language_models(module).values())
    try:
        return find_layers(models[0]) if len(models) == 1 else None
    except ValueError:
        return None


def _name_of(part: nn.Module, module: nn.Module) -> str:
    name = next(name for name, each in module.named_modules() if each is part)
    return f"{name}." if name else ""


def _parts_of(layers: ModelLayers, module: nn.Module) -> dict[str, str]:
    prefix, parts = _name_of(layers.model, module), find_parts(layers)
    owners = {
        layers.embedding_name: parts.embedding,
        **dict(zip(layers.block_names, parts.blocks, strict=True)),
        layers.head_name: parts.head,
    }
    return {f"{prefix}{n}": f"{prefix}{layer}" for layer, names in owners.items() for n in names}


def _part(module: nn.Module, name: str, names: list[str]) -> str:
    """The shortest name of a module around a parameter that is no module around all of them."""
    around: nn.Module = module
    found: list[str] = []
    for word in name.split(".")[:-1]:
        found.append(word)
        around = around.get_submodule(word)
        several = not all(each.startswith(".".join(found) + ".") for each in names)
        if several and not isinstance(around, (nn.ModuleList, nn.Sequential)):
            break
    return ".".join(found) or name


def _adam_states(optimizers: Iterable[Optimizer]) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """(parameter, second moment, steps that it has seen, beta2) of each that has a gradient."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                second, steps = state.get("exp_avg_sq"), state.get("step")
                if parameter.grad is None or second is None or steps is None:
                    continue
                # That of a projected gradient has another shape.
                if second.shape == parameter.shape and "betas" in group:
                    beta2 = float(group["betas"][1])
                    yield parameter, second, torch.as_tensor(steps, dtype=torch.float32), beta2
