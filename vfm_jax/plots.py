"""Draw training curves, grids of clips and animations.

Figures are built on their own canvas: no display is needed and the user's
matplotlib state is not touched.
"""

import io
import json
import math
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]

_INK, _MUTED, _GRID, _LINE = '#1f2328', '#6e7781', '#e4e7eb', '#2f6fb0'
_EVAL = '#c2571a'
# Leading panels, with title, unit and colour of what the loop reports.
_KNOWN = {
  'loss': ('loss', ''),
  'lr': ('learning rate', ''),
  'grad_norm': ('gradient norm', ''),
  'examples_per_s': ('throughput', 'examples / s'),
  'step_s': ('step time', 's'),
  'data_wait': ('data wait', 'fraction of time'),
  'device_gib': ('device memory, peak', 'GiB'),
}


def read_jsonl(path: str | os.PathLike) -> dict[str, tuple]:
  """Read curves from JSON lines: {name: (steps int64 [n], values f64 [n])}.

  Steps ascend; where a step was written twice the later value holds. null
  reads as NaN.
  """
  points: dict[str, dict[int, float]] = {}
  for line in pathlib.Path(path).read_text().splitlines():
    row = json.loads(line)
    step = row.pop('step')
    row.pop('time', None)
    for name, value in row.items():
      if value is None or isinstance(value, int | float):
        value = math.nan if value is None else float(value)
        points.setdefault(name, {})[step] = value
  return {
    name: (
      np.array(sorted(at), np.int64),
      np.array([at[s] for s in sorted(at)], np.float64),
    )
    for name, at in points.items()
  }


def plot_curves(
  curves: Curves | str | os.PathLike, out: str | os.PathLike, *, title: str = ''
) -> pathlib.Path:
  """Draw small multiples, one panel a metric, as a PNG.

  Args:
    curves: as `read_jsonl` returns them, or the path of such a file. Metrics
      that are 0 all along are left out.
    out: file to write.
    title: printed above the panels.

  Raises:
    ValueError: there is nothing to draw.
  """
  if isinstance(curves, str | os.PathLike):
    curves = read_jsonl(curves)
  names = [k for k in _KNOWN if k in curves]
  names += sorted(k for k in curves if k not in _KNOWN and '/' not in k)
  names += sorted(k for k in curves if '/' in k)
  names = [k for k in names if k == 'loss' or np.any(curves[k][1] != 0)]
  if not names:
    raise ValueError(f'no curves to draw into {os.fspath(out)}')
  columns = min(3, len(names))
  rows = math.ceil(len(names) / columns)
  size = (4.2 * columns, 2.7 * rows + 0.4)
  figure = Figure(figsize=size, dpi=110, facecolor='white')
  axes = figure.subplots(rows, columns, squeeze=False)
  last = max(int(curves[k][0][-1]) for k in names)
  for i, axis in enumerate(axes.flat):
    if i < len(names):
      steps, values = curves[names[i]]
      _panel(axis, names[i], steps, values, last)
      if i + columns >= len(names):
        axis.set_xlabel('step', color=_MUTED, fontsize=8)
    else:
      axis.set_axis_off()
  if title:
    figure.suptitle(title, color=_INK, fontsize=11, x=0.01, ha='left')
  figure.tight_layout()
  return save_figure(figure, out)


def clip_grid(
  videos: Mapping[str, np.ndarray],
  out: str | os.PathLike,
  *,
  clips: int = 4,
  frames: int = 8,
  title: str = '',
) -> pathlib.Path:
  """Draw clips as a PNG: a row a kind for each clip, a column a frame.

  Clips of one frame are images: a row a kind, a column an image.

  Args:
    videos: kinds of the same clips by name, uint8 [B, T, H, W, 3] each.
    out: file to write.
    clips: the first so many clips are drawn.
    frames: so many frames, evenly over the clip with both its ends; of
      images, the first so many.
    title: printed above the grid.

  Raises:
    ValueError: the kinds differ in shape or are no videos.
  """
  b, t, h, w = _check(videos)
  unit = 'frame'
  if t == 1:
    unit, t, b = 'image', min(b, frames), 1
    videos = {k: np.swapaxes(v[:t], 0, 1) for k, v in videos.items()}
  b = min(b, clips)
  at = np.unique(np.linspace(0, t - 1, min(frames, t)).round().astype(int))
  scale = _scale(h, w, 96)
  gap, apart, left, top = 3, 14, 104, 26 + (26 if title else 0)
  cell_h, cell_w = h * scale, w * scale
  clip_h = len(videos) * (cell_h + gap)
  size = (
    left + len(at) * (cell_w + gap) + 8,
    top + b * clip_h + (b - 1) * apart + 8,
  )
  canvas = Image.new('RGB', size, 'white')
  draw = ImageDraw.Draw(canvas)
  font = ImageFont.load_default(12)
  if title:
    draw.text((8, 8), title, _INK, ImageFont.load_default(15))
  for j, frame in enumerate(at):
    middle = left + j * (cell_w + gap) + cell_w // 2
    draw.text((middle, top - 12), f'{frame}', _MUTED, font, anchor='mm')
  draw.text((left - 10, top - 12), unit, _MUTED, font, anchor='rm')
  for i in range(b):
    for r, (kind, video) in enumerate(videos.items()):
      y = top + i * (clip_h + apart) + r * (cell_h + gap)
      place = (left - 10, y + cell_h // 2)
      draw.text(place, _short(kind), _INK, font, anchor='rm')
      for j, frame in enumerate(at):
        picture = _enlarge(video[i, frame], scale)
        canvas.paste(picture, (left + j * (cell_w + gap), y))
  canvas.save(out, 'PNG')
  return pathlib.Path(out)


def sample_grid(
  samples: np.ndarray, out: str | os.PathLike, *, fps: float = 8.0
) -> pathlib.Path:
  """Draw samples uint8 [N, T, H, W, 3] in a square grid, in reading order.

  Args:
    samples: images (T = 1) or clips; the last row may be short.
    out: file to write; its suffix follows: `.png` for images, `.gif` for clips.
    fps: frames a second.

  Returns:
    The file that was written.
  """
  n, t, h, w = _check({'samples': samples})
  columns = math.ceil(math.sqrt(n))
  scale, gap = _scale(h, w, 64), 2
  size = (
    gap + columns * (w * scale + gap),
    gap + math.ceil(n / columns) * (h * scale + gap),
  )
  pictures = []
  for frame in range(t):
    canvas = Image.new('RGB', size, 'white')
    for i in range(n):
      row, column = divmod(i, columns)
      place = gap + column * (w * scale + gap), gap + row * (h * scale + gap)
      canvas.paste(_enlarge(samples[i, frame], scale), place)
    pictures.append(canvas)
  if t == 1:
    out = pathlib.Path(out).with_suffix('.png')
    pictures[0].save(out, 'PNG')
    return out
  out = pathlib.Path(out).with_suffix('.gif')
  out.write_bytes(_gif(pictures, fps))
  return out


def animate(
  videos: Mapping[str, np.ndarray],
  out: str | os.PathLike,
  *,
  clips: int = 4,
  fps: float = 8.0,
) -> pathlib.Path:
  """Write a looping GIF: a row a clip, a column a kind.

  Args and errors as `clip_grid`; `fps` in frames a second.
  """
  path = pathlib.Path(out)
  path.write_bytes(gif_bytes(videos, clips=clips, fps=fps))
  return path


def gif_bytes(
  videos: Mapping[str, np.ndarray], *, clips: int = 4, fps: float = 8.0
) -> bytes:
  """Return what `animate` writes."""
  b, t, h, w = _check(videos)
  b = min(b, clips)
  scale = _scale(h, w, 128)
  gap, top = 4, 22
  cell_h, cell_w = h * scale, w * scale
  size = (
    gap + len(videos) * (cell_w + gap),
    top + b * (cell_h + gap),
  )
  font = ImageFont.load_default(12)
  pictures = []
  for frame in range(t):
    canvas = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(canvas)
    for j, (kind, video) in enumerate(videos.items()):
      x = gap + j * (cell_w + gap)
      middle = (x + cell_w // 2, top // 2)
      draw.text(middle, _short(kind, cell_w // 7), _INK, font, anchor='mm')
      for i in range(b):
        picture = _enlarge(video[i, frame], scale)
        canvas.paste(picture, (x, top + i * (cell_h + gap)))
    pictures.append(canvas)
  return _gif(pictures, fps)


def gif_size(data: bytes) -> tuple[int, int]:
  """Return (height, width) of an encoded picture."""
  with Image.open(io.BytesIO(data)) as picture:
    return picture.height, picture.width


def _panel(axis, name: str, steps, values, last: int) -> None:
  """Draw one metric: raw and smoothed where there are many points."""
  title, unit = _KNOWN.get(name, (name.replace('_', ' '), ''))
  if name.endswith('top1'):
    unit = 'fraction correct'
  color = _EVAL if '/' in name else _LINE
  good = np.isfinite(values)
  if len(values) > 60 and name != 'lr':
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(steps, _smooth(values), color=color, linewidth=1.6)
  else:
    marker = 'o' if len(values) <= 30 and name != 'lr' else None
    axis.plot(steps, values, color=color, lw=1.6, marker=marker, ms=3)
  if not good.all():
    axis.plot(
      steps[~good],
      np.full((~good).sum(), 0.02),
      'x',
      color='#c0392b',
      ms=5,
      transform=axis.get_xaxis_transform(),
      label='not finite',
    )
    axis.legend(frameon=False, fontsize=7)
  real = values[good]
  # Decades apart, a linear axis would show only the first steps.
  decades = real.size and 0 < 30 * real.min() < real.max()
  if decades and name in ('loss', 'grad_norm'):
    axis.set_yscale('log')
  if axis.get_yscale() == 'linear':
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f'{v:g}'))
    if name.endswith('top1'):
      axis.set_ylim(0, 1.04)
    elif real.size and real.min() == real.max() > 0:
      axis.set_ylim(0, 1.5 * real.max())
  if real.size:
    axis.set_title(
      f'{real[-1]:.4g}', loc='right', fontsize=9, color=color, pad=6
    )
  axis.set_title(title, loc='left', fontsize=9, color=_INK, pad=6)
  axis.set_ylabel(unit, color=_MUTED, fontsize=8)
  axis.set_xlim(0, max(last, 1) * 1.02)
  axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axis.grid(color=_GRID, linewidth=0.8)
  axis.set_axisbelow(True)
  axis.spines[['top', 'right']].set_visible(False)
  axis.spines[['left', 'bottom']].set_color(_GRID)
  axis.tick_params(labelsize=8, labelcolor=_MUTED)
  axis.tick_params(which='both', color=_GRID, length=3)


def _smooth(values: np.ndarray) -> np.ndarray:
  """Return the mean over a centred window of 1/40 of the points."""
  n = max(len(values) // 40, 1) * 2 + 1
  good = np.isfinite(values)
  kernel = np.ones(n)
  sums = np.convolve(np.where(good, values, 0), kernel, 'same')
  counts = np.convolve(good, kernel, 'same')
  return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def save_figure(figure: Figure, out: str | os.PathLike) -> pathlib.Path:
  """Write a figure as a PNG; return its path."""
  FigureCanvasAgg(figure).print_png(os.fspath(out))
  return pathlib.Path(out)


def _gif(pictures: list[Image.Image], fps: float) -> bytes:
  """Encode pictures as a looping animation."""
  first, *rest = (
    p.quantize(256, method=Image.Quantize.MEDIANCUT) for p in pictures
  )
  data = io.BytesIO()
  first.save(
    data,
    'GIF',
    save_all=True,
    append_images=rest,
    duration=max(round(1000 / fps), 20),
    loop=0,
    disposal=1,
    optimize=False,
  )
  return data.getvalue()


def _check(videos: Mapping[str, np.ndarray]) -> tuple[int, int, int, int]:
  """Return (B, T, H, W) that all kinds share."""
  shapes = {k: (v.dtype.name, *np.shape(v)) for k, v in videos.items()}
  found = set(shapes.values())
  one = next(iter(found), ())
  if len(found) != 1 or len(one) != 6 or one[0] != 'uint8' or one[-1] != 3:
    raise ValueError(
      'expected kinds of clips as uint8 [B, T, H, W, 3], all of one shape; '
      f'found {shapes}'
    )
  return one[1:5]


def _scale(h: int, w: int, least: int) -> int:
  """Return the whole factor that brings the longer side to `least` or more."""
  return max(1, math.ceil(least / max(h, w)))


def _enlarge(frame: np.ndarray, scale: int) -> Image.Image:
  picture = Image.fromarray(np.asarray(frame))
  size = (picture.width * scale, picture.height * scale)
  return picture.resize(size, Image.Resampling.NEAREST)


def _short(text: str, most: int = 15) -> str:
  text = text.replace('_', ' ')
  return text if len(text) <= most else f'{text[: max(most - 1, 1)]}…'
