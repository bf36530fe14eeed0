"""Time a step of VideoMAE ViT-S/16 against transformers on torch.

Clips 16 x 224 x 224, 90 % tube mask, float32, forward, backward and AdamW. As a
program (`python -m benchmarks.masked_step NAME`) this is one contestant.
"""

import functools
import os
import sys
from typing import Any

from benchmarks import interleave, results

BATCH, FRAMES, SIZE, RATIO = 2, 16, 224, 0.9
TUBELET, PATCH = 2, 16
WIDTH, DEPTH, HEADS = 384, 12, 6
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 192, 4, 3
BARS = {'vfm_jax': 0.95}

# As launch/setup.sh sets for users: glibc keeps the memory of a step.
KEEP_MEMORY = {
  'MALLOC_ARENA_MAX': '1',
  'MALLOC_MMAP_THRESHOLD_': '8589934592',
  'MALLOC_TRIM_THRESHOLD_': '17179869184',
  'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
}
RETURN_MEMORY = dict.fromkeys(KEEP_MEMORY)


def run(rounds: int) -> results.Comparison:
  """Compare the train steps."""

  def contestant(name: str, framework: str, env: Any):
    command = ('-m', 'benchmarks.masked_step', framework)
    return interleave.Contestant(name, command, env)

  contestants = [
    contestant('torch eager', 'torch', KEEP_MEMORY),
    contestant('torch.compile', 'torch_compile', KEEP_MEMORY),
    contestant('vfm_jax', 'vfm_jax', KEEP_MEMORY),
    contestant('torch eager, malloc defaults', 'torch', RETURN_MEMORY),
    contestant('vfm_jax, malloc defaults', 'vfm_jax', RETURN_MEMORY),
  ]
  seconds, info = interleave.compare(contestants, rounds=rounds)
  return results.Comparison(
    title='VideoMAE ViT-S step, batch 2',
    reference='torch eager',
    seconds=seconds,
    bars=BARS,
    notes=(
      'Forward, backward and AdamW in float32 on '
      f'{len(os.sched_getaffinity(0))} CPU cores; malloc as launch/setup.sh '
      'sets it, for all but the rows that say otherwise. The peer is '
      'transformers.VideoMAEForPreTraining.'
    ),
    info=info,
  )


def work(visible: int, masked: int, parameters: int) -> dict[str, int]:
  """Return what has to be equal for a fair comparison."""
  return dict(
    batch=BATCH, visible=visible, masked=masked, parameters=parameters
  )


def serve_vfm_jax() -> None:
  """Be the contestant of this library."""
  import jax
  import numpy as np

  from vfm_jax import optim, schedules, step
  from vfm_jax.models.encoders import VideoViT
  from vfm_jax.models.predictors import PixelDecoder
  from vfm_jax.objectives.masked import Masked

  objective = Masked(
    encoder=VideoViT(size='S', frames=FRAMES, image_size=SIZE),
    decoder=PixelDecoder(
      width=DECODER_WIDTH, depth=DECODER_DEPTH, heads=DECODER_HEADS
    ),
  )
  pixels = np.random.default_rng(0).integers(
    0, 256, (BATCH, FRAMES, SIZE, SIZE, 3), np.uint8
  )
  batch = {'video': pixels, 'row': np.arange(BATCH, dtype=np.int32)}
  params, _ = jax.eval_shape(lambda: step.init_params(objective, 0, batch))
  tx, _ = optim.Optimizer(
    lr=functools.partial(schedules.constant, value=1e-4)
  ).build(params, 1000)
  state = jax.jit(lambda: step.init_state(objective, tx, 0, batch))()
  train_step = jax.jit(step.make_train_step(objective, tx), donate_argnums=0)
  batch = jax.device_put(batch)
  out = jax.eval_shape(
    objective.reconstruct,
    params,
    jax.ShapeDtypeStruct(pixels.shape, np.float32),
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH)),
  )

  def one():
    nonlocal state
    state, metrics = train_step(state, batch)
    jax.block_until_ready((state, metrics))

  interleave.serve(
    one,
    work=work(
      visible=out.encoded.shape[1],
      masked=out.pred.shape[1],
      parameters=sum(x.size for x in jax.tree.leaves(params)),
    ),
    version=jax.__version__,
  )


def serve_torch(compiled: bool) -> None:
  """Be the contestant of transformers on torch."""
  import torch
  import transformers

  torch.manual_seed(0)
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = transformers.VideoMAEForPreTraining(
    transformers.VideoMAEConfig(
      image_size=SIZE,
      patch_size=PATCH,
      num_frames=FRAMES,
      tubelet_size=TUBELET,
      hidden_size=WIDTH,
      num_hidden_layers=DEPTH,
      num_attention_heads=HEADS,
      intermediate_size=4 * WIDTH,
      use_mean_pooling=False,
      decoder_hidden_size=DECODER_WIDTH,
      decoder_num_hidden_layers=DECODER_DEPTH,
      decoder_num_attention_heads=DECODER_HEADS,
      decoder_intermediate_size=4 * DECODER_WIDTH,
    )
  ).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  cells, slices = (SIZE // PATCH) ** 2, FRAMES // TUBELET
  hidden = torch.rand(BATCH, cells).argsort(1) < int(RATIO * cells)
  mask = hidden.repeat(1, slices)
  pixels = torch.randn(BATCH, FRAMES, 3, SIZE, SIZE)
  forward = torch.compile(model) if compiled else model

  def one():
    loss = forward(pixels, bool_masked_pos=mask).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

  interleave.serve(
    one,
    work=work(
      visible=int((~mask[0]).sum()),
      masked=int(mask[0].sum()),
      parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    ),
    version=f'{torch.__version__}, transformers {transformers.__version__}',
  )


if __name__ == '__main__':
  {
    'vfm_jax': serve_vfm_jax,
    'torch': lambda: serve_torch(compiled=False),
    'torch_compile': lambda: serve_torch(compiled=True),
  }[sys.argv[1]]()
