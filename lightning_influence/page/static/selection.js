// Which examples are listed, and in which order.

/** @typedef {import('./audit.js').Audit} Audit */
/** @typedef {import('./decisions.js').Decisions} Decisions */

/**
 * @typedef {object} Asked
 * @property {'candidates' | 'open' | 'decided' | 'all'} which
 * @property {string} text Part of an index, an id or a text.
 * @property {number | null} given
 * @property {number | null} suggested
 * @property {{ rows: Set<number>, told: string } | null} chosen Rows from elsewhere.
 * @property {string} sort Name of a column.
 * @property {boolean} descending
 */

/**
 * What is asked for at first.
 * @param {Audit} audit
 * @returns {Asked}
 */
export function firstAsked(audit) {
  const which = audit.candidates ? 'candidates' : 'all';
  return { which, text: '', given: null, suggested: null, chosen: null, sort: 'rank', descending: false };
}

/**
 * @param {Audit} audit
 * @param {Decisions} decisions
 * @param {Asked} asked
 * @returns {Int32Array} Rows.
 */
export function selected(audit, decisions, asked) {
  const given = audit.values('label');
  const suggested = audit.values('suggested');
  const words = asked.text.trim().toLowerCase();
  const rows = [];
  for (let row = 0; row < audit.n; row += 1) {
    if (asked.chosen ? !asked.chosen.rows.has(row) : !inList(audit, decisions, asked.which, row)) continue;
    if (asked.given !== null && given?.[row] !== asked.given) continue;
    if (asked.suggested !== null && suggested?.[row] !== asked.suggested) continue;
    if (words && !says(audit, row, words)) continue;
    rows.push(row);
  }
  return sorted(audit, Int32Array.from(rows), asked);
}

/**
 * @param {Audit} audit
 * @param {Decisions} decisions
 * @param {string} which
 * @param {number} row
 */
function inList(audit, decisions, which, row) {
  if (which === 'all') return true;
  const made = decisions.get(audit.index[row]);
  if (which === 'decided') return made !== undefined;
  return Boolean(audit.candidate[row]) && (which === 'candidates' || !made || made.decision === 'skip');
}

/**
 * @param {Audit} audit
 * @param {number} row
 * @param {string} words
 */
function says(audit, row, words) {
  if (/^#?\d+$/.test(words)) {
    const number = words.replace('#', '');
    if (String(audit.index[row]) === number) return true;
    if (!audit.hasTexts && !audit.columns.has('id')) return String(audit.index[row]).startsWith(number);
  }
  const id = audit.columns.get('id')?.texts?.[row] ?? '';
  return (
    id.toLowerCase().includes(words) ||
    String(audit.texts[audit.index[row]] ?? '')
      .toLowerCase()
      .includes(words)
  );
}

/**
 * Sort rows in place: by a column, then by rank; what has no value comes last.
 * @param {Audit} audit
 * @param {Int32Array} rows
 * @param {Asked} asked
 */
export function sorted(audit, rows, { sort, descending }) {
  const values = audit.values(sort) ?? audit.rank;
  const { rank } = audit;
  const sign = descending ? -1 : 1;
  return rows.sort((a, b) => {
    const [x, y] = [values[a], values[b]];
    if (x === y) return rank[a] - rank[b];
    if (x !== x) return y !== y ? rank[a] - rank[b] : 1;
    if (y !== y) return -1;
    return x < y ? -sign : sign;
  });
}

/**
 * The classes that can be chosen by key, as keys with classes.
 *
 * Where classes are called as they are numbered, the key is the name; else the keys go by how often the given class is
 * taken for another.
 * @param {Audit} audit
 * @param {number} row
 * @returns {[string, number][]}
 */
export function classKeys(audit, row) {
  const { classes } = audit;
  if (classes.length <= 10 && classes.every((label) => label < 10 && audit.label(label) === String(label))) {
    return classes.map((label) => [String(label), label]);
  }
  const likely = classes.length <= 9 ? classes : usual(audit, audit.given(row));
  return likely.slice(0, 9).map((label, place) => [String(place + 1), label]);
}

/** @type {WeakMap<Audit, Map<number, number[]>>} */
const USUAL = new WeakMap();

/**
 * The classes that examples of a class may be of, the most frequent first.
 * @param {Audit} audit
 * @param {number} given
 */
function usual(audit, given) {
  let known = USUAL.get(audit);
  if (!known) USUAL.set(audit, (known = new Map()));
  if (!known.has(given)) {
    const counts = new Map(audit.classes.map((label) => [label, 0]));
    const weight = audit.values('wrong_probability') ?? audit.candidate;
    for (let row = 0; row < audit.n; row += 1) {
      const other = audit.suggested(row);
      if (audit.given(row) === given && counts.has(other))
        counts.set(other, (counts.get(other) ?? 0) + (weight[row] || 0));
    }
    counts.delete(given);
    known.set(
      given,
      [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([label]) => label),
    );
  }
  return /** @type {number[]} */ (known.get(given));
}
