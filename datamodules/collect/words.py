"""What ``onpolicy collect`` tells people, before and after: pure functions from numbers to lines."""

from __future__ import annotations

from collections.abc import Mapping, Set

from lightning_onpolicy.datamodules.collect.budget import (
    Budget,
    Prices,
    json_bytes,
    likely_prompt_tokens,
    most_prompt_tokens,
)
from lightning_onpolicy.datamodules.collect.files import FLAGS
from lightning_onpolicy.datamodules.collect.plan import Plan
from lightning_onpolicy.datamodules.collect.progress import Tally, spent
from lightning_onpolicy.datamodules.collect.run import Stop
from lightning_onpolicy.datamodules.collect.settings import CollectSettings


def before(settings: CollectSettings, lost: int) -> list[str]:
    """What to know before anything is sent.

    Args:
        settings: Of the run.
        lost: Requests that an earlier run had in flight when it died.
    """
    lines = ["check that the provider's terms allow training a model on these answers"]
    if settings.max_cost is None and settings.max_tokens_total is None:
        lines.append("there is no cap: neither max_cost nor max_tokens_total is set")
    elif settings.max_cost is None:
        lines.append("without max_cost the cap counts tokens, not money")
    if lost:
        lines.append(
            f"{lost} requests were in flight when an earlier run died: they may have been billed, count at their worst "
            "case, and are sent again"
        )
    return lines


def estimate(settings: CollectSettings, todo: Plan, known: Set[str], budget: Budget) -> list[str]:
    """What a run would ask and could cost.

    Args:
        settings: Of the run.
        todo: All that is to be asked.
        known: Keys of the answers that are there.
        budget: What was spent, and the caps.
    """
    asked = [unit for unit in todo.units for key in unit.keys if key not in known]
    cached = sum(len(unit.keys) for unit in todo.units) - len(asked)
    extra = json_bytes(settings.extra_body)
    likely = sum(likely_prompt_tokens(unit.messages, extra) for unit in asked)
    most = sum(most_prompt_tokens(unit.messages, extra) for unit in asked)
    answers = len(asked) * settings.max_tokens
    worst = Prices(settings.price_in, settings.price_out).charge(most, answers)
    cost = "no prices given" if settings.price_in is None else f"cost {worst.cost:.4f} at most"
    lines = [
        f"{len(todo.rows)} rows, {len(todo.units)} different prompts, {settings.samples} samples each; "
        f"{cached} answers are cached, {len(asked)} requests would be sent",
        f"prompts: about {likely:,} tokens (a quarter of their bytes), at most {most:,} (one per byte, and room for "
        "the chat template)",
        f"answers: at most {answers:,} tokens (max_tokens each)",
        f"worst case: {worst.tokens:,} tokens, {cost}; spent before: {spent(budget)}",
    ]
    if not budget.fits(worst):
        lines.append("the worst case exceeds the cap: the run may stop early, and goes on with a higher one")
    return [*lines, "nothing was sent"]


def summary(
    settings: CollectSettings, tally: Tally, budget: Budget, flags: Mapping[str, int], stop: Stop | None
) -> list[str]:
    """What came of it: every row and every request is in one of these numbers.

    Args:
        settings: Of the run.
        tally: What was counted.
        budget: What was spent.
        flags: Answers in the output by flag.
        stop: What ended the run early.
    """
    pending = tally.rows - tally.done - tally.failed
    flagged = ", ".join(f"{flags[name]} {name}" for name in FLAGS)
    lines = [
        f"{tally.done} of {tally.rows} rows answered ({flagged} answers), {tally.failed} failed, {pending} not tried "
        f"to their end; {settings.out}",
        f"{tally.cached} answers from the cache, {tally.sent} requests sent, {tally.received} answered; "
        f"{spent(budget)} in all",
    ]
    if tally.faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.faults.items()))
        lines.append(f"requests without an answer: {kinds}")
    if tally.failed:
        lines.append(f"rows that failed are listed in {settings.failed_path}; the next run tries them again")
    if budget.overrun.tokens > 0 or budget.overrun.cost > 0:
        lines.append(
            f"the server counted up to {budget.overrun.tokens} tokens more for a request than its worst case: the cap "
            "holds only to within that much per request in flight"
        )
    if stop is not None:
        lines.append(
            f"stopped: {stop.message}" + (" Raise it and run again to go on." if stop.reason == "cap" else "")
        )
    return lines
