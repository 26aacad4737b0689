// The example at hand, beside the list: what it is, what speaks against its label, and what can be decided.

import { curve } from './charts.js';
import { button, fitted, h, percent, select } from './dom.js';
import { badge, evidence, labels, meter, picture } from './parts.js';
import { classKeys } from './selection.js';

/**
 * @param {import('./app.js').Context} context
 * @param {number} row
 * @param {(decision: 'keep' | 'relabel' | 'drop' | 'skip', label?: number | null) => void} decide
 */
export function panel(context, row, decide) {
  const { audit, decisions, go } = context;
  const index = audit.index[row];
  const made = decisions.get(index);
  const given = audit.given(row);
  const suggested = audit.suggested(row);
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
    answers(context, row, decide, made, suggested),
    audit.labelled && classes(context, row, decide),
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
 * @param {import('./app.js').Context} context
 * @param {number} row
 * @param {(decision: any, label?: number | null) => void} decide
 * @param {import('./review_csv.js').Decision | undefined} made
 * @param {number} suggested
 */
function answers({ audit }, row, decide, made, suggested) {
  const pressed = (/** @type {string} */ decision) => ({ 'aria-pressed': String(made?.decision === decision) });
  const relabel = suggested >= 0 && suggested !== audit.given(row);
  return h(
    'div',
    { class: 'answers', role: 'group', 'aria-label': 'decide' },
    button('Keep', () => decide('keep'), { class: 'keep', ...pressed('keep') }, 'K'),
    relabel &&
      button(
        `Relabel ${audit.label(suggested)}`,
        () => decide('relabel', suggested),
        { class: 'relabel', ...pressed('relabel') },
        'R',
      ),
    button('Drop', () => decide('drop'), { class: 'drop', ...pressed('drop') }, 'D'),
    button('Skip', () => decide('skip'), { class: 'skip', ...pressed('skip') }, 'S'),
  );
}

/**
 * @param {import('./app.js').Context} context
 * @param {number} row
 * @param {(decision: any, label?: number | null) => void} decide
 */
function classes({ audit }, row, decide) {
  const keys = classKeys(audit, row);
  const given = audit.given(row);
  const others = audit.classes.filter((label) => !keys.some(([, own]) => own === label));
  return h(
    'div',
    {
      class: keys.every(([key, label]) => audit.label(label) === key) ? 'classes digits' : 'classes',
      role: 'group',
      'aria-label': 'another class',
    },
    keys.map(([key, label]) => {
      const name = audit.label(label);
      const own = label === given;
      const about = { class: own ? 'own' : '', 'aria-label': `${own ? 'keep' : 'relabel'} ${name}`, title: name };
      return button(name === key ? '' : name, () => decide(own ? 'keep' : 'relabel', own ? null : label), about, key);
    }),
    others.length > 0 &&
      select(
        'another class',
        [
          ['', `${others.length} more…`],
          ...others.map((each) => /** @type {[string, string]} */ ([String(each), audit.label(each)])),
        ],
        '',
        (value) => value !== '' && decide('relabel', Number(value)),
        true,
      ),
  );
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
    fitted(110, (width) => curve(epochs, values, { label, width, height: 110 })),
  );
}
