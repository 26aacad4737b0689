// All columns of an example, with their meanings and where it stands among all.

import { binned, histogram } from './charts.js';
import { fitted, h, number, percent } from './dom.js';
import { meter } from './parts.js';

const NAMES = ['label', 'predicted', 'suggested']; // of columns that hold classes

/**
 * All columns with their meanings; a click shows where the example lies among all.
 * @param {import('./audit.js').Audit} audit
 * @param {number} row
 */
export function columns(audit, row) {
  const body = [...audit.columns.values()].map(({ name, meaning, direction, kind, texts, values }) => {
    const value = texts ? texts[row] : values[row];
    const shown = NAMES.includes(name)
      ? audit.label(Number(value))
      : kind === 'bool'
        ? value
          ? 'yes'
          : 'no'
        : texts
          ? String(value)
          : name === 'wrong_probability'
            ? percent(Number(value))
            : number(Number(value));
    const share = direction ? audit.percentiles(name)[row] : NaN;
    const place = Number.isFinite(share)
      ? [meter(share, `more suspicious than ${percent(share)}`, 'place'), h('span', { class: 'muted' }, percent(share))]
      : [];
    return h(
      'tr',
      {},
      h('th', { scope: 'row' }, name.replaceAll('_', ' '), h('span', { class: 'meaning' }, meaning)),
      h('td', { class: 'number' }, shown),
      h('td', { class: 'placed' }, place),
    );
  });
  const head = h(
    'tr',
    {},
    h('th', { scope: 'col' }, 'column'),
    h('th', { scope: 'col', class: 'number' }, 'value'),
    h('th', { scope: 'col', title: 'share of the examples that are less suspicious' }, 'worse than'),
  );
  const name = ['suspicion', 'self_influence'].find((each) => audit.columns.has(each));
  return h(
    'section',
    { class: 'columns' },
    h('h2', {}, 'All columns'),
    name && amongAll(audit, name, row),
    h('table', {}, h('thead', {}, head), h('tbody', {}, body)),
  );
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {string} name
 * @param {number} row
 */
function amongAll(audit, name, row) {
  const values = audit.values(name) ?? [];
  const bins = binned(
    values,
    () => true,
    (each) => Boolean(audit.candidate[each]),
    false,
  );
  if (!bins.counts.length) return null;
  const label = `where the example is in the histogram of ${name}`;
  return h(
    'figure',
    {},
    h('figcaption', {}, `${name} among all`),
    fitted(130, (width) => histogram(bins, { label, logY: true, mark: values[row], width, height: 130 })),
  );
}
