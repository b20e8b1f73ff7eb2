"""The encoder against a plain oracle, laws of the whole model, and its files: round trips, failed saves, damaged and foreign files."""
import errno
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import prvr_nb.training.checkpoints
from prvr_nb.config import published_config
from prvr_nb.files import UserError
from prvr_nb.method.model import PRVRModel
from prvr_nb.training.checkpoints import (
    build_model, from_released, load_checkpoint, load_released, save_checkpoint, to_released,
)
from prvr_nb.method.model import Batch

D_VIDEO, D_QUERY = 10, 6
close = dict(rtol=1e-4, atol=1e-5)


def config(**overrides):
    return published_config("toy", **{"hidden_size": 8, "heads": 2, "merge_schedule": (12, 8), "dropout": 0.3, **overrides})


def random_model(seed=0, std=0.4, **overrides):
    "A small model; every parameter is random, so that no swapped bias or norm goes unseen."
    torch.manual_seed(seed)
    model = PRVRModel(config(**overrides), D_VIDEO, D_QUERY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def random_batch(config, lengths=(5, 1, 7, 3), n_videos=3, seed=0):
    torch.manual_seed(seed)
    n_frames, n_clips = config.n_frames, config.n_clips
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), max(lengths), D_QUERY) * mask[..., None]
    sizes = torch.randint(1, 6, (n_videos, n_clips)).float()
    labels = torch.arange(n_frames) * n_clips // n_frames
    return Batch(torch.randn(n_videos, n_frames, D_VIDEO), torch.randn(n_videos, n_clips, D_VIDEO), sizes, labels.expand(n_videos, -1),
                 torch.arange(n_clips).expand(n_videos, -1), tokens, mask, torch.randn(len(lengths), D_QUERY), torch.arange(len(lengths)) % n_videos)


# A plain oracle: one video or query, one head and one asking token at a time, from weights under the released code's names.

def plain_linear(sd, name, x):
    return x @ sd[f"{name}.weight"].T + sd[f"{name}.bias"]


def plain_norm(sd, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * sd[f"{name}.weight"] + sd[f"{name}.bias"]


def plain_window(width, length):
    sigma = max(width, 0.01) / 9
    rows = [[math.exp(-(j / (length - 1) - i / length)**2 / (2 * sigma**2)) for j in range(length)] for i in range(length)]
    return torch.tensor([[value / max(row) for value in row] for row in rows])


def plain_block(sd, name, heads, asks, asked, window, sizes=None):
    q, k, v = (plain_linear(sd, f"{name}.self.{role}", x).chunk(heads, 1) for role, x in (("query", asks), ("key", asked), ("value", asked)))
    context = []
    for h in range(heads):
        rows = []
        for i in range(len(asks)):
            scores = torch.stack([q[h][i] @ k[h][j] / math.sqrt(q[h].shape[1]) * window[i, j] + (0 if sizes is None else sizes[j].log()) for j in range(len(asked))])
            rows.append(sum(p * v[h][j] for j, p in enumerate(scores.exp() / scores.exp().sum())))
        context.append(torch.stack(rows))
    x = plain_norm(sd, f"{name}.norm1", asks + torch.cat(context, 1))
    hidden = plain_linear(sd, f"{name}.output.layer1", x).clamp(min=0)
    return plain_norm(sd, f"{name}.norm2", x + plain_linear(sd, f"{name}.output.layer2", hidden))


def plain_tokens(sd, name, x):
    x = plain_linear(sd, f"{name}_input_proj.net.1", plain_norm(sd, f"{name}_input_proj.LayerNorm", x)).clamp(min=0)
    return plain_norm(sd, f"{name}_pos_embed.LayerNorm", x + sd[f"{name}_pos_embed.position_embeddings.weight"][:len(x)])


def plain_video(sd, branch, encoder, config, x, sizes=None):
    x, length = plain_tokens(sd, branch, x), len(x)
    windows = [torch.ones(length, length)] + [plain_window(w, length) for w in (0.5, 1, 5, 10, 3, 0.1, 8)]
    outputs = [plain_block(sd, f"{encoder}.attn{i}", config.heads, x, x, window, sizes) for i, window in enumerate(windows)]
    logits = []
    for output in outputs:
        summary = plain_block(sd, f"{encoder}.ca", config.heads, sd["weight_token"].reshape(1, -1), output, torch.ones(1, length))
        logits.append(plain_linear(sd, f"{encoder}.layer2", plain_linear(sd, f"{encoder}.layer1", summary).clamp(min=0))[0] / config.sft_factor)
    weights = torch.stack(logits).softmax(0)  # (8, L)
    return sum(weight[:, None] * output for weight, output in zip(weights, outputs))


def plain_query(sd, config, x):
    y = plain_block(sd, "query_encoder", config.heads, *[plain_tokens(sd, "query", x)] * 2, torch.ones(len(x), len(x)))
    return (y @ sd["modular_vector_mapping.weight"][0]).softmax(0) @ y


@pytest.mark.parametrize("overrides", [{}, {"heads": 1, "merge_schedule": (9, 5)}, {"heads": 4, "sft_factor": 0.09, "merge_schedule": (8,)}], ids=str)
def test_model_equals_plain_oracle(overrides):
    model = random_model(**overrides)
    batch = random_batch(model.config)
    sd = {name: t.requires_grad_() for name, t in to_released({k: v.detach() for k, v in model.state_dict().items()}).items()}
    plain = (torch.stack([plain_query(sd, model.config, x[m]) for x, m in zip(batch.tokens, batch.mask)]),
             torch.stack([plain_video(sd, "frame", "frame_encoder_1", model.config, x) for x in batch.frames]),
             torch.stack([plain_video(sd, "clip", "clip_encoder", model.config, x, s) for x, s in zip(batch.clips, batch.sizes)]))
    ours = model(batch)
    torch.manual_seed(1)
    losses = [0, 0]
    for a, b in zip(ours, plain):
        assert a.shape == b.shape
        assert_close(a, b, **close)
        weight = torch.randn_like(a)
        losses = [losses[0] + (a * weight).sum(), losses[1] + (b * weight).sum()]
    for loss in losses:
        loss.backward()
    gradients = to_released({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()})
    for name, tensor in sd.items():
        expected = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        assert_close(gradients[name], expected, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("schedule", [(4, 3, 2), (3, 2), (2, 1), (1,)], ids=str)
def test_few_tokens_give_finite_embeddings(schedule):
    model = random_model(merge_schedule=schedule)
    for x in model(random_batch(model.config)):
        assert x.isfinite().all()


def test_batch_composition_does_not_reach_embeddings():
    model = random_model()
    batch = random_batch(model.config)
    whole = model(batch)
    for i, n in enumerate(batch.mask.sum(1).tolist()):
        alone = model.query(batch.tokens[i:i + 1, :n], torch.ones(1, n, dtype=torch.bool))
        assert_close(alone[0], whole.queries[i], **close)
    for order in [2, 0, 1], [1], [2, 2]:
        frames, clips = model.encode_videos(batch.frames[order], batch.clips[order], batch.sizes[order])
        assert_close(frames, whole.frames[order], **close)
        assert_close(clips, whole.clips[order], **close)


def test_gradients_reach_every_parameter():
    model = random_model().train()
    batch = random_batch(model.config)
    e = model(batch)
    torch.manual_seed(1)
    sum((x * torch.randn_like(x)).sum() for x in (*e, model.cbva_projection(e.frames))).backward()
    for name, p in model.named_parameters():
        if name.endswith("to_logits.3.bias"):  # shifts the logits of all eight blocks alike: softmax does not notice
            assert p.grad.abs().max() < 1e-4
        else:
            assert p.grad is not None and p.grad.abs().max() > 1e-4, name
    for branch in model.frame, model.clip:  # every one of the eight blocks, in every one of its tensors
        for name, p in branch.gaussian.blocks.named_parameters():
            for i, g in enumerate(p.grad):
                assert g.abs().max() > 1e-5, (name, i)
    assert (model.clip.tokens.positions.weight.grad[model.config.n_clips:] == 0).all()
    assert (model.clip.tokens.positions.weight.grad[:model.config.n_clips] != 0).any(1).all()


def test_initial_weights():
    torch.manual_seed(0)
    model = PRVRModel(config(hidden_size=64, heads=4), 40, 40)
    for name, p in model.named_parameters():
        if name == "token":
            assert 0.7 < p.std() < 1.3
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert abs(p.mean()) < 0.01 and 0.015 < p.std() < 0.025, name


# Files

@pytest.fixture
def saved(tmp_path):
    "A model and the checkpoint of it."
    model = random_model()
    save_checkpoint(tmp_path/"best.safetensors", model, epoch=3, sum_r=201.5)
    return model, tmp_path/"best.safetensors"


def refuses(function, path, *words):
    "The call raises UserError whose one-line message names the file and holds the words."
    with pytest.raises(UserError) as caught:
        function()
    text = str(caught.value)
    assert str(path) in text and "\n" not in text, text
    for word in words:
        assert word in text, text


def test_checkpoint_round_trip_bit_for_bit(saved):
    model, path = saved
    again = load_checkpoint(path)
    assert again.config == model.config and (again.d_video, again.d_query) == (D_VIDEO, D_QUERY) and not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    batch = random_batch(model.config)
    for a, b in zip(again(batch), model(batch)):
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    header = path.read_bytes()
    facts = json.loads(json.loads(header[8:8 + int.from_bytes(header[:8], "little")])["__metadata__"]["facts"])
    assert facts == {"epoch": 3, "sum_r": 201.5}


def test_save_replaces_an_older_checkpoint(saved):
    _, path = saved
    other = random_model(seed=5)
    save_checkpoint(str(path), other)
    assert torch.equal(load_checkpoint(path).token, other.token)


def disk_is_full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("exists", [True, False])
def test_failed_save_leaves_no_half_file_under_the_final_name(saved, monkeypatch, exists):
    _, path = saved
    before = path.read_bytes()
    if not exists:
        path.unlink()
    monkeypatch.setattr(os, "fsync", disk_is_full)  # everything is written, and then not stored
    with pytest.raises(OSError, match="No space left on device.*best.safetensors'"):
        save_checkpoint(path, random_model(seed=5))
    assert not list(path.parent.glob("*.part"))
    assert path.exists() == exists
    if exists:
        assert path.read_bytes() == before
    monkeypatch.undo()
    path.with_name("best.safetensors.part").write_bytes(b"half of a file that a killed process has left")
    save_checkpoint(path, random_model(seed=5))
    assert [p.name for p in path.parent.iterdir()] == ["best.safetensors"]
    assert torch.equal(load_checkpoint(path).token, random_model(seed=5).token)


def test_facts_that_cannot_be_noted_leave_the_old_file(saved):
    model, path = saved
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, model, wrong={1, 2})
    assert path.read_bytes() == before


def test_killed_save_leaves_the_old_file(saved):
    _, path = saved
    before = path.read_bytes()
    program = """
import os, sys
import prvr_nb.training.checkpoints as m
model = m.load_checkpoint(sys.argv[1])
def killed(file):
    os.ftruncate(file, os.fstat(file).st_size // 2)
    os._exit(9)
os.fsync = killed
m.save_checkpoint(sys.argv[1], model, epoch=4)
"""
    root = str(Path(prvr_nb.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", program, str(path)], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert 0 < path.with_name(path.name + ".part").stat().st_size < len(before)
    assert path.read_bytes() == before
    load_checkpoint(path)


def test_load_of_what_is_not_there(tmp_path):
    refuses(lambda: load_checkpoint(tmp_path/"none.safetensors"), tmp_path/"none.safetensors", "does not exist", "name the .safetensors file")
    refuses(lambda: load_checkpoint(tmp_path), tmp_path, "name the .safetensors file")
    refuses(lambda: load_released(tmp_path/"none.ckpt", config()), tmp_path/"none.ckpt", "does not exist", "name a released checkpoint")


DAMAGE = {
    "empty": lambda whole, state: b"",
    "cut in the length": lambda whole, state: whole[:5],
    "cut in the header": lambda whole, state: whole[:200],
    "cut in the numbers": lambda whole, state: whole[:-1],
    "longer": lambda whole, state: whole + b"\0",
    "garbage": lambda whole, state: bytes(range(256)) * 20,
    "zeros": lambda whole, state: bytes(len(whole)),
    "pickle": lambda whole, state: pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(saved, damage):
    model, path = saved
    path.write_bytes(DAMAGE[damage](path.read_bytes(), model.state_dict()))
    refuses(lambda: load_checkpoint(path), path, "not a safetensors file", "load_released")


def test_torch_save_is_not_a_checkpoint(saved):
    model, path = saved
    torch.save(model.state_dict(), path)
    refuses(lambda: load_checkpoint(path), path, "pickle", "load_released")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"config": "yes"}, {"config": "3"}, {"config": "null"}, {"config": "[1, 2]"},
                                      {"config": '{"hidden_size": "wide"}'}, {"config": '{"merge_schedule": 3}'}, {"config": '{"no_such_setting": 1}'},
                                      {"config": '{"hidden_size": -1}'}, {"config": "{}"}], ids=str)
def test_foreign_safetensors(tmp_path, metadata):
    path = tmp_path/"foreign.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata=metadata)
    refuses(lambda: load_checkpoint(path), path, "; ")


@pytest.mark.parametrize("overrides", [{"hidden_size": 16}, {"merge_schedule": (16, 8)}, {"merge_schedule": (12, 10)}], ids=str)
def test_another_configuration(saved, overrides):
    model, path = saved
    save_file(model.state_dict(), path, metadata={"config": json.dumps(asdict(config(**overrides)))})
    refuses(lambda: load_checkpoint(path), path, "does not fit the configuration", "give the settings it was trained with")


@pytest.mark.parametrize("change", ["missing", "unknown", "flat", "no input width"])
def test_another_set_of_tensors(saved, change):
    model, path = saved
    state = dict(model.state_dict())
    if change == "missing": del state["token"]
    if change == "unknown": state["more"] = torch.ones(1)
    if change == "flat": state["frame.tokens.linear.weight"] = torch.ones(3)
    if change == "no input width": del state["query.tokens.linear.weight"]
    save_file(state, path, metadata={"config": json.dumps(asdict(model.config))})
    refuses(lambda: load_checkpoint(path), path, "does not fit the configuration", "give the settings it was trained with")


# The released format

def test_released_names_there_and_back():
    state = random_model().state_dict()
    released = to_released(state)
    back = from_released(released)
    assert back.keys() == state.keys() and len(released) == 299
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    assert sum(t.numel() for t in released.values()) == sum(t.numel() for t in state.values())  # each number once
    released["weight_token"].zero_()
    assert state["token"].abs().sum() > 0  # copies, not views


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("old_format", [False, True])
def test_load_released(tmp_path, wrapped, old_format):
    model, path = random_model(), tmp_path/"model.ckpt"
    state = to_released(model.state_dict())
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path, _use_new_zipfile_serialization=not old_format)
    loaded = load_released(path, model.config)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


class Program:
    "Unpickling it makes a folder."
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old_format", [False, True])
def test_load_released_executes_nothing(tmp_path, old_format):
    path, made, model = tmp_path/"model.ckpt", tmp_path/"made", random_model()
    torch.save({"state_dict": to_released(model.state_dict()), "config": Program(made)}, path, _use_new_zipfile_serialization=not old_format)
    refuses(lambda: load_released(path, model.config), path, "tensors only", "save its state_dict alone")
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # it would have


def test_load_checkpoint_executes_nothing(tmp_path):
    path, made = tmp_path/"best.safetensors", tmp_path/"made"
    path.write_bytes(pickle.dumps(Program(made)))
    refuses(lambda: load_checkpoint(path), path)
    assert not made.exists()


@pytest.mark.parametrize("held", ["tensor", "list", "empty", "tensor under state_dict", "string", "shape", "one missing", "one more", "number names", "garbage", "cut"])
def test_released_checkpoint_of_something_else(tmp_path, held):
    model, path = random_model(), tmp_path/"model.ckpt"
    state = to_released(model.state_dict())
    values = {"tensor": torch.ones(3), "list": [1, 2], "empty": {}, "tensor under state_dict": {"state_dict": torch.ones(2)},
              "string": {**state, "weight_token": "a"}, "shape": {**state, "clip_encoder.attn3.norm1.weight": torch.ones(7)},
              "one missing": {k: v for k, v in state.items() if k != "weight_token"}, "one more": {**state, "more": torch.ones(1)},
              "number names": {1: torch.ones(1), "a": torch.ones(1)}}
    torch.save(values.get(held, state), path)
    if held == "garbage": path.write_bytes(b"not a checkpoint at all")
    if held == "cut": path.write_bytes(path.read_bytes()[:1000])
    refuses(lambda: load_released(path, model.config), path)


def test_released_checkpoint_with_another_configuration(tmp_path):
    path = tmp_path/"model.ckpt"
    torch.save(to_released(random_model().state_dict()), path)
    refuses(lambda: load_released(path, config(hidden_size=16)), path, "does not fit the configuration", "give the settings it was trained with")


def test_build_model_names_its_source():
    refuses(lambda: build_model({}, config(), "there.safetensors"), "there.safetensors", "lacks", "frame.tokens.linear.weight")
