"""What the committed results say of the machine: everything but its name."""

from __future__ import annotations

from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Leave out the host's name, and add what the figures depend on."""
    machine_info.pop("node", None)
    machine_info.update(torch=torch.__version__, threads=torch.get_num_threads(), dtype="float32")
