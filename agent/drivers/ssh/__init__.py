"""SSH tunnels: a second sshd with system accounts of its own."""

from __future__ import annotations

from agent.drivers.ssh.driver import Ssh as Ssh
