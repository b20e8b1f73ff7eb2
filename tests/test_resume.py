"""A run that was stopped goes on as if nothing had happened: killed processes, damaged and missing files, full disks, losses that are not finite."""
import fcntl
import functools
import json
import math
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import test_golden
import torch

import prvr_nb.training.loop
from prvr_nb.cli import train_command
from prvr_nb.config import published_config
from prvr_nb.files import UserError
from prvr_nb.data.corpus import corpus_paths
from prvr_nb.training.distributed import DataOrder
from prvr_nb.method.model import PRVRModel
from prvr_nb.training.checkpoints import load_checkpoint, to_released
from prvr_nb.data.prepared import prepare
from prvr_nb.training.resume import TrainState, read_state
from prvr_nb.training.runs import only_process, trim_history
from prvr_nb.data.toy import write_toy
from prvr_nb.method.model import compute_losses
from prvr_nb.training.loop import Checkpointer, Run, build_run, compile_encoders, step_losses, train, update
from prvr_nb.training.optimizer import BertAdam

TINY = dict(hidden_size=16, heads=2, epochs=3, batch_size=6, merge_schedule=(16, 12, 8), segment_levels=(8, 5), lr=2e-3, seed=3, hard_negative_start_epoch=1)
FILES = "history.jsonl", "metrics.json", "best.safetensors", "last.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Child processes use one thread; the sums of several differ in their last bits."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**overrides):
    return published_config("toy", **{**TINY, **overrides})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_toy(folder, n_train=20, n_val=12)  # steps of 6, 6, 6 and 2 videos
    prepare(folder, config(), quiet=True)
    return folder


def train_here(root, out, settings, seconds=0., resume=True):
    train(config(**settings), root, out, quiet=True, resume=resume, checkpoint_seconds=seconds)


def interrupt_after(n, monkeypatch):
    "Ctrl-C right after the n-th save of a state."
    saves, save = [], prvr_nb.training.loop.save_state

    def stop(*arguments):
        save(*arguments)
        saves.append(1)
        if len(saves) == n:
            raise KeyboardInterrupt
    monkeypatch.setattr(prvr_nb.training.loop, "save_state", stop)


def content(out):
    return {name: (out / name).read_bytes() for name in FILES}


def history_of(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def place(out):
    "Where the saved state stands, in steps; −1 without one. Raises when the file is damaged."
    if not (out / "last.safetensors").exists():
        return -1
    progress = json.loads(read_state(out / "last.safetensors")[1]["progress"])
    return 4 * progress["epoch"] + progress["step"]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    "Files of a run of three epochs that nobody stopped."
    out = tmp_path_factory.mktemp("whole") / "run"
    processes.run(train_here, root, out, {}, 1e9)
    return content(out)


def interrupted(root, out, where, settings=None, when="before"):
    "A run in a child that ends, without any warning, before or after its `where`-th file gets its name."
    started = processes.start(die_at, root, out, where, settings or {}, when)[0]
    started.join(60)
    assert started.exitcode in (0, -signal.SIGKILL)
    return started.exitcode != 0


def die_at(root, out, where, settings, when):
    rename, seen = Path.replace, []

    def dying(self, target):
        seen.append(target)
        if when == "after":
            rename(self, target)
        if len(seen) == where:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "before":
            return rename(self, target)
    Path.replace = dying
    train_here(root, out, settings)


# ---------------------------------------------------------------- killed

def wait_for_save(out, process, before):
    "Wait until the process has saved a state."
    path = out / "last.safetensors"
    while process.is_alive() and (path.stat().st_mtime_ns if path.exists() else 0) == before:
        time.sleep(0.001)


def test_ten_kills_at_random_moments(root, tmp_path):
    settings = dict(epochs=12, patience=12)
    processes.run(train_here, root, tmp_path / "whole" / "run", settings, 1e9)
    out, rng, places, halves = tmp_path / "killed" / "run", random.Random(0), [], 0
    while len(places) < 10:
        path = out / "last.safetensors"
        before = path.stat().st_mtime_ns if path.exists() else 0
        process, = processes.start(train_here, root, out, settings)
        if rng.random() < 0.8:  # else it may die while it starts
            wait_for_save(out, process, before)
        time.sleep(rng.random() * 0.25)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed: give it more epochs"
        places.append(place(out))
        halves += bool(list(out.glob("*.part")))
    assert not (out / "metrics.json").exists() and places == sorted(places)
    assert len({p for p in places if 0 < p < 4 * settings["epochs"]}) >= 4, places
    assert any(p % 4 for p in places), f"no kill within an epoch: {places}"
    processes.run(train_here, root, out, settings)
    assert content(out) == content(tmp_path / "whole" / "run")
    assert 0 < json.loads((out / "metrics.json").read_text())["best_epoch"]
    print(f"killed at steps {places}, {halves} times while a file was being written")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_every_write(root, whole, tmp_path, when):
    "With a kill at each rename in turn, every second life of the run ends there and every other one goes on to its end."
    places, where = [], 1
    while interrupted(root, tmp_path / str(where) / "run", where, when=when):
        out = tmp_path / str(where) / "run"
        places.append(place(out))
        processes.run(train_here, root, out, {}, 1e9)
        assert content(out) == whole, f"killed {when} rename {where}"
        assert not list(out.glob("*.part"))
        where += 3  # files are config, last, last, …: all kinds are met
    assert len(places) > 4 and max(places) >= 8 and min(places) == -1


@pytest.mark.parametrize("damage", ["a line too many", "half a line", "both"])
def test_a_history_that_is_ahead_of_the_state(root, whole, tmp_path, damage):
    out = tmp_path / "run"
    assert interrupted(root, out, 10)
    assert place(out) == 6 and len(history_of(out)) == 1
    with (out / "history.jsonl").open("ab") as file:
        file.write({"a line too many": b'{"epoch": 1, "loss": 3}\n', "half a line": b'{"epoch": 1, "lo', "both": b'{"epoch": 1}\n{"epoch": 2, "lo'}[damage])
    processes.run(train_here, root, out, {}, 1e9)
    assert content(out) == whole


def test_trim_history(tmp_path):
    path = tmp_path / "history.jsonl"
    trim_history(path, 3)
    assert not path.exists()
    path.write_bytes(b"a\nb\nc")
    for epochs, left in (3, b"a\nb\nc"), (2, b"a\nb\n"), (0, b""):
        trim_history(path, epochs)
        assert path.read_bytes() == left


def test_ctrl_c_leaves_a_run_that_goes_on(root, whole, tmp_path):
    out = tmp_path / "run"
    flags = ["--root", str(root), "--out", str(out), "--resume", "--checkpoint-seconds", "0", *flags_of(config())]
    process, = processes.start(command_here, flags)
    wait_for_save(out, process, 0)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert place(out) >= 1 and not (out / "metrics.json").exists() and not list(out.glob("*.part"))
    processes.run(train_here, root, out, {})
    assert content(out) == whole


def flags_of(config):
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [f"--{name.replace('_', '-')}={text(getattr(config, name))}" for name in TINY]


def command_here(flags):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    raise SystemExit(train_command(flags))


def test_nothing_there_starts_and_a_finished_run_only_returns(root, whole, tmp_path):
    out = tmp_path / "run"
    train_here(root, out, {})
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train(config(), tmp_path / "no corpus here", out, quiet=True, resume=True) == rows
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    (out / "metrics.json").unlink()  # killed before the last file
    train_here(root, out, {})
    assert content(out) == whole
    (out / "last.safetensors").unlink()
    (out / "metrics.json").unlink()
    train_here(root, out, {})  # its config alone: from the beginning
    assert content(out) == whole


def test_early_stop_and_best_score_go_on(root, tmp_path):
    settings = dict(epochs=8, patience=2, lr=1e-12)  # the first epoch stays the best
    processes.run(train_here, root, tmp_path / "whole" / "run", settings, 1e9)
    assert len(history_of(tmp_path / "whole" / "run")) == 3
    out = tmp_path / "killed" / "run"
    for lines in 1, 2:
        assert interrupted(root, out, 8, settings)  # the first file of the next epoch
        assert len(history_of(out)) == lines and place(out) == 4 * lines
    processes.run(train_here, root, out, settings)
    assert content(out) == content(tmp_path / "whole" / "run")


# ---------------------------------------------------------------- what is refused

@pytest.fixture
def stopped(root, tmp_path):
    "A run that was killed in its second epoch."
    out = tmp_path / "run"
    assert interrupted(root, out, 10)
    return out


def resume_fails(out, root, capsys, *words, flags=()):
    "prvr_train --resume ends with one sentence and leaves everything as it was."
    before = {p: p.read_bytes() for p in out.glob("*.*") if p.is_file()}
    assert train_command(["--root", str(root), "--out", str(out), "--resume", *flags]) == 1
    message = capsys.readouterr().err
    assert message.startswith("prvr_train: ") and len(message.splitlines()) <= 2 and "Traceback" not in message, message
    assert all(word in message for word in words), message
    assert before == {p: p.read_bytes() for p in out.glob("*.*") if p.is_file()}


@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "garbage", "another model's", "best"])
def test_a_damaged_state_is_refused(stopped, root, capsys, damage):
    path = stopped / "last.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "half": whole[:len(whole) // 2], "zeros": bytes(len(whole)), "garbage": bytes(range(256)) * 9,
                      "another model's": whole.replace(b"model.token", b"model.tuken"), "best": (stopped / "best.safetensors").read_bytes()}[damage])
    resume_fails(stopped, root, capsys, "last.safetensors", "delete it to train this run from its beginning")


def test_half_a_file_aside_is_never_loaded(stopped, root, whole):
    part = stopped / "last.safetensors.part"
    part.write_bytes((stopped / "last.safetensors").read_bytes()[:9000])
    processes.run(train_here, root, stopped, {})
    assert content(stopped) == whole and not part.exists()


def test_other_settings_are_refused(stopped, root, capsys):
    for flags, words in (["--lr", "0.5"], "lr 0.002"), (["--epochs", "9"], "epochs 3"), (["--no-tcpl", "--batch", "3"], "batch_size 6, tcpl True"):
        resume_fails(stopped, root, capsys, "other settings", words, flags=flags)
    (stopped / "config.json").unlink()  # the state remembers
    resume_fails(stopped, root, capsys, "last.safetensors was started with other settings", "epochs 3", "hidden 16")


def test_a_file_that_vanished(stopped, tmp_path, capsys):
    write_toy(tmp_path / "corpora", n_train=20, n_val=12)
    for path in corpus_paths(tmp_path / "corpora", "toy", "train")[:2]:
        held = path.read_bytes()
        path.unlink()
        resume_fails(stopped, tmp_path / "corpora", capsys, path.name, "does not exist")
        path.write_bytes(held)


def test_a_corpus_that_changed(stopped, root, tmp_path, capsys):
    for n_train, seed in (21, 0), (20, 1):
        write_toy(tmp_path / "other", n_train=n_train, n_val=12, seed=seed)
        resume_fails(stopped, tmp_path / "other", capsys, "other captions or features", "restore the corpus")


def test_a_run_that_another_process_holds(stopped, root, tmp_path, capsys):
    with only_process(stopped):
        resume_fails(stopped, root, capsys, "is being trained by another process")
    new = tmp_path / "new"
    with only_process(new):  # it has only just begun
        with pytest.raises(UserError, match="another process"):
            train(config(), root, new, quiet=True)
        assert not (new / "config.json").exists()  # the other process will write its own
    processes.run(train_here, root, stopped, {})


def test_a_killed_process_lets_go(root, tmp_path):
    process, = processes.start(hold, tmp_path / "run")
    while not (tmp_path / "held").exists():
        time.sleep(0.001)
    with pytest.raises(UserError, match="another process"), only_process(tmp_path / "run"):
        pass
    process.kill()
    process.join()
    with only_process(tmp_path / "run"):
        pass


def hold(out):
    with only_process(out):
        (out.parent / "held").write_text("")
        time.sleep(60)


def test_a_file_system_without_locks(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_process(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


# ---------------------------------------------------------------- a full disk

def limited(flags, size, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    command_here(flags)


def test_a_full_disk(stopped, root, whole, tmp_path):
    before, size = (stopped / "last.safetensors").read_bytes(), (stopped / "last.safetensors").stat().st_size
    process, = processes.start(limited, ["--root", str(root), "--out", str(stopped), "--resume", "--checkpoint-seconds", "0"], size - 1000, tmp_path / "log")
    process.join(60)
    message = (tmp_path / "log").read_text()
    assert process.exitcode == 1 and message.startswith("prvr_train: ") and len(message.splitlines()) == 1, message
    assert "last.safetensors cannot be used (File too large); make room and run the command again with --resume" in message
    assert (stopped / "last.safetensors").read_bytes() == before and place(stopped) == 6 and not list(stopped.glob("*.part"))
    processes.run(train_here, root, stopped, {})
    assert content(stopped) == whole


# ---------------------------------------------------------------- numbers that are not finite

def spoil(steps, how):
    "compute_losses whose TCPL term, or its gradient, is not finite in some calls."
    losses_of, calls = compute_losses, []

    def spoiled(model, e, batch, config, epoch):
        losses = losses_of(model, e, batch, config, epoch)
        calls.append(epoch)
        if len(calls) - 1 in steps:
            losses["tcpl"] = losses["tcpl"] * math.inf if how == "loss" else losses["tcpl"] + (e.queries.sum() * 0).sqrt()
        return losses
    return spoiled


@pytest.mark.parametrize("how, term", [("loss", "tcpl, gradient"), ("gradient", "gradient")])
@pytest.mark.parametrize("seconds", [0., 1e9])
def test_a_number_that_is_not_finite_stops(root, tmp_path, monkeypatch, how, term, seconds):
    monkeypatch.setattr(prvr_nb.training.loop, "compute_losses", spoil({6}, how))
    with pytest.raises(UserError) as caught:
        train_here(root, tmp_path / "run", {}, seconds)
    corpus, = prepare(root, config(), ("train",), quiet=True)
    videos = [corpus.split.videos[v] for v in DataOrder(20, 6, TINY["seed"]).epoch(1)[2][0]]
    assert str(caught.value).startswith(f"epoch 1, step 2: {term} not finite; ") and str(caught.value).endswith(f"the batch's videos: {', '.join(videos)}")
    assert "--lr" in str(caught.value) and "--nonfinite skip" in str(caught.value)
    assert place(tmp_path / "run") == (6 if seconds == 0 else 4)  # the state before the damage
    assert all(t.isfinite().all() for t in read_state(tmp_path / "run" / "last.safetensors")[0].values())
    monkeypatch.setattr(prvr_nb.training.loop, "compute_losses", spoil({2 if seconds else 0}, how))
    train_here(root, tmp_path / "run", dict(nonfinite="skip"))  # as the message says
    assert [line.get("skipped_steps") for line in history_of(tmp_path / "run")] == [None, [2], None]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_steps_are_left_out(root, tmp_path, monkeypatch, how):
    monkeypatch.setattr(prvr_nb.training.loop, "compute_losses", spoil({0, 3, 6}, how))
    train_here(root, tmp_path / "run", dict(nonfinite="skip"))
    history = history_of(tmp_path / "run")
    assert [line.get("skipped_steps") for line in history] == [[0, 3], [2], None]
    assert all(math.isfinite(x) for line in history for x in line["losses"].values())
    assert all(p.isfinite().all() for p in load_checkpoint(tmp_path / "run" / "best.safetensors").parameters())
    assert all(t.isfinite().all() for t in read_state(tmp_path / "run" / "last.safetensors")[0].values())


def test_a_broken_state_is_never_saved(root, tmp_path):
    "As on a GPU, where nobody has looked at the numbers before the save is due."
    train_set, = prepare(root, config(), ("train",), quiet=True)
    run, progress = build_run(config(), train_set, tmp_path)
    keeper = Checkpointer(run, progress, tmp_path / "last.safetensors", 0.)
    for number, value in enumerate((1., math.nan, 1.)):
        progress.add({"clip_nce": torch.tensor(1.), "gradient": torch.tensor(value)})
        progress.step += 1
        if number == 0:
            keeper.save_if_due()
            assert place(tmp_path) == 1
        else:
            with pytest.raises(UserError, match="epoch 0, step 1: gradient not finite"):
                keeper.save_if_due()
    assert place(tmp_path) == 1


def test_skipping_changes_nothing_when_all_is_finite(root, whole, tmp_path):
    train_here(root, tmp_path / "run", dict(nonfinite="skip"))
    assert {n: content(tmp_path / "run")[n] for n in FILES[:2]} == {n: whole[n] for n in FILES[:2]}


def test_skipped_steps_survive_a_kill(root, tmp_path, monkeypatch):
    monkeypatch.setattr(prvr_nb.training.loop, "compute_losses", spoil({1}, "loss"))
    interrupt_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_here(root, tmp_path / "run", dict(nonfinite="skip"))
    monkeypatch.undo()
    train_here(root, tmp_path / "run", dict(nonfinite="skip"))
    assert [line.get("skipped_steps") for line in history_of(tmp_path / "run")] == [[1], None, None]


def test_nothing_but_broken_steps(root, tmp_path, monkeypatch):
    monkeypatch.setattr(prvr_nb.training.loop, "compute_losses", spoil(range(100), "loss"))
    with pytest.raises(UserError, match="epoch 0: no step had finite losses"):
        train_here(root, tmp_path / "run", dict(nonfinite="skip"))


# ---------------------------------------------------------------- other arithmetic, the same training

@pytest.fixture(scope="module")
def held():
    return {name: torch.from_numpy(array) for name, array in np.load(Path(__file__).with_name("golden") / "losses.npz").items()}


def golden_step(held, bf16=False, compiled=False):
    "Largest difference of a loss from the released code's, relative; the same of the whole gradient's direction and length."
    def load(name):
        with np.load(Path(__file__).with_name("golden") / f"{name}.npz") as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}
    _, _, settings, model, batch = test_golden.batch_and_model(load)
    if compiled:
        compile_encoders(model, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        e = model(batch)
    losses = compute_losses(model, type(e)(*(x.float() for x in e)), batch, settings, 0)
    sum(losses.values()).backward()
    gradients = to_released({name: p.grad for name, p in model.named_parameters()})
    pairs = [(gradients[key.removeprefix("grad/")], value) for key, value in held.items() if key.startswith("grad/")]
    ours, theirs = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs))
    off = max(abs(losses[name].item() / held[theirs].item() - 1) for theirs, name in test_golden.TERMS.items())
    return off, ((ours - theirs).norm() / theirs.norm()).item()


def test_golden_values_in_bf16(held):
    loss, gradient = golden_step(held, bf16=True)
    assert 1e-5 < loss < 0.01 and 1e-3 < gradient < 0.15  # bfloat16 has 8 bits: 0.4 % per rounding


@pytest.fixture
def eager_backend(monkeypatch):
    "torch.compile as far as it can go without a C++ compiler: traced and differentiated as a graph, executed by PyTorch."
    monkeypatch.setattr(prvr_nb.training.loop.shutil, "which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()


def test_golden_values_in_traced_encoders(held, eager_backend):
    loss, gradient = golden_step(held, compiled=True)
    assert loss < 1e-5 and gradient < 1e-5


SLOW = pytest.mark.skipif(not os.environ.get("PRVR_SLOW"), reason="compiles C++ for one to three minutes; set PRVR_SLOW=1")
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@SLOW
@COMPILER
@pytest.mark.parametrize("bf16, loss_limit, gradient_limit", [(False, 1e-5, 1e-5), (True, 0.01, 0.2)])
def test_golden_values_in_compiled_encoders(held, bf16, loss_limit, gradient_limit):
    torch._dynamo.reset()
    loss, gradient = golden_step(held, bf16, compiled=True)
    assert loss < loss_limit and gradient < gradient_limit


def last_losses(out):
    return history_of(out)[-1]["losses"]


def test_runs_in_other_arithmetic_agree(root, tmp_path, eager_backend):
    for name, settings in {"plain": {}, "compile": dict(compile=True), "bf16": dict(precision="bf16")}.items():
        train_here(root, tmp_path / name, dict(epochs=1, lr=2e-4, dropout=0., **settings), 1e9)
    plain = last_losses(tmp_path / "plain")
    assert last_losses(tmp_path / "compile") == pytest.approx(plain, rel=1e-4)
    assert last_losses(tmp_path / "bf16") == pytest.approx(plain, rel=0.03) != pytest.approx(plain, rel=1e-5)


def test_a_bf16_run_goes_on(root, tmp_path, monkeypatch):
    settings = dict(epochs=2, precision="bf16")
    train_here(root, tmp_path / "whole" / "run", settings, 1e9)
    interrupt_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_here(root, tmp_path / "run", settings)
    monkeypatch.undo()
    train_here(root, tmp_path / "run", settings, 1e9)
    assert content(tmp_path / "run") == content(tmp_path / "whole" / "run")


def test_compile_without_a_compiler(root, tmp_path, monkeypatch):
    monkeypatch.setattr(prvr_nb.training.loop.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="compile: no C.. compiler was found for cpu; install it or leave --compile out"):
        train_here(root, tmp_path / "run", dict(compile=True))


# ---------------------------------------------------------------- no waiting for the device

class OnlyClips(BertAdam):
    "Everything of a step but the fused kernel, which there is for real devices only."
    def __init__(self, groups): torch.optim.Optimizer.__init__(self, groups, dict(lr=0.1)); self.max_norm = 1.


def step_without_numbers(root, monkeypatch, losses_of=compute_losses, nonfinite="stop"):
    "One training step with everything that a GPU would hold on the device 'meta', which has shapes and no numbers: asking for one is an error."
    settings = config(hard_negative_start_epoch=0, dropout=0.2, nonfinite=nonfinite)
    corpus, = prepare(root, settings, ("train",), quiet=True)
    meta = torch.device("meta")
    there = corpus._replace(videos=type(corpus.videos)(*(x.to(meta) for x in corpus.videos)), queries=corpus.queries._replace(tokens=corpus.queries.tokens.to(meta)))
    model = PRVRModel(settings, 64, 64).to(meta).train()
    optimizer = OnlyClips(prvr_nb.training.optimizer.parameter_groups(model))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    monkeypatch.setattr(prvr_nb.training.loop, "compute_losses", losses_of)
    accelerator = SimpleNamespace(device=meta, process_index=0, backward=lambda loss: loss.backward(), unwrap_model=lambda m: m)
    run, progress = Run(model, optimizer, None, accelerator, there, DataOrder(20, 6, 0), settings), TrainState()
    steps = run.order.epoch(0)[:1]
    for shares, batch in zip(steps, prvr_nb.training.loop.load_batches(run, steps)):
        progress.add(update(run, step_losses(run, batch, shares, progress)))
    return progress.values


def test_a_step_waits_for_nothing(root, monkeypatch):
    value, = step_without_numbers(root, monkeypatch)
    assert value.device.type == "meta" and value.shape == (7,)


WAITS = {"item": lambda x: x.sum().item(), "if": lambda x: 1 if x.sum() > 0 else 2, "boolean index": lambda x: x[x > 0].sum(), "nonzero": lambda x: x.nonzero().sum(),
         "tolist": lambda x: x.tolist(), "cpu": lambda x: x.cpu(), "repeats": lambda x: x.repeat_interleave(x.long().flatten()), "unique": lambda x: x.unique()}


@pytest.mark.parametrize("name", WAITS)
def test_waiting_would_be_noticed(root, monkeypatch, name):
    def waiting(model, e, batch, config, epoch):
        WAITS[name](e.queries)
        return compute_losses(model, e, batch, config, epoch)
    with pytest.raises((RuntimeError, NotImplementedError)):
        step_without_numbers(root, monkeypatch, waiting)


def test_skipping_waits(root, monkeypatch):
    with pytest.raises((RuntimeError, NotImplementedError)):
        step_without_numbers(root, monkeypatch, nonfinite="skip")
