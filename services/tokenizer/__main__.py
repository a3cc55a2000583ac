"""``python -m countersign.services.tokenizer --config FILE``."""

from countersign.services.runtime.process import main
from countersign.services.tokenizer.service import create

if __name__ == "__main__":
    main("tokenizer", create)
