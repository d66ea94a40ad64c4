"""A conversation with the worker in the sandbox that runs what was handed in."""

import hmac
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from course.grading import sandbox
from course.notebooks import gigabytes, one_line
from helpers.profiles import ROOT

START_SECONDS = 120  # for the sandbox and the imports
GRACE_SECONDS = 5  # between asking a cell to stop and killing it
POLL_SECONDS = 0.1
LONGEST_ANSWER = 2**16  # bytes
STATUSES = ("correct", "not yet", "not attempted", "error")  # of an exercise that was run
ANSWERS = {  # of the worker, by what it was asked to do
    "context": {"error": str},
    "attempt": {"error": str, "missing": list, "replaced": list},
    "check": {"status": str, "message": str},
}
WORKER = [sys.executable, "-s", "-m", "course.grading.worker"]


@dataclass(frozen=True)
class Settings:
    """How submissions are run."""

    limits: sandbox.Limits = field(default_factory=sandbox.Limits)
    cell_seconds: int = 120  # for each cell, and each check
    notebook_seconds: int = 1800  # for all of a submission
    one_thread: bool = False
    unsafe: bool = False  # without a sandbox, in processes of their own only


class EndedError(Exception):
    """The processes of a submission are gone; the message says why."""


class Session:
    """A worker in a sandbox, and the most memory that its processes held together."""

    def __init__(self, process: subprocess.Popen, settings: Settings, complaints: Path, stop: threading.Event) -> None:
        """Greet the worker, which has just been started."""
        self.process, self.settings, self.complaints, self.stop = process, settings, complaints, stop
        self.token = secrets.token_hex(16)
        self.gib = 0.0
        self.received = b""
        self.started = False
        os.set_blocking(process.stdin.fileno(), False)
        self.unsent = json.dumps({"token": self.token}).encode() + b"\n"

    def ask(self, seconds: int, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer; EndedError if there is none."""
        self.unsent += json.dumps({**request, "seconds": seconds}).encode() + b"\n"
        end = time.monotonic() + seconds + GRACE_SECONDS + (0 if self.started else START_SECONDS)
        answers, requests = self.process.stdout.fileno(), self.process.stdin.fileno()
        while b"\n" not in self.received:
            if self.stop.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > end:
                raise EndedError(f"did not end within {seconds} s and had to be killed")
            self._watch_memory()
            readable, writable, _ = select.select([answers], [requests] if self.unsent else [], [], POLL_SECONDS)
            if writable:
                try:
                    self.unsent = self.unsent[os.write(requests, self.unsent) :]
                except BrokenPipeError:  # nobody reads any more, and the other pipe says why
                    self.unsent = b""
            if readable:
                if not (chunk := os.read(answers, LONGEST_ANSWER)):
                    raise EndedError(self._why())
                self.received += chunk
            if len(self.received) > LONGEST_ANSWER:
                raise EndedError("wrote to the grader's channel")
        line, _, self.received = self.received.partition(b"\n")
        try:
            answer = json.loads(line)
            genuine = hmac.compare_digest(str(answer.pop("token")).encode(), self.token.encode())
            genuine = genuine and all(isinstance(answer.get(k), kind) for k, kind in ANSWERS[request["do"]].items())
            genuine = genuine and answer.get("status", "correct") in STATUSES
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            genuine = False
        if not genuine or self.received:
            raise EndedError("wrote to the grader's channel")
        self.started = True
        return answer

    def _watch_memory(self) -> None:
        processes = []
        with suppress(psutil.NoSuchProcess):
            processes = psutil.Process(self.process.pid).children(recursive=True)
        gib = _resident(processes)
        if gib > self.settings.limits.gib:
            gib = _resident(processes, shared_once=True)  # dear, and a fork shares nearly everything
        self.gib = max(self.gib, gib)
        if gib > self.settings.limits.gib:
            raise EndedError(f"held more than {gigabytes(self.settings.limits.gib)} of memory")

    def _why(self) -> str:
        if not self.started:
            text = self.complaints.read_text(errors="replace")
            return f"the worker did not start: {one_line(text.strip().rpartition(chr(10))[2]) or 'no reason given'}"
        return "ended its process (os._exit, a crash, or a kill)"


def _resident(processes: list[psutil.Process], shared_once: bool = False) -> float:
    """GiB of memory that the processes hold; what they share counts for each, or in equal parts for all."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            try:
                total += process.memory_full_info().pss if shared_once else process.memory_info().rss
            except psutil.AccessDenied:
                total += process.memory_info().rss
    return total / 2**30


@contextmanager
def session(settings: Settings, user: int, stop: threading.Event) -> Iterator[Session]:
    """A worker of its own, in a folder of its own; nothing of it is left afterwards."""
    environment = {
        "HOME": "/tmp",
        "USER": "student",
        "LANG": "C.UTF-8",
        "PYTHONPATH": sandbox.COURSE,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1",
        "LLM_WORKBOOK_PROFILE": "cpu",
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    if settings.one_thread:
        environment["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True)))
        (root := folder / "root").mkdir()
        complaints = stack.enter_context((folder / "complaints").open("wb"))
        if settings.unsafe:
            process = _start_unsafe(root, environment, complaints.fileno())
        else:
            process = sandbox.start(WORKER, root, settings.limits, environment, user, complaints.fileno())
        try:
            yield Session(process, settings, folder / "complaints", stop)
        finally:
            _kill(process)


def _start_unsafe(root: Path, environment: dict[str, str], errors: int) -> subprocess.Popen:
    """The worker without a sandbox."""
    for name in sandbox.SEEN:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(ROOT / name)
    (root / "notebooks").mkdir()
    return subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=root / "notebooks",
        env={"PATH": os.environ.get("PATH", ""), **environment, "PYTHONPATH": str(root), "HOME": str(root)},
        start_new_session=True,
    )


def _kill(process: subprocess.Popen) -> None:
    """End the process and everything below it."""
    below = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()
    for child in below:  # in a sandbox the kernel does this, and here we wait for it
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(below, timeout=10)
