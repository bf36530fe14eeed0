import io
import sys

import numpy as np
import PIL.Image
import pytest

from vfm_jax.data import tfds as tfds_source
from vfm_jax.data import video

tfds = pytest.importorskip('tensorflow_datasets')


def png(grey):
  """Encode an image: arrays would need TensorFlow to be stored."""
  buffer = io.BytesIO()
  PIL.Image.new('RGB', (9, 8), (grey,) * 3).save(buffer, 'png')
  return buffer.getvalue()


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory, mp4_bytes):
  """Prepare a builder with a video as encoded bytes and as images."""

  class TinyVideos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(
          {
            'video': tfds.features.Tensor(shape=(), dtype=np.object_),
            'frames': tfds.features.Sequence(
              tfds.features.Image(shape=(8, 9, 3))
            ),
            'label': tfds.features.ClassLabel(num_classes=3),
            'score': tfds.features.Scalar(np.int64),
          }
        )
      )

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for i in range(3):
        yield (
          i,
          {
            'video': mp4_bytes,
            'frames': [png(10 * t + i) for t in range(4)],
            'label': i,
            'score': -1 if i == 2 else i,
          },
        )

  folder = tmp_path_factory.mktemp('tfds')
  builder = TinyVideos(data_dir=str(folder), file_format='array_record')
  builder.download_and_prepare()
  return str(folder)


def test_encoded_videos(data_dir):
  source = tfds_source.TFDS('tiny_videos', 'train', data_dir)
  assert len(source) == 3
  assert {source[i].labels['label'] for i in range(3)} == {0, 1, 2}
  with source[0].open() as reader:
    assert reader.num_frames == 10
    assert reader.read([9, 0]).shape == (2, 48, 64, 3)
  assert 'tensorflow' not in sys.modules


def test_sequences_of_images(data_dir):
  source = tfds_source.TFDS(
    'tiny_videos', 'train', data_dir, video_key='frames', fps=8.0
  )
  label = source[1].labels['label']
  with source[1].open() as reader:
    assert (reader.num_frames, reader.fps) == (4, 8.0)
    np.testing.assert_array_equal(
      reader.read([3, 0])[:, 0, 0, 0], [30 + label, label]
    )


def test_errors(data_dir):
  with pytest.raises(ValueError, match='no feature clip; it has frames, label'):
    tfds_source.TFDS('tiny_videos', 'train', data_dir, video_key='clip')[0]
  source = tfds_source.TFDS(
    'tiny_videos', 'train', data_dir, label_keys=('score',)
  )
  (bad,) = [i for i in range(3) if scores(data_dir)[i] < 0]
  with pytest.raises(video.LabelError, match='bad score -1: negative'):
    source[bad]


def scores(data_dir):
  data = tfds.data_source('tiny_videos', split='train', data_dir=data_dir)
  return [int(example['score']) for example in data]


def test_missing_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(ImportError, match=r"pip install 'vfm_jax\[tfds\]'"):
    len(tfds_source.TFDS('never_opened', 'train'))
