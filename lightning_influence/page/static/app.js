// The frame around the views: which audit, which view, messages, and keys.

import { Audit } from './audit.js';
import { compare } from './compare.js';
import { Decisions } from './decisions.js';
import { button, h, refocused } from './dom.js';
import { example } from './example.js';
import { overview } from './overview.js';
import { classPairs } from './pairs.js';
import { queries } from './queries.js';
import { firstAsked } from './selection.js';
import { triage } from './triage.js';

/**
 * @typedef {object} View
 * @property {HTMLElement} element
 * @property {(event: KeyboardEvent) => boolean} [keys] Whether the key meant something.
 * @property {() => void} [mounted]
 * @property {() => void} [removed]
 */

/**
 * @typedef {object} Context
 * @property {Audit} audit
 * @property {Decisions} decisions
 * @property {import('./host.js').Host} host
 * @property {import('./host.js').Run[]} runs
 * @property {{ asked: import('./selection.js').Asked, index: number, grid: boolean }} triage
 * @property {Record<string, any>} kept What views remember.
 * @property {URLSearchParams} where
 * @property {(view: string, more?: Record<string, string>) => void} go
 * @property {(text: string, kind?: string) => void} say
 * @property {() => void} refresh
 * @property {(id: string) => Promise<Audit>} load
 */

/** @type {[string, string, (context: Context) => View][]} */
const VIEWS = [
  ['overview', 'Overview', overview],
  ['triage', 'Triage', triage],
  ['example', 'Example', example],
  ['queries', 'Queries', queries],
  ['pairs', 'Class pairs', classPairs],
  ['compare', 'Compare', compare],
];

const POLL = 10000; // milliseconds
const MESSAGE = 6000;

export class App {
  /** @param {import('./host.js').Host} host */
  constructor(host) {
    this.host = host;
    /** @type {import('./host.js').Run[]} */
    this.runs = [];
    /** @type {Map<string, Promise<Context>>} */
    this.contexts = new Map();
    /** @type {Map<string, Promise<Context>>} */
    this.before = new Map();
    /** @type {View | null} */
    this.view = null;
    /** @type {Context | null} */
    this.context = null;
    this.shownHash = '';
    this.picker = h('span', { class: 'picker' });
    this.state = h('span', { class: 'state' });
    this.tabs = h('nav', { 'aria-label': 'views' });
    this.main = h('main', { id: 'main' });
    this.message = h('div', { class: 'message', role: 'status', 'aria-live': 'polite' });
    this.element = h(
      'div',
      { id: 'influence' },
      h(
        'header',
        { class: 'top' },
        h('h1', {}, 'Influence'),
        this.picker,
        this.state,
        h('span', { class: 'gap' }),
        this.tabs,
      ),
      this.main,
      this.message,
    );
    addEventListener('hashchange', () => this.route());
    addEventListener('keydown', (event) => this.key(event));
    addEventListener('pagehide', () => this.context?.decisions.flush());
  }

  async start() {
    this.main.replaceChildren(h('p', { class: 'nothing' }, 'reading …'));
    try {
      this.list(await this.host.runs());
      await this.route();
    } catch (error) {
      this.fail(/** @type {Error} */ (error));
    }
    if (this.host.changes) setInterval(() => this.poll(), POLL);
    document.addEventListener('visibilitychange', () => this.host.changes && this.poll());
  }

  /** @param {import('./host.js').Run[]} runs */
  list(runs) {
    this.runs = runs;
    const names = this.runs.map(({ id, name, error }) =>
      h('option', { value: id }, error ? `${name} (can't be read)` : name),
    );
    const box = h(
      'select',
      {
        'aria-label': 'audit',
        on: { change: () => this.go(this.where.get('view') ?? 'overview', { run: box.value }) },
      },
      names,
    );
    this.picker.replaceChildren(box);
    if (this.context) box.value = this.context.audit.id;
  }

  get where() {
    return new URLSearchParams(location.hash.slice(1));
  }

  /**
   * @param {string} view
   * @param {Record<string, string>} [more]
   */
  go(view, more = {}) {
    const run = this.context && { run: this.context.audit.id };
    location.hash = String(new URLSearchParams({ view, ...run, ...more }));
  }

  async route() {
    const [asked, where] = [location.hash, this.where];
    this.message.classList.remove('shown'); // it was of what was to be seen before
    const run = where.get('run') ?? this.runs.find(({ error }) => !error)?.id ?? this.runs[0]?.id;
    if (run === undefined) {
      this.fail(new Error('there is no audit yet; one comes at the end of training.'));
      return;
    }
    try {
      const context = await this.contextOf(run);
      if (location.hash !== asked) return; // what was asked for since is on its way
      this.context = context;
      context.where = where;
      this.show();
    } catch (error) {
      if (location.hash !== asked) return;
      this.context = null;
      this.fail(/** @type {Error} */ (error), run);
    }
    const box = this.picker.querySelector('select');
    if (box) box.value = run;
  }

  /** @param {string} id @returns {Promise<Context>} */
  contextOf(id) {
    const known = this.contexts.get(id);
    if (known) return known;
    const made = this.makeContext(id); // one, though several ask: there is one review to write
    this.contexts.set(id, made);
    made.catch(() => this.contexts.get(id) === made && this.contexts.delete(id));
    return made;
  }

  /** @param {string} id @returns {Promise<Context>} */
  async makeContext(id) {
    const about = this.runs.find((each) => each.id === id);
    if (about?.error) throw new Error(about.error);
    const audit = new Audit(id, await this.host.audit(id), this.host);
    const before = await this.before.get(id)?.catch(() => undefined);
    before?.decisions.flush();
    await before?.decisions.saving; // else two would write the same review
    const decisions = new Decisions(audit);
    await decisions.load();
    const same = before?.audit.status === audit.status ? before : undefined;
    return {
      audit,
      decisions,
      host: this.host,
      runs: this.runs,
      triage: same?.triage ?? { asked: firstAsked(audit), index: -1, grid: false },
      kept: same?.kept ?? {},
      where: this.where,
      go: (/** @type {string} */ view, more = {}) => this.go(view, more),
      say: (/** @type {string} */ text, kind = '') => this.say(text, kind),
      refresh: () => this.refresh(),
      load: async (/** @type {string} */ other) => (await this.contextOf(other)).audit,
    };
  }

  /** Read an audit anew when it is asked for next; filters stay while it is still recorded. @param {string} id */
  forget(id) {
    const context = this.contexts.get(id);
    this.contexts.delete(id);
    if (context) this.before.set(id, context);
  }

  show() {
    const context = /** @type {Context} */ (this.context);
    const name = this.where.get('view') ?? 'overview';
    const [key, title, make] = VIEWS.find(([each]) => each === name) ?? VIEWS[0];
    this.view?.removed?.();
    context.runs = this.runs;
    this.drawTabs(key);
    this.drawState(context.audit);
    try {
      this.view = make(context);
    } catch (error) {
      this.view = null;
      this.fail(/** @type {Error} */ (error));
      return;
    }
    document.title = `${title} · ${context.audit.name}`;
    this.main.replaceChildren(this.view.element);
    this.main.scrollTop = 0;
    this.view.mounted?.();
  }

  /** Show the view anew, where it was scrolled to. */
  refresh() {
    const top = this.main.scrollTop;
    refocused(this.main, () => this.show());
    this.main.scrollTop = top;
  }

  /** @param {string} current */
  drawTabs(current) {
    const tabs = VIEWS.map(([key, title]) =>
      button(title, () => this.go(key), key === current ? { 'aria-current': 'page' } : {}),
    );
    this.tabs.replaceChildren(...tabs);
  }

  /** @param {Audit} audit */
  drawState({ status, done, planned }) {
    const epochs = done === null || done === undefined ? '' : `, ${done}${planned ? ` of ${planned}` : ''} epochs`;
    this.state.replaceChildren(h('span', { class: `status ${status}` }, `${status}${epochs}`));
  }

  /** @param {Error} error @param {string} [run] */
  fail(error, run) {
    this.view?.removed?.();
    this.view = null;
    this.drawTabs('');
    this.state.replaceChildren();
    const name = this.runs.find(({ id }) => id === run)?.name;
    this.main.replaceChildren(
      h(
        'div',
        { class: 'card failed', role: 'alert' },
        h('h2', {}, name ?? 'Nothing can be shown'),
        h('p', {}, error.message),
      ),
    );
  }

  /** @param {string} text @param {string} [kind] */
  say(text, kind = '') {
    this.message.textContent = text;
    this.message.className = `message shown ${kind}`;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.message.classList.remove('shown'), MESSAGE);
  }

  /** See what is new: runs come in, and one that is recorded goes on. */
  async poll() {
    if (document.hidden) return;
    try {
      const before = this.runs;
      const runs = await this.host.runs();
      if (JSON.stringify(runs) === JSON.stringify(before)) return;
      this.list(runs);
      const old = (/** @type {string | undefined} */ id) => JSON.stringify(before.find((run) => run.id === id));
      const changed = runs.filter((run) => JSON.stringify(run) !== old(run.id)).map((run) => run.id);
      const own = this.context?.audit.id;
      for (const id of changed) this.forget(id);
      if (!this.context || changed.includes(String(own))) await this.route();
    } catch {
      // The next time may be better; what is shown stays.
    }
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const target = /** @type {HTMLElement} */ (event.target);
    const typing = target.closest('input:not([type=checkbox]), select, textarea');
    if (typing) {
      if (event.key === 'Escape') {
        event.preventDefault(); // browsers empty a search without saying so
        target.blur();
      }
      return;
    }
    if (target.closest('button, a, summary, input') && [' ', 'Enter'].includes(event.key)) return;
    if (this.view?.keys?.(event)) event.preventDefault();
  }
}
