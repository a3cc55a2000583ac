"""What is on a disk after the power was cut: nothing but what was synced.

While ``Disk`` watches, it notes what each fsync makes durable: of a file its bytes, of a folder the names in it. A name
whose file was never synced is an empty file, as on many file systems; a file whose name was not synced is not there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

Files = dict[int, bytes]
Folders = dict[int, dict[str, tuple[int, bool]]]
"""By inode: the names in a folder, and of each its inode and whether it is a folder."""


@dataclass
class Disk:
    """Of the folder ``root``; ``moments`` has the state after each fsync, the worst moments to lose power at."""

    root: Path
    acknowledged: int = 0
    moments: list[tuple[Files, Folders, int]] = field(default_factory=list)
    _files: Files = field(default_factory=dict)
    _folders: Folders = field(default_factory=dict)
    _held: list[int] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes every ``os.fsync``."""
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            self._synced(descriptor)

        try:
            with patch("os.fsync", fsync):
                yield
        finally:
            for descriptor in self._held:
                os.close(descriptor)

    def left(self, moment: int, folder: Path) -> int:
        """Writes what the disk held at a moment into ``folder``; how much was acknowledged by then."""
        files, folders, acknowledged = self.moments[moment]
        _restore(self.root.stat().st_ino, folder, files, folders)
        return acknowledged

    def _synced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self._held.append(os.dup(descriptor))  # no other file shall get the inode of one that is replaced
        if stat.S_ISDIR(status.st_mode):
            names = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
            self._folders = {**self._folders, status.st_ino: names}
        else:
            self._files = {**self._files, status.st_ino: path.read_bytes()}
        self.moments.append((self._files, self._folders, self.acknowledged))


def _restore(inode: int, folder: Path, files: Files, folders: Folders) -> None:
    folder.mkdir()
    for name, (child, is_folder) in folders.get(inode, {}).items():
        if is_folder:
            _restore(child, folder / name, files, folders)
        else:
            (folder / name).write_bytes(files.get(child, b""))
