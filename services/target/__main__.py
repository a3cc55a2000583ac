"""``python -m countersign.services.target --config FILE``."""

from countersign.services.runtime.process import main
from countersign.services.target.service import create

if __name__ == "__main__":
    main("target", create)
