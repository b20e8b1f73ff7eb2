"""Features of one's own videos: time, rotation, damage, the [EOS] row, resuming, captions, composed videos, the command."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from prvr_nb import cli
from prvr_nb.videos import clip, features, frames, images
from prvr_nb.config import published_config
from prvr_nb.files import UserError
from prvr_nb.data.corpus import check_corpus, corpus_paths, read_moments
from prvr_nb.evaluation.rows import zero_shot
from prvr_nb.cli import features_command
from prvr_nb.videos.captions import Row, held_out, read_rows, video_id
from prvr_nb.videos.clip import (
    encode_images, encode_text, kept_rows, load_encoder, sentence_embeddings, tokenize, write_tiny_clip,
)
from prvr_nb.videos.features import (
    Source, ahead, extract_features, extract_videos, fingerprint, parts_folder, read_manifest,
)
from prvr_nb.videos.frames import frame_at, sampled, video_images, write_video
from prvr_nb.videos.images import compose, extract_images, picture_at, read_image_captions
from prvr_nb.data.prepared import prepare

SENTENCES = ["a man opens the fridge", "two dogs run", "a woman reads the newspaper in the garden"]
SIZE = (64, 48)


def numbered(number, size=SIZE):
    "A picture with a number in it, as twelve black or white bars, which any codec keeps."
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for bit in range(12):
        if number >> bit & 1: pixels[:, bit * 5:bit * 5 + 5] = 255
    return Image.fromarray(pixels)


def number_in(image):
    "The number that `numbered` wrote into a picture."
    pixels = np.asarray(image.convert("L"))
    return sum(1 << bit for bit in range(12) if pixels[:, bit * 5 + 1:bit * 5 + 4].mean() > 128)


def rows_of(path, rate=1.):
    "Numbers seen in the rows of a video, and the facts about it."
    info = {}
    return [number_in(image) for image, looks in video_images(Path(path), rate, info) for _ in range(looks)], info


def quarters(size=(96, 64)):
    "A picture whose left half is red, upper right green, lower right blue."
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :size[0] // 2, 0] = 255
    pixels[:size[1] // 2, size[0] // 2:, 1] = 255
    pixels[size[1] // 2:, size[0] // 2:, 2] = 255
    return Image.fromarray(pixels)


def pooled(output):
    "Embeddings that a model of transformers gives: a tensor in version 4, a named output in version 5."
    return getattr(output, "pooler_output", output).detach()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("model") / "clip", SENTENCES)


@pytest.fixture(scope="module")
def clip(model):
    return load_encoder(model, "cpu")


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory, model):
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel
    folder = tmp_path_factory.mktemp("model") / "siglip"
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    SiglipModel(SiglipConfig(text_config=dict(size, vocab_size=len(tokenizer), max_position_embeddings=16, projection_size=32, eos_token_id=1, pad_token_id=1, bos_token_id=0),
                             vision_config=dict(size, image_size=32, patch_size=16))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    "Five good videos of six seconds."
    (tmp_path / "videos").mkdir()
    for k in range(5): write_video(tmp_path / "videos" / f"v{k}.mp4", [numbered(10 * k + i) for i in range(12)], rate=2)
    return tmp_path / "videos"


# time

@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.mpg", "mpeg2video"), ("a.mov", "libx265")])
def test_every_container_gives_the_frame_of_each_second(tmp_path, name, codec):
    path = write_video(tmp_path / name, [numbered(i) for i in range(250)], codec=codec)
    seen, info = rows_of(path)
    assert seen == [25 * i for i in range(10)] and info["duration"] == pytest.approx(10, abs=0.05) and "notes" not in info
    assert rows_of(path, 2)[0] == [round(12.5 * i - 0.01) for i in range(20)] # 12.5 → frame 12 is on the screen
    assert rows_of(path, 0.3)[0] == [0, 83, 166]
    for second in 0, 3, 7.02, 9.97: assert number_in(frame_at(path, second)) == int(25 * second + 1e-6)
    assert number_in(frame_at(path, 99)) == 249 and number_in(frame_at(path, 0)) == 0


@pytest.mark.parametrize("name, codec", [("v.mp4", "libx264"), ("v.webm", "libvpx-vp9"), ("v.mkv", "libx264")])
def test_variable_frame_rate(tmp_path, name, codec):
    times = [0, 0.1, 0.2, 0.9, 1, 4.2, 4.3, 4.4, 9]
    path = write_video(tmp_path / name, [numbered(i) for i in range(9)], times, rate=100, codec=codec)
    seen, info = rows_of(path)
    assert seen == [0, 4, 4, 4, 4, 7, 7, 7, 7, 8] and info["duration"] == pytest.approx(9.01, abs=0.1)
    for second in range(9): assert number_in(frame_at(path, second)) == seen[second]
    assert number_in(frame_at(path, 4.25)) == 5 and number_in(frame_at(path, 4.15)) == 4


@pytest.mark.parametrize("name, codec", [("one.mp4", "libx264"), ("one.webm", "libvpx-vp9"), ("one.avi", "mpeg4")])
def test_one_frame_is_one_row(tmp_path, name, codec):
    path = write_video(tmp_path / name, [numbered(77)], codec=codec)
    assert rows_of(path)[0] == [77] == rows_of(path, 0.01)[0]
    assert number_in(frame_at(path, 5)) == 77


def test_ten_minutes(tmp_path):
    path = write_video(tmp_path / "long.mp4", [numbered(i) for i in range(1200)], rate=2)
    assert rows_of(path)[0] == list(range(0, 1200, 2))
    assert number_in(frame_at(path, 433.6)) == 867


def test_time_counts_from_the_first_frame(tmp_path):
    path = write_video(tmp_path / "late.mkv", [numbered(i) for i in range(6)], [100 + i for i in range(6)])
    assert rows_of(path)[0] == list(range(6)) and number_in(frame_at(path, 3)) == 3


def test_a_held_frame_is_decoded_and_encoded_once():
    assert list(sampled([(0, .5, "a"), (.5, 600, "b")], 1.)) == [("a", 1), ("b", 599)]
    assert list(sampled([], 1.)) == [] and list(sampled([(0., 0., "a")], 1.)) == [("a", 1)]
    assert list(sampled([(0., 1., "a"), (1.0000000001, 2., "b")], 1.)) == [("a", 1), ("b", 1)] # rounding forgiven


def test_frames_out_of_order_and_without_time_stamps():
    class Frame:
        def __init__(self, time): self.time, self.duration, self.time_base = time, 1, 0.5
    starts = lambda times: [start for start, _, _ in frames.timed([Frame(t) for t in times], {})]
    assert starts([1, 3, 2, 4]) == [0, 2, 2, 3] and starts([None, None, None]) == [0, 0.5, 1]
    with pytest.raises(ValueError, match="time stamps jump from 0 to 99999 seconds"): starts([0, 99999])


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation(tmp_path, rotation):
    stored = quarters().rotate(-rotation, expand=True)
    path = write_video(tmp_path / "r.mp4", [stored] * 3, rotation=rotation)
    (image, _), = video_images(path, 1., {})
    assert image.size == (96, 64) == frame_at(path, 0).size
    assert [int(np.argmax(image.getpixel(at))) for at in ((20, 32), (80, 16), (80, 50))] == [0, 1, 2]


def test_a_phone_held_upright_turns_clockwise(tmp_path):
    "The matrix that phones write for upright recordings is (0, 1, −1, 0); independent of our own sign."
    path = write_video(tmp_path / "r.mp4", [quarters()] * 3, rotation=-90)
    content = path.read_bytes()
    matrix = np.frombuffer(content[content.find(b"tkhd") + 4:], ">i4", 21)[10:15]
    assert list(matrix) == [0, 65536, 0, -65536, 0]
    (image, _), = video_images(path, 1., {})
    assert image.size == (64, 96) and int(np.argmax(image.getpixel((32, 20)))) == 0 # what was left is above now


# damage

def test_damaged_packets_are_skipped_and_told(tmp_path):
    path = write_video(tmp_path / "a.mkv", [numbered(i) for i in range(100)], rate=2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2:len(content) // 2 + 600] = bytes(range(256)) * 2 + bytes(88)
    path.write_bytes(content)
    seen, info = rows_of(path)
    assert seen[:10] == list(range(0, 20, 2)) and len(seen) >= 20


@pytest.mark.parametrize("name, codec", [("t.webm", "libvpx-vp9"), ("t.mkv", "libx264"), ("t.avi", "mpeg4")])
def test_a_truncated_video_is_used_as_far_as_it_goes(tmp_path, name, codec):
    path = write_video(tmp_path / name, [numbered(i) for i in range(250)], codec=codec)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    seen, info = rows_of(path)
    assert 1 <= len(seen) < 10 and seen == [25 * i for i in range(len(seen))]
    assert "truncated" in info["notes"][-1]


def broken_files(folder):
    "Everything that is no video."
    good = write_video(folder / "good.mp4", [numbered(i) for i in range(50)])
    (folder / "truncated.mp4").write_bytes(good.read_bytes()[:good.stat().st_size // 2])
    (folder / "text.mp4").write_text("This is not a video.\n" * 30)
    (folder / "empty.mp4").touch()
    (folder / "dangling.mp4").symlink_to(folder / "nowhere.mp4")
    with av.open(str(folder / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def test_broken_files_are_reported_one_by_one(tmp_path, model, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    broken_files(videos)
    assert features_command(["videos", str(videos), "--root", str(tmp_path), "--name", "mine", "--model", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/mine: 1 videos, 2 frames (1 per second")
    assert lines[1:] == ["  left out: audio.mp4: it holds no video, only audio", "  left out: dangling.mp4: No such file or directory",
                         *[f"  left out: {name}.mp4: not a picture or video, or a damaged one" for name in ("empty", "text", "truncated")]]
    assert list(read_manifest(tmp_path, "mine")["videos"]) == ["good"]
    (videos / "good.mp4").unlink()
    assert features_command(["videos", str(videos), "--root", str(tmp_path), "--name", "other", "--model", str(model)]) == 1
    assert "none of the 5 videos could be read" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_file_without_permission_is_reported(clip):
    folder = Path(tempfile.mkdtemp()) # pytest's own folders are closed to other users
    try:
        folder.chmod(0o755)
        paths = [write_video(folder / f"{k}.mp4", [numbered(k)]) for k in range(2)]
        paths[0].chmod(0)
        paths[1].chmod(0o644)
        sources = features.video_sources(folder, 1., {})
        user = os.geteuid()
        if user == 0: os.seteuid(65534)
        try: found = [(source.id, rows is not None, info.get("broken")) for source, rows, info in features.encode_sources(sources, clip)]
        finally: os.seteuid(user)
        assert found == [("0", False, "Permission denied"), ("1", True, None)]
    finally: shutil.rmtree(folder)


# sentences and images

def test_the_last_row_is_the_models_own_sentence_embedding(clip):
    sentences = [*SENTENCES, "man", "dogs " * 200]
    found = encode_text(sentences, clip)
    torch.testing.assert_close(torch.tensor(np.stack([rows[-1] for rows in found])), sentence_embeddings(sentences, clip))
    direct = pooled(clip.model.get_text_features(**clip.tokenizer(sentences, padding="max_length", max_length=77, truncation=True, return_tensors="pt")))
    torch.testing.assert_close(torch.tensor(np.stack([rows[-1] for rows in found])), direct)
    assert [rows.shape for rows in found] == [(7, 24), (5, 24), (10, 24), (3, 24), (77, 24)] and found[0].dtype == np.float32


def test_padding_and_batches_change_nothing(clip, monkeypatch):
    together = encode_text(SENTENCES, clip)
    monkeypatch.setattr(clip, "BATCH", 1)
    for a, b in zip(together, encode_text(SENTENCES, clip)): np.testing.assert_allclose(a, b, atol=1e-5)


def test_raw_tokens_are_the_states_before_the_projection(clip):
    raw, joint = encode_text(SENTENCES, clip, raw_tokens=True), encode_text(SENTENCES, clip)
    for a, b in zip(raw, joint):
        assert a.shape == (len(b), 32)
        torch.testing.assert_close(clip.model.text_projection(torch.tensor(a)).detach(), torch.tensor(b))


def test_siglip(siglip_folder):
    siglip = load_encoder(siglip_folder, "cpu")
    sentences = [*SENTENCES, "dogs " * 200]
    found = encode_text(sentences, siglip)
    assert [len(rows) for rows in found] == [1 + 5 + 1, 1 + 3 + 1, 1 + 8 + 1, 16] # start token, words, pooled position
    direct = pooled(siglip.model.get_text_features(**{"input_ids": tokenize(sentences, siglip)["input_ids"]}))
    torch.testing.assert_close(torch.tensor(np.stack([rows[-1] for rows in found])), direct)
    assert kept_rows(tokenize(sentences, siglip), siglip)[1] == [0, 1, 2, 3, 15]
    assert encode_text(sentences, siglip, raw_tokens=True)[0].shape == (7, 32)
    image = numbered(5)
    expected = pooled(siglip.model.get_image_features(**siglip.processor(images=image, return_tensors="pt"))).numpy()
    np.testing.assert_allclose(encode_images([image], siglip), expected, atol=1e-5)


def test_images_are_the_models_own_embeddings(clip, monkeypatch):
    images = [numbered(n) for n in range(5)]
    expected = pooled(clip.model.get_image_features(**clip.processor(images=images, return_tensors="pt"))).numpy()
    np.testing.assert_allclose(encode_images(images, clip), expected, atol=1e-5)
    monkeypatch.setattr(clip, "BATCH", 2)
    np.testing.assert_allclose(encode_images(images, clip), expected, atol=1e-5)


def test_bfloat16_is_close_and_has_the_same_fingerprint(clip, model):
    half = clip._replace(model=load_encoder(model, "cpu").model.to(torch.bfloat16))
    for a, b in zip(encode_text(SENTENCES, clip), encode_text(SENTENCES, half)):
        assert b.dtype == np.float32 and torch.cosine_similarity(torch.tensor(a[-1]), torch.tensor(b[-1]), dim=0) > 0.99
    assert encode_images([numbered(3)], half).dtype == np.float32
    assert fingerprint(half) == fingerprint(clip)


def test_a_model_folder_is_remembered_from_everywhere(model, monkeypatch):
    monkeypatch.chdir(Path(model).parent)
    assert load_encoder(Path(model).name, "cpu").name == str(Path(model).resolve())  # a search may start in another folder


def test_fingerprints_differ_between_models_only(clip, model, tmp_path):
    copy = load_encoder(shutil.copytree(model, tmp_path / "copy"), "cpu")
    other = load_encoder(write_tiny_clip(tmp_path / "other", SENTENCES, seed=1), "cpu")
    assert fingerprint(copy) == fingerprint(clip) != fingerprint(other)


def test_models_that_cannot_be_used(tmp_path, monkeypatch, model):
    from transformers import BertConfig, BertModel
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing cannot be loaded .*hub.*internet.*folder") as error: load_encoder("nobody/nothing")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="gone does not exist; name a folder"): load_encoder(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty cannot be loaded"): load_encoder(tmp_path / "empty")
    bert = shutil.copytree(model, tmp_path / "bert")
    BertModel(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(bert)
    with pytest.raises(UserError, match="not of CLIP's or SigLIP's kind"): load_encoder(bert)


def test_torchvision_is_not_needed(clip):
    bases = " ".join(base.__name__ for base in type(clip.processor).__mro__)
    assert "Torchvision" not in bases and "Fast" not in bases


# a run that may be stopped

def test_ahead_is_bounded_and_passes_errors_on():
    made = []
    def items():
        for i in range(10): made.append(i); yield i
        raise ValueError("end")
    stream = ahead(items(), 3)
    assert next(stream) == 0
    time.sleep(0.1)
    assert len(made) <= 5
    with pytest.raises(ValueError, match="end"): list(stream)
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
    infos, _ = extract_features([counted(reads, n) for n in range(4)], clip, target, {"a": 1}, quiet=True)
    state = target.stat().st_mtime_ns
    assert extract_features([counted(reads, n) for n in range(4)], clip, target, {"a": 1}, quiet=True)[0] == infos
    assert reads == [0, 1, 2, 3] and target.stat().st_mtime_ns == state # not even written
    with h5py.File(target) as file: old = {id: file[id][:] for id in file}
    assert {id: rows.shape for id, rows in old.items()} == {f"s{n}": (4, 24) for n in range(4)}
    np.testing.assert_array_equal(old["s1"][1], old["s1"][3])
    extract_features([counted(reads, n, key=n == 2) for n in (1, 2, 3, 4)], clip, target, {"a": 1}, quiet=True)
    assert reads[4:] == [2, 4] # one changed, one new; one is gone
    with h5py.File(target) as file:
        assert set(file) == {"s1", "s2", "s3", "s4"} and file.attrs["a"] == 1
        np.testing.assert_array_equal(file["s1"][:], old["s1"])
    assert not parts_folder(target).exists() and sorted(p.name for p in tmp_path.iterdir()) == ["x.h5"]


def test_damaged_leftovers_are_made_again(tmp_path, clip):
    target, reads = tmp_path / "x.h5", []
    target.write_bytes(b"no HDF5")
    parts_folder(target).mkdir()
    (parts_folder(target) / "s0.safetensors").write_bytes(b"\0" * 20)
    (parts_folder(target) / "s1.safetensors.part").write_bytes(b"half")
    assert not extract_features([counted(reads, 0)], clip, target, {}, quiet=True)[1] and reads == [0]
    with h5py.File(target) as file: assert set(file) == {"s0"}


KILLED = """
import sys, time
from prvr_nb import cli
from prvr_nb.videos import clip, features, frames, images
real = features.video_images
def slow(path, rate, info):
    for image in real(path, rate, info): time.sleep(0.12); yield image
features.video_images = slow
sys.exit(cli.features_command(sys.argv[1:]))
"""


def test_a_killed_run_continues(folder, tmp_path, model, monkeypatch):
    arguments = ["videos", str(folder), "--root", str(tmp_path), "--name", "mine", "--model", str(model)]
    target = corpus_paths(tmp_path, "mine").video
    run = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while len(list(parts_folder(target).glob("*.safetensors"))) < 2 and time.time() < end: time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = {path.stem for path in parts_folder(target).glob("*.safetensors")}
    assert 2 <= len(kept) < 5 and not target.exists()
    reads, real = [], features.video_images
    monkeypatch.setattr(features, "video_images", lambda path, rate, info: reads.append(path.stem) or real(path, rate, info))
    extract_videos(folder, tmp_path, "mine", model=model, quiet=True)
    assert set(reads) == {f"v{k}" for k in range(5)} - kept
    with h5py.File(target) as file: assert {id: file[id].shape for id in file} == {f"v{k}": (6, 24) for k in range(5)}


# captions

LAYOUT = "v0#enc#0 a man opens the fridge\nv1#enc#0 two dogs run\n"


@pytest.mark.parametrize("text", [LAYOUT, "video,sentence\nv0.mp4,a man opens the fridge\nv1, two dogs  run\n", "\ufeffvideo\tsentence\tstart\tend\r\nv0\ta man opens the fridge\t\t\r\nv1\ttwo dogs run\t\t\r\n",
                                  '{"video": "v0", "sentence": "a man opens the fridge"}\n\n{"video": "v1.webm", "sentence": "two dogs run", "start": null, "end": null}'])
def test_spellings_of_captions(tmp_path, text):
    (tmp_path / "captions").write_text(text, encoding="utf-8")
    assert read_rows(tmp_path / "captions") == [Row("v0", "a man opens the fridge"), Row("v1", "two dogs run")]


@pytest.mark.parametrize("text, message", [
    ("clip,text\nv0,a dog\n", "no column video and no column sentence; write video,sentence there"),
    ("video,sentence\nv0,a man, who waits\n", "row of v0 has more columns.*double quotes"),
    ("video,sentence\nv0,\n", "caption 1: video or sentence is missing; mend or delete it"),
    ("video,sentence,start,end\nv0,a dog,1,\n", "caption 1: start and end belong together"),
    ("video,sentence,start,end\nv0,a dog,5,2\n", "caption 1: 5.0–2.0 is not a stretch of time"),
    ("video,sentence,start,end\nv0,a dog,one,2\n", "caption 1: could not convert"),
    ('{"video": "v0"\n', "not JSON"), ('{"video": "v0", "sentence": 3}\n', "caption 1: video or sentence is missing"), ("", "is empty")])
def test_captions_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "captions").write_text(text)
    with pytest.raises(UserError, match=message): read_rows(tmp_path / "captions")


def test_ids():
    assert video_id("a/My day #1.MP4") == video_id("a/My day #1") == "a_My_day_1" and video_id("v_a.b.c.mkv") == "v_a.b.c" and video_id("cafe\u0301") == "caf\u00e9"


def test_two_files_with_one_id_are_refused(folder, tmp_path, model):
    write_video(folder / "v1.webm", [numbered(0)], codec="libvpx-vp9")
    with pytest.raises(UserError, match="v1.mp4 and v1.webm would both be called v1"): extract_videos(folder, tmp_path, "mine", model=model)


def test_split_is_a_seeded_share():
    ids = [f"v{n}" for n in range(1000)]
    assert len(held_out(ids, 0.2, 0)) == 200 and held_out(ids, 0.2, 0) == held_out(ids[::-1], 0.2, 0) != held_out(ids, 0.2, 1)
    assert [len(held_out(ids[:n], s, 0)) for n, s in ((1, 0.2), (3, 0.2), (4, 0.01), (4, 0.99), (5, 0.99))] == [0, 1, 2, 2, 3]


# a corpus

def write_table(path, moments=True):
    lines = ["video,sentence,start,end"] + [f'v{k}.mp4,"{sentence}",{"1,3" if moments else ","}' for k in range(5) for sentence in SENTENCES]
    path.write_text("\n".join([*lines, "v9.mp4,gone,,"]))
    return path


def test_videos_become_a_corpus(folder, tmp_path, model, clip):
    report = extract_videos(folder, tmp_path, "mine", write_table(tmp_path / "c.csv"), model, quiet=True)
    assert report[0].startswith(f"{tmp_path}/mine: 5 videos, 30 frames (1 per second") and report[0].endswith("9 train and 6 val queries")
    assert report[1:] == ["  captions of 1 video without features left out (v9)"]
    assert check_corpus(tmp_path, "mine") == ["mine train: 3 videos (6–6 frames), 9 queries (5–10 tokens)", "mine val: 2 videos (6–6 frames), 6 queries (5–10 tokens)"]
    manifest = read_manifest(tmp_path, "mine")
    assert manifest.keys() == {"format", "model", "fingerprint", "rate", "raw_tokens", "folder", "videos"} and manifest["folder"] == str(folder) and manifest["rate"] == 1
    assert manifest["videos"]["v3"] == {"file": "v3.mp4", "duration": 6.0, "n_frames": 6}
    with h5py.File(corpus_paths(tmp_path, "mine").video) as file:
        assert dict(file.attrs) == {name: value for name, value in manifest.items() if name != "videos"}
        np.testing.assert_allclose(file["v2"][:], encode_images([frame_at(folder / "v2.mp4", second) for second in range(6)], clip), atol=1e-5)
    moments = {**read_moments(tmp_path, "mine", "train"), **read_moments(tmp_path, "mine", "val")}
    assert set(moments) == {(f"v{k}", sentence) for k in range(5) for sentence in SENTENCES} and set(moments["v0", SENTENCES[0]]) == {(1., 3., 6.)}
    corpus, = prepare(tmp_path, published_config("mine"), ("val",), quiet=True)
    assert 0 <= zero_shot(corpus, "cpu")[0]["r1"] <= 100
    assert number_in(picture_at(manifest, "v3", 2.5)) == 35
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob(".*.parts"))


def test_captions_may_be_added_later_and_kept(folder, tmp_path, model):
    extract_videos(folder, tmp_path, "mine", model=model, quiet=True)
    assert not (tmp_path / "mine" / "TextData").exists()
    extract_videos(folder, tmp_path, "mine", write_table(tmp_path / "c.csv", moments=False), model, quiet=True)
    texts = {path.name: path.read_text() for path in (tmp_path / "mine" / "TextData").glob("*.txt")}
    assert len(texts) == 2 and not list((tmp_path / "mine").rglob("*release.jsonl"))
    extract_videos(folder, tmp_path, "mine", model=model, raw_tokens=True, quiet=True)
    assert texts == {path.name: path.read_text() for path in (tmp_path / "mine" / "TextData").glob("*.txt")}
    with h5py.File(corpus_paths(tmp_path, "mine").text) as file: assert file["v0#enc#0"].shape == (7, 32) and bool(file.attrs["raw_tokens"])
    with pytest.raises(UserError, match="leave out --captions"): extract_videos(folder, tmp_path, "mine", corpus_paths(tmp_path, "mine").captions, model)


def test_another_rate_or_model_starts_anew(folder, tmp_path, model):
    for settings, shape in ({}, (6, 24)), ({"rate": 2.}, (12, 24)), ({"model": write_tiny_clip(tmp_path / "other", SENTENCES, seed=1), "rate": 2.}, (12, 24)):
        extract_videos(folder, tmp_path, "mine", **{"model": model, "quiet": True, **settings})
        with h5py.File(corpus_paths(tmp_path, "mine").video) as file: assert file["v0"].shape == shape and file.attrs["model"] == str(settings.get("model", model))


def test_foreign_features_are_never_written_over(folder, tmp_path, model, capsys):
    path = corpus_paths(tmp_path, "tvr").video
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file: file["x"] = np.zeros((2, 3))
    before = path.read_bytes()
    assert features_command(["videos", str(folder), "--root", str(tmp_path), "--name", "tvr", "--model", str(model)]) == 1
    assert "choose another --name" in capsys.readouterr().err and path.read_bytes() == before


@pytest.mark.parametrize("change, message", [(["--rate", "0"], "--rate is 0.0; it must be above 0"), (["--rate", "nan"], "--rate is nan"), (["--val-share", "1"], "--val-share is 1.0"), (["--name", "a/b"], "without slashes")])
def test_settings_that_make_no_sense(folder, tmp_path, capsys, change, message):
    assert features_command(["videos", str(folder), "--root", str(tmp_path), "--name", "mine", *change]) == 1
    assert message in capsys.readouterr().err


def test_captions_of_other_videos_are_refused_before_the_model_is_loaded(folder, tmp_path):
    (tmp_path / "c.csv").write_text("video,sentence\nfilm1,a dog\n")
    with pytest.raises(UserError, match="captions name film1, the videos are v0, v1, v2"): extract_videos(folder, tmp_path, "mine", tmp_path / "c.csv", model="nobody/nothing")


# composed videos

@pytest.fixture
def pictures(tmp_path):
    "Forty captioned pictures."
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for n in range(40): numbered(n).save(tmp_path / "images" / f"{'sub/' if n % 2 else ''}{n}.png")
    return tmp_path / "images"


def name_of(n): return f"{'sub/' if n % 2 else ''}{n}.png"


def flickr(path): path.write_text("image,caption\n" + "".join(f'{name_of(n)},"picture {n}, one"\n{name_of(n)},picture {n} two .\n' for n in range(41))); return path


def coco(path):
    path.write_text(json.dumps({"images": [{"id": 100 + n, "file_name": name_of(n)} for n in range(41)],
                                "annotations": [{"image_id": 100 + n, "caption": text} for n in range(41) for text in (f"picture {n}, one", f"picture {n} two .\n")]}, indent=1))
    return path


def test_spellings_of_image_captions(tmp_path):
    one, other = read_image_captions(flickr(tmp_path / "captions.txt")), read_image_captions(coco(tmp_path / "captions.json"))
    assert one == other and one["sub/3.png"] == ["picture 3, one", "picture 3 two ."]
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(UserError, match="not COCO's"): read_image_captions(tmp_path / "wrong.json")


@pytest.mark.parametrize("n", [*range(3, 30), 500])
def test_composition_uses_every_image_once(n):
    videos = compose([f"{i}" for i in range(n)], seed=n)
    assert sorted(file for video in videos for file, _ in video) == sorted(str(i) for i in range(n))
    assert all(3 <= len(video) <= 6 for video in videos) and all(4 <= rows <= 12 for video in videos for _, rows in video)
    assert videos == compose([f"{i}" for i in range(n)][::-1], seed=n)


def test_images_become_a_corpus_with_moments(pictures, tmp_path, model, clip):
    (pictures / "sub" / "7.png").write_text("no picture")
    report = extract_images(pictures, tmp_path, "composed", flickr(tmp_path / "captions.txt"), model, rate=2., quiet=True)
    assert sum("without sub/7.png: cannot identify image file" in line for line in report) == 1 and report[0].endswith("queries")
    manifest = read_manifest(tmp_path, "composed")
    shots = [shot for entry in manifest["videos"].values() for shot in entry["shots"]]
    assert sorted(shot["file"] for shot in shots) == sorted(name_of(n) for n in range(40) if n != 7)
    for video, entry in manifest["videos"].items():
        assert entry["duration"] == entry["n_frames"] / 2 == entry["shots"][-1]["end"]
        with h5py.File(corpus_paths(tmp_path, "composed").video) as file: stored = file[video][:]
        for shot in entry["shots"]:
            expected = encode_images([Image.open(pictures / shot["file"]).convert("RGB")], clip)
            rows = stored[round(2 * shot["start"]):round(2 * shot["end"])]
            assert 4 <= len(rows) <= 12
            np.testing.assert_allclose(rows, np.repeat(expected, len(rows), 0), atol=1e-5)
            assert number_in(picture_at(manifest, video, shot["start"])) == number_in(picture_at(manifest, video, shot["end"] - 0.01)) == int(Path(shot["file"]).stem)
    moments = {**read_moments(tmp_path, "composed", "train"), **read_moments(tmp_path, "composed", "val")}
    assert len(moments) == 78
    for (video, sentence), (moment,) in moments.items():
        shot, = [shot for shot in manifest["videos"][video]["shots"] if Path(shot["file"]).stem == sentence.split()[1].rstrip(",")]
        assert (moment.start, moment.end, moment.duration) == (shot["start"], shot["end"], manifest["videos"][video]["duration"])
    check_corpus(tmp_path, "composed")
    assert extract_images(pictures, tmp_path, "composed", coco(tmp_path / "captions.json"), model, rate=2., quiet=True) == report


def test_photographs_are_turned_as_their_note_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6 # to be turned clockwise by 90 degrees
    quarters().save(tmp_path / "p.jpg", exif=exif, quality=95)
    image = images.open_image(tmp_path / "p.jpg")
    assert image.size == (64, 96) and int(np.argmax(image.getpixel((32, 20)))) == 0


def test_images_without_captions_are_refused(pictures, tmp_path):
    (tmp_path / "c.txt").write_text("image,caption\nelse.png,a dog\n")
    with pytest.raises(UserError, match="0 captioned images were found"): extract_images(pictures, tmp_path, "composed", tmp_path / "c.txt", "nobody/nothing")


# the command

def test_help_is_quick_and_complete(capsys):
    for action in "videos", "images":
        with pytest.raises(SystemExit) as end: features_command([action, "--help"])
        shown = capsys.readouterr().out
        assert end.value.code == 0 and all(flag in shown for flag in ("--captions", "--root", "--name", "--model", "--rate", "--raw-tokens", "--val-share", "--seed"))
    code = "import sys; from prvr_nb.features import features_command\ntry: features_command(['--help'])\nexcept SystemExit: pass\nassert not {'torch', 'transformers', 'av', 'PIL'} & set(sys.modules), set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
