"""Programs of ours import what the host imports, however the host has found it (B83).

The host runs on an interpreter without any package: it gets them by PYTHONPATH, or by changes of
`sys.path`, as `pip install --target`, unpacked zipapps and layered environments do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.base import launch
from orchestrator.base.tokens import CancelToken, Generation
from orchestrator.errors import HubError
from orchestrator.models.hub.fetch_process import FetchProcess, FetchProgress
from orchestrator.settings.request import LoadRequest
from tests.kit.fake_hub import Hub, Repo
from tests.kit.process import support
from tests.kit.process.servers import servers_of
from tests.kit.process.support import REPOSITORY, Fake, Host, Watch
from tests.kit.sentences import assert_sentence

BARE = os.path.realpath(sys.executable)
"""The interpreter of this environment, without this environment."""

PACKAGES = [str(REPOSITORY), *(path for path in sys.path if path.endswith("site-packages"))]

HOST = """
import json, os, signal, sys
a = json.loads(sys.argv[1])
sys.path += a["packages"]
from orchestrator import Orchestrator
orch = Orchestrator(llama_server="embedded", state_dir=a["state_dir"])
loaded = orch.load(a["model"], llama_extra_args=["--top-k", "3"])
variants = orch.variants(a["repo"]).variants
print(json.dumps({"pid": loaded.pid, "variants": len(variants)}), flush=True)
signal.pause()
"""


@pytest.fixture(params=["sys.path", "PYTHONPATH", "isolated"])
def host(
    request: pytest.FixtureRequest, hub: Hub, tiny_model: str, state_dir: Path
) -> Iterator[subprocess.Popen[str]]:
    hub.add(Repo("owner/tiny", {"x-Q8_0.gguf": Path(tiny_model).read_bytes()}))
    by_variable = request.param == "PYTHONPATH"
    arguments = {
        "packages": [] if by_variable else PACKAGES,
        "state_dir": str(state_dir),
        "model": tiny_model,
        "repo": "owner/tiny",
    }
    flags = ["-I"] if request.param == "isolated" else []
    environment = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
    environment |= {"PYTHONPATH": os.pathsep.join(PACKAGES)} if by_variable else {}
    with subprocess.Popen(
        [BARE, *flags, "-c", HOST, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=state_dir,
    ) as process:
        yield process
        process.kill()


def test_the_interpreter_of_these_tests_has_no_packages() -> None:
    """Otherwise they prove nothing."""
    script = "import importlib.util as u; print(u.find_spec('xllamacpp'), u.find_spec('psutil'))"
    done = subprocess.run([BARE, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "None"]


def test_server_download_and_keeper_find_the_packages_of_the_host(
    host: subprocess.Popen[str],
) -> None:

    assert host.stdout is not None
    found: dict[str, Any] = json.loads(host.stdout.readline() or "{}")
    assert found["variants"] > 0
    server = Watch(found["pid"])
    host.kill()
    server.seconds_to_exit(0, 5)


UPGRADED = """
send(where=orchestrator.__file__)
sys.stdin.readline()
for _ in range(2):
    try:
        send(answer=orch.load(a["model"]).status)
    except OrchestratorError as error:
        send(answer=str(error), category=error.category)
    sys.stdin.readline()
orch.close()
send(answer="closed")
"""


@pytest.fixture
def upgradable(
    fake: Fake, state_dir: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Host]]:
    """A copy of the package, and a host that has started an orchestrator of it."""
    package = tmp_path / "lib" / "orchestrator"
    shutil.copytree(REPOSITORY / "orchestrator", package)
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    monkeypatch.setattr(support, "REPOSITORY", package.parent)
    program = "import orchestrator; from orchestrator import OrchestratorError; orch.start()"
    host = Host(
        program + UPGRADED,
        server=fake.path,
        state_dir=state_dir,
        env=fake.env,
        model=tiny_model,
    )
    assert host.receive() == {"where": str(package / "__init__.py")}
    yield package, host
    host.close()


def test_keeper_of_an_upgraded_package_serves_the_program_that_runs(
    upgradable: tuple[Path, Host], state_dir: Path
) -> None:
    """Its files are replaced under the program; the keeper is started from the new ones."""
    package, host = upgradable
    port = package / "server" / "tree" / "port.py"
    port.write_text(re.sub(r"(VERSION: Final = )\d+", r"\g<1>1000", port.read_text()))
    assert "VERSION: Final = 1000" in port.read_text()
    host.send()
    assert host.receive() == {"answer": "loaded"}
    host.send()
    assert host.receive() == {"answer": "already_loaded"}
    host.send()
    assert host.receive() == {"answer": "closed"}
    assert not servers_of(state_dir)


def test_package_that_is_gone_is_told_and_the_program_goes_on_once_it_is_back(
    upgradable: tuple[Path, Host], state_dir: Path
) -> None:
    package, host = upgradable
    away = package.rename(package.with_name("away"))
    host.send()
    refused = host.receive()
    assert refused["category"] == "unavailable"
    assert_sentence("launch.package_gone", refused["answer"])
    away.rename(package)
    host.send()
    assert host.receive() == {"answer": "loaded"}
    host.send()
    assert host.receive() == {"answer": "closed"}
    assert not servers_of(state_dir)


def test_a_relative_entry_of_the_path_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host may change its working directory before the next program is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "lib", "/abs", tmp_path])
    assert launch.import_path() == [str(tmp_path), str(tmp_path / "lib"), "/abs"]
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert launch.import_path() == ["/abs"]


def test_a_download_in_a_frozen_application_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(sys, "frozen", True, raising=False)
    request = LoadRequest(model_path="owner/name")
    fetch = FetchProcess(request, "owner/name", CancelToken(Generation(1)), FetchProgress())
    with pytest.raises(HubError) as refused, fetch:
        pass
    assert_sentence("launch.frozen_download", refused.value.message)
    assert refused.value.field == "model_path"
