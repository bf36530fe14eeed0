"""Open the report in a real browser: it must work, alone and offline."""

import json
import os
import select
import shutil
import subprocess
import time

import pytest

from vfm_jax.evals import report
from vfm_jax.evals.report_data import (
  Confusion,
  EmbeddingMap,
  Metric,
  Results,
  Segment,
  Timeline,
)

pytestmark = pytest.mark.browser

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
NASTY = '<img src="http://nowhere.invalid/x" onerror="window.hit=1">'


class Browser:
  """Speak the DevTools protocol with a headless browser over two pipes."""

  def __init__(self, program, profile):
    from_us, self._to = os.pipe()
    self._from, to_us = os.pipe()
    wrapper = f'exec "$@" 3<&{from_us} 4>&{to_us}'
    options = [
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      '--no-first-run',
      '--disable-dev-shm-usage',
      '--remote-debugging-pipe',
      f'--user-data-dir={profile}',
    ]
    self._process = subprocess.Popen(
      ['bash', '-c', wrapper, 'bash', program, *options, 'about:blank'],
      pass_fds=(from_us, to_us),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(from_us)
    os.close(to_us)
    self._rest, self._number, self.events = b'', 0, []
    self._session = None
    targets = self.call('Target.getTargets')['targetInfos']
    page = next(t for t in targets if t['type'] == 'page')
    attached = self.call(
      'Target.attachToTarget', targetId=page['targetId'], flatten=True
    )
    self._session = attached['sessionId']

  def call(self, method, **params):
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._to, json.dumps(message).encode() + b'\0')
    while True:
      reply = self._read()
      if reply.get('id') == self._number:
        assert 'error' not in reply, reply
        return reply['result']
      self.events.append(reply)

  def _read(self, seconds=120):
    while b'\0' not in self._rest:
      ready, _, _ = select.select([self._from], [], [], seconds)
      assert ready, 'the browser does not answer'
      part = os.read(self._from, 1 << 16)
      assert part, 'the browser has ended'
      self._rest += part
    text, _, self._rest = self._rest.partition(b'\0')
    return json.loads(text)

  def open(self, url):
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')
    self.call('Page.navigate', url=url)
    while not any(e['method'] == 'Page.loadEventFired' for e in self.events):
      self.events.append(self._read())

  def js(self, expression):
    out = self.call(
      'Runtime.evaluate', expression=expression, returnByValue=True
    )
    assert 'exceptionDetails' not in out, out
    return out['result'].get('value')

  def move(self, x, y):
    self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def click(self, x, y):
    for kind in ('mousePressed', 'mouseReleased'):
      self.call(
        'Input.dispatchMouseEvent',
        type=kind, x=x, y=y, button='left', clickCount=1,
      )  # fmt: skip

  def key(self, key):
    for kind in ('keyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key)

  def complaints(self):
    """Return errors, console messages, and requests but for the page."""
    kinds = ('Runtime.exceptionThrown', 'Runtime.consoleAPICalled',
             'Log.entryAdded')  # fmt: skip
    out = [e for e in self.events if e['method'] in kinds]
    for e in self.events:
      if e['method'] == 'Network.requestWillBeSent':
        url = e['params']['request']['url']
        if not url.startswith(('file:', 'data:')):
          out.append(e)
    return out

  def requested(self):
    return [
      e['params']['request']['url']
      for e in self.events
      if e['method'] == 'Network.requestWillBeSent'
    ]

  def close(self):
    self._session = None
    os.write(self._to, b'{"id": 0, "method": "Browser.close"}\0')
    try:
      self._process.wait(20)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._to)
    os.close(self._from)


def example():
  """Return results with every kind of figure and hostile names."""

  def metric(name, value, **kwargs):
    return Metric(name, value, 'protocol', **kwargs)

  def own(model, x, y):
    return Results(
      'clips',
      model,
      (
        metric('scene', x, centric='appearance', task='knn', spread=0.05),
        metric('direction', y, centric='motion', task='knn'),
      ),
    )

  classes = ['walk', 'run', NASTY]
  ours = Results(
    'K400, attentive',
    f'ours {NASTY}',
    tuple(
      metric(name, value, task='ap', benchmark=name)
      for name, value in dict(K400=0.7, MiT=0.3, SSv2=0.5, DV48=0.4).items()
    ),
    (Confusion('probe', classes, ((5, 1, 0), (2, 7, 1), (0, 0, 3))),),
    (
      EmbeddingMap(
        'PCA',
        [(0, 0), (1, 2), (3, 1), (4, 4)],
        [0, 1, 2, 1],
        classes,
        ['v0', 'v1', NASTY, 'v3'],
      ),
    ),
    (
      Timeline(
        'film',
        20,
        (Segment(1, 9, 'walk'), Segment(8, 15, 'run')),
        (Segment(1, 8, 'walk', 0.9), Segment(9, 16, NASTY, 0.5)),
      ),
    ),
  )
  return [ours, own('p', 0.6, 0.7), own('q', 0.8, 0.5)]


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  program = next(filter(None, map(shutil.which, NAMES)), None)
  if program is None:
    pytest.skip(f'no browser: none of {", ".join(NAMES)} is on the PATH')
  folder = tmp_path_factory.mktemp('page')
  path = report.write(folder / 'report.html', example())
  browser = Browser(program, folder / 'profile')
  try:
    browser.call(
      'Emulation.setDeviceMetricsOverride',
      width=1100, height=900, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    browser.open(path.as_uri())
    yield browser
    assert not browser.complaints()
    urls = [u for u in browser.requested() if not u.startswith('data:')]
    assert urls == [path.as_uri()]
    assert browser.js('window.hit') is None
  finally:
    browser.close()


TIP = "(document.getElementById('tip').hidden ? null : tip.textContent)"


def centre(page, selector):
  """Scroll the first match into view and return its centre."""
  x, y = page.js(
    f'(() => {{ const n = document.querySelector({json.dumps(selector)});'
    "n.scrollIntoView({block: 'center'});"
    'const b = n.getBoundingClientRect();'
    'return [b.x + b.width / 2, b.y + b.height / 2]; })()'
  )
  # Scrolling hides what was pointed at: let that happen first.
  time.sleep(0.2)
  return x, y


@pytest.mark.parametrize(
  ('selector', 'says'),
  [
    ('.point.ours .mark', 'appearance (mean of K400, MiT): 50.00'),
    ('.confusion rect.wrong', 'walk taken for run: 1 of 6 (16.7 %)'),
    ('.map .dot', 'v0\nwalk'),
    ('.timeline .segment', 'walk\n1.00 – 9.00 s'),
  ],
)
def test_pointing_at_things_tells_what_they_are(page, selector, says):
  page.move(*centre(page, selector))
  assert says in page.js(TIP)
  page.move(2, 2)
  assert page.js(TIP) is None


@pytest.mark.parametrize('kind', ['plane', 'confusion', 'map', 'timeline'])
def test_arrow_keys_reach_every_part(page, kind):
  page.js(
    f"document.querySelector('figure:not([hidden]) svg.{kind}')"
    '.focus({preventScroll: false})'
  )
  time.sleep(0.2)
  parts = page.js(
    f"[...document.querySelector('figure:not([hidden]) svg.{kind}')"
    ".querySelectorAll('[data-tip]')].filter(p => "
    "p.getAttribute('visibility') !== 'hidden').map(p => p.dataset.tip)"
  )
  seen = []
  for _ in parts:
    page.key('ArrowRight')
    seen.append(page.js(TIP))
  assert seen == parts
  page.key('Home')
  assert page.js(TIP) == parts[0]
  page.key('Escape')
  assert page.js(TIP) is None


def test_planes_and_axes_can_be_chosen(page):
  choose = (
    '(node => {{ node.value = {value}; '
    "node.dispatchEvent(new Event('change')); }})"
    '(document.querySelector({selector}))'
  )
  shown = "document.querySelector('.plane-figure:not([hidden]) {}')"

  def pick(selector, value):
    page.js(
      choose.format(selector=json.dumps(selector), value=json.dumps(value))
    )

  before = page.js(shown.format('.point.ours') + ".getAttribute('transform')")
  here = page.js("document.querySelector('#plane-choice').value")
  pick(f'#{here} select[data-side=x]', 'SSv2')
  tip = page.js(shown.format('.point.ours') + '.dataset.tip')
  assert 'SSv2: 50.00' in tip
  after = page.js(shown.format('.point.ours') + ".getAttribute('transform')")
  assert after != before
  assert page.js(shown.format('.x-title') + '.textContent') == 'SSv2, %'
  # VideoPrism has no number on EK: it is not drawn at a made-up place.
  pick(f'#{here} select[data-side=x]', 'EK')
  assert page.js(
    "[...document.querySelectorAll('.plane-figure:not([hidden]) .point')]"
    ".filter(p => p.textContent.startsWith('VideoPrism'))[0]"
    ".getAttribute('visibility')"
  ) == 'hidden'  # fmt: skip
  titles = page.js(
    "[...document.querySelectorAll('#plane-choice option')]"
    '.map(o => [o.textContent, o.value])'
  )
  for title, value in titles:
    pick('#plane-choice', value)
    assert page.js(shown.format('h3') + '.textContent') == title
    names = page.js(
      "[...document.querySelectorAll('.plane-figure:not([hidden]) "
      ".point:not([visibility]) .label')].map(n => { const b = "
      'n.getBoundingClientRect(); return [b.x, b.y, b.right, b.bottom]; })'
    )
    assert len(names) >= 2
    for i, a in enumerate(names):
      for b in names[:i]:
        wide = min(a[2], b[2]) - max(a[0], b[0])
        high = min(a[3], b[3]) - max(a[1], b[1])
        # Boxes of glyphs have empty margins of some pixels.
        assert wide <= 3 or high <= 6, title
  assert titles[-1][0] == 'Our benchmarks: kNN'
  assert page.js(
    shown.format('.point .wx') + ".getAttribute('x2')"
  ) != '0'  # fmt: skip
  pick('#plane-choice', here)


def test_the_legend_singles_out_a_class(page):
  page.click(*centre(page, '.legend button'))
  dim = (
    "[...document.querySelectorAll('.dot')].map(d => "
    "d.classList.contains('dim'))"
  )
  assert page.js(dim) == [False, True, True, True]
  page.click(*centre(page, '.legend button'))
  assert page.js(dim) == [False] * 4


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_stands_out_in_both_schemes(page, scheme):
  page.call(
    'Emulation.setEmulatedMedia',
    features=[{'name': 'prefers-color-scheme', 'value': scheme}],
  )
  colours = page.js(
    '(() => { const of = (s, p) => getComputedStyle('
    'document.querySelector(s))[p].match(/[0-9.]+/g).slice(0, 3).map(Number);'
    "return [of('body', 'backgroundColor'), of('body', 'color'), "
    "of('.about', 'color'), of('a', 'color'), of('svg .label', 'fill'), "
    "of('svg .tick', 'fill'), of('.ours td', 'color')]; })()"
  )
  ground, *texts = map(luminance, colours)
  for text in texts:
    high, low = max(ground, text), min(ground, text)
    assert (high + 0.05) / (low + 0.05) >= 4.5
  assert (ground < 0.2) == (scheme == 'dark')


def luminance(rgb):
  """Return relative luminance (WCAG 2) of a colour of 0 to 255."""
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in (v / 255 for v in rgb)
  ]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_nothing_sticks_out_sideways(page):
  for width in (1100, 420):
    page.call(
      'Emulation.setDeviceMetricsOverride',
      width=width, height=900, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    wide = page.js('document.documentElement.scrollWidth')
    assert wide <= width
