// What can be decided about an example, by buttons and by keys.

import { button, h, select } from './dom.js';
import { classKeys } from './selection.js';

/** @typedef {(decision: 'keep' | 'relabel' | 'drop' | 'skip', label?: number | null) => void} Decide */

/**
 * The keys that decide, by what they do.
 * @param {import('./app.js').Context} context
 * @param {number} row
 * @param {Decide} decide
 * @returns {Record<string, () => void>}
 */
export function decidingKeys({ audit, say }, row, decide) {
  const [given, suggested] = [audit.given(row), audit.suggested(row)];
  const keys = audit.labelled ? classKeys(audit, row) : [];
  return {
    k: () => decide('keep'),
    d: () => decide('drop'),
    s: () => decide('skip'),
    r: () => {
      if (suggested < 0 || suggested === given) say('no other label is suggested');
      else decide('relabel', suggested);
    },
    ...Object.fromEntries(
      keys.map(([key, label]) => [key, () => (label === given ? decide('keep') : decide('relabel', label))]),
    ),
  };
}

/**
 * The buttons of what can be decided about an example.
 * @param {import('./app.js').Context} context
 * @param {number} row
 * @param {Decide} decide
 */
export function answers(context, row, decide) {
  const { audit, decisions } = context;
  const made = decisions.get(audit.index[row]);
  const suggested = audit.suggested(row);
  const pressed = (/** @type {string} */ decision) => ({ 'aria-pressed': String(made?.decision === decision) });
  const relabel = suggested >= 0 && suggested !== audit.given(row);
  return [
    h(
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
    ),
    audit.labelled && classes(context, row, decide),
  ];
}

/**
 * @param {import('./app.js').Context} context
 * @param {number} row
 * @param {Decide} decide
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
