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
    this.tag = ''; // of the file as it was read or written last
    this.closed = false; // whether the file is left alone
    this.saving = Promise.resolve();
    this.key = `influence-review:${audit.id}:${audit.created}`;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
  }

  /** Take up what was decided before: what is on disk, and on top what never got there. */
  async load() {
    const here = this.stored();
    let there = '';
    try {
      ({ text: there, tag: this.tag } = await this.audit.host.review(this.audit.id));
    } catch (error) {
      this.tell(`the review on disk can't be read: ${/** @type {Error} */ (error).message}`, true);
      this.closed = true;
    }
    this.take(there, 'review.csv');
    if (here.unsaved || !there) this.take(here.text, 'the review in this browser');
    if (here.unsaved) this.save();
    this.dispatchEvent(new Event('change'));
  }

  /**
   * @param {string} text
   * @param {string} name
   */
  take(text, name) {
    if (!text) return;
    try {
      const { decisions, wrong, others } = fromCsv(this.audit, text);
      for (const [index, decision] of decisions) this.made.set(index, decision);
      if (wrong.length) throw new Error(`${wrong[0]}${wrong.length > 1 ? `, and ${wrong.length - 1} rows more` : ''}`);
      if (others.length) throw new Error(`it has columns of its own, ${others.join(', ')}, which would be lost`);
    } catch (error) {
      // What is not understood is not written over.
      this.closed = this.audit.host.keepsReviews;
      const stays = this.closed ? '; it stays as it is, and decisions are kept in this browser alone' : '';
      this.tell(`${name} can't be used as it is: ${/** @type {Error} */ (error).message}${stays}`, true);
    }
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

  /** Write the file, after what is being written. */
  save() {
    clearTimeout(this.timer);
    this.timer = undefined;
    if (!this.closed) this.saving = this.saving.then(() => this.write());
    return this.saving;
  }

  async write() {
    const csv = this.toCsv();
    try {
      this.tag = await this.audit.host.keepReview(this.audit.id, csv, this.tag);
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
