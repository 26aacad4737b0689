// Above the list of triage: what is listed, how far one is, and the heads of the columns.

import { button, counted, download, h, select } from './dom.js';

/** @typedef {import('./app.js').Context} Context */

const HINTS = [
  ['↑↓', 'move'],
  ['U', 'undo'],
  ['/', 'search'],
];

/**
 * @param {import('./rows.js').Head} head
 * @param {import('./selection.js').Asked} asked
 * @param {(change: Partial<import('./selection.js').Asked>) => void} ask
 */
export function headCell({ key, title, sort, hint }, asked, ask) {
  if (!sort) return h('span', { class: key, title: hint }, title);
  const own = asked.sort === sort;
  const act = () => ask({ sort, descending: own ? !asked.descending : !['rank', 'index', 'label'].includes(sort) });
  const told = own ? (asked.descending ? ' ▾' : ' ▴') : '';
  const name = `sort by ${title}`;
  return h(
    'span',
    { class: key, title: hint },
    button(`${title}${told}`, act, { 'aria-label': name, 'aria-pressed': String(own) }),
  );
}

/**
 * @param {Context} context
 * @param {(change: Partial<import('./selection.js').Asked>) => void} ask
 * @param {() => void} swap
 */
export function tools({ audit, decisions, triage: { asked, grid }, say }, ask, swap) {
  const names = audit.classes.map((label) => /** @type {[string, string]} */ ([String(label), audit.label(label)]));
  const classes = (/** @type {'given' | 'suggested'} */ which) =>
    select(which, [['', 'any'], ...names], asked[which] === null ? '' : String(asked[which]), (value) =>
      ask({ [which]: value === '' ? null : Number(value) }),
    );
  const search = h('input', {
    type: 'search',
    placeholder: audit.hasTexts ? '#index, id or text' : audit.columns.has('id') ? 'index or id' : 'index',
    'aria-label': 'search',
    value: asked.text,
    on: { input: () => ask({ text: search.value }) },
  });
  search.value = asked.text;
  /** @type {[string, string][]} */
  const lists = [
    ['candidates', 'candidates'],
    ['open', 'still open'],
    ['decided', 'decided'],
    ['all', 'all examples'],
  ];
  const file = h('input', {
    type: 'file',
    accept: '.csv,text/csv',
    hidden: true,
    'aria-label': 'import a review',
    on: {
      change: async () => {
        try {
          say(decisions.read(await file.files[0].text()), 'good');
          ask({});
        } catch (error) {
          say(/** @type {Error} */ (error).message, 'bad');
        }
      },
    },
  });
  return [
    asked.chosen
      ? h(
          'span',
          { class: 'chip' },
          asked.chosen.told,
          button('✕', () => ask({ chosen: null }), { 'aria-label': 'show the list again' }),
        )
      : select('show', lists, asked.which, (which) => ask({ which: /** @type {any} */ (which) })),
    ...(audit.labelled ? [classes('given'), classes('suggested')] : []),
    h('label', { class: 'field' }, search),
    sorting(audit, asked, ask),
    h(
      'span',
      { class: 'acts' },
      button(grid ? 'Table' : 'Grid', swap, { title: 'the same examples as a table, or as a grid' }),
      button('Import', () => file.click(), { title: 'go on with a review that was exported' }),
      file,
      button('Export CSV', () => exported(decisions, say), {
        class: 'primary',
        title: 'the decisions, for report.apply_review("review.csv")',
      }),
    ),
  ];
}

/**
 * @param {import('./decisions.js').Decisions} decisions
 * @param {(text: string, kind?: string) => void} say
 */
function exported(decisions, say) {
  if (!decisions.made.size) {
    say('nothing is decided yet: R relabels, K keeps, D drops, a digit names the class', 'bad');
    return;
  }
  download('review.csv', decisions.toCsv());
  const told = counted(decisions.made.size, 'decision');
  say(`${told} in review.csv; in Python, report.apply_review("review.csv") gives the new labels`, 'good');
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {import('./selection.js').Asked} asked
 * @param {(change: Partial<import('./selection.js').Asked>) => void} ask
 */
function sorting(audit, asked, ask) {
  const names = [...audit.columns.values()].filter(({ kind }) => kind !== 'bool').map(({ name }) => name);
  const options = names.map((name) => /** @type {[string, string]} */ ([name, name.replaceAll('_', ' ')]));
  const act = (/** @type {string} */ name) =>
    ask({ sort: name, descending: audit.columns.get(name)?.direction === 'high' });
  return select('sort', options, asked.sort, act);
}

/**
 * @param {Context} context
 * @param {number} listed
 */
export function progressParts({ audit, decisions }, listed) {
  const total = audit.candidates;
  let done = 0;
  for (const [index, { decision }] of decisions.made) {
    if (decision !== 'skip' && audit.candidate[audit.rows.get(index) ?? -1]) done += 1;
  }
  const share = total ? done / total : 0;
  const told = total
    ? `${done.toLocaleString('en')} of ${counted(total, 'candidate')} decided`
    : counted(decisions.count, 'decision');
  return [
    h('span', { role: 'status' }, told),
    total > 0 &&
      h(
        'span',
        {
          class: 'meter track',
          role: 'progressbar',
          'aria-label': 'decided',
          'aria-valuenow': Math.round(100 * share),
        },
        h('span', { class: 'fill', style: { width: `${100 * share}%` } }),
      ),
    h('span', { class: 'muted' }, `${counted(listed, 'example')} listed`),
    h('span', { class: decisions.failed ? 'bad' : 'muted' }, decisions.kept),
    h('span', { class: 'gap' }),
    h(
      'span',
      { class: 'hints' },
      HINTS.map(([key, told]) => [h('kbd', {}, key), told]),
    ),
  ];
}
