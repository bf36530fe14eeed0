"""Render human motion capture into labelled videos.

pybullet ships 15 recorded human motions and a humanoid to play them on. Each
motion is rendered from many camera angles with the software renderer, once,
and cached; all examples look alike, so the action must be read from motion and
pose, while a single frame tells from which side it is seen. Validation sees
other angles than training.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import tempfile
from typing import Literal

import numpy as np

from vfm_jax import optional
from vfm_jax.data import once, sources, video

ACTIONS = (
  'backflip', 'cartwheel', 'crawl', 'dance_a', 'dance_b', 'getup_facedown',
  'getup_faceup', 'jump', 'kick', 'punch', 'roll', 'run', 'spin', 'spinkick',
  'walk',
)  # fmt: skip

# Joints of the humanoid: (index in the URDF, column in the motion file, size).
# Size 4 is a quaternion (w, x, y, z), size 1 an angle in radians.
_JOINTS = (
  (1, 8, 4), (2, 12, 4),  # chest, neck
  (9, 16, 4), (10, 20, 1), (11, 21, 4),  # right hip, knee, ankle
  (3, 25, 4), (4, 29, 1),  # right shoulder, elbow
  (12, 30, 4), (13, 34, 1), (14, 35, 4),  # left hip, knee, ankle
  (6, 39, 4), (7, 43, 1),  # left shoulder, elbow
)  # fmt: skip
# Raise it when the same parameters give other pictures: caches are keyed by it.
_RENDER_VERSION = 1


@dataclasses.dataclass(frozen=True)
class MocapClips:
  """Cut windows out of rendered motions; labels `action` and `view`.

  The view is the quarter of the circle in which the camera stands, 0 to 3.

  Attributes:
    split: `train` uses `angles`, `val` uses `val_angles`.
    actions: motions to use; their order gives the label.
    angles: camera angles of training, degrees.
    val_angles: camera angles of validation, degrees.
    size: height and width, pixels.
    fps: frames a second that motions are sampled at.
    window: frames a video; cyclic motions go round, others hold their end.
    phases: videos a motion and angle, with evenly spaced starts.
    cache_dir: folder of rendered motions; None is `vfm_jax` in the user's
      cache folder.
  """

  split: Literal['train', 'val'] = 'train'
  actions: tuple[str, ...] = ACTIONS
  angles: tuple[float, ...] = (0, 45, 90, 135, 180, 225, 270, 315)
  val_angles: tuple[float, ...] = (22.5, 112.5, 202.5, 292.5)
  size: int = 64
  fps: float = 30.0
  window: int = 32
  phases: int = 4
  cache_dir: str | None = None

  def __post_init__(self):
    unknown = [a for a in self.actions if a not in ACTIONS]
    if unknown or not self.actions:
      raise ValueError(
        f'data.source.actions: unknown {unknown}; choose from {ACTIONS}'
      )
    if shared := set(self.angles) & set(self.val_angles):
      raise ValueError(
        'data.source.val_angles: held-out angles are trained on: '
        f'{sorted(shared)}'
      )

  @property
  def label_names(self) -> tuple[str, ...]:
    """Names of the labels."""
    return ('action', 'view')

  def __len__(self) -> int:
    return len(self.actions) * len(self._angles) * self.phases

  def __getitem__(self, index: int) -> video.Video:
    sources.check_index(index, len(self))
    rest, phase = divmod(index, self.phases)
    action, angle = divmod(rest, len(self._angles))
    return video.Video(
      f'{self.actions[action]}/{self._angles[angle]:g}/{phase}',
      {'action': action, 'view': int(self._angles[angle] % 360 // 90)},
      functools.partial(
        _open, self, self.actions[action], self._angles[angle], phase
      ),
    )

  @property
  def _angles(self) -> tuple[float, ...]:
    return self.angles if self.split == 'train' else self.val_angles


def _open(
  source: MocapClips, action: str, angle: float, phase: int
) -> video.Reader:
  """Serve one window of a rendered motion."""
  frames, cyclic = _track(
    action, float(angle), source.size, source.fps, source.cache_dir
  )
  if cyclic:
    start = phase * len(frames) // source.phases
    rows = (start + np.arange(source.window)) % len(frames)
  else:
    free = max(len(frames) - source.window, 0)
    start = phase * free // max(source.phases - 1, 1)
    rows = np.minimum(start + np.arange(source.window), len(frames) - 1)
  return video.ArrayReader(frames[rows], source.fps)


@once.once(maxsize=1024)
def _track(
  action: str, angle: float, size: int, fps: float, cache_dir: str | None
) -> tuple[np.ndarray, bool]:
  """Return (uint8 [N, size, size, 3], whether the motion is cyclic)."""
  key = json.dumps([_RENDER_VERSION, action, angle, size, fps])
  name = hashlib.sha256(key.encode()).hexdigest()[:16]
  file = _cache(cache_dir) / f'mocap-{action}-{name}.npz'
  if not file.exists():
    frames, cyclic = _render(action, angle, size, fps)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: a killed or a second process harms nothing.
    handle, partial = tempfile.mkstemp(dir=file.parent, suffix='.partial')
    with os.fdopen(handle, 'wb') as f:
      np.savez_compressed(f, frames=frames, cyclic=cyclic)
    os.replace(partial, file)
  with np.load(file) as cached:
    return cached['frames'], bool(cached['cyclic'])


def _cache(cache_dir: str | None) -> pathlib.Path:
  if cache_dir is not None:
    return pathlib.Path(cache_dir)
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'vfm_jax'


def _render(
  action: str, angle: float, size: int, fps: float
) -> tuple[np.ndarray, bool]:
  """Play a motion on the humanoid and film it from one angle."""
  p = optional.require('pybullet', 'mocap')
  root = optional.require('pybullet_data', 'mocap').getDataPath()
  with open(f'{root}/data/motions/humanoid3d_{action}.txt') as f:
    motion = json.load(f)
  poses = np.asarray(motion['Frames'])
  # The first column is how long each pose lasts, in seconds.
  times = np.concatenate([[0.0], np.cumsum(poses[:-1, 0])])
  shots = np.arange(max(round(times[-1] * fps), 1)) / fps
  client = p.connect(p.DIRECT)
  try:
    p.setAdditionalSearchPath(root, physicsClientId=client)
    body = p.loadURDF(
      'humanoid/humanoid.urdf',
      useFixedBase=True,
      globalScaling=0.25,
      physicsClientId=client,
    )
    for joint in range(-1, p.getNumJoints(body, physicsClientId=client)):
      # Two tones tell the left limbs from the right ones.
      left = joint in (6, 7, 8, 12, 13, 14)
      p.changeVisualShape(
        body,
        joint,
        rgbaColor=(0.2, 0.3, 0.8, 1) if left else (0.8, 0.4, 0.2, 1),
        physicsClientId=client,
      )
    frames = []
    for time in shots:
      pose = poses[min(np.searchsorted(times, time), len(poses) - 1)]
      _pose(p, client, body, pose)
      frames.append(_photo(p, client, angle, size))
  finally:
    p.disconnect(client)
  return np.stack(frames), motion['Loop'] == 'wrap'


def _pose(p, client: int, body: int, pose: np.ndarray) -> None:
  """Set the humanoid to a pose; the camera follows it over the ground."""
  p.resetBasePositionAndOrientation(
    body, [0, pose[2], 0], pose[[5, 6, 7, 4]], physicsClientId=client
  )
  for joint, at, size in _JOINTS:
    if size == 4:
      turn = pose[[at + 1, at + 2, at + 3, at]]
      p.resetJointStateMultiDof(body, joint, turn, physicsClientId=client)
    else:
      p.resetJointState(body, joint, pose[at], physicsClientId=client)


def _photo(p, client: int, angle: float, size: int) -> np.ndarray:
  """Return uint8 [size, size, 3] seen from `angle` degrees around."""
  radians = math.radians(angle)
  view = p.computeViewMatrix(
    [3 * math.cos(radians), 1.2, 3 * math.sin(radians)],
    [0, 0.75, 0],
    [0, 1, 0],
  )
  lens = p.computeProjectionMatrixFOV(40, 1.0, 0.1, 10.0)
  *_, rgba, _, _ = p.getCameraImage(
    size,
    size,
    view,
    lens,
    shadow=0,
    renderer=p.ER_TINY_RENDERER,
    physicsClientId=client,
  )
  return np.reshape(rgba, (size, size, 4))[..., :3].astype(np.uint8)
