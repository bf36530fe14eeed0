"""Name the leaves of a tree by their '/'-joined path.

Optimizer groups, sharding rules, checkpoints and reports all speak of a leaf
by the same name, for example `encoder/blocks/attn/qkv/kernel`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PyTree = Any

# The parameters of a scanned stack live under a component that is exactly
# `blocks`, and carry one leading axis, the depth; an unrolled stack has
# `blocks_0`, `blocks_1`, ...
STACKED = re.compile(r'(?:^|/)blocks/')


def path_leaves(tree: PyTree) -> list[tuple[str, Any]]:
  """Return [(path, leaf)] in the order of `jax.tree.leaves`."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(_join(path), leaf) for path, leaf in leaves]


def map_with_path(
  fn: Callable[..., Any], tree: PyTree, *rest: PyTree
) -> PyTree:
  """Map `fn(path, leaf, *leaves of rest)` over the leaves of a tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(_join(path), *leaves), tree, *rest
  )


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
  """Return the size in bytes of an array."""
  return math.prod(shape) * np.dtype(dtype).itemsize


def _join(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
