"""Check reference files: what is written is read, and mistakes are told."""

import hashlib

import numpy as np
import pytest

from vfm_jax.evals import references
from vfm_jax.evals.frechet import Normal
from vfm_jax.evals.references import BadReference, read_reference

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


def test_statistics_survive(tmp_path):
  path = tmp_path / 'VIRTUAL digits.npz'
  normals = {
    'pool': Normal(np.arange(3.0), np.eye(3)),
    'spatial': Normal(np.arange(2.0), 2 * np.eye(2)),
  }
  digest = references.write_statistics(path, normals)
  assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
  with np.load(path) as file:
    assert sorted(file.files) == ['mu', 'mu_s', 'sigma', 'sigma_s']
  got = read_reference(path)
  assert got.sha256 == digest
  assert got.name == f'VIRTUAL-digits-{digest[:12]}'
  assert got.images is None
  for part, normal in normals.items():
    for a, b in zip(normal, got.normals[part], strict=True):
      np.testing.assert_array_equal(a, b)


def test_images_as_samples_are_written(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, IMAGES, np.zeros(3, np.int64))
  got = read_reference(path)
  np.testing.assert_array_equal(got.images, IMAGES)
  assert got.normals == {}


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'arr_0': IMAGES[0]}, r'arr_0: expected uint8 \[N, H, W, 3\]'),
    ({'arr_0': IMAGES[:0]}, r'found uint8 \[0, 4, 4, 3\]'),
    ({'arr_0': IMAGES / 255.0}, 'found float64'),
    ({'mu': np.zeros(3)}, r'expected sigma float \[D, D\], found None'),
    ({'sigma': np.eye(3)}, r"`arr_0`, found \['sigma'\]"),
    ({'mu': np.zeros(3), 'sigma': np.eye(2)}, r'sigma \[3, 3\] for mu \[3\]'),
    ({'mu': np.zeros(3, int), 'sigma': np.eye(3)}, r'mu float \[D\], found i'),
    ({'mu': np.full(1, np.nan), 'sigma': np.eye(1)}, 'NaN .* in mu'),
    (
      {'mu': np.zeros(1), 'sigma': np.eye(1), 'mu_s': np.zeros(1)},
      'expected sigma_s',
    ),
    ({'other': np.zeros(3)}, r"found \['other'\]"),
  ],
)
def test_mistakes_are_told(tmp_path, arrays, message):
  path = tmp_path / 'x.npz'
  np.savez(path, **arrays)
  with pytest.raises(BadReference, match=message):
    read_reference(path)


def test_other_files_are_told(tmp_path):
  path = tmp_path / 'x.npz'
  with pytest.raises(BadReference, match=r'no reference file at .*x\.npz'):
    read_reference(path)
  np.savez(path, IMAGES)
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(BadReference, match=r'expected an \.npz file'):
    read_reference(path)
  with pytest.raises(BadReference, match=r"parts among .*found .*'logits'"):
    references.write_statistics(path, {'logits': Normal(*np.zeros((2, 1)))})
