"""Errors for people, and files that are whole or not there."""
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class UserError(ValueError):
    "A mistake that the user can mend; the message names the file or setting, what is wrong with it and the remedy."


def _remove(path:Path):
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def replacing(path:str|Path)->Iterator[Path]:
    """Write a file, or a folder that is not there yet, aside; force it to the disk; rename it.

    A reader meets the old file or the new one, whatever is killed or full. Gives the path to write at. After an error
    nothing is left aside, and an OSError names the file that was to be written.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        _remove(aside) # of a process that was killed
        yield aside
        for file in filter(Path.is_file, (aside, *aside.rglob("*"))):
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        aside.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(aside)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        _remove(aside)


def replace_file(path:str|Path, data:bytes):
    "Write bytes so that a reader never meets half a file."
    with replacing(path) as aside:
        aside.write_bytes(data)


def write_json(path:str|Path, value):
    "Write JSON so that a reader never meets half a file."
    replace_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path:str|Path, remedy:str):
    "The value in a JSON file; raises UserError, with what to do about it, when there is none."
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except (ValueError, RecursionError) as error: # not UTF-8, not JSON, or nested without end
        raise UserError(f"{path} is not JSON ({error}); {remedy}") from None


@contextmanager
def hold_folder(folder:Path, busy:str, other:str)->Iterator:
    """Hold a folder, made when it is not there, for one process, until it ends, however it ends.

    Raises UserError with `busy` when another process holds it, with "choose another `other`" when it cannot be written.
    """
    lock = FileLock(folder/".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder} is {busy}") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); choose another {other}") from None
    except NotImplementedError:
        pass # a file system without locks
    try:
        yield
    finally:
        lock.release()
