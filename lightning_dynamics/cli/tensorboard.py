"""``lightning-dynamics tensorboard``: the link at which TensorBoard shows a run at its best, and TensorBoard itself."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from importlib.util import find_spec
from urllib.request import ProxyHandler, build_opener

from lightning_dynamics.recording.reading import load_runs
from lightning_dynamics.recording.tensorboard import custom_scalars_link, event_files, headline_tags, pinned_link

_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_PATIENCE = 120.0  # seconds until TensorBoard answers
_ANYWHERE = {"0.0.0.0": "localhost", "::": "localhost"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "tensorboard",
        help="a link to TensorBoard with the headline curves pinned",
        description="Print how to start TensorBoard on these runs, and links that open it with the headline curves "
        "pinned and smoothing 0.",
    )
    parser.add_argument("logdir", metavar="LOGDIR", help="the directory of a run, or one above several")
    parser.add_argument("--port", type=_port, default=6006, help="TensorBoard's port (6006)")
    parser.add_argument("--host", default="localhost", help="where TensorBoard listens (localhost)")
    parser.add_argument("--open", action="store_true", help="start TensorBoard and open the link in a browser")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    tags = headline_tags(load_runs(args.logdir))
    if not event_files(args.logdir, below=True):
        raise FileNotFoundError(
            f"No event files of TensorBoard in {args.logdir}: the run has another logger. "
            "`lightning-dynamics report` shows what was recorded."
        )
    arguments = ["--logdir", args.logdir, "--port", str(args.port), "--host", args.host]
    host = _ANYWHERE.get(args.host, args.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{args.port}"
    link = pinned_link(address, tags)
    if args.open:
        _check_able(args.host, args.port)
    else:
        print(f"Start TensorBoard:\n  {shlex.join(['tensorboard', *arguments])}\n")
    print(f"Headline curves, pinned, without smoothing:\n  {link}\n")
    print(f"All charts, arranged (Custom Scalars):\n  {custom_scalars_link(address)}", flush=True)
    return _open(arguments, address, link) if args.open else 0


def _open(arguments: list[str], address: str, link: str) -> int:
    """Start TensorBoard, show it, and stay until it ends or the user interrupts."""
    before = {each: signal.signal(each, _interrupt) for each in _ENDS}
    process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *arguments])
    try:
        _await(process, address)
        if not webbrowser.open(link):
            print("No browser could be opened. TensorBoard runs: open the first link yourself.", flush=True)
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
        process.wait()
        for each, handler in before.items():
            signal.signal(each, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _await(process: subprocess.Popen[bytes], address: str) -> None:
    """Return when TensorBoard answers."""
    opener = build_opener(ProxyHandler({}))  # it runs here, whatever the environment says of proxies
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ChildProcessError(f"TensorBoard ended with status {process.returncode} before it answered.")
        try:
            with opener.open(f"{address}/data/environment", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"TensorBoard did not answer at {address} within {_PATIENCE:.0f} seconds.")


def _check_able(host: str, port: int) -> None:
    """Refuse what TensorBoard would fail at."""
    if find_spec("tensorboard") is None:
        raise ModuleNotFoundError("`--open` starts TensorBoard, which is not installed: `pip install tensorboard`.")
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # one that has just been closed is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    why = "is in use" if error.errno == errno.EADDRINUSE else "is not for everyone"
                    raise OSError(f"Port {port} {why}: choose another `--port`, or end what listens there.") from None


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"a number from 1 to 65535, got {text!r}")
    return int(text)
