"""OpenVPN's other end for tests: an authority that signs, and a real client in a namespace."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.drivers.base import Admit, Notify, ServiceDriver
from agent.drivers.openvpn import OpenVpn, Units
from agent.drivers.openvpn.process import Launcher
from shared.access import Credential
from shared.crypt import hash_password
from shared.resource import Protocol
from shared.services import OpenVpnServer
from tests.support.netns import Namespace, wait_until

PASSWORD = "correct horse"
SECRET = hash_password(PASSWORD)
_numbers = itertools.count()
DCO_MODULE = Path(__file__).resolve().parents[2] / ".cache" / "ovpn-dco" / "ovpn-dco-v2.ko"
REFUSED = "AUTH_FAILED"
CONNECTED = "Initialization Sequence Completed"


@dataclass(frozen=True)
class Material:
    """A client's certificate and key, both PEM."""

    certificate: bytes
    key: bytes

    @property
    def fingerprint(self) -> bytes:
        return x509.load_pem_x509_certificate(self.certificate).fingerprint(hashes.SHA256())


class Authority:
    """The VPN authority, as the controller has it."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test VPN authority")])
        self._certificate = (
            _builder(name, name, self._key.public_key(), timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.tls_crypt = _genkey("tls-crypt-v2-server")

    @property
    def pem(self) -> str:
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def sign_server(self, request: bytes, life: timedelta = timedelta(days=365), age: timedelta = timedelta()) -> bytes:
        public_key = x509.load_pem_x509_csr(request).public_key()
        return self._sign("node", public_key, ExtendedKeyUsageOID.SERVER_AUTH, life, age)

    def client(self, username: str) -> Material:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(
            username, key.public_key(), ExtendedKeyUsageOID.CLIENT_AUTH, timedelta(days=30), timedelta()
        )
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Material(certificate, text)

    def tls_crypt_client(self, directory: Path) -> str:
        server = directory / f"tls-crypt.{hashlib.sha256(self.tls_crypt.encode()).hexdigest()[:8]}"
        server.write_text(self.tls_crypt)
        return _genkey("tls-crypt-v2-client", "--tls-crypt-v2", str(server))

    def _sign(self, name: str, public_key: Any, usage: x509.ObjectIdentifier, life: timedelta, age: timedelta) -> bytes:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return (
            _builder(subject, self._certificate.subject, public_key, life, age)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(True, False, False, False, False, False, False, False, False),
                critical=True,
            )
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self._key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )


class Client:
    """A client program in a namespace; `material` and `password` are what it logs in by."""

    def __init__(
        self,
        namespace: Namespace,
        directory: Path,
        authority: Authority,
        *,
        username: str = "",
        password: str | None = None,
        material: Material | None = None,
        remote: str = "192.0.2.1",
        port: int = 1194,
        transport: str = "udp",
        options: tuple[str, ...] = ("pull-filter ignore redirect-gateway",),
    ) -> None:
        self._namespace = namespace
        self.device = f"tun{next(_numbers)}"
        self.log = directory / f"{self.device}.log"
        self._config = directory / f"{self.device}.conf"
        self._gateway = {"udp": "10.70.0.1", "tcp": "10.70.128.1"}[transport]
        family = "6" if ":" in remote else "4"
        lines = [
            "client",
            "dev-type tun",
            f"dev {self.device}",
            f"remote {remote} {port} {transport}{family}{'-client' if transport == 'tcp' else ''}",
            "nobind",
            "remote-cert-tls server",
            "connect-retry 1 1",
            "verb 3",
            *(["explicit-exit-notify 1"] if transport == "udp" else []),
            *options,
            f"<ca>\n{authority.pem}</ca>",
            f"<tls-crypt-v2>\n{authority.tls_crypt_client(directory)}</tls-crypt-v2>",
        ]
        if password is not None:
            lines.append(f"<auth-user-pass>\n{username}\n{password}\n</auth-user-pass>")
        if material is not None:
            lines.append(f"<cert>\n{material.certificate.decode()}</cert>\n<key>\n{material.key.decode()}</key>")
        self._config.touch(0o600)
        self._config.write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = self._namespace.popen(
                "openvpn", "--config", str(self._config), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def connected(self) -> bool:
        return CONNECTED in self.said()

    def wait_for(self, words: str, timeout: float = 30) -> None:
        try:
            wait_until(lambda: words in self.said(), timeout)
        except TimeoutError as error:
            raise AssertionError(f"the client did not say {words!r}:\n{self.said()}") from error

    def connect(self, timeout: float = 30) -> None:
        self.start()
        self.wait_for(CONNECTED, timeout)

    def refused(self) -> bool:
        self.start()
        wait_until(lambda: REFUSED in self.said() or self.connected(), 30)
        return not self.connected()

    def passes(self) -> bool:
        return self.ping(self._gateway)

    def ping(self, address: str, count: int = 1) -> bool:
        argv = ("ping", "-c", str(count), "-i", "0.2", "-W", "1", "-I", self.device, address)
        return f" {count} received" in self._namespace.run(*argv, check=False)

    def echoes(self, count: int) -> None:
        """Send so many packets of 1028 bytes, and have as many back.

        For the last answer ping waits only twice as long as another one took, which is nothing on a busy machine.
        """
        goal = self._arrived() + count
        options = ("-q", "-c", str(count), "-i", "0.002", "-s", "1000", "-I", self.device)
        self._namespace.run("ping", *options, self._gateway)
        wait_until(lambda: self._arrived() >= goal)

    def _arrived(self) -> int:
        return int(self._namespace.run("cat", f"/sys/class/net/{self.device}/statistics/rx_packets"))

    def end(self) -> None:
        if self.process is not None:
            self._namespace.end(self.process)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: Any, life: timedelta, age: timedelta = timedelta()
) -> x509.CertificateBuilder:
    begins = datetime.now(UTC) - age - timedelta(seconds=10)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + life)
    )


def _genkey(kind: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "key"
        subprocess.run(("openvpn", *options, "--genkey", kind, str(path)), capture_output=True, check=True, timeout=30)
        return path.read_text()


class OpenVpnRig:
    """The host is 192.0.2.1 and 2001:db8::1; clients are on another. alice and carol log in by certificate."""

    asks = True
    dco = False
    transport = "udp"  # of its clients, unless they ask for another

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority()
        self.host, self.far = Namespace("host"), Namespace("far")
        self._exit = ExitStack()
        self._materials: dict[str, Material] = {}
        self._clients: list[Client] = []

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            exits.enter_context(self.host)
            exits.enter_context(self.far)
            self.host.connect(self.far, "192.0.2.1/24", "192.0.2.2/24", ("2001:db8::1/64", "2001:db8::2/64"))
            exits.enter_context(self.host.entered())
            self._exit = exits.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for client in self._clients:
                print(client.said() if client.log.exists() else "a client that never started")
        self._exit.close()

    def driver(self, admit: Admit, notify: Notify) -> OpenVpn:
        directory = self.directory / "openvpn"
        launcher = self.launcher(directory)
        return OpenVpn(directory, boot_id="boot", admit=admit, notify=notify, launcher=launcher, dco=self.dco)

    def launcher(self, directory: Path) -> Launcher | None:
        return None

    async def prepare(self, driver: ServiceDriver) -> None:
        assert isinstance(driver, OpenVpn)
        request = await driver.certificate_request()
        assert request is not None
        await driver.install_certificate(self.authority.sign_server(request), self.authority.pem.encode())

    def spec(self, **changes: Any) -> OpenVpnServer:
        spec = OpenVpnServer(
            port=1194,
            ipv4_pool="10.70.0.0/16",
            ipv6_pool="fd70::/63",
            dns=("10.70.0.1", "fd70::1"),
            ca=self.authority.pem,
            tls_crypt=self.authority.tls_crypt,
        )
        changed = msgspec.structs.replace(spec, **changes)
        changed.check()
        return changed

    def changed_spec(self) -> OpenVpnServer:
        return self.spec(dns=("192.0.2.53",), keepalive=7)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_INET6) as tcp:
            udp.bind(("::", 1194))
            tcp.bind(("::", 1194))
            tcp.listen()
            yield

    def material(self, username: str) -> Material:
        if username not in self._materials:
            self._materials[username] = self.authority.client(username)
        return self._materials[username]

    def credential(self, username: str, **changes: Any) -> Credential:
        by = {"fingerprint": self.material(username).fingerprint} if by_certificate(username) else {"secret": SECRET}
        return Credential(protocol=Protocol.OPENVPN, username=username, account=1, **{**by, **changes})

    def client(self, username: str, *, wrong: bool = False, **options: Any) -> Client:
        login: dict[str, Any] = {"username": username, "password": "wrong" if wrong else PASSWORD}
        if by_certificate(username):
            login = {"material": self.authority.client(username) if wrong else self.material(username)}
        made = Client(self.far, self.directory, self.authority, **{"transport": self.transport, **login, **options})
        self._clients.append(made)
        return made


def by_certificate(username: str) -> bool:
    return username in ("alice", "carol")


class OpenVpnUnitsRig(OpenVpnRig):
    """The same, but the processes are systemd's: its own program for sockets starts one for each connection. Clients
    come by TCP."""

    transport = "tcp"

    def __enter__(self) -> Self:
        super().__enter__()
        self._runtime = self.directory / "run"
        self._runtime.mkdir()
        start = self._runtime / "start"
        program = ("openvpn", "--config", "stdin")
        self.host.popen("systemd-socket-activate", "--accept", "--inetd", f"--listen={start}", *program)
        wait_until(start.exists)
        return self

    def launcher(self, directory: Path) -> Launcher:
        return Units(directory, self._runtime)


class OpenVpnDcoRig(OpenVpnRig):
    """The same, but the kernel passes the data, on both hosts; for as long as the rig is there."""

    dco = True

    def __enter__(self) -> Self:
        if not os.environ.get("SKYNETVPN_KERNEL_TESTS"):
            pytest.skip("loads a kernel module: run make test-kernel")
        if self._unloaded():
            for argv in (("modprobe", "--all", "udp_tunnel", "ip6_udp_tunnel"), ("insmod", str(DCO_MODULE))):
                subprocess.run(argv, check=True)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        wait_until(self._unloaded, 60)  # the kernel takes its time to clear the namespaces away

    def spec(self, **changes: Any) -> OpenVpnServer:
        return super().spec(**{"transports": ("udp",), **changes})  # TCP is never offloaded

    @staticmethod
    def _unloaded() -> bool:
        subprocess.run(("rmmod", DCO_MODULE.stem), capture_output=True, check=False)
        return not Path("/sys/module/ovpn_dco_v2").exists()
