"""Features of one's own videos: the [EOS] row, models that are refused, resuming, bad files, a corpus, the command."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from makers import number_in, numbered, write_tiny_clip, write_video
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from prvr_nb.cli import features_command
from prvr_nb.config import published_config
from prvr_nb.data.corpus import check_corpus, corpus_paths, read_moments
from prvr_nb.data.prepared import prepare
from prvr_nb.evaluation.rows import zero_shot
from prvr_nb.files import UserError, hold_folder
from prvr_nb.videos import clip as clip_module
from prvr_nb.videos import features
from prvr_nb.videos.clip import encode_images, encode_text, fingerprint, load_encoder, sentence_embeddings
from prvr_nb.videos.features import Source, ahead, extract_features, extract_videos, part_path, read_manifest
from prvr_nb.videos.frames import frame_at
from prvr_nb.videos.images import extract_images, picture_at

SENTENCES = ["a man opens the fridge", "two dogs run", "a woman reads the newspaper in the garden"]


def pooled(output):
    "Embeddings that a model of transformers gives: a tensor in version 4, a named output in version 5."
    return getattr(output, "pooler_output", output).detach()


def last_rows(found):
    return torch.tensor(np.stack([rows[-1] for rows in found]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("model") / "clip", SENTENCES)


@pytest.fixture(scope="module")
def clip(model):
    return load_encoder(model, "cpu")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory, clip):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel
    folder = tmp_path_factory.mktemp("model") / "siglip"
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(size, vocab_size=len(clip.tokenizer), max_position_embeddings=16, projection_size=32, eos_token_id=1,
                pad_token_id=1, bos_token_id=0)
    torch.manual_seed(0)
    vision = dict(size, image_size=32, patch_size=16)
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    clip.tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return load_encoder(folder, "cpu")


@pytest.fixture
def folder(tmp_path):
    "Five good videos of six seconds."
    (tmp_path / "videos").mkdir()
    for k in range(5):
        write_video(tmp_path / "videos" / f"v{k}.mp4", [numbered(10 * k + i) for i in range(12)], rate=2)
    return tmp_path / "videos"


def command(folder, root, model, *flags, action="videos", dataset="mine"):
    where = ["--root", str(root), "--dataset", dataset, "--model", str(model)]
    return features_command([action, str(folder), *where, *flags])


# sentences and images

def test_the_last_row_is_the_models_own_sentence_embedding(clip):
    sentences = [*SENTENCES, "man", "dogs " * 200]
    found = encode_text(sentences, clip)
    assert_close(last_rows(found), sentence_embeddings(sentences, clip))
    tokens = clip.tokenizer(sentences, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert_close(last_rows(found), pooled(clip.model.get_text_features(**tokens)))
    assert [rows.shape for rows in found] == [(7, 24), (5, 24), (10, 24), (3, 24), (77, 24)]
    assert found[0].dtype == np.float32
    for raw, joint in zip(encode_text(sentences, clip, raw_tokens=True), found, strict=True):
        assert raw.shape == (len(joint), 32)
        assert_close(clip.model.text_projection(torch.tensor(raw)).detach(), torch.tensor(joint))


def test_siglip(siglip):
    sentences = [*SENTENCES, "dogs " * 200]
    found = encode_text(sentences, siglip)
    assert [len(rows) for rows in found] == [1 + 5 + 1, 1 + 3 + 1, 1 + 8 + 1, 16]  # start token, words, pooled position
    tokens = clip_module.tokenize(sentences, siglip)
    assert_close(last_rows(found), pooled(siglip.model.get_text_features(input_ids=tokens["input_ids"])))
    assert clip_module.kept_rows(tokens, siglip)[1] == [0, 1, 2, 3, 15]
    assert encode_text(sentences, siglip, raw_tokens=True)[0].shape == (7, 32)
    image = numbered(5)
    expected = pooled(siglip.model.get_image_features(**siglip.processor(images=image, return_tensors="pt"))).numpy()
    np.testing.assert_allclose(encode_images([image], siglip), expected, atol=1e-5)


def test_padding_and_batches_change_nothing(clip, monkeypatch):
    images = [numbered(n) for n in range(5)]
    expected = pooled(clip.model.get_image_features(**clip.processor(images=images, return_tensors="pt"))).numpy()
    together = encode_text(SENTENCES, clip)
    for size in 64, 2, 1:
        monkeypatch.setattr(clip_module, "BATCH", size)
        np.testing.assert_allclose(encode_images(images, clip), expected, atol=1e-5)
        for a, b in zip(together, encode_text(SENTENCES, clip), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_fingerprints_differ_between_models_only(clip, model, tmp_path, monkeypatch):
    half = clip._replace(model=load_encoder(model, "cpu").model.to(torch.bfloat16))
    for a, b in zip(encode_text(SENTENCES, clip), encode_text(SENTENCES, half), strict=True):
        assert b.dtype == np.float32 and torch.cosine_similarity(torch.tensor(a[-1]), torch.tensor(b[-1]), dim=0) > 0.99
    assert encode_images([numbered(3)], half).dtype == np.float32
    copy = load_encoder(shutil.copytree(model, tmp_path / "copy"), "cpu")
    other = load_encoder(write_tiny_clip(tmp_path / "other", SENTENCES, seed=1), "cpu")
    assert fingerprint(copy) == fingerprint(clip) == fingerprint(half) != fingerprint(other)
    monkeypatch.chdir(model.parent)  # a search may start in another folder
    assert load_encoder(model.name, "cpu").name == str(model.resolve())


# models that cannot be used

def changed_weights(model, folder, change):
    "A copy of a model with other weights."
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_models_that_cannot_be_used(tmp_path, monkeypatch, model, clip):
    from transformers import BertConfig, BertModel
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    bert = shutil.copytree(model, tmp_path / "bert")
    BertModel(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=16)).save_pretrained(bert)

    def blind(weights):
        for name in [name for name in weights if name.startswith("vision_model")]:
            del weights[name]
    blinded = changed_weights(model, tmp_path / "blind", blind)
    broken = changed_weights(model, tmp_path / "nan", lambda w: w["visual_projection.weight"].fill_(np.nan))
    for name, message in [("nobody/nothing", "nobody/nothing cannot be loaded .*hub.*internet.*folder"),
                          (tmp_path / "gone", "gone does not exist; name a folder"),
                          (tmp_path / "empty", "empty cannot be loaded"), (bert, "not of CLIP's or SigLIP's kind"),
                          (blinded, "lacks .* weights, vision_model"), (broken, "not finite")]:
        with pytest.raises(UserError, match=message) as error:
            load_encoder(name)
        assert "\n" not in str(error.value)
    text_only = clip._replace(model=clip.model.text_model)
    with pytest.raises(UserError, match="not of CLIP's"):
        clip_module.check_encoder(text_only)


@pytest.mark.parametrize("kind", ["clip", "something new"])
def test_a_models_own_code_is_never_run(tmp_path, monkeypatch, model, kind):
    "transformers would ask on the terminal; here somebody has typed y."
    folder, asked = shutil.copytree(model, tmp_path / "evil"), []
    ran = tmp_path / "it ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import CLIPConfig as C, CLIPModel as M"
    (folder / "evil.py").write_text(code)
    for name in "config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json":
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            content["auto_map"] = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.C", None],
                                   "AutoImageProcessor": "evil.C"}
            if name == "config.json":
                content["model_type"] = kind
            (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    if kind == "clip":
        assert load_encoder(folder, "cpu").name == str(folder)
    else:
        with pytest.raises(UserError, match="cannot be loaded"):
            load_encoder(folder, "cpu")
    assert not asked and not ran.exists()


def test_torchvision_is_not_needed(clip):
    bases = " ".join(base.__name__ for base in type(clip.processor).__mro__)
    assert "Torchvision" not in bases and "Fast" not in bases


# a run that may be stopped

def test_ahead_is_bounded_and_passes_errors_on():
    made = []

    def items():
        for i in range(10):
            made.append(i)
            yield i
        raise ValueError("end")
    stream = ahead(items(), 3)
    assert next(stream) == 0
    time.sleep(0.1)
    assert len(made) <= 5
    with pytest.raises(ValueError, match="end"):
        list(stream)
    assert list(ahead(iter("abc"), 5)) == ["a", "b", "c"] and list(ahead([], 2)) == []


def counted(reads, number, key=0):
    "A source that notes that it is read."
    def images(info):
        reads.append(number)
        yield numbered(number), 1
        yield numbered(number + 1), 3
    return Source(f"s{number}", {"number": number, "key": key}, images)


def test_finished_videos_are_not_read_again(tmp_path, clip):
    target, reads = tmp_path / "x.h5", []

    def extract(*sources):
        return extract_features(list(sources), clip, target, {"a": 1}, quiet=True)[0]
    infos = extract(*(counted(reads, n) for n in range(4)))
    state = target.stat().st_mtime_ns
    assert extract(*(counted(reads, n) for n in range(4))) == infos
    assert reads == [0, 1, 2, 3] and target.stat().st_mtime_ns == state  # not even written
    with h5py.File(target) as file:
        old = {id: file[id][:] for id in file}
    assert {id: rows.shape for id, rows in old.items()} == {f"s{n}": (4, 24) for n in range(4)}
    np.testing.assert_array_equal(old["s1"][1], old["s1"][3])
    extract(*(counted(reads, n, key=n == 2) for n in (1, 2, 3, 4)))
    assert reads[4:] == [2, 4]  # one changed, one new; one is gone
    with h5py.File(target) as file:
        assert set(file) == {"s1", "s2", "s3", "s4"} and file.attrs["a"] == 1
        np.testing.assert_array_equal(file["s1"][:], old["s1"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]


def test_damaged_leftovers_are_made_again(tmp_path, clip):
    target, reads = tmp_path / "x.h5", []
    target.write_bytes(b"no HDF5")
    part_path(target, "s0").parent.mkdir()
    part_path(target, "s0").write_bytes(b"\0" * 20)
    part_path(target, "s1").with_suffix(".safetensors.part").write_bytes(b"half")
    assert not extract_features([counted(reads, 0)], clip, target, {}, quiet=True)[1] and reads == [0]
    with h5py.File(target) as file:
        assert set(file) == {"s0"}


KILLED = """
import sys, time
from prvr_nb import cli
from prvr_nb.videos import features
real = features.video_images
def slow(path, rate, info):
    for image in real(path, rate, info):
        time.sleep(0.12)
        yield image
features.video_images = slow
sys.exit(cli.features_command(sys.argv[1:]))
"""


def test_a_killed_run_continues(folder, tmp_path, model, monkeypatch):
    arguments = ["videos", str(folder), "--root", str(tmp_path), "--dataset", "mine", "--model", str(model)]
    target = corpus_paths(tmp_path, "mine").video
    paths = {f"v{k}": part_path(target, f"v{k}") for k in range(5)}
    run = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.DEVNULL)
    while sum(path.exists() for path in paths.values()) < 2 and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = {id for id, path in paths.items() if path.exists()}
    assert 2 <= len(kept) < 5 and not target.exists()
    reads, real = [], features.video_images
    monkeypatch.setattr(features, "video_images", lambda path, *more: reads.append(path.stem) or real(path, *more))
    extract_videos(folder, tmp_path, "mine", model=model, quiet=True)
    assert set(reads) == set(paths) - kept
    with h5py.File(target) as file:
        assert {id: file[id].shape for id in file} == dict.fromkeys(paths, (6, 24))


def test_one_dataset_is_written_by_one_run(folder, tmp_path, model, capsys):
    with hold_folder(tmp_path / "mine", "held", "folder"):
        assert command(folder, tmp_path, model) == 1
    assert "mine is being written by another prvr_features" in capsys.readouterr().err
    assert not corpus_paths(tmp_path, "mine").video.parent.exists()
    assert command(folder, tmp_path, model) == 0


LIMITED = """
import resource, sys
from prvr_nb.cli import features_command
for limit in 300, 2000: # too little for a part, too little for all of them together
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    assert features_command(sys.argv[1:]) == 1
"""


def test_a_full_disk_is_a_message_and_the_rest_is_kept(folder, tmp_path, model):
    arguments = ["videos", str(folder), "--root", str(tmp_path), "--dataset", "mine", "--model", str(model)]
    done = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True)
    messages = [line for line in done.stderr.splitlines() if line.startswith("prvr_features: ")]
    assert done.returncode == 0 and len(messages) == 2, done.stderr
    assert all("(File too large); make room and run the command again" in message for message in messages)
    assert len(list(part_path(corpus_paths(tmp_path, "mine").video, "").parent.glob("*.safetensors"))) == 5
    assert not list(tmp_path.rglob("*.part")) and command(folder, tmp_path, model) == 0


# one bad file

def test_bad_files_are_reported_one_by_one(tmp_path, model, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    good = write_video(videos / "good.mp4", [numbered(i) for i in range(50)])
    long = "é" * 125 + ".mp4"  # 254 bytes
    shutil.copy(good, videos / long)
    deep = videos.joinpath(*["folder" * 20] * 30)
    place = os.getcwd()
    os.chdir(videos)  # a path of 3,600 characters, step by step
    for part in deep.relative_to(videos).parts:
        os.mkdir(part)
        os.chdir(part)
    shutil.copy(good, "deep.mp4")
    os.chdir(place)
    (videos / "half.mp4").write_bytes(good.read_bytes()[:1000])
    os.mkfifo(videos / "pipe.mp4")
    (videos / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    assert command(videos, tmp_path, model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/mine: 3 videos, 6 frames (1 per second")
    assert lines[1:] == ["  left out: half.mp4: not a picture or video, or a damaged one",
                         "  left out: list.mp4: not a picture or video, or a damaged one",
                         "  left out: pipe.mp4: not a regular file"]
    assert {len(id) for id in read_manifest(tmp_path, "mine")["videos"]} == {4, 125, 30 * 121 + 4}


def test_a_folder_that_holds_nothing_to_read(tmp_path, model, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    with pytest.raises(UserError, match="holds no file that ends in"):
        extract_videos(videos, tmp_path, "mine")
    for name in "a.mp4", "b.mkv", ".hidden.mp4":
        (videos / name).touch()
    assert command(videos, tmp_path, model) == 1
    assert "none of the 2 videos could be read" in capsys.readouterr().err
    assert not (tmp_path / "mine" / "FeatureData").exists()


def test_a_file_or_folder_without_permission_is_reported(clip):
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    user = os.geteuid()
    try:
        (folder / "closed").mkdir()
        paths = [write_video(folder / name, [numbered(7)]) for name in ("0.mp4", "1.mp4", "closed/2.mp4")]
        for path, mode in (folder, 0o755), (paths[0], 0), (paths[1], 0o644), (folder / "closed", 0):
            path.chmod(mode)
        if user == 0:
            os.seteuid(65534)
        sources = features.video_sources(folder, 1.)
        found = [(source.id, rows is not None, info.get("broken"))
                 for source, rows, info in features.encode_sources(sources, clip)]
    finally:
        if user == 0:
            os.seteuid(user)
        shutil.rmtree(folder)
    assert found == [("0", False, "Permission denied"), ("1", True, None),
                     ("closed", False, "a folder that cannot be listed")]


# a corpus

def write_table(path, moments=True):
    lines = [f'v{k}.mp4,"{sentence}",{"1,3" if moments else ","}' for k in range(5) for sentence in SENTENCES]
    path.write_text("\n".join(["video,sentence,start,end", *lines, "v9.mp4,gone,,"]))
    return path


def moments_of(root, dataset):
    return {**read_moments(root, dataset, "train"), **read_moments(root, dataset, "val")}


def test_videos_become_a_corpus(folder, tmp_path, model, clip):
    report = extract_videos(folder, tmp_path, "mine", write_table(tmp_path / "c.csv"), model, quiet=True)
    assert report[0].startswith(f"{tmp_path}/mine: 5 videos, 30 frames (1 per second")
    assert report[0].endswith("9 train and 6 val queries")
    assert report[1:] == ["  captions of 1 video without features left out (v9)"]
    assert check_corpus(tmp_path, "mine") == ["mine train: 3 videos (6–6 frames), 9 queries (5–10 tokens)",
                                              "mine val: 2 videos (6–6 frames), 6 queries (5–10 tokens)"]
    manifest = read_manifest(tmp_path, "mine")
    assert manifest.keys() == {"format", "model", "fingerprint", "rate", "raw_tokens", "folder", "videos"}
    assert manifest["folder"] == str(folder) and manifest["rate"] == 1
    assert manifest["videos"]["v3"] == {"file": "v3.mp4", "duration": 6.0, "n_frames": 6}
    with h5py.File(corpus_paths(tmp_path, "mine").video) as file:
        assert dict(file.attrs) == {name: value for name, value in manifest.items() if name != "videos"}
        shown = [frame_at(folder / "v2.mp4", second) for second in range(6)]
        np.testing.assert_allclose(file["v2"][:], encode_images(shown, clip), atol=1e-5)
    moments = moments_of(tmp_path, "mine")
    assert set(moments) == {(f"v{k}", sentence) for k in range(5) for sentence in SENTENCES}
    assert set(moments["v0", SENTENCES[0]]) == {(1., 3., 6.)}
    corpus, = prepare(tmp_path, published_config("mine"), ("val",), quiet=True)
    assert 0 <= zero_shot(corpus, "cpu")[0]["r1"] <= 100
    assert number_in(picture_at(manifest, "v3", 2.5)) == 35
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(".*.parts"))


def test_captions_may_be_added_later_and_kept(folder, tmp_path, model):
    extract_videos(folder, tmp_path, "mine", model=model, quiet=True)
    assert not (tmp_path / "mine" / "TextData").exists()

    def texts():
        return {path.name: path.read_text() for path in (tmp_path / "mine" / "TextData").glob("*.txt")}
    extract_videos(folder, tmp_path, "mine", write_table(tmp_path / "c.csv", moments=False), model, quiet=True)
    before = texts()
    assert len(before) == 2 and not list((tmp_path / "mine").rglob("*release.jsonl"))
    extract_videos(folder, tmp_path, "mine", model=model, raw_tokens=True, quiet=True)
    assert texts() == before
    with h5py.File(corpus_paths(tmp_path, "mine").text) as file:
        assert file["v0#enc#0"].shape == (7, 32) and bool(file.attrs["raw_tokens"])
    with pytest.raises(UserError, match="leave out --captions"):
        extract_videos(folder, tmp_path, "mine", corpus_paths(tmp_path, "mine").captions, model)


def test_another_rate_or_model_starts_anew(folder, tmp_path, model):
    other = write_tiny_clip(tmp_path / "other", SENTENCES, seed=1)
    for name, rate, shape in (model, 1., (6, 24)), (model, 2., (12, 24)), (other, 2., (12, 24)):
        extract_videos(folder, tmp_path, "mine", model=name, rate=rate, quiet=True)
        with h5py.File(corpus_paths(tmp_path, "mine").video) as file:
            assert file["v0"].shape == shape and file.attrs["model"] == str(name)


def test_foreign_features_are_never_written_over(folder, tmp_path, model, capsys):
    path = corpus_paths(tmp_path, "tvr").video
    path.parent.mkdir(parents=True)
    for content in b"no HDF5", None:
        if content:
            path.write_bytes(content)
        else:
            with h5py.File(path, "w") as file:
                file["x"] = np.zeros((2, 3))
        before = path.read_bytes()
        assert command(folder, tmp_path, model, dataset="tvr") == 1
        message = capsys.readouterr().err
        assert ("delete it" if content else "choose another --dataset") in message and path.read_bytes() == before


@pytest.mark.parametrize("change, message", [
    (["--rate", "0"], "--rate is 0.0; it must be above 0"), (["--rate", "nan"], "--rate is nan"),
    (["--val-share", "1"], "--val-share is 1.0"), (["--dataset", "a/b"], "without slashes"),
    (["--captions", "OTHER"], "captions name film1, the videos are v0, v1, v2"),
    (["--captions", "MISSING"], "MISSING does not exist"), ([], "v1.mp4 and v1.webm would both be called v1")])
def test_mistakes_are_found_before_the_model_is_loaded(folder, tmp_path, capsys, change, message):
    (tmp_path / "OTHER").write_text("video,sentence\nfilm1,a dog\n")
    if not change:
        (folder / "v1.webm").touch()
    change = [str(tmp_path / word) if word.isupper() else word for word in change]
    assert command(folder, tmp_path, "nobody/nothing", *change) == 1
    assert message in capsys.readouterr().err


def test_the_former_name_of_the_flag_is_understood(folder, tmp_path, model, capsys):
    where = ["--root", str(tmp_path), "--name", "mine", "--model", str(model)]
    assert features_command(["videos", str(folder), *where]) == 0
    assert (tmp_path / "mine").is_dir()
    for action in "videos", "images":
        with pytest.raises(SystemExit) as end:
            features_command([action, "--help"])
        shown = capsys.readouterr().out
        flags = "--captions --root --dataset --model --rate --raw-tokens --val-share --seed"
        assert end.value.code == 0 and all(flag in shown for flag in flags.split()) and "--name" not in shown


# composed videos

@pytest.fixture
def pictures(tmp_path):
    "Forty captioned pictures; captions.txt names another one that is not there."
    (tmp_path / "images" / "sub").mkdir(parents=True)
    table = ["image,caption"]
    for n in range(41):
        name = f"{'sub/' if n % 2 else ''}{n}.png"
        table += [f'{name},"picture {n}, one"', f"{name},picture {n} two ."]
        if n < 40:
            numbered(n).save(tmp_path / "images" / name)
    (tmp_path / "captions.txt").write_text("\n".join(table))
    return tmp_path / "images"


def test_images_become_a_corpus_with_moments(pictures, tmp_path, model, clip):
    (pictures / "sub" / "7.png").write_text("no picture")
    report = extract_images(pictures, tmp_path, "composed", tmp_path / "captions.txt", model, rate=2., quiet=True)
    assert sum("without sub/7.png: cannot identify image file" in line for line in report) == 1
    assert report[0].endswith("queries")
    manifest = read_manifest(tmp_path, "composed")
    shots = {int(Path(shot["file"]).stem): (video, shot)
             for video, entry in manifest["videos"].items() for shot in entry["shots"]}
    assert sorted(shots) == [n for n in range(40) if n != 7]
    with h5py.File(corpus_paths(tmp_path, "composed").video) as file:
        for n, (video, shot) in shots.items():
            entry = manifest["videos"][video]
            assert entry["duration"] == entry["n_frames"] / 2 == entry["shots"][-1]["end"]
            expected = encode_images([Image.open(pictures / shot["file"]).convert("RGB")], clip)
            rows = file[video][round(2 * shot["start"]):round(2 * shot["end"])]
            assert 4 <= len(rows) <= 12
            np.testing.assert_allclose(rows, np.repeat(expected, len(rows), 0), atol=1e-5)
            for second in shot["start"], shot["end"] - 0.01:
                assert number_in(picture_at(manifest, video, second)) == n
    moments = moments_of(tmp_path, "composed")
    assert len(moments) == 78
    for (video, sentence), (moment,) in moments.items():
        home, shot = shots[int(sentence.split()[1].rstrip(","))]
        assert (home, moment.start, moment.end) == (video, shot["start"], shot["end"])
        assert moment.duration == manifest["videos"][video]["duration"]
    check_corpus(tmp_path, "composed")


def test_images_without_captions_are_refused(pictures, tmp_path, capsys):
    (tmp_path / "c.txt").write_text("image,caption\nelse.png,a dog\n")
    assert command(pictures, tmp_path, "nobody/nothing", "--captions", str(tmp_path / "c.txt"), action="images") == 1
    assert "0 captioned images were found" in capsys.readouterr().err
