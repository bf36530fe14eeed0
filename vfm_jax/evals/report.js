'use strict';
(() => {
  const tip = document.getElementById('tip');
  let current = null;

  function show(target) {
    if (current) current.classList.remove('current');
    current = target;
    tip.hidden = !target;
    if (!target) return;
    target.classList.add('current');
    tip.textContent = target.dataset.tip;
    const box = (target.querySelector('.mark, .segment') || target)
      .getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth - own.width - 8;
    const left = box.left + box.width / 2 + 10;
    const above = box.top - own.height - 8;
    tip.style.left = `${Math.max(8, Math.min(left, room))}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  }

  // Every part of a figure can be pointed at, or reached with the arrow keys
  // once the figure has the focus.
  for (const svg of document.querySelectorAll('svg.hoverable')) {
    const parts = () => [...svg.querySelectorAll('[data-tip]')].filter(
      (p) => p.getAttribute('visibility') !== 'hidden');
    svg.addEventListener('pointerover', (event) => {
      const target = event.target.closest('[data-tip]');
      if (target) show(target);
    });
    svg.addEventListener('pointerleave', () => show(null));
    svg.addEventListener('blur', () => show(null));
    svg.addEventListener('keydown', (event) => {
      const all = parts();
      const at = all.indexOf(current);
      const moves = {
        ArrowRight: at + 1, ArrowDown: at + 1,
        ArrowLeft: at < 0 ? all.length - 1 : at - 1,
        ArrowUp: at < 0 ? all.length - 1 : at - 1,
        Home: 0, End: all.length - 1,
      };
      if (event.key === 'Escape') {
        show(null);
      } else if (event.key in moves && all.length) {
        event.preventDefault();
        show(all[(moves[event.key] + all.length) % all.length]);
      }
    });
  }
  addEventListener('scroll', () => show(null), { passive: true });

  for (const legend of document.querySelectorAll('.legend')) {
    const dots = legend.parentElement.querySelectorAll('.dot');
    const buttons = legend.querySelectorAll('button');
    for (const button of buttons) {
      button.addEventListener('click', () => {
        const on = button.getAttribute('aria-pressed') !== 'true';
        for (const other of buttons) {
          other.setAttribute('aria-pressed', String(on && other === button));
        }
        for (const dot of dots) {
          const shown = !on || dot.dataset.class === button.dataset.class;
          dot.classList.toggle('dim', !shown);
        }
      });
    }
  }

  const SVG = 'http://www.w3.org/2000/svg';
  function make(name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function ticks(group, axis, [x0, y0, x1, y1], horizontal) {
    for (const [value, share] of axis.ticks) {
      const at = horizontal ? x0 + share * (x1 - x0) : y1 - share * (y1 - y0);
      group.append(horizontal
        ? make('line', { x1: at, x2: at, y1: y0, y2: y1 })
        : make('line', { x1: x0, x2: x1, y1: at, y2: at }));
      group.append(horizontal
        ? make('text', { x: at, y: y1 + 18, class: 'tick' }, value)
        : make('text', { x: x0 - 8, y: at + 4, class: 'tick end' }, value));
    }
  }

  // Put the name of each point where it covers neither points nor names.
  function label(shown, box) {
    const taken = shown.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7]);
    for (const { x, y, node } of shown) {
      const text = node.querySelector('.label');
      node.querySelector('.leader')?.remove();
      const width = text.getComputedTextLength();
      let best = null;
      for (const far of [0, 14, 28, 42]) {
        for (const [side, up] of [[1, 0], [-1, 0], [0, -1], [0, 1],
          [1, -1], [1, 1], [-1, -1], [-1, 1]]) {
          if (far && !up) continue;
          const left = side > 0 ? 11 : side < 0 ? -11 - width : -width / 2;
          const base = 4 + up * (side ? 11 : 16) + up * far;
          const area = [x + left - 1, y + base - 10,
            x + left + width + 1, y + base + 3];
          let cost = far / 4 + (side < 0 ? 0.2 : 0) + (up ? 0.4 : 0);
          if (area[0] < box[0] || area[2] > box[2] + 20) cost += 500;
          if (area[1] < box[1] - 12 || area[3] > box[3]) cost += 500;
          taken.forEach(([a, b, c, d]) => {
            const w = Math.min(area[2], c) - Math.max(area[0], a);
            const h = Math.min(area[3], d) - Math.max(area[1], b);
            if (w > 0 && h > 0) cost += 40 + w * h;
          });
          if (!best || cost < best.cost) best = { cost, left, base, area, far };
        }
      }
      text.setAttribute('x', best.left);
      text.setAttribute('y', best.base);
      taken.push(best.area);
      if (best.far) {
        const end = Math.max(best.left, Math.min(0, best.left + width));
        node.prepend(make('line', {
          class: 'leader', x1: 0, y1: 0, x2: end,
          y2: best.base + (best.base < 0 ? 3 : -10),
        }));
      }
    }
  }

  function place(figure) {
    const info = JSON.parse(
      document.getElementById(`${figure.id}-data`).textContent);
    const choice = (side) =>
      figure.querySelector(`select[data-side=${side}]`).value;
    const [x, y] = [choice('x'), choice('y')];
    const [x0, y0, x1, y1] = info.box;
    const svg = figure.querySelector('svg');
    const grid = svg.querySelector('.grid');
    grid.replaceChildren();
    ticks(grid, info.axes[x], info.box, true);
    ticks(grid, info.axes[y], info.box, false);
    svg.querySelector('.x-title').textContent = `${x}, %`;
    svg.querySelector('.y-title').textContent = `${y}, %`;
    const title = figure.querySelector('h3').textContent;
    svg.setAttribute('aria-label', `${title}: ${x} against ${y}, a point a ` +
      'model. Arrow keys go through the points; the table below has the ' +
      'numbers.');
    const shown = [];
    for (const node of svg.querySelectorAll('.point')) {
      const { label: name, ours, spots } = info.points[node.dataset.number];
      if (!(x in spots && y in spots)) {
        node.setAttribute('visibility', 'hidden');
        continue;
      }
      const at = ([value], axis) => (value - axis.low) / (axis.high - axis.low);
      const px = x0 + at(spots[x], info.axes[x]) * (x1 - x0);
      const py = y1 - at(spots[y], info.axes[y]) * (y1 - y0);
      node.removeAttribute('visibility');
      node.setAttribute('transform', `translate(${px} ${py})`);
      const reach = (spread, axis, size) =>
        spread / (axis.high - axis.low) * size;
      const wx = reach(spots[x][2], info.axes[x], x1 - x0);
      const wy = reach(spots[y][2], info.axes[y], y1 - y0);
      const wxs = node.querySelector('.wx');
      wxs.setAttribute('x1', -wx);
      wxs.setAttribute('x2', wx);
      const wys = node.querySelector('.wy');
      wys.setAttribute('y1', -wy);
      wys.setAttribute('y2', wy);
      const marks = new Set(spots[x][1] + spots[y][1]);
      node.querySelector('.label').textContent = name + [...marks].join('');
      node.dataset.tip = [name + (ours ? ' (ours)' : ''),
        ...[x, y].map((axis) => {
          const [value, mark, spread] = spots[axis];
          const more = spread ? ` ± ${spread.toFixed(2)}` : '';
          return `${axis}: ${value.toFixed(2)}${mark}${more}`;
        })].join('\n');
      shown.push({ x: px, y: py, node, ours });
    }
    // Our own models get the best places for their names.
    shown.sort((a, b) => b.ours - a.ours);
    label(shown, info.box);
  }

  const figures = [...document.querySelectorAll('.plane-figure')];
  const chooser = document.getElementById('plane-choice');
  function choose() {
    for (const figure of figures) figure.hidden = figure.id !== chooser.value;
    place(figures.find((figure) => !figure.hidden));
  }
  for (const figure of figures) {
    for (const select of figure.querySelectorAll('select')) {
      select.addEventListener('change', () => place(figure));
    }
  }
  chooser.addEventListener('change', choose);
  choose();
})();
