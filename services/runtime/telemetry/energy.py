"""What the machine takes: joules by NVML (GPUs) or RAPL (processors) where they can be read, else nothing is claimed.

The counters belong to devices, not to processes: they tell of a machine that serves and does nothing else. RAPL's are
root's on most systems (CVE-2020-8694), and virtual machines have none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.instruments import Meter

POWERCAP = Path("/sys/class/powercap")
NVML, RAPL, PROCESSOR, GPU, GPU_MEMORY = "nvml", "rapl", "processor", "gpu", "gpu_memory"

Constraint = Literal["compute", "memory", "unknown"]

# NVML's utilisation is the share of a sample period in which any kernel ran, and in which memory was read or written.
# Kernels that fill the time and leave memory alone are bound by compute, those that keep it busy by memory.
_MEMORY_BUSY, _MEMORY_IDLE, _KERNELS_BUSY = 0.6, 0.4, 0.9
_SHORTEST_S = 1.0


@dataclass(slots=True)
class _Zone:
    """A counter in microjoules that starts again from 0 beyond ``range_uj``."""

    file: Path
    range_uj: int
    last_uj: int
    sum_uj: int = 0

    def read(self) -> int:
        """Microjoules since it was opened."""
        now = int(self.file.read_text())
        self.sum_uj += now - self.last_uj if now >= self.last_uj else now + self.range_uj - self.last_uj
        self.last_uj = now
        return self.sum_uj


class Rapl:
    """Running Average Power Limit: packages, and memory where it is counted apart.

    A counter that goes round more than once between two reads, which takes minutes, is seen as once.
    """

    def __init__(self, zones: list[_Zone]) -> None:
        self._zones = zones

    @staticmethod
    def open(folder: Path = POWERCAP) -> Rapl | None:
        """None where the kernel has no such counters, or keeps them to itself."""
        try:
            zones = [_opened(zone) for zone in sorted(folder.glob("intel-rapl:*")) if _counts(zone)]
        except (OSError, ValueError):
            return None
        return Rapl(zones) if zones else None

    def joules(self) -> float | None:
        """Since it was opened; None while it cannot be read."""
        try:
            return sum(zone.read() for zone in self._zones) / 1e6
        except (OSError, ValueError):
            return None


def _counts(zone: Path) -> bool:
    """Not the parts of a package (core, uncore), nor what holds packages again (psys)."""
    name = (zone / "name").read_text().strip()
    return name == "dram" or name.startswith("package")


def _opened(zone: Path) -> _Zone:
    file = zone / "energy_uj"
    return _Zone(file, int((zone / "max_energy_range_uj").read_text()), int(file.read_text()))


@dataclass(frozen=True, slots=True)
class Busy:
    """The share of the time in which kernels ran, and in which memory was read or written; the mean over all GPUs."""

    kernels: float
    memory: float

    def bound_by(self) -> Constraint:
        """As far as this can tell."""
        if self.memory >= _MEMORY_BUSY:
            return "memory"
        return "compute" if self.kernels >= _KERNELS_BUSY and self.memory < _MEMORY_IDLE else "unknown"


class Gpus(Protocol):
    """What :class:`Nvml` reads."""

    def joules(self) -> float | None: ...

    def busy(self) -> Busy | None: ...


class Nvml:
    """All GPUs that NVIDIA's library sees; nvidia-ml-py is optional."""

    def __init__(self, library: Any, devices: list[Any]) -> None:
        self._library = library
        self._devices = devices
        self._began = 0
        self._began = self._millijoules()

    @staticmethod
    def open() -> Nvml | None:
        """None without the library, a driver, a GPU, or a counter of its energy (before Volta)."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            return Nvml(pynvml, devices) if devices else None
        except pynvml.NVMLError:
            return None

    def joules(self) -> float | None:
        """Since it was opened; None while it cannot be read."""
        try:
            return (self._millijoules() - self._began) / 1e3
        except self._library.NVMLError:
            return None

    def busy(self) -> Busy | None:
        """Over the last sample period, a second or less; None while it cannot be read."""
        try:
            rates = [self._library.nvmlDeviceGetUtilizationRates(device) for device in self._devices]
        except self._library.NVMLError:
            return None
        whole = 100 * len(rates)
        return Busy(sum(each.gpu for each in rates) / whole, sum(each.memory for each in rates) / whole)

    def _millijoules(self) -> int:
        return sum(int(self._library.nvmlDeviceGetTotalEnergyConsumption(device)) for device in self._devices)


class EnergyMeter:
    """What a process can say of the machine's energy, and of what bounds its speed."""

    def __init__(
        self,
        rapl: Rapl | None,
        gpus: Gpus | None,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.process_time,
    ) -> None:
        self._rapl, self._gpus = rapl, gpus
        self._clock, self._spent = clock, spent
        self._last, self._share = (clock(), spent()), 0.0

    @staticmethod
    def open() -> EnergyMeter:
        """Of this machine."""
        return EnergyMeter(Rapl.open(), Nvml.open())

    def joules(self) -> dict[str, float]:
        """By source, since this process opened it; nothing for a source that cannot be read."""
        sources = ((RAPL, self._rapl), (NVML, self._gpus))
        found = {source: counter.joules() for source, counter in sources if counter is not None}
        return {source: joules for source, joules in found.items() if joules is not None}

    def available(self) -> dict[str, float]:
        """By source: 1 where it is read."""
        found = self.joules()
        return {source: float(source in found) for source in (RAPL, NVML)}

    def utilisation(self) -> dict[str, float]:
        """Shares of 1; the processor's is this process's of all cores, since the last look at least a second ago."""
        now, spent = self._clock(), self._spent()
        if now - self._last[0] >= _SHORTEST_S:
            self._share = (spent - self._last[1]) / (now - self._last[0]) / (os.cpu_count() or 1)
            self._last = (now, spent)
        busy = self._gpus.busy() if self._gpus is not None else None
        gpus = {} if busy is None else {GPU: busy.kernels, GPU_MEMORY: busy.memory}
        return {PROCESSOR: self._share, **gpus}

    def constraint(self) -> Mapping[str, float]:
        """1 for one of them. Without a GPU nothing here can tell a processor's arithmetic from its memory: unknown."""
        busy = self._gpus.busy() if self._gpus is not None else None
        now: Constraint = busy.bound_by() if busy is not None else "unknown"
        return {name: float(name == now) for name in ("compute", "memory", "unknown")}


def observe_energy(energy: EnergyMeter, meter: Meter | None = None) -> None:
    """Read whenever somebody looks."""
    metrics.observe(metrics.ENERGY, energy.joules, meter)
    metrics.observe(metrics.ENERGY_AVAILABLE, energy.available, meter)
    metrics.observe(metrics.UTILISATION, energy.utilisation, meter)
    metrics.observe(metrics.CONSTRAINT_NOW, energy.constraint, meter)
