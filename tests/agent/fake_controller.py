"""A controller at the wire: real TLS, real certificates, frames as the test scripts them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from aiohttp import WSMsgType, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.jointoken import JoinToken
from shared.protocol import (
    CA_PATH,
    CHANNEL_PATH,
    CONTROLLER_NAME,
    ENROL_PATH,
    EnrolAnswer,
    EnrolRefusal,
    EnrolRequest,
    Frame,
    FromAgent,
    Hello,
    Welcome,
    decode_from_agent,
    encode,
)


class Authority:
    """A CA that signs for the controller and for nodes."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign("test ca", self._key.public_key(), authority=True, days=365)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def pin(self) -> bytes:
        spki = self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(spki).digest()

    def sign_request(self, csr: bytes, *, start: timedelta = timedelta(minutes=-5), days: float = 7) -> bytes:
        public = x509.load_pem_x509_csr(csr).public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        return self._sign("node", public, start=start, days=days).public_bytes(Encoding.PEM)

    def server_context(self, directory: Path, **times: object) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(CONTROLLER_NAME, key.public_key(), **times)  # type: ignore[arg-type]
        chain = directory / f"server-{secrets.token_hex(4)}.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain.write_bytes(private + certificate.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(chain)
        context.load_verify_locations(cadata=self.pem.decode())
        context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def _sign(
        self,
        name: str,
        public: ec.EllipticCurvePublicKey,
        *,
        authority: bool = False,
        start: timedelta = timedelta(minutes=-5),
        days: float = 7,
    ) -> x509.Certificate:
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if name == "node" else ExtendedKeyUsageOID.SERVER_AUTH
        begin = datetime.now(UTC) + start
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test ca")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


class FakeController:
    def __init__(self, directory: Path, authority: Authority | None = None) -> None:
        self.authority = authority or Authority()
        self.directory = directory
        self.secret = secrets.token_bytes(32)
        self.port = 0
        self.welcome: Welcome | None = Welcome(version=1, epoch="e1", node_id="1", scopes=["node:1"])
        self.enrolments: list[EnrolRequest] = []
        self.refusal: EnrolRefusal | None = None
        self.lose_reply = False
        self.answers: dict[bytes, EnrolAnswer] = {}
        self.refuses_with: int | None = None  # status of the answer to every node that dials
        self.hellos: list[Hello] = []
        self.serials: list[int] = []
        self.frames: asyncio.Queue[FromAgent] = asyncio.Queue()
        self.times: dict[str, object] = {}
        self.socket: web.WebSocketResponse | None = None
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def token(self, **changes: object) -> str:
        values: dict[str, object] = {"id": "t1", "secret": self.secret, "ca_pin": self.authority.pin}
        return JoinToken(**{"address": self.address} | values | changes).encode()  # type: ignore[arg-type]

    async def __aenter__(self) -> FakeController:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(
            [web.get(CA_PATH, self._ca), web.post(ENROL_PATH, self._enrol), web.get(CHANNEL_PATH, self._channel)]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        context = self.authority.server_context(self.directory, **self.times)
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=context, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self.socket is not None:
            await self.socket.close()
        assert self._runner is not None
        await self._runner.cleanup()

    async def send(self, *frames: Frame) -> None:
        assert self.socket is not None
        for frame in frames:
            await self.socket.send_bytes(encode(frame))

    async def receive(self, kind: type[FromAgent], seconds: float = 20) -> FromAgent:
        """The next frame of this kind; others before it are dropped."""
        async with asyncio.timeout(seconds):
            while True:
                frame = await self.frames.get()
                if isinstance(frame, kind):
                    return frame

    async def _ca(self, _request: web.Request) -> web.Response:
        return web.Response(body=self.authority.pem)

    async def _enrol(self, request: web.Request) -> web.Response:
        body = msgspec.msgpack.decode(await request.read(), type=EnrolRequest)
        self.enrolments.append(body)
        if self.refusal is not None or body.secret != self.secret:
            refusal = self.refusal or EnrolRefusal(code="token_invalid", message="the token is not known")
            return web.Response(status=401, body=msgspec.msgpack.encode(refusal))
        answer = self.answers.setdefault(
            x509.load_pem_x509_csr(body.csr).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            EnrolAnswer(
                node_id="1",
                name="node-1",
                certificate=self.authority.sign_request(body.csr, **self.times),  # type: ignore[arg-type]
                ca=self.authority.pem,
            ),
        )
        if self.lose_reply:
            assert request.transport is not None
            request.transport.close()
        return web.Response(body=msgspec.msgpack.encode(answer))

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        der = request.transport.get_extra_info("ssl_object").getpeercert(True)
        if der is None or self.refuses_with is not None:
            return web.Response(status=self.refuses_with or 401)
        self.serials.append(x509.load_der_x509_certificate(der).serial_number)
        socket = web.WebSocketResponse(max_msg_size=4 << 20)
        await socket.prepare(request)
        self.socket = socket
        async for message in socket:
            assert message.type is WSMsgType.BINARY
            frame = decode_from_agent(message.data)
            assert frame is not None
            if isinstance(frame, Hello):
                self.hellos.append(frame)
                if self.welcome is not None:
                    await socket.send_bytes(encode(self.welcome))
            self.frames.put_nowait(frame)
        return socket
