"""Check the FLOP count against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from vfm_jax import flops
from vfm_jax.nn.transformer import Block, Stack

F32 = jnp.float32


def struct(*shape):
  return jax.ShapeDtypeStruct(shape, F32)


def test_matrix_products():
  assert flops.count(jnp.dot, struct(3, 5), struct(5, 7)) == 2 * 3 * 5 * 7
  batched = lambda a, b: jnp.einsum('bij,bkj->bik', a, b)  # noqa: E731
  assert flops.count(batched, struct(2, 3, 5), struct(2, 7, 5)) == 420


def test_convolution():
  def conv(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  n = flops.count(conv, struct(2, 8, 8, 3), struct(2, 2, 3, 6))
  assert n == 2 * (2 * 4 * 4 * 6) * (2 * 2 * 3)


def test_depthwise_convolution_counts_its_own_channel_only():
  def conv(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (1,),
      'SAME',
      dimension_numbers=('NHC', 'HIO', 'NHC'),
      feature_group_count=4,
    )

  assert flops.count(conv, struct(1, 8, 4), struct(3, 1, 4)) == 2 * 32 * 3


def test_a_block_is_24nd2_plus_4n2d():
  batch, n, d = 2, 10, 16
  block = Block(heads=2, mlp_width=4 * d)
  x = struct(batch, n, d)
  params = jax.eval_shape(block.init, jax.random.key(0), x)
  expected = batch * (24 * n * d**2 + 4 * n**2 * d)
  assert flops.count(block.apply, params, x) == expected


@pytest.mark.parametrize('remat', ['none', 'full'])
@pytest.mark.parametrize('scan', [False, True])
def test_a_stack_counts_each_layer(scan, remat):
  n, d, depth = 10, 16, 5
  # On CPU the default attention puts one more column into a product.
  block = Block(heads=2, mlp_width=4 * d, impl='xla')
  stack = Stack(depth, block, 0.0, scan, remat)
  x = struct(1, n, d)
  params = jax.eval_shape(stack.init, jax.random.key(0), x)

  def forward(params, x):
    return stack.apply(params, x)[0].sum()

  once = depth * (24 * n * d**2 + 4 * n**2 * d)
  assert flops.count(forward, params, x) == once
  # The backward pass costs twice the forward pass, and once more with remat.
  both = flops.count(jax.value_and_grad(forward, (0, 1)), params, x)
  times = both / once
  assert times == 3 if remat == 'none' else 3 < times <= 4


def test_what_no_output_needs_does_not_count():
  def f(x, n):
    def body(y, _):
      return y @ x, y.shape[0] * n

    _, counts = jax.lax.scan(body, x, None, length=3)
    return jax.jit(lambda x, c: (x @ x, c))(x, counts)[1]

  assert flops.count(f, struct(4, 4), struct()) == 0


def test_cond_takes_the_dearest_branch():
  def f(p, x):
    return jax.lax.cond(p, lambda x: x @ x, lambda x: x @ x @ x, x)

  assert flops.count(f, jax.ShapeDtypeStruct((), bool), struct(4, 4)) == 256


def test_static_loop_counts_and_open_loop_is_refused():
  def static(x):
    return jax.lax.fori_loop(0, 3, lambda _, y: y @ x, x)

  def open_ended(x):
    return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ x, x)

  assert flops.count(static, struct(4, 4)) == 3 * 128
  with pytest.raises(ValueError, match='while loop'):
    flops.count(open_ended, struct(4, 4))


def test_shard_map_counts_every_shard():
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec('data')
  f = jax.shard_map(
    lambda x, w: x @ w,
    mesh=mesh,
    in_specs=(spec, jax.sharding.PartitionSpec()),
    out_specs=spec,
  )
  assert flops.count(f, struct(8, 4), struct(4, 4)) == 2 * 8 * 4 * 4
