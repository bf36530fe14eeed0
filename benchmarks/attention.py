"""Time attention, forward and backward, at the shapes of video and DiT models.

Everything that runs on the device that is here: our implementations, cuDNN and
XLA through `ops.attention`, and of others splash (TPU), tokamax and torch (CPU)
where they are installed. What refuses is named with its reason. All are in one
process, since one process holds an accelerator; each round times each of them.
"""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable

import jax

from benchmarks import attention_peers, results
from vfm_jax.ops import attention as attention_lib
from vfm_jax.ops import attention_mesh
from vfm_jax.ops.attention_spec import Spec


@dataclasses.dataclass(frozen=True)
class Shape:
  """Hold the sizes of one layer's attention."""

  name: str
  tokens: int
  heads: int
  head_dim: int


VIDEO, SEEN, LATENT = 1568, 160, 256
SHAPES = (
  Shape('ViT-B, all tokens of a clip', VIDEO, 12, 64),
  Shape('ViT-L, all tokens of a clip', VIDEO, 16, 64),
  Shape('ViT-H, all tokens of a clip', VIDEO, 16, 80),
  Shape('ViT-L, what a mask of 90 % leaves', SEEN, 16, 64),
  Shape('DiT-B/2', LATENT, 12, 64),
  Shape('DiT-L/2', LATENT, 16, 64),
  Shape('DiT-XL/2', LATENT, 16, 72),
)
# Tokens of a batch: enough to fill an accelerator, few enough for a CPU.
TOKENS = {'cpu': 1568, 'gpu': 32768, 'tpu': 32768}
REFERENCES = ('cudnn', 'xla')

Attend = Callable[..., jax.Array]


def run(rounds: int) -> list[results.Comparison]:
  """Compare all shapes on JAX's default device."""
  return [compare(shape, rounds) for shape in SHAPES]


def compare(shape: Shape, rounds: int) -> results.Comparison:
  """Compare what runs at one shape."""
  device = attention_mesh.device()
  batch = max(1, TOKENS[device.platform] // shape.tokens)
  dtype = 'float32' if device.platform == 'cpu' else 'bfloat16'
  contestants, refused = _contestants(shape, batch, dtype, device)
  size = (batch, shape.tokens, shape.heads, shape.head_dim)
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = [jax.random.normal(key, size, dtype) for key in keys]
  steps = {name: _step(attend, arrays) for name, attend in contestants.items()}
  if device.platform == 'cpu' and importlib.util.find_spec('torch'):
    steps['torch'] = attention_peers.torch_step(size)
  seconds = _measure(steps, rounds)
  product = 2 * batch * shape.heads * shape.tokens**2 * shape.head_dim
  reference = next(name for name in REFERENCES if name in seconds)
  return results.Comparison(
    title=f'attention of {shape.name}, forward and backward',
    reference=reference,
    seconds=seconds,
    bars={'pallas_gpu': 1.0} if 'pallas_gpu' in seconds else {},
    notes=(
      f'{batch} x {shape.tokens} tokens, {shape.heads} heads of '
      f'{shape.head_dim}, {dtype}, {device.kind}, jax {jax.__version__}. '
      + ' '.join(f'Refused: {name} ({why}).' for name, why in refused.items())
    ),
    # Two products forward and four backward; what is computed again is not
    # work.
    info={'flops': 6 * product, 'refused': refused, 'tokens': shape.tokens},
  )


def _contestants(
  shape: Shape, batch: int, dtype: str, device: attention_mesh.Device
) -> tuple[dict[str, Attend], dict[str, str]]:
  """Return what runs, and why the rest does not."""
  spec = Spec(
    platform=device.platform,
    dtype=dtype,
    head_dim=shape.head_dim,
    batch=batch,
    queries=shape.tokens,
    keys=shape.tokens,
    heads=shape.heads,
    kv_heads=shape.heads,
    device_kind=device.kind,
    capability=device.capability,
    jax=jax.__version_info__,
  )
  found: dict[str, Attend] = {}
  refused: dict[str, str] = {}
  for implementation in attention_lib.IMPLEMENTATIONS:
    name = implementation.name
    reason = implementation.refuse(spec)
    if reason is not None:
      refused[name] = reason
    else:
      found[name] = functools.partial(attention_lib.attention, impl=name)
  for name, (refuse, attend) in attention_peers.PEERS.items():
    reason = refuse(spec)
    if reason is not None:
      refused[name] = reason
    else:
      found[name] = attend
  return found, refused


def _step(attend: Attend, arrays: list[jax.Array]) -> Callable[[], None]:
  """Return a compiled, warm pass forward and backward."""
  *given, do = arrays

  @jax.jit
  def both(q, k, v, do):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(do.astype(out.dtype))

  def step():
    jax.block_until_ready(both(*given, do))

  step()
  return step


def _measure(
  steps: dict[str, Callable[[], None]], rounds: int
) -> dict[str, list[float]]:
  """Time each contestant once a round, in another order each time."""
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  names = list(steps)
  for r in range(rounds):
    turn = r % len(names)
    for name in names[turn:] + names[:turn]:
      steps[name]()  # caches are those of the one before
      repeats, start = 0, time.perf_counter()
      # Short ones are repeated: a clock tells no microseconds.
      while repeats < 3 or time.perf_counter() - start < 0.05:
        steps[name]()
        repeats += 1
      seconds[name].append((time.perf_counter() - start) / repeats)
  return seconds
