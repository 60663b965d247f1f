"""``onpolicy collect``: from flags to settings, from settings to a run, from its end to words and an exit code."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TextIO

from lightning_onpolicy.datamodules.collect.budget import Budget, Charge, Prices
from lightning_onpolicy.datamodules.collect.cache import AnswerCache
from lightning_onpolicy.datamodules.collect.client import Client, openai, read_key
from lightning_onpolicy.datamodules.collect.files import FailedFile, RowFile
from lightning_onpolicy.datamodules.collect.plan import Plan, plan
from lightning_onpolicy.datamodules.collect.progress import Progress, Tally
from lightning_onpolicy.datamodules.collect.run import Collector, Stop
from lightning_onpolicy.datamodules.collect.settings import CollectSettings
from lightning_onpolicy.datamodules.collect.words import before, estimate, summary
from lightning_onpolicy.datamodules.sources import FileSource

DONE, FAILED, SOME_ROWS_FAILED, AT_CAP = 0, 1, 3, 4
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
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
    parser.add_argument(
        "-c", "--config", action="config", help="File with these settings; several are merged."
    )
    parser.add_class_arguments(CollectSettings)
    words = [
        "--dry_run=true" if arg == "--dry_run" and after not in ("true", "false") else arg
        for arg, after in itertools.zip_longest(args, args[1:], fillvalue="")
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

    def tell(lines: Iterable[str]) -> None:
        for line in lines:
            print(f"onpolicy: {line}", file=say)

    if settings.dry_run:
        tell(estimate(settings, todo, *_known(settings)))
        return DONE
    openai()
    key = read_key(settings.api_key_env, settings.base_url)
    with ExitStack() as stack:
        cache = AnswerCache(settings.cache_path)
        stack.callback(cache.close)
        digests = {todo.rows[row]["uid"]: unit.digest for unit in todo.units for row in unit.rows}
        out = RowFile(settings.out_path, {row["uid"]: digests[row["uid"]] for row in todo.rows})
        stack.callback(out.close)
        tell(before(settings, cache.lost))
        budget = _budget(settings, cache)
        tally = Tally(rows=len(todo.rows), done=len(out))
        progress = stack.enter_context(Progress(tally, budget, say))
        failed = FailedFile(settings.failed_path)
        stop, code = asyncio.run(_run(settings, key, (todo, cache, out, failed, budget, tally, progress)))
    tell(summary(settings, tally, budget, out.flags, stop))
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
    spent = cache.spent(Prices(settings.price_in, settings.price_out))
    return Budget(spent, settings.max_tokens_total, settings.max_cost)


def _known(settings: CollectSettings) -> tuple[set[str], Budget]:
    """Keys of the answers that are there, and what was spent; no file is made for that."""
    if not settings.cache_path.exists():
        return set(), Budget(Charge(), settings.max_tokens_total, settings.max_cost)
    cache = AnswerCache(settings.cache_path)
    try:
        return cache.keys(), _budget(settings, cache)
    finally:
        cache.close()
