"""The devices of a machine: its memory as folders of a test, and what binaries list as GPUs."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.models.estimate import Estimate
from orchestrator.server import binaries
from orchestrator.server import devices as module
from orchestrator.server.binaries import ask_catalogue, find_server
from orchestrator.server.devices import Device, devices, spread
from orchestrator.settings.help_text import Catalogue, FlagHelp
from orchestrator.settings.target import ServerBinary
from tests.kit.settings import repeatable, target

LISTS = Catalogue((FlagHelp(("--model",), "FNAME"), FlagHelp(("--list-devices",))))
LISTS_NOT = Catalogue((FlagHelp(("--model",), "FNAME"),))
TWO_GPUS = """\
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23904 MiB free)
  Vulkan1: AMD Radeon Graphics (RADV RENOIR) (8000 MiB, 100 MiB free)
"""
CUDA, VULKAN = Device("CUDA0", 24217, 23904), Device("Vulkan1", 8000, 100)
NO_GPU = "Available devices:\n  (none)\n"
HOST = Device("Host", 16000, 8000)


class Script:
    """A binary that is a shell script, and counts its runs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "llama-server"
        self.output = folder / "output"
        self.asked = folder / "asked"
        self.root = folder / "root"
        (self.root / "proc").mkdir(parents=True)
        meminfo = f"MemTotal: {16000 << 10} kB\nMemAvailable: {8000 << 10} kB\n"
        (self.root / "proc/meminfo").write_text(meminfo)

    def lists(
        self, text: str = "", end: str = "", catalogue: Catalogue | None = LISTS
    ) -> tuple[Device, ...]:
        """Return the devices with a binary that prints `text`."""
        self.output.write_text(text)
        if not self.path.exists() or end:
            script = f'env > "{self.asked}.env"\necho "$@" >> "{self.asked}"\ncat "{self.output}"'
            self.path.write_text(f"#!/bin/sh\n{script}\n{end}\n")
            self.path.chmod(0o755)
        server = replace(find_server(str(self.path)), catalogue=catalogue)
        host, *gpus = devices(server, self.root)
        assert host == HOST
        return tuple(gpus)

    @property
    def times(self) -> int:
        return len(self.asked.read_text().splitlines()) if self.asked.exists() else 0


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    monkeypatch.setattr(module, "_ask_after", {})
    monkeypatch.setattr(module, "_without_gpu", set())
    return Script(tmp_path)


# ------------------------------------------------------------------------------------------ GPUs


def test_gpus_are_those_that_the_binary_lists(script: Script) -> None:
    assert script.lists(f"ggml_cuda_init: found 2 devices\n{TWO_GPUS}bye\n") == (CUDA, VULKAN)
    assert script.asked.read_text() == "--list-devices\n"


def test_free_memory_of_gpus_is_asked_each_time(script: Script) -> None:
    assert script.lists(TWO_GPUS) == (CUDA, VULKAN)
    emptier = TWO_GPUS.replace("23904", "5")
    assert script.lists(emptier) == (replace(CUDA, free_mib=5), VULKAN)
    assert script.times == 2


def test_a_binary_without_gpus_is_asked_once(script: Script) -> None:
    """It was built without them; another binary at its path is asked again."""
    assert script.lists(NO_GPU) == script.lists(TWO_GPUS) == ()
    assert script.times == 1
    os.utime(script.path, ns=(1, 1))
    assert script.lists(TWO_GPUS) == (CUDA, VULKAN)
    assert script.times == 2


@pytest.mark.parametrize("catalogue", [LISTS_NOT, None], ids=["older", "unknown"])
def test_a_binary_is_not_asked_for_what_its_help_does_not_list(
    script: Script, catalogue: Catalogue | None
) -> None:
    """It would take it for an error, or start."""
    assert script.lists(TWO_GPUS, catalogue=catalogue) == ()
    assert script.times == 0


def test_no_secret_reaches_a_binary_that_lists_devices(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the environment of a server, which may hide GPUs."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    script.lists(TWO_GPUS)
    environment = Path(f"{script.asked}.env").read_text()
    assert "secret" not in environment
    assert "CUDA_VISIBLE_DEVICES=7" in environment


@pytest.mark.parametrize(
    ("text", "end"),
    [
        pytest.param(TWO_GPUS, "exit 1", id="fails"),
        pytest.param("usage: no such thing\n", "exit 0", id="says something else"),
        pytest.param("", "kill -9 $$", id="killed"),
        pytest.param("", "sleep 600", id="hangs"),
    ],
)
def test_a_binary_that_does_not_answer_is_asked_again_after_a_while(
    script: Script, monkeypatch: pytest.MonkeyPatch, text: str, end: str
) -> None:
    """A driver may be busy; but no caller waits for it each time."""
    monkeypatch.setattr(binaries, "_ASK_S", 0.3)
    begun = time.monotonic()
    assert script.lists(text, end) == script.lists(text) == ()
    assert time.monotonic() - begun < 10
    assert script.times == 1
    monkeypatch.setattr(module, "_ask_after", {})
    assert script.lists(TWO_GPUS, "exit 0") == (CUDA, VULKAN)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  MTL0: Apple M3 Max (98304 MiB, 98303 MiB free)", Device("MTL0", 98304, 98303)),
        ("  RPC[10.0.0.1:50052]: RPC (9 MiB, 8 MiB free)", Device("RPC[10.0.0.1:50052]", 9, 8)),
        ("  A: free of (1 MiB, 2 MiB free) (7 MiB, 7 MiB free)", Device("A", 7, 7)),
        ("  A: more is free than there is (7 MiB, 9 MiB free)", Device("A", 7, 7)),
        ("  A: windows line (7 MiB, 7 MiB free)\r", Device("A", 7, 7)),
        ("  BLAS: OpenBLAS (0 MiB, 0 MiB free)", None),
        ("  Host: not a GPU (7 MiB, 7 MiB free)", None),
        ("  A: no memory", None),
        ("  A: huge (99999999999999999999 MiB, 1 MiB free)", None),
        ("A: not indented (7 MiB, 7 MiB free)", None),
    ],
)
def test_every_form_of_a_line_is_read_or_left_out(
    script: Script, line: str, expected: Device | None
) -> None:
    found = script.lists(f"Available devices:\n{line}\n  B: other (1 MiB, 1 MiB free)\n")
    assert found == ((expected,) if expected else ()) + (Device("B", 1, 1),)


def test_a_device_that_is_listed_twice_counts_once(script: Script) -> None:
    assert script.lists(TWO_GPUS + TWO_GPUS.partition("\n")[2]) == (CUDA, VULKAN)


@repeatable
@given(st.text(max_size=80) | st.from_regex(r"\A  \w+: .* \(\d+ MiB, \d+ MiB free\)\Z"))
def test_any_text_of_a_binary_is_a_list_of_devices(text: str) -> None:
    for device in module._listed(f"Available devices:\n{text}"):
        assert 0 <= device.free_mib <= device.total_mib


@pytest.mark.external
def test_the_real_llama_server_lists_its_devices(llama_server: str, tmp_path: Path) -> None:
    _check_listing(find_server(llama_server), tmp_path)


def test_the_embedded_server_lists_its_devices(tmp_path: Path) -> None:
    _check_listing(find_server("embedded"), tmp_path)


def _check_listing(server: ServerBinary, cache: Path) -> None:
    catalogue = ask_catalogue(server, cache)
    assert catalogue is not None
    assert catalogue.has("--list-devices")
    returncode, text = binaries.run((*server.command, "--list-devices"), server.kind)
    assert returncode == 0
    heading, *lines = text[text.index("Available devices:") :].splitlines()
    assert heading == "Available devices:"
    found = devices(replace(server, catalogue=catalogue))
    assert found[0].name == "Host"
    assert 0 < found[0].free_mib <= found[0].total_mib
    assert len(found) == 1 + len([line for line in lines if line != "  (none)"])


def test_the_embedded_server_lists_gpus_as_llama_server_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No machine of ours has one."""
    from types import SimpleNamespace

    from orchestrator.server import embedded

    def device(kind: str, name: str, total: int, free: int) -> dict[str, Any]:
        about = {"name": name, "description": "A (B)", "type": SimpleNamespace(name=kind)}
        return about | {"memory_total": total << 20, "memory_free": free << 20}

    kind = "GGML_BACKEND_DEVICE_TYPE"
    found = [device(f"{kind}_CPU", "CPU", 9, 9), device(f"{kind}_IGPU", "Vulkan0", 8, 7)]
    library = SimpleNamespace(get_device_info=lambda: found)
    monkeypatch.setattr(embedded, "_library", lambda: library)
    assert [*module._listed(embedded.devices())] == [Device("Vulkan0", 8, 7)]
    del found[1]
    assert embedded.devices() == NO_GPU


# ------------------------------------------------------------------------------------------ host


def test_the_host_has_what_its_control_group_leaves(script: Script) -> None:
    """Of both versions: the least of all above us."""
    group = script.root / "sys/fs/cgroup/a"
    group.mkdir(parents=True)
    (script.root / "proc/self").mkdir()
    (script.root / "proc/self/cgroup").write_text("0::/a/b\n")
    (group / "memory.max").write_text(f"{5000 << 20}\n")
    (group / "memory.current").write_text(f"{4000 << 20}\n")
    (group / "memory.stat").write_text(f"file {1000 << 20}\n")
    server = replace(find_server("/bin/true"), catalogue=LISTS_NOT)
    assert devices(server, script.root) == (Device("Host", 5000, 2000),)


def test_a_machine_that_is_no_linux_has_memory_too(tmp_path: Path) -> None:
    server = replace(find_server("/bin/true"), catalogue=LISTS_NOT)
    host, *_ = devices(server, tmp_path)
    assert 0 < host.free_mib <= host.total_mib


# ---------------------------------------------------------------------------------------- spread


NEED = Estimate(weights_mib=600, context_mib=300, compute_mib=100, extra_mib=50)
A, B = Device("A", 9000, 3000), Device("B", 9000, 1000)


@pytest.mark.parametrize(
    ("found", "args", "expected"),
    [
        pytest.param((), "", {"Host": 1050}, id="no GPU"),
        pytest.param((A,), "", {"Host": 50, "A": 1000}, id="one GPU"),
        pytest.param((A, B), "", {"Host": 50, "A": 750, "B": 250}, id="in proportion"),
        pytest.param((A, B), "-ngl 0", {"Host": 1050, "A": 0, "B": 0}, id="no layers"),
        pytest.param((A, B), "--device none", {"Host": 1050, "A": 0, "B": 0}, id="none"),
        pytest.param((A, B), "-dev B", {"Host": 50, "A": 0, "B": 1000}, id="chosen"),
        pytest.param((A, B), "-sm none", {"Host": 50, "A": 1000, "B": 0}, id="the first"),
        pytest.param(
            (A, B), "-sm none -dev B,A", {"Host": 50, "A": 0, "B": 1000}, id="the first named"
        ),
        pytest.param(
            (Device("A", 900, 500), Device("B", 900, 200)),
            "",
            {"Host": 350, "A": 500, "B": 200},
            id="the rest is on the host",
        ),
        pytest.param((Device("A", 900, 0),), "", {"Host": 1050, "A": 0}, id="full"),
    ],
)
def test_a_need_is_spread_as_the_server_spreads_it(
    found: tuple[Device, ...], args: str, expected: dict[str, int]
) -> None:
    assert spread(NEED, (HOST, *found), target(llama_extra_args=args.split())) == expected


@repeatable
@given(
    st.lists(st.integers(0, 2000), max_size=5),
    st.tuples(*[st.integers(0, 3000)] * 4),
)
def test_nothing_is_lost_and_no_gpu_gets_more_than_it_has(
    free: list[int], need: tuple[int, int, int, int]
) -> None:
    found = [Device(f"G{number}", 2000, mib) for number, mib in enumerate(free)]
    estimate = Estimate(*need)
    shares = spread(estimate, (HOST, *found), target())
    assert sum(shares.values()) == estimate.total_mib
    assert all(0 <= shares[gpu.name] <= gpu.free_mib for gpu in found)
    assert shares["Host"] >= estimate.extra_mib
    if shares["Host"] > estimate.extra_mib:
        assert all(shares[gpu.name] == gpu.free_mib for gpu in found)
