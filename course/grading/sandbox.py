"""Runs a program that nobody trusts: without network, with limits, and seeing only the files that it needs.

Linux namespaces do this, by `unshare`, `mount`, `pivot_root`, `setpriv` and `prlimit` of util-linux. The program gets
a file system of its own in memory, of limited size, in which Python and the course's helpers and data can be read; a
process table of its own, so that everything ends with its first process; and no network. Started by root it runs as a
user of its own; started by anyone else, inside a user namespace. In both cases it has no capabilities.

The module knows nothing about notebooks. What it does not do: it filters no system calls, so an error in the kernel is
an open door, and it does not share out processor time.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from helpers.profiles import ROOT

COURSE = "/course"  # where the program finds the course's files, and may write
TOOLS = ("unshare", "mount", "umount", "pivot_root", "setpriv", "prlimit")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/etc/fonts")
WORKER = "course/grading/worker.py"  # the only part of the room that is seen inside
SEEN = ("helpers", "recipes", "data", "requirements.txt", "constraints.txt", WORKER)  # never the notebooks

# Runs as the first process of the new namespaces, as root in them. $1 is an empty folder; standard input has one line
# for each thing to show: kind, source and place in the new root, separated by tabs, and then an empty line.
SETUP = """\
set -eu
root=$1 size=$2 owner=$3
shift 3
mount -t tmpfs -o "size=$size,nr_inodes=20000,mode=755" sandbox "$root"
cd "$root"
mkdir -p proc dev tmp old course/notebooks
while IFS="$(printf '\\t')" read -r kind source place && [ -n "$kind" ]; do
    mkdir -p "$root$(dirname "$place")"
    case $kind in
    link) ln -s "$source" "$root$place"; continue ;;
    folder) mkdir -p "$root$place" ;;
    file) [ -e "$root$place" ] || : > "$root$place" ;;
    esac
    mount --rbind "$source" "$root$place"
    case $source in /dev/*) ;; *) mount -o remount,bind,ro "$root$place" ;; esac
done
ln -s /proc/self/fd dev/fd
mkdir dev/shm
chown "$owner:$owner" course course/notebooks tmp dev/shm
mount -t proc proc proc
pivot_root . old
umount -l /old
rmdir /old
cd /course/notebooks
"$@"
"""


@dataclass(frozen=True)
class Limits:
    """What one sandbox may use."""

    gib: float = 4.0  # memory of a process; what all hold together is the caller's to watch
    disk_mib: int = 512
    processes: int = 256  # and threads


def missing() -> str:
    """Why there can be no sandbox here, as the end of a sentence; "" if it works."""
    if sys.platform != "linux":
        return "it needs the namespaces of Linux"
    if absent := [tool for tool in TOOLS if not _tool(tool)]:
        return f"{', '.join(absent)} of util-linux is not installed"
    try:
        result = subprocess.run(
            [*_namespaces(), "true"], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    reason = (result.stderr.strip() or f"unshare ended with status {result.returncode}").splitlines()[0]
    return reason if result.returncode else ""


def start(
    program: list[str], root: Path, limits: Limits, environment: Mapping[str, str], user: int, errors: int
) -> subprocess.Popen:
    """Start the program in a sandbox of its own; its standard input and output are pipes.

    `root` is an empty folder, which stays empty. `user` is the number of the user that the program runs as if this is
    root: nobody else's, since the number of its processes is limited. What the making of the sandbox complains about
    goes to the file descriptor `errors`. Killing the process that is returned ends everything in the sandbox, and so
    does the end of the thread that called this.
    """
    is_root = os.geteuid() == 0
    identity = [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if is_root else []
    setup = ["sh", "-c", SETUP, "sandbox", str(root), f"{limits.disk_mib}m", str(user if is_root else 0)]
    drop = ["setpriv", *identity, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    # Address space is no measure, since torch reserves far more than it uses; written data are a good one.
    limit = ["prlimit", f"--nproc={limits.processes}", f"--data={int(2 * limits.gib * 2**30)}", "--core=0"]
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig=KILL", *_namespaces(), *setup, *drop, *limit, *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
        start_new_session=True,
    )
    lines = ["\t".join(entry) for entry in _visible()]
    with suppress(BrokenPipeError):  # its making failed, as the complaints say
        process.stdin.write(("\n".join(lines) + "\n\n").encode())
        process.stdin.flush()
    return process


def _namespaces() -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]


def _tool(name: str) -> str | None:
    return shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")


def _visible() -> list[tuple[str, str, str]]:
    """Kind, source and place of everything that the program may read."""
    # The interpreter, its environment and its packages; links on the way to the interpreter are kept.
    python = {sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)}
    python |= {os.path.realpath(sys.executable).rpartition("/bin/")[0], sysconfig.get_path("purelib")}
    python |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and Path(path).is_dir()}
    places = [*SYSTEM, *sorted(python)]  # a folder stands before those in it
    found: list[tuple[str, str, str]] = []
    for path in map(Path, places):
        if any(kind == "folder" and path.is_relative_to(place) for kind, _, place in found):
            continue
        if path.is_symlink() and str(path) in SYSTEM:
            found.append(("link", str(path.readlink()), str(path)))
        elif path.exists():
            found.append(("folder" if path.is_dir() else "file", str(path), str(path)))
    for device in ("null", "zero", "full", "random", "urandom"):
        found.append(("file", f"/dev/{device}", f"/dev/{device}"))
    for name in SEEN:
        source = ROOT / name
        found.append(("folder" if source.is_dir() else "file", str(source), f"{COURSE}/{name}"))
    return found
