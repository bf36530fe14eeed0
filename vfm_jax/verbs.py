"""Do what each verb but `train` does, on the latest checkpoint of a run."""

import pathlib
from collections.abc import Sequence

import jax

from vfm_jax import checkpoint, convert_dit, sharding, train
from vfm_jax import convert as convert_lib
from vfm_jax import describe as describe_lib
from vfm_jax.evals import embed as embed_lib
from vfm_jax.evals import samples as samples_lib
from vfm_jax.evals import store
from vfm_jax.experiment import Experiment
from vfm_jax.objectives.base import Samples
from vfm_jax.objectives.denoise import Denoise


def evaluate(exp: Experiment, workdir: str) -> dict[str, float]:
  """Return the metrics of every evaluator, as `evaluator/metric`.

  Raises:
    CheckpointError: the work directory holds no checkpoint of this model.
  """
  mesh = sharding.make_mesh(exp.mesh)
  with sharding.activations(mesh):
    state = exp.restore(workdir, mesh)
    return train.run_evals(exp, exp.eval_params(state), mesh)


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
  return describe_lib.describe(
    state=exp.abstract_state,
    batch=exp.batch_spec,
    mesh=mesh,
    rules=exp.rules,
    rows=exp.optimizer[1],
    step_fn=exp.train_step(),
    title=f'{exp.total_steps:,} steps of {exp.batch_size} clips',
  )


def convert(
  exp: Experiment, workdir: str, source: str, *, entry: str | None = None
) -> int:
  """Write the weights of a foreign file as the checkpoint of step 0.

  Args:
    exp: whose objective the weights are for: `Masked` takes VideoMAE files,
      `Denoise` files of DiT and SiT and folders that diffusers saved.
    workdir: where the checkpoint goes; it must hold none.
    source: `.safetensors`, `.npz` or (with the `parity` extra) torch file.
    entry: entry of a torch file with the weights, such as `ema` or `model`.

  Returns:
    The number of parameters that were set.

  Raises:
    ConversionError: a tensor is missing, left over or of another shape.
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
    params = _converted(exp, source, entry)
    state = exp.first_state(shardings).replace(
      params=jax.device_put(params, shardings.params),
      # Averages start where the parameters do, in buffers of their own.
      ema={
        key: jax.device_put(params, where)
        for key, where in shardings.ema.items()
      },
    )
    saved.save(0, state, force=True)
    saved.wait()
  return sum(x.size for x in jax.tree.leaves(params))


def _converted(exp: Experiment, source: str, entry: str | None):
  """Return the parameters of the objective, from a file or folder."""
  template = exp.abstract_state.params
  if isinstance(exp.objective, Denoise):
    if pathlib.Path(source).is_dir():
      _, state = convert_dit.read_diffusers(source)
    else:
      state = convert_lib.read_checkpoint(source, entry=entry)
    return {'denoiser': convert_dit.from_dit(state, template['denoiser'])}
  state = convert_lib.read_checkpoint(source, entry=entry)
  return convert_lib.from_videomae(state, template)
