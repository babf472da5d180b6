"""Members that break a law on purpose: a law that lets them through would be worth nothing."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, get_worker_info

from lightning_align import PipelineStrategy
from lightning_align.modules.text_data import TextDataModule
from tests.laws.members import DATAMODULES as LAWFUL
from tests.laws.members import HandWritten, Member, spec

HERE = "tests.laws.broken."


# Resume


class ForgetfulCallback(pl.Callback):
    """Weakens gradients more and more, by a count that no checkpoint holds."""

    def __init__(self) -> None:
        self.count = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: nn.Module, optimizer: Any
    ) -> None:
        self.count += 1
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.count


GENERATOR = torch.Generator().manual_seed(0)


class OwnGenerator(HandWritten):
    """Draws from a generator outside of it, not reseeded with the position, nor saved."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch) * torch.rand((), generator=GENERATOR)


class OrdinaryLoader(TextDataModule):
    """Shuffles as everybody does: by a generator that goes on from epoch to epoch."""

    def train_dataloader(self) -> Any:
        dataset = self.train_dataset
        samples: list[int] = list(range(len(dataset)))  # type: ignore[arg-type]
        return DataLoader(
            samples,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=True,
            collate_fn=lambda indices: dataset[indices],  # type: ignore[index]
        )


class OwnDraws(TextDataModule):
    """Draws its samples from a generator that nobody seeds or saves."""

    def train_dataloader(self) -> Any:
        dataset = self.train_dataset

        def draw(indices: list[int]) -> dict[str, Tensor]:
            drawn = torch.randint(len(dataset), (len(indices),), generator=GENERATOR)  # type: ignore[arg-type]
            return dataset[drawn.tolist()]  # type: ignore[index]

        return DataLoader(range(len(dataset)), self.batch_size, collate_fn=draw)  # type: ignore[arg-type]


class WorkerDependent(TextDataModule):
    """Its samples are not the same in a worker process."""

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.train_dataset = MarkedByWorkers(self.train_dataset)


class MarkedByWorkers:
    """A dataset that a worker process spoils."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Any) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.dataset[indices]
        if get_worker_info() is not None:
            batch["input_ids"] = batch["input_ids"] + 1
        return batch


class DeafToSeed(TextDataModule):
    """Takes a seed and leaves it at that."""

    def __init__(self, seed: int = 0, **arguments: Any) -> None:
        super().__init__(seed=0, **arguments)


class ObligingData(TextDataModule):
    """Resumes any run, from the beginning."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class ForgetfulAdamW(torch.optim.AdamW):
    """Begins anew with every load."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({**state_dict, "state": {}})


# Optimizers


class NoisyAdamW(torch.optim.AdamW):
    """Not a function of its gradients."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += 1e-3 * torch.randn_like(parameter)
        return super().step(closure)


class WideningAdamW(torch.optim.AdamW):
    """Leaves its parameters in double precision after a while."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state[parameter]["step"] == 2:
                    parameter.data = parameter.data.double()
        return result


class GreedyAdamW(torch.optim.AdamW):
    """Insists on a gradient for every parameter."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            assert all(parameter.grad is not None for parameter in group["params"])
        return super().step(closure)


class CountingAdamW(torch.optim.AdamW):
    """Counts its steps, those without a gradient too."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        first = self.param_groups[0]
        first["steps"] = first.get("steps", 0) + 1
        return super().step(closure)


class Keepsake:
    """An object that no safe unpickler knows."""


class PicklingAdamW(torch.optim.AdamW):
    """Keeps something in its state that is neither a tensor nor a number."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "keepsake": Keepsake()}


class StubbornAdamW(torch.optim.AdamW):
    """Puts back what it was given, whatever hooks made of it."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state, saved in zip(self.state.values(), state_dict["state"].values(), strict=True):
            state.update(saved)


class ObligingSGD(torch.optim.SGD):
    """Takes any state, without a word."""

    def load_state_dict(self, state_dict: Any) -> None:
        pass


# Callbacks, strategies, modules


class SecretiveCallback(pl.Callback):
    """Its state comes back as another one."""

    def state_dict(self) -> dict[str, Any]:
        return {"object": id(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Weaken(pl.Callback):
    """Divides the gradients; not neutral, whatever it says of itself."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: nn.Module, optimizer: Any
    ) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1000


class Sign(pl.Callback):
    """Keeps the signs of the gradients: before Weaken it is not what it is after it."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: nn.Module, optimizer: Any
    ) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.sign_()


class Louder(SingleDeviceStrategy):
    """Hands another gradient to the backward pass."""

    def __init__(self) -> None:
        super().__init__(device="cpu")

    def pre_backward(self, closure_loss: Tensor) -> None:
        closure_loss.register_hook(lambda gradient: 2 * gradient)


class Untied(PipelineStrategy):
    """Lets each stage train tied embeddings by its own part of their gradient."""

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        assert self._ownership is not None
        vars(self._ownership)["sum_shared_gradients"] = lambda: None


class Unsynchronised(DDPStrategy):
    """Every rank learns from its own batches only."""

    def __init__(self) -> None:
        super().__init__(start_method="fork", find_unused_parameters=False)

    def configure_ddp(self) -> None:
        pass


class OtherUnderYaml(HandWritten):
    """Learns something else when a command line has built it."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch) * (2.0 if self.hparams else 1.0)

    def __init__(self, optimizer: OptimizerCallable, dropout: float = 0.0) -> None:
        super().__init__(optimizer, dropout)
        from lightning_align._compat.lightning_trainer import built_by_cli

        if built_by_cli():
            self.save_hyperparameters("dropout")


def callback(name: str, **init_args: Any) -> Member:
    return Member(name, spec(HERE + name, **init_args))


OWN_GENERATOR = Member("OwnGenerator", spec(HERE + "OwnGenerator", dropout=0.0), sums=False)
FORGETFUL_ADAMW = Member("ForgetfulAdamW", spec(HERE + "ForgetfulAdamW", lr=1e-2))
OTHER_UNDER_YAML = Member("OtherUnderYaml", spec(HERE + "OtherUnderYaml", dropout=0.0))
SGD = Member("SGD", spec("torch.optim.SGD", lr=0.1))
LOUDER = Member("Louder", spec(HERE + "Louder"))
UNSYNCHRONISED = Member("Unsynchronised", spec(HERE + "Unsynchronised"), ranks=2)
UNTIED = Member("Untied", spec(HERE + "Untied", start_method="fork"), ranks=2, splits_batch=False)
OWN_DRAWS = Member("OwnDraws", spec(HERE + "OwnDraws", **LAWFUL[0].spec["init_args"]))

DATAMODULES = {
    law: Member(name, spec(HERE + name, **LAWFUL[0].spec["init_args"]))
    for law, name in {
        "starts anywhere": "OrdinaryLoader",
        "any number of workers": "WorkerDependent",
        "follows its seed": "DeafToSeed",
        "state round-trips, other runs' is refused": "ObligingData",
        "every sample once, over the ranks": "OrdinaryLoader",
    }.items()
}
