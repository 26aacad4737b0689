// The labels to look at, one after the other: keep, relabel, drop or skip, by keys.

import { decidingKeys } from './deciding.js';
import { fill, h, refocused } from './dom.js';
import { panel } from './panel.js';
import { rowMaker } from './rows.js';
import { selected } from './selection.js';
import { headCell, progressParts, tools } from './toolbar.js';
import { VirtualList } from './virtual.js';

/** @typedef {import('./app.js').Context} Context */

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
  const head = h('div', { class: 'head row' });
  const progress = h('div', { class: 'progress' });
  const empty = h('p', { class: 'nothing', hidden: true });
  const element = h('div', { class: `triage ${state.grid ? 'as-grid' : 'as-table'}`, style: maker.template });
  const list = new VirtualList({
    label: 'examples',
    ...(state.grid ? GRID : TABLE),
    draw: (place) => (state.grid ? maker.tile(rows[place]) : maker.line(rows[place])),
    onPick: (place) => choose(place),
    onOpen: (place) => context.go('example', { index: String(audit.index[rows[place]]) }),
  });
  fill(
    element,
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
    if (rows.length) fill(side, panel(context, rows[list.chosen], decide));
  }

  /** List anew, at the same example if it is still there. */
  function again() {
    rows = selected(audit, decisions, state.asked);
    list.reset(rows.length);
    const place = rows.findIndex((row) => audit.index[row] === state.index);
    empty.hidden = rows.length > 0;
    empty.textContent = state.asked.which === 'open' ? 'everything is decided' : 'no example is like this';
    choose(Math.max(0, place));
    shown();
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
    // Whoever types goes on typing.
    if (!bar.querySelector('input[type=search]:focus')) refocused(bar, () => fill(bar, tools(context, ask, swap)));
    refocused(head, () =>
      fill(
        head,
        maker.heads.map((each) => headCell(each, state.asked, ask)),
      ),
    );
  }

  function swap() {
    state.grid = !state.grid;
    context.refresh();
  }

  function shown() {
    fill(progress, progressParts(context, rows.length));
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
      u: undo,
      '/': () => /** @type {HTMLElement | null} */ (bar.querySelector('input[type=search]'))?.focus(),
    };
    if (rows.length) Object.assign(acts, decidingKeys(context, rows[list.chosen], decide));
    if (!acts[key]) return false;
    acts[key]();
    return true;
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
