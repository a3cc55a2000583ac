"""A whole house in one loop: real routers, targets and clients, a faithful JetStream, and faults. One integer decides.

Each stream of randomness (order, network, clients, faults) is derived from the seed, so that a change in one leaves the
others as they are. After ``Plan.calm_at`` nothing goes wrong any more: then every request must end.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, cast

from tests.simulation.clients import Ask, SimClient
from tests.simulation.compute import CONTEXT, END, VOCABULARY, Drafts, Silent, engine
from tests.simulation.jetstream import Stored
from tests.simulation.monitor import ALL, Monitor, Violated
from tests.simulation.network import BEAT_S, Network, Node, Noise
from tests.simulation.sealed import EPOCH_MS, sealed, wall_ms
from tests.simulation.virtual_time import Deadlock, Endless, SimLoop
from tests.simulation.watching import Watcher

from countersign.services.router.service import RouterService
from countersign.services.runtime.announcer import Announcer
from countersign.services.runtime.config import Config
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.journal import Entry, Journal
from countersign.services.runtime.service import Context
from countersign.services.target.committer import Committer
from countersign.services.target.loop import TargetLoop
from countersign.services.target.prefixes import PrefixKeys
from countersign.services.target.receipts import ReceiptMaker
from countersign.services.target.service import TargetService
from countersign.v1.registry_pb2 import Instance
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.target_pb2 import RefreshRequest, StartRequest
from countersign.verify.testing import signing_key

LIVENESS_S = 60.0
QUIET_S = 10.0
FAULTS = ("crash", "pause", "cut", "cut up", "cut down", "disconnect", "hang up", "drain", "twin")
_DIGEST = sha256(b"weights").digest()
_INFO = ModelInfo(
    name="tiny",
    weights_sha256=_DIGEST,
    tokenizer_sha256=_DIGEST,
    config_sha256=_DIGEST,
    context_length=CONTEXT,
    vocabulary_size=VOCABULARY,
    dtype="fp32",
    drafting=True,
)
_MAKER = ReceiptMaker(signing_key(), _INFO, "simulation")
_CONFIG = Config()


@dataclass(frozen=True, slots=True)
class Fault:
    """``kind`` of ``FAULTS`` befalls the ``victim``-th process there is, for ``span`` seconds."""

    at: float
    kind: str
    victim: int
    span: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of. ``pages`` of KV each target has; ``pending`` messages a router's tail
    holds, a forward pass takes ``pace`` seconds at most."""

    seed: int
    targets: int
    routers: int
    pages: int
    pending: int
    pace: float
    noise: Noise
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    calm_at: float = 8.0

    @staticmethod
    def draw(seed: int) -> Plan:
        """Swarm testing (Groce et al., ISSTA 2012): each run has some kinds of faults only, and each its strength."""
        rng = random.Random(f"{seed}/plan")
        noise = {name: rng.choice((0.01, 0.05, 0.2)) * rng.randrange(2) for name in Noise.__dataclass_fields__}
        noise["away"] /= 2
        kinds = [kind for kind in FAULTS if rng.random() < 0.4] or ["crash"]
        faults = [
            Fault(rng.uniform(0.3, 7), rng.choice(kinds), rng.randrange(8), rng.uniform(0.2, 5))
            for _ in range(rng.choice((0, 1, 2, 4, 8)))
        ]
        return Plan(
            seed=seed,
            targets=rng.randint(1, 3),
            routers=rng.randint(1, 2),
            pages=rng.choice((10, 14, 40)),
            pending=rng.choice((1, 4, 4096)),
            pace=rng.choice((0.02, 0.2, 0.5)),
            noise=Noise(**noise),
            asks=tuple(_draw_ask(rng) for _ in range(rng.randint(1, 5))),
            faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        )


def _draw_ask(rng: random.Random) -> Ask:
    at = rng.uniform(0, 4)
    return Ask(
        at=at,
        prompt=rng.randint(1, 24),
        max_tokens=rng.randint(1, 24),
        drafting=rng.random() < 0.5,
        seeded=rng.random() < 0.5,
        timeout=rng.choice((60.0, 60.0, 3.0)),
        cancel_at=at + rng.expovariate(1) if rng.random() < 0.3 else None,
    )


@dataclass(frozen=True, slots=True)
class Run:
    """What is left of a run: the digest of all that happened, and how often what did."""

    digest: str
    counts: Counter[str]
    steps: int
    seconds: float


class SimJournal(Journal):
    """The real one; counts the gaps that its tails fill."""

    counts: Counter[str]

    async def _reread(self, subject: str, after: int) -> list[Entry]:
        entries = await super()._reread(subject, after)
        self.counts["gap filled"] += bool(entries)
        return entries


class World:
    """Runs a plan once. ``properties``: which of `monitor.ALL` are looked at."""

    def __init__(self, plan: Plan, properties: frozenset[str] = ALL) -> None:
        self.plan, self._properties = plan, properties
        rng = {name: random.Random(f"{plan.seed}/{name}") for name in ("order", "network", "clients", "nodes")}
        self.loop = SimLoop(rng["order"], plan.pace)
        self._rng = rng["nodes"]
        self._story: deque[str] = deque(maxlen=30)
        self._hash = sha256()
        self._over: asyncio.Future[None] = self.loop.create_future()
        self.monitor = Monitor(self.fail, self.note, lambda: EPOCH_MS + int(self.loop.now * 1000) + 250)
        self.watcher = Watcher(self.fail)
        self.network = Network(self.loop, rng["network"], plan.noise, self.note, self._stored, heard=self.watcher.heard)
        self._clients = [
            SimClient(self.network, rng["clients"], self.monitor, number, ask) for number, ask in enumerate(plan.asks)
        ]
        self._born = 0
        self._calm = False

    def note(self, text: str) -> None:
        line = f"{self.loop.now:9.4f} {text}"
        self._hash.update(line.encode())
        self._story.append(line)

    def fail(self, name: str, what: str) -> None:
        if name in self._properties and not self._over.done():
            story = "\n  ".join(self._story)
            self._over.set_exception(Violated(f"{name}: {what}\nplan: {self.plan}\nstory:\n  {story}"))

    def _stored(self, message: Stored, who: str) -> None:
        self.monitor.stored(message, who)
        self.watcher.stored(message)

    def run(self) -> Run:
        """Raises:
        Violated: a property does not hold.
        """
        gc.disable()  # a collector that comes when it likes would run destructors in any order
        try:
            with sealed(self.loop, self.plan.seed):
                try:
                    self.loop.run_until_complete(self._main())
                except (Deadlock, Endless) as error:
                    self.fail("Liveness", str(error))
                finally:
                    steps, seconds = self.loop.steps, self.loop.now
                    self._bury()
        finally:
            self.loop.close()
            gc.enable()
        if self._over.done():
            self._over.result()
        counts = self.network.counts
        counts["take-over"], counts["cancelled"] = self.monitor.moves, self.monitor.cancels
        counts["resumed"] = sum(client.resumed for client in self._clients)
        return Run(self._hash.hexdigest(), counts, steps, seconds)

    async def _main(self) -> None:
        self.loop.set_exception_handler(self._on_error)
        for service, count in (("router", self.plan.routers), ("target", self.plan.targets)):
            for _ in range(count):
                self._start(service)
        for fault in self.plan.faults:
            self.loop.call_at(fault.at, self._befall, fault)
        self.loop.call_at(self.plan.calm_at, self._calm_down)
        living = self.loop.create_task(self._live())
        await asyncio.wait({living, self._over}, return_when=asyncio.FIRST_COMPLETED)
        if living.done():
            living.result()

    async def _live(self) -> None:
        """All clients to their ends, then nothing is left over."""
        asking = [self.loop.create_task(client.run()) for client in self._clients]
        _, waiting = await asyncio.wait(asking, timeout=self.plan.calm_at + LIVENESS_S)
        if waiting:
            self.fail("Liveness", f"{len(waiting)} clients wait {LIVENESS_S:g} s after the last fault")
        for task in asking:
            if task.done():
                task.result()
        for client in self._clients:
            self.monitor.ended(client.name, client.received)
        await asyncio.sleep(max(0.0, self.plan.calm_at - self.loop.now) + QUIET_S)
        self._look_for_leftovers()

    def _look_for_leftovers(self) -> None:
        for node in self.network.nodes:
            left = node.left()
            if left:
                self.fail("Liveness", f"{node.instance} has {left} left over")
        listeners = [each for each in self.network.subscriptions.values() if each]
        if listeners:
            self.fail("Liveness", f"{len(listeners)} subjects are still listened to")
        for task in self.loop.tasks:
            error = task.exception() if task.done() and not task.cancelled() else None
            if error is not None and not isinstance(error, CountersignError | StopAsyncIteration):
                self.fail("NoBug", f"{task.get_coro()}: {error!r}")

    def _on_error(self, loop: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.fail("NoBug", f"{context['message']}: {error!r}")

    # Processes

    def _start(self, service: str, instance: str = "") -> None:
        self._born += 1
        skew = self._rng.randint(-100, 100)
        node = Node(self.network, service, instance or f"{service}-{self._born}", skew)
        self.network.nodes.append(node)
        self.note(f"{node.instance} starts")
        node.context.run(self._router if service == "router" else self._target, node)

    def _journal(self, node: Node) -> Journal:
        journal = SimJournal(cast(Any, node.bus), silence=1.0, pending=self.plan.pending)
        journal.counts = self.network.counts
        return journal

    def _router(self, node: Node) -> None:
        journal = self._journal(node)
        context = Context(
            _CONFIG,
            cast(Any, node.bus),
            journal,
            cast(Any, node.registry),
            "router",
            node.instance,
            str,
            Silent(self.note),
        )
        service = RouterService(context)
        node.service_object = service
        node.left = lambda: service._active + len(service._background._tasks) + len(node.bus.waiting)
        node.spawn(self._beat(node, service.describe))

    def _target(self, node: Node) -> None:
        log = Silent(self.note)
        keys = PrefixKeys(_DIGEST, "simulation")
        work = engine(self.plan.pages, node.instance, self.monitor.verdict)
        # A twin has the name of another, but is not the party that the other is.
        announcer = Announcer(cast(Any, node.bus), f"{node.instance}.{self._born}")
        drafts = cast(Any, Drafts(node.instance))
        loop = TargetLoop(work, drafts, None, keys, wall_ms=wall_ms, log=log, announcer=announcer)
        journal = self._journal(node)
        committer = Committer(journal, _MAKER, wall_ms, loop.wake, log, announcer)
        config = cast(Any, SimpleNamespace(end_token_ids=frozenset({END})))
        no_text = cast(Any, None)
        service = TargetService(
            node.instance, _INFO, config, no_text, keys, journal, loop, committer, announcer, most=16
        )
        node.service_object = service
        node.handlers = {"Start": cast(Any, service.Start), "Refresh": cast(Any, service.Refresh)}
        node.requests = {"Start": StartRequest, "Refresh": RefreshRequest}
        node.left = lambda: loop.sessions + len(work) + len(loop._background._tasks) + len(node.bus.waiting)
        node.running = node.spawn(service.run())
        node.spawn(self._beat(node, service.describe))

    async def _beat(self, node: Node, describe: Callable[[Instance], None]) -> None:
        record = Instance(service=node.service, instance=node.instance)
        while not node.leaving:
            describe(record)
            if node.bus.connected:
                self.network.beat(node, record)
            await asyncio.sleep(BEAT_S)

    # Faults

    def _befall(self, fault: Fault) -> None:
        candidates = [node for node in self.network.nodes if not node.leaving]
        if fault.kind in {"drain", "twin"}:
            candidates = [node for node in candidates if node.service == "target"]
        if self._calm or not candidates:
            return
        node = candidates[fault.victim % len(candidates)]
        self.note(f"{fault.kind} of {node.instance} for {fault.span:.2f} s")
        self.network.counts[fault.kind] += 1
        self._strike(node, fault)

    def _strike(self, node: Node, fault: Fault) -> None:
        match fault.kind:
            case "crash":
                self._crash(node, fault.span)
            case "pause" | "twin":
                node.paused = True
                self.loop.call_later(fault.span, self.loop.wake, node)
                if fault.kind == "twin":
                    self._start("target", node.instance)
            case "cut" | "cut up" | "cut down":
                node.cut |= {"up", "down"} if fault.kind == "cut" else {fault.kind.removeprefix("cut ")}
                self.loop.call_later(fault.span, node.cut.clear)
            case "disconnect":
                node.bus.disconnect()
                self.loop.call_later(fault.span, node.bus.connect)
            case "hang up":
                for connection in list(node.connections):
                    connection.break_off()
            case "drain":
                node.leaving = True
                node.spawn(self._drain(node))

    def _crash(self, node: Node, span: float) -> None:
        """Gone without a word; its supervisor starts another."""
        node.dead = True
        self._gone(node)
        self.loop.call_later(span, self._start, node.service)

    def _gone(self, node: Node) -> None:
        if node in self.network.nodes:
            self.network.forget(node)
            for connection in list(node.connections):
                connection.break_off()

    async def _drain(self, node: Node) -> None:
        """As `services/runtime/process.py` stops a process: withdrawn, no more calls, closed."""
        self.network.beat(node, Instance(service=node.service, instance=node.instance), ttl=0.0)
        node.handlers = {}
        await asyncio.sleep(0.05)
        node.running.cancel()
        await asyncio.gather(node.running, return_exceptions=True)
        await node.service_object.close()
        self.loop.call_soon(partial(self._drained, node), context=self.network.outside)

    def _drained(self, node: Node) -> None:
        self._gone(node)
        node.dead = True
        self._start("target")

    def _calm_down(self) -> None:
        """Everything heals."""
        self._calm = True
        self.note("calm")
        self.network.noise = Noise()
        for node in self.network.nodes:
            node.cut.clear()
            node.bus.connect()
            if node.paused:
                self.loop.wake(node)

    def _bury(self) -> None:
        """End every task in order, those of crashed processes too; nothing of it reaches anybody."""
        self.network.closed = True
        self._properties = frozenset()
        self.loop.revive()
        for node in self.network.all_nodes:
            self.loop.wake(node)
        for _ in range(30):
            left = [task for task in self.loop.tasks if not task.done()]
            if not left:
                return
            for task in left:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(left, timeout=1.0))
        raise AssertionError(f"tasks that do not end: {left}")


def run(plan: Plan, properties: frozenset[str] = ALL) -> Run:
    """Run a plan once; raises `monitor.Violated`."""
    return World(plan, properties).run()


def run_seed(seed: int, properties: frozenset[str] = ALL) -> Run:
    return run(Plan.draw(seed), properties)
