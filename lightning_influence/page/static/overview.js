// What an audit found as a whole: figures, notes, and how its scores are spread.

import { binned, histogram } from './charts.js';
import { button, check, counted, fill, fitted, h, refocused, select } from './dom.js';
import { legend } from './parts.js';

/** @typedef {import('./app.js').Context} Context */

/**
 * @param {Context} context
 * @returns {import('./app.js').View}
 */
export function overview(context) {
  const { audit } = context;
  const element = h(
    'div',
    { class: 'page overview' },
    unfinished(audit),
    h('div', { class: 'cards' }, audit.cards.map(card)),
    next(context),
    spread(context),
    audit.notes.length > 0 &&
      h(
        'section',
        {},
        h('h2', {}, 'Notes'),
        h(
          'ul',
          { class: 'notes' },
          audit.notes.map((note) => h('li', {}, note)),
        ),
      ),
  );
  return { element };
}

/** @param {{ title: string, value: string, note: string }} about */
function card({ title, value, note }) {
  return h(
    'div',
    { class: 'card' },
    h('h3', {}, title),
    h('p', { class: 'value' }, value),
    note && h('p', { class: 'note' }, note),
  );
}

/** @param {import('./audit.js').Audit} audit */
function unfinished(audit) {
  if (audit.status === 'complete') return null;
  const epochs =
    audit.done === null
      ? 'what is recorded so far'
      : `${counted(audit.done, 'epoch')} recorded${audit.planned ? ` of ${audit.planned}` : ''}`;
  const told =
    audit.status === 'recording'
      ? `Training goes on: ${epochs}. Ranking, candidates, influence scores and queries come at its end; this page looks for them by itself.`
      : `Training was interrupted: ${epochs}. What needs the end of training is missing: ranking, influence scores and queries.`;
  return h('p', { class: 'banner', role: 'status' }, told);
}

/** @param {Context} context */
function next({ audit, decisions, go }) {
  const total = audit.candidates;
  if (!audit.n) return null;
  const told = decisions.count
    ? `${decisions.count.toLocaleString('en')} decided so far.`
    : audit.columns.has('suspicion')
      ? 'The most suspicious come first.'
      : 'What is recorded so far, example by example.';
  return h(
    'p',
    { class: 'next' },
    button(`Look at ${total ? counted(total, 'candidate') : counted(audit.n, 'example')}`, () => go('triage'), {
      class: 'primary',
    }),
    h('span', { class: 'muted' }, told),
  );
}

/** @param {Context} context */
function spread(context) {
  const { audit } = context;
  const numeric = [...audit.columns.values()].filter(
    ({ kind, name }) => kind === 'float' || name === 'rank' || name === 'times_seen',
  );
  const over = historyNames(audit);
  const names = [...numeric.map(({ name }) => name), ...over.filter((name) => !audit.columns.has(name))];
  if (!names.length) return null;
  const wanted = audit.status === 'recording' ? over : ['self_influence', 'suspicion', 'loss_mean'];
  const start = [...wanted, ...names].find((name) => names.includes(name)) ?? names[0];
  const state = (context.kept.spread ??= {
    name: start,
    logX: start === 'self_influence',
    logY: true,
    given: '',
    epoch: -1,
    over: false,
  });
  const box = h('div', { class: 'drawing' });
  const controls = h('div', { class: 'controls' });

  function draw() {
    refocused(controls, () => fill(controls, tools()));
    fill(box, state.over ? byEpoch(audit, state) : asItIs(audit, state));
  }

  function tools() {
    const set = (/** @type {Record<string, any>} */ change) => {
      Object.assign(state, change);
      draw();
    };
    const classes = audit.classes.map((label) => /** @type {[string, string]} */ ([String(label), audit.label(label)]));
    const history = over.includes(state.name);
    if (history && !audit.columns.has(state.name)) state.over = true;
    if (!history) state.over = false;
    return [
      select(
        'column',
        names.map((name) => [name, name.replaceAll('_', ' ')]),
        state.name,
        (name) => set({ name }),
      ),
      ...(state.over ? [] : [check('log values', state.logX, (logX) => set({ logX }))]),
      check('log counts', state.logY, (logY) => set({ logY })),
      ...(audit.columns.has('label') && (!state.over || audit.curves?.rows === null)
        ? [select('class', [['', 'all'], ...classes], state.given, (given) => set({ given }))]
        : []),
      ...(history && audit.columns.has(state.name)
        ? [check('over the epochs', state.over, (value) => set({ over: value }))]
        : []),
      ...(state.over ? [slider(audit, state, draw)] : []),
    ];
  }

  draw();
  return h(
    'section',
    { class: 'spread' },
    h('h2', {}, 'Scores'),
    controls,
    box,
    legend('examples', 'candidates among them'),
  );
}

/** @param {import('./audit.js').Audit} audit */
function historyNames(audit) {
  return [...new Set(audit.histories.map((/** @type {any} */ each) => String(each.column)))];
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {any} state
 */
function asItIs(audit, state) {
  const column = audit.columns.get(state.name);
  const given = audit.values('label');
  const inside = (/** @type {number} */ row) => state.given === '' || given?.[row] === Number(state.given);
  const bins = binned(column?.values ?? [], inside, (row) => Boolean(audit.candidate[row]), state.logX);
  const meaning = h(
    'p',
    { class: 'muted' },
    column?.meaning ?? '',
    column?.direction ? `; ${column.direction} is suspicious` : '',
  );
  if (!bins.counts.length)
    return [
      meaning,
      h(
        'p',
        { class: 'nothing' },
        state.logX ? 'no value is positive: see them without the logarithm' : 'no value is known',
      ),
    ];
  const label = `histogram of ${state.name}`;
  const left =
    bins.left > 0 &&
    h(
      'p',
      { class: 'muted' },
      `${counted(bins.left, 'example')} without ${state.logX ? 'a positive' : 'a finite'} value`,
    );
  return [meaning, fitted(250, (width) => histogram(bins, { label, logX: state.logX, logY: state.logY, width })), left];
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {any} state
 */
function ofColumn(audit, state) {
  return audit.histories.filter((/** @type {any} */ each) => each.column === state.name);
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {any} state
 */
function byEpoch(audit, state) {
  const all = ofColumn(audit, state);
  const one = all.find((/** @type {any} */ each) => each.epoch === state.epoch) ?? all[all.length - 1];
  const shown = state.given === '' ? all : all.map((/** @type {any} */ each) => ofClass(audit, each, state.given));
  const highest = Math.max(...shown.flatMap((/** @type {any} */ each) => each.counts));
  const label = `histogram of ${state.name} in epoch ${one.epoch}`;
  return [
    h('p', { class: 'muted' }, `${state.name.replaceAll('_', ' ')} as training saw it in epoch ${one.epoch}`),
    fitted(250, (width) => histogram(shown[all.indexOf(one)], { label, logY: state.logY, highest, width })),
  ];
}

/**
 * The histogram of an epoch for a class alone; this needs the curves of all examples.
 * @param {import('./audit.js').Audit} audit
 * @param {any} whole
 * @param {string} given
 */
function ofClass(audit, { column, epoch, edges }, given) {
  const [counts, candidates] = [new Array(edges.length - 1).fill(0), new Array(edges.length - 1).fill(0)];
  const place = audit.curves?.epochs.indexOf(epoch) ?? -1;
  const share = counts.length / (edges[counts.length] - edges[0]);
  for (let row = 0; row < audit.n; row += 1) {
    const value = audit.curve(column, row)?.[place] ?? NaN;
    if (audit.given(row) !== Number(given) || !Number.isFinite(value)) continue;
    const bin = Math.max(0, Math.min(counts.length - 1, Math.floor((value - edges[0]) * share)));
    counts[bin] += 1;
    if (audit.candidate[row]) candidates[bin] += 1;
  }
  return { edges, counts, candidates };
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {any} state
 * @param {() => void} draw
 */
function slider(audit, state, draw) {
  const epochs = ofColumn(audit, state).map((/** @type {any} */ each) => each.epoch);
  const at = epochs.includes(state.epoch) ? epochs.indexOf(state.epoch) : epochs.length - 1;
  const told = h('output', {}, `epoch ${epochs[at]}`);
  const input = h('input', {
    type: 'range',
    min: 0,
    max: epochs.length - 1,
    value: at,
    'aria-label': 'epoch',
    on: {
      input: () => {
        state.epoch = epochs[Number(input.value)];
        draw();
      },
    },
  });
  return h('label', { class: 'field' }, told, input);
}
