"""Pictures, videos and a CLIP that cost nothing, for tests."""
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from PIL import Image


def write_video(path, images, seconds=None, rate=25, codec="libx264", rotation=0):
    """Encode PIL images of one even size; the path's ending decides on the container.

    `seconds` says when each appears (default: `rate` of them a second); `rotation` is in degrees counter-clockwise.
    """
    import av
    width, height = images[0].size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, width=width, height=height, pix_fmt="yuv420p")
        if rotation:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_image(image)
            frame.pts = i if seconds is None else round(seconds[i] * rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def write_tiny_clip(folder, sentences, seed=0):
    "A small CLIP with random weights, which knows the words of the sentences; saved as a real one would be."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast
    start, end, unknown = names = ["<|startoftext|>", "<|endoftext|>", "<unk>"]
    words = names + sorted({word for sentence in sentences for word in sentence.lower().split()})
    text = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    text.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(start, 0), (end, 1)]
    text.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=special)
    PreTrainedTokenizerFast(tokenizer_object=text, bos_token=start, eos_token=end, pad_token=end, unk_token=unknown,
                            model_input_names=["input_ids", "attention_mask"]).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_factor=5.)
    ids = dict(vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = CLIPConfig(text_config={**size, **ids}, vision_config=dict(size, image_size=32, patch_size=16),
                        projection_dim=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    return Path(folder)


def numbered(number, size=(64, 48)):
    "A picture with a number in it, as twelve black or white bars, which any codec keeps."
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for bit in range(12):
        if number >> bit & 1:
            pixels[:, bit * 5:bit * 5 + 5] = 255
    return Image.fromarray(pixels)


def number_in(image):
    "The number that `numbered` wrote into a picture."
    pixels = np.asarray(image.convert("L"))
    return sum(1 << bit for bit in range(12) if pixels[:, bit * 5 + 1:bit * 5 + 4].mean() > 128)


def quarters(size=(96, 64)):
    "A picture whose left half is red, upper right green, lower right blue."
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, :size[0] // 2, 0] = 255
    pixels[:size[1] // 2, size[0] // 2:, 1] = 255
    pixels[size[1] // 2:, size[0] // 2:, 2] = 255
    return Image.fromarray(pixels)


def ended(function, *arguments, seconds=30):
    "What a function returns or raises, called in a thread of its own; fails when it never ends."
    found = []

    def call():
        try:
            found.append(function(*arguments))
        except Exception as error:
            found.append(error)
    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"{function.__name__} has not ended after {seconds} seconds"
    return found[0]
