"""What is expected of a specification: ``tla/*/manifest.toml``.

    [[configuration]]   name, module, cfg, states, depth, quick, witnesses, fair; simulate = [behaviours, length, seed]
    [[mutant]]          name, base (a configuration), replace (definition = faulty one), killers, bug
    [[equivalent]]      name, base, replace, reason: a change that breaks nothing, and why
    [unkilled]          property = reason, for each that kills no mutant

Every configuration must pass, every witness of it, a state said never to come, must come, and every mutant must fall to
each of its killers, alone. ``fair``: witnesses over behaviours. Where fairness asks for steps that nobody can take, no
behaviour is left and every liveness property holds; such a witness then does not fall.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countersign.verify.spec.errors import SpecError

SECTIONS = ("INVARIANTS", "PROPERTIES")
_KEYWORDS = frozenset({"SPECIFICATION", "CONSTANTS", "SYMMETRY", "CONSTRAINT", *SECTIONS})


@dataclass(frozen=True, slots=True)
class Cfg:
    """A .cfg file: its comment, what stands before the properties, and those by section."""

    model: tuple[str, ...]
    properties: dict[str, str]

    def text(
        self, names: tuple[str, ...] | None = None, replace: dict[str, str] | None = None, default: str = SECTIONS[0]
    ) -> str:
        """The file with only these properties (None: all), and these definitions replaced; ``default`` is the section
        of those that the file does not name.
        """
        replace = replace or {}
        # What the file itself replaces by something else is replaced here instead.
        lines = [line for line in self.model if line.partition("<-")[0].strip() not in replace]
        at = lines.index("CONSTANTS") + 1
        lines[at:at] = [f"  {old} <- {new}" for old, new in replace.items()]
        chosen = self.properties if names is None else names
        lines += [f"{self.properties.get(name, default)} {name}" for name in chosen]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Configuration:
    """One model that must pass; ``states`` and ``depth`` are those it had when this was written."""

    name: str
    module: Path
    cfg: Cfg
    states: int
    depth: int
    quick: bool
    witnesses: tuple[str, ...]
    fair: tuple[str, ...]
    simulate: tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class Mutant:
    """A deliberate bug in a configuration. Without ``killers`` it is said to break nothing."""

    name: str
    base: Configuration
    module: Path
    replace: dict[str, str]
    killers: tuple[str, ...]
    quick: bool
    why: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One specification's."""

    name: str
    configurations: tuple[Configuration, ...]
    mutants: tuple[Mutant, ...]
    equivalents: tuple[Mutant, ...]
    unkilled: dict[str, str]


def specifications() -> Path:
    """The folder ``tla`` of this checkout. Raises SpecError where this is an installation."""
    folder = Path(__file__).resolve().parents[2] / "tla"
    if not folder.is_dir():
        raise SpecError("the specifications stand in a checkout's folder tla/; run countersign spec from there")
    return folder


def names() -> list[str]:
    """Of all specifications. Raises SpecError as `specifications` does."""
    return sorted(file.parent.name for file in specifications().glob("*/manifest.toml"))


def load(spec: str | Path) -> Manifest:
    """The manifest of the specification of this name, or in this folder.

    Raises:
        SpecError: it, or a .cfg file that it names, is not as it should be.
    """
    folder = specifications() / spec
    try:
        data = tomllib.loads((folder / "manifest.toml").read_text())
        known = {raw["name"]: _configuration(folder, raw) for raw in data["configuration"]}
        manifest = Manifest(
            name=folder.name,
            configurations=tuple(known.values()),
            mutants=tuple(_mutant(folder, raw, known) for raw in data.get("mutant", ())),
            equivalents=tuple(_mutant(folder, raw, known) for raw in data.get("equivalent", ())),
            unkilled=data.get("unkilled", {}),
        )
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{folder.name}/manifest.toml: {type(error).__name__} {error}") from error
    _lint(manifest)
    return manifest


def read_cfg(file: Path) -> Cfg:
    """A .cfg file, one name a line below a keyword.

    Raises:
        SpecError: a comment stands where it could hide a property, or a line is not understood.
    """
    model: list[str] = []
    properties: dict[str, str] = {}
    section = ""
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if "\\*" in line or "(*" in line:
            if section:
                raise SpecError(f"{file.name} line {number}: a comment behind the first keyword can hide a property")
            continue
        if words and words[0] in _KEYWORDS:
            section, words = words[0], words[1:]
            if section not in SECTIONS:
                model.append(line)
        elif words and not section:
            raise SpecError(f"{file.name} line {number}: {words[0]} is no keyword known here")
        elif words and section not in SECTIONS:
            model.append(line)
        if section in SECTIONS:
            properties.update(dict.fromkeys(words, section))
    return Cfg(tuple(model), properties)


def _configuration(folder: Path, raw: dict[str, Any]) -> Configuration:
    simulate = raw.get("simulate")
    return Configuration(
        name=raw["name"],
        module=folder / f"{raw['module']}.tla",
        cfg=read_cfg(folder / f"{raw['cfg']}.cfg"),
        states=raw.get("states", 0),
        depth=raw.get("depth", 0),
        quick=raw.get("quick", False),
        witnesses=tuple(raw["witnesses"]),
        fair=tuple(raw.get("fair", ())),
        simulate=(simulate[0], simulate[1], simulate[2]) if simulate else None,
    )


def _mutant(folder: Path, raw: dict[str, Any], known: dict[str, Configuration]) -> Mutant:
    return Mutant(
        name=raw["name"],
        base=known[raw["base"]],
        module=folder / "Mutants.tla",
        replace=raw["replace"],
        killers=tuple(raw.get("killers", ())),
        quick=raw.get("quick", True),
        why=raw["why"],
    )


def _lint(manifest: Manifest) -> None:
    """Each configuration shows that it is not empty; each property falls once, or it is said why it does not."""
    for one in manifest.configurations:
        if not one.witnesses:
            raise SpecError(f"configuration {one.name} has no witness: it may check nothing")
        if not one.fair and any(line.split()[-1:] in (["LiveSpec"], ["LogSpec"]) for line in one.cfg.model):
            raise SpecError(f"configuration {one.name} has no fair witness: it may have no behaviour")
    checked = {name for one in manifest.configurations for name in one.cfg.properties}
    killers = {name for mutant in manifest.mutants for name in mutant.killers}
    for mutant in manifest.mutants:
        if strange := set(mutant.killers) - set(mutant.base.cfg.properties):
            raise SpecError(f"mutant {mutant.name}: {sorted(strange)} are not checked in {mutant.base.name}")
        if not mutant.killers:
            raise SpecError(f"mutant {mutant.name} names no property that kills it")
    if idle := checked - killers - set(manifest.unkilled):
        raise SpecError(f"nothing shows that these can fall: {sorted(idle)}")
