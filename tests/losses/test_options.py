"""PreferenceOptions: checked once, frozen, and no option of another loss goes unnoticed."""

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from lightning_align import DPOModule
from lightning_align.losses import LOSSES, CompletionScores, PairScores, PreferenceOptions
from lightning_align.losses.options import ALL_READS, READS, UNPAIRED_READS, PreferenceArguments
from lightning_align.losses.unpaired import UNPAIRED_LOSSES

# What is done with the scores before a loss sees them, or with its losses after.
AROUND = {"reference_free", "ld_alpha", "use_weighting"}
# Everything that can be asked of an option shows in one of these.
REVEALING = [{}, {"f_divergence_type": "alpha_divergence"}, {"length_alpha": 0.1}]


class Watched:
    """Options, or scores, that remember what was asked of them."""

    def __init__(self, watched, asked):
        self._watched, self._asked = watched, asked

    def __getattr__(self, name):
        self._asked.add(name)
        value = getattr(self._watched, name)
        return Watched(value, self._asked) if isinstance(value, CompletionScores) else value

    def per_token(self, values):
        self._asked.add("lengths")
        return self._watched.per_token(values)


def asked_by(loss_type, **changes):
    completions = [CompletionScores(*torch.randn(2, 3), torch.tensor([1, 2, 3])) for _ in range(2)]
    changes |= {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
    options, scores = PreferenceOptions(loss_type, **changes), PairScores(*completions)
    asked = set()
    LOSSES[loss_type](Watched(scores, asked), Watched(options, asked))
    return asked


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_reads_what_the_table_says(loss_type):
    able = [
        changes
        for changes in REVEALING
        if "f_divergence_type" not in changes or "f_divergence_type" in READS[loss_type]
    ]
    asked = set().union(*(asked_by(loss_type, **changes) for changes in able))
    scores = {"margin", "logratios", "chosen", "rejected", "logps", "token_logps", "ref_logps"}
    lengths_of_r_dpo = {"lengths"} if "length_alpha" in READS[loss_type] else set()
    assert asked - scores - lengths_of_r_dpo == set(READS[loss_type]) - AROUND - lengths_of_r_dpo
    assert ("lengths" in asked_by(loss_type)) == ("lengths" in READS[loss_type])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_asks_for_a_reference_as_the_table_says(loss_type):
    asked = asked_by(loss_type)
    assert bool(asked & {"margin", "logratios", "ref_logps"}) == (
        "reference_free" in READS[loss_type]
    )


def test_the_tables_have_every_loss():
    assert READS.keys() == LOSSES.keys()
    assert UNPAIRED_READS.keys() == UNPAIRED_LOSSES.keys()


@pytest.mark.parametrize("name", ["cdpo", "sft", "kto"])
def test_options_that_are_read_are_options(name):
    names = {option.name for option in fields(PreferenceOptions)} | {"lengths"}
    assert set(ALL_READS[name]) <= names


def test_functions_and_the_module_take_every_option():
    """As keywords with the same defaults; a new option that one of them lacked would be lost."""
    options = {option.name: option for option in fields(PreferenceOptions)}
    assert PreferenceArguments.__annotations__.keys() == options.keys()
    taken = inspect.signature(DPOModule.__init__).parameters
    for name, option in options.items():
        assert taken[name].default == option.default, name


def test_options_are_what_they_were_checked_to_be():
    options = PreferenceOptions("cdpo", beta=0.3, label_smoothing=0.1)
    with pytest.raises(FrozenInstanceError):
        options.beta = -1.0
    assert options == PreferenceOptions("cdpo", 0.3, 0.1, where="elsewhere")


def test_lists_are_kept_as_they_were():
    """A list that is changed afterwards would go round the check."""
    names, weights = ["sigmoid", "sft"], [1.0, 0.2]
    options = PreferenceOptions(names, loss_weights=weights)
    names[0], weights[0] = "nothing", 0.0
    assert options.loss_types == ("sigmoid", "sft")
    assert options.weights == (1.0, 0.2)
    assert PreferenceOptions(["sigmoid", "sft"]).weights == (1.0, 1.0)


def test_what_a_list_of_losses_asks_for():
    assert PreferenceOptions(["simpo", "sft"]).needs_reference is False
    assert PreferenceOptions(["simpo", "sigmoid"]).needs_reference is True
    assert PreferenceOptions(["simpo", "sigmoid"], reference_free=True).needs_reference is False
    assert PreferenceOptions(["sigmoid", "aot", "sft"]).coupled_losses == ["aot", "sft"]
    assert PreferenceOptions(["sigmoid", "sft"], sft_mean="pairs").coupled_losses == []
    assert PreferenceOptions("kto").coupled_losses == ["kto"]
    assert PreferenceOptions("kto").is_unpaired
    assert not PreferenceOptions(["sigmoid", "sft"]).is_unpaired


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simgoid"}, r"loss_type='simgoid'\): must be one of.*nearest is 'sigmoid'"),
        ({"loss_type": "DPO"}, r"loss_type='DPO'\): must be one of.*nearest is 'cdpo'"),
        ({"loss_type": ["sigmoid", "stf"]}, r"loss_type=\['sigmoid', 'stf'\]\).*nearest is 'sft'"),
        ({"loss_type": []}, r"loss_type=\[\]\): must name at least one loss"),
        ({"loss_type": ["sft", "sft"]}, "must name each loss once"),
        ({"loss_type": ["kto", "sft"]}, "losses of unpaired records.* stand alone"),
        ({"loss_weights": [1, 1]}, r"loss_weights=\[1, 1\]\): must have one weight for each loss"),
        ({"loss_weights": [0.0]}, r"loss_weights=\[0.0\]\): must be finite numbers, not all 0"),
        ({"loss_weights": [float("nan")]}, "must be finite numbers, not all 0"),
        ({"loss_type": "exo_pair"}, r"label_smoothing=0.0\): must be above 0 with exo_pair"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5\): must be in \[0, 0.5\)"),
        ({"discopop_tau": 0.0}, r"discopop_tau=0.0\): must be positive"),
        ({"simpo_gamma": float("inf")}, r"simpo_gamma=inf\): must be a finite number"),
        ({"length_alpha": float("nan")}, r"length_alpha=nan\): must be a finite number"),
        ({"desirable_weight": -1.0}, r"desirable_weight=-1.0\): must be a finite number, not neg"),
        ({"ld_alpha": 1.5}, r"ld_alpha=1.5\): must be None or in \[0, 1\]"),
        ({"sft_mean": "rows"}, r"sft_mean='rows'\): must be one of 'tokens', 'pairs'"),
        ({"f_divergence_type": "kl"}, r"f_divergence_type='kl'\): must be one of 'reverse_kl', 'f"),
        (
            {"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "bco_pair"]},
            r"must be 'reverse_kl' with 'bco_pair': the constant.*Losses of the margin are cdpo, d",
        ),
        ({"use_weighting": True, "loss_type": ["sigmoid", "aot"]}, "must be False with 'aot'"),
        ({"use_weighting": True, "loss_type": "kto"}, "must be False with 'kto'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=rf"PreferenceOptions\(.*{message}"):
        PreferenceOptions(**options)


def test_sft_beside_a_loss_of_the_margin_takes_its_divergence_on():
    """It has no reward that a divergence could change; TRL allows it, too."""
    options = PreferenceOptions(["sigmoid", "sft"], f_divergence_type="js_divergence")
    assert options.loss_types == ("sigmoid", "sft")


IDLE = [
    ({"label_smoothing": 0.1}, r"label_smoothing=0.1\): must be 0 with loss_type='sigmoid'.*cdpo"),
    ({"simpo_gamma": 1.0}, r"simpo_gamma=1.0\): must be 0.5.*Use 'alphapo' or 'simpo'"),
    ({"f_alpha_divergence_coef": 0.3}, r"f_divergence_type='reverse_kl'.*'alpha_divergence'"),
    ({"loss_type": "sft", "beta": 0.3}, r"beta=0.3\): must be 0.1 with loss_type='sft'"),
    ({"loss_type": "cpo", "reference_free": True}, r"reference_free=True\): must be False"),
    ({"loss_type": "aot", "length_alpha": 0.1}, r"length_alpha=0.1\): must be 0.0"),
    ({"loss_type": "kto", "ld_alpha": 0.5}, r"ld_alpha=0.5\): must be None"),
    ({"desirable_weight": 2.0}, r"Use 'apo_zero_unpaired' or 'kto'"),
    ({"loss_type": ["sigmoid", "simpo"], "sft_mean": "pairs"}, "sft_mean='pairs'.*Use 'sft'"),
]


@pytest.mark.parametrize(("options", "message"), IDLE)
def test_options_that_would_do_nothing_are_refused_where_they_are_meant(options, message):
    """Functions take every option with every loss, as a caller's table of experiments does."""
    idle = PreferenceOptions(**options)
    with pytest.raises(ValueError, match=rf"DPOModule\(.*{message}"):
        idle.refuse_idle("DPOModule")


def test_an_option_that_serves_one_loss_of_a_list_is_not_idle():
    options = PreferenceOptions(
        ["sigmoid", "simpo", "sft"],
        label_smoothing=0.1,
        simpo_gamma=1.0,
        sft_mean="pairs",
        f_divergence_type="reverse_kl",
        length_alpha=0.01,
        ld_alpha=0.5,
        use_weighting=True,
        reference_free=True,
    )
    options.refuse_idle("DPOModule")
