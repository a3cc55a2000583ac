"""Appends to a log without end and tells each acknowledgement: a process to be killed (tests/verify/log/test_crash.py).

    python log_appender.py FOLDER SEED

Entry i is ``entry(i)``, so that whoever opens the folder knows what must be in it.
"""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

from countersign.verify.log import store
from countersign.verify.log.checkpoint import Checkpoint, sign
from countersign.verify.log.store import TileLog
from countersign.verify.testing import signing_key


def entry(index: int) -> bytes:
    """Of 4 to 1,003 bytes."""
    seed = hashlib.sha256(index.to_bytes(8, "big")).digest()
    return (seed * 32)[: 4 + int.from_bytes(seed[:2], "big") % 1000]


def main(folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    store.JOURNAL_ENTRIES = 1000  # kills shall meet the change of journals often
    with TileLog.open(folder) as log:
        print("open", flush=True)
        while True:
            size = generator.choice((1, 2, 7, 255, 256, 257, 600))
            acknowledged = log.append([entry(index) for index in range(log.size, log.size + size)])
            print(acknowledged.stop, flush=True)
            if generator.random() < 0.3:
                log.publish(sign(Checkpoint("log.test", log.size, log.root()), signing_key()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
