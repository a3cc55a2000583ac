"""``python -m countersign.services.auditor --config FILE``."""

from countersign.services.auditor.service import create
from countersign.services.runtime.process import main

if __name__ == "__main__":
    main("auditor", create)
