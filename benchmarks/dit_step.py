"""Time a step of DiT-S/2 against diffusers on torch.

Latents 32 x 32 x 4, batch 4, 1,000 classes, float32: noise, forward, backward
and AdamW. As a program (`python -m benchmarks.dit_step NAME`) this is one
contestant.
"""

from typing import Any

from benchmarks import contestants, interleave, results

BATCH, SIZE, CHANNELS, CLASSES = 4, 32, 4, 1000
WIDTH, DEPTH, HEADS, PATCH = 384, 12, 6, 2
WORK = dict(batch=BATCH, tokens=(SIZE // PATCH) ** 2)
BARS = {'vfm_jax': 0.9}


def run(rounds: int) -> results.Comparison:
  """Compare the train steps."""
  seconds, info = interleave.compare(
    contestants.against_torch('benchmarks.dit_step'), rounds=rounds
  )
  return results.Comparison(
    title=f'DiT-S/2 step, batch {BATCH}',
    reference='torch eager',
    seconds=seconds,
    bars=BARS,
    notes=contestants.notes(
      'Noise, forward, backward and AdamW',
      'diffusers.DiTTransformer2DModel, its blocks sharing one embedder of '
      'time and label as the released model does, with the squared error of '
      'the noise; ours adds the variational bound of the variances',
    ),
    info=info,
  )


def our_model() -> Any:
  """Return the model of this library."""
  from vfm_jax.models.dit import DiT

  return DiT(size='S', patch=PATCH, input_size=SIZE, num_classes=CLASSES)


def our_batch() -> dict[str, Any]:
  """Return what this library trains on."""
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (BATCH, SIZE, SIZE, CHANNELS)
  return {
    'image': rng.standard_normal(shape, np.float32),
    'labels': {'label': np.arange(BATCH, dtype=np.int32)},
    'row': np.arange(BATCH, dtype=np.int32),
  }


def their_model() -> Any:
  """Return the model of diffusers, with the same parameters."""
  import diffusers
  import torch

  torch.manual_seed(0)
  torch.set_num_threads(contestants.CORES)
  model = diffusers.DiTTransformer2DModel(
    num_attention_heads=HEADS,
    attention_head_dim=WIDTH // HEADS,
    in_channels=CHANNELS,
    out_channels=2 * CHANNELS,
    num_layers=DEPTH,
    sample_size=SIZE,
    patch_size=PATCH,
    num_embeds_ada_norm=CLASSES,
    norm_eps=1e-6,
  )
  first, *others = model.transformer_blocks
  for block in others:
    block.norm1.emb = first.norm1.emb
  return model


def serve_vfm_jax() -> None:
  """Be the contestant of this library."""
  from vfm_jax.objectives.denoise import Denoise

  contestants.serve_train_step(Denoise(our_model()), our_batch(), WORK)


def serve_torch(compiled: bool) -> None:
  """Be the contestant of diffusers on torch."""
  import diffusers
  import torch

  model = their_model().train()
  scheduler = diffusers.DDPMScheduler()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  latents = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
  labels = torch.arange(BATCH)
  forward = torch.compile(model) if compiled else model

  def one():
    noise = torch.randn_like(latents)
    t = torch.randint(len(scheduler.betas), (BATCH,))
    noisy = scheduler.add_noise(latents, noise, t)
    output = forward(noisy, t, labels).sample[:, :CHANNELS]
    torch.nn.functional.mse_loss(output, noise).backward()
    optimizer.step()
    optimizer.zero_grad()

  interleave.serve(
    one,
    work={**WORK, 'parameters': contestants.count(list(model.parameters()))},
    version=f'{torch.__version__}, diffusers {diffusers.__version__}',
  )


if __name__ == '__main__':
  contestants.main(serve_vfm_jax, serve_torch)
