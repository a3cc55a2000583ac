"""The C kernels, once for AVX2 and once for AVX-512; pyproject.toml says all else.

Optional: without a compiler, or on another processor, the engine computes with torch.
"""

import platform

from setuptools import Extension, setup

FLAGS = [
    "-O3", "-std=c11", "-D_GNU_SOURCE", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off",  # fused only where the code says so: the same bits from both variants
    "-Wall", "-Wextra",
]  # fmt: skip
HEADERS = [f"kernels/native/{name}.h" for name in (
    "vectors", "matmul", "attention", "elementwise", "threads", "program", "ranks", "sampling",
    "library",
)]  # fmt: skip


def variant(level: str) -> Extension:
    """The library for one level of x86-64."""
    return Extension(
        f"countersign.kernels.native.x86_64_{level}",
        [f"kernels/native/x86_64_{level}.c"],
        depends=HEADERS,
        extra_compile_args=[*FLAGS, f"-march=x86-64-{level}"],
        extra_link_args=["-pthread"],
        libraries=["m"],
        optional=True,
    )


setup(ext_modules=[variant("v3"), variant("v4")] if platform.machine() in {"x86_64", "AMD64"} else [])
