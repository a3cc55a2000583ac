"""The demo pair's training data: Python source that this machine already holds.

Two sources: the running interpreter's standard library, and the installed distributions whose own metadata declares a
permissive licence. Held-out modules (``heldout.txt``) never enter training, nor does any file that repeats them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELDOUT = Path(__file__).resolve().parents[1] / "heldout.txt"
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|Zero-Clause)\b", re.IGNORECASE)
COPYLEFT = re.compile(r"\b(GPL|LGPL|AGPL|MPL|Mozilla|EPL)\b", re.IGNORECASE)
# Tables and generated text teach a model nothing about writing Python.
SKIPPED = re.compile(r"(^|/)(encodings/|pydoc_data/|lib2to3/tests/data|.*_pb2(_grpc)?\.py$|unicodedata|.*testdata)")
MAX_FILE_BYTES = 200_000
PACKAGE_BYTES = 7_000_000


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: where it came from and its text."""

    origin: str
    text: str


def heldout_names() -> frozenset[str]:
    """Paths, relative to the standard library, that training must not see."""
    lines = HELDOUT.read_text().splitlines()
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def heldout() -> list[Document]:
    """The held-out files as this interpreter ships them (a file that it lacks is left out)."""
    root = stdlib_root()
    found = (root / name for name in sorted(heldout_names()))
    return [Document(f"stdlib/{path.relative_to(root)}", path.read_text()) for path in found if path.is_file()]


def training() -> tuple[list[Document], list[str]]:
    """Training documents, each once, and one line per source that says how much it gave.

    Files whose lines are mostly those of a held-out file (vendored or older copies) are dropped.
    """
    banned = _long_lines(*(document.text for document in heldout()))
    seen: set[str] = set()
    documents: list[Document] = []
    summary: list[str] = []
    for name, files in _sources():
        taken = 0
        for document in files:
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            if digest in seen or _repeats(document.text, banned):
                continue
            seen.add(digest)
            documents.append(document)
            taken += len(document.text)
            if name != "stdlib" and taken > PACKAGE_BYTES:
                break
        if taken:
            summary.append(f"{name}: {taken / 1e6:.1f} MB")
    return documents, summary


def _sources() -> Iterator[tuple[str, Iterator[Document]]]:
    root, banned = stdlib_root(), heldout_names()
    stdlib = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    yield "stdlib", _read("stdlib", root, (p for p in stdlib if str(p.relative_to(root)) not in banned))
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        name = distribution.metadata["Name"]
        if name.lower() == "countersign" or not _permissive(distribution):
            continue
        base = Path(str(distribution.locate_file("")))
        paths = [base / str(file) for file in distribution.files or () if str(file).endswith(".py")]
        # By hash, so that a package over its share is sampled across its folders.
        paths.sort(key=lambda path: hashlib.sha256(str(path.relative_to(base)).encode()).digest())
        yield f"{name} {distribution.version}", _read(name, base, iter(paths))


def _read(name: str, root: Path, paths: Iterator[Path]) -> Iterator[Document]:
    for path in paths:
        relative = path.relative_to(root)
        if SKIPPED.search(str(relative)) or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200 and sum(map(str.isalpha, text)) > 0.35 * len(text):
            yield Document(f"{name}/{relative}", text)


def _permissive(distribution: importlib.metadata.Distribution) -> bool:
    metadata = distribution.metadata
    declared = [value for name in ("License-Expression", "License") for value in metadata.get_all(name) or ()]
    declared += [value for value in metadata.get_all("Classifier") or () if value.startswith("License")]
    text = " ".join(value[:200] for value in declared)
    return bool(PERMISSIVE.search(text)) and not COPYLEFT.search(text)


def _long_lines(*texts: str) -> frozenset[str]:
    return frozenset(line.strip() for text in texts for line in text.splitlines() if len(line.strip()) >= 30)


def _repeats(text: str, banned: frozenset[str]) -> bool:
    lines = _long_lines(text)
    return len(lines & banned) > 0.2 * len(lines) if lines else False
