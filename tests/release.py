"""`make release`: the packages contain every file, install in a fresh environment and work there.

Takes a folder with one sdist and one wheel. It runs the installed demo in a folder without sources
to fall back on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import orchestrator

ROOT = Path(__file__).parents[1]
INSTALL_S = 600
RUN_S = 120


def main(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    check_files(wheel, sdist)
    with tempfile.TemporaryDirectory(prefix="llama-orchestrator-release-") as folder:
        command = install(wheel.resolve(), Path(folder))
        version = run(command, "--version", cwd=folder)
        assert version.split()[-1] == orchestrator.__version__, version
        print(run(command, "demo", cwd=folder))
    print(f"ready: {wheel} {sdist}")


def check_files(wheel: Path, sdist: Path) -> None:
    """The wheel has the panel, `py.typed` and every module, and nothing else."""
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "orchestrator").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == sources, packed ^ sources
    with tarfile.open(sdist) as archive_of_sources:
        in_sdist = {name.partition("/")[2] for name in archive_of_sources.getnames()}
    more = {
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "tests/release.py",
    }
    assert sources | more <= in_sdist, (sources | more) - in_sdist


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel in a fresh environment and return its command."""
    environment = folder / "venv"
    venv.create(environment, with_pip=True)
    pip = environment / "bin" / "pip"
    subprocess.run(
        [pip, "install", "-q", "--disable-pip-version-check", f"{wheel}[demo]"],
        check=True,
        cwd=folder,
        timeout=INSTALL_S,
    )
    return environment / "bin" / "llama-orchestrator"


def run(command: Path, *args: str, cwd: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [command, *args], check=True, cwd=cwd, env=clean, stdout=subprocess.PIPE, timeout=RUN_S
    )
    return done.stdout.decode()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
