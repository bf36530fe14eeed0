"""Wrap the networks that metrics of generated images read.

A network is chosen in a recipe, loads its weights on first use and gives the
activations of a batch of images, one row an image.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm_jax import convert_features, load_weights
from vfm_jax.models import efficientnet, inception
from vfm_jax.objectives.base import Batch, PyTree
from vfm_jax.ops import resize

_HIGHEST = jax.lax.Precision.HIGHEST
_INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'


class Network(Protocol):
  """What `Generation` asks of a network; it also satisfies `Embeds`."""

  @property
  def name(self) -> str:
    """Name of network and input, for the names of metrics."""
    ...

  @property
  def parts(self) -> Mapping[str, int]:
    """Widths of the parts of a row: `pool`, `spatial`, `logits`."""
    ...

  @property
  def titles(self) -> Mapping[str, str]:
    """Names that the metrics have with this network, by metric."""
    ...

  def load(self) -> PyTree:
    """Return the parameters, numpy arrays; read once a process."""
    ...

  def embed(self, params: PyTree, batch: Batch) -> jax.Array:
    """Return f32 [B, D], the parts side by side.

    The batch has `video` uint8 [B, 1, H, W, C], with C of 3, or 1 for grey.
    """
    ...


@dataclasses.dataclass(frozen=True)
class EfficientNetLite0:
  """Read EfficientNet-lite0, whose weights install with a package.

  What is computed with it is comparable with itself alone: it is no FID.

  Attributes:
    size: height and width that images are resized to; the network was trained
      at 224.
    weights: .pth or .safetensors file in the layout of the package; that of
      the package by default.
  """

  size: int = 224
  weights: str | None = None

  @property
  def name(self) -> str:
    """Name of the network, with the size if it is not the published one."""
    return 'efficientnet_lite0' + (f'_{self.size}' if self.size != 224 else '')

  @property
  def parts(self) -> dict[str, int]:
    """Widths of the parts of a row."""
    return {'pool': efficientnet.WIDTH}

  @property
  def titles(self) -> dict[str, str]:
    """Names of the metrics."""
    return {'frechet': 'frechet', 'kernel': 'mmd'}

  def load(self) -> PyTree:
    """Return the parameters.

    Raises:
      ImportError: the package is not installed.
      FileNotFoundError: there is no such file.
    """
    return load_weights.efficientnet_lite0(self.weights, 'features.weights')

  def embed(self, params: PyTree, batch: Batch) -> jax.Array:
    """Return f32 [B, 1280] of uint8 [B, 1, H, W, C]."""
    x = _images(batch)
    shape = (len(x), self.size, self.size, 3)
    x = jax.image.resize(x, shape, 'linear', precision=_HIGHEST)
    x = (x - 127.0) / 128.0
    return _apply(efficientnet.EfficientNetLite0(), params, x)


@dataclasses.dataclass(frozen=True)
class Inception2015:
  """Read the Inception-v3 of FID, with weights that the user supplies.

  Attributes:
    weights: file `pt_inception-2015-12-05-6726825d.pth` of the port of
      pytorch-fid, or its tensors as .safetensors.
    inputs: how pixels enter. `adm` is what the graph of the official
      evaluators does: bilinear as in TensorFlow 1 (pixel i at i / n), then
      (x - 128) / 128; `pytorch_fid` is what that port does: pixel centers,
      then 2 x / 255 - 1.
  """

  weights: str
  inputs: Literal['adm', 'pytorch_fid'] = 'adm'

  @property
  def name(self) -> str:
    """Name of the network, with the input if it is not the official one."""
    return 'inception2015' + ('' if self.inputs == 'adm' else '_pytorchfid')

  @property
  def parts(self) -> dict[str, int]:
    """Widths of the parts of a row."""
    spatial = 17 * 17 * inception.SPATIAL_CHANNELS
    return {'pool': 2048, 'spatial': spatial, 'logits': inception.OUTPUTS}

  @property
  def titles(self) -> dict[str, str]:
    """Names of the metrics."""
    return {'frechet': 'fid', 'spatial': 'sfid', 'score': 'is', 'kernel': 'kid'}

  def load(self) -> PyTree:
    """Return the parameters.

    Raises:
      FileNotFoundError: there is no such file.
      ConversionError: the file is not of this network.
    """
    if not pathlib.Path(self.weights).is_file():
      raise FileNotFoundError(
        f'no weights at {self.weights!r}; supply {_INCEPTION_FILE}, which '
        'pytorch-fid releases, and name it in `features.weights`, or measure '
        'with EfficientNetLite0, whose weights install with a package'
      )
    return load_weights.load(
      self.weights, inception.InceptionV3, convert_features.from_inception
    )

  def embed(self, params: PyTree, batch: Batch) -> jax.Array:
    """Return f32 [B, 2048 + 2023 + 1008] of uint8 [B, 1, H, W, C]."""
    x = _images(batch)
    if self.inputs == 'adm':
      x = (resize.bilinear(x, inception.SIZE, 'corner') - 128.0) / 128.0
    else:
      x = resize.bilinear(x, inception.SIZE, 'center') * (2 / 255) - 1.0
    return jnp.concatenate(_apply(inception.InceptionV3(), params, x), axis=-1)


def _apply(module: nn.Module, params: PyTree, x: jax.Array) -> Any:
  return module.apply({'params': params}, x)


def _images(batch: Batch) -> jax.Array:
  shape = batch['video'].shape
  if shape[1] != 1:
    raise ValueError(
      'expected images or clips of one frame to measure, found clips of '
      f'{shape[1]} frames; change the clip sampler of `reference`, or `shape`'
    )
  x = batch['video'][:, 0].astype(jnp.float32)
  # Grey images have one channel; the networks take three.
  return jnp.repeat(x, 3, axis=-1) if shape[-1] == 1 else x
