// The queries, each with the training examples that make it better and those that make it worse.

import { asking } from './asking.js';
import { h, number, select } from './dom.js';
import { entry } from './entries.js';
import { meter, picture } from './parts.js';
import { shadedText, tokenLegend } from './tokens.js';

/** @typedef {import('./app.js').Context} Context */
/** @typedef {import('./audit.js').Pair} Pair */

/** @type {Record<string, [string, string]>} */
const LISTS = {
  strongest: ['strongest: raw scores', 'by score; loud examples, such as wrong labels, lead many lists'],
  specific: ['specific: normalised', 'by score relative to how much the example moves the model at all'],
  replay: ['replay: in this run', 'by what the example did in this very run, by replay'],
};

/**
 * @param {Context} context
 * @returns {import('./app.js').View}
 */
export function queries(context) {
  const { audit, where, go } = context;
  const numbers = [...new Set(audit.pairs.map((pair) => pair.number))].sort((a, b) => a - b);
  if (!numbers.length) {
    const told =
      audit.status === 'recording'
        ? 'Queries come at the end of training.'
        : 'This audit has no queries. InfluenceAudit(queries="worst") asks which training examples made the worst validation predictions.';
    return { element: h('div', { class: 'page' }, h('p', { class: 'nothing' }, told), asking(audit)) };
  }
  const asked = Number(where.get('number'));
  const current = numbers.includes(asked) ? asked : numbers[0];
  const own = audit.pairs.filter((pair) => pair.number === current);
  const lists = [...new Set(own.map((pair) => pair.list))];
  const list = lists.includes(context.kept.list) ? context.kept.list : lists[0];
  const choose = (/** @type {number} */ number) => go('queries', { number: String(number) });
  const options = lists.map((each) => /** @type {[string, string]} */ ([each, LISTS[each]?.[0] ?? each]));
  const pick = select('list', options, list, (value) => {
    context.kept.list = value;
    context.refresh();
  });
  const element = h(
    'div',
    { class: 'queries' },
    h(
      'ul',
      { class: 'choices', 'aria-label': 'queries' },
      numbers.map((each) => choice(context, each, each === current, choose)),
    ),
    h(
      'div',
      { class: 'page' },
      query(context, own[0]),
      h('div', { class: 'controls' }, pick, h('span', { class: 'muted' }, LISTS[list]?.[1] ?? '')),
      own.some((pair) => pair.tokens) && tokenLegend(),
      h('div', { class: 'halves' }, side(context, own, list, 'proponent'), side(context, own, list, 'opponent')),
      asking(audit),
    ),
  );
  const keys = (/** @type {KeyboardEvent} */ event) => {
    const way = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (way === undefined) return false;
    const next = numbers[numbers.indexOf(current) + way];
    if (next !== undefined) choose(next);
    return true;
  };
  const mounted = () => element.querySelector('[aria-current]')?.scrollIntoView({ block: 'nearest' });
  return { element, keys, mounted };
}

/**
 * @param {Context} context
 * @param {number} own
 * @param {boolean} current
 * @param {(number: number) => void} choose
 */
function choice({ audit }, own, current, choose) {
  const pair = /** @type {Pair} */ (audit.pairs.find((each) => each.number === own));
  const key = `${pair.set}/${pair.query}`;
  const state = current ? { 'aria-current': 'true' } : {};
  const about =
    pair.label >= 0
      ? `${audit.label(pair.label)}, predicted ${audit.label(pair.predicted)}`
      : `loss ${number(pair.loss)}`;
  return h(
    'li',
    {},
    h(
      'button',
      { type: 'button', class: 'entry', ...state, on: { click: () => choose(own) } },
      audit.queryPictures[key] && picture(audit, key, 'thumb', true),
      h(
        'span',
        { class: 'name' },
        h('span', { class: 'index' }, `#${pair.query}`),
        h('span', { class: 'cut', title: about }, about),
        !audit.queryPictures[key] && audit.queryTexts[key] && h('span', { class: 'cut index' }, audit.queryTexts[key]),
      ),
    ),
  );
}

/**
 * @param {Context} context
 * @param {Pair} pair
 */
function query({ audit }, pair) {
  const key = `${pair.set}/${pair.query}`;
  const facts = [
    ['given', audit.label(pair.label)],
    ['predicted', audit.label(pair.predicted)],
    ['loss', number(pair.loss)],
    ...(pair.measured !== undefined && pair.measured !== pair.loss ? [['measured', number(pair.measured)]] : []),
  ];
  const told = pair.label >= 0 ? facts : facts.slice(2);
  return h(
    'section',
    { class: 'about brief' },
    (audit.queryPictures[key] || audit.queryTexts[key]) && picture(audit, key, 'large', true),
    h(
      'div',
      {},
      h(
        'h2',
        {},
        `Query ${pair.number}: example ${pair.query} of set ${pair.set}`,
        pair.query_id && h('span', { class: 'muted' }, ` ${pair.query_id}`),
      ),
      h(
        'dl',
        {},
        told.flatMap(([name, value]) => [h('dt', {}, name), h('dd', {}, value)]),
      ),
      audit.queryPictures[key] && audit.queryTexts[key] && h('p', { class: 'says' }, audit.queryTexts[key]),
    ),
  );
}

/**
 * @param {Context} context
 * @param {Pair[]} own
 * @param {string} list
 * @param {string} kind
 */
function side(context, own, list, kind) {
  const some = own.filter((pair) => pair.list === list && pair.kind === kind).sort((a, b) => a.rank - b.rank);
  const name = list === 'specific' ? 'relative' : 'score';
  const most = Math.max(...own.filter((pair) => pair.list === list).map((pair) => Math.abs(pair[name])), 1e-30);
  const [title, told] =
    kind === 'proponent'
      ? ['Proponents', 'training on them makes the query better']
      : ['Opponents', 'training on them makes it worse'];
  const entries = some.map((pair) => {
    const bar = meter(Math.abs(pair[name]) / most, `${name} ${number(pair[name])}`, kind);
    const relative = pair.relative === undefined || pair.relative === null ? '' : `\nrelative ${number(pair.relative)}`;
    return entry(context, pair.index, `score ${number(pair.score)}${relative}`, bar, shadedText(pair));
  });
  return h(
    'section',
    { class: kind },
    h('h2', {}, title, h('span', { class: 'muted' }, ` ${told}`)),
    entries.length ? h('ol', { class: 'kin ranked' }, entries) : h('p', { class: 'nothing' }, 'none'),
  );
}
