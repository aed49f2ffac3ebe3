"""The tutorial can be done as written. `make tutorial` also installs, in a fresh environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.kit.tutorial import follow
from tests.test_deployment import tool


@pytest.mark.usefixtures("state_dir")  # fails if a server is left
def test_tutorial_can_be_done_as_written(tmp_path: Path) -> None:
    """A reader who has to guess leaves. The stream is long enough to unload under it."""
    tool("curl")
    follow(tmp_path, programs=Path(sys.executable).parent, installs=False)
