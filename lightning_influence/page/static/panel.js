// The example at hand, beside the list: what it is, what speaks against its label, and what can be decided.

import { curve } from './charts.js';
import { answers } from './deciding.js';
import { button, fitted, h, percent } from './dom.js';
import { badge, evidence, labels, meter, picture } from './parts.js';

/**
 * @param {import('./app.js').Context} context
 * @param {number} row
 * @param {import('./deciding.js').Decide} decide
 */
export function panel(context, row, decide) {
  const { audit, decisions, go } = context;
  const index = audit.index[row];
  const made = decisions.get(index);
  const given = audit.given(row);
  const chance = audit.value('wrong_probability', row);
  return [
    h(
      'header',
      {},
      h('strong', {}, `#${index}`),
      h('span', { class: 'muted' }, `rank ${audit.rank[row].toLocaleString('en')} of ${audit.n.toLocaleString('en')}`),
      badge(audit, made),
    ),
    picture(audit, index, 'large'),
    audit.hasPictures && audit.text(row) && h('p', { class: 'says' }, audit.text(row)),
    given >= 0 &&
      h(
        'div',
        { class: 'question' },
        labels(audit, row),
        Number.isFinite(chance) && h('span', { class: 'chance' }, h('b', {}, percent(chance)), ' likely to be wrong'),
      ),
    answers(context, row, decide),
    h(
      'div',
      { class: 'evidence' },
      evidence(audit).map(({ title, strength, told }) => [
        h('span', { class: 'name' }, title),
        meter(strength(row), told(row), title),
        h('span', { class: 'muted' }, told(row)),
      ]),
    ),
    lossCurve(audit, row),
    button('All about this example', () => go('example', { index: String(index) }), { class: 'link' }, 'Enter'),
  ];
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {number} row
 */
function lossCurve(audit, row) {
  const values = audit.curve('loss', row);
  if (!audit.curves || !values) return null;
  const { epochs } = audit.curves;
  const label = 'loss of the example over the epochs';
  return h(
    'figure',
    {},
    h('figcaption', {}, 'loss by epoch'),
    fitted(110, (width) => curve(epochs, [values], { label, width, height: 110 })),
  );
}
