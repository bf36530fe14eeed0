"""Write small video files of every kind that the tests need."""

import fractions

import numpy as np
import pytest


def picture(index, height, width, seed=0):
  """Make a frame whose content moves and names its index."""
  y, x = np.mgrid[:height, :width]
  frame = np.stack(
    [
      (x * 3 + index * 11 + seed * 40) % 256,
      (y * 3 + index * 5) % 256,
      np.full_like(x, (index * 37) % 256),
    ],
    -1,
  )
  return frame.astype(np.uint8)


def encode(
  file,
  frames=40,
  *,
  codec='libx264',
  height=48,
  width=64,
  gop=12,
  bframes=2,
  pts=None,
  options=None,
  audio=False,
  seed=0,
):
  """Write `frames` pictures; `pts` in 1/1000 s makes the rate variable."""
  import av

  movflags = {'movflags': 'faststart'} if file.endswith('.mp4') else {}
  with av.open(file, 'w', options=movflags) as out:
    if frames is not None:
      stream = out.add_stream(codec, rate=25)
      stream.width, stream.height = width, height
      odd = height % 2 or width % 2
      stream.pix_fmt = 'yuv444p' if odd else 'yuv420p'
      stream.codec_context.gop_size = gop
      if bframes and codec in ('libx264', 'mpeg4', 'libx265'):
        stream.codec_context.max_b_frames = bframes
      stream.options = {
        **({'preset': 'ultrafast'} if codec == 'libx264' else {}),
        **({'cpu-used': '8', 'deadline': 'realtime'} if 'vp' in codec else {}),
        **(options or {}),
      }
      if pts is not None:
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        frames = len(pts)
      out.start_encoding()
      for i in range(frames):
        frame = av.VideoFrame.from_ndarray(
          picture(i, height, width, seed), format='rgb24'
        ).reformat(format=stream.pix_fmt)
        if pts is not None:
          frame.pts, frame.time_base = pts[i], fractions.Fraction(1, 1000)
        else:
          frame.pts, frame.time_base = i, fractions.Fraction(1, 25)
        out.mux(stream.encode(frame))
      out.mux(stream.encode())
    if audio:
      sound = out.add_stream('aac', rate=16000)
      silence = av.AudioFrame.from_ndarray(
        np.zeros((1, 1024), np.float32), format='fltp', layout='mono'
      )
      silence.sample_rate, silence.pts = 16000, 0
      out.mux(sound.encode(silence))
      out.mux(sound.encode())


def decode_all(file):
  """Decode a file in order: the reference of every exactness test."""
  import av

  with av.open(file) as container:
    return np.stack(
      [f.to_ndarray(format='rgb24') for f in container.decode(video=0)]
    )


@pytest.fixture(scope='session')
def write_video():
  return encode


@pytest.fixture(scope='session')
def sequential():
  return decode_all


@pytest.fixture(scope='session')
def mp4_bytes(tmp_path_factory):
  file = tmp_path_factory.mktemp('bytes') / 'a.mp4'
  encode(str(file), 10)
  return file.read_bytes()


@pytest.fixture(scope='session')
def video_folder(tmp_path_factory):
  """Six good videos of different lengths, and a CSV with two labels."""
  root = tmp_path_factory.mktemp('videos')
  lines = ['path,label,motion']
  for i in range(6):
    encode(str(root / f'v{i}.mp4'), 20 + 4 * i, seed=i)
    lines.append(f'v{i}.mp4,{i % 3},{i % 2}')
  (root / 'all.csv').write_text('\n'.join(lines) + '\n')
  return root


@pytest.fixture(scope='session')
def bad_folder(tmp_path_factory):
  """Good and odd videos, and every kind of broken one, with a CSV."""
  root = tmp_path_factory.mktemp('bad')
  for i in range(8):
    encode(str(root / f'good{i}.mp4'), 20, seed=i)
  encode(str(root / 'one_frame.mp4'), 1)
  encode(str(root / 'odd.mp4'), 20, height=37, width=51)
  encode(
    str(root / 'vfr.mp4'), pts=np.cumsum([10 + 17 * (i % 5) for i in range(20)])
  )
  whole = (root / 'good0.mp4').read_bytes()
  (root / 'truncated.mp4').write_bytes(whole[: len(whole) * 2 // 3])
  (root / 'headless.mp4').write_bytes(whole[:300])
  (root / 'empty.mp4').write_bytes(b'')
  encode(str(root / 'no_frames.avi'), 0, codec='mpeg4')
  encode(str(root / 'audio.mp4'), None, audio=True)
  good = [f'good{i}.mp4' for i in range(8)]
  good += ['one_frame.mp4', 'odd.mp4', 'vfr.mp4']
  bad = ['truncated.mp4', 'headless.mp4', 'empty.mp4', 'no_frames.avi']
  bad += ['audio.mp4', 'missing.mp4']
  rows = [f'{name},{k % 3}' for k, name in enumerate(good + bad)]
  rows += ['good1.mp4,seven', 'good2.mp4,-1', 'good3.mp4,9']
  # Bad rows among good ones, as they come in real lists.
  order = np.random.default_rng(0).permutation(len(rows))
  text = '\n'.join(['path,label', *(rows[k] for k in order)])
  (root / 'all.csv').write_text(text + '\n')
  return root
