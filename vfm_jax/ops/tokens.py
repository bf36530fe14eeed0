"""Cut videos into tokens, put them back, and pick subsets of tokens.

Tokens are in raster order, time-major: n = (t * H' + h) * W' + w. The features
of a token are in the order (p0 p1 p2 c): frame, row, column, then colour.
"""

import jax
import jax.numpy as jnp

Grid = tuple[int, int, int]


def fill_tubelet(video: jax.Array, tubelet: int) -> jax.Array:
  """Repeat the frame of a one-frame clip so that it fills one tubelet.

  Args:
    video: [B, T, H, W, C]; any T but 1 is returned as it is.
    tubelet: number of frames in a token.
  """
  if video.shape[1] == 1 and tubelet > 1:
    return jnp.repeat(video, tubelet, axis=1)
  return video


def token_grid(
  shape: tuple[int, ...], patch: Grid, *, path: str = 'encoder'
) -> Grid:
  """Return the number of tokens (T', H', W') of a video.

  Args:
    shape: shape of the video, [B, T, H, W, C].
    patch: frames, rows and columns of a token.
    path: config path of the module that owns `patch`, for the message.

  Raises:
    ValueError: the video is not 5-D or does not divide into tokens.
  """
  if len(shape) != 5:
    raise ValueError(
      f'expected a video [B, T, H, W, C], found shape {tuple(shape)}; '
      'check `data`'
    )
  names = (
    ('frames', 'tubelet'),
    ('rows (height)', 'patch'),
    ('columns (width)', 'patch'),
  )
  for size, step, (what, field) in zip(shape[1:4], patch, names, strict=True):
    if size == 0 or size % step:
      raise ValueError(
        f'expected a number of {what} that is a multiple of {step}, found '
        f'{size} in a video of shape {tuple(shape)}; change `{path}.{field}` '
        'or the clip that `data` makes'
      )
  (t, h, w), (p0, p1, p2) = shape[1:4], patch
  return t // p0, h // p1, w // p2


def patchify(video: jax.Array, patch: Grid) -> jax.Array:
  """Cut a video [B, T, H, W, C] into tokens [B, N, p0*p1*p2*C]."""
  t, h, w = token_grid(video.shape, patch)
  b, c = video.shape[0], video.shape[-1]
  p0, p1, p2 = patch
  # Columns and colours of a patch stay together: an innermost axis of three
  # would fill three of the 128 lanes of a TPU.
  x = video.reshape(b, t, p0, h, p1, w, p2 * c)
  x = x.transpose(0, 1, 3, 5, 2, 4, 6)
  return x.reshape(b, t * h * w, p0 * p1 * p2 * c)


def unpatchify(tokens: jax.Array, grid: Grid, patch: Grid) -> jax.Array:
  """Undo `patchify`: tokens [B, N, p0*p1*p2*C] to a video [B, T, H, W, C]."""
  b, n, features = tokens.shape
  t, h, w = grid
  p0, p1, p2 = patch
  if n != t * h * w or features % (p0 * p1 * p2):
    raise ValueError(
      f'expected {t * h * w} tokens of a multiple of {p0 * p1 * p2} features '
      f'for grid {grid} and patch {patch}, found shape {tokens.shape}'
    )
  x = tokens.reshape(b, t, h, w, p0, p1, -1)
  x = x.transpose(0, 1, 4, 2, 5, 3, 6)
  return x.reshape(b, t * p0, h * p1, w * p2, -1)


def take(tokens: jax.Array, idx: jax.Array) -> jax.Array:
  """Pick tokens by index.

  Args:
    tokens: [B, N, D], or [N, D] to share one table over the batch.
    idx: int32 [B, n].

  Returns:
    [B, n, D].
  """
  if tokens.ndim == 2:
    return tokens[idx]
  return jnp.take_along_axis(tokens, idx[..., None], axis=1)


def split_by_mask(
  mask: jax.Array, num_hidden: int
) -> tuple[jax.Array, jax.Array]:
  """Turn a mask into the indices of its visible and its hidden tokens.

  Args:
    mask: bool [B, N], True = hidden, with `num_hidden` True in each row.
    num_hidden: that number; static, so that all shapes are.

  Returns:
    int32 [B, N - num_hidden] and int32 [B, num_hidden], both ascending.
  """
  # A stable sort of False before True keeps raster order within each part.
  order = jnp.argsort(mask, axis=1, stable=True).astype(jnp.int32)
  num_visible = mask.shape[1] - num_hidden
  return order[:, :num_visible], order[:, num_visible:]


def merge(
  visible: jax.Array,
  visible_idx: jax.Array,
  hidden: jax.Array,
  hidden_idx: jax.Array,
) -> jax.Array:
  """Put visible and hidden tokens back into raster order [B, N, D]."""
  order = jnp.argsort(jnp.concatenate([visible_idx, hidden_idx], 1), axis=1)
  return take(jnp.concatenate([visible, hidden], 1), order)
