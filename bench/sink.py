"""A lean SMTP sink in a process of its own: it says each mail it took on a line of stdout, with the time.

    python sink.py PORT [DELAY [CERTIFICATE]]

With DELAY (seconds), all that a client sends arrives that much later, so that each wait for an answer costs it that
time, as on a longer way to the server. With CERTIFICATE (a PEM file) the sink offers STARTTLS.
"""

import asyncio
import ssl
import sys
import time

TEXTS = {b"MAIL": b"250 OK\r\n", b"RCPT": b"250 OK\r\n", b"RSET": b"250 OK\r\n", b"NOOP": b"250 OK\r\n",
         b"HELO": b"250 sink\r\n", b"QUIT": b"221 Bye\r\n", b"DATA": b"354 Go on\r\n", b"STARTTLS": b"220 Go on\r\n"}


class Sink(asyncio.Protocol):
    """A connection. TLS makes it anew: the client begins with EHLO again."""

    def __init__(self, delay: float, context: ssl.SSLContext | None, greets: bool = True) -> None:
        self.delay, self.context, self.greets = delay, context, greets
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.waiting, self.in_data, self.recipient = b"", False, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self.greets:
            transport.write(b"220 sink\r\n")
        self.arrived(b"")

    def data_received(self, data: bytes) -> None:
        if self.delay:
            self.loop.call_later(self.delay, self.arrived, data)
        else:
            self.arrived(data)

    def arrived(self, data: bytes) -> None:
        """Answer whatever is complete, in one piece."""
        self.waiting += data
        if self.transport is None:  # the end of the handshake came with the first command
            return
        replies = []
        while True:
            end = b"\r\n.\r\n" if self.in_data else b"\r\n"
            found, separator, rest = self.waiting.partition(end)
            if not separator:
                break
            self.waiting = rest
            replies.append(self.taken() if self.in_data else self.reply(found))
        if replies and not self.transport.is_closing():
            self.transport.write(b"".join(replies))
        if replies and replies[-1] == TEXTS[b"QUIT"]:
            self.transport.close()
        elif replies and replies[-1] == TEXTS[b"STARTTLS"]:
            self.loop.create_task(self.start_tls())

    def reply(self, line: bytes) -> bytes:
        command = line.split(b" ", 1)[0].upper()
        if command == b"EHLO":
            offers = [b"sink", b"PIPELINING", b"8BITMIME"] + [b"STARTTLS"] * (self.context is not None)
            return b"".join(b"250-%s\r\n" % offer for offer in offers) + b"250 HELP\r\n"
        if command == b"RCPT":
            self.recipient = line.partition(b"<")[2].partition(b">")[0]
        self.in_data = command == b"DATA"
        return TEXTS.get(command, b"502 Unknown\r\n")

    def taken(self) -> bytes:
        self.in_data = False
        sys.stdout.write(f"{time.monotonic()} {self.recipient.decode()}\n")
        return b"250 OK\r\n"

    async def start_tls(self) -> None:
        protocol = Sink(self.delay, None, greets=False)
        try:
            transport = await self.loop.start_tls(self.transport, protocol, self.context, server_side=True)
        except OSError:  # the client was ended meanwhile
            self.transport.close()
        else:
            protocol.connection_made(transport)


async def main(port: int, delay: float = 0.0, certificate: str = "") -> None:
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    server = await asyncio.get_running_loop().create_server(lambda: Sink(delay, context), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    asyncio.run(main(int(sys.argv[1]), *map(float, sys.argv[2:3]), *sys.argv[3:4]))
