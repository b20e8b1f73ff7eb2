"""One row of a result table: recall, collapse of both sides, agreement with the teacher."""
import torch

from prvr_nb.data.prepared import PreparedSplit
from prvr_nb.evaluation.collapse import EXACT_QUERIES, collapse, teacher_correlation
from prvr_nb.evaluation.embeddings import embed, teacher_embeddings, teacher_features
from prvr_nb.evaluation.metrics import retrieval_metrics, retrieval_ranks
from prvr_nb.method.model import Embeddings, PRVRModel


def extra_bytes(
    q: int,  # Q
    v: int,  # V
    length: int = 128,  # L_f
    d: int = 384,  # model width
    d_query: int = 768,  # D_q
    side: int = 1024,  # see BLOCK_SIZE
) -> int:
    "Upper bound, in bytes, of what metrics_row takes beside the embeddings."
    scores, teacher, sums = 20 * min(side, q) * v, 12 * q * d_query, 16 * v * d + 8 * v * length + 16 * side**2
    return scores + teacher + sums + 32 * min(q, EXACT_QUERIES)**2 + 2**27


def metrics_row(
    e: Embeddings,  # normalised
    corpus: PreparedSplit,
    clip_score_weight: float,  # the frame branch has the rest
) -> dict:  # r1 … sum_r, mrr, median_rank, text_*, video_*, spearman
    "All numbers of one table row."
    video = corpus.queries.video.to(e.queries.device)
    n, length = e.frames.shape[:2]
    text = collapse(e.queries, video, n)
    frames = collapse(e.frames.flatten(0, 1), torch.arange(n, device=video.device).repeat_interleave(length), n)
    row = retrieval_metrics(retrieval_ranks(e, video, clip_score_weight))
    for side, values in ("text", text), ("video", frames):
        row |= {f"{side}_{name}": value for name, value in zip(("intra", "total", "diff_norm"), values, strict=True)}
    return row | {"spearman": teacher_correlation(e.queries, teacher_features(corpus))}


def evaluate(
    model: PRVRModel,  # trained or not
    corpus: PreparedSplit,
    device: str | torch.device = "cpu",  # where to compute
) -> dict:  # see metrics_row
    "Evaluate a model on a prepared split."
    return metrics_row(embed(model, corpus, device), corpus, model.config.clip_score_weight)


def zero_shot(
    corpus: PreparedSplit,
    device: str | torch.device = "cpu",  # where to compute
) -> list:  # one row named 'zero-shot teacher', or none when video and text have no common space
    "What the teacher's own features retrieve: best frame by cosine, nothing trained."
    e = teacher_embeddings(corpus, device)
    return [{"name": "zero-shot teacher", **metrics_row(e, corpus, clip_score_weight=0.)}] if e else []
