"""A fake llama-server that starts in a few milliseconds and misbehaves as planned.

It accepts `-m FILE --host H --port P` and any other flag. The folder FAKE_SERVER_DIR has its
`plan.json` (see `Plan`), its `journal` with one line per event and a monotonic time, and
`alive.lock`, which the process and everything it forks hold: a second server that starts meanwhile
cannot take it, and writes the event `overlap`.

It imports only small modules, and nothing of the project, in order to start fast.
"""

from __future__ import annotations

import _socket
import _thread
import fcntl
import os
import signal
import sys
import time

TYPE_CHECKING = False  # `typing` alone would double the start-up time
if TYPE_CHECKING:
    from typing import Any, TypedDict

    class Plan(TypedDict, total=False):
        """How one start behaves. `by_model` maps a model's file name to keys that win for it."""

        by_model: dict[str, Plan]
        # before it listens
        exit_code: int  # end at once
        message: str  # printed first
        flood_bytes: int  # printed before the bind, in the form `flood`
        flood: str  # lines | one_line | binary | escapes
        stop_itself: str  # SIGSTOP at "start" or when "healthy"
        hang: bool  # never bind
        bind_after_s: float
        # once it listens
        announce: str | None  # None: no "listening on" line; text: printed instead of the real one
        loading_s: float  # /health is 503 for this long; negative: forever
        work: str  # while loading: read | print | grow | compute | fault | map | idle
        answer_after_s: float  # every answer takes this long; negative: there is none
        answer_costs_s: float  # CPU time of an answer
        logs_requests: bool  # prints every request, as many HTTP servers do
        silent_at: str  # the path that is never answered
        backlog: int  # never accept, and queue only this many connections
        crash_after_s: float  # after the first 200
        crash_signal: int  # 0: exit with `crash_code`
        crash_code: int
        flood_for_ever: bool
        knows_keys: bool  # false: it answers without a key, as old builds do
        close_output: bool  # closes its pipe
        hangs: str  # once healthy it answers nothing more; meanwhile: idle | compute | print
        # the end
        ignore_term: int  # how many SIGTERMs have no effect; negative: all
        term_takes_s: float
        waits_for_clients: bool  # to close their connections, once it has SIGTERM
        children: list[str]  # group | setsid | daemon | closed | scrubbed | escaped; "!": deaf


HOME = os.environ.get("FAKE_SERVER_DIR", "")
_PAUSE = "import signal\nwhile True: signal.pause()"


def read_plan(model: str) -> Plan:
    """Parse JSON with Python's own parser: importing `json` would take longer than the start."""
    with open(os.path.join(HOME, "plan.json")) as file:
        plan = eval(file.read(), {"true": True, "false": False, "null": None})
    plan.update(plan.pop("by_model", {}).get(os.path.basename(model), {}))
    return plan  # type: ignore[no-any-return]


class Journal:
    """Appends one line per event, atomically."""

    def __init__(self, root: int) -> None:
        self.root = root
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(os.path.join(HOME, "journal"), flags)

    def write(self, event: str, **members: Any) -> None:
        line = {
            "at": time.monotonic(),
            "event": event,
            "pid": os.getpid(),
            "ticks": own_ticks(),
            "root": self.root,
            **members,
        }
        os.write(self._fd, repr(line).encode() + b"\n")

    @property
    def fds(self) -> set[int]:
        return {self._fd}


def own_ticks() -> int:
    """Return when this process was started, which with the pid identifies it."""
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def hold_alive_lock(journal: Journal) -> int:
    """Take the lock; if it is held, another server or a descendant of one is alive."""
    fd = os.open(os.path.join(HOME, "alive.lock"), os.O_RDWR | os.O_CREAT)
    os.set_inheritable(fd, True)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        journal.write("overlap")
    return fd


def open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the folder's own descriptor
    return found


def flood(size: int, form: str) -> None:
    """Print this many bytes, and block if the pipe is full."""
    piece = {
        "lines": b"load_tensors: a line of the kind that llama.cpp prints all day\n",
        "one_line": b"x" * 4096,
        "binary": bytes(range(256)) * 16,
        "escapes": b"\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b1m \x1b[2J\r" * 64 + b"\n",
    }[form]
    left = size
    while left > 0:
        left -= os.write(1, piece)


def burn(cpu_s: float) -> None:
    ends = time.thread_time() + cpu_s
    while time.thread_time() < ends:
        pass


class Server:
    """One fake server: its socket, its signals and its crash."""

    def __init__(self, plan: Plan, journal: Journal) -> None:
        self.plan = plan
        self.journal = journal
        self.terms = 0
        self.ready_at = 0.0
        self.has_answered = False
        self.is_hung = False
        self.connections = 0

    def on_term(self, signum: int, frame: object) -> None:
        self.terms += 1
        self.journal.write("term", count=self.terms)
        ignored = self.plan.get("ignore_term", 0)
        if ignored < 0 or self.terms <= ignored:
            return
        time.sleep(self.plan.get("term_takes_s", 0.0))
        while self.plan.get("waits_for_clients") and self.connections:
            time.sleep(0.001)
        self.end(0)

    def end(self, code: int) -> None:
        self.journal.write("exit", code=code)
        os._exit(code)

    def bind(self, host: str, port: int) -> None:
        self.socket = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        self.socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        self.socket.bind((host, port))
        self.socket.listen(self.plan.get("backlog", 64))
        if "backlog" in self.plan:
            self.fill_the_queue()
        at, port = self.socket.getsockname()
        line = self.plan.get("announce", f"main: server is listening on http://{at}:{port}")
        self.journal.write("bound", port=port)
        if line is not None:
            os.write(1, line.encode() + b" - starting the main loop\n")

    def work(self, model: str) -> None:
        """Do what a server does while its model loads."""
        kind, kept = self.plan.get("work", "idle"), []
        if kind in ("fault", "map"):
            self.map(model, again=kind == "fault")
        while not self.is_ready():
            if kind == "read":
                with open(model, "rb") as file:
                    file.read(1 << 20)
            elif kind == "print":
                os.write(1, b".")
            elif kind == "grow":
                kept.append(bytearray(os.urandom(1 << 18)))
            elif kind == "compute":
                burn(0.1)
            time.sleep(0.02)

    def map(self, model: str, *, again: bool) -> None:
        """Map the model and touch its pages, as llama.cpp does, and only then begin `loading_s`;
        `again`: touch always the same page, which is no longer in memory.
        """
        import mmap

        if not again:
            self.ready_at = float("inf")
        fd = os.open(model, os.O_RDONLY)
        os.fsync(fd)  # a page that is not written yet cannot be dropped
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages:
            for at in range(0, len(pages), mmap.PAGESIZE):
                while again and not self.is_ready():
                    pages.madvise(mmap.MADV_DONTNEED)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    pages[0]
                    time.sleep(0.05)
                pages[at]
                if at % (1 << 20) == 0:
                    time.sleep(0.02)
            if not again:
                self.ready_at = time.monotonic()
                self.journal.write("mapped")
            while not self.is_ready():
                time.sleep(0.02)

    def is_ready(self) -> bool:
        loading = self.plan.get("loading_s", 0.0)
        return loading >= 0 and time.monotonic() >= self.ready_at + loading

    def answer(self, connection: int) -> None:
        with_fd = _socket.socket(fileno=connection)
        self.connections += 1
        try:
            while (request := with_fd.recv(65536)) != b"":
                path = request.split(b" ", 2)[1].decode()
                self.reply(with_fd, path, is_allowed=path == "/health" or self.has_key(request))
        except OSError:
            pass
        finally:
            with_fd.close()
            self.connections -= 1

    def has_key(self, request: bytes) -> bool:
        key = os.environ.get("LLAMA_API_KEY") if self.plan.get("knows_keys", True) else None
        return key is None or f"Authorization: Bearer {key}\r\n".encode() in request

    def reply(self, connection: _socket.socket, path: str, *, is_allowed: bool) -> None:
        delay = self.plan.get("answer_after_s", 0.0)
        if delay < 0 or path == self.plan.get("silent_at") or self.is_hung:
            return
        time.sleep(delay)
        burn(self.plan.get("answer_costs_s", 0.0))
        if self.plan.get("logs_requests"):
            os.write(2, f'INFO: 127.0.0.1 - "GET {path} HTTP/1.1"\n'.encode())
        status, body = "200 OK", '{"status":"ok"}'
        if not self.is_ready():
            status, body = "503 Service Unavailable", '{"error":{"message":"Loading model"}}'
        elif not is_allowed:
            status, body = "401 Unauthorized", '{"error":{"message":"Invalid API Key"}}'
        elif path == "/props":
            body = '{"default_generation_settings":{"n_ctx":4096},"modalities":{"vision":false}}'
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        connection.send(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        is_last = path == "/props" or self.plan.get("silent_at") == "/props"  # of the probes
        if self.is_ready() and is_last and not self.has_answered:
            self.has_answered = True
            self.journal.write("healthy")
            _thread.start_new_thread(self.after_healthy, ())

    def after_healthy(self) -> None:
        if self.plan.get("stop_itself") == "healthy":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.plan.get("close_output"):
            os.closerange(1, 3)
            self.journal.write("closed")
        if self.plan.get("flood_for_ever"):
            _thread.start_new_thread(flood, (1 << 60, "lines"))
        if "hangs" in self.plan:
            self.is_hung = True
            self.journal.write("hangs")
            while self.plan["hangs"] != "idle":
                if self.plan["hangs"] == "compute":
                    burn(0.1)
                else:
                    os.write(1, b".\n")
                    time.sleep(0.1)
        if "crash_after_s" in self.plan:
            time.sleep(self.plan["crash_after_s"])
            self.journal.write("crash")
            if signum := self.plan.get("crash_signal", 0):
                os.kill(os.getpid(), signum)
                time.sleep(60)
            os._exit(self.plan.get("crash_code", 1))

    def serve(self, model: str) -> None:
        """Serve on other threads and wait for SIGTERM here: if two arrive while this thread enters
        a blocking call, a handler would run only once, and only after the call.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.ready_at = time.monotonic()
        _thread.start_new_thread(self.work, (model,))
        if "backlog" not in self.plan:
            _thread.start_new_thread(self.accept, ())
        while True:
            self.on_term(signal.sigwait({signal.SIGTERM}), None)

    def accept(self) -> None:
        while True:
            connection, _ = self.socket._accept()  # type: ignore[attr-defined]
            _thread.start_new_thread(self.answer, (connection,))

    def fill_the_queue(self) -> None:
        """Make the kernel ignore any further connection."""
        self.fillers = [_socket.socket(_socket.AF_INET, _socket.SOCK_STREAM) for _ in range(8)]
        for filler in self.fillers:
            filler.setblocking(False)
            filler.connect_ex(self.socket.getsockname())


def start_child(kind: str, journal: Journal, alive_fd: int) -> None:
    """Fork a process that holds the port and the pipe, and may be hard to find."""
    ignores_term = kind.endswith("!")
    kind = kind.rstrip("!")
    if os.fork() != 0:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores_term else signal.SIG_DFL)
    if kind != "group":
        os.setsid()
    if kind in ("daemon", "closed", "scrubbed", "escaped") and os.fork() != 0:
        os._exit(0)
    if kind in ("closed", "escaped"):
        kept = {alive_fd} | journal.fds
        for fd in [fd for fd in open_files() if fd not in kept]:
            os.close(fd)
    journal.write("child", kind=kind)
    if kind in ("scrubbed", "escaped"):
        os.execve(sys.executable, ["python", "-I", "-S", "-c", _PAUSE], {})
    while True:
        signal.pause()


def main(argv: list[str]) -> None:
    if "--help" in argv:
        return  # which says nothing of its flags
    options = {name: argv[at + 1] for at, name in enumerate(argv[:-1])}
    model = options.get("-m", "")
    plan = read_plan(model)
    journal = Journal(os.getpid())
    server = Server(plan, journal)
    signal.signal(signal.SIGTERM, server.on_term)
    alive_fd = hold_alive_lock(journal)
    files = {fd: name for fd, name in open_files().items() if fd not in journal.fds | {alive_fd}}
    journal.write(
        "start", model=model, argv=argv, ppid=os.getppid(), env=dict(os.environ), fds=files
    )
    if plan.get("stop_itself") == "start":
        os.kill(os.getpid(), signal.SIGSTOP)
    if "message" in plan:
        os.write(2, plan["message"].encode() + b"\n")
    flood(plan.get("flood_bytes", 0), plan.get("flood", "lines"))
    if "exit_code" in plan:
        server.end(plan["exit_code"])
    while plan.get("hang"):
        signal.pause()
    time.sleep(plan.get("bind_after_s", 0.0))
    server.bind(options.get("--host", "127.0.0.1"), int(options.get("--port", "0")))
    for kind in plan.get("children", []):
        start_child(kind, journal, alive_fd)
    server.serve(model)


if __name__ == "__main__":
    main(sys.argv[1:])
