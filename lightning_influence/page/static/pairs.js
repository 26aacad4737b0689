// Which classes are taken for which: a matrix that leads to triage.

import { button, counted, h, number, select } from './dom.js';
import { meter } from './parts.js';
import { columnsAgainst } from './two_columns.js';

/** @typedef {import('./app.js').Context} Context */

const MOST = 24; // classes of a matrix
const LISTED = 8; // pairs beside it

/**
 * @param {Context} context
 * @returns {import('./app.js').View}
 */
export function classPairs(context) {
  return { element: h('div', { class: 'page pairs' }, matrix(context), columnsAgainst(context)) };
}

/**
 * How many labels of a class are likely of another: as the audit estimates it, or the candidates counted.
 * @param {import('./audit.js').Audit} audit
 */
function flows(audit) {
  const { classes } = audit;
  const place = new Map(classes.map((label, k) => [label, k]));
  const zero = () => classes.map(() => new Float64Array(classes.length));
  const candidates = zero();
  for (let row = 0; row < audit.n; row += 1) {
    const [a, b] = [place.get(audit.given(row)), place.get(audit.suggested(row))];
    if (audit.candidate[row] && a !== undefined && b !== undefined && a !== b) candidates[a][b] += 1;
  }
  const joint = audit.labels?.joint;
  if (!joint) return { candidates, estimated: null };
  const estimated = zero();
  /** @type {number[]} */
  const names = audit.labels.classes;
  names.forEach((given, i) =>
    names.forEach((other, j) => {
      const [a, b] = [place.get(given), place.get(other)];
      if (a !== undefined && b !== undefined && a !== b) estimated[a][b] = joint[i][j] ?? 0;
    }),
  );
  return { candidates, estimated };
}

/** @param {Context} context */
function matrix(context) {
  const { audit, kept } = context;
  if (audit.classes.length < 2 || !audit.columns.has('suggested')) {
    const told =
      audit.status === 'recording'
        ? 'The audit suggests no labels yet: pairs of classes come at the end of training.'
        : 'The audit suggests no labels, so that there are no pairs of classes.';
    return h('p', { class: 'nothing' }, told);
  }
  const { candidates, estimated } = flows(audit);
  const which = estimated ? (kept.flows ?? 'estimated') : 'candidates';
  const counts = which === 'estimated' && estimated ? estimated : candidates;
  const all = audit.classes.map((_, k) => k);
  const weight = (/** @type {number} */ k) =>
    counts[k].reduce((a, b) => a + b, 0) + counts.reduce((sum, row) => sum + row[k], 0);
  const shown =
    all.length > MOST
      ? all
          .sort((a, b) => weight(b) - weight(a))
          .slice(0, MOST)
          .sort((a, b) => a - b)
      : all;
  const most = Math.max(...shown.flatMap((a) => shown.map((b) => counts[a][b])), 1e-9);
  const name = (/** @type {number} */ k) => audit.label(audit.classes[k]);
  const open = (/** @type {number} */ a, /** @type {number | null} */ b) => {
    Object.assign(context.triage.asked, {
      given: audit.classes[a],
      suggested: b === null ? null : audit.classes[b],
      chosen: null,
      text: '',
    });
    context.go('triage');
  };
  const body = shown.map((a) =>
    h(
      'tr',
      {},
      h(
        'th',
        { scope: 'row' },
        button(name(a), () => open(a, null), { class: 'plain', title: `candidates given ${name(a)}` }),
      ),
      shown.map((b) =>
        cell(
          counts[a][b],
          most,
          a === b,
          `given ${name(a)}, likely ${name(b)}: ${number(counts[a][b])}, ${candidates[a][b]} candidates`,
          () => open(a, b),
        ),
      ),
      h('td', { class: 'sum' }, number(Math.round(counts[a].reduce((x, y) => x + y, 0)))),
    ),
  );
  const head = h(
    'tr',
    {},
    h('th', { scope: 'col' }, 'given ↓  likely →'),
    shown.map((b) => h('th', { scope: 'col' }, name(b))),
    h('th', { scope: 'col' }, 'sum'),
  );
  const options = /** @type {[string, string][]} */ ([
    ...(estimated ? [['estimated', 'estimated wrong labels']] : []),
    ['candidates', 'candidates'],
  ]);
  const pick = select('count', options, which, (value) => {
    kept.flows = value;
    context.refresh();
  });
  const left =
    all.length > MOST &&
    h('span', { class: 'muted' }, `the ${MOST} of ${audit.classes.length} classes with most of them`);
  return h(
    'section',
    {},
    h('h2', {}, 'Given and suggested'),
    h('div', { class: 'controls' }, pick, left),
    h(
      'div',
      { class: 'beside' },
      h('div', { class: 'wide' }, h('table', { class: 'matrix' }, h('thead', {}, head), h('tbody', {}, body))),
      frequent(context, counts, candidates, open),
    ),
  );
}

/**
 * The pairs with the most labels, as a list.
 * @param {Context} context
 * @param {Float64Array[]} counts
 * @param {Float64Array[]} candidates
 * @param {(a: number, b: number) => void} open
 */
function frequent({ audit }, counts, candidates, open) {
  /** @type {{ a: number, b: number, count: number }[]} */
  const every = [];
  counts.forEach((row, a) => row.forEach((count, b) => count > 0 && every.push({ a, b, count })));
  const first = every.sort((p, q) => q.count - p.count).slice(0, LISTED);
  const most = first[0]?.count ?? 1;
  const name = (/** @type {number} */ k) => h('span', { class: 'label' }, audit.label(audit.classes[k]));
  const entries = first.map(({ a, b, count }) =>
    h(
      'li',
      {},
      h(
        'button',
        { type: 'button', class: 'entry flow', on: { click: () => open(a, b) } },
        h('span', { class: 'name' }, name(a), h('span', { class: 'arrow' }, '→'), name(b)),
        meter(count / most, `${number(count)} labels`, 'proponent'),
        h(
          'span',
          { class: 'muted told' },
          `${number(Number(count.toPrecision(3)))}; ${counted(candidates[a][b], 'candidate')}`,
        ),
      ),
    ),
  );
  return h('div', {}, h('h3', {}, 'Most frequent'), h('ol', { class: 'kin' }, entries));
}

/**
 * @param {number} count
 * @param {number} most
 * @param {boolean} same
 * @param {string} told
 * @param {() => void} open
 */
function cell(count, most, same, told, open) {
  if (same) return h('td', { class: 'same', 'aria-label': 'the same class' });
  if (!count) return h('td', { class: 'zero' }, '·');
  const shade = { '--strength': `${Math.round(100 * Math.sqrt(count / most))}%` };
  return h(
    'td',
    { class: 'cell', style: shade },
    button(count < 10 ? count.toFixed(count < 1 ? 1 : 0) : number(Math.round(count)), open, {
      title: told,
      'aria-label': told,
    }),
  );
}
