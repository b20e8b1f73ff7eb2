"""Several processes have the losses and gradients of one, whatever shares they get; real gloo processes on the CPU."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import SMALL, free_port, history_of, small_config
from torch.testing import assert_close

import prvr_nb.training.loop as loop
from prvr_nb.data.prepared import prepare
from prvr_nb.files import UserError
from prvr_nb.method.model import compute_losses
from prvr_nb.training.distributed import DataOrder, step_seed
from prvr_nb.training.loop import build_run, load_batches, step_losses, train, update


def config(**settings):
    "Steps of 7, 7 and 6 videos: shares of 4 + 3 and 3 + 3, or of 3 + 2 + 2 and 2 + 2 + 2."
    return small_config(**{"batch_size": 7, "dropout": 0., "lr": 1e-3, "hard_negative_start_epoch": 20, **settings})


def every_field(model, e, batch, config, epoch):
    "A loss that reads the inputs of all processes."
    pairs = (e.frames, batch.frames), (e.clips, batch.clips)
    own = {"inputs": sum((x * y.mean(2, keepdim=True)).square().mean() for x, y in pairs),
           "tokens": (e.queries * batch.tokens.sum(1)[:, :16]).square().sum() / batch.mask.sum()}
    return {**compute_losses(model, e, batch, config, epoch), **own}


def broken_step():
    "Losses whose second step is not finite."
    calls = []

    def losses_of(*arguments):
        losses = compute_losses(*arguments)
        calls.append(1)
        return {**losses, "tcpl": losses["tcpl"] * (float("nan") if len(calls) == 2 else 1.)}
    return losses_of


CASES = {
    "random negatives": ({}, compute_losses),
    "hard negatives": (dict(hard_negative_start_epoch=0, hard_pool_size=3), compute_losses),
    "baseline": (dict(tcpl=False, cbva=False), compute_losses),
    "paper": (dict(variant="paper", cbva_similarity="cosine", cbva_normalisation="softmax"), compute_losses),
    "own losses": ({}, every_field),
    "skip": (dict(nonfinite="skip"), None),
}


def epochs_of_steps(root, out):
    "Losses and gradients of all steps of an epoch, for each case; the main process stores them."
    for name, (settings, losses_of) in CASES.items():
        train_set, = prepare(root, config(**settings), ("train",), quiet=True)
        run, state = build_run(config(**settings), train_set, None, losses_of or broken_step())
        model, steps, found = run.accelerator.unwrap_model(run.model), run.order.epoch(0), []
        for shares, batch in zip(steps, load_batches(run, steps), strict=True):
            assert len(shares) == int(os.environ.get("WORLD_SIZE", 1))
            assert len(batch.frames) == len(shares[run.accelerator.process_index])
            losses = update(run, step_losses(run, batch, shares, state)) # clips the gradients
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append(losses and ({n: x.item() for n, x in losses.items()}, gradients))
            run.schedule.step()
            state.step += 1
        if run.accelerator.is_main_process:
            torch.save((found, model.state_dict()), out / f"{name}.pt")
        run.accelerator.wait_for_everyone()


@pytest.fixture(scope="module")
def found(root, tmp_path_factory):
    "World size → case → steps and final weights."
    result = {}
    prepare(root, config(), quiet=True)
    for world in 1, 2:
        out = tmp_path_factory.mktemp(f"world{world}")
        processes.run(epochs_of_steps, root, out, world=world)
        result[world] = {name: torch.load(out / f"{name}.pt") for name in CASES}
    return result


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(found, name):
    (expected, weights), (steps, weights_here) = found[1][name], found[2][name]
    assert [step is None for step in steps] == [False, name == "skip", False]
    for step, one in zip(steps, expected, strict=True):
        if one is None:
            assert step is None
            continue
        assert step[0] == pytest.approx(one[0], rel=2e-5)
        assert step[1].keys() == one[1].keys()
        for key, gradient in one[1].items():
            assert_close(step[1][key], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for key, weight in weights.items():
        assert_close(weights_here[key], weight, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_the_cases_are_what_they_say(found, root):
    corpus, = prepare(root, config(), ("train",), quiet=True)
    per_video = corpus.queries.first.diff()
    queries = [[int(per_video[share].sum()) for share in step] for step in DataOrder(20, 7, 3, 2).epoch(0)]
    assert any(a != b for a, b in queries), queries # ragged
    first = {name: steps[0][0] for name, (steps, _) in found[1].items()}
    assert first["random negatives"]["frame_triplet"] != first["hard negatives"]["frame_triplet"]
    assert {"tcpl", "cbva"}.isdisjoint(first["baseline"]) and {"inputs", "tokens"} < first["own losses"].keys()
    assert first["paper"]["cbva"] != first["random negatives"]["cbva"]


# ---------------------------------------------------------------- whole runs

LEARNS = dict(lr=3e-3, patience=1) # the best epoch is not the first one


def train_run(root, out, settings, resume=False):
    rows = train(config(**settings), root, out, quiet=True, resume=resume)
    assert bool(rows) == (os.environ.get("RANK", "0") == "0")


def train_and_stop(root, out):
    "Processes that stop in their second epoch."
    close = loop.end_epoch

    def stop(run, state, *rest):
        if state.epoch == 1:
            os._exit(0)
        close(run, state, *rest)
    loop.end_epoch = stop
    train(config(**LEARNS), root, out, quiet=True)


def test_a_run_goes_on_with_another_number_of_processes(root, tmp_path):
    one, out = tmp_path / "one" / "run", tmp_path / "several" / "run"
    processes.run(train_run, root, one, LEARNS)
    processes.run(train_and_stop, root, out, world=2)
    assert len(history_of(out)) == 1 and not (out / "metrics.json").exists()
    processes.run(train_run, root, out, LEARNS, True, world=3)
    processes.run(train_run, root, out, LEARNS, True, world=2) # a finished run: the main process has its rows

    def files(out):
        names = {re.sub(r"tfevents.*", "tfevents", str(p.relative_to(out))) for p in out.rglob("*") if p.is_file()}
        return names, (out / "config.json").read_text()
    assert files(out) == files(one)
    expected = history_of(one)
    assert json.loads((one / "metrics.json").read_text())["best_epoch"] > 0 # every process must know, or lose patience
    for here, there in zip(history_of(out), expected, strict=True):
        assert here.pop("losses") == pytest.approx(there.pop("losses"), rel=1e-4)
        assert here == pytest.approx(there, rel=1e-3, abs=1e-4)


def test_accelerate_launch(root, tmp_path):
    "The documented command in two processes; a script stands for prvr_train, which only an installed package has."
    script = tmp_path / "prvr_train.py"
    script.write_text("from prvr_nb.cli import train_command\nraise SystemExit(train_command())\n")
    text = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in SMALL.items()}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**text, "epochs": 1}.items()]
    launch = ["launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [Path(sys.executable).with_name("accelerate"), *launch, script, "--root", root, "--out", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"),
                   "PYTHONPATH": str(Path(loop.__file__).parents[2])}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(history_of(tmp_path / "run")) == 1 and done.stdout.count("zero-shot teacher") == 1


# ---------------------------------------------------------------- the order of the data

@pytest.mark.parametrize("n_videos, batch", [(17, 7), (14, 7), (5, 8), (3, 3), (100, 1)])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_laws_of_the_order(n_videos, batch, world):
    if min(n_videos % batch or batch, n_videos, batch) < world:
        with pytest.raises(UserError, match=f"batch_size is {batch}: .* for {world} processes"):
            DataOrder(n_videos, batch, 5, world)
        return
    order, one = DataOrder(n_videos, batch, 5, world), DataOrder(n_videos, batch, 5)
    for epoch in range(3):
        steps = order.epoch(epoch)
        sizes = [[len(share) for share in step] for step in steps]
        assert len(steps) == len(order) == len(one)
        assert all(len(row) == world and 0 < min(row) and max(row) - min(row) <= 1 for row in sizes)
        assert torch.equal(torch.cat([torch.cat(step) for step in steps]).sort().values, torch.arange(n_videos))
        for step, (whole,) in zip(steps, one.epoch(epoch), strict=True):
            assert torch.equal(torch.cat(step), whole)
    if n_videos > 8:
        assert not torch.equal(torch.cat(order.epoch(0)[0]), torch.cat(order.epoch(1)[0]))
        other_seed = DataOrder(n_videos, batch, 6, world)
        assert not torch.equal(torch.cat(order.epoch(0)[0]), torch.cat(other_seed.epoch(0)[0]))


def test_the_order_does_not_touch_other_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = DataOrder(20, 6, 1).epoch(4)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, DataOrder(20, 6, 1).epoch(4), strict=True))


def test_seeds_differ():
    rest = [(), (0,), (1,), (0, 0), (1, 0), (0, 1), (0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (100, 63, 8)]
    keys = [(seed, *more) for seed in (0, 1, 9527) for more in rest]
    seeds = [step_seed(*key) for key in keys]
    assert len({s % 2**32 for s in seeds}) == len(keys) # the CPU's generator takes 32 bits
    assert all(0 <= s < 2**63 for s in seeds) and step_seed(3, 1, 2) == step_seed(3, 1, 2)
