"""Join a fleet once: check the controller by the pin in the token, prove a key made here, receive a certificate."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

import aiohttp
import msgspec

from agent import config, files
from agent.errors import AgentError, in_words
from agent.identity import CONFIG, Identity, client_context, signing_request
from shared import __version__, jointoken
from shared.protocol import CA_PATH, CONTROLLER_NAME, ENROL_PATH, EnrolAnswer, EnrolRefusal, EnrolRequest
from shared.resource import Protocol

_TIMEOUT = aiohttp.ClientTimeout(total=30)
_MAX_ANSWER = 1 << 20


async def enrol(text: str, directory: Path, protocols: tuple[Protocol, ...] = ()) -> EnrolAnswer:
    """Run the whole enrolment; may be repeated with the same token, the keys of the first try are used again."""
    try:
        token = jointoken.decode(text)
        config.split_address(token.address)
    except ValueError as error:
        raise AgentError(f"{error}: copy the whole token, or ask for a new one") from error
    files.make_private_directory(directory)
    with files.locked(directory):
        path = directory / CONFIG
        settings = config.render(path, directory=directory, controller=token.address, protocols=protocols)
        identity = Identity(directory)
        key = identity.ensure_key(identity.current.key)
        identity.ensure_wireguard_key()
        request = EnrolRequest(
            token_id=token.id,
            secret=token.secret,
            csr=signing_request(key),
            agent=__version__,
            wireguard_public_key=identity.public_key(),
        )
        answer = await _exchange(token, request)
        identity.store(identity.current, answer.certificate, answer.ca)
        identity.discard_next()
        files.write_private(path, settings)
    return answer


async def _exchange(token: jointoken.JoinToken, request: EnrolRequest) -> EnrolAnswer:
    connector = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(f"https://{token.address}", connector=connector, timeout=_TIMEOUT) as session:
        try:
            ca = await _pinned_ca(session, token.ca_pin)
            async with session.post(
                ENROL_PATH,
                data=msgspec.msgpack.encode(request),
                headers={"Content-Type": "application/msgpack"},
                ssl=client_context(ca),
                server_hostname=CONTROLLER_NAME,
                allow_redirects=False,
            ) as response:
                return _answer(response.status, await response.content.read(_MAX_ANSWER))
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise AgentError(
                f"the controller at {token.address} did not prove that it belongs to the CA in the token: "
                f"{in_words(error)}; check the clock of this host"
            ) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise AgentError(
                f"the controller at {token.address} cannot be reached: {in_words(error)}; "
                "check the address, and that this host may connect to it"
            ) from error


async def _pinned_ca(session: aiohttp.ClientSession, pin: bytes) -> str:
    """Fetch the CA without trust, and keep the certificates whose key the token names."""
    async with session.get(CA_PATH, ssl=_unverified(), server_hostname=CONTROLLER_NAME, allow_redirects=False) as reply:
        if reply.status != 200:
            raise AgentError(f"{reply.url} answered {reply.status}: this is not the node channel of a controller")
        pem = await reply.content.read(_MAX_ANSWER)
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        bundle = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise AgentError("the controller sent no certificate: is the address in the token the node channel?") from error
    for certificate in bundle:
        spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if hashlib.sha256(spki).digest() == pin:
            return certificate.public_bytes(Encoding.PEM).decode()
    raise AgentError(
        "the controller's CA is not the one that the token names: somebody may be in between, or the controller was "
        "set up anew. Nothing was sent. Ask for a new token over a channel that you trust"
    )


def _unverified() -> ssl.SSLContext:
    """Only for reading the CA: it is checked against the pin before anything is sent to the controller."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _answer(status: int, body: bytes) -> EnrolAnswer:
    try:
        if status == 200:
            return msgspec.msgpack.decode(body, type=EnrolAnswer)
        refusal = msgspec.msgpack.decode(body, type=EnrolRefusal)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AgentError(f"the controller answered {status} with something else than an enrolment") from error
    raise AgentError(f"the controller refused the token ({refusal.code}): {refusal.message}")
