import pickle

import numpy as np
import PIL.Image
import pytest

from vfm_jax.data import folder, sources, video


def write(path, text):
  path.write_text(text)
  return str(path)


def test_csv_with_two_labels(video_folder):
  source = folder.FolderCSV(
    str(video_folder), str(video_folder / 'all.csv'), ('motion', 'label')
  )
  assert isinstance(source, sources.Source)
  assert source.label_names == ('motion', 'label')
  assert len(source) == 6
  example = pickle.loads(pickle.dumps(source))[5]
  assert example.id == 'v5.mp4'
  assert example.labels == {'motion': 1, 'label': 2}
  with pickle.loads(pickle.dumps(example)).open() as reader:
    assert reader.num_frames == 40
  with pytest.raises(IndexError):
    source[6]


def test_class_names(video_folder, tmp_path):
  csv = write(tmp_path / 'c.csv', 'label,path\nrun,v0.mp4\nfly,v1.mp4\n')
  source = folder.FolderCSV(str(video_folder), csv, classes=(('jump', 'run'),))
  assert source[0].labels == {'label': 1}
  with pytest.raises(video.LabelError, match="bad label 'fly': not one of 2"):
    source[1]


def test_bad_labels_spoil_their_row_only(video_folder, tmp_path):
  csv = write(
    tmp_path / 'c.csv',
    'path,label\nv0.mp4,2\nv1.mp4,seven\nv2.mp4,-1\nv3.mp4,3\nv4.mp4,\n,1\n',
  )
  source = folder.FolderCSV(str(video_folder), csv, num_classes=(3,))
  assert source[0].labels == {'label': 2}
  for i, reason in enumerate(
    ['not an integer', r'outside 0\.\.2', r'outside 0\.\.2', 'not an integer'],
    1,
  ):
    with pytest.raises(video.LabelError, match=reason) as e:
      source[i]
    assert f'v{i}.mp4' in str(e.value)
    assert f'c.csv:{i + 2}' in e.value.name
  with pytest.raises(video.DecodeError, match='no path'):
    source[5]


def test_missing_file_spoils_its_row_only(video_folder, tmp_path):
  csv = write(tmp_path / 'c.csv', 'path,label\ngone.mp4,0\n')
  example = folder.FolderCSV(str(video_folder), csv)[0]
  with pytest.raises(video.DecodeError, match=r'gone\.mp4: missing'):
    example.open()


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'no column path, label; its header is absent'),
    ('path,label\n', 'lists no video'),
    ('path,class\na.mp4,1\n', 'no column label; its header is path,class'),
    ('a.mp4 1\n', "set data.source.label_columns, or data.source.layout='li"),
  ],
)
def test_unusable_csv_stops_at_once(tmp_path, text, message):
  csv = write(tmp_path / 'c.csv', text)
  with pytest.raises(ValueError, match=r'data\.source\.csv') as e:
    len(folder.FolderCSV('.', csv))
  assert message in str(e.value)


def test_absent_csv(tmp_path):
  with pytest.raises(ValueError, match=r'data\.source\.csv: can not read'):
    len(folder.FolderCSV('.', str(tmp_path / 'none.csv')))


def test_list_layout(tmp_path):
  csv = write(tmp_path / 'l.txt', 'a b.mp4 3\n\nc.mp4 0\n')
  source = folder.FolderCSV('/data', csv, layout='list')
  assert [source[i].id for i in range(2)] == ['a b.mp4', 'c.mp4']
  assert source[0].labels == {'label': 3}
  pretrain = write(tmp_path / 'p.txt', 'a.mp4 0 -1\nb.mp4 0 -1\n')
  source = folder.FolderCSV('/data', pretrain, (), layout='list')
  assert [source[i].id for i in range(2)] == ['a.mp4', 'b.mp4']
  assert source[1].labels == {}
  short = write(tmp_path / 's.txt', 'a.mp4 0\nb.mp4\n')
  with pytest.raises(ValueError, match='line 2 of'):
    len(folder.FolderCSV('/data', short, layout='list'))


def test_folder_videos(tmp_path, write_video):
  for name in ('run/a.mp4', 'jump/b.mp4', 'jump/deep/c.mp4'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_video(str(tmp_path / name), 4)
  (tmp_path / 'run' / 'notes.txt').write_text('')
  plain = folder.FolderVideos(str(tmp_path))
  assert [plain[i].id for i in range(len(plain))] == [
    'jump/b.mp4', 'jump/deep/c.mp4', 'run/a.mp4',
  ]  # fmt: skip
  assert plain[0].labels == {}
  labelled = folder.FolderVideos(str(tmp_path), label='action')
  assert labelled.classes == ('jump', 'run')
  assert [labelled[i].labels['action'] for i in range(3)] == [0, 0, 1]
  with labelled[2].open() as reader:
    assert reader.num_frames == 4


def test_folder_video_outside_a_class(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'a.mp4').write_bytes(b'')
  (tmp_path / 'top.mp4').write_bytes(b'')
  source = folder.FolderVideos(str(tmp_path), label='action')
  with pytest.raises(video.LabelError, match='not inside a class folder'):
    source[1]
  with pytest.raises(ValueError, match=r'data\.source\.root: no such folder'):
    len(folder.FolderVideos(str(tmp_path / 'none')))


def test_frame_folders(tmp_path):
  for name in ('run/a', 'run/b', 'sit/c'):
    (tmp_path / name).mkdir(parents=True)
    for i in range(3):
      PIL.Image.fromarray(np.full((8, 9, 3), i, np.uint8)).save(
        tmp_path / name / f'{i}.png'
      )
  source = folder.FrameFolders(str(tmp_path), fps=12.0, label='action')
  assert [source[i].id for i in range(len(source))] == [
    'run/a', 'run/b', 'sit/c',
  ]  # fmt: skip
  assert source[2].labels == {'action': 1}
  with source[0].open() as reader:
    assert (reader.num_frames, reader.fps) == (3, 12.0)
    np.testing.assert_array_equal(reader.read([2])[0, 0, 0], [2, 2, 2])


def test_folder_images(tmp_path):
  for i, name in enumerate(('n02/b.png', 'n01/a.jpeg', 'n02/c.png')):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    image = PIL.Image.fromarray(np.full((8, 9), 40 * i, np.uint8))  # grey
    image.save(tmp_path / name)
  (tmp_path / 'n01' / 'bad.jpg').write_bytes(b'\xff\xd8 no image')
  source = folder.FolderImages(str(tmp_path))
  assert source.classes == ('n01', 'n02')
  found = [(source[i].id, source[i].labels['label']) for i in range(4)]
  assert found == [
    ('n01/a.jpeg', 0), ('n01/bad.jpg', 0), ('n02/b.png', 1), ('n02/c.png', 1),
  ]  # fmt: skip
  with source[3].open() as reader:
    assert (reader.num_frames, reader.height, reader.width) == (1, 8, 9)
    np.testing.assert_array_equal(reader.read([0])[0, 0, 0], [80, 80, 80])
  with pytest.raises(video.DecodeError, match=r'bad\.jpg is not a readable'):
    source[1].open()
