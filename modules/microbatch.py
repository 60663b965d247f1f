"""Cutting a batch into pieces that fit, so that the cut never shows in the gradient."""

from __future__ import annotations

from collections.abc import Sequence

PIECE_COST = 512  # a piece's fixed cost, in positions: one more launch of every layer


def cut_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows grouped so that every piece, padded to its longest row, has at most ``budget`` positions.

    The cut minimises the positions computed, padding included, plus ``PIECE_COST`` per piece, over all cuts of the rows
    in order of length (dynamic programme; rows of one length move together except where the budget parts them). A row
    longer than the budget gets a piece of its own. Rows of length 0 are left out.

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
    # Thousands of short rows move in small blocks: the programme is quadratic.
    block = max(1, len(order) // 256)
    if order and block * lengths[order[0]] > budget:
        block = 1
    ends = [*range(block, len(order), block), len(order)] if order else []
    cuts = [0, *ends]
    # best[j]: least cost of the rows before cuts[j]; start[j]: the cut where the last of their pieces begins.
    best, start = [0.0], [0]
    for j in range(1, len(cuts)):
        cost, begin = float("inf"), j - 1
        for i in range(j - 1, -1, -1):
            positions = (cuts[j] - cuts[i]) * lengths[order[cuts[i]]]
            if positions > budget and j - i > 1:
                break  # longer rows and more of them only make it worse
            if best[i] + positions + PIECE_COST < cost:
                cost, begin = best[i] + positions + PIECE_COST, i
        best.append(cost)
        start.append(begin)
    pieces: list[list[int]] = []
    end = len(cuts) - 1
    while end > 0:
        pieces.append(order[cuts[start[end]] : cuts[end]])
        end = start[end]
    return pieces[::-1]


def cut_groups(lengths: Sequence[int], groups: Sequence[int], budget: int) -> list[list[int]]:
    """As :func:`cut_micro_batches`, with all rows of a group in one piece: for losses that compare rows.

    A group longer than the budget gets a piece of its own. Rows of length 0 are left out.

    Args:
        lengths: Tokens per row.
        groups: Group number per row.
        budget: Positions (rows × longest row) per piece.

    Example:
        >>> cut_groups([3, 9, 4, 8, 2], [0, 1, 0, 1, 2], budget=18)
        [[1, 3], [0, 2, 4]]
    """
    if budget < 1:
        raise ValueError(f"micro_batch_tokens must be positive, got {budget}.")
    members: dict[int, list[int]] = {}
    for row, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        if length > 0:
            members.setdefault(group, []).append(row)
    pieces: list[list[int]] = []
    longest = 0
    for rows in sorted(members.values(), key=lambda rows: -max(lengths[i] for i in rows)):
        if not pieces or (len(pieces[-1]) + len(rows)) * longest > budget:
            pieces.append([])
            longest = max(lengths[i] for i in rows)
        pieces[-1] += rows
    return pieces


def split_groups(groups: Sequence[int], parts: int) -> list[list[int]]:
    """``parts`` sets of row numbers, each with whole groups, interleaved as :func:`split_minibatches`' rows.

    Example:
        >>> split_groups([0, 0, 1, 2, 2], 2)
        [[0, 1, 3, 4], [2]]
    """
    part_of = {name: i % parts for i, name in enumerate(dict.fromkeys(groups))}
    return [[row for row, group in enumerate(groups) if part_of[group] == part] for part in range(parts)]


def split_minibatches(rows: int, parts: int) -> list[list[int]]:
    """``parts`` interleaved sets of row numbers, so that each mixes all prompts; the last are empty if rows are few.

    Example:
        >>> split_minibatches(5, 2)
        [[0, 2, 4], [1, 3]]
    """
    return [list(range(start, rows, parts)) for start in range(parts)]
