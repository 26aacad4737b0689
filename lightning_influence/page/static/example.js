// Everything that an audit knows about one example.

import { curve } from './charts.js';
import { columns } from './columns.js';
import { answers, decidingKeys } from './deciding.js';
import { button, fitted, h, percent } from './dom.js';
import { inQueries, kin } from './entries.js';
import { badge, labels, picture } from './parts.js';

/** @typedef {import('./app.js').Context} Context */

/**
 * @param {Context} context
 * @returns {import('./app.js').View}
 */
export function example(context) {
  const { audit, where, triage } = context;
  const asked = where.get('index') ?? String(triage.index >= 0 ? triage.index : audit.index[worst(audit)]);
  const row = audit.rows.get(Number(asked));
  const search = h('input', {
    type: 'search',
    'aria-label': 'index of an example',
    placeholder: 'index',
    inputmode: 'numeric',
  });
  const form = h(
    'form',
    {
      class: 'find',
      on: {
        submit: (/** @type {Event} */ event) => {
          event.preventDefault();
          if (search.value.trim() && audit.rows.has(Number(search.value)))
            context.go('example', { index: search.value });
          else context.say(`the audit has no example ${search.value}`, 'bad');
        },
      },
    },
    h('label', { class: 'field' }, h('span', {}, 'example'), search),
  );
  if (row === undefined) {
    return {
      element: h(
        'div',
        { class: 'page' },
        form,
        h('p', { class: 'nothing' }, audit.n ? `the audit has no example ${asked}` : 'the audit has no examples'),
      ),
    };
  }
  const byRank = neighboursInRank(audit, row);
  const step = (/** @type {number} */ way) =>
    byRank[way] !== undefined && context.go('example', { index: String(audit.index[byRank[way]]) });
  const decide = (/** @type {any} */ decision, /** @type {number | null} */ label = null) => {
    context.decisions.set(audit.index[row], { decision, label });
    context.say(`example ${audit.index[row]}: ${label === null ? decision : `relabelled ${audit.label(label)}`}`);
    context.refresh();
  };
  const element = h(
    'div',
    { class: 'page example' },
    h(
      'div',
      { class: 'controls' },
      button('Back to triage', () => context.go('triage'), {}, 'Esc'),
      button('Previous', () => step(0), { disabled: byRank[0] === undefined }, '←'),
      button('Next', () => step(1), { disabled: byRank[1] === undefined }, '→'),
      h('span', { class: 'gap' }),
      form,
    ),
    h(
      'div',
      { class: 'halves' },
      h('div', {}, about(context, row, decide), overEpochs(audit, row), kin(context, row), inQueries(context, row)),
      columns(audit, row),
    ),
  );
  const keys = (/** @type {KeyboardEvent} */ event) => {
    const acts = {
      ...decidingKeys(context, row, decide),
      ArrowLeft: () => step(0),
      ArrowRight: () => step(1),
      Escape: () => context.go('triage'),
    };
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const act = /** @type {Record<string, () => void>} */ (acts)[key];
    act?.();
    return act !== undefined;
  };
  return { element, keys, mounted: () => (triage.index = audit.index[row]) };
}

/** @param {import('./audit.js').Audit} audit */
function worst(audit) {
  return Math.max(0, Array.from(audit.rank).indexOf(1));
}

/**
 * The examples before and after in the ranking.
 * @param {import('./audit.js').Audit} audit
 * @param {number} row
 */
function neighboursInRank(audit, row) {
  const at = (/** @type {number} */ rank) => {
    const found = Array.prototype.indexOf.call(audit.rank, rank);
    return found < 0 ? undefined : found;
  };
  return [at(audit.rank[row] - 1), at(audit.rank[row] + 1)];
}

/**
 * @param {Context} context
 * @param {number} row
 * @param {import('./deciding.js').Decide} decide
 */
function about(context, row, decide) {
  const { audit, decisions } = context;
  const index = audit.index[row];
  const chance = audit.value('wrong_probability', row);
  const id = audit.columns.get('id')?.texts?.[row];
  return h(
    'section',
    { class: 'about' },
    picture(audit, index, 'large'),
    h(
      'div',
      {},
      h('h2', {}, `Example ${index}`, id && h('span', { class: 'muted' }, ` ${id}`)),
      h(
        'p',
        {},
        `rank ${audit.rank[row].toLocaleString('en')} of ${audit.n.toLocaleString('en')}${audit.candidate[row] ? ', a candidate' : ''}`,
      ),
      audit.given(row) >= 0 && h('p', {}, labels(audit, row)),
      Number.isFinite(chance) && h('p', {}, h('b', {}, percent(chance)), ' likely to be wrong'),
      audit.hasPictures && audit.text(row) && h('p', { class: 'says' }, audit.text(row)),
      badge(audit, decisions.get(index)),
      answers(context, row, decide),
    ),
  );
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {number} row
 */
function overEpochs(audit, row) {
  if (!audit.curves) return null;
  const { epochs, names, given, suggested } = audit.curves;
  const drawn = names.flatMap((name) => {
    const values = audit.curve(name, row);
    if (!values || name === suggested) return [];
    const range = name === given ? { low: 0, high: 1 } : {};
    const other = name === given && suggested !== null ? audit.curve(suggested, row) : null;
    const told = name === given ? `probability of the given label${other ? ' and of the suggested one' : ''}` : name;
    const series = other ? [values, other] : [values];
    const chart = fitted(150, (width) => curve(epochs, series, { label: `${told} over the epochs`, width, ...range }));
    const caption = other ? probabilities(audit, row) : name === given ? told : name.replaceAll('_', ' ');
    return [h('figure', {}, h('figcaption', {}, caption), chart)];
  });
  if (!drawn.length)
    return h('p', { class: 'muted' }, 'The curves of this example are not in the page: report.curves has them.');
  return h('section', {}, h('h2', {}, 'Over the epochs'), h('div', { class: 'figures' }, drawn));
}

/**
 * Which line is whose.
 * @param {import('./audit.js').Audit} audit
 * @param {number} row
 */
function probabilities(audit, row) {
  const line = (/** @type {string} */ kind) => h('span', { class: `swatch line ${kind}`, 'aria-hidden': 'true' });
  const named = (/** @type {string} */ told, /** @type {number} */ label) => `${told} ${audit.label(label)}`;
  return [
    'probability: ',
    h('span', { class: 'nowrap' }, line('first'), named('given', audit.given(row))),
    ' ',
    h('span', { class: 'nowrap' }, line('other'), named('suggested', audit.suggested(row))),
  ];
}
