"""The names and ports that ranks meet at."""

from __future__ import annotations

import os
import socket

from moe.distributed.environment import whole_number
from moe.doctor.finding import Finding
from moe.errors import StartError

TORCHRUN_PORT = 29500  # torchrun's default


def ports() -> list[Finding]:
    """The host's name, torchrun's port, and the interfaces that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name."""
    found = []
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        fix = f"add {host} to /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface"
        found.append(Finding("host name", "note", f"{host} has no address ({error.strerror})", fix))
    else:
        loopback = address.startswith("127.")
        fix = "for several nodes set MASTER_ADDR to an address that they reach" if loopback else ""
        found.append(Finding("host name", "note" if loopback else "ok", f"{host} is {address}", fix))
    if "RANK" not in os.environ:  # under torchrun the port is taken, by its own store
        try:
            found.append(_port(whole_number("MASTER_PORT", TORCHRUN_PORT, 1, 65535)))
        except StartError as error:
            found.append(Finding("MASTER_PORT", "fail", str(error), "unset it"))
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable)
        if value and not any(name.startswith(value.lstrip("^=").split(",")[0]) for name in interfaces):
            found.append(Finding(variable, "fail", f"{variable}={value}: interfaces are {', '.join(interfaces)}"))
    return found


def _port(port: int) -> Finding:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            fix = "torchrun --standalone, or --master-port=N"
            return Finding("port", "note", f"port {port} of torchrun is taken ({error.strerror})", fix)
    return Finding("port", "ok", f"port {port} of torchrun is free")
