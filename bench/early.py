"""A script imports this first: a stop while its libraries load ends it in one line.

So does a current folder that was removed. A launcher that is gone its ranks take for a SIGTERM, at
any time. Nothing happens where another program imports a script's modules.
"""
import os
import signal
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATIENCE = 40           # seconds in which a run that has not begun leaves by itself
PAUSE = 1.0             # seconds between two looks
begun = False           # whether a stage's steps are under way: from then on a stop is for its end


def leave(number=None, frame=None) -> None:
    """End this process where nothing has begun: no state is lost."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped\n")
    os._exit(130)


def follow(launcher: int) -> None:
    """Take it for a SIGTERM when the launcher, this process's parent, is gone."""
    while os.getppid() == launcher:
        time.sleep(PAUSE)
    if os.environ["RANK"] == "0":
        os.write(2, b"\nthe launcher is gone\n")
    os.kill(os.getpid(), signal.SIGTERM)
    # The main thread may be waiting for what the launcher held, and sees no signal.
    time.sleep(PATIENCE)
    if not begun:
        leave()


def is_script() -> bool:
    """Whether one of this repository's scripts is what was started."""
    started = getattr(sys.modules["__main__"], "__file__", None) or ""
    return os.path.dirname(os.path.abspath(started)) in (ROOT, os.path.join(ROOT, "bench"))


def check_folder() -> None:
    """End a script in one line where its current folder was removed."""
    try:
        os.getcwd()
    except OSError:
        os.write(2, b"error: the current folder was removed; change to one that is there (cd)\n")
        sys.exit(2)


if is_script():
    check_folder()
    # The C++ code's warnings are stack traces: of a store that is gone, of a host without a name.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
if is_script() and threading.current_thread() is threading.main_thread():
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, leave)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=follow, args=[os.getppid()], daemon=True).start()
