"""A program that runs a stack of two small services until interrupted: ``stack_program.py FOLDER [deaf]``."""

import asyncio
import sys
from pathlib import Path

from countersign.services.runtime.config import Config
from countersign.services.runtime.supervisor import Patience, Supervisor

SERVICE = str(Path(__file__).with_name("small_service.py"))


def main(folder: Path, flags: list[str]) -> None:
    services = {
        "kv": [sys.executable, SERVICE, "kv"],
        "router": [sys.executable, SERVICE, "router", *flags],
    }
    # A grace beyond every deadline of the tests: what ends in time did not need it.
    patience = Patience(stop=1000.0 if "deaf" in flags else 30.0)
    asyncio.run(Supervisor(Config(data_dir=folder), services=services, patience=patience).run())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
