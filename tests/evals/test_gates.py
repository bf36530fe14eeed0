import jax
import numpy as np
import pytest

from vfm_jax.evals.base import Evaluator
from vfm_jax.evals.gates import Gates, find_usage
from vfm_jax.models import switch
from vfm_jax.models.dit import DiT
from vfm_jax.models.routing import RandomRouting, Routing
from vfm_jax.nn.adaln import Hooks
from vfm_jax.objectives.denoise import Denoise


def make(hooks):
  model = DiT(
    width=20,
    depth=2,
    heads=2,
    patch=4,
    input_size=8,
    num_classes=3,
    hooks=hooks,
  )
  return Denoise(model)


def test_masks(tmp_path):
  gates = Gates(folder=str(tmp_path / 'new'))
  assert isinstance(gates, Evaluator)
  got = gates.run(make(Hooks(mask=Routing())), {}, seed=0)
  # 16 of 20 channels: the windows share those from 4 to 15.
  assert got['unused'] == 0
  assert got['always'] == 12
  assert 0.9 < got['affinity_lag100'] < 1
  assert 'gate_entropy' not in got
  assert (tmp_path / 'new' / 'routing.png').stat().st_size > 5000
  usage = find_usage(make(Hooks(mask=Routing())), {})
  assert usage.used.shape == (1, 1000, 20)
  assert usage.affinity[0, 0] == 1
  assert usage.affinity[0, 999] == pytest.approx(12 / 16)
  usage = find_usage(make(Hooks(mask=RandomRouting())), {})
  assert usage.used.shape == (2, 1000, 20)


def test_experts(tmp_path):
  objective = make(switch.switch(4, top_k=1))
  x, zero = np.zeros((1, 8, 8, 4)), np.zeros(1, np.int32)
  shapes = jax.eval_shape(
    lambda: objective.denoiser.init(
      jax.random.key(0), x, zero * 1.0, zero, tau=zero
    )
  )['params']
  rng = np.random.default_rng(0)
  draw = lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32)  # noqa: E731
  params = {'denoiser': jax.tree.map(draw, shapes)}
  # In the first layer all levels take the second expert.
  gate = params['denoiser']['blocks_0']['mask_hook']['gate']
  gate['kernel'][:] = 0
  gate['bias'][:] = [0, 50, 0, 0]
  usage = find_usage(objective, params)
  assert usage.used.shape == usage.weight.shape == (2, 1000, 4)
  assert (usage.used.sum(-1) == 1).all()
  assert usage.used[0, :, 1].all()
  got = Gates(folder=str(tmp_path)).run(objective, params, seed=0)
  assert got['unused'] >= 3
  assert got['always'] >= 1
  assert 0.5 <= got['affinity_lag100'] <= 1
  assert 0 < got['gate_entropy'] < 0.5
  assert (tmp_path / 'routing.png').exists()


@pytest.mark.parametrize('objective', [make(Hooks()), object()])
def test_without_routing(objective):
  with pytest.raises(ValueError, match=r'denoiser\.hooks\.mask'):
    Gates().run(objective, {}, seed=0)
