"""Checkpoints: round trips of ours and of the released code's, files of before, and everything that is none."""
import json
import os
import pickle
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from test_model import D_QUERY, D_VIDEO, config, random_batch, random_model

from prvr_nb.config import RENAMED
from prvr_nb.files import UserError
from prvr_nb.training.checkpoints import (
    build_model,
    from_released,
    load_checkpoint,
    load_released,
    open_checkpoint,
    save_checkpoint,
    to_released,
)


@pytest.fixture
def saved(tmp_path):
    "A model and the checkpoint of it."
    model = random_model()
    save_checkpoint(tmp_path / "best.safetensors", model, epoch=3, sum_r=201.5)
    return model, tmp_path / "best.safetensors"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refuses(function, path, *words):
    "The call raises UserError whose one-line message names the file and holds the words."
    with pytest.raises(UserError) as caught:
        function()
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and all(word in text for word in words), text


def test_a_checkpoint_comes_back_bit_for_bit(saved):
    model, path = saved
    again = load_checkpoint(path)
    assert again.config == model.config and (again.d_video, again.d_query) == (D_VIDEO, D_QUERY) and not again.training
    assert same(again.state_dict(), model.state_dict())
    batch = random_batch(model.config)
    assert all(torch.equal(a, b) for a, b in zip(again(batch), model(batch), strict=True))
    header = path.read_bytes()
    notes = json.loads(header[8:8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert json.loads(notes["facts"]) == {"epoch": 3, "sum_r": 201.5}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_equal_models_give_equal_files(saved):
    model, path = saved
    before = path.read_bytes()
    for _ in range(5): # a dictionary of notes has another order in each run of safetensors
        save_checkpoint(path, load_checkpoint(path), epoch=3, sum_r=201.5)
        assert path.read_bytes() == before
    save_checkpoint(str(path), random_model(seed=5))
    assert not torch.equal(load_checkpoint(path).token, model.token)


def test_facts_that_cannot_be_noted_leave_the_old_file(saved):
    model, path = saved
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, model, wrong={1, 2})
    assert path.read_bytes() == before


def test_files_of_earlier_versions_open(saved):
    model, path = saved
    tensors = {name.replace("cbva_projection.", "project."): t for name, t in model.state_dict().items()}
    earlier = {new: old for old, new in RENAMED.items()}
    settings = {earlier.get(name, name): value for name, value in asdict(model.config).items()}
    assert "hidden" in settings and "project.weight" in tensors
    save_file(tensors, path, metadata={"config": json.dumps(settings)})
    again = load_checkpoint(path)
    assert again.config == model.config and same(again.state_dict(), model.state_dict())


def test_load_of_what_is_not_there(tmp_path):
    none = tmp_path / "none.safetensors"
    refuses(lambda: load_checkpoint(none), none, "does not exist", "name the .safetensors file")
    refuses(lambda: open_checkpoint(tmp_path), tmp_path, "name the .safetensors file")
    none = tmp_path / "none.ckpt"
    refuses(lambda: load_released(none, config()), none, "does not exist", "name a released checkpoint")
    refuses(lambda: open_checkpoint(none), none, "add --dataset")


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


def test_a_flipped_bit_is_noticed(saved):
    model, path = saved
    before = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(8, len(before), (100,), generator=generator).tolist():
        path.write_bytes(before[:place] + bytes([before[place] ^ 1 << place % 8]) + before[place + 1:])
        refuses(lambda: load_checkpoint(path), path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(saved, damage):
    model, path = saved
    path.write_bytes(DAMAGE[damage](path.read_bytes(), model.state_dict()))
    refuses(lambda: load_checkpoint(path), path, "not a safetensors file", "load_released")


NOTES = [None, {"format": "pt"}, *({"config": text} for text in (
    "yes", "3", "null", "[1, 2]", "[" * 100_000, '{"hidden_size": "wide"}', '{"merge_schedule": 3}',
    '{"no_such_setting": 1}', '{"hidden_size": -1}', "{}"))]


@pytest.mark.parametrize("notes", NOTES, ids=lambda notes: str(notes)[:40])
def test_foreign_safetensors(tmp_path, notes):
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata=notes)
    refuses(lambda: load_checkpoint(path), path, "; ")


OTHER = {"hidden_size": lambda state: {"hidden_size": 16}, "frames": lambda state: {"merge_schedule": (16, 8)},
         "clips": lambda state: {"merge_schedule": (12, 10)}, "missing": lambda state: state.pop("token"),
         "unknown": lambda state: state.update(more=torch.ones(1)),
         "flat": lambda state: state.update({"frame.tokens.linear.weight": torch.ones(3)}),
         "no input width": lambda state: state.pop("query.tokens.linear.weight")}


@pytest.mark.parametrize("change", OTHER)
def test_weights_that_do_not_fit_their_configuration(saved, change):
    model, path = saved
    state = dict(model.state_dict())
    changed = OTHER[change](state)
    settings = config(**changed) if isinstance(changed, dict) else model.config
    save_file(state, path, metadata={"config": json.dumps(asdict(settings))})
    refuses(lambda: load_checkpoint(path), path, "does not fit the configuration", "give the settings it was trained")


# ---------------------------------------------------------------- the released format

def test_released_names_there_and_back():
    state = random_model().state_dict()
    released = to_released(state)
    assert same(from_released(released), state) and len(released) == 299
    assert sum(t.numel() for t in released.values()) == sum(t.numel() for t in state.values()) # each number once
    released["weight_token"].zero_()
    assert state["token"].abs().sum() > 0 # copies, not views


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("old_format", [False, True])
def test_load_released(tmp_path, wrapped, old_format):
    model, path = random_model(), tmp_path / "model.ckpt"
    state = to_released(model.state_dict())
    held = {"state_dict": state, "epoch": 3} if wrapped else state
    torch.save(held, path, _use_new_zipfile_serialization=not old_format)
    loaded = load_released(path, model.config)
    assert not loaded.training and same(loaded.state_dict(), model.state_dict())
    refuses(lambda: load_released(path, config(hidden_size=16)), path, "does not fit the configuration")


class Program:
    "Unpickling it makes a folder."
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old_format", [False, True])
def test_nothing_is_executed(tmp_path, old_format):
    path, made, model = tmp_path / "model.ckpt", tmp_path / "made", random_model()
    held = {"state_dict": to_released(model.state_dict()), "config": Program(made)}
    torch.save(held, path, _use_new_zipfile_serialization=not old_format)
    refuses(lambda: load_released(path, model.config), path, "tensors only", "save its state_dict alone")
    ours = tmp_path / "best.safetensors"
    ours.write_bytes(pickle.dumps(Program(made)))
    refuses(lambda: load_checkpoint(ours), ours)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists() # it would have


HELD = {"tensor": lambda state: torch.ones(3), "list": lambda state: [1, 2], "empty": lambda state: {},
        "tensor under state_dict": lambda state: {"state_dict": torch.ones(2)},
        "string": lambda state: {**state, "weight_token": "a"},
        "shape": lambda state: {**state, "clip_encoder.attn3.norm1.weight": torch.ones(7)},
        "one missing": lambda state: {k: v for k, v in state.items() if k != "weight_token"},
        "one more": lambda state: {**state, "more": torch.ones(1)},
        "number names": lambda state: {1: torch.ones(1), "a": torch.ones(1)}}


@pytest.mark.parametrize("held", [*HELD, "garbage", "cut"])
def test_released_checkpoint_of_something_else(tmp_path, held):
    model, path = random_model(), tmp_path / "model.ckpt"
    state = to_released(model.state_dict())
    torch.save(HELD[held](state) if held in HELD else state, path)
    if held not in HELD:
        path.write_bytes({"garbage": b"not a checkpoint at all", "cut": path.read_bytes()[:1000]}[held])
    refuses(lambda: load_released(path, model.config), path)


def test_build_model_names_its_source():
    refuses(lambda: build_model({}, config(), "there.ckpt"), "there.ckpt", "lacks", "frame.tokens.linear.weight")
