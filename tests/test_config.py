"""Check that recipes are complete, strict and reproducible as text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import pytest

from vfm_jax import config
from vfm_jax.config import ConfigError, bind, ref


def scale(x, *, factor: float = 2.0, mode: Literal['up', 'down'] = 'up'):
  return x * factor if mode == 'up' else x / factor


@dataclasses.dataclass(frozen=True)
class Part:
  width: int = 4
  rate: float | None = None

  def __post_init__(self):
    if self.width < 0:
      raise ValueError(f'width={self.width} is negative')


@dataclasses.dataclass(frozen=True)
class Whole:
  part: Part
  count: int
  fn: Callable = scale
  spare: Part = Part(3)
  named: Mapping[str, Part] = dataclasses.field(default_factory=dict)
  shape: tuple[int, int] = (1, 2)


class Layer(nn.Module):
  features: int
  use_bias: bool = True


# Importlib-mode tests cannot be imported by name: make these reachable.
@pytest.fixture(autouse=True)
def importable(monkeypatch):
  import sys
  import types

  module = types.ModuleType('recipe_parts')
  for thing in (scale, Part, Whole, Layer):
    setattr(module, thing.__name__, thing)
    monkeypatch.setattr(thing, '__module__', 'recipe_parts')
  monkeypatch.setitem(sys.modules, 'recipe_parts', module)


def whole(**kwargs):
  return ref(Whole, **{'part': ref(Part, width=2), 'count': 4, **kwargs})


def test_build_makes_the_objects_that_the_text_names():
  built = config.build(
    whole(fn=bind(scale, factor=3.0), named=dict(a=ref(Part, width=7)))
  )
  assert built.part == Part(2)
  assert built.spare == Part(3)
  assert built.named == {'a': Part(7)}
  assert built.fn(2.0) == 6.0


def test_defaults_are_filled_in_and_open_to_overrides():
  c = whole()
  c.fn.factor = 5.0
  c.part.rate = 0.5
  c.shape = (3, 4)
  built = config.build(c)
  assert built.fn(1.0) == 5.0
  assert built.part.rate == 0.5
  assert built.shape == (3, 4)


def test_functions_and_dataclasses_may_stand_for_their_nodes():
  assert config.to_text(whole(fn=scale, spare=Part(5))) == config.to_text(
    whole(fn=bind(scale), spare=ref(Part, width=5))
  )


def test_linen_modules_do_not_show_their_own_fields():
  c = ref(Layer, features=3)
  assert set(c) == {'_ref', 'features', 'use_bias'}
  assert config.build(c).features == 3


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: ref(Part, widht=2), "takes no 'widht'; did you mean width"),
    (lambda: bind(scale, facto=1.0), 'did you mean factor'),
    (lambda: ref(Part, width=1.5), 'config.width: expected int, found 1.5'),
    (lambda: ref(Part, width=True), 'expected int, found True'),
    (lambda: ref(Part, width=None), 'expected int, found None'),
    (lambda: bind(scale, mode='side'), "found 'side'"),
    (lambda: ref(Whole, count=1), 'Whole needs part'),
    (lambda: bind(lambda x: x), 'module-level'),
  ],
)
def test_mistakes_are_refused_where_they_are_written(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_int_is_taken_for_float():
  assert config.build(bind(scale, factor=3))(2) == 6


def test_later_mistakes_are_refused_with_their_path():
  c = whole()
  c.part.unlock()
  c.part.depth = 3
  with pytest.raises(ConfigError, match=r'config\.part\.depth: Part takes no'):
    config.build(c)


def test_errors_of_constructors_name_the_path():
  c = whole()
  c.part.width = -1
  with pytest.raises(ConfigError, match=r'config\.part: .*width=-1 is neg'):
    config.build(c)


def test_fingerprint_follows_every_value():
  one, two, three = whole(), whole(), whole(count=5)
  assert config.fingerprint(one) == config.fingerprint(two)
  assert config.fingerprint(one) != config.fingerprint(three)
  two.spare.width = 9
  assert config.fingerprint(one) != config.fingerprint(two)


def test_text_is_one_override_a_line():
  assert 'fn.factor = 2.0\n' in config.to_text(whole())
  assert "part._ref = 'recipe_parts:Part'\n" in config.to_text(whole())


def test_load_names_near_recipes(tmp_path):
  (tmp_path / 'masked.py').write_text('x = 1\n')
  with pytest.raises(ConfigError, match=r'did you mean masked\.py'):
    config.load(str(tmp_path / 'maskd.py'))
  with pytest.raises(ConfigError, match='no function get_config'):
    config.load(str(tmp_path / 'masked.py'))


def test_unknown_variant_lists_the_known():
  with pytest.raises(ConfigError, match=':gpu1'):
    config.variant('gpu2', {'': 1, 'gpu1': 2})
