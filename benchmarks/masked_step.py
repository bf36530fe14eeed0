"""Time a step of VideoMAE ViT-S/16 against transformers on torch.

Clips 16 x 224 x 224, 90 % tube mask, float32, forward, backward and AdamW. As a
program (`python -m benchmarks.masked_step NAME`) this is one contestant.
"""

from benchmarks import contestants, interleave, results

BATCH, FRAMES, SIZE, RATIO = 2, 16, 224, 0.9
TUBELET, PATCH = 2, 16
WIDTH, DEPTH, HEADS = 384, 12, 6
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 192, 4, 3
BARS = {'vfm_jax': 0.95}


def run(rounds: int) -> results.Comparison:
  """Compare the train steps."""
  seconds, info = interleave.compare(
    contestants.against_torch('benchmarks.masked_step'), rounds=rounds
  )
  return results.Comparison(
    title='VideoMAE ViT-S step, batch 2',
    reference='torch eager',
    seconds=seconds,
    bars=BARS,
    notes=contestants.notes(
      'Forward, backward and AdamW', 'transformers.VideoMAEForPreTraining'
    ),
    info=info,
  )


def work(visible: int, masked: int) -> dict[str, int]:
  """Return what has to be equal for a fair comparison."""
  return dict(batch=BATCH, visible=visible, masked=masked)


def serve_vfm_jax() -> None:
  """Be the contestant of this library."""
  import jax
  import numpy as np

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
  params, _ = jax.eval_shape(objective.init, jax.random.key(0), batch)
  out = jax.eval_shape(
    objective.reconstruct,
    params,
    jax.ShapeDtypeStruct(pixels.shape, np.float32),
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH)),
  )
  same = work(visible=out.encoded.shape[1], masked=out.pred.shape[1])
  contestants.serve_train_step(objective, batch, same)


def serve_torch(compiled: bool) -> None:
  """Be the contestant of transformers on torch."""
  import torch
  import transformers

  torch.manual_seed(0)
  torch.set_num_threads(contestants.CORES)
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
    work={
      **work(visible=int((~mask[0]).sum()), masked=int(mask[0].sum())),
      'parameters': contestants.count(
        [p for p in model.parameters() if p.requires_grad]
      ),
    },
    version=f'{torch.__version__}, transformers {transformers.__version__}',
  )


if __name__ == '__main__':
  contestants.main(serve_vfm_jax, serve_torch)
