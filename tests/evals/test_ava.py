"""Train the decoder to find boxes that move."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm_jax.data import clips, video
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals import ava_data, ava_train
from vfm_jax.evals.ava import Localisation
from vfm_jax.evals.ava_data import FrameBoxes, whole_frame
from vfm_jax.models.star import StarDecoder, Tubes

SIDE, FRAMES, PATCH = 16, 3, 4
GRID = (FRAMES, SIDE // PATCH, SIDE // PATCH)


@dataclasses.dataclass(frozen=True)
class Movers:
  """Show one or two squares that move to the right (1) or the left (2)."""

  count: int
  seed: int = 0
  people: int = 1

  label_names = ()

  def scene(self, index):
    """Return the place and the step of each square, one in each half."""
    rng = np.random.default_rng([self.seed, index])
    rows = rng.permutation([0, 8])[: self.people]
    return [
      (int(rng.integers(3, 8)), int(row + rng.integers(0, 3)), step)
      for row, step in zip(rows, rng.choice([-3, 3], len(rows)), strict=True)
    ]

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    frames = np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)
    for x, y, step in self.scene(index):
      for t in range(FRAMES):
        left = x + step * (t - FRAMES // 2)
        frames[t, y : y + 5, left : left + 6] = 255
    opens = functools.partial(video.ArrayReader, frames, 1.0)
    return video.Video(f'v{index},0007', {}, opens)

  def boxes(self):
    """Return the boxes of the middle frames."""
    out = {}
    for i in range(self.count):
      scene = self.scene(i)
      box = [[x, y, x + 6, y + 5] for x, y, _ in scene]
      action = [1 if step > 0 else 2 for *_, step in scene]
      out[f'v{i}', 7] = FrameBoxes(
        np.array(box) / SIDE, np.array(action), np.ones(len(scene))
      )
    return out


@dataclasses.dataclass(frozen=True)
class Patches:
  """Give the pixels of patches as tokens."""

  def tokens(self, params, batch):
    v = batch['video'].astype(jnp.float32) / 255 * params['scale']
    b, (t, h, w) = len(v), GRID
    v = v.mean(-1).reshape(b, t, h, PATCH, w, PATCH)
    return v.transpose(0, 1, 2, 4, 3, 5).reshape(b, t * h * w, -1)


PARAMS = {'scale': jnp.ones(())}


def pipeline(source):
  return Pipeline(
    source=source,
    clip=functools.partial(clips.uniform, frames=FRAMES),
    transform=functools.partial(whole_frame, size=SIDE),
  )


def evaluator(tmp_path, train, val, **kwargs):
  for name, source in (('train', train), ('val', val)):
    ava_data.write_boxes(tmp_path / f'{name}.csv', source.boxes())
  decoder = StarDecoder(
    num_classes=2,
    queries=4,
    depth=1,
    width=16,
    mlp_width=32,
    heads=2,
    dropout=0.0,
    drop_path=0.0,
  )
  fields = dict(
    train=pipeline(train),
    val=pipeline(val),
    train_csv=str(tmp_path / 'train.csv'),
    val_csv=str(tmp_path / 'val.csv'),
    grid=GRID,
    decoder=decoder,
    batch_size=8,
    epochs=2,
    warmup_epochs=1,
    lr=2e-3,
    name='movers',
  )
  return Localisation(**{**fields, **kwargs})


# As does the test below, and in the end it finds them.
@pytest.mark.slow
def test_trains_and_writes_detections(tmp_path):
  val = Movers(5, seed=1)
  one = evaluator(tmp_path, Movers(16), val, folder=str(tmp_path), most=3)
  out = one.evaluate(Patches(), PARAMS, seed=0)
  (metric,) = out.metrics
  assert metric.name == 'movers_star2ep_frame_map50'
  assert 0 <= metric.value <= 1
  found = ava_data.read_boxes(tmp_path / 'detections.csv', scored=True)
  assert {len(f.scores) for f in found.values()} == {3}
  assert list(found) == list(val.boxes())


@pytest.mark.slow
def test_finds_who_moves_where(tmp_path):
  train, val = Movers(512, people=2), Movers(64, seed=1, people=2)
  decoder = StarDecoder(
    num_classes=2,
    queries=6,
    depth=2,
    width=64,
    mlp_width=128,
    heads=4,
    dropout=0.0,
    drop_path=0.0,
  )
  settings = dict(decoder=decoder, batch_size=32, warmup_epochs=0)
  short = evaluator(tmp_path, train, val, epochs=1, **settings)
  long = evaluator(tmp_path, train, val, epochs=80, **settings)
  before, after = (
    next(iter(e.run(Patches(), PARAMS, seed=0).values())) for e in (short, long)
  )
  assert before < 0.5
  assert after > 0.9


match = jax.jit(ava_train.match, static_argnums=2)
loss = jax.jit(ava_train.loss, static_argnums=2)
WEIGHTS = ava_train.Weights()
A, B = [0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]


def found(boxes, person, actions):
  """Return the tubes of a clip, by probabilities."""
  person, actions = (np.array([p], np.float32) for p in (person, actions))
  logits = [np.log(p) - np.log1p(-p) for p in (person, actions)]
  return Tubes(*logits, np.array([boxes], np.float32))


def people(boxes, actions, present):
  """Return the targets of a clip."""
  return ava_train.Targets(
    np.array([boxes], np.float32),
    np.array([actions], np.float32),
    np.array([present]),
  )


def test_each_person_gets_the_nearest_tube():
  tubes = found([B, [0.5, 0.5, 0.1, 0.1], A], [0.5] * 3, [[0.5, 0.5]] * 3)
  does = [[1, 0], [0, 1], [0, 0]]
  index = match(tubes, people([A, B, A], does, [True, True, False]), WEIGHTS)
  assert index[0, 0] == 1
  assert index[0, 2] == 0
  # Boxes at the same place are told apart by what they do.
  same = found([A, A, B], [0.5] * 3, [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
  does = [[0, 1], [1, 0], [0, 0]]
  index = match(same, people([A, A, A], does, [True, True, False]), WEIGHTS)
  assert index[0, :2].tolist() == [1, 0]


def test_loss_falls_to_nothing_at_the_truth():
  does = [[1, 0], [0, 0]]
  targets = people([A, [0] * 4], does, [True, False])
  sure = 1 - 1e-6
  right = found([B, A], [1 - sure, sure], [[0.5, 0.5], [sure, 1 - sure]])
  total, parts = loss(right, targets, WEIGHTS)
  assert total == pytest.approx(0, abs=1e-4)
  assert set(parts) == {'l1', 'giou', 'person', 'action'}
  # What a padded person does changes nothing.
  other, _ = loss(
    right, people([A, B], [[1, 0], [1, 1]], [True, False]), WEIGHTS
  )
  np.testing.assert_allclose(other, total, atol=1e-6)
  wrong = found([B, A], [sure, 1 - sure], [[0.5, 0.5], [sure, 1 - sure]])
  assert loss(wrong, targets, WEIGHTS)[0] > 1


def test_errors(tmp_path):
  one = evaluator(tmp_path, Movers(8), Movers(2))
  with pytest.raises(TypeError, match=r'has no tokens\(params, batch\)'):
    one.run(object(), PARAMS, seed=0)
  with pytest.raises(ValueError, match='expected warmup_epochs from 0'):
    dataclasses.replace(one, warmup_epochs=2)
  grid = dataclasses.replace(one, grid=(1, 2, 2))
  with pytest.raises(ValueError, match='expected a grid of 48 tokens'):
    grid.run(Patches(), PARAMS, seed=0)
  few = one.decoder.clone(queries=1)
  crowd = evaluator(tmp_path, Movers(8, people=2), Movers(2), decoder=few)
  with pytest.raises(ValueError, match=r'queries=1 must be at least 2'):
    crowd.run(Patches(), PARAMS, seed=0)
  lacking = evaluator(tmp_path, Movers(8), Movers(2))
  ava_data.write_boxes(tmp_path / 'train.csv', Movers(3).boxes())
  with pytest.raises(ValueError, match='no box of the frame v3,0007'):
    lacking.run(Patches(), PARAMS, seed=0)


@pytest.mark.slow
def test_decoder_looks_at_its_own_frame_and_over_time():
  decoder = StarDecoder(
    num_classes=3, queries=2, depth=1, width=8, mlp_width=8, heads=1
  )
  x = jax.random.normal(jax.random.key(0), (1, 8, 4))
  grid = (2, 2, 2)
  call = lambda m, x: m(x, grid)  # noqa: E731
  params = decoder.lazy_init(jax.random.key(1), x, method=call)

  @jax.jit
  def out(x):
    return decoder.apply(params, x, grid)

  tubes = out(x)
  assert tubes.person.shape == (1, 2, 2)
  assert tubes.actions.shape == (1, 2, 2, 3)
  assert tubes.boxes.shape == (1, 2, 2, 4)
  # One layer: time is mixed before the frame is looked at.
  other = out(x.at[:, 4:].add(1.0))
  moved = np.abs(other.boxes - tubes.boxes).max((0, 2, 3))
  assert moved[0] == 0
  assert moved[1] > 0
