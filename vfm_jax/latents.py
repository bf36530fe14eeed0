"""Encode pictures as latents for training, and decode what a model draws."""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vfm_jax import convert_vae, sharding
from vfm_jax.data import latents as latents_lib
from vfm_jax.data.pipeline import Pipeline
from vfm_jax.evals.base import to_host

# Batches on their way through the device; bounds what waits in its memory.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class LatentDecoder:
  """Decode latents with an autoencoder in a file; an `objectives` `Decoder`.

  The file is read when pictures are first asked for.

  Attributes:
    path: folder that diffusers saved, see `convert_vae.load`; '' for none, and
      then nothing can be decoded.
    dtype: compute type.
    batch: pictures decoded at a time, which bounds the memory.
  """

  path: str = ''
  dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'
  batch: int = 8

  def weights(self) -> Any | None:
    """Return the parameters of the autoencoder, on the host; None without.

    Raises:
      ConversionError: the folder holds no such autoencoder.
    """
    return self._loaded.params if self.path else None

  def decode(self, weights: Any, z: jax.Array) -> jax.Array:
    """Return pictures f32 [B, (T,) H, W, C]; see `Decoder`."""
    model = self._loaded.model
    z = z / model.scaling + model.shift
    one = lambda z: model.apply(  # noqa: E731
      {'params': weights}, z[None], method='decode'
    )[0]
    flat = z.reshape(-1, *z.shape[-3:])
    x = jax.lax.map(one, flat, batch_size=min(self.batch, len(flat)))
    return x.reshape(*z.shape[:-3], *x.shape[1:])

  @functools.cached_property
  def _loaded(self) -> convert_vae.Autoencoder:
    return convert_vae.load(self.path, dtype=self.dtype)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != '_loaded'}


def write_latents(
  vae: convert_vae.Autoencoder,
  pipeline: Pipeline,
  out: str | os.PathLike,
  *,
  batch_size: int = 16,
  num_shards: int = 1,
  flips: bool = True,
  dtype: latents_lib.Dtype = 'float16',
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
  """Encode every example of a pipeline and return the manifest of the set.

  Clips of one frame become latents [h, w, C]; the frames of others are encoded
  one by one, to [T, h, w, C]. Unusable examples are left out and named in the
  manifest. On several processes each encodes its rows and the first one writes;
  the others return {}.

  Args:
    vae: that encodes.
    pipeline: of pictures uint8, with one view an example; its transform should
      not draw, since each example is encoded once.
    out: folder to make, see `data.latents`.
    batch_size: examples encoded at a time.
    num_shards: number of files.
    flips: also encode the mirror images.
    dtype: of the stored moments, see `data.latents.About`.
    mesh: devices to split a batch over; None uses one.

  Raises:
    FileExistsError: `out` exists already.
    ValueError: the pipeline gives several views or pictures that the
      autoencoder does not take, or a latent is not finite.
    TooManyBadVideos: more is unusable than the pipeline allows.
  """
  if pipeline.views != 1:
    raise ValueError(
      f'{pipeline.path}.views: expected 1 to encode, found {pipeline.views}'
    )
  names = tuple(pipeline.source.label_names)
  shape = pipeline.element_spec(1)['video'].shape[1:]
  about = latents_lib.About(
    shape=_latent_shape(vae.model, shape, pipeline.path),
    dtype=dtype,
    flips=flips,
    scaling=vae.model.scaling,
    shift=vae.model.shift,
    vae_sha256=vae.sha256,
    label_names=names,
  )
  slot, slots = sharding.process_slot(mesh)
  place = None if mesh is None else sharding.replicated(mesh)
  encode = functools.partial(
    jax.jit(_encode, static_argnums=(0, 3)),
    vae.model,
    jax.device_put(vae.params, place),
  )
  with pipeline.eval_batches(
    batch_size, process_index=slot, process_count=slots
  ) as batches:
    results = _results(encode, batches, flips, mesh)
    if jax.process_index():
      # Takes part in gathering what the first process writes.
      collections.deque(results, maxlen=0)
      return {}
    with latents_lib.LatentWriter(out, about, num_shards) as writer:
      for batch in results:
        for i in np.flatnonzero(batch['valid']):
          index = int(batch['index'][i])
          moments = batch['moments'][i].reshape(about.record_shape)
          labels = {k: int(batch['labels'][k][i]) for k in names}
          writer.write(pipeline.source[index].id, labels, moments)
      bad = batches.stats.bad
      skipped = [{'id': k, 'reason': bad[k]} for k in sorted(bad)]
      return writer.finish(skipped)


def _latent_shape(model, shape, path) -> tuple[int, ...]:
  """Return the shape of the latents of clips [T, H, W, C]."""
  t, height, width, channels = shape
  f = model.factor
  if channels not in (1, model.channels) or height % f or width % f:
    raise ValueError(
      f'{path}.transform: expected pictures of {model.channels} (or 1) '
      f'colours whose sides {f} divides, found {tuple(shape[1:])}'
    )
  latent = (height // f, width // f, model.latent_channels)
  return latent if t == 1 else (t, *latent)


def _encode(model, params, video, flips) -> jax.Array:
  """Return moments f32 [B, V, 2, T, h, w, C] of clips uint8 [B, T, H, W, C]."""
  x = jnp.broadcast_to(video, (*video.shape[:-1], model.channels))

  def moments(frames):
    frames = frames.astype(jnp.float32) / 127.5 - 1.0
    m = model.apply({'params': params}, frames, method='encode')
    return jnp.stack([m.mean, m.std], axis=1)

  # Frame by frame: the memory does not grow with the length of a clip.
  views = [x, x[..., ::-1, :]] if flips else [x]
  frames = jnp.concatenate([jnp.moveaxis(v, 1, 0) for v in views])
  out = jax.lax.map(moments, frames)  # [V * T, B, 2, h, w, C]
  out = out.reshape(len(views), -1, *out.shape[1:])
  return jnp.moveaxis(out, (2, 0, 3, 1), (0, 1, 2, 3))


def _results(encode, batches, flips, mesh) -> Iterator[Mapping[str, Any]]:
  """Yield whole batches on the host, with a few under way."""
  queue = collections.deque()
  for batch in batches:
    if mesh is not None:
      batch = sharding.put_batch(batch, mesh)
    about = {k: batch[k] for k in ('index', 'labels', 'valid')}
    queue.append({**about, 'moments': encode(batch['video'], flips)})
    if len(queue) > _IN_FLIGHT:
      yield jax.tree.map(to_host, queue.popleft())
  for result in queue:
    yield jax.tree.map(to_host, result)
