"""Find the config and the weights of a folder that `diffusers` saved."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from vfm_jax.convert import ConversionError


class Folder(NamedTuple):
  """Name what a folder holds.

  Attributes:
    path: of the folder of the model itself.
    config: its `config.json`.
    weights: its file of tensors.
  """

  path: pathlib.Path
  config: dict[str, Any]
  weights: pathlib.Path


def find(
  folder: str | pathlib.Path, part: str, expected: Mapping[str, Any]
) -> Folder:
  """Find the files of a model, and check that it is one that we know.

  Args:
    folder: of the model, with `config.json` and
      `diffusion_pytorch_model.safetensors` (or `.bin`), or
      of a pipeline that has it as `part`.
    part: folder of the model in a pipeline.
    expected: values that the config has to have, where it has the key.

  Raises:
    ConversionError: a file is missing, or the config is of another model.
  """
  folder = pathlib.Path(folder)
  if (folder / part).is_dir():
    folder = folder / part
  if not (folder / 'config.json').is_file():
    raise ConversionError(f'expected a config.json in {folder}')
  config = json.loads((folder / 'config.json').read_text())
  for key, value in expected.items():
    if config.get(key, value) != value:
      raise ConversionError(
        f'expected {key} {value!r} in {folder}/config.json, found '
        f'{config[key]!r}'
      )
  for suffix in ('safetensors', 'bin'):
    path = folder / f'diffusion_pytorch_model.{suffix}'
    if path.is_file():
      return Folder(folder, config, path)
  raise ConversionError(
    f'expected diffusion_pytorch_model.safetensors or .bin in {folder}, found '
    f'{sorted(p.name for p in folder.iterdir())}'
  )
