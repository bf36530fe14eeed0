"""Find people and their actions in a clip by learned queries.

RECONSTRUCTED. The TWLV-I report (arXiv:2408.11318) evaluates localisation on
AVA with the decoder of STAR (Gritsenko et al., arXiv:2304.12160) on frozen
tokens and prints its sizes: 6 layers, width 256, MLP 2048, box heads of 3
layers, dropout and drop-path 0.1. No code was released. Queries that are sums
of spatial and temporal ones, self-attention over space then time, and
cross-attention within a frame follow the paper as we remember it; the norms,
the positions of the tokens, the head that tells a person from nothing and the
number of queries are ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from vfm_jax.models.attentive import CrossAttention
from vfm_jax.nn import layers
from vfm_jax.nn.transformer import Attention
from vfm_jax.ops import positions
from vfm_jax.ops.tokens import Grid


class Tubes(NamedTuple):
  """Hold what is found: T frames of S tubes.

  Attributes:
    person: f32 [B, T, S] logits of there being a person.
    actions: f32 [B, T, S, C] logits of each action.
    boxes: f32 [B, T, S, 4] centre x, y, width and height, in (0, 1).
  """

  person: jax.Array
  actions: jax.Array
  boxes: jax.Array


class StarDecoder(nn.Module):
  """Decode tokens [B, T h w, D] into tubes (reconstructed, see the module).

  Attributes:
    num_classes: actions C.
    queries: tubes S; ours.
    depth: number of layers.
    width: features of a query.
    mlp_width: hidden features of the MLPs.
    heads: attention heads; ours.
    box_layers: layers of the head of the boxes.
    dropout: rate on the output of each branch.
    drop_path: rate at which a branch of the last layer is dropped for a clip;
      it grows linearly from 0.
  """

  num_classes: int = 80
  queries: int = 64
  depth: int = 6
  width: int = 256
  mlp_width: int = 2048
  heads: int = 8
  box_layers: int = 3
  dropout: float = 0.1
  drop_path: float = 0.1

  @nn.compact
  def __call__(
    self, tokens: jax.Array, grid: Grid, *, train: bool = False
  ) -> Tubes:
    """Return the tubes.

    Args:
      tokens: [B, n, D], frame by frame and row by row.
      grid: (T, h, w) with n = T h w.
      train: drop out; needs the rng 'dropout'.

    Raises:
      ValueError: the grid is not that of the tokens.
    """
    b, n, _ = tokens.shape
    t, h, w = grid
    if n != t * h * w:
      raise ValueError(
        f'expected a grid of {n} tokens, found {grid}, which are {t * h * w}; '
        'change the grid of the evaluator'
      )
    memory = layers.Dense(self.width, name='embed')(tokens)
    memory = layers.LayerNorm(name='embed_norm')(memory)
    place = positions.sincos_2d((h, w), self.width)
    memory = memory.reshape(b * t, h * w, self.width)
    memory = memory + jnp.asarray(place, memory.dtype)
    init = nn.initializers.normal(0.02)
    space = self.param(
      'space',
      nn.initializers.normal(1.0),
      (
        self.queries,
        self.width,
      ),
    )
    time = self.param('time', init, (t, self.width))
    x = jnp.broadcast_to(
      space + time[:, None], (b, t, self.queries, self.width)
    )
    for i in range(self.depth):
      rate = self.drop_path * i / max(self.depth - 1, 1)
      x = Layer(
        heads=self.heads,
        mlp_width=self.mlp_width,
        dropout=self.dropout,
        drop_path=rate,
        name=f'layer_{i}',
      )(x, memory, train)
    x = layers.LayerNorm(name='norm')(x)
    # A person is rare among the queries: start at p = 0.01 (RetinaNet).
    rare = nn.initializers.constant(-4.595)
    person = layers.Dense(1, bias_init=rare, name='person')(x)[..., 0]
    actions = layers.Dense(self.num_classes, name='actions')(x)
    box = x
    for i in range(self.box_layers - 1):
      box = jax.nn.relu(layers.Dense(self.width, name=f'box_{i}')(box))
    box = layers.Dense(4, name='box')(box)
    return Tubes(person, actions, jax.nn.sigmoid(box))


class Layer(nn.Module):
  """Attend over tubes, over time, to the frame's tokens; then an MLP."""

  heads: int
  mlp_width: int
  dropout: float
  drop_path: float

  @nn.compact
  def __call__(self, x: jax.Array, memory: jax.Array, train: bool) -> jax.Array:
    """Return queries [B, T, S, D] of x [B, T, S, D].

    Args:
      x: queries [B, T, S, D].
      memory: tokens [B T, h w, D].
      train: drop out.
    """
    b, t, s, dim = x.shape

    def add(x, name, branch):
      y = branch(layers.LayerNorm(name=f'{name}_norm')(x))
      y = nn.Dropout(self.dropout)(y, deterministic=not train)
      if train and self.drop_path:
        keys = jax.random.split(self.make_rng('dropout'), b)
        y = layers.drop_path(y.reshape(b, t * s, dim), self.drop_path, keys)
      return x + y.reshape(x.shape)

    def over_space(y):
      attend = Attention(self.heads, 'full', name='space')
      return attend(y.reshape(b * t, s, dim))

    def over_time(y):
      attend = Attention(self.heads, 'full', name='time')
      y = attend(y.swapaxes(1, 2).reshape(b * s, t, dim))
      return y.reshape(b, s, t, dim).swapaxes(1, 2)

    def within_frame(y):
      attend = CrossAttention(self.heads, name='frame')
      y = attend(y.reshape(b * t, s, dim), memory)
      return layers.Dense(dim, name='frame_out')(y)

    x = add(x, 'space', over_space)
    x = add(x, 'time', over_time)
    x = add(x, 'frame', within_frame)
    return add(x, 'mlp', layers.Mlp(self.mlp_width, name='mlp'))
