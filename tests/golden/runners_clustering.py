"""Run the recorded clusterings of noise levels.

Each runner takes the sidecar and the arrays of a case and returns what this
library computes for every `out/` array, driven by the sidecar.
"""

import numpy as np

from vfm_jax.ops import clustering, intervals


def run_f_ant_clustering(meta: dict, arrays: dict) -> dict:
  costs = {
    name.removeprefix('in/feature/'): clustering.sequence_cost(value)
    for name, value in arrays.items()
    if name.startswith('in/feature/')
  }
  for name, value in arrays.items():
    if name.endswith('_features'):
      unit = value / np.linalg.norm(value, axis=1, keepdims=True)
      source = name.removeprefix('in/').removesuffix('_features')
      costs[source] = clustering.affinity_cost(unit @ unit.T)
  out = {}
  for source, cost in costs.items():
    for k in meta['config']['ks']:
      found = clustering.cluster(cost, k, 'official')
      out[f'out/cost/{source}/k{k}'] = found.cost
      out[f'out/last_index/{source}/k{k}'] = found.last
      out[f'out/clusters/{source}/k{k}'] = _published(found)
      out[f'out/dp_table/{source}/k{k}'] = _filled(found.table, cost)
  for name in arrays:
    if name.startswith('out/uniform/k'):
      bounds = intervals.uniform(int(name.rpartition('k')[2])).bounds
      out[name] = np.stack([bounds[:-1], bounds[1:]], axis=1)
  return out


def _published(found: clustering.Partition) -> np.ndarray:
  """Return the first and the last step of each cluster, as published.

  The last step of the last one is 1000, of however many there are.
  """
  first, last = np.append(0, found.last), np.append(found.last - 1, 1000)
  return np.stack([first, last], axis=1)


def _filled(table: np.ndarray, cost: np.ndarray) -> np.ndarray:
  """Return the table with what the published one holds where it is not used.

  Entries of fewer positions than cuts are what it starts from: 0 for a
  sequence, infinite for affinities. Infinities are recorded as -1e30.
  """
  unused = np.triu(np.ones(table.shape, bool), 1)
  start = np.inf if cost[0, 0] < 0 else 0.0
  table = np.where(unused, start, table)
  return np.where(np.isinf(table), -1e30, table)
