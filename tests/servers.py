"""Servers as a user starts them, and waiting that does not depend on how busy the machine is."""
import configparser
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
PATIENCE = int(os.environ.get("PRVR_PATIENCE", 600)) # seconds in which nothing happens
WORK = 1500 # seconds of processor time after which work is not believed to lead anywhere
ADDRESS = r"http://127\.0\.0\.1:\d+/\S*token=[\w-]+" # that prvr_app prints


def processor_seconds():
    "What all processes that this one has started have used so far."
    used = 0.
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            used += sum(process.cpu_times()[:4]) # children that have ended count too
    return used


def wait_for(condition, what, pause=time.sleep):
    "The first true value of a condition. Time counts only while the processes that were started do nothing."
    start = last = processor_seconds()
    since = time.monotonic()
    while not (found := condition()):
        now = processor_seconds()
        if abs(now - last) >= 1:
            last, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE or now - start > WORK:
            pytest.fail(f"{what} has not happened after {now - start:.0f} processor seconds; "
                        f"for {time.monotonic() - since:.0f} seconds nothing has worked on it")
        pause(0.2)
    return found


def fetch(url):
    "Status, address after redirections, and text."
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as reply:
            return reply.status, reply.url, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.url, error.read().decode(errors="replace")
    except OSError:
        return None, url, ""


def family(process):
    "A process and its descendants."
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def stop(process, how=signal.SIGTERM):
    "End a server as a user does; returns the processes that stayed, which are killed."
    if process.poll() is not None:
        return []
    all_of_them = family(process)
    os.killpg(process.pid, how)
    with suppress(pytest.fail.Exception):
        wait_for(lambda: process.poll() is not None, "the end")
    _, stayed = psutil.wait_procs(all_of_them, timeout=60)
    for one in stayed:
        one.kill()
    process.wait()
    return stayed


def as_from_a_terminal():
    "In a new process: Ctrl-C ends it, whatever started the tests; on Linux it also ends when they are killed."
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM) # PR_SET_PDEATHSIG


@contextmanager
def server(command, folder, pattern, **env):
    "A process group in a folder, and the address that it prints, once it answers there; ended in any case."
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "jupyter/lab/user-settings/@jupyterlab" # not the user's
    for name, content in {"notebook-extension/tracker": {"windowingMode": "none"},
                          "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(content))
    places = {"JUPYTER_CONFIG_DIR": "jupyter", "JUPYTER_DATA_DIR": "share", "JUPYTER_RUNTIME_DIR": "runtime",
              "IPYTHONDIR": "ipython"}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
           "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
           **{name: str(folder / place) for name, place in places.items()}, **env}
    log = folder / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=as_from_a_terminal)

    def address():
        if process.poll() is not None:
            pytest.fail(f"{command} ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
        found = re.search(pattern, log.read_text())
        return found and fetch(found[0])[0] == 200 and found[0]
    try:
        yield process, wait_for(address, f"an answer of {command[:4]}")
    finally:
        stop(process)


def app(*flags, first=""):
    "The command line of prvr_app, as its entry point in settings.ini starts it, after some statements."
    config = configparser.ConfigParser()
    config.read(ROOT / "settings.ini")
    module, function = re.search(r"prvr_app=([\w.]+):(\w+)", config["DEFAULT"]["console_scripts"]).groups()
    source = "import sys; sys.path.pop(0) # as in a script\n"
    source += f"{first}\nfrom {module} import {function}\nsys.exit({function}())"
    return [sys.executable, "-c", source, *map(str, flags)]
