"""Check how processes meet, and what they learn of each other's end."""

import concurrent.futures
import os
import socket
import threading

import pytest

from vfm_jax import rendezvous


@pytest.fixture
def address():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return f'localhost:{s.getsockname()[1]}'


_MET = []


def meet(address, count, facts, timeout_s=10.0):
  """Let the ranks of `facts` meet; return what each gets or raises."""

  def one(rank):
    try:
      company = rendezvous.meet(address, count, rank, facts[rank], timeout_s)
      _MET.append(company)
      return company
    except rendezvous.StartError as e:
      return e

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return dict(zip(facts, pool.map(one, facts), strict=True))


@pytest.fixture
def ends(monkeypatch):
  """Record what would end this process."""
  found, happened = [], threading.Event()

  def end(status):
    found.append(status)
    happened.set()

  monkeypatch.setattr(os, '_exit', end)
  yield found, happened
  # The threads that listen outlive the test, and must end nothing then.
  while _MET:
    _MET.pop()._left.set()


def test_all_meet_and_leave_in_peace(address, ends):
  company = meet(address, 3, {r: {'jax': '1'} for r in range(3)})
  for one in company.values():
    one.watch(5.0)
  for rank in (1, 0, 2):
    company[rank].leave()
  # The port is free for JAX.
  host, _, port = address.partition(':')
  socket.create_server((host, int(port))).close()
  assert not ends[0]


def test_who_differs_is_named(address):
  facts = {r: {'config': 'a = 1\nb = 2', 'jax': '0.10'} for r in range(4)}
  # Most decide, even against process 0.
  facts[0] = facts[0] | {'jax': '0.9'}
  facts[2] = facts[2] | {'config': 'a = 1\nb = 3'}
  for found in meet(address, 4, facts).values():
    assert isinstance(found, rendezvous.StartError)
    _, first, second = str(found).splitlines()
    assert first.strip().startswith('process 2 (')
    assert 'config: found b = 3; expected b = 2' in first
    assert second.strip().startswith('process 0 (')
    assert 'jax: found 0.9; expected 0.10' in second


def test_of_two_that_differ_the_first_is_right(address):
  found = meet(address, 2, {0: {'data': 'x'}, 1: {'data': ''}})
  text = 'data: found nothing more; expected x'
  assert all(text in str(e) and 'process 1' in str(e) for e in found.values())


@pytest.mark.parametrize(
  ('there', 'message'),
  [
    ((0, 2), r'missing after 0\.5 s: process 1, 3 of 4; there are process 0'),
    ((3,), r'missing after 0\.5 s: process 0 of 4; nothing answers at local'),
  ],
)
def test_who_is_missing_is_named(address, there, message):
  found = meet(address, 4, {r: {} for r in there}, timeout_s=0.5)
  for error in found.values():
    with pytest.raises(rendezvous.StartError, match=message):
      raise error


@pytest.mark.parametrize('dies', [0, 1])
def test_a_death_is_told_to_all(address, ends, capfd, dies):
  company = meet(address, 3, {r: {} for r in range(3)})
  for rank, one in company.items():
    if rank != dies:
      one.watch(5.0)
  for line in company[dies]._lines.values():  # as the system does for it
    line.socket.close()
  found, happened = ends
  assert happened.wait(5.0)
  for _ in range(50):
    if len(found) == 2:
      break
    threading.Event().wait(0.05)
  assert found[:2] == [rendezvous.LOST] * 2
  said = capfd.readouterr().err
  assert said.count(f'process {dies} (') == 2
  assert 'of 3 has died' in said


def test_an_error_is_told_with_its_text(address, ends, capfd):
  company = meet(address, 2, {0: {}, 1: {}})
  company[0].watch(5.0)
  company[1].failed(ValueError('no such video'))
  assert ends[1].wait(5.0)
  assert 'has failed with ValueError: no such video' in capfd.readouterr().err


def test_what_fails_everywhere_ends_nobody(address, ends):
  company = meet(address, 3, {r: {} for r in range(3)})
  for one in company.values():
    one.watch(5.0)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(lambda c: c.failed(ValueError('all')), company.values()))
  assert not ends[0]


def test_silence_is_death(address, ends, capfd, monkeypatch):
  monkeypatch.setattr(rendezvous, '_BEAT', 0.05)
  company = meet(address, 2, {0: {}, 1: {}})
  company[0].watch(0.3)
  company[1]._left.set()  # no sign of life
  assert ends[1].wait(5.0)
  assert 'has not been heard of for 0.3 s' in capfd.readouterr().err
