"""Commands that start in milliseconds, because they are forked from a process with all imports.

Run as a program, this file replaces `python -m`. It sends its arguments, folder, environment and
standard streams to a server, and it ends with the exit code of the process that the server forks.
The program itself imports only the modules below.
"""

import json
import os
import signal
import socket
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path


def context():
    """Return the context of `multiprocessing` whose processes need not import anything.

    They are forks of this process. Where there is a GPU, a fork of a process that has computed
    gradients cannot compute any, so there a server is forked that imports everything again.
    """
    import multiprocessing

    import torch

    import tests.support.warm  # noqa: F401

    if not torch.cuda.is_available():
        return multiprocessing.get_context("fork")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.support.warm"])
    return found


@contextmanager
def server(folder):
    """Run the server, and yield the replacement for `(sys.executable, "-m")` in a command."""
    path = str(folder / "forks")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        program = (sys.executable, "-S", "-E", __file__, path)
        process = context().Process(target=_serve, args=(listener, program))
        process.start()
        try:
            yield program
        finally:
            process.kill()
            process.join()


def in_forks(*calls):
    """Run each (function, *arguments) in a fork of this process, all at once; what they return."""
    pipes = []
    for function, *arguments in calls:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writer, json.dumps(function(*arguments)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        pipes.append((pid, reader))
    found = []
    for pid, reader in pipes:
        with os.fdopen(reader) as file:
            text = file.read()
        os.waitpid(pid, 0)
        found.append(json.loads(text) if text else None)
    return found


def _serve(listener, program):
    """Answer each connection in a process of its own. The runs of a study start the same way."""
    from zofo.study.process import Child

    Child.program = program
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            os.setsid()
            _answer(connection)
        connection.close()


def _answer(connection):
    """Fork the command, send its process id, and later send its exit code."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os._exit(_run(json.loads(message)))
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(asked):
    """Run `python -m` in this process and return its exit code."""
    import runpy

    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww")
    )
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    module, *sys.argv[1:] = asked["arguments"]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _ask(path, *arguments):
    """Let the server run the command, pass signals on to it, and end with its exit code."""
    asked = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
        with connection.makefile() as answers:
            pid = int(answers.readline())
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, lambda number, _: os.kill(pid, number))
            code = int(answers.readline())
    sys.exit(128 - code if code < 0 else code)


if __name__ == "__main__":
    _ask(*sys.argv[1:])
