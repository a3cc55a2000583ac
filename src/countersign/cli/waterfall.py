"""A request's trace as lines: who did what for it, when, and for how long."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from countersign.cli.operator import amount, counted, duration, moment, share
from countersign.cli.printable import in_one_line
from countersign.cli.spans import Node, RequestTrace, rounds
from countersign.cli.tables import BAD, HEAD, QUIET
from countersign.services.runtime.telemetry import attributes as names

# Below so many cells there are no bars, and below so many no instances.
BARS_FROM, INSTANCES_FROM = 56, 96
UNLIMITED, MOST_NARROW = 140, 24
MOST_EVENTS = 12
_COLOURS = {"router": "cyan", "target": "yellow", "draft": "magenta", "kv": "blue", "tokenizer": "green"}
_ENDS = frozenset({"stop", "length", "deadline"})
_DURATION, _THERE, _LEAST_BARS = 8, 15, 16
_GAP = 2


@dataclass(frozen=True, slots=True)
class _Line:
    """A span, or a note below one; ``tree``: the lines to its left; ``other``: of a call, what answered it."""

    tree: str
    node: Node
    name: str
    other: Node | None = None
    note: Text | None = None

    @property
    def at(self) -> Node:
        """Where the work was done."""
        return self.other or self.node


def waterfall(trace: RequestTrace, width: int | None) -> list[Text]:
    """Lines of at most ``width`` cells; None: as wide as they are."""
    lines = [line for root in trace.roots for line in _lines(root, "", "")]
    wide = max(MOST_NARROW, width or UNLIMITED)
    who = max(cell_len(_instance(line.at)) for line in lines) if wide >= INSTANCES_FROM else 0
    fixed = _GAP + (who + _GAP + _THERE if who else 0) + _DURATION + (_GAP if wide >= BARS_FROM else 0)
    left = max(cell_len(line.tree + line.name) for line in lines if line.note is None)
    left = min(left, wide - fixed - (_LEAST_BARS if wide >= BARS_FROM else 0))
    bars = wide - fixed - left if wide >= BARS_FROM else 0
    shown = [_shown(trace, line, left, who, bars, width) for line in lines]
    scale = [_scale(trace, left + _GAP + (who + _GAP if who else 0), bars)] if bars else []
    return [*_head(trace), Text(), *scale, *shown, *_after(trace)]


def bar(begin: float, end: float, width: int) -> str:
    """From share ``begin`` to share ``end`` of ``width`` cells, in halves of cells; never nothing."""
    left = min(max(0, math.floor(2 * width * begin)), 2 * width - 1)
    right = min(max(left + 1, math.ceil(2 * width * end)), 2 * width)
    halves = [left <= half < right for half in range(2 * width)]
    return "".join(_HALVES[halves[2 * cell], halves[2 * cell + 1]] for cell in range(width))


_HALVES = {(False, False): " ", (True, False): "╸", (False, True): "╺", (True, True): "━"}


def _lines(node: Node, tree: str, below: str) -> Iterator[_Line]:
    """A call and its answer at the other end are one line."""
    other = _answered(node)
    children = other.children if other is not None else node.children
    yield _Line(tree, node, _named(node), other)
    for note in _notes(node, other):
        yield _Line(below + ("│  " if children else "   "), node, "", note=note)
    for place, child in enumerate(children):
        last = place == len(children) - 1
        yield from _lines(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


def _answered(node: Node) -> Node | None:
    """The other end of a call."""
    match node.children:
        case (only,) if (node.kind, only.kind, only.name) == ("client", "server", node.name):
            return only
    return None


def _named(node: Node) -> str:
    return in_one_line(node.name.removeprefix("countersign.v1."))


def _instance(node: Node) -> str:
    return in_one_line(node.instance)


def _head(trace: RequestTrace) -> list[Text]:
    root, facts = trace.roots[0], [moment(trace.start / 1e6)]
    found = {key: value for each in trace.roots for node in each.walk() for key, value in node.attributes.items()}
    reason = _word(root.attributes.get(names.FINISH_REASONS, found.get(names.FINISH_REASONS)))
    tokens = found.get(names.OUTPUT_TOKENS)
    if tokens is not None:
        facts.append(f"{counted(tokens, 'token')} of a prompt of {amount(found.get(names.INPUT_TOKENS, 0))}")
    if names.TIME_TO_FIRST_CHUNK in found:
        facts.append(f"the first after {duration(float(found[names.TIME_TO_FIRST_CHUNK]))}")
    if reason:
        facts.append(f"ended by {reason}" if reason in _ENDS else reason)
    title = Text.assemble((in_one_line(trace.request_id or "a trace"), HEAD), f"  {', '.join(facts)}")
    ids = [f"trace {trace.trace_id}"]
    if receipt := found.get(names.RECEIPT):
        ids.append(f"receipt {receipt}")
    return [title, *(Text(in_one_line(each), QUIET) for each in ids)]


def _word(value: Any) -> str:
    return in_one_line(", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value))


def _scale(trace: RequestTrace, before: int, bars: int) -> Text:
    """Where the bars begin and end."""
    whole = duration((trace.end - trace.start) / 1e9)
    return Text(f"{'':{before}}0{whole:>{bars - 1}}", QUIET)


def _shown(trace: RequestTrace, line: _Line, left: int, who: int, bars: int, width: int | None) -> Text:
    node = line.node
    if line.note is not None:
        text = Text.assemble((line.tree, QUIET), line.note)
        if width is not None:
            text.truncate(width, overflow="ellipsis")
        return text
    begin, whole = trace.start, max(1, trace.end - trace.start)
    style = BAD if node.error else _COLOURS.get(line.at.service, "")
    text = Text.assemble((line.tree, QUIET), line.name)
    text.truncate(left, overflow="ellipsis")
    text.pad_right(left + _GAP - text.cell_len)
    if who:
        text.append(set_cell_size(_instance(line.at), who) + " " * _GAP, QUIET)
    if bars:
        text.append(bar((node.start - begin) / whole, (node.end - begin) / whole, bars), style)
        text.append(" " * _GAP)
    text.append(f"{duration(node.seconds):>{_DURATION}}")
    if who and line.other is not None:
        text.append(f"{duration(line.other.seconds):>9} there", QUIET)
    return text


def _notes(node: Node, other: Node | None) -> Iterator[Text]:
    """What is worth a line of its own."""
    for each in (node, other):
        if each is not None and each.error:
            yield Text(f"failed: {in_one_line(each.error)}", BAD)
            break
    if (total := rounds(node)) is not None:
        mean = f"{total.tokens / total.count:.1f} each; batch {total.batch:.1f}"
        yield Text(f"{counted(total.count, 'round')}: {counted(total.tokens, 'token')}, {mean}", QUIET)
        if total.proposed:
            part = f"{total.accepted} of {total.proposed} proposed ({share(total.accepted, total.proposed)})"
            yield Text(f"accepted {part}", QUIET)
        yield Text(f"a pass {duration(total.pass_mean_s)}, at most {duration(total.pass_max_s)}", QUIET)
        yield Text(f"a commit {duration(total.commit_mean_s)}, at most {duration(total.commit_max_s)}", QUIET)
    for about in _said(node):
        yield Text(about, QUIET)
    others = [event for event in node.events if event[1] != names.ROUND]
    for at, name, values in others[:MOST_EVENTS]:
        told = " ".join(f"{key.removeprefix('countersign.')}={value}" for key, value in values.items())
        yield Text(in_one_line(f"{name} at {duration((at - node.start) / 1e9)} {told}").rstrip(), QUIET)
    if len(others) > MOST_EVENTS:
        yield Text(f"{len(others) - MOST_EVENTS} events more", QUIET)


def _said(node: Node) -> Iterator[str]:
    """Attributes that a reader wants to know."""
    found = node.attributes
    if found.get(names.EPOCH, 1) != 1:
        yield f"epoch {_word(found[names.EPOCH])}: taken over"
    if blocks := found.get(names.CACHED_BLOCKS):
        yield f"{counted(float(blocks), 'block')} of KV found"
    if calls := found.get(names.DRAFT_CALLS):
        busy = duration(float(found.get(names.DRAFT_BUSY, 0)))
        yield f"{counted(float(calls), 'call')}, {_word(found.get(names.DRAFTED, 0))} tokens proposed, busy for {busy}"
    if verdict := found.get(names.VERDICT):
        index = found.get(names.VERDICT_INDEX)
        yield f"verdict {_word(verdict)}" + (f", entry {_word(index)} of the log" if index is not None else "")


def _after(trace: RequestTrace) -> list[Text]:
    """What came when the client had its answer, and other traces of the request, a line each."""
    lines: list[Text] = []
    for title, nodes in (("afterwards", trace.later), ("other traces of this request", trace.linked)):
        if nodes:
            lines += [Text(), Text(title, HEAD)]
        lines += [_apart(trace, node, nodes) for node in nodes]
    return lines


def _apart(trace: RequestTrace, node: Node, nodes: Sequence[Node]) -> Text:
    widest, who = (max(cell_len(name(each)) for each in nodes) for name in (_named, _instance))
    notes = [note.plain for note in _notes(node, None)]
    about = [f"after {duration((node.start - trace.start) / 1e9)}, took {duration(node.seconds)}", *notes]
    bad = node.error or node.attributes.get(names.VERDICT) == "fail"
    return Text.assemble(
        set_cell_size(_named(node), widest),
        ("  " + set_cell_size(_instance(node), who) + "  ", QUIET),
        ("; ".join(about), BAD if bad else ""),
    )
