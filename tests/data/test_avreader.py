import dataclasses
import gc
import os

import numpy as np
import pytest

from vfm_jax.data import avreader, video

VFR = np.cumsum([7 + 23 * (i % 4) for i in range(40)])

FILES = {
  'h264_b': ('h.mp4', {}),
  'h264_open_gop': (
    'o.mp4',
    {'bframes': 3, 'options': {'x264-params': 'open-gop=1:b-pyramid=normal'}},
  ),
  'h264_no_b': ('n.mp4', {'bframes': 0}),
  'h264_one_gop': ('g.mp4', {'gop': 400, 'frames': 60}),
  'h264_vfr': ('v.mp4', {'pts': VFR}),
  'h264_odd': ('odd.mp4', {'height': 37, 'width': 51}),
  'h264_mkv': ('h.mkv', {}),
  'h264_ts': ('h.ts', {}),
  'hevc': (
    'e.mp4',
    {'codec': 'libx265', 'options': {'x265-params': 'log-level=none'}},
  ),
  'mpeg4': ('m.mp4', {'codec': 'mpeg4'}),
  'mpeg4_avi': ('m.avi', {'codec': 'mpeg4'}),
  'vp9': ('v.webm', {'codec': 'libvpx-vp9'}),
  'vp9_vfr': ('vv.webm', {'codec': 'libvpx-vp9', 'pts': VFR}),
  'vp8_hidden': (
    '8.webm',
    {'codec': 'libvpx', 'options': {'auto-alt-ref': '1', 'lag-in-frames': '10',
                                    'deadline': 'good'}},
  ),
  'mjpeg': ('j.avi', {'codec': 'mjpeg', 'options': {'strict': '-1'}}),
}  # fmt: skip


@pytest.mark.parametrize('kind', FILES)
def test_any_subset_equals_sequential_decode(
  kind, tmp_path, write_video, sequential
):
  name, options = FILES[kind]
  file = str(tmp_path / name)
  write_video(file, **options)
  expected = sequential(file)
  rng = np.random.default_rng(0)
  with avreader.PyAVReader(file) as reader:
    n = reader.num_frames
    assert n == len(expected)
    assert (reader.height, reader.width) == expected.shape[1:3]
    subsets = [np.arange(n), [n - 1], [0], [n // 2] * 3, np.arange(n)[::-1]]
    subsets += [np.arange(k, n, 4) for k in range(4)]
    subsets += [rng.integers(0, n, 7) for _ in range(8)]
    for subset in subsets:
      np.testing.assert_array_equal(reader.read(subset), expected[subset])
    for i in range(n):
      with avreader.PyAVReader(file) as fresh:
        np.testing.assert_array_equal(fresh.read([i])[0], expected[i])


@pytest.mark.parametrize('threads', [2, 4])
@pytest.mark.parametrize('thread_type', ['FRAME', 'SLICE', 'AUTO'])
def test_decoder_threads_change_nothing(
  threads, thread_type, tmp_path, write_video, sequential
):
  file = str(tmp_path / 'a.mp4')
  write_video(file)
  expected = sequential(file)
  with avreader.PyAVReader(file, threads, thread_type) as reader:
    for subset in (np.arange(0, 40, 3), np.array([39, 0, 17])):
      np.testing.assert_array_equal(reader.read(subset), expected[subset])


def test_bytes_equal_file(tmp_path, write_video, sequential):
  file = tmp_path / 'a.mp4'
  write_video(str(file))
  with avreader.EncodedReader(file.read_bytes(), 'a') as reader:
    np.testing.assert_array_equal(
      reader.read(np.array([30, 2, 2])), sequential(str(file))[[30, 2, 2]]
    )


def test_frame_rate(tmp_path, write_video):
  write_video(str(tmp_path / 'a.mp4'))
  write_video(str(tmp_path / 'v.mp4'), pts=VFR)
  assert avreader.PyAVReader(tmp_path / 'a.mp4').fps == 25
  mean = (len(VFR) - 1) / (VFR[-1] - VFR[0]) * 1000
  assert avreader.PyAVReader(tmp_path / 'v.mp4').fps == pytest.approx(
    mean, rel=0.05
  )


def test_one_frame_is_a_video(bad_folder):
  with avreader.PyAVReader(bad_folder / 'one_frame.mp4') as reader:
    assert reader.num_frames == 1
    assert len(reader.read(np.zeros(16, np.int64))) == 16


@pytest.mark.parametrize(
  ('name', 'reason'),
  [
    ('truncated.mp4', 'truncated'),
    ('headless.mp4', 'truncated'),
    ('empty.mp4', 'empty: the file has 0 bytes'),
    ('no_frames.avi', 'zero frames'),
    ('audio.mp4', 'no video stream: the file holds audio only'),
    ('missing.mp4', 'missing'),
  ],
)
def test_unusable_files_say_why(bad_folder, name, reason):
  with pytest.raises(video.DecodeError, match=reason) as e:
    avreader.PyAVReader(bad_folder / name)
  assert e.value.name == str(bad_folder / name)


def test_lost_frames_are_an_error(bad_folder, monkeypatch):
  real = avreader._index(str(bad_folder / 'good0.mp4'), 'good0')
  # An index that promises what the decoder does not give.
  late = dataclasses.replace(
    real, pts=np.append(real.pts, real.pts[-1] + 512), num_frames=21
  )
  monkeypatch.setattr(avreader, '_cached_index', lambda *_: late)
  with avreader.PyAVReader(bad_folder / 'good0.mp4') as reader:
    assert len(reader.read([0, 19])) == 2
    with pytest.raises(video.DecodeError, match='frame 20 of 21 does not dec'):
      reader.read([3, 20])


def test_a_seek_that_lands_late_starts_over(
  tmp_path, write_video, sequential, monkeypatch
):
  file = str(tmp_path / 'a.mp4')
  write_video(file)
  real = avreader._index(file, file)
  wrong = dataclasses.replace(
    real, seeks=np.full_like(real.seeks, real.seeks[-1])
  )
  monkeypatch.setattr(avreader, '_cached_index', lambda *_: wrong)
  with avreader.PyAVReader(file) as reader:
    np.testing.assert_array_equal(
      reader.read([14, 39]), sequential(file)[[14, 39]]
    )


def test_empty_bytes():
  with pytest.raises(video.DecodeError, match='clip 7: empty'):
    avreader.EncodedReader(b'', 'clip 7')


def test_indices_out_of_range(bad_folder):
  with avreader.PyAVReader(bad_folder / 'good0.mp4') as reader:
    for bad in ([20], [-1], []):
      with pytest.raises(IndexError):
        reader.read(bad)


def test_a_changed_file_is_indexed_again(tmp_path, write_video):
  file = str(tmp_path / 'a.mp4')
  write_video(file, 10)
  assert avreader.PyAVReader(file).num_frames == 10
  write_video(file, 14)
  assert avreader.PyAVReader(file).num_frames == 14


def test_files_are_closed(bad_folder):
  gc.collect()
  before = len(os.listdir('/proc/self/fd'))
  for _ in range(5):
    with avreader.PyAVReader(bad_folder / 'good0.mp4') as reader:
      reader.read([3, 11])
    with pytest.raises(video.DecodeError):
      avreader.PyAVReader(bad_folder / 'truncated.mp4')
  assert len(os.listdir('/proc/self/fd')) <= before
