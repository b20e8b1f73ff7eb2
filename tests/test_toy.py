"""The toy corpus: the same files for the same seed, what its features promise, and what writing it may not destroy."""
import h5py
import numpy as np
import pytest

from prvr_nb.data import toy
from prvr_nb.data.corpus import check_corpus, corpus_paths, read_moments
from prvr_nb.data.toy import ToyWorld, draw_split, sentence_features, toy_seed, write_toy
from prvr_nb.files import UserError


def contents(root):
    "Everything that the dataset's files hold."
    paths = corpus_paths(root, "toy")
    found = {p.name: p.read_text() for p in paths.captions.parent.glob("*") if p.suffix != ".h5"}
    for path in paths.text, paths.video:
        with h5py.File(path) as file:
            found |= {f"{path.parent.name}/{key}": file[key][:].tobytes() for key in file}
    return found


def test_the_seed_decides_everything(tmp_path):
    for name, seed in ("a", 3), ("b", 3), ("c", 4):
        write_toy(tmp_path / name, 5, 3, seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    assert [toy_seed(tmp_path / name) for name in "abc"] == [3, 3, 4]
    assert len(check_corpus(tmp_path / "a", "toy")) == 2


def test_moments_are_where_frames_show_them(tmp_path):
    write_toy(tmp_path, 4, 30)
    world, moments = ToyWorld(), read_moments(tmp_path, "toy", "val")
    inside, outside = [], []
    for id, video, events in draw_split(world, "val", 30, 0):
        for event in events:
            assert [(m.start, m.end) for m in moments[id, event.sentence]].count((event.start, event.end)) == 1
            query = sentence_features(world, event.sentence)[-1] - world.text_mean
            cosine = (video.frames - world.video_mean) @ query / np.linalg.norm(query)
            within = np.zeros(len(cosine), dtype=bool)
            within[event.start:event.end] = True
            inside.append(cosine[within].mean())
            outside.append(cosine[~within].mean())
    assert np.mean(np.array(inside) > outside) > 0.9


def test_sentences_share_a_mean_and_differ_by_meaning():
    world = ToyWorld()
    sentences = ["a chef in blue plants tulips", "a man in white plants tulips", "a girl in red lifts a barbell"]
    x = np.stack([sentence_features(world, s)[-1] for s in sentences])

    def cosines(x):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return x[0] @ x[1:].T
    assert cosines(x).min() > 0.3 and cosines(x - world.text_mean)[1] < 0.1 < 0.3 < cosines(x - world.text_mean)[0]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_an_impossible_seed_costs_nothing(tmp_path, seed):
    write_toy(tmp_path, 4, 3)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="must lie between"):
        write_toy(tmp_path, 4, 3, seed)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_an_older_corpus_stays_until_the_new_one_is_complete(tmp_path, monkeypatch, error):
    write_toy(tmp_path, 4, 3)
    before, real = contents(tmp_path), toy.write_toy_split

    def fails(root, world, split, n_videos, seed):
        real(root, world, split, n_videos, seed)
        if split == "val":
            raise error
    monkeypatch.setattr(toy, "write_toy_split", fails)
    with pytest.raises(type(error)):
        write_toy(tmp_path, 4, 3, seed=1)
    assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_what_is_not_the_toy_corpus_stays(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "holiday.mp4").write_text("mine")
    with pytest.raises(UserError, match="holds holiday.mp4, which is not the toy corpus"):
        write_toy(tmp_path, 4, 3)
    assert (tmp_path / "toy" / "holiday.mp4").read_text() == "mine"
