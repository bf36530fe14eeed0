"""Check that pictures of an objective reach files, in order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.evals.reconstruct import reconstruct, save_reconstruction


@dataclasses.dataclass(frozen=True)
class Inverter:
  """Show a clip and its negative."""

  def visualise(self, params, extra, batch, rng):
    noise = jax.random.randint(rng, (), 0, 2).astype(jnp.uint8)
    return {
      'original': batch['video'],
      'negative': params - batch['video'] + extra * noise,
    }


BATCH = {
  'video': np.full((3, 4, 8, 8, 3), 55, np.uint8),
  'valid': np.array([True, True, False]),
}


def test_keeps_display_order_and_valid_clips(tmp_path):
  args = (Inverter(), jnp.uint8(255), jnp.uint8(0), BATCH, jax.random.key(0))
  videos = reconstruct(*args)
  assert list(videos) == ['original', 'negative']
  assert list(reconstruct(*args)) == ['original', 'negative']
  assert videos['negative'].shape == (2, 4, 8, 8, 3)
  assert (videos['negative'] == 200).all()
  png, gif = save_reconstruction(videos, tmp_path / 'out', 'step1')
  assert (png.name, gif.name) == ('step1.png', 'step1.gif')
  assert png.stat().st_size
  assert gif.stat().st_size


def test_needs_pictures():
  with pytest.raises(TypeError, match='object has no visualise'):
    reconstruct(object(), {}, {}, BATCH, jax.random.key(0))
