"""Do what each verb but `train` does, on the latest checkpoint of a run."""

import jax

from vfm_jax import checkpoint, sharding, train
from vfm_jax import convert as convert_lib
from vfm_jax import describe as describe_lib
from vfm_jax.evals import embed as embed_lib
from vfm_jax.evals import store
from vfm_jax.experiment import Experiment


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


def convert(exp: Experiment, workdir: str, source: str) -> int:
  """Write the weights of a foreign file as the checkpoint of step 0.

  Args:
    exp: whose objective the weights are for.
    workdir: where the checkpoint goes; it must hold none.
    source: `.safetensors`, `.npz` or (with the `parity` extra) torch file.

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
    params = convert_lib.from_videomae(
      convert_lib.read_checkpoint(source), exp.abstract_state.params
    )
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
