"""The target's side of the commit protocol: one epoch of one request."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from countersign.services.protocol.appender import Appender
from countersign.services.protocol.commit import LogState, check_pass
from countersign.services.protocol.errors import AppenderStopped, EpochShared, NotOwner
from countersign.services.protocol.events import (
    Append,
    CancelledByClient,
    ClosedAlready,
    Effect,
    Fenced,
    Settled,
    Stop,
)
from countersign.v1.commit_pb2 import Closed, Extended, Opened
from countersign.v1.sampling_pb2 import FinishReason


class Writer(Appender):
    """Commits what a target samples, and closes the log.

    ``extend`` takes the tokens of one target pass. They are ``pending`` until their record is acknowledged, and only
    then in ``log``; nobody but the target's next forward pass may see them before. A pass that ends while the append of
    the one before is in flight waits for it here.

    ``stop`` says why no more tokens are wanted. After ``CancelledByClient`` the owner still closes the log; after
    ``Fenced`` and ``ClosedAlready`` it only forgets the request.
    """

    def __init__(self, log: LogState, *, epoch: int, instance: str) -> None:
        """Takes the request over from ``log``, which is read from its first record to its ``Assigned`` or further.

        Raises:
            NotOwner: the log gives the request to another instance or epoch, or to none.
        """
        if log.opened is None or log.epoch != epoch or log.instance != instance:
            raise NotOwner(
                "the log gives the request to another",
                epoch=epoch,
                instance=instance,
                owner_epoch=log.epoch,
                owner=log.instance,
            )
        super().__init__(log)
        self._opened: Opened = log.opened
        self._epoch = epoch
        self._passes: deque[Extended] = deque()
        self._closing: Closed | None = None
        self._stop: Stop | None = None
        self._heed()

    @property
    def epoch(self) -> int:
        """The epoch that this writer writes."""
        return self._epoch

    @property
    def stop(self) -> Stop | None:
        """What somebody else's record said to stop for; None as long as there is none."""
        return self._stop

    @property
    def wants_tokens(self) -> bool:
        """Whether ``extend`` may be called: not stopped, and no close was asked for."""
        return self._stop is None and self._closing is None and self._log.closed is None

    @property
    def pending(self) -> tuple[int, ...]:
        """Token ids that were sampled and are not known to be committed, in order: they follow ``log.token_ids``."""
        return tuple(token_id for extended in self._passes for token_id in extended.token_ids)

    def extend(
        self,
        token_ids: Sequence[int],
        *,
        drafted: int = 0,
        accepted: int = 0,
        cached_prompt_tokens: int = 0,
        fingerprints: bytes = b"",
    ) -> Append | None:
        """The target sampled ``token_ids`` after ``log.token_ids + pending``, all in one pass.

        ``drafted`` tokens had been proposed for this pass and the first ``accepted`` of ``token_ids`` are among them.
        ``cached_prompt_tokens`` came from the KV store; in the epoch's first pass only. ``fingerprints``: of all these
        tokens, or none. None: an append is in flight and this pass follows it.

        Raises:
            AppenderStopped: no more tokens are wanted, or the log is being closed.
            EmptyExtension, WrongCounts, TooManyTokens: not what one pass can give.
        """
        if not self.wants_tokens:
            raise AppenderStopped("no more tokens are wanted", stop=repr(self._stop))
        extended = Extended(
            epoch=self._epoch,
            base=len(self._log.tokens) + len(self.pending),
            token_ids=token_ids,
            drafted=drafted,
            accepted=accepted,
            cached_prompt_tokens=cached_prompt_tokens,
            fingerprints=fingerprints,
        )
        check_pass(self._opened, extended, first=self._log.epoch_passes == 0 and not self._passes)
        self._passes.append(extended)
        return self._append(extended) if self._in_flight is None else None

    def close(self, reason: FinishReason.ValueType, *, receipt_sha256: bytes = b"", message: str = "") -> Append:
        """Ends the log; its usage is what the log adds up to. After ``CancelledByClient`` the reason is CANCELLED.

        A close that is overtaken by Cancelled never was: make the receipt again over ``log`` and close again.

        Raises:
            AppendInFlight: tokens are still pending, and the receipt must hold all of them.
            AppenderStopped: fenced, or closed already.
            WrongReason: CANCELLED without a Cancelled record, or another reason with one.
        """
        self._must_be_idle()
        if self._log.closed is not None or isinstance(self._stop, Fenced | ClosedAlready):
            raise AppenderStopped("the log is not this writer's to close", stop=repr(self._stop))
        closing = Closed(reason=reason, receipt_sha256=receipt_sha256, usage=self._log.usage(), message=message)
        append = self._append(closing)
        self._closing = closing
        return append

    def _stored(self) -> None:
        if self._closing is None:
            self._passes.popleft()

    def _overtaken(self, before: LogState) -> None:
        if self._log.epoch == self._epoch and len(self._log.tokens) > len(before.tokens):
            self._halt(Fenced(self._log.epoch, self._log.instance))
            raise EpochShared("two writers in one epoch", epoch=self._epoch, instance=self._log.instance)
        self._heed()

    def _heed(self) -> None:
        """Stops when the log's last record, somebody else's, says so."""
        log = self._log
        if log.closed is not None:
            self._halt(ClosedAlready(log.closed.reason))
        elif log.epoch > self._epoch:
            self._halt(Fenced(log.epoch, log.instance))
        elif log.cancelled is not None:
            self._halt(CancelledByClient(log.cancelled.cause))

    def _halt(self, stop: Stop) -> None:
        # An append that is given up here may still arrive; the stream will refuse it, since another record is last.
        self._stop, self._in_flight, self._closing = stop, None, None
        self._passes.clear()

    def _go_on(self) -> Effect:
        if self._closing is not None:
            return self._append(self._closing) if self._log.closed is None else Settled()
        if self._stop is not None:
            return self._stop
        return self._append(self._passes[0]) if self._passes else Settled()
