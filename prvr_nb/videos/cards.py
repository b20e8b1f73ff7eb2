"""HTML of one result of a search."""
import base64
import html
import io
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from prvr_nb.plots import colour_of
from prvr_nb.videos.frames import frame_at
from prvr_nb.videos.moments import clock
from prvr_nb.videos.search import Hit, moment_text


THUMB = 320 # pixels, width of a picture in a card

def jpeg(
    image, # PIL image
    width:int=THUMB, # pixels, at most
)->bytes: # a file
    "A small copy of a picture."
    image.thumbnail((width, width))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()

@lru_cache(maxsize=256)
def frame_jpeg(
    path:Path, # of a video
    changed:float, # when, so that another file of this name has another picture
    seconds:float, # since its start
)->bytes: # a file
    "The frame of a video at a time, small; remembered."
    return jpeg(frame_at(path, seconds))


def image_html(
    picture:bytes, # JPEG
    alt:str, # what it shows
)->str: # <img>
    "A picture as part of a card."
    return f'<img class="prvr-thumb" alt="{html.escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'

def events_html(
    events:np.ndarray|None, # of find_events
    peak:float, # share of the video
)->str: # <svg>
    "The events of a video as coloured blocks over time, with a mark at the best frame."
    if events is None: return '<svg class="prvr-thumb" viewBox="0 0 300 40" role="img" aria-label="no picture: neither the video file nor its features are there"></svg>'
    starts = np.flatnonzero(np.diff(events, prepend=-1))
    ends, at = [*starts[1:], len(events)], events[min(int(peak * len(events)), len(events) - 1)]
    scale, blocks = 300 / len(events), []
    for start, end in zip(starts, ends):
        blocks.append(f'<rect x="{start * scale:.1f}" y="0" width="{(end - start) * scale:.1f}" height="40" fill="{colour_of(events[start])}"/>')
    alt = f"{len(starts)} event{'s' if len(starts) > 1 else ''} drawn from the features; the best frame lies in event {at + 1}"
    return (f'<svg class="prvr-thumb" viewBox="0 0 300 40" preserveAspectRatio="none" role="img" aria-label="{alt}"><title>{alt}</title>{"".join(blocks)}'
            f'<line x1="{300 * peak:.1f}" x2="{300 * peak:.1f}" y1="0" y2="40" class="prvr-peak"/></svg>')


def strip_html(
    hit:Hit,
    low:float, # relevance that is drawn lowest
    high:float, # relevance that is drawn highest
    truth:list=(), # of Moment: where the query was annotated in this video
)->str: # <svg>
    "The relevance curve with the moment shaded, the best frame marked and annotated moments underlined."
    heights = 42 - 38 * ((hit.curve - low) / max(high - low, 1e-9)).clamp(0, 1)
    step = 300 / len(heights)
    points = [(0, heights[0]), *(((i + 0.5) * step, y) for i, y in enumerate(heights)), (300, heights[-1])]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, width = 300 * hit.start, max(300 * (hit.end - hit.start), 2)
    alt = f"Relevance over the video, highest {peak_text(hit)}; moment {moment_text(hit)}"
    under = "".join(f'<rect class="prvr-truth" x="{300 * m.start / m.duration:.1f}" y="46" width="{max(300 * (m.end - m.start) / m.duration, 2):.1f}" height="4"><title>annotated moment</title></rect>' for m in truth)
    return (f'<svg class="prvr-strip" viewBox="0 0 300 50" preserveAspectRatio="none" role="img" aria-label="{alt}"><title>{alt}</title>'
            f'<rect class="prvr-moment" x="{x:.1f}" y="0" width="{width:.1f}" height="44"/><polygon points="0,44 {line} 300,44"/><polyline points="{line}"/>'
            f'<line class="prvr-peak" x1="{300 * hit.peak:.1f}" x2="{300 * hit.peak:.1f}" y1="0" y2="44"/>{under}</svg>')

def peak_text(
    hit:Hit,
)->str: # e.g. 'at 0:14', or 'at 35 %' when the duration is unknown
    "Where the best frame is, for a person."
    return f"at {clock(hit.seconds[2])}" if hit.seconds else f"at {100 * hit.peak:.0f} %"


class Card(NamedTuple):
    "What a card shows of a result."
    hit:Hit
    place:int # rank
    picture:str # <img> or <svg>
    own:bool # whether the query is a caption of this video
    truth:list # of Moment: where it was annotated
    said:str|None # a caption of the corpus about the best frame

def card_html(
    card:Card,
    low:float, # relevance that is drawn lowest
    high:float, # relevance that is drawn highest
)->str: # a fragment
    "A search result for a person: picture, title, score, curve, moment, and what the corpus says of it."
    hit, escape = card.hit, html.escape
    own = '<div class="prvr-own">✓ the caption\'s own video</div>' if card.own else ""
    said = f'<div class="prvr-said">Caption at the best frame: “{escape(card.said)}”</div>' if card.said else ""
    return (f'{card.picture}<div class="prvr-line"><span class="prvr-place">{card.place}</span><span class="prvr-title" title="{escape(hit.title)}">{escape(hit.title)}</span>'
            f'<span class="prvr-score" title="fused cosine">{hit.score:.3f}</span></div>{strip_html(hit, low, high, card.truth)}'
            f'<div class="prvr-times"><span class="prvr-when">{moment_text(hit)}</span><span>best {peak_text(hit)}</span></div>{own}{said}')


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


def weight_text(
    answer:Answer,
    clips:bool, # whether the method has a clip branch
)->str:
    "What a method's score is made of."
    return f"{answer.weight:.2f} · clips + {1 - answer.weight:.2f} · frames" if clips else "frames only: it has no clip branch"

def head_html(
    name:str, # of the method
    answer:Answer,
    clips:bool, # whether the method has a clip branch
)->str: # a fragment
    "What stands above a column: the method, its score, and where the caption's own video is."
    rank = f'<div class="prvr-rank">own video: rank {min(answer.ranks.values())}</div>' if answer.ranks else ""
    return f'<div class="prvr-method">{html.escape(name)}</div><div class="prvr-formula">{weight_text(answer, clips)}</div>{rank}'


STYLE = """<style>
.prvr-panel{--prvr-line:var(--jp-border-color2,#8886);--prvr-soft:var(--jp-layout-color2,#8881);color:var(--jp-content-font-color1,inherit);font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:14px;line-height:1.4;max-width:1280px}
.prvr-page{max-width:1280px;margin:0 auto}
.prvr-page .widget-html,.prvr-panel .widget-html,.prvr-page .widget-html-content,.prvr-panel .widget-html-content{height:auto;line-height:1.4;font-size:14px;color:inherit}
.prvr-panel .widget-html-content{width:100%}
.prvr-page h1{font-size:26px;margin:0 0 4px}
.prvr-page p{margin:4px 0}
.prvr-columns{display:flex;flex-flow:row wrap;gap:16px;overflow:visible}
.prvr-column{flex:1 1 250px;min-width:0;max-width:520px;overflow:visible}
.prvr-column:only-child{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:0 16px;max-width:none;align-items:start}
.prvr-column:only-child>.prvr-head{grid-column:1/-1}
.prvr-method{font-weight:600;font-size:16px}
.prvr-formula,.prvr-rank,.prvr-times,.prvr-said,.prvr-note{font-size:12.5px;opacity:.85}
.prvr-rank{font-weight:600;opacity:1}
.prvr-card{border:1px solid var(--prvr-line);border-radius:6px;padding:8px;margin:8px 0 0;overflow:hidden;box-sizing:border-box}
.prvr-card.prvr-mine{border:2px solid #009E73;padding:7px}
.prvr-thumb{display:block;width:100%;border-radius:3px}
img.prvr-thumb{max-height:190px;object-fit:contain;background:#000}
svg.prvr-thumb{height:26px}
.prvr-line{display:flex;gap:8px;align-items:baseline;margin:6px 0 2px}
.prvr-place{font-weight:600;min-width:1.2em}
.prvr-title{flex:1;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.prvr-score{font-variant-numeric:tabular-nums}
.prvr-strip{display:block;width:100%;height:50px;background:var(--prvr-soft);border-radius:3px}
.prvr-strip polyline{fill:none;stroke:currentColor;stroke-width:1.5;vector-effect:non-scaling-stroke}
.prvr-strip polygon{fill:currentColor;opacity:.14}
.prvr-moment{fill:#CC79A7;opacity:.5}
.prvr-truth{fill:#009E73}
.prvr-peak{stroke:#D55E00;stroke-width:2;vector-effect:non-scaling-stroke}
svg.prvr-thumb .prvr-peak{stroke:#000;stroke-width:3}
.prvr-times{display:flex;justify-content:space-between;margin-top:2px}
.prvr-when{font-weight:600}
.prvr-own{color:inherit;font-weight:600;border-left:4px solid #009E73;padding-left:6px;margin-top:4px}
.prvr-said{margin-top:4px}
.prvr-status{min-height:1.5em;font-size:13px}
.prvr-controls{flex-flow:row wrap;gap:4px 12px;align-items:center;overflow:visible}
.prvr-player video{width:100%;max-height:300px;background:#000}
.prvr-legend{display:flex;flex-flow:row wrap;gap:2px 18px;font-size:12.5px;opacity:.85}
.prvr-legend svg{width:22px;height:11px;margin-right:5px}
.prvr-legend polyline{fill:none;stroke:currentColor;stroke-width:1.5}
</style>"""


def legend_html(
    cards:list, # of Card: those that are shown
)->str: # a fragment
    "What the marks in these cards mean."
    marks = [('<polyline points="0,9 6,7 11,2 16,3 22,8"/>', "relevance of each part of the video"), ('<rect class="prvr-moment" width="22" height="11"/>', "the moment that was found"),
             ('<line class="prvr-peak" x1="11" x2="11" y1="0" y2="11"/>', "its best frame")]
    marks += [('<rect class="prvr-truth" y="4" width="22" height="4"/>', "annotated moment of the caption")] * any(card.truth for card in cards)
    blocks = "".join(f'<rect x="{7.4 * i:.1f}" width="7.4" height="11" fill="{colour_of(i)}"/>' for i in range(3))
    marks += [(blocks, "events, cut where the features change; colours are counted afresh in each video")] * any(card.picture.startswith("<svg") for card in cards)
    return '<div class="prvr-legend">' + "".join(f'<span><svg viewBox="0 0 22 11" aria-hidden_size="true">{mark}</svg>{meaning}</span>' for mark, meaning in marks) + "</div>"


def column_html(
    name:str, # of the method
    answer:Answer,
    clips:bool, # whether the method has a clip branch
)->str: # a fragment
    "A column of cards, without widgets."
    cards = "".join(f'<div class="prvr-card{" prvr-mine" * card.own}">{card_html(card, *answer.scale)}</div>' for card in answer.cards)
    return f'<div class="prvr-column"><div class="prvr-head">{head_html(name, answer, clips)}</div>{cards}</div>'

def results_html(
    answers:dict, # name of a method → Answer
    clips:dict, # name of a method → whether it has a clip branch
)->str: # a page's fragment
    "What the panel shows, as text that can be stored."
    columns = "".join(column_html(name, found, clips[name]) for name, found in answers.items())
    return f'{STYLE}<div class="prvr-panel">{legend_html(all_cards(answers))}<div class="prvr-columns">{columns}</div></div>'

def all_cards(
    answers:dict, # name of a method → Answer
)->list: # of Card
    "The cards of all methods."
    return [card for found in answers.values() for card in found.cards]
