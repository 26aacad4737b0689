// What a person has decided, kept in the browser and, where the host can, beside the audit.

import { fromCsv, toCsv } from './review_csv.js';

/** @typedef {import('./review_csv.js').Decision} Decision */

const WAIT = 400; // milliseconds, so that a row of keys is one file

export class Decisions extends EventTarget {
  /** @param {import('./audit.js').Audit} audit */
  constructor(audit) {
    super();
    this.audit = audit;
    /** @type {Map<number, Decision>} */
    this.made = new Map();
    /** @type {[number, Decision | undefined][][]} */
    this.past = [];
    this.kept = ''; // what is said of where it lies
    this.failed = false;
    this.key = `influence-review:${audit.id}:${audit.created}`;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
  }

  /** Take up what was decided before. */
  async load() {
    const here = this.stored();
    let there = '';
    try {
      there = await this.audit.host.review(this.audit.id);
    } catch (error) {
      this.tell(`the review on disk can't be read: ${/** @type {Error} */ (error).message}`, true);
    }
    // The file is what others see and edit; what never got there is still in the browser.
    const text = there && !here.unsaved ? there : here.text || there;
    if (text) {
      try {
        this.made = fromCsv(this.audit, text).decisions;
      } catch (error) {
        this.tell(`the review can't be read: ${/** @type {Error} */ (error).message}`, true);
      }
    }
    if (here.unsaved) this.save();
    this.dispatchEvent(new Event('change'));
  }

  /** @param {number} index */
  get(index) {
    return this.made.get(index);
  }

  /** How many are decided; skipped ones are not. */
  get count() {
    let count = 0;
    for (const { decision } of this.made.values()) if (decision !== 'skip') count += 1;
    return count;
  }

  /**
   * @param {number} index
   * @param {Decision} decision
   */
  set(index, decision) {
    this.change([[index, decision]]);
  }

  /** Take the last decision back. @returns {number | null} Whose. */
  undo() {
    const last = this.past.pop();
    if (!last) return null;
    this.apply(last);
    return last[0]?.[0] ?? null;
  }

  /**
   * Add the decisions of a table.
   * @param {string} text
   * @returns {string} What came of it.
   */
  read(text) {
    const { decisions, wrong } = fromCsv(this.audit, text);
    if (decisions.size) this.change([...decisions]);
    const left = wrong.length ? `; ${wrong.length} rows can't be used: ${wrong.slice(0, 3).join('; ')}` : '';
    return `${decisions.size} decisions taken over${left}`;
  }

  toCsv() {
    return toCsv(this.audit, this.made);
  }

  /** @param {[number, Decision][]} entries */
  change(entries) {
    this.past.push(entries.map(([index]) => [index, this.made.get(index)]));
    this.apply(entries);
  }

  /** @param {[number, Decision | undefined][]} entries */
  apply(entries) {
    for (const [index, decision] of entries) {
      this.made.delete(index); // the last one decided comes last
      if (decision) this.made.set(index, decision);
    }
    const unsaved = this.audit.host.keepsReviews;
    this.store(unsaved);
    clearTimeout(this.timer);
    if (unsaved) this.timer = setTimeout(() => this.save(), WAIT);
    this.dispatchEvent(new Event('change'));
  }

  /** Write what was not written yet, for a page that goes. */
  flush() {
    if (this.timer !== undefined) this.save();
  }

  async save() {
    clearTimeout(this.timer);
    this.timer = undefined;
    const csv = this.toCsv();
    try {
      await this.audit.host.keepReview(this.audit.id, csv);
      if (csv === this.toCsv()) this.store(false);
      this.tell('saved in review.csv beside the audit', false);
    } catch (error) {
      this.tell(`not saved on disk: ${/** @type {Error} */ (error).message}`, true);
    }
  }

  /**
   * @param {string} text
   * @param {boolean} failed
   */
  tell(text, failed) {
    [this.kept, this.failed] = [text, failed];
    this.dispatchEvent(new Event('kept'));
  }

  /** @param {boolean} unsaved */
  store(unsaved) {
    try {
      localStorage.setItem(this.key, JSON.stringify({ text: this.toCsv(), unsaved }));
      if (!unsaved) this.kept ||= 'kept in this browser; export to pass it on';
    } catch {
      this.tell('this browser keeps nothing: export before you leave', true);
    }
  }

  stored() {
    try {
      return JSON.parse(localStorage.getItem(this.key) ?? '') ?? { text: '', unsaved: false };
    } catch {
      return { text: '', unsaved: false };
    }
  }
}
