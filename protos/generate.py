"""Generate ``src/countersign/v1`` from the contracts: ``python protos/generate.py [OUT]`` (default: src)."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write messages, gRPC stubs and their types below ``out``; raises RuntimeError when protoc refuses."""
    sources = sorted(str(path.relative_to(HERE)) for path in HERE.rglob("*.proto"))
    plugins = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"-I{HERE}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused the contracts; its message is above")
    package = out / "countersign" / "v1"
    note = '"""Generated from protos/countersign/v1: do not edit, run `make protos`."""'
    (package / "__init__.py").write_text(note + "\n")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "src")
