"""All queries and videos of a split as embeddings: of a trained model, or the teacher's own features."""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prvr_nb.config import Config
from prvr_nb.data.prepared import PreparedSplit, pad_queries
from prvr_nb.files import UserError
from prvr_nb.method.model import Embeddings, PRVRModel

VIDEOS_AT_ONCE = {"cpu": 8, "cuda": 128}  # what stays in a cache, what fills a GPU

BLOCK_SIZE = {"cpu": 2**10, "cuda": 2**13}  # vectors on each side of a block of similarities


def block_size_for(x: Tensor) -> int:
    "Block size for the device that holds x."
    return BLOCK_SIZE.get(x.device.type, 2**10)


class Teacher(nn.Module):
    "The input features as embeddings: encodes like a model without weights, whose query is its [EOS] feature."
    config = None

    def encode_videos(self, frames, clips, sizes):  # (B, L_f, D), (B, L_c, D), (B, L_c) → the same tokens
        return frames, clips

    def query(self, tokens, mask):  # (Q, L, D), (Q, L) → (Q, D)
        return tokens[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]


def check_fits(
    model: PRVRModel | Teacher,
    corpus: PreparedSplit,
):
    "Raise UserError when the corpus has other widths or token counts than the model reads."
    if model.config is None:
        return
    frames, clips = corpus.videos.frames, corpus.videos.clips
    held, read = (frames.shape[2], corpus.queries.tokens.shape[1]), (model.d_video, model.d_query)
    if held != read:
        raise UserError(f"the checkpoint reads (video, query) features of width {read}, the corpus has {held}; "
                        "use the features it was trained on")
    held, read = (frames.shape[1], clips.shape[1]), (model.config.n_frames, model.config.n_clips)
    if held != read:
        raise UserError(f"the model reads (frame, clip) tokens {read} per video, the corpus has {held}; "
                        "prepare it with the model's merge_schedule")


def encoder_precision(
    config: Config | None,  # its precision; None: float32
    device: torch.device,  # where the encoders run
):  # a context manager
    "bfloat16 autocast where the configuration asks for it and the device has it."
    wanted = config is not None and config.precision == "bf16"
    has_it = device.type == "cpu" or device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_it)


@contextmanager
def exact_matmul():
    "Matrix products of float32 in full float32, neither TF32 nor bfloat16 inside."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def all_finite(e: Embeddings) -> bool:
    "Whether no embedding holds NaN or infinity; the device is asked once."
    return bool(torch.stack([x.sum() for x in e]).isfinite().all())


def filled(
    out: Tensor | None,  # (N, ..., d), or None before the first block
    rows: slice | Tensor,  # rows of this block
    x: Tensor,  # (n, ..., d) embeddings of the block
    n: int,  # N
) -> Tensor:  # out, with the block in it, normalised
    "Write a block into a tensor of the final size, which parts to be joined at the end would need twice."
    if out is None:
        out = torch.empty(n, *x.shape[1:], device=x.device)
    out[rows] = F.normalize(x.float(), dim=-1)
    return out


@torch.no_grad()
def embed(
    model: PRVRModel | Teacher,  # trained or not
    corpus: PreparedSplit,  # its tensors may be on the CPU (memory-mapped, too) or on the device
    device: str | torch.device = "cpu",  # where to compute
    block: int | None = None,  # videos, or eight times as many queries, at once; None: what suits the device
) -> Embeddings:  # float32, L2-normalised, on the device
    "Encode all queries and all videos of a split; raises UserError when the model was made for other features."
    check_fits(model, corpus)
    device = torch.device(device)
    block = block or VIDEOS_AT_ONCE.get(device.type, 8)
    was_training = model.training
    model.to(device).eval()
    queries = frames = clips = None
    n_videos, n_queries = len(corpus.videos.frames), len(corpus.queries.video)
    with encoder_precision(model.config, device):
        for start in range(0, n_videos, block):
            rows = slice(start, start + block)
            x, y = model.encode_videos(*(part[rows].to(device) for part in corpus.videos[:3]))
            frames, clips = filled(frames, rows, x, n_videos), filled(clips, rows, y, n_videos)
        short_first = corpus.queries.start.diff().argsort(stable=True)  # less padding
        for which in short_first.split(8 * block):
            tokens, mask, _ = (x.to(device) for x in pad_queries(corpus.queries, which))
            queries = filled(queries, which.to(device), model.query(tokens, mask), n_queries)
    model.train(was_training)
    e = Embeddings(queries, frames, clips)
    if not all_finite(e):
        raise UserError("the model's embeddings are not finite; train again with a lower --lr")
    return e


def teacher_features(corpus: PreparedSplit) -> Tensor:
    "The [EOS] feature of every query, (Q, D_q), in float32."
    return corpus.queries.tokens[corpus.queries.start[1:] - 1].float()


def teacher_embeddings(
    corpus: PreparedSplit,
    device: str | torch.device = "cpu",
) -> Embeddings | None:  # None when video and text features have no common width
    "What the teacher knows before any training."
    if corpus.videos.frames.shape[2] != corpus.queries.tokens.shape[1]:
        return None
    return embed(Teacher(), corpus, device)
