"""Cutting a batch into pieces that fit, so that the cut never shows in the gradient."""

from __future__ import annotations

from collections.abc import Sequence


def cut_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows grouped so that every piece, padded to its longest row, has at most ``budget`` positions.

    Rows of like length go together (longest first), which keeps padding small. A row longer than the budget
    gets a piece of its own. Rows of length 0 are left out.

    Args:
        lengths: Tokens per row.
        budget: Positions (rows × longest row) per piece.

    Example:
        >>> cut_micro_batches([3, 9, 4, 8], budget=18)
        [[1, 3], [2, 0]]
    """
    if budget < 1:
        raise ValueError(f"micro_batch_tokens must be positive, got {budget}.")
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i])
    pieces: list[list[int]] = []
    for i in order:
        if pieces and (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] <= budget:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    return pieces


def split_minibatches(rows: int, parts: int) -> list[list[int]]:
    """``parts`` interleaved sets of row numbers, so that each mixes all prompts.

    Raises:
        ValueError: If there are fewer rows than parts.
    """
    if not 1 <= parts <= rows:
        raise ValueError(
            f"minibatches={parts} cannot be cut from {rows} rows: lower it or sample more rollouts."
        )
    return [list(range(start, rows, parts)) for start in range(parts)]
