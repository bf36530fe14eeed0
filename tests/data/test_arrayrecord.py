import json
import shutil

import numpy as np
import pytest

from vfm_jax.data import arrayrecord, folder, pack, shards


@pytest.fixture(scope='module')
def packed(video_folder, tmp_path_factory):
  out = tmp_path_factory.mktemp('packed') / 'set'
  pack.main(
    [
      f'--root={video_folder}',
      f'--csv={video_folder / "all.csv"}',
      f'--out={out}',
      '--shards=2',
      '--labels',
      'label',
      'motion',
    ]
  )
  return out


@pytest.fixture
def copy(packed, tmp_path):
  shutil.copytree(packed, tmp_path / 'set')
  return tmp_path / 'set'


def edit(copy, **kw):
  file = copy / shards.MANIFEST
  file.write_text(json.dumps({**json.loads(file.read_text()), **kw}))


def test_record_round_trip():
  record = shards.pack_record('ä', {'a': 3}, b'bytes\0')
  assert shards.unpack_record(record) == ('ä', {'a': 3}, b'bytes\0')


def test_packed_set_equals_the_folder(packed, video_folder):
  source = arrayrecord.ArrayRecordVideos(str(packed), check_hashes=True)
  plain = folder.FolderCSV(
    str(video_folder), str(video_folder / 'all.csv'), ('label', 'motion')
  )
  assert source.label_names == ('label', 'motion')
  assert len(source) == len(plain) == 6
  for i in range(6):
    example = source[i]
    assert example.id == plain[i].id
    assert example.labels == plain[i].labels
    with example.open() as a, plain[i].open() as b:
      wanted = np.array([5, 0, 17])
      np.testing.assert_array_equal(a.read(wanted), b.read(wanted))
  with pytest.raises(IndexError):
    source[6]


def test_pack_refuses_to_overwrite(packed, video_folder):
  with pytest.raises(FileExistsError, match='exists already'):
    pack.main(
      [
        f'--root={video_folder}',
        f'--csv={video_folder / "all.csv"}',
        f'--out={packed}',
      ]
    )


def test_pack_skips_and_reports(bad_folder, tmp_path, capsys):
  pack.main(
    [
      f'--root={bad_folder}',
      f'--csv={bad_folder / "all.csv"}',
      f'--out={tmp_path / "out"}',
    ]
  )
  printed = capsys.readouterr().out
  assert 'packed 12 videos' in printed
  assert 'skipped 8' in printed
  assert 'empty.mp4: empty: the file has 0 bytes' in printed
  manifest = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
  assert len(manifest['skipped']) == 8
  assert len(arrayrecord.ArrayRecordVideos(str(tmp_path / 'out'))) == 12
  assert not list(tmp_path.glob('.*'))


def test_pack_of_nothing_usable(tmp_path):
  (tmp_path / 'a.mp4').write_bytes(b'')
  (tmp_path / 'c.csv').write_text('path,label\na.mp4,0\n')
  source = folder.FolderCSV(str(tmp_path), str(tmp_path / 'c.csv'))
  with pytest.raises(ValueError, match='only 0 of 1 videos are usable'):
    pack.pack(source, str(tmp_path / 'out'))
  with pytest.raises(ValueError, match=r'--shards: 2 is outside 1\.\.1'):
    pack.pack(source, str(tmp_path / 'out'), 2)
  assert not (tmp_path / 'out').exists()


def test_missing_manifest(tmp_path):
  with pytest.raises(ValueError, match=r'no manifest\.json'):
    len(arrayrecord.ArrayRecordVideos(str(tmp_path)))
  (tmp_path / 'manifest.json').write_text('{')
  with pytest.raises(ValueError, match='is not JSON'):
    len(arrayrecord.ArrayRecordVideos(str(tmp_path)))


def test_missing_shard(copy):
  next(copy.glob('*00001-of*')).unlink()
  with pytest.raises(ValueError, match=r'shard is missing: .*00001-of-00002'):
    len(arrayrecord.ArrayRecordVideos(str(copy)))


def test_wrong_count_and_version(copy):
  edit(copy, count=7)
  with pytest.raises(ValueError, match='holds 6 videos, its manifest says 7'):
    len(arrayrecord.ArrayRecordVideos(str(copy)))
  edit(copy, version=9)
  with pytest.raises(ValueError, match=r"has format \('vfm_jax.videos', 9\)"):
    len(arrayrecord.ArrayRecordVideos(str(copy)))


def test_changed_shard(copy):
  shard = next(copy.glob('*00000-of*'))
  data = bytearray(shard.read_bytes())
  data[1000] ^= 1
  shard.write_bytes(data)
  with pytest.raises(ValueError, match='differs from the SHA-256'):
    len(arrayrecord.ArrayRecordVideos(str(copy), check_hashes=True))
  shard.write_bytes(data[:-1])
  with pytest.raises(ValueError, match='bytes, the manifest says'):
    len(arrayrecord.ArrayRecordVideos(str(copy)))
