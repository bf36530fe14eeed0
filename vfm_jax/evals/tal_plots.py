"""Draw detected actions of videos below the true ones."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vfm_jax.evals.report_data import Timeline

# Classes in a row of the legend.
_COLUMNS = 5


def bars(videos: Sequence[Timeline]) -> bytes:
  """Draw a panel a video, as a PNG: each action is a bar over its time.

  The truth is above the line. Detections are below it, fainter the lower
  their score; overlapping ones are laid over each other.

  Raises:
    ValueError: there is no video.
  """
  if not videos:
    raise ValueError('expected at least one video to draw, found none')
  labels = sorted({s.label for v in videos for s in (*v.truth, *v.predicted)})
  shades = matplotlib.colormaps['turbo'](np.linspace(0.05, 0.95, len(labels)))
  colours = dict(zip(labels, shades, strict=True))
  legend = 0.25 * -(-len(labels) // _COLUMNS)
  size = (10.0, 1.0 * len(videos) + legend + 0.5)
  figure = Figure(figsize=size, dpi=110, facecolor='white')
  axes = figure.subplots(len(videos), 1, squeeze=False)[:, 0]
  for axis, video in zip(axes, videos, strict=True):
    top = max((s.score or 0.0 for s in video.predicted), default=1.0) or 1.0
    for row, segments in ((1, video.truth), (0, video.predicted)):
      for s in segments:
        alpha = 1.0 if s.score is None else 0.15 + 0.85 * s.score / top
        axis.barh(
          row,
          s.end - s.start,
          left=s.start,
          height=0.8,
          color=(*colours[s.label][:3], alpha),
        )
    axis.axhline(0.5, color='#6e7781', linewidth=0.8)
    axis.set_xlim(0, video.length)
    axis.set_ylim(-0.5, 1.5)
    axis.set_yticks([1, 0], ['truth', 'found'], fontsize=7)
    axis.tick_params(axis='x', labelsize=7)
    axis.set_title(video.name, fontsize=8, loc='left')
  axes[-1].set_xlabel('s', fontsize=8)
  figure.tight_layout(rect=(0, legend / size[1], 1, 1))
  figure.legend(
    handles=[Patch(color=colours[label], label=label) for label in labels],
    loc='lower center',
    ncols=_COLUMNS,
    fontsize=7,
    frameon=False,
  )
  out = io.BytesIO()
  FigureCanvasAgg(figure).print_png(out)
  return out.getvalue()
