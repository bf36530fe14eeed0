"""Check what processes compare before they start."""

import dataclasses

from vfm_jax import facts
from vfm_jax.data import clips
from vfm_jax.data.folder import FolderCSV
from vfm_jax.data.mixed import Mixed
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.data.synthetic import MovingShapes
from vfm_jax.experiment import Data


def test_packages():
  found = facts.packages()
  assert found['vfm_jax'].startswith('source ')
  assert {'jax', 'jaxlib', 'flax'} <= found.keys()
  assert found == facts.packages()


def test_sources_are_found_and_told_apart():
  shapes = MovingShapes(count=8, frames=4, size=16)
  video = Pipeline(shapes, clips.uniform)

  def told(data):
    return facts.data(data)['data'].splitlines()

  first, second = told(Data(Mixed((video, video)), val=video))[:2]
  assert first.startswith('data.train.pipelines.0.source: 8 examples, ')
  assert second.startswith('data.train.pipelines.1.source: 8 examples, ')
  assert told(Data(video)) == told(Data(video))
  other = dataclasses.replace(shapes, count=9)
  assert told(Data(video)) != told(Data(Pipeline(other, clips.uniform)))


def test_a_list_is_known_by_its_content(tmp_path):
  found = []
  for label in (0, 0, 1):
    folder = tmp_path / str(len(found))
    folder.mkdir()
    csv = folder / 'list.csv'
    csv.write_text(f'path,label\na.mp4,0\nb.mp4,{label}\n')
    source = FolderCSV(str(folder), str(csv))
    found.append(facts.data(Data(Pipeline(source)))['data'])
  assert found[0] == found[1] != found[2]


def test_a_set_is_known_by_its_manifest(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Set:
    root: str

    def __len__(self):
      return 3

    def __getitem__(self, index):
      raise AssertionError('nothing is opened')

  (tmp_path / 'manifest.json').write_text('{"count": 3}')
  before = facts.data(Set(str(tmp_path)))
  (tmp_path / 'manifest.json').write_text('{"count": 3, "x": 1}')
  assert facts.data(Set(str(tmp_path))) != before
