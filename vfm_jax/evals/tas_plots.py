"""Draw segmentations of videos against the truth."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Classes in a row of the legend.
_COLUMNS = 5


def strips(
  videos: Sequence[tuple[str, np.ndarray, np.ndarray]],
  classes: Sequence[str],
  fps: float,
) -> bytes:
  """Draw two strips a video, the truth above the prediction, as a PNG.

  Args:
    videos: (id, true int [F], predicted int [F]) of each.
    classes: their names.
    fps: frames a second, of the axis.

  Raises:
    ValueError: there is no video.
  """
  if not videos:
    raise ValueError('expected at least one video to draw, found none')
  shades = matplotlib.colormaps['turbo'](np.linspace(0.03, 0.97, len(classes)))
  # Neighbours in the list of classes often follow each other in time.
  colours = ListedColormap(shades[_spread(len(classes))])
  used = np.unique(np.concatenate([y for _, *ys in videos for y in ys]))
  legend = 0.25 * -(-len(used) // _COLUMNS)
  size = (10.0, 0.9 * len(videos) + legend + 0.5)
  figure = Figure(figsize=size, dpi=110, facecolor='white')
  axes = figure.subplots(len(videos), 1, squeeze=False)[:, 0]
  for axis, (video, truth, predicted) in zip(axes, videos, strict=True):
    axis.imshow(
      np.stack([truth, predicted]),
      cmap=colours,
      vmin=-0.5,
      vmax=len(classes) - 0.5,
      aspect='auto',
      interpolation='nearest',
      extent=(0, len(truth) / fps, 1.5, -0.5),
    )
    axis.axhline(0.5, color='white', linewidth=2)
    axis.set_yticks([0, 1], ['truth', 'found'], fontsize=7)
    axis.tick_params(axis='x', labelsize=7)
    axis.set_title(video, fontsize=8, loc='left')
  axes[-1].set_xlabel('s', fontsize=8)
  handles = [Patch(color=colours(int(c)), label=classes[c]) for c in used]
  figure.tight_layout(rect=(0, legend / size[1], 1, 1))
  figure.legend(
    handles=handles,
    loc='lower center',
    ncols=_COLUMNS,
    fontsize=7,
    frameon=False,
  )
  out = io.BytesIO()
  FigureCanvasAgg(figure).print_png(out)
  return out.getvalue()


def _spread(n: int) -> np.ndarray:
  """Return 0 to n - 1 so that neighbours are far apart."""
  return np.argsort(np.arange(n) * 0.618034 % 1.0, kind='stable')
