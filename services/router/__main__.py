"""``python -m countersign.services.router --config FILE``."""

from countersign.services.router.service import create
from countersign.services.runtime.process import main

if __name__ == "__main__":
    main("router", create)
