"""The environment variables by which launchers and platforms describe a run of several processes, and what is wrong in them.

Reads and corrects os.environ only; opens no connection. distributed.py meets the other processes.
"""

import os
from ipaddress import ip_address

LOOPBACK = "127.0.0.1"


def use_loopback(world_size: int) -> None:
    """Let gloo, and a MASTER_ADDR that is this machine, use the loopback device if every process is on this machine.

    By default gloo looks up the machine's host name, which does not resolve in many containers and on many laptops.
    """
    env = os.environ
    if world_size == 1 or env.get("LOCAL_WORLD_SIZE") == str(world_size) or _is_loopback(env.get("MASTER_ADDR", "")):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if "MASTER_ADDR" in env:
            env["MASTER_ADDR"] = LOOPBACK


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ip_address(address).is_loopback
    except ValueError:
        return False
