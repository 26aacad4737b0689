// The labels to look at, one after the other: keep, relabel, drop or skip, by keys.

import { button, counted, download, h, select } from './dom.js';
import { panel } from './panel.js';
import { rowMaker } from './rows.js';
import { classKeys, selected } from './selection.js';
import { VirtualList } from './virtual.js';

/** @typedef {import('./app.js').Context} Context */

const HINTS = [
  ['↑↓', 'move'],
  ['U', 'undo'],
  ['/', 'search'],
];
const TABLE = { height: 56, least: Infinity };
const GRID = { height: 198, least: 150 };

/**
 * @param {Context} context
 * @returns {import('./app.js').View}
 */
export function triage(context) {
  const { audit, decisions, triage: state } = context;
  const maker = rowMaker(audit, decisions);
  let rows = selected(audit, decisions, state.asked);
  const side = h('aside', { class: 'panel', 'aria-label': 'the example at hand', tabindex: '-1' });
  const bar = h('div', { class: 'toolbar', role: 'toolbar', 'aria-label': 'which examples' });
  const head = h('div', { class: 'head row', style: { 'grid-template-columns': maker.template } });
  const progress = h('div', { class: 'progress' });
  const empty = h('p', { class: 'nothing', hidden: true });
  const element = h('div', { class: `triage ${state.grid ? 'as-grid' : 'as-table'}` });
  const list = new VirtualList({
    label: 'examples',
    ...(state.grid ? GRID : TABLE),
    draw: (place) => {
      const item = state.grid ? maker.tile(rows[place]) : maker.line(rows[place]);
      if (!state.grid) item.style.gridTemplateColumns = maker.template;
      return item;
    },
    onPick: (place) => choose(place),
    onOpen: (place) => context.go('example', { index: String(audit.index[rows[place]]) }),
  });
  element.append(
    bar,
    progress,
    h('div', { class: 'work' }, h('div', { class: 'listing' }, !state.grid && head, empty, list.element), side),
  );

  /** @param {number} place */
  function choose(place) {
    const at = Math.max(0, Math.min(rows.length - 1, place));
    if (!rows.length) {
      side.replaceChildren(h('p', { class: 'nothing' }, 'no example is chosen'));
      return;
    }
    state.index = audit.index[rows[at]];
    list.choose(at);
    draw();
  }

  /** Draw the panel again. */
  function draw() {
    if (rows.length) side.replaceChildren(...panel(context, rows[list.chosen], decide).flat().filter(isNode));
  }

  /** List anew, at the same example if it is still there. */
  function again() {
    const started = performance.now();
    rows = selected(audit, decisions, state.asked);
    list.reset(rows.length);
    const place = rows.findIndex((row) => audit.index[row] === state.index);
    empty.hidden = rows.length > 0;
    empty.textContent = state.asked.which === 'open' ? 'everything is decided' : 'no example is like this';
    choose(Math.max(0, place));
    context.took = performance.now() - started;
    toolbar();
  }

  /**
   * @param {'keep' | 'relabel' | 'drop' | 'skip'} decision
   * @param {number | null} [label]
   */
  function decide(decision, label = null) {
    if (!rows.length) return;
    const place = list.chosen;
    const index = audit.index[rows[place]];
    decisions.set(index, { decision, label });
    list.refresh(place);
    const told = label === null ? decision : `relabelled ${audit.label(label)}`;
    context.say(`example ${index}: ${told}`);
    if (place + 1 < rows.length) choose(place + 1);
    else draw();
  }

  function undo() {
    const index = decisions.undo();
    if (index === null) {
      context.say('nothing to undo');
      return;
    }
    const place = rows.findIndex((row) => audit.index[row] === index);
    context.say(`example ${index}: taken back`);
    if (place < 0) return;
    list.refresh(place);
    choose(place);
  }

  /** @param {Partial<import('./selection.js').Asked>} change */
  function ask(change) {
    Object.assign(state.asked, change);
    again();
  }

  function toolbar() {
    const focused = bar.contains(document.activeElement) ? document.activeElement?.getAttribute('aria-label') : null;
    bar.replaceChildren(...tools(context, ask, swap));
    if (focused) /** @type {HTMLElement | null} */ (bar.querySelector(`[aria-label="${CSS.escape(focused)}"]`))?.focus();
    head.replaceChildren(...maker.heads.map((each) => headCell(each, state.asked, ask)));
  }

  function swap() {
    state.grid = !state.grid;
    context.refresh();
  }

  function shown() {
    const total = Array.from(audit.candidate).filter(Boolean).length;
    progress.replaceChildren(...progressParts(context, rows.length, total));
  }

  decisions.addEventListener('change', shown);
  decisions.addEventListener('kept', shown);

  /** @param {KeyboardEvent} event */
  function keys(event) {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const step = state.grid ? list.across : 1;
    /** @type {Record<string, () => void>} */
    const acts = {
      ArrowDown: () => choose(list.chosen + step),
      ArrowUp: () => choose(list.chosen - step),
      ...(state.grid && { ArrowRight: () => choose(list.chosen + 1), ArrowLeft: () => choose(list.chosen - 1) }),
      j: () => choose(list.chosen + 1),
      PageDown: () => choose(list.chosen + 8 * step),
      PageUp: () => choose(list.chosen - 8 * step),
      Home: () => choose(0),
      End: () => choose(rows.length - 1),
      Enter: () => rows.length && context.go('example', { index: String(state.index) }),
      k: () => decide('keep'),
      d: () => decide('drop'),
      s: () => decide('skip'),
      u: undo,
      r: relabel,
      '/': () => /** @type {HTMLElement | null} */ (bar.querySelector('input[type=search]'))?.focus(),
    };
    if (rows.length && audit.labelled) {
      for (const [own, label] of classKeys(audit, rows[list.chosen])) {
        const same = label === audit.given(rows[list.chosen]);
        acts[own] = () => (same ? decide('keep') : decide('relabel', label));
      }
    }
    if (!acts[key]) return false;
    acts[key]();
    return true;
  }

  function relabel() {
    const row = rows[list.chosen];
    const suggested = rows.length ? audit.suggested(row) : -1;
    if (suggested < 0 || suggested === audit.given(row)) context.say('no other label is suggested');
    else decide('relabel', suggested);
  }

  return {
    element,
    keys,
    mounted: () => {
      again();
      shown();
      list.element.focus({ preventScroll: true });
    },
    removed: () => {
      decisions.removeEventListener('change', shown);
      decisions.removeEventListener('kept', shown);
    },
  };
}

/** @param {any} child */
const isNode = (child) => child instanceof Node;

/**
 * @param {import('./rows.js').Head} head
 * @param {import('./selection.js').Asked} asked
 * @param {(change: Partial<import('./selection.js').Asked>) => void} ask
 */
function headCell({ key, title, sort, hint }, asked, ask) {
  if (!sort) return h('span', { class: key, title: hint }, title);
  const own = asked.sort === sort;
  const act = () => ask({ sort, descending: own ? !asked.descending : !['rank', 'index', 'label'].includes(sort) });
  const told = own ? (asked.descending ? ' ▾' : ' ▴') : '';
  const name = `sort by ${title}`;
  return h('span', { class: key, title: hint }, button(`${title}${told}`, act, { 'aria-label': name, 'aria-pressed': String(own) }));
}

/**
 * @param {Context} context
 * @param {(change: Partial<import('./selection.js').Asked>) => void} ask
 * @param {() => void} swap
 */
function tools({ audit, decisions, triage: { asked, grid }, say }, ask, swap) {
  const names = audit.classes.map((label) => /** @type {[string, string]} */ ([String(label), audit.label(label)]));
  const classes = (/** @type {'given' | 'suggested'} */ which) =>
    select(
      which,
      [['', 'any'], ...names],
      asked[which] === null ? '' : String(asked[which]),
      (value) => ask({ [which]: value === '' ? null : Number(value) }),
    );
  const search = h('input', {
    type: 'search',
    placeholder: audit.hasTexts ? 'index, id or text' : 'index or id',
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
      ? h('span', { class: 'chip' }, asked.chosen.told, button('✕', () => ask({ chosen: null }), { 'aria-label': 'show the list again' }))
      : select('show', lists, asked.which, (which) => ask({ which: /** @type {any} */ (which) })),
    ...(audit.labelled ? [classes('given'), classes('suggested')] : []),
    h('label', { class: 'field' }, search),
    sorting(audit, asked, ask),
    h('span', { class: 'gap' }),
    button(grid ? 'Table' : 'Grid', swap, { title: 'the same examples as a table, or as a grid' }),
    button('Import', () => file.click(), { title: 'go on with a review that was exported' }),
    file,
    button('Export CSV', () => download('review.csv', decisions.toCsv()), {
      class: 'primary',
      title: 'the decisions, for report.apply_review("review.csv")',
    }),
  ];
}

/**
 * @param {import('./audit.js').Audit} audit
 * @param {import('./selection.js').Asked} asked
 * @param {(change: Partial<import('./selection.js').Asked>) => void} ask
 */
function sorting(audit, asked, ask) {
  const names = [...audit.columns.values()].filter(({ kind }) => kind !== 'bool').map(({ name }) => name);
  const options = names.map((name) => /** @type {[string, string]} */ ([name, name.replaceAll('_', ' ')]));
  const act = (/** @type {string} */ name) => ask({ sort: name, descending: audit.columns.get(name)?.direction === 'high' });
  return select('sort', options, asked.sort, act);
}

/**
 * @param {Context} context
 * @param {number} listed
 * @param {number} total
 */
function progressParts({ audit, decisions }, listed, total) {
  let done = 0;
  for (const [index, { decision }] of decisions.made) {
    if (decision !== 'skip' && audit.candidate[audit.rows.get(index) ?? -1]) done += 1;
  }
  const share = total ? done / total : 0;
  const told = total ? `${done.toLocaleString('en')} of ${counted(total, 'candidate')} decided` : counted(decisions.count, 'decision');
  return [
    h('span', { role: 'status' }, told),
    total > 0 &&
      h(
        'span',
        { class: 'meter track', role: 'progressbar', 'aria-label': 'decided', 'aria-valuenow': Math.round(100 * share) },
        h('span', { class: 'fill', style: { width: `${100 * share}%` } }),
      ),
    h('span', { class: 'muted' }, `${counted(listed, 'example')} listed`),
    h('span', { class: decisions.failed ? 'bad' : 'muted' }, decisions.kept),
    h('span', { class: 'gap' }),
    h('span', { class: 'hints' }, HINTS.map(([key, told]) => [h('kbd', {}, key), told])),
  ].filter(isNode);
}
