// Two audits side by side: of other runs, other methods, or before and after cleaning.

import { counted, fill, h, refocused, select } from './dom.js';
import { entry } from './entries.js';
import { legend } from './parts.js';
import { scatter } from './scatter.js';

/** @typedef {import('./app.js').Context} Context */
/** @typedef {import('./audit.js').Audit} Audit */

const LISTED = 30;

/**
 * @param {Context} context
 * @returns {import('./app.js').View}
 */
export function compare(context) {
  const { audit, runs, kept } = context;
  const others = runs
    .filter(({ id, error }) => id !== audit.id && !error)
    .sort((a, b) => likeness(audit.id, b) - likeness(audit.id, a));
  const element = h('div', { class: 'page compare' });
  if (!others.length) {
    const told =
      'There is no other audit here. Point `lightning-influence view` or TensorBoard at a directory that holds several.';
    element.append(h('p', { class: 'nothing' }, told));
    return { element };
  }
  const chosen = others.some(({ id }) => id === kept.other) ? kept.other : others[0].id;
  const pick = select(
    'compare with',
    others.map(({ id, name }) => [id, name]),
    chosen,
    (value) => {
      kept.other = value;
      context.refresh();
    },
  );
  const body = h('div', { class: 'stack' }, h('p', { class: 'nothing' }, 'reading …'));
  element.append(h('div', { class: 'controls' }, pick), body);
  context
    .load(chosen)
    .then((other) => {
      const draw = () => refocused(body, () => fill(body, sideBySide(context, other, draw)));
      draw();
    })
    .catch((error) => body.replaceChildren(h('p', { class: 'banner bad' }, `it can't be compared: ${error.message}`)));
  return { element };
}

/**
 * How much a run is one to compare with: complete, and from near by.
 * @param {string} id
 * @param {import('./host.js').Run} run
 */
function likeness(id, run) {
  let same = 0;
  while (same < id.length && id[same] === run.id[same]) same += 1;
  return same + (run.status === 'complete' ? 1000 : 0);
}

/**
 * @param {Context} context
 * @param {Audit} other
 * @param {() => void} draw
 */
function sideBySide(context, other, draw) {
  const { audit, kept } = context;
  const rows = matched(audit, other);
  const shared = [...audit.columns.keys()].filter(
    (name) =>
      other.columns.has(name) &&
      !['index', 'candidate', 'finite', 'label', 'suggested', 'predicted'].includes(name) &&
      audit.columns.get(name)?.kind !== 'text',
  );
  const name = shared.includes(kept.compared) ? kept.compared : 'rank';
  const pick = select(
    'column',
    shared.map((each) => [each, each.replaceAll('_', ' ')]),
    name,
    (value) => {
      kept.compared = value;
      draw();
    },
  );
  const [x, y] = [new Float64Array(rows.length), new Float64Array(rows.length)];
  rows.forEach(([a, b], k) => {
    x[k] = audit.value(name, a);
    y[k] = other.value(name, b);
  });
  const alike = spearman(x, y);
  const changed = rows.filter(([a, b]) => audit.given(a) !== other.given(b)).length;
  const marked = (/** @type {number} */ k) =>
    Boolean(audit.candidate[rows[k][0]]) !== Boolean(other.candidate[rows[k][1]]);
  const points = { x, y, marked, xName: `${name}, ${audit.name}`, yName: `${name}, ${other.name}` };
  const told = [
    `${counted(rows.length, 'example')} in both`,
    `Spearman's rank correlation ${Number.isFinite(alike) ? alike.toFixed(3).replace('-', '−') : 'unknown'}`,
    ...(changed ? [`${counted(changed, 'given label')} changed`] : []),
  ].join('; ');
  const left = rows.filter(([a, b]) => audit.candidate[a] && !other.candidate[b]).map(([a]) => a);
  const entered = rows.filter(([a, b]) => !audit.candidate[a] && other.candidate[b]);
  entered.sort((p, q) => other.rank[p[1]] - other.rank[q[1]]);
  left.sort((a, b) => audit.rank[a] - audit.rank[b]);
  const columns = h(
    'section',
    {},
    h('h2', {}, 'Column by column'),
    h('div', { class: 'controls' }, pick, h('span', {}, told)),
    h('div', { class: 'drawing' }, scatter(points, { label: `${name} in both audits; ${told}`, height: 460 })),
    legend('the same in both', 'a candidate in one of them'),
  );
  return [
    figures(audit, other),
    h(
      'div',
      { class: 'halves' },
      columns,
      h(
        'div',
        { class: 'stack' },
        list(context, `Candidates in ${audit.name} alone`, left),
        list(
          context,
          `Candidates in ${other.name} alone`,
          entered.map(([a]) => a),
        ),
      ),
    ),
  ];
}

/**
 * Rows of both audits that are of the same example: by id where both have them, else by index.
 * @param {Audit} audit
 * @param {Audit} other
 * @returns {[number, number][]}
 */
function matched(audit, other) {
  const [ids, others] = [audit.columns.get('id')?.texts, other.columns.get('id')?.texts];
  const key =
    (/** @type {Audit} */ each, /** @type {string[] | null | undefined} */ names) => (/** @type {number} */ row) =>
      ids && others && names ? names[row] : each.index[row];
  const there = new Map(Array.from(other.index, (_, row) => [key(other, others)(row), row]));
  /** @type {[number, number][]} */
  const found = [];
  for (let row = 0; row < audit.n; row += 1) {
    const match = there.get(key(audit, ids)(row));
    if (match !== undefined) found.push([row, match]);
  }
  return found;
}

/**
 * @param {Audit} audit
 * @param {Audit} other
 */
function figures(audit, other) {
  const titles = [...new Set([...audit.cards, ...other.cards].map(({ title }) => title))];
  const of = (/** @type {Audit} */ each, /** @type {string} */ title) => each.cards.find((one) => one.title === title);
  const rows = titles.map((title) =>
    h(
      'tr',
      {},
      h('th', { scope: 'row' }, title),
      [audit, other].map((each) => {
        const about = of(each, title);
        return h(
          'td',
          { title: about?.note ?? '' },
          about ? about.value : '–',
          about?.note && h('span', { class: 'muted' }, ` ${about.note}`),
        );
      }),
    ),
  );
  const head = h('tr', {}, h('td', {}), h('th', { scope: 'col' }, audit.name), h('th', { scope: 'col' }, other.name));
  return h(
    'section',
    {},
    h('h2', {}, 'Side by side'),
    h('div', { class: 'wide' }, h('table', { class: 'figures-table' }, h('thead', {}, head), h('tbody', {}, rows))),
  );
}

/**
 * @param {Context} context
 * @param {string} title
 * @param {number[]} rows
 */
function list(context, title, rows) {
  const { audit } = context;
  const entries = rows.slice(0, LISTED).map((row) => entry(context, audit.index[row], `rank ${audit.rank[row]}`));
  const more = rows.length > LISTED && h('p', { class: 'muted' }, `and ${rows.length - LISTED} more`);
  return h(
    'section',
    {},
    h('h2', {}, title, h('span', { class: 'muted' }, ` ${rows.length}`)),
    entries.length ? h('ul', { class: 'kin' }, entries) : h('p', { class: 'nothing' }, 'none'),
    more,
  );
}

/**
 * Spearman's rank correlation, ties with their mean ranks; what is not known in both is left out.
 * @param {Float64Array} x
 * @param {Float64Array} y
 */
export function spearman(x, y) {
  const known = Array.from(x.keys()).filter((k) => Number.isFinite(x[k]) && Number.isFinite(y[k]));
  const [a, b] = [ranks(known.map((k) => x[k])), ranks(known.map((k) => y[k]))];
  const middle = (known.length - 1) / 2;
  let [both, own, others] = [0, 0, 0];
  for (let k = 0; k < known.length; k += 1) {
    both += (a[k] - middle) * (b[k] - middle);
    own += (a[k] - middle) ** 2;
    others += (b[k] - middle) ** 2;
  }
  return both / Math.sqrt(own * others);
}

/** @param {number[]} values */
function ranks(values) {
  const order = Array.from(values.keys()).sort((a, b) => values[a] - values[b]);
  const found = new Float64Array(values.length);
  for (let start = 0; start < order.length;) {
    let end = start;
    while (end + 1 < order.length && values[order[end + 1]] === values[order[start]]) end += 1;
    for (let k = start; k <= end; k += 1) found[order[k]] = (start + end) / 2;
    start = end + 1;
  }
  return found;
}
