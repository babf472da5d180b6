"""What jsonargparse says in a page, said in a line: the sentences are those of version 4.53."""

import pytest
import torch

from lightning_align.did_you_mean import argument_names, did_you_mean, explain

UNION = """  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.datamodule.LightningDataModule'>, <class 'NoneType'>]
  Errors:
    - {}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {}"""


def page(sentence: str, given: str = "{}") -> str:
    return 'Parser key "data":\n' + UNION.format(sentence, given)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            page(
                "Problem with given class_path 'torch.optim.SGD':\n"
                "        Option 'momentm' is not accepted"
            ),
            "data.init_args.momentm: no such argument of SGD. Did you mean momentum?",
        ),
        (
            page(
                "Type typing.Callable[[x], y] expects a function or a callable class: Option 'lrr'"
                " is not accepted. Got value: Namespace(class_path='torch.optim.SGD', lrr=1)"
            ),
            "data.init_args.lrr: no such argument of SGD. Did you mean lr?",
        ),
        (
            page(
                "Problem with given class_path 'torch.optim.Sgd':\n"
                "        module 'torch.optim' has no attribute 'Sgd'"
            ),
            "data: no class Sgd in torch.optim. Did you mean SGD?",
        ),
        (
            page("Expected a dot import path string: Nonsense"),
            "data: no class of the name Nonsense. Give its full path.",
        ),
        (
            page(
                "Not a valid subclass of LightningDataModule", "{'clas_path': 'X', 'init_args': {}}"
            ),
            "data.clas_path: a LightningDataModule is given by class_path and init_args."
            " Did you mean class_path?",
        ),
        (
            page("Not a valid subclass of LightningDataModule", "Namespace(class_path='X', lr=1)"),
            "data.lr: a LightningDataModule is given by class_path and init_args."
            " Arguments of the class go under init_args.",
        ),
        (
            page(
                "Problem with given class_path 'torch.optim.SGD':\n"
                '        Parser key "lr":\n'
                "          Expected a <class 'float'>. Got value: fast"
            ),
            "data.init_args.lr: must be float, not fast.",
        ),
        (
            page(
                "Problem with given class_path 'a.B':\n"
                "        the following arguments are required: paths, tokenizer"
            ),
            "data.init_args.paths, data.init_args.tokenizer: must be given for B.",
        ),
        (
            page(
                "Import path torch.optim.SGD does not correspond to a subclass of LightningModule"
            ),
            "data: torch.optim.SGD is no LightningModule.",
        ),
        ("the following arguments are required: fit.model", "model: must be given."),
        (
            "Parser key \"config\": File does not exist: '/x/a.yaml'",
            "--config: there is no file /x/a.yaml.",
        ),
        (
            "Subcommand 'fit' does not accept option 'trainer.max_step'",
            "trainer.max_step: no such key of fit. Did you mean trainer.max_steps?",
        ),
        (
            "unrecognized arguments: --modle.optimizer.lr=3",
            "--modle.optimizer.lr: no such option. Did you mean --model.optimizer.lr?",
        ),
        (
            "argument subcommand: invalid choice: 'fitt' (choose from 'fit', 'test')",
            "fitt: no such command. Did you mean fit?",
        ),
        (
            "argument subcommand: invalid choice: 'x' (choose from fit, test)",
            "x: no such command. There are: fit, test.",
        ),
        ("a sentence that no version of jsonargparse has said", None),
    ],
)
def test_explains(message: str, line: str | None) -> None:
    options = ["--model", "--trainer.max_steps", "--trainer.max_epochs", "--data"]
    assert explain(message, options) == line


def test_the_deepest_mistake_counts() -> None:
    """A union tells of every type it tried; the one that got furthest is the one that was meant."""
    inner = (
        "Problem with given class_path 'a.Shallow':\n        Option 'shallow' is not accepted\n"
        "    - Problem with given class_path 'a.Deep':\n"
        '        Parser key "optimizer":\n'
        "          Problem with given class_path 'torch.optim.SGD':\n"
        "            Option 'deep' is not accepted"
    )
    line = explain(page(inner))
    assert line == "data.init_args.optimizer.init_args.deep: no such argument of SGD."


def test_short_names_of_subclasses_are_candidates() -> None:
    class Recognisable(torch.optim.Optimizer):
        pass

    message = page("Expected a dot import path string: Recognizable").replace(
        "lightning.pytorch.core.datamodule.LightningDataModule", "torch.optim.optimizer.Optimizer"
    )
    assert explain(message) == (
        "data: no class of the name Recognizable. Did you mean Recognisable?"
    )


def test_did_you_mean_ignores_case_and_keeps_quiet_when_nothing_is_near() -> None:
    assert did_you_mean("adamw", ["AdamW", "SGD"]) == " Did you mean AdamW?"
    assert did_you_mean("something else", ["AdamW", "SGD"]) == ""


def test_argument_names_of_what_cannot_be_imported() -> None:
    assert {"lr", "momentum"} <= set(argument_names("torch.optim.SGD"))
    assert argument_names("torch.optim.Nothing") == argument_names("nowhere.Nothing") == []
