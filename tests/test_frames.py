"""Frames of video files: time, rotation, damage, and files that are no videos. (Clips of cards: test_panel.py.)"""
import os

import av
import numpy as np
import pytest
from makers import ended, number_in, numbered, quarters, write_video

from prvr_nb.videos import frames
from prvr_nb.videos.frames import frame_at, reason, sampled, video_images

EVERY_CONTAINER = [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mkv", "libx264"),
                   ("a.ts", "libx264"), ("a.mpg", "mpeg2video"), ("a.mov", "libx265"), ("a.flv", "flv"),
                   ("a.wmv", "wmv2"), ("a.asf", "wmv2"), ("a.m2v", "mpeg2video"),
                   ("a.mxf", "mpeg2video")]


def rows_of(path, rate=1.):
    "Numbers seen in the rows of a video, and the facts about it."
    info = {}
    return [number_in(image) for image, looks in video_images(path, rate, info) for _ in range(looks)], info


def why_not(path):
    "The reason for which nothing is read."
    with pytest.raises((OSError, ValueError)) as error:
        list(video_images(path, 1., {}))
    return reason(error.value)


@pytest.mark.parametrize("name, codec", EVERY_CONTAINER)
def test_every_container_gives_the_frame_of_each_second(tmp_path, name, codec):
    path = write_video(tmp_path / name, [numbered(i) for i in range(250)], codec=codec)
    seen, info = rows_of(path)
    assert seen == [25 * i for i in range(10)]
    assert info["duration"] == pytest.approx(10, abs=0.05) and "notes" not in info
    assert rows_of(path, 2)[0] == [round(12.5 * i - 0.01) for i in range(20)]  # 12.5 → frame 12 is on the screen
    assert rows_of(path, 0.3)[0] == [0, 83, 166]
    for second in 0, 3, 7.02, 9.97:
        assert number_in(frame_at(path, second)) == int(25 * second + 1e-6)
    assert number_in(frame_at(path, 99)) == 249


@pytest.mark.parametrize("name, codec", [("v.mp4", "libx264"), ("v.webm", "libvpx-vp9"), ("v.mkv", "libx264")])
def test_variable_frame_rate(tmp_path, name, codec):
    times = [0, 0.1, 0.2, 0.9, 1, 4.2, 4.3, 4.4, 9]
    path = write_video(tmp_path / name, [numbered(i) for i in range(9)], times, rate=100, codec=codec)
    seen, info = rows_of(path)
    assert seen == [0, 4, 4, 4, 4, 7, 7, 7, 7, 8] and info["duration"] == pytest.approx(9.01, abs=0.1)
    assert [number_in(frame_at(path, second)) for second in range(9)] == seen[:9]
    assert number_in(frame_at(path, 4.25)) == 5 and number_in(frame_at(path, 4.15)) == 4


@pytest.mark.parametrize("name, codec", [("one.mp4", "libx264"), ("one.webm", "libvpx-vp9"), ("one.avi", "mpeg4"),
                                         ("one.vob", "mpeg2video")])
def test_one_frame_is_one_row(tmp_path, name, codec):
    path = write_video(tmp_path / name, [numbered(77)], codec=codec)
    assert rows_of(path)[0] == rows_of(path, 0.01)[0] == [77] == [number_in(frame_at(path, 5))]


def test_ten_minutes_and_a_late_start(tmp_path):
    path = write_video(tmp_path / "long.mp4", [numbered(i) for i in range(1200)], rate=2)
    assert rows_of(path)[0] == list(range(0, 1200, 2)) and number_in(frame_at(path, 433.6)) == 867
    path = write_video(tmp_path / "late.mkv", [numbered(i) for i in range(6)], [100 + i for i in range(6)])
    assert rows_of(path)[0] == list(range(6)) and number_in(frame_at(path, 3)) == 3


def test_a_held_frame_is_handed_out_once():
    assert list(sampled([(0, .5, "a"), (.5, 600, "b")], 1.)) == [("a", 1), ("b", 599)]
    assert list(sampled([], 1.)) == [] and list(sampled([(0., 0., "a")], 1.)) == [("a", 1)]
    assert list(sampled([(0., 1., "a"), (1.0000000001, 2., "b")], 1.)) == [("a", 1), ("b", 1)]  # rounding forgiven


@pytest.mark.parametrize("seed", range(20))
def test_sampling_equals_looking_at_every_time(seed):
    rng = np.random.default_rng(seed)
    starts = [0., *sorted(rng.uniform(0, 8, rng.integers(12)))]
    end, rate = starts[-1] + rng.uniform(0, 2), rng.choice([0.5, 1, 2, 7.3])
    looked = [max(k for k, start in enumerate(starts) if start <= i / rate)
              for i in range(200) if i == 0 or i / rate < end]
    frames = zip(starts, [*starts[1:], end], range(len(starts)), strict=True)
    assert [k for k, looks in sampled(frames, rate) for _ in range(looks)] == looked


class Stamped:
    "A frame of half a second with a time stamp."
    duration, time_base = 1, 0.5

    def __init__(self, time):
        self.time = time


def test_frames_out_of_order_and_without_time_stamps():
    def starts(times):
        return [start for start, _, _ in frames.timed([Stamped(t) for t in times], {})]
    assert starts([1, 3, 2, 4]) == [0, 2, 2, 3] and starts([None, None, None]) == [0, 0.5, 1]
    with pytest.raises(ValueError, match="time stamps jump from 0 to 99999 seconds"):
        starts([0, 99999])


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
    assert image.size == (64, 96) and int(np.argmax(image.getpixel((32, 20)))) == 0  # what was left is above now


# damage, and what is no video

def test_damaged_packets_are_skipped(tmp_path):
    path = write_video(tmp_path / "a.mkv", [numbered(i) for i in range(100)], rate=2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2:len(content) // 2 + 600] = bytes(range(256)) * 2 + bytes(88)
    path.write_bytes(content)
    seen, _ = rows_of(path)
    assert seen[:10] == list(range(0, 20, 2)) and len(seen) >= 20


@pytest.mark.parametrize("name, codec", [("t.webm", "libvpx-vp9"), ("t.mkv", "libx264"), ("t.avi", "mpeg4")])
def test_a_truncated_video_is_used_as_far_as_it_goes(tmp_path, name, codec):
    path = write_video(tmp_path / name, [numbered(i) for i in range(250)], codec=codec)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    seen, info = rows_of(path)
    assert 1 <= len(seen) < 10 and seen == [25 * i for i in range(len(seen))]
    assert "truncated" in info["notes"][-1]


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


def test_what_is_no_video_has_a_reason(tmp_path):
    good = write_video(tmp_path / "good.mp4", [numbered(i) for i in range(50)])
    (tmp_path / "half.mp4").write_bytes(good.read_bytes()[:good.stat().st_size // 2])
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 30)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    write_sound(tmp_path / "audio.mp4")
    for name in "half", "text", "empty":
        assert why_not(tmp_path / f"{name}.mp4") == "not a picture or video, or a damaged one"
    assert why_not(tmp_path / "dangling.mp4") == "No such file or directory"
    assert why_not(tmp_path / "audio.mp4") == "it holds no video, only audio"


@pytest.mark.parametrize("name, text", [
    ("list.mp4", "ffconcat version 1.0\nfile good.mp4\n"),
    ("list.ts", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\ngood.mp4\n#EXT-X-ENDLIST\n")])
def test_a_playlist_is_not_followed(tmp_path, name, text):
    write_video(tmp_path / "good.mp4", [numbered(i) for i in range(50)])
    (tmp_path / name).write_text(text)
    assert why_not(tmp_path / name) == "not a picture or video, or a damaged one"


def test_a_pipe_is_not_waited_for_and_a_name_is_no_protocol(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert ended(why_not, tmp_path / "pipe.mp4") == "not a regular file"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concat:x").mkdir()
    write_video(tmp_path / "concat:x" / "a.mp4", [numbered(7)])
    assert rows_of("concat:x/a.mp4")[0] == [7]


def test_a_video_of_weeks_is_refused(tmp_path):
    path = write_video(tmp_path / "weeks.mkv", [numbered(i) for i in range(60)], [3600 * i for i in range(60)])
    assert why_not(path) == "at this rate it has more than 200,000 frames"
    assert sum(looks for _, looks in video_images(path, 0.9, {})) > 190_000
