"""The house: links in place, contracts fresh, everything importable from a wheel."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import countersign

PACKAGE = "src/countersign"
LINKED = ("services", "kernels", "verify")


@pytest.mark.parametrize("folder", LINKED)
def test_the_package_holds_a_link_to_each_folder_of_code(root: Path, folder: str) -> None:
    link = root / PACKAGE / folder
    assert link.is_symlink()
    assert link.samefile(root / folder)


def test_every_folder_with_code_is_a_package(root: Path) -> None:
    folders = {path.parent for name in LINKED for path in (root / name).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_only_the_wiring_knows_telemetry_s_implementation(root: Path) -> None:
    """All else uses OpenTelemetry's API and the standard logging: who embeds a part brings their own."""
    wiring = root / "services" / "runtime" / "telemetry"
    tops = (
        root / "services",
        root / "verify",
        root / "kernels",
        root / PACKAGE / "client.py",
        root / PACKAGE / "batch",
    )
    files = {file for top in tops for file in (top.rglob("*.py") if top.is_dir() else (top,))}
    own = re.compile(r"^\s*(from|import) (opentelemetry\.(sdk|exporter)|prometheus_client|structlog)", re.MULTILINE)
    found = {file for file in files if own.search(file.read_text())}
    assert found
    assert {file for file in found if wiring not in file.parents} == set()


def test_the_package_here_is_the_one_under_test(root: Path) -> None:
    assert Path(countersign.__file__).samefile(root / PACKAGE / "__init__.py")


def test_the_generated_code_is_what_the_contracts_give(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "protos" / "generate.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "countersign" / "v1").iterdir()}
    here = root / PACKAGE / "v1"
    committed = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    assert sorted(fresh) == sorted(committed)
    stale = [name for name, content in fresh.items() if committed[name] != content]
    assert stale == [], "run `make protos` and commit what it writes"


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built through an sdist, as `python -m build` does: a stale build folder cannot hide what is missing."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


def test_a_wheel_holds_every_module_of_the_checkout(root: Path, wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "countersign/" + path.relative_to(root / PACKAGE).as_posix()
        for top in (root / PACKAGE, *(root / PACKAGE / folder for folder in LINKED))
        for path in (*top.rglob("*.py"), *top.rglob("*.css"))
    }
    assert expected <= packed


def test_a_wheel_holds_the_c_kernels_built(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for variant in ("v3", "v4"):
        assert [name for name in names if name.startswith(f"countersign/kernels/native/x86_64_{variant}.")]
    assert not [name for name in names if name.endswith((".c", ".h"))], "sources belong into the sdist"


def test_everything_imports_from_the_wheel_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import importlib, pkgutil, countersign;"
        "assert countersign.__file__.startswith(sys.argv[1]), countersign.__file__;"
        "names = [m.name for m in pkgutil.walk_packages(countersign.__path__, 'countersign.')];"
        "names = [n for n in names if 'x86_64' not in n];"
        "[importlib.import_module(n) for n in names if not n.endswith('__main__')];"
        "from countersign.kernels.native.library import load; assert load() is not None;"
        "print(len(names))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 60
