// A row of the table, and a tile of the grid.

import { sparkline } from './charts.js';
import { h, number } from './dom.js';
import { badge, doubt, evidence, labels, meter, picture } from './parts.js';

/** @typedef {import('./audit.js').Audit} Audit */

/** Value at the top of sparklines: beyond, an example is simply lost. @param {Audit} audit */
export function highestLoss(audit) {
  const table = audit.curves?.data.get('loss');
  if (!table) return 1;
  const known = Float32Array.from(table)
    .filter((value) => Number.isFinite(value))
    .sort();
  return Math.max(known[Math.floor(0.98 * known.length)] ?? 1, 1e-6);
}

/**
 * What a screen reader says of an example.
 * @param {Audit} audit
 * @param {import('./decisions.js').Decisions} decisions
 * @param {number} row
 */
function spoken(audit, decisions, row) {
  const parts = [`rank ${audit.rank[row]}, example ${audit.index[row]}`];
  if (audit.given(row) >= 0) parts.push(`given ${audit.label(audit.given(row))}`);
  if (audit.suggested(row) >= 0) parts.push(`suggested ${audit.label(audit.suggested(row))}`);
  const made = decisions.get(audit.index[row]);
  parts.push(made ? `decided: ${made.decision}` : 'undecided');
  return parts.join(', ');
}

/** @type {Record<string, string>} */
const WIDTHS = {
  rank: '46px',
  thumb: '42px',
  index: '54px',
  text: 'minmax(110px, 3fr)',
  labels: 'minmax(132px, 1fr)',
  doubt: '72px',
  'evidence-head': '68px',
  'stack-head': '60px',
  loss: '86px',
  decision: 'minmax(76px, 110px)',
};

const SPARE = new Set(['evidence-head', 'stack-head', 'loss']);

/** @typedef {{ key: string, title: string, sort: string | null, hint: string }} Head */

/**
 * How rows are drawn, with the heads of their columns.
 * @param {Audit} audit
 * @param {import('./decisions.js').Decisions} decisions
 */
export function rowMaker(audit, decisions) {
  const about = evidence(audit);
  const top = highestLoss(audit);
  const shown = {
    picture: audit.hasPictures,
    text: audit.hasTexts || audit.columns.has('id'),
    labels: audit.labelled,
    doubt: audit.columns.has('wrong_probability'),
    score: !audit.columns.has('wrong_probability') && audit.columns.has('suspicion'),
    stacked: about.length > 0 && (audit.hasTexts || audit.columns.has('id')),
    loss: audit.curves?.data.has('loss') ?? false,
  };
  const meaning = (/** @type {string} */ name) => audit.columns.get(name)?.meaning ?? '';
  /** @type {(Head | false)[]} */
  const heads = [
    { key: 'rank', title: 'rank', sort: 'rank', hint: meaning('rank') },
    shown.picture && { key: 'thumb', title: '', sort: null, hint: '' },
    { key: 'index', title: 'example', sort: 'index', hint: meaning('index') },
    shown.text && { key: 'text', title: audit.hasTexts ? 'text' : 'id', sort: null, hint: '' },
    shown.labels && { key: 'labels', title: 'given → other', sort: 'label', hint: 'sort by the given label' },
    shown.doubt && { key: 'doubt', title: 'wrong?', sort: 'wrong_probability', hint: meaning('wrong_probability') },
    shown.score && { key: 'doubt', title: 'suspicion', sort: 'suspicion', hint: meaning('suspicion') },
    ...(shown.stacked
      ? [{ key: 'stack-head', title: 'evidence', sort: null, hint: about.map(({ title }) => title).join(', ') }]
      : about.map(({ title, name }) => ({
          key: 'evidence-head',
          title,
          sort: name,
          hint: `${name}: ${meaning(name)}`,
        }))),
    shown.loss && {
      key: 'loss',
      title: 'loss by epoch',
      sort: audit.columns.has('loss_mean') ? 'loss_mean' : null,
      hint: 'the loss of the example over the epochs of training',
    },
    { key: 'decision', title: 'decision', sort: null, hint: '' },
  ];
  const kept = /** @type {Head[]} */ (heads.filter(Boolean));
  // Where there is little room, what the panel shows as well is left out.
  const columns = (/** @type {Head[]} */ some) => some.map(({ key }) => WIDTHS[key]).join(' ');
  const template = { '--all': columns(kept), '--few': columns(kept.filter(({ key }) => !SPARE.has(key))) };

  const bars = (/** @type {number} */ row) =>
    about.map(({ title, strength, told }) => meter(strength(row), `${title}: ${told(row)}`, title));

  /** @param {number} row */
  function line(row) {
    const index = audit.index[row];
    return h(
      'div',
      { class: 'row', 'aria-label': spoken(audit, decisions, row) },
      h('span', { class: 'rank' }, audit.rank[row].toLocaleString('en')),
      shown.picture && picture(audit, index, 'thumb'),
      h('span', { class: 'index' }, `#${index}`),
      shown.text && h('span', { class: 'text', title: audit.text(row) }, audit.text(row)),
      shown.labels && labels(audit, row),
      shown.doubt && doubt(audit, row),
      shown.score && h('span', { class: 'doubt' }, number(audit.value('suspicion', row))),
      shown.stacked ? h('span', { class: 'bars' }, bars(row)) : bars(row),
      shown.loss && sparkline(audit.curve('loss', row), top),
      badge(audit, decisions.get(index)),
    );
  }

  /** @param {number} row */
  function tile(row) {
    const index = audit.index[row];
    return h(
      'div',
      { class: 'tile', 'aria-label': spoken(audit, decisions, row) },
      h('div', { class: 'edge' }, picture(audit, index, 'medium'), badge(audit, decisions.get(index))),
      shown.labels && labels(audit, row),
      h('div', { class: 'foot' }, h('span', { class: 'index' }, `#${index}`), shown.doubt && doubt(audit, row)),
    );
  }

  return { heads: kept, template, line, tile };
}
