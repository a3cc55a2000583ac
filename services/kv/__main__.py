"""``python -m countersign.services.kv --config FILE``."""

from countersign.services.kv.service import create
from countersign.services.runtime.process import main

if __name__ == "__main__":
    main("kv", create)
