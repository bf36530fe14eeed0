"""Do what each verb but `train` does, on the latest checkpoint of a run."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from vfm_jax import (
  ahead,
  ahead_text,
  checkpoint,
  convert_dit,
  convert_dmp,
  convert_vae,
  convert_vjepa,
  hlo_cost,
  kernel_cycles,
  sharding,
  topology,
  train,
)
from vfm_jax import convert as convert_lib
from vfm_jax import describe as describe_lib
from vfm_jax import export as export_lib
from vfm_jax import step as step_lib
from vfm_jax import verify as verify_lib
from vfm_jax.data import latents as latents_lib
from vfm_jax.evals import embed as embed_lib
from vfm_jax.evals import samples as samples_lib
from vfm_jax.evals import store
from vfm_jax.evals.base import to_host
from vfm_jax.experiment import Experiment
from vfm_jax.latents import write_latents
from vfm_jax.objectives.base import Converts, Samples
from vfm_jax.objectives.denoise import Denoise
from vfm_jax.objectives.encode import Encoder
from vfm_jax.objectives.latent import LatentPrediction
from vfm_jax.objectives.masked import Masked
from vfm_jax.ops import attention_table


def evaluate(exp: Experiment, workdir: str) -> dict[str, float]:
  """Return the metrics of every evaluator, as `evaluator/metric`.

  Raises:
    CheckpointError: the work directory holds no checkpoint of this model.
  """
  mesh = sharding.make_mesh(exp.mesh)
  with sharding.activations(mesh):
    state = exp.restore(workdir, mesh)
    return train.run_evals(exp, exp.eval_params(state), mesh, workdir)


def embed(
  exp: Experiment,
  workdir: str,
  *,
  dataset: str,
  sampling: store.Sampling = 'uniform',
  annotation: str | None = None,
) -> dict[str, int]:
  """Write the embeddings of each split of `exp.embed` to `workdir/embeddings`.

  Returns:
    The number of videos written, by split.

  Raises:
    ValueError: the recipe names no split to embed.
    CheckpointError: the work directory holds no checkpoint of this model.
  """
  if not exp.embed:
    raise ValueError(
      'config.embed is empty: give it the pipelines to embed, by split, as in '
      'embed=dict(train=ref(Pipeline, ...), val=ref(Pipeline, ...))'
    )
  mesh = sharding.make_mesh(exp.mesh)
  with sharding.activations(mesh):
    params = exp.eval_params(exp.restore(workdir, mesh))
    return {
      split: embed_lib.write_embeddings(
        exp.objective,
        params,
        pipeline,
        f'{workdir}/embeddings',
        dataset,
        split,
        sampling=sampling,
        annotation=annotation,
        batch_size=exp.batch_size,
        mesh=mesh,
      )
      for split, pipeline in exp.embed.items()
    }


def latents(
  exp: Experiment,
  workdir: str,
  vae: str,
  *,
  batch_size: int | None = None,
  num_shards: int = 1,
  flips: bool = True,
  dtype: latents_lib.Dtype = 'float16',
) -> dict[str, int]:
  """Encode each split of `exp.latents` into `workdir/latents/<split>`.

  Args:
    exp: whose `latents` are encoded.
    workdir: where they go.
    vae: folder of the autoencoder, see `convert_vae.load`.
    batch_size: examples encoded at a time; that of the run by default.
    num_shards: number of files of a split.
    flips: also encode the mirror images.
    dtype: of the stored moments.

  Returns:
    The number of examples written, by split; {} on all processes but the first.

  Raises:
    ConversionError: the folder holds no such autoencoder.
    ValueError: the recipe names no split, or one cannot be encoded.
    FileExistsError: a split is there already.
  """
  if not exp.latents:
    raise ValueError(
      'config.latents is empty: give it the pipelines to encode, by split, as '
      'in latents=dict(train=ref(Pipeline, ...), val=ref(Pipeline, ...))'
    )
  loaded = convert_vae.load(vae)
  mesh = sharding.make_mesh(exp.mesh)
  written = {}
  for split, pipeline in exp.latents.items():
    manifest = write_latents(
      loaded,
      pipeline,
      f'{workdir}/latents/{split}',
      batch_size=batch_size or exp.batch_size,
      num_shards=num_shards,
      flips=flips,
      dtype=dtype,
      mesh=mesh,
    )
    if manifest:
      written[split] = manifest['count']
  return written


def sample(
  exp: Experiment,
  workdir: str,
  *,
  count: int = 64,
  labels: Sequence[int] | None = None,
) -> dict[str, pathlib.Path]:
  """Draw samples from the latest checkpoint into `workdir/samples`.

  Args:
    exp: whose objective draws.
    workdir: of the run.
    count: number of samples.
    labels: sample i takes label i % len(labels); all labels of the objective
      in turn by default.

  Returns:
    The files written, see `evals.samples.save_samples`.

  Raises:
    ValueError: the objective draws no samples, or has no such label.
    CheckpointError: the work directory holds no checkpoint of this model.
  """
  objective = exp.objective
  if not isinstance(objective, Samples):
    raise ValueError(
      f'config.objective: {type(objective).__name__} draws no samples; the '
      '`sample` verb is for objectives such as Denoise'
    )
  labels = objective.check_labels(labels)
  mesh = sharding.make_mesh(exp.mesh)
  with sharding.activations(mesh):
    state = exp.restore(workdir, mesh)
    drawn = samples_lib.draw_samples(
      objective,
      exp.eval_params(state),
      exp.batch_spec[objective.data].shape[1:],
      labels,
      count=count,
      seed=exp.seed,
      batch_size=exp.batch_size,
      mesh=mesh,
    )
  return samples_lib.save_samples(
    drawn, labels, f'{workdir}/samples', f'step_{int(state.step)}'
  )


def describe(
  exp: Experiment, num_devices: int | None = None
) -> describe_lib.Description:
  """Describe what a run would do on any number of devices, without them.

  Raises:
    ShardingError: the mesh or a parameter does not divide.
  """
  mesh = exp.mesh.sizes(num_devices or jax.device_count())
  title = f'{exp.total_steps:,} steps of {exp.batch_size} clips'
  objective, step = exp.objective, exp.train_step()
  if isinstance(objective, Encoder):
    # It takes no step: what there is to count is an embedding.
    title = f'embeddings of {exp.batch_size} clips at a time'
    step = lambda state, batch: objective.embed(state.params, batch)  # noqa: E731
  with attention_table.recorded() as calls:
    found = describe_lib.describe(
      state=exp.abstract_state,
      batch=exp.batch_spec,
      mesh=mesh,
      rules=exp.rules,
      rows=exp.optimizer[1],
      teachers=exp.teacher_spec,
      step_fn=step,
      title=title,
    )
  return _with_attention(found, calls)


def describe_ahead(
  exp: Experiment,
  target: str,
  *,
  schedules: str | None = None,
  with_levers: bool = False,
) -> describe_lib.Description:
  """Describe the step that a compiler makes for a machine that is not here.

  Args:
    exp: whose step is compiled.
    target: the machine, as in 'v5e:16x16'; see `topology.parse`.
    schedules: table of the cycles of kernels, see `kernel_cycles`.
    with_levers: see `ahead.analyse`.

  Raises:
    TopologyError: the target is unknown, or its compiler is not installed.
    ShardingError: the mesh or a parameter does not divide.
    OSError: the table cannot be read.
  """
  machine = topology.parse(target)
  cycles = hlo_cost.unknown
  if schedules is not None:
    cycles = kernel_cycles.load(schedules, machine)
  with attention_table.recorded() as calls:
    data = ahead.analyse(exp, machine, cycles, with_levers=with_levers)
  found = describe_lib.Description(ahead_text.text(data), data)
  return _with_attention(found, calls)


def _with_attention(
  found: describe_lib.Description, calls: Iterable[attention_table.Resolved]
) -> describe_lib.Description:
  """Add which implementation of attention runs where."""
  text = f'{found.text}\n{attention_table.table(calls)}'
  return dataclasses.replace(found, text=text)


class Converted(NamedTuple):
  """Say what `convert` read.

  Attributes:
    num_params: number of parameters that were set.
    entry: entry of a torch file that they are from; None for the file itself.
    checks: what was verified; empty if nothing was asked for.
  """

  num_params: int
  entry: str | None
  checks: tuple[verify_lib.Check, ...] = ()


def convert(
  exp: Experiment,
  workdir: str,
  source: str,
  *,
  entry: str | None = None,
  verify: bool = False,
) -> Converted:
  """Write the weights of a foreign file as the checkpoint of step 0.

  Args:
    exp: whose objective the weights are for: `Encoder` takes files of its
      reader, `Masked` those of VideoMAE, `LatentPrediction` those of V-JEPA,
      `Distill` those of UMT, `Denoise` files of DiT, SiT and, with its hooks,
      DMP, and folders that diffusers saved.
    workdir: where the checkpoint goes; it must hold none.
    source: `.safetensors`, `.npz` or torch file.
    entry: entry of a torch file with the weights, such as `ema` or `model`.
    verify: check the result, see `vfm_jax.verify`; what fails is not kept.

  Raises:
    VerificationError: what was written is not what was read, or embeds
      nothing of use.
    ConversionError: a tensor is missing, left over or of another shape, or no
      file of this objective is known.
    CheckpointError: the work directory holds a checkpoint already.
  """
  mesh = sharding.make_mesh(exp.mesh)
  shardings = exp.shardings(mesh)
  with exp.checkpointer(workdir) as saved:
    if saved.latest_step() is not None:
      raise checkpoint.CheckpointError(
        f'{workdir}/checkpoints holds step {saved.latest_step()} already; '
        'change --workdir'
      )
    with convert_lib.recorded() as usage:
      made, entry, names = _converted(exp, source, entry)
    params = {name: made[name] for name in exp.abstract_state.params}
    checks = []
    if verify:
      checks = verify_lib.check_weights(exp.objective, params, names, usage)
      verify_lib.require(checks)
    state = exp.first_state(shardings)
    # Of an objective that averages, a file also holds the average.
    extra = {k: x for k, x in made.items() if k not in params}
    state = state.replace(
      params=jax.device_put(params, shardings.params),
      extra=jax.device_put(extra, shardings.extra) if extra else state.extra,
      # Averages start where the parameters do, in buffers of their own.
      ema={
        key: jax.device_put(params, where)
        for key, where in shardings.ema.items()
      },
    )
    saved.save(0, state, force=True)
    saved.wait()
  if verify:
    checks += verify_lib.check_checkpoint(exp, workdir, params, mesh)
    if jax.process_index() == 0 and not all(c.passed for c in checks):
      shutil.rmtree(f'{workdir}/checkpoints')
    verify_lib.require(checks)
  count = sum(x.size for x in jax.tree.leaves(params))
  return Converted(count, entry, tuple(checks))


def _converted(exp: Experiment, source: str, entry: str | None):
  """Return the objective's parameters, their entry, and the tensors' names.

  An average that the file holds is among the parameters.
  """
  template = exp.abstract_state.params
  folder = pathlib.Path(source).is_dir()
  if folder and entry is not None:
    raise ValueError(
      f'expected a torch file to read the entry {entry!r} of, found the folder '
      f'{source}; leave --entry out'
    )
  if isinstance(exp.objective, Denoise):
    if folder:
      _, state = convert_dit.read_diffusers(source)
    else:
      entry, state = convert_lib.read_entry(source, entry=entry)
    model: Any = exp.objective.denoiser
    patched = convert_dmp.patched(model)
    read = convert_dmp.from_dmp if patched else convert_dit.from_dit
    params = read(state, template['denoiser'], model=model)
    return {'denoiser': params}, entry, list(state)
  if isinstance(exp.objective, LatentPrediction):
    if entry is None:
      state = convert_vjepa.read(source)
    else:
      _, state = convert_lib.read_entry(source, entry=entry)
    template = {**template, **exp.abstract_state.extra}
    return exp.objective.converted(state, template), entry, list(state)
  if isinstance(exp.objective, Converts):
    entry, state = convert_lib.read_entry(source, entry=entry)
    return exp.objective.converted(state, template), entry, list(state)
  if not isinstance(exp.objective, Masked):
    raise convert_lib.ConversionError(
      'config.objective: expected one whose released files `convert` knows, '
      f'Encoder, Masked, LatentPrediction, Distill or Denoise, found '
      f'{type(exp.objective).__name__}; give a recipe of one network'
    )
  entry, state = convert_lib.read_entry(source, entry=entry)
  return convert_lib.from_videomae(state, template), entry, list(state)


class Exported(NamedTuple):
  """Say what `export` wrote.

  Attributes:
    path: file, or folder, that holds it.
    weights: `params`, or `ema/<decay>` for an average.
    step: of the checkpoint.
    num_tensors: number of tensors.
    num_values: number of numbers in them.
  """

  path: pathlib.Path
  weights: str
  step: int
  num_tensors: int
  num_values: int


def export(
  exp: Experiment,
  workdir: str,
  out: str | None = None,
  *,
  weights: str | None = None,
  layout: export_lib.Format = 'released',
) -> Exported:
  """Write the weights of the latest checkpoint in a layout others read.

  Args:
    exp: whose objective the weights are of; see `export.write`.
    workdir: of the run.
    out: file, or folder for `diffusers`; by default one in `workdir/export`
      that is named after the step and the weights.
    weights: `params`, or `ema/<decay>` for an average; by default those that
      evaluations use.
    layout: names of the tensors: those of the released models, or `diffusers`.

  Raises:
    ValueError: no such average is kept.
    ConversionError: the layout has no place for the objective or a parameter.
    CheckpointError: the work directory holds no checkpoint of this model.
  """
  averages = [f'ema/{step_lib.ema_key(decay)}' for decay in exp.ema]
  if weights is None:
    decay = exp.eval_ema
    weights = 'params' if decay is None else f'ema/{step_lib.ema_key(decay)}'
  if weights not in ('params', *averages):
    raise ValueError(
      f'--weights: expected one of {["params", *averages]}, as config.ema '
      f'says, found {weights!r}'
    )
  mesh = sharding.make_mesh(exp.mesh)
  with sharding.activations(mesh):
    state = exp.restore(workdir, mesh)
  params = state.params
  if weights != 'params':
    params = state.ema[weights.removeprefix('ema/')]
  step = int(state.step)
  if out is None:
    name = f'step_{step}-{weights.replace("/", "_")}'
    suffix = '' if layout == 'diffusers' else '.safetensors'
    out = f'{workdir}/export/{name}{suffix}'
  tensors = export_lib.write(
    exp.objective, jax.tree.map(to_host, params), out, layout=layout
  )
  return Exported(
    pathlib.Path(out),
    weights,
    step,
    len(tensors),
    sum(x.size for x in tensors.values()),
  )
