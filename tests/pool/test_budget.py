"""The budget of a pool on the devices of a machine."""

from __future__ import annotations

import pytest

from orchestrator.pool.budget import budget_of, on_devices
from orchestrator.server.devices import Device

HOST = Device("Host", 9000, 8000)
GPUS = [HOST, Device("CUDA0", 24000, 20000), Device("CUDA1", 24000, 500)]


@pytest.mark.parametrize(("devices", "first"), [([HOST], "Host"), (GPUS, "CUDA0")])
def test_plain_figure_is_of_the_first_gpu_else_of_the_host(
    devices: list[Device], first: str
) -> None:
    assert on_devices(700, devices) == {first: 700}


def test_table_by_device_is_taken_as_it_is() -> None:
    assert on_devices({"Host": 1, "Vulkan3": 2}, GPUS) == {"Host": 1, "Vulkan3": 2}


def test_auto_is_what_is_free_less_the_headroom() -> None:
    """What adopted servers hold counts as free: it is reserved for them."""
    assert budget_of("auto", 1000, GPUS) == {"Host": 7000, "CUDA0": 19000, "CUDA1": 0}
    held = {"Host": 300, "CUDA1": 900}
    assert budget_of("auto", 1000, GPUS, held) == {"Host": 7300, "CUDA0": 19000, "CUDA1": 400}


def test_device_that_a_table_leaves_out_is_auto() -> None:
    assert budget_of({"CUDA0": 5}, 1000, GPUS) == {"Host": 7000, "CUDA0": 5, "CUDA1": 0}
    assert budget_of(5, 1000, [HOST]) == {"Host": 5}
