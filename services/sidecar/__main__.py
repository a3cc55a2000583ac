"""``python -m countersign.services.sidecar --config FILE``."""

from countersign.services.runtime.process import main
from countersign.services.sidecar.service import create

if __name__ == "__main__":
    main("sidecar", create)
