"""``python benchmarks/peers/install.py``: the environment of the CPU peers, in build/peers; takes several minutes.

torch goes first and every later step is held to that build, or dependencies would bring a CUDA one. llama.cpp is
compiled for this machine (CMake and a C++ compiler are needed). optimum-intel, which exports for OpenVINO, wants an
older transformers than the one measured: what differs lies apart in build/peers/convert, on the export's path alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from pathlib import Path

HOME = Path(__file__).resolve().parents[2] / "build" / "peers"
TORCH = "torch==2.13.0"
MEASURED = [
    "transformers==5.23.0",
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "ctranslate2==4.8.5",
    "gguf==0.19.0",
]
LLAMA = "llama-cpp-python==0.3.36"
LLAMA_BUILD = (
    "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF"
)
CONVERT = [
    "optimum-intel==2.2.0",
    "optimum==2.3.0",
    "transformers==5.5.4",
    "tokenizers==0.22.2",
    "huggingface_hub==1.21.0",
    "httpx==0.28.1",
    "httpcore==1.0.9",
]


def main() -> None:
    """Makes the environment, or brings it to the versions named here."""
    done = HOME / ".installed"
    wanted = "\n".join([TORCH, *MEASURED, LLAMA, *CONVERT])
    if done.is_file() and done.read_text() == wanted:
        return
    shutil.rmtree(HOME / "convert", ignore_errors=True)
    if not (HOME / "bin" / "python").is_file():
        venv.create(HOME, with_pip=True, symlinks=True)
    _pip(TORCH)
    held = HOME / "held.txt"
    held.write_text(_torch())
    _pip("-c", str(held), *MEASURED, "safetensors")
    _pip("-c", str(held), "--no-binary", "llama-cpp-python", LLAMA, CMAKE_ARGS=LLAMA_BUILD)
    _pip("--no-deps", "--target", str(HOME / "convert"), *CONVERT)
    done.write_text(wanted)


def _pip(*arguments: str, **environment: str) -> None:
    command = [
        str(HOME / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *arguments,
    ]
    subprocess.run(command, env={**os.environ, **environment}, check=True)


def _torch() -> str:
    """The build that is installed, such as ``torch==2.13.0+cpu``."""
    program = "from importlib.metadata import version; print('torch==' + version('torch'))"
    command = [str(HOME / "bin" / "python"), "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
