"""Frames of a video file at given times, and short clips cut out of it."""
import io
import math
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

# Files that are taken for videos, and the containers that they may turn out to be. A playlist (ffconcat, HLS) is none:
# FFmpeg would follow it to other files, whatever its own name is.
VIDEO_SUFFIXES = frozenset((".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .wmv .asf .flv .3gp .ogv "
                            ".mxf .vob .m2v .dv").split())
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,dv"
NO_VIDEO = "not a picture or video, or a damaged one"
LONGEST_FRAME = 3600. # seconds; a longer pause between two frames is a broken time stamp
MOST_LOOKS = 200_000 # of one video: 55 hours at one a second
CLIP_SECONDS, CLIP_SIDE, CLIP_RATE = 20., 480, 25 # of a clip that a card plays: length, longer side, frames per second

def reason(error:Exception)->str: # one line
    "Why something failed, for a person."
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return NO_VIDEO if "Invalid data found" in text else text.splitlines()[0].rstrip(".:")

def check_regular(path:str|Path):
    "Refuse what a file system holds besides files: reading a pipe or a device may never end."
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode): # folders are looked into, so this one is closed
        raise ValueError("a folder that cannot be listed" if stat.S_ISDIR(mode) else "not a regular file")

@contextmanager
def open_video(path:str|Path)->Iterator: # of (container, stream)
    "Container and video stream of a file; the cover picture of an audio file is not a video."
    import av
    check_regular(path)
    try:
        opened = av.open(f"file:{path}", metadata_errors="replace", container_options={"format_whitelist": CONTAINERS})
    except av.error.ArgumentError: # what FFmpeg says about a format that is not on the list
        raise ValueError(NO_VIDEO) from None
    with opened as container:
        films = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not films:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise ValueError(f"it holds no video, only {kinds}")
        films[0].thread_type = "AUTO"
        yield container, films[0]

def decoded(container, stream, info:dict)->Iterator: # of av.VideoFrame
    "All frames of open_video's stream in the order in which they are shown; damaged packets are skipped and counted."
    import av
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            info["damaged"] = info.get("damaged", 0) + 1

def timed(frames:Iterable, info:dict)->Iterator: # (start, end, frame), seconds since the first frame
    "When each frame appears and ends; without a usable time stamp it follows the one before. `info` gets the duration."
    first, start, end = None, 0., 0.
    for frame in frames:
        if first is None:
            first = frame.time or 0.
        before, start = start, max(start, end if frame.time is None else frame.time - first)
        if start - before > LONGEST_FRAME:
            raise ValueError(f"its time stamps jump from {before:.0f} to {start:.0f} seconds")
        info["duration"] = end = start + float((frame.duration or 0) * frame.time_base)
        yield start, end, frame

def looks_before(seconds:float, rate:float)->int: # number of times 0, 1/rate, 2/rate, … that lie before it
    "How many looks have been taken by then; a microsecond of rounding is forgiven."
    return math.ceil(round(seconds * rate, 6))

def sampled(frames:Iterable, rate:float)->Iterator: # (frame, number of looks at it), at least one
    "The frames that are on the screen at 0, 1/rate, 2/rate, … seconds, of (start, end, frame)."
    taken, shown, end = 0, None, 0.
    for start, stop, frame in frames:
        looks = looks_before(start, rate) - taken
        if looks > 0:
            yield shown, looks
        taken, shown, end = taken + max(looks, 0), frame, stop
    looks = max(looks_before(end, rate) - taken, not taken)
    if shown is not None and looks > 0:
        yield shown, int(looks)

def upright(frame)->Any: # PIL image, RGB
    "A frame as a player shows it: turned as the file says."
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image

def stated_seconds(container, stream)->float: # 0 when the file does not say
    "How long a file says that its video is."
    stated = [stream.duration * stream.time_base] if stream.duration else []
    if stream.frames and stream.average_rate: # a cut AVI still counts all its frames
        stated.append(stream.frames / stream.average_rate)
    return float(max(stated, default=(container.duration or 0) / 1e6)) # the container's in microseconds, with the sound

def video_images(path:Path, rate:float, info:dict)->Iterator: # (PIL image, number of looks at it)
    "What a video shows at 0, 1/rate, 2/rate, … seconds; `info` gets its duration and notes about damage."
    taken = 0
    with open_video(path) as (container, stream):
        stated = stated_seconds(container, stream)
        for frame, looks in sampled(timed(decoded(container, stream, info), info), rate):
            taken += looks
            if taken > MOST_LOOKS:
                raise ValueError(f"at this rate it has more than {MOST_LOOKS:,} frames")
            yield upright(frame), looks
    if not taken:
        raise ValueError("none of its frames can be decoded")
    notes = [f"{info['damaged']} damaged packets skipped"] if info.get("damaged") else []
    if info["duration"] < 0.9 * stated:
        notes.append(f"ends after {info['duration']:.1f} of {stated:.1f} seconds (truncated?)")
    if notes:
        info["notes"] = notes

def since(frames:Iterable, target:float, shown=None)->Iterator: # (seconds since the target, av.VideoFrame)
    "The frame that is on the screen at a time, and all later ones; nothing when all come later."
    begun = False
    for frame in (frame for frame in frames if frame.time is not None):
        if frame.time <= target + 1e-6:
            shown = frame
            continue
        if shown is None:
            return
        if not begun:
            yield 0., shown
        begun = True
        yield frame.time - target, frame
    if shown is not None and not begun:
        yield 0., shown

def frames_from(path:str|Path, start:float)->Iterator: # (seconds since `start`, av.VideoFrame)
    "Decode a video from a time on, in seconds since its first frame; behind its end, the last frame."
    for back in 0., 5., 60., None: # an index may point behind the time: then jump further back, at last not at all
        with open_video(path) as (container, stream):
            first = next(decoded(container, stream, {}), None)
            if first is None:
                raise ValueError("none of its frames can be decoded")
            zero = first.time or 0.
            if back is not None:
                container.seek(int(max(zero + start - back, zero) / stream.time_base), stream=stream)
            found = since(decoded(container, stream, {}), zero + start, first if back is None else None)
            if (frame := next(found, None)) is None:
                continue
            yield frame
            yield from found
            return

def frame_at(path:str|Path, seconds:float)->Any: # PIL image, RGB
    "The picture that a video shows at a time, in seconds; its last one when it is over by then."
    with closing(frames_from(path, seconds)) as frames:
        return upright(next(frames)[1])

def fitted(width:int, height:int, side:int=CLIP_SIDE)->tuple: # even width and height
    "A size in pixels that players take, its longer side not larger than asked for."
    scale = min(1., side / max(width, height))
    return tuple(max(2, 2 * round(scale * n / 2)) for n in (width, height))

def cut_clip(path:Path, start:float, seconds:float=CLIP_SECONDS)->bytes: # MP4 (H.264), which browsers play
    "Cut a short clip out of a video, so that it starts at a moment and never holds more than that."
    import av
    buffer, stream, last = io.BytesIO(), None, -1
    with av.open(buffer, "w", format="mp4") as container, closing(frames_from(path, start)) as frames:
        for time, frame in frames:
            if time >= seconds:
                break
            if (tick := round(time * CLIP_RATE)) <= last: # faster than the clip's rate
                continue
            image = upright(frame)
            if stream is None:
                width, height = fitted(*image.size)
                stream = container.add_stream("libx264", rate=CLIP_RATE, width=width, height=height, pix_fmt="yuv420p",
                                              options={"preset": "veryfast", "crf": "26"})
            picture = av.VideoFrame.from_image(image.resize((width, height)))
            picture.pts = last = tick
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()
