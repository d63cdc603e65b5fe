"""Which address and interface of this machine lead to HOST: `python3 address.py HOST PORT SECONDS [wait]`.

Prints `ADDRESS INTERFACE IS_HOST`: torchrun's --local-addr, *_SOCKET_IFNAME for Gloo and NCCL, and 1 if HOST is this
machine, which then hosts the job's store, else 0. `-` is a part that is unknown. Names that do not resolve yet are
retried for SECONDS; with `wait`, so is another machine that does not listen at PORT yet, where torch itself would give
up after a minute. Linux, IPv4, the standard library.
"""

import ctypes
import fcntl
import socket
import struct
import sys
import time

SIOCGIFCONF = 0x8912  # linux/sockios.h: the IPv4 addresses of this machine with their interfaces
ENTRY = struct.Struct("16s 4x 4s 16x")  # struct ifreq on 64 bits: a name, then port and address of a sockaddr_in
ENTRIES = 256


class Misleading(Exception):
    """The host name will never work, however long one waits."""


def find(host: str, port: int, wait: bool) -> str:
    there = socket.gethostbyname(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((there, port or 1))  # chooses a route; nothing is sent
        here: str = probe.getsockname()[0]
    interface = interfaces().get(here, "-")
    if there.startswith("127."):
        if host not in ("localhost", there):
            raise Misleading(f"{host} is {there} on this machine, where no other one can reach it: use an address")
        return f"{here} {interface} -"
    if wait and here != there:
        socket.create_connection((there, port), timeout=5).close()
    return f"{here} {interface} {int(here == there)}"


def interfaces() -> dict[str, str]:
    """The interface of each IPv4 address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        room = bytearray(ENTRY.size * ENTRIES)
        view = (ctypes.c_char * len(room)).from_buffer(room)
        request = struct.pack("iP", len(room), ctypes.addressof(view))
        used, _ = struct.unpack("iP", fcntl.ioctl(any_socket, SIOCGIFCONF, request))
    entries = ENTRY.iter_unpack(room[:used])
    return {socket.inet_ntoa(address): name.rstrip(b"\0").partition(b":")[0].decode() for name, address in entries}


def main(host: str, port: str, seconds: str, wait: str = "") -> int:
    deadline = time.monotonic() + float(seconds)
    while True:
        try:
            print(find(host, int(port), wait == "wait"))
            return 0
        except Misleading as error:
            problem = str(error)
            break
        except OSError as error:
            problem = f"{host}:{port} cannot be reached after {seconds} s: {error}"
            if time.monotonic() > deadline:
                break
        time.sleep(0.5)
    print(problem, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
