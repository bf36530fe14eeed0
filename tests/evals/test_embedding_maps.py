"""Check the maps of a store, with what the official script stumbles over."""

import numpy as np
import pytest

from vfm_jax.evals import store
from vfm_jax.evals.embedding_maps import EmbeddingMaps, draw, project
from vfm_jax.evals.stored import StoredSet


@pytest.fixture
def data(tmp_path):
  rng = np.random.default_rng(0)
  for split in ('train', 'val'):
    folder = store.split_folder(tmp_path, 'set', split, 'multi-clip')
    for i in range(12):
      clips = 5 * np.eye(6)[i % 4] + rng.normal(size=(1 + i % 2, 6))
      store.write(folder, store.Embedding(f'v{i:02}', clips, annotation=i % 4))
  return StoredSet(str(tmp_path), 'set')


def maps(**kwargs):
  return EmbeddingMaps(sampling='multi-clip', **kwargs)


@pytest.mark.slow
def test_tsne_gives_the_same_points_each_time(data):
  first, again = (
    maps(methods=('tsne',), picture=False).run_stored(data, seed=s).maps[0]
    for s in (0, 1)
  )
  assert first == again
  assert first.name.endswith(', t-SNE')
  assert np.ptp(first.points) > 1


def test_pca_and_lda_give_points_and_a_picture(data):
  assert EmbeddingMaps().methods == ('pca', 'lda', 'tsne')
  out = maps(methods=('pca', 'lda')).run_stored(data, seed=0)
  assert [m.name.split(', ')[-1] for m in out.maps] == ['PCA', 'LDA']
  assert set(out.pictures) == {'pca', 'lda'}
  assert all(p.startswith(b'\x89PNG') for p in out.pictures.values())
  for found in out.maps:
    assert np.shape(found.points) == (12, 2)
    assert list(found.labels) == [i % 4 for i in range(12)]
    assert found.ids[3] == 'v03'
  again = maps(methods=('pca',), picture=False).run_stored(data, seed=1)
  assert again.maps[0] == out.maps[0]
  assert not again.pictures
  pca, lda = (np.array(m.points) for m in out.maps[:2])
  assert abs(pca.mean(0)).max() < 1e-4
  # LDA parts the classes: each point is nearest to its own mean.
  y = np.array(out.maps[1].labels)
  means = np.stack([lda[y == c].mean(0) for c in range(4)])
  gaps = np.linalg.norm(lda[:, None] - means, axis=-1)
  assert (gaps.argmin(1) == y).mean() > 0.9


def test_clips_of_the_training_split_are_points_of_their_own(data):
  out = maps(methods=('pca',), split='train', rows='clip', picture=False)
  found = out.run_stored(data, seed=0).maps[0]
  assert np.shape(found.points) == (18, 2)
  assert found.ids[:3] == ['v00 [0]', 'v01 [0]', 'v01 [1]']
  assert found.labels[:3] == [0, 1, 1]


def test_two_classes_have_one_discriminant(data):
  out = maps(methods=('lda',), include=(1, 3)).run_stored(data, seed=0)
  found = out.maps[0]
  assert found.classes == ['1', '3']
  assert 'means nothing' in found.note
  points = np.array(found.points)
  assert 0 <= points[:, 1].min() < points[:, 1].max() <= 1
  left, right = (points[np.array(found.labels) == c, 0] for c in (0, 1))
  assert left.max() < right.min() or right.max() < left.min()


def test_options_choose_classes_and_points(data):
  def classes(**kwargs):
    return maps(methods=('pca',), picture=False, **kwargs).run_stored(
      data, seed=0
    )

  assert classes(exclude=(0,)).maps[0].classes == ['1', '2', '3']
  assert len(classes(random_classes=2).maps[0].classes) == 2
  some = classes(keep=0.5).maps[0]
  assert 2 <= len(some.ids) < 12
  assert some == classes(keep=0.5).maps[0]


def test_errors_say_what_to_change(data):
  with pytest.raises(ValueError, match=r'no video has the classes \[9\]'):
    maps(include=(9,)).run_stored(data, seed=0)
  with pytest.raises(ValueError, match='random_classes=5: expected 1 to 4'):
    maps(random_classes=5).run_stored(data, seed=0)
  with pytest.raises(ValueError, match='two classes or more'):
    maps(methods=('lda',), include=(1,)).run_stored(data, seed=0)
  with pytest.raises(ValueError, match='points are left'):
    maps(keep=1e-9).run_stored(data, seed=0)
  with pytest.raises(ValueError, match=r'maps\.methods'):
    EmbeddingMaps(methods=())
  with pytest.raises(ValueError, match=r'maps\.keep'):
    EmbeddingMaps(keep=0.0)
  with pytest.raises(ValueError, match='4 points or more'):
    project('tsne', np.eye(3), np.arange(3))


def test_a_picture_has_the_size_of_the_official_one(data):
  import io

  import PIL.Image

  found = maps(methods=('pca',), picture=False).run_stored(data, seed=0).maps[0]
  assert PIL.Image.open(io.BytesIO(draw(found))).size == (1500, 1000)
