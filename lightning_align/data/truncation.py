"""What is left of a row that is too long: its beginning, or its end (TRL's truncation modes)."""

from __future__ import annotations

from collections import Counter

from lightning_align.data.samples import Ids

TRUNCATION_MODES = ("keep_start", "keep_end")


def cut_row(prompt: Ids, completion: Ids, max_length: int, truncation_mode: str) -> tuple[Ids, Ids]:
    """The first or the last tokens of a prompt with its completion.

    Args:
        prompt: Tokens of the prompt.
        completion: Tokens of the completion.
        max_length: Tokens that both may have together, at least 1.
        truncation_mode: One of ``TRUNCATION_MODES``.

    Example:
        >>> import numpy as np
        >>> prompt, completion = np.arange(3), np.arange(3, 5)
        >>> [part.tolist() for part in cut_row(prompt, completion, 4, "keep_start")]
        [[0, 1, 2], [3]]
        >>> [part.tolist() for part in cut_row(prompt, completion, 4, "keep_end")]
        [[1, 2], [3, 4]]
    """
    if truncation_mode == "keep_start":
        prompt = prompt[:max_length]
        return prompt, completion[: max_length - len(prompt)]
    completion = completion[-max_length:]
    return prompt[max(0, len(prompt) + len(completion) - max_length) :], completion


def count_cut(lost: Counter[str], whole: tuple[Ids, Ids], kept: tuple[Ids, Ids]) -> None:
    """Count what a row has lost.

    Args:
        lost: Rows by what they have lost.
        whole: Prompt and completion as they were read.
        kept: The same, cut.
    """
    prompt, completion = (
        len(before) - len(after) for before, after in zip(whole, kept, strict=True)
    )
    if prompt:
        lost["the beginning of the prompt" if len(kept[0]) else "the whole prompt"] += 1
    elif completion:
        lost["the end of the completion"] += 1
