// Lists of training examples and of queries that lead to them.

import { h, number } from './dom.js';
import { labels, picture } from './parts.js';
import { shadedText, tokenLegend } from './tokens.js';

/** @typedef {import('./app.js').Context} Context */

/**
 * The training example that looks most alike to the model.
 * @param {Context} context
 * @param {number} row
 */
export function kin(context, row) {
  const { audit } = context;
  const nearest = audit.value('nearest', row);
  if (!Number.isInteger(nearest) || nearest < 0) return null;
  const alike = number(audit.value('nearest_cosine', row));
  const copy = audit.value('near_duplicate', row) ? 'likely a copy\n' : '';
  return h(
    'section',
    {},
    h('h2', {}, 'Nearest training example'),
    h('ul', { class: 'kin' }, entry(context, nearest, `${copy}cosine ${alike}`)),
  );
}

/**
 * A training example as an entry that leads to it.
 * @param {Context} context
 * @param {number} index
 * @param {string} told
 * @param {Node | null} [more]
 * @param {Node | null} [shaded] Its text, with the scores of its tokens.
 */
export function entry(context, index, told, more = null, shaded = null) {
  const { audit, go } = context;
  const row = audit.rows.get(index);
  const known = row !== undefined;
  return h(
    'li',
    {},
    h(
      'button',
      {
        type: 'button',
        class: 'entry',
        disabled: !known,
        on: { click: () => go('example', { index: String(index) }) },
      },
      audit.hasPictures && picture(audit, index, 'thumb'),
      h(
        'span',
        { class: 'name' },
        h('span', { class: 'index' }, `#${index}`),
        known && audit.labelled && labels(audit, row, false),
      ),
      known && !audit.hasPictures && audit.hasTexts && !shaded && h('span', { class: 'cut snippet' }, audit.text(row)),
      shaded,
      more,
      h('span', { class: 'muted told' }, told),
    ),
  );
}

/**
 * The queries that the example is a strong proponent or opponent of.
 * @param {Context} context
 * @param {number} row
 */
export function inQueries(context, row) {
  const { audit, go } = context;
  const own = audit.pairs.filter((pair) => pair.index === audit.index[row]);
  if (!audit.pairs.length) return null;
  if (!own.length)
    return h('section', {}, h('h2', {}, 'Queries'), h('p', { class: 'muted' }, 'In the lists of no query.'));
  const groups = [
    ['opponent', 'Makes these validation examples worse'],
    ['proponent', 'Makes these validation examples better'],
  ];
  return h(
    'section',
    {},
    groups
      .map(([kind, title]) => {
        const some = own.filter((pair) => pair.kind === kind);
        if (!some.length) return null;
        const entries = some.map((pair) => {
          const key = `${pair.set}/${pair.query}`;
          const told = `${pair.list}, place ${pair.rank}: ${number(pair.list === 'specific' ? pair.relative : pair.score)}`;
          const open = () => go('queries', { number: String(pair.number) });
          const name =
            pair.label >= 0
              ? `query ${pair.query}: ${audit.label(pair.label)}, predicted ${audit.label(pair.predicted)}`
              : `query ${pair.query}`;
          const shown = audit.queryPictures[key] ? picture(audit, key, 'thumb', true) : null;
          return h(
            'li',
            {},
            h(
              'button',
              { type: 'button', class: 'entry', on: { click: open } },
              shown,
              h('span', { class: 'name' }, name),
              shadedText(pair),
              h('span', { class: 'muted told' }, told),
            ),
          );
        });
        return [h('h2', {}, title), h('ul', { class: 'kin' }, entries)];
      })
      .flat(),
    own.some((pair) => pair.tokens) && tokenLegend(),
  );
}
