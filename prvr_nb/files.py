"""Errors for people, and files that are whole or not there."""
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class UserError(ValueError):
    "A mistake that the user can mend; the message names the file or setting, what is wrong with it and the remedy."


def replace_file(
    path:str|Path, # file to write
    data:bytes, # its new content
):
    "Write aside, force to the disk, rename: a reader meets the old file or the new one, whatever is killed or full; raises OSError."
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error: raise OSError(error.errno, error.strerror, str(path)) from None
    finally: aside.unlink(missing_ok=True) # it is there only after a failure: a full disk gets its space back

def write_json(
    path:str|Path, # file to write
    value, # anything that json can hold
):
    "Write JSON so that a reader never meets half a file."
    replace_file(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


@contextmanager
def hold_folder(
    folder:Path, # made when it is not there
    busy:str, # what to say when another process holds it
    other:str, # what to choose another of when it cannot be written
)->Iterator:
    "Hold a folder for one process; raises UserError when another holds it or it cannot be written. The system lets go when the process ends, however it ends."
    lock = FileLock(folder/".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout: raise UserError(f"{folder} is {busy}") from None
    except OSError as error: raise UserError(f"{folder} cannot be written ({error.strerror or error}); choose another {other}") from None
    except NotImplementedError: pass # a file system without locks
    try: yield
    finally: lock.release()
