// An audit as it was handed over: columns as typed arrays, curves, pictures on demand.

/**
 * @typedef {object} Column
 * @property {string} name
 * @property {string} meaning
 * @property {'high' | 'low' | null} direction
 * @property {'float' | 'int' | 'bool' | 'text'} kind
 * @property {ArrayLike<number>} values Of texts, their places in the alphabet.
 * @property {string[] | null} texts
 */

/** @typedef {[string, number | null][]} Tokens Texts of the tokens of a training example, with their parts of a score. */

/** @typedef {Record<string, any> & { index: number, list: string, kind: string, tokens?: Tokens | null }} Pair */

const ARRAYS = { float: Float32Array, int: Int32Array, bool: Uint8Array };

export class Audit {
  /**
   * @param {string} id
   * @param {any} content The document.
   * @param {import('./host.js').Host} host
   */
  constructor(id, content, host) {
    if (!content || content.format !== 1) {
      const found = content && content.format;
      throw new Error(`the audit has format ${JSON.stringify(found)}; this page reads format 1. Update the package.`);
    }
    this.id = id;
    this.host = host;
    this.name = String(content.name ?? id);
    this.status = String(content.status ?? 'complete');
    this.created = String(content.created ?? '');
    this.done = content.epochs_done ?? null;
    this.planned = content.epochs_planned ?? null;
    /** @type {{ title: string, value: string, note: string }[]} */
    this.cards = content.cards ?? [];
    /** @type {string[]} */
    this.notes = content.notes ?? [];
    /** @type {any[] | null} */
    this.labelNames = content.label_names ?? null;
    this.labels = content.labels ?? null;
    /** @type {Map<string, Column>} */
    this.columns = new Map((content.columns ?? []).map((/** @type {any} */ each) => [each.name, column(each)]));
    this.index = this.needed('index');
    this.rank = this.needed('rank');
    this.candidate = this.needed('candidate');
    this.n = this.index.length;
    for (const each of this.columns.values()) {
      if (each.values.length !== this.n) throw new Error(`the column ${each.name} is damaged: it has another length`);
    }
    this.rows = new Map(Array.from(this.index, (index, row) => [index, row]));
    /** @type {Pair[]} */
    this.pairs = content.pairs ?? [];
    /** @type {string | null} */
    this.ask = content.ask ?? null;
    this.histories = content.histories ?? [];
    this.texts = content.texts ?? {};
    this.queryTexts = content.query_texts ?? {};
    this.picturesOf = content.pictures_of; // what the pictures say that they belong to
    this.pictures = content.pictures ?? {};
    this.queryPictures = content.query_pictures ?? {};
    this.hasPictures = Object.keys(this.pictures).length > 0;
    this.hasTexts = Object.keys(this.texts).length > 0;
    this.curves = curvesOf(content.curves);
    this.classes = classesOf(this);
    this.longNames = this.classes.some((label) => this.label(label).length > 6);
    this.candidates = Array.from(this.candidate).filter(Boolean).length;
    /** @type {Map<number, Promise<string[]>>} */
    this.chunks = new Map();
    /** @type {Map<string, Float32Array>} */
    this.shares = new Map();
  }

  /** @param {string} name */
  needed(name) {
    const found = this.columns.get(name);
    if (!found) throw new Error(`the audit is damaged: the column ${name} is missing`);
    return found.values;
  }

  /** @param {string} name */
  values(name) {
    return this.columns.get(name)?.values ?? null;
  }

  /**
   * @param {string} name
   * @param {number} row
   */
  value(name, row) {
    const found = this.columns.get(name);
    return found ? found.values[row] : NaN;
  }

  /** Whether examples have labels, so that one can be wrong. */
  get labelled() {
    return this.classes.length > 0;
  }

  /** @param {number} label */
  label(label) {
    if (!Number.isInteger(label) || label < 0) return '–';
    return clean(this.labelNames?.[label]) || String(label);
  }

  /** @param {number} row */
  given(row) {
    return this.columns.has('label') ? this.value('label', row) : -1;
  }

  /** @param {number} row */
  suggested(row) {
    return this.columns.has('suggested') ? this.value('suggested', row) : -1;
  }

  /**
   * What an example is called besides its index: its id or its text.
   * @param {number} row
   */
  text(row) {
    return clean(this.texts[this.index[row]]) || this.columns.get('id')?.texts?.[row] || '';
  }

  /**
   * The share of the examples that are less suspicious, from 0 to 1, of each example.
   * @param {string} name
   */
  percentiles(name) {
    const known = this.shares.get(name);
    if (known) return known;
    const { values, direction } = /** @type {Column} */ (this.columns.get(name));
    const sign = direction === 'low' ? -1 : 1;
    const sorted = Float64Array.from(values, (value) => sign * value)
      .filter((value) => Number.isFinite(value))
      .sort();
    const found = Float32Array.from(values, (value) =>
      Number.isFinite(value) && sorted.length > 1 ? below(sorted, sign * value) / (sorted.length - 1) : NaN,
    );
    this.shares.set(name, found);
    return found;
  }

  /**
   * A curve of an example over the epochs.
   * @param {string} name
   * @param {number} row
   */
  curve(name, row) {
    const table = this.curves?.data.get(name);
    const place = this.curves?.rows ? this.curves.rows.get(row) : row;
    if (!this.curves || !table || place === undefined) return null;
    const width = this.curves.epochs.length;
    return table.subarray(place * width, (place + 1) * width);
  }

  /**
   * The picture of a training example, or of a query ("set/index").
   * @param {string | number} key
   * @param {boolean} [ofQuery]
   * @returns {Promise<string | null>}
   */
  async picture(key, ofQuery = false) {
    const place = (ofQuery ? this.queryPictures : this.pictures)[key];
    if (!place) return null;
    const [chunk, position] = place;
    if (!this.chunks.has(chunk)) this.chunks.set(chunk, this.host.pictures(this.id, chunk));
    try {
      const all = (await this.chunks.get(chunk)) ?? [];
      // Those of an audit that has taken the place of this one are others.
      if (this.picturesOf !== undefined && all[all.length - 1] !== this.picturesOf) return null;
      const found = all[position];
      return typeof found === 'string' && found.startsWith('data:image/') ? found : null;
    } catch {
      this.chunks.delete(chunk); // so that it is asked for again
      return null;
    }
  }
}

/** @param {any} about @returns {Column} */
function column({ name, meaning, direction, kind, data }) {
  const about = { name: String(name), meaning: String(meaning ?? ''), direction: direction ?? null, kind };
  if (kind === 'text') {
    const places = new Map([...new Set(data)].sort().map((text, place) => [text, place]));
    return { ...about, values: data.map((/** @type {string} */ text) => places.get(text)), texts: data.map(clean) };
  }
  const type = ARRAYS[/** @type {'float'} */ (kind)];
  if (!type) throw new Error(`the column ${name} has the unknown kind ${kind}`);
  return { ...about, values: new type(bytes(data)), texts: null };
}

/** @param {string} text */
function bytes(text) {
  const letters = atob(text);
  const found = new Uint8Array(letters.length);
  for (let place = 0; place < found.length; place += 1) found[place] = letters.charCodeAt(place);
  return found.buffer;
}

/** @param {any} curves */
function curvesOf(curves) {
  if (!curves?.epochs?.length) return null;
  /** @type {Map<string, Float32Array>} */
  const data = new Map(
    Object.entries(curves.data).map(([name, text]) => [name, new Float32Array(bytes(String(text)))]),
  );
  /** @type {Map<number, number> | null} */
  const rows = curves.rows === 'all' ? null : new Map(curves.rows.map((/** @type {number} */ row, i = 0) => [row, i]));
  if (rows) curves.rows.forEach((/** @type {number} */ row, /** @type {number} */ place) => rows.set(row, place));
  return {
    epochs: /** @type {number[]} */ (curves.epochs),
    names: /** @type {string[]} */ (curves.names),
    given: curves.p_given ?? (data.has('probability') ? 'probability' : null),
    suggested: data.has(curves.p_suggested) ? String(curves.p_suggested) : null,
    data,
    rows,
  };
}

/** @param {Audit} audit @returns {number[]} The classes that the labels know, ascending. */
function classesOf(audit) {
  const found = new Set();
  for (const name of ['label', 'suggested', 'predicted']) {
    for (const label of Array.from(audit.values(name) ?? [])) if (label >= 0) found.add(label);
  }
  return [...found].sort((a, b) => a - b);
}

/**
 * How many of the sorted values are smaller.
 * @param {Float64Array} sorted
 * @param {number} value
 */
function below(sorted, value) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/**
 * Text without characters that reorder or hide what stands around them.
 * @param {unknown} text
 */
export function clean(text) {
  if (text === null || text === undefined) return '';
  return String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, '');
}
