"""The folder of a run: what it holds, who may write into it, and whether it is the run that is asked for.

config.json        every setting: enough to repeat the run
corpus.json        hashes of the files of both splits
history.jsonl      one line per epoch: each loss, each metric on the validation split
best.safetensors   weights of the best epoch, with the configuration inside
last.safetensors   everything that the run needs to go on, after its last complete epoch
metrics.json       the rows of the table, and which epoch was best; a run that has it is finished
tensorboard/       the numbers of the history as curves
.lock              held by the process that trains here
"""
import json
import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from prvr_nb.config import Config, differences, read_config
from prvr_nb.data.prepared import PreparedSplit
from prvr_nb.files import UserError, hold_folder, read_json, replace_file, write_json

RESULTS = ("history.jsonl", "best.safetensors", "last.safetensors", "metrics.json")
FREE = ("nonfinite", "compile") # settings that may change when a run goes on


def check_settings(stored:Config, config:Config, source:Path):
    "Raise UserError with the settings in which a run and what is wanted differ, as the run has them."
    other = [f"{name} {value}" for name, value in differences(stored, config).items() if name not in FREE]
    if other:
        raise UserError(f"{source} was started with other settings ({', '.join(other)}); "
                        "give those, or choose another --out")


def check_unused(out:Path):
    "Raise UserError when a folder holds a run already, or something that is none."
    held = [name for name in RESULTS if (out/name).exists()]
    if held:
        raise UserError(f"{out} holds a run already ({', '.join(held)}); "
                        "add --resume to continue it, choose another --out or remove the folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    if (out/"config.json").exists(): # of a run that was stopped in its first epoch, or not ours
        try:
            read_config(out/"config.json")
        except UserError:
            raise UserError(f"{out} holds a config.json that is not a run's; choose another --out") from None


def check_same_run(out:Path, config:Config):
    "Raise UserError when the run in a folder was started with other settings."
    if (out/"config.json").exists():
        check_settings(read_config(out/"config.json"), config, out)


def contents(path:Path)->str: # 16 hexadecimal digits
    "A hash of a file's size and of 64 pieces of 4 KB: the same wherever the file is copied to."
    size = path.stat().st_size
    found = sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(64):
            file.seek(size * piece // 64)
            found.update(file.read(4096))
    return found.hexdigest()[:16]


def corpus_files(train_set:PreparedSplit, val_set:PreparedSplit)->dict: # split → file → hash
    "What the files of a run are."
    splits = {"train": train_set.split.paths, "val": val_set.split.paths}
    return {name: {path.name: contents(path) for path in paths} for name, paths in splits.items()}


def check_same_corpus(out:Path, files:dict):
    "Raise UserError when the run in a folder was started with other files."
    held = read_json(out/"corpus.json", "") if (out/"corpus.json").exists() else files # earlier versions wrote none
    if held != files:
        changed = [name for name in files if not isinstance(held, dict) or held.get(name) != files[name]]
        raise UserError(f"{out} was started with other captions or features ({' and '.join(changed)}) than --root "
                        "holds now; restore the corpus or choose another --out")


def start_run(out:Path, config:Config, files:dict, resume:bool=False):
    "Make a run folder; raises UserError when it holds another run already or cannot be written."
    check_same_run(out, config) if resume else check_unused(out)
    if resume:
        check_same_corpus(out, files)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out/"config.json", asdict(config))
        write_json(out/"corpus.json", files)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from None


def only_process(out:Path): # a context manager
    "Hold a run folder while training in it."
    return hold_folder(out, "being trained by another process; wait for it or choose another --out", "--out")


def read_history(out:Path)->list: # a dictionary per epoch
    "What a run noted after each epoch; raises UserError when a line is damaged."
    path = out/"history.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or remove the run and train again") from None


def append_history(out:Path, line:dict):
    "Add a line and force it to the disk, before the saved state says that the epoch is done."
    with (out/"history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def trim_history(out:Path, epochs:int):
    "Forget lines of epochs that the saved state does not know; raises UserError when lines that it knows are missing."
    path = out/"history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    try:
        known = [json.loads(line)["epoch"] for line in lines[:epochs]]
    except (ValueError, KeyError, TypeError, RecursionError):
        known = None
    if known != list(range(epochs)):
        raise UserError(f"{path} does not hold the {epochs} epochs that last.safetensors has done; "
                        "restore it, or remove the folder to train this run from its beginning")
    if len(lines) > epochs:
        replace_file(path, b"".join(lines[:epochs]))


def finished_rows(out:Path)->list|None: # rows of the table; None while the run is not finished
    "The result of a finished run."
    path, remedy = out/"metrics.json", "delete it, and --resume writes it again"
    held = read_json(path, remedy) if path.exists() else {"rows": None}
    if not isinstance(held, dict) or not isinstance(held.get("rows", 0), list|None):
        raise UserError(f"{path} holds no rows of a table; {remedy}")
    return held["rows"]
