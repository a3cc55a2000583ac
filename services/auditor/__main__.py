"""``python -m countersign.services.auditor --config FILE``."""

from countersign.services.auditor.examiner import leave
from countersign.services.auditor.service import create
from countersign.services.runtime.process import main

if __name__ == "__main__":
    try:
        main("auditor", create)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
