"""Define what the loop asks of an objective.

An objective is a frozen dataclass that holds Linen modules and scalars. It is
the one extension point of the library: masked pretraining, latent prediction,
diffusion and probes are all objectives, and the loop has no branch on them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp

PyTree = Any
Batch = Mapping[str, Any]


class LossOut(flax.struct.PyTreeNode):
  """Hold the result of a loss evaluation on a (micro-)batch.

  Sums and counts, not means, so that gradient accumulation and uneven
  microbatches are exact: the loss of task k is sums[k] / counts[k] after both
  are added over the microbatches.

  Attributes:
    sums: f32 [K] loss summed over elements, one entry a task.
    counts: f32 [K] number of elements; must not depend on the parameters.
    aux: f32 [] auxiliary loss, already weighted, added after the tasks are
      combined; the mean over microbatches is taken.
    metrics: scalars to report; the mean over microbatches is taken.
    extra: the new non-gradient state.
  """

  sums: jax.Array
  counts: jax.Array
  aux: jax.Array = flax.struct.field(
    default_factory=lambda: jnp.zeros((), jnp.float32)
  )
  metrics: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
  extra: PyTree = flax.struct.field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
  """What train.py and step.py need; nothing else is ever called."""

  def init(self, rng: jax.Array, batch: Batch) -> tuple[PyTree, PyTree]:
    """Return (params, extra); called under `jax.eval_shape` and `jax.jit`."""
    ...

  def loss(
    self,
    params: PyTree,
    extra: PyTree,
    batch: Batch,
    rng: jax.Array,
    *,
    train: bool,
  ) -> LossOut:
    """Return the loss; per-example randomness is keyed by `batch['row']`."""
    ...

  def after_update(
    self,
    extra: PyTree,
    params: PyTree,
    step: jax.Array,
    metrics: Mapping[str, jax.Array],
  ) -> PyTree:
    """Return the non-gradient state after the optimizer has moved."""
    ...


@runtime_checkable
class Embeds(Protocol):
  """Optional: produce one vector a clip, for the probes and `embed`."""

  def embed(self, params: PyTree, batch: Batch) -> jax.Array:
    """Return f32 [B, D] clip embeddings."""
    ...


@runtime_checkable
class EmbedsTokens(Protocol):
  """Optional: produce all tokens of a clip, for probes that attend."""

  def tokens(self, params: PyTree, batch: Batch) -> jax.Array:
    """Return f32 [B, n, D]: all tokens, after the encoder's final norm."""
    ...


@runtime_checkable
class Denoises(Protocol):
  """Optional: what a network says about noisy samples, for the samplers."""

  def denoise(
    self,
    params: PyTree,
    x: jax.Array,
    t: jax.Array,
    y: jax.Array | None = None,
  ) -> jax.Array:
    """Return the output f32 [B, ..., C_out] of the network.

    Args:
      params: from `init`, or an average of them.
      x: f32 [B, ..., C] noisy samples.
      t: [B] times of the process that the network was trained with.
      y: int32 [B] labels; None for a network without.
    """
    ...


@runtime_checkable
class Auxiliary(Protocol):
  """Optional: score what the modules of a network sowed in a pass."""

  def __call__(
    self,
    values: Mapping[str, jax.Array],
    tau: jax.Array,
    valid: jax.Array,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Return a loss f32 [], weighted as it shall count, and its metrics.

    Args:
      values: what was sown into 'aux', by name, f32 [L, ...]: see
        `nn.transformer.stack_sown`.
      tau: int32 [B] noise levels of the examples.
      valid: f32 [B], 0 for examples that do not count.
    """
    ...


@runtime_checkable
class Holds(Protocol):
  """Optional: an `Auxiliary` that holds a result over several steps.

  It is called with `state`, too, where there is one: in training.
  """

  def init(self, values: Mapping[str, jax.Array]) -> PyTree:
    """Return the state before the first step, from the shapes of values."""
    ...

  def refresh(
    self, state: PyTree, values: Mapping[str, jax.Array], tau: jax.Array
  ) -> PyTree:
    """Return the state that a microbatch is scored with."""
    ...

  def after_update(self, state: PyTree) -> PyTree:
    """Return the state after a step."""
    ...


@runtime_checkable
class Checks(Protocol):
  """Optional: look at what comes to a host before it goes to the devices."""

  def check(self, batch: Batch) -> None:
    """Accept this host's rows of a training batch, numpy arrays.

    Raises:
      ValueError: a value is one that the compiled step could not complain of.
    """
    ...


@runtime_checkable
class Averages(Protocol):
  """Optional: keep an average in `extra`, and evaluate with it."""

  def restart(self, extra: PyTree, params: PyTree) -> PyTree:
    """Return `extra` as it is where a run starts from these parameters."""
    ...

  def evaluated(self, params: PyTree, extra: PyTree) -> PyTree:
    """Return the parameters that evaluations and embeddings use."""
    ...


@runtime_checkable
class Converts(Protocol):
  """Optional: know the layout of released files, for the `convert` verb."""

  def converted(self, state: Mapping[str, Any], template: PyTree) -> PyTree:
    """Return the parameters of a file, of the structure of the template.

    Args:
      state: its tensors by name.
      template: parameters, or their shapes.

    Raises:
      ConversionError: a tensor is missing, left over or of another shape.
    """
    ...


@runtime_checkable
class Visualises(Protocol):
  """Optional: produce pictures of what the model does."""

  def visualise(
    self, params: PyTree, extra: PyTree, batch: Batch, rng: jax.Array
  ) -> Mapping[str, jax.Array]:
    """Return named uint8 videos [B, T, H, W, 3], in display order."""
    ...


@runtime_checkable
class Samples(Protocol):
  """Optional: draw new examples, for the `sample` verb."""

  @property
  def data(self) -> str:
    """Key of the batch that is learned."""
    ...

  def check_labels(self, labels: Sequence[int] | None) -> list[int] | None:
    """Return the labels to draw: those given, or by default all there are.

    Raises:
      ValueError: one is not a label of this objective.
    """
    ...

  def sample(
    self,
    params: PyTree,
    keys: jax.Array,
    shape: tuple[int, ...],
    y: jax.Array | None,
  ) -> jax.Array:
    """Return pictures uint8 [B, T, H, W, 3], one for each key [B].

    Args:
      params: as in `loss`.
      keys: one key a sample [B].
      shape: of one example in the data.
      y: int32 [B] labels; None for none.
    """
    ...


def example_keys(rng: jax.Array, batch: Batch) -> jax.Array:
  """Return one key an example [B], from its row in the global batch.

  The same example gets the same key however the batch is split over
  microbatches, devices and hosts.
  """
  return jax.vmap(lambda row: jax.random.fold_in(rng, row))(batch['row'])


def keep_extra(
  self: Objective,
  extra: PyTree,
  params: PyTree,
  step: jax.Array,
  metrics: Mapping[str, jax.Array],
) -> PyTree:
  """Return `extra`: the `after_update` of what learns by gradients alone."""
  del self, params, step, metrics
  return extra
