"""HTML of what a search has found: a card for each result, a column for each method. No widgets."""
import base64
import html
import io
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from prvr_nb.plots import colour_of
from prvr_nb.videos.frames import frame_at
from prvr_nb.videos.moments import clock
from prvr_nb.videos.search import Hit, moment_text

THUMBNAIL = 320 # pixels, width of a picture in a card
WIDTH = 300 # of a drawing, in units of its own


class Card(NamedTuple):
    "What is shown of a result."
    hit:Hit
    place:int # rank
    picture:str # <img> or <svg>
    own:bool # whether the query is a caption of this video
    truth:list # of Moment: where it was annotated
    said:str|None # a caption of the corpus about the best frame


class Answer(NamedTuple):
    "What one method found."
    cards:list # of Card, the best first
    weight:float # of the clip score
    ranks:dict # video that the query is a caption of → its rank

    @property
    def hits(self)->list:
        "The results themselves."
        return [card.hit for card in self.cards]

    @property
    def scale(self)->tuple:
        "Lowest and highest relevance of all cards: they are drawn alike."
        curves = torch.cat([hit.curve for hit in self.hits]) if self.cards else torch.zeros(1)
        return curves.min().item(), curves.max().item()


def all_cards(answers:dict)->list: # name of a method → Answer
    "The cards of all methods."
    return [card for found in answers.values() for card in found.cards]


# Pictures

def jpeg(image)->bytes: # of a PIL image
    "A small copy of a picture."
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()

@lru_cache(maxsize=256)
def frame_jpeg(path:Path, changed:float, seconds:float)->bytes:
    "The frame of a video at a time, small; remembered as long as the file has not changed."
    return jpeg(frame_at(path, seconds))

def image_html(picture:bytes, alt:str)->str: # of a JPEG; what it shows
    "A picture as part of a card."
    data = base64.b64encode(picture).decode()
    return f'<img class="prvr-thumb" alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'

def svg(name:str, height:int, marks:str, alt:str)->str: # a class of the style sheet; units; elements; what they show
    "A drawing that is stretched to the width of its card."
    alt = html.escape(alt)
    return (f'<svg class="{name}" viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" role="img" '
            f'aria-label="{alt}"><title>{alt}</title>{marks}</svg>')

def stretch(look:str, start:float, end:float, top:int, height:int)->str: # an attribute; shares of the video; units
    "A part of the video as a block, wide enough to be seen."
    width = max(WIDTH * (end - start), 2)
    return f'<rect {look} x="{WIDTH * start:.1f}" y="{top}" width="{width:.1f}" height="{height}"/>'

def peak_line(peak:float, height:int)->str: # share of the video; units
    "The mark at the best frame."
    return f'<line class="prvr-peak" x1="{WIDTH * peak:.1f}" x2="{WIDTH * peak:.1f}" y1="0" y2="{height}"/>'

def events_html(events:np.ndarray|None, peak:float)->str: # of find_events; share of the video
    "The events of a video as coloured blocks over time, with a mark at the best frame."
    if events is None:
        return svg("prvr-thumb", 40, "", "no picture: neither the video file nor its features are there")
    n, cuts = len(events), np.flatnonzero(np.diff(events, prepend=-1)).tolist()
    blocks = [stretch(f'fill="{colour_of(events[start])}"', start / n, end / n, 0, 40)
              for start, end in pairwise([*cuts, n])]
    best = events[min(int(peak * n), n - 1)] + 1
    alt = f"{len(cuts)} event{'s' * (len(cuts) > 1)} drawn from the features; the best frame lies in event {best}"
    return svg("prvr-thumb", 40, "".join(blocks) + peak_line(peak, 40), alt)

def strip_html(hit:Hit, low:float, high:float, truth:list=())->str: # relevance of bottom and top; annotated Moments
    "The relevance curve with the moment shaded, the best frame marked and annotated moments underlined."
    heights = (42 - 38 * ((hit.curve - low) / max(high - low, 1e-9)).clamp(0, 1)).tolist()
    step = WIDTH / len(heights)
    points = [(0, heights[0]), *(((i + 0.5) * step, y) for i, y in enumerate(heights)), (WIDTH, heights[-1])]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [stretch('class="prvr-moment"', hit.start, hit.end, 0, 44),
             f'<polygon points="0,44 {line} {WIDTH},44"/><polyline points="{line}"/>', peak_line(hit.peak, 44),
             *(stretch('class="prvr-truth"', m.start / m.duration, m.end / m.duration, 46, 4) for m in truth)]
    alt = f"Relevance over the video, highest {peak_text(hit)}; moment {moment_text(hit)}"
    return svg("prvr-strip", 50, "".join(marks), alt)


# Words

def peak_text(hit:Hit)->str: # e.g. 'at 0:14', or 'at 35 %' when the duration is unknown
    "Where the best frame is, for a person."
    return f"at {clock(hit.seconds[2])}" if hit.seconds else f"at {100 * hit.peak:.0f} %"

def weight_text(weight:float)->str: # weight of the clip score
    "What a method's score is made of."
    if weight in (0, 1):
        return f"the score is that of the best {'clip' if weight else 'frame'}"
    return f"the score is {100 * (1 - weight):.0f} % best frame, {100 * weight:.0f} % best clip"

def block(name:str, content:str)->str: # <div>
    "A part of a card."
    return f'<div class="{name}">{content}</div>'

def card_html(card:Card, low:float, high:float)->str: # relevance of bottom and top
    "A search result for a person: picture, title, score, curve, moment, and what the corpus says of it."
    hit, title = card.hit, html.escape(card.hit.title)
    line = (f'<span class="prvr-place">{card.place}</span><span class="prvr-title" title="{title}">{title}</span>'
            f'<span class="prvr-score" title="score: higher is better, within one column">{hit.score:.3f}</span>')
    times = f'<span class="prvr-when">{moment_text(hit)}</span><span>best {peak_text(hit)}</span>'
    parts = [card.picture, block("prvr-line", line), strip_html(hit, low, high, card.truth), block("prvr-times", times)]
    if card.own:
        parts.append(block("prvr-own", "✓ this sentence is a caption of this video"))
    if card.said:
        parts.append(block("prvr-said", f"Caption at the best frame: “{html.escape(card.said)}”"))
    return "".join(parts)

def head_html(name:str, answer:Answer)->str: # of a method
    "What stands above a column: the method, its score, and where the right video is when that is known."
    best = min(answer.ranks.values(), default=0)
    rank = block("prvr-rank", f"the right video is number {best}") if best else ""
    return block("prvr-method", html.escape(name)) + block("prvr-formula", weight_text(answer.weight)) + rank

def legend_html(cards:list)->str: # of Card: those that are shown
    "What the marks in these cards mean."
    blocks = "".join(f'<rect x="{7.4 * i:.1f}" width="7.4" height="11" fill="{colour_of(i)}"/>' for i in range(3))
    marks = {"relevance of each part of the video": '<polyline points="0,9 6,7 11,2 16,3 22,8"/>',
             "the moment that was found": '<rect class="prvr-moment" width="22" height="11"/>',
             "its best frame": '<line class="prvr-peak" x1="11" x2="11" y1="0" y2="11"/>'}
    if any(card.truth for card in cards):
        marks["annotated moment of the caption"] = '<rect class="prvr-truth" y="4" width="22" height="4"/>'
    if any(card.picture.startswith("<svg") for card in cards):
        marks["events, cut where the features change; each video counts its colours afresh"] = blocks
    return block("prvr-legend", "".join(f'<span><svg viewBox="0 0 22 11" aria-hidden="true">{mark}</svg>{text}</span>'
                                        for text, mark in marks.items()))

def column_html(name:str, answer:Answer)->str: # of a method
    "A column of cards."
    cards = [block("prvr-card" + " prvr-mine" * card.own, card_html(card, *answer.scale)) for card in answer.cards]
    return block("prvr-column", block("prvr-head", head_html(name, answer)) + "".join(cards))

def results_html(answers:dict)->str: # name of a method → Answer
    "What the panel shows, as text that can be stored."
    columns = "".join(column_html(name, found) for name, found in answers.items())
    return STYLE + block("prvr-panel", legend_html(all_cards(answers)) + block("prvr-columns", columns))


STYLE = """<style>
.prvr-panel, .prvr-page {max-width: 1280px}
.prvr-panel {
  --prvr-line: var(--jp-border-color2, #8886); --prvr-soft: var(--jp-layout-color2, #8881);
  color: var(--jp-content-font-color1, inherit); font: 14px/1.4 var(--jp-ui-font-family, system-ui, sans-serif)}
.prvr-page {margin: 0 auto}
:is(.prvr-page, .prvr-panel) :is(.widget-html, .widget-html-content) {height: auto; font: inherit; color: inherit}
.prvr-panel .widget-html-content {width: 100%}
.prvr-page h1 {font-size: 26px; margin: 0 0 4px}
.prvr-page p {margin: 4px 0}
.prvr-controls, .prvr-columns, .prvr-legend {display: flex; flex-flow: row wrap; gap: 2px 16px; overflow: visible}
.prvr-controls {align-items: center}
.prvr-column {flex: 1 1 250px; min-width: 0; overflow: visible}
.prvr-column:only-child {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 0 16px; align-items: start}
.prvr-column:only-child > .prvr-head {grid-column: 1 / -1}
:is(.prvr-formula, .prvr-times, .prvr-said, .prvr-legend, .prvr-own, .prvr-status) {font-size: 12.5px}
:is(.prvr-method, .prvr-rank, .prvr-place, .prvr-when, .prvr-own) {font-weight: 600}
.prvr-method {font-size: 16px}
.prvr-card, .prvr-player video {box-sizing: border-box}
.prvr-card {border: 1px solid var(--prvr-line); border-radius: 6px; padding: 8px; margin: 8px 0 0; overflow: hidden}
.prvr-card.prvr-mine {border: 2px solid #009E73; padding: 7px}
.prvr-thumb, .prvr-strip {display: block; width: 100%; border-radius: 3px}
img.prvr-thumb {max-height: 190px; object-fit: contain; background: #000}
svg.prvr-thumb {height: 26px}
.prvr-strip {height: 50px; background: var(--prvr-soft)}
.prvr-line, .prvr-times {display: flex; gap: 8px; justify-content: space-between; margin: 5px 0 2px}
.prvr-title {flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.prvr-panel polyline {fill: none; stroke: currentColor; stroke-width: 1.5; vector-effect: non-scaling-stroke}
.prvr-strip polygon {fill: currentColor; opacity: .14}
.prvr-moment {fill: #CC79A7; opacity: .5}
.prvr-truth {fill: #009E73}
.prvr-peak {stroke: #D55E00; stroke-width: 2; vector-effect: non-scaling-stroke}
svg.prvr-thumb .prvr-peak {stroke: #000; stroke-width: 3}
.prvr-own {border-left: 4px solid #009E73; padding-left: 6px; margin-top: 4px}
.prvr-player video {width: 100%; max-height: 300px; background: #000}
.prvr-legend svg {width: 22px; height: 11px; margin-right: 5px}
</style>"""
