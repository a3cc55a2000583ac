"""Joules from a powercap tree as the kernel lays it out, and from NVML as its binding answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from countersign.services.runtime.telemetry.energy import Busy, EnergyMeter, Nvml, Rapl

RANGE_UJ = 262_143_328_850  # what a Xeon says


def zone(tree: Path, path: str, name: str, energy_uj: int) -> None:
    """A zone, as the kernel's intel_rapl driver shows it below /sys/class/powercap: links to all, in one folder."""
    real = tree / "devices" / path
    real.mkdir(parents=True, exist_ok=True)
    (real / "name").write_text(f"{name}\n")
    (real / "energy_uj").write_text(f"{energy_uj}\n")
    (real / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    links = tree / "class"
    links.mkdir(exist_ok=True)
    link = links / real.name
    if not link.exists():
        link.symlink_to(real)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two packages, one with the parts and the memory that servers show, and a platform that holds all again."""
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "intel-rapl").mkdir()  # the control type itself, without counters
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0/intel-rapl:0:0", "core", 500_000)
    zone(tmp_path, "intel-rapl:0/intel-rapl:0:1", "dram", 100_000)
    zone(tmp_path, "intel-rapl:1", "package-1", RANGE_UJ - 1_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 7)
    return tmp_path


def test_packages_and_memory_count_and_what_is_in_them_already_does_not(tree: Path) -> None:
    rapl = Rapl.open(tree / "class")
    assert rapl is not None
    assert rapl.joules() == 0
    zone(tree, "intel-rapl:0", "package-0", 4_000_000)
    zone(tree, "intel-rapl:0/intel-rapl:0:0", "core", 2_500_000)
    zone(tree, "intel-rapl:0/intel-rapl:0:1", "dram", 600_000)
    zone(tree, "intel-rapl:2", "psys", 9_000_000)
    assert rapl.joules() == pytest.approx(3.5)


def test_a_counter_that_starts_again_goes_on_counting(tree: Path) -> None:
    rapl = Rapl.open(tree / "class")
    assert rapl is not None
    zone(tree, "intel-rapl:1", "package-1", 2_000_000)
    assert rapl.joules() == pytest.approx(3)
    zone(tree, "intel-rapl:1", "package-1", 2_500_000)
    assert rapl.joules() == pytest.approx(3.5)


def test_a_machine_without_counters_or_with_unreadable_ones_is_not_measured(tree: Path, tmp_path: Path) -> None:
    assert Rapl.open(tmp_path / "nowhere") is None
    file = tree / "devices" / "intel-rapl:1" / "energy_uj"
    file.unlink()
    file.mkdir()  # a read fails, as it does for all but root since CVE-2020-8694
    assert Rapl.open(tree / "class") is None


def test_counters_that_vanish_leave_a_gap_and_no_number(tree: Path) -> None:
    rapl = Rapl.open(tree / "class")
    assert rapl is not None
    (tree / "devices" / "intel-rapl:0" / "energy_uj").unlink()
    meter = EnergyMeter(rapl, None)
    assert meter.joules() == {}
    assert meter.available() == {"rapl": 0.0, "nvml": 0.0}


class LibraryError(Exception):
    """NVML's."""


@dataclass
class Library:
    """The calls of pynvml that are made again and again, with its units: millijoules, per cent."""

    energy: dict[str, int]
    kernels: int = 0
    memory: int = 0
    lost: bool = False
    NVMLError = LibraryError

    def nvmlDeviceGetTotalEnergyConsumption(self, device: str) -> int:
        if self.lost:
            raise LibraryError
        return self.energy[device]

    def nvmlDeviceGetUtilizationRates(self, device: str) -> Any:
        if self.lost:
            raise LibraryError
        return SimpleNamespace(gpu=self.kernels, memory=self.memory)


def test_the_calls_are_those_of_nvidia_s_binding() -> None:
    calls = [name for name in vars(Library) if name.startswith("nvml")]
    assert len(calls) == 2
    for name in (*calls, "nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
        assert callable(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)


def test_gpus_are_summed_from_when_they_were_first_read() -> None:
    library = Library({"a": 5_000, "b": 7_000}, kernels=80, memory=30)
    gpus = Nvml(library, ["a", "b"])
    library.energy = {"a": 6_500, "b": 7_250}
    assert gpus.joules() == pytest.approx(1.75)
    assert gpus.busy() == Busy(pytest.approx(0.8), pytest.approx(0.3))  # type: ignore[arg-type]  # about these


def test_a_gpu_that_falls_off_the_bus_is_not_measured() -> None:
    library = Library({"a": 5_000})
    gpus = Nvml(library, ["a"])
    library.lost = True
    meter = EnergyMeter(None, gpus)
    assert meter.joules() == {}
    assert meter.utilisation().keys() == {"processor"}
    assert meter.constraint() == {"compute": 0, "memory": 0, "unknown": 1}


@pytest.mark.parametrize(
    ("kernels", "memory", "expected"),
    [(1.0, 0.7, "memory"), (0.5, 0.9, "memory"), (0.95, 0.1, "compute"), (0.95, 0.5, "unknown"), (0.3, 0.1, "unknown")],
)
def test_what_bounds_a_gpu_is_said_only_where_its_rates_tell(kernels: float, memory: float, expected: str) -> None:
    assert Busy(kernels, memory).bound_by() == expected


def test_the_share_of_the_processor_is_that_since_the_last_look() -> None:
    now, spent = 0.0, 0.0
    meter = EnergyMeter(None, None, clock=lambda: now, spent=lambda: spent)
    import os

    cores = os.cpu_count() or 1
    now, spent = 10.0, 5.0 * cores
    assert meter.utilisation() == {"processor": pytest.approx(0.5)}
    now = 10.5  # too soon to say anything new
    assert meter.utilisation() == {"processor": pytest.approx(0.5)}
    now = 20.0
    assert meter.utilisation() == {"processor": pytest.approx(0)}


def test_this_machine_says_what_it_has() -> None:
    meter = EnergyMeter.open()
    available, joules = meter.available(), meter.joules()
    assert available.keys() == {"rapl", "nvml"}
    assert joules.keys() == {source for source, there in available.items() if there}
    assert all(value >= 0 for value in joules.values())
    assert sum(meter.constraint().values()) == 1
