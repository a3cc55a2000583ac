"""``python -m countersign.services.draft --config FILE``."""

from countersign.services.draft.service import create
from countersign.services.runtime.process import main

if __name__ == "__main__":
    main("draft", create)
