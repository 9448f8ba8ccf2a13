"""The TLS of the node port: one context for the process, its short-lived certificate renewed while it runs."""

from __future__ import annotations

import asyncio
import os
import ssl

import structlog

from controller.fleet.ca import Authority
from controller.fleet.certificates import SERVER_LIFETIME

log = structlog.get_logger()


class ChannelTls:
    """A client certificate is asked for, not required: a host that enrols has none yet."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.verify_mode = ssl.CERT_OPTIONAL
        self.context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
        self.context.num_tickets = 0  # every connection proves its certificate
        self.context.load_verify_locations(cadata=authority.bundle.decode("ascii"))
        self.renew()

    def renew(self) -> None:
        """Take a new server certificate for the connections to come."""
        key, chain = self._authority.server_chain()
        # The library reads certificates only from files; this one is in memory and has no name.
        descriptor = os.memfd_create("channel", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(key + chain)
            self.context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SERVER_LIFETIME.total_seconds() / 2)
            self.renew()
            log.info("channel.server_certificate_renewed")
