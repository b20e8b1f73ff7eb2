"""Steps, epochs and runs: what a step does, what a run leaves, broken numbers, other arithmetic, no waiting."""
import functools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_golden
import torch
from accelerate import Accelerator
from conftest import history_of, small_config
from torch.testing import assert_close

import prvr_nb.training.loop as loop
from prvr_nb.config import read_config
from prvr_nb.data.prepared import prepare
from prvr_nb.evaluation.rows import evaluate
from prvr_nb.files import UserError
from prvr_nb.method.model import PRVRModel, compute_losses
from prvr_nb.training.checkpoints import load_checkpoint, read_tensors, to_released
from prvr_nb.training.distributed import DataOrder, step_seed
from prvr_nb.training.loop import Run, compile_encoders, step_losses, train, train_epoch, update
from prvr_nb.training.optimizer import BertAdam, make_optimizer, make_schedule, parameter_groups
from prvr_nb.training.resume import TrainState

TERMS = {"clip_nce", "clip_triplet", "frame_nce", "frame_triplet", "cbva", "tcpl"}


@pytest.fixture(scope="module")
def corpora(root):
    return prepare(root, small_config(), quiet=True)


def train_here(corpora, out, losses=compute_losses, resume=False, **settings):
    return train(small_config(**settings), out.parent / "no corpus", out, True, corpora, resume, losses)


def contents(out):
    return {p: p.read_bytes() for p in out.iterdir() if p.is_file()}


# ---------------------------------------------------------------- steps and epochs

def test_the_first_step_moves_nothing(corpora):
    config = small_config()
    model, batch = PRVRModel(config, 64, 64), corpora[0].batch(range(6))
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, 100)
    before = [p.detach().clone() for p in model.parameters()]
    for moved in False, True:
        optimizer.zero_grad()
        sum(compute_losses(model, model(batch), batch, config, 0).values()).backward()
        optimizer.step()
        schedule.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) is moved
    assert all(state["exp_avg"].isfinite().all() for state in optimizer.state.values())


def test_an_epoch_is_a_plain_loop(corpora):
    config, corpus = small_config(dropout=0., lr=1e-3, batch_size=7), corpora[0]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(PRVRModel(config, 64, 64))
    optimizers = [make_optimizer(model, config) for model in models]
    schedules = [make_schedule(optimizer, config, 6) for optimizer in optimizers]
    state, order = TrainState(epoch=1), DataOrder(20, 7, config.seed)
    means = train_epoch(Run(models[0], optimizers[0], schedules[0], Accelerator(), corpus, order, config), state)
    assert (state.epoch, state.step, state.skipped) == (1, 3, [])
    sums = dict.fromkeys(means, 0.)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(step_seed(3, 1)))
    for step, videos in enumerate((shuffled[:7], shuffled[7:14], shuffled[14:])):
        batch = corpus.batch(videos)
        embeddings = models[1](batch)
        torch.manual_seed(step_seed(3, 1, step, 0)) # random negatives
        losses = compute_losses(models[1], embeddings, batch, config, 1)
        optimizers[1].zero_grad()
        sum(losses.values()).backward()
        optimizers[1].step()
        schedules[1].step()
        sums = {name: total + losses[name].item() for name, total in sums.items()}
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert means == pytest.approx({name: total / 3 for name, total in sums.items()})


# ---------------------------------------------------------------- what a run leaves

def test_a_run_leaves_its_files(small_run, corpora):
    names = {"config.json", "corpus.json", "history.jsonl", "metrics.json", "best.safetensors", "last.safetensors"}
    assert {p.name for p in small_run.iterdir()} == names | {"tensorboard", ".lock"}
    assert read_config(small_run / "config.json") == small_config()
    metrics, history = json.loads((small_run / "metrics.json").read_text()), history_of(small_run)
    zero, row = metrics["rows"]
    assert (zero.pop("name"), row.pop("name")) == ("zero-shot teacher", "small") and zero.keys() == row.keys()
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in row.values())
    assert [line["epoch"] for line in history] == [0, 1, 2]
    for line in history:
        assert line.keys() == {"epoch", "loss", "losses", *row} and line["losses"].keys() == TERMS
        assert line["loss"] == pytest.approx(sum(line["losses"].values()))
    assert history[metrics["best_epoch"]]["sum_r"] == max(line["sum_r"] for line in history)
    assert history[metrics["best_epoch"]]["sum_r"] == pytest.approx(row["sum_r"])
    assert evaluate(load_checkpoint(small_run / "best.safetensors"), corpora[1]) == row


def test_the_seed_is_the_run(small_run, corpora, tmp_path, capfd):
    torch.rand(5) # whatever was drawn before does not matter
    train_here(corpora, tmp_path / "again")
    train_here(corpora, tmp_path / "other", seed=4)
    assert history_of(tmp_path / "again") == history_of(small_run) != history_of(tmp_path / "other")
    assert capfd.readouterr().out == "" # quiet


def test_training_lowers_the_loss_until_patience_is_spent(corpora, tmp_path):
    train_here(corpora, tmp_path / "learns", epochs=5, lr=3e-3)
    losses = [line["loss"] for line in history_of(tmp_path / "learns")]
    assert losses[-1] < 0.9 * losses[0]
    train_here(corpora, tmp_path / "stays", epochs=6, patience=1, lr=1e-12) # nothing gets better
    assert len(history_of(tmp_path / "stays")) == 2
    assert json.loads((tmp_path / "stays" / "metrics.json").read_text())["best_epoch"] == 0


def test_losses_of_ones_own(corpora, tmp_path):
    def mine(model, embeddings, batch, config, epoch):
        assert len(batch.tokens) == len(embeddings.queries)
        return {"length": embeddings.queries.square().mean(), **compute_losses(model, embeddings, batch, config, epoch)}
    train_here(corpora, tmp_path / "run", mine, epochs=1)
    assert history_of(tmp_path / "run")[0]["losses"].keys() == {"length", *TERMS}
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(UserError, match="was trained with the losses .*mine, not prvr_nb.method.model.compute_losses"):
        train_here(corpora, tmp_path / "run", resume=True, epochs=1)


def test_a_used_folder_is_refused_before_anything_is_prepared(small_run, tmp_path):
    before = contents(small_run)
    with pytest.raises(UserError, match="holds a run already"):
        train(small_config(), tmp_path / "no corpus here", small_run, quiet=True)
    assert contents(small_run) == before
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"something": "else"}')
    for out, words in (("file", "is a file"), ("foreign", "not a run's"), ("file/run", "cannot be written")):
        with pytest.raises(UserError, match=words):
            train(small_config(), small_run.parent, tmp_path / out, quiet=True, corpora=(None, None))


def test_a_missing_corpus_leaves_no_run(tmp_path):
    with pytest.raises(UserError):
        train(small_config(), tmp_path / "nothing", tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- numbers that are not finite

def spoil(steps, how="loss"):
    "compute_losses whose TCPL term, or its gradient, is not finite in some calls."
    calls = []

    def spoiled(model, e, batch, config, epoch):
        losses = compute_losses(model, e, batch, config, epoch)
        if len(calls) in steps:
            tcpl = losses["tcpl"]
            losses["tcpl"] = tcpl * math.inf if how == "loss" else tcpl + (0 * e.queries.sum()).sqrt()
        calls.append(epoch)
        return losses
    return spoiled


def finite(path):
    return all(t.isfinite().all() for t in read_tensors(path)[0].values())


@pytest.mark.parametrize("how, term", [("loss", "tcpl, gradient"), ("gradient", "gradient")])
def test_a_number_that_is_not_finite_stops_or_is_left_out(corpora, tmp_path, how, term):
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train_here(corpora, out, spoil({6}, how))
    videos = [corpora[0].split.videos[v] for v in DataOrder(20, 6, 3).epoch(1)[2][0]]
    assert str(caught.value).startswith(f"epoch 1, step 2: {term} not finite; ")
    assert str(caught.value).endswith(f"the batch's videos: {', '.join(videos)}")
    assert "--lr" in str(caught.value) and "--nonfinite skip" in str(caught.value)
    assert finite(out / "last.safetensors") # the state before the damage
    train_here(corpora, out, spoil({0, 3}, how), resume=True, nonfinite="skip") # as the message says
    assert [line.get("skipped_steps") for line in history_of(out)] == [None, [0, 3], None]
    assert all(math.isfinite(x) for line in history_of(out) for x in line["losses"].values())
    assert finite(out / "best.safetensors") and finite(out / "last.safetensors")


def test_a_gpu_looks_when_the_epoch_ends(corpora):
    "Nobody has looked at the numbers before, and the first broken step is named."
    run = SimpleNamespace(order=DataOrder(20, 6, 3), corpus=corpora[0])
    noted = {step: torch.tensor([1., value]) for step, value in enumerate((1., math.nan, math.inf))}
    with pytest.raises(UserError, match="epoch 0, step 1: gradient not finite"):
        loop.check_finite(run, 0, ["tcpl", "gradient"], noted)
    loop.check_finite(run, 0, ["tcpl", "gradient"], {0: noted[0]})


def test_skipping_changes_nothing_when_all_is_finite(small_run, corpora, tmp_path):
    train_here(corpora, tmp_path / "run", nonfinite="skip")
    assert history_of(tmp_path / "run") == history_of(small_run)


def test_nothing_but_broken_steps(corpora, tmp_path):
    with pytest.raises(UserError, match="epoch 0: no step had finite losses"):
        train_here(corpora, tmp_path / "run", spoil(range(9)), nonfinite="skip")


# ---------------------------------------------------------------- other arithmetic, the same training

@pytest.fixture(scope="module")
def golden():
    def load(name):
        with np.load(Path(__file__).with_name("golden") / f"{name}.npz") as held:
            return {key: torch.from_numpy(held[key]) for key in held.files}
    return load


def golden_step(golden, bf16=False, compiled=False):
    "Largest difference of a loss from the released code's, and of the whole gradient; both relative."
    _, _, settings, model, batch = test_golden.batch_and_model(golden, ({}, loop.use_fast_modules))
    if compiled:
        compile_encoders(model, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        e = model(batch)
    losses, held = compute_losses(model, type(e)(*(x.float() for x in e)), batch, settings, 0), golden("losses")
    sum(losses.values()).backward()
    gradients = to_released({name: p.grad for name, p in model.named_parameters()})
    pairs = [(gradients[key.removeprefix("grad/")], value) for key, value in held.items() if key.startswith("grad/")]
    ours, theirs = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs, strict=True))
    off = max(abs(losses[name].item() / held[theirs].item() - 1) for theirs, name in test_golden.TERMS.items())
    return off, ((ours - theirs).norm() / theirs.norm()).item()


def test_golden_values_in_bf16(golden):
    loss, gradient = golden_step(golden, bf16=True)
    assert 1e-5 < loss < 0.01 and 1e-3 < gradient < 0.15 # bfloat16 has 8 bits: 0.4 % per rounding


@pytest.fixture
def eager_backend(monkeypatch):
    "torch.compile as far as it goes without a C++ compiler: traced, differentiated as a graph, executed by PyTorch."
    monkeypatch.setattr(loop.shutil, "which", lambda name: "/usr/bin/c++")
    compiled = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch._dynamo.reset()


def test_golden_values_in_traced_encoders(golden, eager_backend):
    loss, gradient = golden_step(golden, compiled=True)
    assert loss < 1e-5 and gradient < 1e-5


@pytest.mark.skipif(not os.environ.get("PRVR_SLOW") or not any(map(shutil.which, ("c++", "g++", "clang++"))),
                    reason="compiles C++ for one to three minutes; set PRVR_SLOW=1")
@pytest.mark.parametrize("bf16, loss_limit, gradient_limit", [(False, 1e-5, 1e-5), (True, 0.01, 0.2)])
def test_golden_values_in_compiled_encoders(golden, bf16, loss_limit, gradient_limit):
    torch._dynamo.reset()
    loss, gradient = golden_step(golden, bf16, compiled=True)
    assert loss < loss_limit and gradient < gradient_limit


def test_epochs_in_other_arithmetic_agree(root, corpora, eager_backend):
    half, = prepare(root, small_config(precision="bf16"), ("train",), quiet=True)
    found = {}
    for name, settings, corpus in (("plain", {}, corpora[0]), ("compile", dict(compile=True), corpora[0]),
                                   ("bf16", dict(precision="bf16"), half), ("plain again", {}, corpora[0])):
        run, state = loop.build_run(small_config(batch_size=10, dropout=0., **settings), corpus, None)
        found[name] = train_epoch(run, state)
    assert found["compile"] == pytest.approx(found["plain"], rel=1e-4)
    assert found["plain again"] == found["plain"] # accelerate would keep the precision of a process's first run
    assert found["bf16"] == pytest.approx(found["plain"], rel=0.03) != pytest.approx(found["plain"], rel=1e-5)


def test_compile_without_a_compiler(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="compile: no C.. compiler was found for cpu; install it or leave --compile"):
        train_here(corpora, tmp_path / "run", compile=True)


# ---------------------------------------------------------------- no waiting for the device

class OnlyClips(BertAdam):
    "Everything of a step but the fused kernel, which there is for real devices only."
    def __init__(self, groups):
        torch.optim.Optimizer.__init__(self, groups, dict(lr=0.1))
        self.max_norm = 1.


def step_without_numbers(corpus, monkeypatch, losses=compute_losses, nonfinite="stop"):
    "A step on the device 'meta', which has shapes and no numbers: what waits on a GPU is an error there."
    settings, meta = small_config(hard_negative_start_epoch=0, dropout=0.2, nonfinite=nonfinite), torch.device("meta")
    there = corpus._replace(videos=type(corpus.videos)(*(x.to(meta) for x in corpus.videos)),
                            queries=corpus.queries._replace(tokens=corpus.queries.tokens.to(meta)))
    model = PRVRModel(settings, 64, 64).to(meta).train()
    losses = loop.use_twins(model, losses, False)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    accelerator = SimpleNamespace(device=meta, process_index=0, backward=lambda loss: loss.backward(),
                                  unwrap_model=lambda m: m)
    order = DataOrder(20, 6, 0)
    run = Run(model, OnlyClips(parameter_groups(model)), None, accelerator, there, order, settings, losses)
    steps = order.epoch(0)[:1]
    batch, = loop.load_batches(run, steps)
    return update(run, step_losses(run, batch, steps[0], TrainState()))


def test_a_step_waits_for_nothing(corpora, monkeypatch):
    numbers = step_without_numbers(corpora[0], monkeypatch)
    assert numbers.keys() == {*TERMS, "gradient"} and all(x.device.type == "meta" for x in numbers.values())


WAITS = {"item": lambda x: x.sum().item(), "if": lambda x: 1 if x.sum() > 0 else 2,
         "boolean index": lambda x: x[x > 0].sum(), "tolist": lambda x: x.tolist(), "cpu": lambda x: x.cpu(),
         "repeats": lambda x: x.repeat_interleave(x.long().flatten()), "unique": lambda x: x.unique()}


@pytest.mark.parametrize("name", [*WAITS, "skip"])
def test_waiting_would_be_noticed(corpora, monkeypatch, name):
    def waiting(model, e, batch, config, epoch, twins=None):
        WAITS.get(name, lambda x: None)(e.queries)
        return compute_losses(model, e, batch, config, epoch, twins)
    with pytest.raises((RuntimeError, NotImplementedError)):
        step_without_numbers(corpora[0], monkeypatch, waiting, "skip" if name == "skip" else "stop")
