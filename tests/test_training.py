"""Configuration, optimiser and training: what is refused, what a step does, what a run leaves behind."""
import json
import math
from dataclasses import FrozenInstanceError, asdict, fields

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from prvr_nb.evidence.experiments import ROWS
from prvr_nb.config import (
    Config, PAPER, PUBLISHED, make_config, next_length, paper_schedule, published_config, read_config,
    schedule_problems,
)
from prvr_nb.files import UserError, write_json
from prvr_nb.training.distributed import DataOrder, step_seed
from prvr_nb.evaluation.rows import evaluate
from prvr_nb.method.model import PRVRModel
from prvr_nb.training.checkpoints import load_checkpoint, released_names
from prvr_nb.data.prepared import prepare
from prvr_nb.training.resume import TrainState
from prvr_nb.data.toy import write_toy
from prvr_nb.method.model import compute_losses
from prvr_nb.training.loop import Run, train, train_epoch
from prvr_nb.training.optimizer import BertAdam, make_optimizer, make_schedule, parameter_groups, slices, warmup_linear
from prvr_nb.training.runs import start_run

ROW_KEYS = {"name", "r1", "r5", "r10", "r100", "sum_r", "text_intra", "text_total", "text_diff_norm",
            "video_intra", "video_total", "video_diff_norm", "spearman"}
TINY = dict(hidden_size=16, heads=2, epochs=2, batch_size=6, merge_schedule=(32, 20, 16), seed=3)


# ---------------------------------------------------------------- configuration

WRONG = [("epochs", 0), ("batch_size", 0), ("lr", 0.), ("hidden_size", -4), ("heads", 0), ("sft_factor", 0.), ("patience", 0), ("hard_pool_size", 0),
         ("dropout", -0.1), ("dropout", 1.), ("warmup_ratio", 1.5), ("clip_score_weight", 1.1), ("weight_decay", -1.), ("margin", -0.1), ("loss_factor_clip", -1.),
         ("loss_factor_frame", -1.), ("hard_negative_start_epoch", -1), ("lambda_distance", -1.), ("lambda_angle", -1.), ("lambda_cbva", -1.), ("seed", -1),
         ("seed", 2**32), ("tau", 1.2), ("variant", "mine"), ("precision", "fp8"), ("merge_similarity", "l2"), ("tcpl_average", "half"),
         ("cbva_similarity", "dot"), ("cbva_normalisation", "max"), ("merge_schedule", (128, 32)), ("merge_schedule", ()),
         ("merge_schedule", (32, 40)), ("segment_levels", (32, 8)), ("segment_levels", (20, 0))]


@pytest.mark.parametrize("name, value", WRONG)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        Config(**{name: value})


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
@pytest.mark.parametrize("value", [None, object(), "seven", {}])
def test_a_value_of_the_wrong_kind_is_named(name, value):
    if isinstance(getattr(Config(), name), str) and isinstance(value, str):
        return
    with pytest.raises(UserError, match=rf"\b{name} is .* must be"):
        Config(**{name: value})


@pytest.mark.parametrize("name, value", [("lr", math.nan), ("lr", math.inf), ("lr", "0.1"), ("epochs", 2.5), ("heads", True), ("tcpl", 1),
                                         ("merge_schedule", "128,80"), ("merge_schedule", 128), ("merge_schedule", (128, 80.5))])
def test_values_as_a_hand_edited_file_may_hold_them(name, value):
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        Config(**{name: value})


def test_everything_wrong_is_said_at_once():
    with pytest.raises(UserError) as caught:
        Config(lr=-1., margin=-1., precision="fp8", hidden_size=30, merge_schedule=(128, 32), epochs="many")
    for name in "lr", "margin", "precision", "hidden_size", "merge_schedule", "epochs":
        assert name in str(caught.value)


def test_hidden_is_a_multiple_of_heads():
    with pytest.raises(UserError, match="hidden is 30, not a multiple of heads = 4"):
        Config(hidden_size=30)
    assert Config(hidden_size=32).hidden_size == 32


def test_limits_that_are_allowed():
    Config(warmup_ratio=0., dropout=0., clip_score_weight=1., margin=0., weight_decay=0., lambda_cbva=0., lambda_angle=0, seed=0, hard_negative_start_epoch=0, tau=-1.)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="somewhere: no setting is called margn, taw; .*margin"):
        make_config({"margn": 1, "taw": 2, "tau": 0.5}, "somewhere")
    with pytest.raises(UserError, match="margn"):
        published_config("tvr", margn=0.5)
    for value in [1, 2], 3, None:
        with pytest.raises(UserError, match="somewhere"):
            make_config(value, "somewhere")


def test_published_values():
    rows = {"tvr": (3e-4, 0.1, 0.20, 0.09, 0.05, 0.04, 0.80), "activitynet": (2.5e-4, 0.2, 0.31, 0.6, 0.02, 0.04, 0.80),
            "charades": (2e-4, 0.2, 0.25, 0.6, 0.02, 0.04, 0.85), "qvhighlight": (2.5e-4, 0.2, 0.31, 0.6, 0.02, 0.04, 0.70)}
    assert rows.keys() == PUBLISHED.keys()
    for name, row in rows.items():
        c = published_config(name)
        assert (c.lr, c.margin, c.dropout, c.sft_factor, c.loss_factor_clip, c.loss_factor_frame, c.tau) == row
        assert (c.dataset, c.batch_size, c.epochs, c.patience, c.seed, c.hidden_size, c.heads, c.weight_decay, c.warmup_ratio) == (name, 128, 100, 10, 9527, 384, 4, 0.01, 0.01)
        assert (c.lambda_distance, c.lambda_angle, c.lambda_cbva, c.clip_score_weight, c.hard_negative_start_epoch, c.hard_pool_size) == (15, 30, 0.1, 0.4, 20, 20)
        assert c.merge_schedule == (128, 80, 52, 32) and c.levels == (32, 20, 12, 8, 5)


def test_variants_differ_in_the_seven_options():
    released, paper = asdict(published_config("tvr")), asdict(published_config("tvr", "paper"))
    assert {k for k in released if released[k] != paper[k]} == {"variant", "merge_similarity", "merge_schedule", "transitive_closure", "segment_levels",
                                                                "cbva_similarity", "cbva_normalisation", "tcpl_average"}
    assert paper["merge_schedule"] == (128, 80, 50, 32) and paper["segment_levels"] == (32, 20, 12, 8, 6, 5)
    assert published_config("tvr", "paper", transitive_closure=True).transitive_closure


def test_a_configuration_is_frozen_and_survives_a_file(tmp_path):
    config = published_config("charades", "paper", tau=0.6)
    with pytest.raises(FrozenInstanceError):
        config.tau = 0.1
    write_json(tmp_path / "config.json", asdict(config))
    assert read_config(tmp_path / "config.json") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="does not exist"):
        read_config(path)
    for text, part in ('{"lr": 0.1,', "is not JSON"), ("[1]", "names with values"), ('{"lr": "a"}', "lr"), ('{"rl": 1}', "rl"):
        path.write_text(text)
        with pytest.raises(UserError, match=part):
            read_config(path)


# ---------------------------------------------------------------- schedules

def test_schedule_problems_against_all_disjoint_pairs():
    for n in range(1, 40):
        accepted = {m for m in range(0, n + 3) if not schedule_problems("s", (n, m))}
        assert accepted == {n - k for k in range(1, n // 2 + 1)}
    assert schedule_problems("s", (7,)) == [] and schedule_problems("s", ()) and schedule_problems("s", (0,))
    assert len(schedule_problems("s", (128, 32, 5))) == 2


def test_paper_schedule():
    assert paper_schedule() == (128, 80, 50, 32)
    assert paper_schedule(32, 5) == (32, 20, 12, 8, 6, 5)
    assert paper_schedule(32, 32) == (32,)
    assert next_length(5) == 5 and next_length(4) == 5
    for start, end in (64, 32), (10, 3), (10, 20):
        with pytest.raises(UserError, match=f"never {end}"):
            paper_schedule(start, end)


# ---------------------------------------------------------------- optimiser

def naive_step(p, g, m, v, lr, decay):
    "BERT's Adam on one tensor as a list of floats."
    scale = min(1., 1. / (math.sqrt(sum(x * x for x in g)) + 1e-6))
    for i, x in enumerate(g):
        m[i] = 0.9 * m[i] + 0.1 * x * scale
        v[i] = 0.999 * v[i] + 0.001 * (x * scale) ** 2
        p[i] -= lr * (m[i] / (math.sqrt(v[i]) + 1e-6) + decay * p[i])


def test_bert_adam_against_a_loop():
    torch.manual_seed(0)
    shapes, decays = [(3, 4), (5,), (1, 1, 2)], [0.01, 0., 0.1]
    params = [nn.Parameter(torch.randn(s, dtype=torch.double)) for s in shapes]
    optimizer = BertAdam([dict(params=[p], weight_decay=d) for p, d in zip(params, decays)], lr=0.02)
    slow = [(p.detach().flatten().tolist(), [0.] * p.numel(), [0.] * p.numel()) for p in params]
    for step in range(25):
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        for p, state, group in zip(params, slow, optimizer.param_groups):
            p.grad = torch.randn_like(p) * 10. ** (step % 4 - 2)
            naive_step(state[0], p.grad.flatten().tolist(), *state[1:], group["lr"], group["weight_decay"])
        optimizer.step()
    for p, (expected, *_) in zip(params, slow):
        assert_close(p.detach().flatten(), torch.tensor(expected, dtype=torch.double))


@pytest.mark.parametrize("stacked_dims", [1, 2])
def test_stacked_parameters_are_separate_parameters(stacked_dims):
    torch.manual_seed(1)
    stack = nn.Parameter(torch.randn(2, 3, 4))
    parts = [nn.Parameter(x.clone()) for x in stack.detach().flatten(0, stacked_dims - 1)]
    uncut = nn.Parameter(stack.detach().clone())
    optimizers = [BertAdam([dict(params=p, stacked_dims=dims)], lr=0.01) for p, dims in (([stack], stacked_dims), (parts, 0), ([uncut], 0))]
    for _ in range(15):
        g = torch.randn(2, 3, 4) * 10 ** torch.randn(2, 3, 1)
        stack.grad, uncut.grad = g.clone(), g.clone()
        for part, own in zip(parts, g.flatten(0, stacked_dims - 1)):
            part.grad = own.clone()
        for optimizer in optimizers:
            optimizer.step()
    separate = torch.stack([p.detach() for p in parts]).reshape(stack.shape)
    assert_close(stack.detach(), separate, rtol=0, atol=1e-6)
    assert (uncut.detach() - separate).abs().max() > 1e-3


def test_parameters_without_gradient_stay():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = BertAdam([p, q], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(q.detach(), torch.ones(3)) and not torch.equal(p.detach(), torch.ones(3))


def test_slices_are_views():
    t = torch.zeros(2, 3, 4)
    views = slices([t], 2)
    assert [tuple(x.shape) for x in views] == [(4,)] * 6
    views[-1] += 1
    assert t.sum() == 4 and torch.equal(t[1, 2], torch.ones(4))
    assert slices([t], 0)[0] is t


def test_parameter_groups_follow_the_released_names():
    model = PRVRModel(published_config("toy", **TINY), 24, 20)
    groups, ours = parameter_groups(model, 0.03), dict(model.named_parameters())
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in ours.values())
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, _, released in released_names():
        assert decay[id(ours[name])] == (0. if "bias" in released or "LayerNorm" in released else 0.03), released
    assert decay[id(ours["token"])] == decay[id(ours["frame.tokens.positions.weight"])] == decay[id(ours["query.block.norm1.weight"])] == 0.03
    assert sum(len(slices(g["params"], g["stacked_dims"])) for g in groups) == len(released_names())


def test_warmup_linear():
    expected = {0.: 0., 0.005: 0.5, 0.01: 1., 0.505: 0.5, 1.: 0., 1.2: 0.}
    for progress, factor in expected.items():
        assert warmup_linear(progress) == pytest.approx(factor)
    assert warmup_linear(0., 0.) == 1. and warmup_linear(0.5, 1.) == 0.5 and warmup_linear(1., 1.) == 0.


# ---------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_toy(folder, n_train=18, n_val=10)
    return folder


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    "A finished tiny run: its folder and what train returned."
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, train(published_config("toy", **TINY), root, out, quiet=True)


def history_of(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def fresh_run(config, corpus, steps=6):
    "What train_epoch needs, without a run folder."
    torch.manual_seed(0)
    model = PRVRModel(config, 64, 64)
    optimizer = make_optimizer(model, config)
    return Run(model, optimizer, make_schedule(optimizer, config, steps), Accelerator(), corpus, DataOrder(len(corpus.split.videos), config.batch_size, config.seed), config)


def test_the_first_step_moves_nothing(root):
    config = published_config("toy", **TINY)
    corpus, = prepare(root, config, ("train",), quiet=True)
    model, batch = PRVRModel(config, 64, 64), corpus.batch(range(6))
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, 100)
    before = [p.detach().clone() for p in model.parameters()]
    for moved in False, True:
        optimizer.zero_grad()
        sum(compute_losses(model, model(batch), batch, config, 0).values()).backward()
        optimizer.step()
        schedule.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters())) is moved


def test_an_epoch_is_a_plain_loop(root):
    config = published_config("toy", **{**TINY, "dropout": 0., "lr": 1e-3, "batch_size": 7})
    corpus, = prepare(root, config, ("train",), quiet=True)
    first, second = fresh_run(config, corpus), fresh_run(config, corpus).model
    progress = TrainState(epoch=1)
    means = train_epoch(first, progress)
    assert (progress.epoch, progress.step, len(progress.values)) == (1, 3, 3)
    optimizer = make_optimizer(second, config)
    schedule = make_schedule(optimizer, config, 6)
    sums = dict.fromkeys(means, 0.)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(step_seed(3, 1)))
    for step, videos in enumerate((order[:7], order[7:14], order[14:])):
        batch = corpus.batch(videos)
        e = second(batch)
        torch.manual_seed(step_seed(3, 1, step, 0))  # random negatives
        losses = compute_losses(second, e, batch, config, 1)
        for p, g in zip(second.parameters(), torch.autograd.grad(sum(losses.values()), list(second.parameters()))):
            p.grad = g
        optimizer.step()
        schedule.step()
        sums = {name: total + losses[name].item() for name, total in sums.items()}
    for (name, p), q in zip(first.model.named_parameters(), second.parameters()):
        assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert means == pytest.approx({name: total / 3 for name, total in sums.items()})


def test_a_run_leaves_its_files(run):
    out, rows = run
    assert {p.name for p in out.iterdir()} >= {"config.json", "history.jsonl", "metrics.json", "best.safetensors"}
    assert not list(out.glob("*.part"))
    assert read_config(out / "config.json") == published_config("toy", **TINY)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rows"] == rows and [row["name"] for row in rows] == ["zero-shot teacher", "tiny"]
    assert all(row.keys() == ROW_KEYS for row in rows)
    assert all(isinstance(v, float) and math.isfinite(v) for row in rows for k, v in row.items() if k != "name")


def test_the_history_has_a_line_per_epoch(run):
    out, rows = run
    history = history_of(out)
    assert [line["epoch"] for line in history] == [0, 1]
    for line in history:
        assert line.keys() == {"epoch", "loss", "losses"} | ROW_KEYS - {"name"}
        assert line["losses"].keys() == {"clip_nce", "clip_triplet", "frame_nce", "frame_triplet", "cbva", "tcpl"}
        assert line["loss"] == pytest.approx(sum(line["losses"].values()))
    best = json.loads((out / "metrics.json").read_text())["best_epoch"]
    assert history[best]["sum_r"] == max(line["sum_r"] for line in history) == rows[-1]["sum_r"]


def test_the_checkpoint_evaluates_to_the_same_numbers(run, root):
    out, rows = run
    model = load_checkpoint(out / "best.safetensors")
    corpus, = prepare(root, model.config, ("val",), quiet=True)
    assert evaluate(model, corpus) == {k: v for k, v in rows[-1].items() if k != "name"}


def test_the_same_seed_gives_the_same_history(run, root, tmp_path):
    out, _ = run
    torch.rand(5)  # whatever was drawn before does not matter
    train(published_config("toy", **TINY), root, tmp_path / "again", quiet=True)
    train(published_config("toy", **{**TINY, "seed": 4}), root, tmp_path / "other", quiet=True)
    assert history_of(tmp_path / "again") == history_of(out)
    assert history_of(tmp_path / "other") != history_of(out)


def test_training_lowers_the_loss(root, tmp_path):
    config = published_config("toy", **{**TINY, "epochs": 5, "lr": 3e-3})
    train(config, root, tmp_path / "run", quiet=True)
    losses = [line["loss"] for line in history_of(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


def test_a_used_folder_is_refused(run, tmp_path):
    out, _ = run
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(UserError, match="holds a run already"):
        train(published_config("toy", **TINY), tmp_path / "no corpus here", out, quiet=True)  # said before the corpus is looked at
    with pytest.raises(UserError, match="holds a run already"):
        start_run(out, published_config("toy", **TINY))
    assert before == {p: p.read_bytes() for p in out.iterdir() if p.is_file()}


def test_a_folder_that_cannot_be_made_is_reported(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        start_run(tmp_path / "file" / "run", published_config("toy", **TINY))


def test_a_missing_corpus_leaves_no_run(tmp_path):
    with pytest.raises(UserError):
        train(published_config("toy", **TINY), tmp_path / "nothing", tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_quiet_says_nothing(root, tmp_path, capfd):
    train(published_config("toy", **{**TINY, "epochs": 1}), root, tmp_path / "run", quiet=True)
    assert capfd.readouterr().out == ""


def test_patience_stops_a_run(root, tmp_path):
    config = published_config("toy", **{**TINY, "epochs": 6, "patience": 1, "lr": 1e-12})  # nothing gets better
    train(config, root, tmp_path / "run", quiet=True)
    assert len(history_of(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["best_epoch"] == 0


def test_a_loss_that_is_not_finite_is_reported(root, tmp_path):
    config = published_config("toy", **{**TINY, "epochs": 1, "lambda_cbva": 1e308})
    with pytest.raises(UserError, match="epoch 0, step 0: cbva, gradient not finite"):
        train(config, root, tmp_path / "run", quiet=True)


CASES = {**{f"released {name}": dict(row) for name, row in ROWS.items()},
         **{f"paper {name}": dict(row, variant="paper") for name, row in ROWS.items()},
         **{f"only {name}": {name: value} for name, value in PAPER.items()}}


@pytest.mark.parametrize("name", CASES)
def test_every_row_and_option_trains_a_step(name, root):
    overrides = {**TINY, "merge_schedule": (32, 20, 12), **CASES[name]}
    if name == "only merge_schedule":
        overrides["merge_schedule"] = paper_schedule()
    config = published_config("toy", **overrides)
    corpus, = prepare(root, config, ("train",), quiet=True)
    torch.manual_seed(0)
    model = PRVRModel(config, 64, 64)
    optimizer = make_optimizer(model, config)
    batch = next(iter(DataLoader(range(6), 6, collate_fn=corpus.batch)))
    losses = compute_losses(model, model(batch), batch, config, 0)
    assert ("tcpl" in losses, "cbva" in losses) == (config.tcpl, config.cbva)
    sum(losses.values()).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    after = list(model.parameters())
    assert all(p.isfinite().all() for p in after)
    trained = [not torch.equal(a, b) for a, b in zip(before, after)]
    idle = {n for n, p in model.named_parameters() if p.grad is None}
    assert sum(trained) == len(after) - len(idle)
    assert idle == (set() if config.cbva and config.cbva_similarity == "projected_dot" else {"cbva_projection.weight", "cbva_projection.bias"})


def test_precision_may_change_within_a_process(tmp_path):
    write_toy(tmp_path, n_train=8, n_val=4)
    losses = {}
    for name in "fp32", "bf16", "fp32 again":
        config = published_config("toy", epochs=1, hidden_size=16, heads=2, merge_schedule=(16, 8), dropout=0., precision=name[:4])
        train(config, tmp_path, tmp_path / name, quiet=True)
        losses[name] = json.loads((tmp_path / name / "history.jsonl").read_text())["loss"]
    assert losses["fp32"] == losses["fp32 again"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
