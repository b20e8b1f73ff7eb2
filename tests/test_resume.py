"""A run that was stopped goes on as if nothing had happened: kills, damaged and missing files, full disks."""
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from conftest import history_of, small_config
from safetensors import safe_open
from safetensors.torch import save_file

from prvr_nb.cli import train_command
from prvr_nb.data.corpus import corpus_paths
from prvr_nb.data.prepared import prepare
from prvr_nb.data.toy import write_toy
from prvr_nb.files import UserError
from prvr_nb.training.loop import train
from prvr_nb.training.runs import only_process, read_history, trim_history

FILES = "history.jsonl", "metrics.json", "best.safetensors", "last.safetensors"


@pytest.fixture(scope="module", autouse=True)
def prepared(root):
    prepare(root, small_config(), quiet=True) # once for all processes


def train_here(root, out, settings):
    train(small_config(**settings), root, out, quiet=True, resume=True)


def command_here(flags):
    signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's background job has it ignored
    raise SystemExit(train_command(flags))


def content(out):
    return {name: (out / name).read_bytes() for name in FILES}


def place(out):
    "Epochs that the saved state has done, 0 without one. Raises when the file is damaged."
    if not (out / "last.safetensors").exists():
        return 0
    with safe_open(out / "last.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["progress"])["epoch"]


def saved_at(out):
    "Time of the saved state, 0 without one."
    path = out / "last.safetensors"
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    "A run of three epochs that nobody stopped."
    out = tmp_path_factory.mktemp("whole") / "run"
    processes.run(train_here, root, out, {})
    return content(out)


def die_at(root, out, where, settings, when):
    "A run that ends, without any warning, before or after its `where`-th file gets its name."
    rename, seen = Path.replace, []

    def dying(self, target):
        seen.append(target)
        if when == "after":
            rename(self, target)
        if len(seen) == where:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "before":
            rename(self, target)
    Path.replace = dying
    train_here(root, out, settings)


def interrupted(root, out, where, settings=None, when="before"):
    "Whether it was killed before its end; files are config 1, corpus 2, best 3, last 4, best (if better), last, …"
    process, = processes.start(die_at, root, out, where, settings or {}, when)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.fixture(scope="module")
def killed_once(root, tmp_path_factory):
    "A run that was killed in its second epoch, when the state of the first was saved."
    out = tmp_path_factory.mktemp("killed") / "run"
    assert interrupted(root, out, 4, when="after") and place(out) == 1
    return out


@pytest.fixture
def stopped(killed_once, tmp_path):
    "A copy of it."
    return Path(shutil.copytree(killed_once, tmp_path / "run"))


# ---------------------------------------------------------------- killed

@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_every_write(root, whole, tmp_path, when):
    places, where = [], 1
    while interrupted(root, tmp_path / str(where) / "run", where, when=when):
        out = tmp_path / str(where) / "run"
        places.append(place(out))
        processes.run(train_here, root, out, {})
        assert content(out) == whole, f"killed {when} rename {where}"
        assert not list(out.glob("*.part"))
        where += 1
    assert len(places) >= 6 and places == sorted(places) and set(places) == {0, 1, 2, 3}


def test_kills_at_random_moments(root, tmp_path):
    "What a kill at a rename does not meet: within steps, evaluation and writing, several times in one run."
    settings = dict(epochs=12, patience=12)
    processes.run(train_here, root, tmp_path / "whole" / "run", settings)
    out, rng, places = tmp_path / "killed" / "run", random.Random(0), []
    while len(places) < 6:
        before = saved_at(out)
        process, = processes.start(train_here, root, out, settings)
        while process.is_alive() and saved_at(out) == before:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed: give it more epochs"
        places.append(place(out))
    assert not (out / "metrics.json").exists() and places == sorted(places) and places[0] > 0
    processes.run(train_here, root, out, settings)
    assert content(out) == content(tmp_path / "whole" / "run")


@pytest.mark.parametrize("damage", [b'{"epoch": 1, "loss": 3}\n', b'{"epoch": 1}\n{"epoch": 2, "lo'])
def test_a_history_that_is_ahead_of_the_state(root, whole, stopped, damage):
    with (stopped / "history.jsonl").open("ab") as file:
        file.write(damage)
    (stopped / "last.safetensors.part").write_bytes((stopped / "last.safetensors").read_bytes()[:9000]) # never loaded
    processes.run(train_here, root, stopped, {})
    assert content(stopped) == whole and not list(stopped.glob("*.part"))


def test_ctrl_c_leaves_a_run_that_goes_on(root, whole, tmp_path):
    out = tmp_path / "run"
    assert interrupted(root, out, 1, when="after") # config.json, with all settings
    process, = processes.start(command_here, ["--root", str(root), "--out", str(out), "--resume"])
    while process.is_alive() and not saved_at(out):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and 0 < place(out) <= 3
    assert not (out / "metrics.json").exists() and not list(out.glob("*.part"))
    processes.run(train_here, root, out, {})
    assert content(out) == whole


def test_nothing_there_starts_and_a_finished_run_only_returns(root, whole, tmp_path):
    out = tmp_path / "run"
    train_here(root, out, {})
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train(small_config(), tmp_path / "no corpus here", out, quiet=True, resume=True) == rows
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    (out / "metrics.json").unlink() # killed before the last file
    train_here(root, out, {})
    assert content(out) == whole
    for name in "last.safetensors", "metrics.json":
        (out / name).unlink()
    train_here(root, out, {}) # its config alone: from the beginning
    assert content(out) == whole


def test_early_stop_and_best_score_go_on(root, tmp_path):
    settings = dict(epochs=8, patience=2, lr=1e-12) # the first epoch stays the best
    processes.run(train_here, root, tmp_path / "whole" / "run", settings)
    out = tmp_path / "killed" / "run"
    assert interrupted(root, out, 5, settings, "after") and place(out) == 2
    processes.run(train_here, root, out, settings)
    assert len(history_of(out)) == 3 and content(out) == content(tmp_path / "whole" / "run")


def test_a_state_of_an_earlier_version(root, whole, stopped, capsys):
    "Names of before, and keys that are no longer read; a state that was saved within an epoch is refused."
    with safe_open(stopped / "last.safetensors", framework="pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    tensors = {name.replace("cbva_projection.", "project."): t for name, t in tensors.items()}
    assert "exp_avg.project.bias" in tensors
    del meta["losses"], meta["crc32"]
    earlier = {**json.loads(meta["progress"]), "skipped": [], "names": ["tcpl"]}
    for step in 2, 0:
        meta["progress"] = json.dumps({**earlier, "step": step})
        save_file(tensors, stopped / "last.safetensors", meta)
        if step:
            resume_fails(stopped, root, capsys, "saved within epoch 1 by an earlier version", "delete it")
    processes.run(train_here, root, stopped, {})
    assert content(stopped) == whole


# ---------------------------------------------------------------- what is refused

def resume_fails(out, root, capsys, *words, flags=()):
    "prvr_train --resume ends with one sentence and leaves everything as it was."
    before = {p: p.read_bytes() for p in out.glob("*.*") if p.is_file()}
    assert train_command(["--root", str(root), "--out", str(out), "--resume", *flags]) == 1
    message = capsys.readouterr().err
    assert message.startswith("prvr_train: ") and len(message.splitlines()) <= 2 and "Traceback" not in message, message
    assert all(word in message for word in words), message
    assert before == {p: p.read_bytes() for p in out.glob("*.*") if p.is_file()}


DAMAGE = {"empty": lambda data: b"", "half": lambda data: data[:len(data) // 2], "zeros": lambda data: bytes(len(data)),
          "garbage": lambda data: bytes(range(256)) * 9, "a bit": lambda data: data[:-1] + bytes([data[-1] ^ 1])}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused(stopped, root, capsys, damage):
    path = stopped / "last.safetensors"
    before = path.read_bytes()
    path.write_bytes(DAMAGE[damage](before))
    assert path.read_bytes() != before
    resume_fails(stopped, root, capsys, "last.safetensors", "delete it to train this run from its beginning")


def test_a_state_that_is_whole_and_wrong(stopped, root, capsys):
    path = stopped / "last.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    del meta["crc32"] # as if it had been written so
    moments = {name: None for name in tensors if name.startswith("exp_avg")}
    for changed, words in ((dict.fromkeys(["exp_avg.token"], torch.ones(3)), "the moments of token have another shape"),
                           (moments, "it lacks 'exp_avg.token'"), ({"model.token": None}, "token")):
        save_file({name: t for name, t in {**tensors, **changed}.items() if t is not None}, path, meta)
        resume_fails(stopped, root, capsys, words, "delete it to train this run from its beginning")
    place = json.loads(meta["progress"])
    wrong = {"epoch": -1}, {"epoch": 9}, {"epoch": "1"}, {"best": None}, {"best_epoch": 1}
    for text in "{}", "[3]", "[" * 100_000, *(json.dumps(place | change) for change in wrong):
        save_file(tensors, path, {**meta, "progress": text})
        resume_fails(stopped, root, capsys, "does not fit", "delete it to train this run from its beginning")
    shutil.copy(stopped / "best.safetensors", path)
    resume_fails(stopped, root, capsys, "last.safetensors is no saved state of a run")


def test_other_settings_are_refused(stopped, root, capsys):
    for flags, words in ((["--lr", "0.5"], "lr 0.002"), (["--epochs", "9"], "epochs 3"),
                         (["--no-tcpl", "--batch", "3"], "batch_size 6, tcpl True")):
        resume_fails(stopped, root, capsys, "other settings", words, flags=flags)
    (stopped / "config.json").unlink() # the state remembers
    resume_fails(stopped, root, capsys, "last.safetensors was started with other settings", "hidden_size 16")


def test_a_corpus_that_changed_or_vanished(stopped, tmp_path, capsys):
    for n_train, seed in (21, 0), (20, 1):
        write_toy(tmp_path / "other", n_train=n_train, n_val=12, seed=seed)
        resume_fails(stopped, tmp_path / "other", capsys, "other captions or features", "restore the corpus")
    write_toy(tmp_path / "other", n_train=20, n_val=12)
    copy = tmp_path / "other" / "toy"
    for path in sorted(copy.rglob("*val.caption.txt")): # the same corpus with another validation split
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    resume_fails(stopped, tmp_path / "other", capsys, "other captions or features (val) than", "restore the corpus")
    for path in corpus_paths(tmp_path / "other", "toy", "train")[:2]:
        path.rename(path.with_suffix(".away"))
        resume_fails(stopped, tmp_path / "other", capsys, path.name, "does not exist")
        path.with_suffix(".away").rename(path)


def test_a_history_that_is_not_the_runs(stopped, root, capsys):
    for text in "", "nonsense\n", '{"epoch": 3}\n', "[1]\n":
        (stopped / "history.jsonl").write_text(text)
        resume_fails(stopped, root, capsys, "history.jsonl does not hold the 1 epochs", "restore it")


def test_metrics_that_are_none(stopped, root, capsys):
    for text in "{", "[1]", '{"rows": 3}':
        (stopped / "metrics.json").write_text(text)
        resume_fails(stopped, root, capsys, "metrics.json", "delete it, and --resume writes it again")


def test_trim_and_read_history(tmp_path):
    trim_history(tmp_path, 0)
    path = tmp_path / "history.jsonl"
    assert not path.exists()
    lines = [b'{"epoch": 0}\n', b'{"epoch": 1}\n', b'{"ep']
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="is damaged"):
        read_history(tmp_path)
    for epochs in 2, 1, 0:
        trim_history(tmp_path, epochs)
        assert path.read_bytes() == b"".join(lines[:epochs]) and len(read_history(tmp_path)) == epochs


def test_a_run_that_another_process_holds(stopped, root, tmp_path, capsys):
    with only_process(stopped):
        resume_fails(stopped, root, capsys, "is being trained by another process")
    new = tmp_path / "new"
    with only_process(new): # it has only just begun
        with pytest.raises(UserError, match="another process"):
            train(small_config(), root, new, quiet=True)
        assert not (new / "config.json").exists() # the other process will write its own


# ---------------------------------------------------------------- a full disk

def limited(flags, size, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    command_here(flags)


def test_a_full_disk(stopped, root, whole, tmp_path):
    before = (stopped / "last.safetensors").read_bytes()
    flags = ["--root", str(root), "--out", str(stopped), "--resume"]
    process, = processes.start(limited, flags, len(before) - 1000, tmp_path / "log")
    process.join()
    message = (tmp_path / "log").read_text()
    assert process.exitcode == 1 and message.startswith("prvr_train: ") and len(message.splitlines()) == 1, message
    assert "last.safetensors cannot be used (File too large)" in message
    assert "make room and run the command again with --resume" in message
    assert (stopped / "last.safetensors").read_bytes() == before and not list(stopped.glob("*.part"))
    processes.run(train_here, root, stopped, {})
    assert content(stopped) == whole
