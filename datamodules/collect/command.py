"""``onpolicy collect``: from flags to settings, from settings to a run, from its end to words and an exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TextIO

from lightning_onpolicy.datamodules.collect.budget import (
    Budget,
    Charge,
    Prices,
    likely_prompt_tokens,
    most_prompt_tokens,
    total_of,
)
from lightning_onpolicy.datamodules.collect.cache import AnswerCache
from lightning_onpolicy.datamodules.collect.client import Client, openai, read_key
from lightning_onpolicy.datamodules.collect.files import FLAGS, FailedFile, RowFile
from lightning_onpolicy.datamodules.collect.plan import Plan, plan
from lightning_onpolicy.datamodules.collect.progress import Progress, Tally, spent
from lightning_onpolicy.datamodules.collect.run import Collector, Stop
from lightning_onpolicy.datamodules.collect.settings import CollectSettings
from lightning_onpolicy.datamodules.sources import FileSource

DONE, FAILED, SOME_ROWS_FAILED, AT_CAP = 0, 1, 3, 4
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
TERMS = "check that the provider's terms allow training a model on these answers."
DESCRIPTION = """Ask a teacher behind an OpenAI-compatible API for answers and keep them in a file to train on.
Run it again to go on: what was answered is never asked again. Exit code: 0 all rows answered, 1 failed for the reason
printed, 2 wrong command line, 3 some rows could not be answered (listed in OUT.failed.jsonl), 4 the cap was reached,
130 and 143 stopped by Ctrl-C and SIGTERM (what was in flight is waited for; a second one does not wait)."""


def main(args: Sequence[str]) -> int:
    """Run ``onpolicy collect ARGS``.

    Args:
        args: What follows the sub-command.

    Returns:
        The exit code: see :data:`DESCRIPTION`.
    """
    return collect(parse(args))


def parse(args: Sequence[str]) -> CollectSettings:
    """The settings that flags and configuration files give; a wrong command line exits with 2."""
    from jsonargparse import ArgumentParser

    # Imported for their short names, which a configuration may use for ``prompts``.
    from lightning_onpolicy.datamodules import gym, sources, targets  # noqa: F401

    parser = ArgumentParser(prog="onpolicy collect", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="File with these settings; several are merged.")
    parser.add_class_arguments(CollectSettings)
    words = [
        "--dry_run=true" if arg == "--dry_run" and after not in ("true", "false") else arg
        for arg, after in zip(args, [*args[1:], ""], strict=True)
    ]
    given = parser.instantiate_classes(parser.parse_args(words))
    return CollectSettings(**{name: given[name] for name in CollectSettings.__dataclass_fields__})


def collect(settings: CollectSettings, say: TextIO | None = None) -> int:
    """Fill the file that the settings name.

    Args:
        settings: What to ask, whom, and within what limits.
        say: Where to write what people read; the standard error by default.

    Returns:
        The exit code: see :data:`DESCRIPTION`.

    Raises:
        ValueError: If prompts, output or key cannot be used.
        OSError: If another process works on the same files, or they cannot be written.
        ImportError: If the official client is not installed.
    """
    say = sys.stderr if say is None else say
    prompts = settings.prompts
    source = (
        FileSource(prompts, prompt_key=settings.prompt_key, messages_key=settings.messages_key)
        if isinstance(prompts, str)
        else prompts
    )
    todo = plan(source, settings)
    if settings.dry_run:
        print(estimate(settings, todo), file=say)
        return DONE
    openai()
    key = read_key(settings.api_key_env, settings.base_url)
    print(f"onpolicy: {TERMS}", file=say)
    with ExitStack() as stack:
        cache = AnswerCache(settings.cache_path)
        stack.callback(cache.close)
        digests = {todo.rows[row]["uid"]: unit.digest for unit in todo.units for row in unit.rows}
        out = RowFile(settings.out_path, {row["uid"]: digests[row["uid"]] for row in todo.rows})
        stack.callback(out.close)
        budget = _budget(settings, cache)
        if cache.lost:
            _say(say, f"{cache.lost} requests were in flight when an earlier run died: they may have been billed, count at "
                 "their worst case, and are sent again.")  # fmt: skip
        if settings.max_cost is None and settings.max_tokens_total is None:
            _say(say, "there is no cap: neither max_cost nor max_tokens_total is set.")
        elif settings.max_cost is None:
            _say(say, "without max_cost the cap counts tokens, not money.")
        tally = Tally(rows=len(todo.rows), done=len(out))
        progress = stack.enter_context(Progress(tally, budget, say))
        stop, code = asyncio.run(
            _run(settings, key, (todo, cache, out, FailedFile(settings.failed_path), budget, tally, progress))
        )
        progress.update()
    for line in summary(settings, tally, budget, out):
        _say(say, line)
    if stop is not None:
        _say(say, f"stopped: {stop.message}" + (" Raise it and run again to go on." if stop.reason == "cap" else ""))
    if code is not None:
        return code
    return SOME_ROWS_FAILED if tally.failed else DONE


async def _run(
    settings: CollectSettings,
    key: str,
    parts: tuple[Plan, AnswerCache, RowFile, FailedFile, Budget, Tally, Progress],
) -> tuple[Stop | None, int | None]:
    """The run, and the exit code of what stopped it."""
    todo, cache, out, failed, budget, tally, progress = parts
    client = Client(settings.base_url, key, settings.timeout_s)
    collector = Collector(todo, settings, client, cache, out, failed, budget, tally, progress)
    task = asyncio.create_task(collector.run())
    received: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:
            collector.stop("interrupted", f"{number.name}. Run it again to go on.")
        else:
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        stop = await task
    except asyncio.CancelledError:
        stop = collector.stopped
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
        await client.close()
    if received:
        return stop, SIGNALS[received[0]]
    if stop is None:
        return None, None
    return stop, AT_CAP if stop.reason == "cap" else FAILED


def _budget(settings: CollectSettings, cache: AnswerCache) -> Budget:
    before = cache.spent(Prices(settings.price_in, settings.price_out))
    return Budget(before, settings.max_tokens_total, settings.max_cost)


def estimate(settings: CollectSettings, todo: Plan) -> str:
    """What a run would ask and could cost; nothing is sent, nothing written."""
    known: set[str] = set()
    budget = Budget(Charge(), settings.max_tokens_total, settings.max_cost)
    if settings.cache_path.exists():
        cache = AnswerCache(settings.cache_path)
        known, budget = cache.keys(), _budget(settings, cache)
        cache.close()
    prices = Prices(settings.price_in, settings.price_out)
    asked = [unit for unit in todo.units for key in unit.keys if key not in known]
    likely = sum(likely_prompt_tokens(unit.messages) for unit in asked)
    most = sum(most_prompt_tokens(unit.messages) for unit in asked)
    answers = len(asked) * settings.max_tokens
    worst = prices.charge(most, answers)
    cost = "no prices given" if settings.price_in is None else f"cost {worst.cost:.4f} at most"
    total = total_of([budget.spent, worst])
    over = (budget.max_tokens is not None and total.tokens > budget.max_tokens) or (
        budget.max_cost is not None and total.cost > budget.max_cost
    )
    lines = [
        f"{len(todo.rows)} rows, {len(todo.units)} different prompts, {settings.samples} samples each; "
        f"{len(todo.units) * settings.samples - len(asked)} answers are cached, {len(asked)} requests would be sent",
        f"prompts: about {likely:,} tokens (a quarter of their bytes), at most {most:,} (one per byte, with room for the "
        "chat template)",
        f"answers: at most {answers:,} tokens (max_tokens each)",
        f"worst case: {worst.tokens:,} tokens, {cost}; spent before: {spent(budget)}",
        *(["the worst case exceeds the cap: the run may stop before its end, and can go on with a higher one"] * over),
        "nothing was sent",
    ]
    return "\n".join(f"onpolicy: {line}" for line in lines)


def summary(settings: CollectSettings, tally: Tally, budget: Budget, out: RowFile) -> list[str]:
    """What to say at the end: every row and every request is in one of these numbers."""
    pending = tally.rows - tally.done - tally.failed
    flags = ", ".join(f"{out.flags[name]} {name}" for name in FLAGS)
    lines = [
        f"{tally.done} of {tally.rows} rows answered ({flags} answers), {tally.failed} failed, {pending} not tried to "
        f"their end; {settings.out}",
        f"{tally.cached} answers from the cache, {tally.sent} requests sent, {tally.received} answered; {spent(budget)} "
        "in all",
    ]
    if tally.faults:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.faults.items()))
        lines.append(f"requests without an answer: {kinds}")
    if tally.failed:
        lines.append(f"rows that failed are listed in {settings.failed_path} and are tried again by the next run")
    if budget.overrun.tokens > 0 or budget.overrun.cost > 0:
        lines.append(
            f"the server counted up to {budget.overrun.tokens} tokens more for a request than its worst case: the cap "
            "holds only to within that much per request in flight"
        )
    return lines


def _say(out: TextIO, line: str) -> None:
    print(f"onpolicy: {line}", file=out)
