"""What attention over ranks costs by arithmetic, bytes and latency: beside what was measured, and where no GPU is.

A step of a schedule takes as long as the slower of its computing and its sending. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Topology = Literal["mesh", "switch"]
Way = Literal["ring", "token-ring", "gather-q"]


@dataclass(frozen=True, slots=True)
class Machine:
    """``rate``: multiply-adds a second of attention on one rank; ``cores``: ranks that compute at the same time, None
    for all. ``bandwidth``: bytes a second in one direction of a rank's port; ``latency``: seconds of a message;
    ``overhead``: of a step. On a ``mesh`` queries and partials take different directions at once; behind a ``switch``
    all that leaves a rank shares its port.
    """

    rate: float
    bandwidth: float
    latency: float
    topology: Topology = "switch"
    cores: int | None = None
    overhead: float = 0.0


@dataclass(frozen=True, slots=True)
class Case:
    """``new`` rows after ``cached`` tokens; ``element``: bytes of an element that travels, partials apart, in fp32."""

    new: int
    cached: int
    heads: int
    kv_heads: int
    head_dim: int
    element: int

    @property
    def work(self) -> float:
        """Multiply-adds over all ranks: causal among the new rows, all of the cached keys."""
        pairs = self.new * self.cached + self.new * (self.new + 1) / 2
        return 2 * pairs * self.heads * self.head_dim


def seconds(way: Way, case: Case, ranks: int, machine: Machine) -> float:
    """One attention over ``ranks`` with equal shares; of what travels, three quarters are needed where it is causal."""
    share = 1 if case.cached > 3 * case.new else 0.75
    compute = case.work / ranks**2 / machine.rate
    if ranks == 1:
        return compute + machine.overhead
    rows, slots = case.new / ranks, (case.new + case.cached) / ranks
    forward = share * rows * case.heads * case.head_dim * case.element
    back = share * rows * case.heads * (4 * case.head_dim + 4)
    keys = share * slots * 2 * case.kv_heads * case.head_dim * case.element
    if way == "ring":
        send = keys / machine.bandwidth + machine.latency
        return (ranks - 1) * max(compute, send) + compute + ranks * machine.overhead
    if way == "gather-q":
        # Queries are everywhere already; one exchange of all partials.
        return ranks * compute + (ranks - 1) * back / machine.bandwidth + machine.latency + 2 * machine.overhead
    both = max(forward, back) if machine.topology == "mesh" else forward + back
    send = both / machine.bandwidth + machine.latency
    # The last partials go home when all computing is done.
    return (ranks - 1) * max(compute, send) + compute + back / machine.bandwidth + (ranks + 1) * machine.overhead


def planned(steps: Sequence[Sequence[float]], machine: Machine) -> float:
    """A plan whose rank r does ``steps[s][r]`` multiply-adds in step s, where ranks share the machine's cores and
    sending costs nothing beside that.
    """
    cores = machine.cores or len(steps[0])
    return sum(max(*work, sum(work) / cores) / machine.rate + machine.overhead for work in steps)


# Nominal figures of data sheets, in one direction: NVLink 4 of an H100 450 GB/s, PCIe 5 x16 64 GB/s, a 400 Gbit/s port
# 50 GB/s. The rate is 500 TFLOP/s, two floating-point operations a multiply-add.
LINKS = {
    "NVLink 4 behind NVSwitch": Machine(250e12, 450e9, 4e-6, "switch"),
    "NVLink 4, full mesh": Machine(250e12, 450e9, 4e-6, "mesh"),
    "PCIe 5 x16": Machine(250e12, 64e9, 8e-6, "mesh"),
    "Ethernet 400 Gbit/s": Machine(250e12, 50e9, 15e-6, "switch"),
}
CASES = {
    "prefill of 128 k, 32 heads each": Case(131072, 0, 32, 32, 128, 2),
    "prefill of 128 k, 32 query heads on 4": Case(131072, 0, 32, 4, 128, 2),
    "2 k new on 126 k cached, 32 query heads on 4": Case(2048, 129024, 32, 4, 128, 2),
}
RANKS = (2, 4, 8, 16, 32, 64, 128, 256)
