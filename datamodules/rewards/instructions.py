"""The reward of instructions that can be checked: IFEval's, in its public schema."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from lightning_onpolicy.datamodules.rewards.instruction_checks import CHECKS, UNSUPPORTED
from lightning_onpolicy.datamodules.rewards.pooled import Known, PooledReward, need

if TYPE_CHECKING:
    from lightning_onpolicy.datamodules.batch import Prompt

log = logging.getLogger(__name__)


class InstructionReward(PooledReward):
    """The share of a prompt's instructions that the response follows, or whether it follows all.

    Rows have ``instruction_id_list`` and ``kwargs``, one mapping per instruction, as IFEval and the training sets made
    after it. 24 of its 25 kinds are checked; a prompt that asks for a language is not scored (None), since this
    library has no detector.

    Args:
        loose: An instruction is followed if any of eight readings follows it: the response with or without its first
            line, its last line and its asterisks (the published loose criterion). False takes the text as it is.
        partial: The share of instructions followed; False gives 1 for all and 0 for less.
        ids_key: Key of the row's instruction ids.
        kwargs_key: Key of their arguments.
        workers: Number of verifier processes.
        deadline_s: Seconds one answer may take; one that takes longer is not scored (None).
        memory_bytes: Address space of a verifier process, in bytes.
        after: Only what follows its last occurrence is scored; texts without it are scored whole. None scores
            all texts whole.

    Example:
        >>> from lightning_onpolicy.datamodules.given import group_of
        >>> ids = ["punctuation:no_comma", "length_constraints:number_words"]
        >>> row = {"instruction_id_list": ids, "kwargs": [{}, {"num_words": 3, "relation": "at least"}]}
        >>> reward = InstructionReward(workers=1)
        >>> reward.score([group_of(row, "one two three", "one, two", "one two")])
        [[1.0, 0.0, 0.5]]
        >>> reward.close()
    """

    target = "lightning_onpolicy.datamodules.rewards.instruction_checks:score"

    def __init__(
        self,
        loose: bool = False,
        partial: bool = True,
        ids_key: str = "instruction_id_list",
        kwargs_key: str = "kwargs",
        workers: int = 1,
        deadline_s: float = 5.0,
        memory_bytes: int = 2**30,
        after: str | None = "</think>",
    ) -> None:
        super().__init__(workers, deadline_s, memory_bytes, after)
        self.loose, self.partial = loose, partial
        self.ids_key, self.kwargs_key = ids_key, kwargs_key
        self._unsupported: Counter[str] = Counter()

    @property
    def failures(self) -> Counter[str]:
        """Answers that could not be scored so far, by reason; ``unsupported`` are those to prompts with such an
        instruction."""
        return self.pool.failures + self._unsupported

    def question(self, prompt: Prompt) -> tuple[list[tuple[str, dict[str, Any]]], bool, bool] | None:
        """The instructions, ready for a worker; None if one is not supported.

        Raises:
            ValueError: If an id is unknown or its arguments are not what it takes; the message names both.
        """
        ids, kwargs = need(prompt, self.ids_key), need(prompt, self.kwargs_key)
        if not len(ids) or len(ids) != len(kwargs):
            raise ValueError(
                f"prompt {prompt.uid!r}: {self.ids_key!r} and {self.kwargs_key!r} must be equally many, and at least "
                f"one; they are {len(ids)} and {len(kwargs)}."
            )
        unsupported = sorted(UNSUPPORTED.keys() & set(ids))
        instructions = [
            (name, _arguments(prompt, name, given or {}))
            for name, given in zip(ids, kwargs, strict=True)
            if name not in UNSUPPORTED
        ]
        if unsupported:
            if not self._unsupported:
                log.warning(
                    "Prompts with %s get no reward: %s. Leave them out; failures['unsupported'] counts their answers.",
                    unsupported[0],
                    UNSUPPORTED[unsupported[0]],
                )
            return None
        return instructions, self.loose, self.partial

    def item(self, question: Any, text: str) -> Any:
        """For a worker, unless an instruction is not supported."""
        if question is None:
            self._unsupported["unsupported"] += 1
            return Known(None)
        return question, text


def _arguments(prompt: Prompt, name: str, given: Any) -> dict[str, Any]:
    if name not in CHECKS:
        raise ValueError(
            f"prompt {prompt.uid!r}: there is no instruction {name!r}; known are {sorted(CHECKS.keys() | UNSUPPORTED)}."
        )
    arguments = {k: v for k, v in dict(given).items() if v is not None}  # tables keep absent values as None
    wanted = set(CHECKS[name][1])
    if set(arguments) != wanted:
        raise ValueError(
            f"prompt {prompt.uid!r}: {name} takes {sorted(wanted)}, its arguments are {sorted(arguments)}."
        )
    for key, value in arguments.items():
        if key.endswith("relation") and value not in ("at least", "less than"):
            raise ValueError(
                f"prompt {prompt.uid!r}: {name} {key} must be 'at least' or 'less than', got {value!r}."
            )
    # Parquet and JSON readers may give counts as 3.0.
    return {
        k: int(v) if isinstance(v, float) else list(v) if hasattr(v, "tolist") else v
        for k, v in arguments.items()
    }
