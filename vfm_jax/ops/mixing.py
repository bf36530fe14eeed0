"""Mix pairs of videos and their labels: mixup and cutmix."""

import jax
import jax.numpy as jnp


def mixup_or_cutmix(
  rng: jax.Array,
  size: tuple[int, int],
  *,
  mixup_alpha: float = 0.8,
  cutmix_alpha: float = 1.0,
  switch: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
  """Draw how much of itself an example keeps; its partner fills the rest.

  With probability `switch` it is cutmix (arXiv:1905.04899): a box, the same in
  all frames, is the partner's. Its centre is uniform in the frame, its sides
  are sqrt(1 - s) of the frame's, and what lies outside is cut off. Else it is
  mixup (arXiv:1710.09412): s of each pixel. The defaults are those of
  VideoMAE's fine-tuning (arXiv:2203.12602).

  Args:
    rng: key of the draw.
    size: rows and columns of a frame.
    mixup_alpha: s is from Beta(alpha, alpha).
    cutmix_alpha: the same for cutmix.
    switch: probability of cutmix; 0 is mixup alone.

  Returns:
    The share of itself in each pixel, f32 [H, W], and in the label, f32 []:
    the mean over the pixels.
  """
  keys = jax.random.split(rng, 4)
  use_box = jax.random.bernoulli(keys[0], switch)
  alpha = jnp.where(use_box, cutmix_alpha, mixup_alpha)
  share = jax.random.beta(keys[1], alpha, alpha)
  inside = jnp.ones(size, bool)
  for axis, n in enumerate(size):
    centre = jax.random.randint(keys[2 + axis], (), 0, n)
    half = jnp.floor(n * jnp.sqrt(1.0 - share)).astype(jnp.int32) // 2
    places = jax.lax.broadcasted_iota(jnp.int32, size, axis)
    inside &= (places >= centre - half) & (places < centre + half)
  box = jnp.where(inside, 0.0, 1.0)
  kept = jnp.where(use_box, box, share)
  return kept, jnp.where(use_box, box.mean(), share)


def partner(x: jax.Array) -> jax.Array:
  """Return each row's partner, half a batch away.

  Two rows are partners of each other, and are so however a batch is cut into
  strided microbatches of even size.

  Args:
    x: [B, ...]; B is even.

  Raises:
    ValueError: B is odd.
  """
  if len(x) % 2:
    raise ValueError(
      f'expected an even number of examples to mix in pairs, found {len(x)}; '
      'change config.batch_size or config.accum, or set config.objective.mix '
      'to None'
    )
  return jnp.roll(x, len(x) // 2, axis=0)


def soft_labels(
  labels: jax.Array, num_classes: int, smoothing: float = 0.0
) -> jax.Array:
  """Return f32 [B, K]: 1 - smoothing on the label, and smoothing / K on all.

  Label smoothing of arXiv:1512.00567, section 7.
  """
  hot = jax.nn.one_hot(labels, num_classes)
  return (1.0 - smoothing) * hot + smoothing / num_classes
