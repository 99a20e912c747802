"""An SMTP sink by aiosmtpd in a process of its own: says each mail it took on a line of stdout, with the time.

    python sink.py PORT [DELAY [CERTIFICATE]]

DELAY is in seconds, before each reply to MAIL, RCPT and the end of data; with CERTIFICATE (a PEM file) it offers
STARTTLS.
"""

import asyncio
import ssl
import sys
import time

import aiosmtpd.smtp


class Sink:
    def __init__(self, delay):
        self.delay = delay

    async def handle_EHLO(self, server, session, envelope, host_name, replies):
        session.host_name = host_name
        return replies[:-1] + ["250-PIPELINING"] + replies[-1:]

    async def handle_MAIL(self, server, session, envelope, address, options):
        envelope.mail_from = address
        return "250 OK"

    async def handle_RCPT(self, server, session, envelope, address, options):
        if self.delay:  # one round trip, as commands that come in one piece cost one
            await asyncio.sleep(self.delay)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        if self.delay:
            await asyncio.sleep(self.delay)
        sys.stdout.write(f"{time.monotonic()} {envelope.rcpt_tos[0]}\n")
        sys.stdout.flush()
        return "250 OK"


async def main(port, delay=0.0, certificate=None):
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    server = await asyncio.get_running_loop().create_server(
        lambda: aiosmtpd.smtp.SMTP(Sink(delay), tls_context=context), "127.0.0.1", port)
    await server.serve_forever()


asyncio.run(main(int(sys.argv[1]), *map(float, sys.argv[2:3]), *sys.argv[3:4]))
