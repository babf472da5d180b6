"""docs/from_trl.md: every field is there; where TRL 1.16 is wrong, both on one input."""

import copy
import inspect
import json
import math
import re
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import DPOModule, PreferenceDataModule
from tests.losses.test_dpo_matches_trl import PAIRS, make_models, make_tokenizer

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]
PAGE = Path(__file__).resolve().parents[1] / "docs/from_trl.md"


def rows_of_the_page():
    """Field and what is said about it, of all tables about fields."""
    part = PAGE.read_text().partition("## Every field")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", part, flags=re.M)
    return [(name, said) for names, said in rows for name in re.findall(r"`(\w+)`", names)]


def test_every_field_is_in_the_tables():
    import trl

    theirs = {field.name for field in fields(trl.DPOConfig) if field.init}
    ours = Counter(name for name, _ in rows_of_the_page())
    assert {name for name, number in ours.items() if number > 1} == set()
    assert sorted(theirs - ours.keys()) == []
    assert sorted(ours.keys() - theirs) == []
    assert all(said for _, said in rows_of_the_page())


def test_what_is_the_same_is_an_argument():
    homes = {
        "the same of `DPOModule`": DPOModule,
        "of `PreferenceDataModule`": PreferenceDataModule,
    }
    found = 0
    for name, said in rows_of_the_page():
        for beginning, home in homes.items():
            if said.startswith(beginning):
                assert name in inspect.signature(home).parameters, name
                found += 1
    assert found >= 14


def test_what_has_become_an_argument_is_no_longer_said_to_have_no_counterpart():
    ours = inspect.signature(DPOModule).parameters.keys()
    said = {name: text for name, text in rows_of_the_page() if name in ours}
    assert {name for name, text in said.items() if "of `DPOModule`" not in text} == set()


# Texts that begin with their prompt


def our_pair(folder, chosen, rejected, is_useless):
    """The texts of prompt, chosen and rejected; None if the pair is dropped, and counted."""
    from lightning_align.data.paths import find_files
    from lightning_align.data.preference import read_pairs
    from tests.helpers.byte_tokenizer import ByteTokenizer

    path = folder / "pair.jsonl"
    path.write_text(json.dumps({"chosen": chosen, "rejected": rejected}))
    options = {"max_length": 100, "append_eos": False}
    tokenizer = ByteTokenizer()
    files = find_files("here", "paths", str(path))
    if is_useless:
        with pytest.raises(ValueError, match=r"nothing is left \(1 of 1 pairs dropped"):
            read_pairs(files, tokenizer, **options)
        return None
    [pair] = read_pairs(files, tokenizer, **options)
    return tuple(tokenizer.decode(list(ids)) for ids in pair)


@pytest.mark.parametrize(
    ("chosen", "rejected", "theirs", "ours"),
    [
        # No beginning in common: the index -1 gives the rejected completion a prompt of the other.
        ("x y ", "z w", ("x y", " ", "w"), None),
        # Of a text that is the beginning of the other the last character is cut off.
        ("same", "same longer", ("sam", "e", "e longer"), ("sam", "e", "e longer")),
        # Two that are the same are kept, and teach nothing.
        ("abc", "abc", ("ab", "c", "c"), None),
        ("", "a", UnboundLocalError, None),
    ],
)
def test_extract_prompt(tmp_path, chosen, rejected, theirs, ours):
    """Whatever is made of two texts, its rows are these texts; what cannot be is dropped."""
    import trl

    def extract():
        parts = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
        return parts["prompt"], parts["chosen"], parts["rejected"]

    if isinstance(theirs, type):
        with pytest.raises(theirs):
            extract()
    else:
        assert extract() == theirs
    found = our_pair(tmp_path, chosen, rejected, is_useless=ours is None)
    assert found == ours
    if found is not None:
        assert (found[0] + found[1], found[0] + found[2]) == (chosen, rejected)


# The reference, precomputed


def write_pairs(folder):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def first_loss_of_trl(folder, path, cache, ld_alpha):
    """Of all pairs in one batch, before any step; the reference is a copy of the policy."""
    import trl
    from datasets import load_dataset

    model, _ = make_models("llama")
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        beta=0.3,
        max_length=None,
        ld_alpha=ld_alpha,
        precompute_ref_log_probs=True,
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=load_dataset(
            "json", data_files=str(path), split="train", cache_dir=str(cache)
        ),
        processing_class=make_tokenizer(),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    return float(trainer._compute_loss(trainer.model, batch, return_outputs=False))


def our_first_loss(path, cache, ld_alpha):
    module = DPOModule(
        make_models("llama")[0],
        beta=0.3,
        ld_alpha=ld_alpha,
        precompute_ref_log_probs=True,
        ref_cache_dir=str(cache),
    )
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, PreferenceDataModule(path, make_tokenizer(), batch_size=len(PAIRS)))
    return float(trainer.callback_metrics["train_loss"])


def quiet_trainer(**options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_a_cached_reference_with_another_ld_alpha(tmp_path):
    """Policy and reference are one model, so the first loss is log 2 for any ``ld_alpha``.

    TRL keeps sums that ``ld_alpha`` has weighed, under a name that does not know it.
    """
    path, cache = write_pairs(tmp_path), tmp_path / "cache"
    trl_loss = partial(first_loss_of_trl, tmp_path, path)
    assert trl_loss(cache, None) == pytest.approx(math.log(2), abs=1e-5)
    assert abs(trl_loss(cache, 0.0) - math.log(2)) > 0.1
    assert trl_loss(tmp_path / "another", 0.0) == pytest.approx(math.log(2), abs=1e-5)
    for ld_alpha in (None, 0.0):
        loss = our_first_loss(path, tmp_path / "ours", ld_alpha)
        assert loss == pytest.approx(math.log(2), abs=1e-5)


# Means under accumulation


def trl_step(folder, **options):
    """What one step changes in the weights, in the model's order."""
    import trl
    from datasets import Dataset

    model, reference = make_models("llama")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        beta=0.3,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **options,
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    after = trainer.accelerator.unwrap_model(trainer.model).parameters()
    change = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    return change.detach(), [{**batch} for batch in batches]


def our_step(batches):
    model, reference = make_models("llama")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    module = DPOModule(model, reference, beta=0.3, optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=len(batches))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    pairs = zip(module.model.parameters(), before, strict=True)
    return torch.cat([(a - b).flatten() for a, b in pairs]).detach()


def test_means_under_accumulation(tmp_path):
    """Three pairs in one batch, and the same as two and one, accumulated: the same step.

    Of TRL's mean of two means the third pair has half, not a third.
    """
    whole, one_batch = trl_step(tmp_path, per_device_train_batch_size=3)
    parts, two_batches = trl_step(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert [len(batch["input_ids"]) for batch in one_batch + two_batches] == [6, 4, 2]

    def apart(one, other):
        return float((one - other).norm() / whole.norm())

    # fp32 sums in another order.
    assert apart(our_step(one_batch), whole) < 1e-4
    assert apart(our_step(two_batches), whole) < 1e-4
    assert apart(parts, whole) > 0.05
