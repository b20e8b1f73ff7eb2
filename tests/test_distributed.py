"""Several processes give the loss and the gradients of one, whatever shares they get; real gloo processes on the CPU."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from torch.testing import assert_close

import prvr_nb.training.loop
from prvr_nb.config import published_config
from prvr_nb.files import UserError
from prvr_nb.training.distributed import DataOrder, step_seed
from prvr_nb.data.prepared import prepare
from prvr_nb.training.resume import read_state
from prvr_nb.data.toy import write_toy
from prvr_nb.training.loop import build_run, load_batches, step_losses, train, update

N_TRAIN, BATCH = 17, 7  # batches of 7, 7 and 3 videos: shares of 4 + 3 and 2 + 1, or of 3 + 2 + 2 and 1 + 1 + 1
TINY = dict(hidden_size=16, heads=2, epochs=3, patience=1, batch_size=BATCH, merge_schedule=(16, 12, 8), segment_levels=(8, 5), dropout=0., lr=1e-3, seed=3)
CASES = {
    "random negatives": {},
    "hard negatives": dict(hard_negative_start_epoch=0, hard_pool_size=3),
    "baseline": dict(tcpl=False, cbva=False),
    "paper": dict(variant="paper", merge_schedule=(16, 12, 8), segment_levels=(8, 5), hard_negative_start_epoch=0),
    "skip": dict(nonfinite="skip"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_toy(folder, n_train=N_TRAIN, n_val=10)
    prepare(folder, published_config("toy", **TINY), quiet=True)
    return folder


def epochs_of_steps(root, out):
    "Losses and gradients of all steps of an epoch, for each case; the main process stores them."
    for name, case in CASES.items():
        config = published_config("toy", **{**TINY, **case})
        train_set, = prepare(root, config, ("train",), quiet=True)
        run, progress = build_run(config, train_set, out)
        run.model.train()
        steps, found = run.order.epoch(0), []
        for shares, batch in zip(steps, load_batches(run, steps)):
            losses = step_losses(run, batch, shares, progress)
            assert len(shares) == int(os.environ.get("WORLD_SIZE", 1)) and len(batch.frames) == len(shares[run.accelerator.process_index])
            updated = update(run, losses)  # clips the gradients, so that what one process would do can be seen in them
            gradients = {n: p.grad.clone() for n, p in run.accelerator.unwrap_model(run.model).named_parameters() if p.grad is not None}
            found.append(({n: x.item() for n, x in updated.items()}, gradients))
            run.schedule.step()
            progress.step += 1
        weights = run.accelerator.unwrap_model(run.model).state_dict()
        if run.accelerator.is_main_process:
            torch.save((found, weights), out / f"{name}.pt")
        run.accelerator.wait_for_everyone()


@pytest.fixture(scope="module")
def found(root, tmp_path_factory):
    "World size → case → steps and final weights."
    result = {}
    for world in 1, 2, 3:
        out = tmp_path_factory.mktemp(f"world{world}")
        processes.run(epochs_of_steps, root, out, world=world)
        result[world] = {name: torch.load(out / f"{name}.pt") for name in CASES}
    return result


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_n_processes_are_one(found, name, world):
    (expected, weights), (steps, weights_here) = found[1][name], found[world][name]
    assert len(steps) == len(expected) == 3
    for (losses, gradients), (one_losses, one_gradients) in zip(steps, expected):
        assert losses == pytest.approx(one_losses, rel=2e-5)
        assert gradients.keys() == one_gradients.keys()
        for key, gradient in one_gradients.items():
            assert_close(gradients[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda text: f"{key}: {text}")
    for key, weight in weights.items():
        assert_close(weights_here[key], weight, rtol=1e-3, atol=2e-5, msg=lambda text: f"{key}: {text}")


def test_the_cases_are_what_they_say(found, root):
    corpus, = prepare(root, published_config("toy", **TINY), ("train",), quiet=True)
    queries = [[int(corpus.queries.first.diff()[share].sum()) for share in step] for step in DataOrder(N_TRAIN, BATCH, 3, 2).epoch(0)]
    assert all(a != b for a, b in queries), queries  # ragged
    assert found[1]["random negatives"][0][0][0]["frame_triplet"] != found[1]["hard negatives"][0][0][0]["frame_triplet"]
    assert {"tcpl", "cbva"}.isdisjoint(found[1]["baseline"][0][0][0]) and found[1]["paper"][0][0][0]["tcpl"] != found[1]["hard negatives"][0][0][0]["tcpl"]
    assert any(g.abs().max() > 1e-3 for _, gradients in found[1]["random negatives"][0] for g in gradients.values())


# ---------------------------------------------------------------- whole runs

def train_run(root, out, settings, resume=False):
    rows = train(published_config("toy", **{**TINY, **settings}), root, out, quiet=True, resume=resume)
    assert bool(rows) == (os.environ.get("RANK", "0") == "0")


def train_and_stop(root, out):
    "Two processes that stop in their second epoch, after a save."
    close = prvr_nb.training.loop.close_epoch

    def stop(run, progress, *rest):
        if progress.epoch == 1:
            os._exit(0)
        close(run, progress, *rest)
    prvr_nb.training.loop.close_epoch = stop
    train(published_config("toy", **TINY), root, out, quiet=True, checkpoint_seconds=0)


def history_of(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def same_history(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x["losses"] == pytest.approx(y["losses"], rel=1e-4)
        for key in x.keys() - {"losses"}:
            assert x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-4), key


@pytest.fixture(scope="module")
def one_process(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    processes.run(train_run, root, out, {})
    return out


def test_a_whole_run_has_one_set_of_files(root, one_process, tmp_path):
    processes.run(train_run, root, tmp_path / "run", {}, world=2)
    files = lambda out: sorted(re.sub(r"tfevents.*", "tfevents", str(p.relative_to(out))) for p in out.rglob("*") if p.is_file())
    assert files(tmp_path / "run") == files(one_process)
    same_history(history_of(tmp_path / "run"), history_of(one_process))
    assert len(history_of(one_process)) == 3  # the best epoch is a later one: every process has to know, or it loses patience
    assert (tmp_path / "run" / "config.json").read_text() == (one_process / "config.json").read_text()
    processes.run(train_run, root, tmp_path / "run", {}, True, world=2)  # a finished run: the main process has its rows


def test_a_run_goes_on_with_another_number_of_processes(root, one_process, tmp_path):
    processes.run(train_and_stop, root, tmp_path / "run", world=2)
    progress = json.loads(read_state(tmp_path / "run" / "last.safetensors")[1]["progress"])
    assert (progress["epoch"], progress["step"]) == (1, 3) and not (tmp_path / "run" / "metrics.json").exists()
    processes.run(train_run, root, tmp_path / "run", {}, True, world=3)
    same_history(history_of(tmp_path / "run"), history_of(one_process))


def test_steps_are_left_out_together(root, tmp_path):
    processes.run(train_broken, root, tmp_path / "run", world=2)
    assert [line.get("skipped_steps") for line in history_of(tmp_path / "run")] == [[1], None, None]


def train_broken(root, out):
    "The second step of the first epoch has a loss that is not finite."
    losses_of = prvr_nb.training.loop.compute_losses

    def broken(model, e, batch, config, epoch):
        losses = losses_of(model, e, batch, config, epoch)
        calls.append(epoch)
        return {**losses, "tcpl": losses["tcpl"] * float("nan")} if len(calls) == 2 else losses
    calls, prvr_nb.training.loop.compute_losses = [], broken
    train(published_config("toy", **{**TINY, "nonfinite": "skip", "patience": 9}), root, out, quiet=True)


def test_accelerate_launch(root, tmp_path):
    "The documented command in two processes; a script stands for prvr_train, which is there only when the package is installed."
    script = tmp_path / "prvr_train.py"
    script.write_text("from prvr_nb.cli import train_command\nraise SystemExit(train_command())\n")
    flags = [f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in {**TINY, "epochs": 1}.items()]
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", str(processes.free_port()), script, "--root", root, "--out", tmp_path / "run", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(Path(prvr_nb.training.loop.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(history_of(tmp_path / "run")) == 1 and done.stdout.count("zero-shot teacher") == 1


# ---------------------------------------------------------------- the order of the data

@pytest.mark.parametrize("n_videos, batch", [(17, 7), (14, 7), (5, 8), (3, 3), (100, 1)])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_laws_of_the_order(n_videos, batch, world):
    if min(n_videos % batch or batch, n_videos, batch) < world:
        with pytest.raises(UserError, match=f"batch is {batch}: .* for {world} processes"):
            DataOrder(n_videos, batch, 5, world)
        return
    order, one = DataOrder(n_videos, batch, 5, world), DataOrder(n_videos, batch, 5)
    for epoch in range(3):
        steps = order.epoch(epoch)
        assert len(steps) == len(order) == len(one) and all(len(step) == world and min(map(len, step)) > 0 for step in steps)
        assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in steps)
        assert torch.equal(torch.cat([torch.cat(step) for step in steps]).sort().values, torch.arange(n_videos))
        for step, (whole,) in zip(steps, one.epoch(epoch)):
            assert torch.equal(torch.cat(step), whole)
    if n_videos > 8:
        assert not torch.equal(torch.cat(order.epoch(0)[0]), torch.cat(order.epoch(1)[0]))
        assert not torch.equal(torch.cat(order.epoch(0)[0]), torch.cat(DataOrder(n_videos, batch, 6, world).epoch(0)[0]))


def test_the_order_does_not_touch_other_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = DataOrder(20, 6, 1).epoch(4)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, DataOrder(20, 6, 1).epoch(4)))


def test_seeds_differ():
    keys = [(seed, *rest) for seed in (0, 1, 9527) for rest in [(), (0,), (1,), (0, 0), (1, 0), (0, 1), (0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (100, 63, 8)]]
    seeds = [step_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= s < 2**63 for s in seeds)
    assert len({s % 2**32 for s in seeds}) == len(keys)  # the CPU's generator takes 32 bits
    assert step_seed(3, 1, 2) == step_seed(3, 1, 2)
