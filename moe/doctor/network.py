"""The names and ports that ranks meet at."""

from __future__ import annotations

import os
import re
import socket

from moe.doctor.finding import Finding

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
        stated = os.environ.get("MASTER_PORT", str(TORCHRUN_PORT))
        if re.fullmatch("[0-9]{1,5}", stated) and 0 < int(stated) < 1 << 16:
            found.append(_port(int(stated)))
        else:
            found.append(Finding("MASTER_PORT", "fail", f"MASTER_PORT={stated} must be a port, 1 to 65535", "unset it"))
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
