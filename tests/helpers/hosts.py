"""Two hosts on one machine: network namespaces connected by a link that can be cut.

    with two_hosts() as network:
        commands = [host.command(python("train.py")) for host in network.hosts]
        network.cut()

They need Linux, and root privileges or a kernel that lets users create namespaces; otherwise the
test is skipped. A namespace ends with its last process.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

LINK = "lab0"  # the name of each host's end of the link


@dataclass(frozen=True)
class Host:
    """A network namespace: loopback, one end of the link, and nothing else."""

    address: str
    holder: int  # ID of a process that keeps the namespace alive

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on this host."""
        users = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
        enter = ["nsenter", f"--target={self.holder}", *users, "--net"]
        # gloo looks up this machine's name, whose interface is not in the namespace.
        return [*enter, "env", f"GLOO_SOCKET_IFNAME={LINK}", *command]


@dataclass(frozen=True)
class Network:
    hosts: tuple[Host, Host]

    def cut(self) -> None:
        """Drop all packets, without notice to either side."""
        self._set("down")

    def restore(self) -> None:
        """Let packets pass again."""
        self._set("up")

    def _set(self, state: str) -> None:
        _call(self.hosts[1].command(["ip", "link", "set", LINK, state]))


@contextmanager
def two_hosts() -> Iterator[Network]:
    """Yield hosts 10.77.0.1 and 10.77.0.2; skip the test if they cannot be created."""
    with ExitStack() as stack:
        try:
            own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
            first = Host("10.77.0.1", stack.enter_context(_namespace(["unshare", *own, "--net"])))
            unshare = first.command(["unshare", "--net"])
            second = Host("10.77.0.2", stack.enter_context(_namespace(unshare)))
            ends = ("name", LINK, "type", "veth", "peer", "name", LINK, "netns", second.holder)
            _call(first.command(["ip", "link", "add", *map(str, ends)]))
            for host in (first, second):
                _call(host.command(["ip", "address", "add", f"{host.address}/24", "dev", LINK]))
                for interface in ("lo", LINK):
                    _call(host.command(["ip", "link", "set", interface, "up"]))
        except OSError as error:
            pytest.skip(f"no network namespaces: {error}")
        yield Network((first, second))


@contextmanager
def _namespace(make_namespace: Sequence[str]) -> Iterator[int]:
    """Yield the ID of a process that keeps a new namespace alive until the block ends."""
    holder = subprocess.Popen(
        [*make_namespace, "sh", "-c", "echo made && exec cat"],
        stdin=subprocess.PIPE,  # `cat` ends when this process does
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with holder:
        try:
            if holder.stdout.readline() != b"made\n":
                raise OSError(holder.stderr.read().decode().strip())
            yield holder.pid
        finally:
            holder.kill()


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
