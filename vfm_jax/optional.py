"""Import optional dependencies, naming the extra that installs them."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
  """Import `module`, or say which extra of this package provides it.

  Args:
    module: dotted name, for example `tensorflow_datasets`.
    extra: name of the extra in `pyproject.toml` that installs it.

  Raises:
    ImportError: the module is missing; the message gives the pip command.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as e:
    raise ImportError(
      f'{module} is needed here and is not installed; '
      f"install it with: pip install 'vfm_jax[{extra}]'"
    ) from e
