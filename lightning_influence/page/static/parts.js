// What several views show of an example: picture, text, labels, evidence, decision.

import { h, number, percent } from './dom.js';
import { clean } from './audit.js';

/** @typedef {import('./audit.js').Audit} Audit */

/** @type {Record<string, number>} Letters of a text in a frame. */
const LETTERS = { large: 5000, medium: 240 };

/**
 * The picture of an example, filled in once it is there; else its text, else its number.
 * @param {Audit} audit
 * @param {string | number} key Dataset index, or "set/index" of a query.
 * @param {string} kind Class name of the frame.
 * @param {boolean} [ofQuery]
 */
export function picture(audit, key, kind, ofQuery = false) {
  const frame = h('span', { class: `picture ${kind}` });
  const text = (ofQuery ? audit.queryTexts : audit.texts)[key];
  if (!(ofQuery ? audit.queryPictures : audit.pictures)[key]) {
    frame.classList.add('empty');
    frame.append(text ? clean(text).slice(0, LETTERS[kind] ?? 80) : '');
    if (!text) frame.setAttribute('aria-hidden', 'true');
    return frame;
  }
  const image = h('img', { alt: `${ofQuery ? 'query' : 'example'} ${key}`, decoding: 'async', draggable: 'false' });
  image.addEventListener('load', () => image.classList.toggle('tiny', image.naturalWidth < 100));
  frame.append(image);
  audit.picture(key, ofQuery).then((found) => {
    if (found) image.setAttribute('src', found);
    else frame.classList.add('empty');
  });
  return frame;
}

/**
 * The given label and, if there is one, what is suggested instead.
 * @param {Audit} audit
 * @param {number} row
 * @param {boolean} [always] Whether what is suggested is shown of examples that are no candidates, too.
 */
export function labels(audit, row, always = true) {
  const given = audit.given(row);
  const suggested = always || audit.candidate[row] ? audit.suggested(row) : -1;
  const told = [h('span', { class: 'label given', title: `given: ${audit.label(given)}` }, audit.label(given))];
  if (suggested >= 0) {
    const name = audit.label(suggested);
    told.push(h('span', { class: 'arrow', 'aria-hidden': 'true' }, '→'));
    told.push(h('span', { class: 'label suggested', title: `suggested: ${name}` }, name));
  }
  return h('span', { class: audit.longNames ? 'labels long' : 'labels' }, told);
}

/**
 * What the colours of a drawing mean.
 * @param {string} plain
 * @param {string} marked
 */
export function legend(plain, marked) {
  const swatch = (/** @type {string} */ kind) => h('span', { class: `swatch ${kind}` });
  return h('p', { class: 'legend' }, swatch('bar'), plain, swatch('marked'), marked);
}

/** @typedef {{ title: string, name: string, strength: (row: number) => number, told: (row: number) => string }} Evidence */

const KINDS = [
  { title: 'dynamics', names: ['prob_margin', 'aum', 'el2n', 'loss_mean', 'epochs_wrong'] },
  { title: 'neighbours', names: ['neighbour_disagreement'] },
  { title: 'influence', names: ['self_influence', 'tracin', 'grad_norm_squared', 'harm'] },
];

/**
 * What speaks against labels: how training went, the neighbours, and influence, as far as the audit has them.
 * @param {Audit} audit
 * @returns {Evidence[]}
 */
export function evidence(audit) {
  return KINDS.flatMap(({ title, names }) => {
    const name = names.find((each) => audit.columns.has(each));
    return name ? [{ title, name, strength: strength(audit, name), told: told(audit, name) }] : [];
  });
}

/**
 * @param {Audit} audit
 * @param {string} name
 * @returns {(row: number) => number}
 */
function strength(audit, name) {
  if (name === 'prob_margin') return (row) => (1 - audit.value(name, row)) / 2;
  if (name === 'neighbour_disagreement') return (row) => audit.value(name, row);
  return (row) => audit.percentiles(name)[row];
}

/**
 * @param {Audit} audit
 * @param {string} name
 * @returns {(row: number) => string}
 */
function told(audit, name) {
  return (row) => {
    const share = audit.percentiles(name)[row];
    const where = share > 0.999 ? 'nearly all' : percent(share);
    return `${name.replaceAll('_', ' ')} ${number(audit.value(name, row))}, worse than ${where}`;
  };
}

/**
 * A bar from 0 to 1.
 * @param {number} value
 * @param {string} title
 * @param {string} kind
 */
export function meter(value, title, kind) {
  const share = Number.isFinite(value) ? Math.min(1, Math.max(0, value)) : 0;
  return h(
    'span',
    { class: `meter ${kind}`, title },
    h('span', { class: 'fill', style: { width: `${100 * share}%` } }),
  );
}

/** @type {Record<string, [string, string]>} */
const BADGES = { keep: ['✓', 'keep'], relabel: ['→', ''], drop: ['✕', 'drop'], skip: ['·', 'skipped'] };

/**
 * What was decided.
 * @param {Audit} audit
 * @param {import('./review_csv.js').Decision | undefined} made
 */
export function badge(audit, made) {
  if (!made) return h('span', { class: 'badge none' });
  const [sign, text] = BADGES[made.decision];
  const name = made.label === null ? text : audit.label(made.label);
  return h(
    'span',
    { class: `badge ${made.decision}`, title: made.decision },
    h('span', { 'aria-hidden': 'true' }, sign),
    h('span', { class: 'name' }, name),
  );
}

/**
 * The probability that the label is wrong.
 * @param {Audit} audit
 * @param {number} row
 */
export function doubt(audit, row) {
  const value = audit.value('wrong_probability', row);
  const text = `${percent(value)} likely to be wrong`;
  return h('span', { class: 'doubt' }, h('span', { class: 'figure' }, percent(value)), meter(value, text, 'doubtful'));
}
