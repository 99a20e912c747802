"""What a Python user would build instead: the same mail through Celery, RQ, Dramatiq and Huey, or by a loop.

Each sends by its documented idiom with smtplib, a connection per mail, and once more with ready bytes on a reused
connection, which favours it. REDIS, SMTP_PORT and SMTP_CA come from the environment; with SMTP_CA (a PEM file of the
certificates to trust), each connection begins with STARTTLS.
"""

import asyncio
import collections.abc
import email.message
import os
import signal
import smtplib
import ssl
import sys
import threading

REDIS = os.environ["REDIS"]
SMTP_PORT = int(os.environ["SMTP_PORT"])
SMTP_CA = os.environ.get("SMTP_CA", "")
TLS = ssl.create_default_context(cafile=SMTP_CA) if SMTP_CA else None
Mail = tuple[str, str, str]  # recipient, subject, HTML
local = threading.local()


def connected() -> smtplib.SMTP:
    """A connection that is ready for a mail."""
    smtp = smtplib.SMTP("127.0.0.1", SMTP_PORT)
    if TLS:
        smtp.starttls(context=TLS)
    return smtp


def message(recipient, subject, content):
    """The mail as the email package's documentation makes it."""
    mail = email.message.EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "app@example.org", recipient, subject
    mail.set_content(content, subtype="html")
    return mail


def ready_bytes(recipient, subject, content):
    """The mail without the email package."""
    return (f"From: app@example.org\r\nTo: {recipient}\r\nSubject: {subject}\r\nMIME-Version: 1.0\r\n"
            f'Content-Type: text/html; charset="utf-8"\r\n\r\n{content}').encode()


def by_idiom(recipient, subject, content):
    """A connection for each mail."""
    with connected() as smtp:
        smtp.send_message(message(recipient, subject, content))


def reused(recipient, subject, content):
    """One connection for each thread."""
    if not hasattr(local, "smtp"):
        local.smtp = connected()
    local.smtp.sendmail("app@example.org", [recipient], ready_bytes(recipient, subject, content))


def everybody(recipient, subject, content):
    """The loop everybody writes: EmailMessage and send_message on a reused connection."""
    if not hasattr(local, "smtp"):
        local.smtp = connected()
    local.smtp.send_message(message(recipient, subject, content))


def loop(send, mails, threads):
    """Send mails in bare threads, without any queue."""
    def run(part):
        for mail in part:
            send(*mail)
    workers = [threading.Thread(target=run, args=(mails[number::threads],)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


async def send_side_by_side(idiomatic: bool, mails: list[Mail], connections: int) -> None:
    """Send mails by aiosmtplib on reused connections, without any queue: by its idiom, or as ready bytes."""
    import aiosmtplib

    async def run(mails: collections.abc.Iterator[Mail]) -> None:
        smtp = aiosmtplib.SMTP(hostname="127.0.0.1", port=SMTP_PORT, start_tls=bool(TLS), tls_context=TLS)
        await smtp.connect()
        for mail in mails:
            if idiomatic:
                await smtp.send_message(message(*mail))
            else:
                await smtp.sendmail("app@example.org", [mail[0]], ready_bytes(*mail))
    shared = iter(mails)
    await asyncio.gather(*(run(shared) for _ in range(connections)))


which = os.environ.get("PEER", "")
if which == "celery":
    import celery
    app = celery.Celery("peers", broker=REDIS)
    by_idiom_task, reused_task = app.task(by_idiom), app.task(reused)
elif which == "dramatiq":
    import dramatiq
    import dramatiq.brokers.redis
    dramatiq.set_broker(dramatiq.brokers.redis.RedisBroker(url=REDIS))
    by_idiom_task, reused_task = dramatiq.actor(by_idiom), dramatiq.actor(reused)
elif which == "huey":
    import huey as huey_package
    huey = huey_package.RedisHuey("peers", url=REDIS)
    by_idiom_task, reused_task = huey.task()(by_idiom), huey.task()(reused)
elif which == "rq":
    import redis
    import rq
    queue = rq.Queue(connection=redis.Redis.from_url(REDIS))


def enqueue(kind, mail):
    """Queue one mail by the library's own call; `kind` is "by_idiom" or "reused"."""
    if which == "rq":
        queue.enqueue(globals()[kind], *mail)
    elif which == "celery":
        globals()[f"{kind}_task"].delay(*mail)
    elif which == "dramatiq":
        globals()[f"{kind}_task"].send(*mail)
    else:
        globals()[f"{kind}_task"](*mail)


if which == "fastapi":
    import celery
    import fastapi
    import pydantic
    celery_app = celery.Celery("peers", broker=REDIS)
    send_task = celery_app.task(by_idiom)

    class Payload(pydantic.BaseModel):
        userId: str
        subject: str
        content: str

    class Task(pydantic.BaseModel):
        task: str
        type: str
        retries: int
        payload: Payload

    fast = fastapi.FastAPI()

    @fast.post("/task/")
    def post_task(task: Task):
        send_task.delay(task.payload.userId, task.payload.subject, task.payload.content)
        return {"status": True, "msg": "Task enqueued successfully"}
elif which == "flask":
    import flask
    import redis
    import rq
    flask_app = flask.Flask("peers")
    flask_queue = rq.Queue(connection=redis.Redis.from_url(REDIS))

    @flask_app.post("/task/")
    def post_flask_task():
        payload = flask.request.get_json()["payload"]
        flask_queue.enqueue(by_idiom, payload["userId"], payload["subject"], payload["content"])
        return {"status": True, "msg": "Task enqueued successfully"}


if __name__ == "__main__":
    if sys.argv[1] == "bare":  # the limit of accepting: a server that answers a constant
        import http.server

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer in one piece: in two, it waits 40 ms for a delayed ACK

            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "16")
                self.end_headers()
                self.wfile.write(b'{"status": true}')

            def log_message(self, *_):
                pass
        http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
    else:  # a loop without a queue: peers.py everybody|reused|aiosmtplib|aiosmtplib_bytes CONNECTIONS MAILS
        from bench import mails
        kind, connections, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        if kind.startswith("aiosmtplib"):
            asyncio.run(send_side_by_side(kind == "aiosmtplib", mails(count), connections))
        else:
            loop(globals()[kind], mails(count), connections)
        signal.pause()  # it stays, so that its processor time can be read
