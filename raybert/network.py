"""The network that workers without GPUs use: that of the address by which Ray knows a machine.

gloo listens where a machine's own name leads. On Debian and Ubuntu that is loopback (127.0.1.1 in
/etc/hosts), where workers on other machines find nobody.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.util import get_node_ip_address

INTERFACE = "GLOO_SOCKET_IFNAME"
"""gloo's own variable; where a machine has it already, it is left as it is."""

POLICY = "ray.train.v2._internal.execution.scaling_policy"
"""What Ray Train logs under when it looks whether there is room for more workers."""


def name_interface() -> None:
    """Tell gloo, in this process, which interface has the machine's address."""
    address = get_node_ip_address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ.setdefault(INTERFACE, name)


def says_more(record: logging.LogRecord) -> bool:
    """Whether Ray Train says more than, every minute, that all is as it was: that it waits for
    machines, for one."""
    return "Did not detect any changes" not in record.getMessage()


class _OnNetwork(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        # This is where the group is controlled.
        logging.getLogger(POLICY).addFilter(says_more)
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class Groups(TorchConfig):
    """Ray Train's process groups, on the network that the machines share."""

    @property
    def backend_cls(self) -> type:
        """What Ray Train starts on the workers."""
        return _OnNetwork
