"""One request's spans as a tree, from OTLP's messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry.kept import KeptSpan

_AUDITOR = "auditor"


@dataclass(frozen=True, slots=True)
class Node:
    """A span and what is below it, by begin. Times are Unix nanoseconds; ``error``: the reason, if it failed."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    instance: str
    start: int
    end: int
    error: str
    attributes: Mapping[str, Any]
    events: Sequence[tuple[int, str, Mapping[str, Any]]]
    links: Sequence[str]
    children: tuple[Node, ...] = ()

    @property
    def seconds(self) -> float:
        return max(0, self.end - self.start) / 1e9

    def walk(self) -> Iterator[Node]:
        """It, and all below."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class Rounds:
    """The rounds of a target's span, summed up; seconds."""

    count: int
    tokens: int
    proposed: int
    accepted: int
    batch: float
    pass_mean_s: float
    pass_max_s: float
    commit_mean_s: float
    commit_max_s: float


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """``roots``: of the request's own trace, what was begun while its client waited or just after; ``later``: what was
    done for it afterwards, audits too; ``linked``: roots of other traces of the request: cancelled, resumed.
    """

    request_id: str
    trace_id: str
    roots: tuple[Node, ...]
    later: tuple[Node, ...] = ()
    linked: tuple[Node, ...] = ()

    @property
    def start(self) -> int:
        return min(root.start for root in self.roots)

    @property
    def end(self) -> int:
        """Of what was begun while the client waited; what goes on for long beyond that is cut."""
        waited = max(root.end for root in self.roots)
        last = max(node.end for root in self.roots for node in root.walk())
        return min(last, waited + (waited - self.start) // 2) if waited > self.start else last


def trace_of(kept: Iterable[KeptSpan], wanted: str) -> RequestTrace | None:
    """What is kept of a request, by its id or by a trace's; None where that is nothing."""
    own, linked = _traces(list(kept), wanted)
    if not own:
        return None
    # The trace in which it was asked; others of its id came later: it was resumed, or cancelled.
    main, *others = sorted(own, key=_rank)
    trees = _trees(main)
    waited = max((root.end for root in trees if root.service != _AUDITOR), default=trees[0].end)
    waited += (waited - trees[0].start) // 4
    within, later = list[Node](), list[Node]()
    for tree in trees:
        inner, apart = _divided(tree, waited)
        within += inner
        later += apart
    return RequestTrace(
        request_id=next(
            (str(node.attributes[names.REQUEST_ID]) for node in main if names.REQUEST_ID in node.attributes), ""
        ),
        trace_id=main[0].trace_id,
        roots=tuple(within or trees),
        later=tuple(sorted(later if within else (), key=_begin)),
        linked=tuple(sorted((root for nodes in (*others, *linked) for root in _trees(nodes)), key=_begin)),
    )


def node_of(kept: KeptSpan) -> Node:
    """One span, readable; what it does not say is empty."""
    span, resource = kept.span, _values(kept.resource.attributes)
    failed = span.status.code == Status.STATUS_CODE_ERROR
    found = _values(span.attributes)
    return Node(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower() if span.kind in range(6) else "",
        service=str(resource.get("service.name", "")),
        instance=str(resource.get("service.instance.id", "")),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        error=str(found.get("error.type") or span.status.message or "failed") if failed else "",
        attributes=found,
        events=[(event.time_unix_nano, event.name, _values(event.attributes)) for event in span.events],
        links=[link.trace_id.hex() for link in span.links],
    )


def rounds(node: Node) -> Rounds | None:
    """None where it had none."""
    each = [values for _, name, values in node.events if name == names.ROUND]
    if not each:
        return None

    def column(name: str) -> list[float]:
        return [float(values.get(name, 0)) for values in each]

    return Rounds(
        count=len(each),
        tokens=int(sum(column(names.ROUND_TOKENS))),
        proposed=int(sum(column(names.ROUND_DRAFTED))),
        accepted=int(sum(column(names.ROUND_ACCEPTED))),
        batch=fmean(column(names.ROUND_BATCH)),
        pass_mean_s=fmean(column(names.ROUND_TIME)),
        pass_max_s=max(column(names.ROUND_TIME)),
        commit_mean_s=fmean(column(names.ROUND_COMMIT)),
        commit_max_s=max(column(names.ROUND_COMMIT)),
    )


def _values(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    if kind == "kvlist_value":
        return _values(value.kvlist_value.values)
    if kind == "bytes_value":
        return value.bytes_value.hex()
    return getattr(value, kind) if kind else None


def _traces(kept: Sequence[KeptSpan], wanted: str) -> tuple[list[list[Node]], list[list[Node]]]:
    """Traces that are of the request, and others with a link to one of them. Of all the rest nothing is read."""
    own = {one.span.trace_id for one in kept if one.span.trace_id.hex() == wanted or _names(one.span, wanted)}
    linked = {one.span.trace_id for one in kept for link in one.span.links if link.trace_id in own} - own
    both = own | linked
    # A span that was written twice is one.
    spans = {(one.span.trace_id, one.span.span_id): one for one in kept if one.span.trace_id in both}
    found: dict[bytes, list[Node]] = {trace: [] for trace in both}
    for (trace, _), one in spans.items():
        found[trace].append(node_of(one))
    return [found[trace] for trace in own], [found[trace] for trace in linked]


def _names(span: Span, request_id: str) -> bool:
    return any(each.key == names.REQUEST_ID and each.value.string_value == request_id for each in span.attributes)


def _rank(nodes: Sequence[Node]) -> tuple[bool, int]:
    return not any(names.OPERATION in node.attributes for node in nodes), min(map(_begin, nodes))


def _begin(node: Node) -> int:
    return node.start


def _trees(nodes: Sequence[Node]) -> list[Node]:
    """The spans whose parent is not among them, each with all below. A span that is its own ancestor is a root."""
    known = {node.span_id for node in nodes}
    children: dict[str, list[Node]] = {}
    for node in sorted(nodes, key=_begin):
        if node.parent_id in known and node.parent_id != node.span_id:
            children.setdefault(node.parent_id, []).append(node)

    def grown(node: Node, above: frozenset[str]) -> Node:
        below = (child for child in children.get(node.span_id, ()) if child.span_id not in above)
        return replace(node, children=tuple(grown(child, above | {child.span_id}) for child in below))

    roots = [
        node for node in sorted(nodes, key=_begin) if node.parent_id not in known or node.parent_id == node.span_id
    ]
    return [grown(root, frozenset({root.span_id})) for root in roots or sorted(nodes, key=_begin)[:1]]


def _divided(root: Node, until: int) -> tuple[list[Node], list[Node]]:
    """The tree as far as it was begun by then, and the roots of what was begun later."""
    if root.start > until:
        return [], [root]
    kept, later = list[Node](), list[Node]()
    for child in root.children:
        inner, apart = _divided(child, until)
        kept += inner
        later += apart
    return [replace(root, children=tuple(kept))], later
