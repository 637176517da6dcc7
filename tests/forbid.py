"""Ends a process that connects or starts another one (put beside Python as `sitecustomize.py`)."""

import os
import sys

FORBIDDEN = {
    *("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen"),
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
}
#: Python's own search for shared libraries (ctypes) asks it.
HARMLESS = {"/sbin/ldconfig"}


def _forbid(event: str, arguments: tuple[object, ...]) -> None:
    if event in FORBIDDEN and not (arguments and arguments[0] in HARMLESS):
        os.write(2, f"forbidden: {event} {arguments}\n".encode())
        os._exit(99)


sys.addaudithook(_forbid)
