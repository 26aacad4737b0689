// Two columns against each other, with a box that leads to triage.

import { button, check, counted, fill, h, number, refocused, select } from './dom.js';
import { legend } from './parts.js';
import { scatter } from './scatter.js';

/** @typedef {import('./app.js').Context} Context */

/** @param {Context} context */
export function columnsAgainst(context) {
  const { audit } = context;
  const names = [...audit.columns.values()]
    .filter(({ kind, name }) => kind !== 'text' && kind !== 'bool' && name !== 'index')
    .map(({ name }) => name);
  if (names.length < 2) return null;
  const first = (/** @type {string[]} */ ...wanted) => wanted.find((name) => names.includes(name)) ?? names[0];
  const state = (context.kept.scatter ??= {
    x: first('prob_margin', 'aum', 'loss_mean'),
    y: first('self_influence', 'tracin', 'suspicion'),
    logX: false,
    logY: names.includes('self_influence'),
    box: null,
  });
  const drawing = h('div', { class: 'drawing' });
  const outcome = h('div', { class: 'controls' });
  const controls = h('div', { class: 'controls' });

  function chosen() {
    const { box } = state;
    if (!box) return [];
    const [x, y] = [audit.values(state.x) ?? [], audit.values(state.y) ?? []];
    const rows = [];
    for (let row = 0; row < audit.n; row += 1) {
      if (x[row] >= box.x0 && x[row] <= box.x1 && y[row] >= box.y0 && y[row] <= box.y1) rows.push(row);
    }
    return rows;
  }

  function tell() {
    const rows = chosen();
    const told = `${state.x} ${number(state.box?.x0)} to ${number(state.box?.x1)}, ${state.y} ${number(state.box?.y0)} to ${number(state.box?.y1)}`;
    const open = () => {
      Object.assign(context.triage.asked, {
        chosen: { rows: new Set(rows), told },
        given: null,
        suggested: null,
        text: '',
      });
      context.go('triage');
    };
    outcome.replaceChildren(
      ...['x0', 'x1', 'y0', 'y1'].map((end) => bound(end)),
      ...(state.box
        ? [button(`Look at ${counted(rows.length, 'example')}`, open, { class: 'primary', disabled: !rows.length })]
        : [h('span', { class: 'muted' }, 'draw a box, or type its ends, to choose examples')]),
    );
  }

  /** @param {string} end */
  function bound(end) {
    const title = { x0: `${state.x} from`, x1: 'to', y0: `${state.y} from`, y1: 'to' }[end];
    const input = h('input', {
      type: 'number',
      step: 'any',
      'aria-label': `${end[0] === 'x' ? state.x : state.y} ${end[1] === '0' ? 'from' : 'to'}`,
      on: {
        change: () => {
          const all = { x0: -Infinity, x1: Infinity, y0: -Infinity, y1: Infinity };
          const ends = { ...all, ...state.box };
          ends[/** @type {'x0'} */ (end)] = input.value === '' ? all[/** @type {'x0'} */ (end)] : Number(input.value);
          state.box = ends;
          draw();
        },
      },
    });
    const value = state.box?.[end];
    if (Number.isFinite(value)) input.value = String(Number(value.toPrecision(4)));
    return h('label', { class: 'field' }, h('span', {}, title), input);
  }

  const draw = () => refocused(section, redraw);

  function redraw() {
    const set = (/** @type {Record<string, any>} */ change) => {
      Object.assign(state, change, { box: null });
      draw();
    };
    const options = names.map((name) => /** @type {[string, string]} */ ([name, name.replaceAll('_', ' ')]));
    fill(
      controls,
      select('across', options, state.x, (x) => set({ x })),
      check('log', state.logX, (logX) => set({ logX })),
      select('up', options, state.y, (y) => set({ y })),
      check('log', state.logY, (logY) => set({ logY })),
      legend('examples', 'candidates'),
    );
    const points = {
      x: audit.values(state.x) ?? [],
      y: audit.values(state.y) ?? [],
      marked: (/** @type {number} */ row) => Boolean(audit.candidate[row]),
      xName: state.x,
      yName: state.y,
      logX: state.logX,
      logY: state.logY,
    };
    const onBox = (/** @type {import('./scatter.js').Box | null} */ box) => {
      state.box = box;
      tell();
    };
    drawing.replaceChildren(
      scatter(points, { label: `scatter of ${state.y} against ${state.x}`, onBox, box: state.box }),
    );
    tell();
  }

  const section = h('section', {}, h('h2', {}, 'Two columns'), controls, drawing, outcome);
  redraw();
  return section;
}
