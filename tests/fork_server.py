"""Runs one-rank commands in forks of a process that has already imported torch and Lightning.

A command under test costs three seconds of imports otherwise. The server imports what `train` imports, starts no
thread and computes nothing; a fork gets its arguments, environment, folder, import path and standard streams from the
test and runs the command's module as `python -m` does. The only rank of a job that a sweep or a search starts comes
from the server too; the ranks of all other jobs are started by the command itself, as a user's are. The workers of
pytest-xdist share one server, which their controller starts.

    python tests/fork_server.py lit_glm SOCKET     (the word lit_glm: `report` knows a running command by it)
"""

import array
import fcntl
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Dict, List, Optional, Sequence, Tuple

import psutil

_MAX_REQUEST = 2**20
_MODULES = ("lit_glm.launch.rank_runner", "lit_glm.launch.launcher", "lit_glm.launch.sweep", "lit_glm.evaluate")
_SAFE = (
    *("MASTER_", "NODE_RANK", "SLURM_", "MLFLOW_", "WANDB_", "LIT_GLM_CONTAINER", "LIT_GLM_LOG", "KEPT", "PATH"),
    *("PYTHONPATH", "CHIP_LIBRARY", "DOUBLE_", "XPU_VISIBLE_DEVICES"),
)
"""Beginnings of variables that no library of the server reads when it is imported: with any other a command starts
cold."""
_ADDRESS_VARIABLE = "LIT_GLM_FORK_SERVER"


def can_fork(env: Optional[Dict[str, str]]) -> bool:
    """Whether a command with these additional variables may start from the server."""
    return all(name.startswith(_SAFE) for name in env or {})


class ForkedProcess:
    """What tests use of `subprocess.Popen`, for a process that the server has forked."""

    def __init__(self, server: "ForkServer", module: str, arguments: List[str], cwd: Path, env: Dict[str, str]) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self.stdout, self.stderr = (os.fdopen(end, encoding="utf-8", errors="replace") for end in (out, err))
        self._start(server, module, arguments, str(cwd), env, {out_end: 1, err_end: 2})
        os.close(out_end)
        os.close(err_end)

    def _start(
        self,
        server: "ForkServer",
        module: str,
        arguments: List[str],
        cwd: str,
        env: Dict[str, str],
        descriptors: Dict[int, int],
        ends_with_parent: bool = False,
    ) -> None:
        """Send the request; `descriptors`: number here -> number in the process."""
        self.args = [module, *arguments]
        self.returncode: Optional[int] = None
        self._lock = threading.Lock()
        self._connection = server.connect()
        request = {"module": module, "arguments": arguments, "cwd": cwd, "env": env}
        request.update(numbers=list(descriptors.values()), ends_with_parent=ends_with_parent)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self._connection.sendmsg([json.dumps(request).encode() + b"\n"], rights)
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> Optional[int]:
        """Return the exit status; None while the process runs."""
        if self.returncode is None and self._lock.acquire(blocking=False):  # else another thread waits for the end
            try:
                if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
                    self._read_status()
            finally:
                self._lock.release()
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        """Wait for the end."""
        with self._lock:
            if self.returncode is None:
                if not select.select([self._connection], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
                self._read_status()
        assert self.returncode is not None
        return self.returncode

    def _read_status(self) -> None:
        status = int(self._answers.readline())
        self.returncode = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self._connection.close()

    def communicate(self, timeout: Optional[float] = None) -> Tuple[str, str]:
        """Read both outputs to their end, then wait."""
        texts: Dict[IO[str], List[bytes]] = {stream: [] for stream in (self.stdout, self.stderr) if not stream.closed}
        ends = time.monotonic() + (timeout if timeout is not None else 1e9)
        waiting = list(texts)
        while waiting:
            ready = select.select(waiting, [], [], max(0.0, ends - time.monotonic()))[0]
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            for stream in ready:
                block = os.read(stream.fileno(), 2**16)
                texts[stream].append(block)
                if not block:
                    waiting.remove(stream)
        self.wait(max(0.0, ends - time.monotonic()))
        out, err = (b"".join(texts.get(stream, [])).decode("utf-8", "replace") for stream in (self.stdout, self.stderr))
        for stream in texts:
            stream.close()
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


class ForkedRank(ForkedProcess):
    """The only rank of a job, forked by the server with what the supervisor gives to `subprocess.Popen`."""

    def __init__(
        self,
        server: "ForkServer",
        command: Sequence[str],
        *,
        env: Dict[str, str],
        stdout: Optional[IO[str]],
        stderr: Optional[int],
        pass_fds: Sequence[int],
        **_others: Any,
    ) -> None:
        out = os.dup(1 if stdout is None else stdout.fileno())
        err = os.dup(2 if stderr is None else out)
        module, *arguments = command[2:]  # after `python -m`
        descriptors = {out: 1, err: 2, **{number: number for number in pass_fds}}
        self._start(server, module, arguments, os.getcwd(), env, descriptors, ends_with_parent=True)
        os.close(out)
        os.close(err)


def fork_only_ranks(server: "ForkServer") -> None:
    """Let supervisors of this process start the only rank of a job from the server."""
    from lit_glm.launch import supervisor

    def start(command: Sequence[str], **how: Any) -> Any:
        env = how["env"]
        same_threads = env.get("OMP_NUM_THREADS") == server.num_threads
        if env["WORLD_SIZE"] == "1" and command[2] == "lit_glm.launch.worker" and same_threads:
            return ForkedRank(server, command, **how)
        return subprocess.Popen(command, **how)

    supervisor.subprocess = SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT)  # type: ignore[assignment]


class ForkServer:
    """The server of a pytest process and its workers."""

    def __init__(self) -> None:
        self.env: Dict[str, str] = {}
        """Of the server itself, whatever the first test that needs it has changed."""
        self.num_threads = os.environ.get("OMP_NUM_THREADS")
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._own: Optional[tempfile.TemporaryDirectory[str]] = None

    def share(self) -> None:
        """Start the server, for the processes that this one starts from now on."""
        self._start()
        os.environ[_ADDRESS_VARIABLE] = str(self._folder)

    def _start(self) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="lit_glm-fork-")
        command = [sys.executable, __file__, "lit_glm", str(self._folder / "socket")]
        with (self._folder / "stderr.txt").open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=log, env=self.env or None, cwd=Path(__file__).parent
            )
        (self._folder / "pid").write_text(str(self._process.pid))

    @property
    def _folder(self) -> Path:
        return Path(os.environ[_ADDRESS_VARIABLE] if self._own is None else self._own.name)

    def connect(self) -> socket.socket:
        """Connect to the server; starts it where none runs."""
        if self._own is None and _ADDRESS_VARIABLE not in os.environ:
            self._start()
        connection, server = socket.socket(socket.AF_UNIX), psutil.Process(int((self._folder / "pid").read_text()))
        while True:
            try:
                connection.connect(str(self._folder / "socket"))
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                if server.status() == psutil.STATUS_ZOMBIE:
                    said = (self._folder / "stderr.txt").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the fork server has ended: {said}") from None
                time.sleep(0.02)

    def close(self) -> None:
        """End the server, if this process has started it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._own is not None:
            self._own.cleanup()


def _receive(connection: socket.socket) -> Tuple[Dict[str, Any], List[int]]:
    descriptors = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(_MAX_REQUEST, socket.CMSG_SPACE(8 * descriptors.itemsize))
    for _, _, content in ancillary:
        descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    while not data.endswith(b"\n"):
        data += connection.recv(_MAX_REQUEST)
    return json.loads(data), list(descriptors)


def _send(connection: socket.socket, number: int) -> None:
    """Send a number; a test that has ended meanwhile no longer listens."""
    try:
        connection.sendall(f"{number}\n".encode())
    except OSError:
        pass


_FIRST_FREE = 900  # a number that no process of the tests wants a descriptor to have


def _set_up_child_process(request: Dict[str, Any], descriptors: List[int], address: str) -> None:
    """Turn this fork into the command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    given = [os.open(os.devnull, os.O_RDONLY), *descriptors]
    sources = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _FIRST_FREE) for descriptor in given]
    for descriptor in given:
        os.close(descriptor)
    for source, target in zip(sources, [0, *request["numbers"]]):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.environ[_ADDRESS_VARIABLE] = str(Path(address).parent)
    sys.path[:1] = [request["cwd"], *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [request["module"], *request["arguments"]]
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup
    fork_only_ranks(ForkServer())


def main(address: str) -> Optional[Dict[str, Any]]:
    """Serve until standard input closes; returns a request in the fork that is to run it."""
    from importlib import import_module

    from lit_glm.compat import without_plotting
    from lit_glm.openmp import limit_spinning
    from lit_glm.process_utils import paused_gc

    before = dict(os.environ)
    os.environ["OPENBLAS_NUM_THREADS"] = (
        "1"  # numpy's library starts its threads when it is imported; training uses none
    )
    limit_spinning()  # as a command does before it imports torch; the libraries read it when they are loaded
    with paused_gc(), without_plotting():
        for module in _MODULES:
            import_module(module)
    os.environ.clear()
    os.environ.update(before)
    assert len(os.listdir("/proc/self/task")) == 1, "a library has started a thread: forks would lack it"
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker)
    children: Dict[int, socket.socket] = {}
    watched: Dict[socket.socket, int] = {}
    """Connection of each process that ends with its parent, which then closes it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(8)
        while True:
            ready = select.select([listener, wake, sys.stdin, *watched], [], [])[0]
            if sys.stdin in ready:
                return None
            if wake in ready:
                os.read(wake, 4096)
            for pid in list(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    watched.pop(children[pid], None)
                    _send(children.pop(pid), status)
            for connection in [connection for connection in ready if connection in watched]:
                os.kill(watched.pop(connection), signal.SIGTERM)
            if listener in ready:
                connection, _ = listener.accept()
                request, descriptors = _receive(connection)
                pid = os.fork()
                if pid == 0:
                    for held in (connection, *children.values()):
                        held.close()
                    os.close(wake)
                    os.close(waker)
                    _set_up_child_process(request, descriptors, address)
                    return request
                for descriptor in descriptors:
                    os.close(descriptor)
                children[pid] = connection
                if request["ends_with_parent"]:
                    watched[connection] = pid
                _send(connection, pid)


if __name__ == "__main__":
    wanted = main(sys.argv[2])
    if wanted is not None:
        runpy.run_module(wanted["module"], run_name="__main__", alter_sys=True)
