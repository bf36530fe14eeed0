"""Time 50 DDIM steps of DiT-S/2 with guidance against diffusers on torch.

Four samples of 32 x 32 x 4: the network sees eight inputs a step, with a label
and without. As a program (`python -m benchmarks.dit_sampling NAME`) this is one
contestant.
"""

from benchmarks import contestants, dit_step, interleave, results
from benchmarks.dit_step import BATCH, CHANNELS, CLASSES, SIZE

STEPS, SCALE = 50, 4.0
WORK = dict(steps=STEPS, inputs=2 * BATCH)
BARS = {'vfm_jax': 0.45}


def run(rounds: int) -> results.Comparison:
  """Compare the time of all steps."""
  seconds, info = interleave.compare(
    # A measurement takes long enough with one way of malloc.
    contestants.against_torch('benchmarks.dit_sampling', malloc_defaults=False),
    rounds=rounds,
    repeats=1,
  )
  return results.Comparison(
    title=f'DiT-S/2, {STEPS} guided DDIM steps, batch {BATCH}',
    reference='torch eager',
    seconds=seconds,
    bars=BARS,
    notes=contestants.notes(
      'All steps of sampling',
      'diffusers.DiTTransformer2DModel with DDIMScheduler in inference mode',
    ),
    info=info,
  )


def serve_vfm_jax() -> None:
  """Be the contestant of this library."""
  import functools

  import jax
  import jax.numpy as jnp

  from vfm_jax import samplers
  from vfm_jax.objectives.denoise import Denoise
  from vfm_jax.sampling import Sampling

  objective = Denoise(
    dit_step.our_model(),
    sampling=Sampling(
      sampler=functools.partial(samplers.ddim, steps=str(STEPS)), scale=SCALE
    ),
  )
  shape, labels = (SIZE, SIZE, CHANNELS), jnp.arange(BATCH)
  batch = {
    'image': jnp.zeros((BATCH, *shape)),
    'labels': {'label': labels},
  }
  params, _ = jax.jit(objective.init)(jax.random.key(0), batch)
  keys = jax.random.split(jax.random.key(1), BATCH)
  draw = jax.jit(lambda params: objective.draw(params, keys, shape, labels))
  interleave.serve(
    lambda: draw(params).block_until_ready(),
    warmup=1,
    work={**WORK, 'parameters': contestants.count(jax.tree.leaves(params))},
    version=jax.__version__,
  )


def serve_torch(compiled: bool) -> None:
  """Be the contestant of diffusers on torch."""
  import diffusers
  import torch

  model = dit_step.their_model().eval()
  forward = torch.compile(model) if compiled else model
  scheduler = diffusers.DDIMScheduler(clip_sample=False)
  labels = torch.cat([torch.arange(BATCH), torch.full((BATCH,), CLASSES)])
  shape = (BATCH, CHANNELS, SIZE, SIZE)

  @torch.inference_mode()
  def sample():
    scheduler.set_timesteps(STEPS)
    x = torch.randn(shape)
    for t in scheduler.timesteps:
      times = t.expand(2 * BATCH)
      output = forward(torch.cat([x, x]), times, labels).sample[:, :CHANNELS]
      guided, null = output.chunk(2)
      x = scheduler.step(null + SCALE * (guided - null), t, x).prev_sample
    return x

  interleave.serve(
    sample,
    warmup=1,
    work={
      **WORK,
      'parameters': contestants.count(list(model.parameters())),
    },
    version=f'{torch.__version__}, diffusers {diffusers.__version__}',
  )


if __name__ == '__main__':
  contestants.main(serve_vfm_jax, serve_torch)
