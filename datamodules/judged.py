"""What a discriminator reads: text, encoded one way, whoever wrote it.

A sampled response may be made of tokens that no tokenizer would choose, and end by length where the teacher's ends by
EOS: both would tell the two apart without a word being read. So every response is encoded anew from its text, closed
by the same EOS, and cut at the same length; the policy's loss keeps the ids it sampled. (An error on the trainer's side
to do so for *policy* tokens; here it is the point.)

Legend: ``B`` rows, ``T`` positions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_onpolicy.datamodules.batch import Completion, Group, Prompt, RolloutBatch, collate
from lightning_onpolicy.datamodules.prompts import PromptStream

PREFERRED = "preferred"  # [B] bool in ``extra``: the side that is to have the higher score


def judged_ids(
    tokenizer: Any, text: str, *, ended: bool, limit: int | None, eos_id: int
) -> tuple[list[int], bool]:
    """Token ids of a response, and whether they end it: EOS follows if it ended and fits. An empty one is its EOS.

    Args:
        tokenizer: The discriminator's.
        text: The response.
        ended: Whether it ended by itself.
        limit: Most tokens, EOS included; a longer response is cut and then has no EOS, whoever wrote it.
        eos_id: What ends a response.
    """
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    ids += [eos_id] if ended or not ids else []
    if limit is not None and len(ids) > limit:
        return ids[:limit], False
    return ids, ended


def judged_rows(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    ended: Sequence[bool],
    preferred: Sequence[bool],
    group: Sequence[int],
    *,
    tokenizer: Any,
    pad_id: int,
    eos_id: int,
    limit: int | None,
) -> RolloutBatch:
    """Rows for a discriminator, in the order given, with :data:`PREFERRED` in ``extra``.

    ``finished`` says which have their EOS.

    Args:
        prompts: One per row.
        texts: Responses.
        ended: Whether each ended by itself.
        preferred: Whether each is on the side that is to win.
        group: Numbers; rows of one group are compared.
        tokenizer: The discriminator's.
        pad_id: Written into padding.
        eos_id: What ends a response.
        limit: Most tokens of a response.
    """
    groups = []
    for prompt, text, done in zip(prompts, texts, ended, strict=True):
        ids, whole = judged_ids(tokenizer, text, ended=done, limit=limit, eos_id=eos_id)
        none = torch.full((len(ids),), float("nan"))
        finish = "eos" if whole else "length"
        completion = Completion(torch.tensor(ids, dtype=torch.long), none, finish, -1, text)  # type: ignore[arg-type]
        groups.append(Group(prompt, (completion,), on_policy=False))
    return collate(groups, pad_id, numbers=list(group)).with_extra(
        **{PREFERRED: torch.tensor(list(preferred), dtype=torch.bool)}
    )


def read_anew(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    chat: bool,
    system: str | None = None,
    chat_options: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """The prompts as another model's template and tokenizer have them, from their rows.

    Args:
        prompts: Repetitions cost nothing.
        tokenizer: The other model's.
        chat: Render with its chat template.
        system: System message of conversations that have none; default: the one each prompt was asked with.
        chat_options: More arguments for the template.
    """
    known: dict[int, Prompt] = {}
    for prompt in prompts:
        if id(prompt) not in known:
            row = {**prompt.row, "uid": prompt.uid, "source": prompt.source}
            said = (prompt.system if system is None else system) if chat else None
            how = PromptStream(
                [row], tokenizer, chat=chat, system=said, chat_options=chat_options, shuffle=False
            )
            known[id(prompt)] = how.encode(0)
    return [known[id(prompt)] for prompt in prompts]


@functools.lru_cache(maxsize=8)
def reads_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of the same conversation."""
    return one is other or (
        one.get_vocab() == other.get_vocab()
        and one.chat_template == other.chat_template
        and one.is_fast
        and other.is_fast
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )


def judged_batch(
    batch: RolloutBatch, tokenizer: Any, pad_id: int, eos_id: int, prompts: Sequence[Prompt] | None = None
) -> RolloutBatch:
    """Every row of a rollout batch as a discriminator reads it; given rows are preferred to sampled ones.

    The limit is the sampling's ``max_new_tokens``, for both sides.

    Args:
        batch: The rollouts.
        tokenizer: The discriminator's.
        pad_id: Written into padding.
        eos_id: What ends a response.
        prompts: One per row, where the discriminator reads them otherwise than the policy.
    """
    limit = None if batch.sampling is None else batch.sampling.max_new_tokens
    rows = judged_rows(
        batch.prompts if prompts is None else prompts,
        batch.texts,
        batch.finished.tolist(),
        (~batch.on_policy).tolist(),
        batch.group.tolist(),
        tokenizer=tokenizer,
        pad_id=pad_id,
        eos_id=eos_id,
        limit=limit,
    )
    return rows.to(batch.device)


def judged_items(rows: RolloutBatch) -> list[dict[str, Any]]:
    """One plain item per group of judged rows, in order of first appearance: what a replay buffer keeps."""
    items: dict[int, dict[str, Any]] = {}
    for i, group in enumerate(rows.group.tolist()):
        prompt = list(rows.prompts[i].ids)
        item = items.setdefault(group, {"prompt": prompt, "responses": [], "ended": [], "preferred": []})
        item["responses"].append(rows.input_ids[i][rows.response_mask[i]].tolist())
        item["ended"].append(bool(rows.finished[i]))
        item["preferred"].append(bool(rows.extra[PREFERRED][i]))
    return list(items.values())


def rows_of_items(items: Sequence[Mapping[str, Any]], pad_id: int) -> RolloutBatch:
    """The rows that :func:`judged_items` took apart; groups are numbered from 0."""
    groups = []
    for item in items:
        completions = tuple(
            Completion(
                torch.tensor(ids), torch.full((len(ids),), float("nan")), "eos" if ended else "length", -1
            )
            for ids, ended in zip(item["responses"], item["ended"], strict=True)
        )
        groups.append(Group(Prompt(tuple(item["prompt"]), ""), completions, on_policy=False))
    preferred = [x for item in items for x in item["preferred"]]
    return collate(groups, pad_id).with_extra(**{PREFERRED: torch.tensor(preferred, dtype=torch.bool)})


def paired(preferred_B: Tensor, group_B: Tensor) -> Tensor:
    """``[B]`` bool: the row's group has rows of both sides."""
    names, index_B = torch.unique(group_B, return_inverse=True)
    count = torch.zeros(len(names), 2, dtype=torch.long, device=group_B.device)
    count.index_put_((index_B, preferred_B.long()), torch.ones_like(index_B), accumulate=True)
    return (count > 0).all(1)[index_B]
