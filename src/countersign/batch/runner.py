"""Runs a batch against a router: tokenizes, plans, keeps as much in flight as the cache holds, writes what comes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from countersign.batch.admission import Admission
from countersign.batch.folder import BatchFolder
from countersign.batch.lines import Line, Refused, answered, failed, options_of
from countersign.batch.plan import BatchPlan, Job, plan_batch
from countersign.client import Answer, Client, FinishReason
from countersign.services.runtime.errors import (
    Cancelled,
    CountersignError,
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    Unavailable,
)

_T = TypeVar("_T")

# One cache full of lines runs, and one waits at the target, so that no pass waits for a line on its way.
AHEAD = 2
DEFAULT_TOKENS = 65_536
TOKENIZED_AT_ONCE = 32
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
_ENDED: dict[FinishReason, tuple[type[CountersignError], str, str]] = {
    FinishReason.DEADLINE: (DeadlineExceeded, "DEADLINE", "ask for more --timeout, or fewer tokens"),
    FinishReason.CANCELLED: (Cancelled, "CANCELLED", "run the batch again"),
    FinishReason.ERROR: (Internal, "ANSWER_FAILED", "see the target's log"),
}


@dataclass(slots=True)
class Progress:
    """Counts of lines, and tokens of this run. ``before``: answered by earlier runs. ``shared_tokens``: prompt tokens
    that an oracle would not compute twice, of the lines of this run.
    """

    lines: int = 0
    before: int = 0
    completed: int = 0
    failed: int = 0
    groups: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0

    @property
    def over(self) -> int:
        """Lines that need nothing more."""
        return self.before + self.completed + self.failed


class BatchRunner:
    """``cache_tokens``: of KV in flight, 0 for what follows from the target's. ``most``: lines at once. ``timeout``:
    seconds a line, None for the deployment's. ``patience``: seconds without any answer for which a router that is full
    or away is asked again.
    """

    def __init__(
        self,
        client: Client,
        folder: BatchFolder,
        *,
        cache_tokens: int = 0,
        most: int = 128,
        timeout: float | None = None,
        patience: float = 60.0,
        changed: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._client, self._folder = client, folder
        self._cache_tokens, self._most, self._timeout, self._patience = cache_tokens, most, timeout, patience
        self._changed = changed
        self._heard = 0.0
        self._models: Sequence[str] = ()
        self.progress = Progress()

    async def run(self, read: Sequence[Line | Refused]) -> Progress:
        """Every line ends in the output or among the errors.

        Raises:
            Unavailable, ResourceExhausted: the router did not come back in time; what is missing is missing still.
        """
        self._heard = asyncio.get_running_loop().time()
        progress = self.progress
        progress.lines = len(read)
        for line in read:
            if isinstance(line, Refused):
                self._refuse(line.custom_id, line.error)
        lines = [line for line in read if isinstance(line, Line) and line.custom_id not in self._folder.done]
        progress.before = progress.lines - progress.failed - len(lines)
        self._changed(progress)
        if not lines:
            return progress
        info = await self._patiently(self._client.info)
        self._models = [model.name for model in info.models]
        known = [model.cache_tokens for model in info.models if model.cache_tokens]
        tokens = self._cache_tokens or AHEAD * min(known, default=DEFAULT_TOKENS)
        lines, jobs = await self._tokenized(lines)
        plan = plan_batch(jobs)
        progress.groups = len(plan.groups)
        progress.shared_tokens = plan.tree.prompt_tokens - plan.tree.distinct_tokens
        await self._flow(lines, jobs, plan, tokens)
        return progress

    async def _tokenized(self, lines: Sequence[Line]) -> tuple[list[Line], list[Job]]:
        """Those whose prompts the tokenizer takes."""
        gate = asyncio.Semaphore(TOKENIZED_AT_ONCE)

        async def one(line: Line) -> Job | None:
            prompt = line.body.prompt
            if not isinstance(prompt, str):
                return Job(prompt, line.body.max_tokens)
            async with gate:
                try:
                    return Job(await self._patiently(lambda: self._client.tokenize(prompt)), line.body.max_tokens)
                except (Unavailable, ResourceExhausted):
                    raise
                except CountersignError as error:
                    self._refuse(line.custom_id, error)
                    return None

        jobs = await _all([one(line) for line in lines])
        pairs = [(line, job) for line, job in zip(lines, jobs, strict=True) if job is not None]
        return [line for line, _ in pairs], [job for _, job in pairs]

    async def _flow(self, lines: Sequence[Line], jobs: Sequence[Job], plan: BatchPlan, tokens: int) -> None:
        admission = Admission(plan, jobs, tokens, self._most)
        flying: dict[asyncio.Task[None], int] = {}
        try:
            while not admission.over:
                for number in admission.admit():
                    flying[asyncio.create_task(self._line(lines[number], jobs[number]))] = number
                ended, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    admission.done(flying.pop(task))
                    task.result()
        finally:
            await _end(flying)

    async def _line(self, line: Line, job: Job) -> None:
        """Its answer and receipt, or its error, on disk."""
        options = options_of(line, self._folder.salt)
        options["timeout"] = self._timeout
        try:
            answer = await self._patiently(lambda: self._client.complete(job.token_ids, **options))
            _check(answer)
        except (Unavailable, ResourceExhausted):
            raise
        except CountersignError as error:
            self._refuse(line.custom_id, error)
            return
        model = line.body.model or next(iter(self._models), "")
        receipt = self._folder.keep_receipt(line.number, answer.receipt)
        self._folder.answer(line.custom_id, answered(line, answer, model, receipt))
        progress, usage = self.progress, answer.usage
        progress.completed += 1
        progress.prompt_tokens += usage.prompt_tokens
        progress.cached_prompt_tokens += usage.cached_prompt_tokens
        progress.output_tokens += usage.output_tokens
        self._changed(progress)

    def _refuse(self, custom_id: str, error: CountersignError) -> None:
        self._folder.refuse(failed(custom_id, error))
        self.progress.failed += 1
        self._changed(self.progress)

    async def _patiently(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """Asks again while the router is away or full; a line that is asked again gets the same tokens."""
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE_S
        while True:
            try:
                result = await ask()
            except (Unavailable, ResourceExhausted) as error:
                if loop.time() - self._heard > self._patience:
                    raise type(error)(
                        error.message,
                        reason=error.reason,
                        help="run the same command again: it goes on with the lines that are missing",
                    ) from error
            else:
                self._heard = loop.time()
                return result
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _check(answer: Answer) -> None:
    """Raises what an answer that is not whole, or has no receipt, is to its line."""
    if answer.finish in _ENDED:
        kind, reason, advice = _ENDED[answer.finish]
        text = f"the answer ended by {answer.finish} after {answer.usage.output_tokens} tokens"
        raise kind(f"{text}: {answer.message}" if answer.message else text, reason=reason, help=advice)
    if not answer.receipt:
        raise Internal("the router could make no receipt for this answer", reason="NO_RECEIPT")


async def _all(asked: Sequence[Awaitable[_T]]) -> list[_T]:
    """All results; the first error ends the others."""
    tasks = [asyncio.ensure_future(each) for each in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future[_T]] | dict[asyncio.Task[_T], int]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
